"""``MessageEnv``: classes of messages as batched, stateless, seeded torchrl environments, served and trained on."""

from __future__ import annotations

import asyncio
import io
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from chat_rows import ledgers, respond
from conftest import CALLS_TEMPLATE, bpe_tokenizer
from torchrl.envs.utils import check_env_specs

from torchrl_chat import (
    Budget,
    ChatTemplate,
    MessageChatEnv,
    MessageEnv,
    StopReason,
    columns,
    load_state,
    play,
    save_state,
)
from torchrl_chat.conversation import Reply
from torchrl_chat.gallery import tiny_tokenizer_for
from torchrl_chat.named import named
from torchrl_chat.openenv import ChatAction
from torchrl_chat.openenv.gallery import factory_of
from torchrl_chat.tiny import TEXT_ALPHABET, tiny_tokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"
GAMES = {
    name: named(f"{EXAMPLES / file}:{name}")
    for file, name in (
        ("guessing_game.py", "GuessingGame"),
        ("shop.py", "Shop"),
        ("self_correction.py", "SelfCorrection"),
    )
}


def tokenizer():
    return bpe_tokenizer(CALLS_TEMPLATE)


def make(cls, mode: str = "tokens", num_envs: int = 3, seed: int = 0, **kwargs) -> MessageChatEnv:
    return MessageChatEnv(cls, tokenizer=tokenizer(), input_mode=mode, num_envs=num_envs, seed=seed, **kwargs)


def expert(env):
    """A policy that plays the three examples well."""

    def text(state) -> str:
        game = state.env
        if hasattr(game, "number"):
            return str(game.number) if game.turn else "0"
        if hasattr(game, "answer"):
            return game.answer if game.turn or game.answer in "02468" else "x"
        left = game.money - sum(game.basket)
        prices = sys.modules["shop"].PRICES
        for name, price in prices.items():
            if price == left or (not game.basket and left - price in set(prices.values()) - {price}):
                return f'<tool_call>\n{{"name": "buy", "arguments": {{"article": "{name}"}}}}\n</tool_call>'
        return "done"

    def policy(td):
        return respond(env, td, [text(state) for state in columns.read_objects(td["episode"], td.batch_size)])

    return policy


class Count(MessageEnv):
    """Adds up what it is told, and draws a number each turn."""

    def reset(self, row):
        self.total, self.drawn = 0, []
        return f"start {self.random.randint(0, 99)}"

    def step(self, message):
        self.total += len(message["content"])
        self.drawn.append(self.random.randint(0, 99))
        return f"total {self.total}, drawn {self.drawn[-1]}", float(self.total), self.turn == 4


