"""What the policy wrote, read from a TensorDict: sampled ids, their log-probs, or a text.

Law of this file: sampled ids win. Where a policy hands ids, its text and its ``History`` are views of
them and are not read; where it hands none, its text is tokenized once, here, and never again.

Functions with an argument ``faults`` put what is wrong with one row's answer there, by row, and go on with the others; what
is wrong with the whole (a column that is missing, padded, or of another conversation) is raised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase

from torchrl_chat import columns
from torchrl_chat.columns import read_field
from torchrl_chat.messages import Message, content_text, half_character
from torchrl_chat.templates import ChatTemplate
from torchrl_chat.transcript import Transcript

_ROUNDING = 1e-3  # how far above 0 a log-prob may be: the float32 rounding of logits that are as large as 1e4
Faults = dict[int, Exception]
"""What is wrong with the answers of single rows, by row."""

_NOTHING = torch.empty(0, dtype=torch.int64)


class ResponseError(ValueError):
    """A policy's response cannot enter the ledger; the text names the row, the key and the value."""


def read_tokens(
    td: TensorDictBase, transcripts: Sequence[Transcript], batch_size: torch.Size, faults: Faults
) -> list[torch.Tensor] | None:
    """The sampled ids of each row, from ``("tokens", "response")`` or ``("tokens", "full")``; none where there is a fault."""
    tokens = td.get("tokens", None)
    if tokens is None:
        return None
    padded = read_field(tokens, "padded", batch_size)
    if padded is not None and any(padded):
        raise ResponseError(
            "('tokens', 'padded') is true: the ledger takes the sampled ids themselves. Give the policy "
            "wrapper pad_output=False."
        )
    rows = read_field(tokens, "response", batch_size)
    if rows is not None:
        ids = _to_cpu([_as_ids(value, i, ("tokens", "response"), faults) for i, value in enumerate(rows)])
        _check_fulls(tokens, ids, transcripts, batch_size, faults)
        return ids
    rows = read_field(tokens, "full", batch_size)
    if rows is None:
        return None
    fulls = _to_cpu([_as_ids(value, i, ("tokens", "full"), faults) for i, value in enumerate(rows)])
    responses = []
    for i, (full, transcript) in enumerate(zip(fulls, transcripts, strict=True)):
        if i in faults:
            responses.append(_NOTHING)
            continue
        if not torch.equal(full[: len(transcript)], transcript.tokens):
            raise ResponseError(
                f"row {i}: ('tokens', 'full') does not start with the prompt; "
                + _first_difference(transcript.tokens, full)
            )
        responses.append(full[len(transcript) :])
    return responses


def _check_fulls(
    tokens: Any,
    ids: Sequence[torch.Tensor],
    transcripts: Sequence[Transcript],
    batch_size: torch.Size,
    faults: Faults,
) -> None:
    """``("tokens", "full")`` beside a response must be the prompt and that response: losses read it."""
    fulls = read_field(tokens, "full", batch_size)
    for i, full in enumerate(fulls or ()):
        if not isinstance(full, torch.Tensor) or i in faults:
            continue
        prompt, row = len(transcripts[i]), ids[i]
        if len(full) != prompt + len(row) or not torch.equal(full[prompt:].cpu(), row):
            raise ResponseError(
                f"row {i}: ('tokens', 'full') has {len(full)} ids and does not end with the {len(row)} of "
                f"('tokens', 'response') after the {prompt} of the prompt."
            )


def read_log_probs(
    td: TensorDictBase, ids: Sequence[torch.Tensor], batch_size: torch.Size, faults: Faults
) -> list[torch.Tensor | None]:
    """The log-probs of the sampled ids, from ``("log_probs", "response")``; ``None`` where absent.

    A row of which :func:`bad_log_probs` has something to say has a fault, and none.
    """
    rows = read_field(td.get("log_probs", None), "response", batch_size)
    if rows is None:
        return [None] * len(ids)
    present = [row if isinstance(row, torch.Tensor) else None for row in rows]
    moved = iter(_to_cpu([row.detach().float() for row in present if row is not None]))
    log_probs = [None if row is None else next(moved) for row in present]
    for i, reason in enumerate(bad_log_probs(log_probs, ids)):
        if reason is not None and i not in faults:
            faults[i] = ResponseError(f"row {i}: {reason}")
            log_probs[i] = None
    return log_probs


