"""What time ORT takes for the parts of a graph at several widths: what pruning to a budget of time asks for.

    Prune(budget="latency:0.6", costs=width_costs)
    Prune(budget="latency:0.6", costs=functools.partial(width_costs, threads=4))

The pass says which parts it wants measured, and at what shapes; each becomes a model of its own, with random numbers,
and ORT fuses in it what it would fuse in the whole. The kernels' own times count. Changes of layout around them do not:
the whole has few of them. Between two runs as many bytes are read as the whole graph has at about that width, so that
a kernel finds its weights as far away as in the whole. What is measured is this machine, as busy as it is.
"""

from __future__ import annotations

import json
import math
import operator
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fxopt.args import arg, put_arg
from fxopt.attributes import made_of_attributes
from fxopt.export.session import Session
from fxopt.export.to_onnx import DEFAULT_OPSET
from fxopt.export.translate import translate
from fxopt.functionalize import fake_call
from fxopt.layer_operators import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS

__all__ = ["Region", "width_costs"]

aten = torch.ops.aten
Point = tuple[int, ...]
Shape = tuple[int, ...]

_LAYOUTS = frozenset({"ReorderInput", "ReorderOutput"})
_ENOUGH = 0.05  # seconds of runs at one point
_CHAIN = 64  # kernels that do next to nothing, to measure what they cost all the same
_FEWEST = 8  # runs, however long they take
_LARGEST = 2**26  # bytes beyond which reading more empties no more caches


class Region(Protocol):
    """A part of a graph to be measured by itself; without nodes, what a run takes beside its kernels.

    Attributes:
        name: What its times are returned under.
        nodes: Names of its nodes, in the order of the graph.
        shapes: At each point, the shape of each value that a node of it reads or yields as a tensor, by name.
    """

    @property
    def name(self) -> str:
        """See the class."""

    @property
    def nodes(self) -> tuple[str, ...]:
        """See the class."""

    @property
    def shapes(self) -> Mapping[Point, Mapping[str, Shape]]:
        """See the class."""


def width_costs(
    gm: torch.fx.GraphModule,
    regions: Sequence[Region],
    *,
    runs: int = 20,
    threads: int = 1,
    say: Callable[[str], object] | None = None,
) -> dict[str, dict[Point, float]]:
    """Return the time of each region at each of its points, in microseconds.

    Args:
        gm: The graph.
        regions: What of it to measure. Regions of equal operators, arguments and shapes are measured once.
        runs: How often each runs; fewer times if that takes more than 50 ms, and 8 times at least, after one run that
            does not count. What counts is the mean of the shortest quarter: whatever disturbs a run makes it longer.
        threads: Threads within one operator.
        say: Is told how many models were measured, and how long that took; for example ``print``.

    Raises:
        ExportError: ORT cannot load or run a model, or a region cannot be exported.
        ValueError: ``runs`` is less than 1.
    """
    if runs < 1:
        raise ValueError(f"runs is {runs}; wanted 1 or more")
    started = time.perf_counter()
    nodes = {node.name: node for node in gm.graph.nodes}
    constant = made_of_attributes(gm.graph)  # a session computes these when it loads
    known: dict[Any, float] = {}
    found: dict[str, dict[Point, float]] = {}
    whole = sum(_bytes(tensor) for tensor in (*gm.parameters(), *gm.buffers()))
    with tempfile.TemporaryDirectory() as folder:
        run, writing = _overheads(Path(folder), runs, threads)
        for region in regions:
            chain = [nodes[name] for name in region.nodes]
            own = {point: _own_numbers(chain, shapes, constant) for point, shapes in region.shapes.items()}
            for point, shapes in region.shapes.items():
                others = _rounded(whole * own[point] / max(*own.values(), 1))
                key = _key(chain, shapes), others
                if key not in known and chain:
                    model = _model_of(chain, shapes, constant)
                    known[key] = _kernel_time(model, others, Path(folder), runs, threads, writing)
                found.setdefault(region.name, {})[point] = known[key] if chain else run
    if say is not None:
        seconds = time.perf_counter() - started
        say(f"{len(known)} models for {len(regions)} regions measured in {seconds:.1f} s with {threads} thread(s)")
    return found


