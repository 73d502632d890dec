// The canvas: only what is inside the window is drawn, and text only where it can be read.

const TINY = 0.1; // zoom below which nothing but places and colours can be seen
const MARKS = { added: "+", removed: "−", changed: "~", rewired: "→" };

function draw(context, state) {
  const { scene, camera, colours, colouring, selected, ratio } = state;
  const { width, height } = context.canvas;
  context.setTransform(1, 0, 0, 1, 0, 0);
  context.fillStyle = colours.background;
  context.fillRect(0, 0, width, height);
  const zoom = camera.zoom * ratio;
  context.setTransform(zoom, 0, 0, zoom, camera.x * ratio, camera.y * ratio);
  const seen = [-camera.x / camera.zoom, -camera.y / camera.zoom];
  seen.push(seen[0] + width / zoom, seen[1] + height / zoom);
  const inside = (box) => box.x < seen[2] && box.x + box.width > seen[0] && box.y < seen[3] && box.y + box.height > seen[1];
  const thin = 1 / camera.zoom;
  const readable = camera.zoom > 0.35;
  if (camera.zoom < TINY) {
    drawTiny(context, state, inside, thin);
  } else {
    for (const box of scene.boxes) if (inside(box)) drawOpenGroup(context, box, state, readable, thin);
    drawLines(context, scene, state, seen, thin);
    for (const box of scene.items) if (inside(box)) drawItem(context, box, state, readable, thin);
  }
  const chosen = selected && scene.of.get(selected);
  if (chosen) {
    context.strokeStyle = colours.accent;
    context.lineWidth = Math.max(3, 3 * thin);
    outline(context, chosen, 7, 3 * Math.max(1, thin));
    context.stroke();
  }
}

/** From far away a node is a few pixels: plain rectangles, all of one colour at once, and no lines. */
function drawTiny(context, { scene, colours, colouring }, inside, thin) {
  const rectangles = new Map();
  const note = (name, box) => (rectangles.get(name) ?? rectangles.set(name, []).get(name)).push(box);
  for (const box of scene.boxes) if (inside(box)) note(box.depth % 2 ? "group-deep" : "group", box);
  for (const box of scene.items) if (inside(box)) note(box.item.difference ? box.item.difference.status : fillName(box.item, colouring), box);
  context.strokeStyle = colours.border;
  context.lineWidth = thin;
  for (const [name, boxes] of rectangles) {
    context.fillStyle = colours[name];
    context.beginPath();
    for (const box of boxes) context.rect(box.x, box.y, box.width, box.height);
    context.fill();
    context.stroke();
  }
}

function outline(context, box, radius, grow = 0) {
  context.beginPath();
  context.roundRect(box.x - grow, box.y - grow, box.width + 2 * grow, box.height + 2 * grow, radius);
}

function drawOpenGroup(context, box, { colours }, readable, thin) {
  context.fillStyle = box.depth % 2 ? colours["group-deep"] : colours.group;
  context.strokeStyle = colours.border;
  context.lineWidth = Math.max(1, thin);
  outline(context, box, 8);
  context.fill();
  context.stroke();
  if (!readable) return;
  context.fillStyle = colours.text;
  context.font = FONT;
  context.textAlign = "left";
  context.textBaseline = "middle";
  context.fillText(shortened(`− ${box.item.label}`, FONT, box.width - 16), box.x + 10, box.y + HEADER / 2 + 1);
}

function drawLines(context, scene, { colours, selected, camera }, seen, thin) {
  const highlighted = [];
  context.strokeStyle = context.fillStyle = colours.line;
  context.lineWidth = Math.max(1.1, thin * 0.7);
  context.beginPath();
  const arrows = [];
  for (const line of scene.lines) {
    const [left, top, right, bottom] = line.bounds;
    if (left > seen[2] || right < seen[0] || top > seen[3] || bottom < seen[1]) continue;
    if (selected && (line.edge.from === selected || line.edge.to === selected)) highlighted.push(line);
    trace(context, line.points);
    if (typeof line.edge.to !== "string") arrows.push(line);
  }
  context.stroke();
  if (camera.zoom > 0.3) for (const line of arrows) arrow(context, line.points);
  context.strokeStyle = context.fillStyle = colours.accent;
  context.lineWidth = Math.max(2.4, thin * 1.6);
  context.beginPath();
  for (const line of highlighted) trace(context, line.points);
  context.stroke();
  for (const line of highlighted) if (typeof line.edge.to !== "string") arrow(context, line.points);
}

