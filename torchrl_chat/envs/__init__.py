"""The environments: ``ChatEnv``, datasets on top of it, and the ready-made tasks."""

from torchrl_chat.conversation import ResponseError
from torchrl_chat.envs.chat import ChatEnv
from torchrl_chat.envs.countdown import CountdownEnv
from torchrl_chat.envs.dataset import DatasetChatEnv
from torchrl_chat.envs.exams import AIMEEnv, GPQAEnv, HumanEvalEnv, MATH500Env, MMLUProEnv
from torchrl_chat.envs.loading import DatasetError
from torchrl_chat.envs.message import MessageChatEnv
from torchrl_chat.envs.reasoning import ReasoningGymEnv
from torchrl_chat.envs.state import collector_state, load_collector_state, load_state, save_state
from torchrl_chat.envs.task import GSM8KEnv, IFEvalEnv, MATHEnv, RowsEnv, TaskEnv

__all__ = [
    "AIMEEnv",
    "ChatEnv",
    "CountdownEnv",
    "DatasetChatEnv",
    "DatasetError",
    "GPQAEnv",
    "GSM8KEnv",
    "HumanEvalEnv",
    "IFEvalEnv",
    "MATH500Env",
    "MATHEnv",
    "MMLUProEnv",
    "MessageChatEnv",
    "ReasoningGymEnv",
    "ResponseError",
    "RowsEnv",
    "TaskEnv",
    "collector_state",
    "load_collector_state",
    "load_state",
    "save_state",
]
