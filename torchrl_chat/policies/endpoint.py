"""``EndpointPolicy``: a model behind an OpenAI-compatible endpoint as a policy, for evaluation."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from tensordict import TensorDictBase

from torchrl_chat import columns
from torchrl_chat._loop import LoopThread
from torchrl_chat.conversation import Turn
from torchrl_chat.conversation.turn import Errors
from torchrl_chat.endpoint import RESERVED, Endpoint, Reply
from torchrl_chat.messages import Message
from torchrl_chat.models.sampling import default_stop_ids
from torchrl_chat.policies.policy import Policy, Prompt
from torchrl_chat.policies.writing import Prompts, read_prompts, read_seeds
from torchrl_chat.seeds import turn_seeds
from torchrl_chat.templates import ChatTemplate

_KEPT = ("role", "content", "name", "tool_calls", "tool_call_id")


@dataclass(slots=True, eq=False)
class EndpointTurn(Turn):
    """A turn of an endpoint's model."""

    prompt_differs: bool | None = None
    """Whether the server read another prompt than the conversation's ids; ``None`` where it does not tell."""


class EndpointPolicy(Endpoint, Policy):
    """Asks an OpenAI-compatible endpoint for the answers of all rows at once, in any input mode.

    With ``api="chat"`` (default) it sends the messages of the ledger, and the server applies its own template. With
    ``api="completions"`` it sends the ids of the ledger's prompt themselves, which is exact over turns; it needs a server
    that takes ids (vLLM, SGLang, llama.cpp do), and an environment with the model's own tokenizer. Written:

    - ``("tokens", "response")`` int64 (R,) and ``("log_probs", "response")`` float32 (R,), ragged: what the server
      sampled, where it returns that; else the text, tokenized once, without log-probs. Where there is no tokenizer,
      ``("history", "response")`` or ``("text", "response")`` instead;
    - ``"finish_reason"``: str (B,);
    - ``"policy_error"``: str (B,), why a row has no answer, empty where it has one. Such a row's ``"_step"`` is false: the
      environment leaves it as it is, and :func:`~torchrl_chat.playing.play` ends it;
    - ``"prompt_differs"``: bool (B,), where the server reports its prompt: whether that is not the ledger's.

    Rows whose ``"_step"`` is false already, or that may sample nothing more, are not asked for. :meth:`sample` does the same on
    values, without a TensorDict. What is tried again, what is counted, and what keeps the secrets: see
    :class:`~torchrl_chat.endpoint.Endpoint`; they are in no rollout file either, and an answer that repeats them is none.

    What a chat server takes out of the text is not in the text that it returns: reasoning, where it parses that, and
    tool calls, which are written again by the tokenizer's template. Ask for ids where it matters.

    Args:
        model, base_url: see :class:`~torchrl_chat.endpoint.Endpoint`.

    Keyword Args:
        api: ``"chat"`` or ``"completions"``.
        tokenizer: the environment's; ``None`` where that has none.
        tools: JSON schemas, sent with every chat request. Give them to the environment too.
        temperature: ``None`` sends none, for models that refuse it.
        max_new_tokens: where an answer is cut; a budget's ``"tokens_left"`` cuts earlier. For a server that knows
            ``max_completion_tokens`` only: ``None``, and that in ``extra``.
        token_ids: ask for the sampled ids (vLLM's ``return_token_ids``). Defaults to whether ``api="completions"``:
            other servers may refuse an argument that they do not know.
        seeded: send a seed with each request, made of the row's ``"episode_seed"`` and its turn; a server that keeps to it
            (vLLM) gives the same answers again.
        log_probs: ask for log-probs; taken where there is one for each sampled id.
        api_key, extra, concurrency, retries, timeout, deadline: see :class:`~torchrl_chat.endpoint.Endpoint`.

    Raises:
        ValueError: an option has no such value, or there is no key.
        ImportError: the library ``openai`` is not installed.

    Example:
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> policy = EndpointPolicy("Qwen/Qwen3-8B", "http://localhost:8000/v1", tokenizer=tokenizer, temperature=0.6)
    """

    reserved = (*RESERVED, "prompt", "tools", "logprobs")
    _own = (*Endpoint._own, "_loop")

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        api: Literal["chat", "completions"] = "chat",
        tokenizer: Any = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        temperature: float | None = 1.0,
        max_new_tokens: int | None = 1024,
        token_ids: bool | None = None,
        seeded: bool = False,
        log_probs: bool = False,
        extra: Mapping[str, Any] | None = None,
        concurrency: int = 64,
        retries: int = 4,
        timeout: float = 600.0,
        deadline: float = 1800.0,
    ):
        Policy.__init__(self)
        if api not in ("chat", "completions"):
            raise ValueError(f"api={api!r}: expected 'chat' or 'completions'.")
        if api == "completions" and tokenizer is None:
            raise ValueError("api='completions' sends token ids: pass the environment's tokenizer=...")
        if max_new_tokens is not None and max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens!r}: expected at least 1, or None.")
        self.in_keys = ["transcript", "episode_seed"] if seeded else ["transcript"]
        self.out_keys = ["finish_reason", "policy_error"]
        self.api: Literal["chat", "completions"] = api
        self.tools = list(tools or ())
        self.temperature = temperature
        self.max_new_tokens = max_new_tokens
        self.token_ids = api == "completions" if token_ids is None else token_ids
        self.seeded = seeded
        self.log_probs = log_probs
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
        self.template = None if tokenizer is None else ChatTemplate(tokenizer, tools=self.tools or None)
        self.tokenizer = None if self.template is None else self.template.tokenizer
        self.codec = None if self.template is None else self.template.codec
        self.stop_ids = frozenset() if self.tokenizer is None else default_stop_ids(self.tokenizer)
        self.connect()  # a missing library or key is the whole run's affair: it must not wait for the first row

    def _begin(self) -> None:
        super()._begin()
        self._loop: LoopThread | None = None

    def close(self) -> None:
        """Close the connections; they are made anew if the policy is asked again."""
        loop, self._loop = self._loop, None
        if loop is not None and loop.alive:
            loop.run(self.aclose())
            loop.close()

    # ------------------------------------------------------------------ asking
    def _sample(self, prompts: Sequence[Prompt]) -> list[Turn | Exception]:
        if self._loop is None or not self._loop.alive:  # not in a forked child, either
            self._loop = LoopThread("torchrl_chat.endpoint")

        async def every() -> list[Turn | Exception]:
            self.here()  # no key, no library: that is the whole batch's affair
            return await asyncio.gather(*map(self._answer, prompts))

        return self._loop.run(every())

    async def _answer(self, prompt: Prompt) -> Turn | Exception:
        if self.api == "completions":
            prompt = replace(prompt, ids=self._ids([prompt])[0])
        try:
            return self._turn(await self.ask(self._request(prompt), self.api, text=False), prompt)
        except Exception as error:  # of the endpoint, or of a tokenizer that stumbles over what is no text
            return error

    def _request(self, prompt: Prompt) -> dict[str, Any]:
        most = [limit for limit in (self.max_new_tokens, prompt.limit) if limit is not None]
        asked: dict[str, Any] = {"max_tokens": min(most, default=None), "seed": prompt.seed}
        if self.api == "completions":
            assert prompt.ids is not None
            asked |= {"prompt": prompt.ids.tolist(), "logprobs": 1 if self.log_probs else None}
        elif prompt.messages is None:
            raise ValueError("api='chat' sends messages, and the prompt has ids only")
        else:
            asked |= {"messages": as_sent(prompt.messages), "tools": self.tools or None}
            asked["logprobs"] = self.log_probs or None
        request = self.request(temperature=self.temperature, **asked)
        if self.token_ids:
            request["extra_body"] = {"return_token_ids": True, **request.get("extra_body", {})}
        return request

    def _turn(self, reply: Reply, prompt: Prompt) -> Turn:
        """The turn of a reply: with the ids that the server sampled, or those of its text, where the prompt has ids.

        Raises:
            ValueError: the reply says nothing that can be entered.
        """
        turn = EndpointTurn(text=reply.text, finish_reason=reply.finish_reason or "stop", limit=prompt.limit)
        if self.template is None or prompt.ids is None:
            if reply.calls or not reply.text:
                what = "a tool call, which takes a tokenizer" if reply.calls else "no text"
                raise ValueError(f"the endpoint returned {what}")
            return turn
        ids = self._said(reply, prompt.ids, prompt.messages or ())
        turn.ids = torch.tensor(ids, dtype=torch.int64)
        if ids == reply.ids and reply.log_probs is not None and len(reply.log_probs) == len(ids):
            turn.log_probs = torch.tensor(reply.log_probs, dtype=torch.float32)
        [turn.text] = self.template.codec.decode([ids])
        if reply.prompt_ids is not None:
            turn.prompt_differs = reply.prompt_ids != prompt.ids.tolist()
        return turn

    def _said(self, reply: Reply, prompt: torch.Tensor, messages: Sequence[Message]) -> list[int]:
        """The ids of a reply.

        Raises:
            ValueError: there are none, or they are no ids of this tokenizer.
        """
        codec = self.codec
        if reply.ids:
            if not all(0 <= token < codec.vocab_size for token in reply.ids):
                raise ValueError(
                    f"the endpoint returned ids beyond the tokenizer's {codec.vocab_size}: not its model's."
                )
            return reply.ids
        if reply.calls:
            return self._spelled(reply, messages)
        if reply.text:
            return codec.encode_continuation([reply.text], [int(prompt[-1])])[0]
        if reply.finish_reason == "length":
            raise ValueError("the endpoint returned no text before it cut the answer")
        return [min(self.stop_ids)]  # it ended the turn at once

    def _spelled(self, reply: Reply, messages: Sequence[Message]) -> list[int]:
        """A call that the server has parsed, as the template writes it."""
        assert self.template is not None
        answer = {"role": "assistant", "content": reply.text, "tool_calls": list(reply.calls)}
        prompt = self.template.render(messages)
        whole = self.template.render([*messages, answer], add_generation_prompt=False)
        said = whole[len(prompt) :]
        if whole[: len(prompt)] != prompt or not said:
            raise ValueError(
                "the endpoint parsed a tool call, and the template does not tell its ids: ask for token_ids"
            )
        ends = [place for place, token in enumerate(said) if token in self.stop_ids]
        return said[: ends[0] + 1] if ends else said

    # ------------------------------------------------------------------ the face
    def _read(self, td: TensorDictBase) -> tuple[list[Prompt], Prompts | None]:
        if self.seeded:
            read_seeds(td)  # which says what is wrong where there are none
        transcripts = columns.read_objects(td.get("transcript"), td.batch_size)
        shown = None if self.template is None or td.get("tokens", None) is None else read_prompts(td)
        left = td.get("tokens_left", None)  # a budget's
        limits = [None] * len(transcripts) if left is None else left.reshape(-1).tolist()
        seeds = turn_seeds(td, transcripts, "endpoint") if self.seeded else [None] * len(transcripts)
        rows = zip(transcripts, limits, seeds, strict=True)
        return [
            Prompt(None if shown is None else transcript.tokens, transcript.messages, limit, seed)
            for transcript, limit, seed in rows
        ], shown

    def _write(
        self, td: TensorDictBase, shown: Prompts | None, turns: Sequence[Turn], errors: Errors
    ) -> TensorDictBase:
        differs = [getattr(turn, "prompt_differs", None) for turn in turns]
        if any(known is not None for known in differs):
            td.set(
                "prompt_differs", torch.tensor(list(map(bool, differs)), device=td.device).reshape(td.batch_size)
            )
        return super()._write(td, shown, turns, errors)


def as_sent(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as the chat API has them: call arguments as JSON texts, every call and its result with an id."""
    sent, waiting = [], []
    for place, message in enumerate(messages):
        shown = {key: message[key] for key in _KEPT if message.get(key) is not None}
        shown.setdefault("content", None if shown.get("tool_calls") else "")
        if shown.get("tool_calls"):
            shown["tool_calls"] = [_call(call, f"call_{place}_{i}") for i, call in enumerate(shown["tool_calls"])]
            waiting = [call["id"] for call in shown["tool_calls"]]
        elif shown["role"] == "tool":
            known = shown.setdefault("tool_call_id", waiting[0] if waiting else f"call_{place}")
            waiting = [call for call in waiting if call != known]
        sent.append(shown)
    return sent


def _call(call: Mapping[str, Any], fallback: str) -> dict[str, Any]:
    function = call.get("function", call)
    arguments = function.get("arguments", {})
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments)
    return {
        "id": call.get("id") or fallback,
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }
