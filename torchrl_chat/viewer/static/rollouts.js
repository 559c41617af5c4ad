// The rollout viewer: what is shown is the state of the address; a change of it is written there, and drawn.

import { onMove, read, write } from "./address.js";
import { chosen, exported, offer, rangeOf, save, sorted } from "./choices.js";
import { drawPair, paired, shares } from "./compare.js";
import { curvesView } from "./curves.js";
import { VIEWS, episodeView, groupView, pairView, verdict } from "./detail.js";
import { byId, el, shown } from "./dom.js";
import { readEpisode } from "./episodes.js";
import { readFigures, withFigures } from "./figures.js";
import { VirtualList } from "./list.js";
import { Run } from "./runs.js";
import { aboutFile, emptyFolder, toolbar } from "./frame.js";
import { askJSON, explain, shortcut, start } from "./shell.js";
import { colourBy } from "./tokens.js";

const LOOKS = 1000; // ms between looks at files that may have grown
const MOST = 32; // answers of a side that are shown beside those of the other
const FIELDS = ["q", "success", "stop", "task", "grade", "step", "reward", "sort", "with-step"]; // by their ids and their keys in the address
const UNCHOSEN = Object.fromEntries(["episode", "group", "curves", "sequence", "token"].map((key) => [key, undefined]));

let state = read();
let files = []; // of the server
let folder = null; // the name of what it shows
let run = null;
let other = null; // what it is compared with
let reading = null; // an AbortController while files are read
let shows = 0; // counts what was asked to be shown: the newest wins
let alone = [0, 0]; // questions that one side of a comparison has alone

const beginning = byId("detail").firstElementChild; // what is shown before there is a file

const list = new VirtualList(byId("list"), (row) => (row.sides ? drawPair(row) : drawItem(row)), choose);

function drawItem(entry) {
  const facts = [
    entry.failed ? "no grade" : null, entry.stop, entry.step === null ? null : `step ${entry.step}`,
    entry.sampled === null ? null : `${shown(entry.sampled)} tokens`, entry.row === null ? null : `row ${entry.row}`,
  ];
  return [
    verdict(entry.success),
    el("span", { class: "what" }, entry.title || entry.id),
    el("span", { class: "num" }, shown(entry.reward)),
    el("span", { class: "more" }, facts.filter(Boolean).join(" · ")),
  ];
}

/** Change what is shown; `quietly`: "back" does not lead to what was before. */
function go(changes, { quietly = false } = {}) {
  state = { ...state, ...changes };
  write(state, quietly);
}

function say(text) {
  byId("status").textContent = text;
}

// ---------------------------------------------------------------- files
/** Read files with `begin(said, signal)`; null where that failed, which is told, or was given up. */
async function load(name, begin) {
  const { signal } = reading;
  say(`reading ${name}`);
  try {
    const found = await begin((part) => say(`reading ${name}: ${part}`), signal);
    signal.throwIfAborted();
    return found;
  } catch (error) {
    if (!signal.aborted) say(`${name}: ${error.message}`);
    return null;
  }
}

/** Show what the address says, reading the files that it names. */
async function restore() {
  state = read();
  reading?.abort();
  reading = new AbortController();
  const { signal } = reading;
  const begun = performance.now();
  if (!state.file && run?.grows) run = null;
  if (state.file && (!run?.grows || run.name !== state.file)) await take(await load(state.file, (...how) => Run.served(state.file, ...how)), begun);
  if (signal.aborted) return;
  if (!state.with) other = null;
  else if (other?.name !== state.with) await takeOther();
  if (signal.aborted) return;
  refresh({ still: true });
  show();
}

async function takeOther() {
  const name = state.with;
  const found = run?.grows && run.name === name ? run : await load(name, (...how) => Run.served(name, ...how));
  if (state.with !== name) return;
  other = found;
  if (found && run) say(`${run.name}: ${shown(run.entries.length)} episodes, ${name}: ${shown(found.entries.length)}`);
}

