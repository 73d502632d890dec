"""Every torchvision classifier pruned to half of its channels, beside Torch-Pruning: what runs, and what it is then.

    python -m tests.bench prune_torchvision [--models resnet18,swin_t] [--quick]

Random weights, none of them 0. No hints for any model: what has to be kept together is up to the tool. A cell of fxopt
counts only if the shrunk graph equals the masked one, its export passes the comparison with ORT (optimizer off and on,
several batches), and the worst relative error of both is shown. A cell of Torch-Pruning (``pip install torch-pruning``)
counts if the pruned model runs and returns outputs of the same shape; its masked model does not exist.

    share of the channels that is left · share of the parameters · seconds · error

Each cell is a process of its own. ``--quick`` takes the smallest model of each family.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from tests.bench.zoo_table import write_row

SMALLEST = (
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3",
    "maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf", "resnet18",
    "resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11_bn", "vit_b_32",
    "wide_resnet50_2",
)  # fmt: skip
LONGEST = 600.0
TOOLS = ("fxopt", "torch_pruning")


def names() -> list[str]:
    """Return all classifiers that torchvision has."""
    import torchvision

    return list(torchvision.models.list_models(module=torchvision.models))


def cell(model: str, tool: str) -> dict[str, Any]:
    """Measure one cell in a process of its own; return its fields, or "reason"."""
    command = [sys.executable, "-m", "tests.bench.prune_torchvision_cell", model, tool]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST, check=False)
    except subprocess.TimeoutExpired:
        return {"reason": f"not done in {LONGEST:.0f} s"}
    last = (done.stdout.strip().splitlines() or [""])[-1]
    if not last.startswith("{"):
        return {"reason": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:200]}
    found: dict[str, Any] = json.loads(last)
    return found


def text(found: dict[str, Any]) -> str:
    """Return a cell as it stands in the table."""
    if "reason" in found:
        return f"FAILS: {found['reason']}".replace("|", "/")
    parts = [f"{found['channels']:.2f}", f"{found['parameters']:.2f}", f"{found['seconds']:.0f} s"]
    parts += [f"{found['error']:.0e}"] if found["error"] is not None else []
    return " · ".join(parts)


def main(console: Console | None = None, *, quick: bool = False, models: Sequence[str] = (), **unused: Any) -> None:
    """Print the table row by row, and how many models each tool got through."""
    console = console or Console()
    tools = [tool for tool in TOOLS if tool == "fxopt" or importlib.util.find_spec(tool) is not None]
    write_row(console, ("model", *tools))
    write_row(console, ("---",) * (1 + len(tools)))
    chosen = models or (SMALLEST if quick else names())
    passed = dict.fromkeys(tools, 0)
    for model in chosen:
        cells = {tool: cell(model, tool) for tool in tools}
        for tool, found in cells.items():
            passed[tool] += "reason" not in found
        write_row(console, (model, *(text(found) for found in cells.values())))
    write_row(console, ("passed", *(f"{count} of {len(chosen)}" for count in passed.values())))
