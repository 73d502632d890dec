"""The command line: ``fxopt COMMAND``.

Exit status: 0 if all went well; 1 if the work failed; 2 if the command, the model or its inputs are wrong.
"""

from __future__ import annotations

import dataclasses
import enum
import gc
import inspect
import signal
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

import fxopt
from fxopt.errors import describe
from fxopt.export import OnnxFile, ValidationReport, to_onnx
from fxopt.export import coverage as measure_coverage
from fxopt.export import validate as compare
from fxopt.export.files import check_target, file_bytes
from fxopt.export.to_onnx import DEFAULT_OPSET, OPSETS
from fxopt.input_spec import parse_inputs
from fxopt.passes import DEFAULT, profile_branches
from fxopt.registry import known_passes
from fxopt.tools.bench_command import bench
from fxopt.tools.bundle_commands import bundle, verify
from fxopt.tools.command_group import Commands
from fxopt.tools.console import BadInputError, as_bad_input, describe_bytes, print_json, stages, users_code
from fxopt.tools.fault_commands import bisect, blame
from fxopt.tools.graph_source import captured
from fxopt.tools.job import Job, LedgerJob
from fxopt.tools.options import (
    MODEL_HELP,
    Calibration,
    Debug,
    Dynamic,
    File,
    Inputs,
    Json,
    Ledger,
    Metric,
    Model,
    Passes,
    Size,
    check_file,
    parse_sizes,
)  # fmt: skip
from fxopt.tools.tables import print_passes, print_report
from fxopt.tools.view_command import view

__all__ = ["app", "main"]

app = typer.Typer(
    name="fxopt",
    cls=Commands,
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
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="An .onnx or .fxopt file.")],
    passes: Passes = None,
    inputs: Inputs = None,
    dynamic: Dynamic = None,
    calibration: Calibration = None,
    opset: Annotated[
        int | None, typer.Option(metavar="N", help=f"ONNX operator set, {OPSETS[0]} to {OPSETS[-1]} [{DEFAULT_OPSET}].")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail at the first pass that fails.")] = False,
    check: Annotated[_Check, typer.Option(help="Runs that check the passes.")] = _Check.ALL,
    train: Annotated[bool, typer.Option("--train", help="Keep the graph in train mode; for .fxopt only.")] = False,
    no_validate: Annotated[bool, typer.Option("--no-validate", help="Do not compare with ONNX Runtime.")] = False,
    ledger: Ledger = None,
    metric: Metric = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Capture a model, run passes over it, write ONNX or a graph."""
    started = time.perf_counter()
    with users_code(debug=debug), stages(3 + (ledger is not None), quiet=json or debug) as progress:
        _check_output(output, opset=opset, train=train, no_validate=no_validate)
        book = LedgerJob.of(ledger, metric, train=train)
        job = Job(model, passes, inputs, dynamic, calibration or ())
        gm = job.optimized(progress, strict=strict, check=check.value, train=train, keep_graphs=book is not None)
        progress.begin("write" if no_validate or output.suffix == ".fxopt" else "write and validate")
        written = None
        if output.suffix == ".onnx":
            written = to_onnx(gm, output, opset=opset or DEFAULT_OPSET, validate=not no_validate)
        else:
            fxopt.save(gm, output)
        if book is not None:
            progress.begin("measure every step")
            book.write(gm)
    if json:
        told = {"ledger": None if ledger is None else str(ledger), "seconds": round(time.perf_counter() - started, 3)}
        print_json(_optimized(model, output, gm, written) | told)
        return
    assert gm.report is not None
    print_report(gm.report)
    print(f"wrote {output}: {describe_bytes(_size(output))}")
    if ledger is not None:
        print(f"wrote {ledger}: what each step cost and brought")
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
    return file_bytes(output) if output.suffix == ".onnx" else output.stat().st_size


@app.command()
def validate(
    file: File,
    against: Annotated[str, typer.Option(metavar="MODEL", help=MODEL_HELP)],
    inputs: Inputs = None,
    dynamic: Dynamic = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare an ONNX file with the model that it was made from."""
    with users_code(debug=debug), stages(3, quiet=json or debug) as progress:
        check_file(file)
        gm = captured(against, inputs, dynamic, progress, train=False)
        progress.begin("compare")
        report: ValidationReport = compare(file, gm)
    if json:
        print_json({"ok": True, "file": str(file), "against": against, "validation": report.to_dict()})
    else:
        print(f"{file} agrees with {against}: {report}")


app.command()(blame)
app.command()(bench)
app.command()(bisect)
app.command()(view)
app.command()(bundle)
app.command()(verify)


@app.command()
def coverage(
    file: File,
    size: Size = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Tell what of a file runs in integer kernels, and why not all."""
    with users_code(debug=debug), stages(1, quiet=json or debug) as progress:
        check_file(file)
        sizes = parse_sizes(size or [])
        progress.begin("run")
        with as_bad_input(str(file)):
            report = measure_coverage(file, sizes=sizes or None)
    if json:
        print_json({"ok": True, "file": str(file), "coverage": report.to_dict()})
    else:
        print(f"{file}: {report}")


@app.command()
def branches(
    model: Model,
    inputs: Inputs = None,
    dynamic: Dynamic = None,
    runs: Annotated[int, typer.Option(min=1, metavar="N", help="Inputs to draw from the spec.")] = 1,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Count which sides of its branches a model takes, by source line."""
    with users_code(debug=debug), stages(3, quiet=json or debug) as progress:
        gm = captured(model, inputs, dynamic, progress, train=False)
        progress.begin("run")
        samples = list(gm.samples)
        for seed in range(1, runs if inputs is not None else 1):
            samples += parse_inputs(inputs or "", seed=seed).samples
        with as_bad_input():
            profile = profile_branches(gm, samples)
    if json:
        counts = [dataclasses.asdict(count) | {"never": list(count.never)} for count in profile.branches]
        print_json({"ok": True, "model": model, "runs": profile.runs, "branches": counts})
        return
    print(profile if profile.branches else f"{model} has no branch that depends on a tensor")


@app.command()
def passes(json: Json = False, debug: Debug = False) -> None:
    """List the passes: name, contract, options, what each does."""
    with users_code(debug=debug):
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
    print_passes(rows)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else None


@app.command()
def demo(
    output: Annotated[Path | None, typer.Option("--output", metavar="DIR", help="Folder for the ONNX files.")] = None,
) -> None:
    """Train a small net on real digits, optimize and prove it."""
    from fxopt.tools.demo import run

    raise typer.Exit(run(output))


def main() -> None:
    """Run the command line: the console entry ``fxopt``."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that what is half written is removed
    try:
        app(prog_name="fxopt")
    finally:
        gc.freeze()  # the process ends: looking for garbage in all that was imported would take a second


if __name__ == "__main__":
    main()
