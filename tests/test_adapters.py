"""LoRA and activation checkpointing: what is trained, kept and compared with, and the model that they make."""

from __future__ import annotations

import copy
import json
import re
import shutil

import pytest
import torch
import zoo
from recipe_runs import jsonl
from safetensors.torch import load_file
from torch.autograd.graph import saved_tensors_hooks

from torchrl_chat.learner.adapters import Reference, merged_weights, whole, with_lora
from torchrl_chat.learner.precision import compute_in
from torchrl_chat.learner.recomputing import recompute_activations
from torchrl_chat.models.passes import ModelError
from torchrl_chat.recipes import checkpoints as saving
from torchrl_chat.recipes import grpo
from torchrl_chat.tiny import tiny_model, tiny_tokenizer

IDS = torch.arange(12).reshape(1, 12) + 3


def adapted(seed: int = 0, **options):
    """A model with an adapter that does something."""
    model = with_lora(tiny_model(64, seed=0), 4, **options)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3, generator=draw)
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


class TestLoRA:
    def test_every_linear_layer_but_the_head_has_one_and_nothing_else_is_trained(self):
        model = adapted()
        trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
        assert all("lora_" in name for name in trained)
        layers = {n for n, m in tiny_model(64).named_modules() if isinstance(m, torch.nn.Linear)} - {"lm_head"}
        assert {name.split(".lora_")[0].removeprefix("base_model.model.") for name in trained} == layers
        assert not model.training

    def test_named_layers(self):
        trained = {n for n, w in adapted(targets="q_proj, v_proj").named_parameters() if w.requires_grad}
        assert {name.split(".lora_")[0].rsplit(".", 1)[1] for name in trained} == {"q_proj", "v_proj"}

    @pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mixtral", "deepseek_v3", "tied"])
    @pytest.mark.filterwarnings("ignore")
    def test_the_merged_weights_are_the_model_under_its_own_names(self, name):
        made = tiny_model(64) if name == "tied" else zoo.make(name)
        if name == "tied":
            made.lm_head.weight = made.model.embed_tokens.weight
        before = {key: value.clone() for key, value in made.state_dict().items()}
        plain = copy.deepcopy(made)
        model = with_lora(made, 4)
        with torch.no_grad():
            for key, weight in model.named_parameters():
                if "lora_B" in key:
                    weight.normal_(std=0.2)
        state = dict(merged_weights(model))
        once = {value.data_ptr(): key for key, value in reversed(plain.state_dict().items())}
        assert state.keys() == set(once.values())
        plain.load_state_dict(state, strict=False)
        assert torch.allclose(logits(plain), logits(model), atol=1e-4)
        assert torch.allclose(logits(whole(model)), logits(model), atol=1e-4)
        # The base has no rounding in it of weights that were added and taken off.
        with model.disable_adapter():
            plain.load_state_dict(before)
            assert torch.equal(logits(plain), logits(model))

    def test_an_adapter_of_one_end_of_a_tied_model_is_refused(self):
        model = tiny_model(64)
        model.lm_head.weight = model.model.embed_tokens.weight
        for targets in ("lm_head", "embed_tokens,q_proj"):
            with pytest.raises(ValueError, match="the head and the embeddings of LlamaForCausalLM are one matrix"):
                with_lora(copy.deepcopy(model), 2, targets=targets)
        assert with_lora(zoo.make("llama"), 2, targets="lm_head")

    def test_the_reference_is_what_is_under_it(self):
        model = adapted()
        with Reference(model).scoring() as before:
            assert torch.allclose(logits(before), logits(tiny_model(64, seed=0)), atol=1e-5)
        assert not torch.allclose(logits(model), logits(tiny_model(64, seed=0)), atol=1e-2)

    def test_a_checkpoint_holds_the_adapter_alone_and_gives_it_back(self, tmp_path):
        model, other = adapted(1), adapted(2)
        path = saving.save_checkpoint(tmp_path, 1, model, tiny_tokenizer(), {"step": 1})
        assert not (path / "model.safetensors").exists()
        assert (path / "adapter_model.safetensors").stat().st_size < 200_000
        saving.load_weights(path, other)
        assert torch.equal(logits(other), logits(model))

    def test_another_adapter_is_refused_and_the_model_is_as_it_was(self, tmp_path):
        path = saving.save_checkpoint(tmp_path, 1, adapted(1), tiny_tokenizer(), {})
        other = adapted(2, targets="q_proj")
        before = logits(other)
        with pytest.raises(saving.DamagedCheckpoint, match="the adapter in it is another one: base_model"):
            saving.load_weights(path, other)
        assert torch.equal(logits(other), before)

    def test_weights_that_are_no_numbers_are_neither_written_nor_read(self, tmp_path):
        model = adapted()
        path = saving.save_checkpoint(tmp_path, 1, model, tiny_tokenizer(), {})
        with torch.no_grad():
            next(weight for weight in model.parameters() if weight.requires_grad).fill_(torch.nan)
        with pytest.raises(saving.NotFiniteError, match="lora_A"):
            saving.save_checkpoint(tmp_path, 2, model, tiny_tokenizer(), {})
        from safetensors.torch import load_file, save_file

        weights = load_file(path / "adapter_model.safetensors")
        save_file(
            {name: weight * torch.nan for name, weight in weights.items()}, path / "adapter_model.safetensors"
        )
        with pytest.raises(saving.DamagedCheckpoint, match="holds a NaN"):
            saving.load_weights(path, adapted())

    def test_the_config_is_kept_beside_it(self, tmp_path):
        path = saving.save_checkpoint(tmp_path, 1, adapted(alpha=16), tiny_tokenizer(), {})
        assert json.loads((path / "adapter_config.json").read_text())["lora_alpha"] == 16


