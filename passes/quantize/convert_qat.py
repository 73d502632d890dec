"""Make integers of a graph that was trained with quantizers in it.

    before:  y = relu(batch_norm(conv2d(fake_quantize(x, ...), fake_quantize(w, s)), gamma, norm_bias(...), mean, var))
    after:   y = conv2d(dequantize(quantize(x, ...)), dequantize(w as integers, s |f|), dequantize(bias as int32))

The quantizers are read off as a plan, and taken out; weights stay rounded; batch norms are folded; InsertQdq applies
the plan. A weight that is rounded already keeps its integers, whatever its channel is multiplied by.

The integer graph may differ from the graph in eval mode where a value lies so near to the middle between two integers
that the rounding errors of float32 decide: by one step of that value, and what follows from it.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from fxopt.args import arg, source_line
from fxopt.errors import PassError, describe
from fxopt.graph_module import graph_modules
from fxopt.pair_sums import can_overflow
from fxopt.pass_base import LossyPass
from fxopt.passes.quantize.conv_bn import (
    FoldedNorm,
    as_integer_layers,
    constant_result,
    evaluation_source,
    folded_scales,
)
from fxopt.passes.quantize.insert_qdq import InsertQdq
from fxopt.passes.quantize.placement import all_sites, integer_sites, move_source, node_names, path_of, place
from fxopt.passes.quantize.resolve import WeightScales, resolve_weights
from fxopt.passes.quantize.sink_constants import SinkConstants
from fxopt.passes.quantize.spec import QuantPlan, QuantSpec
from fxopt.passes.quantize.target import TARGETS, Target
from fxopt.passes.quantize.weights import constant_of, weight_integers
from fxopt.quantized_ops import DEQUANTIZE, FAKE_QUANTIZE
from fxopt.rewriter import Rewriter
from fxopt.training_ops import FAKE_QUANTIZE_BIAS, LEARNED_SCALE, NORM_BIAS

__all__ = ["ConvertQat"]


@dataclasses.dataclass(frozen=True)
class ConvertQat(LossyPass):
    """Turn fake quantizers into quantizers, and weights and biases into integers.

    Attributes:
        target: The runtime that the graph was prepared for.
        min_sqnr_db: How near every output must stay to that of the graph in eval mode, on the example inputs, in dB.
    """

    name: ClassVar[str] = "convert-qat"
    ends: ClassVar[frozenset[str]] = frozenset({"no-qdq"})
    evaluation_only: ClassVar[bool] = True
    divisible: ClassVar[bool] = False
    target: str = "ort-cpu"
    min_sqnr_db: float = 30.0

    def __post_init__(self) -> None:
        """Check the options."""
        if self.target not in TARGETS:
            raise ValueError(f"target is {self.target!r}; wanted one of {', '.join(TARGETS)}")

    def run(self, rw: Rewriter) -> None:
        """Convert the graph.

        Raises:
            PassError: the graph has no fake quantizers, or is in train mode.
        """
        if not any(node.target is FAKE_QUANTIZE for node in rw.nodes()):
            quantized = any(node.target is DEQUANTIZE for node in rw.nodes())
            raise PassError(
                describe(
                    "the graph holds no fake quantizer, so there is nothing to convert",
                    got="a graph of integers, converted already" if quantized else "a graph of floats",
                    try_=None if quantized else "prepare-qat before training, or quantize without training",
                )
            )
        if rw.gm.training:
            raise PassError(
                describe("the graph is in train mode, and integers are for evaluation", try_="graph.eval()")
            )
        SinkConstants().run(rw)  # the weights of branches, too, are to be told from values
        found = _Quantizers(rw)
        folded = as_integer_layers(rw)
        plan = found.plan(rw, folded, TARGETS[self.target])
        plan = resolve_weights(rw.gm, plan, TARGETS[self.target], WeightScales(no_saturation=False))
        rw.notes += _overflow_notes(rw, plan, TARGETS[self.target])
        InsertQdq(plan, self.target, self.min_sqnr_db).run(rw)


class _Quantizers:
    """The quantizers of a graph, read off and taken out; what is left are floats, of which the weights are rounded.

    Attributes:
        activations: For each quantizer the names of its value, those of which it is a copy in evaluation behind it.
        weights: For each layer the scales and limits of its weight.
    """

    def __init__(self, rw: Rewriter) -> None:
        self.activations: list[tuple[list[str], QuantSpec]] = []
        self.weights: dict[str, QuantSpec] = {}
        prefixes = path_of(rw.gm)
        for node in list(rw.calls(FAKE_QUANTIZE, FAKE_QUANTIZE_BIAS, NORM_BIAS)):
            if node.target is FAKE_QUANTIZE:
                self._quantizer(rw, node, prefixes[node.graph])
            elif node.target is FAKE_QUANTIZE_BIAS:
                rw.replace_value(node, arg(node, "bias"), why="becomes int32")
            else:
                for norm in list(node.users):
                    rw.set_arg(norm, "bias", arg(node, "beta"), why="becomes int32")

    def _quantizer(self, rw: Rewriter, node: torch.fx.Node, prefix: str) -> None:
        spec = _spec_of(node, prefix)
        rounded = constant_result(node)
        if rounded is not None:
            home = arg(node, "x")
            name = str(home.target) if home.op == "get_attr" else home.name
            self.weights |= {prefix + layer.name: spec for layer in node.users}
            held = rw.constant(name, rounded, near=node, why="rounded to integers")
            rw.replace_value(node, held, why="rounded once and for all")
            return
        value: torch.fx.Node | None = arg(node, "x")
        names: list[str] = []
        while value is not None:
            names.append(prefix + value.name)
            value = evaluation_source(value)
        self.activations.append((names, spec))
        rw.replace_value(node, arg(node, "x"), why="becomes a pair of quantize and dequantize")

    def plan(self, rw: Rewriter, folded: dict[str, FoldedNorm], target: Target) -> QuantPlan:
        """Return the plan by the names of the graph of integer layers."""
        layer_of = {norm.name: layer for layer, norm in folded.items()}
        prefixes, placed = path_of(rw.gm), place(rw.gm, target)
        known = node_names(rw.gm)
        specs: dict[str, QuantSpec] = {}
        for names, spec in self.activations:
            name = next((layer_of.get(name, name) for name in names if name in layer_of or name in known), None)
            if name is not None:
                specs[name] = spec
        for module in graph_modules(rw.gm):
            prefix = prefixes[module.graph]
            _complete(specs, module.graph, placed, target, prefix)
            for site in integer_sites(module.graph, target, {}, prefix):
                layer = prefix + site.node.name
                if site.weight is not None and layer in self.weights:
                    specs[prefix + site.weight.name] = _folded(self.weights[layer], folded.get(layer))
        return QuantPlan(specs)


def _spec_of(node: torch.fx.Node, prefix: str) -> QuantSpec:
    """Return the spec of a fake quantizer; values whose quantizers read one scale are a group."""
    scale, zero_point = (constant_result(arg(node, name)) for name in ("scale", "zero_point"))
    if scale is None or zero_point is None:
        raise PassError(f"the scale of {node.name} depends on the inputs, which no integer kernel can have")
    if not bool(scale.isfinite().all()) or not bool((scale > 0).all()):
        raise PassError(
            describe(
                f"the scale of {node.name} is no number above 0",
                got=f"{scale.min().item()} to {scale.max().item()}",
                source=source_line(node),
                try_="the state from before the training diverged, and a lower learning rate",
            )
        )
    low, high = arg(node, "qmin"), arg(node, "qmax")
    symmetric = low == -high
    home = arg(node, "scale")
    if home.target is LEARNED_SCALE:
        home = arg(home, "scale")
    return QuantSpec(
        role="activation",
        bits=(high - low + symmetric).bit_length(),
        signed=low < 0,
        symmetric=symmetric,
        axis=arg(node, "axis") if scale.ndim else None,
        scale=tuple(scale.reshape(-1).tolist()),
        zero_point=tuple(int(offset) for offset in zero_point.reshape(-1)),
        group=prefix + str(home.target).removesuffix("_scale") if scale.ndim == 0 else "",
    )


def _folded(spec: QuantSpec, norm: FoldedNorm | None) -> QuantSpec:
    scale = folded_scales(torch.tensor(spec.scale), None if norm is None else norm.factor)
    return dataclasses.replace(spec, role="weight", scale=tuple(scale.tolist()), group="")


def _complete(
    specs: dict[str, QuantSpec], graph: torch.fx.Graph, placed: QuantPlan, target: Target, prefix: str
) -> None:
    """Add the values that need no fake quantizer, since they are all quantized already: moved or joined."""
    joined = {site.node: site.operands for site in integer_sites(graph, target, {}, prefix) if site.kernel.same_scale}
    for node in graph.nodes:
        name = prefix + node.name
        source = move_source(node, target)
        sources = joined.get(node, (source,) if source is not None else ())
        found = {specs.get(prefix + each.name) for each in sources}
        same = next(iter(found)) if len(found) == 1 else None
        if name in placed and name not in specs and same is not None:
            specs[name] = same


def _overflow_notes(rw: Rewriter, plan: QuantPlan, target: Target) -> list[str]:
    """Return what to say of 8-bit weights that grew while they were trained."""
    found: list[str] = []
    for prefix, site in all_sites(rw.gm, target):
        spec = None if site.weight is None else plan.get(prefix + site.weight.name)
        if site.weight is None or spec is None or spec.bits != 8 or spec.axis is None:
            continue
        integers = weight_integers(constant_of(site.weight), spec)
        over = int(can_overflow(integers, spec.axis, groups=site.groups).sum())
        if over:
            found.append(
                f"{prefix}{site.node.name}: {over} channels can overflow the 16-bit sums of CPUs without VNNI; "
                "train with weight_bits=7, or run ORT with session.x64quantprecision=1"
            )
    return found
