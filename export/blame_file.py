"""Right values from a file: its parts run in ORT as they stand, its optimizer off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch

from fxopt.contracts import Contract
from fxopt.dimensions import Sample
from fxopt.errors import ExportError, InputError, describe
from fxopt.export.blame_report import NodeError
from fxopt.export.blame_run import About, Alive, Comparison, Started, nearest_line
from fxopt.export.node_bounds import part_problem
from fxopt.export.origins import scopes_of, source_of
from fxopt.export.shape_inference import infer_types
from fxopt.export.slices import Slice, Slicer, given_inputs

__all__ = ["compare_with_file", "named_inputs"]

_RANDOM = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)
_NO_NUMBERS = (ir.DataType.STRING, ir.DataType.UNDEFINED)


def compare_with_file(
    model: ir.Model, reference: ir.Model, inputs: Mapping[str, torch.Tensor], contract: Contract | None
) -> list[NodeError]:
    """Compare every value of a model with that of the same name in another; see :func:`fxopt.export.blame`.

    Args:
        model: The model.
        reference: The other, whose values are right.
        inputs: Those of ``reference``, by name.
        contract: What to judge by, None for nothing.

    Raises:
        ExportError: ORT refuses one of them, they take other inputs, or have no value in common.
    """
    for each in (model, reference):
        infer_types(each)
    given = given_inputs(reference)
    own = given_inputs(model)
    if len(own) != len(given):
        raise ExportError(
            describe(
                "the models take other inputs",
                got=", ".join(str(value.name) for value in own),
                wanted=", ".join(str(value.name) for value in given),
            )
        )
    shared = _in_one_order(model, reference, _shared(model, reference))
    if not shared:
        raise ExportError(
            describe(
                "the models have no value in common that is computed",
                got=", ".join(str(value.name) for value in list(model.graph.outputs)[:4]),
                wanted=", ".join(str(value.name) for value in list(reference.graph.outputs)[:4]),
                try_="two versions of one file: values are matched by their names",
            )
        )
    tensors = [inputs[str(value.name)] for value in given]
    rectified = {value for value, other in shared.items() if _is_rectified(other)}
    comparison = Comparison(model, shared, dict(zip(own, tensors, strict=True)), rectified)
    _Runner(reference, shared, comparison, contract).run(dict(zip(given, tensors, strict=True)))
    return comparison.found


def named_inputs(sample: Any, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return a sample as tensors by name; a sample of positional tensors goes by position.

    Raises:
        InputError: it has another number of tensors, or other names.
    """
    held = Sample.of(sample)
    tensors = [leaf for leaf in held.args if isinstance(leaf, torch.Tensor)]
    found = dict(zip(names, tensors, strict=False)) | {
        name: leaf for name, leaf in held.kwargs.items() if isinstance(leaf, torch.Tensor)
    }
    if len(tensors) > len(names) or set(found) != set(names):
        raise InputError(
            describe("the inputs do not fit the model", got=", ".join(found) or "none", wanted=", ".join(names))
        )
    return found


def _shared(model: ir.Model, reference: ir.Model) -> dict[ir.Value, ir.Value]:
    """Return the values of the model that the other has too, with the other's, in the order of the other."""
    own = {str(value.name): value for node in model.graph for value in node.outputs if value.name and _is_tensor(value)}
    found = {
        own[str(value.name)]: value
        for node in reference.graph
        for value in node.outputs
        if value.name in own and _is_tensor(value)
    }
    for value, other in zip(model.graph.outputs, reference.graph.outputs, strict=False):
        if value.producer() is not None and other.producer() is not None and _is_tensor(value) and _is_tensor(other):
            found.setdefault(value, other)
    return found


def _is_rectified(value: ir.Value) -> bool:
    readers = [use.node.op_type for use in value.uses()]
    return bool(readers) and set(readers) <= {"Relu", "Clip"}


def _is_tensor(value: ir.Value) -> bool:
    return value.type is None or (isinstance(value.type, ir.TensorType) and value.dtype not in _NO_NUMBERS)


def _in_one_order(
    model: ir.Model, reference: ir.Model, shared: Mapping[ir.Value, ir.Value]
) -> dict[ir.Value, ir.Value]:
    """Return the values in an order in which both can compute them; one that needs another order is left out."""
    place = Slicer(reference, ()).place
    kept = dict(sorted(shared.items(), key=lambda pair: place(pair[1])))
    while True:
        slicer, inputs = Slicer(model, kept), set(given_inputs(model))
        done: set[ir.Value] = set()
        for value in kept:
            if not done.issuperset(set(slicer.of(value).inputs) - inputs):
                del kept[value]
                break
            done.add(value)
        else:
            return kept


class _Runner:
    """Runs the other model part by part, and the part of the model that computes the same behind each."""

    def __init__(
        self,
        reference: ir.Model,
        shared: Mapping[ir.Value, ir.Value],
        comparison: Comparison,
        contract: Contract | None,
    ) -> None:
        self._reference, self._shared, self._comparison, self._contract = reference, shared, comparison, contract
        slicer = Slicer(reference, shared.values())
        self._parts = {value: slicer.of(value) for value in shared.values()}
        self._alive = Alive(part.inputs for part in self._parts.values())

    def run(self, inputs: Started) -> None:
        """Run on the inputs of the other model."""
        for value, tensor in inputs.items():
            self._alive.put(value, tensor)
        for value, other in self._shared.items():
            part = self._parts[other]
            started = dict(zip(part.inputs, self._alive.get(part.inputs), strict=True))
            want = part.session(self._reference, started)(started)
            if _RANDOM.isdisjoint(part.operators):
                self._comparison.compare(value, want, _about(other), self._judge(part, started))
            else:
                self._comparison.take(value, want, want)  # drawn again, it would be another
            self._alive.put(other, want)
            self._alive.read(part.inputs)

    def _judge(self, right: Slice, started: Started) -> Any:
        def judge(part: Slice, given: Started, want: torch.Tensor, got: torch.Tensor) -> str | None:
            def disturbed(eps: float) -> torch.Tensor:
                return _disturbed(right, self._reference, started, eps)

            return part_problem(want, got, (right, part), disturbed, self._contract)

        return judge


def _disturbed(part: Slice, model: ir.Model, started: Started, eps: float) -> torch.Tensor:
    """Return what a part makes of operands each of which is off by up to ``eps`` of itself."""
    draw = torch.Generator().manual_seed(0)

    def disturb(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        return tensor * (1 + eps * (2 * torch.rand(tensor.shape, generator=draw) - 1)).to(tensor.dtype)

    return part.session(model, started, constant=disturb)({value: disturb(tensor) for value, tensor in started.items()})


def _about(value: ir.Value) -> About:
    node = value.producer()
    assert node is not None
    props = node.metadata_props
    name = props.get("fxopt.node") or node.name or str(value.name)
    return About(name, node.op_type, next(iter(scopes_of(node)[-1:]), ""), _line_of(node), props.get("fxopt.pass", ""))


def _line_of(node: ir.Node) -> str:
    """Return the user's line of a node; that of what it reads where it has none, as one that a quantizer put in."""

    def before(current: ir.Node) -> list[ir.Node]:
        return [maker for value in current.inputs if value is not None and (maker := value.producer()) is not None]

    return nearest_line(node, source_of, before)
