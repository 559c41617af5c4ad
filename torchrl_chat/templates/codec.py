"""Text to ids and back, in batches, straight through the tokenizer's Rust backend.

Three things set this apart from calling the tokenizer:

- **Continuation.** A suffix of a conversation is encoded and decoded as a continuation: no BOS, no
  dummy prefix space, and the leading space of a SentencePiece piece is kept when it is decoded.
- **Guarding.** A text can be encoded so that chosen stretches stay text even where they spell a
  special token (see :data:`MARK`): what a user or a tool typed can never become a control token.
- **Batches.** One call into ``encode_batch_fast`` or ``decode_batch`` for all rows.

It knows ids, strings and one tokenizer; nothing of messages.
"""

from __future__ import annotations

import json
import re
import sys
import weakref
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MARK = "\uf8ff\ue0a5"
"""Put after the first character of a special-token look-alike, it keeps the look-alike text.

Two private-use characters that no text of the wild holds in this order; the codec removes them again
before anything is tokenized.
"""
_ESCAPED_MARK = json.dumps(MARK)[1:-1]  # what a template's ASCII JSON makes of it


def unmarked(text: str) -> str:
    """The text without marks."""
    return text.replace(MARK, "").replace(_ESCAPED_MARK, "")


_codecs: weakref.WeakKeyDictionary[Any, TokenCodec] = weakref.WeakKeyDictionary()


def codec_of(tokenizer: Any) -> TokenCodec:
    """The codec of a tokenizer, made once: its private copy of a large vocabulary takes half a second to build."""
    codec = _codecs.get(tokenizer)
    if codec is None or codec.fingerprint != _fingerprint(tokenizer):
        codec = _codecs[tokenizer] = TokenCodec(tokenizer)
    return codec


def _fingerprint(tokenizer: Any) -> tuple[Any, ...]:
    return len(tokenizer), tuple((i, str(t), t.special) for i, t in tokenizer.added_tokens_decoder.items())


