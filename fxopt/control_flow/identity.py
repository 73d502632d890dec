"""Keep what a dropout yields apart from what it is given.

In evaluation a dropout hands back its very input, and the trace then takes that tensor for the result of the dropout:
the other side of a branch would read a value made on this one, and only in one of the modes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    get_proxy_slot,
    set_proxy_slot,
)
from torch.utils import _pytree as pytree

__all__ = ["may_hand_back", "twins"]


def may_hand_back(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether this call of torch returns its input in one mode, and a new tensor in the other."""
    if "dropout" not in name:
        return False
    in_place = name.endswith("_") or bool(kwargs.get("inplace", args[3] if len(args) > 3 else False))
    return not in_place  # which returns its input in both


def twins(arguments: Any) -> Any:
    """Return the arguments with another tensor object in the place of each, of the same value and memory."""
    mode = get_proxy_mode()
    return arguments if mode is None else pytree.tree_map_only(torch.Tensor, lambda t: _twin(t, mode.tracer), arguments)


def _twin(tensor: torch.Tensor, tracer: Any) -> torch.Tensor:
    slot = get_proxy_slot(tensor, tracer, None)
    if slot is None:
        return tensor
    with disable_proxy_modes_tracing():
        twin: torch.Tensor = torch.ops.aten.alias.default(tensor)
    set_proxy_slot(twin, tracer, slot)
    return twin
