"""Reference log-probs and KL penalties: in the environment, behind a collector, in replay buffers."""

from __future__ import annotations

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from branch_turns import STRIPS, play
from conftest import bpe_tokenizer, of_the_day, respond
from tensordict import TensorDict
from torchrl.collectors.llm import LLMCollector
from torchrl.data import LazyStackStorage, ReplayBuffer
from torchrl.data.replay_buffers.samplers import SamplerWithoutReplacement
from torchrl.envs import Compose, check_env_specs
from torchrl.objectives.llm.grpo import GRPOLoss, MCAdvantage
from training_rows import TOKENIZER, batch_of, dense, make_env, transcripts

from torchrl_chat import ChatEnv, TransformersPolicy, columns, playing, training_view
from torchrl_chat.tiny import tiny_model, tiny_tokenizer
from torchrl_chat.training import kl_estimate, sequence_log_probs
from torchrl_chat.transforms.kl import KLRewardTransform, RetrieveKL, RetrieveLogProb
from torchrl_chat.transforms.references import (
    AdapterReference,
    CompletionsReference,
    ModelReference,
    Reference,
    RemoteReference,
    as_reference,
)


@pytest.fixture(scope="module")
def policy():
    return TransformersPolicy(tiny_model(len(TOKENIZER)), TOKENIZER, max_new_tokens=6)


@pytest.fixture(scope="module")
def reference():
    return tiny_model(len(TOKENIZER), seed=9)


@pytest.fixture(params=[1, 8], ids=["one row", "eight rows"])
def rows(request) -> int:
    return request.param


def roll(env, policy, turns=3, seed=0):
    torch.manual_seed(seed)
    return env.rollout(turns, policy, break_when_any_done=False)


def plain_log_probs(model, ids):
    """The log-prob of each token given those before it, by the book."""
    logits = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
    return torch.cat((torch.zeros(1), logits.gather(-1, ids[1:, None])[:, 0])).detach()


def expected_turns(rollout, model, kind):
    """For each row and turn the KL of its sampled tokens, from the policy's own columns."""
    result = torch.zeros(rollout.shape)
    for i in range(rollout.shape[0]):
        for t in range(rollout.shape[1]):
            step = rollout[i, t]
            full, said = step["tokens"].get("full"), step["log_probs"].get("response")
            there = plain_log_probs(model, full)[-len(said) :]
            result[i, t] = kl_estimate(said, there, kind).sum()
    return result


