"""Transforms beside one another: their order does not matter, or is refused; appending them has one meaning everywhere."""

from __future__ import annotations

import ast
import gc
import itertools
import pickle
import re
import warnings
from pathlib import Path

import pytest
import torch
from conftest import CALLS_TEMPLATE as TOOLS
from conftest import bpe_tokenizer, respond
from tensordict import TensorDict
from torchrl.envs import StepCounter, Transform, TransformedEnv
from torchrl.envs.llm.transforms import PolicyVersion
from torchrl.envs.utils import check_env_specs
from torchrl.modules.llm.policies import Tokens

import torchrl_chat
from torchrl_chat import (
    Budget,
    ChatEnv,
    CountdownEnv,
    DatasetChatEnv,
    GSM8KEnv,
    NumberVerifier,
    RewardTransform,
    Toolbox,
    ToolExecutor,
    TransformersPolicy,
    UserSimulator,
    Verdict,
    columns,
    play,
    training_view,
)
from torchrl_chat.envs.transforming import TransformedChatEnv
from torchrl_chat.rewards import grades
from torchrl_chat.tiny import TEXT_ALPHABET, tiny_model, tiny_tokenizer
from torchrl_chat.transforms import EndOfDialogue, ModelUser, PythonInterpreter, StopReason

CALL = '<tool_call>\n{"name": "twice", "arguments": {"number": 4}}\n</tool_call>'
ROWS = [{"query": "2 * 4?", "answer": "8"}, {"query": "4 + 4?", "answer": "8"}, {"query": "9 - 1?", "answer": "8"}]


def twice(number: int) -> int:
    """Doubles.

    Args:
        number: what is doubled.
    """
    return 2 * number


def same(response, reference):
    return 1.0 if response.strip() == reference else 0.25


def dataset_env(mode="text", rows=ROWS, tools=(twice,), **options):
    toolbox = Toolbox(list(tools))
    settings = {"num_envs": len(rows), "shuffle": False, "input_mode": mode, **options}
    env = DatasetChatEnv(
        dataset=rows, tokenizer=bpe_tokenizer(TOOLS), template_kwargs={"tools": toolbox.schemas}, **settings
    )
    return env, toolbox


def ledgers(td):
    return columns.read_objects(td["transcript"], td.batch_size)


def roles(td):
    return [[m["role"] for m in ledger.messages if m["role"] != "system"] for ledger in ledgers(td)]


def caller(env, answer=lambda messages: "8", call=CALL):
    """A policy that calls the tool, and answers when it has replied."""

    def policy(td):
        texts = []
        for ledger in ledgers(td):
            last = ledger.messages[-1]
            texts.append(answer(ledger.messages) if last["role"] == "tool" else call)
        return respond(env, td, texts)

    return policy


REWARDS = {
    "a number": lambda: RewardTransform(same),
    "a verdict": lambda: RewardTransform(lambda r, a: Verdict(float(r == a), r, r == a)),
    "marked": lambda: RewardTransform(NumberVerifier()),
    "every turn": lambda: RewardTransform(grades("message")(lambda m, a: float(m["content"] == a)), when="turn"),
    "coroutine": lambda: RewardTransform(awaited),
}


async def awaited(response, reference):
    return float(response == reference)


ORDERS = list(itertools.permutations("RTB"))


