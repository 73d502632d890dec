"""DOT text and SVG."""

import re
import shutil
import subprocess

import pytest
import torch
from torch import nn

import fxopt
from fxopt.tools.viz import Edge, Graph, Node
from fxopt.tools.viz.dot import dot_text

NAME = 'a "quoted" \\ name\n</b>'


def graph():
    return Graph(
        (
            Node("x", "input", "input", outputs=("f32[2]",)),
            Node(NAME, "op", path=("m",), inputs=(Edge("x", "self"),)),
            Node("b", "op", path=("m",), inputs=(Edge(NAME, "self"),)),
        )
    )


def test_dot_holds_every_node_edge_and_group():
    text = dot_text(graph())
    assert text.count("->") == 2
    assert 'label="m"' in text
    assert 'label="input\\nx\\nf32[2]"' in text


@pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz is not installed")
def test_graphviz_reads_back_the_names():
    done = subprocess.run(["dot", "-Tplain"], input=dot_text(graph()), capture_output=True, text=True, check=True)
    assert len(re.findall(r"^node ", done.stdout, re.MULTILINE)) == 3
    assert len(re.findall(r"^edge ", done.stdout, re.MULTILINE)) == 2


@pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz is not installed")
def test_an_svg_shows_every_node(tmp_path):
    gm = fxopt.capture(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), (torch.randn(2, 3),))
    text = fxopt.view(gm, tmp_path / "graph.svg").read_text()
    assert text.count('class="node"') == 4
    assert ">aten.linear<" in text


def test_without_graphviz_an_svg_is_refused_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    gm = fxopt.capture(nn.ReLU(), (torch.randn(2),))
    with pytest.raises(fxopt.FxoptError, match=r"dot is not installed\n  try  apt-get install graphviz"):
        fxopt.view(gm, tmp_path / "graph.svg")
    assert not (tmp_path / "graph.svg").exists()
