"""On-policy distillation: what a token's advantage is on average, what is refused, and that a student becomes its teacher."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from in_ranks import in_ranks
from rank_runs import check_same, rows, run
from recipe_runs import learn as learns
from torchrl.modules.llm.policies import LogProbs

from torchrl_chat import ranks
from torchrl_chat.learner import Counts, Streams, gathered_head, learn, shard
from torchrl_chat.recipes.grpo import GRPOConfig, loss_of, main, what_is_taught
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


@pytest.mark.parametrize(
    ("divergence", "steps"), [pytest.param("sampled", "40", marks=pytest.mark.full), ("forward", "12")]
)
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
    assert learns(tmp_path / "teacher", "grpo", "transformers", 0)["after"] > 0.9
    [*_, teacher] = sorted((tmp_path / "teacher" / "checkpoints").iterdir())
    words = ["--variant", "distillation", "--teacher", str(teacher), "--steps", "40", "--lr", "2e-3"]
    assert learns(tmp_path / "student", "grpo", "transformers", 1, *words)["after"] > 0.9


# ---------------------------------------------------------------------- in several processes
def learned_beside_one(direction: str, surrogate: str, tied: bool) -> float:
    """How far a gradient of the recipe's loss is from that of one process, of its largest number; processes have unequal parts."""
    ranks.begin("cpu")
    whole = rows(6)
    whole["log_probs"] = LogProbs(full=torch.full((6, 14), -4.0), batch_size=6)
    whole["episode"], whole["episode_sequence"] = torch.arange(6), torch.tensor([[0, 1]] * 6)
    config = GRPOConfig(
        divergence=direction, surrogate=surrogate, clip=0.9, clip_high=0.9, aggregation="token", entropy=0.1, max_tokens=30
    )  # fmt: skip
    found = []
    for count, view in ((1, whole), (2, whole[:5] if ranks.leads() else whole[5:])):
        model, teacher = tiny_model(64, seed=3), tiny_model(64, hidden=96, seed=4).requires_grad_(False)
        if tied:
            teacher.lm_head.weight = teacher.model.embed_tokens.weight
        model, teacher = (shard(each) if count > 1 else each for each in (model.eval(), teacher.eval()))
        view = view.clone()
        taught = what_is_taught(teacher, view, config)
        loss = functools.partial(
            loss_of, model, config=config, vocab_size=60, streams=Streams(), taught=taught
        )  # the vocabulary is a few tokens shorter than the embeddings
        if count == 1:
            mask = whole["masks", "all_assistant_mask"]
            loss(view, Counts(mask.sum().float(), torch.tensor(6.0)))[0].backward()
            found.append({name: weight.grad for name, weight in model.named_parameters()})
            continue
        with gathered_head(teacher):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            learn(optimizer, view, loss, minibatch=60, max_tokens=30, max_grad_norm=None, model=model)
        found.append({name: weight.grad.full_tensor() for name, weight in model.named_parameters()})
    one, other = found
    return max(float((other[name] - grad).abs().max() / grad.abs().max()) for name, grad in one.items())


@pytest.mark.services
@pytest.mark.parametrize(
    ("direction", "surrogate", "tied"),
    [
        ("reverse", "ppo", True),
        pytest.param("forward", "ppo", False, marks=pytest.mark.full),
        pytest.param("forward", "gspo", True, marks=pytest.mark.full),  # whose loss stands behind the log-probs
    ],
)
def test_several_processes_learn_what_one_would(direction, surrogate, tied):
    assert max(in_ranks(2, learned_beside_one, direction, surrogate, tied)) < 1e-5


@pytest.mark.full
@pytest.mark.services
@pytest.mark.parametrize("divergence", ["reverse", "sampled"])
def test_a_run_in_two_processes_is_that_of_one(tmp_path, divergence):
    in_ranks(1, run, "grpo", str(tmp_path / "teacher"), "--steps", "1", "--seed", "7")
    teacher = str(tmp_path / "teacher" / "checkpoints" / "step-000001")
    words = ["--steps", "3", "--variant", "distillation", "--teacher", teacher, "--divergence", divergence]
    for count in (1, 2):
        in_ranks(count, run, "grpo", str(tmp_path / str(count)), *words)
    check_same(tmp_path / "1", tmp_path / "2")


def head_of_the_trained() -> str:
    ranks.begin("cpu")
    try:
        with gathered_head(shard(tiny_model(64))):
            return "not refused"
    except ValueError as error:
        return str(error)


@pytest.mark.full
@pytest.mark.services
def test_the_head_of_what_is_trained_does_not_stay_gathered():
    assert all("only that of a frozen one stays so" in told for told in in_ranks(2, head_of_the_trained))
