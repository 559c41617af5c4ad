"""Conversations of one row, played with given answers, under a template that strips earlier reasoning."""

from __future__ import annotations

import torch
from conftest import CHATML, stop_of
from tensordict import TensorDict
from torchrl.modules.llm.policies import LogProbs, Tokens

from torchrl_chat import columns

STRIPS = CHATML.replace(
    "{{ m['content'] }}",
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1].lstrip('\n') }}"
    "{% else %}{{ '<think>\n' + m['reasoning_content'] + '\n</think>\n\n' if m['reasoning_content'] else '' }}"
    "{{ m['content'] }}{% endif %}",
)


def ledger(td):
    return columns.read_objects(td["transcript"], td.batch_size)[0]


def play(env, answers, questions=None):
    """Sample the answers in turn; returns the ledger after each turn, and the sampled ids and log-probs."""
    stop = stop_of(env.template)
    td = env.reset(TensorDict(query=["hi there"], batch_size=(1,)))
    ledgers, sampled = [], []
    for k, answer in enumerate(answers):
        ids = torch.tensor([*env.template.codec.encode_continuation([answer])[0], stop])
        scores = -torch.arange(1, len(ids) + 1) / 7.0 - k
        sampled.append((ids, scores))
        td["tokens"] = columns.ragged(Tokens, "response", [ids], td.batch_size, None)
        td["log_probs"] = columns.ragged(LogProbs, "response", [scores], td.batch_size, None)
        td = env.step_mdp(env.step(td))
        td = env.append_messages(td, [(questions or ["more"] * 9)[k]])
        ledgers.append(ledger(td))
    return td, ledgers, sampled
