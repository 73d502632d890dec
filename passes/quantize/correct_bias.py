"""Add to each bias what quantization takes from the mean of its channel.

    before:  y = conv2d(x, w, b)         of which the integer graph computes another mean, channel by channel
    after:   y = conv2d(x, w, b + d)     d = E[y of the float graph] - E[y of the integer graph]

Rounding a weight of few elements, such as that of a depthwise convolution, shifts the mean of what it computes; layers
behind it see that shift as signal. The layers are taken in their order, each with all corrections before it in place.

Behind a layer that a rectifier alone reads, such as relu, most numbers may be of no account: nobody sees by how much
they lie below 0. There the mean is that of what the rectifier yields, and the correction moves it by one step of the
secant method, with a step h as large as the error:

    d = (E[f(y) of the float graph] - E[f(y) of the integer graph]) / slope      slope = (E[f(y + h)] - E[f(y)]) / h

if that brings the mean nearer.

Rows differ, and a mean over few of them is off by chance: of an error with the standard error s, 1 - s^2 / error^2 is
corrected, and nothing of what lies within it.

Sources: Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, ICCV 2019, section 4.2
and appendix D (empirical bias correction). James and Stein, Estimation with Quadratic Loss, 1961 (how much of an error
to believe; here the positive part, channel by channel).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch

from fxopt.args import arg
from fxopt.calibration_data import calibration_of, calibration_samples
from fxopt.dimensions import Sample
from fxopt.graph_module import CapturedModule
from fxopt.limits import LIMITS
from fxopt.passes.quantize.observations import evenly_spread
from fxopt.passes.quantize.placement import Site, integer_sites
from fxopt.passes.quantize.planned_pass import PlannedPass
from fxopt.passes.quantize.simulate import Simulation, along_channels, run_by_node
from fxopt.passes.quantize.target import TARGETS, Target
from fxopt.passes.quantize.weights import constant_of
from fxopt.rewriter import Rewriter

__all__ = ["ChannelMeans", "CorrectBias", "channel_means", "corrections", "rectifiers_behind", "shift_biases"]

aten = torch.ops.aten

_RECTIFIERS = {
    *LIMITS, aten.celu.default, aten.elu.default, aten.gelu.default, aten.hardswish.default, aten.leaky_relu.default,
    aten.mish.default, aten.prelu.default, aten.silu.default, aten.softplus.default,
}  # fmt: skip
_GATES = {aten.sigmoid.default, aten.hardsigmoid.default}
_POSITIONS = 256  # of a row, or a few more, enough for a mean
_LEAST_SLOPE = 0.02  # of what a rectifier lets through, below which hardly any number counts


@dataclasses.dataclass(frozen=True)
class CorrectBias(PlannedPass):
    """Correct the biases of the layers that a plan quantizes; runs before the plan is applied.

    Attributes:
        plan: The plan, with scales.
        target: Name of the runtime that the plan was made for.
        batches: How many calibration batches to average over, all of which are held in memory at once.
        min_sqnr_db: Signal to noise that every output keeps beside the uncorrected graph, in dB.
    """

    name: ClassVar[str] = "correct-bias"
    batches: int = 8
    min_sqnr_db: float = 0.0

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if self.batches < 1:
            raise ValueError(f"batches is {self.batches}; wanted 1 or more")

    def run(self, rw: Rewriter) -> None:
        """Run on the outer graph: the sides of a branch see other inputs each, and are left as they are."""
        samples = list(itertools.islice(calibration_samples(rw.gm, calibration_of(rw.gm)), self.batches))
        simulation = Simulation(rw.gm, self.plan, TARGETS[self.target])
        shifts = corrections(simulation, samples, channel_means(rw.gm, TARGETS[self.target], samples))
        shift_biases(rw, simulation, shifts)


class ChannelMeans:
    """The means of each channel of what is read of each layer of a graph: of itself, or of the rectifier behind it."""

    def __init__(self, gm: CapturedModule, target: Target) -> None:
        self._read: dict[str, Site] = {}
        for site in integer_sites(gm.graph, target, {}):
            if site.is_layer:
                self._read[_read_node(site).name] = site
        self._rows: dict[str, list[torch.Tensor]] = {}

    def add(self, node: torch.fx.Node, value: Any) -> None:
        """Take in what a node of the graph, or of a copy, yields for one input."""
        if node.name in self._read:
            site = self._read[node.name]
            self._rows.setdefault(node.name, []).append(_means_by_row(site, _some_positions(site, value)))

    def found(self) -> dict[str, torch.Tensor]:
        """Return the means of what was taken in, f64[rows, channels] by node name."""
        return {name: torch.cat(rows) for name, rows in self._rows.items()}


def channel_means(gm: CapturedModule, target: Target, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """Return the means of what is read of each layer in the float graph, f64[rows, channels] by name."""
    means = ChannelMeans(gm, target)

    def note(node: torch.fx.Node, values: list[torch.Tensor]) -> list[torch.Tensor]:
        for value in values:
            means.add(node, value)
        return values

    run_by_node(gm, samples, note)
    return means.found()


def corrections(
    simulation: Simulation, samples: Sequence[Sample], means: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return what each bias lacks, f32[channels] by node name: a layer is corrected before the next one is run.

    Args:
        simulation: The integer graph.
        samples: What it runs on.
        means: Those of the float graph on the same; see :func:`channel_means`.
    """
    shifts: dict[str, torch.Tensor] = {}

    def correct(site: Site, results: Callable[[], list[torch.Tensor]]) -> torch.Tensor | None:
        if not site.is_layer:
            return None
        shifts[site.node.name] = _lacking(site, results(), means).float()
        return shifts[site.node.name]

    simulation.run(samples, correct)
    return shifts


