"""Put all of one captured graph into another one, which runs it on values of its own.

The calls are made anew: their values are those that follow from the arguments in the graph around, so that dynamic
sizes are the sizes of that graph; each keeps its line, its module (under the name of the whole) and its origin. Tensors
stay the same objects: one that is read in several places is one attribute, and a parameter of a model that is trained
elsewhere, too, is trained in both. The graphs of branches and loops come along.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch._ops import HigherOrderOperator

from fxopt.args import shape_text, source_line, value
from fxopt.attributes import get_path
from fxopt.errors import PassError, describe
from fxopt.functionalize import fake_call
from fxopt.graph_module import CapturedModule
from fxopt.regions import COND, WHILE_LOOP, body_of
from fxopt.rewriter import Rewriter

__all__ = ["Inlined", "inline"]

Node = torch.fx.Node


@dataclasses.dataclass(frozen=True)
class Inlined:
    """What became of an inlined graph.

    Attributes:
        nodes: What each of its nodes is in the graph around: a node, or the number that an input is.
        outputs: What its outputs are there, in order.
        roots: The first part of the name of each attribute that came with it.
    """

    nodes: Mapping[Node, Any]
    outputs: tuple[Any, ...]
    roots: tuple[str, ...]


def inline(
    rw: Rewriter,
    inner: CapturedModule,
    arguments: Mapping[str, Node],
    *,
    before: Node,
    prefix: str,
    tensors: str | None = None,
    why: str,
) -> Inlined:
    """Insert the calls of ``inner``.

    Args:
        rw: Of the graph around.
        inner: The graph to insert; left alone.
        arguments: The value for each of its inputs, by name. Inputs that are no tensors need none.
        before: Where to insert.
        prefix: Put before the names of its nodes, with an underscore, and of its modules, with a dot.
        tensors: Put before the names of its tensors, with a dot; ``prefix`` if not given.
        why: Reason, for the report.

    Raises:
        PassError: an argument has another type or size than the input, or the graph calls something that runs graphs
            and is neither a branch nor a loop.
    """
    _check_arguments(rw, inner, arguments)
    return _Inlining(rw, inner, before, prefix, tensors or prefix, why).run(arguments)


class _Inlining:
    def __init__(self, rw: Rewriter, given: CapturedModule, before: Node, prefix: str, tensors: str, why: str) -> None:
        self.rw, self.given, self.before, self.why = rw, given, before, why
        self.inner = given.clone()  # the graphs inside it move into the graph around
        self.prefix, self.tensors = prefix, tensors
        self.env: dict[Node, Any] = {}
        self.reads: dict[int, Node] = {}
        self.temporary = {
            f"{path}.{name}" if path else name
            for path, module in given.named_modules()
            for name in module._non_persistent_buffers_set
        }

    def run(self, arguments: Mapping[str, Node]) -> Inlined:
        outputs: tuple[Any, ...] = ()
        constants = {spec.name: spec.constant for spec in self.inner.inputs if not spec.is_tensor}
        for node in self.inner.graph.nodes:
            if node.op == "placeholder":
                self.env[node] = constants[node.name] if node.name in constants else arguments[node.name]
            elif node.op == "get_attr":
                self._read(node)
            elif node.op == "output":
                outputs = tuple(self._mapped(node.args[0]))
            else:
                self._call(node)
        roots = {str(node.target).split(".")[0] for node in self.env.values() if _reads_attribute(node)}
        twins = zip(self.given.graph.nodes, self.inner.graph.nodes, strict=True)
        nodes = {node: self.env[twin] for node, twin in twins if twin in self.env}
        return Inlined(nodes, outputs, tuple(sorted(roots)))

    def _read(self, node: Node) -> None:
        tensor = get_path(self.inner, str(node.target))
        if not isinstance(tensor, torch.Tensor):
            return  # the graph of a branch or loop comes with its call, which tells what it gets
        if id(tensor) not in self.reads:
            path = str(node.target)
            self.reads[id(tensor)] = self.rw.share(
                f"{self.tensors}.{path}", tensor, near=self.before, persistent=path not in self.temporary, why=self.why
            )
        self.env[node] = self.reads[id(tensor)]

    def _call(self, node: Node) -> None:
        if isinstance(node.target, HigherOrderOperator) and node.target not in (COND, WHILE_LOOP):
            raise PassError(
                describe(
                    f"{self.rw.pass_name} cannot take a call of {node.target._name} into another graph",
                    source=source_line(node),
                    wanted="operators, branches and loops",
                )
            )
        for read, operands in regions_with_operands(node):
            body = body_of(read)
            _bring_up_to_date(self.rw, body, [_fake(item) for item in self._mapped(operands)], self.before)
            name = f"{self.tensors}_{read.target}".replace(".", "_")
            self.env[read] = self.rw.graph(name, body, near=self.before, why=self.why)
        args, kwargs = self._mapped(node.args), self._mapped(dict(node.kwargs))
        name = f"{self.prefix}_{node.name}".replace(".", "_")
        new = self.rw.copy_call(node, args, kwargs, before=self.before, why=self.why, name=name)
        stack = node.meta.get("nn_module_stack", {})
        outermost = {"": (self.prefix, "")} if "" not in {path for path, _ in stack.values()} else {}
        new.meta["nn_module_stack"] = outermost | {
            f"{self.prefix}.{key}": (f"{self.prefix}.{path}" if path else self.prefix, kind)
            for key, (path, kind) in stack.items()
        }
        self.env[node] = new

    def _mapped(self, item: Any) -> Any:
        return torch.fx.map_arg(item, lambda node: self.env[node])


def regions_with_operands(node: Node) -> Iterator[tuple[Node, Sequence[Any]]]:
    """Yield the reads of the graphs that a branch or loop runs, each with the values that its graph gets."""
    args: Any = node.args
    if node.target is COND:
        yield from ((side, args[3]) for side in args[1:3])
    elif node.target is WHILE_LOOP:
        yield from ((body, [*args[2], *args[3]]) for body in args[:2])


def _bring_up_to_date(rw: Rewriter, body: torch.fx.GraphModule, operands: Sequence[Any], near: Node) -> None:
    """Give the nodes of an inner graph the values that follow from its operands."""
    given = iter(operands)
    for node in body.graph.nodes:
        if node.op == "placeholder":
            node.meta["val"] = next(given)
        elif node.op == "get_attr":
            found = get_path(body, str(node.target))
            if isinstance(found, torch.Tensor):
                node.meta["val"] = rw._fake(found, near)
        elif node.op == "call_function":
            for read, inner in regions_with_operands(node):
                _bring_up_to_date(rw, body_of(read), [_fake(item) for item in inner], near)
            node.meta["val"] = fake_call(node.target, node.args, node.kwargs)


def _fake(item: Any) -> Any:
    return value(item) if isinstance(item, Node) else item


def _reads_attribute(item: Any) -> bool:
    return isinstance(item, Node) and item.op == "get_attr"


# ---- what fits


def _check_arguments(rw: Rewriter, inner: CapturedModule, arguments: Mapping[str, Node]) -> None:
    sizes: dict[str, Any] = {}
    for spec in inner.inputs:
        if not spec.is_tensor:
            continue
        given = value(arguments[spec.name])
        problem = None
        if not isinstance(given, torch.Tensor) or given.dtype != spec.dtype:
            problem = "another element type"
        elif given.ndim != len(spec.shape):
            problem = f"rank {given.ndim} instead of {len(spec.shape)}"
        else:
            problem = next(
                filter(
                    None, (_size_problem(rw, inner, sizes, *pair) for pair in zip(given.shape, spec.shape, strict=True))
                ),
                None,
            )
        if problem is not None:
            raise PassError(
                describe(
                    f"{arguments[spec.name].name} does not fit input {spec.name!r}: {problem}",
                    got=shape_text(given, rw.gm.symbol_names),
                    wanted=str(spec).split(": ", 1)[1],
                    source=source_line(arguments[spec.name]),
                )
            )


def _size_problem(
    rw: Rewriter, inner: CapturedModule, sizes: dict[str, Any], given: Any, wanted: int | str
) -> str | None:
    """Return why a size cannot be given where an input wants ``wanted``, or None."""
    if isinstance(wanted, int):
        if isinstance(given, int):
            return None if given == wanted else f"size {given} instead of {wanted}"
        return f"a dynamic size instead of {wanted}"
    known = sizes.setdefault(wanted, given)
    if str(known) != str(given):
        return f"{wanted} is {known} in one place and {given} in another"
    dimension = inner.dims.get(wanted)
    if dimension is None:
        return None  # an expression of others
    if isinstance(given, int):
        return None if dimension.allows(given) else f"{given} is outside {dimension}"
    outer = next((item for item in rw.gm.dims.values() if item.symbol == str(given)), None)
    if outer is None:
        return None
    below = max(outer.min, 2) >= dimension.min  # whether a graph works with sizes 0 and 1 is not in its bounds
    above = dimension.max is None or (outer.max is not None and outer.max <= dimension.max)
    return None if below and above else f"{outer} is wider than {dimension}"
