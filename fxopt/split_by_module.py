"""Give modules of the model a graph each again, so that training engines can wrap them one by one.

    before:  y = linear(x, layers.0.weight);  z = relu(y);  u = linear(z, layers.1.weight)
    after:   z = layers.0(x);  u = layers.1(z)        layers.0 and layers.1 are graphs, and modules to wrap

A captured graph is flat: ``fully_shard`` of it alone gathers every parameter at once. Which module's call made a node
stands in its metadata, so the calls are found again, behind passes, too. The same operators run in the same order, and
parameters keep their names.
"""

from __future__ import annotations

import operator

import torch

from fxopt.args import source_line
from fxopt.attributes import get_path, owner_of
from fxopt.effects import is_pure
from fxopt.errors import PassError, describe
from fxopt.graph_module import CapturedModule
from fxopt.live_graph import LiveGraph
from fxopt.name_patterns import names_fitting
from fxopt.ops import UPDATE_BUFFER

__all__ = ["split_by_module"]

Node = torch.fx.Node


def split_by_module(gm: CapturedModule, *patterns: str) -> CapturedModule:
    """Return a graph that calls a graph for each of these modules, to be trained in the place of ``gm``.

    Its tensors are those of ``gm`` under the same names, so that the state of the one fits the other. Passes and export
    are for ``gm``: load the trained state into it.

    Args:
        gm: A captured graph, rewritten by passes or not.
        patterns: Paths of modules, ``"layers.*"``; of modules that lie in one another, the outer one is meant.

    Raises:
        PassError: a pattern fits no module; or a module is called in two places, holds a branch, or shares a parameter
            with the rest of the graph.
    """
    new = gm.clone()
    known = dict.fromkeys(path for node in new.graph.nodes for path in _paths(node))
    fitting = names_fitting(list(known), patterns, of="module with operators in the graph")
    for path in fitting:
        if not any(path.startswith(f"{outer}.") for outer in fitting):
            _split_off(new, path)
    new.recompile()
    return new


def _paths(node: Node) -> list[str]:
    return [path for path, _ in (node.meta.get("nn_module_stack") or {}).values() if path]


def _split_off(gm: CapturedModule, path: str) -> None:
    """Move the operators of one module into a graph under its path, and call that in their place."""
    members = _members(gm.graph, path)
    inside = set(members)
    _check(gm, path, members)
    inputs = dict.fromkeys(n for node in members for n in node.all_input_nodes if n not in inside)
    outputs = [node for node in members if any(user not in inside for user in node.users)]
    graph = torch.fx.Graph()
    twins: dict[Node, Node] = {}
    for source in inputs:
        twins[source] = graph.placeholder(source.name)
        twins[source].meta = {key: source.meta[key] for key in ("val",) if key in source.meta}
    for node in members:
        twins[node] = graph.node_copy(node, lambda old: twins[old])
        if node.op == "get_attr":
            twins[node].target = str(node.target).removeprefix(f"{path}.")
    graph.output(twins[outputs[0]] if len(outputs) == 1 else tuple(twins[node] for node in outputs))
    _put_graph(gm, path, graph)
    with gm.graph.inserting_after(_span(members)[1]):
        call = gm.graph.call_module(path, tuple(inputs))
    values = tuple(node.meta.get("val") for node in outputs)
    call.meta = {"val": values[0] if len(outputs) == 1 else values}
    for index, node in reversed(list(enumerate(outputs))):
        result = call
        if len(outputs) > 1:
            with gm.graph.inserting_after(call):
                result = gm.graph.call_function(operator.getitem, (call, index))
            result.meta = {"val": values[index]}
        node.replace_all_uses_with(result, delete_user_cb=lambda user: user not in inside)
    for node in reversed(members):
        gm.graph.erase_node(node)


def _members(graph: torch.fx.Graph, path: str) -> list[Node]:
    """Return the operators of a module in order, with what they alone make of its tensors: masked weights, casts."""
    found = {node for node in graph.nodes if node.op == "call_function" and path in _paths(node)}
    for node in reversed(graph.nodes):
        is_own = node.op == "get_attr" and str(node.target).startswith(f"{path}.")
        is_nobodys = node.op == "call_function" and not _paths(node) and is_pure(node)
        if (is_own or is_nobodys) and node.users and found.issuperset(node.users):
            found.add(node)
    return [node for node in graph.nodes if node in found]


def _span(members: list[Node]) -> tuple[Node, Node]:
    """Return the first and the last operator. Buffers are written at the end of a graph, which moves with no harm."""
    calls = [node for node in members if node.op == "call_function" and node.target is not UPDATE_BUFFER]
    return calls[0], calls[-1]


def _put_graph(gm: CapturedModule, path: str, graph: torch.fx.Graph) -> None:
    """Make the container under a path, which holds tensors, a module that runs a graph, too."""
    container = gm.get_submodule(path)
    module = LiveGraph(torch.nn.Module(), torch.fx.Graph())
    for held in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training"):
        module.__dict__[held] = container.__dict__[held]
    module.graph = graph
    parent, _, leaf = path.rpartition(".")
    gm.get_submodule(parent)._modules[leaf] = module


def _check(gm: CapturedModule, path: str, members: list[Node]) -> None:
    """Check that one call can take the place of operators, and that it alone reads the module's tensors.

    Raises:
        PassError: it cannot.
    """
    inside = set(members)
    if not any(name.startswith(f"{path}.") for name, _ in gm.named_parameters(remove_duplicate=False)):
        raise _unfit(path, members[0], "it has no parameters")
    own = {id(get_path(gm, str(node.target))) for node in members if node.op == "get_attr"}
    first, last = _span(members)
    for node in gm.graph.nodes:
        if node in inside:
            late = next((source for source in node.all_input_nodes if source not in inside and last < source), None)
            if late is not None:
                raise _unfit(path, node, f"{node.name} reads {late.name}, which is computed behind it")
            if any(source.op == "get_attr" and _is_graph(source) for source in node.all_input_nodes):
                raise _unfit(path, node, "it holds a branch or loop")
        elif node.op == "get_attr":
            if node.users and (str(node.target).startswith(f"{path}.") or id(get_path(gm, str(node.target))) in own):
                raise _unfit(path, next(iter(node.users)), f"the rest of the graph reads its {node.target}")
        elif node.op == "call_function" and first < node < last:
            if not inside.isdisjoint(node.all_input_nodes):
                raise _unfit(path, node, f"{node.name} stands amid it and reads what it computes")
            if not is_pure(node):
                raise _unfit(path, node, f"{node.name} stands amid it, and the order matters")


def _is_graph(node: Node) -> bool:
    return isinstance(get_path(owner_of(node), str(node.target)), torch.nn.Module)


def _unfit(path: str, node: Node, reason: str) -> PassError:
    return PassError(
        describe(
            f"the module {path} cannot have a graph of its own: {reason}",
            source=source_line(node),
            try_="split_by_module with a module around it or inside it, or leave it out",
        )
    )
