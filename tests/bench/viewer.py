"""The page of a graph in headless Chromium: how long until it can be used, and how long a frame takes while panning.

"ready" is the browser's own clock from the start of the navigation until the first picture is drawn and keys work.
Frames are panned with all groups open, once with the whole graph in the window and once where text can be read: the
time between frames (60 a second are asked for), and the time that our own program takes to draw. There is no GPU:
Chromium draws on the CPU, as one thread among others.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console

import fxopt
import fxopt.tools.viz
from fxopt.tools.viz import Edge, Graph, Node
from fxopt.tools.viz.document import Stage, document
from fxopt.tools.viz.web_page import html_text
from tests.bench.zoo_table import write_row
from tests.tools.viz.browser import Browser, why_not

HEADER = (
    "graph", "nodes", "write s", "MB", "ready s", "open all s", "frame ms, whole", "p95", "frame ms, near", "p95",
    "draw ms, whole", "draw ms, near",
)  # fmt: skip
FRAMES = 150
PAN = """
const times = [], drawn = [];
let last = null;
const frame = (now) => {
  if (last !== null) times.push(now - last);
  last = now;
  const start = performance.now();
  fxopt.state.camera.y -= 9; fxopt.state.camera.x += Math.sin(now / 100);
  fxopt.draw();
  drawn.push(performance.now() - start);
  if (times.length < FRAMES) requestAnimationFrame(frame); else done([times, drawn]);
};
requestAnimationFrame(frame);
""".replace("FRAMES", str(FRAMES))


def synthetic(count: int, *, modules: bool) -> Graph:
    """Return a graph of residual blocks of 10 nodes, 10 blocks a stage; without modules it is one flat level."""
    nodes: list[Node] = []
    for at in range(count):
        block, place = divmod(at, 10)
        stage = block // 10
        path = (f"stage{stage} (Stage)", f"stage{stage}.{block % 10} (Block)") if modules else ()
        reads = [at - 1] if at else []
        if place == 9 and at > 10:
            reads.append(at - 9)
        nodes.append(
            Node(
                f"n{at}",
                ("aten.conv2d", "aten.batch_norm", "aten.relu", "aten.add")[at % 4],
                ("layer", "normalization", "activation", "arithmetic")[at % 4],
                path,
                tuple(Edge(f"n{read}", "self", "f32[1, 64, 56, 56]") for read in reads),
                ("f32[1, 64, 56, 56]",),
                line=f"net.py:{at % 97}, in forward: x = self.conv(x)",
                values={"MACs": 1000 * (at % 91)},
            )
        )
    return Graph(tuple(nodes))


def subjects(*, quick: bool) -> Iterator[tuple[str, Graph]]:
    """Yield the graphs."""
    import torchvision

    net = torchvision.models.swin_t(weights=None).eval()
    yield "Swin-T", fxopt.tools.viz.fx_graph(fxopt.capture(net, (torch.randn(1, 3, 224, 224),)))
    for count in (10_000,) if quick else (1_000, 10_000):
        yield f"{count:,} in modules", synthetic(count, modules=True)
        yield f"{count:,} flat", synthetic(count, modules=False)


def measured(browser: Browser, name: str, graph: Graph, folder: Path) -> tuple[object, ...]:
    """Return one row of the table."""
    page = folder / "graph.html"
    started = time.perf_counter()
    page.write_text(html_text(document([Stage(graph, name)], name)), encoding="utf-8")
    written = time.perf_counter() - started
    ready = []
    for _ in range(3):
        browser.open(page)
        ready.append(int(browser.run("return document.documentElement.dataset.readyAfter")) / 1e3)
    opened = browser.run("const t = performance.now(); fxopt.setAll(true); return performance.now() - t") / 1e3
    row: list[object] = [name, f"{len(graph.nodes):,}", f"{written:.2f}", f"{page.stat().st_size / 1e6:.2f}"]
    row += [f"{statistics.median(ready):.2f}", f"{opened:.2f}"]
    draws = []
    for zoom in ("document.getElementById('fit').click()", "fxopt.state.camera.zoom = 0.6"):
        browser.run(zoom)
        times, drawn = browser.wait(PAN)
        row += [f"{statistics.median(times):.1f}", f"{statistics.quantiles(times, n=20)[-1]:.1f}"]
        draws.append(f"{statistics.median(drawn):.1f}")
    if errors := browser.errors():
        raise RuntimeError(f"the page of {name} logs {errors}")
    return (*row, *draws)


def main(console: Console | None = None, *, quick: bool = False) -> None:
    """Print the table."""
    console = console or Console()
    if reason := why_not():
        console.print(f"left out: {reason}")
        return
    write_row(console, HEADER)
    browser = Browser()
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name, graph in subjects(quick=quick):
                write_row(console, measured(browser, name, graph, Path(folder)))
    finally:
        browser.close()


if __name__ == "__main__":
    main()
