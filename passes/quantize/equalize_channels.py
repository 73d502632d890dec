"""Even out the channels between two layers, so that one scale serves all of them.

    before:  y = conv2d(relu(conv2d(x, w1, b1)), w2, b2)
    after:   y = conv2d(relu(conv2d(x, w1 / s, b1 / s)), w2 * s, b2)        s: one number a channel between the layers

The same function, since a relu lets a positive factor through. A channel whose numbers are small where the weights that
read it are large loses most of its bits to its neighbours' scale; ``s`` moves the size from one side to the other:

    by weights      s = sqrt(r1 / r2): both layers' channels get the same range. Nagel et al., Data-Free Quantization,
                    ICCV 2019, equation 11.
    by activations  s = a^alpha / r2^(1 - alpha), with the range ``a`` of the channel itself on calibration inputs: for
                    weights with a scale for each channel, where r1 costs nothing. Xiao et al., SmoothQuant, ICML 2023,
                    equation 4.

``s`` is rounded to a power of two, by which floats are multiplied without error: the graph stays bit for bit the same.
Where results of layers are added up, as along the residual blocks of a stage, all of them have the same ``s``.

An upper limit such as that of relu6 lets no factor through, and layers with one between them are left alone. With
``limits="inert"`` they are not: the limit stays as it is, a channel that comes near it on some calibration input keeps
its size, and others stay below it, before and after. On calibration inputs that is the same function, but for rounding
of floats, since ``s`` is no power of two then: it takes a channel as near to the limit as it may come. On other inputs
a channel may be cut off elsewhere, at no less than it reached there. The paper replaces relu6 by relu (section 5.1.1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

import torch

from fxopt.args import shape
from fxopt.calibration_data import calibration_of
from fxopt.contracts import Contract
from fxopt.graph_module import graph_modules
from fxopt.limits import limits_of
from fxopt.pass_base import Pass
from fxopt.passes.quantize.calibrate import calibrate
from fxopt.passes.quantize.layout import bias_of
from fxopt.passes.quantize.placement import Site, integer_sites
from fxopt.passes.quantize.target import GENERIC
from fxopt.rewriter import Rewriter

__all__ = ["EqualizeChannels", "Junction", "junctions", "power_of_two"]

aten = torch.ops.aten

# Operators that let a positive factor of each channel through.
_HOMOGENEOUS = {
    aten.relu.default, aten.leaky_relu.default, aten.prelu.default, aten.max_pool2d.default, aten.max_pool1d.default,
    aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default, aten.clone.default, aten.contiguous.default,
}  # fmt: skip
_LARGEST_EXPONENT = 24
_NEAR = 0.9  # of an upper limit: what comes so near on calibration inputs may reach it on others
_LITTLE = 0.05  # of a power of two, by which it is not worth while to change a channel
_SWEEPS = 20


@dataclasses.dataclass(frozen=True)
class Junction:
    """Layers and the layers that alone read their results, channel by channel: a factor goes through all between them.

    Attributes:
        firsts: The layers in front: one, or several whose results are added up.
        values: What the others, and sums, read, and the sums.
        readers: The layers behind.
        limits: What cuts the channels off from above on their way.
    """

    firsts: tuple[Site, ...]
    values: tuple[torch.fx.Node, ...]
    readers: tuple[Site, ...]
    limits: tuple[torch.fx.Node, ...] = ()


@dataclasses.dataclass(frozen=True)
class EqualizeChannels(Pass):
    """Rescale channels between layers.

    Attributes:
        alpha: How much of the difference of activations is moved into the weights, for ``by="activations"``.
        by: ``"weights"`` needs no data; ``"activations"`` measures on the calibration inputs.
        limits: ``"kept"`` leaves layers alone with an upper limit between them; ``"inert"`` evens out the channels that
            do not come near it, by ``"activations"``.
        min_sqnr_db: For inert limits, signal to noise that every output must keep on the example inputs, in dB.
    """

    name: ClassVar[str] = "equalize-channels"
    by: Literal["weights", "activations"] = "weights"
    alpha: float = 0.5
    limits: Literal["kept", "inert"] = "kept"
    min_sqnr_db: float = 40.0

    def __post_init__(self) -> None:
        """Check the options."""
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}; wanted 0 to 1")
        if self.limits == "inert" and self.by != "activations":
            raise ValueError(f'limits="inert" asks what channels reach, and by is {self.by!r}; wanted by="activations"')

    @property
    def contract(self) -> Contract:  # type: ignore[override]  # it depends on an option
        """The same bits; with inert limits, another function of inputs that reach further than the calibration's."""
        return Contract.EXACT if self.limits == "kept" else Contract.lossy("sqnr_db", self.min_sqnr_db)

    def run(self, rw: Rewriter) -> None:
        """Run on one graph and the graphs inside it, each on its own."""
        for module in graph_modules(rw.gm):
            found = list(junctions(rw, module, limited=self.limits == "inert"))
            weights: dict[torch.fx.Node, torch.Tensor] = {}
            for junction in found:
                for node in _constants(junction):
                    weights[node] = rw.tensor(node).detach()
            before = dict(weights)
            ranges = self._activation_ranges(rw, found)
            for _ in range(_SWEEPS):
                if not sum(  # not any(): each is to be tried
                    self._equalize(junction, weights, ranges) for junction in found
                ):
                    break
            for node, tensor in weights.items():
                if tensor is not before[node]:
                    rw.set_tensor(node, tensor, why="channels evened out by powers of two")

    def _activation_ranges(self, rw: Rewriter, found: list[Junction]) -> dict[torch.fx.Node, torch.Tensor]:
        if self.by == "weights" or not found:
            return {}
        axes = {node: j.firsts[0].channel_axis for j in found for node in (*j.values, *j.limits)}
        names = {rw.site_name(node): node for node in axes}
        channels = {name: axes[node] for name, node in names.items()}
        sketches = calibrate(rw.gm, list(names), calibration_of(rw.gm), channels=channels)
        return {names[name]: sketch.channel_largest for name, sketch in sketches.items() if sketch.count}

    def _equalize(
        self,
        junction: Junction,
        weights: dict[torch.fx.Node, torch.Tensor],
        ranges: dict[torch.fx.Node, torch.Tensor],
    ) -> bool:
        """Rescale the channels of one junction; return whether any factor was not 1."""
        behind = torch.stack([_input_ranges(site, weights[_weight(site)]) for site in junction.readers]).amax(0)
        known = [ranges[value] for value in junction.values if value in ranges]
        if self.by == "weights":
            first = torch.stack([_output_ranges(site, weights[_weight(site)]) for site in junction.firsts]).amax(0)
            wanted = (first / behind).sqrt()
        elif known:
            wanted = torch.stack(known).amax(0).pow(self.alpha) / behind.pow(1 - self.alpha)
            wanted = wanted / _middle(wanted)
        else:
            return False
        factor = power_of_two(wanted) if self.limits == "kept" else _more_than_a_little(wanted)
        for limit in junction.limits:
            if limit not in ranges:
                return False
            factor = _within(factor, ranges[limit], _NEAR * _end_of(limit))
        if bool((factor == 1).all()):
            return False
        for node in {*junction.values, *junction.limits} & ranges.keys():
            ranges[node] = ranges[node] / factor
        for site in junction.firsts:
            _divide_outputs(site, weights, factor)
        for site in junction.readers:
            weights[_weight(site)] = _times_inputs(site, weights[_weight(site)], factor)
        return True


