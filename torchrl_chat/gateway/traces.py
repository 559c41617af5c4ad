"""OpenEnv's training traces, both ways: sessions of ours written as ``TrainingTrace``, and traces of others read as ledgers.

The contract is ``TrainingTrace`` / ``TrainingTurn`` of ``openenv`` 0.10 (``core/harness/training.py``): one entry for each call of the
model, with its prompt, what was sampled, log-probs and a mask over both. OpenEnv itself is not needed: a trace is plain JSON.

Law of this file: a turn is trained once, behind the very prompt that its trace has. Where a prompt does not begin with what an earlier
turn ended with, a sequence begins, and a finding tells where they part; nothing is joined that was not one.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from torchrl_chat.conversation import Branch, StopReason, Transcript
from torchrl_chat.conversation.transcript import LOG_PROBS, MASK
from torchrl_chat.gateway.sessions import Session
from torchrl_chat.gateway.tree import Answer
from torchrl_chat.messages import Message

SCHEMA = 1
_ABOVE = 1e-4  # how far above 0 a log-prob may be by rounding


# ---------------------------------------------------------------------- out
def training_trace(session: Session) -> dict[str, Any]:
    """A session as a ``TrainingTrace``, in JSON's own types.

    Its turns stand sequence by sequence, so that a consumer that goes on as long as prompts extend each other (TRL's
    ``openenv_harness`` does) has as many rows as the session has sequences; the last one is the session's last. Each sampled token
    is trained in one turn. Answers that nobody got are left out, as they are in training.

    Args:
        session: the session, finished or not.

    Returns:
        ``{"schema_version": 1, "turns": [...]}``: what ``TrainingTrace.model_validate`` takes.

    Raises:
        ValueError: an answer has no log-probs, or some above 0: such a trace cannot be trained on.

    Example:
        >>> from openai import OpenAI
        >>> from torchrl_chat.gateway import Gateway
        >>> from torchrl_chat import TransformersPolicy
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_model, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> policy = TransformersPolicy(tiny_model(len(tokenizer)), tokenizer, max_new_tokens=4)
        >>> with Gateway(policy) as gateway, gateway.session() as session:
        ...     client = OpenAI(base_url=session.base_url, api_key=session.api_key)
        ...     ask = [{"role": "user", "content": "2 + 2?"}]
        ...     reply = client.chat.completions.create(model="policy", messages=ask)
        ...     session.finish(reward=1.0)
        ...     trace = training_trace(session.session)
        >>> [turn] = trace["turns"]
        >>> len(turn["loss_mask"]) == len(turn["prompt_token_ids"]) + len(turn["per_token_logps"])
        True
    """
    turns: list[dict[str, Any]] = []
    for sequence, (_, trained) in enumerate(session.tree.sequences()):
        turns += [_turn(session, answer, len(turns) + i, sequence) for i, answer in enumerate(trained)]
    return {"schema_version": SCHEMA, "turns": turns}


def _turn(session: Session, answer: Answer, index: int, sequence: int) -> dict[str, Any]:
    ledger = answer.transcript
    span = ledger.spans[-1]
    prompt = ledger.token_array[: span.start].tolist()
    sampled = ledger.token_array[span.start : span.end].tolist()
    scores = ledger.log_probs[span.start : span.end].tolist()
    if not ledger.scored:
        raise ValueError(
            f"answer {index} of session {session.name!r} has no log-probs: whoever trains on its trace needs those of the "
            "policy that sampled. Let the engine report them."
        )
    if (most := max(scores, default=0.0)) > _ABOVE:
        raise ValueError(f"answer {index} of session {session.name!r} has a log-prob of {most:g}: none is above 0.")
    message = _spoken(ledger.messages[-1])
    finish = "tool_calls" if message.get("tool_calls") else "stop" if ledger.ended else "length"
    return {
        "node_id": f"{answer.name}-{index}",
        "prompt_token_ids": prompt,
        "completion_token_ids": sampled,
        "per_token_logps": [min(score, 0.0) for score in scores],
        "loss_mask": [0] * len(prompt) + [1] * len(sampled),
        "request": {
            "messages": [_spoken(each) for each in ledger.messages[:-1]],
            "tools": json.loads(answer.tools) if isinstance(answer.tools, bytes) and answer.tools else None,
        },
        "response": {"choices": [{"message": message, "finish_reason": finish}]},
        "metadata": {"index": index, "session": session.name, "sequence": sequence},
    }


def _spoken(message: Message) -> dict[str, Any]:
    """A message of the ledger as OpenAI's chat completions have it: arguments are JSON texts."""
    plain = {key: value for key, value in message.items() if key != "invalid_tool_calls"}
    if calls := message.get("tool_calls"):
        plain["tool_calls"] = [
            {
                "id": call.get("id") or f"call{place:05d}",
                "type": "function",
                "function": {
                    "name": call["function"]["name"],
                    "arguments": call["function"]["arguments"]
                    if isinstance(call["function"]["arguments"], str)
                    else json.dumps(call["function"]["arguments"], ensure_ascii=False),
                },
            }
            for place, call in enumerate(calls)
        ]
    return plain


