"""Which rows of a batch a policy samples for: those that are stepped, and that a budget leaves something to sample."""

from __future__ import annotations

import sys
import types

import episodes
import pytest
import torch
from datasets import Dataset
from tensordict import TensorDict

from torchrl_chat import DatasetChatEnv, TransformersPolicy, columns
from torchrl_chat.models.proof import prover_of
from torchrl_chat.playing import play
from torchrl_chat.policies import ExactTransformersWrapper, VLLMPolicy
from torchrl_chat.transforms import Budget, StopReason, UserSimulator


class Seen:
    """How many rows went through a model, a number a call of ``generate``."""

    def __init__(self, model):
        self.rows: list[int] = []
        prover_of(model).sampling()  # which calls it, the first time
        model.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, _model, _args, kwargs):
        # A prompt has many tokens, and each sampled token is read alone.
        if kwargs["input_ids"].shape[1] > 1:
            self.rows.append(len(kwargs["input_ids"]))


def policies():
    """The policies in this process, and what they have seen."""
    for make in (
        lambda model: TransformersPolicy(model, episodes.tokenizer(), max_new_tokens=9, seeded=True),
        lambda model: ExactTransformersWrapper(
            model, tokenizer=episodes.tokenizer(), input_mode="tokens", generate_kwargs={"max_new_tokens": 9}
        ),
    ):
        model = episodes.model()
        yield make(model), Seen(model)


def rows(td, container, key):
    return columns.read_field(td[container], key, td.batch_size)


def test_the_others_are_left_out():
    """And nothing else changes: a row that is sampled has the ids that it has with all others beside it."""
    free = episodes.environment("tokens", 6)
    tight = episodes.environment("tokens", 6).append_transform(Budget(max_context=100))
    asked = TensorDict(
        query=["a", "b", "c" * 100, "d" * 100, "e", "f"], episode_seed=torch.arange(6) * 7, batch_size=(6,)
    )
    for act, seen in policies():
        whole = rows(act(free.reset(asked.copy())), "tokens", "response")
        td = tight.reset(asked.copy())
        td["_step"] = torch.tensor([True, False, True, True, True, False])
        held = columns.read_objects(td["transcript"], td.batch_size)
        td = act(td)
        assert seen.rows == [6, 2]
        for i, prompt in enumerate(held):
            sampled = whole[i].tolist() if i in (0, 4) else []
            if sampled:
                assert rows(td, "tokens", "response")[i].tolist() == sampled
            full, mask = rows(td, "tokens", "full")[i], rows(td, "masks", "all_assistant_mask")[i]
            assert full[: len(prompt)].tolist() == prompt.tokens.tolist()
            assert mask.tolist() == [False] * len(prompt) + [bool(sampled)] * (len(full) - len(prompt))
            assert int(mask.sum()) == len(sampled)
        following = tight.step(td)["next"]
        assert following["stop_reason"].flatten().tolist() == [0, 0, *[int(StopReason.CONTEXT_FULL)] * 2, 0, 0]
        for i, transcript in enumerate(columns.read_objects(following["transcript"], td.batch_size)):
            assert transcript.total_sampled == (len(whole[i]) if i in (0, 4) else 0)


def test_without_a_row_to_sample_the_model_is_not_called():
    env = episodes.environment("tokens", 3).append_transform(Budget(max_turn_tokens=9))
    for act, seen in policies():
        td = episodes.first(env)
        td["_step"] = torch.zeros(3, dtype=torch.bool)
        act(td)
        td = episodes.first(env)
        td["tokens_left"].zero_()
        act(td)
        assert not seen.rows


