"""What a command line asks for: a model, passes, inputs; and the graph that comes of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import fxopt
from fxopt.input_files import read_inputs
from fxopt.judge import Check
from fxopt.passes import DEFAULT
from fxopt.tools.console import Counted, Stages, as_bad_input
from fxopt.tools.graph_source import captured

__all__ = ["Job"]


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
        self, progress: Stages, *, strict: bool = False, check: Check = "all", train: bool = False
    ) -> fxopt.CapturedModule:
        """Return the graph after the passes; what is wrong with the text shows before the model is loaded.

        Raises:
            BadInputError: a pass, a file, the model or its inputs are wrong.
        """
        with as_bad_input():
            manager = fxopt.PassManager(
                DEFAULT if self.passes is None else self.passes, strict=strict, check=check, progress=progress
            )
        progress.extend(len(manager.passes))
        with as_bad_input("--calibration"):
            batches = [sample for path in self.calibration for sample in read_inputs(path)]
        gm = captured(self.model, self.inputs, self.dynamic, progress, train=train)
        gm.calibration = Counted(batches, progress.count) if batches else None
        return manager.run(gm)
