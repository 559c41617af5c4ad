"""Finished sessions as rows: the columns of a dataset environment's finished episodes, and lines of a rollout file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDict
from torchrl.modules.llm.policies import LogProbs, Masks, Tokens

from torchrl_chat import columns
from torchrl_chat.conversation import StopReason, Transcript
from torchrl_chat.gateway.sessions import Session
from torchrl_chat.gateway.traces import Recorded
from torchrl_chat.seeds import EPISODE_KEYS, SEED


def episodes(sessions: Sequence[Session | Recorded], data_key: str = "query") -> TensorDict:
    """Finished sessions as finished episodes, for :func:`~torchrl_chat.training_view`, rollout files and losses.

    Args:
        sessions: the sessions, one a row; or episodes that somebody else recorded (:func:`~torchrl_chat.gateway.read_trace`).
        data_key: the column that holds what an episode was asked: that of the dataset row, else its first words of a user.

    Returns:
        batch size (B,), the columns of a :class:`~torchrl_chat.DatasetChatEnv`'s finished rows: ``"transcript"`` (its
        branches are the session's other sequences), ``("tokens", "prompt")``, ``("masks", "all_assistant_mask")`` and
        ``("log_probs", "prompt")`` of the last one; ``"reward"`` float32 (B, 1, 1), ``"success"`` and ``"graded"`` bool (B, 1, 1),
        ``"reward_parts"``, ``"grade_failure"``, ``"extracted"``, ``"env_failure"``; ``"done"``, ``"terminated"``, ``"truncated"`` bool (B, 1), ``"stop_reason"``
        int64 (B, 1), ``"finish_reason"``; and every column of the dataset rows. Sessions that were made with a ``group`` have it in
        ``"session_group"``, and where an
        agent's calls are a tree, and no mere line, ``"session_calls"`` has it as rollout files do. A session in which nothing was sampled failed, and no token of it is trained.

    Raises:
        ValueError: there is no session, or one is not finished.

    Example:
        >>> from torchrl_chat import training_view
        >>> from torchrl_chat.gateway import Gateway
        >>> from torchrl_chat import TransformersPolicy
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_model, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> policy = TransformersPolicy(tiny_model(len(tokenizer)), tokenizer, max_new_tokens=4)
        >>> with Gateway(policy) as gateway:
        ...     session = gateway.session(row={"query": "2 + 2?"})
        ...     session.finish(reward=0.0)  # its agent has asked nothing
        ...     view = training_view(episodes(gateway.take()))
        >>> view["group"].tolist()  # nothing was sampled: it is nobody's
        [-1]
    """
    if not sessions:
        raise ValueError("there is no session to make an episode of.")
    if open_ones := [session.name for session in sessions if not session.finished]:
        raise ValueError(f"session {open_ones[0]!r} is not finished: finish it first, with its reward.")
    ledgers = [session.transcript() for session in sessions]
    failures = [
        session.failure or ("" if ledger is not None else "nothing was sampled in the session")
        for session, ledger in zip(sessions, ledgers, strict=True)
    ]
    shown = [ledger or _nothing(session, data_key) for session, ledger in zip(sessions, ledgers, strict=True)]
    batch = torch.Size([len(sessions)])
    td = TensorDict(batch_size=batch)
    names = dict.fromkeys(key for session in sessions for key in session.row)
    for key in names:
        values = [session.row.get(key) for session in sessions]
        whole = key in EPISODE_KEYS and all(isinstance(value, int) for value in values)
        td.set(key, torch.tensor(values) if whole else columns.objects(values, batch, None))
    if data_key not in names:
        td.set(data_key, columns.objects([_asked(ledger) for ledger in shown], batch, None))
    if SEED not in names and all(session.seed is not None for session in sessions):
        td.set(SEED, torch.tensor([session.seed for session in sessions]))
    if any(session.group is not None for session in sessions):
        td.set("session_group", columns.objects([session.group for session in sessions], batch, None))
    td.set("transcript", columns.objects(shown, batch, None))
    td.set("tokens", columns.ragged(Tokens, "prompt", [ledger.tokens for ledger in shown], batch, None))
    td.set("masks", columns.ragged(Masks, "all_assistant_mask", [ledger.mask for ledger in shown], batch, None))
    td.set("log_probs", columns.ragged(LogProbs, "prompt", [ledger.log_probs for ledger in shown], batch, None))
    stops = [
        StopReason.ERROR if failure else session.stop for session, failure in zip(sessions, failures, strict=True)
    ]
    ended = [stop is StopReason.ANSWERED for stop in stops]
    td.set("stop_reason", torch.tensor([[int(stop)] for stop in stops]))
    td.set("done", torch.ones(len(sessions), 1, dtype=torch.bool))
    td.set("terminated", torch.tensor(ended)[:, None])
    td.set("truncated", ~torch.tensor(ended)[:, None])
    rewards = [[[0.0 if session.reward is None else session.reward]] for session in sessions]
    graded = [
        session.reward is not None and not failure for session, failure in zip(sessions, failures, strict=True)
    ]
    td.set("reward", torch.tensor(rewards))
    td.set("success", torch.tensor([[[bool(session.success)]] for session in sessions]))
    td.set("graded", torch.tensor(graded)[:, None, None])
    if parts := sorted({name for session in sessions for name in session.reward_parts}):
        held = {
            name: torch.tensor([[[session.reward_parts.get(name, 0.0)]] for session in sessions]) for name in parts
        }
        td.set("reward_parts", TensorDict(held, batch_size=batch))
    td.set("grade_failure", columns.objects([session.grade_failure for session in sessions], batch, None))
    td.set("extracted", columns.objects([session.extracted for session in sessions], batch, None))
    td.set("env_failure", columns.objects(failures, batch, None))
    trees = [session.tree.calls() if isinstance(session, Session) else [] for session in sessions]
    if any(trees):
        td.set("session_calls", columns.objects(trees, batch, None))
    reasons = ["length" if ledger.ended is False else "stop" for ledger in shown]
    td.set("finish_reason", columns.objects(reasons, batch, None))
    return td


def _asked(ledger: Transcript) -> str:
    """What a conversation began with: the first words of a user."""
    return next((message["content"] for message in ledger.messages if message["role"] == "user"), "")


def _nothing(session: Session | Recorded, data_key: str) -> Transcript:
    """A ledger for a session that sampled nothing: a prompt that nobody answered."""
    asked: Any = session.row.get(data_key, "")
    messages = [{"role": "user", "content": asked if isinstance(asked, str) else ""}]
    if isinstance(session, Recorded):
        return Transcript.start([0], messages)
    template = session.templates.plain
    try:
        ids = template.render(messages)
    except ValueError:
        ids = [template.tokenizer.eos_token_id or 0]
    return Transcript.start(ids, messages)
