"""Text to ids and back, in batches, for any Hugging Face tokenizer.

Three things set this apart from calling the tokenizer:

- **Continuation.** A suffix of a conversation is encoded and decoded as a continuation: no BOS, no
  dummy prefix space, and the leading space of a SentencePiece piece is kept when it is decoded.
- **Guarding.** A text can be encoded so that chosen stretches stay text even where they spell a
  special token (see :data:`MARK`): what a user or a tool typed can never become a control token.
- **Batches.** One call into a fast tokenizer's ``encode_batch_fast`` or ``decode_batch`` for all rows.

It knows ids, strings and one tokenizer, behind the seam of :mod:`~torchrl_chat.templates.backends`; nothing of
messages. Law of this file: how a tokenizer treats the start and the end of a text is found out by trying it.
"""

from __future__ import annotations

import bisect
import functools
import re
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

from torchrl_chat.templates.backends import MARK, MARKS, RustTokenizer, backend_of, one_of, unmarked

_codecs: weakref.WeakKeyDictionary[Any, TokenCodec] = weakref.WeakKeyDictionary()

_PROBES = (("a", "b"), ("0", "1"), ("A", "B"))
_IN_FRONT = ("\n", "|", ".", "0", "x")
"""Texts to encode another one behind, where a tokenizer begins anew after every control token."""


def codec_of(tokenizer: Any) -> TokenCodec:
    """The codec of a tokenizer; of a fast one made once: its private copy of a large vocabulary takes half a second."""
    codec = _codecs.get(tokenizer)
    if codec is None or codec.fingerprint != _fingerprint(tokenizer):
        codec = TokenCodec(tokenizer)
        if isinstance(
            codec._backend, RustTokenizer
        ):  # else it would keep its tokenizer alive in the table of codecs
            _codecs[tokenizer] = codec
    return codec


def _fingerprint(tokenizer: Any) -> tuple[Any, ...]:
    return len(tokenizer), tuple((i, str(t), t.special) for i, t in tokenizer.added_tokens_decoder.items())


