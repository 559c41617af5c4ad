"""What a step's conversations tell of a run, and sentences where a run is dying."""

from __future__ import annotations

import resource
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase

from torchrl_chat import columns, ranks
from torchrl_chat.conversation import StopReason
from torchrl_chat.rewards import Grader
from torchrl_chat.seeds import EPOCH, ROW
from torchrl_chat.training.failures import failed_rows
from torchrl_chat.transforms import RewardTransform

_CUT = {StopReason.MAX_TURN_TOKENS, StopReason.MAX_TOKENS, StopReason.CONTEXT_FULL}


def figures(batches: Sequence[TensorDictBase]) -> dict[str, float]:
    """Numbers of finished conversations, by the names that metrics.jsonl has.

    Args:
        batches: all that a step has played, as :func:`~torchrl_chat.playing.play` gives it. Several processes call this together.

    Returns:
        ``"sampled_tokens"``: in all; ``"sampled_mean"`` and ``"sampled_longest"``: of one conversation; ``"cut"``: the share that ended
        at a limit of tokens; ``"ungraded"``: the share without a grade, from which nothing is learned; ``"equal_groups"``: the share
        of questions whose answers, several of them graded, all earned the same, where there are any.
    """
    sampled = [
        t.total_sampled for each in batches for t in columns.read_objects(each["transcript"], each.batch_size)
    ]
    reasons = [reason for each in batches for reason in each["stop_reason"].flatten().tolist()]
    failed = [bad for each in batches for bad in failed_rows(each, len(each))]
    count = max(1, len(sampled))
    found = {
        "sampled_tokens": float(sum(sampled)),
        "sampled_mean": sum(sampled) / count,
        "sampled_longest": float(max(sampled, default=0)),
        "cut": sum(reason in _CUT for reason in reasons) / count,
        "ungraded": sum(failed) / count,
    }
    groups = _groups(batches, failed)
    # Of all processes, some of which may have no such question.
    equal, several = ranks.total(torch.tensor([sum(len(set(each)) == 1 for each in groups), len(groups)])).tolist()
    return found | ({"equal_groups": equal / several} if several else {})


def _groups(batches: Sequence[TensorDictBase], failed: Sequence[bool]) -> list[list[float]]:
    """The rewards of the answers to each question of which several are graded."""
    rewards: dict[tuple[int, ...], list[float]] = {}
    bad = iter(failed)
    for batch, each in enumerate(batches):
        told = [each.get(name, None) for name in (ROW, EPOCH)]
        if any(column is None for column in told):
            return []
        keys = zip(*(column.flatten().tolist() for column in told), strict=True)
        for key, reward in zip(keys, each["reward"].flatten().tolist(), strict=True):
            if not next(bad):
                rewards.setdefault((batch, *key), []).append(reward)
    return [group for group in rewards.values() if len(group) > 1]


def graders(env: Any) -> list[Grader]:
    """What grades in an environment: of its :class:`~torchrl_chat.RewardTransform`, one each."""
    parts = getattr(env, "transform", None)
    if parts is None:
        return []
    return [part.grader for part in parts.modules() if isinstance(part, RewardTransform)]


TOLD = (
    "pass_rate", "reward", "loss", "entropy", "grad_norm", "lr", "ratio_p01", "ratio_p99", "mismatch", "mismatch_max", "cut",
    "equal_groups", "ungraded", "sampled_mean", "sampled_longest", "tokens_per_second", "tokens_per_second_trained", "seconds_sampling",
    "seconds_grading", "seconds_learning", "memory",
)  # fmt: skip
"""What the line of a run tells of its last step, what is asked for most in front: a terminal has room for some of it."""

_SUMS, _MOST = {"sampled_tokens", "groups", "kept"}, {"sampled_longest", "mismatch_max"}


def of_all(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The metrics of several processes that played equally many conversations each, as those of all: sums, the greatest, means.

    Example:
        >>> of_all([{"sampled_tokens": 8.0, "reward": 1.0}, {"sampled_tokens": 4.0, "reward": 0.5}])
        {'sampled_tokens': 12.0, 'reward': 0.75}
    """
    found = {}
    for name in dict.fromkeys(name for each in metrics for name in each):
        values = [each[name] for each in metrics if name in each]
        found[name] = sum(values) if name in _SUMS else max(values) if name in _MOST else sum(values) / len(values)
    return found


def of_the_run(metrics: Mapping[str, float]) -> dict[str, float]:
    """A step's metrics without those of the machine (times, rates, memory): what the same run with the same seed tells again.

    Example:
        >>> of_the_run({"loss": 0.5, "seconds": 1.2, "seconds_sampling": 0.8, "tokens_per_second": 90.0, "memory": 512.0})
        {'loss': 0.5}
    """
    return {
        name: value for name, value in metrics.items() if not name.startswith(("seconds", "tokens_per_", "memory"))
    }


def peak_memory() -> float:
    """MiB that this process has had at most: of the CUDA device where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**20 if sys.platform == "darwin" else 2**10)


