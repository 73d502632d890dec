"""``fxopt bundle`` and ``fxopt verify``: a model with its proof, and the proof again somewhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fxopt.export import verify_bundle, write_bundle
from fxopt.tools.console import print_json, stages, users_code
from fxopt.tools.job import Job
from fxopt.tools.options import Calibration, Debug, Dynamic, Inputs, Json, Model, Passes

__all__ = ["bundle", "verify"]


def bundle(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="A folder that does not exist yet.")],
    passes: Passes = None,
    inputs: Inputs = None,
    dynamic: Dynamic = None,
    calibration: Calibration = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Optimize a model and write it with what proves it."""
    with users_code(debug=debug), stages(3, quiet=json or debug) as progress:
        gm = Job(model, passes, inputs, dynamic, calibration or ()).optimized(progress)
        progress.begin("write and validate")
        folder = write_bundle(gm, output)
    files = sorted(each.name for each in folder.iterdir())
    if json:
        print_json({"ok": True, "model": model, "output": str(folder), "files": files})
    else:
        print(f"wrote {folder}: {', '.join(files)}")


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of fxopt bundle.", show_default=False)],
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Check that a bundle is intact and computes what it should.

    The exit status is 1 if not.
    """
    with users_code(debug=debug), stages(1, quiet=json or debug) as progress:
        progress.begin("verify")
        found = verify_bundle(folder)
    if json:
        validation = found.validation.to_dict()
        print_json({"ok": True, "folder": str(folder), "validation": validation, "differences": found.differences})
    else:
        print(found)
