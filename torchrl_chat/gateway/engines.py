"""What samples: ids in, a turn out, one request at a time; whoever implements :class:`Engine` batches as it can.

The gateway asks for each answer by itself, as many at once as there are. A policy of this package samples batches:
:class:`~torchrl_chat.gateway.policies.PolicyEngine` puts together what waits. A server batches itself: :class:`RemoteEngine` hands it ids
and takes ids, through the package's one client (:mod:`torchrl_chat.endpoint`). :class:`ScriptedEngine` says what a test or a demonstration
tells it to.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch

from torchrl_chat.conversation import Transcript, Turn
from torchrl_chat.endpoint import RESERVED, Endpoint
from torchrl_chat.messages import Message
from torchrl_chat.templates import ChatTemplate


@dataclass(slots=True)
class Ask:
    """What an engine is asked for: one answer."""

    prompt: Transcript | torch.Tensor
    """What it goes on from: a ledger, or its ids alone, int64 (P,), on the CPU. Engines read it by the properties below."""
    limit: int | None = None
    """How many tokens may be sampled; ``None``: as many as the engine's own settings allow."""
    seed: int | None = None
    """Sample from this seed."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of :attr:`Engine.settings`, what the session, or an agent that may, sets."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer. An engine may stop there, or not look at them: what is beyond is cut off."""
    told: Callable[[Sequence[int]], None] | None = None
    """Takes the ids sampled so far, whenever there are more; called in the event loop. An engine need not call it."""

    @property
    def ledger(self) -> Transcript | None:
        """The prompt as a ledger: what of it was sampled, and how likely that was."""
        return self.prompt if isinstance(self.prompt, Transcript) else None

    @property
    def messages(self) -> Sequence[Message]:
        """The prompt as messages, for engines that read words (a script); ids are what counts. Empty without a ledger."""
        return self.prompt.messages if isinstance(self.prompt, Transcript) else ()

    @property
    def ids(self) -> torch.Tensor:
        """The prompt's ids, int64 (P,), on the CPU: a view of a ledger, not to be written to."""
        return self.prompt.tokens if isinstance(self.prompt, Transcript) else self.prompt

    @property
    def id_array(self) -> np.ndarray:
        """:attr:`ids` as an array of numpy's, for engines that send them somewhere: no tensor is made of them."""
        return self.prompt.token_array if isinstance(self.prompt, Transcript) else self.prompt.numpy()


class Engine(Protocol):
    """What samples."""

    settings: frozenset[str]
    """The settings that it takes with a request: ``"temperature"``, ``"top_p"``, ``"response_format"`` ...; its own hold else."""

    async def sample(self, ask: Ask) -> Turn:
        """One answer: the sampled ids, stop token included, log-probs where they are known, why it ended, and by which weights.

        Raises:
            Exception: it cannot answer; the request fails, and no other.
        """
        ...

    async def aclose(self) -> None:
        """Let go of what it holds."""
        ...


class ScriptedEngine:
    """Says what a function tells it to: for tests, demonstrations, and the agents of other houses.

    Args:
        script: takes an :class:`Ask`; returns the text of the answer, special tokens and calls spelled as the template has them, or a
            :class:`~torchrl_chat.conversation.Turn`; or an awaitable of either. A list says its texts one after the other, over all
            sessions.
        template: for texts: a tokenizer with a chat template, which a gateway then finds here; or a :class:`~torchrl_chat.ChatTemplate`, whose
            tokenizer and options the gateway is given, too.
        log_prob: the log-prob of every id; ``None`` for none.

    Raises:
        IndexError: when asked once more than a list has texts.

    Example:
        >>> from torchrl_chat.gateway import Gateway
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> gateway = Gateway(ScriptedEngine(lambda ask: f"You said {ask.messages[-1]['content']!r}.", tokenizer))
    """

    settings: frozenset[str] = frozenset()

    def __init__(
        self,
        script: Callable[[Ask], Any] | Sequence[str],
        template: Any,
        log_prob: float | None = -0.5,
    ):
        self._template, self._log_prob = template, log_prob
        if not isinstance(template, ChatTemplate):
            self._template = ChatTemplate(template)
            self.tokenizer = self._template.tokenizer  # of a template, whoever has it has its options
        if callable(script):
            self._script = script
        else:
            count, texts = len(script), iter(script)

            def following(ask: Ask) -> str:
                if (text := next(texts, None)) is None:
                    raise IndexError(f"the script has {count} texts, and was asked for one more.")
                return text

            self._script = following
        self.asked: list[Ask] = []

    async def sample(self, ask: Ask) -> Turn:
        """What the script says; a text is ended by the template's own stop token."""
        self.asked.append(ask)
        said = self._script(ask)
        if inspect.isawaitable(said):
            said = await said
        if isinstance(said, Turn):
            return said
        codec = self._template.codec
        [ids] = codec.encode_continuation([said], [int(ask.id_array[-1])])
        reason = "stop"
        if not ids or ids[-1] not in self._template.stop_ids:
            ids = [
                *ids,
                *sorted(self._template.stop_ids)[:1],
            ]  # of templates whose turns end with plain words there is none
        if ask.limit is not None and len(ids) > ask.limit:
            ids, reason = ids[: ask.limit], "length"
        if ask.told is not None:
            for end in range(1, len(ids) + 1, 8):
                ask.told(ids[:end])
                await asyncio.sleep(0)
        log_probs = None if self._log_prob is None else torch.full((len(ids),), self._log_prob)
        return Turn(torch.tensor(ids, dtype=torch.int64), log_probs, said, reason)

    async def aclose(self) -> None:
        """Nothing is held."""


