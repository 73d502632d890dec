"""The constants of a graph in half precision: each is rounded and looked at once, however many inputs run."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch

from fxopt.attributes import get_path, owner_of
from fxopt.passes.half.operators import is_float, kept_operands, takes_numbers
from fxopt.passes.half.plan import dtype_name

__all__ = ["HalfConstants", "lost_numbers"]


class HalfConstants:
    """What the calls of a graph read of its constants when they compute in half."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._stored: dict[torch.fx.Node, torch.Tensor] = {}
        self._lost: dict[torch.fx.Node, str | None] = {}

    def stored(self, read: torch.fx.Node, value: torch.Tensor) -> torch.Tensor:
        """Return ``value``, which the ``get_attr`` node ``read`` yields on each run, in half."""
        if read not in self._stored:
            self._stored[read] = value.to(self.dtype)
        return self._stored[read]

    def lost_operand(self, node: torch.fx.Node, args: Any, kwargs: Any) -> str | None:
        """Return which constant or number of a call half precision does not hold, or None."""
        for source in node.all_input_nodes:
            value = source.op == "get_attr" and source not in kept_operands(node) and source.meta.get("val")
            if is_float(value) and (lost := self._lost_tensor(source)) is not None:
                return lost
        if not takes_numbers(node.target):
            return None
        numbers = itertools.chain(args, (kwargs[key] for key in kwargs if key != "alpha"))
        for number in numbers:
            if isinstance(number, float | int) and not isinstance(number, bool) and math.isfinite(number):
                lost = lost_numbers(torch.tensor(float(number)), self.dtype)
                if lost is not None:
                    return lost
        return None

    def _lost_tensor(self, read: torch.fx.Node) -> str | None:
        if read not in self._lost:
            self._lost[read] = lost_numbers(get_path(owner_of(read), str(read.target)), self.dtype)
        return self._lost[read]


def lost_numbers(tensor: torch.Tensor, dtype: torch.dtype) -> str | None:
    """Return what becomes of a constant in half that it must not become, or None.

    A finite number must not become infinite, and a lone number that is not 0 must not become 0. That some of many
    become 0 is noise, and is measured.
    """
    wide = tensor.detach().to(torch.float32)
    half = wide.to(dtype).to(torch.float32)
    name, limit = dtype_name(dtype), torch.finfo(dtype).max
    if bool((half.isinf() & wide.isfinite()).any()):
        largest = float(wide[wide.isfinite()].abs().max())
        return f"the constant {largest:.4g} is infinite in {name}, which ends at {limit:.5g}"
    if wide.numel() == 1 and bool((half == 0) & (wide != 0)):
        return f"the constant {float(wide):.4g} is 0 in {name}"
    return None
