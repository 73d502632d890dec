"""What ORT's optimizer computes otherwise is cut down to the few operators that show it, and the part does show it."""

import subprocess
import sys

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import helper
from torch import nn

import fxopt
from fxopt import passes
from fxopt.contracts import Contract
from fxopt.errors import ExportError
from fxopt.export import Session, bisect_ort, reduce_ort, to_onnx
from tests.models.randomized import randomized
from tests.tools.viz.foreign_files import parsed

pytestmark = pytest.mark.ort
IMAGES = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def integers():
    """Return a file of integers in which ORT fuses every layer, so that many values differ by a step."""
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()]
    for _ in range(4):
        layers += [nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
    net = randomized(nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 144, 5))).eval()
    return to_onnx(fxopt.optimize(net, [passes.Quantize(recipe="fast")], example_inputs=(IMAGES,)))


def differs(part, level):
    model = ir.to_proto(part.model).SerializeToString()
    (plain,), (got,) = (Session(model, optimization=one).run(dict(part.inputs)) for one in ("none", level))
    return float((plain.double() - got.double()).abs().max())


def test_the_part_is_small_and_shows_the_difference(integers):
    found = bisect_ort(integers, [IMAGES], Contract.EXACT)
    part = reduce_ort(integers, [IMAGES], found.level, Contract.EXACT)
    assert part.value
    assert part.nodes <= 12 < part.whole_nodes
    assert differs(part, found.level) == part.difference > 0


def test_the_part_holds_what_is_fused_and_no_more(integers):
    found = bisect_ort(integers, [IMAGES], Contract.EXACT)
    part = reduce_ort(integers, [IMAGES], found.level, Contract.EXACT)
    assert len(list(part.model.graph)) == part.nodes
    assert {node.op_type for node in part.model.graph} == {"DequantizeLinear", "Gemm"}  # what becomes one kernel


def test_a_fusion_that_changes_what_it_fuses_is_cut_out():
    """ORT folds Conv * constant into the weight: where the product overflows, 0 * inf becomes NaN, or the sum inf."""
    text = (
        "main (float[1, 1, 4, 4] x) => (float[1, 1, 4, 4] y) "
        "<float[1, 1, 1, 1] w = {1e30}, float[1, 1, 1, 1] big = {1e30}> "
        "{ a = Abs(x) s = Sqrt(a) c = Conv(s, w) m = Mul(c, big) t = Tanh(m) y = Neg(t) }"
    )
    model = parsed(text).SerializeToString()
    x = torch.zeros(1, 1, 4, 4)
    found = bisect_ort(model, [x])
    part = reduce_ort(model, [x], found.level)
    assert part.value == "m"
    assert part.nodes == 2
    assert "NaN" in part.problem


def test_the_script_shows_it_without_fxopt(integers, tmp_path):
    found = bisect_ort(integers, [IMAGES], Contract.EXACT)
    part = reduce_ort(integers, [IMAGES], found.level, Contract.EXACT)
    script = part.save(tmp_path / "repro", found.level, found.left_out, {"optimizer": str(found.optimizer)})
    assert sorted(each.name for each in script.parent.iterdir()) == ["inputs.npz", "model.onnx", "repro.py"]
    assert "import fxopt" not in script.read_text()
    assert str(found.optimizer) in script.read_text()
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "without" in done.stdout
    right = onnx.load(script.parent / "model.onnx")
    del right.graph.node[:]
    (output,) = right.graph.output
    right.graph.node.append(helper.make_node("Constant", [], [output.name], value_float=0.0))
    output.CopyFrom(helper.make_tensor_value_info(output.name, onnx.TensorProto.FLOAT, []))
    del right.graph.input[:]
    onnx.save(right, script.parent / "model.onnx")
    np.savez(script.parent / "inputs.npz")
    assert subprocess.run([sys.executable, str(script)], capture_output=True, check=False).returncode == 0


def test_a_model_that_is_right_is_refused():
    model = parsed("main (float[2] x) => (float[2] y) { y = Neg(x) }").SerializeToString()
    with pytest.raises(ExportError, match="there is nothing to cut out"):
        reduce_ort(model, [torch.ones(2)], "all")
