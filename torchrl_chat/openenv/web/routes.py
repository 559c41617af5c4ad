"""The routes of the page: its files, the ledger of a session as the page draws it, rollout files of a folder.

Law of this file: texts of models, tools and datasets never become markup. The page builds its elements itself, and the
headers make the browser refuse whatever would slip through: scripts and styles come from this server's files only, and
assigning markup to an element raises (Trusted Types).
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from torchrl_chat.conversation import Transcript
from torchrl_chat.openenv.protocol import ProtocolError, dumps
from torchrl_chat.openenv.server.security import Guard, OwnNames
from torchrl_chat.openenv.web.socket import TokenSocket
from torchrl_chat.pieces import TokenPieces
from torchrl_chat.rollouts import sequence as written_sequence

Handler = Callable[[Request], Awaitable[Response]]
Answerer = Callable[[list[int]], tuple[list[int], list[float]]]
"""A policy for the page: prompt ids -> sampled ids and their log-probs."""

HEADERS = {
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; object-src 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
"""Sent with every page, script and style (CSP Level 3, Trusted Types)."""

_MAX_FILES = 1000
_FIRST_LINE = 1 << 20  # bytes of a file's first line that are read to see what it holds


def web_routes(
    tokenizer: Any = None, *, rollouts: str | os.PathLike[str] | None = None, policy: Answerer | None = None
) -> list[BaseRoute]:
    """The page's routes, for ``create_app(..., extra_routes=web_routes(tokenizer))``: ``/web`` and what stands under it.

    The files of the page are for everybody who reaches the port: they hold no secret. Whatever tells of sessions or of
    files asks for the server's token, as every route does.

    Args:
        tokenizer: of the environment, for the text of each token; ``None`` shows ids only.
        rollouts: a folder of rollout files (``*.jsonl``, in subfolders too) that the page may open, or one such file.
        policy: answers in the person's place, where the person asks for it; called in a thread, one call at a time.

    Raises:
        ValueError: there is no such folder or file.

    Example:
        >>> from torchrl_chat import ChatTemplate
        >>> from torchrl_chat.openenv import ChatEnvironment, create_app
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> template = ChatTemplate(tokenizer)
        >>> app = create_app(lambda: ChatEnvironment(template), extra_routes=web_routes(tokenizer))
    """
    return _Page(tokenizer, rollouts, policy, played=True).routes()


def viewer_app(rollouts: str | os.PathLike[str]) -> Starlette:
    """The rollout viewer by itself, no environment behind it: an ASGI application.

    Args:
        rollouts: as for :func:`web_routes`.

    Raises:
        ValueError: there is no such folder or file.
    """
    app = Starlette(routes=_Page(None, rollouts, None, played=False).routes())
    app.add_middleware(OwnNames)
    app.state.guard = Guard()
    return app


class _Static(StaticFiles):
    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response


class _Page:
    def __init__(
        self,
        tokenizer: Any,
        rollouts: str | os.PathLike[str] | None,
        policy: Answerer | None,
        played: bool,
    ):
        self._spell = None if tokenizer is None else TokenPieces(tokenizer)
        self._root, self._only = _place(rollouts)
        self._policy = policy
        self._played = played
        self._turn = asyncio.Lock()
        self._static = _Static(packages=[("torchrl_chat.openenv.web", "static")])

    def routes(self) -> list[BaseRoute]:
        routes: list[BaseRoute] = [
            Route("/web", _elsewhere),
            Route("/web/", self._page("index.html" if self._played else "rollouts.html")),
            Route("/web/rollouts", self._page("rollouts.html")),
            Mount("/web/static", self._static),
            Route("/web/config", self._guarded(self.config)),
            Route("/web/files", self._guarded(self.files)),
            Route("/web/files/{path:path}", self._guarded(self.file)),
        ]
        if not self._played:
            return [Route("/", _elsewhere), *routes]
        return [
            *routes,
            Route("/web/ledger", self._guarded(self.ledger)),
            Route("/web/answer", self._guarded(self.answer), methods=["POST"]),
            WebSocketRoute("/web/ws", TokenSocket()),
        ]

    def _page(self, name: str) -> Handler:
        async def page(request: Request) -> Response:
            return await self._static.get_response(name, request.scope)

        return page

    # ------------------------------------------------------------------ what the page asks
    async def config(self, request: Request) -> Response:
        """What this server has."""
        return _json(
            {
                "env": getattr(request.app.state, "env_name", None) if self._played else None,
                "policy": self._policy is not None,
                "rollouts": self._root is not None,
            }
        )

    async def ledger(self, request: Request) -> Response:
        """The token sequences of a session, each as the rollout file has it; none for an environment without them."""
        transcript = self._transcript(request)
        if transcript is None:
            return _json({"sequences": []})
        written = [
            await asyncio.to_thread(written_sequence, branch, self._spell, transcript.scored)
            for branch in transcript.sequences
        ]
        return _json({"sequences": written})

    async def answer(self, request: Request) -> Response:
        """What the policy answers to a session's prompt; the page sends it as an action of its own."""
        if self._policy is None:
            raise HTTPException(404, "this server has no model that answers.")
        transcript = self._transcript(request)
        if transcript is None or not len(transcript) or transcript.ended is not None:
            raise HTTPException(409, "it is not the policy's turn.")
        async with self._turn:
            try:
                tokens, log_probs = await asyncio.to_thread(self._policy, transcript.tokens.tolist())
            except Exception as error:  # of any model: the person is told, the page goes on
                raise HTTPException(
                    500, f"the model has no answer: {type(error).__name__}: {error}"[:2000]
                ) from error
        return _json({"tokens": tokens, "log_probs": log_probs})

    async def files(self, request: Request) -> Response:
        """The rollout files of the folder, newest first; without the metrics and the like of a training run."""
        found = await asyncio.to_thread(self._files)
        return _json({"files": found[:_MAX_FILES], "left_out": max(0, len(found) - _MAX_FILES)})

    async def file(self, request: Request) -> Response:
        """One of them, as it is."""
        name = request.path_params["path"]
        try:
            path = self._shown(Path(name))
        except (OSError, ValueError):  # a name that no file can have
            path = None
        if path is None:
            raise HTTPException(404, f"there is no rollout file {name[:200]!r}.")
        return FileResponse(path, headers=HEADERS, media_type="application/x-ndjson")

    # ------------------------------------------------------------------ how it is found
    def _transcript(self, request: Request) -> Transcript | None:
        """The ledger of a session's environment; ``None`` where it has none, or none yet."""
        session = request.app.state.sessions.find(request.query_params.get("session_id"))
        return getattr(session.env, "transcript", None)

    def _shown(self, name: Path) -> Path | None:
        """The file of that name; ``None`` where the page may not open it: links out of the folder are not followed."""
        if self._root is None:
            return None
        path = (self._root / name).resolve()
        wanted = path.suffix == ".jsonl" if self._only is None else path == self._only
        return path if wanted and path.is_relative_to(self._root) and path.is_file() else None

    def _files(self) -> list[dict[str, Any]]:
        if self._root is None:
            return []
        found = []
        for path in [self._only] if self._only is not None else self._root.rglob("*.jsonl"):
            name = path.relative_to(self._root)
            try:
                if self._shown(name) is None or (self._only is None and not _holds_episodes(path)):
                    continue
                stat = path.stat()
            except OSError:
                continue  # it was deleted meanwhile
            found.append({"name": name.as_posix(), "size": stat.st_size, "modified": stat.st_mtime})
        return sorted(found, key=lambda entry: -entry["modified"])

    def _guarded(self, handler: Handler) -> Handler:
        async def guarded(request: Request) -> Response:
            refusal = request.app.state.guard.refusal(request)
            if refusal is not None:
                return _json({"detail": refusal[1]}, refusal[0])
            try:
                return await handler(request)
            except HTTPException as error:
                return _json({"detail": error.detail}, error.status_code)
            except ProtocolError as error:
                return _json({"detail": error.message, "code": str(error.code)}, 404)  # no such session

        return guarded


def _place(rollouts: str | os.PathLike[str] | None) -> tuple[Path | None, Path | None]:
    """The folder, and the one file in it that is shown, if it is not all of them."""
    if rollouts is None:
        return None, None
    path = Path(rollouts).resolve()
    if path.is_dir():
        return path, None
    if path.is_file():
        return path.parent, path
    raise ValueError(f"there is no rollout file or folder {os.fspath(rollouts)}.")


def _holds_episodes(path: Path) -> bool:
    """Whether a file may be one of rollouts: not the metrics, evaluations and so on that lie beside them in a run's folder."""
    with path.open("rb") as file:
        first = file.readline(_FIRST_LINE)
    if not first.strip():
        return False
    try:
        line = json.loads(first)
    except ValueError:  # longer than what was read, or broken: the page says which
        return True
    return isinstance(line, dict) and "messages" in line


async def _elsewhere(request: Request) -> Response:
    return RedirectResponse("web/")  # relative: the server may stand behind a path of a proxy


def _json(value: Any, status: int = 200) -> Response:
    return Response(dumps(value), status, HEADERS, "application/json")
