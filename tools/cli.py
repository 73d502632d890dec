"""The command line: ``fxopt optimize``, ``validate``, ``passes``, ``demo``.

Exit status: 0 if all went well; 1 if the work failed; 2 if the command, the model or its inputs are wrong.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import inspect
import logging
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer

import fxopt
from fxopt.errors import FxoptError, describe
from fxopt.export import OnnxFile, Session, ValidationReport, to_onnx
from fxopt.export import validate as compare
from fxopt.export.files import check_target
from fxopt.export.to_onnx import DEFAULT_OPSET, OPSETS
from fxopt.input_spec import ExampleInputs, parse_axes, parse_inputs
from fxopt.passes import DEFAULT
from fxopt.registry import known_passes
from fxopt.tools.console import (
    FAILED,
    USAGE,
    BadInputError,
    Stages,
    as_bad_input,
    describe_bytes,
    error_text,
    print_json,
    stages,
    stderr,
)
from fxopt.tools.model_source import load_model

__all__ = ["app", "main"]

app = typer.Typer(
    name="fxopt",
    help="Make a PyTorch model small and fast, and prove that it is still right.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class _Check(enum.StrEnum):
    """How much to run for checking the passes."""

    ALL = "all"
    SAMPLES = "samples"
    OFF = "off"


_INPUTS_HELP = 'Example inputs: "f32[batch,3,224,224]", "ids=i64[batch,seq<512]{0..999}", or an .npy, .npz, .pt file.'
_MODEL_HELP = "net.py:Net, package.module:make, a .pt2 of torch.export, or a saved .fxopt graph."
_Model = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL_HELP, show_default=False)]
_Inputs = Annotated[str | None, typer.Option("--inputs", "-i", metavar="SPEC", help=_INPUTS_HELP)]
_Dynamic = Annotated[
    str | None, typer.Option(metavar="AXES", help='Dynamic sizes of inputs from files: "0:0=batch; ids:1=seq<512".')
]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
_Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and warnings.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"fxopt {fxopt.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Make a PyTorch model small and fast, and prove that it is still right."""


@app.command()
def optimize(
    model: _Model,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="An .onnx or .fxopt file.")],
    passes: Annotated[
        str | None,
        typer.Option("--passes", "-p", metavar="PASSES", help='"fold-batch-norm,..."; the lossless list if not given.'),
    ] = None,
    inputs: _Inputs = None,
    dynamic: _Dynamic = None,
    opset: Annotated[
        int | None, typer.Option(metavar="N", help=f"ONNX operator set, {OPSETS[0]} to {OPSETS[-1]} [{DEFAULT_OPSET}].")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail at the first pass that fails.")] = False,
    check: Annotated[_Check, typer.Option(help="Runs that check the passes.")] = _Check.ALL,
    train: Annotated[bool, typer.Option("--train", help="Keep the graph in train mode; for .fxopt only.")] = False,
    no_validate: Annotated[bool, typer.Option("--no-validate", help="Do not compare with ONNX Runtime.")] = False,
    json: _Json = False,
    debug: _Debug = False,
) -> None:
    """Capture a model, run passes over it, and write an ONNX file or a graph."""
    started = time.perf_counter()
    with _reported(as_json=json, debug=debug), stages(3, quiet=json or debug) as progress:
        _check_output(output, opset=opset, train=train, no_validate=no_validate)
        with as_bad_input():
            manager = fxopt.PassManager(
                DEFAULT if passes is None else passes, strict=strict, check=check.value, progress=progress
            )
        progress.extend(len(manager.passes))
        gm = manager.run(_captured(model, inputs, dynamic, progress, train=train))
        progress.begin("write" if no_validate or output.suffix == ".fxopt" else "write and validate")
        written = None
        if output.suffix == ".onnx":
            written = to_onnx(gm, output, opset=opset or DEFAULT_OPSET, validate=not no_validate)
        else:
            fxopt.save(gm, output)
    if json:
        print_json(_optimized(model, output, gm, written) | {"seconds": round(time.perf_counter() - started, 3)})
        return
    print(gm.report)
    print(f"wrote {output}: {describe_bytes(_size(output))}")
    if written is not None and written.validation is not None:
        print(f"ONNX Runtime agrees: {written.validation}")


