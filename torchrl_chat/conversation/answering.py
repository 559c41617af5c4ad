"""What a policy answered, entered into the ledgers; one row that cannot be read loses no other.

Law of this file: sampled ids win. Where a turn has ids, its text is a view of them and is not read; where it has none, the
text is tokenized once, here, and never again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from torchrl_chat.conversation.transcript import Transcript
from torchrl_chat.conversation.turn import Errors, Turn, by_row, check_turns
from torchrl_chat.templates import ChatTemplate, ChatTemplateError
from torchrl_chat.templates.reading import OPENING_IDS


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
        >>> [transcript] = answer([transcript], [Turn(ids=torch.tensor([19, 2]))], template)
    """
    found: Errors = {} if errors is None else errors
    results = list(transcripts)
    asked = [i for i, turn in enumerate(turns) if turn is not None and i not in found]
    if template is None:
        for i in asked:
            results[i] = _said(transcripts[i], str(turns[i].text))  # type: ignore[union-attr]
        return results
    sampled = _tokenized(transcripts, turns, asked, template, found)
    check_turns(sampled, template.codec.vocab_size, found)
    if errors is None and found:
        raise found[min(found)]
    places, cut = [], []
    for i in asked:
        turn = sampled[i]
        if i not in found and turn is not None and (turn.limit is None or turn.limit > 0):
            places.append(i)
            cut.append(turn.cut())
    read = _parsed([transcripts[i] for i in places], cut, places, template, found)
    for i, turn, parsed in zip(places, cut, read, strict=True):
        if parsed is None:
            continue
        try:
            results[i] = _entered(transcripts[i], turn, parsed, template)
        except ChatTemplateError as error:
            found[i] = error
    if errors is None and found:
        raise found[min(found)]
    return results


def prompt_end(transcript: Transcript) -> list[int]:
    """The last ids in front of the policy's turn: they tell whether the prompt has opened the reasoning."""
    return transcript.tokens[: transcript.open][-OPENING_IDS:].tolist()


def _said(transcript: Transcript, text: str) -> Transcript:
    """The conversation with an answer that has no tokens."""
    message = {"role": transcript.course.policy, "content": text}
    return transcript.sampled(torch.empty(0, dtype=torch.int64), None, message, ended=True)


def _tokenized(
    transcripts: Sequence[Transcript],
    turns: Sequence[Turn | None],
    asked: Sequence[int],
    template: ChatTemplate,
    errors: Errors,
) -> list[Turn | None]:
    """The turns, each with ids: those of a text continue its prompt."""
    places = [i for i in asked if turns[i].ids is None]  # type: ignore[union-attr]
    if not places:
        return list(turns)
    texts = [str(turns[i].text) for i in places]  # type: ignore[union-attr]
    after = [int(transcripts[i].tokens[-1]) if len(transcripts[i]) else None for i in places]

    def encode(some: Sequence[int]) -> list[list[int]]:
        return template.codec.encode_continuation([texts[k] for k in some], [after[k] for k in some])

    encoded = by_row(encode, len(places), lambda k, error: errors.setdefault(places[k], error))
    new = list(turns)
    for i, ids in zip(places, encoded, strict=True):
        new[i] = None if ids is None else replace(turns[i], ids=torch.tensor(ids, dtype=torch.int64))  # type: ignore[type-var]
    return new


def _parsed(
    transcripts: Sequence[Transcript],
    turns: Sequence[Turn],
    places: Sequence[int],
    template: ChatTemplate,
    errors: Errors,
) -> list[Any]:
    """The turns as messages; ``None`` for one that cannot be read."""
    # An open turn is read as a whole: its words, begun by the environment, and what the policy sampled behind them.
    whole = [
        [*([] if t.open is None else t.tokens[t.open :].tolist()), *turn.ids.tolist()]  # type: ignore[union-attr]
        for t, turn in zip(transcripts, turns, strict=True)
    ]
    prompts = [prompt_end(t) for t in transcripts] if template.parser.openings else None

    def parse(some: Sequence[int]) -> list[Any]:
        return template.parse_batch(
            [whole[k] for k in some],
            [transcripts[k].course for k in some],
            [turns[k].finish_reason for k in some],
            None if prompts is None else [prompts[k] for k in some],
        )

    return by_row(parse, len(turns), lambda k, error: errors.setdefault(places[k], error))


def _entered(transcript: Transcript, turn: Turn, parsed: Any, template: ChatTemplate) -> Transcript:
    ids, suffix, text = turn.ids, parsed.ending, ""
    assert ids is not None
    if transcript.text is not None:
        text = parsed.text if transcript.open is None else template.codec.decode([ids.tolist()])[0]
        text += "" if suffix is None else suffix.text
    return transcript.sampled(
        ids,
        turn.log_probs,
        parsed.message,
        ended=parsed.ended,
        close=None if suffix is None else suffix.ids,  # nothing can follow this turn; it may well be the last
        text=text,
        stop=parsed.stop,
        versions=turn.versions,
    )
