"""IFEval as an environment."""

from __future__ import annotations

from torchrl_chat.envs.task import TaskEnv
from torchrl_chat.rewards.tasks import TASKS


class IFEvalEnv(TaskEnv):
    """Prompts with instructions that can be checked (Zhou et al. 2023, arXiv:2311.07911).

    Rows have ``prompt``, ``instruction_id_list`` and ``kwargs``. The reward is a figure of
    :class:`~torchrl_chat.rewards.IFEvalVerifier`; all of them are under ``("next", "reward_parts")``. Instructions about
    languages need the extra ``ifeval``.

    Keyword Args:
        score: which figure is the reward: ``"prompt_strict"`` (default), ``"instruction_strict"``, ``"prompt_loose"``,
            ``"instruction_loose"``, or ``"torchrl"``.

    The others are as for :class:`TaskEnv`.

    Example:
        >>> rows = [{"prompt": "Greet me. No commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}]
        >>> env = IFEvalEnv(dataset=rows, tokenizer=tokenizer, score="instruction_strict")
    """

    TASK = TASKS["ifeval"]
    DATASET = "google/IFEval"
    SYSTEM_PROMPT = None
