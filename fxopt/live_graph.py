"""A graph module whose graph may change after other software has taken hold of it.

What wraps modules for training keeps parts of them: Accelerate binds the ``forward`` of the moment, FSDP puts a class
of its own before the module's, Lightning sets ``training`` without calling ``train()``. In an ordinary
``torch.fx.GraphModule`` each ``recompile`` makes another ``forward``, and calls itself for ever under FSDP's class.
Here ``forward`` always runs the code of the last ``recompile``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from fxopt.eager_control_flow import run_branches_eagerly
from fxopt.errors import PassError, describe
from fxopt.module_reads import reading_modules_once
from fxopt.regions import holds_control_flow

__all__ = ["LiveGraph", "graph_class", "refuse_sharded"]


class LiveGraph(torch.fx.GraphModule):
    """A graph module that can be recompiled under whatever wraps it."""

    def recompile(self) -> Any:
        """Bring the code in line with the graph."""
        outer, inner = type(self), graph_class(self)
        self.__class__ = inner  # recompile() writes into the class it finds
        try:
            with self.graph.on_generate_code(reading_modules_once(self.graph)):
                code = super().recompile()
        finally:
            self.__class__ = outer
        newest: Any = inner.forward
        self.__dict__["_newest_forward"] = run_branches_eagerly(newest) if holds_control_flow(self) else newest
        inner.forward = _calls_newest(tuple(inspect.signature(newest).parameters))
        return code


def graph_class(module: torch.fx.GraphModule) -> Any:
    """Return the class that torch.fx made for this one module, behind those that wrappers put before it."""
    return next(cls for cls in type(module).__mro__ if cls.__qualname__.endswith(".GraphModuleImpl"))


@functools.lru_cache(maxsize=64)
def _calls_newest(parameters: tuple[str, ...]) -> Callable[..., Any]:
    """Return a ``forward`` of these parameters; tracers read them off the function, so they are spelled out."""
    names = ", ".join(parameters)
    namespace: dict[str, Any] = {}
    exec(f"def forward({names}):\n    return self._newest_forward({names})\n", namespace)
    return namespace["forward"]  # type: ignore[no-any-return]  # exec tells no types


def refuse_sharded(gm: torch.nn.Module, action: str) -> None:
    """Check that the module holds whole tensors.

    Args:
        gm: The graph.
        action: What was to be done with it, for the message: ``"copied"``.

    Raises:
        PassError: FSDP has split its parameters among processes.
    """
    # By their marks: importing torch.distributed.fsdp takes longer than all of fxopt, and few need it.
    found = next((name for name, each in gm.named_modules() if _is_fully_sharded(each)), None)
    if found is None:
        found = next((name for name, each in gm.named_parameters() if getattr(each, "_fsdp_flattened", False)), None)
    if found is not None:
        raise PassError(
            describe(
                f"the graph cannot be {action}: FSDP has split its parameters among processes",
                got=f"parts of {found}" if found else None,
                wanted="whole tensors",
                try_="get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) of "
                "torch.distributed.checkpoint.state_dict, loaded into a copy that was made before",
            )
        )


def _is_fully_sharded(module: torch.nn.Module) -> bool:
    return any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)
