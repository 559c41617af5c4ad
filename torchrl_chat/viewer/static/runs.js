// A file of the server or of this machine, held in the browser; of one that grows only what was appended is asked for.

import { Index } from "./episodes.js";
import { ask } from "./shell.js";

const CHUNK = 8 << 20; // bytes that are read at once
const OVERLAP = 64; // bytes in front of what is new, which have to be as they were

/** Where the server has a file. Names come from addresses, too, which anybody may have written: none leads elsewhere. */
function pathOf(name) {
  const parts = name.split("/");
  if (parts.some((part) => ["", ".", ".."].includes(part))) throw new Error(`there is no rollout file '${name}'.`);
  return `files/${parts.map(encodeURIComponent).join("/")}`;
}

export const bytesOf = async (blob) => new Uint8Array(await blob.arrayBuffer());

/** A file of the server. */
export class Served {
  blob = new Blob([]);
  #state = null; // its ETag

  constructor(name) {
    this.name = name;
  }

  async all(signal) {
    const response = await ask(pathOf(this.name), { signal });
    this.#state = response.headers.get("etag");
    this.blob = await response.blob();
  }

  /**
   * Look at it again: what stands from `at` on, as a blob, where there is more than before; null where nothing changed. Where it is
   * another file now, all of it is read, and `anew` is true.
   */
  async more(at, signal) {
    const head = await ask(pathOf(this.name), { method: "HEAD", signal });
    const state = head.headers.get("etag");
    if (state === this.#state) return null;
    const size = Number(head.headers.get("content-length"));
    const from = Math.max(0, at - OVERLAP);
    const known = this.blob.slice(from, at);
    if (size >= at && size > from) {
      const response = await ask(pathOf(this.name), { headers: { range: `bytes=${from}-` }, signal });
      const fresh = await response.blob();
      const part = response.status === 206 && response.headers.get("content-range")?.startsWith(`bytes ${from}-`);
      if (part && (await same(fresh.slice(0, known.size), known))) {
        this.#state = response.headers.get("etag");
        const news = fresh.slice(known.size);
        this.blob = new Blob([this.blob.slice(0, at), news]);
        return { news, anew: false };
      }
    }
    await this.all(signal);
    return { news: this.blob, anew: true };
  }
}

async function same(a, b) {
  const [one, other] = await Promise.all([a, b].map(bytesOf));
  return one.length === other.length && one.every((byte, place) => byte === other[place]);
}

/** A rollout file: `entries`, `problems`, `groups` (the entries of a group by its name), `blob`. */
export class Run {
  groups = new Map();
  #index = new Index();
  #served = null;
  #blob = null;

  constructor(name) {
    this.name = name;
  }

  get entries() {
    return this.#index.entries;
  }

  get problems() {
    return this.#index.problems;
  }

  get blob() {
    return this.#blob ?? this.#served.blob;
  }

  /** Whether it can be looked at again. */
  get grows() {
    return this.#served !== null;
  }

  /** Of a file of this machine, as the browser hands it. */
  static async opened(file, said, signal) {
    const run = new Run(file.name);
    run.#blob = file;
    await run.#read(file, said, signal);
    return run;
  }

  /** Of a file of the server. */
  static async served(name, said, signal) {
    const run = new Run(name);
    run.#served = new Served(name);
    await run.#served.all(signal);
    await run.#read(run.#served.blob, said, signal);
    return run;
  }

  /** Look at it again. "same": nothing changed; "more": entries or problems did; "anew": it is another file now. */
  async look(signal) {
    const found = await this.#served.more(this.#index.at, signal);
    if (found === null) return "same";
    if (found.anew) {
      this.#index = new Index();
      this.groups = new Map();
    } else this.#index.cut();
    await this.#read(found.news, () => {}, signal);
    return found.anew ? "anew" : "more";
  }

  async #read(blob, said, signal) {
    const index = this.#index;
    const before = index.entries.length;
    for (let offset = 0; offset < blob.size; offset += CHUNK) {
      const fresh = await bytesOf(blob.slice(offset, offset + CHUNK));
      signal?.throwIfAborted();
      index.add(fresh);
      said(`${Math.round((100 * Math.min(offset + CHUNK, blob.size)) / blob.size)} %`);
    }
    index.end();
    for (const entry of index.entries.slice(before)) {
      if (entry.group === null) continue;
      const members = this.groups.get(entry.group);
      if (members) members.push(entry);
      else this.groups.set(entry.group, [entry]);
    }
  }
}
