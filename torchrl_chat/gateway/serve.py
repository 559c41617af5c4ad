"""``Gateway``: a policy served to agents, and their episodes, from Python."""

from __future__ import annotations

import asyncio
import atexit
import collections
import dataclasses
import secrets
import socket
import threading
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from tensordict import TensorDict

from torchrl_chat._loop import LoopThread
from torchrl_chat.access import is_loopback
from torchrl_chat.conversation import Limits, StopReason, Transcript
from torchrl_chat.gateway.calls import Dialect
from torchrl_chat.gateway.dialects import DIALECTS
from torchrl_chat.gateway.engines import Engine
from torchrl_chat.gateway.finished import episodes
from torchrl_chat.gateway.policies import engine_of
from torchrl_chat.gateway.rewarding import Rewarder
from torchrl_chat.gateway.sessions import Session
from torchrl_chat.gateway.settings import Settings
from torchrl_chat.gateway.table import Table, report
from torchrl_chat.gateway.templates import Templates
from torchrl_chat.openenv.protocol import ServerLimits
from torchrl_chat.policies.policy import Policy

_KEPT = 10_000  # finished sessions that wait to be taken
_open: weakref.WeakSet[Gateway] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Close those that nobody has closed: ended with their thread, the server would tell of it in a traceback."""
    for gateway in list(_open):
        gateway.close()


class Served:
    """One session, from Python. It is a context manager: an episode that is left unfinished is finished at its end.

    Attributes:
        name: the session's name.
        base_url: what an agent of OpenAI's dialects is given: ``OPENAI_BASE_URL``.
        root_url: the same without ``/v1``, as ``ANTHROPIC_BASE_URL`` is.
        api_key: the key that belongs to it.
    """

    def __init__(self, gateway: Gateway, session: Session):
        self._gateway, self._session = gateway, session
        self.name, self.api_key = session.name, session.key
        self.root_url = f"{gateway.url}/s/{session.name}"
        self.base_url = f"{self.root_url}/v1"

    def __repr__(self) -> str:
        return repr(self._session)

    def __enter__(self) -> Served:
        return self

    def __exit__(self, kind: Any, error: Any, _: Any) -> None:
        self.finish(failure="" if error is None else f"{type(error).__name__}: {error}"[:400])

    @property
    def session(self) -> Session:
        """The session itself; it belongs to the gateway's thread, and is only to be read here."""
        return self._session

    @property
    def report(self) -> dict[str, Any]:
        """What there is to know, without any of its words."""
        return self._gateway.run(lambda: report(self._session))

    def episodes(self) -> TensorDict:
        """The finished episode as a row, batch size (1,): see :func:`~torchrl_chat.gateway.finished.episodes`.

        Raises:
            ValueError: the session is not finished.
        """
        return self._gateway.episodes([self])

    @property
    def transcript(self) -> Transcript | None:
        """The episode as one ledger, its other sequences as branches; ``None`` where nothing was sampled."""
        return self._gateway.run(self._session.transcript)

    def environment(self) -> dict[str, str]:
        """Environment variables for an agent that is a command."""
        return {
            "OPENAI_BASE_URL": self.base_url,
            "OPENAI_API_BASE": self.base_url,
            "OPENAI_API_KEY": self.api_key,
            "ANTHROPIC_BASE_URL": self.root_url,
            "ANTHROPIC_API_KEY": self.api_key,
        }

    def open_door(self, listener: socket.socket) -> Callable[[], None]:
        """Serve this session, and nothing else, at a listening socket: whatever key a client shows there.

        Args:
            listener: it belongs to the door from now on.

        Returns:
            what closes the door, and all connections; the gateway does so too when it closes.

        Raises:
            RuntimeError: the gateway is not running.
        """
        return self._gateway.open_door(self._session, listener)

    def finish(self, reward: float | None = None, **more: Any) -> None:
        """End the episode; a second time changes nothing. Its agent is refused from now on, also while it is graded.

        Args:
            reward: what it is worth; ``None``: what the gateway's ``reward`` says of it, if it has one, and nothing failed.
            more: ``success``, ``parts``, ``failure``, ``stop``, as for
                :meth:`Session.finish <torchrl_chat.gateway.sessions.Session.finish>`.
        """
        ends = {"reward": reward, **more}
        wanted = reward is None and not more.get("failure")
        if self._gateway.rewarder is not None and wanted and not self._session.finished:
            self._gateway.run(self._session.seal)
            [ends] = self._gateway.graded([self._session])
        self._gateway.run(lambda: self._gateway.table.finish(self._session, **{**ends, **more}))


