"""The training view: finished episodes in every layout, and what torchrl's losses make of it."""

from __future__ import annotations

import itertools
import pickle

import pytest
import torch
from branch_turns import STRIPS, ledger, play
from conftest import bpe_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict, lazy_stack
from tensordict.nn import TensorDictModule
from torchrl.collectors.llm import LLMCollector
from torchrl.data import LazyStackStorage, ReplayBuffer
from torchrl.envs import Transform
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.llm.grpo import GRPOLoss, MCAdvantage
from training_rows import TOKENIZER, batch_of, dense, make_env, transcripts
from transformers import AutoConfig, AutoModelForCausalLM

from torchrl_chat import (
    ChatEnv,
    Transcript,
    TransformersPolicy,
    columns,
    training_view,
)
from torchrl_chat.tiny import tiny_model
from torchrl_chat.training import (
    gae,
    group_advantages,
    microbatches,
    policy_loss,
    sequence_log_probs,
    token_rewards,
)

LAYOUTS = [
    {"layout": "padded"},
    {"layout": "padded", "side": "left", "pad_id": 3, "multiple_of": 16},
    {"layout": "packed"},
    {"layout": "packed", "multiple_of": 32, "pad_id": -100},
    {"layout": "packed", "max_tokens": 150},
]


@pytest.fixture(scope="module")
def policy():
    return TransformersPolicy(tiny_model(len(TOKENIZER)), TOKENIZER, max_new_tokens=6)


@pytest.fixture(params=[1, 8], ids=["one row", "eight rows"])
def rollout(request, mode, policy):
    """All steps of finished conversations of three turns, (B, 3)."""
    torch.manual_seed(request.param)
    return make_env(mode, request.param).rollout(3, policy, break_when_any_done=False)


