"""OpenEnv: its chat environment, in this process and as a server, its clients, and batches over any OpenEnv server."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchrl_chat._lazy import lazy

if TYPE_CHECKING:
    from torchrl_chat.openenv.adapter import EnvPool, TorchRLEnvironment
    from torchrl_chat.openenv.batch import OpenEnvChatEnv
    from torchrl_chat.openenv.client import GenericClient, StepResult
    from torchrl_chat.openenv.client_chat import ChatEnv
    from torchrl_chat.openenv.environment import ChatEnvironment
    from torchrl_chat.openenv.episode import EpisodeEnded, EpisodeLimits
    from torchrl_chat.openenv.interfaces import Environment, ModelTokenizer, Rubric, TaskProvider, Transform
    from torchrl_chat.openenv.models import (
        Action,
        ChatAction,
        ChatObservation,
        ChatState,
        Message,
        Observation,
        State,
    )
    from torchrl_chat.openenv.protocol import Limits
    from torchrl_chat.openenv.server import create_app, run

_HOMES = {
    "Action": "models",
    "ChatAction": "models",
    "ChatEnv": "client_chat",
    "ChatEnvironment": "environment",
    "ChatObservation": "models",
    "ChatState": "models",
    "EnvPool": "adapter",
    "Environment": "interfaces",
    "EpisodeEnded": "episode",
    "EpisodeLimits": "episode",
    "GenericClient": "client",
    "Limits": "protocol",
    "Message": "models",
    "ModelTokenizer": "interfaces",
    "Observation": "models",
    "OpenEnvChatEnv": "batch",
    "Rubric": "interfaces",
    "State": "models",
    "StepResult": "client",
    "TaskProvider": "interfaces",
    "TorchRLEnvironment": "adapter",
    "Transform": "interfaces",
    "create_app": "server",
    "run": "server",
}

__all__ = [
    "Action",
    "ChatAction",
    "ChatEnv",
    "ChatEnvironment",
    "ChatObservation",
    "ChatState",
    "EnvPool",
    "Environment",
    "EpisodeEnded",
    "EpisodeLimits",
    "GenericClient",
    "Limits",
    "Message",
    "ModelTokenizer",
    "Observation",
    "OpenEnvChatEnv",
    "Rubric",
    "State",
    "StepResult",
    "TaskProvider",
    "TorchRLEnvironment",
    "Transform",
    "create_app",
    "run",
]

__getattr__, __dir__ = lazy(__name__, _HOMES)
