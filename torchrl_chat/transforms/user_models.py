"""Models that play the user: one of transformers, or one behind an OpenAI-compatible endpoint.

Both see the conversation from the other side: what the policy said is said to them, what they said is their own. It is
text, and nothing but text: the tokens that such a model reads and samples are its own affair and never enter a ledger.
"""

from __future__ import annotations

import asyncio
import re
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from torchrl_chat._endpoint import Secrets, check_options, make_client, sent, shown
from torchrl_chat.messages import Message, content_text
from torchrl_chat.rewards.marked import after_reasoning
from torchrl_chat.sampling import default_stop_ids, generate
from torchrl_chat.seeds import mixed
from torchrl_chat.templates import ChatTemplate

OPENING = "Hello! How can I help you?"
"""What the policy seems to have said first, so that the user's first message replies to something."""

_PLACE = re.compile(r"\{([A-Za-z_]\w*)\}", re.ASCII)


def as_user_sees(
    messages: Sequence[Message],
    *,
    system_prompt: str | None = None,
    opening: str | None = OPENING,
    user_role: str = "user",
    policy_role: str = "assistant",
) -> list[Message]:
    """The conversation with the roles swapped, as a model that plays the user is to continue it.

    What a user does not see is left out: system messages, tool calls, the results of tools, reasoning, images. Turns
    alternate: what one side says in several messages becomes one, with an empty line in between.

    Args:
        messages: the conversation.
        system_prompt: who the user is and what it wants.
        opening: what the policy seems to have said first; ``None`` for nothing (many chat templates refuse a
            conversation that the assistant begins).
        user_role, policy_role: the roles in ``messages``.

    Returns:
        messages of the roles ``system``, ``user`` (the policy) and ``assistant`` (the user), the last by the policy.

    Example:
        >>> asked = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
        >>> as_user_sees(asked, opening=None)
        [{'role': 'assistant', 'content': 'Hi'}, {'role': 'user', 'content': 'Hello.'}]
    """
    swapped = {user_role: "assistant", policy_role: "user"}
    view = [] if opening is None else [("user", opening)]
    for place, message in enumerate(messages):
        role, text = swapped.get(message["role"]), content_text(message)
        if role is None or (not text and message.get("tool_calls") and place < len(messages) - 1):
            continue
        if view and view[-1][0] == role:
            view[-1] = (role, "\n\n".join(filter(None, (view[-1][1], text))))
        else:
            view.append((role, text))
    system = [] if system_prompt is None else [("system", system_prompt)]
    return [{"role": role, "content": text} for role, text in (*system, *view)]


def _filled(prompt: str | None, row: Mapping[str, Any] | None) -> str | None:
    """The prompt with the row's columns in the places ``{column}``; other braces stay."""
    if prompt is None or not row:
        return prompt
    return _PLACE.sub(lambda place: str(row[place[1]]) if place[1] in row else place[0], prompt)


def _words(text: str, limit: int | None) -> str:
    """What the model says aloud.

    Raises:
        ValueError: it says nothing.
    """
    said = after_reasoning(text).strip()
    if not said:
        raise ValueError(f"the user model said nothing within {limit} tokens, its reasoning aside: {text[-100:]!r}")
    return said


