"""fxopt's own operators that every graph may hold.

``fxopt::update_buffer(buffer, value, active)``
    Writes ``value`` into ``buffer`` when ``active``. The one way in which a captured graph changes state, apart from
    the running statistics that ``aten.batch_norm`` updates by itself.
``fxopt::select_mode(train, eval, training)``
    Yields ``train`` while training and ``eval`` otherwise: where a model's own code branches on ``self.training``.
"""

from __future__ import annotations

import torch

__all__ = ["SELECT_MODE", "UPDATE_BUFFER"]

_LIBRARY = torch.library.Library("fxopt", "DEF")
_LIBRARY.define("update_buffer(Tensor(a!) buffer, Tensor value, bool active) -> ()")
_LIBRARY.define("select_mode(Tensor train, Tensor eval, bool training) -> Tensor")


def _update_buffer(buffer: torch.Tensor, value: torch.Tensor, active: bool) -> None:
    if active:
        with torch.no_grad():
            buffer.copy_(value)


def _select_mode(train: torch.Tensor, eval: torch.Tensor, training: bool) -> torch.Tensor:
    return (train if training else eval).clone()


_LIBRARY.impl("update_buffer", _update_buffer, "CompositeExplicitAutograd")
_LIBRARY.impl("update_buffer", lambda buffer, value, active: None, "Meta")
# Composite over differentiable ops, so that gradients flow to the side that was taken.
_LIBRARY.impl("select_mode", _select_mode, "CompositeImplicitAutograd")

UPDATE_BUFFER = torch.ops.fxopt.update_buffer.default
SELECT_MODE = torch.ops.fxopt.select_mode.default

torch.fx.node.has_side_effect(UPDATE_BUFFER)