class TestInTheEnvironment:
    @pytest.mark.parametrize("kind", of_the_day("k1", "k2", "k3"))
    @pytest.mark.by_day(2)
    def test_the_penalty_of_each_turn(self, mode, rows, policy, reference, kind):
        bare = roll(make_env(mode, rows), policy)
        td = roll(make_env(mode, rows).append_transform(RetrieveKL(reference, coeff=0.3, kind=kind)), policy)
        assert td["next", "reward"].shape == (rows, 3, 1, 1)
        taken = (bare["next", "reward"] - td["next", "reward"]).reshape(rows, 3)
        assert torch.allclose(taken, 0.3 * expected_turns(td, reference, kind), atol=1e-4)
        for i in range(rows):
            for t in range(3):
                full, penalty = td[i, t]["tokens"].get("full"), td[i, t]["next", "kl_penalty"].full
                there, mask = td[i, t]["next", "ref_log_probs"].full, td[i, t]["masks"].all_assistant_mask
                assert full.shape == penalty.shape == there.shape
                assert torch.allclose(there, plain_log_probs(reference, full) * mask, atol=1e-5)
                count = len(td[i, t]["tokens"].get("response"))
                assert not penalty[:-count].any()  # earlier turns have been charged
                assert taken[i, t] == pytest.approx(0.3 * penalty.sum().item(), abs=1e-4)

    @pytest.mark.by_day(2, place=1)
    def test_at_the_end_of_the_episode(self, mode, rows, policy, reference):
        each = roll(make_env(mode, rows).append_transform(RetrieveKL(reference)), policy)
        asked = []

        class Counts(ModelReference):
            def score(self, tokens, masks):
                asked.append(len(tokens))
                return super().score(tokens, masks)

        once = roll(make_env(mode, rows).append_transform(RetrieveKL(Counts(reference), when="done")), policy)
        bare = roll(make_env(mode, rows), policy)["next", "reward"]
        assert asked == [rows]
        assert torch.equal(once["next", "reward"][:, :2], bare[:, :2])
        assert torch.allclose(once["next", "reward"].sum(1), each["next", "reward"].sum(1), atol=1e-4)

    def test_without_the_reward(self, policy, reference):
        env = make_env("tokens", 4).append_transform(RetrieveKL(reference, add_to_reward=False))
        assert torch.equal(
            roll(env, policy)["next", "reward"], roll(make_env("tokens", 4), policy)["next", "reward"]
        )

    def test_two_batch_dimensions(self, mode, policy, reference):
        env = ChatEnv(tokenizer=TOKENIZER, input_mode=mode, batch_size=(2, 2)).append_transform(
            RetrieveKL(reference)
        )
        queries = TensorDict(query=[["last(1,2)=", "a"], ["=", "12"]], batch_size=(2, 2))
        td = env.step(policy(env.reset(queries)))
        assert td["next", "reward"].shape == (2, 2, 1, 1)
        flat = [row.sum() for row in columns.read_field(td["next", "kl_penalty"], "full", td.batch_size)]
        assert torch.allclose(td["next", "reward"].flatten(), -torch.stack(flat), atol=1e-5)

    def test_an_environment_without_rewards(self, policy, reference):
        env = ChatEnv(tokenizer=TOKENIZER, input_mode="tokens", batch_size=(2,))
        env = env.append_transform(RetrieveKL(reference))
        td = env.step(policy(env.reset(TensorDict(query=["last(1,2)=", "a"], batch_size=(2,)))))
        sums = [row.sum() for row in td["next"].get(("kl_penalty", "full"), as_list=True)]
        assert torch.allclose(td["next", "reward"].flatten(), -torch.stack(sums))

    @pytest.mark.parametrize("transform", [RetrieveLogProb, RetrieveKL, KLRewardTransform])
    def test_specs(self, mode, rows, reference, transform):
        options = {} if transform is RetrieveLogProb else {"missing": "zero"}
        check_env_specs(make_env(mode, rows).append_transform(transform(reference, **options)))

    def test_rows_that_are_not_stepped(self, mode, policy, reference):
        env = make_env(mode, 4).append_transform(RetrieveKL(reference))
        torch.manual_seed(0)
        td = policy(env.reset())
        td["_step"] = torch.tensor([[True], [False], [True], [False]])
        following = env.step(td)["next"]
        there = following.get(("ref_log_probs", "full"), as_list=True)
        assert [bool(row.any()) for row in there] == [True, False, True, False]
        assert [bool(r) for r in following["reward"].flatten() != 0] == [True, False, True, False]

    def test_the_reference_of_grpo_loss(self, policy, reference):
        """torchrl's loss reads what was written, a row a turn, and gets the k3 estimate of it."""
        td = roll(make_env("tokens", 4).append_transform(RetrieveLogProb(reference)), policy, turns=1)[:, 0]
        td["advantage"] = torch.ones(4, 1, 1)
        output = GRPOLoss(policy, kl_to_ref_coeff=1.0, masking_strategy="rlhf")(td)
        mask = torch.nn.utils.rnn.pad_sequence(
            td.get(("masks", "all_assistant_mask"), as_list=True), batch_first=True
        )
        total = expected_turns(td[:, None], reference, "k3").sum()
        assert float(output.kl_to_ref) * mask.numel() == pytest.approx(float(total), rel=1e-3)

    def test_branches(self, reference):
        """A template that rewrites the past: the turn's tokens stand in the branch that was left."""
        tokenizer = bpe_tokenizer.__wrapped__()
        tokenizer.chat_template = STRIPS
        env = ChatEnv(input_mode="tokens", tokenizer=tokenizer, history_policy="template")
        _, ledgers, sampled = play(env, ["<think>\nso\n</think>\n\n42"] * 2)
        model = tiny_model(len(tokenizer), seed=3)
        before, after = ledgers
        steps = batch_of([before])
        steps["next"] = batch_of([after], reward=torch.zeros(1, 1, 1), done=torch.ones(1, 1).bool())
        _, scores = sampled[1]
        left = after.branches[1]
        there = plain_log_probs(model, left.tokens)[left.mask]
        td = RetrieveKL(model)(steps)
        assert td["next", "reward"].item() == pytest.approx(-float((scores - there).sum()), abs=1e-3)
        whole = RetrieveKL(model, when="done")(steps)["next", "reward"].item()
        view = RetrieveKL(model)(training_view(steps))
        assert view["reward"].flatten().tolist() == pytest.approx([whole] * 2, abs=1e-3)
        assert whole < td["next", "reward"].item() - 1e-3 or whole > td["next", "reward"].item() + 1e-3


