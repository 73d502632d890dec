"""Matrix products: linear layers, matmul, einsum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fxopt.export.emitter import Emitter, Number, Value, dims, dtype_of, is_symbolic, rank
from fxopt.export.registry import NotTranslated, translates
from fxopt.export.translations.elementwise import out_dtype
from fxopt.export.translations.integer_product import integer_product
from fxopt.export.translations.integer_rows import product_with_rows
from fxopt.export.translations.quantized import is_quantized
from fxopt.export.translations.reduce import norm_value
from fxopt.export.translations.shape import out_dims

aten = torch.ops.aten


@translates(aten.linear.default)
def linear(emit: Emitter, x: Value, weight: Value, bias: Value | None) -> Value:
    """One Gemm for a matrix; otherwise a product with the transposed weight, stored transposed if it can be."""
    if rank(x) == 2 and rank(weight) == 2 and dtype_of(x).is_floating_point:
        return emit("Gemm", x, weight, bias, transB=1)
    turned = emit.transpose(weight, list(reversed(range(rank(weight)))))
    # Without a bias ORT finds the product by itself. Where a quantizer reads the result, it finds a better one.
    if bias is not None and not is_quantized(emit) and (found := integer_product(emit, x, turned, bias)) is not None:
        return found
    product = emit("MatMul", x, turned)
    return product if bias is None else emit("Add", product, bias)


@translates(
    aten.matmul.default, aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default, aten.inner.default
)
def matmul(emit: Emitter, x: Value, y: Value) -> Value:
    assert emit.node is not None
    if rank(x) == 0 or rank(y) == 0:
        return emit("Mul", x, y)
    if emit.node.target is aten.inner.default and rank(y) > 1:
        y = emit.transpose(y, [*range(rank(y) - 2), rank(y) - 1, rank(y) - 2])
        if rank(y) > 2:
            raise NotTranslated("inner product of tensors with more than two axes")
    return product_with_rows(emit, x, y, None) or emit("MatMul", x, y)


@translates(aten.addmm.default)
def addmm(emit: Emitter, bias: Value, x: Value, y: Value, beta: Number, alpha: Number) -> Value:
    """One Gemm, which takes ``y`` untransposed where it is the transposition of something."""
    if not dtype_of(x).is_floating_point or is_symbolic(alpha) or is_symbolic(beta):
        return _plus(emit, bias, emit("MatMul", x, y), beta, alpha)
    if alpha == beta == 1 and (found := product_with_rows(emit, x, y, bias)) is not None:
        return found
    factors: dict[str, Any] = {
        "alpha": None if alpha == 1 else float(alpha),
        "beta": None if beta == 1 else float(beta),
    }
    producer = y.producer()
    if producer is not None and producer.op_type == "Transpose" and producer.inputs[0] is not None:
        return emit("Gemm", x, producer.inputs[0], bias, transB=1, **factors)
    return emit("Gemm", x, y, bias, **factors)


@translates(aten.baddbmm.default, aten.addmv.default)
def add_product(emit: Emitter, bias: Value, x: Value, y: Value, beta: Number, alpha: Number) -> Value:
    return _plus(emit, bias, emit("MatMul", x, y), beta, alpha)


def _plus(emit: Emitter, bias: Value, product: Value, beta: Number, alpha: Number) -> Value:
    product = product if alpha == 1 else emit("Mul", product, alpha)
    if beta == 0:  # by definition, whatever the bias holds
        return product
    return emit("Add", emit.cast(bias if beta == 1 else emit("Mul", bias, beta), out_dtype(emit)), product)


@translates(aten.outer.default, aten.ger.default)
def outer(emit: Emitter, x: Value, y: Value) -> Value:
    dtype = out_dtype(emit)
    return emit("Mul", emit("Unsqueeze", emit.cast(x, dtype), [1]), emit.cast(y, dtype))


@translates(aten.einsum.default)
def einsum(emit: Emitter, equation: str, operands: Sequence[Value], path: object) -> Value:
    """A matrix product where the equation is one, ONNX's Einsum otherwise."""
    equation = equation.replace(" ", "")
    inputs, arrow, output = equation.partition("->")
    terms = inputs.split(",")
    if not arrow:
        letters = sorted(set(inputs) - {",", "."})
        output = ("..." if "..." in inputs else "") + "".join(c for c in letters if inputs.count(c) == 1)
    if len(terms) == 2 and "." not in equation and (product := _as_matmul(emit, terms, output, operands)) is not None:
        return product
    return emit("Einsum", *operands, equation=f"{inputs}->{output}")


