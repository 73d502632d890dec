"""fxopt's own operators that every graph may hold.

``fxopt::update_buffer(buffer, value, active)``
    Writes ``value`` into ``buffer`` when ``active``. The one way in which a captured graph changes state, apart from
    the running statistics that ``aten.batch_norm`` updates by itself.
``fxopt::select_mode(train, eval, training)``
    Yields ``train`` while training and ``eval`` otherwise: where a model's own code branches on ``self.training``.
``fxopt::guard(holds, message, values, names)``
    Raises :class:`fxopt.GuardError` with the message and the named values unless ``holds`` is true: what a graph that
    was specialized to one side of a branch asks of its inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fxopt.errors import GuardError, describe

__all__ = ["GUARD", "SELECT_MODE", "UPDATE_BUFFER"]

_LIBRARY = torch.library.Library("fxopt", "DEF")
_LIBRARY.define("update_buffer(Tensor(a!) buffer, Tensor value, bool active) -> ()")
_LIBRARY.define("guard(Tensor holds, str message, Tensor[] values, str[] names) -> ()")
_LIBRARY.define("select_mode(Tensor train, Tensor eval, bool training) -> Tensor")


def _update_buffer(buffer: torch.Tensor, value: torch.Tensor, active: bool) -> None:
    if active:
        with torch.no_grad():
            buffer.copy_(value)


def _select_mode(train: torch.Tensor, eval: torch.Tensor, training: bool) -> torch.Tensor:
    return (train if training else eval).clone()


def _guard(holds: torch.Tensor, message: str, values: Sequence[torch.Tensor], names: Sequence[str]) -> None:
    if not holds:
        got = ", ".join(f"{name} = {value.tolist()}" for name, value in zip(names, values, strict=True))
        raise GuardError(
            describe(message, got=got or None, try_="the graph before specialize-branches, which has both sides")
        )


_LIBRARY.impl("guard", _guard, "CompositeExplicitAutograd")
_LIBRARY.impl("guard", lambda holds, message, values, names: None, "Meta")
_LIBRARY.impl("update_buffer", _update_buffer, "CompositeExplicitAutograd")
_LIBRARY.impl("update_buffer", lambda buffer, value, active: None, "Meta")
# Composite over differentiable ops, so that gradients flow to the side that was taken.
_LIBRARY.impl("select_mode", _select_mode, "CompositeImplicitAutograd")

UPDATE_BUFFER = torch.ops.fxopt.update_buffer.default
GUARD = torch.ops.fxopt.guard.default
SELECT_MODE = torch.ops.fxopt.select_mode.default

torch.fx.node.has_side_effect(UPDATE_BUFFER)
torch.fx.node.has_side_effect(GUARD)
