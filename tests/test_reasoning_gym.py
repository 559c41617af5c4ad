"""reasoning-gym: rows are graded as they were asked, nonsense gets nothing, and a run goes on with its own questions."""

from __future__ import annotations

import functools
import subprocess
import sys
from typing import Any

import pytest
from conftest import bpe_tokenizer, respond

from torchrl_chat import ReasoningGymEnv, columns
from torchrl_chat.envs.state import load_state
from torchrl_chat.rewards import Episode, Grader
from torchrl_chat.rewards.reasoning_gym import _EVALUATED, ReasoningGymVerifier, task_rows

pytest.importorskip("reasoning_gym", reason="needs the extra: torchrl_chat[reasoning-gym]")

# Their rows come from the order of Python sets of texts, which is another one in each process.
UNSTABLE = ("polynomial_multiplication", "word_ladder")


@functools.cache
def rows_of(task: str, size: int = 4) -> list[dict[str, Any]]:
    return task_rows(task, {"size": size, "seed": 11})


def graded(task: str, answers: list[str], entries: list[Any], **options: Any) -> list[Any]:
    """The verdicts, right here."""
    with Grader(ReasoningGymVerifier(task, {"seed": 11, "size": 4}, **options), isolate=False) as grader:
        return grader.grade([Episode.of(a, entry) for a, entry in zip(answers, entries, strict=True)])


def right(td: Any) -> Any:
    """The right answers, where there are messages only."""
    said = [
        columns.history_messages([{"role": "assistant", "content": f"<answer>{a}</answer>"}]) for a in td["answer"]
    ]
    return td.copy().set("history", columns.histories("response", said, td.batch_size, None))


class TestRowsThatDependOnTheProcess:
    @pytest.mark.parametrize(
        ("task", "mode"),
        [(UNSTABLE[0], "text"), (UNSTABLE[0], "history"), *((task, "tokens") for task in UNSTABLE)],
    )
    @pytest.mark.by_day(2)
    def test_right_answers_are_right(self, task, mode):
        """The grader's process, with another order of sets, has the row that was asked."""
        env = ReasoningGymEnv(
            task, size=8, seed=3, tokenizer=bpe_tokenizer(), input_mode=mode, num_envs=8, workers=1
        )
        td = env.reset()
        following = env.step(respond(env, td, [f"<answer> {a}\n</answer>" for a in td["answer"]]))["next"]
        assert following["reward"].flatten().tolist() == [1.0] * 8
        assert [verdict.score for verdict in env.score(list(td["answer"]))] == [1.0] * 8
        assert [verdict.correct for verdict in env.score([td["answer"][5], "?"], [5, 5])] == [True, False]
        env.close()

    @pytest.mark.by_day(2)
    def test_a_run_goes_on_with_its_own_questions(self, tmp_path):
        """Saved in one process, gone on with in another: what is asked next, and what is right."""
        settings = {"task": "polynomial_multiplication", "size": 9, "seed": 5, "shuffle": True}
        script = (
            "import sys\n"
            "from torchrl_chat import ReasoningGymEnv\n"
            "from torchrl_chat.envs.state import save_state\n"
            f"env = ReasoningGymEnv(num_envs=2, **{settings})\n"
            "td = env.reset()\n"
            "state = {'env': env.state_dict(), 'td': td}\n"
            "after = [[*td['query'], *td['answer']] for td in (env.reset() for _ in range(6))]\n"
            "save_state(sys.argv[1], {**state, 'after': after})\n"
        )
        path = tmp_path / "state.pt"
        subprocess.run([sys.executable, "-c", script, str(path)], check=True, timeout=300)
        state = load_state(path)
        env = ReasoningGymEnv(num_envs=2, **settings)
        env.load_state_dict(state["env"])
        assert env.step(right(state["td"]))["next", "success"].all()
        for expected in state["after"]:
            td = env.reset()
            assert [*td["query"], *td["answer"]] == expected
            assert env.step(right(td))["next", "success"].all()
        by_number = dict(zip(td["index"], td["answer"], strict=True))
        assert all(verdict.correct for verdict in env.score(list(by_number.values()), list(by_number)))
        with pytest.raises(ValueError, match="another sequence of episodes"):
            ReasoningGymEnv(num_envs=2, **{**settings, "task": "gcd"}).load_state_dict(state["env"])
        env.close()

    def test_the_row_travels_with_the_conversation(self):
        env = ReasoningGymEnv("chain_sum", size=4, seed=1, num_envs=4, tokenizer=bpe_tokenizer())
        td = env.reset()
        entries = columns.read_objects(td.get("entry"), td.batch_size)
        assert [entry["question"] for entry in entries] == td["query"]
        assert {key for entry in entries for key in entry} == {"question", "answer", "metadata"}
        with pytest.raises(TypeError, match=r"is 3: expected the row itself.*'entry'"):
            ReasoningGymVerifier("chain_sum")("4", 3)


