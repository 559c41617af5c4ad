// A list of any length of which only the rows in sight are elements (ARIA listbox).

import { el } from "./dom.js";

const HEIGHT = 46; // of a row, as in app.css
const BEYOND = 8; // rows drawn above and below what is seen

export class VirtualList {
  #space = el("div", { class: "space", role: "presentation" });
  #rows = [];
  #current = -1;
  #asked = false;

  /** `draw(row)` gives the children of a row; `onChoose(row)` is called when another one is chosen. */
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

  /** Show other rows; the chosen one stays chosen if it is among them. */
  set(rows) {
    const before = this.current;
    this.#rows = rows;
    this.#current = before ? rows.indexOf(before) : -1;
    this.#space.style.height = `${rows.length * HEIGHT}px`;
    if (this.#current < 0) this.element.scrollTop = 0;
    else this.#reveal();
    this.#draw();
  }

  choose(place) {
    if (!this.#rows.length) return;
    this.#current = Math.max(0, Math.min(this.#rows.length - 1, place));
    this.#reveal();
    this.#draw();
    this.onChoose(this.current);
  }

  chooseRow(row) {
    const place = this.#rows.indexOf(row);
    if (place >= 0) this.choose(place);
    else this.onChoose(row); // the filters hide it
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
