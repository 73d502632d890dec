"""What time ORT takes for each layer of a model in float and in integers: what the search for bit widths asks for.

    float_file = to_onnx(optimize(model, PREPARATION))        of fxopt.passes.quantize.quantize
    integer_file = to_onnx(optimize(model, [Quantize()]))
    Quantize(metric=..., max_drop=..., costs=layer_costs({"float": float_file, 8: integer_file}))

The kernels are those that run: all of ORT's optimizations are on, its layouts among them. A kernel that ORT fuses with
what is around it counts as a whole. What stands between layers, such as a change of layout, counts for none.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from fxopt.errors import ExportError
from fxopt.export.coverage_run import Inputs, drawn_inputs
from fxopt.export.coverage_table import KERNELS
from fxopt.export.files import OnnxFile
from fxopt.export.session import Session

__all__ = ["layer_costs"]

_MARK = "fxopt#"  # ORT names a fused node after a node that it replaces, or after what it yields
_HEAVY = ("conv", "linear", "matmul")


def layer_costs(
    files: Mapping[int | str, OnnxFile],
    inputs: Inputs | None = None,
    *,
    sizes: Mapping[str, int] | None = None,
    runs: int = 20,
    threads: int = 1,
) -> dict[str, dict[int | str, float]]:
    """Return the time of each layer by name of its node in the graph and by width, in microseconds.

    Args:
        files: One exported model for each width: ``{"float": file, 8: file}``; those of one graph, so that the names
            of its layers are the same.
        inputs: What to run them on; drawn by ``sizes`` if not given, as :func:`fxopt.export.coverage` does.
        sizes: Lengths of dynamic axes by name; 1 for the others.
        runs: How often each runs; the shortest time of a layer counts, since whatever disturbs a run makes it longer.
        threads: Threads within one operator.

    Raises:
        ExportError: ORT cannot load or run a model, or runs no kernel that is a layer.
        ValueError: ``runs`` is less than 1, or ``sizes`` comes along with ``inputs``.
    """
    if runs < 1:
        raise ValueError(f"runs is {runs}; wanted 1 or more")
    if inputs is not None and sizes is not None:
        raise ValueError("sizes are for drawing inputs, and inputs are given: leave out one of them")
    found: dict[str, dict[int | str, float]] = {}
    for width, file in files.items():
        times = _shortest(file, inputs, sizes, runs, threads)
        if not times:
            raise ExportError(f"ORT ran no kernel of the model at width {width!r} that is a layer")
        for name, time in times.items():
            found.setdefault(name, {})[width] = time
    return found


def _shortest(
    file: OnnxFile, inputs: Inputs | None, sizes: Mapping[str, int] | None, runs: int, threads: int
) -> dict[str, float]:
    model = file.model.clone()
    layers = _marked(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        ir.save(model, path, external_data="model.onnx.data", size_threshold_bytes=1024)
        session = Session(path, threads=threads, profile=Path(folder) / "profile")
        given = drawn_inputs(session, sizes) if inputs is None else inputs
        try:
            for _ in range(runs):
                session.run(given)
        finally:
            events = json.loads(Path(session.ort.end_profiling()).read_text(encoding="utf-8"))
    return _times(events, layers)


def _marked(model: ir.Model) -> dict[str, str]:
    """Name nodes and values so that ORT's names tell where they come from; return the layer of each number."""
    fixed = {value.name for value in (*model.graph.inputs, *model.graph.outputs)}
    layers: dict[str, str] = {}
    numbers: dict[ir.Node, str] = {}
    for index, node in enumerate(ir.traversal.RecursiveGraphIterator(model.graph)):
        numbers[node] = str(index)
        # ORT may name a layer after the activation that it takes in: that one belongs to the layer that it reads.
        source = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
        if _is_layer(node.op_type):
            layers[str(index)] = node.metadata_props.get("fxopt.node") or node.name or str(index)
        elif source is not None and numbers.get(source) in layers:
            layers[str(index)] = layers[numbers[source]]
        node.name = f"{_MARK}{index}#"
        for value in node.outputs:
            if value.name in fixed and value.name is not None:
                layers.setdefault(value.name, layers.get(str(index), ""))
            elif value.name:
                value.name = f"{_MARK}{index}#{value.name}"
    return layers


def _times(events: list[dict[str, object]], layers: Mapping[str, str]) -> dict[str, float]:
    """Return the shortest time of each layer; a layer of several kernels takes the sum of theirs."""
    shortest: dict[tuple[str, str], float] = {}
    for event in events:
        kernel, args, duration = str(event["name"]), event.get("args"), event.get("dur")
        if event.get("cat") != "Node" or not kernel.endswith("_kernel_time") or not isinstance(args, dict):
            continue
        layer = layers.get(_origin(kernel))
        if _is_layer(str(args.get("op_name"))) and layer and isinstance(duration, int | float):
            key = layer, kernel
            shortest[key] = min(shortest.get(key, float("inf")), max(float(duration), 1.0))
    found: dict[str, float] = {}
    for (layer, _), time in shortest.items():
        found[layer] = found.get(layer, 0.0) + time
    return found


def _is_layer(operator: str) -> bool:
    return operator in KERNELS and KERNELS[operator].layer in _HEAVY


def _origin(kernel: str) -> str:
    """Return the number in a kernel's name, or the name of the graph's output that it has instead."""
    _, mark, rest = kernel.partition(_MARK)
    return rest.partition("#")[0] if mark else kernel.removesuffix("_kernel_time").removesuffix("_nchwc")