def saved_numbers(model) -> tuple[int, list[torch.Tensor]]:
    """How many numbers a pass keeps for its gradient, weights left out, and the gradients."""
    own, kept = {w.data_ptr() for w in model.parameters()}, {}

    def keep(tensor):
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    model.zero_grad()
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model.base_model(input_ids=IDS, use_cache=False).last_hidden_state.square().sum()
    count = sum(kept.values())
    loss.backward()
    return count, [w.grad.clone() for w in model.base_model.parameters() if w.grad is not None]


class TestQuantizedBase:
    @pytest.fixture(scope="class")
    def base(self, tmp_path_factory):
        """A model of the tiny kind whose linear layers have eight bits, in a folder."""
        pytest.importorskip("torchao")
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import AutoModelForCausalLM, TorchAoConfig

        tokenizer = tiny_tokenizer()
        whole, few = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("eight-bits")
        tiny_model(len(tokenizer), hidden=128).save_pretrained(whole)
        few_bits = TorchAoConfig(Int8WeightOnlyConfig())
        AutoModelForCausalLM.from_pretrained(whole, quantization_config=few_bits).save_pretrained(few)
        tokenizer.save_pretrained(few)
        return few

    @staticmethod
    def train(monkeypatch, *words):
        monkeypatch.setattr("sys.argv", ["grpo", *map(str, words)])
        grpo.main()

    def test_an_adapter_on_it_is_trained_and_goes_on(self, base, tmp_path, monkeypatch):
        """The reference of the KL divergence is what is under it, and checkpoints hold the adapter alone."""
        given = ["--model", base, "--dataset", "digits", "--lora", 4, "--kl", 0.1, "--lr", 1e-2, "--group-size", 4]
        given += ["--prompts", 4, "--eval", 4, "--max-new-tokens", 4, "--save-every", 1, "--steps", 3]
        self.train(monkeypatch, *given, "--out", tmp_path / "whole")
        rows = jsonl(tmp_path / "whole" / "metrics.jsonl")
        trained = [row for row in rows if "loss" in row]
        assert trained
        assert all(row["mismatch"] < 1e-5 for row in trained)  # what samples is what is trained
        last = saving.checkpoints(tmp_path / "whole" / "checkpoints")[-1]
        weights = load_file(last / "adapter_model.safetensors")
        assert any(weight.any() for name, weight in weights.items() if "lora_B" in name)
        assert sum(weight.numel() for weight in weights.values()) < 30_000
        shutil.copytree(tmp_path / "whole", tmp_path / "again")
        shutil.rmtree(saving.checkpoints(tmp_path / "again" / "checkpoints")[-1])
        self.train(monkeypatch, *given, "--out", tmp_path / "again", "--resume")
        again = load_file(saving.checkpoints(tmp_path / "again" / "checkpoints")[-1] / "adapter_model.safetensors")
        assert all(torch.equal(again[name], weight) for name, weight in weights.items())

    @pytest.mark.parametrize(
        ("words", "told"),
        [
            ((), "quantized: they cannot be trained. Give --lora 16"),
            (("--lora", 4, "--merge"), "quantized: --merge would quantize the sum with the adapter again"),
            (("--lora", 4, "--backend", "vllm"), "quantized: --backend vllm is sent whole weights"),
            (("--lora", 4), "quantized: they cannot lie in parts on several processes"),
        ],
    )
    def test_what_it_cannot_do_is_said_before_anything_is_done(self, words, told, base, tmp_path, monkeypatch):
        if "processes" in told:
            monkeypatch.setattr("torchrl_chat.ranks.count", lambda: 2)
        with pytest.raises(ValueError, match=re.escape(told)):
            self.train(monkeypatch, "--model", base, *words, "--out", tmp_path / "run")
        assert not (tmp_path / "run").exists()


