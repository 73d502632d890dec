"""Graphs as plain JSON values and back: nodes, arguments, symbolic sizes, pytree structures."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch._guards import detect_fake_mode
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils import _pytree as pytree
from torch.utils._sympy import functions
from torch.utils._sympy.value_ranges import ValueRanges

from fxopt import (  # noqa: F401  (for files)
    attention_ops,
    dynamic_ops,
    normalization_ops,
    quantized_ops,
    training_ops,
    weight_only_ops,
)
from fxopt.errors import FileFormatError, describe
from fxopt.graph_module import CapturedModule, Provenance

__all__ = ["Decoder", "Encoder", "read_tree", "write_tree"]

_TORCH_VALUES = (torch.dtype, torch.layout, torch.memory_format)
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
_PYTHON_MODULES = {"_operator": "operator", "math": "math", "torch": "torch", "builtins": "builtins"}


class Encoder:
    """Writes graphs."""

    def graph(self, graph: torch.fx.Graph) -> list[dict[str, Any]]:
        """Return one entry for each node."""
        return [self._node(node) for node in graph.nodes]

    def symbols(self, gm: CapturedModule) -> dict[str, Any]:
        """Return hint and range of every symbol in the graph's sizes."""
        mode = detect_fake_mode([n.meta["val"] for n in gm.graph.nodes if "val" in n.meta])
        if mode is None or mode.shape_env is None:
            return {}
        env = mode.shape_env
        used = {
            symbol for module in gm.modules() if isinstance(module, torch.fx.GraphModule) for symbol in _symbols(module)
        }
        found = {}
        for symbol in sorted(used, key=str):
            hint = (
                env.backed_var_to_val.get(symbol) if hasattr(env, "backed_var_to_val") else env.var_to_val.get(symbol)
            )
            interval = env.var_to_range.get(symbol)
            low = int(interval.lower) if interval is not None and interval.lower.is_Integer else 0
            high = (
                int(interval.upper)
                if interval is not None and interval.upper.is_Integer and interval.upper < 2**60
                else None
            )
            found[str(symbol)] = {"hint": None if hint is None else int(hint), "min": low, "max": high}
        return found

    def item(self, item: Any) -> Any:
        """Return an argument or a value as plain JSON values."""
        if item is None or isinstance(item, bool | str) or (isinstance(item, int) and not isinstance(item, _SYMBOLIC)):
            return item
        if isinstance(item, float):
            return item if math.isfinite(item) else {"float": str(item)}
        if isinstance(item, torch.fx.Node):
            return {"node": item.name}
        if isinstance(item, list | tuple):
            return {"list" if isinstance(item, list) else "tuple": [self.item(part) for part in item]}
        if isinstance(item, slice):
            return {"slice": [self.item(part) for part in (item.start, item.stop, item.step)]}
        if isinstance(item, _TORCH_VALUES):
            return {"torch": str(item).removeprefix("torch.")}
        if isinstance(item, torch.device):
            return {"device": str(item)}
        if isinstance(item, complex):
            return {"complex": [item.real, item.imag]}
        if isinstance(item, torch.Tensor):
            sizes, strides = ([self.item(size) for size in part] for part in (item.shape, item.stride()))
            return {"tensor": [self.item(item.dtype), sizes, strides, str(item.device), item.requires_grad]}
        if isinstance(item, _SYMBOLIC):
            return {"symbolic": str(item.node.expr), "kind": type(item).__name__}
        raise TypeError(f"a graph with an argument of type {type(item).__name__} cannot be saved: {item!r}")

    def _node(self, node: torch.fx.Node) -> dict[str, Any]:
        entry = {
            "name": node.name,
            "op": node.op,
            "target": target_text(node.target),
            "args": self.item(tuple(node.args)),
            "kwargs": {key: self.item(item) for key, item in node.kwargs.items()},
            "val": self.item(node.meta.get("val")),
        }
        if node.meta.get("stack_trace"):
            entry["stack_trace"] = node.meta["stack_trace"]
        if node.meta.get("nn_module_stack"):
            entry["modules"] = [
                [key, path, kind if isinstance(kind, str) else kind.__name__]
                for key, (path, kind) in node.meta["nn_module_stack"].items()
            ]
        if "modes" in node.meta:
            entry["modes"] = {key: [self.item(part) for part in pair] for key, pair in node.meta["modes"].items()}
        if "fxopt" in node.meta:
            entry["made_by"] = [node.meta["fxopt"].pass_name, list(node.meta["fxopt"].sources)]
        return entry


