"""Which level of ONNX Runtime's optimizer, and which of its optimizers by name, changes what a model computes."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fxopt.contracts import Contract
from fxopt.errors import ExportError, describe
from fxopt.export.files import OnnxFile, loadable
from fxopt.export.reduce_ort import broken
from fxopt.export.session import Optimization, Session

__all__ = ["OrtBisectResult", "bisect_ort"]

_LEVELS: tuple[Optimization, ...] = ("none", "basic", "extended", "all")
_MODIFIED = re.compile(r"GraphTransformer (\w+) modified: 1")
# Rules that the transformers named RuleBasedTransformer are made of; the log names only the transformer.
_RULES = (
    "EliminateIdentity", "EliminateSlice", "UnsqueezeElimination", "EliminateDropout", "ExpandElimination",
    "CastElimination", "CastChainElimination", "PreShapeNodeElimination", "NoopElimination", "DivMulFusion",
    "FuseReluClip", "GemmSumFusion", "GemmTransposeFusion", "NotWhereFusion", "ConvAddFusion", "ConvMulFusion",
    "ConvBNFusion", "PadFusion", "MatmulBNFusion", "ClipQuantRewrite", "ReluQuantRewrite", "LabelEncoderFusion",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class OrtBisectResult:
    """The optimizer at which a check turns from good to bad.

    Attributes:
        level: The lowest level of optimization at which the check is bad.
        optimizer: Name of the optimizer that is to be left out to make it good, as ORT's ``disabled_optimizers`` takes
            it; None if leaving out all that there are does not help.
        modified: Names of the optimizers that changed the graph at that level, in order.
        reason: What the check said.
        runs: Number of runs of the check.
        left_out: The names that were left out to make the check good: those before ``optimizer`` in the order in which
            they ran, and itself; empty if there is none.
    """

    level: Optimization
    optimizer: str | None
    modified: tuple[str, ...]
    reason: str
    runs: int
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        name = self.optimizer or "none of the optimizers that can be left out"
        return (
            f"ORT's optimizer breaks the check at level {self.level!r}: {name}; {self.reason}\n"
            f"found among {len(self.modified)} optimizers in {self.runs} runs of the check"
        )


def bisect_ort(
    model: OnnxFile | str | os.PathLike[str] | bytes,
    inputs: Sequence[torch.Tensor],
    check: Callable[[Sequence[torch.Tensor]], Any] | Contract | None = None,
) -> OrtBisectResult:
    """Find what of ORT's optimizer changes the outputs of a model.

    Args:
        model: The ONNX model.
        inputs: One tensor for each input.
        check: A function of the outputs that returns False, or raises, if they are bad. A contract compares them with
            those without optimization; ROUNDING if nothing is given.

    Raises:
        ExportError: the check is bad without optimization, or good with all of it; ORT refuses the model.
    """
    source = loadable(model)
    runs = _Runs(source, inputs, check)
    if (problem := runs.problem("none")) is not None:
        raise ExportError(
            describe("the check is bad without ORT's optimizer, so it is not to blame", found=problem,
                     try_="fxopt.export.blame, which compares every value with eager PyTorch")
        )  # fmt: skip
    for level in _LEVELS[1:]:
        if (reason := runs.problem(level)) is not None:
            break
    else:
        raise ExportError("the check is good at every level of ORT's optimizer: there is nothing to find")
    modified = _modified(source, level)
    names = [name for each in modified for name in (_RULES if "RuleBased" in each else (each,))]
    names = list(dict.fromkeys(names))
    if runs.problem(level, names) is not None:
        return OrtBisectResult(level, None, modified, reason, runs.count)
    bad, good = 0, len(names)  # numbers of names to leave out
    while good - bad > 1:
        middle = (bad + good) // 2
        bad, good = (middle, good) if runs.problem(level, names[:middle]) is not None else (bad, middle)
    return OrtBisectResult(level, names[good - 1], modified, reason, runs.count, tuple(names[:good]))


class _Runs:
    """Runs the check on the outputs at a level, and counts."""

    def __init__(self, source: Any, inputs: Sequence[torch.Tensor], check: Any) -> None:
        self._source, self._inputs = source, list(inputs)
        self._plain = Session(source, optimization="none").run(self._inputs)
        self._check = check if check is not None else Contract.ROUNDING
        self.count = 0

    def problem(self, level: Optimization, disabled: Sequence[str] = ()) -> str | None:
        """Return what is bad about the outputs, or None."""
        self.count += 1
        outputs = Session(self._source, optimization=level, disabled=disabled).run(self._inputs)
        if isinstance(self._check, Contract):
            found = (broken(self._check, want, got) for want, got in zip(self._plain, outputs, strict=True))
            return next((problem for problem in found if problem is not None), None)
        try:
            answer = self._check(outputs)
        except Exception as error:  # whatever a user's check raises is its verdict
            return f"{type(error).__name__}: {error}"
        return "it returned False" if answer is False else None


def _modified(source: Any, level: Optimization) -> tuple[str, ...]:
    """Return the optimizers that change the graph, in order. ORT says it in its log alone."""
    with _captured_log() as log:
        Session(source, optimization=level, verbose=True)
        return tuple(dict.fromkeys(_MODIFIED.findall(log.read_text(errors="replace"))))


@contextmanager
def _captured_log() -> Iterator[Path]:
    """Send what native code writes to standard error to a file."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "log"
            with path.open("wb") as file:
                os.dup2(file.fileno(), 2)
                try:
                    yield path
                finally:
                    os.dup2(kept, 2)
    finally:
        os.close(kept)
