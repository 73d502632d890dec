"""Passes by name: ``"fold-batch-norm"``, ``"cast-half{keep=softmax|gelu}"``.

Built-in passes are those of ``fxopt.passes``; others register under the entry-point group ``fxopt.passes``:

    [project.entry-points."fxopt.passes"]
    my-pass = "my_package.my_pass:MyPass"
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import importlib.metadata
import types
import typing
from collections.abc import Iterable
from typing import Any

import torch

from fxopt.errors import PassError, describe
from fxopt.foreign import ForeignPass
from fxopt.pass_base import Pass

__all__ = ["known_passes", "parse_passes", "resolve", "resolve_all"]

ENTRY_POINTS = "fxopt.passes"


@functools.cache
def known_passes() -> dict[str, type[Pass]]:
    """Return every pass class by name: the built-in ones, and those that installed packages register.

    Raises:
        PassError: an entry point cannot be loaded, is no pass, or takes a name that is taken.
    """
    # The one place where the core looks at another folder: names are resolved when a user writes one.
    passes = importlib.import_module("fxopt.passes")
    found: dict[str, type[Pass]] = {item.name: item for item in passes.PASSES}
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            item = entry.load()
        except Exception as error:
            raise PassError(f"entry point {entry.name!r} ({entry.value}) cannot be loaded: {error}") from error
        if not (isinstance(item, type) and issubclass(item, Pass)):
            raise PassError(f"entry point {entry.name!r} is {item!r}, not a subclass of fxopt.Pass")
        if found.setdefault(item.name, item) is not item:
            raise PassError(
                f"two packages register a pass {item.name!r}: {found[item.name].__module__} and {item.__module__}"
            )
    return found


def resolve(item: Any) -> Pass:
    """Return the pass that ``item`` stands for: a pass, its class, its text, a torch PassBase, or a function.

    Raises:
        PassError: no pass has that name, or it has no such option.
        TypeError: ``item`` is none of these.
        ValueError: an option has a value that the pass refuses.
    """
    if isinstance(item, Pass):
        return item
    if isinstance(item, str):
        return _parse(item)
    if isinstance(item, type) and issubclass(item, Pass):
        return item()
    if callable(item) and not isinstance(item, type | torch.nn.Module):
        return ForeignPass.of(item)
    raise TypeError(
        f"{item!r} is not a pass; wanted a name, a fxopt.Pass, a torch.fx PassBase or a function of a GraphModule"
    )


def parse_passes(text: str) -> list[Pass]:
    """Return the passes of a comma-separated list: ``"fold-batch-norm,cast-half{keep=softmax}"``."""
    return [_parse(part) for part in _split(text, ",")]


def _parse(text: str) -> Pass:
    name, brace, rest = text.strip().partition("{")
    name = name.strip()
    if brace and not rest.rstrip().endswith("}"):
        raise PassError(f"options of {name!r} are not closed: {text!r}; write {name}{{option=value,...}}")
    cls = known_passes().get(name)
    if cls is None:
        close = difflib.get_close_matches(name, known_passes(), n=3, cutoff=0.5)
        raise PassError(
            describe(
                f"there is no pass {name!r}",
                wanted=f"one of {', '.join(sorted(known_passes()))}",
                try_=" or ".join(close) if close else "fxopt passes, which lists them",
            )
        )
    options = _split(rest.rstrip()[:-1], ",") if brace else []
    return cls(**dict(_option(cls, option) for option in options))


def _option(cls: type[Pass], text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    key = key.strip().replace("-", "_")
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    if key not in fields or not equals:
        close = difflib.get_close_matches(key, fields, n=1)
        raise PassError(
            describe(
                f"pass {cls.name!r} has no option {key!r}"
                if equals
                else f"option {text!r} of {cls.name!r} has no value",
                wanted=", ".join(f"{name}={field.default}" for name, field in fields.items()) or "no options",
                try_=f"{cls.name}{{{close[0]}={value}}}" if close else None,
            )
        )
    wanted = typing.get_type_hints(cls)[key]
    try:
        return key, _convert(value.strip(), wanted)
    except ValueError:
        raise PassError(f"option {key!r} of {cls.name!r} is {value.strip()!r}; wanted {_type_text(wanted)}") from None


def _convert(text: str, wanted: Any) -> Any:
    origin = typing.get_origin(wanted)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(wanted)
        if text.lower() == "none" and type(None) in options:
            return None
        for option in options:
            if option is not type(None):
                try:
                    return _convert(text, option)
                except ValueError:
                    continue
        raise ValueError(text)
    if origin is typing.Literal:
        matching = [choice for choice in typing.get_args(wanted) if str(choice) == text]
        if not matching:
            raise ValueError(text)
        return matching[0]
    if origin in (tuple, frozenset):
        inner = typing.get_args(wanted)[0]
        return origin(_convert(part, inner) for part in _split(text, "|"))
    if wanted is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    if wanted in (int, float, str):
        return wanted(text)
    raise ValueError(text)


def _type_text(wanted: Any) -> str:
    return wanted.__name__ if isinstance(wanted, type) else str(wanted).replace("typing.", "")


def _split(text: str, separator: str) -> list[str]:
    """Split at separators outside braces; empty parts are dropped."""
    parts, depth = [""], 0
    for char in text:
        depth += (char == "{") - (char == "}")
        if char == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts if part.strip()]


def resolve_all(passes: str | Iterable[Any]) -> list[Pass]:
    """Return the passes of a list, or of a text."""
    return parse_passes(passes) if isinstance(passes, str) else [resolve(item) for item in passes]
