"""What a policy answered, entered into the ledgers; one row that cannot be read loses no other.

Law of this file: sampled ids win. Where a turn has ids, its text is a view of them and is not read; where it has none, the
text is tokenized once, here, and never again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from torchrl_chat.conversation.transcript import Transcript, Versions
from torchrl_chat.conversation.turn import Arrays, Errors, Turn, by_row, check_turns
from torchrl_chat.templates import ChatTemplate, ChatTemplateError
from torchrl_chat.templates.parsing import OPENING_IDS


def answer(
    transcripts: Sequence[Transcript],
    turns: Sequence[Turn | None],
    template: ChatTemplate | None,
    errors: Errors | None = None,
) -> list[Transcript]:
    """The conversations with what the policy did, and the end of its turn.

    Args:
        transcripts: the conversations, which wait for the policy.
        turns: what it did in each; ``None`` for a row that is left as it is, as is one that might sample nothing.
        template: their chat template; without one, answers are texts and have no tokens.
        errors: takes what is wrong with single rows, by row; those that stand in it already are left as they are.

    Returns:
        the new transcripts; that of a row with an error is the old one.

    Raises:
        ResponseError: without ``errors``: the response is empty, has an id that the tokenizer does not have, or log-probs
            that are none.
        ChatTemplateError: without ``errors``: the answer cannot be read.

    Example:
        >>> import torch
        >>> from torchrl_chat import ChatTemplate
        >>> from torchrl_chat.conversation import Transcript, Turn
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> template = ChatTemplate(tokenizer)
        >>> messages = [{"role": "user", "content": "2 + 2?"}]
        >>> transcript = Transcript.start(template.render(messages), messages)
        >>> [transcript] = answer([transcript], [Turn(ids=torch.tensor([19, 2]))], template)
    """
    found: Errors = {} if errors is None else errors
    results = list(transcripts)
    given = {i: turn for i, turn in enumerate(turns) if turn is not None and i not in found}
    if template is None:
        for i, turn in given.items():
            results[i] = _said(transcripts[i], str(turn.text))
        return results
    given = _tokenized(transcripts, given, template, found)
    ids, log_probs = check_turns(given, template.codec.vocab_size, found)
    if errors is None and found:
        raise found[min(found)]
    asked = {i: turn for i, turn in given.items() if i not in found and turn.may_sample}
    for i, turn in asked.items():
        if turn.limit is not None and len(ids[i]) > turn.limit:
            asked[i], ids[i] = turn.cut(), ids[i][: turn.limit]
            if i in log_probs:
                log_probs[i] = log_probs[i][: turn.limit]
    for i, parsed in _parsed(transcripts, asked, ids, template, found).items():
        try:
            results[i] = _entered(transcripts[i], ids[i], log_probs.get(i), asked[i].versions, parsed, template)
        except ChatTemplateError as error:
            found[i] = error
    if errors is None and found:
        raise found[min(found)]
    return results


def prompt_end(transcript: Transcript) -> list[int]:
    """The last ids in front of the policy's turn: they tell whether the prompt has opened the reasoning."""
    return transcript.token_array[: transcript.open][-OPENING_IDS:].tolist()


def _said(transcript: Transcript, text: str) -> Transcript:
    """The conversation with an answer that has no tokens."""
    message = {"role": transcript.course.policy, "content": text}
    return transcript.sampled(torch.empty(0, dtype=torch.int64), None, message, ended=True)


def _tokenized(
    transcripts: Sequence[Transcript], turns: dict[int, Turn], template: ChatTemplate, errors: Errors
) -> dict[int, Turn]:
    """The turns, each with ids: those of a text continue its prompt."""
    places = [i for i, turn in turns.items() if turn.ids is None]
    if not places:
        return turns
    texts = [str(turns[i].text) for i in places]
    after = [int(transcripts[i].token_array[-1]) if len(transcripts[i]) else None for i in places]

    def encode(some: Sequence[int]) -> list[list[int]]:
        return template.codec.encode_continuation([texts[k] for k in some], [after[k] for k in some])

    encoded = by_row(encode, len(places), lambda k, error: errors.setdefault(places[k], error))
    new = dict(turns)
    for i, ids in zip(places, encoded, strict=True):
        if ids is None:
            del new[i]
        else:
            new[i] = dataclasses.replace(turns[i], ids=torch.tensor(ids, dtype=torch.int64))
    return new


def _parsed(
    transcripts: Sequence[Transcript],
    turns: dict[int, Turn],
    ids: Arrays,
    template: ChatTemplate,
    errors: Errors,
) -> dict[int, Any]:
    """The turns as messages, those that can be read."""
    places = list(turns)
    whole = [
        ids[i].tolist() if transcripts[i].open is None else _begun(transcripts[i]) + ids[i].tolist() for i in places
    ]
    prompts = [prompt_end(transcripts[i]) for i in places] if template.parser.openings else None

    def parse(some: Sequence[int]) -> list[Any]:
        return template.parse_batch(
            [whole[k] for k in some],
            [transcripts[places[k]].course for k in some],
            [turns[places[k]].finish_reason for k in some],
            None if prompts is None else [prompts[k] for k in some],
        )

    read = by_row(parse, len(places), lambda k, error: errors.setdefault(places[k], error))
    return {i: parsed for i, parsed in zip(places, read, strict=True) if parsed is not None}


def _begun(transcript: Transcript) -> list[int]:
    """The words of a turn that the environment has begun: it is read as a whole."""
    return transcript.token_array[transcript.open :].tolist()


def _entered(
    transcript: Transcript,
    ids: np.ndarray,
    log_probs: np.ndarray | None,
    versions: Versions,
    parsed: Any,
    template: ChatTemplate,
) -> Transcript:
    suffix, text = parsed.ending, ""
    if transcript.text is not None:
        text = parsed.text if transcript.open is None else template.codec.decode([ids.tolist()])[0]
        text += "" if suffix is None else suffix.text
    return transcript.sampled(
        ids,
        log_probs,
        parsed.message,
        ended=parsed.ended,
        close=None if suffix is None else suffix.ids,  # nothing can follow this turn; it may well be the last
        text=text,
        stop=parsed.stop,
        versions=versions,
    )