class TestTasksThatAreGradedHere:
    def test_halting(self):
        entries = [row["entry"] for row in rows_of("game_of_life_halting")]
        for entry in entries:
            right, wrong = ("True", "False") if entry["answer"] == "True" else ("False", "True")
            answers = [right, right.lower(), f"<answer>\n{right}\n</answer>", f"{right}."]
            assert [v.score for v in graded("game_of_life_halting", answers, [entry] * 4)] == [1.0] * 4
            nonsense = [wrong, "0", "no idea", "", f"{right} or {wrong}", f"not {right}", "1", "<answer></answer>"]
            assert [v.score for v in graded("game_of_life_halting", nonsense, [entry] * 8)] == [0.0] * 8

    def test_coin_flip(self):
        entries = [row["entry"] for row in rows_of("coin_flip", 30)]
        small = 0
        for entry in entries:
            ratio = entry["metadata"]["rational"]
            value = ratio["numerator"] / ratio["denominator"]
            right = [
                entry["answer"], f"{ratio['numerator']}/{ratio['denominator']}", f"{value:.7f}", f"{100 * value:.6f}%",
                f"<answer>{value:.8e}</answer>", f" {ratio['numerator']} / {ratio['denominator']}\n",
            ]  # fmt: skip
            assert [v.score for v in graded("coin_flip", right, [entry] * 6)] == [1.0] * 6
            near = value * 0.985 if value < 0.005 else value - 2e-4
            wrong = [
                "0",
                "no idea",
                "",
                f"{near:.9f}",
                "1/0",
                "0.",
                f"1e{'9' * 9}",
                f"{value:.9f} or 0",
                "-" + entry["answer"],
            ]
            assert [v.score for v in graded("coin_flip", wrong, [entry] * 9)] == [0.0] * 9
            small += value < 1e-3
        assert small > 0

    @pytest.mark.by_day(2, place=1)
    def test_in_an_environment(self, mode):
        for task in ("coin_flip", "game_of_life_halting"):
            env = ReasoningGymEnv(task, size=4, seed=2, tokenizer=bpe_tokenizer(), input_mode=mode, num_envs=4)
            td = env.reset()
            texts = [*td["answer"][:2], "0", "I do not know"]
            following = env.step(respond(env, td, texts))["next"]
            assert following["reward"].flatten().tolist() == [1.0, 1.0, 0.0, 0.0]
            env.close()


# None of these is an answer; where one happens to be (compared with the row's own), it does not count.
NONSENSE = [
    "0",
    "1",
    "-1",
    "no idea",
    "True",
    "False",
    "yes",
    "no",
    "[]",
    "{}",
    "a",
    "None",
    "3.5",
    "null",
    "?",
    "  ",
]
FAST = (
    "ab", "acre", "basic_arithmetic", "boxnet", "calendar_arithmetic", "count_bits", "cryptarithm", "dice", "gcd",
    "graph_color", "jugs", "kakurasu", "knights_knaves", "maze", "n_queens", "number_sequence", "palindrome_generation",
    "path_star", "polynomial_equations", "prime_factorization", "propositional_logic", "rush_hour", "self_reference",
    "sokoban", "survo", "syllogism", "tower_of_hanoi", "tsumego", "zebra_puzzles",
)  # fmt: skip


def gained(task: str) -> None:
    for row in rows_of(task):
        verdicts = graded(task, NONSENSE, [row["entry"]] * len(NONSENSE), floors=False)
        assert [v.failure for v in verdicts] == [None] * len(NONSENSE)
        full = [text for text, v in zip(NONSENSE, verdicts, strict=True) if v.correct]
        accepted = {row["answer"].strip().lower(), *row["answer"].lower().split()}
        assert all(text in accepted or f"{text}.0" in accepted for text in map(str.lower, full)), (
            f"{task}: {full} for {row['answer']!r}"
        )


@pytest.mark.parametrize("task", FAST)
def test_nonsense_gets_no_full_marks_and_is_no_failure(task):
    gained(task)


@pytest.mark.full
def test_nonsense_in_every_task():
    from reasoning_gym.factory import DATASETS

    for task in sorted(set(DATASETS) - {"composite", *FAST}):
        gained(task)


