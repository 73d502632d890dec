"""One run of a model as ORT optimizes it: which kernels ran, how often, on what shapes."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from fxopt.errors import ExportError, describe
from fxopt.export.coverage_overflow import overflowing_channels
from fxopt.export.coverage_table import Call, Shape
from fxopt.export.files import OnnxFile, load_model, save_model
from fxopt.export.finish import bodies_of
from fxopt.export.origins import WRITTEN_FOR, source_of
from fxopt.export.session import Session

__all__ = ["Inputs", "KernelRuns", "Origin", "drawn_inputs", "kernel_times", "profiled"]

Inputs = Sequence[torch.Tensor] | Mapping[str, torch.Tensor]
_MARK = "fxopt#"  # ORT makes the name of a fused node from that of one that it replaces
_DTYPES = {
    "float": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "double": torch.float64,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint8": torch.uint8,
    "uint16": torch.uint16,
    "uint32": torch.uint32,
    "uint64": torch.uint64,
    "bool": torch.bool,
}


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a node of the optimized graph comes from; ORT keeps no metadata, but names.

    Attributes:
        name: Name in the fx graph, or of the ONNX node.
        source: The user's line, "" if the file does not tell.
        before: What made its first input in the model, as "Relu"; "" for an input or a constant.
        layer: The layer that it stands for together with other nodes, as "conv"; "" if it stands for itself.
        has_float_weight: Whether it is a Conv or Gemm with a constant weight that the model does not quantize.
    """

    name: str = ""
    source: str = ""
    before: str = ""
    layer: str = ""
    has_float_weight: bool = False


@dataclasses.dataclass
class KernelRuns:
    """One node of the optimized graph.

    Attributes:
        node: The node.
        origin: Where it comes from.
        calls: Its runs; several in a loop, none in a branch that was not taken.
        numbers: Type of its first output, as "uint8".
        overflowing: Of how many channels 16-bit sums can overflow.
    """

    node: ir.Node
    origin: Origin
    calls: list[Call] = dataclasses.field(default_factory=list)
    numbers: str = ""
    overflowing: int = 0


def profiled(
    model: OnnxFile | str | os.PathLike[str] | bytes, inputs: Inputs | None, sizes: Mapping[str, int] | None
) -> tuple[KernelRuns, ...]:
    """Optimize a model with ORT, run it once, and return every node, those of branches and loops included.

    The optimizer stops at level "extended". "all" adds only layouts, which rename kernels and pad their shapes, and
    the sum of a float convolution with a float addition: no kernel becomes an integer one, or ceases to be. Where int8
    and uint8 activations are mixed, its transpositions may also repeat a QuantizeLinear and DequantizeLinear.

    Raises:
        ExportError: ORT cannot load or run the model.
        ValueError: ``sizes`` names a size that the model does not have.
    """
    with tempfile.TemporaryDirectory() as folder:
        kernels, optimized, session = _profiling(load_model(model), Path(folder))
        if inputs is None:
            inputs = drawn_inputs(session, sizes)
        try:
            session.run(inputs)
        except ExportError as error:
            error.add_note("try: coverage(model, inputs=...) with inputs that the model was made for")
            raise
        finally:
            events = json.loads(Path(session.ort.end_profiling()).read_text())
        for runs in kernels:  # here, since weights may lie in a file beside the graph
            runs.overflowing = overflowing_channels(runs.node)
    constants = _constants(optimized)
    for number, event in _kernel_events(events):
        _record(kernels[number], event["args"], constants)
    return tuple(kernels)


def kernel_times(
    model: OnnxFile | str | os.PathLike[str] | bytes, inputs: Inputs, runs: int, threads: int | None
) -> list[tuple[KernelRuns, list[float]]]:
    """Return every kernel of a model with its own time in each run, in seconds.

    One in a loop has the sum of its turns; that of a branch or loop is without what runs in its bodies.

    The optimizer stops at level "extended", as for :func:`profiled`, so that each kernel is known by name.
    """
    with tempfile.TemporaryDirectory() as folder:
        kernels, _, session = _profiling(load_model(model), Path(folder), threads)
        try:
            for _ in range(runs + 1):  # the first one warms caches
                session.run(inputs)
        finally:
            events = json.loads(Path(session.ort.end_profiling()).read_text())
    times = [[0.0] * (runs + 1) for _ in kernels]
    run = 0
    for event in events:
        for number, timed in _kernel_events([event]):
            times[number][run] += timed["dur"] / 1e6
        run += event["name"] == "model_run"  # stands behind its kernels
    own = _without_bodies(kernels, times)
    return list(zip(kernels, [each[1:] for each in own], strict=True))


