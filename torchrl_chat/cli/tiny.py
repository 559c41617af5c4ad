"""The tiny model is on the ground floor, :mod:`torchrl_chat.tiny`; these lines keep the name under which it was imported."""

from torchrl_chat.tiny import (
    DIGIT_ALPHABET,
    TEXT_ALPHABET,
    TINY_TEMPLATE,
    last_digit_rows,
    tiny_model,
    tiny_tokenizer,
)

__all__ = ["DIGIT_ALPHABET", "TEXT_ALPHABET", "TINY_TEMPLATE", "last_digit_rows", "tiny_model", "tiny_tokenizer"]
