"""From a captured graph to an ONNX file, and the proof that ONNX Runtime computes the same."""

from __future__ import annotations

from fxopt.export.bench import BenchReport, bench
from fxopt.export.bisect_ort import OrtBisectResult, bisect_ort
from fxopt.export.blame import blame
from fxopt.export.blame_report import BlameReport, NodeError
from fxopt.export.bundle import write_bundle
from fxopt.export.coverage import CoverageReport, coverage
from fxopt.export.emitter import Emitter, Value
from fxopt.export.error_split import ErrorSplit, split_error
from fxopt.export.files import OnnxFile
from fxopt.export.layer_costs import layer_costs
from fxopt.export.ledger import ledger
from fxopt.export.ledger_report import Ledger, LedgerEntry
from fxopt.export.node_times import NodeTimes, node_times
from fxopt.export.reduce_ort import OrtRepro, reduce_ort
from fxopt.export.registry import NotTranslated, translates
from fxopt.export.report import OutputResult, ValidationReport
from fxopt.export.session import Session, optimized_model
from fxopt.export.to_onnx import to_onnx
from fxopt.export.translate import translate
from fxopt.export.validate import validate
from fxopt.export.verify_bundle import VerifiedBundle, verify_bundle
from fxopt.export.width_costs import width_costs

__all__ = [
    "BenchReport",
    "BlameReport",
    "CoverageReport",
    "Emitter",
    "ErrorSplit",
    "Ledger",
    "LedgerEntry",
    "NodeError",
    "NodeTimes",
    "NotTranslated",
    "OnnxFile",
    "OrtBisectResult",
    "OrtRepro",
    "OutputResult",
    "Session",
    "ValidationReport",
    "Value",
    "VerifiedBundle",
    "bench",
    "bisect_ort",
    "blame",
    "coverage",
    "layer_costs",
    "ledger",
    "node_times",
    "optimized_model",
    "reduce_ort",
    "split_error",
    "to_onnx",
    "translate",
    "translates",
    "validate",
    "verify_bundle",
    "width_costs",
    "write_bundle",
]
