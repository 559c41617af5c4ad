"""Chat templates for base models, by name: Jinja sources for tokenizers that bring none.

They use what every tokenizer has: plain words for the roles, and the end-of-sequence token as the end of an answer.
They are proved for a tokenizer as any other template is.

Law of this file: nothing is chosen unasked. A tokenizer without a chat template gets one of these by its name alone.
"""

from __future__ import annotations

from typing import Any

# What opens an answer ends in front of the blank, which nearly every vocabulary has at the start of its words.
_TURNS = (
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{{ m.content ~ BREAK }}"
    "{% elif m.role == 'assistant' %}{{ 'Assistant: ' ~ THOUGHT ~ m.content ~ (eos_token or '') ~ BREAK }}"
    "{% else %}{{ m.role|capitalize ~ ': ' ~ m.content ~ BREAK }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
_NO_THOUGHT = "''"
_THOUGHT = "('<think>' ~ m.reasoning_content ~ '</think>' if m.reasoning_content else '')"

# The template of DeepSeek-R1-Zero, word for word: arXiv:2501.12948, table 1.
_R1_ZERO = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
    "first thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning "
    "process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., "
    "<think> reasoning process here </think> <answer> answer here </answer>."
)


def _turns(line_break: str, thought: str) -> str:
    return _TURNS.replace("BREAK", f"'{line_break}'").replace("THOUGHT", thought)


NAMED: dict[str, str] = {
    "plain": _turns("\\n\\n", _NO_THOUGHT),
    "r1-zero": f"{{{{ '{_R1_ZERO}\\n' }}}}" + _turns("\\n", _THOUGHT),
}
"""``"plain"``: ``User: ...``, a blank line, ``Assistant:``. ``"r1-zero"``: the instruction of DeepSeek-R1-Zero
(arXiv:2501.12948) to think in ``<think>`` and answer in ``<answer>``, then the same on lines of their own."""


def named_template(name: str, tokenizer: Any) -> str:
    """The Jinja source of a named template for a tokenizer: with its ``bos`` in front where it puts that there itself.

    Args:
        name: a key of :data:`NAMED`.
        tokenizer: a Hugging Face tokenizer.

    Raises:
        KeyError: there is no template of that name.

    Example:
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> named_template("plain", tokenizer).count("Assistant:")
        2
    """
    source = NAMED[name]
    bos = tokenizer.bos_token_id
    begins = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    return "{{ bos_token }}" + source if begins else source
