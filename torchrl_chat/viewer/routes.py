"""The routes of the viewer: its page, the files that it may read, and what it is made of.

Law of this file: texts of models, tools and datasets never become markup. The page builds its elements itself, and the
headers make the browser refuse whatever would slip through: scripts and styles come from this server's files only, and
assigning markup to an element raises (Trusted Types). And the server is asked for little: the browser reads a file in ranges
(RFC 9110, section 14), so that of a file that grows only what was appended is sent.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from torchrl_chat.access import Guard, OwnNames
from torchrl_chat.viewer.files import RolloutFiles

Handler = Callable[[Request], Awaitable[Response]]

HEADERS = {
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; object-src 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
"""Sent with every page, script and style (CSP Level 3, Trusted Types)."""

STATIC = ("torchrl_chat.viewer", "static")
"""Where the files of the page are: what other pages of the package share with it, too."""


class Static(StaticFiles):
    """Files of pages, with :data:`HEADERS`."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """The file, or 304 for one that the browser has."""
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response

    def page(self, name: str) -> Handler:
        """A handler that sends a file as a page of its own address."""

        async def send(request: Request) -> Response:
            return await self.get_response(name, request.scope)

        return send


def viewer_routes(
    rollouts: RolloutFiles | None, guarded: Callable[[Handler], Handler], static: Static
) -> list[BaseRoute]:
    """The page and what it asks, for an application that has pages of its own.

    Args:
        rollouts: what may be shown; ``None``: only files that the person opens.
        guarded: makes a handler refuse whoever may not ask it.
        static: the files of the pages.
    """

    async def files(request: Request) -> Response:
        listed = {"files": [], "left_out": 0, "others": 0}
        return answered(listed if rollouts is None else await asyncio.to_thread(rollouts.listed))

    async def file(request: Request) -> Response:
        name = request.path_params["path"]
        path = None if rollouts is None else await asyncio.to_thread(rollouts.path, name)
        if path is None:
            raise HTTPException(404, f"there is no rollout file {name[:200]!r}.")
        return FileResponse(path, headers=HEADERS, media_type="application/x-ndjson")

    return [
        Route("/web", elsewhere),
        Route("/web/rollouts", static.page("rollouts.html")),
        Mount("/web/static", static),
        Route("/web/files", guarded(files)),
        Route("/web/files/{path:path}", guarded(file)),
    ]


def viewer_app(rollouts: str | os.PathLike[str]) -> Starlette:
    """The viewer by itself, for this machine only: an ASGI application.

    Args:
        rollouts: a folder of rollout files (``*.jsonl``, in subfolders too) that the page may open, or one such file.

    Raises:
        ValueError: there is no such folder or file.

    Example:
        >>> app = viewer_app(".")  # uvicorn.run(app, host="127.0.0.1")
    """
    place, guard, static = RolloutFiles(rollouts), Guard(), Static(packages=[STATIC])

    def guarded(handler: Handler) -> Handler:
        async def asked(request: Request) -> Response:
            refusal = guard.refusal(request)
            if refusal is not None:
                return answered({"detail": refusal[1]}, refusal[0])
            try:
                return await handler(request)
            except HTTPException as error:
                return answered({"detail": error.detail}, error.status_code)

        return asked

    async def config(request: Request) -> Response:
        return answered({"env": None, "policy": False, "rollouts": place.name})

    app = Starlette(
        routes=[
            Route("/", elsewhere),
            Route("/web/", static.page("rollouts.html")),
            Route("/web/config", guarded(config)),
            *viewer_routes(place, guarded, static),
        ]
    )
    app.add_middleware(OwnNames)
    return app


async def elsewhere(request: Request) -> Response:
    """The way to the first page; relative, as the server may stand behind a path of a proxy."""
    return RedirectResponse("web/")


def answered(value: Any, status: int = 200) -> Response:
    """A value as JSON."""
    return Response(json.dumps(value), status, HEADERS, "application/json")
