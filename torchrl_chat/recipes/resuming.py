"""What a run must not lose: written into checkpoints, and put back from one of them, in as many processes or in others."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from torchrl_chat import ranks
from torchrl_chat.learner.sharding import (
    is_sharded,
    load_optimizer,
    set_optimizer_state,
    set_weights,
    weights_of,
)
from torchrl_chat.recipes.checkpoints import (
    OPTIMIZER,
    DamagedCheckpoint,
    check_files,
    checkpoints,
    load_state,
    load_weights,
    random_states,
    save_checkpoint,
    set_random_states,
)
from torchrl_chat.training.updates import BAD_STEPS


class Kept:
    """The objects that a checkpoint has the contents of.

    Args:
        folder: where the checkpoints are.
        model: the trained transformers model.
        tokenizer: its tokenizer.
        state: what else the run needs to go on: objects with ``state_dict`` and ``load_state_dict``, by name.
        modules: what is trained beside the model, by name.
    """

    def __init__(
        self,
        folder: Path,
        model: Any,
        tokenizer: Any,
        state: Mapping[str, Any],
        modules: Mapping[str, torch.nn.Module],
    ):
        self.folder, self.model, self.tokenizer, self.state, self.modules = folder, model, tokenizer, state, modules
        # What the weights of the optimizer have their names in.
        self._trained = torch.nn.ModuleDict({"model": model, **modules}) if modules else model

    def save(self, step: int, told: Mapping[str, Any], keep: int) -> Path:
        """Write the checkpoint of a step, and remove old ones.

        Args:
            step: how many steps are done.
            told: what else its state tells; of the first process.
            keep: how many checkpoints are left.

        Raises:
            NotFiniteError: a weight, or a number of the optimizer, is NaN or infinite; the checkpoints that are there stay.
        """
        optimizer = self.state.get("optimizer") if is_sharded(self.model) else None
        kept = {key: value.state_dict() for key, value in self.state.items() if value is not optimizer}
        own = {"state": kept, "random": random_states()}
        kept = kept | {key: weights_of(module, trained=True) for key, module in self.modules.items()}
        state = {"step": step, **told, **own, "state": kept}
        if optimizer is not None:
            group = {key: value for key, value in optimizer.param_groups[0].items() if key == BAD_STEPS}
            state |= {"state": kept | {"optimizer": group}, "parts": ranks.everywhere(own)}
        return save_checkpoint(
            self.folder, step, self.model, self.tokenizer, state, optimizer, self._trained, keep=keep
        )

    def restore(self, step: int | None, check: Callable[[Path, dict[str, Any]], None]) -> dict[str, Any] | None:
        """Put the contents of the last checkpoint, or that of a step, where they belong; those behind it are put aside.

        Args:
            step: the step; the last checkpoint's if ``None``.
            check: given a checkpoint and its state, raises where it does not fit the rest of the run.

        Returns:
            its state; ``None`` where there is no checkpoint.

        Raises:
            ValueError: there is no checkpoint of that step.
            DamagedCheckpoint: it cannot be read; the text names one that can.
        """
        found, later = ranks.of_the_first(ranks.agreed(lambda: self._found(step))) or ([], [])
        if not found:
            return None
        path, others = found[-1], found[:-1]

        def read() -> dict[str, Any]:
            check_files(path)
            state = load_state(path)
            check(path, state)
            return state

        state = ranks.agreed(lambda: _or_another(read, others)) or load_state(path)
        _or_another(lambda: load_weights(path, self.model), others)
        self._set_state(path, state)
        if ranks.leads():
            for old in later:  # they are not of the run that goes on from here
                os.rename(old, _free_name(old))
        return state

    def _found(self, step: int | None) -> tuple[list[Path], list[Path]]:
        """The checkpoints up to the one that is gone on from, and those behind it."""
        found = checkpoints(self.folder)
        if step is None:
            return found, []
        later = [path for path in found if _step(path) > step]
        found = found[: len(found) - len(later)]
        if not found or _step(found[-1]) != step:
            there = ", ".join(str(_step(path)) for path in found + later) or "none"
            raise ValueError(f"{self.folder.parent} has no checkpoint of step {step}: there are {there}.")
        return found, later

    def _set_state(self, path: Path, state: Mapping[str, Any]) -> None:
        """Give everything but the model the state that it had."""
        parts = state.get("parts", [state])  # by process; another number of them goes on from the first one's
        own = parts[ranks.own() if len(parts) == ranks.count() else 0]
        for key, value in self.state.items():
            stored = own["state"].get(key, state["state"][key])
            if key != "optimizer" or ("param_groups" in stored and not is_sharded(self.model)):
                value.load_state_dict(stored)
            elif "param_groups" in stored:
                set_optimizer_state(value, stored)
            else:
                load_optimizer(path / OPTIMIZER, self._trained, value)
                value.param_groups[0].update(stored)
        for key, module in self.modules.items():
            set_weights(module, state["state"][key])
        if len(parts) == ranks.count():
            set_random_states(own["random"])


def _or_another(read: Callable[[], Any], others: Sequence[Path]) -> Any:
    """What is read of a checkpoint; one that is damaged is refused with what to do."""
    try:
        return read()
    except DamagedCheckpoint as error:
        raise DamagedCheckpoint(f"{error} {_way_out(others)}") from error


def _way_out(others: Sequence[Path]) -> str:
    """What to do where a checkpoint cannot be read."""
    for path in reversed(others):
        try:
            check_files(path)
            load_state(path)
        except DamagedCheckpoint:
            continue
        step = _step(path)
        return f"The one of step {step} is whole: give --checkpoint {step} beside --resume to go on from it."
    return "No other one is whole: begin anew, with another --out."


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _free_name(path: Path) -> Path:
    """A name beside a checkpoint under which it is kept, and not taken for one."""
    number = 0
    while (name := path.with_name(f"{path.name}.aside{number or ''}")).exists():
        number += 1
    return name
