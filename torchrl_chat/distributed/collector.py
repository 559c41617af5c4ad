"""``RayEpisodeCollector``: episodes from many workers, of which any may die at any time."""

from __future__ import annotations

import functools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tensordict import TensorDictBase
from torchrl.data import ReplayBuffer
from torchrl.envs import EnvBase

from torchrl_chat.distributed.worker import Collect, Worker, weights_of
from torchrl_chat.playing import play

_LOG = logging.getLogger(__name__)


class WorkersLostError(RuntimeError):
    """There is no worker left, and none came in time; the text says what was the matter with the last."""


@dataclass
class _Member:
    """A worker as the collector sees it: an actor and the one call that it has not answered yet."""

    actor: Any
    task: int | None = None  # the batch that it plays; None while it starts


class RayEpisodeCollector:
    """Batches of finished episodes from several Ray actors, each with its own environment and policy.

    The episodes of a :class:`~torchrl_chat.DatasetChatEnv` are one endless sequence. Batch k of a run is its episodes
    ``k * rows`` to ``(k + 1) * rows - 1``; workers are told which batch to play, and keep nothing between two of them. From
    that follows what this class promises:

    - *A worker that dies* (its process, or the whole node) is noticed by Ray; its batch goes to the next free worker, and
      another actor is started in its stead, wherever there is room: at once, or when a node joins. The others do not wait.
    - *Every episode arrives exactly once*: none is lost, and since only this process hands batches out and takes
      them in, none is trained twice.
    - *Workers need not agree on anything*: there may be more or fewer of them later; a run of 8 plays the episodes of a run
      of 1 (``TransformersPolicy(seeded=True)``: with the same answers).

    torchrl's ``RayLLMCollector`` (0.14.1) has one actor, and ends with it.

    A worker plays one batch at a time, to the end of its longest conversation; batches are delivered in the order in
    which they are finished. Weights are fetched between two batches: all tokens of a batch are of one version of the
    policy, which stands in ``"policy_version"``, int64 of the batch's size. A worker that starts late gets the newest.

    Args:
        env_factory: makes a dataset environment; pickled. Give it a seed, or each run has its own order.
        policy_factory: makes the policy; pickled.

    Keyword Args:
        workers: how many actors.
        batches: after how many batches the run ends; never if ``None``.
        replay_buffer: is extended by every batch, in this process; the collector then yields ``None``, as torchrl's do.
        collect: what a worker does for a batch; :func:`~torchrl_chat.playing.play` by default, which returns finished
            rows. A function ``(env, policy) -> TensorDict`` that begins with ``env.reset()``.
        postproc: is applied to each batch in the worker, before it travels: :func:`~torchrl_chat.training_view`, say.
        remote_config: options of the actors, such as ``{"num_cpus": 1, "num_gpus": 1}``.
        max_failures: how many workers may die before the run is given up; any number if ``None``.
        start_timeout: how many seconds to wait for a worker, where there is none.

    Raises:
        ImportError: ray is not installed.
        RuntimeError: Ray is not connected: call ``ray.init()``.
        ValueError: a setting is out of range.

    Example:
        >>> import functools  # doctest: +SKIP
        >>> make_env = functools.partial(GSM8KEnv, tokenizer=tokenizer, num_envs=8, repeats=8, seed=0)  # doctest: +SKIP
        >>> collector = RayEpisodeCollector(make_env, make_policy, workers=4, batches=100)  # doctest: +SKIP
        >>> for batch in collector:  # doctest: +SKIP
        ...     train(training_view(batch))
        ...     collector.update_policy_weights_(model)
    """

    def __init__(
        self,
        env_factory: Callable[[], EnvBase],
        policy_factory: Callable[[], Any],
        *,
        workers: int = 2,
        batches: int | None = None,
        replay_buffer: ReplayBuffer | None = None,
        collect: Collect = play,
        postproc: Callable[[TensorDictBase], TensorDictBase] | None = None,
        remote_config: Mapping[str, Any] | None = None,
        max_failures: int | None = None,
        start_timeout: float = 300.0,
    ):
        if workers < 1:
            raise ValueError(f"workers is {workers}: expected at least 1.")
        if batches is not None and batches < 1:
            raise ValueError(f"batches is {batches}: expected at least 1, or None.")
        self._ray = ray_module()
        if not self._ray.is_initialized():
            raise RuntimeError("Ray is not connected: call ray.init() (or ray.init(address=...)) first.")
        # A restart by Ray itself would be a second life that this class does not see.
        options = {"num_cpus": 1, **(remote_config or {}), "max_restarts": 0, "max_task_retries": 0}
        self._remote = self._ray.remote(**options)(Worker)
        if postproc is not None:
            collect = functools.partial(_collected, collect, postproc)
        self._arguments = (env_factory, policy_factory, collect)
        self._workers = workers
        self._members: dict[Any, _Member] = {}  # by the reference of the call under way
        self._waiting: list[_Member] = []  # ready, and without a batch
        self._again: deque[int] = deque()  # batches whose worker died
        self._received: tuple[int, TensorDictBase] | None = None  # a batch that is here and not delivered
        self._next = 0
        self._delivered = 0
        self._episodes: dict[str, Any] | None = None
        self._rows = 0
        self._weights: tuple[int, list[Any]] = (0, [])
        self._last_error: BaseException | None = None
        self._closed = False
        self.batches = batches
        self.replay_buffer = replay_buffer
        self.max_failures = max_failures
        self.start_timeout = start_timeout
        self.failures = 0
        """How many workers have died."""

    # ------------------------------------------------------------------ the batches
    def __iter__(self) -> Iterator[TensorDictBase | None]:
        """The batches that are left of the run; can be left, and begun again where it was left.

        Raises:
            WorkersLostError: there is no worker and none comes; or more died than may.
            Exception: what the environment or the policy raised in a worker. The batch is not lost, and its worker lives:
                iterating again plays it again. Or what the replay buffer raised: iterating again gives it the same batch.
        """
        if self._closed:
            raise RuntimeError("the collector is shut down.")
        while self.batches is None or self._delivered < self.batches:
            if self._received is None:
                self._received = self._receive()
            _, batch = self._received
            if self.replay_buffer is not None:
                self.replay_buffer.extend(batch)
            self._received = None
            self._delivered += 1
            yield batch if self.replay_buffer is None else None

    def _receive(self) -> tuple[int, TensorDictBase]:
        """The next batch that a worker has finished, with its number."""
        deadline = time.monotonic() + self.start_timeout
        while True:
            while len(self._members) + len(self._waiting) < self._workers:
                actor = self._remote.remote(*self._arguments)
                self._members[actor.describe.remote()] = _Member(actor)
            self._hand_out()
            if any(member.task is not None for member in self._members.values()):
                deadline = time.monotonic() + self.start_timeout
            elif time.monotonic() > deadline:
                raise WorkersLostError(
                    f"no worker has come in {self.start_timeout:.0f} s ({self.failures} died): is there a node with room for "
                    f"an actor? The cluster has {self._ray.available_resources()} free. The last failure: {self._last_error!r}"
                )
            ready, _ = self._ray.wait(list(self._members), num_returns=1, timeout=1.0)
            received = self._take(ready[0]) if ready else None
            if received is not None:
                return received

    def _hand_out(self) -> None:
        while self._waiting:
            if not self._again and self.batches is not None and self._next >= self.batches:
                return
            member = self._waiting.pop()
            if self._again:
                member.task = self._again.popleft()
            else:
                member.task, self._next = self._next, self._next + 1
            call = member.actor.play.remote(self._episodes, member.task * self._rows, *self._weights)
            self._members[call] = member

    def _take(self, call: Any) -> tuple[int, TensorDictBase] | None:
        """What a worker answered: a batch and its number, or ``None`` where it has only begun to live, or has died."""
        member = self._members.pop(call)
        task, member.task = member.task, None
        try:
            answer = self._ray.get(call)
        except self._ray.exceptions.RayTaskError as error:
            if task is None:
                raise  # its environment or policy cannot be made: nor could another's
            self._again.append(task)
            self._waiting.append(member)
            raise error.as_instanceof_cause() from None
        except self._ray.exceptions.RayError as error:
            self._lost(member, task, error)
            return None
        self._waiting.append(member)
        if task is not None:
            return task, answer
        if self._episodes is None:
            self._episodes, self._rows = answer["episodes"], answer["rows"]
        elif answer["rows"] != self._rows:
            raise ValueError(
                f"a worker's batch has {answer['rows']} rows, another's {self._rows}: expected one size."
            )
        return None

    def _lost(self, member: _Member, task: int | None, error: BaseException) -> None:
        self._last_error = error
        self.failures += 1
        if task is not None:
            self._again.append(task)
        # Where only the connection broke, the actor may live on: its answer would not be heard, so it ends here.
        self._ray.kill(member.actor, no_restart=True)
        _LOG.warning("a worker died with batch %s, which is played again: %s", task, type(error).__name__)
        if isinstance(error, self._ray.exceptions.ActorDiedError) and "creation task" in str(error):
            raise WorkersLostError(f"a worker's environment or policy cannot be made: {error}") from error
        if self.max_failures is not None and self.failures > self.max_failures:
            raise WorkersLostError(
                f"{self.failures} workers died, max_failures={self.max_failures}. The last: {error}"
            )

    # ------------------------------------------------------------------ the policy
    @property
    def policy_version(self) -> int:
        """The number of the newest weights, 0 for those that the factory made."""
        return self._weights[0]

    def update_policy_weights_(self, policy_or_weights: Any) -> None:
        """Give all workers new weights: each fetches them before its next batch.

        Args:
            policy_or_weights: the policy, its model, or a state dict of the model.
        """
        self._weights = (self._weights[0] + 1, [self._ray.put(weights_of(policy_or_weights))])

    # ------------------------------------------------------------------ the run
    def state_dict(self) -> dict[str, Any]:
        """Where the run is: the episodes, and which batches are not delivered; a few numbers, and rows that were generated."""
        return {
            "episodes": self._episodes,
            "rows": self._rows,
            "next": self._next,
            "again": sorted([*self._again, *self._open()]),
            "delivered": self._delivered,
        }

    def _open(self) -> list[int]:
        """The batches that are under way, or here and not delivered."""
        tasks = [member.task for member in self._members.values() if member.task is not None]
        return tasks if self._received is None else [*tasks, self._received[0]]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another run was, before the first batch; what was under way there is played again.

        Raises:
            RuntimeError: this run has begun.
        """
        if self._next:
            raise RuntimeError("the run has begun: load the state before the first batch.")
        self._episodes, self._rows = state["episodes"], state["rows"]
        self._next, self._delivered = state["next"], state["delivered"]
        self._again = deque(state["again"])

    def shutdown(self) -> None:
        """End the workers; batches under way are dropped, and stay in ``state_dict()``."""
        self._again.extend(self._open())
        self._received = None
        for member in (*self._members.values(), *self._waiting):
            self._ray.kill(member.actor, no_restart=True)
        self._members.clear()
        self._waiting.clear()
        self._closed = True

    def __enter__(self) -> RayEpisodeCollector:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()


def _collected(
    collect: Collect, postproc: Callable[..., TensorDictBase], env: EnvBase, policy: Any
) -> TensorDictBase:
    return postproc(collect(env, policy))


def ray_module() -> Any:
    """Ray, or what to install.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError("torchrl_chat.distributed needs Ray: pip install 'torchrl_chat[ray]'.") from error
    return ray
