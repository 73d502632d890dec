// The panel beside the graph. All text goes in as text, never as HTML.

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return made;
}

function showDetails(panel, item, context) {
  panel.replaceChildren();
  panel.hidden = !item;
  if (!item) return;
  panel.append(
    element("button", { className: "close", title: "Close ( Esc )", ariaLabel: "Close", onclick: context.close }, "×"),
    ...(item.record ? nodeDetails(item, context) : groupDetails(item, context)),
  );
  panel.scrollTop = 0;
}

function nodeDetails(node, context) {
  const { record, difference } = node;
  return [
    element("h2", {}, record.op),
    element("p", { style: "margin:0" }, element("code", {}, record.id)),
    ...(difference ? differenceDetails(difference) : []),
    pairs([
      ["module", chain(node.parent).slice(1).map((group) => group.label).at(-1)],
      ["line", record.line],
      ["made by", record.pass_name],
      ["why", record.why],
      ["from", record.pass_name ? (record.origins ?? []).join(", ") : ""],
      ...(record.outputs ?? []).map((type, at, all) => [all.length > 1 ? `output ${at}` : "output", type]),
    ]),
    ...section("Arguments", pairs(record.attributes ?? [])),
    ...section("Reads", links((record.inputs ?? []).map(([id, argument, type]) => [context.view.byId.get(id), argument, type]), context)),
    ...section("Read by", links(node.readers ?? [], context)),
    ...section("Numbers", pairs(Object.entries(record.values ?? {}).map(([name, held]) => [name, longNumber(held, context.content.overlays[name])]))),
    ...section("Weights", ...(record.weights ?? []).map(weightDetails)),
  ];
}

function differenceDetails({ status, why, was, details }) {
  return [
    element("p", { style: "margin:6px 0 0" }, element("span", { className: `status ${status}` }, status)),
    pairs([["reason", why], ["was", (was ?? []).join(", ")]]),
    element("ul", {}, ...(details ?? []).map((text) => element("li", {}, element("code", {}, text)))),
  ];
}

function groupDetails(group, context) {
  const counts = new Map();
  const walk = (item) => (item.record ? counts.set(item.record.op, (counts.get(item.record.op) ?? 0) + 1) : item.items.forEach(walk));
  walk(group);
  const ranked = [...counts].sort((a, b) => b[1] - a[1]);
  return [
    element("h2", {}, group.label),
    pairs([
      ["nodes", `${group.count}`],
      ["changed", group.differences ? `${group.differences}` : ""],
      ["like", group.like?.label],
      [context.overlay === "kind" ? "" : context.overlay, context.colouring.text(group)],
    ]),
    element("p", {}, element("button", { onclick: () => context.toggle(group) }, group.open ? "Close" : "Open")),
    ...section("Operators", pairs(ranked.map(([op, count]) => [`${count} ×`, op]))),
  ];
}

function weightDetails(weight) {
  const rows = [
    ["as", weight.argument],
    ["type", weight.type],
    ["bytes", weight.bytes?.toLocaleString("en")],
    ["zeros", weight.zeros === undefined ? "not read" : `${weight.zeros} of ${weight.elements}`],
    ["mean", weight.mean === undefined ? "" : `${weight.mean.toPrecision(4)} ± ${weight.deviation.toPrecision(4)}`],
    ["not finite", weight.not_finite || ""],
  ];
  const counts = weight.counts ?? [];
  const most = Math.max(1, ...counts);
  const bars = counts.map((count) => element("i", { style: `height:${(100 * count) / most}%`, title: `${count}` }));
  const drawn = counts.length > 1
    ? [
        element("div", { className: "histogram", role: "img", ariaLabel: `histogram from ${weight.low} to ${weight.high}` }, ...bars),
        element("div", { className: "ends" }, element("span", {}, weight.low.toPrecision(4)), element("span", {}, weight.high.toPrecision(4))),
      ]
    : [];
  return element("div", { className: "weight" }, element("code", {}, weight.name), pairs(rows), ...drawn);
}

function longNumber(held, overlay) {
  if (typeof held !== "number") return held;
  const unit = overlay?.unit ? ` ${overlay.unit}` : "";
  return `${Number.isInteger(held) ? held.toLocaleString("en") : Number(held.toPrecision(5))}${unit}`;
}

function pairs(rows) {
  const kept = rows.filter(([name, text]) => name && text !== undefined && text !== null && text !== "");
  return element("dl", {}, ...kept.flatMap(([name, text]) => [element("dt", {}, name), element("dd", {}, `${text}`)]));
}

function links(rows, context) {
  return element(
    "ul",
    {},
    ...rows
      .filter(([item]) => item)
      .map(([item, argument, type]) =>
        element("li", {}, element("button", { onclick: () => context.reveal(item) }, item.key), ` ${[argument, type].filter(Boolean).join(", ")}`),
      ),
  );
}

function section(title, ...content) {
  return content.some((part) => part.childElementCount) ? [element("h3", {}, title), ...content] : [];
}

function showLegend(panel, content, colouring, title, colours) {
  panel.replaceChildren(
    element("p", {}, element("strong", {}, title)),
    element(
      "ul",
      {},
      ...colouring.legend.map(([name, text]) => element("li", {}, element("i", { style: `background:${colours[name]}` }), text)),
    ),
    ...[colouring.note, ...content.notes].filter(Boolean).map((text) => element("p", {}, text)),
  );
}
