"""Advantages, losses and KL estimators against brute force, closed forms and sampling."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from torchrl_chat.training import (
    gae,
    group_advantages,
    kl_estimate,
    masked_mean,
    policy_loss,
    token_rewards,
    whitened,
)

finite = st.floats(-5, 5, width=32)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def some_mask(n, t, seed=0, share=0.6):
    mask = torch.rand(n, t, generator=torch.Generator().manual_seed(seed)) < share
    mask[:, t // 2] = True  # no row is empty
    return mask


class TestGroupAdvantages:
    @settings(deadline=None)
    @example([(2.811572551727295, 0)] * 3, "std", False)  # their mean is another number, in float32
    @given(
        st.lists(st.tuples(finite, st.integers(0, 3)), min_size=1, max_size=16),
        st.sampled_from(["std", "mean", "batch", None]),
        st.booleans(),
    )
    def test_against_brute_force(self, rows, normalize, leave_one_out):
        rewards, groups = [abs(r) if normalize == "mean" else r for r, _ in rows], [g for _, g in rows]
        rows = [*zip(rewards, groups, strict=True)]
        got = group_advantages(
            torch.tensor(rewards).reshape(-1, 1, 1),
            torch.tensor(groups),
            normalize=normalize,
            leave_one_out=leave_one_out,
        )
        assert got.shape == (len(rows), 1, 1)
        centred = []
        for group in {g for g in groups if groups.count(g) > 1}:
            mates = torch.tensor([r for r, g in rows if g == group], dtype=torch.float64)
            factor = len(mates) / (len(mates) - 1) if leave_one_out else 1
            centred += ((mates - mates.mean()) * factor).tolist()
        over_all = (sum(c * c for c in centred) / max(1, len(centred) - 1)) ** 0.5
        for i, (reward, group) in enumerate(rows):
            mates = [r for r, g in rows if g == group]
            others = [r for j, (r, g) in enumerate(rows) if g == group and j != i]
            expected = 0.0
            if others:
                expected = reward - (sum(others) / len(others) if leave_one_out else sum(mates) / len(mates))
                if normalize:
                    by = {
                        "std": torch.tensor(mates).std().item(),
                        "mean": sum(mates) / len(mates),
                        "batch": over_all,
                    }
                    expected /= max(by[normalize], 1e-6)
            assert got[i].item() == pytest.approx(expected, abs=2e-3 if normalize else 1e-4, rel=1e-3)

    @pytest.mark.parametrize("leave_one_out", [False, True])
    @given(st.floats(-1e6, 1e6, width=32), st.integers(2, 40))
    def test_equal_rewards_say_nothing(self, leave_one_out, reward, size):
        rewards = torch.tensor([reward] * size + [0.25, 1.0])
        groups = torch.tensor([0] * size + [1, 1])
        got = group_advantages(rewards, groups, leave_one_out=leave_one_out)
        assert not got[:size].any()
        assert got[size:].abs().min() > 0.5

    def test_what_is_not_valid_counts_for_nobody(self):
        reward, group = torch.tensor([1.0, 0.0, 100.0, math.nan]), torch.zeros(4).long()
        valid = torch.tensor([True, True, False, False])
        got = group_advantages(reward, group, valid=valid, normalize=None)
        assert got.tolist() == [0.5, -0.5, 0.0, 0.0]

    def test_bad_input(self):
        with pytest.raises(ValueError, match="reward of row 1 is nan"):
            group_advantages(torch.tensor([1.0, math.nan]), torch.zeros(2).long())
        with pytest.raises(ValueError, match=r"group has the shape \(3,\)"):
            group_advantages(torch.zeros(2), torch.zeros(3).long())
        with pytest.raises(ValueError, match="normalize='median'"):
            group_advantages(torch.zeros(2), torch.zeros(2).long(), normalize="median")
        with pytest.raises(ValueError, match=r"the reward of row 1 is -1.0: a group's mean divides"):
            group_advantages(torch.tensor([1.0, -1.0, -7.0]), torch.zeros(3).long(), normalize="mean")
        with pytest.raises(ValueError, match="reward has the shape"):
            group_advantages(torch.zeros(2, 5), torch.zeros(2).long())

    def test_leave_one_out_is_unbiased(self):
        """With rewards of the action, E[A grad log p] is the policy gradient; with the group's mean it is (n-1)/n of it."""
        logits = torch.tensor([0.3, -0.2, 0.1])
        probs, value = logits.softmax(0), torch.tensor([1.0, 0.0, 2.0])
        exact = probs * (value - (probs * value).sum())
        draws = torch.multinomial(
            probs.expand(40_000, 3), 4, replacement=True, generator=torch.Generator().manual_seed(0)
        )
        score = torch.nn.functional.one_hot(draws, 3) - probs
        groups = torch.arange(len(draws))[:, None].expand_as(draws).flatten()

        def estimate(**options):
            advantage = group_advantages(value[draws].flatten(), groups, normalize=None, **options)
            return (advantage.reshape(draws.shape)[..., None] * score).mean((0, 1))

        assert torch.allclose(estimate(leave_one_out=True), exact, atol=8e-3)
        assert torch.allclose(estimate(), exact * 3 / 4, atol=8e-3)

    def test_divided_by_the_mean_it_is_the_likelihoods_gradient_to_the_order_of_the_group(self):
        """Of log p = -sum (1 - p)^k / k a group of N sees the first N - 1 terms (MaxRL; their sum is the gradient of p times that)."""
        logits, size = torch.tensor([0.2, -1.0, 0.3]), 4
        probs, right = logits.softmax(0), torch.tensor([0.0, 1.0, 0.0])
        p = (probs * right).sum()
        exact = probs * (right - p) * sum((1 - p) ** k for k in range(size - 1))
        draws = torch.multinomial(probs.expand(100_000, 3), size, True, generator=torch.Generator().manual_seed(0))
        groups = torch.arange(len(draws))[:, None].expand_as(draws).flatten()
        advantage = group_advantages(right[draws].flatten(), groups, normalize="mean").reshape(draws.shape)
        score = torch.nn.functional.one_hot(draws, 3) - probs
        assert torch.allclose((advantage[..., None] * score).mean((0, 1)), exact, atol=8e-3)

    def test_an_episode_counts_by_its_first_valid_row(self):
        found = group_advantages(
            torch.tensor([1.0, 1.0, 0.0]),
            torch.tensor([0, 0, 0]),
            episode=torch.tensor([0, 0, 1]),
            valid=torch.tensor([False, True, True]),
            normalize=None,
        )
        assert found.tolist() == [0.0, 0.5, -0.5]


