// Light or dark, before the first paint: this file is no module, so that it runs before the body is read.
"use strict";
(() => {
  let chosen = null;
  try {
    chosen = localStorage.getItem("torchrl_chat.theme");
  } catch {
    // no storage: the system's choice holds
  }
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
})();
