"""Two questions to each conversation: a transform that asks again, and what a loss would train on.

    python examples/multi_turn.py

Runs offline in seconds: a tiny model with random weights answers, so the answers are nonsense; the ledger is not.
"""

from __future__ import annotations

import argparse

import torch
from tensordict import TensorDictBase
from torchrl.envs import StepCounter, Transform

from torchrl_chat import DatasetChatEnv, TransformersPolicy
from torchrl_chat.tiny import TEXT_ALPHABET, tiny_model, tiny_tokenizer


class AskAgain(Transform):
    """After every answer that does not end the dialogue, the user asks for another one."""

    def __init__(self, question: str):
        super().__init__()
        self.question = question

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        over = next_tensordict["done"].flatten().tolist()
        env = self.parent.base_env
        return env.append_messages(next_tensordict, [None if done else self.question for done in over])


def main() -> None:
    """Roll out two turns and print the ledger of each conversation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the answers (default 0)")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer = tiny_tokenizer(TEXT_ALPHABET)
    policy = TransformersPolicy(tiny_model(len(tokenizer)), tokenizer, max_new_tokens=12)
    questions = [{"query": "Name a colour."}, {"query": "Name a prime number, please."}]
    env = DatasetChatEnv(dataset=questions, shuffle=False, tokenizer=tokenizer, input_mode="text", num_envs=2)
    env = env.append_transform(StepCounter(max_steps=2))
    env = env.append_transform(AskAgain("Another one?"))

    rollout = env.rollout(2, policy)
    for transcript in rollout[:, -1]["next", "transcript"]:
        print("\n" + tokenizer.decode(transcript.tokens))
        print(f"{len(transcript)} tokens, {transcript.num_sampled} sampled:", end=" ")
        print("".join("^" if sampled else "." for sampled in transcript.mask.tolist()))


if __name__ == "__main__":
    main()
