"""Whether a response keeps a form: ``<think>...</think><answer>...</answer>``.

Environments may have parsed the reasoning out of the text, into ``message["reasoning_content"]``. What such a parsed
message cannot tell any more (whether an unfinished reasoning was closed, whether an empty one was opened) earns nothing in
a text either, so that both grade alike.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from dataclasses import dataclass
from typing import Any, ClassVar

from torchrl_chat.messages import Message, content_text
from torchrl_chat.rewards.verdict import Level, Verdict


@dataclass(frozen=True)
class FormatVerifier:
    """Right if the message is its sections and nothing else: each tag once, in order, no section blank.

    Args:
        tags: the names of the sections in order; the last one holds the answer.
        reasoning: the section that ``reasoning_content`` is the text of, where the message has that.
        opened: the prompt has opened the reasoning already, so that the text begins inside it.
        soft: score the share of tags that stand exactly once and in order, whatever is around them, instead of
            all or nothing. The opening tag of a blank section earns nothing, nor does the end of the reasoning if
            nothing follows. ``correct`` is as strict as ever.
        pattern: a regular expression that all of the text has to match, instead of tags; its group ``answer``,
            if it has one, is the answer. Grades then belong in a worker process (``isolate``).

    Raises:
        ValueError: no tags, a tag twice, the reasoning last, ``soft`` with a pattern, or a pattern that is no regular expression.

    Example:
        >>> verify = FormatVerifier()
        >>> verify({"role": "assistant", "content": "<think>2+2</think> <answer>4</answer>"})
        Verdict(score=1.0, answer='4', correct=True, parts={}, failure=None)
        >>> verify({"role": "assistant", "content": "<answer>4</answer>", "reasoning_content": "2+2"}).score
        1.0
        >>> FormatVerifier(soft=True)({"role": "assistant", "content": "It is <answer>4</answer>"}).score
        0.5
    """

    grades: ClassVar[Level] = "message"

    tags: tuple[str, ...] = ("think", "answer")
    reasoning: str = "think"
    opened: bool = False
    soft: bool = False
    pattern: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.tags, str) or not self.tags or len(set(self.tags)) < len(self.tags):
            raise ValueError(f"tags={self.tags!r}: expected distinct names, such as ('think', 'answer').")
        if not all(isinstance(tag, str) and re.fullmatch(r"[^\s<>/]+", tag) for tag in self.tags):
            raise ValueError(f"tags={self.tags!r}: expected names without brackets, 'think' for '<think>'.")
        if self.tags[-1] == self.reasoning:
            raise ValueError(
                f"tags={self.tags!r}: the last section holds the answer, but reasoning={self.reasoning!r}."
            )
        if self.pattern is None:
            return
        if self.soft:
            raise ValueError(
                "soft=True shares the score among tags; with pattern=... there are none. Give one of them."
            )
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"pattern={self.pattern!r:.80} is no regular expression: {error}.") from None

    @property
    def isolate(self) -> bool:
        """A pattern may take exponential time; tags take linear time."""
        return self.pattern is not None

    def __call__(self, message: Message, reference: Any = None) -> Verdict:
        """Grade one message; the reference is not read."""
        text = self.text(message)
        if self.pattern is not None:
            match = re.compile(self.pattern).fullmatch(text.strip())
            answer = match.groupdict().get("answer") if match else None
            return Verdict(float(match is not None), answer, match is not None)
        marks = [mark for tag in self.tags for mark in (f"<{tag}>", f"</{tag}>")]
        correct = self._strict(text, marks)
        score = self._share(text, marks) if self.soft and not correct else float(correct)
        opening, closing = marks[-2:]
        end = text.rfind(closing)
        start = text.rfind(opening, 0, end) if end >= 0 else -1
        return Verdict(score, text[start + len(opening) : end].strip() if start >= 0 else None, correct)

    def text(self, message: Message) -> str:
        """The message as the policy wrote it, its reasoning between tags."""
        text, thoughts = content_text(message), message.get("reasoning_content")
        opening, closing = f"<{self.reasoning}>", f"</{self.reasoning}>"
        if isinstance(thoughts, str):
            # An unfinished reasoning is parsed like a finished one with nothing behind it.
            return f"{opening}{thoughts}{closing}{text}" if text.strip() else f"{opening}{thoughts}"
        return opening + text if self.opened else text

    @staticmethod
    def _strict(text: str, marks: list[str]) -> bool:
        if any(text.count(mark) != 1 for mark in marks):
            return False
        at = 0
        for i, mark in enumerate(marks):
            found = text.find(mark, at)
            blank = found >= 0 and not text[at:found].strip()
            if found < 0 or blank is (i % 2 == 1):  # text inside sections, none between them
                return False
            at = found + len(mark)
        return not text[at:].strip()

    def _share(self, text: str, marks: list[str]) -> float:
        """The share of tags that stand once and in order."""
        # What a parsed message cannot tell: an opening tag of blank reasoning, and a closing one with nothing behind it.
        opening, closing = f"<{self.reasoning}>", f"</{self.reasoning}>"
        text = text.strip().removesuffix(closing)
        begun = text.removeprefix(opening).lstrip()
        text = begun if begun.startswith(closing) else text
        places = []
        for i, mark in enumerate(marks):
            at = text.find(mark)
            if at < 0 or text.find(mark, at + 1) >= 0:
                continue
            rest = text[at + len(mark) :].lstrip()
            if i % 2 == 0 and (not rest or rest.startswith(marks[i + 1])):
                continue
            places.append(at)
        tails: list[int] = []  # of the longest rising run of each length
        for at in places:
            i = bisect_left(tails, at)
            tails[i : i + 1] = [at]
        return len(tails) / len(marks)
