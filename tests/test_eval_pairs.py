"""The statistics of comparing two models: against scipy, against brute force, and on pairs whose truth is known."""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from torchrl_chat.evaluation.figures import bootstrap_interval, majority_at_k, wilson
from torchrl_chat.evaluation.pairs import answers_needed, compared, detectable, mcnemar, questions_needed

COUNT = st.integers(0, 60)


class TestMcNemar:
    @given(COUNT, COUNT)
    def test_is_the_binomial_test(self, gained, lost):
        exact, mid = mcnemar(gained, lost)
        if gained + lost:
            assert exact == pytest.approx(stats.binomtest(gained, gained + lost).pvalue)
            at = stats.binom.pmf(min(gained, lost), gained + lost, 0.5)
            assert mid == pytest.approx(min(1.0, 2 * stats.binom.cdf(min(gained, lost), gained + lost, 0.5) - at))
        else:
            assert (exact, mid) == (1.0, 1.0)
        assert mid <= exact

    @given(st.integers(0, 6), st.integers(0, 5), st.integers(0, 3))
    def test_is_the_permutation_test(self, gained, lost, alike):
        """Under every swap of the two answers to every question, all differences at least as large, counted."""
        differences = [1] * gained + [-1] * lost + [0] * alike
        sums = [abs(sum(map(math.prod, zip(s, differences, strict=True)))) for s in signs(len(differences))]
        assert mcnemar(gained, lost)[0] == pytest.approx(np.mean([s >= abs(gained - lost) for s in sums]))

    def test_large_counts(self):
        exact, _ = mcnemar(5200, 4900)
        assert exact == pytest.approx(stats.binomtest(5200, 10_100).pvalue)

    def test_counts_that_cannot_be(self):
        with pytest.raises(ValueError, match="-1 lost"):
            mcnemar(3, -1)


def signs(count):
    return itertools.product((1, -1), repeat=count)


@functools.cache
def rejects(discordant: int, which: int) -> int:
    """At most how many may be in the smaller half for the test to find a difference; -1 for none."""
    most = -1
    while 2 * (most + 1) <= discordant and mcnemar(most + 1, discordant - most - 1)[which] < 0.05:
        most += 1
    return most


def found(questions: int, differ: float, share: float, which: int) -> float:
    """How often a test finds a difference, exactly: summed over how many questions differ, and how."""
    counts = np.arange(questions + 1)
    weights = stats.binom.pmf(counts, questions, differ)
    counts, weights = counts[weights > 1e-9], weights[weights > 1e-9]
    most = np.array([rejects(int(count), which) for count in counts])
    either = stats.binom.cdf(most, counts, share) + stats.binom.sf(counts - most - 1, counts, share)
    return float(weights @ np.where(most >= 0, either, 0.0))


@pytest.mark.parametrize("differ", [0.05, 0.1, 0.2, 0.4])
@pytest.mark.parametrize("questions", [20, 50, 100, 200, 400])
def test_false_alarms_of_the_tests(questions, differ):
    """No simulation: the rate itself. Exact: never above 5 %; mid-p: close below, once twenty questions differ."""
    assert found(questions, differ, 0.5, 0) <= 0.05
    mid = found(questions, differ, 0.5, 1)
    assert mid <= 0.06
    assert mid >= 0.04 or questions * differ < 20


@pytest.mark.parametrize(("differ", "gap"), [(0.2, 0.1), (0.1, 0.05), (0.3, 0.15), (0.5, 0.1)])
def test_the_size_that_is_named_decides(differ, gap):
    gained, lost = (round(1000 * (differ + sign * gap) / 2) for sign in (1, -1))
    differences = [1.0] * gained + [-1.0] * lost + [0.0] * (1000 - gained - lost)
    for which, exact in ((0, True), (1, False)):
        size = questions_needed(differences, exact=exact)
        assert 0.79 <= found(size, differ, gained / (gained + lost), which) <= 0.83


# ---------------------------------------------------------------------- simulated pairs
def pairs(draw, questions, answers, gap=0.0, noise=0.1):
    """Answers of two models to questions that are hard for both or easy for both; the second's chances are higher by ``gap``."""
    hard = draw.beta(0.6, 0.6, questions)
    chances = [np.clip(hard + shift + draw.normal(0, noise, questions), 0, 1) for shift in (0.0, gap)]
    return [(draw.random((questions, answers)) < chance[:, None]).astype(float) for chance in chances]


def false_alarms(questions, answers, times, resamples=1000):
    draw = np.random.default_rng(questions * answers)
    alarms = 0
    for seed in range(times):
        first, second = pairs(draw, questions, answers)
        low, high = bootstrap_interval(second.mean(1) - first.mean(1), resamples=resamples, seed=seed)
        alarms += not low <= 0 <= high
    return alarms / times


