"""What goes wrong between a client and an OpenEnv server, and what it means for the session."""

from __future__ import annotations

from typing import Any


class OpenEnvError(RuntimeError):
    """Something went wrong between a client and an OpenEnv server.

    Attributes:
        code: the error code that the server sent, if it did (``"VALIDATION_ERROR"``, ``"CAPACITY_REACHED"`` ...).
    """

    def __init__(self, message: str, code: str | None = None):
        super().__init__(message)
        self.code = code


class ServerError(OpenEnvError):
    """The server answered a request with an error; the session lives on.

    Attributes:
        errors: what exactly is wrong, where the server says so (pydantic's list of errors).
    """

    def __init__(self, message: str, code: str | None = None, errors: Any = None):
        super().__init__(message, code)
        self.errors = errors

    @classmethod
    def of(cls, data: dict[str, Any]) -> ServerError:
        """The error of a reply, from its ``data``."""
        code, said, errors = data.get("code"), str(data.get("message")), data.get("errors")
        code = None if code is None else str(code)
        if isinstance(errors, list):  # OpenEnv says only "Invalid message" there
            places = [item.get("loc") or () for item in errors if isinstance(item, dict)]
            names = [".".join(map(str, loc)) if isinstance(loc, list) else str(loc or "") for loc in places]
            said_of = [item.get("msg") for item in errors if isinstance(item, dict)]
            details = [f"{name}: {text}" for name, text in zip(names, said_of, strict=True)]
            missing = [detail for detail in details[:8] if detail not in said]
            said = "; ".join([said, *missing])
        return cls(f"{code}: {said}", code, errors)


class SessionLost(OpenEnvError, ConnectionError):
    """The session is over, and with it the conversation that the server kept; a reset begins a new one."""


class ReplyLost(OpenEnvError):
    """The connection broke during a step, which the server has done; its reply is lost, the session goes on.

    ``state()`` tells what the server has; the next observation is complete again.
    """


class ConnectFailed(OpenEnvError, ConnectionError):
    """The server cannot be reached, or refuses the connection."""


class RequestTimeout(OpenEnvError, TimeoutError):
    """No reply in time. The server may still act on the request; its late reply is dropped."""
