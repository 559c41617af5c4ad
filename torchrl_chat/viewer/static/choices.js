// Which episodes are listed, and in which order; what there is to choose from; the chosen ones as a file.

import { byId, el, shown } from "./dom.js";

/** The keys of the address that choose, and where a person sets them. */
export const FILTERS = ["q", "success", "stop", "task", "grade", "step", "reward"];

/** What is counted for each field that offers what there is: its values, and what a value is called. */
const OFFERED = {
  stop: { any: "any stop", of: (entry) => entry.stop },
  task: { any: "any task", of: (entry) => entry.task },
  step: { any: "any step", of: (entry) => entry.step, name: (step) => `step ${step}` },
};

/** Fill the fields with what there is among entries; fields with nothing to choose are hidden. */
export function offer(entries, state) {
  for (const [key, { any, of, name = String }] of Object.entries(OFFERED)) {
    const counts = new Map();
    for (const entry of entries) {
      const value = of(entry);
      if (value !== null) counts.set(value, (counts.get(value) ?? 0) + 1);
    }
    const wanted = state[key] ?? "";
    if (wanted && ![...counts.keys()].some((value) => String(value) === wanted)) counts.set(wanted, 0);
    const values = [...counts].sort(([a], [b]) => (typeof a === "number" && typeof b === "number" ? a - b : String(a) < String(b) ? -1 : 1));
    const field = byId(key);
    field.replaceChildren(
      el("option", { value: "" }, any),
      ...values.map(([value, count]) => el("option", { value: String(value) }, `${name(value)} (${shown(count)})`)),
    );
    field.value = wanted;
    field.closest("label").hidden = key !== "stop" && values.length < 2 && !wanted;
  }
  const failed = entries.some((entry) => entry.failed) || state.grade;
  byId("grade").closest("label").hidden = !failed;
}

/** A range of numbers, "0.5..", "..1", "0..1" or "1": its two ends, or null where it is none. */
export function rangeOf(text) {
  const found = /^\s*(-?[\d.]+(?:e-?\d+)?)?\s*(\.\.)?\s*(-?[\d.]*\d(?:e-?\d+)?)?\s*$/i.exec(spaced(text ?? ""));
  if (!found || (found[1] === undefined && found[3] === undefined)) return null;
  const [low, high] = [found[1], found[2] ? found[3] : found[1]].map((end) => (end === undefined ? null : Number(end)));
  return Number.isNaN(low) || Number.isNaN(high) ? null : { low: low ?? -Infinity, high: high ?? Infinity };
}

// "1..2" could be read as "1." and ".2": what joins two ends stands apart.
const spaced = (text) => text.replace("..", " .. ");

/** The entries that pass, in the order of the file. */
export function chosen(entries, { q = "", success = "", stop = "", task = "", grade = "", step = "", reward = "" } = {}) {
  const words = q.trim().toLowerCase();
  const range = rangeOf(reward);
  return entries.filter(
    (entry) =>
      (!success || String(entry.success) === success) &&
      (!stop || entry.stop === stop) &&
      (!task || entry.task === task) &&
      (!grade || entry.failed === (grade === "failed")) &&
      (!step || String(entry.step) === step) &&
      (!range || (entry.reward !== null && range.low <= entry.reward && entry.reward <= range.high)) &&
      (!words || entry.text.includes(words)),
  );
}

/** Rows sorted by a key, "-" in front for the largest first; those without a number stand last. A list of its own. */
export function sorted(rows, sort = "file") {
  if (!sort || sort === "file") return rows;
  const key = sort.replace(/^-/, "");
  const sign = sort.startsWith("-") ? -1 : 1;
  const none = (row) => row[key] === null || row[key] === undefined;
  return [...rows].sort((a, b) => none(a) - none(b) || (none(a) ? 0 : sign * (a[key] - b[key])) || a.order - b.order);
}

/** A rollout file of the entries: their lines as they stand in the file. */
export function exported(blob, entries) {
  return new Blob(entries.flatMap((entry) => [blob.slice(entry.start, entry.end), "\n"]), { type: "application/x-ndjson" });
}

/** Hand a file to the person. */
export function save(blob, name) {
  const link = el("a", { href: URL.createObjectURL(blob), download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
