"""``RewardTransform``: a verifier's verdicts as torchrl rewards."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Literal

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torchrl.data import Composite, NonTensor, Unbounded
from torchrl.envs import Transform

from torchrl_chat import columns
from torchrl_chat.conversation import Transcript
from torchrl_chat.rewards import Episode, Grader, Verdict, Verifier
from torchrl_chat.transforms.home import flags, is_replied_to, missing, raise_flags

_ENOUGH = 8  # grades: so many must have failed in a row before a verifier is taken for broken


class VerifierError(RuntimeError):
    """A verifier fails for everything that it is asked; the text has the traceback of its first failure."""


class RewardTransform(Transform):
    """Grades the policy's answers, a whole batch at once, in all input modes.

    A turn that another transform of the environment replies to is no answer: a call that a
    :class:`~torchrl_chat.ToolExecutor` runs, whatever the verifier would say of it. It neither ends the dialogue nor is
    graded, unless the episode ends with it; and it does not matter which of the two stands in front.

    The verifier gets the parsed message (never the tokens that end the turn) and the reference of the row; what
    exactly is told by its attribute ``grades``, see :mod:`torchrl_chat.rewards.verdict`. It may be a composition
    (:class:`~torchrl_chat.rewards.WeightedSum` ...), a coroutine function, or an OpenEnv rubric ``(action,
    observation) -> float``. Written, over the environment's batch size B:

    - ``("next", "reward")``: float32 (\\*B, 1, 1), the shape that torchrl's ``GRPOLoss`` needs; added to a reward
      that is there already;
    - ``("next", "success")``: bool (\\*B, 1, 1), whether the answer is right;
    - ``("next", "reward_parts", name)``: float32 (\\*B, 1, 1), each component of the verifier that has some;
    - ``("next", "graded")``: bool (\\*B, 1, 1), false where no grade was asked for, or none came and
      ``on_failure="mask"``;
    - ``("next", "grade_failure")``: str (\\*B,), why no grade came; empty where one did. A row that the environment itself
      failed (``"env_failure"``) is not graded, and has that reason;
    - ``("next", "extracted")``: str (\\*B,), the final answer that the verifier found; empty where it found none;
    - ``("next", "terminated")`` and ``("next", "done")`` become true where an answer was given (or the grade failed).

    Rows that were not stepped (torchrl's ``"_step"``) are not graded. A verifier that raises, hangs or crashes costs its own row only.

    Args:
        verifier: ``(response, reference) -> Verdict``, or a bare number; or a :class:`~torchrl_chat.rewards.Grader`.
        reference_key: the entry with the references, a value a row; or a list of entries, which the verifier
            gets as one dict.
        end_on_answer: whether an answer ends the dialogue.
        when: ``"answer"`` grades every turn that is an answer, and the turn that an episode ends with; ``"turn"`` every
            turn, calls of tools too; ``"done"`` only the turn that an episode ends with, whatever ends it. Defaults to
            ``"answer"`` with ``end_on_answer``, else to ``"done"``. What ends an episode behind this transform is seen in
            environments that ``append_transform`` of this package made; in torchrl's own ``TransformedEnv`` put
            it in front.
        on_failure: ``"score"`` trains on such a row, with that reward; ``"mask"`` marks it as not graded, and
            :func:`~torchrl_chat.training_view` leaves it out of the mask. A policy that can make its grader fail
            escapes a bad grade under ``"mask"``. The last grade of an episode counts.
        group_key: the entry that tells which rows answer the same question, for verifiers of groups.
        row_keys: entries that verifiers of episodes see as ``episode.row``.
        patience: a verifier that fails for every row of so many batches running is broken, and training on nothing is no use: the
            run is stopped. (With few rows a batch it takes eight grades.) ``None`` goes on for ever.
        failure_score, deadline, workers, memory_limit, isolate: as for :class:`~torchrl_chat.rewards.Grader`.

    A bare number says of every answer that it is one. Beside a :class:`~torchrl_chat.UserSimulator`, who replies to answers,
    such a verifier wants ``end_on_answer=False``, or returns :class:`~torchrl_chat.Verdict` with ``answer=None`` where the
    dialogue is to go on.

    Raises:
        KeyError: an entry is not there: when the transform is appended to an environment with a dataset, at the reset
            of another one.
        VerifierError: at the step: no grade came for ``patience`` batches.
        ValueError: an option has no such value; or, when it is appended: it ends dialogues, and stands behind a
            :class:`~torchrl_chat.UserSimulator`.

    Example:
        >>> from torchrl_chat import DatasetChatEnv, NumberVerifier
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> rows = [{"query": "2 + 2?", "answer": "4"}]
        >>> env = DatasetChatEnv(dataset=rows, tokenizer=tokenizer, num_envs=2)
        >>> env = env.append_transform(RewardTransform(NumberVerifier()))
    """

    def __init__(
        self,
        verifier: Verifier | Grader | Any,
        *,
        reference_key: NestedKey | list[str] = "answer",
        end_on_answer: bool = True,
        when: Literal["answer", "turn", "done"] | None = None,
        on_failure: Literal["score", "mask"] = "score",
        group_key: NestedKey = "query",
        row_keys: Sequence[str] = (),
        patience: int | None = 3,
        **grading: Any,
    ):
        if patience is not None and patience < 1:
            raise ValueError(f"patience={patience}: expected at least 1 batch, or None.")
        if when not in (None, "answer", "turn", "done"):
            raise ValueError(f"when={when!r}: expected 'answer', 'turn' or 'done'.")
        if on_failure not in ("score", "mask"):
            raise ValueError(f"on_failure={on_failure!r}: expected 'score' or 'mask'.")
        if isinstance(verifier, Grader) and grading:
            raise ValueError(f"{', '.join(grading)}: the Grader that is given has these options itself.")
        if not isinstance(verifier, Grader):
            verifier = Grader(verifier, **grading)
        references = reference_key if isinstance(reference_key, list) else [reference_key]
        super().__init__(in_keys=["transcript", *references], out_keys=["reward", "success", "graded"])
        self.grader = verifier
        self.reference_key = reference_key
        self.end_on_answer = end_on_answer
        self.when = when or ("answer" if end_on_answer else "done")
        self.on_failure = on_failure
        self.group_key = group_key
        self.row_keys = tuple(row_keys)
        self.patience = patience
        self._failed_batches = self._failed_grades = 0  # running
        self._first_failure = ""
        self._seen: set[int] = set()  # the rows that were graded in the step that is under way

    def reads(self) -> dict[NestedKey, str]:
        """The entries that grading cannot do without, and which argument chooses each."""
        references = self.reference_key if isinstance(self.reference_key, list) else [self.reference_key]
        read: dict[NestedKey, str] = dict.fromkeys(references, "reference_key")
        read.update(dict.fromkeys(self.row_keys, "row_keys"))
        if self._of_groups:
            read[self.group_key] = "group_key"
        return read

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        batch, device = next_tensordict.batch_size, next_tensordict.device
        failed = self._failed(next_tensordict)
        answers = [
            None if transcript.answer is None else transcript.messages[transcript.answer]
            for transcript in columns.read_objects(next_tensordict.get("transcript"), batch)
        ]
        rows = [row for row, goes in enumerate(columns.stepped(tensordict)) if goes and not failed[row]]
        # Those to whose last turn a transform of the environment replies, or has just replied.
        replied = {row for row in rows if (said := answers[row]) is not None and is_replied_to(self, said)}
        if self.when == "done":
            done = flags(next_tensordict, "done")
            rows = [row for row in rows if done[row]]
        elif self.when == "answer":
            rows = [row for row in rows if row not in replied]
        self._seen = set(rows)
        verdicts = self._grade(tensordict, next_tensordict, rows)
        self._stop_if_broken(list(verdicts.values()))
        nothing = torch.zeros(*batch, 1, 1, device=device)
        earlier = next_tensordict.get("reward", None)
        if earlier is not None and earlier.numel() != nothing.numel():
            raise ValueError(
                f"('next', 'reward') has the shape {tuple(earlier.shape)}: expected one reward a row, "
                f"{tuple(nothing.shape)}, to add to."
            )
        next_tensordict.set("reward", nothing if earlier is None else earlier.reshape(nothing.shape) + nothing)
        next_tensordict.set("success", nothing.bool())
        next_tensordict.set("graded", nothing.bool())
        next_tensordict.set("grade_failure", columns.objects(failed, batch, device))
        next_tensordict.set("extracted", columns.objects([""] * len(failed), batch, device))
        if parts := self.grader.components:
            zeros = {name: nothing.clone() for name in parts}
            next_tensordict.set("reward_parts", TensorDict(zeros, batch_size=batch, device=device))
        self._write(next_tensordict, verdicts)
        if self.end_on_answer:
            # A failed grade ends the dialogue too: a policy that makes its grader fail gets no second one.
            over = {
                row
                for row, verdict in verdicts.items()
                if row not in replied and (verdict.answer is not None or verdict.failure is not None)
            }
            raise_flags(next_tensordict, [row in over for row in range(len(failed))], "terminated", "done")
        return next_tensordict

    def _stop_if_broken(self, verdicts: Sequence[Verdict]) -> None:
        """Count the batches running in which every grade failed."""
        if self.patience is None or not verdicts:
            return
        failures = [verdict.failure for verdict in verdicts if verdict.failure is not None]
        if len(failures) < len(verdicts):
            self._failed_batches = self._failed_grades = 0
            return
        if not self._failed_batches:
            self._first_failure = getattr(failures[0], "traceback", "") or failures[0]
        self._failed_batches += 1
        self._failed_grades += len(failures)
        if self._failed_batches >= self.patience and self._failed_grades >= _ENOUGH:
            batches, self._failed_batches, self._failed_grades = self._failed_batches, 0, 0
            verifier = self.grader.verifier
            name = getattr(verifier, "__qualname__", None) or type(verifier).__name__
            raise VerifierError(
                f"no grade came for {batches} batches running: {name} fails whatever it is asked. "
                f"RewardTransform(patience=None) goes on all the same. Its first failure:\n{self._first_failure.rstrip()}"
            )

    def settle(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> None:
        """Grade what a transform behind this one has ended without an answer: the episode's last turn is graded."""
        seen, self._seen = self._seen, set()
        done, failed = flags(next_tensordict, "done"), self._failed(next_tensordict)
        goes = columns.stepped(tensordict)
        rows = [i for i, over in enumerate(done) if over and goes[i] and i not in seen and not failed[i]]
        if rows:
            self._write(next_tensordict, self._grade(tensordict, next_tensordict, rows))

    def _write(self, td: TensorDictBase, verdicts: dict[int, Verdict]) -> None:
        """Put the verdicts of some rows into the columns."""
        rows = torch.tensor(list(verdicts), dtype=torch.int64, device=td.device)

        def changed(key: NestedKey, values: list[Any]) -> None:
            column = td.get(key).clone()
            added = torch.tensor(values, dtype=column.dtype, device=column.device)
            column.view(-1)[rows] = column.view(-1)[rows] + added if key == "reward" else added
            td.set(key, column)

        told = verdicts.values()
        changed("reward", [verdict.score for verdict in told])
        changed("success", [verdict.correct for verdict in told])
        changed("graded", [verdict.failure is None or self.on_failure == "score" for verdict in told])
        for name in self.grader.components:
            changed(("reward_parts", name), [verdict.parts.get(name, 0.0) for verdict in told])

        def told_again(key: str, texts: dict[int, str]) -> None:
            column = columns.read_objects(td.get(key), td.batch_size)
            td.set(
                key, columns.objects([texts.get(i, old) for i, old in enumerate(column)], td.batch_size, td.device)
            )

        told_again("grade_failure", {row: str(verdict.failure or "") for row, verdict in verdicts.items()})
        told_again("extracted", {row: str(verdict.answer or "") for row, verdict in verdicts.items()})

    @staticmethod
    def _failed(td: TensorDictBase) -> list[str]:
        """Why the environment failed a row that is not to be graded; empty elsewhere."""
        count, said = td.batch_size.numel(), td.get("env_failure", None)
        if said is None:
            return [""] * count
        # An environment with grades of its own says which of its failures are the policy's affair.
        own = td.get("graded", None)
        graded = [False] * count if own is None else own.reshape(count).tolist()
        failures = columns.read_objects(said, td.batch_size)
        return ["" if fine else failure for failure, fine in zip(failures, graded, strict=True)]

    @property
    def _of_groups(self) -> bool:
        return getattr(self.grader.verifier, "grades", None) == "group"

    def _grade(self, root: TensorDictBase, following: TensorDictBase, rows: list[int]) -> dict[int, Verdict]:
        """The verdicts of some rows."""
        batch = following.batch_size
        found: dict[NestedKey, list[Any]] = {}
        for name, argument in self.reads().items():
            value = following.get(name, None)
            value = root.get(name, None) if value is None else value
            if value is None:
                raise missing(self, name, argument, root.keys())
            found[name] = columns.read_objects(value, batch)
        key = self.reference_key
        references: list[Any] = (
            [dict(zip(key, row, strict=True)) for row in zip(*(found[part] for part in key), strict=True)]
            if isinstance(key, list)
            else found[key]
        )
        transcripts = columns.read_objects(following.get("transcript"), batch)
        episodes = [
            _episode(transcripts[row], references[row], {name: found[name][row] for name in self.row_keys})
            for row in rows
        ]
        groups: list[Hashable] | None = None
        if self._of_groups:
            asked = found[self.group_key]
            groups = [asked[row] if isinstance(asked[row], Hashable) else repr(asked[row]) for row in rows]
        return dict(zip(rows, self.grader.grade(episodes, groups), strict=True))

    def close(self) -> None:
        """End the worker processes; they start anew at the next step."""
        self.grader.close()

    def transform_reward_spec(self, reward_spec: Composite) -> Composite:
        """The specs of what is written beside ``reward``."""
        shape, device = reward_spec.shape, reward_spec.device

        def number(dtype: torch.dtype = torch.float32) -> Unbounded:
            return Unbounded((*shape, 1, 1), dtype=dtype, device=device)

        reward_spec["reward"] = number()
        reward_spec["success"] = number(torch.bool)
        reward_spec["graded"] = number(torch.bool)
        for name in ("grade_failure", "extracted"):
            reward_spec[name] = NonTensor(shape, device=device, example_data="")
        if parts := self.grader.components:
            reward_spec["reward_parts"] = Composite({name: number() for name in parts}, shape=shape, device=device)
        return reward_spec


def _episode(transcript: Transcript, reference: Any, row: dict[str, Any]) -> Episode:
    """What the policy sampled last, with its conversation."""
    if transcript.answer is None:
        return Episode({"role": "assistant", "content": ""}, reference, transcript.messages, row)
    return Episode(
        transcript.messages[transcript.answer],
        reference,
        transcript.messages[: transcript.answer + 1],
        row,
        transcript.total_sampled,
        transcript.ended is False,
    )
