"""Check a bundle: nothing is damaged, and ONNX Runtime here computes what it computed where the bundle was made."""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fxopt.contracts import Contract
from fxopt.errors import BundleError, ExportError, describe
from fxopt.export.bundle import FORMAT, MANIFEST, MODEL, VECTORS, VERSION, as_tensor, sha256, versions
from fxopt.export.report import OutputResult, ValidationReport
from fxopt.export.session import Optimization, Session
from fxopt.numerics import measure, violation

__all__ = ["VerifiedBundle", "verify_bundle"]

_LEVELS: tuple[Optimization, ...] = ("none", "all")
_FIELDS = {
    "inputs": list,
    "outputs": list,
    "contract": str,
    "passes": list,
    "versions": dict,
    "vectors": list,
    "files": dict,
}


@dataclasses.dataclass(frozen=True)
class VerifiedBundle:
    """A bundle that is as it was made, and a model that still computes the same.

    Attributes:
        folder: Where it is.
        validation: The errors of each output on each vector.
        differences: Versions that are others here, as ``{"torch": ("2.13.0", "2.14.1")}``: there, here.
    """

    folder: Path
    validation: ValidationReport
    differences: Mapping[str, tuple[str, str]]

    def __str__(self) -> str:
        lines = [f"{self.folder} is intact, and ONNX Runtime agrees: {self.validation}"]
        lines += [f"  {name} {there} there, {here} here" for name, (there, here) in self.differences.items()]
        return "\n".join(lines)


def verify_bundle(folder: str | os.PathLike[str]) -> VerifiedBundle:
    """Check every file of a bundle, its interface, and its vectors in ORT with its optimizer off and on.

    Raises:
        BundleError: something is missing, damaged, or computes something else; the message names it.
    """
    folder = Path(folder)
    manifest = _manifest(folder)
    _check_files(folder, manifest["files"])
    contract = _contract(manifest["contract"])
    vectors = _vectors(folder, manifest["vectors"])
    report = ValidationReport(manifest["contract"])
    for level in _LEVELS:
        try:
            session = Session(folder / MODEL, optimization=level)
        except ExportError as error:
            raise BundleError(describe(f"{MODEL} cannot be loaded", because=str(error))) from error
        _check_interface(session, manifest)
        for row, (given, wanted) in zip(manifest["vectors"], vectors, strict=True):
            _compare(session, level, row, given, wanted, contract, report)
    here = versions()
    differences = {
        name: (str(there), here[name]) for name, there in manifest["versions"].items() if here.get(name, there) != there
    }
    return VerifiedBundle(folder, report, differences)


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not folder.is_dir():
        raise BundleError(f"there is no folder {folder}")
    if not path.is_file():
        raise BundleError(describe(f"{MANIFEST} is missing", got=", ".join(sorted(os.listdir(folder))) or "(nothing)"))
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise BundleError(describe(f"{MANIFEST} is damaged: it is no JSON", because=str(error))) from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise BundleError(f"{MANIFEST} is not that of a bundle")
    if found.get("version") != VERSION:
        raise BundleError(
            describe(f"{MANIFEST} has another version", got=found.get("version"), wanted=VERSION, try_="a newer fxopt")
        )
    for name, kind in _FIELDS.items():
        if not isinstance(found.get(name), kind):
            raise BundleError(f"{MANIFEST} is damaged: {name!r} is missing or is no {kind.__name__}")
    return found


def _check_files(folder: Path, files: Mapping[str, Any]) -> None:
    for name in (MODEL, VECTORS):
        if name not in files:
            raise BundleError(f"{MANIFEST} is damaged: it does not list {name}")
    for name, recorded in files.items():
        path = folder / name
        if path.name != name or not isinstance(recorded, dict):
            raise BundleError(f"{MANIFEST} is damaged: {name!r} is no file of the bundle")
        if not path.is_file():
            raise BundleError(f"{name} is missing")
        size = path.stat().st_size
        if size != recorded.get("bytes"):
            raise BundleError(
                describe(
                    f"{name} is damaged: its size is another",
                    got=f"{size} bytes",
                    wanted=f"{recorded.get('bytes')} bytes",
                )
            )
        if sha256(path) != recorded.get("sha256"):
            raise BundleError(f"{name} is damaged: its SHA-256 is another than when it was written")


def _contract(text: str) -> Contract:
    try:
        return Contract.parse(text)
    except ValueError as error:
        raise BundleError(f"{MANIFEST} is damaged: {error}") from error


def _vectors(folder: Path, rows: Sequence[Mapping[str, Any]]) -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    if not rows:
        raise BundleError(f"{MANIFEST} is damaged: it has no vectors, so that nothing can be proved")
    for row in rows:
        if not isinstance(row, dict) or len(row.get("max_abs", ())) != len(row.get("outputs", ())):
            raise BundleError(f"{MANIFEST} is damaged: a vector has no bound for each output")
    try:
        with np.load(folder / VECTORS) as arrays:
            return [
                (
                    [as_tensor(arrays[f"{number}.in.{i}"], dtype) for i, dtype in enumerate(row["inputs"])],
                    [as_tensor(arrays[f"{number}.out.{i}"], dtype) for i, dtype in enumerate(row["outputs"])],
                )
                for number, row in enumerate(rows)
            ]
    except (KeyError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise BundleError(describe(f"{VECTORS} does not fit {MANIFEST}", because=str(error))) from error


def _check_interface(session: Session, manifest: Mapping[str, Any]) -> None:
    for kind, got in (("inputs", session.ort.get_inputs()), ("outputs", session.ort.get_outputs())):
        wanted = [_text(one["name"], one["dtype"], one["shape"]) for one in manifest[kind]]
        have = [_text(one.name, one.type.removeprefix("tensor(").removesuffix(")"), one.shape) for one in got]
        if have != wanted:
            raise BundleError(
                describe(
                    f"{MODEL} has other {kind} than {MANIFEST} says", got="; ".join(have), wanted="; ".join(wanted)
                )
            )


def _text(name: str, dtype: str, shape: Sequence[Any]) -> str:
    return f"{name}: {dtype}[{', '.join(map(str, shape))}]"


def _compare(
    session: Session,
    level: Optimization,
    row: Mapping[str, Any],
    given: list[torch.Tensor],
    wanted: list[torch.Tensor],
    contract: Contract,
    report: ValidationReport,
) -> None:
    label = str(row.get("label"))
    try:
        outputs = session.run(given)
    except ExportError as error:
        raise BundleError(describe(f"{MODEL} cannot run vector {label!r}", because=str(error))) from error
    for name, want, got, bound in zip(session.output_names, wanted, outputs, row["max_abs"], strict=False):
        noise = 0.0 if bound is None else float(bound) / contract.factor
        problem = violation(contract, want, got, want, noise)
        if problem is not None:
            raise BundleError(
                describe(
                    f"{MODEL} computes something else than when the bundle was made: "
                    f"output {name!r}, vector {label!r}, ORT optimizer {level!r}",
                    found=problem,
                )
            )
        report.results.append(OutputResult(name, label, level, measure(want, got)))
