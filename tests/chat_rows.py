"""Small batches of conversations, and what a policy with token ids writes."""

from __future__ import annotations

import torch
from conftest import bpe_tokenizer
from tensordict import TensorDict
from torchrl.modules.llm.policies import LogProbs, Tokens

from torchrl_chat import ChatEnv, columns


def make(mode: str, rows=3, **kwargs) -> ChatEnv:
    return ChatEnv(input_mode=mode, tokenizer=bpe_tokenizer(), batch_size=rows, **kwargs)


def queries(env: ChatEnv) -> TensorDict:
    texts = [f"question {'x' * i}" for i in range(env.batch_size.numel())]
    if len(env.batch_size) == 2:
        texts = [texts[i : i + env.batch_size[1]] for i in range(0, len(texts), env.batch_size[1])]
    return TensorDict(query=texts, batch_size=env.batch_size)


def respond(env: ChatEnv, td: TensorDict, texts: list[str] | None = None, ended: bool = True) -> TensorDict:
    """What a policy with token ids writes."""
    texts = texts or [f"answer {'y' * i}" for i in range(env.batch_size.numel())]
    ids = [torch.tensor(row + [env.tokenizer.eos_token_id] * ended) for row in env.template.codec.encode(texts)]
    td = td.copy()
    td["tokens"] = columns.ragged(Tokens, "response", ids, env.batch_size, env.device)
    scores = [torch.linspace(-1, 0, len(row)) for row in ids]
    td["log_probs"] = columns.ragged(LogProbs, "response", scores, env.batch_size, env.device)
    return td


def ledgers(td: TensorDict) -> list:
    return columns.read_objects(td.get("transcript"), td.batch_size)
