"""``to_onnx``: translate, write, prove. A file appears only when all three succeeded."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from fxopt import args
from fxopt.capture import capture
from fxopt.complex_numbers import has_complex, without_complex
from fxopt.contracts import Contract
from fxopt.errors import ExportError, describe
from fxopt.export.dtypes import Runtime
from fxopt.export.files import ExternalData, OnnxFile, check_target
from fxopt.export.guards import GUARD_OUTPUT, has_guards
from fxopt.export.translate import translate
from fxopt.export.validate import ValidationReport, validate_file
from fxopt.freeze import frozen
from fxopt.graph_module import CapturedModule, graph_modules
from fxopt.ops import SELECT_MODE, UPDATE_BUFFER
from fxopt.quantized_ops import FAKE_QUANTIZE
from fxopt.training_ops import FAKE_QUANTIZE_BIAS, LEARNED_SCALE, NORM_BIAS

__all__ = ["DEFAULT_OPSET", "OPSETS", "to_onnx"]

OPSETS = range(18, 24)
"""Versions of the ONNX operator set that can be written."""
DEFAULT_OPSET = 20
"""The first version with ``Gelu``; ORT's fusions know all operators of it."""

_aten = torch.ops.aten
# operator: the argument that is true while it acts as in training
_TRAINING = {
    _aten.dropout.default: "train",
    _aten.feature_dropout.default: "train",
    _aten.alpha_dropout.default: "train",
    _aten.feature_alpha_dropout.default: "train",
    _aten.batch_norm.default: "training",
    _aten.rrelu.default: "training",
    UPDATE_BUFFER: "active",
    SELECT_MODE: "training",
}
_FAKE_QUANTIZERS = frozenset({FAKE_QUANTIZE, FAKE_QUANTIZE_BIAS, LEARNED_SCALE, NORM_BIAS})


def to_onnx(
    model: torch.nn.Module,
    path: str | os.PathLike[str] | None = None,
    *,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    opset: int = DEFAULT_OPSET,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    external_data: ExternalData = "auto",
    validate: bool = True,
    contract: Contract | None = None,
    metadata: Mapping[str, str] | None = None,
    guards: Literal["output", "none"] = "output",
    runtime: Runtime = "ort-cpu",
) -> OnnxFile:
    """Export a graph to ONNX and prove that ONNX Runtime computes the same.

    Args:
        model: A captured graph in eval mode; or any module, which is captured with ``example_inputs`` and exported as
            it is in evaluation.
        path: Where to write the file; None keeps the model in memory. Weights that do not fit into one file go to
            ``<path>.data`` beside it.
        example_inputs: Inputs to capture a plain module with, as for :func:`fxopt.capture`.
        dynamic_shapes: Dynamic sizes to capture a plain module with, as for :func:`fxopt.capture`.
        opset: Version of the ONNX operator set, 18 to 23.
        input_names: Names of the tensor inputs; those of the model's parameters if not given.
        output_names: Names of the outputs; those of the captured graph if not given.
        external_data: ``"auto"`` moves the weights to a second file above 2 GB, ``"always"`` and ``"never"`` decide.
        validate: Compare eager PyTorch with ORT on samples and sizes, with ORT's optimizer off and on.
        contract: What the file must keep; see :func:`fxopt.export.validate`.
        metadata: More entries for the model's ``metadata_props``.
        guards: What becomes of the guards of branches that were specialized: one more output ``guards_hold``, bool
            without dimensions, which is false where the other outputs are those of a side that the inputs do not ask
            for; or nothing.
        runtime: Whose kernels to write for. ORT on a CPU has next to none for bfloat16, so that for ``"ort-cpu"`` its
            operators are computed in float32 between casts; for ``"onnx"`` they are written as they are, for devices
            that have them, and proved on a copy with such casts. ONNX has bfloat16 convolutions from opset 22 on.

    Returns:
        The model with its path, and the validation report if there is one.

    Raises:
        ExportError: the graph is in train mode, or holds the quantizers of ``prepare-qat`` or something that ONNX
            cannot express, or the file cannot be written.
        NumericsError: ORT computes something else than the graph.
        CaptureError: a plain module cannot be captured.
    """
    started = time.perf_counter()
    if opset not in OPSETS:
        raise ExportError(f"opset {opset} cannot be written; wanted {OPSETS[0]} to {OPSETS[-1]}")
    if runtime not in get_args(Runtime):
        raise ExportError(f"runtime is {runtime!r}; wanted one of {', '.join(get_args(Runtime))}")
    target = None if path is None else check_target(path)
    gm = _as_captured(model, example_inputs, dynamic_shapes)
    _refuse_fake_quantizers(gm)
    evaluation = _for_evaluation(gm)
    _refuse_training(evaluation)
    evaluation = without_complex(evaluation) if has_complex(evaluation) else evaluation
    names = list(output_names) if output_names is not None else list(gm.output_names)
    guard_name = GUARD_OUTPUT if guards == "output" and has_guards(gm) else None
    ir_model = translate(
        evaluation,
        opset=opset,
        input_names=input_names,
        output_names=names,
        symbol_names=gm.symbol_names,
        guard_name=guard_name,
        runtime=runtime,
    )
    names += [guard_name] if guard_name else []
    ir_model.producer_version = _version()
    ir_model.metadata_props.update(_metadata(gm) | dict(metadata or {}))
    file = OnnxFile(ir_model, seconds=time.perf_counter() - started)

    def prove(written: Path | bytes) -> ValidationReport | None:
        return validate_file(written, gm, names=names, contract=contract) if validate else None

    return file.written(target, external_data, prove)


