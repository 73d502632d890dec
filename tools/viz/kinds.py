"""What sort of operator a node is, by its name in ATen or ONNX: for the colours of nodes, and for what is quantized."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

from fxopt.tools.viz.model import Node

__all__ = ["KINDS", "kind_of", "numbers_of", "with_numbers"]

_WORDS: dict[str, str] = {  # the first pattern that the name holds decides
    "quantize": r"quantize(linear)?$|quantize_|^(de)?quantize|fake_quant|dynamicquantizelinear|observer",
    "layer": r"conv|linear|gemm|matmul|^(b?mm|addmm|baddbmm|mv|dot)$|einsum|lstm|gru|rnn|attention|embedding",
    "normalization": r"norm|softmax|^lrn$",
    "activation": r"relu|gelu|silu|sigmoid|tanh|swish|^elu|selu|celu|mish|softplus|softsign|clamp|clip|erf|dropout",
    "reduction": r"pool|reduce|^(mean|sum|amax|amin|max|min|argmax|argmin|topk|var|std|prod)$",
    "control": r"^(if|loop|scan|cond|while_loop|guard)$",
    "shape": r"reshape|view|permute|transpose|^t$|expand|squeeze|flatten|concat|^cat$|split|chunk|slice|select|gather"
    r"|pad|stack|alias|getitem|unbind|shape|identity|clone|contiguous|roll|repeat|tile|^cast$|^to$|_to_copy|space|scatter",
    "arithmetic": r"^(add|sub|mul|div|rsub|pow|sqrt|rsqrt|exp|log|neg|abs|where|sum|maximum|minimum|equal|eq|ne|lt|gt"
    r"|le|ge|not|and|or|greater|less|cos|sin|floor|ceil|round|sign|reciprocal)",
}
KINDS = ("input", "output", *_WORDS, "other")
_INTEGER_KERNELS = re.compile(r"qlinear|integer|^qgemm|^qattention|dynamicquantize(matmul|lstm)", re.IGNORECASE)


def kind_of(op: str) -> str:
    """Return the kind of an operator, ``aten.conv2d`` or ``com.microsoft.QLinearAdd``."""
    name = re.sub(r"^(aten|fxopt|prims|higher_order|\w+(\.\w+)*\.)\.?", "", op) if "." in op else op
    name = name.split(".")[0].lower().rstrip("_").removeprefix("qlinear")  # QLinearAdd adds
    return next((kind for kind, words in _WORDS.items() if re.search(words, name)), "other")


def numbers_of(node: Node, sources: Sequence[Node]) -> str | None:
    """Return what a layer computes in: ``quantized`` or ``float``; ``Q/DQ`` for what converts; None for all else.

    Args:
        node: The node.
        sources: The nodes that it reads.
    """
    if node.kind == "quantize":
        return "Q/DQ"
    if node.kind != "layer":
        return None
    if _INTEGER_KERNELS.search(node.op.rpartition(".")[2]):
        return "quantized"
    data = [source for source in sources[:2] if "bias" not in source.id]
    floats = any(len(weight.type.partition("[")[2].split(",")) > 1 for weight in node.weights)  # a bias has one axis
    return "quantized" if data and not floats and all(source.kind == "quantize" for source in data) else "float"


def with_numbers(node: Node, known: Mapping[str, Node]) -> Node:
    """Return the node with what it computes in among its values, if there is anything to say.

    Args:
        node: The node.
        known: The nodes before it by id.
    """
    found = numbers_of(node, [known[edge.source] for edge in node.inputs if edge.source in known])
    return node if found is None else dataclasses.replace(node, values={**node.values, "quantized": found})
