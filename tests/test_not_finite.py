"""Numbers that are none: in a row's log-probs, in a loss, in gradients, in weights. Nothing good is lost to them."""

from __future__ import annotations

import copy
import json
import math
import random
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from run_books import SCRIPTS, example, jsonl, words
from safetensors.torch import load_file

from torchrl_chat import TransformersPolicy
from torchrl_chat.conversation.turn import bad_log_probs
from torchrl_chat.learner import minibatches
from torchrl_chat.models.sampling import generate
from torchrl_chat.recipes import checkpoints as saving
from torchrl_chat.tiny import tiny_model, tiny_tokenizer
from torchrl_chat.training import NotFiniteError, Step, scoring, take_step, whitened
from torchrl_chat.training.updates import not_finite

NAN, INF = math.nan, math.inf
WRONG = [NAN, INF, -INF, 0.01, 3.0, 1e30]
RIGHT = [0.0, -0.0, -1e-9, 1e-6, -0.5, -60.0, -1e4]


class TestRows:
    @settings(deadline=None)
    @given(st.lists(st.lists(st.sampled_from(RIGHT + WRONG), min_size=0, max_size=5), min_size=1, max_size=8))
    def test_each_row_is_told_its_own(self, rows):
        """A row's reason names the first value that is no log-prob, its place and its id; other rows have none."""
        ids = [torch.arange(len(row)) + 10 for row in rows]
        found = bad_log_probs([torch.tensor(row) for row in rows], ids)
        for row, reason in zip(rows, found, strict=True):
            bad = [
                place for place, value in enumerate(row) if any(value is wrong or value == wrong for wrong in WRONG)
            ]
            assert (reason is None) == (not bad)
            if bad:
                assert f"{row[bad[0]]:g} at position {bad[0]}, for the id {bad[0] + 10}" in reason

    def test_another_number_of_them_and_none_at_all(self):
        ids = [torch.tensor([5, 6])] * 3
        first, second, third = bad_log_probs([torch.tensor([NAN]), None, torch.tensor([-1.0, -2.0])], ids)
        assert "1 values for 2 sampled ids" in first
        assert second is third is None

    def test_a_row_without_logits_costs_no_other_row(self):
        """torch.multinomial refuses a whole batch for one NaN."""
        model = tiny_model(20)
        prompts = [torch.tensor([3, 4]), torch.tensor([5]), torch.tensor([6, 7, 8])]

        def sampled(broken: int | None):
            def forward(**arguments):
                output = model(**arguments)
                if broken is not None:
                    output.logits[broken] = NAN
                return output

            draw = torch.Generator().manual_seed(0)
            return generate(forward, prompts, stop_ids=set(), most=[4] * 3, generator=draw)

        ids, scores = sampled(None)
        other_ids, other_scores = sampled(1)
        for row in (0, 2):
            assert torch.equal(ids[row], other_ids[row])
            assert torch.equal(scores[row], other_scores[row])
        assert [reason is not None for reason in bad_log_probs(other_scores, other_ids)] == [False, True, False]


def small(optimizer_of=torch.optim.AdamW):
    """Two parameters behind some steps of an optimizer that remembers them."""
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(3)), torch.nn.Parameter(torch.randn(2, 2))]
    optimizer = optimizer_of(weights, lr=0.1)
    for _ in range(3):
        sum((weight**2).sum() for weight in weights).backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights, optimizer


