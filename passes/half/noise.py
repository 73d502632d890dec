"""Measure on calibration inputs what half precision would do to each value of a graph: its range and its noise.

A value must not become half if it leaves the range (with ``headroom`` to spare), or if numbers that are divided by, or
whose logarithm is taken, become 0. For all others the question is how much noise they add to the outputs. For node v,
let d be its local rounding error, emulated less float32 on the same operands, and J the Jacobian from v to the outputs.
To first order v adds ``||J d||^2`` to the outputs' noise. With random signs r, ``E (J^T r . d)^2 = ||J d||^2``, and one
backward pass gives ``J^T r`` for all nodes together: the noise of every node costs a handful of passes.

Source: Hutchinson, A stochastic estimator of the trace, 1989, for the projection; the same first-order model of
rounding is used for whole programs by adjoint-based tools (Menon et al., ADAPT, SC 2018).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxopt.dimensions import Sample
from fxopt.eager_control_flow import EagerInterpreter
from fxopt.graph_module import CapturedModule
from fxopt.isolation import isolated
from fxopt.moves import base_name, is_move, is_noiseless
from fxopt.passes.half.constants import HalfConstants
from fxopt.passes.half.emulate import Accumulate, half_call
from fxopt.passes.half.operators import holds_float, is_float, kept_operands
from fxopt.passes.half.plan import dtype_name
from fxopt.regions import COND, WHILE_LOOP

__all__ = ["Measured", "measure_noise"]

PROJECTIONS = 8
"""Random projections of the outputs for each sample: the standard error of a sum of many noises is far below 3 dB."""

NOISE_SAMPLES = 8
"""Calibration inputs on which noise is measured; ranges are measured on all."""

_LARGEST_PROBE = 2**22
"""Elements of operands up to which an operator is run in half to see if it can be: kernels on a CPU are slow at it."""

_DIVIDES = {"div": 1, "true_divide": 1, "floor_divide": 1, "remainder": 1, "fmod": 1, "atan2": 1}
_SINGULAR = {"log", "log2", "log10", "reciprocal", "rsqrt", "logit", "digamma"}


@dataclasses.dataclass
class Measured:
    """What was measured; nodes go by their site names.

    Attributes:
        noise: Noise to signal at the outputs, a ratio of powers, that a node adds if it computes in half.
        cast_noise: The same of a value that is computed in float32 and rounded to half.
        operators: Why a node must not compute in half.
        values: Why a value must not be in half.
        traffic: Bytes that a node reads and writes in float32.
        products: Multiply-accumulates of a node.
        sizes: Bytes of a value in float32.
        largest: Largest finite magnitude of a value.
        kernels: Whether torch has a kernel in half for an operator: the reason if it has none, else None.
    """

    noise: dict[str, float] = dataclasses.field(default_factory=dict)
    cast_noise: dict[str, float] = dataclasses.field(default_factory=dict)
    operators: dict[str, str] = dataclasses.field(default_factory=dict)
    values: dict[str, str] = dataclasses.field(default_factory=dict)
    traffic: dict[str, float] = dataclasses.field(default_factory=dict)
    products: dict[str, float] = dataclasses.field(default_factory=dict)
    sizes: dict[str, float] = dataclasses.field(default_factory=dict)
    largest: dict[str, float] = dataclasses.field(default_factory=dict)
    kernels: dict[Any, str | None] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        dtype: The type of half precision.
        headroom: How many times larger than seen a value may get.
        accumulate: See :func:`half_call`.
        site_name: Gives the name of a node.
        candidates: Names of the nodes that can compute in half.
    """

    dtype: torch.dtype
    headroom: float
    accumulate: Accumulate
    site_name: Callable[[torch.fx.Node], str]
    candidates: frozenset[str]