async function take(found, begun) {
  if (!found) return;
  run = found;
  const seconds = (performance.now() - begun) / 1000;
  document.title = `${run.name} · torchrl_chat`;
  byId("status").dataset.seconds = seconds.toFixed(3);
  say(`${run.name}: ${shown(run.entries.length)} episodes, read in ${seconds.toFixed(2)} s`);
}

/** Another file: what was chosen in the one before is chosen no more. */
async function openLocal(file) {
  reading?.abort();
  reading = new AbortController();
  const begun = performance.now();
  const found = await load(file.name, (...how) => Run.opened(file, ...how));
  if (!found) return;
  go({ file: undefined, step: undefined, ...UNCHOSEN });
  byId("file").value = "";
  await take(found, begun);
  arrive();
}

async function openServed(name, quietly = false) {
  go({ file: name, step: undefined, ...UNCHOSEN }, { quietly });
  reading?.abort();
  reading = new AbortController();
  const begun = performance.now();
  const found = await load(name, (...how) => Run.served(name, ...how));
  if (!found) return;
  await take(found, begun);
  arrive();
}

function arrive() {
  list.mark(null);
  document.body.classList.remove("opened");
  refresh();
  show();
  byId("list").focus({ preventScroll: true });
}

async function lookForFiles() {
  const listed = await askJSON("files");
  files = listed.files;
  byId("file-field").hidden = false;
  byId("with-field").hidden = files.length === 0;
  const options = (first) => [
    el("option", { value: "" }, first),
    ...files.map(({ name, size }) => el("option", { value: name }, `${name} (${size < 2 ** 20 ? `${Math.ceil(size / 1024)} kB` : `${Math.round(size / 2 ** 20)} MB`})`)),
  ];
  for (const [id, first] of [["file", `files of the server: ${shown(files.length + listed.left_out)}`], ["with", "compare with …"]]) {
    const field = byId(id);
    if (document.activeElement === field) continue; // somebody is choosing
    field.replaceChildren(...options(first));
    field.value = files.some(({ name }) => name === state[id]) ? state[id] : "";
  }
  if (!run && !state.file) {
    if (files.length === 1) await openServed(files[0].name, true);
    else if (!reading && !files.length) byId("detail").replaceChildren(emptyFolder(folder, listed.others));
  }
}

// ---------------------------------------------------------------- the list
/** List what the address chooses. `still`: what is seen of it stays where it is. */
function refresh({ still = false } = {}) {
  for (const id of FIELDS) if (document.activeElement !== byId(id)) byId(id).value = state[id] ?? "";
  for (const id of ["file", "with"]) if (document.activeElement !== byId(id)) byId(id).value = files.some(({ name }) => name === state[id]) ? state[id] : "";
  if (!run) {
    list.set([]);
    byId("count").textContent = "";
    return;
  }
  offer(run.entries, state);
  offerSteps();
  for (const option of document.querySelectorAll("#sort [value$=gain]")) option.hidden = !other;
  byId("reward").setAttribute("aria-invalid", String(Boolean(state.reward?.trim()) && !rangeOf(state.reward)));
  byId("curves").hidden = !sources().length;
  byId("curves").setAttribute("aria-pressed", String(Boolean(state.curves)));
  const rows = other ? pairsChosen() : chosen(run.entries, state);
  list.set(sorted(rows, state.sort), { still });
  byId("count").textContent = other ? countPairs(rows) : countEpisodes(rows);
  byId("export").disabled = !rows.length;
}

function offerSteps() {
  const steps = other ? [...new Set(other.entries.map((entry) => entry.step))].filter((step) => step !== null).sort((a, b) => a - b) : [];
  byId("with-step-field").hidden = steps.length < 2 && !state["with-step"];
  byId("with-step").replaceChildren(el("option", { value: "" }, "any step"), ...steps.map((step) => el("option", { value: String(step) }, `step ${step}`)));
  byId("with-step").value = state["with-step"] ?? "";
}

