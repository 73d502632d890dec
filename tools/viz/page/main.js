// The page: what is shown, and what keys, mouse and controls do to it.

const FIRST_SHOWN = 70; // items that a large graph opens to
const content = JSON.parse(document.getElementById("data").textContent);
const part = (id) => document.getElementById(id);
const canvas = part("canvas");
const views = new Map();
const state = {
  view: null, scene: null, camera: { x: 0, y: 0, zoom: 1 }, selected: null, step: content.steps.length - 1, since: "graph",
  overlay: "kind", colours: null, colouring: null, ratio: 1, matches: null,
};

// ---- what is shown

function viewNumber() {
  const step = content.steps[state.step];
  return step[state.since] ?? step.graph;
}

function viewOf(number) {
  if (!views.has(number)) {
    const view = makeView(content, number);
    if (state.view) copyOpen(state.view, view);
    else openFirst(view, FIRST_SHOWN);
    views.set(number, view);
  } else if (state.view) copyOpen(state.view, views.get(number));
  return views.get(number);
}

/** Open in a view what is open in another; groups that the other has not open as at first. */
function copyOpen(from, to) {
  const known = new Map(from.groups.map((group) => [group.key, group.open]));
  for (const group of to.groups) {
    const open = known.get(group.key) ?? (group.items.length < FIRST_SHOWN && !group.like);
    if (open !== group.open) {
      group.open = open;
      forget(group);
    }
  }
}

function showView() {
  const selected = state.selected?.key;
  const fixed = state.scene ? inTheMiddle() : null;
  state.view = viewOf(viewNumber());
  recolour();
  relayout();
  if (fixed) hold(fixed);
  const again = selected === undefined ? null : (state.view.byId.get(selected) ?? state.view.groups.find((group) => group.key === selected));
  select(again ?? null, { quiet: true });
  showStep();
}

/** Return the item next to the middle of the window, and where it is on the screen. */
function inTheMiddle() {
  const { camera, scene } = state;
  const { width, height } = freeSize();
  const where = (box) => [box.x * camera.zoom + camera.x, box.y * camera.zoom + camera.y];
  const distance = (box) => Math.hypot(where(box)[0] - width / 2, where(box)[1] - height / 2);
  const box = scene.items.reduce((a, b) => (distance(b) < distance(a) ? b : a), scene.items[0]);
  return box ? { key: box.item.key, where: where(box) } : null;
}

/** Move the camera so that an item is where it was in another view, if it is there at all. */
function hold({ key, where }) {
  const item = state.view.byId.get(key) ?? state.view.groups.find((group) => group.key === key);
  const box = item && state.scene.of.get(item);
  if (!box) return;
  state.camera.x = where[0] - box.x * state.camera.zoom;
  state.camera.y = where[1] - box.y * state.camera.zoom;
}

function relayout() {
  state.scene = makeScene(state.view);
  redraw();
}

function recolour() {
  state.colours = themeColours();
  state.colouring = makeColouring(content, state.view, state.overlay);
  state.colouring.isKind = state.overlay === "kind";
  state.colouring.second = state.colouring.isKind ? null : state.colouring.text;
  const differs = state.since !== "graph" && state.colouring.isKind;
  const legend = differs
    ? { ...state.colouring, legend: Object.keys(MARKS).map((status) => [`${status}-fill`, `${MARKS[status]} ${status}`]).concat(state.colouring.legend) }
    : state.colouring;
  showLegend(part("legend"), content, legend, state.overlay === "kind" ? "Kind of operator" : state.overlay, state.colours);
  redraw();
}

let waiting = false;
function redraw() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    draw(canvas.getContext("2d", { alpha: false }), state);
  });
}

function showStep() {
  const step = content.steps[state.step];
  part("step").value = state.step;
  part("stepName").textContent = content.steps.length > 1 ? `${state.step}: ${step.label}` : step.label;
  part("stepName").title = [step.label, step.summary].filter(Boolean).join(": ");
  part("step").setAttribute("aria-valuetext", `${state.step}: ${step.label}`);
}

// ---- selection

function select(item, { quiet = false } = {}) {
  state.selected = item;
  const close = () => { select(null); canvas.focus(); };
  showDetails(part("details"), item, { ...state, content, reveal, toggle, close });
  if (item && !quiet) {
    const what = item.record ? `${item.record.op}, ${item.record.id}` : `group ${item.label}, ${item.count} nodes, ${item.open ? "open" : "closed"}`;
    say([what, item.difference?.status, state.overlay === "kind" ? "" : state.colouring.text(item)].filter(Boolean).join(", "));
  }
  redraw();
}

function say(text) {
  part("live").textContent = text;
}

/** Open what is around an item, select it, and bring it into the middle. */
function reveal(item) {
  for (let group = item.parent; group; group = group.parent) {
    if (!group.open) {
      group.open = true;
      forget(group);
    }
  }
  relayout();
  select(item);
  state.camera.zoom = Math.max(state.camera.zoom, 0.7);
  centre(item);
}

