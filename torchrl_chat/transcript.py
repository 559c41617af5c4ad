"""The ledger of one conversation: token ids, who sampled them, their log-probs, and the messages.

Law of this file: a transcript is a value. Extending one returns a new one that shares all earlier
tokens with it, id for id; nothing that was written is ever changed. So a saved transcript can be
stepped again, branched in two, or moved between environments.

A template that rewrites the past (history policy ``"template"``) begins a *branch*: a new sequence of
tokens for the same conversation. The finished sequences stay in :attr:`Transcript.branches`; in the new
one the mask is true on what is sampled from then on, so that over all branches each sampled token is
trained exactly once.

Sharing is what keeps a turn's cost independent of the history's length: the tokens of a conversation
lie in one growing buffer, its *tape*, and a transcript is the tape's first ``len(transcript)`` tokens. The
longest transcript of a tape writes behind its own end, in place; any other one (a branch, a saved
step) gets a tape of its own first.

In a TensorDict a transcript is a non-tensor leaf: it survives ``step_mdp``, ``rollout``, indexing,
``lazy_stack``, ``clone``, ``to(device)``, pickling and replay buffers. The ledger lives on the CPU,
where tokenizers are; what policies read on other devices are copies made by the environment.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from torchrl_chat.messages import Message
from torchrl_chat.templates.kinds import Course
from torchrl_chat.templates.rewriting import Span

_MIN_CAPACITY = 256  # tokens; a short single-turn conversation never has to grow
_claim = threading.Lock()  # two threads may extend the same transcript: only one may write in place


class _Tape:
    """Growing buffers of token ids, mask and log-probs; ``used`` tokens of them are written.

    The tensors own the memory. Small writes go through numpy views of them, which cost a fraction; where
    torch moves a tensor's storage (into shared memory, when an observation is sent to another process), the
    views are taken anew.
    """

    __slots__ = ("_pointers", "_views", "capacity", "ids", "log_probs", "mask", "used")

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.used = 0
        # numpy's zeros are the system's own zero pages, touched only when written; torch's are written at once.
        self.ids = torch.from_numpy(np.empty(capacity, dtype=np.int64))
        self.mask = torch.from_numpy(np.zeros(capacity, dtype=np.bool_))
        self.log_probs = torch.from_numpy(np.zeros(capacity, dtype=np.float32))
        self._pointers: tuple[int, ...] = ()
        self._views: tuple[np.ndarray, ...] = ()

    def views(self) -> tuple[np.ndarray, ...]:
        """Ids, mask and log-probs as numpy views of the tensors' memory, wherever that is now."""
        pointers = (self.ids.data_ptr(), self.mask.data_ptr(), self.log_probs.data_ptr())
        if pointers != self._pointers:
            self._views = (self.ids.numpy(), self.mask.numpy(), self.log_probs.numpy())
            self._pointers = pointers
        return self._views


class Branch(NamedTuple):
    """One sequence that the policy saw and continued, ready for training."""

    tokens: torch.Tensor  # int64 (T,)
    mask: torch.Tensor  # bool (T,), true on the tokens that are trained in this branch
    log_probs: torch.Tensor  # float32 (T,), 0 where the mask is false


