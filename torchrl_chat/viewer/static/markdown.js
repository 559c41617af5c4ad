// Markdown as models write it, as elements: headings, lists, quotes, tables, code, emphasis, links; formulas as their source.
//
// Laws of this file: what is no Markdown stays as it is, HTML above all, which is text like any other. Nothing is fetched: pictures
// are links. And no text takes long: every look ahead has a bound, as texts of models may be anything.

import { codeBlock } from "./code.js";
import { el } from "./dom.js";

const MOST = 200_000; // characters; a longer text is shown as it is
const DEEPEST = 8; // lists and quotes within each other
const AHEAD = 2000; // characters in which an opened emphasis or link is closed, or is none

/** The elements of a text. */
export function markdown(text) {
  if (text.length > MOST) return [el("p", {}, text)];
  return outlined(blocks(text.replace(/\r\n?/g, "\n").split("\n"), 0));
}

/** Headings one below the other, as readers of outlines expect them: the page has the first level, and no level is left out. */
function outlined(nodes) {
  let before = 1;
  const headings = nodes.flatMap((node) => [...(node.matches("[role=heading]") ? [node] : []), ...node.querySelectorAll("[role=heading]")]);
  for (const heading of headings) {
    before = Math.min(Number(heading.getAttribute("aria-level")), before + 1);
    heading.setAttribute("aria-level", before);
  }
  return nodes;
}

// ---------------------------------------------------------------- blocks
const FENCE = /^( {0,3})(?:(`{3,})([^`]*)|(~{3,})(.*))$/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])( +|$)/;
const QUOTE = /^ {0,3}> ?/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]|$)/;
const DELIMITERS = /^[ \t|:-]*$/;
const MATH = new Map([["$$", "$$"], ["\\[", "\\]"]]);

const isRule = (line) => /^(?:-{3,}|\*{3,}|_{3,})$/.test(line.replace(/[ \t]/g, ""));
const isTable = (lines, at) => lines[at].includes("|") && lines[at + 1]?.includes("-") && lines[at + 1].includes("|") && DELIMITERS.test(lines[at + 1]);

function begins(lines, at) {
  const line = lines[at];
  return FENCE.test(line) || QUOTE.test(line) || HEADING.test(line) || ITEM.test(line) || isRule(line) || MATH.has(line.trim()) || isTable(lines, at);
}

function blocks(lines, depth) {
  if (depth > DEEPEST) return [el("p", {}, lines.join("\n"))];
  const found = [];
  for (let at = 0; at < lines.length; ) {
    if (!lines[at].trim()) at += 1;
    else [found[found.length], at] = block(lines, at, depth);
  }
  return found;
}

/** The block that begins at a line, and the line behind it. */
function block(lines, at, depth) {
  const line = lines[at];
  const fence = FENCE.exec(line);
  if (fence) return fenced(lines, at, fence);
  if (MATH.has(line.trim())) {
    const end = lines.findIndex((other, place) => place > at && other.trim() === MATH.get(line.trim()));
    const last = end < 0 ? lines.length : end;
    return [el("pre", { class: "math", tabindex: "0", "aria-label": "formula" }, lines.slice(at, last + 1).join("\n")), last + 1];
  }
  const heading = HEADING.exec(line);
  if (heading) {
    const words = line.slice(heading[0].length).trim();
    const closed = /^#+$/.test(words) ? "" : words.replace(/[ \t]#{1,20}$/, "");
    return [el("p", { class: `heading h${heading[1].length}`, role: "heading", "aria-level": Math.min(6, heading[1].length + 1) }, inline(closed)), at + 1];
  }
  if (isRule(line)) return [el("hr"), at + 1];
  if (QUOTE.test(line)) {
    let end = at;
    while (end < lines.length && QUOTE.test(lines[end])) end++;
    return [el("blockquote", {}, blocks(lines.slice(at, end).map((one) => one.replace(QUOTE, "")), depth + 1)), end];
  }
  if (ITEM.test(line)) return list(lines, at, depth);
  if (isTable(lines, at)) return table(lines, at);
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !begins(lines, end)) end++;
  return [el("p", {}, inline(lines.slice(at, end).join("\n"))), end];
}

function fenced(lines, at, [, indent, ticks, behindTicks, tildes, behindTildes]) {
  const mark = ticks ?? tildes;
  let end = at + 1;
  const closes = (line) => {
    const text = line.trim();
    return text.length >= mark.length && text === mark[0].repeat(text.length);
  };
  while (end < lines.length && !closes(lines[end])) end++;
  const body = lines.slice(at + 1, end).map((line) => (line.startsWith(indent) ? line.slice(indent.length) : line.trimStart()));
  return [codeBlock(body.join("\n"), (behindTicks ?? behindTildes).trim()), end + 1];
}

function list(lines, at, depth) {
  const first = ITEM.exec(lines[at]);
  const numbered = /\d/.test(first[2]);
  const items = [];
  let end = at;
  while (end < lines.length) {
    const mark = ITEM.exec(lines[end]);
    if (!mark || isRule(lines[end]) || /\d/.test(mark[2]) !== numbered || (!numbered && mark[2] !== first[2])) break;
    const width = mark[1].length + mark[2].length + Math.max(1, Math.min(mark[3].length, 4));
    const own = [lines[end].slice(mark[0].length)];
    let next = end + 1;
    for (; next < lines.length; next++) {
      const line = lines[next];
      const blank = !line.trim();
      if (blank && !(lines[next + 1] ?? "").startsWith("  ")) break;
      if (!blank && !line.startsWith("  ") && begins(lines, next)) break;
      own.push(blank ? "" : line.slice(Math.min(width, line.length - line.trimStart().length)));
    }
    items.push(el("li", {}, blocks(own, depth + 1)));
    end = next;
    while (end < lines.length && !lines[end].trim() && ITEM.test(lines[end + 1] ?? "")) end++; // loose lists
  }
  const start = numbered ? Number.parseInt(first[2], 10) : 1;
  return [el(numbered ? "ol" : "ul", { start: start === 1 ? null : start }, items), end];
}

