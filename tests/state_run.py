"""A run with a policy that is a function of what it reads: for the tests of saving, killing and going on."""

from __future__ import annotations

import json
import os
import random
import sys
import zlib
from pathlib import Path
from typing import Any

import torch
from conftest import bpe_tokenizer, respond

from torchrl_chat import (
    AddThinkingPrompt,
    Budget,
    DatasetChatEnv,
    RewardTransform,
    UserSimulator,
    columns,
)
from torchrl_chat.envs.state import load_state, save_state
from torchrl_chat.rewards.matching import RegexMatch
from torchrl_chat.seeds import EPISODE_KEYS

ROWS = [{"query": f"question {i}" + " again" * (i % 4), "answer": str(i)} for i in range(7)]


def episodes(td: Any) -> list[tuple[int, ...]]:
    """What tells each row's episode from others: seed, row, epoch, place."""
    return list(zip(*(td[key].tolist() for key in EPISODE_KEYS), strict=True))


def ledgers(td: Any) -> list[Any]:
    return columns.read_objects(td.get("transcript"), td.batch_size)


def user(messages: list[dict], seed: int | None) -> str | None:
    draw = random.Random(f"user {seed}")
    return None if draw.random() < 0.2 else "and? " * draw.randrange(1, 4) + str(draw.randrange(10))


user.seeded = True


def unsure(row: Any) -> bool:
    return zlib.crc32(row["transcript"].tokens.numpy().tobytes()) % 3 == 0 and len(row["transcript"].spans) < 3


def make(mode: str = "tokens", *, graded: bool = False, **options: Any) -> DatasetChatEnv:
    """Several turns: a user who draws, requests to think again that are drawn, limits; rewards from worker processes."""
    settings = {"dataset": ROWS, "tokenizer": bpe_tokenizer(), "input_mode": mode, "seed": 3, **options}
    env = DatasetChatEnv(**settings)
    if graded:
        env = env.append_transform(RewardTransform(RegexMatch(r"[02468]$")))
    env = env.append_transform(AddThinkingPrompt(unsure, role="user", random_prompt=True))
    env = env.append_transform(UserSimulator(user))
    return env.append_transform(Budget(max_turns=4, max_tokens=40))


def act(env: DatasetChatEnv, td: Any) -> Any:
    """Answers that depend on the conversation and its seed alone."""
    keys = [(t.tokens.numpy().tobytes(), seed) for t, (seed, *_) in zip(ledgers(td), episodes(td), strict=True)]
    draws = [random.Random(zlib.crc32(tokens) ^ seed) for tokens, seed in keys]
    return respond(
        env, td, [" ".join(str(draw.randrange(100)) for _ in range(draw.randrange(1, 5))) for draw in draws]
    )


def shown(transcript: Any) -> list[Any]:
    """All of a ledger, comparable."""
    parts = [(b.tokens.tolist(), b.mask.tolist(), b.log_probs.tolist()) for b in transcript.sequences]
    return [parts, [dict(message) for message in transcript.messages], transcript.ended]


def advance(env: DatasetChatEnv, td: Any) -> tuple[Any, list[tuple[tuple[int, ...], Any]]]:
    """One step: the next root, and the episodes that it finished, each with its ledger."""
    stepped, following = env.step_and_maybe_reset(act(env, td))
    over = stepped["next", "done"].flatten().tolist()
    pairs = zip(episodes(stepped), ledgers(stepped["next"]), over, strict=True)
    return following, [(episode, shown(transcript)) for episode, transcript, done in pairs if done]


def run(folder: Path, steps: int, **options: Any) -> None:
    """Play ``steps`` steps in all, going on from the state in ``folder``, which is written after each.

    What an episode would be trained on is part of the state, as the weights would be; ``journal`` has what was done beside
    it, also what a kill made undone.
    """
    path = folder / "state.pt"
    env = make(**options)
    if path.exists():
        state = load_state(path)
        env.load_state_dict(state["env"])
        step, td, trained = state["step"], state["td"], state["trained"]
    else:
        step, td, trained = 0, env.reset(), []
    with open(folder / "journal", "a") as journal:
        while step < steps:
            td, finished = advance(env, td)
            step += 1
            trained = [*trained, *finished]
            journal.write("\n" + json.dumps([step, finished]) + "\n")  # behind a line that a kill has cut
            journal.flush()
            save_state(path, {"env": env.state_dict(), "td": td, "step": step, "trained": trained})


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), int(sys.argv[2]), **json.loads(sys.argv[3]))
    os._exit(0)  # without waiting for anybody's threads
