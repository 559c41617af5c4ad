"""The training scripts: settings, books, checkpoints, and a run that is killed and goes on."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from recipe_runs import QUICK, RECIPES, jsonl, run_killed, same_run, script
from tensordict import TensorDict

from torchrl_chat.recipes import checkpoints as saving
from torchrl_chat.recipes.grpo import GRPOConfig, needed
from torchrl_chat.recipes.run import Run, episodes
from torchrl_chat.recipes.settings import FULL, RunConfig, parse
from torchrl_chat.recipes.tasks import ask, demonstrations, make_env, make_model, make_policy, warm_start
from torchrl_chat.rollouts import read_rollouts
from torchrl_chat.tiny import tiny_model, tiny_tokenizer
from torchrl_chat.training import masked_mean, sequence_log_probs, training_view
from torchrl_chat.training.values import PolicyAndValue

pytestmark = pytest.mark.services


def config(folder: Path, **options) -> RunConfig:
    return RunConfig(
        **{"out": str(folder), "steps": 4, "prompts": 2, "group_size": 2, "save_every": 2, "eval": 4, **options}
    )


def books(folder: Path, **options) -> Run:
    """A run of a small model and an optimizer, which learns nothing of itself."""
    settings = config(folder, **options)
    model, tokenizer = make_model(settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return Run(settings, "test", model=model, tokenizer=tokenizer, state={"optimizer": optimizer})


def evaluation():
    """One conversation, finished."""
    settings = RunConfig()
    model, tokenizer = make_model(settings)
    policy, _ = make_policy(settings, model, tokenizer)
    return ask(make_env(settings, tokenizer, 1, 1, 0), policy, settings)


def nudge(run: Run, step: int) -> None:
    """An update that depends on the step's random numbers."""
    # Of an adapter the second matrix: it begins with zeros, so that nothing comes of the first.
    trained = {name: weight for name, weight in run.model.named_parameters() if weight.requires_grad}
    parameter = next((w for name, w in trained.items() if "lora_B" in name), next(iter(trained.values())))
    parameter.grad = torch.randn(parameter.shape)
    run.state["optimizer"].step()
    run.log({"loss": parameter.sum().item()})