class TestCheckpointing:
    @pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mamba", "opt"])
    @pytest.mark.filterwarnings("ignore")
    def test_gradients_are_the_same_and_less_is_kept(self, name):
        model = zoo.make(name)
        count, expected = saved_numbers(model)
        assert recompute_activations(model) == recompute_activations(model)
        few, found = saved_numbers(model)
        assert (
            few < (0.35 if name == "llama" else 0.5) * count
        )  # what is outside of layers is much of a small model
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, expected, strict=True))

    def test_it_is_on_in_eval_and_keeps_dropout_off(self):
        model = zoo.make("gpt2")
        for part in model.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.5
        count, expected = saved_numbers(model)
        recompute_activations(model)
        few, found = saved_numbers(model)
        assert few < 0.5 * count
        assert all(map(torch.equal, found, expected))

    def test_a_copy_is_of_its_own_weights(self):
        model = tiny_model(64)
        recompute_activations(model)
        other = copy.deepcopy(model)
        with torch.no_grad():
            for weight in model.parameters():
                weight.zero_()
        other.train()
        other(input_ids=IDS).logits.sum().backward()
        assert logits(other).abs().max() > 0
        assert all(weight.grad is None for weight in model.parameters())

    @pytest.mark.parametrize("name", ["gemma2", "mamba", "recurrent_gemma", "moshi", "roformer"])
    @pytest.mark.filterwarnings("ignore")
    def test_a_pass_that_keeps_a_cache_is_not_made_twice(self, name):
        """As a model is called by default, whose layers write into what the next tokens go on from."""
        plain, model = zoo.make(name), zoo.make(name)
        recompute_activations(model)
        found = []
        for each in (plain, model):
            each(input_ids=IDS).logits.square().sum().backward()
            found.append([p.grad for p in each.parameters() if p.grad is not None])
        assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(*found, strict=True))

    def test_models_are_pickled_with_what_is_in_front_of_them(self, tmp_path):
        model = compute_in(tiny_model(64), torch.bfloat16)
        recompute_activations(model)
        torch.save(model, tmp_path / "model.pt")
        again = torch.load(tmp_path / "model.pt", weights_only=False)
        assert torch.equal(logits(again), logits(model))
        assert logits(again).dtype == torch.bfloat16
        assert saved_numbers(again)[0] == saved_numbers(model)[0]

    def test_sampling_keeps_its_cache(self):
        model = tiny_model(64)
        recompute_activations(model)
        with torch.no_grad():
            assert model(input_ids=IDS, use_cache=True).past_key_values.get_seq_length() == 12

    def test_a_model_without_layers_is_refused_by_name(self):
        with pytest.raises(ModelError, match="Linear has no layers"):
            recompute_activations(torch.nn.Linear(2, 2))
