"""An ONNX file that is called as the graph that it was made from, and returns what that graph returns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from fxopt.args import source_line
from fxopt.errors import GuardError, describe
from fxopt.export.guards import GUARD_OUTPUT
from fxopt.export.session import Session
from fxopt.graph_module import CapturedModule
from fxopt.ops import GUARD

__all__ = ["OrtModel"]


class OrtModel:
    """A graph whose numbers ONNX Runtime computes: what a metric of models can be asked about a file."""

    def __init__(self, gm: CapturedModule, session: Session) -> None:
        """Args: gm: the graph. session: the file that was exported from it, loaded."""
        self.gm, self.session = gm, session

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the file on the arguments of the model.

        Raises:
            InputError: the arguments do not fit the graph.
            GuardError: they ask for a side of a branch that was cut off.
            ExportError: ORT fails.
        """
        leaves = self.gm.flatten_inputs(*args, **kwargs)
        got = self.session.run([leaf for leaf in leaves if isinstance(leaf, torch.Tensor)])
        if self.session.output_names[-1:] == (GUARD_OUTPUT,) and len(got) > len(self.gm.output_names):
            self._check_guards(got[-1])
        returned: Any = self.gm.graph.output_node().args[0]
        values = iter(got)
        # One list for all: the next value is taken only where the file has one.
        return self.gm.graph.process_outputs([_value(leaf, values) for leaf in returned])

    def _check_guards(self, holds: torch.Tensor) -> None:
        if not bool(holds):
            lines = [source_line(node) for node in self.gm.graph.nodes if node.target is GUARD]
            raise GuardError(
                describe(
                    "the file was specialized to one side of a branch, and these inputs ask for the other",
                    source="; ".join(filter(None, lines)) or None,
                )
            )


def _value(leaf: Any, values: Iterator[torch.Tensor]) -> Any:
    """Return what stands in the place of a leaf of the outputs: a tensor, a number, or None, which no file has."""
    if leaf is None:
        return None
    value = next(values)
    if not isinstance(leaf, torch.fx.Node):
        return leaf  # a number that does not depend on the inputs
    return value if isinstance(leaf.meta.get("val"), torch.Tensor) else value.item()
