"""The types of inner values, where a file leaves them out."""

from __future__ import annotations

import logging

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

__all__ = ["infer_types"]


def infer_types(model: ir.Model) -> bool:
    """Add the types of inner values where ONNX can tell them, in place; return whether it accepts the model."""
    logger, listener = logging.getLogger(ShapeInferencePass.__module__), _Listener()
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(listener)
    try:
        ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
    finally:
        logger.propagate = propagate
        logger.removeHandler(listener)
    for node in model.graph.all_nodes():
        _forget_wrong_types(node)
    return not listener.failed


def _forget_wrong_types(node: ir.Node) -> None:
    """Undo what the pass takes for tensors though they are sequences of them."""
    if "Sequence" not in node.op_type or node.domain not in ("", "ai.onnx"):
        return
    formal = onnx.defs.get_schema(node.op_type, domain="").outputs
    for value, wanted in zip(node.outputs, formal, strict=False):
        if not any(str(kind).startswith("tensor(") for kind in wanted.types):
            value.type, value.shape = ir.SequenceType(value.type or ir.TensorType(ir.DataType.UNDEFINED)), None


class _Listener(logging.Handler):
    """Hears of a failure that the pass of onnx_ir tells the log alone, and keeps it out of the user's log."""

    failed = False

    def emit(self, record: logging.LogRecord) -> None:
        """Note a failed inference."""
        self.failed = self.failed or record.exc_info is not None
