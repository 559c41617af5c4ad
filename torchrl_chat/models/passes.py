"""Passes through a causal language model: rows together as a whole, packed one behind the other, or token by token.

Nothing here knows whether a way is right for a model: that is tried by :mod:`~torchrl_chat.models.proof`, through these
functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch.nn.utils.rnn import pad_sequence

T = TypeVar("T")

# Under which names transformers' models give back what their next call goes on from. From version 5.24 on it is "cache" in most,
# and two of the others are names of the same, which a model may not be given beside it.
_CACHES = ("cache", "past_key_values", "cache_params", "state", "mems")
_OF_CACHE = ("past_key_values", "cache_params")


Together = Literal["padded", "equal", "alone"]
"""Which rows go through a model together: all, padded to one length; those of one length; none."""


class ModelError(ValueError):
    """A model does not compute what is asked for; the text names the model and says what was measured."""


def unwrapped(model: Any) -> Any:
    """The transformers model inside a PEFT model, a compiled one, or both."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(plain, "_orig_mod", plain)


def float_type(model: Any) -> torch.dtype:
    """In which numbers a model computes: as it says itself (``computes_in``), or as its first weights are that are no integers."""
    told = getattr(model, "computes_in", None)
    if isinstance(told, torch.dtype):
        return told
    return next((p.dtype for p in model.parameters() if p.dtype.is_floating_point), torch.float32)


def as_one_pass(model: Any, compute: Callable[[], T]) -> T:
    """What a function computes that calls a model, and parts of it by themselves.

    A model whose weights lie in parts on several processes (:mod:`~torchrl_chat.learner.sharding`) gathers them once for all of
    it, and finds its gradients through the tensors that come out.
    """
    own: Callable[[Callable[[], T]], T] | None = getattr(model, "as_one_pass", None)
    return compute() if own is None else own(compute)


def groups_of(lengths: Sequence[int], together: Together) -> list[list[int]]:
    """Row numbers in groups that go through a model together."""
    if together == "alone":
        return [[i] for i in range(len(lengths))]
    if together == "padded":
        return [list(range(len(lengths)))]
    by_length: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        by_length.setdefault(length, []).append(i)
    return list(by_length.values())