# ---------------------------------------------------------------------- in
@dataclass(frozen=True)
class Finding:
    """Something about a trace that its reader should know, graded as OpenEnv grades."""

    level: Literal["FATAL", "WARN", "INFO"]
    """``FATAL``: the turn cannot be trained on, and is not; ``WARN``: it is trained on, and somebody should look; ``INFO``."""
    code: str
    """A word for programs; those that OpenEnv has, too, are the same."""
    detail: str
    """A sentence, without any of the words of the conversation."""

    def __str__(self) -> str:
        return f"[{self.level}] {self.code}: {self.detail}"


@dataclass
class Recorded:
    """A trace that was read: an episode for :func:`~torchrl_chat.gateway.episodes`, as a finished session is.

    Attributes:
        findings: what is to be known of it.
        row: the dataset row, for columns.
        reward: what the episode is worth; a trace does not say.
    """

    ledger: Transcript | None
    findings: list[Finding]
    name: str = "trace"
    row: Mapping[str, Any] = field(default_factory=dict)
    group: Any = None
    seed: int | None = None
    reward: float | None = None
    success: bool | None = None
    reward_parts: Mapping[str, float] = field(default_factory=dict)
    failure: str = ""
    grade_failure: str = ""
    extracted: str = ""
    stop: StopReason = StopReason.ANSWERED
    finished: bool = True

    def __post_init__(self) -> None:
        if self.success is None and self.reward is not None:
            self.success = self.reward > 0

    def transcript(self) -> Transcript | None:
        """The episode as one ledger, its other sequences as branches; ``None`` where nothing can be trained."""
        return self.ledger


@dataclass
class _Sequence:
    """A sequence that grows."""

    ledger: Transcript
    last: int
    """The turn that it ends with."""


def read_trace(trace: Mapping[str, Any] | Sequence[Mapping[str, Any]], **about: Any) -> Recorded:
    """An episode that somebody else has recorded.

    Args:
        trace: a ``TrainingTrace`` as JSON has it; or the list of entries that OpenEnv's capture server tells
            (``/sessions/ID/trace_entries``).
        about: attributes of :class:`Recorded`: ``reward``, ``row``, ``group`` ...

    Returns:
        the episode. A turn with a ``FATAL`` finding is left out; the others stay.

    Raises:
        ValueError: it is no such trace.

    Example:
        >>> from torchrl_chat import training_view
        >>> from torchrl_chat.gateway import episodes
        >>> turn = {"prompt_token_ids": [1, 2], "completion_token_ids": [3, 4], "per_token_logps": [-0.1, -0.2]}
        >>> recorded = read_trace({"turns": [turn]}, reward=1.0)
        >>> training_view(episodes([recorded]), group=None, layout="padded")["tokens"].full.tolist()
        [[1, 2, 3, 4]]
    """
    findings: list[Finding] = []
    sequences: list[_Sequence] = []
    known: dict[str, int] = {}
    kept = 0
    for index, turn in enumerate(_turns(trace)):
        bad = _check(turn, index, known)
        findings += bad
        if any(finding.level == "FATAL" for finding in bad):
            continue
        _enter(turn, index, sequences, findings)
        kept += 1
    if not kept:
        findings.append(Finding("FATAL", "no_turns", "no turn of the trace can be trained on."))
        return Recorded(None, findings, **about)
    if kept == 1:
        findings.append(Finding("WARN", "degenerate_rollout", "the whole episode is one call of the model."))
    if len(sequences) == kept > 1:
        findings.append(
            Finding("WARN", "per_turn_capture_only", f"each of the {kept} turns is a sequence of its own.")
        )
    *others, last = (sequence.ledger for sequence in sequences)
    branches = tuple(Branch(t.tokens, t.mask, t.log_probs, t.versions) for t in others)
    return Recorded(dataclasses.replace(last, branches=branches, turns=kept), findings, **about)


