"""MATH as an environment."""

from __future__ import annotations

from torchrl_chat.envs.task import TaskEnv
from torchrl_chat.rewards.tasks import TASKS


class MATHEnv(TaskEnv):
    """Competition mathematics with answers in LaTeX (Hendrycks et al. 2021, arXiv:2103.03874).

    Rows have ``problem``, and ``answer`` or a worked ``solution`` that boxes it. Reward 1 if the marked answer equals the
    reference as mathematics, see :class:`~torchrl_chat.rewards.MathVerifier`; needs the extra ``math``. An answer
    that takes SymPy beyond ``deadline`` seconds costs its own row only.

    Keyword Args:
        unmarked: whether an answer counts that is not marked (``\\boxed{}``, ``<answer>``, ``####``). Defaults to ``False``.
        format_reward: the reward of a wrong answer that is at least marked.

    The others are those of the verifier and of :class:`TaskEnv`.

    Example:
        >>> rows = [{"problem": "What is $\\\\frac{1}{2} + \\\\frac{1}{3}$?", "answer": "\\\\frac{5}{6}"}]
        >>> env = MATHEnv(dataset=rows, tokenizer=tokenizer, num_envs=8, group_repeats=True, repeats=4)
    """

    TASK = TASKS["math"]
    DATASET = "DigitalLearningGmbH/MATH-lighteval"
    SYSTEM_PROMPT = "Solve the user's problem. Reason step by step, and put your final answer within \\boxed{}."