class TestGAE:
    @staticmethod
    def brute(rewards, values, gamma, lam):
        """By the definition: the weighted sum of the temporal differences to come."""
        following = [*values[1:], 0.0]
        deltas = [r + gamma * n - v for r, n, v in zip(rewards, following, values, strict=True)]
        return [sum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:])) for t in range(len(deltas))]

    @settings(deadline=None)
    @given(st.integers(1, 4), st.integers(1, 12), st.integers(0, 99), st.floats(0, 1), st.floats(0, 1))
    def test_against_the_definition(self, n, t, seed, gamma, lam):
        mask = some_mask(n, t, seed)
        rewards, values = random(n, t, seed=seed) * mask, random(n, t, seed=seed + 1)
        advantages, targets = gae(rewards, values, mask, gamma, lam)
        for row in range(n):
            chosen = mask[row]
            expected = self.brute(rewards[row][chosen].tolist(), values[row][chosen].tolist(), gamma, lam)
            assert advantages[row][chosen].tolist() == pytest.approx(expected, abs=1e-4)
        assert torch.allclose(targets[mask], (advantages + values)[mask])
        assert not advantages[~mask].any()
        assert not targets[~mask].any()

    def test_packing_and_padding_change_nothing(self):
        mask = some_mask(5, 9)
        rewards, values = random(5, 9) * mask, random(5, 9, seed=1)
        expected, _ = gae(rewards, values, mask, 0.9, 0.8)
        ids = torch.arange(5)[:, None].expand(5, 9)
        packed, _ = gae(
            rewards.reshape(1, -1),
            values.reshape(1, -1),
            mask.reshape(1, -1),
            0.9,
            0.8,
            sequences=ids.reshape(1, -1),
        )
        assert torch.allclose(packed.reshape(5, 9), expected)
        wide = [torch.nn.functional.pad(x, (3, 2)) for x in (rewards, values, mask)]
        assert torch.allclose(gae(*wide, 0.9, 0.8)[0][:, 3:-2], expected)

    def test_the_whole_return_without_values(self):
        mask = torch.tensor([[False, True, True, False, True, False]])
        rewards = token_rewards(torch.tensor([[1.0, 10.0]]), mask)
        assert rewards.tolist() == [[0, 0, 1.0, 0, 10.0, 0]]
        advantages, _ = gae(rewards, torch.zeros(1, 6), mask, lam=1.0)
        assert advantages.tolist() == [[0, 11.0, 11.0, 0, 10.0, 0]]
        assert token_rewards(torch.tensor([[[3.0]]]), mask).tolist() == [[0, 0, 0, 0, 3.0, 0]]
        assert token_rewards(torch.zeros(0, 1, 1), mask[:0]).shape == (0, 6)  # a process without an episode

    def test_bad_input(self):
        mask = torch.tensor([[False, True, False, True]])
        with pytest.raises(ValueError, match="row 0 has a reward on token 2, which was not sampled"):
            gae(torch.ones(1, 4) * torch.tensor([0, 0, 1, 0]), torch.zeros(1, 4), mask)
        with pytest.raises(ValueError, match="values has the shape"):
            gae(torch.zeros(1, 4), torch.zeros(1, 3), mask)
        with pytest.raises(ValueError, match="row 0 has 2 turns to put 3 rewards on"):
            token_rewards(torch.tensor([[1.0, 2.0, 3.0]]), mask)
        with pytest.raises(ValueError, match="row 0 has 0 turns to put 1 rewards on"):
            token_rewards(torch.ones(1), torch.zeros(1, 4).bool())
        assert not gae(torch.zeros(1, 4), torch.ones(1, 4), torch.zeros(1, 4).bool())[0].any()


