"""An environment with tools that change its state: a basket is to be filled for a given price.

    python examples/shop.py                      # by hand, in the browser; --help says how else

The policy calls ``buy``, a method of the episode; its results follow without a line here. An answer without a call is the
last one, and paid.
"""

from __future__ import annotations

import sys

from torchrl_chat import MessageEnv
from torchrl_chat.cli.main import main

PRICES = {"tea": 3, "bread": 4, "jam": 5, "cheese": 8}


class Shop(MessageEnv):
    """Pays 1 where exactly the money was spent."""

    tools = ("buy",)

    def reset(self, row):
        """Give some money that can be spent to the last coin."""
        self.basket = []
        self.money = sum(self.random.sample(list(PRICES.values()), 2))
        return f"Spend exactly {self.money}. Prices: {PRICES}. Say done when you are."

    def buy(self, article: str) -> str:
        """Put an article into the basket.

        Args:
            article: its name.
        """
        self.basket.append(PRICES[article])
        return f"{self.money - sum(self.basket)} left"

    def step(self, message):
        """The policy has had enough."""
        return None, float(sum(self.basket) == self.money), True


if __name__ == "__main__":
    sys.exit(main(["play", "--env", f"{__file__}:Shop", *sys.argv[1:]]))
