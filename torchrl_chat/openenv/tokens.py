"""``TokenRow``: token ids as the list that goes over the wire, with the face of the tensor that a model reads.

OpenEnv's tests compare ``observation.tokens`` with lists and its clients send them as JSON; its README reads
``observation.tokens.shape`` and hands ``observation.tokens`` to ``model.generate``. Both hold here.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class TokenRow(list[int]):
    """Token ids: a list in everything that lists can do, and in everything else the tensor ``[ids]``, one row of a batch.

    Lengths, equality, slices, iteration, JSON and pickling are those of the list of N integers. What a list does not have
    (``shape``, ``device``, ``to``, an index of two dimensions, every function of torch) is that of :attr:`tensor`, int64 of
    shape (1, N), as models read it. Each such use makes the tensor anew.

    Example:
        >>> from torchrl_chat.tiny import tiny_model
        >>> row = TokenRow([5, 6, 7])
        >>> row == [5, 6, 7], len(row), row.shape
        (True, 3, torch.Size([1, 3]))
        >>> row[:, -1], row.tensor.dtype
        (tensor([7]), torch.int64)
        >>> tiny_model(64).generate(row, max_new_tokens=2).shape
        torch.Size([1, 5])
    """

    __slots__ = ()
    __hash__ = None

    @property
    def tensor(self) -> torch.Tensor:
        """The ids as a tensor, int64 of shape (1, N), on the CPU."""
        import torch

        return torch.tensor([list(self)], dtype=torch.int64)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # protocols (copying, arrays, ...) take it for the list that it is
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.tensor, name)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, (int, slice)):
            return super().__getitem__(key)
        return self.tensor[key]

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Any function of torch, with the tensor in the row's place."""
        return function(*map(_as_tensor, args), **{key: _as_tensor(value) for key, value in (kwargs or {}).items()})


def _as_tensor(value: Any) -> Any:
    if isinstance(value, TokenRow):
        return value.tensor
    if type(value) in (list, tuple):
        return type(value)(map(_as_tensor, value))
    return value


def _compared(name: str) -> Callable[[TokenRow, Any], Any]:
    def compare(self: TokenRow, other: Any) -> Any:
        if not isinstance(other, list) and (isinstance(other, numbers.Number) or hasattr(other, "dtype")):
            return getattr(self.tensor, name)(other)
        return getattr(list, name)(self, other)

    return compare


for _name in ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"):
    setattr(TokenRow, _name, _compared(_name))


def behind_prompt(ids: Sequence[int], prompt: torch.Tensor) -> Sequence[int]:
    """What a policy sampled, of ids that begin with the whole prompt, as ``generate`` of transformers returns them.

    Args:
        ids: the ids of an action.
        prompt: int64 of shape (N,).
    """
    length = len(prompt)
    if not length or len(ids) <= length or list(ids[:length]) != prompt.tolist():
        return ids
    return ids[length:]