class TokenCodec:
    """The encoder and decoder of one Hugging Face tokenizer.

    Args:
        tokenizer: a fast tokenizer (``PreTrainedTokenizerFast``). Its object is not changed, but for
            padding and truncation left switched on by an earlier call, which are switched off.

    Raises:
        TypeError: for a tokenizer without a Rust backend.
    """

    def __init__(self, tokenizer: Any):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise TypeError(
                f"{type(tokenizer).__name__} has no Rust backend: load it with AutoTokenizer (use_fast=True)."
            )
        # The backend alone: a codec that held its tokenizer would keep it alive in the table of codecs.
        self._rust: Tokenizer = backend
        self.fingerprint = _fingerprint(tokenizer)
        added = tokenizer.added_tokens_decoder
        self._added = added
        self._added_ids = {t.content: i for i, t in added.items()}
        self.special: dict[str, int] = {t.content: i for i, t in added.items() if t.special and t.content}
        self.special_ids = frozenset(self.special.values())
        # Added tokens that are not flagged special can still be markup (<tool_call>); letters and spaces are not.
        self.plain_added: dict[str, int] = {
            t.content: i
            for i, t in added.items()
            if not t.special and len(t.content) > 2 and not t.content.isalnum() and not t.content.isspace()
        }
        self.controls: dict[str, int] = {**self.special, **self.plain_added}
        self.control_texts: dict[int, str] = {i: s for s, i in self.controls.items()}
        self._special_rx = _one_of(self.special)
        self._control_rx = _one_of(self.controls)
        self._openers = sorted({s[0] for s in self.special})  # nearly always "<" alone
        # Ids can have gaps, and a model's embedding is often padded beyond them.
        self.vocab_size: int = max(tokenizer.get_vocab().values(), default=-1) + 1
        self._guarded: tuple[Tokenizer, dict[str, str], dict[int, int]] | None = None
        self._anchor = self._find_anchor()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_guarded": None}

    @property
    def _backend(self) -> Tokenizer:
        backend = self._rust
        if backend.padding is not None:
            backend.no_padding()
        if backend.truncation is not None:
            backend.no_truncation()
        return backend

    # ------------------------------------------------------------------ text -> ids
    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text; special tokens spelled in it are parsed, none are added."""
        if not texts:
            return []
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_after(self, anchor: str, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text as it continues right after the control token ``anchor``.

        The anchor is encoded with the text and dropped, so that what a tokenizer does at the start of
        a text (a dummy space) or after a special token (``rstrip``) happens as it does in context.
        """
        first = self._added_ids[anchor]
        encoded = self.encode([anchor + text for text in texts])
        for text, ids in zip(texts, encoded, strict=True):
            if ids[:1] != [first]:
                raise ValueError(f"{anchor!r} is not one token in front of {text[:40]!r}: got {ids[:3]}.")
        return [ids[1:] for ids in encoded]

    def encode_continuation(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text as it continues a running one: no dummy space is put in front of it."""
        if self._anchor is None:
            return self.encode(texts)
        return self.encode_after(self._added[self._anchor[0]].content, texts)

    def encode_guarded(self, texts: Sequence[str]) -> list[list[int]]:
        """Like :meth:`encode`, but stretches that carry :data:`MARK` stay text.

        A private copy of the tokenizer treats every control token as text; the control tokens that
        stand in ``texts`` without a mark are swapped for placeholders that only that copy knows, with
        the same stripping rules, and swapped back as ids.
        """
        backend, placeholders, back = self._guarded_backend()
        swapped = [unmarked(self._control_rx.sub(lambda m: placeholders[m.group()], text)) for text in texts]
        encodings = backend.encode_batch_fast(swapped, add_special_tokens=False)
        return [[back.get(i, i) for i in encoding.ids] for encoding in encodings]

    def _guarded_backend(self) -> tuple[Tokenizer, dict[str, str], dict[int, int]]:
        if self._guarded is None:
            from tokenizers import AddedToken, Tokenizer

            spec = json.loads(self._backend.to_str())
            for token in spec["added_tokens"]:  # only what is flagged special can be switched off
                token["special"] = token["special"] or token["content"] in self.controls
            backend = Tokenizer.from_str(json.dumps(spec))
            backend.encode_special_tokens = True
            placeholders = {s: f"\ue0a6{i}\ue0a7" for s, i in self.controls.items()}
            backend.add_tokens(
                [
                    AddedToken(
                        placeholders[s],
                        lstrip=self._added[i].lstrip,
                        rstrip=self._added[i].rstrip,
                        normalized=False,
                        special=False,
                    )
                    for s, i in self.controls.items()
                ]
            )
            added = backend.get_added_tokens_decoder()
            by_text = {token.content: i for i, token in added.items()}
            back = {by_text[p]: self.controls[s] for s, p in placeholders.items()}
            self._guarded = (backend, placeholders, back)
        return self._guarded

    def spells(self, text: str, controls: Iterable[str] = ()) -> bool:
        """Whether the text spells a special token, or one of ``controls``."""
        if any(c in text for c in self._openers) and self._special_rx.search(text) is not None:
            return True
        return any(control in text for control in controls)

    def mark(self, text: str, controls: Collection[str] = ()) -> str:
        """The text with :data:`MARK` inside every special token, and every one of ``controls``, that it spells."""
        return self._control_rx.sub(
            lambda m: m[0][0] + MARK + m[0][1:] if m[0] in self.special or m[0] in controls else m[0], text
        )

    def first_special(self, text: str, start: int = 0, end: int = sys.maxsize) -> re.Match[str] | None:
        """The first special token spelled in the text."""
        return self._special_rx.search(text, start, end)

    def opens(self, text: str) -> bool:
        """Whether the text begins with a control token, so that no merge crosses its start."""
        return self._control_rx.match(text) is not None

    def control_tokens(self, text: str, start: int = 0, end: int = sys.maxsize) -> Iterator[re.Match[str]]:
        """Every control token spelled in the text, special or not, in order."""
        return self._control_rx.finditer(text, start, end)

    # ------------------------------------------------------------------ ids -> text
    def token_text(self, token_id: int) -> str:
        """How :meth:`decode` spells one token."""
        added = self._added.get(token_id)
        return added.content if added is not None else self.decode([[token_id]])[0]

    def decode(self, batch: Sequence[Sequence[int]]) -> list[str]:
        """Text of each row of ids as a continuation; special tokens are spelled out."""
        if not batch:
            return []
        if self._anchor is None:
            return self._backend.decode_batch(batch, skip_special_tokens=False)
        anchor, cut = self._anchor
        texts = self._backend.decode_batch([[anchor, *ids] for ids in batch], skip_special_tokens=False)
        return [text[cut:] for text in texts]

    def _find_anchor(self) -> tuple[int, int] | None:
        """A special token to decode behind, where decoding eats the first space; else ``None``."""
        probe = self.encode(["a b"])[0]
        # The last piece of "a b" begins with the space; a decoder that strips the start of its text loses it.
        if not probe or self._backend.decode(probe[-1:], skip_special_tokens=False).startswith(" "):
            return None
        for text, special in self.special.items():
            alone = self._backend.decode([special], skip_special_tokens=False)
            joined = self._backend.decode([special, probe[-1]], skip_special_tokens=False)
            if alone == text and joined == text + " b":
                return special, len(text)
        return None


def _one_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern that finds any of the texts, the longest first."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")
