"""A tiny model learns to use a Python interpreter: two turns, a sandbox, and GRPO on exact tokens. A few minutes on a CPU.

    python examples/python_tool.py [--steps N] [--seed S]

The question is ``mul 3 8``. In its first turn the policy writes a program in a fenced block; the environment runs it in
a sandbox and appends the output; in its second turn the policy states the answer, which is graded. The model starts from
random weights, so it is first shown conversations in which the program uses any of the three operations, nearly whatever
was asked: it learns the form, and is right about one time in three. Reinforcement has to find out which operation is meant.

The loop is the shortest there is, on the training view: one sequence an episode, both turns in it, and the loss on the
tokens that the policy sampled, none of the interpreter's. ``examples/grpo.py --dataset python-tool`` trains the same with
checkpoints, other variants of the algorithm, and vLLM.
"""

from __future__ import annotations

import argparse
import time

import torch

from torchrl_chat import Budget, DatasetChatEnv, NumberVerifier, RewardTransform, TransformersPolicy, play
from torchrl_chat.cli.tiny import tiny_model, tiny_tokenizer
from torchrl_chat.recipes.tasks import TOOL_ALPHABET, arithmetic_rows, demonstrations
from torchrl_chat.sandbox import Sandbox
from torchrl_chat.training import group_advantages, masked_mean, policy_loss, sequence_log_probs, training_view
from torchrl_chat.transforms import PythonInterpreter, UserSimulator


def make_env(tokenizer, box: Sandbox, prompts: int, group: int, seed: int) -> DatasetChatEnv:
    """Questions, the interpreter, and the reward of the last answer."""
    rows = arithmetic_rows(4096, seed)  # such as {"query": "mul 3 8", "answer": "24"}
    env = DatasetChatEnv(
        dataset=rows, tokenizer=tokenizer, input_mode="tokens", num_envs=prompts, repeats=group, group_repeats=True, seed=seed
    )  # fmt: skip
    env.append_transform(PythonInterpreter(box))
    env.append_transform(UserSimulator([]))  # an answer without a program is the last one
    env.append_transform(Budget(max_turns=2, max_turn_tokens=40))
    env.append_transform(RewardTransform(NumberVerifier(surrounded=0.0), end_on_answer=False))
    return env


def update(model, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    """One step of the optimizer."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def main() -> None:
    """Show the form, reinforce what is right, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="steps of reinforcement (default 100)")
    parser.add_argument("--shown", type=int, default=200, help="steps on the demonstrations (default 200)")
    parser.add_argument("--prompts", type=int, default=16, help="questions a step (default 16)")
    parser.add_argument("--group", type=int, default=8, help="answers to each (default 8)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    tokenizer = tiny_tokenizer(TOOL_ALPHABET)
    model = tiny_model(len(tokenizer), hidden=128, seed=arguments.seed)
    policy = TransformersPolicy(model, tokenizer, max_new_tokens=40)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)
    start = time.perf_counter()
    with Sandbox(deadline=2.0) as box:
        env = make_env(tokenizer, box, arguments.prompts, arguments.group, arguments.seed)
        judge = make_env(tokenizer, box, 256, 1, arguments.seed + 1)

        view = demonstrations(make_env(tokenizer, box, 1024, 1, arguments.seed + 2), arguments.seed)
        for _ in range(arguments.shown):
            scores = sequence_log_probs(model, view[torch.randint(len(view), (64,))])
            update(model, optimizer, -masked_mean(scores.log_probs, scores.mask))
        passed = play(judge, policy)["success"].float().mean().item()
        print(f"pass rate before: {passed:.3f} ({time.perf_counter() - start:.0f} s)", flush=True)

        for step in range(arguments.steps):
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * (1 - 0.9 * step / arguments.steps)
            finished = play(env, policy)  # every conversation to its end
            view = training_view(finished, layout="padded", group=arguments.group)
            view["advantage"] = group_advantages(view["reward"], view["group"], episode=view["episode"])
            for rows in (rows for _ in range(2) for rows in torch.randperm(len(view)).split(64)):
                few = view[rows]
                scores = sequence_log_probs(model, few)
                # Against the log-probs of the very ids that were sampled.
                loss, _ = policy_loss(scores.log_probs, few["log_probs"].full, few["advantage"], scores.mask)
                update(model, optimizer, loss)
            if step % 10 == 9:
                seconds = time.perf_counter() - start
                print(
                    f"step {step + 1} ({seconds:.0f} s): pass rate {finished['success'].float().mean():.3f}",
                    flush=True,
                )

        finished = play(judge, policy)
        passed = finished["success"].float().mean().item()
        print(f"pass rate after: {passed:.3f} ({time.perf_counter() - start:.0f} s)")
        print("\n".join(f"{m['role']:>9}: {m['content']!r}" for m in finished["transcript"][0].messages))


if __name__ == "__main__":
    main()
