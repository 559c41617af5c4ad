"""The training step that the recipes stand on: what is forwarded, counted and stepped, and what is told of a run."""

from __future__ import annotations

import copy

import pytest
import torch
from tensordict import TensorDict

from torchrl_chat import ChatEnv, TransformersPolicy, training_view
from torchrl_chat.learner import averaged, compute_in, learn, with_lora
from torchrl_chat.models.passes import float_type
from torchrl_chat.models.proof import prover_of
from torchrl_chat.recipes.watching import Watch, figures
from torchrl_chat.tiny import tiny_model, tiny_tokenizer
from torchrl_chat.training import masked_mean, policy_loss, sequence_log_probs


@pytest.fixture(scope="module")
def collected():
    """Eight finished conversations, and the model."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(len(tokenizer))
    env = ChatEnv(tokenizer=tokenizer, input_mode="tokens", batch_size=(8,))
    td = env.reset(TensorDict(query=["last(3,7)="] * 8, batch_size=(8,)))
    torch.manual_seed(0)
    return model, env.step(TransformersPolicy(model, tokenizer, max_new_tokens=6)(td))["next"]


@pytest.fixture
def view(collected):
    made = training_view(collected[1], layout="padded", group=None)
    made["advantage"] = torch.tensor([1.0, 0.0, -2.0, 0.0, 0.0, 3.0, 0.0, 0.5])
    return made


def stepped(model, view, *, forwarded=None, **options):
    """The weights after learning from a view, and what was told."""
    model = copy.deepcopy(model)
    if forwarded is not None:
        model.model.layers[0].register_forward_pre_hook(lambda _module, args: forwarded.append(len(args[0])))

    def loss_of(part, counts):
        scores = sequence_log_probs(model, part)
        return policy_loss(
            scores.log_probs, part["log_probs"].full, part["advantage"], scores.mask, denominator=counts.tokens
        )

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(1)
    told = learn(optimizer, view, loss_of, max_grad_norm=None, **{"minibatch": 8, "max_tokens": 10_000, **options})
    return torch.cat([p.detach().flatten() for p in model.parameters()]), told


def test_how_a_minibatch_is_cut_changes_nothing(collected, view):
    weights, told = stepped(collected[0], view)
    cut, told_cut = stepped(collected[0], view, max_tokens=40)
    assert torch.allclose(weights, cut, atol=1e-6)
    assert told["loss"] == pytest.approx(told_cut["loss"], abs=1e-6)
    assert told["grad_norm"] == pytest.approx(told_cut["grad_norm"], rel=1e-4)
    assert (told["skipped"], told["idle"]) == (0, 0.0)


def test_sequences_without_a_gradient_are_not_forwarded_and_still_count(collected, view):
    weights, told = stepped(collected[0], view)
    forwarded = []
    few, told_few = stepped(collected[0], view, needed=view["advantage"] != 0, forwarded=forwarded)
    assert forwarded[-1] == 4  # behind the passes of the model's proof
    assert torch.allclose(weights, few, atol=1e-6)
    assert told["loss"] == pytest.approx(told_few["loss"], abs=1e-6)


def test_a_minibatch_in_which_nothing_is_to_be_learned_takes_no_step(collected, view):
    view["advantage"] = torch.zeros(8)
    model = collected[0]
    weights, told = stepped(model, view, needed=view["advantage"] != 0, minibatch=4, epochs=2)
    assert torch.equal(weights, torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert told == {"skipped": 0, "idle": 1.0, "trained_tokens": 0.0}


def test_a_loss_that_is_no_number_is_skipped_and_counted(collected, view):
    view["advantage"][2] = torch.nan
    weights, told = stepped(collected[0], view, patience=3)
    assert torch.equal(weights, torch.cat([p.detach().flatten() for p in collected[0].parameters()]))
    assert told.pop("trained_tokens") > 0
    assert told == {"skipped": 1, "idle": 0.0}


def test_the_norm_is_that_before_clipping(collected, view):
    _, told = stepped(collected[0], view)
    model = copy.deepcopy(collected[0])
    scores = sequence_log_probs(model, view)
    loss, _ = policy_loss(scores.log_probs, view["log_probs"].full, view["advantage"], scores.mask)
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    assert told["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_percentiles_of_ratios_are_those_of_tokens_under_the_mask():
    log_probs = torch.linspace(-1, 1, 100)[None].log_softmax(-1)
    old = log_probs - torch.linspace(-0.5, 0.5, 100)
    mask = torch.ones(1, 100, dtype=torch.bool)
    _, metrics = policy_loss(log_probs, old, torch.ones(1), mask)
    ratios = (log_probs - old).exp()[0].sort().values
    assert metrics["ratio_p01"].item() == pytest.approx(ratios[0].item())
    assert metrics["ratio_p99"].item() == pytest.approx(ratios[98].item())


def test_averages_are_over_microbatches_and_losses_are_sums():
    assert averaged([]) == {}
    told = averaged(
        [
            [{"loss": torch.tensor(1.0), "x": torch.tensor(4.0)}],
            [{"loss": torch.tensor(3.0), "x": torch.tensor(0.0)}] * 2,
        ]
    )
    assert told == {"loss": 3.5, "x": pytest.approx(4 / 3)}


def test_supervised_learning_on_sampled_tokens_makes_them_likelier(collected, view):
    model = copy.deepcopy(collected[0])

    def loss_of(part, counts):
        scores = sequence_log_probs(model, part)
        return -masked_mean(scores.log_probs, scores.mask, denominator=counts.tokens), {}

    told = [
        learn(torch.optim.SGD(model.parameters(), lr=0.5), view, loss_of, minibatch=8, max_tokens=60)["loss"]
        for _ in range(3)
    ]
    assert told[2] < told[1] < told[0]


class TestPrecision:
    def made(self, vocab=26):
        return compute_in(tiny_model(vocab), torch.bfloat16)

    def test_it_computes_in_bfloat16_and_keeps_float32(self, view):
        model = self.made()
        assert float_type(model) == torch.bfloat16
        scores = sequence_log_probs(model, view)
        assert (scores.precision, scores.log_probs.dtype) == (torch.bfloat16, torch.float32)
        scores.log_probs.sum().backward()
        assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}

    def test_gradients_are_those_of_float32_within_rounding(self, view):
        found = []
        for model in (self.made(), tiny_model(26)):
            for chunk in (7, 1000):
                model.zero_grad()
                sequence_log_probs(model, view, chunk=chunk).log_probs.sum().backward()
                found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        for other, most in zip(found[:3], (3e-2, 3e-2, 1e-5), strict=True):
            assert float((other - found[3]).norm() / found[3].norm()) < most

    def test_what_it_samples_is_scored_as_it_was_sampled(self):
        tokenizer = tiny_tokenizer()
        model = self.made(len(tokenizer))
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
        env = ChatEnv(tokenizer=tokenizer, input_mode="tokens", batch_size=(16,))
        td = env.reset(TensorDict(query=["last(3,7)="] * 16, batch_size=(16,)))
        finished = env.step(TransformersPolicy(model, tokenizer, max_new_tokens=12)(td))["next"]
        view = training_view(finished, layout="padded", group=None)
        scores = sequence_log_probs(model, view)
        _, metrics = policy_loss(scores.log_probs, view["log_probs"].full, torch.ones(16), scores.mask)
        assert metrics["ess"] > 0.99
        assert prover_of(model).proof.limit > 1e-3
        assert 1e-4 < prover_of(model).record()["rounding"] < 0.1
        assert max(prover_of(model).record()["small_copy"].values()) < 1e-3  # which is in float32

    def test_a_copy_and_an_adapter_compute_alike(self, view):
        model = self.made()
        expected = sequence_log_probs(model, view).log_probs
        assert torch.equal(sequence_log_probs(copy.deepcopy(model), view).log_probs, expected)
        adapted = with_lora(model, 2)
        assert float_type(adapted) == torch.bfloat16
        assert torch.allclose(sequence_log_probs(adapted, view).log_probs, expected, atol=2e-2)
        assert type(model).__name__ == "LlamaForCausalLM"

    def test_weights_that_would_lose_updates_are_refused(self):
        with pytest.raises(ValueError, match=r"the weights are torch.bfloat16: expected torch.float32"):
            compute_in(tiny_model(26).to(torch.bfloat16), torch.bfloat16)
        with pytest.raises(ValueError, match="dtype=torch.float16"):
            compute_in(tiny_model(26), torch.float16)


class TestWatching:
    def test_figures_are_those_of_the_conversations(self, collected):
        told = figures([collected[1]])
        sampled = [t.mask.sum().item() for t in collected[1]["transcript"]]
        assert (told["sampled_tokens"], told["sampled_longest"]) == (sum(sampled), max(sampled))
        assert (told["cut"], told["ungraded"]) == (0.0, 0.0)
        twice = figures([collected[1]] * 2)  # a step may play several batches
        assert (twice["sampled_tokens"], twice["sampled_longest"]) == (2 * sum(sampled), max(sampled))

    @pytest.mark.parametrize(
        ("metrics", "said"),
        [
            ({"idle": 1.0, "pass_rate": 0.0}, "too hard"),
            ({"idle": 1.0, "pass_rate": 1.0}, "solved"),
            ({"entropy": 1e-5, "pass_rate": 0.1}, "the entropy is gone"),
            ({"ess": 0.1}, "ratios have weighed less than half"),
            ({"equal_groups": 1.0, "pass_rate": 0.0}, "nothing to learn from"),
            ({"mismatch": 0.06}, "what samples and what learns have differed"),
        ],
    )
    def test_what_lasts_is_said_once(self, metrics, said):
        watch = Watch()
        told = [watch.look(metrics) for _ in range(30)]
        assert [bool(sentences) for sentences in told] == [i == watch.patience - 1 for i in range(30)]
        assert said in told[watch.patience - 1][0]

    def test_what_does_not_last_is_not_said(self):
        watch = Watch()
        assert not any(watch.look({"idle": float(step % 9 != 0)}) for step in range(40))

    def test_a_run_that_learns_is_left_alone(self):
        watch = Watch()
        healthy = {
            "idle": 0.0,
            "entropy": 0.5,
            "ess": 0.99,
            "pass_rate": 0.5,
            "ungraded": 0.01,
            "equal_groups": 0.6,
            "mismatch": 0.01,
        }
        assert not any(watch.look({**healthy, "reward": step / 300}) for step in range(300))
        assert not any(
            Watch().look({"reward": 1.0, "pass_rate": 0.99}) for step in range(300)
        )  # there is nothing more

    def test_a_run_that_learns_nothing_is_told_so_with_its_rate(self):
        watch, chance = Watch(), torch.Generator().manual_seed(0)
        rewards = 0.2 + 0.05 * torch.randn(50, generator=chance)
        told = [watch.look({"reward": r, "pass_rate": 0.2, "lr": 1e-9}) for r in [*rewards.tolist()] * 4]
        assert [bool(each) for each in told] == [step == 2 * watch.window - 1 for step in range(200)]
        assert "nothing is learned at this rate (lr 1e-09)" in told[2 * watch.window - 1][0]

    def test_groups_with_equal_rewards(self, collected):
        """Of graded answers to one question in one batch and epoch; alone an answer is no group."""
        td = collected[1].select("transcript", "stop_reason").copy()
        count = len(td)
        rows = torch.arange(count) // 2
        td["episode_row"], td["episode_epoch"] = rows, torch.zeros(count).long()
        td["reward"] = torch.where(rows == 0, torch.arange(count), 0.5).reshape(count, 1, 1).float()
        assert figures([td])["equal_groups"] == pytest.approx(1 - 2 / count)
        td["policy_error"] = ["gone", *[""] * (count - 1)]  # of the only group that differs
        assert figures([td])["equal_groups"] == 1.0
        td["episode_row"] = torch.arange(count)
        assert "equal_groups" not in figures([td])
