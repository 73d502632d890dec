"""Save a captured graph to one file, and load it in a process that never saw the model's class.

The file is a torch archive that ``torch.load(weights_only=True)`` accepts, so that loading one runs no code of the
file: the tensors, and one JSON text with every node, its arguments, value, module and source line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from fxopt.attributes import attach
from fxopt.codec import Decoder, Encoder, read_tree, write_tree
from fxopt.dimensions import Dimension, Sample
from fxopt.errors import FileFormatError, describe
from fxopt.graph_module import CapturedModule, InputSpec
from fxopt.live_graph import refuse_sharded
from fxopt.report import Report

__all__ = ["load", "save"]

FORMAT = "fxopt-graph"
VERSION = 1


def save(gm: CapturedModule, path: str | os.PathLike[str]) -> None:
    """Write the graph, its tensors, example inputs and report to ``path``, which is replaced at once or not at all.

    Raises:
        TypeError: ``gm`` is not a captured graph.
        PassError: FSDP has split its parameters among processes.
        OSError: the path cannot be written.
    """
    if not isinstance(gm, CapturedModule):
        raise TypeError(f"fxopt.save takes a captured graph and got a {type(gm).__name__}; call fxopt.capture first")
    with atomic_file(path) as file:
        _write(gm, file)


def load(path: str | os.PathLike[str]) -> CapturedModule:
    """Return the graph that :func:`save` wrote. The caller's process needs fxopt, not the model's class.

    Custom pytree classes among inputs and outputs come back as dicts and tuples.

    Raises:
        FileNotFoundError: there is no such file.
        FileFormatError: the file is damaged, is something else, or was written by a newer fxopt.
    """
    with open(path, "rb") as file:
        return _read(file, str(path))


def to_bytes(gm: CapturedModule) -> bytes:
    """Return what :func:`save` writes, for pickling."""
    file = io.BytesIO()
    _write(gm, file)
    return file.getvalue()


def from_bytes(content: bytes) -> CapturedModule:
    """Return the graph of :func:`to_bytes`."""
    return _read(io.BytesIO(content), "(bytes)")


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file beside ``path`` that takes its place when the block ends well, and disappears otherwise."""
    target = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def _write(gm: CapturedModule, file: Any) -> None:
    refuse_sharded(gm, "saved")
    named = [*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False)]
    unique: dict[int, torch.Tensor] = {}
    table = {}
    for name, tensor in named:
        unique.setdefault(id(tensor), tensor)
        owner, leaf = gm.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        table[name] = {
            "tensor": list(unique).index(id(tensor)) if id(tensor) in unique else None,
            "parameter": isinstance(tensor, torch.nn.Parameter),
            "persistent": leaf not in owner._non_persistent_buffers_set,
        }
    info = gm.graph._codegen.pytree_info  # type: ignore[attr-defined]  # torch declares the base class only
    leaves = [sample.leaves() for sample in gm.samples]
    encoder = Encoder()
    header = {
        "graphs": {
            path: encoder.graph(module.graph)
            for path, module in gm.named_modules()
            if isinstance(module, torch.fx.GraphModule)
        },
        "symbols": encoder.symbols(gm),
        "attributes": table,
        "arguments": list(info.orig_args),
        "in_spec": write_tree(info.in_spec),
        "out_spec": write_tree(info.out_spec),
        "inputs": [
            dataclasses.asdict(spec) | {"dtype": encoder.item(spec.dtype), "shape": list(spec.shape)}
            for spec in gm.inputs
        ],
        "outputs": list(gm.output_names),
        "dims": [dataclasses.asdict(dimension) for dimension in gm.dims.values()],
        "modes": gm.modes,
        "modes_reason": gm.modes_reason,
        "training": gm.training,
        "constants": [
            [None if isinstance(leaf, torch.Tensor) else encoder.item(leaf) for leaf in sample] for sample in leaves
        ],
        "report": gm.report.to_dict() if gm.report is not None else None,
        "records": gm.records,
    }
    torch.save(
        {
            "format": FORMAT,
            "version": VERSION,
            "header": json.dumps(header),
            "tensors": [tensor.detach() for tensor in unique.values()],
            "requires_grad": [tensor.requires_grad for tensor in unique.values()],
            "samples": [[leaf if isinstance(leaf, torch.Tensor) else None for leaf in sample] for sample in leaves],
        },
        file,
    )