class TestOrders:
    @pytest.mark.parametrize("reward", REWARDS)
    @pytest.mark.parametrize("order", ORDERS, ids=map("".join, ORDERS))
    def test_reward_tools_budget(self, order, reward):
        env, toolbox = dataset_env()
        make = {"R": REWARDS[reward], "T": lambda: ToolExecutor(toolbox), "B": lambda: Budget(max_turns=4)}
        for name in order:
            env = env.append_transform(make[name]())
        finished = play(env, caller(env))
        assert roles(finished) == [["user", "assistant", "tool", "assistant"]] * 3
        assert finished["reward"].flatten().tolist() == [1.0] * 3
        assert finished["success"].all()
        assert finished["graded"].all()
        assert finished["terminated"].all()
        assert not finished["truncated"].any()
        assert {StopReason(r) for r in finished["stop_reason"].flatten().tolist()} == {StopReason.ANSWERED}
        env.close()

    @pytest.mark.parametrize("order", ORDERS, ids=map("".join, ORDERS))
    def test_the_last_call_is_graded_when_a_limit_ends_the_episode(self, mode, order):
        """Whoever calls to the end is graded for it, once; else calls would be a way around a bad grade."""
        env, toolbox = dataset_env(mode)
        calls = []
        make = {
            "R": lambda: RewardTransform(lambda r, a: calls.append(r) or -1.0),
            "T": lambda: ToolExecutor(toolbox),
            "B": lambda: Budget(max_turns=2),
        }
        for name in order:
            env = env.append_transform(make[name]())
        finished = play(env, caller(env, answer=lambda messages: CALL))
        assert finished["reward"].flatten().tolist() == [-1.0] * 3
        assert len(calls) == 3
        assert finished["graded"].all()
        assert finished["truncated"].all()
        assert not finished["terminated"].any()
        assert finished["stop_reason"].flatten().tolist() == [StopReason.MAX_TURNS] * 3
        assert training_view(finished, layout="padded")["masks", "all_assistant_mask"].any(-1).all()

    @pytest.mark.parametrize("order", ORDERS, ids=map("".join, ORDERS))
    def test_an_answer_wins_over_a_limit_of_the_same_turn(self, order):
        env, toolbox = dataset_env()
        make = {
            "R": lambda: RewardTransform(same),
            "T": lambda: ToolExecutor(toolbox),
            "B": lambda: Budget(max_turns=2),
        }
        for name in order:
            env = env.append_transform(make[name]())
        finished = play(env, caller(env))
        assert finished["stop_reason"].flatten().tolist() == [StopReason.ANSWERED] * 3
        assert finished["terminated"].all()
        assert not finished["truncated"].any()

    @pytest.mark.parametrize("order", ["RD", "DR"])
    def test_what_is_done_is_graded_whatever_ends_it(self, order):
        """``when="done"`` in front of a limit, and behind it."""
        env, _ = dataset_env()
        make = {"R": lambda: RewardTransform(same, end_on_answer=False), "D": lambda: StepCounter(max_steps=1)}
        for name in order:
            env = env.append_transform(make[name]())
        finished = play(env, lambda td: respond(env, td, ["8", "9", "8"]))
        assert finished["reward"].flatten().tolist() == [1.0, 0.25, 1.0]
        assert finished["graded"].all()

    def test_parts_of_a_late_grade(self):
        from torchrl_chat import WeightedSum

        env, toolbox = dataset_env()
        weighed = WeightedSum({"same": (same, 2.0), "one": (lambda r, a: 1.0, 1.0)})
        env = env.append_transform(RewardTransform(weighed)).append_transform(ToolExecutor(toolbox))
        env = env.append_transform(Budget(max_turns=1))
        turns = iter([[CALL, "8", "7"]])
        finished = play(env, lambda td: respond(env, td, next(turns)))
        assert finished["reward"].flatten().tolist() == [1.5, 3.0, 1.5]
        assert finished["reward_parts", "same"].flatten().tolist() == [0.25, 1.0, 0.25]
        assert finished["reward_parts", "one"].flatten().tolist() == [1.0] * 3

    @pytest.mark.parametrize("order", ["TU", "UT"])
    def test_a_user_leaves_calls_alone(self, order):
        env, toolbox = dataset_env()
        make = {"T": lambda: ToolExecutor(toolbox), "U": lambda: UserSimulator(["And?"])}
        for name in order:
            env = env.append_transform(make[name]())
        finished = play(env, caller(env))
        assert (
            roles(finished)
            == [["user", "assistant", "tool", "assistant", "user", "assistant", "tool", "assistant"]] * 3
        )

    def test_a_reward_that_ends_dialogues_behind_the_user_is_refused(self):
        env, _ = dataset_env()
        spoken = env.append_transform(UserSimulator(["And?"]))
        with pytest.raises(ValueError, match=r"The order is: RewardTransform, UserSimulator"):
            spoken.append_transform(RewardTransform(same))
        graded = spoken.append_transform(RewardTransform(same, end_on_answer=False))
        finished = play(graded, lambda td: respond(graded, td, ["8", "8", "9"]))
        assert finished["reward"].flatten().tolist() == [1.0, 1.0, 0.25]
        first = env.append_transform(RewardTransform(NumberVerifier()))
        with pytest.raises(ValueError, match="The order is"):
            first.insert_transform(1, UserSimulator(["And?"]))

    def test_a_message_with_a_call_is_an_answer_where_nothing_runs_it(self):
        env, _ = dataset_env()
        env = env.append_transform(
            RewardTransform(grades("message")(lambda m, a: float(bool(m.get("tool_calls")))))
        )
        finished = play(env, lambda td: respond(env, td, [CALL, "8", CALL]))
        assert finished["reward"].flatten().tolist() == [1.0, 0.0, 1.0]
        assert finished["terminated"].all()

    @pytest.mark.parametrize("order", ["TS", "ST"])
    def test_several_executors(self, mode, order):
        """Each call goes to the one that has the tool, whichever stands in front; a call of none is answered once."""
        env, _ = dataset_env(mode, tools=(twice, same_sum))
        make = {"T": lambda: ToolExecutor([twice]), "S": lambda: ToolExecutor([same_sum])}
        for name in order:
            env = env.append_transform(make[name]())
        both = CALL + '\n<tool_call>\n{"name": "same_sum", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
        stepped = env.step(respond(env, env.reset(), [both, CALL.replace("twice", "thrice"), "8"]))["next"]
        replies = [[m["content"] for m in t.messages if m["role"] == "tool"] for t in ledgers(stepped)]
        assert replies[0] == ["8", "3"]
        assert len(replies[1]) == 1
        assert "thrice" in replies[1][0]
        assert replies[2] == []
        assert stepped["tool_calls"].flatten().tolist() == [2, 1, 0]
        assert stepped["tool_errors"].flatten().tolist() == [0, 1, 0]

    def test_fenced_code_is_a_call_of_the_interpreter(self):
        message = {"role": "assistant", "content": "```python\nprint(8)\n```"}
        assert PythonInterpreter().replies_to(message)
        assert not PythonInterpreter(fenced=False).replies_to(message)
        assert not PythonInterpreter().replies_to({"role": "assistant", "content": "8"})

    @pytest.mark.parametrize("order", ["RT", "TR"])
    def test_specs(self, mode, order):
        env, toolbox = dataset_env(mode)
        make = {"R": lambda: RewardTransform(same), "T": lambda: ToolExecutor(toolbox)}
        for name in order:
            env = env.append_transform(make[name]())
        check_env_specs(env)


