// Code with its comments, strings, numbers and keywords told apart: enough to read it, for the languages that models write most.

import { el } from "./dom.js";

const MOST = 50_000; // characters; longer code is shown plainly

const STRING = String.raw`"(?:[^"\\\n]|\\.)*"?|'(?:[^'\\\n]|\\.)*'?`;
const NUMBER = String.raw`\b(?:0[xXbBoO][\da-fA-F_]+|\d[\d_]*(?:\.\d+)?(?:[eE][+-]?\d+)?)\b`;
const WORD = String.raw`[A-Za-z_]\w*`;

/** A language: what its comments look like, strings beside "..." and '...', and its keywords. No part of it can run long and fail. */
function spelled(comment, string, keywords) {
  const source = `(?<c>${comment})|(?<s>${string ? `${string}|` : ""}${STRING})|(?<n>${NUMBER})|(?<w>${WORD})`;
  return { pattern: new RegExp(source, "g"), keywords: new Set(keywords.split(" ")) };
}

const PYTHON = spelled(
  "#[^\\n]*",
  String.raw`"""[^]*?(?:"""|$)|'''[^]*?(?:'''|$)`,
  "and as assert async await break class continue def del elif else except False finally for from global if import in is lambda match None nonlocal not or pass raise return True try while with yield",
);
const SHELL = spelled("#[^\\n]*", "", "case do done elif else esac export fi for function if in local return then until while");
const C_LIKE = spelled(
  String.raw`//[^\n]*|/\*[^]*?(?:\*/|$)`,
  "`(?:[^`\\\\]|\\\\.)*`?",
  "abstract as async auto await bool boolean break case catch char class const continue default delete do double else enum export extends false final float fn for from func function go if impl import in int interface let long match mod mut new nil null package private protected pub public return self short static string struct super switch this throw true try type typeof undefined use using var void while yield",
);
const SQL = spelled(
  String.raw`--[^\n]*|/\*[^]*?(?:\*/|$)`,
  "",
  "SELECT FROM WHERE GROUP BY ORDER HAVING LIMIT JOIN LEFT RIGHT INNER OUTER ON AS AND OR NOT NULL INSERT INTO VALUES UPDATE SET DELETE CREATE TABLE DROP WITH UNION ALL DISTINCT CASE WHEN THEN ELSE END select from where group by order having limit join left right inner outer on as and or not null insert into values update set delete create table drop with union all distinct case when then else end",
);
const LANGUAGES = {
  python: PYTHON, py: PYTHON, python3: PYTHON, pycon: PYTHON, yaml: SHELL, yml: SHELL, toml: SHELL,
  bash: SHELL, sh: SHELL, shell: SHELL, console: SHELL, zsh: SHELL, dockerfile: SHELL, sql: SQL,
};
for (const name of "js javascript jsx ts typescript tsx json jsonc c h cpp c++ cc cuda java kotlin scala swift rust rs go golang csharp cs php dart".split(" ")) {
  LANGUAGES[name] = C_LIKE;
}

/** The nodes of a piece of code. */
function highlighted(text, { pattern, keywords }) {
  const nodes = [];
  let done = 0;
  for (const found of text.matchAll(pattern)) {
    const { c, s, n, w } = found.groups;
    const kind = c !== undefined ? "c" : s !== undefined ? "s" : n !== undefined ? "n" : keywords.has(w) ? "k" : null;
    if (kind === null) continue;
    nodes.push(text.slice(done, found.index), el("span", { class: `code-${kind}` }, found[0]));
    done = found.index + found[0].length;
  }
  nodes.push(text.slice(done));
  return nodes;
}

/** A block of code as an element; `name` is what stands at its fence, the language first. */
export function codeBlock(text, name = "") {
  const [language] = name.toLowerCase().split(/\s/, 1);
  const known = Object.hasOwn(LANGUAGES, language) && text.length <= MOST ? LANGUAGES[language] : null;
  return el(
    "figure",
    { class: "code" },
    name ? el("figcaption", {}, name) : null,
    el("pre", { tabindex: "0", "aria-label": name ? `code, ${name}` : "code" }, el("code", {}, known ? highlighted(text, known) : text)),
  );
}
