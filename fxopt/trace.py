"""Trace a module with torch.export and hand out a clean functional ATen graph.

Clean means: no in-place op, no metadata assertion or guard call, gradient-mode regions inlined, constants that the
trace copies before use read directly, recurrent layers whole whatever the length of the sequence.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from fxopt.control_flow import drop_trials
from fxopt.control_flow.session import Site
from fxopt.dimensions import Sample
from fxopt.errors import CaptureError, describe
from fxopt.exported_program import exported
from fxopt.functionalize import fake_call, functionalize
from fxopt.grouped_ops import as_grouped_mm
from fxopt.recurrent import RECURRENT_OPERATORS

__all__ = ["Trace", "trace", "unlift"]

aten = torch.ops.aten
_SQUEEZES = (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)


@dataclasses.dataclass
class Trace:
    """A clean graph, the tensors it reads, and what is known of its dynamic sizes.

    Attributes:
        graph: Functional ATen graph; its attribute names are those of the model.
        root: Module that holds every attribute that the graph reads, and the graphs of control flow.
        constants: Tensors that are neither parameter nor buffer of the model, by attribute name.
        ranges: ``{symbol: (min, max or None)}`` of the dynamic sizes.
        names: ``{symbol: user's name}`` where the user gave one.
        training: Whether any module's ``training`` flag was read.
        sites: File, line and function of each branch and loop on values that the graph marks.
        any_sizes: Whether it is for sizes of any value, so that what it does for single rows has to be tried.
    """

    graph: torch.fx.Graph
    root: torch.fx.GraphModule
    constants: dict[str, torch.Tensor]
    ranges: dict[str, tuple[int, int | None]]
    names: dict[str, str]
    training: bool = False
    sites: dict[int, Site] = dataclasses.field(default_factory=dict)
    any_sizes: bool = False


def trace(model: torch.nn.Module, sample: Sample, dynamic_shapes: Any, *, size_one_branches: bool = False) -> Trace:
    """Trace ``model`` in the mode that it is in; the arguments are those of ``exported``.

    Raises:
        CaptureError: the model cannot become one graph; the message names the user's line and the reason, and the
            dynamic sizes that do work if those asked for do not.
    """
    found = exported(model, sample, dynamic_shapes, size_one_branches=size_one_branches)
    traced = unlift(found.program, found.names)
    traced.training, traced.sites, traced.any_sizes = found.training, found.sites, found.any_sizes
    return traced


def unlift(program: torch.export.ExportedProgram, names: dict[str, str] | None = None) -> Trace:
    """Return the clean graph of an exported program, parameters and buffers as attributes."""
    root = program.module(check_guards=False)
    kinds = dict.fromkeys(program.graph_signature.parameters, "parameter")
    kinds |= dict.fromkeys(program.graph_signature.buffers, "buffer")
    ranges = {
        str(symbol): (_bound(interval.lower) or 0, _bound(interval.upper))
        for symbol, interval in program.range_constraints.items()
    }
    graph = root.graph
    _inline_regions(root)
    for node in list(graph.nodes):
        if _is_noise(node):
            graph.erase_node(node)
    drop_trials(graph)
    for module in root.modules():
        if isinstance(module, torch.fx.GraphModule) and module is not root:
            module.graph = functionalize(module.graph, {})
            _squeeze_ones(module.graph)
    graph = functionalize(graph, kinds)
    _squeeze_ones(graph)
    _restore_operators(graph)
    _read_constants_directly(graph)
    _drop_unread(graph)
    constants = {
        str(node.target): _attribute(root, str(node.target))
        for node in graph.nodes
        if node.op == "get_attr" and str(node.target) not in kinds
    }
    constants = {name: item for name, item in constants.items() if isinstance(item, torch.Tensor)}
    return Trace(graph, root, constants, ranges, names or {})


def _bound(limit: Any) -> int | None:
    return int(limit) if limit.is_Integer and limit < 2**60 else None


def _is_noise(node: torch.fx.Node) -> bool:
    if node.op == "call_module":
        return str(node.target) == "_guards_fn"
    return node.op == "call_function" and node.target in (aten._assert_tensor_metadata.default,)


def _inline_regions(root: torch.fx.GraphModule) -> None:
    """Replace gradient-mode and autocast regions by their bodies; a region without gradients detaches its results."""
    higher = torch.ops.higher_order
    for node in list(root.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is higher.wrap_with_set_grad_enabled:
            enabled, body, *operands = node.args
        elif node.target is higher.wrap_with_autocast:
            device, _, active, _, body, *operands = node.args
            if active:
                raise CaptureError(
                    describe(
                        f"the model runs a part under torch.autocast({device!r}), "
                        "which a graph of fixed precision cannot hold",
                        source=node.meta.get("stack_trace", "").strip().splitlines()[-1:] or None,
                        try_="capture the model without autocast, then lower the precision with a half-precision pass",
                    )
                )
            enabled = True
        else:
            continue
        inner = _attribute(root, str(body.target))
        _inline_regions(inner)
        results = _inline(root.graph, node, inner.graph, operands, detach=not enabled)
        _replace_results(root.graph, node, results)
        if not body.users:
            root.graph.erase_node(body)
            delattr(root, str(body.target))


def _inline(
    graph: torch.fx.Graph, at: torch.fx.Node, body: torch.fx.Graph, operands: list[Any], *, detach: bool
) -> Any:
    twins = dict(zip([n for n in body.nodes if n.op == "placeholder"], operands, strict=True))
    with graph.inserting_before(at):
        for node in body.nodes:
            if node.op == "output":
                results = torch.fx.map_arg(node.args[0], lambda old: twins[old])
            elif node.op != "placeholder":
                twin = twins[node] = graph.node_copy(node, lambda old: twins[old])
                twin.meta["without_gradients"] = detach
                if isinstance(twin.target, torch._ops.OpOverload):
                    # The body was traced on its own: only now do its views share memory with the values around it.
                    with torch.no_grad():
                        twin.meta["val"] = fake_call(twin.target, twin.args, twin.kwargs)
        if not detach:
            return results
        return torch.fx.map_arg(results, lambda result: _detached(graph, result))


def _detached(graph: torch.fx.Graph, node: torch.fx.Node) -> torch.fx.Node:
    found = node.meta.get("val")
    if not isinstance(found, torch.Tensor) or not found.is_floating_point():
        return node
    detached = graph.call_function(aten.detach.default, (node,))
    detached.meta = dict(node.meta)
    detached.meta["val"] = fake_call(aten.detach.default, (node,), {})
    return detached


def _replace_results(graph: torch.fx.Graph, region: torch.fx.Node, results: Any) -> None:
    if isinstance(results, torch.fx.Node):
        region.replace_all_uses_with(results)
    else:
        for user in list(region.users):
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
    graph.erase_node(region)


def _read_constants_directly(graph: torch.fx.Graph) -> None:
    """Read a constant instead of a fresh copy of it: in a functional graph nobody can write into it."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in (aten.lift_fresh_copy.default, aten.lift_fresh.default):
            source = node.args[0]
            for user in list(node.users):
                if user.target is aten.detach.default:
                    user.replace_all_uses_with(source)
                    graph.erase_node(user)
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def _squeeze_ones(graph: torch.fx.Graph) -> None:
    """Squeeze the axes of size 1 alone: a dynamic one stays where it is 1 too, so that ranks do not change."""
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in _SQUEEZES:
            continue
        source = node.args[0]
        shape = source.meta["val"].shape
        asked = node.args[1] if len(node.args) > 1 else range(len(shape))
        asked = [asked] if isinstance(asked, int) else asked
        axes = [axis % len(shape) for axis in asked if shape]
        if all(isinstance(shape[axis], int) for axis in axes):
            continue
        ones = [axis for axis in axes if isinstance(shape[axis], int) and shape[axis] == 1]
        if ones:
            node.target, node.args = aten.squeeze.dims, (source, ones)
        else:
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def _restore_operators(graph: torch.fx.Graph) -> None:
    """Put ATen's operators in the place of stand-ins, and fxopt's in that of other libraries' where they are equal."""
    for node in graph.nodes:
        if node.op == "call_function":
            node.target = as_grouped_mm(RECURRENT_OPERATORS.get(node.target, node.target))


def _drop_unread(graph: torch.fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        unread_size = node.op == "call_function" and node.target is aten.sym_size.int
        if not node.users and (node.op == "get_attr" or unread_size):
            graph.erase_node(node)


def _attribute(root: torch.nn.Module, path: str) -> Any:
    found: Any = root
    for part in path.split("."):
        found = getattr(found, part)
    return found
