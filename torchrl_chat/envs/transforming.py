"""Environments with transforms: how one is appended, and in which order the transforms have their say.

torchrl has two meanings of ``append_transform``: an environment returns a new one, a ``TransformedEnv`` changes itself. Here
there is one: a new environment is returned, and the one that was asked stays as it was. A result that is thrown away changes
nothing, so the environment that was asked says so at its next reset.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any, Self

import torch
from tensordict import NestedKey, TensorDictBase
from torchrl.envs import Compose, Transform, TransformedEnv
from torchrl.envs.transforms.transforms import _CallableTransform

from torchrl_chat.conversation import StopReason
from torchrl_chat.envs.resetting import FreshRows
from torchrl_chat.envs.stepping import FlatStepping
from torchrl_chat.transforms.home import flat, missing, stack


class _Result:
    """What ``append_transform`` returned, and whether anybody has used it."""

    def __init__(self, env: Any, transform: Transform):
        self.env = weakref.ref(env)
        self.name = type(transform).__name__
        self.used = False
        self.later: list[_Result] = []  # what was made of it in turn

    @property
    def lost(self) -> bool:
        """Whether it is gone, and nobody has ever used it, nor anything that was made of it."""
        return not self.used and self.env() is None and all(result.lost for result in self.later)


class Appending:
    """Mix-in for environments: those that ``append_transform`` returned are watched, so that a lost one is told of."""

    def __getstate__(self) -> dict[str, Any]:
        self._use()
        state = dict(super().__getstate__())  # type: ignore[call-overload]
        return {key: value for key, value in state.items() if key not in ("_made_as", "_results")}

    def _handed(self, env: Any, transform: Transform) -> Any:
        """An environment made of this one, which is returned."""
        result = env.__dict__["_made_as"] = _Result(env, transform)
        self.__dict__.setdefault("_results", []).append(result)
        if "_made_as" in self.__dict__:
            self.__dict__["_made_as"].later.append(result)
        return env

    def _use(self) -> None:
        """Note that somebody works with this environment."""
        if "_made_as" in self.__dict__:
            self.__dict__["_made_as"].used = True

    def _warn_of_lost(self) -> None:
        """Warn of what was appended to an environment that nobody has kept."""
        results = self.__dict__.get("_results")
        if not results:
            return
        lost = [result.name for result in results if result.lost]
        self.__dict__["_results"] = [result for result in results if not (result.used or result.lost)]
        if lost:
            warnings.warn(
                f"{' and '.join(lost)} had no effect: append_transform returns a new environment and leaves this one as it "
                f"was. Keep the result: env = env.append_transform(...). (In the constructor of a class of yours: "
                f"TransformedEnv.append_transform(self, ...).)",
                UserWarning,
                stacklevel=2,
            )


class TransformedChatEnv(Appending, FreshRows, FlatStepping, TransformedEnv):
    """What ``append_transform`` of this package's environments returns: torchrl's ``TransformedEnv`` with one meaning.

    - :meth:`append_transform` and :meth:`insert_transform` return a new environment, and leave this one as it was. Both
      have the same base environment; the transforms themselves go on in the new one, this one keeps shallow copies of
      them (``Transform.clone``).
    - When all transforms have seen a step, those that have a method ``settle`` are called once more, in their order, so
      that what was ended further behind is graded and its reason is told (see :mod:`torchrl_chat.transforms.home`).
      ``("next", "stop_reason")`` then has a reason for every row that is done.
    - What a transform reads (its ``reads``) is looked for when it is appended, if a primer brings the columns, and at
      every reset.
    """

    def append_transform(self, transform: Transform | Callable[[TensorDictBase], TensorDictBase]) -> Self:
        """A new environment with one transform more, behind the others. This one stays as it was.

        Args:
            transform: a transform, or a function from TensorDicts to TensorDicts.

        Raises:
            KeyError: the transform reads a column that the dataset does not have.
            ValueError: the order of the transforms cannot work; the text has the right one.

        Example:
            >>> from torchrl_chat import Budget, DatasetChatEnv
            >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_tokenizer
            >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
            >>> env = DatasetChatEnv(dataset=[{"query": "Hi"}], tokenizer=tokenizer, input_mode="text")
            >>> longer = env.append_transform(Budget(max_turns=2))
            >>> longer is env, longer.base_env is env.base_env
            (False, True)
        """
        return self._with(len(parts(self.transform)), transform)

    def insert_transform(
        self, index: int, transform: Transform | Callable[[TensorDictBase], TensorDictBase]
    ) -> Self:
        """A new environment with one transform more, at that place. This one stays as it was.

        Args:
            index: the place, counted from the end where it is negative.
            transform: as for :meth:`append_transform`, with the same errors.

        Raises:
            ValueError: there is no such place.
        """
        count = len(parts(self.transform))
        place = index + count if index < 0 else index
        if not 0 <= place <= count:
            raise ValueError(f"index is {index}: the environment has {count} transforms.")
        return self._with(place, transform)

    def _with(self, place: int, transform: Any) -> Self:
        added = as_transform(transform)
        moved = parts(self.transform)
        check_order([*moved[:place], added, *moved[place:]])
        check_columns(self, added)
        kept = [each.clone() for each in moved]
        new = object.__new__(type(self))
        for name, value in self.__dict__.items():
            if name not in ("_made_as", "_results"):
                new.__dict__[name] = dict(value) if name in _REGISTRIES else value
        new._modules.pop("_transform", None)
        new.__dict__.update(_transform=None, _cache={}, _output_spec=None, _input_spec=None)
        # Whoever holds a transform (to count a policy's versions, say) means the one that is at work: in the new environment.
        for each in moved:
            each.reset_parent()
        self._replace(kept)
        new._replace([*moved[:place], added, *moved[place:]])
        return self._handed(new, added)

    def _replace(self, transforms: list[Transform]) -> None:
        held: Any = getattr(self, "transform", None)
        if held is not None:
            self.empty_cache()
        self.transform = Compose(*transforms)

    def _grow(self, transform: Transform) -> None:
        """Append a transform to this very environment: for constructors."""
        TransformedEnv.append_transform(self, transform)

    # ------------------------------------------------------------------ torchrl's hooks
    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        self._use()
        self._warn_of_lost()
        return super()._reset(tensordict, **kwargs)

    def _reset_proc_data(self, tensordict: TensorDictBase | None, tensordict_reset: TensorDictBase) -> Any:
        result = super()._reset_proc_data(tensordict, tensordict_reset)
        for transform in flat(self.transform):
            for key, argument in _reads(transform).items():
                if result.get(key, None) is None:
                    raise missing(transform, key, argument, result.keys())
        return result

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        self._use()
        following = super()._step(tensordict)
        goes = tensordict.get("_step", None)
        if goes is not None and not goes.any():  # nothing has happened
            return following
        for transform in flat(self.transform):
            if hasattr(transform, "settle"):
                transform.settle(tensordict, following)
        _tell_reason(following)
        return following


_REGISTRIES = {"_modules", "_parameters", "_buffers"}


def parts(transform: Any) -> list[Transform]:
    """The transforms of an environment, those that are made of several as one."""
    if type(transform) is Compose:
        return list(transform.transforms)
    return [] if transform is None else [transform]


def as_transform(transform: Any) -> Transform:
    """A transform, or a function as one.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(transform, Transform):
        return transform
    if not callable(transform):
        raise TypeError(f"append_transform got a {type(transform).__name__}: expected a Transform or a function.")
    return _CallableTransform(transform)


