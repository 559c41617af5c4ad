"""What may be told of an answer while it is sampled: only what the rest of it cannot change.

An engine that tells the ids as it samples them is read as it goes: reasoning and content grow at their ends, but for the last
characters, which may turn out to be the beginning of a delimiter, a call or a stop string. Calls are told when the answer is
whole. An engine that tells nothing costs nothing: its answer comes in one piece.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torchrl_chat.conversation import Transcript
from torchrl_chat.conversation.answering import prompt_end
from torchrl_chat.gateway.calls import Choice, Delta, Reply, deltas
from torchrl_chat.templates import ChatTemplate

_HELD = 32  # characters at the end that are not told yet: longer than the delimiters of reasoning and calls
_LEAST = 4  # tokens between two looks; and, where that is more, an eighth of all: looking costs in proportion to the whole answer


class Progress:
    """What was told of the choices of one exchange so far."""

    def __init__(self) -> None:
        self.told: list[Delta] = []
        self.listeners: list[Callable[[], None]] = []
        """Called whenever there is more."""
        self._said: dict[tuple[int, str], str] = {}

    def grow(self, choice: int, kind: str, text: str) -> None:
        """Tell that the reasoning or the content of a choice begins with a text, if that says more than is known."""
        known = self._said.get((choice, kind), "")
        if len(text) <= len(known) or not text.startswith(known):
            return
        self._said[choice, kind] = text
        self.told.append(Delta(choice, kind, text[len(known) :]))  # type: ignore[arg-type]
        self.ring()

    def ring(self) -> None:
        """Call all listeners."""
        for listener in self.listeners:
            listener()

    def rest(self, reply: Reply) -> list[Delta]:
        """What is still to be told, now that the answer is whole."""
        found = []
        for place, choice in enumerate(reply.choices):
            reasoning = self._left(place, "reasoning", choice.reasoning or "")
            content = self._left(place, "content", choice.content or "")
            found += deltas(place, Choice(content, reasoning, choice.calls))
        return found

    def _left(self, choice: int, kind: str, text: str) -> str:
        known = self._said.get((choice, kind), "")
        return text[len(known) :] if text.startswith(known) else ""


class Teller:
    """Reads one choice as it is sampled; called with the ids so far.

    Args:
        progress: where what is sure is told.
        choice: which one.
        template: the chat template.
        prompt: the ledger up to the prompt.
        stops: strings that end the answer.
    """

    def __init__(
        self, progress: Progress, choice: int, template: ChatTemplate, prompt: Transcript, stops: Sequence[str]
    ):
        self._progress, self._choice, self._template = progress, choice, template
        self._ends: list[list[int]] | None
        self._prompt, self._ends = prompt, None  # most engines tell nothing, and then nothing is looked at
        self._stops = [stop for stop in stops if stop]
        self._held = max([_HELD, *map(len, stops)])
        self._next = _LEAST

    def __call__(self, ids: Sequence[int]) -> None:
        """Look at the ids sampled so far, if there are enough new ones."""
        if len(ids) < self._next:
            return
        self._next = len(ids) + max(_LEAST, len(ids) // 8)
        if self._ends is None and self._template.parser.openings:
            self._ends = [prompt_end(self._prompt)]
        [parsed] = self._template.parse_batch([list(ids)], [self._prompt.course], ["length"], self._ends)
        message, tell = parsed.message, self._progress.grow
        content, reasoning = message.get("content") or "", message.get("reasoning_content") or ""
        if any(stop in content or stop in reasoning for stop in self._stops):
            return  # what is behind it will be cut off: the whole answer tells the rest
        if content.strip():
            tell(self._choice, "reasoning", reasoning)
            if not message.get("tool_calls") and not message.get("invalid_tool_calls"):
                tell(self._choice, "content", content[: -self._held].rstrip())
        else:
            tell(self._choice, "reasoning", reasoning[: -self._held])
