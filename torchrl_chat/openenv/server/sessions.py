"""Sessions: each an environment of its own; how many there are, who may use them, and when they end.

Law of this file: a session that is closed is gone. It leaves the table first, its socket is closed, its environment is
closed once nothing runs in it; no request reaches it after that.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from torchrl_chat.openenv.models import ResetRequest
from torchrl_chat.openenv.protocol import CloseCode, ErrorCode, ProtocolError, ServerLimits, checked, dumps, short
from torchrl_chat.openenv.server.metrics import Metrics
from torchrl_chat.openenv.server.replies import Replies
from torchrl_chat.openenv.server.workers import Late, Workers

if TYPE_CHECKING:
    from torchrl_chat.openenv.server.sockets import Line

log = logging.getLogger("torchrl_chat.openenv")
_GRACE = 0.25  # seconds
_COUNTERS = {
    "requests_total": ("Requests answered, by kind.", ["kind"]),
    "errors_total": ("Error replies, by code.", ["code"]),
    "sessions_opened_total": ("Sessions opened.", []),
    "sessions_closed_total": ("Sessions closed, by reason.", ["reason"]),
    "bytes_sent_total": ("Bytes of replies over WebSockets.", []),
    "refused_total": ("Requests refused before they reached a session, by reason.", ["reason"]),
}


class ServerSession:
    """One environment and what its client has seen of it.

    Args:
        env: the environment.
        sessions: the table that it belongs to, whose limits and workers are its own.
        address: of the client that it was made for.
        resumable: whether it outlives its socket.
    """

    def __init__(self, env: Any, sessions: SessionTable, address: str, resumable: bool):
        self.id = uuid.uuid4().hex
        self.env = env
        self.resumable = resumable
        self.address = address
        self.attached = False  # whether a client has come to it: by a socket, a reset, or by its id
        self.line: Line | None = None  # the socket that it talks through
        self.left = False  # whether it has had a socket and lost it
        self.replies = Replies()
        self.used = time.monotonic()
        self.closed = False
        self._sessions = sessions
        self._lock = asyncio.Lock()
        self._late: asyncio.Future[Any] | None = None
        self._lost = False

    @property
    def busy(self) -> bool:
        """Whether a request is under way."""
        return self._lock.locked()

    async def reset(self, data: dict[str, Any]) -> bytes:
        """Begin an episode; the observation as JSON.

        Raises:
            ProtocolError: the arguments are bad, or the environment refuses.
        """
        self.attached = True
        arguments = dict(data)
        delta = arguments.pop("delta", None)
        if delta not in (None, True, False):
            raise ProtocolError(ErrorCode.VALIDATION_ERROR, f"'delta' is {short(delta)}: expected true or false.")
        request = checked(ResetRequest, arguments, "reset")
        arguments |= {"seed": request.seed, "episode_id": request.episode_id}
        async with self._lock:
            turn = await self._call("reset", _accepted(self.env, arguments))
            self._lost = False
            if delta is not None:
                self.replies.delta = delta
            self.replies.forget()
            if self.resumable and hasattr(turn, "metadata"):
                turn.metadata["session_id"] = self.id
            return self.replies.result(turn)

    async def step(self, data: dict[str, Any], timeout_s: float | None = None) -> bytes:
        """Take a step; the observation as JSON.

        Raises:
            ProtocolError: the action is bad, or the environment refuses; the episode is as it was.
        """
        action = checked(self._sessions.action_cls, data, "action")
        async with self._lock:
            if self._lost:
                raise ProtocolError(ErrorCode.EXECUTION_ERROR, "the last step took too long: reset the session.")
            turn = await self._call("step", {"action": action, "timeout_s": timeout_s})
            return self.replies.result(turn)

    async def state(self) -> bytes:
        """The environment's state as JSON.

        Raises:
            ProtocolError: the environment refuses.
        """
        async with self._lock:
            return dumps(await self._call("state", {}))

    async def end(self) -> None:
        """Close the environment, once nothing runs in it; for a call that is late already, nobody waits."""
        self.closed = True
        async with self._lock:
            late, self._late = self._late, None
            env, self.env = self.env, None
            if late is None or late.done():
                await self._close(env)
            else:
                late.add_done_callback(lambda _: self._leave(env))

    def _leave(self, env: Any) -> None:
        self._closing = asyncio.ensure_future(self._close(env))

    async def _close(self, env: Any) -> None:
        close = getattr(env, "close", None)
        if not callable(close):
            return
        try:
            await self._sessions.workers.run(close, self._sessions.limits.step_seconds)
        except Exception as error:
            log.warning("close failed", extra={"session": self.id, "error": repr(error)})

    # ------------------------------------------------------------------ running the environment
    async def _call(self, name: str, arguments: dict[str, Any]) -> Any:
        if self.closed:
            raise ProtocolError(ErrorCode.SESSION_ERROR, "the session has been closed.")
        if self._late is not None and not self._late.done():
            raise ProtocolError(ErrorCode.EXECUTION_ERROR, "an earlier request is still running; try again later.")
        self._late = None
        started = self.used = time.monotonic()
        try:
            return await self._run(name, arguments)
        except ProtocolError:
            raise
        except (ValueError, TypeError, KeyError, IndexError, TimeoutError, NotImplementedError) as error:
            # What an environment raises at its caller: the text says what to do. No fault of the server.
            text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
            raise _failed(error, text or type(error).__name__) from None
        except Exception as error:
            log.error("the environment failed", extra={"session": self.id, "error": repr(error)[:2000]})
            raise _failed(error, f"{type(error).__name__}: {error}") from None
        finally:
            self.used = time.monotonic()
            if name != "state":
                self._sessions.metrics.took("step_seconds", self.used - started)

    async def _run(self, name: str, arguments: dict[str, Any]) -> Any:
        env, most = self.env, self._sessions.limits.step_seconds
        wanted = arguments.get("timeout_s") if name == "step" else None
        if not hasattr(env, "step_turn"):  # not one of ours
            if name == "step" and wanted is None:
                del arguments["timeout_s"]
            if _is_async(env, name):
                async with asyncio.timeout(most):
                    return await getattr(env, f"{name}_async")(**arguments)
        elif name == "step" and hasattr(env, "is_light") and env.is_light(arguments["action"]):
            return env.step_turn(**arguments)
        if name == "state":
            call: Callable[[], Any] = lambda: env.state() if callable(env.state) else env.state  # noqa: E731
        else:
            method = getattr(env, f"{name}_turn", None) or getattr(env, name)
            call = lambda: method(**arguments)  # noqa: E731
        # An environment that keeps the limit itself says so in time, and its episode stays in order.
        limits = [most, None if wanted is None else wanted + _GRACE]
        seconds = min((limit for limit in limits if limit is not None), default=None)
        try:
            return await self._sessions.workers.run(call, seconds)
        except Late as late:
            self._late, self._lost = late.rest, name != "state"
            raise TimeoutError(f"the {name} takes longer than {seconds:g} s.") from None


def _failed(error: Exception, text: str) -> ProtocolError:
    return ProtocolError(ErrorCode.EXECUTION_ERROR, text[:2000], error_type=type(error).__name__)


def _accepted(env: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that the environment's reset takes; others are dropped, as OpenEnv does it."""
    method = getattr(env, "reset_turn", None) or env.reset
    parameters = inspect.signature(method).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return arguments
    return {key: value for key, value in arguments.items() if key in parameters}


