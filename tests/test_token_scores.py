"""A loss that is computed beside the log-probs, and the divergence from a teacher: values and gradients of all logits at once."""

from __future__ import annotations

import peft
import pytest
import torch
import zoo
from tensordict import TensorDict
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from torchrl_chat.models.divergence import LikeliestTokens
from torchrl_chat.models.head import Head
from torchrl_chat.models.proof import prover_of
from torchrl_chat.tiny import tiny_model
from torchrl_chat.training import layouts, sequence_log_probs, teacher_of

VOCABULARY = 57  # fewer than the models' logits


def a_view(rows, length=12, prompt=4):
    ids = torch.randint(5, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))
    ids[:, :prompt] = ids[0, :prompt]
    mask = [torch.arange(length) >= prompt] * rows
    flat = layouts.Flat.of(list(ids), mask=mask, log_probs=[torch.zeros(length)] * rows)
    return TensorDict(layouts.padded(flat, None, "right", 0, 1), batch_size=(rows,))


def adapter(model):
    config = peft.LoraConfig(r=4, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


def tied(model):
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def frozen(model):
    return model.lm_head.requires_grad_(False) and model


MODELS = {
    "llama": lambda: zoo.make("llama"),
    "soft caps": lambda: zoo.make("gemma2"),
    "tied": lambda: tied(zoo.make("llama")),
    "frozen head": lambda: frozen(zoo.make("gemma2")),
    "adapter on the head": lambda: adapter(zoo.make("llama")),
}
SETTINGS = {"temperature": 0.7, "vocab_size": VOCABULARY}


def of_all_logits(model, view):
    """Log-probs of all tokens that can be said, (N, T, V), at each trained token."""
    logits = (
        model(input_ids=view["tokens"].full, use_cache=False).logits[:, :, :VOCABULARY] / SETTINGS["temperature"]
    )
    return torch.nn.functional.pad(logits.log_softmax(-1)[:, :-1], (0, 0, 1, 0))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("share", [False, True], ids=["apart", "prefixes shared"])
def test_a_loss_beside_the_scores_is_that_of_the_scores(name, share):
    """Its value, and its gradient by every weight; each token is told once, with its place in the view."""
    model, view = MODELS[name](), a_view(3)
    weights = [p for p in model.parameters() if p.requires_grad]
    mask = view["masks"].all_assistant_mask
    ways = torch.randn(2, *mask.shape, generator=torch.Generator().manual_seed(1))
    told = []

    def loss(scores, at):
        told.append(at)
        gain = torch.minimum((scores.log_probs + 3).exp() * ways[0].flatten()[at], ways[1].flatten()[at])
        return (gain * scores.log_probs.sin()).sum() - 0.1 * (scores.entropy * ways[1].flatten()[at]).sum()

    options = SETTINGS | {"entropy": True, "share_prefixes": share}
    whole = sequence_log_probs(model, view, **options)
    flat = mask.flatten().nonzero().squeeze(-1)
    some = whole._replace(log_probs=whole.log_probs.flatten()[flat], entropy=whole.entropy.flatten()[flat])
    expected = loss(some, flat)
    of_expected = torch.autograd.grad(3 * expected, weights, allow_unused=True)
    for chunk in (5, None):
        told.clear()
        scores = sequence_log_probs(model, view, **options, loss=loss, chunk=chunk)
        assert sorted(torch.cat(told).tolist()) == flat.tolist()
        assert not scores.log_probs.requires_grad
        assert torch.allclose(scores.log_probs, whole.log_probs, atol=1e-5)
        assert torch.allclose(scores.loss, expected, atol=1e-5)
        found = torch.autograd.grad(3 * scores.loss, weights, allow_unused=True)
        for a, b in zip(found, of_expected, strict=True):
            assert (a is None or not bool(a.any())) if b is None else torch.allclose(a, b, atol=1e-4)
    with torch.no_grad():
        assert torch.allclose(sequence_log_probs(model, view, **options, loss=loss).loss, expected, atol=1e-5)


def test_sums_over_the_vocabulary_are_float32_under_autocast():
    model, view = zoo.make("llama"), a_view(2)
    teacher = teacher_of(zoo.make("llama"), view)
    with torch.autocast("cpu", torch.bfloat16):
        scores = sequence_log_probs(model, view, entropy=True, teacher=teacher)
        logits = model(input_ids=view["tokens"].full, use_cache=False).logits[:, 3:-1].float()
    log_probs = logits.log_softmax(-1)
    assert torch.allclose(scores.entropy[scores.mask], -(log_probs.exp() * log_probs).sum(-1).flatten(), atol=1e-5)
    assert torch.allclose(
        scores.log_probs[scores.mask], log_probs.gather(-1, view["tokens"].full[:, 4:, None]).flatten(), atol=1e-5
    )
    assert scores.divergence.dtype == torch.float32


class Made(TorchDispatchMode):
    """What is made inside: the size of the largest, and how many were there at a time that have so many numbers or more."""

    def __init__(self, large):
        super().__init__()
        self.large, self.largest, self.most, self.there = large, 0, 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
                if tensor.numel() >= self.large:
                    self.there.append(StorageWeakRef(tensor.untyped_storage()))
        self.there = [ref for ref in dict.fromkeys(self.there) if not ref.expired()]
        self.most = max(self.most, len(self.there))
        return made


LOSSES = {
    "beside the scores": lambda scores, _at: scores.log_probs.sum() - scores.entropy.sum(),
    "behind them": None,
}


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_is_as_large_as_all_logits_and_of_chunks_there_are_a_few_at_a_time(name):
    """However many tokens there are."""
    model, most = tiny_model(20_000), []
    prover_of(model).record()
    for length in (33, 129):
        with Made(16 * 20_000) as made:
            view = a_view(4, length=length, prompt=1)
            scores = sequence_log_probs(model, view, chunk=16, entropy=True, loss=LOSSES[name])
            (scores.loss if LOSSES[name] else scores.log_probs.sum() - scores.entropy.sum()).backward()
        assert made.largest <= max(*(p.numel() for p in model.parameters()), 16 * 20_000) < 4 * 32 * 20_000
        most.append(made.most)
    assert most[0] == most[1] <= 10


def test_its_gradient_needs_no_second_time_at_the_head(monkeypatch):
    model = zoo.make("llama")
    scores = sequence_log_probs(model, a_view(3), chunk=5, loss=lambda scores, _at: scores.log_probs.sum())
    monkeypatch.delattr(Head, "apart")
    scores.loss.backward(retain_graph=True)
    assert all(weight.grad is not None for weight in model.parameters())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # it is scaled where it lies
        scores.loss.backward()


@pytest.mark.parametrize("loss", [lambda scores, _at: 5 * scores.entropy.sum(), None])
def test_what_is_impossible_has_no_part_in_an_entropy(loss):
    model, view = zoo.make("llama"), a_view(2)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.lm_head.out_features))
    model.lm_head.bias.data[:5] = -torch.inf
    scores = sequence_log_probs(model, view, entropy=True, loss=loss)
    (scores.loss if loss else 5 * scores.entropy.sum()).backward()
    assert all(bool(weight.grad.isfinite().all()) for weight in model.parameters())


