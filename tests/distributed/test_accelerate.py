"""Hugging Face Accelerate: gradient accumulation, saved states, autocast, in one process and in two."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fxopt
from tests.distributed.cases import Blocks, X, Y, adam, captured, masked, quantized, train
from tests.distributed.launch import torchrun
from tests.distributed.test_ddp import ROUNDING, assert_same

pytest.importorskip("accelerate", reason="an optional engine")

from accelerate import Accelerator
from accelerate.state import AcceleratorState

from tests.distributed.train_accelerate import EPOCHS, fit


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    """Accelerate keeps one state for the whole process, its precision included."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def assert_trained(found: dict[str, Any]) -> None:
    """Each epoch is one step with the mean gradient of all batches."""
    plain = quantized(masked(Blocks))
    train(plain, adam(plain), X, Y, steps=EPOCHS)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(found["trained"][name], tensor, **ROUNDING)
    assert any(not torch.equal(found["loaded"][name], tensor) for name, tensor in found["trained"].items())
    assert_same(found["trained again"], found["trained"])


def test_accumulates_gradients_and_goes_on_from_a_saved_state(tmp_path: pathlib.Path) -> None:
    assert_trained(fit(Accelerator(cpu=True, gradient_accumulation_steps=2), str(tmp_path), batch=4))


@pytest.mark.slow
def test_two_processes_accumulate_and_go_on_from_a_saved_state(tmp_path: pathlib.Path) -> None:
    torchrun("-m", "tests.distributed.train_accelerate", str(tmp_path), folder=tmp_path)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert_trained(found[0])
    assert_same(found[0]["trained"], found[1]["trained"])


def test_modes_switch_under_the_forward_that_accelerate_puts_in() -> None:
    gm = captured(lambda: Blocks(dropout=0.5))
    wanted = gm.clone().eval()(X)
    model = Accelerator(cpu=True, mixed_precision="bf16").prepare(gm)
    assert not torch.equal(model(X), model(X))
    evaluated = model.eval()(X)
    assert torch.equal(evaluated, model(X))
    torch.testing.assert_close(evaluated, wanted, rtol=2**-6, atol=2**-6)  # a few roundings to 8 bits
    assert not torch.equal(model.train()(X), model(X))


def test_unwrapped_model_is_the_graph_and_goes_on_with_modes() -> None:
    gm = captured(lambda: Blocks(dropout=0.5))
    wanted = gm.clone().eval()(X)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    unwrapped = accelerator.unwrap_model(accelerator.prepare(gm), keep_fp32_wrapper=False)
    assert isinstance(unwrapped, fxopt.CapturedModule)
    assert torch.equal(unwrapped.eval()(X), wanted)
    assert not torch.equal(unwrapped.train()(X), wanted)
