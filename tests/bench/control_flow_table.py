"""Python branches and loops on tensor values: what fxopt makes of each program, and what PyTorch's exporters make.

The programs are those of ``tests/models/control_flow.py``, the early-exit CNN, and those that fxopt refuses. All three
get the same program in eval mode, the same example (of two rows or more: torch takes a size of 1 for a constant) and
the same free sizes. What they return is then run on other inputs, each from the same state; "ways" is in how many
different ways the lines of the program itself ran on these. "equal" is bit for bit for fxopt's graph in eager, and
within rounding for all else. WRONG is a result that differs without any error; a run that raises is counted apart. A
program counts as right only if it is equal on all inputs.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from rich.console import Console
from torch.utils import _pytree as pytree

import fxopt
from fxopt.export import Session, to_onnx
from fxopt.function_module import as_module
from fxopt.tools.demo_net import load_digits
from tests.bench.zoo_table import one_thread, write_row
from tests.core.control_flow.test_refusals import REFUSED
from tests.models import early_exit
from tests.models.control_flow import PROGRAMS, Program

INPUTS = 20  # other than the example
QUICK = ("textbook", "elif", "while", "early-exit CNN")  # the programs that torch.onnx.export gets too
HEADER = ("program", "ways", "fxopt", "If/Loop", "torch.export", "torch.onnx.export(dynamo=True)")
MODELS = re.compile(r"tests.(models|core.control_flow).\w+\.py$")
Run = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a program: the text of its cell, and whether all is right."""

    text: str
    right: bool = False
    wrong: bool = False
    control_flow: str = "-"


@dataclasses.dataclass(frozen=True)
class Case:
    """A program with its example, and other inputs with what the program itself returns for them.

    ``ways`` is in how many different ways its Python code ran.
    """

    model: torch.nn.Module
    example: tuple[Any, ...]
    dynamic_shapes: Any
    inputs: list[tuple[Any, ...]]
    wanted: list[list[Any]]
    ways: int


def programs() -> dict[str, Program]:
    """Return the programs that fxopt captures, and the early-exit CNN."""
    digits = load_digits()

    def net() -> torch.nn.Module:
        return early_exit.train(early_exit.EarlyExitNet(), digits)

    def images(seed: int) -> tuple[torch.Tensor]:
        return (digits.test_images[7 * seed : 7 * seed + 1 + seed % 2],)

    return {**PROGRAMS, "early-exit CNN": Program(net, images, ({0: "batch"},))}


def refused() -> dict[str, Program]:
    """Return the programs that fxopt refuses."""

    def inputs(seed: int) -> tuple[torch.Tensor]:
        return (torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)),)

    def single(seed: int) -> tuple[torch.Tensor]:
        return (inputs(seed)[0][:1, :1],)

    found = {}
    for name, (model, *_) in REFUSED.items():
        alone = name == "more than one element"  # with more, the program itself fails
        found[name] = Program(
            lambda model=model: copy.deepcopy(model), single if alone else inputs, ({0: "batch"},) if alone else None
        )
    return found


def case_of(program: Program) -> Case:
    """Make the program, its inputs, and what it returns for them; inputs on which it fails are left out."""
    torch.manual_seed(0)
    model = as_module(program.make()).eval()
    first = [program.inputs(seed) for seed in range(6)]
    example = next((inputs for inputs in first if len(inputs[0]) > 1), first[0])
    inputs, wanted, ways = [], [], set()
    for given in map(program.inputs, range(len(first), 100)):
        if len(inputs) < INPUTS:
            with contextlib.suppress(Exception):
                with lines_run() as lines:
                    wanted.append(run_fresh(model, given))
                inputs.append(given)
                ways.add(tuple(lines))
    assert len(inputs) == INPUTS, "the program itself fails on most inputs"
    return Case(model, example, program.dynamic_shapes, inputs, wanted, len(ways))


