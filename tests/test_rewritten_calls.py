"""History policy ``"template"``: turns with calls of several arguments of several types, with reasoning and without.

On every template of the corpus that writes calls: what the policy sampled is the template's own text, the past is what
the template writes once the result follows, and no sampled id is another.
"""

from __future__ import annotations

import json

import pytest
import torch
from conftest import all_corpus, bpe_tokenizer, corpus_tokenizer, while_of_one_template
from tensordict import TensorDict
from torchrl.modules.llm.policies import Tokens

from torchrl_chat import BridgeError, ChatEnv, ChatTemplate, columns
from torchrl_chat.audit.samples import Sample, sample
from torchrl_chat.templates.kinds import Course
from torchrl_chat.templates.rewriting import Span

KINDS = {
    "city": "string",
    "days": "integer",
    "exact": "boolean",
    "tags": "array",
    "more": "object",
    "share": "number",
}
PROPERTIES = {name: {"type": kind} for name, kind in KINDS.items()}
FUNCTION = {
    "name": "forecast",
    "description": "A forecast.",
    "parameters": {"type": "object", "properties": PROPERTIES, "required": []},
}
TOOLS = [{"type": "function", "function": FUNCTION}]
ARGUMENTS = (
    {"city": "Bergen", "days": 2},
    {"days": 12, "exact": True, "city": "Ny-Ålesund 北"},
    {"tags": ["wind", "rain"], "more": {"unit": ["K"]}, "share": 0.25},
)
ASKED = {"role": "user", "content": "what will it be like?"}
REASON = "The user asks for a forecast."


def answer_of(arguments: dict, reason: str | None, count: int = 1) -> dict:
    function = {"name": "forecast", "arguments": arguments}
    calls = [{"id": f"callnr{i:03d}", "type": "function", "function": function} for i in range(count)]
    answer = {"role": "assistant", "content": "", "tool_calls": calls}
    return answer if reason is None else {**answer, "reasoning_content": reason}


def results_of(message: dict) -> list[dict]:
    return [
        {"role": "tool", "content": f"found {i}", "name": "forecast", "tool_call_id": call["id"]}
        for i, call in enumerate(message["tool_calls"])
    ]


@while_of_one_template
def template_of(name: str) -> ChatTemplate:
    return ChatTemplate(corpus_tokenizer(name), tools=TOOLS)


def sampled(template: ChatTemplate, answer: dict) -> tuple[Sample, Span, list[dict]] | None:
    """A turn as the template writes it, and the message that it is read as; ``None`` if it has no such turn."""
    try:
        turn = sample(template, [ASKED], answer, results_of(answer))
    except ValueError:
        return None
    said = turn.ids[turn.start :]
    [parsed] = template.parse_batch([said], [Course.of([ASKED])], prompts=[turn.ids[: turn.start]])
    message = parsed.message
    functions = [call["function"] for call in message.get("tool_calls", ())]
    if functions != [call["function"] for call in answer["tool_calls"]] or message["content"].strip():
        return None  # templates that write no calls, or none that are read
    if answer.get("reasoning_content", "") not in template.codec.decode([said])[0]:
        return None
    calls = [
        {**read, "id": meant["id"]} for read, meant in zip(message["tool_calls"], answer["tool_calls"], strict=True)
    ]
    message = {**message, "tool_calls": calls}
    return turn, Span(1, turn.start, len(turn.ids), parsed.stop), [ASKED, message]


def unspaced(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("name", all_corpus())
@pytest.mark.by_day(3)
def test_the_past_is_the_templates_own(name):
    template = template_of(name)
    for k, arguments in enumerate(ARGUMENTS):
        for reason, count in ((None, 1 + k % 2), (REASON, 1)):
            made = sampled(template, answer_of(arguments, reason, count))
            if made is None:
                continue
            turn, span, messages = made
            rewritten = template.rewrite(turn.ids, [span], messages, results_of(messages[1]))
            ids, [after] = (turn.ids, [span]) if rewritten is None else rewritten
            kept = ids[after.start : after.end]
            assert turn.ids[span.end - len(kept) : span.end] == kept, "what stays are the sampled ids"
            got = template.codec.decode([ids])[0]
            real = template.renderer.text([*messages, *results_of(messages[1])], True)
            # Behind the answer stands its stop token, for which the template may write another one.
            said, words = unspaced(got), unspaced(template.codec.decode([kept])[0])
            assert words in said
            if '"id"' not in real[len(template.renderer.text([ASKED], False)) :]:
                assert unspaced(real).startswith(
                    said[: len(said) - len(turn.stop and template.codec.token_text(turn.ids[-1]))]
                )


# ---------------------------------------------------------------------- through the environment
QWEN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content and loop.index0 > messages|map(attribute='role')|list|length - 3 %}"
    "{{ '<think>\n' ~ m.reasoning_content ~ '\n</think>\n\n' }}{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '\n' if m.content or not loop.first else '' }}"
    '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments|tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL = '<tool_call>\n{"name": "forecast", "arguments": %s}\n</tool_call>'


