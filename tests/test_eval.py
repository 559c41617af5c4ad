"""``torchrl-chat eval``: figures, every row as often as asked, going on after kill -9, and what it says of bad input."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import bpe_tokenizer, need_shared, respond
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_chat import Budget, DatasetChatEnv, GSM8KEnv, NumberVerifier, RewardTransform, UserSimulator, columns
from torchrl_chat.cli import grade
from torchrl_chat.cli.main import main
from torchrl_chat.evaluation.figures import (
    Figures,
    bootstrap_interval,
    clustered_error,
    pass_at_k,
    share_interval,
    wilson,
)
from torchrl_chat.evaluation.playing import DatasetRun, finished
from torchrl_chat.evaluation.summary import summed_up
from torchrl_chat.rollouts import extracted, read_rollouts
from torchrl_chat.tiny import TEXT_ALPHABET, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.services

# ---------------------------------------------------------------------- figures
ANSWERS = st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=5), min_size=1, max_size=12)


class TestFigures:
    @given(st.integers(1, 8), st.data())
    def test_pass_at_k_is_the_share_of_subsets(self, samples, data):
        correct, k = data.draw(st.integers(0, samples)), data.draw(st.integers(1, samples))
        subsets = list(itertools.combinations([1] * correct + [0] * (samples - correct), k))
        assert pass_at_k(samples, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))

    def test_pass_at_k_has_no_bias(self):
        draw = np.random.default_rng(0)
        hits = draw.binomial(10, 0.2, size=4000)
        estimate = np.mean([pass_at_k(10, int(c), 4) for c in hits])
        assert estimate == pytest.approx(1 - 0.8**4, abs=0.02)

    @pytest.mark.parametrize(("samples", "correct", "k"), [(3, 1, 4), (3, 1, 0), (3, 4, 1), (3, -1, 1)])
    def test_pass_at_k_that_cannot_be(self, samples, correct, k):
        with pytest.raises(ValueError, match=f"pass@{k}"):
            pass_at_k(samples, correct, k)

    def test_a_majority_is_told_only_where_every_answer_was(self):
        told = {"row": 0, "success": False, "error": None, "reward": 0.0, "reward_parts": {}, "sampled_tokens": 1, "turns": 1,
                "cut": False, "stop": "answered", "grade_failure": None, "extracted": "7"}  # fmt: skip
        older = {key: value for key, value in told.items() if key != "extracted"}
        assert Figures.of([told, told]).summary()["maj_at_k"]
        assert Figures.of([told, told, older]).summary()["maj_at_k"] == {}

    def test_long_answers_are_told_apart(self):
        texts = ["a" * 5000, "a" * 4999 + "b", "a" * 4999, "", "a" * 1000]
        assert len({extracted(text) for text in texts}) == 5
        assert extracted("") is None
        assert extracted(texts[-1]) == texts[-1]

    @given(st.integers(1, 500), st.data())
    def test_wilson_is_that_of_grade(self, total, data):
        hits = data.draw(st.integers(0, total))
        assert wilson(hits, total) == grade.wilson(hits, total)

    @given(ANSWERS)
    def test_intervals_hold_the_share(self, clusters):
        share = sum(map(sum, clusters)) / sum(map(len, clusters))
        low, high = share_interval(clusters)
        assert 0 <= low <= share + 1e-9
        assert share - 1e-9 <= high <= 1
        assert high - low > 0.01  # nor does it shrink to a point where all is right

    @given(st.lists(st.floats(0, 1), min_size=2, max_size=20))
    def test_one_value_a_cluster_is_the_usual_error(self, values):
        expected = np.std(values, ddof=1) / len(values) ** 0.5
        assert clustered_error([[value] for value in values]) == pytest.approx(expected, abs=1e-9)

    @given(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=2, max_size=9))
    def test_clusters_of_one_size_count_as_their_means(self, clusters):
        means = [sum(cluster) / 3 for cluster in clusters]
        assert clustered_error(clusters) == pytest.approx(clustered_error([[mean] for mean in means]), abs=1e-9)

    @pytest.mark.parametrize("samples", [1, 4])
    def test_coverage_of_the_accuracy(self, samples):
        """Questions drawn from a population whose accuracy is known: 95 % of the intervals hold it."""
        draw = np.random.default_rng(samples)
        covered = 0
        for _ in range(1000):
            chances = draw.beta(0.5, 0.5, size=60)  # some questions are easy, some hopeless: mean 0.5
            low, high = share_interval(draw.binomial(1, chances[:, None], (60, samples)).astype(float).tolist())
            covered += low <= 0.5 <= high
        assert 930 <= covered <= 972

    def test_clusters_are_not_taken_for_independent(self):
        """The same simulation with Wilson's interval over all answers, as if they were independent, covers far less."""
        draw = np.random.default_rng(4)
        covered = 0
        for _ in range(500):
            chances = draw.beta(0.5, 0.5, size=60)
            low, high = wilson(int(draw.binomial(1, chances[:, None], (60, 4)).sum()), 240)
            covered += low <= 0.5 <= high
        assert covered < 430

    def test_coverage_of_pass_at_2(self):
        draw = np.random.default_rng(2)
        truth = np.mean(1 - (1 - np.random.default_rng(3).beta(1, 2, 400_000)) ** 2)
        covered = 0
        for _ in range(300):
            hits = draw.binomial(4, draw.beta(1, 2, size=80))
            low, high = bootstrap_interval([pass_at_k(4, int(c), 2) for c in hits], resamples=500)
            covered += low <= truth <= high
        assert 270 <= covered <= 297

    def test_bootstrap_in_blocks(self, monkeypatch):
        values = list(np.random.default_rng(0).random(50_000))
        low, high = bootstrap_interval(values, resamples=200)
        assert low < np.mean(values) < high
        assert high - low == pytest.approx(2 * 1.96 * np.std(values) / 50_000**0.5, rel=0.25)

    def test_nothing_to_sum_up(self):
        with pytest.raises(ValueError, match="no episode was played"):
            Figures().summary()