@contextlib.contextmanager
def lines_run() -> Iterator[list[int]]:
    """Note the numbers of the lines of the tests' models that run."""
    lines: list[int] = []

    def inside(frame: Any, event: str, _: Any) -> Any:
        if event == "line":
            lines.append(frame.f_lineno)
        return inside

    before = sys.gettrace()
    sys.settrace(lambda frame, *_: inside if MODELS.search(frame.f_code.co_filename) else None)
    try:
        yield lines
    finally:
        sys.settrace(before)


def run_fresh(model: Run, inputs: tuple[Any, ...]) -> list[Any]:
    """Return the outputs of a copy of ``model``, so that no run sees what another wrote."""
    with torch.no_grad():
        return pytree.tree_leaves(copy.deepcopy(model)(*copy.deepcopy(inputs)))


def count(run: Callable[[tuple[Any, ...]], list[Any]], case: Case, *, exact: bool = False) -> tuple[int, int, str]:
    """Return how often ``run`` equals the program, how often it raises, and the first error's text."""
    equal = raised = 0
    first = ""
    for inputs, want in zip(case.inputs, case.wanted, strict=True):
        try:
            got = run(inputs)[: len(want)]
        except Exception as error:
            raised, first = raised + 1, first or described(error)
            continue
        equal += len(got) == len(want) and all(same(a, b, exact=exact) for a, b in zip(got, want, strict=True))
    return equal, raised, first


def same(got: Any, want: Any, *, exact: bool) -> bool:
    """Compare two outputs."""
    if not isinstance(want, torch.Tensor):
        return bool(got == want)
    if not isinstance(got, torch.Tensor) or got.shape != want.shape or got.dtype != want.dtype:
        return False
    return torch.equal(got, want) if exact else torch.allclose(got, want, rtol=1e-4, atol=1e-5, equal_nan=True)


def session_run(session: Session) -> Callable[[tuple[Any, ...]], list[Any]]:
    """Return a function that runs ORT on the tensors among the inputs."""
    return lambda inputs: list(session.run([leaf for leaf in inputs if isinstance(leaf, torch.Tensor)]))


def described(error: Exception) -> str:
    """Return an exception's class and first line, shortened; for one of torch.onnx, those of its cause."""
    causes = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    error = causes[-1] if type(error).__module__.startswith("torch.onnx") else error
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = re.sub(r"\s*\((?:unhinted|Size-like).*", "", lines[0] if lines else "")
    return f"{type(error).__name__}: {text[:90] + '…' if len(text) > 90 else text}".replace("|", "/")


def outcome(equal: int, raised: int, first: str) -> Outcome:
    """Return the outcome of an export that succeeded."""
    wrong = INPUTS - equal - raised
    parts = [f"ok, equal {equal}/{INPUTS}"]
    parts += [f"WRONG on {wrong}"] if wrong else []
    parts += [f"raises on {raised} ({first})"] if raised else []
    return Outcome(", ".join(parts), equal == INPUTS, wrong > 0)


def with_fxopt(case: Case, folder: Path) -> Outcome:
    """Capture and export with fxopt, and compare the graph in eager and the file in ORT, its optimizer off and on."""
    try:
        gm = fxopt.capture(copy.deepcopy(case.model), case.example, dynamic_shapes=case.dynamic_shapes)
    except fxopt.CaptureError as error:
        return Outcome(f"refused: {refusal(error)}")
    except Exception as error:
        return Outcome(f"FAILS: {described(error)}")
    counts = [count(lambda inputs: run_fresh(gm, inputs), case, exact=True)]
    try:
        file = to_onnx(gm, folder / "fxopt.onnx")
        for level in ("none", "all"):
            session = Session(folder / "fxopt.onnx", optimization=level)  # type: ignore[arg-type]  # two of its texts
            counts.append(count(session_run(session), case))
    except fxopt.FxoptError as error:
        return Outcome(f"captured, equal {counts[0][0]}/{INPUTS}; not exported: {described(error)}")
    text = "captured, exported; equal " + ", ".join(
        f"{name} {equal}/{INPUTS}" + (f" (raises on {raised}: {first})" if raised else "")
        for name, (equal, raised, first) in zip(("eager", "ORT off", "ORT on"), counts, strict=True)
    )
    wrong = any(equal + raised < INPUTS for equal, raised, _ in counts)
    kinds = [node.op_type for node in ir.traversal.RecursiveGraphIterator(file.model.graph)]
    right = all(equal == INPUTS for equal, _, _ in counts)
    return Outcome(text, right, wrong, f"{kinds.count('If')}/{kinds.count('Loop')}")


