"""Padding in the form that ORT's optimizer and its inference of symbolic shapes know: the amounts of all axes."""

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxopt.export import optimized_model
from tests.export.proof import op_types, prove

pytestmark = pytest.mark.ort

IMAGE = torch.randn(3, 2, 5, 7)
CASES = {
    "last axis": lambda x: F.pad(x, (1, 2)),
    "a number": lambda x: F.pad(x, (0, 0, 1, 2), value=3.5),
    "cropped": lambda x: F.pad(x, (-1, 2, 0, -2)),
    "reflected": lambda x: F.pad(x, (1, 2, 0, 1), mode="reflect"),
    "reflected and cropped": lambda x: F.pad(x, (-1, 2, 0, 1), mode="reflect"),
    "replicated": lambda x: F.pad(x, (1, 2, 0, 1), mode="replicate"),
    "circular": lambda x: F.pad(x, (1, 2, 0, 1), mode="circular"),
    "computed": lambda x: F.pad(x, (0, x.shape[0])),
}


@pytest.mark.parametrize("name", CASES)
def test_orts_inference_of_symbolic_shapes_knows_it(name):
    from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

    file = prove(lambda x: CASES[name](x).abs(), IMAGE)
    assert [len(node.inputs) for node in file.model.graph if node.op_type == "Pad"] == [3 if name == "a number" else 2]
    inferred = SymbolicShapeInference.infer_shapes(onnx.load_from_string(file.to_bytes()), auto_merge=True)
    (output,) = inferred.graph.output
    sizes = [size.dim_value for size in output.type.tensor_type.shape.dim]
    want = list(CASES[name](IMAGE).shape)
    assert sizes[:3] == [0, *want[1:3]]  # 0: it has a name
    assert sizes[3] == (0 if name == "computed" else want[3])


@pytest.mark.parametrize("name", [name for name in CASES if name != "computed"])
def test_ort_moves_transpositions_past_it(name):
    def run(x):
        return CASES[name](x.permute(0, 3, 1, 2).abs()).permute(0, 2, 3, 1)

    file = prove(run, IMAGE.permute(0, 2, 3, 1).contiguous())
    assert "Transpose" not in [node.op_type for node in optimized_model(file.to_bytes()).graph]


def test_ort_takes_zeros_into_the_convolution():
    file = prove(nn.Sequential(nn.ZeroPad2d((1, 2, 0, 1)), nn.Conv2d(2, 3, 3)), IMAGE)
    assert op_types(file) == ["Pad", "Conv"]
    assert "Pad" not in [node.op_type for node in optimized_model(file.to_bytes(), optimization="extended").graph]


@pytest.mark.parametrize("run", [lambda x: x.cumprod(1), lambda x: x.logcumsumexp(-1)])
def test_running_products_and_sums_are_inferred_too(run):
    from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

    file = prove(run, torch.randn(3, 4, 5))
    assert "Pad" in op_types(file)
    SymbolicShapeInference.infer_shapes(onnx.load_from_string(file.to_bytes()), auto_merge=True)
