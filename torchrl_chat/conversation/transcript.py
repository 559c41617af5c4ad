"""The ledger of one conversation: token ids, who sampled them, their log-probs, and the messages.

Law of this file: a transcript is a value. Extending one returns a new one that shares all earlier
tokens with it, id for id; nothing that was written is ever changed. So a saved transcript can be
stepped again, branched in two, or moved between environments.

A template that rewrites the past (history policy ``"template"``) begins a *branch*: a new sequence of
tokens for the same conversation. The finished sequences stay in :attr:`Transcript.branches`; in the new
one the mask is true on what is sampled from then on, so that over all branches each sampled token is
trained exactly once.

Sharing is what keeps a turn's cost independent of the history's length: the tokens of a conversation
lie in one growing buffer, its *tape*, and a transcript is the tape's first ``length`` tokens. The
longest transcript of a tape writes behind its own end, in place; any other one (a fork, a saved
step) gets a tape of its own first. A branch that was left keeps its tape.

In a TensorDict a transcript is a non-tensor leaf: it survives ``step_mdp``, ``rollout``, indexing,
``lazy_stack``, ``clone``, ``to(device)``, pickling and replay buffers. The ledger lives on the CPU,
where tokenizers are; what policies read on other devices are copies made by the environment.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch

from torchrl_chat.messages import Message
from torchrl_chat.templates.kinds import Course
from torchrl_chat.templates.rewriting import Span

Versions = tuple[tuple[int, int | None], ...]
"""Which weights sampled a sequence: ``(start, version)``, each from its start to the next one's; ``None``: not known."""

_MIN_CAPACITY = 256  # tokens; a short single-turn conversation never has to grow
IDS, MASK, LOG_PROBS = range(3)  # the parts of a tape
_claim = threading.Lock()  # two threads may extend the same transcript: only one may write in place


class Tape:
    """Growing buffers of token ids, mask and log-probs; ``used`` tokens of them are written.

    They are written as numpy arrays, which costs a fraction. Observations are views of tensors on the same memory, made when
    the first is asked for; as we never write through these, a version counter that is not 0 tells that somebody wrote into an
    observation.
    """

    __slots__ = ("_arrays", "_pointers", "_shown", "_tensors", "capacity", "used")

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.used = 0
        # numpy's zeros are the system's own zero pages, touched only when written; torch's are written at once.
        self._arrays: list[np.ndarray] = [
            np.empty(capacity, dtype=np.int64),
            np.zeros(capacity, dtype=np.bool_),
            np.zeros(capacity, dtype=np.float32),
        ]
        self._tensors: list[torch.Tensor | None] = [None, None, None]
        self._pointers = [0, 0, 0]
        self._shown: list[tuple[int, torch.Tensor]] = []  # the parts of which there is a tensor: most have one

    @classmethod
    def of(cls, ids: Sequence[int]) -> Tape:
        """A tape that begins with ids which nobody sampled."""
        tape = cls(max(_MIN_CAPACITY, 2 * len(ids)))
        tape.arrays[IDS][: len(ids)] = ids
        tape.used = len(ids)
        return tape

    def tensor(self, part: int) -> torch.Tensor:
        """Ids (:data:`IDS`), mask (:data:`MASK`) or log-probs (:data:`LOG_PROBS`) as a tensor."""
        found = self._tensors[part]
        if found is None:
            with _claim:
                found = self._tensors[part]
                if found is None:
                    found = _versioned(self._arrays[part])
                    self._pointers[part] = found.data_ptr()
                    self._tensors[part] = found
                    self._shown.append((part, found))
        return found

    @property
    def arrays(self) -> list[np.ndarray]:
        """Ids, mask and log-probs, to be written.

        Torch moves a tensor's storage (into shared memory, when an observation is sent to another process): then its array is
        taken anew.
        """
        for part, tensor in self._shown:
            if tensor.data_ptr() != self._pointers[part]:
                self._arrays[part] = tensor.numpy()
                self._pointers[part] = tensor.data_ptr()
        return self._arrays

    @property
    def overwritten(self) -> int | None:
        """Which of the three somebody else has written to, if one was."""
        for part, tensor in self._shown:
            if tensor._version:
                return part
        return None

    def room(self, length: int, count: int) -> Tape:
        """A tape with the first ``length`` tokens, on which the next ``count`` are the caller's to write."""
        with _claim:
            if self.used == length and length + count <= self.capacity:
                self.used = length + count
                return self
        grown = Tape(max(_MIN_CAPACITY, 2 * (length + count)))
        for target, source in zip(grown.arrays, self.arrays, strict=True):
            target[:length] = source[:length]
        grown.used = length + count
        return grown


