"""The server: an environment behind OpenEnv's HTTP and WebSocket protocol.

    app = create_app(lambda: ChatEnvironment(template), ChatAction, ChatObservation)
    run(app, host="127.0.0.1", port=8000)

Hundreds of sessions share one process and one tokenizer. Heavy work (rubrics, tools, datasets) runs in threads beside
the event loop. The extra ``serve`` has what is needed: ``pip install 'torchrl_chat[serve]'``.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import gc
import inspect
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from typing import Any

from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import BaseRoute, WebSocketRoute

from torchrl_chat.access import Guard, OwnNames
from torchrl_chat.openenv.models import ChatAction, ChatObservation, ChatState
from torchrl_chat.openenv.protocol import ServerLimits
from torchrl_chat.openenv.server.catalog import Catalog
from torchrl_chat.openenv.server.http import Routes
from torchrl_chat.openenv.server.sessions import SessionTable
from torchrl_chat.openenv.server.sockets import Endpoint


def create_app(
    env: Callable[[], Any],
    action_cls: type[BaseModel] = ChatAction,
    observation_cls: type[BaseModel] = ChatObservation,
    env_name: str = "chat_env",
    *,
    state_cls: type[BaseModel] = ChatState,
    max_concurrent_envs: int | None = None,
    limits: ServerLimits | None = None,
    token: str | None = None,
    allowed_origins: Collection[str] = (),
    loopback: bool = False,
    workers: int = 4,
    extra_routes: Sequence[BaseRoute] = (),
) -> Starlette:
    """An ASGI application that serves an environment as OpenEnv servers do.

    Args:
        env: makes the environment of a session: a class or a function without arguments. Whatever is heavy (a
            tokenizer, a :class:`~torchrl_chat.ChatTemplate`, a dataset) is made outside and shared.
        action_cls, observation_cls, state_cls: the models of what crosses the wire.
        env_name: the environment's name in the Task API.
        max_concurrent_envs: OpenEnv's name for ``limits.max_sessions``; wins over it.
        limits: see :class:`ServerLimits`.
        token: the bearer token that every request must carry (but ``/health``); ``None`` for none.
        allowed_origins: origins of web pages that may talk to the server, besides its own; ``"*"`` for any.
        loopback: refuse requests under a name that is not this machine's, see :class:`OwnNames`.
        workers: threads for heavy work.
        extra_routes: further routes, looked at first; they guard themselves.

    Raises:
        ValueError: the environment does not support several sessions, and more than one is allowed.

    Example:
        >>> from torchrl_chat import ChatTemplate
        >>> from torchrl_chat.openenv import ChatEnvironment
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> template = ChatTemplate(tokenizer)
        >>> app = create_app(lambda: ChatEnvironment(template, system_prompt="Be brief."))
    """
    limits = limits or ServerLimits()
    if max_concurrent_envs is not None:
        limits = dataclasses.replace(limits, max_sessions=max_concurrent_envs)
    made = env.func if isinstance(env, functools.partial) else env
    if (
        inspect.isclass(made)
        and not getattr(made, "SUPPORTS_CONCURRENT_SESSIONS", True)
        and limits.max_sessions > 1
    ):
        raise ValueError(
            f"{made.__name__} does not say SUPPORTS_CONCURRENT_SESSIONS = True: serve it with max_concurrent_envs=1."
        )
    sessions = SessionTable(env, action_cls, limits, workers)
    models = {"action": action_cls, "observation": observation_cls, "state": state_cls}
    catalog = Catalog(env, models, env_name)
    guard = Guard(token, allowed_origins)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        reaper = asyncio.ensure_future(sessions.reap())
        try:
            yield
        finally:
            reaper.cancel()
            await sessions.drain(5.0)
            catalog.close()

    app = Starlette(
        routes=[
            *extra_routes,
            WebSocketRoute("/ws", Endpoint(sessions, guard)),
            *Routes(sessions, catalog, guard).all(),
        ],
        lifespan=lifespan,
    )
    if loopback:
        app.add_middleware(OwnNames)
    if allowed_origins:
        # A browser asks first, without token or cookie, whether a page may send JSON, and reads the answer only then.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=[origin.rstrip("/") for origin in allowed_origins],
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
        )
    app.state.sessions, app.state.metrics, app.state.limits = sessions, sessions.metrics, limits
    app.state.env_name, app.state.guard = env_name, guard
    return app


def run(
    app: Starlette,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    grace_seconds: float = 30.0,
    ping_seconds: float | None = 20.0,
    started: Callable[[str, int], None] | None = None,
) -> None:
    """Serve an application of :func:`create_app` until SIGTERM or Ctrl-C.

    On either, new sessions are refused, steps that are under way are finished and answered, and every socket is closed
    with code 1001.

    Args:
        app: the application.
        host, port: where it listens; port 0 takes a free one.
        grace_seconds: how long steps may take to finish.
        ping_seconds: a socket whose client does not answer a ping within so long is closed; a client that computes in its
            event loop for longer (``generate``) needs more. ``None`` for no pings.
        started: called with host and port once the server listens.
    """
    server = make_server(app, host=host, port=port, grace_seconds=grace_seconds, ping_seconds=ping_seconds)
    server.on_start = started
    gc.collect()
    gc.freeze()  # torch's and transformers' objects stay: no collection has to look at them again
    server.run()


def make_server(
    app: Starlette,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    grace_seconds: float = 30.0,
    ping_seconds: float | None = 20.0,
) -> Any:
    """The uvicorn server of :func:`run`, not yet running."""
    import uvicorn

    from torchrl_chat.openenv.server.connections import timed_protocol

    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        lifespan="on",
        http=timed_protocol(app.state.limits.request_seconds),
        ws="websockets-sansio",
        ws_max_size=app.state.limits.max_message_bytes,
        ws_per_message_deflate=False,  # it costs a server two to three times its throughput
        ws_ping_interval=ping_seconds,
        ws_ping_timeout=ping_seconds,
        timeout_graceful_shutdown=int(grace_seconds) + 5,
    )

    class Server(uvicorn.Server):
        on_start: Callable[[str, int], None] | None = None

        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            if self.on_start is not None and self.started:
                place = self.servers[0].sockets[0].getsockname()
                self.on_start(place[0], place[1])

        async def shutdown(self, sockets: Any = None) -> None:
            # Before uvicorn cuts the sockets: what is under way is finished.
            await app.state.sessions.drain(grace_seconds)
            await super().shutdown(sockets)

    return Server(config)
