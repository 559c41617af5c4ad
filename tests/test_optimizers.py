"""AdamW in its kinds: each takes AdamW's steps, with as much state as it says, and goes on from what was written of it."""

from __future__ import annotations

import copy
import json
import sys

import pytest
import torch
from in_ranks import in_ranks
from rank_runs import rows, run
from recipe_runs import same_run, script

from torchrl_chat import ranks
from torchrl_chat.envs import load_state, save_state
from torchrl_chat.learner import OffloadedAdamW, make_adamw, set_rate, shard
from torchrl_chat.learner.sharding import (
    load_optimizer,
    save_optimizer,
    set_optimizer_state,
    set_weights,
    weights_of,
)
from torchrl_chat.recipes.settings import parse
from torchrl_chat.tiny import tiny_model
from torchrl_chat.training import sequence_log_probs
from torchrl_chat.training.updates import not_finite

GIVEN = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.01}


@pytest.fixture
def plainly():
    """torchao's step as it is written, without half a minute of compiling."""
    with torch.compiler.set_stance("force_eager"):
        yield


def eight_bits(weights, **given):
    from torchrl_chat.learner.eight_bits import AdamW8bit

    return AdamW8bit(weights, **{**GIVEN, **given})


def stepped(model, optimizer, count: int, begin: int = 0) -> None:
    """Some steps on rows that are the steps' own, with a learning rate that falls."""
    for step in range(begin, begin + count):
        set_rate(optimizer, 1e-3 / (1 + step))
        optimizer.zero_grad()
        (
            -sequence_log_probs(model, rows(6, seed=step)[ranks.own() :: ranks.count()]).log_probs.sum() / 30
        ).backward()
        optimizer.step()


def apart(one, other) -> float:
    return max(
        float((a - b).detach().abs().max()) for a, b in zip(one.parameters(), other.parameters(), strict=True)
    )


def made(kind: str):
    model = tiny_model(64, hidden=128, seed=3)
    return model, {"offload": OffloadedAdamW, "8bit": eight_bits}[kind](model.parameters(), **GIVEN)


@pytest.mark.parametrize("kind", ["offload", "8bit"])
@pytest.mark.usefixtures("plainly")
class TestKinds:
    def test_steps_are_those_of_adamw(self, kind):
        model, optimizer = made(kind)
        expected, begun = copy.deepcopy(model), copy.deepcopy(model)
        stepped(model, optimizer, 4)
        stepped(expected, torch.optim.AdamW(expected.parameters(), **GIVEN), 4)

        def far(one) -> float:
            pairs = zip(one.parameters(), expected.parameters(), strict=True)
            return sum(float((a - b).detach().square().sum()) for a, b in pairs) ** 0.5

        assert far(model) / far(begun) < (1e-4 if kind == "offload" else 0.02)
        # Not a single weight is where no AdamW would have brought it: tokens are in a batch, and not in the next one.
        assert apart(model, expected) < 1e-3 * sum(2.4 / (1 + step) for step in range(4))

    def test_what_was_written_goes_on_to_the_bit(self, kind, tmp_path):
        model, optimizer = made(kind)
        stepped(model, optimizer, 2)
        save_state(tmp_path / "state.pt", {"optimizer": optimizer.state_dict(), "model": model.state_dict()})
        stepped(model, optimizer, 2, begin=2)
        state = load_state(tmp_path / "state.pt", "cpu")
        other, again = made(kind)
        other.load_state_dict(state["model"])
        again.load_state_dict(state["optimizer"])
        stepped(other, again, 2, begin=2)
        assert apart(model, other) == 0

    def test_a_number_of_a_state_that_is_none_is_found(self, kind):
        model, optimizer = made(kind)
        stepped(model, optimizer, 1)
        assert not_finite(optimizer.state_dict()) is None
        stepped_state = optimizer.state[model.lm_head.weight]["exp_avg"]
        (stepped_state.scale if kind == "8bit" else stepped_state)[3] = torch.nan
        assert "exp_avg" in not_finite(optimizer.state_dict())


@pytest.mark.usefixtures("plainly")
def test_two_bytes_of_state_a_weight():
    weight = torch.nn.Parameter(torch.randn(256, 512))
    optimizer = eight_bits([weight])
    weight.sum().backward()
    optimizer.step()
    size = 0
    for moment in (optimizer.state[weight][name] for name in ("exp_avg", "exp_avg_sq")):
        size += sum(getattr(moment, part).nbytes for part in ("codes", "scale"))
    assert 2 < size / weight.numel() < 2.1


