"""Compute a few channels that dwarf all others in floats, beside the integer product of the rest.

    before:  y = linear(x, w, b)
    after:   y = linear(x, w0, b) + linear(x[..., [7, 9]], w[:, [7, 9]])       w0: w, 0 in channels 7 and 9

In transformers one or two channels of an activation are often ten times as large as the others, at a few tokens, and
there they decide what the layers behind compute. One scale for all of the activation gives the others no bits, and
neither the weights nor the values of the large ones can be rounded. The channels that are left out have no weight in
the integer product any more, and calibration does not count them, so that they may saturate.

The same function of real numbers. A channel is taken out if that makes the range of the activation less than half.

Source: Dettmers, Lewis, Belkada, Zettlemoyer: LLM.int8(), NeurIPS 2022, section 3 (mixed-precision decomposition).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import torch

from fxopt.args import arg, shape
from fxopt.calibration_data import calibration_of
from fxopt.contracts import Contract
from fxopt.graph_module import CapturedModule
from fxopt.passes.quantize.calibrate import calibrate
from fxopt.passes.quantize.observations import ObservingPass
from fxopt.passes.quantize.placement import Site, integer_sites
from fxopt.passes.quantize.target import GENERIC
from fxopt.rewriter import Rewriter

__all__ = ["SplitOutliers", "inputs_of_wide_layers", "outlier_channels"]

aten = torch.ops.aten

_WIDE = 64  # channels
_POINTWISE = {
    aten.gelu.default, aten.relu.default, aten.silu.default, aten.tanh.default, aten.sigmoid.default,
    aten.hardswish.default, aten.elu.default, aten.leaky_relu.default,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class SplitOutliers(ObservingPass):
    """Take the channels that dwarf all others out of the integer products of linear layers.

    Attributes:
        most: How many channels of an activation may be taken out.
        ratio: By how much the range of the activation must shrink.
        seen: See :class:`ObservingPass`; of use is what has extremes by channel.
    """

    name: ClassVar[str] = "split-outliers"
    contract: ClassVar[Contract] = Contract.ROUNDING
    needs: ClassVar[frozenset[str]] = frozenset({"no-qdq"})
    evaluation_only: ClassVar[bool] = True
    most: int = 2
    ratio: float = 2.0

    def __post_init__(self) -> None:
        """Check the options."""
        if self.most < 1:
            raise ValueError(f"most is {self.most}; wanted 1 or more")
        if not self.ratio > 1:
            raise ValueError(f"ratio is {self.ratio}; wanted above 1")

    def run(self, rw: Rewriter) -> None:
        """Run on the outer graph.

        Raises:
            CalibrationError: the calibration data do not fit.
        """
        sites = [site for site in _wide_layers(rw.gm) if not _is_shared(rw, site)]
        names = sorted({site.operands[0].name for site in sites})
        if not names:
            return
        sketches = self.seen.by_channel(names)
        if left := [name for name in names if name not in sketches]:
            sketches |= calibrate(rw.gm, left, calibration_of(rw.gm), channels=dict.fromkeys(left, -1))
        for site in sites:
            seen = sketches[site.operands[0].name]
            if not seen.count:
                rw.skip(site.node, "no calibration input reaches it")
                continue
            largest = seen.channel_largest
            assert site.weight is not None  # _wide_layers() asked for one
            used = rw.tensor(site.weight).detach().any(0)
            chosen = outlier_channels(torch.where(used, largest, 0.0), self.most, self.ratio)
            if chosen:
                _split(rw, site, chosen, f"channels {chosen} reach {float(largest.max()):.3g}, and the others do not")


def outlier_channels(largest: torch.Tensor, most: int, ratio: float) -> list[int]:
    """Return the fewest channels, at most ``most``, without which the range is the smallest that they can make it.

    None if it does not become smaller by ``ratio``. A channel counts only if it makes the range a tenth smaller.

    Args:
        largest: The largest magnitude of each channel, f32[channels].
        most: How many channels may be returned.
        ratio: Above 1.
    """
    order = largest.argsort(descending=True)[: most + 1]
    if len(order) < 2:
        return []
    ranges = largest[order].double()
    count = 0
    for tried in range(1, len(order)):
        if float(ranges[tried]) < 0.9 * float(ranges[count]):
            count = tried
    if count == 0 or float(ranges[0]) < ratio * float(ranges[count]):
        return []
    return sorted(order[:count].tolist())


def inputs_of_wide_layers(gm: CapturedModule) -> set[str]:
    """Return the values whose extremes by channel the pass asks for, by name."""
    return {site.operands[0].name for site in _wide_layers(gm)}


def _wide_layers(gm: CapturedModule) -> Iterator[Site]:
    """Yield the linear layers of many inputs: a small product has little to lose or to gain."""
    for site in integer_sites(gm.graph, GENERIC, {}):
        if site.node.target is aten.linear.default and site.weight is not None:
            channels = shape(site.operands[0])[-1]
            if isinstance(channels, int) and channels >= _WIDE:
                yield site


def _is_shared(rw: Rewriter, site: Site) -> bool:
    assert site.weight is not None  # _wide_layers() asked for one
    return len(site.weight.users) > 1 or rw.readers(str(site.weight.target), site.weight.graph) > 1


def _split(rw: Rewriter, site: Site, channels: list[int], why: str) -> None:
    node, x, weight = site.node, site.operands[0], site.weight
    assert weight is not None  # _wide_layers() asked for one
    held = rw.tensor(weight).detach()
    rest = held.clone()
    rest[:, channels] = 0
    taken, columns = _taken(rw, site, channels, why), held[:, channels]
    if len(channels) == 1:
        column = rw.constant(f"{weight.target}_channel_{channels[0]}", columns[:, 0].contiguous(), near=node)
        product = rw.insert_call(aten.mul.Tensor, (taken, column), before=node, why=why)
    else:  # too few products for integers to gain anything: no target quantizes it
        several = rw.constant(f"{weight.target}_channels", columns.contiguous(), near=node)
        product = rw.insert_call(aten.linear.default, (taken, several), before=node, why=why)
    rw.set_tensor(weight, rest, why=why)
    total = rw.insert_call(aten.linear.default, (x, weight, arg(node, "bias")), before=node, why=why, sources=[node])
    rw.replace_call(node, aten.add.Tensor, (total, product), why=why)


def _taken(rw: Rewriter, site: Site, channels: list[int], why: str) -> torch.fx.Node:
    """Return some channels of the activation, f32[..., channels], computed in floats from where floats are.

    Hidden units between two linear layers are computed anew from the input of the first: what its integer product
    yields carries that product's noise, which the second layer would multiply like the channels themselves.
    """
    node, x = site.node, site.operands[0]
    hidden = x.args[0] if x.target in _POINTWISE else None
    if isinstance(hidden, torch.fx.Node) and _is_own_layer(hidden):
        units = [_unit(rw, hidden, channel, node, why) for channel in channels]
        together = units[0] if len(units) == 1 else rw.insert_call(aten.cat.default, (units, -1), before=node, why=why)
        return rw.insert_call(x.target, (together, *x.args[1:]), x.kwargs, before=node, why=why, sources=[x])
    if len(channels) == 1:
        span = channels[0], channels[0] + 1
        return rw.insert_call(aten.slice.Tensor, (x, -1, *span), before=node, why=why, sources=[x])
    places = rw.constant(f"{x.name}_channels", torch.tensor(channels), near=node)
    return rw.insert_call(aten.index_select.default, (x, -1, places), before=node, why=why, sources=[x])


def _is_own_layer(hidden: torch.fx.Node) -> bool:
    """Return whether a value is the result of a linear layer of constants, which nothing else reads."""
    if hidden.target is not aten.linear.default or len(hidden.users) > 1:
        return False
    constants = (arg(hidden, "weight"), arg(hidden, "bias"))
    return all(held is None or held.op == "get_attr" for held in constants)


def _unit(rw: Rewriter, hidden: torch.fx.Node, channel: int, node: torch.fx.Node, why: str) -> torch.fx.Node:
    """Return one channel of a linear layer's result, f32[..., 1], as a sum of floats in front of ``node``."""
    z, weight, bias = (arg(hidden, name) for name in ("input", "weight", "bias"))
    row = rw.constant(f"{weight.target}_row_{channel}", rw.tensor(weight).detach()[channel].clone(), near=node)
    unit = rw.insert_call(aten.mul.Tensor, (z, row), before=node, why=why, sources=[hidden])
    unit = rw.insert_call(aten.sum.dim_IntList, (unit, [-1], True), before=node, why=why, sources=[hidden])
    if bias is None:
        return unit
    shift = rw.constant(f"{bias.target}_{channel}", rw.tensor(bias).detach()[channel].clone(), near=node)
    return rw.insert_call(aten.add.Tensor, (unit, shift), before=node, why=why, sources=[hidden])
