"""What capture and export cost as a model gets more Python branches: from 8 to 64 in sequence.

Each branch compares what is computed so far with a part of the input, and has a linear layer on one side. Capture
rewrites a function once, and one trace holds both sides of every branch: the number of traces should not grow with the
number of branches, and nodes and time should grow as it does (exponent 1), although there are 2 ** branches ways
through the net. All has one thread; seconds are medians. A net's text is in a file, as capture reads it from there.
"""

from __future__ import annotations

import contextlib
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from rich.console import Console
from torch import Tensor, nn

import fxopt
from fxopt.export import Session, to_onnx
from fxopt.graph_module import graph_modules
from tests.bench.pass_scaling import exponent
from tests.bench.zoo_table import one_thread, write_row

SIZES = (8, 16, 32, 64)  # branches
REPEATS, INPUTS, WIDTH = 3, 50, 8
HEADER = (
    "branches", "traces", "graph nodes", "nodes / branch", "capture s", "export s", "ways taken", "graph = eager",
    "ORT as eager",
)  # fmt: skip


def source(branches: int) -> str:
    """Return the text of a module with a class ``Net`` that has so many branches in its forward."""
    lines = [
        "from torch import Tensor, nn",
        "",
        "",
        "class Net(nn.Module):",
        "    def __init__(self) -> None:",
        "        super().__init__()",
        f"        self.layers = nn.ModuleList(nn.Linear({WIDTH}, {WIDTH}) for _ in range({branches}))",
        "",
        "    def forward(self, x: Tensor) -> Tensor:",
        "        y = x",
    ]
    for index in range(branches):
        lines += [
            f"        if y.sum() > x[:, {index % WIDTH}].sum():",
            f"            y = self.layers[{index}](y).tanh()",
            "        else:",
            "            y = 0.1 - y",
        ]
    return "\n".join([*lines, "        return y", ""])


@contextlib.contextmanager
def net_of(branches: int) -> Iterator[nn.Module]:
    """Give a net whose module is imported from a temporary file."""
    name = f"net_with_{branches}_branches"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.py"
        path.write_text(source(branches))
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # inspect looks for a class's file there
        try:
            spec.loader.exec_module(module)
            torch.manual_seed(0)
            yield module.Net().eval()
        finally:
            del sys.modules[name]


def ways(net: nn.Module, inputs: list[Tensor]) -> int:
    """Return how many different ways the inputs take, by the layers that run."""
    taken: list[nn.Module] = []
    hooks = [layer.register_forward_hook(lambda layer, *_: taken.append(layer)) for layer in net.layers]
    found = set()
    for x in inputs:
        taken.clear()
        net(x)
        found.add(tuple(map(id, taken)))
    for hook in hooks:
        hook.remove()
    return len(found)


def measure(branches: int) -> tuple[tuple[str, ...], float, float, float]:
    """Return the row of a net, and what grows: its nodes, seconds of capture and seconds of export."""
    inputs = [torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in range(INPUTS)]
    captures, exports = [], []
    with net_of(branches) as net, torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        for _ in range(REPEATS):
            with mock.patch.object(torch.export, "export", wraps=torch.export.export) as traced:
                started = time.perf_counter()
                gm = fxopt.capture(net, (inputs[0],), dynamic_shapes=({0: "batch"},))
                captures.append(time.perf_counter() - started)
            started = time.perf_counter()
            to_onnx(gm, Path(folder) / "net.onnx", validate=False)
            exports.append(time.perf_counter() - started)
        session = Session(Path(folder) / "net.onnx", threads=1)
        equal = sum(torch.equal(gm(x), net(x)) for x in inputs)
        close = sum(torch.allclose(session.run([x])[0], net(x), rtol=1e-4, atol=1e-5) for x in inputs)
        nodes = sum(len(module.graph.nodes) for module in graph_modules(gm))
        cells = (
            str(branches),
            str(traced.call_count),
            f"{nodes:,}",
            f"{nodes / branches:.1f}",
            f"{statistics.median(captures):.1f}",
            f"{statistics.median(exports):.2f}",
            str(ways(net, inputs)),
            f"{equal}/{INPUTS}",
            f"{close}/{INPUTS}",
        )
    return cells, nodes, statistics.median(captures), statistics.median(exports)


def main(console: Console | None = None, *, quick: bool = False) -> None:
    """Print the table, as Markdown, with the exponents of growth in its last row.

    Args:
        console: Where to print.
        quick: Leave out the largest net.
    """
    console = console or Console()
    sizes = list(SIZES[:-1] if quick else SIZES)
    write_row(console, HEADER)
    write_row(console, ("---:",) * len(HEADER))
    grown = []
    with one_thread():
        with net_of(2) as warm:
            fxopt.capture(warm, (torch.randn(3, WIDTH),))
        for size in sizes:
            cells, *numbers = measure(size)
            write_row(console, cells)
            grown.append(numbers)
    ends = [sizes[0], sizes[-1]]
    nodes, capture, export = (
        f"{exponent(ends, [first, last]):.2f}" for first, last in zip(grown[0], grown[-1], strict=True)
    )
    write_row(console, ("exponent", "", nodes, "", capture, export, "", "", ""))


if __name__ == "__main__":
    main()
