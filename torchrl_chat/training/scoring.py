"""Log-probs of given tokens under a model, without more logits than there are tokens to score.

The logits of a large vocabulary are what fills memory, not the model: 32,768 tokens of 150,000 logits are 20 GB in
float32. So the output head (:mod:`~torchrl_chat.models.head`) is only shown the hidden states whose next token counts, and
those a chunk at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase

from torchrl_chat import columns
from torchrl_chat.models.divergence import AllTokens, Direction, Divergence, LikeliestTokens
from torchrl_chat.models.head import Head
from torchrl_chat.models.passes import ModelError, as_one_pass, float_type, groups_of
from torchrl_chat.models.token_scores import TokenScores, token_scores
from torchrl_chat.training.passing import Dense, Passing, dense_of, passing_of


class Scores(NamedTuple):
    """What a model says of the tokens of a view."""

    log_probs: torch.Tensor  # float32 (N, T) or (M, L), 0 where the mask is false
    mask: torch.Tensor  # bool, the tokens that were scored
    precision: torch.dtype  # in which the model computed, whatever the type of the log-probs
    entropy: torch.Tensor | None = None  # the same shape, of the distribution that the token was drawn from
    values: torch.Tensor | None = None  # float32 like the log-probs, if a critic was given
    divergence: torch.Tensor | None = (
        None  # the same shape, of that distribution from the teacher's, if one was given
    )
    loss: torch.Tensor | None = (
        None  # the sum over the tokens, if one was given; what else there is has no gradient then
    )


Loss = Callable[[TokenScores, torch.Tensor], torch.Tensor]
"""The sum of a loss over some tokens. It is told what the model says of these, float32 (k,) each, with gradients; and where they
stand in the view, int64 (k,), an index into its flattened columns. Each token comes once, in any order, some at a time."""


# What a pass is worth: values (K,) of the hidden states (K, H) before the scored tokens, which stand at the given places of
# some rows.
Critic = Callable[[torch.Tensor, Dense, Passing, Any], torch.Tensor]


def sequence_log_probs(
    model: Any,
    view: TensorDictBase,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    entropy: bool = False,
    max_tokens: int | None = None,
    chunk: int | None = None,
    share_prefixes: bool = False,
    critic: Critic | None = None,
    loss: Loss | None = None,
    teacher: AllTokens | LikeliestTokens | None = None,
    direction: Direction = "reverse",
) -> Scores:
    """The log-prob of every trained token of a view, given the tokens before it.

    Args:
        model: a transformers causal language model (or a PEFT model of one) with an output head.
        view: what :func:`training_view` gives, in any layout; ragged rows are padded on the right.

    Keyword Args:
        temperature: that of the sampling distribution, by which logits are divided.
        vocab_size: logits from this id on are cut off (embeddings are often longer than the vocabulary, and
            nothing samples those ids).
        entropy: whether the entropies are computed too.
        max_tokens: the rows go through the model in minibatches of at most so many tokens, padding included (or
            of one row, where that is longer); all at once if ``None``. Without gradients this bounds memory; with
            them see :func:`microbatches`.
        chunk: how many distributions there are at a time; by the size of the vocabulary if ``None``.
        share_prefixes: what rows of a ragged or padded view begin with alike (the prompt of a group, the turns before a branch)
            goes through the model once, where the model's proof allows it and it saves a tenth of the work or more; values
            and gradients are the same. A ``"tree"`` view has that already.
        critic: what values are made of hidden states by (:class:`~torchrl_chat.training.values.PolicyAndValue`).
        loss: a loss that is a sum over the tokens, each with what it needs of the view and nothing that is trained but the
            model. It is computed a chunk of tokens at a time, and its gradient with it, for which the output head makes its
            logits once instead of twice; ``scores.loss.backward()`` takes the gradient on through the model.
        teacher: what :func:`teacher_of` gives for these rows, or the tokens that a teacher found likeliest
            (:class:`LikeliestTokens`, in the order of the scored tokens); the divergence of the model's distributions from the
            teacher's is computed then, over all of the vocabulary, with its gradient.
        direction: ``"reverse"`` is KL(model || teacher), ``"forward"`` KL(teacher || model).

    Returns:
        :class:`Scores`, float32 and bool of shape (N, T), or (M, L) for a packed view, but for the dtype that the model computed in
        and the loss, a scalar.

    Raises:
        KeyError: the view lacks tokens or masks.
        ValueError: a token id is outside the model's vocabulary, or a setting is out of range.

    How rows go through the model is what :mod:`~torchrl_chat.models.proof` found right for it, whatever the view's layout.
    Packed rows attend block by block: causal within a sequence, blind to the others. transformers makes such a mask of
    ``position_ids`` that begin anew, for some kernels (flash attention) of one row at a time. Models for which that is not so,
    those that carry a state over positions (Mamba, linear attention) among them, get the sequences of a packed view as padded
    rows, with a warning.

    Example:
        >>> from torchrl_chat import DatasetChatEnv, TransformersPolicy, play, training_view
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_model, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> model = tiny_model(len(tokenizer))
        >>> env = DatasetChatEnv(dataset=[{"query": "2 + 2?"}], tokenizer=tokenizer, input_mode="tokens", num_envs=1)
        >>> policy = TransformersPolicy(model, tokenizer, max_new_tokens=4)
        >>> view = training_view(play(env, policy, max_turns=1), layout="padded")
        >>> scores = sequence_log_probs(model, view)
        >>> ratio = (scores.log_probs - view["log_probs"].full).exp()[scores.mask]
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}: expected more than 0.")
    asked, passes = _passes(model, view, max_tokens, chunk, share_prefixes)
    shape, device = asked.shape, asked.device
    places = asked.flatten().nonzero().squeeze(-1)  # of the scored tokens, in the view
    names = [name for name, there in (("entropy", entropy), ("values", critic), ("divergence", teacher)) if there]
    found: dict[str, list[torch.Tensor]] = {name: [] for name in ("log_probs", *names)}
    numbers, losses = [torch.zeros(0, dtype=torch.int64, device=device)], list[torch.Tensor]()
    for one in passes:
        how: dict[str, Any] = {
            "temperature": temperature,
            "vocab_size": vocab_size,
            "entropy": entropy,
            "chunk": chunk,
            "divergence": None if teacher is None else Divergence(teacher.some(one.numbers), direction),
            "loss": None if loss is None else _of_places(loss, places[one.numbers]),
        }
        told = as_one_pass(model, functools.partial(_score, model, one, critic, how))
        numbers.append(one.numbers)
        for name, values in found.items():
            values.append(told[name])
        if loss is not None:
            losses.append(told["loss"])
    order = torch.cat(numbers).argsort()
    zeros = torch.zeros(shape, device=device)
    whole = {
        name: zeros.masked_scatter(asked, torch.cat(values)[order]) if values else zeros
        for name, values in found.items()
    }
    total = None if loss is None else sum(losses, start=zeros.new_zeros(()))
    return Scores(mask=asked, precision=float_type(model), loss=total, **whole)


