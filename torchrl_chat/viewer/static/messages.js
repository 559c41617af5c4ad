// A conversation, as messages.

import { el, pretty } from "./dom.js";

/** The text of a message's content: a string, or parts of which some are text. */
export function textOf(content) {
  if (typeof content === "string") return content;
  if (content === null || content === undefined) return "";
  if (!Array.isArray(content)) return pretty(content);
  return content.map((part) => (typeof part === "string" ? part : (part?.text ?? pretty(part)))).join("\n");
}

function messageView(message) {
  const role = String(message?.role ?? "?");
  const body = el("div", { class: "body" });
  if (message?.reasoning_content) {
    body.append(
      el("details", { class: "reasoning" }, el("summary", {}, "reasoning"), el("p", {}, textOf(message.reasoning_content))),
    );
  }
  const text = textOf(message?.content);
  if (text || !message?.tool_calls) body.append(el("p", { class: text ? null : "soft" }, text || "(empty)"));
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
          el("pre", {}, pretty(call?.function?.arguments ?? call)),
        ),
      );
    }
  }
  const name = message?.name ? el("span", { class: "soft" }, ` ${message.name}`) : null;
  return el("article", { class: `message ${role === "assistant" ? "policy" : ""}` }, el("header", {}, role, name), body);
}

/** The messages one below the other. */
export function conversation(messages) {
  return el("div", { class: "messages" }, (messages ?? []).map(messageView));
}
