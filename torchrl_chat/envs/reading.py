"""What a policy wrote, read from a TensorDict into values: each column once, a :class:`~torchrl_chat.conversation.Turn` a row.

Law of this file: sampled ids win. Where a policy hands ids, its text and its ``History`` are views of them and are not read.

What is wrong with one row's answer goes to ``faults``, by row, and the others go on; what is wrong with the whole (a column
that is missing, padded, or of another conversation) is raised.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Literal

import torch
from tensordict import TensorDictBase

from torchrl_chat import columns
from torchrl_chat.columns import read_field
from torchrl_chat.conversation import ResponseError, Transcript, Turn
from torchrl_chat.conversation.transcript import Versions
from torchrl_chat.conversation.turn import Errors
from torchrl_chat.messages import Message, content_text, half_character
from torchrl_chat.templates import ChatTemplate

VERSIONS_KEY = "weight_versions"
"""Where a policy says which weights sampled a row: an int, or spans ``[(start, version), ...]`` of the sampled ids."""

_NOTHING = torch.empty(0, dtype=torch.int64)


class Reader:
    """Reads the turns of one step.

    Args:
        td: what the policy wrote.
        held: the ledger of each row, which the policy has answered.
        goes: which rows are stepped; of the others nothing is read.
        template: the chat template; ``None`` where the ledgers hold no tokens.
        faults: takes what is wrong with single rows.
        adopt: take the prompt that a policy reports as the truth, instead of refusing another than the ledger's.

    Attributes:
        held: the ledgers, with the prompts that were adopted.
    """

    def __init__(
        self,
        td: TensorDictBase,
        held: Sequence[Transcript],
        goes: Sequence[bool],
        template: ChatTemplate | None,
        faults: Errors,
        adopt: bool = False,
    ):
        self.td = td
        self.held = list(held)
        self.goes = goes
        self.template = template
        self.faults = faults
        self.adopt = adopt

    def turns(self, mode: Literal["history", "text", "tokens"]) -> list[Turn | None]:
        """The turn of each row; ``None`` for rows that are not stepped, or have a fault.

        Args:
            mode: where a policy that hands no ids writes its answer.

        Raises:
            KeyError: there is no response.
            ResponseError: the response is not one to these prompts, or is padded, or of a wrong form.
        """
        if not any(self.goes):
            return [None] * len(self.goes)
        ids = None if self.template is None else self._ids()
        texts = self._texts(mode) if ids is None else None
        nothing = [None] * len(self.goes)
        rest: tuple[Sequence[Any], ...] = (nothing, nothing, nothing, [()] * len(nothing))
        if self.template is not None:
            rest = (self._log_probs(), *self._ends())
        return [
            Turn(row, scores, text, reason, limit, versions) if going and i not in self.faults else None
            for i, (going, row, text, scores, reason, limit, versions) in enumerate(
                zip(self.goes, ids or nothing, texts or nothing, *rest, strict=True)
            )
        ]

    def _rows(self, container: Any, key: str) -> list[Any] | None:
        """A field's rows; ``None`` where it is not there, or no row that is stepped has it."""
        rows = read_field(container, key, self.td.batch_size)
        if rows is None or all(row is None for row, going in zip(rows, self.goes, strict=True) if going):
            return None
        return rows

    # ------------------------------------------------------------------ ids
    def check_prompts(self, written: Sequence[Transcript]) -> None:
        """Compare the prompt that the policy reports with the ledger's.

        torchrl's wrappers render and tokenize on their own in history and text mode, and report what they
        used in ``("tokens", "prompt")``. Ids that differ from the ledger's mean that the policy did not see
        what the ledger holds.

        Args:
            written: the ledger as the environment last wrote it, where a torchrl transform has since added
                messages to the history alone: the prompt of before is then nobody's report.

        Raises:
            ResponseError: the prompts differ, and are not adopted; the first difference is shown.
        """
        for i, row in enumerate(self._rows(self.td.get("tokens", None), "prompt") or ()):
            held = self.held[i].tokens
            if not self.goes[i] or not isinstance(row, torch.Tensor):
                continue
            if row.data_ptr() == held.data_ptr() and row.shape == held.shape:
                continue
            reported = row.detach().cpu()
            if written[i] is self.held[i] or not torch.equal(reported, written[i].tokens):
                self._compare(i, reported, "('tokens', 'prompt')")

    def _compare(self, i: int, reported: torch.Tensor, key: str) -> None:
        """Refuse a prompt that is not the ledger's, or adopt it."""
        held = self.held[i]
        if torch.equal(reported, held.tokens):
            return
        if not self.adopt:
            raise ResponseError(
                f"row {i}: the policy reports a prompt in {key} that is not the ledger's; "
                + _first_difference(held.tokens, reported)
                + " It rendered or tokenized the conversation on its own. Let it read ('tokens', 'prompt'), or "
                "pass on_prompt_mismatch='adopt' to take what it saw as the truth."
            )
        try:
            self.held[i] = held.adopted(reported)
        except ValueError as error:
            raise ResponseError(f"row {i}: {error}") from error

    def _ids(self) -> list[torch.Tensor] | None:
        """The sampled ids, from ``("tokens", "response")`` or ``("tokens", "full")``; none where there is a fault."""
        tokens = self.td.get("tokens", None)
        if tokens is None:
            return None
        padded = read_field(tokens, "padded", self.td.batch_size)
        if padded is not None and any(padded):
            raise ResponseError(
                "('tokens', 'padded') is true: the ledger takes the sampled ids themselves. Give the policy "
                "wrapper pad_output=False."
            )
        rows, fulls = self._rows(tokens, "response"), self._rows(tokens, "full")
        if rows is None and fulls is None:
            return None
        whole = [] if fulls is None else self._read_ids(fulls, "full", quiet=rows is not None)
        if rows is None:
            return [self._behind_prompt(i, full) for i, full in enumerate(whole)]
        ids = self._read_ids(rows, "response")
        for i, full in enumerate(whole):  # losses read it
            if not self.goes[i] or i in self.faults or fulls is None or fulls[i] is None:
                continue
            count, said = len(self.held[i]), len(ids[i])
            if not torch.equal(full[len(full) - said :], ids[i]) or (len(full) != count + said and not self.adopt):
                raise ResponseError(
                    f"row {i}: ('tokens', 'full') has {len(full)} ids and does not end with the {said} of "
                    f"('tokens', 'response') after the {count} of the prompt."
                )
            self._compare(i, full[: len(full) - said], "('tokens', 'full')")
        return ids

    def _read_ids(self, rows: Sequence[Any], name: str, quiet: bool = False) -> list[torch.Tensor]:
        key = ("tokens", name)
        return _to_cpu(
            [
                _NOTHING if not going or (quiet and value is None) else _as_ids(value, i, key, self.faults)
                for i, (value, going) in enumerate(zip(rows, self.goes, strict=True))
            ]
        )

    def _behind_prompt(self, i: int, full: torch.Tensor) -> torch.Tensor:
        if i in self.faults or not self.goes[i]:
            return _NOTHING
        held = self.held[i].tokens
        if not torch.equal(full[: len(held)], held):
            raise ResponseError(
                f"row {i}: ('tokens', 'full') does not start with the prompt; " + _first_difference(held, full)
            )
        return full[len(held) :]

    def _log_probs(self) -> Sequence[torch.Tensor | None]:
        rows = self._rows(self.td.get("log_probs", None), "response") or [None] * len(self.goes)
        scored = [
            i for i, (row, going) in enumerate(zip(rows, self.goes, strict=True)) if going and torch.is_tensor(row)
        ]
        found: list[torch.Tensor | None] = [None] * len(rows)
        for i, row in zip(scored, _to_cpu([_as_scores(rows[i]) for i in scored]), strict=True):
            found[i] = row
        return found

    def _ends(self) -> tuple[Sequence[str | None], Sequence[int | None], Sequence[Versions]]:
        """Why the policy stopped, how far it might go (where a budget wrote it), and with which weights it went."""
        batch = self.td.batch_size
        reasons, limits, versions = (
            self.td.get(key, None) for key in ("finish_reason", "tokens_left", VERSIONS_KEY)
        )
        rows = batch.numel()
        return (
            [None] * rows if reasons is None else columns.read_objects(reasons, batch),
            [None] * rows if limits is None else limits.reshape(rows).tolist(),
            [()] * rows if versions is None else _versions(versions, batch),
        )

    # ------------------------------------------------------------------ texts
    def _texts(self, mode: str) -> list[str]:
        container = self.td.get(mode, None)
        if mode != "tokens":
            for key in ("response", "full"):
                if (rows := self._rows(container, key)) is not None:
                    read = self._text if mode == "text" else self._said
                    return [
                        read(i, value, (mode, key)) if going else ""
                        for i, (value, going) in enumerate(zip(rows, self.goes, strict=True))
                    ]
        raise KeyError(
            f"step needs the policy's response in ({mode!r}, 'response') or "
            f"({mode!r}, 'full'); got the keys {sorted(map(str, self.td.keys()))}."
        )

    def _text(self, i: int, value: Any, key: tuple[str, str]) -> str:
        text = _as_text(value, i, key, self.faults)
        if key[1] == "response" or i in self.faults:
            return text
        prompt = shown_text(self.held[i], self.template)
        if not text.startswith(prompt):
            raise ResponseError(
                f"row {i}: ('text', 'full') does not start with the prompt: {text[:60]!r} against {prompt[:60]!r}."
            )
        return _as_text(text[len(prompt) :], i, key, self.faults)

    def _said(self, i: int, value: Any, key: tuple[str, str]) -> str:
        if value is None:
            return _as_text(None, i, key, self.faults)
        messages = history_messages(value, 0)
        expected = 1 if key[1] == "response" else len(self.held[i].messages) + 1
        policy = self.held[i].course.policy
        if len(messages) != expected or messages[-1]["role"] != policy:
            raise ResponseError(
                f"row {i}: {key} has the roles {[m['role'] for m in messages]}: expected "
                f"{expected} message(s), the last of role {policy!r}."
            )
        return _as_text(messages[-1]["content"], i, key, self.faults)