/** The questions of a comparison: those of which an answer passes the filters. */
function pairsChosen() {
  const first = chosen(run.entries, { step: state.step });
  const second = chosen(other.entries, { step: state["with-step"] });
  const found = paired(first, second);
  alone = found.alone;
  const passing = new Set(chosen(other === run ? run.entries : [...first, ...second], { ...state, step: "" }));
  return found.pairs.filter(({ sides }) => sides.some((side) => side.some((entry) => passing.has(entry))));
}

function countEpisodes(rows) {
  const graded = rows.filter((entry) => entry.success !== null);
  const right = graded.filter((entry) => entry.success).length;
  const verdicts = graded.length ? ` · ${((100 * right) / graded.length).toFixed(1)} % right` : "";
  return `${shown(rows.length)} of ${shown(run.entries.length)} episodes${verdicts}`;
}

function countPairs(rows) {
  const right = shares(rows).map((share) => (share === null ? "–" : `${(100 * share).toFixed(1)} %`));
  const missing = alone.some(Boolean) ? ` · not in both: ${shown(alone[0])} and ${shown(alone[1])}` : "";
  return `${shown(rows.length)} questions in both · right ${right.join(" → ")}${missing}`;
}

// ---------------------------------------------------------------- what is shown beside it
function choose(row) {
  go({ episode: row.id, curves: undefined, sequence: undefined, token: undefined });
  show();
}

function look() {
  const number = (text) => (/^\d{1,9}$/.test(text ?? "") ? Number(text) : null);
  colourBy(state.colour);
  return {
    view: Object.hasOwn(VIEWS, state.view ?? "") ? state.view : "messages",
    rendered: state.text === "rendered",
    sequence: number(state.sequence) ?? 0,
    token: number(state.token),
    onToken: (sequence, token) => go({ sequence, token }, { quietly: true }),
    onTokens: (sequence, token) => (go({ view: "tokens", sequence, token }), show()),
    onColour: (colour) => go({ colour }),
  };
}

const byPlace = (entries) => [...entries].sort((a, b) => (a.place ?? a.order) - (b.place ?? b.order));
const groupOf = (entry) => (entry.group === null ? [entry] : byPlace(run.groups.get(entry.group)));
/** The listed row of an id; else the episode, which the filters hide. */
const rowOf = (id) => list.find(id) ?? run.entries.find((row) => row.id === id);

/** Draw what the address says: an episode, its group, a question of two runs, curves, or what the file is. */
async function show() {
  const ticket = ++shows;
  if (!run) {
    byId("detail").replaceChildren(beginning);
    document.body.classList.remove("opened");
    return;
  }
  const row = state.episode ? rowOf(state.episode) : null;
  list.mark(row && !state.curves ? row : null);
  byId("curves").setAttribute("aria-pressed", String(Boolean(state.curves)));
  document.body.classList.toggle("opened", Boolean(row || state.curves));
  if (state.curves) return showCurves(ticket);
  if (!row) return showFile();
  const seen = look();
  try {
    const read = (from, entries) => Promise.all(entries.map((entry) => readEpisode(from.blob, entry)));
    let content;
    if (row.sides) {
      const [a, b] = row.sides.map((side) => byPlace(side).slice(0, MOST));
      const named = (one, step, side) => `${nameOf(one, step)}${row.sides[side].length > MOST ? `: ${MOST} of ${shown(row.sides[side].length)} answers` : ""}`;
      const sides = [
        { name: named(run, state.step, 0), episodes: await read(run, a) },
        { name: named(other, state["with-step"], 1), episodes: await read(other, b) },
      ];
      content = pairView(sides, seen, (side, place) => openSide(side, [a, b][side][place]));
    } else if (state.group && groupOf(row).length > 1) {
      const members = groupOf(row);
      content = groupView(await read(run, members), seen, (place) => (go({ episode: members[place].id, group: undefined }), show()));
    } else [content] = (await read(run, [row])).map((episode) => episodeView(episode, seen));
    if (ticket === shows) byId("detail").replaceChildren(tools(row, seen), content);
  } catch (error) {
    if (ticket === shows) byId("detail").replaceChildren(el("div", { class: "empty" }, el("p", { class: "bad" }, `line ${row.line ?? row.order + 1}: ${error.message}`)));
  }
}

