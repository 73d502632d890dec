"""Let ``outs.append(y)`` in a loop bind ``outs`` anew, so that it can become something else than a list.

Only where the function makes the list itself, ``outs = []``: of others somebody else may hold them too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from fxopt.control_flow.jumps import own_nodes
from fxopt.control_flow.syntax import expression

__all__ = ["bind_appended"]


def bind_appended(function: ast.FunctionDef, runtime: str) -> None:
    """Rewrite the calls of ``append`` in the loops of a function, in place.

    Args:
        function: As parsed.
        runtime: The name of what rewritten functions call.
    """
    names = _lists_made(function)
    _Binder(names, runtime).generic_visit(function)


def _lists_made(function: ast.FunctionDef) -> set[str]:
    """Return the local names that are bound to new lists alone."""
    stored = [node for node in own_nodes(function.body) if isinstance(node, ast.Name) and not _is_read(node)]
    made = {id(target) for target, value in _bindings(function) if _is_new_list(value)}
    bound = {node.id for node in stored}
    shared = {
        name for node in own_nodes(function.body) if isinstance(node, ast.Global | ast.Nonlocal) for name in node.names
    }
    return bound - {node.id for node in stored if id(node) not in made} - shared


def _is_read(node: ast.Name) -> bool:
    return isinstance(node.ctx, ast.Load)


def _bindings(function: ast.FunctionDef) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Yield each name that is assigned to with its value, those of ``a, b = x, y`` one by one."""
    for node in own_nodes(function.body):
        if isinstance(node, ast.AnnAssign) and node.value is not None:
            yield node.target, node.value
        elif isinstance(node, ast.Assign) and len(node.targets) == 1:
            (target,) = node.targets
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                yield from zip(target.elts, node.value.elts, strict=False)
            else:
                yield target, node.value


def _is_new_list(value: ast.expr) -> bool:
    if isinstance(value, ast.Call):
        return isinstance(value.func, ast.Name) and value.func.id == "list"
    return isinstance(value, ast.List | ast.ListComp)


class _Binder(ast.NodeTransformer):
    def __init__(self, names: set[str], runtime: str) -> None:
        self.names, self.runtime = names, runtime
        self.depth = 0

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return node  # a function of its own

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        return node

    def visit_For(self, node: ast.For) -> ast.AST:
        self.depth += 1
        self.generic_visit(node)
        self.depth -= 1
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        call = node.value
        if (
            not self.depth
            or not isinstance(call, ast.Call)
            or not isinstance(call.func, ast.Attribute)
            or not isinstance(call.func.value, ast.Name)
            or call.func.attr != "append"
            or call.func.value.id not in self.names
            or len(call.args) != 1
            or call.keywords
        ):
            return node
        name = call.func.value
        append = expression(f"{self.runtime}.append({name.id})", node)
        assert isinstance(append, ast.Call)
        append.args.append(call.args[0])
        return ast.copy_location(ast.Assign([ast.copy_location(ast.Name(name.id, ast.Store()), name)], append), node)
