"""A TorchRL environment of this package as an OpenEnv environment: datasets, verifiers, tools and users over the wire.

Our environments hold configuration, not conversations: what a turn needs travels in its TensorDict. So a session is a
TensorDict, and a few copies of the environment (one a thread, not one a session) serve all sessions.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.modules.llm.policies import Tokens

from torchrl_chat import columns
from torchrl_chat.conversation import ResponseError, StopReason, Transcript
from torchrl_chat.conversation.turn import check_ids
from torchrl_chat.messages import MessageError, as_messages
from torchrl_chat.openenv.chat.episode import Conversation, EpisodeEnded, StepOutcome
from torchrl_chat.openenv.chat.ledger import Ledger
from torchrl_chat.openenv.models import ChatAction, EnvironmentMetadata
from torchrl_chat.openenv.protocol import short
from torchrl_chat.openenv.tokens import behind_prompt
from torchrl_chat.seeds import mixed

_ONE = torch.Size([1])
_PREVIEW = 1000  # tasks in a list


class EnvPool:
    """Copies of one environment, lent for one step at a time.

    Args:
        make: makes the environment of a split: a :class:`~torchrl_chat.ChatEnv` in tokens mode, a dataset environment, or
            either with transforms; of batch size (1,), a dataset in its own order (``shuffle=False``).
        splits: the splits of its dataset.
        name: the environment's name.
        description: what it is, for ``/metadata``.

    Example:
        >>> from torchrl_chat import CountdownEnv
        >>> from torchrl_chat.openenv import create_app
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> pool = EnvPool(lambda split: CountdownEnv(tokenizer=tokenizer, input_mode="tokens", shuffle=False, split=split))
        >>> app = create_app(lambda: TorchRLEnvironment(pool), env_name="countdown")
    """

    def __init__(
        self,
        make: Callable[[str], Any],
        splits: Sequence[str] = ("train",),
        name: str = "chat",
        description: str | None = None,
    ):
        if not splits:
            raise ValueError("splits is empty: an environment has one at least.")
        self.splits = tuple(splits)
        self.name = name
        self.description = description or f"The {name} environment of torchrl_chat."
        self._make = make
        self._free: dict[str, list[Any]] = {split: [] for split in self.splits}
        self._lock = threading.Lock()

    @contextmanager
    def lend(self, split: str) -> Iterator[Any]:
        """An environment for the time of a ``with`` block; a new one where all are in use.

        Raises:
            ValueError: there is no such split, or the environment is not of the kind that can be served.
        """
        if split not in self._free:
            raise ValueError(f"there is no split {short(split)}: {self.name} has {', '.join(self.splits)}.")
        with self._lock:
            env = self._free[split].pop() if self._free[split] else None
        if env is None:
            env = self._make(split)
            base = _base(env)
            if env.batch_size != _ONE or not hasattr(base, "append_messages") or base.input_mode != "tokens":
                raise ValueError(
                    f"{type(env).__name__} cannot be served: expected a ChatEnv with input_mode='tokens' and batch size "
                    f"(1,), got {getattr(base, 'input_mode', None)!r} and {tuple(env.batch_size)}."
                )
            base.errors = "raise"  # to the client, whose episode then stays as it was
        try:
            yield env
        finally:
            with self._lock:
                self._free[split].append(env)


class TorchRLEnvironment(Conversation):
    """One conversation with an environment of an :class:`EnvPool`, by OpenEnv's interface.

    ``reset(split=, index=)`` begins with that row of the dataset, ``reset(seed=)`` with one that the seed chooses;
    without either, rows come in an order of the session's own. An environment without a dataset takes
    ``reset(messages=...)``. Actions are :class:`ChatAction` in all their forms; what tools and simulated users answer
    stands in the next observation. Its ``metadata`` has ``stop_reason``, ``tokens_left``, ``reward_parts``,
    ``grade_failure``, where the environment tells them, and ``task``, the row, after a reset.

    Args:
        pool: the environments.
    """

    def __init__(self, pool: EnvPool):
        super().__init__()
        self._pool = pool
        self._split = pool.splits[0]
        self._td: TensorDictBase | None = None
        self._own = mixed(uuid.uuid4().hex)

    # ------------------------------------------------------------------ OpenEnv's methods
    def reset_turn(
        self,
        seed: int | None = None,
        episode_id: str | None = None,
        split: str | None = None,
        index: int | None = None,
        messages: Any = None,
        query: Any = None,
        **kwargs: Any,
    ) -> StepOutcome:
        """Begin an episode.

        Args:
            seed: chooses the row, and seeds what is random in the episode.
            episode_id: the episode's identifier.
            split: the split; the first one if ``None``.
            index: the row.
            messages, query: what the conversation begins with, for an environment without a dataset.
            **kwargs: not used; named under ``"ignored"`` in the metadata.

        Raises:
            IndexError: there is no such row.
            ValueError: no such split, or a malformed message.
        """
        split = self._pool.splits[0] if split is None else split
        metadata: dict[str, Any] = {"ignored": sorted(kwargs)} if kwargs else {}
        with self._pool.lend(split) as env:
            given = messages if messages is not None else query
            episodes = _episodes(env)
            if episodes is None:
                if given is None:
                    raise MessageError("this environment has no dataset: reset it with messages=[...].")
                start = TensorDict(batch_size=_ONE)
                start[_base(env).data_key] = columns.objects([as_messages(given)], _ONE, None)
                td = env.reset(start)
            else:
                if given is not None:
                    metadata["ignored"] = sorted([*metadata.get("ignored", ()), "messages"])
                rows = _rows(env)
                if index is not None:
                    _check_index(index, rows, split)
                draw = self._own if seed is None else seed
                chosen = mixed(draw, "task") % rows if index is None else index
                episodes.reseed(draw)
                episodes.drawn = chosen
                td = env.reset()
                metadata["task"] = {"split": split, "index": chosen}
        self._own = mixed(self._own, "next")
        self._td, self._split = td, split
        return self._begun(Ledger.of(_transcript(td)), episode_id, metadata | _told(td))

    def step_turn(self, action: ChatAction, timeout_s: float | None = None) -> StepOutcome:
        """Take one turn; the episode stays as it was if anything is raised.

        Raises:
            EpisodeEnded: the episode has ended, or never began.
            ResponseError: an id that the tokenizer does not have.
            BridgeError: the chat template refuses the messages here.
        """
        if self._td is None or self._ledger is None:
            raise EpisodeEnded("there is no episode yet: reset begins one.")
        self._check_running()
        with self._pool.lend(self._split) as env:
            base = _base(env)
            if action.messages is not None:
                after = root = base.append_messages(self._td, [action.messages])
                reward, done = 0.0, False
            else:
                stepped = env.step(_answered(base, self._td, self._ledger.transcript, action))
                after, root = stepped["next"], env.step_mdp(stepped)
                reward, done = _number(after.get("reward", None)) or 0.0, bool(after["done"].any())
        metadata = _told(after)
        if done and "stop_reason" not in metadata:
            metadata["stop_reason"] = StopReason.of(
                None, terminated=bool(after["terminated"].any()), done=True
            ).word
        self._td = root
        ledger = self._ledger.then(_transcript(after))
        return self._stepped(StepOutcome(ledger=ledger, reward=reward, done=done, metadata=metadata))

    def get_metadata(self) -> EnvironmentMetadata:
        """Name, description and version."""
        return EnvironmentMetadata(name=self._pool.name, description=self._pool.description, version="1.0.0")

    def prepare(self) -> None:
        """Try a reset. What is wrong with the dataset or the template raises here; the environment is kept for others."""
        with self._pool.lend(self._pool.splits[0]) as env:
            question = "?" if _episodes(env) is None else None
        TorchRLEnvironment(self._pool).reset_turn(query=question)

    # ------------------------------------------------------------------ tasks
    def list_splits(self) -> list[Any]:
        """The splits of the dataset."""
        return list(self._pool.splits)

    def num_tasks(self, split: str) -> int:
        """How many rows a split has."""
        with self._pool.lend(split) as env:
            return _rows(env)

    def get_task(self, split: str, index: int) -> dict[str, Any]:
        """One row: its id, index and question; not its answer."""
        with self._pool.lend(split) as env:
            _check_index(index, _rows(env), split)
            return _task(env, split, index)

    def get_task_range(self, split: str, start: int | None = None, stop: int | None = None) -> list[Any]:
        """The rows from ``start`` up to ``stop``."""
        with self._pool.lend(split) as env:
            chosen = range(_rows(env))[slice(start, stop)]
            if len(chosen) > _PREVIEW:
                raise ValueError(f"{len(chosen)} tasks are wanted: ask for {_PREVIEW} at most.")
            return [_task(env, split, index) for index in chosen]

    def list_tasks(self, split: str) -> list[Any]:
        """The rows of a split, the first thousand at most."""
        return self.get_task_range(split, 0, _PREVIEW)


# ---------------------------------------------------------------------- TensorDicts
def _base(env: Any) -> Any:
    """The ChatEnv under the transforms."""
    return getattr(env, "base_env", env)


def _transcript(td: TensorDictBase) -> Transcript:
    return columns.read_objects(td.get("transcript"), _ONE)[0]


def _answered(base: Any, td: TensorDictBase, before: Transcript, action: ChatAction) -> TensorDictBase:
    """The TensorDict with the action as the policy's response."""
    codec, reason = base.template.codec, action.finish_reason
    if action.tokens is not None:
        ids = behind_prompt(action.tokens, before.tokens)
    else:
        ids = codec.encode_continuation([str(action.text)], [int(before.tokens[-1])])[0]
        reason = reason or "stop"
    check_ids(ids, codec.vocab_size)
    if before.ended is not None:
        raise ResponseError("it is not the policy's turn: send the next message first (messages=[...]).")
    td = td.copy()
    td["tokens"] = columns.ragged(Tokens, "response", [torch.tensor(ids, dtype=torch.int64)], _ONE, None)
    if reason is not None:
        td["finish_reason"] = columns.objects([reason], _ONE, None)
    return td


