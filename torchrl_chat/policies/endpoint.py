"""``EndpointPolicy``: a model behind an OpenAI-compatible endpoint as a policy, for evaluation.

Law of this file: a row whose request fails is left as it is, with the reason beside it. It is not stepped, so that
nothing that no policy sampled enters a ledger, and the other rows go on.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase

from torchrl_chat import columns
from torchrl_chat._endpoint import RESERVED, Secrets, check_options, make_client, sent
from torchrl_chat._loop import LoopThread
from torchrl_chat.messages import Message
from torchrl_chat.policies.writing import asked, read_prompts, read_seeds, write_answers
from torchrl_chat.sampling import default_stop_ids
from torchrl_chat.seeds import turn_seeds
from torchrl_chat.templates import ChatTemplate

_KEPT = ("role", "content", "name", "tool_calls", "tool_call_id")
_RESERVED = (*RESERVED, "prompt", "tools", "logprobs")


@dataclass(frozen=True)
class Reply:
    """What the endpoint said to one row."""

    text: str = ""
    finish_reason: str | None = None
    ids: list[int] | None = None
    log_probs: list[float] | None = None
    prompt_ids: list[int] | None = None
    calls: tuple[Mapping[str, Any], ...] = ()
    error: str = ""


class EndpointPolicy(TensorDictModuleBase):
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

    Rows whose ``"_step"`` is false already, or that may sample nothing more, are not asked for. Rate limits (429), errors of the server (5xx), timeouts
    and lost connections are tried again with exponential backoff; other refusals are not.

    **Secrets.** The key, a name and a password in the URL, and the headers in ``extra`` are sent, and are in no message, log,
    ``repr`` or rollout file: where the server's error repeats them they are hidden, and an answer that repeats them is none.

    What a chat server takes out of the text is not in the text that it returns: reasoning, where it parses that, and
    tool calls, which are written again by the tokenizer's template. Ask for ids where it matters.

    Args:
        model: the model's name at the endpoint.
        base_url: the endpoint, ``"http://localhost:8000/v1"``; ``None``: the environment's ``OPENAI_BASE_URL``, or OpenAI.

    Keyword Args:
        api_key: ``None``: the environment's ``OPENAI_API_KEY``; with a ``base_url`` there may be none.
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
        extra: further arguments of the request: ``{"seed": 1, "extra_body": {"top_k": 20}}``.
        concurrency: how many requests are on their way at once.
        retries: how often a request is tried again.
        timeout: seconds without a sign of life after which one try is given up.
        deadline: seconds after which a request is given up with all its tries; waiting for a free slot does not count.

    Raises:
        ValueError: an option has no such value, or there is no key.
        ImportError: the library ``openai`` is not installed.

    Example:
        >>> policy = EndpointPolicy("Qwen/Qwen3-8B", "http://localhost:8000/v1", tokenizer=tokenizer, temperature=0.6)
        >>> finished = play(env, policy)  # doctest: +SKIP
    """

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
        super().__init__()
        if api not in ("chat", "completions"):
            raise ValueError(f"api={api!r}: expected 'chat' or 'completions'.")
        if api == "completions" and tokenizer is None:
            raise ValueError("api='completions' sends token ids: pass the environment's tokenizer=...")
        if max_new_tokens is not None and max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens!r}: expected at least 1, or None.")
        self.in_keys = ["transcript", "episode_seed"] if seeded else ["transcript"]
        self.out_keys = ["finish_reason", "policy_error"]
        self.model = model
        self.base_url = base_url
        self.api_key = api_key
        self.api = api
        self.tools = list(tools or ())
        self.temperature = temperature
        self.max_new_tokens = max_new_tokens
        self.token_ids = api == "completions" if token_ids is None else token_ids
        self.seeded = seeded
        self.log_probs = log_probs
        self.extra = dict(extra or {})
        self.concurrency = concurrency
        self.retries = retries
        self.timeout = timeout
        self.deadline = deadline
        check_options(self, _RESERVED)
        self.template = None if tokenizer is None else ChatTemplate(tokenizer, tools=self.tools or None)
        self.tokenizer = None if self.template is None else self.template.tokenizer
        self.stop_ids = frozenset() if self.tokenizer is None else default_stop_ids(self.tokenizer)
        make_client(self)  # a missing library or key is the whole run's affair: it must not wait for the first row
        self._forget()

    def _forget(self) -> None:
        self._loop: LoopThread | None = None
        self._client: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loop": None, "_client": None}

    def close(self) -> None:
        """Close the connections; they are made anew if the policy is asked again."""
        loop, client = self._loop, self._client
        self._forget()
        if loop is not None and loop.alive:
            loop.run(client.close())
            loop.close()

    # ------------------------------------------------------------------ acting
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Ask for an answer to every row that is to be stepped."""
        batch = tensordict.batch_size
        goes, limits = asked(tensordict), self._limits(tensordict)
        replies = self._replies(tensordict, goes, limits)
        if self.template is not None and tensordict.get("tokens", None) is not None:
            replies = self._write_tokens(tensordict, replies, goes)
        else:
            replies = self._write_texts(tensordict, replies, goes)
        failed = [bool(reply.error) for reply in replies]
        if any(failed):
            stays = [going and not bad for going, bad in zip(columns.stepped(tensordict), failed, strict=True)]
            tensordict.set("_step", torch.tensor(stays, device=tensordict.device).reshape(batch))
        reasons = [reply.finish_reason or "stop" for reply in replies]
        tensordict.set("finish_reason", columns.objects(reasons, batch, tensordict.device))
        tensordict.set("policy_error", columns.objects([r.error for r in replies], batch, tensordict.device))
        return tensordict

    def _limits(self, td: TensorDictBase) -> list[int | None]:
        """How many tokens each row may sample: the environment leaves one with none as it is, so it is not asked for."""
        left = td.get("tokens_left", None)  # a budget's
        return [None] * td.batch_size.numel() if left is None else left.reshape(-1).tolist()

    def _replies(self, td: TensorDictBase, goes: Sequence[bool], limits: Sequence[int | None]) -> list[Reply]:
        transcripts = columns.read_objects(td.get("transcript"), td.batch_size)
        if self.seeded:
            read_seeds(td)  # which says what is wrong where there are none
        seeds = turn_seeds(td, transcripts, "endpoint") if self.seeded else [None] * len(transcripts)
        requests = [
            self._request(transcript, limit, seed) if going else None
            for transcript, limit, seed, going in zip(transcripts, limits, seeds, goes, strict=True)
        ]
        if self._loop is None or not self._loop.alive:  # not in a forked child, either
            self._loop, self._client = LoopThread("torchrl_chat.endpoint"), make_client(self)
        return self._loop.run(self._ask_all(requests))

    def _request(self, transcript: Any, left: int | None, seed: int | None) -> dict[str, Any]:
        most = [limit for limit in (self.max_new_tokens, left) if limit is not None]
        request: dict[str, Any] = {"model": self.model, **sent(self.extra)}
        if most:
            request["max_tokens"] = min(most)
        if seed is not None:
            request["seed"] = seed
        if self.temperature is not None:
            request["temperature"] = self.temperature
        if self.token_ids:
            request["extra_body"] = {"return_token_ids": True, **request.get("extra_body", {})}
        if self.api == "completions":
            request["prompt"] = transcript.tokens.tolist()
            if self.log_probs:
                request["logprobs"] = 1
            return request
        request["messages"] = as_sent(transcript.messages)
        if self.tools:
            request["tools"] = self.tools
        if self.log_probs:
            request["logprobs"] = True
        return request

    async def _ask_all(self, requests: Sequence[dict[str, Any] | None]) -> list[Reply]:
        slots = asyncio.Semaphore(self.concurrency)
        return list(await asyncio.gather(*(self._ask(request, slots) for request in requests)))

    async def _ask(self, request: dict[str, Any] | None, slots: asyncio.Semaphore) -> Reply:
        if request is None:
            return Reply()
        endpoint = self._client.chat.completions if self.api == "chat" else self._client.completions
        async with slots:
            try:
                async with asyncio.timeout(self.deadline) as limit:
                    reply = _read(await endpoint.create(**request))
                if f"{reply.text} {reply.calls}" in Secrets.of(self):
                    return Reply(
                        error="ValueError: the endpoint's answer repeats a key or a password; it is left out"
                    )
                return reply
            except Exception as error:  # the library's errors, and whatever it stumbles over in a malformed reply
                late = limit.expired() and isinstance(error, TimeoutError)
                said = Secrets.of(self).hide(f"{error}")
                what = f"no reply within {self.deadline:g} s, with all tries" if late else said[:300]
                return Reply(error=f"{type(error).__name__}: {what}")

    # ------------------------------------------------------------------ writing
    def _write_tokens(self, td: TensorDictBase, replies: list[Reply], goes: Sequence[bool]) -> list[Reply]:
        assert self.template is not None
        prompts = read_prompts(td)
        transcripts = columns.read_objects(td.get("transcript"), td.batch_size)
        nothing = [next(iter(self.stop_ids))]  # stands in a row that is not stepped, and enters no ledger
        ids: list[list[int]] = []
        scores: list[torch.Tensor | None] = []
        for i, (reply, transcript, going) in enumerate(zip(replies, transcripts, goes, strict=True)):
            sampled = nothing
            if going and not reply.error:
                try:
                    sampled = self._ids(reply, transcript)
                except Exception as error:  # a tokenizer stumbles over what is no text
                    replies[i] = Reply(error=f"{type(error).__name__}: {error}")
            exact = sampled == reply.ids and reply.log_probs is not None and len(reply.log_probs) == len(sampled)
            ids.append(sampled)
            scores.append(torch.tensor(reply.log_probs, dtype=torch.float32) if exact else None)
        responses = [torch.tensor(row, dtype=torch.int64) for row in ids]
        reasons = [reply.finish_reason or "stop" for reply in replies]
        write_answers(td, prompts, responses, scores, self.template.codec.decode(ids), reasons)
        if any(reply.prompt_ids is not None for reply in replies):
            differs = [
                reply.prompt_ids is not None and reply.prompt_ids != transcript.tokens.tolist()
                for reply, transcript in zip(replies, transcripts, strict=True)
            ]
            td.set("prompt_differs", torch.tensor(differs, device=td.device).reshape(td.batch_size))
        return replies

    def _ids(self, reply: Reply, transcript: Any) -> list[int]:
        """The ids of a reply: those that the server sampled, or those of its text.

        Raises:
            ValueError: there are none, or they are no ids of this tokenizer.
        """
        assert self.template is not None
        codec = self.template.codec
        if reply.ids:
            if not all(0 <= token < codec.vocab_size for token in reply.ids):
                raise ValueError(
                    f"the endpoint returned ids beyond the tokenizer's {codec.vocab_size}: not its model's."
                )
            return reply.ids
        if reply.calls:
            return self._spelled(reply, transcript.messages)
        if reply.text:
            return codec.encode_continuation([reply.text], [int(transcript.tokens[-1])])[0]
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

    def _write_texts(self, td: TensorDictBase, replies: list[Reply], goes: Sequence[bool]) -> list[Reply]:
        texts = []
        for i, reply in enumerate(replies):
            if goes[i] and not reply.error and (reply.calls or not reply.text):
                what = "a tool call, which takes a tokenizer" if reply.calls else "no text"
                replies[i] = Reply(error=f"ValueError: the endpoint returned {what}")
            texts.append(reply.text or ".")  # the dot enters no ledger: such a row is not stepped
        history, text = td.get("history", None), td.get("text", None)
        if history is not None:
            entries = [columns.history_messages([{"role": "assistant", "content": said}]) for said in texts]
            written = columns.histories("response", entries, td.batch_size, td.device)
            history = columns.shallow(history)
            history.response = written.response
            td.set("history", history)
        elif text is not None:
            text = columns.shallow(text)
            text.response = columns.texts("response", texts, td.batch_size, td.device).response
            td.set("text", text)
        else:
            raise KeyError(
                "the policy has no tokenizer, and the environment is in tokens mode: pass EndpointPolicy(tokenizer=...)."
            )
        return replies


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


def _read(completion: Any) -> Reply:
    """The reply of either API.

    Raises:
        ValueError: there is no choice in it.
    """
    choices = getattr(completion, "choices", None)
    if not choices:
        raise ValueError(f"the endpoint returned no choice: {completion!r}")
    choice = choices[0]
    message = getattr(choice, "message", None)
    text = getattr(choice, "text", None) if message is None else getattr(message, "content", None)
    ids, prompt = getattr(choice, "token_ids", None), getattr(choice, "prompt_token_ids", None)
    if prompt is None:  # vLLM has it beside the choices of a chat
        prompt = getattr(completion, "prompt_token_ids", None)
    return Reply(
        text if isinstance(text, str) else "",
        choice.finish_reason,
        list(ids) if ids else None,
        _log_probs(getattr(choice, "logprobs", None)),
        list(prompt) if prompt else None,
        tuple(_parsed(call) for call in getattr(message, "tool_calls", None) or ()),
    )


def _parsed(call: Any) -> dict[str, Any]:
    """A call of a reply, as a message of the ledger has it."""
    try:
        arguments = json.loads(call.function.arguments)
    except (TypeError, ValueError):
        arguments = call.function.arguments
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def _log_probs(reported: Any) -> list[float] | None:
    values = getattr(reported, "token_logprobs", None)
    if values is None and getattr(reported, "content", None) is not None:
        values = [entry.logprob for entry in reported.content]
    return None if values is None or any(value is None for value in values) else [float(v) for v in values]