class TestElsewhere:
    @pytest.mark.parametrize("whole", [False, True], ids=["turns", "trajectories"])
    @pytest.mark.by_day(3)
    def test_behind_a_collector(self, mode, policy, reference, whole):
        def collect(env, **options):
            torch.manual_seed(0)
            collector = LLMCollector(
                env, policy=policy, dialog_turns_per_batch=12, total_dialog_turns=12,
                yield_completed_trajectories=whole, **options,
            )  # fmt: skip
            return next(iter(collector))

        asked = []

        class Counts(ModelReference):
            def score(self, tokens, masks):
                asked.append(len(tokens))
                return super().score(tokens, masks)

        inside = collect(make_env(mode, 4).append_transform(RetrieveKL(reference, coeff=0.5)))
        behind = collect(make_env(mode, 4), postproc=RetrieveKL(Counts(reference), coeff=0.5))
        assert torch.allclose(inside["next", "reward"], behind["next", "reward"], atol=1e-4)
        assert asked == [4]  # three turns share one pass
        first, second = (
            columns.read_field(td["next", "kl_penalty"], "full", td.batch_size) for td in (inside, behind)
        )
        for one, two in zip(first, second, strict=True):
            assert torch.allclose(one, two, atol=1e-5)

    @pytest.mark.parametrize("on", ["sample", "extend"])
    @pytest.mark.by_day(3, place=1)
    def test_in_a_replay_buffer_of_steps(self, mode, policy, reference, on):
        steps = roll(make_env(mode, 4), policy).reshape(-1)
        before = steps["next", "reward"].clone()
        buffer = ReplayBuffer(
            storage=LazyStackStorage(12),
            sampler=SamplerWithoutReplacement(),
            transform=RetrieveKL(reference, on=on),
            batch_size=12,
        )
        buffer.extend(steps)
        assert torch.equal(steps["next", "reward"], before)
        expected = before.flatten() - expected_turns(roll(make_env(mode, 4), policy), reference, "k1").flatten()
        for _ in range(2):  # the second sample is not charged again
            sample = buffer.sample()
            assert sorted(sample["next", "reward"].flatten().tolist()) == pytest.approx(
                sorted(expected.tolist()), abs=1e-4
            )

    def test_the_penalty_is_in_the_advantage(self, policy, reference):
        steps = roll(make_env("tokens", 4, group=4), policy, turns=1).reshape(-1)
        steps["next", "done"] = torch.ones_like(steps["next", "done"])
        penal = RetrieveKL(reference)(steps)["next", "reward"].flatten()
        buffer = ReplayBuffer(
            storage=LazyStackStorage(4),
            transform=Compose(MCAdvantage(grpo_size=4), RetrieveKL(reference, on="extend")),
            batch_size=4,
        )
        buffer.extend(steps)
        expected = (penal - penal.mean()) / penal.std()
        assert sorted(buffer[:]["advantage"].flatten().tolist()) == pytest.approx(
            sorted(expected.tolist()), abs=1e-3
        )

    @pytest.mark.parametrize("options", [{}, {"layout": "padded"}, {"layout": "padded", "side": "left"}], ids=str)
    @pytest.mark.by_day(2)
    def test_on_training_views(self, rows, policy, reference, options):
        steps = roll(make_env("tokens", rows), policy)
        view = training_view(steps, turns=True, **options)
        penal = RetrieveKL(reference, kind="k3", coeff=2.0)(view)
        assert torch.equal(view["reward"], training_view(steps, turns=True)["reward"])  # the input stays as it is
        expected = expected_turns(steps, reference, "k3").sum(1)
        assert torch.allclose((view["reward"] - penal["reward"]).flatten(), 2.0 * expected, atol=1e-3)
        scores = sequence_log_probs(reference, view)
        assert torch.allclose(dense(penal, ("ref_log_probs", "full")), scores.log_probs, atol=1e-5)
        assert dense(penal, ("kl_penalty", "full")).shape == dense(view, ("tokens", "full")).shape
        buffer = ReplayBuffer(
            storage=LazyStackStorage(rows),
            sampler=SamplerWithoutReplacement(),
            transform=RetrieveKL(reference, kind="k3"),
            batch_size=rows,
        )
        buffer.extend(view)
        sample = buffer.sample()
        sample["advantage"] = torch.ones(rows, 1, 1)
        loss = GRPOLoss(policy, kl_to_ref_coeff=1.0, masking_strategy="rlhf")
        loss.set_keys(ref_log_probs=("ref_log_probs", "full"))
        if options.get("side") != "left":
            output = loss(sample)
            total = float(output.kl_to_ref) * dense(view, ("tokens", "full")).numel()
            assert total == pytest.approx(float(expected.sum()), rel=1e-3)

    def test_turns_add_up_in_play(self, mode, policy, reference):
        """What each turn paid is in the reward of finished episodes, and of the view of them."""
        returns = []
        for options in ({"when": "turn"}, {"when": "done"}):
            torch.manual_seed(0)
            finished = playing.play(make_env(mode, 4).append_transform(RetrieveKL(reference, **options)), policy)
            returns.append(training_view(finished)["reward"].flatten())
        assert torch.allclose(*returns, atol=1e-4)


