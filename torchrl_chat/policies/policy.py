"""What a policy is: a function from prompts to turns, and on it a thin face that reads and writes TensorDicts.

Law of this file: what goes wrong in one row costs that row. It is left as it is, with the reason beside it, so that nothing
that no policy sampled enters a ledger, and the other rows go on.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase

from torchrl_chat import columns, telemetry
from torchrl_chat.conversation import Turn
from torchrl_chat.conversation.turn import Errors
from torchrl_chat.endpoint import failure
from torchrl_chat.messages import Message
from torchrl_chat.policies.writing import Prompts, asked, read_prompts, read_seeds, write_answers
from torchrl_chat.templates import ChatTemplate


@dataclasses.dataclass(frozen=True, slots=True)
class Prompt:
    """What a policy is asked in one row: the ids of a conversation, its messages, or both.

    Raises:
        ValueError: there are neither.

    Example:
        >>> from torchrl_chat import ChatTemplate, Transcript
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> messages = [{"role": "user", "content": "2 + 2?"}]
        >>> transcript = Transcript.start(ChatTemplate(tokenizer).render(messages), messages)
        >>> prompt = Prompt(ids=transcript.tokens, messages=transcript.messages, limit=64)
    """

    ids: torch.Tensor | None = None
    """int64 (P,), on any device."""
    messages: Sequence[Message] | None = None
    """Read by policies that send messages; without ids, others render them with the tokenizer's own template."""
    limit: int | None = None
    """How many tokens may be sampled; ``None``: as many as the policy's own settings allow."""
    seed: int | None = None
    """Sample from this seed, whatever the other rows are. Of the prompts of one call, all have one or none."""

    def __post_init__(self) -> None:
        if self.ids is None and self.messages is None:
            raise ValueError("a prompt has ids, messages or both, and this one has neither.")

    @classmethod
    def of(cls, given: Prompt | torch.Tensor | Sequence[int] | Sequence[Message]) -> Prompt:
        """The prompt of ids, or of messages; a prompt itself."""
        if isinstance(given, Prompt):
            return given
        if not isinstance(given, torch.Tensor) and given and isinstance(given[0], Mapping):
            return cls(messages=given)  # type: ignore[arg-type]
        return cls(ids=torch.as_tensor(given, dtype=torch.int64))


