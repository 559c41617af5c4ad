"""``RewardTransform``: a verifier's verdicts as torchrl rewards."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torchrl.data import Composite, Unbounded
from torchrl.envs import Transform

from torchrl_chat import columns
from torchrl_chat.rewards import Verdict, Verifier
from torchrl_chat.transcript import Transcript


class RewardTransform(Transform):
    """Grades the policy's last message of every row, in all input modes.

    The verifier gets the message's text, without the tokens that end the turn, and the reference of the
    row. Written, over the environment's batch size:

    - ``("next", "reward")``: float32 (\\*B, 1, 1), the shape that torchrl's ``GRPOLoss`` needs;
    - ``("next", "success")``: bool (\\*B, 1, 1);
    - ``("next", "terminated")`` and ``("next", "done")`` become true where an answer was given.

    A verifier that raises costs its own row only: that row gets ``failure_score`` and a warning.

    Args:
        verifier: ``(response, reference) -> Verdict``, or a bare number.
        reference_key: the entry with the references, a value a row.
        end_on_answer: whether an answer ends the dialogue.
        failure_score: the reward of a row whose verifier raised.

    Example:
        >>> env = DatasetChatEnv(dataset=rows, tokenizer=tokenizer, num_envs=2)
        >>> env = env.append_transform(RewardTransform(NumberVerifier()))
    """

    def __init__(
        self,
        verifier: Verifier,
        *,
        reference_key: NestedKey = "answer",
        end_on_answer: bool = True,
        failure_score: float = 0.0,
    ):
        super().__init__(in_keys=["transcript", reference_key], out_keys=["reward", "success"])
        self.verifier = verifier
        self.reference_key = reference_key
        self.end_on_answer = end_on_answer
        self.failure_score = failure_score

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        batch, device = next_tensordict.batch_size, next_tensordict.device
        references = next_tensordict.get(self.reference_key, None)
        if references is None:
            references = tensordict.get(self.reference_key, None)
        if references is None:
            raise KeyError(
                f"RewardTransform grades against {self.reference_key!r}, which is not there: got the keys "
                f"{sorted(map(str, tensordict.keys()))}. Pass reference_key=..."
            )
        transcripts = columns.read_objects(next_tensordict.get("transcript"), batch)
        verdicts = [
            self._grade(_last_answer(transcript), reference, row)
            for row, (transcript, reference) in enumerate(
                zip(transcripts, columns.read_objects(references, batch), strict=True)
            )
        ]

        def column(values: list[Any], dtype: torch.dtype, tail: int) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=device).reshape(*batch, *[1] * tail)

        reward = column([verdict.score for verdict in verdicts], torch.float32, 2)
        earlier = next_tensordict.get("reward", None)
        next_tensordict.set("reward", reward if earlier is None else earlier + reward)
        next_tensordict.set("success", column([verdict.correct for verdict in verdicts], torch.bool, 2))
        if self.end_on_answer:
            answered = column([verdict.answer is not None for verdict in verdicts], torch.bool, 1)
            for key in ("terminated", "done"):
                before = next_tensordict.get(key, None)
                next_tensordict.set(key, answered if before is None else before | answered)
        return next_tensordict

    def _grade(self, response: str, reference: Any, row: int) -> Verdict:
        try:
            verdict = self.verifier(response, reference)
        except Exception as error:  # whatever user code raises: the other rows are not lost
            warnings.warn(
                f"the verifier failed on row {row} ({type(error).__name__}: {error}); its reward is "
                f"{self.failure_score}.",
                stacklevel=2,
            )
            return Verdict(self.failure_score, None, False)
        if isinstance(verdict, Verdict):
            return verdict
        return Verdict(float(verdict), response, float(verdict) >= 1.0)

    def transform_reward_spec(self, reward_spec: Composite) -> Composite:
        """The specs of ``reward`` and ``success``, both (\\*B, 1, 1)."""
        shape, device = (*reward_spec.shape, 1, 1), reward_spec.device
        reward_spec["reward"] = Unbounded(shape, device=device)
        reward_spec["success"] = Unbounded(shape, dtype=torch.bool, device=device)
        return reward_spec


def _last_answer(transcript: Transcript) -> str:
    """The text of the message that the policy sampled last."""
    return "" if transcript.answer is None else transcript.messages[transcript.answer]["content"]
