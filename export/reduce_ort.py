"""Cut a model down to the operators that ONNX Runtime's optimizer computes otherwise.

The part ends at the first value that goes wrong, see :func:`fxopt.export.blame`, and starts some operators before it:
one, two, four, until the optimizer makes the same mistake again, as it needs to see what it fuses; then as few as do.
Its inputs are what the model computes there without optimization. Each part is run, and must show the difference.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from fxopt.contracts import Contract
from fxopt.dimensions import Sample
from fxopt.errors import ExportError, describe
from fxopt.export.blame import blame
from fxopt.export.files import OnnxFile, load_model
from fxopt.export.session import LEVELS, Optimization, Session
from fxopt.export.shape_inference import infer_types
from fxopt.export.slices import Slicer, given_inputs, sources
from fxopt.numerics import FLOOR_EPS, measure, violation
from fxopt.repro import commented

__all__ = ["OrtRepro", "reduce_ort"]

_SCRIPT = """{header}

import sys
from pathlib import Path

import numpy as np
import onnxruntime

here = Path(__file__).parent
inputs = [array for name, array in np.load(here / "inputs.npz").items()]
LEVEL = onnxruntime.GraphOptimizationLevel.{level}
FOUND = {found!r}  # the largest difference when this was written


def run(level, left_out=()):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    session = onnxruntime.InferenceSession(
        here / "model.onnx", options, providers=["CPUExecutionProvider"], disabled_optimizers=set(left_out)
    )
    return session.run(None, {{held.name: array for held, array in zip(session.get_inputs(), inputs)}})


def largest(got, want):
    return max(float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max()) for a, b in zip(got, want))


