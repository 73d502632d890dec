"""Fill in the scales of a plan: activations from what calibration saw, weights from what they hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fxopt.args import source_line
from fxopt.attributes import get_path, owner_of
from fxopt.calibration_data import calibration_of
from fxopt.errors import PassError, describe
from fxopt.graph_module import CapturedModule
from fxopt.passes.quantize.calibrate import Progress, calibrate
from fxopt.passes.quantize.layout import bias_of, input_of
from fxopt.passes.quantize.placement import Site, all_sites, integer_sites
from fxopt.passes.quantize.ranges import RangeMethod, choose_range, qparams
from fxopt.passes.quantize.saturation import avoid_saturation
from fxopt.passes.quantize.sketch import ValueSketch
from fxopt.passes.quantize.spec import QuantPlan, QuantSpec
from fxopt.passes.quantize.target import Target
from fxopt.passes.quantize.weights import channel_scales, constant_of, scales_for_bias
from fxopt.passes.quantize.window_scales import Moments, searched_scales

__all__ = [
    "WeightScales", "open_activations", "resolve", "resolve_activations", "resolve_weights", "resolve_with",
    "used_channels",
]  # fmt: skip


def resolve(
    gm: CapturedModule,
    plan: QuantPlan,
    target: Target,
    methods: Sequence[RangeMethod | str],
    *,
    progress: Progress | None = None,
    checkpoint: str | None = None,
    no_saturation: bool = True,
) -> list[QuantPlan]:
    """Return the plan with all scales, once for each range method; those that it has already stay.

    Args:
        gm: The prepared graph that the plan is for, in eval mode, with its calibration inputs.
        plan: What to quantize.
        target: The runtime.
        methods: How to choose a range from what was seen; see :func:`choose_range`.
        progress: Called with the number of inputs that were run, and how many there are if that is known.
        checkpoint: Where to keep what was seen, to go on after a crash.
        no_saturation: Choose weight scales with which 16-bit sums of two products cannot overflow.

    Raises:
        CalibrationError: the data are empty, do not fit, or hold NaN.
    """
    sketches: Mapping[str, ValueSketch] = {}
    if names := open_activations(plan):
        only = used_channels(gm, plan, target)
        sketches = calibrate(gm, names, calibration_of(gm), only=only, progress=progress, checkpoint=checkpoint)
    return resolve_with(gm, plan, target, sketches, methods, WeightScales(no_saturation=no_saturation))


def resolve_with(
    gm: CapturedModule,
    plan: QuantPlan,
    target: Target,
    sketches: Mapping[str, ValueSketch],
    methods: Sequence[RangeMethod | str],
    scales: WeightScales,
    moments: Mapping[str, Moments] | None = None,
) -> list[QuantPlan]:
    """Return the plan with all scales, once for each range method; those that it has already stay.

    Args:
        gm: The prepared graph that the plan is for.
        plan: What to quantize.
        target: The runtime.
        sketches: What was seen of the activations that are open.
        methods: How to choose a range from that.
        scales: Of the weights.
        moments: Of what weights are multiplied by, by the name of the layer; their steps are searched.
    """
    plans = (resolve_activations(plan, sketches, method) for method in methods)
    return [resolve_weights(gm, found, target, scales, moments) for found in plans]


def open_activations(plan: QuantPlan) -> list[str]:
    """Return the activations of a plan that have no scale yet."""
    return [name for name, spec in plan.items() if spec.role == "activation" and not spec.resolved]


class WeightScales:
    """Scales of weights by channel, each computed once however often it is asked for.

    Args:
        no_saturation: Choose scales with which 16-bit sums of two products cannot overflow.
    """

    def __init__(self, *, no_saturation: bool) -> None:
        self.no_saturation = no_saturation
        self._known: dict[tuple[Any, ...], tuple[Any, tuple[float, ...]]] = {}

    def of(self, site: Site, spec: QuantSpec, moments: Moments | None = None) -> tuple[float, ...]:
        """Return the scales of the weight of a layer; with moments of what it is multiplied by, those that fit it best.

        Raises:
            ValueError: the weight holds NaN or infinity.
        """
        assert site.weight is not None  # who asks has found one
        held = get_path(owner_of(site.weight), str(site.weight.target))
        key = id(held), held._version, spec, site.groups
        if key not in self._known:  # which keeps the tensor, for no other to have its id
            self._known[key] = held, self._computed(constant_of(site.weight), spec, site.groups)
        scale = self._known[key][1]
        if moments is None or spec.axis is None:
            return scale
        if (*key, id(moments)) not in self._known:
            found = searched_scales(constant_of(site.weight), spec, scale, moments)
            self._known[*key, id(moments)] = (held, moments), found
        return self._known[*key, id(moments)][1]

    def _computed(self, weight: torch.Tensor, spec: QuantSpec, groups: int) -> tuple[float, ...]:
        scale = channel_scales(weight, spec)
        if self.no_saturation and spec.bits == 8 and spec.axis is not None:
            return avoid_saturation(weight, scale, spec.axis, groups=groups)
        return scale


def resolve_activations(plan: QuantPlan, sketches: Mapping[str, ValueSketch], method: RangeMethod | str) -> QuantPlan:
    """Return the plan with scales for the activations that were seen; those that were not are left out, with a note."""
    held: dict[str, QuantSpec] = {spec.group: spec for spec in plan.values() if spec.group and spec.resolved}
    seen: dict[str, ValueSketch] = {}
    for name in open_activations(plan):
        key, sketch = plan[name].group or name, sketches.get(name)
        if sketch is not None and sketch.count:
            if key not in seen:
                seen[key] = sketch.without_channels() if plan[name].group else sketch
            else:
                seen[key].merge(sketch.without_channels())
    specs: dict[str, QuantSpec] = {}
    unseen: dict[str, str] = {}
    for name, spec in plan.items():
        key = spec.group or name
        if spec.role == "weight" or spec.resolved:
            specs[name] = spec
        elif spec.group in held:
            same = held[spec.group]
            specs[name] = dataclasses.replace(spec, scale=same.scale, zero_point=same.zero_point)
        elif key in seen:
            bits, signed, symmetric = spec.bits, spec.signed, spec.symmetric
            low, high = choose_range(seen[key], method, bits=bits, signed=signed, symmetric=symmetric)
            scale, zero_point = qparams(low, high, bits=bits, signed=signed, symmetric=symmetric)
            specs[name] = dataclasses.replace(spec, scale=(scale,), zero_point=(zero_point,))
        else:
            unseen[name] = "no calibration input reaches it"
    return QuantPlan(specs, {**plan.notes, **unseen})


def resolve_weights(
    gm: CapturedModule,
    plan: QuantPlan,
    target: Target,
    scales: WeightScales,
    moments: Mapping[str, Moments] | None = None,
) -> QuantPlan:
    """Return the plan with scales for the weights, large enough for the biases beside them.

    Raises:
        PassError: a weight holds NaN or infinity, or its spec is not symmetric.
    """
    seen = moments or {}
    for prefix, site in all_sites(gm, target):
        name = None if site.weight is None else prefix + site.weight.name
        if name is not None and name in plan:
            plan = _with_weight(plan, site, name, prefix, scales, seen.get(prefix + site.node.name))
    return plan


def _with_weight(
    plan: QuantPlan, site: Site, name: str, prefix: str, scales: WeightScales, moments: Moments | None
) -> QuantPlan:
    spec = plan[name]
    if not spec.symmetric:
        raise PassError(
            describe(
                f"the weight {name!r} has an affine spec",
                got=str(spec),
                wanted="symmetric=True: integer kernels take a weight's zero point to be 0",
            )
        )
    if not spec.resolved:
        try:
            scale = scales.of(site, spec, moments)
        except ValueError as error:
            raise PassError(describe(f"{name}: {error}", source=source_line(site.node))) from error
        spec = dataclasses.replace(spec, scale=scale, zero_point=(0,) * len(scale))
    held = bias_of(site)
    inputs = None if held is None else plan.get(prefix + input_of(site).name)
    if held is not None and inputs is not None and inputs.resolved and spec.axis is not None:
        spec = dataclasses.replace(spec, scale=scales_for_bias(spec.scale, constant_of(held), inputs.scale[0]))
    return plan.with_specs({name: spec})


def used_channels(gm: CapturedModule, plan: QuantPlan, target: Target) -> dict[str, torch.Tensor]:
    """Return for values which of their channels any weight multiplies by something else than 0, bool[channels].

    Values are left out where all channels count, or where something else than linear layers reads their integers. The
    channels that do not count may saturate.
    """
    readers: dict[torch.fx.Node, list[Site]] = {}
    for site in integer_sites(gm.graph, target, {}):
        for value in site.operands:
            readers.setdefault(value, []).append(site)
    found: dict[str, torch.Tensor] = {}
    for value, sites in readers.items():
        spec = plan.get(value.name)
        if spec is None or spec.resolved or spec.group:
            continue
        weights = [site.weight for site in sites if site.node.target is torch.ops.aten.linear.default]
        if len(weights) == len(sites) and None not in weights and value not in weights:
            used = torch.stack([constant_of(weight).any(0) for weight in weights if weight is not None]).any(0)
            if not bool(used.all()) and bool(used.any()):
                found[value.name] = used
    return found
