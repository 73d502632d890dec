"""Rewrite ``return``, ``break`` and ``continue`` so that every statement list runs from top to bottom.

    before:  if a: return x          after:  if a: _fx_value = x; _fx_done = True
             y = f(x)                        else: y = f(x); _fx_value = y; _fx_done = True
             return y                        return _fx_value

What follows an ``if`` that jumps on one side belongs to its other side: so the work that an early exit saves stays
inside the branch. Only where a side *may* jump does a flag guard what follows. The rewritten function does exactly what
it did before; a structured form is what a branch on tensors can be made of.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator, Sequence

from fxopt.control_flow.syntax import constant, expression

__all__ = ["DONE", "VALUE", "Unsupported", "lower_jumps", "negated_any", "own_nodes"]

VALUE, DONE = "_fx_value", "_fx_done"
_FALLS, _JUMPS, _MAY_JUMP = "falls", "jumps", "may jump"
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)


class Unsupported(Exception):  # noqa: N818  (it steers capture; the user sees a CaptureError with its text)
    """A statement that cannot be rewritten, with its line."""

    def __init__(self, what: str, at: ast.AST) -> None:
        super().__init__(what)
        self.line = getattr(at, "lineno", 0)


def own_nodes(statements: Sequence[ast.AST]) -> Iterator[ast.AST]:
    """Yield every node of some statements, those of functions and classes defined in them left out."""
    for node in statements:
        yield node
        if not isinstance(node, _SCOPES):
            yield from own_nodes(list(ast.iter_child_nodes(node)))


@dataclasses.dataclass(frozen=True)
class _Loop:
    """The flags of one loop: which of them its body sets decides what its test asks."""

    number: int
    used: set[str] = dataclasses.field(default_factory=set)

    @property
    def broken(self) -> str:
        return f"_fx_break_{self.number}"

    @property
    def skipped(self) -> str:
        return f"_fx_continue_{self.number}"


def lower_jumps(function: ast.FunctionDef) -> None:
    """Rewrite the body of ``function`` in place.

    Each loop gets an attribute ``flags``: the names of the flags that end it.

    Raises:
        Unsupported: a loop with an ``else`` that jumps, or a jump inside ``match`` or ``try ... else``.
    """
    _Lowering().function(function)


class _Lowering:
    def __init__(self) -> None:
        self.loops = 0
        self.returned = False

    def function(self, function: ast.FunctionDef) -> None:
        body = list(function.body)
        if not isinstance(body[-1], ast.Return):
            end = ast.copy_location(ast.Return(constant(None, body[-1])), body[-1])
            body.append(end)
        new, outcome = self.block(body, None, top=True)
        if self.returned:
            first = body[0]
            new = [_assign(VALUE, expression("__fxopt__.UNDEFINED", first), first), _flag(DONE, False, first), *new]
            if outcome != _JUMPS or not isinstance(new[-1], ast.Return):
                new.append(ast.copy_location(ast.Return(expression(VALUE, body[-1])), body[-1]))
        function.body = new

    def block(self, statements: list[ast.stmt], loop: _Loop | None, *, top: bool = False) -> tuple[list[ast.stmt], str]:
        """Return the statements without jumps, and whether they fall through to what follows."""
        new: list[ast.stmt] = []
        for index, statement in enumerate(statements):
            rest = statements[index + 1 :]
            if isinstance(statement, ast.Return):
                return [*new, *self._return(statement, loop, top)], _JUMPS
            if isinstance(statement, ast.Break | ast.Continue):
                assert loop is not None
                name = loop.broken if isinstance(statement, ast.Break) else loop.skipped
                loop.used.add(name)
                return [*new, _flag(name, True, statement)], _JUMPS
            if isinstance(statement, ast.Raise):
                return [*new, statement], _JUMPS
            if isinstance(statement, ast.If) and _has_jump(statement):
                lowered, outcome, rest = self._branch(statement, rest, loop)
            else:
                lowered, outcome = self._compound(statement, loop)
            new += lowered
            if outcome == _JUMPS:
                return new, _JUMPS
            flags = self._flags(loop)
            if outcome == _MAY_JUMP and flags:  # without a flag the only jump is an exception, which guards itself
                if not rest:
                    return new, _MAY_JUMP
                guarded, last = self.block(rest, loop)
                test = negated_any(flags, statement)
                new.append(ast.copy_location(ast.If(test, guarded, []), rest[0]))
                return new, _JUMPS if last == _JUMPS else _MAY_JUMP
        return new, _FALLS

    def _flags(self, loop: _Loop | None) -> list[str]:
        return sorted(({DONE} if self.returned else set()) | (loop.used if loop else set()))

    def _return(self, statement: ast.Return, loop: _Loop | None, top: bool) -> list[ast.stmt]:
        value = statement.value or constant(None, statement)
        if top:
            return [ast.copy_location(ast.Return(value), statement)]
        self.returned = True
        if loop is not None:
            loop.used.add(DONE)
        return [_assign(VALUE, value, statement), _flag(DONE, True, statement)]

    def _branch(
        self, statement: ast.If, rest: list[ast.stmt], loop: _Loop | None
    ) -> tuple[list[ast.stmt], str, list[ast.stmt]]:
        """Lower an ``if`` that jumps; what follows it moves into the side that does not."""
        body, orelse = statement.body, statement.orelse
        ends, other_ends = _outcome(body), _outcome(orelse)
        if ends == _JUMPS and other_ends != _JUMPS:
            orelse, rest = [*orelse, *rest], []
        elif other_ends == _JUMPS and ends != _JUMPS:
            body, rest = [*body, *rest], []
        body, ends = self.block(body, loop)
        orelse, other_ends = self.block(orelse, loop)
        outcome = ends if ends == other_ends else _MAY_JUMP
        return [ast.copy_location(ast.If(statement.test, body, orelse), statement)], outcome, rest

    def _compound(self, statement: ast.stmt, loop: _Loop | None) -> tuple[list[ast.stmt], str]:
        if isinstance(statement, ast.If):
            statement.body, _ = self.block(statement.body, loop)
            statement.orelse, _ = self.block(statement.orelse, loop)
            return [statement], _FALLS
        if isinstance(statement, ast.While | ast.For):
            return self._loop(statement, loop)
        if isinstance(statement, ast.With):
            statement.body, outcome = self.block(statement.body, loop)
            return [statement], outcome
        if isinstance(statement, ast.Try):
            return self._try(statement, loop)
        if isinstance(statement, ast.Match) and _has_jump(statement):
            raise Unsupported("a jump out of a match statement", statement)
        return [statement], _FALLS

    def _loop(self, statement: ast.While | ast.For, around: _Loop | None) -> tuple[list[ast.stmt], str]:
        if statement.orelse and any(isinstance(node, ast.Break) for node in own_nodes(statement.body)):
            raise Unsupported("a loop with an else", statement)
        self.loops += 1
        own = _Loop(self.loops)
        body, _ = self.block(statement.body, own)
        resets = [_flag(own.skipped, False, statement)] if own.skipped in own.used else []
        statement.body = [*resets, *body]
        ending = sorted(own.used - {own.skipped})
        statement.flags = ending  # type: ignore[union-attr]  # read by the conversion, one step later
        orelse, statement.orelse = statement.orelse, []
        starts = [_flag(name, False, statement) for name in ending if name != DONE]
        after, outcome = self.block(orelse, None) if orelse else ([], _FALLS)
        if DONE in own.used:
            outcome = _MAY_JUMP
            if around is not None:
                around.used.add(DONE)
        return [*starts, statement, *after], outcome

    def _try(self, statement: ast.Try, loop: _Loop | None) -> tuple[list[ast.stmt], str]:
        if statement.orelse and _has_jump(statement):
            raise Unsupported("a jump out of try ... else", statement)
        statement.body, outcome = self.block(statement.body, loop)
        outcomes = {outcome}
        for handler in statement.handlers:
            handler.body, outcome = self.block(handler.body, loop)
            outcomes.add(outcome)
        if any(isinstance(node, ast.Return | ast.Break | ast.Continue) for node in own_nodes(statement.finalbody)):
            raise Unsupported("a jump out of finally", statement)
        return [statement], outcomes.pop() if len(outcomes) == 1 else _MAY_JUMP


def _outcome(statements: Sequence[ast.stmt]) -> str:
    """Return whether some statements always, never or sometimes leave the list they stand in."""
    sometimes = False
    for statement in statements:
        if isinstance(statement, ast.Return | ast.Break | ast.Continue | ast.Raise):
            return _JUMPS
        if isinstance(statement, ast.If):
            parts = [statement.body, statement.orelse]
        elif isinstance(statement, ast.With):
            parts = [statement.body]
        elif isinstance(statement, ast.Try):
            parts = [statement.body, *(handler.body for handler in statement.handlers)]
        else:
            if isinstance(statement, ast.While | ast.For):
                sometimes |= any(isinstance(node, ast.Return) for node in own_nodes([statement]))
            continue
        outcomes = {_outcome(part) for part in parts}
        if outcomes == {_JUMPS}:
            return _JUMPS
        sometimes |= outcomes != {_FALLS}
    return _MAY_JUMP if sometimes else _FALLS


def _has_jump(statement: ast.stmt) -> bool:
    return any(isinstance(node, ast.Return | ast.Break | ast.Continue | ast.Raise) for node in own_nodes([statement]))


def _assign(name: str, value: ast.expr, at: ast.AST) -> ast.stmt:
    target = ast.copy_location(ast.Name(name, ast.Store()), at)
    return ast.copy_location(ast.Assign([target], value), at)


def _flag(name: str, value: bool, at: ast.AST) -> ast.stmt:
    return _assign(name, constant(value, at), at)


def negated_any(names: Sequence[str], at: ast.AST) -> ast.expr:
    """Return ``not (a or b or ...)``."""
    return expression(f"not ({' or '.join(names)})", at)
