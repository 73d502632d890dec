"""fxopt: make a PyTorch model small and fast, and prove that it is still right."""

from fxopt.args import arg, module_path, source_line, tensor_arg
from fxopt.bisect import BisectResult, bisect
from fxopt.capture import capture
from fxopt.changes import Change, Skip
from fxopt.contracts import Contract
from fxopt.control_flow import CaptureWarning
from fxopt.dimensions import Dimension, Sample
from fxopt.errors import (
    BundleError,
    CalibrationError,
    CaptureError,
    ContractError,
    ExportError,
    FileFormatError,
    FixedPointError,
    FxoptError,
    GuardError,
    InputError,
    InvariantError,
    ModeError,
    NumericsError,
    PassError,
    PassOrderError,
    PreconditionError,
)
from fxopt.graph_module import CapturedModule, InputSpec, Provenance
from fxopt.graph_text import graph_text
from fxopt.manager import PassManager
from fxopt.networkx_graph import to_networkx
from fxopt.optimize import optimize
from fxopt.pass_base import FixedPoint, Pass, PassResult
from fxopt.report import Report
from fxopt.rewriter import Rewriter
from fxopt.serialize import load, save
from fxopt.split_by_module import split_by_module
from fxopt.view import view

__version__ = "0.1.0"

__all__ = [
    "BisectResult",
    "BundleError",
    "CalibrationError",
    "CaptureError",
    "CaptureWarning",
    "CapturedModule",
    "Change",
    "Contract",
    "ContractError",
    "Dimension",
    "ExportError",
    "FileFormatError",
    "FixedPoint",
    "FixedPointError",
    "FxoptError",
    "GuardError",
    "InputError",
    "InputSpec",
    "InvariantError",
    "ModeError",
    "NumericsError",
    "Pass",
    "PassError",
    "PassManager",
    "PassOrderError",
    "PassResult",
    "PreconditionError",
    "Provenance",
    "Report",
    "Rewriter",
    "Sample",
    "Skip",
    "arg",
    "bisect",
    "capture",
    "graph_text",
    "load",
    "module_path",
    "optimize",
    "save",
    "source_line",
    "split_by_module",
    "tensor_arg",
    "to_networkx",
    "view",
]
