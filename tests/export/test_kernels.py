"""The table of kernels is held against the installed ORT: what it lists exists."""

import pytest
import torch

from fxopt.export.dtypes import kernel_dtype, onnx_dtype, promoted, torch_dtype
from fxopt.export.kernels import KERNELS

ONNX_NAMES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.bool: "bool",
    torch.int8: "int8",
    torch.int16: "int16",
    torch.int32: "int32",
    torch.int64: "int64",
    torch.uint8: "uint8",
    torch.uint16: "uint16",
    torch.uint32: "uint32",
    torch.uint64: "uint64",
}
MAIN = {"Where": 1, "OneHot": 2}


@pytest.mark.ort
def test_listed_kernels_exist():
    state = pytest.importorskip("onnxruntime.capi.onnxruntime_pybind11_state")
    onnx = pytest.importorskip("onnx")
    if not hasattr(state, "get_all_opkernel_def"):
        pytest.skip("this build of onnxruntime does not list its kernels")
    held: dict[str, set[str]] = {}
    for kernel in state.get_all_opkernel_def():
        first, last = kernel.version_range
        if kernel.provider != "CPUExecutionProvider" or kernel.domain or kernel.op_name not in KERNELS:
            continue
        if first <= 20 <= last or first == 23:
            schema = onnx.defs.get_schema(kernel.op_name, max(20, first), "")
            variable = schema.inputs[MAIN.get(kernel.op_name, 0)].type_str
            held.setdefault(kernel.op_name, set()).update(kernel.type_constraints.get(variable, ()))
    missing = {
        (op_type, ONNX_NAMES[dtype])
        for op_type, dtypes in KERNELS.items()
        for dtype in dtypes
        if op_type in held and f"tensor({ONNX_NAMES[dtype]})" not in held[op_type]
    }
    assert missing == set()
    assert len(held) > 100


@pytest.mark.parametrize(("op_type", "dtype", "computed"), [
    ("Where", torch.bool, torch.uint8),
    ("Where", torch.int16, torch.int32),
    ("Conv", torch.float64, torch.float32),
    ("Add", torch.bfloat16, torch.float32),
    ("Add", torch.float16, torch.float16),
    ("Max", torch.int16, torch.int32),
    ("MatMul", torch.int8, torch.int32),
    ("Reshape", torch.int16, torch.int16),
])  # fmt: skip
def test_a_missing_kernel_is_replaced(op_type, dtype, computed):
    assert kernel_dtype(op_type, dtype) is computed


@pytest.mark.parametrize(
    "left",
    [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64, torch.bfloat16],
)
@pytest.mark.parametrize("right", [torch.bool, torch.int8, torch.int64, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("ranks", [(2, 2), (2, 0), (0, 2), (0, 0)])
def test_promotion_is_pytorchs(left, right, ranks):
    tensors = [torch.ones((1,) * rank, dtype=dtype) for dtype, rank in zip((left, right), ranks, strict=True)]
    assert promoted([(left, ranks[0]), (right, ranks[1])]) is torch.result_type(*tensors)
    for number in (True, 2, 2.5):
        assert promoted([(left, ranks[0]), number]) is torch.result_type(tensors[0], number)


def test_types_go_both_ways():
    for dtype in ONNX_NAMES:
        assert torch_dtype(onnx_dtype(dtype)) is dtype
    with pytest.raises(TypeError, match=r"ONNX has no element type for torch\.quint8"):
        onnx_dtype(torch.quint8)
