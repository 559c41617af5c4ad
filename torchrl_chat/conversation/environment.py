"""``MessageEnv``: how people write environments. Messages in, messages out; no tensors, no transforms, no batches."""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
import random
import warnings
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from torchrl_chat._loop import LoopThread
from torchrl_chat.messages import Message, MessageError, as_messages
from torchrl_chat.seeds import mixed
from torchrl_chat.tools.function import Tool
from torchrl_chat.tools.toolbox import Toolbox

Said = str | Message | Sequence[str | Message] | None
"""What an environment says: a text (of the user), a message, several, or nothing."""


class Reply(NamedTuple):
    """What an environment makes of the policy's message; a plain tuple of the first three does as well."""

    messages: Said = None
    """What follows; not read where ``done``. Nothing is an error where the episode goes on."""
    reward: float = 0.0
    """The reward of this turn, a finite number."""
    done: bool = False
    """Whether the episode is over."""
    success: bool | None = None
    """Whether the task was solved; by default where the turn that ends the episode pays more than 0."""


class MessageEnv:
    """An environment of messages. One instance is one episode, and its attributes are the episode's state.

    Write :meth:`reset` and :meth:`step`, plain or ``async``. :class:`~torchrl_chat.MessageChatEnv` makes a batched torchrl
    environment of the class, and ``torchrl-chat serve --env module:Class`` a server.

    An instance is never stepped twice from one state: it is copied first (``copy.deepcopy``), so that a step can be taken
    again, conversations branched, and runs saved. An attribute that cannot be copied (a process, a socket) makes the episode
    one that can only go forward: another step from an earlier state is refused, and so is saving it.

    Example:
        >>> class Guess(MessageEnv):
        ...     def reset(self, row):
        ...         self.number = self.random.randint(1, 9)
        ...         return "I think of a number from 1 to 9. Which?"
        ...
        ...     def step(self, message):
        ...         right = message["content"].strip() == str(self.number)
        ...         return "No. Again.", float(right), right
    """

    tools: ClassVar[Sequence[Any]] = ()
    """What the policy may call: functions, tools, or the names of methods, which work on the instance. The model is told of
    them; :meth:`step_tools` runs them."""
    dataset: ClassVar[Any] = None
    """The rows that :meth:`reset` gets, unless the batched environment is given others: a list of dicts, a file, a name."""
    system_prompt: ClassVar[str | None] = None
    """The system prompt, unless the batched environment is given another."""

    seed: int = 0
    """The episode's seed: the same for all episodes of a group, which then differ by what the policy does alone."""
    turn: int = 0
    """How many messages of the policy there were, the present one among them; 0 in :meth:`reset`."""

    def reset(self, row: Mapping[str, Any]) -> Said | Awaitable[Said]:
        """Begin the episode.

        Args:
            row: the row of the dataset, its columns by name; of an environment without a dataset ``{"index": 0}``.

        Returns:
            what the conversation begins with: a question, or messages.
        """
        raise NotImplementedError(f"{type(self).__name__} has no reset(row).")

    def step(self, message: Message) -> Any:
        """Reply to a message of the policy.

        Args:
            message: what the policy said, ``{"role", "content"}``, with ``"reasoning_content"`` and ``"tool_calls"`` where
                the chat template has them; a copy.

        Returns:
            a :class:`Reply`, or ``(messages, reward, done)``; or an awaitable of one.
        """
        raise NotImplementedError(f"{type(self).__name__} has no step(message).")

    def step_tools(self, message: Message) -> Any:
        """Reply to a message that calls tools, as :meth:`step`: with their results, and no reward."""
        return Reply(self.run_tools(message))

    def close(self) -> Any:
        """Let go of what the episode holds (a process, a file); called when it is over, whoever has ended it."""

    def run_tools(self, message: Message) -> list[Message]:
        """The results of the tools that a message calls, a message a call; errors are told to the policy as results."""
        return [result.message for result in toolbox_of(type(self)).run(message, self)]

    @property
    def random(self) -> random.Random:
        """Random numbers of this turn: the same for the same seed and turn, whatever was drawn in other turns."""
        generator = self.__dict__.get("_random")
        if generator is None:
            generator = self.__dict__["_random"] = random.Random(mixed(self.seed, "turn", self.turn))
        return generator

    def __getstate__(self) -> dict[str, Any]:
        """The attributes, for copies."""
        return {name: value for name, value in self.__dict__.items() if name != "_random"}