class ModelUser:
    """A transformers model that plays the user, for :class:`~torchrl_chat.transforms.user.UserSimulator`.

    It reads :func:`as_user_sees` in its own chat template (control tokens that the policy spells stay text) and answers
    all rows in one batch. A reply that ``max_new_tokens`` cuts is said as far as it goes; one without words behind the
    reasoning, and a conversation that the template refuses or that fills the model's context, fail their row only.

    In a :class:`~torchrl_chat.DatasetChatEnv` a reply is sampled from the seed of its episode, the turn and ``seed``: it
    does not depend on the rows beside it, nor on what was sampled before. In other environments a ``seed`` means a random
    generator that is kept (and saved, see :meth:`state_dict`): the same calls in the same order give the same replies,
    but a saved TensorDict that is stepped again may be replied to differently. Without a seed torch's global generator
    is used there.

    Args:
        model: a transformers causal language model; it is neither trained nor moved.
        tokenizer: its tokenizer, with a chat template.

    Keyword Args:
        system_prompt: who the user is and what it wants; ``{column}`` is replaced by the row's value of that column,
            if it is among the simulator's ``row_keys``.
        opening: what the policy seems to have said first.
        max_new_tokens: where a reply is cut.
        temperature: of the sampling; 0 takes the likeliest token.
        seed: of the sampling.
        stop_ids: ids that end a reply. Defaults to those of the template, the tokenizer and the model.
        template_kwargs: for :class:`~torchrl_chat.ChatTemplate`, e.g. ``{"enable_thinking": False}``.
        user_role, policy_role: the roles in the environment's conversations.

    Raises:
        ValueError: an option has no such value.
        ChatTemplateError: the tokenizer has no chat template, or it refuses the system prompt or the opening.

    Example:
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_model, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> user = ModelUser(tiny_model(len(tokenizer)), tokenizer, max_new_tokens=8, temperature=0)
        >>> replies = user([[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]])
        >>> len(replies), type(replies[0]).__name__
        (1, 'str')
    """

    batched = True
    seeded = True

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        system_prompt: str | None = None,
        opening: str | None = OPENING,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        seed: int | None = None,
        stop_ids: Sequence[int] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        user_role: str = "user",
        policy_role: str = "assistant",
    ):
        if max_new_tokens < 1 or temperature < 0:
            raise ValueError(
                f"max_new_tokens={max_new_tokens}, temperature={temperature}: expected at least 1, and 0 or more."
            )
        self.template = ChatTemplate(tokenizer, **dict(template_kwargs or {}))
        self.model = model
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.generator: torch.Generator | None = None
        if stop_ids is None:
            eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
            self.stop_ids = default_stop_ids(self.template.tokenizer, eos) | self.template.stop_ids
        else:
            self.stop_ids = frozenset(stop_ids)
        self.system_prompt = system_prompt
        self.opening = opening
        self.seed = seed
        self.user_role = user_role
        self.policy_role = policy_role
        asked = [{"role": user_role, "content": "2 + 2?"}, {"role": policy_role, "content": "4"}]
        self.template.render(self.view(asked))  # a template that knows no system message says so here

    def __call__(
        self,
        conversations: Sequence[Sequence[Message]],
        rows: Sequence[Mapping[str, Any]] | None = None,
        *,
        seeds: Sequence[int | None] | None = None,
    ) -> list[str | Exception]:
        """What the user says next in each conversation; an exception where that failed."""
        drawn = [None] * len(conversations) if seeds is None else seeds
        known = [{}] * len(conversations) if rows is None else rows
        prompts = [self.view(messages, row) for messages, row in zip(conversations, known, strict=True)]
        rendered = [self._rendered(prompt) for prompt in prompts]
        replies: list[str | Exception] = [r if isinstance(r, Exception) else "" for r in rendered]
        places = [i for i, reply in enumerate(replies) if not isinstance(reply, Exception)]
        said = self._sampled([rendered[i] for i in places], [drawn[i] for i in places])
        for i, reply in zip(places, said, strict=True):
            replies[i] = reply
        return replies

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The state of the generator, if there is one already."""
        return {} if self.generator is None else {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on with that generator."""
        self.generator = None
        if "generator" in state:
            self.generator = torch.Generator(self._device)
            self.generator.set_state(state["generator"])

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def view(self, messages: Sequence[Message], row: Mapping[str, Any] | None = None) -> list[Message]:
        """The conversation as the model is given it."""
        return as_user_sees(
            messages,
            system_prompt=_filled(self.system_prompt, row),
            opening=self.opening,
            user_role=self.user_role,
            policy_role=self.policy_role,
        )

    def _rendered(self, prompt: list[Message]) -> Any:
        try:
            ids = self.template.render(prompt)
            room = self._room(len(ids))
            if room < 1:
                raise ValueError(f"the user model's prompt of {len(ids)} tokens fills its context")
            return ids
        except Exception as error:  # a template may raise anything
            return error

    def _room(self, length: int) -> int:
        """How many tokens may follow a prompt of this length."""
        context = getattr(getattr(self.model, "config", None), "max_position_embeddings", None)
        return self.max_new_tokens if context is None else min(self.max_new_tokens, context - length)

    @torch.no_grad()
    def _sampled(self, ids: list[list[int]], seeds: list[int | None]) -> list[str | Exception]:
        if not ids:
            return []
        device = self._device
        inputs = [torch.tensor(row, dtype=torch.int64, device=device) for row in ids]
        own = [seed if self.seed is None else mixed(self.seed, seed) for seed in seeds if seed is not None]
        if self.seed is not None and self.generator is None and len(own) < len(ids):
            self.generator = torch.Generator(device).manual_seed(self.seed)
        sampled, _ = generate(
            self.model,
            inputs,
            stop_ids=self.stop_ids,
            most=[self._room(len(row)) for row in ids],
            vocab_size=self.template.codec.vocab_size,
            temperature=self.temperature,
            seeds=own if len(own) == len(ids) else None,
            generator=self.generator,
        )
        replies: list[str | Exception] = []
        for read in self.template.parse_batch([row.tolist() for row in sampled]):
            try:
                replies.append(_words(content_text(read.message), self.max_new_tokens))
            except ValueError as error:
                replies.append(error)
        return replies