class Policy(TensorDictModuleBase):
    """A policy: :meth:`sample`, which knows neither TensorDicts nor torchrl, and :meth:`forward`, its face.

    Whoever writes one gives it a ``tokenizer``, the ``codec`` of that (``None`` for a policy that says texts), ``stop_ids``, and
    either ``generate(prompts, limits, seeds)``, which returns the sampled ids of each row and their log-probs, or ``_sample``,
    which returns the turn of each prompt, or the exception that it cost.
    """

    tokenizer: Any
    codec: Any
    stop_ids: frozenset[int]
    max_new_tokens: Any
    generate: Any
    seeded: bool = False
    tells: bool = False
    """Whether :meth:`sample` tells of tokens as they are sampled: ``_sample`` takes ``told``, too."""

    # ------------------------------------------------------------------ values
    def sample(
        self,
        prompts: Sequence[Prompt | torch.Tensor | Sequence[int] | Sequence[Message]],
        errors: Errors | None = None,
        told: Callable[[Mapping[int, Sequence[int]]], Collection[int]] | None = None,
    ) -> list[Turn]:
        """What the policy does in each conversation.

        Args:
            prompts: a :class:`Prompt` each, or its ids, or its messages.
            errors: takes what is wrong with single rows, by row; rows that stand in it already are left out.
            told: of a policy that :attr:`tells`: is called behind each token, in this thread, with the ids that each row has sampled so
                far (lists that grow: who keeps one copies it), and returns the rows that are to sample no more. Others never call it.

        Returns:
            a turn a prompt, with the sampled ids, stop id included, their log-probs where they are known, the text and the
            reason why it ended. One that may sample nothing has no ids; nor has that of a row with an error.
            :func:`~torchrl_chat.conversation.answer` enters them, and takes the same ``errors``.

        Raises:
            Exception: without ``errors``: what is wrong with the first such row.
            ValueError: some prompts have a seed and others none.

        Example:
            >>> from torchrl_chat import TransformersPolicy
            >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_model, tiny_tokenizer
            >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
            >>> policy = TransformersPolicy(tiny_model(len(tokenizer)), tokenizer, max_new_tokens=4)
            >>> [turn] = policy.sample([[{"role": "user", "content": "2 + 2?"}]])
            >>> 1 <= len(turn.ids) <= 4, turn.ids.dtype, turn.log_probs.shape == turn.ids.shape
            (True, torch.int64, True)
        """
        rows = [Prompt.of(given) for given in prompts]
        if len({row.seed is None for row in rows}) > 1:
            raise ValueError("some prompts have a seed and others none: give one to all of them.")
        turns = [Turn(torch.empty(0, dtype=torch.int64), torch.empty(0), "", "length", row.limit) for row in rows]
        found: Errors = {} if errors is None else errors
        places = [i for i, row in enumerate(rows) if i not in found and (row.limit is None or row.limit > 0)]
        sample: Callable[..., Sequence[Turn | Exception]] = self._sample
        if told is not None and self.tells:
            tell = told
            sample = functools.partial(
                sample, told=lambda so_far: _places(places, tell(dict(zip(places, so_far, strict=True))))
            )
        for i, turn in zip(
            places,
            self._watched(sample, [rows[i] for i in places]) if places else (),
            strict=True,
        ):
            if isinstance(turn, Turn):
                turns[i] = turn
            else:
                found[i] = turn
        if errors is None and found:
            raise found[min(found)]
        return turns

    def _watched(
        self, sample: Callable[[Sequence[Prompt]], Sequence[Turn | Exception]], prompts: Sequence[Prompt]
    ) -> Sequence[Turn | Exception]:
        """What is sampled, and where somebody watches, a span of it: a batch is one call of the model."""
        model = getattr(getattr(self, "model", None), "name_or_path", None) or getattr(self, "model", None)
        name, library = model if isinstance(model, str) else "", type(self).__module__.rpartition(".")[2]
        with telemetry.inference("text_completion", name, library) as span:
            turns = sample(prompts)
            if span:
                done = [turn for turn in turns if isinstance(turn, Turn)]
                ids = [prompt.ids for prompt in prompts if prompt.ids is not None]
                span.set(
                    {"torchrl_chat.batch.size": len(turns), "torchrl_chat.batch.failed": len(turns) - len(done)}
                )
                asked = sum(map(len, ids)) if len(ids) == len(prompts) else None
                sampled = sum(len(turn.ids) for turn in done if turn.ids is not None)
                span.set(telemetry.used(asked, sampled, [turn.finish_reason for turn in done]))
        return turns

    def _sample(self, prompts: Sequence[Prompt]) -> Sequence[Turn | Exception]:
        limits = [self.max_new_tokens if prompt.limit is None else prompt.limit for prompt in prompts]
        seeds = [prompt.seed for prompt in prompts if prompt.seed is not None]
        return self._turns(prompts, *self.generate(self._ids(prompts), limits, seeds or None))

    def _ids(self, prompts: Sequence[Prompt]) -> list[torch.Tensor]:
        """The ids of each prompt."""
        if all(prompt.ids is not None for prompt in prompts):
            return [prompt.ids for prompt in prompts if prompt.ids is not None]
        template = getattr(self, "template", None) or ChatTemplate(self.tokenizer)
        return [
            torch.tensor(template.render(prompt.messages or ())) if prompt.ids is None else prompt.ids
            for prompt in prompts
        ]

    def _turns(self, prompts: Sequence[Prompt], ids: Sequence[Any], log_probs: Sequence[Any]) -> list[Turn]:
        """The turns of what a model sampled: ids and log-probs of each row, tensors or lists."""
        rows = [torch.as_tensor(row, dtype=torch.int64).cpu() for row in ids]
        scores = [torch.as_tensor(row, dtype=torch.float32).cpu() for row in log_probs]
        lists = [row.tolist() for row in rows]
        reasons = ["stop" if row and row[-1] in self.stop_ids else "length" for row in lists]
        fields = zip(rows, scores, self.codec.decode(lists), reasons, prompts, strict=True)
        return [Turn(row, score, text, reason, prompt.limit) for row, score, text, reason, prompt in fields]

    # ------------------------------------------------------------------ the face
    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Sample an answer to every row that is to be stepped and may still sample.

        The others get what :class:`~torchrl_chat.ChatEnv` takes and puts into no ledger: an empty answer where nothing may
        be sampled, and where the row is not stepped, for which it wants a token, one stop id that is under no mask. Without any
        row to sample the model is not called.

        Raises:
            KeyError: there is no ``("tokens", "prompt")``, or, for seeded sampling, no ``"episode_seed"``.
        """
        prompts, shown = self._read(tensordict)
        places = [i for i, wanted in enumerate(asked(tensordict)) if wanted]
        errors: Errors = {}
        sampled = self.sample([prompts[i] for i in places], errors)
        turns = {i: turn for k, (i, turn) in enumerate(zip(places, sampled, strict=True)) if k not in errors}
        if shown is not None:
            shown = dataclasses.replace(shown, asked=list(turns))
        others = [i for i in range(len(prompts)) if i not in turns]
        turns |= zip(others, self._left_out([prompts[i] for i in others]), strict=True)
        failed = {places[k]: error for k, error in errors.items()}
        return self._write(tensordict, shown, [turns[i] for i in range(len(prompts))], failed)

    def _read(self, td: TensorDictBase) -> tuple[list[Prompt], Prompts | None]:
        """What each row is asked; and the columns of its ids, if that is what is to be written."""
        shown = read_prompts(td)
        count = len(shown.ids)
        seeds: Sequence[int | None] = read_seeds(td) if self.seeded else [None] * count
        limits: Sequence[int | None] = [None] * count if shown.limits is None else shown.limits
        rows = zip(shown.ids, limits, seeds, strict=True)
        return [Prompt(ids, None, limit, seed) for ids, limit, seed in rows], shown

    def _write(
        self, td: TensorDictBase, shown: Prompts | None, turns: Sequence[Turn], errors: Errors
    ) -> TensorDictBase:
        """Write a turn in every row; rows with an error are not to be stepped."""
        batch, device = td.batch_size, td.device
        texts, reasons = [turn.text or "" for turn in turns], [turn.finish_reason or "stop" for turn in turns]
        if shown is None:
            _write_texts(td, texts)
            td.set("finish_reason", columns.objects(reasons, batch, device))
        else:
            ids, scores = [turn.sampled for turn in turns], [turn.log_probs for turn in turns]
            write_answers(td, shown, ids, scores, texts, reasons)
        if any(turn.versions for turn in turns):
            td.set("weight_versions", columns.objects([turn.versions or None for turn in turns], batch, device))
        if errors:
            stays = [going and i not in errors for i, going in enumerate(columns.stepped(td))]
            td.set("_step", torch.tensor(stays, device=device).reshape(batch))
        if "policy_error" in self.out_keys:
            told = [failure(errors[i]) if i in errors else "" for i in range(len(turns))]
            td.set("policy_error", columns.objects(told, batch, device))
        return td

    def _left_out(self, prompts: Sequence[Prompt]) -> list[Turn]:
        """What stands in rows that were not sampled, and enters no ledger."""
        if self.codec is None:
            return [Turn(text=".", finish_reason="stop")] * len(prompts)
        full = [prompt.limit is not None and prompt.limit <= 0 for prompt in prompts]
        ids = [[] if nothing else [min(self.stop_ids)] for nothing in full]
        return self._turns(prompts, ids, [[0.0] * len(row) for row in ids])


def _write_texts(td: TensorDictBase, texts: Sequence[str]) -> None:
    """Write answers that are texts, into the column of an environment that has no tokens.

    Raises:
        KeyError: it has tokens only.
    """
    batch, device = td.batch_size, td.device
    if (history := td.get("history", None)) is not None:
        entries = [columns.history_messages([{"role": "assistant", "content": said}]) for said in texts]
        history = columns.shallow(history)
        history.response = columns.histories("response", entries, batch, device).response
        td.set("history", history)
    elif (text := td.get("text", None)) is not None:
        text = columns.shallow(text)
        text.response = columns.texts("response", texts, batch, device).response
        td.set("text", text)
    else:
        raise KeyError(
            "the policy has no tokenizer, and the environment is in tokens mode: pass EndpointPolicy(tokenizer=...)."
        )


def _places(places: Sequence[int], ended: Collection[int]) -> list[int]:
    """Where the rows that are to end stand among those that are sampled."""
    return [k for k, i in enumerate(places) if i in ended] if ended else []
