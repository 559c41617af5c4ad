// One episode, or the members of a group side by side.

import { el, pretty, rewardParts, shown, terms } from "./dom.js";
import { conversation, textOf } from "./messages.js";
import { legend, sequencesView } from "./tokens.js";

export const VIEWS = ["messages", "tokens", "json"];

/** ✓, ✗ or a dot where there is no verdict; screen readers are told in words. */
export function verdict(success) {
  const [sign, word, kind] = success === true ? ["✓", "right", "good"] : success === false ? ["✗", "wrong", "bad"] : ["·", "no verdict", "soft"];
  return el("span", { class: kind, role: "img", "aria-label": word, title: word }, sign);
}

function body(episode, view, { messages = episode.messages, skip = 0 } = {}) {
  if (view === "tokens") return sequencesView(episode.sequences, { skip });
  if (view === "json") return el("pre", { class: "json pad" }, pretty(episode));
  return conversation(messages);
}

/** The meaning of the colours, above tokens. */
function colours(episodes, view) {
  const sequences = episodes.flatMap((episode) => episode.sequences ?? []);
  return view === "tokens" && sequences.length ? legend(sequences) : null;
}

/** The present episode. */
export function episodeView(episode, view) {
  const { metadata = {} } = episode;
  const { time, ...more } = metadata ?? {};
  const facts = terms([
    ["reward", el("b", {}, shown(episode.reward))],
    ["verdict", episode.success === null || episode.success === undefined ? null : el("span", {}, verdict(episode.success), episode.success ? " right" : " wrong")],
    ["stop", episode.cut ? `${episode.stop}, cut` : episode.stop],
    ["reference", episode.reference === null || episode.reference === undefined ? null : textOf(episode.reference)],
    ["error", episode.error && el("span", { class: "bad" }, episode.error)],
    ["no grade", episode.grade_failure],
    ["turns", shown(episode.turns)],
    ["tokens", `${shown(episode.total_tokens)}, ${shown(episode.sampled_tokens)} sampled`],
    ["finish", episode.finish_reason],
    ["prompt", episode.prompt_differs ? el("span", { class: "bad" }, "the server's prompt differed") : null],
    ["row", shown(episode.row)],
    ["group", episode.group],
    ["place", episode.place === null ? null : shown(episode.place)],
    ["seed", episode.seed],
    ...Object.entries(more).map(([name, value]) => [name, typeof value === "object" ? JSON.stringify(value) : shown(value)]),
    ["written", typeof time === "number" ? new Date(time * 1000).toLocaleString() : null],
    ["id", episode.id],
  ]);
  return el(
    "div",
    { class: "inner" },
    el("section", { class: "scroll", tabindex: "0", "aria-label": "Conversation" }, colours([episode], view), body(episode, view)),
    el(
      "aside",
      { class: "panel facts", "aria-label": "About the episode" },
      el("h2", {}, "Episode"),
      el("dl", { class: "facts-list" }, facts),
      rewardParts(episode.reward_parts),
    ),
  );
}

/** How many items lists have in common at their start. */
function sharedStart(lists) {
  const shortest = Math.min(...lists.map((list) => list.length));
  let shared = 0;
  while (shared < shortest && lists.every((list) => list[shared] === lists[0][shared])) shared++;
  return shared;
}

/** Episodes of one row beside each other; what they share stands above. */
export function groupView(episodes, view, onOpen) {
  const shared = sharedStart(episodes.map((episode) => (episode.messages ?? []).map((message) => JSON.stringify(message))));
  const question = (episodes[0]?.messages ?? []).slice(0, shared);
  // Branches begin anew: what they have in common is not the same prompt.
  const plain = episodes.every((episode) => episode.sequences?.length === 1);
  const skip = plain ? sharedStart(episodes.map((episode) => episode.sequences[0].ids)) : 0;
  const members = episodes.map((episode, place) =>
    el(
      "article",
      { class: "member", "aria-label": `member ${place + 1} of ${episodes.length}` },
      el(
        "header",
        {},
        el("div", {}, verdict(episode.success), el("button", { type: "button", onclick: () => onOpen(place) }, `#${episode.place ?? place}`), el("b", {}, shown(episode.reward))),
        el("p", {}, `${episode.stop} · ${shown(episode.sampled_tokens)} sampled`),
      ),
      body(episode, view, { messages: (episode.messages ?? []).slice(shared), skip }),
    ),
  );
  const prompt = question.map((message) => `${message.role}: ${textOf(message.content)}`).join("\n");
  const left = view === "tokens" && skip ? el("p", { class: "note" }, `${shown(skip)} tokens that all of them begin with are left out.`) : null;
  return el(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": "The group, side by side" },
    view !== "json" && prompt ? el("div", { class: "shared" }, prompt) : null,
    colours(episodes, view),
    left,
    el("div", { class: "columns" }, members),
  );
}
