"""The ready-made environments: specs, rewards, order, splits, and the offline route, in all modes and batch sizes."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from conftest import bpe_tokenizer, need_shared, of_the_day, respond
from torchrl.envs.utils import check_env_specs

from torchrl_chat import CountdownEnv, GSM8KEnv, IFEvalEnv, MATHEnv, ReasoningGymEnv, columns, training_view
from torchrl_chat.rewards import Verdict, WeightedSum, grades


class Kind(NamedTuple):
    """An environment, and answers to its rows."""

    make: Callable[..., Any]
    right: Callable[[Any, Any], str]  # of the row's reference, and of its question
    wrong: str
    malformed: str


GSM = [
    {"question": f"What is {n} + {n}?", "answer": f"{n}+{n}=<<{n}+{n}={2 * n}>>{2 * n}\n#### {2 * n}"}
    for n in range(99)
]
MATH = [
    {
        "problem": f"Halve $\\frac{{{n}}}{{7}}$.",
        "solution": f"It is $\\boxed{{\\frac{{{n}}}{{14}}}}$.",
        "level": "Level 1",
    }
    for n in range(1, 99)
]
IFEVAL = [
    {
        "prompt": f"Say {word} without commas.",
        "instruction_id_list": ["punctuation:no_comma", "keywords:existence"],
        "kwargs": [{}, {"keywords": [word]}],
    }
    for word in ("apple", "river", "stone", "cloud") * 20
]


def of_file(kind: type, rows: list[dict], **defaults: Any) -> Callable[..., Any]:
    return lambda **kwargs: kind(dataset=rows, **defaults | kwargs)


KINDS = {
    "gsm8k": Kind(of_file(GSM8KEnv, GSM), lambda a, q: a, "#### -1", "no idea"),
    "math": Kind(of_file(MATHEnv, MATH), lambda a, q: a, "\\boxed{\\frac{1}{15}}", "\\boxed{\\frac{1}{"),
    "ifeval": Kind(
        of_file(IFEvalEnv, IFEVAL), lambda a, q: f"{a['kwargs'][1]['keywords'][0]} it is", "well, no", "  "
    ),
    "countdown": Kind(
        lambda **kwargs: CountdownEnv(size=80, **{"seed": 3} | kwargs),
        lambda a, q: f"<answer>{solved(a)}</answer>",
        "<answer>1 + 1</answer>",
        "<answer>2 ** 9</answer>",
    ),
    "reasoning": Kind(
        lambda **kwargs: ReasoningGymEnv(
            "chain_sum", size=80, task_kwargs={"min_terms": 2, "max_terms": 2}, **{"seed": 3} | kwargs
        ),
        lambda a, q: f"<answer>{a}</answer>",
        "<answer>-123456</answer>",
        "<answer></answer>",
    ),
}


def solved(reference: dict) -> str:
    """An expression for a Countdown problem, by trying."""
    items = [(n, str(n)) for n in reference["nums"]]

    def search(items: list) -> str | None:
        if len(items) == 1:
            return items[0][1] if items[0][0] == reference["target"] else None
        for i, (a, x) in enumerate(items):
            for j, (b, y) in enumerate(items):
                if i == j:
                    continue
                rest = [item for k, item in enumerate(items) if k not in (i, j)]
                made = [(a + b, f"({x} + {y})"), (a - b, f"({x} - {y})"), (a * b, f"({x} * {y})")]
                if b and a % b == 0:
                    made.append((a // b, f"({x} / {y})"))
                for item in made:
                    if found := search([*rest, item]):
                        return found
        return None

    found = search(items)
    assert found is not None
    return found


@pytest.fixture(params=KINDS)
def kind(request) -> Kind:
    if request.param == "reasoning":
        pytest.importorskip("reasoning_gym")
    return KINDS[request.param]


def test_check_env_specs(kind, mode):
    env = kind.make(tokenizer=bpe_tokenizer(), input_mode=mode, num_envs=2, repeats=2)
    check_env_specs(env, break_when_any_done="both")


@pytest.mark.parametrize("size", of_the_day(1, 8, 64))
def test_right_wrong_and_malformed(kind, mode, size):
    env = kind.make(tokenizer=bpe_tokenizer(), input_mode=mode, num_envs=size, max_steps=1)
    td = env.reset()
    answers = td["answer"] if isinstance(td["answer"], list) else td["answer"].tolist()
    texts = [
        (kind.right(answer, question), kind.wrong, kind.malformed)[i % 3]
        for i, (answer, question) in enumerate(zip(answers, td["query"], strict=True))
    ]
    following = env.step(respond(env, td, texts))["next"]
    success = following["success"].flatten().tolist()
    assert success == [i % 3 == 0 for i in range(size)]
    rewards = following["reward"]
    assert rewards.shape == (size, 1, 1)
    assert rewards.dtype == torch.float32
    assert all(r == 1 for r in rewards.flatten()[::3].tolist())
    assert all(r < 1 for i, r in enumerate(rewards.flatten().tolist()) if i % 3)
    assert following["done"].all()
    assert following["graded"].all()
    assert following["grade_failure"] == [""] * size
    references = td["index"] if isinstance(env, ReasoningGymEnv) else answers
    assert [verdict.correct for verdict in env.score(texts, list(references))] == success


def test_same_seed_same_order(kind):
    def queries(seed: int) -> list[str]:
        env = kind.make(tokenizer=bpe_tokenizer(), num_envs=4, seed=seed, shuffle=True)
        return [query for _ in range(4) for query in env.reset()["query"]]

    assert queries(5) == queries(5)
    assert queries(5) != queries(6)


def test_pickles(kind):
    env = pickle.loads(pickle.dumps(kind.make(tokenizer=bpe_tokenizer(), num_envs=1, input_mode="text")))
    td = env.reset()
    answer = td["answer"][0] if isinstance(td["answer"], list) else td["answer"].tolist()[0]
    following = env.step(respond(env, td, [kind.right(answer, td["query"][0])]))["next"]
    assert following["success"].all()


class TestRealRows:
    def test_math500(self):
        path = need_shared("data/math500/test.jsonl")
        env = MATHEnv(dataset=str(path), tokenizer=bpe_tokenizer(), num_envs=64, shuffle=False, split="test")
        td = env.reset()
        following = env.step(respond(env, td, [f"So it is $\\boxed{{{a}}}$." for a in td["answer"]]))["next"]
        assert following["success"].all()
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert all(verdict.correct for verdict in env.score([row["solution"] for row in rows]))

    def test_ifeval(self):
        path = need_shared("data/ifeval/input_data.jsonl")
        env = IFEvalEnv(
            dataset=str(path), tokenizer=bpe_tokenizer(), num_envs=541, shuffle=False, batch_size_dl=541
        )
        following = env.step(respond(env, env.reset(), ["A plain answer."] * 541))["next"]
        parts = following["reward_parts"]
        assert following["graded"].all()
        assert 0 < parts["prompt_strict"].mean() < parts["instruction_strict"].mean() < 1
        assert (parts["prompt_loose"] >= parts["prompt_strict"]).all()

    def test_gsm8k_offline(self):
        path = need_shared("data/gsm8k/test.jsonl")
        env = GSM8KEnv(dataset=str(path), tokenizer=bpe_tokenizer())
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert all(verdict.correct for verdict in env.score([row["answer"] for row in rows]))
        assert not any(verdict.correct for verdict in env.score(["#### -77777"] * len(rows)))
        with pytest.raises(ValueError, match="2 predictions for 1319 references"):
            env.score(["1", "2"])


class TestCountdown:
    def test_no_problem_is_in_both_splits(self):
        def problems(split: str, seed: int) -> set[str]:
            env = CountdownEnv(
                size=200, seed=seed, split=split, tokenizer=bpe_tokenizer(), num_envs=200, numbers=(3,), high=20
            )
            return {f"{sorted(answer['nums'])} {answer['target']}" for answer in env.reset()["answer"]}

        train, test = problems("train", 1), problems("test", 2)
        assert len(train) == len(test) == 200
        assert not train & test

    def test_own_rows(self):
        rows = [{"query": "Make 7.", "target": 7, "nums": [3, 4]}]
        env = CountdownEnv(dataset=rows, tokenizer=bpe_tokenizer(), input_mode="text", format_reward=0.1)
        td = env.reset()
        assert env.step(respond(env, td, ["<answer>3 + 4</answer>"]))["next", "reward"].item() == 1
        assert env.step(respond(env, td, ["<answer>3 * 4</answer>"]))["next", "reward"].item() == pytest.approx(0.1)

    @pytest.mark.parametrize(
        ("kwargs", "match"), [({"split": "dev"}, "'train' or 'test'"), ({"size": 0}, "size=0")]
    )
    def test_bad_arguments(self, kwargs, match):
        with pytest.raises(ValueError, match=match):
            CountdownEnv(tokenizer=bpe_tokenizer(), **kwargs)


class TestOptions:
    def test_an_unknown_option_names_those_that_there_are(self):
        with pytest.raises(TypeError, match="no option 'formt_reward'.*format_reward, last_number"):
            GSM8KEnv(dataset=GSM, tokenizer=bpe_tokenizer(), formt_reward=0.1)

    def test_a_row_without_a_reference(self):
        with pytest.raises(KeyError, match=r"'gsm8k' has no reference.*it has question"):
            GSM8KEnv(dataset=[{"question": "?"}], tokenizer=bpe_tokenizer())

    def test_another_verifier_with_components(self):
        reward = WeightedSum({"right": lambda r, ref: r == "yes", "brief": (lambda r, _: len(r) < 4, 0.5)})
        env = GSM8KEnv(dataset=GSM, tokenizer=bpe_tokenizer(), input_mode="text", num_envs=2, verifier=reward)
        following = env.step(respond(env, env.reset(), ["yes", "perhaps"]))["next"]
        assert following["reward"].flatten().tolist() == [1.5, 0.0]
        assert following["reward_parts", "right"].flatten().tolist() == [1.0, 0.0]
        assert following["reward_parts", "brief"].shape == (2, 1, 1)
        check_env_specs(env, break_when_any_done="both")

    def test_groups_see_each_other(self):
        @grades("group")
        def longest(episodes):
            best = max(len(e.response) for e in episodes)
            return [Verdict(float(len(e.response) == best), e.response, True) for e in episodes]

        env = GSM8KEnv(
            dataset=GSM, tokenizer=bpe_tokenizer(), input_mode="text", num_envs=2, repeats=3, group_repeats=True,
            verifier=longest,
        )  # fmt: skip
        following = env.step(respond(env, env.reset(), ["a", "bbb", "cc", "dd", "d", "dd"]))["next"]
        assert following["reward"].flatten().tolist() == [0, 1, 0, 1, 0, 1]

    def test_only_what_is_done_is_graded(self):
        from torchrl.envs import StepCounter

        from torchrl_chat import DatasetChatEnv, RewardTransform

        asked = []

        def verifier(response, reference):
            asked.append(response)
            return 1.0

        rows = [{"query": "a", "answer": "x"}]
        env = DatasetChatEnv(dataset=rows, tokenizer=bpe_tokenizer(), input_mode="text", num_envs=2)
        env = env.append_transform(StepCounter(max_steps=2))
        env = env.append_transform(RewardTransform(verifier, end_on_answer=False))
        td = env.step(respond(env, env.reset(), ["one", "two"]))
        assert asked == []
        assert not td["next", "graded"].any()
        td = env.step(respond(env, env.step_mdp(td), ["three", "four"]))["next"]
        assert asked == ["three", "four"]
        assert td["graded"].all()
        assert td["reward"].flatten().tolist() == [1, 1]

    @pytest.mark.parametrize("on_failure", ["score", "mask"])
    def test_failures_have_a_reason_and_may_be_masked(self, on_failure):
        def verifier(response, reference):
            if response == "bad":
                raise RuntimeError("no grade")
            return Verdict(1.0, response, True)

        env = GSM8KEnv(
            dataset=GSM, tokenizer=bpe_tokenizer(), input_mode="tokens", num_envs=2, verifier=verifier,
            failure_score=-0.5, on_failure=on_failure,
        )  # fmt: skip
        with pytest.warns(RuntimeWarning, match="1 of 2 grades failed"):
            following = env.step(respond(env, env.reset(), ["good", "bad"]))["next"]
        assert following["reward"].flatten().tolist() == [1.0, -0.5]
        assert following["grade_failure"] == ["", "error: RuntimeError: no grade"]
        assert following["graded"].flatten().tolist() == [True, on_failure == "score"]
        masks = training_view(following)["masks"].get("all_assistant_mask", as_list=True)
        assert [bool(mask.any()) for mask in masks] == [True, on_failure == "score"]


class TestRowsThatAreNotStepped:
    def test_they_are_not_graded_again(self):
        seen = []

        def verifier(response, reference):
            seen.append(response)
            return Verdict(1.0, response if response == "stop" else None, True)

        env = GSM8KEnv(
            dataset=GSM, tokenizer=bpe_tokenizer(), input_mode="text", num_envs=2, verifier=verifier, max_steps=0
        )
        td = env.step(respond(env, env.reset(), ["stop", "go"]))
        assert td["next", "done"].flatten().tolist() == [True, False]
        root = respond(env, env.step_mdp(td), ["again", "stop"])
        root["_step"] = torch.tensor([False, True])
        following = env.step(root)["next"]
        assert seen == ["stop", "go", "stop"]
        assert following["reward"].flatten().tolist() == [0.0, 1.0]
        assert following["graded"].flatten().tolist() == [False, True]

    def test_a_failed_grade_ends_the_dialogue(self):
        def verifier(response, reference):
            raise RuntimeError("no grade")

        env = GSM8KEnv(dataset=GSM, tokenizer=bpe_tokenizer(), input_mode="text", verifier=verifier, max_steps=0)
        with pytest.warns(RuntimeWarning, match="no grade"):
            assert env.step(respond(env, env.reset(), ["x"]))["next", "done"].all()

    def test_options_beside_a_verifier_are_refused(self):
        with pytest.raises(TypeError, match="no argument 'repeets'"):
            GSM8KEnv(dataset=GSM, tokenizer=bpe_tokenizer(), verifier=lambda r, _: 1.0, repeets=4)

    def test_a_rollout_whose_rows_end_at_different_times(self, mode):
        """torchrl leaves finished rows as they are, while the others go on."""
        from torchrl.envs import Transform

        class Ask(Transform):
            def _step(self, tensordict, next_tensordict):
                over, goes = next_tensordict["done"].flatten().tolist(), columns.stepped(tensordict)
                says = ["more?" if going and not done else None for done, going in zip(over, goes, strict=True)]
                return self.parent.base_env.append_messages(next_tensordict, says)

        env = GSM8KEnv(
            dataset=GSM, tokenizer=bpe_tokenizer(), input_mode=mode, num_envs=2, max_steps=4,
            verifier=lambda response, _: Verdict(1.0, response if "stop" in response else None, True),
        )  # fmt: skip
        env = env.append_transform(Ask())
        turns = iter([["stop", "go on with it"], ["x", "and on"], ["x", "stop"]])

        def policy(td):
            return respond(env, td, next(turns))

        rollout = env.rollout(3, policy, break_when_any_done=False, break_when_all_done=True)
        assert rollout["next", "done"].squeeze(-1).tolist() == [[True, True, True], [False, False, True]]
        first, second = columns.read_objects(rollout[:, -1]["next", "transcript"], torch.Size([2]))
        assert [m["content"] for m in first.messages if m["role"] == "assistant"] == ["stop"]
        assert [m["content"] for m in second.messages if m["role"] == "assistant"] == [
            "go on with it",
            "and on",
            "stop",
        ]
        assert rollout["next", "reward"][:, -1].flatten().tolist() == [1.0, 1.0]