def _versioned(array: np.ndarray) -> torch.Tensor:
    """A tensor on an array's memory, with a version counter: one that is made in inference mode has none."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            return torch.from_numpy(array)
    return torch.from_numpy(array)


class Branch(NamedTuple):
    """One sequence that the policy saw and continued, ready for training."""

    tokens: torch.Tensor
    """int64 (T,)."""
    mask: torch.Tensor
    """bool (T,), true on the tokens that are trained in this branch."""
    log_probs: torch.Tensor
    """float32 (T,), 0 where the mask is false."""
    versions: Versions = ()
    """The weights that sampled them, where the policy said it."""

    @property
    def token_versions(self) -> torch.Tensor:
        """The weights that sampled each token, int64 (T,): -1 on tokens that are not trained, and where it is not known."""
        found = torch.full(self.mask.shape, -1, dtype=torch.int64)
        ends = [start for start, _ in self.versions[1:]] + [len(found)]
        for (start, version), end in zip(self.versions, ends, strict=True):
            if version is not None:
                found[start:end] = version
        return found.masked_fill_(~self.mask, -1)


@dataclass(eq=False, repr=False, slots=True)
class Transcript:
    """The ledger of one conversation. Build one with :meth:`start`; a transcript never changes.

    Example:
        >>> import torch
        >>> t = Transcript.start([1, 2, 3], ({"role": "user", "content": "Hi"},))
        >>> answer = {"role": "assistant", "content": "Hello"}
        >>> t = t.sampled(torch.tensor([7, 8]), torch.tensor([-0.5, -0.1]), answer, ended=True)
        >>> t.tokens.tolist(), t.mask.tolist()
        ([1, 2, 3, 7, 8], [False, False, False, True, True])
    """

    tape: Tape
    """Where the tokens lie."""
    length: int
    """How many of the tape's tokens are this transcript's."""
    messages: tuple[Message, ...]
    """The conversation."""
    course: Course
    """What proofs need to know of all the messages, so that no turn looks at them all again."""
    text: str | None = None
    """The tokens' text, where the environment keeps it (text mode)."""
    ended: bool | None = None
    """``None`` while the policy is to answer; after an answer, whether it ended by itself or was cut by a limit."""
    closed: bool = False
    """Whether what surely ends the last turn stands in the tokens."""
    stop: int | None = None
    """The token with which the policy ended the last turn; ``None`` if a limit cut it."""
    answer: int | None = None
    """The position of the last sampled message in ``messages``; ``None`` before the first answer."""
    scored: bool = True
    """Whether every sampled token came with its log-prob (others read 0)."""
    spans: tuple[Span, ...] = ()
    """Where the sampled answers stand in the tokens, one an answer."""
    versions: Versions = ()
    """The weights that sampled the present sequence; empty where no policy said it."""
    branches: tuple[Branch, ...] = ()
    """The sequences that were left for another one, oldest first; empty unless the past was rewritten."""
    turns: int = 0
    """How many answers the policy gave, an answer that it wrote anew counting again."""
    open: int | None = None
    """Where the last message begins in the tokens, if the policy is to go on with it instead of beginning one."""

    # ------------------------------------------------------------------ reading
    def __len__(self) -> int:
        """The number of tokens."""
        return self.length

    @property
    def tokens(self) -> torch.Tensor:
        """All token ids, int64 of shape (T,): a view, not to be written to."""
        return self.tape.tensor(IDS)[: self.length]

    @property
    def token_array(self) -> np.ndarray:
        """:attr:`tokens` as an array of numpy's, which costs a fraction: int64 of shape (T,), a view that cannot be written to."""
        view = self.tape.arrays[IDS][: self.length]
        view.flags.writeable = False
        return view

    @property
    def mask(self) -> torch.Tensor:
        """True exactly on the tokens that the policy sampled; bool of shape (T,)."""
        return self.tape.tensor(MASK)[: self.length]

    @property
    def log_probs(self) -> torch.Tensor:
        """Log-probs of the sampled tokens, 0 elsewhere; float32 of shape (T,)."""
        return self.tape.tensor(LOG_PROBS)[: self.length]

    @property
    def sequences(self) -> tuple[Branch, ...]:
        """The training view: every sequence that the policy continued, the present one last.

        Each sampled token is under the mask of exactly one of them.
        """
        return (*self.branches, Branch(self.tokens, self.mask, self.log_probs, self.versions))

    @property
    def num_sampled(self) -> int:
        """The number of tokens that the policy sampled in the present sequence."""
        return int(np.count_nonzero(self.tape.arrays[MASK][: self.length]))

    @property
    def total_sampled(self) -> int:
        """The number of tokens that the policy sampled in all sequences."""
        return self.num_sampled + sum(int(branch.mask.sum()) for branch in self.branches)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Transcript):
            return NotImplemented
        return (
            self.length == other.length
            and all(getattr(self, name) == getattr(other, name) for name in _VALUE)
            and len(self.branches) == len(other.branches)
            and all(map(_same, self.sequences, other.sequences))
        )

    __hash__ = None  # type: ignore[assignment]  # it holds dicts

    def __repr__(self) -> str:
        roles = [message["role"] for message in self.messages]
        return f"Transcript({self.length} tokens, {self.num_sampled} sampled, roles={roles}, ended={self.ended})"

    # ------------------------------------------------------------------ writing
    def _replace(self, **changes: Any) -> Transcript:
        """:func:`dataclasses.replace` for a hot path: most fields stay, and are handed on in one go."""
        values = list(_values(self))
        for name, value in changes.items():
            values[_PLACES[name]] = value
        return Transcript(*values)

    @classmethod
    def start(
        cls, ids: Sequence[int], messages: Iterable[Message], text: str | None = None, policy: str = "assistant"
    ) -> Transcript:
        """A conversation whose first prompt is ``ids``; the policy, of that role, is to answer."""
        said = tuple(messages)
        return cls(Tape.of(ids), len(ids), said, Course.of(said, policy), text)

    def sampled(
        self,
        ids: torch.Tensor | np.ndarray,
        log_probs: torch.Tensor | np.ndarray | None,
        message: Message,
        *,
        ended: bool,
        close: Sequence[int] | None = (),
        text: str = "",
        stop: int | None = None,
        versions: Versions = (),
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
            versions: which weights sampled them, ``(start, version)`` with starts in ``ids``.
        """
        start, end = self.length, self.length + len(ids)
        length = end + len(close or ())
        tape = self.tape.room(start, length - start)
        all_ids, mask, all_log_probs = tape.arrays
        all_ids[start:end] = ids
        if log_probs is not None:
            all_log_probs[start:end] = log_probs
        mask[start:end] = True
        if close:
            all_ids[end:length] = close
        before, spans, course = self.messages, self.spans, self.course
        if self.versions or versions:
            versions = self.versions + tuple((start + at, version) for at, version in versions or ((0, None),))
        if self.open is not None:  # the last message was begun already: it is replaced by the whole of it
            before, start = before[:-1], self.open
            spans = tuple(span for span in spans if span.message < len(before))
            course = Course.of(before, course.policy)
        return Transcript(
            tape=tape,
            length=length,
            messages=(*before, message),
            course=course.then((message,)),
            text=None if self.text is None else self.text + text,
            ended=ended,
            closed=close is not None,
            stop=stop,
            answer=len(before),
            scored=self.scored and log_probs is not None,
            spans=(*spans, Span(len(before), start, end, stop)),
            versions=versions,
            branches=self.branches,
            turns=self.turns + 1,
            open=None,
        )

    def appended(self, ids: Sequence[int], messages: Sequence[Message], text: str = "") -> Transcript:
        """Append messages that the policy did not write, up to the next generation prompt.

        Args:
            ids: their ids.
            messages: the messages.
            text: the text of ``ids``, where the transcript keeps its text.
        """
        length = self.length + len(ids)
        tape = self.tape.room(self.length, len(ids))
        tape.arrays[IDS][self.length : length] = ids
        return self._replace(
            tape=tape,
            length=length,
            messages=(*self.messages, *messages),
            course=self.course.then(messages),
            text=None if self.text is None else self.text + text,
            ended=None,
            closed=False,
            stop=None,
            open=None,
        )

    def begun(self, ids: Sequence[int], prefix: int, message: Message, text: str = "") -> Transcript:
        """Open the next turn of the policy with words that it did not sample.

        Args:
            ids: what opens the turn, and the words.
            prefix: how many of the ids are the words.
            message: the message that the words begin.
            text: the text of ``ids``, where the transcript keeps its text.
        """
        return self.appended(ids, (message,), text)._replace(open=self.length + len(ids) - prefix)

    def branched(self, ids: Sequence[int], spans: tuple[Span, ...], text: str | None = None) -> Transcript:
        """The conversation on a new sequence, whose past is written anew; this one joins the branches.

        Args:
            ids: the new sequence, up to the end of the last answer's sampled tokens.
            spans: where the answers stand in it.
            text: its text, where the transcript keeps its text.
        """
        return self._replace(
            tape=Tape.of(ids),
            length=len(ids),
            text=text,
            closed=False,
            stop=spans[-1].stop,
            spans=spans,
            versions=(),
            branches=self.sequences,
            open=None,
        )

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
        kept = self.token_array[: last.start + keep].tolist()
        span = last._replace(end=len(kept) + len(ids), stop=None)
        messages = (*self.messages[: last.message], message)
        return self.branched([*kept, *ids], (*self.spans[:-1], span), text)._replace(
            messages=messages,
            course=Course.of(messages, self.course.policy),
            ended=None,
            open=last.start,
        )

    def adopted(self, ids: torch.Tensor) -> Transcript:
        """The conversation with ``ids`` as its tokens, because the policy saw these instead.

        The mask and the log-probs of the longest common prefix are kept; what differs counts as not
        sampled. The text is no longer known. An open turn stays open.

        Raises:
            ValueError: a turn is open, and ``ids`` do not end with what it begins with.
        """
        begun = None if self.open is None else len(ids) - (self.length - self.open)
        if begun is not None and (begun < 0 or not torch.equal(ids[begun:], self.tokens[self.open :])):
            raise ValueError(
                f"the policy is to go on with a turn that begins with the ids {self.token_array[self.open :].tolist()}, and the "
                f"prompt that it reports ends otherwise: {ids[-8:].tolist()}."
            )
        shared = min(self.length, len(ids))
        differs = (self.tokens[:shared] != ids[:shared]).nonzero()
        keep = int(differs[0]) if len(differs) else shared
        kept = self._replace(
            length=keep,
            text=None,
            spans=tuple(span for span in self.spans if span.end <= keep),
            versions=tuple(span for span in self.versions if span[0] < keep),
        )
        return kept.appended(ids[keep:].tolist(), ())._replace(open=begun)

    # ------------------------------------------------------------------ copying
    def __copy__(self) -> Transcript:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Transcript:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        arrays = tuple(view[: self.length].copy() for view in self.tape.arrays)
        state = {name: getattr(self, name) for name in _NAMES if name not in ("tape", "length")}
        # A view's pickle would take the whole tape along.
        state["branches"] = tuple(
            Branch(b.tokens.clone(), b.mask.clone(), b.log_probs.clone(), b.versions) for b in self.branches
        )
        return _restore, (arrays, state)


_NAMES = [field.name for field in fields(Transcript)]
_PLACES = {name: place for place, name in enumerate(_NAMES)}
_values = operator.attrgetter(*_NAMES)
_VALUE = [name for name in _NAMES if name not in ("tape", "length", "course", "branches")]


def _same(mine: Branch, other: Branch) -> bool:
    return all(map(torch.equal, mine[:3], other[:3])) and mine.versions == other.versions


def _restore(arrays: tuple[np.ndarray, ...], state: dict[str, Any]) -> Transcript:
    length = len(arrays[0])
    tape = Tape(max(_MIN_CAPACITY, length))
    for target, source in zip(tape.arrays, arrays, strict=True):
        target[:length] = source
    tape.used = length
    return Transcript(tape=tape, length=length, **state)