class TestReadyMadeTasks:
    def test_the_tool_runs_before_the_dialogue_ends(self, mode):
        toolbox = Toolbox([twice])
        rows = [{"question": "2 * 4?", "answer": "#### 8"}] * 2
        env = GSM8KEnv(
            dataset=rows, tokenizer=bpe_tokenizer(TOOLS), num_envs=2, input_mode=mode,
            template_kwargs={"tools": toolbox.schemas},
        )  # fmt: skip
        env = env.append_transform(ToolExecutor(toolbox))
        finished = play(env, caller(env, answer=lambda messages: "#### " + messages[-1]["content"]))
        assert roles(finished) == [["user", "assistant", "tool", "assistant"]] * 2
        assert finished["reward"].flatten().tolist() == [1.0, 1.0]
        assert finished["step_count"].flatten().tolist() == [2, 2]

    def test_countdown_with_a_tool_and_a_user(self):
        toolbox = Toolbox([twice])
        rows = [{"query": "Reach 8 with 4 and 2.", "target": 8, "nums": [4, 2]}] * 2
        env = CountdownEnv(
            dataset=rows, tokenizer=bpe_tokenizer(TOOLS), num_envs=2, input_mode="tokens",
            template_kwargs={"tools": toolbox.schemas},
        )  # fmt: skip
        env = env.append_transform(ToolExecutor(toolbox)).append_transform(UserSimulator(["In tags, please."]))
        says = {"user": CALL, "tool": "It is 4 * 2.", "again": "<answer>4 * 2</answer>"}

        def policy(td):
            turns = [
                "again" if sum(m["role"] == "user" for m in t.messages) == 2 else t.messages[-1]["role"]
                for t in ledgers(td)
            ]
            return respond(env, td, [says[turn] for turn in turns])

        finished = play(env, policy)
        assert roles(finished) == [["user", "assistant", "tool", "assistant", "user", "assistant"]] * 2
        assert finished["success"].all()

    def test_without_anybody_who_replies_there_is_one_turn(self, mode):
        env = GSM8KEnv(dataset=ROWS[:2], tokenizer=bpe_tokenizer(), num_envs=2, shuffle=False, input_mode=mode)
        td = env.step(respond(env, env.reset(), ["#### 8", "no idea"]))["next"]
        assert td["done"].all()
        assert td["terminated"].flatten().tolist() == [True, False]
        assert td["truncated"].flatten().tolist() == [False, True]
        assert [StopReason(r).name for r in td["stop_reason"].flatten().tolist()] == ["ANSWERED", "TRUNCATED"]

    def test_a_number_of_turns_is_kept_to(self):
        toolbox = Toolbox([twice])
        env = GSM8KEnv(
            dataset=ROWS[:1], tokenizer=bpe_tokenizer(TOOLS), max_steps=2, input_mode="text",
            template_kwargs={"tools": toolbox.schemas},
        )  # fmt: skip
        env = env.append_transform(ToolExecutor(toolbox))
        finished = play(env, caller(env, answer=lambda messages: CALL))
        assert roles(finished) == [["user", "assistant", "tool", "assistant"]]
        assert finished["truncated"].all()
        assert finished["reward"].item() == 0.0
        assert finished["graded"].all()

    def test_what_stands_around_such_a_task_is_refused(self):
        toolbox = Toolbox([twice])
        task = GSM8KEnv(
            dataset=ROWS,
            tokenizer=bpe_tokenizer(TOOLS),
            input_mode="text",
            template_kwargs={"tools": toolbox.schemas},
        )
        for transform in (ToolExecutor(toolbox), UserSimulator(["And?"])):
            with pytest.raises(ValueError, match=r"env = env\.append_transform"):
                TransformedEnv(task, transform).reset()

    @pytest.mark.parametrize("name", ["gsm8k", "countdown", "digits"])
    def test_as_they_are_served(self, name, tmp_path):
        """``serve --env gsm8k --max-turns 4 --python-tool``: the tool's answer is not cut."""
        from torchrl_chat.openenv.gallery import factory_of
        from torchrl_chat.openenv.models import ChatAction

        path = tmp_path / "rows.jsonl"
        path.write_text(
            '{"question": "2 * 4?", "query": "2 * 4?", "answer": "#### 8", "target": 8, "nums": [4, 2]}\n'
        )
        factory, _ = factory_of(name, bpe_tokenizer(), data=str(path), python_tool=True, max_turns=4)
        served = factory()
        served.reset_turn()
        turn = served.step_turn(ChatAction(text="```python\nprint(2 * 4)\n```"))
        assert not turn.done
        assert turn.messages[-1]["content"].strip() == "8"
        assert served.step_turn(ChatAction(text="#### 8 <answer>4 * 2</answer>")).done

    def test_end_of_dialogue_by_itself(self):
        env, toolbox = dataset_env()
        env = env.append_transform(EndOfDialogue()).append_transform(ToolExecutor(toolbox))
        check_env_specs(env)
        finished = play(env, caller(env))
        assert roles(finished) == [["user", "assistant", "tool", "assistant"]] * 3
        assert finished["truncated"].all()


