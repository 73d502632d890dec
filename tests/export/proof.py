"""One helper for all tests of translations: export a function, and let the validator compare it with ORT."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fxopt
from fxopt.export import OnnxFile, to_onnx

NAN, INF = float("nan"), float("inf")


def captured(model: Callable[..., Any], *inputs: Any, dynamic: bool = True) -> fxopt.CapturedModule:
    """Capture ``model``; with ``dynamic``, the first axis of every tensor is, and equal sizes are one dimension."""
    forward = model.forward if isinstance(model, nn.Module) else model
    shapes = None
    if dynamic:
        names = list(inspect.signature(forward).parameters)
        shapes = {
            name: {0: f"n{value.shape[0]}"} if isinstance(value, Tensor) and value.ndim else None
            for name, value in zip(names, inputs, strict=False)
        }
    module = model.eval() if isinstance(model, nn.Module) else model
    return fxopt.capture(module, inputs, dynamic_shapes=shapes, modes="current", verify=False)


def prove(
    model: Callable[..., Any], *inputs: Any, dynamic: bool = True, opset: int = 20, refuses: tuple[str, ...] = ()
) -> OnnxFile:
    """Export ``model`` and compare it with ORT on its inputs, on other values, and with every dynamic size at 1, 2, 5.

    The comparison is the validator's: ORT's optimizer off and on, element types and shapes equal, rounding only.
    ``refuses`` are the cases that the graph itself cannot run.
    """
    file = to_onnx(captured(model, *inputs, dynamic=dynamic), opset=opset)
    assert file.validation is not None
    assert [note.split(":")[0].removeprefix("not compared on ") for note in file.validation.notes] == list(refuses)
    levels = {result.optimization for result in file.validation.results}
    assert levels >= {"none", "all"}
    assert file.validation.runs == len(levels) * len({result.case for result in file.validation.results})
    return file


def op_types(file: OnnxFile) -> list[str]:
    """Return the operators of the main graph in order."""
    return [node.op_type for node in file.model.graph]


def integers(*shape: int, low: int = -5, high: int = 6, dtype: torch.dtype = torch.int64) -> Tensor:
    """Return random integers."""
    return torch.randint(low, high, shape).to(dtype)
