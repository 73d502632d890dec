"""The state of an unfinished calibration, in a file that a later run of the same goes on from."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._ops import HigherOrderOperator, OpOverload

from fxopt.attributes import named_tensors
from fxopt.dimensions import Sample
from fxopt.errors import CalibrationError, FileFormatError, describe
from fxopt.graph_module import CapturedModule, graph_modules
from fxopt.passes.quantize.sketch import ValueSketch
from fxopt.serialize import atomic_file

__all__ = ["Checkpoint"]

_FORMAT = "fxopt-calibration"
_VERSION = 1


class Checkpoint:
    """A file with the sketches of the first items, and digests of the graph and of those items.

    Attributes:
        items: How many items the file that was read covers; 0 if there was none.
    """

    def __init__(self, path: Path, gm: CapturedModule, sketches: dict[str, ValueSketch]) -> None:
        """Read the file, if there is one, into ``sketches``.

        Args:
            path: The file.
            gm: The graph that is calibrated.
            sketches: A sketch for each node that is observed; they stay those that :meth:`write` writes.

        Raises:
            CalibrationError: the file is of another graph, or other nodes.
            FileFormatError: it is damaged, or something else.
        """
        self.path, self.items = path, 0
        self._sketches = sketches
        self._graph = _graph_digest(gm)
        self._data = hashlib.blake2b(digest_size=16)
        self._data_read = ""
        if path.exists():
            self._read()

    def covers(self, number: int, sample: Sample) -> bool:
        """Return whether the item, of which every one is to be shown in order, is in the file already.

        Raises:
            CalibrationError: the items up to the last one in the file are not those it was made from.
        """
        for leaf in sample.leaves():
            self._data.update(_content(leaf))
        if number + 1 == self.items and self._data.hexdigest() != self._data_read:
            raise CalibrationError(
                describe(
                    f"the checkpoint {self.path} was made from other data, or the same in another order",
                    got=f"other values in items 0 to {number}",
                    try_="shuffle=False in the loader; or delete the file, to begin anew",
                )
            )
        return number < self.items

    def check_reached(self, done: int) -> None:
        """Check that the data went as far as the file.

        Raises:
            CalibrationError: there were fewer items than the file covers.
        """
        if done < self.items:
            raise CalibrationError(
                describe(
                    f"the checkpoint {self.path} was made from more data",
                    got=f"{done} items",
                    wanted=f"at least the {self.items} that it covers",
                    try_="the same data; or delete the file, to begin anew",
                )
            )

    def write(self, items: int) -> None:
        """Write the state after so many items; the file is replaced at once, or not at all.

        Raises:
            OSError: the file cannot be written.
        """
        header = {
            "format": _FORMAT,
            "version": _VERSION,
            "graph": self._graph,
            "nodes": list(self._sketches),
            "items": items,
            "data": self._data.hexdigest(),
        }
        arrays = {"header": np.frombuffer(json.dumps(header).encode(), np.uint8)}
        for index, sketch in enumerate(self._sketches.values()):
            arrays |= {f"{index}.{key}": array for key, array in sketch.to_state().items()}
        with atomic_file(self.path) as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # numpy's stub takes the names for its own options

    def _read(self) -> None:
        try:
            with open(self.path, "rb") as file:  # np.load by name leaves a damaged file open
                content = dict(np.load(file, allow_pickle=False))
            header: dict[str, Any] = json.loads(content.pop("header").tobytes())
            if (header["format"], header["version"]) != (_FORMAT, _VERSION):
                raise ValueError(f"format {header['format']!r}, version {header['version']!r}")
            states: list[dict[str, Any]] = [{} for _ in header["nodes"]]
            for key, array in content.items():
                index, _, name = key.partition(".")
                states[int(index)][name] = array
            found = dict(zip(header["nodes"], map(ValueSketch.from_state, states), strict=True))
        except (ValueError, KeyError, IndexError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
            raise FileFormatError(
                describe(
                    f"{self.path} is no checkpoint of a calibration, or is damaged",
                    found=f"{type(error).__name__}: {error}",
                    try_="delete the file, to begin anew, or name another one",
                )
            ) from error
        self._check_same(header, found)
        self._sketches.update(found)
        self.items, self._data_read = header["items"], header["data"]

    def _check_same(self, header: dict[str, Any], found: dict[str, ValueSketch]) -> None:
        differs = None
        if header["graph"] != self._graph:
            differs = "its graph, or a weight of it, is another one"
        elif {name: sketch.axis for name, sketch in found.items()} != {
            name: sketch.axis for name, sketch in self._sketches.items()
        }:
            differs = f"it has {len(found)} nodes and this calibration {len(self._sketches)}, or other axes of channels"
        if differs:
            raise CalibrationError(
                describe(
                    f"the checkpoint {self.path} is of another calibration",
                    because=differs,
                    try_="delete the file, to begin anew, or name another one",
                )
            )


def _graph_digest(gm: CapturedModule) -> str:
    """Return a digest of the nodes and the values of the tensors, the same in every process."""
    digest = hashlib.blake2b(digest_size=16)
    paths = {module: path for path, module in gm.named_modules()}
    for module in graph_modules(gm):
        for node in module.graph.nodes:
            text = f"{paths[module]}|{node.name}|{node.op}|{_target(node)}|{node.args}|{node.kwargs}\n"
            digest.update(text.encode())
    for name, tensor in named_tensors(gm):
        digest.update(name.encode())
        digest.update(_content(tensor))
    return digest.hexdigest()


def _target(node: torch.fx.Node) -> str:
    if isinstance(node.target, str | OpOverload | HigherOrderOperator):
        return str(node.target)
    return f"{node.target.__module__}.{node.target.__name__}"  # as text, a function has its address in it


def _content(leaf: Any) -> bytes:
    if not isinstance(leaf, torch.Tensor):
        return repr(leaf).encode()
    values = leaf.detach().cpu().contiguous()
    return f"{values.dtype}{tuple(values.shape)}".encode() + values.reshape(-1).view(torch.uint8).numpy().tobytes()
