"""Programs whose Python branches and loops on the values of tensors, none of which torch traces as it stands.

``PROGRAMS`` has them by name. ``inputs(seed)`` gives inputs that take different ways for different seeds.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.models import branching, looping


@dataclasses.dataclass(frozen=True)
class Program:
    """A model, its inputs by seed, and which axes of these may vary."""

    make: Callable[[], Any]
    inputs: Callable[[int], tuple[Any, ...]]
    dynamic_shapes: Any = None


def rows(seed: int, *, width: int = 10, batch: int | None = None, scales: tuple[float, ...] = (0.1, 3.0)) -> Tensor:
    """Return a matrix whose size and number of rows go with the seed."""
    generator = torch.Generator().manual_seed(seed)
    batch = (2, 3, 5)[seed % 3] if batch is None else batch
    return torch.randn(batch, width, generator=generator) * scales[seed % len(scales)]


def batched(seed: int) -> tuple[Tensor]:
    return (rows(seed),)


def few_rows(seed: int) -> tuple[Tensor]:
    return (rows(seed, batch=1 + seed % 3, scales=(0.1, 1.0)),)


def flagged(seed: int) -> tuple[Tensor, Tensor]:
    return rows(seed), torch.tensor(seed % 3 == 0)


N = lambda seed: torch.tensor([0, 1, 3, 5, 7][seed % 5])  # noqa: E731  (a short name for the table below)

PROGRAMS: dict[str, Program] = {
    "textbook": Program(branching.Textbook, batched, ({0: "batch"},)),
    "if else": Program(branching.IfElse, batched, ({0: "batch"},)),
    "elif": Program(branching.Elif, lambda s: (rows(s) + (s % 5 - 2) * 0.4,), ({0: "batch"},)),
    "early return": Program(branching.EarlyReturn, few_rows, ({0: "batch"},)),
    "nested, may return": Program(branching.NestedMayReturn, batched, ({0: "batch"},)),
    "and, or, not": Program(branching.Logic, batched, ({0: "batch"},)),
    "chained comparison": Program(branching.Chained, batched, ({0: "batch"},)),
    "scalar arithmetic": Program(branching.ScalarMath, batched, ({0: "batch"},)),
    "assert and raise": Program(branching.Asserted, batched, ({0: "batch"},)),
    "while": Program(looping.WhileLoop, batched, ({0: "batch"},)),
    "while with a counter": Program(looping.CountedWhile, batched, ({0: "batch"},)),
    "for in range(int(t))": Program(looping.ForRange, batched, ({0: "batch"},)),
    "for in range(a, t, 2)": Program(looping.ForRangeFromTo, lambda s: (*batched(s), N(s)), ({0: "batch"}, None)),
    "write by index in a loop": Program(looping.WriteByIndex, lambda s: (*batched(s), N(s)), ({0: "batch"}, None)),
    "break and continue": Program(looping.BreakContinue, batched, ({0: "batch"},)),
    "return from a loop": Program(looping.ReturnFromLoop, batched, ({0: "batch"},)),
    "while True": Program(looping.WhileTrue, lambda s: (rows(s, scales=(0.1, 3.0, 300.0)),), ({0: "batch"},)),
    "halting recurrence": Program(looping.Halting, batched, ({0: "batch"},)),
    "mixture of experts": Program(branching.Router, lambda s: (rows(s, scales=(3.0, 5.0)),), ({0: "batch"},)),
    "decoding loop": Program(looping.Beam, batched, ({0: "batch"},)),
    "helper function": Program(branching.InHelper, batched, ({0: "batch"},)),
    "three submodules": Program(branching.InSubmodules, batched, ({0: "batch"},)),
    "one side defines": Program(branching.OneSideDefines, batched, ({0: "batch"},)),
    "writes in place": Program(branching.InPlace, batched, ({0: "batch"},)),
    "appends to a list": Program(branching.Appends, batched, ({0: "batch"},)),
    "sets an attribute": Program(branching.SetsAttribute, batched, ({0: "batch"},)),
    "counts in a buffer": Program(branching.Counter, batched, ({0: "batch"},)),
    "dropout on one side": Program(branching.Dropped, batched, ({0: "batch"},)),
    "tolist": Program(branching.Listed, batched, ({0: "batch"},)),
    "bool of a tensor": Program(branching.BoolOf, flagged, ({0: "batch"}, None)),
    "comparisons of scalars": Program(branching.Comparisons, batched, ({0: "batch"},)),
    "loops in a loop": Program(looping.NestedLoops, lambda s: (*batched(s), N(s)), ({0: "batch"}, None)),
    "closure": Program(branching.Closure, batched, ({0: "batch"},)),
    "super and private names": Program(branching.Inherited, batched, ({0: "batch"},)),
    "branch on a size": Program(branching.SizeBranch, batched, ({0: "batch"},)),
    "slice by a count": Program(branching.CountedSlice, batched, ({0: "batch"},)),
    "walrus and allclose": Program(branching.Walrus, batched, ({0: "batch"},)),
    "loop over a dynamic size": Program(looping.OverRows, batched, ({0: "batch"},)),
    "batch norm on one side": Program(branching.NormOnOneSide, batched, ({0: "batch"},)),
    "newton": Program(looping.LoopMany, batched, ({0: "batch"},)),
}  # fmt: skip
