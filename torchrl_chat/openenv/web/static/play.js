// An environment played by hand: start an episode, answer as the policy, look at messages, tokens and rewards.

import { byId, el, pretty, rewardParts, shown, terms } from "./dom.js";
import { conversation, textOf } from "./messages.js";
import { Session } from "./session.js";
import { ask, askJSON, explain, shortcut, start } from "./shell.js";
import { TaskPicker } from "./tasks.js";
import { legend, sequencesView } from "./tokens.js";

const session = new Session();
const tasks = new TaskPicker();
const narrow = matchMedia("(max-width: 860px)");

let config = {};
let episode = null; // what is known of the present one
let asTokens = false;
let last = Promise.resolve(); // what was asked for last: the next thing waits for it
let waiting = 0; // how many things are asked for and not done
let roleIsChosen = false;
let hasRoles = true; // an environment without messages takes JSON actions only

const newEpisode = () => ({
  observation: null, // the last reply: {observation, reward, done, metadata}
  messages: [],
  sequences: [],
  steps: 0,
  total: 0,
  log: [], // actions and observations of an environment without messages
  answers: [], // log-probs of the model's answers, by where they start
});

// ---------------------------------------------------------------- what is shown
function showError(error) {
  const box = byId("error");
  box.hidden = !error;
  if (!error) return box.replaceChildren();
  box.replaceChildren(error.code ? el("b", {}, error.code) : "", ` ${error.message}`);
}

function showConversation() {
  const place = byId("conversation");
  if (!episode) {
    place.replaceChildren(el("p", { class: "soft pad" }, "No episode yet: Start, or press n."));
    return;
  }
  let view;
  if (asTokens) {
    view = el("div", {}, episode.sequences.length ? legend(episode.sequences) : null, sequencesView(episode.sequences));
  }
  else if (episode.log.length) {
    view = el("div", { class: "messages" }, episode.log.map(([who, value]) =>
      el("article", { class: `message ${who === "action" ? "policy" : ""}` }, el("header", {}, who), el("pre", { class: "body" }, pretty(value)))));
  } else view = conversation(episode.messages);
  place.replaceChildren(view);
  place.scrollTop = place.scrollHeight;
  if (narrow.matches) byId("compose").scrollIntoView({ block: "end" });
}

function showFacts() {
  const reply = episode?.observation;
  const metadata = reply?.metadata ?? {};
  const present = episode?.sequences.at(-1);
  const sampled = (episode?.sequences ?? []).flatMap((sequence) => sequence.sampled).reduce((sum, [a, b]) => sum + b - a, 0);
  const told = metadata.stop_reason ?? (reply?.done ? "done" : null);
  const task = metadata.task ?? episode?.task;
  byId("facts").replaceChildren(
    ...terms([
      ["reward", el("b", { id: "reward" }, shown(reply?.reward))],
      ["return", episode && episode.steps > 1 ? shown(episode.total) : null],
      ["stop", el("span", { id: "stop-reason" }, !episode ? "–" : (told ?? "running"))],
      ["steps", shown(episode?.steps)],
      ["tokens", present ? `${shown(present.ids.length)}, ${shown(sampled)} sampled` : "–"],
      ["tokens left", metadata.tokens_left === undefined ? null : shown(metadata.tokens_left)],
      ["task", task ? `${task.split} #${task.index}` : null],
      ["no grade", metadata.grade_failure],
      ["not used", metadata.ignored?.join(", ")],
    ]),
  );
  byId("parts").replaceChildren(rewardParts(metadata.reward_parts) ?? "");
  byId("observation").querySelector("pre").textContent = reply ? pretty(reply) : "";
}

async function showState() {
  if (!byId("state").open || !episode || !session.connected) return;
  try {
    byId("state").querySelector("pre").textContent = pretty(await session.request("state"));
  } catch (error) {
    showError(error);
  }
}

