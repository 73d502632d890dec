"""Calibration in several processes, and in several runs, gives the scales that one run gives."""

import pathlib

import pytest
import torch
from torch import nn

import fxopt
from fxopt.passes import Quantize, QuantPlan
from tests.distributed.launch import run_in_processes

BATCHES = [(torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)) * (seed + 1),) for seed in range(8)]


def graph():
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    return fxopt.capture(net, BATCHES[0], dynamic_shapes=({0: "batch"},))


def _worker(rank: int, world: int, folder: pathlib.Path) -> None:
    Quantize().make_plan(graph(), BATCHES[rank::world]).save(folder / f"{rank}.json")


def test_four_processes_get_the_scales_of_one(tmp_path):
    run_in_processes(_worker, 4, tmp_path)
    want = Quantize().make_plan(graph(), BATCHES)
    assert [QuantPlan.load(tmp_path / f"{rank}.json") for rank in range(4)] == [want] * 4


def test_a_run_goes_on_where_the_last_one_ended(tmp_path, monkeypatch):
    place = tmp_path / "seen.npz"
    quantize = Quantize(checkpoint=str(place), recipe="fast")

    class Broken(list):
        def __iter__(self):
            yield from self[:5]
            raise KeyboardInterrupt

    monkeypatch.setattr("fxopt.passes.quantize.calibrate.time.monotonic", iter(range(0, 10_000, 100)).__next__)
    with pytest.raises(KeyboardInterrupt):
        fxopt.optimize(graph(), [quantize], calibration=Broken(BATCHES), strict=True)
    assert list(tmp_path.iterdir())
    small = fxopt.optimize(graph(), [quantize], calibration=BATCHES, strict=True)
    want = fxopt.optimize(graph(), [Quantize(recipe="fast")], calibration=BATCHES, strict=True)
    assert torch.equal(small(*BATCHES[7]), want(*BATCHES[7]))
    assert not list(tmp_path.iterdir())
