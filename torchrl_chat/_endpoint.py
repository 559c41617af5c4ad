"""The client of an OpenAI-compatible endpoint, and the options that everything that asks one has in common.

Law of this file: what lets somebody in (a key, a password in a URL, a header) leaves a process in requests only. Whatever is
shown or written of an endpoint goes through :func:`shown_url`, and what it says through :class:`Secrets`, before it is cut
to a length: half a key is a key's half.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit, urlunsplit

RESERVED = ("model", "messages", "temperature", "max_tokens", "n", "stream", "timeout")
"""Arguments of a request that options of their own set, or that are not supported."""


HIDDEN = "[hidden]"
"""What is shown in the place of a secret."""

_SHORTEST = 4  # characters; anything shorter stands in ordinary words
_TELLING = re.compile(r"key|token|secret|sig|pass|auth|cred", re.IGNORECASE)
_NOBODYS = {"none", "empty", "bearer", "basic", "dummy", "token"}


class Secrets:
    """What must not be shown of an endpoint: its key, the password of its URL, the values of its headers.

    Args:
        values: the secrets; those of fewer than four characters, which stand in ordinary words, are not looked for.

    Example:
        >>> secrets = Secrets(["sk-123456"])
        >>> secrets.hide("Incorrect API key: sk-123456."), "sk-123456" in secrets
        ('Incorrect API key: [hidden].', True)
    """

    def __init__(self, values: Iterable[str] = ()):
        spelled: set[str] = set()
        for value in values:
            if len(value) >= _SHORTEST and value.lower() not in _NOBODYS:
                spelled |= {value, quote(value, safe=""), json.dumps(value)[1:-1], repr(value)[1:-1]}
        self._spelled = sorted(spelled, key=len, reverse=True)

    @classmethod
    def of(cls, who: Any) -> Secrets:
        """Those of an object with ``base_url``, ``api_key`` and ``extra``; a key and a URL of the environment count too."""
        url = who.base_url if who.base_url is not None else os.environ.get("OPENAI_BASE_URL", "")
        key = who.api_key if who.api_key is not None else os.environ.get("OPENAI_API_KEY", "")
        return cls([key, *of_url(url), *_of_extra(getattr(who, "extra", {}))])

    def __contains__(self, text: str) -> bool:
        return any(secret in text for secret in self._spelled)

    def hide(self, text: str) -> str:
        """The text without them."""
        for secret in self._spelled:
            text = text.replace(secret, HIDDEN)
        return text


def of_url(url: str) -> list[str]:
    """What lets somebody in, of a URL: its password, and the values in its query whose names tell."""
    parts = urlsplit(url)
    found = [unquote(value) for name, value in parse_qsl(parts.query) if _TELLING.search(name)]
    if parts.password:
        name, password = unquote(parts.username or ""), unquote(parts.password)
        found += [password, parts.password, basic(name, password).partition(" ")[2]]
    elif parts.username:  # a token alone stands there, too
        found += [unquote(parts.username), basic(unquote(parts.username), "").partition(" ")[2]]
    return found


def _of_extra(extra: Mapping[str, Any]) -> list[str]:
    found = []
    for name, value in extra.items():
        if name in ("extra_headers", "extra_query", "extra_body") and isinstance(value, Mapping):
            for inner, text in value.items():
                if isinstance(text, str) and (name == "extra_headers" or _TELLING.search(str(inner))):
                    found += [text, *text.split()]
        elif isinstance(value, str) and _TELLING.search(name):
            found.append(value)
    return found


def basic(name: str, password: str) -> str:
    """The header ``Authorization`` of a name and a password."""
    return "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()


def shown_url(url: str | None) -> str | None:
    """A URL without what lets somebody in.

    Example:
        >>> shown_url("https://me:secret@example.org/v1?api-key=abc&v=2")
        'https://[hidden]@example.org/v1?api-key=[hidden]&v=2'
    """
    if url is None:
        return None
    parts = urlsplit(url)
    _, at, host = parts.netloc.rpartition("@")
    query = re.sub(
        r"([^&=]+)=([^&]*)", lambda m: f"{m[1]}={HIDDEN}" if _TELLING.search(m[1]) else m[0], parts.query
    )
    return urlunsplit(parts._replace(netloc=f"{HIDDEN}@{host}" if at else host, query=query))


def without_login(url: str) -> tuple[str, str | None]:
    """A URL without name and password, and the header ``Authorization`` that says the same.

    An HTTP client writes the URL of each request into its log; headers, it does not.
    """
    parts = urlsplit(url)
    if parts.username is None and parts.password is None:
        return url, None
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=host)), basic(
        unquote(parts.username or ""), unquote(parts.password or "")
    )


def shown(who: Any) -> str:
    """The ``repr`` of a dataclass that asks an endpoint, without what lets somebody in."""
    values = []
    for each in fields(who):
        if not each.repr:
            continue
        value = getattr(who, each.name)
        value = shown_url(value) if each.name == "base_url" else value
        values.append(f"{each.name}={value!r}")
    return Secrets.of(who).hide(f"{type(who).__name__}({', '.join(values)})")


def sent(extra: Mapping[str, Any]) -> dict[str, Any]:
    """Further arguments of a request, without the headers, which are the client's (see :func:`make_client`)."""
    return {name: value for name, value in extra.items() if name != "extra_headers"}


