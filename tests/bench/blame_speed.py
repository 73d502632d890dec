"""Every intermediate value of a model in ORT against eager: fxopt's blame beside torch.onnx's own comparison.

Seconds and peak memory, each in a process of its own; the peer is ``verify_onnx_program(compare_intermediates=True)``
of ``torch.onnx.verification``, on the program that ``torch.onnx.export`` makes.

    python -m tests.bench.blame_speed MODEL TOOL        one cell, as JSON
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import torch
from rich.console import Console

from fxopt.export.bench_memory import fresh_peak_bytes, peak_bytes
from tests.bench.zoo_table import write_row
from tests.zoo import architectures

MODELS = ("resnet18", "vit_b_16")
TOOLS = ("fxopt.export.blame", "torch.onnx verify_onnx_program")
HEADER = ("model", "tool", "values", "seconds", "seconds a value", "rise of the peak, MiB")
LONGEST = 900.0


def cell(model: str, tool: str) -> dict[str, Any]:
    """Measure one cell in this process."""
    built = architectures.build(model)
    net, images = built.model, built.args[0]
    if tool == TOOLS[0]:
        import fxopt
        from fxopt.export import blame, to_onnx

        gm = fxopt.optimize(net, example_inputs=(images,), check="off")
        file = to_onnx(gm, validate=False)
        before, started = fresh_peak_bytes(), time.perf_counter()
        count = len(blame(file, gm).values)
    else:
        from torch.onnx.verification import verify_onnx_program

        program = torch.onnx.export(net, (images,), dynamo=True, verbose=False)
        before, started = fresh_peak_bytes(), time.perf_counter()
        count = len(verify_onnx_program(program, (images,), compare_intermediates=True))
    return {"values": count, "seconds": time.perf_counter() - started, "mib": (peak_bytes() - before) / 2**20}


def main(console: Console | None = None, *, quick: bool = False, **unused: Any) -> None:
    """Print the table; ``quick`` takes the small model."""
    console = console or Console()
    write_row(console, HEADER)
    write_row(console, ("---",) * len(HEADER))
    for model in MODELS[:1] if quick else MODELS:
        for tool in TOOLS:
            command = [sys.executable, "-m", "tests.bench.blame_speed", model, tool]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST, check=True)
            except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
                write_row(console, (model, tool, f"FAILS: {type(error).__name__}", "", "", ""))
                continue
            found = json.loads(done.stdout.strip().splitlines()[-1])
            each = found["seconds"] / max(1, found["values"])
            write_row(
                console,
                (model, tool, str(found["values"]), f"{found['seconds']:.1f}", f"{each:.3f}", f"{found['mib']:.0f}"),
            )


if __name__ == "__main__":
    sys.stdout.write(json.dumps(cell(sys.argv[1], sys.argv[2])) + "\n")
