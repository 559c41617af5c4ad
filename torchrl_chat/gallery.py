"""Environments by the names of the command line: ``train``, ``eval``, ``play`` and ``serve`` know the same ones.

This file is read for its names by commands that make nothing: what an environment is made of is imported where one is made.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchrl_chat import tiny
from torchrl_chat.named import is_name, named
from torchrl_chat.rewards.tasks import LOCAL, TASKS

SPLITS = {
    "gsm8k": ("train", "test"),
    "math": ("train", "test"),
    "countdown": ("train", "test"),
    "ifeval": ("train",),
}
"""The splits of the environments that have some."""

ROWS = "FILE, FOLDER or OWNER/NAME"
"""Rows of the user's, which a reward has to be given for."""

ABOUT = {
    "digits": "the last of two digits: what a tiny model can learn",
    "sums": "sums of two digits, in words",
    "python-tool": "arithmetic with a Python interpreter in a sandbox, in two turns",
    "gsm8k": "word problems; rows with question, answer (#### 42)",
    "math": "competition mathematics; rows with problem, and answer or solution; the extra math",
    "countdown": "a target out of given numbers, made here; or rows with query, target, nums",
    "ifeval": "instructions that can be checked; rows with prompt, instruction_id_list, kwargs; the extra ifeval",
    "reasoning-gym:TASK": "one of a hundred generators; the extra reasoning-gym; its settings by option",
    **{name: f"{TASKS[name].rows}; by --data" for name in LOCAL},
    ROWS: "rows of yours with query (question, problem, prompt) and perhaps answer (reference, solution), and a reward",
    "module:Class or file.py:Class of a MessageEnv": "an environment of yours",
}
"""What there is, and what it is."""

NAMES = tuple(ABOUT)

MADE_HERE = ("digits", "sums", "python-tool")
"""Those whose rows are made here for whoever learns to read."""
_SUFFIXES = {".json", ".jsonl", ".ndjson", ".parquet", ".csv", ".gz", ".bz2", ".xz"}


def guide() -> str:
    """The names with a line each, for the end of a command's help.

    Example:
        >>> print(guide().splitlines()[1])
          digits
    """
    lines = ["tasks of --dataset:"]
    for name, about in ABOUT.items():
        lines += [f"  {name}", f"      {about}"]
    return "\n".join(
        [
            *lines,
            "",
            "--reward says what grades rows of yours, or grades instead of a task's own verifier: file.py:function or",
            "module:function, called as function(response, reference), which returns a number (from 1 on it counts as right) or a",
            f"torchrl_chat.rewards.Verdict; a class of such; or a verifier by name: {', '.join(_verifiers())}.",
            "--option NAME=VALUE ... are settings of the task, as JSON or text: system_prompt, those of its verifier (last_number=true",
            "for gsm8k), those of a generator (numbers=[3] for countdown, max_terms=3 for reasoning-gym:chain_sum), size (rows made), and of",
            "rows of yours the columns of question and reference where they have other names (data_key=ask reference_key=gold).",
        ]
    )


def _verifiers() -> tuple[str, ...]:
    from torchrl_chat.rewards.tasks import TASKS

    return tuple(TASKS)


def check_name(
    name: str, data: str | None = None, reward: str | None = None, settings: Mapping[str, Any] | None = None
) -> None:
    """Say that a name, a path or a setting is wrong before anything is loaded.

    Args:
        name: one of :data:`NAMES`.
        data: a local copy of its rows.
        reward: what grades instead.
        settings: the task's.

    Raises:
        ValueError: there is no such environment, path or reward; the environment takes none; or it lacks one, or its data.
        ImportError: grading needs a package that is not installed; the text names the extra.
    """
    kind, _, task = name.partition(":")
    if kind == "reasoning-gym" and task:
        from torchrl_chat.rewards.reasoning_gym import load_task

        given = {key: value for key, value in (settings or {}).items() if not _is_of_the_env(key)}
        load_task(
            task, {**given, "size": 1, "seed": 0}
        )  # names the tasks that there are, and what they do not take
        if data is not None:
            raise ValueError(f"data={data!r}: {name} makes its rows itself.")
        if reward is not None:
            raise ValueError(f"reward={reward!r}: {name} is graded by its generator.")
    elif is_name(name):
        named(name)
        if reward is not None:
            raise ValueError(f"reward={reward!r}: {name} is an environment, which pays its own rewards.")
    elif _is_rows(name):
        _check_path(name, _is_local(name))
        if data is not None:
            raise ValueError(f"data={data!r}: {name} holds the rows itself.")
        if reward is None:
            raise ValueError(
                f"{name} has rows, and nothing that grades them: give a reward (--reward), file.py:function or module:function, called with the "
                f"response and the reference of its row, or one of {', '.join(_verifiers())}."
            )
    elif name in LOCAL and data is None:
        raise ValueError(f"{name} needs data (--data PATH): {TASKS[name].rows}.")
    elif name not in NAMES:
        raise ValueError(f"there is no environment {name!r}: expected {', '.join(NAMES)}.")
    if data is not None:
        local = data.startswith((".", "/", "~")) or bool(Path(data).suffix) or data.count("/") > 1
        _check_path(data, local, f" {name} needs {TASKS[name].rows}." if name in LOCAL else "")
    if reward is not None or name in SPLITS:
        _verifier(reward or name, dict(settings or {}))


