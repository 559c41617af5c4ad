"""Messages that the policy did not write, appended to conversations; one row that cannot be continued loses no other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torchrl_chat.conversation.transcript import Transcript
from torchrl_chat.conversation.turn import by_row
from torchrl_chat.messages import Message
from torchrl_chat.templates import BridgeError, ChatTemplate, ChatTemplateError


def append(
    transcripts: Sequence[Transcript],
    new: Sequence[list[Message] | None],
    template: ChatTemplate | None,
    history_policy: Literal["keep", "template"] = "keep",
    errors: dict[int, Exception] | None = None,
) -> list[Transcript]:
    """The conversations with their new messages and the generation prompt.

    Args:
        transcripts: the conversations; those with new messages end with an answer.
        new: the messages of each, or ``None``.
        template: their chat template; without one, messages have no tokens.
        history_policy: whether the past is written anew as the template does it.
        errors: takes the errors by row; such a row stays as it is.

    Raises:
        BridgeError: without ``errors``: a continuation cannot be proved exact.
    """
    results = list(transcripts)
    added = {i: messages for i, messages in enumerate(new) if messages}
    if template is None:
        for i, messages in added.items():
            results[i] = results[i].appended([], messages)
        return results
    found: dict[int, Exception] = {}
    for i, messages in added.items():
        try:
            _check_answered(i, results[i])
            if history_policy == "template":
                results[i] = _rewritten(results[i], messages, template)
        except Exception as error:  # a rewritten past is rendered and tokenized
            if errors is None:
                raise
            found[i] = error
    places = [i for i in added if i not in found]
    failed: dict[int, Exception] = {}

    def follow_all(some: Sequence[int], refused: dict[int, ChatTemplateError] | None) -> list[Any]:
        chosen = [places[k] for k in some]
        return template.follow_batch(
            [results[i].messages for i in chosen],
            [added[i] for i in chosen],
            courses=[results[i].course for i in chosen],
            stops=[results[i].stop for i in chosen],
            errors=refused,
        )

    if errors is None:
        follows = follow_all(range(len(places)), None)
    else:
        refused: dict[int, ChatTemplateError] = {}
        try:
            follows = follow_all(range(len(places)), refused)
        except Exception:  # in one of the rows: a tokenizer stumbles over anything but text
            refused = {}
            follows = by_row(lambda some: follow_all(some, None), len(places), failed.__setitem__)
        failed.update(refused)
    for k, (i, follow) in enumerate(zip(places, follows, strict=True)):
        if k in failed:
            found[i], results[i] = failed[k], transcripts[i]
            continue
        transcript, ids, text = results[i], follow.ids, follow.text
        if not transcript.closed:  # another environment left the turn open, or the past was written anew
            try:
                suffix = template.close(transcript.messages).suffix(transcript.stop)
            except ChatTemplateError as error:
                if errors is None:
                    raise
                found[i], results[i] = error, transcripts[i]
                continue
            ids, text = [*suffix.ids, *ids], suffix.text + text
        results[i] = transcript.appended(ids, added[i], text)
    if errors is not None:
        errors.update(found)
    return results


def _check_answered(row: int, transcript: Transcript) -> None:
    if transcript.ended is None:
        raise BridgeError(
            f"row {row} ends with a message of role {transcript.messages[-1]['role']!r} and waits for the policy: "
            f"messages are appended after an answer."
        )


def _rewritten(transcript: Transcript, new: list[Message], template: ChatTemplate) -> Transcript:
    """The transcript with the past as the template writes it once ``new`` follows: a branch, if that differs."""
    tokens = transcript.token_array.tolist()
    rewritten = template.rewrite(tokens, transcript.spans, transcript.messages, new)
    if rewritten is None:
        return transcript
    text = None if transcript.text is None else template.codec.decode([rewritten.ids])[0]
    return transcript.branched(rewritten.ids, rewritten.spans, text)
