"""Compare the values of a model with right ones, one after the other; only what is still to be read is kept."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from typing import Generic, TypeVar

import onnx_ir as ir
import torch

from fxopt.export.blame_report import NodeError
from fxopt.export.coverage_overflow import overflowing_channels
from fxopt.export.slices import Slice, Slicer
from fxopt.numerics import Errors, measure

__all__ = ["About", "Alive", "Comparison", "Judge", "Started", "as_read", "nearest_line"]

Key = TypeVar("Key", bound=Hashable)
Started = Mapping[ir.Value, torch.Tensor]
Judge = Callable[[Slice, Started, torch.Tensor, torch.Tensor], str | None]
"""Takes a part, the right values that it started from, what is right and what it made of them; says what is wrong."""


@dataclasses.dataclass(frozen=True)
class About:
    """Where a value comes from, as :class:`fxopt.export.blame_report.NodeError` has it."""

    node: str
    target: str
    module: str
    source: str
    pass_name: str


class Alive(Generic[Key]):
    """Tensors that somebody is still going to read."""

    def __init__(self, reads: Iterable[Iterable[Key]]) -> None:
        """Args: reads: for each reader to come, what it reads."""
        self._left = Counter(key for each in reads for key in each)
        self._held: dict[Key, torch.Tensor] = {}

    def put(self, key: Key, tensor: torch.Tensor) -> None:
        """Keep a tensor, if anybody is going to read it."""
        if self._left[key]:
            self._held[key] = tensor

    def get(self, keys: Iterable[Key]) -> list[torch.Tensor]:
        """Return tensors."""
        return [self._held[key] for key in keys]

    def read(self, keys: Iterable[Key]) -> None:
        """Note that one reader is done with these."""
        for key in keys:
            self._left[key] -= 1
            if not self._left[key]:
                del self._held[key]


class Comparison:
    """Runs the parts of a model between values that are known, each on right values and on the model's own."""

    def __init__(
        self, model: ir.Model, shared: Collection[ir.Value], inputs: Started, rectified: Collection[ir.Value] = ()
    ) -> None:
        """Args: see :func:`as_read`; ``model`` is left alone, ``inputs`` are its inputs."""
        self._model = model
        self._stands_for = {back: value for value in shared for back in as_read(value, shared, rectified)}
        seen = {value: back for back, value in reversed(self._stands_for.items())}
        slicer = Slicer(model, [*shared, *self._stands_for])
        self._parts = {value: slicer.of(seen.get(value, value), inside=value) for value in shared}
        reads = [self._read_by(part) for part in self._parts.values()]
        self._right, self._own = Alive(reads), Alive(reads)
        for value, tensor in inputs.items():
            self._right.put(value, tensor)
            self._own.put(value, tensor)
        self.found: list[NodeError] = []

    def _read_by(self, part: Slice) -> list[ir.Value]:
        return [self._stands_for.get(source, source) for source in part.inputs]

    def compare(self, value: ir.Value, want: torch.Tensor, about: About, judge: Judge) -> None:
        """Compare a value with the right one; those that its part starts from must have been compared before."""
        part = self._parts[value]
        read = self._read_by(part)
        own = dict(zip(part.inputs, self._own.get(read), strict=True))
        given = {
            source: _as(tensor, own[source].dtype)
            for source, tensor in zip(part.inputs, self._right.get(read), strict=True)
        }  # the model may compute in another precision
        run = part.session(self._model, own)
        local = run(given)
        total = local if all(given[source] is own[source] for source in given) else run(own)
        self.found.append(
            NodeError(
                **dataclasses.asdict(about),
                operators=part.operators,
                local=_errors(want, local),
                total=_errors(want, total),
                value=str(value.name),
                problem=judge(part, dict(zip(read, given.values(), strict=True)), want, local),
                overflowing=sum(map(overflowing_channels, part.nodes)),
            )
        )
        self.take(value, want, total)

    def take(self, value: ir.Value, right: torch.Tensor, own: torch.Tensor) -> None:
        """Take a value as computed, right and by the model itself, without comparing."""
        self._right.put(value, right)
        self._own.put(value, own)
        for alive in (self._right, self._own):
            alive.read(self._read_by(self._parts[value]))


def as_read(value: ir.Value, shared: Collection[ir.Value], rectified: Collection[ir.Value]) -> list[ir.Value]:
    """Return what stands for a value where it is read, if it is only quantized: what the readers get back.

    So each quantizer counts where the value is made, and not where it is read. It may do more than round: ORT's tool
    leaves out a ReLU in front of a quantizer that begins at zero.

    Args:
        value: A value of a model.
        shared: Values that are compared; where the integers or what is read back are among them, they speak for
            themselves.
        rectified: Values whose right readers cut off what is negative: a quantizer behind one may stand for these.
    """
    readers = [use.node for use in value.uses()]
    if value in rectified or value.is_graph_output() or [node.op_type for node in readers] != ["QuantizeLinear"]:
        return []
    integers = readers[0].outputs[0]
    back = [use.node for use in integers.uses() if use.node.op_type == "DequantizeLinear"]
    if integers.is_graph_output() or len(back) < len(list(integers.uses())):
        return []
    found = [node.outputs[0] for node in back if list(node.inputs[1:]) == list(readers[0].inputs[1:])]
    return [] if integers in shared or any(each in shared for each in found) else found


def nearest_line(start: Key, line_of: Callable[[Key], str | None], following: Callable[[Key], Iterable[Key]]) -> str:
    """Return the line of the first node that has one: the start, or the nearest that follows; "" if none has."""
    seen, waiting = {start}, [start]
    while waiting:
        current = waiting.pop(0)
        if line := line_of(current):
            return line
        after = [node for node in following(current) if node not in seen]
        waiting += after
        seen.update(after)
    return ""


def _as(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() and dtype.is_floating_point else tensor


def _errors(want: torch.Tensor, got: torch.Tensor) -> Errors | None:
    return measure(want, got) if want.shape == got.shape else None
