// Trees of an episode: where its token sequences part, and the calls of an agent, as the gateway saw them.

import { el, shown } from "./dom.js";
import { conversation, textOf } from "./messages.js";

/**
 * Where sequences part: each node is a stretch of tokens that `sequences` (their numbers) have in common, behind that of its
 * parent. `sampled` counts those of its tokens that the policy sampled, in whichever of them they are marked.
 */
export function branches(sequences) {
  function node(numbers, start) {
    const [first] = numbers;
    const { ids } = sequences[first];
    let end = start;
    while (end < ids.length && numbers.every((number) => sequences[number].ids[end] === ids[end])) end++;
    const groups = new Map(); // the ones that go on, by their next token
    for (const number of numbers) {
      const next = sequences[number].ids[end];
      if (next !== undefined) groups.set(next, [...(groups.get(next) ?? []), number]);
    }
    const marked = new Uint8Array(end - start);
    for (const number of numbers) {
      for (const [from, to] of sequences[number].sampled ?? []) marked.fill(1, Math.max(0, from - start), Math.max(0, to - start));
    }
    return {
      start,
      end,
      numbers,
      sampled: marked.reduce((sum, one) => sum + one, 0),
      children: [...groups.values()].map((group) => node(group, end)),
    };
  }
  const roots = new Map();
  sequences.forEach(({ ids }, number) => roots.set(ids[0], [...(roots.get(ids[0]) ?? []), number]));
  return [...roots.values()].map((numbers) => node(numbers, 0));
}

/** The messages of a call: what was said since the answer that it continues, its own answer last. */
function said(episode, call) {
  if (Array.isArray(call.messages)) return call.messages;
  const before = call.parent === null || call.parent === undefined ? 0 : (episode.calls[call.parent]?.until ?? 0);
  return (episode.messages ?? []).slice(before, call.until);
}

/** The one of a call's children that goes on with it; the others fork. Of several, the one that is trained in its sequence. */
function nextOf(call, children) {
  const going = children.filter((child) => child.kind === "continues");
  const among = going.length ? going : children;
  return among.find((child) => child.sequence === call.sequence && child.sequence !== null) ?? going[0];
}

/**
 * The calls in the order of a tree, each with its `level`: whoever continues a call stands on its level, behind what forks from it,
 * which stands one level deeper.
 */
export function ordered(calls) {
  const children = new Map();
  calls.forEach((call, number) => {
    const parent = calls[call.parent] && call.parent < number ? call.parent : null;
    children.set(parent, [...(children.get(parent) ?? []), { ...call, number }]);
  });
  const found = [];
  const todo = (children.get(null) ?? []).map((call) => ({ call, level: 1 })).reverse();
  while (todo.length) {
    const { call, level } = todo.pop();
    found.push({ ...call, level });
    const behind = children.get(call.number) ?? [];
    const next = nextOf(call, behind);
    if (next) todo.push({ call: next, level });
    for (const fork of behind.filter((child) => child !== next).reverse()) todo.push({ call: fork, level: level + 1 });
  }
  return found;
}

const line = (text, most = 90) => {
  const flat = text.replace(/\s+/g, " ").trim();
  return flat.length > most ? `${flat.slice(0, most)}…` : flat;
};

function spoken(message) {
  const calls = (message?.tool_calls ?? []).map((call) => `${call?.function?.name ?? "?"}(…)`);
  return line([textOf(message?.content), ...calls].filter(Boolean).join(" ")) || "(nothing)";
}

