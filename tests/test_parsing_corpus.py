"""What real templates write for an assistant turn comes back as the message that they wrote."""

from __future__ import annotations

import functools
import json
import sys

import pytest
from conftest import SHARED, corpus_tokenizer, need_shared

from torchrl_chat.templates.parsing import AnswerParser, CallStatus

pytestmark = pytest.mark.corpus


def corpus_names() -> list[str]:
    """Every template of the corpus, or none where there is no corpus."""
    index = SHARED / "corpus" / "index.json"
    return [entry["template"] for entry in json.loads(index.read_text())] if index.exists() else []


@functools.cache
def rendered_of(name: str) -> Rendered:
    """One template, read once."""
    return Rendered(name)


class Rendered:
    """A template with what it writes, straight from its source; a tokenizer would only add loading time."""

    def __init__(self, name: str):
        folder = str(need_shared("corpus/corpus.py").parent)
        if folder not in sys.path:
            sys.path.insert(0, folder)
        from corpus import INDEX, template
        from transformers.utils.chat_template_utils import render_jinja_template

        entry, self.source = INDEX[name], template(name)
        fixed = {
            "bos_token": entry["bos"] or "",
            "eos_token": entry["eos"] or "",
            **(entry["template_kwargs"] or {}),
        }

        def write(*messages, prompt=False):
            texts, _ = render_jinja_template(
                [list(messages)], chat_template=self.source, add_generation_prompt=prompt, **fixed
            )
            return texts[0]

        self.write = write
        self.parser = AnswerParser(self.source)
        self.user = {"role": "user", "content": "Hi"}
        self.prompt = write(self.user, prompt=True)

    def turn(self, **message) -> tuple[str, bool]:
        """What the template writes for an assistant turn, and whether the prompt has opened its reasoning."""
        text = self.write(self.user, {"role": "assistant", "content": "", **message})
        plain = self.write(self.user, {"role": "assistant", "content": "XYZ"})
        text = text.removesuffix(plain.rpartition("XYZ")[2])
        if text.startswith(self.prompt):
            return text[len(self.prompt) :], self.parser.opened_by(self.prompt)
        bases = [self.prompt]
        for pair in self.parser.pairs:
            bases += [b.rstrip().removesuffix(pair.close).rstrip().removesuffix(pair.open) for b in bases]
        for opening in self.parser.openings:
            bases.append(self.prompt.rstrip().removesuffix(opening.rstrip()))
        base = max((b for b in bases if text.startswith(b)), key=len)
        return text[len(base) :], False


def called(*arguments):
    return [
        {"id": f"abcdefgh{i}", "type": "function", "function": {"name": "get_weather", "arguments": a}}
        for i, a in enumerate(arguments)
    ]


@pytest.mark.corpus
@pytest.mark.parametrize("name", corpus_names())
@pytest.mark.parametrize("wanted", [({"city": "Paris"},), ({"city": "Paris"}, {"city": "Rome", "n": 3})])
def test_calls_of_real_templates_round_trip(name, wanted):
    rendered = rendered_of(name)
    for form in (dict, json.dumps):
        try:
            text, opened = rendered.turn(tool_calls=called(*map(form, wanted)))
        except Exception as error:
            reason = f"does not render: {error}"
            continue
        if text.count("get_weather") < len(wanted):
            reason = "does not write these calls"
            continue
        answer = rendered.parser.parse(text, opened)
        assert [(c.name, c.arguments, c.status) for c in answer.calls] == [
            ("get_weather", a, CallStatus.OK) for a in wanted
        ], text
        assert "get_weather" not in answer.content
        return
    pytest.skip(reason)


@pytest.mark.corpus
@pytest.mark.parametrize("name", corpus_names())
def test_reasoning_of_real_templates_round_trips(name):
    rendered = rendered_of(name)
    for key in ("reasoning_content", "reasoning", "thinking"):
        try:
            text, opened = rendered.turn(content="THE\n\nANSWER", **{key: "SOME\n\nREASONS"})
        except Exception:
            continue
        if "REASONS" not in text:
            continue
        if "[BEGIN FINAL RESPONSE]" in text:  # written without the opening that the prompt has
            opened = rendered.parser.opened_by(rendered.prompt)
        answer = rendered.parser.parse(text, opened)
        assert (answer.reasoning, answer.content.strip()) == ("SOME\n\nREASONS", "THE\n\nANSWER"), text
        return
    pytest.skip("writes no reasoning")


@pytest.mark.corpus
def test_a_real_tokenizers_own_facts():
    tokenizer = corpus_tokenizer("lc_Qwen-Qwen2.5-7B-Instruct")
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    parser = AnswerParser(tokenizer.chat_template, added)
    assert parser.parse('<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>').calls[0].name == "f"
    assert parser.parse("<think>R</think>A").reasoning is None
