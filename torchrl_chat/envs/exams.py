"""Evaluations whose rows come from a local file: competition numbers, multiple choice, code with tests.

Their data is not in the package, and they name no place on the hub: what a file has to hold is said where there is none.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping, Sequence
from typing import Any

from torchrl_chat.envs.loading import DatasetError, collate
from torchrl_chat.envs.task import MATHEnv, TaskEnv
from torchrl_chat.rewards import MultipleChoice
from torchrl_chat.rewards.tasks import TASKS, Task


class LocalTaskEnv(TaskEnv):
    """A task whose rows the user has.

    Raises:
        DatasetError: no ``dataset`` is given; the text says what its rows have to have.
    """

    def __init__(self, *, dataset: Any = None, **kwargs: Any):
        if dataset is None:
            raise DatasetError(f"{type(self).__name__} needs dataset=..., {self.TASK.rows}.")
        super().__init__(dataset=dataset, **kwargs)


class AIMEEnv(LocalTaskEnv):
    """Problems of the American Invitational Mathematics Examination: the answer is a whole number from 0 to 999.

    Rows have ``problem`` (or ``question``) and ``answer``. Reward 1 if the last marked number is the answer.

    Example:
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> rows = [{"id": "made-up-1", "problem": "How many divisors has 72?", "answer": "012"}]
        >>> env = AIMEEnv(dataset=rows, tokenizer=tokenizer)
        >>> env.score(["It is \\\\boxed{12}."])[0].correct
        True
    """

    TASK = TASKS["aime"]
    SYSTEM_PROMPT = "Solve the user's problem. Reason step by step, and put your final answer, a whole number, within \\boxed{}."


class MATH500Env(LocalTaskEnv):
    """The 500 problems of MATH (Lightman et al. 2023, arXiv:2305.20050) that are mostly evaluated; graded as those of :class:`MATHEnv`.

    Rows have ``problem`` and ``answer``, and ``subject``, ``level`` and ``unique_id`` to compare by. Needs the extra ``math``.

    Example:
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> rows = [{"problem": "What is 1/2 + 1/3?", "answer": "\\\\frac{5}{6}", "subject": "Prealgebra"}]
        >>> env = MATH500Env(dataset=rows, tokenizer=tokenizer)
        >>> env.TASK.name
        'math-500'
    """

    TASK = TASKS["math-500"]
    SYSTEM_PROMPT = MATHEnv.SYSTEM_PROMPT


class GPQAEnv(LocalTaskEnv):
    """Questions with lettered choices, of which the policy names one; as GPQA's (Rein et al. 2023, arXiv:2311.12022).

    A row has ``question``, and

    - ``choices`` or ``options``, a list of texts, with ``answer``: a letter, an index from 0, or the text of the choice (or
      ``answer_index``); or
    - ``Correct Answer`` and ``Incorrect Answer 1``, ``2`` ... , as GPQA's files have them.

    The reference becomes ``{"answer": letter, "choices": [texts]}``, in the order that is shown; a row whose answer is none
    of its choices costs its own grade only.

    Keyword Args:
        shuffle_choices: whether the choices of each question are put in an order of their own, which depends on the seed and
            the question alone: models prefer some letters. Answers to one question all see the same order.
        choice_seed: that seed. Defaults to ``seed``.

    The others are as for :class:`~torchrl_chat.envs.TaskEnv`.

    Example:
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> row = {"Question": "Which is prime?", "Correct Answer": "23", "Incorrect Answer 1": "21", "Incorrect Answer 2": "25"}
        >>> env = GPQAEnv(dataset=[row], tokenizer=tokenizer, seed=0)
        >>> reference = env.reset()["answer"][0]
        >>> reference["choices"]["ABC".index(reference["answer"])]
        '23'
    """

    TASK = TASKS["gpqa"]
    SHUFFLED = True
    SYSTEM_PROMPT = (
        'Answer the user\'s question by one of its choices. Reason step by step, and end with "The answer is (X).", where X '
        "is the letter of your choice."
    )

    def __init__(
        self,
        *,
        shuffle_choices: bool | None = None,
        choice_seed: int | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ):
        shuffled = self.SHUFFLED if shuffle_choices is None else shuffle_choices
        order = None if not shuffled else choice_seed if choice_seed is not None else seed or 0
        kwargs.setdefault("collate_fn", functools.partial(_choice_columns, self.TASK, order))
        super().__init__(seed=seed, **kwargs)

    @classmethod
    def columns_of(cls, rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
        """Rows of the dataset to columns, their choices in the order of the file."""
        return _choice_columns(cls.TASK, None, rows)


class MMLUProEnv(GPQAEnv):
    """Questions in the manner of MMLU-Pro (Wang et al. 2024, arXiv:2406.01574), choices in the order of the file; see :class:`GPQAEnv`.

    Example:
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> row = {"question": "1 + 1?", "options": ["1", "2"], "answer": "B", "answer_index": 1, "category": "math"}
        >>> env = MMLUProEnv(dataset=[row], tokenizer=tokenizer)
        >>> env.reset()["answer"][0]
        {'answer': 'B', 'choices': ['1', '2']}
    """

    TASK = TASKS["mmlu-pro"]
    SHUFFLED = False


class HumanEvalEnv(LocalTaskEnv):
    """Functions to be written, graded by their tests (Chen et al. 2021, arXiv:2107.03374), in a sandbox.

    Rows have ``prompt`` (a signature with a docstring), ``test`` (which defines ``check``) and ``entry_point``, and
    ``task_id``. The code is the last fenced block of the answer; see :class:`~torchrl_chat.rewards.CodeVerifier`. Each program
    runs in a :class:`~torchrl_chat.sandbox.Sandbox` of its own (Linux).

    Keyword Args:
        verifier: another one than that, with a runner of your own, say.

    The others are as for :class:`~torchrl_chat.envs.TaskEnv`.

    Example:
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> test = "def check(candidate):\\n    assert candidate(2) == 4\\n"
        >>> row = {"task_id": "made-up/0", "prompt": "def square(x):\\n", "test": test, "entry_point": "square"}
        >>> env = HumanEvalEnv(dataset=[row], tokenizer=tokenizer)
        >>> sorted(env.reset()["answer"][0])
        ['entry_point', 'prompt', 'test']
    """

    TASK = TASKS["humaneval"]
    SYSTEM_PROMPT = None

    def __init__(self, *, verifier: Any = None, **kwargs: Any):
        if verifier is None:
            from torchrl_chat.sandbox import Sandbox

            options = {key: kwargs.pop(key) for key in ("partial",) if key in kwargs}
            verifier = self.TASK.make_verifier(runner=Sandbox().run, **options)
        super().__init__(verifier=verifier, **kwargs)

    @classmethod
    def columns_of(cls, rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
        """Rows of the dataset to columns, the prompt as a request."""
        columns = super().columns_of(rows)
        columns["query"] = [
            query  # None is no function, and this row's affair
            and f"Complete this function. Answer with all of it, in one fenced block of Python.\n\n```python\n{query}```"
            for query in columns["query"]
        ]
        return columns


# ---------------------------------------------------------------------- lettered choices
def _choice_columns(task: Task, order: int | None, rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Rows to columns; with a seed in ``order``, the choices of each in an order of its own."""
    known = {*task.questions, *task.references}
    columns = {key: column for key, column in collate(rows).items() if key not in known}
    shown = [_shown(task, order, row) for row in rows]
    return {**columns, "query": [query for query, _ in shown], "answer": [reference for _, reference in shown]}


