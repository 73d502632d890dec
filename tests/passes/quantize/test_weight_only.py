"""Matrices in blocks: which are, which are not and why, and that every reader reads the same numbers."""

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.export import to_onnx
from fxopt.passes import QuantizeWeights
from fxopt.passes.quantize.blocks import quantize_blocks
from fxopt.testing import check_pass
from fxopt.weight_only_ops import GATHER_NBITS, MATMUL_NBITS

SMALL = QuantizeWeights(min_elements=64)


def targets(gm: fxopt.CapturedModule) -> list[object]:
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]


def stored(weight: Tensor, pass_: QuantizeWeights = SMALL) -> Tensor:
    """Return the floats that the weight, f32[out, in], is stored as."""
    return quantize_blocks(weight, bits=pass_.bits, block_size=pass_.block_size, symmetric=pass_.symmetric).floats()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_layer_multiplies_by_its_blocks(bits: int, symmetric: bool) -> None:
    layer, x = nn.Linear(40, 6), torch.randn(3, 5, 40)
    pass_ = QuantizeWeights(bits=bits, symmetric=symmetric, block_size=16, min_elements=64)
    result = check_pass(pass_, layer, x, changes=1, skips=[])
    assert targets(result.gm) == [MATMUL_NBITS]
    want = quantize_blocks(layer.weight, bits=bits, block_size=16, symmetric=symmetric).floats()
    torch.testing.assert_close(result.gm(x), nn.functional.linear(x, want, layer.bias), rtol=1e-6, atol=1e-6)


def test_text():
    check_pass(
        QuantizeWeights(min_elements=64, symmetric=True),
        nn.Linear(64, 3),
        torch.randn(2, 64),
        text="""
            %bias = attribute f32[3]
            %input : f32[2, 64]
            %weight_blocks = attribute u8[3, 2, 16]
            %weight_scales = attribute f32[3, 2]
            %0 : f32[2, 3] = fxopt.matmul_nbits(%input, %weight_blocks, %weight_scales, None, 4, 32, 64, %bias)
            return %0
        """,
    )


class Products(nn.Module):
    """The ways to multiply by a constant matrix f32[in, out]."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.weight = nn.Parameter(torch.randn(40, 8))
        self.bias = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        ways = {
            "matmul": lambda: x @ self.weight,
            "mm": lambda: torch.mm(x, self.weight),
            "addmm": lambda: torch.addmm(self.bias, x, self.weight),
            "transposed twice": lambda: nn.functional.linear(x, self.weight.transpose(0, 1).t().permute(1, 0)),
        }
        return ways[self.way]()


@pytest.mark.parametrize("way", ["matmul", "mm", "addmm", "transposed twice"])
def test_products_with_a_matrix_of_columns(way: str) -> None:
    net, x = Products(way), torch.randn(3, 40)
    result = check_pass(SMALL, net, x, changes=1, skips=[])
    assert targets(result.gm) == [MATMUL_NBITS]
    want = x @ stored(net.weight.t()).t() + (net.bias if way == "addmm" else 0)
    torch.testing.assert_close(result.gm(x), want, rtol=1e-5, atol=1e-5)


class Tied(nn.Module):
    """A table of words that is also the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 40)
        self.head = nn.Linear(40, 20, bias=False)
        self.head.weight = self.words.weight

    def forward(self, index: Tensor) -> Tensor:
        return self.head(self.words(index).tanh())


def test_a_shared_weight_is_stored_once_and_read_by_both():
    net, index = Tied(), torch.randint(0, 20, (2, 3))
    result = check_pass(SMALL, net, index, changes=2, skips=[])
    assert targets(result.gm).count(GATHER_NBITS) == targets(result.gm).count(MATMUL_NBITS) == 1
    assert sum(node.op == "get_attr" for node in result.gm.graph.nodes) == 3  # integers, scales, zero points
    table = stored(net.words.weight)
    torch.testing.assert_close(result.gm(index), table[index].tanh() @ table.T, rtol=1e-5, atol=1e-5)


def test_the_floats_of_a_shared_weight_are_in_no_file(tmp_path):
    index = torch.randint(0, 20, (2, 3))
    gm = fxopt.optimize(Tied().eval(), [SMALL], index, strict=True)
    assert not [name for name, held in gm.state_dict().items() if held.dtype is torch.float32 and held.numel() >= 800]
    fxopt.save(gm, tmp_path / "net.fxopt")
    loaded = fxopt.load(tmp_path / "net.fxopt")
    assert loaded.state_dict().keys() == gm.state_dict().keys()
    assert torch.equal(loaded(index), gm(index))


def test_a_shared_weight_stays_if_one_reader_needs_floats():
    pass_ = QuantizeWeights(min_elements=64, kinds=("linear",))
    result = check_pass(pass_, Tied(), torch.randint(0, 20, (2, 3)), changes=0)
    assert [skip.why for skip in result.skips] == ["its weight is also read by embedding (aten.embedding.default)"]


