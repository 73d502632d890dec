"""Weights of few bits in ORT: its own block kernels, and tables; files that are as small as what they hold."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt import Contract
from fxopt.export import OnnxFile, Session, optimized_model, to_onnx
from fxopt.passes import BinarizeWeights, CodebookWeights, QuantizeWeights
from tests.export.proof import captured, op_types

pytestmark = pytest.mark.ort
ANY = -100.0  # dB: how good a few bits are is not asked here


def exact(pass_: fxopt.Pass, model: nn.Module, *inputs: Tensor, opset: int = 20) -> OnnxFile:
    """Export the rewritten model, and hold ORT, its optimizer off and on, to rounding against the rewritten graph."""
    gm = fxopt.optimize(captured(model, *inputs, dynamic=inputs[0].ndim > 1), [pass_], strict=True)
    assert gm.report is not None
    assert gm.report.steps[0].changes
    file = to_onnx(gm, opset=opset, contract=Contract.ROUNDING)
    assert file.validation is not None
    assert {result.optimization for result in file.validation.results} == {"none", "all"}
    return file


def stored(file: OnnxFile) -> dict[str, str]:
    """Return the type of each initializer of more than one element."""
    held = file.model.graph.initializers
    return {name: str(value.dtype) for name, value in held.items() if value.shape is not None and len(value.shape) > 1}


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("symmetric", "features", "block_size"), [(False, 40, 16), (True, 64, 32), (False, 100, 128)])
def test_linear_is_one_node(bits: int, symmetric: bool, features: int, block_size: int) -> None:
    pass_ = QuantizeWeights(
        bits=bits, symmetric=symmetric, block_size=block_size, min_elements=1, min_sqnr_db=ANY, search="absmax"
    )
    file = exact(pass_, nn.Linear(features, 24), torch.randn(3, features))
    assert op_types(file) == ["MatMulNBits"]
    assert file.model.opset_imports == {"": 20, "com.microsoft": 1}
    assert "weight" not in file.model.graph.initializers
    assert [node.op_type for node in optimized_model(file.to_bytes()).graph] == ["MatMulNBits"]


def test_an_empty_batch():
    gm = fxopt.optimize(captured(nn.Linear(40, 24), torch.randn(3, 40)), [QuantizeWeights(min_elements=1)], strict=True)
    (out,) = to_onnx(gm).session().run([torch.zeros(0, 40)])
    assert out.shape == gm(torch.zeros(0, 40)).shape == (0, 24)


@pytest.mark.parametrize("shape", [(40,), (2, 3, 40), (2, 1, 3, 40)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_of_any_rank(shape: tuple[int, ...], bias: bool) -> None:
    file = exact(QuantizeWeights(min_elements=1), nn.Linear(40, 24, bias=bias), torch.randn(shape), opset=18)
    assert op_types(file) == ["MatMulNBits"]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("features", "dtype"), [(40, torch.int64), (64, torch.int32)])
def test_embedding_gathers_blocks(bits: int, symmetric: bool, features: int, dtype: torch.dtype) -> None:
    pass_ = QuantizeWeights(bits=bits, symmetric=symmetric, min_elements=1, min_sqnr_db=ANY)
    file = exact(pass_, nn.Embedding(30, features), torch.randint(0, 30, (2, 5)).to(dtype))
    assert "GatherBlockQuantized" in op_types(file)
    assert ("Slice" in op_types(file)) is (features == 40)


class Tied(nn.Module):
    """A table of words that is also the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(300, 64)

    def forward(self, index: Tensor) -> Tensor:
        return nn.functional.linear(self.words(index), self.words.weight)


def test_a_shared_table_is_stored_once():
    file = exact(QuantizeWeights(), Tied(), torch.randint(0, 300, (2, 5)))
    assert sorted(op_types(file)) == ["GatherBlockQuantized", "MatMulNBits", "Reshape"]
    assert file.parameter_bytes < 300 * (64 / 2 + 2 * 4 + 1) + 100