function cells(line) {
  const text = line.trim();
  const parts = [""];
  for (let at = text.startsWith("|") ? 1 : 0; at < text.length; at++) {
    if (text[at] === "\\" && text[at + 1] === "|") parts[parts.length - 1] += text[++at];
    else if (text[at] === "|") parts.push("");
    else parts[parts.length - 1] += text[at];
  }
  if (text.endsWith("|") && parts.length > 1 && !parts.at(-1).trim()) parts.pop();
  return parts.map((part) => inline(part.trim()));
}

function table(lines, at) {
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|")) end++;
  const head = cells(lines[at]);
  const rows = lines.slice(at + 2, end).map((line) => el("tr", {}, cells(line).map((cell) => el("td", {}, cell))));
  return [
    el(
      "div",
      { class: "table", tabindex: "0", role: "group", "aria-label": "table" },
      el("table", {}, el("thead", {}, el("tr", {}, head.map((cell) => el("th", { scope: "col" }, cell)))), el("tbody", {}, rows)),
    ),
    end,
  ];
}

// ---------------------------------------------------------------- within a line
const LINK = /!?\[([^[\]\n]{0,500})\]\(([^()\s]{1,1500}(?:\([^()\s]{0,200}\)[^()\s]{0,200})?)\)/y;
const BARE = /https?:\/\/[^\s<>"'`\])}]{1,1500}/y;
const MARKS = { "**": "strong", __: "strong", "~~": "del", "*": "em", _: "em" };
const FORMULA = { "\\(": "\\)", "\\[": "\\]", $$: "$$" };

function linkOf(label, target) {
  let url;
  try {
    url = new URL(target);
  } catch {
    return null; // no address by itself
  }
  if (url.protocol !== "https:" && url.protocol !== "http:") return null;
  return el("a", { href: url.href, target: "_blank", rel: "noopener noreferrer", title: url.href }, label);
}

/** The nodes of a text without blocks. */
function inline(text, depth = 0) {
  const nodes = [];
  let plain = "";
  const put = (node) => {
    if (plain) nodes.push(plain);
    plain = "";
    nodes.push(node);
  };
  for (let at = 0; at < text.length; ) {
    const special = next(text, at, depth);
    if (special === null) plain += text[at++];
    else {
      if (typeof special.node === "string") plain += special.node;
      else put(special.node);
      at = special.end;
    }
  }
  if (plain) nodes.push(plain);
  return nodes;
}

/** What begins at a place and is no plain sign: its node, and where it ends. */
function next(text, at, depth) {
  const sign = text[at];
  const two = text.slice(at, at + 2);
  if (two in FORMULA) {
    const end = text.slice(at + 2, at + AHEAD).indexOf(FORMULA[two]);
    if (end >= 0) return { node: el("code", { class: "math" }, text.slice(at, at + end + 4)), end: at + end + 4 };
  }
  if (sign === "\\" && /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "")) return { node: text[at + 1], end: at + 2 };
  if (sign === "`") return codeSpan(text, at);
  if (sign === "[" || two === "![") {
    LINK.lastIndex = at;
    const found = LINK.exec(text);
    const node = found && linkOf(sign === "!" ? `picture: ${found[1]}` : inline(found[1], depth + 1), found[2]);
    return node ? { node, end: at + found[0].length } : null;
  }
  if (sign === "h" && !/\w/.test(text[at - 1] ?? " ")) {
    BARE.lastIndex = at;
    const found = BARE.exec(text)?.[0].replace(/[.,:;!?*_~]{1,20}$/, "");
    const node = found ? linkOf(found, found) : null;
    return node ? { node, end: at + found.length } : null;
  }
  const mark = two in MARKS ? two : sign in MARKS ? sign : null;
  return mark === null || depth > DEEPEST ? null : emphasis(text, at, mark, depth);
}

function codeSpan(text, at) {
  let size = 1;
  while (text[at + size] === "`") size++;
  const ticks = "`".repeat(size);
  const ahead = text.slice(at + size, at + size + AHEAD);
  for (let end = ahead.indexOf(ticks); end >= 0; end = ahead.indexOf(ticks, end)) {
    let run = size;
    while (ahead[end + run] === "`") run++;
    if (run === size) return { node: el("code", {}, ahead.slice(0, end).replace(/^ (.*) $/s, "$1")), end: at + 2 * size + end };
    end += run;
  }
  return { node: ticks, end: at + size };
}

function emphasis(text, at, mark, depth) {
  const word = mark[0] === "_";
  const size = mark.length;
  if (/\s/.test(text[at + size] ?? " ") || (word && /\w/.test(text[at - 1] ?? " "))) return null;
  const ahead = text.slice(at + size, at + size + AHEAD);
  let tries = 0;
  for (let end = ahead.indexOf(mark, 1); end >= 0 && tries < 20; end = ahead.indexOf(mark, end + 1), tries++) {
    if (/[\s\\]/.test(ahead[end - 1]) || (word && /\w/.test(ahead[end + size] ?? " "))) continue;
    if (size === 1 && (ahead[end + 1] === mark || ahead[end - 1] === mark)) continue; // a part of a double one
    return { node: el(MARKS[mark], {}, inline(ahead.slice(0, end), depth + 1)), end: at + 2 * size + end };
  }
  return null;
}