def teacher_of(model: Any, view: TensorDictBase, *, max_tokens: int | None = None) -> AllTokens:
    """A teacher's distribution of every trained token of a view, for ``teacher=`` of :func:`sequence_log_probs`.

    What is kept are its hidden states, from which its logits are made where they are needed, a chunk at a time.

    Args:
        model: a model of the same tokens, another than the one that learns.
        view: the very rows that are learned from.
        max_tokens: as in :func:`sequence_log_probs`.

    Raises:
        ModelError: its output head cannot be shown some states at a time.

    Example:
        >>> from torchrl_chat import DatasetChatEnv, TransformersPolicy, play, training_view
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_model, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> model = tiny_model(len(tokenizer))
        >>> env = DatasetChatEnv(dataset=[{"query": "2 + 2?"}], tokenizer=tokenizer, input_mode="tokens", num_envs=1)
        >>> policy = TransformersPolicy(model, tokenizer, max_new_tokens=4)
        >>> view = training_view(play(env, policy, max_turns=1), layout="padded")
        >>> teacher = tiny_model(len(tokenizer))
        >>> taught = teacher_of(teacher, view)
        >>> divergence = sequence_log_probs(model, view, teacher=taught).divergence
    """
    asked, passes = _passes(model, view, max_tokens, None, False)
    width = model.get_output_embeddings().in_features
    states = torch.zeros(int(asked.sum()), width, device=asked.device, dtype=float_type(model))
    head: Head | None = None
    with torch.no_grad():
        for one in passes:
            if (head := one.passing.head) is None or not one.passing.chunked:
                raise ModelError(
                    f"the output head of {type(model).__name__} cannot be shown some hidden states at a time."
                )
            with head.held_back(one.before) as seen:
                as_one_pass(model, functools.partial(one.passing.through, model, one.part))
            states[one.numbers] = seen[0].to(states.dtype)
    return AllTokens(Head(model) if head is None else head, states)


