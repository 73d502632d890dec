"""What operators do about element types: which have a form in half precision, which only move elements."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from fxopt.args import argument_positions
from fxopt.attention_ops import MULTI_HEAD_ATTENTION
from fxopt.effects import has_effect, is_random
from fxopt.functionalize import fake_result
from fxopt.graph_module import graph_modules
from fxopt.grouped_ops import GROUPED_MM
from fxopt.moves import base_name, name_of
from fxopt.normalization_ops import MASKED_GROUP_NORM, MASKED_LAYER_NORM
from fxopt.ops import SELECT_MODE
from fxopt.regions import COND, WHILE_LOOP, body_of
from fxopt.rewriter import Rewriter

__all__ = [
    "float_operands",
    "half_candidates",
    "holds_float",
    "is_float",
    "is_like",
    "kept_operands",
    "makes_floats",
    "refusal",
    "takes_numbers",
    "with_dtype",
]  # fmt: skip

aten = torch.ops.aten

_OWN = {MULTI_HEAD_ATTENTION, MASKED_LAYER_NORM, MASKED_GROUP_NORM, SELECT_MODE, GROUPED_MM}
_PROMOTING = {
    "add", "addcdiv", "addcmul", "atan2", "clamp", "clamp_max", "clamp_min", "div", "fmax", "fmin", "fmod", "full",
    "full_like", "lerp", "masked_fill", "maximum", "minimum", "mul", "new_full", "pow", "remainder", "rsub",
    "scalar_tensor", "sub", "true_divide", "where",
}  # fmt: skip
# What these read of their operand is its type and sizes: it needs no cast, the type goes into their own argument.
_LIKE = {
    "zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty",
}  # fmt: skip
# Statistics lie in float32 beside data in half, in torch's kernels and in ONNX's BatchNormalization-15 alike.
_KEPT: dict[Any, tuple[str, ...]] = {aten.batch_norm.default: ("weight", "bias", "running_mean", "running_var")}
_NO_HALF = ("fft_", "_fft", "linalg_", "stft", "istft", "view_as_complex", "complex", "polar", "histc", "cdist")
_HALF_LINALG = ("linalg_vector_norm", "linalg_norm")


def takes_numbers(target: Any) -> bool:
    """Return whether an operator converts numbers and integers beside a tensor of floats to the type of this."""
    return name_of(target) in _PROMOTING


def is_float(value: Any) -> bool:
    """Return whether a value is a tensor in float32: what a plan may make half."""
    return isinstance(value, torch.Tensor) and value.dtype is torch.float32


def holds_float(value: Any) -> bool:
    """Return whether a value is a float32 tensor, or a tuple that has one."""
    return any(is_float(leaf) for leaf in pytree.tree_leaves(value))


def float_operands(node: torch.fx.Node) -> list[torch.fx.Node]:
    """Return the nodes whose float32 tensors a node reads, each once."""
    return [source for source in node.all_input_nodes if holds_float(source.meta.get("val"))]


def is_like(node: torch.fx.Node) -> bool:
    """Return whether a node reads of its operand the type and the sizes alone."""
    return isinstance(node.target, OpOverload) and base_name(node) in _LIKE


def kept_operands(node: torch.fx.Node) -> tuple[torch.fx.Node, ...]:
    """Return the operands that stay float32 where the node computes in half."""
    found = []
    for name in _KEPT.get(node.target, ()):
        position = argument_positions(node.target)[name][0]
        given = node.kwargs.get(
            name, node.args[position] if position is not None and position < len(node.args) else None
        )
        if isinstance(given, torch.fx.Node):
            found.append(given)
    return tuple(found)


def makes_floats(node: torch.fx.Node) -> bool:
    """Return whether a call decides by itself, or by its ``dtype`` argument alone, that what it yields is float32."""
    return is_float(node.meta.get("val")) and (is_like(node) or not float_operands(node))


def with_dtype(
    node: torch.fx.Node, dtype: torch.dtype, kwargs: dict[str, Any], *, makes: bool
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call with its own ``dtype`` argument, where that makes floats, set to ``dtype``.

    Args:
        node: The call.
        dtype: Of what it is to yield.
        kwargs: Its keyword arguments.
        makes: Whether it makes floats by default, as ``full`` does: then it gets a ``dtype`` argument if it has none.
    """
    args = node.args
    if not isinstance(node.target, OpOverload) or "dtype" not in argument_positions(node.target):
        return args, dict(kwargs)
    position = argument_positions(node.target)["dtype"][0]
    if position is not None and position < len(args):
        given = args[position]
        replaced = (*args[:position], dtype, *args[position + 1 :])
        return (replaced if given is torch.float32 or (given is None and makes) else args), dict(kwargs)
    given = kwargs.get("dtype")
    return args, {**kwargs, "dtype": dtype} if given is torch.float32 or (given is None and makes) else dict(kwargs)


_FORMS: weakref.WeakKeyDictionary[Any, dict[str, str | None]] = weakref.WeakKeyDictionary()
"""What is known of each form of call, by the fake mode of its graph, which the meaning of its sizes belongs to."""


