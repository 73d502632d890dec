"""The page in headless Chromium: what people do with it works, no error is logged, and nothing is asked for."""

import pytest
import torch
from torch import nn

import fxopt
from fxopt.tools.viz import Edge, Graph, Node, Overlay
from fxopt.tools.viz.document import Stage, document
from fxopt.tools.viz.web_page import html_text
from tests.tools.viz.browser import Browser, needs_browser
from tests.tools.viz.foreign_files import NAMES, foreign

pytestmark = [pytest.mark.browser, needs_browser]

ESCAPE = "\ue00c"  # WebDriver's codes of keys
ENTER, LEFT, DOWN = "\ue007", "\ue012", "\ue015"
SHOWN = "fxopt.state.scene.items.map((box) => box.item.key)"
SET = "const part = document.getElementById(arguments[0]); part.value = arguments[1]; "
SET += "part.dispatchEvent(new Event('input')); part.dispatchEvent(new Event('change'));"


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x)).relu()


@pytest.fixture(scope="module")
def small():
    net = nn.Sequential(Block(3), Block(4), nn.Flatten(), nn.Linear(4 * 36, 2)).eval()
    passes = ["fold-batch-norm", "remove-identities", "quantize{recipe=fast}"]
    return fxopt.optimize(net, passes, (torch.randn(2, 3, 6, 6),), keep_graphs=True, check="samples")


@pytest.fixture(scope="module")
def file(small, tmp_path_factory):
    overlays = {"mine": {"conv2d": 1.0, "conv2d_1": 3.0, "linear": 5.0}}
    return fxopt.view(small, tmp_path_factory.mktemp("page") / "graph.html", overlays=overlays, title="Small")


@pytest.fixture(scope="module")
def shared():
    browser = Browser()
    yield browser
    browser.close()


@pytest.fixture
def browser(shared, file):
    shared.open(file)
    yield shared
    assert shared.errors() == []


def test_it_opens_and_asks_for_nothing_but_itself(shared, file):
    shared.requests()
    shared.open(file)
    assert shared.driver.title == "Small"
    assert shared.run("return document.documentElement.dataset.readyAfter") is not None
    assert shared.requests() == [file.as_uri()]
    assert shared.errors() == []


def test_something_is_drawn(browser):
    colours = browser.run(
        "fxopt.draw(); const c = document.getElementById('canvas'); "
        "const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; const seen = new Set(); "
        "for (let i = 0; i < d.length; i += 4) seen.add(d[i] + ',' + d[i + 1] + ',' + d[i + 2]); return seen.size"
    )
    assert colours > 20


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("flatten", "flatten"),
        ("conv2d_1", "conv2d_1"),
        ("return self.norm(self.conv(x))", "batch"),
        ("3.weight", "dequantize"),
    ],
    ids=["operator", "name", "line", "weight"],
)
def test_search_finds(browser, text, wanted):
    browser.press("/")
    browser.press(*text)
    results = browser.run("return [...document.querySelectorAll('#results button')].map((b) => b.textContent)")
    assert results
    found = browser.run("return [...fxopt.state.matches].map((item) => item.key)")
    assert len(found) == len(results)
    if wanted != "batch":
        assert any(wanted in key for key in found)


def test_a_search_without_result_says_so(browser):
    browser.press("/", *"nowhere")
    assert browser.run("return document.getElementById('results').textContent") == "0 found"


def test_enter_in_the_search_shows_the_first_result_even_in_a_closed_group(browser):
    browser.run("fxopt.setAll(false)")
    assert "conv2d_1" not in browser.run(f"return {SHOWN}")
    browser.press("/", *"conv2d_1", ENTER)
    assert browser.run("return fxopt.state.selected.key") == "conv2d_1"
    assert "conv2d_1" in browser.run(f"return {SHOWN}")
    assert "aten.conv2d" in browser.run("return document.getElementById('details').textContent")


def test_a_group_closes_and_opens_by_keyboard(browser):
    browser.run("fxopt.setAll(true); fxopt.select(fxopt.state.view.groups.find((g) => g.label === '0 (Block)'))")
    browser.run("document.getElementById('canvas').focus()")
    before = browser.run(f"return {SHOWN}")
    assert "conv2d" in before
    browser.press(ENTER)
    closed = browser.run(f"return {SHOWN}")
    assert "conv2d" not in closed
    assert "/0 (Block)" in closed
    browser.press(ENTER)
    assert browser.run(f"return {SHOWN}") == before


