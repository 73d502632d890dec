"""Put differentiable quantizers into a graph of both modes, where the layout of its twin in evaluation has quantizers.

Nodes of the two graphs that compute the same have the same name, with two exceptions: a batch norm that a layer took in
is the layer in evaluation, and dropout and selections of a mode are what they pass on there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch

from fxopt.args import arg, source_line
from fxopt.errors import PassError, describe
from fxopt.passes.quantize.conv_bn import FoldedNorm, constant_result, evaluation_source
from fxopt.passes.quantize.layout import Layout, bias_of, input_of
from fxopt.passes.quantize.placement import Site, move_source
from fxopt.passes.quantize.saturation import avoid_saturation
from fxopt.passes.quantize.spec import QuantSpec
from fxopt.passes.quantize.weights import channel_scales, constant_of, parameters_of
from fxopt.quantized_ops import FAKE_QUANTIZE, along
from fxopt.rewriter import Rewriter
from fxopt.training_ops import FAKE_QUANTIZE_BIAS, LEARNED_SCALE, NORM_BIAS

__all__ = ["FakeQuantizers", "FirstScales", "first_scales"]


@dataclasses.dataclass(frozen=True)
class FirstScales:
    """Which scales training starts with.

    Attributes:
        given: Names of the values and weights whose scales the user gave.
        learned: Whether scales are trained.
        no_saturation: Whether those of 8-bit weights are raised until 16-bit sums cannot overflow.
    """

    given: frozenset[str] = frozenset()
    learned: bool = False
    no_saturation: bool = True

    def of_weight(
        self, name: str, weight: torch.Tensor, spec: QuantSpec, norm: FoldedNorm | None, groups: int
    ) -> torch.Tensor:
        """Return the scales of a weight, f32[channels] or f32[].

        Args:
            name: Its name in the plan.
            weight: The weight itself, no batch norm folded in.
            spec: What the plan says of the folded weight.
            norm: The batch norm behind.
            groups: Of the convolution.
        """
        scale = first_scales(weight, spec)
        if name in self.given:
            wanted = torch.tensor(spec.scale, dtype=torch.float32)
            own = wanted if norm is None else (wanted.double() / norm.factor.abs()).float()
            scale = torch.where(own.isfinite() & (own > 0), own, scale)
        elif self.no_saturation and spec.bits == 8 and spec.axis is not None:
            raised = avoid_saturation(weight, scale.tolist(), spec.axis, groups=groups)
            scale = torch.tensor(raised, dtype=torch.float32)
        return scale if spec.axis is not None else scale[0].clone()


def first_scales(weight: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Return the scales of a weight to start training from, f32[channels] or f32[1]: the smaller of two.

    With the one, the largest magnitude of a channel becomes the largest integer q. The other, ``2 mean(|w|) / sqrt(q)``
    (Esser et al. 2020, section 2.1), is smaller at 2 and 3 bits, where the first would round most weights to zero.

    Raises:
        ValueError: the weight holds NaN or infinity.
    """
    scale = torch.tensor(channel_scales(weight, spec), dtype=torch.float32)
    magnitudes = weight.detach().float().abs()
    rows = magnitudes.reshape(1, -1) if spec.axis is None else magnitudes.movedim(spec.axis, 0).flatten(1)
    learned = 2 * rows.mean(1) / math.sqrt(max(spec.limits[1], 1))
    return torch.where(learned > 0, torch.minimum(scale, learned), scale)


