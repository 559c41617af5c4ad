"""``PolicyEngine``: a policy of this package as an engine, whatever waits sampled together.

Law of this file: what goes wrong in one answer costs that answer; and nothing is sampled by two versions of the weights.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torchrl_chat.conversation import Turn
from torchrl_chat.conversation.turn import Errors
from torchrl_chat.endpoint import Endpoint
from torchrl_chat.gateway.engines import Ask
from torchrl_chat.policies.policy import Policy, Prompt

_Waiting = tuple[Ask, asyncio.AbstractEventLoop, "asyncio.Future[Turn]"]


class PolicyEngine:
    """Samples with a policy: :class:`~torchrl_chat.TransformersPolicy`, :class:`~torchrl_chat.VLLMPolicy`, one of yours.

    A thread takes whatever answers are waited for, of all sessions, and asks the policy for them in one batch; those that come
    meanwhile are the next one. A policy whose engine batches by itself (an asynchronous vLLM engine, an endpoint) is asked for each
    answer as it comes.

    A policy that tells of tokens as it samples them (:attr:`~torchrl_chat.policies.Policy.tells`) has streams told as they grow, and stops
    sampling for whoever has left.

    Args:
        policy: the policy. How it samples is its own: sessions cannot set a temperature here.

    Keyword Args:
        max_batch: how many answers are sampled at once.
        gather: seconds to wait for more once an answer is waited for: agents that were answered together ask together.
        continuous: whether answers are asked for one by one; ``None``: where the policy's engine batches by itself.
        version: of the policy's weights, put down beside what it samples where the policy itself says nothing.

    Example:
        >>> from torchrl_chat import TransformersPolicy
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_model, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> model = tiny_model(len(tokenizer))
        >>> engine = PolicyEngine(TransformersPolicy(model, tokenizer, max_new_tokens=64))
        >>> with engine.updating():  # nothing is being sampled in here
        ...     pass  # an optimizer step
    """

    settings: frozenset[str] = frozenset()

    def __init__(
        self,
        policy: Policy,
        *,
        max_batch: int = 64,
        gather: float = 0.002,
        continuous: bool | None = None,
        version: int | None = None,
    ):
        if max_batch < 1:
            raise ValueError(f"max_batch is {max_batch}: expected at least 1.")
        if gather < 0:
            raise ValueError(f"gather is {gather}: expected seconds, 0 or more.")
        own = isinstance(policy, Endpoint) or policy.__dict__.get("_loop") is not None
        self.policy, self.version = policy, version
        self.max_batch, self.gather = max_batch, gather
        self.continuous = own if continuous is None else continuous
        self._pause = 0.02  # seconds between two looks at what is sampled: each wakes up the event loop
        self.batches: collections.Counter[int] = collections.Counter()
        """How many batches there were of each size."""
        self._waiting: collections.deque[_Waiting] = collections.deque()
        self._awake = threading.Condition()
        self._weights = threading.Condition()
        self._sampling, self._changing = 0, False  # both belong to that condition
        self._thread: threading.Thread | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._closed = False

    @property
    def waiting(self) -> int:
        """How many requests wait for the policy."""
        return len(self._waiting)

    async def sample(self, ask: Ask) -> Turn:
        """See :class:`~torchrl_chat.gateway.engines.Engine`."""
        loop = asyncio.get_running_loop()
        if self.continuous:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(256, "torchrl_chat.policy")
            return await loop.run_in_executor(self._pool, self._alone, ask)
        future: asyncio.Future[Turn] = loop.create_future()
        with self._awake:
            self._closed = False
            self._waiting.append((ask, loop, future))
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._work, name="torchrl_chat.policy", daemon=True)
                self._thread.start()
            self._awake.notify()
        return await future

    @contextlib.contextmanager
    def updating(self, version: int | None = None) -> Iterator[None]:
        """Change the weights: whatever is being sampled is waited for, and nothing else begins. What waits is sampled behind it.

        Args:
            version: of the new weights; one more than that of the old if ``None``, where that is known.
        """
        with self._weights:
            self._weights.wait_for(lambda: not self._changing)
            self._changing = True
        try:
            with self._weights:
                self._weights.wait_for(lambda: not self._sampling)
            yield
            if version is not None:
                self.version = version
            elif self.version is not None:
                self.version += 1
        finally:
            with self._weights:
                self._changing = False
                self._weights.notify_all()

    @contextlib.contextmanager
    def _fixed(self) -> Iterator[int | None]:
        """The version of the weights, which stays while something is sampled in here."""
        with self._weights:
            self._weights.wait_for(lambda: not self._changing)
            self._sampling += 1
        try:
            yield self.version
        finally:
            with self._weights:
                self._sampling -= 1
                self._weights.notify_all()

    async def aclose(self) -> None:
        """End the thread. What waits is cancelled; the policy itself stays as it is."""
        with self._awake:
            self._closed = True
            waiting, self._waiting = list(self._waiting), collections.deque()
            self._awake.notify()
        for _, loop, future in waiting:
            loop.call_soon_threadsafe(future.cancel)
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    # ------------------------------------------------------------------ in the thread
    def _work(self) -> None:
        while True:
            with self._awake:
                while not self._waiting:
                    if self._closed or (not self._awake.wait(60.0) and not self._waiting):
                        self._thread = None
                        return
                more = len(self._waiting) < self.max_batch
            if more and self.gather:
                time.sleep(self.gather)
            with self._awake:
                some = [self._waiting.popleft() for _ in range(min(len(self._waiting), self.max_batch))]
            # Who has left is not sampled for.
            some = [each for each in some if not each[2].cancelled()]
            # A policy takes a batch of prompts with seeds, or one without any.
            for seeded in (True, False):
                if batch := [each for each in some if (each[0].seed is not None) == seeded]:
                    self._answer(batch)

    def _answer(self, batch: list[_Waiting]) -> None:
        found = self._sampled([ask for ask, _, _ in batch], _Listener(batch, self._pause))
        told: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Turn], Turn | Exception]]] = {}
        for (_, loop, future), result in zip(batch, found, strict=True):
            told.setdefault(loop, []).append((future, result))
        for loop, results in told.items():
            with contextlib.suppress(RuntimeError):  # a loop that is closed waits for nothing
                loop.call_soon_threadsafe(_tell, results)

    def _alone(self, ask: Ask) -> Turn:
        [result] = self._sampled([ask])
        if isinstance(result, Exception):
            raise result
        return result

    def _sampled(self, asks: list[Ask], listener: _Listener | None = None) -> list[Turn | Exception]:
        prompts = [Prompt(ask.ids, ask.messages, ask.limit, ask.seed) for ask in asks]
        errors: Errors = {}
        try:
            with self._fixed() as version:
                if listener is not None and self.policy.tells:
                    turns = list(self.policy.sample(prompts, errors, listener))
                else:
                    turns = list(self.policy.sample(prompts, errors))
            if len(turns) != len(asks):
                raise ValueError(f"the policy returned {len(turns)} turns for {len(asks)} prompts.")
        except Exception as error:  # of the whole batch
            return [error] * len(asks)
        except BaseException as error:  # one that would end the thread, and leave all who wait without an answer
            return [RuntimeError(f"the policy raised {type(error).__name__}: {error}")] * len(asks)
        self.batches[len(asks)] += 1
        return [errors[i] if i in errors else _of_version(turn, version) for i, turn in enumerate(turns)]


class _Listener:
    """Hears of a batch as it is sampled: tells streams of it, and ends the rows that nobody waits for any more.

    Args:
        batch: what is asked, where, and who waits for it.
        pause: seconds between two times that an event loop is told.
    """

    def __init__(self, batch: Sequence[_Waiting], pause: float):
        self._batch, self._pause, self._next = batch, pause, 0.0
        self._streams = [i for i, (ask, _, _) in enumerate(batch) if ask.told is not None]
        self._known = dict.fromkeys(self._streams, 0)

    def __call__(self, so_far: Mapping[int, Sequence[int]]) -> list[int]:
        """The rows that are to sample no more."""
        now = time.monotonic()
        if self._streams and now >= self._next:
            self._next = now + self._pause
            self._tell(so_far)
        return [i for i in so_far if self._batch[i][2].cancelled()]

    def _tell(self, so_far: Mapping[int, Sequence[int]]) -> None:
        news: dict[asyncio.AbstractEventLoop, list[tuple[_Waiting, list[int]]]] = {}
        for i in self._streams:
            ids = so_far.get(i, ())
            if len(ids) > self._known[i]:
                self._known[i] = len(ids)
                news.setdefault(self._batch[i][1], []).append((self._batch[i], list(ids)))
        for loop, told in news.items():
            with contextlib.suppress(RuntimeError):  # a loop that is closed waits for nothing
                loop.call_soon_threadsafe(_grow, told)


def _grow(told: Sequence[tuple[_Waiting, list[int]]]) -> None:
    for (ask, _, future), ids in told:
        if ask.told is not None and not future.done():
            ask.told(ids)


def _of_version(turn: Any, version: int | None) -> Turn | Exception:
    if not isinstance(turn, Turn):
        return TypeError(f"the policy returned a {type(turn).__name__}: expected a Turn.")
    return turn if turn.versions or version is None else dataclasses.replace(turn, versions=((0, version),))


def settle(future: asyncio.Future[Turn], result: Turn | Exception) -> None:
    """Give what was sampled to whoever waits for it, if somebody still does."""
    if future.done():
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)


def _tell(results: list[tuple[asyncio.Future[Turn], Turn | Exception]]) -> None:
    for future, result in results:
        settle(future, result)


def engine_of(policy: Any) -> Any:
    """The engine of a policy; an engine itself."""
    return PolicyEngine(policy) if isinstance(policy, Policy) else policy
