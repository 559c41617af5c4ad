// A token sequence: who wrote each token (the mask), and the numbers of what was sampled, as shades.

import { el } from "./dom.js";

// What there may be a number of for each sampled token: `bounds` are between the shades of `depth`, `ends` name the first and the last.
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
};
const SHADES = STREAMS.log_probs.bounds.length;
const FIRST = 4000; // tokens that are drawn at once

let chosen = "log_probs"; // what the user wants to see
let shownStream = chosen; // what there is of it

const isThere = (sequence, name) => Array.isArray(sequence?.[name]) && sequence[name].some((value) => typeof value === "number");

function shade(facts, place) {
  const value = facts.streams[shownStream][place];
  if (Number.isNaN(value)) return "";
  const { bounds, depth } = STREAMS[shownStream];
  return ` l${bounds.filter((bound) => depth(value) > bound).length}`;
}

/** Per token whether it was sampled and its numbers, from the stretches and the short lists of the rollout format. */
export function unpack(sequence) {
  const count = sequence.ids.length;
  const sampled = new Uint8Array(count);
  const streams = Object.fromEntries(Object.keys(STREAMS).map((name) => [name, new Float64Array(count).fill(NaN)]));
  let next = 0;
  for (const [start, end] of sequence.sampled ?? []) {
    for (let place = Math.max(0, start); place < Math.min(end, count); place++, next++) {
      sampled[place] = 1;
      for (const [name, values] of Object.entries(streams)) {
        const value = sequence[name]?.[next];
        if (typeof value === "number") values[place] = value;
      }
    }
  }
  return { sampled, streams };
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

/** What the colours mean; where there are several streams, a choice of what is coloured. */
export function legend(sequences) {
  const there = Object.keys(STREAMS).filter((name) => sequences.some((sequence) => isThere(sequence, name)));
  const scale = el("span", {});
  function draw() {
    shownStream = there.includes(chosen) ? chosen : there[0] ?? chosen;
    const shades = Array.from({ length: SHADES + 1 }, (_, i) =>
      el("i", { class: `tok s l${i} swatch ${i === 0 ? "first" : i === SHADES ? "last" : ""}` }, "\u00a0"),
    );
    const [first, last] = STREAMS[shownStream].ends;
    scale.replaceChildren(...(there.length ? [`sampled: ${first}`, ...shades, last] : [el("i", { class: "tok s" }, "sampled")]));
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
              chosen = event.target.value;
              draw();
              for (const view of document.querySelectorAll(".tokens")) view.dispatchEvent(new Event("shade"));
            },
          },
          there.map((name) => el("option", { value: name, selected: name === shownStream }, STREAMS[name].name)),
        );
  return el("div", { class: "legend" }, choice, el("i", { class: "tok" }, "template and others"), scale);
}

/** The sequence as an element: arrow keys and the pointer tell of single tokens. `skip` leaves out so many in front. */
export function tokenView(sequence, { name = "Tokens", skip = 0 } = {}) {
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
  flow.addEventListener("pointerover", (event) => {
    const at = event.target.dataset?.at;
    if (at !== undefined) line.textContent = described(sequence, Number(at), facts);
  });
  flow.addEventListener("click", (event) => {
    if (event.target.dataset?.at !== undefined) select(Number(event.target.dataset.at) - skip);
  });
  flow.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: current - 1, ArrowRight: current + 1, Home: 0, End: spans.length - 1 }[event.key];
    if (move === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    select(Math.max(0, move));
  });

  draw(Math.min(skip + FIRST, sequence.ids.length));
  const rest = sequence.ids.length - skip - spans.length;
  const more = rest
    ? el("button", { type: "button", onclick: () => (draw(sequence.ids.length), more.remove()) }, `${rest.toLocaleString("en")} more tokens`)
    : null;
  const again = () => spans.forEach((span, i) => (span.className = `tok${facts.sampled[skip + i] ? " s" : ""}${shade(facts, skip + i)}${i === current ? " at" : ""}`));
  return el("div", { class: "tokens", onshade: again }, flow, more, line);
}

/** All sequences of an episode; those before the last are branches that were left. */
export function sequencesView(sequences, { skip = 0 } = {}) {
  if (!sequences?.length) return el("p", { class: "soft pad" }, "There are no tokens here.");
  if (sequences.length === 1) return tokenView(sequences[0], { skip });
  return el(
    "div",
    {},
    sequences.map((sequence, place) => {
      const name = place === sequences.length - 1 ? "present sequence" : `branch ${place + 1}, left`;
      return el("section", {}, el("h3", {}, name), tokenView(sequence, { name }));
    }),
  );
}
