"""Say why a model cannot be traced: from the errors of torch.export to the user's line and what to try."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from fxopt.errors import CaptureError, describe
from fxopt.size_guards import told_guards

__all__ = ["asks_for_values", "explained", "refuses_sizes", "user_location"]

_CORE = str(Path(__file__).parent)
_TORCH = str(Path(torch.__file__).parent)
_OPERATOR = re.compile(r"Higher Order Operator: (?:torch\.)?(?:ops\.higher_order\.)?(\w+)")


def asks_for_values(error: Exception) -> bool:
    """Return whether a trace failed because Python code decides on the value of a tensor or a dynamic size."""
    text = str(error)
    return (
        isinstance(error, GuardOnDataDependentSymNode | DataDependentOutputException)
        or "data-dependent" in text[:400]
        or refuses_sizes(error)
        or "Boolean value of Tensor with more than one value" in text
    )


def refuses_sizes(error: BaseException) -> bool:
    """Return whether a trace failed because the model does not take all sizes that were declared dynamic."""
    text = str(error)
    return "onstraints violated" in text or "specialized" in text[:600]


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


def explained(error: BaseException, sizes: str | None = None) -> CaptureError:
    """Return what to tell of an error that torch.export raised: the user's line, the reason and what to try.

    Args:
        error: What torch.export raised.
        sizes: Dynamic sizes that the model does take, in words, if they are known.
    """
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
    if refuses_sizes(error):
        return CaptureError(
            describe(
                "the model fixes a size that dynamic_shapes declares dynamic, or ties it to another one",
                got=_constraints(text),
                source=where,
                try_=sizes or "leave that axis out of dynamic_shapes; no range of it was found that can be traced",
            )
        )
    operator = _OPERATOR.search(text)
    if operator is not None and _is_of_the_compiler(error):
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


def _is_of_the_compiler(error: BaseException) -> bool:
    from torch._dynamo.exc import TorchDynamoException  # seconds to load, which only a trace has taken already

    return isinstance(error, TorchDynamoException)


def _constraints(text: str) -> str:
    """Return what torch says of the dynamic sizes, without its advice: on options that fxopt does not have, untried."""
    told = text.partition("The error above occurred")[0].partition("Suggested fixes:")[0]
    guards = [f"{name} = {source} must be such that {guard}" for name, source, guard in told_guards(told)]
    lines = [line.partition(" If you're using mark_dynamic")[0].strip() for line in told.splitlines()]
    others = [line for line in lines if line and "TORCH_LOGS" not in line and not any(told_guards(line))]
    return "\n".join(others + guards)[:1200]


def _reason(text: str) -> str:
    """Return what torch says of a function that it cannot trace, without the trace and what is of use to torch only."""
    told, _, trace = text.partition("from user code")
    if "in noting" in trace:  # the watch on training flags, which torch's compiler stumbles over
        return "it reads a module, which may answer otherwise in training than in evaluation"
    lines = [line.strip() for line in told.splitlines()[1:]]
    return "\n".join(line for line in lines if line and "Developer debug" not in line and "http" not in line)[:600]