def bad_log_probs(log_probs: Sequence[torch.Tensor | None], ids: Sequence[torch.Tensor]) -> list[str | None]:
    """What is wrong with the log-probs of each row.

    A sampled token had a probability above 0 and of at most 1. A log-prob that says something else (NaN, an infinity, above
    0) would be the ratio of a loss, and one of them makes every weight NaN.

    Args:
        log_probs: float (R,) each, on the CPU; ``None`` where the policy reported none.
        ids: the sampled ids, int64 (R,) each.

    Returns:
        for each row the reason, or ``None`` where nothing is wrong.

    Example:
        >>> bad_log_probs([torch.tensor([-0.5]), torch.tensor([float("nan")])], [torch.tensor([7])] * 2)[0] is None
        True
    """
    found: list[str | None] = [
        f"('log_probs', 'response') has {len(row)} values for {len(sampled)} sampled ids."
        if row is not None and len(row) != len(sampled)
        else None
        for row, sampled in zip(log_probs, ids, strict=True)
    ]
    rows = [i for i, row in enumerate(log_probs) if row is not None and len(row) and found[i] is None]
    if not rows:
        return found
    flat = torch.cat([row for row in log_probs if row is not None]).numpy()  # numpy: as for the ids
    if float(flat.min()) > -float("inf") and float(flat.max()) <= _ROUNDING:  # both are NaN where one value is
        return found
    for i in rows:
        for place, value in enumerate(log_probs[i].tolist()):  # type: ignore[union-attr]
            if not -float("inf") < value <= _ROUNDING:
                found[i] = (
                    f"('log_probs', 'response') has {value:g} at position {place}, for the id {int(ids[i][place])}: the "
                    "log-prob of a sampled token is a finite number, and at most 0."
                )
                break
    return found


def read_finish_reasons(td: TensorDictBase, batch_size: torch.Size) -> list[str | None]:
    """Why each row's policy stopped, from ``"finish_reason"``: ``"stop"``, ``"length"`` ...; ``None`` where absent."""
    column = td.get("finish_reason", None)
    if column is None:
        return [None] * batch_size.numel()
    return columns.read_objects(column, batch_size)


def read_text(
    td: TensorDictBase, prompts: Sequence[str], batch_size: torch.Size, faults: Faults
) -> list[str] | None:
    """The response text of each row, from ``("text", "response")`` or ``("text", "full")``; empty where there is a fault.

    Args:
        td: what the policy wrote.
        prompts: the text that each row's policy was shown.
        batch_size: the environment's.
        faults: takes what is wrong with single rows.
    """
    text = td.get("text", None)
    rows = read_field(text, "response", batch_size)
    if rows is not None:
        return [_as_text(value, i, ("text", "response"), faults) for i, value in enumerate(rows)]
    rows = read_field(text, "full", batch_size)
    if rows is None:
        return None
    responses = []
    for i, (value, prompt) in enumerate(zip(rows, prompts, strict=True)):
        full = _as_text(value, i, ("text", "full"), faults)
        if i in faults:
            responses.append("")
            continue
        if not full.startswith(prompt):
            raise ResponseError(
                f"row {i}: ('text', 'full') does not start with the prompt: {full[:60]!r} against {prompt[:60]!r}."
            )
        responses.append(_as_text(full[len(prompt) :], i, ("text", "full"), faults))
    return responses


def read_history(
    td: TensorDictBase,
    transcripts: Sequence[Transcript],
    batch_size: torch.Size,
    policy_role: str,
    faults: Faults,
) -> list[str] | None:
    """The response of each row, from ``("history", "response")`` or the last of ``("history", "full")``."""
    history = td.get("history", None)
    for key in ("response", "full"):
        rows = read_field(history, key, batch_size)
        if rows is None:
            continue
        responses = []
        for i, (row, transcript) in enumerate(zip(rows, transcripts, strict=True)):
            if row is None:
                responses.append(_as_text(None, i, ("history", key), faults))
                continue
            messages = history_messages(row, 0)
            expected = 1 if key == "response" else len(transcript.messages) + 1
            if len(messages) != expected or messages[-1]["role"] != policy_role:
                raise ResponseError(
                    f"row {i}: ('history', {key!r}) has the roles {[m['role'] for m in messages]}: expected "
                    f"{expected} message(s), the last of role {policy_role!r}."
                )
            responses.append(_as_text(messages[-1]["content"], i, ("history", key), faults))
        return responses
    return None


def check_texts(td: TensorDictBase, transcripts: Sequence[Transcript], batch_size: torch.Size) -> None:
    """Refuse a ``("text", "prompt")`` that was edited: the ledger is append-only."""
    rows = read_field(td.get("text", None), "prompt", batch_size)
    for i, (text, transcript) in enumerate(zip(rows or (), transcripts, strict=False)):
        if transcript.text is not None and isinstance(text, str) and text != transcript.text:
            raise ResponseError(
                f"row {i}: ('text', 'prompt') was edited: it ends with {text[-60:]!r}, the ledger with "
                f"{transcript.text[-60:]!r}. Append messages with env.append_messages instead."
            )


