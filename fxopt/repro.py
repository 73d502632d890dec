"""A folder that shows a difference between two graphs: the graphs, their inputs, and a script that runs them."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fxopt.contracts import Contract
from fxopt.errors import describe
from fxopt.exported_program import quiet
from fxopt.graph_module import CapturedModule, graph_modules
from fxopt.isolation import isolated
from fxopt.numerics import measure, violation
from fxopt.reduce import Reduced, difference
from fxopt.serialize import atomic_file, save

__all__ = ["commented", "compare", "write_repro"]

_SCRIPT = """{header}

from pathlib import Path
import sys

import torch

import fxopt
from fxopt import Contract
from fxopt.repro import compare

here = Path(__file__).parent
before, after = (fxopt.load(here / name) for name in ("before.fxopt", "after.fxopt"))
before.samples = tuple(fxopt.Sample(*sample) for sample in torch.load(here / "inputs.pt"))
text, differs = compare(before, after, {contract!r})
print(text)
sys.exit(int(differs))  # 1 if by more than that
"""


def write_repro(folder: str | Path, pair: Reduced, headline: str, rows: Mapping[str, Any]) -> Path:
    """Write both graphs, for fxopt and for torch alone, the inputs and a script to a folder, which is made.

    Args:
        folder: Where to.
        pair: The graphs.
        headline: First line of the script.
        rows: What else its head says.

    Returns:
        The path of the script. It prints how far the outputs are apart, and ends with status 1 if that is too far.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    remarks = []
    for name, gm in (("before", pair.before), ("after", pair.after)):
        save(gm, folder / f"{name}.fxopt")
        remarks += _save_program(gm, folder / f"{name}.pt2")
    torch.save([(sample.args, dict(sample.kwargs)) for sample in pair.before.samples], folder / "inputs.pt")
    head = describe(headline, **rows, files="\n".join([_FILES, *remarks]))
    script = folder / "repro.py"
    script.write_text(
        _SCRIPT.format(header=commented(head), contract=pair.contract or Contract.ROUNDING), encoding="utf-8"
    )
    return script


def commented(text: str) -> str:
    """Return a text as a comment of Python."""
    return "\n".join(f"# {line}".rstrip() for line in text.splitlines())


_FILES = """before.fxopt is the graph before the rewrite, after.fxopt the graph after it; nothing else differs
before.pt2 and after.pt2 are the same for torch alone: torch.export.load(...).module()
inputs.pt is the list of their inputs, each (args, kwargs)"""


def compare(before: CapturedModule, after: CapturedModule, contract: Contract) -> tuple[str, bool]:
    """Run two graphs on the samples of the first one.

    Returns:
        How far their outputs are apart, in words; and whether that breaks the contract, or the second one cannot run.
    """
    problem = difference(before, after, contract)
    lines = []
    for index, sample in enumerate(before.samples):
        want = _outputs(before, sample)
        with contextlib.suppress(Exception):  # an error of the second graph is the problem, which stands below
            pairs = zip(before.output_names, want, _outputs(after, sample), strict=False)
            lines += [f"sample {index}, {name}: {_apart(a, b)}" for name, a, b in pairs]
    return "\n".join([*lines, problem or f"the outputs keep {contract}"]), problem is not None


def _outputs(gm: CapturedModule, sample: Any) -> list[Any]:
    copy = sample.clone()
    with isolated(gm):
        return [leaf for leaf in gm.flat_outputs(*copy.args, **copy.kwargs) if leaf is not None]


def _apart(want: Any, got: Any) -> str:
    same_shape = isinstance(want, torch.Tensor) and isinstance(got, torch.Tensor) and want.shape == got.shape
    return str(measure(want, got)) if same_shape else violation(Contract.EXACT, want, got) or "equal"


def _save_program(gm: CapturedModule, path: Path) -> list[str]:
    """Write the graph as a program of torch, at the sizes of the first sample; return what must be known about it."""
    path.unlink(missing_ok=True)  # that of an earlier run, if torch refuses this one
    if not gm.samples:
        return [f"{path.name} is missing: the graph has no sample"]
    sample = gm.samples[0].clone()
    try:
        with quiet(), isolated(gm):
            program = torch.export.export(gm, sample.args, dict(sample.kwargs), strict=False)
            with atomic_file(path) as file:
                torch.export.save(program, file)
    except Exception as error:  # whatever torch cannot do with the graph, the files of fxopt are there
        said = next((line for line in str(error).splitlines() if line.strip()), "")
        return [f"{path.name} is missing: torch.export says {type(error).__name__}: {said}"[:400]]
    calls = {str(node.target) for module in graph_modules(program.graph_module) for node in module.graph.nodes}
    own = sorted(name for name in calls if name.startswith("fxopt."))
    return [f"{path.name} calls {', '.join(own)}: import fxopt before it is loaded"] if own else []
