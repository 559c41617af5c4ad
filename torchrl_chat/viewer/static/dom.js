// Elements, built one by one. Texts become text nodes: nothing that a model wrote is ever read as markup.

/** An element with properties (`class`, `onclick`, `aria-label`, `data-...`) and children: elements, texts, null. */
export function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

export const byId = (id) => document.getElementById(id);

/** JSON to read: indented, lists of numbers on one line. */
export function pretty(value, most = 200_000) {
  const text = (JSON.stringify(value, null, 2) ?? "").replace(
    /\[\s+((?:-?[\d.eE+-]+,\s+)*-?[\d.eE+-]+)\s+\]/g,
    (_, inner) => `[${inner.replace(/\s+/g, " ")}]`,
  );
  return text.length > most ? `${text.slice(0, most)}\n… ${(text.length - most).toLocaleString("en")} more characters` : text;
}

/** A number for a table: six digits at most; a dash where there is none. */
export function shown(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value)) return value.toLocaleString("en");
  return String(Number(value.toPrecision(Math.abs(value) < 1 ? 4 : 6)));
}

/** Terms and values of a definition list; entries without a value are left out. */
export function terms(entries) {
  return entries
    .filter(([, value]) => value !== undefined && value !== null && value !== "")
    .flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]);
}

/** A table of reward components; null where there are none. */
export function rewardParts(parts) {
  const names = Object.keys(parts ?? {});
  if (!names.length) return null;
  return el(
    "table",
    { class: "parts" },
    el("caption", {}, "Reward components"),
    el("tbody", {}, names.map((name) => el("tr", {}, el("th", { scope: "row" }, name), el("td", {}, shown(parts[name]))))),
  );
}
