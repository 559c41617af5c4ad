"""``UserSimulator``: somebody who answers the policy as the user, so that a dialogue has more than one turn.

Law of this file: what the user says is appended through the ledger, which marks as sampled what the policy sampled and
nothing else. The transform keeps nothing of a conversation: how far a script is, stands in the TensorDict.
"""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.data import Composite, NonTensor, Unbounded
from torchrl.envs import Transform

from torchrl_chat import columns
from torchrl_chat._loop import LoopThread
from torchrl_chat.conversation import Transcript
from torchrl_chat.messages import Message, MessageError, as_messages, check_message, content_text
from torchrl_chat.seeds import turn_seeds
from torchrl_chat.transforms.home import chat_env, check_inside, flags, is_replied_to, tell_failures


class _Reply(NamedTuple):
    """What becomes of a row: it goes on with messages, or it ends."""

    messages: list[Message] | None = None
    ends: bool = False  # the user has no more to say
    limit: bool = False  # the user may not say more
    failure: str = ""


class UserSimulator(Transform):
    """Answers as the user after each step, in every row that is not done; in all input modes, all rows at once.

    The user is one of

    - a script: a list of messages, the next one after each answer, for all rows or (``script_key``) each row its own;
      behind the last one the dialogue ends;
    - a function ``(messages) -> str | message | list of messages | None``, given the row's conversation; ``None``:
      there is nothing more to say, the dialogue ends. A coroutine function is run for all rows at once;
    - a batched function (``batched=True``, or an attribute ``batched`` of its own): it gets a list of conversations and
      returns as many replies; an exception among them fails its row, one that it raises all of these rows;
    - a :class:`ModelUser` or an :class:`EndpointUser`, models that see the conversation with the roles swapped.

    A row in which the policy is to speak next anyway (a tool has just answered its call), or has called a tool that is run
    further behind, is left alone. Written, over
    the environment's batch size B:

    - ``("next", "terminated")`` and ``("next", "done")`` become true where the user ends the dialogue;
    - ``("next", "truncated")`` and ``("next", "done")`` where the user has spoken ``turns`` times, or failed;
    - ``"user_turns"``: int64 (\\*B, 1), how many messages the user has said;
    - ``"user_failure"``: str (\\*B,), why the user failed; empty elsewhere. A user that raises, is late or says what
      cannot be a user's message costs its own row only. Each batch with failures is warned about once.

    Put it behind rewards that may end the dialogue (in front of one it is refused: it would have spoken already), and in front
    of :class:`Budget`. The user's tokens are never under the mask. The step is a function of the
    TensorDict as far as the user is one: a script goes on where ``"user_turns"`` says, or, in rows that another
    environment began, behind as many lines as there are messages of the user after the policy's first answer. A user that
    draws at random is a function of it too where it draws from the seed that it is given (``seeded``). What a user keeps
    beside that is in the transform's ``state_dict()``, if the user has a ``state_dict`` and a ``load_state_dict``.

    Args:
        user: a script or a function.

    Keyword Args:
        script_key: the entry with each row's own script, a list of strings or messages; instead of ``user``.
        batched: whether the function takes all conversations at once. Defaults to what it says of itself.
        stop: what ends the dialogue: a phrase in the user's words, or a function of them that returns whether they do.
        keep_closing: whether the words that end the dialogue are appended. By default they are dropped, so that an
            episode ends with the policy's last token.
        turns: how many messages the user may say in one row.
        row_keys: entries that the user may know (its goal, say): the function then gets a second argument, a dict with
            the row's values; a batched function a list of dicts.
        seeded: whether the function gets a keyword argument ``seed`` (a batched one ``seeds``, a list): an integer drawn
            from the episode's seed, which a :class:`~torchrl_chat.DatasetChatEnv` writes, and the turn; ``None`` in
            other environments. Defaults to what the function says of itself, in an attribute ``seeded``.
        deadline: seconds for an asynchronous reply; ``None`` for no limit. A user with a ``deadline`` of its own keeps
            it itself. A function that is not asynchronous cannot be interrupted.

    Raises:
        ValueError: neither or both of ``user`` and ``script_key`` are given, or an option has no such value; or it is
            followed by a reward that ends dialogues.
        TypeError: the user is neither a script nor a function, or it is a policy; or, at first use, the environment is
            no :class:`~torchrl_chat.ChatEnv`.
        MessageError: the script is no list, or a message in it is malformed.
        KeyError: ``script_key`` or one of ``row_keys`` is not there: when it is appended to an environment with a dataset,
            at the reset of another one.

    Example:
        >>> from torchrl_chat import DatasetChatEnv
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> env = DatasetChatEnv(dataset=[{"query": "Hi"}], tokenizer=tokenizer, input_mode="text")
        >>> env = env.append_transform(UserSimulator(["And why?", "Thanks."]))
    """

    def __init__(
        self,
        user: Sequence[str | Message] | Callable[..., Any] | None = None,
        *,
        script_key: NestedKey | None = None,
        batched: bool | None = None,
        stop: str | Callable[[str], bool] | None = None,
        keep_closing: bool = False,
        turns: int | None = None,
        row_keys: Sequence[NestedKey] = (),
        seeded: bool | None = None,
        deadline: float | None = 60.0,
    ):
        if (user is None) == (script_key is None):
            raise ValueError("UserSimulator needs a user or a script_key, one of them.")
        if turns is not None and turns < 1:
            raise ValueError(f"turns is {turns}: expected at least 1, or None.")
        if deadline is not None and deadline <= 0:
            raise ValueError(f"deadline is {deadline}: expected a positive number of seconds, or None.")
        if stop is not None and not callable(stop) and not (isinstance(stop, str) and stop):
            raise ValueError(f"stop is {stop!r}: expected a phrase, a function of the user's words, or None.")
        scripted = isinstance(user, Sequence) and not isinstance(user, (str, bytes))
        if isinstance(user, TensorDictModuleBase) or hasattr(user, "generation_config"):
            raise TypeError(
                f"user is a {type(user).__name__}, which reads TensorDicts or ids: a model plays the user as "
                f"ModelUser(model, tokenizer), or behind an endpoint as EndpointUser(name, url), both of "
                f"torchrl_chat.transforms."
            )
        if user is not None and not scripted and not callable(user):
            raise TypeError(f"user is a {type(user).__name__}: expected a list of messages or a function.")
        if isinstance(row_keys, str):
            raise ValueError(f"row_keys is {row_keys!r}: expected a list of entries.")
        super().__init__(in_keys=["transcript"], out_keys=["user_turns", "user_failure"])
        self.script = _script(user, "user") if scripted else None
        self.user: Any = None if scripted else user
        self.script_key = script_key
        self.batched = bool(getattr(user, "batched", False)) if batched is None else batched
        self.seeded = bool(getattr(user, "seeded", False)) if seeded is None else seeded
        self.stop = stop
        self.keep_closing = keep_closing
        self.turns = turns
        self.row_keys = tuple(row_keys)
        self.deadline = deadline
        self._loop: LoopThread | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_loop": None}

    def get_extra_state(self) -> dict[str, Any]:
        """What the user keeps, in ``state_dict()``."""
        return {"user": self.user.state_dict()} if self._has_state else {}

    def set_extra_state(self, state: Any) -> None:
        """Give it back to the user."""
        if self._has_state and "user" in state:
            self.user.load_state_dict(state["user"])

    @property
    def _has_state(self) -> bool:
        # One that is a module is in state_dict() already, as a part of the transform.
        own = hasattr(self.user, "state_dict") and hasattr(self.user, "load_state_dict")
        return own and not isinstance(self.user, torch.nn.Module)

    def close(self) -> None:
        """Close connections and end the event loop's thread; they start anew at the next step."""
        if self._loop is not None and self._loop.alive:
            aclose = getattr(self.user, "aclose", None)
            if aclose is not None:
                self._loop.run(aclose())
            self._loop.close()
        self._loop = None

    def reads(self) -> dict[NestedKey, str]:
        """The entries that it cannot do without, and which argument chooses each."""
        read = dict.fromkeys(self.row_keys, "row_keys")
        return read if self.script_key is None else {**read, self.script_key: "script_key"}

    # ------------------------------------------------------------------ torchrl's hooks
    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        check_inside(self)
        batch, device = tensordict_reset.batch_size, tensordict_reset.device
        self._write(tensordict_reset, [0] * batch.numel(), [""] * batch.numel())
        if tensordict_reset.get("truncated", None) is None:
            tensordict_reset.set("truncated", torch.zeros((*batch, 1), dtype=torch.bool, device=device))
        return tensordict_reset

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        env, batch = chat_env(self), next_tensordict.batch_size
        transcripts = env._transcripts(next_tensordict)
        over = flags(next_tensordict, "done")
        stepped = columns.stepped(tensordict)  # torchrl's way to leave finished rows as they are
        asked = [
            i
            for i, transcript in enumerate(transcripts)
            if stepped[i]
            and not over[i]
            and transcript.ended is not None
            and not is_replied_to(self, transcript.messages[-1])
        ]
        counts = self._counts(tensordict, transcripts)
        replies = self._replies(tensordict, next_tensordict, transcripts, asked, counts)
        said = {i: r.messages for i, r in replies.items() if r.messages and (self.keep_closing or not r.ends)}
        if said:
            errors: dict[int, Any] = {}
            lines = [said.get(i) for i in range(len(transcripts))]
            next_tensordict = env.append_messages(next_tensordict, lines, errors=errors)
            replies |= {i: _Reply(failure=f"error: {type(e).__name__}: {e}") for i, e in errors.items()}
        rows = [replies.get(i, _Reply()) for i in range(len(transcripts))]
        told = tell_failures(next_tensordict, tensordict, [row.failure for row in rows])
        if failed := [(i, why) for i, why in enumerate(told) if why]:
            warnings.warn(
                f"{len(failed)} of {len(asked)} simulated users failed; their rows are truncated. The first, row "
                f"{failed[0][0]}: {failed[0][1]}",
                RuntimeWarning,
                stacklevel=2,
            )
        ends = torch.tensor([row.ends for row in rows], device=next_tensordict.device).reshape(*batch, 1)
        cut = torch.tensor([row.limit or bool(row.failure) for row in rows], device=ends.device).reshape(*batch, 1)
        for key, column in (("terminated", ends), ("truncated", cut), ("done", ends | cut)):
            before = next_tensordict.get(key, None)
            next_tensordict.set(key, column if before is None else before | column)
        for i, messages in said.items():
            if not rows[i].failure:
                counts[i] += sum(message["role"] == env.user_role for message in messages)
        known = tensordict.get("user_failure", None)
        failures = [""] * len(rows) if known is None else columns.read_objects(known, batch)
        self._write(next_tensordict, counts, [told[i] if ran else failures[i] for i, ran in enumerate(stepped)])
        return next_tensordict

    @staticmethod
    def _write(td: TensorDictBase, counts: list[int], failures: list[str]) -> None:
        td.set("user_turns", torch.tensor(counts, dtype=torch.int64, device=td.device).reshape(*td.batch_size, 1))
        td.set("user_failure", columns.objects(failures, td.batch_size, td.device))

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        """The specs of what is written."""
        shape, device = observation_spec.shape, observation_spec.device
        observation_spec["user_turns"] = Unbounded((*shape, 1), dtype=torch.int64, device=device)
        observation_spec["user_failure"] = NonTensor(shape, device=device, example_data="")
        return observation_spec

    def transform_done_spec(self, done_spec: Composite) -> Composite:
        """The spec of ``truncated``, if no other transform has added it."""
        if "truncated" not in done_spec.keys():
            done_spec["truncated"] = done_spec["done"].clone()
        return done_spec

    # ------------------------------------------------------------------ asking
    def _counts(self, root: TensorDictBase, transcripts: list[Transcript]) -> list[int]:
        """How many messages the user has said in each row."""
        known = root.get("user_turns", None)
        if known is not None:
            return known.flatten().tolist()
        # The rows come from an environment without a simulator: what stands behind the policy's first answer.
        role = chat_env(self).user_role
        behind = [t.messages[t.spans[0].message if t.spans else 0 :] for t in transcripts]
        return [sum(message["role"] == role for message in messages) for messages in behind]

    def _replies(
        self,
        root: TensorDictBase,
        following: TensorDictBase,
        transcripts: list[Transcript],
        asked: list[int],
        counts: list[int],
    ) -> dict[int, _Reply]:
        """What becomes of each row that is asked."""
        going = [i for i in asked if self.turns is None or counts[i] < self.turns]
        if self.user is None:
            scripts, name = [self.script] * len(transcripts), "user"
            if self.script_key is not None:
                scripts, name = self._column(root, following, self.script_key, "script_key"), f"{self.script_key!r}"
            values = [_tried(_line, scripts[i], counts[i], name) for i in going]
        else:
            named = {key: self._column(root, following, key, "row_keys") for key in self.row_keys}
            rows = [{key: column[i] for key, column in named.items()} for i in going]
            seeds = turn_seeds(root, transcripts, "user")
            conversations = [[dict(m) for m in transcripts[i].messages] for i in going]
            values = self._asked(conversations, rows, [seeds[i] for i in going]) if going else []
        replies = {i: self._reply(value) for i, value in zip(going, values, strict=True)}
        return {i: replies.get(i, _Reply(limit=True)) for i in asked}

    def _asked(
        self, conversations: list[list[Message]], rows: list[dict[Any, Any]], seeds: list[int | None]
    ) -> list[Any]:
        """What the function returns for each conversation, or the exception that it raises."""
        given: tuple[list[Any], ...] = (conversations, rows) if self.row_keys else (conversations,)
        if self.batched:
            values = [_tried(self.user, *given, **({"seeds": seeds} if self.seeded else {}))]
        else:
            values = [
                _tried(self.user, *arguments, **({"seed": seed} if self.seeded else {}))
                for *arguments, seed in zip(*given, seeds, strict=True)
            ]
        if any(hasattr(value, "__await__") for value in values):
            if self._loop is None or not self._loop.alive:  # a forked child has no thread
                self._loop = LoopThread("torchrl_chat.user")
            limit = None if hasattr(self.user, "deadline") else self.deadline
            values = self._loop.run(_awaited(values, limit))
        if not self.batched:
            return values
        [value] = values
        if isinstance(value, (list, tuple)) and len(value) == len(conversations):
            return list(value)
        if not isinstance(value, Exception):
            value = ValueError(f"a batched user returned {value!r:.80} for {len(conversations)} conversations")
        return [value] * len(conversations)

    def _reply(self, value: Any) -> _Reply:
        """What a value that the user returned means."""
        if value is None:
            return _Reply(ends=True)
        try:
            if isinstance(value, Exception):
                raise value
            env = chat_env(self)
            user, policy = env.user_role, env.policy_role
            messages = as_messages(value, role=user, where="the user's reply")
            roles = [message["role"] for message in messages]
            if policy in roles or user not in roles:
                raise MessageError(
                    f"the user's reply has the roles {roles}: expected {user!r}, and never {policy!r}, for whom the "
                    f"policy speaks"
                )
            words = "\n".join(content_text(message) for message in messages if message["role"] == user)
            ends = self.stop in words if isinstance(self.stop, str) else self.stop is not None and self.stop(words)
            return _Reply(messages, ends=bool(ends))
        except TimeoutError as error:
            return _Reply(failure=f"timeout: {error}")
        except Exception as error:  # whatever a user does, the other rows are not lost
            return _Reply(failure=f"error: {type(error).__name__}: {error}")

    # ------------------------------------------------------------------ reading
    def _column(self, root: TensorDictBase, following: TensorDictBase, key: NestedKey, what: str) -> list[Any]:
        value = following.get(key, None)
        value = root.get(key, None) if value is None else value
        if value is None:
            raise KeyError(
                f"UserSimulator reads {key!r}, which is not there: got the keys {sorted(map(str, root.keys()))}. "
                f"Pass {what}=..."
            )
        return columns.read_objects(value, following.batch_size)


