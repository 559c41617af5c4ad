"""A tiny model learns to use a Python interpreter: two turns, a sandbox, and GRPO on exact tokens. A few minutes on a CPU.

    python examples/python_tool.py [--steps N] [--seed S]

The question is ``mul 3 8``. In its first turn the policy writes a program in a fenced block; the environment runs it in
a sandbox and appends the output; in its second turn the policy states the answer, which is graded. The model starts from
random weights, so it is first shown conversations in which the program uses any of the three operations, nearly whatever
was asked: it learns the form, and is right little more than one time in three. Reinforcement has to find out which operation
is meant.

The loop is plain PyTorch on ``training_view``: one sequence an episode, both turns in it, and the loss on the tokens
that the policy sampled, none of the interpreter's.
"""

from __future__ import annotations

import argparse
import random
import time

import torch
from tensordict import TensorDictBase
from torch.nn.utils.rnn import pad_sequence
from torchrl.modules.llm.policies import Tokens

from torchrl_chat import DatasetChatEnv, NumberVerifier, RewardTransform, TransformersPolicy, columns, training_view
from torchrl_chat.cli.tiny import tiny_model, tiny_tokenizer
from torchrl_chat.sandbox import Sandbox
from torchrl_chat.transforms import Budget, PythonInterpreter

SIGNS = {"mul": "*", "add": "+", "sub": "-"}
HINT = 0.06  # the share of demonstrations in which the operation is the one that was asked for, beyond chance
ALPHABET = "0123456789 \nadmulsbpythonri()*+-`"


def questions(count: int, seed: int) -> list[dict[str, str]]:
    """Rows ``{"query": "mul 3 8", "answer": "24"}``."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        name, a, b = draw.choice(list(SIGNS)), draw.randint(2, 9), draw.randint(2, 9)
        value = {"mul": a * b, "add": a + b, "sub": a - b}[name]
        rows.append({"query": f"{name} {a} {b}", "answer": str(value)})
    return rows


def make_env(tokenizer, box: Sandbox, prompts: int, group: int, seed: int) -> DatasetChatEnv:
    """Questions, the interpreter, the reward of the second answer, and the end after two turns."""
    env = DatasetChatEnv(
        dataset=questions(4096, seed), tokenizer=tokenizer, input_mode="tokens", num_envs=prompts, repeats=group,
        group_repeats=True, seed=seed,
    )  # fmt: skip
    env.append_transform(PythonInterpreter(box))
    env.append_transform(Budget(max_turns=2, max_turn_tokens=40))
    env.append_transform(RewardTransform(NumberVerifier(surrounded=0.0), end_on_answer=False))
    return env


def rollout(env: DatasetChatEnv, policy) -> TensorDictBase:
    """Two turns of every conversation; what stands under ``"next"`` at their end."""
    td = env.reset()
    td = env.step_mdp(env.step(policy(td)))
    going = ~td["done"].flatten()
    if not going.all():  # a first answer without a program: there is nothing to answer, so the user asks again
        says = [None if ledger.ended is None else td["query"][i] for i, ledger in enumerate(td["transcript"])]
        td = env.base_env.append_messages(td, says)
    return env.step(policy(td))["next"]


def demonstrations(env: DatasetChatEnv, batches: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Conversations that show the form: a program with any operation, then its output as the answer."""
    draw = random.Random(seed)
    codec, stop = env.base_env.template.codec, env.base_env.tokenizer.eos_token

    def expert(td: TensorDictBase) -> TensorDictBase:
        texts = []
        for ledger in td["transcript"]:
            last = ledger.messages[-1]
            if last["role"] == "tool":
                texts.append(last["content"].strip())
            else:
                name, a, b = last["content"].split()
                sign = SIGNS[name] if draw.random() < HINT else draw.choice(list(SIGNS.values()))
                texts.append(f"```python\nprint({a}{sign}{b})\n```")
        ids = [torch.tensor(row) for row in codec.encode([text + stop for text in texts])]
        td["tokens"] = columns.ragged(Tokens, "response", ids, td.batch_size, None)
        return td

    return padded(*[training_view(rollout(env, expert)) for _ in range(batches)])


