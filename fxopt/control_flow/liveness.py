"""Which local names are read later: what a branch or a loop has to hand on.

A backward pass over statements whose jumps are lowered already, so that control only falls from one to the next.
Each ``if`` and each loop gets an attribute ``live``: the names that may be read after it.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence

from fxopt.control_flow.jumps import own_nodes

__all__ = ["assigned", "locals_of", "mark_live", "mutated", "read"]

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def assigned(statements: Sequence[ast.AST]) -> set[str]:
    """Return the names that some statements bind or delete, those of inner functions left out."""
    names: set[str] = set()
    for node in own_nodes(statements):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store | ast.Del):
            names.add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.ExceptHandler):
            names |= {node.name} if node.name else set()
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.MatchAs | ast.MatchStar) and node.name:
            names.add(node.name)
    return names - _comprehension_variables(statements)


def _comprehension_variables(statements: Sequence[ast.AST]) -> set[str]:
    inside: set[str] = set()
    outside: set[str] = set()
    targets: set[int] = set()
    for node in own_nodes(statements):
        if isinstance(node, ast.comprehension):
            for part in ast.walk(node.target):
                if isinstance(part, ast.Name):
                    inside.add(part.id)
                    targets.add(id(part))
    for node in own_nodes(statements):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and id(node) not in targets:
            outside.add(node.id)
    return inside - outside


def mutated(statements: Sequence[ast.AST]) -> set[str]:
    """Return the names whose value is written into: ``x[i] = v``, ``x += v``, ``x.relu_()``."""
    names: set[str] = set()
    for node in own_nodes(statements):
        target: ast.AST | None = None
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            target = node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name = node.func.attr
            target = node.func.value if name.endswith("_") and not name.endswith("__") else None
        while isinstance(target, ast.Subscript | ast.Attribute):
            target = target.value
        if isinstance(target, ast.Name):
            names.add(target.id)
    return names


def read(nodes: Sequence[ast.AST]) -> set[str]:
    """Return every name that is read, in inner functions too; ``x += 1`` reads x."""
    names: set[str] = set()
    for node in nodes:
        for part in ast.walk(node):
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load):
                names.add(part.id)
            elif isinstance(part, ast.AugAssign) and isinstance(part.target, ast.Name):
                names.add(part.target.id)
    return names


def locals_of(function: ast.FunctionDef) -> set[str]:
    """Return the local names of a function: its parameters and what it binds, without ``global`` and ``nonlocal``."""
    arguments = function.args
    names = {a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
    names |= {a.arg for a in (arguments.vararg, arguments.kwarg) if a is not None}
    names |= assigned(function.body)
    for node in own_nodes(function.body):
        if isinstance(node, ast.Global | ast.Nonlocal):
            names -= set(node.names)
    return names


def mark_live(function: ast.FunctionDef) -> None:
    """Give each ``if`` and loop of ``function`` its attribute ``live``."""
    captured: set[str] = set()
    for node in own_nodes(function.body):
        if isinstance(node, _FUNCTIONS):  # it may run at any later time
            captured |= read([node])
    _before(function.body, captured, captured)


def _before(statements: Sequence[ast.stmt], after: set[str], always: set[str]) -> set[str]:
    """Return the names that are live before some statements, given those live after them."""
    live = set(after)
    for statement in reversed(statements):
        live = _one(statement, live, always)
    return live | always


def _one(statement: ast.stmt, live: set[str], always: set[str]) -> set[str]:
    if isinstance(statement, ast.If):
        statement.live = set(live)  # type: ignore[attr-defined]  # read by the conversion
        sides = _before(statement.body, live, always) | _before(statement.orelse, live, always)
        return sides | read([statement.test])
    if isinstance(statement, ast.While | ast.For):
        statement.live = set(live)  # type: ignore[union-attr]  # read by the conversion
        asked = read([statement.test] if isinstance(statement, ast.While) else [statement.target])
        asked |= set(getattr(statement, "flags", ()))
        head = live | asked
        while True:
            inner = _before(statement.body, head, always)
            if isinstance(statement, ast.For):
                inner -= assigned([statement.target])
            if inner <= head:
                break
            head = head | inner
        statement.live_head = set(head)  # type: ignore[union-attr]  # read by the conversion
        return head | (read([statement.iter]) if isinstance(statement, ast.For) else set())
    if isinstance(statement, ast.With):
        return _before(statement.body, live, always) | read([item.context_expr for item in statement.items])
    if isinstance(statement, ast.Try):
        handlers = [inner for handler in statement.handlers for inner in handler.body]
        late = _before([*statement.orelse, *statement.finalbody], live, always) | read(handlers) | live
        return _before(statement.body, late, always) | late
    if isinstance(statement, ast.Match):
        return live | read([statement])
    kills = assigned([statement]) if isinstance(statement, ast.Assign | ast.AnnAssign) else set()
    return (live - kills) | read([statement])