class TestExamples:
    @pytest.mark.parametrize("name", GAMES)
    def test_specs(self, mode, name):
        env = make(GAMES[name], mode)
        check_env_specs(env)

    @pytest.mark.parametrize("name", GAMES)
    def test_a_batch_of_64_is_played(self, mode, name):
        env = make(GAMES[name], mode, num_envs=64)
        out = play(env, expert(env))
        assert columns.read_objects(out["env_failure"], out.batch_size) == [""] * 64
        assert set(out["stop_reason"].flatten().tolist()) == {StopReason.ANSWERED}
        paid = out["reward"].flatten().tolist()
        assert set(paid) == ({1.0} if name == "Shop" else {1.0, 0.5})
        assert out["success"].all()
        assert all(t.mask.any() for t in ledgers(out))

    @pytest.mark.parametrize("name", GAMES)
    def test_in_a_collector(self, name):
        from torchrl.collectors.llm import LLMCollector

        env = make(GAMES[name], num_envs=64)
        collector = LLMCollector(env, policy=expert(env), dialog_turns_per_batch=128, total_dialog_turns=256)
        batches = list(collector)
        assert [batch.numel() for batch in batches] == [128, 128]
        done = torch.cat([batch["next", "done"].flatten() for batch in batches])
        reward = torch.cat([batch["next", "reward"].flatten() for batch in batches])
        assert done.any()
        assert set(reward[done].tolist()) <= {0.5, 1.0}

    @pytest.mark.parametrize("name", GAMES)
    def test_served(self, name):
        file = {"GuessingGame": "guessing_game", "Shop": "shop", "SelfCorrection": "self_correction"}[name]
        factory, _ = factory_of(f"{EXAMPLES / file}.py:{name}", tokenizer())
        env = factory()
        first, again = env.reset(seed=5), factory().reset(seed=5)
        assert first.messages == again.messages
        assert first.messages[-1]["role"] == "user"
        if name == "Shop":
            call = '<tool_call>\n{"name": "buy", "arguments": {"article": "tea"}}\n</tool_call>'
            observation = env.step(ChatAction(text=call))
            assert observation.messages[-1]["content"].endswith(" left")
        observation = env.step(ChatAction(text="nothing"))
        observation = observation if observation.done else env.step(ChatAction(text="nothing"))
        assert observation.done
        assert observation.reward == 0.0

    @pytest.mark.parametrize("name", GAMES)
    def test_they_are_short(self, name):
        cls = GAMES[name]
        source = Path(sys.modules[cls.__module__].__file__).read_text().split(f"class {name}", 1)[1]
        source = source.split("if __name__", 1)[0]
        assert len(source.strip().splitlines()) <= 30

    @pytest.mark.full
    @pytest.mark.services
    def test_grpo_learns_one(self, tmp_path):
        command = [sys.executable, "examples/grpo.py", "--dataset", "examples/self_correction.py:SelfCorrection"]
        options = {"steps": 30, "prompts": 8, "group_size": 16, "max_new_tokens": 1, "max_turns": 2, "eval": 64}
        given = [part for key, value in options.items() for part in (f"--{key}", str(value))]
        run = subprocess.run(
            [*command, *given, "--out", str(tmp_path / "run"), "--show_every", "0"],
            cwd=EXAMPLES.parent, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr[-2000:]
        rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        rewards = [row["reward"] for row in rows if "reward" in row]
        assert sum(rewards[-5:]) / 5 > 2 * sum(rewards[:5]) / 5


class TestState:
    def test_stepping_twice_gives_equal_results(self, mode):
        env = make(Count, mode)
        td = env.reset()
        for _ in range(4):
            td = respond(env, td)
            first, second = env.step(td.copy())["next"], env.step(td.copy())["next"]
            assert first["episode"] == second["episode"]
            assert ledgers(first) == ledgers(second)
            assert first["reward"].tolist() == second["reward"].tolist()
            td = env.step_mdp(env.step(td))

    def test_branching(self):
        env = make(Count)
        td = env.step_mdp(env.step(respond(env, env.reset())))
        left = env.step(respond(env, td.copy(), ["a", "a", "a"]))["next"]
        right = env.step(respond(env, td.copy(), ["bcd", "bcd", "bcd"]))["next"]
        assert [s.env.total + 2 for s in left["episode"]] == [s.env.total for s in right["episode"]]
        assert [s.env.drawn for s in left["episode"]] == [s.env.drawn for s in right["episode"]]

    def test_a_saved_run_goes_on(self, tmp_path):
        env = make(Count)
        td = respond(env, env.step_mdp(env.step(respond(env, env.reset()))))
        save_state(tmp_path / "run.pt", {"env": env.state_dict(), "td": td})
        expected = env.step(td)["next"]
        other, state = make(Count, seed=9), load_state(tmp_path / "run.pt")
        other.load_state_dict(state["env"])
        found = other.step(state["td"])["next"]
        assert found["episode"] == expected["episode"]
        assert ledgers(found) == ledgers(expected)
        assert ledgers(other.reset()) == ledgers(env.reset())

    def test_what_cannot_be_copied_goes_forward_only(self):
        class Holding(MessageEnv):
            def reset(self, row):
                self.pipe = io.TextIOWrapper(io.BufferedRandom(io.BytesIO()))
                return "start"

            def step(self, message):
                return "on", 1.0, False

        env = make(Holding)
        td = respond(env, env.reset())
        after = env.step(td.copy())
        assert after["next", "reward"].flatten().tolist() == [1.0] * 3
        again = env.step(td.copy())["next"]
        told = columns.read_objects(again["env_failure"], again.batch_size)
        assert all("cannot be copied (pipe: TextIOWrapper)" in why for why in told)
        assert again["truncated"].all()
        assert set(again["stop_reason"].flatten().tolist()) == {StopReason.ERROR}
        with pytest.raises(TypeError, match=r"Holding holds what cannot be copied \(pipe: TextIOWrapper\)"):
            pickle.dumps(after["next", "episode"][0])
        on = env.step(respond(env, env.step_mdp(after)))["next"]
        assert on["reward"].flatten().tolist() == [1.0] * 3


class TestSeeds:
    def test_the_same_seed_gives_the_same_episodes(self):
        first, second, other = (make(Count, seed=seed, num_envs=8).reset()["query"] for seed in (3, 3, 4))
        assert first == second != other

    def test_a_group_plays_one_episode(self):
        td = make(Count, num_envs=3, repeats=4, group_repeats=True).reset()
        asked = [messages[0]["content"] for messages in td["query"]]
        assert [len(set(asked[i : i + 4])) for i in range(0, 12, 4)] == [1, 1, 1]
        assert len(set(asked)) == 3

    @pytest.mark.parametrize("size", [1, 2, 6])
    def test_whatever_the_layout(self, size):
        env = make(Count, num_envs=size)
        played = []
        while len(played) < 6:
            out = play(env, lambda td: respond(env, td, ["same"] * size))
            played += [[m["content"] for m in t.messages] for t in ledgers(out)]
        whole = make(Count, num_envs=6)
        out = play(whole, lambda td: respond(whole, td, ["same"] * 6))
        assert played[:6] == [[m["content"] for m in t.messages] for t in ledgers(out)]

    def test_a_draw_depends_on_seed_and_turn_alone(self):
        first, second = Count(), Count()
        first.seed = second.seed = 5
        first.random.random()  # a draw more in this turn
        for env in (first, second):
            env.turn = 1
            env.__dict__.pop("_random", None)
        assert first.random.random() == second.random.random()


class TestRows:
    """One row's fault is that row's alone."""

    @pytest.mark.parametrize(
        ("value", "why"),
        [
            (RuntimeError("broken"), "RuntimeError: broken"),
            ("text", "TypeError: .*expected \\(messages, reward, done\\)"),
            ((None, 1.0, False), "MessageError: .*goes on .* and says nothing"),
            (("on", "much", False), "TypeError: .*reward='much'"),
            (("on", float("nan"), False), "ValueError: .*finite"),
            (("on", 0.0, "no"), "TypeError: .*done='no'"),
            (([{"role": 3}], 0.0, False), "MessageError: what .*step returned.*"),
            (([{"role": "assistant", "content": "me"}], 0.0, False), "BridgeError|ChatTemplateError"),
        ],
    )
    def test_a_bad_step(self, value, why):
        class Bad(MessageEnv):
            dataset = [{"bad": flag} for flag in (False, True, False)]

            def reset(self, row):
                self.bad = row["bad"]
                return "start"

            def step(self, message):
                if self.bad and isinstance(value, Exception):
                    raise value
                return value if self.bad else Reply("on", 1.0)

        env = make(Bad, shuffle=False)
        after = env.step(respond(env, env.reset()))["next"]
        told = columns.read_objects(after["env_failure"], after.batch_size)
        assert told[0] == told[2] == ""
        assert re.search(why, told[1]), told[1]
        assert "dataset row 1" in told[1]
        assert after["truncated"].flatten().tolist() == [False, True, False]
        assert after["stop_reason"].flatten().tolist() == [0, StopReason.ERROR, 0]
        assert [len(t.messages) for t in ledgers(after)] == [3, 2, 3]

    @pytest.mark.parametrize("value", [RuntimeError("no start"), None, [{"role": 1}]])
    def test_a_bad_reset(self, value):
        class Bad(MessageEnv):
            dataset = [{"bad": flag} for flag in (False, True, False)]

            def reset(self, row):
                if row["bad"]:
                    if isinstance(value, Exception):
                        raise value
                    return value
                return "start"

            def step(self, message):
                return None, 1.0, True

        env = make(Bad, shuffle=False)
        with pytest.warns(RuntimeWarning, match="1 of 3 rows failed"):
            td = env.reset()
        after = env.step(respond(env, td))["next"]
        told = columns.read_objects(after["env_failure"], after.batch_size)
        assert [bool(why) for why in told] == [False, True, False]
        assert after["reward"].flatten().tolist() == [1.0, 0.0, 1.0]

    def test_rows_that_are_not_stepped(self):
        env = make(Count)
        td = respond(env, env.reset())
        td["_step"] = torch.tensor([[True], [False], [True]])
        after = env.step(td)["next"]
        assert [s.turn for s in after["episode"]] == [1, 0, 1]
        assert after["reward"].flatten()[1] == 0

    def test_what_makes_no_environment(self):
        with pytest.raises(TypeError, match="makes a int: expected a MessageEnv"):
            make(int)
        with pytest.raises(NotImplementedError, match="MessageEnv has no step"):
            MessageEnv().step({"role": "assistant", "content": ""})


class TestAsync:
    def test_a_batch_waits_together(self):
        class Slow(MessageEnv):
            here, most = 0, 0

            async def reset(self, row):
                await self._wait()
                return "start"

            async def step(self, message):
                await self._wait()
                return "on", float(self.turn), self.turn == 2

            async def _wait(self):
                Slow.here += 1
                Slow.most = max(Slow.most, Slow.here)
                await asyncio.sleep(0.05)
                Slow.here -= 1

        env = make(Slow, num_envs=16)
        out = play(env, lambda td: respond(env, td))
        assert out["reward"].flatten().tolist() == [3.0] * 16
        assert Slow.most == 16

    def test_a_deadline(self):
        class Hanging(MessageEnv):
            def reset(self, row):
                return "start"

            async def step(self, message):
                await asyncio.sleep(60 if message["content"].endswith("y") else 0)
                return None, 1.0, True

        env = make(Hanging, deadline=0.5)
        after = env.step(respond(env, env.reset(), ["a", "y", "b"]))["next"]
        assert after["reward"].flatten().tolist() == [1.0, 0.0, 1.0]
        assert "no reply within 0.5 s" in columns.read_objects(after["env_failure"], after.batch_size)[1]


class TestTools:
    def test_methods_and_functions(self):
        def double(x: int) -> int:
            """Twice."""
            return 2 * x

        class Both(MessageEnv):
            tools = (double, "add")

            def reset(self, row):
                self.total = 0
                return "go"

            def add(self, x: int) -> int:
                """Add to the total.

                Args:
                    x: how much.
                """
                self.total += x
                return self.total

            def step(self, message):
                return None, float(self.total), True

        env = make(Both, "text")
        names = [schema["function"]["name"] for schema in env.base_env.template_kwargs["tools"]]
        assert names == ["double", "add"]
        assert (
            env.base_env.template_kwargs["tools"][1]["function"]["parameters"]["properties"]["x"]["type"]
            == "integer"
        )
        lines = iter([[("add", 3), ("double", 4), ("add", 5)], [("add", 1)] * 3, None])

        def policy(td):
            calls = next(lines)
            written = [
                f'<tool_call>\n{{"name": "{n}", "arguments": {{"x": {x}}}}}\n</tool_call>' for n, x in calls or ()
            ]
            return respond(env, td, written or ["done"] * 3)

        out = play(env, policy)
        assert out["reward"].flatten().tolist() == [4.0, 1.0, 6.0]
        said = [[m["content"] for m in t.messages if m["role"] == "tool"] for t in ledgers(out)]
        assert said == [["3", "4"], ["8", "1"], ["5", "6"]]

    def test_a_tool_that_fails_is_told(self):
        env = make(GAMES["Shop"], "text", num_envs=1)
        call = '<tool_call>\n{"name": "buy", "arguments": {"article": "gold"}}\n</tool_call>'
        after = env.step(respond(env, env.reset(), [call]))["next"]
        assert "gold" in ledgers(after)[0].messages[-1]["content"]
        assert not after["done"].any()

    def test_a_name_of_no_method(self):
        class Wrong(MessageEnv):
            tools = ("nothing",)

        with pytest.raises(TypeError, match="Wrong.tools names 'nothing'"):
            make(Wrong)


@pytest.mark.parametrize(
    ("reply", "success"),
    [(Reply(None, 0.5, True), True), (Reply(None, 0.0, True), False), (Reply(None, 0.5, True, False), False)],
)
def test_success(reply, success):
    class Once(MessageEnv):
        def reset(self, row):
            return "start"

        def step(self, message):
            return reply

    env = make(Once)
    after = env.step(respond(env, env.reset()))["next"]
    assert after["success"].flatten().tolist() == [success] * 3
    assert after["graded"].all()


def test_a_budget_behind_it():
    env = make(Count).append_transform(Budget(max_turns=2))
    out = play(env, lambda td: respond(env, td))
    assert set(out["stop_reason"].flatten().tolist()) == {StopReason.MAX_TURNS}


@pytest.mark.parametrize(("turns", "expected"), [(9, 2), (1, 1)])
def test_closed_when_over_whoever_ends_it(turns, expected):
    closed = []

    class Closing(MessageEnv):
        def reset(self, row):
            return "start"

        def step(self, message):
            return "on", 0.0, self.turn == 2

        async def close(self):
            closed.append(self.turn)

    env = make(Closing).append_transform(Budget(max_turns=turns))
    play(env, lambda td: respond(env, td))
    assert closed == [expected] * 3


def test_one_that_cannot_be_closed_loses_no_other():
    closed = []

    class Stuck(MessageEnv):
        dataset = [{"number": number} for number in range(3)]

        def reset(self, row):
            self.number = row["number"]
            return "start"

        def step(self, message):
            return None, 1.0, True

        def close(self):
            if self.number == 1:
                raise RuntimeError("stuck")
            closed.append(self.number)

    env = make(Stuck, shuffle=False)
    with pytest.warns(RuntimeWarning, match=r"Stuck.close\(\) failed: RuntimeError: stuck"):
        after = env.step(respond(env, env.reset()))["next"]
    assert closed == [0, 2]
    assert after["reward"].flatten().tolist() == [1.0] * 3


class TestNames:
    def test_a_file(self, tmp_path):
        (tmp_path / "mine_of_a_test.py").write_text("class Env:\n    pass\n")
        found = named(f"{tmp_path}/mine_of_a_test.py:Env")
        assert found is named(f"{tmp_path}/mine_of_a_test.py:Env")
        assert pickle.loads(pickle.dumps(found)) is found

    @pytest.mark.parametrize("name", ["digits", "no.module:X", "json:nothing", "/no/file.py:X", ":x", "a:b:c"])
    def test_of_nothing(self, name):
        with pytest.raises(ValueError, match=name.replace(".", r"\.").split(":")[0] or "names nothing"):
            named(name)


def test_a_template_that_writes_no_tools_is_told():
    class Shop(MessageEnv):
        tools = ("buy",)

        def reset(self, row):
            return "Buy."

        def buy(self, article: str) -> str:
            return article

        def step(self, message):
            return None, 0.0, True

    with pytest.warns(
        RuntimeWarning, match=r"does not write the tools that it is given \(buy\).*no answer is read as a call"
    ):
        MessageChatEnv(Shop, tokenizer=tiny_tokenizer(TEXT_ALPHABET), input_mode="text")
    reads = tiny_tokenizer(TEXT_ALPHABET, tools=True)
    reads.chat_template = reads.chat_template.replace("{{ tools | tojson }}", "")
    with pytest.warns(RuntimeWarning, match="Say it in the system prompt"):
        MessageChatEnv(Shop, tokenizer=reads, input_mode="text")


def test_the_tiny_tokenizer_of_the_command_line_writes_tools():
    """A user's environment with tools is tried with the tiny model first."""
    tokenizer = tiny_tokenizer_for("examples/shop.py:Shop")
    assert ChatTemplate(tokenizer, tools=[{"name": "buy"}]).unwritten_tools() == []
    plain = [{"role": "user", "content": "?"}]
    assert ChatTemplate(tokenizer).render(plain) == ChatTemplate(tiny_tokenizer(TEXT_ALPHABET)).render(plain)