class TestSettings:
    def test_defaults_depend_on_the_model_and_the_variant(self):
        module = script("grpo")

        def read(*words: str):
            return parse(module.GRPOConfig, None, module.defaults, words)

        assert (read().lr, read().entropy) == (7e-4, 0.05)
        assert read("--model", "a/b").lr == FULL["lr"]
        assert read("--model", "a/b", "--lr", "1e-5").lr == 1e-5
        dapo = read("--variant", "dapo", "--model", "a/b", "--dataset", "gsm8k")
        assert (dapo.clip_high, dapo.aggregation, dapo.dynamic_sampling, dapo.overlong) == (
            0.28,
            "token",
            True,
            128,
        )
        assert read("--variant", "dapo", "--aggregation", "sequence").aggregation == "sequence"
        for tokens in (64, 2048):
            assert (
                read("--variant", "dapo", "--model", "a/b", "--max_new_tokens", str(tokens)).overlong == tokens // 4
            )
        assert read("--variant", "dr-grpo").normalize == "none"
        assert (read("--variant", "rloo").normalize, read("--variant", "rloo").leave_one_out) == ("none", True)
        gspo = read("--variant", "gspo")
        assert (gspo.surrogate, gspo.clip, gspo.clip_high) == ("gspo", 3e-4, 4e-4)
        assert read("--variant", "gspo", "--clip", "0.1").clip == 0.1
        assert read("--lora", "8").lr == pytest.approx(10 * read().lr)
        assert read("--lora", "8", "--model", "a/b", "--lr", "3e-5").lr == 3e-5
        assert (read("--variant", "gspo", "--surrogate", "ppo").bounds) == (0.2, 0.2)
        assert read("--surrogate", "reinforce").bounds is None
        assert read("--surrogate", "gmpo").bounds == (0.4, 0.4)
        assert read("--variant", "gspo", "--surrogate", "cispo").bounds == (1.0, 4.0)
        assert read("--dataset", "python-tool").warm_steps > 0

    def test_an_answer_is_as_long_as_its_run_of_sampled_tokens(self):
        mask = torch.tensor(
            [[1, 1, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 0, 0, 1]]
        ).bool()
        assert script("grpo").longest_answers(mask).tolist() == [3, 0, 7, 1]

    @pytest.mark.parametrize(
        ("words", "named"),
        [
            (["--stepz", "3"], "stepz"),
            (["--steps", "0"], "--steps is 0"),
            (["--eval", "0"], "--eval is 0: expected at least 1"),
            (["--max_tokens", "0"], "--max-tokens is 0: expected at least 1"),
            (["--max_new_tokens", "0"], "--max-new-tokens is 0"),
            (["--max_turns", "0"], "--max-turns is 0"),
            (["--show_every", "-1"], "--show-every is -1: expected at least 0"),
            (["--temperature", "0"], "--temperature is 0"),
            (["--lora", "-1"], "--lora is -1: expected at least 0"),
            (["--merge"], "--merge is of the adapter of --lora"),
            (["--lora_targets", "q_proj"], "--lora-targets is of the adapter of --lora"),
            (["--backend", "magic"], "magic"),
            (["--lr", "fast"], "fast"),
        ],
    )
    def test_bad_words_are_named(self, words, named, capsys):
        with pytest.raises(SystemExit):
            parse(RunConfig, None, arguments=words)
        assert named in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("words", "named"),
        [
            ("--clip 1.0", "--clip 1.0 --clip-high 0.2: clip=(1.0, 0.2) for surrogate='ppo'"),
            ("--surrogate reinforce --clip 0.1", "has no ratio that --clip or --clip-high could bound"),
            ("--variant maxrl --overlong 4", "--overlong makes rewards negative"),
            ("--dataset python-tool --lora 4 --kl 0.1", "give --kl 0 or --warm-steps 0"),
        ],
    )
    def test_what_does_not_go_together_is_named(self, words, named, capsys):
        module = script("grpo")
        with pytest.raises(SystemExit):
            parse(module.GRPOConfig, None, module.defaults, words.split())
        assert named in " ".join(capsys.readouterr().err.split())

    @pytest.mark.parametrize(("name", "setting"), [("grpo", "max_batches"), ("expert_iteration", "most")])
    def test_bad_words_of_one_script_are_named(self, name, setting, capsys, monkeypatch):
        monkeypatch.setattr(sys, "argv", [name, f"--{setting}", "-1"])
        with pytest.raises(SystemExit):
            script(name).main()
        assert (
            f"--{setting.replace('_', '-')} is -1: expected at least {int(name == 'grpo')}"
            in capsys.readouterr().err
        )

    @pytest.mark.parametrize("name", RECIPES)
    def test_help_tells_the_defaults_of_what_is_asked_for(self, name, capsys, monkeypatch):
        module = script(name)
        monkeypatch.setattr(sys, "argv", [name, "--model", "some/model", "--dataset", "gsm8k", "--help"])
        with pytest.raises(SystemExit) as end:
            module.main()
        shown = capsys.readouterr().out
        assert end.value.code == 0
        assert module.__doc__.strip().splitlines()[0] in shown
        assert "where an answer is cut (default: 512)" in " ".join(shown.split())

    def test_a_dataset_that_is_not_there(self, tmp_path):
        with pytest.raises(ValueError, match="'digit': expected digits, sums, python-tool"):
            make_env(config(tmp_path, dataset="digit"), tiny_tokenizer(), 1, 1, 0)

    def test_a_dataset_that_makes_its_own_rows_takes_no_data(self, tmp_path):
        settings = config(tmp_path, dataset="reasoning-gym:basic_arithmetic", data="mine.jsonl")
        with pytest.raises(ValueError, match=r"data='mine\.jsonl': reasoning-gym:basic_arithmetic makes"):
            make_env(settings, tiny_tokenizer(), 1, 1, 0)

    @pytest.mark.parametrize(
        ("dtype", "gpu", "told"), [("auto", False, None), ("auto", True, "auto"), ("float32", False, "float32")]
    )
    def test_the_dtype_of_vllm(self, tmp_path, monkeypatch, dtype, gpu, told):
        asked = {}

        class Engine:
            @classmethod
            def from_pretrained(cls, folder, tokenizer, **settings):
                asked.update(settings)

        monkeypatch.setattr("torchrl_chat.policies.VLLMPolicy", Engine)
        settings = config(tmp_path, backend="vllm", vllm_dtype=dtype)
        model, tokenizer = make_model(settings)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        make_policy(settings, model, tokenizer)
        assert asked.get("dtype") == told

    def test_the_rate_falls_in_a_line(self):
        settings = RunConfig(steps=10, lr=1.0, final_lr_share=0.5)
        assert [settings.rate(step) for step in (0, 5, 10)] == pytest.approx([1.0, 0.75, 0.5])


