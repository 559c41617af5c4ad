// One session over the WebSocket: requests are answered in order; a lost socket is taken up again.

import { token } from "./shell.js";

const WAITS = [300, 1000, 2000, 4000, 8000]; // ms between attempts to reconnect
const TAKEN_OVER = 4001;
const GONE = ["SESSION_ERROR", "CAPACITY_REACHED", "FACTORY_ERROR"];

/** An error frame: `message` and `code` are the server's words. */
export class ServerError extends Error {
  constructor({ message, code }) {
    super(message);
    this.code = code;
  }
}

/** The session of this tab. Events: `status` (detail: a word), `notice` (detail: a ServerError), `resumed`, `opened`. */
export class Session extends EventTarget {
  #socket = null;
  #waiting = [];
  #failures = 0;
  #timer = null;

  /** The id by which the session can be taken up; null before the first reset. */
  get id() {
    return sessionStorage.getItem("torchrl_chat.session");
  }

  set id(value) {
    if (value) sessionStorage.setItem("torchrl_chat.session", value);
    else sessionStorage.removeItem("torchrl_chat.session");
  }

  get connected() {
    return this.#socket?.readyState === WebSocket.OPEN;
  }

  #tell(type, detail = null) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }

  /** Connect, to the session that there was if there was one. */
  open() {
    clearTimeout(this.#timer);
    const secret = token();
    const url = new URL(secret ? "ws" : "../ws", document.baseURI);
    url.protocol = url.protocol.replace("http", "ws");
    const before = this.id;
    if (before) url.searchParams.set("session_id", before);
    else url.searchParams.set("resume", "1");
    this.#tell("status", this.#failures ? "reconnecting" : "connecting");
    const socket = secret ? new WebSocket(url, ["torchrl-chat", `bearer.${base64url(secret)}`]) : new WebSocket(url);
    this.#socket = socket;
    socket.addEventListener("open", () => {
      if (this.#socket !== socket) return;
      this.#failures = 0;
      this.#tell("status", "connected");
      this.#tell(before ? "resumed" : "opened");
    });
    socket.addEventListener("message", (event) => this.#socket === socket && this.#take(JSON.parse(event.data)));
    socket.addEventListener("close", (event) => this.#socket === socket && this.#closed(event));
  }

  /** The data of the reply to a frame; throws a ServerError. `data` may be JSON already. */
  request(type, data = {}) {
    if (!this.connected) return Promise.reject(new ServerError({ message: "not connected to the server.", code: "OFFLINE" }));
    const body = typeof data === "string" ? data : JSON.stringify(data);
    return new Promise((resolve, reject) => {
      this.#waiting.push({ resolve, reject });
      this.#socket.send(`{"type":${JSON.stringify(type)},"data":${body}}`);
    });
  }

  #take(frame) {
    const error = frame.type === "error" ? new ServerError(frame.data ?? {}) : null;
    if (error && GONE.includes(error.code)) this.id = null; // the socket will be closed: a new session then
    const first = this.#waiting.shift();
    if (!first) return error && this.#tell("notice", error);
    if (error) first.reject(error);
    else first.resolve(frame.data);
  }

  #closed(event) {
    this.#drop(event.reason || "the connection was lost.");
    if (event.code === TAKEN_OVER) return this.#tell("status", "continued in another tab");
    this.#tell("status", "disconnected");
    const wait = WAITS[Math.min(this.#failures++, WAITS.length - 1)];
    this.#timer = setTimeout(() => this.open(), wait);
  }

  #drop(reason) {
    this.#socket = null;
    const lost = new ServerError({ message: reason, code: "CONNECTION" });
    for (const { reject } of this.#waiting.splice(0)) reject(lost);
  }

  /** Leave the socket and connect anew, to the same session. */
  reconnect() {
    this.#socket?.close(1000);
    this.#drop("connecting anew.");
    this.open();
  }
}

/** A header's text (Latin-1) in base64url. */
function base64url(text) {
  return btoa(text).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}
