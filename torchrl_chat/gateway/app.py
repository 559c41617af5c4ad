"""The gateway as an ASGI application: addresses, keys and bodies; how answers reach whoever waits is in :mod:`~torchrl_chat.gateway.delivering`.

    POST /s/NAME/v1/chat/completions     an agent's request; /v1/chat/completions where its key names the session
    GET  /s/NAME/v1/models               the model
    POST /sessions                       a driver makes a session: {"name", "row", "group", "seed"}, all of them optional
    GET  /sessions, GET /s/NAME/         what there is to know, without any of its words
    POST /s/NAME/finish                  a driver ends it: {"reward", "success", "parts", "failure"}
    GET  /metrics                        what a driver's Prometheus reads
    GET  /health

Each dialect has its own path. Agents show their session's key; drivers the gateway's token.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import re
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from torchrl_chat import telemetry
from torchrl_chat.access import Guard, OwnNames
from torchrl_chat.gateway.bodies import Bodies
from torchrl_chat.gateway.calls import Dialect, Kind, Refusal, dumps, loads
from torchrl_chat.gateway.counting import LEFT, Counting
from torchrl_chat.gateway.delivering import Gone, Stream, left, whole
from torchrl_chat.gateway.dialects import DIALECTS
from torchrl_chat.gateway.sessions import Session
from torchrl_chat.gateway.table import Table, report
from torchrl_chat.openenv.server.connections import FLUSH, LOST
from torchrl_chat.openenv.server.metrics import PROMETHEUS

_log = logging.getLogger("torchrl_chat.gateway")
_KEEP_AFTER = 0.005  # seconds after which a body is remembered, if its answer has not gone out before: by then most requests are the engine's
_SESSION = re.compile(r"^/s/([^/]+)(/.*)$")
Finisher = Callable[[Session, Mapping[str, Any]], Awaitable[None]]


class Request:
    """A request of a client, and no more of it than is asked for: starlette's own costs more than all of a call's matching.

    Attributes:
        method: its method.
        path: its path, decoded.
        headers: its headers, names in lower case.
        receive: what comes further of it.
        scope: all that the server knows of it.
    """

    __slots__ = ("headers", "method", "path", "receive", "scope")

    def __init__(self, scope: Scope, receive: Receive):
        self.scope, self.receive = scope, receive
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers = Headers(scope["headers"])


class Headers(Mapping[str, str]):
    """The headers of a request, decoded one by one; of several of one name, the first."""

    __slots__ = ("_raw",)

    def __init__(self, raw: Sequence[tuple[bytes, bytes]]):
        self._raw = dict(reversed(raw))

    def __getitem__(self, name: str) -> str:
        return self._raw[name.encode()].decode("latin-1")

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a header."""
        value = self._raw.get(name.encode())
        return default if value is None else value.decode("latin-1")

    def __iter__(self) -> Iterator[str]:
        return (name.decode("latin-1") for name in self._raw)

    def __len__(self) -> int:
        return len(self._raw)


