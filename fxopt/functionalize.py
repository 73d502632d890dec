"""Make a captured graph free of in-place ops, or say by name and line why that is impossible.

    before:  a = linear(x, w, b);  v = slice(a, 1, 0, 2);  v_ = add_(v, 1);  y = relu(a)
    after:   a = linear(x, w, b);  v = slice(a, 1, 0, 2);  s = add(v, 1)
             a2 = slice_scatter(a, s, 1, 0, 2);  y = relu(a2)

Which values share memory is not guessed from operator names: the fake tensors of the trace know it (``reshape`` is a
view or a copy, ``dropout`` in evaluation is its own input). A write into a view is carried to its base by the inverse
of each view op, and other views of that base are taken again from the new base when they are next used.

Writes into buffers become one ``fxopt.update_buffer`` at the end. Writes into inputs and parameters are refused.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef

from fxopt.args import arg, source_line
from fxopt.axes_in_place import as_views, refusal, storage_of
from fxopt.effects import is_in_place
from fxopt.functional_regions import RegionWrites
from fxopt.ops import UPDATE_BUFFER
from fxopt.recurrent import shape_only
from fxopt.regions import COND, WHILE_LOOP, region_value
from fxopt.view_inverses import PART_INVERSES, VIEW_INVERSES

__all__ = ["functionalize"]

aten = torch.ops.aten
_METADATA_ONLY = {"as_strided_", "resize_", "set_"}
_FUNCTIONAL_FORM = {
    ("normal_", "default"): ("normal_functional", "default"),
    ("bernoulli_", "float"): ("bernoulli", "p"),
    ("floor_divide_", "Tensor"): ("floor_divide", "default"),
    ("pow_", "Tensor"): ("pow", "Tensor_Tensor"),
    ("float_power_", "Tensor"): ("float_power", "Tensor_Tensor"),
    ("pow_", "Scalar"): ("pow", "Tensor_Scalar"),
    ("float_power_", "Scalar"): ("float_power", "Tensor_Scalar"),
    ("__ilshift__", "Tensor"): ("__lshift__", "Tensor"),
    ("__ilshift__", "Scalar"): ("__lshift__", "Scalar"),
    ("__irshift__", "Tensor"): ("__rshift__", "Tensor"),
    ("__irshift__", "Scalar"): ("__rshift__", "Scalar"),
    ("__iand__", "Tensor"): ("__and__", "Tensor"),
    ("__iand__", "Scalar"): ("__and__", "Scalar"),
    ("__ior__", "Tensor"): ("__or__", "Tensor"),
    ("__ior__", "Scalar"): ("__or__", "Scalar"),
    ("__ixor__", "Tensor"): ("__xor__", "Tensor"),
    ("__ixor__", "Scalar"): ("__xor__", "Scalar"),
}
_SAME_ELEMENTS = {
    "aten::" + name
    for name in (
        "alias", "contiguous", "dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout", "lift_fresh",
        "to", "type_as", "positive", "expand_as", "clone", "rrelu",
    )
}  # fmt: skip
_RESHAPING = {
    "aten::" + name
    for name in (
        "view",
        "reshape",
        "flatten",
        "unflatten",
        "unsqueeze",
        "squeeze",
        "view_as",
        "reshape_as",
        "ravel",
        "_unsafe_view",
    )
}


def functionalize(graph: torch.fx.Graph, kinds: dict[str, str]) -> torch.fx.Graph:
    """Return the functional form of ``graph``; the graph itself if nothing in it writes.

    Args:
        graph: ATen graph with parameters and buffers as ``get_attr`` nodes, each node with its fake value.
        kinds: Kind of every tensor attribute: ``{"bn.running_mean": "buffer", "w": "parameter", "k": "constant"}``.

    Raises:
        CaptureError: an input or a parameter is written, or a view is that has no inverse (``expand``, ``as_strided``).
    """
    as_views(graph)
    if not any(is_in_place(node.target) for node in graph.nodes if node.op == "call_function"):
        return graph
    return Functionalizer(graph, kinds).run()


class Functionalizer:
    """One run over a graph. ``new`` maps old nodes to the nodes of the new graph that hold their *current* value."""

    refusal = staticmethod(refusal)

    def __init__(self, graph: torch.fx.Graph, kinds: dict[str, str]) -> None:
        self.old = graph
        self.kinds = kinds
        self.graph = torch.fx.Graph(tracer_cls=graph._tracer_cls)
        self.graph.set_codegen(graph._codegen)
        self.new: dict[torch.fx.Node, torch.fx.Node] = {}
        self.base_of: dict[torch.fx.Node, torch.fx.Node] = {}
        self.parent_of: dict[torch.fx.Node, torch.fx.Node] = {}
        self.version: dict[torch.fx.Node, int] = {}
        self.clock = itertools.count(1)  # one for all: the sides of a branch must not count alike
        self.seen: dict[torch.fx.Node, int] = {}
        self.owner: dict[StorageWeakRef, torch.fx.Node] = {}
        self.written: dict[torch.fx.Node, torch.fx.Node] = {}
        self.written_at: dict[torch.fx.Node, torch.fx.Node] = {}
        self.regions = RegionWrites(self)

    def run(self) -> torch.fx.Graph:
        for node in self.old.nodes:
            if node.op == "output":
                self._write_buffers()
                self.graph.output(torch.fx.map_arg(node.args[0], self.current)).meta = dict(node.meta)
            elif node.op == "call_function" and is_in_place(node.target):
                self._mutate(node)
            elif not self.regions.copy(node):
                self.copy_plainly(node)
        return self.graph

    def copy_plainly(self, node: torch.fx.Node) -> None:
        """Copy a node that writes nothing."""
        self.new[node] = self.graph.node_copy(node, self.current)
        self.new[node].meta = dict(node.meta)
        self._track(node)

    def _track(self, node: torch.fx.Node) -> None:
        """Find the value whose memory ``node`` shares, and the argument through which it does."""
        base = node
        storage = storage_of(node)
        if storage is not None:
            is_list = not isinstance(node.meta["val"], torch.Tensor)
            # A fresh tuple of results owns nothing: each of its parts does, when it is taken out.
            if node.target is aten.lift_fresh_copy.default:
                self.owner[storage] = node  # a copy by definition, though its fake value shares the constant's memory
            base = self.owner.get(storage, node) if is_list else self.owner.setdefault(storage, node)
        self.base_of[node] = base
        self.version.setdefault(base, 0)
        self.seen[node] = self.version[base]
        if base is not node:
            parents = [n for n in node.all_input_nodes if self.base_of.get(n) is base]
            self.parent_of[node] = parents[0] if parents else base

    def current(self, node: torch.fx.Node) -> torch.fx.Node:
        """Return the node of the new graph with the value of ``node`` after all writes so far."""
        base = self.base_of.get(node, node)
        if self.seen.get(node, 0) == self.version.get(base, 0) or node not in self.parent_of:
            return self.new[node]
        parent = self.parent_of[node]
        fresh = self.current(parent)
        source = self._view(node)
        if source is None:
            self.new[node] = fresh
        else:
            twins = {n: fresh if n is parent else self.current(n) for n in source.all_input_nodes}
            self.new[node] = self.graph.node_copy(source, lambda old: twins[old])
            self.new[node].meta = dict(source.meta)
        self.seen[node] = self.version[base]
        return self.new[node]

    def _view(self, node: torch.fx.Node) -> torch.fx.Node | None:
        """Return the op that makes this view of its parent, or None if it is the parent itself (an in-place result)."""
        return None if is_in_place(node.target) else node

    def _mutate(self, node: torch.fx.Node) -> None:
        target: Any = node.target
        name = target._schema.name.removeprefix("aten::")
        mutated = [a.name for a in target._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        first = target._schema.arguments[0].name
        if (
            not target._schema.name.startswith("aten::")
            or mutated != [first]
            or name in _METADATA_ONLY
            or not name.endswith("_")
        ):
            raise self.refusal(
                node,
                f"{target} writes into {', '.join(mutated) or 'its arguments'} in a way that has no functional form",
            )
        victim = arg(node, first)
        value = self._functional_value(node, victim, name)
        self.write(victim, value, node)
        self.new[node] = value
        self.base_of[node] = self.base_of[victim]
        self.parent_of[node] = victim
        self.seen[node] = self.version[self.base_of[node]]
        self.new[victim] = value
        self.seen[victim] = self.seen[node]

    def _functional_value(self, node: torch.fx.Node, victim: torch.fx.Node, name: str) -> torch.fx.Node:
        like = victim.meta["val"]
        if name in ("copy_", "fill_", "zero_"):
            value: Any = arg(node, "src") if name == "copy_" else arg(node, "value") if name == "fill_" else 0
            return self._filled(node, victim, value)
        target: Any = node.target
        suffix = target._overloadname
        packet_name, suffix = _FUNCTIONAL_FORM.get((name, suffix), (name[:-1], suffix))
        overload = getattr(getattr(aten, packet_name, None), suffix, None)
        if overload is None or is_in_place(overload):
            raise self.refusal(node, f"{node.target} has no functional form")
        args = torch.fx.map_arg(node.args, self.current)
        kwargs = torch.fx.map_arg(node.kwargs, self.current)
        for argument in overload._schema.arguments[len(args) :]:
            # What the in-place form may leave out, the other may ask for: the 0.5 of bernoulli_().
            if argument.name not in kwargs and not argument.has_default_value() and not argument.kwarg_only:
                args = (*args, arg(node, argument.name))
        call = self.call(node, overload, args, kwargs)
        if call.meta["val"].dtype != like.dtype:
            call = self.call(node, aten.to.dtype, (call, like.dtype))
        return call

    def _filled(self, node: torch.fx.Node, victim: torch.fx.Node, value: Any) -> torch.fx.Node:
        """Return ``value`` (a node or a number) with the shape and element type of ``victim``."""
        like = victim.meta["val"]
        if not isinstance(value, torch.fx.Node):
            return self.call(node, aten.full_like.default, (self.current(victim), value))
        source = self.current(value)
        if source.meta["val"].dtype != like.dtype:
            source = self.call(node, aten.to.dtype, (source, like.dtype))
        if source.meta["val"].shape != like.shape:
            source = self.call(node, aten.expand_as.default, (source, self.current(victim)))
        return source

    def write(self, victim: torch.fx.Node, value: torch.fx.Node, at: torch.fx.Node) -> None:
        """Make ``value`` the content of ``victim``, up to the base whose memory it is."""
        base = self.base_of[victim]
        while victim is not base:
            parent = self.parent_of[victim]
            view = self._view(victim)
            if view is not None and view.target is operator.getitem:
                value, parent = self._put_part(view, parent, value, at), arg(parent, "self")
            elif view is not None:
                value = self._scatter(view, parent, value, at)
            victim = parent
        self._check_writable(base, at)
        self.new[base] = value
        self.version[base] = next(self.clock)
        self.seen[base] = self.version[base]
        self.written_at[base] = at
        if base.op == "get_attr":
            self.written[base] = at

    def _put_part(
        self, part: torch.fx.Node, parts: torch.fx.Node, value: torch.fx.Node, at: torch.fx.Node
    ) -> torch.fx.Node:
        """Return what was split into ``parts``, with ``value`` in the place of one of them."""
        inverse = PART_INVERSES.get(_schema_name(parts))
        if inverse is None:
            raise self.refusal(
                at, f"it writes into a result of {parts.target}, which has no inverse", view=source_line(parts)
            )
        index = part.args[1]
        assert isinstance(index, int)
        return inverse(self, parts, index, value, at)

    def _scatter(
        self, view: torch.fx.Node, parent: torch.fx.Node, value: torch.fx.Node, at: torch.fx.Node
    ) -> torch.fx.Node:
        """Return the parent with ``value`` in the place that ``view`` looks at."""
        name = _schema_name(view)
        if name in _SAME_ELEMENTS and view.meta["val"].shape == parent.meta["val"].shape:
            return value
        if name in _RESHAPING:
            return self.call(at, aten.reshape.default, (value, self._sizes(parent, at)))
        inverse_view = VIEW_INVERSES.get(name)
        if inverse_view is None:
            raise self.refusal(
                at, f"it writes into a view made by {view.target}, which has no inverse", view=source_line(view)
            )
        return inverse_view(self, view, parent, value, at)

    def _sizes(self, node: torch.fx.Node, at: torch.fx.Node) -> list[Any]:
        """Return the sizes of a value as arguments: integers, or sym_size nodes for dynamic ones."""
        return [
            size if isinstance(size, int) else self.call(at, aten.sym_size.int, (self.current(node), axis))
            for axis, size in enumerate(node.meta["val"].shape)
        ]

    def call(self, at: torch.fx.Node, target: Any, args: Any, kwargs: Any = None) -> torch.fx.Node:
        """Add a call with its fake value, in the place that ``at`` has in the model."""
        node = self.graph.call_function(target, tuple(args), dict(kwargs or {}))
        node.meta = {key: at.meta[key] for key in ("stack_trace", "nn_module_stack", "torch_fn") if key in at.meta}
        node.meta["val"] = fake_call(target, node.args, node.kwargs)
        return node

    def _check_writable(self, base: torch.fx.Node, at: torch.fx.Node) -> None:
        if base.op == "placeholder":
            raise self.refusal(at, f"it writes into the model's input {base.name!r}, and the caller would see that")
        hidden = at.meta.get("without_gradients") and not base.meta.get("without_gradients")
        if hidden and base.op == "call_function" and base.meta["val"].is_floating_point():
            raise self.refusal(at, f"it writes without gradients into {base.name!r}, which gradients flow through")
        if base.op == "get_attr" and self.kinds.get(str(base.target)) == "parameter":
            raise self.refusal(at, f"it writes into the parameter {base.target!r}, which only an optimizer may")
        if base.op == "get_attr" and self.kinds.get(str(base.target)) != "buffer":
            raise self.refusal(
                at, f"it writes into the tensor {base.target!r}; register it as a buffer, so that it is saved"
            )

    def _write_buffers(self) -> None:
        for base, at in self.written.items():
            target = self.graph.get_attr(str(base.target))
            target.meta = dict(base.meta)
            update = self.call(at, UPDATE_BUFFER, (target, self.new[base], True))
            update.meta["val"] = None


def _schema_name(node: torch.fx.Node) -> str:
    return node.target._schema.name if isinstance(node.target, OpOverload) else ""


def same_value_type(old: Any, new: Any) -> bool:
    """Return whether two nodes yield tensors of one type, shape and layout, so that readers cannot tell them apart."""
    a, b = (item.meta.get("val") if isinstance(item, torch.fx.Node) else None for item in (old, new))
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor) or a.dtype != b.dtype:
        return False
    # As text: comparing symbolic sizes would tie them to what they are now.
    return [str(size) for size in (*a.shape, *a.stride())] == [str(size) for size in (*b.shape, *b.stride())]


def fake_call(target: Any, args: Any, kwargs: Any) -> Any:
    """Return the fake value of calling ``target`` on nodes: shapes and element types without computing."""
    if target is COND or target is WHILE_LOOP:
        return region_value(target, args)
    nodes: list[torch.fx.Node] = []
    fakes = torch.fx.map_arg((args, kwargs), lambda node: nodes.append(node) or node.meta["val"])  # type: ignore[func-returns-value]  # None, so that `or` goes on
    return fake_result(target, fakes[0], fakes[1], nodes[0].graph if nodes else None)


def fake_result(target: Any, args: Any, kwargs: Any, graph: torch.fx.Graph | None) -> Any:
    """Return the fake value of calling ``target`` on fake values.

    Args:
        target: An operator.
        args: Its arguments, fake values in place of nodes.
        kwargs: Its keyword arguments.
        graph: Where to look for the fake mode if all of these are sizes, which must not become plain numbers.
    """
    target = shape_only(target)
    mode = detect_fake_mode((args, kwargs)) or (None if graph is None else fake_mode_of(graph))
    if mode is None:
        return target(*args, **kwargs)
    # Sizes that depend on values are new symbols each time, which torch's next trace must not look for in its results.
    unclaimed = mode.shape_env.ignore_fresh_unbacked_symbols() if mode.shape_env else contextlib.nullcontext()
    # Without torch's Python kernels some operators, such as pad, would tie a dynamic size to what it is now.
    with mode, enable_python_dispatcher(), unclaimed:
        return target(*args, **kwargs)


def fake_mode_of(graph: torch.fx.Graph) -> Any:
    """Return the fake mode of the graph's values, or None; a call of sizes alone has no tensor to tell it."""
    for node in graph.nodes:
        mode = detect_fake_mode(node.meta.get("val"))
        if mode is not None:
            return mode
    return None
