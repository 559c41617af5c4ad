"""References in the schemas of tools: written out in what the model is told and in what errors say."""

from __future__ import annotations

import copy
import itertools

import pytest
from conftest import all_corpus, corpus_tokenizer

from torchrl_chat import ChatTemplate
from torchrl_chat.schema_references import pointed_to, written_out
from torchrl_chat.schemas import admits
from torchrl_chat.tools import Toolbox
from torchrl_chat.tools.function import ToolBase

QUERY = {
    "type": "object",
    "title": "Query",
    "properties": {
        "phrase": {"type": "string", "description": "What to look for."},
        "at_most": {"type": "integer"},
    },
    "required": ["phrase"],
}
NODE = {
    "type": "object",
    "properties": {"label": {"type": "string"}, "below": {"type": "array", "items": {"$ref": "#/$defs/Node"}}},
}
# name: a schema, and the same with its references written out
SCHEMAS = {
    "in a property": (
        {"type": "object", "properties": {"q": {"$ref": "#/$defs/Query"}}, "$defs": {"Query": QUERY}},
        {"type": "object", "properties": {"q": QUERY}},
    ),
    "a description beside it": (
        {"properties": {"q": {"$ref": "#/$defs/Query", "title": "Mine"}}, "$defs": {"Query": QUERY}},
        {"properties": {"q": {**QUERY, "title": "Mine"}}},
    ),
    "alone in an allOf": (
        {"properties": {"q": {"allOf": [{"$ref": "#/definitions/Query"}], "default": {}}}, "definitions": {"Query": QUERY}},
        {"properties": {"q": {**QUERY, "default": {}}}},
    ),
    "in a union, in a list": (
        {"properties": {"q": {"anyOf": [{"type": "array", "items": {"$ref": "#/$defs/Query"}}, {"type": "null"}]}},
         "$defs": {"Query": QUERY}},
        {"properties": {"q": {"anyOf": [{"type": "array", "items": QUERY}, {"type": "null"}]}}},
    ),
    "one behind the other": (
        {"properties": {"q": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"$ref": "#/$defs/B"}, "B": {"type": "integer"}}},
        {"properties": {"q": {"type": "integer"}}},
    ),
    "a name with a slash and a space": (
        {"properties": {"q": {"$ref": "#/$defs/a~1b%20c"}}, "$defs": {"a/b c": {"type": "boolean"}}},
        {"properties": {"q": {"type": "boolean"}}},
    ),
    "no definition, but another property": (
        {"properties": {"a": {"type": "number"}, "b": {"$ref": "#/properties/a"}}},
        {"properties": {"a": {"type": "number"}, "b": {"type": "number"}}},
    ),
    "a property of that name, a value of that form": (
        {"properties": {"$ref": {"type": "string"}, "x": {"enum": [{"$ref": "#/$defs/X"}]}, "y": {"$ref": "#/$defs/X"}},
         "$defs": {"X": {"type": "null"}}},
        {"properties": {"$ref": {"type": "string"}, "x": {"enum": [{"$ref": "#/$defs/X"}]}, "y": {"type": "null"}}},
    ),
    "one that contains itself": (
        {"properties": {"root": {"$ref": "#/$defs/Node"}}, "$defs": {"Node": NODE, "Query": QUERY}},
        {"properties": {"root": NODE}, "$defs": {"Node": NODE}},
    ),
    "one elsewhere": (
        {"properties": {"q": {"$ref": "https://example.org/q.json"}, "r": {"$ref": "#/$defs/Gone"}}},
        {"properties": {"q": {"$ref": "https://example.org/q.json"}, "r": {"$ref": "#/$defs/Gone"}}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SCHEMAS)
def test_references_are_written_out(case):
    schema, wanted = SCHEMAS[case]
    before = copy.deepcopy(schema)
    assert written_out(schema) == wanted
    assert schema == before
    assert written_out(wanted) == wanted


def test_what_a_schema_allows_stays():
    values = [
        None,
        1,
        2.5,
        True,
        "x",
        {},
        {"phrase": "x"},
        {"phrase": 1},
        {"label": "a", "below": [{"label": "b"}]},
    ]
    values += [[value] for value in values] + [{"label": 1}, {"below": [{"below": [{"label": 7}]}]}]
    read = [schema for case, (schema, _) in SCHEMAS.items() if case != "a name with a slash and a space"]
    for schema, value in itertools.product(read, values):
        for key in schema["properties"]:
            assert admits({key: value}, schema) == admits({key: value}, written_out(schema)), (schema, value)


def test_definitions_that_double_are_left_as_they_are():
    doubling = {f"d{i}": {"properties": {k: {"$ref": f"#/$defs/d{i + 1}"} for k in "ab"}} for i in range(20)}
    schema = {"properties": {"x": {"$ref": "#/$defs/d0"}}, "$defs": {**doubling, "d20": {"type": "string"}}}
    assert written_out(schema) is schema


def test_pointed_to():
    root = {"anyOf": [{"type": "string"}, {"type": "null"}]}
    assert pointed_to(root, "#/anyOf/1") == {"type": "null"}
    assert pointed_to(root, "#") is root
    assert pointed_to(root, "#/anyOf/2") is pointed_to(root, "other.json") is pointed_to(root, "#anchor") is None


class Search(ToolBase):
    """A tool with a schema as pydantic writes it."""

    name, description = "search", "Searches."
    parameters = {
        "type": "object",
        "properties": {
            "query": {"$ref": "#/$defs/Query"},
            "also": {"anyOf": [{"$ref": "#/$defs/Query"}, {"$ref": "#/$defs/Order"}]},
            "order": {"$ref": "#/$defs/Order"},
        },
        "required": ["query"],
        "$defs": {"Query": QUERY, "Order": {"enum": ["new", "old"], "type": "string"}},
    }

    def call(self, arguments, conversation=None, deadline=None):
        return arguments["query"]["phrase"]


def answered(arguments: dict) -> str:
    with Toolbox([Search()]) as tools:
        call = {"id": "c1", "type": "function", "function": {"name": "search", "arguments": arguments}}
        return tools.run([call])[0].message["content"]


def test_errors_name_the_types():
    assert answered({"query": {"phrase": "cold"}}) == "cold"
    said = answered({"phrase": "cold"})
    assert 'search(query: object, also?: object | "new" | "old", order?: "new" | "old")' in said
    assert "'query' is missing (object)" in said
    assert "object" in answered({"query": {"phrase": "x"}, "also": 3}).split("'also'")[1]
    assert "any" not in answered({"query": 3})


@pytest.mark.parametrize("name", all_corpus())
def test_every_template_that_writes_schemas_tells_the_fields(name):
    """What is told of a reference is what is told of the schema itself, by every template, of raw schemas too."""
    tokenizer = corpus_tokenizer(name)
    raw = {
        "type": "function",
        "function": {"name": "search", "description": "Searches.", "parameters": Search.parameters},
    }
    own = {"type": "object", "properties": {"query": QUERY}, "required": ["query"]}
    plain = {"type": "function", "function": {"name": "search", "description": "Searches.", "parameters": own}}
    asked = [{"role": "user", "content": "hi"}]
    try:
        prompt = ChatTemplate(tokenizer, tools=[plain]).renderer.text(asked, True)
    except ValueError:
        prompt = ""
    if "search" not in prompt:  # no schemas, or no such conversation
        return
    for tools in ([raw], [Search().schema]):
        told = ChatTemplate(tokenizer, tools=tools).renderer.text(asked, True)
        assert "$ref" not in told
        for word in ("phrase", "at_most", "What to look for."):
            assert (word in told) >= (word in prompt), word
