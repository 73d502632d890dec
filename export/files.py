"""An ONNX model in memory and on disk. Files are written beside their place, and moved there when they are complete."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import onnx
import onnx_ir as ir
import torch

from fxopt.errors import ExportError, describe

if TYPE_CHECKING:
    from fxopt.export.session import Session
    from fxopt.export.validate import ValidationReport

__all__ = ["ExternalData", "OnnxFile", "check_target", "file_bytes", "load_model", "loadable", "save_model"]

ExternalData = Literal["auto", "always", "never"]
_LARGEST_FILE = 2**31 - 2**24  # protobuf's limit of 2 GiB, with room for the graph itself
_SMALLEST_EXTERNAL = 1024  # bytes; smaller tensors stay in the model


@dataclasses.dataclass(frozen=True)
class OnnxFile:
    """An exported model.

    Attributes:
        model: The ONNX model.
        path: Where it was written, if it was.
        validation: What the comparison with ORT found, if it was made.
        seconds: Time of the export without writing and validation.
    """

    model: ir.Model
    path: Path | None = None
    validation: ValidationReport | None = None
    seconds: float = 0.0

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs, in order."""
        return tuple(str(value.name) for value in self.model.graph.inputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs, in order."""
        return tuple(str(value.name) for value in self.model.graph.outputs)

    @property
    def opset(self) -> int:
        """Version of the ONNX operator set."""
        return self.model.opset_imports[""]

    @property
    def parameter_bytes(self) -> int:
        """Bytes of all weights and constants."""
        return sum(
            value.const_value.nbytes
            for value in self.model.graph.initializers.values()
            if value.const_value is not None
        )

    def to_bytes(self) -> bytes:
        """Return the model as one protobuf.

        Raises:
            ExportError: it is larger than protobuf allows.
        """
        if self.parameter_bytes > _LARGEST_FILE:
            raise ExportError(
                f"{self.parameter_bytes / 2**30:.1f} GiB of weights do not fit into one protobuf; write it to a file"
            )
        serialized: bytes = ir.to_proto(self.model).SerializeToString()
        return serialized

    def session(self, **options: Any) -> Session:
        """Return an ORT session of the model; options as for :class:`fxopt.export.Session`."""
        from fxopt.export.session import Session

        return Session(loadable(self), **options)

    def save(self, path: str | os.PathLike[str], *, external_data: ExternalData = "auto") -> OnnxFile:
        """Write the model to ``path``, all or nothing, and return the file.

        Raises:
            ExportError: the file cannot be written.
        """
        return self.written(check_target(path), external_data, lambda written: self.validation)

    def written(
        self, target: Path | None, external_data: ExternalData, prove: Callable[[Path | bytes], ValidationReport | None]
    ) -> OnnxFile:
        """Write the model, let ``prove`` look at what was written, and put it in place only if that does not raise."""
        if target is None:
            return dataclasses.replace(self, validation=prove(self.to_bytes()))
        with _writing(target) as folder:
            draft = folder / target.name
            self._write(draft, external_data)
            report = prove(draft)
            _move_all(folder, target.parent)
        return dataclasses.replace(self, path=target, validation=report)

    def _write(self, draft: Path, external_data: ExternalData) -> None:
        if external_data == "never" or (external_data == "auto" and self.parameter_bytes <= _LARGEST_FILE):
            draft.write_bytes(self.to_bytes())
        elif external_data in ("auto", "always"):
            save_model(self.model, draft)
        else:
            raise ExportError(f"external_data is {external_data!r}; wanted 'auto', 'always' or 'never'")

    def __str__(self) -> str:
        nodes = sum(1 for _ in self.model.graph)
        where = "" if self.path is None else f"{self.path}: "
        line = f"{where}{nodes} nodes, {self.parameter_bytes / 2**20:.1f} MiB, opset {self.opset}"
        return line if self.validation is None else f"{line}\n{self.validation}"


def load_model(model: OnnxFile | ir.Model | str | os.PathLike[str] | bytes) -> ir.Model:
    """Return a copy of a model that may be changed; its weights are shared, or stay in their file.

    Raises:
        ExportError: the file cannot be read.
    """
    if isinstance(model, OnnxFile | ir.Model):
        return (model.model if isinstance(model, OnnxFile) else model).clone()
    _check_is_file(model)
    try:
        return ir.from_proto(onnx.load_from_string(model)) if isinstance(model, bytes) else ir.load(model)
    except Exception as error:  # protobuf raises a class of its own, which has no type stubs
        raise ExportError(describe("cannot read the model", because=str(error))) from error


def loadable(model: OnnxFile | str | os.PathLike[str] | bytes) -> str | os.PathLike[str] | bytes:
    """Return a model as ORT loads it: the file where there is one, as weights may lie beside it, or its bytes.

    Raises:
        ExportError: it is no ONNX model.
    """
    if isinstance(model, OnnxFile):
        return model.path or model.to_bytes()
    _check_is_file(model)
    return model


def _check_is_file(model: Any) -> None:
    if not isinstance(model, str | os.PathLike | bytes):
        raise ExportError(
            describe(
                "this is no ONNX model",
                got=type(model).__name__,
                wanted="what fxopt.export.to_onnx returns, a path, or the bytes of a model",
                try_="export it first, with fxopt.export.to_onnx" if isinstance(model, torch.nn.Module) else None,
            )
        )


def file_bytes(path: str | os.PathLike[str]) -> int:
    """Return the bytes of a model, all files of its weights included.

    Raises:
        ExportError: a file cannot be read.
    """
    model = load_model(path)
    graphs = [model.graph, *model.graph.subgraphs()]
    held = (value.const_value for graph in graphs for value in graph.initializers.values())
    places = {tensor.path for tensor in held if isinstance(tensor, ir.ExternalTensor)}
    try:
        return sum(Path(each).stat().st_size for each in (path, *places))
    except OSError as error:
        raise ExportError(describe(f"cannot read {path}", because=str(error))) from error


def save_model(model: ir.Model, path: Path) -> Path:
    """Write a model of any size, its weights to a file of their own, and return ``path``."""
    ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=_SMALLEST_EXTERNAL)
    return path


def check_target(path: str | os.PathLike[str]) -> Path:
    """Return the path to write to.

    Raises:
        ExportError: there is no such folder, it cannot be written to, or the path is a folder itself.
    """
    target = Path(path)
    problem = None
    if target.is_dir():
        problem = "it is a folder"
    elif not target.parent.is_dir():
        problem = f"there is no folder {target.parent}"
    elif not os.access(target.parent, os.W_OK):
        problem = f"the folder {target.parent} is read-only"
    if problem:
        raise ExportError(
            describe(
                f"cannot write {target}: {problem}", try_="give the name of a file in a folder that you can write to"
            )
        )
    return target


@contextmanager
def _writing(target: Path) -> Iterator[Path]:
    """Give a folder beside ``target`` to write in, gone afterwards; what the system refuses becomes an ExportError."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise ExportError(f"cannot write {target}: {error.strerror or error}") from error
    try:
        yield folder
    except OSError as error:
        raise ExportError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _move_all(folder: Path, destination: Path) -> None:
    """Move the files of ``folder``, the weights first; if one cannot be moved, what was there before is put back."""
    drafts = sorted(folder.iterdir(), key=lambda draft: (draft.suffix != ".data", draft.name))
    kept = folder / "before"
    kept.mkdir()
    done: list[Path] = []
    try:
        for draft in drafts:
            place = destination / draft.name
            if place.exists():
                os.replace(place, kept / draft.name)
            done.append(place)
            os.replace(draft, place)
    except BaseException:
        for place in done:
            place.unlink(missing_ok=True)
            if (kept / place.name).exists():
                os.replace(kept / place.name, place)
        raise
