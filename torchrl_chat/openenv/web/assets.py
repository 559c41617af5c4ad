"""The files of the page, read once; what a browser may do with them is said with every answer.

Law of this file: texts of models, tools and datasets never become markup. The page builds its elements itself, and the
headers make the browser refuse whatever would slip through: scripts and styles come from this server's files only, and
assigning markup to an element raises (Trusted Types).
"""

from __future__ import annotations

import functools
import hashlib
from importlib import resources
from typing import NamedTuple

from starlette.requests import Request
from starlette.responses import Response

HEADERS = {
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; object-src 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
"""Sent with every page, script and style (CSP Level 3, Trusted Types)."""

_TYPES = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}


class Asset(NamedTuple):
    """One file of the page."""

    body: bytes
    media_type: str
    tag: str


@functools.cache
def assets() -> dict[str, Asset]:
    """The files by their names."""
    found = {}
    for file in resources.files("torchrl_chat.openenv.web").joinpath("static").iterdir():
        media_type = _TYPES.get(file.name.rpartition(".")[2])
        if media_type is not None:
            body = file.read_bytes()
            found[file.name] = Asset(body, media_type, f'"{hashlib.sha256(body).hexdigest()[:16]}"')
    return found


def answer(request: Request, name: str) -> Response:
    """The file of that name, or 404; 304 where the browser has it already."""
    asset = assets().get(name)
    if asset is None:
        return Response("there is no such file.", 404, HEADERS, "text/plain")
    headers = {**HEADERS, "etag": asset.tag}
    if request.headers.get("if-none-match") == asset.tag:
        return Response(status_code=304, headers=headers)
    return Response(asset.body, headers=headers, media_type=asset.media_type)