def _key(chain: Sequence[torch.fx.Node], shapes: Mapping[str, Shape]) -> Any:
    """Return what the time depends on: operators, shapes, and where each value comes from."""
    number: dict[torch.fx.Node, int] = {}

    def told(value: torch.fx.Node) -> str:
        place = number.setdefault(value, len(number))
        return f"%{place} {shapes.get(value.name)} {getattr(value.meta.get('val'), 'dtype', '')}"

    return tuple(str((node.target, torch.fx.map_arg((node.args, node.kwargs), told), told(node))) for node in chain)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _own_numbers(chain: Sequence[torch.fx.Node], shapes: Mapping[str, Shape], constant: set[torch.fx.Node]) -> int:
    """Return how many numbers the weights of a region have at these shapes."""
    weights = {source for node in chain for source in node.all_input_nodes if source in constant}
    return sum(math.prod(shapes[weight.name]) for weight in weights)


def _rounded(count: float) -> int:
    """Return a power of 2, so that regions that are alike can share a time."""
    return min(1 << round(math.log2(max(count, 1))), _LARGEST)


# ---- a model of one region


def _model_of(
    chain: Sequence[torch.fx.Node], shapes: Mapping[str, Shape], constant: set[torch.fx.Node]
) -> tuple[ir.Model, dict[str, np.ndarray[Any, Any]]]:
    """Return the model of a region at these shapes, and inputs for it."""
    root, graph, mode = torch.nn.Module(), torch.fx.Graph(), FakeTensorMode()
    twins: dict[torch.fx.Node, torch.fx.Node] = {}
    inputs: dict[str, np.ndarray[Any, Any]] = {}
    for value in dict.fromkeys(source for node in chain for source in node.all_input_nodes):
        if value in chain or not isinstance(value.meta.get("val"), torch.Tensor):
            continue
        tensor = _drawn(shapes[value.name], value.meta["val"].dtype)
        if value in constant:
            name = f"constant_{len(twins)}"
            root.register_buffer(name, tensor)
            twins[value] = graph.get_attr(name)
        else:
            twins[value] = graph.placeholder(f"input_{len(inputs)}")
            inputs[twins[value].name] = tensor.numpy()
        twins[value].meta["val"] = mode.from_tensor(tensor)
    for node in chain:
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda source: twins[source])
        twins[node] = graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]  # a call's target is callable
        _resize(twins[node], shapes.get(node.name))
        twins[node].meta["val"] = fake_call(node.target, twins[node].args, twins[node].kwargs)
    held = twins[chain[-1]].meta["val"]
    last = twins[chain[-1]]
    if isinstance(held, tuple | list):
        last = graph.call_function(operator.getitem, (last, 0))
        last.meta["val"] = held[0]
    graph.output((last,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fx warns of attributes that a module made by hand does not own
        made = torch.fx.GraphModule(root, graph)
    return translate(made, opset=DEFAULT_OPSET), inputs


def _drawn(shape: Shape, dtype: torch.dtype) -> torch.Tensor:
    """Return numbers between 0.1 and 1: right for variances too, and none so small that kernels become slow."""
    if not dtype.is_floating_point:
        return torch.ones(shape, dtype=dtype)
    return (torch.rand(shape) * 0.9 + 0.1).to(dtype)


def _resize(node: torch.fx.Node, out: Shape | None) -> None:
    """Bring the arguments up to date that tell sizes."""
    target: Any = node.target
    if target in CONVOLUTIONS and arg(node, "groups") > 1:
        source, weight = (arg(node, name).meta["val"] for name in ("input", "weight"))
        put_arg(node, "groups", source.shape[1 - weight.ndim] // weight.shape[1])
    elif target in TRANSPOSED_CONVOLUTIONS and arg(node, "groups") > 1:
        assert out is not None
        weight = arg(node, "weight").meta["val"]
        put_arg(node, "groups", out[1 - weight.ndim] // weight.shape[1])
    elif target is aten.layer_norm.default:
        source = arg(node, "input").meta["val"]
        put_arg(node, "normalized_shape", list(source.shape[source.ndim - len(arg(node, "normalized_shape")) :]))
    elif target is aten.group_norm.default:
        assert out is not None
        if out[1] % arg(node, "num_groups"):
            put_arg(node, "num_groups", 1)  # groups have gone, not channels of each: about as much to do


# ---- its time


def _kernel_time(
    made: tuple[ir.Model, Mapping[str, np.ndarray[Any, Any]]],
    others: int,
    folder: Path,
    runs: int,
    threads: int,
    writing: float,
) -> float:
    """Return the time of all kernels that compute, in microseconds; ``others`` is read between runs."""
    model, inputs = made
    elsewhere = np.ones(others, np.uint8)
    session = _session(model, folder, threads)
    names = list(session.output_names)
    began = time.perf_counter()
    for count in range(runs + 1):
        for read in (elsewhere, *inputs.values()):
            read.max(initial=0)
        session.ort.run(names, inputs)
        if count >= _FEWEST and time.perf_counter() - began > _ENOUGH:
            break
    return sum(max(each - writing, 0.0) for each in _kernels(session))


def _session(model: ir.Model, folder: Path, threads: int) -> Session:
    ir.save(model, folder / "model.onnx")
    return Session(folder / "model.onnx", threads=threads, profile=folder / "profile")


def _kernels(session: Session) -> list[float]:
    """Return the time of each kernel that computes, as ORT's profiler tells it, in microseconds."""
    profile = Path(session.ort.end_profiling())
    events = json.loads(profile.read_text(encoding="utf-8"))
    profile.unlink()
    times: dict[str, list[float]] = {}
    for event in events:
        kernel = str(event["name"])
        computes = event.get("cat") == "Node" and event["args"].get("op_name") not in _LAYOUTS
        if computes and kernel.endswith("_kernel_time"):
            times.setdefault(kernel, []).append(float(event["dur"]))
    return [_typical(each[1:] or each) for each in times.values()]


def _typical(times: Sequence[float]) -> float:
    """Return the mean of the shortest quarter; the mean, since ORT tells whole microseconds and some kernels take few.

    A median would do on a machine that does nothing else, and is far too long on one that is shared.
    """
    ranked = sorted(times)
    return statistics.fmean(ranked[: max(len(ranked) // 4, 1)])


def _overheads(folder: Path, runs: int, threads: int) -> tuple[float, float]:
    """Return what a run takes beside its kernels, and what the profiler adds to the time of each, in microseconds.

    The profiler writes down the shapes of a kernel before it stops its clock. A chain of kernels with next to nothing
    to do tells how long that takes: by how much longer they are in the profile than in a run without one.
    """
    runs = max(runs, _FEWEST)
    single, chain = (_wall_time(_sigmoids(length), runs, threads) for length in (1, _CHAIN))
    each = max(chain - single, 0.0) / (_CHAIN - 1)
    session = _session(_sigmoids(_CHAIN), folder, threads)
    for _ in range(runs):
        session.ort.run(["y"], {"x": np.zeros(1, np.float32)})
    return max(single - each, 0.0), max(statistics.fmean(_kernels(session)) - each, 0.0)


def _wall_time(model: ir.Model, runs: int, threads: int) -> float:
    session = Session(ir.to_proto(model).SerializeToString(), threads=threads)
    times = []
    for _ in range(5 * runs):
        began = time.perf_counter()
        session.ort.run(["y"], {"x": np.zeros(1, np.float32)})
        times.append(1e6 * (time.perf_counter() - began))
    return _typical(times)


def _sigmoids(length: int) -> ir.Model:
    """Return a model of this many kernels on one number."""
    first = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1]))
    nodes: list[ir.Node] = []
    for at in range(length):
        node = ir.node("Sigmoid", [nodes[-1].outputs[0] if nodes else first], name=f"sigmoid_{at}")
        node.outputs[0].name = "y" if at == length - 1 else f"y_{at}"
        node.outputs[0].type, node.outputs[0].shape = first.type, first.shape
        nodes.append(node)
    graph = ir.Graph([first], nodes[-1].outputs, nodes=nodes, opset_imports={"": DEFAULT_OPSET})
    return ir.Model(graph, ir_version=10)
