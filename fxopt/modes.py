"""One graph for training and evaluation, made from a trace of each.

The two traces are aligned, nodes that correspond become one node, and what differs is recorded:

    a scalar argument      node.meta["modes"] = {"training": (True, False)}, set by train() and eval()
    a value                fxopt.select_mode(train, eval, training)
    an effect of one mode  fxopt.update_buffer(..., active)

So nothing is assumed about which operators have a training flag: dropout, batch norm, the ``dropout_p`` of attention
and a model's own ``if self.training`` are all found by the same comparison, and their values are those of the trace.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload

from fxopt.args import arg, argument_positions, module_path, source_line, source_location
from fxopt.control_flow import markers
from fxopt.effects import is_random
from fxopt.functionalize import fake_call
from fxopt.mode_alignment import REGION_BEGINS, Place, opcodes, places, region_number
from fxopt.ops import SELECT_MODE, UPDATE_BUFFER

__all__ = ["Unmergeable", "merge_modes"]

_HANDED_ON = {markers.LEAVE, markers.MERGE}
_SIDE_ENDS = {markers.OTHER_SIDE: 0, markers.END_BRANCH: 1}


class Unmergeable(Exception):  # noqa: N818  (it steers capture, and never reaches the user)
    """The two traces differ in a way that one graph cannot hold; the text says how."""


def merge_modes(
    first: torch.fx.Graph, second: torch.fx.Graph, *, first_trains: bool, same_tensor: dict[str, str]
) -> torch.fx.Graph:
    """Return one graph for both modes, set to the mode of ``first``.

    Args:
        first: Clean trace of the model in one mode.
        second: Clean trace of it in the other.
        first_trains: Whether ``first`` is the trace of training mode.
        same_tensor: For constants of ``second``: the attribute name to read them by.

    Raises:
        Unmergeable: outputs differ in number or type, or a step happens in one mode in a way that cannot be skipped.
    """
    return _Merger(first, second, first_trains, same_tensor).run()


class _Merger:
    def __init__(
        self, first: torch.fx.Graph, second: torch.fx.Graph, first_trains: bool, same_tensor: dict[str, str]
    ) -> None:
        self.traces = (first, second)
        self.first_trains = first_trains
        self.same_tensor = same_tensor
        self.graph = torch.fx.Graph(tracer_cls=first._tracer_cls)
        self.graph.set_codegen(first._codegen)
        self.merged: tuple[dict[torch.fx.Node, torch.fx.Node], dict[torch.fx.Node, torch.fx.Node]] = ({}, {})
        self.places = places(first) | places(second)
        self.stands: dict[torch.fx.Node, Place] = {}
        self.selected: dict[tuple[torch.fx.Node, torch.fx.Node, Place], torch.fx.Node] = {}
        self.begins: dict[int, torch.fx.Node] = {}
        self.side_ends: dict[tuple[int, int], torch.fx.Node] = {}

    def run(self) -> torch.fx.Graph:
        nodes = [list(trace.nodes) for trace in self.traces]
        keys = [[self._key(node, which) for node in trace] for which, trace in enumerate(nodes)]
        for tag, a0, a1, b0, b1 in opcodes(nodes[0], keys[0], nodes[1], keys[1]):
            if tag == "equal":
                for a, b in zip(nodes[0][a0:a1], nodes[1][b0:b1], strict=True):
                    self._both(a, b)
            else:
                for a in nodes[0][a0:a1]:
                    self._only(a, 0)
                for b in nodes[1][b0:b1]:
                    self._only(b, 1)
        return self.graph

    def _key(self, node: torch.fx.Node, which: int) -> tuple[Any, ...]:
        """Return what a node of one trace has in common with its twin in the other: not its flags, nor its inputs."""
        target, place = str(node.target), self.places[node]
        if node.op == "get_attr":
            return (node.op, self.same_tensor.get(target, target) if which else target)
        if node.op != "call_function":
            return (node.op, target)
        location = source_location(node)
        if location is not None and location[0].startswith("<"):
            location = None  # in code that torch made for one trace
        sizes = tuple(str(item) for item in node.args if _is_size(item))
        if node.target in _HANDED_ON:
            # One mode may hand on more than the other at a line: the counters that batch norm writes in training.
            held: Any = node.meta["val"]
            sizes += (str(held.dtype), str(held.ndim))
        return (node.op, target, module_path(node), location, sizes, place)

    def _both(self, a: torch.fx.Node, b: torch.fx.Node) -> None:
        if a.op == "output":
            self._outputs(a, b)
            return
        modes: dict[str, tuple[Any, Any]] = {}
        x, y = (a.args, a.kwargs), (b.args, b.kwargs)
        if len(a.args) != len(b.args) or set(a.kwargs) != set(b.kwargs):
            x, y = _in_full(a), _in_full(b)
        args = tuple(self._argument(a, i, p, q, modes) for i, (p, q) in enumerate(zip(x[0], y[0], strict=True)))
        kwargs = {key: self._argument(a, key, p, y[1][key], modes) for key, p in x[1].items()}
        node = self.graph.create_node(a.op, a.target, args, kwargs, a.name, a.type)
        node.meta = dict(a.meta)
        if modes:
            node.meta["modes"] = modes
        self.merged[0][a] = self.merged[1][b] = node
        self._note(node, self.places[a])

    def _note(self, node: torch.fx.Node, place: Place) -> None:
        """Remember where a node of the merged graph stands."""
        self.stands[node] = () if node.op == "get_attr" else place
        if node.target in REGION_BEGINS:
            self.begins[region_number(node)] = node
        elif node.target in _SIDE_ENDS:
            self.side_ends[region_number(node), _SIDE_ENDS[node.target]] = node

    def _argument(
        self, node: torch.fx.Node, place: int | str, x: Any, y: Any, modes: dict[str, tuple[Any, Any]]
    ) -> Any:
        if isinstance(x, torch.fx.Node) and isinstance(y, torch.fx.Node):
            value, other = self.merged[0][x], self.merged[1][y]
            if node.target is markers.MERGE and isinstance(place, int):
                return self._side_value(value, other, node, place)
            return self._value(value, other, node, self.places[node])
        if isinstance(x, list | tuple) and isinstance(y, list | tuple) and len(x) == len(y):
            return type(x)(self._argument(node, place, p, q, modes) for p, q in zip(x, y, strict=True))
        if type(x) is type(y) and (x == y or (x != x and y != y)):
            return x
        if isinstance(x, bool | float) and isinstance(y, bool | float) and isinstance(node.target, OpOverload):
            modes[_argument_name(node.target, place)] = (x, y) if self.first_trains else (y, x)
            return x
        raise Unmergeable(f"{node.target} gets {x} in one mode and {y} in the other, at {source_line(node)}")

    def _side_value(self, x: torch.fx.Node, y: torch.fx.Node, merge: torch.fx.Node, side: int) -> torch.fx.Node:
        """Return what one side of a branch hands on; where the modes hand on two values, the side itself selects."""
        if x is y:
            return x
        end = (region_number(merge), side)
        with self.graph.inserting_before(self.side_ends[end]):
            return self._value(_unleft(x), _unleft(y), merge, (*self.places[merge], end))

    def _value(self, x: torch.fx.Node, y: torch.fx.Node, at: torch.fx.Node, place: Place) -> torch.fx.Node:
        if x is y:
            return x
        found = max(self.stands[x], self.stands[y], key=len)
        if place[: len(found)] == found != place:
            # Both stand outside of the region, and so does the choice, for all of the region to read.
            with self.graph.inserting_before(self.begins[place[len(found)][0]]):
                return self._value(x, y, at, found)
        if (x, y, place) not in self.selected:
            a: Any = x.meta.get("val")
            b: Any = y.meta.get("val")
            if isinstance(a, int | torch.SymInt) and isinstance(b, int | torch.SymInt) and str(a) == str(b):
                return x  # one size, computed in two ways; the symbols of both traces are named after the inputs
            tensors = isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
            if not tensors or a.dtype != b.dtype or [str(s) for s in a.shape] != [str(s) for s in b.shape]:
                raise Unmergeable(f"{x.name} and {y.name} differ in type between the two modes, at {source_line(at)}")
            train, evaluation = (x, y) if self.first_trains else (y, x)
            node = self.graph.call_function(SELECT_MODE, (train, evaluation, self.first_trains))
            node.meta = {key: item for key, item in x.meta.items() if key != "modes"}
            node.meta["modes"] = {"training": (True, False)}
            self.stands[node], self.selected[x, y, place] = place, node
        return self.selected[x, y, place]

    def _only(self, node: torch.fx.Node, which: int) -> None:
        """Copy a node that one mode alone has; where it has an effect, the effect happens in that mode alone."""
        trains = self.first_trains == (which == 0)
        if node.op in ("placeholder", "output"):
            raise Unmergeable(f"{node.op} {node.name} exists in one mode only")
        if not trains and is_random(node):
            raise Unmergeable(f"{node.target} draws random numbers in eval mode only, at {source_line(node)}")
        target = node.target
        if node.op == "get_attr" and which == 1:
            target = self.same_tensor.get(str(target), target)
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda old: self.merged[which][old])
        copy = self.graph.create_node(node.op, target, args, kwargs, node.name, node.type)
        copy.meta = {key: item for key, item in node.meta.items() if key != "val"} if which == 1 else dict(node.meta)
        if which == 1 and node.op == "call_function":
            # Values of the second trace belong to another shape environment, and must not be mixed with the first's.
            copy.meta["val"] = fake_call(target, copy.args, copy.kwargs)
        elif which == 1:
            copy.meta["val"] = _same_in(self.traces[0], node.meta.get("val"))
        self._guard_effect(copy, trains, active=which == 0)
        self.merged[which][node] = copy
        self._note(copy, self.places[node])

    def _guard_effect(self, node: torch.fx.Node, trains: bool, active: bool) -> None:
        flag = "active" if node.target is UPDATE_BUFFER else "training" if _has_training(node) else None
        if flag is None:
            return
        position = argument_positions(node.target)[flag][0]
        assert position is not None
        was = node.args[position]
        node.meta["modes"] = {flag: (was, False) if trains else (False, was)}
        node.update_arg(position, was if active else False)

    def _outputs(self, a: torch.fx.Node, b: torch.fx.Node) -> None:
        x: Any = a.args[0]
        y: Any = b.args[0]
        if len(x) != len(y):
            raise Unmergeable(f"the model returns {len(x)} values in one mode and {len(y)} in the other")
        modes: dict[str, tuple[Any, Any]] = {}
        results = tuple(self._argument(a, 0, p, q, modes) for p, q in zip(x, y, strict=True))
        self.graph.output(results).meta = dict(a.meta)


def _unleft(node: torch.fx.Node) -> torch.fx.Node:
    while node.target is markers.LEAVE:
        node = node.all_input_nodes[0]
    return node


def _in_full(node: torch.fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return all arguments of an operator call, those at their default included."""
    if not isinstance(node.target, OpOverload):
        raise Unmergeable(f"{node.target} is called with other arguments in each mode, at {source_line(node)}")
    table = argument_positions(node.target)
    positional = tuple(arg(node, name) for name, (position, _, _) in table.items() if position is not None)
    return positional, {name: arg(node, name) for name, (position, _, _) in table.items() if position is None}


def _is_size(item: Any) -> bool:
    if isinstance(item, list | tuple):
        return all(_is_size(part) for part in item)
    return isinstance(item, int) and not isinstance(item, bool)


def _argument_name(target: OpOverload, place: int | str) -> str:
    return place if isinstance(place, str) else target._schema.arguments[place].name


def _has_training(node: torch.fx.Node) -> bool:
    return (
        node.op == "call_function"
        and isinstance(node.target, OpOverload)
        and "training" in argument_positions(node.target)
    )


def _same_in(graph: torch.fx.Graph, fake: Any) -> Any:
    """Return a fake tensor like ``fake`` in the fake mode of ``graph``: for constants, whose sizes are integers."""
    from torch._guards import detect_fake_mode

    mode = detect_fake_mode([node.meta["val"] for node in graph.nodes if "val" in node.meta])
    if mode is None or not isinstance(fake, torch.Tensor):
        return fake
    with mode:
        return torch.empty_strided(
            fake.shape, fake.stride(), dtype=fake.dtype, device=fake.device, requires_grad=fake.requires_grad
        )
