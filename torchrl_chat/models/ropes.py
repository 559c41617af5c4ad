"""Rotary position embeddings that are others beyond some length: what a model says of a token then depends on how long the row is.

transformers takes that length from the longest row of a pass, so that rows on both sides of it must not share one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchrl_chat.models.passes import ModelError, Together, groups_of


@dataclass(frozen=True, slots=True)
class RopeChange:
    """A length beyond which positions are embedded otherwise."""

    kind: str
    """The rope's type in the model's config."""
    length: int
    """Tokens of the longest row that is embedded in the first way."""

    @property
    def once(self) -> bool:
        """Whether one other way follows, rather than another one for each length (and each history of the model's calls)."""
        return self.kind == "longrope"

    def apart(self, group: Sequence[int], lengths: Sequence[int], more: Sequence[int]) -> list[list[int]]:
        """Rows that may share passes while they grow: those below the length, those above it, and each that crosses it.

        Args:
            group: row numbers.
            lengths: how many tokens each row has.
            more: how many it may get.
        """
        above = [i for i in group if lengths[i] > self.length]
        crossing = [i for i in group if lengths[i] <= self.length < lengths[i] + more[i]]
        below = [i for i in group if i not in {*above, *crossing}]
        return [part for part in (below, above, *([i] for i in crossing)) if part]

    def refused(self, name: str, length: int) -> ModelError:
        """Why a row of so many tokens cannot be computed as any other pass over it would."""
        return ModelError(
            f"{name} embeds positions otherwise for each length beyond {self.length} tokens (rope_type {self.kind!r}), and by what "
            f"it was called with before: a row of {length} tokens has no log-probs of its own. Keep rows within {self.length} "
            "tokens (max_context=, max_new_tokens=), or give the model another rope ('yarn', say)."
        )


def rope_change(model: Any) -> RopeChange | None:
    """The change of a model's rope, as its config tells it; that of the shortest rows, where it has several."""
    config = getattr(model, "config", None)
    if config is None:
        return None
    config = config.get_text_config()
    ropes = getattr(config, "rope_parameters", None) or {}
    own = ropes if "rope_type" in ropes else None
    found = []
    for rope in (own,) if own else ropes.values():
        kind = rope.get("rope_type", "") if isinstance(rope, Mapping) else ""
        if kind == "longrope" or "dynamic" in kind:
            known = rope.get("original_max_position_embeddings") if kind == "longrope" else None
            length = known or config.max_position_embeddings
            found.append(RopeChange(kind, int(length)))
    return min(found, key=lambda change: change.length, default=None)


def groups_apart(
    model: Any, lengths: Sequence[int], more: Sequence[int], together: Together
) -> tuple[list[list[int]], RopeChange | None]:
    """Row numbers in groups that go through a model together, and the change of its rope, which they stand on one side of.

    Args:
        model: a transformers causal language model.
        lengths: how many tokens each row has.
        more: how many it may get.
        together: which rows may go together otherwise.

    Raises:
        ModelError: the rope is another for each length, and a row may grow beyond the first.
    """
    groups, change = groups_of(lengths, together), rope_change(model)
    if change is None:
        return groups, None
    longest = max(map(sum, zip(lengths, more, strict=True)), default=0)
    if not change.once and longest > change.length:
        raise change.refused(type(model).__name__, longest)
    return [part for group in groups for part in change.apart(group, lengths, more)], change
