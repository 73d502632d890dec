"""DeepSpeed, where it is installed: masks and scales are the same in all processes and hold."""

from __future__ import annotations

import pathlib

import pytest
import torch

from tests.distributed.cases import Blocks, X, Y, adam, masked, quantized, train
from tests.distributed.launch import torchrun
from tests.distributed.test_ddp import ROUNDING, assert_same

pytest.importorskip("deepspeed", reason="an optional engine")

from tests.distributed.train_deepspeed import STAGES


def test_two_processes_train_as_one_with_all_rows(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    torchrun("-m", "tests.distributed.train_deepspeed", str(tmp_path), folder=tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    plain = quantized(masked(Blocks))
    masks = {name: tensor.clone() for name, tensor in plain.named_buffers() if "mask" in name}
    losses = train(plain, adam(plain), X, Y)
    assert masks
    assert losses[-1] < losses[0]
    for stage in STAGES:
        assert_same(first[stage]["state"], second[stage]["state"])
        for name, tensor in plain.state_dict().items():
            torch.testing.assert_close(first[stage]["state"][name], tensor, **ROUNDING)
        assert all(torch.equal(first[stage]["state"][name], mask) for name, mask in masks.items())