def check_options(who: Any, reserved: Collection[str] = RESERVED) -> None:
    """Refuse values that cannot be meant.

    Args:
        who: an object with ``concurrency``, ``retries``, ``timeout``, ``deadline`` and ``extra``.
        reserved: what ``extra`` must not hold.

    Raises:
        ValueError: naming the option and its value.
    """
    for name, least in (("concurrency", 1), ("retries", 0)):
        if getattr(who, name) < least:
            raise ValueError(f"{name}={getattr(who, name)!r}: expected {least} or more.")
    for name in ("timeout", "deadline"):
        if not getattr(who, name) > 0:
            raise ValueError(f"{name}={getattr(who, name)!r}: expected seconds, more than 0.")
    if taken := sorted(set(who.extra) & set(reserved)):
        raise ValueError(f"extra has {taken}: these are set by options of {type(who).__name__}, or not supported.")


def make_client(who: Any) -> Any:
    """An ``AsyncOpenAI``, for the event loop in which it is used first.

    It tries again by itself, with exponential backoff, after rate limits (429), errors of the server (5xx), timeouts and
    lost connections.

    Args:
        who: an object with ``model``, ``base_url``, ``api_key``, ``retries``, ``timeout`` and ``extra``.

    Raises:
        ImportError: the library ``openai`` is not installed.
        ValueError: there is no key, and no endpoint that may do without one.
    """
    name = type(who).__name__
    try:
        from openai import AsyncOpenAI, OpenAIError
    except ImportError as error:
        raise ImportError(f"{name} needs the openai library: pip install 'torchrl_chat[openai]'.") from error
    given = who.base_url if who.base_url is not None else os.environ.get("OPENAI_BASE_URL") or None
    url, login = (None, None) if given is None else without_login(given)
    options: dict[str, Any] = {"base_url": url, "max_retries": who.retries, "timeout": who.timeout}
    # Headers of single requests stand in the library's own debug log; those of the client do not.
    headers = {**({} if login is None else {"Authorization": login}), **who.extra.get("extra_headers", {})}
    if headers:
        options["default_headers"] = headers
    try:
        return AsyncOpenAI(api_key=who.api_key, **options)
    except OpenAIError as error:
        if who.base_url is None or who.api_key is not None:
            raise ValueError(
                f"{name}(model={who.model!r}) cannot connect: {Secrets.of(who).hide(str(error))}"
            ) from None
        return AsyncOpenAI(api_key="none", **options)  # servers of one's own often want no key