class TestEpisodes:
    def test_a_rollout_gives_its_last_steps(self, rollout):
        view, last = training_view(rollout), training_view(rollout[:, -1]["next"])
        assert view["episode"].tolist() == list(range(len(rollout)))
        for key in (("tokens", "full"), ("masks", "all_assistant_mask"), ("log_probs", "full")):
            assert torch.equal(dense(view, key), dense(last, key))
        assert torch.equal(view["reward"], last["reward"])
        # The dataset's columns are found wherever they stand.
        assert view["query"] == rollout[:, 0]["query"]

    def test_every_sampled_token_once(self, rollout):
        view = training_view(rollout)
        masks = columns.read_field(view["masks"], "all_assistant_mask", view.batch_size)
        tokens = columns.read_field(view["tokens"], "full", view.batch_size)
        scores = columns.read_field(view["log_probs"], "full", view.batch_size)
        for row in range(len(rollout)):
            steps = [rollout[row, t] for t in range(3)]
            sampled = torch.cat([step["tokens"].get("response") for step in steps])
            reported = torch.cat([step["log_probs"].get("response") for step in steps])
            assert tokens[row][masks[row]].tolist() == sampled.tolist()
            assert scores[row][masks[row]].tolist() == reported.tolist()
            assert not scores[row][~masks[row]].any()
        assert view["scored"].all()

    def test_finished_rows_that_stay_in_a_rollout_count_once(self, policy):
        """Rows end at different turns; torchrl repeats the finished ones until the last one ends."""

        class Ends(Transform):
            def _step(self, td, following):
                over = [[len(t.spans) > row % 3] for row, t in enumerate(following["transcript"])]
                following["done"] = following["terminated"] = torch.tensor(over)
                return following

        env = make_env("tokens", 6, turns=9).append_transform(Ends(in_keys=[], out_keys=[]))
        td = env.rollout(5, policy, break_when_any_done=False, break_when_all_done=True)
        assert td.shape == (6, 3)
        view = training_view(td, turns=True)
        assert view["episode"].tolist() == list(range(6))
        assert view["turn_reward"].shape == (6, 3)
        runs = [len(t.spans) for t in td[:, -1]["next", "transcript"]]
        assert runs == [1, 2, 3, 1, 2, 3]

    @pytest.mark.parametrize("whole", [False, True], ids=["turns", "trajectories"])
    def test_a_collectors_batch(self, policy, whole):
        torch.manual_seed(0)
        collector = LLMCollector(
            make_env("tokens", 4), policy=policy, dialog_turns_per_batch=24, total_dialog_turns=24,
            yield_completed_trajectories=whole,
        )  # fmt: skip
        [batch] = list(collector)
        view = training_view(batch)
        assert len(view) == 8
        assert view["step_count"].flatten().tolist() == [3] * 8
        scores = sequence_log_probs(policy.model, view)
        assert torch.allclose(
            scores.log_probs[scores.mask], dense(view, ("log_probs", "full"))[scores.mask], atol=1e-5
        )
        halves = [batch[:, :3], batch[:, 3:]] if batch.ndim == 2 else [batch[:12], batch[12:]]
        both = training_view(halves)
        assert sorted(map(tuple, dense(both, ("tokens", "full")).tolist())) == sorted(
            map(tuple, dense(view, ("tokens", "full")).tolist())
        )
        assert sorted(both["answer"]) == sorted(view["answer"])

    def test_turn_rewards(self, rollout):
        view = training_view(rollout, turns=True)
        rewards = rollout["next", "reward"].flatten(1)
        assert torch.equal(view["turn_reward"], rewards)
        assert torch.equal(view["reward"].flatten(), rewards.sum(1))
        assert view["reward"].shape == (len(rollout), 1, 1)

    def test_turn_rewards_of_branches(self):
        tokenizer = bpe_tokenizer.__wrapped__()
        tokenizer.chat_template = STRIPS
        env = ChatEnv(input_mode="tokens", tokenizer=tokenizer, history_policy="template")
        _, ledgers, _ = play(env, ["<think>\nso\n</think>\n\n42"] * 3)
        steps = []
        for k, after in enumerate(ledgers):
            flags = {"done": torch.tensor([[k == 2]]), "reward": torch.full((1, 1, 1), k + 1.0)}
            steps.append(
                TensorDict({"next": batch_of([after], **flags), "done": torch.zeros(1, 1).bool()}, batch_size=(1,))
            )
        view = training_view(lazy_stack(steps, 1), turns=True)
        assert view["turn_reward"].sum(1).tolist() == [1.0, 2.0, 3.0]
        assert view["reward"].flatten().tolist() == [6.0] * 3

    def test_bad_input(self, rollout):
        with pytest.raises(KeyError, match="needs 'transcript'.*reward"):
            training_view(TensorDict(reward=torch.zeros(2), batch_size=(2,)))
        with pytest.raises(ValueError, match="no row ends an episode"):
            training_view(rollout[:, :2])
        with pytest.raises(ValueError, match="pass the steps"):
            training_view(rollout[:, -1]["next"], turns=True)
        with pytest.raises(ValueError, match="its first steps are in an earlier batch"):
            training_view(rollout[:, 1:], turns=True)
        with pytest.raises(ValueError, match=r"longer than|more than max_tokens=5"):
            training_view(rollout, layout="packed", max_tokens=5)
        with pytest.raises(ValueError, match="not a multiple of the group size 3"):
            training_view(rollout, group=3)
        for wrong in ({"layout": "flat"}, {"side": "top"}, {"multiple_of": 0}, {"max_tokens": 0}):
            with pytest.raises(ValueError, match=next(iter(wrong))):
                training_view(rollout, **wrong)


