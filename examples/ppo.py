"""PPO (arXiv:1707.06347) on exact tokens: a value head, and advantages for every sampled token. One file.

    python examples/ppo.py                                  # a tiny model learns to say the last of two digits
    python examples/ppo.py --trunk separate --backend vllm
    python examples/ppo.py --dataset gsm8k --model Qwen/Qwen2.5-0.5B-Instruct --group_size 1 --prompts 64

A sampled token is an action; the state before it is all tokens in front of it, the environment's among them. Generalized
advantage estimation (arXiv:1506.02438) goes over the sampled tokens only: what a tool or a user says takes no step. The
reward of a conversation stands on its last sampled token; with --kl, each token pays for its distance from the model
before training (arXiv:2203.02155).

Ctrl-C ends a run behind its step, with a checkpoint. With --resume it goes on: the same data in the same order, nothing
trained twice.
"""

from __future__ import annotations

import argparse
import functools
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tensordict import TensorDictBase

from torchrl_chat import ranks
from torchrl_chat.learner import Counts, Streams, gathered, learn, set_rate
from torchrl_chat.models.token_scores import TokenScores
from torchrl_chat.playing import play
from torchrl_chat.recipes.interrupts import launch
from torchrl_chat.recipes.run import Run
from torchrl_chat.recipes.settings import TINY_TOOL, RunConfig, for_readers, parse, setting
from torchrl_chat.recipes.tasks import ask, make_actor_critic, make_env, make_optimizer, make_policy, warm_start
from torchrl_chat.training import (
    TokenTerms,
    gae,
    kl_estimate,
    masked_mean,
    microbatches,
    scored,
    token_rewards,
    token_shares,
    training_view,
    whitened,
)
from torchrl_chat.training.values import PolicyAndValue


@dataclass(kw_only=True)
class PPOConfig(RunConfig):
    """The settings of the run (see RunConfig) and of the algorithm."""

    trunk: Literal["shared", "separate"] = setting("shared", "whether the value head has a network of its own")
    clip: float = setting(0.2, "how far the ratio may go")
    value_clip: float = setting(0.2, "how far a value may go from that of the collecting policy; 0 for no limit")
    value_weight: float = setting(0.5, "coefficient of the value loss")
    gamma: float = setting(1.0, "discount of a token")
    lam: float = setting(0.95, "weight of longer estimates in generalized advantage estimation")
    kl: float = setting(0.0, "what a token pays for its KL divergence from the model before training")
    entropy: float = setting(0.0, "coefficient of an entropy bonus")

    least = RunConfig.least | dict.fromkeys(
        ("clip", "value_clip", "value_weight", "gamma", "lam", "kl", "entropy"), 0
    )
    greatest = RunConfig.greatest | {"clip": 0.999, "gamma": 1, "lam": 1}

    several = True


def defaults(asked: argparse.Namespace) -> dict[str, Any]:
    """Other defaults, given the model and the dataset that were asked for."""
    if asked.model != "tiny":
        return for_readers(asked)
    alone = {"group_size": 1}  # values tell what to expect: no group is needed
    if asked.dataset == "python-tool":
        # A critic's errors reach every token, and what they do grows with the rate: at the 5e-4 that serves GRPO here, one run
        # of six stayed at 0.8. Many small updates do better, and a rate that falls to 0 makes the end steady. The longer warm start
        # leaves fewer other tokens at each of 28 (a chance of 0.2 % each would spoil one answer in twenty).
        steady = {"lr": 2e-4, "final_lr_share": 0.0, "epochs": 4, "minibatch": 64, "warm_steps": 500, "kl": 0.05}
        # Few tokens at a time go without the padding that a long message of an error asks for.
        return TINY_TOOL | alone | steady | {"prompts": 256, "steps": 60, "max_tokens": 2048}
    return alone | {"prompts": 128, "entropy": 0.05, "lr": 7e-4}


