"""The environments: ``ChatEnv``, and datasets on top of it."""

from torchrl_chat.envs.chat import ChatEnv
from torchrl_chat.envs.dataset import DatasetChatEnv
from torchrl_chat.envs.gsm8k import GSM8KEnv
from torchrl_chat.envs.loading import DatasetError
from torchrl_chat.envs.reasoning import ReasoningGymEnv
from torchrl_chat.envs.responses import ResponseError

__all__ = ["ChatEnv", "DatasetChatEnv", "DatasetError", "GSM8KEnv", "ReasoningGymEnv", "ResponseError"]
