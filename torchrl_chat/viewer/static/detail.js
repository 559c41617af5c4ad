// One episode, or the members of a group side by side.

import { el, pretty, rewardParts, shown, terms } from "./dom.js";
import { conversation, textOf } from "./messages.js";
import { legend, sequencesView } from "./tokens.js";
import { hasTree, treesView } from "./trees.js";

/** How an episode may be looked at: by its name in the address, what it is called. */
export const VIEWS = { messages: "Messages", tokens: "Tokens", tree: "Tree", json: "JSON" };

/** ✓, ✗ or a dot where there is no verdict; screen readers are told in words. */
export function verdict(success) {
  const [sign, word, kind] = success === true ? ["✓", "right", "good"] : success === false ? ["✗", "wrong", "bad"] : ["·", "no verdict", "soft"];
  return el("span", { class: kind, role: "img", "aria-label": word, title: word }, sign);
}

/**
 * What is seen of an episode: `view` is one of VIEWS, `rendered` whether Markdown is shown as such, `sequence` and `token` the token
 * that is chosen; `onToken(sequence, token)` is told of another, `onTokens(sequence, token)` leads to it from elsewhere, `onColour(name)` is
 * told what tokens are coloured by.
 */
function body(episode, look, { messages = episode.messages, skip = 0 } = {}) {
  const { view, rendered } = look;
  if (view === "tokens") return sequencesView(episode.sequences, { skip, sequence: look.sequence, token: look.token, onSelect: look.onToken });
  if (view === "json") return el("pre", { class: "json pad", tabindex: "0", role: "group", "aria-label": "JSON" }, pretty(episode));
  if (view === "tree") return treesView(episode, { rendered, onOpen: look.onTokens });
  return conversation(messages, { rendered });
}

/** The meaning of the colours, above tokens. */
function colours(episodes, { view, onColour }) {
  const sequences = episodes.flatMap((episode) => episode.sequences ?? []);
  return view === "tokens" && sequences.length ? legend(sequences, onColour) : null;
}

/** The present episode. */
export function episodeView(episode, look) {
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
    ["extracted", episode.extracted],
    ["failure", episode.env_failure && el("span", { class: "bad" }, episode.env_failure)],
    ["row", shown(episode.row)],
    ["group", episode.group],
    ["place", episode.place === null || episode.place === undefined ? null : shown(episode.place)],
    ["seed", episode.seed],
    ...Object.entries(more).map(([name, value]) => [name, typeof value === "object" ? JSON.stringify(value) : shown(value)]),
    ["written", typeof time === "number" ? new Date(time * 1000).toLocaleString() : null],
    ["id", episode.id],
  ]);
  return el(
    "div",
    { class: "inner" },
    el("section", { class: "scroll", tabindex: "0", "aria-label": "Conversation" }, colours([episode], look), parted(episode, look), body(episode, look)),
    el(
      "aside",
      { class: "panel facts", "aria-label": "About the episode" },
      el("h2", {}, "Episode"),
      el("dl", { class: "facts-list" }, facts),
      rewardParts(episode.reward_parts),
    ),
  );
}

/** Beside the messages of the last sequence: that there are others. */
function parted(episode, { view }) {
  if (view !== "messages" || !hasTree(episode) || !(episode.sequences?.length > 1)) return null;
  return el("p", { class: "note above" }, `These are the messages of the last of ${shown(episode.sequences.length)} token sequences; the others are under Tree.`);
}

/** How many items lists have in common at their start. */
function sharedStart(lists) {
  const shortest = Math.min(...lists.map((list) => list.length));
  let shared = 0;
  while (shared < shortest && lists.every((list) => list[shared] === lists[0][shared])) shared++;
  return shared;
}

/** What episodes have in common at their beginning: messages, and tokens where none of them has branches. */
function common(episodes) {
  const messages = sharedStart(episodes.map((episode) => (Array.isArray(episode.messages) ? episode.messages : []).map((message) => JSON.stringify(message))));
  // Branches begin anew: what they have in common is not the same prompt.
  const plain = episodes.every((episode) => episode.sequences?.length === 1);
  return { messages, tokens: plain ? sharedStart(episodes.map((episode) => episode.sequences[0].ids)) : 0 };
}

function member(episode, look, { place, count, shared, onOpen }) {
  const number = `#${episode.place ?? place}`;
  return el(
    "article",
    { class: "member", "aria-label": `member ${place + 1} of ${count}` },
    el(
      "header",
      {},
      el("div", {}, verdict(episode.success), el("button", { type: "button", onclick: onOpen }, number), el("b", {}, shown(episode.reward))),
      el("p", {}, `${episode.stop} · ${shown(episode.sampled_tokens)} sampled`),
    ),
    body(episode, look, { messages: (Array.isArray(episode.messages) ? episode.messages : []).slice(shared.messages), skip: shared.tokens }),
  );
}

function together(label, episodes, look, shared, columns) {
  const question = (episodes[0]?.messages ?? []).slice(0, shared.messages);
  const prompt = question.map((message) => `${message.role}: ${textOf(message.content)}`).join("\n");
  const left = look.view === "tokens" && shared.tokens ? el("p", { class: "note" }, `${shown(shared.tokens)} tokens that all of them begin with are left out.`) : null;
  return el(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": label },
    look.view !== "json" && prompt ? el("div", { class: "shared", tabindex: "0", role: "group", "aria-label": "What they share" }, prompt) : null,
    colours(episodes, look),
    left,
    el("div", { class: "columns" }, columns),
  );
}

/** Episodes of one row beside each other; what they share stands above. */
export function groupView(episodes, look, onOpen) {
  const shared = common(episodes);
  const columns = episodes.map((episode, place) => member(episode, look, { place, count: episodes.length, shared, onOpen: () => onOpen(place) }));
  return together("The group, side by side", episodes, look, shared, columns);
}

/** The answers of two sides to one question: [{name, episodes}, {name, episodes}], a column each. `onOpen(side, place)` leads to one. */
export function pairView(sides, look, onOpen) {
  const all = sides.flatMap(({ episodes }) => episodes);
  const shared = common(all);
  const columns = sides.map(({ name, episodes }, side) =>
    el(
      "section",
      { class: "side", "aria-label": name },
      el("h2", { class: "side-name" }, name),
      episodes.map((episode, place) => member(episode, look, { place, count: episodes.length, shared, onOpen: () => onOpen(side, place) })),
    ),
  );
  return together("Two runs, side by side", all, look, shared, columns);
}