class Transcript:
    """The ledger of one conversation. Build one with :meth:`start`; a transcript never changes.

    Attributes:
        messages: the conversation, a tuple of message dicts.
        ended: ``None`` while the policy is to answer; after an answer, whether it ended by itself
            (``True``) or was cut by a limit (``False``).
        closed: whether what surely ends the last turn stands in the tokens.
        stop: the token with which the policy ended the last turn; ``None`` if a limit cut it.
        answer: the position of the last sampled message in ``messages``; ``None`` before the first answer.
        scored: whether every sampled token came with its log-prob (others read 0).
        text: the tokens' text, where the environment keeps it (text mode); ``None`` elsewhere.
        spans: where the sampled answers stand in the tokens, one :class:`Span` an answer.
        branches: the sequences that were left for another one, oldest first; empty unless the template
            rewrote the past.
        turns: how many answers the policy gave, an answer that it wrote anew counting again.
        open: where the last message begins in the tokens, if the policy is to go on with it instead of beginning one;
            ``None`` elsewhere.
        course: what proofs need to know of all the messages, so that no turn looks at them all again.
        shown: a place where an environment keeps what it made of the messages, so that the next turn
            adds to it; no part of the value.

    Example:
        >>> t = Transcript.start([1, 2, 3], ({"role": "user", "content": "Hi"},))
        >>> answer = {"role": "assistant", "content": "Hello"}
        >>> t = t.sampled(torch.tensor([7, 8]), torch.tensor([-0.5, -0.1]), answer, ended=True)
        >>> t.tokens.tolist(), t.mask.tolist()
        ([1, 2, 3, 7, 8], [False, False, False, True, True])
    """

    __slots__ = (
        "_length",
        "_tape",
        "answer",
        "branches",
        "closed",
        "course",
        "ended",
        "messages",
        "open",
        "scored",
        "shown",
        "spans",
        "stop",
        "text",
        "turns",
    )

    def __init__(
        self,
        tape: _Tape,
        length: int,
        messages: tuple[Message, ...],
        ended: bool | None,
        closed: bool,
        scored: bool,
        text: str | None,
        answer: int | None = None,
        shown: Any = None,
        course: Course | None = None,
        stop: int | None = None,
        spans: tuple[Span, ...] = (),
        branches: tuple[Branch, ...] = (),
        open_at: int | None = None,
        turns: int = 0,
    ):
        self._tape = tape
        self._length = length
        self.messages = messages
        self.ended = ended
        self.closed = closed
        self.scored = scored
        self.text = text
        self.answer = answer
        self.shown = shown
        self.stop = stop
        self.spans = spans
        self.branches = branches
        self.open = open_at
        self.turns = turns
        self.course = Course.of(messages) if course is None else course

    # ------------------------------------------------------------------ reading
    def __len__(self) -> int:
        """The number of tokens."""
        return self._length

    @property
    def tokens(self) -> torch.Tensor:
        """All token ids, int64 of shape (T,): a view, not to be written to."""
        return self._tape.ids[: self._length]

    @property
    def mask(self) -> torch.Tensor:
        """True exactly on the tokens that the policy sampled; bool of shape (T,)."""
        return self._tape.mask[: self._length]

    @property
    def log_probs(self) -> torch.Tensor:
        """Log-probs of the sampled tokens, 0 elsewhere; float32 of shape (T,)."""
        return self._tape.log_probs[: self._length]

    @property
    def sequences(self) -> tuple[Branch, ...]:
        """The training view: every sequence that the policy continued, the present one last.

        Each sampled token is under the mask of exactly one of them.
        """
        return (*self.branches, Branch(self.tokens, self.mask, self.log_probs))

    @property
    def num_sampled(self) -> int:
        """The number of tokens that the policy sampled in the present sequence."""
        return int(np.count_nonzero(self._tape.views()[1][: self._length]))

    @property
    def total_sampled(self) -> int:
        """The number of tokens that the policy sampled in all sequences."""
        return self.num_sampled + sum(int(branch.mask.sum()) for branch in self.branches)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Transcript):
            return NotImplemented
        n = self._length
        return (
            n == other._length
            and self.messages == other.messages
            and (self.ended, self.closed, self.scored, self.text, self.answer, self.stop, self.open, self.turns)
            == (
                other.ended,
                other.closed,
                other.scored,
                other.text,
                other.answer,
                other.stop,
                other.open,
                other.turns,
            )
            and self.spans == other.spans
            and all(
                np.array_equal(mine[:n], theirs[:n])
                for mine, theirs in zip(self._tape.views(), other._tape.views(), strict=True)
            )
            and len(self.branches) == len(other.branches)
            and all(
                torch.equal(mine, theirs)
                for one, another in zip(self.branches, other.branches, strict=True)
                for mine, theirs in zip(one, another, strict=True)
            )
        )

    __hash__ = None  # type: ignore[assignment]  # it holds dicts

    def __repr__(self) -> str:
        roles = [message["role"] for message in self.messages]
        return f"Transcript({self._length} tokens, {self.num_sampled} sampled, roles={roles}, ended={self.ended})"

    # ------------------------------------------------------------------ writing
    @classmethod
    def start(
        cls, ids: Sequence[int], messages: Iterable[Message], text: str | None = None, policy: str = "assistant"
    ) -> Transcript:
        """A conversation whose first prompt is ``ids``; the policy, of that role, is to answer."""
        tape = _Tape(max(_MIN_CAPACITY, 2 * len(ids)))
        tape.views()[0][: len(ids)] = ids
        tape.used = len(ids)
        said = tuple(messages)
        return cls(tape, len(ids), said, None, False, True, text, course=Course.of(said, policy))

    def sampled(
        self,
        ids: torch.Tensor,
        log_probs: torch.Tensor | None,
        message: Message,
        *,
        ended: bool,
        close: Sequence[int] | None = (),
        text: str = "",
        stop: int | None = None,
    ) -> Transcript:
        """Append what the policy sampled, and then the end of the turn, which it did not sample.

        Args:
            ids: the sampled ids, int64 of shape (R,), on the CPU.
            log_probs: their log-probs, of shape (R,); ``None`` if the policy reports none.
            message: the same as a message; the whole of it, where the policy went on with an open one.
            ended: whether the policy ended the turn itself.
            close: the ids still missing at the end of the turn; ``None`` if not known (then the turn
                stays open until something follows it).
            text: the text of ``ids`` and ``close``, where the transcript keeps its text.
            stop: the token with which the policy ended the turn; ``None`` if it was cut.
        """
        start, count = self._length, len(ids)
        tape = self._room(count + len(close or ()))
        end = start + count
        all_ids, mask, all_log_probs = tape.views()
        all_ids[start:end] = ids.numpy()
        if log_probs is not None:
            all_log_probs[start:end] = log_probs.numpy()
        mask[start:end] = True
        length = end
        if close:
            length += len(close)
            all_ids[end:length] = close
        before, spans, course, shown = self.messages, self.spans, self.course, self.shown
        if self.open is not None:  # the last message was begun already: it is replaced by the whole of it
            before, start, shown = before[:-1], self.open, None
            spans = tuple(span for span in spans if span.message < len(before))
            course = Course.of(before, course.policy)
        return Transcript(
            tape,
            length,
            (*before, message),
            ended,
            close is not None,
            self.scored and log_probs is not None,
            None if self.text is None else self.text + text,
            len(before),
            shown,
            course.then((message,)),
            stop,
            (*spans, Span(len(before), start, end, stop)),
            self.branches,
            turns=self.turns + 1,
        )

    def begun(self, ids: Sequence[int], prefix: int, message: Message, text: str = "") -> Transcript:
        """Open the next turn of the policy with words that it did not sample.

        Args:
            ids: what opens the turn, and the words.
            prefix: how many of the ids are the words.
            message: the message that the words begin.
            text: the text of ``ids``, where the transcript keeps its text.
        """
        opened = self.appended(ids, (message,), text)
        opened.open = opened._length - prefix
        return opened

    def reopened(self, keep: int, ids: Sequence[int], message: Message, text: str | None = None) -> Transcript:
        """The conversation with its last answer written anew from some point on, for the policy to go on with.

        The sequence so far joins the branches: what was sampled is trained there, and only what is sampled from now on in
        the new one.

        Args:
            keep: how many of the answer's tokens stay.
            ids: what stands behind them instead of the rest.
            message: the message as it is now.
            text: the text of the new sequence, where the transcript keeps its text.
        """
        last = self.spans[-1]
        kept = self.tokens[: last.start + keep].tolist()
        span = last._replace(end=len(kept) + len(ids), stop=None)
        anew = self.branched([*kept, *ids], (*self.spans[:-1], span), text)
        anew.messages = (*self.messages[: last.message], message)
        anew.course = Course.of(anew.messages, self.course.policy)
        anew.ended, anew.shown, anew.open = None, None, last.start
        return anew

    def appended(self, ids: Sequence[int], messages: Sequence[Message], text: str = "") -> Transcript:
        """Append messages that the policy did not write, up to the next generation prompt.

        Args:
            ids: their ids.
            messages: the messages.
            text: the text of ``ids``, where the transcript keeps its text.
        """
        start = self._length
        tape = self._room(len(ids))
        length = start + len(ids)
        tape.views()[0][start:length] = ids
        return Transcript(
            tape,
            length,
            (*self.messages, *messages),
            None,
            False,
            self.scored,
            None if self.text is None else self.text + text,
            self.answer,
            self.shown,
            self.course.then(messages),
            None,
            self.spans,
            self.branches,
            turns=self.turns,
        )

    def branched(self, ids: Sequence[int], spans: tuple[Span, ...], text: str | None = None) -> Transcript:
        """The conversation on a new sequence, whose past is written anew; this one joins the branches.

        Args:
            ids: the new sequence, up to the end of the last answer's sampled tokens.
            spans: where the answers stand in it.
            text: its text, where the transcript keeps its text.
        """
        tape = _Tape(max(_MIN_CAPACITY, 2 * len(ids)))
        tape.views()[0][: len(ids)] = ids
        tape.used = len(ids)
        finished = Branch(self.tokens.clone(), self.mask.clone(), self.log_probs.clone())
        return Transcript(
            tape,
            len(ids),
            self.messages,
            self.ended,
            False,
            self.scored,
            text,
            self.answer,
            self.shown,
            self.course,
            spans[-1].stop,
            spans,
            (*self.branches, finished),
            turns=self.turns,
        )

    def adopted(self, ids: torch.Tensor) -> Transcript:
        """The conversation with ``ids`` as its tokens, because the policy saw these instead.

        The mask and the log-probs of the longest common prefix are kept; what differs counts as not
        sampled. The text is no longer known.
        """
        shared = min(self._length, len(ids))
        differs = (self.tokens[:shared] != ids[:shared]).nonzero()
        keep = int(differs[0]) if len(differs) else shared
        state = (
            self.messages,
            self.ended,
            self.closed,
            self.scored,
            None,
            self.answer,
            self.shown,
            self.course,
            self.stop,
        )
        spans = tuple(span for span in self.spans if span.end <= keep)
        kept = Transcript(self._tape, keep, *state, spans, self.branches, turns=self.turns)
        return kept.appended(ids[keep:].tolist(), ())

    def _room(self, count: int) -> _Tape:
        """A tape on which the next ``count`` tokens behind this transcript are ours to write."""
        tape, length = self._tape, self._length
        with _claim:
            if tape.used == length and length + count <= tape.capacity:
                tape.used = length + count
                return tape
        grown = _Tape(max(_MIN_CAPACITY, 2 * (length + count)))
        for target, source in zip(grown.views(), tape.views(), strict=True):
            target[:length] = source[:length]
        grown.used = length + count
        return grown

    # ------------------------------------------------------------------ copying
    def __copy__(self) -> Transcript:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Transcript:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        arrays = tuple(view[: self._length].copy() for view in self._tape.views())
        state = (self.ended, self.closed, self.scored, self.text, self.answer, None, self.course, self.stop)
        return _restore, (arrays, self.messages, *state, self.spans, self.branches, self.open, self.turns)


def _restore(arrays: tuple[np.ndarray, ...], messages: tuple[Message, ...], *state: Any) -> Transcript:
    length = len(arrays[0])
    tape = _Tape(max(_MIN_CAPACITY, length))
    for target, source in zip(tape.views(), arrays, strict=True):
        target[:length] = source
    tape.used = length
    return Transcript(tape, length, messages, *state)
