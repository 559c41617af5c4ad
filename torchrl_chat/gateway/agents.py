"""Agents played to the end of their episodes, many at once: functions, or commands of whatever language.

An agent is an async function or a plain one, ``agent(row, session)``, or a command. It is given an address and a key, and does what it does;
when it is done its session is finished and graded.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import json
import logging
import os
import shlex
import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from tensordict import TensorDict

from torchrl_chat._loop import LoopThread
from torchrl_chat.gateway.commands import SandboxedCommand
from torchrl_chat.gateway.ends import AgentError, checked_end
from torchrl_chat.gateway.serve import Gateway, Served
from torchrl_chat.sandbox.settings import SandboxError
from torchrl_chat.seeds import EPOCH, PLACE, ROW, SEED, episode_seed

Agent = Callable[[Mapping[str, Any], Served], Any] | str | Sequence[str]
"""``agent(row, session)``, or a command: a line of words, or a list of them."""

_SHOWN = 2000  # characters of a command's last words
_ENDS = frozenset({"reward", "success", "parts", "failure", "grade_failure", "extracted", "stop"})
_log = logging.getLogger("torchrl_chat.agents")


def play_agents(
    agent: Agent,
    rows: Sequence[Mapping[str, Any]],
    gateway: Gateway,
    *,
    repeats: int = 1,
    concurrency: int = 32,
    seconds: float | None = None,
    seed: int | None = None,
    on_error: Literal["score", "fail"] = "score",
    data_key: str = "query",
) -> TensorDict:
    """Play an agent once for each row and repeat, to the end.

    A function returns nothing, the episode's reward (a number), or a dict of what
    :meth:`Session.finish <torchrl_chat.gateway.sessions.Session.finish>` takes; what it does not say is graded by the gateway's ``reward``. A
    command is run as given, without a shell, in the environment of this process with ``OPENAI_BASE_URL``, ``OPENAI_API_KEY``,
    ``ANTHROPIC_BASE_URL`` and ``ANTHROPIC_API_KEY``; the row stands on its standard input as JSON, and it is killed, with what it has started,
    when its time is up.

    A session begins when its agent does, takes no more requests once the agent is done or out of time, and is finished when all are done. What
    an agent raised is logged by ``torchrl_chat.agents``, key hidden; the session's findings name its type.

    Args:
        agent: the agent.
        rows: dataset rows, as dicts; the agent gets a copy.
        gateway: a running gateway.

    Keyword Args:
        repeats: how many episodes each row is played in, the group of GRPO.
        concurrency: how many agents run at once; at most as many as the gateway has places for sessions.
        seconds: how long one may take; ``None`` for no limit.
        seed: of what is sampled, as that of a :class:`~torchrl_chat.DatasetChatEnv`: each episode's own seed is made of it. Rows that have
            an ``"episode_seed"`` keep theirs.
        on_error: what becomes of the episode of an agent that raises, fails, or takes too long: ``"score"`` grades what there is, so that no
            policy escapes a grade by breaking its agent; ``"fail"`` leaves it out of training. An agent that returns what is no end of an
            episode has failed. An episode whose *engine* failed at a request that it did not answer later is always left out, whatever its
            agent made of it, and so is one whose sandbox could not be built; an agent that a used-up budget has stopped has not failed.
        data_key: see :func:`~torchrl_chat.gateway.finished.episodes`.

    Returns:
        the episodes, batch size (len(rows) * repeats,), those of a row one behind the other.

    Raises:
        ValueError: an option has no such value.
        SandboxError: the agent is a :class:`~torchrl_chat.gateway.SandboxedCommand`, and there can be no sandbox here.

    Example:
        >>> from openai import AsyncOpenAI
        >>> from torchrl_chat.gateway import Gateway
        >>> from torchrl_chat import TransformersPolicy
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_model, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> policy = TransformersPolicy(tiny_model(len(tokenizer)), tokenizer, max_new_tokens=4)
        >>> rows = [{"query": "2 + 2?"}]
        >>> async def agent(row, session):
        ...     client = AsyncOpenAI(base_url=session.base_url, api_key=session.api_key)
        ...     ask = [{"role": "user", "content": row["query"]}]
        ...     await client.chat.completions.create(model="policy", messages=ask)
        >>> with Gateway(policy) as gateway:
        ...     finished = play_agents(agent, rows, gateway, repeats=2)
        >>> finished.batch_size
        torch.Size([2])
    """
    if repeats < 1 or concurrency < 1:
        raise ValueError(f"repeats={repeats}, concurrency={concurrency}: expected at least 1 of each.")
    if on_error not in ("score", "fail"):
        raise ValueError(f"on_error={on_error!r}: expected 'score' or 'fail'.")
    if isinstance(agent, SandboxedCommand):
        agent.prepare()  # where there can be no sandbox no session begins
    told = []
    for number, row in enumerate(rows):
        for place in range(repeats):
            own = dict(row)
            if SEED not in own and seed is not None:
                own |= {ROW: number, EPOCH: 0, PLACE: place, SEED: episode_seed(seed, number, 0, place)}
            told.append(own)
    sessions: dict[int, Served] = {}
    # A thread an agent; one that its agent keeps after its time is up is not waited for.
    pool = ThreadPoolExecutor(len(told) or 1, "torchrl_chat.agent")
    loop = LoopThread("torchrl_chat.agents", quick=True)
    try:
        try:
            ends = loop.run(_play_all(agent, told, gateway, sessions, pool, concurrency, seconds))
        finally:
            loop.close()
            pool.shutdown(wait=False, cancel_futures=True)
        played = [sessions[number] for number in range(len(told))]
        finish_all(gateway, played, ends, on_error, [number // repeats for number in range(len(told))])
    except BaseException as error:
        why = f"the play was broken off: {type(error).__name__}"
        for served in sessions.values():  # a second end changes nothing
            gateway.run(functools.partial(end_session, gateway, served, {"failure": why}))
        raise
    return gateway.episodes(played, data_key)


def end_session(gateway: Gateway, served: Served, end: Mapping[str, Any], found: str = "") -> None:
    """End a session as its agent did, in the gateway's thread, with a finding of it."""
    if found:
        served.session.findings.append(found)
    gateway.table.retire(served.session)
    gateway.table.finish(served.session, **end)


