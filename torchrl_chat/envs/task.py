"""``TaskEnv``: a dataset, a prompt and a verifier; and the ready-made environments that are nothing else."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, ClassVar, Literal, Self

from torchrl.envs import StepCounter

from torchrl_chat.envs.dataset import LOADER_OPTIONS, OPTIONS, DatasetChatEnv
from torchrl_chat.envs.loading import collate, load_rows
from torchrl_chat.rewards import Episode, Grader, Verdict
from torchrl_chat.rewards.tasks import TASKS, Task
from torchrl_chat.transforms.ending import EndOfDialogue
from torchrl_chat.transforms.reward import RewardTransform

GRADING = frozenset({"max_steps", "compute_reward", "on_failure", "failure_score", "deadline", "workers"})
"""The keyword arguments that say how answers are graded, and how long a dialogue may be."""


class GradedEnv(DatasetChatEnv):
    """A dataset whose answers are graded, in the environment and offline; the dialogue ends with the answer."""

    def _graded(
        self,
        verifier: Any,
        reference_key: str = "answer",
        *,
        max_steps: int | None = None,
        compute_reward: bool = True,
        on_failure: Literal["score", "mask"] = "score",
        **grading: Any,
    ) -> None:
        """Append what ends the dialogues, and what grades them."""
        grader = self.__dict__["_grader"] = Grader(verifier, **grading)
        if max_steps is None:
            self._grow(EndOfDialogue())
        elif max_steps:
            self._grow(StepCounter(max_steps=max_steps))
        if compute_reward:
            self._grow(RewardTransform(grader, reference_key=reference_key, on_failure=on_failure))

    def _scored(self, predictions: Sequence[str], references: Sequence[Any]) -> list[Verdict]:
        """The verdicts of answers, given as texts."""
        if len(predictions) != len(references):
            raise ValueError(f"{len(predictions)} predictions for {len(references)} references.")
        pairs = zip(predictions, references, strict=True)
        return self.__dict__["_grader"].grade([Episode.of(text, reference) for text, reference in pairs])


class TaskEnv(GradedEnv):
    """A dataset whose answers a verifier grades: one of the ready-made environments below.

    Each conversation starts with a question of the dataset; the policy's answer is graded against the row's reference,
    which is the entry ``"answer"``. The dialogue ends with the answer, and with a turn that nobody replies to: after one turn,
    unless tools, a simulated user or a transform of yours is appended.

    Keyword Args:
        dataset: the hub name, a local folder or file, a ``datasets.Dataset``, or a list of rows.
        max_steps: the number of turns after which the dialogue is truncated, whatever they hold, calls of tools too, for
            dialogues that are continued by hand (``append_messages`` between two steps); 0 for no limit. By default
            there is none but that somebody replies; :class:`~torchrl_chat.transforms.Budget` has further ones.
        compute_reward: whether rewards are computed.
        verifier: another verifier than the task's.
        data_key: the column of the question, where it has another name than those that the task looks for. In the environment it
            is ``"query"``, and the reference ``"answer"``.
        reference_key: the column of the reference.
        failure_score, on_failure, deadline, workers: as for :class:`~torchrl_chat.RewardTransform`.
        options: options of the task's verifier.

    The others are as for :class:`DatasetChatEnv`.

    Raises:
        KeyError: a row has no column of the question or of the reference; the message names those that were looked for.
        TypeError: an option that the verifier does not have.
    """

    TASK: ClassVar[Task]
    DATASET: ClassVar[Any] = None
    CONFIG: ClassVar[str | None] = None

    def __init__(
        self,
        *,
        dataset: Any = None,
        name: str | None = None,
        split: str | Sequence[str] | None = "train",
        collate_fn: Callable[[Any], Any] | None = None,
        verifier: Any = None,
        data_key: str | None = None,
        reference_key: str | None = None,
        **kwargs: Any,
    ):
        verifier, grading = self._grading(verifier, kwargs, OPTIONS)
        if dataset is None:
            dataset = self.DATASET
        if isinstance(dataset, str) and dataset == self.DATASET and name is None:
            name = self.CONFIG
        if kwargs.get("ray_backend") and kwargs.get("dataloader_actor_name") is None:
            kwargs["dataloader_actor_name"] = f"{self.TASK.name}_dataloader"
        columns = collate_fn or self.columns_of
        given = (("question", data_key, self.TASK.questions), ("reference", reference_key, self.TASK.references))
        if names := [(what, key, known) for what, key, known in given if key is not None]:
            columns = functools.partial(_renamed, columns, names)
        super().__init__(dataset=dataset, name=name, split=split, collate_fn=columns, **kwargs)
        self.__dict__["_source"] = (dataset, name, split)
        self.__dict__["_collate"] = columns
        self._graded(verifier, **grading)

    @classmethod
    def from_dataloader(cls, dataloader: Any, *, verifier: Any = None, **kwargs: Any) -> Self:
        """The environment over an existing dataloader, whose batches have ``query`` and ``answer``.

        Keyword arguments that :meth:`DatasetChatEnv.from_dataloader` does not know are the verifier's options.
        """
        verifier, grading = cls._grading(verifier, kwargs, LOADER_OPTIONS)
        self = super().from_dataloader(dataloader, **kwargs)
        self._graded(verifier, **grading)
        return self

    @classmethod
    def _grading(cls, verifier: Any, given: dict[str, Any], known: Collection[str]) -> tuple[Any, dict[str, Any]]:
        """The verifier, and the options of grading, taken out of what is given; what nobody knows are the verifier's own."""
        grading = {key: given.pop(key) for key in given.keys() & GRADING}
        options = {key: given.pop(key) for key in given.keys() - known}
        if verifier is None:
            return cls.TASK.make_verifier(**options), grading
        if options:
            raise TypeError(
                f"{cls.__name__} has no argument {', '.join(map(repr, sorted(options)))}; options of the task's own "
                f"verifier go without verifier=..."
            )
        return verifier, grading

    @classmethod
    def columns_of(cls, rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
        """Rows of the dataset to columns, ``"query"`` and ``"answer"`` among them."""
        known = {*cls.TASK.questions, *cls.TASK.references}
        columns = {key: column for key, column in collate(rows).items() if key not in known}
        columns["query"] = [cls.TASK.question_of(row) for row in rows]
        columns["answer"] = list(map(cls._reference_of, rows))
        return columns

    @classmethod
    def _reference_of(cls, row: dict[str, Any]) -> Any:
        return cls.TASK.reference_of(row)

    def score(self, predictions: Sequence[str], references: Sequence[Any] | None = None) -> list[Verdict]:
        """Grade answers offline, as the environment would.

        Args:
            predictions: the responses, as texts.
            references: their references. By default those of the dataset's rows, in the order of the dataset.

        Raises:
            ValueError: there are not as many predictions as references.

        Example:
            >>> from torchrl_chat import GSM8KEnv
            >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_tokenizer
            >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
            >>> env = GSM8KEnv(dataset=[{"question": "2 + 2?", "answer": "#### 4"}], tokenizer=tokenizer)
            >>> env.score(["#### 4"], ["#### 4"])[0].correct
            True
        """
        if references is None:
            if "_source" not in self.__dict__:
                raise ValueError("an environment over a dataloader has no dataset order: pass references=[...].")
            references = self.__dict__["_collate"](list(load_rows(*self.__dict__["_source"])))["answer"]
        return self._scored(predictions, references)


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
        >>> from torchrl_chat import TransformersPolicy
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_model, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> policy = TransformersPolicy(tiny_model(len(tokenizer)), tokenizer, max_new_tokens=4)
        >>> rows = [{"question": "How much is 6 * 7?", "answer": "#### 42"}]
        >>> env = GSM8KEnv(dataset=rows, tokenizer=tokenizer, num_envs=8, repeats=4)
        >>> rollout = env.rollout(1, policy)
    """

    TASK = TASKS["gsm8k"]
    DATASET = "openai/gsm8k"
    CONFIG = "main"
    SYSTEM_PROMPT = (
        "Solve the user's problem. Think step by step inside <think></think>, then give the final number, "
        "and nothing but the number, inside <answer></answer>."
    )


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
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> rows = [{"problem": "What is $\\\\frac{1}{2} + \\\\frac{1}{3}$?", "answer": "\\\\frac{5}{6}"}]
        >>> env = MATHEnv(dataset=rows, tokenizer=tokenizer, num_envs=8, group_repeats=True, repeats=4)
    """

    TASK = TASKS["math"]
    DATASET = "DigitalLearningGmbH/MATH-lighteval"
    SYSTEM_PROMPT = "Solve the user's problem. Reason step by step, and put your final answer within \\boxed{}."


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
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> rows = [{"prompt": "Greet me. No commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}]
        >>> env = IFEvalEnv(dataset=rows, tokenizer=tokenizer, score="instruction_strict")
    """

    TASK = TASKS["ifeval"]
    DATASET = "google/IFEval"
    SYSTEM_PROMPT = None


class RowsEnv(TaskEnv):
    """Rows of yours, graded by a verifier of yours.

    A row has its question as ``query``, ``question``, ``problem`` or ``prompt`` (a text, or a list of messages), and perhaps a
    reference as ``reference``, ``answer`` or ``solution``; the verifier gets ``None`` for one that has none.

    Keyword Args:
        dataset: as for :class:`DatasetChatEnv`.
        verifier: see :mod:`torchrl_chat.rewards.verdict`.

    The others are as for :class:`TaskEnv`: ``data_key`` and ``reference_key`` name other columns.

    Raises:
        KeyError: a row has no question, or not the column of ``reference_key``.
        TypeError: there is no verifier.

    Example:
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> def short(response, reference):
        ...     return float(len(response) < reference)
        >>> rows = [{"instruction": "Be brief.", "characters": 100}]
        >>> keys = {"data_key": "instruction", "reference_key": "characters"}
        >>> env = RowsEnv(dataset=rows, verifier=short, **keys, tokenizer=tokenizer, input_mode="tokens")
    """

    TASK = Task("rows", "")
    SYSTEM_PROMPT = None

    def __init__(self, *, dataset: Any, verifier: Any, **kwargs: Any):
        if verifier is None:
            raise TypeError(
                "rows of yours have no verifier of their own: pass verifier=..., called with (response, reference)."
            )
        super().__init__(dataset=dataset, verifier=verifier, **{"split": None} | kwargs)

    @classmethod
    def _reference_of(cls, row: dict[str, Any]) -> Any:
        return next((row[key] for key in cls.TASK.references if row.get(key) is not None), None)


def _renamed(
    collate_fn: Callable[[Any], Any],
    names: Sequence[tuple[str, str, Sequence[str]]],
    rows: Sequence[dict[str, Any]],
) -> Any:
    """Rows to columns, theirs under the names that a task looks for; a function of this module, so that an environment can be pickled."""
    under = []
    for row in rows:
        found = dict(row)
        for what, key, known in names:
            if key not in row:
                there = ", ".join(name for name, value in row.items() if value is not None)
                raise KeyError(f"a row has no {what}: looked for {key}; it has {there}.")
            for name in (key, *known):
                found.pop(name, None)
        found.update((known[0], row[key]) for _, key, known in names)
        under.append(found)
    return collate_fn(under)
