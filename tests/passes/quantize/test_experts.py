"""Experts of mixtures in integers: each a layer of its own, whichever tokens it gets, and if it gets none."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.export import coverage, to_onnx
from fxopt.grouped_ops import GROUPED_MM, JOIN_GROUPS, SPLIT_GROUPS
from fxopt.numerics import measure
from fxopt.passes import ConvertQat, PrepareQat, Quantize
from fxopt.passes.quantize.lower_for_integers import LowerForIntegers
from fxopt.testing import check_pass
from tests.models.mixtures import SortedExperts

BATCHES = [torch.randn(12, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(8)]


def targets(gm: fxopt.CapturedModule) -> Counter[object]:
    return Counter(node.target for node in gm.graph.nodes)


@pytest.mark.parametrize("by_rows", [True, False])
def test_each_expert_becomes_a_layer(by_rows: bool) -> None:
    model = SortedExperts(by_rows=by_rows).eval()
    result = check_pass(LowerForIntegers(), model, BATCHES[0], dynamic_shapes=({0: "tokens"},))
    found = targets(result.gm)
    assert found[torch.ops.aten.linear.default] == 1 + 2 * 4
    assert (found[SPLIT_GROUPS], found[JOIN_GROUPS], found[GROUPED_MM]) == (2, 2, 0)
    for tokens in (1, 5, 40):
        x = torch.randn(tokens, 32)
        torch.testing.assert_close(result.gm(x), model(x), rtol=1e-5, atol=1e-6)


def test_matrices_that_are_computed_stay_together() -> None:
    def function(x: Tensor, weight: Tensor) -> Tensor:
        return GROUPED_MM(x, weight.relu(), torch.tensor([2, 2, 5]))

    check_pass(LowerForIntegers(), function, torch.randn(6, 4), torch.randn(3, 4, 2), changes=0)


class Mixture(nn.Module):
    """Experts that are modules; ``idle`` keeps the last of them from ever being chosen."""

    def __init__(self, *, idle: bool) -> None:
        super().__init__()
        self.router = nn.Linear(32, 4, bias=False)
        self.register_buffer("preference", torch.tensor([0.0, 0.0, 0.0, -50.0 if idle else 0.0]))
        self.up, self.down = (nn.ModuleList(nn.Linear(*sizes) for _ in range(4)) for sizes in ((32, 64), (64, 32)))

    def forward(self, x: Tensor) -> Tensor:
        weights, experts = torch.topk((self.router(x) + self.preference).softmax(-1), 2)
        chosen = experts.flatten()
        order = chosen.argsort(stable=True)
        counts = nn.functional.one_hot(chosen, 4).sum(0).tolist()
        parts = torch.split(x[order // 2], counts)
        hidden = [up(part).relu() for up, part in zip(self.up, parts, strict=True)]
        each = torch.cat([down(part) for down, part in zip(self.down, hidden, strict=True)])
        return torch.zeros_like(x).index_add(0, order // 2, each * weights.flatten()[order, None])


@pytest.mark.ort
@pytest.mark.parametrize("net", ["sorted", "modules", "modules, one idle"])
def test_all_experts_that_are_chosen_multiply_in_integers(net: str) -> None:
    torch.manual_seed(0)
    model = (SortedExperts() if net == "sorted" else Mixture(idle="idle" in net)).eval()
    gm = fxopt.capture(model, (BATCHES[0],), dynamic_shapes=({0: "tokens"},))
    small = fxopt.optimize(gm, [Quantize(recipe="accurate")], calibration=BATCHES, strict=True)
    file = to_onnx(small)
    found = coverage(file)
    assert found.integer_share == 1.0  # of what is computed: an expert that nobody chooses is not
    assert found.kernels["linear"] == (7 if "idle" in net else 9, 9)
    assert measure(gm(BATCHES[1]).detach(), file.session().run((BATCHES[1],))[0]).sqnr_db > 20


@pytest.mark.ort
def test_experts_are_trained_with_quantizers_in_place() -> None:
    torch.manual_seed(0)
    gm = fxopt.capture(SortedExperts(), (BATCHES[0],), dynamic_shapes=({0: "tokens"},))
    trained = fxopt.optimize(gm, [PrepareQat()], calibration=BATCHES, strict=True).train()
    before = {name: held.detach().clone() for name, held in trained.named_parameters()}
    assert len(before) == 1 + 2 * 4
    optimizer = torch.optim.Adam(trained.parameters(), 1e-2)
    losses = []
    for x in BATCHES * 4:
        loss = (trained(x) - x.roll(1, 1)).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])
    assert all(not torch.equal(held, before[name]) for name, held in trained.named_parameters())
    file = to_onnx(fxopt.optimize(trained.eval(), [ConvertQat()], strict=True))
    assert coverage(file).kernels["linear"] == (9, 9)


def test_rows_that_noise_sends_elsewhere_leave_the_biases_alone() -> None:
    """On the border between two experts, integers choose otherwise than floats do."""

    class Border(Mixture):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.cat([x, x + 1e-3 * x.flip(1)]))

    torch.manual_seed(0)
    model = Border(idle=False).eval()
    with torch.no_grad():
        model.router.weight.mul_(0.01)
    gm = fxopt.capture(model, (BATCHES[0],), dynamic_shapes=({0: "tokens"},))
    small = fxopt.optimize(gm, [Quantize(min_sqnr_db=-20.0)], calibration=BATCHES, strict=True)
    assert measure(gm(BATCHES[0]).detach(), small(BATCHES[0]).detach()).sqnr_db > 3


def test_an_output_may_be_empty_for_some_calibration_inputs() -> None:
    class Chosen(nn.Module):
        """Scores, and those rows of them that stand out: of most inputs none."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            scores = self.layer(x)
            return scores, scores[x[:, 0] > 1e3]

    gm = fxopt.capture(Chosen().eval(), (BATCHES[0],), dynamic_shapes=({0: "rows"},))
    small = fxopt.optimize(gm, [Quantize()], calibration=BATCHES, strict=True)
    scores, chosen = small(BATCHES[0])
    assert measure(gm(BATCHES[0])[0].detach(), scores.detach()).sqnr_db > 20
    assert chosen.shape == (0, 8)