class RemoteEngine(Endpoint):
    """An engine behind a server that takes ids and gives ids: vLLM, or another with the same routes.

    What is tried again, what is counted, and what keeps the secrets: see :class:`~torchrl_chat.endpoint.Endpoint`. Log-probs are
    those that the server reports: vLLM's are of the raw logits unless it is started with ``--logprobs-mode processed_logprobs``,
    which a temperature other than 1 needs. What is streamed to an agent is streamed from the server (but through a proxy, with
    ``"generate"``); it is not tried again once it has begun. A request that is given up is closed, and the server samples no more of it.

    Args:
        model, base_url, api_key: see :class:`~torchrl_chat.endpoint.Endpoint`; ``base_url`` ends with ``/v1``.

    Keyword Args:
        api: ``"generate"``: vLLM's ``/inference/v1/generate``, which tells the version of the weights as well; ``"completions"``: OpenAI's
            completions with a prompt of ids, and ``return_token_ids``.
        stop_ids: ids that end an answer and belong to it, besides the model's own.
        max_new_tokens: where an answer is cut, at most.
        extra, concurrency, retries, timeout, deadline: see :class:`~torchrl_chat.endpoint.Endpoint`; ``extra`` are settings of each
            request, as the API has them.

    Raises:
        ValueError: an option has no such value.

    Example:
        >>> from torchrl_chat import ChatTemplate
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> template = ChatTemplate(tokenizer)
        >>> engine = RemoteEngine("Qwen/Qwen3-8B", "http://localhost:8000/v1", stop_ids=template.stop_ids)
    """

    reserved = (*RESERVED, "prompt", "logprobs", "token_ids", "stop_token_ids", "sampling_params")

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        api: Literal["generate", "completions"] = "generate",
        stop_ids: Sequence[int] | frozenset[int] = (),
        max_new_tokens: int = 1024,
        extra: Mapping[str, Any] | None = None,
        concurrency: int = 256,
        retries: int = 4,
        timeout: float = 600.0,
        deadline: float = 1800.0,
    ):
        if api not in ("generate", "completions"):
            raise ValueError(f"api={api!r}: expected 'generate' or 'completions'.")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens!r}: expected at least 1.")
        self.api: Literal["generate", "completions"] = api
        self.stop_ids = sorted(stop_ids)
        self.max_new_tokens = max_new_tokens
        Endpoint.__init__(
            self,
            model,
            base_url,
            api_key,
            extra=dict(extra or {}),
            concurrency=concurrency,
            retries=retries,
            timeout=timeout,
            deadline=deadline,
        )

    @property
    def settings(self) -> frozenset[str]:
        """What a request may set: OpenAI's and vLLM's sampling settings; a response format with ``"completions"``."""
        names = {"temperature", "top_p", "top_k", "min_p", "seed"}
        names |= {"presence_penalty", "frequency_penalty", "repetition_penalty"}
        return frozenset(names | ({"response_format"} if self.api == "completions" else set()))

    async def sample(self, ask: Ask) -> Turn:
        """See :class:`Engine`."""
        most = self.max_new_tokens if ask.limit is None else min(ask.limit, self.max_new_tokens)
        seed = {} if ask.seed is None else {"seed": ask.seed % 2**63}
        settings = {"temperature": 1.0, **seed, **ask.settings, "max_tokens": most}
        if ask.stop:
            settings["stop"] = list(ask.stop)
        if self.api == "generate":
            sampling = {**self.extra, **settings, "logprobs": 1, "stop_token_ids": self.stop_ids}
            sampling.pop("extra_headers", None)
            request: dict[str, Any] = {
                "model": self.model,
                "token_ids": ask.id_array,
                "sampling_params": sampling,
            }
        else:
            own = {name: settings.pop(name) for name in [*settings] if name in _BEYOND_OPENAI}
            body = {"return_token_ids": True, "stop_token_ids": self.stop_ids, **own}
            request = self.request(prompt=ask.id_array.tolist(), logprobs=1, **settings)
            request["extra_body"] = {**request.get("extra_body", {}), **body}
        reply = await self.ask(request, self.api, text=False, told=ask.told)
        if not reply.ids:
            raise ValueError(
                "the server returned no ids: it must know "
                + ("/inference/v1/generate." if self.api == "generate" else "return_token_ids.")
            )
        scores = reply.log_probs
        log_probs = None
        if scores is not None and len(scores) == len(reply.ids):  # torch.tensor is slow with lists
            log_probs = torch.from_numpy(np.array(scores, dtype=np.float32))
        ids = torch.from_numpy(np.array(reply.ids, dtype=np.int64))
        return Turn(ids, log_probs, None, reply.finish_reason, None, reply.versions)


_BEYOND_OPENAI = ("top_k", "min_p", "repetition_penalty", "response_format")