class Mark(Transform):
    """Writes its letter."""

    def __init__(self, letter: str):
        super().__init__()
        self.letter = letter

    def _step(self, tensordict, next_tensordict):
        marks = next_tensordict.get("marks", None)
        before = (
            [""] * next_tensordict.numel() if marks is None else columns.read_objects(marks, next_tensordict.shape)
        )
        next_tensordict.set(
            "marks", columns.objects([m + self.letter for m in before], next_tensordict.shape, None)
        )
        return next_tensordict

    def _reset(self, tensordict, tensordict_reset):
        return self._step(tensordict, tensordict_reset)


def marks(env) -> str:
    given = () if isinstance(env, DatasetChatEnv) else (TensorDict(query=["a"], batch_size=(1,)),)
    found = env.reset(*given).get("marks", None)
    return "" if found is None else columns.read_objects(found, torch.Size([1]))[0]


def bare_env():
    return ChatEnv(tokenizer=bpe_tokenizer(), input_mode="text")


def one_row():
    return DatasetChatEnv(dataset=ROWS[:1], tokenizer=bpe_tokenizer(), input_mode="text")


@pytest.mark.parametrize("make", [bare_env, one_row, lambda: bare_env().append_transform(StepCounter())])
class TestAppending:
    def test_a_new_environment_is_returned_and_the_old_one_stays_as_it_was(self, make):
        env = make()
        one = env.append_transform(Mark("a"))
        two = one.append_transform(Mark("b"))
        assert (marks(env), marks(one), marks(two)) == ("", "a", "ab")
        assert isinstance(one, TransformedChatEnv)
        assert type(two) is type(one)
        assert two.base_env is one.base_env
        assert (marks(two), marks(env)) == ("ab", "")

    def test_inserted(self, make):
        env = make().append_transform(Mark("a")).append_transform(Mark("b"))
        assert marks(env.insert_transform(-1, Mark("c"))) == "acb"
        assert marks(env) == "ab"
        with pytest.raises(ValueError, match="index is 9"):
            env.insert_transform(9, Mark("c"))

    def test_a_function(self, make):
        env = make().append_transform(lambda td: td.set("seen", torch.ones(1, 1)))
        given = () if isinstance(env, DatasetChatEnv) else (TensorDict(query=["a"], batch_size=(1,)),)
        assert env.reset(*given)["seen"].item() == 1
        with pytest.raises(TypeError, match="expected a Transform or a function"):
            env.append_transform("a word")

    def test_a_result_that_is_thrown_away_warns_at_the_next_reset(self, make):
        env = make()
        env.append_transform(Mark("a"))
        env.append_transform(Mark("b"))
        gc.collect()
        with pytest.warns(UserWarning, match=r"Mark and Mark had no effect.*env = env\.append_transform"):
            assert marks(env) == ""
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert marks(env) == ""  # once is enough

    def test_also_where_the_lost_one_was_made_in_two_steps(self, make):
        env = make()
        env.append_transform(Mark("a")).append_transform(Mark("b"))
        gc.collect()
        with pytest.warns(UserWarning, match="had no effect"):
            marks(env)

    @pytest.mark.parametrize("use", ["kept", "reset", "chained", "pickled", "stepped"])
    @pytest.mark.by_day(3)
    def test_nothing_is_said_of_one_that_is_used(self, make, use):
        env = make()
        one = env.append_transform(Mark("a"))
        if use == "reset":
            marks(one)
        elif use == "pickled":
            pickle.loads(pickle.dumps(one))
        elif use == "stepped":
            given = () if isinstance(env, DatasetChatEnv) else (TensorDict(query=["a"], batch_size=(1,)),)
            shaped = (
                env if hasattr(env, "base_env") else type("E", (), {"base_env": env, "batch_size": env.batch_size})
            )
            td = respond(shaped, env.reset(*given), ["8"])
            td["marks"] = columns.objects([""], torch.Size([1]), None)
            one.step(td)
        last = one.append_transform(Mark("b")) if use == "chained" else one if use == "kept" else None
        del one
        gc.collect()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert marks(env) == ""
        if last is not None:
            assert "a" in marks(last)

    def test_the_transform_that_the_caller_holds_is_at_work_in_the_newest(self, make):
        version = PolicyVersion()
        env = make().append_transform(version).append_transform(Mark("a"))
        given = () if isinstance(env, DatasetChatEnv) else (TensorDict(query=["a"], batch_size=(1,)),)
        before = env.reset(*given)["policy_version"]
        version.increment_version()
        assert (env.reset(*given)["policy_version"] == before + 1).all()