def left_padded(rows: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids, int64 (T,) each, as one batch (B, T) padded on the left, and its attention mask, bool (B, T)."""
    ids = pad_sequence(list(rows), batch_first=True, padding_side="left")
    lengths = torch.tensor([len(row) for row in rows], device=ids.device)
    return ids, torch.arange(ids.shape[1], device=ids.device) >= (ids.shape[1] - lengths)[:, None]


def whole_pass(model: Any, rows: Sequence[torch.Tensor], padded: bool) -> Any:
    """The model's output for whole rows, whose logits (B, T, V) say what follows each token.

    Args:
        model: a transformers causal language model.
        rows: int64 (T,) each.
        padded: whether they may have different lengths; they are padded on the right then.
    """
    if not padded:
        return model(input_ids=torch.stack(list(rows)), use_cache=False)
    ids = pad_sequence(list(rows), batch_first=True)
    lengths = torch.tensor([len(row) for row in rows], device=ids.device)
    return padded_pass(model, ids, torch.arange(ids.shape[1], device=ids.device) < lengths[:, None])


def padded_pass(model: Any, ids: torch.Tensor, attention: torch.Tensor) -> Any:
    """The output for rows that are padded on the right.

    Args:
        model: a transformers causal language model.
        ids: int64 (B, T).
        attention: bool (B, T), true on what is no padding.
    """
    positions = (attention.cumsum(-1) - 1).clamp(min=0)
    return model(input_ids=ids, attention_mask=attention.long(), position_ids=positions, use_cache=False)


def packed_pass(model: Any, ids: torch.Tensor, positions: torch.Tensor, manner: str) -> Any:
    """The output for rows of several sequences, one behind the other.

    Args:
        model: a transformers causal language model.
        ids: int64 (M, L).
        positions: int64 (M, L), beginning anew with each sequence.
        manner: what tells them apart: the ``"positions"``, from which transformers makes a mask for most architectures, a
            ``"mask"`` that says so itself, or ``"masks"``, one for each kind of layer.

    Raises:
        ValueError: the model has layers of other kinds, for which no mask is known here.
    """
    mask = None
    if manner != "positions":
        sequence = (positions == 0).cumsum(-1)
        mask = _mask(model, positions, sequence[:, :, None] == sequence[:, None, :], manner)
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)


def tree_pass(model: Any, ids: torch.Tensor, positions: torch.Tensor, ends: torch.Tensor, manner: str) -> Any:
    """The output for rows of trees: sequences that begin alike share the tokens that they begin with.

    Args:
        model: a transformers causal language model.
        ids: int64 (M, L), each token in front of all that follow it in some sequence, those of one sequence side by side.
        positions: int64 (M, L), how many tokens stand before it in its sequences.
        ends: int64 (M, L), the place behind the last token that follows it.
        manner: ``"mask"`` or ``"masks"``, as for :func:`packed_pass`.

    Raises:
        ValueError: the model has layers of other kinds, for which no mask is known here.
    """
    places = torch.arange(ids.shape[1], device=ids.device)
    mask = _mask(model, positions, places[None, :, None] < ends[:, None, :], manner)
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)


def _mask(model: Any, positions: torch.Tensor, related: torch.Tensor, manner: str) -> Any:
    """What is added to attention scores (M, 1, L, L): tokens see those before them that they are related to, bool (M, L, L).

    Raises:
        ValueError: the model has layers of other kinds; or of several, and one mask is to do for all.
    """
    config = model.config.get_text_config()
    length = positions.shape[-1]
    seen = {
        "full_attention": related & torch.ones(length, length, dtype=torch.bool, device=positions.device).tril()
    }
    window, chunk = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    if window:
        seen["sliding_attention"] = seen["full_attention"] & (
            positions[:, :, None] - positions[:, None, :] < window
        )
    if chunk:
        same = positions[:, :, None] // chunk == positions[:, None, :] // chunk
        seen["chunked_attention"] = seen["full_attention"] & same
    kinds = dict.fromkeys(getattr(config, "layer_types", None) or ["full_attention"])
    if unknown := kinds.keys() - seen.keys():
        raise ValueError(f"no mask is known here for layers of the kind {', '.join(sorted(unknown))}")
    if manner == "mask" and len(kinds) > 1:
        raise ValueError(f"its layers are of several kinds: {', '.join(kinds)}")
    dtype, device = float_type(model), positions.device
    masks = {
        kind: torch.zeros(seen[kind].shape, dtype=dtype, device=device).masked_fill_(
            ~seen[kind], torch.finfo(dtype).min
        )
        for kind in kinds
    }
    added = {kind: mask[:, None] for kind, mask in masks.items()}
    return added if manner == "masks" else next(iter(added.values()))


class Decoding:
    """Rows that go through a model together and go on token by token.

    Args:
        model: a transformers causal language model.
        rows: int64 (T,) each, on the model's device.
        padded: whether they may have different lengths; they are padded on the left then.
        cached: whether the model goes on from what it has kept of the tokens before; else all of them go through it again
            for each new one.
        renewed: with so many tokens in front of it, a single row's next one makes what was kept wrong: all go through again.

    Attributes:
        logits: what follows each row, (B, V).

    Raises:
        ValueError: the model gives back nothing to go on from.
    """

    def __init__(
        self, model: Any, rows: Sequence[torch.Tensor], *, padded: bool, cached: bool, renewed: int | None = None
    ):
        self._model = model
        self._cached = cached
        self._renewed = renewed
        self._cache: dict[str, Any] = {}
        self._attention: torch.Tensor | None = None
        if padded:
            self._ids, self._attention = left_padded(rows)
        else:
            self._ids = torch.stack(list(rows))
        self.logits = self._whole()

    def push(self, tokens: torch.Tensor) -> None:
        """Go on with a token a row, int64 (B,)."""
        if self._attention is not None:
            self._attention = torch.nn.functional.pad(self._attention, (0, 1), value=True)
        if not self._cached or self._renewed is not None:
            self._ids = torch.cat((self._ids, tokens[:, None]), 1)
        if not self._cached or self._ids.shape[1] - 1 == self._renewed:
            self.logits = self._whole()
            return
        given: dict[str, Any] = {"input_ids": tokens[:, None], "use_cache": True, **self._cache}
        if self._attention is not None:
            given |= {
                "attention_mask": self._attention.long(),
                "position_ids": self._attention.sum(-1, keepdim=True) - 1,
            }
        self.logits = self._kept(self._model(**given))

    def _whole(self) -> torch.Tensor:
        given: dict[str, Any] = {"input_ids": self._ids, "use_cache": self._cached, "logits_to_keep": 1}
        if self._attention is not None:
            given |= {
                "attention_mask": self._attention.long(),
                "position_ids": (self._attention.cumsum(-1) - 1).clamp(min=0),
            }
        return self._kept(self._model(**given))

    def _kept(self, output: Any) -> torch.Tensor:
        if self._cached:
            again = _OF_CACHE if getattr(output, "cache", None) is not None else ()
            names = [name for name in _CACHES if name not in again]
            self._cache = {name: value for name in names if (value := getattr(output, name, None)) is not None}
            if not self._cache:
                raise ValueError(f"it gives back none of {', '.join(_CACHES)} to go on from")
        logits: torch.Tensor = output.logits[:, -1]
        return logits