def finish_all(
    gateway: Gateway,
    sessions: Sequence[Served],
    ends: Sequence[Mapping[str, Any] | Exception],
    on_error: str,
    groups: Sequence[int],
) -> None:
    """Grade the episodes of agents that are done, and end them.

    Args:
        gateway: their gateway.
        sessions: their sessions.
        ends: what each agent returned or raised.
        on_error: see :func:`play_agents`.
        groups: which of them are of one group.
    """
    found: list[dict[str, Any]] = []
    notes: list[str] = []
    for served, end in zip(sessions, ends, strict=True):
        session = served.session
        given = {} if isinstance(end, Exception) else dict(end)
        failed = isinstance(end, Exception) and not session.stop
        if failed:
            text = f"{type(end).__name__}: {end}".replace(served.api_key, "[hidden]")[:_SHOWN]
            _log.warning("an agent failed: %s", text, extra={"session": served.name})
            if on_error == "fail" or session.engine_failure or isinstance(end, SandboxError):
                given["failure"] = text[:400]
        elif session.engine_failure and not given.get("failure"):
            given["failure"] = session.engine_failure
        found.append(given)
        notes.append(f"its agent failed: {type(end).__name__}." if failed else "")
    # All at once: a verifier of groups sees whole groups.
    wanted = [i for i, end in enumerate(found) if end.get("reward") is None and not end.get("failure")]
    graded = gateway.graded([sessions[i].session for i in wanted], [groups[i] for i in wanted])
    for i, end in zip(wanted, graded, strict=False):
        found[i] = {**end, **{key: value for key, value in found[i].items() if value is not None}}
    for served, end, note in zip(sessions, found, notes, strict=True):
        gateway.run(functools.partial(end_session, gateway, served, end, note))


