"""Make ``cond`` and ``while_loop`` of the regions that markers enclose in a flat graph.

    before:  begin_branch(p, 0)  a = linear(x, w, b)  s = leave(a, 0)  other_side(0)  t = leave(x, 0)  end_branch(0)
             y = merge(s, t, 0);  z = relu(y)
    after:   c = cond(p, true_graph_0, false_graph_0, (x, w, b));  y = c[0];  z = relu(y)

The graph around a region hands everything that the region reads to it as an operand, as ``torch.cond`` does.
"""

from __future__ import annotations

import dataclasses
import linecache
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from fxopt.args import source_line
from fxopt.control_flow import markers
from fxopt.control_flow.cheap import is_cheap
from fxopt.control_flow.session import Site, refusal
from fxopt.control_flow.size_nodes import SizeNodes
from fxopt.effects import has_effect, is_in_place
from fxopt.regions import COND, WHILE_LOOP, add_placeholders, add_results

__all__ = ["drop_trials", "fold_regions"]

aten = torch.ops.aten
Node = torch.fx.Node
Env = dict[Node, Any]


def drop_trials(graph: torch.fx.Graph) -> None:
    """Erase what was traced only to see what types come out of it, and what it wrote."""
    depth, inside = 0, []
    for node in graph.nodes:
        depth += node.target is markers.BEGIN_TRIAL
        if depth and node.op == "call_function":
            inside.append(node)
        depth -= node.target is markers.END_TRIAL
    for node in reversed(inside):
        if is_in_place(node.target):
            node.replace_all_uses_with(node.all_input_nodes[0])
        if not node.users:
            graph.erase_node(node)


@dataclasses.dataclass
class _Region:
    """A branch or loop: the marker that begins it, what is inside, and the nodes that take its results."""

    begin: Node
    parts: list[list[Any]]
    results: list[Node] = dataclasses.field(default_factory=list)
    aborted: list[bool] = dataclasses.field(default_factory=lambda: [False, False])
    test: Node | None = None
    variables: list[Node] = dataclasses.field(default_factory=list)
    following: list[Node] = dataclasses.field(default_factory=list)

    @property
    def number(self) -> int:
        return self.begin.args[-1]  # type: ignore[return-value]  # markers end with the number of their region

    def nodes(self) -> Iterator[Node]:
        for part in self.parts:
            yield from _flat(part)

    def sides(self) -> list[tuple[Node, Node]]:
        """Return the values that each result stands for, one of either side."""
        return [(_unleft(result.args[0]), _unleft(result.args[1])) for result in self.results]


def _flat(items: Iterable[Any]) -> Iterator[Node]:
    for item in items:
        if isinstance(item, _Region):
            yield item.begin
            yield from item.variables
            yield from item.nodes()
            yield from item.results
        else:
            yield item


def _unleft(node: Any) -> Node:
    while node.target is markers.LEAVE:
        node = node.args[0]
    found: Node = node
    return found


def fold_regions(graph: torch.fx.Graph, root: torch.nn.Module, sites: dict[int, Site]) -> torch.fx.Graph:
    """Return the graph with a ``cond`` or ``while_loop`` for every region; the graph itself if it has none.

    Args:
        graph: Flat functional graph with markers.
        root: Module that holds its attributes; gets the graphs of sides and bodies.
        sites: File, line and function of each region.

    Raises:
        CaptureError: a value made inside a region is read outside by another way than its results.
    """
    if not any(node.target in markers.MARKERS for node in graph.nodes if node.op == "call_function"):
        return graph
    return _Folder(graph, root, sites).run()