def test_what_torchrl_wraps_around_an_environment_is_torchrls():
    """``TransformedEnv`` itself changes in place, as torchrl's own code expects; it stands around, or on, ours."""
    env = TransformedEnv(one_row(), Mark("a"))
    env.append_transform(Mark("b"))
    assert marks_of(env) == "ab"


def marks_of(env) -> str:
    return columns.read_objects(env.reset()["marks"], torch.Size([1]))[0]


def test_a_collector_that_tracks_versions():
    from torchrl.collectors.llm import LLMCollector

    tokenizer = tiny_tokenizer(TEXT_ALPHABET)
    env = GSM8KEnv(dataset=ROWS, tokenizer=tokenizer, input_mode="tokens", num_envs=2)
    policy = TransformersPolicy(tiny_model(len(tokenizer)), tokenizer, max_new_tokens=4)
    collector = LLMCollector(
        env, policy=policy, dialog_turns_per_batch=2, total_dialog_turns=4, track_policy_version=True
    )
    versions = []
    for batch in collector:
        versions.append(set(batch["next", "policy_version"].flatten().tolist()))
        collector.increment_version()
    assert len(versions) == 2
    assert versions[0] != versions[1]
    collector.shutdown()


def test_a_resume_after_appending():
    """The old and the new environment draw from one sequence of episodes, and have one state."""
    env = DatasetChatEnv(dataset=ROWS, tokenizer=bpe_tokenizer(), input_mode="text", shuffle=False)
    new = env.append_transform(Mark("a"))
    assert [env.reset()["episode_row"].item(), new.reset()["episode_row"].item()] == [0, 1]
    again = DatasetChatEnv(dataset=ROWS, tokenizer=bpe_tokenizer(), input_mode="text", shuffle=False)
    again = again.append_transform(Mark("a"))
    again.load_state_dict(new.state_dict())
    assert again.reset()["episode_row"].item() == 2