def check_history(row: Any, transcript: Transcript, index: int) -> None:
    """Refuse a ``("history", "prompt")`` whose earlier messages were edited: the ledger is append-only."""
    shown, _ = transcript.shown if isinstance(transcript.shown, tuple) else ((), None)
    entries = columns.bare(row).unbind(0)
    for at, (entry, message) in enumerate(zip(entries, transcript.messages, strict=False)):
        if at < len(shown) and entry is shown[at]:
            continue
        content = columns.read_objects(entry.get("content"), torch.Size([1]))[0]
        if content != content_text(message):
            raise ResponseError(
                f"row {index}: message {at} of ('history', 'prompt') was edited: {content!r:.80} is "
                f"{content_text(message)!r:.80} in the ledger, which is append-only."
            )


def history_messages(row: Any, start: int) -> list[Message]:
    """The messages of one row's ``History``, from position ``start`` on."""
    row = columns.bare(row)
    entries = row.unbind(0)[start:] if row.batch_dims else [row]
    return [{"role": entry.get("role").data, "content": entry.get("content").data} for entry in entries]


def tokenize(
    texts: Sequence[str], transcripts: Sequence[Transcript], template: ChatTemplate, faults: Faults
) -> list[torch.Tensor]:
    """The ids of responses that came as text: tokenized once, as a continuation of their prompts."""
    places = [i for i in range(len(texts)) if i not in faults]
    after = [int(transcripts[i].tokens[-1]) for i in places]

    def encode(some: Sequence[int]) -> list[list[int]]:
        return template.codec.encode_continuation([texts[places[k]] for k in some], [after[k] for k in some])

    encoded = by_row(encode, len(places), lambda k, error: faults.setdefault(places[k], error))
    ids = [_NOTHING] * len(texts)
    for i, row in zip(places, encoded, strict=True):
        ids[i] = _NOTHING if row is None else torch.tensor(row, dtype=torch.int64)
    return ids


def by_row(
    work: Callable[[Sequence[int]], list[Any]], count: int, failed: Callable[[int, Exception], Any]
) -> list[Any]:
    """What a function returns for a batch; where it raises, for each row by itself.

    Args:
        work: takes the numbers of some rows, and returns as many results.
        count: how many rows there are.
        failed: is told of a row whose own call raises, and of the error; its result is ``None``.
    """
    try:
        return work(range(count))
    except Exception:  # whatever a template or a tokenizer stumbles over in one row, the others are not lost
        results: list[Any] = [None] * count
        for k in range(count):
            try:
                [results[k]] = work([k])
            except Exception as error:
                failed(k, error)
        return results


def read_limits(td: TensorDictBase, batch_size: torch.Size) -> list[int] | None:
    """How many tokens each row may sample in this turn, from ``"tokens_left"``, where a budget wrote it."""
    column = td.get("tokens_left", None)
    return None if column is None else column.reshape(batch_size.numel()).tolist()


def cut(
    limits: Sequence[int],
    ids: Sequence[torch.Tensor],
    log_probs: Sequence[torch.Tensor | None],
    reasons: Sequence[str | None],
) -> tuple[list[torch.Tensor], list[torch.Tensor | None], list[str | None]]:
    """Answers without what was sampled beyond the limits, as if the policy had been stopped there."""
    late = [len(row) > limit for row, limit in zip(ids, limits, strict=True)]
    return (
        [row[:limit] for row, limit in zip(ids, limits, strict=True)],
        [None if row is None else row[:limit] for row, limit in zip(log_probs, limits, strict=True)],
        ["length" if over else reason for over, reason in zip(late, reasons, strict=True)],
    )


def check_ids(
    ids: Sequence[torch.Tensor],
    vocab_size: int,
    limits: Sequence[int] | None = None,
    faults: Faults | None = None,
) -> None:
    """Refuse empty responses (but where nothing may be sampled) and ids that the tokenizer does not have.

    Args:
        ids: the sampled ids of each row.
        vocab_size: how many ids there are.
        limits: how many tokens each row may sample, where that is limited.
        faults: takes what is wrong with single rows; those that stand in it already are not looked at.

    Raises:
        ResponseError: without ``faults``: naming the first such row.
    """
    found: Faults = {} if faults is None else faults
    for i, row in enumerate(ids):
        if not len(row) and i not in found and (limits is None or limits[i] > 0):
            found[i] = ResponseError(
                f"row {i}: the response is empty. A policy that has nothing to say samples its end-of-turn token."
            )
    if any(map(len, ids)):
        flat = torch.cat(list(ids)).numpy()  # numpy: no thread pool to wake for a few thousand ids
        if int(flat.min()) < 0 or int(flat.max()) >= vocab_size:
            for i, row in enumerate(ids):
                try:
                    if len(row):
                        check_row(row.tolist(), vocab_size, i)
                except ResponseError as error:
                    found.setdefault(i, error)
    if faults is None and found:
        raise found[min(found)]


