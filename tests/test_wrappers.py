"""torchrl's ``TransformersWrapper`` on the ledger's ids: exact over turns, in every mode, also where the parent errs."""

from __future__ import annotations

import episodes
import pytest
import torch
from conftest import of_the_day
from tensordict import TensorDict, lazy_stack
from torchrl.modules.llm import TransformersWrapper
from torchrl.modules.llm.policies import Masks
from torchrl.objectives.llm.grpo import GRPOLoss

from torchrl_chat import ChatEnv, TransformersPolicy, columns, training_view
from torchrl_chat.policies import ExactTransformersWrapper
from torchrl_chat.policies.writing import container
from torchrl_chat.transforms import Budget

TEMPERATURE = 0.8
SAMPLE = {"max_new_tokens": 24, "do_sample": True, "temperature": TEMPERATURE}


def wrapper(mode="tokens", model=None, **options) -> ExactTransformersWrapper:
    options = {"generate_kwargs": SAMPLE, **options}
    model = episodes.model() if model is None else model
    return ExactTransformersWrapper(model, tokenizer=episodes.tokenizer(), input_mode=mode, **options)


def rows(td, container, key):
    return columns.read_field(td[container], key, td.batch_size)


@pytest.mark.parametrize("mode", of_the_day("history", "text", "tokens"))
def test_acceptance(mode):
    """64 ragged episodes with tools: log-probs, effective sample size, and both again after an optimizer step."""
    torch.manual_seed(0)
    policy = wrapper(mode, episodes.model(extra=3))
    actor = policy.get_new_version(generate=False)
    for _ in range(2):
        td, count = episodes.play(episodes.environment(mode), policy)
        assert episodes.check(td, count, policy.model, TEMPERATURE) < 1e-4
        loss = episodes.losses(td, actor)
        assert loss.ESS.item() == pytest.approx(1.0, abs=1e-4)
        assert abs(loss.kl_approx.item()) < 1e-5
        before = [p.clone() for p in policy.model.parameters()]
        episodes.one_step(td, actor)
        assert any(
            (old - new).abs().max() > 1e-3 for old, new in zip(before, policy.model.parameters(), strict=True)
        )


def test_the_parent_errs_where_we_do_not(mode):
    """The tests above can fail: torchrl's wrapper does, on the first row already (its first log-prob is 0)."""
    torch.manual_seed(0)
    env = episodes.environment("tokens", 4)
    td = episodes.first(env)
    parent = TransformersWrapper(
        episodes.model(), tokenizer=episodes.tokenizer(), input_mode="tokens", generate_kwargs=SAMPLE
    )
    theirs = parent(td.select("tokens"))["log_probs"].get("response", as_list=True)
    assert all(row[0] == 0 for row in theirs)
    ours = rows(wrapper(mode)(episodes.first(episodes.environment(mode, 4))), "log_probs", "response")
    assert all(row[0] < 0 for row in ours)


def test_what_is_written(mode):
    torch.manual_seed(1)
    env = episodes.environment(mode, 64)
    start = episodes.first(env)
    prompts = rows(start, "tokens", "prompt")
    policy = wrapper(mode)
    td = policy(start)
    assert td is start
    stop = env.base_env.tokenizer.eos_token_id
    decode = env.base_env.template.codec.decode
    reasons = columns.read_objects(td["finish_reason"], td.batch_size)
    assert set(reasons) == {"stop", "length"}
    for i, prompt in enumerate(prompts):
        response, full = rows(td, "tokens", "response")[i], rows(td, "tokens", "full")[i]
        assert full.tolist() == prompt.tolist() + response.tolist()
        assert stop not in response[:-1]
        assert (reasons[i] == "stop") == (response[-1].item() == stop)
        assert rows(td, "log_probs", "full")[i].shape == full.shape
        assert rows(td, "masks", "all_attention_mask")[i].shape == full.shape
        text = rows(td, "text", "response")[i]
        assert text == decode([response.tolist()])[0]
        if mode != "tokens":
            assert rows(td, "text", "full")[i] == decode([full.tolist()])[0]
        if mode == "history":
            said = rows(td, "history", "response")[i]
            content = said.content[0] if not isinstance(said.content, str) else said.content
            assert content == text.removesuffix("<|end|>")
            assert columns.read_objects(said.get("is_complete"), said.batch_size) == [reasons[i] == "stop"]
            assert (
                rows(td, "history", "full")[i].batch_size[0] == rows(td, "history", "prompt")[i].batch_size[0] + 1
            )
    env.step(td)


