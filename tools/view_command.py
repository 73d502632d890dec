"""``fxopt view``: a picture of a graph, of what passes did to it, or of any ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import fxopt
from fxopt.errors import describe
from fxopt.export import NodeTimes, node_times, to_onnx
from fxopt.export.files import check_target, load_model
from fxopt.tools.console import BadInputError, Stages, as_bad_input, describe_bytes, print_json, stages, users_code
from fxopt.tools.graph_source import captured
from fxopt.tools.options import MODEL_HELP, Debug, Dynamic, Inputs, Json
from fxopt.tools.viz import FORMATS

__all__ = ["view"]


def view(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=f"{MODEL_HELP} Or an .onnx file.", show_default=False)],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="A .html, .svg, .dot or .json file.")
    ] = Path("graph.html"),
    passes: Annotated[
        str | None, typer.Option("--passes", "-p", metavar="PASSES", help="Passes to run; the page shows every step.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A model or .onnx file to show the changes since.")
    ] = None,
    inputs: Inputs = None,
    dynamic: Dynamic = None,
    time: Annotated[bool, typer.Option("--time", help="Measure each operator in ONNX Runtime, to colour by.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw a graph: one page that needs no server, SVG or DOT."""
    with users_code(debug=debug), stages(3, quiet=json or debug) as progress:
        if output.suffix not in FORMATS:
            raise BadInputError(describe(f"cannot tell the format of {output}", wanted=" or ".join(FORMATS)))
        with as_bad_input():
            check_target(output)
            manager = None if passes is None else fxopt.PassManager(passes, keep_graphs=True)
        if manager is not None and model.endswith(".onnx"):
            raise BadInputError(describe("--passes does not go with an .onnx file", got=model))
        shown = _graph(model, inputs, dynamic, progress)
        before = None if against is None else _graph(against, inputs, dynamic, progress)
        if manager is not None:
            shown = manager.run(shown)
        overlays = {"time": _times(shown)} if time else None
        progress.begin("draw")
        fxopt.view(shown, output, against=before, overlays=overlays, title=Path(model).name)
    if json:
        print_json({"ok": True, "model": model, "output": str(output), "bytes": output.stat().st_size})
    else:
        print(f"wrote {output}: {describe_bytes(output.stat().st_size)}")


def _times(shown: Any) -> NodeTimes:
    """Return the times of a file, or of the file that a graph becomes on its example inputs."""
    if not isinstance(shown, fxopt.CapturedModule):
        return node_times(shown)
    leaves = shown.flatten_inputs(*shown.samples[0].args, **shown.samples[0].kwargs)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return node_times(to_onnx(shown, validate=False), tensors)


def _graph(text: str, inputs: str | None, dynamic: str | None, progress: Stages) -> Any:
    if not text.endswith(".onnx"):
        return captured(text, inputs, dynamic, progress, train=False)
    if not Path(text).is_file():
        raise BadInputError(f"there is no file {text}")
    with as_bad_input(text):
        load_model(text)
    return text