class TokenCodec:
    """The encoder and decoder of one Hugging Face tokenizer.

    Args:
        tokenizer: a tokenizer of transformers, fast or slow. Its object is not changed, but for padding,
            truncation and ``split_special_tokens`` that an earlier call left switched on in its Rust backend:
            they are switched off.

    Raises:
        TypeError: for a tokenizer that never parses special tokens out of text (``MistralCommonBackend``).
    """

    def __init__(self, tokenizer: Any):
        self._backend = backend_of(tokenizer)
        self.fingerprint = _fingerprint(tokenizer)
        added = self._added = self._backend.added
        spelled = {t.content: i for i, t in added.items() if t.content}
        # Not every tokenizer flags its own eos as special (ByT5).
        special = {*tokenizer.all_special_tokens, *(t.content for t in added.values() if t.special)}
        self.special: dict[str, int] = {s: i for s, i in spelled.items() if s in special}
        self.special_ids = frozenset(self.special.values())
        # Added tokens that are not flagged special can still be markup (<tool_call>); letters and spaces are not.
        self.plain_added: dict[str, int] = {
            s: i
            for s, i in spelled.items()
            if s not in special and len(s) > 2 and not s.isalnum() and not s.isspace()
        }
        self.controls: dict[str, int] = {**self.special, **self.plain_added}
        self.control_texts: dict[int, str] = {i: s for s, i in self.controls.items()}
        self._special_rx = one_of(self.special)
        self._control_rx = one_of(self.controls)
        self._openers = sorted({s[0] for s in self.special})  # nearly always "<" alone
        self._unknown: int | None = tokenizer.unk_token_id
        self._disguisable = frozenset(
            i for i in self.control_texts if i != self._unknown and self._backend.disguises(i)
        )
        # Ids can have gaps, and a model's embedding is often padded beyond them.
        self.vocab_size: int = max({*tokenizer.get_vocab().values(), *added}, default=-1) + 1
        self._front: tuple[list[int], int] | None = None
        self._back: tuple[list[int], int] | None = None
        self._anchors: list[tuple[str, list[int]]] = []
        self._find_anchors()

    # ------------------------------------------------------------------ text -> ids
    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text; special tokens spelled in it are parsed, none are added."""
        return self._backend.encode(texts) if texts else []

    def encode_continuation(
        self, texts: Sequence[str], after: Sequence[int | None] | None = None
    ) -> list[list[int]]:
        """Ids of each text as it continues a running one: no dummy space is put in front of it.

        Args:
            texts: the texts.
            after: for each text, the id that it follows, where that is known. A control token is encoded with the
                text and dropped, so that what a tokenizer does behind one (a dummy space, ``rstrip``) happens.

        Raises:
            ValueError: the tokenizer merges the start of a text with whatever stands in front of it.
        """
        results: list[list[int]] = [[]] * len(texts)
        running = []
        for i, text in enumerate(texts):
            control = self.control_texts.get(after[i]) if after is not None else None  # type: ignore[arg-type]
            if control is not None:
                [[first, *results[i]]] = self.encode([control + text])
                if first != self.controls[control]:
                    raise ValueError(f"{control!r} is not one token in front of {text[:40]!r}: got {first}.")
            elif text:
                running.append(i)
        for anchor, front in self._anchors or [("", [])]:
            encoded = self.encode([anchor + texts[i] for i in running])
            merged = []
            for i, ids in zip(running, encoded, strict=True):
                if ids[: len(front)] == front:
                    results[i] = ids[len(front) :]
                else:
                    merged.append(i)
            if not merged:
                return results
            running = merged
        raise ValueError(
            f"the tokenizer merges the start of {texts[running[0]][:40]!r} with every text in front of it."
        )

    def encode_guarded(self, texts: Sequence[str]) -> list[list[int]]:
        """Like :meth:`encode`, but stretches that carry :data:`MARK` stay text.

        Where a tokenizer makes a control token even of plain text, the text is cut inside the look-alike, and
        the parts are encoded one by one.

        Raises:
            ValueError: a look-alike cannot be kept text.
        """
        encoded = self._backend.encode_guarded(texts, self.controls)
        return [
            ids if ids is not None and self._is_kept(ids, text) else self._cut_at_marks(text)
            for ids, text in zip(encoded, texts, strict=True)
        ]

    def _is_kept(self, ids: list[int], text: str) -> bool:
        """Whether no look-alike in the text has become a control token."""
        written = Counter(self.controls[m.group()] for m in self._control_rx.finditer(text))
        spelled = {self.controls[m.group()] for m in self._control_rx.finditer(unmarked(text))}
        return all(ids.count(i) <= written[i] for i in spelled | self._disguisable)

    def _cut_at_marks(self, text: str) -> list[int]:
        head, *rest = MARKS.split(text)
        ids = sum(self.encode_continuation(rest), self.encode([head])[0])
        # An unknown character is the unknown token, whatever the text spells: no control of anything.
        if not self._is_kept([i for i in ids if i != self._unknown], text):
            raise ValueError(
                f"the tokenizer makes a control token of what is meant as text: {unmarked(text)!r:.200}"
            )
        return ids

    def spells(self, text: str, controls: Iterable[str] = ()) -> bool:
        """Whether the text spells a special token, or one of ``controls``, as far as the tokenizer can tell."""
        for opener in self._openers:
            if opener in text:
                if self._special_rx.search(text) is not None:
                    return True
                break
        for control in controls:
            if control in text:
                return True
        if not self._disguisable:
            return False
        wanted = self.special_ids | {self.controls[control] for control in controls}
        return self._backend.disguised(text, wanted & self._disguisable)

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
        if self._front is None and self._back is None:
            return self._backend.decode(batch)
        front, start = self._front or ([], 0)
        back, end = self._back or ([], 0)
        texts = self._backend.decode([[*front, *ids, *back] for ids in batch])
        return [text[start : len(text) - end] for text in texts]

    # ------------------------------------------------------------------ how the tokenizer treats edges
    def place_of(self, ids: Sequence[int], position: int) -> int:
        """How many of the ids, from the first on, it takes for a text of at least ``position`` characters.

        Some tokens are read otherwise beside others, so that prefixes are decoded, and not tokens: those around the place
        where it is expected, a few however many ids there are.

        Returns:
            0 to ``len(ids)``; one more where the whole text is shorter.
        """
        if position <= 0:
            return 0
        length = functools.cache(lambda count: len(self.decode([ids[:count]])[0]))
        if length(len(ids)) < position:
            return len(ids) + 1
        high = min(max(position * len(ids) // length(len(ids)), 1), len(ids))
        low, step = high - 1, 1
        while low > 0 and length(low) >= position:
            low, high, step = max(low - step, 0), low, 2 * step
        while length(high) < position:
            low, high, step = high, min(high + step, len(ids)), 2 * step
        return bisect.bisect_left(range(high), position, low + 1, key=length)

    def _find_anchors(self) -> None:
        """Find what to decode between and to encode behind, where a tokenizer adds or eats spaces at the edges."""
        decode = self._backend.decode
        probe = next(
            (pair for pair in _PROBES if decode(self.encode([" ".join(pair)]))[0].split() == [*pair]), None
        )
        if probe is None:
            return
        first, second = probe
        [ids, spaced, joined] = self.encode([f"{first} {second}", f". {second}", f".{second}"])
        # The pieces of the second word, with the space in front of it.
        word = next((ids[k:] for k in range(1, len(ids)) if decode([ids[:k]]) == [first]), [])
        keeps_spaces = spaced != joined
        if word and keeps_spaces and not decode([word])[0].startswith(" "):
            self._front = self._beside(lambda anchor, text: decode([[*anchor, *word]]) == [f"{text} {second}"])
        [ending] = self.encode([f"{first} "])
        [shown] = self.decode([ending])
        if keeps_spaces and not shown.endswith(" "):
            self._back = self._beside(lambda anchor, text: self.decode([[*ending, *anchor]]) == [f"{shown} {text}"])
        if not self._continues("", [], second):
            # A control token, if there is one that leaves the text behind it alone; else what is text itself.
            unknown = self._unknown
            for text in [s for s, i in self.special.items() if i != unknown and not self._added[i].rstrip][:8]:
                if self._continues(text, [self.special[text]], second):
                    self._anchors = [(text, [self.special[text]])]
                    return
            known = zip(_IN_FRONT, self.encode(_IN_FRONT), strict=True)
            self._anchors = [
                (text, ids) for text, ids in known if unknown not in ids and self._continues(text, ids, second)
            ]

    def _beside(self, keeps: Callable[[list[int], str], bool]) -> tuple[list[int], int] | None:
        """A token, and its length as text, that keeps the space beside it when both are decoded."""
        singles = [(text, [i]) for text, i in self.special.items()][:8]
        for text, anchor in (*singles, *zip(_IN_FRONT, self.encode(_IN_FRONT), strict=True)):
            if self._backend.decode([anchor]) == [text] and keeps(anchor, text):
                return anchor, len(text)
        return None

    def _continues(self, anchor: str, first: list[int], word: str) -> bool:
        """Whether a text behind the anchor keeps the start that it has, with a space and without."""
        for text in (word, f" {word}"):
            [ids] = self.encode([anchor + text])
            if ids[: len(first)] != first or self.decode([ids[len(first) :]]) != [text]:
                return False
        return True
