"""Spans of turns, engine calls, tools and grades; and what a gateway counts for Prometheus."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import endpoint_server
import pytest
from agents import TOOLS, Recorder, ask, calling, client_of, run, session_of, templates_of, user
from tensordict import TensorDict

from torchrl_chat import ChatEnv, telemetry
from torchrl_chat.endpoint import Endpoint
from torchrl_chat.gateway import Gateway
from torchrl_chat.gateway.app import Front
from torchrl_chat.gateway.calls import Refusal
from torchrl_chat.policies import TransformersPolicy
from torchrl_chat.rewards import Episode, Grader
from torchrl_chat.tiny import tiny_model, tiny_tokenizer
from torchrl_chat.tools import Toolbox

SECRET = "hunter2"  # stands in all that is said in these tests


@pytest.fixture
def spans(monkeypatch):
    """A program's own provider; a function that returns the spans since it was called last."""
    trace = pytest.importorskip("opentelemetry.trace")
    export = pytest.importorskip("opentelemetry.sdk.trace.export")
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    from opentelemetry.sdk.trace import TracerProvider

    exporter, provider = memory.InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(export.SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)  # which can be set once in a process, officially
    monkeypatch.delenv(telemetry.CAPTURE, raising=False)

    def taken():
        found = exporter.get_finished_spans()
        exporter.clear()
        return {span.name: span for span in found}

    return taken


def everything(found) -> str:
    return "".join(span.to_json() for span in found.values())


def look(q: str) -> str:
    """Look something up.

    Args:
        q: what.
    """
    if "wrong" in q:
        raise ValueError(f"nothing about {q}")
    return f"all about {q}"


async def a_session(**more):
    session = session_of([calling(SECRET), f"It is {SECRET}."], seed=5, **more)
    reply = await ask(session, [user(f"What is {SECRET}?")], model="org/policy")
    assert reply.choices[0].calls
    return session, reply


def tools_used():
    toolbox = Toolbox([look])
    calls = [{"id": f"c{k}", "type": "function", "function": {"name": "look", "arguments": {"q": q}}}
             for k, q in enumerate([SECRET, f"wrong {SECRET}"])]  # fmt: skip
    with toolbox:  # one after the other: the last span is the second call's
        for call in calls:
            toolbox.run([call])


def graded():
    def verifier(response: str, reference: str) -> float:
        if response == "raise":
            raise ValueError(SECRET)
        return float(response == reference)

    with Grader(verifier) as grader, pytest.warns(RuntimeWarning, match="1 of 3 grades failed"):
        grader.grade([Episode.of(SECRET, SECRET), Episode.of("no", SECRET), Episode.of("raise", SECRET)])


def test_without_a_provider_nothing_is_imported_and_nothing_is_made():
    code = (
        "import sys, torchrl_chat.tools, torchrl_chat.rewards, torchrl_chat.endpoint\n"
        "from torchrl_chat import telemetry\n"
        "with telemetry.span('execute_tool', 'x') as span: assert not span\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')], 'imported'\n"
        "import opentelemetry.trace\n"
        "with telemetry.span('execute_tool', 'x') as span: assert not span\n"
    )
    pytest.importorskip("opentelemetry")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_program_of_the_docs_prints_its_span():
    """In a process of its own: a provider is set once, for all that follows."""
    pytest.importorskip("opentelemetry.sdk")
    text = (Path(__file__).parent.parent / "docs" / "observability.md").read_text()
    [code] = re.findall(r"```py\n(.*?)```", text, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert '"name": "evaluate NumberVerifier"' in done.stdout


@run
async def test_a_turn_of_a_gateway_and_what_its_engine_samples(spans):
    session, reply = await a_session()
    found = spans()
    assert set(found) == {"chat org/policy", "text_completion"}
    turn, engine = found["chat org/policy"], found["text_completion"]
    assert engine.parent.span_id == turn.context.span_id
    told = dict(turn.attributes)
    assert told == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "torchrl_chat",
        "gen_ai.request.model": "org/policy",
        "gen_ai.conversation.id": "test",
        "gen_ai.response.id": reply.name,
        "gen_ai.usage.input_tokens": session.prompted,
        "gen_ai.usage.output_tokens": session.sampled,
        "gen_ai.response.finish_reasons": ("tool_calls",),
    }
    assert engine.attributes["gen_ai.request.seed"] == 5
    assert engine.attributes["gen_ai.usage.output_tokens"] == session.sampled

    session.engine.script = lambda asked: RuntimeError(SECRET)
    with pytest.raises(Refusal):
        await ask(session, [user("again")], model="org/policy")
    found = spans()
    assert found["chat org/policy"].attributes["error.type"] == "engine"
    assert found["text_completion"].attributes["error.type"] == "RuntimeError"
    assert not found["text_completion"].status.is_ok
    assert SECRET not in everything(found)


