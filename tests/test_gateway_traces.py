"""OpenEnv's training traces: ours are theirs, theirs become ledgers, and what is wrong with one is told."""

from __future__ import annotations

import asyncio
import copy
import json
import math
import subprocess
from pathlib import Path

import pytest
from agents import ask, calling, check_law, result, session_of, system, user

from torchrl_chat import training_view
from torchrl_chat.gateway import episodes, read_trace, training_trace

ROOT = Path(__file__).parents[1]
PYTHON = ROOT / ".openenv" / "010" / "bin" / "python"
TRL = ROOT / ".trl" / "bin" / "python"


def run_in(python: Path, script: str, given: str) -> str:
    if not python.exists():
        pytest.skip(f"{python} is not there (make peers; make test-all for TRL's)")
    done = subprocess.run([python, "-c", script], input=given, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-1]


async def played():
    """A session with calls, an answer that was left out, a second sample of a prompt, and another system prompt."""
    lines = ["one", calling("a", "b", said="see"), "two", "bad", "three", "four", "five"]
    session = session_of(lines)
    history = [system("Be brief."), user("hi")]
    for follows in ([user("look")], [], [user("on")]):
        message = (await ask(session, history)).choices[0].message
        history += [message, *follows]
        if message.get("tool_calls"):
            history += result(message, "1", "2")
    await ask(session, history)  # "bad", which is left out
    answer = (await ask(session, [*history, user("no")])).choices[0].message
    await ask(session, [*history, user("no"), answer, user("more")])
    await ask(session, [system("Be long."), user("hi")])
    return session


@pytest.fixture(scope="module")
def session():
    session = asyncio.run(played())
    assert check_law(session) == 3
    return session


@pytest.fixture
def trace(session):
    return copy.deepcopy(training_trace(session))


def rows(ledger):
    """The sequences of a ledger up to the last trained token: what stands behind is nobody's affair."""
    found = []
    for branch in ledger.sequences:
        end = int(branch.mask.nonzero().max()) + 1
        found.append((branch.tokens[:end].tolist(), branch.mask[:end].tolist(), branch.log_probs[:end].tolist()))
    return found


def test_a_trace_that_is_read_again_is_the_same_ledger(session, trace):
    json.loads(json.dumps(trace, allow_nan=False))
    recorded = read_trace(json.loads(json.dumps(trace)), reward=1.0)
    assert rows(recorded.transcript()) == rows(session.transcript())
    assert [f.code for f in recorded.findings] == ["split", "split"]
    assert len({turn["node_id"] for turn in trace["turns"]}) == len(trace["turns"]) == 7
    view = training_view(episodes([recorded]), group=None, layout="padded")
    assert view.shape == (3,)
    assert int(view["masks", "all_assistant_mask"].sum()) == session.sampled
    assert json.loads(trace["turns"][-2]["request"]["tools"][0]["function"]["name"].join('""')) == "look"


def test_where_sequences_part_is_told(trace):
    turns = trace["turns"] = trace["turns"][1:3]  # of the sequence with which the episode went on
    end = len(turns[0]["prompt_token_ids"]) + len(turns[0]["completion_token_ids"])
    assert [f.code for f in read_trace(trace).findings] == []
    turns[1]["prompt_token_ids"][end - 2] += 1
    recorded = read_trace(trace)
    [split, alone] = recorded.findings
    assert (split.level, split.code) == ("WARN", "split")
    assert f"first {end - 2} tokens of turn 0's sequence, which has {end}" in split.detail
    assert alone.code == "per_turn_capture_only"
    assert len(recorded.transcript().sequences) == 2


BROKEN = {
    "no_prompt_ids": lambda turn: turn.update(
        prompt_token_ids=[], loss_mask=[1] * len(turn["completion_token_ids"])
    ),
    "invalid_token_id": lambda turn: turn["prompt_token_ids"].append(-1),
    "no_logprobs": lambda turn: turn.update(per_token_logps=None),
    "invalid_logprob": lambda turn: turn["per_token_logps"].__setitem__(0, math.nan),
    "positive_logprob": lambda turn: turn["per_token_logps"].__setitem__(0, 0.5),
    "logprob_misalign": lambda turn: turn["per_token_logps"].pop(),
    "length_mismatch": lambda turn: turn["loss_mask"].pop(),
    "invalid_loss_mask": lambda turn: turn["loss_mask"].__setitem__(-1, 2),
    "trainable_prompt": lambda turn: turn["loss_mask"].__setitem__(0, 1),
}
FINE = {
    "truncated_turn": ("WARN", lambda turn: turn["response"]["choices"][0].update(finish_reason="length")),
    "certain_tokens": ("INFO", lambda turn: turn["per_token_logps"].__setitem__(0, 0.0)),
    "masked_tokens": ("INFO", lambda turn: turn["loss_mask"].__setitem__(-1, 0)),
}


