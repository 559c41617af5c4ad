"""PPO and expert iteration in several processes are those of one: gradients, values, whole runs, resumed on other numbers of them."""

from __future__ import annotations

import pytest
import torch
from in_ranks import in_ranks
from rank_runs import check_same, rows, run

from torchrl_chat import ranks
from torchrl_chat.learner import Counts, gathered, learn, shard, with_lora
from torchrl_chat.tiny import tiny_model
from torchrl_chat.training import importance_weights, whitened
from torchrl_chat.training.values import PolicyAndValue

pytestmark = pytest.mark.services
heavy = pytest.mark.full


def actor_critic_of(kind: str) -> PolicyAndValue:
    model = tiny_model(64, seed=3)
    torch.manual_seed(0)
    if kind == "lora":
        model = with_lora(model, 4)
    made = PolicyAndValue(model, "shared" if kind == "shared" else "separate")
    torch.nn.init.normal_(made.head.weight)
    return made.eval()


def loss_of(network: PolicyAndValue):
    def loss(part, counts: Counts):
        scores, values = network(part, entropy=True, share_prefixes=True)
        wished = (scores.log_probs.sum(-1) * part["advantage"]).sum() - 0.1 * scores.entropy.sum()
        error = ((values - part["advantage"][:, None]) * scores.mask).square().sum()
        return (0.3 * error - wished) / counts.tokens, {"error": error.detach()}

    return loss


# ---------------------------------------------------------------------- what runs in the processes
def gradients_beside_one(kind: str) -> float:
    """How far a gradient, or a value, is from that of one process, of its largest number."""
    ranks.begin("cpu")
    whole = rows(6)
    alone, parted = actor_critic_of(kind), shard(actor_critic_of(kind))
    counts = Counts(torch.tensor(10.0), torch.tensor(6.0))
    with torch.no_grad(), gathered(parted):
        values = parted(whole)[1]
    expected = alone(whole)[1]
    worst = float((values - expected).abs().max() / expected.abs().max())
    loss_of(alone)(whole, counts)[0].backward()
    loss_of(parted)(whole[ranks.own() :: ranks.count()], counts)[0].backward()
    found = {name: w.grad.full_tensor() for name, w in parted.named_parameters() if w.requires_grad}
    wanted = {name: w.grad for name, w in alone.named_parameters() if w.requires_grad}
    assert found.keys() == wanted.keys()
    return max(worst, *(float((found[n] - g).abs().max() / g.abs().max()) for n, g in wanted.items()))


def steps_of(sizes: list[int], kind: str, max_tokens: int) -> list[tuple[float, float]]:
    """Loss and norm of three steps, of processes with so many rows each."""
    ranks.begin("cpu")
    own = sum(sizes[: ranks.own()])
    view = rows(sum(sizes))[own : own + sizes[ranks.own()]]
    network = shard(actor_critic_of(kind))
    optimizer = torch.optim.SGD([w for w in network.parameters() if w.requires_grad], lr=0.1)
    told = [
        learn(optimizer, view, loss_of(network), minibatch=60, max_tokens=max_tokens, model=network)
        for _ in range(3)
    ]
    return [(each["loss"], each["grad_norm"]) for each in told]


def of_all_processes(count: int) -> tuple[list[list[float]], dict[str, float]]:
    """Whitened advantages of this process's rows, and figures of a correction, of parts that are unlike each other."""
    ranks.begin("cpu")
    draw = torch.Generator().manual_seed(0)
    values, mask = torch.randn(7, 5, generator=draw), torch.rand(7, 5, generator=draw) < 0.6
    own = slice(0, 7) if count == 1 else (slice(0, 5), slice(5, 7), slice(7, 7))[ranks.own()]
    scored = values.clone()
    scored[6] *= 9
    figures = importance_weights(scored[own], torch.zeros(7, 5)[own], mask[own])[1]
    values[2, 1] = torch.inf
    return whitened(values[own], mask[own]).tolist(), {name: float(value) for name, value in figures.items()}


# ---------------------------------------------------------------------- tests
@pytest.mark.parametrize("kind", ["separate", *(pytest.param(kind, marks=heavy) for kind in ("shared", "lora"))])
def test_gradients_of_a_policy_with_values_are_those_of_one_process(kind):
    assert max(in_ranks(2, gradients_beside_one, kind)) < 1e-5


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("separate", [5, 1]),
        pytest.param("shared", [6, 0, 3], marks=heavy),
        pytest.param("lora", [1, 4], marks=heavy),
    ],
)
def test_steps_of_a_policy_with_values_are_those_of_one_process(kind, sizes):
    """However many rows each has, and through however many passes they go: who has nothing left keeps in step with the others."""
    [expected] = in_ranks(1, steps_of, [sum(sizes)], kind, 30)
    for found in in_ranks(len(sizes), steps_of, sizes, kind, 30):
        assert found == [pytest.approx(each, rel=1e-4) for each in expected]


def test_advantages_and_figures_of_corrections_are_those_of_all_processes():
    """One of which has no rows."""
    [(expected, figures)] = in_ranks(1, of_all_processes, 1)
    parts, told = zip(*in_ranks(3, of_all_processes, 3), strict=True)
    assert torch.allclose(torch.tensor([row for part in parts for row in part]), torch.tensor(expected), atol=1e-6)
    assert set(figures) == {"mismatch", "mismatch_max", "mismatch_ess", "beyond"}
    assert list(told) == [pytest.approx(figures, rel=1e-5)] * 3


# So many that some are right: values that have nothing to learn go by rounding alone, which Adam makes as large as anything else.
PPO = ["--group_size", "1", "--prompts", "96", "--minibatch", "96", "--entropy", "0.02"]
RUNS = {
    "shared": ("ppo", [*PPO, "--kl", "0.05"]),
    "separate": ("ppo", [*PPO, "--trunk", "separate", "--max_tokens", "90"]),
    "lora": ("ppo", [*PPO, "--trunk", "separate", "--lora", "4", "--kl", "0.05", "--checkpointing"]),
    "imitated": ("expert_iteration", ["--max_new_tokens", "2"]),
    "restarted": ("expert_iteration", ["--restart", "--most", "1"]),
}


@heavy
@pytest.mark.parametrize("kind", RUNS)
def test_a_run_in_two_processes_is_that_of_one(tmp_path, kind):
    name, words = RUNS[kind]
    for count in (1, 2):
        in_ranks(count, run, name, str(tmp_path / str(count)), "--steps", "3", *words)
    check_same(tmp_path / "1", tmp_path / "2")


@heavy
@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [("shared", 2, 3), ("separate", 2, 1), ("separate", 1, 2), ("lora", 3, 2), ("lora", 2, 2), ("imitated", 2, 3)],
)
def test_a_run_goes_on_in_other_numbers_of_processes(tmp_path, kind, before, after):
    """The same episodes in the same order, and the curve of one process."""
    name, words = RUNS[kind]
    words = ["--steps", "4", *words]
    in_ranks(1, run, name, str(tmp_path / "one"), *words)
    in_ranks(before, run, name, str(tmp_path / "other"), *words)
    in_ranks(after, run, name, str(tmp_path / "other"), *words, "--resume", "--checkpoint", "2")
    check_same(tmp_path / "one", tmp_path / "other")