function centre(item) {
  const box = state.scene.of.get(item);
  const { width, height } = freeSize();
  state.camera.x = width / 2 - (box.x + box.width / 2) * state.camera.zoom;
  state.camera.y = height / 2 - (box.y + Math.min(box.height / 2, 100)) * state.camera.zoom;
  redraw();
}

/** Open or close a group; its corner stays where it is on the screen. */
function toggle(group) {
  const before = state.scene.of.get(group);
  group.open = !group.open;
  forget(group);
  relayout();
  const after = state.scene.of.get(group);
  const left = (box) => box.x + box.width / 2;
  state.camera.x += (left(before) - left(after)) * state.camera.zoom;
  state.camera.y += (before.y - after.y) * state.camera.zoom;
  select(group);
}

function setAll(open) {
  for (const group of state.view.groups) group.open = open;
  for (const group of [state.view.root, ...state.view.groups]) group.layout = null;
  relayout();
  select(state.selected && state.scene.of.has(state.selected) ? state.selected : null, { quiet: true });
  showStart();
}

function next(offset) {
  const { items } = state.scene;
  if (!items.length) return;
  const now = items.findIndex((box) => box.item === state.selected);
  const at = now < 0 ? (offset > 0 ? 0 : items.length - 1) : (now + offset + items.length) % items.length;
  select(items[at].item);
  centre(items[at].item);
}

// ---- camera

function freeSize() {
  const covered = part("details").hidden ? 0 : part("details").offsetWidth;
  return { width: canvas.clientWidth - covered, height: canvas.clientHeight };
}

function fitAll() {
  const { width, height } = freeSize();
  const { scene, camera } = state;
  const whole = Math.min(width / scene.width, height / scene.height) * 0.96;
  camera.zoom = Math.min(1.2, Math.max(whole, 0.004));
  camera.x = (width - scene.width * camera.zoom) / 2;
  camera.y = Math.max(8, (height - scene.height * camera.zoom) / 2);
  redraw();
}

/** Show a graph from its start, in letters that can be read. */
function showStart() {
  fitAll();
  const { camera, scene } = state;
  if (camera.zoom < 0.55) {
    const first = state.scene.items[0];
    camera.zoom = 0.85;
    camera.x = canvas.clientWidth / 2 - (first ? first.x + first.width / 2 : scene.width / 2) * camera.zoom;
    camera.y = 12;
  }
  redraw();
}

function zoomBy(factor, x = canvas.clientWidth / 2, y = canvas.clientHeight / 2) {
  const { camera } = state;
  const zoom = Math.min(4, Math.max(0.004, camera.zoom * factor));
  camera.x = x - ((x - camera.x) * zoom) / camera.zoom;
  camera.y = y - ((y - camera.y) * zoom) / camera.zoom;
  camera.zoom = zoom;
  redraw();
}

function pan(x, y) {
  state.camera.x += x;
  state.camera.y += y;
  redraw();
}

function itemAt(x, y) {
  const { camera, scene } = state;
  const [left, top] = [(x - camera.x) / camera.zoom, (y - camera.y) / camera.zoom];
  const holds = (box) => left >= box.x && left <= box.x + box.width && top >= box.y && top <= box.y + box.height;
  return (scene.items.find(holds) ?? scene.boxes.findLast(holds))?.item ?? null;
}

// ---- search

function matchesOf(text) {
  const wanted = text.toLowerCase();
  const holds = (held) => held !== undefined && held.toLowerCase().includes(wanted);
  const inNode = ({ record }) =>
    holds(record.op) || holds(record.id) || holds(record.line) || holds(record.pass_name) || (record.weights ?? []).some((weight) => holds(weight.name));
  return [...state.view.groups.filter((group) => holds(group.label)), ...state.view.nodes.filter(inNode)];
}

function search() {
  const text = part("search").value.trim();
  const results = part("results");
  results.hidden = !text;
  const found = text ? matchesOf(text) : [];
  state.matches = new Set(found);
  const entry = (item) =>
    element(
      "button",
      { onclick: () => { results.hidden = true; reveal(item); } },
      item.record ? `${operatorName(item.record)}  ${item.record.id}` : `▣ ${item.label}`,
      element("small", {}, item.record ? (item.record.line ?? (item.record.outputs ?? [])[0] ?? "") : `${item.count} nodes`),
    );
  results.replaceChildren(element("p", {}, `${found.length} found`), ...found.slice(0, 100).map(entry));
  if (text) say(`${found.length} found`);
  redraw();
}

// ---- controls

