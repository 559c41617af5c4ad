"""Public agents, unmodified, at the gateway: what they did is in the ledger, id for id, in one sequence where they edited nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from agent_environment import drive, python_of
from agents import Recorder, check_law, templates_of
from conftest import skip_without

from torchrl_chat.conversation import Limits, Turn
from torchrl_chat.gateway import Gateway, SandboxedCommand, Settings, play_agents
from torchrl_chat.sandbox import SandboxError
from torchrl_chat.tiny import tiny_model

TASKS = ["Add 2 and 3, and 4 and 5; then both.", "One more.", "And another?"]
# What the model says: two calls at once, words beside a call, an answer; then a streamed call and a streamed answer.
ADD = '<tool_call>\n{{"name":  "add", "arguments": {{"a":{}, "b":   {}}}}}\n</tool_call>'
EPISODE = [
    ADD.format(2, 3) + "\n" + ADD.format(4, 5),
    "Now both:\n" + ADD.format(5, 9),
    "\n\nThe sum is 14.\n",
    ADD.format(14, 1),
    "It is 15.",
]
ANSWERS = ["The sum is 14.", "It is 15."]


@dataclass(frozen=True)
class Case:
    """An agent, and what is expected of it."""

    program: str
    how: str
    error: str  # what it raises when the session's budget is used up
    full: bool = True

    def __str__(self) -> str:
        return f"{self.program}-{self.how}"


CASES = [
    Case("openai_sdk", "chat", "PermissionDeniedError", full=False),
    Case("openai_agents_sdk", "chat", "PermissionDeniedError"),
    Case("openai_sdk", "responses", "PermissionDeniedError"),
    Case("openai_sdk", "named", "PermissionDeniedError"),
    Case("anthropic_sdk", "messages", "PermissionDeniedError"),
    Case("anthropic_sdk", "runner", "PermissionDeniedError", full=False),
    Case("openai_agents_sdk", "responses", "PermissionDeniedError"),
    Case("openai_agents_sdk", "named", "PermissionDeniedError"),
    Case("pydantic_ai_agent", "chat", "ModelAuthenticationError"),
    Case("pydantic_ai_agent", "responses", "ModelAuthenticationError"),
    Case("pydantic_ai_agent", "messages", "ModelAuthenticationError"),
    Case("langgraph_agent", "responses", "OpenAIPermissionDeniedError"),
    Case("langgraph_agent", "messages", "AnthropicPermissionDeniedError"),
    Case("litellm_loop", "messages", "PermissionDeniedError"),
    Case("langgraph_agent", "chat", "OpenAIPermissionDeniedError"),
    Case("litellm_loop", "chat", "APIError"),
]


def parametrized(cases, full=False):
    marks = [pytest.mark.services]
    return [
        pytest.param(case, id=str(case), marks=marks + [pytest.mark.full] * (full or case.full)) for case in cases
    ]


class Scored(Recorder):
    """Says what a script says; the log-probs are those of the tiny model, behind the prompt as it is asked for."""

    def __init__(self, templates, script):
        super().__init__(templates, script)
        self.model = tiny_model(len(templates.plain.tokenizer), context=65_536).requires_grad_(False)
        self.bias = torch.zeros(len(templates.plain.tokenizer))

    async def sample(self, ask):
        turn = await super().sample(ask)
        ids = torch.cat([ask.ids, turn.ids])
        return Turn(turn.ids, self.scores(ids)[len(ask.ids) :], None, turn.finish_reason)

    def scores(self, ids: torch.Tensor) -> torch.Tensor:
        """The log-prob of each id behind those before it, 0 for the first."""
        table = (self.model(ids[None]).logits[0, :-1] + self.bias).log_softmax(-1)
        return torch.cat([torch.zeros(1), table.gather(1, ids[1:, None])[:, 0]])


class Sampling(Scored):
    """The tiny model itself, made to end its answers after a dozen tokens: what it samples is noise, spelled as no tokenizer would."""

    def __init__(self, templates):
        super().__init__(templates, None)
        self.draw = torch.Generator().manual_seed(3)
        self.bias[list(self.template.stop_ids)] = 4.0

    async def sample(self, ask):
        self.asked.append(ask)
        ids, log_probs, read, past = [], [], ask.ids[None], None
        while not (ids and ids[-1] in self.template.stop_ids):
            out = self.model(read, past_key_values=past, use_cache=True)
            table, past = (out.logits[0, -1] + self.bias).log_softmax(-1), out.past_key_values
            token = int(torch.multinomial(table.exp(), 1, generator=self.draw))
            ids.append(token)
            log_probs.append(float(table[token]))
            read = torch.tensor([[token]])
        self.sampled.append((ask.ids.tolist(), ids))
        return Turn(torch.tensor(ids), torch.tensor(log_probs), None, "stop")


def served(engine, templates, ended=None, **limits):
    return Gateway(
        engine,
        templates.plain.tokenizer,
        template={"chat_template": templates.plain.renderer.source},
        settings=Settings(limits=Limits(**limits)),
        ended=ended,
    )


def check_scores(session) -> None:
    """The log-probs of the ledger are those of one forward pass over each of its sequences."""
    for branch in session.transcript().sequences:
        whole = session.engine.scores(branch.tokens)
        off = (whole - branch.log_probs)[branch.mask].abs().max()
        assert off <= 1e-4


@pytest.mark.parametrize("case", parametrized(CASES))
def test_an_agent_that_plays_a_known_episode_makes_one_sequence(case, tmp_path):
    """Several turns with tools, parallel calls, a stream, and the error of a budget that is used up."""
    python = python_of(case.program, sys.executable)
    templates = templates_of()
    left = iter(EPISODE)
    engine = Scored(templates, lambda ask: next(left))
    with served(engine, templates, max_turns=len(EPISODE)) as gateway, gateway.session() as session:
        told = drive(case.program, case.how, session.environment(), TASKS, python, tmp_path)
        assert [answer.strip() for answer in told["answers"]] == ANSWERS
        assert told["error"] == case.error
        assert session.report["counts"] == {"begins": 1}, session.report["findings"]
        assert check_law(session.session, log_prob=None) == 1
        check_scores(session.session)
        messages = session.transcript.messages
        assert [len(m.get("tool_calls") or ()) for m in messages if m["role"] == "assistant"] == [2, 1, 0, 1, 0]
        assert [m["content"] for m in messages if m["role"] == "tool"] == ["5", "9", "14", "15"]


SMOL = [
    ADD.format(2, 3) + "\n" + ADD.format(4, 5),
    '<tool_call>\n{"name": "final_answer", "arguments": {"answer": "fourteen"}}\n</tool_call>',
    "I add:\n" + ADD.format(14, 1),
    '<tool_call>\n{"name": "final_answer", "arguments": {"answer": "fifteen"}}\n</tool_call>',
]


@pytest.mark.services
@pytest.mark.full
def test_what_smolagents_edits_is_told(tmp_path):
    """It sends calls back as text of its own, and results as a user's: each answer is exact, in a sequence of its own."""
    python = python_of("smolagents_tools", sys.executable)
    templates = templates_of()
    left = iter(SMOL)
    engine = Scored(templates, lambda ask: next(left))
    with served(engine, templates, max_turns=len(SMOL)) as gateway, gateway.session() as session:
        told = drive("smolagents_tools", "chat", session.environment(), TASKS, python, tmp_path)
        assert told == {"answers": ["fourteen", "fifteen"], "error": "AgentGenerationError"}
        assert check_law(session.session, log_prob=None) == len(SMOL)
        check_scores(session.session)
        assert session.report["counts"] == {"begins": 1, "restarts": len(SMOL) - 1}
        edits = [finding for finding in session.report["findings"] if "is not what was sampled there" in finding]
        assert len(edits) == len(SMOL) - 1
        assert "instead of" in edits[0]