def _check_output(output: Path, *, opset: int | None, train: bool, no_validate: bool) -> None:
    """Raise BadInputError for an output that cannot be written, before the work begins."""
    if output.suffix not in (".onnx", ".fxopt") and not output.is_dir():
        raise BadInputError(
            describe(f"cannot tell the format of {output}", wanted="a name that ends in .onnx or .fxopt")
        )
    with as_bad_input():
        check_target(output)
    try:
        tempfile.TemporaryFile(dir=output.parent).close()
    except OSError as error:
        raise BadInputError(f"cannot write {output}: {error.strerror or error}") from error
    if output.suffix == ".onnx":
        if train:
            raise BadInputError(
                describe("--train does not go with an .onnx file, which only evaluates", try_="-o FILE.fxopt")
            )
        if opset is not None and opset not in OPSETS:
            raise BadInputError(describe(f"opset {opset} cannot be written", wanted=f"{OPSETS[0]} to {OPSETS[-1]}"))
    elif opset is not None or no_validate:
        option = "--opset" if opset is not None else "--no-validate"
        raise BadInputError(describe(f"{option} goes with an .onnx file only", got=output))


def _optimized(model: str, output: Path, gm: fxopt.CapturedModule, written: OnnxFile | None) -> dict[str, Any]:
    return {
        "ok": True,
        "fxopt": fxopt.__version__,
        "model": model,
        "output": str(output),
        "bytes": _size(output),
        "opset": None if written is None else written.opset,
        "inputs": [
            {"name": spec.name, "dtype": str(spec.dtype).removeprefix("torch."), "shape": list(spec.shape)}
            for spec in gm.inputs
            if spec.is_tensor
        ],
        "outputs": list(gm.output_names),
        "report": None if gm.report is None else gm.report.to_dict(),
        "validation": None if written is None or written.validation is None else written.validation.to_dict(),
    }


def _size(output: Path) -> int:
    """Return the bytes of a written model, its file of weights included."""
    weights = output.with_name(f"{output.name}.data")
    return output.stat().st_size + (weights.stat().st_size if output.suffix == ".onnx" and weights.exists() else 0)


@app.command()
def validate(
    file: Annotated[Path, typer.Argument(metavar="FILE.onnx", help="The ONNX file.", show_default=False)],
    against: Annotated[str, typer.Option(metavar="MODEL", help=_MODEL_HELP)],
    inputs: _Inputs = None,
    dynamic: _Dynamic = None,
    json: _Json = False,
    debug: _Debug = False,
) -> None:
    """Compare an ONNX file, as ONNX Runtime runs it, with the model that it was made from."""
    with _reported(as_json=json, debug=debug), stages(3, quiet=json or debug) as progress:
        if not file.is_file():
            raise BadInputError(f"{file} is a folder" if file.is_dir() else f"there is no file {file}")
        with as_bad_input(str(file)):
            Session(file, optimization="none")
        gm = _captured(against, inputs, dynamic, progress, train=False)
        progress.begin("compare")
        report: ValidationReport = compare(file, gm)
    if json:
        print_json({"ok": True, "file": str(file), "against": against, "validation": report.to_dict()})
    else:
        print(f"{file} agrees with {against}: {report}")


@app.command()
def passes(json: _Json = False, debug: _Debug = False) -> None:
    """List the passes: name, contract, options, what each does."""
    with _reported(as_json=json, debug=debug):
        rows: list[dict[str, Any]] = [
            {
                "name": name,
                "contract": str(item.contract),
                "default": any(type(one) is item for one in DEFAULT),
                "options": {field.name: _default(field) for field in dataclasses.fields(item) if field.init},
                "summary": (inspect.getdoc(item) or "").partition("\n")[0],
            }
            for name, item in sorted(known_passes().items())
        ]
    if json:
        print_json({"ok": True, "passes": rows})
        return
    widths = [max(len(str(row[key])) for row in rows) for key in ("name", "contract")]
    for row in rows:
        options = ", ".join(f"{key}={value}" for key, value in cast(dict[str, object], row["options"]).items())
        mark = "*" if row["default"] else " "
        print(f"{mark} {row['name']:<{widths[0]}}  {row['contract']:<{widths[1]}}  {row['summary']}")
        if options:
            print(f"  {'':<{widths[0]}}  options: {options}")
    print("* run where no passes are named")


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else None


@app.command()
def demo(
    output: Annotated[Path | None, typer.Option("--output", metavar="DIR", help="Folder for the ONNX files.")] = None,
) -> None:
    """Train a small net on real digits, optimize it, export it, and show what that cost."""
    from fxopt.tools.demo import run

    raise typer.Exit(run(output))


# -- from texts to a graph -------------------------------------------------------------------------------------------