def _turns(trace: Any) -> Sequence[Mapping[str, Any]]:
    if isinstance(trace, Mapping):
        version = trace.get("schema_version", SCHEMA)
        if version != SCHEMA:
            raise ValueError(f"schema_version is {version!r}: this reads version {SCHEMA}.")
        trace = trace.get("turns", trace.get("entries"))
    if not isinstance(trace, Sequence) or isinstance(trace, (str, bytes)):
        raise ValueError("a trace is an object with 'turns', or a list of entries.")
    for index, turn in enumerate(trace):
        if not isinstance(turn, Mapping):
            raise ValueError(f"turn {index} of the trace is {type(turn).__name__}: expected an object.")
    return trace


def _check(turn: Mapping[str, Any], index: int, known: dict[str, int]) -> list[Finding]:
    """What is wrong with one turn by itself."""
    found: list[Finding] = []

    def tell(level: Literal["FATAL", "WARN", "INFO"], code: str, detail: str) -> None:
        found.append(Finding(level, code, f"turn {index}: {detail}"))

    prompt, sampled = turn.get("prompt_token_ids"), turn.get("completion_token_ids")
    scores, mask = turn.get("per_token_logps"), turn.get("loss_mask")
    for name, ids in (("prompt_token_ids", prompt), ("completion_token_ids", sampled)):
        if not isinstance(ids, list) or any(type(token) is not int or not 0 <= token < 2**31 for token in ids):
            tell("FATAL", "invalid_token_id", f"{name} is no list of token ids.")
    if found:
        return found
    assert prompt is not None
    assert sampled is not None
    if not prompt:
        tell("FATAL", "no_prompt_ids", "the prompt has no ids.")
    if not sampled:
        tell("FATAL", "no_sampled_ids", "nothing was sampled: there is nothing to train.")
    elif not scores:
        tell("FATAL", "no_logprobs", f"{len(sampled)} sampled tokens have no log-probs.")
    elif not isinstance(scores, list) or any(
        type(score) not in (int, float) or not math.isfinite(score) for score in scores
    ):
        tell("FATAL", "invalid_logprob", "per_token_logps is no list of finite numbers.")
    elif len(scores) != len(sampled):
        tell("FATAL", "logprob_misalign", f"there are {len(scores)} log-probs for {len(sampled)} sampled tokens.")
    elif max(scores) > 0:
        tell("FATAL", "positive_logprob", f"a log-prob is {max(scores):g}: none is above 0.")
    elif (sure := sum(score == 0 for score in scores)) > 0:
        tell("INFO", "certain_tokens", f"{sure} of {len(scores)} sampled tokens have the log-prob 0.")
    if mask is not None:
        if not isinstance(mask, list) or any(type(bit) is not int or bit not in (0, 1) for bit in mask):
            tell("FATAL", "invalid_loss_mask", "loss_mask is no list of 0 and 1.")
        elif len(mask) != len(prompt) + len(sampled):
            tell("FATAL", "length_mismatch", f"loss_mask has {len(mask)} of {len(prompt) + len(sampled)} tokens.")
        elif any(mask[: len(prompt)]):
            tell("FATAL", "trainable_prompt", "loss_mask is 1 on a token of the prompt.")
        elif not all(mask[len(prompt) :]):
            out = mask[len(prompt) :].count(0)
            tell("INFO", "masked_tokens", f"{out} of {len(sampled)} sampled tokens are masked out.")
    node = turn.get("node_id") or (turn.get("metadata") or {}).get("node_id")
    if isinstance(node, str) and node in known:
        tell("FATAL", "duplicate_node", f"it has the node_id of turn {known[node]}: no call is trained twice.")
    elif isinstance(node, str):
        known[node] = index
    if _choice(turn).get("finish_reason") == "length":
        tell("WARN", "truncated_turn", "it was cut off by a limit; its tokens are as they were sampled.")
    return found


