// The numbers of runs (metrics.jsonl, evaluations.jsonl), which lie beside their rollout files and grow with them.

import { Served, bytesOf } from "./runs.js";

/** The lines of a file of numbers (metrics.jsonl, evaluations.jsonl), each an object with a "step". */
class Figures {
  rows = [];
  #served;
  #at = 0; // where the first line begins that was not read
  #begun = false;

  constructor(name) {
    this.#served = new Served(name);
  }

  /** Look at it, for the first time or again; whether anything is new. */
  async look(signal) {
    let news;
    if (this.#begun) {
      const found = await this.#served.more(this.#at, signal);
      if (found === null) return false;
      if (found.anew) [this.rows, this.#at] = [[], 0];
      news = found.news;
    } else {
      await this.#served.all(signal);
      this.#begun = true;
      news = this.#served.blob;
    }
    const bytes = await bytesOf(news);
    const end = bytes.lastIndexOf(10) + 1; // a line without its newline is being written
    this.#at += end;
    for (const line of new TextDecoder().decode(bytes.subarray(0, end)).split("\n")) {
      try {
        const row = JSON.parse(line);
        if (row !== null && typeof row === "object" && typeof row.step === "number") this.rows.push(row);
      } catch {
        // an empty line, or one that was cut off
      }
    }
    return end > 0;
  }
}

const known = new Map(); // by their names

/** The runs that have numbers: [{name, beside}]. `files` is what the server lists. */
export function withFigures(runs, files) {
  const found = [...new Set(runs)].filter((run) => run?.grows);
  return found.map(({ name }) => ({ name, beside: files.find((file) => file.name === name)?.beside ?? [] })).filter(({ beside }) => beside.length);
}

/** Their numbers, [{name, metrics, evaluations}], and whether any are new since they were read last. */
export async function readFigures(sources) {
  const news = [];
  const runs = [];
  for (const { name, beside } of sources) {
    const rows = { metrics: [], evaluations: [] };
    for (const path of beside) {
      if (!known.has(path)) known.set(path, new Figures(path));
      news.push(await known.get(path).look());
      rows[path.endsWith("evaluations.jsonl") ? "evaluations" : "metrics"] = known.get(path).rows;
    }
    runs.push({ name, ...rows });
  }
  return { runs, news: news.some(Boolean) };
}