def test_closed_groups_show_how_many_nodes_they_hold(browser):
    browser.run("fxopt.setAll(false)")
    groups = browser.run(
        "return fxopt.state.view.groups.map((g) => [g.count, fxopt.state.view.nodes.filter((n) => "
        "{ for (let p = n.parent; p; p = p.parent) if (p === g) return true; return false; }).length])"
    )
    assert groups
    assert all(count == held for count, held in groups)


def test_the_slider_moves_through_the_steps(browser, small):
    for step, gm in enumerate(small.report.graphs):
        browser.run(SET, "since", "graph")
        browser.run(SET, "step", str(step))
        ids = browser.run("return fxopt.state.view.nodes.map((node) => node.key)")
        assert ids == [node.name for node in gm.graph.nodes if node.op != "get_attr"]
    assert browser.run("return document.getElementById('stepName').textContent").startswith("3: quantize")


def test_what_is_in_the_middle_stays_there_when_the_slider_moves(browser):
    where = (
        "const { camera, scene, view } = fxopt.state; const box = scene.of.get(view.byId.get('flatten')); "
        "return [box.x * camera.zoom + camera.x, box.y * camera.zoom + camera.y]"
    )
    browser.run(SET, "step", "1")
    browser.run("fxopt.reveal(fxopt.state.view.byId.get('flatten'))")
    before = browser.run(where)
    browser.run(SET, "step", "3")  # with more nodes above it
    assert browser.run(where) == pytest.approx(before)


def test_the_brackets_step_back_and_on(browser):
    browser.press("[")
    assert browser.run("return fxopt.state.step") == 2
    browser.press("]")
    assert browser.run("return fxopt.state.step") == 3


def statuses(browser, step, since):
    browser.run(SET, "step", str(step))
    browser.run(SET, "since", since)
    return browser.run("return fxopt.state.view.nodes.map((n) => [n.key, n.record.op, n.difference?.status ?? null])")


def test_changes_show_the_folded_batch_norms(browser):
    found = {key: status for key, _, status in statuses(browser, 1, "sincePrevious")}
    assert (found["batch_norm (before)"], found["conv2d"]) == ("removed", "changed")
    browser.run("fxopt.reveal(fxopt.state.view.byId.get('batch_norm (before)'))")
    assert "folded into conv2d" in browser.run("return document.getElementById('details').textContent")


def test_changes_show_the_inserted_quantizers(browser, small):
    found = statuses(browser, 3, "sincePrevious")
    added = [op for _, op, status in found if status == "added"]
    wanted = [str(node.target).split(".")[1] for node in small.graph.nodes if "quantize" in str(node.target)]
    assert sorted(added) == sorted(f"fxopt.{name}" for name in wanted)
    both = {key for key, _, status in statuses(browser, 3, "sinceFirst") if status == "removed"}
    assert "batch_norm (before)" in both


FILLS = (
    "return Object.fromEntries(fxopt.state.view.nodes.map((n) => [n.key, "
    "fxopt.state.colours[fxopt.fillName(n, fxopt.state.colouring)]]))"
)


def colour(browser, name):
    return browser.run(
        "return getComputedStyle(document.documentElement).getPropertyValue(arguments[0]).trim()", f"--{name}"
    )


def test_colours_of_an_overlay_match_its_numbers(browser):
    browser.run(SET, "overlay", "mine")
    fills = browser.run(FILLS)
    # 1, 3 and 5 in five equal parts of [1, 5]
    assert fills["conv2d"] == colour(browser, "scale-0")
    assert fills["conv2d_1"] == colour(browser, "scale-2")
    assert fills["linear"] == colour(browser, "scale-4")
    assert fills["flatten"] == colour(browser, "none")
    legend = browser.run("return [...document.querySelectorAll('#legend li')].map((li) => li.textContent)")
    assert (legend[0], legend[-1]) == ("1 to 1.8", "4.2 to 5")


def test_colours_of_words_match_the_words(browser):
    browser.run(SET, "overlay", "quantized")
    fills = browser.run(FILLS)
    values = browser.run(
        "return Object.fromEntries(fxopt.state.view.nodes.map((n) => [n.key, n.record.values?.quantized ?? null]))"
    )
    words = sorted({word for word in values.values() if word})
    assert {"Q/DQ", "quantized"} <= set(words)
    names = browser.run("return fxopt.content.overlays.quantized.words")
    for key, word in values.items():
        assert fills[key] == colour(browser, "none" if word is None else f"word-{names.index(word)}")