@pytest.mark.parametrize("mode", ["history", "text"])
def test_other_modes(mode):
    """The wrapper writes messages and texts of rows that it did not sample, too, and the environment takes them."""
    act = ExactTransformersWrapper(
        episodes.model(), tokenizer=episodes.tokenizer(), input_mode=mode, generate_kwargs={"max_new_tokens": 9}
    )
    env = episodes.environment(mode, 4).append_transform(Budget(max_context=60))
    td = env.reset(episodes.first(env).select("query", "episode_seed"))
    full = td["tokens_left"].flatten() == 0
    td["_step"] = torch.tensor([True, False, True, True])
    following = env.step(act(td))["next"]
    ended = following["stop_reason"].flatten() == int(StopReason.CONTEXT_FULL)
    assert ended[full & td["_step"]].all()


def test_a_row_that_is_too_long_ends_with_its_reason():
    """It samples nothing, and is over after its first step; the others are played to their end."""
    for act, seen in policies():
        fin = play(environment("a" * 200, 150), act)
        assert fin["stop_reason"].flatten().tolist()[0] == StopReason.CONTEXT_FULL
        assert StopReason.CONTEXT_FULL not in fin["stop_reason"].flatten().tolist()[1:]
        transcript = columns.read_objects(fin["transcript"], fin.batch_size)[0]
        assert not transcript.total_sampled
        assert seen.rows == [3] * len(seen.rows)


def environment(query: str, context: int):
    dataset = Dataset.from_dict({"query": [query, "b", "c", "d"], "answer": ["1"] * 4})
    env = DatasetChatEnv(
        dataset=dataset, tokenizer=episodes.tokenizer(), input_mode="tokens", num_envs=4, seed=0, shuffle=False
    )
    env = env.append_transform(UserSimulator(["more"] * 5))
    return env.append_transform(Budget(max_context=context, max_turns=2))


class Engine:
    """What ``VLLMPolicy`` asks of a ``vllm.LLM``: it says token 30 until it is cut."""

    def __init__(self, context: int):
        self.asked: list[int] = []
        self.model_config = types.SimpleNamespace(
            max_model_len=context,
            logprobs_mode="processed_logprobs",
            get_vocab_size=lambda: len(episodes.tokenizer()),
            try_get_generation_config=dict,
        )

    def generate(self, requests, params, use_tqdm):
        self.asked.append(len(requests))
        return [
            types.SimpleNamespace(
                num_cached_tokens=0,
                outputs=[
                    types.SimpleNamespace(
                        token_ids=[30] * given["max_tokens"],
                        logprobs=[{30: types.SimpleNamespace(logprob=-1.0)}] * given["max_tokens"],
                    )
                ],
            )
            for given in params
        ]


@pytest.mark.parametrize(("query", "asked"), [("a", [4, 4]), ("a" * 90, [4, 3]), ("a" * 200, [3, 3])])
def test_a_full_conversation_does_not_end_the_batch_of_vllm(monkeypatch, query, asked):
    """A row that fills the context, at its reset or after a turn, is not handed to the engine, which would refuse it."""
    stub, params = types.ModuleType("vllm"), types.ModuleType("vllm.sampling_params")
    stub.SamplingParams = lambda **settings: settings
    params.RequestOutputKind = types.SimpleNamespace(FINAL_ONLY=0)
    monkeypatch.setitem(sys.modules, "vllm", stub)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", params)
    engine = Engine(120)
    policy = VLLMPolicy(engine, episodes.tokenizer(), max_new_tokens=20)
    fin = play(environment(query, 120), policy)
    assert engine.asked == asked
    reasons = fin["stop_reason"].flatten().tolist()
    assert (reasons[0] == StopReason.CONTEXT_FULL) == (query != "a")
    assert reasons[1:] == [StopReason.MAX_TURNS] * 3
    [turn] = policy.sample([torch.tensor([5, 7])])
    assert turn.ids.tolist() == [30] * 20
    assert turn.log_probs.tolist() == [-1.0] * 20
    with pytest.raises(ValueError, match=r"row 1: its prompt of 120 tokens .* Budget\(max_context=...\)"):
        policy.generate([[5], [7] * 120])
