"""An environment of one's own, without a tensor: a digit is to be guessed in two turns.

    torchrl-chat play --env examples/guessing_game.py:GuessingGame          # by hand
    torchrl-chat serve --env examples/guessing_game.py:GuessingGame         # for OpenEnv's clients
    python examples/grpo.py --dataset examples/guessing_game.py:GuessingGame

In a batch: ``MessageChatEnv(GuessingGame, tokenizer=tokenizer, num_envs=64)``.
"""

from __future__ import annotations

from torchrl_chat import MessageEnv


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
