"""Operators that compute every element on its own: one rule for all that carry torch's tag for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fxopt.args import arg, tensor_arg
from fxopt.args import dtype as dtype_of
from fxopt.ops import SELECT_MODE
from fxopt.passes.prune.constants import Constants
from fxopt.passes.prune.rules.base import Rule, handles
from fxopt.passes.prune.structure import Structure
from fxopt.training_ops import FAKE_QUANTIZE_BIAS, LEARNED_SCALE, NORM_BIAS

__all__: list[str] = []

aten = torch.ops.aten
# Factors: one that is 0 makes the result 0, whatever the others are; they are taken to be finite.
_FACTORS: dict[Any, tuple[str, ...]] = {
    aten.mul.Tensor: ("self", "other"), aten.mul.Scalar: ("self",), aten.div.Tensor: ("self",),
    aten.multiply.Tensor: ("self", "other"), aten.divide.Tensor: ("self",), aten.div.Scalar: ("self",),
    aten.div.Tensor_mode: ("self",), aten.div.Scalar_mode: ("self",),
}  # fmt: skip
# The result is an element of one of these.
_CHOICES: dict[Any, tuple[str, ...]] = {
    SELECT_MODE: ("eval",), aten.where.self: ("self", "other"), aten.where.ScalarSelf: ("self", "other"),
    aten.where.ScalarOther: ("self", "other"), aten.where.Scalar: ("self", "other"),
    aten.masked_fill.Scalar: ("self", "value"), aten.masked_fill.Tensor: ("self", "value"),
    aten.copy.default: ("src",), aten.fill.Scalar: ("value",),
    aten.zeros_like.default: (), aten.ones_like.default: (), aten.full_like.default: ("fill_value",),
    aten.contiguous.default: ("self",), aten.clone.default: ("self",), aten.alias.default: ("self",),
    aten.detach.default: ("self",), aten.lift_fresh_copy.default: ("self",), aten.lift_fresh.default: ("self",),
    aten.to.dtype: ("self",), aten.to.dtype_layout: ("self",), aten.to.device: ("self",), aten.to.other: ("self",),
    aten.type_as.default: ("self",), aten._to_copy.default: ("self",),
}  # fmt: skip
_NUMBERS: dict[Any, float] = {aten.zeros_like.default: 0.0, aten.ones_like.default: 1.0}
_TYPE_ONLY = (aten.to.other, aten.type_as.default)  # the second tensor lends its type, whatever its sizes are
_DROPOUTS = (
    aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default, aten.rrelu.default,
)  # fmt: skip
_RANDOM = (
    aten.bernoulli.default, aten.bernoulli.p, aten.rand_like.default, aten.randn_like.default,
    aten.randint_like.default, aten.randint_like.low_dtype, aten.normal_functional.default, aten.poisson.default,
)  # fmt: skip
_UNTAGGED = (
    aten.hardswish.default, aten.log_sigmoid.default, aten.absolute.default, aten.negative.default,
    aten.subtract.Tensor, aten.floor_divide.default,
    aten.floor_divide.Scalar, aten.float_power.Tensor_Scalar, aten.float_power.Tensor_Tensor,
    aten.special_expit.default, aten.square.default, aten.empty_like.default,
    LEARNED_SCALE, FAKE_QUANTIZE_BIAS, NORM_BIAS,
)  # fmt: skip


@handles("pointwise", *_CHOICES, *_FACTORS, *_UNTAGGED)
class _Pointwise(Rule):
    """Indices of all operands are those of the result, as they are broadcast."""

    def relate(self, node: torch.fx.Node, structure: Structure) -> None:
        if not isinstance(structure.value(node), torch.Tensor):
            structure.pin_all(node, f"{node.target} yields several values")
            return
        rank = structure.rank(node)
        sources = [tensor_arg(node, "self")] if node.target in _TYPE_ONLY else node.all_input_nodes
        for source in sources:
            behind = rank - structure.rank(source)
            for dim in range(structure.rank(source)):
                if not structure.is_one(source, dim):
                    structure.same(structure.axis(source, dim), structure.axis(node, dim + behind))

    def constants(self, node: torch.fx.Node, constants: Constants) -> None:
        for dim, axis in enumerate(constants.structure.axes(node)):
            if axis is not None:
                constants.values[axis] = _along(node, dim, len(axis), constants)


@handles(*_DROPOUTS)
class _Dropout(_Pointwise):
    """In evaluation it hands its input on; where it draws numbers, others would be drawn for fewer elements."""

    def relate(self, node: torch.fx.Node, structure: Structure) -> None:
        if self._draws(node):
            structure.pin_all(node, f"{node.target} is random")
        else:
            super().relate(node, structure)

    def constants(self, node: torch.fx.Node, constants: Constants) -> None:
        """What goes in comes out; zeros alone stay what they are where slopes are drawn while training."""
        if self._draws(node):
            return
        axes = zip(constants.structure.axes(node.all_input_nodes[0]), constants.structure.axes(node), strict=True)
        for axis, to in axes:
            if axis is not None and to is not None:
                values = constants.values[axis]
                constants.values[to] = (
                    np.where(values == 0, 0.0, np.nan) if node.target is aten.rrelu.default else values
                )

    @staticmethod
    def _draws(node: torch.fx.Node) -> bool:
        """Return whether it is random in evaluation."""
        name = "training" if node.target is aten.rrelu.default else "train"
        modes = node.meta.get("modes", {})
        return bool(modes[name][1] if name in modes else arg(node, name))


@handles(*_RANDOM)
class _Random(Rule):
    """Numbers are drawn: for fewer elements, they would be others."""

    def relate(self, node: torch.fx.Node, structure: Structure) -> None:
        structure.pin_all(node, f"{node.target} is random")


@handles(aten.prelu.default)
class _PRelu(Rule):
    """As other activations; the slope is one number, or one for each channel, which is the second axis."""

    def relate(self, node: torch.fx.Node, structure: Structure) -> None:
        for axis, to in zip(structure.axes(tensor_arg(node, "self")), structure.axes(node), strict=True):
            structure.same(axis, to)
        for slopes in structure.axes(tensor_arg(node, "weight")):
            if slopes is not None:
                structure.same(slopes, structure.axis(node, 1))

    def constants(self, node: torch.fx.Node, constants: Constants) -> None:
        source, weight = tensor_arg(node, "self"), tensor_arg(node, "weight")
        for dim, axis in enumerate(constants.structure.axes(node)):
            if axis is not None:
                values = constants.along(source, dim - constants.structure.rank(source), len(axis))
                one = constants.everywhere(weight)
                slopes = constants.along(weight, -1, len(axis)) if dim == 1 else np.full(len(axis), one)
                constants.values[axis] = np.where(values >= 0, values, values * slopes)


def _along(node: torch.fx.Node, dim: int, size: int, constants: Constants) -> np.ndarray:
    """Return the constants along one axis of the result, f64[size], NaN where there is none."""
    behind = dim - constants.structure.rank(node)

    def along(value: Any) -> np.ndarray:
        if isinstance(value, torch.fx.Node) and isinstance(value.meta.get("val"), torch.Tensor):
            return constants.along(value, behind, size)
        return np.full(size, float(value) if isinstance(value, bool | int | float) else np.nan)

    if node.target in _NUMBERS:
        return np.full(size, _NUMBERS[node.target])
    if node.target in _CHOICES:
        rows = np.stack([along(arg(node, name)) for name in _CHOICES[node.target]])
        found = np.where((rows == rows[0]).all(axis=0), rows[0], np.nan)
        return _converted(found, dtype_of(node))
    found = _evaluated(node, {source: along(source) for source in node.all_input_nodes}, size)
    for name in _FACTORS.get(node.target, ()):
        found[along(arg(node, name)) == 0] = 0.0
    return found


def _evaluated(node: torch.fx.Node, vectors: dict[torch.fx.Node, np.ndarray], size: int) -> np.ndarray:
    """Return what the operator yields for constants, in its own element types, f64[size]; NaN where one is missing."""
    found = np.full(size, np.nan)
    known = np.logical_and.reduce([~np.isnan(vector) for vector in vectors.values()], initial=bool(vectors))
    known = np.broadcast_to(known, (size,))
    if node.target is aten.empty_like.default or not known.any():
        return found

    def read(source: torch.fx.Node) -> torch.Tensor:
        return torch.from_numpy(vectors[source][known]).to(dtype_of(source))

    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), read)
    try:
        result: torch.Tensor = node.target(*args, **kwargs)  # type: ignore[operator]  # an operator
    except NotImplementedError:  # the CPU has no kernel for this element type
        return found
    if not result.is_complex():
        found[known] = result.to(dtype_of(node)).double().numpy()
    return found


def _converted(values: np.ndarray, to: torch.dtype) -> np.ndarray:
    """Return numbers as an element type holds them, f64; NaN stays NaN."""
    found = np.full(len(values), np.nan)
    known = ~np.isnan(values)
    if not to.is_complex:
        found[known] = torch.from_numpy(values[known]).to(to).double().numpy()
    return found
