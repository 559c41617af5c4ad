"""torchrl_chat: a token-exact, batched chat environment for reinforcement learning of language models.

The names below are loaded when they are first used: ``import torchrl_chat`` itself costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchrl_chat._lazy import lazy

if TYPE_CHECKING:
    from torchrl_chat.conversation import MessageEnv, Transcript
    from torchrl_chat.envs import (
        ChatEnv,
        CountdownEnv,
        DatasetChatEnv,
        DatasetError,
        GSM8KEnv,
        IFEvalEnv,
        MATHEnv,
        MessageChatEnv,
        ReasoningGymEnv,
        ResponseError,
        TaskEnv,
        load_state,
        save_state,
    )
    from torchrl_chat.messages import MessageError
    from torchrl_chat.openenv import OpenEnvChatEnv
    from torchrl_chat.playing import play
    from torchrl_chat.policies import (
        EndpointPolicy,
        ExactTransformersWrapper,
        ExactVLLMWrapper,
        TransformersPolicy,
        VLLMPolicy,
    )
    from torchrl_chat.rewards import (
        Episode,
        Grader,
        GSM8KVerifier,
        MathVerifier,
        NumberVerifier,
        Verdict,
        WeightedSum,
    )
    from torchrl_chat.rollouts import read_rollouts, write_rollouts
    from torchrl_chat.sandbox import Sandbox, SandboxError
    from torchrl_chat.templates import BridgeError, ChatTemplate, ChatTemplateError
    from torchrl_chat.tools import MCPTools, Tool, Toolbox, tool
    from torchrl_chat.training import training_view
    from torchrl_chat.transforms import (
        AddThinkingPrompt,
        Budget,
        KLRewardTransform,
        PythonInterpreter,
        RetrieveKL,
        RetrieveLogProb,
        RewardTransform,
        StopReason,
        ToolExecutor,
        UserSimulator,
    )

_HOMES = {
    "AddThinkingPrompt": "transforms",
    "BridgeError": "templates",
    "Budget": "transforms",
    "ChatEnv": "envs",
    "ChatTemplate": "templates",
    "ChatTemplateError": "templates",
    "CountdownEnv": "envs",
    "DatasetChatEnv": "envs",
    "DatasetError": "envs",
    "EndpointPolicy": "policies",
    "Episode": "rewards",
    "ExactTransformersWrapper": "policies",
    "ExactVLLMWrapper": "policies",
    "GSM8KEnv": "envs",
    "GSM8KVerifier": "rewards",
    "Grader": "rewards",
    "IFEvalEnv": "envs",
    "KLRewardTransform": "transforms",
    "MATHEnv": "envs",
    "MCPTools": "tools",
    "MathVerifier": "rewards",
    "MessageChatEnv": "envs",
    "MessageEnv": "conversation",
    "MessageError": "messages",
    "NumberVerifier": "rewards",
    "OpenEnvChatEnv": "openenv",
    "PythonInterpreter": "transforms",
    "ReasoningGymEnv": "envs",
    "ResponseError": "conversation",
    "RetrieveKL": "transforms",
    "RetrieveLogProb": "transforms",
    "RewardTransform": "transforms",
    "Sandbox": "sandbox",
    "SandboxError": "sandbox",
    "StopReason": "conversation",
    "TaskEnv": "envs",
    "Tool": "tools",
    "ToolExecutor": "transforms",
    "Toolbox": "tools",
    "Transcript": "conversation",
    "TransformersPolicy": "policies",
    "UserSimulator": "transforms",
    "VLLMPolicy": "policies",
    "Verdict": "rewards",
    "WeightedSum": "rewards",
    "load_state": "envs",
    "play": "playing",
    "read_rollouts": "rollouts",
    "save_state": "envs",
    "tool": "tools",
    "training_view": "training",
    "write_rollouts": "rollouts",
}

__all__ = [
    "AddThinkingPrompt",
    "BridgeError",
    "Budget",
    "ChatEnv",
    "ChatTemplate",
    "ChatTemplateError",
    "CountdownEnv",
    "DatasetChatEnv",
    "DatasetError",
    "EndpointPolicy",
    "Episode",
    "ExactTransformersWrapper",
    "ExactVLLMWrapper",
    "GSM8KEnv",
    "GSM8KVerifier",
    "Grader",
    "IFEvalEnv",
    "KLRewardTransform",
    "MATHEnv",
    "MCPTools",
    "MathVerifier",
    "MessageChatEnv",
    "MessageEnv",
    "MessageError",
    "NumberVerifier",
    "OpenEnvChatEnv",
    "PythonInterpreter",
    "ReasoningGymEnv",
    "ResponseError",
    "RetrieveKL",
    "RetrieveLogProb",
    "RewardTransform",
    "Sandbox",
    "SandboxError",
    "StopReason",
    "TaskEnv",
    "Tool",
    "ToolExecutor",
    "Toolbox",
    "Transcript",
    "TransformersPolicy",
    "UserSimulator",
    "VLLMPolicy",
    "Verdict",
    "WeightedSum",
    "load_state",
    "play",
    "read_rollouts",
    "save_state",
    "tool",
    "training_view",
    "write_rollouts",
]


__getattr__, __dir__ = lazy(__name__, _HOMES)
