"""From the captured ATen graph straight to an ONNX model, one operator after the other.

No operator is decomposed unless it has no translation, and no pass over the ONNX graph is needed: what goes in is
clean, and every translation writes what ONNX Runtime can fuse. An operator is translated by, in this order, a function
registered with `translates`, onnxscript's torchlib, its own decomposition in PyTorch.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch._ops import HigherOrderOperator, OpOverload

from fxopt import args
from fxopt.errors import ExportError, FxoptError, describe
from fxopt.export import decompose, finish
from fxopt.export.dtypes import Runtime, onnx_dtype
from fxopt.export.emitter import Emitter, Value
from fxopt.export.origins import WRITTEN_FOR
from fxopt.export.registry import TRANSLATIONS, NotTranslated, Refused
from fxopt.export.sizes import as_size
from fxopt.export.translations import WITHOUT_VALUE
from fxopt.layer_operators import CELLS

__all__ = ["translate"]

_IR_VERSION = 10
_READ_NUMBER = frozenset({torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default})


def translate(
    gm: torch.fx.GraphModule,
    *,
    opset: int,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    symbol_names: Mapping[str, str] | None = None,
    guard_name: str | None = None,
    runtime: Runtime = "ort-cpu",
) -> ir.Model:
    """Return the ONNX model of a captured graph.

    Args:
        gm: An ATen graph whose parameters and buffers are ``get_attr`` nodes and whose nodes carry ``meta["val"]``.
        opset: Version of the ONNX operator set to write.
        input_names: One name for each tensor input; the names of the placeholders if not given.
        output_names: One name for each tensor or number that the graph returns.
        symbol_names: The user's name of each symbolic size, ``{"s77": "batch"}``.
        guard_name: Name of the last output, which says whether all guards of the graph hold; None leaves it out.
        runtime: Whose kernels to write for; see :func:`fxopt.export.to_onnx`.

    Raises:
        ExportError: an operator, a type or a size cannot be written as ONNX; the message names node and source line.
    """
    translator = _Translator(gm, opset, runtime)
    translator.emit.sizes.names.update(symbol_names or {})
    inputs = translator.inputs(input_names, output_names or ())
    results = [leaf for leaf in translator.inline(gm, inputs) if leaf is not None]
    names = None if output_names is None else list(output_names)
    if guard_name is not None and translator.emit.guards:
        results.append(functools.reduce(lambda a, b: translator.emit("And", a, b), translator.emit.guards))
        names = None if names is None else [*names, guard_name]
    return translator.model(inputs, results, names)


class _Translator:
    def __init__(self, gm: torch.fx.GraphModule, opset: int, runtime: Runtime) -> None:
        self.gm = gm
        self.emit = Emitter(opset, runtime)
        self.emit.inline = self.inline
        self._parameters: dict[Any, Value] = {}
        self._sources: dict[str | None, str | None] = {}
        self._named: set[str] = set()
        self._depth = 0

    # -- inputs and outputs --------------------------------------------------------------------------------------

    def inputs(self, names: Sequence[str] | None, reserved: Sequence[str]) -> list[Any]:
        """Return one entry for each placeholder: a value for a tensor, the constant for anything else."""
        placeholders = [node for node in self.gm.graph.nodes if node.op == "placeholder"]
        tensors = [node for node in placeholders if _is_runtime_value(node.meta.get("val"))]
        if names is not None and len(names) != len(tensors):
            raise ExportError(
                f"input_names has {len(names)} names for {len(tensors)} inputs: {', '.join(n.name for n in tensors)}"
            )
        chosen = dict(zip(tensors, names or [node.name for node in tensors], strict=True))
        for name in (*chosen.values(), *reserved):
            if not name:
                raise ExportError("an input or output name is empty")
            if self.emit.unique(name) != name:
                raise ExportError(f"the name {name!r} is given to two inputs or outputs; ONNX needs different ones")
        entries = [self._input(node, chosen[node]) if node in chosen else node.meta.get("val") for node in placeholders]
        for entry, node in zip(entries, placeholders, strict=True):
            if isinstance(entry, ir.Value) and entry.meta["dims"]:
                self.emit.sizes.learn_solved(entry, entry.meta["dims"])
            elif isinstance(entry, ir.Value) and isinstance(node.meta["val"], torch.SymInt):
                self.emit.sizes.learn_number(entry, as_size(node.meta["val"]))
        return entries

    def _input(self, node: torch.fx.Node, name: str) -> Value:
        held = node.meta["val"]
        value = ir.Value(name=name)
        value.meta["named"] = True
        if isinstance(held, torch.Tensor):
            self._describe(value, held)
        else:
            value.type = ir.TensorType(ir.DataType.INT64 if isinstance(held, torch.SymInt) else ir.DataType.DOUBLE)
            self.emit.set_dims(value, ())
        return value

    def model(self, inputs: Sequence[Any], results: Sequence[Any], names: Sequence[str] | None) -> ir.Model:
        """Return the model of what was emitted."""
        values = [self.emit.as_value(result) for result in results]
        if names is not None and len(names) != len(values):
            raise ExportError(f"output_names has {len(names)} names for {len(values)} outputs")
        outputs = self.emit.own_outputs(values)
        graph_inputs = [value for value in inputs if isinstance(value, ir.Value)]
        for value, name in zip(outputs, names or (), strict=bool(names)):
            value.name = name
        graph = ir.Graph(
            graph_inputs,
            outputs,
            nodes=self.emit.scope.nodes,
            initializers=list(self.emit.initializers.values()),
            opset_imports={"": self.emit.opset},
            name=type(self.gm).__name__,
        )
        finish.finish(graph)
        graph.opset_imports.update(_other_domains(graph))
        return ir.Model(graph, ir_version=_IR_VERSION, producer_name="fxopt")

    # -- graphs --------------------------------------------------------------------------------------------------

    def inline(self, gm: torch.fx.GraphModule, operands: Sequence[Any]) -> list[Any]:
        """Translate ``gm`` into the current scope with its placeholders bound to ``operands``; return its outputs."""
        env: dict[torch.fx.Node, Any] = {}
        remaining = iter(operands)
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                env[node] = self._bind_placeholder(node, next(remaining))
            elif node.op == "get_attr":
                env[node] = self._attribute(gm, node)
            elif node.op == "call_function":
                env[node] = self._call(node, env)
            elif node.op == "output":
                found = _lookup(node.args[0], env)
                return list(found) if isinstance(found, tuple | list) else [found]
            else:
                raise self._error(node, f"the graph holds a {node.op} node", "capture the model with fxopt.capture")
        return []

    def _bind_placeholder(self, node: torch.fx.Node, operand: Any) -> Any:
        held = node.meta.get("val")
        if isinstance(operand, ir.Value) and isinstance(held, torch.Tensor):
            self.emit.sizes.learn(operand, [as_size(size) for size in held.shape])
        elif isinstance(held, torch.SymInt | torch.SymFloat | torch.SymBool):
            inner = as_size(held)
            if isinstance(operand, ir.Value):
                self.emit.sizes.learn_number(operand, inner)
            elif inner != operand:
                self.emit.sizes.learn_number(self.emit.as_value(operand), inner)
            return inner
        return operand

    def _attribute(self, gm: torch.fx.GraphModule, node: torch.fx.Node) -> Any:
        found: Any = gm
        for part in str(node.target).split("."):
            found = getattr(found, part)
        if not isinstance(found, torch.Tensor):
            return found
        key: Any = (found.data_ptr(), found.dtype, tuple(found.shape), found.stride())
        if found.numel() == 0 or found.is_meta:
            key = id(found)
        if key not in self._parameters:
            self._parameters[key] = self.emit.initializer(str(node.target), found)
        return self._parameters[key]

    # -- nodes ---------------------------------------------------------------------------------------------------

    def _call(self, node: torch.fx.Node, env: Mapping[torch.fx.Node, Any]) -> Any:
        held = node.meta.get("val")
        target = node.target
        if target is operator.getitem:
            container, index = _lookup(node.args, env)
            if container[index] is None and node.users:
                raise self._error(
                    node, f"result {index} of {node.args[0]} has no ONNX translation", "do not use that result"
                )
            return container[index]
        if isinstance(held, torch.SymInt | torch.SymFloat | torch.SymBool | bool | int | float):
            if target in _READ_NUMBER:
                self.emit.begin(node, self._metadata(node))
                self.emit.sizes.learn_number(_lookup(node.args[0], env), as_size(held))
            return as_size(held)
        if target is torch.ops.aten.size.default:  # all sizes at once, as decompositions of torch 2.13 ask for them
            return [as_size(size) for size in held or ()]
        if target in WITHOUT_VALUE:
            return None
        if self._depth == 0:
            self.emit.begin(node, self._metadata(node))
        else:
            self.emit.begin(node)
        first = len(self.emit.scope.nodes)
        try:
            result = self._translate(node, env)
            return self._accept(node, result, held, {id(made) for made in self.emit.scope.nodes[first:]})
        except FxoptError:
            raise
        except Exception as error:
            error.add_note(f"while exporting {node.format_node()}\n  at {args.source_line(node) or 'an unknown line'}")
            raise

    def _translate(self, node: torch.fx.Node, env: Mapping[torch.fx.Node, Any]) -> Any:
        reasons: list[str] = []
        for attempt in self._attempts(node):
            try:
                with self.emit.scope.attempt():
                    return attempt(node, env)
            except NotTranslated as reason:
                reasons.append(str(reason))
            except Refused as reason:
                raise self._error(node, f"{node.target} cannot be exported: {reason}", None) from None
        raise self._error(
            node,
            f"{node.target} has no ONNX translation",
            f"register one with @fxopt.export.translates(torch.ops.{node.target}), "
            "or write that line with other operators",
            reasons,
        )

    def _attempts(self, node: torch.fx.Node) -> list[Callable[[torch.fx.Node, Mapping[torch.fx.Node, Any]], Any]]:
        if isinstance(node.target, HigherOrderOperator):
            return [self._registered]
        return [self._registered, self._torchlib, self._decomposed]

    def _registered(self, node: torch.fx.Node, env: Mapping[torch.fx.Node, Any]) -> Any:
        translation = TRANSLATIONS.get(node.target)
        if translation is None:
            raise NotTranslated("no translation is registered")
        if isinstance(node.target, OpOverload):
            return translation(self.emit, *bound_arguments(node, env))
        return translation(self.emit, *_lookup(node.args, env), **_lookup(node.kwargs, env))

    def _torchlib(self, node: torch.fx.Node, env: Mapping[torch.fx.Node, Any]) -> Any:
        if not isinstance(node.target, OpOverload):
            raise NotTranslated(f"{node.target} is not an ATen operator")
        from fxopt.export import torchlib  # onnxscript is slow to load, and few files need it

        return torchlib.translate(self.emit, node.target, bound_arguments(node, env))

    def _decomposed(self, node: torch.fx.Node, env: Mapping[torch.fx.Node, Any]) -> Any:
        inner, leaves = decompose.decompose(node)
        self._depth += 1
        try:
            results = self.inline(inner, [_lookup(leaf, env) for leaf in leaves])
        finally:
            self._depth -= 1
            self.emit.begin(node)
        return results[0] if isinstance(node.meta["val"], torch.Tensor) else tuple(results)

    def _accept(self, node: torch.fx.Node, result: Any, held: Any, made: set[int]) -> Any:
        """Check what a translation returned against what the node yields, and name it after the node."""
        if isinstance(held, torch.Tensor):
            return self._accept_value(node, result, held, node.name, made)
        if isinstance(held, tuple | list):
            if not isinstance(result, tuple | list) or len(result) < len(held):
                raise TypeError(f"the translation of {node.target} returned {result!r} for {len(held)} results")
            return tuple(
                self._accept_value(node, value, one, f"{node.name}.{i}", made)
                if isinstance(value, ir.Value) and isinstance(one, torch.Tensor)
                else value
                for i, (value, one) in enumerate(zip(result, held, strict=False))
            )
        return result

    def _accept_value(self, node: torch.fx.Node, value: Any, held: torch.Tensor, name: str, made: set[int]) -> Value:
        if not isinstance(value, ir.Value):
            raise TypeError(f"the translation of {node.target} returned {type(value).__name__}, not a value")
        producer = value.producer()
        if "named" not in value.meta and producer is not None and id(producer) in made and self._depth == 0:
            value.name, value.meta["named"] = self.emit.unique(name), True
            if node.name not in self._named:  # the first result's producer is the node's namesake
                producer.name = node.name
                self._named.add(node.name)
        if value.dtype is not None and value.dtype != onnx_dtype(held.dtype):
            raise TypeError(f"the translation of {node.target} yields {value.dtype.name} instead of {held.dtype}")
        self._describe(value, held)
        return value

    def _describe(self, value: Value, held: torch.Tensor) -> None:
        if value.type is None:
            value.type = ir.TensorType(onnx_dtype(held.dtype))
        if "dims" not in value.meta:
            self.emit.set_dims(value, [as_size(size) for size in held.shape])
        self.emit.sizes.learn(value, value.meta["dims"])

    # -- provenance and errors -----------------------------------------------------------------------------------

    def _metadata(self, node: torch.fx.Node) -> dict[str, str]:
        trace = node.meta.get("stack_trace")
        if trace not in self._sources:
            self._sources[trace] = args.source_line(node)
        made_by = node.meta.get("fxopt")
        rows = {
            "fxopt.node": node.name,
            "fxopt.module": args.module_path(node),
            "fxopt.source": self._sources[trace],
            "fxopt.pass": getattr(made_by, "pass_name", None),
            WRITTEN_FOR: "recurrent" if node.target in CELLS else None,
        }
        return {key: row for key, row in rows.items() if row}

    def _error(self, node: torch.fx.Node, what: str, advice: str | None, reasons: Sequence[str] = ()) -> ExportError:
        return ExportError(
            describe(
                what,
                node=node.name,
                module=args.module_path(node) or "(the model itself)",
                source=args.source_line(node) or "unknown",
                tried="; ".join(reasons) or None,
                try_=advice,
            )
        )


def _other_domains(graph: ir.Graph) -> dict[str, int]:
    """Return the domains beside ONNX's own that nodes of the graph, and of the graphs inside it, are of; each at 1."""
    return {node.domain: 1 for node in ir.traversal.RecursiveGraphIterator(graph) if node.domain}


def bound_arguments(node: torch.fx.Node, env: Mapping[torch.fx.Node, Any]) -> list[Any]:
    """Return every argument of the schema, in order: what ``env`` has for nodes, defaults filled in."""
    assert isinstance(node.target, OpOverload)
    found: list[Any] = []
    for position, argument in enumerate(node.target._schema.arguments):
        if not argument.kwarg_only and position < len(node.args):
            given = node.args[position]
        elif argument.name in node.kwargs:
            given = node.kwargs[argument.name]
        else:
            given = argument.default_value
        found.append(_lookup(given, env))
    return found


def _lookup(held: Any, env: Mapping[torch.fx.Node, Any]) -> Any:
    """Return ``held`` with every node in it replaced by what ``env`` has for it."""
    if isinstance(held, torch.fx.Node):
        return env[held]
    if isinstance(held, tuple | list):
        return (
            [_lookup(item, env) for item in held]
            if isinstance(held, list)
            else tuple(_lookup(item, env) for item in held)
        )
    if isinstance(held, dict):
        return {key: _lookup(item, env) for key, item in held.items()}
    return as_size(held)


def _is_runtime_value(held: Any) -> bool:
    return isinstance(held, torch.Tensor | torch.SymInt | torch.SymFloat)
