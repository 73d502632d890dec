"""From a captured graph to an ONNX file, and the proof that ONNX Runtime computes the same."""

from __future__ import annotations

from fxopt.export.coverage import CoverageReport, coverage
from fxopt.export.emitter import Emitter, Value
from fxopt.export.files import OnnxFile
from fxopt.export.layer_costs import layer_costs
from fxopt.export.registry import NotTranslated, translates
from fxopt.export.report import OutputResult, ValidationReport
from fxopt.export.session import Session, optimized_model
from fxopt.export.to_onnx import to_onnx
from fxopt.export.translate import translate
from fxopt.export.validate import validate
from fxopt.export.width_costs import width_costs

__all__ = [
    "CoverageReport",
    "Emitter",
    "NotTranslated",
    "OnnxFile",
    "OutputResult",
    "Session",
    "ValidationReport",
    "Value",
    "coverage",
    "layer_costs",
    "optimized_model",
    "to_onnx",
    "translate",
    "translates",
    "validate",
    "width_costs",
]
