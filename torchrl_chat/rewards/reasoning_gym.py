"""Answers to ``reasoning-gym`` tasks, scored by the tasks themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchrl_chat.rewards.marked import tags
from torchrl_chat.rewards.verdict import Verdict


def load_task(task: str, settings: Mapping[str, Any]) -> Any:
    """The generator of a task: a sequence of ``{"question", "answer", "metadata"}``.

    Raises:
        ImportError: the package is not installed.
        ValueError: there is no such task, or a setting is not one of its own.
    """
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ImportError("reasoning-gym is not installed: pip install 'torchrl_chat[reasoning-gym]'.") from error
    if task not in DATASETS:
        raise ValueError(f"reasoning-gym has no task {task!r}: it has {', '.join(sorted(DATASETS))}.")
    try:
        return reasoning_gym.create_dataset(task, **settings)
    except (TypeError, AssertionError) as error:
        raise ValueError(f"reasoning-gym's task {task!r} does not take {dict(settings)}: {error}") from error


def task_rows(task: str, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a task: the question, the answer that it names, and the row's index for scoring."""
    generator = load_task(task, settings)
    return [
        {"query": entry["question"], "answer": str(entry["answer"]), "index": index}
        for index, entry in enumerate(generator[i] for i in range(len(generator)))
    ]


class ReasoningGymVerifier:
    """Scores with the task's ``score_answer``; the reference is the row's index.

    The answer is what stands in the last ``<answer></answer>``, or the whole response.

    Some tasks hand the answer to SymPy, which can take forever on a hostile one: so it is graded in a worker process.

    Args:
        task: the name of the generator.
        settings: its settings, with ``size`` and ``seed``.
    """

    isolate = True

    def __init__(self, task: str, settings: Mapping[str, Any]):
        self.task = task
        self.settings = dict(settings)
        self._generator: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_generator": None}

    def warm(self) -> None:
        """Make the generator."""
        if self._generator is None:
            self._generator = load_task(self.task, self.settings)

    def __call__(self, response: str, reference: int) -> Verdict:
        """Grade one response."""
        self.warm()
        tagged = tags(response, outer=True)  # the package itself reads from the first opening tag on
        answer = tagged[-1].text if tagged else response.strip()
        score = float(self._generator.score_answer(answer, self._generator[int(reference)]))
        return Verdict(score, answer or None, score >= 1.0)