def test_where_nothing_is_learned_nothing_is_done_for_it(monkeypatch):
    model, view = zoo.make("llama"), a_view(3)
    sequence_log_probs(model, view)  # its proof
    monkeypatch.delattr(Head, "gradient")
    with torch.no_grad():
        assert not sequence_log_probs(
            model, view, loss=lambda scores, _at: scores.log_probs.sum()
        ).loss.requires_grad


@pytest.mark.parametrize("name", ["llama", "soft caps", "frozen head", "adapter on the head"])
@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("likeliest", [None, 6], ids=["all tokens", "the likeliest"])
def test_a_divergence_is_that_of_all_distributions(name, direction, likeliest):
    model, teacher, view = MODELS[name](), zoo.make("cohere"), a_view(3)
    weights = [p for p in model.parameters() if p.requires_grad]
    mask = view["masks"].all_assistant_mask
    own, theirs = of_all_logits(model, view), of_all_logits(teacher, view).detach()
    if likeliest is None:
        given = teacher_of(teacher, view)
        p, q = own, theirs
    else:
        top = theirs.topk(likeliest, -1)
        given = LikeliestTokens(top.indices[mask], top.values[mask])

        def buckets(log_probs):
            some = log_probs.gather(-1, top.indices)
            rest = log_probs.exp().scatter(-1, top.indices, 0.0).sum(-1, keepdim=True).log()
            return torch.cat((some, rest), -1)

        p, q = buckets(own), buckets(theirs)
    if direction == "forward":
        p, q = q, p
    expected = (p.exp() * (p - q)).sum(-1)
    ways = torch.randn(mask.shape, generator=torch.Generator().manual_seed(1))
    of_expected = torch.autograd.grad((expected * ways)[mask].sum(), weights, allow_unused=True)
    for options in ({"chunk": 5}, {"share_prefixes": True, "entropy": True}):
        scores = sequence_log_probs(model, view, teacher=given, direction=direction, **SETTINGS, **options)
        assert torch.allclose(scores.divergence[mask], expected[mask], atol=1e-5)
        found = torch.autograd.grad((scores.divergence * ways).sum(), weights, allow_unused=True)
        for a, b in zip(found, of_expected, strict=True):
            assert (a is None or not bool(a.any())) if b is None else torch.allclose(a, b, atol=1e-4)


def test_a_model_is_as_far_from_itself_as_nothing_and_from_another_vocabulary_not_at_all():
    model, view = zoo.make("llama"), a_view(2)
    copy = zoo.make("llama")
    copy.load_state_dict(model.state_dict())
    given = teacher_of(copy, view)
    assert sequence_log_probs(model, view, teacher=given).divergence.abs().max() < 1e-6
    with pytest.raises(ValueError, match="the teacher's vocabulary has"):
        sequence_log_probs(tiny_model(VOCABULARY), view, teacher=given)
    with pytest.raises(ValueError, match=r"expected one shape \(K, N\)"):
        LikeliestTokens(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="direction='sideways'"):
        sequence_log_probs(model, view, teacher=given, direction="sideways")
