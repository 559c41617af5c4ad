"""Dialogues with simulated users: one reads from a script, one is a function of what was said so far.

    python examples/user_simulator.py

Runs offline in seconds: a tiny model with random weights answers, so the answers are nonsense; the ledger is not. Under
each token stands a ``^`` if the policy sampled it: what a user says is never trained. In place of the function stands a
model (``ModelUser``, ``EndpointUser``) where users are to be less predictable.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from torchrl_chat import ChatEnv, DatasetChatEnv, Transcript, TransformersPolicy
from torchrl_chat.tiny import TEXT_ALPHABET, tiny_model, tiny_tokenizer
from torchrl_chat.transforms.user import UserSimulator

ROWS = [
    {"query": "Name a colour.", "script": ["A darker one?", "And its opposite?"], "goal": "blue"},
    {"query": "Name a prime number.", "script": ["One above 100, please."], "goal": "101"},
]


def insist(messages: list[dict[str, Any]], row: dict[str, Any]) -> str:
    """A user who knows the answer, asks until it comes, and gives up after two answers."""
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    if row["goal"] in answers[-1]:
        return "Right! <done>"
    if len(answers) == 2:
        return "I give up. <done>"
    return f"No, not {answers[-1][:8]!r}."


def show(title: str, transcript: Transcript, tokenizer: Any) -> None:
    """Print a conversation turn by turn, its sampled tokens underlined."""
    print(f"\n{title}: {len(transcript)} tokens, {transcript.num_sampled} sampled")
    line = marks = ""
    for token, sampled in zip(transcript.tokens.tolist(), transcript.mask.tolist(), strict=True):
        text = tokenizer.decode([token]).replace("\n", " ").replace("\t", " ")
        line, marks = line + text, marks + ("^" if sampled else ".") * len(text)
        if text == tokenizer.eos_token:
            print(f"  {line}\n  {marks}")
            line = marks = ""
    if line:
        print(f"  {line}\n  {marks}")


def main() -> None:
    """Roll out both kinds of user over the same questions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the answers (default 0)")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer = tiny_tokenizer(TEXT_ALPHABET)
    policy = TransformersPolicy(tiny_model(len(tokenizer)), tokenizer, max_new_tokens=16)
    users = {
        "scripted": UserSimulator(script_key="script"),
        "insisting": UserSimulator(insist, row_keys=["goal"], stop="<done>", keep_closing=True),
    }
    for name, user in users.items():
        env = DatasetChatEnv(dataset=ROWS, shuffle=False, tokenizer=tokenizer, input_mode="tokens", num_envs=2)
        env = env.append_transform(user)
        assert isinstance(env.base_env, ChatEnv)
        # Rows end when their user does: the others go on.
        rollout = env.rollout(10, policy, break_when_any_done=False, break_when_all_done=True)
        for row, transcript in zip(ROWS, rollout[:, -1]["next", "transcript"], strict=True):
            show(f"{name} user, {row['query']!r}", transcript, tokenizer)


if __name__ == "__main__":
    main()