def measure_noise(gm: CapturedModule, samples: Iterable[Sample], settings: Settings, *, seed: int = 0) -> Measured:
    """Run the graph in float32 on the samples, one at a time, and return what half precision would do.

    Args:
        gm: The float32 graph, in evaluation.
        samples: Calibration inputs.
        settings: How to measure.
        seed: Of the projections.
    """
    found, constants = Measured(), HalfConstants(settings.dtype)
    draw = torch.Generator().manual_seed(seed)
    count = 0
    for index, sample in enumerate(samples):
        leaves = gm.flatten_inputs(*sample.args, **sample.kwargs)
        recording = _Recording(found, settings, constants, with_noise=index < NOISE_SAMPLES)
        with isolated(gm), torch.set_grad_enabled(recording.with_noise):
            outputs = _Recorder(gm, recording).run(*leaves, enable_io_processing=False)
            if recording.with_noise:
                count += 1
                recording.project([o for o in pytree.tree_leaves(outputs) if is_float(o)], draw)
    for table in (found.noise, found.cast_noise):
        for name in table:
            table[name] /= max(count, 1)
    return found


@dataclasses.dataclass
class _Entry:
    """One value of a node and its local rounding errors."""

    name: str
    value: torch.Tensor
    error: torch.Tensor | None
    cast_error: torch.Tensor | None


class _Recording:
    """What is seen in the run of one sample."""

    def __init__(self, found: Measured, settings: Settings, constants: HalfConstants, *, with_noise: bool) -> None:
        self.found, self.settings, self.constants, self.with_noise = found, settings, constants, with_noise
        self.entries: list[_Entry] = []

    def value(self, node: torch.fx.Node, value: torch.Tensor) -> torch.Tensor | None:
        """Look at the range of a value, and return its rounding error to half; None if it must not be half."""
        name, dtype = self.settings.site_name(node), self.settings.dtype
        flat = value.detach()
        finite = flat.isfinite()
        largest = float(flat.abs().masked_fill(~finite, 0).max()) if flat.numel() else 0.0
        limit = torch.finfo(dtype).max
        self.found.sizes[name] = max(self.found.sizes.get(name, 0.0), 4.0 * flat.numel())
        self.found.largest[name] = max(self.found.largest.get(name, 0.0), largest)
        if largest * self.settings.headroom > limit:
            text = f"it reaches {largest:.4g}, and {dtype_name(dtype)} ends at {limit:.5g}"
            self.found.values[name] = text
            return None
        half = flat.to(dtype).to(torch.float32)
        if bool(((half == 0) & (flat != 0)).any()) and _is_divided_by(node):
            self.found.values[name] = (
                f"some of it is 0 in {dtype_name(dtype)}, and is divided by or its logarithm taken"
            )
            return None
        return (half - flat).masked_fill(~finite, 0)

    def operator(self, node: torch.fx.Node, args: Any, kwargs: Any, value: Any) -> list[torch.Tensor] | None:
        """Return the local rounding errors of a call in half for each float that it yields; None if it fails."""
        name, settings = self.settings.site_name(node), self.settings
        lost = self.constants.lost_operand(node, args, kwargs) or self._missing_kernel(node, args, kwargs)
        if lost is not None:
            self.found.operators[name] = lost
            return None
        constants = [source for source in node.all_input_nodes if source.op == "get_attr"]
        leaves = [leaf for leaf in pytree.tree_leaves(value) if is_float(leaf)]
        if is_noiseless(node) and not constants:
            return [torch.zeros(()) for _ in leaves]
        try:
            half = self._half_call(node, args, kwargs)
        except (RuntimeError, NotImplementedError) as refused:
            self.found.operators[name] = f"it cannot be computed in half: {str(refused).partition(chr(10))[0][:120]}"
            return None
        halves = [
            leaf.float()
            for leaf in pytree.tree_leaves(half)
            if isinstance(leaf, torch.Tensor) and leaf.dtype is settings.dtype
        ]
        errors = []
        for wide, rounded in zip(leaves, halves, strict=True):
            finite = wide.detach().isfinite()
            error = (rounded.detach() - wide.detach()).masked_fill(~finite, 0)
            if not bool(error.isfinite().all()):
                self.found.operators[name] = f"a step of it leaves the range of {dtype_name(settings.dtype)}"
                return None
            errors.append(error)
        return errors

    def _half_call(self, node: torch.fx.Node, args: Any, kwargs: Any) -> Any:
        dtype, leaves = self.settings.dtype, pytree.tree_leaves((args, kwargs))
        floats = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
        if is_noiseless(node) and all(leaf.dtype is dtype for leaf in floats):  # no table is widened for a few rows
            return node.target(*args, **kwargs)  # type: ignore[operator]  # call_function nodes have a callable target
        return half_call(node.target, args, kwargs, dtype, self.settings.accumulate)

    def _missing_kernel(self, node: torch.fx.Node, args: Any, kwargs: Any) -> str | None:
        """Return why torch cannot run an operator in half, found by running it once: no table says it."""
        dtype, known = self.settings.dtype, self.found.kernels
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if node.target in known or kept_operands(node) or sum(t.numel() for t in tensors) > _LARGEST_PROBE:
            return known.get(node.target)

        def lowered(leaf: Any) -> Any:
            is_half = is_float(leaf) if isinstance(leaf, torch.Tensor) else leaf is torch.float32
            return (leaf.to(dtype) if isinstance(leaf, torch.Tensor) else dtype) if is_half else leaf

        half_args, half_kwargs = pytree.tree_map(lowered, (tuple(args), dict(kwargs)))
        reason = None
        try:
            node.target(*half_args, **half_kwargs)  # type: ignore[operator]  # call_function nodes have a callable target
        except (RuntimeError, NotImplementedError) as refused:
            reason = f"torch has no kernel of it in half precision: {str(refused).partition(chr(10))[0][:120]}"
        return known.setdefault(node.target, reason)

    def project(self, outputs: list[torch.Tensor], draw: torch.Generator) -> None:
        """Add what each rounding error does to the outputs, relative to their power."""
        outputs = [o for o in outputs if o.requires_grad]
        entries = [entry for entry in self.entries if entry.value.requires_grad]
        if not outputs or not entries:
            return
        for repeat in range(PROJECTIONS):
            signs = [_signs(o, draw) for o in outputs]
            grads = torch.autograd.grad(
                outputs,
                [entry.value for entry in entries],
                signs,
                retain_graph=repeat + 1 < PROJECTIONS,
                allow_unused=True,
            )
            sums: dict[str, list[float]] = {}
            for entry, grad in zip(entries, grads, strict=True):
                if grad is None:
                    continue
                clean = grad.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
                held = sums.setdefault(entry.name, [0.0, 0.0])
                for at, error in enumerate((entry.error, entry.cast_error)):
                    held[at] += 0.0 if error is None else float((clean.double() * error.double()).sum())
            for name, (own, cast) in sums.items():
                self.found.noise[name] = self.found.noise.get(name, 0.0) + own * own / PROJECTIONS
                self.found.cast_noise[name] = self.found.cast_noise.get(name, 0.0) + cast * cast / PROJECTIONS


