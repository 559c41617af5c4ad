"""What real templates write for an assistant turn comes back as the message that they wrote."""

from __future__ import annotations

import contextlib
import json
import sys

import pytest
from conftest import all_corpus, corpus_tokenizer, need_shared, while_of_one_template

from torchrl_chat.templates.parsing import AnswerParser, CallStatus
from torchrl_chat.templates.values import Values, same

pytestmark = pytest.mark.corpus


@while_of_one_template
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
        self.user = {"role": "user", "content": "Hi"}
        self.parser = AnswerParser(self.source, write=self.called)
        self.prompt = write(self.user, prompt=True)

    def called(self, arguments: dict) -> str:
        """A conversation that ends with a call of ``lookup``; "" if the template refuses it."""
        for form in (dict, json.dumps):
            function = {"name": "lookup", "arguments": form(arguments)}
            calls = [{"id": "abcdefgh0", "type": "function", "function": function}]
            with contextlib.suppress(Exception):
                return self.write(self.user, {"role": "assistant", "content": "", "tool_calls": calls})
        return ""

    def values(self, parameters: dict, name: str = "get_weather") -> Values:
        """What reads the arguments of a tool with these parameters."""
        return Values([{"name": name, "parameters": parameters}], lambda: self.parser.values.manner)

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


WEATHER = {"properties": {"city": {"type": "string"}, "n": {"type": "integer"}}}


def called(*arguments):
    return [
        {"id": f"abcdefgh{i}", "type": "function", "function": {"name": "get_weather", "arguments": a}}
        for i, a in enumerate(arguments)
    ]


@pytest.mark.parametrize("name", all_corpus())
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
        answer = rendered.parser.parse(text, opened, rendered.values(WEATHER))
        assert [(c.name, c.arguments, c.status) for c in answer.calls] == [
            ("get_weather", a, CallStatus.OK) for a in wanted
        ], text
        assert "get_weather" not in answer.content
        return
    pytest.skip(reason)


STRING, INTEGER, NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}
MIXED = {"type": "array", "items": {"anyOf": [INTEGER, {"type": "boolean"}, STRING]}}
NESTED = {
    "properties": {"n": NUMBER, "s": STRING, "l": {"type": "array", "items": STRING}, "o": {"type": "object"}}
}
VALUES = {
    "words": ("Oslo, Norway", STRING),
    "nothing": ("", STRING),
    "a version": ("3.10", STRING),
    "an exponent": ("1e3", STRING),
    "null in letters": ("null", STRING),
    "None in letters": ("None", STRING),
    "True in letters": ("True", STRING),
    "a number in quotes": ('"90210"', STRING),
    "a JSON document": ('{\n  "name": "demo",\n  "private": true,\n  "n": 1.0\n}\n', STRING),
    "a list in letters": ("[1,2 ]", STRING),
    "lines": ("def f():\n    return 1\n", STRING),
    "blank lines": ("\n\n a \n\n", STRING),
    "blanks": (" \t x ", STRING),
    "quotes and backslashes": ("it's \"so\", C:\\new\\table \\' \\\" 'q'", STRING),
    "other scripts": ("naïve — 北京 🎉 \u2028 é", STRING),
    "markup": ("<b>x</b> & {{ y }} {% z %} </p>", STRING),
    "an integer": (-3, INTEGER),
    "a large integer": (2**70, INTEGER),
    "a float": (1e3, NUMBER),
    "a small float": (-2.5e-7, NUMBER),
    "a large float": (1.5e300, NUMBER),
    "true": (True, {"type": "boolean"}),
    "false": (False, {"type": ["boolean", "string"]}),
    "null": (None, {"type": ["integer", "null"]}),
    "null beside strings": (None, {"anyOf": [STRING, {"type": "null"}]}),
    "a list": ([1, True, "x y", -7], MIXED),
    "a list of strings": (["1", "null", "it's\n"], {"$ref": "#/$defs/words"}),
    "an object": ({"n": 1.5, "s": "2", "l": ["a"], "o": {}}, {"type": "object", **NESTED}),
    "an empty list": ([], {"type": "array"}),
    "a choice": ("2", {"enum": ["1", "2"]}),
    "a number of a union": (7, {"anyOf": [INTEGER, STRING]}),
    "a string of a union": ("7a", {"anyOf": [INTEGER, STRING]}),
    "nothing said": ("3.10", {}),
}
SCHEMA = {
    "type": "object",
    "properties": {"q": {}, "last": STRING},
    "$defs": {"words": {"type": "array", "items": STRING}},
}


def read_back(name: str, kind: str) -> tuple[dict, dict | None, str]:
    """What was written, what is read back, and why there is nothing to be read."""
    value, schema = VALUES[kind]
    arguments = {"q": value, "last": "x"}
    parameters = {**SCHEMA, "properties": {"q": schema, "last": STRING}}
    rendered, reason = rendered_of(name), ""
    for form in (dict, json.dumps):
        try:
            text, opened = rendered.turn(tool_calls=called(form(arguments)))
        except Exception as error:
            reason = f"refuses: {error}"
            continue
        if "get_weather" in text:
            [call] = rendered.parser.parse(text, opened, rendered.values(parameters)).calls
            assert call.status is CallStatus.OK, text
            return arguments, call.arguments, ""
        reason = "writes no calls"
    return arguments, None, reason


@pytest.mark.parametrize("name", all_corpus())
def test_every_kind_of_value_comes_back_or_the_template_writes_two_alike(name, record_property):
    """What is not read back is told apart by nobody: the template writes the very same text for what was read."""
    refused = {}
    for kind in VALUES:
        wanted, found, reason = read_back(name, kind)
        if found is not None and same(found, wanted):
            continue
        if found is not None:
            rendered = rendered_of(name)
            assert rendered.called(found) == rendered.called(wanted), (kind, wanted, found)
            reason = f"writes {wanted['q']!r} like {found.get('q', 'nothing')!r}"
        refused[kind] = reason
    by_reason: dict[str, list[str]] = {}
    for kind, reason in refused.items():
        by_reason.setdefault(reason, []).append("all" if len(refused) == len(VALUES) else kind)
    shown = "; ".join(f"{', '.join(dict.fromkeys(kinds))}: {reason}" for reason, kinds in by_reason.items())
    record_property("refused", shown)
    print(f"{name}: {shown or 'every kind comes back'}")
    if "lookup" in rendered_of(name).called({"q": "x"}):
        assert set(refused) <= {"null", "null beside strings"}, "a template that writes calls writes the rest"


@pytest.mark.parametrize("name", all_corpus())
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


def test_a_real_tokenizers_own_facts():
    tokenizer = corpus_tokenizer("lc_Qwen-Qwen2.5-7B-Instruct")
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    parser = AnswerParser(tokenizer.chat_template, added)
    assert parser.parse('<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>').calls[0].name == "f"
    assert parser.parse("<think>R</think>A").reasoning is None