def test_a_batch_of_an_environment_is_a_turn_and_a_call_of_the_model(spans):
    tokenizer = tiny_tokenizer()
    policy = TransformersPolicy(tiny_model(len(tokenizer)), tokenizer, max_new_tokens=4)
    env = ChatEnv(input_mode="tokens", tokenizer=tokenizer, batch_size=(2,))
    td = policy(env.reset(TensorDict(query=["last(3,7)=", "last(2,5)="], batch_size=(2,))))
    env.step(td)
    found = spans()
    assert found["turn ChatEnv"].attributes["torchrl_chat.batch.size"] == 2
    assert found["turn ChatEnv"].attributes["torchrl_chat.batch.failed"] == 0
    [engine] = [span for name, span in found.items() if name.startswith("text_completion")]
    assert engine.attributes["torchrl_chat.batch.size"] == 2
    assert engine.attributes["gen_ai.provider.name"] == "transformers"
    sampled = td["tokens"].get("response", as_list=True)
    assert engine.attributes["gen_ai.usage.output_tokens"] == sum(map(len, sampled))
    assert len(engine.attributes["gen_ai.response.finish_reasons"]) == 2


def test_tools_and_grades(spans):
    trace = pytest.importorskip("opentelemetry.trace")
    with trace.get_tracer("theirs").start_as_current_span("theirs"):
        tools_used()
    found = spans()
    assert set(found) == {"execute_tool look", "theirs"}
    last = found["execute_tool look"]
    assert last.parent.span_id == found["theirs"].context.span_id  # though it ran in another thread
    assert dict(last.attributes) == {
        "gen_ai.operation.name": "execute_tool",
        "gen_ai.tool.name": "look",
        "gen_ai.tool.type": "function",
        "error.type": "error",
    }
    graded()
    [(name, span)] = spans().items()
    assert name == "evaluate function"
    assert (span.attributes["torchrl_chat.batch.size"], span.attributes["torchrl_chat.batch.failed"]) == (3, 1)
    told = [dict(event.attributes) for event in span.events]
    assert [each.get("gen_ai.evaluation.score.value") for each in told] == [1.0, 0.0, None]
    assert told[2]["error.type"] == "error"
    assert SECRET not in everything({name: span, **found})


def test_an_endpoint_is_asked_as_a_client_and_no_key_is_told(spans, monkeypatch):
    pytest.importorskip("openai")
    request = {"messages": [user(f"Say {SECRET}")], "temperature": 0.5}
    for capture in (False, True):
        with endpoint_server.serving() as server:
            where = server.url.replace("//", "//me:pass-word@")
            endpoint = Endpoint("m", where, "sk-key-of-mine")
            if capture:
                monkeypatch.setenv(telemetry.CAPTURE, "SPAN_ONLY")
                request["messages"] = [user(f"Say {SECRET} and sk-key-of-mine")]
                server.script = lambda body, number: "yes"

            async def asked(endpoint=endpoint):
                try:
                    return await endpoint.ask(endpoint.request(**request))
                finally:
                    await endpoint.aclose()

            asyncio.run(asked())
        found = spans()
        span = found["chat m"]
        assert span.kind.name == "CLIENT"
        assert span.attributes["server.address"] == "127.0.0.1"
        assert span.attributes["gen_ai.request.temperature"] == 0.5
        said = everything(found)
        assert (SECRET in said) is capture
        assert "pass-word" not in said
        assert "sk-key-of-mine" not in said


@run
async def test_what_is_said_stands_in_spans_only_if_the_conventions_variable_asks_for_it(spans, monkeypatch):
    for asked, there in ((None, False), ("NO_CONTENT", False), ("EVENT_ONLY", False), ("SPAN_AND_EVENT", True)):
        if asked is not None:
            monkeypatch.setenv(telemetry.CAPTURE, asked)
        session, _ = await a_session()
        tools_used()
        found = spans()
        assert (SECRET in everything(found)) is there, asked
    told = found["chat org/policy"].attributes
    assert json.loads(told["gen_ai.input.messages"]) == [
        {"role": "user", "parts": [{"type": "text", "content": f"What is {SECRET}?"}]}
    ]
    [said] = json.loads(told["gen_ai.output.messages"])
    assert said["finish_reason"] == "tool_calls"
    assert said["parts"][0]["type"] == "tool_call"
    assert json.loads(said["parts"][0]["arguments"]) == {"q": SECRET}
    assert SECRET in found["execute_tool look"].attributes["gen_ai.tool.call.arguments"]
    assert session.turns == 1