class TestCheckpoints:
    def test_round_trip(self, tmp_path):
        model, other, tokenizer = tiny_model(30, seed=0), tiny_model(30, seed=1), tiny_tokenizer()
        saving.save_checkpoint(tmp_path, 3, model, tokenizer, {"step": 3, "random": saving.random_states()})
        drawn = torch.rand(3), __import__("random").random(), __import__("numpy").random.rand()
        [path] = saving.checkpoints(tmp_path)
        saving.load_weights(path, other)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
        state = saving.load_state(path)
        saving.set_random_states(state["random"])
        again = torch.rand(3), __import__("random").random(), __import__("numpy").random.rand()
        assert torch.equal(drawn[0], again[0])
        assert drawn[1:] == again[1:]
        assert state["step"] == 3

    def test_the_last_ones_are_kept_and_counted_as_numbers(self, tmp_path):
        model, tokenizer = tiny_model(30), tiny_tokenizer()
        for step in (8, 9, 10, 1_000_000):
            saving.save_checkpoint(tmp_path, step, model, tokenizer, {}, keep=2)
        assert [path.name for path in saving.checkpoints(tmp_path)] == ["step-000010", "step-1000000"]
        with pytest.raises(ValueError, match="keep=0"):
            saving.save_checkpoint(tmp_path, 11, model, tokenizer, {}, keep=0)

    @pytest.mark.parametrize("where", ["model", "tokenizer", "state", "disk", "rename"])
    def test_a_save_that_breaks_leaves_the_last_one(self, tmp_path, where, monkeypatch):
        model, tokenizer = tiny_model(30), tiny_tokenizer()
        saving.save_checkpoint(tmp_path, 1, model, tokenizer, {"step": 1})

        def broken(*_args, **_kwargs):
            raise OSError("no space left")

        place = {
            "model": (type(model), "save_pretrained"),
            "tokenizer": (type(tokenizer), "save_pretrained"),
            "state": (torch, "save"),
            "disk": (saving, "to_disk"),
            "rename": (os, "rename"),
        }[where]
        with monkeypatch.context() as patch:
            patch.setattr(*place, broken)
            with pytest.raises(OSError, match="no space"):
                saving.save_checkpoint(tmp_path, 2, model, tokenizer, {"step": 2}, keep=1)
        [path] = saving.checkpoints(tmp_path)
        assert saving.load_state(path)["step"] == 1
        saving.save_checkpoint(
            tmp_path, 2, model, tokenizer, {"step": 2}, keep=1
        )  # over what is left of the first try
        assert [saving.load_state(path)["step"] for path in saving.checkpoints(tmp_path)] == [2]
        assert not list(tmp_path.glob(".*"))


