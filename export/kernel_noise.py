"""How far ORT's approximations of bounded functions can move an output.

ORT computes the sigmoid, tanh and their kin with an error of about eps of their *range*: sigmoid(-8.5) is off by 3e-8,
which is much against its value of 2e-4. PyTorch is accurate to the value. The effect on each output is found by adding
noise of that size to those functions in a run of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxopt.eager_control_flow import EagerInterpreter
from fxopt.isolation import isolated
from fxopt.numerics import measure

__all__ = ["APPROXIMATED", "kernel_noise"]

_aten = torch.ops.aten
APPROXIMATED = frozenset(
    {
        _aten.sigmoid.default,
        _aten.tanh.default,
        _aten.erf.default,
        _aten.gelu.default,
        _aten.silu.default,
        _aten.mish.default,
        _aten.lstm.input,
        _aten.gru.input,
        _aten.rnn_tanh.input,
    }
)
_OUTER = frozenset({_aten.gelu.default, _aten.silu.default, _aten.mish.default})  # x times a function of range 1


def kernel_noise(gm: torch.fx.GraphModule, leaves: Sequence[Any]) -> list[float]:
    """Return by how much ORT's approximations may move each flat output."""
    with isolated(gm):
        runs = [_Noisy(gm, scale).run(*leaves, enable_io_processing=False) for scale in (0.0, 1.0)]
    return [_distance(plain, noisy) for plain, noisy in zip(*runs, strict=True)]


def _distance(plain: Any, noisy: Any) -> float:
    if not isinstance(plain, torch.Tensor) or not plain.is_floating_point() or plain.shape != noisy.shape:
        return 0.0
    return measure(plain, noisy).max_abs


class _Noisy(EagerInterpreter):
    """Runs a graph with noise of ``scale`` eps on every function that ORT approximates, in branches and loops too."""

    def __init__(self, gm: torch.fx.GraphModule, scale: float, generator: torch.Generator | None = None) -> None:
        super().__init__(gm)
        self._scale = scale
        self._generator = generator or torch.Generator().manual_seed(0)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the target; a graph among its arguments is run like this one."""
        args, kwargs = pytree.tree_map_only(torch.fx.GraphModule, self._inside, (args, kwargs))
        return super().call_function(target, args, kwargs)

    def _inside(self, gm: torch.fx.GraphModule) -> Callable[..., Any]:
        return _Noisy(gm, self._scale, self._generator).run

    def run_node(self, n: torch.fx.Node) -> Any:
        """Run one node."""
        result = super().run_node(n)
        if n.target not in APPROXIMATED or self._scale == 0:
            return result
        return pytree.tree_map_only(torch.Tensor, lambda value: self._disturbed(n, value), result)

    def _disturbed(self, n: torch.fx.Node, value: torch.Tensor) -> torch.Tensor:
        if not value.is_floating_point():
            return value
        sign = torch.randint(0, 2, value.shape, generator=self._generator) * 2 - 1
        size = value.abs().clamp_min(1.0) if n.target in _OUTER else 1.0
        return value + sign.to(value) * size * (torch.finfo(value.dtype).eps * self._scale)
