// A conversation, as messages.

import { codeBlock } from "./code.js";
import { el, pretty } from "./dom.js";
import { markdown } from "./markdown.js";

/** The text of a message's content: a string, or parts of which some are text. */
export function textOf(content) {
  if (typeof content === "string") return content;
  if (content === null || content === undefined) return "";
  if (!Array.isArray(content)) return pretty(content);
  return content.map((part) => (typeof part === "string" ? part : (part?.text ?? pretty(part)))).join("\n");
}

function messageView(message, rendered) {
  const role = String(message?.role ?? "?");
  const body = el("div", { class: "body" });
  const written = (text) => (rendered ? el("div", { class: "rendered" }, markdown(text)) : el("p", {}, text));
  if (message?.reasoning_content) {
    body.append(
      el("details", { class: "reasoning" }, el("summary", {}, "reasoning"), written(textOf(message.reasoning_content))),
    );
  }
  const text = textOf(message?.content);
  if (text) body.append(written(text));
  else if (!message?.tool_calls) body.append(el("p", { class: "soft" }, "(empty)"));
  for (const key of ["tool_calls", "invalid_tool_calls"]) {
    for (const call of message?.[key] ?? []) {
      const label = key === "tool_calls" ? "calls" : "malformed call";
      const name = call?.function?.name;
      body.append(
        el(
          "div",
          { class: "call" },
          el("span", { class: "soft" }, `${label} `),
          name ? el("b", {}, name) : null,
          rendered ? codeOf(call) : el("pre", {}, pretty(call?.function?.arguments ?? call)),
        ),
      );
    }
  }
  const name = message?.name ? el("span", { class: "soft" }, ` ${message.name}`) : null;
  return el("article", { class: `message ${role === "assistant" ? "policy" : ""}` }, el("header", {}, role, name), body);
}

/** The arguments of a call: code where an argument is one, as tools that run some have it. */
function codeOf(call) {
  let given = call?.function?.arguments ?? call;
  if (typeof given === "string") {
    try {
      given = JSON.parse(given);
    } catch {
      return codeBlock(given);
    }
  }
  const [only, ...more] = given !== null && typeof given === "object" ? Object.entries(given) : [];
  if (only && !more.length && typeof only[1] === "string" && only[1].includes("\n")) return codeBlock(only[1], only[0] === "code" ? "python" : only[0]);
  return codeBlock(pretty(given), "json");
}

/** The messages one below the other; `rendered`: their Markdown and code as such. */
export function conversation(messages, { rendered = false } = {}) {
  return el("div", { class: "messages" }, (Array.isArray(messages) ? messages : []).map((message) => messageView(message, rendered)));
}