# ---------------------------------------------------------------------- playing a dataset
class Scripted:
    """A policy that answers as a function of the row and the place says; it remembers the rows that it saw."""

    def __init__(self, said, tokenizer=None):
        self.said, self.tokenizer, self.seen, self.batches = said, tokenizer or bpe_tokenizer(), [], []
        self.env: Any = None

    def __call__(self, td):
        pairs = list(zip(td["episode_row"].tolist(), td["episode_place"].tolist(), strict=True))
        self.seen += pairs
        self.batches.append(len(pairs))
        return respond(self.env, td, [self.said(row, place) for row, place in pairs])

    def making(self, make):
        """The factory of environments, which this policy is told of."""

        def wrapped(count):
            self.env = make(count)
            return self.env

        return wrapped


def numbers(rows: int, samples: int, mode: str = "tokens", turns: int = 1):
    """A factory of environments that ask for the row's number."""

    def make(count: int) -> DatasetChatEnv:
        dataset = [{"query": f"question {i}", "answer": str(i)} for i in range(rows)]
        env = DatasetChatEnv(dataset=dataset, tokenizer=bpe_tokenizer(), input_mode=mode, num_envs=count,
                             shuffle=False, repeats=samples, seed=1)  # fmt: skip
        env = env.append_transform(RewardTransform(NumberVerifier()))
        if turns > 1:
            env = env.append_transform(UserSimulator(lambda messages: "again", turns=99))
        return env.append_transform(Budget(max_turns=turns))

    return make


