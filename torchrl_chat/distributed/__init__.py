"""Collecting episodes on other processes and machines with Ray (extra ``ray``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchrl_chat._lazy import lazy

if TYPE_CHECKING:
    from torchrl_chat.distributed.collector import RayEpisodeCollector, WorkersLostError
    from torchrl_chat.distributed.dialogs import RayChatCollector

_HOMES = {
    "RayChatCollector": "dialogs",
    "RayEpisodeCollector": "collector",
    "WorkersLostError": "collector",
}

__all__ = ["RayChatCollector", "RayEpisodeCollector", "WorkersLostError"]

__getattr__, __dir__ = lazy(__name__, _HOMES)
