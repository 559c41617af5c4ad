"""On-policy distillation: what a token's advantage is on average, what is refused, and that a student becomes its teacher."""

from __future__ import annotations

import json

import pytest
import torch
from recipe_runs import learn

from torchrl_chat.recipes.grpo import main
from torchrl_chat.tiny import tiny_model, tiny_tokenizer
from torchrl_chat.training import distillation_advantages, policy_loss


@pytest.mark.parametrize("surrogate", ["reinforce", "ppo", "cispo"])
def test_its_policy_gradient_is_that_of_the_reverse_divergence(surrogate):
    """Over all tokens that can be sampled, each as often as it is: in float64, at every position."""
    draw = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 7, generator=draw, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    log_probs, target = student.log_softmax(-1), teacher.log_softmax(-1)
    (log_probs.exp() * (log_probs - target)).sum().backward()
    expected, student.grad = student.grad, None

    # A row a token: of three positions, seven tokens each.
    log_probs = student.log_softmax(-1)
    old, mask = log_probs.detach().T, torch.ones(7, 3, dtype=torch.bool)
    advantage = distillation_advantages(target.T, old, mask)
    settings = {} if surrogate == "reinforce" else {"clip": (0.9, 9.0)}
    loss, _ = policy_loss(
        log_probs.T,
        old,
        advantage,
        mask,
        surrogate=surrogate,
        weights=old.exp(),
        aggregation="token",
        denominator=1.0,
        **settings,
    )
    loss.backward()
    assert torch.allclose(student.grad, expected, atol=1e-6)


def test_what_is_impossible_for_the_teacher_is_discouraged_so_much_at_most():
    mask = torch.tensor([[True, True, False]])
    found = distillation_advantages(
        torch.tensor([[-torch.inf, -1.0, torch.nan]]), torch.full((1, 3), -2.0), mask, least=-5.0
    )
    assert found.tolist() == [[-5.0, 1.0, 0.0]]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"log_probs": torch.zeros(2, 2)}, r"have the shapes \[\(1, 2\), \(2, 2\), \(1, 2\)\]"),
        ({"least": 0.0}, "least=0.0: expected a negative number"),
        ({"log_probs": torch.tensor([[0.0, torch.nan]])}, "a log-prob of token 1 of row 0 is no number"),
    ],
)
def test_bad_input(changes, told):
    given = {
        "teacher_log_probs": torch.zeros(1, 2),
        "log_probs": torch.zeros(1, 2),
        "mask": torch.ones(1, 2, dtype=torch.bool),
    }
    with pytest.raises(ValueError, match=told):
        distillation_advantages(**given | changes)


QUICK = ["--prompts", "4", "--group_size", "4", "--minibatch", "16", "--eval", "8", "--show_every", "0"]


def test_a_teacher_is_asked_for(capsys):
    with pytest.raises(SystemExit):
        main(["--variant", "distillation"], "train")
    assert "learns from a teacher: give --teacher." in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--divergence", "forward"], "train")
    assert "is one from a teacher: give --teacher." in capsys.readouterr().err


def test_another_tokenizer_is_refused(tmp_path):
    tokenizer = tiny_tokenizer("abc")
    tokenizer.save_pretrained(tmp_path / "teacher")
    tiny_model(len(tokenizer)).save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match="has another tokenizer than --model tiny"):
        main([*QUICK, "--teacher", str(tmp_path / "teacher"), "--out", str(tmp_path / "run")], "train")


@pytest.mark.parametrize(("divergence", "steps"), [("sampled", "40"), ("forward", "12")])
def test_a_student_comes_near_its_teacher(tmp_path, divergence, steps):
    """Without any reward; the teacher is what it was at the end."""
    main([*QUICK, "--steps", "1", "--seed", "7", "--out", str(tmp_path / "teacher")], "train")
    teacher = tmp_path / "teacher" / "checkpoints" / "step-000001"
    words = [
        "--variant",
        "distillation",
        "--teacher",
        str(teacher),
        "--steps",
        steps,
        "--prompts",
        "16",
        "--minibatch",
        "32",
        "--divergence",
        divergence,
    ]
    main([*QUICK, *words, "--lr", "3e-3", "--out", str(tmp_path / "student")], "train")
    rows = [json.loads(line) for line in (tmp_path / "student" / "metrics.jsonl").read_text().splitlines()]
    apart = [row["kl_teacher"] for row in rows]
    assert sum(apart[-3:]) < 0.5 * sum(apart[:3])


@pytest.mark.full
@pytest.mark.learn
@pytest.mark.timeout(2400)
def test_what_a_teacher_has_learned_is_learned_from_it(tmp_path):
    """In a fraction of the steps that rewards take."""
    assert learn(tmp_path / "teacher", "grpo", "transformers", 0)["after"] > 0.9
    [*_, teacher] = sorted((tmp_path / "teacher" / "checkpoints").iterdir())
    words = ["--variant", "distillation", "--teacher", str(teacher), "--steps", "40", "--lr", "2e-3"]
    assert learn(tmp_path / "student", "grpo", "transformers", 1, *words)["after"] > 0.9


def test_several_processes_refuse_what_they_would_not_keep_in_step(capsys, monkeypatch):
    """Before they know each other."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        main(["--variant", "distillation", "--teacher", "somewhere"], "train")
    assert "several take --divergence sampled" in capsys.readouterr().err