def several(seed: int) -> TensorDict:
    """The view of three episodes, of one sequence, of two, and of three."""
    draw = torch.Generator().manual_seed(seed)
    ledgers = []
    for episode, ledger in enumerate(transcripts(3, 1, seed=seed)):
        for _ in range(episode):
            ids = torch.randint(5, 20, (4,), generator=draw)
            ledger = ledger.branched(ids.tolist(), ledger.spans)
            answer = torch.randint(5, 20, (3,), generator=draw)
            ledger = ledger.sampled(
                answer, -torch.rand(3, generator=draw), {"role": "assistant", "content": "!"}, ended=True
            )
        ledgers.append(ledger)
    return training_view(batch_of(ledgers, reward=torch.zeros(3, 1, 1)), layout="ragged")


class TestBuffersOfSeveralViews:
    """Numbers of episodes begin anew in every view, a row may be drawn twice, and another not at all."""

    def penalties(self, views, model) -> dict[tuple[int, ...], float]:
        """What the rows of these views pay, by their tokens, each episode counted by hand."""
        paid = {}
        for view in views:
            rows = RetrieveKL(model, add_to_reward=False)(view).unbind(0)
            own = [float(row["kl_penalty"].full.sum()) for row in rows]
            for i, episode in enumerate(view["episode"].tolist()):
                key = tuple(rows[i]["tokens"].full.tolist())
                paid[key] = sum(value for k, value in enumerate(own) if view["episode"][k] == episode)
        return paid

    def check(self, sample, paid):
        for i in range(len(sample)):
            expected = -paid[tuple(sample[i]["tokens"].full.tolist())]
            assert float(sample[i]["reward"]) == pytest.approx(expected, abs=1e-4)

    @pytest.mark.parametrize("digest", [True, False])
    def test_single_sequences_drawn_with_replacement(self, reference, digest):
        views = [training_view(batch_of(transcripts(4, 2, seed=s), reward=torch.zeros(4, 1, 1))) for s in (0, 1, 2)]
        paid = self.penalties(views, reference)
        # Without the digest, what a dataset environment writes tells episodes apart.
        views = [view.exclude("episode_digest", "episode_sequence") if not digest else view for view in views]
        for s, view in enumerate(views):
            view["episode_row"], view["episode_epoch"] = torch.arange(4) + 4 * s, torch.zeros(4).long()
        buffer = ReplayBuffer(storage=LazyStackStorage(12), transform=RetrieveKL(reference), batch_size=40)
        for view in views:
            buffer.extend(view)
        torch.manual_seed(0)
        self.check(buffer.sample(), paid)

    @pytest.mark.parametrize("on", ["sample", "extend"])
    def test_whole_episodes(self, reference, on):
        views = [several(seed) for seed in (0, 1)]
        paid = self.penalties(views, reference)
        buffer = ReplayBuffer(
            storage=LazyStackStorage(12),
            sampler=SamplerWithoutReplacement(),
            transform=RetrieveKL(reference, on=on),
            batch_size=12,
        )
        for view in views:
            buffer.extend(view)
        self.check(buffer.sample(), paid)
        twice = torch.cat([views[0], views[1], views[0]])
        self.check(RetrieveKL(reference)(twice), paid)

    def test_a_part_of_an_episode_is_refused(self, reference):
        view = several(0)
        paid = self.penalties([view], reference)
        some = view[torch.tensor([0, 1, 2, 3, 5])]  # the third episode lacks its second sequence
        with pytest.raises(ValueError, match=r"row 3 is of an episode of 3 sequences, of which 2 .*on='extend'"):
            RetrieveKL(reference)(some)
        assert "kl_penalty" in RetrieveKL(reference, add_to_reward=False)(some).keys()
        self.check(RetrieveKL(reference)(some[:3]), paid)
        buffer = ReplayBuffer(
            storage=LazyStackStorage(6), transform=RetrieveKL(reference, on="extend"), batch_size=1
        )
        buffer.extend(view)
        for _ in range(5):
            self.check(buffer.sample(), paid)

    def test_two_sequences_of_an_episode_may_hold_the_same(self, reference):
        [first] = transcripts(1, 1)
        same = first.branched(first.tokens[: first.spans[0].start].tolist(), first.spans)
        ids, scores = first.tokens[first.mask], first.log_probs[first.mask]
        same = same.sampled(ids, scores, {"role": "assistant", "content": "!"}, ended=True, close=[2])
        view = training_view(batch_of([same]))
        assert torch.equal(view[0]["tokens"].full, view[1]["tokens"].full)
        once = RetrieveKL(reference)(training_view(batch_of([first])))["reward"].item()
        assert RetrieveKL(reference)(view)["reward"].flatten().tolist() == pytest.approx([2 * once] * 2, rel=1e-5)


