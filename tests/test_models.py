"""What a model says of a token, in every way that it is asked, is what it says of the row alone; or it is refused by name."""

from __future__ import annotations

import gc
import json
import re
import warnings
import weakref

import episodes
import numpy as np
import peft
import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from torchrl_chat import ChatEnv, TransformersPolicy, columns, training_view
from torchrl_chat.cli.main import main
from torchrl_chat.models import proof
from torchrl_chat.models.head import Head
from torchrl_chat.models.mode import evaluating
from torchrl_chat.models.passes import ModelError
from torchrl_chat.models.proof import prover_of
from torchrl_chat.models.ropes import rope_change
from torchrl_chat.models.sampling import generate
from torchrl_chat.models.small import VOCABULARY, small_config, widen
from torchrl_chat.policies import ExactTransformersWrapper
from torchrl_chat.policies.transformers import token_logits
from torchrl_chat.tiny import TEXT_ALPHABET, tiny_model, tiny_tokenizer
from torchrl_chat.training import layouts, sequence_log_probs, trees
from torchrl_chat.training.values import PolicyAndValue

LIMIT = 1e-3
QUERIES = ("1+1=", "last(3,7)=last(2,5)=last(4,4)=last(1,9)=", "last(3,5)=")
TOKENIZER = tiny_tokenizer("".join(dict.fromkeys(TEXT_ALPHABET))[: VOCABULARY - 10])
assert len(TOKENIZER) <= VOCABULARY


def environment(rows: int = len(QUERIES)):
    return ChatEnv(input_mode="tokens", tokenizer=TOKENIZER, batch_size=(rows,))


def played(policy, queries=QUERIES, turns: int = 2):
    """The finished conversations after some turns."""
    env = environment(len(queries))
    td = env.reset(
        TensorDict(query=list(queries), episode_seed=torch.arange(len(queries)), batch_size=(len(queries),))
    )
    for turn in range(turns):
        following = env.step(policy(td))["next"]
        if turn < turns - 1:
            td = env.append_messages(
                env.step_mdp(TensorDict(next=following, batch_size=td.batch_size)), queries[::-1]
            )
            td["episode_seed"] = torch.arange(len(queries))
    return following


def ledgers(td):
    return columns.read_objects(td["transcript"], td.batch_size)


def alone(model, ids):
    """What the model says of each token of a row by itself."""
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1, : len(TOKENIZER)]
    scores = logits.float().log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
    return torch.cat((scores.new_zeros(1), scores))


def carried(model, td):
    """How far the log-probs in the ledgers are from the model's."""
    with torch.no_grad():
        return max(float((alone(model, t.tokens) - t.log_probs)[t.mask].abs().max()) for t in ledgers(td))


def refused(work, *given, **options):
    """What a way gives; ``None`` where the model is refused by name."""
    try:
        return work(*given, **options)
    except ModelError as error:
        told = str(error)
    assert told.split()[0].rstrip(":").isidentifier()
    return None


@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(name, id=name) for name in zoo.KINDS),
        *(pytest.param(n, id=n, marks=pytest.mark.full) for n in zoo.architectures() if n not in zoo.KINDS),
    ],
)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.by_day(2)
def test_every_architecture_is_right_or_refused(name):
    model, right = zoo.make(name), {}
    critics = {trunk: refused(PolicyAndValue, model, trunk) for trunk in ("shared", "separate")}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for seeded in (False, True):
            policy = TransformersPolicy(model, TOKENIZER, max_new_tokens=12, seeded=seeded)
            td = refused(played, policy)
            if td is None:
                assert name not in zoo.KINDS
                return
            right[f"policy, seeded={seeded}"] = carried(model, td)
        settings = {"max_new_tokens": 12, "do_sample": True}
        wrapper = ExactTransformersWrapper(
            model, tokenizer=TOKENIZER, input_mode="tokens", generate_kwargs=settings
        )
        acted = refused(played, wrapper, turns=1)
        if acted is not None:
            right["wrapper"] = carried(model, acted)
    ids, masks = [t.tokens for t in ledgers(td)], [t.mask for t in ledgers(td)]
    reference = torch.cat([alone(model, row)[mask] for row, mask in zip(ids, masks, strict=True)])
    weights = [p for p in model.parameters() if p.requires_grad]
    draw = torch.Generator().manual_seed(0)
    factors = torch.randn(len(reference), generator=draw)

    def gradient(scores):
        found = torch.autograd.grad((scores * factors).sum(), weights, allow_unused=True)
        return torch.cat(
            [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(weights, found, strict=True)]
        )

    expected = gradient(reference)
    for way, options in {**VIEWS, **SHARED}.items():
        view = training_view(td, group=None, **options)
        scores = refused(sequence_log_probs, model, view, vocab_size=len(TOKENIZER), share_prefixes=way in SHARED)
        if scores is None:
            continue
        flat = by_sequence(view, scores.mask, scores.log_probs, len(ids))
        right[way] = float((flat - reference).detach().abs().max())
        found = gradient(flat)
        right[f"{way}, gradient"] = float((found - expected).norm() / expected.norm()) / 10
    logits, _ = token_logits(model, ids, [torch.ones_like(mask) for mask in masks], len(TOKENIZER), 1.0)
    flat = torch.cat(
        [
            r.log_softmax(-1)[-len(i) :].gather(-1, i[:, None])[:, 0][m]
            for r, i, m in zip(logits, ids, masks, strict=True)
        ]
    )
    right["distribution"] = float((flat - reference).detach().abs().max())
    loss = episodes.losses(td, policy)
    right["GRPOLoss"] = abs(float(loss.kl_approx)) + abs(1 - float(loss.ESS))
    right |= values(critics, td, ids, masks)
    assert {way: found for way, found in right.items() if not found < LIMIT} == {}