def refusal(error: fxopt.CaptureError) -> str:
    """Return the first line of a refusal, which says what was found."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].replace("|", "/")


def with_torch_export(case: Case, folder: Path) -> Outcome:
    """Trace with ``torch.export.export``."""
    model = copy.deepcopy(case.model)
    try:
        program = torch.export.export(model, case.example, dynamic_shapes=_dims(case.dynamic_shapes), strict=False)
        module = program.module()
    except Exception as error:
        return Outcome(described(error))
    return outcome(*count(lambda inputs: run_fresh(module, inputs), case))


def with_torch_onnx(case: Case, folder: Path) -> Outcome:
    """Trace and export with ``torch.onnx.export``, and run the file in ORT."""
    path = folder / "torch.onnx"
    model = copy.deepcopy(case.model)
    try:
        torch.onnx.export(
            model, case.example, path, dynamo=True, verbose=False, dynamic_shapes=_dims(case.dynamic_shapes)
        )
        session = Session(path)
    except Exception as error:
        return Outcome(described(error))
    return outcome(*count(session_run(session), case))


def _dims(shapes: Any) -> Any:
    """Translate {0: "batch"} for torch."""
    if shapes is None:
        return None
    return tuple(
        None if axes is None else {axis: torch.export.Dim(name) for axis, name in axes.items()} for axes in shapes
    )


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keep off the terminal what the exporters print, log and warn of."""
    kept = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    sink = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(kept)


def outcomes(case: Case, folder: Path, *, onnx: bool) -> list[Outcome]:
    """Return what each of the three makes of a program; without ``onnx``, only the first two are asked."""
    tools = (with_fxopt, with_torch_export, with_torch_onnx)[: 3 if onnx else 2]
    return [tool(case, folder) for tool in tools]


def totals(column: Sequence[Outcome]) -> str:
    """Return how many of these are right, WRONG somewhere, or neither."""
    if not column:
        return "not asked"
    right, wrong = sum(one.right for one in column), sum(one.wrong for one in column)
    return f"{right} of {len(column)} right, {wrong} WRONG, {len(column) - right - wrong} refused or failing"


def main(console: Console | None = None, *, quick: bool = False, names: Sequence[str] = ()) -> None:
    """Print the table row by row, as Markdown, and then the totals.

    Args:
        console: Where to print.
        quick: Ask torch.onnx.export, which takes seconds each time, for a few programs only.
        names: The programs; all if none is given.
    """
    console = console or Console()
    write_row(console, HEADER)
    write_row(console, ("---", "---:", "---", "---:", "---", "---"))
    with tempfile.TemporaryDirectory() as place, one_thread():
        for table, title in ((programs(), "captured"), (refused(), "refused")):
            chosen = [name for name in table if not names or name in names]
            columns: list[list[Outcome]] = [[], [], []]
            for name in chosen:
                with silence():
                    case = case_of(table[name])
                    found = outcomes(case, Path(place), onnx=not quick or name in QUICK)
                for column, one in zip(columns, found, strict=False):
                    column.append(one)
                cells = [one.text for one in found] + ["not asked"] * (3 - len(found))
                write_row(console, (name, str(case.ways), cells[0], found[0].control_flow, *cells[1:]))
            if chosen:
                theirs = [totals(column) for column in columns]
                write_row(console, (f"all {len(chosen)} {title}", "", theirs[0], "", *theirs[1:]))


if __name__ == "__main__":
    main(names=sys.argv[1:])
