"""What a command line asks for: a model, passes, inputs; and the graph that comes of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import fxopt
from fxopt.errors import FxoptError, describe
from fxopt.export import ledger
from fxopt.export.ledger_report import check_ledger_path
from fxopt.input_files import read_inputs
from fxopt.judge import Check
from fxopt.metric import Metric
from fxopt.passes import DEFAULT
from fxopt.tools.console import BadInputError, Counted, Stages, as_bad_input
from fxopt.tools.graph_source import captured
from fxopt.tools.model_source import explained, load_function

__all__ = ["Job", "LedgerJob"]


@dataclasses.dataclass(frozen=True)
class Job:
    """A model to optimize, as it stands on the command line.

    Attributes:
        model: See :func:`fxopt.tools.model_source.load_model`.
        passes: Passes as text; the default ones if None.
        inputs: The example inputs, see :mod:`fxopt.input_spec`.
        dynamic: More dynamic axes of these.
        calibration: Paths of files, a batch each.
    """

    model: str
    passes: str | None
    inputs: str | None
    dynamic: str | None
    calibration: Sequence[str]

    def optimized(
        self, progress: Stages, *, strict: bool = False, check: Check = "all", train: bool = False,
        keep_graphs: bool = False,
    ) -> fxopt.CapturedModule:  # fmt: skip
        """Return the graph after the passes; what is wrong with the text shows before the model is loaded.

        Raises:
            BadInputError: a pass, a file, the model or its inputs are wrong.
        """
        with as_bad_input():
            manager = fxopt.PassManager(
                DEFAULT if self.passes is None else self.passes,
                strict=strict,
                check=check,
                keep_graphs=keep_graphs,
                progress=progress,
            )
        progress.extend(len(manager.passes))
        with as_bad_input("--calibration"):
            batches = [sample for path in self.calibration for sample in read_inputs(path)]
        gm = captured(self.model, self.inputs, self.dynamic, progress, train=train)
        gm.calibration = Counted(batches, progress.count) if batches else None
        return manager.run(gm)


@dataclasses.dataclass(frozen=True)
class LedgerJob:
    """A ledger to write, as it is asked for on the command line.

    Attributes:
        path: Where to write it.
        name: The text that names the metric, if there is one.
        metric: The metric.
    """

    path: Path
    name: str | None
    metric: Metric | None

    @classmethod
    def of(cls, path: Path | None, name: str | None, *, train: bool) -> LedgerJob | None:
        """Return the ledger that is asked for, if one is; the metric is loaded.

        Raises:
            BadInputError: it cannot be written or measured, or there is no such metric.
        """
        if path is None:
            if name is not None:
                raise BadInputError(describe("--metric goes with --ledger only", try_="--ledger steps.html"))
            return None
        if train:
            raise BadInputError("--ledger does not go with --train: a graph in train mode has no file to measure")
        with as_bad_input("--ledger"):
            check_ledger_path(path)
        return cls(path, name, None if name is None else load_function(name))

    def write(self, gm: fxopt.CapturedModule) -> None:
        """Measure every step and write the ledger.

        Raises:
            BadInputError: the metric raises, or returns no number.
        """
        try:
            found = ledger(gm, self.metric)
        except Exception as error:
            if self.name is None or isinstance(error, FxoptError | OSError):
                raise
            told = explained(f"--metric {self.name} fails", error, self.name.rpartition(":")[0])
            wrong = BadInputError(told)
            for note in getattr(error, "__notes__", ()):  # on which graph
                wrong.add_note(note)
            raise wrong from error
        found.save(self.path)
