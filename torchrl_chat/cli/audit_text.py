"""The audit's report for people: aligned lines, as wide as the terminal, coloured where it is one."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, TextIO

from torchrl_chat.audit.drift import METHODS
from torchrl_chat.audit.report import Drift, Finding, Report, Rewrite, Status, Template, Token

_CODES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33"}
_LABEL = 19  # wide enough for the longest label, "generation prompt"
_LOOKS = {
    Status.PROVED: ("✓", "+", "green"),
    Status.REFUSED: ("✗", "x", "red"),
    Status.UNSUPPORTED: ("–", "-", "yellow"),
}


@dataclass(frozen=True, slots=True)
class Style:
    """What the terminal can show."""

    width: int = 100  # in characters
    colour: bool = False  # whether it understands colours
    symbols: bool = True  # whether it can print more than ASCII

    @classmethod
    def of(cls, stream: TextIO, width: int) -> Style:
        """The style of a stream: colour on a terminal alone, and never against ``NO_COLOR``."""
        colour = stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        try:
            "✓✗–⏎·⇥…".encode(getattr(stream, "encoding", None) or "ascii")
            symbols = True
        except (UnicodeEncodeError, LookupError):
            symbols = False
        return cls(min(max(width, 40), 160), colour, symbols)

    def paint(self, text: str, look: str) -> str:
        """The text in a colour, if there are colours."""
        return f"\033[{_CODES[look]}m{text}\033[0m" if self.colour and text else text

    def plain(self, text: str) -> str:
        """The text, escaped where the terminal could not print it."""
        return text if self.symbols else text.encode("ascii", "backslashreplace").decode()

    def visible(self, text: str) -> str:
        """A text with its blanks and line breaks made visible."""
        if self.symbols:
            shown = "".join(
                {"\n": "⏎", "\t": "⇥", " ": "·"}.get(c, c if c.isprintable() else ascii(c)[1:-1]) for c in text
            )
        else:
            shown = ascii(text)[1:-1].replace(" ", "_")
        return shown or "(empty)"

    def field(self, label: str, text: str, indent: int = 0) -> list[str]:
        """A label and a text beside it, wrapped."""
        start = indent + _LABEL
        rows = textwrap.wrap(
            self.plain(text), max(self.width - start, 20), break_on_hyphens=False, drop_whitespace=True
        ) or [""]
        head = " " * indent + self.paint(label.ljust(_LABEL), "dim")
        return [(head if k == 0 else " " * start) + row for k, row in enumerate(rows)]


def lines(report: Report, style: Style, all_tails: bool = False) -> Iterator[str]:
    """The report, line by line.

    Args:
        report: what was found.
        style: what the terminal can show.
        all_tails: also show a tail that stands above already.
    """
    yield style.paint(style.plain(report.tokenizer), "bold")
    yield from _facts(report, style)
    for warning in report.warnings:
        head, *rest = style.field("warning", warning)
        yield from (head.replace("warning", style.paint("warning", "yellow"), 1), *rest)
    proved = sum(finding.status is Status.PROVED for finding in report.capabilities)
    yield from _section(f"capabilities: {proved} of {len(report.capabilities)} proved", style)
    seen: dict[Any, str] = {}
    for finding in report.capabilities:
        yield from _finding(finding, style, {} if all_tails else seen)
    yield from _section('earlier turns, once a message follows (history_policy="template" branches there)', style)
    for entry in report.history:
        yield from _history(entry, style)
    yield from _section("other ways to the next prompt, and whether they give these ids", style)
    for method, meaning in METHODS.items():
        yield style.plain(meaning)
        for drift in (d for d in report.drift if d.method == method):
            yield from _drift(drift, style)


def _section(title: str, style: Style) -> list[str]:
    return ["", *(style.paint(row, "bold") for row in textwrap.wrap(title, style.width))]


def _facts(report: Report, style: Style) -> Iterator[str]:
    template, parsing = report.template, report.parsing
    text = f"{template.length} characters, sha256 {template.sha256[:16]}"
    if template.wants_parts:
        text += "; reads content as a list of parts only"
    yield from style.field("template", text)
    if template.variables:
        yield from style.field(
            "variables", ", ".join(f"{key}={value!r}" for key, value in template.variables.items())
        )
    yield from style.field("stop tokens", _tokens(report.stop_tokens, style) or "none")
    pairs = [f"{style.visible(pair.open)} {style.visible(pair.close)}" for pair in parsing.reasoning]
    yield from style.field(
        "reasoning", ", ".join([*pairs, *["segments with headers"] * parsing.segments]) or "none found"
    )
    formats = [
        f"{style.visible(row.open)} {style.visible(row.close) if row.close else ''}".strip()
        for row in parsing.tool_calls
    ]
    formats += ["segments with headers"] * parsing.segments + ["a bare JSON object"] * parsing.bare_json
    yield from style.field("tool calls", ", ".join(formats) or "none found")
    if parsing.response_template:
        yield from style.field("parser", "the tokenizer's own response_template is asked first")
    prompt = template.generation_prompt
    opens = ", which opens the reasoning" if template.opens_reasoning else ""
    yield from style.field(
        "generation prompt", style.visible(prompt) + opens if prompt is not None else "not known"
    )
    yield from style.field("date", _date(template, style))


def _date(template: Template, style: Style) -> str:
    if template.date is not None:
        return f"today's, in the prompt: {template.date}"
    return "the template asks for it, these prompts do not show it" if template.clock else "none"


def _finding(finding: Finding, style: Style, seen: dict[Any, str]) -> Iterator[str]:
    symbol, letter, look = _LOOKS[finding.status]
    mark = style.paint(symbol if style.symbols else letter, look)
    about = finding.status.value if finding.status is not Status.PROVED else f"proved, {finding.mode}"
    took = f"{finding.proof_ms:.0f} ms"
    room = max(style.width - 2 - len(about) - 10, len(finding.title) + 1)
    yield f"{mark} {finding.title.ljust(min(room, 44))}{style.paint(about, look)}{style.paint(took.rjust(9), 'dim')}"
    if finding.reason:
        yield from style.field("because", finding.reason, 2)
    if finding.note:
        yield from style.field("note", finding.note, 2)
    if finding.tail and finding.status is Status.PROVED:
        key = finding.tail
        if key in seen:
            yield from style.field("tail", f"the same as of {seen[key]}", 2)
            return
        seen[key] = finding.title
        for origin, tokens in groupby(finding.tail, key=lambda token: token.origin):
            yield from style.field(origin.value, _tokens(list(tokens), style), 2)


def _tokens(tokens: Sequence[Token], style: Style) -> str:
    return "  ".join(f"{style.visible(token.text)}({token.id})" for token in tokens)


def _history(entry: Rewrite, style: Style) -> Iterator[str]:
    if entry.rewrites is None:
        yield from style.field(entry.turn, f"not known: {entry.reason}")
    elif not entry.rewrites:
        yield from style.field(entry.turn, "stays as it was")
    else:
        yield from style.field(entry.turn, "is written anew")
        yield from style.field("before", style.visible(entry.before or ""), 2)
        yield from style.field("after", style.visible(entry.after or ""), 2)


def _drift(entry: Drift, style: Style) -> Iterator[str]:
    told = {True: Status.PROVED, False: Status.REFUSED, None: Status.UNSUPPORTED}[entry.exact]
    symbol, letter, look = _LOOKS[told]
    says = {True: "the same ids", False: "no", None: "nothing to compare"}[entry.exact]
    text = f"{says}: {entry.difference}" if entry.difference else says
    first, *rest = replace(style, colour=False).field(entry.turn, text, 2)
    yield style.paint(symbol if style.symbols else letter, look) + first[1:]
    yield from rest


def model_lines(model: Mapping[str, Any], style: Style) -> Iterator[str]:
    """The lines of what a model was found to be right for (:meth:`~torchrl_chat.models.proof.Prover.record`)."""

    def line(mark: Status, label: str, text: str) -> str:
        symbol, plain, look = _LOOKS[mark]
        return f"{style.paint(symbol if style.symbols else plain, look)} {label:<{_LABEL}} {style.plain(text)}"

    yield style.paint("model", "bold") + f"  {model['class']}"
    if "refused" in model:
        yield line(Status.REFUSED, "refused", model["refused"])
        return
    yield f"  {model['dtype']}, attention {model['kernel']}; right is within {model['limit']:.2g} nats of each row alone"
    if model["rounding"]:
        yield f"  {model['rounding']:.2g} nats off what the same weights say in float32"
    if model["random"]:
        told = "so that only eval() can tell" if model["random"] > model["limit"] else "which is rounding"
        yield f"  two passes in train() differ by {model['random']:.2g} nats, {told}"
    if model["longest"] is not None:
        yield f"  in rows of up to {model['longest']} tokens; longer ones are refused"
    apart = "sequences are taken apart"
    for what, text in (
        ("sampling", model["sampling"]),
        ("scoring", model["scoring"]),
        ("packed views", model["packing"] and f"told apart by {model['packing']}"),
        ("tree views", model["sharing"] and f"shared, by {model['sharing']}"),
        (
            "output head",
            "some hidden states at a time" if model["chunking"] else "all logits of scored tokens at once",
        ),
    ):
        refused = Status.REFUSED if what == "sampling" else Status.UNSUPPORTED
        yield line(Status.PROVED if text else refused, what, text or ("refused" if what == "sampling" else apart))
    for place, checks in (("its own weights", model["checks"]), ("a small copy", model["small_copy"])):
        if checks is None:
            yield f"  {place}: none could be made, so that what only long rows show is taken on trust"
            continue
        yield f"  {place}, nats off:"
        for name, found in checks.items():
            shown = found if isinstance(found, str) else f"{found:.1e}"
            yield f"    {name:<60} {style.plain(shown)}"