def of_columns(
    terms: Callable[[TokenScores, dict[str, torch.Tensor], torch.Tensor], torch.Tensor],
    own: dict[str, torch.Tensor],
) -> Loss:
    """A loss of what a model says of tokens and of columns of a view, for ``loss=`` of :func:`sequence_log_probs`.

    Args:
        terms: what :func:`~torchrl_chat.training.policy_loss` and its like are called in: it is given scores, columns and a mask,
            all of one shape (N, T), and sums over all tokens under the mask. It may be called with any tokens of the view, (1, k).
        own: the columns, (N, T) each: old log-probs, advantages, :func:`~torchrl_chat.training.token_shares` ...

    Example:
        >>> from torchrl_chat import DatasetChatEnv, TransformersPolicy, play, training_view
        >>> from torchrl_chat.training import token_shares
        >>> import torch
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_model, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> model = tiny_model(len(tokenizer))
        >>> env = DatasetChatEnv(dataset=[{"query": "2 + 2?"}], tokenizer=tokenizer, input_mode="tokens", num_envs=1)
        >>> policy = TransformersPolicy(model, tokenizer, max_new_tokens=4)
        >>> view = training_view(play(env, policy, max_turns=1), layout="padded")
        >>> view["advantage"] = torch.ones_like(view["log_probs"].full)
        >>> own = {"advantage": view["advantage"], "share": token_shares(scored(view))}
        >>> loss = of_columns(lambda scores, own, mask: -(scores.log_probs * own["advantage"] * own["share"]).sum(), own)
        >>> sequence_log_probs(model, view, loss=loss).loss.backward()
    """

    def of_some(scores: TokenScores, at: torch.Tensor) -> torch.Tensor:
        rows = TokenScores(*(None if value is None else value[None] for value in scores))  # type: ignore[arg-type]
        some = {name: value.flatten()[at][None] for name, value in own.items()}
        return terms(rows, some, torch.ones_like(rows.log_probs, dtype=torch.bool))

    return of_some


def scored(view: TensorDictBase, device: torch.device | str = "cpu") -> torch.Tensor:
    """Which tokens of a view :func:`sequence_log_probs` scores, bool (N, T) or (M, L)."""
    return dense_of(view, torch.device(device)).scored


class _Pass(NamedTuple):
    """Rows that go through a model together."""

    passing: Passing
    part: Dense
    wanted: torch.Tensor  # bool, the tokens that are scored
    numbers: torch.Tensor  # int64 (k,), which of the view's scored tokens these are

    @property
    def before(self) -> Any:
        """Where the hidden states stand that say what follows is a wanted token."""
        if self.part.parents is None:
            return torch.nn.functional.pad(self.wanted[:, 1:], (0, 1))
        rows, places = self.wanted.nonzero(as_tuple=True)
        return rows, self.part.parents[rows, places]


def _passes(
    model: Any, view: TensorDictBase, max_tokens: int | None, chunk: int | None, share: bool
) -> tuple[torch.Tensor, list[_Pass]]:
    """Which tokens of a view are scored, (N, T), and the passes in which they are."""
    if (chunk is not None and chunk < 1) or (max_tokens is not None and max_tokens < 1):
        raise ValueError(f"chunk={chunk}, max_tokens={max_tokens}: expected at least 1.")
    device = next(model.parameters()).device
    dense = dense_of(view, device)
    asked = dense.scored
    if not dense.ids.numel():  # a view without rows
        return asked, []
    known, highest = model.get_input_embeddings().num_embeddings, int(dense.ids.max())
    if highest >= known:
        raise ValueError(
            f"the view has the token id {highest}, and the model knows {known} ids: it has another vocabulary."
        )
    passing = passing_of(model, dense, share, max_tokens)
    dense, mask = passing.dense, passing.dense.scored
    count = int(mask.sum())
    order = torch.arange(count, device=device) if passing.order is None else passing.order
    numbers = torch.zeros(mask.shape, dtype=torch.int64, device=device).masked_scatter(mask, order)
    found = []
    for rows, width in _minibatches(dense.attention, mask, max_tokens, passing):
        wanted = mask[rows, :width]
        found.append(_Pass(passing, dense.part(rows, width), wanted, numbers[rows, :width][wanted]))
    return asked, found


