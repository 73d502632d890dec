"""Train a masked graph with quantizers by Accelerate: ``torchrun --nproc-per-node 2 -m ...train_accelerate FOLDER``."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

from tests.distributed.cases import Blocks, X, Y, adam, masked, quantized

EPOCHS = 3


def fit(accelerator: Accelerator, folder: str, *, batch: int) -> dict[str, Any]:
    """Train three epochs, and save the state behind the second, from which the third is done again."""
    gm = quantized(masked(Blocks))
    loader = DataLoader(TensorDataset(X, Y), batch_size=batch)
    model, optimizer, loader = accelerator.prepare(gm, adam(gm), loader)
    for epoch in range(EPOCHS):
        if epoch == EPOCHS - 1:
            accelerator.save_state(f"{folder}/state")
        _epoch(accelerator, model, optimizer, loader)
    trained = {name: tensor.clone() for name, tensor in gm.state_dict().items()}
    accelerator.load_state(f"{folder}/state")
    loaded = {name: tensor.clone() for name, tensor in gm.state_dict().items()}
    _epoch(accelerator, model, optimizer, loader)
    return {"trained": trained, "loaded": loaded, "trained again": gm.state_dict()}


def _epoch(accelerator: Accelerator, model: Any, optimizer: Any, loader: Any) -> None:
    for x, y in loader:
        with accelerator.accumulate(model):
            accelerator.backward(F.cross_entropy(model(x), y))
            optimizer.step()
            optimizer.zero_grad()


def main(folder: str) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    torch.save(fit(accelerator, folder, batch=2), f"{folder}/{accelerator.process_index}.pt")
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1])