@pytest.mark.usefixtures("plainly")
def test_updates_below_the_rounding_of_bfloat16_are_kept_on_average():
    """100 updates of 1e-5 are a quarter of the spacing of numbers below 1."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.ones(16384, dtype=torch.bfloat16))
    plain = torch.nn.Parameter(weight.detach().clone())
    optimizers = (
        eight_bits([weight], weight_decay=0.0, lr=1e-5, bf16_stochastic_round=True),
        torch.optim.AdamW([plain], lr=1e-5, weight_decay=0.0),
    )
    for each, optimizer in zip((weight, plain), optimizers, strict=True):
        each.grad = torch.ones_like(each)
        for _ in range(100):
            optimizer.step()
    assert weight.detach().float().mean().item() == pytest.approx(0.999, abs=1e-4)
    assert plain.detach().float().mean().item() == 1


class TestRefused:
    def test_weights_that_would_lose_updates(self):
        weight = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
        for kind in ("adamw", "adamw-offload"):
            with pytest.raises(
                ValueError, match=f"optimizer {kind} with weights in bfloat16: updates .* are smaller"
            ):
                make_adamw([weight], 1e-5, kind)

    def test_states_that_are_on_the_cpu_anyway(self):
        with pytest.raises(ValueError, match="on the CPU, where the weights are, too: give --optimizer adamw"):
            make_adamw(tiny_model(64).parameters(), 1e-5, "adamw-offload")

    def test_another_kind(self):
        with pytest.raises(ValueError, match="optimizer 'sgd': expected adamw, adamw-8bit or adamw-offload"):
            make_adamw(tiny_model(64).parameters(), 1e-5, "sgd")

    def test_what_is_missing_is_named(self, monkeypatch):
        from torch._inductor import cpp_builder
        from torch._inductor.exc import InvalidCxxCompiler

        def none() -> str:
            raise InvalidCxxCompiler

        monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
        with pytest.raises(RuntimeError, match=r"finds no C\+\+ compiler: install g\+\+"):
            make_adamw(tiny_model(64).parameters(), 1e-5, "adamw-8bit")
        monkeypatch.delitem(sys.modules, "torchrl_chat.learner.eight_bits", raising=False)
        monkeypatch.setitem(sys.modules, "torchao.optim", None)
        with pytest.raises(ImportError, match=r"pip install 'torchrl_chat\[torchao\]'"):
            make_adamw(tiny_model(64).parameters(), 1e-5, "adamw-8bit")

    @pytest.mark.parametrize(
        ("words", "processes", "named"),
        [
            ("--dtype bfloat16-pure", 1, "Give --optimizer adamw-8bit, which rounds up or down by chance"),
            ("--dtype bfloat16-pure --optimizer adamw-8bit", 2, "--dtype bfloat16-pure is for one process"),
            ("--optimizer adamw-offload", 2, "--optimizer adamw-offload is for one process"),
        ],
    )
    def test_settings_that_do_not_go_together(self, words, processes, named, monkeypatch, capsys):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        module = script("grpo")
        with pytest.raises(SystemExit):
            parse(module.GRPOConfig, None, module.defaults, words.split())
        assert named in " ".join(capsys.readouterr().err.split())


# ---------------------------------------------------------------------- in several processes
def written(folder: str) -> None:
    """Some steps, a state, two steps more, and what the weights are then."""
    torch.compiler.set_stance("force_eager")
    ranks.begin("cpu")
    model = shard(tiny_model(64, hidden=128, seed=3))
    optimizer = eight_bits(model.parameters())
    stepped(model, optimizer, 3)
    weights = weights_of(model)
    save_optimizer(f"{folder}/parts", model, optimizer)
    if ranks.leads():
        torch.save(weights, f"{folder}/weights.pt")
        save_state(f"{folder}/whole.pt", optimizer.state_dict() if ranks.count() == 1 else {})
    ranks.together()
    stepped(model, optimizer, 2, begin=3)
    _keep(model, f"{folder}/after.pt")


def gone_on(folder: str, whole: bool) -> None:
    torch.compiler.set_stance("force_eager")
    ranks.begin("cpu")
    model = shard(tiny_model(64, hidden=128, seed=3))
    optimizer = eight_bits(model.parameters())
    set_weights(model, torch.load(f"{folder}/weights.pt"))
    if whole:
        set_optimizer_state(optimizer, load_state(f"{folder}/whole.pt"))
    else:
        load_optimizer(f"{folder}/parts", model, optimizer)
    stepped(model, optimizer, 2, begin=3)
    _keep(model, f"{folder}/here.pt")


def _keep(model, path: str) -> None:
    weights = weights_of(model)
    if ranks.leads():
        torch.save(weights, path)
    ranks.together()


def compiled_beside_whole() -> tuple[float, int]:
    """How far compiled steps of weights in parts are from plain ones of whole weights; and how many were compiled."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    ranks.begin("cpu")
    mesh = init_device_mesh("cpu", (ranks.count(),))

    def parted(value):
        return distribute_tensor(value, mesh, [Shard(0)])

    draw = torch.Generator().manual_seed(0)
    # In 8 bits, in blocks that each lie in one part; in float32; and a row, which all but the first have no part of.
    values = [torch.randn(shape, generator=draw) for shape in ((64, 128), (6, 5), (1, 300))]
    gradients = [[torch.randn(value.shape, generator=draw) for value in values] for _ in range(3)]
    found = []
    for stance, place in (("force_eager", torch.clone), ("default", parted)):
        torch.compiler.set_stance(stance)
        torch._dynamo.utils.counters.clear()
        weights = [torch.nn.Parameter(place(value)) for value in values]
        optimizer = eight_bits(weights)
        for step in gradients:
            for weight, gradient in zip(weights, step, strict=True):
                weight.grad = place(gradient)
            optimizer.step()
        found.append([w.detach().full_tensor() if place is parted else w.detach() for w in weights])
    apart = max(float((one - other).abs().max()) for one, other in zip(*found, strict=True))
    return apart, torch._dynamo.utils.counters["stats"]["unique_graphs"]