def _without_bodies(kernels: Sequence[KernelRuns], times: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return the times of kernels that hold others without the times of these."""
    place = {kernel.node: index for index, kernel in enumerate(kernels)}
    own = [list(each) for each in times]
    for index, kernel in enumerate(kernels):
        bodies = [graph for attribute in kernel.node.attributes.values() for graph in bodies_of(attribute)]
        for inner in (times[place[node]] for graph in bodies for node in graph):
            own[index] = [max(0.0, a - b) for a, b in zip(own[index], inner, strict=True)]
    return own


def _profiling(
    original: ir.Model, folder: Path, threads: int | None = None
) -> tuple[list[KernelRuns], ir.Model, Session]:
    """Optimize a model and load it for profiling; return its kernels, it, and the session."""
    find = _marked(original)
    rewritten = folder / "rewritten.onnx"
    Session(save_model(original, folder / "marked.onnx"), optimization="extended", save_optimized=rewritten)
    optimized = ir.load(rewritten)
    kernels = []
    for index, node in enumerate(_nodes(optimized)):
        kernels.append(KernelRuns(node, find(node)))
        node.name = str(index)
    saved = save_model(optimized, folder / "optimized.onnx")
    session = Session(saved, optimization="none", threads=threads, profile=folder / "profile")
    return kernels, optimized, session


def _kernel_events(events: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """Yield the runs of kernels, each with the number of its node."""
    for event in events:
        name = event["name"].removesuffix("_kernel_time")
        if event.get("cat") == "Node" and name != event["name"] and name.isdecimal():
            yield int(name), event


def drawn_inputs(session: Session, sizes: Mapping[str, int] | None = None) -> dict[str, torch.Tensor]:
    """Return inputs of the declared shapes: normal numbers; zeros for integers, ones for flags and masks.

    Args:
        session: The loaded model.
        sizes: Lengths of dynamic axes by name; 1 for the others.

    Raises:
        ExportError: an input is no tensor of numbers.
        ValueError: there is no dynamic axis of such a name.
    """
    chosen = dict(sizes or {})
    known = {size for held in session.ort.get_inputs() for size in held.shape if isinstance(size, str)}
    if unknown := sorted(set(chosen) - known):
        raise ValueError(f"sizes names {', '.join(unknown)}; the model has {', '.join(sorted(known)) or 'none'}")
    generator = torch.Generator().manual_seed(0)
    drawn = {}
    for held in session.ort.get_inputs():
        dtype = _DTYPES.get(held.type.removeprefix("tensor(").removesuffix(")"))
        if dtype is None:
            raise ExportError(
                describe(f"no values can be drawn for input {held.name!r}", got=held.type, try_="inputs=...")
            )
        shape = [size if isinstance(size, int) else chosen.get(size, 1) for size in held.shape]
        if dtype.is_floating_point:
            drawn[held.name] = torch.randn(shape, generator=generator).to(dtype)
        else:
            is_flag = dtype is torch.bool or "mask" in held.name.lower()
            drawn[held.name] = torch.full(shape, int(is_flag), dtype=dtype)
    return drawn


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Yield all nodes, those of branches and loops included."""
    return iter(ir.traversal.RecursiveGraphIterator(model.graph))


def _marked(model: ir.Model) -> Callable[[ir.Node], Origin]:
    """Name the nodes so that ORT's names tell where they come from, and return what finds that."""
    origins: list[Origin] = []
    values: dict[str, Origin] = {}
    for index, node in enumerate(_nodes(model)):
        first = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
        origin = Origin(
            node.metadata_props.get("fxopt.node") or node.name or "",
            source_of(node),
            "" if first is None else first.op_type,
            node.metadata_props.get(WRITTEN_FOR, ""),
            node.op_type in ("Conv", "Gemm") and node.inputs[1] is not None and node.inputs[1].is_initializer(),
        )
        origins.append(origin)
        values.update((value.name, origin) for value in node.outputs if value.name)
        node.name = f"{_MARK}{index}#"

    def find(optimized: ir.Node) -> Origin:
        _, _, rest = (optimized.name or "").partition(_MARK)
        if (number := rest.partition("#")[0]).isdecimal():
            return origins[int(number)]
        return next((values[value.name] for value in optimized.outputs if value.name in values), Origin())

    return find


def _constants(model: ir.Model) -> dict[str, Shape]:
    """Return the shape of every constant, those of branches and loops included."""
    graphs = {model.graph} | {node.graph for node in _nodes(model) if isinstance(node.graph, ir.Graph)}
    return {
        name: tuple(value.const_value.shape.numpy())
        for graph in graphs
        for name, value in graph.initializers.items()
        if value.const_value is not None
    }


def _record(kernel: KernelRuns, event: Mapping[str, Any], constants: Mapping[str, Shape]) -> None:
    got = [shape for entry in event["input_type_shape"] for shape in entry.values()]
    left = [tuple(shape) for shape in got]
    inputs: list[Shape | None] = []
    for value in kernel.node.inputs:
        known = None if value is None else constants.get(value.name or "")
        if value is None:
            inputs.append(None)
        elif known is not None:  # not told of a weight that the kernel has packed for itself
            inputs.append(known)
            if left and left[0] == known:
                left.pop(0)
        else:
            inputs.append(left.pop(0) if left else None)
    outputs = [(numbers, tuple(shape)) for entry in event["output_type_shape"] for numbers, shape in entry.items()]
    used = iter(outputs)
    shapes = tuple(next(used, (None, None))[1] if value.name else None for value in kernel.node.outputs)
    attributes = {name: attribute.value for name, attribute in kernel.node.attributes.items()}
    kernel.calls.append(Call(attributes, tuple(inputs), shapes))
    kernel.numbers = outputs[0][0] if outputs else ""
