"""The figures of one run, read from its rollout file, and as a table for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torchrl_chat.evaluation.figures import Figures


def summed_up(path: Path, limit: int | None = None, samples: int | None = None) -> dict[str, Any]:
    """The figures of a rollout file.

    Args:
        path: the file.
        limit, samples: count the first rows, and the first answers to each, only.

    Raises:
        ValueError: there is no episode in it.
        OSError: there is no file.
    """
    from torchrl_chat.rollouts import read_rollouts

    if not path.exists():
        raise ValueError("no episode was played: there is nothing to sum up.")
    return Figures.of(
        episode
        for episode in read_rollouts(path)
        if (limit is None or episode["row"] < limit) and (samples is None or episode["place"] < samples)
    ).summary()


def as_table(summary: dict[str, Any]) -> str:
    """The figures for people."""
    low, high = summary["interval"]
    length = summary["sampled_tokens"]
    lines = [
        ("dataset, model", f"{summary['dataset']}, {summary['model']}"),
        ("questions", f"{summary['questions']}, {summary['episodes']} answers"),
        ("accuracy", f"{summary['accuracy']:.4f}  (95 % interval {low:.4f} to {high:.4f})"),
        *(
            (f"pass@{k}", "{value:.4f}  ({interval[0]:.4f} to {interval[1]:.4f})".format(**entry))
            for k, entry in summary["pass_at_k"].items()
            if k != "1"
        ),
        *(
            (f"maj@{k}", "{value:.4f}  ({interval[0]:.4f} to {interval[1]:.4f})".format(**entry))
            for k, entry in summary["maj_at_k"].items()
            if int(k) > 2  # of two answers a draw decides: maj@2 is pass@1
        ),
        ("mean reward", f"{summary['mean_reward']:.4f}"),
        *((f"  {name}", f"{value:.4f}") for name, value in summary["reward_parts"].items()),
        (
            "sampled tokens",
            f"mean {length['mean']:.1f}, median {length['median']:g}, 95 % up to {length['p95']}, max {length['max']}",
        ),
        ("cost", cost_of(summary)),
        ("cut at a limit", f"{summary['cut_share']:.1%}"),
        *(
            ("no answer", f"{count}{text}")
            for kind, text in _UNANSWERED.items()
            if (count := summary["unanswered"][kind])
        ),
        ("ended", _counts(summary["stops"])),
        *((name, _counts(summary[key])) for name, key in _TROUBLE if summary[key]),
        *([("drift", f"{summary['prompt_differs']} {_DRIFT}")] if summary["prompt_differs"] else []),
        *([("not played", f"{summary['missing']} answers")] if summary.get("missing") else []),
    ]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def cost_of(summary: dict[str, Any]) -> str:
    """What a run took, for people."""
    cost = summary["cost"]
    return (
        f"{cost['sampled_tokens']:,} sampled tokens, {cost['prompt_tokens']:,} of prompts, {clock(cost['seconds'])}"
    )


def clock(seconds: float) -> str:
    """A time for people.

    Example:
        >>> clock(7.25), clock(4000)
        ('7.2 s', '1:06:40')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


_UNANSWERED = {
    "cut": " were cut before they gave one: raise --max-new-tokens",
    "unmarked": " ended by themselves without marking one",
}
_TROUBLE = (("not graded", "grade_failures"), ("failed requests", "errors"))
_DRIFT = "answers to a prompt that is not the ledger's: the server renders and tokenizes on its own"


def _counts(counter: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counter.items())
