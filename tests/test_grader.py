"""Compositions, rubrics, and the grading of whole batches by verifiers of every sort."""

from __future__ import annotations

import asyncio
import inspect
import pickle
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrl_chat.rewards import (
    Episode,
    ExactMatch,
    Gate,
    Grader,
    NumberVerifier,
    Rubric,
    Sequential,
    Verdict,
    WeightedSum,
    grades,
)
from torchrl_chat.rewards.compose import as_verifier


def episodes(*texts, reference="7"):
    return [Episode.of(text, reference) for text in texts]


def scores(verdicts):
    return [verdict.score for verdict in verdicts]


class Hanging:
    """Right if equal; hangs, dies or raises on some words. Says that it may."""

    isolate = True

    def __init__(self):
        self.asked = 0

    def quick(self, response, reference):
        if response == "broken":
            raise RuntimeError("quick")
        return Verdict(0.25, response, False) if response == "easy" else None

    def __call__(self, response, reference):
        if response == "hang":
            while True:
                pass
        if response == "raise":
            raise ValueError("no such number")
        if response == "nonsense":
            return "yes"
        return float(response == reference)


class TestGrader:
    def test_in_this_thread(self):
        def verifier(response, reference):
            if response == "raise":
                raise ValueError("no such number")
            return response == reference

        grader = Grader(verifier, failure_score=-1.0)
        with pytest.warns(
            RuntimeWarning, match=r"1 of 3 grades failed \(1 error\).*row 1: error: ValueError: no such"
        ):
            verdicts = grader.grade(episodes("7", "raise", "8"))
        assert scores(verdicts) == [1.0, -1.0, 0.0]
        assert verdicts[0] == Verdict(1.0, "7", True)
        assert verdicts[1].failure == "error: ValueError: no such number"
        assert grader.failures == {"error": 1}

    def test_in_workers(self):
        with Grader(Hanging(), deadline=2.0, workers=2) as grader, pytest.warns(RuntimeWarning, match="4 of 7"):
            verdicts = grader.grade(episodes("7", "hang", "raise", "8", "easy", "nonsense", "broken"))
        assert scores(verdicts) == [1.0, 0.0, 0.0, 0.0, 0.25, 0.0, 0.0]
        reasons = [v.failure and v.failure.split(":")[0] for v in verdicts]
        assert reasons == [None, "timeout", "error", None, None, "error", "error"]

    def test_isolate_wins_over_what_the_verifier_says(self):
        import os

        here = os.getpid()
        verifier = Pid()
        with Grader(verifier, workers=1) as grader:
            assert grader.grade(episodes("x"))[0].score == here
        with Grader(verifier, workers=1, isolate=True) as grader:
            assert grader.grade(episodes("x"))[0].score != here
        with Grader(Hanging(), isolate=False) as grader:
            assert scores(grader.grade(episodes("7", "easy"))) == [
                1.0,
                0.0,
            ]  # the whole verifier, not its quick way

    def test_coroutines_run_at_once(self):
        running, most = set(), []

        async def judge(response, reference):
            running.add(asyncio.current_task())
            most.append(len(running))
            await (asyncio.Event().wait() if response == "hang" else asyncio.sleep(0.2))
            running.discard(asyncio.current_task())
            if response == "raise":
                raise ValueError("no")
            return float(response == reference)

        grader = Grader(judge, deadline=5.0)
        with pytest.warns(RuntimeWarning, match="2 of 52"):
            verdicts = grader.grade(episodes(*["7"] * 50, "hang", "raise"))
        assert max(most) > 25
        assert scores(verdicts) == [1.0] * 50 + [0.0] * 2
        assert [v.failure.split(":")[0] for v in verdicts[50:]] == ["timeout", "error"]

        async def within():  # from code that runs on a loop itself
            return grader.grade(episodes("7"))

        assert scores(asyncio.run(within())) == [1.0]
        grader.close()
        assert scores(grader.grade(episodes("7"))) == [1.0]
        grader.close()
        assert not any(t.name == "torchrl_chat.grader" for t in threading.enumerate())

    def test_what_a_verifier_is_called_with(self):
        message = {"role": "assistant", "content": [{"type": "text", "text": "7"}], "reasoning_content": "hm"}
        asked = {"role": "user", "content": "3 + 4?"}
        episode = Episode(message, "7", [asked, message], {"level": 2}, length=5)
        seen = {}

        def spy(level):
            @grades(level)
            def verifier(*args):
                seen[level] = args
                return [1.0] * len(args[0]) if level == "group" else 1.0

            return verifier

        for level in ("text", "message", "messages", "episode", "group"):
            Grader(spy(level)).grade([episode])
        assert seen == {
            "text": ("7", "7"),
            "message": (message, "7"),
            "messages": ([asked, message], "7"),
            "episode": (episode,),
            "group": ([episode],),
        }

    def test_groups(self):
        @grades("group")
        def shortest(members):
            best = min(len(m.response) for m in members)
            return [len(m.response) == best for m in members]

        rows = episodes("aaa", "a", "bb", "bbb", "aa")
        assert scores(Grader(shortest).grade(rows, groups=[0, 0, 1, 1, 0])) == [0, 1, 1, 0, 0]
        assert scores(Grader(shortest).grade(rows)) == [0, 1, 0, 0, 0]

        @grades("group")
        def wrong_length(members):
            return [1.0]

        with pytest.warns(RuntimeWarning, match="returned"):
            verdicts = Grader(wrong_length).grade(rows, groups=[0, 0, 1, 2, 3])
        assert scores(verdicts) == [0, 0, 1, 1, 1]

        @grades("group")
        async def slow(members):
            await asyncio.sleep(0.01)
            return [len(members)] * len(members)

        assert scores(Grader(slow).grade(rows, groups=[0, 0, 1, 1, 0])) == [3, 3, 2, 2, 3]

    def test_pickles(self):
        grader = Grader(Hanging(), deadline=5, workers=1)
        grader.grade(episodes("7"))
        copy = pickle.loads(pickle.dumps(grader))
        assert scores(copy.grade(episodes("7"))) == [1.0]
        copy.close()
        grader.close()

    @pytest.mark.parametrize("bad", [0, -1.0])
    def test_bad_deadline(self, bad):
        with pytest.raises(ValueError, match="deadline"):
            Grader(NumberVerifier(), deadline=bad)

    def test_no_verifier(self):
        with pytest.raises(TypeError, match="callable"):
            Grader("math")


