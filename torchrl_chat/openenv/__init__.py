"""OpenEnv: its chat environment, in this process and as a server, its clients, and batches over any OpenEnv server."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchrl_chat._lazy import lazy

if TYPE_CHECKING:
    from torchrl_chat.openenv.batch.adapters import CHAT, CHAT_ENV, CHAT_TEXT, ECHO_ENV, Adapter, text_adapter
    from torchrl_chat.openenv.batch.env import OpenEnvChatEnv
    from torchrl_chat.openenv.chat.environment import ChatEnvironment
    from torchrl_chat.openenv.chat.episode import EpisodeEnded, EpisodeLimits
    from torchrl_chat.openenv.chat.pool import EnvPool, TorchRLEnvironment
    from torchrl_chat.openenv.client.chat import ChatClient, ChatEnv
    from torchrl_chat.openenv.client.errors import (
        ConnectFailed,
        OpenEnvError,
        ReplyLost,
        RequestTimeout,
        ServerError,
        SessionLost,
    )
    from torchrl_chat.openenv.client.generic import GenericClient, StepResult
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
    from torchrl_chat.openenv.protocol import Limits, ServerLimits
    from torchrl_chat.openenv.server import create_app, run

_HOMES = {
    "batch.adapters": "CHAT CHAT_ENV CHAT_TEXT ECHO_ENV Adapter text_adapter",
    "batch.env": "OpenEnvChatEnv",
    "chat.environment": "ChatEnvironment",
    "chat.episode": "EpisodeEnded EpisodeLimits",
    "chat.pool": "EnvPool TorchRLEnvironment",
    "client.chat": "ChatClient ChatEnv",
    "client.errors": "ConnectFailed OpenEnvError ReplyLost RequestTimeout ServerError SessionLost",
    "client.generic": "GenericClient StepResult",
    "interfaces": "Environment ModelTokenizer Rubric TaskProvider Transform",
    "models": "Action ChatAction ChatObservation ChatState Message Observation State",
    "protocol": "Limits ServerLimits",
    "server": "create_app run",
}

__all__ = [
    "CHAT",
    "CHAT_ENV",
    "CHAT_TEXT",
    "ECHO_ENV",
    "Action",
    "Adapter",
    "ChatAction",
    "ChatClient",
    "ChatEnv",
    "ChatEnvironment",
    "ChatObservation",
    "ChatState",
    "ConnectFailed",
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
    "OpenEnvError",
    "ReplyLost",
    "RequestTimeout",
    "Rubric",
    "ServerError",
    "ServerLimits",
    "SessionLost",
    "State",
    "StepResult",
    "TaskProvider",
    "TorchRLEnvironment",
    "Transform",
    "create_app",
    "run",
    "text_adapter",
]

__getattr__, __dir__ = lazy(__name__, {name: home for home, names in _HOMES.items() for name in names.split()})