def target_text(target: Any) -> str:
    """Return the text of a call target: ``aten::add.Tensor``, ``higher_order:cond``, ``operator:getitem``, a name."""
    if isinstance(target, str):
        return target
    if isinstance(target, OpOverload):
        return f"{target._schema.name}.{target._overloadname}"
    if isinstance(target, HigherOrderOperator):
        return f"higher_order:{target._name}"
    module = _PYTHON_MODULES.get(getattr(target, "__module__", ""))
    if module is None:
        raise TypeError(f"a graph that calls {target} cannot be saved")
    return f"{module}:{target.__name__}"


def _symbols(module: torch.fx.GraphModule) -> set[Any]:
    found: set[Any] = set()
    for node in module.graph.nodes:
        for leaf in pytree.tree_leaves(node.meta.get("val")):
            sizes = [*leaf.shape, *leaf.stride()] if isinstance(leaf, torch.Tensor) else [leaf]
            for size in sizes:
                if isinstance(size, _SYMBOLIC):
                    found |= size.node.expr.free_symbols
    return found


class Decoder:
    """Reads graphs; makes a shape environment in which the symbols live on.

    Attributes:
        renamed: The new name of each symbol.
    """

    def __init__(self, symbols: dict[str, Any]) -> None:
        env = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)
        self._env = env
        self._known = {name: getattr(functions, name) for name in functions.__all__}
        self._hints: dict[Any, int] = {}
        self.renamed: dict[str, str] = {}
        if symbols:  # torch's compiler comes with it, which takes longer to load than most graphs
            from torch._dynamo.source import ConstantSource
        for name, entry in symbols.items():
            if entry["hint"] is None:
                symbol = env.create_unbacked_symint().node.expr
            else:
                symbol = env.create_symbol(
                    entry["hint"], source=ConstantSource(f"__{name}"), dynamic_dim=DimDynamic.DYNAMIC
                )
                env.var_to_range[symbol] = ValueRanges(entry["min"], sympy.oo if entry["max"] is None else entry["max"])
                self._hints[symbol] = entry["hint"]
            self._known[name] = symbol
            self.renamed[name] = str(symbol)

    def graph(self, entries: list[dict[str, Any]]) -> torch.fx.Graph:
        """Return the graph of these entries."""
        graph = torch.fx.Graph()
        nodes: dict[str, torch.fx.Node] = {}
        for entry in entries:
            args = self.item(entry["args"], nodes)
            kwargs = {key: self.item(item, nodes) for key, item in entry["kwargs"].items()}
            target = entry["target"] if entry["op"] != "call_function" else read_target(entry["target"])
            node = graph.create_node(entry["op"], target, args, kwargs, entry["name"])
            node.name = entry["name"]
            nodes[node.name] = node
            if entry["op"] != "output" and (entry["op"] != "get_attr" or entry["val"] is not None):
                node.meta["val"] = self.item(entry["val"])
            self._restore_meta(node, entry)
        return graph

    def _restore_meta(self, node: torch.fx.Node, entry: dict[str, Any]) -> None:
        if "stack_trace" in entry:
            node.meta["stack_trace"] = entry["stack_trace"]
        if "modules" in entry:
            node.meta["nn_module_stack"] = {key: (path, kind) for key, path, kind in entry["modules"]}
        if "modes" in entry:
            node.meta["modes"] = {key: tuple(self.item(part) for part in pair) for key, pair in entry["modes"].items()}
        if "made_by" in entry:
            node.meta["fxopt"] = Provenance(entry["made_by"][0], tuple(entry["made_by"][1]))

    def item(self, item: Any, nodes: dict[str, torch.fx.Node] | None = None) -> Any:
        """Return the argument or value that was written."""
        if not isinstance(item, dict):
            return item
        (kind, content), *_ = item.items()
        if kind == "node":
            return (nodes or {})[content]
        if kind in ("list", "tuple", "slice"):
            parts = [self.item(part, nodes) for part in content]
            return parts if kind == "list" else tuple(parts) if kind == "tuple" else slice(*parts)
        if kind == "tensor":
            return self._fake(*content)
        readers: dict[str, Callable[[Any], Any]] = {
            "float": float,
            "torch": lambda name: getattr(torch, name),
            "device": torch.device,
            "complex": lambda c: complex(*c),
        }
        if kind in readers:
            return readers[kind](content)
        if kind == "symbolic":
            return self._symbolic(content, item["kind"])
        raise FileFormatError(f"unknown kind of value {kind!r}")

    def _symbolic(self, text: str, kind: str) -> Any:
        expression = sympy.sympify(text, locals=self._known)
        if kind == "SymBool":
            return self._env.create_symboolnode(expression)
        hint = expression.xreplace({symbol: sympy.Integer(value) for symbol, value in self._hints.items()})
        if kind == "SymFloat":
            return self._env.create_symfloatnode(expression, hint=float(hint) if hint.is_number else None)
        return self._env.create_symintnode(expression, hint=int(hint) if hint.is_Integer else None)

    def _fake(self, dtype: Any, sizes: list[Any], strides: list[Any], device: str, requires_grad: bool) -> torch.Tensor:
        with self.mode:
            return torch.empty_strided(
                [self.item(size) for size in sizes], [self.item(stride) for stride in strides],
                dtype=self.item(dtype), device=device, requires_grad=requires_grad,
            )  # fmt: skip