def power_of_two(wanted: torch.Tensor) -> torch.Tensor:
    """Return the power of two nearest to each number on a logarithmic scale; 1 where it is 0, infinite or NaN."""
    return torch.exp2(_exponent(wanted).round()).float()


def _more_than_a_little(wanted: torch.Tensor) -> torch.Tensor:
    """Return the factors; 1 where a number is next to 1, which ends the sweeps, or 0, infinite or NaN."""
    exponent = _exponent(wanted)
    return torch.exp2(torch.where(exponent.abs() < _LITTLE, 0.0, exponent)).float()


def _exponent(wanted: torch.Tensor) -> torch.Tensor:
    usable = wanted.isfinite() & (wanted > 0)
    return torch.where(usable, wanted, 1.0).double().log2().clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT)


def _within(factor: torch.Tensor, largest: torch.Tensor, end: float) -> torch.Tensor:
    """Return the factors, with which no channel gets past ``end``; 1 for those that are past it already."""
    least = largest / end
    return torch.where(least > 2.0**-_LITTLE, 1.0, torch.maximum(factor, least))


def junctions(rw: Rewriter, module: torch.fx.GraphModule, *, limited: bool = False) -> Iterator[Junction]:
    """Yield the layers whose channels other layers, and nothing else, read one by one; some behind upper limits."""
    sites = {s.node: s for s in integer_sites(module.graph, GENERIC, {}) if s.is_layer}
    for members in _tied(module.graph, limited=limited):
        junction = _junction(members, sites, limited=limited)
        if junction is None:
            continue
        shared = [
            node for node in _constants(junction) if rw.readers(str(node.target), node.graph) > 1 or len(node.users) > 1
        ]
        if shared:
            rw.skip(junction.firsts[0].node, f"{shared[0].target} is read by others too")
        else:
            yield junction


def _tied(graph: torch.fx.Graph, *, limited: bool) -> Iterator[list[torch.fx.Node]]:
    """Yield the nodes of a graph in groups of those whose channels must have the same factor."""
    import networkx  # loading it takes longer than the rest of the package; torch.export does it anyway

    tied = networkx.Graph()
    for node in graph.nodes:
        tied.add_node(node)
        tied.add_edges_from((source, node) for source in _lets_through(node, limited=limited))
    for group in networkx.connected_components(tied):
        yield sorted(group)