def loss_of(
    actor_critic: PolicyAndValue,
    part: TensorDictBase,
    counts: Counts,
    config: PPOConfig,
    streams: Streams,
    **scoring: Any,
) -> Any:
    """The loss of some sequences, as their share of a minibatch, and what to log; what it says of each token is kept."""
    mask = scored(part, actor_critic.model.device)
    own = {
        "old": part["log_probs"].full,
        "advantage": part["advantage"].reshape(mask.shape),
        "share": token_shares(mask, denominator=counts.tokens),
    }
    terms = TokenTerms(clip=config.clip, entropy=config.entropy)
    scores, values = actor_critic(part, entropy=True, loss=terms.of(own), **scoring)
    streams.add(part, scores, counts)
    _, metrics = terms(TokenScores(scores.log_probs, scores.entropy), own, mask)
    error = (values - part["target"]) ** 2
    if config.value_clip:
        near = part["value"] + (values - part["value"]).clamp(-config.value_clip, config.value_clip)
        error = torch.maximum(error, (near - part["target"]) ** 2)
    metrics["value_error"] = masked_mean(error.detach(), mask)
    return scores.loss + config.value_weight * masked_mean(error, mask, denominator=counts.tokens), metrics


_LEARNED = (
    "tokens", "masks", "log_probs", "position_ids", "advantage", "value", "target", "episode", "episode_sequence",
)  # fmt: skip


def score(
    network: Any, view: TensorDictBase, config: PPOConfig, **scoring: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and values of all sampled tokens, (N, T) each, without gradients."""
    log_probs = torch.zeros(view["masks"].all_assistant_mask.shape, device=view["episode"].device)
    values = torch.zeros_like(log_probs)
    with torch.no_grad(), gathered(network):
        for few in microbatches(view, config.max_tokens):
            scores, found = network(view[few], **scoring)
            log_probs[few], values[few] = scores.log_probs, found
    return log_probs, values


def main() -> None:
    """Collect, value, learn, repeat."""
    config = parse(PPOConfig, __doc__, defaults)
    torch.manual_seed(config.seed)
    actor_critic, tokenizer = make_actor_critic(config, config.trunk)
    model = actor_critic.model
    env = make_env(config, tokenizer, config.prompts, config.group_size, seed=config.seed)
    judge = make_env(config, tokenizer, config.eval, 1, seed=config.seed + 10_000)
    optimizer = make_optimizer(config, actor_critic)
    policy, sync = make_policy(config, model, tokenizer)
    run = Run(
        config,
        "ppo",
        model=model,
        tokenizer=tokenizer,
        state={"optimizer": optimizer, "env": env, "judge": judge},
        modules=actor_critic.value_parts(),
    )
    if not run.resumed:
        warm_start(config, model, optimizer, tokenizer)
    sync()
    reference = run.reference() if config.kl else None
    scoring = {
        "temperature": config.temperature,
        "vocab_size": policy.codec.vocab_size,
        "share_prefixes": config.share_prefixes,
    }

    for step in run.steps(lambda: ask(judge, policy, config)):
        set_rate(optimizer, config.rate(step))

        # 1. Answers: each conversation to its end.
        with run.sampling():
            finished = play(env, policy, max_turns=config.max_turns)

        # 2. One sequence an episode: its reward on the last sampled token, a value before each of them.
        view = training_view(finished, layout="padded", group=config.group_size).to(model.device)
        mask = view["masks"].all_assistant_mask
        # An episode in which nothing was sampled has no token for its reward to stand on.
        view["reward"] = torch.where(mask.any(-1), view["reward"].reshape(-1), 0.0)
        _, view["value"] = score(actor_critic, view, config, **scoring)
        rewards = token_rewards(view["reward"], mask)
        if reference is not None:
            with reference.scoring() as before:
                expected, _ = score(PolicyAndValue(before), view, config, **scoring)
            rewards = rewards - config.kl * torch.where(
                mask, kl_estimate(view["log_probs"].full, expected, "k1"), 0.0
            )

        # 3. How much better than expected each token did, over the batch of mean 0 and deviation 1.
        advantage, view["target"] = gae(rewards, view["value"], mask, config.gamma, config.lam)
        view["advantage"] = whitened(advantage, mask)

        # 4. Some passes in random minibatches; then what samples gets the new weights.
        streams = Streams()
        with run.timed("learning"):
            metrics = learn(
                optimizer,
                view.select(*_LEARNED),
                functools.partial(loss_of, actor_critic, config=config, streams=streams, **scoring),
                model=actor_critic,
                **config.learning,
            )
        sync()
        valued, count = ranks.total(torch.stack((view["value"].sum(), mask.sum())))
        metrics |= {
            "reward": float(finished["reward"].mean()),
            "pass_rate": float(finished["success"].float().mean()),
            "value": float(valued / count.clamp(min=1)),
        }
        run.log(streams.mismatch() | metrics, finished=finished, trained=view, streams=streams)


if __name__ == "__main__":
    launch(main)
