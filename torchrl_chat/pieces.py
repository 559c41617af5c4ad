"""The text of each token: for whoever shows a token sequence, coloured by who wrote it."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from torchrl_chat.templates.backends import byte_table, tokenizer_of
from torchrl_chat.templates.codec import codec_of

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # how SentencePiece spells a byte that no piece has
_BROKEN = "\ufffd"
_LONGEST = 16  # tokens that one broken stretch may take before its parts are shown as they are


class Pieces(NamedTuple):
    """The text of a token sequence, cut into its tokens."""

    texts: list[str]
    """A text a token. A character whose bytes are spread over several tokens stands at the last of them."""
    partial: dict[int, bytes]
    """The bytes of the tokens that are not whole characters, by their place in the sequence."""
    text: str | None
    """The text of the sequence, where it is not that of the pieces, one behind the other; ``None`` where it is."""


class TokenPieces:
    """Cuts the text of token sequences into their tokens.

    For byte-level tokenizers (GPT-2, Llama 3, Qwen ...) the pieces make up the text exactly: the bytes of the tokens go
    through one incremental UTF-8 decoder, and each piece is what its token completes. For others a token is decoded by
    itself, and a stretch of tokens that do not make up characters one by one is decoded together.

    Args:
        tokenizer: a Hugging Face tokenizer or processor.

    Example:
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> pieces = TokenPieces(tokenizer)(tokenizer.encode("12 + 30"))
        >>> "".join(pieces.texts)
        '12 + 30'
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer_of(tokenizer)
        self._codec = codec_of(self.tokenizer)
        rust = getattr(self.tokenizer, "backend_tokenizer", None)
        self._table = None if rust is None else byte_table(rust)
        self._texts: dict[int, str | None] = {}

    def __call__(self, ids: Sequence[int]) -> Pieces:
        """The pieces of one sequence."""
        return self._of_bytes(ids) if self._table is not None else self._of_texts(ids)

    def _of_bytes(self, ids: Sequence[int]) -> Pieces:
        assert self._table is not None
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        texts, partial, pending = [], {}, False
        for place, token in enumerate(ids):
            own = self._own_text(token)
            if own is not None and not pending:  # nearly always
                texts.append(own)
                continue
            raw = self._table[token]
            texts.append(decoder.decode(raw))
            pending = bool(decoder.getstate()[0])
            if raw:
                partial[place] = raw
        if pending:
            texts[-1] += decoder.decode(b"", final=True)
        return Pieces(texts, partial, None)

    def _own_text(self, token: int) -> str | None:
        """The text of a token; ``None`` where its bytes are not whole characters."""
        if token not in self._texts:
            assert self._table is not None
            self._texts[token] = self._table.text([token])
        return self._texts[token]

    def _of_texts(self, ids: Sequence[int]) -> Pieces:
        texts = self._codec.decode([[token] for token in ids])
        names = self.tokenizer.convert_ids_to_tokens(list(ids))
        partial = {
            place: bytes.fromhex(found[1])
            for place, name in enumerate(names)
            if isinstance(name, str) and (found := _BYTE.fullmatch(name)) is not None
        }
        place = 0
        while place < len(ids):
            if _BROKEN not in texts[place] and place not in partial:
                place += 1
                continue
            end = place + 1
            while end < len(ids) and end - place < _LONGEST and (_BROKEN in texts[end] or end in partial):
                end += 1
            if end - place > 1:
                [whole] = self._codec.decode([ids[place:end]])
                texts[place:end] = [""] * (end - place - 1) + [whole]
            place = end
        partial = {at: raw for at, raw in partial.items() if texts[at] != raw.decode(errors="replace")}
        [text] = self._codec.decode([list(ids)]) if ids else [""]
        return Pieces(texts, partial, None if "".join(texts) == text else text)
