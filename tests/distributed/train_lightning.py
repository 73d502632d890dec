"""Train a masked graph with quantizers by Lightning: ``torchrun --nproc-per-node 2 -m ...train_lightning FOLDER``."""

from __future__ import annotations

import sys
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import fxopt
from tests.distributed.cases import Normed, X, Y, adam, masked, quantized

STEPS = 6


class Module(lightning.LightningModule):
    """Holds a captured graph as it would hold any module."""

    def __init__(self, gm: fxopt.CapturedModule) -> None:
        super().__init__()
        self.gm = gm
        self.modes: list[tuple[str, bool]] = []

    def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
        x, y = batch
        self.modes.append(("train", trains(self.gm)))
        return F.cross_entropy(self.gm(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], number: int) -> None:
        self.modes.append(("validate", trains(self.gm)))
        self.gm(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adam(self.gm)


def trains(gm: fxopt.CapturedModule) -> bool:
    """Return whether batch norm trains in the graph itself, whatever ``gm.training`` says."""
    (norm,) = (node for node in gm.graph.nodes if node.target is torch.ops.aten.batch_norm.default)
    return bool(fxopt.arg(norm, "training"))


def graph() -> fxopt.CapturedModule:
    return quantized(masked(Normed))


def fit(module: Module, **options: Any) -> lightning.Trainer:
    """Train six steps with a validation behind each second one."""
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=STEPS, val_check_interval=2, enable_model_summary=False, **silent, **options
    )
    data = DataLoader(TensorDataset(X, Y), batch_size=2)
    trainer.fit(module, data, DataLoader(TensorDataset(X, Y), batch_size=4))
    return trainer


def main(folder: str) -> None:
    module = Module(graph())
    trainer = fit(module, strategy="ddp", devices=2)
    torch.save({"modes": module.modes, "state": module.gm.state_dict()}, f"{folder}/{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