def bfloat16_in_parts() -> str:
    ranks.begin("cpu")
    try:
        make_adamw(shard(tiny_model(64).to(torch.bfloat16)).parameters(), 1e-5, "adamw-8bit")
    except ValueError as error:
        return str(error)
    return "not refused"


@pytest.mark.full
@pytest.mark.timeout(1500)
class TestSeveralProcesses:
    @pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 2), (3, 2), (2, 3)])
    def test_a_state_goes_on(self, tmp_path, before, after):
        """To the bit in as many; in others the moments are put into blocks anew."""
        in_ranks(before, written, str(tmp_path))
        in_ranks(after, gone_on, str(tmp_path), before == 1)
        expected, found, begun = (torch.load(tmp_path / f"{name}.pt") for name in ("after", "here", "weights"))

        def far(one) -> tuple[float, float]:
            apart = torch.cat([(one[name] - weight).flatten() for name, weight in expected.items()])
            return float(apart.norm()), float(apart.abs().max())

        (all_of_it, most), (way, _) = far(found), far(begun)
        assert all_of_it <= (0 if before == after else 0.05 * way)
        assert most <= 2 * 2.4 * (1e-3 / 4 + 1e-3 / 5)

    def test_steps_are_compiled(self):
        (apart, graphs), (apart_there, fewer) = in_ranks(2, compiled_beside_whole, timeout=900)
        assert (graphs, fewer) == (3, 2)
        assert max(apart, apart_there) < 1e-6

    def test_bfloat16_in_parts_is_refused(self):
        assert all("would be summed in bfloat16" in told for told in in_ranks(2, bfloat16_in_parts))


# ---------------------------------------------------------------------- runs
@pytest.mark.full
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    "words", [["--optimizer", "adamw-8bit"], ["--optimizer", "adamw-8bit", "--dtype", "bfloat16-pure"]]
)
def test_a_run_goes_on_as_if_nothing_had_been(tmp_path, words):
    """Compiled, as a user has it; what is rounded by chance is rounded as it would have been."""
    words = ["--steps", "4", *words]
    in_ranks(1, run, "grpo", str(tmp_path / "one"), *words, timeout=700)
    in_ranks(1, run, "grpo", str(tmp_path / "other"), *words, timeout=700)
    in_ranks(1, run, "grpo", str(tmp_path / "other"), *words, "--resume", "--checkpoint", "2", timeout=700)
    same_run(tmp_path / "one", tmp_path / "other")
    assert json.loads((tmp_path / "one" / "config.json").read_text())["optimizer"] == "adamw-8bit"
