"""Run measurements: ``python -m tests.bench [name ...] [--quick] [--list]``; all of them if none is named."""

from __future__ import annotations

import argparse
import importlib

from rich.console import Console

BENCHMARKS = {
    "pass_scaling": "time per node of each cleanup pass and of the manager, from 1,000 to 100,000 nodes",
    "export_speed": "time to export and latency of the result, against torch.onnx.export",
    "control_flow_table": "Python branches and loops on values, against torch.export and torch.onnx.export",
    "branch_scaling": "traces, nodes and time of nets of 8 to 64 branches",
    "early_exit": "latency and accuracy of a CNN that leaves early, in ORT and in eager",
    "select_cost": "a small branch in ORT against computing both sides and selecting",
    "zoo_table": "every model of the zoo from capture to proof: time, nodes, error",
}


def main(arguments: list[str] | None = None) -> None:
    """Run the measurements that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Measure fxopt.")
    parser.add_argument("names", nargs="*", metavar="name", help=f"one of {', '.join(BENCHMARKS)}; all if not given")
    parser.add_argument("--quick", action="store_true", help="leave out the sizes that take minutes")
    parser.add_argument("--list", action="store_true", help="say what there is, and run nothing")
    chosen = parser.parse_args(arguments)
    unknown = [name for name in chosen.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; there is {', '.join(BENCHMARKS)}")
    console = Console()
    for name in chosen.names or BENCHMARKS:
        console.print(f"{name}: {BENCHMARKS[name]}", highlight=False)
        if not chosen.list:
            importlib.import_module(f"tests.bench.{name}").main(console, quick=chosen.quick)


if __name__ == "__main__":
    main()