def played(texts: list[str], mode: str = "tokens", rounds: int = 1) -> list:
    """Ledgers of a batch that samples these texts in every round, each answered by its results."""
    tokenizer = bpe_tokenizer.__wrapped__(QWEN)
    env = ChatEnv(
        input_mode=mode,
        tokenizer=tokenizer,
        history_policy="template",
        batch_size=(len(texts),),
        template_kwargs={"tools": TOOLS},
    )
    td = env.reset(TensorDict(query=["go"] * len(texts), batch_size=(len(texts),)))
    ids = [torch.tensor(i) for i in env.template.codec.encode([text + "<|im_end|>" for text in texts])]
    for _ in range(rounds):
        td["tokens"] = columns.ragged(Tokens, "response", ids, td.batch_size, None)
        td = env.step_mdp(env.step(td))
        last = [ledger.messages[-1] for ledger in columns.read_objects(td["transcript"], td.batch_size)]
        td = env.append_messages(td, [results_of(message) for message in last])
    ledgers = columns.read_objects(td["transcript"], td.batch_size)
    for ledger, row in zip(ledgers, ids, strict=True):
        trained = [i for sequence in ledger.sequences for i in sequence.tokens[sequence.mask].tolist()]
        assert trained == row.tolist() * rounds, "each sampled id is trained once"
    return [env.template.codec.decode([ledger.tokens.tolist()])[0] for ledger in ledgers]


def test_every_argument_and_type_in_one_batch(mode):
    texts = [
        f"{thought}{CALL % json.dumps(arguments, ensure_ascii=False)}"
        for arguments in (*ARGUMENTS, {})
        for thought in ("", f"<think>\n{REASON}\n</think>\n\n")
    ]
    for text, whole in zip(texts, played(texts, mode, rounds=2), strict=True):
        assert whole.count(text.rpartition("</think>\n\n")[2] + "<|im_end|>\n<|im_start|>tool\nfound 0") == 2
        assert whole.endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize(
    "spelled",
    [
        '{"days":2,  "city": "Bergen"}',
        '{"share": 2.50e-1, "city": "Bergen"}',
        '{"city": "\\u0042ergen", "exact": true}',
        '{"tags": [ "a" ,"b" ], "share": -0.0}',
    ],
)
@pytest.mark.parametrize("thought", ["", f"<think>\n{REASON}\n</think>\n\n"])
def test_a_call_that_the_template_spells_otherwise_stays_as_it_was_sampled(spelled, thought):
    [whole] = played([thought + CALL % spelled], rounds=2)
    assert whole.count((CALL % spelled) + "<|im_end|>\n<|im_start|>tool\nfound 0") == 2


def test_two_calls_of_one_tool():
    text = CALL % '{"days": 1, "city": "A"}' + "\n" + CALL % '{"days": 2, "city": "B"}'
    [whole] = played([f"<think>\n{REASON}\n</think>\n\n{text}"], rounds=2)
    assert whole.count(f"{text}<|im_end|>\n<|im_start|>tool\nfound 0<|im_end|>\n<|im_start|>tool\nfound 1") == 2


def test_words_beside_a_call_must_not_depend_on_its_arguments():
    """What the sentinel in a call's last argument shows beside the call must be what the real call shows there."""
    two_days = "messages[loop.index0 - 1].tool_calls[0].function.arguments.days == 2"
    source = QWEN.replace(
        "{{ m.content }}", f"{{{{ '(two) ' if m.role == 'tool' and {two_days} else '' }}}}{{{{ m.content }}}}"
    )
    template = ChatTemplate(bpe_tokenizer.__wrapped__(source), tools=TOOLS)
    first = template.render([ASKED])
    for days in (2, 3):
        answer = answer_of({"city": "x", "days": days}, None)
        said = template.codec.encode([CALL % json.dumps({"city": "x", "days": days}) + "<|im_end|>"])[0]
        prompt = template.render([ASKED, answer, *results_of(answer)])
        assert prompt[: len(first) + len(said)] == [*first, *said]
        last = template.codec.encode(["well<|im_end|>"])[0]
        spans = [
            Span(1, len(first), len(first) + len(said), said[-1]),
            Span(3, len(prompt), len(prompt) + len(last), last[-1]),
        ]
        messages = [ASKED, answer, *results_of(answer), {"role": "assistant", "content": "well"}]
        arguments = [*prompt, *last], spans, messages, [ASKED]
        if days == 3:
            assert template.rewrite(*arguments) is None
            continue
        with pytest.raises(BridgeError, match="depends on the arguments"):
            template.rewrite(*arguments)


def test_capabilities_try_several_arguments():
    from torchrl_chat.templates.capabilities import CAPABILITIES

    for name in ("tool", "tools", "several"):
        for call in next(m for m in CAPABILITIES[name].messages if "tool_calls" in m)["tool_calls"]:
            assert len({type(value) for value in call["function"]["arguments"].values()}) >= 4
    # A template that cannot write a number is found out.
    source = QWEN.replace(
        "{{ c.function.arguments|tojson }}", "{{ c.function.arguments.values()|join(',', attribute='x.y') }}"
    )
    source = source.replace(
        "c.function.arguments.values()|join(',', attribute='x.y')",
        "'' ~ c.function.arguments.q + c.function.arguments.limit",
    )
    capabilities = ChatTemplate(bpe_tokenizer.__wrapped__(source)).capabilities
    assert capabilities["user"] is None
    assert capabilities["tool"] is not None
