"""Turns of the policy that an environment begins or edits: the policy goes on with words that it did not sample.

Law of this file: no token that was sampled is tokenized again. An edit keeps whole tokens up to the last boundary in front
of it; the characters between that boundary and the edit are tokenized anew, as words that nobody sampled.
"""

from __future__ import annotations

from torchrl_chat.conversation.transcript import Transcript
from torchrl_chat.templates import BridgeError, ChatTemplate
from torchrl_chat.templates.bridge import BY_TEXT
from torchrl_chat.templates.parsing import OPENING_IDS


def answer_text(transcript: Transcript, template: ChatTemplate) -> str:
    """What the policy sampled last, special tokens spelled out, without the token that ended the turn.

    Raises:
        ValueError: the conversation does not end with an answer.
    """
    _check_answered(transcript)
    span = transcript.spans[-1]
    text = template.codec.decode([transcript.token_array[span.start : span.end].tolist()])[0]
    if transcript.stop is not None and transcript.stop != BY_TEXT:
        text = text.removesuffix(template.codec.token_text(transcript.stop))
    return text


def edit(transcript: Transcript, template: ChatTemplate, position: int, words: str) -> Transcript:
    """The conversation with its last answer cut at a position of its text, and ``words`` behind; the turn is open again.

    It is a branch: what was sampled is trained in the sequence that is left.

    Args:
        transcript: a conversation that ends with an answer.
        template: its template.
        position: a position in :func:`answer_text`.
        words: what stands there instead of the rest.
    """
    _check_answered(transcript)
    codec, span = template.codec, transcript.spans[-1]
    ids = transcript.token_array[span.start : span.end].tolist()
    text = codec.decode([ids])[0]
    keep = codec.place_of(ids, position + 1) - 1
    while not text.startswith(kept := codec.decode([ids[:keep]])[0]):  # never within a character
        keep -= 1
    between = text[len(kept) : position] + words
    before = transcript.tokens[: span.start + keep]
    new = codec.encode_continuation([between], after=[int(before[-1])])[0]
    [parsed] = template.parse_batch(
        [[*ids[:keep], *new]], [transcript.course], ["length"], [before[-OPENING_IDS:].tolist()]
    )
    whole = None if transcript.text is None else codec.decode([[*before.tolist(), *new]])[0]
    return transcript.reopened(keep, new, parsed.message, whole)


def begin(transcript: Transcript, template: ChatTemplate, words: str) -> Transcript:
    """The conversation with a further turn of the policy, begun with ``words``.

    Raises:
        BridgeError: the chat template does not open a turn of the policy behind one of its own.
        ValueError: the conversation does not end with an answer.
    """
    _check_answered(transcript)
    codec = template.codec
    opening = template.opening_after(transcript.messages, transcript.course)
    suffix = "" if transcript.closed else template.close(transcript.messages).suffix(transcript.stop).text
    stop = transcript.stop if suffix == "" and not transcript.closed else None
    opened = template.suffix_ids(stop, suffix + opening)
    if not opened:
        raise BridgeError("the chat template opens no turn of the policy behind one of its own.")
    new = codec.encode_continuation([words], after=[opened[-1]])[0]
    message = {"role": transcript.course.policy, "content": words}
    text = "" if transcript.text is None else suffix + opening + words
    return transcript.begun([*opened, *new], len(new), message, text)


def _check_answered(transcript: Transcript) -> None:
    if transcript.ended is None or not transcript.spans:
        raise ValueError("the conversation waits for the policy: only an answer can be edited or gone on from.")
