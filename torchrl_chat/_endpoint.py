"""The client of an OpenAI-compatible endpoint, and the options that everything that asks one has in common."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

RESERVED = ("model", "messages", "temperature", "max_tokens", "n", "stream", "timeout")
"""Arguments of a request that options of their own set, or that are not supported."""


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
        who: an object with ``model``, ``base_url``, ``api_key``, ``retries`` and ``timeout``.

    Raises:
        ImportError: the library ``openai`` is not installed.
        ValueError: there is no key, and no endpoint that may do without one.
    """
    name = type(who).__name__
    try:
        from openai import AsyncOpenAI, OpenAIError
    except ImportError as error:
        raise ImportError(f"{name} needs the openai library: pip install 'torchrl_chat[openai]'.") from error
    options: Mapping[str, Any] = {"base_url": who.base_url, "max_retries": who.retries, "timeout": who.timeout}
    try:
        return AsyncOpenAI(api_key=who.api_key, **options)
    except OpenAIError as error:
        if who.base_url is None or who.api_key is not None:
            raise ValueError(f"{name}(model={who.model!r}) cannot connect: {error}") from None
        return AsyncOpenAI(api_key="none", **options)  # servers of one's own often want no key