class TestGroups:
    def test_by_column_and_by_size(self, policy):
        td = make_env("tokens", 8, turns=1, group=4).rollout(1, policy)
        assert training_view(td)["group"].tolist() == [0] * 4 + [1] * 4
        assert training_view(td, group=2)["group"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        td["next", "done"][[1, 2, 6]] = False  # an episode that goes on keeps its place
        assert training_view(td, group=2)["group"].tolist() == [0, 1, 2, 2, 3]
        assert training_view(td, group=4)["group"].tolist() == [0, 0, 1, 1, 1]
        assert "group" not in training_view(td, group=None).keys()
        assert "group" not in training_view(td, group="nothing").keys()

    def test_by_size_over_steps(self, policy):
        """The steps of an episode are one place, as a rollout has them and one behind the other; also of one that goes on."""
        rollout = make_env("tokens", 8, turns=2, group=4).rollout(2, policy, break_when_any_done=False)
        assert rollout.batch_size == (8, 2)
        rows = [step for row in rollout.unbind(0) for step in row.unbind(0)]
        for unfinished, expected in (((), [0, 0, 1, 1, 2, 2, 3, 3]), ((0, 3, 4), [0, 1, 2, 3, 3])):
            for row in unfinished:
                rollout[row, 1]["next"]["done"].fill_(False)
            assert training_view(rollout, group=2)["group"].tolist() == expected
            assert training_view(lazy_stack(rows), group=2)["group"].tolist() == expected

    def test_equal_rows_far_apart(self):
        td = batch_of(transcripts(4, 1), query=columns.objects(["b", "a", "b", "a"], torch.Size([4]), None))
        assert training_view(td)["group"].tolist() == [0, 1, 0, 1]
        td["group"] = torch.tensor([5, 5, 6, 6])
        assert training_view(td)["group"].tolist() == [0, 1, 0, 1]
        assert training_view(td, group="group")["group"].tolist() == [0, 0, 1, 1]
        td["number"] = torch.tensor([[7], [7], [7], [9]])
        assert training_view(td, group="number")["group"].tolist() == [0, 0, 0, 1]


class TestLayouts:
    @settings(deadline=None, max_examples=60)
    @given(
        n=st.integers(1, 7), turns=st.integers(0, 3), seed=st.integers(0, 99), multiple=st.integers(1, 9),
        room=st.integers(0, 40), side=st.sampled_from(["left", "right"]),
    )  # fmt: skip
    def test_all_layouts_hold_the_same(self, n, turns, seed, multiple, room, side):
        ledgers = transcripts(n, turns, seed)
        td = batch_of(ledgers, reward=torch.arange(n).float())
        padded = training_view(td, layout="padded", side=side, pad_id=99, multiple_of=multiple)
        most = max(map(len, ledgers)) + room
        packed = training_view(td, layout="packed", pad_id=99, multiple_of=multiple, max_tokens=most)
        fields = [("tokens", "full"), ("masks", "all_assistant_mask"), ("log_probs", "full")]
        lone = training_view(td, layout="packed", pad_id=99)
        for row, t in enumerate(ledgers):
            real = padded["masks"].all_attention_mask[row]
            for (container, key), value in zip(fields, (t.tokens, t.mask, t.log_probs), strict=True):
                assert torch.equal(padded[container].get(key)[row][real], value)
                for view in (packed, lone):
                    assert torch.equal(view[container].get(key)[view["sequence_ids"] == row], value)
            assert padded["position_ids"][row][real].tolist() == list(range(len(t)))
            assert packed["position_ids"][packed["sequence_ids"] == row].tolist() == list(range(len(t)))
            assert bool(real[-1] if side == "right" and len(t) == real.numel() else True)
        for view in (padded, packed):
            real = view["masks"].all_attention_mask
            assert (view["tokens"].full[~real] == 99).all()
            assert not view["masks"].all_assistant_mask[~real].any()
            assert real.shape[1] % multiple == 0
            assert int(real.sum()) == sum(map(len, ledgers))
        assert int(packed["masks"].all_attention_mask.sum(1).max()) <= most
        bounds = packed["cu_seqlens"].tolist()
        flat = packed["sequence_ids"].flatten()
        pieces = [flat[a:b].unique().tolist() for a, b in itertools.pairwise(bounds)]
        assert all(len(piece) == 1 for piece in pieces)  # each stretch is of one sequence, or padding
        assert sorted(p[0] for p in pieces if p[0] >= 0) == list(range(n))
        assert bounds[0] == 0
        assert bounds[-1] == flat.numel()

    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    @pytest.mark.parametrize("options", LAYOUTS, ids=str)
    @pytest.mark.by_day(2)
    def test_the_same_log_probs(self, rollout, policy, options, attention):
        """In every layout, those that were reported while sampling: nothing of a neighbour or of the future leaks."""
        model = policy.model
        before = model.config._attn_implementation
        model.set_attn_implementation(attention)
        try:
            view = training_view(rollout, **options)
            scores = sequence_log_probs(model, view, temperature=policy.temperature, vocab_size=policy.vocab_size)
        finally:
            model.set_attn_implementation(before)
        assert torch.equal(scores.mask, view["masks"].all_assistant_mask)
        assert torch.allclose(scores.log_probs, view["log_probs"].full, atol=2e-5)

    def test_torchs_own_packing_differs(self, policy):
        """The check above can fail: with a mask over the whole row the neighbours are seen."""
        view = training_view(batch_of(transcripts(3, 1)), layout="packed")
        right = sequence_log_probs(policy.model, view)
        view["position_ids"] = torch.arange(view["position_ids"].numel())[None]
        assert (sequence_log_probs(policy.model, view).log_probs - right.log_probs).abs().max() > 1e-2

    def test_ungraded_rows_are_masked(self):
        td = batch_of(
            transcripts(3, 1),
            graded=torch.tensor([True, False, False]).reshape(3, 1, 1),
            grade_failure=columns.objects(["", "it crashed", ""], torch.Size([3]), None),
        )
        for layout in ("ragged", "padded"):
            mask = dense(training_view(td, layout=layout), ("masks", "all_assistant_mask"))
            assert mask.any(1).tolist() == [True, False, True]

    def test_ungraded_rows_earn_nothing(self):
        td = batch_of(
            transcripts(3, 1),
            graded=torch.tensor([True, False, True]).reshape(3, 1, 1),
            grade_failure=columns.objects(["", "it crashed", ""], torch.Size([3]), None),
            reward=torch.tensor([1.0, 2.0, 3.0]).reshape(3, 1, 1),
        )
        view = training_view(td, layout="padded")
        assert view["reward"].flatten().tolist() == [1, 0, 3]
        assert token_rewards(view["reward"], view["masks"].all_assistant_mask).sum(-1).tolist() == [1, 0, 3]
        assert td["reward"].flatten().tolist() == [1, 2, 3]  # what the episodes say stays

    def test_rows_are_their_own_memory(self):
        """A row that is pickled alone does not take the batch along."""
        view = training_view(batch_of(transcripts(200, 3)))
        assert len(pickle.dumps(view[0])) < 20_000


class TestScoring:
    @pytest.mark.parametrize("options", [{}, *LAYOUTS], ids=str)
    def test_against_the_whole_of_the_logits(self, policy, options):
        view = training_view(batch_of(transcripts(5, 2)), **options)
        model, temperature = policy.model, 0.7
        scores = sequence_log_probs(model, view, temperature=temperature, entropy=True, chunk=3)
        found = []
        for t in transcripts(5, 2):
            logits = model(input_ids=t.tokens[None]).logits[0, :-1] / temperature
            log_probs = logits.log_softmax(-1)
            entropy = -(log_probs.exp() * log_probs).sum(-1)[t.mask[1:]]
            found.append((log_probs.gather(-1, t.tokens[1:, None])[:, 0][t.mask[1:]], entropy))
        order = view["sequence_ids"][scores.mask] if "sequence_ids" in view.keys() else None
        for got, number in ((scores.log_probs, 0), (scores.entropy, 1)):
            if order is None:
                assert torch.allclose(got[scores.mask], torch.cat([pair[number] for pair in found]), atol=1e-5)
            else:
                for row, pair in enumerate(found):
                    assert torch.allclose(got[scores.mask][order == row], pair[number], atol=1e-5)
            assert not got[~scores.mask].any()

    @pytest.mark.parametrize("family", ["gemma2", "mistral", "cohere", "qwen3"])
    @pytest.mark.parametrize("options", LAYOUTS, ids=str)
    def test_families(self, family, options):
        """Sliding windows, soft caps, scaled logits: all as the model itself has them, sequence by sequence."""
        sizes = {
            "vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0,
        }  # fmt: skip
        special = {
            "gemma2": {"sliding_window": 4, "final_logit_softcapping": 1.0},
            "mistral": {"sliding_window": 4},
        }
        config = AutoConfig.for_model(family, **sizes, **special.get(family, {"logit_scale": 0.5}))
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        ledgers = transcripts(4, 2)
        scores = sequence_log_probs(model, training_view(batch_of(ledgers), **options))
        expected = []
        for t in ledgers:
            log_probs = model(input_ids=t.tokens[None]).logits[0, :-1].log_softmax(-1)
            expected.append(log_probs.gather(-1, t.tokens[1:, None])[:, 0][t.mask[1:]])
        found, wanted = scores.log_probs[scores.mask].sort().values, torch.cat(expected).sort().values
        assert torch.allclose(found, wanted, atol=1e-5)

    def test_gradients_in_chunks_and_minibatches(self, policy):
        td = batch_of(transcripts(6, 2))
        gradients = []
        for options in ({}, {"chunk": 2}, {"max_tokens": 30}, {"max_tokens": 1, "chunk": 1}):
            policy.model.zero_grad()
            sequence_log_probs(policy.model, training_view(td), **options).log_probs.sum().backward()
            gradients.append([p.grad.clone() for p in policy.model.parameters()])
        for other in gradients[1:]:
            for mine, theirs in zip(gradients[0], other, strict=True):
                assert torch.allclose(mine, theirs, atol=1e-4)

    def test_gradients_of_log_probs_and_entropy(self, policy):
        """As autograd has them for the whole of the logits, with a temperature and a cut vocabulary."""
        [t], options = transcripts(1, 2), {"temperature": 0.7, "vocab_size": 22}
        model, gradients = policy.model, []
        weights = torch.randn(2, len(t), generator=torch.Generator().manual_seed(0))
        for ours in (True, False):
            model.zero_grad()
            if ours:
                scores = sequence_log_probs(model, training_view(batch_of([t])), entropy=True, chunk=3, **options)
                both = scores.log_probs[0], scores.entropy[0]
            else:
                log_probs = (model(input_ids=t.tokens[None]).logits[0, :-1, :22] / 0.7).log_softmax(-1)
                log_probs = torch.cat((torch.zeros(1, 22), log_probs))
                scored = log_probs.gather(-1, t.tokens[:, None])[:, 0]
                both = scored * t.mask, -(log_probs.exp() * log_probs).sum(-1) * t.mask
            (both[0] @ weights[0] + both[1] @ weights[1]).backward()
            gradients.append([p.grad.clone() for p in model.parameters()])
        for mine, theirs in zip(*gradients, strict=True):
            assert torch.allclose(mine, theirs, atol=1e-5)

    def test_the_head_sees_trained_tokens_only(self, policy):
        seen = []
        hook = policy.model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape))
        view = training_view(batch_of(transcripts(6, 1)))
        try:
            scores = sequence_log_probs(policy.model, view)
        finally:
            hook.remove()
        assert seen == [(1, int(scores.mask.sum()), policy.model.config.vocab_size)]
        logits = policy.model(input_ids=torch.tensor([[5, 6]])).logits
        assert logits.shape[:2] == (1, 2)  # the model is as it was

    def test_nothing_to_score(self, policy):
        scores = sequence_log_probs(policy.model, training_view(batch_of(transcripts(2, 0))))
        assert not scores.log_probs.any()
        assert not scores.mask.any()

    def test_bad_input(self, policy):
        view = training_view(batch_of(transcripts(2, 1)), layout="padded")
        with pytest.raises(ValueError, match="temperature is 0"):
            sequence_log_probs(policy.model, view, temperature=0)
        with pytest.raises(ValueError, match="another vocabulary"):
            sequence_log_probs(tiny_model(8), view)
        with pytest.raises(KeyError, match="training_view"):
            sequence_log_probs(policy.model, view.exclude("masks"))
        with pytest.raises(ValueError, match="packed"):
            microbatches(training_view(batch_of(transcripts(2, 1)), layout="packed"), 99)