def shift_biases(rw: Rewriter, simulation: Simulation, shifts: Mapping[str, torch.Tensor]) -> None:
    """Add the shifts to the biases of the layers."""
    for site in simulation.layout.sites.values():
        if site.node.name in shifts:
            _shift_bias(rw, site, shifts[site.node.name])


def rectifiers_behind(site: Site) -> list[torch.fx.Node]:
    """Return the calls of the rectifiers that alone read what a layer yields, one rectifier behind the other."""
    found: list[torch.fx.Node] = []
    while behind := _rectifier_behind(found[-1] if found else site.node):
        found += behind
    return found


def _rectifier_behind(node: torch.fx.Node) -> list[torch.fx.Node]:
    """Return the one call, or the two of a gate, ``y * sigmoid(y)``, that alone read a node; empty if others do."""
    readers = list(node.users)
    if len(readers) == 1 and readers[0].target in _RECTIFIERS:
        return readers if all(other.op == "get_attr" for other in readers[0].all_input_nodes[1:]) else []
    if len(readers) == 2 and readers[0].target in _GATES:
        gate, product = readers
        if product.target is aten.mul.Tensor and [*gate.users] == [product] and {*product.args} == {node, gate}:
            return [gate, product]
    return []


def _lacking(site: Site, values: Sequence[torch.Tensor], means: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return what to add to the bias of a layer that yields ``values`` of all samples, f64[channels]."""
    rectifiers, some = rectifiers_behind(site), [_some_positions(site, value) for value in values]

    def read(shift: torch.Tensor | None = None) -> torch.Tensor:
        """Return the means of what is read of the layer, f64[rows, channels]."""
        moved = some
        if shift is not None:
            beside = along_channels(site, shift.to(some[0].dtype), some[0])
            moved = [value + beside for value in some]
        return _by_row(site, (_applied(rectifiers, site.node, value) for value in moved))

    before, wanted = read(), means.get(_read_node(site).name)
    if wanted is None or not len(wanted) or len(wanted) != len(before):
        # Where values decide which rows a layer gets, noise decides it too: they cannot be compared one by one.
        return before.new_zeros(before.shape[1])
    errors = wanted - before
    if not rectifiers:
        return _beyond_chance(errors)
    error = errors.mean(0)
    step = error.abs().maximum(_standard_error(errors))
    slope = (read(step) - before).mean(0) / step
    shift = torch.where(slope > _LEAST_SLOPE, _beyond_chance(errors) / slope, 0.0)  # a step of 0 has no slope
    left = error - (read(shift) - before).mean(0)
    return torch.where(left.abs() < error.abs(), shift, 0.0)  # where the slope changes, a step may go too far


def _read_node(site: Site) -> torch.fx.Node:
    """Return what is read of a layer: itself, or the last rectifier behind it."""
    return next(reversed(rectifiers_behind(site)), site.node)


def _some_positions(site: Site, value: torch.Tensor) -> torch.Tensor:
    """Return what tells how a mean changes: all rows and channels, but of many positions in a row only some."""
    axes = [axis for axis in range(1, value.ndim) if axis != site.channel_axis % value.ndim]
    return evenly_spread(value, axes, _POSITIONS)


def _applied(calls: Sequence[torch.fx.Node], node: torch.fx.Node, value: torch.Tensor) -> torch.Tensor:
    """Return what calls behind a node, one after the other, make of a value of it."""
    values = {node: value}

    def known(read: torch.fx.Node) -> torch.Tensor:
        return values[read] if read in values else constant_of(read)

    for call in calls:
        args, kwargs = torch.fx.node.map_arg((call.args, call.kwargs), known)
        values[call] = call.target(*args, **kwargs)  # type: ignore[operator]  # of a call_function
    return values[calls[-1]] if calls else value


def _by_row(site: Site, values: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.cat([_means_by_row(site, value) for value in values])


def _means_by_row(site: Site, value: torch.Tensor) -> torch.Tensor:
    """Return the mean of each channel for each row, f64[rows, channels]; of what has no rows, as one.

    Means of one row are of 32 bits, which are close enough, and take a twentieth of the time.
    """
    axis = site.channel_axis % value.ndim
    rows = value if axis > 0 else value[None]
    others = [other for other in range(1, rows.ndim) if other != axis + (rows.ndim - value.ndim)]
    return (rows.mean(others) if others else rows).double()


def _beyond_chance(errors: torch.Tensor) -> torch.Tensor:
    """Return the mean of errors f64[rows, channels], less the part of it that their spread explains."""
    mean = errors.mean(0)
    explained = (_standard_error(errors) / mean).square()
    return torch.where(explained < 1, mean * (1 - explained), 0.0)  # NaN, of errors of 0, explains all


def _standard_error(errors: torch.Tensor) -> torch.Tensor:
    """Return that of the mean of errors f64[rows, channels]; 0 of one row, of which it is not known."""
    rows = len(errors)
    return errors.std(0) / rows**0.5 if rows > 1 else torch.zeros_like(errors[0])


def _shift_bias(rw: Rewriter, site: Site, shift: torch.Tensor) -> None:
    if not bool(shift.isfinite().all()) or not bool(shift.any()) or site.kernel.bias is None:
        return
    held: Any = arg(site.node, site.kernel.bias)
    why = f"the mean of its channels moved by up to {float(shift.abs().max()):.3g}"
    if held is None:
        rw.set_arg(site.node, site.kernel.bias, rw.constant(f"{site.node.name}_bias", shift, near=site.node), why=why)
    elif rw.readers(str(held.target), held.graph) > 1 or len(held.users) > 1:
        rw.skip(site.node, f"its bias {held.target} is read by others too")
    else:
        rw.set_tensor(held, rw.tensor(held).detach() + shift, why=why)
