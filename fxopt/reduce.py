"""Cut two graphs that differ by one rewrite down to the part that shows the difference.

    whole:    x -> [90 nodes] -> a -> [2 nodes] -> b -> [140 nodes] -> y       the rewrite is among the 2
    reduced:                     a -> [2 nodes] -> b                           a as it is on the sample

Both graphs run side by side, one node at a time, on the inputs that show the difference. A rewrite keeps the names of
what it leaves alone, so most values have a twin in the other graph. The cut ends at the first twin that differs by more
than the contract allows, and starts at the nearest twins before it that agree bit for bit.

A value that differs may be meant to: behind a batch norm that was folded into its weights, a convolution yields
something else, and what follows makes up for it. So the end is a value behind which nothing is rewritten, if there is
one. (Blaming the first difference alone is what delta debugging of compilers calls a slipped reduction: Zeller and
Hildebrandt, Simplifying and Isolating Failure-Inducing Input, 2002; Regehr et al., Test-Case Reduction for C Compiler
Bugs, 2012.) What is cut out is run, and must differ; else more of the graphs is kept, and at last all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from typing import Any

import torch

from fxopt.args import arg
from fxopt.attributes import get_path, owner_of
from fxopt.checks import verify
from fxopt.contracts import Contract
from fxopt.eager_control_flow import EagerInterpreter
from fxopt.effects import is_random
from fxopt.errors import InvariantError
from fxopt.graph_module import CapturedModule, graph_modules
from fxopt.isolation import isolated
from fxopt.judge import Case, Judge, cases
from fxopt.numerics import surely_rounding, violation
from fxopt.ops import UPDATE_BUFFER
from fxopt.subgraph import between, extract
from fxopt.twins import are_alike, behind, call_form, changed_nodes

__all__ = ["Reduced", "difference", "reduce", "size_in_nodes"]

Node = torch.fx.Node


@dataclasses.dataclass(frozen=True)
class Reduced:
    """Two graphs that differ by one rewrite, and only as much of them as it takes to see it.

    Attributes:
        before: The part before the rewrite; its sample holds the values that its inputs have in the whole graph.
        after: The part after it, with the same inputs.
        value: Name of the node whose value it computes; empty if the graphs are whole.
        contract: What the pair breaks; None if it breaks none.
        problem: How, with the numbers; empty if it breaks none.
        note: What was found on the way, in words; why the graphs are whole if they are.
        nodes: Number of calls that are left of ``after``.
        whole_nodes: Number of calls that it had.
        whole_before: The whole graph before the rewrite, with the inputs that show the difference, in the mode that
            shows it.
        whole_after: The whole graph after it.
    """

    before: CapturedModule
    after: CapturedModule
    value: str
    contract: Contract | None
    problem: str
    note: str
    nodes: int
    whole_nodes: int
    whole_before: CapturedModule
    whole_after: CapturedModule

    def size(self) -> str:
        """Return how much is left, as text."""
        return f"{self.nodes} of {self.whole_nodes} nodes"

    def uncut(self) -> Reduced:
        """Return the whole graphs, on the inputs that show the difference."""
        before, after, contract = self.whole_before, self.whole_after, self.contract
        problem = difference(before, after, contract) if contract is not None else None
        if problem is None:
            return _whole(before, after, None, "", self.note)
        return _whole(before, after, contract, problem, "")


def reduce(
    before: CapturedModule, after: CapturedModule, contract: Contract | None = None, *, one_place: bool = True
) -> Reduced:
    """Cut both graphs down to the part in which they differ.

    Args:
        before: The graph before the rewrite; left alone.
        after: The graph after it; left alone.
        contract: What a value must break to count as different. If both graphs keep it, or None is given, it is
            ROUNDING: more than rounding explains.
        one_place: Whether the rewrite is one. The part then ends at a value behind which nothing is rewritten, and
            otherwise at the first one that differs.
    """
    try:
        verify(after)
    except InvariantError as error:
        return _whole(before, after, contract or Contract.ROUNDING, str(error), "the graph after it is malformed")
    shown = _first_shown(before, after, contract or Contract.ROUNDING)
    if shown is None and contract is None and (state := _shown_by_state(before, after)) is not None:
        return state
    if shown is None:
        held = f"alone, this rewrite keeps {contract}, and the check fails with those before it" if contract else (
            "the graphs differ by no more than rounding, on all samples, sizes and modes: "
            "only the check that was given tells them apart"
        )  # fmt: skip
        return _whole(before, after, None, "", held)
    case, judged, problem = shown
    pair = _pinned(before, case), _pinned(after, case)
    notes = [] if case.label.removeprefix("sample ").isdigit() else [f"the difference shows on {case.label}"]
    if contract is not None and judged.kind != contract.kind:
        notes.append(f"alone, this rewrite keeps {contract}; what is shown is more than rounding")
    if before.inputs != after.inputs:
        return _whole(*pair, judged, problem, "; ".join([*notes, "the graphs have other inputs, and are whole"]))
    found = _Search(*pair, judged).smallest(one_place)
    if found is None:
        return _whole(*pair, judged, problem, "; ".join([*notes, "no part shows the difference, the graphs are whole"]))
    return dataclasses.replace(found, note="; ".join(filter(None, [*notes, found.note])))


def difference(before: CapturedModule, after: CapturedModule, contract: Contract) -> str | None:
    """Return how ``after`` breaks a contract on the samples of ``before``, or None."""
    return Judge(before, "samples").judge(after, contract, evaluation_only=False)[0]


def size_in_nodes(gm: torch.fx.GraphModule) -> int:
    """Return the number of calls in a graph and the graphs inside it."""
    return sum(node.op == "call_function" for module in graph_modules(gm) for node in module.graph.nodes)


def _whole(
    before: CapturedModule, after: CapturedModule, contract: Contract | None, problem: str, note: str
) -> Reduced:
    size = size_in_nodes(after)
    return Reduced(before, after, "", contract, problem, note, size, size, before, after)


def _first_shown(
    before: CapturedModule, after: CapturedModule, contract: Contract
) -> tuple[Case, Contract, str] | None:
    """Return the first run that shows the difference, the contract that is broken, and how."""
    for wanted in dict.fromkeys((contract, Contract.ROUNDING)):
        for case in cases(before, "all"):
            if not _has_mode(after, case):
                continue
            judged = wanted.without_floors() if wanted.kind == "LOSSY" and not case.given else wanted
            problem = difference(_pinned(before, case), _pinned(after, case), judged)
            if problem is not None:
                return case, judged, problem
    return None


def _shown_by_state(before: CapturedModule, after: CapturedModule) -> Reduced | None:
    """Return the part that computes the first value that is written into a buffer and differs, or None."""
    if before.inputs != after.inputs:
        return None
    for case in cases(before, "all"):
        if not _has_mode(after, case) or not _runs(_pinned(before, case)):
            continue
        found = _Search(_pinned(before, case), _pinned(after, case), Contract.ROUNDING).smallest_of_state()
        if found is not None:
            note = f"the outputs agree on {case.label}, and what is written into a buffer does not"
            return dataclasses.replace(found, note="; ".join(filter(None, [note, found.note])))
    return None


def _has_mode(gm: CapturedModule, case: Case) -> bool:
    return gm.modes == "both" or (gm.modes == "train") == case.training


def _pinned(gm: CapturedModule, case: Case) -> CapturedModule:
    """Return the graph with the inputs of a case as its sample, in the mode of the case alone."""
    new = gm.clone()
    new.samples = (case.sample,)
    if new.training != case.training:
        new.train(case.training)
    new.modes, new.modes_reason = ("train" if case.training else "eval"), "the difference was seen in this mode"
    return new


End = tuple[Node, Node]  # a value at which the cut may end: the nodes that yield it in both graphs


class _Search:
    """Looks for the smallest part of two graphs, each with one sample and in one mode, that breaks a contract."""

    def __init__(self, before: CapturedModule, after: CapturedModule, contract: Contract) -> None:
        self.before, self.after, self.contract = before, after, contract
        others = {node.name: node for node in after.graph.nodes}
        self.namesakes = {node.name: (node, others[node.name]) for node in before.graph.nodes if node.name in others}
        self.twins = {name: pair for name, pair in self.namesakes.items() if are_alike(*pair)}
        self.changed = changed_nodes(before, after) | changed_nodes(after, before)
        self.affected = behind(before, self.changed) | behind(after, self.changed)
        sample = before.samples[0]
        self.leaves = before.flatten_inputs(*sample.args, **sample.kwargs)
        self.agreeing = {
            name for name, (node, twin) in self.twins.items() if node not in self.affected and twin not in self.affected
        }  # computed in the same way from the same values
        self.differing: list[str] = []
        self.fails = False  # whether `after` does

    def smallest(self, one_place: bool) -> Reduced | None:
        """Return the first part that breaks the contract, or None."""
        self._compare()
        inputs = {node.name for node, _ in self.twins.values() if node.op == "placeholder"}
        for starts in (self.agreeing, inputs):
            later: list[End] = []
            for end in self._ends():
                if one_place and not self._is_sound(end, starts):
                    later.append(end)
                elif (found := self._cut(end, starts)) is not None:
                    return found
            if (found := next(filter(None, (self._cut(end, starts) for end in later)), None)) is not None:
                return found
        return None

    def smallest_of_state(self) -> Reduced | None:
        """Return the first part that computes what is written into a buffer and breaks the contract, or None."""
        writes: list[dict[str, Node]] = [
            {
                str(arg(node, "buffer").target): arg(node, "value")
                for node in gm.graph.find_nodes(op="call_function", target=UPDATE_BUFFER)
                if arg(node, "active")
            }
            for gm in (self.before, self.after)
        ]
        if not any(writes):
            return None
        self._compare()
        ends = [(value, writes[1][name]) for name, value in writes[0].items() if name in writes[1]]
        return next(filter(None, (self._cut(end, self.agreeing) for end in ends)), None)

    def _compare(self) -> None:
        """Run both graphs side by side, and sort the values that the rewrite reaches: equal, or too far apart."""
        done: dict[str, Any] = {}
        twin_values = self._values(self.after)
        with isolated(self.before), isolated(self.after):
            for name, want in self._values(self.before):
                while name in self.twins and name not in done and not self.fails:
                    try:
                        other, got = next(twin_values)
                    except StopIteration:
                        break
                    except Exception:  # Judge has said what it raises; here it only means that no value follows
                        self.fails = True
                        break
                    if other in self.twins:
                        done[other] = got
                if name not in self.twins or name in self.agreeing:
                    done.pop(name, None)
                elif name not in done:
                    self.differing.append(name)
                else:
                    self._sort_in(name, want, done.pop(name))

    def _sort_in(self, name: str, want: Any, got: Any) -> None:
        if violation(Contract.EXACT, want, got) is None:
            self.agreeing.add(name)
        elif self.contract.kind != "ROUNDING":
            self.differing += [name] if violation(self.contract, want, got) else []
        elif not surely_rounding(want, got, self.contract.factor):
            self.differing.append(name)  # whether rounding explains it is judged when it is cut out

    def _values(self, gm: CapturedModule) -> Iterator[tuple[str, Any]]:
        """Run a graph on the sample, yield the value of each node, and hold none longer than it is read."""
        interpreter = EagerInterpreter(gm)
        leaves, draws = iter(self.leaves), 0
        for node in gm.graph.nodes:
            if node.op == "output":
                return
            if is_random(node):
                draws += 1
                torch.manual_seed(draws)  # the graphs run in turn, and must not take numbers from each other
            interpreter.env[node] = next(leaves) if node.op == "placeholder" else interpreter.run_node(node)
            yield node.name, interpreter.env[node]
            for read in interpreter.user_to_last_uses.get(node, ()):
                del interpreter.env[read]

    def _ends(self) -> Iterator[End]:
        """Yield where the cut may end, in the order of the graph: values that differ, then the outputs."""
        yield from (self.twins[name] for name in self.differing)
        listed: list[Any] = [gm.graph.output_node().args[0] for gm in (self.before, self.after)]
        for node, twin in zip(*listed, strict=False):
            both = isinstance(node, Node) and isinstance(twin, Node)
            if both and not (node.name == twin.name and node.name in self.twins):
                yield node, twin

    def _is_sound(self, end: End, starts: Collection[str]) -> bool:
        """Return whether what follows a value is the same in both graphs but for what comes through the cut."""
        cuts = [between(node, starts) for node in end]
        inside = {node for cut in cuts if cut is not None for node in cut[1]} - set(end)
        known = inside | {node for name in starts for node in self.twins[name]}
        return not any(
            (node in self.changed and not self._reads_otherwise(node, known))
            or not (self.affected & set(node.all_input_nodes)) <= later | known
            for each in end
            for later in [behind(owner_of(each), {each})]
            for node in later - {each}
            if node.op != "output"
        )

    def _reads_otherwise(self, node: Node, known: set[Node]) -> bool:
        """Return whether a call that both graphs have differs only in which of the known values it reads."""
        pair = self.namesakes.get(node.name)
        if pair is None or pair[0].target != pair[1].target:
            return False
        (form, reads), (other_form, other_reads) = (call_form(each) for each in pair)
        return form == other_form and all(
            a.name == b.name or (a in known and b in known) for a, b in zip(reads, other_reads, strict=True)
        )

    def _cut(self, end: End, starts: Collection[str]) -> Reduced | None:
        """Return the part that ends there, if it breaks the contract."""
        here, there = (between(node, starts) for node in end)
        if here is None or there is None or self.changed.isdisjoint(here[1] | there[1]):
            return None
        names = here[0] | there[0]
        values = self._collect([node.name for node in self.before.graph.nodes if node.name in names])
        before = extract(self.before, values, here[1], end[0])
        after = extract(self.after, values, there[1], end[1])
        if not self.fails and not _runs(after):
            return None  # another failure than that of the whole graphs
        problem = difference(before, after, self.contract)
        if problem is None:
            return None
        note = self._note(end, here[1] | there[1], starts)
        size, whole = size_in_nodes(after), size_in_nodes(self.after)
        return Reduced(before, after, end[0].name, self.contract, problem, note, size, whole, self.before, self.after)

    def _collect(self, names: list[str]) -> dict[str, torch.Tensor]:
        """Return values of the graph before the rewrite, in the order of the names, in memory of their own."""
        missing = set(names)
        found: dict[str, torch.Tensor] = {}
        with isolated(self.before):
            values = self._values(self.before)
            while missing:
                name, value = next(values)
                if name in missing:
                    missing.remove(name)
                    found[name] = value.detach().clone()
        return {name: found[name] for name in names}

    def _note(self, end: End, members: set[Node], starts: Collection[str]) -> str:
        notes = ["the graph after the rewrite cannot run"] if self.fails else []
        if end[0].name != end[1].name or end[0].name not in self.twins:
            notes.append("the difference shows only at an output")
        read = [get_path(owner_of(node), str(node.target)) for node in members & self.changed if node.op == "get_attr"]
        if any(isinstance(each, torch.fx.GraphModule) for each in read):
            notes.append("the rewrite is inside a branch or a loop, which is kept whole")
        if not self._is_sound(end, starts):
            later = [node.name for node in self.after.graph.nodes if node in self.changed - members]
            more = f": {', '.join(later[:4])}{', ...' if len(later) > 4 else ''}" if later else ""
            notes.append(f"more is rewritten outside this part{more}, which may be meant to make up for it")
        return "; ".join(notes)


def _runs(gm: CapturedModule) -> bool:
    """Return whether a graph runs on its sample."""
    sample = gm.samples[0].clone()
    try:
        with isolated(gm):
            gm(*sample.args, **sample.kwargs)
    except Exception:  # whatever it is, there are no values to compare
        return False
    return True