def shown_text(transcript: Transcript, template: ChatTemplate | None) -> str:
    """The text of a conversation's prompt; decoded where an environment of another mode did not keep it."""
    if transcript.text is not None or template is None:
        return transcript.text or ""
    return template.codec.decode([transcript.token_array.tolist()])[0]


def _versions(column: Any, batch_size: torch.Size) -> list[Versions]:
    """Spans of weight versions, from a version a row or its spans."""
    rows = column.reshape(batch_size.numel(), -1).tolist() if isinstance(column, torch.Tensor) else None
    values = columns.read_objects(column, batch_size) if rows is None else [row[0] for row in rows]
    found: list[Versions] = []
    for i, value in enumerate(values):
        if value is None or isinstance(value, int):
            found.append(() if value is None else ((0, value),))
            continue
        try:
            spans = tuple((int(start), None if version is None else int(version)) for start, version in value)
        except (TypeError, ValueError):
            raise ResponseError(
                f"row {i}: {VERSIONS_KEY!r} is {value!r:.60}: expected an int, or spans [(start, version), ...]."
            ) from None
        starts = [start for start, _ in spans]
        if spans and (starts[0] != 0 or starts != sorted(set(starts))):
            raise ResponseError(
                f"row {i}: the spans in {VERSIONS_KEY!r} start at {starts}: expected 0, and then ever more."
            )
        found.append(spans)
    return found


