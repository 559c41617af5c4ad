"""Tools from functions: their schemas, the arguments of a call, and the execution of whole batches of calls."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import enum
import json
import pickle
import subprocess
import sys
import threading
import time
import warnings
from typing import Annotated, Any, Literal, Optional, TypedDict

import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_chat._loop import LoopThread
from torchrl_chat.schemas import admits
from torchrl_chat.tools import ArgumentsError, Tool, Toolbox, ToolError, ToolStatus, tool
from torchrl_chat.tools.arguments import fit
from torchrl_chat.tools.results import as_text, cut, malformed_text
from torchrl_chat.tools.shapes import shape_of


class Unit(enum.Enum):
    CELSIUS = "C"
    FAHRENHEIT = "F"


@dataclasses.dataclass
class Point:
    x: float
    y: float = 0.0

    def __post_init__(self):
        if self.x < 0:
            raise ValueError("x is negative")


class Place(pydantic.BaseModel):
    name: str
    zone: int = pydantic.Field(0, ge=0, description="Of time.")


class Options(TypedDict, total=False):
    limit: int
    tags: list[str]


def weather(
    city: str,
    unit: Unit = Unit.CELSIUS,
    days: int | None = None,
    near: Optional[Point] = None,  # noqa: UP045
    options: Options | None = None,
) -> str:
    """The weather in a city.

    Looked up nowhere.

    Args:
        city (str): The city,
            in English.
        unit: Of temperatures: C or F.

    Returns:
        Words.
    """
    return f"{city} {unit.name} {days} {near} {options}"


@tool(name="sum", deadline=3.0)
def add(a: int, b: int = 1) -> int:
    """Add."""
    return a + b


def call(name, _id="call00000", **arguments):
    return {"id": _id, "type": "function", "function": {"name": name, "arguments": arguments}}


def run(toolbox, *calls, **more):
    return toolbox.run(list(calls), **more)


@pytest.fixture
def closing():
    boxes = []
    yield lambda *args, **kwargs: boxes.append(Toolbox(*args, **kwargs)) or boxes[-1]
    for box in boxes:
        box.close()


class TestSchema:
    def test_of_a_function(self):
        schema = Tool(weather).schema
        assert json.loads(json.dumps(schema)) == schema
        assert schema["type"] == "function"
        function = schema["function"]
        assert function["name"] == "weather"
        assert function["description"] == "The weather in a city.\n\nLooked up nowhere."
        parameters = function["parameters"]
        assert parameters["required"] == ["city"]
        assert parameters["properties"]["city"] == {"type": "string", "description": "The city, in English."}
        assert parameters["properties"]["unit"] == {
            "type": "string",
            "enum": ["C", "F"],
            "description": "Of temperatures: C or F.",
        }
        assert parameters["properties"]["days"] == {"type": ["integer", "null"]}
        point = parameters["properties"]["near"]["anyOf"][0]
        assert point["required"] == ["x"]
        assert point["properties"]["y"] == {"type": "number"}
        assert parameters["properties"]["options"]["anyOf"][0]["required"] == []

    @pytest.mark.parametrize(
        ("hint", "schema"),
        [
            (int, {"type": "integer"}),
            (float, {"type": "number"}),
            (bool, {"type": "boolean"}),
            (Any, {}),
            (list, {"type": "array"}),
            (
                list[dict[str, bool]],
                {"type": "array", "items": {"type": "object", "additionalProperties": {"type": "boolean"}}},
            ),
            (Literal["a", "b"], {"type": "string", "enum": ["a", "b"]}),
            (Literal["a", 1, None], {"enum": ["a", 1, None]}),
            (Annotated[int, "how many"], {"type": "integer", "description": "how many"}),
            (int | str | None, {"type": ["integer", "string", "null"]}),
            (tuple[int, ...], {"type": "array", "items": {"type": "integer"}}),
        ],
    )
    def test_of_a_hint(self, hint, schema):
        assert shape_of(hint).schema == schema

    def test_what_has_no_schema(self):
        def odd(x: complex):
            pass

        def star(*x):
            pass

        def keys(x: dict[int, str]):
            pass

        def typo(city):
            """T.

            Args:
                town: A place.
            """

        class Tree(TypedDict):
            below: list[Tree]

        for function, match in [
            (odd, "the argument 'x' of odd has the type <class 'complex'>"),
            (star, r"star takes \*x"),
            (keys, "keys of a JSON object are strings"),
            (lambda x: x, "cannot be called '<lambda>'"),
            (typo, "describes 'town', which is no argument of it: it has city"),
        ]:
            with pytest.raises((TypeError, ValueError), match=match):
                Tool(function)
        with pytest.raises(ValueError, match="deadline of the tool weather is -1"):
            Tool(weather, deadline=-1)
        with pytest.raises(TypeError, match="no parameter 'conversation'"):
            Tool(weather, per_conversation=True)

    def test_of_what_else_pydantic_reads(self):
        def meet(at: Place, when: datetime.date, again: list[Place] | None = None):
            return at, when

        it = Tool(meet)
        place = {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "zone": {"type": "integer", "default": 0, "description": "Of time.", "minimum": 0},
            },
            "required": ["name"],
        }
        assert it.parameters["properties"] == {
            "at": place,
            "when": {"type": "string", "format": "date"},
            "again": {"anyOf": [{"type": "array", "items": place}, {"type": "null"}]},
        }
        fitted = it.fit({"at": {"name": "x", "zone": "2"}, "when": "2026-11-29"})
        assert fitted == {"at": Place(name="x", zone=2), "when": datetime.date(2026, 11, 29)}
        with pytest.raises(ArgumentsError, match="'when': Input should be a valid date"):
            it.fit({"at": {"name": "x"}, "when": "17"})  # no number of days
        with pytest.raises(ArgumentsError, match="'at.zone' must be at least 0, not the number -1"):
            it.fit({"at": {"name": "x", "zone": -1}, "when": "2026-11-29"})

    def test_none_keeps_its_place(self):
        assert shape_of(None | int).schema == {"type": ["null", "integer"]}
        assert shape_of(Optional[Unit]).make(None) is None  # noqa: UP045

    def test_the_decorator_leaves_the_function(self):
        with pytest.raises(TypeError, match="deadlin"):
            tool(deadlin=3.0)
        assert add(1, 2) == 3
        assert (Tool(add).name, Tool(add).deadline, Tool(add, name="plus").name) == ("sum", 3.0, "plus")

    @pytest.mark.parametrize("function", [add, weather])
    def test_pickles(self, function):
        copy = pickle.loads(pickle.dumps(Tool(function, deadline=7.0)))
        assert copy.schema == Tool(function).schema
        assert copy.deadline == 7.0

    def test_positional_only_and_more(self):
        def f(a: int, /, b: int = 2, *, c: int = 3, **more: Any):
            return a, b, c, more

        it = Tool(f)
        assert it.call(it.fit({"a": "1", "c": 5, "d": "x"})) == (1, 2, 5, {"d": "x"})


class TestArguments:
    def test_are_converted(self):
        it = Tool(weather)
        arguments = it.fit({"city": 75001, "unit": "F", "days": "3", "near": {"x": 1}, "options": '{"limit": "2"}'})
        assert arguments == {
            "city": "75001",
            "unit": Unit.FAHRENHEIT,
            "days": 3,
            "near": Point(1.0),
            "options": {"limit": 2},
        }
        assert type(arguments["near"].x) is float

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ({}, "'city' is missing (string)"),
            ({"city": None}, "'city' must be a string, not null"),
            ({"city": "x", "unti": "C"}, "'unti' is unknown; did you mean 'unit'?"),
            ({"city": "x", "unit": "K"}, '\'unit\' must be one of "C", "F", not the string "K"'),
            ({"city": "x", "days": "soon"}, "'days' must be integer or null, not the string \"soon\""),
            ({"city": "x", "days": 1.5}, "'days' must be integer or null, not the number 1.5"),
            ({"city": "x", "days": True}, "'days' must be integer or null, not the boolean true"),
            ({"city": "x", "near": {"y": 1}}, "'near.x' is missing (number)"),
            ({"city": "x", "near": {"x": "far"}}, "'near.x' must be a number, not the string \"far\""),
            ({"city": "x", "options": {"tags": ["a", None]}}, "'options.tags[1]' must be a string, not null"),
            ({"city": "x", "near": {"x": -1}}, "x is negative"),
        ],
    )
    def test_faults_say_where_and_what(self, given, said):
        with pytest.raises(ArgumentsError) as caught:
            Tool(weather).fit(given)
        assert caught.value.faults == [said]

    def test_a_value_that_fits_is_not_mended(self):
        assert fit("3", {"type": ["integer", "string"]}) == "3"
        assert fit("null", {"anyOf": [{"type": "null"}, {"type": "string"}]}) == "null"
        assert fit([1, "1"], {"items": {"enum": ["1", 1]}}) == [1, "1"]
        assert fit(True, {"enum": [1, True]}) is True

    def test_references(self):
        tree = {"$ref": "#/$defs/t", "$defs": {"t": {"type": "object", "properties": {"l": {"$ref": "#/$defs/t"}}}}}
        assert fit({"l": {"l": "{}"}}, tree) == {"l": {"l": {}}}
        with pytest.raises(ArgumentsError, match=r"'l.l' must be an object, not the number 3"):
            fit({"l": {"l": 3}}, tree)
        assert fit(3, {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}) == 3

    @pytest.mark.parametrize(
        ("hint", "value"),
        [(bool, "yes"), (bool, 1), (int, 1.5), (int, "1.5"), (float, True), (str, 1.0), (float, 10**400)],
    )
    def test_no_reading_changes_a_value(self, hint, value):
        def take(x):
            return x

        take.__annotations__["x"] = hint
        with pytest.raises(ArgumentsError, match="'x'"):
            Tool(take).fit({"x": value})

    @pytest.mark.parametrize(
        "schema",
        [
            {"type": "any"},
            {"type": 7},
            {"properties": ["x"]},
            {"required": True},
            {"items": [{"type": "null"}], "enum": 3, "anyOf": [5]},
            {"$ref": "https://example.org/x.json"},
            {"$ref": 5, "minItems": "two"},
            {"properties": {"x": {"pattern": "(", "$ref": "#/$defs/gone"}}, "patternProperties": {"(": False}},
            {"$schema": "http://json-schema.org/draft-07/schema#", "$id": 7, "properties": {"x": True}},
        ],
    )
    def test_what_is_no_schema_says_nothing(self, schema):
        for value in ({"x": [1, "a"]}, [1], 3):
            assert fit(value, schema) == value

    def test_hostile_values_end_soon(self):
        two = {"type": "array", "items": {"$ref": "#/$defs/t"}}
        schema = {
            "$ref": "#/$defs/t",
            "$defs": {"t": {"anyOf": [two, {**two, "maxItems": 9}, {"type": "integer"}]}},
        }
        deep: Any = "x"
        for _ in range(40):
            deep = [deep]
        # Were their work exponential or quadratic, this would not end within the time limit of a test.
        with pytest.raises(ArgumentsError, match="too large, or nested too deeply"):
            fit(deep, schema)
        with pytest.raises(ArgumentsError):
            fit({"x": "[" * 100_000}, {"properties": {"x": {"type": "array"}}})
        with pytest.raises(ArgumentsError):
            fit({"x": "9" * 100_000}, {"properties": {"x": {"type": "integer"}}})

    @given(st.data())
    @settings(max_examples=200, deadline=None)
    def test_what_fits_comes_through_and_what_comes_through_fits(self, data):
        hints = st.recursive(
            st.sampled_from([int, float, str, bool, None, Literal["a", 1], Any]),
            lambda inner: st.one_of(
                inner.map(lambda h: list[h]),
                inner.map(lambda h: dict[str, h]),
                st.tuples(inner, inner).map(lambda p: p[0] | p[1] if None not in p and Any not in p else p[0]),
            ),
            max_leaves=4,
        )
        shape = shape_of(data.draw(hints))
        leaves = (
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats(allow_nan=False, allow_infinity=False)
            | st.text()
            | st.sampled_from(["1", "true", "[1]", "{}", "null", "a"])
        )
        value = data.draw(st.recursive(leaves, lambda v: st.lists(v) | st.dictionaries(st.text(), v), max_leaves=8))
        assert admits(value, {})
        fault, fitted = None, None
        try:
            fitted = fit(value, shape.schema)
        except ArgumentsError as error:
            fault = error
        if fault is not None:
            assert fault.faults
            assert not admits(value, shape.schema)
            return
        assert admits(fitted, shape.schema)
        if admits(value, shape.schema):
            assert fitted == value
        shape.make(fitted)


class TestResults:
    @given(st.text(min_size=1, max_size=600), st.integers(64, 300))
    def test_cut(self, text, limit):
        short, left_out = cut(text, limit)
        assert len(short) <= limit
        if len(text) <= limit:
            assert (short, left_out) == (text, 0)
        else:
            head, _, rest = short.partition(f"\n[... {left_out:,} characters left out ...]\n")
            assert text.startswith(head)
            assert text.endswith(rest)
            assert len(head) + left_out + len(rest) == len(text)

    @pytest.mark.parametrize(
        ("value", "text"),
        [
            ("x", "x"),
            (None, "null"),
            ([1, "ä"], '[1, "ä"]'),
            ({"p": Point(1, 2), "u": Unit.CELSIUS, "s": {2, 1}}, '{"p": {"x": 1, "y": 2}, "u": "C", "s": [1, 2]}'),
            ({(1, 2): 3}, "{(1, 2): 3}"),
            (b"x", "\"b'x'\""),
        ],
    )
    def test_text(self, value, text):
        assert as_text(value) == text

    def test_text_of_what_has_none(self):
        loop: list = []
        loop.append(loop)
        assert as_text(loop) == "[[...]]"

    @pytest.mark.parametrize(
        ("bad", "said"),
        [
            ({"name": "f", "arguments": '{"a": 1', "status": "unclosed"}, "it is not closed"),
            (
                {"name": None, "arguments": "{}", "status": "missing_name"},
                "this tool call could not be read: it names no",
            ),
            ({"name": "f", "arguments": '{"a" 1}', "status": "invalid_json"}, "near '{\"a\" 1}'"),
            ({"name": "f", "arguments": "[1]", "status": "invalid_json"}, "its arguments are not a JSON object"),
            (
                {"name": "f", "arguments": [1], "status": "invalid_json"},
                "its arguments are an array, not a JSON object",
            ),
            (
                {"name": "f", "arguments": "<a>", "status": "invalid_json"},
                "not written in the format of a call, near '<a>'",
            ),
        ],
    )
    def test_malformed(self, bad, said):
        text = malformed_text(bad, "FORMAT", "f(a: integer)")
        assert said in text
        assert text.endswith("Nothing was run. Write a call as:\nFORMAT\nThe tool is f(a: integer).")


class TestToolbox:
    def test_every_status(self, closing):
        def fail():
            raise KeyError("k")

        def refuse():
            raise ToolError("not today")

        async def slow():
            await asyncio.sleep(60)

        toolbox = closing([add, fail, refuse, slow], deadline=1.5, call_format="<call>")
        message = {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                call("sum", _id="i1", a="2"),
                call("fail"),
                call("refuse"),
                call("slow"),
                call("sub"),
                call("sum", b=1),
            ],
            "invalid_tool_calls": [
                {"name": "sum", "arguments": "{", "status": "unclosed", "span": [0, 1]},
                {"name": "subtract", "arguments": {}, "status": "unknown_tool", "span": [1, 2]},
            ],
        }
        results = toolbox.run(message)
        assert [result.status.value for result in results] == [
            "ok", "error", "error", "timeout", "unknown_tool", "invalid_arguments", "malformed", "unknown_tool",
        ]  # fmt: skip
        assert results[0].message == {"role": "tool", "tool_call_id": "i1", "name": "sum", "content": "3"}
        assert [result.content for result in results[1:4]] == [
            "Error: KeyError: 'k'",
            "Error: not today",
            "Error: slow did not finish within 1.5 s and was stopped.",
        ]
        assert results[4].content.startswith(
            "Error: there is no tool 'sub'; did you mean 'sum'? The tools are: sum,"
        )
        assert results[5].content == (
            "Error: the arguments do not fit sum(a: integer, b?: integer); nothing was run.\n- 'a' is missing (integer)"
        )
        assert "Write a call as:\n<call>\nThe tool is sum(a: integer, b?: integer)." in results[6].content
        assert toolbox.counts["sum"] == {ToolStatus.OK: 1, ToolStatus.INVALID_ARGUMENTS: 1, ToolStatus.MALFORMED: 1}
        assert toolbox.counts[""] == {ToolStatus.UNKNOWN_TOOL: 2}
        assert sum(toolbox.totals.values()) == len(results)

    def test_odd_rows(self, closing):
        toolbox = closing([add])
        assert toolbox.run_batch([]) == []
        assert toolbox.run_batch([None, [], {"role": "assistant", "content": "x"}]) == [[], [], []]
        odd = [None, 3, {}, {"function": None}, {"function": {"name": 7}}, call(""), call("sum\n<|im_end|>")]
        results = toolbox.run(odd)
        assert [result.status.value for result in results] == ["malformed"] * 6 + ["unknown_tool"]
        assert results[-1].message["name"] == "unknown"  # what the model made up is no header of a message
        arguments = ['{"a": 1}', "", "[1]", "{", [1], None]
        calls = [{"function": {"name": "sum", "arguments": value}} for value in arguments]
        assert [result.status.value for result in toolbox.run(calls)] == ["ok"] + ["invalid_arguments"] * 5

    @given(
        st.lists(
            st.lists(st.sampled_from(["sum", "later", "raise", "exit", "nope", "cut"]), max_size=4), max_size=6
        )
    )
    @settings(max_examples=30, deadline=None)
    def test_no_call_is_lost_and_order_is_kept(self, names):
        with Toolbox(
            [add, later, Tool(boom, name="raise"), Tool(leave, name="exit"), Tool(long, name="cut")],
            max_result_chars=64,
        ) as toolbox:
            rows = [
                [call(name, _id=f"{r}.{i}", **({"a": r} if name == "sum" else {})) for i, name in enumerate(row)]
                for r, row in enumerate(names)
            ]
            results = toolbox.run_batch(rows)
        expected = {
            "sum": "ok",
            "later": "ok",
            "raise": "error",
            "exit": "error",
            "nope": "unknown_tool",
            "cut": "ok",
        }
        for r, row in enumerate(names):
            assert [result.message["tool_call_id"] for result in results[r]] == [
                f"{r}.{i}" for i in range(len(row))
            ]
            assert [result.status.value for result in results[r]] == [expected[name] for name in row]
            for name, result in zip(row, results[r], strict=True):
                assert len(result.content) <= 64
                assert name != "sum" or result.content == str(r + 1)
                assert name != "cut" or result.left_out > 900

    def test_rows_run_at_once(self, closing):
        barrier = threading.Barrier(16)

        def meet() -> str:
            barrier.wait(5)  # passes only if all are there
            return "met"

        toolbox = closing([meet], workers=16)
        assert {row[0].content for row in toolbox.run_batch([[call("meet")]] * 16)} == {"met"}

    def test_no_more_than_workers(self, closing):
        busy = [0, 0]
        lock = threading.Lock()

        def work():
            with lock:
                busy[0] += 1
                busy[1] = max(busy)
            time.sleep(0.01)
            with lock:
                busy[0] -= 1

        toolbox = closing([work], workers=3, deadline=30)
        results = toolbox.run_batch([[call("work")]] * 30)
        assert {row[0].status for row in results} == {ToolStatus.OK}
        assert busy == [0, 3]

    def test_a_thread_that_hangs_is_abandoned_and_said_so(self, closing):
        gate = threading.Event()

        def hang():
            gate.wait()

        toolbox = closing([hang, add], deadline=1.0, workers=2, max_stuck=3)
        with pytest.warns(RuntimeWarning, match="'hang' did not end within its deadline"):
            results = toolbox.run_batch([[call("hang")], [call("sum", a=1)], [call("hang")], [call("sum", a=2)]])
        assert [row[0].still_running for row in results] == [True, False, True, False]
        assert "still running and may yet take effect" in results[0][0].content
        assert [results[1][0].content, results[3][0].content] == ["2", "3"]
        assert toolbox.stuck == 2
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # it is said once
            run(toolbox, call("hang"))
        refused = run(toolbox, call("hang"))[0]
        assert (refused.status.value, refused.content) == (
            "error",
            "Error: hang is out of order: 3 earlier calls of it are still running.",
        )
        assert run(toolbox, call("sum", a=1))[0].content == "2"  # another tool is not to blame
        gate.set()
        deadline = time.monotonic() + 60
        while toolbox.stuck and time.monotonic() < deadline:
            time.sleep(0.01)
        assert run(toolbox, call("sum", a=1))[0].content == "2"

    def test_calls_that_wait_for_a_blocked_loop_time_out(self, closing):
        gate = threading.Event()

        async def block():
            gate.wait(10)

        @tool(deadline=1.2)  # over when the loop has been replaced
        async def patient():
            await asyncio.sleep(0)

        toolbox = closing([block, patient], deadline=0.2)
        with pytest.warns(RuntimeWarning, match="'block'"):
            results = toolbox.run_batch([[call("block")], [call("patient")]])
        assert [(row[0].status.value, row[0].still_running) for row in results] == [
            ("timeout", True),
            ("timeout", False),
        ]
        gate.set()

    def test_a_coroutine_that_blocks_its_loop(self, closing):
        gate = threading.Event()

        async def block():
            gate.wait()

        toolbox = closing([block, later], deadline=1.0)
        with pytest.warns(RuntimeWarning, match="'block'"):
            results = toolbox.run_batch([[call("block")], [call("later")]])
        assert results[0][0].still_running
        assert run(toolbox, call("later"))[0].content == "later"
        gate.set()

    @pytest.mark.parametrize(
        "error", [SystemExit, KeyboardInterrupt, asyncio.CancelledError, StopIteration, GeneratorExit]
    )
    def test_whatever_is_raised(self, closing, error):
        def now():
            raise error("x")

        async def soon():
            raise error("x")

        toolbox = closing([now, soon, add])
        results = run(toolbox, call("now"), call("soon"), call("sum", a=1))
        assert [result.status.value for result in results] == ["error", "error", "ok"]
        assert run(toolbox, call("soon"), call("sum", a=1))[1].content == "2"

    def test_odd_results(self, closing):
        def half():
            return "a\ud800b"

        def forgot():
            return later()

        results = run(closing([half, forgot]), call("half"), call("forgot"))
        assert results[0].content == "a?b"
        assert "declare it with `async def`" in results[1].content

    def test_state_per_conversation(self, closing):
        kept: dict[str, list[int]] = {}
        ended = []

        @tool(per_conversation=True, end=ended.append)
        def note(n: int, conversation: str) -> list[int]:
            mine = kept.setdefault(conversation, [])
            before = list(mine)
            time.sleep(0.001)
            mine[:] = [*before, n]  # calls that ran at once would lose one another's
            return mine

        toolbox = closing([note])
        assert list(toolbox.schemas[0]["function"]["parameters"]["properties"]) == ["n"]
        with pytest.raises(ValueError, match="note: state is kept per conversation"):
            run(toolbox, call("note", n=1))
        with pytest.raises(ValueError, match="1 rows, but 2 conversations"):
            toolbox.run_batch([None], ["a", "b"])
        rows = [[call("note", n=i) for i in range(5)] for _ in range(16)]
        results = toolbox.run_batch(rows, [f"c{r}" for r in range(16)])
        assert {row[-1].content for row in results} == {"[0, 1, 2, 3, 4]"}
        assert len(kept) == 16
        toolbox.end("c3")
        assert ended == ["c3"]

    def test_a_conversation_waits_for_its_own_hung_call_only(self, closing):
        gate = threading.Event()

        @tool(per_conversation=True, deadline=1.0)
        def session(hang: bool, conversation: int) -> str:
            if hang:
                gate.wait(10)
            return "done"

        toolbox = closing([session])
        with pytest.warns(RuntimeWarning, match="'session'"):
            results = toolbox.run_batch(
                [[call("session", hang=True), call("session", hang=False)], [call("session", hang=False)]], [1, 2]
            )
        assert (
            results[0][1].content
            == "Error: an earlier call in this conversation is still running, so nothing was run."
        )
        assert results[1][0].content == "done"
        gate.set()

    def test_pickles_and_reopens(self, closing):
        toolbox = closing([add, later], deadline=9.0)
        run(toolbox, call("sum", a=1))
        copy = pickle.loads(pickle.dumps(toolbox))
        assert copy.schemas == toolbox.schemas
        assert not copy.counts
        for box in (copy, toolbox):
            assert run(box, call("sum", a=1), call("later"))[0].content == "2"
            box.close()
            assert run(box, call("sum", a=1))[0].content == "2"
            box.close()

    def test_from_many_threads(self, closing):
        toolbox = closing([add, later])
        wrong = []

        def use(n):
            for _ in range(10):
                results = toolbox.run([call("sum", a=n), call("later")])
                if [result.content for result in results] != [str(n + 1), "later"]:
                    wrong.append(results)

        threads = [threading.Thread(target=use, args=(n,)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert toolbox.totals == {ToolStatus.OK: 120}

    def test_a_hung_tool_does_not_hold_the_interpreter(self):
        code = (
            "import time, warnings; warnings.simplefilter('ignore')\n"
            "from torchrl_chat.tools import Toolbox\n"
            "def hang(): time.sleep(10**6)\n"
            "box = Toolbox([hang], deadline=0.1)\n"
            "print(box.run([{'function': {'name': 'hang', 'arguments': {}}}])[0].status.value)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
        assert done.stdout == "timeout\n"

    def test_what_it_refuses(self):
        with pytest.raises(ValueError, match="two tools are called 'sum'"):
            Toolbox([add, Tool(weather, name="sum")])
        with pytest.raises(ValueError, match="max_result_chars is 10"):
            Toolbox([add], max_result_chars=10)
        with pytest.raises(ValueError, match="deadline is None"):
            Toolbox([add], deadline=None)


class TestLoopThread:
    def test_refuses_to_wait_for_itself(self):
        loop = LoopThread()

        async def inner():
            return loop.run(asyncio.sleep(0))

        with pytest.raises(RuntimeError, match="await instead"):
            loop.run(inner())
        loop.close()
        assert not loop.alive
        with pytest.raises(RuntimeError, match="has been closed"):
            loop.run(asyncio.sleep(0))

    def test_close_cancels(self):
        loop = LoopThread()
        seen = []

        async def work():
            try:
                await asyncio.sleep(60)
            finally:
                seen.append("ended")

        loop.submit(work())
        loop.run(asyncio.sleep(0))
        loop.close()
        assert seen == ["ended"]


async def later() -> str:
    await asyncio.sleep(0)
    return "later"


def boom():
    raise ValueError("boom" * 100)


def leave():
    sys.exit(1)


def long():
    return "x" * 1000


def test_a_template_shows_the_tools():
    from conftest import bpe_tokenizer

    template = "{{ tools | tojson }}{% for m in messages %}{{ m.content }}{% endfor %}"
    text = bpe_tokenizer().apply_chat_template(
        [{"role": "user", "content": "?"}],
        tools=Toolbox([weather, add]).schemas,
        chat_template=template,
        tokenize=False,
    )
    assert json.loads(text[:-1]) == [Tool(weather).schema, Tool(add).schema]


def test_the_room_knows_no_torch():
    code = "import sys; from torchrl_chat.tools import *; print({'torch', 'torchrl', 'transformers', 'mcp'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
