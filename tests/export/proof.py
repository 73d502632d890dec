"""One helper for all tests of translations: export a function, and let the validator compare it with ORT."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import fxopt
from fxopt.export import OnnxFile, to_onnx

NAN, INF = float("nan"), float("inf")


def captured(model: Callable[..., Any], *inputs: Any, dynamic: bool = True) -> fxopt.CapturedModule:
    """Capture ``model``; with ``dynamic``, the first axis of every tensor is, and equal sizes are one dimension."""
    forward = model.forward if isinstance(model, nn.Module) else model
    shapes = None
    if dynamic:
        names = list(inspect.signature(forward).parameters)
        shapes = {name: tree_map(_first_size, value) for name, value in zip(names, inputs, strict=False)}
    module = model.eval() if isinstance(model, nn.Module) else model
    return fxopt.capture(module, inputs, dynamic_shapes=shapes, modes="current", verify=False)


def _first_size(value: Any) -> dict[int, str] | None:
    return {0: f"n{value.shape[0]}"} if isinstance(value, Tensor) and value.ndim else None


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


def prove_each(cases: Mapping[Any, Sequence[Any]], *, dynamic: bool = True, opset: int = 20) -> OnnxFile:
    """Prove many functions in one graph: a graph takes a tenth of a second to capture, one operator more a hundredth.

    Args:
        cases: By name, a function and its inputs. A tensor that several take is one input.
        dynamic: As ``prove`` takes it.
        opset: As ``prove`` takes it.

    Returns:
        The file, whose outputs have the names of the cases in theirs: an error says which it is about.
    """
    net = _Each(cases)
    return prove(net, net.given, dynamic=dynamic, opset=opset)


class _Each(nn.Module):
    """Runs every case on its own inputs; layers among the cases are its modules, so that they keep their parameters."""

    def __init__(self, cases: Mapping[Any, Sequence[Any]]) -> None:
        super().__init__()
        self.names = [str(name) for name in cases]
        self.runs = [run for run, *_ in cases.values()]
        self.layers = nn.ModuleList(run for run in self.runs if isinstance(run, nn.Module))
        every = {id(value): value for _, *inputs in cases.values() for value in inputs}
        self.given = list(every.values())
        places = {key: place for place, key in enumerate(every)}
        self.places = [[places[id(value)] for value in inputs] for _, *inputs in cases.values()]

    def forward(self, values: list[Tensor]) -> dict[str, Any]:
        every = zip(self.names, self.runs, self.places, strict=True)
        return {name: run(*(values[place] for place in places)) for name, run, places in every}


def in_parts(names: Iterable[str], size: int = 14) -> list[tuple[str, ...]]:
    """Return the names, some at a time: a graph of all would say little where it fails, and take long to read."""
    every = tuple(names)
    return [every[start : start + size] for start in range(0, len(every), size)]


def op_types(file: OnnxFile) -> list[str]:
    """Return the operators of the main graph in order."""
    return [node.op_type for node in file.model.graph]


def integers(*shape: int, low: int = -5, high: int = 6, dtype: torch.dtype = torch.int64) -> Tensor:
    """Return random integers."""
    return torch.randint(low, high, shape).to(dtype)
