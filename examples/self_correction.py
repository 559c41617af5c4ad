"""A self-correcting task: a wrong answer is sent back once, without the right one.

torchrl-chat train --dataset examples/self_correction.py:SelfCorrection --max_new_tokens 2
"""

from __future__ import annotations

import sys

from torchrl_chat import MessageEnv
from torchrl_chat.cli.main import main


class SelfCorrection(MessageEnv):
    """The last digit of a sum; right at once pays 1, right on second thoughts 0.5."""

    dataset = [{"query": f"{a}+{b}=", "answer": str((a + b) % 10)} for a in range(10) for b in range(10)]

    def reset(self, row):
        """Ask for a sum."""
        self.answer = row["answer"]
        return row["query"]

    def step(self, message):
        """Pay a right answer, and send the first wrong one back."""
        right = message["content"].strip() == self.answer
        return "Wrong. Again.", float(right) / self.turn, right or self.turn == 2


if __name__ == "__main__":
    sys.exit(main(["play", "--env", f"{__file__}:SelfCorrection", *sys.argv[1:]]))
