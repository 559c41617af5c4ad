// The rows of a dataset to choose from: the Task API behind a search field (ARIA combobox).

import { byId, el } from "./dom.js";
import { textOf } from "./messages.js";
import { askJSON } from "./shell.js";

const PAGE = 1000; // rows of one request
const SHOWN = 50;

/** What a row asks, on one line. */
function question(task) {
  const { id, index, ...rest } = task;
  const values = Object.values(rest);
  const first = values.length ? values[0] : id;
  const text = Array.isArray(first) ? first.map((message) => textOf(message?.content ?? message)).join(" ") : textOf(first);
  return text.replace(/\s+/g, " ").trim();
}

/** The fields of the form that choose a row. `here` is false where the environment has no tasks. */
export class TaskPicker {
  here = false;
  #env = "";
  #count = 0;
  #rows = [];
  #loading = null;
  #found = [];
  #active = -1;

  async open(env) {
    this.#env = env;
    let splits;
    try {
      splits = await askJSON(`../${encodeURIComponent(env)}/splits`);
    } catch (error) {
      if ([404, 501].includes(error.status)) return;
      throw error;
    }
    const names = splits.map((split) => (typeof split === "string" ? split : split.name));
    byId("split").replaceChildren(...names.map((name) => el("option", {}, name)));
    try {
      await this.#turnTo();
    } catch (error) {
      if (error.status === 501) return; // it has splits, but no rows: a chat
      throw error;
    }
    this.here = true;
    byId("split-field").hidden = false;
    byId("task-field").hidden = false;
    byId("first-field").hidden = true;
    byId("split").addEventListener("change", () => this.#turnTo());
    const field = byId("task");
    field.addEventListener("input", () => this.#search());
    field.addEventListener("focus", () => field.value && this.#search());
    field.addEventListener("blur", () => setTimeout(() => this.#close(), 150)); // after a click into the list
    field.addEventListener("keydown", (event) => this.#key(event));
  }

  /** The arguments of a reset: split, and index where a row is chosen. */
  chosen() {
    if (!this.here) return {};
    const found = /^#?(\d+)/.exec(byId("task").value.trim());
    return { split: byId("split").value, ...(found ? { index: Number(found[1]) } : {}) };
  }

  async #turnTo() {
    const split = byId("split").value;
    this.#rows = [];
    this.#loading = null;
    const { num_tasks: count } = await askJSON(`../${encodeURIComponent(this.#env)}/num_tasks`, { body: { split } });
    this.#count = count;
    byId("task-count").textContent = `of ${count.toLocaleString("en")}`;
  }

  async #load() {
    const split = byId("split").value;
    for (let start = this.#rows.length; start < this.#count; start += PAGE) {
      const stop = Math.min(this.#count, start + PAGE);
      const found = await askJSON(`../${encodeURIComponent(this.#env)}/task_range`, { body: { split, start, stop } });
      if (split !== byId("split").value) return;
      this.#rows.push(...found.tasks.map((task, i) => ({ index: task.index ?? start + i, text: question(task) })));
    }
  }

  async #search() {
    const words = byId("task").value.trim().toLowerCase();
    if (!words) return this.#close();
    try {
      await (this.#loading ??= this.#load());
    } catch (error) {
      this.#loading = null;
      this.#show([], error.message);
      return;
    }
    if (words !== byId("task").value.trim().toLowerCase() || document.activeElement !== byId("task")) return;
    const number = /^#?\d+$/.test(words) ? Number(words.replace("#", "")) : -1;
    const exact = this.#rows.filter((row) => row.index === number);
    const others = this.#rows.filter((row) => row.index !== number && row.text.toLowerCase().includes(words));
    this.#show([...exact, ...others]);
  }

  #show(rows, instead = "no such task") {
    this.#found = rows.slice(0, SHOWN);
    this.#active = -1;
    const items = this.#found.map((row, i) =>
      el("li", { role: "option", id: `task-${i}`, "aria-selected": "false", onclick: () => this.#choose(i) }, el("b", {}, `#${row.index}`), ` ${row.text}`),
    );
    if (!items.length) items.push(el("li", { class: "soft" }, instead));
    if (rows.length > SHOWN) items.push(el("li", { class: "soft" }, `${(rows.length - SHOWN).toLocaleString("en")} more`));
    byId("tasks").replaceChildren(...items);
    byId("tasks").hidden = false;
    byId("task").setAttribute("aria-expanded", "true");
  }

  #close() {
    byId("tasks").hidden = true;
    byId("task").setAttribute("aria-expanded", "false");
    byId("task").removeAttribute("aria-activedescendant");
  }

  #choose(place) {
    const row = this.#found[place];
    byId("task").value = `#${row.index} ${row.text}`;
    this.#close();
  }

  #key(event) {
    if (byId("tasks").hidden) return;
    if (event.key === "Escape") {
      event.preventDefault();
      this.#close();
    } else if (event.key === "Enter" && this.#active >= 0) {
      event.preventDefault();
      this.#choose(this.#active);
    } else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      const count = this.#found.length;
      if (!count) return;
      this.#active = (this.#active + (event.key === "ArrowDown" ? 1 : this.#active < 0 ? 0 : -1) + count) % count;
      [...byId("tasks").children].forEach((item, i) => item.setAttribute("aria-selected", String(i === this.#active)));
      byId("tasks").children[this.#active].scrollIntoView({ block: "nearest" });
      byId("task").setAttribute("aria-activedescendant", `task-${this.#active}`);
    }
  }
}
