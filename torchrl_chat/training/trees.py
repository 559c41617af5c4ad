"""Sequences that begin alike as trees: what they have in common stands once, and goes through a model once.

The answers of a group share their prompt, and the branches of an episode what was said before they parted. A row holds a
tree, each token in front of all that follow it; a token sees those that it follows, and no others. Values and gradients are those
of the sequences one by one, since what stands once is counted once for each of them by the chain rule.

Law of this file: a token that is trained in two sequences stands twice. Equal beginnings of two sampled answers are trained with
different weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

_TOKEN_COST = 4096
"""So many pairs of tokens that see each other cost as much as one token's own work: six times the hidden size, or so."""


def cost(length: int) -> int:
    """What a row of so many tokens costs, in pairs of tokens that see each other."""
    return length * (_TOKEN_COST + length)


@dataclass(slots=True)
class _Node:
    """A stretch of tokens that the same sequences go through."""

    source: (
        np.ndarray
    )  # for each token, where it stands in the buffer of all sequences: where it is trained, if it is
    members: list[int]  # which sequences go through it
    children: list[_Node] = field(default_factory=list)

    def split(self, at: int) -> None:
        """Make what is behind so many tokens a child of what is before."""
        self.children = [_Node(self.source[at:], self.members[:], self.children)]
        self.source = self.source[:at]

    @property
    def size(self) -> int:
        """How many tokens there are from here on."""
        size, waiting = 0, [self]
        while waiting:
            node = waiting.pop()
            size += len(node.source)
            waiting += node.children
        return size

    @property
    def pays(self) -> bool:
        """Whether what the children share costs less once, in one long row, than in a row for each of them."""
        apart = [len(self.source) + child.size for child in self.children]
        return len(apart) < 2 or cost(self.size) <= sum(map(cost, apart))


class Row(NamedTuple):
    """A tree, or several, in one row of L tokens."""

    source: np.ndarray
    """Where each token stands in the buffer of all sequences, int64 (L,)."""
    positions: np.ndarray
    """How many tokens stand before it in its sequences, int64 (L,)."""
    parents: np.ndarray
    """The place of the token before it, int64 (L,); -1 for a first one."""
    ends: np.ndarray
    """The place behind the last token that follows it, int64 (L,)."""


def rows_of_trees(
    tokens: np.ndarray, trained: np.ndarray, lengths: Sequence[int], max_tokens: int | None
) -> list[Row]:
    """Sequences as rows of trees.

    Args:
        tokens: all ids, int64 (S,), sequence after sequence.
        trained: which tokens are trained, bool (S,).
        lengths: how long each sequence is.
        max_tokens: how many tokens a row has at most, with as many trees as fit; as many as the largest tree if ``None``.

    Raises:
        ValueError: a sequence is longer than that.
    """
    ends = np.cumsum(np.asarray(lengths, dtype=np.int64))
    spans = [np.arange(end - length, end) for end, length in zip(ends.tolist(), lengths, strict=True)]
    if max_tokens is not None and (longest := max(lengths)) > max_tokens:
        raise ValueError(
            f"sequence {list(lengths).index(longest)} has {longest} tokens: more than max_tokens={max_tokens}."
        )
    roots = _trees(tokens, trained, spans, list(range(len(spans))), max_tokens)
    sizes = [root.size for root in roots]
    return [_row([roots[i] for i in some]) for some in first_fit(sizes, max_tokens or max(sizes))]


def _trees(
    tokens: np.ndarray,
    trained: np.ndarray,
    spans: Sequence[np.ndarray],
    members: Sequence[int],
    max_tokens: int | None,
) -> list[_Node]:
    """The trees of some sequences, as large as they may be and as it pays."""
    roots: list[_Node] = []
    for member in members:
        _add(roots, tokens, trained, spans[member], member)
    found: list[_Node] = []
    for root in roots:
        parts: list[list[int]] = []
        if not root.pays:
            parts = [child.members for child in root.children]
            parts += [[member] for member in root.members if not any(member in part for part in parts)]
        elif max_tokens is not None and root.size > max_tokens:
            half = len(root.members) // 2
            parts = [root.members[:half], root.members[half:]]
        found += [tree for part in parts for tree in _trees(tokens, trained, spans, part, max_tokens)] or [root]
    return found


def _add(roots: list[_Node], tokens: np.ndarray, trained: np.ndarray, span: np.ndarray, member: int) -> None:
    """Put a sequence into trees, along what it has in common with those that are there."""
    siblings = roots
    while len(span):
        for node in siblings:
            count = min(len(node.source), len(span))
            there, here = node.source[:count], span[:count]
            apart = (tokens[there] != tokens[here]) | (trained[there] & trained[here])
            common = int(apart.argmax()) if apart.any() else count
            if common:
                break
        else:
            siblings.append(_Node(span, [member]))
            return
        if common < len(node.source):
            node.split(common)
        node.source = np.where(trained[span[:common]], span[:common], node.source)
        node.members.append(member)
        span, siblings = span[common:], node.children


def _row(roots: Sequence[_Node]) -> Row:
    """Trees, one behind the other."""
    source, positions, parents, ends = [], [], [], []
    at = 0
    # What is to come: a node, the place and position of the token before it.
    for root in roots:
        waiting = [(root, -1, 0)]
        while waiting:
            node, before, position = waiting.pop()
            count = len(node.source)
            source.append(node.source)
            positions.append(np.arange(position, position + count))
            parents.append(np.concatenate(([before], np.arange(at, at + count - 1))))
            ends.append(np.full(count, at + node.size))
            at += count
            waiting += [(child, at - 1, position + count) for child in reversed(node.children)]
    return Row(*(np.concatenate(parts).astype(np.int64) for parts in (source, positions, parents, ends)))


def first_fit(lengths: list[int], size: int) -> list[list[int]]:
    """Bins of at most ``size`` tokens, the longest sequences first (at most 11/9 of the best possible number, plus one)."""
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for place, left in enumerate(room):
            if lengths[i] <= left:
                bins[place].append(i)
                room[place] -= lengths[i]
                break
        else:
            bins.append([i])
            room.append(size - lengths[i])
    return [sorted(row) for row in bins]
