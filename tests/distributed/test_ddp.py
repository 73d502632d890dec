"""DistributedDataParallel: two processes train what one does with both their batches, and agree to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fxopt
from tests.distributed.cases import GRAPHS, LEARNED, STEPS, Blocks, X, Y, adam, covered, masked, scores_of, train
from tests.distributed.launch import trained_once
from tests.distributed.train_ddp import train_all

# Sums over a batch are taken in another order, five steps of Adam long: some units in the last place of 1.
ROUNDING = {"rtol": 1e-5, "atol": 2e-6}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process found, and in ``folder`` what process 0 saved."""
    folder = trained_once(train_all, tmp_path_factory)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) | {"folder": folder} for rank in range(2)]


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], *, but: str = "-") -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        if but not in name:
            assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("name", [pytest.param(name, marks=covered(name)) for name in GRAPHS])
def test_losses_and_weights_are_those_of_one_process(name: str, outcome: list[dict[str, Any]]) -> None:
    alone = GRAPHS[name]()
    losses = train(alone, adam(alone), X, Y)
    found = [each[name] for each in outcome]
    mean = [sum(pair) / 2 for pair in zip(*(each["losses"] for each in found), strict=True)]
    torch.testing.assert_close(torch.tensor(mean), torch.tensor(losses), **ROUNDING)
    for key, tensor in alone.state_dict().items():
        torch.testing.assert_close(
            found[0]["state"][key], tensor, msg=lambda text, key=key: f"{key}: {text}", **ROUNDING
        )


@pytest.mark.parametrize("name", [*GRAPHS, "learned"])
def test_all_of_the_state_is_bit_equal_in_both_processes(name: str, outcome: list[dict[str, Any]]) -> None:
    assert_same(*(each[name]["state"] for each in outcome))


def test_scales_are_trained(outcome: list[dict[str, Any]]) -> None:
    grown = {name: tensor for name, tensor in outcome[0]["learned"]["state"].items() if name.endswith("_growth")}
    assert grown
    assert all(tensor.abs().min() > 0 for tensor in grown.values())
    assert all(tensor.ndim == 1 for tensor in grown.values())  # FSDP takes no parameters without axes


@pytest.mark.parametrize("name", ["masked", "masked and quantized", "recurrent", "learned"])
def test_masked_weights_stay_exactly_zero(name: str, outcome: list[dict[str, Any]]) -> None:
    state = outcome[1][name]["state"]
    masks = {key: mask for key, mask in state.items() if key.endswith("_mask")}
    assert masks
    for key, mask in masks.items():
        assert not mask.all()
        assert not (state[key.removesuffix("_mask")] * mask)[~mask].any()


@pytest.mark.parametrize("name", [*GRAPHS, "learned"])
def test_what_one_process_saves_is_what_was_trained(name: str, outcome: list[dict[str, Any]]) -> None:
    gm = fxopt.load(outcome[0]["folder"] / f"{name}.fxopt")
    torch.testing.assert_close(scores_of(gm.eval()(X)), outcome[0][name]["evaluated"], rtol=0, atol=0)
    assert isinstance(gm, fxopt.CapturedModule)


def test_masks_and_scales_of_processes_that_chose_others_become_those_of_the_first(
    outcome: list[dict[str, Any]],
) -> None:
    states = [each["other weights in each process"] for each in outcome]
    # Statistics of a batch norm are those of the batches that a process sees, until the next forward of DDP.
    assert_same(*states, but="running_")
    assert any(not mask.all() for name, mask in states[0].items() if name.endswith("_mask"))


def test_batch_norm_and_dropout_do_what_they_do_in_the_module_with_modes_switched_between(
    outcome: list[dict[str, Any]],
) -> None:
    for each in outcome:
        graph, module = each["batch norm"]["graph"], each["batch norm"]["module"]
        torch.testing.assert_close(torch.tensor(graph["losses"]), torch.tensor(module["losses"]), rtol=0, atol=0)
        for name, tensor in module["state"].items():
            assert torch.equal(graph["state"][name], tensor), name


def test_ranges_calibrated_on_a_share_each_are_those_of_all(outcome: list[dict[str, Any]]) -> None:
    scales = [
        {name: tensor for name, tensor in each["ranges of each process"]["before"].items() if "_scale" in name}
        for each in outcome
    ]
    assert len(scales[0]) > 2
    assert_same(*scales)
    assert_same(*(each["ranges of each process"]["state"] for each in outcome), but="running_")


def test_pruner_takes_the_same_decisions_at_the_same_steps(outcome: list[dict[str, Any]]) -> None:
    first, second = (each["pruner"] for each in outcome)
    assert first["due"] == second["due"]
    assert sum(first["due"]) == 2
    assert len(first["due"]) == STEPS
    assert any(not mask.all() for mask in first["plan"].values())
    assert_same(first["plan"], second["plan"])
    assert_same(first["state"], second["state"], but="running_")


def test_half_precision_skips_the_same_steps_and_trains_the_same_weights(outcome: list[dict[str, Any]]) -> None:
    first, second = (each["half"] for each in outcome)
    assert first["scales"] == second["scales"]
    assert first["scales"][0] == 2.0**27
    assert first["scales"][-1] == first["scales"][-2] > 1
    assert_same(first["state"], second["state"])
    start = masked(Blocks).state_dict()
    assert not torch.equal(first["state"]["head.weight"], start["head.weight"])
    assert all(tensor.dtype is start[name].dtype for name, tensor in first["state"].items())


def test_precision_adapts_in_all_processes_to_what_overflows_in_one(outcome: list[dict[str, Any]]) -> None:
    first, second = (each["adaptive"] for each in outcome)
    assert first["log"] == second["log"]
    assert "step 1: linear (" in first["log"][0]
    assert "float16 -> float32: its value is not finite in float16" in first["log"][0]
    assert any("float32 -> float16: values and gradients were up to" in line for line in first["log"])


def test_gradients_of_learned_scales_are_means_over_the_processes() -> None:
    gm = LEARNED()

    def gradients(x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        gm.zero_grad()
        torch.nn.functional.cross_entropy(gm(x), y).backward()
        return {name: p.grad.clone() for name, p in gm.named_parameters() if p.grad is not None}

    whole, first, second = gradients(X, Y), gradients(X[::2], Y[::2]), gradients(X[1::2], Y[1::2])
    compared = 0
    for name in (name for name in whole if name.endswith("_growth")):
        inside = torch.stack([each[name].abs() for each in (whole, first, second)]).amax(0) < 1  # not cut off
        mean = (first[name] + second[name]) / 2
        # Sums that cancel: the error is relative to their terms, not to themselves.
        torch.testing.assert_close(mean[inside], whole[name][inside], rtol=1e-3, atol=1e-5)
        compared += int(inside.sum())
    assert compared > 8