plain = run(onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL)
difference = largest(run(LEVEL), plain)
print(f"onnxruntime {{onnxruntime.__version__}}: optimized, the output is off by up to {{difference:.3g}}")
print(f"without {left_out!r}: {{largest(run(LEVEL, {left_out!r}), plain):.3g}}")
sys.exit(int(not difference < FOUND / 2))  # 1 if it is still so
"""


@dataclasses.dataclass(frozen=True)
class OrtRepro:
    """A model that ORT's optimizer computes otherwise, and as little of it as shows that.

    Attributes:
        model: The part.
        inputs: Its inputs by name.
        value: Name of the value that it computes; empty if the model is whole.
        nodes: Number of its operators.
        whole_nodes: Number of operators that the model had.
        difference: Largest difference of an output, optimized against not.
        problem: How that breaks the contract.
    """

    model: ir.Model
    inputs: Mapping[str, torch.Tensor]
    value: str
    nodes: int
    whole_nodes: int
    difference: float
    problem: str

    def save(
        self, folder: str | os.PathLike[str], level: Optimization, left_out: Sequence[str], rows: Mapping[str, str]
    ) -> Path:
        """Write ``model.onnx``, ``inputs.npz`` and ``repro.py``, which needs only numpy and onnxruntime.

        Args:
            folder: Where to; it is made.
            level: The level of optimization that shows the difference.
            left_out: The optimizers without which it is gone.
            rows: What else the head of the script says.

        Returns:
            The script, which ends with status 1 while the difference is there.

        Raises:
            OSError: the folder cannot be written.
            ExportError: numpy has no form of an input.
        """
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        OnnxFile(self.model).save(place / "model.onnx")
        try:
            # By position: the names of inputs are anything, and may be those of the function's own arguments.
            np.savez(place / "inputs.npz", *(tensor.numpy() for tensor in self.inputs.values()))
        except TypeError as error:
            raise ExportError(describe("numpy has no form of an input of the part", because=str(error))) from error
        left = f"{self.nodes} of {self.whole_nodes} operators"
        head = describe(f"ONNX Runtime's optimizer computes {self.value or 'the model'} otherwise", **rows, left=left)
        text = _SCRIPT.format(
            header=commented(head),
            level=LEVELS[level],
            found=self.difference,
            left_out=list(left_out),
        )
        script = place / "repro.py"
        script.write_text(text, encoding="utf-8")
        return script


def reduce_ort(
    model: OnnxFile | str | os.PathLike[str] | bytes,
    inputs: Sequence[torch.Tensor],
    level: Optimization,
    contract: Contract = Contract.ROUNDING,
) -> OrtRepro:
    """Return the smallest part of a model that shows what ORT's optimizer does to it.

    Args:
        model: The ONNX model, which breaks the contract at this level.
        inputs: One tensor for each input.
        level: The level of optimization.
        contract: What optimized outputs must keep against those without optimization.

    Raises:
        ExportError: the outputs keep the contract.
    """
    whole = load_model(model)
    infer_types(whole)
    ir.external_data.load_to_model(whole)
    search = _Search(whole, dict(zip(given_inputs(whole), inputs, strict=True)), level, contract)
    found = search.part(list(whole.graph.outputs), None)
    if found is None:
        raise ExportError("the outputs keep the contract at this level of optimization: there is nothing to cut out")
    for value in search.suspects(model):
        if (smaller := search.smallest(value)) is not None:
            return smaller
    return found


class _Search:
    def __init__(
        self, whole: ir.Model, inputs: Mapping[ir.Value, torch.Tensor], level: Optimization, contract: Contract
    ) -> None:
        self._whole, self._inputs, self._level, self._contract = whole, inputs, level, contract
        self._nodes = sum(1 for _ in whole.graph)
        self._fixed = set(_constant_nodes(whole))

    def suspects(self, model: OnnxFile | str | os.PathLike[str] | bytes) -> Iterator[ir.Value]:
        """Yield the values that go wrong on right inputs, then the outputs."""
        values = {value.name: value for node in self._whole.graph for value in node.outputs}
        named = {str(value.name): tensor for value, tensor in self._inputs.items()}
        report = blame(model, None, Sample((), named), optimization=self._level, contract=self._contract)
        yield from (values[guilty.value] for guilty in report.guilty if guilty.value in values)
        yield from (value for value in self._whole.graph.outputs if value.producer() is not None)

    def smallest(self, value: ir.Value) -> OrtRepro | None:
        """Return the part with the fewest operators in a row before a value that shows the difference."""
        bad, good, found = 0, 1, None
        while (found := self.part([value], self._before(value, good))) is None:
            if good > self._nodes:
                return None
            bad, good = good, 2 * good
        while good - bad > 1:
            middle = (bad + good) // 2
            smaller = self.part([value], self._before(value, middle))
            bad, good, found = (middle, good, found) if smaller is None else (bad, middle, smaller)
        return found

    def _before(self, value: ir.Value, depth: int) -> set[ir.Node]:
        """Return the operators at most so many steps before a value, and those that make constants for them."""
        maker = value.producer()
        layer = set() if maker is None else {maker}
        chosen: set[ir.Node] = set()
        for _ in range(depth):
            chosen |= layer
            makers = {source.producer() for node in layer for source in sources(node)}
            layer = {node for node in makers if node is not None} - chosen
        return chosen | self._fixed

    def part(self, outputs: Sequence[ir.Value], chosen: set[ir.Node] | None) -> OrtRepro | None:
        """Return the part of these operators, None for all, that computes values, if it shows the difference."""
        known = [
            value for node in self._whole.graph for value in node.outputs if chosen is not None and node not in chosen
        ]
        cut = Slicer(self._whole, known).of(*outputs)
        inputs = self._values(cut.inputs)
        named = {str(value.name): tensor for value, tensor in inputs.items()}
        model = cut.model(self._whole)
        serialized = ir.to_proto(model).SerializeToString()
        plain = Session(serialized, optimization="none").run(named)
        for want, got in zip(plain, Session(serialized, optimization=self._level).run(named), strict=True):
            if (problem := broken(self._contract, want, got)) is not None:
                off = measure(want, got).max_abs if want.shape == got.shape else float("inf")
                name = "" if chosen is None else str(outputs[0].name)
                return OrtRepro(model, named, name, len(cut.nodes), self._nodes, off, problem)
        return None

    def _values(self, wanted: Sequence[ir.Value]) -> dict[ir.Value, torch.Tensor]:
        """Return what the model computes for some of its values without optimization."""
        missing = [value for value in wanted if value not in self._inputs]
        found = {value: self._inputs[value] for value in wanted if value in self._inputs}
        if missing:
            cut = Slicer(self._whole, ()).of(*missing)
            session = Session(ir.to_proto(cut.model(self._whole)).SerializeToString(), optimization="none")
            results = session.run({str(value.name): self._inputs[value] for value in cut.inputs})
            found |= dict(zip(missing, results, strict=True))
        return {value: found[value] for value in wanted}


def broken(contract: Contract, want: torch.Tensor, got: torch.Tensor) -> str | None:
    """Return how an optimized output breaks a contract against the one without optimization, or None."""
    unit = torch.finfo(got.dtype).eps * float(got.abs().max()) if got.is_floating_point() and got.numel() else 0.0
    return violation(contract, want, got, want, FLOOR_EPS * unit)


def _constant_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Yield the operators that work on constants alone: without them, optimizers do not find what they look for."""
    found: set[ir.Node] = set()
    given = set(given_inputs(model))
    for node in model.graph:
        makers = [(source, source.producer()) for source in sources(node)]
        if all(source not in given and (maker is None or maker in found) for source, maker in makers):
            found.add(node)
            yield node
