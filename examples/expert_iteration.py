"""Expert iteration: sample, keep what is right, imitate it, repeat. One file.

    python examples/expert_iteration.py                     # a tiny model learns to say the last of two digits
    python examples/expert_iteration.py --backend vllm
    python examples/expert_iteration.py --dataset gsm8k --model Qwen/Qwen2.5-0.5B-Instruct

The expert is the policy with a verifier behind it: of K answers to a question those stay that are right, and the policy is
fine-tuned on them (Anthony et al. 2017, arXiv:1705.08439; for language models STaR, arXiv:2203.14465, and rejection
sampling fine-tuning, arXiv:2308.01825). With --restart each round begins from the weights before training, as STaR does.
The loss is on the tokens that the policy sampled, never on what a template, a tool or a user wrote.

Ctrl-C ends a run behind its step, with a checkpoint. With --resume it goes on: the same data in the same order, nothing
trained twice.
"""

from __future__ import annotations

import argparse
import functools
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase

from torchrl_chat import ranks
from torchrl_chat.learner import Counts, Streams, learn, set_rate
from torchrl_chat.playing import play
from torchrl_chat.recipes.checkpoints import load_weights
from torchrl_chat.recipes.interrupts import launch
from torchrl_chat.recipes.run import Run
from torchrl_chat.recipes.settings import TINY_TOOL, RunConfig, for_readers, parse, setting
from torchrl_chat.recipes.tasks import ask, make_env, make_model, make_optimizer, make_policy, warm_start
from torchrl_chat.training import masked_mean, sequence_log_probs, training_view


@dataclass(kw_only=True)
class ExpertIterationConfig(RunConfig):
    """The settings of the run (see RunConfig) and of the algorithm."""

    most: int = setting(4, "how many right answers to one question are imitated; 0 for all of them")
    restart: bool = setting(False, "begin each round from the weights before training")

    least = RunConfig.least | {"most": 0}

    several = True


def defaults(asked: argparse.Namespace) -> dict[str, Any]:
    """Other defaults, given the model and the dataset that were asked for."""
    if asked.model != "tiny":
        return for_readers(asked) | {"steps": 20, "prompts": 256, "lr": 1e-5}
    if asked.dataset == "python-tool":
        # One answer a question: of different ones the rare count as much as the usual, and become it.
        return TINY_TOOL | {"steps": 40, "most": 1, "epochs": 8, "minibatch": 64}
    return {"steps": 30, "prompts": 32, "epochs": 4}


def right_answers(finished: TensorDictBase, config: ExpertIterationConfig) -> TensorDictBase:
    """The sequences of the right conversations, different ones only, at most ``config.most`` a question."""
    view = training_view(finished, layout="padded", group=config.group_size)
    answers: dict[int, list[int]] = {}  # an answer is an episode, of one sequence or of several
    for i, episode in enumerate(view["episode"].tolist()):
        answers.setdefault(episode, []).append(i)
    kept: list[int] = []
    seen: set[tuple[tuple[int, ...], ...]] = set()
    counts: dict[int, int] = {}
    groups, right = view["group"].tolist(), view["success"].flatten().tolist()
    tokens, attention = view["tokens"].full, view["masks"].all_attention_mask
    for rows in answers.values():
        group, key = groups[rows[0]], tuple(tuple(tokens[i][attention[i]].tolist()) for i in rows)
        if not right[rows[0]] or key in seen or (config.most and counts.get(group, 0) >= config.most):
            continue
        seen.add(key)
        counts[group] = counts.get(group, 0) + 1
        kept += rows
    chosen = torch.zeros(len(view), dtype=torch.bool)
    chosen[kept] = True
    return view[chosen]


_LEARNED = ("tokens", "masks", "log_probs", "position_ids", "episode", "episode_sequence")


def loss_of(model: Any, part: TensorDictBase, counts: Counts, streams: Streams, **scoring: Any) -> Any:
    """Supervised fine-tuning on what was sampled: the loss of some sequences, as their share of a minibatch, and what to log."""

    def loss(scores: Any, _at: torch.Tensor) -> torch.Tensor:
        return -scores.log_probs.sum() / counts.tokens

    scores = sequence_log_probs(model, part, entropy=True, loss=loss, **scoring)
    streams.add(part, scores, counts)
    return scores.loss, {"entropy": masked_mean(scores.entropy, scores.mask)}


def main() -> None:
    """Sample, keep, imitate, repeat."""
    config = parse(ExpertIterationConfig, __doc__, defaults)
    torch.manual_seed(config.seed)
    model, tokenizer = make_model(config)
    env = make_env(config, tokenizer, config.prompts, config.group_size, seed=config.seed)
    judge = make_env(config, tokenizer, config.eval, 1, seed=config.seed + 10_000)
    optimizer = make_optimizer(config, model)
    policy, sync = make_policy(config, model, tokenizer)
    run = Run(
        config,
        "expert-iteration",
        model=model,
        tokenizer=tokenizer,
        state={"optimizer": optimizer, "env": env, "judge": judge},
    )
    if not run.resumed:
        warm_start(config, model, optimizer, tokenizer)
    sync()
    start = run.first_weights() if config.restart else None

    for step in run.steps(lambda: ask(judge, policy, config)):
        set_rate(optimizer, config.rate(step))

        # 1. The expert: the policy's own answers that are right.
        with run.sampling():
            finished = play(env, policy, max_turns=config.max_turns)
        view = right_answers(finished, config)
        metrics = {
            "reward": float(finished["reward"].mean()),
            "pass_rate": float(finished["success"].float().mean()),
            "kept": float(len(view["episode"].unique())),
        }

        # 2. The apprentice imitates it.
        streams = Streams()
        if ranks.total(torch.tensor(len(view))):
            if start is not None:
                load_weights(start, model)
                optimizer.state.clear()
            with run.timed("learning"):
                metrics |= learn(
                    optimizer,
                    view.to(model.device).select(*_LEARNED),
                    functools.partial(
                        loss_of,
                        model,
                        streams=streams,
                        temperature=config.temperature,
                        vocab_size=policy.codec.vocab_size,
                    ),
                    model=model,
                    **config.learning,
                )
            sync()
        run.log(metrics, finished=finished, trained=view, streams=streams)


if __name__ == "__main__":
    launch(main)