function showTurn() {
  const last = episode?.messages.at(-1);
  const policys = Boolean(last) && !["assistant", "system"].includes(last.role);
  if (!roleIsChosen && hasRoles) byId("role").value = policys ? "assistant" : "user";
  const ended = episode?.observation?.done;
  const field = byId("text");
  if (!episode) field.placeholder = "Start an episode first";
  else if (ended) field.placeholder = "The episode has ended";
  else if (byId("role").value === "json") field.placeholder = '{"text": "…"}';
  else if (byId("role").value === "assistant") field.placeholder = "Answer as the policy";
  else field.placeholder = `What the ${byId("role").value} says`;
  byId("hint").textContent = !episode ? "" : ended ? "ended: n starts the next" : policys ? "the policy's turn" : "";
  byId("send").textContent = byId("role").value === "assistant" ? "Answer" : "Send";
  byId("send").disabled = !episode || Boolean(ended);
  byId("answer").hidden = !config.policy || !policys || Boolean(ended);
}

function showAll() {
  showFacts();
  showConversation();
  showTurn();
}

// ---------------------------------------------------------------- what is done
/** The ledger as tokens, with the log-probs of what the model answered here. */
async function readLedger() {
  if (!session.id) return [];
  const { sequences } = await askJSON(`ledger?session_id=${encodeURIComponent(session.id)}`);
  const present = sequences.at(-1);
  if (present && episode?.answers.length && !present.log_probs) {
    present.log_probs = present.sampled.flatMap(([start, end]) => {
      const answer = episode.answers.find((one) => one.start === start);
      return Array.from({ length: end - start }, (_, i) => answer?.log_probs[i] ?? null);
    });
  }
  return sequences;
}

async function take(reply, action = null) {
  const before = episode.messages.length;
  episode.observation = reply;
  const found = reply.observation ?? {};
  if (Array.isArray(found.messages)) episode.messages = found.messages;
  else {
    if (action) episode.log.push(["action", action]);
    episode.log.push(["observation", found]);
  }
  session.id = reply.metadata?.session_id ?? found.metadata?.session_id ?? session.id;
  episode.task ??= reply.metadata?.task;
  episode.sequences = await readLedger();
  if (!episode.sequences.length && Array.isArray(found.tokens) && found.tokens.length) {
    episode.sequences = [{ ids: found.tokens, sampled: [] }]; // an environment whose ledger is not known here
  }
  sayNews(before);
}

/** For screen readers: what is new, not the whole conversation again. */
function sayNews(before) {
  const fresh = episode.messages.slice(before).map((message) => `${message.role}: ${textOf(message.content)}`);
  const { reward, done } = episode.observation;
  if (done) fresh.push(`The episode has ended, reward ${shown(reward)}.`);
  byId("said").replaceChildren(...fresh.map((text) => el("p", {}, text)));
}

/** Do one thing after the other, and show what the server says where it refuses. Nothing that was asked for is lost. */
function doing(work) {
  waiting += 1;
  document.body.setAttribute("aria-busy", "true");
  return (last = last.then(() => run(work)));
}

async function run(work) {
  showError(null);
  try {
    await work();
  } catch (error) {
    showError(error);
  } finally {
    showAll();
    showState();
    waiting -= 1;
    if (!waiting) document.body.removeAttribute("aria-busy");
  }
}

function begin() {
  // Now, not when the server has answered: what is typed until then belongs into the field.
  byId("text").focus({ preventScroll: narrow.matches });
  roleIsChosen = false;
  return doing(async () => {
    const seed = byId("seed").value.trim();
    if (seed && !/^\d+$/.test(seed)) throw new Error("the seed is a whole number, 0 or more.");
    const first = tasks.here ? "" : byId("first").value.trim();
    const data = JSON.stringify({ ...tasks.chosen(), ...(first ? { messages: [{ role: "user", content: first }] } : {}) });
    // A seed has up to 63 bits: as digits it stays what it is, as a number of JavaScript it may not.
    const withSeed = seed ? data.replace(/\}$/, `${data === "{}" ? "" : ","}"seed":${seed.replace(/^0+(?=\d)/, "")}}`) : data;
    const reply = await session.request("reset", withSeed);
    episode = newEpisode();
    await take(reply);
    if (narrow.matches) byId("setup").open = false;
  });
}

function actionOf(text) {
  const role = byId("role").value;
  if (role === "json") return JSON.parse(text);
  if (role === "assistant") return { text };
  return { messages: [{ role, content: text }] };
}

async function act(action) {
  const chosen = roleIsChosen;
  roleIsChosen = false; // a role that is chosen while the server answers is for the next message
  let reply;
  try {
    reply = await session.request("step", action);
  } catch (error) {
    roleIsChosen ||= chosen;
    throw error;
  }
  episode.steps += 1;
  episode.total += Number(reply.reward ?? 0);
  await take(reply, action);
}