function setUp() {
  const names = ["kind", ...Object.keys(content.overlays)];
  part("overlay").append(...names.map((name) => element("option", { value: name }, name)));
  part("overlay").onchange = (event) => { state.overlay = event.target.value; recolour(); select(state.selected, { quiet: true }); };
  part("steps").hidden = part("compare").hidden = content.steps.length < 2;
  part("step").max = content.steps.length - 1;
  part("step").oninput = (event) => { state.step = Number(event.target.value); showView(); };
  if (content.steps.length === 2) state.since = "sincePrevious";
  part("since").value = state.since;
  part("since").onchange = (event) => { state.since = event.target.value; showView(); };
  part("collapse").onclick = () => setAll(false);
  part("expand").onclick = () => setAll(true);
  part("fit").onclick = fitAll;
  part("help").onclick = toggleHelp;
  part("theme").onclick = () => setTheme(!document.documentElement.classList.contains("dark"));
  part("search").oninput = search;
  part("search").onkeydown = searchKey;
  part("results").onkeydown = resultKey;
  document.addEventListener("keydown", key);
  document.addEventListener("pointerdown", (event) => { if (!event.target.closest(".search")) part("results").hidden = true; });
  mouse();
  const dark = matchMedia("(prefers-color-scheme: dark)");
  dark.addEventListener("change", () => setTheme(dark.matches));
  document.documentElement.classList.toggle("dark", dark.matches);
  new ResizeObserver(resize).observe(canvas);
}

function setTheme(dark) {
  document.documentElement.classList.toggle("dark", dark);
  recolour();
}

function toggleHelp() {
  part("keys").hidden = !part("keys").hidden;
  part("help").setAttribute("aria-expanded", String(!part("keys").hidden));
}

function resize() {
  state.ratio = devicePixelRatio || 1;
  const [width, height] = [Math.round(canvas.clientWidth * state.ratio), Math.round(canvas.clientHeight * state.ratio)];
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  draw(canvas.getContext("2d", { alpha: false }), state); // at once: a canvas of another size is empty
}

function searchKey(event) {
  const first = part("results").querySelector("button");
  if (event.key === "Enter" && first) first.click();
  else if (event.key === "ArrowDown" && first) { event.preventDefault(); first.focus(); }
}

function resultKey(event) {
  const step = { ArrowDown: "nextElementSibling", ArrowUp: "previousElementSibling" }[event.key];
  const to = step && document.activeElement[step];
  if (!to) return;
  event.preventDefault();
  (to.matches("button") ? to : part("search")).focus();
}

function escape() {
  const open = part("results").hidden ? (part("keys").hidden ? null : "keys") : "results";
  if (open === "keys") toggleHelp();
  else if (open) part(open).hidden = true;
  else if (part("search").value) { part("search").value = ""; search(); }
  else select(null);
  canvas.focus();
}

const KEYS = {
  ArrowLeft: () => pan(60, 0), ArrowRight: () => pan(-60, 0), ArrowUp: () => pan(0, 60), ArrowDown: () => pan(0, -60),
  "+": () => zoomBy(1.25), "=": () => zoomBy(1.25), "-": () => zoomBy(0.8), 0: fitAll, f: fitAll,
  "/": () => { part("search").focus(); part("search").select(); }, "?": toggleHelp, j: () => next(1), k: () => next(-1),
  Enter: () => { if (state.selected && !state.selected.record) toggle(state.selected); },
  "[": () => setStep(state.step - 1), "]": () => setStep(state.step + 1),
};

function setStep(step) {
  if (step < 0 || step >= content.steps.length) return;
  state.step = step;
  showView();
}

function key(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") return escape();
  const free = event.target === canvas || event.target === document.body;
  const typing = event.target.matches?.("input, select");
  const action = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!action || typing || (!free && event.key.length > 1)) return;
  event.preventDefault();
  action();
}

function mouse() {
  let from = null;
  let moved = false;
  canvas.onpointerdown = (event) => {
    canvas.setPointerCapture(event.pointerId);
    [from, moved] = [{ x: event.offsetX, y: event.offsetY }, false];
  };
  canvas.onpointermove = (event) => {
    if (!from) return;
    const [x, y] = [event.offsetX - from.x, event.offsetY - from.y];
    if (!moved && Math.hypot(x, y) < 4) return;
    moved = true;
    canvas.classList.add("dragging");
    from = { x: event.offsetX, y: event.offsetY };
    pan(x, y);
  };
  canvas.onpointerup = (event) => {
    if (from && !moved) select(itemAt(event.offsetX, event.offsetY));
    from = null;
    canvas.classList.remove("dragging");
  };
  canvas.ondblclick = (event) => {
    const item = itemAt(event.offsetX, event.offsetY);
    if (item && !item.record) toggle(item);
  };
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    const scale = event.deltaMode === 1 ? 16 : 1;
    zoomBy(Math.exp(-event.deltaY * scale * 0.0016), event.offsetX, event.offsetY);
  }, { passive: false });
}

setUp();
showView();
resize();
showStart();
draw(canvas.getContext("2d", { alpha: false }), state);
document.documentElement.dataset.readyAfter = String(Math.round(performance.now()));
window.fxopt = { state, content, select, reveal, toggle, setAll, pan, zoomBy, fillName, draw: () => draw(canvas.getContext("2d", { alpha: false }), state) };
