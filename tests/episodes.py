"""Multi-turn, ragged, tool-using episodes of a tiny model, and what must hold of them whatever the policy was."""

from __future__ import annotations

import functools

import torch
from tensordict import TensorDict, lazy_stack
from torchrl.data import LazyStackStorage, ReplayBuffer
from torchrl.objectives.llm.grpo import GRPOLoss

from torchrl_chat import ChatEnv, Toolbox, ToolExecutor, columns, training_view
from torchrl_chat.tiny import TEXT_ALPHABET, tiny_model, tiny_tokenizer

ROWS = 64
# One token of the tokenizer is a whole call, so that a model with random weights calls the tool now and then.
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 20, "b": 22}}\n</tool_call>'
TEMPLATE = (
    "{% if tools %}<|system|>{% for t in tools %}{{ t.function.name }}{% endfor %}<|end|>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def add(a: int, b: int) -> int:
    """Adds.

    Args:
        a: one number.
        b: another.
    """
    return a + b


@functools.cache
def tokenizer():
    made = tiny_tokenizer(TEXT_ALPHABET)
    made.add_tokens([CALL])
    made.chat_template = TEMPLATE
    return made


def model(seed: int = 0, extra: int = 0):
    """A tiny model; ``extra`` rows of its embedding are beyond the vocabulary."""
    return tiny_model(len(tokenizer()) + extra, hidden=128, context=1024, seed=seed)


def environment(mode: str, rows: int = ROWS, device=None):
    toolbox = Toolbox([add])
    env = ChatEnv(
        input_mode=mode,
        tokenizer=tokenizer(),
        batch_size=(rows,),
        template_kwargs={"tools": toolbox.schemas},
        device=device,
    )
    return env.append_transform(ToolExecutor(toolbox))


def first(env):
    rows = env.batch_size[0]
    queries = [f"row {i}: what is {'1 + ' * (i % 7)}2?" for i in range(rows)]
    seeds = torch.arange(rows) * 7 + 3
    return env.reset(TensorDict(query=queries, episode_seed=seeds, batch_size=(rows,), device=env.device))


def play(env, policy, turns: int = 4):
    """Episodes of 1 to ``turns`` turns: rows that call the tool go on, others are asked again, or have ended."""
    td, rows = first(env), env.batch_size[0]
    going = [True] * rows
    count = [0] * rows
    for turn in range(turns):
        td["_step"] = torch.tensor(going)
        td = env.step_mdp(env.step(policy(td)))
        td = td.exclude("_step")
        transcripts = columns.read_objects(td["transcript"], td.batch_size)
        asked = [None] * rows
        for i, transcript in enumerate(transcripts):
            count[i] += going[i]
            if going[i] and transcript.ended is not None and turn < turns - 1:
                going[i] = (i + turn) % 3 != 0
                asked[i] = f"and {i}?" if going[i] else None
            elif transcript.ended is not None:
                going[i] = False
        td = env.base_env.append_messages(td, asked)
    return td, count


def check(td, count, model, temperature: float = 1.0) -> float:
    """The largest difference between carried log-probs and those of one forward pass over the final sequence."""
    transcripts = columns.read_objects(td["transcript"], td.batch_size)
    worst, tools = 0.0, 0
    for transcript, turns in zip(transcripts, count, strict=True):
        assert transcript.scored
        assert sum(m["role"] == "assistant" for m in transcript.messages) == turns
        tools += any(m["role"] == "tool" for m in transcript.messages)
        ids = transcript.tokens
        with torch.no_grad():
            found = model(input_ids=ids[None].to(model.device)).logits.cpu()
        logits = found[0, :-1, : len(tokenizer())].float() / temperature
        expected = logits.log_softmax(-1).gather(-1, ids[1:, None]).squeeze(-1)
        mask = transcript.mask[1:]
        worst = max(worst, float((transcript.log_probs[1:] - expected)[mask].abs().max()))
    assert len({len(t) for t in transcripts}) > 10, "rows of many lengths"
    assert len(set(count)) > 2, "rows of many numbers of turns"
    assert tools > 3, "rows that used the tool"
    return worst


def losses(td, actor):
    """``GRPOLoss`` over the whole episodes, through a replay buffer."""
    view = training_view(td).select("tokens", "masks", "log_probs")
    view["advantage"] = torch.randn(len(view), 1, 1, generator=torch.Generator().manual_seed(0))
    buffer = ReplayBuffer(storage=LazyStackStorage(len(view)), batch_size=len(view))
    buffer.extend(lazy_stack(list(view.unbind(0))))
    return GRPOLoss(actor, masking_strategy="rlhf")(buffer.sample())


def one_step(td, actor) -> None:
    """One optimizer step, large enough to be seen in every log-prob."""
    optimizer = torch.optim.SGD(actor.model.parameters(), lr=0.5)
    losses(td, actor).loss_objective.backward()
    optimizer.step()
    optimizer.zero_grad()