async def _play_all(
    agent: Agent,
    rows: Sequence[Mapping[str, Any]],
    gateway: Gateway,
    sessions: dict[int, Served],
    pool: ThreadPoolExecutor,
    concurrency: int,
    seconds: float | None,
) -> list[Mapping[str, Any] | Exception]:
    slots = asyncio.Semaphore(min(concurrency, gateway.table.limits.max_sessions))

    async def one(number: int, row: Mapping[str, Any]) -> Mapping[str, Any] | Exception:
        async with slots:
            served = sessions[number] = gateway.session(row=row, seed=row.get(SEED))
            served.session.held = True
            try:
                return await end_of(agent, row, served, pool, seconds)
            finally:
                gateway.run(functools.partial(gateway.table.retire, served.session))

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(number, row)) for number, row in enumerate(rows)]
    except ExceptionGroup as errors:  # no agent's: a session that there cannot be
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


async def end_of(
    agent: Agent, row: Mapping[str, Any], session: Served, pool: ThreadPoolExecutor, seconds: float | None
) -> Mapping[str, Any] | Exception:
    """What an agent ends its episode with, or how it failed: whatever it does costs its own episode."""
    clock = asyncio.timeout(seconds)
    task = asyncio.current_task()
    try:
        async with clock:
            end = await _played(agent, row, session, pool)
            return _checked(end)
    except BaseException as error:
        if clock.expired():
            return TimeoutError(f"the agent took more than {seconds:g} s")
        if task is not None and task.cancelling():  # the play ends, and not the agent
            raise
        return (
            error
            if isinstance(error, Exception)
            else AgentError(f"the agent raised {type(error).__name__}: {error}")
        )


def _checked(end: Mapping[str, Any]) -> Mapping[str, Any]:
    """What an agent returned, if an episode can end with it.

    Raises:
        AgentError: it cannot.
    """
    if unknown := [key for key in end if key not in _ENDS]:
        raise AgentError(f"the agent returned {unknown[0]!r}: an episode ends with {', '.join(sorted(_ENDS))}.")
    try:
        checked_end(**end)
    except (TypeError, ValueError) as error:
        raise AgentError(f"the agent returned what no episode can end with: {error}") from None
    return end


async def _played(
    agent: Agent, row: Mapping[str, Any], session: Served, pool: ThreadPoolExecutor
) -> Mapping[str, Any]:
    if not callable(agent):
        await _command(agent, row, session)
        return {}
    if inspect.iscoroutinefunction(agent) or inspect.iscoroutinefunction(getattr(agent, "__call__", None)):  # noqa: B004  # of an object, its class says what calling it gives
        said = await agent(dict(row), session)
    else:
        said, error = await asyncio.get_running_loop().run_in_executor(pool, _called, agent, dict(row), session)
        if error is not None:
            raise error
        if inspect.isawaitable(said):
            said = await said
    if said is None:
        return {}
    return said if isinstance(said, Mapping) else {"reward": said}


def _called(agent: Callable[..., Any], row: Mapping[str, Any], session: Served) -> tuple[Any, Exception | None]:
    """What a plain function returns or raises; a thread that is told to end (``sys.exit()``) ends no play."""
    try:
        return agent(row, session), None
    except Exception as error:  # an agent is anybody's: what it raises ends its own episode
        return None, error
    except BaseException as error:
        return None, AgentError(f"the agent raised {type(error).__name__}: {error}")


async def _command(agent: str | Sequence[str], row: Mapping[str, Any], session: Served) -> None:
    words = shlex.split(agent) if isinstance(agent, str) else list(agent)
    process = await asyncio.create_subprocess_exec(
        *words,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **session.environment()},
        start_new_session=True,
    )
    try:
        _, errors = await process.communicate(json.dumps(row, default=str).encode())
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # what it has started goes with it
        if process.returncode is None:
            await process.wait()
    if process.returncode:
        last = errors.decode(errors="replace").strip()[-_SHOWN:].replace(session.api_key, "[hidden]")
        raise AgentError(f"the command ended with the code {process.returncode}: {last}")