class Refused(nn.Module):
    """Layers that keep their floats, one for each reason."""

    def __init__(self, reason: str) -> None:
        super().__init__()
        self.reason = reason
        self.weight = nn.Parameter(torch.randn(8, 40))
        self.square = nn.Parameter(torch.randn(40, 40))

    def forward(self, x: Tensor) -> object:
        linear = nn.functional.linear
        ways = {
            "computed": lambda: linear(x, self.weight * 2),
            "sum": lambda: (linear(x, self.weight), self.weight.sum()),
            "both ways": lambda: (linear(x, self.square), x @ self.square),
            "alpha": lambda: torch.addmm(x, x, self.square, alpha=2),
            "rows": lambda: torch.addmm(x, x, self.square),
        }
        return ways[self.reason]()


@pytest.mark.parametrize(
    ("reason", "why"),
    [
        ("computed", ["its weight is computed when the graph runs"]),
        ("sum", ["its weight is also read by sum_1 (aten.sum.default)"]),
        ("both ways", ["its weight is read transposed by matmul", "its weight is read transposed by matmul"]),
        ("alpha", ["alpha or beta is not 1"]),
        ("rows", ["what is added is no vector of its outputs"]),
    ],
)
def test_leaves_alone_and_says_why(reason: str, why: list[str]) -> None:
    check_pass(SMALL, Refused(reason), torch.randn(3, 40), changes=0, skips=why)


def test_leaves_weights_alone_by_name_size_type_and_value():
    x = torch.randn(2, 40)
    check_pass(QuantizeWeights(min_elements=64, skip=("wei*",)), nn.Linear(40, 8), x, skips=["its name is one to skip"])
    check_pass(QuantizeWeights(min_elements=64, skip=("linear",)), nn.Linear(40, 8), x, changes=0)
    check_pass(QuantizeWeights(), nn.Linear(40, 8), x, skips=["its weight has 320 elements, fewer than 4096"])
    check_pass(SMALL, nn.Linear(40, 8).double(), x.double(), skips=["its weight is torch.float64"])
    narrow = QuantizeWeights(bits=8, block_size=128, min_elements=1)
    check_pass(narrow, nn.Linear(4, 8), torch.randn(2, 4), skips=["its blocks would take 168 bytes instead of 128"])
    broken = nn.Linear(40, 8)
    with torch.no_grad():
        broken.weight[1, 2] = torch.inf
    result = SMALL(fxopt.capture(broken, (x,), verify=False))
    assert [skip.why for skip in result.skips] == ["its weight holds NaN or infinity"]


@pytest.mark.parametrize(("row", "block"), [(8, 16), (16, 16), (17, 32), (40, 64), (200, 128)])
def test_blocks_are_no_larger_than_rows(row: int, block: int) -> None:
    pass_ = QuantizeWeights(bits=8, block_size=128, min_elements=1)
    result = check_pass(pass_, nn.Embedding(50, row), torch.arange(6), changes=1, skips=[])
    (call,) = (node for node in result.gm.graph.nodes if node.target is GATHER_NBITS)
    assert fxopt.arg(call, "block_size") == block
    to_onnx(result.gm)  # compared with ORT, optimizer off and on


def test_leaves_alone_what_a_branch_is_handed():
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(40, 40)

        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:
                return self.layer(x)
            return x * 2

    check_pass(SMALL, Branch(), torch.randn(3, 40), changes=0, skips=["its weight is handed in when the graph runs"])


def test_gradients_reach_what_stands_before():
    net = nn.Sequential(nn.Linear(4, 40), nn.Linear(40, 8))
    gm = fxopt.optimize(net, [QuantizeWeights(min_elements=200)], (torch.randn(2, 4),), strict=True)
    gm(torch.randn(2, 4)).sum().backward()
    assert float(dict(gm.named_parameters())["0.weight"].grad.abs().sum()) > 0


def test_two_passes_give_two_widths():
    net = nn.Sequential(nn.Embedding(30, 40), nn.Linear(40, 8))
    passes = "quantize-weights{min_elements=64,kinds=linear},quantize-weights{bits=8,min_elements=64}"
    gm = fxopt.optimize(net, passes, (torch.tensor([[1, 2]]),), strict=True)
    widths = {node.target: fxopt.arg(node, "bits") for node in gm.graph.nodes if node.op == "call_function"}
    assert widths == {GATHER_NBITS: 8, MATMUL_NBITS: 4}
    assert gm.report.steps[0].notes == ("weights of 1280 bytes take 328 bytes in blocks",)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"bits": 3}, "bits is 3; wanted 2, 4, 8"),
        ({"block_size": 24}, "block_size is 24"),
        ({"accuracy_level": 2}, "accuracy_level is 2"),
        ({"search": "best"}, "search is 'best'"),
    ],
)
def test_refuses_options(options: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        QuantizeWeights(**options)


def test_refuses_a_text_of_names():
    with pytest.raises(TypeError, match="wanted a tuple of patterns"):
        QuantizeWeights(skip="head")