class TestEveryRow:
    @given(st.integers(1, 7), st.integers(1, 3), st.integers(1, 10), st.one_of(st.none(), st.integers(1, 9)))
    @settings(max_examples=20, deadline=None)
    def test_exactly_as_often_as_asked_in_order(self, tmp_path_factory, rows, samples, batch, limit):
        path = tmp_path_factory.mktemp("e") / "rollouts.jsonl"
        policy = Scripted(lambda row, place: f"#### {row if place == 0 else 99}")
        run = DatasetRun(policy.making(numbers(rows, samples)), policy, path, batch=batch, limit=limit)
        sizes = [len(played) for played in run]
        run.close()
        played = min(rows, limit or rows)
        expected = [(row, place) for row in range(played) for place in range(samples)]
        assert policy.seen == expected
        assert sizes == policy.batches
        assert sum(sizes) == len(expected) == run.total
        found = list(read_rollouts(path, on_error="raise"))
        assert [(e["row"], e["place"]) for e in found] == expected
        assert [e["query"] for e in found] == [f"question {row}" for row, _ in expected]
        assert len({e["id"] for e in found}) == len(found)
        summary = summed_up(path)
        assert summary["accuracy"] == pytest.approx(1 / samples)
        assert (summary["questions"], summary["episodes"]) == (played, len(expected))
        if samples > 1:
            assert summary["pass_at_k"][str(samples)]["value"] == 1.0

    def test_gsm8k_with_a_known_accuracy(self, tmp_path):
        data = need_shared("data/gsm8k/test.jsonl")
        references = [json.loads(line)["answer"].rsplit("#### ")[-1] for line in data.read_text().splitlines()]

        def said(row: int, place: int) -> str:
            return f"<think>hm</think><answer>{references[row]}</answer>" if row % 3 == 0 else "I give up"

        def make(count: int) -> GSM8KEnv:
            return GSM8KEnv(dataset=str(data), tokenizer=bpe_tokenizer(), input_mode="tokens", num_envs=count,
                            shuffle=False, seed=0, workers=1)  # fmt: skip

        policy = Scripted(said)
        run = DatasetRun(policy.making(make), policy, tmp_path / "r.jsonl", batch=64, limit=150)
        assert [len(played) for played in run] == [64, 64, 22]
        run.close()
        summary = summed_up(tmp_path / "r.jsonl")
        assert summary["accuracy"] == pytest.approx(50 / 150)
        assert summary["interval"] == pytest.approx(list(wilson(50, 150)))
        assert summary["stops"] == {"truncated": 100, "answered": 50}  # StepCounter ends what has no answer
        assert summary["cut_share"] == 0

    @pytest.mark.parametrize("mode", ["tokens", "text", "history"])
    def test_several_turns_to_their_end(self, tmp_path, mode):
        asked: dict[tuple[int, int], int] = {}

        def said(row: int, place: int) -> str:
            asked[row, place] = asked.get((row, place), 0) + 1
            return f"#### {row}" if asked[row, place] > row else "hm"

        policy = Scripted(said)
        make = policy.making(numbers(3, 1, mode, turns=9))
        run = DatasetRun(make, policy, tmp_path / "r.jsonl", batch=3)
        list(run)
        run.close()
        assert [e["turns"] for e in read_rollouts(tmp_path / "r.jsonl")] == [1, 2, 3]
        assert summed_up(tmp_path / "r.jsonl")["mean_turns"] == 2

    def test_errors_are_played_again_and_nothing_else(self, tmp_path):
        path = tmp_path / "r.jsonl"
        policy = Scripted(lambda row, place: f"#### {row}")

        def failing(td):
            td = policy(td)
            bad = [row == 2 for row in td["episode_row"].tolist()]
            td["_step"] = ~torch.tensor(bad)
            td["policy_error"] = columns.objects(["gone: x" if b else "" for b in bad], td.batch_size, None)
            return td

        failing.tokenizer = policy.tokenizer  # type: ignore[attr-defined]
        run = DatasetRun(policy.making(numbers(5, 1)), failing, path, batch=4)
        list(run)
        summary = summed_up(path)
        assert (summary["accuracy"], summary["errors"]) == (0.8, {"gone": 1})
        with path.open("ab") as file:
            file.write(b'{oops\n{"version": 1, "row"')
        policy.seen.clear()
        again = DatasetRun(policy.making(numbers(5, 1)), policy, path, batch=4)
        assert (again.total, again.todo) == (5, [(2, 0)])
        list(again)
        assert policy.seen == [(2, 0)]
        found = list(read_rollouts(path, on_error="raise"))
        assert sorted(e["row"] for e in found) == [0, 1, 2, 3, 4]
        assert summed_up(path)["accuracy"] == 1.0
        assert finished(path) == {(row, 0) for row in range(5)}

    def test_a_batch_of_failures_ends_the_run(self, tmp_path):
        policy = Scripted(lambda row, place: "x")

        def failing(td):
            td = policy(td)
            td["_step"] = torch.zeros(td.batch_size, dtype=torch.bool)
            td["policy_error"] = columns.objects(["gone"] * td.batch_size.numel(), td.batch_size, None)
            return td

        run = DatasetRun(policy.making(numbers(5, 1)), failing, tmp_path / "r.jsonl", batch=2)
        with pytest.raises(ValueError, match="all 2 requests of a batch failed, the first with gone"):
            list(run)
        assert len(policy.seen) == 2

    @pytest.mark.parametrize(
        ("kwargs", "match"), [({"shuffle": True}, "shuffle=False"), ({"shard": (0, 2)}, "no shard")]
    )
    def test_environments_without_an_order(self, tmp_path, kwargs, match):
        def make(count: int) -> DatasetChatEnv:
            return DatasetChatEnv(dataset=[{"query": "a"}] * 4, num_envs=count, **{"shuffle": False, **kwargs})

        with pytest.raises(ValueError, match=match):
            DatasetRun(make, None, tmp_path / "r.jsonl")
        with pytest.raises(ValueError, match="batch is 0"):
            DatasetRun(make, None, tmp_path / "r.jsonl", batch=0)