def _as_matmul(emit: Emitter, terms: Sequence[str], output: str, operands: Sequence[Value]) -> Value | None:
    """Return the product as one MatMul with transpositions and reshapes, or None if it is not of that kind."""
    left, right = terms
    batch = [c for c in output if c in left and c in right]
    summed = [c for c in left if c in right and c not in output]
    rows, columns = [c for c in output if c not in right], [c for c in output if c not in left]
    if any(len(set(term)) != len(term) for term in (*terms, output)):
        return None
    if set(left) != {*batch, *summed, *rows} or set(right) != {*batch, *summed, *columns} or not summed:
        return None
    size = dict(zip(left + right, [*dims(operands[0]), *dims(operands[1])], strict=True))
    for letter in (*batch, *summed):  # sizes of 1 broadcast in einsum
        if any(
            dims(operand)[term.index(letter)] != size[letter] for term, operand in zip(terms, operands, strict=True)
        ):
            return None

    def matrix(operand: Value, term: str, first: Sequence[str], second: Sequence[str]) -> Value:
        order = [term.index(c) for c in (*batch, *first, *second)]
        shape = [*[size[c] for c in batch], _product(first, size), _product(second, size)]
        return emit.reshape(emit.transpose(operand, order), shape)

    product = emit("MatMul", matrix(operands[0], left, rows, summed), matrix(operands[1], right, summed, columns))
    made = [*batch, *rows, *columns]
    emit.set_dims(product, [*[size[c] for c in batch], _product(rows, size), _product(columns, size)])
    return emit.transpose(emit.reshape(product, [size[c] for c in made]), [made.index(c) for c in output])


def _product(letters: Sequence[str], size: dict[str, object]) -> object:
    total: object = 1
    for letter in letters:
        total = total * size[letter]  # type: ignore[operator]  # sizes are integers or expressions
    return total


@translates(aten.cdist.default)
def cdist(emit: Emitter, x: Value, y: Value, p: float, compute_mode: int | None) -> Value:
    """Norms of all differences: more accurate than the product of matrices that PyTorch may use for p = 2."""
    left, right = dims(x), dims(y)
    if left[:-2] != right[:-2]:
        raise NotTranslated("the batches are broadcast")
    gap = emit(
        "Sub",
        emit("Unsqueeze", x, [rank(x) - 1]),
        emit("Unsqueeze", y, [rank(y) - 2]),
        dims=(*left[:-1], right[-2], left[-1]),
    )
    return norm_value(emit, gap, p, -1, False)


@translates(aten.bilinear.default)
def bilinear(emit: Emitter, x: Value, y: Value, weight: Value, bias: Value | None) -> Value:
    out, first, second = dims(weight)
    if not (isinstance(out, int) and isinstance(first, int) and isinstance(second, int)):
        raise NotTranslated("the weight has dynamic sizes")
    # x W -> [..., out * second], then the product with y is summed over the last axis.
    flat = emit.reshape(emit.transpose(weight, [1, 0, 2]), (first, out * second))
    product = emit("MatMul", x, flat, dims=(*dims(x)[:-1], out * second))
    product = emit.reshape(product, (*dims(x)[:-1], out, second))
    column = emit("Unsqueeze", y, [rank(y)])
    result = emit("Squeeze", emit("MatMul", product, column), [rank(x)])
    assert out_dims(emit)[-1] == out
    return result if bias is None else emit("Add", result, bias)
