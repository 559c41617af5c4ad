"""What a policy samples and what follows it, cut out of a corpus template's own rendering: material for tests."""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass, field

from conftest import corpus_tokenizer, while_of_one_template

from torchrl_chat import ChatEnv
from torchrl_chat.templates.bridge import shared_prefix

REASONING = {"reasoning_content", "reasoning", "thinking"}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"name": "get_weather", "description": "Current weather of a city.", "parameters": PARAMETERS}
TOOL = {"type": "function", "function": WEATHER}
SYSTEM = {"role": "system", "content": "SYSQ7 be brief."}
ASKED = {"role": "user", "content": "USERQ7 what is the weather?"}


@while_of_one_template
def tools_of(name: str) -> list[dict]:
    """The tools, or none for a template that cannot render them."""
    return [TOOL] if rendering(name).safe([ASKED], True, tools=[TOOL])[0] else []


@while_of_one_template
def env_of(name: str, mode: str, rows: int) -> ChatEnv:
    kwargs = {"tools": tools} if (tools := tools_of(name)) else {}
    tokenizer = corpus_tokenizer(name)
    env = ChatEnv(input_mode=mode, tokenizer=tokenizer, batch_size=(rows,), template_kwargs=kwargs)
    if (mode, rows) != ("tokens", 1):
        env.template = env_of(name, "tokens", 1).template  # a template that tells the time would be proved again
    return env


@while_of_one_template
def rendering(name: str):
    """The template's own rendering, in whichever form it reads content."""
    tokenizer = corpus_tokenizer(name)  # which puts the corpus on the path
    from render import R

    return R(tokenizer)


@while_of_one_template
def raw(name: str):
    """The template's own rendering; "" where it raises."""
    kwargs = {"tools": tools} if (tools := tools_of(name)) else {}
    return lambda messages, prompt=False: rendering(name).safe(messages, prompt, **kwargs)[0] or ""


def said(content: str, **more) -> dict:
    return {"role": "assistant", "content": content, **more}


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def calls(name: str, *cities: str, ids: tuple = ()) -> list[dict]:
    """Calls in the form that the template reads: arguments as an object or as a string."""
    ids = ids or tuple(f"{city.lower():0<9}" for city in cities)  # nine letters: some templates insist
    made = [{"city": city} for city in cities]
    if not reads_objects(name):
        made = [json.dumps(arguments) for arguments in made]
    functions = [{"name": "get_weather", "arguments": arguments} for arguments in made]
    return [{"id": i, "type": "function", "function": f} for i, f in zip(ids, functions, strict=False)]


@while_of_one_template
def reads_objects(name: str) -> bool:
    function = {"name": "get_weather", "arguments": {"city": "ARGQ7"}}
    call = {"id": "abcdefgh0", "type": "function", "function": function}
    return "ARGQ7" in raw(name)([ASKED, said("", tool_calls=[call])])


def results(message: dict, *texts: str) -> list[dict]:
    """The tool's answers to the calls of a message."""
    ids = [call.get("id") or "abcdefgh0" for call in message.get("tool_calls", ())]
    ids += [f"abcdefgh{i}" for i in range(len(ids), len(texts))]
    return [
        {"role": "tool", "content": text, "tool_call_id": i, "name": "get_weather"}
        for i, text in zip(ids, texts, strict=False)
    ]


def written(name: str, messages: list[dict]) -> bool:
    """Whether the template writes all of these messages, in order."""
    text, at = raw(name)(messages, True), 0
    for message in messages:
        for content in [message["content"].strip(), *re.findall(r"ARGQ7\w*", json.dumps(message))]:
            at = text.find(content, at)
            if at < 0 or not text:
                return False
    return True


def turn(name: str, **message) -> tuple[str, str] | None:
    """What a policy samples for this message: the text, and the token that ends the turn ("" if none does).

    It is what the template writes behind the generation prompt; where the prompt opens a reasoning that the
    history leaves out, the reasoning is closed first.
    """
    prompt, text = raw(name)([ASKED], True), raw(name)([ASKED, {**said(""), **message}])
    wanted = re.findall(r"[A-Z]+Q7\w*", json.dumps(message))
    if not text or any(word not in text for word in wanted):
        return None
    if text.startswith(prompt):
        body = text[len(prompt) :]
    else:
        tokens = one_of_added(name)
        shared = shared_prefix([prompt, text])
        ends = [m.end() for m in tokens.finditer(text) if m.end() <= len(shared)] + [shared.rfind("\n") + 1]
        body = text[max(ends) :]
    pairs = [
        p for p in env_of(name, "tokens", 1).template.parser.pairs if prompt.rstrip().endswith(p.open.rstrip())
    ]
    if pairs and pairs[0].close not in body:
        body = f"let me see\n{pairs[0].close}\n\n{body}"
    end = re.search(rf"({one_of_added(name, True).pattern})\s*$", body)
    after_content = raw(name)([ASKED, said("XYZ")]).rpartition("XYZ")[2]
    if end is None:  # the next message's opener ends the turn, or text does
        close = env_of(name, "tokens", 1).template.close([ASKED, {**said(""), **message}])
        token = env_of(name, "tokens", 1).template.codec.control_texts.get(next(iter(close.main), None), "")
        return body.removesuffix(after_content), token
    return body[: end.start()], end[1]


