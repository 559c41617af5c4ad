"""GRPO on exact tokens, and its relatives: ``torchrl-chat train``. Collect, score, learn, repeat.

With no arguments a tiny model learns, from random weights, to say the last of two digits: a minute or two on two CPU cores,
nothing is downloaded. Other tasks and models, several processes (torchrun):

    torchrl-chat train --dataset python-tool             # ... and to use an interpreter, in two turns
    torchrl-chat train --model smollm2                   # a real model learns to add, in minutes
    torchrl-chat train --dataset gsm8k --model Qwen/Qwen2.5-0.5B-Instruct --kl 0.001
    torchrl-chat train --variant dapo --backend vllm
    torchrl-chat train --dataset my_environment.py:Class # a MessageEnv of yours
    torchrun --nproc-per-node 8 -m torchrl_chat.cli.main train --model Qwen/Qwen2.5-0.5B-Instruct --dataset gsm8k

A group is the answers to one question; what counts is how much better an answer is than its group. What the variants set
can also be set one by one:

    grpo         arXiv:2402.03300  mean over sequences of the mean over their tokens, rewards divided by the group's deviation
    dapo         arXiv:2503.14476  mean over tokens, a wider clip upwards, groups with equal rewards resampled, overlong shaping
    dr-grpo      arXiv:2503.20783  sum over tokens divided by a constant, rewards not divided by the group's deviation
    rloo         arXiv:2402.14740  rewards compared with the others of the group, and not divided; sum over tokens
    reinforce++  arXiv:2501.03262  rewards divided by the deviation over the whole batch, mean over tokens
    maxrl        arXiv:2602.02710  rewards divided by their group's mean: what is rarely right counts more; sum over tokens
    gspo         arXiv:2507.18071  the ratio of a sequence instead of a token's
    cispo        arXiv:2506.13585  a clipped ratio as a weight, so that no token loses its gradient; mean over tokens
    gmpo         arXiv:2507.20673  the geometric mean over a sequence's tokens
    sapo         arXiv:2511.20347  a soft gate instead of a clip
    distillation arXiv:2306.13649  no rewards: KL(model || --teacher) at each sampled token, over the whole vocabulary

What samples and what learns may differ (an engine of another precision): "mismatch" in the metrics tells by how much.
--correction weighs tokens by it: tis (truncated), mis (masked), icepop (a band).

The folder of the run holds config.json, metrics.jsonl (a line a step), rollouts.jsonl (conversations: torchrl-chat view FOLDER
shows them), checkpoints/ (model and tokenizer), curve.png and result.json. Ctrl-C ends a run behind its step, with a
checkpoint. With --resume it goes on: the same data in the same order, nothing trained twice.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tensordict import TensorDictBase

from torchrl_chat import ranks
from torchrl_chat.learner import Counts, Streams, gathered, gathered_head, learn, set_rate
from torchrl_chat.models.divergence import AllTokens
from torchrl_chat.models.token_scores import TokenScores
from torchrl_chat.playing import play
from torchrl_chat.recipes.run import Run
from torchrl_chat.recipes.settings import TINY_TOOL, RunConfig, for_readers, parse, setting
from torchrl_chat.recipes.tasks import (
    ask,
    make_env,
    make_model,
    make_optimizer,
    make_policy,
    make_teacher,
    warm_start,
)
from torchrl_chat.rewards import Episode, OverlongPenalty
from torchrl_chat.training import (
    TokenTerms,
    distillation_advantages,
    group_advantages,
    importance_weights,
    scored,
    sequence_log_probs,
    teacher_of,
    token_shares,
    training_view,
)
from torchrl_chat.training.surrogates import bounds_of


@dataclass(kw_only=True)
class GRPOConfig(RunConfig):
    """The settings of the run (see RunConfig) and of the algorithm."""

    variant: Literal[
        "grpo", "dapo", "dr-grpo", "rloo", "reinforce++", "maxrl", "gspo", "cispo", "gmpo", "sapo", "distillation"
    ] = setting("grpo", "sets the defaults of what follows")
    surrogate: Literal["ppo", "gspo", "cispo", "gmpo", "sapo", "reinforce"] = setting(
        "ppo", "what is maximised; sets the defaults of the clip"
    )
    clip: float = setting(0.2, "how far the ratio may fall")
    clip_high: float = setting(0.2, "how far the ratio may rise")
    aggregation: Literal["sequence", "token", "constant"] = setting("sequence", "how token losses become one")
    normalize: Literal["std", "mean", "batch", "none"] = setting(
        "std", "what rewards are divided by: their group's deviation or mean, the deviation of the batch, nothing"
    )
    leave_one_out: bool = setting(False, "compare an answer with the others of its group, without itself")
    correction: Literal["none", "tis", "mis", "icepop"] = setting(
        "none", "weights where the sampler's log-probs are not the learner's (arXiv:2510.18855 for icepop)"
    )
    correction_level: Literal["token", "sequence", "geometric"] = setting("token", "what has a weight of its own")
    correction_cap: float = setting(2.0, "the greatest weight of tis and mis")
    dynamic_sampling: bool = setting(False, "leave out groups with equal rewards, and ask other questions instead")
    max_batches: int = setting(4, "batches that dynamic sampling collects at most in a step")
    overlong: int = setting(
        0, "answers lose up to 1 over their last so many tokens before --max-new-tokens; 0: none do"
    )
    kl: float = setting(0.0, "coefficient of the KL divergence from the model before training")
    kl_kind: Literal["k1", "k2", "k3"] = setting("k3", "its estimator; the gradient of k1 is 0 on average")
    entropy: float = setting(0.0, "coefficient of an entropy bonus")
    teacher: str | None = setting(None, "name or folder of a model with the same tokenizer, to learn from")
    distill: float = setting(1.0, "with --teacher, the weight of what it says of each token (arXiv:2306.13649)")
    reward_weight: float = setting(1.0, "the weight of rewards beside it; 0: nothing but the teacher counts")
    divergence: Literal["sampled", "reverse", "forward"] = setting(
        "sampled",
        "from the teacher: told by the sampled tokens; KL(model || teacher) or KL(teacher || model) over the whole vocabulary",
    )

    least = (
        RunConfig.least
        | {"group_size": 2, "max_batches": 1}
        | dict.fromkeys(("overlong", "clip", "clip_high", "kl", "entropy", "distill", "reward_weight"), 0)
        | {"correction_cap": 1}
    )

    several = True

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Of the surrogate, if it has any."""
        return None if self.surrogate == "reinforce" else (self.clip, self.clip_high)

    @property
    def terms(self) -> TokenTerms:
        """Of the loss."""
        return TokenTerms(
            surrogate=self.surrogate,
            clip=self.bounds,
            kl=self.kl,
            kl_kind=self.kl_kind,
            entropy=self.entropy,
            divergence=self.distill,
        )

    def problem(self) -> str | None:
        """What does not go together."""
        try:
            bounds_of(self.surrogate, self.bounds)
        except ValueError as error:
            return f"--clip {self.clip} --clip-high {self.clip_high}: {error}"
        if self.surrogate == "reinforce" and (self.clip or self.clip_high):
            return "--surrogate reinforce has no ratio that --clip or --clip-high could bound."
        if self.normalize == "mean" and self.overlong:
            return (
                "--overlong makes rewards negative, and --normalize mean divides by their mean: give one of them."
            )
        if self.teacher is None and (self.variant == "distillation" or not self.reward_weight):
            return f"--variant {self.variant} --reward-weight {self.reward_weight} learns from a teacher: give --teacher."
        if self.divergence != "sampled" and self.teacher is None:
            return f"--divergence {self.divergence} is one from a teacher: give --teacher."
        return super().problem()


