"""The environment that a transform stands in, known by what it can do: transforms are a floor below environments.

What transforms ask of one another is asked here too, of whichever stand in the same environment, so that their order does
not matter: whether some of them replies to an answer of the policy (:func:`is_replied_to`). A transform takes part by
having the method:

- ``replies_to(message) -> bool``: whether it answers this message of the policy (a call of a tool, say), so that it is not
  the policy's last word.

Two more methods are called by the environments of this package, see :mod:`torchrl_chat.envs.transforming`:

- ``reads() -> dict``: the entries that it cannot do without, each with the name of the argument that chooses it;
- ``settle(tensordict, next_tensordict)``: what is to be done once all transforms have seen the step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from tensordict import NestedKey, TensorDictBase
from torchrl.envs import Compose, Transform

from torchrl_chat.conversation import StopReason
from torchrl_chat.messages import Message
from torchrl_chat.seeds import ROW, row_names

_T = TypeVar("_T", bound=Transform)


def chat_env(transform: Transform) -> Any:
    """The :class:`~torchrl_chat.ChatEnv` under a transform.

    Raises:
        TypeError: it stands in no environment, or in another one.
    """
    env = getattr(transform.parent, "base_env", None)
    if not hasattr(env, "append_messages"):
        raise TypeError(f"{type(transform).__name__} works in a ChatEnv, not in {type(env).__name__}.")
    return env


def flat(transform: Any) -> Iterator[Transform]:
    """The transforms in a transform, which may be a ``Compose`` of them, in their order."""
    if isinstance(transform, Compose):
        for part in transform.transforms:
            yield from flat(part)
    elif transform is not None:
        yield transform


def stack(env: Any) -> list[Transform]:
    """All transforms of an environment, those of the environments that it wraps first, in their order."""
    levels: list[list[Transform]] = []
    while isinstance(getattr(env, "transform", None), Transform):
        levels.insert(0, list(flat(env.transform)))
        env = env.base_env
    return [transform for level in levels for transform in level]


def beside(transform: Transform) -> list[Transform]:
    """The transforms of the environment that a transform stands in, itself among them, in their order."""
    container = transform.container
    return [transform] if container is None else stack(container)


def alike(transform: _T, kind: type[_T]) -> list[_T]:
    """The transforms of a class in the environment that a transform stands in, itself among them, in their order."""
    return [other for other in beside(transform) if isinstance(other, kind)]


def is_replied_to(transform: Transform, message: Message) -> bool:
    """Whether a transform of the same environment answers this message of the policy, so that it is no answer itself."""
    return any(other.replies_to(message) for other in beside(transform) if hasattr(other, "replies_to"))


def flags(td: TensorDictBase, key: str) -> list[bool]:
    """Flags such as ``"done"``, one a row in row-major order; false where there are none."""
    value, count = td.get(key, None), td.batch_size.numel()
    return [False] * count if value is None else value.reshape(count, -1).any(-1).tolist()


def raise_flags(td: TensorDictBase, rows: Sequence[bool], *keys: str) -> None:
    """Raise flags such as ``"done"`` in some rows of what a step has written; where they are raised they stay so."""
    raised = torch.tensor(rows, device=td.device).reshape(*td.batch_size, 1)
    for key in keys:
        td.set(key, td.get(key) | raised)


def missing(transform: Transform, key: NestedKey, argument: str, found: Iterable[Any]) -> KeyError:
    """The error of a transform that does not find what it reads; ``argument`` is what chooses the key."""
    plain = sorted({name for name in found if isinstance(name, str)})
    return KeyError(
        f"{type(transform).__name__} reads {key!r}, which is not there: got the keys {plain}. Pass {argument}=..."
    )


def tell_failures(td: TensorDictBase, root: TensorDictBase, failures: Sequence[str]) -> list[str]:
    """The failures of rows with the row of the dataset in each; ``"stop_reason"`` becomes ``ERROR`` in rows that have none.

    Args:
        td: what the step has written.
        root: what it started from.
        failures: why each row failed, empty where it did not.
    """
    if not any(failures):
        return list(failures)
    reasons = td.get("stop_reason", None)
    if reasons is not None:
        failed = torch.tensor([bool(why) for why in failures], device=reasons.device).reshape(reasons.shape)
        running = reasons == StopReason.RUNNING
        td.set("stop_reason", torch.where(failed & running, int(StopReason.ERROR), reasons))
    if root.get(ROW, None) is None:
        return list(failures)
    names = row_names(root, len(failures))
    return [f"{why} ({name})" if why else "" for why, name in zip(failures, names, strict=True)]


def check_inside(transform: Transform) -> None:
    """Refuse a place around an environment that ends its dialogues itself: what the transform says would come too late.

    Such an environment cannot see that the transform replies: a reward in it takes a call for an answer, and nothing in it
    knows that a dialogue goes on.

    Raises:
        ValueError: naming what ends them, and the right way.
    """
    replies = hasattr(transform, "replies_to")
    inner = [
        type(other).__name__
        for other in stack(getattr(transform.container, "base_env", None))
        if getattr(other, "ends_alone", False) or (replies and getattr(other, "end_on_answer", False))
    ]
    if inner:
        name = type(transform).__name__
        raise ValueError(
            f"{name} wraps an environment whose {' and '.join(inner)} may end a dialogue that {name} would reply to: append "
            f"it to that environment instead, env = env.append_transform({name}(...))."
        )