def same(one, other) -> bool:
    """Whether two states hold the same, bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


class TestSteps:
    @pytest.mark.parametrize("optimizer_of", [torch.optim.AdamW, torch.optim.RMSprop, torch.optim.SGD])
    @pytest.mark.parametrize("wrong", ["a loss", "a loss of several", "a gradient", "an infinite gradient"])
    def test_weights_and_optimizer_stay_what_they_were(self, optimizer_of, wrong):
        weights, optimizer = small(optimizer_of)
        before, state = copy.deepcopy(weights), copy.deepcopy(optimizer.state_dict()["state"])
        loss = sum((weight**2).sum() for weight in weights)
        loss.backward()
        told = {"a loss": torch.tensor(NAN), "a loss of several": [loss, torch.tensor(-INF)]}.get(wrong, loss)
        if "gradient" in wrong:
            weights[1].grad[0, 1] = INF if "infinite" in wrong else NAN
        step = take_step(optimizer, told, max_grad_norm=1.0)
        assert not step
        assert math.isfinite(step.grad_norm) == ("loss" in wrong)
        assert all(map(torch.equal, weights, before))
        assert same(optimizer.state_dict()["state"], state)
        assert all(weight.grad is None for weight in weights)
        sum((weight**2).sum() for weight in weights).backward()
        assert take_step(optimizer, 1.0, max_grad_norm=1.0)
        assert not any(map(torch.equal, weights, before))

    def test_it_is_the_step_with_clipping(self):
        (weights, optimizer), (others, plain) = small(), small()
        for some in (weights, others):
            (100 * sum((weight**2).sum() for weight in some)).backward()
        norm = torch.nn.utils.clip_grad_norm_(others, 0.5)
        plain.step()
        assert take_step(optimizer, [torch.tensor(1.0), 2.0], max_grad_norm=0.5) == Step(True, norm.item())
        assert all(map(torch.equal, weights, others))

    def test_a_few_in_a_row_end_it_and_a_good_one_between_does_not(self):
        weights, optimizer = small()

        def step(factor: float) -> bool:
            loss = factor * sum((weight**2).sum() for weight in weights)
            loss.backward()
            return bool(take_step(optimizer, loss, patience=3))

        assert [step(factor) for factor in (NAN, INF, 1.0, NAN, NAN)] == [False, False, True, False, False]
        again = small()[1]
        again.load_state_dict(optimizer.state_dict())  # a run that is resumed goes on counting
        assert again.param_groups[0]["not_finite_in_a_row"] == 2
        with pytest.raises(
            NotFiniteError, match="3 optimizer steps in a row were not finite, the last with the loss nan"
        ):
            step(NAN)
        assert all(weight.isfinite().all() for weight in weights)

    def test_bad_settings(self):
        for wrong in ({"patience": 0}, {"max_grad_norm": 0.0}, {"max_grad_norm": NAN}):
            with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
                take_step(small()[1], 0.0, **wrong)

    def test_a_number_that_is_none_spoils_no_other_advantage(self):
        values = torch.tensor([[1.0, NAN, 3.0], [5.0, 7.0, 100.0]])
        mask = torch.tensor([[True, True, True], [True, True, False]])
        found = whitened(values, mask)
        assert found[0, 1].isnan()
        chosen = found[mask & found.isfinite()]
        assert len(chosen) == 4
        assert float(chosen.mean()) == pytest.approx(0, abs=1e-6)
        assert float(chosen.std()) == pytest.approx(1, abs=1e-5)


class TestCheckpoints:
    @pytest.mark.parametrize("value", [NAN, INF, -INF])
    @pytest.mark.parametrize("where", ["model", "state"])
    def test_what_is_no_number_is_never_written(self, tmp_path, where, value):
        model, tokenizer, state = tiny_model(30), tiny_tokenizer(), {"state": {"optimizer": {"m": torch.zeros(3)}}}
        saving.save_checkpoint(tmp_path, 1, model, tokenizer, state, keep=1)
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        broken = model.lm_head.weight.data if where == "model" else state["state"]["optimizer"]["m"]
        broken.view(-1)[2] = value
        with pytest.raises(
            NotFiniteError, match=r"lm_head\.weight" if where == "model" else r"state\.optimizer\.m"
        ):
            saving.save_checkpoint(tmp_path, 2, model, tokenizer, state, keep=1)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before

    def test_what_is_looked_at(self):
        fine = {"a": [torch.zeros(2), {"b": torch.tensor([3])}], "c": INF, "d": "nan", "e": None}
        assert not_finite(fine) is None
        assert not_finite(fine | {"f": (1, [torch.tensor([NAN])])}) == "f.1.0"
        assert not_finite({"half": torch.tensor([1e9]).half()}) == "half"


def break_scores(monkeypatch, broken) -> list[int]:
    """Have the model that is trained say NaN of all tokens where ``broken(number of the call)``; which calls those were."""
    score, calls, hit = scoring._score, [0], []

    def scored(*arguments):
        told = score(*arguments)
        if torch.is_grad_enabled():
            calls[0] += 1
            if broken(calls[0]):
                hit.append(calls[0])
                return told | {key: told[key] * NAN for key in ("log_probs", "loss") if told[key] is not None}
        return told

    monkeypatch.setattr(scoring, "_score", scored)
    return hit


def finite_checkpoints(folder) -> int:
    """How many checkpoints there are; all of their weights are finite."""
    found = saving.checkpoints(folder / "checkpoints")
    for path in found:
        assert all(weight.isfinite().all() for weight in load_file(path / "model.safetensors").values())
    return len(found)


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.by_day(2)
def test_a_run_goes_on_behind_a_bad_step(tmp_path, monkeypatch, name):
    """The weights behind it are bit for bit those before it, and steps are taken before and after."""
    module = example(name)
    hit = break_scores(monkeypatch, lambda call: call == (9 if name == "python_tool" else 6))
    taken, take = [], minibatches.take_step

    def watched(optimizer, *arguments, **options):
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        before, state = copy.deepcopy(weights), copy.deepcopy(optimizer.state_dict()["state"])
        good = take(optimizer, *arguments, **options)
        taken.append(bool(good))
        if not good:
            assert all(map(torch.equal, weights, before))
            assert same(optimizer.state_dict()["state"], state)
        return good

    monkeypatch.setattr(minibatches, "take_step", watched)
    if name == "expert_iteration":  # random weights are seldom right: imitate whatever was said
        monkeypatch.setattr(
            module, "right_answers", lambda finished, config: module.training_view(finished, layout="padded")
        )
    monkeypatch.setattr(sys, "argv", words(name, "--out", str(tmp_path)))
    module.main()
    assert len(hit) == 1
    assert taken.count(False) == 1
    assert taken[0]
    assert taken[-1]
    metrics = jsonl(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [0, 1, 2, 3]
    assert sum(row["skipped"] for row in metrics) == 1
    assert json.loads((tmp_path / "result.json").read_text())["skipped"] == 1
    assert finite_checkpoints(tmp_path) == 2


def test_a_run_whose_steps_are_all_bad_ends_and_its_checkpoints_are_good(tmp_path, monkeypatch):
    module = example("grpo")
    hit = break_scores(monkeypatch, lambda call: call > 6)
    monkeypatch.setattr(sys, "argv", words("grpo", "--steps", "50", "--out", str(tmp_path)))
    with pytest.raises(NotFiniteError, match="10 optimizer steps in a row were not finite"):
        module.main()
    assert len(hit) == 10
    assert finite_checkpoints(tmp_path) == 2


def break_samples(monkeypatch, calls: set[int]) -> list[int]:
    """Have the policy say NaN of the last token of its first row, in these of its turns; which turns those were."""
    generate, made, hit = TransformersPolicy.generate, [0], []

    def generated(policy, *arguments, **options):
        ids, scores = generate(policy, *arguments, **options)
        made[0] += 1
        if made[0] in calls:
            hit.append(made[0])
            scores = [torch.cat([scores[0][:-1], torch.tensor([NAN])]), *scores[1:]]
        return ids, scores

    monkeypatch.setattr(TransformersPolicy, "generate", generated)
    return hit


@pytest.mark.full
@pytest.mark.parametrize("name", ["grpo", "ppo", "expert_iteration"])
def test_a_run_with_a_bad_step_and_bad_rows_reaches_the_same_line(tmp_path, monkeypatch, name):
    """A NaN at a step that is drawn, and in rows that are drawn: finite weights, and what a run without them reaches."""
    module, draw = example(name), random.Random(f"{name} 15")
    call, turns = (
        draw.randrange(20, 100),
        set(draw.sample(range(3, 28), 3)),
    )  # a run of expert iteration samples 30 times
    hit, rows = break_scores(monkeypatch, lambda number: number == call), break_samples(monkeypatch, turns)
    monkeypatch.setattr(sys, "argv", [name, "--out", str(tmp_path)])
    module.main()
    result = json.loads((tmp_path / "result.json").read_text())
    assert hit == [call]
    assert set(rows) == turns
    assert result["skipped"] == 1
    assert result["after"] > 0.9
    assert finite_checkpoints(tmp_path) == 2


def test_the_command_line_trains_on_and_keeps_good_weights(tmp_path, monkeypatch):
    from torchrl_chat.cli.main import main

    hit = break_scores(monkeypatch, lambda call: call == 3)
    quick = ["train", "--steps", "3", "--prompts", "2", "--group-size", "4", "--minibatch", "4", "--eval", "4"]
    assert main([*quick, "--out", str(tmp_path)]) == 0
    assert hit == [3]
    assert sum(row["skipped"] for row in jsonl(tmp_path / "metrics.jsonl")) == 1
    assert finite_checkpoints(tmp_path) == 2
