"""Each importance against its published formula in float64 numpy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxopt
from fxopt.passes import Prune
from fxopt.passes.prune.importance import Loss, group_scores, weight_scores
from fxopt.passes.prune.masks import MaskPlan
from fxopt.passes.prune.plan import prunable
from tests.passes.prune.nets import net

X = torch.randn(6, 3, 7, 7, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 3, 1, 0])


def conv_net() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))  # type: ignore[no-any-return]

    return net(forward, conv=nn.Conv2d(3, 8, 3), norm=nn.BatchNorm2d(8), head=nn.Linear(8, 4))


@pytest.fixture(scope="module")
def gm() -> fxopt.CapturedModule:
    torch.manual_seed(3)
    return fxopt.capture(conv_net(), (X,))


def scores(
    gm: fxopt.CapturedModule, importance: Any, data: Iterable[Any] = (X,), loss: Loss | None = None, seed: int = 0
) -> np.ndarray:
    found = prunable(gm)
    assert [family.name for family in found.families] == ["conv.weight"]
    (result,) = group_scores(gm, found.structure, found.families, importance, data=data, loss=loss, seed=seed).values()
    return result.double().numpy()


def rows(arrays: dict[str, Tensor]) -> np.ndarray:
    """All numbers that belong to each of the eight channels, f64[8, numbers]."""
    parts = [
        arrays["conv.weight"].flatten(1),
        arrays["conv.bias"][:, None],
        arrays["norm.weight"][:, None],
        arrays["norm.bias"][:, None],
        arrays["head.weight"].T,
    ]
    return torch.cat(parts, 1).detach().double().numpy()  # type: ignore[no-any-return]


def weights(gm: fxopt.CapturedModule) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in gm.named_parameters()}


def loss_of(model: Any, item: Any) -> Tensor:
    return F.cross_entropy(model(item[0]), item[1])


def gradients(gm: fxopt.CapturedModule, items: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """The mean gradient in float64, of eager torch."""
    model = conv_net().double().eval()
    model.load_state_dict({name: tensor.double() for name, tensor in gm.state_dict().items()})
    total = torch.stack([loss_of(model, (x.double(), y)) for x, y in items]).mean()
    names, tensors = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(total, tensors), strict=True))


# ---- channels


def test_l1_is_the_sum_of_magnitudes_of_all_that_goes_with_a_channel(gm: fxopt.CapturedModule) -> None:
    np.testing.assert_allclose(scores(gm, "l1"), np.abs(rows(weights(gm))).sum(1), rtol=1e-6)


def test_l2_is_the_norm_of_all_that_goes_with_a_channel(gm: fxopt.CapturedModule) -> None:
    np.testing.assert_allclose(scores(gm, "l2"), np.linalg.norm(rows(weights(gm)), axis=1), rtol=1e-6)


def test_taylor_is_the_square_of_the_sum_of_weight_times_gradient(gm: fxopt.CapturedModule) -> None:
    items = [(X[:3], Y[:3]), (X[3:], Y[3:])]
    want = (rows(weights(gm)) * rows(gradients(gm, items))).sum(1) ** 2
    small = fxopt.capture(conv_net(), (X[:3],))
    small.load_state_dict(gm.state_dict())
    np.testing.assert_allclose(scores(small, "taylor", items, loss_of), want, rtol=1e-3, atol=1e-7)


def test_taylor_leaves_gradients_and_buffers_alone(gm: fxopt.CapturedModule) -> None:
    before = {name: tensor.clone() for name, tensor in gm.state_dict().items()}
    scores(gm, "taylor", [(X, Y)], loss_of)
    assert all(parameter.grad is None for parameter in gm.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in gm.state_dict().items())


def test_taylor_without_a_loss_takes_the_mean_square_of_the_outputs(gm: fxopt.CapturedModule) -> None:
    own = scores(gm, "taylor", [X], lambda model, x: model(x).square().mean())
    np.testing.assert_allclose(scores(gm, "taylor"), own, rtol=1e-5)


def test_activation_is_the_share_of_values_above_zero_behind_the_relu(gm: fxopt.CapturedModule) -> None:
    more = torch.randn(6, 3, 7, 7)
    model = conv_net().eval()
    model.load_state_dict(gm.state_dict())
    found: Any = model
    with torch.no_grad():
        values = torch.cat([found.norm(found.conv(x)) for x in (X, more)]).double().numpy()
    np.testing.assert_allclose(scores(gm, "activation", [X, more]), (values > 0).mean(axis=(0, 2, 3)), rtol=1e-6)


def test_batch_norm_is_the_magnitude_of_the_gain(gm: fxopt.CapturedModule) -> None:
    np.testing.assert_allclose(scores(gm, "batch-norm"), np.abs(weights(gm)["norm.weight"].double().numpy()), rtol=1e-6)


def test_fpgm_is_the_sum_of_distances_between_filters(gm: fxopt.CapturedModule) -> None:
    filters = weights(gm)["conv.weight"].flatten(1).double().numpy()
    want = np.sqrt(((filters[:, None] - filters[None]) ** 2).sum(2)).sum(1)
    np.testing.assert_allclose(scores(gm, "fpgm"), want, rtol=1e-5)


def test_random_depends_on_the_seed_alone(gm: fxopt.CapturedModule) -> None:
    assert scores(gm, "random").tolist() == scores(gm, "random").tolist()
    assert scores(gm, "random").tolist() != scores(gm, "random", seed=1).tolist()


def test_own_importance_is_summed_over_a_channel(gm: fxopt.CapturedModule) -> None:
    def own(graph: fxopt.CapturedModule) -> dict[str, Tensor]:
        return {"conv.weight": torch.arange(216.0).reshape(8, 3, 3, 3)}

    np.testing.assert_allclose(scores(gm, own), np.arange(216.0).reshape(8, 27).sum(1))


@pytest.mark.parametrize("importance", ["l1", "l2", "taylor", "activation", "batch-norm", "fpgm", "random"])
def test_every_importance_works_on_a_masked_graph(gm: fxopt.CapturedModule, importance: str) -> None:
    once = Prune(0.25, importance=importance)(gm).gm
    twice = Prune(0.5, importance=importance).make_plan(once)
    assert int((~twice["conv.bias"]).sum()) == 4
    assert not (twice["conv.bias"] & ~MaskPlan.of(once)["conv.bias"]).any()


def test_tied_weight_counts_under_the_name_that_is_not_its_first() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unread = nn.Linear(4, 6, bias=False)
            self.read = nn.Linear(4, 6, bias=False)
            self.unread.weight = self.read.weight
            self.head = nn.Linear(6, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.read(x).relu())  # type: ignore[no-any-return]

    model = Net()
    gm = fxopt.capture(model, (torch.randn(2, 4),))
    found = prunable(gm)
    (got,) = group_scores(gm, found.structure, found.families, "l1", data=(), loss=None, seed=0).values()
    want = model.read.weight.abs().sum(1) + model.head.weight.abs().sum(0)
    torch.testing.assert_close(got, want.detach())


def test_activation_behind_a_branch_is_measured() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:
                x = x * 2
            return self.last(self.first(x).relu())  # type: ignore[no-any-return]

    x, model = torch.rand(5, 4), Net()
    gm = fxopt.capture(model, (x,))
    found = prunable(gm)
    (got,) = group_scores(gm, found.structure, found.families, "activation", data=[x], loss=None, seed=0).values()
    torch.testing.assert_close(got, (model.first(2 * x) > 0).float().mean(0))


def test_family_with_nothing_to_measure_is_left_out_with_the_reason() -> None:
    model = net(lambda self, x: self.b(self.a(x).relu()), a=nn.Linear(4, 6), b=nn.Linear(6, 2))
    gm = fxopt.capture(model, (torch.randn(2, 4),))
    with pytest.raises(fxopt.PassError, match=r"a\.weight: it has nothing that 'batch-norm' measures"):
        Prune(0.5, importance="batch-norm").make_plan(gm)


# ---- single weights


def test_single_weights_are_measured_one_by_one(gm: fxopt.CapturedModule) -> None:
    held = {name: tensor.double().numpy() for name, tensor in weights(gm).items()}
    slopes = {name: tensor.numpy() for name, tensor in gradients(gm, [(X, Y)]).items()}
    wanted = {
        "l1": {name: np.abs(each) for name, each in held.items()},
        "l2": {name: each**2 for name, each in held.items()},
        "taylor": {name: (each * slopes[name]) ** 2 for name, each in held.items()},
    }
    for kind, want in wanted.items():
        found = weight_scores(gm, kind, data=[(X, Y)], loss=loss_of, seed=0)
        assert found.keys() == want.keys()
        for name, each in found.items():
            np.testing.assert_allclose(each.double().numpy(), want[name], rtol=2e-3, atol=1e-8)


def test_least_important_weights_by_taylor_are_those_whose_product_is_near_zero_of_either_sign(
    gm: fxopt.CapturedModule,
) -> None:
    slopes = gradients(gm, [(X, Y)])["conv.weight"].numpy()
    size = np.abs(weights(gm)["conv.weight"].double().numpy() * slopes).ravel()
    plan = Prune(0.5, granularity="weights", importance="taylor", loss=loss_of).make_plan(gm, [(X, Y)])
    gone = ~plan["conv.weight"].numpy().ravel()
    assert gone.sum() == 108
    assert size[gone].max() <= size[~gone].min() * 1.01


# ---- what is no importance


def test_taylor_loss_with_axes_is_refused(gm: fxopt.CapturedModule) -> None:
    with pytest.raises(fxopt.PassError, match=r"the loss for the importance 'taylor' is no number with a gradient"):
        scores(gm, "taylor", [X], lambda model, x: model(x))


def test_taylor_loss_that_does_not_depend_on_the_parameters_is_refused(gm: fxopt.CapturedModule) -> None:
    with pytest.raises(fxopt.PassError, match=r"wanted\s+a tensor of one element that depends on the parameters"):
        scores(gm, "taylor", [X], lambda model, x: x.sum())


def test_taylor_without_data_is_refused(gm: fxopt.CapturedModule) -> None:
    with pytest.raises(fxopt.CalibrationError, match="the data for the importance 'taylor' are empty, or used up"):
        scores(gm, "taylor", [], loss_of)


def test_activation_without_data_is_refused(gm: fxopt.CapturedModule) -> None:
    with pytest.raises(fxopt.CalibrationError, match="the calibration data are empty"):
        scores(gm, "activation", [])


def test_importance_that_is_nan_is_refused(gm: fxopt.CapturedModule) -> None:
    with pytest.raises(fxopt.PassError, match=r"the importance 'taylor' of 'conv\.weight' is NaN"):
        scores(gm, "taylor", [X], lambda model, x: model(x).sum() * torch.nan)


def test_importance_of_channels_is_refused_for_single_weights(gm: fxopt.CapturedModule) -> None:
    with pytest.raises(fxopt.PassError, match="for single weights there are l1, l2, taylor and random"):
        Prune(0.5, granularity="weights", importance="fpgm").make_plan(gm)


def test_own_importance_of_another_shape_is_refused(gm: fxopt.CapturedModule) -> None:
    with pytest.raises(fxopt.PassError, match=r"scores 'conv\.weight' in another shape.*\n\s+got\s+\(8,\)"):
        scores(gm, lambda graph: {"conv.weight": torch.ones(8)})


def test_own_importance_of_an_unknown_parameter_is_refused(gm: fxopt.CapturedModule) -> None:
    with pytest.raises(fxopt.PassError, match=r"scores 'cnov\.weight', and the graph has no such parameter"):
        scores(gm, lambda graph: {"cnov.weight": torch.ones(8)})


def test_own_importance_that_returns_a_list_is_refused(gm: fxopt.CapturedModule) -> None:
    with pytest.raises(fxopt.PassError, match="the own importance returned a list; wanted scores by name"):
        scores(gm, lambda graph: [1.0])
