// A rollout file, read by lines: an index of what is short; token fields stay in the file until an episode is opened.

import { textOf } from "./messages.js";

const CHUNK = 8 << 20; // bytes read at once
const VERSION = 1; // of the format that is understood: docs/reference/rollouts.md
const TITLE = 200;
const FIELDS = "version id row group place query reference messages reward success stop error sampled_tokens metadata".split(" ");

/** The index of a rollout file: `entries`, in its order, and `problems`, the lines that were left out. */
export async function readIndex(blob, onProgress = () => {}, signal = undefined) {
  const decoder = new TextDecoder();
  const entries = [];
  const problems = [];
  let rest = new Uint8Array(0); // of a line that goes on in the next chunk
  let place = 0;
  for (let offset = 0; offset < blob.size; offset += CHUNK) {
    const fresh = new Uint8Array(await blob.slice(offset, offset + CHUNK).arrayBuffer());
    signal?.throwIfAborted();
    const bytes = rest.length ? joined(rest, fresh) : fresh;
    const base = offset - rest.length; // where `bytes` begins in the file
    const last = offset + CHUNK >= blob.size;
    let start = 0;
    while (start < bytes.length) {
      let end = bytes.indexOf(10, start);
      const whole = end >= 0;
      if (!whole) {
        if (!last) break;
        end = bytes.length;
      }
      place += 1;
      const line = decoder.decode(bytes.subarray(start, end));
      if (line.trim()) {
        try {
          entries.push(entryOf(light(line), { line: place, start: base + start, end: base + end, order: entries.length }));
        } catch (error) {
          problems.push({ line: place, why: whole ? error.message : "it was not written to its end" });
        }
      }
      start = end + 1;
    }
    rest = start < bytes.length ? bytes.slice(start) : new Uint8Array(0);
    onProgress(Math.min(offset + CHUNK, blob.size), entries.length);
  }
  return { entries, problems };
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
  return {
    ...at,
    id: String(episode.id ?? at.line),
    row: episode.row ?? null,
    group: episode.group === null || episode.group === undefined ? null : `${metadata?.policy ?? ""}|${step ?? ""}|${episode.group}`,
    place: episode.place ?? null,
    reward: episode.reward ?? null,
    success: episode.success ?? null,
    stop: String(episode.stop ?? "unknown"),
    sampled: episode.sampled_tokens ?? null,
    step,
    title: (asked.join(" ") || said[0] || "").slice(0, TITLE).replace(/\s+/g, " ").trim(),
    text: [episode.id, ...asked, textOf(reference), episode.error ?? "", ...said].join("\n").toLowerCase(),
  };
}

/** The entries that pass: `words` occur, `success` ("true", "false", "null") and `stop` are as asked; sorted. */
export function choose(entries, { words = "", success = "", stop = "", sort = "file" } = {}) {
  const wanted = words.trim().toLowerCase();
  const found = entries.filter(
    (entry) =>
      (!success || String(entry.success) === success) &&
      (!stop || entry.stop === stop) &&
      (!wanted || entry.text.includes(wanted)),
  );
  if (sort === "file") return found;
  const key = sort.replace(/^-/, "");
  const sign = sort.startsWith("-") ? -1 : 1;
  return found.sort((a, b) => {
    if (a[key] === null || b[key] === null) return (a[key] === null) - (b[key] === null) || a.order - b.order; // unknown last
    return sign * (a[key] - b[key]) || a.order - b.order;
  });
}
