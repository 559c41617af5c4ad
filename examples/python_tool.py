"""A tiny model learns to use a Python interpreter: two turns, a sandbox, and GRPO on exact tokens. Minutes on a CPU.

    python examples/python_tool.py [--seed S] [--backend vllm]

The question is ``mul 3 8``. In its first turn the policy writes a program in a fenced block; the environment runs it in
a sandbox and appends the output; in its second turn the policy states the answer, which is graded. The model starts from
random weights, so it is first shown conversations in which the program uses any of the three operations, nearly whatever
was asked: it learns the form, and is right little more than one time in three. Reinforcement has to find out which operation
is meant.

This is torchrl_chat/recipes/grpo.py without its options, and with its environment made in sight: what to copy for tools of your own.
Ctrl-C ends a run behind its step, with a checkpoint; --out FOLDER --resume goes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from tensordict import TensorDictBase

from torchrl_chat import DatasetChatEnv, NumberVerifier, RewardTransform, tiny
from torchrl_chat.learner import Counts, learn, set_rate
from torchrl_chat.playing import play
from torchrl_chat.recipes.interrupts import launch
from torchrl_chat.recipes.run import Run
from torchrl_chat.recipes.settings import TINY_TOOL, RunConfig, parse, setting
from torchrl_chat.recipes.tasks import ask, make_model, make_optimizer, make_policy, warm_start
from torchrl_chat.sandbox import Sandbox
from torchrl_chat.training import (
    group_advantages,
    policy_loss,
    sequence_log_probs,
    training_view,
)
from torchrl_chat.transforms import Budget, PythonInterpreter, UserSimulator


@dataclass(kw_only=True)
class ToolConfig(RunConfig):
    """The settings of the run (see RunConfig), and its one task."""

    dataset: Literal["python-tool"] = setting("python-tool", "the task")
    model: Literal["tiny"] = setting("tiny", "random weights, made on the spot")

    least = RunConfig.least | {"group_size": 2}


def make_env(
    config: ToolConfig, tokenizer: Any, box: Sandbox, prompts: int, group: int, seed: int
) -> DatasetChatEnv:
    """Questions, what runs programs, who ends the conversation, and what the answer is worth."""
    env = DatasetChatEnv(
        dataset=config.data or tiny.arithmetic_rows(4096, seed), tokenizer=tokenizer, input_mode="tokens",
        num_envs=prompts, repeats=group, group_repeats=True, seed=seed,
    )  # fmt: skip
    env = env.append_transform(PythonInterpreter(box))
    env = env.append_transform(
        UserSimulator([])
    )  # it has nothing to say: an answer without a program is the last one
    env = env.append_transform(Budget(max_turns=2, max_turn_tokens=config.max_new_tokens))
    env = env.append_transform(RewardTransform(NumberVerifier(surrounded=0.0), end_on_answer=False))
    return env


def loss_of(model: Any, part: TensorDictBase, counts: Counts, config: ToolConfig) -> Any:
    """The loss of some episodes, each one sequence, on what the policy sampled of it, as their share of a minibatch."""
    scores = sequence_log_probs(model, part, temperature=config.temperature)
    # The ratio is to the log-probs of the very ids that were sampled: there is nothing to compute again.
    return policy_loss(
        scores.log_probs, part["log_probs"].full, part["advantage"], scores.mask,
        aggregation="sequence", denominator=counts.sequences,
    )  # fmt: skip


def main() -> None:
    """Show the form, reinforce what is right, report."""
    config = parse(ToolConfig, __doc__, lambda asked: TINY_TOOL)
    torch.manual_seed(config.seed)
    model, tokenizer = make_model(config)
    with Sandbox(deadline=2.0) as box:
        env = make_env(config, tokenizer, box, config.prompts, config.group_size, config.seed)
        judge = make_env(config, tokenizer, box, config.eval, 1, config.seed + 10_000)
        optimizer = make_optimizer(config, model)
        policy, sync = make_policy(config, model, tokenizer)
        run = Run(
            config, "python-tool", model=model, tokenizer=tokenizer, state={"optimizer": optimizer, "env": env}
        )
        if not run.resumed:
            warm_start(config, model, optimizer, tokenizer)
        sync()
        for step in run.steps(lambda: ask(judge, policy, config)):
            set_rate(optimizer, config.rate(step))
            finished = play(env, policy, max_turns=config.max_turns)
            view = training_view(finished, layout="padded", group=config.group_size).to(model.device)
            view["advantage"] = group_advantages(view)
            metrics = learn(
                optimizer,
                view.select("tokens", "masks", "log_probs", "position_ids", "advantage"),
                lambda part, counts: loss_of(model, part, counts, config),
                **config.learning,
            )
            metrics |= {
                "reward": float(finished["reward"].mean()),
                "pass_rate": float(finished["success"].float().mean()),
            }
            run.log(metrics, finished=finished, trained=view)
            sync()


if __name__ == "__main__":
    launch(main)
