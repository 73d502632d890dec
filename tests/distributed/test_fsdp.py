"""FSDP, both kinds: parameters lie split among processes between steps, and train as in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.cases import GRAPHS, X, Y, adam, covered, train
from tests.distributed.launch import trained_once
from tests.distributed.test_ddp import ROUNDING, assert_same
from tests.distributed.train_fsdp import ALL, SHARDED, SPLIT, WRAPPED, train_all


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = trained_once(train_all, tmp_path_factory)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def assert_trained_like_one_process(name: str, kind: str, outcome: list[dict[str, Any]]) -> None:
    alone = GRAPHS[name]()
    losses = train(alone, adam(alone), X, Y)
    first, second = (each[name][kind] for each in outcome)
    mean = [sum(pair) / 2 for pair in zip(first["losses"], second["losses"], strict=True)]
    torch.testing.assert_close(torch.tensor(mean), torch.tensor(losses), **ROUNDING)
    assert set(first["state"]) == set(alone.state_dict())
    for key, tensor in alone.state_dict().items():
        torch.testing.assert_close(first["state"][key], tensor, msg=lambda text, key=key: f"{key}: {text}", **ROUNDING)


@pytest.mark.parametrize(
    ("name", "kind"),
    [pytest.param(name, "fully_shard", marks=covered(name)) for name in SHARDED if name in GRAPHS]
    + [(name, "FullyShardedDataParallel") for name in WRAPPED if name in GRAPHS],
)
def test_the_gathered_state_is_that_of_one_process(name: str, kind: str, outcome: list[dict[str, Any]]) -> None:
    assert_trained_like_one_process(name, kind, outcome)


def test_modules_split_off_are_sharded_one_by_one(outcome: list[dict[str, Any]]) -> None:
    assert_trained_like_one_process(SPLIT, "split", outcome)


@pytest.mark.parametrize("kind", ["fully_shard", "FullyShardedDataParallel"])
def test_learned_scales_train_and_agree(kind: str, outcome: list[dict[str, Any]]) -> None:
    states = [each["learned"][kind]["state"] for each in outcome]
    assert_same(*states)
    assert all(tensor.any() for name, tensor in states[0].items() if name.endswith("_growth"))


@pytest.mark.parametrize("kind", ["fully_shard", "FullyShardedDataParallel"])
def test_half_precision_trains_float32_weights_that_agree(kind: str, outcome: list[dict[str, Any]]) -> None:
    states = [each["half"][kind]["state"] for each in outcome]
    assert_same(*states)
    alone = ALL["half"]()
    losses = train(alone, adam(alone), X, Y)
    mean = [sum(pair) / 2 for pair in zip(*(each["half"][kind]["losses"] for each in outcome), strict=True)]
    torch.testing.assert_close(torch.tensor(mean), torch.tensor(losses), rtol=0, atol=2**-8)  # of bfloat16
    for name, tensor in alone.state_dict().items():
        # A step of Adam is as long as the learning rate where a gradient near 0 is rounded to another sign.
        torch.testing.assert_close(states[0][name], tensor, rtol=0, atol=2 * 5 * 1e-2)


def test_parameters_are_parts_between_steps_and_masks_are_whole(outcome: list[dict[str, Any]]) -> None:
    for each in outcome:
        assert set(each["between steps"]["parameters"].values()) == {True}
        assert set(each["between steps"]["buffers"].values()) == {False}


def test_a_gathered_state_loads_into_another_sharded_graph(outcome: list[dict[str, Any]]) -> None:
    assert all(each["between steps"]["loads"] for each in outcome)


def test_modes_switch_behind_the_sharding(outcome: list[dict[str, Any]]) -> None:
    assert [each["modes"] for each in outcome] == [{"whole": True, "split": True}] * 2


@pytest.mark.parametrize(
    ("what", "action"),
    [
        ("clone", "copied"),
        ("save", "saved"),
        ("a pass", "copied"),
        ("a pass on FullyShardedDataParallel", "copied"),
        ("deepcopy of FullyShardedDataParallel", "copied"),
        ("pruner", "masked further"),
        ("adaptive precision", "probed"),
    ],
)
def test_what_would_see_parts_of_parameters_is_refused(what: str, action: str, outcome: list[dict[str, Any]]) -> None:
    message = outcome[0]["refused"][what]
    assert message.startswith(f"the graph cannot be {action}: FSDP has split its parameters among processes")
    assert "full_state_dict=True" in message
