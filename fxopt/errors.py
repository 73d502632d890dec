"""Every error that fxopt raises on purpose.

FxoptError
├── CaptureError          the model or its example inputs cannot become a graph
│   └── ModeError         the graph cannot switch between training and evaluation
├── CalibrationError      calibration data do not fit the graph, or make it compute NaN
├── InputError            a captured graph was called with inputs it was not captured for
├── GuardError            inputs ask for a side of a branch that was cut off
├── PassError             a pass, or the list of passes, is wrong
│   ├── PassOrderError    a pass stands behind another that ended what it needs
│   ├── PreconditionError the graph is not in the state that a pass asks for
│   ├── FixedPointError   rules undo each other and never settle
│   ├── InvariantError    a pass left a malformed graph: a bug of the pass
│   └── ContractError     a pass changed the numbers by more than it declares
├── ExportError           the graph cannot become an ONNX file
├── NumericsError         the exported file computes something else than the graph
└── FileFormatError       a saved graph cannot be read

Wrong *types* of arguments raise ``TypeError`` and wrong option values ``ValueError``, as Python itself does.
"""

from __future__ import annotations

__all__ = [
    "CalibrationError",
    "CaptureError",
    "ContractError",
    "ExportError",
    "FileFormatError",
    "FixedPointError",
    "FxoptError",
    "GuardError",
    "InputError",
    "InvariantError",
    "ModeError",
    "NumericsError",
    "PassError",
    "PassOrderError",
    "PreconditionError",
    "describe",
]


class FxoptError(Exception):
    """Root of all errors that fxopt raises on purpose."""


class CaptureError(FxoptError):
    """The model or its example inputs cannot become a graph."""


class ModeError(CaptureError):
    """The graph was captured in one mode and cannot be switched to the other."""


class CalibrationError(FxoptError):
    """Calibration data do not fit the graph, or the graph computes NaN or infinity from them."""


class InputError(FxoptError):
    """A captured graph was called with inputs that it was not captured for."""


class GuardError(FxoptError):
    """A graph specialized to one side of a branch was called with inputs that ask for the other."""


class PassError(FxoptError):
    """A pass, or the list of passes, is wrong."""


class PassOrderError(PassError):
    """A pass stands behind another one that ended what it needs."""


class PreconditionError(PassError):
    """The graph is not in the state that a pass asks for."""


class FixedPointError(PassError):
    """Rules undo each other, so that repeating them never settles."""


class InvariantError(PassError):
    """A pass left a malformed graph: a bug of the pass, not of the model."""


class ContractError(PassError):
    """A pass changed the numbers by more than its contract allows."""


class ExportError(FxoptError):
    """The graph cannot become an ONNX file."""


class NumericsError(FxoptError):
    """The exported file computes something else than the graph."""


class FileFormatError(FxoptError):
    """A saved graph cannot be read."""


class BundleError(FxoptError):
    """A bundle is damaged, or its model computes something else than where it was made."""


def describe(headline: str, **rows: object) -> str:
    """Return the text of an error: a headline, then one indented row for each thing worth knowing.

    Args:
        headline: What went wrong, in one line.
        rows: Label and text of each row, in order; a row that is ``None`` is left out. A trailing underscore of a
            label is dropped, so that ``try_=`` can be written. Underscores inside a label become blanks.
    """
    shown = {label.rstrip("_").replace("_", " "): str(text) for label, text in rows.items() if text is not None}
    width = max((len(label) for label in shown), default=0)
    lines = [headline]
    for label, text in shown.items():
        first, *rest = text.splitlines() or [""]
        lines.append(f"  {label:<{width}}  {first}")
        lines.extend(f"  {'':<{width}}  {line}" for line in rest)
    return "\n".join(lines)
