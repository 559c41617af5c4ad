"""What the workers of ``test_ray.py`` are made of; a module of its own, so that they can import it."""

from __future__ import annotations

import functools
import os
import signal
import time
from pathlib import Path

import ray
import torch

from torchrl_chat import GSM8KEnv, TransformersPolicy, Verdict
from torchrl_chat.playing import play
from torchrl_chat.sandbox import Sandbox
from torchrl_chat.tiny import TEXT_ALPHABET, tiny_model, tiny_tokenizer


def make_env(dataset, **options) -> GSM8KEnv:
    """GSM8K with four conversations a batch, two of each row."""
    options = {"num_envs": 4, "repeats": 2, "seed": 0, "input_mode": "tokens", "system_prompt": "s"} | options
    return GSM8KEnv(dataset=dataset, tokenizer=tiny_tokenizer(TEXT_ALPHABET), **options)


def make_policy(seed: int = 0, tokens: int = 4) -> TransformersPolicy:
    """A model of a few thousand weights, whose answers depend on the episode only."""
    tokenizer = tiny_tokenizer(TEXT_ALPHABET)
    model = tiny_model(len(tokenizer), hidden=16, layers=1, context=2048, seed=seed)
    return TransformersPolicy(model, tokenizer, max_new_tokens=tokens, seeded=True)


def play_and_sign(env, policy, seconds: float = 0.0):
    """:func:`play`, with the numbers of the process and the node that did it."""
    time.sleep(seconds)
    batch = play(env, policy)
    node = number_of(ray.get_runtime_context().get_node_id())
    batch.set("node", torch.full(batch.batch_size, node))
    batch.set("pid", torch.full(batch.batch_size, os.getpid()))
    return batch


def number_of(node: str) -> int:
    """A node's name as a number that fits into a tensor."""
    return int(node[:12], 16)


slowly = functools.partial(play_and_sign, seconds=0.3)


class WhoGrades:
    """A verifier that tells in which process it runs."""

    isolate = True
    components = ("pid",)

    def __call__(self, response: str, reference: str) -> Verdict:
        return Verdict(1.0, None, True, {"pid": float(os.getpid())})  # below 2**24: exact in float32


def ancestors(pid: int) -> set[int]:
    """The process, who started it, who started that ..."""
    found = set()
    while pid > 0:
        found.add(pid)
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:  # it has just ended
            return found
        pid = int(next(line.split()[1] for line in status.splitlines() if line.startswith("PPid:")))
    return found


def play_and_tell(env, policy):
    """:func:`play`, with whether the answers were graded by processes of this worker."""
    batch = play_and_sign(env, policy)
    graders = batch["reward_parts", "pid"].flatten().int().tolist()
    batch.set("graded_here", torch.tensor([os.getpid() in ancestors(pid) - {pid} for pid in graders]))
    return batch


def broken_env(dataset):
    """An environment that cannot be made."""
    raise OSError("no such disk")


def odd_policy(dataset_row: int):
    """A policy that fails at one row of the dataset."""
    inner = make_policy()

    def policy(td):
        if dataset_row in td["episode_row"].tolist():
            raise ArithmeticError(f"row {dataset_row}")
        return inner(td)

    return policy


def graded_env(dataset, **options) -> GSM8KEnv:
    """:func:`make_env`, graded by :class:`WhoGrades`."""
    return make_env(dataset, verifier=WhoGrades(), workers=1, **options)


def die(env, policy):
    """The end of a worker."""
    os.kill(os.getpid(), signal.SIGKILL)


def loader_env(dataset):
    """An environment over a dataloader, whose episodes come in the loader's order only."""
    rows = [{"query": [row["question"]], "answer": [row["answer"]]} for row in dataset]
    return GSM8KEnv.from_dataloader(rows, tokenizer=tiny_tokenizer(TEXT_ALPHABET), batch_size=1)


def play_in_a_box(env, policy):
    """:func:`play`, with what a sandbox of this worker says, and whether it is a child of this worker."""
    batch = play_and_sign(env, policy)
    with Sandbox("namespaces", deadline=20) as box:
        result = box.run("print(6 * 7)")
        children = {int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()}
        below = [pid for pid in children if os.getpid() in ancestors(pid)]
        batch.set("boxed", torch.full(batch.batch_size, result.stdout.strip() == "42" and len(below) > 0))
    return batch
