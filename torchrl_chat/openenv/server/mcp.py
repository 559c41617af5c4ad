"""``/mcp``: what OpenEnv's clients ask by JSON-RPC 2.0. Sessions are made and closed; tools are the environments' own."""

from __future__ import annotations

from typing import Any

from torchrl_chat.openenv.protocol import ErrorCode, ProtocolError, dumps, short
from torchrl_chat.openenv.server.sessions import SessionTable

_KEYS = frozenset({"jsonrpc", "method", "params", "id"})
PARSE, _REQUEST, _METHOD, _PARAMS, _INTERNAL, _SERVER = -32700, -32600, -32601, -32602, -32603, -32000


class _Refused(Exception):
    def __init__(self, code: int, message: str, data: Any = None):
        super().__init__(message)
        self.code, self.data = code, data


async def answer(request: Any, sessions: SessionTable, address: str) -> bytes:
    """The reply to a JSON-RPC request of a client at that address; errors are replies too."""
    identity = request.get("id") if isinstance(request, dict) else None
    if not isinstance(identity, (str, int, float, type(None))) or isinstance(identity, bool):
        identity = None
    try:
        result = await _result(request, sessions, address)
    except _Refused as error:
        return failure(error.code, str(error), identity, error.data)
    return dumps({"jsonrpc": "2.0", "id": identity, "result": result})


def failure(code: int, message: str, identity: Any = None, data: Any = None) -> bytes:
    """An error reply."""
    error = {"code": code, "message": message} | ({} if data is None else {"data": data})
    return dumps({"jsonrpc": "2.0", "id": identity, "error": error})


async def _result(request: Any, sessions: SessionTable, address: str) -> Any:
    if not isinstance(request, dict) or request.get("jsonrpc") != "2.0":
        raise _Refused(_REQUEST, 'expected a JSON-RPC request, {"jsonrpc": "2.0", "method": ..., "id": ...}.')
    if extra := request.keys() - _KEYS:
        raise _Refused(_REQUEST, f"a request has jsonrpc, method, params and id, not {short(sorted(extra)[0])}.")
    method, params = request.get("method"), request.get("params") or {}
    if not isinstance(method, str):
        raise _Refused(_REQUEST, "the request has no method.")
    if method in ("tools/list", "tools/call"):
        raise _Refused(_INTERNAL, "Environment does not support MCP")
    if method not in ("openenv/session/create", "openenv/session/close"):
        raise _Refused(_METHOD, f"Method not found: {short(method)}")
    if not isinstance(params, dict):
        raise _Refused(_PARAMS, "params is an object.")
    try:
        if method == "openenv/session/create":
            return {"session_id": (await sessions.open(address, resumable=True)).id}
        if not isinstance(params.get("session_id"), str):
            raise _Refused(_PARAMS, "session_id is required.")
        await sessions.close(sessions.find(params["session_id"]), "closed")
        return {"session_id": params["session_id"], "closed": True}
    except ProtocolError as error:
        code = _SERVER if error.code == ErrorCode.CAPACITY_REACHED else _PARAMS
        raise _Refused(code, error.message, error.details or None) from None
