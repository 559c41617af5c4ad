"""What a step's conversations tell of a run, and sentences where a run is dying."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping, Sequence

import torch
from tensordict import TensorDictBase

from torchrl_chat import columns
from torchrl_chat.conversation import StopReason
from torchrl_chat.training.failures import failed_rows

_CUT = {StopReason.MAX_TURN_TOKENS, StopReason.MAX_TOKENS, StopReason.CONTEXT_FULL}


def figures(batches: Sequence[TensorDictBase]) -> dict[str, float]:
    """Numbers of finished conversations, by the names that metrics.jsonl has.

    Args:
        batches: all that a step has played, as :func:`~torchrl_chat.playing.play` gives it.

    Returns:
        ``"sampled_tokens"``: in all; ``"sampled_longest"``: of one conversation; ``"cut"``: the share that ended at a limit of
        tokens; ``"ungraded"``: the share without a grade, from which nothing is learned.
    """
    sampled = [
        t.total_sampled for each in batches for t in columns.read_objects(each["transcript"], each.batch_size)
    ]
    reasons = [reason for each in batches for reason in each["stop_reason"].flatten().tolist()]
    failed = [bad for each in batches for bad in failed_rows(each, len(each))]
    count = max(1, len(sampled))
    return {
        "sampled_tokens": float(sum(sampled)),
        "sampled_longest": float(max(sampled, default=0)),
        "cut": sum(reason in _CUT for reason in reasons) / count,
        "ungraded": sum(failed) / count,
    }


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

    def __init__(self) -> None:
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
        if self._lasting("idle", metrics.get("idle", 0.0) == 1.0):
            what = (
                "solved: ask harder ones"
                if metrics.get("pass_rate", 0.0) > 0.99
                else "too hard, or too few answers are asked for"
            )
            found += self._once(
                "idle",
                f"for {self.patience} steps all rewards of each question were equal, and nothing was learned: they are {what}.",
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
        return found

    def _once(self, what: str, sentence: str) -> list[str]:
        if what in self._said:
            return []
        self._said.add(what)
        return [sentence]

    def _lasting(self, what: str, now: bool) -> bool:
        self._since[what] = self._since.get(what, 0) + 1 if now else 0
        return self._since[what] >= self.patience