BASH = '<tool_call>\n{{"name":  "bash", "arguments": {{"command": "{}"}}}}\n</tool_call>'
SUBMIT = BASH.format("echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT && cat made")


@pytest.mark.services
@pytest.mark.full
@pytest.mark.parametrize("refused", [False, True])
def test_mini_swe_agent_works_in_a_folder(refused, tmp_path):
    """One sequence; two where it refuses an answer, leaves it out and complains (``B1``)."""
    python = python_of("mini_swe", sys.executable)
    templates = templates_of()
    lines = [
        "First I look.\n" + BASH.format("pwd") + "\n" + BASH.format("echo 42 > made; echo wrote"),
        *(["I forgot to call anything."] if refused else []),
        BASH.format("cat made"),
        SUBMIT,
    ]
    left = iter(lines)
    engine = Scored(templates, lambda ask: next(left))
    with served(engine, templates, max_turns=len(lines)) as gateway, gateway.session() as session:
        told = drive("mini_swe", "chat", session.environment(), TASKS[:1], python, tmp_path)
        assert told["error"] is None
        assert "42" in told["answers"][0]
        assert (tmp_path / "made").read_text() == "42\n"
        assert check_law(session.session, log_prob=None) == 1 + refused
        check_scores(session.session)
        assert session.report["counts"] == ({"begins": 1, "forks": 1} if refused else {"begins": 1})
        assert any("(B1)" in finding for finding in session.report["findings"]) == refused