def test_false_alarms_of_the_bootstrap():
    assert 0.03 <= false_alarms(40, 4, 500, 500) <= 0.075


@pytest.mark.full
@pytest.mark.parametrize(("questions", "answers"), [(60, 1), (100, 1), (200, 1), (40, 4), (100, 4), (30, 8)])
def test_false_alarms_of_the_bootstrap_are_four_to_six_per_cent(questions, answers):
    assert 0.04 <= false_alarms(questions, answers, 4000) <= 0.06


def permuted(differences, draw, times=2000):
    """The p of the permutation test, by random swaps of the two models in whole questions."""
    swaps = draw.choice([-1.0, 1.0], size=(times, len(differences)))
    return (1 + (abs(swaps @ differences) >= abs(differences.sum()) - 1e-9).sum()) / (times + 1)


def decisions(times, questions, answers, gap):
    """How often each way finds a difference: the bootstrap, permutations, and how often these two say the same."""
    draw = np.random.default_rng(7)
    both = []
    for seed in range(times):
        first, second = pairs(draw, questions, answers, gap)
        differences = second.mean(1) - first.mean(1)
        low, high = bootstrap_interval(differences, resamples=1000, seed=seed)
        both.append((not low <= 0 <= high, permuted(differences, draw) < 0.05))
    return np.mean([a for a, _ in both]), np.mean([b for _, b in both]), np.mean([a == b for a, b in both])


def test_the_bootstrap_says_what_permutations_say():
    bootstrap, permutation, same = decisions(60, 50, 4, 0.06)
    assert 0.1 < permutation < 0.95
    assert same >= 0.9
    assert abs(bootstrap - permutation) <= 0.1


@pytest.mark.full
def test_the_bootstrap_says_what_permutations_say_of_many():
    bootstrap, permutation, same = decisions(1500, 60, 4, 0.05)
    assert same >= 0.96
    assert abs(bootstrap - permutation) <= 0.04


@pytest.mark.parametrize("times", [150, pytest.param(2000, marks=pytest.mark.full)])
def test_pairs_decide_where_two_intervals_do_not(times):
    """The same answers, to questions that are hard for both models: McNemar, the bootstrap, and what is known without pairs."""
    draw = np.random.default_rng(3)
    counts = Counter()
    for seed in range(times):
        first, second = (values[:, 0] for values in pairs(draw, 300, 1, gap=0.08, noise=0.0))
        gained, lost = int((second > first).sum()), int((second < first).sum())
        low, high = bootstrap_interval(second - first, resamples=400, seed=seed)
        ours, theirs = (wilson(values.sum(), 300) for values in (first, second))
        pooled = (first.mean() + second.mean()) / 2
        z = (second.mean() - first.mean()) / math.sqrt(pooled * (1 - pooled) * 2 / 300)
        counts["exact"] += mcnemar(gained, lost)[0] < 0.05
        counts["bootstrap"] += not low <= 0 <= high
        counts["two shares"] += abs(z) > 1.96
        counts["apart"] += ours[1] < theirs[0] or theirs[1] < ours[0]
    assert counts["apart"] < counts["two shares"]
    assert counts["exact"] > counts["two shares"] + 0.05 * times
    assert counts["bootstrap"] > counts["two shares"] + 0.05 * times


# ---------------------------------------------------------------------- the pieces
class TestIntervals:
    def test_percentiles_are_those_of_scipy(self):
        values = np.random.default_rng(0).normal(0.1, 1, 400)
        ours = bootstrap_interval(values, resamples=4000)
        method = {"n_resamples": 4000, "method": "percentile", "random_state": np.random.default_rng(1)}
        theirs = stats.bootstrap((values,), np.mean, **method).confidence_interval
        assert ours == pytest.approx(tuple(theirs), abs=0.015)

    @pytest.mark.parametrize("count", [5, 10, 30, 200])
    def test_few_values_have_students_interval(self, count):
        """Of values that are normal, a resampled mean's interval is about as wide as Student's."""
        values = stats.norm.ppf((np.arange(count) + 0.5) / count)
        low, high = bootstrap_interval(values, resamples=20_000)
        half = stats.t.ppf(0.975, count - 1) * values.std(ddof=1) / math.sqrt(count)
        assert (high - low) / 2 == pytest.approx(half, rel=0.08)

    @given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=20), st.integers(1, 3))
    def test_compared_is_of_the_means(self, values, answers):
        first, second = ([[pair[i]] * answers for pair in values] for i in (0, 1))
        pair = compared(first, second)
        assert pair.difference == pytest.approx(np.mean([b - a for a, b in values]), abs=1e-9)
        if pair.interval is not None:
            assert pair.interval[0] - 1e-9 <= pair.difference <= pair.interval[1] + 1e-9
        turned = compared(second, first)
        assert turned.difference == pytest.approx(-pair.difference, abs=1e-12)
        assert (turned.questions_needed, turned.p) == (pair.questions_needed, pair.p)

    @pytest.mark.parametrize(("first", "second"), [([], []), ([[1.0]], []), ([[1.0], []], [[1.0], [0.0]])])
    def test_what_cannot_be_compared(self, first, second):
        with pytest.raises(ValueError, match="questions|answer"):
            compared(first, second)

    def test_nothing_differs(self):
        pair = compared([[1.0], [0.0]], [[1.0], [0.0]])
        assert (pair.p, pair.interval, pair.questions_needed, pair.detectable, pair.decided) == (
            1.0,
            None,
            None,
            None,
            False,
        )


