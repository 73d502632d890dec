"""Make pieces of syntax trees from text, at the place of a piece of the user's code."""

from __future__ import annotations

import ast

__all__ = ["constant", "expression", "statement"]


def constant(value: str | bool | int | None, at: ast.AST) -> ast.expr:
    """Return a constant at the line of ``at``."""
    return ast.copy_location(ast.Constant(value), at)


def statement(text: str, at: ast.AST) -> ast.stmt:
    """Return the statement that ``text`` is, all of it at the line of ``at``."""
    made = ast.parse(text).body[0]
    for part in ast.walk(made):
        ast.copy_location(part, at)
    return made


def expression(text: str, at: ast.AST) -> ast.expr:
    """Return the expression that ``text`` is, all of it at the line of ``at``."""
    made = ast.parse(text, mode="eval").body
    for part in ast.walk(made):
        ast.copy_location(part, at)
    return made
