"""The seam under the codec: the few things that a tokenizer must be able to do, done in Rust or in Python.

:class:`RustTokenizer` calls the ``tokenizers`` backend of a fast tokenizer directly. :class:`PythonTokenizer`
goes through the public methods of any other Hugging Face tokenizer: ``PreTrainedTokenizer`` subclasses,
SentencePiece models, code that comes with a model. :func:`backend_of` chooses. The text of ids comes from a table of
bytes (:class:`ByteTable`) where a tokenizer is byte-level, without a call into it.

Law of this file: a backend adds no token, drops none and cleans nothing up. Where it cannot keep a stretch of
text from becoming a control token it answers ``None``, and the codec finds another way or raises.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MARK = "\uf8ff\ue0a5"
"""Put after the first character of a special-token look-alike, it keeps the look-alike text.

Two private-use characters that no text of the wild holds in this order; the codec removes them again
before anything is tokenized.
"""
_ESCAPED_MARK = json.dumps(MARK)[1:-1]  # what a template's ASCII JSON makes of it
MARKS = re.compile(f"{MARK}|{re.escape(_ESCAPED_MARK)}")


def unmarked(text: str) -> str:
    """The text without marks."""
    return text.replace(MARK, "").replace(_ESCAPED_MARK, "")


def one_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern that finds any of the texts, the longest first; a mark behind one that is a single character hides it."""
    longest = sorted(texts, key=len, reverse=True)
    return re.compile(
        "|".join(re.escape(text) if len(text) > 1 else f"{re.escape(text)}(?!{MARK})" for text in longest)
        or r"(?!)"
    )


def trials(controls: Iterable[str]) -> list[str]:
    """Texts on which two ways to find these control tokens would differ."""
    return ["a  b ", *(text for s in controls for text in (f"x{s}y", f" x {s} {s}\ny {s}"))]


def tokenizer_of(source: Any) -> Any:
    """The tokenizer of a processor; a tokenizer as it is.

    Raises:
        TypeError: neither a Hugging Face tokenizer nor a processor that has one.
    """
    from transformers import PreTrainedTokenizerBase

    for candidate in (source, getattr(source, "tokenizer", None)):
        if isinstance(candidate, PreTrainedTokenizerBase):
            return candidate
    raise TypeError(
        f"{type(source).__name__} is no Hugging Face tokenizer (PreTrainedTokenizerBase), nor a processor that has "
        f"one as .tokenizer."
    )


def backend_of(tokenizer: Any) -> Backend:
    """The backend of a Hugging Face tokenizer.

    Raises:
        TypeError: the tokenizer parses no special tokens out of text (``MistralCommonBackend``).
    """
    rust = getattr(tokenizer, "backend_tokenizer", None)
    if rust is not None:
        return RustTokenizer(rust, tokenizer.added_tokens_decoder)
    try:
        added = tokenizer.added_tokens_decoder
    except NotImplementedError as error:
        raise TypeError(
            f"{type(tokenizer).__name__} renders conversations by code of its own, without a Jinja template, and "
            f"never parses special tokens out of text. Load the model's tokenizer.json instead: "
            f"PreTrainedTokenizerFast.from_pretrained(...), with its chat template."
        ) from error
    return PythonTokenizer(tokenizer, added)


_SHOWN = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # printable in Latin-1: as they are
_HIDDEN = [byte for byte in range(256) if byte not in _SHOWN]  # the others: from U+0100 on
_BYTE_OF = {chr(byte): byte for byte in _SHOWN} | {chr(0x100 + i): byte for i, byte in enumerate(_HIDDEN)}
"""The byte that each character of a byte-level vocabulary stands for."""