class TestReferences:
    def test_itself_has_no_kl(self, mode, policy):
        td = roll(make_env(mode, 4).append_transform(RetrieveKL(policy)), policy)
        for row in columns.read_field(td["next", "kl_penalty"], "full", td.batch_size):
            assert row.abs().max() < 1e-5

    def test_temperature(self, reference):
        hot = TransformersPolicy(reference, TOKENIZER, max_new_tokens=6, temperature=1.7)
        td = roll(make_env("tokens", 4).append_transform(RetrieveKL(hot)), hot)
        for row in columns.read_field(td["next", "kl_penalty"], "full", td.batch_size):
            assert row.abs().max() < 1e-5

    def test_a_bare_model_of_a_longer_vocabulary(self, mode):
        """Embeddings that are padded: nothing samples these ids, and the reference leaves them out, too."""
        model = tiny_model(len(TOKENIZER) + 64)
        longer = TransformersPolicy(model, TOKENIZER, max_new_tokens=6)
        steps = roll(make_env(mode, 4).append_transform(RetrieveKL(model)), longer)
        behind = RetrieveKL(model, tokenizer=TOKENIZER)(roll(make_env(mode, 4), longer))
        told = RetrieveKL(model, vocab_size=len(TOKENIZER))(roll(make_env(mode, 4), longer))
        view = RetrieveKL(model, tokenizer=TOKENIZER)(training_view(steps))
        for td in (steps["next"], behind["next"], told["next"], view):
            for row in columns.read_field(td["kl_penalty"], "full", td.batch_size):
                assert row.abs().max() < 1e-5
        all_logits = RetrieveKL(ModelReference(model, vocab_size=len(TOKENIZER) + 64))
        td = roll(make_env(mode, 4).append_transform(all_logits), longer)["next"]
        assert all(row.sum() > 0.1 for row in columns.read_field(td["kl_penalty"], "full", td.batch_size))

    def test_a_bare_model_at_the_policys_temperature(self, reference):
        cold = TransformersPolicy(reference, TOKENIZER, max_new_tokens=6, temperature=0.5)
        for there in (reference, ModelReference(reference), RetrieveKL(cold).reference):
            td = roll(make_env("tokens", 4).append_transform(RetrieveKL(there, temperature=0.5)), cold)["next"]
            for row in columns.read_field(td["kl_penalty"], "full", td.batch_size):
                assert row.abs().max() < 1e-5

    def test_settings_that_disagree_or_cannot_be_had(self, reference):
        cold = TransformersPolicy(reference, TOKENIZER, temperature=0.5)
        with pytest.raises(ValueError, match=r"temperature=1.0, and the reference has temperature=0.5"):
            RetrieveKL(cold, temperature=1.0)
        with pytest.raises(ValueError, match="vocab_size=7, and the reference has"):
            RetrieveLogProb(cold, vocab_size=7)
        server = CompletionsReference("http://localhost:9/v1", "m")
        for there in (server, RemoteReference(print), print):
            for options in ({"temperature": 0.5}, {"vocab_size": 7}):
                with pytest.raises(ValueError, match=r"temperature 1 over all logits"):
                    RetrieveKL(there, **options)
        assert RetrieveKL(server, temperature=1.0).reference is server
        for options in ({"temperature": 0.0}, {"vocab_size": 0}):
            for make in (RetrieveKL, ModelReference):
                with pytest.raises(ValueError, match=next(iter(options))):
                    make(reference, **options)

    def test_a_model_whose_adapter_is_on_is_refused(self):
        import peft

        model = peft.get_peft_model(
            tiny_model(len(TOKENIZER)), peft.LoraConfig(target_modules=["q_proj", "v_proj"])
        )
        for there in (model, TransformersPolicy(model, TOKENIZER)):
            with pytest.raises(TypeError, match=r"its adapter on.*AdapterReference\(model\)"):
                RetrieveKL(there)
        assert RetrieveKL(ModelReference(model)).reference.model is model  # another model than the trained one

    def test_adapter(self, mode):
        import peft

        base = tiny_model(len(TOKENIZER), seed=4)
        model = peft.get_peft_model(
            tiny_model(len(TOKENIZER), seed=4), peft.LoraConfig(target_modules=["q_proj", "v_proj"])
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
        policy = TransformersPolicy(model, TOKENIZER, max_new_tokens=6)
        model.train()
        modes = [module.training for module in model.modules()]
        td = roll(make_env(mode, 4).append_transform(RetrieveKL(AdapterReference(model))), policy)
        expected = expected_turns(td, base, "k1")
        found = [row.sum() for row in columns.read_field(td["next", "kl_penalty"], "full", td.batch_size)]
        assert torch.allclose(torch.stack(found).reshape(4, 3), expected, atol=1e-3)
        assert expected.abs().max() > 0.1  # the adapter does something
        assert [module.training for module in model.modules()] == modes
        # It is on again, and trains.
        view = training_view(td)
        scores = sequence_log_probs(model, view)
        assert torch.allclose(
            scores.log_probs[scores.mask], dense(view, ("log_probs", "full"))[scores.mask], atol=1e-4
        )
        scores.log_probs.sum().backward()
        assert any(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "lora" in n)

    def test_no_adapter(self, reference):
        with pytest.raises(TypeError, match=r"torchrl_chat\[peft\]"):
            AdapterReference(reference)

    def test_any_function(self, policy, reference):
        def elsewhere(sequences):
            return [[None, *plain_log_probs(reference, torch.tensor(ids))[1:].tolist()] for ids in sequences]

        far = roll(make_env("tokens", 4).append_transform(RetrieveKL(elsewhere)), policy)
        near = roll(make_env("tokens", 4).append_transform(RetrieveKL(reference)), policy)
        assert torch.allclose(far["next", "reward"], near["next", "reward"], atol=1e-4)

    @pytest.mark.parametrize(
        ("function", "message"),
        [
            (lambda rows: [], "asked for 4 sequences and returned 0"),
            (lambda rows: [[-1.0] * (len(row) + 1) for row in rows], "log-probs for the"),
            (lambda rows: [[None] * len(row) for row in rows], "no finite log-prob for token"),
            (lambda rows: [[math.nan] * len(row) for row in rows], "no finite log-prob for token"),
        ],
    )
    def test_a_function_that_answers_wrongly(self, policy, function, message):
        with pytest.raises(ValueError, match=message):
            roll(make_env("tokens", 4).append_transform(RetrieveKL(function)), policy)

    def test_kinds(self, policy, reference):
        assert isinstance(as_reference(reference), ModelReference)
        assert as_reference(policy).model is policy.model
        assert isinstance(as_reference(print), RemoteReference)
        kept = ModelReference(reference, max_tokens=3)
        assert as_reference(kept) is kept
        for wrong in (3, None, torch.nn.Linear(2, 2)):
            with pytest.raises(TypeError, match="is no reference"):
                as_reference(wrong)
        ids = [torch.tensor([5, 6, 7]), torch.tensor([5, 9])]
        masks = [torch.tensor([True, False, True]), torch.tensor([False, True])]
        for row, mask, found in zip(ids, masks, kept.score(ids, masks), strict=True):
            expected = plain_log_probs(reference, row) * mask
            assert torch.allclose(found, expected, atol=1e-5)
        assert issubclass(ModelReference, Reference)


class TestServer:
    @pytest.fixture(scope="class")
    def url(self, reference):
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if body["model"] != "tiny":
                    self.send_error(404)
                    return
                assert self.path == "/v1/completions"
                choices = []
                for i, ids in enumerate(body["prompt"]):
                    values = [None, *plain_log_probs(reference, torch.tensor(ids))[1:].tolist()]
                    choice = {"index": i, "text": "x"}
                    if body.get("echo"):
                        choice["logprobs"] = {"token_logprobs": [*values, -0.5]}  # and the generated token
                    if "prompt_logprobs" in body:
                        choice["prompt_logprobs"] = [
                            None
                            if v is None
                            else {str(token): {"logprob": v}, "0": {"logprob": -9.0}}
                            if token
                            else {"0": {"logprob": v}}
                            for v, token in zip(values, ids, strict=True)
                        ]
                    choices.insert(0, choice)  # in any order
                data = json.dumps({"choices": choices}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()
        server.server_close()

    @pytest.mark.parametrize("style", ["echo", "prompt_logprobs"])
    def test_completions(self, policy, reference, url, style):
        there = CompletionsReference(url, "tiny", style=style, batch_size=3)
        far = roll(make_env("tokens", 8).append_transform(RetrieveKL(there)), policy)
        near = roll(make_env("tokens", 8).append_transform(RetrieveKL(reference)), policy)
        assert torch.allclose(far["next", "reward"], near["next", "reward"], atol=1e-4)

    def test_errors(self, url):
        ids, mask = [torch.tensor([5, 6])], [torch.tensor([False, True])]
        with pytest.raises(RuntimeError, match="answered 404"):
            CompletionsReference(url, "other").score(ids, mask)
        with pytest.raises(RuntimeError, match="gave no completions"):
            CompletionsReference("http://127.0.0.1:9/v1", "tiny", timeout=2).score(ids, mask)
        with pytest.raises(ValueError, match="style='raw'"):
            CompletionsReference(url, "tiny", style="raw")
        lacking = CompletionsReference(url, "tiny")
        with pytest.raises(RuntimeError, match="no log-probs of the prompt"):
            lacking._read({"logprobs": None}, [5, 6])


class TestBadInput:
    def test_no_tokenizer(self, reference):
        env = ChatEnv(input_mode="history", batch_size=(1,)).append_transform(RetrieveKL(reference))
        with pytest.raises(ValueError, match="give the environment a tokenizer"):
            _ = env.reward_spec

    def test_another_vocabulary(self, policy, reference):
        env = make_env("tokens", 2).append_transform(RetrieveKL(tiny_model(8)))
        with pytest.raises(ValueError, match="another vocabulary"):
            roll(env, policy)
        env = make_env("tokens", 2).append_transform(RetrieveKL(reference, tokenizer=tiny_tokenizer("0123")))
        with pytest.raises(ValueError, match="another vocabulary: '.' has the id"):
            roll(env, policy)
        roll(make_env("tokens", 2).append_transform(RetrieveKL(reference, tokenizer=tiny_tokenizer())), policy)

    def test_missing_log_probs(self, mode, reference):
        def step(**options):
            env = make_env(mode, 2).append_transform(RetrieveKL(reference, **options))
            return env.step(respond(env, env.reset(), ["12", "3"]))["next"]

        with pytest.raises(ValueError, match=r"row 0 has sampled tokens without log-probs.*missing='zero'"):
            step()
        following = step(missing="zero")
        assert not any(row.any() for row in following.get(("kl_penalty", "full"), as_list=True))
        assert all(row.any() for row in following.get(("ref_log_probs", "full"), as_list=True))
        assert not following["reward"].any()

    def test_reward_of_another_shape(self, reference):
        steps = batch_of(transcripts(2, 0))
        steps["next"] = batch_of(transcripts(2, 1), reward=torch.zeros(2, 5, 1))
        with pytest.raises(ValueError, match=r"the reward has the shape \(2, 5, 1\)"):
            RetrieveKL(reference)(steps)

    def test_neither_steps_nor_views(self, reference):
        with pytest.raises(KeyError, match=r"reads steps.*'other'"):
            RetrieveKL(reference)(TensorDict(other=torch.zeros(2), batch_size=(2,)))
        steps = TensorDict(next=batch_of(transcripts(2, 1)), batch_size=(2,))
        with pytest.raises(KeyError, match="reads 'transcript'"):
            RetrieveKL(reference)(steps)
        with pytest.raises(ValueError, match="packed"):
            RetrieveKL(reference)(training_view(batch_of(transcripts(2, 1)), layout="packed"))

    @pytest.mark.parametrize(
        "options",
        [
            {"kind": "k9"},
            {"when": "never"},
            {"on": "read"},
            {"missing": "nan"},
            {"kl_key": "kl"},
            {"ref_log_probs_key": "a"},
        ],
        ids=str,
    )
    def test_settings(self, reference, options):
        with pytest.raises(ValueError, match=next(iter(options))):
            RetrieveKL(reference, **options)

    def test_legacy_names(self, policy, reference):
        one = roll(make_env("tokens", 2).append_transform(KLRewardTransform(reference, coef=0.2)), policy)
        two = roll(make_env("tokens", 2).append_transform(RetrieveKL(reference, coeff=0.2)), policy)
        assert torch.equal(one["next", "reward"], two["next", "reward"])
