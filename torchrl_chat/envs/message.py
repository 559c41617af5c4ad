"""``MessageChatEnv``: a batch of :class:`~torchrl_chat.conversation.MessageEnv` episodes as a torchrl environment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.data import Composite, Unbounded

from torchrl_chat import columns
from torchrl_chat.conversation import MessageEnv, Reply, StopReason
from torchrl_chat.conversation.environment import State, begin_all, close_all, step_all, toolbox_of
from torchrl_chat.envs.dataset import DatasetChatEnv
from torchrl_chat.envs.episodes import Episodes
from torchrl_chat.envs.loading import RowPrimer
from torchrl_chat.seeds import EPISODE_KEYS, EPOCH, ROW, mixed
from torchrl_chat.transforms.home import chat_env, flags, raise_flags, tell_failures

STATE_KEY = "episode"
"""Where the state of an episode travels: an object a row."""


class EpisodePrimer(RowPrimer):
    """Begins an episode of a :class:`~torchrl_chat.conversation.MessageEnv` for every conversation, and steps it.

    Args:
        episodes: the rows.
        make: what makes an instance.
        data_key: where the messages go that a conversation begins with.
        deadline: seconds for asynchronous resets and steps.

    The others are as for :class:`~torchrl_chat.envs.loading.RowPrimer`.
    """

    def __init__(
        self,
        episodes: Episodes,
        *,
        make: Callable[[], MessageEnv],
        data_key: str,
        user_role: str,
        deadline: float | None,
        **kwargs: Any,
    ):
        self.make = make
        self.data_key = data_key
        self.user_role = user_role
        self.deadline = deadline
        super().__init__(episodes, **kwargs)

    def _example(self, episodes: Episodes) -> dict[str, Any]:
        return {**episodes.example(), self.data_key: "a question", STATE_KEY: State(MessageEnv())}

    # ------------------------------------------------------------------ reset
    def _begun(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        seed = self.episodes.seed  # type: ignore[attr-defined]
        envs = []
        for row in rows:
            env = self.make()
            # Of the row and the epoch alone: a group of repeats plays one and the same episode.
            env.seed, env.turn = mixed(seed, "message episode", row[ROW], row[EPOCH]), 0
            envs.append(env)
        known = [{key: value for key, value in row.items() if key not in EPISODE_KEYS} for row in rows]
        said = begin_all(envs, known, self.deadline, self.user_role)
        return [
            {**row, self.data_key: messages, STATE_KEY: State(env)}
            for row, messages, env in zip(rows, said, envs, strict=True)
        ]

    # ------------------------------------------------------------------ step
    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        following = super()._step(tensordict, next_tensordict)
        env, batch, device = chat_env(self), following.batch_size, following.device
        transcripts = env._transcripts(following)
        states: list[State] = columns.read_objects(tensordict.get(STATE_KEY), batch)
        rows = zip(columns.stepped(tensordict), flags(following, "done"), transcripts, strict=True)
        asked = [i for i, (going, done, t) in enumerate(rows) if going and not done and t.ended is not None]
        replies: dict[int, Reply | Exception] = {}
        stepped: dict[int, MessageEnv] = {}
        for i in asked:
            try:
                stepped[i] = states[i].episode()
            except ValueError as error:
                replies[i] = error
        said = [transcripts[i].messages[-1] for i in stepped]
        replies.update(
            zip(stepped, step_all(list(stepped.values()), said, self.deadline, self.user_role), strict=True)
        )
        lines = [
            list(reply.messages) if isinstance(reply := replies.get(i), Reply) and reply.messages else None
            for i in range(len(states))
        ]
        errors: dict[int, Exception] = {}
        if any(lines):
            following = env.append_messages(following, lines, errors=errors)
        failures = [""] * len(states)
        rewards, ends = [0.0] * len(states), [False] * len(states)
        solved, graded = [False] * len(states), [False] * len(states)
        for i, reply in replies.items():
            if isinstance(reply, Exception):
                failures[i] = f"{type(reply).__name__}: {reply}"
                continue
            rewards[i], ends[i], solved[i] = reply.reward, reply.done, bool(reply.success)
            if i in errors:
                failures[i] = f"{type(errors[i]).__name__}: {errors[i]}"
            graded[i] = not failures[i]
        for i, episode in stepped.items():
            states[i] = State(episode)
        following.set(STATE_KEY, columns.objects(states, batch, device))
        paid = torch.tensor(rewards, dtype=torch.float32, device=device).reshape(*batch, 1, 1)
        before = following.get("reward", None)
        following.set("reward", paid if before is None else before.reshape(paid.shape) + paid)
        for key, told in (("success", solved), ("graded", graded)):
            following.set(key, torch.tensor(told, device=device).reshape(*batch, 1, 1))
        self._end(tensordict, following, ends, failures)
        return following

    def settle(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> None:
        """Close the episodes that are over, whoever has ended them."""
        states = columns.read_objects(next_tensordict.get(STATE_KEY), next_tensordict.batch_size)
        rows = zip(states, flags(next_tensordict, "done"), columns.stepped(tensordict), strict=True)
        close_all([state.env for state, done, went in rows if done and went], self.deadline)

    @staticmethod
    def _end(root: TensorDictBase, td: TensorDictBase, ends: list[bool], failures: list[str]) -> None:
        """End the rows that are over: those that failed truncated, with the reason."""
        batch, device = td.batch_size, td.device
        told = tell_failures(td, root, failures)
        if any(told):
            known = columns.read_objects(td.get("env_failure"), batch)
            told = [old or why for old, why in zip(known, told, strict=True)]
            td.set("env_failure", columns.objects(told, batch, device))
        raise_flags(td, ends, "terminated", "done")
        raise_flags(td, list(map(bool, failures)), "truncated", "done")
        if any(ends):
            reasons = td.get("stop_reason")
            answered = torch.tensor(ends, device=device).reshape(reasons.shape) & (reasons == StopReason.RUNNING)
            td.set("stop_reason", torch.where(answered, int(StopReason.ANSWERED), reasons))

    def transform_reward_spec(self, reward_spec: Composite) -> Composite:
        """The specs of ``reward``, ``success`` and ``graded``."""
        for key, dtype in (("reward", torch.float32), ("success", torch.bool), ("graded", torch.bool)):
            reward_spec[key] = Unbounded((*reward_spec.shape, 1, 1), dtype=dtype, device=reward_spec.device)
        return reward_spec


class MessageChatEnv(DatasetChatEnv):
    """A batch of conversations with a :class:`~torchrl_chat.conversation.MessageEnv`, which replies, pays and ends them.

    Each conversation has an instance of its own, whose attributes travel in the TensorDict (entry ``"episode"``, an object a
    row): a TensorDict that was saved steps again to the same result. An episode's seed comes from the environment's seed, the
    row and the epoch: the repeats of a row (a group of GRPO) play the same episode. Written under ``"next"``, over the batch
    size B: ``"reward"``, float32 (\\*B, 1, 1), ``"success"`` and ``"graded"``, bool (\\*B, 1, 1), ``"terminated"`` and ``"done"``
    where the episode is over. Where an
    instance raises, or says what the chat template refuses, the row ends truncated and ``"env_failure"`` says why. Transforms
    that are appended see the turn behind it: a :class:`~torchrl_chat.Budget`, a further reward.

    Args:
        env: the class, or a function that makes an instance.

    Keyword Args:
        dataset: the rows that ``reset`` gets, as for :class:`DatasetChatEnv`; by default those of the class. Without any, every
            episode gets ``{"index": 0}``, and its seed makes the difference.
        deadline: seconds for a reset or a step that is asynchronous; those of a batch run at once. One that is not cannot be
            interrupted, and runs after the one in front.

    The others are as for :class:`DatasetChatEnv`.

    Raises:
        TypeError: ``env`` makes no :class:`~torchrl_chat.conversation.MessageEnv`, or a tool of it cannot be told to a model.

    Example:
        >>> from torchrl_chat import MessageEnv
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> class Echo(MessageEnv):
        ...     def reset(self, row):
        ...         return "Say something."
        ...
        ...     def step(self, message):
        ...         return None, float(len(message["content"])), True
        >>> env = MessageChatEnv(Echo, tokenizer=tokenizer, input_mode="tokens", num_envs=4)
        >>> env.reset()["query"][0]
        [{'role': 'user', 'content': 'Say something.'}]
    """

    def __init__(
        self,
        env: Callable[[], MessageEnv],
        *,
        dataset: Any = None,
        deadline: float | None = 60.0,
        system_prompt: str | None = None,
        template_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        if kwargs.get("ray_backend"):
            raise TypeError("MessageChatEnv draws its rows itself: ray_backend is not to be had.")
        cls = env if isinstance(env, type) else type(env())
        if not issubclass(cls, MessageEnv):
            raise TypeError(f"env makes a {cls.__name__}: expected a MessageEnv (torchrl_chat.conversation).")
        self.__dict__["_episode"] = {
            "make": env,
            "deadline": deadline,
            "data_key": kwargs.get("data_key") or "query",
            "user_role": kwargs.get("user_role", "user"),
        }
        dataset = cls.dataset if dataset is None else dataset
        dataset = [{"index": 0}] if dataset is None else dataset
        given = dict(template_kwargs or {})
        if cls.tools and "tools" not in given and kwargs.get("tokenizer") is not None:
            given["tools"] = toolbox_of(cls).schemas
        super().__init__(
            dataset=dataset,
            system_prompt=cls.system_prompt if system_prompt is None else system_prompt,
            template_kwargs=given,
            **kwargs,
        )

    def _primer(self, episodes: Any, **kwargs: Any) -> RowPrimer:
        return EpisodePrimer(episodes, **self.__dict__["_episode"], **kwargs)

    @classmethod
    def from_dataloader(cls, dataloader: Any, **kwargs: Any) -> MessageChatEnv:
        """Not to be had: pass the rows, ``dataset=...``."""
        raise TypeError("MessageChatEnv takes rows, not a dataloader: MessageChatEnv(env, dataset=...).")
