// What stands around an episode: the buttons above it, and what is said where there is none.

import { VIEWS } from "./detail.js";
import { el, shown } from "./dom.js";

/**
 * The buttons above what is shown. `members` is null for a question of two runs; else how many a group has (`size`), and whether it is `shown`.
 * The others are what the buttons do.
 */
export function toolbar({ title, view, rendered, members, back, move, render, group, turnTo }) {
  const segment = ([name, text]) => el("button", { type: "button", "aria-pressed": String(view === name), onclick: () => turnTo(name) }, text);
  return el(
    "div",
    { class: "tools" },
    el("button", { id: "back", type: "button", onclick: back }, "‹ List"),
    el("h1", {}, title),
    el("button", { class: "icon", type: "button", "aria-label": "Previous episode", title: "Previous (k)", onclick: () => move(-1) }, "↑"),
    el("button", { class: "icon", type: "button", "aria-label": "Next episode", title: "Next (j)", onclick: () => move(1) }, "↓"),
    el("span", { class: "grow" }),
    el("button", { type: "button", "aria-pressed": String(rendered), title: "Markdown and code as such, or the raw text (m)", onclick: render }, "Rendered", el("kbd", {}, "m")),
    members &&
      el(
        "button",
        {
          type: "button", id: "compare", "aria-pressed": String(members.shown), disabled: members.size < 2, onclick: group,
          title: members.size < 2 ? "No other episode of this row" : "The episodes of this row",
        },
        members.shown ? "One episode" : `Compare ${members.size > 1 ? members.size : ""}`,
        el("kbd", {}, "g"),
      ),
    el("div", { class: "segments", role: "group", "aria-label": "Show as" }, Object.entries(VIEWS).map(segment)),
  );
}

/** What a file is, where no episode of it is shown; `missing` is the id of one that was asked for. */
export function aboutFile({ entries, problems }, missing) {
  const first = problems.slice(0, 5).map(({ line, why }) => el("li", {}, `line ${line}: ${why}`));
  return el(
    "div",
    { class: "empty" },
    el("h1", {}, `${shown(entries.length)} episodes`),
    missing ? el("p", { class: "bad" }, `There is no episode ${missing} in this file.`) : el("p", {}, "Choose one from the list, or press j."),
    first.length ? el("p", { class: "bad" }, `${shown(problems.length)} lines were left out:`) : null,
    first.length ? el("ul", {}, first) : null,
  );
}

/** What is said of a folder without rollout files; `others` counts the files that might have been some by their names. */
export function emptyFolder(name, others) {
  const beside = others ? `; ${shown(others)} other ${others === 1 ? "file ends" : "files end"} in .jsonl and ${others === 1 ? "holds" : "hold"} no episodes` : "";
  return el(
    "div",
    { class: "empty" },
    el("h1", {}, "No rollout files yet"),
    el("p", {}, `There is no rollout file in ${name}${beside}.`),
    el("p", {}, "Training writes rollouts.jsonl into its run's folder, torchrl-chat eval --out an evaluation's, torchrl-chat gateway --rollouts what agents did. This page looks for new files every few seconds."),
    el("p", {}, "Files from elsewhere: open one (o), or drop it here. It is read in this browser and sent nowhere."),
  );
}
