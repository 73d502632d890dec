"""The page's content: steps, shared records, overlays; a file that asks for nothing and runs nobody's text."""

import itertools
import json
import re
from importlib import resources

import pytest
import torch
from torch import nn

import fxopt
from fxopt.export import blame, to_onnx
from fxopt.tools.viz import Edge, Graph, Node, Overlay
from fxopt.tools.viz.document import Stage, document
from fxopt.tools.viz.kinds import KINDS, kind_of
from fxopt.tools.viz.overlays import with_overlays
from fxopt.tools.viz.web_page import html_text, json_for_script

PASSES = ["fold-batch-norm", "remove-identities", "quantize"]
TEXTS = ["</script><script>alert(1)</script>", "<!--<script>", "a & b < c", "\u2028\u2029", "\"\\'", "{{DATA}}", "漢字"]


@pytest.fixture(scope="module")
def small():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    return fxopt.optimize(net.eval(), PASSES, (torch.randn(2, 3, 8, 8),), keep_graphs=True, check="samples")


def page_of(tmp_path, *args, **options):
    return fxopt.view(*args, tmp_path / "graph.html", **options).read_text()


def content_of(page):
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(data)


def test_there_is_a_step_for_the_captured_graph_and_each_pass(small, tmp_path):
    content = content_of(page_of(tmp_path, small))
    assert [step["label"] for step in content["steps"]] == ["captured", *(step.name for step in small.report.steps)]
    for step, gm in zip(content["steps"], small.report.graphs, strict=True):
        records = [content["records"][number] for number in content["graphs"][step["graph"]]["nodes"]]
        assert [record["id"] for record in records] == [node.name for node in gm.graph.nodes if node.op != "get_attr"]


def test_differences_of_a_step_are_those_of_its_pass(small, tmp_path):
    content = content_of(page_of(tmp_path, small))
    graph = content["graphs"][content["steps"][1]["sincePrevious"]]
    found = {content["records"][graph["nodes"][int(at)]]["id"]: held for at, held in graph["differences"].items()}
    assert found["batch_norm (before)"] == {"status": "removed", "why": "folded into conv2d", "was": ["batch_norm"]}
    unchanged = content["graphs"][content["steps"][2]["sincePrevious"]]
    assert all(held["status"] != "added" for held in unchanged["differences"].values())


def test_differences_since_the_start_have_the_reasons_of_all_steps(small, tmp_path):
    content = content_of(page_of(tmp_path, small))
    graph = content["graphs"][content["steps"][-1]["sinceFirst"]]
    found = {content["records"][graph["nodes"][int(at)]]["id"]: held for at, held in graph["differences"].items()}
    assert found["batch_norm (before)"]["why"] == "folded into conv2d"
    assert any("as uint8" in held.get("why", "") for held in found.values())


def test_a_node_that_stays_the_same_is_written_once(small, tmp_path):
    content = content_of(page_of(tmp_path, small))
    ids = [record["id"] for record in content["records"]]
    assert ids.count("x" if "x" in ids else ids[0]) == 1


def test_a_report_is_shown_like_its_graph(small, tmp_path):
    assert content_of(page_of(tmp_path, small.report))["steps"] == content_of(page_of(tmp_path, small))["steps"]


def test_a_report_without_graphs_is_refused(tmp_path):
    report = fxopt.optimize(nn.ReLU(), "remove-identities", (torch.randn(2),)).report
    with pytest.raises(fxopt.FxoptError, match=r"the report holds no graphs\n  try  fxopt.optimize.*keep_graphs=True"):
        fxopt.view(report, tmp_path / "graph.html")


def test_two_graphs_are_compared(small, tmp_path):
    before = fxopt.capture(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), (torch.randn(2, 3),))
    after = fxopt.capture(nn.Sequential(nn.Linear(3, 3), nn.GELU()), (torch.randn(2, 3),))
    content = content_of(page_of(tmp_path, after, against=before))
    assert [step["label"] for step in content["steps"]] == ["before: graph", "after: graph"]
    statuses = {
        held["status"] for held in content["graphs"][content["steps"][1]["sincePrevious"]]["differences"].values()
    }
    assert {"added", "removed"} <= statuses