# ---------------------------------------------------------------------- what was shown, given back
def check_ledgers(transcripts: Sequence[Transcript]) -> None:
    """Refuse ledgers that somebody wrote into: on the CPU, the columns of an observation are views of them.

    Raises:
        ResponseError: naming the first such row and column.
    """
    for i, transcript in enumerate(transcripts):
        if (at := transcript.tape.overwritten) is not None:
            key = (("tokens", "prompt"), ("masks", "all_assistant_mask"), ("log_probs", "prompt"))[at]
            raise ResponseError(
                f"row {i}: {key} of an observation of this conversation was written to in place, and it is a view of "
                "the ledger, which is append-only. Write into a clone; begin again with a reset."
            )


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
    stack = columns.bare(row)
    known = transcript.messages
    told = stack.messages if isinstance(stack, columns.Conversation) else None
    if told is not None and (told is known or all(map(operator.is_, told, known))):
        return
    entries = stack.tensordicts if isinstance(stack, columns.Conversation) else stack.unbind(0)
    for at, (entry, message) in enumerate(zip(entries, known, strict=False)):
        role, content = (columns.read_objects(entry.get(key), torch.Size([1]))[0] for key in ("role", "content"))
        for key, value, held in (("role", role, message["role"]), ("content", content, content_text(message))):
            if value != held:
                raise ResponseError(
                    f"row {index}: the {key} of message {at} of ('history', 'prompt') was edited: {value!r:.80} is "
                    f"{held!r:.80} in the ledger, which is append-only."
                )


def history_messages(row: Any, start: int) -> list[Message]:
    """The messages of one row's ``History``, from position ``start`` on."""
    row = columns.bare(row)
    entries = row.unbind(0)[start:] if row.batch_dims else [row]
    return [{"role": entry.get("role").data, "content": entry.get("content").data} for entry in entries]


def _first_difference(expected: torch.Tensor, got: torch.Tensor) -> str:
    shared = min(len(expected), len(got))
    differs = (expected[:shared] != got[:shared]).nonzero()
    at = int(differs[0]) if len(differs) else shared
    return (
        f"expected {len(expected)} ids, got {len(got)}; the first difference is at position {at}: "
        f"expected {expected[at : at + 5].tolist()}, got {got[at : at + 5].tolist()}."
    )


def _as_ids(value: Any, row: int, key: tuple[str, str], faults: Errors) -> torch.Tensor:
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


def _as_scores(row: torch.Tensor) -> torch.Tensor:
    """Log-probs as float32 without a graph."""
    return row.detach().float() if row.requires_grad or row.dtype != torch.float32 else row


def _as_text(value: Any, row: int, key: tuple[str, str], faults: Errors) -> str:
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
