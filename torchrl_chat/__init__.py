"""torchrl_chat: a token-exact, batched chat environment for reinforcement learning of language models.

The names below are loaded when they are first used: ``import torchrl_chat`` itself costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchrl_chat._lazy import lazy

if TYPE_CHECKING:
    from torchrl_chat.envs import (
        ChatEnv,
        DatasetChatEnv,
        DatasetError,
        GSM8KEnv,
        ReasoningGymEnv,
        ResponseError,
    )
    from torchrl_chat.messages import MessageError
    from torchrl_chat.policies import TransformersPolicy
    from torchrl_chat.rewards import GSM8KVerifier, NumberVerifier, Verdict
    from torchrl_chat.templates import BridgeError, ChatTemplate, ChatTemplateError
    from torchrl_chat.training import training_view
    from torchrl_chat.transcript import Transcript
    from torchrl_chat.transforms import RewardTransform

_HOMES = {
    "BridgeError": "templates",
    "ChatEnv": "envs",
    "ChatTemplate": "templates",
    "ChatTemplateError": "templates",
    "DatasetChatEnv": "envs",
    "DatasetError": "envs",
    "GSM8KEnv": "envs",
    "GSM8KVerifier": "rewards",
    "MessageError": "messages",
    "NumberVerifier": "rewards",
    "ReasoningGymEnv": "envs",
    "ResponseError": "envs",
    "RewardTransform": "transforms",
    "Transcript": "transcript",
    "TransformersPolicy": "policies",
    "Verdict": "rewards",
    "training_view": "training",
}

__all__ = [
    "BridgeError",
    "ChatEnv",
    "ChatTemplate",
    "ChatTemplateError",
    "DatasetChatEnv",
    "DatasetError",
    "GSM8KEnv",
    "GSM8KVerifier",
    "MessageError",
    "NumberVerifier",
    "ReasoningGymEnv",
    "ResponseError",
    "RewardTransform",
    "Transcript",
    "TransformersPolicy",
    "Verdict",
    "training_view",
]


__getattr__, __dir__ = lazy(__name__, _HOMES)
