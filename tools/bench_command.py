"""``fxopt bench``: ONNX files side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fxopt.export import bench as measure
from fxopt.tools.console import as_bad_input, print_json, stages, users_code
from fxopt.tools.options import Debug, File, Json, Size, check_file, parse_sizes

__all__ = ["bench"]


def bench(
    file: File,
    against: Annotated[
        list[Path] | None, typer.Option(metavar="FILE.onnx", help="Another file, run in turn; may be repeated.")
    ] = None,
    size: Size = None,
    runs: Annotated[int, typer.Option(min=1, metavar="N", help="Runs of each file.")] = 100,
    threads: Annotated[int, typer.Option(min=0, metavar="N", help="Within an operator; 0 lets ORT choose.")] = 0,
    no_memory: Annotated[bool, typer.Option("--no-memory", help="Do not measure the peak memory.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure latency, memory, size, and the time of each line."""
    files = [file, *(against or [])]
    with users_code(debug=debug), stages(1, quiet=json or debug) as progress:
        for each in files:
            check_file(each)
        sizes = parse_sizes(size or [])
        progress.begin("run")
        with as_bad_input():
            report = measure(files, sizes=sizes or None, runs=runs, threads=threads or None, memory=not no_memory)
    if json:
        print_json({"ok": True} | report.to_dict())
    else:
        print(report)
