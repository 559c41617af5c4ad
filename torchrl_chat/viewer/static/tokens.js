// A token sequence: who wrote each token (the mask), and the numbers of what was sampled, as shades.

import { el } from "./dom.js";

// What there may be a number of for each sampled token: `bounds` are between the shades of `depth`, `ends` name the first and the last.
// Of numbers with a sign (`signed`) those below 0 have a colour of their own, and `ends` are those of both.
const STREAMS = {
  log_probs: {
    name: "log-prob",
    ends: ["likely", "unlikely"],
    bounds: [0.05, 0.3, 0.8, 1.8, 3.5],
    depth: (value) => -value,
    told: (value) => `log-prob ${value.toFixed(4)}, p ${Math.exp(value).toPrecision(3)}`,
  },
  entropy: {
    name: "entropy",
    ends: ["certain", "uncertain"],
    bounds: [0.05, 0.3, 0.8, 1.5, 2.5],
    depth: (value) => value,
    told: (value) => `entropy ${value.toFixed(4)}`,
  },
  ratio: {
    name: "ratio of trainer to sampler",
    ends: ["1", "2 or a half"],
    bounds: [0.01, 0.05, 0.1, 0.25, Math.LN2],
    depth: (value) => Math.abs(Math.log(value)),
    told: (value) => `ratio ${value.toPrecision(5)}`,
  },
  advantage: {
    name: "advantage",
    ends: ["less of it", "more of it"],
    bounds: [0.01, 0.1, 0.4, 1, 2],
    depth: Math.abs,
    signed: true,
    told: (value) => `advantage ${Number(value.toPrecision(4))}`,
  },
  weight_versions: {
    name: "weights that sampled it",
    ends: ["older", "newer"],
    bounds: [0.1, 0.3, 0.5, 0.7, 0.9], // of the way from the oldest of the episode to its newest
    depth: (value, { oldest, newest }) => (newest > oldest ? (value - oldest) / (newest - oldest) : 0),
    told: (value) => `weights ${value}`,
  },
};
const SHADES = STREAMS.log_probs.bounds.length;
const FIRST = 4000; // tokens that are drawn at once

let wanted = "log_probs"; // what the user wants to see
let shownStream = wanted; // what there is of it

/** Colour tokens by another number, of those that there are. */
export function colourBy(name) {
  wanted = Object.hasOwn(STREAMS, name ?? "") ? name : "log_probs";
}

const isThere = (sequence, name) => Array.isArray(sequence?.[name]) && sequence[name].some((value) => typeof (Array.isArray(value) ? value[1] : value) === "number");

function shade(facts, place) {
  const value = facts.streams[shownStream][place];
  if (Number.isNaN(value)) return "";
  const { bounds, depth, signed } = STREAMS[shownStream];
  const level = bounds.filter((bound) => depth(value, facts) > bound).length;
  return ` ${signed && value < 0 ? "n" : "l"}${level}`;
}

/** Per token whether it was sampled and its numbers, from the stretches and the short lists of the rollout format. */
export function unpack(sequence) {
  const count = sequence.ids.length;
  const sampled = new Uint8Array(count);
  const streams = Object.fromEntries(Object.keys(STREAMS).map((name) => [name, new Float64Array(count).fill(NaN)]));
  const { weight_versions: versions, ...numbered } = streams;
  let next = 0;
  for (const [start, end] of sequence.sampled ?? []) {
    for (let place = Math.max(0, start); place < Math.min(end, count); place++, next++) {
      sampled[place] = 1;
      for (const [name, values] of Object.entries(numbered)) {
        const value = sequence[name]?.[next];
        if (typeof value === "number") values[place] = value;
      }
    }
  }
  const spans = isThere(sequence, "weight_versions") ? sequence.weight_versions : [];
  spans.forEach(([start, version], i) => {
    const end = Math.min(spans[i + 1]?.[0] ?? count, count);
    if (typeof version !== "number") return;
    for (let place = Math.max(0, start); place < end; place++) if (sampled[place]) versions[place] = version;
  });
  const known = spans.map(([, version]) => version).filter((version) => typeof version === "number");
  return { sampled, streams, oldest: Math.min(...known), newest: Math.max(...known) };
}

/** Line breaks and tabs with a sign of their own, other control characters as their pictures (U+2400 ...). */
function visible(text) {
  const signs = { "\n": "⏎\n", "\t": "⇥\t" };
  return text.replace(/[\u0000-\u001f]/g, (sign) => signs[sign] ?? String.fromCharCode(0x2400 + sign.charCodeAt(0)));
}

function described(sequence, place, { sampled, streams }) {
  const piece = sequence.pieces?.[place];
  const bytes = sequence.bytes?.[String(place)];
  const parts = [`token ${place + 1} of ${sequence.ids.length}`, `id ${sequence.ids[place]}`];
  if (piece !== undefined) parts.push(JSON.stringify(piece));
  if (bytes) parts.push(`bytes ${bytes}`);
  parts.push(sampled[place] ? "sampled" : "not sampled");
  for (const [name, values] of Object.entries(streams)) {
    if (!Number.isNaN(values[place])) parts.push(STREAMS[name].told(values[place]));
  }
  return parts.join(" · ");
}

