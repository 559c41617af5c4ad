// What both pages share: the theme, keyboard shortcuts and their help, the server's token, requests.

import { byId, el } from "./dom.js";

const keys = new Map();

/** A shortcut: one key, pressed outside of fields. `text` stands in the help. */
export function shortcut(key, text, action) {
  keys.set(key, { text, action });
}

/** Only for the help: a key that an element handles itself. */
export function explain(key, text) {
  keys.set(key, { text, action: null });
}

export function isField(target) {
  return target instanceof HTMLElement && target.matches("input, textarea, select, [contenteditable]");
}

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function toggleTheme() {
  const theme = isDark() ? "light" : "dark";
  document.documentElement.dataset.theme = theme;
  try {
    localStorage.setItem("torchrl_chat.theme", theme);
  } catch {
    // no storage: it holds until the page is left
  }
}

function showHelp() {
  const rows = [...keys].map(([key, { text }]) =>
    el("tr", {}, el("th", { scope: "row" }, key.split(" ").map((one) => el("kbd", {}, one))), el("td", {}, text)),
  );
  const dialog = el(
    "dialog",
    { class: "help", "aria-label": "Keyboard shortcuts" },
    el("h2", {}, "Keyboard shortcuts"),
    el("table", {}, el("tbody", {}, rows)),
    el("form", { method: "dialog" }, el("button", { class: "main", autofocus: true }, "Close")),
  );
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
}

/** Wire up the header; call it once the page's own shortcuts are there. */
export function start() {
  shortcut("d", "light or dark", toggleTheme);
  shortcut("?", "this help", showHelp);
  explain("Esc", "leave a field");
  byId("theme").addEventListener("click", toggleTheme);
  byId("help").addEventListener("click", showHelp);
  document.addEventListener("keydown", (event) => {
    if (event.isComposing || event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
    if (isField(event.target)) {
      if (event.key === "Escape" && !event.defaultPrevented) {
        event.preventDefault(); // browsers empty a search field otherwise
        event.target.blur();
      }
      return;
    }
    const found = keys.get(event.key);
    if (!found?.action || event.defaultPrevented) return;
    event.preventDefault();
    found.action();
  });
}

// ---------------------------------------------------------------- requests
const TOKEN = "torchrl_chat.token";

export const token = () => sessionStorage.getItem(TOKEN);

function askToken(reason) {
  return new Promise((resolve) => {
    const field = el("input", { type: "password", required: true, autocomplete: "off", autofocus: true });
    const dialog = el(
      "dialog",
      { class: "help", "aria-label": "The server's token" },
      el("h2", {}, "The server asks for its token"),
      el("p", { class: "soft" }, reason),
      el("form", { method: "dialog" }, el("label", {}, "Token", field), el("button", { class: "main" }, "Go on")),
    );
    dialog.addEventListener("close", () => {
      sessionStorage.setItem(TOKEN, field.value.trim());
      dialog.remove();
      resolve();
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}

/**
 * A response of this server that is fine; asks for the token where one is needed. Throws what the server says.
 * `options` are those of fetch, and `body`, a value that is sent as JSON.
 */
export async function ask(path, { body = undefined, method = body === undefined ? "GET" : "POST", headers = {}, signal } = {}) {
  for (;;) {
    const sent = { ...headers };
    if (token()) sent.authorization = `Bearer ${token()}`;
    const options = { method, headers: sent, cache: "no-store", signal };
    if (body !== undefined) {
      sent["content-type"] = "application/json";
      options.body = JSON.stringify(body);
    }
    const response = await fetch(path, options);
    if (response.ok) return response;
    const told = await response.json().catch(() => ({}));
    const detail = typeof told.detail === "string" ? told.detail : JSON.stringify(told.detail ?? response.statusText);
    if (response.status !== 401) throw Object.assign(new Error(detail), { status: response.status });
    await askToken(detail);
  }
}

export const askJSON = async (...request) => (await ask(...request)).json();