def _shown(task: Task, order: int | None, row: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """The question with its choices, and the reference; ``None`` for a question that is empty."""
    question = task.question_of(row)
    choices, answer = _choices_of(task, row)
    verify = MultipleChoice()
    if len(choices) > len(verify.letters):
        raise ValueError(
            f"a row of task {task.name!r} has {len(choices)} choices: expected up to {len(verify.letters)}."
        )
    try:
        right: int | None = verify.letters.index(verify.expected(answer, choices))
    except ValueError:  # it is graded with that, and fails alone
        right = None
    places = list(range(len(choices)))
    if order is not None:
        random.Random(f"{order} {question}").shuffle(places)
    told: Any = answer if right is None else verify.letters[places.index(right)]
    shown = [choices[place] for place in places]
    lines = "\n".join(f"{letter}. {choice}" for letter, choice in zip(verify.letters, shown, strict=False))
    return None if question is None else f"{question}\n\n{lines}", {"answer": told, "choices": shown}


def _choices_of(task: Task, row: Mapping[str, Any]) -> tuple[list[str], Any]:
    """The choices of a row as its file has them, and which is right."""
    for key in ("choices", "options"):
        given = row.get(key)
        if isinstance(given, Mapping):  # by letter
            given = list(given.values())
        if given is not None and not isinstance(given, str) and len(given) > 1:
            answer = row.get("answer")
            return [str(choice).strip() for choice in given], row.get("answer_index") if answer is None else answer
    if row.get("Correct Answer") is not None:
        wrong = sorted(key for key in row if key.startswith("Incorrect Answer") and row[key] is not None)
        if wrong:
            return [str(row[key]).strip() for key in ("Correct Answer", *wrong)], 0
    there = ", ".join(key for key, value in row.items() if value is not None)
    raise KeyError(f"a row of task {task.name!r} has no choices: expected {task.rows}; it has {there}.")
