"""Sampled text back to messages: real templates, malformed calls, and any text at all."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_chat.templates.dialects import formats_of, spoken
from torchrl_chat.templates.parsing import AnswerParser, CallStatus, ParsedAnswer, ParsedCall

HERMES = "{{ '<think>\\n' }}{{ '\\n</think>\\n\\n' }}{{ '<tool_call>\\n' }}{{ '\\n</tool_call>' }}"
CODER = "<tool_call>\n<function={{ n }}>\n<parameter={{ k }}>\n{{ v }}\n</parameter>\n</function>\n</tool_call>"
GLM = "<tool_call>{{ n }}\n<arg_key>{{ k }}</arg_key>\n<arg_value>{{ v }}</arg_value>\n</tool_call>"
INVOKE = '<x:tool_call>\n<invoke name="{{ n }}">\n<parameter name="{{ k }}">{{ v }}</parameter>\n</invoke>\n</x:tool_call>'
BRACKETS = "[TOOL_CALLS]{{ calls }}"
BARE = "{{ '{\"name\": ' }}{{ '\"parameters\": ' }}<|python_tag|>"
DEEPSEEK = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{{ n }}<｜tool▁sep｜>{{ a }}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
KIMI = "<|tool_calls_section_begin|><|tool_call_begin|>{{ i }}<|tool_call_argument_begin|>{{ a }}<|tool_call_end|>"
HARMONY = "<|start|>assistant<|channel|>analysis<|message|>{{ r }}<|end|><|channel|>final<|message|>{{ c }}"
PYTHON = "<|tool_call_start|>[{{ calls }}]<|tool_call_end|>"
KEYED = "<|tools_prefix|>{{ calls }}<|tools_suffix|>"
TREE = "]<]minimax[>[<tool_call>{{ c }}]<]minimax[>[</tool_call>"
SEGMENTS = "<|begin|>assistant<|think|>{{ r }}<|end|><|content|>{{ c }}<|tool_calls|><|tool_call:name|><|calls|>"
SOURCES = [HERMES, CODER, GLM, INVOKE, BRACKETS, BARE, DEEPSEEK, KIMI, HARMONY, PYTHON, KEYED, TREE, SEGMENTS]


def tool(**properties) -> list[dict]:
    """The tool ``f`` with these parameters."""
    return [{"type": "function", "function": {"name": "f", "parameters": {"properties": properties}}}]


TOOLS = tool(a={"type": "integer"}, b={"type": "string"})


def one(source: str, text: str, **options) -> ParsedCall:
    """The only call of a text."""
    answer = AnswerParser(source, **options).parse(text)
    assert len(answer.calls) == 1, answer
    return answer.calls[0]


# ---------------------------------------------------------------------- reasoning
@pytest.mark.parametrize(
    ("text", "opened", "reasoning", "content"),
    [
        ("<think>\nR\n</think>\n\nA", False, "R", "A"),
        ("R\n</think>\n\nA", True, "R", "A"),
        ("<think>\n\n</think>\n\nA", False, "", "A"),
        ("<think>\ncut", False, "cut", ""),
        ("cut", True, "cut", ""),
        ("A <think>b</think> c", False, None, "A <think>b</think> c"),
        ("<think>R</think>A <think>b</think>", False, "R", "A <think>b</think>"),
        ("<think>\n\n  R\n\n</think>\n\n\n  A\n", False, "\n  R\n", "\n  A\n"),
        ("A</think>B", False, None, "A</think>B"),
        ("</think>A", False, "", "A"),
        ("", False, None, ""),
    ],
)
def test_reasoning(text, opened, reasoning, content):
    answer = AnswerParser(HERMES).parse(text, opened)
    assert (answer.reasoning, answer.content) == (reasoning, content)


def test_a_template_that_knows_no_reasoning_has_none():
    for opened in (False, True):
        assert AnswerParser("{{ x }}").parse("<think>R</think>A", opened) == ParsedAnswer("<think>R</think>A")
    # A comment is not spoken.
    assert AnswerParser("{# <think></think> #}").parse("<think>R</think>A").reasoning is None


@pytest.mark.parametrize(
    ("source", "text", "reasoning"),
    [
        ("<seed:think></seed:think>", "<seed:think>R</seed:think>A", "R"),
        ("[THINK]{{ r }}[/THINK]", "[THINK]R[/THINK]A", "R"),
        ("<think_fast></think_fast><think></think>", "<think_fast>R</think>S</think_fast>A", "R</think>S"),
        ("<|START_THINKING|>", "<|START_THINKING|>R<|END_THINKING|>A", "R"),
        ("<|inner_prefix|><|inner_suffix|>", "<|inner_prefix|>R<|inner_suffix|>A", "R"),
        (HARMONY, "<|channel|>analysis<|message|>R<|end|><|start|>assistant<|channel|>final<|message|>A", "R"),
        (SEGMENTS, "<|think|>R<|end|><|begin|>assistant<|content|>A", "R"),
    ],
)
def test_other_delimiters(source, text, reasoning):
    answer = AnswerParser(source).parse(text)
    assert (answer.reasoning, answer.content) == (reasoning, "A")


def test_delimiters_put_together_by_the_template_are_known():
    source = "{% set s = ':v2' %}{% set t = '<think{}>'.format(s) %}{{ t ~ r ~ '</think' + s + '>' }}"
    assert "<think:v2>" in spoken(source)
    assert AnswerParser(source).parse("<think:v2>R</think:v2>A").reasoning == "R"
    # Where the source cannot be folded, the tokenizer's own tokens fill in what it begins to spell.
    source = "{{ '<tool_call' ~ suffix ~ '>' }}"
    assert formats_of(spoken(source)) == ()
    assert [row.open for row in formats_of(spoken(source, ["<tool_call:v3>", "<|other|>"]))] == ["<tool_call:v3>"]


def test_a_prompt_that_opens_the_reasoning():
    parser = AnswerParser(HERMES)
    assert parser.opened_by("<|im_start|>assistant\n<think>\n")
    assert not parser.opened_by("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert AnswerParser(HARMONY).opened_by("<|start|>assistant<|channel|>analysis<|message|>")


# ---------------------------------------------------------------------- calls
@pytest.mark.parametrize(
    ("source", "text", "ident"),
    [
        (HERMES, '<tool_call>\n{"name": "f", "arguments": {"a": 1, "b": "x"}}\n</tool_call>', None),
        (HERMES, '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1, \\"b\\": \\"x\\"}"}</tool_call>', None),
        (CODER, "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\nx\n</parameter>\n"
         "</function>\n</tool_call>", None),
        (GLM, "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n<arg_key>b</arg_key>"
         "<arg_value>x</arg_value>\n</tool_call>", None),
        (INVOKE, '<x:tool_call>\n<invoke name="f">\n<parameter name="a">1</parameter>\n'
         '<parameter name="b">x</parameter>\n</invoke>\n</x:tool_call>', None),
        (BRACKETS, '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1, "b": "x"}, "id": "abcdefgh0"}]', "abcdefgh0"),
        (BRACKETS, '[TOOL_CALLS]f[ARGS]{"a": 1, "b": "x"}', None),
        (BRACKETS, '[TOOL_CALLS]f[CALL_ID]abcdefgh0[ARGS]{"a": 1, "b": "x"}', "abcdefgh0"),
        (BARE, ' {"name": "f", "parameters": {"a": 1, "b": "x"}}\n', None),
        (BARE, '<|python_tag|>{"name": "f", "parameters": {"a": 1, "b": "x"}}', None),
        (BARE, '<|python_tag|>f.call(a=1, b="x")', None),
        (DEEPSEEK, '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": 1, "b": "x"}<｜tool▁call▁end｜>'
         "<｜tool▁calls▁end｜>", None),
        (DEEPSEEK, '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"a": 1, "b": "x"}\n'
         "```<｜tool▁call▁end｜><｜tool▁calls▁end｜>", None),
        (KIMI, "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>"
         '{"a": 1, "b": "x"}<|tool_call_end|><|tool_calls_section_end|>', "functions.f:0"),
        (HARMONY, '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1, "b": "x"}<|call|>', None),
        (HARMONY, ' to=functions.f<|channel|>commentary json<|message|>{"a": 1, "b": "x"}', None),
        (PYTHON, "<|tool_call_start|>[f(a=1, b='x')]<|tool_call_end|>", None),
        (KEYED, '<|tools_prefix|>[{"f": {"a": 1, "b": "x"}}]', None),
        (TREE, ']<]minimax[>[<tool_call>\n]<]minimax[>[<invoke name="f">]<]minimax[>[<a>1]<]minimax[>[</a>'
         "]<]minimax[>[<b>x]<]minimax[>[</b>]<]minimax[>[</invoke>\n]<]minimax[>[</tool_call>", None),
    ],
)  # fmt: skip
def test_every_format(source, text, ident):
    call = one(source, text, tools=TOOLS)
    assert (call.name, call.arguments, call.status, call.id) == ("f", {"a": 1, "b": "x"}, CallStatus.OK, ident)
    assert text.strip() == text[slice(*call.span)].strip()
    assert AnswerParser(source).parse(text).content == ""
    assert AnswerParser(source, parse_calls=False).parse(text).calls == ()


@pytest.mark.parametrize(
    ("source", "text", "name", "status"),
    [
        (HERMES, '<tool_call>\n{"name": "f", "arguments": {]}\n</tool_call>', "f", "invalid_json"),
        (HERMES, '<tool_call>\n{"name": "f", "arguments": {}}}\n</tool_call>', "f", "invalid_json"),
        (HERMES, '<tool_call>\n{"name": "f", "arguments": [1]}\n</tool_call>', "f", "invalid_json"),
        (HERMES, '<tool_call>\n{"name": "f", "arguments": {"a": NaN}}\n</tool_call>', "f", "invalid_json"),
        (HERMES, '<tool_call>\n{"name": "f", "arguments": {"a": "\\ud800"}}\n</tool_call>', "f", "invalid_json"),
        (HERMES, '<tool_call>\n{"arguments": {}}\n</tool_call>', None, "missing_name"),
        (HERMES, '<tool_call>\n{"name": 3, "arguments": {}}\n</tool_call>', None, "missing_name"),
        (HERMES, "<tool_call></tool_call>", None, "invalid_json"),
        (HERMES, '<tool_call>\n{"name": "f", "arguments": {}}', "f", "unclosed"),
        (HERMES, '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_', "f", "unclosed"),
        (HERMES, '<tool_call>\n{"name": "f", "argu', "f", "unclosed"),
        (CODER, "<tool_call>\n<function=f>\nstray\n</function>\n</tool_call>", "f", "invalid_json"),
        (CODER, "<tool_call>\n<function=f>\n<parameter=a>\n1\n</para", "f", "unclosed"),
        (CODER, "<tool_call>\n<function=>\n</function>\n</tool_call>", None, "missing_name"),
        (GLM, "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1", "f", "unclosed"),
        (INVOKE, '<x:tool_call>\n<invoke name="f">\n<parameter name="a">1', "f", "unclosed"),
        (INVOKE, "<x:tool_call>\n<invo", None, "unclosed"),
        (BRACKETS, '[TOOL_CALLS][{"name": "f", "arguments": {}}', "f", "unclosed"),
        (BRACKETS, '[TOOL_CALLS]f[ARGS]{"a": ', "f", "unclosed"),
        (BRACKETS, '[TOOL_CALLS]f[ARGS]{"a": oops}', "f", "invalid_json"),
        (BARE, '{"name": "f", "parameters": {"a": ', "f", "unclosed"),
        (BARE, '{"name": "f", "parameters": {"a": oops}}', "f", "invalid_json"),
        (KIMI, "<|tool_calls_section_begin|><|tool_call_begin|>f:0<|tool_call_argument_begin|>{", "f", "unclosed"),
        (HARMONY, '<|channel|>commentary to=functions.f <|message|>{"a": ', "f", "unclosed"),
        (PYTHON, "<|tool_call_start|>[f(1)]<|tool_call_end|>", None, "invalid_json"),
        (PYTHON, "<|tool_call_start|>[f(a=1)]", "f", "unclosed"),
    ],
)
def test_malformed_calls_are_kept(source, text, name, status):
    answer = AnswerParser(source).parse(text)
    assert len(answer.calls) == 1
    call = answer.calls[0]
    assert call.status.value == status
    assert call.name == name
    assert not isinstance(call.arguments, dict) or call.status is CallStatus.MISSING_NAME
    assert text[slice(*call.span)].strip() == text.strip()
    assert text in answer.content, "its raw text stays"
    assert "tool_calls" not in answer.message()


def test_good_and_bad_calls_side_by_side():
    good = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    bad = "<tool_call>\n{oops}\n</tool_call>"
    text = f"Let me see.\n{good}\n{bad}\n{good}"
    answer = AnswerParser(HERMES).parse(text)
    assert [call.status.value for call in answer.calls] == ["ok", "invalid_json", "ok"]
    assert [text[slice(*call.span)] for call in answer.calls] == [good, bad, good]
    assert answer.content == f"Let me see.\n{bad}"
    # A call that was never closed does not swallow the next one.
    answer = AnswerParser(HERMES).parse(f"<tool_call>\n{{oops\n{good}")
    assert [call.status.value for call in answer.calls] == ["unclosed", "ok"]


def test_delimiters_inside_json_strings_are_text():
    arguments = {"code": "</tool_call><tool_call>"}
    call = one(HERMES, f'<tool_call>\n{{"name": "f", "arguments": {json.dumps(arguments)}}}\n</tool_call>')
    assert (call.status, call.arguments) == (CallStatus.OK, arguments)


def test_several_calls_share_their_block():
    text = '[TOOL_CALLS] [{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}] and text'
    answer = AnswerParser(BRACKETS).parse(text)
    assert [call.name for call in answer.calls] == ["f", "g"]
    assert answer.calls[0].span[1] == answer.calls[1].span[0]
    assert answer.content == " and text"


@pytest.mark.parametrize(
    ("raw", "schema", "value"),
    [
        ("\n3\n", {"type": "integer"}, 3),
        ("\n3\n", {"type": "string"}, "3"),
        ("\n3\n", {}, "3"),
        ("\n3.10\n", {"type": "string"}, "3.10"),
        ("\n3.10\n", {"type": "number"}, 3.1),
        ("true", {"type": "boolean"}, True),
        ("True", {"type": "boolean"}, True),
        ("True", {"type": "string"}, "True"),
        ("null", {"type": ["integer", "null"]}, None),
        ("None", {"type": ["integer", "null"]}, None),
        ("null", {"type": "string"}, "null"),
        ("null", {"anyOf": [{"type": "string"}, {"type": "null"}]}, None),
        ("None", {"anyOf": [{"type": "string"}, {"type": "null"}]}, "None"),
        ("[1]", {"type": "array"}, [1]),
        ("[1, None]", {"type": "array"}, [1, None]),
        ("[1]", {"type": "string"}, "[1]"),
        ('["a"]', {"anyOf": [{"type": "array", "items": {"type": "integer"}}, {"type": "string"}]}, '["a"]'),
        ("[ 2 ]", {"anyOf": [{"type": "array", "items": {"type": "integer"}}, {"type": "string"}]}, [2]),
        ("7", {"oneOf": [{"type": "integer"}, {"type": "string"}]}, 7),
        ("07", {"oneOf": [{"type": "integer"}, {"type": "string"}]}, "07"),
        ("7", {"enum": ["7", "8"]}, "7"),
        ("8", {"enum": ["auto", 8]}, 8),
        ("7", {"anyOf": [{"enum": [8]}, {"type": "string"}]}, "7"),
        ("7", {"allOf": [{"$ref": "#/$defs/s"}, {"description": "a string"}]}, "7"),
        ("7", {"$ref": "#/$defs/n"}, 7),
        ('"x"', {"type": "string"}, '"x"'),
        ("\n a\n\n", {"type": "string"}, " a\n"),
        ("NaN", {"type": "number"}, "NaN"),
        ("1e999", {"type": "number"}, "1e999"),
        ("three", {"type": "integer"}, "three"),
        ("3.5", {"type": "integer"}, 3.5),
        ('{"a": 1}', {"$ref": "#/$defs/s"}, '{"a": 1}'),
        ("7", {"$ref": "#/$defs/loop"}, "7"),
        ("7", True, "7"),
        ("7", {"type": 7, "anyOf": "x"}, "7"),
    ],
)
def test_values_of_xml_like_calls(raw, schema, value):
    text = f"<tool_call>\n<function=f>\n<parameter=a>{raw}</parameter>\n</function>\n</tool_call>"
    tools = tool(a=schema)
    loop = {"$ref": "#/$defs/loop"}
    tools[0]["function"]["parameters"]["$defs"] = {"s": {"type": "string"}, "n": {"type": "integer"}, "loop": loop}
    [found] = one(CODER, text, tools=tools).arguments.values()
    assert found == value
    assert type(found) is type(value)


def test_a_value_that_its_format_marks_needs_no_schema():
    def written(said: str, value: str) -> str:
        return f'<x:tool_call><invoke name="f"><parameter name="a" string="{said}">{value}</parameter></invoke></x:tool_call>'

    assert one(INVOKE, written("false", "3")).arguments == {"a": 3}
    assert one(INVOKE, written("true", "3")).arguments == {"a": "3"}
    either = tool(a={"type": ["integer", "string"]})
    assert one(INVOKE, written("true", "3"), tools=either).arguments == {"a": "3"}
    assert one(INVOKE, written("false", "3"), tools=either).arguments == {"a": 3}
    assert one(INVOKE, written("false", "3.10"), tools=tool(a={"type": "string"})).arguments == {"a": "3.10"}


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (HERMES, '<tool_call>{"name": "f", "arguments": {"b": 1, "a": [3.10,  null]}}</tool_call>'),
        (HERMES, '<tool_call>{"function": {"name": "f", "arguments": {"a": [3.10,  null]}}}</tool_call>'),
        (KEYED, '<|tools_prefix|>[{"f": {"a": [3.10,  null]}}]<|tools_suffix|>'),
        (BRACKETS, '[TOOL_CALLS]f[ARGS]{"a": [3.10,  null]}'),
        (BARE, '{"name": "f", "parameters": {"a": [3.10,  null]}}'),
        (HARMONY, '<|channel|>commentary to=functions.f<|message|>{"a": [3.10,  null]}<|call|>'),
        (PYTHON, "<|tool_call_start|>[f(b=1, a=[3.10,  null] )]<|tool_call_end|>"),
    ],
)
def test_a_string_without_its_quotes_is_what_was_written(source, text):
    assert one(source, text, tools=tool(a={"type": "string"})).arguments["a"] == "[3.10,  null]"
    assert one(source, text, tools=tool(a={"type": "array"})).arguments["a"] == [3.1, None]
    assert one(source, text).arguments["a"] == [3.1, None]


def test_nested_elements_become_objects_and_lists():
    m = "]<]minimax[>["
    inside = f"{m}<a>{m}<item>1{m}</item>{m}<item>{m}<b>x{m}</b>{m}</item>{m}</a>"
    text = f'{m}<tool_call>\n{m}<invoke name="f">{inside}{m}</invoke>\n{m}</tool_call>'
    assert one(TREE, text).arguments == {"a": ["1", {"b": "x"}]}
    item = {"anyOf": [{"type": "integer"}, {"type": "object"}]}
    assert one(TREE, text, tools=tool(a={"type": "array", "items": item})).arguments == {"a": [1, {"b": "x"}]}
    assert one(TREE, text, tools=tool(a={"type": "string"})).arguments == {"a": inside[len(m) + 3 : -len(m) - 4]}


def test_an_answer_that_only_looks_like_a_bare_call():
    for text in ('{"name": "Bob", "age": 3}', '{"name": "f", "parameters": {}} is how', 'So: {"name": "f"}'):
        assert AnswerParser(BARE).parse(text) == ParsedAnswer(text)
    text = '{"name": "f", "parameters": {}}'  # a template that does not write calls so
    assert AnswerParser(HERMES).parse(text) == ParsedAnswer(text)


def test_messages():
    text = '<tool_call>{"name": "f"}</tool_call><tool_call>{"nome": "g"}</tool_call>'
    answer = AnswerParser(HERMES).parse("<think>R</think>" + text)
    assert [call.status for call in answer.calls] == [CallStatus.OK, CallStatus.MISSING_NAME]
    message = answer.message()
    assert message["reasoning_content"] == "R"
    assert message["content"] == '<tool_call>{"nome": "g"}</tool_call>'
    assert [call["function"] for call in message["tool_calls"]] == [{"name": "f", "arguments": {}}]
    assert ParsedAnswer("A").message("model") == {"role": "model", "content": "A"}


def test_a_value_that_is_not_closed_in_a_block_that_is():
    answer = AnswerParser(GLM).parse("<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</tool_call> more")
    [call] = answer.calls
    assert (call.name, call.status, call.span) == ("f", CallStatus.INVALID_JSON, (0, 58))
    assert answer.content == "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</tool_call> more"


def test_calls_inside_the_reasoning_are_reasoning():
    text = '<think>\n<tool_call>{"name": "f"}</tool_call>\n</think>\n\nA'
    assert AnswerParser(HERMES).parse(text).calls == ()


@pytest.mark.parametrize(
    "header",
    [
        "<|channel|>commentary to=functions.f <|constrain|>json<|message|>",
        "<|channel|>analysis to=functions.f <|constrain|>json<|message|>",
        "<|channel|>analysis to=f<|message|>",
        "<|channel|>final to=functions.f<|message|>",
        "<|channel|>commentary json to=functions.f<|message|>",
        "<|channel|>commentary <|constrain|>json to=functions.f<|message|>",
        "<|start|>assistant to=functions.f<|channel|>analysis code<|message|>",
        " to=functions.f<|channel|>analysis<|message|>",
        " to=functions.f<|message|>",
    ],
)
@pytest.mark.parametrize("before", ["", "<|channel|>analysis<|message|>R<|end|>"])
def test_a_call_on_any_channel_is_a_call(header, before):
    if before and not header.startswith("<|start|>"):
        header = "<|start|>assistant" + header
    answer = AnswerParser(HARMONY).parse(before + header + '{"a": 1}<|call|>')
    assert [(c.name, c.arguments, c.status) for c in answer.calls] == [("f", {"a": 1}, CallStatus.OK)]
    assert (answer.content, answer.reasoning) == ("", "R" if before else None)
    for body in ("{oops", "print(1)", '"x"'):
        answer = AnswerParser(HARMONY).parse(before + header + body + "<|call|>")
        assert [(c.name, c.arguments, c.status.value) for c in answer.calls] == [("f", body, "invalid_json")]
        assert body in answer.content


@pytest.mark.parametrize(
    "header",
    [
        "<|channel|>commentary to=functions.f <|constrain|>json",
        "<|start|>assistant<|channel|>analysis to=functions.f code",
        " to=functions.f<|channel|>commentary ",
    ],
)
def test_a_call_whose_header_does_not_end_is_visible(header):
    text = header + '{"a": 1}<|call|>'
    answer = AnswerParser(HARMONY).parse("<|channel|>analysis<|message|>R<|end|>" + text)
    assert [(c.name, c.status.value) for c in answer.calls] == [("f", "invalid_json")]
    assert text in answer.content
    assert AnswerParser(HARMONY).parse("Set to=functions.f<|end|>").calls == ()


def test_a_response_template_is_asked_first():
    schema = {
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {
            "thinking": {"open": "<think>", "close": "</think>"},
            "content": {"close": "<|im_end|>"},
            "tool_calls": {
                "open": "<tool_call>", "close": "</tool_call>", "content": "json", "repeats": True,
                "transform": {"type": "function", "function": "{content}"},
            },
        },
    }  # fmt: skip
    parser = AnswerParser(HERMES, schema=schema)
    answer = parser.parse('<think>R</think>A<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>')
    assert (answer.reasoning, answer.content.strip()) == ("R", "A")
    assert (answer.calls[0].name, answer.calls[0].arguments) == ("f", {"a": 1})
    assert parser.parse("R</think>A", opened=True).reasoning == "R"
    # It raises for this one; our own parser keeps the text and reports the call.
    broken = parser.parse("A<tool_call>{oops</tool_call>")
    assert (broken.content, broken.calls[0].status.value) == ("A<tool_call>{oops</tool_call>", "invalid_json")


# ---------------------------------------------------------------------- any text at all
FRAGMENTS = [
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<function=f>", "</function>", "<parameter=a>",
    "</parameter>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "<x:tool_call>", "</x:tool_call>",
    '<invoke name="f">', "</invoke>", '<parameter name="a">', "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>",
    "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<|tool_call_begin|>",
    "<|tool_calls_section_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>", "<|channel|>", "<|message|>",
    "<|start|>", "assistant", " to=functions.f", "<|call|>", "<|end|>", "analysis", "<|tool_call_start|>",
    "<|tool_call_end|>", "<|tools_prefix|>", "<|tools_suffix|>", "]<]minimax[>[", "<tool_calls>", "<|begin|>",
    "<|think|>", "<|content|>", "<|tool_calls|>", '{"name": "f", "arguments": {}}', '{"name": ', '"parameters": {',
    "f(a='x')", "[", "]", "{", "}", ",", '"', "\\", "\n", " ", "x", "é", "null", "\r",
]  # fmt: skip
TEXTS = st.one_of(st.text(max_size=60), st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join))
PARSERS = [AnswerParser(source) for source in SOURCES] + [AnswerParser("".join(SOURCES))]


@settings(max_examples=250, deadline=None)
@given(TEXTS, st.booleans(), st.sampled_from(PARSERS))
def test_no_text_raises_and_spans_are_sound(text, opened, parser):
    answer = parser.parse(text, opened)
    position = 0
    for call in answer.calls:
        assert position <= call.span[0] < call.span[1] <= len(text)
        position = call.span[1]
        assert call.status is not CallStatus.OK or (call.name and isinstance(call.arguments, dict))
        if call.status is not CallStatus.OK:
            assert text[slice(*call.span)].strip("\n") in answer.content
    json.dumps(answer.message())


@settings(max_examples=150, deadline=None)
@given(TEXTS, st.booleans(), st.sampled_from([HERMES, "{{ x }}", "[THINK][/THINK]"]))
def test_reasoning_and_content_lose_nothing(text, opened, source):
    parser = AnswerParser(source, parse_calls=False)
    answer = parser.parse(text, opened)
    rebuilt = answer.content
    if answer.reasoning is not None:
        pair = parser.pairs[0]
        rebuilt = answer.reasoning + answer.content
        begun = text.lstrip()
        if not opened and begun.startswith(pair.open):
            rebuilt = pair.open + rebuilt
        ended = pair.close in (text if opened else begun.removeprefix(pair.open))
        at = len(rebuilt) - len(answer.content)
        rebuilt = rebuilt[:at] + (pair.close if ended else "") + rebuilt[at:]
    assert "".join(rebuilt.split()) == "".join(text.split())


@pytest.mark.parametrize(
    "unit",
    [
        "<tool_call>", "<tool_call>{", '<tool_call>{"', '<tool_call>["', "<tool_call><function=f>", "<function=f>",
        "<tool_call><function=f><parameter=a>", "<tool_call>f<arg_key>a</arg_key><arg_value>", "[TOOL_CALLS]", "[",
        "[TOOL_CALLS]f[ARGS]{", '<x:tool_call><invoke name="f">', "<|tool_call_start|>[f(", "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>f<｜tool▁sep｜>", "<|channel|>analysis<|message|>", "<|start|>assistant", "<|end|>", "(",
        "]<]minimax[>[<tool_call>]<]minimax[>[<invoke name=\"f\">", " ", '{"name": "f", "parameters": {',
    ],
)  # fmt: skip
def test_a_long_text_of_one_delimiter_is_parsed(unit):
    # Ten units first, in every format; then a long text of it, which would not end if it were quadratic.
    for parser in PARSERS:
        parser.parse(unit * 10)
    text = unit * (150_000 // len(unit))
    for parser in PARSERS[-3:]:
        answer = parser.parse(text)
        assert bool(text.strip()) == bool((answer.content + (answer.reasoning or "")).strip())


def test_json_longer_than_any_window_is_read():
    for value in ("x" * 5000, 'é\\"\n' * 999, [1234567] * 2000, {"k": [True, None, -1.5e10] * 400}, 10**3000):
        call = one(HERMES, "<tool_call>" + json.dumps({"name": "f", "arguments": {"a": value}}) + "</tool_call>")
        assert (call.status, call.arguments) == (CallStatus.OK, {"a": value})


def test_a_megabyte_of_opened_calls_is_parsed():
    answer = AnswerParser(HERMES).parse("<tool_call>" * 95_000)
    assert len(answer.calls) == 95_000
