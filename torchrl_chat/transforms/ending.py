"""``EndOfDialogue``: a dialogue is over when nobody replies to what the policy has said."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torchrl.data import Composite
from torchrl.envs import StepCounter

from torchrl_chat import columns
from torchrl_chat.conversation import Transcript


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
        >>> env = DatasetChatEnv(dataset=[{"query": "Hi"}], tokenizer=tokenizer, input_mode="text")
        >>> env = env.append_transform(EndOfDialogue())
    """

    ends_alone = True

    def __init__(self) -> None:
        super().__init__(max_steps=None)

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        tensordict_reset = super()._reset(tensordict, tensordict_reset)
        if tensordict_reset.get("truncated", None) is None:
            tensordict_reset.set(
                "truncated", torch.zeros_like(tensordict_reset.get("step_count"), dtype=torch.bool)
            )
        return tensordict_reset

    def settle(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> None:
        """Truncate the rows whose conversation ends with an answer, and that nobody has ended."""
        batch = next_tensordict.batch_size
        transcripts: list[Transcript] = columns.read_objects(next_tensordict.get("transcript"), batch)
        goes = columns.stepped(tensordict)
        last = [going and t.ended is not None for t, going in zip(transcripts, goes, strict=True)]
        if not any(last):
            return
        done = next_tensordict.get("done")
        cut = torch.tensor(last, device=next_tensordict.device).reshape(done.shape) & ~done
        before = next_tensordict.get("truncated", None)
        next_tensordict.set("truncated", cut if before is None else before | cut)
        next_tensordict.set("done", done | cut)

    def transform_done_spec(self, done_spec: Composite) -> Composite:
        """The spec of ``truncated``, if no other transform has added it."""
        if "truncated" not in done_spec.keys():
            done_spec["truncated"] = done_spec["done"].clone()
        return done_spec