def _signs(output: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Return random signs over the root of an output's power; 0 where it is infinite."""
    finite = output.detach().isfinite()
    power = float(output.detach().double().masked_fill(~finite, 0).square().sum())
    signs = (torch.randint(0, 2, output.shape, generator=draw) * 2 - 1).float()
    return signs.masked_fill(~finite, 0) / math.sqrt(power) if power > 0 else torch.zeros_like(output)


class _Recorder(EagerInterpreter):
    """Runs a float32 graph, every float value a leaf that gradients can be asked for."""

    def __init__(self, gm: torch.fx.GraphModule, recording: _Recording) -> None:
        super().__init__(gm)
        self.recording = recording

    def run_node(self, n: torch.fx.Node) -> Any:
        """Run one node and look at what it yields."""
        if n.op == "output":
            return super().run_node(n)
        if n.target in (COND, WHILE_LOOP):
            return self._region(n)
        # Some operators refuse to be differentiated where they yield integers, as a sum of floats in integers does.
        with contextlib.nullcontext() if holds_float(n.meta.get("val")) else torch.no_grad():
            value = super().run_node(n)
        if n.op == "get_attr":
            return value
        value = pytree.tree_map_only(torch.Tensor, self._leaf, value)
        if n.op == "placeholder" and n.graph.owning_module is not self.module:
            return value
        self._look(n, value)
        return value

    def _leaf(self, tensor: torch.Tensor) -> torch.Tensor:
        if not self.recording.with_noise or not is_float(tensor):
            return tensor
        has_no_derivative = type(tensor.grad_fn).__name__ == "NotImplemented"  # as floor_divide, which is a step
        if tensor.requires_grad and not has_no_derivative:
            return tensor
        return tensor.detach().requires_grad_()

    def _look(self, n: torch.fx.Node, value: Any) -> None:
        recording = self.recording
        name = recording.settings.site_name(n)
        leaves = [leaf for leaf in pytree.tree_leaves(value) if is_float(leaf)]
        errors: list[torch.Tensor] | None = None
        if name in recording.settings.candidates:
            args, kwargs = self._half_constants(n)
            with torch.no_grad():
                errors = recording.operator(n, args, kwargs, value)
            self._count(n, name, value)
        for index, leaf in enumerate(leaves):
            cast_error = recording.value(n, leaf) if isinstance(value, torch.Tensor) else None
            if recording.with_noise:
                recording.entries.append(_Entry(name, leaf, errors[index] if errors else None, cast_error))

    def _half_constants(self, n: torch.fx.Node) -> tuple[Any, Any]:
        """Return the arguments of a call with its constants in half, which is how they would be stored."""
        kept = kept_operands(n)

        def operand(source: torch.fx.Node) -> Any:
            value = self.env[source]
            value = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, value)
            stored = source.op == "get_attr" and is_float(value) and source not in kept
            return self.recording.constants.stored(source, value) if stored else value

        args, kwargs = torch.fx.map_arg((n.args, n.kwargs), operand)
        return args, kwargs

    def _count(self, n: torch.fx.Node, name: str, value: Any) -> None:
        read = [self.env[source] for source in n.all_input_nodes]
        tensors = [t for t in pytree.tree_leaves((read, value)) if is_float(t)]
        found = self.recording.found
        found.traffic[name] = 0.0 if is_move(n) else sum(4.0 * t.numel() for t in tensors)
        found.products[name] = _products(n, read, value)

    def _region(self, n: torch.fx.Node) -> Any:
        args, _ = self.fetch_args_kwargs_from_env(n)
        if n.target is COND:
            value: Any = self._inside(args[1] if bool(args[0]) else args[2], args[3])
        else:
            value = args[2]
            while bool(pytree.tree_leaves(self._inside(args[0], (*value, *args[3])))[0]):
                value = self._inside(args[1], (*value, *args[3]))
        return tuple(value)

    def _inside(self, body: torch.fx.GraphModule, operands: Any) -> Any:
        return _Recorder(body, self.recording).run(*operands, enable_io_processing=False)


