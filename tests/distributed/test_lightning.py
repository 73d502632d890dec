"""Lightning: a captured graph is a module like any other, in one process and in two."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch

from tests.distributed.cases import X, Y, adam, train
from tests.distributed.launch import torchrun

pytest.importorskip("lightning", reason="an optional engine")

from tests.distributed.train_lightning import STEPS, Module, fit, graph


@pytest.fixture(scope="module")
def alone() -> Module:
    torch.manual_seed(0)
    module = Module(graph())
    fit(module)
    return module


def assert_modes(modes: list[tuple[str, bool]]) -> None:
    assert {kind for kind, _ in modes} == {"train", "validate"}
    assert sum(kind == "train" for kind, _ in modes) == STEPS
    for kind, trains in modes:
        assert trains is (kind == "train"), modes


def test_the_graph_trains_in_training_steps_and_evaluates_in_validations_between(alone: Module) -> None:
    assert_modes(alone.modes)


def test_weights_masks_and_statistics_are_those_of_a_plain_loop(alone: Module) -> None:
    plain = graph()
    optimizer = adam(plain)
    for step in range(STEPS):
        start = 2 * step % len(X)
        train(plain, optimizer, X[start : start + 2], Y[start : start + 2], steps=1)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(alone.gm.state_dict()[name], tensor, rtol=0, atol=0, msg=name)


@pytest.mark.slow
def test_two_processes_train_the_same_masked_and_quantized_weights(tmp_path: pathlib.Path) -> None:
    torchrun("-m", "tests.distributed.train_lightning", str(tmp_path), folder=tmp_path)
    found: list[dict[str, Any]] = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    first, second = (each["state"] for each in found)
    start = graph().state_dict()
    for each in found:
        assert_modes(each["modes"])
    for name, tensor in first.items():
        if "running_" not in name:  # statistics of the batches that each process sees
            assert torch.equal(tensor, second[name]), name
    for name, mask in first.items():
        if name.endswith("_mask"):
            weight = name.removesuffix("_mask")
            assert torch.equal(mask, start[name])
            assert not (first[weight] * mask)[~mask].any()
            assert not torch.equal(first[weight], start[weight])
