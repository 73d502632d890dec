"""Say why a model cannot be traced: from the errors of torch.export to the user's line and what to try."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

import torch
from torch._dynamo.exc import TorchDynamoException
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from fxopt.errors import CaptureError, describe

__all__ = ["asks_for_values", "explained", "user_location"]

_CORE = str(Path(__file__).parent)
_TORCH = str(Path(torch.__file__).parent)
_OPERATOR = re.compile(r"Higher Order Operator: (?:torch\.)?(?:ops\.higher_order\.)?(\w+)")


def asks_for_values(error: Exception) -> bool:
    """Return whether a trace failed because Python code decides on the value of a tensor or a dynamic size."""
    text = str(error)
    return (
        isinstance(error, GuardOnDataDependentSymNode | DataDependentOutputException)
        or "data-dependent" in text[:400]
        or "onstraints violated" in text
        or "specialized" in text[:600]
        or "Boolean value of Tensor with more than one value" in text
    )


def user_location(error: BaseException) -> str | None:
    """Return the user's line that raised ``error`` as ``net.py:23, in forward: y = x.foo()``, or None."""
    own = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((_CORE, _TORCH, "<")) and "python3" not in Path(frame.filename).parent.name
    ]
    if not own:
        return None
    frame = own[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}, in {frame.name}: {frame.line}"


def explained(error: BaseException) -> CaptureError:
    """Return what to tell of an error that torch.export raised: the user's line, the reason and what to try."""
    where = user_location(error)
    text = str(error)
    if isinstance(error, GuardOnDataDependentSymNode) or "data-dependent" in text[:400]:
        return CaptureError(
            describe(
                "the model's Python code branches on the value of a tensor, so that one trace cannot hold it",
                source=where,
                got=text.splitlines()[0][:300],
                try_="torch.where(condition, a, b) for a choice between values, "
                "or torch.cond(condition, f, g, operands)",
            )
        )
    if "onstraints violated" in text or "specialized" in text[:600]:
        return CaptureError(
            describe(
                "the model fixes a size that dynamic_shapes declares dynamic, or ties it to another one",
                got=_constraints(text),
                source=where,
                try_="leave that axis out of dynamic_shapes, or give it the range or relation named above",
            )
        )
    operator = _OPERATOR.search(text)
    if operator is not None and isinstance(error, TorchDynamoException):
        return CaptureError(
            describe(
                f"torch traces the function that {operator[1].removesuffix('_impl')} is given by itself, and cannot",
                got=_reason(text),
                source=where,
                try_="a Python loop over the items, which is captured; "
                "or a function that reads tensors only, no module and no flag",
            )
        )
    return CaptureError(
        describe(
            f"torch.export cannot trace the model: {type(error).__name__}",
            got=text.strip()[:1200] or "(no message)",
            source=where,
        )
    )


def _constraints(text: str) -> str:
    """Return what torch says of the dynamic sizes, without its advice on options that fxopt does not have."""
    told = text.partition("The error above occurred")[0]
    lines = [line.partition(" If you're using mark_dynamic")[0].strip() for line in told.splitlines()]
    return "\n".join(line for line in lines if line and "TORCH_LOGS" not in line)[:1200]


def _reason(text: str) -> str:
    """Return what torch says of a function that it cannot trace, without the trace and what is of use to torch only."""
    told, _, trace = text.partition("from user code")
    if "in noting" in trace:  # the watch on training flags, which torch's compiler stumbles over
        return "it reads a module, which may answer otherwise in training than in evaluation"
    lines = [line.strip() for line in told.splitlines()[1:]]
    return "\n".join(line for line in lines if line and "Developer debug" not in line and "http" not in line)[:600]
