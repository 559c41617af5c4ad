"""``Budget``: all limits of an episode in one place, and why it ended."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import Transform

from torchrl_chat import columns
from torchrl_chat.conversation import Limits, StopReason, Transcript
from torchrl_chat.conversation.limits import NO_LIMIT
from torchrl_chat.transforms.home import alike, chat_env, flags, raise_flags


class Budget(Transform):
    """Ends episodes at their limits, says why, and tells the policy how much it may still sample.

    Append it last, behind rewards and tools: it looks at the prompt that the policy will read next. What stands behind it
    in an environment that ``append_transform`` of this package made is looked at once more when all have had their say. A
    limit truncates (``truncated`` and ``done``); an answer that ends the dialogue terminates, and wins over a limit
    reached in the same turn. Written, over the environment's batch size B:

    - ``"tokens_left"``: int64 (\\*B, 1), how many tokens the policy may sample in this turn (2147483647 without a limit);
      :class:`~torchrl_chat.ChatEnv` cuts a longer answer to it, as a limit of the policy's own would, so that no
      episode exceeds a budget, whatever the policy does;
    - ``"calls_left"``: int64 (\\*B, 1), how many tool calls may still be run, if there is such a limit;
    - ``"stop_reason"``: int64 (\\*B, 1), a :class:`StopReason`.

    A conversation that is too long when it starts has ``stop_reason`` ``CONTEXT_FULL`` and no tokens left from the reset
    on; its first step samples nothing and ends it. The other rows are untouched. Several budgets in one environment hold
    together: the policy reads what the tightest leaves.

    Args:
        max_turns: answers in one episode. An answer that the policy has to write anew
            (:class:`~torchrl_chat.transforms.AddThinkingPrompt`) counts again.
        max_turn_tokens: sampled tokens in one answer, counted afresh where it is written anew. An answer that is cut by it
            does not end the episode, unless ``end_on_cut``.
        max_tokens: sampled tokens in one episode.
        max_context: tokens of the whole sequence, those that close the last turn included.
        max_tool_calls: tool calls of the policy in one episode, those that cannot be read included; the call beyond the
            last that is allowed ends it.
        max_seconds: seconds of wall time since the reset, looked at after each turn. The time between ``state_dict()`` and
            ``load_state_dict()`` does not count.
        end_on_cut: whether an answer that ``max_turn_tokens`` cuts ends the episode.

    Raises:
        ValueError: a limit is not positive, or none is given.
        TypeError: at first use: the environment is no :class:`~torchrl_chat.ChatEnv`, or has no tokenizer for a limit
            in tokens.

    Example:
        >>> from tensordict import TensorDict
        >>> from torchrl_chat import ChatEnv
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> env = ChatEnv(tokenizer=tokenizer, input_mode="tokens", batch_size=(1,))
        >>> env = env.append_transform(Budget(max_turns=2, max_turn_tokens=64))
        >>> env.reset(TensorDict(query=["2 + 2?"], batch_size=(1,)))["tokens_left"].tolist()
        [[64]]
    """

    def __init__(
        self,
        *,
        max_turns: int | None = None,
        max_turn_tokens: int | None = None,
        max_tokens: int | None = None,
        max_context: int | None = None,
        max_tool_calls: int | None = None,
        max_seconds: float | None = None,
        end_on_cut: bool = False,
    ):
        limits = Limits(
            max_turns=max_turns,
            max_turn_tokens=max_turn_tokens,
            max_tokens=max_tokens,
            max_context=max_context,
            max_tool_calls=max_tool_calls,
            max_seconds=max_seconds,
            end_on_cut=end_on_cut,
        )
        if all(getattr(limits, name) is None for name in limits.names()):
            raise ValueError(f"Budget has no limit: give at least one of {', '.join(limits.names())}.")
        written = ["tokens_left", "stop_reason"]
        written += ["calls_left"] if max_tool_calls is not None else []
        written += ["started_at"] if max_seconds is not None else []
        super().__init__(in_keys=["transcript"], out_keys=written)
        self.limits = limits
        self.max_tool_calls = max_tool_calls
        self.max_seconds = max_seconds
        self._pauses: list[tuple[float, float]] = []  # when the run was saved, and when it went on
        self._left: tuple[Any, ...] = ()  # what the step that is under way looked like when this transform left it

    def get_extra_state(self) -> dict[str, Any]:
        """When this is, in ``state_dict()``, and when a run was interrupted before."""
        return {"saved_at": time.time(), "pauses": [list(pause) for pause in self._pauses]}

    def set_extra_state(self, state: Any) -> None:
        """Go on: what has passed since the state was saved is no episode's time."""
        before = [(begin, end) for begin, end in state["pauses"]]
        self._pauses = [*before, (state["saved_at"], time.time())]

    def _seconds(self, started: float) -> float:
        """The wall time since then, less the pauses."""
        paused = sum(max(0.0, end - max(begin, started)) for begin, end in self._pauses)
        return time.time() - started - paused

    # ------------------------------------------------------------------ torchrl's hooks
    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        transcripts = self._transcripts(tensordict_reset)
        known = self._known(tensordict_reset)  # a row may have failed before it has begun
        left = [0 if own else count for own, count in zip(known, self._allowed(transcripts), strict=True)]
        reasons = [
            StopReason(own) if own else StopReason.RUNNING if count > 0 else StopReason.CONTEXT_FULL
            for own, count in zip(known, left, strict=True)
        ]
        self._write(tensordict_reset, left, reasons, [0] * len(transcripts))
        if self.max_seconds is not None:
            shape, device = (*tensordict_reset.batch_size, 1), tensordict_reset.device
            tensordict_reset.set("started_at", torch.full(shape, time.time(), dtype=torch.float64, device=device))
        return tensordict_reset

    def _inv_call(self, tensordict: TensorDictBase) -> TensorDictBase:
        # Messages may have been appended since: the environment is told what is left now.
        left = self._allowed(self._transcripts(tensordict))
        tensordict.set("tokens_left", self._column(left, tensordict))
        return tensordict

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        if self.max_seconds is not None:
            next_tensordict.set("started_at", tensordict.get("started_at"))
        ends = [flags(next_tensordict, key) for key in ("terminated", "truncated")]
        open_rows = [not reason for reason in self._known(next_tensordict)]
        cut = self._decide(tensordict, next_tensordict, *ends)
        mine = [short and not was for short, was in zip(cut, ends[1], strict=True)]
        self._left = (self._seen(next_tensordict), open_rows, mine)
        return next_tensordict

    def settle(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> None:
        """Decide once more where a transform behind this one has ended rows, or has changed their conversations."""
        left, self._left = self._left, ()
        if not left:
            return
        before, open_rows, mine = left
        if all(old is new for old, new in zip(before, self._seen(next_tensordict), strict=True)):
            return
        terminated, truncated, done = (flags(next_tensordict, key) for key in ("terminated", "truncated", "done"))
        # What this budget has ended goes on, but for what an answer or another transform ends.
        truncated = [short and not own for short, own in zip(truncated, mine, strict=True)]
        done = [over and (not own or ended) for over, own, ended in zip(done, mine, terminated, strict=True)]
        for key, values in (("truncated", truncated), ("done", done)):
            next_tensordict.set(key, self._column(values, next_tensordict).bool())
        reasons = [
            0 if undecided and reason != StopReason.ERROR else reason
            for undecided, reason in zip(open_rows, self._known(next_tensordict), strict=True)
        ]
        next_tensordict.set("stop_reason", self._column(reasons, next_tensordict))
        self._decide(tensordict, next_tensordict, terminated, truncated)

    @staticmethod
    def _known(td: TensorDictBase) -> list[int]:
        """The reasons that stand there already: of the environment itself, or of a budget in front."""
        said = td.get("stop_reason", None)
        return [0] * td.batch_size.numel() if said is None else said.flatten().tolist()

    @staticmethod
    def _seen(td: TensorDictBase) -> list[Any]:
        """What a decision depends on, to be compared by identity."""
        ends = [td.get(key) for key in ("terminated", "truncated", "done")]
        return [*ends, *columns.read_objects(td.get("transcript"), td.batch_size)]

    def _decide(
        self,
        tensordict: TensorDictBase,
        next_tensordict: TensorDictBase,
        terminated: list[bool],
        truncated: list[bool],
    ) -> list[bool]:
        """Write the reasons and end the rows that have one; which those are."""
        transcripts = self._transcripts(next_tensordict)
        given = self._allowed(self._transcripts(tensordict))
        calls = self._calls(tensordict, next_tensordict, transcripts)
        seconds = [0.0] * len(transcripts)
        if self.max_seconds is not None:
            seconds = list(map(self._seconds, tensordict.get("started_at").flatten().tolist()))
        template = chat_env(self).template
        reasons = [
            StopReason(own)
            if own
            else StopReason.ANSWERED
            if ended and had > 0
            else self.limits.reason(transcript, template, had=had, seconds=taken, calls=called)
            or (StopReason.TRUNCATED if short else StopReason.RUNNING)
            for own, transcript, ended, short, had, taken, called in zip(
                self._known(next_tensordict),
                transcripts,
                terminated,
                truncated,
                given,
                seconds,
                calls,
                strict=True,
            )
        ]
        goes = columns.stepped(tensordict)
        if not all(goes):  # the others stay as they are
            before = tensordict.get("stop_reason").flatten().tolist()
            reasons = [
                reason if going else StopReason(old)
                for reason, going, old in zip(reasons, goes, before, strict=True)
            ]
        self._write(next_tensordict, self._allowed(transcripts), reasons, calls)
        own = [reason not in (StopReason.RUNNING, StopReason.ANSWERED) for reason in reasons]
        raise_flags(next_tensordict, own, "truncated", "done")
        return own

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        """The specs of what is written."""
        shape, device = (*observation_spec.shape, 1), observation_spec.device
        observation_spec["tokens_left"] = Bounded(0, NO_LIMIT, shape=shape, dtype=torch.int64, device=device)
        observation_spec["stop_reason"] = Bounded(
            0, len(StopReason) - 1, shape=shape, dtype=torch.int64, device=device
        )
        if self.max_tool_calls is not None:
            observation_spec["calls_left"] = Bounded(0, NO_LIMIT, shape=shape, dtype=torch.int64, device=device)
        if self.max_seconds is not None:
            observation_spec["started_at"] = Unbounded(shape, dtype=torch.float64, device=device)
        return observation_spec

    # ------------------------------------------------------------------ one row
    def _allowed(self, transcripts: list[Transcript]) -> list[int]:
        """How many tokens the policy may sample in its next turn, by all budgets of the environment."""
        limits, template = [budget.limits for budget in alike(self, Budget)], chat_env(self).template
        for limit in limits:
            if template is None and (given := limit.in_tokens):
                raise TypeError(
                    f"Budget: {' and '.join(given)} count tokens, and this environment has no tokenizer: give it one "
                    f"(ChatEnv(tokenizer=...)), or limit max_turns or max_seconds."
                )
        return [min(limit.tokens_left(transcript, template) for limit in limits) for transcript in transcripts]

    # ------------------------------------------------------------------ columns

    def _transcripts(self, td: TensorDictBase) -> list[Transcript]:
        column = td.get("transcript", None)
        if column is None:
            raise KeyError(f"Budget reads 'transcript', the ledger; got the keys {sorted(map(str, td.keys()))}.")
        return columns.read_objects(column, td.batch_size)

    def _calls(self, root: TensorDictBase, following: TensorDictBase, transcripts: list[Transcript]) -> list[int]:
        """How many tools the policy has called: as structured calls, or (fenced code) by what a tool answered."""
        counts = []
        for transcript in transcripts:
            # A prompt may tell of calls too.
            said = transcript.messages[transcript.spans[0].message :] if transcript.spans else []
            structured = sum(len(message.get("tool_calls") or ()) for message in said)
            counts.append(max(structured, sum(message["role"] == "tool" for message in said)))
        made, left = following.get("tool_calls", None), root.get("calls_left", None)
        if made is None or left is None:
            return counts
        # What an executor has counted: its answers need not look like those of tools.
        known = (self._most_calls() - left + made).flatten().tolist()
        return list(map(max, counts, known))

    def _most_calls(self) -> int:
        return min((b.max_tool_calls for b in alike(self, Budget) if b.max_tool_calls is not None), default=0)

    def _write(self, td: TensorDictBase, left: list[int], reasons: list[StopReason], calls: list[int]) -> None:
        td.set("tokens_left", self._column(left, td))
        td.set("stop_reason", self._column([int(reason) for reason in reasons], td))
        if self.max_tool_calls is not None:
            most = self._most_calls()
            td.set("calls_left", self._column([max(0, most - count) for count in calls], td))

    @staticmethod
    def _column(values: Sequence[int], td: TensorDictBase) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=td.device).reshape(*td.batch_size, 1)