class TestRun:
    @pytest.mark.parametrize("options", [{}, {"lora": 4, "checkpointing": True}], ids=str)
    def test_a_run_that_is_broken_off_goes_on_as_if_nothing_had_been(self, tmp_path, options):
        torch.manual_seed(0)
        whole = books(tmp_path / "whole", **options)
        for step in whole.steps(evaluation):
            nudge(whole, step)
        torch.manual_seed(0)
        first = books(tmp_path / "broken", **options)
        steps = []
        for step in first.steps(evaluation):
            nudge(first, step)
            steps.append(step)
            if step == 2:
                break  # behind the checkpoint of step 2, and before that of step 4
        first.close()
        torch.manual_seed(99)
        second = books(tmp_path / "broken", resume=True, **options)
        assert second.resumed
        for step in second.steps(evaluation):
            nudge(second, step)
            steps.append(step)
        assert steps == [0, 1, 2, 2, 3]

        def told(folder: str) -> list:
            rows = jsonl(tmp_path / folder / "metrics.jsonl")
            return [(row["step"], row["loss"]) for row in rows]

        assert told("broken") == told("whole")
        assert [step for step, _ in told("whole")] == [0, 1, 2, 3]
        pairs = zip(whole.model.parameters(), second.model.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert json.loads((tmp_path / "broken" / "result.json").read_text())["steps"] == 4

    def test_a_finished_run_has_nothing_left(self, tmp_path):
        run = books(tmp_path)
        for step in run.steps(evaluation):
            nudge(run, step)
        before = (tmp_path / "metrics.jsonl").read_text()
        assert list(books(tmp_path, resume=True).steps(evaluation)) == []
        assert (tmp_path / "metrics.jsonl").read_text() == before

    def test_a_folder_is_not_begun_twice(self, tmp_path):
        books(tmp_path).close()
        with pytest.raises(FileExistsError, match="--resume"):
            books(tmp_path)

    def test_other_settings_are_refused_and_those_of_the_output_are_not(self, tmp_path):
        books(tmp_path).close()
        with pytest.raises(ValueError, match="begun with seed=0, now 1"):
            books(tmp_path, resume=True, seed=1)
        assert not books(tmp_path, resume=True, save_every=7, checkpointing=True).resumed

    def test_a_run_from_before_there_was_a_setting_had_its_default(self, tmp_path):
        books(tmp_path).close()
        written = tmp_path / "config.json"
        begun = json.loads(written.read_text())
        del begun["vllm_dtype"]
        written.write_text(json.dumps(begun))
        with pytest.raises(ValueError, match="begun with vllm_dtype='auto', now 'float32'"):
            books(tmp_path, resume=True, vllm_dtype="float32")
        books(tmp_path, resume=True).close()

    def test_two_processes_do_not_write_one_run(self, tmp_path, monkeypatch):
        run = books(tmp_path)
        monkeypatch.setattr("torchrl_chat.recipes.books._locked.__defaults__", (0.2,))
        with pytest.raises(BlockingIOError, match="another process"):
            books(tmp_path, resume=True)
        run.close()

    def test_metrics_reach_a_logger_of_torchrl(self, tmp_path):
        run = books(tmp_path, logger="csv")
        for step in run.steps(evaluation):
            nudge(run, step)
        rows = (tmp_path / "logs" / "test" / "scalars" / "loss.csv").read_text().splitlines()
        assert [int(row.split(",")[0]) for row in rows] == [0, 1, 2, 3]

    @pytest.mark.parametrize("options", [{}, {"lora": 4}], ids=str)
    def test_the_reference_is_the_model_before_the_first_step(self, tmp_path, options):
        ids = torch.arange(6)[None]

        def said(reference):
            with reference.scoring() as model:
                return model(input_ids=ids).logits

        run = books(tmp_path, **options)
        reference = run.reference()
        start = said(reference)
        assert torch.equal(start, run.model(input_ids=ids).logits)
        for step in run.steps(evaluation):
            nudge(run, step)
        assert torch.equal(said(reference), start)
        again = books(tmp_path, resume=True, **options)
        assert torch.equal(said(again.reference()), start)
        assert not torch.equal(again.model(input_ids=ids).logits, start)


class TestTasks:
    def test_the_same_questions_are_asked_each_time(self, tmp_path):
        settings = config(tmp_path)
        model, tokenizer = make_model(settings)
        policy, _ = make_policy(settings, model, tokenizer)
        env = make_env(settings, tokenizer, 8, 1, 0)
        first, second = ask(env, policy, settings), ask(env, policy, settings)
        assert episodes(first) == episodes(second)
        assert [t.tokens.tolist() for t in first["transcript"]] == [t.tokens.tolist() for t in second["transcript"]]

    def test_demonstrations_show_the_form_and_little_of_the_operation(self, tmp_path):
        settings = config(tmp_path, dataset="python-tool", max_new_tokens=40)
        _, tokenizer = make_model(settings)
        env = make_env(settings, tokenizer, 200, 1, 0)
        view = demonstrations(env, 0)
        env.close()
        texts = tokenizer.batch_decode(view["tokens"].full)
        form = re.compile(
            r"<\|user\|>(...) (\d) (\d)<\|end\|><\|assistant\|>```python\nprint\(\2[-+*]\3\)\n```<\|end\|>"
            r"<\|tool\|>(-?\d+)\n?<\|end\|><\|assistant\|>\4<\|end\|>(<\|pad\|>)*"
        )
        assert [text for text in texts if not form.fullmatch(text)] == []
        assert 0.25 < float(view["success"].float().mean()) < 0.55  # 1 / 3 by chance, and where operations agree

    def test_warm_start_needs_demonstrations(self, tmp_path):
        settings = config(tmp_path, warm_steps=1)
        with pytest.raises(ValueError, match="digits has no demonstrations"):
            warm_start(settings, None, None, tokenizer=None)


class TestValues:
    @pytest.fixture
    def view(self, tmp_path):
        settings = config(tmp_path, max_new_tokens=3)
        model, tokenizer = make_model(settings)
        policy, _ = make_policy(settings, model, tokenizer)
        return model, training_view(ask(make_env(settings, tokenizer, 6, 1, 0), policy, settings), layout="padded")

    @pytest.mark.parametrize("trunk", ["shared", "separate"])
    def test_a_value_sees_what_is_in_front_of_its_token(self, view, trunk):
        model, rows = view
        both = PolicyAndValue(model, trunk)
        torch.nn.init.normal_(both.head.weight)
        scores, values = both(rows)
        ids = rows["tokens"].full
        hidden = model.base_model(ids).last_hidden_state.detach()
        for row, place in scores.mask.nonzero().tolist():
            expected = both.head(hidden[row, place - 1]).detach()
            assert values[row, place].item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-5)
        assert bool((values[~scores.mask] == 0).all())

    def test_rows_without_sampled_tokens_have_no_values(self, view):
        model, rows = view
        both = PolicyAndValue(model)
        torch.nn.init.normal_(both.head.weight)
        _, whole = both(rows)
        rows["masks"].all_assistant_mask[2] = False
        _, values = both(rows)
        assert bool((values[2] == 0).all())
        kept = [0, 1, 3, 4, 5]
        assert torch.allclose(values[kept], whole[kept], atol=1e-5)

    def test_gradients_go_where_they_should(self, view):
        model, rows = view
        for trunk in ("shared", "separate"):
            model.zero_grad()
            both = PolicyAndValue(model, trunk)
            torch.nn.init.normal_(both.head.weight)
            both(rows)[1].sum().backward()
            reached = model.base_model.embed_tokens.weight.grad
            assert (reached is not None and bool(reached.any())) == (trunk == "shared")

    @pytest.mark.parametrize("trunk", ["shared", "separate"])
    def test_a_model_with_an_adapter(self, view, trunk):
        import peft

        model, rows = view
        lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = peft.get_peft_model(model, lora).eval()
        both = PolicyAndValue(model, trunk)
        torch.nn.init.normal_(both.head.weight)
        scores, values = both(rows)
        expected = PolicyAndValue(model.merge_and_unload())
        expected.head = both.head
        assert torch.allclose(values, expected(rows)[1], atol=1e-4)
        assert torch.allclose(scores.log_probs, expected(rows)[0].log_probs, atol=1e-4)
        if trunk == "separate":
            trained = {name for name, parameter in both.trunk.named_parameters() if parameter.requires_grad}
            assert trained
            assert all("lora" in name for name in trained)

    @pytest.mark.parametrize("trunk", ["shared", "separate"])
    def test_in_several_passes_they_are_the_same(self, view, trunk):
        model, rows = view
        both = PolicyAndValue(model, trunk)
        torch.nn.init.normal_(both.head.weight)
        scores, values = both(rows)
        longest = int(rows["masks"].all_attention_mask.sum(-1).max())
        few_scores, few = both(rows, max_tokens=longest)
        assert torch.allclose(few, values, atol=1e-5)
        assert torch.allclose(few_scores.log_probs, scores.log_probs, atol=1e-5)
        _, ragged = both(rows.exclude("position_ids"))
        assert torch.allclose(ragged[scores.mask], values[scores.mask], atol=1e-5)

    def test_a_trunk_that_is_none(self, view):
        with pytest.raises(ValueError, match="trunk='own'"):
            PolicyAndValue(view[0], "own")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("grpo", []),
        ("grpo", ["--variant", "dapo", "--max_new_tokens", "8", "--overlong", "4", "--kl", "0.1"]),
        ("grpo", ["--variant", "dr-grpo", "--kl", "0.1", "--kl_kind", "k2", "--entropy", "0"]),
        ("grpo", ["--variant", "cispo", "--correction", "icepop", "--max_new_tokens", "4"]),
        (
            "grpo",
            ["--variant", "gspo", "--normalize", "mean", "--correction", "tis", "--correction_level", "sequence"],
        ),
        (
            "grpo",
            ["--surrogate", "reinforce", "--normalize", "batch", "--leave_one_out", "--correction", "mis"],
        ),
        ("ppo", ["--kl", "0.1", "--max_new_tokens", "4", "--max_tokens", "60"]),
        ("ppo", ["--trunk", "separate"]),
        ("expert_iteration", ["--restart"]),
        ("grpo", ["--lora", "4", "--checkpointing", "--kl", "0.1", "--merge", "--dtype", "bfloat16"]),
        ("ppo", ["--lora", "4", "--kl", "0.1", "--trunk", "separate"]),
        ("expert_iteration", ["--lora", "4", "--lora_targets", "q_proj,v_proj", "--restart"]),
    ],
)
@pytest.mark.by_day(3)
def test_every_option_runs_and_the_books_agree(tmp_path, monkeypatch, name, options):
    monkeypatch.setattr(sys, "argv", [name, *QUICK, "--steps", "2", "--out", str(tmp_path), *options])
    script(name).main()
    metrics, trained = jsonl(tmp_path / "metrics.jsonl"), jsonl(tmp_path / "trained.jsonl")
    assert [row["step"] for row in metrics] == [row["step"] for row in trained] == [0, 1]
    assert all(math.isfinite(value) for row in metrics for value in row.values())
    every = [tuple(key) for row in trained for key in row["episodes"]]
    assert len(every) == len(set(every))
    written = [
        (e["metadata"]["step"], e["row"], e["epoch"], e["place"])
        for e in read_rollouts(tmp_path / "rollouts.jsonl")
    ]
    assert len(written) == len(set(written)) == 32
    if name == "ppo":
        kept = saving.load_state(saving.checkpoints(tmp_path / "checkpoints")[-1])["state"]
        assert set(kept["head"]) == {"weight", "bias"}
        assert all(("lora_" in weight) == ("--lora" in options) for weight in kept.get("trunk", {}))
        assert bool(kept.get("trunk")) == ("separate" in options)
    if "--merge" in options:
        from transformers import AutoModelForCausalLM

        assert not hasattr(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), "peft_config")
    if "dapo" not in options and name != "expert_iteration":
        assert [row["ess"] <= 1 + 1e-5 for row in metrics] == [True, True]
        assert {(step, *key) for step, row in enumerate(trained) for key in map(tuple, row["episodes"])} == set(
            written
        )