def _is_rows(name: str) -> bool:
    """Whether a name is one of rows: a path, or of a dataset of the hub."""
    return name not in NAMES and (_is_local(name) or "/" in name)


def _is_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or Path(name).suffix in _SUFFIXES or Path(name).exists()


def _check_path(path: str, local: bool, told: str = "") -> None:
    if local and not Path(path).expanduser().exists():
        raise ValueError(f"data={path!r}: there is no such dataset file or folder.{told}")


def _is_of_the_env(setting: str) -> bool:
    """Whether a setting is one of all environments that are graded, and not of a task, its rows or its verifier."""
    from torchrl_chat.envs.dataset import OPTIONS
    from torchrl_chat.envs.task import GRADING

    return setting in OPTIONS or setting in GRADING or setting in ("size", "floors")


def _verifier(reward: str, settings: dict[str, Any]) -> Any:
    """What grades: a verifier by its task's name, or a function or class of the user's.

    Args:
        settings: of the task; those of the verifier are taken out.
    """
    from torchrl_chat import rewards
    from torchrl_chat.rewards.tasks import TASKS

    if reward in TASKS:
        made, kind = TASKS[reward].make_verifier, getattr(rewards, TASKS[reward].verifier)
        if kind is rewards.CodeVerifier:  # it runs what is answered
            from torchrl_chat.sandbox import Sandbox

            made = functools.partial(made, runner=Sandbox().run)
    else:
        if not is_name(reward):
            raise ValueError(
                f"reward={reward!r}: expected file.py:function, module:function, or one of {', '.join(TASKS)}."
            )
        made = named(reward)
        if not callable(made):
            raise ValueError(
                f"reward={reward!r} is a {type(made).__name__}: expected a function, or a class of such."
            )
        if not isinstance(made, type):
            return _checked(reward, made)
        kind = made
    known = inspect.signature(kind).parameters
    return _checked(reward, made(**{key: settings.pop(key) for key in list(settings) if key in known}))


def _checked(reward: str, verifier: Any) -> Any:
    from torchrl_chat.rewards.compose import as_verifier

    try:
        return as_verifier(verifier)
    except TypeError as error:
        raise ValueError(f"reward={reward!r}: {error}") from None


def tiny_tokenizer_for(name: str) -> Any:
    """The tiny tokenizer with the characters that an environment needs, and with tools where those can spell them."""
    alphabet = {"digits": tiny.DIGIT_ALPHABET, "python-tool": tiny.TOOL_ALPHABET}.get(name, tiny.TEXT_ALPHABET)
    return tiny.tiny_tokenizer(alphabet, tools=alphabet is tiny.TEXT_ALPHABET)