def _is_divided_by(node: torch.fx.Node) -> bool:
    """Return whether a reader divides by a value, or takes its logarithm, perhaps behind moves."""
    for reader in node.users:
        name = base_name(reader)
        if name in _SINGULAR or (name in _DIVIDES and len(reader.args) > 1 and reader.args[1] is node):
            return True
        if name == "pow" and isinstance(reader.args[1], float | int) and reader.args[1] < 0:
            return True
        if reader.op == "call_function" and is_move(reader) and _is_divided_by(reader):
            return True
    return False


def _products(node: torch.fx.Node, read: list[Any], value: Any) -> float:
    """Return the multiply-accumulates of a matrix product or convolution; 0 for other calls."""
    name = base_name(node)
    tensors = [t for t in read if isinstance(t, torch.Tensor)]
    if len(tensors) < 2 or not isinstance(value, torch.Tensor):
        return 0.0
    first, weight = tensors[0], tensors[1]
    if name.startswith("conv_transpose"):
        return float(first.numel()) * weight.numel() / max(weight.shape[0], 1)
    if name.startswith("conv"):
        return float(value.numel()) * weight.numel() / max(weight.shape[0], 1)
    if name in ("linear", "matmul", "mm", "bmm"):
        return float(value.numel()) * first.shape[-1]
    if "attention" in name:
        return 2.0 * value.numel() * weight.shape[-2]
    return 0.0