const nameOf = (one, step) => (other === run && step ? `step ${step}` : `${one.name}${step ? `, step ${step}` : ""}`);

/** One answer of a comparison, by itself: the other file is then the one that is looked at. */
function openSide(side, entry) {
  const served = side ? other : run;
  const changes = { with: undefined, "with-step": undefined, episode: entry.id, step: side ? state["with-step"] : state.step };
  if (served.grows) changes.file = served.name;
  run = served;
  other = null;
  go(changes);
  refresh();
  show();
}

function showFile() {
  byId("detail").replaceChildren(aboutFile(run, state.episode));
}

function titleOf(row) {
  if (row.sides) return `Question ${shown(list.position + 1)} of ${shown(list.length)}`;
  if (state.group && groupOf(row).length > 1) return `Row ${row.row ?? "–"}, ${groupOf(row).length} members`;
  return `Episode ${list.position >= 0 ? `${shown(list.position + 1)} of ${shown(list.length)}` : row.id}`;
}

function tools(row, { view, rendered }) {
  const size = row.sides || row.group === null ? 0 : run.groups.get(row.group).length;
  const members = row.sides ? null : { size, shown: Boolean(state.group) && size > 1 };
  return toolbar({ title: titleOf(row), view, rendered, members, back, move: (by) => list.move(by), render, group, turnTo });
}

// ---------------------------------------------------------------- curves
const sources = () => withFigures([run, other], files);

async function showCurves(ticket, onlyNews = false) {
  try {
    const { runs, news } = await readFigures(sources());
    if (ticket !== shows || (onlyNews && !news)) return;
    const focused = document.activeElement?.closest?.(".chart")?.dataset.name;
    const tools = el("div", { class: "tools" }, el("button", { id: "back", type: "button", onclick: back }, "‹ List"), el("h1", {}, "Curves"));
    byId("detail").replaceChildren(tools, curvesView(runs, { onStep: toStep }));
    if (focused) [...document.querySelectorAll(".chart")].find((chart) => chart.dataset.name === focused)?.querySelector(".plot").focus();
  } catch (error) {
    say(error.message);
  }
}

function toStep(step) {
  go({ step: String(step), ...UNCHOSEN });
  refresh();
  show();
  byId("list").focus({ preventScroll: true });
}

// ---------------------------------------------------------------- what a person does
function turnTo(view) {
  go({ view: view === "messages" ? undefined : view, sequence: undefined, token: undefined });
  show();
}

function turn() {
  const names = Object.keys(VIEWS);
  turnTo(names[(names.indexOf(look().view) + 1) % names.length]);
}

function render() {
  go({ text: state.text === "rendered" ? undefined : "rendered" });
  show();
}

function group() {
  const row = state.episode && run ? rowOf(state.episode) : null;
  if (!row || row.sides || groupOf(row).length < 2) return;
  go({ group: state.group ? undefined : "1", sequence: undefined, token: undefined });
  show();
}

function curves() {
  if (!run || !sources().length) return;
  go({ curves: state.curves ? undefined : "1" });
  show();
}

function exportList() {
  if (!run || !list.length) return;
  const parts = other
    ? list.rows.flatMap(({ sides }) => [exported(run.blob, sides[0]), exported(other.blob, sides[1])])
    : [exported(run.blob, list.rows)];
  save(new Blob(parts, { type: "application/x-ndjson" }), `${run.name.split("/").join("-").replace(/\.jsonl?$/, "")}-selection.jsonl`);
  say(`${shown(list.length)} ${other ? "questions" : "episodes"} exported`);
}

