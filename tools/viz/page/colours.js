// What an item is filled with: its kind, or an overlay's number or word; and the legend that says so.

const BINS = 5;
const largest = (all) => all.reduce((a, b) => Math.max(a, b), -Infinity);
const smallest = (all) => all.reduce((a, b) => Math.min(a, b), Infinity);

function themeColours() {
  const style = getComputedStyle(document.documentElement);
  return new Proxy({}, { get: (known, name) => (known[name] ??= style.getPropertyValue(`--${name}`).trim()) });
}

/** Return what colours items by one overlay: {fill(item) -> name of a colour, text(item), legend}. */
function makeColouring(content, view, name) {
  if (name === "kind") return byKind(view);
  const overlay = content.overlays[name];
  return overlay.words ? byWord(view, name, overlay) : byNumber(view, name, overlay);
}

function byKind(view) {
  const kinds = [...new Set(view.nodes.map((node) => node.record.kind))].sort();
  return {
    fill: (item) => (item.record ? `kind-${item.record.kind}` : "group-deep"),
    text: (item) => (item.record ? item.record.kind : ""),
    legend: kinds.map((kind) => [`kind-${kind}`, kind]),
    note: "",
  };
}

function byWord(view, name, overlay) {
  const numbers = new Map(overlay.words.map((word, index) => [word, `word-${index % 8}`]));
  const wordOf = memoized((item) => {
    if (item.record) return item.record.values?.[name] ?? null;
    const words = new Set(item.items.map(wordOf).filter((word) => word !== null));
    return words.size === 0 ? null : words.size === 1 ? [...words][0] : "several";
  });
  return {
    fill: (item) => numbers.get(wordOf(item)) ?? (item.record ? "none" : "group-deep"),
    text: (item) => wordOf(item) ?? "",
    legend: overlay.words.map((word) => [numbers.get(word), word]),
    note: "",
  };
}

function byNumber(view, name, overlay) {
  const combine = {
    sum: (all) => all.reduce((a, b) => a + b, 0),
    mean: (all) => all.reduce((a, b) => a + b, 0) / all.length,
    max: largest,
    min: smallest,
  }[overlay.combine];
  const collect = (item, into) => {
    if (item.record) {
      const held = item.record.values?.[name];
      if (held !== undefined && item.difference?.status !== "removed") into.push(held);
    } else item.items.forEach((inner) => collect(inner, into));
    return into;
  };
  const numberOf = memoized((item) => {
    const all = collect(item, []);
    return all.length ? combine(all) : null;
  });
  const all = view.nodes.map(numberOf).filter((held) => held !== null);
  if (!all.length) return { fill: () => "none", text: () => "", legend: [], note: "no node of this step has a number" };
  if (overlay.combine === "sum") all.push(...view.groups.map(numberOf).filter((held) => held !== null));
  const scale = makeScale(all, overlay.lowIsBad);
  return {
    fill: (item) => (numberOf(item) === null ? (item.record ? "none" : "group-deep") : `scale-${scale.bin(numberOf(item))}`),
    text: (item) => (numberOf(item) === null ? "" : shortNumber(numberOf(item), overlay.unit)),
    legend: scale.bounds.map(([low, high], bin) => [`scale-${bin}`, `${shortNumber(low, overlay.unit)} to ${shortNumber(high, overlay.unit)}`]),
    note: { sum: "groups: sum", mean: "groups: mean", max: "groups: largest", min: "groups: smallest" }[overlay.combine],
    numberOf,
    scale,
  };
}

/** Cut the range of numbers into bins, by ratios where they span more than a factor of 30; bin 0 is the least striking. */
function makeScale(all, lowIsBad) {
  const [low, high] = [smallest(all), largest(all)];
  const positive = all.filter((held) => held > 0);
  const least = smallest(positive);
  const byRatio = low >= 0 && positive.length > 0 && high / least > 30;
  const at = (part) =>
    byRatio ? (part === 0 ? low : least * (high / least) ** part) : low + (high - low) * part;
  const bounds = Array.from({ length: BINS }, (_, bin) => [at(bin / BINS), at((bin + 1) / BINS)]);
  if (lowIsBad) bounds.reverse();
  const bin = (held) => {
    if (high === low) return lowIsBad ? BINS - 1 : 0;
    const share = byRatio
      ? held <= least ? 0 : Math.log(held / least) / Math.log(high / least)
      : (held - low) / (high - low);
    const found = Math.min(BINS - 1, Math.floor(share * BINS));
    return lowIsBad ? BINS - 1 - found : found;
  };
  return { bounds, bin, low, high, byRatio };
}

function shortNumber(held, unit) {
  const size = Math.abs(held);
  const step = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]].find(([least]) => size >= least) ?? [1, ""];
  const text = Number((held / step[0]).toPrecision(3)).toString();
  return `${text}${step[1] || unit ? " " : ""}${step[1]}${unit}`;
}

function memoized(compute) {
  const known = new Map();
  return (item) => {
    if (!known.has(item)) known.set(item, compute(item));
    return known.get(item);
  };
}