class TestWhitened:
    @settings(deadline=None)
    @given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 999))
    def test_mean_0_and_deviation_1_over_what_is_under_the_mask(self, n, t, seed):
        draw = torch.Generator().manual_seed(seed)
        values, mask = torch.randn(n, t, generator=draw), torch.rand(n, t, generator=draw) < 0.5
        found = whitened(values, mask)
        assert found.isfinite().all()
        assert not found[~mask].any()
        if mask.sum() > 1:
            assert float(found[mask].mean()) == pytest.approx(0, abs=1e-4)
            assert float(found[mask].std()) == pytest.approx(1, abs=1e-2)

    @pytest.mark.parametrize("count", [0, 1])
    def test_what_nothing_compares_with_is_0(self, count):
        mask = torch.arange(5)[None] < count
        assert not whitened(torch.full((1, 5), 3.0), mask).any()
        assert not whitened(torch.full((2, 5), 3.0), torch.ones(2, 5).bool()).any()


class TestPolicyLoss:
    @settings(deadline=None)
    @given(
        st.integers(1, 5), st.integers(1, 8), st.integers(0, 99), st.sampled_from(["token", "sequence", "constant"]),
        st.sampled_from([None, 1.5]), st.tuples(st.floats(0, 0.9), st.floats(0, 0.9)),
    )  # fmt: skip
    def test_against_loops(self, n, t, seed, aggregation, dual, clip):
        new, old, advantage = random(n, t, seed=seed), random(n, t, seed=seed + 1), random(n, seed=seed + 2)
        mask = some_mask(n, t, seed)
        constant = 7.0 if aggregation == "constant" else None
        loss, metrics = policy_loss(
            new, old, advantage, mask, clip=clip, dual_clip=dual, aggregation=aggregation, constant=constant
        )
        rows, clipped = [], 0
        for i in range(n):
            row = []
            for j in range(t):
                if mask[i, j]:
                    ratio, a = math.exp(new[i, j] - old[i, j]), advantage[i].item()
                    inside = min(max(ratio, 1 - clip[0]), 1 + clip[1]) * a
                    gain = min(ratio * a, inside)
                    clipped += inside < ratio * a - 1e-6
                    row.append(-(max(gain, dual * a) if dual and a < 0 else gain))
            rows.append(row)
        expected = {
            "token": sum(map(sum, rows)) / sum(map(len, rows)),
            "sequence": sum(sum(row) / len(row) for row in rows) / n,
            "constant": sum(map(sum, rows)) / (7.0 * n),
        }[aggregation]
        assert loss.item() == pytest.approx(expected, abs=1e-3, rel=1e-3)
        assert metrics["clip_fraction"].item() * int(mask.sum()) == pytest.approx(clipped, abs=0.1)

    def test_at_ratio_one_the_gradient_is_the_policy_gradient(self):
        mask, advantage = some_mask(3, 6), random(3)
        log_probs = random(3, 6, seed=5).requires_grad_()
        loss, metrics = policy_loss(log_probs, log_probs.detach(), advantage, mask)
        loss.backward()
        assert torch.allclose(log_probs.grad, -advantage[:, None] * mask / mask.sum(), atol=1e-6)
        assert metrics["ess"].item() == pytest.approx(1.0, abs=1e-5)
        assert metrics["kl"].item() == pytest.approx(0.0, abs=1e-6)

    @pytest.mark.parametrize(
        ("ratio", "advantage", "expected"),
        [
            (1.25, 1.0, -1.25),  # inside (0.2, 0.28): the gradient of the ratio
            (1.3, 1.0, 0.0),  # clipped from above
            (1.3, -1.0, 1.3),  # a bad token that became likelier is pushed back
            (0.7, -1.0, 0.0),  # clipped from below
            (0.7, 1.0, -0.7),
            (4.0, -1.0, 0.0),  # dual clip: no more than 3
            (2.9, -1.0, 2.9),
        ],
    )
    def test_where_the_gradient_stops(self, ratio, advantage, expected):
        log_probs = torch.tensor([[math.log(ratio)]], requires_grad=True)
        loss, _ = policy_loss(
            log_probs, torch.zeros(1, 1), torch.tensor([advantage]), torch.ones(1, 1).bool(),
            clip=(0.2, 0.28), dual_clip=3.0,
        )  # fmt: skip
        loss.backward()
        assert log_probs.grad.item() == pytest.approx(expected, abs=1e-5)

    @pytest.mark.parametrize(
        "options", [{}, {"aggregation": "sequence"}, {"aggregation": "constant", "constant": 5}], ids=str
    )
    def test_packing_and_padding_change_nothing(self, options):
        new, old, advantage, mask = random(4, 6), random(4, 6, seed=1), random(4, seed=2), some_mask(4, 6)
        loss, _ = policy_loss(new, old, advantage, mask, **options)
        wide = [torch.nn.functional.pad(x, (2, 1)) for x in (new, old)]
        wide_mask = torch.nn.functional.pad(mask, (2, 1))
        assert torch.allclose(policy_loss(*wide, advantage, wide_mask, **options)[0], loss)
        ids = torch.arange(4)[:, None].expand(4, 6).reshape(1, -1)
        ids = torch.nn.functional.pad(ids, (0, 3), value=-1)
        flat = [torch.nn.functional.pad(x.reshape(1, -1), (0, 3)) for x in (new, old, mask)]
        packed, _ = policy_loss(flat[0], flat[1], advantage, flat[2], sequences=ids, **options)
        assert torch.allclose(packed, loss)
        # One advantage a token is the same, too.
        each = advantage[:, None].expand(4, 6)
        assert torch.allclose(policy_loss(new, old, each[..., None], mask, **options)[0], loss)

    def test_what_is_masked_has_no_say(self):
        mask = torch.tensor([[True, False]])
        log_probs = torch.tensor([[0.0, 300.0]], requires_grad=True)
        loss, _ = policy_loss(log_probs, torch.tensor([[0.0, -300.0]]), torch.ones(1), mask)
        loss.backward()
        assert loss.item() == -1
        assert log_probs.grad.tolist() == [[-1.0, 0.0]]  # no nan from the infinite ratio
        empty, metrics = policy_loss(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1), ~mask & mask)
        assert empty.item() == 0
        assert metrics["ess"].item() == 1

    def test_empty_sequences_do_not_count(self):
        values, mask = torch.tensor([[2.0, 4.0], [9.0, 9.0]]), torch.tensor([[True, True], [False, False]])
        assert masked_mean(values, mask, "sequence").item() == 3
        rows = torch.tensor([0, 0])  # two branches of one episode
        assert (
            masked_mean(torch.tensor([[2.0], [4.0]]), torch.ones(2, 1).bool(), "sequence", sequences=rows).item()
            == 3
        )

    def test_bad_input(self):
        ok = (torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2), torch.ones(2, 3).bool())
        with pytest.raises(ValueError, match=r"one shape \(N, T\)"):
            policy_loss(ok[0], torch.zeros(2, 4), *ok[2:])
        with pytest.raises(ValueError, match=r"the advantage has the shape \(3,\)"):
            policy_loss(*ok[:2], torch.ones(3), ok[3])
        for wrong in ({"clip": 1.0}, {"clip": (0.2, -1)}, {"dual_clip": 1.0}, {"aggregation": "mean"}, {"constant": 3.0},
                      {"aggregation": "constant"}, {"aggregation": "constant", "constant": 0}):  # fmt: skip
            with pytest.raises(ValueError, match=[*wrong][-1]):
                policy_loss(*ok, **wrong)


