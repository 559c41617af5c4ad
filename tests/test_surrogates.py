"""Every surrogate and correction is what its paper says: against the paper's own formula for one sequence, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_chat.training import importance_weights, policy_loss
from torchrl_chat.training.surrogates import SURROGATES


def random(*shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def clipped(w, a, low, high):
    return torch.minimum(w * a, w.clamp(1 - low, 1 + high) * a)


# The objective of one sequence: log-probs of its tokens, those of the old policy, one advantage.
def ppo(new, old, a, low, high):
    return clipped((new - old).exp(), a, low, high).mean()


def gspo(new, old, a, low, high):
    return clipped((new.sum().exp() / old.sum().exp()) ** (1 / len(new)), a, low, high)


def cispo(new, old, a, low, high):
    return ((new - old).exp().clamp(1 - low, 1 + high).detach() * a * new).mean()


def gmpo(new, old, a, low, high):
    w = (new - old).exp()
    inside = w.clamp(math.exp(-low), math.exp(high))
    return (torch.minimum(w, inside) if a > 0 else torch.maximum(w, inside)).prod() ** (1 / len(new)) * a


def sapo(new, old, a, low, high):
    slope = high if a > 0 else low
    return (4 / slope / (1 + (-slope * ((new - old).exp() - 1)).exp()) * a).mean()


def reinforce(new, old, a, low, high):
    return (a * new).mean()


PAPERS = {f.__name__: f for f in (ppo, gspo, cispo, gmpo, sapo, reinforce)}
WITH_BOUNDS = {"ppo": (0.2, 0.3), "gspo": (0.05, 0.1), "cispo": (0.5, 0.2), "gmpo": (0.3, 0.2), "sapo": (2.0, 1.5)}


def test_every_surrogate_stands_here():
    assert PAPERS.keys() == SURROGATES.keys()


@pytest.mark.parametrize("name", PAPERS)
@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    seed=st.integers(0, 99),
    scale=st.sampled_from([0.0, 0.1, 1.0]),
    own_bounds=st.booleans(),
)
def test_values_and_gradients_are_the_papers(name, lengths, seed, scale, own_bounds):
    """One a row with padding of any value on both sides, and packed: the mean over sequences."""
    bounds = WITH_BOUNDS.get(name) if own_bounds else None
    low, high = bounds or SURROGATES[name][1]
    advantage = random(len(lengths), seed=seed + 1)
    old = [random(n, seed=seed + 2 + i) - 1 for i, n in enumerate(lengths)]
    new = [(o + random(len(o), seed=seed + 50, scale=scale)).requires_grad_() for o in old]
    expected = -sum(PAPERS[name](*each, low, high) for each in zip(new, old, advantage, strict=True)) / len(new)
    of_expected = torch.autograd.grad(expected, new)

    width = max(lengths) + 2
    rows, olds = (
        torch.full((len(new), width), -torch.inf, dtype=torch.float64),
        torch.zeros(len(new), width).double(),
    )
    mask = torch.zeros(len(new), width, dtype=torch.bool)
    for i, (n, o) in enumerate(zip(new, old, strict=True)):
        at = slice(1, 1 + len(n))
        rows, olds = rows.index_put((torch.tensor(i), torch.arange(1, 1 + len(n))), n), olds.clone()
        olds[i, at], mask[i, at] = o, True
    options = {"surrogate": name, "clip": bounds, "aggregation": "sequence"}
    found, _ = policy_loss(rows, olds, advantage, mask, **options)
    assert torch.allclose(found, expected)
    for a, b in zip(torch.autograd.grad(found, new), of_expected, strict=True):
        assert torch.allclose(a, b)

    numbers = torch.repeat_interleave(torch.arange(len(new)), torch.tensor(lengths))[None]
    packed = torch.cat(new)[None], torch.cat(old)[None], advantage, torch.ones_like(numbers).bool()
    found, _ = policy_loss(*packed, sequences=numbers, **options)
    assert torch.allclose(found, expected)
    for a, b in zip(torch.autograd.grad(found, new), of_expected, strict=True):
        assert torch.allclose(a, b)


@pytest.mark.parametrize("name", PAPERS)
def test_on_policy_all_have_the_policy_gradient(name):
    log_probs, advantage, mask = random(3, 4, seed=1).requires_grad_(), random(3, seed=2), torch.ones(3, 4).bool()
    policy_loss(log_probs, log_probs.detach(), advantage, mask, surrogate=name)[0].backward()
    assert torch.allclose(log_probs.grad, -advantage[:, None].expand(3, 4) / 12)


def test_weights_multiply_each_tokens_part():
    log_probs, old, advantage = random(2, 3, seed=1), random(2, 3, seed=2), random(2, seed=3)
    weights, mask = random(2, 3, seed=4).abs(), torch.ones(2, 3).bool()
    whole, _ = policy_loss(log_probs, old, advantage, mask, weights=weights, aggregation="constant", constant=1)
    one_by_one = [
        policy_loss(log_probs[i : i + 1, j : j + 1], old[i : i + 1, j : j + 1], advantage[i : i + 1], mask[:1, :1])[
            0
        ]
        * weights[i, j]
        for i in range(2)
        for j in range(3)
    ]
    assert torch.allclose(whole, sum(one_by_one) / 2)


@pytest.mark.parametrize("name", PAPERS)
def test_a_token_without_weight_has_no_gradient(name):
    log_probs, old, mask = random(1, 4, seed=1).requires_grad_(), random(1, 4, seed=1), torch.ones(1, 4).bool()
    weights = torch.tensor([[1.0, 0.0, 1.0, 0.5]])
    policy_loss(log_probs, old, torch.ones(1), mask, surrogate=name, weights=weights)[0].backward()
    assert torch.allclose(log_probs.grad, -weights.double() / 4)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"surrogate": "grpo"}, "expected one of ppo, gspo"),
        ({"surrogate": "reinforce", "clip": 0.2}, "no ratio to clip"),
        ({"surrogate": "sapo", "clip": (0.0, 1.0)}, "more than 0"),
        ({"surrogate": "gmpo", "clip": (-0.1, 0.4)}, "at least 0"),
        ({"surrogate": "gspo", "dual_clip": 3.0}, "dual_clip=3.0 for 'gspo'"),
        ({"weights": torch.ones(2, 2)}, r"weights have the shape \(2, 2\)"),
    ],
)
def test_bad_settings_are_named(wrong, told):
    with pytest.raises(ValueError, match=told):
        policy_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2), torch.ones(2, 3).bool(), **wrong)


class TestImportanceWeights:
    @settings(deadline=None, max_examples=60)
    @given(
        st.integers(1, 4), st.integers(1, 6), st.integers(0, 99), st.sampled_from(["token", "sequence", "geometric"]),
        st.sampled_from(["truncate", "mask"]), st.sampled_from([(0.0, 2.0), (0.5, 5.0), (1.0, 1.0)]),
    )  # fmt: skip
    def test_against_loops(self, n, t, seed, level, beyond, bounds):
        learner, sampler = random(n, t, seed=seed), random(n, t, seed=seed + 1)
        mask = random(n, t, seed=seed + 2) < 0.5
        found, metrics = importance_weights(
            learner, sampler, mask, level=level, beyond=beyond, low=bounds[0], high=bounds[1]
        )
        outside = 0
        for i in range(n):
            apart = [float(learner[i, j] - sampler[i, j]) for j in range(t) if mask[i, j]]
            for j in range(t):
                if not mask[i, j]:
                    assert found[i, j] == 0
                    continue
                of_row = sum(apart) / (len(apart) if level == "geometric" else 1)
                weight = math.exp(float(learner[i, j] - sampler[i, j]) if level == "token" else of_row)
                inside = bounds[0] <= weight <= bounds[1]
                outside += not inside
                kept = weight if inside else 0.0 if beyond == "mask" else min(max(weight, bounds[0]), bounds[1])
                assert found[i, j].item() == pytest.approx(kept)
        assert metrics["beyond"].item() * max(1, int(mask.sum())) == pytest.approx(outside, abs=1e-3)

    def test_one_policy_needs_no_weights(self):
        log_probs, mask = random(2, 3).requires_grad_(), torch.ones(2, 3).bool()
        weights, metrics = importance_weights(log_probs, log_probs, mask, level="sequence")
        assert torch.equal(weights, torch.ones(2, 3))
        assert not weights.requires_grad
        assert (metrics["mismatch_max"], metrics["mismatch_ess"], metrics["beyond"]) == (0, 1, 0)

    def test_they_make_the_samplers_tokens_stand_for_the_learners(self):
        """The mean of weighted scores of a sampler's tokens is the learner's policy gradient; without weights it is not."""
        learner, sampler = torch.tensor([0.6, 0.3, 0.1]).log(), torch.tensor([0.4, 0.4, 0.2]).log()
        reward = torch.tensor([1.0, 0.0, 3.0])
        exact = learner.exp() * (reward - (learner.exp() * reward).sum())
        tokens = torch.multinomial(sampler.exp(), 200_000, True, generator=torch.Generator().manual_seed(0))[None]
        weights, _ = importance_weights(learner[tokens], sampler[tokens], torch.ones_like(tokens).bool(), high=9.0)
        for given_weights, right in ((weights, True), (None, False)):
            logits = learner.clone().requires_grad_()
            log_probs = logits.log_softmax(0)[tokens]
            loss, _ = policy_loss(
                log_probs, log_probs.detach(), reward[tokens], torch.ones_like(tokens).bool(),
                surrogate="reinforce", weights=given_weights,
            )  # fmt: skip
            assert torch.allclose(torch.autograd.grad(-loss, logits)[0], exact, atol=1e-2) == right

    @pytest.mark.parametrize(
        ("wrong", "told"),
        [({"low": 2.0}, "low=2.0"), ({"high": 0.5}, "high=0.5"), ({"level": "row"}, "level='row'"),
         ({"beyond": "clip"}, "beyond='clip'")],
    )  # fmt: skip
    def test_bad_input(self, wrong, told):
        zeros, mask = torch.zeros(2, 3), torch.ones(2, 3).bool()
        with pytest.raises(ValueError, match=told):
            importance_weights(zeros, zeros, mask, **wrong)
        with pytest.raises(ValueError, match=r"\(2, 4\)"):
            importance_weights(zeros, torch.zeros(2, 4), mask)