class ByteTable(dict[int, bytes]):
    """The bytes of each token, made as they are asked for: short rows are read three times as fast.

    A byte-level BPE spells each byte as a printable character (Radford et al. 2019, section 2.2), so the text of ids is
    the bytes of their tokens, one behind the other.

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


class RustTokenizer:
    """A fast tokenizer's Rust backend; the tokenizer object itself is not held.

    Args:
        rust: the backend. Padding, truncation and the splitting of special tokens that an earlier call left
            switched on are switched off.
        added: the added tokens by id.
    """

    def __init__(self, rust: Tokenizer, added: Mapping[int, Any]):
        self._rust = rust
        self.added = added
        self._guarded: Callable[[Sequence[str]], Sequence[list[int] | None]] | None = None
        self._folded: dict[int, str] = {}  # added tokens as the normalizer spells them
        self._bytes = byte_table(rust)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_guarded": None, "_bytes": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._bytes = byte_table(self._rust)

    def _ready(self) -> Tokenizer:
        rust = self._rust
        if rust.padding is not None:
            rust.no_padding()
        if rust.truncation is not None:
            rust.no_truncation()
        if rust.encode_special_tokens:  # tokenizer(text, split_special_tokens=True) leaves it on
            rust.encode_special_tokens = False
        return rust

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text; added tokens spelled in it are parsed, none are put around it. One call for all texts."""
        encodings = self._ready().encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, batch: Sequence[Sequence[int]]) -> list[str]:
        """Text of each row, special tokens spelled out, nothing cleaned up."""
        if self._bytes is None:
            return self._rust.decode_batch(batch, skip_special_tokens=False)
        texts = list(map(self._bytes.text, batch))
        return [
            self._rust.decode(ids, skip_special_tokens=False) if text is None else text
            for ids, text in zip(batch, texts, strict=True)
        ]

    def encode_guarded(self, texts: Sequence[str], controls: Mapping[str, int]) -> Sequence[list[int] | None]:
        """Like :meth:`encode`, but what carries :data:`MARK` stays text; ``None`` where that cannot be had.

        A private copy of the tokenizer treats every control token as text; the control tokens that
        stand in ``texts`` without a mark are swapped for placeholders that only that copy knows, with
        the same stripping rules, and swapped back as ids. That the tokenizer finds control tokens where they
        are spelled, as the copy finds placeholders, is tried once.
        """
        if self._guarded is None:
            guarded, tried = self._with_placeholders(controls), trials(controls)
            faithful = guarded(tried) == self.encode(tried)
            self._guarded = guarded if faithful else lambda texts: [None] * len(texts)
        return self._guarded(texts)

    def _with_placeholders(self, controls: Mapping[str, int]) -> Callable[[Sequence[str]], list[list[int]]]:
        from tokenizers import AddedToken, Tokenizer

        copy = Tokenizer.from_str(self._ready().to_str())
        # Only what is flagged special can be switched off.
        plain = [t for t in copy.get_added_tokens_decoder().values() if t.content in controls and not t.special]
        for token in plain:
            token.special = True
        copy.add_special_tokens(plain)
        copy.encode_special_tokens = True
        placeholders = {s: f"\ue0a6{i}\ue0a7" for s, i in controls.items()}
        stand_ins = []
        for s, i in controls.items():
            rules = {"lstrip": self.added[i].lstrip, "rstrip": self.added[i].rstrip}
            stand_ins.append(AddedToken(placeholders[s], **rules, normalized=False, special=False))
        copy.add_tokens(stand_ins)
        by_text = {token.content: i for i, token in copy.get_added_tokens_decoder().items()}
        back = {by_text[p]: controls[s] for s, p in placeholders.items()}
        unmarked_control = one_of(controls)

        def encode(texts: Sequence[str]) -> list[list[int]]:
            swapped = [unmarked(unmarked_control.sub(lambda m: placeholders[m.group()], text)) for text in texts]
            encodings = copy.encode_batch_fast(swapped, add_special_tokens=False)
            return [[back.get(i, i) for i in encoding.ids] for encoding in encodings]

        return encode

    def disguises(self, token_id: int) -> bool:
        """Whether this added token may be parsed out of a text that does not spell it letter by letter.

        That is one which is looked for in the normalized text (lower case, NFKC).
        """
        return self._rust.normalizer is not None and self.added[token_id].normalized

    def disguised(self, text: str, ids: Set[int]) -> bool:
        """Whether the text may hold one of these added tokens, each of which :meth:`disguises`, in disguise."""
        fold = self._rust.normalizer.normalize_str
        for i in ids - self._folded.keys():
            self._folded[i] = fold(self.added[i].content).strip(" ▁")
        folded = fold(text)
        return any(self._folded[i] in folded for i in ids)