def test_accuracy_level_is_in_the_file_and_rounds_activations():
    net, x = nn.Linear(256, 64), torch.randn(16, 256)
    pass_ = QuantizeWeights(accuracy_level=4)
    gm = fxopt.optimize(captured(net, x), [pass_], strict=True)
    file = to_onnx(gm)
    (node,) = file.model.graph
    assert node.attributes["accuracy_level"].as_int() == 4
    error = (file.session().run([x])[0] - gm(x)).detach().square().mean() / gm(x).detach().square().mean()
    assert float(error) < 1e-3


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("channels", [0, 8])
def test_a_table_of_a_convolution(bits: int, channels: int) -> None:
    pass_ = CodebookWeights(bits=bits, channels=channels, min_sqnr_db=ANY)
    file = exact(pass_, nn.Conv2d(13, 16, 5), torch.randn(2, 13, 7, 7))
    held = stored(file)
    assert held["weight_places"] == "UINT8"
    packed = -(-13 * 25 * bits // 8) * 16
    tables = 2**bits * (16 // channels if channels else 1) * 4
    assert file.parameter_bytes < packed + tables + 400  # and the bias, shapes and shifts
    optimized = [node.op_type for node in optimized_model(file.to_bytes()).graph]
    assert set(optimized) <= {"Conv", "ReorderInput", "ReorderOutput"}, (
        "with its optimizer on, ORT looks the weight up when it loads the file"
    )


@pytest.mark.parametrize("kind", ["binary", "ternary"])
@pytest.mark.parametrize("shape", [(16, 3, 3, 3), (16, 40)])
def test_signs(kind: str, shape: tuple[int, ...]) -> None:
    conv = len(shape) == 4
    layer = nn.Conv2d(3, 16, 3) if conv else nn.Linear(40, 16)
    pass_ = BinarizeWeights(kind=kind, keep_ends=False, min_elements=1, min_sqnr_db=ANY)
    file = exact(pass_, layer, torch.randn(2, 3, 6, 6) if conv else torch.randn(2, 40))
    assert stored(file)["weight_codes"] == "UINT8"
    optimized = [node.op_type for node in optimized_model(file.to_bytes()).graph]
    assert set(optimized) <= ({"Conv", "ReorderInput", "ReorderOutput"} if conv else {"Gemm"})


def test_an_embedding_reads_a_table():
    file = exact(CodebookWeights(), nn.Embedding(100, 30), torch.randint(0, 100, (2, 4)))
    assert stored(file) == {"weight_places": "UINT8"}


def test_a_graph_in_training_exports_as_it_evaluates():
    pass_ = BinarizeWeights(train=True, keep_ends=False, min_elements=1, min_sqnr_db=ANY)
    file = exact(pass_, nn.Conv2d(3, 8, 3), torch.randn(2, 3, 6, 6))
    assert "weight" in file.model.graph.initializers


def lossy_graph() -> tuple[fxopt.CapturedModule, Tensor]:
    """Return a graph that calls each of the operators."""
    net = nn.Sequential(
        nn.Embedding(60, 32), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32),
        nn.Linear(32, 4), nn.Linear(4, 4),
    )  # fmt: skip
    index = torch.randint(0, 60, (3, 5))
    passes = [
        CodebookWeights(skip=("0.*", "3.*", "5.*"), min_sqnr_db=ANY),
        BinarizeWeights(train=True, skip=("0.*", "3.*"), min_sqnr_db=ANY),
        QuantizeWeights(min_elements=1024, min_sqnr_db=ANY),
    ]
    return fxopt.optimize(captured(net, index), passes, strict=True), index


def test_saved_graphs_come_back(tmp_path):
    gm, index = lossy_graph()
    called = {node.target.__name__.split(".")[0] for node in gm.graph.nodes if node.op == "call_function"}
    assert called >= {"gather_nbits", "matmul_nbits", "lookup_nbits", "binarize_ste"}
    fxopt.save(gm, tmp_path / "net.fxopt")
    loaded = fxopt.load(tmp_path / "net.fxopt")
    assert torch.equal(loaded(index), gm(index))
    assert torch.equal(copy.deepcopy(gm)(index), gm(index))
    assert {name: t.dtype for name, t in loaded.named_buffers()} == {name: t.dtype for name, t in gm.named_buffers()}
    assert [name for name, _ in loaded.named_parameters()] == [name for name, _ in gm.named_parameters()]
    to_onnx(loaded, contract=Contract.ROUNDING)


def test_a_process_that_imports_nothing_else_loads_them(tmp_path):
    gm, index = lossy_graph()
    fxopt.save(gm, tmp_path / "net.fxopt")
    torch.save(index, tmp_path / "index.pt")
    code = (
        "import sys, torch, fxopt; folder = sys.argv[1]; gm = fxopt.load(folder + '/net.fxopt'); "
        "torch.save(gm(torch.load(folder + '/index.pt')).detach(), folder + '/out.pt')"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), gm(index).detach(), rtol=1e-6, atol=1e-6)


def test_the_file_of_a_table_is_small_on_disk(tmp_path):
    net, x = nn.Linear(512, 512, bias=False), torch.randn(2, 512)
    sizes = {}
    for name, pass_ in {"float": None, "codebook": CodebookWeights(), "blocks": QuantizeWeights()}.items():
        gm = captured(net, x) if pass_ is None else fxopt.optimize(captured(net, x), [pass_], strict=True)
        path = tmp_path / f"{name}.onnx"
        to_onnx(gm, path)
        Session(path)
        sizes[name] = path.stat().st_size
    assert sizes["codebook"] < sizes["float"] / 7
    assert sizes["blocks"] < sizes["float"] / 6
