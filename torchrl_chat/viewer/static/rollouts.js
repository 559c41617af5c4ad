// The rollout viewer: open a file, filter and sort its episodes, look at one or compare a group.

import { VIEWS, episodeView, groupView, verdict } from "./detail.js";
import { byId, el, shown } from "./dom.js";
import { choose, readEpisode, readIndex } from "./episodes.js";
import { VirtualList } from "./list.js";
import { ask, askJSON, explain, shortcut, start } from "./shell.js";

let blob = null;
let entries = [];
let groups = new Map();
let view = "messages";
let comparing = false;
let present = null; // the entry that is shown
let reading = null; // an AbortController while a file is read
let shows = 0; // counts what was asked to be shown: the newest wins

const list = new VirtualList(byId("list"), drawItem, (entry) => open(entry));

function drawItem(entry) {
  const facts = [entry.stop, entry.step === null ? null : `step ${entry.step}`, entry.sampled === null ? null : `${shown(entry.sampled)} tokens`];
  const title = entry.title || entry.id;
  return [
    verdict(entry.success),
    el("span", { class: "what" }, title),
    el("span", { class: "num" }, shown(entry.reward)),
    el("span", { class: "more" }, facts.filter(Boolean).join(" · "), entry.row === null ? "" : ` · row ${entry.row}`),
  ];
}

// ---------------------------------------------------------------- files
async function load(source, name) {
  reading?.abort();
  reading = new AbortController();
  const { signal } = reading;
  const begun = performance.now();
  say(`reading ${name}`);
  try {
    const read = await readIndex(source, (bytes) => say(`reading ${name}: ${Math.round((100 * bytes) / source.size)} %`), signal);
    signal.throwIfAborted();
    blob = source;
    entries = read.entries;
    groups = grouped(entries);
    present = null;
    comparing = false;
    fillStops();
    refresh();
    showProblems(read.problems);
    document.body.classList.remove("opened");
    document.title = `${name} · torchrl_chat`;
    const seconds = (performance.now() - begun) / 1000;
    byId("status").dataset.seconds = seconds.toFixed(3);
    say(`${name}: ${shown(entries.length)} episodes, read in ${seconds.toFixed(2)} s`);
    byId("list").focus({ preventScroll: true });
  } catch (error) {
    if (!signal.aborted) {
      say(`${name}: ${error.message}`);
    }
  }
}

function grouped(rows) {
  const found = new Map();
  for (const row of rows) {
    if (row.group === null) continue;
    if (found.has(row.group)) found.get(row.group).push(row);
    else found.set(row.group, [row]);
  }
  return found;
}

async function loadServed(name) {
  say(`fetching ${name}`);
  try {
    const path = name.split("/").map(encodeURIComponent).join("/");
    await load(await (await ask(`files/${path}`)).blob(), name);
  } catch (error) {
    say(`${name}: ${error.message}`);
  }
}

function say(text) {
  byId("status").textContent = text;
}

function showProblems(problems) {
  const detail = byId("detail");
  const first = problems.slice(0, 5).map(({ line, why }) => el("li", {}, `line ${line}: ${why}`));
  detail.replaceChildren(
    el(
      "div",
      { class: "empty" },
      el("h1", {}, `${shown(entries.length)} episodes`),
      el("p", {}, "Choose one from the list, or press j."),
      problems.length ? el("p", { class: "bad" }, `${shown(problems.length)} lines were left out:`) : null,
      problems.length ? el("ul", {}, first) : null,
    ),
  );
}

function fillStops() {
  const counts = new Map();
  for (const { stop } of entries) counts.set(stop, (counts.get(stop) ?? 0) + 1);
  const options = [...counts].sort().map(([stop, count]) => el("option", { value: stop }, `${stop} (${shown(count)})`));
  byId("stop").replaceChildren(el("option", { value: "" }, "any stop"), ...options);
}

function refresh() {
  const found = choose(entries, {
    words: byId("search").value,
    success: byId("success").value,
    stop: byId("stop").value,
    sort: byId("sort").value,
  });
  const graded = found.filter((entry) => entry.success !== null);
  const right = graded.filter((entry) => entry.success).length;
  const verdicts = graded.length ? ` · ${((100 * right) / graded.length).toFixed(1)} % right` : "";
  byId("count").textContent = `${shown(found.length)} of ${shown(entries.length)} episodes${verdicts}`;
  list.set(found);
}