class TestKLEstimate:
    P, Q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])

    def test_expectations(self):
        """Exactly, over all tokens: k1 and k3 have the mean KL, k2 has not; k3 scatters less than k1."""
        exact = (self.P * (self.P / self.Q).log()).sum().item()
        values = {kind: kl_estimate(self.P.log(), self.Q.log(), kind) for kind in ("k1", "k2", "k3")}
        means = {kind: (self.P * value).sum().item() for kind, value in values.items()}
        assert means["k1"] == pytest.approx(exact, abs=1e-6)
        assert means["k3"] == pytest.approx(exact, abs=1e-6)
        assert means["k2"] != pytest.approx(exact, abs=1e-2)
        assert (values["k3"] >= 0).all()
        assert (values["k2"] >= 0).all()
        assert values["k1"].min() < 0

    def test_by_sampling(self):
        draws = torch.multinomial(self.P, 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
        exact = (self.P * (self.P / self.Q).log()).sum().item()
        near = torch.tensor([0.45, 0.32, 0.23])  # where policies are: k3 scatters less
        for kind in ("k1", "k3"):
            values = kl_estimate(self.P.log()[draws], self.Q.log()[draws], kind)
            assert values.mean().item() == pytest.approx(exact, abs=4 * values.std().item() / len(draws) ** 0.5)
        k1, k3 = (kl_estimate(self.P.log()[draws], near.log()[draws], kind) for kind in ("k1", "k3"))
        assert k3.var() < k1.var() / 10

    def test_gradients(self):
        """Of the mean over samples: k2 gives that of the KL, k1 gives 0, k3 that of the reverse KL."""
        logits = self.P.log().clone().requires_grad_()

        def gradient(value):
            return torch.autograd.grad(value, logits)[0]

        def sampled(kind):
            log_probs = logits.log_softmax(0)
            return gradient((self.P * kl_estimate(log_probs, self.Q.log(), kind)).sum())

        log_probs = logits.log_softmax(0)
        forward = gradient((log_probs.exp() * (log_probs - self.Q.log())).sum())
        reverse = gradient((self.Q * (self.Q.log() - logits.log_softmax(0))).sum())
        assert torch.allclose(sampled("k2"), forward, atol=1e-6)
        assert torch.allclose(sampled("k1"), torch.zeros(3), atol=1e-6)
        assert torch.allclose(sampled("k3"), reverse, atol=1e-6)
        assert not torch.allclose(forward, reverse, atol=1e-3)

    def test_bad_input(self):
        with pytest.raises(ValueError, match="kind='k4'"):
            kl_estimate(torch.zeros(1), torch.zeros(1), "k4")
        with pytest.raises(ValueError, match=r"\(2,\)"):
            kl_estimate(torch.zeros(1), torch.zeros(2))