class _Method(Tool):
    """A method as a tool: it is called on the episode whose conversation calls it."""

    def __init__(self, owner: type[MessageEnv], name: str):
        method = getattr(owner, name, None)
        if not inspect.isfunction(method):
            raise TypeError(f"{owner.__name__}.tools names {name!r}, which is no method of the class.")
        without_self = functools.partial(method, None)
        without_self.__doc__ = method.__doc__
        super().__init__(without_self, name=name)
        self.is_async = inspect.iscoroutinefunction(method)
        self.per_conversation = True

    def call(self, arguments: dict[str, Any], conversation: Any = None, deadline: float | None = None) -> Any:
        """Call the method of the episode, which is the conversation's key."""
        return getattr(conversation, self.name)(**arguments)


_toolboxes: dict[Any, Toolbox] = {}


def toolbox_of(cls: type[MessageEnv]) -> Toolbox:
    """The tools of a class of environments.

    Raises:
        TypeError: a name of no method, or a function whose arguments cannot be told to a model.
    """
    if cls not in _toolboxes:
        _toolboxes[cls] = Toolbox([_Method(cls, tool) if isinstance(tool, str) else tool for tool in cls.tools])
    return _toolboxes[cls]


class State:
    """An episode at one moment: a value that can be stepped from, saved and copied.

    Args:
        env: the episode; not to be changed any more.
    """

    __slots__ = ("env", "turn")

    def __init__(self, env: MessageEnv):
        self.env = env
        self.turn = env.turn

    def episode(self) -> MessageEnv:
        """An instance to step from here: a copy, or the instance itself where it cannot be copied and is still at this turn.

        Raises:
            ValueError: the episode cannot be copied, and has gone on from here already.
        """
        try:
            return copy.deepcopy(self.env)
        except Exception as error:  # whatever the attribute's own class raises
            if self.env.turn == self.turn:
                return self.env
            raise ValueError(
                f"{type(self.env).__name__} has gone on from this turn already, and its state cannot be copied "
                f"({_uncopyable(self.env)}): an earlier turn cannot be stepped again, nor a conversation branched."
            ) from error

    def __deepcopy__(self, memo: dict[int, Any]) -> State:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if named := _uncopyable(self.env):
            raise TypeError(
                f"{type(self.env).__name__} holds what cannot be copied ({named}): its conversations cannot be saved, "
                "nor sent to another process. Keep it outside the instance, or give the class a __getstate__."
            )
        return State, (self.env,)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, State):
            return NotImplemented
        return type(self.env) is type(other.env) and self.env.__getstate__() == other.env.__getstate__()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"State({type(self.env).__name__}, turn {self.turn})"


def _uncopyable(env: MessageEnv) -> str:
    """The attributes that cannot be copied, and their types; empty if all can."""
    found = []
    for name, value in env.__getstate__().items():
        try:
            copy.deepcopy(value)
        except Exception:  # whatever the attribute's own class raises
            found.append(f"{name}: {type(value).__name__}")
    return ", ".join(found)


# ---------------------------------------------------------------------- many episodes
def begin_all(
    envs: Sequence[MessageEnv],
    rows: Sequence[Mapping[str, Any]],
    deadline: float | None = None,
    role: str = "user",
) -> list[list[Message] | Exception]:
    """What each episode begins with; an exception where one cannot begin.

    Args:
        envs: new instances, their seeds set.
        rows: the row of each.
        deadline: seconds for those that are asynchronous, which run at once; ``None`` for no limit.
        role: whose words a plain string is.
    """
    values = _settled([_tried(env.reset, row) for env, row in zip(envs, rows, strict=True)], deadline)
    begun: list[list[Message] | Exception] = []
    for env, value in zip(envs, values, strict=True):
        if not isinstance(value, Exception):
            value = _tried(as_messages, value, role=role, where=f"what {type(env).__name__}.reset returned")
        begun.append(value)
    return begun


