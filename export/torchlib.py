"""Fall back to onnxscript's torchlib for an operator that has no translation of our own.

torchlib's functions are Python code that calls ONNX operators. They run here under an evaluator that records those
calls through our emitter, so that constants, names, types and provenance come out like everywhere else.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import sympy
import torch
from onnxscript import evaluator
from torch._ops import OpOverload

from fxopt.export.dtypes import onnx_dtype, promoted, torch_dtype
from fxopt.export.emitter import Emitter, Value, rank
from fxopt.export.registry import NotTranslated

__all__ = ["translate"]

_IGNORED = frozenset({"memory_format", "layout", "device", "pin_memory", "generator", "requires_grad", "non_blocking"})


def translate(emit: Emitter, target: OpOverload, arguments: Sequence[Any]) -> Any:
    """Return the values that torchlib's function for ``target`` emits.

    Args:
        emit: Where the nodes go.
        target: The operator.
        arguments: All its arguments in the order of the schema: values, numbers, symbolic sizes, lists of these.

    Raises:
        NotTranslated: torchlib has no function for the operator, or it cannot take these arguments.
    """
    function = _function(target)
    if function is None:
        raise NotTranslated("torchlib has no function for it")
    try:
        with _recording(emit):
            result = _body(function)(**_adapted(emit, target, function.op_signature, arguments))
    except Exception as error:  # torchlib is third-party code: whatever it raises means that it cannot do it
        raise NotTranslated(f"torchlib: {type(error).__name__}: {error}") from error
    return _typed(emit, result)


@functools.cache
def _function(target: OpOverload) -> Any:
    from onnxscript.function_libs.torch_lib import ops  # noqa: F401  (fills the registry)
    from onnxscript.function_libs.torch_lib.registration import default_registry

    name = target.name()
    for candidate in (name.removesuffix(".default"), name):
        if candidate in default_registry and default_registry[candidate].overloads:
            return default_registry[candidate].overloads[0]
    return None


def _body(function: Any) -> Any:
    """Return the Python function that onnxscript wrapped; the wrapper cannot take an argument called ``self``."""
    return function.func if hasattr(function, "func") else function.function


def _typed(emit: Emitter, result: Any) -> Any:
    """Return results in the types that PyTorch yields.

    Raises:
        NotTranslated: a result is of another kind, a sign that the function does not promote as PyTorch does.
    """
    held = emit.out if isinstance(emit.out, tuple | list) else [emit.out]
    given = list(result) if isinstance(result, tuple | list) else [result]
    typed: list[Any] = []
    for value, one in zip(given, held, strict=False):
        if isinstance(one, torch.Tensor) and value is not None:
            value = value if isinstance(value, ir.Value) else emit.number(value, one.dtype)
            if value.dtype is not None and torch_dtype(value.dtype).is_floating_point != one.dtype.is_floating_point:
                raise NotTranslated(f"torchlib's function yields {value.dtype.name} instead of {one.dtype}")
            value = emit.cast(value, one.dtype)
        typed.append(value)
    return typed if isinstance(emit.out, tuple | list) else typed[0]


def _adapted(emit: Emitter, target: OpOverload, signature: Any, arguments: Sequence[Any]) -> dict[str, Any]:
    """Return the arguments as torchlib expects them: element types as ONNX enumerators, tensors where it wants some."""
    bound = _bound(target, signature, arguments)
    tensors = {name: value for name, value in bound.items() if isinstance(value, ir.Value)}
    adapted: dict[str, Any] = {}
    for parameter in signature.params:
        if parameter.name not in bound:
            continue
        value = bound[parameter.name]
        if value is None and not parameter.required:
            continue  # torchlib's own default, which may differ from None
        if isinstance(value, torch.dtype):
            value = int(onnx_dtype(value))
        elif isinstance(value, list | tuple) and any(_is_symbolic(item) for item in value):
            value = emit.sizes.vector(value)
        elif _is_symbolic(value):
            value = emit.sizes.scalar(value)
        elif isinstance(value, bool | int | float) and isinstance(parameter, ir.schemas.Parameter):
            value = emit.number(value, _common_type(tensors.values(), value))
        elif isinstance(value, ir.Value) and (same := _alike(signature, parameter, tensors)):
            value = emit.cast(value, _common_type(same))
        adapted[parameter.name] = value
    return adapted


def _bound(target: OpOverload, signature: Any, arguments: Sequence[Any]) -> dict[str, Any]:
    """Return the arguments by the name of torchlib's parameter: the first ones by position, keyword-only ones by name.

    Raises:
        ValueError: torchlib's function does not know an argument that has a meaning here.
    """
    known = {parameter.name for parameter in signature.params}
    positions = iter(signature.params)
    bound: dict[str, Any] = {}
    for formal, value in zip(target._schema.arguments, arguments, strict=True):
        name = formal.name
        if not formal.kwarg_only and name not in known:
            name = next((p.name for p in positions if p.name not in bound), name)
        elif not formal.kwarg_only:
            next(positions, None)
        if name in known:
            bound[name] = value
        elif name not in _IGNORED and value != formal.default_value:
            raise ValueError(f"its function knows no argument {name!r}")
    return bound


def _alike(signature: Any, parameter: Any, tensors: Mapping[str, Value]) -> list[Value]:
    """Return the tensors that torchlib declares to have the type of ``parameter``."""
    return [
        tensors[other.name]
        for other in signature.params
        if other.name in tensors and getattr(other, "type_constraint", None) == getattr(parameter, "type_constraint", 0)
    ]


def _common_type(values: Any, *numbers: Any) -> torch.dtype:
    operands = [(torch_dtype(value.dtype), rank(value)) for value in values if value.dtype is not None]
    return promoted([*operands, *numbers])


def _is_symbolic(value: Any) -> bool:
    return isinstance(value, sympy.Basic)


@contextmanager
def _recording(emit: Emitter) -> Iterator[None]:
    """Send the ONNX calls made inside to ``emit``."""
    recorder = _Recorder(emit)
    handler = ir.set_value_magic_handler(_Operators(recorder))
    try:
        with evaluator.default_as(recorder):
            yield
    finally:
        ir.set_value_magic_handler(handler)


class _Recorder(evaluator.Evaluator):
    """An onnxscript evaluator whose result of an operator is the emitted node's output."""

    def __init__(self, emit: Emitter) -> None:
        self.emit = emit

    def eval_op(self, op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Emit one ONNX operator."""
        name, attributes, inputs = op.name, dict(kwargs), list(args)
        schema = op.op_schema
        for parameter in schema.inputs[len(inputs) :]:  # operands passed by keyword
            if parameter.name in attributes:
                inputs += [None] * (schema.inputs.index(parameter) - len(inputs)) + [attributes.pop(parameter.name)]
        if name == "Constant":
            return self._constant(attributes)
        _require_same_meaning(schema, self.emit.opset)
        attributes = {key: held.value if isinstance(held, ir.Attr) else held for key, held in attributes.items()}
        attributes = {
            key: float(held) if _is_float(schema, key) and isinstance(held, int) else held
            for key, held in attributes.items()
        }
        operands = [self._operand(value, schema, i, inputs) for i, value in enumerate(inputs)]
        if (folded := self._fold(name, operands, attributes)) is not None:
            return folded
        count = attributes.get("num_outputs") if name == "Split" else self._results(schema, attributes)
        results = self.emit.many(name, *operands, outputs=count or 1, domain=schema.domain, **attributes)
        return results[0] if len(results) == 1 else results

    def eval_function(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run the body of an onnxscript function, so that no function is left in the model."""
        return _body(function)(*args, **kwargs)

    def _results(self, schema: Any, attributes: Mapping[str, Any]) -> int:
        if schema.name in ("BatchNormalization", "Dropout", "LayerNormalization", "MaxPool") and not attributes.get(
            "training_mode"
        ):
            return 2 if schema.name == "MaxPool" else 1
        return len(schema.outputs)

    def _constant(self, attributes: Mapping[str, Any]) -> Value:
        ((kind, held),) = [(key, one) for key, one in attributes.items() if one is not None]
        if isinstance(held, onnx.TensorProto):
            held = onnx.numpy_helper.to_array(held)
        elif isinstance(held, ir.TensorProtocol):
            return self.emit.constant(torch.from_numpy(np.array(held.numpy(), copy=True)).to(torch_dtype(held.dtype)))
        dtype = {
            "value_int": torch.int64,
            "value_ints": torch.int64,
            "value_float": torch.float32,
            "value_floats": torch.float32,
        }
        return self.emit.constant(torch.as_tensor(held, dtype=dtype.get(kind)))

    def _operand(self, value: Any, schema: Any, index: int, inputs: Sequence[Any]) -> Any:
        """Return an operand as a value: numbers take the type of the operand whose type variable they share."""
        if value is None or isinstance(value, ir.Value):
            return value
        formal = schema.inputs[min(index, len(schema.inputs) - 1)]
        allowed = {text for text in formal.types if text.startswith("tensor")}
        dtype = next(
            (
                torch_dtype(other.dtype)
                for i, other in enumerate(inputs)
                if isinstance(other, ir.Value)
                and other.dtype is not None
                and schema.inputs[min(i, len(schema.inputs) - 1)].type_str == formal.type_str
            ),
            torch.int64 if allowed == {"tensor(int64)"} else None,
        )
        if isinstance(value, ir.TensorProtocol):
            return self.emit.constant(torch.from_numpy(np.array(value.numpy(), copy=True)))
        if isinstance(value, list | tuple) and any(isinstance(item, ir.Value) for item in value):
            columns = [item if isinstance(item, ir.Value) else self.emit.number(item, torch.int64) for item in value]
            return self.emit("Concat", *[self.emit("Reshape", item, [-1]) for item in columns], axis=0)
        if isinstance(value, list | tuple) and not value:
            dtype = dtype or torch.int64
        return self.emit.constant(torch.tensor(value, dtype=dtype))

    def _fold(self, name: str, operands: Sequence[Any], attributes: Mapping[str, Any]) -> Value | None:
        """Return what shape arithmetic on known sizes yields, or None."""
        first = operands[0] if operands else None
        known = first.meta.get("dims") if isinstance(first, ir.Value) else None
        if name == "Shape" and known is not None:
            return self.emit.sizes.vector(known[attributes.get("start", 0) : attributes.get("end", len(known))])
        if name == "Size" and known is not None and all(isinstance(size, int) for size in known):
            return self.emit.constant(torch.tensor(int(np.prod(known)), dtype=torch.int64))
        return None


class _Operators:
    """Python's operators between values inside torchlib's functions."""

    def __init__(self, recorder: _Recorder) -> None:
        self._recorder = recorder

    def __getattr__(self, op_type: str) -> Any:
        from onnxscript import opset18

        return getattr(opset18, op_type)


def _is_float(schema: Any, attribute: str) -> bool:
    found = schema.attributes.get(attribute)
    return found is not None and found.type == onnx.defs.OpSchema.AttrType.FLOAT


def _require_same_meaning(schema: Any, opset: int) -> None:
    """Refuse operators that later versions of ONNX changed incompatibly."""
    current = onnx.defs.get_schema(schema.name, opset, schema.domain) if not schema.domain else schema
    if current.since_version != schema.since_version and schema.name in ("DFT", "GridSample", "GroupNormalization"):
        raise ValueError(f"{schema.name} of opset {schema.since_version} differs from that of opset {opset}")