def _told(td: TensorDictBase) -> dict[str, Any]:
    """What the environment tells of the turn, as JSON values."""
    told: dict[str, Any] = {}
    reason = _number(td.get("stop_reason", None))
    if reason:
        told["stop_reason"] = StopReason(int(reason)).word
    left = _number(td.get("tokens_left", None))
    if left is not None and left < 2**31 - 1:
        told["tokens_left"] = int(left)
    parts = td.get("reward_parts", None)
    if parts is not None:
        told["reward_parts"] = {str(key): _number(value) for key, value in parts.items()}
    failure = td.get("grade_failure", None)
    if failure is not None and (text := columns.read_objects(failure, _ONE)[0]):
        told["grade_failure"] = str(text)
    return told


def _number(value: Any) -> float | None:
    return float(value.flatten()[0]) if isinstance(value, torch.Tensor) and value.numel() else None


# ---------------------------------------------------------------------- rows
def _episodes(env: Any) -> Any:
    """The rows of a dataset environment, to be chosen from; ``None`` where there is no dataset."""
    transform: Any = getattr(env, "transform", None)
    parts: list[Any] = list(transform) if hasattr(transform, "__iter__") else [transform]
    found = next((part.episodes for part in parts if hasattr(part, "episodes")), None)
    if found is not None and not hasattr(found, "drawn"):
        raise ValueError("the rows come from a dataloader: only a dataset can be served, whose rows have numbers.")
    if found is not None and (found.shuffle or found.repeats != 1):
        raise ValueError(
            "make the environment with shuffle=False and without repeats: rows are chosen by their number."
        )
    return found


def _rows(env: Any) -> int:
    episodes = _episodes(env)
    if episodes is None:
        raise NotImplementedError
    return len(episodes.dataset)


def _check_index(index: Any, rows: int, split: str) -> None:
    if not isinstance(index, int) or isinstance(index, bool):
        raise ValueError(f"index is {short(index)}: expected a whole number.")
    if not 0 <= index < rows:
        raise IndexError(f"there is no row {index}: the {split} split has {rows}.")


def _task(env: Any, split: str, index: int) -> dict[str, Any]:
    episodes, key = _episodes(env), _base(env).data_key
    episodes.drawn = index
    return {"id": f"{split}-{index}", "index": index, key: episodes.next()[key]}