def microbatches(view: TensorDictBase, max_tokens: int, needed: torch.Tensor | None = None) -> list[torch.Tensor]:
    """The rows of a ragged or padded view in minibatches of similar length, for gradients to be accumulated over.

    Args:
        view: N sequences.
        max_tokens: how many tokens a minibatch has at most, padding included; a longer row stands alone.
        needed: bool (N,), rows that are to be in one of them at all; every row if ``None``.

    Returns:
        row numbers, int64: ``view[rows]``. Each row in which a token is trained is in one of them; the others (an episode that
        could not be graded, say) are in none, since they add nothing to any sum: the list may be empty.

    Example:
        >>> from torchrl_chat import DatasetChatEnv, TransformersPolicy, play, training_view
        >>> from torchrl_chat.training import policy_loss
        >>> import torch
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_model, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> model = tiny_model(len(tokenizer))
        >>> env = DatasetChatEnv(dataset=[{"query": "2 + 2?"}], tokenizer=tokenizer, input_mode="tokens", num_envs=1)
        >>> policy = TransformersPolicy(model, tokenizer, max_new_tokens=4)
        >>> view = training_view(play(env, policy, max_turns=1), layout="padded")
        >>> old, advantage = view["log_probs"].full, torch.ones(len(view))
        >>> total = view["masks"].all_assistant_mask.sum()
        >>> for rows in microbatches(view, 16384):
        ...     scores = sequence_log_probs(model, view[rows])
        ...     loss, _ = policy_loss(scores.log_probs, old[rows], advantage[rows], scores.mask, denominator=total)
        ...     loss.backward()
    """
    if len(view.batch_size) != 1:
        raise ValueError("a packed view is not split further: pack it with max_tokens instead.")
    attention, sampled = (
        columns.read_field(view.get("masks"), key, view.batch_size) or []
        for key in ("all_attention_mask", "all_assistant_mask")
    )
    # The first token of a sequence is never scored: alone it would leave a loss without a gradient.
    wanted = [True] * len(sampled) if needed is None else needed.tolist()
    chosen = [
        row
        for row, (real, mask) in enumerate(zip(attention, sampled, strict=True))
        if wanted[row] and bool((mask.bool() & (real.cumsum(-1) > 1)).any())
    ]
    # To the last token: a row that is padded on the left stays as wide as it is.
    lengths = [int(attention[row].nonzero().max()) + 1 for row in chosen]
    return [torch.tensor([chosen[i] for i in rows]) for rows in _by_length(lengths, max_tokens)]


def _minibatches(
    attention: torch.Tensor, mask: torch.Tensor, max_tokens: int | None, passing: Passing
) -> Iterator[tuple[torch.Tensor, int]]:
    """Numbers of rows that go together, and how wide they are; rows without a token to score are left out."""
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    # A token may be scored that does not go through the model itself.
    ends = ((attention | mask) * places).amax(-1).tolist()
    chosen = mask.any(-1).nonzero().flatten().tolist()
    groups = groups_of([ends[row] for row in chosen], passing.together) if chosen else []
    if passing.change is not None:
        lengths = attention.sum(-1)[chosen].tolist()
        groups = [part for group in groups for part in passing.change.apart(group, lengths, [0] * len(chosen))]
    for may in groups:
        rows = [chosen[i] for i in may]
        if max_tokens is None:
            parts = [rows]
        else:
            parts = [[rows[i] for i in group] for group in _by_length([ends[row] for row in rows], max_tokens)]
        for group in map(sorted, parts):
            yield torch.tensor(group, device=mask.device), max(ends[row] for row in group)


def _by_length(lengths: list[int], max_tokens: int) -> list[list[int]]:
    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens}: expected at least 1.")
    groups: list[list[int]] = []
    longest = 0
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and (len(groups[-1]) + 1) * longest <= max_tokens:
            groups[-1].append(row)
        else:
            longest = lengths[row]
            groups.append([row])
    return groups


def _of_places(loss: Loss, places: torch.Tensor) -> Callable[[TokenScores, slice], torch.Tensor]:
    """The loss of tokens of one pass, given where these stand in the view."""
    return lambda scores, rows: loss(scores, places[rows])


def _score(model: Any, one: _Pass, critic: Critic | None, how: dict[str, Any]) -> dict[str, Any]:
    """What is asked for of the wanted tokens, (k,) each, in row-major order."""
    passing, dense, before = one.passing, one.part, one.before
    head, seen = passing.head, list[torch.Tensor]()
    if head is None:
        output = passing.through(model, dense)
    else:
        with head.held_back(before, through=not passing.chunked) as seen:
            output = passing.through(model, dense)
    chunked = passing.chunked and bool(seen)  # a compiled model may have no hooks
    states = seen[0] if chunked else output.logits[0 if seen else before]
    found = token_scores(head if chunked else None, states, dense.ids[one.wanted], **how)._asdict()
    if critic is None:
        return found
    if not seen:
        raise ModelError(
            f"{type(model).__name__} does not call its output head as a module (a compiled model does not), so that nobody sees the "
            "hidden states that values are made of: give the model as it is, uncompiled."
        )
    return found | {"values": critic(seen[0], dense, passing, before)}