def check_row(ids: Sequence[int], vocab_size: int, row: int = 0) -> None:
    """:func:`check_ids` for one row that is a list of integers, of any size, and not empty.

    Raises:
        ResponseError: naming the row and the first such id.
    """
    if min(ids) >= 0 and max(ids) < vocab_size:
        return
    position, value = next((k, value) for k, value in enumerate(ids) if not 0 <= value < vocab_size)
    raise ResponseError(
        f"row {row}: the response has id {value} at position {position}, outside the vocabulary of {vocab_size} tokens."
    )


def check_prompts(
    td: TensorDictBase,
    transcripts: Sequence[Transcript],
    written: Sequence[Transcript],
    batch_size: torch.Size,
    adopt: bool,
) -> list[Transcript]:
    """Compare the prompt that the policy reports with the ledger's.

    torchrl's wrappers render and tokenize on their own in history and text mode, and report what they
    used in ``("tokens", "prompt")``. Ids that differ from the ledger's mean that the policy did not see
    what the ledger holds.

    Args:
        td: what the policy wrote.
        transcripts: the ledger of each row.
        written: the ledger as the environment last wrote it, where a torchrl transform has since added
            messages to the history alone: the prompt of before is then nobody's report.
        batch_size: the environment's.
        adopt: take the policy's ids as the truth from here on, instead of raising.

    Raises:
        ResponseError: the prompts differ; the first difference is shown.
    """
    rows = read_field(td.get("tokens", None), "prompt", batch_size)
    checked = list(transcripts)
    if rows is None:
        return checked
    for i, (row, transcript) in enumerate(zip(rows, transcripts, strict=True)):
        if not isinstance(row, torch.Tensor):
            continue
        held = transcript.tokens
        if row.data_ptr() == held.data_ptr() and row.shape == held.shape:
            continue
        reported = row.detach().cpu()
        if torch.equal(reported, held) or (
            written[i] is not transcript and torch.equal(reported, written[i].tokens)
        ):
            continue
        if not adopt:
            raise ResponseError(
                f"row {i}: the policy reports a prompt in ('tokens', 'prompt') that is not the ledger's; "
                + _first_difference(held, reported)
                + " It rendered or tokenized the conversation on its own. Let it read ('tokens', 'prompt'), or "
                "pass on_prompt_mismatch='adopt' to take what it saw as the truth."
            )
        checked[i] = transcript.adopted(reported)
    return checked


def _first_difference(expected: torch.Tensor, got: torch.Tensor) -> str:
    shared = min(len(expected), len(got))
    differs = (expected[:shared] != got[:shared]).nonzero()
    at = int(differs[0]) if len(differs) else shared
    return (
        f"expected {len(expected)} ids, got {len(got)}; the first difference is at position {at}: "
        f"expected {expected[at : at + 5].tolist()}, got {got[at : at + 5].tolist()}."
    )


def _as_ids(value: Any, row: int, key: tuple[str, str], faults: Faults) -> torch.Tensor:
    if value is None:
        faults[row] = ResponseError(f"row {row}: {key} is missing, though other rows have it.")
        return _NOTHING
    if not isinstance(value, torch.Tensor):
        value = torch.as_tensor(value.tolist() if hasattr(value, "tolist") else value)
    if value.dtype != torch.int64:
        if value.is_floating_point() and value.numel():
            raise ResponseError(f"row {row}: {key} has dtype {value.dtype}, expected token ids (int64).")
        value = value.to(torch.int64)
    if value.dim() != 1:
        if value.numel() != value.shape[-1:].numel():
            raise ResponseError(f"row {row}: {key} has shape {tuple(value.shape)}, expected (tokens,).")
        value = value.reshape(-1)
    return value


def _as_text(value: Any, row: int, key: tuple[str, str], faults: Faults) -> str:
    value = getattr(value, "data", value)
    if not isinstance(value, str):
        wrong = f"is a {type(value).__name__}, expected a string"
    elif not value:
        wrong = "is empty: the policy wrote nothing"
    elif (at := half_character(value)) is not None:
        wrong = f"has half a surrogate pair, {value[at]!a}, at position {at}: no text that can be encoded"
    else:
        return value
    faults[row] = ResponseError(f"row {row}: {key} {wrong}.")
    return ""


def _to_cpu(rows: list[torch.Tensor]) -> list[torch.Tensor]:
    """Rows on the CPU, with one transfer for all of them."""
    away = [row for row in rows if row.device.type != "cpu"]
    if not away:
        return rows
    moved = iter(torch.cat(away).cpu().split([len(row) for row in away]))
    return [row if row.device.type == "cpu" else next(moved) for row in rows]
