"""What a chat template's source says about how its assistant writes: reasoning delimiters and call formats.

The source is parsed, not rendered: every string that it can write is collected, with names and
concatenations of constants filled in (:func:`spoken`). A delimiter counts when it occurs in one of them.

Law of this file: detection looks at delimiters only, never at a model's name, and raises for no source.
The tables below are the whole knowledge: a new format is a new row.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torchrl_chat.templates.toolcalls import (
    CallFormat,
    HeadedReader,
    JsonReader,
    PythonReader,
    Reader,
    TaggedReader,
    TreeReader,
)

_HOLE = "\0"
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
_GENERATION = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")


def spoken(source: str, controls: Iterable[str] = ()) -> str:
    """All the strings that a template can write, one after the other.

    Args:
        source: the template's Jinja source; one that does not parse is taken as it is.
        controls: added tokens of the tokenizer. One counts as spoken if the template spells how it begins
            (``<tool_call`` for ``<tool_call:v2>``), which is how a delimiter put together at run time is known.

    Example:
        >>> "<think:v2>" in spoken("{% set x = ':v2' %}{{ '<think{}>'.format(x) }}")
        True
    """
    try:
        text = _folded(source)
    except Exception:  # a source that Jinja refuses, or an odd constant: its bare text still tells most
        text = _COMMENT.sub("", source)
    stems = ((control, re.match(r"\W{1,4}\w{3,}", control)) for control in controls)
    built = [control for control, stem in stems if stem and stem[0][0] in "<[" and stem[0] in text]
    return "\n".join([text, *built])


def _folded(source: str) -> str:
    from jinja2 import Environment, nodes

    environment = Environment(extensions=["jinja2.ext.loopcontrols"], trim_blocks=True, lstrip_blocks=True)
    tree = environment.parse(_GENERATION.sub("", source))
    known: dict[str, str] = {}

    def fold(node: nodes.Node) -> str:
        if isinstance(node, nodes.TemplateData):
            return node.data
        if isinstance(node, nodes.Const):
            return node.value if isinstance(node.value, str) else _HOLE
        if isinstance(node, nodes.Name):
            return known.get(node.name, _HOLE)
        if isinstance(node, nodes.Add):
            return fold(node.left) + fold(node.right)
        if isinstance(node, (nodes.Concat, nodes.Output)):
            return "".join(map(fold, node.nodes))
        if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr) and node.node.attr == "format":
            pieces = fold(node.node.node).split("{}")
            filled = [fold(value) for value in node.args] + [_HOLE] * len(pieces)
            return pieces[0] + "".join(a + b for a, b in zip(filled, pieces[1:], strict=False))
        return _HOLE

    found: dict[str, None] = {}
    kinds = (nodes.Assign, nodes.Output, nodes.Add, nodes.Concat, nodes.Call, nodes.Const)
    for node in tree.find_all(kinds):
        if not isinstance(node, nodes.Assign):
            found[fold(node)] = None
        elif isinstance(node.target, nodes.Name):
            value = fold(node.node)
            found[value] = None
            if _HOLE not in value:
                known[node.target.name] = value
    return "\n".join(found)


# ---------------------------------------------------------------------- reasoning
@dataclass(frozen=True, slots=True)
class Pair:
    """Reasoning stands between ``open`` and ``close``, at the beginning of the turn."""

    open: str
    close: str


_THINK = re.compile(
    r"</?((?:[\w-]{1,20}:)?)(think|thinking|thought|reasoning|think_fast|think_faster)((?::[\w.-]{1,30})?)>",
    re.IGNORECASE,
)
_PAIRS = (
    Pair("[THINK]", "[/THINK]"),
    Pair("<|START_THINKING|>", "<|END_THINKING|>"),
    Pair("<|inner_prefix|>", "<|inner_suffix|>"),
    Pair("<|begin_of_thought|>", "<|end_of_thought|>"),
    Pair("<|think_start|>", "<|think_end|>"),
    Pair("<|channel>thought\n", "<channel|>"),
    Pair("Here are my reasoning steps:\n", "[BEGIN FINAL RESPONSE]"),
)


def pairs_of(text: str) -> tuple[Pair, ...]:
    """The reasoning delimiters in what a template speaks; its open or its close is enough."""
    tags = dict.fromkeys("".join(match.groups()) for match in _THINK.finditer(text))
    rows = [pair for pair in _PAIRS if pair.open in text or pair.close in text]
    return (*rows, *(Pair(f"<{tag}>", f"</{tag}>") for tag in tags))


@dataclass(frozen=True, slots=True)
class Channels:
    """A turn that is a sequence of segments, each with a header that says for whom it is."""

    marks: tuple[str, ...]  # a template that writes all of these speaks so
    # matches a segment's header. Its groups, where it has them: ``channel``, the recipients ``to``, ``to2``
    # and ``to3``, and ``block``, which begins a call block and so stays with the body
    header: re.Pattern[str]
    ends: tuple[str, ...]  # what ends a segment; ``{channel}`` stands for its channel
    fence: str  # what begins the next header, and so ends a segment too
    # channels and recipients whose segments are reasoning; the first is the one that a prompt opens
    reasoning: tuple[str, ...]
    # a segment with a recipient is a call, whatever its channel, its body the arguments as JSON
    calls: bool = False
    tail: str = ""  # may stand behind the last segment
    # matches a header that names a function to call, but does not end as headers do; its group is ``name``
    broken: re.Pattern[str] | None = None


_TO = r"[ ]{{0,4}}to=(?:functions\.)?(?P<{}>[^<\s]{{1,200}})"
CHANNELS = (
    Channels(
        marks=("<|channel|>", "<|message|>", "analysis"),
        header=re.compile(
            rf"(?:<\|start\|>assistant)?(?:{_TO.format('to')})?[ ]{{0,4}}"
            rf"(?:<\|channel\|>(?P<channel>\w{{1,40}})(?:[^<\n]{{0,40}}?{_TO.format('to2')})?[^<\n]{{0,40}})?"
            rf"(?:<\|constrain\|>(?:[^<\n]{{0,40}}?{_TO.format('to3')})?[^<\n]{{0,40}})?<\|message\|>"
        ),
        ends=("<|end|>", "<|call|>", "<|return|>"),
        fence="<|start|>",
        reasoning=("analysis",),
        calls=True,
        broken=re.compile(
            r"(?:<\|start\|>assistant|<\|channel\|>|(?= {0,4}to=))[^<]{0,60}?(?:<\|(?:channel|constrain)\|>[^<]{0,60}?){0,2}"
            r"to=functions\.(?P<name>[\w.-]{1,200})"
        ),
    ),
    Channels(
        marks=("assistant to=self<|message|>",),
        header=re.compile(rf"(?:<\|start\|>assistant)?(?:{_TO.format('to')})?<\|message\|>"),
        ends=("<|eom|>", "<|eot|>"),
        fence="<|start|>",
        reasoning=("self",),
    ),
    Channels(
        marks=("<|think|>", "<|content|>", "<|end|>"),
        header=re.compile(
            r"(?:<\|begin\|>assistant)?(?:<\|(?P<channel>think|content)\|>|(?P<block><\|tool_calls\|>))"
        ),
        ends=("<|end|>",),
        fence="<|begin|>",
        reasoning=("think",),
    ),
    Channels(
        marks=("<|open|>", "<|close|>", "<|sep|>"),
        header=re.compile(r"<\|open\|>(?P<channel>think|response)<\|sep\|>|(?P<block><\|open\|>tools<\|sep\|>)"),
        ends=("<|close|>{channel}<|sep|>",),
        fence="",
        reasoning=("think",),
        tail="<|close|>message<|sep|>",
    ),
)


def channels_of(text: str) -> Channels | None:
    """The segmented form of a turn that a template speaks, if it does."""
    return next((row for row in CHANNELS if all(mark in text for mark in row.marks)), None)


def opening_of(pairs: tuple[Pair, ...], channels: Channels | None) -> tuple[str, ...]:
    """The strings with which a generation prompt opens the reasoning."""
    if channels is None:
        return tuple(pair.open for pair in pairs)
    name = channels.reasoning[0]
    forms = (f"<|channel|>{name}<|message|>", f" to={name}<|message|>", f"<|{name}|>", f"<|open|>{name}<|sep|>")
    return tuple(form for form in forms if channels.header.fullmatch(form))


# ---------------------------------------------------------------------- tool calls
_NAME = r"(?P<name>[^<>\s\"'{}\[\]]{1,200})"
_BLOCK = re.compile(
    r"<((?:[^<>/\s'\"{}\0]{1,24}[:|｜])?)(tool_calls?|function_calls?|toolcalls?)((?::[\w.-]{1,30})?)>",
    re.IGNORECASE,
)
_JSON = (JsonReader(),)
_DEEPSEEK = (
    HeadedReader(
        re.compile(r"<｜tool▁call▁begin｜>\w{1,40}<｜tool▁sep｜>(?P<name>[^<>\n]{0,200})\n```(?:json)?\n"),
        "<｜tool▁call▁end｜>",
        fence="```",
    ),
    HeadedReader(re.compile(r"<｜tool▁call▁begin｜>(?P<name>[^<>\n]{0,200})<｜tool▁sep｜>"), "<｜tool▁call▁end｜>"),
)
_KIMI = HeadedReader(
    re.compile(
        r"<\|tool_call_begin\|>\s{0,4}(?P<id>(?:functions\.)?(?P<name>[^<>:\s]{0,200})(?::\d{1,9})?)\s{0,4}"
        r"<\|tool_call_argument_begin\|>"
    ),
    "<|tool_call_end|>",
)
_SOLAR = HeadedReader(
    re.compile(
        r"<\|tool_call:begin\|>(?P<id>[^<>\n]{0,200})<\|tool_call:name\|>(?P<name>[^<>\n]{0,200})"
        r"<\|tool_call:args\|>"
    ),
    "<|tool_call:end|>",
)
_ATTRIBUTED = TaggedReader(
    re.compile(r'<\|open\|>call tool="(?P<name>[^"<>\n]{0,200})"[^<>\n]{0,60}<\|sep\|>'),
    "<|close|>call<|sep|>",
    re.compile(r'<\|open\|>argument key="(?P<key>[^"<>\n]{1,200})"(?: type="(?P<kind>\w{1,20})")?<\|sep\|>'),
    "<|close|>argument<|sep|>",
)
_BRACKETED = HeadedReader(re.compile(_NAME + r"(?:\[CALL_ID\](?P<id>[^\[\]\s]{1,64}))?\[ARGS\]"), "")
_MARK = "]<]minimax[>["
_TREE = TreeReader(
    re.compile(re.escape(_MARK) + r'<invoke name="(?P<name>[^"<>\n]{1,200})">'), f"{_MARK}</invoke>", _MARK
)

FORMATS: tuple[CallFormat, ...] = (
    CallFormat(f"{_MARK}<tool_call>", f"{_MARK}</tool_call>", (_TREE,), (_MARK,)),
    CallFormat("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", _DEEPSEEK),
    CallFormat("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", (_KIMI,)),
    CallFormat("<|tool_calls|>", "<|calls|>", (_SOLAR,), ("<|tool_call:name|>",)),
    CallFormat("<|open|>tools<|sep|>", "<|close|>tools<|sep|>", (_ATTRIBUTED,), ("<|open|>", "<|close|>", "tools")),
    CallFormat("<|tool_call_start|>", "<|tool_call_end|>", (*_JSON, PythonReader())),
    CallFormat("<|tools_prefix|>", "<|tools_suffix|>", (JsonReader(keyed=True),)),
    CallFormat("<|START_ACTION|>", "<|END_ACTION|>", _JSON),
    CallFormat("[TOOL_CALLS]", "", (_BRACKETED, *_JSON)),
    CallFormat("<|function_call|>", "", _JSON),
    CallFormat("<|tool_call|>", "<|/tool_call|>", _JSON, ("<|tool_call|>", "<|/tool_call|>")),
    CallFormat("<|tool_call|>", "", _JSON),
    CallFormat("<|python_tag|>", "", (*_JSON, PythonReader())),
)
"""The rows with delimiters of their own; blocks of the form ``<...tool_call...>`` are found by that form."""


def formats_of(text: str) -> tuple[CallFormat, ...]:
    """The call formats in what a template speaks, the most specific first."""
    rows = [row for row in FORMATS if all(mark in text for mark in row.marks or (row.open,))]
    tags = dict.fromkeys(match.groups() for match in _BLOCK.finditer(text))
    for before, word, after in tags:
        tag = before + word + after
        inner = (before, word.removesuffix("s"), after)
        # A plural block around singular ones is two levels of delimiters.
        nested = f"<{''.join(inner)}>" if word.lower().endswith("s") and inner in tags else ""
        if nested and f"<arg_key{after}>" not in text:
            nested = ""
        rows.append(CallFormat(f"<{tag}>", f"</{tag}>", _tag_readers(text, before, after, nested)))
    if "<function=" in text and "<parameter=" not in text:
        rows.append(CallFormat("<function=", "</function>", (HeadedReader(re.compile(_NAME + r">"), ""),)))
    return tuple(sorted(rows, key=lambda row: -len(row.open)))


def _tag_readers(text: str, before: str, after: str, nested: str) -> tuple[Reader, ...]:
    """The readers of a ``<...tool_call...>`` block, by the tags that the template writes for its inside."""
    ns = next((p for p in dict.fromkeys((before, "")) if f"<{p}invoke name=" in text), None)
    if ns is not None:
        tag = re.escape(ns)
        head = rf"<{tag}invoke name=\"(?P<name>[^\"<>\n]{{0,200}})\">"
        param = rf"<{tag}parameter name=\"(?P<key>[^\"<>\n]{{1,200}})\"(?: string=\"(?P<kind>\w{{1,20}})\")?>"
        close, param_close = f"</{ns}invoke>", f"</{ns}parameter>"
    elif "<function=" in text and "<parameter=" in text:
        head, param = r"<function=(?P<name>[^<>\n]{0,200})>", r"<parameter=(?P<key>[^<>\n]{1,200})>"
        close, param_close = "</function>", "</parameter>"
    elif f"<arg_key{after}>" in text:
        tail = re.escape(after)
        head = re.escape(nested) + rf"\s{{0,4}}{_NAME}\s{{0,4}}(?:<tool_sep{tail}>)?"
        param = rf"<arg_key{tail}>(?P<key>[^<>\n]{{1,200}})</arg_key{tail}>\s{{0,4}}<arg_value{tail}>"
        close, param_close = nested.replace("<", "</", 1), f"</arg_value{after}>"
    else:
        return _JSON
    return (TaggedReader(re.compile(head), close, re.compile(param), param_close),)


BARE_JSON = re.compile(
    r'\s{0,16}\{\s{0,16}"name"\s{0,4}:\s{0,4}"([^"\\]{1,200})"\s{0,4},\s{0,4}"(?:parameters|arguments)"'
)
"""How a call begins that is the whole content, without any delimiter."""


def speaks_bare_json(text: str, formats: tuple[CallFormat, ...]) -> bool:
    """Whether a template writes a call as the bare JSON object that is the whole content."""
    return '"parameters": ' in text and '{"name": ' in text and all(row.open == "<|python_tag|>" for row in formats)
