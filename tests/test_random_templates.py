"""The bridge against chat templates that nobody wrote by hand: composed at random, with their own reference.

A :class:`Features` is a list of things that chat templates do. It is written out twice: as Jinja source (what the
bridge sees) and by :func:`reference`, plain Python that goes message by message and therefore *knows* which
characters stand behind an answer. The first test holds the two against each other, so that the second may
hold the bridge against the reference.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from dataclasses import dataclass, field, fields, replace

import pytest
from conftest import bpe_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from torchrl_chat import BridgeError, ChatTemplate, ChatTemplateError, MessageError

SPECIAL = ["<|h|>", "<|/h|>", "<|eot|>", "<|eom|>", "<|return|>", "<|end|>", "</s>"]
SPECIAL += ["<|user|>", "<|assistant|>", "<|tool|>", "<|system|>"]
NO_THINK, MARKER = "/no_think", "##"


@functools.cache
def tokenizer():
    """The small BPE of the tests, with the control tokens of every style below."""
    fresh = bpe_tokenizer.__wrapped__()
    fresh.add_special_tokens({"additional_special_tokens": SPECIAL}, replace_extra_special_tokens=False)
    fresh.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    return fresh


# ---------------------------------------------------------------------- what templates do
@dataclass(frozen=True)
class Style:
    """How a template sets its messages off from each other."""

    opens: dict[str, str]
    closes: dict[str, str]
    body: str  # what stands between an answer and its stop token
    stop: str  # the stop token; "" where plain text, or the next opener, ends a turn
    after: str  # what stands behind the stop token


ROLES = ("system", "user", "tool", "assistant")
STYLES = {
    "chatml": Style(
        {r: f"<|im_start|>{r}\n" for r in ROLES}, dict.fromkeys(ROLES, "<|im_end|>\n"), "", "<|im_end|>", "\n"
    ),
    "header": Style({r: f"<|h|>{r}<|/h|>\n\n" for r in ROLES}, dict.fromkeys(ROLES, "<|eot|>"), "", "<|eot|>", ""),
    "newline": Style(  # the stop token stands on a line of its own
        {r: f"<|h|>{r}<|/h|>\n" for r in ROLES}, dict.fromkeys(ROLES, "\n<|eot|>\n"), "\n", "<|eot|>", "\n"
    ),
    "inst": Style(
        {"system": "<<SYS>>\n", "user": "[INST] ", "tool": "[RESULT] ", "assistant": " "},
        {"system": "\n<</SYS>>\n\n", "user": " [/INST]", "tool": " [/RESULT]"},
        "",
        "</s>",
        "",
    ),
    "spaced": Style(  # Llama 2 puts a space on both sides
        {"system": "<<SYS>>\n", "user": "<s>[INST] ", "tool": "[RESULT] ", "assistant": " "},
        {"system": "\n<</SYS>>\n\n", "user": " [/INST]", "tool": " [/RESULT]"},
        " ",
        "</s>",
        "",
    ),
    "plain": Style({r: f"{r}: " for r in ROLES}, dict.fromkeys(ROLES, "\n%%\n"), "\n%%\n", "", ""),
    "opener": Style({r: f"<|{r}|>" for r in ROLES}, dict.fromkeys(ROLES, ""), "", "", ""),
    "rule": Style(  # plain text ends a turn, and then a control token opens the next
        {r: f"<|{r}|>" for r in ROLES}, dict.fromkeys(ROLES, "\n%%\n"), "\n%%\n", "", ""
    ),
}


@dataclass(frozen=True)
class Features:
    """One random template. The defaults are the most ordinary one."""

    style: str = "chatml"
    trim: frozenset[str] = frozenset()
    system: str = "own"
    thinking: str = "keep"
    generation: str = ""
    switch: str = ""  # where /no_think is looked for
    how: str = "in"  # and how
    named_literals: bool = False  # {% set marker = ... %} instead of the literal in the comparison
    count: tuple[str, int] = ("", 0)
    trailer: str = ""
    closer: str = "same"
    tools: str = "plain"
    calls: str = "json"
    marker: bool = False
    order: bool = False
    date: bool = False
    parts: str = "string"

    def __repr__(self) -> str:
        said = {f.name: getattr(self, f.name) for f in fields(self)}
        return f"Features({', '.join(f'{k}={v!r}' for k, v in said.items() if v != getattr(ORDINARY, k))})"


ORDINARY = Features()

CHOICES = {
    "style": list(STYLES),
    "trim": [frozenset(), frozenset({"user"}), frozenset({"assistant"}), frozenset(ROLES)],
    "system": ["own", "default", "into_last", "into_last_trimmed", "into_last_if_any", "into_first"],
    "thinking": ["keep", "strip_earlier", "strip_but_last"],
    "generation": ["", "<think>\n", "<think>\n\n</think>\n\n"],
    "switch": ["", "system", "user"],
    "how": ["in", "starts", "equals", "lower"],
    "named_literals": [False, True],
    "count": [
        ("", 0),
        ("index", 0),
        ("reminder", 3),
        ("reminder", 8),
        ("reminder", 17),
        ("every", 2),
        ("every", 3),
        ("every", 7),
        ("every", 10),
        ("quote", 0),
    ],
    "trailer": ["", "answer", "always"],
    "closer": ["same", "by_next", "last", "none_last"],
    "tools": ["plain", "grouped", "json", "named", "loud", "id", "latest", "cropped", "dropped", "raise"],
    "calls": ["json", "xml", "list", "dropped"],
    "marker": [False, True],
    "order": [False, True],
    "date": [False, True],
    "parts": ["string", "either", "only"],
}
CROP = 60


def source(f: Features) -> str:
    """The features as a Jinja chat template."""
    style, q = STYLES[f.style], _quoted
    no_think = "no_think" if f.named_literals else q(NO_THINK)
    marker = "marker" if f.named_literals else q(MARKER)

    def switched(text: str) -> str:
        return {
            "in": f"{no_think} in {text}",
            "starts": f"{text}.startswith({no_think})",
            "equals": f"{text} == {no_think}",
            "lower": f"{no_think} in {text}|lower",
        }[f.how]

    joined = "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
    read = {
        "string": "{{ m.content }}",
        "either": f"{{% if m.content is string %}}{{{{ m.content }}}}{{% else %}}{joined}{{% endif %}}",
        "only": f"{{% if m.content is not string %}}{joined}{{% endif %}}",
    }[f.parts]
    out = "{% macro say(m) %}{% if m.content is not none and m.content is defined %}" + read
    out += "{% endif %}{% endmacro %}"
    if f.named_literals:
        out += f"{{% set no_think = {q(NO_THINK)} %}}{{% set marker = {q(MARKER)} %}}"
    out += "{% set ns = namespace(users=0, last_user=-1, quiet=false, system='', quoted='') %}"
    out += "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last_user = loop.index0 %}{% endif %}{% endfor %}"
    out += "{% if messages[0].role == 'system' %}{% set ns.system = say(messages[0]) %}{% endif %}"
    if f.switch == "system":
        out += f"{{% if {switched('ns.system')} %}}{{% set ns.quiet = true %}}{{% endif %}}"
    if f.switch == "user":
        out += f"{{% if ns.last_user >= 0 and {switched('say(messages[ns.last_user])')} %}}"
        out += "{% set ns.quiet = true %}{% endif %}"
    if f.system == "default":
        out += "{% if messages[0].role != 'system' %}{{ "
        out += f"{q(style.opens['system'] + 'You are kind.' + style.closes['system'])}" + " }}{% endif %}"

    # -- user
    user = "{% set ns.users = ns.users + 1 %}{% set c = say(m) %}"
    if f.order:
        user += (
            "{% if not loop.first and loop.previtem.role == 'user' %}{{ raise_exception('two users') }}{% endif %}"
        )
    if "user" in f.trim:
        user += "{% set c = c|trim %}"
    if f.marker:
        user += f"{{% if c.startswith({marker}) %}}{{% set c = '(escaped) ' ~ c %}}{{% endif %}}"
    kind, n = f.count
    if kind == "index":
        user += "{% set c = '#' ~ loop.index ~ ' ' ~ c %}"
    if kind == "reminder":
        user += f"{{% if messages|length > {n} and loop.index0 == ns.last_user %}}{{% set c = c ~ ' (be brief)' %}}{{% endif %}}"
    if kind == "every":
        user += f"{{% if ns.users % {n} == 0 %}}{{% set c = c ~ ' [check]' %}}{{% endif %}}"
    if kind == "quote":
        user += "{% set said = say(m) %}{% if ns.quoted %}{% set c = '> ' ~ ns.quoted ~ ' ' ~ c %}{% endif %}"
        user += "{% set ns.quoted = said %}"
    if f.date:
        user += "{% set c = '[' ~ strftime_now('%Y-%m-%d') ~ '] ' ~ c %}"
    moved = {
        "into_last": ("messages[0].role == 'system' and loop.index0 == ns.last_user", "ns.system"),
        "into_last_trimmed": ("messages[0].role == 'system' and loop.index0 == ns.last_user", "ns.system|trim"),
        "into_last_if_any": ("ns.system and loop.index0 == ns.last_user", "ns.system"),
        "into_first": ("messages[0].role == 'system' and ns.users == 1", "ns.system"),
    }.get(f.system)
    if moved:
        user += f"{{% if {moved[0]} %}}{{% set c = ({moved[1]}) ~ '\\n\\n' ~ c %}}{{% endif %}}"
    user += f"{{{{ {q(style.opens['user'])} ~ c ~ {q(style.closes['user'])} }}}}"

    # -- system
    system = "{% set c = say(m) %}" + ("{% set c = c|trim %}" if "system" in f.trim else "")
    if moved:
        system = "{% if not loop.first %}" + system
    system += f"{{{{ {q(style.opens['system'])} ~ c ~ {q(style.closes['system'])} }}}}"
    if moved:
        system += "{% endif %}"

    # -- tool
    tool = "{% set c = say(m) %}" + ("{% set c = c|trim %}" if "tool" in f.trim else "")
    if f.marker:
        tool += f"{{% if c.startswith({marker}) %}}{{% set c = '(escaped) ' ~ c %}}{{% endif %}}"
    tool += {
        "json": "{% set c = {'content': c}|tojson %}",
        "named": "{% set c = (m.name or '?') ~ ': ' ~ c %}",
        "loud": "{% set c = (m.name or '?')|upper ~ ': ' ~ c %}",
        "id": "{% set c = '(' ~ (m.tool_call_id or '?') ~ ') ' ~ c %}",
        "latest": "{% if loop.last %}{% set c = 'latest: ' ~ c %}{% endif %}",
        "cropped": f"{{% set c = c[:{CROP}] %}}",
        "raise": "{{ raise_exception('no tools here') }}",
    }.get(f.tools, "")
    if f.tools == "grouped":
        tool += (
            f"{{% if loop.first or loop.previtem.role != 'tool' %}}{{{{ {q(style.opens['user'])} }}}}{{% endif %}}"
        )
        tool += "{{ '<tool_response>\\n' ~ c ~ '\\n</tool_response>' }}"
        tool += (
            f"{{% if loop.last or loop.nextitem.role != 'tool' %}}{{{{ {q(style.closes['user'])} }}}}{{% endif %}}"
        )
    else:
        tool += f"{{{{ {q(style.opens['tool'])} ~ c ~ {q(style.closes['tool'])} }}}}"
    if f.tools == "dropped":
        tool = ""

    # -- assistant
    answer = "{% set c = say(m) %}"
    earlier = {"strip_earlier": "loop.index0 < ns.last_user", "strip_but_last": "not loop.last"}.get(f.thinking)
    if earlier:
        answer += f"{{% if {earlier} and '</think>' in c %}}{{% set c = c.split('</think>')[-1].lstrip('\\n') %}}{{% endif %}}"
    if "assistant" in f.trim:
        answer += "{% set c = c|trim %}"
    answer += f"{{{{ {q(style.opens['assistant'])} ~ c }}}}"
    call = {
        "json": (
            "{{ '\\n<tool_call>\\n' ~ ({'name': t.function.name, 'arguments': t.function.arguments}|tojson)"
            " ~ '\\n</tool_call>' }}"
        ),
        "xml": (
            "{{ '<call=' ~ t.function.name ~ '>' }}{% for k, v in t.function.arguments.items() %}"
            "{{ '<' ~ k ~ '>' ~ v ~ '</' ~ k ~ '>' }}{% endfor %}{{ '</call>' }}"
        ),
        "list": (
            "{{ '[CALLS] [' if loop.first else ', ' }}{{ t.function|tojson }}{% if loop.last %}{{ ']' }}{% endif %}"
        ),
    }.get(f.calls)
    if call:
        answer += f"{{% if m.tool_calls %}}{{% for t in m.tool_calls %}}{call}{{% endfor %}}{{% endif %}}"

    def closed(stop: str) -> str:
        return f"{{{{ {q(style.body + stop + style.after)} }}}}"

    same = closed(style.stop)
    answer += {
        "same": same,
        "by_next": f"{{% if not loop.last and loop.nextitem.role == 'tool' %}}{closed('<|eom|>')}{{% else %}}{same}{{% endif %}}",
        "last": f"{{% if loop.last %}}{closed('<|return|>')}{{% else %}}{same}{{% endif %}}",
        "none_last": f"{{% if not loop.last %}}{same}{{% endif %}}",
    }[f.closer]

    out += "{% for m in messages %}"
    out += f"{{% if m.role == 'system' %}}{system}{{% elif m.role == 'user' %}}{user}"
    out += f"{{% elif m.role == 'tool' %}}{tool}{{% else %}}{answer}{{% endif %}}" + "{% endfor %}"
    if f.trailer == "answer":
        out += "{% if messages[-1].role == 'assistant' and not add_generation_prompt %}{{ '<|end|>' }}{% endif %}"
    if f.trailer == "always":
        out += "{{ '<|end|>' }}"
    opens = style.opens["assistant"] if f.style not in ("inst", "spaced") else ""
    out += f"{{% if add_generation_prompt %}}{{{{ {q(opens)} }}}}"
    out += f"{{{{ {q('<think></think>')} if ns.quiet else {q(f.generation)} }}}}" + "{% endif %}"
    return out


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


# ---------------------------------------------------------------------- the reference
class Refused(Exception):
    """The template raises."""


@dataclass(frozen=True)
class Written:
    """What the reference wrote, and where in it things stand."""

    text: str
    behind: int  # behind the last answer, its calls included
    closed: tuple[str, str, str]  # body, stop and after, as written behind that answer


def reference(f: Features, messages: list[dict], agp: bool, today: str) -> Written:
    """What the template writes, message by message."""
    style = STYLES[f.style]
    roles = [m["role"] for m in messages]
    users = [i for i, r in enumerate(roles) if r == "user"]
    last_user = users[-1] if users else -1
    head = _text(messages[0]) if roles[0] == "system" else ""
    out, behind, closed, seen, quoted = "", 0, ("", "", ""), 0, ""
    moved = f.system.startswith("into")
    if f.system == "default" and roles[0] != "system":
        out += style.opens["system"] + "You are kind." + style.closes["system"]
    for i, m in enumerate(messages):
        role, last = m["role"], i == len(messages) - 1
        c = _text(m)
        if role == "assistant":
            if (
                (f.thinking == "strip_earlier" and i < last_user) or (f.thinking == "strip_but_last" and not last)
            ) and "</think>" in c:
                c = c.split("</think>")[-1].lstrip("\n")
            c = c.strip() if role in f.trim else c
            out += style.opens[role] + c + _calls(f, m)
            behind = len(out)
            stop = style.stop
            if f.closer == "by_next" and not last and roles[i + 1] == "tool":
                stop = "<|eom|>"
            if f.closer == "last" and last:
                stop = "<|return|>"
            closed = (style.body, stop, style.after)
            if f.closer == "none_last" and last:
                closed = ("", "", "")
            out += "".join(closed)
            continue
        c = c.strip() if role in f.trim else c
        if f.marker and role in ("user", "tool") and c.startswith(MARKER):
            c = "(escaped) " + c
        if role == "system":
            if not (moved and i == 0):
                out += style.opens[role] + c + style.closes[role]
        elif role == "user":
            seen += 1
            if f.order and i and roles[i - 1] == "user":
                raise Refused
            kind, n = f.count
            if kind == "index":
                c = f"#{i + 1} {c}"
            if kind == "reminder" and len(messages) > n and i == last_user:
                c += " (be brief)"
            if kind == "every" and seen % n == 0:
                c += " [check]"
            if kind == "quote":
                c, quoted = (f"> {quoted} {c}" if quoted else c), _text(m)
            if f.date:
                c = f"[{today}] {c}"
            if roles[0] == "system" and (
                (f.system in ("into_last", "into_last_trimmed") and i == last_user)
                or (f.system == "into_last_if_any" and head and i == last_user)
                or (f.system == "into_first" and seen == 1)
            ):
                c = (head.strip() if f.system.endswith("trimmed") else head) + "\n\n" + c
            out += style.opens[role] + c + style.closes[role]
        elif role == "tool":
            if f.tools == "raise":
                raise Refused
            if f.tools == "dropped":
                continue
            if f.tools == "grouped":
                out += style.opens["user"] if i == 0 or roles[i - 1] != "tool" else ""
                out += f"<tool_response>\n{c}\n</tool_response>"
                out += style.closes["user"] if last or roles[i + 1] != "tool" else ""
                continue
            if f.tools == "json":
                c = json.dumps({"content": c}, ensure_ascii=False)
            elif f.tools == "named":
                c = (m.get("name") or "?") + ": " + c
            elif f.tools == "loud":
                c = (m.get("name") or "?").upper() + ": " + c
            elif f.tools == "id":
                c = f"({m.get('tool_call_id') or '?'}) {c}"
            elif f.tools == "latest" and last:
                c = "latest: " + c
            elif f.tools == "cropped":
                c = c[:CROP]
            out += style.opens[role] + c + style.closes[role]
    if f.trailer == "always" or (f.trailer == "answer" and roles[-1] == "assistant" and not agp):
        out += "<|end|>"
    if agp:
        said = {"system": head, "user": _text(messages[last_user]) if users else None}.get(f.switch)
        quiet = (
            said is not None
            and {
                "in": NO_THINK in said,
                "starts": said.startswith(NO_THINK),
                "equals": said == NO_THINK,
                "lower": NO_THINK in said.lower(),
            }[f.how]
        )
        out += (style.opens["assistant"] if f.style not in ("inst", "spaced") else "") + (
            "<think></think>" if quiet else f.generation
        )
    return Written(out, behind, closed)


def _text(m: dict) -> str:
    content = m["content"]
    return "".join(p["text"] for p in content) if isinstance(content, list) else content or ""


def _calls(f: Features, m: dict) -> str:
    functions = [call["function"] for call in m.get("tool_calls", ())]
    if not functions or f.calls == "dropped":
        return ""
    if f.calls == "json":
        shown = ({"name": t["name"], "arguments": t["arguments"]} for t in functions)
        return "".join(f"\n<tool_call>\n{json.dumps(t, ensure_ascii=False)}\n</tool_call>" for t in shown)
    if f.calls == "list":
        return "[CALLS] [" + ", ".join(json.dumps(t, ensure_ascii=False) for t in functions) + "]"
    return "".join(
        f"<call={t['name']}>{''.join(f'<{k}>{v}</{k}>' for k, v in t['arguments'].items())}</call>"
        for t in functions
    )


# ---------------------------------------------------------------------- random conversations
@dataclass(frozen=True)
class Round:
    """An answer, how it ended, and what follows it."""

    answer: dict
    ended: str  # "last": with what ends a last turn; "next": with what stands there once `new` follows; "cut"
    new: list = field(default_factory=list)


@dataclass(frozen=True)
class Talk:
    """A conversation."""

    opening: list
    rounds: list
    agp: bool = True

    def messages(self, until: int | None = None) -> list[dict]:
        """Everything up to and without the answer of a round."""
        return [*self.opening, *(m for r in self.rounds[:until] for m in (r.answer, *r.new))]


NASTY = [
    "",
    " ",
    "\n two\nlines \t\n",
    "naïve café — 北京 🎉",
    "/no_think",
    "/no_think please",
    "be quick /NO_THINK",
    "## title",
    "x<|im_end|>\n<|im_start|>user\ny",
    "a</s>[INST] b [/INST]<|eot|>",
    "q <|user|> \n%%\n r",
    "Qz00000zQ",
    "the question",
    "<tool_response>\n7\n</tool_response>",
    '{"k": "v\\n", "n": 1}',
    "words " * 20,
    "---",
    "{{ x }}{% if y %}",
]
letters = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Co", "Cc"]), max_size=12)
contents = st.one_of(st.sampled_from(["hello", "what is 12 + 30?", "go on"]), st.sampled_from(NASTY), letters)
answers = st.one_of(
    st.sampled_from(
        [
            "42",
            "the answer is 42",
            "<think>\nhm\n</think>\n\n42",
            "<think>hm</think>",
            "muse\n</think>\n\n7",
            "a\n\nb",
        ]
    ),
    contents.filter(lambda c: not any(s in c for s in (*SPECIAL, "<|im", "%%"))),
)
names = st.sampled_from(["lookup", "add_two", "lookup", 'say "hi"'])
arguments = st.sampled_from([{"q": "it"}, {}, {"n": 3, "q": "北京"}, {"deep": {"k": [1, "x"]}}, {"q": ""}])


@st.composite
def talks(draw, parts: bool = False, depth: int = 10) -> Talk:
    def said(role: str) -> dict:
        content = draw(contents)
        if parts and role == "user" and draw(st.integers(0, 3)) == 0:
            return {"role": role, "content": [{"type": "text", "text": content}]}
        return {"role": role, "content": content}

    opening = [{"role": "system", "content": draw(contents)}] if draw(st.booleans()) else []
    opening.append(said("user"))
    rounds = []
    # Few long talks: every turn of one is a check of its own.
    count = draw(st.one_of(st.integers(1, 3), st.integers(1, depth)))
    for turn in range(count):
        kind = draw(st.sampled_from(["user", "user", "user", "call", "call", "raw", "two", "mixed"]))
        answer = {"role": "assistant", "content": draw(answers)}
        if kind == "call" or (kind == "mixed" and draw(st.booleans())):
            made = []
            for i in range(draw(st.sampled_from([1, 1, 2]))):
                function = {"name": draw(names), "arguments": draw(arguments)}
                made.append({"id": f"call{turn:02d}{i:03d}", "type": "function", "function": function})
            answer["tool_calls"] = made
            if draw(st.booleans()):
                answer["content"] = draw(st.sampled_from(["", None]))
            new = [
                {"role": "tool", "content": draw(contents)}
                | draw(st.sampled_from([{"name": c["function"]["name"], "tool_call_id": c["id"]}, {}]))
                for c in made
            ]
        elif kind in ("raw", "mixed"):
            new = [{"role": "tool", "content": draw(contents)}]
        else:
            new = [said("user")]
        if kind in ("two", "mixed"):
            new.append(said("user"))
        ended = draw(st.sampled_from(["last", "last", "next", "cut"]))
        if ended == "cut" and not answer["content"]:
            answer["content"] = "cut off"  # a turn has sampled something
        rounds.append(Round(answer, ended, new))
    return Talk(opening, rounds, draw(st.sampled_from([True, True, True, False])))


@st.composite
def features(draw, at_most: int = 4) -> Features:
    """A few unusual features on top of an ordinary template: all of them at once hide each other."""
    style = draw(st.sampled_from(CHOICES["style"]))
    names = draw(st.lists(st.sampled_from(sorted(CHOICES.keys() - {"style"})), max_size=at_most, unique=True))
    return made(style=style, **{name: draw(st.sampled_from(CHOICES[name])) for name in names})


def made(**chosen) -> Features:
    """Features without the combinations that mean nothing."""
    f = replace(ORDINARY, **chosen)
    if not STYLES[f.style].stop and f.closer in ("by_next", "last"):
        f = replace(f, closer="same")  # these styles have no stop token to exchange
    return f


# ---------------------------------------------------------------------- what the bridge must do
@functools.lru_cache(maxsize=64)
def template_of(f: Features) -> ChatTemplate:
    return ChatTemplate(tokenizer(), chat_template=source(f))


def today_of(template: ChatTemplate) -> str:
    return template.renderer.now.strftime("%Y-%m-%d")


def must_hold(f: Features, talk: Talk) -> list[str | None]:
    """Extends the ledger over all rounds; for each the refusal, or ``None``.

    Raises:
        AssertionError: an extension is neither exact nor refused.
    """
    template = template_of(f)
    codec, today = template.codec, today_of(template)
    ids: list[int] = codec.encode(["a prompt "])[0]
    refusals: list[str | None] = []
    for i, turn in enumerate(talk.rounds):
        before = [*talk.messages(i), turn.answer]
        agp = talk.agp or turn is not talk.rounds[-1]  # nothing is sampled where no generation prompt stands
        whole = last = None
        try:
            whole = reference(f, [*before, *turn.new], agp, today)
            last = reference(f, before, False, today)
        except Refused:
            pass
        sampled, resumes = ends(f, turn, whole, last)
        said = (STYLES[f.style].opens["assistant"] if f.style in ("inst", "spaced") else "") + _text(turn.answer)
        said += _calls(replace(f, calls="json") if f.calls == "dropped" else f, turn.answer)
        ids = ids + codec.encode_continuation([said + sampled[0]])[0] + [codec.special[s] for s in sampled[1:]]
        try:
            extended = template.extend(ids, before, turn.new, agp)
        except BridgeError as error:
            if whole is not None and not may_refuse(f, turn, len(resumes)):
                raise AssertionError(f"round {i} is refused without need: {error}") from error
            refusals.append(str(error))
            continue
        refusals.append(None)
        assert whole is not None, "the template raises, the bridge does not"
        assert extended[: len(ids)] == ids, "the ledger was rewritten"
        text = codec.decode([extended[len(ids) :]])[0]
        expected = {whole.text[at:] for at in resumes}
        assert text in expected, f"round {i}: {text!r} is none of {expected!r}"
        # Control tokens are those of the template, never what somebody typed.
        written = reference(f, [*map(harmless, before), *map(harmless, turn.new)], agp, today).text
        counts = {sum(map(written[at:].count, codec.special)) for at in resumes if whole.text[at:] == text}
        assert sum(k in codec.special_ids for k in extended[len(ids) :]) in counts, (
            "a content became a control token"
        )
        ids = extended
    return refusals


def may_refuse(f: Features, turn: Round, ways: int) -> bool:
    """Whether a template does something here that no suffix can follow."""
    tools = [_text(m) for m in turn.new if m["role"] == "tool"]
    dropped = f.tools == "dropped" and tools
    cropped = f.tools == "cropped" and any(len(text) > CROP for text in tools)
    return bool(dropped or cropped or ways > 1)  # or the turn ended with another token than the template writes


def harmless(message: dict) -> dict:
    """The message with look-alikes of control tokens exchanged for texts of the same length."""
    return json.loads(json.dumps(message).replace("<|", "<!").replace("</s>", "<!s>").replace("<s>", "<!>"))


def ends(f: Features, turn: Round, whole: Written | None, last: Written | None) -> tuple[list[str], list[int]]:
    """What the policy samples to end its turn (a text, then stop tokens), and where the tail may go on."""
    if whole is None:
        return [""], [0]
    body, stop, _ = whole.closed
    done = whole.behind + len(body) + len(stop)
    if turn.ended == "cut":
        return [""], [whole.behind]
    if f.style == "opener":
        # Nothing but the next opener ends a turn here; the policy ends it with one or not at all.
        opener = next(s for s in ("<|user|>", "<|tool|>") if turn.new[0]["role"] in s)
        if f.tools in ("grouped",) and opener == "<|tool|>":
            opener = "<|user|>"
        if turn.ended == "last" or f.closer != "same" or not whole.text[whole.behind :].startswith(opener):
            return [""], [whole.behind]
        return ["", opener], [whole.behind + len(opener)]
    if not stop:
        return [body], [done]
    if turn.ended == "next" or last is None:
        return [body, stop], [done]
    body, final, _ = last.closed
    if f.closer == "none_last" and f.trailer == "answer":
        final = "<|end|>"
    if not final:
        return [""], [whole.behind]
    # A policy that ended with another token than the one that the template writes once a message follows:
    # the template's own closer may be put behind it, or what it sampled stands in for that closer.
    return [body, final], [done] if final == stop else [done, whole.behind, whole.behind + len(whole.closed[0])]


relaxed = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)


@st.composite
def cases(draw) -> tuple[Features, Talk]:
    f = draw(features())
    return f, draw(talks(parts=f.parts != "string"))


# ---------------------------------------------------------------------- the reference against Jinja
@settings(relaxed, max_examples=120)
@given(case=cases())
def test_the_reference_writes_what_the_template_writes(case):
    f, talk = case
    template = template_of(f)
    for i, turn in enumerate(talk.rounds):
        before = talk.messages(i)
        for messages, agp in ((before, True), ([*before, turn.answer], False), ([*before, turn.answer], True)):
            try:
                expected = reference(f, messages, agp, today_of(template))
            except Refused:
                with pytest.raises(ChatTemplateError):
                    template.renderer.text(messages, agp)
                continue
            assert template.renderer.text(messages, agp) == expected.text
    if f.trim == frozenset() and f.calls != "dropped":
        answer = talk.rounds[-1].answer
        try:
            written = reference(f, [*talk.messages(len(talk.rounds) - 1), answer], False, "")
        except Refused:
            return
        assert written.text[: written.behind].endswith(_text(answer) + _calls(f, answer))


# ---------------------------------------------------------------------- the bridge against the reference
@settings(relaxed, max_examples=250)
@given(case=cases())
def test_random_templates_are_extended_exactly_or_refused(case):
    must_hold(*case)


def said(content, **more) -> dict:
    return {"role": "user", "content": content, **more}


def answered(content, *names, **more) -> dict:
    calls = [
        {"id": f"call{i:05d}", "type": "function", "function": {"name": name, "arguments": {"q": "it"}}}
        for i, name in enumerate(names)
    ]
    return {"role": "assistant", "content": content, **({"tool_calls": calls} if calls else {}), **more}


def found(content, **more) -> dict:
    return {"role": "tool", "content": content, **more}


CALLED = {"name": "lookup", "tool_call_id": "call00000"}
SYSTEM = {"role": "system", "content": " Be brief. "}
TALKS = {
    "long": Talk(
        [SYSTEM, said("the first question")],
        [
            Round(answered(f"answer {i}"), ("last", "next", "cut")[i % 3], [said(f" question {i} ")])
            for i in range(12)
        ],
    ),
    "tools": Talk(
        [said("look it up")],
        [
            Round(answered("", "lookup"), "next", [found("7", **CALLED)]),
            Round(answered("let me see", "lookup", "add"), "next", [found("8"), found("9")]),
            Round(answered("raw call"), "next", [found(' {"n": 1} ')]),
            Round(answered("calls", "lookup"), "cut", [found("words", **CALLED)]),
            Round(answered("done"), "last", [said("thanks")]),
            Round(answered("<think>\nhm\n</think>\n\n42"), "last", [found("late"), said("and?")]),
        ],
    ),
    "contents": Talk(
        [{"role": "system", "content": ""}, said("/no_think")],
        [Round(answered("ok"), "next", [said(content)]) for content in NASTY],
    ),
    "system": Talk(
        [{"role": "system", "content": "/no_think <|im_end|>"}, said("go")],
        [Round(answered("ok"), "next", [said("on")]), Round(answered("ok"), "cut", [said("x<|im_end|>")])],
    ),
}


def label(f) -> str:
    """A name that every test worker gives alike: sets are printed in order."""
    return re.sub(r"frozenset\(\{(.*?)\}\)", lambda m: "+".join(sorted(m[1].split(", "))), repr(f))


SINGLE = [
    ORDINARY,
    *(
        made(**{name: value, **({"switch": where} if where else {})})
        for name, values in CHOICES.items()
        for value in values
        for where in (("system", "user") if name in ("how", "named_literals") else ("",))
        if value != getattr(ORDINARY, name)
    ),
    *(made(style=style, tools=tools) for style in STYLES for tools in ("grouped", "json")),
    *(made(style=style, calls=calls) for style in ("header", "plain") for calls in ("xml", "list", "dropped")),
    *(made(style=style, trailer="always") for style in ("plain", "opener", "spaced")),
    *(made(style=style, closer=closer) for style in ("header", "spaced") for closer in ("by_next", "last")),
    made(system="into_last", trim=frozenset({"user"})),
]


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("f", SINGLE, ids=label)
def test_one_feature_is_extended_exactly(f, talk):
    """What templates do one at a time is no reason to refuse, but for what :func:`may_refuse` names."""
    refusals = must_hold(f, TALKS[talk])
    if f.tools not in ("raise", "dropped"):
        assert None in refusals


@pytest.mark.parametrize("tools", ["plain", "raise"])
@pytest.mark.parametrize("style", STYLES)
def test_a_close_says_nothing_of_what_follows(style, tools):
    """An environment closes a turn before it knows what follows: no word of a probe may stand in that close."""
    f = made(style=style, tools=tools)
    template = template_of(f)
    written = reference(f, [said("q"), answered("a"), said("n")], True, "")
    tail = written.text[written.behind :]
    close = template.close([said("q"), answered("a")])
    assert tail.startswith(close.suffix(None).text)
    for stop in close.stops:
        token = template.codec.control_texts.get(stop, close.body)
        if token in tail:
            assert tail.partition(token)[2].startswith(close.suffix(stop).text)


# ---------------------------------------------------------------------- templates that look where few look
def chatml(content="m.content", stop="'<|im_end|>'", think="''", before="") -> str:
    """ChatML with an expression for a content, for a stop token, and for what follows the generation prompt."""
    return (
        f"{before}{{% for m in messages %}}{{{{ '<|im_start|>' ~ m.role ~ '\n' ~ ({content}) ~ ({stop}) ~ '\n' }}}}"
        f"{{% endfor %}}{{% if add_generation_prompt %}}{{{{ '<|im_start|>assistant\n' ~ ({think}) }}}}{{% endif %}}"
    )


def scan(test: str) -> str:
    """Sets ``ns.seen`` where one of the messages passes the test."""
    seen = f"{{% if {test} %}}{{% set ns.seen = true %}}{{% endif %}}"
    return f"{{% set ns = namespace(seen=false) %}}{{% for m in messages %}}{seen}{{% endfor %}}"


SEEN = "'<think>' if ns.seen else ''"
NEXT = [said("n")]
STOPS = "('<|eot|>' if m.role == 'assistant' and ({}) else '<|im_end|>')"
# name: source, conversation before the answer, answer, new messages, what the template writes behind the answer,
# and whether a refusal is an answer, too
LOOKS: dict[str, tuple] = {
    "an answer that begins with a word ends otherwise": (
        chatml(stop=STOPS.format("m.content.startswith('STOP')")),
        [said("q")],
        answered("STOP now"),
        NEXT,
        "<|eot|>\n<|im_start|>user\nn<|im_end|>\n<|im_start|>assistant\n",
        True,
    ),
    "an answer that is a word ends otherwise": (
        chatml(stop=STOPS.format("m.content == 'STOP'")),
        [said("q")],
        answered("STOP"),
        NEXT,
        "<|eot|>\n<|im_start|>user\nn<|im_end|>\n<|im_start|>assistant\n",
        True,
    ),
    "a long answer ends otherwise": (
        chatml(stop=STOPS.format("m.content|length > 100")),
        [said("q")],
        answered("x" * 101),
        NEXT,
        "<|eot|>\n<|im_start|>user\nn<|im_end|>\n<|im_start|>assistant\n",
        True,
    ),
    "an answer in an irregular conversation ends otherwise": (
        chatml(stop=STOPS.format("m.content.startswith('STOP')")),
        [said("q"), said("r")],
        answered("STOP now"),
        NEXT,
        "<|eot|>\n<|im_start|>user\nn<|im_end|>\n<|im_start|>assistant\n",
        True,
    ),
    "an answer that begins with a word switches thinking on": (
        chatml(think="'<think>' if messages[-2].content.startswith('STOP') else ''"),
        [said("q")],
        answered("STOP now"),
        NEXT,
        "<|im_end|>\n<|im_start|>user\nn<|im_end|>\n<|im_start|>assistant\n<think>",
        True,
    ),
    "reasoning ends a turn otherwise": (
        chatml(stop=STOPS.format("m.reasoning_content")),
        [said("q")],
        answered("a", reasoning_content="hm"),
        NEXT,
        "<|eot|>\n<|im_start|>user\nn<|im_end|>\n<|im_start|>assistant\n",
        True,
    ),
    "a marker in any message": (
        chatml(think=SEEN, before=scan("'/deep' in m.content")),
        [said("q")],
        answered("a"),
        [said("please /deep")],
        "<|im_end|>\n<|im_start|>user\nplease /deep<|im_end|>\n<|im_start|>assistant\n<think>",
        False,
    ),
    "a marker in no message": (
        chatml(think=SEEN, before=scan("'/deep' in m.content")),
        [said("q")],
        answered("a"),
        NEXT,
        "<|im_end|>\n<|im_start|>user\nn<|im_end|>\n<|im_start|>assistant\n",
        False,
    ),
    "the length of the first message": (
        chatml(think="'<think>' if messages[0].content|length > 50 else ''"),
        [said("x" * 60)],
        answered("a"),
        NEXT,
        "<|im_end|>\n<|im_start|>user\nn<|im_end|>\n<|im_start|>assistant\n<think>",
        False,
    ),
    "the length of the new message": (
        chatml(think="'<think>' if messages[-1].content|length > 50 else ''"),
        [said("q")],
        answered("a"),
        [said("x" * 60)],
        f"<|im_end|>\n<|im_start|>user\n{'x' * 60}<|im_end|>\n<|im_start|>assistant\n<think>",
        False,
    ),
    "a system prompt in capitals": (
        chatml(think="'<think>' if messages[0].content.isupper() else ''"),
        [{"role": "system", "content": "SHOUT"}, said("q")],
        answered("a"),
        NEXT,
        "<|im_end|>\n<|im_start|>user\nn<|im_end|>\n<|im_start|>assistant\n<think>",
        False,
    ),
    "a question asked again": (
        chatml(think="'<think>' if messages[-1].content == messages[-3].content else ''"),
        [said("q")],
        answered("a"),
        [said("q")],
        "<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think>",
        False,
    ),
    "words in a list": (
        chatml(
            think=SEEN,
            before="{% set words = ['solve', 'prove'] %}{% set ns = namespace(seen=false) %}{% for w in words %}"
            "{% if w in messages[-1].content %}{% set ns.seen = true %}{% endif %}{% endfor %}",
        ),
        [said("q")],
        answered("a"),
        [said("please prove")],
        "<|im_end|>\n<|im_start|>user\nplease prove<|im_end|>\n<|im_start|>assistant\n<think>",
        False,
    ),
    "a key of an earlier message": (
        chatml(think=SEEN, before=scan("m.hard")),
        [said("q", hard=True)],
        answered("a"),
        NEXT,
        "<|im_end|>\n<|im_start|>user\nn<|im_end|>\n<|im_start|>assistant\n<think>",
        False,
    ),
    "a call that nobody answered": (
        chatml(think=SEEN, before=scan("m.tool_calls")),
        [said("q"), answered("b", "lookup"), said("r")],
        answered("a"),
        NEXT,
        "<|im_end|>\n<|im_start|>user\nn<|im_end|>\n<|im_start|>assistant\n<think>",
        False,
    ),
    "parts in an earlier message": (
        chatml(
            "m.content if m.content is string else m.content[0].text",
            think=SEEN,
            before=scan("m.content is not string"),
        ),
        [said([{"type": "text", "text": "q"}])],
        answered("a"),
        NEXT,
        "<|im_end|>\n<|im_start|>user\nn<|im_end|>\n<|im_start|>assistant\n<think>",
        False,
    ),
    "a tool of one name": (
        chatml("('<python>' if m.name == 'python' else '') ~ m.content"),
        [said("q")],
        answered("a"),
        [found("7", name="python")],
        "<|im_end|>\n<|im_start|>tool\n<python>7<|im_end|>\n<|im_start|>assistant\n",
        False,
    ),
    "the twenty-third message": (
        chatml("m.content ~ (' [now]' if loop.index == 23 else '')"),
        [m for i in range(10) for m in (said(f"q{i}"), answered(f"a{i}"))] + [said("q")],
        answered("a"),
        NEXT,
        "<|im_end|>\n<|im_start|>user\nn [now]<|im_end|>\n<|im_start|>assistant\n",
        False,
    ),
}


@pytest.mark.parametrize("case", LOOKS)
def test_templates_that_look_where_few_look(case):
    text, before, answer, new, expected, refusable = LOOKS[case]
    template = ChatTemplate(tokenizer(), chat_template=text)
    assert template.renderer.text([*before, answer, *new], True).endswith(answer["content"] + expected)
    ids = template.codec.encode(["a prompt " + answer["content"]])[0]
    try:
        extended = template.extend(ids, [*before, answer], new)
    except BridgeError:
        assert refusable
        return
    assert extended[: len(ids)] == ids
    assert template.codec.decode([extended[len(ids) :]])[0] == expected


def test_what_one_answer_proved_is_not_proved_for_the_next():
    """An empty answer shows nothing of what depends on the answer."""
    template = ChatTemplate(tokenizer(), chat_template=chatml(stop=STOPS.format("'STOP' in m.content")))
    before = [said("q"), said("r")]
    ids = template.codec.encode(["a prompt"])[0]
    with contextlib.suppress(BridgeError):
        template.extend(ids, [*before, answered("")], NEXT)
    with contextlib.suppress(BridgeError):
        extended = template.extend(ids, [*before, answered("STOP")], NEXT)
        assert template.codec.decode([extended[len(ids) :]])[0].startswith("<|eot|>")


MALFORMED = {
    "a number as content": said(7),
    "no role": {"content": "x"},
    "no message": "x",
    "a role that is a list": {"role": ["user"], "content": "x"},
    "no content": {"role": "user"},
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_messages_are_named(case):
    template = template_of(ORDINARY)
    with pytest.raises(MessageError):
        template.extend([5, 6], [said("q"), answered("a")], [MALFORMED[case]])