class TestSizes:
    @given(st.integers(20, 2000), st.integers(1, 100), st.floats(0.1, 1))
    def test_what_is_detectable_is_found_as_often_as_said(self, questions, differ, size):
        """Of the difference, and how many questions differ: the power of the normal test is 80 %."""
        differing = max(1, questions * differ // 100)
        gap = detectable([size] * differing + [0.0] * (questions - differing))
        if gap is None:
            assert questions < 10
            return
        share = max(differing / questions, gap / size)  # more of them, where these are too few
        wide, narrow = (math.sqrt(share * size**2 - shift) for shift in (0.0, gap**2))
        power = stats.norm.cdf((gap * math.sqrt(questions) - stats.norm.ppf(0.975) * wide) / max(narrow, 1e-9))
        assert power == pytest.approx(0.8, abs=1e-3) or narrow < 1e-4

    @pytest.mark.parametrize(("questions", "differing"), [(100, 20), (400, 1), (1000, 100)])
    def test_the_exact_test_finds_what_is_detectable(self, questions, differing):
        gap = detectable([1.0] * differing + [0.0] * (questions - differing))
        share = max(differing / questions, gap)
        assert 0.7 <= found(questions, share, (share + gap) / (2 * share) - 1e-12, 0) <= 0.87

    def test_more_answers_where_they_do(self):
        """Chances that differ by the same everywhere: all noise is sampling, and the variance says how many answers do."""
        draw = np.random.default_rng(0)
        first, second = ((draw.random((400, 4)) < chance).astype(float).tolist() for chance in (0.5, 0.53))
        needed = answers_needed(first, second)
        gap = np.mean(second) - np.mean(first)
        expected = (2 * 0.25) * (stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) ** 2 / (400 * gap**2)
        assert needed == pytest.approx(expected, rel=0.2)

    def test_more_answers_where_they_do_not(self):
        sure = [[1.0] * 3, [0.0] * 3] * 30
        turned = [values if i % 5 else [1 - v for v in values] for i, values in enumerate(sure)]
        assert answers_needed(sure, turned) is None  # each question is certain: only others would tell
        assert answers_needed([[1.0], [0.0]], [[0.0], [0.0]]) is None  # one answer says nothing of the next


class TestMajority:
    @given(st.lists(st.sampled_from(["right", "a", "b", "c", None]), min_size=1, max_size=8), st.data())
    def test_is_the_mean_over_subsets(self, given_, data):
        k = data.draw(st.integers(1, len(given_)))
        wins = []
        for subset in itertools.combinations(given_, k):
            votes = Counter(answer for answer in subset if answer is not None)
            first = [answer for answer in votes if votes[answer] == max(votes.values())]
            wins.append(("right" in first) / len(first) if first else 0.0)
        votes = Counter(given_)
        wrong = [votes[answer] for answer in "abc" if votes[answer]]
        assert majority_at_k(votes["right"], wrong, votes[None], k) == pytest.approx(np.mean(wins))

    def test_has_no_bias(self):
        """Five answers of which a majority of three is asked: the mean estimate is what three new ones would do."""
        draw = np.random.default_rng(0)
        chances = [0.45, 0.3, 0.15, 0.1]  # right, two wrong answers, silence
        estimates = [
            majority_at_k(int(c[0]), [int(c[1]), int(c[2])], int(c[3]), 3)
            for c in draw.multinomial(5, chances, 2000)
        ]
        truth = [
            majority_at_k(int(c[0]), [int(c[1]), int(c[2])], int(c[3]), 3)
            for c in draw.multinomial(3, chances, 8000)
        ]
        assert np.mean(estimates) == pytest.approx(np.mean(truth), abs=0.02)

    @pytest.mark.parametrize(
        ("right", "wrong", "silent", "k"), [(1, [1], 0, 3), (1, [], 0, 0), (-1, [2], 0, 1), (0, [], 0, 1)]
    )
    def test_what_cannot_be(self, right, wrong, silent, k):
        with pytest.raises(ValueError, match=f"maj@{k}"):
            majority_at_k(right, wrong, silent, k)