/** One item of a tree: `level`, `sign` and `label`, `note` beside it, `below()` what is shown under it, `open()` where it leads. */
function treeOf(name, items) {
  const below = el("div", { class: "call-said" });
  const list = el("ul", { class: "tree", role: "tree", "aria-label": name });
  const rows = items.map((item, place) =>
    el(
      "li",
      {
        role: "treeitem", "aria-level": item.level, "aria-selected": "false", tabindex: place ? "-1" : "0",
        class: `level${Math.min(item.level, 8)}`, onclick: () => choose(place), ondblclick: () => item.open?.(),
      },
      el("span", { class: `sign ${item.kind ?? ""}` }, item.sign),
      el("span", { class: "label" }, item.label),
      el("span", { class: "note" }, item.note),
    ),
  );
  let current = 0;
  function choose(place) {
    rows[current].tabIndex = -1;
    rows[current].setAttribute("aria-selected", "false");
    current = Math.max(0, Math.min(rows.length - 1, place));
    rows[current].tabIndex = 0;
    rows[current].setAttribute("aria-selected", "true");
    rows[current].focus();
    const item = items[current];
    const button = item.open ? el("button", { type: "button", onclick: item.open }, "Its tokens ", el("kbd", {}, "Enter")) : null;
    below.replaceChildren(...[item.why ? el("p", { class: "note" }, item.why) : null, button ? el("p", { class: "pad-side" }, button) : null, item.below?.() ?? null].filter(Boolean));
  }
  const upward = () => items.findLastIndex((item, place) => place < current && item.level < items[current].level);
  list.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const to = { ArrowDown: current + 1, ArrowUp: current - 1, Home: 0, End: rows.length - 1, ArrowLeft: upward(), ArrowRight: current + 1 }[event.key];
    if (event.key === "Enter") items[current].open?.();
    else if (to === undefined) return;
    else choose(Math.max(0, to));
    event.preventDefault();
  });
  list.append(...rows);
  return el("section", { class: "trees" }, el("h2", { class: "part" }, name), list, below);
}

const KINDS = {
  begins: ["○", "the first sequence begins"],
  restarts: ["○", "a sequence begins"],
  forks: ["↳", "forks"],
  continues: ["│", "continues"],
};

function callsTree(episode, rendered, onOpen) {
  const items = ordered(episode.calls).map((call) => {
    const [sign, word] = KINDS[call.kind] ?? ["·", String(call.kind)];
    const messages = said(episode, call);
    const [start, end] = call.span ?? [0, 0];
    const lost = call.sequence === null || call.sequence === undefined;
    const tools = Array.isArray(call.tools) && call.tools.length ? ` · tools ${call.tools.join(", ")}` : "";
    return {
      level: call.level,
      kind: call.kind,
      sign,
      label: `#${call.number + 1} ${spoken(messages.at(-1))}`,
      note: lost ? "nobody got it" : `${shown(end - start)} of ${shown(end)} tokens`,
      why: `${word}: ${call.reason || "no reason is given"}${tools}${lost ? " · not trained: no client got this answer" : ` · sequence ${call.sequence + 1}`}`,
      below: () => conversation(messages, { rendered }),
      open: lost ? null : () => onOpen(call.sequence, start),
    };
  });
  return treeOf(`The agent's calls: ${items.length}`, items);
}

function branchesTree(sequences, onOpen) {
  const items = [];
  function walk(node, level) {
    const named = node.numbers.map((number) => number + 1).join(", ");
    const ends = node.numbers.filter((number) => sequences[number].ids.length === node.end);
    const pieces = sequences[node.numbers[0]].pieces?.slice(node.start, Math.min(node.end, node.start + 40)).join("");
    items.push({
      level,
      kind: node.children.length ? "continues" : "leaf",
      sign: node.children.length ? "┬" : "└",
      label: line(pieces ?? "") || `tokens from ${node.start + 1} on`,
      note: `${shown(node.start + 1)} to ${shown(node.end)}, ${shown(node.sampled)} sampled`,
      why: `${node.numbers.length > 1 ? `shared by the sequences ${named}` : `sequence ${named} alone`}${ends.length && node.children.length ? "; one ends here" : ""}`,
      open: () => onOpen(node.numbers.at(-1), node.start),
    });
    for (const child of node.children) walk(child, level + 1);
  }
  for (const root of branches(sequences)) walk(root, 1);
  return treeOf(`Where the ${sequences.length} token sequences part`, items);
}

/** Whether an episode has a tree to look at. */
export const hasTree = (episode) => episode.calls?.length > 0 || episode.sequences?.length > 1;

/** The trees of an episode. `onOpen(sequence, token)` leads to the tokens. */
export function treesView(episode, { rendered, onOpen }) {
  if (!hasTree(episode)) {
    return el("p", { class: "soft pad" }, "One sequence, which nothing parted from. Trees are there where a template rewrote the past, or an agent forked it.");
  }
  return el(
    "div",
    {},
    episode.calls?.length ? callsTree(episode, rendered, onOpen) : null,
    episode.sequences?.length > 1 ? branchesTree(episode.sequences, onOpen) : null,
  );
}