def test_a_turn_is_a_part_of_the_trace_that_its_agent_names(spans):
    pytest.importorskip("openai")
    templates = templates_of()
    with Gateway(Recorder(templates, lambda ask: "one two"), templates.plain.tokenizer) as gateway:
        client = client_of(gateway.session(), max_retries=0)

        def turn(**headers):
            client.chat.completions.create(model="m", messages=[user("hi")], extra_headers=headers)
            return spans()["chat m"]

        trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
        found = turn(traceparent=f"00-{trace}-{parent}-01")
        assert (found.context.trace_id, found.parent.span_id) == (int(trace, 16), int(parent, 16))
        assert turn(traceparent="00-no-trace-01").parent is None  # what cannot be read is no fault of the request
        assert turn().parent is None


def test_a_span_that_a_server_has_made_itself_stays_the_parent(spans):
    """Instrumentation of a server reads the headers before us; propagators may look for names in any case."""
    trace = pytest.importorskip("opentelemetry.trace")
    tracer = trace.get_tracer("server")
    with (
        tracer.start_as_current_span("POST") as around,
        telemetry.behind({"traceparent": f"00-{1:032x}-{2:016x}-01"}),
    ):
        assert trace.get_current_span() is around
    with telemetry.behind({"traceparent": f"00-{1:032x}-{2:016x}-01"}):
        assert trace.get_current_span().get_span_context().trace_id == 1
    assert not trace.get_current_span().get_span_context().is_valid


def test_a_fault_of_the_gateway_s_own_is_counted(monkeypatch):
    openai = pytest.importorskip("openai")
    templates = templates_of()

    def broken(*_):
        raise RuntimeError("a fault of ours")

    with Gateway(Recorder(templates, lambda ask: "one two"), templates.plain.tokenizer) as gateway:
        client = client_of(gateway.session(), max_retries=0)
        monkeypatch.setattr(Front, "_agent", broken)
        with pytest.raises(openai.APIStatusError) as refused:
            client.chat.completions.create(model="m", messages=[user("hi")])
        request = urllib.request.Request(
            f"{gateway.url}/metrics", headers={"Authorization": f"Bearer {gateway.token}"}
        )
        with urllib.request.urlopen(request) as reply:
            status = refused.value.status_code
            assert f'calls_total{{dialect="chat completions",status="{status}"}} 1.0' in reply.read().decode()
        assert status >= 500


def test_prometheus_reads_what_a_gateway_counts():
    openai = pytest.importorskip("openai")
    from prometheus_client.parser import text_string_to_metric_families

    templates = templates_of()
    gateway = Gateway(Recorder(templates, lambda ask: "one two"), templates.plain.tokenizer)

    def read(token):
        request = urllib.request.Request(f"{gateway.url}/metrics", headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request) as reply:
            assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
            text = reply.read().decode()
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return {(s.name.removeprefix("torchrl_chat_gateway_"), *s.labels.values()): s.value for s in samples}

    with gateway:
        session = gateway.session()
        client = client_of(session, max_retries=0)
        messages = [user("hi")]
        first = client.chat.completions.create(model="m", messages=messages, tools=list(TOOLS))
        client.chat.completions.create(model="m", messages=[user("another")], tools=list(TOOLS))
        for _ in client.chat.completions.create(
            model="m",
            messages=[*messages, first.choices[0].message.to_dict(), user("more")],
            tools=list(TOOLS),
            stream=True,
        ):
            pass
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="m", messages=[])
        with pytest.raises(urllib.error.HTTPError, match="401"):
            read(session.api_key)
        before = read(gateway.token)
        assert before["calls_total", "chat completions", "200"] == 3
        assert before["calls_total", "chat completions", "400"] == 1
        assert before["call_seconds_count",] == 4
        assert before["engine_seconds_count",] == 3
        assert before["sessions",] == before["sessions_opened_total",] == 1
        assert before["answers_total",] == 3
        assert before["tokens_total", "sampled"] == session.session.sampled > 0
        assert before["tokens_total", "prompt"] == session.session.prompted > 0
        assert before["sequences_total", "begins"] == 1
        assert before["sequences_total", "restarts"] + before["sequences_total", "forks"] == 1
        session.finish(1.0)
        with gateway.session(), gateway.session():
            after = read(gateway.token)
        assert after["sessions",] == 2
        assert after["sessions_opened_total",] == 3
        assert sum(value for key, value in after.items() if key[0] == "sessions_finished_total") == 1
        assert (
            after["tokens_total", "sampled"] == before["tokens_total", "sampled"]
        )  # what was counted stays counted
