"""Numbers that depend on tensors: what ``t.item()``, ``float(t)`` and loop counters are while a model is traced.

A :class:`TracedNumber` computes as Python does, in int64 and float64, but on 0-d tensors, so that what is computed
stays in the graph. Where torch wants a number rather than a tensor (a size, an index) it becomes a symbolic one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

__all__ = ["TracedNumber", "Undecided", "UndecidedRows", "as_number", "result_tensor"]

Number = bool | int | float
_KINDS = {torch.bool: bool, torch.int64: int, torch.float64: float}


class Undecided(BaseException):  # not an Exception: a model's own `except Exception` must not catch it
    """Python asked for the value of a tensor in a function that is not rewritten yet; ``frame`` is where."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what


class UndecidedRows(Undecided):
    """Python asked for the rows of a tensor one by one, and a dynamic size says how many there are."""


def _arithmetic(a: TracedNumber) -> TracedNumber:
    return a.as_kind(int) if a.kind is bool else a


def _same_kind(a: TracedNumber, b: TracedNumber) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = _arithmetic(a), _arithmetic(b)
    kind = float if float in (a.kind, b.kind) else int
    return a.as_kind(kind).tensor, b.as_kind(kind).tensor


def _true_division(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.double() / b.double()


def _floor_division(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.div(a, b, rounding_mode="floor")


_BINARY: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "truediv": _true_division,
    "floordiv": _floor_division,
    "mod": torch.remainder,
    "pow": torch.pow,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "eq": operator.eq,
    "ne": operator.ne,
}
_ON_TENSORS = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "truediv": operator.truediv,
    "floordiv": operator.floordiv, "mod": operator.mod, "pow": operator.pow, "lt": operator.lt, "le": operator.le,
    "gt": operator.gt, "ge": operator.ge, "eq": operator.eq, "ne": operator.ne,
}  # fmt: skip
_ON_BOOLS = {"and": torch.logical_and, "or": torch.logical_or, "xor": torch.logical_xor}


def _method(name: str, *, swapped: bool = False) -> Callable[[TracedNumber, Any], Any]:
    def method(self: TracedNumber, other: Any) -> Any:
        if isinstance(other, torch.Tensor):
            mine = result_tensor(self, other)
            return _ON_TENSORS[name](other, mine) if swapped else _ON_TENSORS[name](mine, other)
        if not isinstance(other, TracedNumber | Number | torch.SymInt | torch.SymFloat):
            return NotImplemented
        if isinstance(other, Number) and not swapped and name not in ("truediv", "pow"):
            kind = float if float in (self.kind, type(other)) else int
            return TracedNumber(_BINARY[name](self.as_kind(kind).tensor, kind(other)))  # type: ignore[arg-type]  # or a number
        a, b = _same_kind(self, as_number(other))
        return TracedNumber(_BINARY[name](b, a) if swapped else _BINARY[name](a, b))

    return method


def _logical(name: str) -> Callable[[TracedNumber, Any], Any]:
    def method(self: TracedNumber, other: Any) -> Any:
        if isinstance(other, torch.Tensor):
            return _ON_BOOLS[name](self.tensor, other) if other.dtype is torch.bool else NotImplemented
        if self.kind is not bool or as_number(other).kind is not bool:
            return NotImplemented
        return TracedNumber(_ON_BOOLS[name](self.tensor, as_number(other).tensor))

    return method


def _unary(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[TracedNumber], TracedNumber]:
    return lambda self: TracedNumber(function(_arithmetic(self).tensor))


