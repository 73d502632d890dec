"""Passes by name: options, third parties by entry point, and the errors of both."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Iterator
from typing import ClassVar, Literal

import pytest

import fxopt
from fxopt.foreign import ForeignPass
from fxopt.passes import PASSES, FoldConstants
from fxopt.registry import known_passes, parse_passes, resolve


@dataclasses.dataclass(frozen=True)
class Stranger(fxopt.Pass):
    """A pass of another package, with an option of every kind."""

    name: ClassVar[str] = "stranger"
    count: int = 1
    rate: float | None = None
    keep: tuple[str, ...] = ()
    how: Literal["fast", "well"] = "fast"
    loud: bool = False

    def run(self, rw: fxopt.Rewriter) -> None:
        """Do nothing."""


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make this file an installed package that registers its pass."""
    entry = importlib.metadata.EntryPoint("stranger", f"{__name__}:Stranger", "fxopt.passes")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [entry])
    monkeypatch.setattr(importlib.metadata.EntryPoint, "load", lambda self: Stranger)
    known_passes.cache_clear()
    yield
    known_passes.cache_clear()


@pytest.mark.usefixtures("registered")
def test_a_pass_of_another_package_is_found_by_name() -> None:
    assert resolve("stranger") == Stranger()
    assert set(known_passes()) == {"stranger", *(item.name for item in PASSES)}


@pytest.mark.usefixtures("registered")
def test_options_have_the_types_of_the_fields() -> None:
    text = "stranger{count=3,rate=0.5,keep=softmax|gelu,how=well,loud=true}"
    found = resolve(text)
    assert found == Stranger(3, 0.5, ("softmax", "gelu"), "well", True)
    assert found.spec().startswith("stranger{count=3,rate=0.5,keep=softmax|gelu,how=well,loud=True}")
    assert resolve(found.spec()) == found
    assert resolve("stranger{rate=none}") == Stranger()


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("strangr", "there is no pass 'strangr'"),
        ("stranger{cuont=3}", r"has no option 'cuont'\n  wanted  count=1, .*\n  try     stranger\{count=3\}"),
        ("stranger{count}", "option 'count' of 'stranger' has no value"),
        ("stranger{count=many}", "option 'count' of 'stranger' is 'many'; wanted int"),
        ("stranger{how=badly}", "wanted Literal"),
        ("stranger{loud=7}", "wanted bool"),
        ("stranger{count=3", "are not closed"),
    ],
)
def test_a_wrong_text_gets_an_error_that_shows_the_right_one(text: str, message: str) -> None:
    with pytest.raises(fxopt.PassError, match=message):
        resolve(text)


def test_a_taken_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = type("Taken", (Stranger,), {"name": "fold-constants"})
    entry = importlib.metadata.EntryPoint("x", "somewhere:Taken", "fxopt.passes")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [entry])
    monkeypatch.setattr(importlib.metadata.EntryPoint, "load", lambda self: taken)
    known_passes.cache_clear()
    with pytest.raises(fxopt.PassError, match="two packages register a pass 'fold-constants'"):
        known_passes()
    known_passes.cache_clear()


def test_a_list_keeps_its_order_and_commas_inside_braces() -> None:
    found = parse_passes("fold-constants{parameters=true,max_growth_bytes=8}, remove-dead-code")
    assert [item.name for item in found] == ["fold-constants", "remove-dead-code"]
    assert found[0] == FoldConstants(parameters=True, max_growth_bytes=8)


def test_functions_and_classes_are_passes_and_nothing_else_is() -> None:
    assert isinstance(resolve(lambda gm: gm), ForeignPass)
    assert resolve(FoldConstants) == FoldConstants()
    with pytest.raises(TypeError, match="3 is not a pass"):
        resolve(3)
