// What is shown, in the address: whatever is looked at can be linked, and the browser's back and forward go through it.

const KEYS = [
  "file", "step", "with", "with-step", "episode", "group", "view", "text", "sequence", "token", "colour", "curves",
  "q", "success", "stop", "task", "grade", "reward", "sort",
]; // in the order in which they are written
const SETTLES = 200; // ms: moves that come faster than this are one entry of the history

let timer = null;
let pushes = false;
let wanted = {};

/** What the address says: texts by their keys; keys that it lacks are missing. */
export function read() {
  const given = new URLSearchParams(location.search);
  return Object.fromEntries(KEYS.filter((key) => given.get(key)).map((key) => [key, given.get(key)]));
}

/** The address of what is shown, without a value for what is as it always is. */
export function addressOf(state) {
  const query = new URLSearchParams();
  for (const key of KEYS) {
    const value = state[key];
    if (value !== undefined && value !== null && value !== "" && value !== false) query.set(key, value === true ? "1" : String(value));
  }
  const text = query.toString().replaceAll("%2F", "/");
  return `${location.pathname}${text ? `?${text}` : ""}`;
}

/** Write what is shown into the address, soon; `quietly`: not as a step that "back" would take again. */
export function write(state, quietly) {
  wanted = { ...state };
  pushes = pushes || !quietly;
  clearTimeout(timer);
  timer = setTimeout(settle, SETTLES);
}

function settle() {
  const address = addressOf(wanted);
  if (address !== `${location.pathname}${location.search}`) {
    if (pushes) history.pushState(null, "", address);
    else history.replaceState(null, "", address);
  }
  pushes = false;
}

/** `action` is called when the browser went back or forward. */
export function onMove(action) {
  addEventListener("popstate", () => {
    clearTimeout(timer);
    pushes = false;
    action();
  });
}