def test_a_group_of_several_words_has_none_of_their_colours(browser):
    browser.run(SET, "overlay", "dtype")
    shown = browser.run(
        "return fxopt.state.view.groups.map((g) => [fxopt.fillName(g, fxopt.state.colouring), g.count])"
    )
    words = browser.run(
        "const own = (item) => [item.record.values?.dtype].filter(Boolean); "
        "const words = (item) => (item.record ? own(item) : item.items.flatMap(words)); "
        "return fxopt.state.view.groups.map((g) => [...new Set(words(g))])"
    )
    assert any(len(held) > 1 for held in words)
    for (name, _), held in zip(shown, words, strict=True):
        assert name.startswith("word-") is (len(held) == 1)


def test_where_low_is_bad_the_lowest_number_is_the_striking_one(shared, tmp_path):
    gm = fxopt.capture(nn.Sequential(nn.ReLU(), nn.Sigmoid(), nn.Tanh()), (torch.randn(2),))
    noise = Overlay({"relu": 10.0, "sigmoid": 30.0, "tanh": 50.0}, unit="dB", combine="min", low_is_bad=True)
    shared.open(fxopt.view(gm, tmp_path / "graph.html", overlays={"noise": noise}))
    shared.run(SET, "overlay", "noise")
    fills = shared.run(FILLS)
    assert [fills[name] for name in noise.values] == [colour(shared, f"scale-{bin_}") for bin_ in (4, 2, 0)]
    legend = shared.run("return [...document.querySelectorAll('#legend li')].map((li) => li.textContent)")
    assert (legend[0], legend[-1]) == ("42 dB to 50 dB", "10 dB to 18 dB")


def test_edges_run_between_what_stands_side_by_side(browser):
    wrong = browser.run(
        "const { view } = fxopt.state; return [view.root, ...view.groups].flatMap((g) => [...g.edges.values()]"
        ".filter((e) => [e.from, e.to].some((end) => typeof end !== 'string' && end.parent !== g)))"
        ".map((e) => [e.from.key ?? e.from, e.to.key ?? e.to])"
    )
    assert wrong == []
    missing = browser.run(
        "const { view } = fxopt.state; const drawn = (g) => [...g.edges.values()]; "
        "return view.nodes.flatMap((n) => (n.record.inputs ?? []).map(([id]) => [view.byId.get(id), n]))"
        ".filter(([s, r]) => s.parent === r.parent && !drawn(s.parent).some((e) => e.from === s && e.to === r))"
        ".map(([s, r]) => [s.key, r.key])"
    )
    assert missing == []
    inner = browser.run(
        "const g = fxopt.state.view.byId.get('conv2d').parent; "
        "return [...g.edges.values()].map((e) => [e.from.key ?? e.from, e.to.key ?? e.to])"
    )
    assert ["above", "conv2d"] in inner


def test_groups_show_the_sum_of_their_nodes(browser):
    browser.run(SET, "overlay", "MACs")
    sums = browser.run("return fxopt.state.view.groups.map((g) => [fxopt.state.colouring.numberOf(g), g.key])")
    block = next(number for number, key in sums if key == "/0 (Block)")
    assert block == 2 * 4 * 36 * 27


def test_the_pixel_of_a_node_has_the_colour_of_its_number(browser):
    browser.run(SET, "overlay", "mine")
    browser.run("fxopt.reveal(fxopt.state.view.byId.get('linear')); fxopt.select(null); fxopt.draw()")
    pixel = browser.run(
        "const { camera, ratio, scene, view } = fxopt.state; const box = scene.of.get(view.byId.get('linear')); "
        "const x = ((box.x + 8) * camera.zoom + camera.x) * ratio, y = ((box.y + 8) * camera.zoom + camera.y) * ratio; "
        "return [...document.getElementById('canvas').getContext('2d').getImageData(x, y, 1, 1).data].slice(0, 3)"
    )
    assert "#" + "".join(f"{part:02x}" for part in pixel) == colour(browser, "scale-4")


def test_keys_move_and_zoom(browser):
    browser.run("document.getElementById('canvas').focus()")
    before = browser.run("return { ...fxopt.state.camera }")
    browser.press(LEFT, DOWN)
    moved = browser.run("return { ...fxopt.state.camera }")
    assert (moved["x"] - before["x"], moved["y"] - before["y"]) == pytest.approx((60, -60))
    browser.press("+")
    assert browser.run("return fxopt.state.camera.zoom") == pytest.approx(moved["zoom"] * 1.25)


