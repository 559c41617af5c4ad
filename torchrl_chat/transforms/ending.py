"""``EndOfDialogue``: a dialogue is over when nobody replies to what the policy has said."""

from __future__ import annotations

from tensordict import TensorDictBase
from torchrl.envs import StepCounter

from torchrl_chat import columns
from torchrl_chat.transforms.home import flags, raise_flags


class EndOfDialogue(StepCounter):
    """Truncates a dialogue behind an answer that nobody replies to, and counts the turns as torchrl's ``StepCounter``.

    A task of one question and one answer takes one turn with it; with tools, a simulated user or a transform of yours that
    appends messages, as many turns as are replied to. Whoever replies may stand anywhere in the environment: the
    transform looks at the conversations once all of them have had their say, in environments that
    ``append_transform`` of this package made. Written, over the environment's batch size B:

    - ``"step_count"``: int64 (\\*B, 1), the turns of the episode;
    - ``("next", "truncated")`` and ``("next", "done")`` become true where the conversation ends with the policy's answer.

    Messages that are appended by hand, between two steps, come too late: limit the turns instead (``StepCounter``,
    :class:`~torchrl_chat.transforms.Budget`).

    Example:
        >>> from torchrl_chat import DatasetChatEnv
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> env = DatasetChatEnv(dataset=[{"query": "Hi"}], tokenizer=tokenizer, input_mode="text")
        >>> env = env.append_transform(EndOfDialogue())
    """

    ends_alone = True

    def __init__(self) -> None:
        super().__init__(max_steps=None)

    def settle(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> None:
        """Truncate the rows whose conversation ends with an answer, and that nobody has ended."""
        transcripts = columns.read_objects(next_tensordict.get("transcript"), next_tensordict.batch_size)
        rows = zip(transcripts, columns.stepped(tensordict), flags(next_tensordict, "done"), strict=True)
        last = [going and not done and transcript.ended is not None for transcript, going, done in rows]
        if any(last):
            raise_flags(next_tensordict, last, "truncated", "done")
