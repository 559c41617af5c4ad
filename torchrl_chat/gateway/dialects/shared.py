"""What dialects have in common: settings within bounds, stop strings, choices of tools, log-probs, server-sent events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torchrl_chat.gateway.calls import Choice, Kind, Refusal, dumps, given, number

OPENAI_ERRORS: Mapping[Kind, str] = {
    Kind.UNAUTHORIZED: "authentication_error",
    Kind.BUDGET: "permission_error",
    Kind.MISSING: "not_found_error",
    Kind.BUSY: "rate_limit_error",
    Kind.ENGINE: "server_error",
    Kind.GONE: "server_error",
}
"""How OpenAI's dialects call a kind of refusal; those that are not here are ``invalid_request_error``."""


def refuse(body: Mapping[str, Any], reasons: Mapping[str, str]) -> None:
    """Refuse a body that has one of these keys, unless its value is null, false or empty.

    Args:
        body: the body.
        reasons: the sentence for each key.

    Raises:
        Refusal: it has one.
    """
    if reasons.keys().isdisjoint(body):
        return
    for key, reason in reasons.items():
        if body.get(key):
            raise Refusal(reason, param=key)


def settings(body: Mapping[str, Any], bounds: Mapping[str, tuple[float, float]], whole: Sequence[str] = ()) -> Any:
    """The numbers of a body that are there.

    Args:
        body: the body.
        bounds: keys, with the least and the largest value.
        whole: keys of integers of any size.

    Raises:
        Refusal: one of them is no number, or beyond its bounds.
    """
    found: dict[str, Any] = {}
    for key, (least, most) in bounds.items():
        if key in body and (value := number(body, key, least, most)) is not None:
            found[key] = value
    for key in whole:
        if key in body and (value := number(body, key, -(2**63), 2**63, whole=True)) is not None:
            found[key] = value
    return found


def stop_strings(body: Mapping[str, Any], key: str, kinds: type | tuple[type, ...] = list) -> tuple[str, ...]:
    """The stop strings of a body.

    Raises:
        Refusal: they are of another type, or more than 16.
    """
    stop = given(body, key, kinds, "a list of strings")
    stops = [stop] if isinstance(stop, str) else stop or []
    if len(stops) > 16 or not all(isinstance(each, str) for each in stops):
        raise Refusal(f"{key!r} is a list of at most 16 strings.", param=key)
    return tuple(each for each in stops if each)


def shows_tools(choice: Any, tools: Sequence[Any], notes: list[str], required: str = "required") -> bool:
    """Whether the model is shown its tools. What cannot be enforced is refused, or noted.

    Args:
        choice: ``None``, ``"auto"``, ``"none"``, the dialect's word for "some tool", or anything else that a body has.
        tools: the tools.
        notes: where it is noted.
        required: the dialect's word for "some tool".

    Raises:
        Refusal: a tool is named, or a tool required where there is none, or the choice is unknown.
    """
    if choice in (None, "auto"):
        return True
    if choice == "none":
        return False
    if choice == required:
        if not tools:
            raise Refusal(f"'tool_choice' is {required!r}, and there are no 'tools'.", param="tool_choice")
        notes.append(f"'tool_choice': {required!r} is not enforced: what the policy samples is what it says.")
        return True
    if isinstance(choice, dict):
        raise Refusal(
            "'tool_choice' names a tool: which one is called is the policy's own choice here. Send 'auto', and only that tool.",
            param="tool_choice",
        )
    raise Refusal(f"'tool_choice' is unknown: expected 'auto', 'none' or {required!r}.", param="tool_choice")


def log_prob_entries(choice: Choice) -> list[dict[str, Any]]:
    """The log-probs of an answer's tokens, as OpenAI's dialects spell them; none where they are not known."""
    return [
        {"token": piece, "logprob": value, "bytes": list(piece.encode()), "top_logprobs": []}
        for piece, value in zip(choice.pieces, choice.log_probs or (), strict=False)
    ]


def event(value: Mapping[str, Any], name: str | None = None) -> bytes:
    """A server-sent event, with its name where the dialect names events."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + dumps(value) + b"\n\n"
