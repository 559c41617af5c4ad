"""OpenEnv: its chat environment, in this process and as a server, its clients, and batches over any OpenEnv server."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchrl_chat._lazy import lazy

if TYPE_CHECKING:
    from torchrl_chat.openenv.adapter import EnvPool, TorchRLEnvironment
    from torchrl_chat.openenv.batch import OpenEnvChatEnv
    from torchrl_chat.openenv.batch_adapters import CHAT, CHAT_ENV, CHAT_TEXT, ECHO_ENV, Adapter, text_adapter
    from torchrl_chat.openenv.client import GenericClient, StepResult
    from torchrl_chat.openenv.client_chat import ChatEnv
    from torchrl_chat.openenv.client_errors import (
        ConnectFailed,
        OpenEnvError,
        ReplyLost,
        RequestTimeout,
        ServerError,
        SessionLost,
    )
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
    "Adapter": "batch_adapters",
    "CHAT": "batch_adapters",
    "CHAT_ENV": "batch_adapters",
    "CHAT_TEXT": "batch_adapters",
    "ChatAction": "models",
    "ChatEnv": "client_chat",
    "ChatEnvironment": "environment",
    "ChatObservation": "models",
    "ChatState": "models",
    "ConnectFailed": "client_errors",
    "ECHO_ENV": "batch_adapters",
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
    "OpenEnvError": "client_errors",
    "ReplyLost": "client_errors",
    "RequestTimeout": "client_errors",
    "Rubric": "interfaces",
    "ServerError": "client_errors",
    "SessionLost": "client_errors",
    "State": "models",
    "StepResult": "client",
    "TaskProvider": "interfaces",
    "TorchRLEnvironment": "adapter",
    "Transform": "interfaces",
    "create_app": "server",
    "run": "server",
    "text_adapter": "batch_adapters",
}

__all__ = [
    "CHAT",
    "CHAT_ENV",
    "CHAT_TEXT",
    "ECHO_ENV",
    "Action",
    "Adapter",
    "ChatAction",
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

__getattr__, __dir__ = lazy(__name__, _HOMES)
