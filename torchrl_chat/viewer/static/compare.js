// Two runs, or two checkpoints of one, on the same questions.

import { el, shown } from "./dom.js";

/** A side of a comparison: its entries by question. */
function byQuestion(entries) {
  const found = new Map();
  for (const entry of entries) {
    const held = found.get(entry.question);
    if (held) held.push(entry);
    else found.set(entry.question, [entry]);
  }
  return found;
}

function mean(entries, key) {
  const values = entries.map((entry) => entry[key]).filter((value) => value !== null);
  return values.length ? values.reduce((sum, value) => sum + Number(value), 0) / values.length : null;
}

/**
 * The questions that both sides answered, in the first side's order, and how many one side alone has. A question has the first side's
 * `order`, `reward`, `success` (the share that is right) and so on; `gain` is how much more the second side earned.
 */
export function paired(first, second) {
  const [ours, theirs] = [byQuestion(first), byQuestion(second)];
  const pairs = [];
  for (const [question, a] of ours) {
    const b = theirs.get(question);
    if (!b) continue;
    const [reward, other] = [mean(a, "reward"), mean(b, "reward")];
    pairs.push({
      sides: [a, b],
      id: a[0].id,
      order: a[0].order,
      title: a[0].title || a[0].id,
      step: a[0].step,
      reward,
      sampled: mean(a, "sampled"),
      right: [a, b].map((side) => mean(side, "success")),
      rewards: [reward, other],
      gain: reward === null || other === null ? null : other - reward,
    });
  }
  return { pairs, alone: [ours.size - pairs.length, theirs.size - pairs.length] };
}

/** How much of their questions the sides have right, each question weighing alike. */
export function shares(pairs) {
  return [0, 1].map((side) => {
    const graded = pairs.map((pair) => pair.right[side]).filter((value) => value !== null);
    return graded.length ? graded.reduce((sum, value) => sum + value, 0) / graded.length : null;
  });
}

/** Which side is better, as a sign and in words. */
function better(pair) {
  const [a, b] = pair.right[0] !== null && pair.right[1] !== null && pair.right[0] !== pair.right[1] ? pair.right : pair.rewards;
  if (a === null || b === null || a === b) return ["=", "no difference", "soft"];
  return b > a ? ["▲", "the second is better", "good"] : ["▼", "the second is worse", "bad"];
}

const short = (value) => shown(value === null ? null : Number(value.toPrecision(3)));

/** What stands in the list for a question. */
export function drawPair(pair) {
  const [sign, word, kind] = better(pair);
  const rights = pair.right.map((share, side) => (share === null ? "no verdict" : `${shown(share * pair.sides[side].length)} of ${pair.sides[side].length} right`));
  return [
    el("span", { class: kind, role: "img", "aria-label": word, title: word }, sign),
    el("span", { class: "what" }, pair.title),
    el("span", { class: "num" }, pair.rewards.map(short).join(" → ")),
    el("span", { class: "more" }, rights.join(" → ")),
  ];
}