def with_advantage(view):
    reward = torch.randn(len(view), generator=torch.Generator().manual_seed(1)).reshape(-1, 1, 1)
    view["advantage"] = group_advantages(reward, torch.zeros(len(view), dtype=torch.int64))
    return view


class TestTorchrlLosses:
    @pytest.mark.parametrize("options", [{}, {"layout": "padded"}], ids=str)
    def test_nothing_has_moved_before_the_first_update(self, rollout, policy, options):
        output = GRPOLoss(policy, masking_strategy="rlhf")(with_advantage(training_view(rollout, **options)))
        assert float(output.ESS) == pytest.approx(1.0, abs=1e-3)
        assert abs(float(output.kl_approx)) < 1e-5
        assert float(output.clip_fraction) == 0

    @pytest.mark.parametrize(
        ("theirs", "ours"),
        [
            ({}, {}),
            ({"clip_epsilon": (0.2, 0.28)}, {"clip": (0.2, 0.28)}),
            ({"clip_epsilon": 0.01}, {"clip": 0.01}),
            ({"aggregation": "prompt_mean"}, {"aggregation": "sequence"}),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("options", [{"layout": "padded"}, {"layout": "packed"}], ids=str)
    def test_grpo_loss_has_our_gradient(self, rollout, policy, theirs, ours, options):
        view = with_advantage(training_view(rollout))
        model, names = policy.model, [name for name, _ in policy.model.named_parameters()]
        saved = {key: value.clone() for key, value in model.state_dict().items()}
        torch.manual_seed(3)
        with torch.no_grad():  # an update or two later
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        try:
            model.zero_grad()
            output = GRPOLoss(policy, masking_strategy="rlhf", entropy_bonus=False, **theirs)(view)
            output.loss_objective.sum().backward()
            expected = [p.grad.clone() for p in model.parameters()]
            model.zero_grad()
            laid = training_view(rollout, **options)
            scores = sequence_log_probs(model, laid)
            loss, metrics = policy_loss(
                scores.log_probs, laid["log_probs"].full, view["advantage"], scores.mask,
                sequences=laid.get("sequence_ids", None), **ours,
            )  # fmt: skip
            loss.backward()
            assert loss.item() == pytest.approx(output.loss_objective.sum().item(), abs=1e-5)
            assert metrics["ess"].item() == pytest.approx(output.ESS.item(), abs=1e-4)
            for name, mine, parameter in zip(names, expected, model.parameters(), strict=True):
                assert torch.allclose(mine, parameter.grad, atol=2e-5), name
        finally:
            model.load_state_dict(saved)
            model.zero_grad()

    def test_mc_advantage_and_ours(self, policy):
        view = training_view(make_env("tokens", 8, turns=2, group=4).rollout(2, policy, break_when_any_done=False))
        view["reward"] = torch.randn(8, 1, 1)
        ours = group_advantages(view["reward"], view["group"])
        view["next"] = TensorDict(
            reward=view["reward"], done=torch.ones(8, 1, 1, dtype=torch.bool), batch_size=(8,)
        )
        buffer = ReplayBuffer(storage=LazyStackStorage(8), transform=MCAdvantage(grpo_size=4), batch_size=8)
        buffer.extend(view)
        stored = buffer[:]
        for row in range(8):
            [place] = [i for i in range(8) if stored[i]["tokens"].full.equal(view[row]["tokens"].full)
                       and torch.equal(stored[i]["next", "reward"], view[row]["reward"])]  # fmt: skip
            assert torch.allclose(stored[place]["advantage"].flatten(), ours[row].flatten(), atol=1e-4)
        assert float(GRPOLoss(policy, masking_strategy="rlhf")(buffer.sample()).ESS) == pytest.approx(1, abs=1e-3)

    def test_ppo_with_a_critic(self, rollout, policy):
        view = training_view(rollout, layout="padded", turns=True)
        mask = view["masks"].all_assistant_mask
        values = torch.randn(mask.shape, generator=torch.Generator().manual_seed(2))
        advantage, target = gae(token_rewards(view["turn_reward"], mask), values, mask)
        view["advantage"], view["value_target"] = advantage[..., None], target[..., None]
        view["state_value"] = values[..., None]

        class Critic(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.embed = torch.nn.Embedding(len(TOKENIZER), 1)

            def forward(self, tokens):
                return self.embed(tokens)

        critic = TensorDictModule(Critic(), in_keys=[("tokens", "full")], out_keys=["state_value"])
        loss = ClipPPOLoss(policy, critic, entropy_bonus=False, normalize_advantage=False, functional=False)
        loss.set_keys(action=("tokens", "full"), sample_log_prob=("log_probs", "full"))
        output = loss(view)
        assert float(output["kl_approx"].detach()) == pytest.approx(0, abs=1e-5)
        # At ratio 1 the surrogate is the mean advantage, here over all places of the rectangle.
        assert float(output["loss_objective"].detach()) == pytest.approx(-float(advantage.mean()), abs=1e-4)
        policy.model.zero_grad()
        (output["loss_objective"] + output["loss_critic"]).backward()
        assert policy.model.lm_head.weight.grad.abs().sum() > 0
        assert critic.module.embed.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_minibatches_are_as_large_as_they_may_be_whatever_side_is_padded(side):
    view = training_view(batch_of(transcripts(9, 2)), layout="padded", side=side)
    attention = view["masks"].all_attention_mask
    for rows in microbatches(view, 90):
        part = attention[rows]
        used = int(part.any(0).nonzero().max()) + 1  # the width that is computed: padding on the left is
        assert len(rows) == 1 or len(rows) * used <= 90


@pytest.mark.parametrize(
    "options", [{"layout": "ragged"}, {"layout": "padded"}, {"layout": "padded", "side": "left"}]
)
def test_rows_without_a_trained_token_are_in_no_minibatch(policy, options):
    graded = torch.tensor([True, False, True, False, False]).reshape(5, 1, 1)
    why = columns.objects(["", "no", "", "no", "no"], torch.Size([5]), None)
    td = batch_of(transcripts(5, 2), graded=graded, grade_failure=why)
    view = training_view(td, **options)
    parts = microbatches(view, 1)
    assert sorted(part.tolist() for part in parts) == [[0], [2]]
    for rows in parts:  # each has a gradient
        assert sequence_log_probs(policy.model, view[rows]).log_probs.requires_grad
    assert microbatches(view[torch.tensor([1, 3, 4])], 100) == []
    alone = batch_of([Transcript.start([], ()).sampled(torch.tensor([7]), None, {"role": "assistant"}, ended=True)])
    assert microbatches(training_view(alone, **options), 100) == []  # a first token is never scored


def test_accumulated_gradients_are_those_of_the_batch(policy):
    view = with_advantage(training_view(batch_of(transcripts(7, 2)), layout="padded"))
    model, old = policy.model, view["log_probs"].full
    gradients = []
    for size in (10**6, 60):
        model.zero_grad()
        total = view["masks"].all_assistant_mask.sum()
        parts = microbatches(view, size)
        assert sorted(int(i) for part in parts for i in part) == list(range(7))
        for rows in parts:
            part = view[rows]
            scores = sequence_log_probs(model, part)
            loss, _ = policy_loss(
                scores.log_probs, old[rows], part["advantage"], scores.mask, denominator=total, clip=0.9
            )
            loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert len(parts) > 1
    for mine, theirs in zip(*gradients, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-4)


def test_branches_are_one_episode():
    tokenizer = bpe_tokenizer.__wrapped__()
    tokenizer.chat_template = STRIPS
    env = ChatEnv(input_mode="tokens", tokenizer=tokenizer, history_policy="template")
    td, _, sampled = play(env, ["<think>\nso\n</think>\n\n42"] * 2)
    both = batch_of([ledger(td), *transcripts(1, 1)], reward=torch.tensor([1.0, 0.0]).reshape(2, 1, 1))
    for options in LAYOUTS:
        view = training_view(both, **{**options, "max_tokens": options.get("max_tokens") and 500})
        assert view["episode"].tolist() == [0, 0, 1]
        mask, where = view["masks"].all_assistant_mask, view.get("sequence_ids", None)
        trained = view["tokens"].full[mask & (torch.ones_like(mask) if where is None else where < 2)]
        count = sum(len(ids) for ids, _ in sampled)
        assert trained[:count].tolist() == [i for ids, _ in sampled for i in ids.tolist()]
    # Each episode counts once in its group, whatever the number of its sequences.
    advantage = group_advantages(view["reward"], torch.zeros(3).long(), episode=view["episode"], normalize=None)
    assert advantage.flatten().tolist() == [0.5, 0.5, -0.5]


def test_branches_without_a_sampled_token_are_left_out():
    """What the last user message opened carries no reward that no token could bear."""
    tokenizer = bpe_tokenizer.__wrapped__()
    tokenizer.chat_template = STRIPS
    env = ChatEnv(input_mode="tokens", tokenizer=tokenizer, history_policy="template")
    td, _, sampled = play(env, ["<think>\nso\n</think>\n\n42"] * 2)
    never, *_ = transcripts(1, 0)
    assert not ledger(td).sequences[-1].mask.any()
    both = batch_of([ledger(td), never], reward=torch.tensor([1.0, 0.0]).reshape(2, 1, 1))
    view = training_view(both, layout="padded")
    mask = view["masks"].all_assistant_mask
    assert view["episode"].tolist() == [0, 0, 1]
    assert view["episode_sequence"].tolist() == [[0, 2], [1, 2], [0, 1]]
    assert mask.any(-1).tolist() == [True, True, False]
    assert view["tokens"].full[mask].tolist() == [i for ids, _ in sampled for i in ids.tolist()]
    assert token_rewards(view["reward"], mask).sum(-1).tolist() == [1, 1, 0]


def test_episodes_of_several_views_are_told_apart():
    views = [training_view(batch_of(transcripts(4, 2, seed=seed)), **LAYOUTS[0]) for seed in (0, 1, 0)]
    first, other, again = (view["episode_digest"].tolist() for view in views)
    assert first == again
    assert len({*first, *other}) == 8
    assert training_view(batch_of(transcripts(4, 2)), layout="packed")["episode_digest"].tolist() == first