@pytest.mark.ort
def test_overlays_stand_on_the_nodes_of_the_last_step(small, tmp_path):
    report = blame(to_onnx(small), small)
    overlays = {"error": report, "time": Overlay({"conv2d": 2.5}, unit="ms", combine="sum"), "who": {"conv2d": "me"}}
    content = content_of(page_of(tmp_path, small, overlays=overlays))
    first, *_, last = (
        {content["records"][n]["id"]: content["records"][n] for n in content["graphs"][step["graph"]]["nodes"]}
        for step in content["steps"]
    )
    values = last["conv2d"]["values"]
    assert values["error: total"] == report.of("conv2d").total.sqnr_db
    assert (values["time"], values["who"], values["quantized"], values["dtype"]) == (2.5, "me", "quantized", "float32")
    assert "time" not in first["conv2d"]["values"]
    assert content["overlays"]["time"] == {"unit": "ms", "combine": "sum", "lowIsBad": False}
    assert content["overlays"]["error: total"]["lowIsBad"]
    assert content["overlays"]["who"]["words"] == ["me"]


@pytest.mark.ort
def test_an_overlay_finds_the_onnx_nodes_that_a_node_became(tmp_path):
    file = to_onnx(fxopt.capture(nn.Hardswish(), (torch.randn(2, 3),)))
    content = content_of(page_of(tmp_path, file, overlays={"time": {"hardswish": 1.0}}))
    assert [record["op"] for record in content["records"] if "time" in record.get("values", {})] == ["Mul"]


def test_of_several_nodes_made_from_one_the_last_answers_for_it():
    graph = Graph(tuple(Node(f"a/{i}", "op", origins=("a",)) for i in range(3)))
    shown = with_overlays(graph, {"time": Overlay({"a": 1.0})})
    assert [node.values.get("time") for node in shown.nodes] == [None, None, 1.0]


@pytest.mark.parametrize(
    ("overlay", "error", "text"),
    [
        ({"nobody": 1.0}, ValueError, "overlay 'mine' has values for what is no node of the graph"),
        ({}, ValueError, "an overlay has no values"),
        ({"relu": float("nan")}, ValueError, "an overlay has nan for 'relu'; wanted finite numbers"),
        ({"relu": [1]}, TypeError, "an overlay has list for 'relu'"),
        ({"relu": 1, "input": "a"}, TypeError, "both numbers and words"),
        (3, TypeError, "overlay 'mine' is a int; wanted a dictionary"),
    ],
    ids=["strange node", "empty", "nan", "list", "mixed", "number"],
)
def test_a_wrong_overlay_is_refused(overlay, error, text, tmp_path):
    gm = fxopt.capture(nn.ReLU(), (torch.randn(2),))
    with pytest.raises(error, match=re.escape(text)):
        fxopt.view(gm, tmp_path / "graph.html", overlays={"mine": overlay})


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        (lambda: nn.ReLU(), TypeError, r"ReLU is not a graph yet\n  try  fxopt.view\(fxopt.capture"),
        (lambda: 3, TypeError, "there is no picture of a int"),
        (lambda: "missing.onnx", fxopt.ExportError, "cannot read the model"),
        (lambda: b"no model", fxopt.ExportError, "cannot read the model"),
    ],
    ids=["module", "number", "missing file", "other bytes"],
)
def test_what_is_no_graph_is_refused(given, error, text, tmp_path):
    with pytest.raises(error, match=text):
        fxopt.view(given(), tmp_path / "graph.html")


def test_an_unknown_suffix_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"cannot tell the format of .*graph\.png"):
        fxopt.view(fxopt.capture(nn.ReLU(), (torch.randn(2),)), tmp_path / "graph.png")


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_survives_and_none_ends_the_script(text):
    written = json_for_script({"a": text})
    assert json.loads(written) == {"a": text}
    assert "<" not in written


