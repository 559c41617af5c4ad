// The numbers of a run over its steps: a small chart each, drawn by hand; a step leads to its episodes.

import { el, shown } from "./dom.js";

const [WIDTH, HEIGHT, PAD] = [300, 90, 4];
const FIRST = [
  "pass_rate", "reward", "loss", "entropy", "grad_norm", "lr", "ratio_p01", "ratio_p99", "mismatch", "cut", "equal_groups", "ungraded",
  "sampled_mean", "tokens_per_second", "memory",
]; // what is asked for most; others follow by name

function svg(tag, properties, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(properties)) element.setAttribute(name, String(value));
  element.append(...children);
  return element;
}

/** The points of a number: [step, value] in the order of steps; of a step that stands twice (a run that went on), the last. */
function pointsOf(rows, name) {
  const found = new Map();
  for (const row of rows) if (typeof row[name] === "number") found.set(row.step, row[name]);
  return [...found].sort(([a], [b]) => a - b);
}

/** The names of what rows have numbers of. */
function namesOf(rows) {
  const found = new Set();
  for (const row of rows) for (const [name, value] of Object.entries(row)) if (name !== "step" && typeof value === "number") found.add(name);
  const rank = (name) => (FIRST.includes(name) ? FIRST.indexOf(name) : FIRST.length);
  return [...found].sort((a, b) => rank(a) - rank(b) || (a < b ? -1 : 1));
}

/** One chart. `lines` are [{name, kind, points}] of one number; `onStep(step)` is called when a step is asked for. */
function chart(name, lines, onStep) {
  const all = lines.flatMap(({ points }) => points);
  const steps = [...new Set(all.map(([step]) => step))].sort((a, b) => a - b);
  const values = all.map(([, value]) => value);
  const [low, high] = [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))];
  const x = (step) => PAD + ((WIDTH - 2 * PAD) * (step - steps[0])) / (steps.at(-1) - steps[0] || 1);
  const y = (value) => (high > low ? HEIGHT - PAD - ((HEIGHT - 2 * PAD) * (value - low)) / (high - low) : HEIGHT / 2);
  const cursor = svg("line", { class: "cursor", y1: 0, y2: HEIGHT });
  const picture = svg(
    "svg",
    { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true" },
    ...lines.map(({ kind, points }) => svg("polyline", { class: kind, points: points.map(([step, value]) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`).join(" ") })),
    ...lines.flatMap(({ kind, points }) => (points.length < 40 ? points.map(([step, value]) => svg("circle", { class: kind, cx: x(step).toFixed(1), cy: y(value).toFixed(1), r: 1.6 })) : [])),
    cursor,
  );
  const told = el("output", { class: "told" });
  let at = steps.length - 1;
  function select(place) {
    at = Math.max(0, Math.min(steps.length - 1, place));
    const step = steps[at];
    cursor.setAttribute("x1", x(step));
    cursor.setAttribute("x2", x(step));
    const there = lines.map(({ name: line, points }) => [line, points.find(([other]) => other === step)]).filter(([, point]) => point);
    const text = `step ${step}: ${there.map(([line, [, value]]) => `${there.length > 1 || lines.length > 1 ? `${line} ` : ""}${shown(value)}`).join(", ")}`;
    told.textContent = text;
    field.setAttribute("aria-valuenow", step);
    field.setAttribute("aria-valuetext", text);
  }
  const field = el(
    "div",
    {
      class: "plot", role: "slider", tabindex: "0", "aria-label": `${name}, by steps`, "aria-valuemin": steps[0], "aria-valuemax": steps.at(-1),
      onpointermove: (event) => select(nearest(event)),
      onclick: (event) => (select(nearest(event)), onStep(steps[at])),
      onkeydown: (event) => {
        if (event.altKey || event.ctrlKey || event.metaKey) return;
        const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: steps.length - 1 }[event.key];
        if (event.key === "Enter") onStep(steps[at]);
        else if (to === undefined) return;
        else select(to);
        event.preventDefault();
      },
    },
    picture,
  );
  function nearest(event) {
    const box = field.getBoundingClientRect();
    const step = steps[0] + ((event.clientX - box.left) / box.width) * (steps.at(-1) - steps[0]);
    return steps.reduce((best, other, place) => (Math.abs(other - step) < Math.abs(steps[best] - step) ? place : best), 0);
  }
  select(at);
  return el(
    "figure",
    { class: "chart", "data-name": name },
    el("figcaption", {}, el("b", {}, name), el("span", { class: "soft" }, `${shown(low)} to ${shown(high)}`)),
    field,
    told,
  );
}

/**
 * The curves of runs: [{name, metrics, evaluations}], rows with a "step" each. The first run is a full line, the second a broken one;
 * evaluations are points.
 */
export function curvesView(runs, { onStep }) {
  const numbers = namesOf(runs.flatMap(({ metrics, evaluations }) => [...metrics, ...evaluations]));
  if (!numbers.length) {
    return el(
      "div",
      { class: "empty" },
      el("h1", {}, "No curves"),
      el("p", {}, "Curves are drawn from metrics.jsonl and evaluations.jsonl beside a rollout file of the server, as training writes them."),
    );
  }
  const charts = numbers.map((name) => {
    const lines = runs.flatMap(({ name: run, metrics, evaluations }, place) => [
      { name: runs.length > 1 ? run : "training", kind: `run${place}`, points: pointsOf(metrics, name) },
      { name: runs.length > 1 ? `${run}, evaluation` : "evaluation", kind: `run${place} evaluated`, points: pointsOf(evaluations, name) },
    ]);
    return chart(name, lines.filter(({ points }) => points.length), onStep);
  });
  const keys = runs.map(({ name }, place) => el("span", { class: `key run${place}` }, name));
  return el(
    "section",
    { class: "scroll curves", "aria-label": "Curves" },
    el("p", { class: "note" }, ...keys, "A step leads to its episodes: click, or ← → and Enter."),
    el("div", { class: "charts" }, charts),
  );
}
