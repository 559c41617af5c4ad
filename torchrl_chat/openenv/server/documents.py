"""The OpenAPI document of a server, and the page that shows it."""

from __future__ import annotations

import html
import json
from typing import Any

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
_SPLIT = {"type": "object", "properties": {"split": {"type": "string"}}, "required": ["split"]}
_ROUTES: tuple[tuple[str, str, str, Any], ...] = (
    ("post", "/reset", "Begin an episode: of a new environment, or of the session that session_id names", "reset"),
    ("post", "/step", "Take a step: in a new environment, or in the session that session_id names", "step"),
    ("post", "/close", "End the session that session_id names", "close"),
    ("get", "/state", "The state of a session", None),
    ("get", "/metadata", "Name, description and version of the environment", None),
    ("get", "/schema", "JSON schemas of actions, observations and states", None),
    ("get", "/health", "Whether the server runs", None),
    ("get", "/metrics", "Counters for Prometheus", None),
    ("post", "/mcp", "JSON-RPC 2.0: openenv/session/create and openenv/session/close", "mcp"),
    ("get", "/list_environments", "The environments of this server", None),
    ("get", "/{env_name}/splits", "The splits of the environment's tasks", None),
    ("post", "/{env_name}/tasks", "The tasks of a split", "split"),
    ("post", "/{env_name}/num_tasks", "How many tasks a split has", "split"),
    ("post", "/{env_name}/task", "One task", "split"),
    ("post", "/{env_name}/task_range", "The tasks from start to stop", "split"),
)


def openapi_of(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    """The OpenAPI 3.1 document of a server.

    Args:
        name: the environment's name.
        schema: JSON schemas of its ``action``, ``observation`` and ``state``.
    """
    session = {
        "session_id": {"type": "string", "description": "a session made with keep=true or openenv/session/create"}
    }
    bodies: dict[str, Any] = {
        "reset": {
            "type": "object",
            "properties": {
                "seed": {"type": "integer", "minimum": 0},
                "episode_id": {"type": "string", "maxLength": 255},
                "keep": {"type": "boolean", "description": "keep the environment as a session"},
                **session,
            },
            "additionalProperties": True,
        },
        "step": {
            "type": "object",
            "properties": {"action": schema["action"], "timeout_s": {"type": "number"}, **session},
            "required": ["action"],
        },
        "close": {"type": "object", "properties": session, "required": ["session_id"]},
        "mcp": {"type": "object"},
        "split": _SPLIT,
    }
    results = {"/reset": _RESULT, "/step": _RESULT, "/state": schema["state"]}
    paths: dict[str, Any] = {}
    for method, path, summary, body in _ROUTES:
        answer = {"application/json": {"schema": results.get(path, {"type": "object"})}}
        route: dict[str, Any] = {
            "summary": summary,
            "responses": {"200": {"description": "done", "content": answer}, "422": {"description": "bad request"}},
        }
        if body is not None:
            route["requestBody"] = {"content": {"application/json": {"schema": bodies[body]}}}
        if "{env_name}" in path:
            route["parameters"] = [
                {"name": "env_name", "in": "path", "required": True, "schema": {"type": "string"}}
            ]
        paths.setdefault(path, {})[method] = route
    return {
        "openapi": "3.1.0",
        "info": {
            "title": f"{name} (OpenEnv)",
            "version": "1.0.0",
            "description": "An environment that speaks OpenEnv's protocol. Episodes run over the WebSocket /ws.",
        },
        "paths": paths,
        "components": {"schemas": {key.capitalize(): value for key, value in schema.items()}},
    }


def page(document: dict[str, Any]) -> str:
    """The document as a plain page; it loads nothing from elsewhere."""
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
