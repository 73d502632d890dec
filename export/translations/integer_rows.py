"""Products of recurrent cells with weights stored as integers, as the kernel that ORT's optimizer makes of one of them.

    x, dequantize(i8[k, n], scale f32[n])  ->  MatMulNBits(x, u8[n, blocks, 32], scales f32[n, blocks])

It does so for a weight that one product alone reads. The steps of a cell read the same one, and for each of them ORT
would make floats of all of it on each run, which takes ten times as long as the product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fxopt.export.emitter import Emitter, Value, dims, dtype_of, tensor_of
from fxopt.export.translations.quantized import dequantized_from

__all__ = ["product_with_rows"]

_BLOCK = 32  # as ORT's optimizer has it
_MIDDLE = 128  # what stands for 0 in a block
_INT8_ACTIVATIONS = 4  # the accuracy level that ORT's optimizer asks for


def product_with_rows(emit: Emitter, x: Value, weight: Value, bias: Value | None) -> Value | None:
    """Return ``x @ weight + bias`` of a recurrent cell as one node that reads integers; None if there is none.

    Args:
        emit: What the node is emitted to.
        x: f32[..., k].
        weight: s8[k, n], dequantized with a scale for each column: the transposition of a constant.
        bias: f32[n], or nothing.
    """
    if emit.runtime != "ort-cpu" or emit.written_for != "recurrent" or dtype_of(x) != torch.float32:
        return None
    if (blocks := _blocks(emit, weight)) is None:
        return None
    features_in, outputs = dims(weight)
    return emit(
        "MatMulNBits", x, *blocks, None, None, bias, domain="com.microsoft", dims=(*dims(x)[:-1], outputs),
        K=features_in, N=outputs, bits=8, block_size=_BLOCK, accuracy_level=_INT8_ACTIVATIONS,
    )  # fmt: skip


def _blocks(emit: Emitter, weight: Value) -> tuple[Value, Value] | None:
    """Return u8[n, blocks, 32] and f32[n, blocks], the same values for every product with these integers."""
    if (found := dequantized_from(weight, torch.int8)) is None:
        return None
    integers, scale, zero_point = found
    turned = integers.producer()
    stored = turned.inputs[0] if turned is not None and turned.op_type == "Transpose" else None
    if stored is None:
        return None
    rows, steps, offsets = tensor_of(stored), tensor_of(scale), tensor_of(zero_point)
    if rows is None or steps is None or offsets is None or steps.ndim != 1 or bool(offsets.any()):
        return None
    if "blocks" not in stored.meta:
        padded = F.pad(rows.to(torch.int16) + _MIDDLE, (0, -rows.shape[1] % _BLOCK), value=_MIDDLE).to(torch.uint8)
        packed = padded.unflatten(1, (-1, _BLOCK))
        spread = steps.detach().float()[:, None].expand(-1, packed.shape[1]).contiguous()
        stored.meta["blocks"] = (
            emit.initializer(f"{stored.name}_blocks", packed),
            emit.initializer(f"{scale.name}_blocks", spread),
        )
    blocks: tuple[Value, Value] = stored.meta["blocks"]
    return blocks