@dataclass(eq=False)
class EndpointUser:
    """A model behind an OpenAI-compatible endpoint that plays the user.

    A coroutine function: ``text = await user(messages)``, with the conversation as :func:`as_user_sees` shows it. Rate
    limits (429), errors of the server (5xx), timeouts and lost connections are tried again by the ``openai`` library,
    with exponential backoff. Where no reply comes in the end, the call raises, which costs its own row only.

    Control tokens that the policy spells, such as ``<|im_end|>``, are broken by a space: the endpoint's server may
    obey them otherwise. A copy in another process makes its own connections; a key is pickled only if it was given
    as ``api_key``.

    Args:
        model: the model's name at the endpoint.
        base_url: the endpoint, ``"http://localhost:8000/v1"``; ``None``: the environment's ``OPENAI_BASE_URL``, or OpenAI.
        api_key: ``None``: the environment's ``OPENAI_API_KEY``; with a ``base_url`` there may be none.
        system_prompt: who the user is and what it wants; ``{column}`` is replaced by the row's value of that column,
            if it is among the simulator's ``row_keys``.
        opening: what the policy seems to have said first.
        temperature: ``None`` sends none, for models that refuse it.
        max_tokens: where a reply is cut; it is said as far as it goes. ``None`` sends none.
        extra: further arguments of ``chat.completions.create``: ``{"seed": 1, "extra_body": {...}}``.
        concurrency: how many requests are on their way at once.
        retries: how often a request is tried again.
        timeout: seconds without a sign of life after which one try is given up.
        deadline: seconds after which a request is given up with all its tries; waiting for a free slot does not count.
        user_role, policy_role: the roles in the environment's conversations.

    Raises:
        ValueError: an option has no such value, or there is no key.
        ImportError: the library ``openai`` is not installed.

    Example:
        >>> user = EndpointUser("user-model", "http://localhost:8000/v1", system_prompt="You want to {goal}.")
        >>> user.messages([{"role": "assistant", "content": "Yes?"}], {"goal": "book a flight"})[0]
        {'role': 'system', 'content': 'You want to book a flight.'}
    """

    model: str
    base_url: str | None = None
    api_key: str | None = field(default=None, repr=False)
    system_prompt: str | None = None
    opening: str | None = OPENING
    temperature: float | None = None
    max_tokens: int | None = 512
    extra: Mapping[str, Any] = field(default_factory=dict)
    concurrency: int = 32
    retries: int = 4
    timeout: float = 60.0
    deadline: float = 300.0
    user_role: str = "user"
    policy_role: str = "assistant"

    def __post_init__(self) -> None:
        check_options(self)
        self._client()  # a missing library or key is the whole run's affair: it must not wait for the first row
        self._reset()

    def _reset(self) -> None:
        # A client and its slots belong to one event loop; they go when it goes.
        self._loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Any] = weakref.WeakKeyDictionary()

    def __repr__(self) -> str:
        return shown(self)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_loops"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    async def __call__(self, messages: Sequence[Message], row: Mapping[str, Any] | None = None) -> str:
        """What the user says next.

        Raises:
            TimeoutError: no reply came in time.
            ValueError: the reply has no words.
            openai.OpenAIError: the endpoint refuses, or cannot be reached.
            RuntimeError: the same, where the error repeats the key: it is hidden.
        """
        secrets = Secrets.of(self)
        request: dict[str, Any] = {
            "model": self.model,
            "messages": self.messages(messages, row),
            **sent(self.extra),
        }
        for name in ("temperature", "max_tokens"):
            if getattr(self, name) is not None:
                request[name] = getattr(self, name)
        loop = asyncio.get_running_loop()
        if loop not in self._loops:
            self._loops[loop] = self._client(), asyncio.Semaphore(self.concurrency)
        client, slots = self._loops[loop]
        async with slots:
            try:
                async with asyncio.timeout(self.deadline) as limit:
                    completion = await client.chat.completions.create(**request)
            except TimeoutError:
                if limit.expired():
                    raise TimeoutError(f"no reply within {self.deadline:g} s, with all tries") from None
                raise
            except Exception as error:
                if str(error) in secrets:  # what a server says of a key that it refuses
                    raise RuntimeError(f"{type(error).__name__}: {secrets.hide(str(error))}") from None
                raise
        choices = getattr(completion, "choices", None)
        text = getattr(getattr(choices[0] if choices else None, "message", None), "content", None)
        if not isinstance(text, str):
            raise ValueError(f"the endpoint returned no text: {secrets.hide(repr(completion))[:200]}")
        if text in secrets:
            raise ValueError("the endpoint's reply repeats a key or a password; it is left out")
        return _words(text, self.max_tokens)

    def messages(self, messages: Sequence[Message], row: Mapping[str, Any] | None = None) -> list[Message]:
        """What is sent to the endpoint for a conversation."""
        view = as_user_sees(
            messages,
            system_prompt=_filled(self.system_prompt, row),
            opening=self.opening,
            user_role=self.user_role,
            policy_role=self.policy_role,
        )
        return [
            {**message, "content": re.sub(r"<(?=[|｜])", "< ", message["content"])}
            if message["role"] == "user"
            else message
            for message in view
        ]

    async def aclose(self) -> None:
        """Close the connections of the running event loop; they are made anew if the user is asked again."""
        if (here := self._loops.pop(asyncio.get_running_loop(), None)) is not None:
            await here[0].close()

    def _client(self) -> Any:
        return make_client(self)
