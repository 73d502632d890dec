"""Train graphs with FSDP, both kinds, for tests/distributed/test_fsdp.py."""

from __future__ import annotations

import copy
import pathlib
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor

import fxopt
from fxopt.passes import AdaptivePrecision, MixedPrecision, OneShot, Prune, Pruner
from tests.distributed.cases import GRAPHS, LEARNED, Blocks, X, Y, adam, captured, masked, train

ALL = GRAPHS | {"learned": LEARNED, "half": lambda: MixedPrecision("bfloat16")(masked(Blocks)).gm.train()}
SHARDED = ("plain", "masked and quantized", "recurrent", "merged", "learned", "half")
WRAPPED = ("masked and quantized", "learned", "half")
SPLIT = "masked and quantized"
WHOLE = StateDictOptions(full_state_dict=True)


def train_all(rank: int, world: int, folder: pathlib.Path) -> None:
    mesh = init_device_mesh("cpu", (world,))
    x, y = X[rank::world], Y[rank::world]
    outcome: dict[str, Any] = {}
    for name in SHARDED:
        outcome[name] = {"fully_shard": _trained(fully_shard(ALL[name](), mesh=mesh), x, y)}
    for name in WRAPPED:
        wrapped = FullyShardedDataParallel(ALL[name](), use_orig_params=True, device_id=torch.device("cpu"))
        outcome[name]["FullyShardedDataParallel"] = _trained(wrapped, x, y)
    split = fxopt.split_by_module(ALL[SPLIT](), "layers.*")
    for index in range(2):
        fully_shard(split.get_submodule(f"layers.{index}"), mesh=mesh)
    outcome[SPLIT]["split"] = _trained(fully_shard(split, mesh=mesh), x, y)
    outcome["between steps"] = _between_steps(mesh, x, y)
    outcome["refused"] = _refused(mesh, str(folder / f"{rank}.fxopt"))
    outcome["modes"] = _modes(mesh)
    torch.save(outcome, folder / f"{rank}.pt")


def _trained(model: Any, x: torch.Tensor, y: torch.Tensor) -> dict[str, Any]:
    losses = train(model, adam(model), x, y)
    return {"losses": losses, "state": get_model_state_dict(model, options=WHOLE)}


def _between_steps(mesh: Any, x: torch.Tensor, y: torch.Tensor) -> dict[str, Any]:
    """What is split, what is whole, and whether a gathered state loads into a split graph again."""
    split = fxopt.split_by_module(masked(Blocks), "layers.*")
    for index in range(2):
        fully_shard(split.get_submodule(f"layers.{index}"), mesh=mesh)
    model = fully_shard(split, mesh=mesh)
    train(model, adam(model), x, y)
    state = get_model_state_dict(model, options=WHOLE)
    other = fully_shard(masked(Blocks), mesh=mesh)
    set_model_state_dict(other, dict(state), options=WHOLE)  # it writes into the dict
    again = get_model_state_dict(other, options=WHOLE)
    return {
        "parameters": {name: isinstance(p, DTensor) for name, p in split.get_submodule("layers.0").named_parameters()},
        "buffers": {name: isinstance(b, DTensor) for name, b in split.named_buffers()},
        "loads": all(torch.equal(again[name], tensor) for name, tensor in state.items()),
    }


def _refused(mesh: Any, path: str) -> dict[str, str]:
    """What would see parts of tensors says so."""
    pruner = Pruner(captured(Blocks), Prune(0.5, "weights"), OneShot(0.5))
    sharded = fully_shard(captured(Blocks), mesh=mesh)
    first = captured(Blocks)
    FullyShardedDataParallel(first, use_orig_params=True, device_id=torch.device("cpu"))
    fully_shard(pruner.gm, mesh=mesh)
    adaptive = AdaptivePrecision(captured(Blocks), lambda model, batch: model(batch).sum())
    fully_shard(adaptive.gm, mesh=mesh)
    return {
        "clone": _message(sharded.clone),
        "save": _message(lambda: fxopt.save(sharded, path)),
        "a pass": _message(lambda: Prune(0.5)(sharded)),
        "a pass on FullyShardedDataParallel": _message(lambda: Prune(0.5)(first)),
        "deepcopy of FullyShardedDataParallel": _message(lambda: copy.deepcopy(first)),
        "pruner": _message(pruner.step),
        "adaptive precision": _message(lambda: adaptive.step(X)),
    }


def _message(action: Callable[[], Any]) -> str:
    try:
        action()
    except fxopt.PassError as error:
        return str(error)
    return "not refused"


def _modes(mesh: Any) -> dict[str, bool]:
    """Whether the modes are switched behind the sharding, in the graph itself and in those split off."""
    x = X[:2]
    found = {}
    for name in ("whole", "split"):
        gm = captured(lambda: Blocks(dropout=0.5))
        wanted = gm.clone().eval()(x)
        split = gm.clone(copy_tensors=True) if name == "whole" else fxopt.split_by_module(gm, "layers.*")
        if name == "split":
            fully_shard(split.get_submodule("layers.0"), mesh=mesh)
        model = fully_shard(split, mesh=mesh)
        drops = not torch.equal(model(x), model(x))
        evaluated = torch.equal(model.eval()(x), wanted)
        found[name] = drops and evaluated and not torch.equal(model.train()(x), wanted)
    return found
