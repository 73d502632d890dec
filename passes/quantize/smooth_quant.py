"""Move the outliers of activations into the weights that they are multiplied by: SmoothQuant.

    before:  y = layer_norm(x, g, b);  q = linear(y, w1);  k = linear(y, w2)
    after:   y = layer_norm(x, g / s, b / s);  q = linear(y, w1 s);  k = linear(y, w2 s)

        s = max|y|^alpha / max|w|^(1 - alpha)       for each channel of y; max|w| over all weights that read it

One scale serves a whole activation, so a few channels that are much larger than the others take the bits of all.
Weights have scales by output channel, and room. In real numbers both sides are the same function.

Where something else reads ``y`` too, as the residual sum behind a norm does in BERT, ``insert_mul=True`` multiplies by
``1 / s`` in front of the linears alone, which costs a multiplication of floats. Chains of layers with at most a relu
between them are the part of ``equalize-channels``.

One alpha for all channels changes the many that are alike for the sake of the few that are not. The search therefore
tries another family of factors as well, ``s = max(1, max|y| / t)``: only channels above a limit ``t`` are brought down
to it. Errors are measured token by token, relative to the token: what a norm behind makes of a token does not depend on
how large others are. Channels ten times as large as all others are better split off first (``split-outliers``).

Source: Xiao, Lin, Seznec, Wu, Demouth, Han: SmoothQuant, Accurate and Efficient Post-Training Quantization for Large
Language Models, ICML 2023, equation 4.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch

from fxopt.args import arg, shape
from fxopt.calibration_data import calibration_of
from fxopt.contracts import Contract
from fxopt.graph_module import CapturedModule
from fxopt.passes.quantize.calibrate import calibrate
from fxopt.passes.quantize.insert_qdq import refuse_quantized
from fxopt.passes.quantize.integer_products import IntegerInput, matrix_product
from fxopt.passes.quantize.observations import DrawnRows, Observations, ObservingPass
from fxopt.passes.quantize.placement import Site, integer_sites
from fxopt.passes.quantize.ranges import RangeMethod, choose_range, qparams
from fxopt.passes.quantize.sketch import ValueSketch
from fxopt.passes.quantize.spec import QuantSpec
from fxopt.passes.quantize.target import GENERIC
from fxopt.passes.quantize.weights import channel_scales, weight_integers
from fxopt.rewriter import Rewriter

__all__ = ["ALPHAS", "SmoothQuant", "capped_factors", "product_errors", "smoothing_factors", "values_to_smooth"]

aten = torch.ops.aten

ALPHAS = 0.3, 0.4, 0.5, 0.6, 0.7, 0.8
"""What ``alpha=None`` tries."""

_LINEAR = {aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default}
_GAIN = 0.95  # what is left of the error of a group, at most, for a search to change it
_SAME = 1e-3  # factors this close to one another change nothing
_COARSE, _FINALISTS = 128, 3  # rows, and outputs of a layer, that it measures all factors on; how many it does on all


@dataclasses.dataclass(frozen=True)
class SmoothQuant(ObservingPass):
    """Divide the inputs of linears by a factor for each channel, and multiply their weights by it.

    Runs on the float graph, before a plan is made for it.

    Attributes:
        alpha: How much of the difference moves into the weights, 0 to 1; None chooses for each group the factors with
            the least error of its quantized products, and leaves it alone if that is not by a twentieth better.
        insert_mul: Multiply in front of the linears where the factor cannot be folded into the norm.
        method: How the range of an activation will be chosen; for the search.
        seen: See :class:`ObservingPass`; of use is what has extremes by channel and, for a search, rows.
    """

    name: ClassVar[str] = "smooth-quant"
    contract: ClassVar[Contract] = Contract.ROUNDING
    needs: ClassVar[frozenset[str]] = frozenset({"no-qdq"})
    evaluation_only: ClassVar[bool] = True
    alpha: float | None = 0.5
    insert_mul: bool = False
    method: str = "mse"

    def __post_init__(self) -> None:
        """Check the options."""
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}; wanted 0 to 1, or None to search")
        RangeMethod.of(self.method)

    def run(self, rw: Rewriter) -> None:
        """Run on the graph; branches and loops inside it are left alone.

        Raises:
            PassError: the graph is quantized already.
            CalibrationError: the calibration data do not fit.
        """
        refuse_quantized(rw, self.name)
        groups = {group.value: group for group in _groups(rw, self.insert_mul)}
        if not groups:
            return
        seen = self._observed(rw.gm, [value.name for value in groups])
        for value in rw.nodes_of(rw.gm):
            if value in groups:
                group, weights = groups[value], [_by_input(rw, site) for site in groups[value].readers]
                if not seen.sketches[value.name].count:
                    rw.skip(value, "no calibration input reaches it")
                    continue
                largest = seen.sketches[value.name].channel_largest.double()
                factor = self._factor(largest, weights, seen.rows.get(value.name))
                if factor is None:
                    rw.skip(value, "no alpha makes its products a twentieth better")
                elif not torch.allclose(factor, torch.ones_like(factor), rtol=0, atol=_SAME):
                    _apply(rw, group, weights, factor)

    def _observed(self, gm: CapturedModule, names: Sequence[str]) -> Observations:
        searches = self.alpha is None
        sketches, rows = self.seen.by_channel(names), dict(self.seen.rows) if searches else {}
        left = [name for name in names if name not in sketches or (searches and name not in rows)]
        if left:
            drawn = DrawnRows(left if searches else ())
            along = dict.fromkeys(left, -1)
            sketches |= calibrate(
                gm, left, calibration_of(gm), channels=along, watch=lambda _, node, value: drawn.add(node, value)
            )
            rows |= drawn.found()
        return Observations(sketches, rows)

    def _factor(
        self, largest: torch.Tensor, weights: Sequence[torch.Tensor], rows: torch.Tensor | None
    ) -> torch.Tensor | None:
        if rows is None:
            return smoothing_factors(largest, weights, 0.5 if self.alpha is None else self.alpha)
        trials = [smoothing_factors(largest, weights, alpha) for alpha in ALPHAS] + list(capped_factors(largest))
        if len(rows) > _COARSE:
            few, *some = (_spread(numbers, _COARSE) for numbers in (rows, *weights))
            coarse = product_errors(few, some, trials, self.method)
            trials = [trials[place] for place in sorted(range(len(trials)), key=coarse.__getitem__)[:_FINALISTS]]
        before, *errors = product_errors(rows, weights, [torch.ones_like(largest), *trials], self.method)
        best = min(range(len(trials)), key=errors.__getitem__)
        return trials[best] if errors[best] < _GAIN * before else None


@dataclasses.dataclass(frozen=True)
class _Group:
    """A value, the linears that read it, and the norm that makes it, if the factors can be folded into that."""

    value: torch.fx.Node
    readers: tuple[Site, ...]
    norm: torch.fx.Node | None


def values_to_smooth(gm: CapturedModule) -> set[str]:
    """Return the values of whose channels and rows the pass asks for, by name, and maybe some more."""
    return {
        node.name
        for node in gm.graph.nodes
        if node.target is aten.layer_norm.default and any(user.target in _LINEAR for user in node.users)
    }


def smoothing_factors(largest: torch.Tensor, weights: Sequence[torch.Tensor], alpha: float) -> torch.Tensor:
    """Return ``max|X|^alpha / max|W|^(1 - alpha)`` for each channel, f64[in]; equation 4 of the paper.

    Args:
        largest: Largest magnitude of each channel of the activations, f64[in].
        weights: The weights that read them, each [out, in].
        alpha: 0 to 1.

    A channel that is always 0, or that all weights multiply by 0, gets the factor 1.
    """
    columns = torch.stack([weight.double().abs().amax(0) for weight in weights]).amax(0)
    used = (largest > 0) & (columns > 0)
    one = torch.ones_like(columns)
    factor = torch.where(used, largest, one).pow(alpha) / torch.where(used, columns, one).pow(1 - alpha)
    return torch.where(used, factor, one)


def capped_factors(largest: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield factors that bring the channels above a limit down to it, f64[in], for ever lower limits.

    Args:
        largest: Largest magnitude of each channel of the activations, f64[in]. The limits are the 2nd, 3rd, 5th, 9th
            of them in size, and so on.
    """
    order = largest.sort(descending=True).values
    place = 1
    while place < len(order) // 2 and order[place] > 0:
        yield (largest / order[place]).clamp_min(1.0)
        place *= 2


