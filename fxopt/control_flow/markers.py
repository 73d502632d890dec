"""Operators that mark, in the flat graph of one trace, where branches and loops begin and end.

    begin_branch(p, 3)  ..one side..  s = leave(a, 3)  other_side(3)  ..the other..  t = leave(b, 3)  end_branch(3)
    y = merge(s, fit(t, [n], 3), 3)

    begin_loop(4)  v = loop_variable(a, 4)  ..test..  loop_test(p, 4)  ..body..  loop_next([n], 4)  end_loop(4)
    y = loop_result(v, 4)

``fit`` gives a value of one side sizes that it has where that side runs, and the value of the other side always.

One trace holds all sides, each once. ``fxopt.control_flow.fold`` makes ``cond`` and ``while_loop`` of them; no
captured graph holds a marker.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = [
    "ABORT_SIDE",
    "BEGIN_BRANCH",
    "BEGIN_LOOP",
    "BEGIN_TRIAL",
    "END_BRANCH",
    "END_LOOP",
    "END_TRIAL",
    "FIT",
    "LEAVE",
    "LOOP_NEXT",
    "LOOP_RESULT",
    "LOOP_TEST",
    "LOOP_VARIABLE",
    "MARKERS",
    "MERGE",
    "OTHER_SIDE",
]

_LIBRARY = torch.library.Library("fxopt_mark", "DEF")


def _nothing(*_: Any) -> None:
    return None


def _fresh(value: torch.Tensor, *_: Any) -> torch.Tensor:
    # A value of its own memory: what was on one side is not a view of what comes after.
    return torch.empty_like(value)


def _resized(value: torch.Tensor, sizes: Sequence[int], *_: Any) -> torch.Tensor:
    return value.new_empty(sizes)


def _define(schema: str, kernel: Callable[..., Any], *, stays: bool) -> Any:
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    marker = getattr(torch.ops.fxopt_mark, name).default
    torch.library.register_fake(f"fxopt_mark::{name}", kernel, lib=_LIBRARY)
    if stays:  # although nothing reads it
        torch.fx.node.has_side_effect(marker)
    return marker


BEGIN_BRANCH = _define("begin_branch(Tensor predicate, int region) -> ()", _nothing, stays=True)
OTHER_SIDE = _define("other_side(int region) -> ()", _nothing, stays=True)
END_BRANCH = _define("end_branch(int region) -> ()", _nothing, stays=True)
ABORT_SIDE = _define("abort_side(int region) -> ()", _nothing, stays=True)
LEAVE = _define("leave(Tensor value, int region) -> Tensor", _fresh, stays=False)
FIT = _define("fit(Tensor value, SymInt[] sizes, int region) -> Tensor", _resized, stays=False)
MERGE = _define("merge(Tensor a, Tensor b, int region) -> Tensor", _fresh, stays=False)
BEGIN_LOOP = _define("begin_loop(int region) -> ()", _nothing, stays=True)
LOOP_VARIABLE = _define("loop_variable(Tensor start, int region) -> Tensor", _fresh, stays=True)
LOOP_TEST = _define("loop_test(Tensor predicate, int region) -> ()", _nothing, stays=True)
LOOP_NEXT = _define("loop_next(Tensor[] values, int region) -> ()", _nothing, stays=True)
END_LOOP = _define("end_loop(int region) -> ()", _nothing, stays=True)
LOOP_RESULT = _define("loop_result(Tensor variable, int region) -> Tensor", _fresh, stays=True)
BEGIN_TRIAL = _define("begin_trial(int region) -> ()", _nothing, stays=True)
END_TRIAL = _define("end_trial(int region) -> ()", _nothing, stays=True)

MARKERS: Sequence[Any] = (
    BEGIN_BRANCH, OTHER_SIDE, END_BRANCH, ABORT_SIDE, LEAVE, FIT, MERGE, BEGIN_LOOP, LOOP_VARIABLE, LOOP_TEST,
    LOOP_NEXT, END_LOOP, LOOP_RESULT, BEGIN_TRIAL, END_TRIAL,
)  # fmt: skip