def padded(*views: TensorDictBase) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of all sequences, (N, T), padded on the right."""
    ids = [row for view in views for row in view.get(("tokens", "full"), as_list=True)]
    mask = [row for view in views for row in view.get(("masks", "all_assistant_mask"), as_list=True)]
    return pad_sequence(ids, batch_first=True), pad_sequence(mask, batch_first=True)


def log_probs(policy: TransformersPolicy, ids: torch.Tensor) -> torch.Tensor:
    """The log-prob of every token but the first given those before it, (N, T - 1)."""
    logits = policy.model(input_ids=ids[:, :-1]).logits[..., : policy.vocab_size].float()
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)


def main() -> None:
    """Show the form, reinforce what is right, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=80, help="steps of reinforcement (default 80)")
    parser.add_argument("--shown", type=int, default=300, help="steps on the demonstrations (default 300)")
    parser.add_argument("--prompts", type=int, default=32, help="questions a step (default 32)")
    parser.add_argument("--group", type=int, default=8, help="answers to each (default 8)")
    parser.add_argument("--epochs", type=int, default=4, help="updates a step (default 4)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    tokenizer = tiny_tokenizer(ALPHABET)
    policy = TransformersPolicy(tiny_model(len(tokenizer), seed=arguments.seed), tokenizer, max_new_tokens=40)
    start = time.perf_counter()
    with Sandbox(deadline=2.0) as box:
        env = make_env(tokenizer, box, arguments.prompts, arguments.group, arguments.seed)
        judge = make_env(tokenizer, box, 128, 1, arguments.seed + 1)
        optimizer = torch.optim.AdamW(policy.model.parameters(), lr=2e-3, weight_decay=0.0)
        ids, mask = demonstrations(env, 4, arguments.seed)
        for step in range(arguments.shown):
            rows = torch.randint(len(ids), (64,))
            loss = -(log_probs(policy, ids[rows]) * mask[rows, 1:]).sum() / mask[rows, 1:].sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 100 == 99:
                print(f"shown {step + 1}: loss {loss.item():.3f}", flush=True)
        print(f"pass rate before: {passed(judge, policy):.3f} ({time.perf_counter() - start:.0f} s)", flush=True)
        for step in range(arguments.steps):
            for group in optimizer.param_groups:
                group["lr"] = 5e-4 * (1 - 0.9 * step / arguments.steps)
            following = rollout(env, policy)
            rewards = following["reward"].reshape(arguments.prompts, arguments.group)
            advantage = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
            view = training_view(following)
            ids, mask = padded(view)
            mask = mask[:, 1:]
            old = pad_sequence(view.get(("log_probs", "full"), as_list=True), batch_first=True)[:, 1:]
            weights = advantage.flatten()[view["episode"]][:, None]
            for _ in range(arguments.epochs):
                ratio = (
                    log_probs(policy, ids) - old
                ).exp()  # against the log-probs of the very ids that were sampled
                gain = torch.minimum(ratio * weights, ratio.clamp(0.8, 1.2) * weights)
                loss = -(gain * mask).sum() / mask.sum()
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
                optimizer.step()
            if step % 10 == 9:
                print(
                    f"step {step + 1} ({time.perf_counter() - start:.0f} s): pass rate {rewards.mean().item():.3f}",
                    flush=True,
                )
        after = passed(judge, policy)
        print(f"pass rate after: {after:.3f} ({time.perf_counter() - start:.0f} s)")
        ledger = rollout(judge, policy)["transcript"][0]
        print("\n".join(f"{m['role']:>9}: {m['content']!r}" for m in ledger.messages))


def passed(env: DatasetChatEnv, policy: TransformersPolicy) -> float:
    """The share of right answers over one batch of questions."""
    return rollout(env, policy)["success"].float().mean().item()


if __name__ == "__main__":
    main()
