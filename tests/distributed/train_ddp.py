"""Train graphs with DistributedDataParallel, for tests/distributed/test_ddp.py."""

from __future__ import annotations

import pathlib
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

import fxopt
from fxopt.passes import AdaptivePrecision, Iterative, MixedPrecision, Prune, Pruner
from tests.distributed.cases import (
    GRAPHS,
    LEARNED,
    STEPS,
    Blocks,
    Normed,
    X,
    Y,
    adam,
    captured,
    masked,
    quantized,
    scores_of,
    train,
)


def train_all(rank: int, world: int, folder: pathlib.Path) -> None:
    x, y = X[rank::world], Y[rank::world]
    outcome: dict[str, Any] = {}
    for name, make in (GRAPHS | {"learned": LEARNED}).items():
        gm = make()
        model = DistributedDataParallel(gm)
        losses = train(model, adam(model), x, y)
        outcome[name] = {"losses": losses, "state": gm.state_dict(), "evaluated": scores_of(model.eval()(X)).detach()}
        if rank == 0:
            fxopt.save(gm, folder / f"{name}.fxopt")
    outcome["other weights in each process"] = _other_weights(rank, x, y)
    outcome["batch norm"] = _batch_norm(x, y)
    outcome["ranges of each process"] = _own_ranges(x, y)
    outcome["pruner"] = _pruned(x, y)
    outcome["half"] = _half(x, y)
    outcome["adaptive"] = _adaptive(rank, x, y)
    torch.save(outcome, folder / f"{rank}.pt")


def _other_weights(rank: int, x: torch.Tensor, y: torch.Tensor) -> dict[str, Any]:
    """Masks and scales begin as those of process 0, as parameters do."""
    gm = captured(Normed)
    torch.manual_seed(rank)
    with torch.no_grad():
        for parameter in gm.parameters():
            parameter.normal_()
    gm = quantized(Prune(0.5, "weights", min_sqnr_db=-1000.0)(gm).gm)
    train(DistributedDataParallel(gm), adam(gm), x, y)
    return gm.state_dict()


def _batch_norm(x: torch.Tensor, y: torch.Tensor) -> dict[str, Any]:
    """The graph and the module that it was captured from, both in DDP, with a change of modes in between."""
    states = {}
    for kind in ("module", "graph"):
        torch.manual_seed(0)
        net = Normed(dropout=0.5)
        model = DistributedDataParallel(
            net if kind == "module" else fxopt.capture(net, (X,), dynamic_shapes=({0: "batch"},))
        )
        optimizer, losses = adam(model), []
        torch.manual_seed(3)
        for _ in range(2):
            losses += train(model.train(), optimizer, x, y)
            losses.append(model.eval()(X).sum().item())
        states[kind] = {"losses": losses, "state": model.module.state_dict()}
    return states


def _own_ranges(x: torch.Tensor, y: torch.Tensor) -> dict[str, Any]:
    """Each process calibrates on its share; all get the ranges of all."""
    gm = captured(Normed)
    gm.calibration = [x]
    gm = quantized(gm)
    before = {name: tensor.clone() for name, tensor in gm.state_dict().items()}
    train(DistributedDataParallel(gm), adam(gm), x, y)
    return {"before": before, "state": gm.state_dict()}


def _pruned(x: torch.Tensor, y: torch.Tensor) -> dict[str, Any]:
    """Each process would choose other masks by its share of the data alone."""
    gm = captured(Normed)
    optimizer = adam(gm)
    prune = Prune(0.5, importance="taylor", loss=lambda model, batch: train_loss(model, *batch))
    pruner = Pruner(gm, prune, Iterative(0.5, rounds=2, every=2), optimizer, data=[(x, y)])
    model, due = DistributedDataParallel(pruner.gm), []
    for _ in range(STEPS):
        train(model, optimizer, x, y, steps=1)
        due.append(pruner.step())
    return {"due": due, "state": pruner.gm.state_dict(), "plan": dict(pruner.plan)}


def _half(x: torch.Tensor, y: torch.Tensor) -> dict[str, Any]:
    """Mixed precision with a scaled loss, whose first steps overflow."""
    gm = MixedPrecision("float16")(masked(Blocks)).gm.train()
    model, optimizer = DistributedDataParallel(gm), adam(gm)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**28)
    scales = []
    for _ in range(20):
        _scaled_step(model, optimizer, scaler, x, y)
        scales.append(scaler.get_scale())
    return {"scales": scales, "state": gm.state_dict()}


def _adaptive(rank: int, x: torch.Tensor, y: torch.Tensor) -> dict[str, Any]:
    """The inputs of process 1 alone overflow, and are calm later on."""
    gm = captured(Blocks)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    adaptive = AdaptivePrecision(gm, lambda m, batch: train_loss(m, *batch), scaler=scaler, every=2, patience=2)
    model, optimizer = DistributedDataParallel(adaptive.gm), adam(gm)
    for step in range(16):
        with torch.no_grad():
            gm.get_parameter("layers.0.norm.weight").fill_(1e6 if step < 4 and rank == 1 else 1.0)
        _scaled_step(model, optimizer, scaler, x, y)
        adaptive.step((x, y))
    return {"log": [str(move) for move in adaptive.log], "state": adaptive.gm.state_dict()}


def _scaled_step(
    model: Any, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, x: torch.Tensor, y: torch.Tensor
) -> None:
    optimizer.zero_grad()
    scaler.scale(train_loss(model, x, y)).backward()
    scaler.step(optimizer)
    scaler.update()


def train_loss(model: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model(x), y)
