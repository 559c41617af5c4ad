"""The HTTP routes: stateless reset and step as in OpenEnv, sessions by id, the Task API, documents."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from torchrl_chat.openenv.models import StepRequest, TaskRequest
from torchrl_chat.openenv.protocol import ErrorCode, ProtocolError, ServerLimits, dumps, invalid, loads, short
from torchrl_chat.openenv.server import mcp
from torchrl_chat.openenv.server.catalog import Catalog
from torchrl_chat.openenv.server.documents import page
from torchrl_chat.openenv.server.metrics import Metrics
from torchrl_chat.openenv.server.security import Buckets, Guard, address_of
from torchrl_chat.openenv.server.sessions import Session, Sessions

log = logging.getLogger("torchrl_chat.openenv")
_STATUS = {
    ErrorCode.INVALID_JSON: 422,
    ErrorCode.VALIDATION_ERROR: 422,
    ErrorCode.EXECUTION_ERROR: 400,
    ErrorCode.RATE_LIMITED: 429,
    ErrorCode.CAPACITY_REACHED: 503,
    ErrorCode.FACTORY_ERROR: 500,
    ErrorCode.SESSION_ERROR: 404,
    ErrorCode.UNAUTHORIZED: 401,
}
_OPEN = frozenset({"/health"})  # what load balancers ask without a token


class _Refused(Exception):
    def __init__(self, status: int, detail: str):
        super().__init__(detail)
        self.status = status


class Routes:
    """The routes of a server.

    Args:
        sessions: its sessions.
        catalog: what it knows of its environment.
        guard: who may pass.
        metrics: its counters.
        limits: see :class:`ServerLimits`.
    """

    def __init__(self, sessions: Sessions, catalog: Catalog, guard: Guard, metrics: Metrics, limits: ServerLimits):
        self._sessions = sessions
        self._catalog = catalog
        self._guard = guard
        self._metrics = metrics
        self._limits = limits
        self._buckets = Buckets(limits.requests_per_second)

    def all(self) -> list[Route]:
        """Every route, ready for Starlette."""
        get, post = ["GET"], ["POST"]
        table: list[tuple[str, Callable[[Request], Awaitable[Response]], list[str]]] = [
            ("/reset", self.reset, post),
            ("/step", self.step, post),
            ("/close", self.close, post),
            ("/state", self.state, get),
            ("/metadata", self.metadata, get),
            ("/schema", self.schema, get),
            ("/health", self.health, get),
            ("/metrics", self.metrics, get),
            ("/mcp", self.mcp, post),
            ("/openapi.json", self.openapi, get),
            ("/docs", self.docs, get),
            ("/redoc", self.docs, get),
            ("/list_environments", self.environments, get),
            ("/{env_name}/splits", self.splits, get),
            ("/{env_name}/tasks", self.tasks, post),
            ("/{env_name}/num_tasks", self.num_tasks, post),
            ("/{env_name}/task", self.task, post),
            ("/{env_name}/task_range", self.task_range, post),
        ]
        return [Route(path, self._guarded(path, handler), methods=methods) for path, handler, methods in table]

    # ------------------------------------------------------------------ reset, step, state
    async def reset(self, request: Request) -> Response:
        """``POST /reset``: of a new environment, or of the session that ``session_id`` names."""
        body = await self._body(request)
        keep = body.pop("keep", False)
        if not isinstance(keep, bool):
            raise ProtocolError(ErrorCode.VALIDATION_ERROR, f"'keep' is {short(keep)}: expected true or false.")
        wanted = body.pop("session_id", None)
        if not keep or wanted is not None:
            return await self._with_session(request, wanted, lambda session: session.reset(body))
        session = await self._sessions.open(address_of(request), resumable=True)
        try:
            return _json(await session.reset(body))
        except BaseException:
            await self._sessions.close(session, "failed")
            raise

    async def step(self, request: Request) -> Response:
        """``POST /step``: in a new environment, or in the session that ``session_id`` names."""
        body = await self._body(request)
        try:
            wanted = StepRequest.model_validate(body)
        except ValidationError as error:
            raise invalid(error, "step") from None
        return await self._with_session(
            request, body.get("session_id"), lambda session: session.step(wanted.action, wanted.timeout_s)
        )

    async def state(self, request: Request) -> Response:
        """``GET /state``: of a new environment, or of the session that ``session_id`` names."""
        wanted = request.query_params.get("session_id")
        if wanted is None:
            return _json(b'{"episode_id":null,"step_count":0}')
        return _json(await self._sessions.find(wanted).state())

    async def close(self, request: Request) -> Response:
        """``POST /close``: end the session that ``session_id`` names."""
        body = await self._body(request)
        await self._sessions.close(self._sessions.find(body.get("session_id")), "closed")
        return _json(b'{"closed":true}')

    async def _with_session(
        self, request: Request, wanted: Any, use: Callable[[Session], Awaitable[bytes]]
    ) -> Response:
        if wanted is not None:
            return _json(await use(self._sessions.find(wanted)))
        session = await self._sessions.open(address_of(request), listed=False)
        try:
            return _json(await use(session))
        finally:
            await session.end()

    # ------------------------------------------------------------------ about the server
    async def metadata(self, request: Request) -> Response:
        """``GET /metadata``."""
        return _json(dumps(await self._sessions.call(self._catalog.metadata)))

    async def schema(self, request: Request) -> Response:
        """``GET /schema``."""
        return _json(dumps(self._catalog.schema()))

    async def health(self, request: Request) -> Response:
        """``GET /health``."""
        return _json(b'{"status":"draining"}' if self._sessions.draining else b'{"status":"healthy"}')

    async def metrics(self, request: Request) -> Response:
        """``GET /metrics``."""
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def mcp(self, request: Request) -> Response:
        """``POST /mcp``."""
        try:
            value = loads(await self._raw(request), self._limits)
        except ProtocolError as error:
            return _json(mcp.unreadable(error.message))
        return _json(await mcp.answer(value, self._sessions, address_of(request)))

    async def openapi(self, request: Request) -> Response:
        """``GET /openapi.json``."""
        return _json(dumps(self._catalog.openapi()))

    async def docs(self, request: Request) -> Response:
        """``GET /docs``."""
        return HTMLResponse(page(self._catalog.openapi()))

    # ------------------------------------------------------------------ the Task API
    async def environments(self, request: Request) -> Response:
        """``GET /list_environments``."""
        return _json(dumps([self._catalog.name]))

    async def splits(self, request: Request) -> Response:
        """``GET /{env_name}/splits``."""
        return _json(dumps([_split(split) for split in await self._ask(request, "list_splits")]))

    async def tasks(self, request: Request) -> Response:
        """``POST /{env_name}/tasks``."""
        wanted = await self._wanted(request)
        tasks = await self._ask(request, "list_tasks", wanted.split)
        return _json(dumps({"tasks": tasks, "env_name": self._catalog.name}))

    async def num_tasks(self, request: Request) -> Response:
        """``POST /{env_name}/num_tasks``."""
        wanted = await self._wanted(request)
        return _json(dumps({"num_tasks": await self._ask(request, "num_tasks", wanted.split)}))

    async def task(self, request: Request) -> Response:
        """``POST /{env_name}/task``."""
        wanted = await self._wanted(request)
        if wanted.index is None:
            raise _Refused(422, "'index' is required.")
        return _json(dumps({"task": await self._ask(request, "get_task", wanted.split, wanted.index)}))

    async def task_range(self, request: Request) -> Response:
        """``POST /{env_name}/task_range``."""
        wanted = await self._wanted(request)
        found = await self._ask(request, "get_task_range", wanted.split, wanted.start, wanted.stop)
        return _json(dumps({"tasks": found}))

    async def _wanted(self, request: Request) -> TaskRequest:
        self._named(request)
        try:
            return TaskRequest.model_validate(await self._body(request))
        except ValidationError as error:
            raise invalid(error, "task request") from None

    def _named(self, request: Request) -> None:
        if request.path_params["env_name"] != self._catalog.name:
            raise _Refused(404, f"there is no environment of that name: this server has {self._catalog.name!r}.")

    async def _ask(self, request: Request, method: str, *arguments: Any) -> Any:
        self._named(request)
        try:
            return await self._sessions.call(self._catalog.ask, method, *arguments)
        except NotImplementedError:
            raise _Refused(501, f"{method} is not supported for this environment") from None
        except IndexError as error:
            raise _Refused(400, f"Invalid task index: {error}") from None
        except (KeyError, ValueError) as error:
            raise _Refused(400, str(error.args[0]) if error.args else str(error)) from None

    # ------------------------------------------------------------------ one request
    def _guarded(self, path: str, handler: Callable[[Request], Awaitable[Response]]) -> Any:
        async def guarded(request: Request) -> Response:
            refusal = None if path in _OPEN else self._guard.refusal(request)
            if refusal is None and not self._buckets.takes(address_of(request)):
                refusal = 429, "too many requests a second."
            if refusal is not None:
                self._metrics.count("refused_total", f'reason="{refusal[0]}"')
                return _failure(refusal[0], refusal[1])
            self._metrics.count("requests_total", f'kind="{path}"')
            try:
                return await handler(request)
            except _Refused as error:
                return _failure(error.status, str(error))
            except ProtocolError as error:
                self._metrics.count("errors_total", f'code="{error.code}"')
                detail = error.details.get("errors") or error.message
                return _failure(_STATUS.get(error.code, 400), detail, code=str(error.code), message=error.message)
            except ClientDisconnect:
                return _failure(400, "the client has left.")
            except Exception as error:  # a defect of ours
                log.error("internal error", extra={"path": path, "error": repr(error)[:2000]})
                self._metrics.count("errors_total", 'code="INTERNAL"')
                return _failure(500, "internal error")

        return guarded

    async def _raw(self, request: Request) -> bytes:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self._limits.max_message_bytes:
                raise _Refused(413, f"the body has more than {self._limits.max_message_bytes} bytes.")
        if body and not _says_json(request):
            # A web page may send texts and forms to any server without being asked; JSON it may not (Fetch, section 4.8).
            raise _Refused(
                415, "the body's type is not application/json: send the header 'Content-Type: application/json'."
            )
        return bytes(body)

    async def _body(self, request: Request) -> dict[str, Any]:
        raw = await self._raw(request)
        if not raw.strip() and request.url.path == "/reset":
            return {}
        value = loads(raw, self._limits)
        if not isinstance(value, dict):
            raise ProtocolError(ErrorCode.VALIDATION_ERROR, "the body is not a JSON object.")
        return value


def _says_json(request: Request) -> bool:
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return media == "application/json" or (media.startswith("application/") and media.endswith("+json"))


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")


def _failure(status: int, detail: Any, **more: Any) -> Response:
    headers = {"www-authenticate": "Bearer"} if status == 401 else None
    return JSONResponse({"detail": detail, **more}, status_code=status, headers=headers)


def _split(split: Any) -> Any:
    if isinstance(split, dict):
        return split
    name = str(split)
    return {"name": name, "type": name if name in ("train", "validation", "test") else "validation"}