/** Draw through the middles of the pieces, bent at the points between. */
function trace(context, points) {
  context.moveTo(points[0].x, points[0].y);
  for (let at = 1; at < points.length - 1; at += 1) {
    const next = points[at + 1];
    const last = at === points.length - 2;
    const x = last ? next.x : (points[at].x + next.x) / 2;
    const y = last ? next.y : (points[at].y + next.y) / 2;
    context.quadraticCurveTo(points[at].x, points[at].y, x, y);
  }
  if (points.length === 2) context.lineTo(points[1].x, points[1].y);
}

function arrow(context, points) {
  const end = points.at(-1);
  const before = points.at(-2);
  const angle = Math.atan2(end.y - before.y, end.x - before.x);
  const corner = (turn) => [end.x - 7 * Math.cos(angle + turn), end.y - 7 * Math.sin(angle + turn)];
  context.beginPath();
  context.moveTo(end.x, end.y);
  context.lineTo(...corner(0.45));
  context.lineTo(...corner(-0.45));
  context.fill();
}

function drawItem(context, box, { colours, colouring, matches }, readable, thin) {
  const { item } = box;
  const status = item.difference?.status ?? null;
  if (!item.record) {
    context.fillStyle = colours.group;
    context.strokeStyle = colours.border;
    context.lineWidth = Math.max(1, thin);
    outline(context, { ...box, x: box.x + 4, y: box.y + 4 }, 6);
    context.fill();
    context.stroke();
  }
  context.fillStyle = colours[fillName(item, colouring)];
  context.strokeStyle = status ? colours[status] : matches?.has(item) ? colours.accent : colours.border;
  context.lineWidth = Math.max(status || matches?.has(item) ? 2.2 : 1, thin);
  context.setLineDash(status === "removed" ? [5, 4] : []);
  outline(context, box, 6);
  context.fill();
  context.stroke();
  context.setLineDash([]);
  if (!readable) return;
  context.textAlign = "center";
  context.textBaseline = "middle";
  context.fillStyle = colours["item-text"];
  const middle = box.x + box.width / 2;
  const shown = colouring.second?.(item) || item.lines[1];
  context.font = FONT;
  context.fillText(item.lines[0], middle, box.y + (shown ? 14 : box.height / 2 + 1));
  if (shown) {
    context.font = SMALL;
    context.fillText(shown, middle, box.y + 30);
  }
  const mark = status ? MARKS[status] : item.differences ? `±${item.differences}` : "";
  if (mark) drawMark(context, box, mark, colours, status);
}

/** A sign beside the colour, so that nobody has to tell colours apart. */
function drawMark(context, box, mark, colours, status) {
  context.font = FONT;
  const width = textWidth(mark, FONT) + 10;
  const badge = { x: box.x + box.width - width / 2, y: box.y - 9, width, height: 18 };
  context.fillStyle = colours.background;
  context.strokeStyle = colours[status ?? "changed"];
  context.lineWidth = 1.5;
  outline(context, badge, 9);
  context.fill();
  context.stroke();
  context.fillStyle = colours[status ?? "changed"];
  context.textAlign = "center";
  context.fillText(mark, badge.x + width / 2, badge.y + 10);
}

/** Return the name of the colour of an item: that of its difference while changes are shown by kind, else the overlay's. */
function fillName(item, colouring) {
  if (item.difference && colouring.isKind) return `${item.difference.status}-fill`;
  return colouring.fill(item);
}