function send() {
  const field = byId("text");
  const text = field.value;
  if (!text) return;
  field.value = ""; // what is typed from now on is the next message
  return doing(async () => {
    try {
      if (!episode) throw new Error("there is no episode yet: Start, or press n outside of a field.");
      await act(actionOf(text));
    } catch (error) {
      if (!field.value) field.value = text;
      throw error;
    }
  });
}

const letModelAnswer = () =>
  doing(async () => {
    if (byId("answer").hidden || !session.id) return;
    byId("hint").textContent = "the model answers …";
    const prompt = episode.sequences.at(-1)?.ids.length ?? 0;
    const { tokens, log_probs } = await (await ask(`answer?session_id=${encodeURIComponent(session.id)}`, { method: "POST" })).json();
    episode.answers.push({ start: prompt, log_probs });
    await act({ tokens });
  });

const resume = () =>
  doing(async () => {
    const state = await session.request("state");
    if (episode || !state.episode_id) return;
    roleIsChosen = false;
    episode = { ...newEpisode(), messages: state.history_messages ?? [], steps: state.step_count };
    episode.sequences = await readLedger();
  });

function show(tokens) {
  asTokens = tokens;
  byId("as-messages").setAttribute("aria-pressed", String(!tokens));
  byId("as-tokens").setAttribute("aria-pressed", String(tokens));
  showConversation();
}

function fold(id) {
  byId(id).open = !byId(id).open;
}

// ---------------------------------------------------------------- wiring
session.addEventListener("status", ({ detail }) => {
  byId("status").textContent = detail;
  byId("status").dataset.is = detail === "connected" ? "good" : "bad";
});
session.addEventListener("notice", ({ detail }) => showError(detail));
session.addEventListener("resumed", resume);

byId("begin").addEventListener("submit", (event) => (event.preventDefault(), begin()));
byId("compose").addEventListener("submit", (event) => (event.preventDefault(), send()));
byId("text").addEventListener("keydown", (event) => {
  if (event.isComposing) return;
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    send();
  } else if (event.altKey && /^[1-5]$/.test(event.key)) {
    event.preventDefault();
    byId("role").selectedIndex = Number(event.key) - 1;
    byId("role").dispatchEvent(new Event("change"));
  }
});
byId("role").addEventListener("change", () => ((roleIsChosen = true), showTurn()));
byId("as-messages").addEventListener("click", () => show(false));
byId("as-tokens").addEventListener("click", () => show(true));
byId("answer").addEventListener("click", letModelAnswer);
byId("state").addEventListener("toggle", showState);

explain("Enter", "send, in the message field");
explain("Shift Enter", "a new line");
explain("Alt 1…5", "send as user, assistant, tool, system, JSON");
shortcut("n", "start an episode", begin);
shortcut("i", "go to the message field", () => byId("text").focus());
shortcut("s", "go to the seed", () => ((byId("setup").open = true), byId("seed").focus()));
shortcut("/", "search the tasks", () => ((byId("setup").open = true), (tasks.here ? byId("task") : byId("first")).focus()));
shortcut("t", "messages or tokens", () => show(!asTokens));
shortcut("m", "let the model answer, where there is one", letModelAnswer);
shortcut("o", "the observation as JSON", () => fold("observation"));
shortcut("e", "the environment's state", () => fold("state"));
shortcut("r", "connect anew", () => session.reconnect());
start();
showAll();

try {
  config = await askJSON("config");
  byId("env").textContent = config.env ?? "";
  const [metadata, schema] = await Promise.all([askJSON("../metadata"), askJSON("../schema")]);
  byId("about").textContent = metadata.description ?? "";
  const fields = schema.action?.properties ?? {};
  if (!("text" in fields && "messages" in fields)) {
    hasRoles = false; // no chat: actions are what its schema says
    byId("role").value = "json";
    byId("first-field").hidden = true;
    byId("text").value = pretty(Object.fromEntries((schema.action?.required ?? []).map((name) => [name, null])));
  }
  await tasks.open(config.env);
  session.open();
} catch (error) {
  showError(error);
}
showTurn();
