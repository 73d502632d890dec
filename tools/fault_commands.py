"""``fxopt blame`` and ``fxopt bisect``: where a model goes wrong, and what made it so."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

import fxopt
from fxopt.contracts import Contract
from fxopt.errors import ExportError, describe
from fxopt.export import bisect_ort, reduce_ort, to_onnx
from fxopt.export import blame as find_guilty
from fxopt.export.blame_file import named_inputs
from fxopt.export.coverage_run import drawn_inputs
from fxopt.export.session import Session
from fxopt.input_spec import parse_inputs
from fxopt.tools.console import BadInputError, as_bad_input, print_json, stages, users_code
from fxopt.tools.graph_source import captured
from fxopt.tools.options import MODEL_HELP, Debug, Dynamic, File, Inputs, Json, Level, check_file

__all__ = ["bisect", "blame"]

MinSqnrDb = Annotated[
    float | None, typer.Option(metavar="DB", help="Signal to noise that is good enough; rounding alone if not given.")
]


def blame(
    file: File,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="What is right: a model or another .onnx file; the file itself if not given."
        ),
    ] = None,
    inputs: Inputs = None,
    dynamic: Dynamic = None,
    optimization: Annotated[
        Level | None,
        typer.Option(help="Look at the file, or at what ORT makes of it. [none, or extended without --against]"),
    ] = None,
    min_sqnr_db: MinSqnrDb = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Name the nodes that a file computes wrongly.

    The exit status is 1 if there are any.
    """
    level = optimization or (Level.EXTENDED if against is None else Level.NONE)
    contract = None if min_sqnr_db is None else Contract.lossy("sqnr_db", min_sqnr_db)
    with users_code(debug=debug), stages(3, quiet=json or debug) as progress:
        check_file(file)
        if against is None and level is Level.NONE:
            raise BadInputError(describe("there is nothing to compare the file with", try_="--against MODEL"))
        reference: Path | fxopt.CapturedModule
        if against is None or against.endswith(".onnx"):
            reference = file if against is None else Path(against)
            sample = _sample_for(reference, inputs, dynamic)
        else:
            reference, sample = captured(against, inputs, dynamic, progress, train=False), None
        progress.begin("compare every value")
        report = find_guilty(file, reference, sample, optimization=level.value, contract=contract)
    if json:
        ok, other = report.first is None, against or str(file)
        print_json({"ok": ok, "file": str(file), "against": other, "blame": report.to_dict()})
    else:
        print(f"{file}: {report}")
    if report.first is not None:
        raise typer.Exit(1)


def _sample_for(file: Path, inputs: str | None, dynamic: str | None) -> Any:
    """Return the inputs to run a file on; None for such as are drawn."""
    if dynamic is not None:
        raise BadInputError(describe("--dynamic does not go with an .onnx file", got=file))
    check_file(file)
    if inputs is None:
        return None
    with as_bad_input("--inputs"):
        sample = parse_inputs(inputs).samples[0]
        named_inputs(sample, Session(file, optimization="none").input_names)
    return sample


def bisect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=f"{MODEL_HELP} Or an .onnx file.", show_default=False)],
    passes: Annotated[
        str | None, typer.Option("--passes", "-p", metavar="PASSES", help="The passes to search.")
    ] = None,
    inputs: Inputs = None,
    dynamic: Dynamic = None,
    min_sqnr_db: MinSqnrDb = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Folder for what reproduces it.")
    ] = None,
    whole: Annotated[
        bool, typer.Option("--whole", help="Write the whole graphs, not the part in which they differ.")
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Find the rewrite that changes what a model computes.

    Of an ONNX file, find which of ONNX Runtime's optimizers does.
    """
    contract = Contract.ROUNDING if min_sqnr_db is None else Contract.lossy("sqnr_db", min_sqnr_db)
    if model.endswith(".onnx"):
        given = {"--passes": passes, "--dynamic": dynamic, "--whole": whole or None}
        if wrong := [name for name, one in given.items() if one is not None]:
            raise BadInputError(describe(f"{', '.join(wrong)} does not go with an .onnx file", got=model))
        _bisect_file(Path(model), contract, inputs, output, json=json, debug=debug)
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
        written = None if output is None else _write(found, output, whole=whole)
    if json:
        changes = [dataclasses.asdict(change) for change in found.changes]
        fields: dict[str, Any] = {"pass": found.item.spec(), "step": found.step, "site": found.site}
        fields |= {"alone": found.alone} | ({} if written is None else {"written": written})
        print_json(
            {"ok": True, "model": model, **fields, "reason": found.reason, "runs": found.runs, "changes": changes}
        )
        return
    print(found)
    if written is not None:
        note = f" ({written['note']})" if written["note"] else ""
        left = f"{written['nodes']} of {written['whole_nodes']} nodes"
        print(f"wrote {output}: {', '.join(written['files'])}; {left}{note}")
        for line in written["missing"]:
            print(line)


def _write(found: fxopt.BisectResult, folder: Path, *, whole: bool) -> dict[str, Any]:
    """Write what reproduces it; return what was written, how much of the graphs, and what could not be."""
    pair = found.reduced.uncut() if whole else found.reduced
    found.save(folder, whole=whole)
    missing = []
    for name, gm in (("before.onnx", pair.before), ("after.onnx", pair.after)):
        (folder / name).unlink(missing_ok=True)  # that of an earlier run
        try:
            to_onnx(gm, folder / name, validate=False)
        except ExportError as error:
            missing.append(f"{name} is missing: {str(error).splitlines()[0]}")
    names = ["before.fxopt", "after.fxopt", "before.pt2", "after.pt2", "before.onnx", "after.onnx"]
    files = [name for name in [*names, "inputs.pt", "repro.py"] if (folder / name).exists()]
    sizes = {"nodes": pair.nodes, "whole_nodes": pair.whole_nodes}
    return {"folder": str(folder), "files": files, **sizes, "note": pair.note, "missing": missing}


def _bisect_file(
    file: Path, contract: Contract, inputs: str | None, output: Path | None, *, json: bool, debug: bool
) -> None:
    with users_code(debug=debug), stages(1, quiet=json or debug) as progress:
        sample = _sample_for(file, inputs, None)
        session = Session(file, optimization="none")
        named = drawn_inputs(session) if sample is None else named_inputs(sample, session.input_names)
        tensors = [named[name] for name in session.input_names]
        progress.begin("bisect")
        found = bisect_ort(file, tensors, contract)
        part = None if output is None else reduce_ort(file, tensors, found.level, contract)
        if part is not None and output is not None:
            rows = {"optimizer": found.optimizer or "unknown", "level": found.level, "reason": part.problem}
            part.save(output, found.level, found.left_out, rows)
    if json:
        written = None if part is None else {"nodes": part.nodes, "whole_nodes": part.whole_nodes, "value": part.value}
        print_json({"ok": True, "file": str(file)} | dataclasses.asdict(found) | {"written": written})
        return
    print(f"{file}: {found}")
    if part is not None:
        left = f"{part.nodes} of {part.whole_nodes} operators"
        print(f"wrote {output}: model.onnx, inputs.npz, repro.py; {left}")
