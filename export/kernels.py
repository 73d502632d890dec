"""For which element types ONNX Runtime's CPU provider has a kernel.

A table of facts about the runtime: an operator is computed in another type, between two casts, where its own is
missing (`dtypes.kernel_dtype`). Read from the kernel registry of ORT 1.32 for opset 20; a test holds it against the
installed ORT. Operators that support every type are left out, as are those whose operands are fixed by ONNX.
"""

from __future__ import annotations

import torch

__all__ = ["KERNELS"]

_TYPES = {
    "f32": torch.float32, "f64": torch.float64, "f16": torch.float16, "bf16": torch.bfloat16, "b8": torch.bool,
    "i8": torch.int8, "i16": torch.int16, "i32": torch.int32, "i64": torch.int64,
    "u8": torch.uint8, "u16": torch.uint16, "u32": torch.uint32, "u64": torch.uint64,
}  # fmt: skip

# element types: the operators that have exactly these kernels
_GROUPS = {
    "b8": "And Not Or Xor",
    "f32": (
        "Acos Acosh Asin Asinh Atan Atanh AveragePool Celu Col2Im Conv ConvTranspose Cosh Det Elu Erf Gelu "
        "GlobalAveragePool GlobalLpPool GlobalMaxPool HardSigmoid Hardmax InstanceNormalization LRN LeakyRelu "
        "LpPool MaxUnpool Mean MeanVarianceNormalization PRelu RNN Selu Sinh Softplus Softsign Tan "
        "ThresholdedRelu"
    ),
    "f32 f16": "Attention RotaryEmbedding",
    "f32 f64": (
        "AffineGrid BatchNormalization Ceil Cos DFT DeformConv Exp Floor GRU Gemm GridSample LSTM Log LogSoftmax "
        "LpNormalization Reciprocal RoiAlign STFT Sigmoid Sin Softmax Sqrt Sum Tanh"
    ),
    "f32 f64 f16": "RMSNormalization Round",
    "f32 i32 i64": "OneHot",
    "f32 f64 i8 u8": "DepthToSpace MaxPool SpaceToDepth",
    "f32 i8 i32 u8": "Resize",
    "f32 f64 i8 i32": "Relu",
    "f32 f64 i8 i64": "Unique",
    "u8 u16 u32 u64": "BitShift",
    "f32 f64 i32 i64": (
        "CumSum Einsum Pow ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMean ReduceProd ReduceSum "
        "ReduceSumSquare"
    ),
    "f32 f64 f16 bf16": "IsInf IsNaN LayerNormalization",
    "f32 i32 i64 u8 b8": "NonZero",
    "f32 f64 i32 i64 b8": "Trilu",
    "f32 f64 i16 i32 i64": "Range",
    "f32 f64 i32 i64 u64": "EyeLike",
    "f32 f64 i8 i32 i64 u8": "ArgMax ArgMin",
    "f32 f64 i8 i16 i32 i64": "Neg",
    "f32 f64 i32 i64 u32 u64": "MatMul",
    "f32 f64 i8 i32 i64 u8 b8": "ReduceMax ReduceMin",
    "f32 f64 i8 i16 i32 i64 u8": "TopK",
    "f32 f64 i8 i32 i64 u8 u32": "Where",
    "i8 i16 i32 i64 u8 u16 u32 u64": "BitwiseAnd BitwiseNot BitwiseOr BitwiseXor",
    "f32 f64 i8 i32 i64 u8 u32 u64 b8": "Pad",
    "f32 f64 f16 i8 i32 i64 u8 u32 u64": "Clip Max Min",
    "f32 f64 i8 i16 i32 i64 u8 u16 u32 u64": "Abs Add Div Greater GreaterOrEqual Less LessOrEqual Mul Sub",
    "f32 f64 i8 i16 i32 i64 u8 u16 u32 u64 b8": "Equal Tile",
    "f32 f64 f16 i8 i16 i32 i64 u8 u16 u32 u64": "Mod",
    "f32 f64 f16 i8 i16 i32 i64 u8 u16 u32 u64 b8": "Expand",
    "f32 f64 f16 bf16 i8 i16 i32 i64 u8 u16 u32 u64": "Shrink Sign",
}

KERNELS: dict[str, frozenset[torch.dtype]] = {
    op_type: frozenset(_TYPES[name] for name in types.split())
    for types, op_types in _GROUPS.items()
    for op_type in op_types.split()
}
"""ONNX operator (main operand): the types that ORT computes it in on a CPU."""
