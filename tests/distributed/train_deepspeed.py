"""Train a masked graph with quantizers by DeepSpeed: ``torchrun --nproc-per-node 2 -m ...train_deepspeed FOLDER``."""

from __future__ import annotations

import sys
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F

from tests.distributed.cases import STEPS, Blocks, X, Y, masked, quantized

STAGES = (0, 1, 2)  # of ZeRO: nothing, the optimizer's state, and gradients are split


def fit(stage: int) -> dict[str, Any]:
    """Return the state after some steps, each process on its half of the rows."""
    rank, world = dist.get_rank(), dist.get_world_size()
    gm = quantized(masked(Blocks))
    config = {
        "train_micro_batch_size_per_gpu": len(X) // world,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-2, "weight_decay": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
    }
    trained = [parameter for parameter in gm.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=gm, model_parameters=trained, config=config)
    losses = []
    for _ in range(STEPS):
        loss = F.cross_entropy(engine(X[rank::world]), Y[rank::world])
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return {"losses": losses, "state": {name: tensor.clone() for name, tensor in gm.state_dict().items()}}


def main(folder: str) -> None:
    deepspeed.init_distributed("gloo")
    torch.save({stage: fit(stage) for stage in STAGES}, f"{folder}/{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
