// A list of any length of which only the rows in sight are elements (ARIA listbox).

import { el } from "./dom.js";

const HEIGHT = 46; // of a row, as in app.css
const BEYOND = 8; // rows drawn above and below what is seen

export class VirtualList {
  #space = el("div", { class: "space", role: "presentation" });
  #rows = [];
  #current = -1;
  #asked = false;

  /** `draw(row)` gives the children of a row; `onChoose(row)` is called when another one is chosen. Rows are known by their `id`. */
  constructor(element, draw, onChoose) {
    this.element = element;
    this.draw = draw;
    this.onChoose = onChoose;
    element.append(this.#space);
    element.addEventListener("scroll", () => this.#drawSoon());
    new ResizeObserver(() => this.#drawSoon()).observe(element);
    element.addEventListener("click", (event) => {
      const item = event.target.closest(".item");
      if (item) this.choose(Number(item.dataset.at));
    });
    element.addEventListener("keydown", (event) => this.#key(event));
  }

  get current() {
    return this.#rows[this.#current] ?? null;
  }

  get position() {
    return this.#current;
  }

  get length() {
    return this.#rows.length;
  }

  get rows() {
    return this.#rows;
  }

  /** The row of an id, if it is listed. */
  find(id) {
    return this.#rows.find((row) => row.id === id);
  }

  /** Show other rows; the chosen one stays chosen if it is among them. `still`: what is seen stays where it is. */
  set(rows, { still = false } = {}) {
    const before = this.current;
    const { scrollTop } = this.element;
    const top = this.#rows[Math.floor(scrollTop / HEIGHT)];
    this.#rows = rows;
    const placeOf = (row) => (row ? rows.findIndex((other) => other.id === row.id) : -1);
    this.#current = placeOf(before);
    this.#space.style.height = `${rows.length * HEIGHT}px`;
    const moved = still ? placeOf(top) : -1;
    if (moved >= 0) this.element.scrollTop = moved * HEIGHT + (scrollTop % HEIGHT);
    else if (this.#current < 0) this.element.scrollTop = 0;
    else this.#reveal();
    this.#draw();
  }

  /** Mark a row as chosen without telling of it; null marks none. */
  mark(row) {
    const place = row === null ? -1 : this.#rows.indexOf(row);
    if (place === this.#current) return;
    this.#current = place;
    if (place >= 0) this.#reveal();
    this.#draw();
  }

  choose(place) {
    if (!this.#rows.length) return;
    this.#current = Math.max(0, Math.min(this.#rows.length - 1, place));
    this.#reveal();
    this.#draw();
    this.onChoose(this.current);
  }

  move(by) {
    this.choose(this.#current < 0 ? 0 : this.#current + by);
  }

  #key(event) {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const page = Math.max(1, Math.floor(this.element.clientHeight / HEIGHT) - 1);
    const by = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    if (Number.isFinite(by)) this.move(by);
    else this.choose(by > 0 ? this.#rows.length - 1 : 0);
  }

  #reveal() {
    const top = this.#current * HEIGHT;
    const { scrollTop, clientHeight } = this.element;
    if (top < scrollTop) this.element.scrollTop = top;
    else if (top + HEIGHT > scrollTop + clientHeight) this.element.scrollTop = top + HEIGHT - clientHeight;
  }

  #drawSoon() {
    if (this.#asked) return;
    this.#asked = true;
    requestAnimationFrame(() => {
      this.#asked = false;
      this.#draw();
    });
  }

  #draw() {
    const { scrollTop, clientHeight } = this.element;
    const first = Math.max(0, Math.floor(scrollTop / HEIGHT) - BEYOND);
    const last = Math.min(this.#rows.length, Math.ceil((scrollTop + clientHeight) / HEIGHT) + BEYOND);
    const items = [];
    for (let place = first; place < last; place++) {
      const item = el(
        "div",
        {
          class: "item",
          role: "option",
          id: `item-${place}`,
          "data-at": place,
          "aria-selected": String(place === this.#current),
          "aria-posinset": place + 1,
          "aria-setsize": this.#rows.length,
        },
        this.draw(this.#rows[place]),
      );
      item.style.top = `${place * HEIGHT}px`;
      items.push(item);
    }
    this.#space.replaceChildren(...items);
    if (this.#current >= first && this.#current < last) this.element.setAttribute("aria-activedescendant", `item-${this.#current}`);
    else this.element.removeAttribute("aria-activedescendant");
  }
}