def test_the_lines_of_the_documentation():
    """The four transforms of the page on tools, in the order in which they stand there."""
    page = (Path(torchrl_chat.__file__).parents[1] / "docs/environment/tools.md").read_text(encoding="utf-8")
    block = re.search(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[1]
    statements = [ast.unparse(node) for node in ast.parse(block).body]
    lines = [line for line in statements if line.startswith("env = env.append_transform(")]
    imported = [line for line in statements if line.startswith("from torchrl_chat.transforms ")]
    assert len(lines) == 4

    def search(words: str) -> str:
        """Searches.

        Args:
            words: what for.
        """
        return f"found {words}"

    rows = [{"query": "Hi", "script": ["And?"]}]
    env = DatasetChatEnv(
        dataset=rows, tokenizer=bpe_tokenizer(TOOLS), input_mode="text",
        template_kwargs={"tools": Toolbox([search]).schemas},
    )  # fmt: skip
    names = {"env": env, "tools": Toolbox([search])}
    exec("\n".join([*imported, *lines]), names)  # the document is this project's own
    env = names["env"]
    says = iter([
        "```python\nprint(6 * 7)\n```",
        '<tool_call>\n{"name": "search", "arguments": {"words": "x"}}\n</tool_call>',
        "Here it is.",
        "No more.",
    ])  # fmt: skip
    finished = play(env, lambda td: respond(env, td, [next(says)]))
    [ledger] = ledgers(finished)
    said = [(m["role"], m["content"].strip()) for m in ledger.messages if m["role"] in ("tool", "user")]
    assert said == [("user", "Hi"), ("tool", "42"), ("tool", "found x"), ("user", "And?")]
    assert finished["stop_reason"].item() == StopReason.ANSWERED
    env.close()


class TestNoticedEarly:
    def test_a_missing_column_of_the_dataset_is_noticed_when_the_reward_is_appended(self):
        env = DatasetChatEnv(dataset=[{"query": "a", "target": "b"}], tokenizer=bpe_tokenizer(), input_mode="text")
        with pytest.raises(KeyError, match=r"reads 'answer'.*'target'.*Pass reference_key"):
            env.append_transform(RewardTransform(same))
        with pytest.raises(KeyError, match=r"reads 'level'.*Pass row_keys"):
            env.append_transform(RewardTransform(same, reference_key="target", row_keys=["level"]))
        with pytest.raises(KeyError, match=r"reads 'b'.*Pass reference_key"):
            env.append_transform(RewardTransform(same, reference_key=["target", "b"]))
        with pytest.raises(KeyError, match=r"reads 'script'.*Pass script_key"):
            env.append_transform(UserSimulator(script_key="script"))
        with pytest.raises(KeyError, match=r"reads 'goal'.*Pass row_keys"):
            env.append_transform(UserSimulator(lambda m, row: "x", row_keys=["goal"]))
        group = grades("group")(lambda episodes: [1.0 for _ in episodes])
        with pytest.raises(KeyError, match=r"reads 'kind'.*Pass group_key"):
            env.append_transform(RewardTransform(group, reference_key="target", group_key="kind"))
        reward = RewardTransform(same, reference_key="target")
        td = env.append_transform(reward).reset()  # and the environment is as it was, whatever was refused
        assert columns.read_objects(td["target"], td.batch_size) == ["b"]

    def test_of_another_environment_at_the_reset(self):
        env = bare_env().append_transform(RewardTransform(same))
        with pytest.raises(KeyError, match=r"reads 'answer'.*Pass reference_key"):
            env.reset(TensorDict(query=["a"], batch_size=(1,)))
        td = env.reset(TensorDict(query=["a"], answer=["b"], batch_size=(1,)))
        assert env.step(respond(env, td, ["b"]))["next", "reward"].item() == 1.0

    def test_tools_without_their_schemas_in_the_template_warn(self):
        toolbox = Toolbox([twice])

        def env(**template):
            made = ChatEnv(tokenizer=bpe_tokenizer(TOOLS), input_mode="text", template_kwargs=template)
            return made.append_transform(ToolExecutor(toolbox))

        start = TensorDict(query=["a"], batch_size=(1,))
        for lacking in ({}, {"tools": Toolbox([same_sum]).schemas}):
            with pytest.warns(
                RuntimeWarning, match=r"not told of twice.*template_kwargs=\{'tools': toolbox\.schemas\}"
            ):
                env(**lacking).reset(start)
        with pytest.warns(RuntimeWarning, match="not told of twice"):
            ChatEnv(input_mode="history").append_transform(ToolExecutor(toolbox)).reset(start)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            told = env(tools=toolbox.schemas)
            told.reset(start)
            env(parse_tool_calls=True).reset(start)  # the prompt tells of them in its own words

    @pytest.mark.parametrize("kind", ["policy", "model"])
    def test_a_policy_is_no_user(self, kind):
        tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        model = tiny_model(len(tokenizer))
        user = TransformersPolicy(model, tokenizer, max_new_tokens=4) if kind == "policy" else model
        with pytest.raises(TypeError, match=r"ModelUser\(model, tokenizer\).*EndpointUser"):
            UserSimulator(user)
        UserSimulator(ModelUser(model, tokenizer))


def same_sum(a: int, b: int) -> int:
    """Adds.

    Args:
        a: one.
        b: other.
    """
    return a + b


class TestCutTurns:
    """A turn that its limit has cut: what is whole in it is run, what is broken is answered."""

    @pytest.mark.parametrize("length", ["whole", "broken"])
    def test_calls(self, mode, length):
        env, toolbox = dataset_env(mode, ROWS[:1])
        env = env.append_transform(ToolExecutor(toolbox))
        text = CALL if length == "whole" else CALL + "\n" + CALL[:-15]
        td = respond(env, env.reset(), [text])
        ids = [torch.tensor(row) for row in env.base_env.template.codec.encode([text])]
        td["tokens"] = columns.ragged(Tokens, "response", ids, td.batch_size, None)
        td["finish_reason"] = columns.objects(["length"], td.batch_size, None)
        stepped = env.step(td)["next"]
        [ledger] = ledgers(stepped)
        replies = [m["content"] for m in ledger.messages if m["role"] == "tool"]
        assert replies[0] == "8"
        assert stepped["tool_calls"].item() == (1 if length == "whole" else 2)
        assert stepped["tool_errors"].item() == (0 if length == "whole" else 1)
        assert ledger.tokens[ledger.mask].tolist() == ids[0].tolist()
        assert not stepped["done"].any()