def defaults(asked: argparse.Namespace) -> dict[str, Any]:
    """Other defaults, given the model, the dataset and the variant that were asked for."""
    found: dict[str, Any] = {"prompts": 16, "group_size": 8, "entropy": 0.05, "lr": 7e-4}
    if asked.model != "tiny":
        found = for_readers(asked)
    elif asked.dataset == "python-tool":
        found = dict(TINY_TOOL)
    if asked.variant == "dapo":
        given = "max_new_tokens" in asked.given
        limit = asked.max_new_tokens if given else found.get("max_new_tokens", asked.max_new_tokens)
        long = max(1, limit // 4)
        found |= {
            "clip_high": 0.28,
            "aggregation": "token",
            "dynamic_sampling": True,
            "overlong": 0 if long == 1 else long,
        }
    found |= _VARIANTS.get(asked.variant, {})
    surrogate = asked.surrogate if "surrogate" in asked.given else found.get("surrogate", asked.surrogate)
    if surrogate != "ppo":
        found["clip"], found["clip_high"] = bounds_of(surrogate, None)
    return found


# Beside GRPO's own, and DAPO's, which depend on the longest answer.
_VARIANTS: dict[str, dict[str, Any]] = {
    "dr-grpo": {"aggregation": "constant", "normalize": "none"},
    "rloo": {"aggregation": "constant", "normalize": "none", "leave_one_out": True},
    "reinforce++": {"normalize": "batch", "aggregation": "token"},
    "maxrl": {"aggregation": "constant", "normalize": "mean"},
    "gspo": {"surrogate": "gspo"},
    "cispo": {"surrogate": "cispo", "aggregation": "token"},
    "gmpo": {"surrogate": "gmpo"},
    "sapo": {"surrogate": "sapo"},
    "distillation": {
        "divergence": "reverse",
        "reward_weight": 0.0,
        "normalize": "none",
        "aggregation": "token",
        "group_size": 2,
        "entropy": 0.0,
    },
}


def mixed_groups(finished: TensorDictBase, config: GRPOConfig) -> torch.Tensor:
    """Which groups of a batch hold rewards that differ, (G,); what could not be graded has none."""
    view = training_view(finished, layout="padded", group=config.group_size)
    trained = view["masks"].all_assistant_mask.any(-1)
    groups, rewards = view["group"][trained], view["reward"].flatten()[trained]
    none = rewards.new_full((len(finished) // config.group_size,), torch.inf)
    return -none.scatter_reduce(0, groups, -rewards, "amin") > none.scatter_reduce(0, groups, rewards, "amin")


def collect(env: Any, policy: Any, config: GRPOConfig) -> tuple[list[TensorDictBase], torch.Tensor]:
    """Finished batches of whole groups, and which of their groups are trained; of several processes each has its own."""
    finished: list[TensorDictBase] = []
    kept: list[torch.Tensor] = []
    for _ in range(config.max_batches if config.dynamic_sampling else 1):
        finished.append(play(env, policy, max_turns=config.max_turns))
        kept.append(
            mixed_groups(finished[-1], config)
            if config.dynamic_sampling
            else torch.ones(len(finished[-1]) // config.group_size).bool()
        )
        if ranks.total(torch.cat(kept).sum()) >= config.prompts:
            break
    # In the order of the questions, which the processes take in turn.
    groups = torch.stack(ranks.everywhere(torch.cat(kept)), 1)
    wanted = groups & (groups.flatten().cumsum(0).view(groups.shape) <= config.prompts)
    return finished, wanted[:, ranks.own()]


def longest_answers(mask: torch.Tensor) -> torch.Tensor:
    """How many tokens the longest answer of each sequence has, (N,); an answer is a run of sampled tokens.

    Example:
        >>> import torch
        >>> longest_answers(torch.tensor([[True, True, False, True]]))
        tensor([2])
    """
    counted = mask.cumsum(-1)
    return (counted - counted.where(~mask, 0).cummax(-1).values).amax(-1)


def corrected(model: Any, view: TensorDictBase, config: GRPOConfig, **scoring: Any) -> dict[str, float]:
    """Give a view weights for what another policy sampled than the model is, and say how far apart they are."""
    with torch.no_grad(), gathered(model):
        view["proximal"] = sequence_log_probs(model, view, **scoring).log_probs
    icepop = config.correction == "icepop"
    view["weights"], metrics = importance_weights(
        view["proximal"],
        view["log_probs"].full,
        view["masks"].all_assistant_mask,
        level=config.correction_level,
        beyond="truncate" if config.correction == "tis" else "mask",
        low=0.5 if icepop else 0.0,
        high=5.0 if icepop else config.correction_cap,
    )
    return {name: float(value) for name, value in metrics.items()}


def what_is_taught(teacher: Any, view: TensorDictBase, config: GRPOConfig) -> AllTokens:
    """A teacher's distribution of every trained token of a view, whose rows are told which of these are theirs."""
    with gathered(teacher):
        taught = teacher_of(teacher, view, max_tokens=config.max_tokens)
    mask = scored(view, teacher.device)
    view["teacher_state"] = (mask.flatten().cumsum(0) - 1).view(mask.shape)
    return taught


_LEARNED = (
    "tokens", "masks", "log_probs", "position_ids", "advantage", "reference", "proximal", "weights", "teacher_state", "episode",
    "episode_sequence",
)  # fmt: skip


def loss_of(
    model: Any,
    part: TensorDictBase,
    counts: Counts,
    config: GRPOConfig,
    vocab_size: int,
    streams: Streams,
    taught: AllTokens | None = None,
) -> Any:
    """The loss of some sequences, as their share of a minibatch, and what to log; what it says of each token is kept."""
    mask = scored(part, model.device)
    own = {
        # Where the sampler is another policy, the ratio is that to the learner before its first update.
        "old": part.get("proximal", part["log_probs"].full),
        "advantage": part["advantage"].reshape(len(part), -1).expand_as(mask),
        "share": token_shares(
            mask,
            config.aggregation,
            constant=float(config.max_new_tokens * config.max_turns) if config.aggregation == "constant" else None,
            denominator=counts.tokens if config.aggregation == "token" else counts.sequences,
        ),
    }
    own |= {name: part[name] for name in ("weights", "reference") if name in part.keys()}
    terms = config.terms
    scores = sequence_log_probs(
        model,
        part,
        temperature=config.temperature,
        vocab_size=vocab_size,
        entropy=True,
        share_prefixes=config.share_prefixes,
        loss=terms.of(own) if terms.by_token else None,
        teacher=None if taught is None else taught.some(part["teacher_state"][mask]),
        direction="forward" if config.divergence == "forward" else "reverse",
    )
    streams.add(part, scores, counts)
    loss, metrics = terms(TokenScores(scores.log_probs, scores.entropy, scores.divergence), own, mask)
    return (scores.loss if terms.by_token else loss), metrics


def needed(view: TensorDictBase, config: GRPOConfig) -> torch.Tensor | None:
    """The sequences that something is to be learned from, bool (N,): all, if a term beside the advantage asks for it."""
    every = config.kl or config.entropy or (config.teacher and config.divergence != "sampled")
    return None if every else (view["advantage"] != 0).flatten(1).any(-1)


def average(batches: list[TensorDictBase], key: str) -> float:
    """The mean over all conversations."""
    return float(torch.cat([batch[key].float().flatten() for batch in batches]).mean())


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Collect, score, learn, repeat.

    Args:
        arguments: the words of the command line; those of this process if ``None``.
        prog: what the help calls the command.

    Raises:
        SystemExit: a word of the command line is wrong; or, with the code 130, behind Ctrl-C.
    """
    config = parse(GRPOConfig, __doc__, defaults, arguments, prog)
    overlong = OverlongPenalty(config.max_new_tokens, config.overlong) if config.overlong else None
    torch.manual_seed(config.seed)
    model, tokenizer = make_model(config)
    env = make_env(config, tokenizer, config.prompts, config.group_size, seed=config.seed)
    judge = make_env(config, tokenizer, config.eval, 1, seed=config.seed + 10_000)
    optimizer = make_optimizer(config, model)
    policy, sync = make_policy(config, model, tokenizer)
    run = Run(
        config, "grpo", model=model, tokenizer=tokenizer, state={"optimizer": optimizer, "env": env, "judge": judge}
    )
    if not run.resumed:
        warm_start(config, model, optimizer, tokenizer)
    sync()
    reference = run.reference() if config.kl else None
    teacher = None if config.teacher is None else make_teacher(config, tokenizer)
    vocab_size = policy.codec.vocab_size
    scoring = {
        "vocab_size": vocab_size,
        "temperature": config.temperature,
        "max_tokens": config.max_tokens,
        "share_prefixes": config.share_prefixes,
    }

    for step in run.steps(lambda: ask(judge, policy, config)):
        set_rate(optimizer, config.rate(step))

        # 1. Answers: each conversation to its end, the prompt of a turn being the very tokens of the turns before it.
        with run.sampling():
            finished, trained = collect(env, policy, config)

        metrics = {
            "reward": average(finished, "reward"),
            "pass_rate": average(finished, "success"),
            "groups": float(trained.sum()),
        }
        if not ranks.total(trained.sum()):  # dynamic sampling found nothing to compare
            run.log(metrics, finished=finished)
            continue

        # 2. One sequence an episode, with a mask on what the policy sampled and the log-probs it was sampled with.
        view = training_view(finished, layout="padded", group=config.group_size)
        view = view[trained[view["group"].clamp(min=0)]]  # -1 has nothing to train, wherever it stands
        if reference is not None:
            with gathered(reference.model), reference.scoring() as before:
                view["reference"] = sequence_log_probs(before, view, **scoring).log_probs

        # 3. How much better than its group each answer is.
        mask = view["masks"].all_assistant_mask
        if overlong is not None:
            punished = [overlong(Episode.of("", length=length)).score for length in longest_answers(mask).tolist()]
            view["reward"] = view["reward"] + torch.tensor(punished).reshape(view["reward"].shape)
        # What could not be graded is in no group, and says nothing of the others.
        view["advantage"] = group_advantages(
            view,
            normalize=None if config.normalize == "none" else config.normalize,
            leave_one_out=config.leave_one_out,
        )

        if teacher is not None:
            view["advantage"] = config.reward_weight * view["advantage"].reshape(-1, 1).expand_as(mask)
        if teacher is not None and config.divergence == "sampled":
            with gathered(teacher), torch.no_grad():
                view["taught"] = sequence_log_probs(teacher, view, **scoring).log_probs
            token = distillation_advantages(view["taught"], view["log_probs"].full, mask)
            apart, tokens = ranks.total(torch.stack((-token[mask].sum(), mask.sum())).double().cpu()).tolist()
            metrics["kl_teacher"] = apart / max(1.0, tokens)
            view["advantage"] = view["advantage"] + config.distill * token

        # 4. Learn, and give what samples the new weights.
        learned = view.to(model.device)
        if config.correction != "none":
            metrics |= corrected(model, learned, config, **scoring)
        taught, streams = None, Streams()
        if teacher is not None and config.divergence != "sampled":
            with run.timed("learning"):
                taught = what_is_taught(teacher, learned, config)
        with run.timed("learning"), gathered_head(teacher):
            metrics |= learn(
                optimizer,
                learned.select(*_LEARNED, strict=False),
                functools.partial(
                    loss_of, model, config=config, vocab_size=vocab_size, streams=streams, taught=taught
                ),
                needed=needed(learned, config),
                model=model,
                **config.learning,
            )
        sync()
        run.log(streams.mismatch() | metrics, finished=finished, trained=view, streams=streams)