class TestAnswersThatCannotBeRead:
    @pytest.mark.parametrize(
        ("task", "answers"),
        [
            ("prime_factorization", ["I do not know", "3.5", "2 x", "[2, 3]"]),
            ("boxnet", ["42", "[1, 2]", "null", "-1"]),
            ("game_of_life", ["{}", '{"a": 1}', "[]", "x"]),
        ],
    )
    def test_they_are_wrong(self, task, answers):
        entries = [row["entry"] for row in rows_of(task)]
        verdicts = graded(task, answers, entries)
        assert [(v.failure, v.correct) for v in verdicts] == [(None, False)] * 4
        assert [v.answer for v in verdicts] == answers

    @pytest.mark.by_day(2, place=1)
    def test_in_an_environment(self):
        env = ReasoningGymEnv("prime_factorization", size=2, seed=1, num_envs=2, tokenizer=bpe_tokenizer())
        td = env.reset()
        following = env.step(respond(env, td, [td["answer"][0], "I do not know"]))["next"]
        assert following["grade_failure"] == ["", ""]
        assert following["graded"].all()
        assert following["success"].flatten().tolist() == [True, False]
        env.close()

    def test_a_scorer_that_cannot_read_the_right_answer_is_at_fault(self):
        class Broken:
            def score_answer(self, answer, entry):
                raise KeyError("metadata")

        class Odd:
            def score_answer(self, answer, entry):
                return float(answer)

        entry = {"question": "?", "answer": "4", "metadata": {}}
        for scorer, failure, score in ((Broken(), "error: KeyError: 'metadata'", 0.0), (Odd(), None, 0.0)):
            verifier = ReasoningGymVerifier("gcd")
            verifier._generator = scorer
            with Grader(verifier, isolate=False, failure_score=0.0) as grader:
                if failure:
                    with pytest.warns(RuntimeWarning, match="1 of 1 grades failed"):
                        [verdict] = grader.grade([Episode.of("nothing", entry)])
                else:
                    [verdict, infinite] = grader.grade([Episode.of("nothing", entry), Episode.of("inf", entry)])
                    assert infinite.score == 0.0
            assert (verdict.failure, verdict.score) == (failure, score)


class TestFloors:
    FLOORS = {
        "fraction_simplification": 0.01, "sentence_reordering": 0.05, "power_function": 0.01, "emoji_mystery": 0.01,
        "prime_factorization": 0.01, "color_cube_rotation": 0.01,
    }  # fmt: skip

    def test_they_can_be_switched_off(self):
        for task, floor in self.FLOORS.items():
            entries = [rows_of(task)[0]["entry"]] * 3
            for floors, expected in ((True, floor), (False, 0.0)):
                verdicts = graded(task, ["", "<answer> </answer>", " \n"], entries, floors=floors)
                assert [v.score for v in verdicts] == [expected] * 3
                assert [v.answer for v in verdicts] == [None] * 3

    @pytest.mark.by_day(2, place=1)
    def test_in_an_environment(self):
        for floors, expected in ((True, 0.05), (False, 0.0)):
            env = ReasoningGymEnv("sentence_reordering", size=2, seed=1, tokenizer=bpe_tokenizer(), floors=floors)
            td = env.step(respond(env, env.reset(), ["<answer></answer>"]))
            assert td["next", "reward"].item() == pytest.approx(expected)
            env.close()


class TestAnswersThatThePackageEvaluates:
    @pytest.mark.parametrize("task", sorted(_EVALUATED))
    def test_no_program_reaches_a_scorer(self, task):
        """Calls are not evaluated; values and formulas are, as ever."""
        seen = []

        class Recording:
            def score_answer(self, answer, entry):
                seen.append(answer)
                return 1.0

        verifier = ReasoningGymVerifier(task)
        verifier._generator = Recording()
        entry = {"question": "?", "answer": "x", "metadata": {}}
        programs = ["[len('ab')]", "sum([1, 2])", "(1).real", "[n for n in (1, 2)]", "len(())", "x.y"]
        if task in ("binary_matrix", "n_queens", "spiral_matrix", "string_insertion"):
            good = ["[[0, 1], [1, 0]]", "0 1\n1 0", "ABCD", "['A', 'B']", "plain text"]
        else:
            good = ["2*x**2 + 3.5*x", "(3 + 4) * 5 - 6/2", "log(x) + sqrt(x + 1)*exp(-x) + C", "x!", "abs(x - 1)"]
            programs += ["ｌｅｎ(x)", "lambda: 1"]
        assert [verifier(text, entry).score for text in programs] == [0.0] * len(programs)
        assert seen == []
        assert [verifier(text, entry).score for text in good] == [1.0] * len(good)

    @pytest.mark.parametrize("task", sorted(_EVALUATED))
    def test_right_answers_are_taken(self, task):
        rows = rows_of(task, 3)
        assert all(_EVALUATED[task](row["answer"]) for row in rows)
        if "integration" not in task:  # SymPy takes its time with those
            answers, entries = [row["answer"] for row in rows], [row["entry"] for row in rows]
            assert [verdict.score for verdict in graded(task, answers, entries)] == [1.0] * 3