@pytest.mark.parametrize("code", BROKEN)
def test_a_turn_that_cannot_be_trained_on_is_left_out_alone(trace, code):
    whole = sum(len(turn["completion_token_ids"]) for turn in trace["turns"])
    BROKEN[code](trace["turns"][1])
    recorded = read_trace(trace)
    [fatal] = [finding for finding in recorded.findings if finding.level == "FATAL"]
    assert (fatal.code, fatal.detail.startswith("turn 1: ")) == (code, True)
    trained = sum(int(branch.mask.sum()) for branch in recorded.transcript().sequences)
    lost = len(read_trace(trace).findings) and whole - trained
    assert 0 < lost < whole / 2


@pytest.mark.parametrize("code", FINE)
def test_what_is_odd_is_told_and_trained_on(session, trace, code):
    level, change = FINE[code]
    change(trace["turns"][1])
    recorded = read_trace(trace)
    assert (level, code) in [(finding.level, finding.code) for finding in recorded.findings]
    trained = sum(int(branch.mask.sum()) for branch in recorded.transcript().sequences)
    assert trained == session.sampled - (code == "masked_tokens")


def test_a_call_is_trained_once(session, trace):
    trace["turns"].append(copy.deepcopy(trace["turns"][0]))
    recorded = read_trace(trace)
    assert "duplicate_node" in [finding.code for finding in recorded.findings if finding.level == "FATAL"]
    assert sum(int(branch.mask.sum()) for branch in recorded.transcript().sequences) == session.sampled


def test_what_is_no_trace_is_refused_and_an_empty_one_is_an_episode_that_failed(trace):
    for wrong, said in (
        ({"turns": "x"}, "'turns'"),
        ([1], "turn 0"),
        ({"schema_version": 2, "turns": []}, "version"),
    ):
        with pytest.raises(ValueError, match=said):
            read_trace(wrong)
    empty = read_trace({"turns": []})
    assert [str(finding) for finding in empty.findings] == [
        "[FATAL] no_turns: no turn of the trace can be trained on."
    ]
    td = episodes([empty, read_trace(trace)])
    assert [bool(text) for text in td["env_failure"]] == [True, False]


def test_answers_without_log_probs_are_not_exported(session):
    other = asyncio.run(played())
    answer = other.tree.answers[0]
    answer.transcript = answer.transcript._replace(scored=False)
    with pytest.raises(
        ValueError, match="answer 1 of session 'test' has no log-probs"
    ):  # behind the one that was left out
        training_trace(other)


# ---------------------------------------------------------------------- the others' own code
VALIDATE = """
import json, sys
from openenv.core.harness import TrainingTrace
told = []
for trace in json.load(sys.stdin):
    try:
        told.append(len(TrainingTrace.model_validate(trace).turns))
    except ValueError as error:
        told.append(str(error))
print(json.dumps(told))
"""


@pytest.mark.openenv
@pytest.mark.full
def test_openenv_takes_ours_and_refuses_what_we_leave_out(trace):
    traces = [trace]
    for change in BROKEN.values():
        other = copy.deepcopy(trace)
        change(other["turns"][1])
        traces.append(other)
    for _, change in FINE.values():
        other = copy.deepcopy(trace)
        change(other["turns"][1])
        traces.append(other)
    whole, *told = json.loads(run_in(PYTHON, VALIDATE, json.dumps(traces)))
    assert whole == 7
    refused, fine = told[: len(BROKEN)], told[len(BROKEN) :]
    assert all(isinstance(each, str) for each in refused)
    assert fine == [7] * len(FINE)