def _read(file: Any, name: str) -> CapturedModule:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler stumbles over a foreign file in many ways: KeyError, struct.error, ...
        raise FileFormatError(
            describe(
                f"{name} is not a saved graph, or is damaged",
                got=f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}",
            )
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        kind = ", ".join(map(str, list(content)[:4])) if isinstance(content, dict) else type(content).__name__
        raise FileFormatError(
            describe(f"{name} is a torch file, and not a saved graph", got=kind, wanted="a file that fxopt.save wrote")
        )
    if content["version"] > VERSION:
        raise FileFormatError(f"{name} has format {content['version']}; this fxopt reads up to {VERSION}. Update fxopt")
    try:
        return _rebuild(content)
    except FileFormatError:
        raise
    except Exception as error:  # the archive is whole, and what it holds does not fit together
        raise FileFormatError(
            describe(f"{name} is damaged", got=f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}")
        ) from error


def _rebuild(content: dict[str, Any]) -> CapturedModule:
    header = json.loads(content["header"])
    decoder = Decoder(header["symbols"])
    root = torch.nn.Module()
    made: dict[tuple[int, bool], torch.Tensor] = {}
    for name, entry in header["attributes"].items():
        key = (entry["tensor"], entry["parameter"])
        if key not in made:
            tensor = content["tensors"][entry["tensor"]]
            requires_grad = content["requires_grad"][entry["tensor"]]
            made[key] = torch.nn.Parameter(tensor, requires_grad=requires_grad) if entry["parameter"] else tensor
        attach(root, name, made[key], persistent=entry["persistent"])
    for path in sorted((p for p in header["graphs"] if p), key=lambda p: -p.count(".")):
        _add_inner(root, path, decoder.graph(header["graphs"][path]))
    graph = decoder.graph(header["graphs"][""])
    info = _PyTreeInfo(header["arguments"], read_tree(header["in_spec"]), read_tree(header["out_spec"]))
    graph.set_codegen(_PyTreeCodeGen(info))
    gm = CapturedModule(root, graph)
    for table in ("_parameters", "_buffers", "_modules"):
        gm.__dict__[table] = root.__dict__[table]
    gm.__dict__["_non_persistent_buffers_set"] = root._non_persistent_buffers_set
    _restore_interface(gm, header, decoder, content)
    return gm


def _add_inner(root: torch.nn.Module, path: str, graph: torch.fx.Graph) -> None:
    *parents, leaf = path.split(".")
    owner = root
    for part in parents:
        if part not in owner._modules:
            owner.add_module(part, torch.nn.Module())
        owner = owner._modules[part]  # type: ignore[assignment]  # no part of a path is None
    holder = owner._modules.get(leaf) or torch.nn.Module()
    inner = torch.fx.GraphModule(holder, graph)
    for table in ("_parameters", "_buffers", "_modules"):
        inner.__dict__[table] = holder.__dict__[table]
    owner.add_module(leaf, inner)


def _restore_interface(gm: CapturedModule, header: dict[str, Any], decoder: Decoder, content: dict[str, Any]) -> None:
    gm.inputs = tuple(
        InputSpec(entry["name"], decoder.item(entry["dtype"]), tuple(entry["shape"]), entry["constant"])
        for entry in header["inputs"]
    )
    gm.output_names = tuple(header["outputs"])
    gm.dims = {
        entry["name"]: Dimension(**(entry | {"symbol": decoder.renamed.get(entry["symbol"], entry["symbol"])}))
        for entry in header["dims"]
    }
    spec = gm.graph._codegen.pytree_info.in_spec  # type: ignore[attr-defined]  # torch declares the base class only
    samples = []
    for tensors, constants in zip(content["samples"], header["constants"], strict=True):
        leaves = [
            decoder.item(constant) if tensor is None else tensor
            for tensor, constant in zip(tensors, constants, strict=True)
        ]
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        samples.append(Sample(tuple(args), kwargs))
    gm.samples = tuple(samples)
    gm.modes, gm.modes_reason = header["modes"], header["modes_reason"]
    gm.training = header["training"]
    gm.report = Report.from_dict(header["report"]) if header["report"] else None
    gm.records = header.get("records", {})  # files of version 0.1 have none
