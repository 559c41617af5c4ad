"""torchrl transforms that act on a turn."""

from torchrl_chat.conversation import StopReason
from torchrl_chat.transforms.budgets import Budget
from torchrl_chat.transforms.ending import EndOfDialogue
from torchrl_chat.transforms.kl import KLRewardTransform, RetrieveKL, RetrieveLogProb
from torchrl_chat.transforms.references import (
    AdapterReference,
    CompletionsReference,
    ModelReference,
    RemoteReference,
)
from torchrl_chat.transforms.reward import RewardTransform
from torchrl_chat.transforms.thinking import AddThinkingPrompt
from torchrl_chat.transforms.tools import PythonInterpreter, ToolExecutor
from torchrl_chat.transforms.user import UserSimulator
from torchrl_chat.transforms.user_models import EndpointUser, ModelUser

__all__ = [
    "AdapterReference",
    "AddThinkingPrompt",
    "Budget",
    "CompletionsReference",
    "EndOfDialogue",
    "EndpointUser",
    "KLRewardTransform",
    "ModelReference",
    "ModelUser",
    "PythonInterpreter",
    "RemoteReference",
    "RetrieveKL",
    "RetrieveLogProb",
    "RewardTransform",
    "StopReason",
    "ToolExecutor",
    "UserSimulator",
]
