"""Which nodes of two traces of one model correspond: traces of the two modes, with the regions that markers enclose.

A branch or loop of one trace has its twin in the other where both stand on the same line of the model, inside the same
side of twins. Twins get one number, and their markers cut both traces into stretches that are aligned one by one, so
that no node of a side ever corresponds to a node outside of it.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch

from fxopt.control_flow import markers
from fxopt.control_flow.session import Site

__all__ = ["REGION_BEGINS", "Place", "opcodes", "places", "region_number", "renumber_regions"]

Place = tuple[tuple[int, int], ...]
REGION_BEGINS = (markers.BEGIN_BRANCH, markers.BEGIN_LOOP)
_MIDDLES = (markers.OTHER_SIDE, markers.LOOP_TEST)
_ENDS = (markers.END_BRANCH, markers.END_LOOP)


@dataclasses.dataclass
class _Region:
    number: int
    begins: Any = None
    aborted: tuple[bool, ...] = (False, False)
    parts: list[list[_Region]] = dataclasses.field(default_factory=lambda: [[], []])


def region_number(node: torch.fx.Node) -> int:
    """Return the number of the region that a marker belongs to."""
    return node.args[-1]  # type: ignore[return-value]  # markers end with the number of their region


def places(graph: torch.fx.Graph) -> dict[torch.fx.Node, Place]:
    """Return in which regions, and in which part of each, every node stands; a marker stands outside of its own."""
    found: dict[torch.fx.Node, Place] = {}
    place: Place = ()
    for node in graph.nodes:
        if node.target in _MIDDLES or node.target in _ENDS:
            place = place[:-1]
        found[node] = place
        if node.target in REGION_BEGINS:
            place = (*place, (region_number(node), 0))
        elif node.target in _MIDDLES:
            place = (*place, (region_number(node), 1))
    return found


def renumber_regions(
    first: torch.fx.Graph, sites: dict[int, Site], second: torch.fx.Graph, other_sites: dict[int, Site]
) -> None:
    """Give the regions of ``second`` the numbers of their twins in ``first``, and new ones to those without a twin.

    Args:
        first: Trace in one mode; stays as it is.
        sites: File, line and function of its regions; those that only ``second`` has are added.
        second: Trace in the other mode; its markers get other numbers.
        other_sites: File, line and function of its regions.
    """
    ours, theirs = _regions(first), _regions(second)
    numbers = dict(_twins(ours, theirs, sites, other_sites))
    unused = max(sites, default=-1) + 1
    for node in second.nodes:
        if node.target in markers.MARKERS:
            number = region_number(node)
            if number not in numbers:
                numbers[number], unused = unused, unused + 1
                sites[numbers[number]] = other_sites[number]
            node.args = (*node.args[:-1], numbers[number])


def _regions(graph: torch.fx.Graph) -> list[_Region]:
    top: list[_Region] = []
    open_: list[tuple[_Region, int]] = []
    for node in graph.nodes:
        if node.target in REGION_BEGINS:
            new = _Region(region_number(node), node.target)
            (open_[-1][0].parts[open_[-1][1]] if open_ else top).append(new)
            open_.append((new, 0))
        elif node.target in _MIDDLES:
            open_[-1] = (open_[-1][0], 1)
        elif node.target is markers.ABORT_SIDE:
            region, part = open_[-1]
            region.aborted = tuple(was or part == side for side, was in enumerate(region.aborted))
        elif node.target in _ENDS:
            open_.pop()
    return top


def _twins(
    ours: Sequence[_Region], theirs: Sequence[_Region], sites: dict[int, Site], other_sites: dict[int, Site]
) -> Iterator[tuple[int, int]]:
    """Yield (number in the second trace, number in the first) of the regions that correspond."""
    keys = [(sites[region.number], region.begins, region.aborted) for region in ours]
    other_keys = [(other_sites[region.number], region.begins, region.aborted) for region in theirs]
    for tag, a0, a1, b0, b1 in _stretch(keys, other_keys):
        if tag == "equal":
            for mine, twin in zip(ours[a0:a1], theirs[b0:b1], strict=True):
                yield twin.number, mine.number
                for part, other_part in zip(mine.parts, twin.parts, strict=True):
                    yield from _twins(part, other_part, sites, other_sites)


def opcodes(
    a: Sequence[torch.fx.Node], a_keys: Sequence[Hashable], b: Sequence[torch.fx.Node], b_keys: Sequence[Hashable]
) -> Iterator[tuple[str, int, int, int, int]]:
    """Yield how to turn the nodes ``a`` into ``b``, as difflib does; twins of regions begin and end together."""
    common = {region_number(n) for n in a if n.target in REGION_BEGINS} & {
        region_number(n) for n in b if n.target in REGION_BEGINS
    }
    cuts, other_cuts = _cuts(a, common), _cuts(b, common)
    start = other_start = 0
    for cut, other_cut in zip([*cuts, len(a)], [*other_cuts, len(b)], strict=True):
        for tag, a0, a1, b0, b1 in _stretch(a_keys[start:cut], b_keys[other_start:other_cut]):
            yield tag, a0 + start, a1 + start, b0 + other_start, b1 + other_start
        start, other_start = cut + 1, other_cut + 1
        if cut < len(a):
            yield "equal", cut, start, other_cut, other_start


def _cuts(nodes: Sequence[torch.fx.Node], common: set[int]) -> list[int]:
    cutting = (*REGION_BEGINS, *_MIDDLES, *_ENDS)
    return [index for index, node in enumerate(nodes) if node.target in cutting and region_number(node) in common]


def _stretch(a: Sequence[Hashable], b: Sequence[Hashable]) -> list[tuple[str, int, int, int, int]]:
    """Return how to turn ``a`` into ``b``, without difflib's quadratic cost on the equal ends."""
    start = 0
    while start < min(len(a), len(b)) and a[start] == b[start]:
        start += 1
    end = 0
    while end < min(len(a), len(b)) - start and a[-1 - end] == b[-1 - end]:
        end += 1
    middle = difflib.SequenceMatcher(None, a[start : len(a) - end], b[start : len(b) - end], autojunk=False)
    codes = [("equal", 0, start, 0, start)]
    codes += [(tag, a0 + start, a1 + start, b0 + start, b1 + start) for tag, a0, a1, b0, b1 in middle.get_opcodes()]
    return [*codes, ("equal", len(a) - end, len(a), len(b) - end, len(b))]