def _script(lines: Any, where: str) -> list[str | Message]:
    """A script, its lines checked; an empty one, if it is ``None``."""
    if lines is None:
        return []
    if isinstance(lines, (str, bytes, Mapping)) or not isinstance(lines, Sequence):
        raise MessageError(f"{where} is {lines!r:.60}: expected a list of strings or messages.")
    return [line if isinstance(line, str) else check_message(line, f"{where}[{i}]") for i, line in enumerate(lines)]


def _line(script: Any, count: int, where: str) -> str | Message | None:
    """The next line of a script; ``None`` behind the last."""
    lines = _script(script, where)
    return lines[count] if count < len(lines) else None


def _tried(function: Any, *arguments: Any, **given: Any) -> Any:
    """What the function returns, or the exception that it raises."""
    try:
        return function(*arguments, **given)
    except Exception as error:
        return error


async def _awaited(values: list[Any], deadline: float | None) -> list[Any]:
    """The values with those that are to be awaited awaited, all at once."""

    async def one(value: Any) -> Any:
        if not hasattr(value, "__await__"):
            return value
        try:
            async with asyncio.timeout(deadline) as limit:
                return await value
        except TimeoutError as error:
            return TimeoutError(f"no reply within {deadline:g} s") if limit.expired() else error
        except asyncio.CancelledError:
            if asyncio.current_task().cancelling():  # type: ignore[union-attr]  # by us, not within the user
                raise
            return RuntimeError("the reply was cancelled")
        except Exception as error:
            return error

    return list(await asyncio.gather(*map(one, values)))
