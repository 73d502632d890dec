"""Put a plan into the graph: quantize and dequantize nodes at its values, integers in place of its weights.

    before:  y = conv2d(x, w, b);  z = relu(y);  return linear(z, ...)
    after:   xd = dequantize(quantize(x, ...), ...)
             wd = dequantize(w as int8, ...);  bd = dequantize(b as int32, scale of x times scales of w, 0)
             y = conv2d(xd, wd, bd);  zd = dequantize(quantize(y, ...), ...);  return linear(zd, ...)

Whatever reads the result of an integer kernel reads the dequantized value; a float reader of a float result goes on to
read the float. The relu is gone where the smallest integer stands for 0: saturation does its work.

Source: ONNX operator specification, QuantizeLinear and DequantizeLinear; the bias rule is that of QLinearConv.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from fxopt.args import source_line
from fxopt.errors import PassError, describe
from fxopt.graph_module import graph_modules
from fxopt.passes.quantize.layout import Layout, bias_of, input_of
from fxopt.passes.quantize.placement import Site, kernel_of, node_names, path_of
from fxopt.passes.quantize.planned_pass import PlannedPass
from fxopt.passes.quantize.spec import QuantSpec
from fxopt.passes.quantize.target import TARGETS
from fxopt.passes.quantize.weights import bias_integers, constant_of, parameters_of, weight_integers
from fxopt.quantized_ops import DEQUANTIZE, QUANTIZE, quantizer_in
from fxopt.rewriter import Rewriter

__all__ = ["InsertQdq", "refuse_quantized"]

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class InsertQdq(PlannedPass):
    """Apply a plan whose scales are known.

    Attributes:
        plan: ``{node: QuantSpec}``; see :class:`QuantPlan`.
        target: Name of the runtime that the plan was made for.
        min_sqnr_db: Signal to quantization noise that every output must keep on the example inputs, in dB.
    """

    name: ClassVar[str] = "insert-qdq"
    ends: ClassVar[frozenset[str]] = frozenset({"no-qdq"})

    def run(self, rw: Rewriter) -> None:
        """Insert the nodes.

        Raises:
            PassError: the graph is quantized already, or the plan names a node that is not there or has no scale.
        """
        refuse_quantized(rw, self.name)
        self._check_plan(rw)
        prefixes = path_of(rw.gm)
        for module in graph_modules(rw.gm):
            _Inserter(rw, Layout(module.graph, self.plan, TARGETS[self.target], prefixes[module.graph])).run()

    def _check_plan(self, rw: Rewriter) -> None:
        known = node_names(rw.gm)
        unknown = [name for name in self.plan if name not in known]
        if unknown:
            raise PassError(
                describe(
                    f"the plan names {unknown[0]!r}, which the graph does not have",
                    got=f"{len(unknown)} such names",
                    wanted="names of nodes of this graph, prepared for quantization",
                    try_="the plan that Quantize().make_plan(graph) returns for this very graph",
                )
            )
        unresolved = [name for name, spec in self.plan.items() if not spec.resolved]
        if unresolved:
            raise PassError(
                describe(
                    f"the plan gives no scale for {unresolved[0]!r}",
                    got=str(self.plan[unresolved[0]]),
                    try_="Quantize(plan=plan), which calibrates what the plan leaves open",
                )
            )


def refuse_quantized(rw: Rewriter, pass_name: str) -> None:
    """Raise PassError if the graph holds quantizers already: what a second one would measure is their noise."""
    node = quantizer_in(rw.gm)
    if node is not None:
        raise PassError(
            describe(
                f"the graph is quantized already, and {pass_name} works on floats",
                got=f"{node.name} ({node.target})",
                source=source_line(node),
                try_="the graph before it was quantized",
            )
        )


class _Inserter:
    """Applies the plan to one graph."""

    def __init__(self, rw: Rewriter, layout: Layout) -> None:
        self.rw, self.layout = rw, layout
        self._constants: dict[QuantSpec, tuple[torch.fx.Node, torch.fx.Node]] = {}
        self._weights: dict[torch.fx.Node, torch.fx.Node] = {}

    def run(self) -> None:
        layout = self.layout
        for node, reason in layout.refused.items():
            self.rw.skip(node, reason)
        for node in layout.order:
            if node in layout.sites and layout.sites[node].weight is not None:
                self._weight_and_bias(layout.sites[node])
        for node in layout.order:
            if node in layout.specs and layout.specs[node].role == "activation":
                self._activation(node, layout.specs[node])

    def _weight_and_bias(self, site: Site) -> None:
        assert site.weight is not None  # run() leaves others out
        weight, spec, bias = site.weight, self.layout.specs[site.weight], bias_of(site)
        if weight not in self._weights:
            integers = weight_integers(constant_of(weight), spec)
            self._weights[weight] = self._dequantized(weight, integers, *parameters_of(spec), spec.axis or 0, site)
        self.rw.replace_argument(site.node, weight, self._weights[weight], why=f"weight as {spec.integer}")
        if bias is None or self.layout.keeps_float_bias(site):
            return
        found = bias_integers(constant_of(bias), self.layout.specs[input_of(site)].scale[0], spec)
        assert found is not None  # the layout left such sites out
        integers, scale = found
        dequantized = self._dequantized(bias, integers, scale, torch.zeros_like(integers), 0, site)
        self.rw.replace_argument(site.node, bias, dequantized, why="bias as int32")

    def _dequantized(
        self,
        old: torch.fx.Node,
        integers: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor,
        axis: int,
        site: Site,
    ) -> torch.fx.Node:
        held = self.rw.constant(f"{old.target}_integers", integers, near=site.node)
        step = self.rw.constant(f"{old.target}_scale", scale, near=site.node)
        offset = self.rw.constant(f"{old.target}_zero_point", zero_point, near=site.node)
        return self.rw.insert_call(
            DEQUANTIZE, (held, step, offset, axis), before=site.node, why=f"reads {old.name} as integers", sources=[old]
        )

    def _activation(self, node: torch.fx.Node, spec: QuantSpec) -> None:
        readers = self.layout.readers(node)
        if not readers:
            return
        source, site = node, self.layout.results.get(node)
        if site is not None and site.result is not site.node and set(readers) == set(node.users):
            if self.layout.stands_for_limits(site, spec):
                source = site.node
            else:
                self.rw.skip(node, f"the integers reach beyond its limits: {spec}")
        before = _behind(node)
        scale, zero_point = self._scale(node, spec, before)
        arguments = (source, scale, zero_point, 0, *spec.limits)
        integers = self.rw.insert_call(QUANTIZE, arguments, before=before, why=f"{node.name} as {spec}", sources=[node])
        floats = self.rw.insert_call(
            DEQUANTIZE, (integers, scale, zero_point, 0), before=before, why=f"reads {node.name}", sources=[node]
        )
        for reader in readers:
            self.rw.replace_argument(reader, node, floats, why=f"reads {node.name} as integers")
            if self._is_float_layer(reader):
                self._shield(reader, floats, spec)

    def _is_float_layer(self, node: torch.fx.Node) -> bool:
        kernel = kernel_of(node, self.layout.target)
        return kernel is not None and kernel.heavy and node not in self.layout.sites

    def _shield(self, layer: torch.fx.Node, floats: torch.fx.Node, spec: QuantSpec) -> None:
        """Put a clamp that changes nothing in front of a float layer: ONNX Runtime would quantize its weight.

        It does so with one scale for the whole weight, wherever a layer reads a DequantizeLinear and a QuantizeLinear
        reads the layer.
        """
        why = "keeps the runtime from quantizing a layer that is to stay float"
        same = self.rw.insert_call(aten.clamp.default, (floats, *spec.range), before=layer, why=why)
        self.rw.replace_argument(layer, floats, same, why=why)

    def _scale(
        self, node: torch.fx.Node, spec: QuantSpec, before: torch.fx.Node
    ) -> tuple[torch.fx.Node, torch.fx.Node]:
        """Return the nodes that read scale and zero point; values of one group read the same ones."""
        key = spec if spec.group else dataclasses.replace(spec, group=f"\0{node.name}")
        if key not in self._constants:
            scale, zero_point = parameters_of(spec)
            name = spec.group.rpartition("/")[2] or node.name
            self._constants[key] = (
                self.rw.constant(f"{name}_scale", scale, near=before),
                self.rw.constant(f"{name}_zero_point", zero_point, near=before),
            )
        return self._constants[key]


def _behind(node: torch.fx.Node) -> torch.fx.Node:
    """Return the node before which to insert what reads ``node``; placeholders stay together."""
    following = node.next
    while following.op == "placeholder":
        following = following.next
    return following
