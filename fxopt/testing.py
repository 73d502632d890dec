"""What every pass owes, checked by one call. For fxopt's own tests and for those of passes elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import dedent
from typing import Any

from fxopt.capture import capture
from fxopt.checks import fingerprint, verify
from fxopt.dimensions import Sample
from fxopt.graph_module import CapturedModule
from fxopt.graph_text import graph_text
from fxopt.judge import Judge, cases
from fxopt.pass_base import Pass, PassResult

__all__ = ["assert_within", "check_pass"]


def check_pass(
    pass_: Pass,
    model: Any,
    *args: Any,
    dynamic_shapes: Any = None,
    text: str | None = None,
    skips: Sequence[str] | None = None,
    changes: int | None = None,
) -> PassResult:
    """Run ``pass_`` on ``model`` and check what every pass owes, then what this test asks for.

    Every pass owes: its input is left alone; the result is a well-formed graph; its record says a change if and only
    if there is one; its contract holds on the inputs, at the corners of dynamic sizes and in both modes; a second run
    has nothing left to do.

    Args:
        pass_: The pass.
        model: A module or a function of tensors, or an already captured graph.
        args: Example inputs.
        dynamic_shapes: As for :func:`fxopt.capture`.
        text: The graph afterwards, as :func:`fxopt.graph_text` prints it.
        skips: The reasons of all refusals, in order.
        changes: Number of sites that are changed.

    Raises:
        AssertionError: one of these does not hold.
    """
    before = model if isinstance(model, CapturedModule) else capture(model, Sample(args), dynamic_shapes=dynamic_shapes)
    stamp, told = fingerprint(before), graph_text(before)
    result = pass_(before)
    verify(result.gm, after=pass_.name)
    unchanged = fingerprint(before) == stamp and graph_text(before) == told
    assert unchanged, f"{pass_.name} changed the graph that it was given"
    differs = fingerprint(result.gm) != stamp
    assert result.modified == differs, (
        f"{pass_.name} reports modified={result.modified}; the graph did {'' if differs else 'not '}change"
    )
    assert_within(pass_, before, result.gm)
    again = pass_(result.gm)
    assert not again.modified, f"a second run of {pass_.name} still changes: {again.changes[0]}"
    if skips is not None:
        assert [skip.why for skip in result.skips] == list(skips), [skip.why for skip in result.skips]
    if changes is not None:
        sites = {change.site for change in result.changes}
        assert len(sites) == changes, f"{len(sites)} sites are changed, wanted {changes}: {sorted(sites)}"
    if text is not None:
        found = graph_text(result.gm)
        assert found == dedent(text).strip(), f"the graph is\n{found}"
    return result


def assert_within(pass_: Pass, before: CapturedModule, after: CapturedModule) -> None:
    """Check that ``after`` keeps the contract of ``pass_`` against ``before``.

    Raises:
        AssertionError: it does not; the message names case, output and worst element.
    """
    judge = Judge(before, "all")
    problem, _ = judge.judge(after, pass_.contract, evaluation_only=pass_.evaluation_only, interface=pass_.interface)
    assert problem is None, f"{pass_.name} breaks {pass_.contract}: {problem}"
    assert len(judge.refused) < len(list(cases(before, "all"))), f"nothing could be run: {judge.refused}"