def product_errors(
    rows: torch.Tensor, weights: Sequence[torch.Tensor], factors: Sequence[torch.Tensor], method: str = "mse"
) -> list[float]:
    """Return for each factor the squared error of the products of 8-bit integers relative to the products.

    It is the mean over the rows of the error of each, summed over the weights.

    Args:
        rows: Activations, f32[rows, in].
        weights: f32[out, in] each.
        factors: What the activations are divided and the weights multiplied by, f64[in] each.
        method: How the range of the activations is chosen.
    """
    exact = [rows @ weight.t() for weight in weights]
    powers = [products.square().sum(1).clamp_min(1e-30) for products in exact]
    found = []
    for factor in factors:
        inputs, integers = _quantized_rows(rows / factor.float(), method)
        total = 0.0
        for weight, products, power in zip(weights, exact, powers, strict=True):
            noise = matrix_product(integers, inputs, *_quantized_weight(weight * factor.float())).sub_(products)
            total += float((noise.square_().sum(1) / power).mean())
        found.append(total)
    return found


def _spread(rows: torch.Tensor, most: int) -> torch.Tensor:
    """Return rows from everywhere in a matrix, at most so many."""
    return rows[:: -(-len(rows) // most)]


def _quantized_rows(rows: torch.Tensor, method: str) -> tuple[IntegerInput, torch.Tensor]:
    sketch = ValueSketch()
    sketch.update(rows)
    low, high = choose_range(sketch, method, bits=8, signed=False, symmetric=False)
    inputs = IntegerInput(*qparams(low, high, bits=8, signed=False, symmetric=False), largest=255)
    return inputs, inputs.integers(rows)


def _quantized_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return i8[out, in], and the scales f32[out]."""
    spec = QuantSpec("weight", 8, signed=True, symmetric=True, axis=0)
    scales = channel_scales(weight, spec)
    resolved = dataclasses.replace(spec, scale=scales, zero_point=(0,) * len(scales))
    return weight_integers(weight, resolved), torch.tensor(scales)


def _groups(rw: Rewriter, insert_mul: bool) -> Iterator[_Group]:
    sites = {site.node: site for site in integer_sites(rw.gm.graph, GENERIC, {}) if site.node.target in _LINEAR}
    for value in rw.gm.graph.nodes:
        readers = [sites[user] for user in value.users if user in sites and _multiplies(sites[user], value)]
        if not readers or value.op == "get_attr":
            continue
        shared = next((site for site in readers if _is_shared(rw, site.weight)), None)
        others = [user for user in value.users if user not in {site.node for site in readers}]
        is_norm = value.target is aten.layer_norm.default
        obstacle = "it is no layer norm" if not is_norm else _obstacle(rw, value, others)
        if shared is not None:
            if is_norm:
                rw.skip(shared.node, "something else reads its weight too")
        elif obstacle is None:
            yield _Group(value, tuple(readers), value)
        elif is_norm and insert_mul:
            yield _Group(value, tuple(readers), None)
        elif is_norm:
            rw.skip(value, f"{obstacle}; insert_mul=True multiplies in front of its linears")


def _multiplies(site: Site, value: torch.fx.Node) -> bool:
    """Return whether the site is a product of the value, on the left, with a constant matrix."""
    return site.weight is not None and site.operands[0] is value and len(shape(site.weight)) == 2


def _obstacle(rw: Rewriter, norm: torch.fx.Node, others: Sequence[torch.fx.Node]) -> str | None:
    """Return why the factors cannot go into the weight of a layer norm, or None if they can."""
    if others:
        return f"{others[0].name} reads it too"
    gain, shift = arg(norm, "weight"), arg(norm, "bias")
    if gain is None or len(arg(norm, "normalized_shape")) != 1:
        return "it has no weight by channel"
    if any(node.op != "get_attr" or _is_shared(rw, node) for node in (gain, shift) if node is not None):
        return "its weight or bias is no constant of its own"
    return None


def _is_shared(rw: Rewriter, constant: torch.fx.Node | None) -> bool:
    assert constant is not None  # _multiplies() and _obstacle() ask about constants
    return len(constant.users) > 1 or rw.readers(str(constant.target), constant.graph) > 1


def _by_input(rw: Rewriter, site: Site) -> torch.Tensor:
    """Return the weight of a linear as f32[out, in]."""
    assert site.weight is not None  # _multiplies() asked for one
    weight = rw.tensor(site.weight).detach()
    return weight.t() if site.kernel.weight_axis == 1 else weight


def _apply(rw: Rewriter, group: _Group, weights: Sequence[torch.Tensor], factor: torch.Tensor) -> None:
    text = f"factors from {float(factor.min()):.3g} to {float(factor.max()):.3g}"
    if group.norm is not None:
        for name in ("weight", "bias"):
            held = arg(group.norm, name)
            if held is not None:
                smaller = (rw.tensor(held).detach().double() / factor).float()
                rw.set_tensor(held, smaller, why=f"channels divided by {text}")
    else:
        first = min((site.node for site in group.readers), key=list(group.value.graph.nodes).index)
        inverse = rw.constant(f"{group.value.name}_smoothing", (1 / factor).float(), near=first)
        even = rw.insert_call(
            aten.mul.Tensor,
            (group.value, inverse),
            before=first,
            why=f"channels divided by {text}",
            sources=[group.value],
        )
        for site in group.readers:
            rw.replace_argument(site.node, group.value, even, why=f"reads {group.value.name} with even channels")
    for site, weight in zip(group.readers, weights, strict=True):
        assert site.weight is not None  # _multiplies() asked for one
        larger = (weight.double() * factor).float()
        larger = larger.t().contiguous() if site.kernel.weight_axis == 1 else larger
        rw.set_tensor(site.weight, larger, why=f"columns multiplied by {text}")