class Front:
    """Answers one request after the other, whatever its dialect.

    Args:
        table: the sessions.
        dialects: what is spoken.
        model: the model's name, for ``/v1/models``.
        finisher: ends a session as a driver's body says; ``None``: with the reward that stands in it.
    """

    def __init__(self, table: Table, dialects: Sequence[Dialect], model: str, finisher: Finisher | None = None):
        self.table, self.model = table, model
        self._finisher = finisher
        self._guard = Guard()
        self._asked = {dialect.path: dialect for dialect in dialects}
        self._counted = {dialect.count_path: dialect for dialect in dialects if dialect.count_path}
        self._first = dialects[0]
        self._counting = Counting(table)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI endpoint of every address."""
        request = Request(scope, receive)
        path = request.path
        dialect, spoken, begun = self._first, None, time.perf_counter()
        try:
            if "origin" in request.headers:
                refused = self._guard.refusal(HTTPConnection(scope))
                if refused is not None:
                    raise Refusal(refused[1], Kind.UNAUTHORIZED)
            found = _SESSION.match(path)
            name, inner = (found[1], found[2]) if found else (None, path)
            inner = inner.removeprefix("/v1") if inner.startswith("/v1/") else inner
            if (spoken := self._asked.get(inner) or self._counted.get(inner)) is not None:
                dialect = spoken
                self._method(request, "POST")
                await self._agent(request, send, dialect, name, inner in self._counted)
                self._counting.call(spoken.name, 200, begun)
                return
            if inner == "/metrics" and name is None:
                self.table.check_driver(_key(request))
                await _send(send, 200, self._counting.text().encode(), kind=PROMETHEUS.encode())
                return
            body = await self._driver(request, name, inner)
            await _send(send, 200, body)
        except Refusal as refusal:
            await self._refuse(send, dialect, refusal)
            if spoken is not None:
                self._counting.call(spoken.name, refusal.status, begun)
        except Gone:
            if spoken is not None:
                self._counting.call(spoken.name, LEFT, begun)
            return
        except asyncio.CancelledError:
            raise
        except Exception as error:  # a fault of ours is one request's, and its client is told so
            _log.error("a request failed", extra={"failure": type(error).__name__}, exc_info=_log.isEnabledFor(10))
            ours = Refusal("the gateway failed; its log names the error.", Kind.ENGINE)
            await self._refuse(send, dialect, ours)
            if spoken is not None:
                self._counting.call(spoken.name, ours.status, begun)

    @staticmethod
    def _method(request: Request, *methods: str) -> None:
        if request.method not in methods:
            raise Refusal(f"this address takes {' and '.join(methods)}, not {request.method[:16]}.", Kind.METHOD)

    async def _refuse(self, send: Send, dialect: Dialect, refusal: Refusal) -> None:
        headers = {}
        if refusal.kind in (Kind.BUDGET, Kind.CONFLICT):
            headers["x-should-retry"] = "false"  # the SDKs of OpenAI and Anthropic try a conflict again otherwise
        if refusal.kind is Kind.BUSY:
            headers["retry-after"] = "1"
        await _send(send, refusal.status, dialect.refusal(refusal), headers)

    # ------------------------------------------------------------------ agents
    async def _agent(self, request: Request, send: Send, dialect: Dialect, name: str | None, counts: bool) -> None:
        raw = await self._raw(request)
        key = _key(request)
        known = self.table.known(name, key)
        bodies = Bodies() if known is None else known.bodies
        body = bodies.read(raw, dialect.path, getattr(dialect, "history", None), self.table.limits.max_depth)
        if not isinstance(body.value, dict):
            raise Refusal("the body is no JSON object.")
        call = dialect.parse(body.value, request.headers)
        session = known or self.table.find(name, key)  # what cannot be read makes none
        if not call.model:
            call = dataclasses.replace(call, model=self.model)
        if counts:
            session.keep(body, call.messages)
            await _send(send, 200, dialect.count(await session.count(call)))
            return
        with telemetry.behind(request.headers):  # the turn is a part of its agent's trace
            exchange = session.open(call, digest=body.digest)
        keeping = _Later(_KEEP_AFTER, functools.partial(session.keep, body, call.messages))
        exchange.waiting += 1
        extensions: Mapping[str, Any] = request.scope.get("extensions", {})
        lost = extensions.get(LOST)
        gone = asyncio.ensure_future(left(request.receive)) if lost is None else lost
        try:
            if call.stream:
                await Stream(exchange, dialect.events(call), call.model, gone).tell(send, extensions.get(FLUSH))
            else:
                reply = await whole(exchange, gone)
                await _send(send, 200, dialect.write(call, reply))
                exchange.deliver()
        finally:
            if lost is None:
                gone.cancel()
            session.left(exchange)
            if exchange.seconds:
                self._counting.sampled(exchange.seconds)
                exchange.seconds = 0.0  # whoever tries again waits no second time
            keeping.now()

    # ------------------------------------------------------------------ drivers, and everybody
    async def _driver(self, request: Request, name: str | None, inner: str) -> Any:
        if inner == "/health" and name is None:
            return {"status": "closing" if self.table.closing else "healthy", "sessions": len(self.table.open)}
        if inner == "/models" or inner.startswith("/models/"):
            self._method(request, "GET")
            if not _is_driver(self.table, request):
                self.table.known(name, _key(request))
            model = {"id": self.model, "object": "model", "created": 0, "owned_by": "torchrl_chat"}
            return model if inner.startswith("/models/") else {"object": "list", "data": [model]}
        if inner == "/sessions" and name is None:
            self._method(request, "GET", "POST")
            self.table.check_driver(_key(request))
            if request.method == "GET":
                return {"sessions": [report(session) for session in self.table.open.values()]}
            url = str(HTTPConnection(request.scope).base_url).rstrip("/")
            return self._created(await self._object(request), url)
        if name is not None and inner == "/finish":
            self._method(request, "POST")
            session = self.table.driven(name, _key(request))
            body = await self._object(request)
            await self._finish(session, body)
            return report(session)
        if name is not None and inner in ("", "/"):
            self._method(request, "GET")
            return report(self.table.driven(name, _key(request)))
        spoken = ", ".join(f"/v1{path}" for path in [*self._asked, *self._counted])
        raise Refusal(f"there is nothing at this address; agents ask at {spoken}.", Kind.MISSING)

    def _created(self, body: Mapping[str, Any], url: str) -> dict[str, Any]:
        if unknown := sorted(set(body) - {"name", "row", "group", "seed"}):
            raise Refusal(
                f"a session has 'name', 'row', 'group' and 'seed', not {unknown[0][:40]!r}.", param=unknown[0]
            )
        kinds: dict[str, Any] = {"name": str, "row": dict, "seed": int}
        for key, kind in kinds.items():
            if body.get(key) is not None and not isinstance(body[key], kind):
                raise Refusal(f"{key!r} is no {kind.__name__}.", param=key)
        if not -(2**63) <= (body.get("seed") or 0) < 2**63:
            raise Refusal("'seed' is beyond 64 bits.", param="seed")
        session = self.table.create(
            body.get("name"), row=body.get("row"), group=body.get("group"), seed=body.get("seed")
        )
        return {"name": session.name, "base_url": f"{url}/s/{session.name}/v1", "api_key": session.key}

    async def _finish(self, session: Session, body: Mapping[str, Any]) -> None:
        if unknown := sorted(set(body) - {"reward", "success", "parts", "failure"}):
            raise Refusal(
                f"a session ends with 'reward', 'success', 'parts' and 'failure', not {unknown[0][:40]!r}.",
                param=unknown[0],
            )
        try:
            if self._finisher is not None:
                await self._finisher(session, body)
            else:
                self.table.finish(session, **body)
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            words = error.args[0] if isinstance(error, KeyError) and error.args else error  # its text has quotes
            raise Refusal(f"the session cannot end like this: {words}") from None

    # ------------------------------------------------------------------ bodies
    async def _raw(self, request: Request) -> bytes:
        most = self.table.limits.max_message_bytes
        chunks: list[bytes] = []
        count, more = 0, True
        while more:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise Gone
            chunks.append(message.get("body", b""))
            count, more = count + len(chunks[-1]), message.get("more_body", False)
            if count > most:
                raise Refusal(f"the body has more than {most} bytes.", Kind.TOO_LARGE)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    async def _object(self, request: Request) -> Mapping[str, Any]:
        raw = await self._raw(request)
        body = loads(raw, self.table.limits.max_depth) if raw.strip() else {}
        if not isinstance(body, dict):
            raise Refusal("the body is no JSON object.")
        return body


class _Later:
    """Does something once: after some seconds, or when it is told to."""

    __slots__ = ("_function", "_timer")

    def __init__(self, seconds: float, function: Callable[[], None]):
        self._function: Callable[[], None] | None = function
        self._timer = asyncio.get_running_loop().call_later(seconds, self.now)

    def now(self) -> None:
        """Do it, if it is not done yet."""
        self._timer.cancel()
        function, self._function = self._function, None
        if function is not None:
            function()


def _key(request: Request) -> str:
    headers = request.headers
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and value.strip():
        return value.strip()
    return headers.get("x-api-key") or headers.get("api-key") or ""


def _is_driver(table: Table, request: Request) -> bool:
    try:
        table.check_driver(_key(request))
    except Refusal:
        return False
    return True


async def _send(
    send: Send,
    status: int,
    body: Any,
    headers: Mapping[str, str] | None = None,
    kind: bytes = b"application/json",
) -> None:
    raw = body if isinstance(body, bytes) else dumps(body)
    told = [(b"content-type", kind), (b"content-length", str(len(raw)).encode())]
    told += [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    await send({"type": "http.response.start", "status": status, "headers": told})
    await send({"type": "http.response.body", "body": raw})


def create_app(
    table: Table,
    *,
    dialects: Sequence[Dialect] = DIALECTS,
    model: str = "policy",
    loopback: bool = True,
    finisher: Finisher | None = None,
) -> ASGIApp:
    """The application.

    Args:
        table: the sessions.
        dialects: what is spoken.
        model: the model's name.
        loopback: refuse requests under a name that is not this machine's.
        finisher: see :class:`Front`.
    """
    front = Front(table, dialects, model, finisher)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(table, receive, send)
        else:
            await front(scope, receive, send)

    return OwnNames(app) if loopback else app


async def _lifespan(table: Table, receive: Receive, send: Send) -> None:
    """What a server says of its beginning and its end, as ASGI has it."""
    await receive()
    reaper = asyncio.ensure_future(table.reap())
    try:
        await send({"type": "lifespan.startup.complete"})
        await receive()
    finally:
        reaper.cancel()
        table.shut()
    await send({"type": "lifespan.shutdown.complete"})