def values(critics, td, ids, masks):
    """How far values on views are from those of rows alone."""
    found = {}
    for trunk, actor_critic in critics.items():
        if actor_critic is None:
            continue
        nn.init.normal_(actor_critic.head.weight, generator=torch.Generator().manual_seed(0))
        given = [actor_critic(_alone_view(row, mask)) for row, mask in zip(ids, masks, strict=True)]
        own = [value[scores.mask] for scores, value in given]
        for way, options in VIEWS.items():
            view = training_view(td, group=None, **options)
            scores, value = actor_critic(view)
            apart = by_sequence(view, scores.mask, value, len(ids)) - torch.cat(own)
            found[f"values, {trunk}, {way}"] = float(apart.detach().abs().max())
    return found


VIEWS = {
    "ragged": {"layout": "ragged"},
    "right": {"layout": "padded"},
    "left": {"layout": "padded", "side": "left"},
    "packed": {"layout": "packed"},
    "packed in bins": {"layout": "packed", "max_tokens": 160},
    "trees": {"layout": "tree"},
}
SHARED = {"right, shared": {"layout": "padded"}, "ragged, shared": {"layout": "ragged"}}


def by_sequence(view, mask, found, count):
    """What was found of the scored tokens, sequence by sequence: bins and trees have an order of their own."""
    flat, numbers = found[mask], view.get("sequence_ids", None)
    return flat if numbers is None else torch.cat([flat[numbers[mask] == i] for i in range(count)])


def _alone_view(row, mask):
    flat = layouts.Flat.of([row], mask=[mask], log_probs=[torch.zeros(len(row))])
    return TensorDict(layouts.padded(flat, None, "right", 0, 1), batch_size=(1,))


# ---------------------------------------------------------------------- classes that nobody has seen before
class ShiftedLeft(LlamaForCausalLM):
    """Counts columns: padding on the left moves everything."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **kwargs):
        if past_key_values is None:
            position_ids = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        kwargs["attention_mask"] = None
        if attention_mask is not None and past_key_values is None:
            # as if there were no padding at all: what stands there is read
            input_ids = input_ids * attention_mask
        return super().forward(
            input_ids=input_ids, position_ids=position_ids, past_key_values=past_key_values, **kwargs
        )


class BlindToPacking(LlamaForCausalLM):
    """Makes its positions itself, so that packed sequences see each other, whatever it is given."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **kwargs):
        if attention_mask is None or attention_mask.dim() != 2:
            attention_mask = position_ids = None
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )


