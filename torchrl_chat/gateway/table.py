"""The sessions of a gateway: made, found by name or key, and ended; who may see which."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from torchrl_chat.conversation import StopReason
from torchrl_chat.gateway.calls import Kind, Refusal
from torchrl_chat.gateway.engines import Engine
from torchrl_chat.gateway.sessions import Names, Session
from torchrl_chat.gateway.settings import Settings
from torchrl_chat.gateway.templates import Templates
from torchrl_chat.openenv.protocol import ServerLimits

_log = logging.getLogger("torchrl_chat.gateway")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_ENDED = 10_000  # names of finished sessions that are remembered, so that none begins anew by accident
NAMELESS = "default"
"""The implicit session of clients that show neither a name nor a key."""


class Table:
    """The open sessions. It belongs to one event loop.

    Args:
        engine: what samples.
        templates: the model's chat template.
        settings: of sessions that bring none of their own.
        limits: how many sessions there may be, and how long one may be idle.
        token: what lets a driver in: whoever makes sessions, reads reports and says rewards.
        implicit: whether a request to a session that is not there makes it.
        ended: told of each session that is finished.
    """

    def __init__(
        self,
        engine: Engine,
        templates: Templates,
        settings: Settings,
        limits: ServerLimits,
        token: str,
        *,
        implicit: bool = False,
        ended: Callable[[Session], None] = lambda session: None,
    ):
        self.engine, self.templates, self.settings, self.limits = engine, templates, settings, limits
        self.token, self.implicit = token, implicit
        self.open: dict[str, Session] = {}
        self.closing = False
        self.past: Counter[str] = Counter()  # what the sessions that are not open any more had counted
        self.stops: Counter[str] = Counter()  # why sessions were finished
        self._ended = ended
        self._keys: dict[str, Session] = {}
        self._done: OrderedDict[str, None] = OrderedDict()
        self._names = Names()

    # ------------------------------------------------------------------ making
    def create(
        self,
        name: str | None = None,
        *,
        row: Mapping[str, Any] | None = None,
        group: Any = None,
        seed: int | None = None,
        settings: Settings | None = None,
        key: str | None = None,
    ) -> Session:
        """A new session.

        Args:
            name: its name; a random one if ``None``.

        Keyword Args:
            row, group, seed, settings, key: see :class:`~torchrl_chat.gateway.sessions.Session`; the key is random if ``None``.

        Raises:
            Refusal: there are too many sessions, the name is taken, or is none.
            ValueError: the engine does not take its settings.
        """
        if self.closing:
            raise Refusal("the gateway is closing.", Kind.GONE)
        if len(self.open) >= self.limits.max_sessions:
            raise Refusal(
                f"there are {len(self.open)} open sessions, as many as there may be: finish some.", Kind.BUSY
            )
        name = secrets.token_hex(16) if name is None else name
        if not _NAME.fullmatch(name):
            raise Refusal(
                "a session's name has 1 to 128 letters, digits, dots, dashes and underscores.", param="name"
            )
        if name in self.open or name in self._done:
            raise Refusal(f"there is, or was, a session {name!r}: give another name.", Kind.CONFLICT, param="name")
        key = f"sk-{secrets.token_urlsafe(24)}" if key is None else key
        session = Session(
            name,
            self.engine,
            self.templates,
            settings or self.settings,
            names=self._names,
            row=row,
            group=group,
            seed=seed,
            key=key,
        )
        self.open[name] = session
        if key:
            self._keys.setdefault(key, session)
        _log.info("a session begins", extra={"session": name})
        return session

    # ------------------------------------------------------------------ finding
    def find(self, name: str | None, key: str) -> Session:
        """The session of a request: that of :meth:`known`, or a new one.

        Raises:
            Refusal: there is no such session, it has another key, or there are too many.
        """
        session = self.known(name, key)
        if session is not None:
            return session
        return self.create(name if name is not None else None if key else NAMELESS, key=key)

    def known(self, name: str | None, key: str) -> Session | None:
        """The session of a request; ``None`` where that would make it.

        Args:
            name: the name in its address; ``None`` where that has none: then the key tells.
            key: what the client shows, ``""`` for nothing.

        Raises:
            Refusal: there is no such session, or it has another key.
        """
        if name is None:
            session = self._keys.get(key) if key else self.open.get(NAMELESS) if self.implicit else None
            if session is not None:
                return session
            if not self.implicit:
                raise Refusal(
                    "this key is no session's: send the session's own key, or use its address (/s/NAME/v1).",
                    Kind.UNAUTHORIZED,
                )
            return None
        session = self.open.get(name)
        if session is None:
            if name in self._done:
                raise Refusal("this session is finished: its episode is over.", Kind.BUDGET, code="finished")
            if not self.implicit:
                raise Refusal("there is no session of this name: its driver makes it first.", Kind.MISSING)
            return None
        if not _same(session.key, key) and not _same(self.token, key):
            raise Refusal("this is not the session's key.", Kind.UNAUTHORIZED)
        return session

    def driven(self, name: str, key: str) -> Session:
        """A session, for its driver.

        Raises:
            Refusal: the key is not the gateway's token, or there is no such session.
        """
        self.check_driver(key)
        if name not in self.open:
            finished = name in self._done
            raise Refusal(
                "this session is finished." if finished else "there is no session of this name.",
                Kind.BUDGET if finished else Kind.MISSING,
            )
        return self.open[name]

    def check_driver(self, key: str) -> None:
        """Refuse whoever is not a driver.

        Raises:
            Refusal: the key is not the gateway's token.
        """
        if not _same(self.token, key):
            raise Refusal(
                "this is for drivers: send the gateway's token ('Authorization: Bearer TOKEN').", Kind.UNAUTHORIZED
            )

    # ------------------------------------------------------------------ ending
    def finish(self, session: Session, reward: float | None = None, **more: Any) -> None:
        """End a session; a second time changes nothing.

        Args:
            session: the session.
            reward, more: see :meth:`Session.finish <torchrl_chat.gateway.sessions.Session.finish>`.
        """
        if session.finished:
            return
        session.finish(reward, **more)
        self.retire(session)
        self.stops[session.stop.word] += 1
        _log.info(
            "a session is finished",
            extra={"session": session.name, "stop": session.stop.word, "answers": session.turns},
        )
        try:
            self._ended(session)
        except Exception as error:  # theirs: the session is finished, and the others go on
            _log.error(
                "'ended' failed",
                extra={"session": session.name, "failure": type(error).__name__},
                exc_info=_log.isEnabledFor(10),
            )

    def retire(self, session: Session) -> None:
        """Seal a session and give its place away: whoever did this finishes it later, when it is graded."""
        session.seal()
        if self.open.get(session.name) is session:
            del self.open[session.name]
            self.past.update(session.counts())
            if self._keys.get(session.key) is session:
                del self._keys[session.key]
            self._done[session.name] = None
            while len(self._done) > _ENDED:
                self._done.popitem(last=False)

    async def reap(self) -> None:
        """End sessions that nobody uses, for ever."""
        idle = self.limits.idle_seconds
        while idle is not None:
            await asyncio.sleep(min(idle / 4, 30.0))
            now = time.monotonic()
            for session in list(self.open.values()):
                if now - session.used > idle and not session.flying and not session.held:
                    self.finish(session, failure="nobody used the session any more", stop=StopReason.MAX_TIME)

    def shut(self) -> None:
        """Refuse what comes, and cancel what is on its way."""
        self.closing = True
        for session in self.open.values():
            session.close()


def _same(known: str, shown: str) -> bool:
    return hmac.compare_digest(known.encode(), shown.encode())


def report(session: Session) -> dict[str, Any]:
    """What there is to know of a session, without any of its words."""
    return {
        "name": session.name,
        "finished": session.finished,
        "stop": session.stop.word,
        "answers": session.turns,
        "sampled_tokens": session.sampled,
        "tool_calls": session.calls,
        "sequences": len(session.tree.sequences()),
        "undelivered": sum(not answer.delivered for answer in session.tree.answers),
        "reward": session.reward,
        "success": session.success,
        "failure": session.failure or None,
        "counts": dict(session.report),
        "findings": list(session.findings),
    }
