"""``RayChatCollector``: torchrl's collector in one Ray actor, with its defects mended."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tensordict import TensorDictBase
from torchrl.collectors.llm import RayLLMCollector

from torchrl_chat.distributed.collector import ray_module


class RayChatCollector(RayLLMCollector):
    """torchrl's ``RayLLMCollector``: an ``LLMCollector`` in one Ray actor.

    What it mends of torchrl 0.14.1:

    - iteration never ends: after ``total_dialog_turns`` it yields ``None`` for ever; here it stops;
    - a ``RayReplayBuffer`` cannot be given as ``replay_buffer`` (``AttributeError: ... '_futures_lock'``, it cannot be
      pickled): the actor is given its ``client()``, which can;
    - ``total_dialog_turns`` and ``dialog_turns_per_batch`` raise ``TypeError``: they are kept here;
    - ``sync_iter=False`` fails without ``remote_config``, and ``num_cpus`` likewise.

    The run ends when the actor dies; :class:`~torchrl_chat.distributed.RayEpisodeCollector` goes on.

    Keyword Args:
        total_dialog_turns: how many turns to collect; -1 for no end.

    All arguments are as for ``RayLLMCollector``.

    Raises:
        ImportError: ray is not installed.
    """

    def __init__(
        self,
        env: Any,
        *,
        dialog_turns_per_batch: int,
        total_dialog_turns: int = -1,
        replay_buffer: Any = None,
        remote_config: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        self._ray = ray_module()
        self.total_frames, self.requested_frames_per_batch = total_dialog_turns, dialog_turns_per_batch
        super().__init__(
            env,
            dialog_turns_per_batch=dialog_turns_per_batch,
            total_dialog_turns=total_dialog_turns,
            replay_buffer=replay_buffer.client() if hasattr(replay_buffer, "_runtime_lease") else replay_buffer,
            remote_config=dict(remote_config or {}),
            **kwargs,
        )
        self.replay_buffer = replay_buffer
        self._ahead: Any = None  # the call that is under way while a batch is used

    @property
    def total_dialog_turns(self) -> int:
        """How many turns are collected; -1 for no end."""
        return self.total_frames

    @property
    def dialog_turns_per_batch(self) -> int:
        """How many turns a batch has, at least."""
        return self.requested_frames_per_batch

    def _next_remote(self) -> Any:
        # torchrl's own call answers None at the end, and for each batch that went to the buffer.
        return self._collector.__ray_call__.remote(_following)

    def next(self) -> TensorDictBase | None:
        """The next batch; ``None`` at the end, and where there is a replay buffer, which has it then."""
        return self._ray.get(self._next_remote())[1]

    def __iter__(self) -> Iterator[TensorDictBase | None]:
        """The batches; ``None`` for each where there is a replay buffer, which has it then."""
        while True:
            call, self._ahead = self._ahead or self._next_remote(), None
            more, batch = self._ray.get(call)
            if not more:
                return
            if not self.sync_iter:
                self._ahead = self._next_remote()
            yield batch


def _following(collector: Any) -> tuple[bool, TensorDictBase | None]:
    """In the actor: whether there was another batch, and the batch."""
    if collector._iterator is None:
        collector._iterator = iter(collector)
    for batch in collector._iterator:
        return True, batch
    return False, None
