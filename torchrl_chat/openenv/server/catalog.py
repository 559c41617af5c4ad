"""What a server tells of its environment: metadata, schemas, tasks, documents. One environment is made for that, and kept."""

from __future__ import annotations

import asyncio
import functools
import html
import inspect
import json
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pydantic import BaseModel, TypeAdapter
from starlette.requests import Request

Handler = Callable[[Request], Any]
"""What answers a request: with a response, or with what its JSON says; or with an awaitable of one of them."""

_RESULT = {
    "type": "object",
    "properties": {
        "observation": {"type": "object"},
        "reward": {"type": ["number", "null"]},
        "done": {"type": "boolean"},
        "metadata": {"type": "object"},
    },
    "required": ["observation", "reward", "done"],
}


class Entry(NamedTuple):
    """A route of the server, as its table of routes and its OpenAPI document have it."""

    path: str
    handler: Handler
    summary: str = ""  # the document names those only that have one
    body: type | None = None  # what a POST sends; a route without one is a GET

    @property
    def method(self) -> str:
        """The HTTP method."""
        return "GET" if self.body is None else "POST"


@dataclass
class Catalog:
    """The description of a server's environment."""

    factory: Callable[[], Any]
    """Makes an environment."""
    models: dict[str, type[BaseModel]]
    """Its ``action``, ``observation`` and ``state``, as they cross the wire."""
    name: str
    """The environment's name in the Task API."""
    _env: Any = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def metadata(self) -> dict[str, Any]:
        """The reply of ``/metadata``."""
        found: Any = self._probe().get_metadata() if hasattr(self._probe(), "get_metadata") else {}
        fields = found.model_dump() if hasattr(found, "model_dump") else dict(found)
        return {"name": self.name, "description": f"{self.name} environment", **fields}

    @functools.cached_property
    def schema(self) -> dict[str, Any]:
        """The reply of ``/schema``."""
        return {name: model.model_json_schema() for name, model in self.models.items()}

    def openapi(self, routes: Iterable[Entry]) -> dict[str, Any]:
        """The OpenAPI 3.1 document of a server with these routes."""
        schema = self.schema
        results = {"/reset": _RESULT, "/step": _RESULT, "/state": schema["state"]}
        paths: dict[str, Any] = {}
        for entry in routes:
            if not entry.summary:
                continue
            answer = {"application/json": {"schema": results.get(entry.path, {"type": "object"})}}
            route: dict[str, Any] = {
                "summary": entry.summary,
                "responses": {
                    "200": {"description": "done", "content": answer},
                    "422": {"description": "bad request"},
                },
            }
            if entry.body is not None:
                body = TypeAdapter(entry.body).json_schema()
                if "action" in body.get("properties", ()):
                    body["properties"]["action"] = schema["action"]
                route["requestBody"] = {"content": {"application/json": {"schema": body}}}
            if "{env_name}" in entry.path:
                name = {"name": "env_name", "in": "path", "required": True, "schema": {"type": "string"}}
                route["parameters"] = [name]
            paths[entry.path] = {entry.method.lower(): route}
        return {
            "openapi": "3.1.0",
            "info": {
                "title": f"{self.name} (OpenEnv)",
                "version": "1.0.0",
                "description": "An environment that speaks OpenEnv's protocol. Episodes run over the WebSocket /ws.",
            },
            "paths": paths,
            "components": {"schemas": {key.capitalize(): value for key, value in schema.items()}},
        }

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call a method of the Task API.

        Raises:
            NotImplementedError: the environment provides no tasks.
        """
        function = getattr(self._probe(), method, None)
        if not callable(function):
            raise NotImplementedError
        found = function(*arguments)
        return asyncio.run(_awaited(found)) if inspect.isawaitable(found) else found

    def close(self) -> None:
        """Close the environment that was made for the descriptions."""
        with self._lock:
            env, self._env = self._env, None
        if env is not None and hasattr(env, "close"):
            env.close()

    def _probe(self) -> Any:
        with self._lock:
            if self._env is None:
                self._env = self.factory()
            return self._env


def page(document: dict[str, Any]) -> str:
    """An OpenAPI document as a plain page; it loads nothing from elsewhere."""
    rows = "".join(
        f"<tr><td>{method.upper()}</td><td><code>{html.escape(path)}</code></td>"
        f"<td>{html.escape(route['summary'])}</td></tr>"
        for path, methods in document["paths"].items()
        for method, route in methods.items()
    )
    schemas = "".join(
        f"<h2>{html.escape(name)}</h2><pre>{html.escape(json.dumps(schema, indent=2))}</pre>"
        for name, schema in document["components"]["schemas"].items()
    )
    title = html.escape(document["info"]["title"])
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        "<style>body{font:16px/1.5 system-ui;max-width:60rem;margin:2rem auto;padding:0 1rem}"
        "td{padding:.2rem 1rem .2rem 0;vertical-align:top}pre{overflow:auto;background:#f4f4f4;padding:1rem}</style>"
        f"</head><body><h1>{title}</h1><p>{html.escape(document['info']['description'])}</p>"
        f'<table>{rows}</table>{schemas}<p><a href="openapi.json">openapi.json</a></p></body></html>'
    )


async def _awaited(value: Any) -> Any:
    return await value
