"""Graded conversations of several turns, ledgers with random ids, and views of them side by side."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torchrl.envs import StepCounter

from torchrl_chat import (
    DatasetChatEnv,
    NumberVerifier,
    RewardTransform,
    Transcript,
    UserSimulator,
    columns,
)
from torchrl_chat.tiny import last_digit_rows, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
ROWS = last_digit_rows(64)


def make_env(mode: str, rows: int, turns: int = 3, group: int = 1):
    """Conversations of at most ``turns`` turns of different lengths, graded at every turn."""
    env = DatasetChatEnv(
        dataset=ROWS, tokenizer=TOKENIZER, num_envs=rows // group, repeats=group, group_repeats=group > 1,
        input_mode=mode, seed=0,
    )  # fmt: skip
    env = env.append_transform(RewardTransform(NumberVerifier(), end_on_answer=False, when="turn"))
    env = env.append_transform(UserSimulator(lambda messages: "last(4,2)=" if len(messages) % 4 else "="))
    return env.append_transform(StepCounter(max_steps=turns))


def dense(view, key):
    """One field of a padded view, or of a ragged one as if it were padded on the right."""
    container, field = key
    rows = columns.read_field(view[container], field, view.batch_size)
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def transcripts(n: int, turns: int, seed: int = 0, longest: int = 9):
    """Ledgers with random ids, lengths and log-probs."""
    draw = torch.Generator().manual_seed(seed)

    def size() -> int:
        return int(torch.randint(1, longest, (), generator=draw))

    found = []
    for _ in range(n):
        t = Transcript.start(
            torch.randint(5, 20, (size(),), generator=draw).tolist(), ({"role": "user", "content": "?"},)
        )
        for _ in range(turns):
            count = size()
            ids, log_probs = torch.randint(5, 20, (count,), generator=draw), -torch.rand(count, generator=draw)
            t = t.sampled(ids, log_probs, {"role": "assistant", "content": "!"}, ended=True, close=[2])
        found.append(t)
    return found


def batch_of(ledgers, **others):
    batch = torch.Size([len(ledgers)])
    return TensorDict({"transcript": columns.objects(ledgers, batch, None), **others}, batch_size=batch)
