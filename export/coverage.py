"""What share of a model's multiply-accumulates ORT runs in integer kernels, and what keeps the rest in float."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Any

import onnx_ir as ir

from fxopt.export.coverage_reasons import (
    CELL_IN_FLOAT,
    SCALES_DIFFER,
    is_constant,
    why_dequantized,
    why_float,
    why_quantized,
)
from fxopt.export.coverage_run import Inputs, KernelRuns, Origin, profiled
from fxopt.export.coverage_table import FLOATS, KERNELS, NUMBERS_8_BIT, Kind, Layer, kind_of
from fxopt.export.files import OnnxFile
from fxopt.report import text_table

__all__ = ["CoverageReport", "Kernel", "Leftover", "coverage"]

_HEAVY = ("conv", "linear", "matmul", "attention", "recurrent")
_LIGHT = ("add", "pool", "concat")
_WRITTEN_FOR: dict[str, Layer] = {"conv": "conv", "recurrent": "recurrent"}
_LEFT = ("QuantizeLinear", "DequantizeLinear")
_COUNTED = NUMBERS_8_BIT | FLOATS
_FLOAT_WEIGHT = "ORT itself quantizes the float weight, with one scale for all channels"
_LINES = 20  # of each list that ``str`` shows


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel of the optimized graph that could be an integer one.

    Attributes:
        op: ORT's operator.
        layer: What it computes: conv, linear (a constant weight), matmul (two activations), attention, recurrent,
            add (two activations of equal shape), pool, concat.
        kind: The numbers that it adds up; "weight-only" are integer weights that it multiplies as float.
        macs: Multiply-accumulates in the run; 0 for add, pool and concat, and where it did not run.
        node: Name in the fx graph, or of the ONNX node.
        source: The user's line, "" if the file does not tell.
        reason: Why it is not an integer kernel; "" if it is.
        warning: What ORT did that the model does not ask for; "" for nothing.
        overflowing: Of how many output channels the sums of two products can overflow 16 bits, which they are added in
            on x86 CPUs without VNNI: there the file may give other results.
    """

    op: str
    layer: str
    kind: Kind
    macs: int
    node: str
    source: str = ""
    reason: str = ""
    warning: str = ""
    overflowing: int = 0


@dataclasses.dataclass(frozen=True)
class Leftover:
    """A QuantizeLinear or DequantizeLinear that ORT runs as a kernel of its own.

    Attributes:
        op: Which of the two.
        value: The value that it reads.
        reason: Why it is left.
        node: The node that is the cause, or itself.
        source: The user's line of that node, "" if the file does not tell.
    """

    op: str
    value: str
    reason: str
    node: str = ""
    source: str = ""


@dataclasses.dataclass(frozen=True)
class CoverageReport:
    """What ran in integers, what did not, and why.

    Attributes:
        layers: Every kernel that could be an integer one, in the order of the graph.
        leftover: Every QuantizeLinear and DequantizeLinear left.
    """

    layers: tuple[Kernel, ...]
    leftover: tuple[Leftover, ...]

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the run."""
        return sum(kernel.macs for kernel in self.layers)

    @property
    def integer_share(self) -> float:
        """Share of the multiply-accumulates in integer kernels, 0 to 1; 0 where there are none at all."""
        return self._share("integer")

    @property
    def weight_only_share(self) -> float:
        """Share of the multiply-accumulates of integer weights with float activations, 0 to 1."""
        return self._share("weight-only")

    @property
    def kernels(self) -> dict[str, tuple[int, int]]:
        """Number of integer kernels and of all kernels, by layer."""
        return {
            layer: (sum(one.kind == "integer" for one in group), len(group)) for layer, group in self._groups().items()
        }

    @property
    def overflowing(self) -> tuple[Kernel, ...]:
        """The integer kernels whose sums can overflow on CPUs without VNNI, those of the most channels first."""
        return tuple(sorted((one for one in self.layers if one.overflowing), key=lambda one: -one.overflowing))

    @property
    def floats(self) -> tuple[Kernel, ...]:
        """The kernels with multiply-accumulates that are not integer ones, the largest first."""
        left = [one for one in self.layers if one.kind != "integer" and one.layer in _HEAVY]
        return tuple(sorted(left, key=lambda one: -one.macs))

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, fit for JSON."""
        return {
            "macs": self.macs,
            "integer_share": self.integer_share,
            "weight_only_share": self.weight_only_share,
            "kernels": {layer: list(counts) for layer, counts in self.kernels.items()},
            "layers": [dataclasses.asdict(kernel) for kernel in self.layers],
            "leftover": [dataclasses.asdict(one) for one in self.leftover],
        }

    def __str__(self) -> str:
        told = f"integer kernels do {_percent(self.integer_share)} of {self.macs:,} multiply-accumulates"
        if self.weight_only_share:
            told += f", integer weights with float activations {_percent(self.weight_only_share)}"
        rows = [("layer", "integer", "all", "share of all MACs", "of these integer")]
        for layer, group in self._groups().items():
            macs = sum(one.macs for one in group)
            integer = sum(one.macs for one in group if one.kind == "integer")
            count, total = self.kernels[layer]
            shares = (_percent(macs / self.macs), _percent(integer / macs)) if macs else ("-", "-")
            rows.append((layer, str(count), str(total), *shares))
        lines = [told, *(f"  {line}" for line in text_table(rows))]
        if self.floats:
            lines.append("in float:")
            lines += _grouped((f"{one.op}: {one.reason}", _place(one)) for one in self.floats)
        if warned := [one for one in self.layers if one.warning]:
            lines.append("warnings:")
            lines += _grouped((f"{one.op}: {one.warning}", _place(one)) for one in warned)
        if found := self.overflowing:
            channels = sum(one.overflowing for one in found)
            lines.append(f"16-bit sums can overflow on CPUs without VNNI, in {channels:,} output channels:")
            lines += _grouped((one.op, _place(one)) for one in found)
            lines.append("  try weights of 7 bits in these channels, which fxopt.passes.Quantize chooses by itself")
        lines.append(f"QuantizeLinear and DequantizeLinear left: {len(self.leftover)}")
        lines += _grouped((f"{one.op}: {one.reason}", _place(one)) for one in self.leftover)
        return "\n".join(lines)

    def _share(self, kind: Kind) -> float:
        return sum(one.macs for one in self.layers if one.kind == kind) / self.macs if self.macs else 0.0

    def _groups(self) -> dict[str, list[Kernel]]:
        groups = {layer: [one for one in self.layers if one.layer == layer] for layer in (*_HEAVY, *_LIGHT)}
        return {layer: group for layer, group in groups.items() if group}


