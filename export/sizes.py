"""Symbolic sizes as ONNX values.

A dynamic size is a sympy expression over the symbols of torch.export. Each is computed from the tensor that first shows
its symbol (mostly a graph input, where ``Shape`` costs nothing), once, however many nodes of the torch.fx graph compute
it again: a chain of ``sym_size``, ``mul`` and ``floordiv`` nodes leaves no trace in the file unless it is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import onnx_ir as ir
import sympy
import torch
from torch.utils._sympy import functions as symbolic

from fxopt.errors import ExportError, describe

if TYPE_CHECKING:
    from fxopt.export.emitter import Emitter

__all__ = ["Size", "SizeEmitter", "as_size", "is_static", "product"]

Size: TypeAlias = int | sympy.Expr
_INT_MAX = 2**63 - 1
_CALLS: dict[Any, str] = {
    sympy.Max: "Max", symbolic.Max: "Max", sympy.Min: "Min", symbolic.Min: "Min", sympy.Abs: "Abs",
    sympy.Eq: "Equal", sympy.Lt: "Less", sympy.Le: "LessOrEqual", sympy.Gt: "Greater", sympy.Ge: "GreaterOrEqual",
    sympy.And: "And", sympy.Or: "Or", sympy.Not: "Not", symbolic.Mod: "Mod", symbolic.PythonMod: "Mod",
    sympy.Mod: "Mod", symbolic.CleanDiv: "Div", symbolic.LShift: "BitShift", symbolic.PowByNatural: "Pow",
    symbolic.FloatPow: "Pow", symbolic.Where: "Where",
}  # fmt: skip
_ROUNDINGS: dict[Any, str | None] = {
    symbolic.TruncToInt: None, symbolic.TruncToFloat: None, symbolic.FloorToInt: "Floor", symbolic.CeilToInt: "Ceil",
    symbolic.RoundToInt: "Round", sympy.floor: "Floor", sympy.ceiling: "Ceil",
}  # fmt: skip
_FLOAT_CALLS = {"sqrt": "Sqrt", "log": "Log", "exp": "Exp", "cos": "Cos", "sin": "Sin", "tan": "Tan", "tanh": "Tanh"}


def as_size(size: Any) -> Any:
    """Return a SymInt, SymFloat or SymBool as sympy expression, or as plain number where it is one."""
    if isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool):
        size = size.node.expr
    if isinstance(size, sympy.logic.boolalg.BooleanAtom):
        return bool(size)
    if isinstance(size, sympy.Expr) and size.is_number:
        return int(size) if size.is_integer else float(size)
    return size


class SizeEmitter:
    """Emits the arithmetic of symbolic sizes, each expression once per graph."""

    def __init__(self, emit: Emitter) -> None:
        self._emit = emit
        self.names: dict[str, str] = {}
        self._texts: dict[sympy.Basic, str] = {}

    # -- symbols -------------------------------------------------------------------------------------------------

    def learn(self, value: ir.Value, shape: Sequence[Size]) -> None:
        """Take ``value`` of this shape as a source of the symbols that have none yet."""
        for axis, size in enumerate(shape):
            if isinstance(size, sympy.Symbol) and self._source(size) is None:
                self._emit.scope.sources[size] = (value, axis)

    def learn_solved(self, value: ir.Value, shape: Sequence[Size]) -> None:
        """Take ``value`` as a source of symbols that show only inside expressions such as ``2*s``."""
        for axis, size in enumerate(shape):
            if isinstance(size, int) or len(size.free_symbols) != 1 or isinstance(size, sympy.Symbol):
                continue
            (symbol,) = size.free_symbols
            placeholder = sympy.Dummy("size", integer=True, nonnegative=True)
            solved = sympy.solve(size - placeholder, symbol) if size.is_polynomial(symbol) else []
            if len(solved) == 1 and self._source(symbol) is None and sympy.degree(size, symbol) == 1:
                held = self._axis_sizes(value, axis, axis + 1)
                numerator, denominator = sympy.fraction(sympy.together(solved[0]))
                self._remember(placeholder, held)
                quotient = self.column(sympy.expand(numerator))
                if denominator != 1:
                    quotient = self._emit("Div", quotient, self._emit.constant(torch.tensor([int(denominator)])))
                self._emit.scope.sources[symbol] = (quotient, None)

    def learn_number(self, value: ir.Value, symbol: Any) -> None:
        """Take the number ``value`` (without axes) as the source of ``symbol``."""
        if isinstance(symbol, sympy.Symbol):
            self._emit.scope.sources[symbol] = (self._emit("Reshape", value, [1]), None)

    def _source(self, symbol: sympy.Symbol) -> tuple[ir.Value, int | None] | None:
        for scope in self._emit.scope.chain():
            if symbol in scope.sources:
                return scope.sources[symbol]
        return None

    def text(self, size: Size) -> str:
        """Return a symbolic size as text in the user's names of dimensions."""
        if size not in self._texts:
            renamed = {
                s: sympy.Symbol(self.names[s.name], integer=True)
                for s in sympy.sympify(size).free_symbols
                if s.name in self.names
            }
            self._texts[size] = str(sympy.sympify(size).xreplace(renamed))
        return self._texts[size]

    # -- vectors and scalars -------------------------------------------------------------------------------------

    def vector(self, sizes: Sequence[Size]) -> ir.Value:
        """Return ``sizes`` as an int64 vector."""
        sizes = [as_size(size) for size in sizes]
        if all(isinstance(size, int) for size in sizes):
            return self._emit.constant(torch.tensor(sizes, dtype=torch.int64))
        key = ("vector", *sizes)
        if (known := self._known(key)) is None:
            pieces = self._pieces(sizes)
            known = pieces[0] if len(pieces) == 1 else self._emit("Concat", *pieces, axis=0)
            self._remember(key, known)
        return known

    def _pieces(self, sizes: Sequence[Size]) -> list[ir.Value]:
        """Return the parts to concatenate: runs of constants, runs of axes of one tensor, single expressions."""
        pieces: list[ir.Value] = []
        start = 0
        while start < len(sizes):
            end = start + 1
            first = sizes[start]
            if isinstance(first, int):
                while end < len(sizes) and isinstance(sizes[end], int):
                    end += 1
                pieces.append(
                    self._emit.constant(torch.tensor([sizes[i] for i in range(start, end)], dtype=torch.int64))
                )
            elif (
                isinstance(first, sympy.Symbol) and (found := self._source(first)) is not None and found[1] is not None
            ):
                value, axis = found
                assert axis is not None
                while (
                    end < len(sizes)
                    and isinstance(sizes[end], sympy.Symbol)
                    and self._source(sizes[end]) == (value, axis + end - start)
                ):
                    end += 1
                pieces.append(self._axis_sizes(value, axis, axis + end - start))
            else:
                pieces.append(self.column(first))
            start = end
        return pieces

    def scalar(self, expression: sympy.Basic) -> ir.Value:
        """Return a symbolic number as a value without axes: int64, bool, or float64."""
        key = ("scalar", expression)
        if (known := self._known(key)) is None:
            known = self._emit(
                "Reshape", self.column(expression), self._emit.constant(torch.tensor([], dtype=torch.int64)), dims=()
            )
            self._remember(key, known)
        return known

    def column(self, expression: Any) -> ir.Value:
        """Return a symbolic number as a vector of one element."""
        if (known := self._known(expression)) is None:
            known = self._compute(expression)
            self._remember(expression, known)
        return known

    def _axis_sizes(self, value: ir.Value, start: int, end: int) -> ir.Value:
        key = ("shape", id(value), start, end)
        if (known := self._known(key)) is None:
            known = self._emit("Shape", value, start=start, end=end)
            self._remember(key, known)
        return known

    def _known(self, key: Any) -> ir.Value | None:
        for scope in self._emit.scope.chain():
            if key in scope.computed:
                return scope.computed[key]
        return None

    def _remember(self, key: Any, value: ir.Value) -> None:
        self._emit.scope.computed[key] = value

    # -- expressions ---------------------------------------------------------------------------------------------

    def _compute(self, expression: Any) -> ir.Value:
        expression = as_size(expression)
        emit = self._emit
        if isinstance(expression, bool | int | float):
            dtype = {bool: torch.bool, int: torch.int64, float: torch.float64}[type(expression)]
            bounded = max(min(expression, _INT_MAX), -_INT_MAX) if dtype is torch.int64 else expression
            return emit.constant(torch.tensor([bounded], dtype=dtype))
        if isinstance(expression, sympy.Symbol):
            return self._symbol(expression)
        function = expression.func
        if function is sympy.Add:
            return self._sum(expression)
        if function is sympy.Mul:
            return self._product(expression)
        if function in (symbolic.FloorDiv, symbolic.IntTrueDiv, symbolic.FloatTrueDiv):
            return self._quotient(function, *expression.args)
        if function is sympy.Ne:
            return emit("Not", self._call("Equal", expression.args))
        if function is sympy.Pow and expression.exp.is_Integer and expression.exp > 0:
            return self._fold("Mul", [expression.base] * int(expression.exp))
        if function is sympy.Piecewise and len(expression.args) == 2 and expression.args[1].cond == sympy.true:
            (first, condition), (second, _) = expression.args
            return self._call("Where", (condition, first, second))
        if function is symbolic.ToFloat:
            return emit.cast(self.column(expression.args[0]), torch.float64)
        if function in _ROUNDINGS:
            held = self.column(expression.args[0])
            rounding = _ROUNDINGS[function]
            held = emit(rounding, held) if rounding else held
            return emit.cast(held, torch.int64)
        if function in _CALLS:
            return self._call(_CALLS[function], expression.args)
        for name, op_type in _FLOAT_CALLS.items():
            if function.__name__ in (f"OpaqueUnaryFn_{name}", name) or (
                function is sympy.Pow and name == "sqrt" and expression.exp == 0.5
            ):
                return emit(op_type, emit.cast(self.column(expression.args[0]), torch.float64))
        raise ExportError(
            describe(
                f"the size {self.text(expression)} uses {function.__name__}, which has no ONNX translation",
                try_="compute that size with + - * // % min max, or fix one of its dimensions",
            )
        )

    def _symbol(self, symbol: sympy.Symbol) -> ir.Value:
        found = self._source(symbol)
        if found is None:
            raise ExportError(
                describe(
                    f"nothing in the graph tells the value of the size {self.text(symbol)}",
                    try_="pass a tensor that has this size, or make the dimension static",
                )
            )
        value, axis = found
        return value if axis is None else self._axis_sizes(value, axis, axis + 1)

    def _sum(self, expression: sympy.Add) -> ir.Value:
        terms = sorted(expression.args, key=lambda term: term.could_extract_minus_sign())
        total = self.column(terms[0])
        for term in terms[1:]:
            negative = term.could_extract_minus_sign()
            held = self.column(-term if negative else term)
            total = self._emit("Sub" if negative else "Add", *self._alike(total, held))
        return total

    def _product(self, expression: sympy.Mul) -> ir.Value:
        numerator, denominator = sympy.fraction(expression)
        if denominator == 1:
            return self._fold("Mul", list(expression.args))
        return self._emit("Div", *self._alike(self.column(numerator), self.column(denominator)))

    def _quotient(self, function: Any, above: sympy.Expr, below: sympy.Expr) -> ir.Value:
        a, b = self.column(above), self.column(below)
        if function is not symbolic.FloorDiv:
            return self._emit("Div", self._emit.cast(a, torch.float64), self._emit.cast(b, torch.float64))
        if not (above.is_nonnegative and below.is_positive):
            a = self._emit("Sub", a, self._emit("Mod", a, b))  # ONNX divides towards zero
        return self._emit("Div", a, b)

    def _call(self, op_type: str, args: Sequence[Any]) -> ir.Value:
        if len(args) > 2 and op_type not in ("Max", "Min", "Where"):
            return self._fold(op_type, args)
        operands = [self.column(arg) for arg in args]
        if op_type == "Where":
            return self._emit("Where", operands[0], *self._alike(*operands[1:]))
        return self._emit(op_type, *self._alike(*operands))

    def _fold(self, op_type: str, args: Sequence[Any]) -> ir.Value:
        total = self.column(args[0])
        for arg in args[1:]:
            total = self._emit(op_type, *self._alike(total, self.column(arg)))
        return total

    def _alike(self, *values: ir.Value) -> list[ir.Value]:
        if any(value.dtype == ir.DataType.DOUBLE for value in values):
            return [self._emit.cast(value, torch.float64) for value in values]
        return list(values)

    # -- reshapes ------------------------------------------------------------------------------------------------

    def reshape_target(self, known: Sequence[Size] | None, shape: Sequence[Size]) -> ir.Value:
        """Return the second operand of a Reshape from ``known`` to ``shape``, a constant wherever possible.

        One dynamic size becomes -1, which stays right for a batch of zero; others that keep their place become 0.
        """
        target: list[Size] = list(shape)
        dynamic = [axis for axis, size in enumerate(shape) if not isinstance(size, int)]
        kept = [axis for axis in dynamic if known is not None and axis < len(known) and known[axis] == shape[axis]]
        moved = [axis for axis in dynamic if axis not in kept]
        if 0 not in shape and len(moved) <= 1:
            for axis in kept:
                target[axis] = 0
            if moved or len(kept) == 1:
                target[moved[0] if moved else kept[0]] = -1
        return self.vector(target)


def product(sizes: Sequence[Size]) -> Size:
    """Return the product of ``sizes``."""
    total: Size = 1
    for size in sizes:
        total = total * size
    return total


def is_static(sizes: Sequence[Size]) -> bool:
    """Return whether no size is dynamic."""
    return all(isinstance(size, int) for size in sizes)
