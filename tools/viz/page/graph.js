// From the document to a tree of groups and nodes, with each edge at the levels through which it runs.

const TOP = -1;

/** Return the view of one graph: {nodes, groups, root}. Items know their parent; groups their items and edges. */
function makeView(content, number) {
  const graph = content.graphs[number];
  const root = newGroup("", null, TOP);
  const groups = [];
  for (const [label, parent, like] of graph.groups) {
    groups.push(newGroup(label, parent === TOP ? root : groups[parent], like));
  }
  for (const group of groups) {
    group.like = group.like === TOP ? null : groups[group.like];
    const same = group.parent.items.filter((item) => item.label === group.label).length;
    group.key = `${group.parent.key}/${group.label}${same ? `#${same}` : ""}`;
    group.parent.items.push(group);
  }
  const nodes = graph.nodes.map((record, index) => ({
    record: content.records[record],
    difference: graph.differences[index] ?? null,
    parent: graph.groupOf[index] === TOP ? root : groups[graph.groupOf[index]],
    key: content.records[record].id,
    index,
  }));
  for (const node of nodes) {
    node.parent.items.push(node);
    for (let group = node.parent; group; group = group.parent) {
      group.count += 1;
      group.first = Math.min(group.first, node.index);
      if (node.difference) group.differences += 1;
    }
  }
  const byId = new Map(nodes.map((node) => [node.key, node]));
  for (const node of nodes) {
    for (const [source, argument, type] of node.record.inputs ?? []) {
      if (byId.has(source)) addEdge(byId.get(source), node, argument, type);
    }
  }
  for (const group of [root, ...groups]) group.items.sort((a, b) => order(a) - order(b));
  return { nodes, groups, root, byId };
}

function newGroup(label, parent, like) {
  return {
    label, parent, like, key: "", items: [], edges: new Map(), count: 0, first: Infinity, differences: 0,
    open: parent === null, layout: null,
  };
}

const order = (item) => (item.record ? item.index : item.first);

function chain(item) {
  const found = [];
  for (let one = item; one; one = one.parent) found.push(one);
  return found.reverse();
}

/** Note an edge in the innermost group that holds both ends, and on the way from its border to each end. */
function addEdge(source, reader, argument, type) {
  const from = chain(source);
  const to = chain(reader);
  let depth = 0;
  while (from[depth] === to[depth]) depth += 1;
  noteEdge(from[depth - 1], from[depth], to[depth], type);
  for (let inner = depth + 1; inner < from.length; inner += 1) noteEdge(from[inner - 1], from[inner], "below", type);
  for (let inner = depth + 1; inner < to.length; inner += 1) noteEdge(to[inner - 1], "above", to[inner], type);
  (source.readers ??= []).push([reader, argument, type]);
}

function noteEdge(group, from, to, type) {
  const key = `${from.key ?? from}\n${to.key ?? to}`;
  const known = group.edges.get(key);
  if (known) known.count += 1;
  else group.edges.set(key, { from, to, count: 1, type });
}

/** Return the name that stands on a node: its operator without the common namespace. */
const operatorName = (record) => record.op.replace(/^(aten|fxopt)\./, "");

/** Open groups from the top as long as not too much becomes visible; groups like an earlier one stay closed. */
function openFirst(view, most) {
  let shown = view.root.items.length;
  const waiting = [...view.root.items];
  while (waiting.length) {
    const item = waiting.shift();
    if (item.record) continue;
    const small = view.nodes.length <= most;
    if ((item.like && !small) || shown + item.items.length > most) continue;
    item.open = true;
    shown += item.items.length;
    waiting.push(...item.items);
  }
}