def test_dynamic_sampling_trains_groups_that_differ_only(tmp_path):
    from torchrl_chat.playing import play

    module = script("grpo")
    settings = module.GRPOConfig(out=str(tmp_path), prompts=4, group_size=4, dynamic_sampling=True, max_batches=3)
    model, tokenizer = make_model(settings)
    policy, _ = make_policy(settings, model, tokenizer)
    env = make_env(settings, tokenizer, 4, 4, 0)
    finished, trained = module.collect(env, policy, settings)
    rewards = torch.cat([batch["reward"].reshape(4, 4) for batch in finished])
    mixed = (rewards != rewards[:, :1]).any(1)
    assert len(finished) <= 3
    assert int(trained.sum()) == min(4, int(mixed.sum()))
    assert not bool((trained & ~mixed).any())
    assert len(finished) == 3 or int(mixed.sum()) >= 4
    settings.dynamic_sampling = False
    finished, trained = module.collect(env, policy, settings)
    assert len(finished) == 1
    assert bool(trained.all())
    assert play(env, policy).batch_size == (16,)


def test_what_cannot_be_graded_makes_no_group_differ(tmp_path):
    from torchrl_chat import DatasetChatEnv, RewardTransform
    from torchrl_chat.tiny import last_digit_rows

    module = script("grpo")
    settings = module.GRPOConfig(out=str(tmp_path), prompts=3, group_size=4, dynamic_sampling=True, max_batches=1)
    calls = []

    def verifier(response: str, reference: str) -> float:
        calls.append(response)
        if len(calls) in (1, 5, 6, 9, 10, 11, 12):  # one of the first group, two of the second, all of the third
            raise ArithmeticError("no grade")
        return float(len(calls) != 8)  # one of the second group is wrong

    model, tokenizer = make_model(settings)
    policy, _ = make_policy(settings, model, tokenizer)
    env = DatasetChatEnv(
        dataset=last_digit_rows(seed=0),
        tokenizer=tokenizer,
        input_mode="tokens",
        num_envs=3,
        repeats=4,
        group_repeats=True,
    )
    env = env.append_transform(RewardTransform(verifier, on_failure="mask", isolate=False, workers=1))
    with pytest.warns(RuntimeWarning, match="7 of 12 grades failed"):
        finished, trained = module.collect(env, policy, settings)
    assert finished[0]["graded"].sum() == 5
    assert trained.tolist() == [False, True, False]