class FakeQuantizers:
    """The quantizers of one graph.

    Args:
        rw: Of the graph of both modes.
        graph: That graph, or one inside it.
        layout: Of its twin in evaluation.
        folded: The batch norms that layers of the twin took in, by the name of the layer.
        prefix: What stands before the names of the graph's nodes.
        scales: How weights are scaled.
    """

    def __init__(
        self,
        rw: Rewriter,
        graph: torch.fx.Graph,
        layout: Layout,
        folded: Mapping[str, FoldedNorm],
        prefix: str,
        scales: FirstScales,
    ) -> None:
        self.rw, self.layout, self.folded, self.prefix, self.scales = rw, layout, folded, prefix, scales
        self.nodes = {node.name: node for node in graph.nodes}
        self.twins = {node.name: node for node in layout.order}
        self._parameters: dict[QuantSpec, tuple[torch.fx.Node, torch.fx.Node]] = {}
        self._weights: dict[tuple[torch.fx.Node, torch.fx.Node], tuple[torch.fx.Node, torch.fx.Node]] = {}

    def insert(self) -> None:
        """Insert all of them."""
        for refused, reason in self.layout.refused.items():
            self.rw.skip(refused, reason)
        places = self._places()
        for node in list(self.nodes.values()):
            twin = self.twins.get(node.name)
            site = None if twin is None else self.layout.sites.get(twin)
            if site is not None and site.weight is not None:
                self._weight_and_bias(node, site)
            if node in places:
                self._redirect(node, places[node], set(self.layout.readers(places[node])))

    def _places(self) -> dict[torch.fx.Node, torch.fx.Node]:
        """Return the values to quantize, each with its twin."""
        found: dict[torch.fx.Node, torch.fx.Node] = {}
        for twin, spec in self.layout.specs.items():
            if spec.role != "activation" or self._is_on_grid(twin):
                continue
            norm = self.folded.get(self.prefix + twin.name)
            name = twin.name if norm is None else norm.name.removeprefix(self.prefix)
            if name in self.nodes:
                found[self.nodes[name]] = twin
            else:
                self.rw.skip(twin, "it is computed in evaluation only")
        return found

    def _is_on_grid(self, twin: torch.fx.Node) -> bool:
        """Return whether all that the node yields are values that were quantized with the scale of its own."""
        layout = self.layout
        site = layout.sites.get(twin)
        source = move_source(twin, layout.target)
        if site is not None and site.kernel.same_scale:
            sources = list(site.operands)
        else:
            sources = [source] if source is not None and twin in layout.moves else []
        key = self._key(twin)
        return bool(sources) and all(self._key(each) == key and twin in layout.readers(each) for each in sources)

    def _key(self, twin: torch.fx.Node) -> QuantSpec:
        """Return the spec of a value, equal for those that share a scale."""
        spec = self.layout.specs[twin]
        return spec if spec.group else dataclasses.replace(spec, group=f"\0{twin.name}")

    def _redirect(self, value: torch.fx.Node, twin: torch.fx.Node, readers: set[torch.fx.Node]) -> None:
        """Let those read the quantized value whose twins do, through what vanishes in evaluation."""
        kinds = {reader: self._kinds(reader, readers) for reader in value.users}
        chosen = [reader for reader, found in kinds.items() if found == {True}]
        if chosen:
            quantized = self._quantized(value, twin)
            for reader in chosen:
                self.rw.replace_argument(reader, value, quantized, why=f"reads {value.name} quantized")
        for reader, found in kinds.items():
            if len(found) == 2:
                self._redirect(reader, twin, readers)

    def _kinds(self, reader: torch.fx.Node, readers: set[torch.fx.Node]) -> set[bool]:
        if evaluation_source(reader) is None:
            return {self.twins.get(reader.name) in readers}
        return {kind for user in reader.users for kind in self._kinds(user, readers)}

    def _quantized(self, value: torch.fx.Node, twin: torch.fx.Node) -> torch.fx.Node:
        before = value.next
        while before.op == "placeholder":
            before = before.next
        spec, key = self.layout.specs[twin], self._key(twin)
        if key not in self._parameters:
            shape = value.meta["val"].shape
            features = math.prod(size for size in shape[1:] if isinstance(size, int))
            name = spec.group.rpartition("/")[2] or twin.name
            self._parameters[key] = self._stored(name, *parameters_of(spec), features * spec.limits[1], before)
        arguments = (value, *self._parameters[key], 0, *spec.limits)
        return self.rw.insert_call(
            FAKE_QUANTIZE, arguments, before=before, why=f"{value.name} as {spec}", sources=[value]
        )

    def _stored(
        self, name: str, scale: torch.Tensor, zero_point: torch.Tensor, count: int, before: torch.fx.Node
    ) -> tuple[torch.fx.Node, torch.fx.Node]:
        """Return the nodes of a new scale and zero point; ``count`` is n q in the gradient scale 1 / sqrt(n q)."""
        held = self.rw.constant(f"{name}_scale", scale, near=before)
        if self.scales.learned:
            growth = self.rw.constant(f"{name}_growth", torch.zeros(scale.numel()), near=before, trainable=True)
            arguments = (held, growth, 1 / math.sqrt(max(count, 1)))
            held = self.rw.insert_call(LEARNED_SCALE, arguments, before=before, why="trains the scale")
        return held, self.rw.constant(f"{name}_zero_point", zero_point, near=before)

    def _weight_and_bias(self, layer: torch.fx.Node, site: Site) -> None:
        assert site.weight is not None  # insert() leaves others out
        assert site.kernel.weight is not None
        norm = self.folded.get(self.prefix + layer.name)
        # Layers that share a weight share its quantizer. Weights that are only equal now will not be after training,
        # although evaluation has one constant for both.
        key = arg(layer, site.kernel.weight), site.weight
        if key not in self._weights:
            self._weights[key] = self._weight(layer, site, norm)
        quantized, step = self._weights[key]
        self.rw.set_arg(layer, site.kernel.weight, quantized, why="reads the weight quantized")
        source = self._parameters.get(self._key(input_of(site)))
        if bias_of(site) is None or source is None or self.layout.keeps_float_bias(site):
            return
        bias = arg(layer, site.kernel.bias or "")
        if norm is None:
            arguments = (bias, source[0], step)
            rounded = self.rw.insert_call(FAKE_QUANTIZE_BIAS, arguments, before=layer, why="bias as int32")
            self.rw.set_arg(layer, site.kernel.bias or "", rounded, why="bias as int32")
            return
        behind = self.nodes[norm.name.removeprefix(self.prefix)]
        parts = [arg(behind, name) for name in ("weight", "bias", "running_mean", "running_var", "eps")]
        rounded = self.rw.insert_call(
            NORM_BIAS, (bias, *parts, source[0], step), before=behind, why="folded bias as int32", sources=[behind]
        )
        self.rw.set_arg(behind, "bias", rounded, why="folded bias as int32")

    def _weight(self, layer: torch.fx.Node, site: Site, norm: FoldedNorm | None) -> tuple[torch.fx.Node, torch.fx.Node]:
        """Return the quantized weight of a layer, and its scale."""
        assert site.weight is not None
        weight: torch.fx.Node = arg(layer, site.kernel.weight or "")
        spec, held = self.layout.specs[site.weight], constant_result(weight)
        if held is None:  # what a branch takes from around it, or what is constant in evaluation only
            held = _unfolded(constant_of(site.weight), spec, norm)
        if norm is not None and spec.axis is None:
            raise PassError(
                describe(
                    f"the weight {site.weight.name!r} has one scale for all channels, and {norm.name} behind it",
                    wanted="a scale for each output channel: those commute with a batch norm",
                    source=source_line(layer),
                    try_=f"plan.changed({site.weight.name!r}, axis={site.kernel.weight_axis})",
                )
            )
        scale = self.scales.of_weight(self.prefix + site.weight.name, held, spec, norm, site.groups)
        zero_point = torch.zeros(scale.shape, dtype=spec.dtype)
        name = str(weight.target) if weight.op == "get_attr" else weight.name
        count = held.numel() // max(scale.numel(), 1) * spec.limits[1]
        step, offset = self._stored(name, scale, zero_point, count, layer)
        arguments = (weight, step, offset, spec.axis or 0, *spec.limits)
        quantized = self.rw.insert_call(
            FAKE_QUANTIZE, arguments, before=layer, why=f"weight as {spec.integer}", sources=[weight]
        )
        return quantized, step


def _unfolded(weight: torch.Tensor, spec: QuantSpec, norm: FoldedNorm | None) -> torch.Tensor:
    """Return the weight before a batch norm was folded into it; a channel that it multiplies by 0 stays 0."""
    if norm is None:
        return weight
    factor = torch.where(norm.factor == 0, 1.0, norm.factor)
    return (weight.double() / along(factor, weight, spec.axis or 0)).float()
