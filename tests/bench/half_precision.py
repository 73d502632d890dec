"""Trained nets and architectures in float16 and bfloat16, beside onnxconverter-common: error, size, casts, islands.

    python -m tests.bench half_precision [--models resnet50,llama]

The peers (``pip install onnxconverter-common``; ONNX Runtime's own is ``onnxruntime.transformers.float16``) convert the
float32 file that fxopt exports, inputs and outputs kept in float32 by all. ORT on a CPU would compute each of these
files in float32, so errors and scores are of the files in emulation: every operator of a file that works on half
precision is computed in float32 and rounded (``fxopt.export.half_emulation``). The reference is eager PyTorch in
float64. Casts are those of the file; ``float32`` is the share of the operators on floats that the file computes in it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from rich.console import Console
from torch.utils import _pytree as pytree

import fxopt
from fxopt import numerics, passes
from fxopt.export import Session, to_onnx
from fxopt.export.files import load_model, save_model
from fxopt.export.half_emulation import emulated
from tests.bench.quantization_subjects import TRAINED, Subject, random_subject, rows, subject
from tests.bench.zoo_table import one_thread, write_row

HEADER = ("net", "tool", "score", "SQNR dB", "MiB", "casts", "float32", "seconds", "why")
RANDOM = ("resnet50", "mobilenet_v3_large", "vit_b_16", "bert", "llama")
ROWS = 16  # of the held-out inputs, that errors are measured on
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclasses.dataclass
class File:
    """A file that a tool wrote, and what it has to say of it."""

    path: Path
    seconds: float
    why: str = ""


def fxopt_half(dtype: torch.dtype, net: Subject, path: Path, fp32: Path) -> str:
    """Cast with fxopt; return the reasons of what stayed in float32."""
    gm = fxopt.optimize(
        net.model,
        [*passes.DEFAULT, passes.CastHalf(dtype=dtype)],
        example_inputs=net.example,
        dynamic_shapes=net.dynamic_shapes,
        calibration=net.batches,
    )
    to_onnx(gm, path, runtime="onnx", opset=22)
    assert gm.report is not None
    return " / ".join(line for step in gm.report.steps for line in step.notes)[:300]


def converted(peer: str, fp32: Path, path: Path) -> None:
    """Convert a float32 file with one of the peers, inputs and outputs kept."""
    module = {"onnxconverter-common": "onnxconverter_common", "ORT transformers.float16": "onnxruntime.transformers"}
    float16 = importlib.import_module(f"{module[peer]}.float16")
    onnx.save(float16.convert_float_to_float16(onnx.load(fp32), keep_io_types=True), path)


def peer_half(peer: str, net: Subject, path: Path, fp32: Path) -> str:
    """Convert with one of the peers, which give no reasons."""
    converted(peer, fp32, path)
    return ""


TOOLS: dict[str, Callable[[Subject, Path, Path], str]] = {
    "onnxconverter-common": functools.partial(peer_half, "onnxconverter-common"),
    "ORT transformers.float16": functools.partial(peer_half, "ORT transformers.float16"),
    "fxopt float16": functools.partial(fxopt_half, torch.float16),
    "fxopt bfloat16": functools.partial(fxopt_half, torch.bfloat16),
}


def half_session(path: Path) -> Session:
    """Return a session that rounds as a device with half precision does."""
    with tempfile.TemporaryDirectory() as folder:
        return Session(save_model(emulated(path), Path(folder) / "emulated.onnx"), optimization="none")


def shares(path: Path) -> tuple[int, float]:
    """Return the number of casts of a file, and the share of its other operators on floats that yield float32."""
    model = load_model(path)
    if any(value.dtype is None for node in model.graph.all_nodes() for value in node.outputs):
        ir.passes.common.ShapeInferencePass()(model)
    nodes = list(model.graph.all_nodes())
    casts = sum(node.op_type == "Cast" for node in nodes)
    floats = [node.outputs[0].dtype for node in nodes if node.op_type not in ("Cast", "Constant")]
    counted = [dtype for dtype in floats if dtype in _FLOATS]
    return casts, sum(dtype is ir.DataType.FLOAT for dtype in counted) / max(1, len(counted))


def sqnr_db(session: Session, net: Subject, precise: torch.Tensor) -> float:
    """Return the signal to noise of the main output on the held-out inputs against float64, in dB."""
    inputs = rows(net.held_out, 0, ROWS)
    got = net.main(session.run(inputs), inputs)
    return numerics.measure(precise, got).sqnr_db


def precise_output(net: Subject) -> torch.Tensor:
    """Return the main output of the model in float64."""
    inputs = rows(net.held_out, 0, ROWS)
    model = net.model.double()
    with torch.no_grad():
        result = model(*(tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs))
    net.model.float()
    return net.main(tuple(leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)), inputs)


def row(name: str, net: Subject, tool: str, fp32: Path, precise: torch.Tensor) -> tuple[str, ...]:
    """Return one row of the table; a tool or a file that fails has the error in it."""
    path = fp32.with_name(f"{tool.replace(' ', '_')}.onnx")
    started = time.perf_counter()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            why = TOOLS[tool](net, path, fp32)
        seconds = time.perf_counter() - started
        clamped = sum("truncated" in str(warning.message) for warning in caught)
        why = why or (f"{clamped} weights clamped" if clamped else "")
        if "bfloat16" not in tool:
            Session(path)  # what ORT refuses is no file
        session = half_session(path)
        score = "" if net.score is None else f"{net.score(lambda *inputs: session.run(inputs)):.3f}"
        ratio = sqnr_db(session, net, precise)
        casts, wide = shares(path)
    except Exception as error:
        reason = " ".join(str(error).split())[:160].replace("|", "/")
        return (name, tool, f"FAILS: {type(error).__name__}: {reason}", *("",) * (len(HEADER) - 3))
    mib = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")) / 2**20
    shown = "NaN or inf" if math.isinf(ratio) and ratio < 0 else f"{ratio:.1f}"
    return (name, tool, score, shown, f"{mib:.1f}", str(casts), f"{wide:.0%}", f"{seconds:.0f}", why.replace("|", "/"))


def measured(console: Console, name: str) -> None:
    """Print the rows of one net."""
    net = subject(name) if name in TRAINED else random_subject(name)
    precise = precise_output(net)
    with tempfile.TemporaryDirectory() as folder:
        fp32 = Path(folder) / "fp32.onnx"
        gm = fxopt.capture(net.model, net.example, dynamic_shapes=net.dynamic_shapes)
        to_onnx(fxopt.optimize(gm, passes.DEFAULT), fp32)
        plain = Session(fp32)
        score = "" if net.score is None else f"{net.score(lambda *inputs: plain.run(inputs)):.3f}"
        mib = fp32.stat().st_size / 2**20
        write_row(console, (name, "float32", score, f"{sqnr_db(plain, net, precise):.1f}", f"{mib:.1f}", *("",) * 4))
        for tool in TOOLS:
            if tool != "onnxconverter-common" or importlib.util.find_spec("onnxconverter_common") is not None:
                write_row(console, row(name, net, tool, fp32, precise))


def main(console: Console | None = None, *, quick: bool = False, models: Sequence[str] = (), **unused: Any) -> None:
    """Print the table row by row; ``quick`` leaves the random architectures out."""
    console = console or Console()
    write_row(console, HEADER)
    write_row(console, ("---",) * len(HEADER))
    with one_thread():
        for name in models or (*TRAINED, *(() if quick else RANDOM)):
            measured(console, name)
