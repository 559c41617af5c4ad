"""``TransformersPolicy``: exact ids, and log-probs of exactly those ids."""

from __future__ import annotations

import sys

import episodes
import pytest
import torch
from conftest import bpe_tokenizer, of_the_day
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict, lazy_stack
from torchrl.data import LazyStackStorage, ReplayBuffer
from torchrl.objectives.llm.grpo import GRPOLoss

from torchrl_chat import ChatEnv, ChatTemplate, TransformersPolicy, columns
from torchrl_chat.conversation import Turn, answer
from torchrl_chat.models.sampling import GumbelNoise, default_stop_ids, stream_seed
from torchrl_chat.policies import Policy, Prompt, VLLMPolicy
from torchrl_chat.policies.writing import read_prompts, read_seeds, write_answers
from torchrl_chat.tiny import tiny_model, tiny_tokenizer


def policy(tokenizer=None, **kwargs) -> TransformersPolicy:
    tokenizer = tokenizer or bpe_tokenizer()
    kwargs = {"max_new_tokens": 7, "generator": torch.Generator().manual_seed(0), **kwargs}
    return TransformersPolicy(tiny_model(len(tokenizer), seed=1), tokenizer, **kwargs)


def reference_log_probs(model, ids: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-prob of every token after the first, by one unpadded forward pass."""
    logits = model(input_ids=ids[None]).logits[0, :-1].float() / temperature
    return logits.log_softmax(-1).gather(-1, ids[1:, None]).squeeze(-1)


def start(mode: str, rows: int = 4) -> tuple[ChatEnv, TensorDict]:
    env = ChatEnv(input_mode=mode, tokenizer=bpe_tokenizer(), batch_size=(rows,))
    return env, env.reset(TensorDict(query=[f"what is {'1 + ' * i}2" for i in range(rows)], batch_size=(rows,)))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_over_turns(mode, temperature):
    """Over a ragged multi-turn episode, the carried log-probs are those of one forward pass over the result."""
    act = policy(temperature=temperature)
    env, td = start(mode)
    for turn in range(3):
        td = env.step_mdp(env.step(act(td)))
        if turn < 2:
            td = env.append_messages(td, [f"and {'then ' * i}?" for i in range(4)])
    for transcript in columns.read_objects(td["transcript"], td.batch_size):
        assert transcript.scored
        with torch.no_grad():
            expected = reference_log_probs(act.model, transcript.tokens, temperature)
        mask = transcript.mask[1:]
        assert torch.allclose(transcript.log_probs[1:][mask], expected[mask], atol=1e-5)
        assert mask.sum() > 3


def test_shapes_and_masks(mode):
    env, td = start(mode)
    prompts = columns.read_field(td["tokens"], "prompt", td.batch_size)
    td = policy()(td)

    def rows(container, key):
        return columns.read_field(td[container], key, td.batch_size)

    for i, prompt in enumerate(prompts):
        response = rows("tokens", "response")[i]
        assert rows("tokens", "full")[i].tolist() == prompt.tolist() + response.tolist()
        assert rows("log_probs", "full")[i].shape == rows("tokens", "full")[i].shape
        assert rows("masks", "all_assistant_mask")[i].tolist() == [False] * len(prompt) + [True] * len(response)
        assert rows("masks", "all_attention_mask")[i].all()
        assert rows("text", "response")[i] == env.tokenizer.decode(response)
    env.step(td)


def test_rows_do_not_depend_on_padding():
    act = policy(temperature=0)
    env, td = start("tokens", 4)
    together = columns.read_field(act(td)["tokens"], "response", td.batch_size)
    for i in range(4):
        alone = act.generate([columns.read_field(td["tokens"], "prompt", td.batch_size)[i]])[0][0]
        assert alone.tolist() == together[i].tolist()
    assert env.batch_size == (4,)


def test_stop_token_is_kept_and_nothing_follows():
    tokenizer = tiny_tokenizer()
    act = policy(tokenizer, max_new_tokens=40)
    prompts = [torch.tensor(tokenizer("last(1,2)=")["input_ids"])] * 64
    ids, scores = act.generate(prompts)
    stop = tokenizer.eos_token_id
    ended = [row for row in ids if stop in row.tolist()]
    assert ended
    for row, score in zip(ids, scores, strict=True):
        assert row.tolist().count(stop) <= 1
        assert stop not in row.tolist()[:-1]
        assert len(row) == len(score) <= 40
        assert len(row) == 40 or row[-1] == stop


def test_same_generator_same_sample():
    _, td = start("tokens")
    first = columns.read_field(policy()(td.copy())["tokens"], "response", td.batch_size)
    second = columns.read_field(policy()(td.copy())["tokens"], "response", td.batch_size)
    assert [row.tolist() for row in first] == [row.tolist() for row in second]


@pytest.mark.parametrize("strategy", ["sft", "rlhf"])
def test_grpo_loss_sees_the_sampling_distribution(strategy):
    """Before any update the effective sample size is 1 and the approximate KL 0, also on a second turn."""
    act = policy(temperature=0.8)
    env, td = start("tokens", 8)
    td = act(env.append_messages(env.step_mdp(env.step(act(td))), ["go on"] * 8))
    td["advantage"] = torch.randn(8, 1, 1)
    buffer = ReplayBuffer(storage=LazyStackStorage(8), batch_size=8)
    buffer.extend(lazy_stack(list(td.unbind(0))))
    loss = GRPOLoss(act, masking_strategy=strategy)(buffer.sample())
    assert loss.ESS.item() == pytest.approx(1.0, abs=1e-4)
    assert abs(loss.kl_approx.item()) < 1e-5
    loss.loss_objective.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in act.model.parameters())


def test_ids_beyond_the_vocabulary_are_never_sampled():
    """Models pad their embeddings: Qwen2.5 has 151,936 rows for 151,665 tokens."""
    tokenizer = bpe_tokenizer()
    model = tiny_model(len(tokenizer) + 500, seed=1)
    act = TransformersPolicy(model, tokenizer, max_new_tokens=20, generator=torch.Generator().manual_seed(0))
    env, td = start("tokens", 8)
    td = act(td)
    env.step(td)
    assert act.get_dist(td).logits.shape[-1] == len(tokenizer)


def test_bad_arguments():
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        policy(max_new_tokens=0)
    with pytest.raises(ValueError, match="temperature is -1"):
        policy(temperature=-1)
    with pytest.raises(KeyError, match=r"\('tokens', 'prompt'\)"):
        policy()(TensorDict(batch_size=(1,)))
    with pytest.raises(ValueError, match="takes no generator"):
        policy(seeded=True)


@pytest.mark.parametrize("mode", of_the_day("text", "tokens", "history"))
def test_acceptance(mode):
    """64 ragged episodes with tools: log-probs, effective sample size, and both again after an optimizer step."""
    act = TransformersPolicy(
        episodes.model(extra=3), episodes.tokenizer(), max_new_tokens=24, temperature=0.8, seeded=True
    )
    lengths = []
    for _ in range(2):
        td, count = episodes.play(episodes.environment(mode), act)
        assert episodes.check(td, count, act.model, 0.8) < 1e-4
        loss = episodes.losses(td, act)
        assert loss.ESS.item() == pytest.approx(1.0, abs=1e-4)
        assert abs(loss.kl_approx.item()) < 1e-5
        episodes.one_step(td, act)
        lengths.append([len(t) for t in columns.read_objects(td["transcript"], td.batch_size)])
    assert lengths[0] != lengths[1], "the step changed the policy"
    assert episodes.check(td, count, act.model, 0.8) > 1e-2, "log-probs of before the update are others"


class TestSeeded:
    def act(self, **options) -> TransformersPolicy:
        return policy(generator=None, seeded=True, **options)

    def rows(self, count: int = 12) -> tuple[list[torch.Tensor], list[int]]:
        _, td = start("tokens", count)
        return columns.read_field(td["tokens"], "prompt", td.batch_size), [97 * i - 300 for i in range(count)]

    @settings(max_examples=25, deadline=None)
    @given(st.lists(st.integers(0, 11), min_size=1, max_size=16))
    def test_rows_do_not_depend_on_their_neighbours(self, places):
        """Any rows, in any order, some of them twice, with any padding beside them."""
        act, (prompts, seeds) = self.act(), self.rows()
        reference = [row.tolist() for row in act.generate(prompts, seeds=seeds)[0]]
        ids, scores = act.generate([prompts[i] for i in places], seeds=[seeds[i] for i in places])
        assert [row.tolist() for row in ids] == [reference[i] for i in places]
        assert all(len(row) == len(score) for row, score in zip(ids, scores, strict=True))

    def test_a_conversation_goes_on_alike_in_another_batch(self):
        act = TransformersPolicy(episodes.model(), episodes.tokenizer(), max_new_tokens=12, seeded=True)
        env = episodes.environment("tokens", 16)
        td, _ = episodes.play(env, act)
        whole = [t.tokens.tolist() for t in columns.read_objects(td["transcript"], td.batch_size)]
        half = episodes.environment("tokens", 8)
        td, _ = episodes.play(half, act)
        assert [t.tokens.tolist() for t in columns.read_objects(td["transcript"], td.batch_size)] == whole[:8]

    def test_other_seeds_and_other_turns_sample_otherwise(self):
        act, (prompts, _) = self.act(), self.rows(2)
        ids, _ = act.generate([prompts[0]] * 8, seeds=[*range(7), 0])
        assert len({tuple(row.tolist()) for row in ids}) == 7
        longer = torch.cat((prompts[0], prompts[0][-1:]))
        again, _ = act.generate([longer], seeds=[0])
        assert again[0].tolist() != ids[0].tolist()

    def test_global_random_state_is_neither_read_nor_changed(self):
        act, (prompts, seeds) = self.act(), self.rows()
        state = torch.get_rng_state()
        first, _ = act.generate(prompts, seeds=seeds)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(5)
        second, _ = act.generate(prompts, seeds=seeds)
        assert [r.tolist() for r in first] == [r.tolist() for r in second]

    @pytest.mark.parametrize("shape", [(4,), (4, 1)])
    def test_the_column(self, shape):
        _, td = start("tokens")
        td["episode_seed"] = torch.arange(4).reshape(shape)
        assert read_seeds(td) == [0, 1, 2, 3]
        self.act()(td)

    def test_a_missing_or_odd_column_is_named(self):
        _, td = start("tokens")
        with pytest.raises(KeyError, match="'episode_seed', int64 of shape \\(4,\\)"):
            self.act()(td)
        for bad in (torch.zeros(4), torch.zeros(4, 2, dtype=torch.int64)):
            td["episode_seed"] = bad
            with pytest.raises(ValueError, match="'episode_seed' is"):
                self.act()(td)

    @pytest.mark.parametrize("vary", ["seeds", "positions"])
    def test_the_noise_samples_the_distribution(self, vary):
        """Chi-square over 40,000 draws from 8 tokens whose chances span three orders of magnitude."""
        count = 40_000
        chances = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.03, 0.01, 0.0095, 0.0005])
        if vary == "seeds":
            seeds, lengths = list(range(count)), torch.full((count,), 17)
        else:
            seeds, lengths = [12345] * count, torch.arange(count)
        noise = GumbelNoise(seeds, lengths, 1, torch.device("cpu")).at(0, 8)
        found = torch.bincount((chances.log() + noise).argmax(-1), minlength=8)
        assert float(((found - count * chances) ** 2 / (count * chances)).sum()) < 24.3  # p = 0.001, 7 degrees

    def test_the_noise_of_a_large_vocabulary_is_gumbel(self):
        noise = GumbelNoise([1, 2], torch.tensor([5, 5]), 3, torch.device("cpu"))
        drawn = noise.at(2, 200_000)
        assert torch.isfinite(drawn).all()
        # Mean, and variance, of the standard Gumbel distribution: Euler's constant, and pi squared over 6.
        assert drawn.mean().item() == pytest.approx(0.5772, abs=0.01)
        assert drawn.var().item() == pytest.approx(1.6449, abs=0.02)
        assert abs(torch.corrcoef(drawn)[0, 1]) < 0.01
        assert abs(torch.corrcoef(torch.stack((drawn[0, :-1], drawn[0, 1:])))[0, 1]) < 0.01
        nearby = GumbelNoise([1], torch.tensor([6]), 3, torch.device("cpu"))
        assert torch.equal(nearby.at(1, 50), drawn[:1, :50]), "seed and position are all that counts"

    def test_nearly_the_same_log_probs_sample_the_same(self):
        """Log-probs that are off by up to d change at most a share of 2 d of the tokens, whatever the vocabulary."""
        count, off = 4_000, 5e-3
        for vocab_size in (4, 2_000):
            log_probs = torch.randn(vocab_size, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
            noise = GumbelNoise(list(range(count)), torch.full((count,), 3), 1, torch.device("cpu")).at(
                0, vocab_size
            )
            near = log_probs + off * (2 * torch.rand(noise.shape, generator=torch.Generator().manual_seed(1)) - 1)
            changed = ((near + noise).argmax(-1) != (log_probs + noise).argmax(-1)).float().mean()
            assert 0 < changed < 2 * off

    def test_stream_seeds(self):
        seeds = {stream_seed(seed, position) for seed in (-3, 0, 1, 2**63 - 1) for position in range(500)}
        assert len(seeds) == 2000
        assert all(0 <= seed < 2**63 for seed in seeds)


class TestSample:
    """``sample`` knows no TensorDict, and the face says what it says."""

    @pytest.mark.parametrize("given", ["ids", "lists", "messages"])
    def test_the_turns_of_values_are_those_of_the_face(self, mode, given):
        act = policy(generator=None, seeded=True)
        env, td = start(mode)
        td["episode_seed"] = torch.arange(4)
        td["tokens_left"] = torch.tensor([[9], [3], [9], [9]])
        prompts = []
        for seed, ledger in enumerate(columns.read_objects(td["transcript"], td.batch_size)):
            content = {
                "ids": {"ids": ledger.tokens},
                "lists": {"ids": Prompt.of(ledger.tokens.tolist()).ids},
                "messages": {"messages": ledger.messages},
            }[given]
            prompts.append(Prompt(**content, limit=[9, 3, 9, 9][seed], seed=seed))
        turns, td = act.sample(prompts), act(td)
        for i, turn in enumerate(turns):
            for container, field in (("tokens", "ids"), ("log_probs", "log_probs"), ("text", "text")):
                written = columns.read_field(td[container], "response", td.batch_size)[i]
                found = getattr(turn, field)
                assert torch.equal(written, found) if isinstance(found, torch.Tensor) else written == found
        assert columns.read_objects(td["finish_reason"], td.batch_size) == [turn.finish_reason for turn in turns]
        held, stepped = td["transcript"], env.step(td)["next", "transcript"]
        entered = answer(columns.read_objects(held, td.batch_size), turns, env.template)
        assert entered == columns.read_objects(stepped, td.batch_size)

    def test_without_a_prompt_object(self):
        act = policy(temperature=0)
        said = [{"role": "user", "content": "what is 2"}]
        ids = ChatTemplate(act.tokenizer).render(said)
        one, two, three = act.sample([ids, torch.tensor(ids), said])
        assert one.ids.tolist() == two.ids.tolist() == three.ids.tolist()
        assert one.text == act.codec.decode([one.ids.tolist()])[0]
        assert act.sample([]) == []

    def test_who_may_sample_nothing_is_left_out(self, monkeypatch):
        act = policy()
        [none, some] = act.sample([Prompt(torch.tensor([5, 6]), limit=0), Prompt(torch.tensor([5, 6]), limit=2)])
        assert (len(none.ids), none.may_sample, none.finish_reason) == (0, False, "length")
        assert 1 <= len(some.ids) <= 2
        monkeypatch.setattr(act, "generate", None)
        act.sample([Prompt(torch.tensor([5]), limit=0)])

    def test_a_prompt_of_nothing(self):
        with pytest.raises(ValueError, match="neither"):
            Prompt(limit=3)

    def test_seeds_for_all_or_for_none(self):
        with pytest.raises(ValueError, match="some prompts have a seed and others none"):
            policy(generator=None).sample([Prompt(torch.tensor([5]), seed=1), Prompt(torch.tensor([5]))])

    def test_errors_and_versions_of_a_policy_of_ones_own(self):
        class Mine(Policy):
            def __init__(self, tokenizer):
                super().__init__()
                self.in_keys, self.out_keys = [("tokens", "prompt")], [("tokens", "response"), "policy_error"]
                self.tokenizer, self.codec = tokenizer, ChatTemplate(tokenizer).codec
                self.stop_ids = default_stop_ids(tokenizer)

            def _sample(self, prompts):
                ids = torch.tensor([9, *self.stop_ids])
                turns = [Turn(ids, None, "x", "stop", versions=((0, 3), (1, 4))) for _ in prompts]
                return [RuntimeError("no idea"), *turns[1:]]

        env, td = start("tokens", 3)
        act, errors, prompt = Mine(env.tokenizer), {}, torch.tensor([5])
        assert [len(turn.ids) for turn in act.sample([prompt, prompt], errors)] == [0, 2]
        assert str(errors[0]) == "no idea"
        assert [len(turn.ids) for turn in act.sample([prompt] * 3, {0: ValueError()})] == [0, 0, 2]
        with pytest.raises(RuntimeError, match="no idea"):
            act.sample([prompt, prompt])
        td = act(td)
        assert td["_step"].tolist() == [False, True, True]
        assert td["policy_error"] == ["RuntimeError: no idea", "", ""]
        assert not columns.read_field(td["masks"], "all_assistant_mask", td.batch_size)[0].any()
        first, second, _ = columns.read_objects(env.step(td)["next", "transcript"], td.batch_size)
        assert (len(first.messages), first.versions) == (1, ())
        assert [version for _, version in second.versions][-2:] == [3, 4]


class TestWriting:
    def test_rows_without_log_probs_are_left_out(self):
        """A row whose log-probs are not known is not scored in the ledger; the others are."""
        env, td = start("tokens", 2)
        prompts = read_prompts(td)
        ids = [torch.tensor([9, env.tokenizer.eos_token_id])] * 2
        write_answers(td, prompts, ids, [torch.tensor([-1.0, -2.0]), None], ["a", "b"], ["stop", "stop"])
        following = env.step(td)["next"]
        scored = [t.scored for t in columns.read_objects(following["transcript"], td.batch_size)]
        assert scored == [True, False]

    def test_a_budget_limits_every_row(self):
        _, td = start("tokens", 3)
        td["tokens_left"] = torch.tensor([[9], [2], [0]])
        lengths = [len(r) for r in columns.read_field(policy()(td)["tokens"], "response", td.batch_size)]
        assert 1 <= lengths[1] <= 2
        assert lengths[2] == 0


def test_stop_ids():
    tokenizer = bpe_tokenizer()
    stop = tokenizer.eos_token_id
    assert default_stop_ids(tokenizer) == default_stop_ids(tokenizer, stop) == {stop}
    assert default_stop_ids(tokenizer, [7, 8]) == {stop, 7, 8}
    assert default_stop_ids(tokenizer, 7) == {stop, 7}


def test_vllm_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"torchrl_chat\[vllm\]"):
        VLLMPolicy.from_pretrained("a-model")
