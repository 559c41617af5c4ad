"""Partial resets that leave the step before them as it was."""

from __future__ import annotations

from typing import Any

from tensordict import NonTensorStack, TensorDictBase

from torchrl_chat import columns


class FreshRows:
    """Mix-in for environments whose ``step_mdp`` shares objects: a reset writes into none of them.

    torchrl writes the rows that start anew over the old ones (``where(..., out=)``), and tensordict 0.14.3 does that to a
    column of objects by changing the very objects. The step that has just been collected holds them too: its last
    ledgers, ``("next", "transcript")``, would become those of the next episodes.
    """

    def _reset_proc_data(self, tensordict: TensorDictBase | None, tensordict_reset: TensorDictBase) -> Any:
        if tensordict is not None:
            for key, column in list(tensordict.items()):
                if isinstance(column, NonTensorStack):
                    values = columns.read_objects(column, tensordict.batch_size)
                    tensordict.set(key, columns.objects(values, tensordict.batch_size, tensordict.device))
        return super()._reset_proc_data(tensordict, tensordict_reset)  # type: ignore[misc]