def half_graded(settings, tokenizer, fails: str | None):
    """An environment that cannot grade answers which begin with one of certain letters (or any), nor train on them."""
    from torchrl.envs import StepCounter

    from torchrl_chat import DatasetChatEnv, RewardTransform
    from torchrl_chat.tiny import last_digit_rows

    def verifier(response: str, reference: str) -> float:
        if fails is None or response[:1] in fails:
            raise ArithmeticError("no grade")
        return float(len(response) % 2)

    env = DatasetChatEnv(
        dataset=last_digit_rows(seed=0), tokenizer=tokenizer, input_mode="tokens", num_envs=settings.prompts,
        repeats=settings.group_size, group_repeats=True, seed=0,
    )  # fmt: skip
    env = env.append_transform(StepCounter(max_steps=1))
    env = env.append_transform(RewardTransform(verifier, on_failure="mask", isolate=False, workers=1))
    return env


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("fails", ["02468aelst(", None], ids=["some", "all"])
@pytest.mark.parametrize("name", [*RECIPES, "python_tool"])
@pytest.mark.by_day(2)
def test_what_cannot_be_graded_ends_no_run(tmp_path, monkeypatch, name, fails):
    """Microbatches, minibatches and whole batches without a trained token."""
    module = script(name)
    words = ["--steps", "2", "--max_new_tokens", "4", "--minibatch", "2", "--max_tokens", "30", "--eval", "4"]
    monkeypatch.setattr(module, "make_env", lambda c, t, *_, **__: half_graded(c, t, fails))
    if name == "python_tool":
        monkeypatch.setattr(module, "TINY_TOOL", {})  # it would be shown programs
    monkeypatch.setattr(sys, "argv", [name, *QUICK, *words, "--out", str(tmp_path)])
    module.main()
    metrics = jsonl(tmp_path / "metrics.jsonl")
    assert len(metrics) == 2
    assert all(math.isfinite(value) for row in metrics for value in row.values())
    if name != "expert_iteration":  # it imitates what is right, if there is any
        assert ["loss" in row for row in metrics] == [fails is not None] * 2


