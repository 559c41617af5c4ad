"""Environments with a simulated user, stepped with given answers."""

from __future__ import annotations

from typing import Any

import torch
from conftest import bpe_tokenizer
from tensordict import TensorDict
from torchrl.modules.llm.policies import Tokens

from torchrl_chat import ChatEnv, columns
from torchrl_chat.transforms.user import UserSimulator


def env_of(mode: str, size: int | tuple[int, ...], *args: Any, tokenizer: Any = None, **kwargs: Any):
    batch = (size,) if isinstance(size, int) else size
    env = ChatEnv(tokenizer=tokenizer or bpe_tokenizer(), input_mode=mode, batch_size=batch)
    return env.append_transform(UserSimulator(*args, **kwargs))


def begin(env, **more: Any):
    rows = env.batch_size.numel()
    td = TensorDict(batch_size=env.batch_size)
    for key, values in {"query": [f"question {i}" for i in range(rows)], **more}.items():
        td.set(key, columns.objects(values, env.batch_size, None))
    return env.reset(td)


def respond(env, td, texts: list[str]):
    """Step with these answers, in the form of the environment's input mode."""
    td, batch, base = td.copy(), env.batch_size, env.base_env
    stop = base.tokenizer.eos_token
    if base.input_mode == "text":
        td["text"] = columns.texts("response", [t + stop for t in texts], batch, None)
    elif base.input_mode == "history":
        rows = [columns.history_messages([{"role": "assistant", "content": t}]) for t in texts]
        td["history"] = columns.histories("response", rows, batch, None)
    else:
        ids = [torch.tensor(i) for i in base.template.codec.encode([t + stop for t in texts])]
        td["tokens"] = columns.ragged(Tokens, "response", ids, batch, None)
    return env.step(td)


def dialogue(env, td, answers: list[list[str]]):
    """Several turns; rows that are done are not stepped. The last step's ``next``, whole."""
    going = torch.ones(env.batch_size, dtype=torch.bool)
    for turn, texts in enumerate(answers):
        if turn:
            td = env.step_mdp(td)
            going = going & ~td["done"].flatten(-1).reshape(env.batch_size)
            if not going.all():
                td["_step"] = going[..., None]
        td = respond(env, td, texts)
    return td["next"]


def ledgers(td):
    return columns.read_objects(td["transcript"], td.batch_size)


def said(td) -> list[list[str]]:
    return [[m["content"] for m in ledger.messages] for ledger in ledgers(td)]


def flags(td, key: str) -> list[bool]:
    return td[key].flatten().tolist()
