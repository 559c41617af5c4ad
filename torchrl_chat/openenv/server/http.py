"""The HTTP routes: stateless reset and step as in OpenEnv, sessions by id, the Task API, documents."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from torchrl_chat.access import Guard
from torchrl_chat.openenv.models import CloseRequest, KeepingResetRequest, State, StepRequest, TaskRequest
from torchrl_chat.openenv.protocol import ErrorCode, ProtocolError, checked, dumps, loads
from torchrl_chat.openenv.server import mcp
from torchrl_chat.openenv.server.catalog import Catalog, Entry, Handler, page
from torchrl_chat.openenv.server.metrics import PROMETHEUS
from torchrl_chat.openenv.server.security import Bucket, address_of
from torchrl_chat.openenv.server.sessions import ServerSession, SessionTable

_MAX_ADDRESSES = 10_000  # whose rates are known
_STATUS = {
    ErrorCode.INVALID_JSON: 422,
    ErrorCode.VALIDATION_ERROR: 422,
    ErrorCode.EXECUTION_ERROR: 400,
    ErrorCode.RATE_LIMITED: 429,
    ErrorCode.CAPACITY_REACHED: 503,
    ErrorCode.FACTORY_ERROR: 500,
    ErrorCode.SESSION_ERROR: 404,
}
_OPEN = frozenset({"/health"})  # what load balancers ask without a token


class Routes:
    """The routes of a server.

    Args:
        sessions: its sessions.
        catalog: what it knows of its environment.
        guard: who may pass.
    """

    def __init__(self, sessions: SessionTable, catalog: Catalog, guard: Guard):
        self._sessions = sessions
        self._catalog = catalog
        self._guard = guard
        rate = sessions.limits.requests_per_second
        self._buckets = functools.lru_cache(_MAX_ADDRESSES)(lambda address: Bucket(rate))
        task, env, named = self._task_api, "/{env_name}", "the session that session_id names"
        docs: Handler = lambda _: HTMLResponse(page(catalog.openapi(self._table)))  # noqa: E731
        task_range = task("get_task_range", "tasks", "start", "stop")
        self._table = [
            Entry(
                "/reset", self._reset, f"Begin an episode: of a new environment, or of {named}", KeepingResetRequest
            ),
            Entry("/step", self._step, f"Take a step: in a new environment, or in {named}", StepRequest),
            Entry("/close", self._close, f"End {named}", CloseRequest),
            Entry("/state", self._state, "The state of a session"),
            Entry(
                "/metadata",
                lambda _: sessions.workers.run(catalog.metadata),
                "Name, description and version of the environment",
            ),
            Entry("/schema", lambda _: catalog.schema, "JSON schemas of actions, observations and states"),
            Entry(
                "/health",
                lambda _: {"status": "draining" if sessions.draining else "healthy"},
                "Whether the server runs",
            ),
            Entry(
                "/metrics",
                lambda _: Response(sessions.metrics.text(), media_type=PROMETHEUS),
                "Counters for Prometheus",
            ),
            Entry("/mcp", self._mcp, "JSON-RPC 2.0: openenv/session/create and openenv/session/close", dict),
            Entry("/openapi.json", lambda _: catalog.openapi(self._table)),
            Entry("/docs", docs),
            Entry("/redoc", docs),
            Entry("/list_environments", lambda _: [catalog.name], "The environments of this server"),
            Entry(f"{env}/splits", self._splits, "The splits of the environment's tasks"),
            Entry(f"{env}/tasks", task("list_tasks", "tasks"), "The tasks of a split", TaskRequest),
            Entry(f"{env}/num_tasks", task("num_tasks", "num_tasks"), "How many tasks a split has", TaskRequest),
            Entry(f"{env}/task", task("get_task", "task", "index"), "One task", TaskRequest),
            Entry(f"{env}/task_range", task_range, "The tasks from start to stop", TaskRequest),
        ]

    def all(self) -> list[Route]:
        """Every route, ready for Starlette."""
        return [
            Route(entry.path, self._guarded(entry.path, entry.handler), methods=[entry.method])
            for entry in self._table
        ]

    # ------------------------------------------------------------------ reset, step, state
    async def _reset(self, request: Request) -> bytes:
        body = checked(KeepingResetRequest, await self._body(request), "reset")
        data = body.model_dump(exclude={"keep", "session_id"}, exclude_unset=True)
        async with self._session(request, body.session_id, keep=body.keep) as session:
            return await session.reset(data)

    async def _step(self, request: Request) -> bytes:
        body = checked(StepRequest, await self._body(request), "step")
        async with self._session(request, body.session_id) as session:
            return await session.step(body.action, body.timeout_s)

    async def _state(self, request: Request) -> Any:
        wanted = request.query_params.get("session_id")
        return State() if wanted is None else await self._sessions.find(wanted).state()

    async def _close(self, request: Request) -> dict[str, bool]:
        body = checked(CloseRequest, await self._body(request), "close")
        await self._sessions.close(self._sessions.find(body.session_id), "closed")
        return {"closed": True}

    @contextlib.asynccontextmanager
    async def _session(
        self, request: Request, wanted: str | None, keep: bool = False
    ) -> AsyncIterator[ServerSession]:
        """The session that is wanted; or a new one, for this request only if it is not to be kept."""
        if wanted is not None:
            yield self._sessions.find(wanted)
            return
        session = await self._sessions.open(address_of(request), resumable=keep, listed=keep)
        try:
            yield session
        except BaseException:
            await self._sessions.close(session, "failed")
            raise
        finally:
            if not keep:
                await session.end()

    async def _mcp(self, request: Request) -> bytes:
        try:
            value = loads(await self._raw(request), self._sessions.limits)
        except ProtocolError as error:
            return mcp.failure(mcp.PARSE, error.message)
        return await mcp.answer(value, self._sessions, address_of(request))

    # ------------------------------------------------------------------ the Task API
    async def _splits(self, request: Request) -> list[Any]:
        return [_split(split) for split in await self._ask(request, "list_splits")]

    def _task_api(self, method: str, answer: str, *fields: str) -> Handler:
        """What answers with the environment's method, under that name; the method is given the split and further fields."""

        async def ask(request: Request) -> dict[str, Any]:
            self._named(request)
            wanted = checked(TaskRequest, await self._body(request), "task request")
            if "index" in fields and wanted.index is None:
                raise HTTPException(422, "'index' is required.")
            found = await self._ask(request, method, wanted.split, *(getattr(wanted, name) for name in fields))
            more = {"env_name": self._catalog.name} if method == "list_tasks" else {}
            return {answer: found, **more}

        return ask

    def _named(self, request: Request) -> None:
        if request.path_params["env_name"] != self._catalog.name:
            raise HTTPException(
                404, f"there is no environment of that name: this server has {self._catalog.name!r}."
            )

    async def _ask(self, request: Request, method: str, *arguments: Any) -> Any:
        self._named(request)
        try:
            return await self._sessions.workers.run(lambda: self._catalog.ask(method, *arguments))
        except NotImplementedError:
            raise HTTPException(501, f"{method} is not supported for this environment") from None
        except IndexError as error:
            raise HTTPException(400, f"Invalid task index: {error}") from None
        except (KeyError, ValueError) as error:
            raise HTTPException(400, str(error.args[0]) if error.args else str(error)) from None

    # ------------------------------------------------------------------ one request
    def _guarded(self, path: str, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        metrics = self._sessions.metrics

        async def guarded(request: Request) -> Response:
            refusal = None if path in _OPEN else self._guard.refusal(request)
            if refusal is None and not self._buckets(address_of(request)).takes():
                refusal = 429, "too many requests a second."
            if refusal is not None:
                metrics.count("refused_total", reason=str(refusal[0]))
                return _failure(*refusal)
            metrics.count("requests_total", kind=path)
            try:
                found = handler(request)
                found = await found if inspect.isawaitable(found) else found
                if isinstance(found, Response):
                    return found
                return Response(found if isinstance(found, bytes) else dumps(found), media_type="application/json")
            except HTTPException as error:
                return _failure(error.status_code, error.detail)
            except ClientDisconnect:
                return _failure(400, "the client has left.")
            except Exception as error:
                told = self._sessions.told(error, path=path)
                if told is not error:
                    return _failure(500, "internal error")
                detail = told.details.get("errors") or told.message
                return _failure(_STATUS.get(told.code, 400), detail, code=str(told.code), message=told.message)

        return guarded

    async def _raw(self, request: Request) -> bytes:
        body, most = bytearray(), self._sessions.limits.max_message_bytes
        async for chunk in request.stream():
            body += chunk
            if len(body) > most:
                raise HTTPException(413, f"the body has more than {most} bytes.")
        if body and not _says_json(request):
            # A web page may send texts and forms to any server without being asked; JSON it may not (Fetch, section 4.8).
            raise HTTPException(
                415, "the body's type is not application/json: send the header 'Content-Type: application/json'."
            )
        return bytes(body)

    async def _body(self, request: Request) -> dict[str, Any]:
        raw = await self._raw(request)
        if not raw.strip() and request.url.path == "/reset":
            return {}
        value = loads(raw, self._sessions.limits)
        if not isinstance(value, dict):
            raise ProtocolError(ErrorCode.VALIDATION_ERROR, "the body is not a JSON object.")
        return value


def _says_json(request: Request) -> bool:
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return media == "application/json" or (media.startswith("application/") and media.endswith("+json"))


def _failure(status: int, detail: Any, **more: Any) -> Response:
    headers = {"www-authenticate": "Bearer"} if status == 401 else None
    return JSONResponse({"detail": detail, **more}, status_code=status, headers=headers)


def _split(split: Any) -> Any:
    if isinstance(split, dict):
        return split
    name = str(split)
    return {"name": name, "type": name if name in ("train", "validation", "test") else "validation"}
