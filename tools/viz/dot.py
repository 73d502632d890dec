"""A graph as DOT text, and by Graphviz as SVG: for papers, terminals and other tools."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator

from fxopt.errors import FxoptError, describe
from fxopt.tools.viz.groups import TOP, nest
from fxopt.tools.viz.model import Graph, Node

__all__ = ["dot_text", "svg_text"]

_COLOURS = {
    "input": "#eeeeee", "output": "#eeeeee", "quantize": "#f5c6a5", "layer": "#bcd5f0", "normalization": "#cfe8cf",
    "activation": "#f3e3a1", "reduction": "#dccdf0", "control": "#f2bfc9", "shape": "#dfe3e8",
    "arithmetic": "#e9dfd3", "other": "#ffffff",
}  # fmt: skip


def dot_text(graph: Graph) -> str:
    """Return the graph in Graphviz' language, its groups as clusters."""
    nesting = nest(graph)
    inside: dict[int, list[int]] = {}
    for index, group in enumerate(nesting.groups):
        inside.setdefault(group.parent, []).append(index)
    members: dict[int, list[Node]] = {}
    for node, parent in zip(graph.nodes, nesting.group_of, strict=True):
        members.setdefault(parent, []).append(node)

    def lines(group: int, indent: str) -> Iterator[str]:
        for node in members.get(group, ()):
            label = "\\n".join(_escaped(text) for text in (node.op, node.id, *node.outputs))
            yield f'{indent}"{_escaped(node.id)}" [label="{label}", fillcolor="{_COLOURS[node.kind]}"];'
        for index in inside.get(group, ()):
            yield f"{indent}subgraph cluster_{index} {{"
            yield f'{indent}  label="{_escaped(nesting.groups[index].label)}"; color="#888888"; style="rounded";'
            yield from lines(index, indent + "  ")
            yield f"{indent}}}"

    body = [
        f'digraph "{_escaped(graph.title)}" {{',
        '  rankdir=TB; fontname="Helvetica"; fontsize=10;',
        '  node [shape=box, style="rounded,filled", fontname="Helvetica", fontsize=10];',
        '  edge [fontname="Helvetica", fontsize=8, color="#555555"];',
        *lines(TOP, "  "),
        *(
            f'  "{_escaped(edge.source)}" -> "{_escaped(node.id)}" [tooltip="{_escaped(edge.argument)}"];'
            for node in graph.nodes
            for edge in node.inputs
        ),
        "}",
    ]
    return "\n".join(body) + "\n"


def svg_text(graph: Graph) -> str:
    """Return the graph as SVG, laid out by Graphviz.

    Raises:
        FxoptError: Graphviz is not installed, or fails.
    """
    program = shutil.which("dot")
    if program is None:
        raise FxoptError(
            describe(
                "an SVG file is laid out by Graphviz, and its program dot is not installed",
                try_="apt-get install graphviz, brew install graphviz, or graphviz.org; or write .dot or .html",
            )
        )
    done = subprocess.run([program, "-Tsvg"], input=dot_text(graph), capture_output=True, text=True, check=False)
    if done.returncode:
        raise FxoptError(describe("Graphviz cannot lay out the graph", because=done.stderr.strip()))
    return done.stdout


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
