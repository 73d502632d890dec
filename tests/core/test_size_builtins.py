"""Python's len, max, int, math.sqrt and others of dynamic sizes: the graph keeps the size, Python its functions."""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fxopt
from fxopt.export import to_onnx
from fxopt.size_builtins import symbolic_sizes


def with_zeros_behind(x: Tensor) -> Tensor:
    return F.pad(x.t(), (0, int(x.shape[0] * 0.5)))


def as_long_as(x: Tensor) -> Tensor:
    return torch.zeros(int(len(x) * 1.5), 3) + x.sum()


def resized(x: Tensor) -> Tensor:
    return F.interpolate(x.t()[None], size=int(x.shape[0] * 0.7) + 1)


def largest(x: Tensor) -> Tensor:
    return x.topk(max(1, int(x.shape[0] * 0.25)), 0).values


def in_rows_of_three(x: Tensor) -> Tensor:
    rows = int(math.ceil(x.shape[0] / 3))  # noqa: RUF046  (what people write who came from Python 2)
    return F.pad(x.t(), (0, 3 * rows - x.shape[0])).reshape(3, rows, 3)


def divided(x: Tensor) -> Tensor:
    return x / float(x.shape[0]) + float(x.shape[0] * 0.5)


def in_logarithms(x: Tensor) -> Tensor:
    return x * math.log(x.shape[0]) + math.exp(-len(x)) + math.log2(x.shape[0])


def in_a_loop(x: Tensor) -> Tensor:
    return torch.stack([x * float(i) / float(x.shape[0]) for i in range(3)])


def on_a_line(x: Tensor) -> Tensor:
    rows, line = x.shape[0], torch.linspace(-1, 1, x.shape[0])
    middles = torch.linspace(0.5, rows - 0.5, rows, dtype=torch.float64, device=x.device) / rows
    return x * line[:, None] + middles[:, None] + torch.linspace(2, 3.5, steps=2 * rows).sum()


WRITTEN: dict[str, Callable[[Tensor], Tensor]] = {
    "len": lambda x: x * len(x),
    "arange": lambda x: x + torch.arange(len(x))[:, None],
    "zeros": lambda x: torch.zeros(len(x), x.shape[1]) + x,
    "max": lambda x: x + x.new_ones(max(len(x), 4)).sum(),
    "max of a list": lambda x: x + x.new_ones(max([x.shape[0], 4, x.shape[1]])).sum(),
    "min": lambda x: x + x.new_ones(min(len(x), 4)).sum(),
    "sqrt": lambda x: x / math.sqrt(x.shape[0]),
    "sqrt of a product": lambda x: x / math.sqrt(len(x) * x.shape[1]),
    "counted": lambda x: torch.zeros(len(x.t())).index_add(0, torch.arange(len(x)) % 3, x.sum(1)),
    **{
        function.__name__: function
        for function in (
            with_zeros_behind,
            as_long_as,
            resized,
            largest,
            in_rows_of_three,
            divided,
            in_logarithms,
            in_a_loop,
            on_a_line,
        )
    },
}


@pytest.mark.ort
@pytest.mark.parametrize("name", WRITTEN)
def test_a_graph_has_any_number_of_rows(name: str) -> None:
    function = WRITTEN[name]
    gm = fxopt.capture(function, (torch.randn(5, 3),), dynamic_shapes=({0: "rows"},))
    for rows in (1, 2, 3, 4, 5, 9):
        x = torch.randn(rows, 3)
        torch.testing.assert_close(gm(x), function(x), rtol=0, atol=0)
    to_onnx(gm)


def test_what_needs_a_plain_number_is_refused_with_the_size_that_works():
    before = builtins.len, builtins.max, builtins.min, math.sqrt
    with pytest.raises(fxopt.CaptureError, match="rows = 4 is its only size"):
        fxopt.capture(
            lambda x: sum(x[place] for place in range(len(x))), (torch.randn(4, 3),), dynamic_shapes=({0: "rows"},)
        )
    assert (builtins.len, builtins.max, builtins.min, math.sqrt) == before


def test_other_values_keep_what_python_makes_of_them():
    with symbolic_sizes():
        assert (len("abc"), len(torch.ones(2, 3)), max(3, 5), min([4, 2.5])) == (3, 2, 5, 2.5)
        assert max("ab", "b", key=len) == "ab"
        assert min([], default=7) == 7
        assert max(iter([1, 3])) == 3
        assert math.sqrt(9) == 3.0
        with pytest.raises(TypeError, match="0-d tensor"):
            len(torch.tensor(1))
        with pytest.raises(ValueError, match="empty"):
            max([])