class Gateway:
    """A model served to agents: any agent that can be given a base URL and a key becomes token-exact episodes.

    It serves in a thread of its own, from ``with`` to its end; on this machine only, unless ``host`` says otherwise.

    Args:
        engine: what samples: a policy of this package (:class:`~torchrl_chat.TransformersPolicy` ...), or an
            :class:`~torchrl_chat.gateway.engines.Engine`.
        tokenizer: the model's tokenizer; the policy's own if ``None``.

    Keyword Args:
        settings: what sessions decide, unless one brings its own.
        limits: the same as ``settings.limits``.
        reward: what episodes are worth that are finished without a reward: a verifier, or whatever
            :class:`~torchrl_chat.gateway.rewarding.Rewarder` takes, or one of those.
        reference_key: the column of the row that a verifier compares answers with.
        template: options of :class:`~torchrl_chat.ChatTemplate`: ``{"enable_thinking": False}``.
        model: the name that ``/v1/models`` tells, and that answers have where a request names none.
        dialects: what is spoken.
        host, port: where it listens; port 0 takes a free one.
        token: what drivers show over HTTP; a random one if ``None``.
        implicit: whether a request to a session that is not there makes it, with the key that it shows.
        public: whether it may do so beyond this machine as well, where whoever reaches the port can make sessions then.
        server: limits of the server: sizes, sessions, idle time.
        ended: called with each finished session, in the gateway's thread; they are not kept for :meth:`take` then.

    Raises:
        ValueError: there is no tokenizer, ``token`` is empty, or ``implicit`` without ``public`` beyond this machine.

    Example:
        >>> from openai import OpenAI
        >>> from torchrl_chat import training_view
        >>> from torchrl_chat import TransformersPolicy
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_model, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> policy = TransformersPolicy(tiny_model(len(tokenizer)), tokenizer, max_new_tokens=4)
        >>> with Gateway(policy) as gateway:
        ...     with gateway.session(row={"question": "2 + 2?"}) as session:
        ...         client = OpenAI(base_url=session.base_url, api_key=session.api_key)  # or any agent
        ...         ask = [{"role": "user", "content": "2 + 2?"}]
        ...         reply = client.chat.completions.create(model="policy", messages=ask)
        ...         session.finish(reward=1.0)
        ...     view = training_view(session.episodes())
    """

    def __init__(
        self,
        engine: Engine | Policy,
        tokenizer: Any = None,
        *,
        settings: Settings | None = None,
        limits: Limits | None = None,
        reward: Any = None,
        reference_key: str | list[str] = "answer",
        template: Mapping[str, Any] | None = None,
        model: str = "policy",
        dialects: Sequence[Dialect] = DIALECTS,
        host: str = "127.0.0.1",
        port: int = 0,
        token: str | None = None,
        implicit: bool = False,
        public: bool = False,
        server: ServerLimits | None = None,
        ended: Callable[[Session], None] | None = None,
    ):
        if token is not None and not token.strip():
            raise ValueError("token is empty: give a secret, or None for a random one.")
        if implicit and not public and not is_loopback(host):
            raise ValueError(
                f"implicit sessions on {host}: whoever reaches it could make sessions without a token. Leave host or implicit "
                "out, or say public=True."
            )
        settings = settings or Settings()
        if limits is not None:
            settings = dataclasses.replace(settings, limits=limits)
        if tokenizer is None:
            tokenizer = getattr(engine, "tokenizer", None) or getattr(
                getattr(engine, "policy", None), "tokenizer", None
            )
            if tokenizer is None:
                raise ValueError(f"a {type(engine).__name__} has no tokenizer: give the model's.")
        engine = engine_of(engine)
        self.engine, self.settings, self.model = engine, settings, model
        known = reward is None or isinstance(reward, Rewarder)
        self.rewarder = reward if known else Rewarder(reward, reference_key=reference_key)
        self.templates = Templates(tokenizer, **dict(template or {}))
        self.token = secrets.token_urlsafe(24) if token is None else token
        self.host, self.port = host, port
        self._told = ended
        self._finished: collections.deque[Session] = collections.deque(maxlen=_KEPT)
        self._dialects = dialects
        self._server_limits = server or ServerLimits()
        self.table = Table(
            engine, self.templates, settings, self._server_limits, self.token, implicit=implicit, ended=self._ended
        )
        self._loop: LoopThread | None = None
        self._app: Any = None
        self._protocol: Any = None
        self._doors: set[Any] = set()
        self._server: Any = None
        self._serving: Any = None

    # ------------------------------------------------------------------ the server
    def __enter__(self) -> Gateway:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        """Where it listens; sessions stand below."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    def start(self) -> None:
        """Listen.

        Raises:
            OSError: the port is taken.
        """
        import uvicorn

        from torchrl_chat.gateway.app import create_app

        try:
            from torchrl_chat.openenv.server.quick import quick_protocol as protocol
        except ImportError:  # without httptools
            from torchrl_chat.openenv.server.connections import timed_protocol as protocol

        if self._loop is not None:
            raise RuntimeError("the gateway is running already.")
        self._app = create_app(
            self.table,
            dialects=self._dialects,
            model=self.model,
            loopback=is_loopback(self.host),
            finisher=self._finisher,
        )
        self._protocol = protocol(self._server_limits.request_seconds)
        config = uvicorn.Config(
            self._app,
            host=self.host,
            port=self.port,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="on",
            http=self._protocol,
            ws="none",
            timeout_keep_alive=60,
            timeout_graceful_shutdown=1,
        )
        listening, failed = threading.Event(), []

        class Server(uvicorn.Server):
            async def startup(self, sockets: Any = None) -> None:
                try:
                    await super().startup(sockets)
                except SystemExit:  # how uvicorn says that it cannot listen
                    failed.append(
                        OSError(f"port {config.port} of {config.host} cannot be listened at: it is taken, say.")
                    )
                listening.set()

        self._server = Server(config)
        self._loop = LoopThread("torchrl_chat.gateway", quick=True)
        self._serving = self._loop.submit(self._server.serve())
        listening.wait(30.0)
        if failed or not self._server.started:
            loop, self._loop = self._loop, None
            loop.close()
            raise failed[0] if failed else RuntimeError("the gateway did not start.")
        _open.add(self)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]

    def close(self) -> None:
        """Finish the sessions that are open, and stop listening."""
        loop, self._loop = self._loop, None
        if loop is None:
            return

        async def end() -> None:
            for session in list(self.table.open.values()):
                self.table.finish(session, failure="the gateway was closed", stop=StopReason.ERROR)
            for door in self._doors:
                door.close()
            self._doors.clear()
            self._server.should_exit = True

        loop.run(end())
        try:
            self._serving.result(10.0)
        finally:
            loop.run(self.engine.aclose())
            loop.close()
            if self.rewarder is not None:
                self.rewarder.close()

    def open_door(self, session: Session, listener: socket.socket) -> Callable[[], None]:
        """Serve a session at a socket of its own: see :meth:`Served.open_door`."""
        from torchrl_chat.gateway.doors import Bound, Door

        loop = self._loop
        if loop is None:
            listener.close()
            raise RuntimeError("the gateway is not running.")
        door = Door(Bound(self._app, session, self._dialects), self._protocol)
        loop.run(door.open(listener))
        self._doors.add(door)

        def close() -> None:
            self._doors.discard(door)
            self.run(door.close)

        return close

    def run(self, function: Callable[[], Any]) -> Any:
        """What a function returns, called in the gateway's thread while that runs."""
        if self._loop is None:
            return function()

        async def call() -> Any:
            return function()

        return self._loop.run(call())

    # ------------------------------------------------------------------ sessions
    def session(
        self,
        name: str | None = None,
        *,
        row: Mapping[str, Any] | None = None,
        group: Any = None,
        seed: int | None = None,
        settings: Settings | None = None,
    ) -> Served:
        """A new session.

        Args:
            name: its name; a random one if ``None``.

        Keyword Args:
            row: the dataset row that it plays.
            group: what the episodes of its group share.
            seed: of what is sampled.
            settings: its own settings, instead of the gateway's.

        Raises:
            Refusal: there are too many sessions, or the name is taken.
        """

        def make() -> Session:
            return self.table.create(name, row=row, group=group, seed=seed, settings=settings)

        return Served(self, self.run(make))

    def episodes(self, sessions: Sequence[Served | Session], data_key: str = "query") -> TensorDict:
        """Finished sessions as finished episodes: see :func:`~torchrl_chat.gateway.finished.episodes`.

        Args:
            sessions: the sessions, one a row.
            data_key: the column that holds what an episode was asked.
        """
        plain = [each.session if isinstance(each, Served) else each for each in sessions]
        return self.run(lambda: episodes(plain, data_key))

    def graded(self, sessions: Sequence[Session], groups: Sequence[Hashable] | None = None) -> list[dict[str, Any]]:
        """What each session ends with, as the gateway's ``reward`` says; nothing without one."""
        return [] if self.rewarder is None else self.rewarder.grade(sessions, groups)

    async def _finisher(self, session: Session, body: Mapping[str, Any]) -> None:
        """End a session as a driver's body says; a reward that it leaves out is graded."""
        ends = dict(body)
        wanted = ends.get("reward") is None and not ends.get("failure")
        if self.rewarder is not None and wanted and not session.finished:
            session.seal()
            graded = await asyncio.to_thread(self.graded, [session])
            ends |= graded[0] if graded else {}
        self.table.finish(session, **ends)

    def take(self) -> list[Session]:
        """The sessions that were finished since this was asked last, the latest 10,000 of them.

        Those that :func:`~torchrl_chat.gateway.play_agents` returned as episodes are not kept, nor any where ``ended`` is given.
        """

        def taken() -> list[Session]:
            found = list(self._finished)
            self._finished.clear()
            return found

        return self.run(taken)

    def _ended(self, session: Session) -> None:
        if self._told is not None:
            self._told(session)
        elif not session.held:
            self._finished.append(session)