function back() {
  document.body.classList.remove("opened");
  byId("list").focus({ preventScroll: true });
}

function filter(quietly) {
  go(Object.fromEntries(FIELDS.map((id) => [id, byId(id).value || undefined])), { quietly });
  refresh();
}

let typing = null;
for (const id of ["q", "reward"]) {
  byId(id).addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(() => filter(true), 120);
  });
}
byId("q").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" && event.key !== "ArrowDown") return;
  event.preventDefault();
  clearTimeout(typing);
  filter(true);
  byId("list").focus();
});
for (const id of ["success", "stop", "task", "grade", "step", "sort"]) byId(id).addEventListener("change", () => filter(false));
byId("with-step").addEventListener("change", () => (filter(false), show()));
byId("step").addEventListener("change", () => other && show());
byId("with").addEventListener("change", async () => {
  go({ with: byId("with").value || undefined, "with-step": undefined });
  byId("with").blur();
  reading ??= new AbortController();
  if (state.with) await takeOther();
  else other = null;
  refresh();
  show();
});
byId("pick").addEventListener("click", () => byId("local").click());
byId("curves").addEventListener("click", curves);
byId("export").addEventListener("click", exportList);
byId("local").addEventListener("change", () => {
  const [file] = byId("local").files;
  byId("local").value = ""; // the same file again is a change, too
  if (file) openLocal(file);
});
byId("file").addEventListener("change", () => byId("file").value && openServed(byId("file").value));

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
  if (file) openLocal(file);
});

shortcut("o", "open a file of this machine", () => byId("local").click());
shortcut("/", "search", () => byId("q").focus());
shortcut("j", "the next episode", () => list.move(1));
shortcut("k", "the previous episode", () => list.move(-1));
shortcut("t", "messages, tokens, tree, JSON", turn);
shortcut("m", "Markdown and code rendered, or the raw text", render);
shortcut("g", "compare the group of this row, or one episode again", group);
shortcut("w", "compare with another file or checkpoint", () => byId("with").focus());
shortcut("c", "curves of the run", curves);
shortcut("e", "export what is listed, as JSONL", exportList);
shortcut("l", "back to the list", back);
explain("↑ ↓", "previous and next, in the list and in trees");
explain("← →", "single tokens, steps of a curve");
explain("Enter", "to the tokens of a call, to the episodes of a step");
start();
onMove(restore);

/** Look at files again, as long as the page is seen: a run may be writing. */
async function watch() {
  for (let round = 1; ; round++) {
    await new Promise((resolve) => setTimeout(resolve, LOOKS));
    if (document.hidden) continue;
    try {
      if (folder !== null && round % 5 === 0) await lookForFiles();
      await lookAgain();
    } catch (error) {
      say(error.status ? error.message : "the server does not answer; what was read stays");
    }
  }
}

async function lookAgain() {
  const [first, second] = [run, other];
  const before = run?.entries.length;
  let news = false;
  for (const one of new Set([first, second])) if (one?.grows) news = (await one.look()) !== "same" || news;
  if (run !== first || other !== second) return;
  if (news) {
    refresh({ still: true });
    const more = run.entries.length - before;
    say(`${run.name}: ${shown(run.entries.length)} episodes${more > 0 ? `, ${shown(more)} new` : ""}`);
    const title = byId("detail").querySelector(".tools h1");
    const row = state.episode && !state.curves ? rowOf(state.episode) : null;
    if (row && title) title.textContent = titleOf(row);
    else if (!row && !state.curves) showFile();
  }
  if (state.curves) await showCurves(shows, true);
}

try {
  const config = await askJSON("config");
  byId("to-play").hidden = !config.env;
  folder = config.rollouts;
  if (folder !== null) await lookForFiles();
  if (state.file || state.with) await restore();
  else refresh();
} catch (error) {
  say(error.message);
}
watch();
