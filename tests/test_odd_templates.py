"""Templates that look where few look: exact or refused, never silently wrong."""

from __future__ import annotations

import contextlib

import pytest
from random_templates import ORDINARY, answered, found, said, source, tokenizer

from torchrl_chat import BridgeError, ChatTemplate, MessageError


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
    template = ChatTemplate(tokenizer(), chat_template=source(ORDINARY))
    with pytest.raises(MessageError):
        template.extend([5, 6], [said("q"), answered("a")], [MALFORMED[case]])
