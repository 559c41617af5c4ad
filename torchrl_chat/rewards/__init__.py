"""Scoring functions: what an answer is worth against a reference. Knows neither torch nor torchrl."""

from torchrl_chat.rewards.gsm8k import GSM8KVerifier
from torchrl_chat.rewards.numbers import NumberVerifier, extract_number, parse_number
from torchrl_chat.rewards.verdict import Verdict, Verifier

__all__ = ["GSM8KVerifier", "NumberVerifier", "Verdict", "Verifier", "extract_number", "parse_number"]