class TracedNumber:
    """A bool, int or float whose value is known only when the graph runs.

    Attributes:
        tensor: The value: bool, int64 or float64 without dimensions.
        condition: The condition on sizes that it is the truth of, if it is: a SymBool, or one of both sides' together.
    """

    __slots__ = ("condition", "tensor")

    def __init__(self, tensor: torch.Tensor, condition: Any = None) -> None:
        self.tensor = tensor
        self.condition = condition

    @property
    def kind(self) -> type:
        """The Python type of the number."""
        return _KINDS[self.tensor.dtype]

    def as_kind(self, kind: type) -> TracedNumber:
        """Return the number as ``bool``, ``int`` (cut towards zero) or ``float`` would give it."""
        if kind is self.kind:
            return self
        dtype = next(dtype for dtype, known in _KINDS.items() if known is kind)
        return TracedNumber(self.tensor.to(dtype))

    def symbolic(self) -> Any:
        """Return the number as torch's own symbolic number, for sizes and indices."""
        with torch._C.DisableTorchFunction():
            return self.tensor.item()

    def __bool__(self) -> bool:
        raise Undecided("bool() of a number that depends on a tensor")

    def __index__(self) -> NoReturn:
        raise Undecided("a number that depends on a tensor where Python needs an int")

    def __int__(self) -> NoReturn:
        raise Undecided("int() of a number that depends on a tensor")

    def __float__(self) -> NoReturn:
        raise Undecided("float() of a number that depends on a tensor")

    def __repr__(self) -> str:
        return f"<{self.kind.__name__} that depends on a tensor>"

    __add__, __radd__ = _method("add"), _method("add", swapped=True)
    __sub__, __rsub__ = _method("sub"), _method("sub", swapped=True)
    __mul__, __rmul__ = _method("mul"), _method("mul", swapped=True)
    __truediv__, __rtruediv__ = _method("truediv"), _method("truediv", swapped=True)
    __floordiv__, __rfloordiv__ = _method("floordiv"), _method("floordiv", swapped=True)
    __mod__, __rmod__ = _method("mod"), _method("mod", swapped=True)
    __pow__, __rpow__ = _method("pow"), _method("pow", swapped=True)
    __lt__, __le__, __gt__, __ge__ = _method("lt"), _method("le"), _method("gt"), _method("ge")
    __eq__, __ne__ = _method("eq"), _method("ne")
    __and__, __or__, __xor__ = _logical("and"), _logical("or"), _logical("xor")
    __rand__, __ror__, __rxor__ = __and__, __or__, __xor__
    __neg__, __abs__ = _unary(operator.neg), _unary(torch.abs)
    __pos__ = _unary(operator.pos)
    __hash__ = object.__hash__


def as_number(value: Any) -> TracedNumber:
    """Return the number that a one-element tensor, a symbolic size, a condition on one or a Python number holds.

    Raises:
        ValueError: a tensor has more than one element, as in eager.
    """
    if isinstance(value, TracedNumber):
        return value
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise ValueError(f"only a tensor of one element has a number, and this one has shape {tuple(value.shape)}")
        if value.is_complex():
            raise ValueError("a complex number cannot decide a branch")
        single = value.detach() if value.is_floating_point() else value
        single = single.reshape(()) if single.ndim else single
        wide = _wide(value.dtype)
        return TracedNumber(single if single.dtype is wide else single.to(wide))
    if isinstance(value, torch.SymBool):
        return TracedNumber(_predicate(value), value)
    dtype = torch.bool if isinstance(value, bool) else torch.int64 if isinstance(value, int) else torch.float64
    if isinstance(value, torch.SymInt):
        dtype = torch.int64
    return TracedNumber(torch.full((), value, dtype=dtype))


def _predicate(condition: torch.SymBool) -> torch.Tensor:
    if statically_known_true(condition):
        return torch.full((), True)
    if statically_known_true(torch.sym_not(condition)):
        return torch.full((), False)
    return torch.full((), torch.sym_ite(condition, 1, 0), dtype=torch.int64).to(torch.bool)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.bool if dtype is torch.bool else torch.float64 if dtype.is_floating_point else torch.int64


def result_tensor(number: TracedNumber, *others: torch.Tensor) -> torch.Tensor:
    """Return the number as a tensor that leaves the element type of ``others`` as a Python number would."""
    dtype = number.tensor.dtype
    for other in others:
        dtype = torch.result_type(other, number.kind(1))
    return number.tensor.to(dtype)
