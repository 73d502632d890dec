"""Weights as places in tables: the same numbers in each reader, trainable tables, refusals."""

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.passes import CodebookWeights
from fxopt.passes.quantize.tables import nearest_codes, number_table
from fxopt.testing import check_pass
from fxopt.weight_only_ops import LOOKUP_NBITS

ANY = -100.0  # dB: the error of tiny nets is not what these tests are about


@pytest.mark.parametrize(
    ("bits", "kind"), [(1, "kmeans"), (2, "kmeans"), (4, "kmeans"), (8, "kmeans"), (4, "uniform"), (2, "power-of-two")]
)
def test_a_convolution_reads_the_nearest_entries(bits: int, kind: str) -> None:
    layer, x = nn.Conv2d(8, 16, 5), torch.randn(2, 8, 7, 7)
    pass_ = CodebookWeights(bits=bits, table=kind, min_sqnr_db=ANY)
    result = check_pass(pass_, layer, x, changes=1, skips=[])
    table = number_table(layer.weight, 2**bits, kind)
    weight = table[nearest_codes(layer.weight, table)]
    torch.testing.assert_close(result.gm(x), nn.functional.conv2d(x, weight, layer.bias), rtol=1e-5, atol=1e-5)
    trainable = [name for name, _ in result.gm.named_parameters()]
    assert trainable == (["bias", "weight_table"] if kind == "kmeans" else ["bias"])


def test_groups_of_channels_have_tables_of_their_own():
    layer = nn.Linear(64, 32)
    with torch.no_grad():
        layer.weight[16:] *= 100
    pass_ = CodebookWeights(bits=4, channels=16, min_sqnr_db=ANY)
    result = check_pass(pass_, layer, torch.randn(2, 64), changes=1)
    (call,) = [node for node in result.gm.graph.nodes if node.target is LOOKUP_NBITS]
    weight = LOOKUP_NBITS(result.gm.weight_places, result.gm.weight_table, 4, fxopt.arg(call, "shape"))
    error = (weight - layer.weight).detach().square().mean(1) / layer.weight.detach().square().mean(1)
    assert bool((error < 0.02).all()), "a table for both halves would have no entries for the small one"


def test_text():
    net = nn.Linear(64, 16)
    net.requires_grad_(False)
    check_pass(
        CodebookWeights(),
        net,
        torch.randn(2, 64),
        text="""
            %bias = attribute f32[16]
            %input : f32[2, 64]
            %weight_places = attribute u8[16, 32]
            %weight_table = attribute f32[16]
            %0 : f32[16, 64] = fxopt.lookup_nbits(%weight_places, %weight_table, 4, [16, 64])
            %1 : f32[2, 16] = aten.linear(%input, %0, %bias)
            return %1
        """,
    )


def test_a_shared_weight_has_one_table():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(40, 32)

        def forward(self, index: Tensor) -> Tensor:
            return nn.functional.linear(self.words(index), self.words.weight) + self.words.weight.sum()

    gm = check_pass(CodebookWeights(), Shared(), torch.tensor([[3, 5]]), changes=1).gm
    assert sum(node.target is LOOKUP_NBITS for node in gm.graph.nodes) == 1
    assert [name for name, _ in gm.named_parameters()] == ["words.weight_table"]


def test_a_step_of_any_optimizer_moves_the_table_along_the_summed_gradient():
    layer, x = nn.Linear(64, 16), torch.randn(4, 64)
    gm = fxopt.optimize(layer, [CodebookWeights(bits=2)], (x,), strict=True)
    before = gm.weight_table.detach().clone()
    gm(x).sum().backward()
    table = number_table(layer.weight, 4, "kmeans")
    codes = nearest_codes(layer.weight, table)
    full = x.sum(0).expand(16, 64)  # of the weight itself
    want = torch.stack([full[codes == entry].sum() for entry in range(4)])
    torch.testing.assert_close(gm.weight_table.grad, want, rtol=1e-4, atol=1e-4)
    torch.optim.SGD(gm.parameters(), lr=0.5).step()
    torch.testing.assert_close(gm.weight_table.detach(), before - 0.5 * want, rtol=1e-4, atol=1e-4)


def test_leaves_alone_and_says_why():
    x = torch.randn(2, 64)
    check_pass(CodebookWeights(), nn.Linear(64, 8), x, skips=["its weight has 512 elements, fewer than 1024"])
    check_pass(CodebookWeights(skip=("*.weight", "weight")), nn.Linear(64, 16), x, skips=["its name is one to skip"])
    check_pass(CodebookWeights(channels=3), nn.Linear(64, 16), x, skips=["16 channels are no multiple of 3"])
    check_pass(
        CodebookWeights(bits=8, channels=1, min_elements=1),
        nn.Linear(64, 16),
        x,
        skips=["places and tables would take 17408 bytes instead of 4096"],
    )
    check_pass(CodebookWeights(), nn.Linear(64, 16).double(), x.double(), skips=["its weight is torch.float64"])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"bits": 3}, "bits is 3; wanted 1, 2, 4, 8"),
        ({"table": "best"}, "table is 'best'"),
        ({"table": "power-of-two", "bits": 1}, "needs 2 bits or more"),
        ({"channels": -1}, "channels is -1"),
    ],
)
def test_refuses_options(options: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        CodebookWeights(**options)