def _lets_through(node: torch.fx.Node, *, limited: bool) -> list[torch.fx.Node]:
    """Return the inputs of a call of which a positive factor for each channel is one of its result."""
    if node.target is aten.add.Tensor and not node.kwargs and len(node.args) == 2:
        halves = [half for half in node.args if isinstance(half, torch.fx.Node)]
        return halves if len(halves) == 2 and shape(halves[0]) == shape(halves[1]) else []
    if node.target not in _HOMOGENEOUS and not (limited and _end_of(node) > 0):
        return []
    (source, *_) = node.args
    return [source] if isinstance(source, torch.fx.Node) else []


def _junction(members: list[torch.fx.Node], sites: Mapping[torch.fx.Node, Site], *, limited: bool) -> Junction | None:
    """Return the junction of nodes that are tied; None if others than layers yield or read them."""
    firsts = [sites[node] for node in members if node in sites]
    held = frozenset(members)
    if not firsts or any(node not in sites and not _lets_through(node, limited=limited) for node in members):
        return None
    readers: dict[Site, None] = {}
    for node in members:
        for user in node.users:
            if user in held and node in _lets_through(user, limited=limited):
                continue
            if user not in sites or not all(_reads_channels(sites[user], node, first) for first in firsts):
                return None
            readers[sites[user]] = None
    sums = {node for node in members if node.target is aten.add.Tensor}
    values = [node for node in members if node in sums or any(user in sites or user in sums for user in node.users)]
    limits = tuple(node for node in members if _end_of(node) > 0)
    return Junction(tuple(firsts), tuple(values), tuple(readers), limits) if readers else None


def _end_of(node: torch.fx.Node) -> float:
    """Return where a limit that lets nothing below 0 through cuts off from above; 0 for other calls."""
    low, high = limits_of(node) or (None, None)
    return high if low == 0 and high is not None else 0.0


def _reads_channels(reader: Site, value: torch.fx.Node, first: Site) -> bool:
    """Return whether the input channels of ``reader`` are the output channels of ``first``, in their order."""
    if reader.operands[0] is not value or value in reader.operands[1:] or reader.is_convolution != first.is_convolution:
        return False
    axis = first.channel_axis
    return shape(value)[axis] == shape(first.node)[axis] and len(shape(value)) == len(shape(first.node))


def _weight(site: Site) -> torch.fx.Node:
    assert site.weight is not None  # junctions() left others out
    return site.weight


def _constants(junction: Junction) -> list[torch.fx.Node]:
    biases = [bias for site in junction.firsts if (bias := bias_of(site)) is not None]
    return list(dict.fromkeys([*map(_weight, (*junction.firsts, *junction.readers)), *biases]))


def _by_output(site: Site, weight: torch.Tensor) -> torch.Tensor:
    """Return the weight as f32[out channels, the rest]."""
    return weight.movedim(site.kernel.weight_axis, 0).flatten(1)


def _output_ranges(site: Site, weight: torch.Tensor) -> torch.Tensor:
    return _by_output(site, weight).abs().amax(1)


def _by_input(site: Site, weight: torch.Tensor) -> torch.Tensor:
    """Return a view of the weight as f32[groups, out channels of a group, in channels of a group, the rest]."""
    if site.kernel.weight_axis == 1:
        return weight.t()[None, :, :, None]
    groups = site.groups
    return weight.unflatten(0, (groups, -1)).flatten(3) if weight.ndim > 2 else weight[None, :, :, None]


def _input_ranges(site: Site, weight: torch.Tensor) -> torch.Tensor:
    return _by_input(site, weight).abs().amax((1, 3)).flatten()


def _times_inputs(site: Site, weight: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    grouped = _by_input(site, weight)
    scaled = grouped * factor.reshape(grouped.shape[0], 1, grouped.shape[2], 1)
    if site.kernel.weight_axis == 1:
        return scaled[0, :, :, 0].t().contiguous()
    return scaled.reshape(weight.shape)


def _divide_outputs(site: Site, weights: dict[torch.fx.Node, torch.Tensor], factor: torch.Tensor) -> None:
    weight, bias = weights[_weight(site)], bias_of(site)
    shaped = [1] * weight.ndim
    shaped[site.kernel.weight_axis] = -1
    weights[_weight(site)] = weight / factor.reshape(shaped)
    if bias is not None:
        weights[bias] = weights[bias] / factor


def _middle(numbers: torch.Tensor) -> torch.Tensor:
    usable = numbers[numbers.isfinite() & (numbers > 0)]
    return usable.log().mean().exp() if usable.numel() else torch.ones(())