// ---------------------------------------------------------------- one episode, or its group
async function open(entry) {
  present = entry;
  const ticket = ++shows;
  const members = comparing && entry.group !== null ? groupOf(entry) : [entry];
  try {
    const episodes = await Promise.all(members.map((member) => readEpisode(blob, member)));
    if (ticket !== shows) return;
    const compared = comparing && members.length > 1;
    const content = compared ? groupView(episodes, view, (place) => ((comparing = false), list.chooseRow(members[place]))) : episodeView(episodes[0], view);
    byId("detail").replaceChildren(tools(entry, compared), content);
  } catch (error) {
    byId("detail").replaceChildren(el("div", { class: "empty" }, el("p", { class: "bad" }, `line ${entry.line}: ${error.message}`)));
  }
  document.body.classList.add("opened");
}

const groupOf = (entry) => [...groups.get(entry.group)].sort((a, b) => (a.place ?? a.order) - (b.place ?? b.order));

function tools(entry, compared) {
  const size = entry.group === null ? 0 : groups.get(entry.group).length;
  const name = compared ? `Row ${entry.row ?? "–"}, ${size} members` : `Episode ${list.position >= 0 ? `${shown(list.position + 1)} of ${shown(list.length)}` : entry.id}`;
  const segment = (one) =>
    el("button", { type: "button", "aria-pressed": String(view === one), onclick: () => turnTo(one) }, { messages: "Messages", tokens: "Tokens", json: "JSON" }[one]);
  return el(
    "div",
    { class: "tools" },
    el("button", { id: "back", type: "button", onclick: back }, "‹ List"),
    el("h1", {}, name),
    el("button", { class: "icon", type: "button", "aria-label": "Previous episode", title: "Previous (k)", onclick: () => list.move(-1) }, "↑"),
    el("button", { class: "icon", type: "button", "aria-label": "Next episode", title: "Next (j)", onclick: () => list.move(1) }, "↓"),
    el("span", { class: "grow" }),
    el(
      "button",
      { type: "button", id: "compare", "aria-pressed": String(compared), disabled: size < 2, title: size < 2 ? "No other episode of this row" : "The episodes of this row", onclick: compare },
      compared ? "One episode" : `Compare ${size > 1 ? size : ""}`,
      el("kbd", {}, "g"),
    ),
    el("div", { class: "segments", role: "group", "aria-label": "Show as" }, VIEWS.map(segment)),
  );
}

function again() {
  if (present) open(present);
}

function turnTo(one) {
  view = one;
  again();
}

function compare() {
  if (!present || (!comparing && (present.group === null || groups.get(present.group).length < 2))) return;
  comparing = !comparing;
  again();
}

function back() {
  document.body.classList.remove("opened");
  byId("list").focus({ preventScroll: true });
}

// ---------------------------------------------------------------- wiring
let typing = null;
byId("search").addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(refresh, 120);
});
byId("search").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" && event.key !== "ArrowDown") return;
  event.preventDefault();
  clearTimeout(typing);
  refresh();
  byId("list").focus();
});
for (const id of ["success", "stop", "sort"]) byId(id).addEventListener("change", refresh);
byId("pick").addEventListener("click", () => byId("file").click());
byId("file").addEventListener("change", () => {
  const [file] = byId("file").files;
  byId("file").value = ""; // the same file again is a change, too
  if (file) load(file, file.name);
});
byId("served").addEventListener("change", () => byId("served").value && loadServed(byId("served").value));

let inside = 0; // dragenter and dragleave come for every element on the way
const dragging = (by) => {
  inside = Math.max(0, inside + by);
  document.body.classList.toggle("dropping", inside > 0);
};
addEventListener("dragenter", () => dragging(1));
addEventListener("dragleave", () => dragging(-1));
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  dragging(-Infinity);
  const [file] = event.dataTransfer.files;
  if (file) load(file, file.name);
});

shortcut("o", "open a file", () => byId("file").click());
shortcut("/", "search", () => byId("search").focus());
shortcut("j", "the next episode", () => list.move(1));
shortcut("k", "the previous episode", () => list.move(-1));
shortcut("g", "compare the group of this row, or one episode again", compare);
shortcut("t", "messages, tokens, JSON", () => turnTo(VIEWS[(VIEWS.indexOf(view) + 1) % VIEWS.length]));
shortcut("l", "back to the list", back);
explain("↑ ↓", "previous and next, in the list");
explain("← →", "single tokens, in a token sequence");
start();

try {
  const config = await askJSON("config");
  byId("to-play").hidden = !config.env;
  if (config.rollouts) {
    const { files, left_out: more } = await askJSON("files");
    byId("served-field").hidden = false;
    byId("served").replaceChildren(
      el("option", { value: "" }, `files of the server: ${shown(files.length + more)}`),
      ...files.map(({ name, size }) => el("option", { value: name }, `${name} (${size < 2 ** 20 ? `${Math.ceil(size / 1024)} kB` : `${Math.round(size / 2 ** 20)} MB`})`)),
    );
    if (files.length === 1) {
      byId("served").value = files[0].name;
      await loadServed(files[0].name);
    }
  }
} catch (error) {
  say(error.message);
}