def _is_async(env: Any, name: str) -> bool:
    """Whether the environment has an async method of its own."""
    method = getattr(type(env), f"{name}_async", None)
    return method is not None and not method.__module__.endswith((".interfaces", "env_server.interfaces"))


class SessionTable:
    """The table of sessions.

    Args:
        factory: makes the environment of a session.
        action_cls: the model of its actions.
        limits: see :class:`ServerLimits`.
        workers: threads for heavy work.
    """

    def __init__(
        self, factory: Callable[[], Any], action_cls: type[BaseModel], limits: ServerLimits, workers: int = 4
    ):
        self.action_cls = action_cls
        self.limits = limits
        self.metrics = Metrics("torchrl_chat_openenv_", _COUNTERS, {"step_seconds": "Time of a step or reset."})
        self.workers = Workers(workers)
        self.draining = False
        self._factory = factory
        self._table: dict[str, ServerSession] = {}
        self._opening = 0
        self._addresses: Counter[str] = Counter()
        self.metrics.gauge("sessions", "Sessions open now.", lambda: len(self._table))
        self.metrics.gauge("late_calls", "Calls that took too long and still run.", lambda: self.workers.stuck)
        self.metrics.gauge("sessions_max", "Sessions that may be open.", lambda: limits.max_sessions)

    def __len__(self) -> int:
        return len(self._table)

    async def open(self, address: str, *, resumable: bool = False, listed: bool = True) -> ServerSession:
        """A new session.

        Args:
            address: of the client that asks for it.
            resumable: whether it outlives its socket.
            listed: whether it is kept in the table; one request of its own needs no place there.

        Raises:
            ProtocolError: the server is full or shutting down, or the environment cannot be made.
        """
        if self.draining:
            raise ProtocolError(ErrorCode.SESSION_ERROR, "the server is shutting down.")
        active, mine, limits = len(self._table) + self._opening, self._addresses[address], self.limits
        full = None
        if active >= limits.max_sessions:
            full = f"all {limits.max_sessions} sessions are in use: close one, or start the server with more."
        elif mine >= limits.sessions_of_one:
            full = (
                f"{address or 'this address'} has {mine} sessions, as many as one address may have: close one, or start the "
                f"server with more (max_sessions_per_address)."
            )
        if full is not None:
            counts = {"active_sessions": active, "max_sessions": limits.max_sessions}
            raise ProtocolError(ErrorCode.CAPACITY_REACHED, full, **counts)
        self._opening += 1
        self._addresses[address] += 1
        kept = False
        try:
            env = await self.workers.run(self._factory)
        except Exception as error:
            name = getattr(self._factory, "__name__", type(self._factory).__name__)
            log.error("the environment cannot be made", extra={"error": repr(error)[:2000]})
            raise ProtocolError(
                ErrorCode.FACTORY_ERROR, f"the environment cannot be made: {error}"[:2000], factory_name=name
            ) from None
        else:
            kept = listed
        finally:
            self._opening -= 1
            if not kept:
                self._forget(address)
        session = ServerSession(env, self, address, resumable)
        if listed:
            self._table[session.id] = session
            self.metrics.count("sessions_opened_total")
            log.info("session opened", extra={"session": session.id, "sessions": len(self)})
        return session

    def told(self, error: Exception, **where: str) -> ProtocolError:
        """An error, counted, as a client is told of it: one that is no :class:`ProtocolError` is a defect of ours."""
        code, told = "INTERNAL", error
        if isinstance(told, ProtocolError):
            code = told.code
        else:
            log.error("internal error", extra={**where, "error": repr(error)[:2000]})
            told = ProtocolError(ErrorCode.EXECUTION_ERROR, f"internal error: {short(error)}")
        self.metrics.count("errors_total", code=code)
        return told

    def _forget(self, address: str) -> None:
        self._addresses[address] -= 1
        if self._addresses[address] <= 0:
            del self._addresses[address]  # the table of addresses does not grow for ever

    def find(self, session_id: Any) -> ServerSession:
        """The session of an id.

        Raises:
            ProtocolError: there is none (any more).
        """
        session = self._table.get(session_id) if isinstance(session_id, str) else None
        if session is None:
            raise ProtocolError(
                ErrorCode.SESSION_ERROR, f"Unknown session_id: {short(session_id)}; it may have been idle too long."
            )
        session.used = time.monotonic()
        session.attached = True
        return session

    async def close(self, session: ServerSession, reason: str) -> None:
        """End a session."""
        if self._table.pop(session.id, None) is None:
            return
        self._forget(session.address)
        self.metrics.count("sessions_closed_total", reason=reason)
        log.info("session closed", extra={"session": session.id, "reason": reason, "sessions": len(self)})
        line, session.line = session.line, None
        session.closed = True
        if line is not None:
            error = ProtocolError(ErrorCode.SESSION_ERROR, f"the session has been closed: {reason}.")
            await line.end(error, CloseCode.NORMAL, reason)
        await session.end()

    async def detach(self, session: ServerSession, line: Line) -> None:
        """The socket of a session is gone: so is the session, unless it can be resumed."""
        if session.line is not line:
            return
        session.line, session.left = None, True
        session.used = time.monotonic()
        session.replies.forget()
        if not session.resumable:
            await self.close(session, "disconnected")

    async def reap(self) -> None:
        """Close the sessions that nobody has used for too long; runs until it is cancelled."""
        limits, forever = self.limits, float("inf")
        idle = limits.idle_seconds or forever
        while True:
            await asyncio.sleep(max(0.05, min(20.0, limits.resume_seconds, limits.attach_seconds, idle) / 4))
            now, ended = time.monotonic(), []
            for session in self._table.values():
                attach = forever if session.attached else limits.attach_seconds
                resume = limits.resume_seconds if session.left and session.line is None else forever
                if not session.busy and now - session.used > min(idle, attach, resume):
                    ended.append(session)
            # At once, and whatever becomes of one: it must not keep the others.
            await asyncio.gather(*(self.close(session, "idle") for session in ended), return_exceptions=True)

    async def drain(self, seconds: float) -> None:
        """Shut down: steps that are under way are finished and answered, then every session is closed."""
        self.draining = True
        closing = [asyncio.ensure_future(self._leave(session)) for session in list(self._table.values())]
        if closing:
            _, pending = await asyncio.wait(closing, timeout=seconds)
            for task in pending:
                task.cancel()
        self.workers.close()

    async def _leave(self, session: ServerSession) -> None:
        line = session.line
        if line is not None:
            await line.end(None, CloseCode.GOING_AWAY, "the server is shutting down")
        while session.busy:
            await asyncio.sleep(0.005)
        session.line = None
        await self.close(session, "shutdown")