def test_j_and_k_go_through_all_that_is_visible(browser):
    shown = browser.run(f"return {SHOWN}")
    browser.run("document.getElementById('canvas').focus()")
    seen = []
    for _ in shown:
        browser.press("j")
        seen.append(browser.run("return fxopt.state.selected.key"))
    assert seen == shown
    browser.press("k")
    assert browser.run("return fxopt.state.selected.key") == shown[-2]
    assert shown[-2].split("/")[-1].split("#")[0] in browser.run("return document.getElementById('live').textContent")


def test_escape_closes_what_is_open(browser):
    browser.press("?")
    assert not browser.run("return document.getElementById('keys').hidden")
    browser.press(ESCAPE)
    assert browser.run("return document.getElementById('keys').hidden")
    browser.run("fxopt.select(fxopt.state.view.nodes[0])")
    browser.press(ESCAPE)
    assert browser.run("return document.getElementById('details').hidden")


def test_a_click_selects_and_a_drag_moves(browser):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    browser.run("fxopt.reveal(fxopt.state.view.byId.get('flatten')); fxopt.select(null)")
    x, y = browser.run(
        "const { camera, scene, view } = fxopt.state; const box = scene.of.get(view.byId.get('flatten')); "
        "const c = document.getElementById('canvas'); "
        "return [(box.x + 10) * camera.zoom + camera.x - c.clientWidth / 2, "
        "(box.y + 10) * camera.zoom + camera.y - c.clientHeight / 2]"
    )
    canvas = browser.driver.find_element(By.ID, "canvas")
    ActionChains(browser.driver).move_to_element_with_offset(canvas, x, y).click().perform()
    assert browser.run("return fxopt.state.selected.key") == "flatten"
    before = browser.run("return { ...fxopt.state.camera }")
    ActionChains(browser.driver).click_and_hold(canvas).move_by_offset(-30, 20).release().perform()
    after = browser.run("return { ...fxopt.state.camera }")
    assert (after["x"] - before["x"], after["y"] - before["y"]) == pytest.approx((-30, 20), abs=6)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_scheme_follows_the_system_and_the_button(shared, file, dark):
    shared.open(file, dark=dark)
    now = "return document.documentElement.classList.contains('dark')"
    assert shared.run(now) is dark
    shared.run("document.getElementById('theme').click()")
    assert shared.run(now) is not dark
    assert shared.errors() == []


def test_every_control_has_a_name(browser):
    nameless = browser.run(
        "return [...document.querySelectorAll('button, input, select, canvas, aside, section')].filter((part) => "
        "!(part.textContent.trim() || part.ariaLabel || part.labels?.length)).map((part) => part.outerHTML)"
    )
    assert nameless == []


def test_every_foreign_file_opens(shared, tmp_path):
    for name in NAMES:
        model = foreign(name, tmp_path)
        page = fxopt.view(model, tmp_path / "graph.html", title=name)
        shared.open(page)
        shared.run("fxopt.setAll(true)")
        assert shared.driver.title == name
        assert shared.run(f"return {SHOWN}.length") == shared.run("return fxopt.state.view.nodes.length")
        assert shared.errors() == [], name


def test_names_of_users_are_text_and_do_not_run(shared, tmp_path):
    evil = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked=2'>"
    texts = {"line": evil, "why": evil, "pass_name": evil}
    nodes = (
        Node(evil, evil, path=(evil,), attributes=((evil, evil),), outputs=(evil,), **texts),
        Node("b", evil, path=(evil,), inputs=(Edge(evil, evil, evil),)),
    )  # fmt: skip
    (tmp_path / "evil.html").write_text(html_text(document([Stage(Graph(nodes), evil, evil)], evil)))
    shared.open(tmp_path / "evil.html")
    shared.run("fxopt.reveal(fxopt.state.view.nodes[0]); fxopt.select(fxopt.state.view.groups[0])")
    shared.run(SET, "search", "script")
    assert shared.run("return document.querySelectorAll('#results button').length") == 3
    assert shared.run("return window.hacked ?? null") is None
    assert shared.run("return document.images.length") == 0
    assert shared.run("return document.querySelector('#details h2').textContent") == evil
    assert shared.errors() == []
