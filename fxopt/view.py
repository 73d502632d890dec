"""Pictures of graphs. The work is done in ``fxopt.tools.viz``, which is imported when it is asked for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["view"]


def view(
    model: Any,
    path: str | os.PathLike[str] = "graph.html",
    *,
    against: Any = None,
    overlays: Mapping[str, Any] | None = None,
    title: str | None = None,
) -> Path:
    """Write a picture of a graph and return its path. An HTML file holds all it needs: no server, no network.

    Args:
        model: A GraphModule; a graph or report made with ``keep_graphs=True``, whose steps get a slider; or an ONNX
            model, whoever made it: a file, bytes, a ModelProto, an :class:`fxopt.export.OnnxFile`.
        path: Where to write; the suffix tells the format: ``.html``, ``.svg`` (by Graphviz), ``.dot`` or ``.json``.
        against: What to compare with, of any of these kinds: the page shows what is new, gone and changed.
        overlays: What nodes can be coloured by beside what the graph itself tells, by name: numbers or words by node,
            ``{"mine": {"conv2d": 0.7}}``; an ``fxopt.tools.viz.Overlay``, which has a unit; a report of
            :func:`fxopt.export.blame`; or the times of :func:`fxopt.export.node_times`.
        title: Of the page.

    Raises:
        TypeError: there is no picture of such a thing, or an overlay has other values than numbers and words.
        ValueError: the suffix is unknown, or an overlay has values for what is no node.
        ExportError: an ONNX file cannot be read, or the picture not be written.
        FxoptError: a report without graphs; or an SVG file is asked for, and Graphviz is not installed.
    """
    from fxopt.tools.viz import view as write

    return write(model, path, against=against, overlays=overlays, title=title)
