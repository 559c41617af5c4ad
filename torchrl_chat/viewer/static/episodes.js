// A rollout file, read by lines: an index of what is short; token fields stay in the file until an episode is opened.

import { textOf } from "./messages.js";

const VERSION = 1; // of the format that is understood: docs/reference/rollouts.md
const TITLE = 200;
const FIELDS = "version id row group place query reference messages reward success stop error sampled_tokens metadata".split(" ");

/**
 * The index of a rollout file, which may grow: `entries`, in its order, and `problems`, the lines that were left out. It is told
 * of the file piece by piece, each where the one before ended.
 */
export class Index {
  entries = [];
  #left = []; // lines that are no episode
  #rest = new Uint8Array(0); // of a line that goes on in the next piece
  #line = 0;
  #closed = true; // whether the last line has its newline
  #decoder = new TextDecoder();
  #broken = null; // why the last line is none, as long as it has no end

  /** Where the first line begins that was not read to its end. */
  at = 0;

  get problems() {
    return this.#broken ? [...this.#left, this.#broken] : this.#left;
  }

  /** Take the next bytes of the file. */
  add(fresh) {
    const bytes = this.#rest.length ? joined(this.#rest, fresh) : fresh;
    let start = 0;
    for (let end; (end = bytes.indexOf(10, start)) >= 0; start = end + 1) this.#take(bytes, start, end, true);
    this.at += start;
    this.#rest = start < bytes.length ? bytes.slice(start) : new Uint8Array(0);
    this.#broken = null;
  }

  /** There is no more of the file for now: its last line may lack its newline. */
  end() {
    this.#broken = null;
    if (!this.#rest.length) return;
    const bytes = this.#rest;
    if (this.#take(bytes, 0, bytes.length, false)) {
      this.at += bytes.length;
      this.#rest = new Uint8Array(0);
    }
  }

  /** What was read of the unfinished line counts no more. */
  cut() {
    this.#rest = new Uint8Array(0);
    this.#broken = null;
  }

  #take(bytes, start, end, whole) {
    const text = this.#decoder.decode(bytes.subarray(start, end));
    if (!this.#closed && !text.trim()) {
      this.#closed = whole; // the newline of a line that was read without it
      return true;
    }
    this.#line += 1;
    if (!text.trim()) return true;
    const base = this.at; // of `bytes` in the file
    try {
      this.entries.push(entryOf(light(text), { line: this.#line, start: base + start, end: base + end, order: this.entries.length }));
    } catch (error) {
      const why = { line: this.#line, why: whole ? error.message : "it was not written to its end" };
      if (whole) this.#left.push(why);
      else {
        this.#line -= 1;
        this.#broken = why;
        return false;
      }
    }
    this.#closed = whole;
    return true;
  }
}

/** The whole episode of an entry. */
export async function readEpisode(blob, entry) {
  return JSON.parse(await blob.slice(entry.start, entry.end).text());
}

function joined(a, b) {
  const both = new Uint8Array(a.length + b.length);
  both.set(a);
  both.set(b, a.length);
  return both;
}

/**
 * The fields of a line but its sequences. They stand last but one in a line, and quotes within strings are escaped, so
 * the key can be looked for as text. Where it is the key of an inner object, the two parts are no JSON, and the line
 * is read as a whole; so is one that has its fields in another order, and one that is broken off.
 */
function light(line) {
  const cut = line.indexOf(',"sequences":[');
  const tail = cut < 0 ? -1 : line.lastIndexOf(',"metadata":');
  if (tail > cut) {
    try {
      const episode = JSON.parse(`${line.slice(0, cut)}}`);
      Object.assign(episode, JSON.parse(`{${line.slice(tail + 1)}`));
      if (FIELDS.every((name) => name in episode)) return checked(episode);
    } catch {
      // an inner key of that name, or a broken line
    }
  }
  let episode;
  try {
    episode = JSON.parse(line);
  } catch (error) {
    throw new Error(`not JSON (${error.message})`);
  }
  return checked(episode);
}

function checked(episode) {
  if (episode === null || typeof episode !== "object" || Array.isArray(episode)) throw new Error("not an episode (an object)");
  const { version } = episode;
  if (!Number.isInteger(version) || version < 1 || version > VERSION) {
    throw new Error(`its version is ${JSON.stringify(version)}, this page reads up to ${VERSION}`);
  }
  return episode;
}

function textsOf(messages) {
  return Array.isArray(messages) ? messages.map((message) => textOf(message?.content ?? message)) : [textOf(messages)];
}

function entryOf(episode, at) {
  const { metadata = {}, messages = [], query, reference } = episode;
  const said = (Array.isArray(messages) ? messages : []).map((message) =>
    [textOf(message?.content), textOf(message?.reasoning_content), message?.tool_calls ? JSON.stringify(message.tool_calls) : ""].join("\n"),
  );
  const asked = textsOf(query ?? messages?.find?.((message) => message?.role === "user")?.content);
  const step = metadata?.step ?? null;
  const task = metadata?.dataset ?? metadata?.task ?? null;
  return {
    ...at,
    id: String(episode.id ?? at.line),
    row: episode.row ?? null,
    group: episode.group === null || episode.group === undefined ? null : `${metadata?.policy ?? ""}|${step ?? ""}|${episode.group}`,
    question: `${task ?? ""}\n${asked.join("\n")}`, // the same in another run
    place: episode.place ?? null,
    reward: episode.reward ?? null,
    success: episode.success ?? null,
    stop: String(episode.stop ?? "unknown"),
    task: task === null ? null : String(task),
    failed: Boolean(episode.grade_failure),
    sampled: episode.sampled_tokens ?? null,
    step,
    title: (asked.join(" ") || said[0] || "").slice(0, TITLE).replace(/\s+/g, " ").trim(),
    text: [episode.id, ...asked, textOf(reference), episode.error ?? "", ...said].join("\n").toLowerCase(),
  };
}
