"""Grade a model's answers to GSM8K: a rollout of ``GSM8KEnv`` and its rewards.

python examples/gsm8k_rollout.py --model Qwen/Qwen2.5-0.5B-Instruct           # downloads model and data
python examples/gsm8k_rollout.py --data ../shared/data/gsm8k/test.jsonl       # offline, a tiny random model
"""

from __future__ import annotations

import argparse

import torch

from torchrl_chat import GSM8KEnv, TransformersPolicy
from torchrl_chat.tiny import TEXT_ALPHABET, tiny_model, tiny_tokenizer


def main() -> None:
    """Answer a batch of questions and print the first few."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or folder of a causal language model; default: a tiny random one")
    parser.add_argument("--data", default="openai/gsm8k", help="hub name, folder or JSONL file (default: the hub)")
    parser.add_argument("--questions", type=int, default=8, help="how many questions (default 8)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="where an answer is cut (default 256)")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.model:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = AutoModelForCausalLM.from_pretrained(args.model)
    else:
        tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        model = tiny_model(len(tokenizer), context=4096)
    policy = TransformersPolicy(model.eval(), tokenizer, max_new_tokens=args.max_new_tokens)
    env = GSM8KEnv(
        dataset=args.data, split="test", tokenizer=tokenizer, input_mode="tokens", num_envs=args.questions, seed=0
    )

    rollout = env.rollout(1, policy)
    rewards = rollout["next", "reward"].flatten().tolist()
    for transcript, reward in zip(rollout[:, -1]["next", "transcript"], rewards, strict=True):
        question, answer = transcript.messages[-2:]
        print(f"\n[reward {reward:g}] {question['content'][:100]}...\n  -> {answer['content'][:200]!r}")
    print(f"\n{sum(rewards):g} of {len(rewards)} right")


if __name__ == "__main__":
    main()