class Ends:
    """Right if equal; on a word it raises, as a verifier does that was a script."""

    def __init__(self, kind):
        self.kind = kind

    def __call__(self, response, reference):
        if response == "end":
            raise self.kind(3)
        return float(response == reference)


class Pid:
    def __call__(self, response, reference):
        import os

        return os.getpid()


class TestCompositions:
    def test_weighted_sum(self):
        reward = WeightedSum({"right": NumberVerifier(), "short": (lambda r, _: len(r) < 5, 0.5)})
        assert reward.components == ("right", "short")
        [verdict] = Grader(reward).grade(episodes("7"))
        assert verdict == Verdict(1.5, "7", True, {"right": 1.0, "short": 1.0})

    def test_nested_names(self):
        inner = WeightedSum({"a": NumberVerifier(), "b": lambda r, _: 0.5})
        outer = WeightedSum({"x": (inner, 2.0), "y": lambda r, _: 1.0})
        assert outer.components == ("x", "x.a", "x.b", "y")
        [verdict] = Grader(outer).grade(episodes("7"))
        assert verdict.score == 4.0
        assert verdict.parts == {"x": 1.5, "x.a": 1.0, "x.b": 0.5, "y": 1.0}

    @given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=1, max_size=5))
    def test_a_sum_is_a_sum(self, pairs):
        def constant(value):
            return lambda response, reference: value

        reward = WeightedSum({str(i): (constant(value), weight) for i, (value, weight) in enumerate(pairs)})
        assert reward(Episode.of("x")).score == pytest.approx(sum(v * w for v, w in pairs))

    def test_a_failed_component_fails_the_sum(self):
        reward = WeightedSum({"right": NumberVerifier(), "hang": Hanging()})
        grader = Grader(reward, deadline=1.5, workers=1, failure_score=-2.0)
        with grader, pytest.warns(RuntimeWarning, match="1 of 2"):
            good, bad = grader.grade(episodes("7", "hang"))
        assert (good.score, good.failure) == (2.0, None)
        assert bad.score == -2.0
        assert bad.failure.startswith("timeout:")
        assert bad.failure.endswith("(in hang)")

    def test_a_gate_asks_only_behind_it(self):
        asked = []

        def then(response, reference):
            asked.append(response)
            return Verdict(0.75, response, False)

        gate = Gate(lambda r, _: r.startswith("ok"), then, otherwise=-0.5)
        verdicts = Grader(gate).grade(episodes("ok 1", "no", "ok 2"))
        assert asked == ["ok 1", "ok 2"]
        assert scores(verdicts) == [0.75, -0.5, 0.75]
        assert verdicts[1].parts == {"condition": 0.0, "then": 0.0}
        assert Grader(Gate(lambda r, _: 0.5, then, threshold=0.5)).grade(episodes("x"))[0].score == 0.75

    def test_sequential(self):
        asked = []

        def last(response, reference):
            asked.append(response)
            return 0.5

        chain = Sequential(lambda r, _: r != "a", lambda r, _: r != "b", last)
        verdicts = Grader(chain).grade(episodes("a", "b", "c"))
        assert scores(verdicts) == [0.0, 0.0, 0.5]
        assert asked == ["c"]
        assert [v.parts for v in verdicts] == [
            {"0": 0.0, "1": 0.0, "2": 0.0},
            {"0": 1.0, "1": 0.0, "2": 0.0},
            {"0": 1.0, "1": 1.0, "2": 0.5},
        ]

    def test_groups_within_compositions(self):
        @grades("group")
        def size(members):
            return [len(members)] * len(members)

        reward = WeightedSum({"right": NumberVerifier(), "size": (size, 0.1)})
        assert reward.grades == "group"
        verdicts = Grader(reward).grade(episodes("7", "8", "7"), groups=["a", "a", "b"])
        assert scores(verdicts) == pytest.approx([1.2, 0.2, 1.1])

    def test_rubrics(self):
        class Exact:
            def __call__(self, action, observation):
                return float(action.content == observation.reference and observation.metadata["level"] == 3)

        async def slow(action, observation):
            return len(observation.messages)

        episode = Episode.of("7", "7", row={"level": 3})
        assert isinstance(as_verifier(Exact()), Rubric)
        assert Grader(Exact()).grade([episode])[0].score == 1.0
        assert Grader(slow).grade([episode])[0].score == 1
        assert Grader(WeightedSum({"exact": (Exact(), 3), "slow": slow})).grade([episode])[0].score == 4

    def test_empty(self):
        with pytest.raises(ValueError, match="at least one"):
            WeightedSum({})
        with pytest.raises(ValueError, match="at least one"):
            Sequential()
        assert Grader(NumberVerifier()).grade([]) == []


