"""Arguments and options that several commands have."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from fxopt.errors import describe
from fxopt.export import Session
from fxopt.tools.console import BadInputError, as_bad_input

__all__ = [
    "MODEL_HELP", "Calibration", "Debug", "Dynamic", "File", "Inputs", "Json", "Ledger", "Level", "Metric", "Model",
    "Passes", "Size", "check_file", "parse_sizes",
]  # fmt: skip

_INPUTS_HELP = 'Example inputs: "f32[batch,3,224,224]", "ids=i64[batch,seq<512]{0..999}", or an .npy, .npz, .pt file.'
MODEL_HELP = "net.py:Net, package.module:make, a .pt2 of torch.export, or a saved .fxopt graph."

Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)]
File = Annotated[Path, typer.Argument(metavar="FILE.onnx", help="The ONNX file.", show_default=False)]
Inputs = Annotated[str | None, typer.Option("--inputs", "-i", metavar="SPEC", help=_INPUTS_HELP)]
Passes = Annotated[
    str | None,
    typer.Option("--passes", "-p", metavar="PASSES", help='"fold-batch-norm,..."; the lossless list if not given.'),
]
Calibration = Annotated[
    list[str] | None,
    typer.Option(metavar="FILE", help="Inputs to calibrate on, .npy, .npz or .pt; a file is a batch; repeatable."),
]
Dynamic = Annotated[
    str | None, typer.Option(metavar="AXES", help='Dynamic sizes of inputs from files: "0:0=batch; ids:1=seq<512".')
]
Ledger = Annotated[Path | None, typer.Option(metavar="FILE", help="Measure every step into an .html or .json file.")]
Metric = Annotated[str | None, typer.Option(metavar="FUNCTION", help="Score every step: net.py:score, for --ledger.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and warnings.")]


Size = Annotated[
    list[str] | None, typer.Option(metavar="NAME=N", help="Length of a dynamic axis, as batch=2 [1]; may be repeated.")
]


class Level(enum.StrEnum):
    """How far ONNX Runtime may rewrite the graph."""

    NONE = "none"
    BASIC = "basic"
    EXTENDED = "extended"
    ALL = "all"


def parse_sizes(given: list[str]) -> dict[str, int]:
    """Return the lengths of dynamic axes by name.

    Raises:
        BadInputError: one has another form.
    """
    sizes = {}
    for one in given:
        name, equals, length = one.partition("=")
        if not (name and equals and length.isdecimal()):
            raise BadInputError(describe(f"--size {one} is not understood", wanted="NAME=N, as batch=2"))
        sizes[name] = int(length)
    return sizes


def check_file(file: Path) -> None:
    """Raise BadInputError for what ONNX Runtime cannot load."""
    if not file.is_file():
        raise BadInputError(f"{file} is a folder" if file.is_dir() else f"there is no file {file}")
    with as_bad_input(str(file)):
        Session(file, optimization="none")
