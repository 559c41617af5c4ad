"""Which episodes failed, so that nothing is to be learned from them: no grade came, or the environment or the policy broke."""

from __future__ import annotations

from typing import Any

import torch

from torchrl_chat import columns
from torchrl_chat.conversation import StopReason


def failed_rows(written: Any, count: int) -> list[bool]:
    """Of each row whether its episode failed.

    That is the case where the policy could not answer (a reason under ``"policy_error"``); and, unless ``"graded"`` is true,
    where a grade failed (a reason under ``"grade_failure"``), where the environment failed the row (a reason under
    ``"env_failure"``), and where the episode ended with :attr:`StopReason.ERROR
    <torchrl_chat.conversation.StopReason.ERROR>` under ``"stop_reason"``. So a failure that counts as an answer
    (``RewardTransform(on_failure="score")``, an environment that says which of its failures are the policy's affair) is none.

    Args:
        written: what the last steps wrote, a TensorDict of batch size (N,) or a dict of columns. Those that are not there say
            nothing.
        count: N.

    Example:
        >>> import torch
        >>> failed_rows({"graded": torch.tensor([[True], [False]]), "grade_failure": ["", "timeout"]}, 2)
        [False, True]
    """

    def texts(key: str) -> list[Any]:
        value = written.get(key, None)
        if value is None or isinstance(value, list):
            return [None] * count if value is None else value
        return columns.read_objects(value, torch.Size([count]))

    def numbers(key: str) -> list[Any]:
        value = written.get(key, None)
        return [None] * count if value is None else value.reshape(count, -1)[:, 0].tolist()

    reasons = zip(texts("grade_failure"), texts("env_failure"), numbers("stop_reason"), strict=True)
    broke = [bool(grade or env) or stop == StopReason.ERROR for grade, env, stop in reasons]
    return [
        bool(error) or (failed and not graded)
        for failed, graded, error in zip(broke, numbers("graded"), texts("policy_error"), strict=True)
    ]