class OneRowAtATime(LlamaForCausalLM):
    """Tells packed sequences apart in a batch of one row only, as flash attention does in transformers."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        if len(input_ids) > 1 and (attention_mask is None or attention_mask.dim() != 2):
            attention_mask = position_ids = None
        if attention_mask is not None and attention_mask.dim() != 2:
            attention_mask = position_ids = None
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs
        )


class Both(ShiftedLeft, BlindToPacking):
    """Wrong in both ways."""


class SeesBehind(LlamaForCausalLM):
    """Is told what comes."""

    def forward(self, input_ids=None, **kwargs):
        output = super().forward(input_ids=input_ids, **kwargs)
        output.logits = (
            output.logits
            + input_ids.float().mean(-1)[:, None, None].sin() * torch.arange(output.logits.shape[-1]) / 20
        )
        return output


def made_up(cls):
    torch.manual_seed(0)
    config = tiny_model(len(TOKENIZER)).config
    model = cls(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize(
    ("cls", "together", "packing"),
    [(ShiftedLeft, "equal", False), (BlindToPacking, "padded", False), (Both, "equal", False)],
)
@pytest.mark.filterwarnings("ignore:.*packed sequences")
def test_made_up_classes_are_found(cls, together, packing):
    model = made_up(cls)
    td = played(TransformersPolicy(model, TOKENIZER, max_new_tokens=12))
    assert carried(model, td) < LIMIT
    assert prover_of(model).sampling()[0] == together
    view = training_view(td, group=None, layout="packed")
    scores = sequence_log_probs(model, view, vocab_size=len(TOKENIZER))
    reference = torch.cat([alone(model, t.tokens)[t.mask] for t in ledgers(td)])
    assert float((scores.log_probs[scores.mask] - reference).abs().max()) < LIMIT
    assert (prover_of(model).packing() is not None) == packing


def test_kernels_that_take_one_packed_row_get_one():
    model = made_up(OneRowAtATime)
    td = played(TransformersPolicy(model, TOKENIZER, max_new_tokens=12))
    longest = max(map(len, ledgers(td)))
    view = training_view(td, group=None, layout="packed", max_tokens=longest)
    assert len(view["tokens"].full) > 1
    scores = sequence_log_probs(model, view, vocab_size=len(TOKENIZER))
    assert prover_of(model).record()["packing"] == "positions, row by row"
    expected = torch.cat([alone(model, t.tokens)[t.mask] for t in ledgers(td)])
    assert float((by_sequence(view, scores.mask, scores.log_probs, 3) - expected).detach().abs().max()) < LIMIT


def test_a_model_that_sees_behind_is_refused():
    with pytest.raises(ModelError, match="SeesBehind is not causal: .* nats"):
        played(TransformersPolicy(made_up(SeesBehind), TOKENIZER, max_new_tokens=4))


def test_a_packed_view_that_is_taken_apart_says_so_once():
    model = made_up(BlindToPacking)
    td = played(TransformersPolicy(model, TOKENIZER, max_new_tokens=6))
    view = training_view(td, group=None, layout="packed")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            sequence_log_probs(model, view)
    [said] = [str(w.message) for w in told if w.category is RuntimeWarning]
    assert re.match("BlindToPacking cannot tell packed sequences apart .*nats off", said)


# ---------------------------------------------------------------------- the mode
class TestMode:
    def model(self, dropout: float = 0.0):
        model = zoo.make("gpt2")
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout
        return model

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_sampling_is_in_eval_and_gives_the_mode_back(self, checkpointing):
        """With dropout, and with layers whose cache checkpointing drops."""
        model = self.model(dropout=0.3)
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        frozen = model.transformer.h[0].eval()
        for queries in (QUERIES, QUERIES[:1] * 3):
            td = played(TransformersPolicy(model, TOKENIZER, max_new_tokens=12), queries)
            assert (model.training, frozen.training, model.transformer.h[1].training) == (True, False, True)
            with evaluating(model):
                assert carried(model, td) < 1e-5

    def test_it_is_given_back_after_an_error(self):
        model = self.model().train()
        with pytest.raises(IndexError), evaluating(model):
            model.transformer.h[int(model.training) - 100]
        assert all(module.training for module in model.modules())

    def test_what_is_not_a_module_is_left_alone(self):
        with evaluating(len):
            pass


# ---------------------------------------------------------------------- the proof
class TestProof:
    def test_it_is_made_once_and_outlives_weights(self, monkeypatch):
        model, made = zoo.make("llama"), []
        begun = proof._begun
        monkeypatch.setattr(proof, "_begun", lambda *a, **k: made.append(a[0]) or begun(*a, **k))
        first = prover_of(model).proof
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01)
        assert prover_of(model).proof is first
        model.to(torch.bfloat16)
        assert prover_of(model).proof is not first
        assert prover_of(model).proof.limit > LIMIT
        assert prover_of(model).sampling() == ("padded", True)
        scores = sequence_log_probs(model, _alone_view(torch.arange(9) + 5, torch.ones(9, dtype=torch.bool)))
        assert (scores.precision, scores.log_probs.dtype) == (torch.bfloat16, torch.float32)

    def test_what_a_model_raises_is_no_way_for_its_rows(self):
        class Refuses(LlamaForCausalLM):
            def forward(self, input_ids=None, attention_mask=None, **kwargs):
                if attention_mask is not None and not attention_mask.all():
                    raise RuntimeError
                return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

        prover = prover_of(made_up(Refuses))
        assert prover.sampling() == ("equal", True)
        assert str(prover.proof.checks["sampling, rows of any length together"]) == "RuntimeError: "

    def test_a_want_of_memory_is_no_finding(self):
        class Full(LlamaForCausalLM):
            full = True

            def forward(self, input_ids=None, attention_mask=None, **kwargs):
                if self.full and attention_mask is not None:
                    raise torch.OutOfMemoryError("now")
                return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

        model = made_up(Full)
        with pytest.raises(torch.OutOfMemoryError):
            prover_of(model).sampling()
        Full.full = False
        assert prover_of(model).sampling() == ("padded", True)

    def test_it_keeps_no_model(self):
        model = made_up(LlamaForCausalLM)
        prover_of(model).record()
        kept = weakref.ref(model)
        del model
        gc.collect()
        assert kept() is None

    def test_it_changes_neither_the_mode_nor_the_random_state(self):
        model = TestMode().model(dropout=0.1).train()
        frozen = model.transformer.h[0].eval()
        before = torch.get_rng_state()
        prover_of(model).record()
        assert (model.training, frozen.training, model.transformer.h[1].training) == (True, False, True)
        assert torch.equal(torch.get_rng_state(), before)

    def test_what_is_scored_in_train_is_tried_there_too(self):
        class OtherwiseInTrain(LlamaForCausalLM):
            def forward(self, input_ids=None, attention_mask=None, **kwargs):
                mask = None if self.training else attention_mask
                shift = 0 if attention_mask is None or not self.training else (attention_mask == 0).sum()
                output = super().forward(input_ids=input_ids, attention_mask=mask, **kwargs)
                output.logits = output.logits + shift * torch.arange(output.logits.shape[-1]) / 20
                return output

        model = made_up(OtherwiseInTrain)
        td = played(TransformersPolicy(model, TOKENIZER, max_new_tokens=12))
        expected = torch.cat([alone(model, t.tokens)[t.mask] for t in ledgers(td)])
        for training, together in ((False, "padded"), (True, "equal"), (False, "padded")):
            model.train(training)
            assert prover_of(model).scoring() == together
            assert prover_of(model).sampling()[0] == "padded"
            scores = sequence_log_probs(model, training_view(td, group=None), vocab_size=len(TOKENIZER))
            assert float((scores.log_probs[scores.mask] - expected).abs().max()) < LIMIT
        assert "scoring, rows of any length together, in train()" in prover_of(model).proof.checks

    def test_with_dropout_eval_decides(self):
        model = TestMode().model(dropout=0.3).train()
        record = prover_of(model).record()
        assert (record["scoring"], record["packing"]) == ("rows of any length together", "positions")
        assert record["random"] > record["limit"] > max(record["checks"].values())
        assert not any(name.startswith("scoring") and "train" in name for name in record["checks"])
        assert record["small_copy"]["scoring, rows of any length together, in train()"] < LIMIT

    def test_a_model_that_is_right_in_short_rows_only_is_right_there_and_refused_beyond(self):
        """Doge keeps so many keys a head, and which of two that tie depends on how long the row is."""
        config = small_config(zoo.CONFIG_MAPPING["doge"]())
        config.keep_window_size = 48
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        widen(model)
        td = played(TransformersPolicy(model, TOKENIZER, max_new_tokens=5), ("1+1=", "2+2="))
        assert max(map(len, ledgers(td))) <= 48
        assert carried(model, td) < LIMIT
        for options in VIEWS.values():
            view = training_view(td, group=None, **options)
            scores = sequence_log_probs(model, view, vocab_size=len(TOKENIZER))
            found = by_sequence(view, scores.mask, scores.log_probs, 2)
            expected = torch.cat([alone(model, t.tokens)[t.mask] for t in ledgers(td)])
            assert float((found - expected).abs().max()) < LIMIT
        row = torch.arange(49) % 50 + 5
        with pytest.raises(
            ModelError, match=r"DogeForCausalLM: in rows of more than 48 tokens .* a row of 49 tokens"
        ):
            sequence_log_probs(model, _alone_view(row, torch.ones(49, dtype=torch.bool)))
        with pytest.raises(ModelError, match="a row of 49 tokens"):
            generate(model, [row[:40]], stop_ids=set(), most=[9])
        with pytest.raises(ModelError, match="a row of 49 tokens"):
            token_logits(model, [row], [torch.ones(49, dtype=torch.bool)], len(TOKENIZER), 1.0)

    def test_a_small_copy_has_every_kind_of_layer_and_short_windows(self):
        config = small_config(zoo.CONFIG_MAPPING["gpt_oss"]())
        assert set(config.layer_types) == {"sliding_attention", "full_attention"}
        assert (config.sliding_window, config.vocab_size) == (8, VOCABULARY)
        shared = small_config(zoo.CONFIG_MAPPING["gemma3n_text"]())
        own = shared.layer_types[: -shared.num_kv_shared_layers]
        assert set(own) == set(shared.layer_types[len(own) :]) == {"sliding_attention", "full_attention"}

    def test_weights_that_have_learned_nothing_yet_hide_nothing(self):
        """As they are initialised, every distribution is nearly uniform, and every way looks right."""
        torch.manual_seed(0)
        model = ShiftedLeft(tiny_model(len(TOKENIZER)).config).eval()
        for parameter in model.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=1e-4)
        assert prover_of(model).sampling()[0] == "equal"


# ---------------------------------------------------------------------- the head, some states at a time
class Largest(TorchDispatchMode):
    """The most numbers that any tensor has that is made inside."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return made