def _captured(
    text: str, spec: str | None, dynamic: str | None, progress: Stages, *, train: bool
) -> fxopt.CapturedModule:
    """Return the graph of the model that ``text`` names, in the mode asked for.

    Raises:
        BadInputError: there is no such model, or it and its inputs do not become a graph.
    """
    with as_bad_input("--inputs"):
        inputs = None if spec is None else parse_inputs(spec)
    if dynamic is not None:
        if inputs is None:
            raise BadInputError("--dynamic names axes of inputs, and --inputs is missing")
        with as_bad_input("--dynamic"):
            inputs = parse_axes(dynamic, inputs)
    progress.begin("load the model")
    model = load_model(text)
    progress.begin("capture")
    with as_bad_input():
        return _graph(model, inputs, train=train)


def _graph(model: Any, inputs: ExampleInputs | None, *, train: bool) -> fxopt.CapturedModule:
    ready = isinstance(model, fxopt.CapturedModule | torch.export.ExportedProgram)
    if inputs is None and not ready:
        raise BadInputError(
            describe("the model needs example inputs", try_='--inputs "f32[batch,3,224,224]", with its own sizes')
        )
    samples = None if inputs is None else list(inputs.samples)
    if not ready:
        assert inputs is not None
        if isinstance(model, torch.nn.Module):
            model.train(train)
            forward = model.forward
        else:
            forward = model
        return fxopt.capture(model, samples, dynamic_shapes=inputs.dynamic_shapes(forward))
    gm = fxopt.capture(model, samples)
    if inputs is not None:
        _check_axes(gm, inputs)
        for sample in inputs.samples:
            gm.flatten_inputs(*sample.args, **dict(sample.kwargs))
        gm.samples = inputs.samples
    if not gm.samples:
        raise BadInputError(
            describe("the saved model brings no example inputs", try_='--inputs "f32[batch,3,224,224]"')
        )
    if gm.training != train:
        gm.train(train)
    return gm


def _check_axes(gm: fxopt.CapturedModule, inputs: ExampleInputs) -> None:
    """Raise BadInputError where the inputs name a dynamic size that the finished graph has fixed."""
    tensors = [spec for spec in gm.inputs if spec.is_tensor]
    wanted = [
        axes
        for axes, leaf in zip(_places(inputs), inputs.samples[0].leaves(), strict=True)
        if isinstance(leaf, torch.Tensor)
    ]
    for spec, axes in zip(tensors, wanted, strict=False):
        for axis, dim in axes.items():
            if axis < len(spec.shape) and isinstance(spec.shape[axis], int):
                raise BadInputError(
                    describe(
                        f"--inputs: axis {axis} of input {spec.name!r} is fixed in the saved model",
                        got=dim.__name__,
                        wanted=spec.shape[axis],
                    )
                )


def _places(inputs: ExampleInputs) -> list[dict[int, Any]]:
    """Return the dynamic axes of each leaf of the inputs."""
    found: list[dict[int, Any]] = []

    def walk(value: Any, axes: Any) -> None:
        if isinstance(value, tuple | list):
            for index, item in enumerate(value):
                walk(item, axes[index] if isinstance(axes, tuple | list) else None)
        elif isinstance(value, dict):
            for key, item in value.items():
                walk(item, axes.get(key) if isinstance(axes, dict) else None)
        else:
            found.append(axes or {})

    walk(inputs.samples[0].args, inputs.axes.args)
    walk(dict(inputs.samples[0].kwargs), dict(inputs.axes.kwargs))
    return found


# -- errors ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _reported(*, as_json: bool, debug: bool) -> Iterator[None]:
    """Turn errors into one message and an exit status. What the user's code prints goes to stderr."""
    logging.getLogger("fxopt").addHandler(logging.NullHandler())  # the report tells what the log would
    try:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            if not debug:
                warnings.simplefilter("ignore")
            yield
    except Exception as error:
        expected = isinstance(error, BadInputError | FxoptError | OSError)
        status = USAGE if isinstance(error, BadInputError) else FAILED
        notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()))
        message = str(error) + notes
        if not expected:
            message = describe(
                f"fxopt failed unexpectedly: {type(error).__name__}: {message}", try_="--debug, which shows where"
            )
        if debug:
            traceback.print_exc()
        stderr().print(error_text(message), soft_wrap=True)
        if as_json:
            print_json({"ok": False, "status": status, "error": message})
        raise typer.Exit(status) from None


def main() -> None:
    """Run the command line: the console entry ``fxopt``."""
    app(prog_name="fxopt")


if __name__ == "__main__":
    main()
