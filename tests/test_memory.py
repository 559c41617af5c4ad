"""How many tokens go through a model at a time: an estimate that is held against what autograd keeps."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from run_books import example, jsonl, words
from tensordict import TensorDict

from torchrl_chat.learner import bytes_per_token, compute_in, free_memory, memory, recompute_activations, room_for
from torchrl_chat.recipes.settings import RunConfig
from torchrl_chat.recipes.tasks import make_model, make_optimizer, settle_tokens
from torchrl_chat.tiny import tiny_model
from torchrl_chat.training import microbatches, sequence_log_probs
from torchrl_chat.training.values import PolicyAndValue

SMALL = {"hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 6, "num_key_value_heads": 2}
KINDS = {
    "llama": SMALL,
    "qwen3": SMALL | {"head_dim": 32},
    "gemma3_text": SMALL | {"head_dim": 32, "sliding_window": 4096},
    "olmo2": SMALL | {"num_key_value_heads": 6},
    "gpt2": {"n_embd": 96, "n_head": 6},
}


def model_of(kind, layers=2):
    from transformers import AutoConfig, AutoModelForCausalLM

    name = "n_layer" if kind == "gpt2" else "num_hidden_layers"
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(kind, vocab_size=64, **{name: layers}, **ids, **KINDS[kind])
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").float().eval()


def kept(model, width):
    """Bytes that autograd keeps of a pass over two rows, but for weights."""
    weights = {weight.untyped_storage().data_ptr() for weight in (*model.parameters(), *model.buffers())}
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = tensor, storage.nbytes()
        return tensor

    whole = torch.ones(2, width).bool()
    fields = {
        "tokens": TensorDict(full=torch.randint(3, 60, (2, width)), batch_size=(2,)),
        "masks": TensorDict(all_assistant_mask=whole, all_attention_mask=whole, batch_size=(2,)),
        "position_ids": torch.arange(width).expand(2, width),
    }
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        scores = sequence_log_probs(model, TensorDict(fields, batch_size=(2,)))
    assert scores.log_probs.requires_grad
    return sum(size for _, size in seen.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_estimate_is_a_bound_and_not_a_wide_one(kind, dtype):
    model = compute_in(model_of(kind), dtype)
    kept(model, 16)  # what is made once (the model's proof) is no token's
    measured = (kept(model, 96) - kept(model, 32)) / 128
    assert measured <= bytes_per_token(model) < 1.75 * measured


def test_recomputed_layers_keep_their_input():
    model, deeper = model_of("llama", 4), model_of("llama", 8)
    whole = bytes_per_token(model)
    for each in (model, deeper):
        recompute_activations(each)
        kept(each, 16)
    measured = (kept(model, 96) - kept(model, 32)) / 128
    assert measured <= bytes_per_token(model) < 0.5 * whole
    one = whole / 4  # layer, which is computed again at a time
    assert bytes_per_token(model) - measured < 1.5 * one
    grown = (kept(deeper, 96) - kept(deeper, 32)) / 128 - measured
    assert bytes_per_token(deeper) - bytes_per_token(model) == pytest.approx(grown, rel=0.01)


@pytest.mark.parametrize(
    "more",
    [{"hidden_size": 192}, {"intermediate_size": 512}, {"num_key_value_heads": 6}, {"head_dim": 32}, {"layers": 3}],
)
def test_more_of_anything_takes_more(more, monkeypatch):
    least, shape = bytes_per_token(model_of("llama")), dict(more)
    layers = shape.pop("layers", 2)
    monkeypatch.setitem(KINDS, "llama", SMALL | shape)
    assert bytes_per_token(model_of("llama", layers)) > least


def test_other_shapes_have_an_estimate_too():
    """Without attention, of several experts, of layers that differ."""
    from transformers import MambaConfig, MambaForCausalLM, MixtralConfig, MixtralForCausalLM

    assert bytes_per_token(MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2))) > 0
    mixed = MixtralForCausalLM(MixtralConfig(vocab_size=64, num_hidden_layers=2, num_local_experts=2, **SMALL))
    assert bytes_per_token(mixed) > bytes_per_token(model_of("llama"))
    model = model_of("llama")
    whole = bytes_per_token(model)
    model.config.__dict__["intermediate_size"] = [64, model.config.intermediate_size]  # as some families have it
    assert bytes_per_token(model) == whole


GIB = 2**30
ROOM = int(0.55 * GIB)  # some of it for tokens, behind the chunks of the head


def test_what_fits():
    model = model_of("llama", 4)
    found = [room_for(model, model, free=free).tokens for free in (0, GIB // 2, ROOM, GIB, 10 * GIB, 10**15)]
    assert found == sorted(found)
    assert found[0] == 1
    assert found[-1] == memory.MOST
    assert 1 < found[2] < memory.MOST
    assert room_for(model, model, free=ROOM, reserved=GIB // 50).tokens < found[2]
    assert room_for(model, model, free=0, least=512).tokens == 512
    critic = PolicyAndValue(model, "separate")
    assert room_for(critic, model, free=ROOM).tokens < 0.7 * found[2]
    for weight in model.parameters():
        weight.requires_grad_(False)  # no gradients, no states
    assert room_for(model, model, free=ROOM).tokens > found[2]
    recompute_activations(model)
    assert room_for(model, model, free=ROOM).tokens > 1.5 * found[2]
    assert "MiB each" in str(room_for(model, model, free=GIB))


def test_a_row_that_is_longer_than_what_fits_goes_alone():
    lengths = [3, 40, 7, 12]
    masks = [torch.arange(40) < length for length in lengths]
    view = TensorDict(
        masks=TensorDict(
            all_assistant_mask=torch.stack(masks), all_attention_mask=torch.stack(masks), batch_size=(4,)
        ),
        batch_size=(4,),
    )
    groups = [rows.tolist() for rows in microbatches(view, 15)]
    assert sorted(row for rows in groups for row in rows) == [0, 1, 2, 3]
    assert [1] in groups


class TestWhatIsFree:
    def test_of_this_machine(self):
        assert 0 < free_memory(torch.device("cpu")) < 2**50

    def test_processes_of_a_machine_share_it(self, monkeypatch):
        monkeypatch.setattr(memory, "_available", lambda: 12 * GIB)
        monkeypatch.setattr(memory, "_of_container", lambda: 8 * GIB)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
        assert free_memory(torch.device("cpu")) == 2 * GIB

    def test_where_nobody_says(self, monkeypatch):
        monkeypatch.setattr(memory, "_available", lambda: None)
        monkeypatch.setattr(memory, "_of_container", lambda: None)
        model = tiny_model(64)
        assert free_memory(torch.device("cpu")) is None
        assert room_for(model, model).tokens == memory.MOST


class TestRuns:
    def test_it_is_said_at_the_start_and_kept_by_a_run_that_goes_on(self, tmp_path, monkeypatch, capsys):
        module = example("grpo")
        monkeypatch.setattr(sys, "argv", words("grpo", "--out", str(tmp_path), "--resume", "--steps", "1"))
        monkeypatch.setattr(memory, "free_memory", lambda device: ROOM)
        module.main()
        told = json.loads((tmp_path / "config.json").read_text())["max_tokens"]
        assert 1 < told < memory.MOST
        assert f"{told:,} tokens at a time" in capsys.readouterr().out
        monkeypatch.setattr(memory, "free_memory", lambda device: GIB // 2 + GIB // 9)
        monkeypatch.setattr(sys, "argv", words("grpo", "--out", str(tmp_path), "--resume", "--steps", "2"))
        module.main()
        assert json.loads((tmp_path / "config.json").read_text())["max_tokens"] == told
        assert len(jsonl(tmp_path / "metrics.jsonl")) == 2

    def test_what_was_asked_for_goes_through(self, monkeypatch):
        monkeypatch.setattr(memory, "free_memory", lambda device: 0)
        settings = RunConfig(max_new_tokens=300)
        model, _ = make_model(settings)
        settle_tokens(settings, model)
        assert settings.max_tokens == 300
        given = RunConfig(max_tokens=7)
        make_optimizer(given, model)
        assert given.max_tokens == 7
