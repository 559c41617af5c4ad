"""What a policy writes as a call is what the tool gets, character for character: in batches, in every input mode."""

from __future__ import annotations

import pytest
import torch
from conftest import corpus_tokenizer
from tensordict import TensorDict
from torchrl.modules.llm.policies import Tokens

from torchrl_chat import ChatEnv, ChatTemplate, columns
from torchrl_chat.tools import ArgumentsError, Tool, Toolbox
from torchrl_chat.transforms import ToolExecutor

CODER, GLM, BARE_QUOTES, HARMONY = "lc_Qwen3-Coder", "lc_GLM-4.6", "lc_LFM2.5-8B-A1B", "lc_openai-gpt-oss-120b"
TREE, HERMES = "lc_MiniMax-M3", "lc_Qwen-Qwen3-0.6B"
TEXTS = ("3.10", "null", "[1, 2 ]", 'it\'s "so"\n\\n', '{\n  "n": 1.0\n}\n', "")


def save(text: str, note: str | None = None, times: int = 1) -> str:
    """Keeps a text."""
    return repr((text, note, times))


def stepped(name: str, mode: str, texts: list[str], reasons: list[str], by_text: bool = False) -> TensorDict:
    """A batch in which the policy has written these texts, the tools run."""
    tools = Toolbox([save], deadline=5.0)
    env = ChatEnv(
        tokenizer=corpus_tokenizer(name),
        input_mode=mode,
        batch_size=(len(texts),),
        template_kwargs={"tools": tools.schemas},
    ).append_transform(ToolExecutor(tools))
    td = env.reset(TensorDict(query=["go"] * len(texts), batch_size=env.batch_size))
    if mode == "text":
        td["text"] = columns.texts("response", texts, env.batch_size, None)
    if mode == "history":
        rows = [columns.history_messages([{"role": "assistant", "content": text}]) for text in texts]
        td["history"] = columns.histories("response", rows, env.batch_size, None)
    if not by_text:
        ids = map(torch.tensor, env.base_env.template.codec.encode(texts))
        td["tokens"] = columns.ragged(Tokens, "response", list(ids), env.batch_size, None)
    td["finish_reason"] = columns.objects(reasons, env.batch_size, None)
    return env.step(td)["next"]


def results(td: TensorDict) -> list[list[str]]:
    """What the tools answered in each row."""
    ledgers = columns.read_objects(td["transcript"], td.batch_size)
    return [[m["content"] for m in ledger.messages if m["role"] == "tool"] for ledger in ledgers]


@pytest.mark.parametrize("name", [CODER, GLM, BARE_QUOTES])
def test_the_tool_gets_what_was_written(name, mode):
    template = ChatTemplate(corpus_tokenizer(name), tools=Toolbox([save]).schemas)
    texts = [template.call_text("save", {"text": text, "note": None, "times": 2}) for text in TEXTS]
    # The engine has taken away the token that ended each turn, and nothing but the words of it may have come.
    seen = results(stepped(name, mode, texts, ["stop"] * len(texts), by_text=mode == "text"))
    assert seen == [[repr((text, None, 2))] for text in TEXTS]


def test_what_the_engine_took_is_in_the_ledger_and_not_sampled(mode):
    template = ChatTemplate(corpus_tokenizer(CODER), tools=Toolbox([save]).schemas)
    whole = template.call_text("save", {"text": "x"})
    cut = whole.removesuffix("</tool_call>")
    ended, unclosed = stepped(
        CODER, mode, [whole, cut.removesuffix("</function>\n")], ["tool_calls", "length"]
    ).unbind(0)
    taken, longer = stepped(CODER, mode, [cut, cut], ["stop", "length"]).unbind(0)
    assert results(torch.stack([ended, taken, longer])) == [[repr(("x", None, 1))]] * 3
    texts = [template.codec.decode([td["transcript"].tokens.tolist()])[0] for td in (ended, taken, longer)]
    assert len(set(texts)) == 1, "the same conversation, whoever wrote the end of the call"
    for td, text in ((ended, whole), (taken, cut)):
        ledger = td["transcript"]
        assert template.codec.decode([ledger.tokens[ledger.mask].tolist()])[0] == text
    assert "unclosed" in str(unclosed["transcript"].messages) or "not closed" in str(results(unclosed.unsqueeze(0)))


def test_a_call_on_another_channel_is_run_or_answered(mode):
    good = '<|channel|>analysis to=functions.save <|constrain|>json<|message|>{"text": "3.10"}<|call|>'
    bad = "<|channel|>final to=functions.save<|message|>{oops<|call|>"
    open_header = '<|channel|>commentary to=functions.save <|constrain|>json{"text": "x"}<|call|>'
    seen = stepped(HARMONY, mode, [good, bad, open_header], ["stop"] * 3)
    ledgers = columns.read_objects(seen["transcript"], seen.batch_size)
    assert results(seen)[0] == [repr(("3.10", None, 1))]
    for ledger in ledgers[1:]:
        assert ledger.messages[1]["invalid_tool_calls"][0]["name"] == "save"
        assert "Error" in ledger.messages[2]["content"], "the model is told"


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        (TREE, {"text": "x", "note": None}),  # the template leaves a null out
        (BARE_QUOTES, {"text": "x', note='y"}),  # nothing is escaped: two arguments, as far as anybody can tell
        (BARE_QUOTES, {"text": "it's\n", "note": None, "times": 3}),
        (CODER, {"text": "None", "note": None}),
    ],
)
def test_whatever_can_be_read_can_be_written(name, arguments):
    schema = {"type": "object", "properties": {"text": {"type": "string"}, "note": {"type": ["integer", "null"]}}}
    schema["properties"]["times"] = {"type": "integer"}
    tools = [{"type": "function", "function": {"name": "save", "description": "", "parameters": schema}}]
    template = ChatTemplate(corpus_tokenizer(name), tools=tools)
    written = template.call_text("save", arguments)
    [call] = template.parser.parse(written).calls
    assert (call.name, call.arguments, call.span) == ("save", arguments, (0, len(written)))


def test_a_call_of_a_tool_that_the_template_was_not_told():
    template = ChatTemplate(corpus_tokenizer(CODER), parse_tool_calls=True)
    written = template.call_text("add", {"a": 1, "b": True, "c": [None]})
    [call] = template.parser.parse(written).calls
    assert call.arguments == {"a": "1", "b": "True", "c": "[null]"}


def test_a_string_whose_spelling_is_lost_is_not_made_up():
    tool = Tool(save)
    for value in (3.1, [1], {"a": 1}):
        with pytest.raises(ArgumentsError, match="'text' must be a string"):
            tool.fit({"text": value})
    assert tool.fit({"text": 12, "times": "3"}) == {"text": "12", "times": 3}
    assert Toolbox([save]).run([{"function": {"name": "save", "arguments": '{"text": 3.1}'}}])[0].status != "ok"
