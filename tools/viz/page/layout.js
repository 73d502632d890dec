// Places for all that is visible. Each open group is laid out by dagre on its own, and is a box to the group around it:
// opening a group lays out this one and those around it again, and nothing else.

const PADDING = 16;
const HEADER = 26;
const LINE = 16;
const FONT = "13px system-ui, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif";
const SMALL = "11px system-ui, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif";
const WIDEST = 230;

const ruler = document.createElement("canvas").getContext("2d");
const widths = new Map();

function textWidth(text, font) {
  const key = `${font}${text}`;
  if (!widths.has(key)) {
    ruler.font = font;
    widths.set(key, ruler.measureText(text).width);
  }
  return widths.get(key);
}

function shortened(text, font, width) {
  if (textWidth(text, font) <= width) return text;
  let [least, most] = [0, text.length];
  while (least < most) {
    const middle = (least + most + 1) >> 1;
    if (textWidth(`${text.slice(0, middle)}…`, font) <= width) least = middle;
    else most = middle - 1;
  }
  return `${text.slice(0, least)}…`;
}

/** Write the two lines that stand on an item, and return its size. */
function measure(item) {
  if (!item.lines) {
    const texts = item.record
      ? [operatorName(item.record), secondLine(item.record)]
      : [item.label, `${item.count} nodes${item.like ? `, like ${item.like.label}` : ""}`];
    item.lines = [shortened(texts[0], FONT, WIDEST), shortened(texts[1], SMALL, WIDEST)];
    const width = Math.max(textWidth(item.lines[0], FONT), textWidth(item.lines[1], SMALL));
    item.size = { width: Math.max(64, width + 24), height: item.lines[1] ? 2 * LINE + 10 : LINE + 12 };
  }
  return item.size;
}

function secondLine(record) {
  const type = (record.outputs ?? [])[0] ?? "";
  return record.op === "input" || record.op === "output" ? `${record.id}${type ? `  ${type}` : ""}` : type;
}

/** Return {width, height, places, lines} of an open group; places are relative to its corner. */
function layOut(group) {
  if (group.layout) return group.layout;
  const graph = new dagre.graphlib.Graph();
  graph.setGraph({ nodesep: 18, ranksep: 30, edgesep: 10, ranker: "network-simplex" });
  const names = new Map();
  group.items.forEach((item, at) => {
    const size = !item.record && item.open ? layOut(item) : measure(item);
    names.set(item, `${at}`);
    graph.setNode(`${at}`, { width: size.width, height: size.height });
  });
  for (const edge of group.edges.values()) {
    if (group.parent === null && (edge.from === "above" || edge.to === "below")) continue;
    for (const end of [edge.from, edge.to]) {
      if (typeof end === "string" && !graph.hasNode(end)) graph.setNode(end, { width: 1, height: 1 });
    }
    graph.setEdge(names.get(edge.from) ?? edge.from, names.get(edge.to) ?? edge.to, { edge });
  }
  // What reads nothing from outside stands below the header all the same, and what nobody reads above the lower edge.
  for (const item of group.items) {
    const name = names.get(item);
    if (graph.hasNode("above") && !graph.inEdges(name).length) graph.setEdge("above", name, { weight: 0 });
    if (graph.hasNode("below") && !graph.outEdges(name).length) graph.setEdge(name, "below", { weight: 0 });
  }
  dagre.layout(graph);
  return (group.layout = read(group, graph, names));
}

function read(group, graph, names) {
  const size = graph.graph();
  // The ports take a rank of their own; the header and the lower padding lie in it.
  const [top, below] = group.parent === null ? [0, 0] : [graph.hasNode("above") ? 4 : HEADER, graph.hasNode("below") ? -20 : 0];
  const places = group.items.map((item) => {
    const { x, y, width, height } = graph.node(names.get(item));
    return { item, x: x - width / 2 + PADDING, y: y - height / 2 + PADDING + top, width, height };
  });
  const bottom = size.height + 2 * PADDING + top + below;
  const lines = graph.edges().filter((name) => graph.edge(name).edge).map((name) => {
    const { edge, points } = graph.edge(name);
    const moved = points.map(({ x, y }) => ({ x: x + PADDING, y: y + PADDING + top }));
    if (edge.from === "above") moved[0] = { x: moved[0].x, y: 0 };
    if (edge.to === "below") moved[moved.length - 1] = { x: moved.at(-1).x, y: bottom };
    return { edge, points: moved };
  });
  const label = textWidth(group.label, FONT) + 60;
  const width = Math.max(size.width + 2 * PADDING, Math.min(label, 340));
  const shift = (width - size.width - 2 * PADDING) / 2;
  for (const place of places) place.x += shift;
  for (const line of lines) for (const point of line.points) point.x += shift;
  joinPorts(places, lines);
  const port = (name) => (graph.hasNode(name) ? graph.node(name).x + PADDING + shift : width / 2);
  return { width, height: bottom, places, lines, above: port("above"), below: port("below") };
}

/** Let lines to and from open groups meet those inside them. */
function joinPorts(places, lines) {
  const open = new Map(places.filter(({ item }) => item.layout && item.open).map((place) => [place.item, place]));
  for (const { edge, points } of lines) {
    const [from, to] = [open.get(edge.from), open.get(edge.to)];
    if (from) points[0] = { x: from.x + edge.from.layout.below, y: from.y + from.height };
    if (to) points[points.length - 1] = { x: to.x + edge.to.layout.above, y: to.y };
  }
}

/** Forget the places of a group, and of those around it. */
function forget(group) {
  for (let one = group; one; one = one.parent) one.layout = null;
}

/** Return all that is visible with absolute places: boxes of open groups (outer ones first), items, and lines. */
function makeScene(view) {
  const scene = { boxes: [], items: [], lines: [], of: new Map() };
  const { width, height } = layOut(view.root);
  Object.assign(scene, { width, height });
  spread(view.root, 0, 0, scene, 0);
  scene.items.sort((a, b) => order(a.item) - order(b.item));
  return scene;
}

function spread(group, left, top, scene, depth) {
  for (const { edge, points } of group.layout.lines) {
    const moved = points.map(({ x, y }) => ({ x: x + left, y: y + top }));
    const xs = moved.map((point) => point.x);
    const ys = moved.map((point) => point.y);
    const bounds = [Math.min(...xs), Math.min(...ys), Math.max(...xs), Math.max(...ys)];
    scene.lines.push({ edge, points: moved, bounds });
  }
  for (const place of group.layout.places) {
    const box = { item: place.item, x: place.x + left, y: place.y + top, width: place.width, height: place.height, depth };
    scene.of.set(place.item, box);
    if (!place.item.record && place.item.open) {
      scene.boxes.push(box);
      spread(place.item, box.x, box.y, scene, depth + 1);
    } else {
      scene.items.push(box);
    }
  }
}
