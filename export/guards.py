"""The output of an ONNX file that says whether the guards of its graph hold."""

from __future__ import annotations

from typing import Any

import torch

from fxopt import args
from fxopt.errors import NumericsError, describe
from fxopt.export.session import Session
from fxopt.graph_module import CapturedModule
from fxopt.ops import GUARD

__all__ = ["GUARD_OUTPUT", "check_guards", "has_guards"]

GUARD_OUTPUT = "guards_hold"


def has_guards(gm: CapturedModule) -> bool:
    """Return whether a graph has guards."""
    return any(node.target is GUARD for node in gm.graph.nodes)


def check_guards(gm: CapturedModule, session: Session, label: str, got: torch.Tensor, *, wanted: bool) -> None:
    """Check what a file says of its guards.

    Raises:
        NumericsError: it says something else than the graph does.
    """
    if bool(got) is wanted:
        return
    guards: list[Any] = [node for node in gm.graph.nodes if node.target is GUARD]
    raise NumericsError(
        describe(
            f"output {GUARD_OUTPUT!r} is {str(bool(got)).lower()} on {label}, where the graph's guards "
            f"{'hold' if wanted else 'do not hold'}",
            source="; ".join(filter(None, map(args.source_line, guards))) or None,
            wanted=str(wanted).lower(),
        )
    )
