"""A model with what proves it: the file, what it promises, and inputs with the outputs that it must give.

    bundle/
        manifest.json    inputs, outputs, contract, passes, versions, and size and SHA-256 of every other file
        model.onnx       and model.onnx.data, where the weights are too many for one file
        vectors.npz      inputs and outputs of the graph in eager PyTorch, on its examples and at other sizes

:func:`verify_bundle` checks all of it on another machine, which needs neither the model's code nor its graph.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fxopt.contracts import Contract
from fxopt.errors import ExportError, describe
from fxopt.export.kernel_noise import kernel_noise
from fxopt.export.report import ValidationReport
from fxopt.export.to_onnx import to_onnx
from fxopt.export.validate import contract_of
from fxopt.export.validation_cases import Case, cases, drowns, nearer_case
from fxopt.graph_module import CapturedModule
from fxopt.isolation import isolated
from fxopt.numerics import reference

__all__ = ["FORMAT", "MANIFEST", "MODEL", "VECTORS", "VERSION", "as_array", "as_tensor", "sha256", "write_bundle"]

FORMAT, VERSION = "fxopt-bundle", 1
MANIFEST, MODEL, VECTORS = "manifest.json", "model.onnx", "vectors.npz"


def write_bundle(
    gm: CapturedModule, folder: str | os.PathLike[str], *, inputs: Sequence[Any] | None = None, **options: Any
) -> Path:
    """Export a graph, prove the file, and write both with test vectors to a folder; return its path.

    Args:
        gm: A captured graph in eval mode.
        folder: A folder that does not exist yet, or is empty.
        inputs: Samples for the vectors; those of the graph, and one of other values, if not given.
        options: See :func:`fxopt.export.to_onnx`; the file is always validated.

    Raises:
        ExportError: the graph cannot be exported, or the folder is not empty or cannot be written.
        NumericsError: ORT computes something else than the graph.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ExportError(describe(f"{target} is there already", try_="a folder that does not exist yet"))
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=_parent(target)))
    try:
        file = to_onnx(gm, draft / MODEL, **{**options, "validate": True})
        notes, contract = ValidationReport(""), contract_of(gm)
        run = (case for case in cases(gm, inputs, True, notes) if case.outputs is not None)
        found = [proving for case in run if (proving := _proving(gm, case, contract, notes)) is not None]
        rows, arrays = _vectors(gm, found, contract)
        np.savez(draft / VECTORS, allow_pickle=False, **arrays)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "inputs": [_declared(value) for value in file.model.graph.inputs],
            "outputs": [_declared(value) for value in file.model.graph.outputs],
            "opset": file.opset,
            "contract": str(contract),
            "passes": [] if gm.report is None else [step.name for step in gm.report.steps if step.changes],
            "versions": versions(),
            "vectors": rows,
            "files": {
                each.name: {"bytes": each.stat().st_size, "sha256": sha256(each)} for each in sorted(draft.iterdir())
            },
        }
        (draft / MANIFEST).write_text(json.dumps(manifest, indent=1, allow_nan=False) + "\n")
        draft.chmod(0o755)
        if target.exists():
            target.rmdir()
        draft.rename(target)
    except OSError as error:
        raise ExportError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def _parent(target: Path) -> Path:
    if not target.parent.is_dir():
        raise ExportError(f"cannot write {target}: there is no folder {target.parent}")
    return target.parent


def _declared(value: Any) -> dict[str, Any]:
    shape = [] if value.shape is None else [size if isinstance(size, int) else str(size) for size in value.shape]
    return {"name": value.name, "dtype": value.dtype.name.lower(), "shape": shape}


def versions() -> dict[str, str]:
    """Return the versions of what a result depends on."""
    import onnx
    import onnxruntime

    import fxopt

    return {
        "fxopt": fxopt.__version__,
        "torch": str(torch.__version__),
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def _proving(gm: CapturedModule, case: Case, contract: Contract, notes: ValidationReport) -> Case | None:
    """Return a case whose outputs are the same wherever they are computed, as far as rounding goes."""
    if contract.kind != "ROUNDING" or not drowns(gm, case):
        return case
    return nearer_case(gm, case, notes)


def _vectors(
    gm: CapturedModule, found: Sequence[Case], contract: Contract
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray[Any, Any]]]:
    """Return what the manifest says of each vector, and the arrays of all."""
    rows: list[dict[str, Any]] = []
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for number, case in enumerate(found):
        given = [leaf for leaf in case.leaves if isinstance(leaf, torch.Tensor)]
        wanted = [_tensor(output) for _, output in case.wanted]
        for role, tensors in (("in", given), ("out", wanted)):
            arrays |= {f"{number}.{role}.{place}": as_array(tensor) for place, tensor in enumerate(tensors)}
        rows.append(
            {
                "label": case.label,
                "inputs": [str(tensor.dtype).removeprefix("torch.") for tensor in given],
                "outputs": [str(tensor.dtype).removeprefix("torch.") for tensor in wanted],
                "max_abs": _bounds(gm, case, contract),
            }
        )
    return rows, arrays


def _bounds(gm: CapturedModule, case: Case, contract: Contract) -> list[float | None]:
    """Return how far each output of ORT may be from the vector where rounding decides; None where a floor does."""
    if contract.kind != "ROUNDING":
        return [None for _ in case.wanted]
    assert case.outputs is not None
    with isolated(gm):
        noise = reference(gm, case.outputs, case.leaves).noise
    extra = kernel_noise(gm, case.leaves)
    return [(contract.factor + 1) * (noise[place] + extra[place]) for place, _ in case.wanted]


def _tensor(output: Any) -> torch.Tensor:
    return output.detach() if isinstance(output, torch.Tensor) else torch.tensor(output)


def as_array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """Return a tensor as numpy has it; bfloat16, which numpy lacks, as the bits."""
    tensor = tensor.detach().cpu().contiguous()
    return (tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor).numpy()


def as_tensor(array: np.ndarray[Any, Any], dtype: str) -> torch.Tensor:
    """Return what :func:`as_array` stored."""
    tensor = torch.from_numpy(array.copy())
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
