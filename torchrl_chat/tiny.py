"""A tokenizer, a model and a task that fit in a minute of CPU time, made on the spot: nothing is downloaded.

A policy of a few tens of thousands of weights learns from scratch by reinforcement only if a random
answer is right now and then, so the vocabulary has one token a character and few characters.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

TINY_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""A chat template as small as they come: one special token opens a message, one closes it."""

TINY_TOOL_TEMPLATE = (
    "{% if tools %}<|system|>Tools: {{ tools | tojson }}<|end|>{% endif %}"
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}<tool_call>\n"
    "{\"name\": \"{{ call['function']['name'] }}\", \"arguments\": {{ call['function']['arguments'] | tojson }}}"
    "\n</tool_call>{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""The same with tools, whose calls are spelled as Qwen's models spell them."""

_SPECIAL = ("<|pad|>", "<|unk|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
DIGIT_ALPHABET = "0123456789last(,)= "
TOOL_ALPHABET = "0123456789 \nadmulsbpythonri()*+-`"
TEXT_ALPHABET = "\n\t" + "".join(map(chr, range(32, 127)))


def tiny_tokenizer(alphabet: str = DIGIT_ALPHABET, *, tools: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer with one token a character, a few special tokens and :data:`TINY_TEMPLATE`.

    Args:
        alphabet: the characters that it knows; others become ``<|unk|>``.

    Keyword Args:
        tools: whether its template is :data:`TINY_TOOL_TEMPLATE`, which writes tools and their calls; it needs an alphabet that can
            spell them, such as :data:`TEXT_ALPHABET`.

    Example:
        >>> ask = [{"role": "user", "content": "6 * 7?"}]
        >>> tiny_tokenizer(TEXT_ALPHABET, tools=True).apply_chat_template(ask, tokenize=False)
        '<|user|>6 * 7?<|end|>'
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate((*_SPECIAL, *dict.fromkeys(alphabet)))}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<|unk|>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(list(_SPECIAL))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TINY_TOOL_TEMPLATE if tools else TINY_TEMPLATE
    return tokenizer


def tiny_model(vocab_size: int, *, hidden: int = 64, layers: int = 2, context: int = 512, seed: int = 0) -> Any:
    """A causal language model of the Llama architecture with random weights, in float32 on the CPU."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=context,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def last_digit_rows(count: int = 2048, seed: int = 0) -> Dataset:
    """Requests for the last of two digits, such as ``{"query": "last(3,7)=", "answer": "7"}``.

    Args:
        count: the number of rows.
        seed: the same seed gives the same rows.
    """
    from datasets import Dataset

    draw = random.Random(seed)
    pairs = [(draw.randint(0, 9), draw.randint(0, 9)) for _ in range(count)]
    return Dataset.from_dict({"query": [f"last({a},{b})=" for a, b in pairs], "answer": [str(b) for _, b in pairs]})


def sum_rows(count: int = 2048, seed: int = 0) -> list[dict[str, str]]:
    """Sums as one asks for them, such as ``{"query": "What is 6+8?", "answer": "14"}``, for a model that can read.

    Args:
        count: the number of rows.
        seed: the same seed gives the same rows.
    """
    draw = random.Random(seed)
    pairs = [(draw.randint(2, 9), draw.randint(2, 9)) for _ in range(count)]
    return [{"query": f"What is {a}+{b}?", "answer": str(a + b)} for a, b in pairs]


SIGNS = {"mul": "*", "add": "+", "sub": "-"}
"""The operations of :func:`arithmetic_rows`, and how Python writes them."""


def arithmetic_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Rows such as ``{"query": "mul 3 8", "answer": "24"}``.

    Example:
        >>> sorted(arithmetic_rows(1, 0)[0])
        ['answer', 'query']
    """
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        name, a, b = draw.choice(list(SIGNS)), draw.randint(2, 9), draw.randint(2, 9)
        value = {"mul": a * b, "add": a + b, "sub": a - b}[name]
        rows.append({"query": f"{name} {a} {b}", "answer": str(value)})
    return rows
