"""Several processes learn what one would: gradients, steps, states, and whole runs, killed and resumed on other numbers of them."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from in_ranks import in_ranks
from rank_runs import QUICK, check_same, rows, run

from torchrl_chat import ranks
from torchrl_chat.learner import Counts, gathered, learn, recompute_activations, shard, whole, with_lora
from torchrl_chat.learner.sharding import (
    load_optimizer,
    save_optimizer,
    set_optimizer_state,
    set_weights,
    weights_of,
)
from torchrl_chat.recipes.grpo import main as grpo
from torchrl_chat.recipes.settings import RunConfig, parse
from torchrl_chat.tiny import tiny_model
from torchrl_chat.training import sequence_log_probs

pytestmark = pytest.mark.services
ROOT = Path(__file__).parents[1]


def model_of(kind: str):
    model = tiny_model(64, seed=3)
    if kind == "tied":
        model.lm_head.weight = model.model.embed_tokens.weight
    if kind == "checkpointing":
        recompute_activations(model)
    if kind == "lora":
        torch.manual_seed(0)
        model = with_lora(model, 4)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
    return model.eval()


def adam(model) -> torch.optim.Optimizer:
    return torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-2, betas=(0.9, 0.99))


def loss_of(model, share: bool):
    def loss(part, counts: Counts):
        scores = sequence_log_probs(model, part, entropy=True, share_prefixes=share, chunk=7)
        value = (scores.log_probs.sum(-1) * part["advantage"]).sum() / counts.tokens - 0.1 * (
            scores.entropy.sum() / counts.sequences
        )
        return value, {"entropy": scores.entropy.detach().mean()}

    return loss


# ---------------------------------------------------------------------- what runs in the processes
def learned_beside_one(kind: str, share: bool, sizes: list[int], max_tokens: int) -> float:
    """Three steps of all processes, which have so many rows each, beside the same of one; how far they are apart at most.

    Before each step everyone has a look at what the model says, which must be what it has learned so far.
    """
    ranks.begin("cpu")
    whole, own = rows(sum(sizes)), sum(sizes[: ranks.own()])
    alone, parted = model_of(kind), shard(model_of(kind))
    views = (whole, whole[own : own + sizes[ranks.own()]])
    worst, norms = 0.0, []
    # Not Adam, which makes steps of a rounding as large as of anything else.
    steps = [
        (model, torch.optim.SGD([w for w in model.parameters() if w.requires_grad], lr=0.5, momentum=0.9), view)
        for model, view in zip((alone, parted), views, strict=True)
    ]
    for _ in range(3):
        found = []
        for model, optimizer, view in steps:
            with torch.no_grad(), gathered(model):
                found.append(sequence_log_probs(model, whole).log_probs)
            settings = {"minibatch": 60, "max_tokens": max_tokens, "max_grad_norm": 0.5, "model": model}
            if model is alone:
                one = _in_one(optimizer, view, loss_of(model, share), max_tokens)
            else:
                told = learn(optimizer, view, loss_of(model, share), **settings)
        norms.append((one["grad_norm"], told["grad_norm"], one["loss"], told["loss"]))
        worst = max(worst, float((found[0] - found[1]).abs().max()))
    assert all(a == pytest.approx(b, rel=1e-4) and c == pytest.approx(d, rel=1e-4) for a, b, c, d in norms), norms
    weights = weights_of(parted)
    if ranks.leads():
        worst = max(worst, *(float((w - weights[name]).abs().max()) for name, w in alone.named_parameters()))
    return worst


def _in_one(optimizer, view, loss, max_tokens: int) -> dict[str, float]:
    """What one process learns, of which the others know nothing."""
    from torchrl_chat.learner import minibatches
    from torchrl_chat.training import updates

    class Alone:
        count, own, leads = staticmethod(lambda: 1), staticmethod(lambda: 0), staticmethod(lambda: True)
        total = most = staticmethod(lambda value: value)
        everywhere = staticmethod(lambda value: [value])

    kept = minibatches.ranks, updates.ranks
    minibatches.ranks = updates.ranks = Alone
    try:
        return learn(optimizer, view, loss, minibatch=60, max_tokens=max_tokens, max_grad_norm=0.5)
    finally:
        minibatches.ranks, updates.ranks = kept


def gradients_beside_one(kind: str) -> float:
    """How far a gradient is from that of one process, of its largest number."""
    ranks.begin("cpu")
    whole = rows(6)
    alone, parted = model_of(kind), shard(model_of(kind))
    counts = Counts(torch.tensor(10.0), torch.tensor(6.0))
    loss_of(alone, True)(whole, counts)[0].backward()
    loss_of(parted, True)(whole[ranks.own() :: ranks.count()], counts)[0].backward()
    found = {name: w.grad.full_tensor() for name, w in parted.named_parameters() if w.requires_grad}
    expected = {name: w.grad for name, w in alone.named_parameters() if w.requires_grad}
    assert found.keys() == expected.keys()
    assert all(w.grad is None for w in parted.parameters() if not w.requires_grad)
    return max(float((found[n] - g).abs().max() / g.abs().max()) for n, g in expected.items())


def merged_beside_one() -> dict[str, float]:
    """How far the weights of a model with its adapter merged are from those of one process, and what is left as it was."""
    ranks.begin("cpu")
    parted = shard(model_of("lora"))
    before = weights_of(parted)
    merged = whole(parted)
    after = weights_of(parted)
    assert all(torch.equal(before[name], weight) for name, weight in after.items())
    assert (merged is None) != ranks.leads()
    if merged is None:
        return {}
    expected = whole(model_of("lora")).state_dict()
    assert type(merged).__name__ == "LlamaForCausalLM"
    return {name: float((weight - expected[name]).abs().max()) for name, weight in merged.state_dict().items()}


def nothing_and_nonsense() -> list[dict[str, float]]:
    """A minibatch that nobody learns from; one whose loss is no number in one process; one that is right."""
    ranks.begin("cpu")
    model = shard(tiny_model(64, seed=3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = weights_of(model)
    view, settings = rows(4, seed=ranks.own()), {"minibatch": 8, "max_tokens": 30, "model": model}
    found = [learn(optimizer, view, loss_of(model, False), needed=torch.zeros(4, dtype=torch.bool), **settings)]
    bad = view.clone()
    if ranks.own() == 1:
        bad["advantage"][2] = torch.nan
    found.append(learn(optimizer, bad, loss_of(model, False), **settings))
    same = weights_of(model)
    assert all(torch.equal(before[name], same[name]) for name in before)
    few = view[:0] if ranks.own() == 0 else view  # the first has nothing
    found.append(learn(optimizer, few, loss_of(model, False), **settings))
    after = weights_of(model)
    assert not before or not torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    return found


def written(folder: str, kind: str, steps: int) -> None:
    """Some steps, a state, two steps more; what the weights are then."""
    ranks.begin("cpu")
    model = shard(model_of(kind))
    optimizer = adam(model)
    _steps(model, optimizer, steps)
    kept = weights_of(model) if ranks.count() > 1 else copy.deepcopy(model.state_dict())
    loss_of(model, True)(rows(6), Counts(torch.tensor(10.0), torch.tensor(6.0)))[0].backward()  # of no step
    save_optimizer(f"{folder}/parts", model, optimizer)
    if ranks.leads():
        torch.save(kept, f"{folder}/weights.pt")
        if ranks.count() == 1:
            torch.save(optimizer.state_dict(), f"{folder}/whole.pt")
    ranks.together()
    _steps(model, optimizer, 2)
    _keep(model, f"{folder}/after.pt")


def gone_on(folder: str, kind: str, whole: bool) -> None:
    """Two steps behind a state that others wrote."""
    ranks.begin("cpu")
    model = shard(model_of(kind))
    optimizer = adam(model)
    set_weights(model, torch.load(f"{folder}/weights.pt"))
    if not whole:
        load_optimizer(f"{folder}/parts", model, optimizer)
    elif ranks.count() == 1:
        optimizer.load_state_dict(torch.load(f"{folder}/whole.pt"))
    else:
        set_optimizer_state(optimizer, torch.load(f"{folder}/whole.pt"))
    _steps(model, optimizer, 2)
    _keep(model, f"{folder}/here.pt")


def _steps(model, optimizer, count: int) -> None:
    whole, counts = rows(6), Counts(torch.tensor(10.0), torch.tensor(6.0))
    for _ in range(count):
        optimizer.zero_grad()
        loss_of(model, True)(whole[ranks.own() :: ranks.count()], counts)[0].backward()
        optimizer.step()


def _keep(model, path: str) -> None:
    found = weights_of(model) if ranks.count() > 1 else model.state_dict()
    if ranks.leads():
        torch.save({name: found[name] for name, _ in model.named_parameters()}, path)
    ranks.together()


# ---------------------------------------------------------------------- tests
@pytest.mark.parametrize(
    "kind", ["tied", "lora", *(pytest.param(kind, marks=pytest.mark.full) for kind in ("plain", "checkpointing"))]
)
def test_gradients_are_those_of_one_process(kind):
    assert max(in_ranks(2, gradients_beside_one, kind)) < 1e-5


@pytest.mark.parametrize(
    ("kind", "share", "sizes", "max_tokens"),
    [
        pytest.param("plain", True, [3, 3], 10_000, marks=pytest.mark.full),
        ("tied", False, [5, 1], 30),
        pytest.param("checkpointing", True, [6, 0, 3], 40, marks=pytest.mark.full),
        pytest.param("lora", False, [2, 7], 20, marks=pytest.mark.full),
    ],
)
def test_steps_are_those_of_one_process(kind, share, sizes, max_tokens):
    """However many rows each has, and through however many passes they go."""
    assert in_ranks(len(sizes), learned_beside_one, kind, share, sizes, max_tokens)[0] < 1e-5


@pytest.mark.full
def test_an_adapter_is_merged_in_the_first_process():
    told, other = in_ranks(2, merged_beside_one)
    assert other == {}
    assert told.keys() == tiny_model(64).state_dict().keys()
    assert max(told.values()) < 1e-6


def test_steps_are_taken_by_all_or_by_none():
    found = in_ranks(2, nothing_and_nonsense)
    assert found[0] == found[1]
    idle, bad, right = found[0]
    assert idle == {"skipped": 0, "idle": 1.0, "trained_tokens": 0}
    assert bad["trained_tokens"] > 0
    assert bad | {"trained_tokens": 0} == {"skipped": 1, "idle": 0.0, "trained_tokens": 0}
    assert right["skipped"] == 0
    assert right["loss"] == right["loss"]


@pytest.mark.parametrize(
    ("kind", "steps", "before", "after"),
    [
        ("tied", 0, 2, 1),
        pytest.param("plain", 3, 2, 3, marks=pytest.mark.full),
        pytest.param("lora", 3, 2, 2, marks=pytest.mark.full),
        pytest.param("lora", 3, 3, 1, marks=pytest.mark.full),
        pytest.param("tied", 2, 3, 2, marks=pytest.mark.full),
    ],
)
def test_an_optimizer_goes_on_in_other_processes(tmp_path, kind, steps, before, after):
    """Also where it had not taken a step yet, and where gradients stood when it was written."""
    in_ranks(before, written, str(tmp_path), kind, steps)
    in_ranks(after, gone_on, str(tmp_path), kind, False)
    expected, found = (torch.load(tmp_path / f"{name}.pt") for name in ("after", "here"))
    assert max(float((found[name] - weight).abs().max()) for name, weight in expected.items()) < 1e-4


@pytest.mark.full
def test_the_state_of_one_process_is_parted(tmp_path):
    in_ranks(1, written, str(tmp_path), "plain", 3)
    in_ranks(2, gone_on, str(tmp_path), "plain", True)
    expected, found = (torch.load(tmp_path / f"{name}.pt") for name in ("after", "here"))
    assert max(float((found[name] - weight).abs().max()) for name, weight in expected.items()) < 1e-4


# ---------------------------------------------------------------------- whole runs
VARIANTS = {
    "grpo": ["--entropy", "0.02", "--max_tokens", "90"],
    "dapo": ["--variant", "dapo", "--kl", "0.05", "--correction", "tis", "--max_batches", "2"],
    "lora": [
        "--variant",
        "reinforce++",
        "--lora",
        "4",
        "--kl",
        "0.05",
        "--checkpointing",
        "--max_new_tokens",
        "2",
        "--merge",
    ],
}


@pytest.mark.parametrize(
    "name", ["dapo", *(pytest.param(name, marks=pytest.mark.full) for name in ("grpo", "lora"))]
)
@pytest.mark.by_day(2, place=1)
def test_a_run_in_two_processes_is_that_of_one(tmp_path, name):
    words = ["--steps", "3", *VARIANTS[name]]
    in_ranks(1, run, "grpo", str(tmp_path / "one"), *words)
    in_ranks(2, run, "grpo", str(tmp_path / "two"), *words)
    check_same(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(
    ("before", "after"),
    [(2, 1), *(pytest.param(*counts, marks=pytest.mark.full) for counts in ((2, 2), (2, 3), (1, 2), (3, 1)))],
)
@pytest.mark.by_day(2)
def test_a_run_goes_on_in_other_numbers_of_processes(tmp_path, before, after):
    """The same episodes in the same order, and the curve of one process."""
    words = ["--steps", "4", *VARIANTS["grpo"]]
    in_ranks(1, run, "grpo", str(tmp_path / "one"), *words)
    in_ranks(before, run, "grpo", str(tmp_path / "other"), *words)
    in_ranks(after, run, "grpo", str(tmp_path / "other"), *words, "--resume", "--checkpoint", "2")
    check_same(tmp_path / "one", tmp_path / "other")


@pytest.mark.full
def test_one_killed_process_ends_all_and_loses_nothing(tmp_path):
    """As torchrun starts them; with a sentence of ours, and none of the network's."""
    words = [*QUICK, "--steps", "60", *VARIANTS["grpo"]]
    in_ranks(1, run, "grpo", str(tmp_path / "one"), *words)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "torchrl_chat.cli.main", "train", *words, "--out", str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    metrics = tmp_path / "two" / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 5:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    victim = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()[-1]
    os.kill(int(victim), signal.SIGKILL)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "since another has gone or stands still: start the run again with --resume" in said
    assert "gloo" not in said
    subprocess.run([*command, "--resume"], check=True, env=environment, cwd=ROOT, capture_output=True)
    check_same(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "--prompts is 16: expected a multiple of the 3 processes, 18 say."),
        (["--prompts", "6"], "--minibatch is 64: expected a multiple of the 3 processes, 66 say."),
        (
            ["--prompts", "6", "--minibatch", "6", "--eval", "2"],
            "--eval is 2: expected at least a question for each",
        ),
    ],
)
def test_what_several_processes_cannot_do_is_refused(monkeypatch, capsys, words, told):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit):
        grpo(words, "grpo")
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "gpus", "local", "beside", "expected"),
    [
        (None, 8, 3, 8, "cuda:3"),
        ("cuda", 8, 0, 2, "cuda:0"),
        ("cpu", 8, 3, 8, "cpu"),
        (None, 0, 1, 4, "cpu"),
        ("cuda:1", 2, 0, None, "cuda:1"),
        ("cuda:1", 2, 0, 2, "--device cuda:1: each of the 2 processes has a GPU of its own: give --device cuda."),
        (None, 1, 0, 2, "torchrun started 2 processes here, and there are 1 GPUs: start one for each"),
    ],
)
def test_each_process_has_a_device_of_its_own(asked, gpus, local, beside, expected):
    """What it is, no GPU being asked: NCCL itself runs nowhere here."""
    if " " in expected:
        with pytest.raises(ValueError, match=expected):
            ranks.device_of(asked, gpus, local, beside)
        return
    device = ranks.device_of(asked, gpus, local, beside)
    assert str(device) == expected
    assert ranks.backend_of(device) == ("cpu:gloo,cuda:nccl" if "cuda" in expected else "gloo")


def test_a_script_for_one_process_says_so(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        parse(RunConfig, None, arguments=[])
    assert "torchrun started 2 processes, and this script runs in one" in capsys.readouterr().err


def _refused(kind: str) -> str:
    ranks.begin("cpu")
    model = tiny_model(64)
    try:
        if kind == "layers":
            model.model.layers = torch.nn.ModuleList()
        if kind != "unsharded":
            shard(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        learn(
            optimizer,
            rows(2),
            loss_of(model, False),
            minibatch=3 if kind == "minibatch" else 2,
            max_tokens=9,
            model=model,
        )
    except ValueError as error:
        return str(error)
    return "not refused"


@pytest.mark.full
@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("unsharded", "2 processes learn together: give model=shard(model)."),
        ("minibatch", "minibatch=3: expected a multiple of the 2 processes."),
        ("layers", "LlamaForCausalLM has no layers that are known here"),
    ],
)
def test_refusals_of_the_learner(kind, told):
    for said in in_ranks(2, _refused, kind):
        assert told in said
