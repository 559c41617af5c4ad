"""Which episodes failed, so that nothing is to be learned from them: no grade came, or the environment or the policy broke."""

from __future__ import annotations

from typing import Any

import torch

from torchrl_chat import columns


def failed_rows(written: Any, count: int) -> list[bool]:
    """Of each row whether its episode failed.

    That is the case where a grade failed and was not to be scored (``"graded"`` is false, with a reason under
    ``"grade_failure"``: ``RewardTransform(on_failure="mask")``); where the episode ended with
    :attr:`StopReason.ERROR <torchrl_chat.transforms.stop.StopReason.ERROR>` under ``"stop_reason"``; where the environment
    failed the row (a reason under ``"env_failure"``) and nobody graded it; and where the policy could not answer (a reason
    under ``"policy_error"``).

    Args:
        written: what the last steps wrote, a TensorDict of batch size (N,) or a dict of columns. Those that are not there say
            nothing.
        count: N.

    Example:
        >>> failed_rows({"graded": torch.tensor([[True], [False]]), "grade_failure": ["", "timeout"]}, 2)
        [False, True]
    """
    from torchrl_chat.transforms.stop import StopReason  # transforms stand on this room

    found, fine = [False] * count, [False] * count

    def texts(key: str) -> list[Any]:
        value = written.get(key, None)
        if value is None or isinstance(value, list):
            return [None] * count if value is None else value
        return columns.read_objects(value, torch.Size([count]))

    if (graded := written.get("graded", None)) is not None:
        fine = graded.reshape(count, -1).all(-1).tolist()
        found = [not good and bool(why) for good, why in zip(fine, texts("grade_failure"), strict=True)]
    if (stop := written.get("stop_reason", None)) is not None:
        ends = stop.reshape(count, -1)[:, 0].tolist()
        found = [failed or end == StopReason.ERROR for failed, end in zip(found, ends, strict=True)]
    found = [
        failed or (bool(why) and not good)
        for failed, why, good in zip(found, texts("env_failure"), fine, strict=True)
    ]
    return [failed or bool(why) for failed, why in zip(found, texts("policy_error"), strict=True)]