def coverage(
    model: OnnxFile | str | os.PathLike[str] | bytes,
    inputs: Inputs | None = None,
    *,
    sizes: Mapping[str, int] | None = None,
) -> CoverageReport:
    """Return what share of a model's multiply-accumulates ORT runs in integer kernels on the CPU.

    The model runs once, as ORT optimizes it, and each kernel is counted on the shapes that it got: twice if a loop
    ran it twice, not at all in a branch that was not taken.

    Args:
        model: An exported model, a file or a serialized model.
        inputs: What to run it on, by position or by name. If not given: normal numbers of the declared shapes, zeros
            for integers, ones for flags and masks.
        sizes: Lengths of dynamic axes by name, as ``{"batch": 2}``, for inputs that are not given; 1 for the others.

    Raises:
        ExportError: ORT cannot load the model, or fails to run it on such inputs.
        ValueError: ``sizes`` names a size that the model does not have, or comes along with ``inputs``.
    """
    if inputs is not None and sizes is not None:
        raise ValueError("sizes are for drawing inputs, and inputs are given: leave out one of them")
    kernels = profiled(model, inputs, sizes)
    origins = {runs.node: runs.origin for runs in kernels}
    layers = [_layer(runs) for runs in kernels if runs.node.op_type in KERNELS]
    leftover = [_leftover(runs, origins) for runs in kernels if runs.node.op_type in _LEFT]
    return CoverageReport(tuple(layer for layer in layers if layer is not None), tuple(leftover))


def _layer(runs: KernelRuns) -> Kernel | None:
    """Return the kernel, or None for one on constants, on integers such as sizes, or with nothing to add up."""
    node, kernel = runs.node, KERNELS[runs.node.op_type]
    operands = [node.inputs[place] for place in kernel.operands]
    constants = [value is not None and is_constant(value) for value in operands]
    layer = "matmul" if kernel.layer == "linear" and not any(constants) else kernel.layer
    if written_for := _WRITTEN_FOR.get(runs.origin.layer):
        if layer != "linear":
            return None  # what moves the numbers that the layer adds up
        layer = written_for
    if layer == "add" and (any(constants) or any(call.unequal(kernel.operands) for call in runs.calls)):
        return None
    if layer in _LIGHT and runs.numbers not in _COUNTED:
        return None
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    kind = kind_of(kernel, attributes, runs.numbers)
    reason = "" if kind == "integer" else "its weight alone is quantized" if kind == "weight-only" else why_float(node)
    if kind == "float" and written_for == "recurrent":
        reason = CELL_IN_FLOAT
    macs = sum(kernel.macs(call) for call in runs.calls)
    # ORT's WeightBiasQuantization, which takes any such layer between a DequantizeLinear and a QuantizeLinear.
    warning = _FLOAT_WEIGHT if runs.origin.has_float_weight and node.op_type in ("QLinearConv", "QGemm") else ""
    place = runs.origin.name, runs.origin.source
    return Kernel(node.op_type, layer, kind, macs, *place, reason, warning, runs.overflowing)


def _leftover(runs: KernelRuns, origins: Mapping[ir.Node, Origin]) -> Leftover:
    node = runs.node
    reason, cause = (why_quantized if node.op_type == "QuantizeLinear" else why_dequantized)(node)
    origin = runs.origin if cause is None else origins[cause]
    if reason == SCALES_DIFFER and origin.before:
        reason = f"the scales before and after {origin.before} differ"
    value = node.inputs[0]
    return Leftover(node.op_type, (value.name if value is not None else None) or "", reason, origin.name, origin.source)


# -- text ------------------------------------------------------------------------------------------------------------


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _place(one: Kernel | Leftover) -> str:
    line = one.source.partition(",")[0]
    return f"{one.node} at {line}" if one.node and line else one.node or line


def _grouped(told: Iterable[tuple[str, str]]) -> list[str]:
    """Return one line for each text, with how often it stands there and at which places first."""
    places: dict[str, list[str]] = {}
    for text, place in told:
        places.setdefault(text, []).append(place)
    lines = []
    for text, found in list(places.items())[:_LINES]:
        distinct = [place for place in dict.fromkeys(found) if place]
        where = f"  ({', '.join(distinct[:3])}{', ...' if len(distinct) > 3 else ''})" if distinct else ""
        lines.append(f"  {len(found)} x {text}{where}")
    return lines + ([f"  and {len(places) - _LINES} other reasons"] if len(places) > _LINES else [])