class _Folder:
    def __init__(self, graph: torch.fx.Graph, root: torch.nn.Module, sites: dict[int, Site]) -> None:
        self.old, self.root, self.sites = graph, root, sites
        self.count = {"branch": 0, "loop": 0}
        self.sizes = SizeNodes(graph)

    def run(self) -> torch.fx.Graph:
        first = next(node for node in self.old.nodes if node.op != "placeholder")
        for node in list(self.old.nodes):
            if node.op == "get_attr" and node is not first:
                first.prepend(node)
        items = self._parsed()
        self._check_leaks(items)
        graph = torch.fx.Graph(tracer_cls=self.old._tracer_cls)
        graph.set_codegen(self.old._codegen)
        self._emit(items, graph, {}, self.root)
        return graph

    # ---- reading

    def _parsed(self) -> list[Any]:
        """Return the nodes in order, with a ``_Region`` in the place of what it encloses."""
        open_: list[tuple[_Region | None, list[Any]]] = [(None, [])]
        known: dict[int, _Region] = {}
        for node in self.old.nodes:
            region, items = open_[-1]
            target = node.target
            if target in (markers.BEGIN_BRANCH, markers.BEGIN_LOOP):
                new = _Region(node, [])
                known[new.number] = new
                items.append(new)
                open_.append((new, []))
            elif target in (markers.OTHER_SIDE, markers.END_BRANCH, markers.LOOP_TEST, markers.END_LOOP):
                assert region is not None
                region.parts.append(items)
                region.test = node if target is markers.LOOP_TEST else region.test
                open_.pop()
                if target in (markers.OTHER_SIDE, markers.LOOP_TEST):
                    open_.append((region, []))
            elif target is markers.ABORT_SIDE:
                assert region is not None
                region.aborted[len(region.parts)] = True
            elif target is markers.LOOP_VARIABLE:
                assert region is not None
                region.variables.append(node)
            elif target is markers.LOOP_NEXT:
                assert region is not None
                region.following = [_unleft(value) for value in node.args[0]]
            elif target in (markers.MERGE, markers.LOOP_RESULT):
                known[node.args[-1]].results.append(node)
            elif target not in (markers.LEAVE, markers.FIT):
                items.append(node)
        for new in known.values():
            for result in new.results:
                self._fit(result, new)
        return open_[0][1]

    def _fit(self, result: Node, region: _Region) -> None:
        """Fill up, on its side, what is to have other sizes than it has: by none, wherever that side runs."""
        for side, fit in enumerate(result.args[:2]):
            if not isinstance(fit, Node) or fit.target is not markers.FIT:
                continue
            value = _unleft(fit.args[0])
            pairs = zip(value.meta["val"].shape, fit.meta["val"].shape, strict=True)
            ends = [[0, self.sizes.difference(wanted, got)] for got, wanted in reversed(list(pairs))]
            with self.old.inserting_before(fit):
                call = (aten.constant_pad_nd.default, (value, [item for end in ends for item in end]))
                filled = self.old.call_function(*call)
            filled.meta = dict(fit.meta)
            region.parts[side].append(filled)
            result.update_arg(side, filled)
            self.old.erase_node(fit)

    def _check_leaks(self, items: Sequence[Any]) -> None:
        """Hoist sizes that are read outside the region they were first asked for in; refuse any other such value."""
        for region in [item for item in items if isinstance(item, _Region)]:
            for part in region.parts:
                inside = set(_flat(part))
                allowed = inside | {*region.results, *region.variables}
                for node in [n for n in part if isinstance(n, Node)]:
                    readers = [user for user in node.users if user not in allowed and not _is_handed_on(user)]
                    if readers:
                        self._hoist(node, region, part, items, readers[0])
                self._check_leaks(part)

    def _hoist(self, node: Node, region: _Region, part: list[Any], items: Any, reader: Node) -> None:
        inside = {n for other in region.parts for n in _flat(other)}
        source = _same_tensor(node)
        if source is not None:
            node.replace_all_uses_with(source, delete_user_cb=lambda user: user not in inside)
            if source in inside:
                self._hoist(source, region, part, items, reader)
            return
        size: Any = node.meta.get("val")
        is_size = isinstance(size, torch.SymInt | int)
        if is_size and self.sizes.can_make(size):
            node.replace_all_uses_with(self.sizes.node(size), delete_user_cb=lambda user: user not in inside)
            return
        if not is_size or any(source in inside for source in node.all_input_nodes):
            raise refusal(
                "a value made on one side of a branch, or in a turn of a loop, is read after it by way of Python state",
                self.sites[region.number].where,
                made=source_line(node),
                read=source_line(reader),
                try_="a local variable that both sides set",
            )
        part.remove(node)
        items.insert(items.index(region), node)

    # ---- writing

    def _emit(self, items: Sequence[Any], graph: torch.fx.Graph, env: Env, owner: torch.nn.Module) -> None:
        for item in items:
            if isinstance(item, Node):
                if item.op == "output":
                    graph.output(torch.fx.map_arg(item.args[0], lambda n: env[_unleft(n)])).meta = dict(item.meta)
                else:
                    self._copy(item, graph, env)
            elif item.begin.target is markers.BEGIN_LOOP:
                self._emit_loop(item, graph, env, owner)
            else:
                self._emit_branch(item, graph, env, owner)

    def _copy(self, node: Node, graph: torch.fx.Graph, env: Env) -> Node:
        """Copy a node, and before it what it reads: what a region is given may have been made just after it."""
        if node not in env:
            assert node.target not in markers.MARKERS, f"{node} is read where it is not"
            for source in node.all_input_nodes:
                self._copy(_unleft(source), graph, env)
            env[node] = graph.node_copy(node, lambda n: env[_unleft(n)])
            env[node].meta = dict(node.meta)
        copied: Node = env[node]
        return copied

    def _emit_branch(self, region: _Region, graph: torch.fx.Graph, env: Env, owner: torch.nn.Module) -> None:
        if any(region.aborted):
            self._emit(region.parts[region.aborted.index(False)], graph, env, owner)
            return
        effects = any(has_effect(node) for node in region.nodes())
        if not region.results and not effects:
            return
        pairs = region.sides()
        if self.sites[region.number].is_shortcut and not effects and all(is_cheap(n) for n in region.nodes()):
            self._select(region, graph, env, owner)
            return
        free = _free(region.parts, [value for pair in pairs for value in pair])
        graphs = []
        for side, items in enumerate(region.parts):
            values = [pair[side] for pair in pairs]
            name = f"{'true' if side == 0 else 'false'}_graph_{self.count['branch']}"
            graphs.append(self._graph(name, items, free, values, graph, owner))
        self.count["branch"] += 1
        predicate = self._copy(_unleft(region.begin.args[0]), graph, env)
        operands = tuple(self._copy(node, graph, env) for node in free)
        self._call(COND, (predicate, *graphs, operands), region, graph, env)

    def _select(self, region: _Region, graph: torch.fx.Graph, env: Env, owner: torch.nn.Module) -> None:
        """Compute both sides of an ``and`` or ``or`` of numbers: they cost less than a branch."""
        for part in region.parts:
            self._emit(part, graph, env, owner)
        asked = _unleft(region.begin.args[0])
        predicate = self._copy(asked, graph, env)
        for result, (first, second) in zip(region.results, region.sides(), strict=True):
            a, b = self._copy(first, graph, env), self._copy(second, graph, env)
            call: tuple[Any, tuple[Any, ...]]
            if asked in (first, second):
                call = (aten.logical_or.default, (a, b)) if first is asked else (aten.logical_and.default, (b, a))
            else:
                call = (aten.where.self, (predicate, a, b))
            env[result] = graph.call_function(*call)
            env[result].meta = dict(result.meta)

    def _emit_loop(self, region: _Region, graph: torch.fx.Graph, env: Env, owner: torch.nn.Module) -> None:
        assert region.test is not None
        predicate = _unleft(region.test.args[0])
        body_reads = set(_flat(region.parts[0])) & {
            source for node in _flat(region.parts[1]) for source in node.all_input_nodes
        } | ({*region.following} & set(_flat(region.parts[0])))
        body = [*region.parts[0], *region.parts[1]] if body_reads else region.parts[1]
        free = [n for n in _free([region.parts[0], body], [predicate, *region.following]) if n not in region.variables]
        inputs = [*region.variables, *free]
        number = self.count["loop"]
        self.count["loop"] += 1
        graphs = [
            self._graph(f"while_cond_graph_{number}", region.parts[0], inputs, [predicate], graph, owner),
            self._graph(f"while_body_graph_{number}", body, inputs, region.following, graph, owner),
        ]
        start = tuple(self._copy(_unleft(node.args[0]), graph, env) for node in region.variables)
        self._call(WHILE_LOOP, (*graphs, start, tuple(self._copy(n, graph, env) for n in free)), region, graph, env)

    def _call(self, target: Any, args: tuple[Any, ...], region: _Region, graph: torch.fx.Graph, env: Env) -> None:
        """Add the call and the nodes that take its results apart."""
        call = graph.call_function(target, args)
        file, line, function = self.sites[region.number].where
        call.meta = {key: region.begin.meta[key] for key in ("nn_module_stack",) if key in region.begin.meta}
        text = linecache.getline(file, line).strip()
        call.meta["branch"] = region.number  # stays with its copies, so that what is known of it finds them
        call.meta["stack_trace"] = f'  File "{file}", line {line}, in {function}\n    {text}\n'
        order = region.variables if target is WHILE_LOOP else region.results
        call.meta["val"] = tuple(node.meta["val"] for node in order)
        for result in region.results:
            index = region.variables.index(result.args[0]) if target is WHILE_LOOP else region.results.index(result)  # type: ignore[arg-type]  # it reads its variable
            env[result] = graph.call_function(operator.getitem, (call, index))
            env[result].meta = dict(result.meta)

    def _graph(
        self,
        name: str,
        items: Sequence[Any],
        inputs: Sequence[Node],
        values: Sequence[Node],
        around: torch.fx.Graph,
        owner: torch.nn.Module,
    ) -> Node:
        """Make the graph of one side or body, register it under ``name``, and return the node that reads it."""
        graph, holder = torch.fx.Graph(), torch.nn.Module()
        env: Env = dict(add_placeholders(graph, inputs))
        self._emit(items, graph, env, holder)
        add_results(graph, [env[value] for value in values])
        graph.eliminate_dead_code(is_impure_node=has_effect)
        owner.add_module(name, torch.fx.GraphModule(holder, graph, "Region"))
        return around.get_attr(name)


