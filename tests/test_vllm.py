"""vLLM as a policy: exact ids, log-probs of exactly those ids, weights from a trainer, and a prefix cache that is used.

Needs vLLM, which has an environment of its own: ``make vllm``.
"""

from __future__ import annotations

import types

import episodes
import pytest
import torch
from conftest import of_the_day
from tensordict import TensorDict
from torchrl.modules.llm import vLLMWrapper

from torchrl_chat import ChatEnv, TransformersPolicy, columns, training_view
from torchrl_chat.policies import ExactVLLMWrapper, VLLMPolicy
from torchrl_chat.transforms import Budget, StopReason

# Of several workers one makes the engine, which takes minutes on a busy machine.
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1500), pytest.mark.xdist_group("engine")]

TEMPERATURE = 0.8
EXTRA = 3  # rows of the embedding beyond the vocabulary


@pytest.fixture(scope="module", autouse=True)
def vllm():
    return pytest.importorskip("vllm", reason="vLLM is not installed here: run `make vllm`", exc_type=ImportError)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model and its tokenizer on disk."""
    folder = tmp_path_factory.mktemp("checkpoint")
    episodes.model(extra=EXTRA).save_pretrained(folder)
    episodes.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def engine(checkpoint):
    """One engine for all tests, in this process."""
    return VLLMPolicy.from_pretrained(checkpoint, episodes.tokenizer(), max_model_len=1024, block_size=32).engine


def policy(engine, **options) -> VLLMPolicy:
    """A policy whose engine has the weights of the checkpoint."""
    options = {"max_new_tokens": 24, "temperature": TEMPERATURE, **options}
    made = VLLMPolicy(engine, episodes.tokenizer(), **options)
    made.sync(episodes.model(extra=EXTRA))
    return made


def trainer(temperature: float = TEMPERATURE, **options) -> TransformersPolicy:
    return TransformersPolicy(
        episodes.model(extra=EXTRA), episodes.tokenizer(), temperature=temperature, max_new_tokens=24, **options
    )


def rows(td, container, key):
    return columns.read_field(td[container], key, td.batch_size)


def accept(act, sync, mode: str, temperature: float = TEMPERATURE) -> None:
    """Log-probs and effective sample size, before and after an optimizer step and a weight sync."""
    actor = trainer(temperature)
    for step in range(3):
        td, count = episodes.play(episodes.environment(mode), act)
        if step:  # not synchronized yet: the same check must fail
            assert episodes.check(td, count, actor.model, temperature) > 1e-2
            assert episodes.losses(td, actor).ESS.item() < 0.999
            sync(actor.model)
            td, count = episodes.play(episodes.environment(mode), act)
        assert episodes.check(td, count, actor.model, temperature) < 1e-4
        loss = episodes.losses(td, actor)
        assert loss.ESS.item() == pytest.approx(1.0, abs=1e-4)
        assert abs(loss.kl_approx.item()) < 1e-5
        episodes.one_step(td, actor)


class TestVLLMPolicy:
    @pytest.mark.parametrize("mode", of_the_day("text", "tokens", "history"))
    def test_acceptance(self, engine, mode):
        act = policy(engine)
        accept(act, act.sync, mode)

    def test_sync_takes_a_state_dict_and_twice_the_same_is_no_change(self, engine):
        act, other = policy(engine, temperature=0), episodes.model(seed=5, extra=EXTRA)
        td = episodes.first(episodes.environment("tokens", 8))
        before = rows(act(td.copy()), "tokens", "response")
        act.sync(other.state_dict())
        between = rows(act(td.copy()), "tokens", "response")
        act.sync(episodes.model(extra=EXTRA))
        after = rows(act(td.copy()), "tokens", "response")
        assert [r.tolist() for r in before] == [r.tolist() for r in after]
        assert [r.tolist() for r in before] != [r.tolist() for r in between]

    def test_greedy_is_that_of_transformers(self, engine):
        td = episodes.first(episodes.environment("tokens", 16))
        ours, theirs = policy(engine, temperature=0)(td.copy()), trainer(0)(td.copy())
        for key in ("response", "full"):
            for a, b in zip(rows(ours, "tokens", key), rows(theirs, "tokens", key), strict=True):
                assert a.tolist() == b.tolist()
            for a, b in zip(rows(ours, "log_probs", key), rows(theirs, "log_probs", key), strict=True):
                assert torch.allclose(a, b, atol=1e-4)
        for a, b in zip(
            rows(ours, "masks", "all_assistant_mask"), rows(theirs, "masks", "all_assistant_mask"), strict=True
        ):
            assert torch.equal(a, b)
        assert rows(ours, "text", "response") == rows(theirs, "text", "response")
        assert set(ours.keys(True)) == set(theirs.keys(True))

    def test_seeded_rows_do_not_depend_on_their_neighbours(self, engine):
        act = policy(engine, seeded=True)
        td = episodes.first(episodes.environment("tokens", 16))
        together = [r.tolist() for r in rows(act(td.copy()), "tokens", "response")]
        assert len(set(map(tuple, together))) > 10
        prompts, seeds = rows(td, "tokens", "prompt"), td["episode_seed"].tolist()
        for i in reversed(range(16)):
            [alone], _ = act.generate([prompts[i].tolist()], seeds=[seeds[i]])
            assert alone == together[i]
        with pytest.raises(KeyError, match="episode_seed"):
            act(td.exclude("episode_seed"))

    def test_a_seed_samples_anew_every_turn(self, engine):
        """The seed of a request is the conversation's and its length: the same noise twice would repeat answers."""
        act = policy(engine, seeded=True)
        prompt = rows(episodes.first(episodes.environment("tokens", 1)), "tokens", "prompt")[0].tolist()
        ids, _ = act.generate([prompt, prompt, [*prompt, 9]], seeds=[3, 3, 3])
        assert ids[0] == ids[1] != ids[2]

    def test_the_prefix_cache_holds_earlier_turns(self, engine):
        """On the second turn, all whole blocks of the first turn's sequence come from the cache."""
        act = policy(engine)
        block = engine.llm_engine.vllm_config.cache_config.block_size
        env = ChatEnv(input_mode="tokens", tokenizer=episodes.tokenizer(), batch_size=(8,))
        queries = [f"{i}{'x' * (4 * block + 9 * i)}" for i in range(8)]
        td = env.reset(TensorDict(query=queries, batch_size=(8,)))
        act.reset_counts()
        assert act.cached_share == 0
        td = act(td)
        assert act.cached_tokens == 0, "conversations that have nothing in common share nothing"
        sequences = rows(td, "tokens", "full")
        td = env.append_messages(env.step_mdp(env.step(td)), ["and?"] * 8)
        act.reset_counts()
        act(td)
        # The last sampled token was never computed: nothing has been sampled after it.
        assert act.cached_tokens == sum((len(row) - 1) // block * block for row in sequences)
        assert act.prompt_tokens == sum(map(len, rows(td, "tokens", "prompt")))
        assert act.cached_share == act.cached_tokens / act.prompt_tokens > 0.5

    def test_budgets_are_kept_to(self, engine):
        env = episodes.environment("tokens", 4).append_transform(Budget(max_turn_tokens=3))
        td = policy(engine)(episodes.first(env))
        assert max(map(len, rows(td, "tokens", "response"))) <= 3

    def test_stop_ids_are_kept_and_nothing_follows(self, engine):
        stop = {20, 30, 40}
        td = policy(engine, stop_ids=stop, max_new_tokens=60)(episodes.first(episodes.environment("tokens")))
        reasons = columns.read_objects(td["finish_reason"], td.batch_size)
        for row, reason in zip(rows(td, "tokens", "response"), reasons, strict=True):
            assert not stop & set(row[:-1].tolist())
            assert (reason == "stop") == (int(row[-1]) in stop)
        assert "stop" in reasons

    def test_ids_beyond_the_vocabulary_are_not_sampled(self, engine):
        act, likely = policy(engine), episodes.model(extra=EXTRA)
        with torch.no_grad():
            likely.lm_head.weight[-EXTRA:] *= 30
        act.sync(likely)
        td = act(episodes.first(episodes.environment("tokens")))
        known, worst = len(episodes.tokenizer()), 0.0
        for full in rows(td, "tokens", "full"):
            assert int(full.max()) < known
            with torch.no_grad():
                chances = (likely(input_ids=full[None]).logits[0] / TEMPERATURE).softmax(-1)
            worst = max(worst, float(chances[:, known:].sum(-1).max()))
        assert worst > 0.5, "without the bias such ids would be sampled"

    def test_a_full_context_is_named(self, engine):
        act = policy(engine)
        with pytest.raises(ValueError, match="row 1: its prompt of 1024 tokens fills"):
            act.generate([[5, 6], [7] * 1024])
        [ids], _ = act.generate([[7] * 1022])
        assert len(ids) <= 2

    def test_a_full_conversation_does_not_end_the_batch(self, engine):
        """Nor does one that is not stepped, and the others sample what they sample with all rows in the batch."""
        act = policy(engine, seeded=True)
        env = ChatEnv(input_mode="tokens", tokenizer=episodes.tokenizer(), batch_size=(4,))
        env = env.append_transform(Budget(max_context=1024))
        wrapped = ExactVLLMWrapper(
            engine, tokenizer=episodes.tokenizer(), input_mode="tokens", generate_kwargs={"max_new_tokens": 4}
        )

        def start(*queries: str) -> TensorDict:
            return env.reset(TensorDict(query=list(queries), episode_seed=torch.arange(4), batch_size=(4,)))

        whole = rows(act(start("a", "b", "c", "d")), "tokens", "response")
        for sampler in (act, wrapped):
            td = start("a", "b" * 2000, "c" * 2000, "d")
            td["_step"] = torch.tensor([True, True, False, True])
            td = sampler(td)
            if sampler is act:
                for i in (0, 3):
                    assert rows(td, "tokens", "response")[i].tolist() == whole[i].tolist()
            following = env.step(td)["next"]
            assert following["stop_reason"][1] == StopReason.CONTEXT_FULL
            assert following["stop_reason"].flatten().tolist()[::3] == [0, 0]

    @pytest.mark.parametrize(
        ("cpu", "given", "expected"),
        [
            (True, {}, "float32"),
            (True, {"dtype": "bfloat16"}, "bfloat16"),
            (False, {}, "auto"),
            (False, {"dtype": torch.float32, "seed": 3}, torch.float32),
        ],
    )
    def test_dtype(self, engine, vllm, monkeypatch, cpu, given, expected):
        """What the engine is made with: float32 on the CPU, vLLM's choice elsewhere, and always what is given."""
        made = []

        def make(**settings):
            made.append(settings)
            return engine

        monkeypatch.setattr("vllm.LLM", make)
        monkeypatch.setattr(type(vllm.platforms.current_platform), "is_cpu", lambda self: cpu)
        VLLMPolicy.from_pretrained("a-model", episodes.tokenizer(), **given)
        assert made[0]["dtype"] == expected
        assert made[0]["logprobs_mode"] == "processed_logprobs"
        assert made[0].get("seed") == given.get("seed")

    def test_refused(self, engine):
        with pytest.raises(ValueError, match="max_new_tokens is 0"):
            policy(engine, max_new_tokens=0)
        with pytest.raises(ValueError, match="temperature is 0.001"):
            policy(engine, temperature=0.001)
        with pytest.raises(KeyError, match=r"\('tokens', 'prompt'\)"):
            policy(engine)(TensorDict(batch_size=(1,)))

    @pytest.mark.parametrize(("mode", "temperature"), [("raw_logprobs", 0.8), ("processed_logits", 1.0)])
    def test_other_log_probs_are_refused(self, engine, mode, temperature):
        config = types.SimpleNamespace(
            max_model_len=9, logprobs_mode=mode, try_get_generation_config=dict, get_vocab_size=lambda: 8
        )
        raw = types.SimpleNamespace(model_config=config, generate=None)
        with pytest.raises(ValueError, match=f"logprobs_mode='{mode}'"):
            VLLMPolicy(raw, episodes.tokenizer(), temperature=temperature)


class TestExactVLLMWrapper:
    def wrapper(self, engine, mode="tokens", **options) -> ExactVLLMWrapper:
        options = {"generate_kwargs": {"max_new_tokens": 24, "temperature": TEMPERATURE}, **options}
        return ExactVLLMWrapper(engine, tokenizer=episodes.tokenizer(), input_mode=mode, **options)

    @pytest.mark.parametrize("mode", of_the_day("tokens", "history", "text"))
    def test_acceptance(self, engine, mode):
        accept(self.wrapper(engine, mode), policy(engine).sync, mode)

    def test_scoring(self, engine, mode):
        policy(engine)
        act = self.wrapper(engine, mode, generate_kwargs={"max_new_tokens": 24})
        td = act(episodes.first(episodes.environment(mode, 8)))
        scored = act.get_new_version(generate=False, inplace=False)(td)
        expected = trainer(1.0)
        for i, full in enumerate(rows(td, "tokens", "full")):
            with torch.no_grad():
                logits = expected.model(input_ids=full[None]).logits[0, :-1]
            reference = logits.log_softmax(-1).gather(-1, full[1:, None]).squeeze(-1)
            row = rows(scored, "log_probs", "full")[i]
            assert row[0] == 0
            assert torch.allclose(row[1:], reference, atol=1e-4)
        with pytest.raises(ValueError, match="temperature 1 only"):
            self.wrapper(engine, mode, generate=False)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_is_not_scored(self, engine, side):
        policy(engine)
        act = self.wrapper(engine, generate_kwargs={"max_new_tokens": 24})
        td, _ = episodes.play(episodes.environment("tokens", 8), act, turns=1)
        scorer = act.get_new_version(generate=False, inplace=False)
        expected = rows(scorer(training_view(td)), "log_probs", "full")
        view = training_view(td, layout="padded", side=side)
        found, masks = rows(scorer(view), "log_probs", "full"), rows(view, "masks", "all_attention_mask")
        for row, mask, reference in zip(found, masks, expected, strict=True):
            assert torch.allclose(row[mask], reference, atol=1e-4)
            assert not row[~mask].any()

    def test_the_parent_errs_where_we_do_not(self, engine):
        """torchrl's wrapper leaves the stop token in the content, and reports another prompt than the ledger's."""
        policy(engine)
        kwargs = {"max_new_tokens": 60, "temperature": 1.0}
        td = episodes.first(episodes.environment("history"))
        ours = self.wrapper(engine, "history", generate_kwargs=kwargs)(td.copy())
        said = [row.content for row in rows(ours, "history", "response")]
        texts = rows(ours, "text", "response")
        ended = [text.endswith("<|end|>") for text in texts]
        assert any(ended)
        assert not any("<|end|>" in str(content) for content in said)
        parent = vLLMWrapper(engine, tokenizer=episodes.tokenizer(), input_mode="history", generate_kwargs=kwargs)
        theirs = parent(td.select("history"))
        said = [row.content for row in rows(theirs, "history", "response")]
        assert any("<|end|>" in str(content) for content in said)
        prompts = theirs["tokens"].get("prompt", as_list=True)
        assert [p.tolist() for p in prompts] != [p.tolist() for p in rows(td, "tokens", "prompt")]

    def test_refused(self, engine):
        for options, message in (
            ({"pad_output": True}, "pad_output"),
            ({"num_samples": 2}, "num_samples"),
            ({"generate_kwargs": {"top_k": 5}}, "top_k=5"),
        ):
            with pytest.raises(ValueError, match=message):
                self.wrapper(engine, **options)


@pytest.mark.by_day(2, place=1)
def test_asynchronous_engine(checkpoint):
    """An engine in a process of its own: the same acceptance, weights through shared memory."""
    act = VLLMPolicy.from_pretrained(
        checkpoint,
        episodes.tokenizer(),
        asynchronous=True,
        max_model_len=1024,
        max_new_tokens=24,
        temperature=TEMPERATURE,
    )
    try:
        accept(act, act.sync, "tokens")
        assert 0 < act.cached_share < 1
    finally:
        act.close()