/** What the colours mean; where there are several streams, a choice of what is coloured, of which `onChoose` is told. */
export function legend(sequences, onChoose = () => {}) {
  const there = Object.keys(STREAMS).filter((name) => sequences.some((sequence) => isThere(sequence, name)));
  const scale = el("span", {});
  const swatches = (letter, levels) => levels.map((level, i) => el("i", { class: `tok s ${letter}${level} swatch ${i === 0 ? "first" : i === levels.length - 1 ? "last" : ""}` }, "\u00a0"));
  const upward = Array.from({ length: SHADES + 1 }, (_, level) => level);
  function draw() {
    shownStream = there.includes(wanted) ? wanted : there[0] ?? wanted;
    const { ends, signed } = STREAMS[shownStream];
    const shades = signed ? [...swatches("n", upward.slice(1).reverse()), ...swatches("l", upward)] : swatches("l", upward);
    scale.replaceChildren(...(there.length ? [`sampled: ${ends[0]}`, ...shades, ends[1]] : [el("i", { class: "tok s" }, "sampled")]));
  }
  draw();
  const choice =
    there.length < 2
      ? null
      : el(
          "select",
          {
            id: "stream",
            "aria-label": "Colour tokens by",
            onchange: (event) => {
              wanted = event.target.value;
              draw();
              for (const view of document.querySelectorAll(".tokens")) view.dispatchEvent(new Event("shade"));
              onChoose(wanted);
            },
          },
          there.map((name) => el("option", { value: name, selected: name === shownStream }, STREAMS[name].name)),
        );
  return el("div", { class: "legend" }, choice, el("i", { class: "tok" }, "template and others"), scale);
}

/**
 * The sequence as an element: arrow keys and the pointer tell of single tokens. `skip` leaves out so many in front; `at` is the token
 * that is chosen first, and `onSelect` is told of others.
 */
export function tokenView(sequence, { name = "Tokens", skip = 0, at: first = null, onSelect = () => {} } = {}) {
  const facts = unpack(sequence);
  const line = el("output", { class: "inspect", "aria-live": "polite" }, "point at a token, or use ← and →");
  const flow = el("div", { class: "flow", tabindex: "0", role: "group", "aria-label": `${name}: ${sequence.ids.length}` });
  const spans = []; // of the tokens from `skip` on

  function draw(until) {
    const fresh = document.createDocumentFragment();
    for (let place = skip + spans.length; place < until; place++) {
      const piece = sequence.pieces?.[place];
      const text = piece === undefined ? `${sequence.ids[place]} ` : piece === "" ? "◌" : visible(piece);
      const span = document.createElement("span");
      span.className = `tok${facts.sampled[place] ? " s" : ""}${shade(facts, place)}`;
      span.dataset.at = String(place);
      span.textContent = text;
      spans.push(span);
      fresh.append(span);
    }
    flow.append(fresh);
  }

  let current = -1;
  function select(at) {
    if (at < 0 || at >= spans.length) return;
    spans[current]?.classList.remove("at");
    current = at;
    spans[current].classList.add("at");
    spans[current].scrollIntoView({ block: "nearest" });
    line.textContent = described(sequence, skip + current, facts);
  }
  function take(at) {
    select(at);
    if (current === at) onSelect(skip + at);
  }
  flow.addEventListener("pointerover", (event) => {
    const at = event.target.dataset?.at;
    if (at !== undefined) line.textContent = described(sequence, Number(at), facts);
  });
  flow.addEventListener("click", (event) => {
    if (event.target.dataset?.at !== undefined) take(Number(event.target.dataset.at) - skip);
  });
  flow.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: current - 1, ArrowRight: current + 1, Home: 0, End: spans.length - 1 }[event.key];
    if (move === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    take(Math.max(0, move));
  });

  const asked = Number.isInteger(first) && skip <= first && first < sequence.ids.length ? first : null;
  draw(Math.min(Math.max(skip + FIRST, (asked ?? 0) + 1), sequence.ids.length));
  const rest = sequence.ids.length - skip - spans.length;
  const more = rest
    ? el("button", { type: "button", onclick: () => (draw(sequence.ids.length), more.remove()) }, `${rest.toLocaleString("en")} more tokens`)
    : null;
  const again = () => spans.forEach((span, i) => (span.className = `tok${facts.sampled[skip + i] ? " s" : ""}${shade(facts, skip + i)}${i === current ? " at" : ""}`));
  if (asked !== null) requestAnimationFrame(() => select(asked - skip)); // once it stands in the page
  return el("div", { class: "tokens", onshade: again }, flow, more, line);
}

/** All sequences of an episode; those before the last are branches that were left. */
export function sequencesView(sequences, { skip = 0, sequence: chosen = 0, token = null, onSelect = () => {} } = {}) {
  if (!sequences?.length) return el("p", { class: "soft pad" }, "There are no tokens here.");
  const options = (place) => ({ at: place === chosen ? token : null, onSelect: (at) => onSelect(place, at) });
  if (sequences.length === 1) return tokenView(sequences[0], { skip, ...options(0) });
  return el(
    "div",
    {},
    sequences.map((sequence, place) => {
      const name = place === sequences.length - 1 ? `sequence ${place + 1}, the last` : `sequence ${place + 1}`;
      return el("section", {}, el("h2", { class: "part" }, name), tokenView(sequence, { name, ...options(place) }));
    }),
  );
}
