"""``OpenEnvChatEnv``: N sessions with OpenEnv servers as one batched TorchRL environment.

The conversation is kept here, in the ledger, with the policy's own tokenizer; a server is asked only what follows an
answer. So whatever a server does with tokens and templates, the law of the ledger holds.

A server's session cannot be copied. Unlike the other environments', a step is therefore no function of the TensorDict alone:
a row can be stepped only from where its session stands, and anything else is refused (``"ticket"``).
"""

from __future__ import annotations

import math
import secrets
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from tensordict import TensorDictBase
from torchrl.data import Bounded, Composite, NonTensor, Unbounded

from torchrl_chat import columns
from torchrl_chat.conversation import StopReason
from torchrl_chat.envs.chat import ChatEnv
from torchrl_chat.messages import Message, as_messages, content_text
from torchrl_chat.openenv.batch.adapters import CHAT, Adapter, Answer
from torchrl_chat.openenv.batch.pool import Pool, Reply
from torchrl_chat.openenv.client.errors import ConnectFailed, OpenEnvError, ServerError
from torchrl_chat.openenv.client.link import Link, need_websockets
from torchrl_chat.seeds import SEED, mixed

FAILED = StopReason.ERROR
_SEEDS = 2**31  # what every library's generators take
_NO_CONVERSATION = "(the environment could not be reset)"


@dataclass
class Row:
    """Where one row's session stands."""

    ticket: int = 0  # of the last observation; a TensorDict that carries another one is refused
    live: bool = False  # whether the episode goes on
    failure: str = ""  # why it does not, where it failed
    graded: bool = True  # whether its reward means something
    known: int = 0  # how many messages the server's conversation has, where it shows the whole of it
    episode: int = 0  # how many episodes were begun
    seed: int = 0
    query: str = ""  # what the conversation begins with
    stop: StopReason = StopReason.RUNNING
    observation: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Seen:
    """A server's reply, read."""

    observation: dict[str, Any]
    reward: float
    done: bool
    stop: StopReason


