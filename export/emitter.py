"""Emits ONNX nodes for one graph: names, constants, types, provenance and nested graphs.

Translations call the emitter like a function, ``emit("Mul", x, 2.0, axis=1)``. It turns numbers and lists of integers
into shared initializers, computes in another element type where ORT's CPU provider has no kernel, and writes on every
node where it comes from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import onnx_ir as ir
import sympy
import torch

from fxopt.errors import ExportError
from fxopt.export import schemas
from fxopt.export.dtypes import (
    HALF_TYPES,
    Runtime,
    computed_dtype,
    is_cast_with_care,
    is_truth,
    onnx_dtype,
    torch_dtype,
)
from fxopt.export.origins import WRITTEN_FOR
from fxopt.export.scope import Scope
from fxopt.export.sizes import Size, SizeEmitter

__all__ = ["Emitter", "Number", "Operand", "Value", "dims", "dtype_of", "is_symbolic", "rank", "tensor_of"]

Value = ir.Value
Number: TypeAlias = bool | int | float | sympy.Basic
Operand = Value | Number | Sequence[int] | None

_NAMED_CONSTANT = 8  # constants of at most so many elements are named by what they hold


class Emitter:
    """Builds ONNX nodes in the current scope.

    Attributes:
        opset: Version of the ONNX operator set that is written.
        runtime: Whose kernels it is written for.
        node: The torch.fx node that is being translated.
        out: What that node yields: a FakeTensor, a number, or a tuple of these.
        sizes: Turns symbolic sizes into ONNX values.
        guards: What must hold for the outputs to be right: one condition of each ``fxopt.guard``.
        inline: Translates a nested GraphModule, its placeholders bound to the given operands, into the current scope
            and returns its outputs.
    """

    inline: Callable[[torch.fx.GraphModule, Sequence[Any]], list[Any]]

    def __init__(self, opset: int, runtime: Runtime = "ort-cpu") -> None:
        self.opset = opset
        self.runtime = runtime
        self.scope = Scope()
        self.node: torch.fx.Node | None = None
        self.out: Any = None
        self.sizes = SizeEmitter(self)
        self.initializers: dict[str, Value] = {}
        self.guards: list[Value] = []
        self._constants: dict[Any, Value] = {}
        self._names: set[str] = set()
        self._origin = "graph"
        self._metadata: dict[str, str] = {}

    # -- where nodes come from -----------------------------------------------------------------------------------

    @property
    def written_for(self) -> str | None:
        """What the nodes emitted now make up to a user, where their operators do not say it."""
        return self._metadata.get(WRITTEN_FOR)

    def begin(self, node: torch.fx.Node, metadata: Mapping[str, str] | None = None) -> None:
        """Start to translate ``node``: what is emitted from now on is named after it and carries ``metadata``."""
        self.node, self.out = node, node.meta.get("val")
        if metadata is not None:
            self._origin, self._metadata = node.name, dict(metadata)

    @contextlib.contextmanager
    def nested(self) -> Iterator[Scope]:
        """Emit into a new scope inside the current one, for the body of a control-flow node."""
        outer, at = self.scope, (self.node, self.out, self._origin, self._metadata)
        self.scope = Scope(outer)
        try:
            yield self.scope
        finally:
            self.scope = outer
            self.node, self.out, self._origin, self._metadata = at

    def unique(self, name: str) -> str:
        """Return ``name``, or with a number behind it if it is taken, and take it."""
        candidate, count = name, 0
        while candidate in self._names:
            count += 1
            candidate = f"{name}_{count}"
        self._names.add(candidate)
        return candidate

    # -- nodes ---------------------------------------------------------------------------------------------------

    def __call__(
        self, op_type: str, *inputs: Operand, domain: str = "", dims: Sequence[Size] | None = None, **attributes: Any
    ) -> Value:
        """Emit a node with one output that matters and return that output.

        Args:
            op_type: ONNX operator.
            inputs: Values; numbers become constants of the first value's type, lists of integers int64 vectors, None
                leaves an optional input out.
            domain: Domain of the operator, empty for ONNX's own.
            dims: Shape of the result, where the caller wants to ask for it later.
            attributes: ONNX attributes; those that are None are left out.
        """
        return self.many(op_type, *inputs, outputs=1, domain=domain, dims=(dims,), **attributes)[0]

    def many(
        self,
        op_type: str,
        *inputs: Operand,
        outputs: int,
        domain: str = "",
        dims: Sequence[Sequence[Size] | None] = (),
        **attributes: Any,
    ) -> tuple[Value, ...]:
        """Emit a node with several outputs and return them all. Arguments as for calling the emitter."""
        values = self._operands(inputs)
        result_dtype: ir.DataType | None = None
        main = schemas.main_operand(values, op_type)
        if not domain and main is not None and main.dtype is not None:
            own = torch_dtype(main.dtype)
            computed = computed_dtype(op_type, own, attributes)
            if own is torch.bfloat16 and self.runtime == "onnx" and schemas.allows(op_type, self.opset, main.dtype):
                computed = own
            if computed is not own:
                values = schemas.cast_alike(op_type, self.opset, values, lambda value: self.cast(value, computed))
                result_dtype = main.dtype
        name = self.unique(f"{self._origin}/{op_type}")
        results = [ir.Value(name=name if outputs == 1 else f"{name}.{i}") for i in range(outputs)]
        node = ir.Node(
            domain,
            op_type,
            values,
            ir.convenience.convert_attributes(attributes),
            outputs=results,
            name=name,
            metadata_props=dict(self._metadata),
        )
        self.scope.nodes.append(node)
        for i, (result, dtype) in enumerate(zip(results, schemas.output_dtypes(node), strict=True)):
            if dtype is not None:
                result.type = ir.TensorType(dtype)
            if i < len(dims) and (shape := dims[i]) is not None:
                self.set_dims(result, shape)
        if result_dtype is not None:
            like = schemas.outputs_alike(op_type, self.opset, outputs)
            results = [
                self.cast(value, torch_dtype(result_dtype)) if same else value
                for value, same in zip(results, like, strict=True)
            ]
        return tuple(results)

    def _operands(self, inputs: Sequence[Operand]) -> list[Value | None]:
        like = next((value.dtype for value in inputs if isinstance(value, ir.Value)), None)
        values: list[Value | None] = []
        for given in inputs:
            if given is None or isinstance(given, ir.Value):
                values.append(given)
            elif isinstance(given, list | tuple):
                values.append(self.sizes.vector(given))
            else:
                if like is None:
                    raise TypeError("a number needs a value beside it that tells its type; use emit.number")
                values.append(self.number(given, torch_dtype(like)))
        while values and values[-1] is None:
            values.pop()
        return values

    # -- constants -----------------------------------------------------------------------------------------------

    def constant(self, tensor: torch.Tensor) -> Value:
        """Return the shared initializer that holds ``tensor``."""
        tensor = tensor.detach().cpu().contiguous()
        key = (
            tensor.dtype,
            tuple(tensor.shape),
            tensor.view(torch.uint8).numpy().tobytes() if tensor.ndim else _bits(tensor),
        )
        if key not in self._constants:
            text = "constant"
            if tensor.numel() <= _NAMED_CONSTANT:
                held = str(tensor.tolist()).replace(" ", "")
                text = f"{str(tensor.dtype).removeprefix('torch.')}{held if tensor.ndim else f'({held})'}"
            self._constants[key] = self.initializer(text, tensor)
        return self._constants[key]

    def number(self, number: Number, dtype: torch.dtype) -> Value:
        """Return a number, plain or symbolic, as a value without axes of type ``dtype``."""
        if is_symbolic(number):
            return self.cast(self.sizes.scalar(number), dtype)
        if isinstance(number, sympy.Basic):
            number = bool(number) if isinstance(number, sympy.logic.boolalg.BooleanAtom) else _plain(number)
        return self.constant(torch.tensor(number, dtype=dtype))

    def initializer(self, name: str, tensor: torch.Tensor, metadata: Mapping[str, str] | None = None) -> Value:
        """Return a new initializer that holds ``tensor`` (not a copy of it) under a name close to ``name``."""
        wanted, name = name, self.unique(name)
        held = ir.tensor_adapters.TorchTensor(tensor.detach(), name=name)
        held.metadata_props.update(metadata or {})
        value = ir.Value(
            name=name, shape=ir.Shape(tuple(tensor.shape)), type=ir.TensorType(held.dtype), const_value=held
        )
        value.meta["dims"] = tuple(tensor.shape)
        value.meta["tensor"] = tensor.detach()
        value.meta["wanted"] = wanted
        self.initializers[name] = value
        return value

    def once(self, key: Any, make: Callable[[], Value]) -> Value:
        """Return what ``make`` emitted for ``key`` in this graph or one around it, emitting it if nothing did."""
        for scope in self.scope.chain():
            if key in scope.computed:
                return scope.computed[key]
        self.scope.computed[key] = made = make()
        return made

    # -- types and shapes ----------------------------------------------------------------------------------------

    def cast(self, value: Value, dtype: torch.dtype) -> Value:
        """Return ``value`` as ``dtype``; small constants are converted here, not in the file."""
        wanted = onnx_dtype(dtype)
        if value.dtype == wanted:
            return value
        held = tensor_of(value)
        if held is not None and held.numel() <= _NAMED_CONSTANT:
            return self.constant(held.to(dtype))
        return self._cast_before_transposed(value, dtype) or self(
            "Cast", value, to=int(wanted), dims=value.meta.get("dims")
        )

    def _cast_before_transposed(self, value: Value, dtype: torch.dtype) -> Value | None:
        """Cast what is transposed in an order behind which no cast may stand; None if ``value`` is nothing such."""
        producer = value.producer()
        if producer is None or producer.op_type != "Transpose" or producer.inputs[0] is None:
            return None
        order = producer.attributes["perm"].as_ints()
        narrowed = value.dtype == ir.DataType.FLOAT and dtype in HALF_TYPES  # which ORT casts back at once
        if narrowed or not is_cast_with_care(order):
            return None
        return self.transpose(self.cast(producer.inputs[0], dtype), order)

    def set_dims(self, value: Value, shape: Sequence[Size]) -> None:
        """Record the shape of ``value``."""
        value.meta["dims"] = tuple(shape)
        value.shape = ir.Shape([size if isinstance(size, int) else self.sizes.text(size) for size in shape])

    def reshape(self, value: Value, shape: Sequence[Size]) -> Value:
        """Return ``value`` reshaped, with the least arithmetic on sizes; itself if it has that shape already."""
        shape = tuple(shape)
        known = value.meta.get("dims")
        if known == shape:
            return value
        return self(
            "Reshape", value, self.sizes.reshape_target(known, shape), allowzero=1 if 0 in shape else None, dims=shape
        )

    def transpose(self, value: Value, order: Sequence[int]) -> Value:
        """Return ``value`` with its axes in another order; two transpositions in a row become one."""
        order = list(order)
        producer = value.producer()
        if producer is not None and producer.op_type == "Transpose" and "perm" in producer.attributes:
            earlier = producer.attributes["perm"].as_ints()
            order, source = [earlier[axis] for axis in order], producer.inputs[0]
            if source is not None:
                value = source
        if order == sorted(order):
            return value
        if (held := self._transposed_integers(value, order)) is not None:
            return held
        known = value.meta.get("dims")
        return self("Transpose", value, perm=order, dims=None if known is None else [known[axis] for axis in order])

    def _transposed_integers(self, value: Value, order: Sequence[int]) -> Value | None:
        """Transpose a dequantized constant as the integers that it is stored as; None if ``value`` is none."""
        producer = value.producer()
        if producer is None or producer.op_type != "DequantizeLinear" or producer.inputs[0] is None:
            return None
        integers, *parameters = producer.inputs
        if integers is None or tensor_of(integers) is None:
            return None
        axis = producer.attributes["axis"].as_int() if "axis" in producer.attributes else None
        turned = self.transpose(integers, order)
        return self(
            "DequantizeLinear",
            turned,
            *parameters,
            axis=None if axis is None else order.index(axis),
            domain=producer.domain,
            dims=[dims(value)[axis] for axis in order],
        )

    # -- graphs --------------------------------------------------------------------------------------------------

    def body(self, name: str, inputs: Sequence[Value], run: Callable[[], Sequence[Any]]) -> ir.Graph:
        """Return what ``run`` emits as the body of a control-flow node; it may read values from around it."""
        with self.nested() as scope:
            outputs = self.own_outputs([self.as_value(result) for result in run()])
        return ir.Graph(list(inputs), outputs, nodes=scope.nodes, name=self.unique(name))

    def as_value(self, result: Any) -> Value:
        """Return a tensor or number as a value.

        Raises:
            ExportError: it is neither.
        """
        if isinstance(result, ir.Value):
            return result
        if isinstance(result, bool) or is_truth(result):
            return self.number(result, torch.bool)
        if isinstance(result, int) or (isinstance(result, sympy.Expr) and result.is_integer):
            return self.number(result, torch.int64)
        if isinstance(result, float | sympy.Expr):
            return self.number(result, torch.float64)
        raise ExportError(f"an output of the graph is a {type(result).__name__}; ONNX returns tensors and numbers")

    def own_outputs(self, values: Sequence[Value]) -> list[Value]:
        """Return ``values`` as outputs of the current graph: made by its own nodes, and each only once."""
        own = {id(output) for node in self.scope.nodes for output in node.outputs}
        seen: set[int] = set()
        separate: list[Value] = []
        for value in values:
            if id(value) not in own or id(value) in seen:
                value = self("Identity", value, dims=value.meta.get("dims"))
            seen.add(id(value))
            separate.append(value)
        return separate


def is_symbolic(number: Number) -> bool:
    """Return whether a number depends on dynamic sizes, which attributes of ONNX cannot hold."""
    return (
        isinstance(number, sympy.Basic)
        and not number.is_number
        and not isinstance(number, sympy.logic.boolalg.BooleanAtom)
    )


def dims(value: Value) -> tuple[Size, ...]:
    """Return the shape of ``value``: integers and sympy expressions."""
    found: tuple[Size, ...] = value.meta["dims"]
    return found


def rank(value: Value) -> int:
    """Return the number of axes of ``value``."""
    return len(dims(value))


def dtype_of(value: Value) -> torch.dtype:
    """Return the element type of ``value``."""
    if value.dtype is None:
        raise TypeError(f"{value.name} has no element type")
    return torch_dtype(value.dtype)


def tensor_of(value: Value) -> torch.Tensor | None:
    """Return the constant that ``value`` holds, or None if it is computed."""
    found: torch.Tensor | None = value.meta.get("tensor")
    return found


def _bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.reshape(1).view(torch.uint8).numpy().tobytes())


def _plain(number: sympy.Basic) -> int | float:
    return int(number) if number.is_integer else float(number)