@pytest.mark.parametrize("text", TEXTS)
def test_a_page_has_the_same_elements_whatever_the_names_are(text):
    def page(name):
        nodes = (Node(name, name, path=(name,), line=name), Node("b", "b", path=(name,), inputs=(Edge(name, name),)))
        return html_text(document([Stage(Graph(nodes), name, name)], name))

    assert re.findall(r"<[/!a-zA-Z]+", page(text)) == re.findall(r"<[/!a-zA-Z]+", page("plain"))
    assert content_of(page(text))["records"][0]["id"] == text


def test_the_page_asks_nobody_for_anything(small, tmp_path):
    page = page_of(tmp_path, small)
    assert "default-src 'none'" in page
    assert not re.search(
        r"https?://|//[a-z]+\.[a-z]+/|\b(src|href)\s*=|url\(|@import|\bfetch\(|XMLHttpRequest|sourceMapping", page
    )
    assert "innerHTML" not in page.replace("dagre", "")


def test_numbers_that_json_has_not_do_not_get_into_the_page():
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_for_script({"a": float("nan")})


# ---- colours


def palettes():
    style = resources.files("fxopt.tools.viz").joinpath("page", "style.css").read_text()
    light, dark = re.findall(r":root(?:\.dark)? \{(.*?)\n\}", style, re.DOTALL)
    return {
        name: dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", text))
        for name, text in (("light", light), ("dark", dark))
    }


def contrast(one, other):
    """Return the contrast of two colours, 1 to 21. Source: WCAG 2.2, relative luminance and contrast ratio."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("name", ["light", "dark"])
def test_text_can_be_read_on_what_it_stands_on(name):
    colours = palettes()[name]
    fills = [key for key in colours if re.match(r"kind-|scale-|word-|none$|group|.*-fill$", key)]
    assert len(fills) > 25
    pairs = [("item-text", fill) for fill in fills]
    pairs += list(
        itertools.product(
            ("text", "muted", "accent", "added", "removed", "changed", "rewired"), ("background", "surface")
        )
    )
    pairs += [("text", "group"), ("text", "group-deep")]
    assert {
        pair: contrast(*(colours[key] for key in pair))
        for pair in pairs
        if contrast(*(colours[key] for key in pair)) < 4.5
    } == {}
    lines = [(key, ground) for key in ("line", "border", "accent") for ground in ("background", "group", "group-deep")]
    assert {pair: 0 for pair in lines if contrast(*(colours[key] for key in pair)) < 3} == {}


def test_both_themes_have_every_colour_that_the_program_asks_for():
    light, dark = palettes().values()
    assert set(light) == set(dark)
    assert {f"kind-{kind}" for kind in KINDS} <= set(light)


@pytest.mark.parametrize(
    ("op", "kind"),
    [
        ("aten.conv2d", "layer"), ("Conv", "layer"), ("com.microsoft.QLinearConv", "layer"), ("aten.linear", "layer"),
        ("aten.scaled_dot_product_attention", "layer"), ("QLinearMatMul", "layer"),
        ("aten.batch_norm", "normalization"), ("LayerNormalization", "normalization"),
        ("aten._softmax", "normalization"), ("aten.relu_", "activation"), ("HardSwish", "activation"),
        ("com.microsoft.QLinearAdd", "arithmetic"), ("aten.add", "arithmetic"), ("QuantizeLinear", "quantize"),
        ("fxopt.dequantize", "quantize"), ("fxopt.fake_quantize", "quantize"), ("aten.view", "shape"),
        ("Concat", "shape"), ("If", "control"), ("while_loop", "control"), ("cond", "control"),
        ("MaxPool", "reduction"), ("aten.mean", "reduction"), ("my.own.Mystery", "other"),
        ("DynamicQuantizeLinear", "quantize"), ("DynamicQuantizeLSTM", "layer"), ("MatMulInteger", "layer"),
    ],
)  # fmt: skip
def test_kinds(op, kind):
    assert kind_of(op) == kind