def make_env(
    name: str,
    *,
    data: str | None = None,
    split: str | Sequence[str] | None = None,
    size: int | None = None,
    reward: str | None = None,
    settings: Mapping[str, Any] | None = None,
    limits: Mapping[str, Any] | None = None,
    seed: int = 0,
    **options: Any,
) -> Any:
    """The environment of a name; each of its conversations is graded at its end.

    Args:
        name: one of :data:`NAMES`.
        data: a local copy of its rows.
        split: the split, or several of which the first is taken that there is; by default the first of :data:`SPLITS`.
        size: how many rows are made, where rows are made.
        reward: what grades, instead of the task's own verifier or for rows that have none: the name of a function or a class of
            verifiers (``"file.py:function"``, ``"module:Class"``), or of a verifier in :data:`~torchrl_chat.rewards.tasks.TASKS`.
        settings: the task's own: those of its verifier, of its generator of rows, of all environments (``system_prompt``).
        limits: arguments of a :class:`~torchrl_chat.Budget` for conversations of several turns; the others end by themselves.
        seed: of the rows that are made, and of their order.
        options: of :class:`~torchrl_chat.DatasetChatEnv`: ``tokenizer``, ``input_mode``, ``num_envs``, ``repeats`` ...

    Raises:
        ValueError: there is no such environment, reward or setting, or it takes no ``data``.
        ImportError: a package is missing; the text names the extra.
        DatasetError: there are no rows; the text says what to give.

    Example:
        >>> from torchrl_chat import tiny
        >>> env = make_env("digits", tokenizer=tiny.tiny_tokenizer(), input_mode="tokens", num_envs=2)
        >>> env.batch_size
        torch.Size([2])
    """
    from torchrl_chat import envs

    own = dict(settings or {})
    check_name(name, data, reward, own)
    if both := sorted(own.keys() & {*options, "seed", "split", "dataset"}):
        raise ValueError(f"{both[0]} is no setting of a task: it is given in another place.")
    if reward in SPLITS and _is_rows(name):  # rows of a file for a task that is here
        name, data, reward = reward, name, None
    options |= {"seed": seed} | ({} if data is None else {"dataset": data})
    if "size" in own:
        size = own.pop("size")
    try:
        return _made(name, split, size, reward, own, limits, options)
    except TypeError as error:
        if not own:
            raise
        raise ValueError(f"{name} does not take the settings {', '.join(own)}: {error}") from error
    except envs.DatasetError as error:
        if name not in SPLITS or data is not None:
            raise
        raise envs.DatasetError(
            f"{name} ({ABOUT[name]}) has no rows here: give a local copy of them (--data). {error}"
        ) from error


def _made(
    name: str,
    split: str | Sequence[str] | None,
    size: int | None,
    reward: str | None,
    own: dict[str, Any],
    limits: Mapping[str, Any] | None,
    options: dict[str, Any],
) -> Any:
    from torchrl_chat import envs, transforms
    from torchrl_chat.rewards import NumberVerifier

    kind, _, task = name.partition(":")
    sized: dict[str, Any] = {} if size is None else {"size": size}
    if kind == "reasoning-gym":
        rest = {key: own.pop(key) for key in list(own) if not _is_of_the_env(key)}
        return envs.ReasoningGymEnv(task, task_kwargs=rest, **sized, **own, **options)
    if is_name(name):
        env = envs.MessageChatEnv(named(name), **own, **options)
        return env.append_transform(transforms.Budget(**limits)) if limits else env
    verifier = None if reward is None else _verifier(reward, own)
    if name in SPLITS:
        if name == "countdown" and "dataset" not in options:
            options |= sized
        cls: Any = {
            "gsm8k": envs.GSM8KEnv,
            "math": envs.MATHEnv,
            "ifeval": envs.IFEvalEnv,
            "countdown": envs.CountdownEnv,
        }[name]
        return cls(split=split or SPLITS[name][0], verifier=verifier, **own, **options)
    if name in LOCAL:
        local: Any = {
            "aime": envs.AIMEEnv,
            "math-500": envs.MATH500Env,
            "gpqa": envs.GPQAEnv,
            "mmlu-pro": envs.MMLUProEnv,
            "humaneval": envs.HumanEvalEnv,
        }[name]
        return local(split=split, verifier=verifier, **own, **options)
    if name not in MADE_HERE:
        return envs.RowsEnv(dataset=name, split=split, verifier=verifier, **own, **options)
    seed = options["seed"]
    if name in ("digits", "sums"):
        make_rows = tiny.last_digit_rows if name == "digits" else tiny.sum_rows
        options.setdefault("dataset", make_rows(size or 2048, seed=seed))
        env = envs.DatasetChatEnv(**own, **options)
        env = env.append_transform(transforms.EndOfDialogue())
        return env.append_transform(transforms.RewardTransform(verifier or NumberVerifier()))
    options.setdefault("dataset", tiny.arithmetic_rows(size or 4096, seed))
    env = envs.DatasetChatEnv(**own, **options)
    env = env.append_transform(transforms.PythonInterpreter(deadline=2.0))
    env = env.append_transform(transforms.UserSimulator([]))  # an answer without a program is the last one
    env = env.append_transform(transforms.Budget(**{**(limits or {}), "max_turns": 2}))
    graded = verifier or NumberVerifier(surrounded=0.0)
    return env.append_transform(transforms.RewardTransform(graded, end_on_answer=False))
