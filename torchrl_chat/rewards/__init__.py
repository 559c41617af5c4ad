"""Scoring functions: what an answer is worth against a reference. Knows neither torch nor torchrl.

A verifier is any callable ``(response, reference) -> Verdict | float``; see :mod:`torchrl_chat.rewards.verdict`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchrl_chat._lazy import lazy

if TYPE_CHECKING:
    from torchrl_chat.rewards.code import CodeVerifier, RunResult
    from torchrl_chat.rewards.compose import Gate, Rubric, Sequential, WeightedSum
    from torchrl_chat.rewards.countdown import CountdownVerifier, countdown_rows
    from torchrl_chat.rewards.formatting import FormatVerifier
    from torchrl_chat.rewards.grader import Grader
    from torchrl_chat.rewards.gsm8k import GSM8KVerifier
    from torchrl_chat.rewards.ifeval import IFEvalVerifier
    from torchrl_chat.rewards.judge import LLMJudge
    from torchrl_chat.rewards.matching import ExactMatch, MultipleChoice, RegexMatch
    from torchrl_chat.rewards.math import MathVerifier
    from torchrl_chat.rewards.numbers import NumberVerifier, extract_number, parse_number
    from torchrl_chat.rewards.pool import PoolError, VerifierPool
    from torchrl_chat.rewards.shaping import CosineLength, LengthPenalty, OverlongPenalty, RepetitionPenalty
    from torchrl_chat.rewards.verdict import Episode, Verdict, Verifier, grades

_NAMES = {
    "code": ("CodeVerifier", "RunResult"),
    "compose": ("Gate", "Rubric", "Sequential", "WeightedSum"),
    "countdown": ("CountdownVerifier", "countdown_rows"),
    "formatting": ("FormatVerifier",),
    "grader": ("Grader",),
    "gsm8k": ("GSM8KVerifier",),
    "ifeval": ("IFEvalVerifier",),
    "judge": ("LLMJudge",),
    "matching": ("ExactMatch", "MultipleChoice", "RegexMatch"),
    "math": ("MathVerifier",),
    "numbers": ("NumberVerifier", "extract_number", "parse_number"),
    "pool": ("PoolError", "VerifierPool"),
    "shaping": ("CosineLength", "LengthPenalty", "OverlongPenalty", "RepetitionPenalty"),
    "verdict": ("Episode", "Verdict", "Verifier", "grades"),
}

__all__ = [
    "CodeVerifier",
    "CosineLength",
    "CountdownVerifier",
    "Episode",
    "ExactMatch",
    "FormatVerifier",
    "GSM8KVerifier",
    "Gate",
    "Grader",
    "IFEvalVerifier",
    "LLMJudge",
    "LengthPenalty",
    "MathVerifier",
    "MultipleChoice",
    "NumberVerifier",
    "OverlongPenalty",
    "PoolError",
    "RegexMatch",
    "RepetitionPenalty",
    "Rubric",
    "RunResult",
    "Sequential",
    "Verdict",
    "Verifier",
    "VerifierPool",
    "WeightedSum",
    "countdown_rows",
    "extract_number",
    "grades",
    "parse_number",
]

__getattr__, __dir__ = lazy(__name__, {name: home for home, names in _NAMES.items() for name in names})
