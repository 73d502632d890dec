"""Writes inside branches and loops: what a value is after a region in which it may have been written.

A side of a branch writes into a copy of the world. Where both are joined again, every value that one of them wrote
becomes a choice between what each side made of it. A loop may write into what it hands on from turn to turn.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from fxopt.control_flow import markers

if TYPE_CHECKING:
    from fxopt.functionalize import Functionalizer

__all__ = ["RegionWrites"]

Nodes = dict[torch.fx.Node, Any]


@dataclasses.dataclass
class _World:
    """What the functionalizer knew at one point."""

    new: Nodes
    version: Nodes
    seen: Nodes


@dataclasses.dataclass
class _Frame:
    before: _World
    first: _World | None = None
    middle: torch.fx.Node | None = None
    aborted: list[bool] = dataclasses.field(default_factory=lambda: [False, False])
    variables: Nodes = dataclasses.field(default_factory=dict)


class RegionWrites:
    """Follows the markers of a flat graph while it is made functional."""

    def __init__(self, owner: Functionalizer) -> None:
        self.owner = owner
        self.frames: dict[int, _Frame] = {}

    def copy(self, node: torch.fx.Node) -> bool:
        """Copy ``node`` if it is a marker; return whether it is."""
        handler = _HANDLERS.get(node.target)
        if handler is None:
            return False
        handler(self, node)
        return True

    def _world(self) -> _World:
        owner = self.owner
        return _World(dict(owner.new), dict(owner.version), dict(owner.seen))

    def _return_to(self, world: _World) -> None:
        """Forget what happened to the values that ``world`` knows; keep those that came later."""
        owner = self.owner
        owner.new, owner.version, owner.seen = (
            {**owner.new, **world.new},
            {**owner.version, **world.version},
            {**owner.seen, **world.seen},
        )

    def _begin(self, node: torch.fx.Node) -> None:
        self.owner.copy_plainly(node)
        self.frames[_region(node)] = _Frame(self._world())

    def _other_side(self, node: torch.fx.Node) -> None:
        self.owner.copy_plainly(node)
        frame = self.frames[_region(node)]
        frame.first, frame.middle = self._world(), self.owner.new[node]
        self._return_to(frame.before)

    def _abort(self, node: torch.fx.Node) -> None:
        self.owner.copy_plainly(node)
        frame = self.frames[_region(node)]
        frame.aborted[0 if frame.first is None else 1] = True

    def _end_branch(self, node: torch.fx.Node) -> None:
        frame, owner = self.frames.pop(_region(node)), self.owner
        assert frame.first is not None
        assert frame.middle is not None
        if any(frame.aborted):
            owner.copy_plainly(node)
            if frame.aborted[1]:
                self._return_to(frame.first)
            return
        known = frame.before.version
        written = [b for b in known if not frame.first.version[b] == owner.version[b] == known[b]]
        pairs = []
        for base in written:
            with owner.graph.inserting_before(frame.middle):
                first = owner.call(node, markers.LEAVE, (frame.first.new[base], _region(node)))
            pairs.append((base, first, owner.call(node, markers.LEAVE, (owner.new[base], _region(node)))))
        owner.copy_plainly(node)
        self._return_to(frame.before)  # a view taken again inside is not there outside
        for base, first, second in pairs:
            owner.new[base] = owner.call(node, markers.MERGE, (first, second, _region(node)))
            owner.version[base] = owner.seen[base] = next(owner.clock)

    def _variable(self, node: torch.fx.Node) -> None:
        self.owner.copy_plainly(node)
        self.frames[_region(node)].variables[node] = self.owner.new[node]

    def _end_loop(self, node: torch.fx.Node) -> None:
        owner, frame = self.owner, self.frames[_region(node)]
        owner.copy_plainly(node)
        for base, version in frame.before.version.items():
            if owner.version[base] != version:
                raise owner.refusal(
                    owner.written_at.get(base, node),
                    f"it writes, inside a loop, into {base.name!r}, which was made before the loop "
                    "and is not handed on from turn to turn",
                )
        self._return_to(frame.before)

    def _result(self, node: torch.fx.Node) -> None:
        owner = self.owner
        owner.copy_plainly(node)
        read = node.args[0]
        assert isinstance(read, torch.fx.Node)
        # What it holds by now is the value after a turn; the marker names the variable itself.
        variable = owner.base_of[read]
        owner.new[node].update_arg(0, self.frames[_region(node)].variables[variable])
        if owner.version.get(variable, 0):
            start = variable.args[0]
            assert isinstance(start, torch.fx.Node)
            owner.write(start, owner.new[node], owner.written_at.get(variable, node))


def _region(node: torch.fx.Node) -> int:
    found = node.args[-1]
    assert isinstance(found, int)
    return found


_HANDLERS = {
    markers.BEGIN_BRANCH: RegionWrites._begin,
    markers.OTHER_SIDE: RegionWrites._other_side,
    markers.ABORT_SIDE: RegionWrites._abort,
    markers.END_BRANCH: RegionWrites._end_branch,
    markers.BEGIN_LOOP: RegionWrites._begin,
    markers.LOOP_VARIABLE: RegionWrites._variable,
    markers.END_LOOP: RegionWrites._end_loop,
    markers.LOOP_RESULT: RegionWrites._result,
}