def test_the_loss_of_a_minibatch_is_the_sum_of_its_shares(tmp_path):
    """Whatever the size of the microbatches."""
    module = script("grpo")
    settings = module.GRPOConfig(
        out=str(tmp_path), prompts=4, group_size=4, minibatch=8, epochs=2, max_new_tokens=4
    )
    model, tokenizer = make_model(settings)
    policy, _ = make_policy(settings, model, tokenizer)
    view = training_view(ask(make_env(settings, tokenizer, 4, 4, 0), policy, settings), layout="padded")
    view["advantage"] = torch.rand(len(view)) + 0.5  # of one sign: no loss that is near 0 by luck
    logged = []
    for settings.max_tokens in (10_000, 60, 1):
        torch.manual_seed(0)
        still = torch.optim.SGD(model.parameters(), lr=0.0)
        told = module.learn(
            still,
            view,
            functools.partial(
                module.loss_of, model, config=settings, vocab_size=len(tokenizer), streams=module.Streams()
            ),
            **settings.learning,
        )
        logged.append(told["loss"])
    assert logged == pytest.approx([logged[0]] * 3, rel=1e-4)
    assert abs(logged[0]) > 1e-3


def test_most_counts_answers_and_not_their_sequences(tmp_path):
    """A right answer of three sequences is one answer, and is imitated as a whole."""
    from tensordict import TensorDict

    from torchrl_chat import Transcript, columns

    def episode(*words: list[int]) -> Transcript:
        transcript = Transcript.start([1, 2], ({"role": "user", "content": "?"},))
        for i, ids in enumerate(words):
            if i:
                transcript = transcript.branched([1, 2, 3], transcript.spans)
            said = {"role": "assistant", "content": "!"}
            transcript = transcript.sampled(torch.tensor(ids), -torch.ones(len(ids)), said, ended=True)
        return transcript

    module = script("expert_iteration")
    settings = module.ExpertIterationConfig(out=str(tmp_path), prompts=1, group_size=5, most=2)
    # Wrong, right, the same once more, right in another last sequence, right and one too many.
    played = [([9], [9]), ([5], [6], [7]), ([5], [6], [7]), ([5], [6], [8]), ([4],)]
    batch = torch.Size([5])
    finished = TensorDict(
        transcript=columns.objects([episode(*words) for words in played], batch, None),
        success=torch.tensor([False, True, True, True, True]).reshape(5, 1, 1),
        reward=torch.zeros(5, 1, 1),
        batch_size=batch,
    )
    assert module.right_answers(finished, settings)["episode"].tolist() == [1, 1, 1, 3, 3, 3]
    settings.most = 0
    assert module.right_answers(finished, settings)["episode"].tolist() == [1, 1, 1, 3, 3, 3, 4]