def _free(parts: Sequence[Sequence[Any]], results: Sequence[Node]) -> list[Node]:
    """Return what some items and results read from outside, in order of first reading."""
    inside = {node for part in parts for node in _flat(part)}
    found: dict[Node, None] = {}
    for part in parts:
        for item in part:
            reads = item.all_input_nodes if isinstance(item, Node) else _reads(item)
            for source in reads:
                found.update(dict.fromkeys(_operands(_unleft(source), inside)))
    for result in results:
        found.update(dict.fromkeys(_operands(result, inside)))
    return list(found)


def _operands(node: Node, inside: set[Node]) -> Iterator[Node]:
    """Yield what a region has to be given for ``node``: torch.cond takes tensors and sizes, and no other number.

    Any other number is computed again inside, from the tensors that it comes from.
    """
    if node in inside:
        return
    if isinstance(node.meta.get("val"), float | bool | torch.SymFloat | torch.SymBool):
        for source in node.all_input_nodes:
            yield from _operands(source, inside)
    else:
        yield node


def _reads(region: _Region) -> list[Node]:
    """Return what a region reads from outside."""
    own = [value for pair in region.sides() for value in pair] if region.begin.target is markers.BEGIN_BRANCH else []
    if region.test is not None:
        own += [_unleft(region.test.args[0]), *region.following]
    starts = [_unleft(node.args[0]) for node in region.variables]
    predicate = region.begin.all_input_nodes
    inner = [node for node in _free(region.parts, own) if node not in region.variables]
    return [*predicate, *starts, *inner]


def _same_tensor(node: Node) -> Node | None:
    """Return the input that ``node`` hands back as it is (``x.to(x.dtype)``), which the trace takes for its result."""
    value, inputs = node.meta.get("val"), node.all_input_nodes
    if "modes" in node.meta:
        return None  # a dropout, which is its own input in one mode only
    source = inputs[0] if inputs and node.op == "call_function" else None
    before = source.meta.get("val") if source is not None else None
    if not isinstance(value, torch.Tensor) or not isinstance(before, torch.Tensor) or value.dtype != before.dtype:
        return None
    same = value.shape == before.shape and value.stride() == before.stride()
    memory = value.untyped_storage()._cdata == before.untyped_storage()._cdata
    return source if same and memory and value.storage_offset() == before.storage_offset() else None


def _is_handed_on(node: Node) -> bool:
    return node.target in (markers.LEAVE, markers.LOOP_NEXT, markers.LOOP_TEST)
