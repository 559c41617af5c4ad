"""Random answers as a policy might sample them, and the law on what it reads next."""

from __future__ import annotations

import random

import torch
from conftest import while_of_one_template
from hypothesis import strategies as st

from torchrl_chat import columns

LOOKALIKES = ["<|im_end|>", "<|im_start|>user\n", "</s>", "[INST]", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<s>"]
edges = st.sampled_from(["", " ", "\n", "\n\n  ", "\t"])
words = st.one_of(
    st.text(min_size=1, max_size=12),
    st.sampled_from(["yes", "42", "1,234.56", "naïve café — 北京 🎉🎉", "def f(x):\n    return x**2", *LOOKALIKES]),
)
contents = st.builds(
    lambda left, body, right: left + " ".join(body) + right, edges, st.lists(words, min_size=1, max_size=4), edges
)


@while_of_one_template
def vocab_of(tokenizer) -> dict[str, int]:
    return tokenizer.get_vocab()


def sample(tokenizer, stop: int, text: str, ended: bool, seed: int) -> list[int]:
    """Ids that a policy might have sampled for a text: not the tokenizer's own choice of tokens."""
    draw = random.Random(seed)
    vocab, specials = vocab_of(tokenizer), set(tokenizer.all_special_ids)
    ids = []
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        piece = tokenizer.convert_ids_to_tokens(token)
        cuts = [k for k in range(1, len(piece)) if piece[:k] in vocab and piece[k:] in vocab]
        if token in specials:  # a look-alike: what a policy really samples as text
            continue
        if cuts and draw.random() < 0.5:
            k = draw.choice(cuts)
            ids += [vocab[piece[:k]], vocab[piece[k:]]]
        else:
            ids.append(token)
    if draw.random() < 0.3 or not ids:
        any_id = (draw.randrange(len(tokenizer)) for _ in range(30))
        ids += [i for i in any_id if i not in specials][:3]
    return [*ids, stop] if ended else ids


def check(td, prompts, ids, scores, sampled_before) -> None:
    """The three clauses of the law, on the TensorDict that the policy reads next."""
    tokens = columns.read_field(td["tokens"], "prompt", td.batch_size)
    masks = columns.read_field(td["masks"], "all_assistant_mask", td.batch_size)
    log_probs = columns.read_field(td["log_probs"], "prompt", td.batch_size)
    for i, (prompt, row) in enumerate(zip(prompts, ids, strict=True)):
        start, end = len(prompt), len(prompt) + len(row)
        assert tokens[i][:start].tolist() == prompt.tolist()
        assert tokens[i][start:end].tolist() == row.tolist()
        assert len(tokens[i]) == len(masks[i]) == len(log_probs[i])
        assert int(masks[i].sum()) == sampled_before[i] + len(row)
        assert masks[i][start:end].all()
        assert not masks[i][end:].any()
        assert torch.equal(log_probs[i][start:end], scores[i])
        assert not log_probs[i][~masks[i]].any()
