"""One cell of ``tests/bench/prune_torchvision.py``: ``python -m tests.bench.prune_torchvision_cell MODEL TOOL``."""

from __future__ import annotations

import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

import fxopt
from fxopt.export import to_onnx
from fxopt.passes import Prune, ShrinkMasked
from fxopt.passes.prune.certificate import difference
from tests.models.randomized import randomized

SIDES = {"vit": 224, "swin": 224, "maxvit": 224, "inception": 128}


def built(name: str) -> tuple[nn.Module, torch.Tensor]:
    """Return a classifier with random weights in evaluation, and an input."""
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = torchvision.models.get_model(name, weights=None, **options).eval()
    side = next((side for start, side in SIDES.items() if name.startswith(start)), 96)
    return randomized(model), torch.randn(2, 3, side, side)


def with_fxopt(model: nn.Module, image: torch.Tensor) -> dict[str, Any]:
    """Prune, shrink, compare with the masked graph, export, compare with ORT."""
    started = time.perf_counter()
    gm = fxopt.capture(model, (image,), dynamic_shapes=({0: "batch"},), modes="current")
    masked = Prune(0.5)(gm).gm
    shrunk = ShrinkMasked()(masked).gm
    seconds = time.perf_counter() - started
    with torch.no_grad():
        error = difference([masked(image)], [shrunk(image)])
    if not error < 1e-4:
        return {"reason": f"the shrunk graph gives another result: relative error {error:.1e}"}
    shares = {"channels": _channels(shrunk) / _channels(gm), "parameters": _parameters(shrunk) / _parameters(gm)}
    del model, gm, masked  # the largest nets take gigabytes each
    with tempfile.TemporaryDirectory() as folder:
        to_onnx(shrunk, Path(folder) / "shrunk.onnx")  # raises if ORT disagrees
    return {**shares, "seconds": seconds, "error": error}


def with_torch_pruning(model: nn.Module, image: torch.Tensor) -> dict[str, Any]:
    """Prune as its documentation has it, with the classifier's last layer left alone."""
    import torch_pruning as tp

    before, channels = _parameters(model), _channels(model)
    last = [module for module in model.modules() if getattr(module, "out_features", None) == 1000]
    last += [module for module in model.modules() if getattr(module, "out_channels", None) == 1000]
    started = time.perf_counter()
    pruner = tp.pruner.BasePruner(
        model, image, importance=tp.importance.MagnitudeImportance(p=2), pruning_ratio=0.5, ignored_layers=last
    )
    pruner.step()
    seconds = time.perf_counter() - started
    with torch.no_grad():
        outputs = model(torch.cat([image, image]))
    if tuple(outputs.shape) != (4, 1000):
        return {"reason": f"the output has the shape {tuple(outputs.shape)}"}
    if _parameters(model) > 0.95 * before:
        return {"reason": "nothing was pruned"}
    shares = {"channels": _channels(model) / channels, "parameters": _parameters(model) / before}
    return {**shares, "seconds": seconds, "error": None}


def _channels(module: nn.Module) -> int:
    """Return the rows of all weights but those of the classes."""
    return sum(p.shape[0] for p in module.parameters() if p.ndim > 1 and p.shape[0] != 1000)


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


TOOLS: dict[str, Callable[[nn.Module, torch.Tensor], dict[str, Any]]] = {
    "fxopt": with_fxopt,
    "torch_pruning": with_torch_pruning,
}


def main() -> None:
    """Print the cell as JSON on the last line."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    name, tool = sys.argv[1:]
    try:
        found = TOOLS[tool](*built(name))
    except Exception as error:
        found = {"reason": f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"}
    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    main()