@pytest.mark.services
@pytest.mark.full
@pytest.mark.parametrize("kind", ["namespaces", "bubblewrap"])
def test_mini_swe_agent_works_in_a_sandbox(kind):
    """As it is, with a shell and a folder of its own; the ledger is what it is outside."""
    python = python_of("mini_swe", sys.executable)
    needed = subprocess.check_output([python, "-c", "import sys; print(*{sys.prefix, *sys.path[1:]})"], text=True)
    programs = Path(__file__).with_name("public_agents")
    templates = templates_of()
    left = iter([BASH.format("pwd; echo 42 > made; ls -a /; cat /etc/shadow"), BASH.format("cat made"), SUBMIT])
    engine = Scored(templates, lambda ask: next(left))
    # Not below the home of root, for root's commands are nobody's.
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        os.chmod(folder, 0o755)
        agent = SandboxedCommand(
            [python, "-P", str(programs / "mini_swe.py"), "chat"],
            show=[programs, *(path for path in needed.split() if os.path.isdir(path))],
            environment={
                "AGENT_TASKS": json.dumps(TASKS[:1]),
                "MSWEA_GLOBAL_CONFIG_DIR": "/tmp",
                "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            },
            workspaces=folder,
            sandbox={"isolation": kind},
        )
        try:
            agent.prepare()
        except SandboxError as error:
            skip_without("bwrap", f"no isolation here: {error}")
        kept: list = []
        with served(engine, templates, kept.append, max_turns=3) as gateway:
            td = play_agents(agent, [{"query": "q"}], gateway, on_error="fail")
        agent.close()
        assert td["env_failure"] == [""]
        [session] = kept
        assert (Path(folder) / session.name / "made").read_text() == "42\n"
        results = [m["content"] for each in engine.asked for m in each.messages if m["role"] == "tool"]
        assert "/workspace" in results[0]
        assert "workspaces" in results[0]
        assert "No such file" in results[0]  # the machine's own password file
        assert check_law(session, log_prob=None) == 1
        check_scores(session)


@pytest.mark.parametrize("case", parametrized(CASES, full=True))
def test_what_the_tiny_model_samples_for_an_agent_is_one_sequence(case, tmp_path):
    """Noise: texts that cannot be encoded alike again, blanks at their ends."""
    python = python_of(case.program, sys.executable)
    templates = templates_of()
    engine = Sampling(templates)
    with served(engine, templates) as gateway, gateway.session() as session:
        told = drive(case.program, case.how, session.environment(), TASKS * 2, python, tmp_path)
        assert (len(told["answers"]), told["error"]) == (6, None)
        sequences, findings = check_law(session.session, log_prob=None), session.report["findings"]
        if (case.program, case.how) == ("pydantic_ai_agent", "messages") and sequences > 1:
            # To an empty answer it says "return text" in its system prompt, which this dialect has beside the messages: an edit.
            assert any(answer.empty for answer in session.session.tree.answers)
            assert all("message 0 (system)" in finding for finding in findings[1:])
        else:
            assert session.report["counts"] == {"begins": 1}, findings
            assert sequences == 1
        check_scores(session.session)