def _as_captured(model: torch.nn.Module, example_inputs: Any, dynamic_shapes: Any) -> CapturedModule:
    if isinstance(model, CapturedModule):
        if example_inputs is not None or dynamic_shapes is not None:
            raise ExportError("example_inputs and dynamic_shapes belong to a module that is not captured yet")
        return model
    if example_inputs is None and not isinstance(model, torch.export.ExportedProgram):
        raise ExportError(
            describe(
                f"a {type(model).__name__} is not a captured graph",
                try_="pass example_inputs=..., or capture it first: fxopt.capture(model, example_inputs)",
            )
        )
    gm = capture(model, example_inputs, dynamic_shapes=dynamic_shapes)
    return gm.eval() if gm.training and gm.modes != "train" else gm


def _refuse_fake_quantizers(gm: CapturedModule) -> None:
    """Raise ExportError if the graph is made for training with quantizers: its file would compute in floats."""
    for module in graph_modules(gm):
        for node in module.graph.nodes:
            if node.target in _FAKE_QUANTIZERS:
                raise ExportError(
                    describe(
                        "the graph rounds floats as it does in training with quantizers, and a file needs the integers",
                        node=f"{node.name} ({node.target})",
                        source=args.source_line(node) or None,
                        try_='fxopt.optimize(graph.eval(), ["convert-qat"]), and export the graph that it returns',
                    )
                )


def _for_evaluation(gm: CapturedModule) -> CapturedModule:
    """Return the graph without what only training computes: no file can hold a dropout, not even one that is unread."""
    selects = any(node.target is SELECT_MODE for module in graph_modules(gm) for node in module.graph.nodes)
    return frozen(gm) if selects and not gm.training else gm


def _refuse_training(gm: CapturedModule) -> None:
    """Raise ExportError if some operator acts as in training."""
    for module in graph_modules(gm):
        for node in module.graph.nodes:
            name = _TRAINING.get(node.target)
            if name is None or args.arg(node, name) is not True or _is_inert(node):
                continue
            if node.target is UPDATE_BUFFER and not gm.training:
                raise ExportError(
                    describe(
                        "the model writes to a buffer in evaluation too, and an ONNX file has no state",
                        buffer=str(args.arg(node, "buffer").target),
                        source=args.source_line(node) or "unknown",
                        try_="return the value as an output, and take it as an input",
                    )
                )
            raise ExportError(
                describe(
                    "the graph is in train mode, and an ONNX file only evaluates",
                    node=f"{node.name} ({node.target})",
                    source=args.source_line(node) or "unknown",
                    because=gm.modes_reason or None,
                    try_="call .eval() on the graph before the export"
                    if gm.modes != "train"
                    else "capture the model again after model.eval()",
                )
            )


def _is_inert(node: torch.fx.Node) -> bool:
    """Return whether an operator set to training still computes what it does in evaluation."""
    if node.target is _aten.batch_norm.default:
        return args.arg(node, "running_mean") is None  # it always takes the statistics of the batch
    return "dropout" in str(node.target) and args.arg(node, "p") == 0


def _metadata(gm: CapturedModule) -> dict[str, str]:
    report = gm.report
    steps = [] if report is None else [step.name for step in report.steps if step.changes]
    return {
        "fxopt.version": _version(),
        "fxopt.passes": ", ".join(steps),
        "fxopt.contract": "EXACT" if report is None else report.contract,
        "torch.version": str(torch.__version__),
    }


def _version() -> str:
    import fxopt

    return fxopt.__version__