class TestOddVerdicts:
    @pytest.mark.parametrize(
        "value",
        [10**400, float("nan"), float("inf"), -1e300, None, "yes", Verdict(None, "x", True), Verdict(float("nan"), "x", True),
         Verdict(1.0, "x", True, {"part": float("nan")})],
    )  # fmt: skip
    def test_one_costs_its_row_only(self, value):
        verifier = lambda response, reference: value if response == "odd" else 1.0  # noqa: E731
        grader = Grader(WeightedSum({"a": verifier}))
        with pytest.warns(RuntimeWarning, match="1 of 2 grades failed"):
            good, bad = grader.grade(episodes("7", "odd"))
        assert (good.score, good.failure) == (1.0, None)
        assert bad.score == 0.0
        assert bad.failure.startswith("error: a verifier returned")

    def test_a_cancelled_coroutine_costs_its_row_only(self):
        async def judge(response, reference):
            if response == "cancelled":
                raise asyncio.CancelledError
            return 1.0

        with Grader(judge) as grader, pytest.warns(RuntimeWarning, match="1 of 2"):
            assert scores(grader.grade(episodes("7", "cancelled"))) == [1.0, 0.0]

    @pytest.mark.parametrize("isolate", [False, True], ids=["here", "in a worker"])
    @pytest.mark.parametrize("kind", [SystemExit, GeneratorExit, asyncio.CancelledError, ValueError])
    def test_whatever_ends_a_verifier_costs_its_row_only(self, isolate, kind):
        with Grader(Ends(kind), isolate=isolate, workers=1) as grader:
            with pytest.warns(RuntimeWarning, match="2 of 4 grades failed"):
                verdicts = grader.grade(episodes("7", "end", "8", "end"))
            assert scores(verdicts) == [1.0, 0.0, 0.0, 0.0]
            assert [v.failure for v in verdicts] == [None, f"error: {kind.__name__}: 3"] * 2
            assert scores(grader.grade(episodes("7"))) == [1.0]  # and the grader goes on

    def test_sys_exit_in_what_a_verifier_returns_and_in_its_quick_way(self):
        class Number:
            def __float__(self):
                sys.exit("no number")

        class Quick(Ends):
            isolate = True

            def quick(self, response, reference):
                return self(response, reference) if response == "end" else None

        odd = lambda response, reference: Number() if response == "odd" else 1.0  # noqa: E731
        with pytest.warns(RuntimeWarning, match="1 of 2 grades failed"):
            assert scores(Grader(odd).grade(episodes("7", "odd"))) == [1.0, 0.0]
        with Grader(Quick(SystemExit), workers=1) as grader, pytest.warns(RuntimeWarning, match="1 of 2"):
            assert scores(grader.grade(episodes("end", "7"))) == [0.0, 1.0]

    @pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit])
    def test_sys_exit_in_a_coroutine_costs_its_row_only(self, kind):
        async def judge(response, reference):
            await asyncio.sleep(0)
            if response == "end":
                raise kind(3)
            return 1.0

        with Grader(judge) as grader:
            for _ in range(2):  # the loop's thread is alive
                with pytest.warns(RuntimeWarning, match="1 of 3"):
                    assert scores(grader.grade(episodes("7", "end", "7"))) == [1.0, 0.0, 1.0]

    def test_in_a_composition_and_a_group(self):
        @grades("group")
        def group(members):
            return sys.exit(1) if members[0].response == "end" else [1.0] * len(members)

        with pytest.warns(RuntimeWarning, match="1 of 2"):
            assert scores(Grader(WeightedSum({"a": Ends(SystemExit), "b": NumberVerifier()})).grade(episodes("7", "end"))) == [2.0, 0.0]  # fmt: skip
        with pytest.warns(RuntimeWarning, match="2 of 3"):
            assert scores(Grader(group).grade(episodes("end", "7", "7"), groups=[0, 0, 1])) == [0.0, 0.0, 1.0]

    def test_ctrl_c_is_nobodys_row(self):
        with pytest.raises(KeyboardInterrupt):
            Grader(Ends(KeyboardInterrupt)).grade(episodes("7", "end"))

    def test_one_episode_in_two_groups(self):
        @grades("group")
        def size(members):
            return [len(members)] * len(members)

        [episode] = episodes("7")
        assert scores(Grader(size).grade([episode, episode], groups=["x", "y"])) == [1, 1]

    def test_what_a_rubric_declares_is_kept(self):
        class Slow:
            isolate = True

            def __call__(self, action, observation):
                while True:
                    pass

        with Grader(Slow(), deadline=0.3, workers=1) as grader, pytest.warns(RuntimeWarning, match="timeout"):
            assert scores(grader.grade(episodes("7"))) == [0.0]
        assert WeightedSum({"a": Slow()}).isolate
        assert not WeightedSum({"a": NumberVerifier()}).isolate


@pytest.mark.parametrize("wrong", [lambda response: 1.0, lambda response, reference, row: 1.0, lambda: 1.0])
def test_what_cannot_be_called_with_an_answer_is_refused_before_the_first_grade(wrong):
    with pytest.raises(TypeError, match=r"cannot be called with \(response, reference\): ") as refused:
        Grader(wrong)
    one = list(inspect.signature(wrong).parameters) == ["response"]
    assert ('marked @grades("episode")' in str(refused.value)) == one
    with pytest.raises(TypeError, match="cannot be called"):
        WeightedSum({"right": wrong})


def test_a_class_is_no_verifier():
    for kind in (NumberVerifier, ExactMatch):  # the second can be called with two arguments
        with pytest.raises(TypeError, match=rf"{kind.__name__} is a class: give .* {kind.__name__}\(\.\.\.\)"):
            Grader(kind)


@pytest.mark.parametrize("right", [lambda *answer: 1.0, lambda response, reference=None, **more: 1.0, max])
def test_what_can_is_a_verifier(right):
    assert as_verifier(right) is right
