"""Specs of the columns whose rows have different lengths.

torchrl's ``Composite`` reads a whole column at once, which fails as soon as its rows differ in length:
``is_in`` raises, and ``zero`` gives a dense stand-in that no lazy stack can be compared with. These
specs go row by row.
"""

from __future__ import annotations

from typing import Any

import torch
from torchrl.data import Bounded, Composite, NonTensor, TensorSpec, Unbounded
from torchrl.data.llm import History
from torchrl.modules.llm.policies import ChatHistory, LogProbs, Masks, Text, Tokens

from torchrl_chat.columns import histories, history_messages, read_rows, row_td, stack_rows


class RaggedComposite(Composite):
    """A ``Composite`` over a lazy stack: each leaf has one last dimension, of any length per row."""

    def is_in(self, val: Any) -> bool:
        """Whether every row of every leaf is in its spec."""
        if self.data_cls is not None and type(val) is not self.data_cls:
            return False
        rows = read_rows(val, self.shape)
        return all(_leaf_is_in(spec, row.get(key)) for row in rows for key, spec in self.items())

    def zero(self, shape: torch.Size | None = None) -> Any:
        """One zero a row."""
        return self._filled(shape, lambda spec: torch.zeros(1, dtype=spec.dtype, device=spec.device))

    def rand(self, shape: torch.Size | None = None) -> Any:
        """A few random values a row."""

        def draw(spec: TensorSpec) -> torch.Tensor:
            count = int(torch.randint(1, 6, ()))
            high = int(spec.space.high.max()) + 1 if isinstance(spec, Bounded) else 2
            return torch.randint(0, high, (count,), dtype=torch.int64, device=spec.device).to(spec.dtype)

        return self._filled(shape, draw)

    def _filled(self, shape: torch.Size | None, make: Any) -> Any:
        size = torch.Size([*(shape or ()), *self.shape])
        rows = [row_td({k: make(s) for k, s in self.items()}, self.device) for _ in range(size.numel())]
        stack = stack_rows(rows, size)
        return stack if self.data_cls is None else self.data_cls._from_tensordict(stack)

    def expand(self, *shape: Any) -> Composite:
        """The same spec with more leading dimensions."""
        expanded = super().expand(*shape)
        return type(self)(
            dict(expanded.items()),
            shape=expanded.shape,
            device=expanded.device,
            data_cls=expanded.data_cls,
            step_mdp_static=self.step_mdp_static,
        )


class HistoryComposite(RaggedComposite):
    """The spec of a ``ChatHistory`` with one field: any number of messages a row."""

    def is_in(self, val: Any) -> bool:
        """Whether every row is a ``History`` whose messages have a role and a content."""
        if type(val) is not ChatHistory:
            return False
        rows = read_rows(val, self.shape)
        return all(
            isinstance(row.get(key), History) and {"role", "content"} <= set(row.get(key).keys())
            for row in rows
            for key in self.keys()
        )

    def zero(self, shape: torch.Size | None = None) -> Any:
        """One empty message a row."""
        return self._said(shape, {"role": "user", "content": ""})

    def rand(self, shape: torch.Size | None = None) -> Any:
        """One short assistant message a row."""
        return self._said(shape, {"role": "assistant", "content": "a string"})

    def _said(self, shape: torch.Size | None, message: dict[str, str]) -> Any:
        size = torch.Size([*(shape or ()), *self.shape])
        [key] = self.keys()
        entries = [history_messages([message], self.device) for _ in range(size.numel())]
        return histories(key, entries, size, self.device)


def _leaf_is_in(spec: TensorSpec, value: Any) -> bool:
    if not isinstance(value, torch.Tensor) or value.dtype != spec.dtype:
        return False
    if isinstance(spec, Bounded) and value.numel():
        return bool((value >= 0).all() and (value <= spec.space.high.max()).all())
    return True


def _container(cls: type, leaves: dict[str, TensorSpec], batch: torch.Size, kind: type = RaggedComposite) -> Any:
    # Static: step_mdp replaces the whole container, so that no policy's old entries outlive their turn.
    return kind(leaves, shape=batch, data_cls=cls, step_mdp_static=True)


def tokens_spec(key: str, batch: torch.Size, vocab_size: int) -> Composite:
    """``Tokens`` with one field: int64 ids below ``vocab_size``, of any length per row."""
    leaf = Bounded(0, vocab_size - 1, shape=(*batch, -1), dtype=torch.int64)
    return _container(Tokens, {key: leaf}, batch)


def masks_spec(batch: torch.Size) -> Composite:
    """``Masks`` with the assistant mask, bool, of any length per row."""
    leaf = Unbounded(shape=(*batch, -1), dtype=torch.bool)
    return _container(Masks, {"all_assistant_mask": leaf}, batch)


def log_probs_spec(batch: torch.Size) -> Composite:
    """``LogProbs`` of a prompt, float32, of any length per row."""
    return _container(LogProbs, {"prompt": Unbounded(shape=(*batch, -1), dtype=torch.float32)}, batch)


def text_spec(key: str, batch: torch.Size) -> Composite:
    """``Text`` with one field, a string a row."""
    leaf = NonTensor(shape=batch, example_data="a string")
    return _container(Text, {key: leaf}, batch, Composite)


def history_spec(key: str, batch: torch.Size) -> Composite:
    """``ChatHistory`` with one field, a ``History`` of shape (\\*batch, T)."""
    leaf = NonTensor(shape=(*batch, -1), example_data="a string")
    complete = NonTensor(shape=(*batch, -1), example_data=True)
    fields = {"role": leaf, "content": leaf.clone(), "is_complete": complete}
    messages = Composite(fields, shape=batch, data_cls=History)
    return _container(ChatHistory, {key: messages}, batch, HistoryComposite)
