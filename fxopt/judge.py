"""Judge a rewritten graph by running it: on the samples, at the corners of the dynamic sizes, in both modes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import torch

from fxopt.contracts import Contract
from fxopt.dimensions import Sample
from fxopt.errors import GuardError
from fxopt.graph_module import CapturedModule
from fxopt.interface import Interface
from fxopt.isolation import isolated
from fxopt.numerics import Reference, measure, reference, surely_rounding, violation
from fxopt.regions import holds_control_flow
from fxopt.report import OutputError

__all__ = ["Case", "Judge", "cases"]

Check = Literal["all", "samples", "off"]


@dataclasses.dataclass(frozen=True)
class Case:
    """One run to judge by: inputs, what to call them, and the mode to run in.

    Attributes:
        given: Whether the user gave the inputs. A floor of a LOSSY contract is about these: others were made from them,
            of sizes and values that nothing was tuned for.
    """

    label: str
    sample: Sample
    training: bool
    given: bool = False


def cases(gm: CapturedModule, check: Check) -> Iterator[Case]:
    """Yield the runs: every sample; each dynamic size at 1, 2 and an odd number; the first sample in the other mode.

    Sizes outside a dimension's range are left out. A graph that does the same in both modes is run in evaluation: a
    pass may promise nothing of training.
    """
    if check == "off":
        return
    two_modes = gm.modes == "both" and _depends_on_mode(gm)
    training = gm.training and (two_modes or gm.modes == "train")
    for index, sample in enumerate(gm.samples):
        yield Case(f"sample {index}", sample, training, given=True)
    if check == "all" and gm.samples:
        first = gm.samples[0]
        now = gm.sizes_of(gm.flatten_inputs(*first.args, **first.kwargs))
        for name, dimension in gm.dims.items():
            for size in (1, 2, 3 if now.get(name) != 3 else 5):
                if dimension.allows(size) and now.get(name) != size:
                    yield Case(f"{name} = {size}", gm.resized({name: size}), training)
    if check == "all" and gm.samples and holds_control_flow(gm):
        for label, sample in gm.samples[0].other_ways():
            yield Case(f"sample 0 {label}", sample, training)
    if two_modes and gm.samples:
        label = f"sample 0 in {'eval' if training else 'train'} mode"
        yield Case(label, gm.samples[0], not training, given=training)  # floors are about evaluation


def _depends_on_mode(gm: CapturedModule) -> bool:
    return any("modes" in node.meta for node in gm.graph.nodes)


class Judge:
    """Holds what the graph yielded before, and compares.

    Attributes:
        refused: Cases that the graph itself cannot run, such as batch norm in training on one sample, with the reason.
    """

    def __init__(self, gm: CapturedModule, check: Check) -> None:
        self.refused: list[str] = []
        self._check = check
        self._cases: list[Case] = list(cases(gm, check))
        self._original: list[tuple[Any, ...] | None] | None = None
        self._latest: list[tuple[Any, ...] | None] = []
        self._references: dict[int, Reference] = {}
        self._anchors: dict[int, tuple[CapturedModule, tuple[Any, ...]]] = {}
        self._gm = gm

    def judge(
        self, candidate: CapturedModule, contract: Contract, *, evaluation_only: bool, interface: Interface = "kept"
    ) -> tuple[str | None, list[tuple[Any, ...] | None]]:
        """Return how ``candidate`` breaks the contract, or None, and what it yielded for each case.

        Where the interface changed, the candidate runs on its own case of the same label, and the outputs that there
        are before and after are compared.
        """
        self._prepare()
        own = {case.label: case for case in (self._cases if interface == "kept" else cases(candidate, self._check))}
        yielded: list[tuple[Any, ...] | None] = []
        guarded = False
        for index, case in enumerate(self._cases):
            want = self._latest[index]
            impossible = candidate.modes != "both" and (candidate.modes == "train") != case.training
            impossible |= interface == "reduced" and case.label not in own
            if want is None or impossible or (case.training and (evaluation_only or contract.kind == "TRAINING")):
                yielded.append(None)
                continue
            if case.label not in own:
                return f"on {case.label}: the rewritten graph has no such case", yielded
            try:
                got = _run(candidate, own[case.label])
            except GuardError:
                guarded = True  # the pass promises nothing where its guard does not hold
                yielded.append(None)
                continue
            except Exception as error:
                return (
                    f"on {case.label}: the rewritten graph cannot run: {type(error).__name__}: {str(error)[:400]}",
                    yielded,
                )
            if interface == "extended":
                got = got[: len(want)]
            elif interface == "reduced":
                want = want[: len(got)]
            elif interface == "retyped":
                got = tuple(_in_type_of(w, g) for w, g in zip(want, got, strict=True))
            problem = self._compare(index, contract, want, got)
            if problem and not self._is_steady(index):
                yielded.append(None)
                continue
            if problem:
                return f"on {case.label}: {problem}", yielded
            yielded.append(got)
        if guarded and not any(yielded):
            return "no case is left to compare: the guards hold on none of them", yielded
        return None, yielded

    def accept(
        self,
        candidate: CapturedModule,
        contract: Contract,
        yielded: list[tuple[Any, ...] | None],
        *,
        interface: Interface = "kept",
    ) -> tuple[OutputError, ...]:
        """Take ``candidate`` as the graph that later ones are compared with; return its error against the first one."""
        if not yielded:
            return ()
        assert self._original is not None
        if interface != "kept":
            return self._start_again(candidate)
        for index, (case, new) in enumerate(zip(self._cases, yielded, strict=True)):
            left_out = new is None and self._latest[index] is not None
            if left_out:
                # The pass promised nothing here; what comes after it is compared with what it made.
                new, self._original[index] = _run_if_possible(candidate, case), None
            self._latest[index] = new
            if new is not None and (left_out or contract.kind == "LOSSY"):
                self._anchors[index] = (candidate, new)
                self._references.pop(index, None)
        self._gm = candidate
        return self._errors()

    def _start_again(self, candidate: CapturedModule) -> tuple[OutputError, ...]:
        """Take over the cases of a graph with other inputs and outputs, and what it yields for them.

        Outputs that there were keep their first value, which errors are counted from; new ones begin here. The float64
        reference begins here, too: only a graph with these inputs can be run on these cases.
        """
        first = {case.label: item for case, item in zip(self._cases, self._original or [], strict=True)}
        self._gm, self._cases = candidate, list(cases(candidate, self._check))
        self._latest = [_run_if_possible(candidate, case) for case in self._cases]
        self._original = [
            None
            if new is None
            else (*(first.get(case.label) or new)[: len(new)], *new[len(first.get(case.label) or new) :])
            for case, new in zip(self._cases, self._latest, strict=True)
        ]
        self._anchors = {i: (candidate, outputs) for i, outputs in enumerate(self._latest) if outputs is not None}
        self._references = {}
        return self._errors()

    @property
    def runs(self) -> int:
        """Number of cases that can be run."""
        return sum(outputs is not None for outputs in self._latest)

    def _prepare(self) -> None:
        if self._original is not None:
            return
        self._original = []
        for case in self._cases:
            try:
                self._original.append(_run(self._gm, case))
            except Exception as error:
                self._original.append(None)
                self.refused.append(
                    f"not checked on {case.label}: the graph itself cannot run it: "
                    f"{str(error).partition(chr(10))[0][:160]}"
                )
        self._latest = list(self._original)
        self._anchors = {i: (self._gm, outputs) for i, outputs in enumerate(self._original) if outputs is not None}

    def _is_steady(self, index: int) -> bool:
        """Return whether the graph gives the same result again; if not, leave the case out from now on."""
        before, case = self._latest[index], self._cases[index]
        again = _run_if_possible(self._gm, case)
        if (
            again is not None
            and before is not None
            and not any(_differs(a, b) for a, b in zip(before, again, strict=True))
        ):
            return True
        self._latest[index] = None
        self.refused.append(f"not checked on {case.label}: the graph itself gives another result each time")
        return False

    def _compare(self, index: int, contract: Contract, want: tuple[Any, ...], got: tuple[Any, ...]) -> str | None:
        if len(want) != len(got):
            return f"{len(got)} outputs instead of {len(want)}"
        if contract.kind == "LOSSY" and not self._cases[index].given:
            contract = contract.without_floors()
        plain = [violation(contract, w, g, noise=0.0) for w, g in zip(want, got, strict=True)]
        if not any(plain):
            return None
        if contract.kind == "ROUNDING":
            anchor = self._anchors[index][1]
            if all(p is None or _is_sure(w, g, contract) for p, w, g in zip(plain, anchor, got, strict=True)):
                return None
            known = self._reference(index)
            plain = [
                violation(contract, w, g, p, n)
                for w, g, p, n in zip(want, got, known.precise, known.noise, strict=True)
            ]
        names = list(self._gm.output_names)
        labels = [names.pop(0) if w is not None and names else f"#{i}" for i, w in enumerate(want)]
        return next(
            (f"output {label!r}: {problem}" for label, problem in zip(labels, plain, strict=True) if problem), None
        )

    def _reference(self, index: int) -> Reference:
        """Return the float64 reference of a case.

        It is that of the graph before the first of a row of exact and rounding passes: they compute the same function
        of real numbers, and their errors must not add up unseen.
        """
        if index not in self._references:
            gm, outputs = self._anchors[index]
            case = self._cases[index]
            with _InMode(gm, case.training):
                leaves = gm.flatten_inputs(*case.sample.args, **case.sample.kwargs)
                self._references[index] = reference(gm, outputs, leaves)
        return self._references[index]

    def _errors(self) -> tuple[OutputError, ...]:
        assert self._original is not None
        worst: dict[str, OutputError] = {}
        for before, after in zip(self._original, self._latest, strict=True):
            if before is None or after is None:
                continue
            tensors = [(b, a) for b, a in zip(before, after, strict=True) if b is not None]
            for name, (b, a) in zip(self._gm.output_names, tensors, strict=False):
                if isinstance(b, torch.Tensor) and isinstance(a, torch.Tensor) and a.shape == b.shape:
                    found = measure(b, a)
                    if name not in worst or found.max_abs > worst[name].max_abs:
                        worst[name] = OutputError(name, found.max_abs, found.sqnr_db)
        return tuple(worst.values())


class _InMode:
    """Run a graph in a mode, and put it back."""

    def __init__(self, gm: CapturedModule, training: bool) -> None:
        self.gm, self.training, self.before = gm, training, gm.training

    def __enter__(self) -> None:
        if self.training != self.before:
            self.gm.train(self.training)

    def __exit__(self, *unused: object) -> None:
        if self.training != self.before:
            self.gm.train(self.before)


def _differs(a: Any, b: Any) -> bool:
    return violation(Contract.EXACT, a, b) is not None


def _in_type_of(want: Any, got: Any) -> Any:
    """Return an output in the floating type that it had before; anything else as it is."""
    both = isinstance(want, torch.Tensor) and isinstance(got, torch.Tensor)
    return got.to(want.dtype) if both and want.is_floating_point() and got.is_floating_point() else got


def _is_sure(want: Any, got: Any, contract: Contract) -> bool:
    both = isinstance(want, torch.Tensor) and isinstance(got, torch.Tensor)
    return both and surely_rounding(want, got, contract.factor)


def _run_if_possible(gm: CapturedModule, case: Case) -> tuple[Any, ...] | None:
    try:
        return _run(gm, case)
    except Exception:  # reported when the graph was first run; here it only means that there is nothing to compare
        return None


def _run(gm: CapturedModule, case: Case) -> tuple[Any, ...]:
    with _InMode(gm, case.training), isolated(gm):
        copy = case.sample.clone()
        return gm.flat_outputs(*copy.args, **copy.kwargs)
