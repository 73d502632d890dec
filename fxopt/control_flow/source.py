"""Find the function that is running, and its text, from the frame that asked a tensor for its value."""

from __future__ import annotations

import ast
import gc
import linecache
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import torch

__all__ = ["NoSource", "asking_frame", "definition", "functions_of", "is_library", "is_torch"]

_CORE = str(Path(__file__).parent.parent)
_TORCH = str(Path(torch.__file__).parent)
_NAMELESS = ("<listcomp>", "<genexpr>", "<dictcomp>", "<setcomp>")


class NoSource(Exception):  # noqa: N818  (it steers capture; the user sees a CaptureError with its text)
    """The text of a function cannot be found."""


def asking_frame(start: types.FrameType | None = None) -> types.FrameType | None:
    """Return the innermost frame that is neither torch's nor fxopt's; that of the function around a comprehension."""
    frame = start or sys._getframe(1)
    found: types.FrameType | None = frame
    while found is not None:
        if not is_library(found.f_code) and found.f_code.co_name not in _NAMELESS:
            return found
        found = found.f_back
    return None


def is_library(code: types.CodeType) -> bool:
    """Return whether this code is torch's or fxopt's own."""
    return is_torch(code) or code.co_filename.startswith((_CORE, "<frozen", "<eval_with_key"))


def is_torch(code: types.CodeType) -> bool:
    """Return whether this code is torch's own."""
    return code.co_filename.startswith(_TORCH)


def functions_of(code: types.CodeType) -> list[types.FunctionType]:
    """Return the functions that run this code object."""
    frozen = gc.get_freeze_count() > 0
    if frozen:  # by a program that serves models, say: the collector tells nothing of what it was told to leave alone
        gc.unfreeze()
    try:
        return _referring(code)
    finally:
        if frozen:
            gc.freeze()


def _referring(code: types.CodeType) -> list[types.FunctionType]:
    return [f for f in gc.get_referrers(code) if isinstance(f, types.FunctionType) and f.__code__ is code]


def definition(code: types.CodeType) -> ast.FunctionDef:
    """Return a fresh syntax tree of the function that has this code; a lambda becomes a function with a ``return``.

    Raises:
        NoSource: the file cannot be read, or nothing in it fits.
    """
    text = "".join(linecache.getlines(code.co_filename))
    if not text:
        raise NoSource(f"the text of {code.co_filename} is not available")
    try:
        tree = ast.parse(text, code.co_filename)
    except SyntaxError as error:
        raise NoSource(f"the text of {code.co_filename} cannot be parsed") from error
    found = [node for node in _functions(tree) if _first_line(node) == code.co_firstlineno]
    named = [node for node in found if isinstance(node, ast.FunctionDef)]
    lambdas = [node for node in found if isinstance(node, ast.Lambda) and _is_lambda(node, code)]
    if code.co_name == "<lambda>" or not named:
        if len(lambdas) != 1:
            raise NoSource(f"line {code.co_firstlineno} of {code.co_filename} holds {len(lambdas)} functions like it")
        return _as_function(lambdas[0])
    return named[0]


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.Lambda]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.Lambda):
            yield node


def _first_line(node: ast.FunctionDef | ast.Lambda) -> int:
    decorators = getattr(node, "decorator_list", [])
    return int(min([node.lineno, *(decorator.lineno for decorator in decorators)]))


def _is_lambda(node: ast.Lambda, code: types.CodeType) -> bool:
    lines = [(start, column) for start, _, column, _ in code.co_positions() if start is not None and column is not None]
    inside = [(part.lineno, part.col_offset) for part in ast.walk(node.body) if isinstance(part, ast.expr)]
    return bool(lines) and max(lines) in inside


def _as_function(node: ast.Lambda) -> ast.FunctionDef:
    value = ast.copy_location(ast.Return(node.body), node.body)
    made = ast.FunctionDef("_lambda", node.args, [value], [], None, None)
    return ast.fix_missing_locations(ast.copy_location(made, node))
