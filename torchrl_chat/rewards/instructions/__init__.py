"""The 25 kinds of instruction of IFEval, each a check of the response's text."""

from torchrl_chat.rewards.instructions import content, shape  # noqa: F401  # they register their checks
from torchrl_chat.rewards.instructions.arguments import INSTRUCTIONS, RELATIONS, Check, Instruction
from torchrl_chat.rewards.instructions.language import LANGUAGES
from torchrl_chat.rewards.instructions.sentences import count_sentences

__all__ = ["INSTRUCTIONS", "LANGUAGES", "RELATIONS", "Check", "Instruction", "count_sentences"]
