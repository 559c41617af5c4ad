"""``AddThinkingPrompt``: asks the policy to think again about an answer."""

from __future__ import annotations

import random
import re
import warnings
import zlib
from collections.abc import Callable
from typing import Any, Literal

import torch
from tensordict import TensorDictBase
from torchrl.envs import Transform

from torchrl_chat import columns
from torchrl_chat.seeds import turn_seeds
from torchrl_chat.transforms.home import chat_env

_ANSWER = re.compile(r"<answer>(?:(?!<answer>).)*?</answer>", re.DOTALL)


class AddThinkingPrompt(Transform):
    """Makes the policy think again where a condition holds: by a message of the user, or in the policy's own words.

    As torchrl's transform of this name, whose parameters it has, and exact: rows where the condition is false are
    untouched, it works in all input modes, and what happened to the conversation is in the ledger.

    - ``role="user"``: the prompt is a message of the user, an extension of the sequence.
    - ``role="assistant", edit_last_turn=True``: the last ``<answer>...</answer>`` of the answer (or nothing, if there is
      none) is cut off, the prompt stands in its place, and the policy goes on behind it in the same turn. The past has
      changed, so this is a *branch*: what was sampled is trained in the sequence that is left, what follows in the
      new one; see :func:`~torchrl_chat.training_view`.
    - ``role="assistant", edit_last_turn=False``: the prompt begins a further turn of the policy, an extension; templates
      that have no two turns of the policy in a row refuse it.

    The prompt is never under the mask.

    Args:
        cond: gets the row's TensorDict (what ``step`` wrote under ``"next"``) and says whether to ask.
        prompt: what is said; a default if ``None``.
        random_prompt: whether one of several prompts is drawn: from ``seed``, the episode's seed (``"episode_seed"``, which
            a :class:`~torchrl_chat.DatasetChatEnv` writes) and the turn; in other environments from ``seed`` and the
            conversation, so that the same conversation gets the same prompt.
        role: who says it.
        edit_last_turn: see above. Defaults to ``True`` with ``role="assistant"``.
        zero_reward: whether the row's reward becomes 0. Defaults to ``edit_last_turn``.
        undo_done: whether the row goes on, if it was done.
        egocentric: whether the default prompts are in the first person. Defaults to ``role == "assistant"``.
        seed: for ``random_prompt``.

    Raises:
        ValueError: ``edit_last_turn`` with ``role="user"``, or another role.
        BridgeError: at the step: the chat template cannot be continued so. Where that is true of some rows only, those
            stay as they are, and a warning says so.

    Example:
        >>> from torchrl_chat import ChatEnv
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> env = ChatEnv(tokenizer=tokenizer, input_mode="tokens", batch_size=(1,))
        >>> env = env.append_transform(AddThinkingPrompt(lambda row: True, role="user"))
    """

    FIRST_PERSON = (
        "But wait, I should think about this again, step by step.",
        "Hold on, let me check that once more.",
        "Actually, I am not sure of this. Let me go through it again.",
        "Before I answer, let me look for a mistake in what I did.",
    )
    SECOND_PERSON = (
        "Think about this again, step by step.",
        "Hold on, check that once more.",
        "Are you sure of this? Go through it again.",
        "Look for a mistake in what you did, then answer again.",
    )

    def __init__(
        self,
        cond: Callable[[TensorDictBase], bool],
        prompt: str | None = None,
        random_prompt: bool = False,
        role: Literal["user", "assistant"] = "assistant",
        edit_last_turn: bool | None = None,
        zero_reward: bool | None = None,
        undo_done: bool = True,
        egocentric: bool | None = None,
        seed: int = 0,
    ):
        if role not in ("user", "assistant"):
            raise ValueError(f"role={role!r}: expected 'user' or 'assistant'.")
        if edit_last_turn is None:
            edit_last_turn = role == "assistant"
        if edit_last_turn and role != "assistant":
            raise ValueError("edit_last_turn edits the assistant's turn: it needs role='assistant'.")
        super().__init__(in_keys=["transcript"], out_keys=[])
        self.cond = cond
        self.prompts = (
            self.FIRST_PERSON if (role == "assistant" if egocentric is None else egocentric) else self.SECOND_PERSON
        )
        self.prompt = self.prompts[0] if prompt is None else prompt
        self.random_prompt = random_prompt
        self.role = role
        self.edit_last_turn = edit_last_turn
        self.zero_reward = edit_last_turn if zero_reward is None else zero_reward
        self.undo_done = undo_done
        self.seed = seed

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        batch = next_tensordict.batch_size
        transcripts = columns.read_objects(next_tensordict.get("transcript"), batch)
        rows = next_tensordict.reshape(-1) if len(batch) != 1 else next_tensordict
        # A row that had nothing left to sample has no new answer to think about.
        goes = columns.stepped(tensordict)
        asked = [goes[i] and t.ended is not None and bool(self.cond(rows[i])) for i, t in enumerate(transcripts)]
        if not any(asked):
            return next_tensordict
        env = chat_env(self)
        seeds = turn_seeds(tensordict, transcripts, "thinking")
        words = [
            self._words(transcript, seed) if wanted else None
            for transcript, seed, wanted in zip(transcripts, seeds, asked, strict=True)
        ]
        errors: dict[int, Exception] = {}
        if self.role == "user":
            following = env.append_messages(next_tensordict, words, errors=errors)
        elif self.edit_last_turn:
            texts = env.answer_texts(next_tensordict)
            edits = [None if said is None else _edit(text, said) for text, said in zip(texts, words, strict=True)]
            following = env.edit_answers(next_tensordict, edits, errors)
        else:
            following = env.begin_answers(next_tensordict, words, errors)
        if errors:
            # Rows that cannot be continued are not asked; where that is all of them, the template cannot do it.
            row, error = next(iter(errors.items()))
            if len(errors) == sum(asked):
                raise error
            warnings.warn(
                f"{len(errors)} of {sum(asked)} rows cannot be asked to think again and stay as they are. The first, "
                f"row {row}: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
            asked = [wanted and i not in errors for i, wanted in enumerate(asked)]
        chosen = torch.tensor(asked, device=next_tensordict.device).reshape(batch)
        cleared = ["done", "terminated", "truncated"] if self.undo_done else []
        for key in [*cleared, "reward"] if self.zero_reward else cleared:
            if (value := following.get(key, None)) is not None:
                where = chosen.reshape(*batch, *[1] * (value.ndim - len(batch)))
                following.set(key, value.masked_fill(where, 0))
        return following

    def _words(self, transcript: Any, seed: int | None) -> str:
        if not self.random_prompt:
            return self.prompt
        if seed is None:
            seed = zlib.crc32(transcript.token_array.tobytes())
        return random.Random(f"{self.seed} {seed}").choice(self.prompts)


def _edit(text: str, words: str) -> tuple[int, str]:
    """Where an answer is cut, and what stands there."""
    last = None
    for last in _ANSWER.finditer(text):  # noqa: B007  # the last one is wanted
        pass
    at = len(text.rstrip()) if last is None else last.start()
    return at, words if last is not None else f"\n\n{words}"