def step_all(
    envs: Sequence[MessageEnv],
    messages: Sequence[Message],
    deadline: float | None = None,
    role: str = "user",
) -> list[Reply | Exception]:
    """What each episode replies to its policy's message; an exception where it cannot.

    Args:
        envs: instances to be stepped; their turns are counted here.
        messages: what the policy said in each.
        deadline, role: as for :func:`begin_all`.
    """
    values = []
    for env, message in zip(envs, messages, strict=True):
        env.turn += 1
        env.__dict__.pop("_random", None)
        calls = bool(env.tools) and bool(message.get("tool_calls") or message.get("invalid_tool_calls"))
        values.append(_tried(env.step_tools if calls else env.step, copy.deepcopy(message)))
    settled = _settled(values, deadline)
    return [
        value if isinstance(value, Exception) else _tried(_reply, env, value, role)
        for env, value in zip(envs, settled, strict=True)
    ]


def close_all(envs: Sequence[MessageEnv], deadline: float | None = None) -> None:
    """Close episodes that are over; one that cannot be closed is warned of, and keeps no other from it.

    Args:
        envs: the episodes.
        deadline: as for :func:`begin_all`.
    """
    for env, value in zip(envs, _settled([_tried(env.close) for env in envs], deadline), strict=True):
        if isinstance(value, Exception):
            warnings.warn(
                f"{type(env).__name__}.close() failed: {type(value).__name__}: {value}",
                RuntimeWarning,
                stacklevel=2,
            )


def _reply(env: MessageEnv, value: Any, role: str) -> Reply:
    """What a step returned, checked."""
    name = f"{type(env).__name__}.step"
    if not isinstance(value, tuple) or len(value) not in (3, 4):
        raise TypeError(f"{name} returned {value!r:.80}: expected (messages, reward, done), or a Reply.")
    said, reward, done, success = value if len(value) == 4 else (*value, None)
    if not isinstance(done, (bool, int)) or done not in (0, 1):
        raise TypeError(f"{name} returned done={done!r:.40}: expected True or False.")
    try:
        paid = float(reward)
    except (TypeError, ValueError):
        raise TypeError(f"{name} returned reward={reward!r:.40}: expected a number.") from None
    if not abs(paid) < float("inf"):
        raise ValueError(f"{name} returned reward={reward!r}: expected a finite number.")
    success = bool(done and paid > 0) if success is None else bool(success)
    if done:
        return Reply(None, paid, True, success)
    if said is None or (not isinstance(said, (str, Mapping)) and not len(said)):
        raise MessageError(f"{name} goes on (done=False) and says nothing: return messages, or done=True.")
    return Reply(as_messages(said, role=role, where=f"what {name} returned"), paid, False, success)


def _tried(function: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        return function(*args, **kwargs)
    except Exception as error:  # one episode's affair
        return error


def _settled(values: list[Any], deadline: float | None) -> list[Any]:
    """The values, those that are awaited in place of awaitables."""
    waiting = [i for i, value in enumerate(values) if inspect.isawaitable(value)]
    if not waiting:
        return values

    async def one(value: Any) -> Any:
        try:
            async with asyncio.timeout(deadline):
                return await value
        except TimeoutError as error:
            return error if deadline is None else TimeoutError(f"no reply within {deadline:g} s")
        except Exception as error:
            return error

    async def every() -> list[Any]:
        return await asyncio.gather(*(one(values[i]) for i in waiting))

    settled = list(values)
    for i, value in zip(waiting, _loop().run(every()), strict=True):
        settled[i] = value
    return settled


_loops: list[LoopThread] = []


def _loop() -> LoopThread:
    """The loop on which all asynchronous episodes of this process run: what they open belongs to one loop."""
    if not _loops or not _loops[0].alive:  # a forked child has no thread
        _loops[:] = [LoopThread("torchrl_chat.message_envs")]
    return _loops[0]