def with_lora_head():
    return peft.get_peft_model(
        zoo.make("llama"), peft.LoraConfig(r=4, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    ).eval()


def frozen_head():
    model = zoo.make("gemma2")
    return model.lm_head.requires_grad_(False) and model


def tied():
    model = zoo.make("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


class NothingAround(LlamaForCausalLM):
    """Its body is no module that is called, so that it cannot be left out."""

    def forward(self, input_ids=None, logits_to_keep=0, **kwargs):
        hidden = self.model.forward(input_ids=input_ids, **kwargs)
        return CausalLMOutputWithPast(logits=self.lm_head(hidden[0]), past_key_values=hidden.past_key_values)


class TestHead:
    MODELS = {
        **{name: lambda name=name: zoo.make(name) for name in ("llama", "gemma2", "cohere", "granite", "phi", "roberta", "opt")},
        "tied": tied, "frozen": frozen_head, "adapter": with_lora_head, "nothing around": lambda: made_up(NothingAround),
    }  # fmt: skip

    @pytest.mark.parametrize("name", MODELS)
    @pytest.mark.parametrize("entropy", [False, True])
    def test_log_probs_entropies_and_gradients_are_those_of_all_logits(self, name, entropy):
        model = self.MODELS[name]()
        rows = torch.randint(5, 60, (3, 12), generator=torch.Generator().manual_seed(0))
        flat = layouts.Flat.of(list(rows), mask=[torch.arange(12) > 3] * 3, log_probs=[torch.zeros(12)] * 3)
        view = TensorDict(layouts.padded(flat, None, "right", 0, 1), batch_size=(3,))
        weights = [p for p in model.parameters() if p.requires_grad]
        factors, more = torch.randn(2, 24, generator=torch.Generator().manual_seed(0))

        def gradient(scores, entropies):
            loss = (scores * factors).sum() + ((entropies * more).sum() if entropy else 0)
            return torch.autograd.grad(loss, weights, allow_unused=True)

        logits = model(input_ids=rows, use_cache=False).logits[:, 3:-1, : len(TOKENIZER)] / 0.7
        whole = logits.log_softmax(-1)
        expected = whole.gather(-1, rows[:, 4:, None]).flatten(), -(whole.exp() * whole).sum(-1).flatten()
        of_expected = gradient(*expected)
        settings = {"temperature": 0.7, "vocab_size": len(TOKENIZER), "entropy": entropy}
        for chunk in (5, None):
            scores = sequence_log_probs(model, view, chunk=chunk, **settings)
            found = scores.log_probs[scores.mask], scores.entropy[scores.mask] if entropy else None
            assert torch.allclose(found[0], expected[0], atol=1e-5)
            if entropy:
                assert torch.allclose(found[1], expected[1], atol=1e-5)
            for a, b in zip(gradient(*found), of_expected, strict=True):
                assert (a is None or not bool(a.any())) if b is None else torch.allclose(a, b, atol=1e-4)
        assert prover_of(model).chunking() == (name not in ("nothing around", "adapter"))

    def test_nothing_is_as_large_as_all_logits_forward_or_backward(self):
        """Twenty thousand ids, and a body that is small beside them."""
        model = tiny_model(20_000)
        rows = torch.randint(5, 20_000, (4, 65), generator=torch.Generator().manual_seed(0))
        flat = layouts.Flat.of(list(rows), mask=[torch.arange(65) > 0] * 4, log_probs=[torch.zeros(65)] * 4)
        view = TensorDict(layouts.padded(flat, None, "right", 0, 1), batch_size=(4,))
        prover_of(model).record()
        weight = max(p.numel() for p in model.parameters())
        for options in ({}, {"entropy": True}):
            with Largest() as made:
                scores = sequence_log_probs(model, view, chunk=16, **options)
                (scores.log_probs.sum() + (scores.entropy.sum() if options else 0)).backward()
            assert 16 * 20_000 <= made.numbers <= max(weight, 16 * 20_000) < 256 * 20_000

    @pytest.mark.parametrize("name", ["llama", "gemma2"])
    def test_under_autocast_the_backward_pass_computes_what_the_forward_pass_did(self, name):
        """Also where the model is first used there: what is found of it is found without."""
        model = zoo.make(name)
        view = _alone_view(torch.arange(12) + 5, torch.arange(12) > 3)
        gradients = []
        for chunk in (3, 100):
            with torch.autocast("cpu", torch.bfloat16):
                scores = sequence_log_probs(model, view, chunk=chunk)
            scores.log_probs.sum().backward()
            gradients.append((scores.log_probs.detach(), model.lm_head.weight.grad.clone()))
            model.zero_grad()
        (few, of_few), (all_, of_all) = gradients
        assert torch.equal(few, all_)
        assert (
            float((of_few - of_all).norm() / of_all.norm()) < 4e-3
        )  # a rounding of bfloat16 for each of the chunks
        assert prover_of(model).chunking()
        assert prover_of(model).scoring() == "padded"

    @pytest.mark.parametrize("entropy", [False, True])
    def test_a_head_that_is_not_trained_is_asked_once(self, monkeypatch, entropy):
        """Its gradient by the states is there when its logits are."""
        model, view = frozen_head(), _alone_view(torch.arange(12) + 5, torch.arange(12) > 3)
        scores = sequence_log_probs(model, view, entropy=entropy, chunk=4)
        monkeypatch.delattr(Head, "apart")
        (scores.log_probs.sum() + (scores.entropy.sum() if entropy else 0)).backward()
        assert all(weight.grad is not None for weight in model.model.layers.parameters())

    def test_what_is_first_used_without_autograd_is_trained_like_any_other(self):
        proof._small.clear()  # the copy of this class may be there already
        model = made_up(LlamaForCausalLM)
        with torch.inference_mode():
            generate(model, [torch.tensor([5, 6, 7])], stop_ids=set(), most=[3])
        assert prover_of(model).chunking()

    def test_a_head_with_dropout_in_its_adapter_has_the_gradient_of_the_pass_that_was_made(self):
        """By finite differences, with the same random numbers for each pass."""
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["lm_head"], lora_dropout=0.5, init_lora_weights=False)
        model = peft.get_peft_model(zoo.make("llama"), config).double().train()
        view = _alone_view(torch.arange(12) + 5, torch.arange(12) > 3)
        weights = [p for p in model.parameters() if p.requires_grad]
        ways = [torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).double() for p in weights]

        def total():
            torch.manual_seed(3)
            return sequence_log_probs(model, view, chunk=4).log_probs.sum()

        total()  # the proof draws as well
        gradients = torch.autograd.grad(total(), weights)
        found = sum(float((g * way).sum()) for g, way in zip(gradients, ways, strict=True))
        step, said = 1e-3, []
        for sign in (1, -1):
            with torch.no_grad():
                for weight, way in zip(weights, ways, strict=True):
                    weight.add_(sign * step * way)
                said.append(float(total()))
                for weight, way in zip(weights, ways, strict=True):
                    weight.sub_(sign * step * way)
        assert found == pytest.approx((said[0] - said[1]) / (2 * step), rel=2e-2)

    def test_hooks_of_others_on_the_head_are_part_of_the_model(self):
        model, view = zoo.make("llama"), _alone_view(torch.arange(12) + 5, torch.arange(12) > 3)
        model.lm_head.register_forward_hook(lambda _module, _args, output: output * 2)
        logits = model(input_ids=view["tokens"].full).logits[0, 3:-1]
        expected = torch.autograd.grad(
            logits.log_softmax(-1).gather(-1, view["tokens"].full[0, 4:, None]).sum(), model.lm_head.weight
        )
        found = torch.autograd.grad(sequence_log_probs(model, view).log_probs.sum(), model.lm_head.weight)
        assert torch.allclose(found[0], expected[0], atol=1e-4)

    def test_what_is_impossible_has_no_entropy_and_no_gradient(self):
        class Forbids(LlamaForCausalLM):
            def forward(self, **given):
                output = super().forward(**given)
                output.logits = output.logits.clone()
                output.logits[..., :5] = -torch.inf
                return output

        model, view = made_up(Forbids), _alone_view(torch.arange(12) + 5, torch.arange(12) > 3)
        scores = sequence_log_probs(model, view, entropy=True)
        assert scores.entropy.isfinite().all()
        (scores.log_probs.sum() + scores.entropy.sum()).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)

    def test_values_of_a_model_whose_head_nobody_sees(self):
        class Direct(LlamaForCausalLM):
            def forward(self, input_ids=None, logits_to_keep=0, **given):
                hidden = self.model(input_ids=input_ids, **given)
                return CausalLMOutputWithPast(logits=nn.functional.linear(hidden[0], self.lm_head.weight))

        model = made_up(Direct)
        view = _alone_view(torch.arange(12) + 5, torch.arange(12) > 3)
        assert sequence_log_probs(model, view).log_probs.isfinite().all()
        with pytest.raises(ModelError, match="Direct does not call its output head as a module"):
            PolicyAndValue(model)(view)

    def test_the_model_is_as_it_was_also_after_an_error(self):
        model = zoo.make("llama")
        head, ids = Head(model), torch.arange(6)[None]
        with head.held_back((0, slice(None))) as seen:
            model(input_ids=ids)
        before = model(input_ids=ids).logits
        with pytest.raises(RuntimeError), head.apart() as logits_of:
            logits_of(torch.zeros(3, 7))  # of another width
        assert torch.equal(model(input_ids=ids).logits, before)
        with head.apart() as logits_of:
            assert torch.allclose(logits_of(seen[0][2:4])[0], before[0, 2:4], atol=1e-6)