def test_scoring_is_that_of_the_ledger(mode):
    """``generate=False`` scores the ids themselves, in every mode, and leaves the rest of the TensorDict alone."""
    torch.manual_seed(2)
    policy = wrapper(mode)
    td = policy(episodes.first(episodes.environment(mode, 8)))
    sampled = rows(td, "log_probs", "response")
    scorer = policy.get_new_version(generate=False, inplace=False)
    scored = scorer(td)
    assert {"log_probs", "masks"} == set(scored.keys())
    again = policy.get_new_version(generate=False)(td.copy())
    for i, expected in enumerate(sampled):
        whole = rows(scored, "log_probs", "full")[i]
        assert whole.shape == rows(td, "tokens", "full")[i].shape
        assert torch.allclose(whole[-len(expected) :], expected, atol=1e-5)
        assert (whole[1 : -len(expected)] < 0).all(), "the prompt is scored too"
        assert torch.equal(rows(again, "log_probs", "full")[i], whole)
    assert set(again.keys()) == set(td.keys())


def test_a_token_that_pads_is_kept():
    """With ``pad_token == eos_token``, and with a pad token that is sampled, torchrl deletes tokens."""
    tokenizer = episodes.tokenizer()
    pad = tokenizer.pad_token_id
    model = episodes.model()
    torch.manual_seed(0)
    policy = ExactTransformersWrapper(
        model, tokenizer=tokenizer, input_mode="tokens", generate_kwargs={"max_new_tokens": 60, "do_sample": True}
    )
    td = policy(episodes.first(episodes.environment("tokens")))
    responses = rows(td, "tokens", "response")
    assert any(pad in row for row in responses)
    scored = policy.get_new_version(generate=False, inplace=False)(td)
    for full, row in zip(rows(td, "tokens", "full"), rows(scored, "log_probs", "full"), strict=True):
        assert full.shape == row.shape


def test_greedy_is_that_of_the_policy():
    env = episodes.environment("tokens", 8)
    ours = wrapper(generate_kwargs={"max_new_tokens": 9})(episodes.first(env))
    reference = TransformersPolicy(episodes.model(), episodes.tokenizer(), max_new_tokens=9, temperature=0)
    expected = reference(episodes.first(env))
    for key in ("response", "full"):
        for a, b in zip(rows(ours, "tokens", key), rows(expected, "tokens", key), strict=True):
            assert a.tolist() == b.tolist()
        for a, b in zip(rows(ours, "log_probs", key), rows(expected, "log_probs", key), strict=True):
            assert torch.allclose(a, b, atol=1e-5)


def test_budgets_are_kept_to():
    env = episodes.environment("tokens", 4).append_transform(Budget(max_turn_tokens=3))
    td = wrapper()(episodes.first(env))
    assert max(map(len, rows(td, "tokens", "response"))) <= 3


def test_lazy_stacks_and_single_rows():
    td = episodes.first(episodes.environment("tokens", 3))
    stacked = wrapper()(lazy_stack([row.copy() for row in td.unbind(0)]))
    assert len(columns.read_field(stacked["tokens"], "response", stacked.batch_size)) == 3
    one = wrapper()(td[1].copy())
    full = one["tokens"].full
    assert full[: len(td[1]["tokens"].prompt)].tolist() == td[1]["tokens"].prompt.tolist()


SETTINGS = {
    "do_sample": True,
    "temperature": 0.3,
    "top_k": 2,
    "top_p": 0.5,
    "min_p": 0.3,
    "top_h": 0.4,
    "typical_p": 0.4,
    "epsilon_cutoff": 0.05,
    "eta_cutoff": 0.05,
    "repetition_penalty": 1.5,
    "no_repeat_ngram_size": 2,
    "min_length": 100,
    "min_new_tokens": 12,
    "max_new_tokens": 3,
    "max_time": 1e-6,
    "stop_strings": ["a", "e"],
    "suppress_tokens": [20, 21],
    "begin_suppress_tokens": [22, 23],
    "bad_words_ids": [[24], [25]],
    "sequence_bias": [[[26], 9.0]],
    "forced_eos_token_id": 27,
    "exponential_decay_length_penalty": (2, 1.5),
    "renormalize_logits": True,
    "num_return_sequences": 2,
}


@pytest.mark.parametrize("generate_kwargs", [SAMPLE, {"max_new_tokens": 24}], ids=["sampled", "greedy"])
@pytest.mark.parametrize(
    "names", [["do_sample", "temperature", "top_k", "top_p", "repetition_penalty"], list(SETTINGS)]
)
def test_sampling_settings_of_the_model_are_switched_off(names, generate_kwargs):
    """Whatever the model's generation config asks for, the same ids are sampled, with the same log-probs."""
    found = []
    for settings in ({}, {name: SETTINGS[name] for name in names}):
        model = episodes.model()
        for name, value in settings.items():
            setattr(model.generation_config, name, value)
        before = model.generation_config.to_dict()
        torch.manual_seed(0)
        td = wrapper(model=model, generate_kwargs=generate_kwargs)(
            episodes.first(episodes.environment("tokens", 16))
        )
        assert model.generation_config.to_dict() == before
        found.append(
            [[r.tolist() for r in rows(td, *key)] for key in (("tokens", "response"), ("log_probs", "full"))]
        )
    assert found[0] == found[1]


LAYOUTS = [("ragged", "right"), ("padded", "right"), ("padded", "left")]


