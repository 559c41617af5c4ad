"""Answers that are cut and turns that are begun, for a whole batch of a TensorDict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tensordict import TensorDictBase

from torchrl_chat import columns
from torchrl_chat.conversation import answer_text, begin, edit
from torchrl_chat.templates import ChatTemplate, ChatTemplateError


class Editing:
    """Mix-in for :class:`~torchrl_chat.ChatEnv`: answers that are cut, and turns that are begun, for a whole batch."""

    template: ChatTemplate | None
    _transcripts: Any
    _observe: Any

    def edit_answers(
        self,
        tensordict: TensorDictBase,
        edits: Sequence[tuple[int, str] | None],
        errors: dict[int, ChatTemplateError] | None = None,
    ) -> TensorDictBase:
        """Cut answers at a position of their text and put words there; the policy goes on behind them, in the same turn.

        Each is a branch: what was sampled is trained in the sequence that is left, what follows in the new one.

        Args:
            tensordict: an observation whose rows end with an answer, as for :meth:`append_messages`.
            edits: for each row ``(position, words)``, the position in :meth:`answer_texts`; or ``None``.
            errors: takes the errors of rows that cannot be continued so, by row; those are left as they are.

        Returns:
            A shallow copy of the TensorDict with the new prompts.
        """
        return self._changed(tensordict, edits, lambda transcript, t, change: edit(transcript, t, *change), errors)

    def begin_answers(
        self,
        tensordict: TensorDictBase,
        words: Sequence[str | None],
        errors: dict[int, ChatTemplateError] | None = None,
    ) -> TensorDictBase:
        """Open a further turn of the policy with words that it did not sample; it goes on behind them.

        Args:
            tensordict: an observation whose rows end with an answer, as for :meth:`append_messages`.
            words: what the turn begins with, for each row; or ``None``.
            errors: takes the errors of rows that cannot be continued so, by row; those are left as they are.

        Returns:
            A shallow copy of the TensorDict with the new prompts.

        Raises:
            BridgeError: without ``errors``: the chat template has no turn of the policy behind one of its own.
        """
        return self._changed(tensordict, words, begin, errors)

    def answer_texts(self, tensordict: TensorDictBase) -> list[str | None]:
        """The text of each row's last answer, without the token that ended it; ``None`` where the policy is to answer."""
        template = self._tokenized("answer_texts")
        return [
            None if transcript.ended is None else answer_text(transcript, template)
            for transcript in self._transcripts(tensordict)
        ]

    def _changed(
        self,
        tensordict: TensorDictBase,
        changes: Sequence[Any],
        change: Any,
        errors: dict[int, ChatTemplateError] | None,
    ) -> TensorDictBase:
        template, transcripts = self._tokenized("editing answers"), self._transcripts(tensordict)
        if len(changes) != len(transcripts):
            raise ValueError(f"there are {len(changes)} entries for {len(transcripts)} rows.")
        changed = list(transcripts)
        for i, (transcript, wanted) in enumerate(zip(transcripts, changes, strict=True)):
            if wanted is None:
                continue
            try:
                changed[i] = change(transcript, template, wanted)
            except ChatTemplateError as error:
                if errors is None:
                    raise
                errors[i] = error
        return columns.replaced(tensordict, self._observe(changed))

    def _tokenized(self, what: str) -> ChatTemplate:
        if self.template is None:
            raise ValueError(f"{what} needs a tokenizer: ChatEnv(tokenizer=...).")
        return self.template