# ---------------------------------------------------------------------- the command
DIGITS = ["eval", "--dataset", "digits", "--limit", "12", "--batch", "5"]


def episodes_of(folder: Path) -> list[dict[str, Any]]:
    """The episodes of a run, without the time at which they were played."""
    found = list(read_rollouts(folder / "rollouts.jsonl", on_error="raise"))
    return [{**e, "metadata": {**e["metadata"], "time": 0, "seconds": 0}} for e in found]


class TestCommand:
    def test_writes_everything(self, tmp_path, capsys):
        assert main([*DIGITS, "--samples", "3", "--out", str(tmp_path)]) == 0
        printed = capsys.readouterr().out
        assert "accuracy" in printed
        assert "pass@3" in printed
        assert {path.name for path in tmp_path.iterdir()} == {"config.json", "rollouts.jsonl", "summary.json"}
        summary = json.loads((tmp_path / "summary.json").read_text())
        assert (summary["questions"], summary["episodes"], summary["missing"]) == (12, 36, 0)
        found = episodes_of(tmp_path)
        assert summary["accuracy"] == pytest.approx(sum(e["success"] for e in found) / 36)
        assert summary["sampled_tokens"]["max"] == max(e["sampled_tokens"] for e in found)
        assert found[0]["metadata"]["policy"] == "tiny"

    def test_answers_do_not_depend_on_the_batch(self, tmp_path):
        for batch in ("2", "36"):
            assert main([*DIGITS, "--samples", "3", "--batch", batch, "--out", str(tmp_path / batch)]) == 0
        first, second = (episodes_of(tmp_path / batch) for batch in ("2", "36"))
        assert [e["messages"] for e in first] == [e["messages"] for e in second]
        assert len({e["messages"][-1]["content"] for e in first}) > 6  # and they do differ

    def test_json_and_greedy_default(self, tmp_path, capsys):
        assert main([*DIGITS, "--json", "--no-tokens", "--out", str(tmp_path)]) == 0
        summary = json.loads(capsys.readouterr().out)
        assert summary["pass_at_k"] == {}
        assert json.loads((tmp_path / "config.json").read_text())["temperature"] == 0
        assert "sequences" not in episodes_of(tmp_path)[0]

    def test_more_rows_and_samples_later(self, tmp_path):
        few = ["--temperature", "1", "--out", str(tmp_path)]
        assert main([*DIGITS, *few]) == 0
        before = (tmp_path / "rollouts.jsonl").read_bytes()
        assert main([*DIGITS, *few, "--samples", "2"]) == 0
        assert (tmp_path / "rollouts.jsonl").read_bytes().startswith(before)
        found = episodes_of(tmp_path)
        assert sorted((e["row"], e["place"]) for e in found) == [(r, p) for r in range(12) for p in range(2)]
        assert main([*DIGITS, *few, "--limit", "5"]) == 0  # and the figures of a part
        assert json.loads((tmp_path / "summary.json").read_text())["episodes"] == 5

    def test_other_settings_are_another_evaluation(self, tmp_path, capsys):
        assert main([*DIGITS, "--out", str(tmp_path)]) == 0
        assert main([*DIGITS, "--out", str(tmp_path), "--max-new-tokens", "3"]) == 2
        assert "--max-new-tokens 8, not 3" in capsys.readouterr().err

    @pytest.mark.parametrize("dataset", ["gsm8k", "math", "ifeval", "countdown", "reasoning-gym:chain_sum"])
    def test_datasets(self, tmp_path, dataset):
        data = {"gsm8k": "gsm8k/test.jsonl", "math": "math500", "ifeval": "ifeval"}.get(dataset)
        extra = []
        if data is not None:
            path = need_shared(f"data/{data}")
            if path.is_dir():
                path = next(file for file in sorted(path.iterdir()) if file.suffix in (".jsonl", ".parquet"))
            extra = ["--data", str(path)]
        code = main(
            ["eval", "--dataset", dataset, *extra, "--limit", "3", "--max-new-tokens", "4", "--out", str(tmp_path)]
        )
        assert code == 0
        assert [e["row"] for e in episodes_of(tmp_path)] == [0, 1, 2]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--dataset", "nothing"], "there is no environment 'nothing'"),
            (["--dataset", "gsm8k", "--data", "/no/such/file.jsonl"], "no such dataset file or folder"),
            (["--dataset", "reasoning-gym:basic_arithmetic", "--data", "x.jsonl"], "makes its rows itself"),
            (["--samples", "2", "--temperature", "0"], "asks for the same answer again"),
            (["--endpoint", "http://x"], "needs --backend endpoint"),
            (["--backend", "endpoint"], "needs --model"),
            (["--model", "/no/such/model"], "/no/such/model"),
            (
                ["--backend", "endpoint", "--model", "m", "--endpoint", "http://x", "--input-mode", "text"],
                "--tokenizer",
            ),
            (["--resume", "/no/such/run"], "there is no run in this folder"),
        ],
    )
    def test_bad_input_is_one_line(self, tmp_path, capsys, arguments, message):
        extra = [] if "--resume" in arguments else ["--out", str(tmp_path / "x")]
        assert main(["eval", *extra, *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
        assert not (tmp_path / "x").exists()  # nothing is left that a later run would stumble over

    def test_help_teaches(self, capsys):
        with pytest.raises(SystemExit):
            main(["eval", "--help"])
        text = capsys.readouterr().out
        for word in ("gsm8k", "--resume", "pass@k", "rollouts.jsonl", "default", "2411.00640"):
            assert word in text

    def test_an_endpoint(self, tmp_path, capsys, endpoint):
        def script(body, number):
            question = body["messages"][-1]["content"]  # last(3,7)=
            if number == 2:
                return 400, b'{"error": {"message": "too rude"}}'
            return question[-3]

        endpoint.script = script
        command = [*DIGITS, "--backend", "endpoint", "--endpoint", endpoint.url, "--model", "m", "--batch", "4"]
        assert main([*command, "--out", str(tmp_path)]) == 1
        assert "1 BadRequestError" in capsys.readouterr().out
        assert main(["eval", "--resume", str(tmp_path)]) == 0  # the failed request is made again, and no other
        assert len(endpoint.requests) == 13
        assert json.loads((tmp_path / "summary.json").read_text())["accuracy"] == 1.0


@pytest.mark.by_day(3)
def test_going_on_after_kill_9_is_as_if_nothing_had_been(tmp_path):
    """A sampling policy, killed with batches in the file and the next under way: the file ends up the same."""
    text = tiny_tokenizer(TEXT_ALPHABET)
    folder = tmp_path / "model"
    tiny_model(len(text), context=1024).save_pretrained(folder)
    text.save_pretrained(folder)
    command = ["--dataset", "digits", "--model", str(folder), "--limit", "24", "--samples", "2", "--batch", "6"]
    command = ["eval", *command, "--max-new-tokens", "60", "--seed", "3"]
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0

    # It kills itself in the middle of its third batch, so that it is never over before, however busy the machine is.
    killed = """
import os, signal, sys
from torchrl_chat.cli.main import main
from torchrl_chat.evaluation.playing import DatasetRun
play, played = DatasetRun._play, []
def batch(run, pairs):
    played.append(pairs)
    if len(played) == 3:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
    return play(run, pairs)
signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
DatasetRun._play = batch
main(sys.argv[1:])
"""
    ended = subprocess.run(
        [sys.executable, "-c", killed, *command, "--out", str(tmp_path / "killed")],
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr[-2000:]
    path = tmp_path / "killed" / "rollouts.jsonl"
    before = path.read_bytes()
    assert before.count(b"\n") == 12
    path.write_bytes(before + before[:500])  # as if it had been killed while it wrote
    assert main(["eval", "--resume", str(tmp_path / "killed")]) == 0

    assert path.read_bytes().startswith(before)
    whole, again = episodes_of(tmp_path / "whole"), episodes_of(tmp_path / "killed")
    assert again == whole


@pytest.mark.by_day(3, place=1)
def test_ctrl_c_sums_up_what_there_is(tmp_path):
    command = ["eval", "--dataset", "countdown", "--limit", "400", "--batch", "2", "--max-new-tokens", "100"]
    process = subprocess.Popen(
        [sys.executable, "-m", "torchrl_chat.cli.main", *command, "--out", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    path = tmp_path / "rollouts.jsonl"
    deadline = time.time() + 120
    while time.time() < deadline and not path.exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err[-2000:]
    assert "Traceback" not in err
    assert "not played" in out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["episodes"] == len(episodes_of(tmp_path)) == 400 - summary["missing"]
