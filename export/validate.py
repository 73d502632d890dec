"""Eager PyTorch against ONNX Runtime: several inputs, several sizes, ORT's optimizer off and on."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fxopt import args
from fxopt.args import value
from fxopt.contracts import Contract
from fxopt.effects import is_random
from fxopt.errors import ExportError, NumericsError, describe
from fxopt.export.dtypes import HALF_TYPES
from fxopt.export.files import OnnxFile, save_model
from fxopt.export.guards import GUARD_OUTPUT, check_guards, has_guards
from fxopt.export.half_emulation import emulated
from fxopt.export.kernel_noise import kernel_noise
from fxopt.export.report import OutputResult, ValidationReport
from fxopt.export.session import Optimization, Session
from fxopt.export.validation_cases import Case, cases, drowns, nearer_case
from fxopt.freeze import frozen
from fxopt.graph_module import CapturedModule, graph_modules
from fxopt.isolation import isolated
from fxopt.numerics import Reference, coarsest_eps, largest_noise, measure, reference, surely_rounding, violation

__all__ = ["ValidationReport", "contract_of", "validate", "validate_file"]

_TWICE_DB = 20 * math.log10(2)
_HALF = "half"  # not a level of ORT's: every operator rounded to half precision, see half_emulation
_OPTIMIZATIONS: tuple[Optimization, ...] = ("none", "all")


def validate(
    model: OnnxFile | str | os.PathLike[str] | bytes,
    gm: CapturedModule,
    *,
    inputs: Sequence[Any] | None = None,
    sizes: bool = True,
    contract: Contract | None = None,
) -> ValidationReport:
    """Compare an ONNX model with the graph that it was made from.

    Args:
        model: An exported model, a file or a serialized model.
        gm: The graph, in eval mode.
        inputs: Samples to compare on; those of the graph, and one of other values, if not given.
        sizes: Also compare with every dynamic size at 1, 2 and an odd number.
        contract: How close ORT must come. If not given: that of the passes if it is LOSSY, ROUNDING otherwise, since
            ORT may add numbers in another order than PyTorch.

    Raises:
        NumericsError: the model breaks the contract; the message names output, element, node, source line and passes.
        ExportError: ORT cannot load or run the model.
    """
    if isinstance(model, OnnxFile):
        source: Path | bytes = model.path if model.path is not None else model.to_bytes()
    else:
        source = model if isinstance(model, bytes) else Path(model)
    return validate_file(source, gm, inputs=inputs, sizes=sizes, contract=contract)


def validate_file(
    source: Path | bytes,
    gm: CapturedModule,
    *,
    names: Sequence[str] | None = None,
    inputs: Sequence[Any] | None = None,
    sizes: bool = True,
    contract: Contract | None = None,
) -> ValidationReport:
    """Compare as :func:`validate` does; ``names`` are the names that the outputs must have."""
    contract = contract or contract_of(gm)
    _refuse_random(gm)
    report = ValidationReport(str(contract))
    sessions = _sessions(source, gm, report)
    for session in sessions.values():
        _check_names(session, gm, names)
    nothing = set(range(len(gm.graph.output_node().args[0])))  # type: ignore[arg-type]  # the flat outputs, a tuple
    for case in cases(gm, inputs, sizes, report):
        if case.outputs is None:
            for session in sessions.values():
                _check_refused(gm, session, case)
            continue
        _compare(gm, case, contract, sessions, report)
        nothing &= {i for i, value in enumerate(case.outputs or ()) if _holds_no_number(value)}
    if not report.results:
        raise ExportError(
            describe("the model could not be validated: no input runs", notes="\n".join(report.notes) or None)
        )
    if nothing:
        raise NumericsError(
            describe(
                f"output {min(nothing)} is NaN in every element on every input, so that nothing is proved",
                try_="example inputs of the size and scale that the model was made for",
            )
        )
    return report


def _sessions(source: Path | bytes, gm: CapturedModule, report: ValidationReport) -> dict[str, Session]:
    """Return what to compare with the graph: ORT without and with its optimizer, and in true half precision."""
    sessions: dict[str, Session] = {}
    held = {dtype for dtype in HALF_TYPES if _computes_in(gm, dtype)}
    for level in _OPTIMIZATIONS:
        try:
            sessions[level] = Session(source, optimization=level)
        except ExportError as error:
            if torch.bfloat16 not in held or "NOT_IMPLEMENTED" not in str(error):
                raise
            report.notes.append("compared in emulation only: ORT on a CPU lacks a kernel in bfloat16")
            break
    if held:
        with tempfile.TemporaryDirectory() as folder:
            path = save_model(emulated(source), Path(folder) / "half.onnx")
            sessions[_HALF] = Session(path, optimization="none")
    return sessions


def _computes_in(gm: CapturedModule, wanted: torch.dtype) -> bool:
    """Return whether a graph has values of an element type."""
    values = (value(node) for module in graph_modules(gm) for node in module.graph.nodes if "val" in node.meta)
    return any(isinstance(held, torch.Tensor) and held.dtype is wanted for held in values)


def _holds_no_number(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.numel() > 0 and bool(value.isnan().all())


def contract_of(gm: CapturedModule) -> Contract:
    """Return what ORT must keep: the floors of lossy passes, else ROUNDING."""
    made = Contract.EXACT if gm.report is None else Contract.parse(gm.report.contract or "EXACT")
    return made if made.kind == "LOSSY" else Contract.ROUNDING


def _refuse_random(gm: CapturedModule) -> None:
    """Refuse to compare what no seed makes equal: ORT draws other random numbers than torch does."""
    for node in frozen(gm).graph.nodes:
        if is_random(node):
            raise NumericsError(
                describe(
                    f"the graph draws random numbers ({node.target}), and ORT would draw others",
                    source=args.source_line(node),
                    try_="pass the random tensor as an input; or export with validate=False, unproved",
                )
            )


def _check_names(session: Session, gm: CapturedModule, names: Sequence[str] | None) -> None:
    guarded = GUARD_OUTPUT in session.output_names and has_guards(gm)
    wanted = len(gm.output_names) + guarded if names is None else len(names)
    got = session.output_names
    if len(got) != wanted or (names is not None and list(got) != list(names)):
        raise NumericsError(
            describe(
                "the model has other outputs than the graph",
                got=", ".join(got) or "(none)",
                wanted=", ".join(names if names is not None else gm.output_names) or "(none)",
            )
        )
    tensors = [spec.name for spec in gm.inputs if spec.is_tensor]
    if len(session.input_names) != len(tensors):
        raise NumericsError(
            describe(
                "the model has other inputs than the graph",
                got=", ".join(session.input_names),
                wanted=", ".join(tensors),
            )
        )


def _check_refused(gm: CapturedModule, session: Session, case: Case) -> None:
    """Check that the file says so where the graph refuses an input, if it has an output to say it with."""
    if session.output_names[-1] == GUARD_OUTPUT:
        got = session.run([leaf for leaf in case.leaves if isinstance(leaf, torch.Tensor)])
        check_guards(gm, session, case.label, got[-1], wanted=False)


# -- one case --------------------------------------------------------------------------------------------------------


def _compare(
    gm: CapturedModule, case: Case, contract: Contract, sessions: Mapping[str, Session], report: ValidationReport
) -> None:
    """Record the errors of one case: on nearer values where nothing can be told on those that were drawn.

    Raises:
        NumericsError: an output breaks the contract.
    """
    judge, found = _Judge(gm, case, contract), ValidationReport(report.contract)
    try:
        for level, session in sessions.items():
            judge.compare(session, level, found)
    except NumericsError:
        if contract.kind != "ROUNDING" or not drowns(gm, case):
            raise
        nearer = nearer_case(gm, case, report)
        if nearer is not None:
            _compare(gm, nearer, contract, sessions, report)
        return
    report.results += found.results
    report.notes += found.notes


class _Judge:
    """Compares ORT's outputs for one case with the graph's."""

    def __init__(self, gm: CapturedModule, case: Case, contract: Contract) -> None:
        self._gm, self._case, self._contract = gm, case, contract
        self._reference: Reference | None = None
        self._eps = coarsest_eps(gm)

    def compare(self, session: Session, level: str, report: ValidationReport) -> None:
        """Run ORT and record the errors.

        Raises:
            NumericsError: an output breaks the contract.
        """
        got = list(session.run([leaf for leaf in self._case.leaves if isinstance(leaf, torch.Tensor)]))
        if len(got) > len(self._case.wanted):
            check_guards(self._gm, session, self._case.label, got.pop(), wanted=True)
        for name, (place, want), have in zip(session.output_names, self._case.wanted, got, strict=False):
            wanted = want.detach() if isinstance(want, torch.Tensor) else _number(want, have)
            problem = self._problem(place, wanted, have)
            if problem is not None:
                own = self._own_rounding_db(place, wanted)
                if own is None or bool(have.isnan().any()) or measure(wanted, have).sqnr_db < own - _TWICE_DB:
                    raise self._error(place, name, level, problem, wanted, have)
                report.notes.append(
                    f"{self._case.label}, ORT optimizer {level!r}, output {name!r}: {problem}, and the graph itself in "
                    f"float32 is only {own:.4g} dB from itself in float64"
                )
            report.results.append(OutputResult(name, self._case.label, level, measure(wanted, have)))

    def _problem(self, place: int, want: torch.Tensor, have: torch.Tensor) -> str | None:
        problem, contract = violation(self._contract, want, have), self._contract
        if contract.kind == "LOSSY" and self._eps > torch.finfo(torch.float32).eps:
            contract = Contract.ROUNDING  # half precision rounded twice: further apart than each is from the truth
        if problem is None or contract.kind != "ROUNDING" or want.dtype != have.dtype or want.shape != have.shape:
            return problem
        if surely_rounding(want, have, contract.factor):
            return None
        precise, noise = self._precise(place)
        problem = violation(contract, want, have, precise, noise)
        if problem is not None:
            noise += kernel_noise(self._gm, self._case.leaves)[place]
            if isinstance(precise, torch.Tensor) and want.is_floating_point():
                noise = min(noise, largest_noise(want, precise, self._eps))
            problem = violation(contract, want, have, precise, noise)
        return problem

    def _precise(self, place: int) -> tuple[Any, float]:
        """Return an output of the graph run in float64, and the rounding error of the one in float32."""
        if self._reference is None:
            assert self._case.outputs is not None
            with isolated(self._gm):
                self._reference = reference(self._gm, self._case.outputs, self._case.leaves)
        return self._reference.precise[place], self._reference.noise[place]

    def _own_rounding_db(self, place: int, want: torch.Tensor) -> float | None:
        """Return how far float32 is from float64 in the graph itself, on values that no floor was promised for.

        Quantizers amplify: on values that a deep graph was not made for, one tie that is rounded the other way moves
        all that follows. ORT rounds in other places again, and may be twice as far off. None where a floor holds.
        """
        if self._contract.kind != "LOSSY" or not self._case.drawn:
            return None
        precise, _ = self._precise(place)
        if not isinstance(precise, torch.Tensor) or not want.is_floating_point():
            return None
        return measure(precise, want.to(precise.dtype)).sqnr_db

    def _error(
        self, place: int, name: str, level: str, problem: str, want: torch.Tensor, have: torch.Tensor
    ) -> NumericsError:
        node = _output_nodes(self._gm)[place]
        same = want.shape == have.shape and want.dtype == have.dtype
        worst = None
        if same and want.numel():
            errors = measure(want, have)
            worst = (
                f"{list(errors.worst)} of {args.shape_text(want)}: eager {want.flatten()[errors.worst_flat].item()!r}, "
                f"onnxruntime {have.flatten()[errors.worst_flat].item()!r} "
                f"({errors.mismatches} of {errors.size} elements differ)"
            )
        passes = _passes(self._gm)
        return NumericsError(
            describe(
                f"output {name!r} breaks contract {self._contract} on {self._case.label}, ORT optimizer {level!r}",
                found=problem,
                worst=worst,
                got=args.shape_text(have),
                wanted=args.shape_text(want),
                node=None if node is None else f"{node.name} ({node.target})",
                source=None if node is None else args.source_line(node) or "unknown",
                passes=passes or "(none)",
                try_="export the graph before these passes, then bisect them; "
                "if it fails too, the translation of an operator is wrong"
                if passes
                else "compare intermediate values; if ORT's optimizer 'none' agrees, one of its fusions is the cause",
            )
        )


def _number(number: Any, like: torch.Tensor) -> torch.Tensor:
    kinds = {bool: torch.bool, int: torch.int64, float: torch.float64}
    return torch.tensor(number, dtype=kinds.get(type(number), like.dtype))


def _output_nodes(gm: CapturedModule) -> list[torch.fx.Node | None]:
    """Return the node of each output, or None for a constant."""
    (output,) = gm.graph.find_nodes(op="output")
    flat = output.args[0] if isinstance(output.args[0], tuple | list) else [output.args[0]]
    return [leaf if isinstance(leaf, torch.fx.Node) else None for leaf in flat]


def _passes(gm: CapturedModule) -> str:
    steps = [] if gm.report is None else gm.report.steps
    return ", ".join(f"{step.name} ({len(step.changes)} changes)" for step in steps if step.changes)