class PythonTokenizer:
    """Any other tokenizer of transformers, through its public methods.

    Args:
        tokenizer: the tokenizer; held, and not changed.
        added: the added tokens by id.
    """

    def __init__(self, tokenizer: Any, added: Mapping[int, Any]):
        self._tokenizer = tokenizer
        self.added = added
        self._by_content = {token.content: token for token in added.values() if token.content}
        self._ids = {token.content: i for i, token in added.items()}
        self._added_rx = re.compile(f"({one_of(self._by_content).pattern})")
        self._bytes = self._undecoded_bytes()
        self._faithful: bool | None = None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """See :class:`RustTokenizer`."""
        encoded = self._tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=False,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # the length of a conversation is not the tokenizer's concern
        )
        return [list(ids) for ids in encoded["input_ids"]]

    def decode(self, batch: Sequence[Sequence[int]]) -> list[str]:
        """See :class:`RustTokenizer`."""
        if self._bytes:
            return [self._tokenizer.convert_tokens_to_string(self._tokens(ids)) for ids in batch]
        decode = self._tokenizer.decode
        return [decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False) for ids in batch]

    def _undecoded_bytes(self) -> dict[int, bytes]:
        """The byte tokens of a tokenizer that leaves them as they are: SentencePieceBackend decodes ``<0x0A>`` so."""
        own = {i: token for token, i in self._tokenizer.get_vocab().items() if i not in self.added}
        spelled = {i: found for i, token in own.items() if (found := re.fullmatch(r"<0x([0-9A-F]{2})>", token))}
        if not any(self._tokenizer.decode([i]) == found.group() for i, found in spelled.items()):
            return {}
        return {i: bytes.fromhex(found[1]) for i, found in spelled.items()}

    def _tokens(self, ids: Sequence[int]) -> list[str]:
        """The tokens, with what stretches of byte tokens spell in their place."""
        tokens: list[str] = []
        for in_bytes, stretch in itertools.groupby(ids, self._bytes.__contains__):
            if in_bytes:
                tokens.append(b"".join(self._bytes[i] for i in stretch).decode(errors="replace"))
            else:
                tokens.extend(self._tokenizer.convert_ids_to_tokens(list(stretch)))
        return tokens

    def encode_guarded(self, texts: Sequence[str], controls: Mapping[str, int]) -> Sequence[list[int] | None]:
        """See :class:`RustTokenizer`.

        The text is cut at its added tokens, as transformers cuts it, and the stretches between them are
        tokenized as nothing but text. That this is what the tokenizer does is tried once.
        """
        if self._faithful is None:
            tried = trials(controls)
            self._faithful = list(map(self._by_stretches, tried)) == self.encode(tried)
        return list(map(self._by_stretches, texts)) if self._faithful else [None] * len(texts)

    def _by_stretches(self, text: str) -> list[int]:
        pieces = self._added_rx.split(text)  # text and token in turn
        for i in range(1, len(pieces), 2):
            token = self._by_content[pieces[i]]
            if token.lstrip:
                pieces[i - 1] = pieces[i - 1].rstrip()
            if token.rstrip:
                pieces[i + 1] = pieces[i + 1].lstrip()
        ids: list[int] = []
        for i, piece in enumerate(pieces):
            if i % 2:
                ids.append(self._ids[piece])
            elif piece:
                tokens = self._tokenizer.tokenize(unmarked(piece), split_special_tokens=True)
                ids.extend(self._tokenizer.convert_tokens_to_ids(tokens))
        return ids

    def disguises(self, token_id: int) -> bool:
        """See :class:`RustTokenizer`: any token, where code of the tokenizer's own comes before added tokens are found."""
        from transformers import PreTrainedTokenizer

        own = type(self._tokenizer)
        return any(
            getattr(own, name, None) is not getattr(PreTrainedTokenizer, name)
            for name in ("__call__", "_encode_plus", "tokenize", "prepare_for_tokenization")
        )

    def disguised(self, text: str, ids: Set[int]) -> bool:
        """See :class:`RustTokenizer`: what the tokenizer itself finds in the text."""
        return not set(self.encode([text])[0]).isdisjoint(ids)


Backend: TypeAlias = RustTokenizer | PythonTokenizer
