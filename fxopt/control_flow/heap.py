"""What code does to containers and attributes, which no local name shows: ``outs.append(y)``, ``self.last = y``."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxopt.control_flow.scalars import TracedNumber
from fxopt.control_flow.values import Differ, describe_value, pair_leaves

__all__ = ["Heap"]

_PLAIN = (str, bytes, int, float, bool, type(None), type, types.FunctionType, types.MethodType, types.ModuleType)
_TABLES = ("_parameters", "_buffers", "_modules")
Content = dict[Any, Any]


class Heap:
    """The containers and objects that some values reach, and what was in them when this was made."""

    def __init__(self, seen: Iterable[Any], held: Iterable[Any], modules: Sequence[torch.nn.Module]) -> None:
        self.values = [*seen, *held]
        self.content: dict[int, tuple[Any, Content]] = {}
        for value in self.values:
            self._add(value)
        for module in modules:
            self.content[id(module)] = (module, dict(vars(module)))
            for table in _TABLES:
                self._note(vars(module)[table])

    def _note(self, container: Any) -> None:
        self.content[id(container)] = (container, _content(container))

    def _add(self, value: Any) -> None:
        if id(value) in self.content or isinstance(value, (*_PLAIN, torch.Tensor, TracedNumber, torch.nn.Module)):
            return
        if isinstance(value, tuple):
            for item in value:
                self._add(item)
        elif isinstance(value, list | dict | set) or _is_users(value):
            self._note(value)
            for item in list(self.content[id(value)][1].values()):
                self._add(item)

    def restore(self) -> None:
        """Put everything back into the containers that was in them."""
        for container, before in self.content.values():
            if not _same(before, _content(container)):
                _fill(container, before)

    def changed(self) -> str | None:
        """Return which container or attribute has changed, in words, or None."""
        for container, before in self.content.values():
            now = _content(container)
            if not _same(before, now):
                return _what(container, before, now)
        return None

    def known_leaves(self) -> Iterator[Any]:
        """Yield the tensors and numbers that existed before."""
        yield from pytree.tree_leaves(self.values)
        for _, before in self.content.values():
            yield from pytree.tree_leaves(list(before.values()))

    def written(self, leave: Callable[[Any], Any]) -> dict[int, Content]:
        """Return the content of the containers that have changed, each value passed through ``leave``."""
        found: dict[int, Content] = {}
        for key, (container, before) in self.content.items():
            now = _content(container)
            if not _same(before, now):
                found[key] = {
                    name: value if before.get(name, Heap) is value else leave(value) for name, value in now.items()
                }
        return found

    def pair(
        self, first: dict[int, Content], second: dict[int, Content], choose: Callable[[Any, Any, str], Any]
    ) -> dict[int, Content]:
        """Return what the containers hold after a branch, given what each side left in them.

        Raises:
            Differ: the sides leave a different number of items, or change an attribute that is no tensor.
        """
        paired: dict[int, Content] = {}
        for key in {**first, **second}:
            container, before = self.content[key]
            one, other = first.get(key, before), second.get(key, before)
            if list(one) != list(other):
                raise Differ(f"{_what(container, one, other)} holds other items on one side than on the other")
            paired[key] = {name: self._one(container, name, one[name], other[name], choose) for name in one}
        return paired

    def _one(self, container: Any, name: Any, a: Any, b: Any, choose: Callable[[Any, Any, str], Any]) -> Any:
        where = _item(container, name)
        is_attribute = not isinstance(container, list | dict | set)
        tensors = isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
        if is_attribute and a is not b and not tensors:
            raise Differ(f"{where} becomes {describe_value(a)} on one side and {describe_value(b)} on the other")
        return pair_leaves(a, b, choose, where)

    def write(self, contents: dict[int, Content]) -> None:
        """Put the content that :meth:`pair` returned into the containers."""
        for key, content in contents.items():
            _fill(self.content[key][0], content)


def _is_users(value: Any) -> bool:
    """Return whether a value is an object of a class that is not torch's, with attributes of its own."""
    return hasattr(value, "__dict__") and type(value).__module__.partition(".")[0] != "torch"


def _content(container: Any) -> Content:
    if isinstance(container, list):
        return dict(enumerate(container))
    if isinstance(container, dict):
        return dict(container)
    if isinstance(container, set):
        return {item: item for item in container}
    return dict(vars(container))


def _fill(container: Any, content: Content) -> None:
    if isinstance(container, list):
        container[:] = content.values()
    elif isinstance(container, set):
        container.clear()
        container.update(content.values())
    else:
        table = container if isinstance(container, dict) else vars(container)
        table.clear()
        table.update(content)


def _same(before: Content, now: Content) -> bool:
    return len(before) == len(now) and all(key in now and now[key] is item for key, item in before.items())


def _item(container: Any, name: Any) -> str:
    if isinstance(container, list | dict | set):
        return f"item {name!r} of a {type(container).__name__}"
    return f"attribute {name!r} of {type(container).__name__}"


def _what(container: Any, before: Content, now: Content) -> str:
    if isinstance(container, list | set):
        return f"a {type(container).__name__} of {len(before)}"
    names = [key for key in {**before, **now} if before.get(key, Heap) is not now.get(key, Heap)]
    return _item(container, names[0])