@pytest.mark.parametrize("exact", [True, False], ids=["wrapper", "policy"])
def test_training_views_of_every_layout(exact):
    """GRPOLoss on a view as it is, whatever its padding: an effective sample size of 1 before any update."""
    torch.manual_seed(0)
    model = episodes.model(extra=3)
    if exact:
        act = wrapper(model=model)
        actor = act.get_new_version(generate=False)
    else:
        act = actor = TransformersPolicy(model, episodes.tokenizer(), max_new_tokens=24, temperature=TEMPERATURE)
    td, _ = episodes.play(episodes.environment("tokens", 16), act, turns=2)
    objectives = []
    for layout, side in LAYOUTS:
        view = training_view(td, layout=layout, side=side, pad_id=9).select("tokens", "masks", "log_probs")
        assert len({int(row.sum()) for row in rows(view, "masks", "all_attention_mask")}) > 3
        view["advantage"] = torch.linspace(-1, 1, len(view)).reshape(-1, 1, 1)
        loss = GRPOLoss(actor, masking_strategy="rlhf")(view)
        assert loss.ESS.item() == pytest.approx(1.0, abs=1e-4)
        assert abs(loss.kl_approx.item()) < 1e-5
        objectives.append(loss.loss_objective.item())
    assert objectives == pytest.approx(objectives[:1] * 3, abs=1e-5)


def test_padded_rows_are_scored_in_place():
    """``generate=False`` on a padded view: the log-probs of the ragged one, at the places of its tokens, 0 on padding."""
    torch.manual_seed(0)
    act = wrapper()
    td, _ = episodes.play(episodes.environment("tokens", 8), act, turns=1)
    scorer = act.get_new_version(generate=False, inplace=False)
    expected = rows(scorer(training_view(td)), "log_probs", "full")
    for side in ("left", "right"):
        view = training_view(td, layout="padded", side=side)
        found = rows(scorer(view), "log_probs", "full")
        for row, mask, reference in zip(found, rows(view, "masks", "all_attention_mask"), expected, strict=True):
            assert row.shape == mask.shape
            assert torch.allclose(row[mask], reference, atol=1e-5)
            assert not row[~mask].any()


@pytest.mark.parametrize("strategy", ["sft", "rlhf"])
def test_a_mask_of_another_length_is_named(strategy):
    act = TransformersPolicy(episodes.model(), episodes.tokenizer(), max_new_tokens=3)
    td = act(episodes.first(episodes.environment("tokens", 4)))
    full = rows(td, "tokens", "full")
    fields = [
        {"all_attention_mask": torch.ones(len(row) - (i == 2), dtype=torch.bool)} for i, row in enumerate(full)
    ]
    td["masks"] = container(Masks, fields, td.batch_size, None)
    for actor in (act, wrapper(generate=False)):
        with pytest.raises(ValueError, match="row 2: .*they are not of one sequence"):
            getattr(actor, f"_get_{strategy}_dist")(td)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pad_output": True}, "pad_output"),
        ({"num_samples": 4}, "num_samples"),
        ({"pad_model_input": False, "generate": False}, "pad_model_input"),
        ({"generate_kwargs": {"top_k": 5}}, "top_k=5"),
        ({"generate_kwargs": {"top_p": 0.9}}, "top_p=0.9"),
        ({"generate_kwargs": {"num_beams": 4}}, "num_beams=4"),
        ({"generate_kwargs": {"min_p": 0.1}}, "min_p=0.1.*Leave min_p out"),
        ({"generate_kwargs": {"typical_p": 0.5}}, "typical_p=0.5"),
        ({"generate_kwargs": {"suppress_tokens": [8]}}, r"suppress_tokens=\[8\]"),
        ({"generate_kwargs": {"no_repeat_ngram_size": 2}}, "no_repeat_ngram_size=2"),
        ({"generate_kwargs": {"num_return_sequences": 4}}, "num_return_sequences=4.*repeats="),
        ({"generate_kwargs": {"n": 4}}, "n=4.*repeats="),
        ({"generate_kwargs": {"seed": 1}}, "seed=1.*leave it out"),
        ({"generate_kwargs": {"max_token": 5}}, "max_token=5.*Known are max_new_tokens"),
        ({"generate_kwargs": {"do_sample": True, "temperature": 0}}, "do_sample=True and temperature=0"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        wrapper(**options)


def test_missing_ids():
    bare = TensorDict(query=["a"], batch_size=(1,))
    with pytest.raises(KeyError, match="'tokens', 'prompt'"):
        wrapper()(bare)
    with pytest.raises(KeyError, match="'tokens', 'full'"):
        wrapper(generate=False)(bare)
    with pytest.raises(ValueError, match="max_new_tokens"):
        wrapper()(bare, max_new_tokens=3)


def test_two_batch_dimensions():
    env = ChatEnv(input_mode="tokens", tokenizer=episodes.tokenizer(), batch_size=(2, 2))
    td = env.reset(TensorDict(query=[["a", "bb"], ["ccc", "d"]], batch_size=(2, 2)))
    env.step(wrapper()(td))
