"""Chat templates at random: their features, their Jinja source, a reference in Python, and conversations with them."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field, fields, replace

from conftest import bpe_tokenizer
from hypothesis import strategies as st

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