# ---------------------------------------------------------------------- ropes that change
def longrope(length: int = 24, kind: str = "longrope"):
    size = {"rope_type": kind, "rope_theta": 1e4, "factor": 10.0}
    if kind == "longrope":
        size |= {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": length}
    config = LlamaConfig(
        vocab_size=len(TOKENIZER), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=length if kind == "dynamic" else 512, rope_parameters=size,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.25)
    return model


def by_beginnings(model, ids):
    """What the model says of each token after a pass over what stands before it, and no more."""
    with torch.no_grad():
        said = [
            model(input_ids=ids[None, :n], use_cache=False).logits[0, -1, : len(TOKENIZER)]
            for n in range(1, len(ids))
        ]
    scores = torch.stack(said).float().log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
    return torch.cat((torch.zeros(1), scores))


@pytest.mark.parametrize("length", [16, 24, 40])
@pytest.mark.parametrize("layout", ["ragged", "padded", "left", "packed"])
@pytest.mark.by_day(3)
def test_rows_that_cross_a_ropes_limit_are_scored_as_they_were_sampled(length, layout):
    """Rows below it, above it and across it, in one batch."""
    model = longrope(length)
    assert rope_change(model).length == length
    td = played(TransformersPolicy(model, TOKENIZER, max_new_tokens=14))
    sides = {(len(t) > length, int(t.mask.nonzero()[0]) > length) for t in ledgers(td)}
    assert len(sides) > 1
    reference = [by_beginnings(model, t.tokens)[t.mask] for t in ledgers(td)]
    for t, expected in zip(ledgers(td), reference, strict=True):
        assert torch.allclose(t.log_probs[t.mask], expected, atol=1e-4)
    options = {"left": {"layout": "padded", "side": "left"}}.get(layout, {"layout": layout})
    scores = sequence_log_probs(model, training_view(td, group=None, **options), vocab_size=len(TOKENIZER))
    assert torch.allclose(scores.log_probs[scores.mask], torch.cat(reference), atol=1e-4)
    ids = [t.tokens for t in ledgers(td)]
    logits, _ = token_logits(model, ids, [torch.ones_like(i, dtype=torch.bool) for i in ids], len(TOKENIZER), 1.0)
    for row, t, expected in zip(logits, ledgers(td), reference, strict=True):
        found = row[-len(t) :].log_softmax(-1).gather(-1, t.tokens[:, None])[:, 0][t.mask]
        assert torch.allclose(found, expected, atol=1e-4)


def test_a_rope_that_is_another_for_each_length_ends_where_it_begins_to_change():
    model = longrope(64, "dynamic")
    ids, _ = generate(model, [torch.tensor([5, 6, 7])], stop_ids=set(), most=[61])
    assert len(ids[0]) == 61
    with pytest.raises(ModelError, match="beyond 64 tokens .*'dynamic'.* a row of 65 tokens"):
        generate(model, [torch.tensor([5, 6, 7])], stop_ids=set(), most=[62])
    with pytest.raises(ModelError, match="beyond 64 tokens"):
        sequence_log_probs(model, _alone_view(torch.arange(70) % 50 + 5, torch.ones(70, dtype=torch.bool)))


# ---------------------------------------------------------------------- trees of what sequences begin with alike
class TestTrees:
    @settings(deadline=None, max_examples=60)
    @given(st.data())
    def test_every_token_stands_behind_what_it_followed_and_is_trained_once(self, data):
        """Sequences of three tokens that begin alike now and then, with what is trained anywhere in them."""
        count = data.draw(st.integers(1, 7))
        token = st.integers(0, 2)
        sequences = [data.draw(st.lists(token, min_size=1, max_size=12)) for _ in range(count)]
        trained = [data.draw(st.lists(st.booleans(), min_size=len(s), max_size=len(s))) for s in sequences]
        lengths = list(map(len, sequences))
        most = data.draw(st.one_of(st.none(), st.integers(max(lengths), 30)))
        ids, mask = np.concatenate(sequences), np.concatenate(trained)
        rows = trees.rows_of_trees(ids, mask, lengths, most)
        seen, starts = [], np.cumsum([0, *lengths])
        for row in rows:
            assert most is None or len(row.source) <= most
            for at, (source, position, parent, end) in enumerate(zip(*row, strict=True)):
                number = int(np.searchsorted(starts, source, side="right")) - 1
                path = [i for i in range(at + 1) if row.ends[i] > at]
                assert ids[row.source[path]].tolist() == sequences[number][: position + 1]
                assert position == len(path) - 1 == source - starts[number]
                assert parent == (path[-2] if position else -1)
                assert end > at
                seen += [source] if mask[source] else []
        assert sorted(seen) == np.flatnonzero(mask).tolist()
        assert sum(len(row.source) for row in rows) <= len(ids)

    def test_a_prompt_stands_once_and_answers_that_begin_alike_stand_apart(self):
        ids = np.array([5, 6, 7, 1, 2, 5, 6, 7, 1, 3])
        [row] = trees.rows_of_trees(
            ids, np.array([False] * 3 + [True] * 2 + [False] * 3 + [True] * 2), [5, 5], None
        )
        assert row.source.tolist() == [0, 1, 2, 3, 4, 8, 9]
        assert row.parents.tolist() == [-1, 0, 1, 2, 3, 2, 5]
        assert row.ends.tolist() == [7, 7, 7, 5, 5, 7, 7]

    def test_what_does_not_pay_is_not_shared(self):
        """A word that everything begins with would make one row of all, in which each token's mask is as long as that."""
        ids = [np.concatenate(([1], np.full(3000, 2 + i))) for i in range(20)]
        rows = trees.rows_of_trees(np.concatenate(ids), np.zeros(20 * 3001, bool), [3001] * 20, None)
        assert [len(row.source) for row in rows] == [3001] * 20
        shared = [np.concatenate((np.arange(800), np.full(100, 2 + i))) for i in range(8)]
        [row] = trees.rows_of_trees(np.concatenate(shared), np.zeros(8 * 900, bool), [900] * 8, None)
        assert len(row.source) == 1600

    @pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_oss", "gemma3", "mamba"])
    @pytest.mark.parametrize("most", [None, 100])
    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.by_day(2)
    def test_log_probs_and_gradients_are_those_of_the_rows(self, name, most):
        """Two groups, of two turns; where the model cannot share, the sequences are taken apart."""
        model = zoo.make(name)
        td = played(TransformersPolicy(model, TOKENIZER, max_new_tokens=12), QUERIES[:1] * 3 + QUERIES[2:] * 2)
        view = training_view(td, group=None, layout="tree", max_tokens=most)
        scores = sequence_log_probs(model, view, vocab_size=len(TOKENIZER))
        numbers, flat = view["sequence_ids"][scores.mask], scores.log_probs[scores.mask]
        found = torch.cat([flat[numbers == i] for i in range(5)])
        expected = torch.cat([alone(model, t.tokens)[t.mask] for t in ledgers(td)])
        assert torch.allclose(found, expected, atol=1e-4)
        factors = torch.randn(len(expected), generator=torch.Generator().manual_seed(0))
        gradients = []
        for values in (found, expected):
            model.zero_grad()
            (values * factors).sum().backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        assert float((gradients[0] - gradients[1]).norm() / gradients[1].norm()) < 1e-4
        assert most or int(view["masks"].all_attention_mask.sum()) < sum(map(len, ledgers(td)))

    @pytest.mark.parametrize(
        ("name", "options", "view"),
        [
            ("llama", {}, {"layout": "padded"}),
            ("llama", {"max_tokens": 260}, {"layout": "ragged"}),
            ("llama", {"chunk": 3, "entropy": True}, {"layout": "padded", "side": "left"}),
            ("gpt_oss", {"max_tokens": 260, "entropy": True}, {"layout": "padded"}),
            ("mamba", {}, {"layout": "ragged"}),
        ],
    )
    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.by_day(2, place=1)
    def test_views_of_rows_share_what_they_begin_with(self, name, options, view):
        """A group, an answer that is there twice, and one that begins otherwise: in the places of the view."""
        model = zoo.make(name)
        td = played(TransformersPolicy(model, TOKENIZER, max_new_tokens=12), QUERIES[1:2] * 4 + QUERIES[:1])
        laid = training_view(td, group=None, **view)[torch.tensor([0, 3, 1, 1, 4, 2])]
        forwarded, found = [], []
        layer = next(m for m in model.modules() if isinstance(m, nn.ModuleList))[0]
        layer.register_forward_pre_hook(lambda _module, args: forwarded.append(args[0].shape[:2].numel()))
        critic = PolicyAndValue(model)
        nn.init.normal_(critic.head.weight, generator=torch.Generator().manual_seed(0))
        weights = [p for p in critic.parameters() if p.requires_grad]
        critic(laid, share_prefixes=True, **options)  # the proofs
        for share in (False, True):
            forwarded.clear()
            scores, values = critic(laid, vocab_size=len(TOKENIZER), share_prefixes=share, **options)
            loss = (
                scores.log_probs * torch.arange(scores.log_probs.numel()).reshape(scores.log_probs.shape).sin()
            ).sum()
            gradients = torch.autograd.grad(loss + values.square().sum(), weights, allow_unused=True)
            entropy = values if scores.entropy is None else scores.entropy
            flat = torch.cat([g.flatten() for g in gradients if g is not None])
            found.append((scores.mask, scores.log_probs, values, entropy, flat, sum(forwarded)))
        (mask, *plain, tokens), (same_mask, *shared, fewer) = found
        assert torch.equal(mask, same_mask)
        for a, b in zip(plain[:3], shared[:3], strict=True):
            assert float((a - b).detach().abs().max()) < 1e-3
        assert float((plain[3] - shared[3]).norm() / plain[3].norm()) < 1e-4
        assert fewer < 0.85 * tokens if name != "mamba" else fewer == tokens

    def test_rows_that_share_little_stay_as_they_are(self):
        model = zoo.make("llama")
        ids = torch.randint(5, 60, (3, 20), generator=torch.Generator().manual_seed(0))
        flat = layouts.Flat.of(list(ids), mask=[torch.arange(20) > 3] * 3, log_probs=[torch.zeros(20)] * 3)
        view = TensorDict(layouts.padded(flat, None, "right", 0, 1), batch_size=(3,))
        widths = []
        model.model.layers[0].register_forward_pre_hook(
            lambda _module, args: widths.append(tuple(args[0].shape[:2]))
        )
        sequence_log_probs(model, view, share_prefixes=True)
        assert widths[-1] == (3, 20)


class TestAudit:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("model")
        tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        tiny_model(len(tokenizer)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    def test_it_shows_what_was_found_of_the_model(self, folder, capsys):
        assert main(["audit", folder, "--model"]) == 0
        shown = capsys.readouterr().out
        assert "LlamaForCausalLM" in shown
        assert re.search(r"sampling +rows of any length together\n", shown)
        assert re.search(r"packed views +told apart by positions\n", shown)
        assert re.search(r"scoring, rows of any length together +\d\.\de-\d\d\n", shown)

    def test_as_plain_data(self, folder, capsys):
        assert main(["audit", folder, "--model", "--dtype", "bfloat16", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)["model"]
        assert (found["class"], found["dtype"], found["sharing"]) == ("LlamaForCausalLM", "bfloat16", "mask")
        assert found["limit"] > LIMIT > max(found["small_copy"].values())
        assert 1e-5 < found["rounding"] < found["limit"]
        assert set(found["checks"]) == set(found["small_copy"])

    def test_without_being_asked_nothing_is_said_of_models(self, folder, capsys):
        assert main(["audit", folder, "--json"]) == 0
        assert "model" not in json.loads(capsys.readouterr().out)

    def test_a_type_that_is_none(self, folder, capsys):
        assert main(["audit", folder, "--model", "--dtype", "int8"]) == 2
        assert "--dtype int8: expected float32" in capsys.readouterr().err
