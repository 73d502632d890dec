"""The record of what a pass did to a graph, and of what it left alone."""

from __future__ import annotations

import dataclasses

__all__ = ["Change", "Skip"]


@dataclasses.dataclass(frozen=True)
class Change:
    """One change of a graph.

    Attributes:
        kind: ``replaced``, ``inserted``, ``erased``, ``argument``, ``constant``, ``tensor`` or ``adopted``.
        node: Name of the node that was changed.
        why: Reason, as the pass gave it.
        site: Name of the node at which the pass was working, with ``[part]`` behind it if at a part; empty if at none.
        source: The user's line behind the node.
        pass_name: The pass.
    """

    kind: str
    node: str
    why: str
    site: str = ""
    source: str | None = None
    pass_name: str = ""


@dataclasses.dataclass(frozen=True)
class Skip:
    """A node that a pass looked at and left alone, and why."""

    node: str
    why: str
    source: str | None = None
    pass_name: str = ""
