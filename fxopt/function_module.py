"""Take functions for modules, so that what captures a module captures a function too."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch

from fxopt.errors import CaptureError, describe

__all__ = ["as_module"]


def as_module(model: Any) -> torch.nn.Module:
    """Return the module that ``model`` is, or one whose forward is the function ``model``.

    Raises:
        CaptureError: it is TorchScript, or holds a module that is.
        TypeError: it is neither.
    """
    if isinstance(model, torch.jit.ScriptFunction | torch.ScriptMethod):
        raise _script_refusal("TorchScript cannot be captured: no Python code is left to trace", model)
    if isinstance(model, torch.nn.Module):
        _refuse_script_modules(model)
        return model
    if callable(model) and not isinstance(model, type):
        return _Function(model)
    hint = f"; pass an instance, {model.__name__}(...)" if isinstance(model, type) else ""
    raise TypeError(f"model is {model!r}; wanted a module, a GraphModule, an ExportedProgram or a function{hint}")


def _refuse_script_modules(model: torch.nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            what = f"submodule {path!r} is TorchScript, which" if path else "TorchScript"
            raise _script_refusal(f"{what} cannot be captured: no Python code is left to trace", module)


def _script_refusal(headline: str, script: Any) -> CaptureError:
    source = getattr(script, "original_name", None) or getattr(script, "name", None)
    return CaptureError(
        describe(
            headline,
            got=f"{type(script).__name__}" + (f" of {source}" if source else ""),
            wanted="a torch.nn.Module in Python, or a Python function of tensors",
            try_="the module or function that the script was made from; "
            "its class takes the weights by load_state_dict(script.state_dict())",
        )
    )


class _Function(torch.nn.Module):
    """A plain function, as a module without parameters."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.forward = _called_forward(function) if isinstance(function, types.FunctionType) else function


def _called_forward(function: types.FunctionType) -> types.FunctionType:
    """Return the same function with code called ``forward``: torch keeps the source lines of such frames alone."""
    code = function.__code__.replace(co_name="forward")
    twin = types.FunctionType(code, function.__globals__, "forward", function.__defaults__, function.__closure__)
    twin.__kwdefaults__ = function.__kwdefaults__
    twin.__annotations__ = function.__annotations__
    twin.__dict__.update(function.__dict__)  # what a decorator wraps, which names the arguments
    return twin
