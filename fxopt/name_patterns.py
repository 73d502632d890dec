"""Names by patterns, as plans are edited by them."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable

from fxopt.errors import PassError, describe

__all__ = ["names_fitting"]


def names_fitting(names: Collection[str], patterns: Iterable[str], *, of: str) -> tuple[str, ...]:
    """Return the names that fit one of the patterns, ``"layer1.*"``, each once.

    Args:
        names: To choose from.
        patterns: As a shell has them.
        of: What has the names, for the message: ``"node of the plan"``.

    Raises:
        PassError: a pattern fits none.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        fitting = fnmatch.filter(names, pattern)
        if not fitting:
            listed = ", ".join(list(names)[:8]) + (", ..." if len(names) > 8 else "")
            raise PassError(describe(f"no {of} fits {pattern!r}", wanted=listed))
        found.update(dict.fromkeys(fitting))
    return tuple(found)
