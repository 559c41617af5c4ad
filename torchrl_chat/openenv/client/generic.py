"""Clients of OpenEnv servers: ``GenericClient`` for any of them, ``ChatClient`` for the chat environment.

Connections live on an event loop in a thread of their own, one for all clients of the process. However long the caller
computes between two calls (a ``generate`` of minutes), pings are answered, and the session stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from torchrl_chat._loop import LoopThread, shared_loop
from torchrl_chat.endpoint import shown_url
from torchrl_chat.openenv.client.channel import Channel
from torchrl_chat.openenv.client.docker import Container
from torchrl_chat.openenv.client.errors import OpenEnvError, SessionLost
from torchrl_chat.openenv.client.link import Link, need_websockets

_DEFAULT: Any = object()


@dataclass(frozen=True)
class StepResult:
    """What a reset or a step returned.

    Attributes:
        observation: a dict, or what the client makes of it.
        reward: a number, or ``None`` where the server gives none.
        done: whether the episode is over.
    """

    observation: Any
    reward: float | None = None
    done: bool = False


class GenericClient:
    """One session with any OpenEnv server; actions, observations and states are dicts.

    Used with ``with``, calls return results; used with ``async with``, they return awaitables. Used with neither, they do
    what suits the caller: awaitables where an event loop runs, results elsewhere. A client may be used from any thread.

    A call that times out leaves the session in order: its late reply is recognised and dropped (the server may still have
    acted on it). When the session is lost, every call says so with :class:`SessionLost`; only :meth:`reset` opens a new
    one, since only then nothing of the old conversation is expected to be there.

    Args:
        base_url: of the server, ``http(s)://`` or ``ws(s)://``, with any path in front of ``/ws``.
        headers: HTTP headers of the connection.
        token: a bearer token: ``Authorization: Bearer TOKEN``.
        connect_timeout_s: seconds for connecting; a server that does not listen yet is tried again within it.
        message_timeout_s: seconds for one reply; ``None`` for no limit.
        max_message_size_mb: the longest message that is accepted, in MiB; ``None`` for no limit.
        websocket_ping_interval_s, websocket_ping_timeout_s: seconds between pings, and until a server that does not answer
            them counts as lost; ``None`` for no pings, and no limit.
        delta: take observations that carry only what is new, from servers that have them (this package's); the
            observation that is returned is whole all the same.
        resume: ask for a session that outlives its connection, from servers that have them (this package's). After a lost
            connection a step is sent again only if the server has not done it; :class:`ReplyLost` says that it has.
        compress: offer ``permessage-deflate`` (off, because it costs more time than it saves but on slow networks).
        websocket_options: further arguments for ``websockets.connect``, such as ``ssl`` or ``proxy``.

    Raises:
        ImportError: the package ``websockets`` is not installed.
        ValueError: ``base_url`` is no URL of a server.

    Example:
        >>> with GenericClient(url) as client:  # "http://localhost:8000", say
        ...     result = client.reset(seed=1)
        ...     result = client.step({"text": "Hi"})
        ...     print(result.observation["messages"], result.done)
        [{'role': 'assistant', 'content': 'Hi'}] False
    """

    _awaits: bool | None = None  # whether calls return awaitables; None while nobody has said so
    _container: Container | None = None
    _leaving: weakref.finalize[Any, Any] | None = None

    def __init__(
        self,
        base_url: str,
        *,
        headers: Mapping[str, str] | None = None,
        token: str | None = None,
        connect_timeout_s: float = 10.0,
        message_timeout_s: float | None = 60.0,
        max_message_size_mb: float | None = None,
        websocket_ping_interval_s: float | None = 20.0,
        websocket_ping_timeout_s: float | None = 120.0,
        delta: bool = False,
        resume: bool = False,
        compress: bool = False,
        websocket_options: Mapping[str, Any] | None = None,
    ):
        need_websockets()
        self.link = Link(
            url=base_url,
            headers={**(headers or {}), **({"Authorization": f"Bearer {token}"} if token else {})},
            connect_timeout=connect_timeout_s,
            timeout=message_timeout_s,
            max_bytes=None if max_message_size_mb is None else int(max_message_size_mb * 2**20),
            ping_interval=websocket_ping_interval_s,
            ping_timeout=websocket_ping_timeout_s,
            delta=delta,
            resume=resume,
            compress=compress,
            options=dict(websocket_options or {}),
        )
        self._beginning = threading.Lock()  # two threads may make the first call
        self._let_go()

    def _let_go(self) -> None:
        """Have no session, and no thread."""
        if self._leaving is not None:
            self._leaving.detach()
        self._leaving = None
        self._loop: LoopThread | None = None
        self._channel = Channel(self.link)

    @classmethod
    def from_docker_image(
        cls,
        image: str,
        *,
        env_vars: Mapping[str, str] | None = None,
        docker_options: Sequence[str] = (),
        start_timeout_s: float = 30.0,
        **options: Any,
    ) -> Self:
        """A client of a server in a container of its own, which is removed when the client is closed.

        The image's server listens on port 8000, as all of OpenEnv's do. Blocks until it is healthy.

        Args:
            image: the name of the image.
            env_vars: environment variables of the container.
            docker_options: further arguments for ``docker run``.
            start_timeout_s: seconds until the server has to be healthy.
            options: as for the class.

        Raises:
            ConnectFailed: the container cannot be started, or its server does not get healthy.
        """
        container = Container(image, env=env_vars, options=docker_options, start_timeout=start_timeout_s)
        try:
            client = cls(container.url, **options)
        except BaseException:
            container.remove()
            raise
        client._container = container
        return client

    # ------------------------------------------------------------------ what subclasses say about their environment
    def _step_payload(self, action: Any) -> dict[str, Any]:
        """An action as the fields of a step request."""
        if hasattr(action, "model_dump"):
            return action.model_dump(mode="json")
        if not isinstance(action, Mapping):
            raise TypeError(f"an action is a {type(action).__name__}: expected a dict (or a pydantic model).")
        return dict(action)

    def _parse_result(self, payload: dict[str, Any]) -> StepResult:
        """The reply to a reset or a step."""
        return StepResult(payload.get("observation") or {}, payload.get("reward"), bool(payload.get("done")))

    def _parse_state(self, payload: dict[str, Any]) -> Any:
        """The reply to a state request."""
        return payload

    # ------------------------------------------------------------------ calls
    def connect(self) -> Any:
        """Open the session now; otherwise the first call does.

        Returns:
            the client itself.

        Raises:
            ConnectFailed: the server cannot be reached within ``connect_timeout_s``.
        """
        return self._call(self._connect)

    def reset(self, *, timeout_s: float | None = _DEFAULT, **kwargs: Any) -> Any:
        """Begin an episode, in a new session if the old one is lost.

        Args:
            timeout_s: seconds for the reply, if not ``message_timeout_s``.
            kwargs: handed to the environment's ``reset`` (``seed``, ``episode_id`` ...); OpenEnv's servers drop what it
                does not take.

        Returns:
            :class:`StepResult`

        Raises:
            ServerError: the environment refuses.
            RequestTimeout: no reply in time.
            SessionLost: the server ended the session, for want of capacity (``code`` ``"CAPACITY_REACHED"``), say.
        """
        return self._call(self._ask, "reset", kwargs, timeout_s, self._parse_result)

    def step(self, action: Any, *, timeout_s: float | None = _DEFAULT) -> Any:
        """Send an action.

        Returns:
            :class:`StepResult`

        Raises:
            ServerError: the environment refuses the action.
            RequestTimeout: no reply in time; the step may still be done, and :meth:`state` tells.
            SessionLost: the session is over.
        """
        return self._call(self._ask, "step", self._step_payload(action), timeout_s, self._parse_result)

    def state(self, *, timeout_s: float | None = _DEFAULT) -> Any:
        """The environment's state. Raises as :meth:`step`."""
        return self._call(self._ask, "state", None, timeout_s, self._parse_state)

    def mcp(
        self, method: str, params: Mapping[str, Any] | None = None, *, timeout_s: float | None = _DEFAULT
    ) -> Any:
        """The ``result`` of a JSON-RPC call of the Model Context Protocol (``"tools/list"``, ``"tools/call"``).

        Raises:
            OpenEnvError: the call failed; ``code`` is the JSON-RPC error code, as a string.
        """

        def read(reply: dict[str, Any]) -> Any:
            if error := reply.get("error"):
                raise OpenEnvError(f"{method} failed: {error.get('message')}", str(error.get("code")))
            return reply.get("result")

        request = {"jsonrpc": "2.0", "id": 1, "method": method, "params": dict(params or {})}
        return self._call(self._ask, "mcp", request, timeout_s, read)

    def close(self) -> Any:
        """End the session, the client's thread, and the container if there is one. A later call starts anew."""
        return self._call(self._close, then=self._wind_up)

    @property
    def lost(self) -> SessionLost | None:
        """Why the session is over, if it is."""
        return self._channel.lost

    # ------------------------------------------------------------------ sync and async
    def __enter__(self) -> Self:
        self._awaits = False
        return self.connect()

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        self._awaits = True
        return await self.connect()

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def sync(self) -> Self:
        """The client itself, whose calls return results from now on, even where an event loop runs."""
        self._awaits = False
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {"link": self.link, "_awaits": self._awaits}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _beginning=threading.Lock())
        self._let_go()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({shown_url(self.link.url)!r})"

    def _call(self, function: Callable[..., Coroutine[Any, Any, Any]], *arguments: Any, then: Any = None) -> Any:
        with self._beginning:
            loop = self._loop
            if loop is None or not loop.alive:  # the first call, or one in a forked child
                self._let_go()
                loop = self._loop = shared_loop("torchrl_chat.openenv")
                self._leaving = weakref.finalize(self, _abandon, loop, self._channel)
                self._leaving.atexit = False
        if self._awaits or (self._awaits is None and _in_a_loop()):
            return _awaited(loop, function, arguments, then)
        result = loop.run(function(*arguments))
        if then is not None:
            then()
        return result

    async def _connect(self) -> Self:
        await self._channel.open()
        return self

    async def _close(self) -> None:
        await self._channel.close()

    async def _ask(self, kind: str, data: Any, timeout: Any, read: Callable[[dict[str, Any]], Any]) -> Any:
        """What a reply says, on the clients' loop."""
        limit = self.link.timeout if timeout is _DEFAULT else timeout
        return read(await self._channel.request(kind, data, limit))

    def _wind_up(self) -> None:
        self._let_go()
        container, self._container = self._container, None
        if container is not None:
            container.remove()


def _in_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _abandon(loop: LoopThread, channel: Channel) -> None:
    """Close the session of a client that was collected."""
    with contextlib.suppress(RuntimeError):
        loop.submit(channel.close())


async def _awaited(
    loop: LoopThread, function: Callable[..., Coroutine[Any, Any, Any]], arguments: tuple[Any, ...], then: Any
) -> Any:
    future = loop.start(function(*arguments))
    del loop  # the thread ends with its last client
    result = await future
    if then is not None:
        await asyncio.to_thread(then)
    return result