def _choice(turn: Mapping[str, Any]) -> Mapping[str, Any]:
    choices = (turn.get("response") or {}).get("choices") or [{}]
    return choices[0] if isinstance(choices[0], Mapping) else {}


def _enter(turn: Mapping[str, Any], index: int, sequences: list[_Sequence], findings: list[Finding]) -> None:
    """Put a turn behind the sequence that it extends, or begin one."""
    prompt = np.asarray(turn["prompt_token_ids"], dtype=np.int64)
    request = [dict(message) for message in (turn.get("request") or {}).get("messages") or () if "role" in message]
    best: _Sequence | None = None
    for sequence in sequences:
        held = sequence.ledger
        whole = held.length <= len(prompt) and bool(
            (held.tape.arrays[0][: held.length] == prompt[: held.length]).all()
        )
        if whole and (best is None or held.length > best.ledger.length):
            best = sequence
    if best is None:
        if sequences:
            findings.append(_parted(prompt, index, sequences))
        ledger = Transcript.start(prompt.tolist(), [_told(message) for message in request])
        best = _Sequence(ledger, index)
    else:
        sequences.remove(best)
        more = request[len(best.ledger.messages) :]
        best.ledger = best.ledger.appended(prompt[best.ledger.length :].tolist(), [_told(m) for m in more])
    sequences.append(best)  # the sequence of the last turn stands last
    choice = _choice(turn)
    said = choice.get("message")
    message = _told({"role": "assistant", **(said if isinstance(said, Mapping) else {})})
    sampled = torch.tensor(turn["completion_token_ids"], dtype=torch.int64)
    scores = torch.tensor(turn["per_token_logps"], dtype=torch.float32)
    start = best.ledger.length
    ended = choice.get("finish_reason") != "length"
    best.ledger = best.ledger.sampled(sampled, scores, message, ended=ended, close=None)
    best.last = index
    if (mask := turn.get("loss_mask")) is not None:
        keep = np.asarray(mask[start:], dtype=np.bool_)
        arrays = best.ledger.tape.arrays
        arrays[MASK][start : start + len(keep)] = keep
        arrays[LOG_PROBS][start : start + len(keep)][~keep] = 0.0


def _parted(prompt: np.ndarray, index: int, sequences: Sequence[_Sequence]) -> Finding:
    """Why a turn begins a sequence: the nearest of those that it might have extended, and where they part."""
    shared, nearest = -1, sequences[-1]
    for sequence in sequences:
        held = sequence.ledger.tape.arrays[0][: sequence.ledger.length]
        length = min(len(held), len(prompt))
        differs = np.flatnonzero(held[:length] != prompt[:length])
        common = int(differs[0]) if len(differs) else length
        if common >= shared:
            shared, nearest = common, sequence
    return Finding(
        "WARN",
        "split",
        f"turn {index} begins a sequence: its prompt has the first {shared} tokens of turn {nearest.last}'s sequence, which "
        f"has {nearest.ledger.length}.",
    )


def _told(message: Mapping[str, Any]) -> Message:
    plain: Message = {key: value for key, value in message.items() if value is not None}
    if not isinstance(plain.get("content"), str):
        parts = plain.get("content") or ()
        plain["content"] = "".join(part.get("text", "") for part in parts if isinstance(part, Mapping))
    return plain