def check_order(transforms: list[Transform]) -> None:
    """Refuse an order of transforms that cannot work.

    Raises:
        ValueError: a reward that ends dialogues stands behind who replies to the answers; the text has the right order.
    """
    names = [type(transform).__name__ for transform in transforms]
    for place, transform in enumerate(transforms):
        if getattr(transform, "end_on_answer", False) and "UserSimulator" in names[:place]:
            raise ValueError(
                f"{names[place]} ends the dialogue with an answer, and stands behind the UserSimulator, who has replied to "
                f"it by then. The order is: {names[place]}, UserSimulator; or {names[place]}(..., end_on_answer=False)."
            )


def check_columns(env: TransformedEnv, transform: Transform) -> None:
    """Look for the columns that a transform reads, where a primer brings them.

    Raises:
        KeyError: one is not there.
    """
    if not (reads := _reads(transform)) or not any(hasattr(other, "dataloader") for other in stack(env)):
        return
    known = {*env.observation_spec.keys(True), *env.state_spec.keys(True)}
    for key, argument in reads.items():
        if key not in known:
            raise missing(transform, key, argument, known)


def _reads(transform: Transform) -> dict[NestedKey, str]:
    return transform.reads() if hasattr(transform, "reads") else {}


def _tell_reason(td: TensorDictBase) -> None:
    """A reason for the rows that are done and have none, where there are reasons at all."""
    reasons, done = td.get("stop_reason", None), td.get("done", None)
    if reasons is None or done is None:
        return
    unknown = done & (reasons == StopReason.RUNNING)
    if not unknown.any():
        return
    terminated = td.get("terminated", None)
    natural = torch.zeros_like(done) if terminated is None else terminated
    told = torch.where(natural, int(StopReason.ANSWERED), int(StopReason.TRUNCATED))
    td.set("stop_reason", torch.where(unknown, told, reasons))
