// A token sequence: who wrote each token (the mask), and how likely the policy found what it sampled.

import { el } from "./dom.js";

const LEVELS = [-0.05, -0.3, -0.8, -1.8, -3.5]; // log-probs between the shades; below the last it is the darkest
const FIRST = 4000; // tokens that are drawn at once

const level = (value) => LEVELS.filter((bound) => value < bound).length;

/** Per token whether it was sampled and its log-prob, from the stretches and the short list of the rollout format. */
export function unpack(sequence) {
  const count = sequence.ids.length;
  const sampled = new Uint8Array(count);
  const logProbs = new Float64Array(count).fill(NaN);
  let next = 0;
  for (const [start, end] of sequence.sampled ?? []) {
    for (let place = Math.max(0, start); place < Math.min(end, count); place++) {
      sampled[place] = 1;
      const value = sequence.log_probs?.[next++];
      if (typeof value === "number") logProbs[place] = value;
    }
  }
  return { sampled, logProbs };
}

/** Line breaks and tabs with a sign of their own, other control characters as their pictures (U+2400 ...). */
function visible(text) {
  const signs = { "\n": "⏎\n", "\t": "⇥\t" };
  return text.replace(/[\u0000-\u001f]/g, (sign) => signs[sign] ?? String.fromCharCode(0x2400 + sign.charCodeAt(0)));
}

function described(sequence, place, { sampled, logProbs }) {
  const piece = sequence.pieces?.[place];
  const bytes = sequence.bytes?.[String(place)];
  const parts = [`token ${place + 1} of ${sequence.ids.length}`, `id ${sequence.ids[place]}`];
  if (piece !== undefined) parts.push(JSON.stringify(piece));
  if (bytes) parts.push(`bytes ${bytes}`);
  parts.push(sampled[place] ? "sampled" : "not sampled");
  if (!Number.isNaN(logProbs[place])) {
    parts.push(`log-prob ${logProbs[place].toFixed(4)}, p ${Math.exp(logProbs[place]).toPrecision(3)}`);
  }
  return parts.join(" · ");
}

/** What the colours mean. */
export function legend(scored) {
  const last = LEVELS.length;
  const shade = (i) => el("i", { class: `tok s l${i} swatch ${i === 0 ? "first" : i === last ? "last" : ""}` }, "\u00a0");
  const scale = scored ? ["sampled: likely", ...Array.from({ length: last + 1 }, (_, i) => shade(i)), "unlikely"] : [el("i", { class: "tok s" }, "sampled")];
  return el("div", { class: "legend" }, el("i", { class: "tok" }, "template and others"), el("span", {}, scale));
}

/** Whether log-probs are there to be coloured. */
export const isScored = (sequence) => Boolean(sequence?.log_probs?.some((value) => typeof value === "number"));

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
      const value = facts.logProbs[place];
      span.className = `tok${facts.sampled[place] ? " s" : ""}${Number.isNaN(value) ? "" : ` l${level(value)}`}`;
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
  return el("div", { class: "tokens" }, flow, more, line);
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