# A capture server of OpenEnv's, an engine that answers as vLLM does, and an agent of two turns whose second prompt is rendered anew.
CAPTURE = """
import asyncio, json, sys, threading, urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
calls = json.load(sys.stdin)
class Engine(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        turn = calls.pop(0)
        entries = [{"token": f"token_id:{i}", "logprob": s, "top_logprobs": []}
                   for i, s in zip(turn["completion_token_ids"], turn["per_token_logps"])]
        choice = {"index": 0, "message": {"role": "assistant", "content": turn["said"]}, "finish_reason": "stop",
                  "token_ids": turn["completion_token_ids"], "logprobs": {"content": entries}}
        body = json.dumps({"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice],
                           "prompt_token_ids": turn["prompt_token_ids"]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass
engine = ThreadingHTTPServer(("127.0.0.1", 0), Engine)
threading.Thread(target=engine.serve_forever, daemon=True).start()
import httpx
from openenv.core.harness.capture.server import create_app
app = create_app(llm_url=f"http://127.0.0.1:{engine.server_address[1]}", model="m")
async def main():
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://capture") as client:
        key = (await client.post("/sessions", json={})).json()["session_id"]
        history = []
        for turn in list(calls):
            history.append({"role": "user", "content": "go on"})
            reply = await client.post("/v1/chat/completions", json={"model": "m", "messages": history},
                                      headers={"Authorization": f"Bearer {key}"})
            history.append(reply.json()["choices"][0]["message"])
        print((await client.get(f"/sessions/{key}/trace_entries")).text)
asyncio.run(main())
"""


@pytest.mark.openenv
@pytest.mark.parametrize("drift", [pytest.param(False, marks=pytest.mark.full), True])
def test_what_openenv_recorded_becomes_a_training_view_with_its_splits_told(drift):
    turns, prompt = [], [1, 2, 3]
    for k in range(3):
        sampled = [10 * k + 7, 10 * k + 8, 2]
        turns.append(
            {
                "prompt_token_ids": list(prompt),
                "completion_token_ids": sampled,
                "per_token_logps": [-0.5, -0.25, -1.0],
                "said": f"answer {k}",
            }
        )
        prompt += [*sampled, 4, 5]
        if drift and k == 1:
            prompt[-5:-3] = [99]  # what was sampled as two tokens is one when it is rendered anew
    entries = json.loads(run_in(PYTHON, CAPTURE, json.dumps(turns)))["entries"]
    recorded = read_trace(entries, reward=1.0, row={"query": "q"})
    ledger = recorded.transcript()
    assert [finding.code for finding in recorded.findings] == (["split"] if drift else [])
    assert len(ledger.sequences) == 1 + drift
    view = training_view(episodes([recorded]), layout="padded")
    assert view.shape == (1 + drift,)
    sampled = view["tokens", "full"][view["masks", "all_assistant_mask"]].tolist()
    assert sampled == [token for turn in turns for token in turn["completion_token_ids"]]
    assert [m["content"] for m in ledger.messages if m["role"] == "assistant"][-1] == "answer 2"


CONSUME = """
import asyncio, json, sys, threading
from types import SimpleNamespace
from openenv.core.harness import TrainingTrace
from trl.experimental.async_grpo import openenv_harness as harness
trace = TrainingTrace.model_validate(json.load(sys.stdin))
class Session:
    def wait_for_completion(self): pass
    def fetch_training_trace(self): return trace
    def verify(self, completion): return SimpleNamespace(env_reward=1.0)
    def close(self): pass
    def initial_messages(self): return []
    def list_tools(self): return []
    def call_tool(self, *_): pass
class Loop(harness._HarnessRolloutLoop):
    def __init__(self):
        self._factory = SimpleNamespace(create=lambda *_, **__: Session())
        self._live_sessions, self._stop_event, self._adapter = set(), threading.Event(), None
        self._rollout_reward_fn, self._fork_threshold_tokens = None, 0
harness.TrainableSession = Session
(completion, ids, sequences, calls, failed, reward), metrics = Loop()._run_session([], 0)
print(json.dumps({"ids": ids, "calls": calls, "reward": reward, "tally": metrics["tally"],
    "last": completion[-1]["content"], "sequences": [[s.input_ids, s.completion_mask, s.old_log_probs] for s in sequences]}))
"""


@pytest.mark.full
@pytest.mark.openenv
def test_trl_trains_on_what_we_recorded(session, trace):
    """TRL's own consumer: as many rows as we have sequences, the same tokens, masks and log-probs."""
    told = json.loads(run_in(TRL, CONSUME, json.dumps(trace)))
    ours = [
        [tokens, [int(bit) for bit in mask], [float(score) for score in scores]]
        for tokens, mask, scores in rows(session.transcript())
    ]
    assert told["sequences"] == ours
    assert told["tally"]["fork"] == 2
    assert told["tally"]["realign"] == 0
    assert (told["calls"], told["reward"], told["last"]) == (2, 1.0, session.transcript().messages[-1]["content"])
    assert len(told["ids"]) == session.sampled