def read_target(text: str) -> Any:
    """Return the call target of a text.

    Raises:
        FileFormatError: the operator does not exist here; its package must be imported first.
    """
    try:
        if "::" in text:
            namespace, _, rest = text.partition("::")
            name, _, overload = rest.partition(".")
            return getattr(getattr(getattr(torch.ops, namespace), name), overload)
        module, _, name = text.partition(":")
        if module == "higher_order":
            return getattr(torch.ops.higher_order, name)
        if module in _PYTHON_MODULES.values():
            return getattr(importlib.import_module(module), name)
    except AttributeError:
        pass
    raise FileFormatError(
        describe(
            f"the saved graph calls {text}, which is not known here",
            try_="import the package that registers it, then load again",
        )
    )


def write_tree(spec: Any) -> Any:
    """Return a pytree structure as plain JSON values; classes of the user's own become dicts and tuples."""
    return _write_tree(pytree.tree_unflatten(list(range(spec.num_leaves)), spec))


def _write_tree(tree: Any) -> Any:
    if isinstance(tree, int):
        return tree
    paths = pytree.tree_flatten_with_path(tree, is_leaf=lambda item: item is not tree)[0]
    keys = [path[0] for path, _ in paths]
    children = [_write_tree(child) for _, child in paths]
    if isinstance(tree, list):
        return {"list": children}
    names = [getattr(key, "key", getattr(key, "name", None)) for key in keys]
    if not isinstance(tree, tuple) and all(isinstance(name, str) for name in names):
        return {"dict": dict(zip(names, children, strict=True))}
    if isinstance(tree, dict):
        return {"pairs": [[name, child] for name, child in zip(names, children, strict=True)]}
    return {"tuple": children}


def read_tree(written: Any) -> Any:
    """Return the pytree structure that :func:`write_tree` wrote."""
    return pytree.tree_structure(_read_tree(written))


def _read_tree(written: Any) -> Any:
    if isinstance(written, int):
        return written
    if "list" in written:
        return [_read_tree(child) for child in written["list"]]
    if "dict" in written:
        return {key: _read_tree(child) for key, child in written["dict"].items()}
    if "pairs" in written:
        return {key: _read_tree(child) for key, child in written["pairs"]}
    return tuple(_read_tree(child) for child in written["tuple"])