@pytest.mark.full  # test_kills kills one recipe five times in every run
def test_kill_and_resume(tmp_path):
    """Two kills; tests/test_recipes_learning.py has more for each script."""
    same_run(*run_killed(tmp_path, "grpo", 2, QUICK, seed=1))


@pytest.mark.full
def test_kill_and_resume_with_sandboxes(tmp_path):
    """Programs run while the script is killed: none outlives it, and the run goes on as if nothing had been."""
    settings = config(tmp_path, dataset="python-tool", max_new_tokens=40)
    model, tokenizer = make_model(settings)
    env = make_env(settings, tokenizer, 64, 1, 0)
    view = demonstrations(env, 0)
    env.close()
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(50):  # it learns the form, so that there are programs to run
        scores = sequence_log_probs(model, view[torch.randint(len(view), (32,))])
        optimizer.zero_grad()
        (-masked_mean(scores.log_probs, scores.mask)).backward()
        optimizer.step()
    saving.save_model(tmp_path / "model", model, tokenizer)
    words = [
        "--dataset",
        "python-tool",
        "--model",
        str(tmp_path / "model"),
        "--max_new_tokens",
        "40",
        "--lr",
        "1e-4",
    ]
    killed, whole = run_killed(tmp_path, "grpo", 1, [*QUICK, *words], seed=1)
    same_run(killed, whole)
    used = [any(m["role"] == "tool" for m in e["messages"]) for e in read_rollouts(whole / "rollouts.jsonl")]
    assert sum(used) > len(used) // 4


def test_a_process_without_a_trained_group_needs_nothing():
    """Of several, as dynamic sampling leaves them."""
    view = TensorDict(advantage=torch.tensor([[[0.0]], [[1.0]]]), batch_size=2)
    assert needed(view, GRPOConfig()).tolist() == [False, True]
    assert needed(view[:0], GRPOConfig()).tolist() == []
