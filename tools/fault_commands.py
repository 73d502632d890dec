"""``fxopt blame`` and ``fxopt bisect``: where a model goes wrong, and what made it so."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

import fxopt
from fxopt.contracts import Contract
from fxopt.errors import describe
from fxopt.export import bisect_ort, to_onnx
from fxopt.export import blame as find_guilty
from fxopt.export.coverage_run import drawn_inputs
from fxopt.export.session import Session
from fxopt.tools.console import BadInputError, as_bad_input, print_json, stages, users_code
from fxopt.tools.graph_source import captured
from fxopt.tools.options import MODEL_HELP, Debug, Dynamic, File, Inputs, Json, Level, check_file

__all__ = ["bisect", "blame"]


def blame(
    file: File,
    against: Annotated[str, typer.Option(metavar="MODEL", help=f"What it was exported from: {MODEL_HELP}")],
    inputs: Inputs = None,
    dynamic: Dynamic = None,
    optimization: Annotated[
        Level, typer.Option(help="Look at the operators of the file, or at what ORT's optimizer makes of them.")
    ] = Level.NONE,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Name the nodes that a file computes wrongly.

    The exit status is 1 if there are any.
    """
    with users_code(debug=debug), stages(3, quiet=json or debug) as progress:
        check_file(file)
        gm = captured(against, inputs, dynamic, progress, train=False)
        progress.begin("compare every value")
        report = find_guilty(file, gm, optimization=optimization.value)
    if json:
        print_json({"ok": report.first is None, "file": str(file), "against": against, "blame": report.to_dict()})
    else:
        print(f"{file}: {report}")
    if report.first is not None:
        raise typer.Exit(1)


def bisect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=f"{MODEL_HELP} Or an .onnx file.", show_default=False)],
    passes: Annotated[
        str | None, typer.Option("--passes", "-p", metavar="PASSES", help="The passes to search.")
    ] = None,
    inputs: Inputs = None,
    dynamic: Dynamic = None,
    min_sqnr_db: Annotated[
        float | None,
        typer.Option(metavar="DB", help="Signal to noise that is good enough; rounding alone if not given."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Folder for what reproduces it.")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Find the rewrite that changes what a model computes.

    Of an ONNX file, find which of ONNX Runtime's optimizers does.
    """
    contract = Contract.ROUNDING if min_sqnr_db is None else Contract.lossy("sqnr_db", min_sqnr_db)
    if model.endswith(".onnx"):
        given = {"--passes": passes, "--inputs": inputs, "--dynamic": dynamic, "--output": output}
        if wrong := [name for name, one in given.items() if one is not None]:
            raise BadInputError(describe(f"{', '.join(wrong)} does not go with an .onnx file", got=model))
        _bisect_file(Path(model), contract, json=json, debug=debug)
        return
    if passes is None:
        raise BadInputError(
            describe("--passes is missing: there is nothing to search", wanted='-p "fold-batch-norm,..."')
        )
    with users_code(debug=debug), stages(3, quiet=json or debug) as progress:
        with as_bad_input():
            items = fxopt.PassManager(passes).passes
        gm = captured(model, inputs, dynamic, progress, train=False)
        progress.begin("bisect")
        found = fxopt.bisect(gm, items, contract)
        if output is not None:
            found.save(output)
            to_onnx(found.after, output / "after.onnx", validate=False)
    if json:
        changes = [dataclasses.asdict(change) for change in found.changes]
        fields = {"pass": found.item.spec(), "step": found.step, "site": found.site, "alone": found.alone}
        print_json(
            {"ok": True, "model": model, **fields, "reason": found.reason, "runs": found.runs, "changes": changes}
        )
        return
    print(found)
    if output is not None:
        print(f"wrote {output}: before.fxopt, after.fxopt, after.onnx, inputs.pt, repro.py")


def _bisect_file(file: Path, contract: Contract, *, json: bool, debug: bool) -> None:
    with users_code(debug=debug), stages(1, quiet=json or debug) as progress:
        check_file(file)
        progress.begin("bisect")
        drawn: dict[str, Any] = drawn_inputs(Session(file, optimization="none"))
        found = bisect_ort(file, list(drawn.values()), contract)
    if json:
        print_json({"ok": True, "file": str(file)} | dataclasses.asdict(found))
    else:
        print(f"{file}: {found}")
