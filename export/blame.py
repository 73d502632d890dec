"""Where does a model leave the path: every value of ONNX Runtime against the right one, node by node.

What is right is what PyTorch computes in the graph that a file was exported from, or what ORT computes, its optimizer
off, in another version of the file. Beside each right value, the part of the model that computes the same runs in ORT
twice: on the right values before it, which gives the *local* error, and on what ORT itself computed before it, which
gives the *total* one. What is not local was inherited. Only values that are still to be read are alive.

A part is what lies between values that have a name in both: one operator of ATen in a file as it was exported, one or
several in the graph that ORT made of it, where a fused kernel answers for all of them.
"""

from __future__ import annotations

import os
from typing import Any

import onnx_ir as ir

from fxopt.contracts import Contract
from fxopt.errors import ExportError, describe
from fxopt.export.blame_file import compare_with_file, named_inputs
from fxopt.export.blame_graph import compare_with_graph
from fxopt.export.blame_report import BlameReport
from fxopt.export.coverage_run import drawn_inputs
from fxopt.export.files import OnnxFile, load_model, loadable
from fxopt.export.session import Optimization, Session, optimized_model
from fxopt.graph_module import CapturedModule

__all__ = ["blame"]

Model = OnnxFile | str | os.PathLike[str] | bytes


def blame(
    model: Model,
    reference: CapturedModule | Model | None = None,
    inputs: Any = None,
    *,
    optimization: Optimization = "none",
    contract: Contract | None = None,
) -> BlameReport:
    """Compare every value of a model that what it should be has too.

    Args:
        model: The ONNX model, whoever made it.
        reference: What is right. The graph that ``model`` was exported from, in eval mode; it may have been changed
            since. Or another version of the model, as the one in float32, whose values have the same names. Or None:
            the model itself, and what ORT's optimizer makes of it is looked at.
        inputs: A sample; the first of the graph if not given, and for a file numbers drawn as
            :func:`fxopt.export.coverage` does.
        optimization: ``"none"`` looks at the operators of the file, other levels at the kernels that ORT fuses them to
            on that level ("all" only adds layouts to "extended", and is taken for it).
        contract: What each value must keep on right inputs: ROUNDING, or ``Contract.lossy("sqnr_db", 20)``. If not
            given, ROUNDING; but where the model is quantized and the reference is not, nothing is judged.

    Returns:
        The errors of each value, and which nodes compute something else than they should on inputs that are right.

    Raises:
        ExportError: ORT refuses one of them, they have no value in common, or take other inputs; or there is neither a
            reference nor an optimization.
        InputError: the inputs do not fit.
    """
    if reference is None and optimization == "none":
        raise ExportError(
            describe("a file as it stands and itself are the same", try_='optimization="extended", or a reference')
        )
    whole = _read(model, optimization)
    if isinstance(reference, CapturedModule):
        quantized = any("quantize" in str(node.target) for node in reference.graph.nodes if node.op == "call_function")
        kept = contract or (Contract.ROUNDING if quantized or not _is_quantized(whole) else None)
        found = compare_with_graph(whole, reference, inputs, kept)
    else:
        other = load_model(model if reference is None else reference)
        kept = contract or (Contract.ROUNDING if _is_quantized(other) or not _is_quantized(whole) else None)
        session = Session(loadable(model if reference is None else reference), optimization="none")
        named = drawn_inputs(session) if inputs is None else named_inputs(inputs, session.input_names)
        found = compare_with_file(whole, other, named, kept)
    return BlameReport(tuple(found), optimization, "" if kept is None else str(kept))


def _read(model: Model, optimization: Optimization) -> ir.Model:
    if optimization == "none":
        return load_model(model)
    return optimized_model(loadable(model), optimization="extended" if optimization == "all" else optimization)


def _is_quantized(model: ir.Model) -> bool:
    """Return whether a model computes on integers that stand for real numbers, or has such weights."""
    return any(
        "Quantize" in node.op_type
        or node.op_type.startswith("QLinear")
        or "Integer" in node.op_type
        or "NBits" in node.op_type
        for node in ir.traversal.RecursiveGraphIterator(model.graph)
    )
