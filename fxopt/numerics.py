"""Measure errors, and say how large a rounding error may be.

No fixed tolerance fits every model, so none is used. The reference is the graph itself, run in float64; the rounding
error that the graph has in its own precision is the unit, and a rewrite may have ``factor`` times that much:

    bound = factor * max( max|y32 - y64| ,  4 eps max|y64| )        for each output y

The first term holds what the length of dot products and the depth of the graph cost on these very inputs; the second
keeps the bound above zero where the graph happens to be exact, eps being that of the type in which an output was
rounded, which may be stored in a wider one. Half of all digits is the most that counts as rounding. What is smaller
than the smallest normal number of float32 always does: subnormal numbers have few digits, and kernels may flush them to
0.
Error analysis of the same kind: Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxopt.contracts import METRICS, Contract
from fxopt.effects import is_random
from fxopt.graph_module import graph_modules
from fxopt.isolation import isolated
from fxopt.rounding_units import rounding_units

__all__ = [
    "FLOOR_EPS",
    "Errors",
    "Reference",
    "coarsest_eps",
    "largest_noise",
    "measure",
    "node_float64",
    "reference",
    "run_float64",
    "surely_rounding",
    "violation",
]

_SUBNORMAL = torch.finfo(torch.float32).tiny  # where they begin
FLOOR_EPS = 4.0
_WIDER = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
}


@dataclasses.dataclass(frozen=True)
class Errors:
    """How far one output is from what it should be.

    Attributes:
        max_abs: Largest ``|got - want|`` in the output's own unit; inf where just one of the two is NaN or infinite.
        max_rel: Largest ``|got - want| / |want|`` over the elements with ``|want|`` above a millionth of the largest.
        sqnr_db: Signal to quantization noise, ``10 log10(sum want^2 / sum (got - want)^2)``; inf if equal.
        cosine: Cosine of the angle between both, as vectors.
        top1_agreement: Share of rows (last axis) whose largest element is the same; 1 for outputs of rank 0.
        worst_flat: Flat index of the worst element.
        worst: Its index.
        mismatches: Number of elements that differ at all.
        size: Number of elements.
    """

    max_abs: float
    max_rel: float
    sqnr_db: float
    cosine: float
    top1_agreement: float
    worst_flat: int
    worst: tuple[int, ...]
    mismatches: int
    size: int


def measure(want: torch.Tensor, got: torch.Tensor) -> Errors:
    """Return how far ``got`` is from ``want``, computed in float64. Equal infinities and paired NaNs agree.

    Raises:
        ValueError: the shapes differ.
    """
    if want.shape != got.shape:
        raise ValueError(f"shapes differ: wanted {tuple(want.shape)}, got {tuple(got.shape)}")
    if want.numel() == 0:
        return Errors(0.0, 0.0, math.inf, 1.0, 1.0, 0, (), 0, 0)
    if torch.equal(want, got):
        return Errors(0.0, 0.0, math.inf, 1.0, 1.0, 0, (0,) * want.ndim, 0, want.numel())
    w, g = (_as_float64(t.detach().cpu()) for t in (want, got))
    same = (w == g) | (w.isnan() & g.isnan())
    error = torch.where(same, 0.0, (g - w).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
    worst = int(error.flatten().argmax())
    magnitude = w.abs().nan_to_num(nan=0.0, posinf=0.0)
    counted = magnitude > 1e-6 * magnitude.max()
    relative = torch.where(counted, error / magnitude.clamp_min(1e-300), 0.0)
    noise, signal = float(error.square().sum()), float(magnitude.square().sum())
    finite = same.logical_not() & error.isfinite() | same
    a, b = (torch.where(finite, t, 0.0).nan_to_num(posinf=0.0, neginf=0.0) for t in (w, g))
    norms = float(a.norm() * b.norm())
    return Errors(
        max_abs=float(error.flatten()[worst]),
        max_rel=float(relative.max()),
        sqnr_db=math.inf
        if noise == 0
        else -math.inf
        if signal == 0 or math.isinf(noise)
        else 10 * math.log10(signal / noise),
        cosine=float((a * b).sum()) / norms if norms > 0 else float(noise == 0),
        top1_agreement=_top1(w, g),
        worst_flat=worst,
        worst=tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), want.shape)),
        mismatches=int(same.logical_not().sum()),
        size=want.numel(),
    )


def _as_float64(tensor: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(tensor.to(torch.complex128)).flatten(-2) if tensor.is_complex() else tensor.double()


def _top1(want: torch.Tensor, got: torch.Tensor) -> float:
    if want.ndim == 0 or want.shape[-1] < 2:
        return 1.0
    # Ties are broken in favour of agreement: the element that was wanted must be among the largest that were got.
    chosen = got.gather(-1, want.argmax(-1, keepdim=True))
    return float((chosen >= got.amax(-1, keepdim=True)).double().mean())


class _InFloat64(torch.fx.Interpreter):
    """Runs a graph with every floating-point tensor, and every request for one, widened to double precision."""

    def run_node(self, n: torch.fx.Node) -> Any:
        if n.op == "call_function" and isinstance(n.target, torch._ops.HigherOrderOperator):
            return self._run_region(n)
        if is_random(n):
            # Drawn in another precision, the numbers would be others, and the error against them no rounding error.
            args, kwargs = super().fetch_args_kwargs_from_env(n)
            return _widen(n.target(*_narrow(args, n.args), **_narrow(kwargs, n.kwargs)))  # type: ignore[operator]
        return _widen(super().run_node(n))

    def fetch_args_kwargs_from_env(self, n: torch.fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return _widen_dtypes(args), _widen_dtypes(kwargs)

    def _run_region(self, n: torch.fx.Node) -> Any:
        args, _ = super().fetch_args_kwargs_from_env(n)
        if n.target is not torch.ops.higher_order.cond:
            raise NotImplementedError(f"no float64 run of {n.target}")
        predicate, then, otherwise, operands = args
        body = then if bool(predicate) else otherwise
        return _InFloat64(body).run(*operands)


def _narrow(values: Any, nodes: Any) -> Any:
    """Return tensors in the precision that the nodes they come from have in the graph."""
    if isinstance(nodes, torch.fx.Node):
        known = nodes.meta.get("val")
        return (
            values.to(known.dtype) if isinstance(values, torch.Tensor) and isinstance(known, torch.Tensor) else values
        )
    if isinstance(nodes, list | tuple):
        return type(nodes)(_narrow(value, node) for value, node in zip(values, nodes, strict=True))
    if isinstance(nodes, dict):
        return {key: _narrow(values[key], node) for key, node in nodes.items()}
    return values


def _widen(value: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda t: t.to(_WIDER[t.dtype]) if t.dtype in _WIDER else t, value)


def _widen_dtypes(value: Any) -> Any:
    return pytree.tree_map_only(torch.dtype, lambda d: _WIDER.get(d, d), value)


def run_float64(gm: torch.fx.GraphModule, leaves: Sequence[Any]) -> tuple[Any, ...] | None:
    """Run ``gm`` in float64 on flat inputs and return the flat outputs; None if some operator has no double form."""
    with isolated(gm):
        interpreter = _InFloat64(gm)
        try:
            result = interpreter.run(*_widen(list(leaves)), enable_io_processing=False)
        except (RuntimeError, NotImplementedError, TypeError):
            return None
    return tuple(result)


def node_float64(gm: torch.fx.GraphModule, node: torch.fx.Node, known: Mapping[torch.fx.Node, Any]) -> Any:
    """Return what one node yields in float64, or None if some operator has no double form.

    Args:
        gm: The graph, for its tensors.
        node: The node.
        known: Values to start from, by node; what else the node depends on is computed.
    """
    interpreter = _InFloat64(gm)
    interpreter.env.update({source: _widen(value) for source, value in known.items()})
    waiting = [node]
    try:
        while waiting:
            open_sources = [source for source in waiting[-1].all_input_nodes if source not in interpreter.env]
            waiting += open_sources
            if not open_sources:
                current = waiting.pop()
                interpreter.env[current] = interpreter.run_node(current)
    except (RuntimeError, NotImplementedError, TypeError):
        return None
    return interpreter.env[node]


@dataclasses.dataclass(frozen=True)
class Reference:
    """What a graph yields for one sample, and how much of that is rounding.

    Attributes:
        outputs: Flat outputs in the graph's own precision.
        precise: Flat outputs of the float64 run; those of the graph where there is none.
        noise: Largest rounding error of each output, in its own unit; 0 for exact types.
    """

    outputs: tuple[Any, ...]
    precise: tuple[Any, ...]
    noise: tuple[float, ...]


def reference(gm: torch.fx.GraphModule, outputs: Sequence[Any], leaves: Sequence[Any]) -> Reference:
    """Return the reference for the outputs that ``gm`` gave for these flat inputs."""
    precise = run_float64(gm, leaves)
    if precise is None:
        precise = tuple(outputs)
    eps = coarsest_eps(gm)
    noise = [_noise(*held, eps) for held in zip(outputs, precise, rounding_units(gm), strict=True)]
    return Reference(tuple(outputs), precise, tuple(noise))


def coarsest_eps(gm: torch.fx.GraphModule) -> float:
    """Return the largest eps of all floating types that a graph computes in; 0 if it has no floats."""
    values = (node.meta.get("val") for module in graph_modules(gm) for node in module.graph.nodes)
    floats = {value.dtype for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()}
    return max((torch.finfo(dtype).eps for dtype in floats), default=0.0)


def _noise(output: Any, precise: Any, unit: float, eps: float) -> float:
    if (
        not isinstance(output, torch.Tensor)
        or not (output.is_floating_point() or output.is_complex())
        or output.numel() == 0
    ):
        return 0.0
    finite = precise.isfinite() & output.isfinite()
    if not bool(finite.any()):
        return 0.0
    measured = measure(precise[finite].to(_WIDER.get(output.dtype, output.dtype)), output[finite]).max_abs
    scale = float(precise[finite].abs().max())
    floor = FLOOR_EPS * max(unit, torch.finfo(output.dtype).eps) * scale
    return max(min(max(measured, floor), largest_noise(output, precise, eps)), _SUBNORMAL)


def largest_noise(output: torch.Tensor, precise: torch.Tensor, eps: float) -> float:
    """Return the most that counts as rounding error of an output, in its own unit: half of all its digits.

    A graph that loses more amplifies whatever it is given, or its float64 run computes something else. A bound as wide
    as that would let anything pass.

    Args:
        output: The output.
        precise: That of the float64 run.
        eps: Of the coarsest type that the graph computes in: what was rounded to it has no more digits.
    """
    finite = precise[precise.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    return math.sqrt(max(eps, torch.finfo(output.dtype).eps)) * scale


def surely_rounding(want: torch.Tensor, got: torch.Tensor, factor: float) -> bool:
    """Return whether the ROUNDING bound holds whatever a float64 run would say, which is what takes time.

    The bound is ``factor * n`` with ``n >= 4 eps max|y|``, and the error against float64 is at most that against
    ``want`` plus n. So an error of ``(factor - 1) * 4 eps max|y|`` against ``want`` is small enough; a little less is
    asked for, since ``want`` stands in for the float64 values.
    """
    if not want.is_floating_point() or want.shape != got.shape or want.dtype != got.dtype or want.numel() == 0:
        return False
    largest = float(want.detach().abs().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).max())
    return measure(want, got).max_abs <= (factor - 1) * 0.97 * FLOOR_EPS * torch.finfo(want.dtype).eps * largest


def violation(contract: Contract, want: Any, got: Any, precise: Any = None, noise: float = 0.0) -> str | None:
    """Return in which way one output breaks a contract, or None if it keeps it.

    Args:
        contract: The promise.
        want: The output before.
        got: The output after.
        precise: The output of the float64 run, for ROUNDING; ``want`` if not given.
        noise: The rounding error of ``want`` itself, from :func:`reference`.
    """
    if not isinstance(want, torch.Tensor) or not isinstance(got, torch.Tensor):
        return None if type(want) is type(got) and want == got else f"wanted {want!r}, got {got!r}"
    if want.dtype != got.dtype:
        return f"dtype changed from {want.dtype} to {got.dtype}"
    if want.shape != got.shape:
        return f"shape changed from {tuple(want.shape)} to {tuple(got.shape)}"
    if torch.equal(want, got):
        return None
    inexact = want.is_floating_point() or want.is_complex()
    new_nan = int((got.isnan() & ~want.isnan()).sum()) if inexact else 0
    if new_nan:
        return f"{new_nan} of {got.numel()} elements became NaN"
    found = measure(want, got)
    if found.mismatches == 0:
        return None
    if contract.kind == "LOSSY":
        return _floor_violation(contract, found) if inexact else None
    if contract.kind == "ROUNDING" and inexact:
        exact = want if precise is None else precise
        error = measure(exact, got.to(exact.dtype))
        bound = contract.factor * noise
        if error.max_abs <= bound:
            return None
        return f"error {error.max_abs:.3g} at {list(error.worst)} exceeds the ROUNDING bound {bound:.3g}" + _worst(
            want, got, error
        )
    return (
        f"{found.mismatches} of {found.size} elements differ, by up to {found.max_abs:.3g} at {list(found.worst)}"
        + _worst(want, got, found)
    )


def _worst(want: torch.Tensor, got: torch.Tensor, errors: Errors) -> str:
    return f": wanted {want.flatten()[errors.worst_flat].item()!r}, got {got.flatten()[errors.worst_flat].item()!r}"


def _floor_violation(contract: Contract, found: Errors) -> str | None:
    for metric, floor in contract.floors:
        value = float(getattr(found, metric))
        if not (value >= floor if METRICS[metric] else value <= floor):
            return (
                f"{metric} is {value:.4g}, the contract says {'at least' if METRICS[metric] else 'at most'} {floor:g}"
            )
    return None