@while_of_one_template
def one_of_added(name: str, special: bool = False) -> re.Pattern:
    tokens = corpus_tokenizer(name).added_tokens_decoder.values()
    texts = sorted((t.content for t in tokens if t.special or not special), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts)))


def ids_of(name: str, text: str, seed: int) -> list[int]:
    """Ids that no tokenizer would choose for this text; control tokens stay whole."""
    import exactness

    tokenizer = corpus_tokenizer(name)
    ids, _ = exactness.scramble(tokenizer, exactness.encode_continuation(tokenizer, text), random.Random(seed))
    return ids


# ---------------------------------------------------------------------- conversations
@dataclass
class Turn:
    """One answer that a policy samples, and what follows it."""

    kind: str
    ids: list[int]
    stop: int | None
    follow: tuple[str, ...] = ()  # contents of the new messages: of the tool if their names begin with TOOL
    message: dict = field(default_factory=dict)  # what the answer is, as far as that is known

    def new(self, answer: dict) -> list[dict]:
        tools = [text for text in self.follow if text.startswith("TOOL")]
        return results(answer, *tools) + [user(text) for text in self.follow[len(tools) :]]


def make(name: str, kind: str, k: int, follow: tuple[str, ...]) -> Turn | None:
    """A turn of this kind; ``None`` if the template has no calls, a plain one if it writes no reasoning."""
    content = f"SAIDQ7{k} 1,234 cafés — 北京."
    options = {
        "call": [{"tool_calls": calls(name, f"ARGQ7{k}")}],
        "calls": [{"tool_calls": calls(name, f"ARGQ7{k}", f"ARGQ7{k}b")}],
        "think": [{"content": content, key: f"WHYQ7{k} so"} for key in sorted(REASONING)] + [{"content": content}],
    }.get(kind, [{"content": content}])
    message, cut = next(((m, t) for m in options if (t := turn(name, **m))), (None, None))
    if cut is None or message is None or ("tool_calls" in message and not tools_of(name)):
        return None
    text, token = cut
    tokenizer = corpus_tokenizer(name)
    stop = tokenizer.convert_tokens_to_ids(token) if token else tokenizer.eos_token_id
    ids = ids_of(name, text, k)
    if kind == "cut":
        return Turn(kind, ids[: len(ids) // 2 + 1], None, follow)
    if kind == "empty":
        return Turn(kind, [stop], stop, follow, {"content": ""})
    return Turn(kind, [*ids, stop], stop, follow, message)


ROWS = {
    "plain": [("plain", "USERQ7a"), ("think", "USERQ7b"), ("plain", "  USERQ7c \n"), ("plain", "USERQ7d")],
    "cut": [("cut", "USERQ7a"), ("empty", "USERQ7b"), ("cut", "USERQ7c"), ("plain", "USERQ7d")],
    "call": [("call", "TOOLQ7a 22C"), ("plain", "USERQ7b"), ("call", "TOOLQ7c"), ("call", "TOOLQ7d")],
    "calls": [("calls", "TOOLQ7a", "TOOLQ7b"), ("think", "USERQ7c"), ("cut", "USERQ7d"), ("plain", "USERQ7e")],
    "both": [("call", "TOOLQ7a", "USERQ7b"), ("plain", "USERQ7c"), ("empty", "USERQ7d"), ("plain", "USERQ7e")],
    "uncalled": [("plain", "TOOLQ7a"), ("plain", "USERQ7b"), ("plain", "USERQ7c"), ("plain", "USERQ7d")],
}


@while_of_one_template
def row(name: str, which: str) -> tuple[list[dict], list[Turn], int | None] | None:
    """A conversation: its start, its turns, and the first turn behind which the template refuses what follows.

    ``None`` if the template refuses its start, or has no such turns.
    """
    start = [SYSTEM, ASKED] if which == "cut" and written(name, [SYSTEM, ASKED]) else [ASKED]
    turns = [make(name, kind, k, tuple(follow)) for k, (kind, *follow) in enumerate(ROWS[which])]
    if None in turns or not raw(name)(start, True):
        return None
    messages = list(start)
    for k, each in enumerate(turns):
        answer = {**said("" if each.message.get("tool_calls") else "CUTQ7"), **each.message}
        new = each.new(answer)
        text = raw(name)([*messages, answer, *new], True)
        places = [text.find(message["content"].strip()) for message in new]
        if not text or -1 in places or places != sorted(places):
            return start, turns, k
        messages += [answer, *new]
    return start, turns, None


def adapted(name: str, message: dict) -> dict:
    """A message of the ledger in the form that the template reads."""
    if not message.get("tool_calls") or reads_objects(name):
        return message
    made = [
        {**c, "function": {**c["function"], "arguments": json.dumps(c["function"]["arguments"])}}
        for c in message["tool_calls"]
    ]
    return {**message, "tool_calls": made}


def refuses_calls(name: str) -> bool:
    """Whether what follows a call's arguments is its id, which differs from call to call."""
    texts = [
        raw(name)([ASKED, said("", tool_calls=calls(name, "ARGQ7", ids=(i,)))]) for i in ("abcdefgh0", "hgfedcba9")
    ]
    return len({text.rpartition("ARGQ7")[2] for text in texts}) > 1
