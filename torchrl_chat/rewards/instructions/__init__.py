"""The 25 kinds of instruction of IFEval, each a check of the response's text."""

from torchrl_chat.rewards.instructions.checks import INSTRUCTIONS, RELATIONS, Check, Instruction
from torchrl_chat.rewards.instructions.language import LANGUAGES
from torchrl_chat.rewards.instructions.sentences import count_sentences

__all__ = ["INSTRUCTIONS", "LANGUAGES", "RELATIONS", "Check", "Instruction", "count_sentences"]
