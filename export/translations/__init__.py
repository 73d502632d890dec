"""Translations of operators, by family. Importing this package registers them all."""

from __future__ import annotations

from typing import Any

import torch

from fxopt.export.translations import (  # noqa: F401  (imported for the registrations)
    activations,
    attention,
    clamp,
    comparison,
    control_flow,
    convolution,
    creation,
    dynamic,
    elementwise,
    embedding,
    grouped,
    index,
    linear,
    normalization,
    pad,
    pools,
    quantized,
    recurrent,
    reduce,
    resize,
    scatter,
    shape,
    special,
    weight_only,
)

__all__ = ["WITHOUT_VALUE"]

_aten = torch.ops.aten

WITHOUT_VALUE: frozenset[Any] = frozenset(
    {
        _aten._assert_scalar.default,
        _aten._assert_async.msg,
        _aten._assert_async.default,
        _aten._assert_tensor_metadata.default,
        _aten.sym_constrain_range.default,
        _aten.sym_constrain_range_for_size.default,
        torch._check,
    }
)
"""Checks that capture leaves in the graph: they yield nothing, and ONNX has no counterpart."""
