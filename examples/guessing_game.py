"""An environment of one's own, without a tensor: a digit is to be guessed in two turns.

    python examples/guessing_game.py                      # by hand, in the browser; --help says how else
    torchrl-chat serve --env examples/guessing_game.py:GuessingGame         # for OpenEnv's clients
    torchrl-chat train --dataset examples/guessing_game.py:GuessingGame

In a batch: ``MessageChatEnv(GuessingGame, tokenizer=tokenizer, num_envs=64)``.
"""

from __future__ import annotations

import sys

from torchrl_chat import MessageEnv
from torchrl_chat.cli.main import main


class GuessingGame(MessageEnv):
    """Right at once pays 1, right with the hint 0.5."""

    def reset(self, row):
        """Think of a digit."""
        self.number = self.random.randint(0, 9)
        return "Guess my digit."

    def step(self, message):
        """Pay a right guess, and give a hint behind the first wrong one."""
        guess = message["content"].strip()
        if guess == str(self.number):
            return None, 1.0 / self.turn, True
        hint = "Higher." if guess < str(self.number) else "Lower."
        return hint, 0.0, self.turn == 2


if __name__ == "__main__":
    sys.exit(main(["play", "--env", f"{__file__}:GuessingGame", *sys.argv[1:]]))
