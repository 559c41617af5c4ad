"""GRPO, which is ``torchrl-chat train``: to be read in torchrl_chat/recipes/grpo.py, and copied from there.

python examples/grpo.py --help
"""

from torchrl_chat.recipes.grpo import main
from torchrl_chat.recipes.interrupts import launch

if __name__ == "__main__":
    launch(main)