class OpenEnvChatEnv(ChatEnv):
    """Any OpenEnv server as a batch of conversations, one session a row, all of them at once.

    Reset opens the sessions, resets them and renders what they say; a step sends each answer as an action, and appends what
    the observation says as the next messages. Whatever a row suffers (an error of the server, a timeout, a lost session, an
    answer that is no action) ends that row and no other: ``truncated``, ``stop_reason`` and the text under
    ``"env_failure"``. Its next reset opens a new session. Written besides what :class:`~torchrl_chat.ChatEnv` writes, over
    the batch size B:

    - ``("next", "reward")``: float32 (\\*B, 1, 1), the server's; 0 where it gives none;
    - ``"done"``, ``"terminated"`` (the server ended it), ``"truncated"`` (a limit that the server names, or a failure):
      bool (\\*B, 1);
    - ``"stop_reason"``: int64 (\\*B, 1), a :class:`~torchrl_chat.StopReason`;
    - ``"env_failure"``: str (\\*B,), why the row failed; empty elsewhere. A row whose reset failed says so from the reset
      on; its first step ends it, and its answer does not enter the ledger;
    - ``"query"``: str (\\*B,), the last message of the first prompt, by which groups are told apart;
    - ``"episode_seed"``: int64 (\\*B,), with which the episode was reset;
    - ``"graded"``: bool (\\*B, 1, 1), false where the row failed by no fault of the policy's answer, and the same text under
      ``"grade_failure"``: :func:`~torchrl_chat.training_view` leaves such rows out;
    - ``"observation"``: the server's last observation, a dict a row, if the adapter keeps it;
    - ``"ticket"``: int64 (\\*B, 1), which observation of its session the row shows.

    Args:
        url: the server's base URL, or several, over which the rows are spread in turn.

    Keyword Args:
        adapter: how observations become messages and answers become actions: one of those in this package (``CHAT``,
            ``CHAT_ENV``, ``CHAT_TEXT``, ``ECHO_ENV``, ``text_adapter(...)``), or your own
            :class:`~torchrl_chat.openenv.Adapter`.
        seed: of the environment: episode ``e`` of row ``r`` is reset with a seed drawn from ``(seed, r, e)``. Random if
            ``None``. ``set_seed`` begins anew with another one.
        repeats: how many rows in a row share the seeds of their episodes, the group size of GRPO.
        reset_kwargs: further arguments of every reset.
        task_keys: entries of the TensorDict that are sent as arguments of the row's reset: their names, or a mapping of
            entries to arguments, such as ``{"episode_row": "index", "episode_seed": "seed"}`` behind a dataset's primer.
            An argument ``"seed"`` takes the place of the drawn one.
        on_refusal: what becomes of a row whose answer is no action (the adapter's ``to_action`` raises, or the server refuses
            it and the session lives on): ``"end"`` it, or ``"tell"`` the policy, with the refusal as the user's next
            message.
        data_key: an entry whose messages follow what the server says at the reset, for servers that say nothing; they are
            not sent. By default, the server begins the conversation.
        headers, token: HTTP headers, and a bearer token.
        connect_timeout: seconds for connecting, within which a server that is starting or full is tried again.
        reset_timeout, step_timeout: seconds for the replies; ``None`` for no limit.
        link: further fields of the :class:`~torchrl_chat.openenv.client.link.Link`, such as ``max_bytes``; with
            ``{"resume": True}`` the sessions of this package's server outlive their connections.
        chat: arguments of :class:`~torchrl_chat.ChatEnv`: ``input_mode``, ``batch_size``, ``tokenizer``,
            ``system_prompt`` ...

    Raises:
        ImportError: the package ``websockets`` is not there.
        ValueError: no URL, or an argument out of range.
        ConnectFailed: at the reset: no row of the batch has a session, and none could be opened.

    Example:
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> env = OpenEnvChatEnv("http://localhost:8000", tokenizer=tokenizer, input_mode="tokens", batch_size=(64,))
    """

    def __init__(
        self,
        url: str | Sequence[str],
        *,
        adapter: Adapter = CHAT,
        seed: int | None = None,
        repeats: int = 1,
        reset_kwargs: Mapping[str, Any] | None = None,
        task_keys: Sequence[str] | Mapping[str, str] = (),
        on_refusal: Literal["end", "tell"] = "end",
        data_key: str | None = None,
        headers: Mapping[str, str] | None = None,
        token: str | None = None,
        connect_timeout: float = 10.0,
        reset_timeout: float | None = 60.0,
        step_timeout: float | None = 60.0,
        link: Mapping[str, Any] | None = None,
        **chat: Any,
    ):
        need_websockets()
        urls = [url] if isinstance(url, str) else list(url)
        if not urls:
            raise ValueError("url is empty: give the base URL of a server, or several.")
        if repeats < 1:
            raise ValueError(f"repeats is {repeats}: expected a positive number.")
        if on_refusal not in ("end", "tell"):
            raise ValueError(f"on_refusal is {on_refusal!r}: expected 'end' or 'tell'.")
        if isinstance(task_keys, str):
            raise ValueError(f"task_keys is {task_keys!r}: expected a list of entries.")
        self._begins = data_key is not None  # whether the TensorDict says how a conversation begins
        super().__init__(data_key=data_key, **chat)
        auth = {"Authorization": f"Bearer {token}"} if token else {}
        options = {
            "delta": adapter.cumulative,
            "headers": {**(headers or {}), **auth},
            "connect_timeout": connect_timeout,
            **(link or {}),
        }
        self._links = [Link(url=each, timeout=step_timeout, **options) for each in urls]
        self.adapter = adapter
        self.repeats = repeats
        self.reset_kwargs = dict(reset_kwargs or {})
        named = task_keys.items() if isinstance(task_keys, Mapping) else ((key, key) for key in task_keys)
        self.task_keys = dict(named)
        self.on_refusal = on_refusal
        self.reset_timeout = reset_timeout
        self.step_timeout = step_timeout
        self._worked = False  # whether any reset ever went well
        self._seed_base = int(torch.randint(2**31, ())) if seed is None else int(seed)
        self._forget()
        self._add_specs()

    def _forget(self) -> None:
        self._sessions: Pool | None = None
        # Tickets of two environments never agree, so that rows cannot be mixed up between them.
        first = secrets.randbits(38) << 24
        self._rows = [Row(ticket=first) for _ in range(self.batch_size.numel())]

    def _add_specs(self) -> None:
        batch, device = self.batch_size, self.device
        own: dict[str, Any] = {
            "graded": Bounded(0, 1, shape=(*batch, 1, 1), dtype=torch.bool, device=device),
            "grade_failure": NonTensor(batch, device=device, example_data=""),
            "query": NonTensor(batch, device=device, example_data="a question"),
            SEED: Unbounded(batch, dtype=torch.int64, device=device),
            "ticket": Unbounded((*batch, 1), dtype=torch.int64, device=device),
        }
        if self.adapter.keep:
            own["observation"] = NonTensor(batch, device=device, example_data={})
        observation = self.full_observation_spec.clone()
        observation.update(Composite(own, shape=batch, device=device))
        self.full_observation_spec = observation
        # What reset reads: torchrl hands a reset only what stands here.
        read = {key: NonTensor(batch, device=device, example_data=0) for key in self.task_keys}
        if self._begins:
            read[self.data_key] = self.full_state_spec[self.data_key]
        self.full_state_spec = Composite(read, shape=batch, device=device)
        reward = Unbounded((*batch, 1, 1), dtype=torch.float32, device=device)
        self.full_reward_spec = Composite({"reward": reward}, shape=batch, device=device)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_sessions": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    def close(self, *, raise_if_closed: bool = True) -> None:
        """End the sessions and their thread. A later reset opens them anew."""
        sessions, self._sessions = self._sessions, None
        if sessions is not None:
            sessions.close()
        self._end(range(len(self._rows)), "the environment was closed")
        super().close(raise_if_closed=raise_if_closed)

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            self._seed_base = int(seed)
        for row in self._rows:
            row.episode = 0

    # ------------------------------------------------------------------ reset
    def _reset(self, tensordict: TensorDictBase | None, **_: Any) -> TensorDictBase:
        mask = self._reset_rows(tensordict)
        chosen = [i for i in range(len(self._rows)) if mask is None or mask[i]]
        begins = self._queries(tensordict) if self._begins else [None] * len(self._rows)
        replies = self._pool.reset(self._reset_arguments(tensordict, chosen))
        conversations, errors = {}, {}
        for i in chosen:
            row = self._rows[i]
            row.ticket, row.live, row.failure, row.stop = row.ticket + 1, True, "", StopReason.RUNNING
            row.graded = True
            try:
                seen = read_reply(replies[i])
                if seen.done:
                    raise OpenEnvError("the episode is over when it begins: the server's reset says done.")
                conversations[i] = self._conversation(self._beginning(row, seen, begins[i], i), i)
            except Exception as error:  # whatever a server says, the other rows are not lost
                errors[i] = error
        td = self._begun(tensordict, conversations, errors)
        self._check_outage(chosen, errors)
        self._fail(errors, len(chosen))
        if self._begins and tensordict is not None:
            td.set(self.data_key, tensordict.get(self.data_key))
        return self._marked(td)

    def _beginning(self, row: Row, seen: Seen, begins: Any, index: int) -> list[Message]:
        """The messages that a row begins with."""
        said = self._said(seen)
        row.observation, row.known = seen.observation, len(said)
        if begins is not None:
            said = said + as_messages(begins, role=self.user_role, where=f"{self.data_key!r} of row {index}")
        if not said:
            raise OpenEnvError(
                "the server says nothing at the reset, so that there is no prompt: pass data_key='query' and begin the "
                "conversation from the TensorDict, or another adapter."
            )
        row.query = content_text(said[-1])
        return said

    def _reset_arguments(self, td: TensorDictBase | None, chosen: list[int]) -> dict[int, dict[str, Any]]:
        """What the server of each row is reset with."""
        entries = {name: self._entry(td, key) for key, name in self.task_keys.items()}
        arguments = {}
        for i in chosen:
            row = self._rows[i]
            drawn = mixed(self._seed_base, "openenv", i // self.repeats, row.episode) % _SEEDS
            sent = {**self.reset_kwargs, **{name: column[i] for name, column in entries.items()}}
            arguments[i] = {"seed": drawn, **sent}
            row.seed = drawn if arguments[i]["seed"] is None else int(arguments[i]["seed"])
            row.episode += 1
        return arguments

    def _entry(self, td: TensorDictBase | None, key: str) -> list[Any]:
        column = None if td is None else td.get(key, None)
        if column is None:
            found = [] if td is None else sorted(map(str, td.keys()))
            raise KeyError(f"task_keys names {key!r}, which is not there: reset got the keys {found}.")
        if isinstance(column, torch.Tensor) and column.numel() == len(self._rows):
            return column.flatten().tolist()
        return columns.read_objects(column, self.batch_size)

    def _check_outage(self, chosen: list[int], errors: dict[int, Exception]) -> None:
        """An outage is no row's failure: raise if nothing ever worked, or no server can be reached at all."""
        if len(errors) < len(chosen):
            self._worked = True
            return
        outage = all(isinstance(error, ConnectFailed) for error in errors.values())
        if not self._worked or (outage and not self._pool.connected):
            raise errors[chosen[0]]

    # ------------------------------------------------------------------ step
    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        rows = self._rows
        goes = columns.stepped(tensordict)
        self._check_tickets(tensordict, goes)
        live = [going and row.live for going, row in zip(goes, rows, strict=True)]
        faults: dict[int, Exception] = {}
        transcripts = self._answers(tensordict, live, faults)
        following: TensorDictBase = self._observe(transcripts)

        faults = {i: error for i, error in faults.items() if live[i]}
        actions: dict[int, dict[str, Any]] = {}
        errors: dict[int, Exception] = {}
        for i in (i for i, on in enumerate(live) if on and i not in faults):
            try:
                actions[i] = dict(self.adapter.to_action(Answer.of(transcripts[i])))
            except Exception as error:
                errors[i] = error
        refused = dict(errors)
        errors.update(faults)
        try:
            replies = self._pool.step(actions) if actions else {}
        except BaseException:  # Ctrl-C: nobody knows how far the sessions are
            self._end(actions, "the step was interrupted")
            raise
        rewards = [0.0] * len(rows)
        new: list[list[Message] | None] = [None] * len(rows)
        for i, reply in replies.items():
            row = rows[i]
            try:
                seen = read_reply(reply)
                new[i] = self._following(row, seen)
            except Exception as error:
                errors[i] = error
                if isinstance(error, ServerError):
                    refused[i] = error
                continue
            row.observation, row.live, row.stop = seen.observation, not seen.done, seen.stop
            rewards[i] = seen.reward
        if self.on_refusal == "tell":
            for i in refused:
                new[i] = [{"role": self.user_role, "content": f"Error: {errors.pop(i)}"}]
        unproved: dict[int, Exception] = {}
        if any(new):
            following = self._observe(self._appended(transcripts, new, unproved))
        self._fail({**errors, **unproved}, sum(live), refused)
        for row, stepped in zip(rows, live, strict=True):
            row.ticket += stepped
        over = [not row.live for row in rows]
        natural = [row.stop == StopReason.ANSWERED for row in rows]  # which no row is that goes on
        cut = [end and not by_itself for end, by_itself in zip(over, natural, strict=True)]
        for key, flags in (("terminated", natural), ("truncated", cut), ("done", over)):
            following.set(key, torch.tensor(flags, device=self.device).reshape(*self.batch_size, 1))
        reward = torch.tensor(rewards, dtype=torch.float32, device=self.device)
        following.set("reward", reward.reshape(*self.batch_size, 1, 1))
        return self._marked(following)

    def _following(self, row: Row, seen: Seen) -> list[Message] | None:
        """The messages that follow an answer; none when the episode is over."""
        said = self._said(seen)
        if self.adapter.cumulative:
            before, row.known = row.known, len(said)
            if len(said) <= before or said[before]["role"] != "assistant":
                roles = [message["role"] for message in said[before:]]
                raise OpenEnvError(
                    f"the server's conversation does not go on with the answer: behind its {before} message(s) follow {roles}."
                )
            said = said[before + 1 :]
        return None if seen.done else said

    def _said(self, seen: Seen) -> list[Message]:
        said = self.adapter.to_messages(seen.observation)
        if not said:
            return []
        return as_messages(said, role=self.user_role, where="what the environment says")

    def _check_tickets(self, td: TensorDictBase, goes: list[bool]) -> None:
        column = td.get("ticket", None)
        if column is None:
            raise KeyError(f"step needs 'ticket', which reset wrote; got the keys {sorted(map(str, td.keys()))}.")
        for i, (ticket, row) in enumerate(zip(column.flatten().tolist(), self._rows, strict=True)):
            if goes[i] and ticket != row.ticket:
                raise ValueError(
                    f"row {i} does not show the present state of its session (ticket {ticket}, expected {row.ticket}): a "
                    f"conversation with a server cannot be stepped twice, branched, or moved to another row. Step what the "
                    f"last step returned, or reset."
                )

    # ------------------------------------------------------------------ rows
    def _marked(self, td: TensorDictBase) -> TensorDictBase:
        """The TensorDict with the columns that say where each row's session stands."""
        rows, graded = self._rows, torch.tensor([row.graded for row in self._rows], device=self.device)
        td.set("stop_reason", self._integers([row.stop for row in rows]))
        td.set("ticket", self._integers([row.ticket for row in rows]))
        td.set(SEED, self._integers([row.seed for row in rows]).squeeze(-1))
        td.set("graded", graded.reshape(*self.batch_size, 1, 1))
        texts: dict[str, list[Any]] = {
            "env_failure": [row.failure for row in rows],
            "grade_failure": ["" if row.graded else row.failure for row in rows],
        }
        if not (self._begins and self.data_key == "query"):
            texts["query"] = [row.query for row in rows]
        if self.adapter.keep:
            texts["observation"] = [row.observation for row in rows]
        for key, values in texts.items():
            td.set(key, columns.objects(values, self.batch_size, self.device))
        return td

    def _end(self, rows: Iterable[int], reason: str) -> None:
        for i in rows:
            row = self._rows[i]
            if row.live:
                row.live, row.graded, row.stop, row.failure = False, False, FAILED, reason

    def _fail(self, errors: Mapping[int, Exception], asked: int, refused: Collection[int] = ()) -> None:
        for i, error in errors.items():
            row = self._rows[i]
            row.live, row.stop, row.failure = False, FAILED, f"{type(error).__name__}: {error}"
            row.graded = i in refused
        if errors:
            first = min(errors)
            warnings.warn(
                f"{len(errors)} of {asked} sessions failed; their rows are truncated. The first, row {first}: "
                f"{self._rows[first].failure}",
                RuntimeWarning,
                stacklevel=3,
            )

    @property
    def _pool(self) -> Pool:
        if self._sessions is None or not self._sessions.alive:
            links = [self._links[i % len(self._links)] for i in range(len(self._rows))]
            self._sessions = Pool(links, self.reset_timeout, self.step_timeout)
            self.is_closed = False
        return self._sessions


def read_reply(reply: Reply) -> Seen:
    """A server's reply.

    Raises:
        OpenEnvError: it is an error, or not what the protocol says.
    """
    if isinstance(reply, Exception):
        raise reply
    observation, reward, done = reply.get("observation"), reply.get("reward"), reply.get("done")
    number = 0.0 if reward is None else reward
    if not isinstance(observation, dict) or not isinstance(done, (bool, type(None))):
        raise OpenEnvError(f"the server's reply has no observation, or a strange 'done': {reply!r:.120}")
    if not isinstance(number, (bool, int, float)) or not math.isfinite(number):
        raise OpenEnvError(f"the server's reward is {reward!r:.60}: expected a number.")
    metadata = observation.get("metadata") or reply.get("metadata") or {}
    name = str(metadata.get("stop_reason", "")).upper() if isinstance(metadata, dict) else ""
    stop = StopReason.__members__.get(name, StopReason.ANSWERED) if done else StopReason.RUNNING
    return Seen(observation, float(number), bool(done), stop)
