"""GSM8K as an environment."""

from __future__ import annotations

from torchrl_chat.envs.task import TaskEnv
from torchrl_chat.rewards.tasks import TASKS


class GSM8KEnv(TaskEnv):
    """Grade-school word problems with verifiable answers (Cobbe et al. 2021, arXiv:2110.14168).

    Rows have ``question`` and ``answer`` (a worked solution that ends with ``#### 42``); train 7,473 and test 1,319 of
    them. Reward 1 if the number is right, 0 if not.

    Keyword Args:
        last_number: accept the last number of an answer that is not marked (``#### 42``, ``\\boxed{42}``,
            ``<answer>42</answer>``).
        format_reward: the reward of a wrong answer that is at least marked.

    The others are as for :class:`TaskEnv`.

    Example:
        >>> env = GSM8KEnv(dataset="gsm8k/train.jsonl", tokenizer=tokenizer, num_envs=8, repeats=4)
        >>> rollout = env.rollout(1, policy)  # doctest: +SKIP
    """

    TASK = TASKS["gsm8k"]
    DATASET = "openai/gsm8k"
    CONFIG = "main"
    SYSTEM_PROMPT = (
        "Solve the user's problem. Think step by step inside <think></think>, then give the final number, "
        "and nothing but the number, inside <answer></answer>."
    )