def refusal(node: torch.fx.Node, dtype: torch.dtype) -> str | None:
    """Return why a node cannot compute in ``dtype``, or None; ``""`` if it has no floats to begin with."""
    if node.op != "call_function" or not (holds_float(node.meta.get("val")) or float_operands(node)):
        return ""
    if node.target in (COND, WHILE_LOOP):
        bodies = [source for source in node.all_input_nodes if "val" not in source.meta]
        shared = any(_times_read(body) > 1 for body in bodies)
        return "its graphs are run from several places" if shared else None
    if node.target is operator.getitem or _is_float_cast(node):
        return ""
    if not isinstance(node.target, OpOverload):
        return f"{getattr(node.target, '__name__', node.target)} is no operator on tensors"
    known = _operator_refusal(node, node.target)
    return known if known is not None else _form_refusal(node, dtype)


def half_candidates(rw: Rewriter, dtype: torch.dtype) -> tuple[dict[str, torch.fx.Node], dict[str, str]]:
    """Return the nodes that a plan can make half, by name, and why others that have floats cannot be.

    Args:
        rw: Of the graph, with the graphs inside it.
        dtype: The type of half precision.
    """
    found: dict[str, torch.fx.Node] = {}
    refused: dict[str, str] = {}
    for module in graph_modules(rw.gm):
        for node in module.graph.nodes:
            reason = refusal(node, dtype)
            if reason is None:
                found[rw.site_name(node)] = node
            elif reason:
                refused[rw.site_name(node)] = reason
    return found, refused


def _is_float_cast(node: torch.fx.Node) -> bool:
    """Return whether a call casts one floating type to another, as somebody wanted it."""
    values: list[Any] = [part.meta.get("val") for part in (*node.all_input_nodes, node)]
    if base_name(node) not in ("to", "_to_copy", "type_as") or not all(isinstance(v, torch.Tensor) for v in values):
        return False
    return values[0].is_floating_point() and values[-1].is_floating_point() and values[0].dtype is not values[-1].dtype


def _operator_refusal(node: torch.fx.Node, target: OpOverload) -> str | None:
    name = base_name(node)
    if name.startswith("sym_"):
        return ""  # it reads the sizes alone
    if target.namespace not in ("aten", "prims") and target not in _OWN:
        return f"{target.namespace}.{name} has no form in half precision"
    if has_effect(node) and target not in _KEPT:
        return "it writes into a buffer, whose type is the user's"
    if is_random(node) and not float_operands(node):
        return "it draws other random numbers in another type"
    if torch.Tag.dynamic_output_shape in target.tags:
        return "the size of its result depends on values"
    if name.startswith(_NO_HALF) and not name.startswith(_HALF_LINALG):
        return f"{name} has no kernel in half precision"
    if not any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(node.meta.get("val"))):
        return "it makes a number of a tensor"
    if any(_is_quantizer(other) for other in (*node.all_input_nodes, *node.users)):
        return "it belongs to a quantized region"
    return None


def _form_refusal(node: torch.fx.Node, dtype: torch.dtype) -> str | None:
    """Return why the call yields no half from operands in half, found by asking for the type that it would yield.

    A net calls the same operator on operands of the same form again and again, and plans ask several times.
    """
    mode = detect_fake_mode(node.meta.get("val"))
    if mode is None:
        return _asked_form(node, dtype)
    kept = kept_operands(node)

    def form(source: torch.fx.Node) -> str:
        value = pytree.tree_map_only(torch.Tensor, lambda t: (t.dtype, t.shape, t.stride()), source.meta["val"])
        return f"{source in kept} {value}"

    key = f"{node.target} {dtype} {torch.fx.map_arg((node.args, dict(node.kwargs)), form)}"
    known = _FORMS.setdefault(mode, {})
    if key not in known:
        known[key] = _asked_form(node, dtype)
    return known[key]


def _asked_form(node: torch.fx.Node, dtype: torch.dtype) -> str | None:
    kept = kept_operands(node)

    def halved(source: torch.fx.Node) -> Any:
        value = source.meta["val"]
        if source in kept or is_like(node):
            return value
        return pytree.tree_map_only(torch.Tensor, lambda t: t.to(dtype) if is_float(t) else t, value)

    args, kwargs = with_dtype(node, dtype, node.kwargs, makes=makes_floats(node))
    try:
        found = fake_result(node.target, *torch.fx.map_arg((args, kwargs), halved), node.graph)
    except Exception as error:
        return f"it has no form in half precision: {str(error).partition(chr(10))[0][:120]}"
    return "it yields float32 from whatever it reads" if holds_float(found) else None


def _is_quantizer(node: torch.fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target.namespace == "fxopt" and node.target not in _OWN


def _times_read(body: torch.fx.Node) -> int:
    module, root = body_of(body), body.graph.owning_module
    return 0 if root is None else sum(found is module for found in _read_graphs(root))


def _read_graphs(root: torch.fx.GraphModule) -> Iterator[torch.fx.GraphModule]:
    for node in root.graph.nodes:
        if node.op == "get_attr" and "val" not in node.meta:
            yield body_of(node)