class Watch:
    """Looks at the metrics of one step after the other, and says once what will not come right by itself.

    Example:
        >>> Watch().look({"ungraded": 0.5})
        ['50 % of the conversations have no grade: see "grade_failure" in rollouts.jsonl.']
    """

    patience = 10
    """Steps in a row, of what may be chance in one."""
    window = 50
    """Steps whose rewards are compared with those of as many before, one standard error of the difference being chance."""
    apart = 0.05
    """Mean absolute difference of log-probs that one policy in two programs has not: probabilities differ by 5 % there."""

    def __init__(self) -> None:
        self._rewards: deque[float] = deque(maxlen=2 * self.window)
        self._said: set[str] = set()
        self._since: dict[str, int] = {}

    def look(self, metrics: Mapping[str, float]) -> list[str]:
        """The sentences of a step."""
        found = []
        if metrics.get("ungraded", 0.0) > 0.2:
            share = f"{metrics['ungraded']:.0%}".replace("%", " %")
            found += self._once(
                "ungraded", f'{share} of the conversations have no grade: see "grade_failure" in rollouts.jsonl.'
            )
        equal = metrics.get("equal_groups") == 1.0 or metrics.get("idle") == 1.0
        if self._lasting("idle", equal):
            what = (
                "solved: ask harder ones"
                if metrics.get("pass_rate", 0.0) > 0.99
                else "too hard, or too few answers are asked for"
            )
            found += self._once(
                "idle",
                f"for {self.patience} steps all rewards of each question were equal: there was nothing to learn from. They are {what}.",
            )
        if self._lasting("entropy", metrics.get("entropy", 1.0) < 1e-3 and metrics.get("pass_rate", 1.0) < 0.9):
            found += self._once(
                "entropy",
                "the entropy is gone: all answers to a question are alike. Try a lower --lr, or an --entropy bonus.",
            )
        if self._lasting("ess", metrics.get("ess", 1.0) < 0.5):
            found += self._once(
                "ess",
                f"ratios have weighed less than half of the tokens for {self.patience} steps (ess {metrics.get('ess', 1.0):.2f}): the updates are "
                "too large (--lr, --epochs), or what samples is another policy (--vllm-dtype float32, --correction).",
            )
        if self._lasting("mismatch", metrics.get("mismatch", 0.0) > self.apart):
            found += self._once(
                "mismatch",
                f"for {self.patience} steps what samples and what learns have differed in the log-prob of a token by more than {self.apart} on average "
                f"({metrics.get('mismatch', 0.0):.2g}): --vllm-dtype float32 makes them one policy, --correction weighs tokens.",
            )
        return found + self._of_rewards(metrics)

    def _of_rewards(self, metrics: Mapping[str, float]) -> list[str]:
        """Whether the rewards of the last steps are no better than those of as many before."""
        if "reward" not in metrics or metrics.get("pass_rate", 0.0) > 0.95:
            self._rewards.clear()
            return []
        self._rewards.append(metrics["reward"])
        if len(self._rewards) < 2 * self.window:
            return []
        values = torch.tensor(list(self._rewards), dtype=torch.float64).reshape(2, self.window)
        before, last = values.mean(1).tolist()
        error = float((values.var(1) / self.window).sum() ** 0.5)
        if last - before > error:
            return []
        rate = f" (lr {metrics['lr']:.2g})" if "lr" in metrics else ""
        return self._once(
            "reward",
            f"the mean reward of the last {self.window} steps, {last:.3g}, is not above that of the {self.window} before, {before:.3g}: nothing is "
            f"learned at this rate{rate}. Try a higher --lr where ratios stay near 1, a lower one where they do not.",
        )

    def _once(self, what: str, sentence: str) -> list[str]:
        if what in self._said:
            return []
        self._said.add(what)
        return [sentence]

    def _lasting(self, what: str, now: bool) -> bool:
        self._since[what] = self._since.get(what, 0) + 1 if now else 0
        return self._since[what] >= self.patience
