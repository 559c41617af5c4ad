"""Models that play the user: one of transformers, or one behind an OpenAI-compatible endpoint.

Both see the conversation from the other side: what the policy said is said to them, what they said is their own. It is
text, and nothing but text: the tokens that such a model reads and samples are its own affair and never enter a ledger.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from torchrl_chat.endpoint import Endpoint, broken, filled
from torchrl_chat.messages import Message, content_text
from torchrl_chat.models.sampling import default_stop_ids
from torchrl_chat.policies import Prompt, TransformersPolicy
from torchrl_chat.rewards.marked import after_reasoning
from torchrl_chat.seeds import mixed
from torchrl_chat.templates import ChatTemplate

OPENING = "Hello! How can I help you?"
"""What the policy seems to have said first, so that the user's first message replies to something."""


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
        stop_ids: Collection[int] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        user_role: str = "user",
        policy_role: str = "assistant",
    ):
        self.template = ChatTemplate(tokenizer, **dict(template_kwargs or {}))
        if stop_ids is None:
            eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
            stop_ids = default_stop_ids(self.template.tokenizer, eos) | self.template.stop_ids
        self.policy = TransformersPolicy(
            model,
            self.template.tokenizer,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            stop_ids=stop_ids,
        )
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
        replies: list[str | Exception] = [""] * len(conversations)
        prompts: dict[int, Prompt] = {}
        for i, (messages, row, seed) in enumerate(zip(conversations, known, drawn, strict=True)):
            try:
                prompts[i] = self._prompt(self.view(messages, row), seed)
            except Exception as error:  # a template may raise anything
                replies[i] = error
        if any(prompt.seed is None for prompt in prompts.values()):  # not in the environment of a dataset
            prompts = {i: replace(prompt, seed=None) for i, prompt in prompts.items()}
            if self.seed is not None and self.policy.generator is None:
                self.policy.generator = torch.Generator(self.policy.device).manual_seed(self.seed)
        turns = self.policy.sample(list(prompts.values()))
        for i, read in zip(prompts, self.template.parse_batch([t.sampled.tolist() for t in turns]), strict=True):
            try:
                replies[i] = _words(content_text(read.message), self.policy.max_new_tokens)
            except ValueError as error:
                replies[i] = error
        return replies

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The state of the generator, if there is one already."""
        generator = self.policy.generator
        return {} if generator is None else {"generator": generator.get_state()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on with that generator."""
        self.policy.generator = None
        if "generator" in state:
            self.policy.generator = torch.Generator(self.policy.device)
            self.policy.generator.set_state(state["generator"])

    def view(self, messages: Sequence[Message], row: Mapping[str, Any] | None = None) -> list[Message]:
        """The conversation as the model is given it."""
        return _view(self, messages, row)

    def _prompt(self, view: list[Message], seed: int | None) -> Prompt:
        """What the model is asked.

        Raises:
            ValueError: the prompt leaves no room for a reply.
        """
        ids = torch.tensor(self.template.render(view), dtype=torch.int64)
        context = getattr(getattr(self.policy.model, "config", None), "max_position_embeddings", None)
        room = None if context is None else context - len(ids)
        if room is not None and room < 1:
            raise ValueError(f"the user model's prompt of {len(ids)} tokens fills its context")
        if self.seed is not None and seed is not None:
            seed = mixed(self.seed, seed)
        return Prompt(ids, limit=room, seed=seed)


@dataclass(eq=False, repr=False)
class EndpointUser(Endpoint):
    """A model behind an OpenAI-compatible endpoint that plays the user.

    A coroutine function: ``text = await user(messages)``, with the conversation as :func:`as_user_sees` shows it. What is
    tried again, and what keeps its secrets: see :class:`~torchrl_chat.endpoint.Endpoint`. Where no reply comes in the end, the
    call raises, which costs its own row only.

    Control tokens that the policy spells, such as ``<|im_end|>``, are broken by a space: the endpoint's server may
    obey them otherwise.

    Args:
        model, base_url, api_key: see :class:`~torchrl_chat.endpoint.Endpoint`.
        system_prompt: who the user is and what it wants; ``{column}`` is replaced by the row's value of that column,
            if it is among the simulator's ``row_keys``.
        opening: what the policy seems to have said first.
        temperature: ``None`` sends none, for models that refuse it.
        max_tokens: where a reply is cut; it is said as far as it goes. ``None`` sends none.
        user_role, policy_role: the roles in the environment's conversations.

    Keyword Args:
        extra, concurrency, retries, timeout, deadline: see :class:`~torchrl_chat.endpoint.Endpoint`.

    Raises:
        ValueError: an option has no such value, or there is no key.
        ImportError: the library ``openai`` is not installed.

    Example:
        >>> user = EndpointUser("user-model", "http://localhost:8000/v1", system_prompt="You want to {goal}.")
        >>> user.messages([{"role": "assistant", "content": "Yes?"}], {"goal": "book a flight"})[0]
        {'role': 'system', 'content': 'You want to book a flight.'}
    """

    system_prompt: str | None = None
    opening: str | None = OPENING
    temperature: float | None = None
    max_tokens: int | None = 512
    user_role: str = "user"
    policy_role: str = "assistant"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.connect()  # a missing library or key is the whole run's affair: it must not wait for the first row

    async def __call__(self, messages: Sequence[Message], row: Mapping[str, Any] | None = None) -> str:
        """What the user says next.

        Raises:
            TimeoutError: no reply came in time.
            ValueError: the reply has no words.
            openai.OpenAIError: the endpoint refuses, or cannot be reached.
            RuntimeError: the same, where the error repeats the key: it is hidden.
        """
        reply = await self.ask(
            self.request(
                messages=self.messages(messages, row), temperature=self.temperature, max_tokens=self.max_tokens
            )
        )
        return _words(reply.text, self.max_tokens)

    def messages(self, messages: Sequence[Message], row: Mapping[str, Any] | None = None) -> list[Message]:
        """What is sent to the endpoint for a conversation."""
        view = _view(self, messages, row)
        return [{**m, "content": broken(m["content"])} if m["role"] == "user" else m for m in view]


def _view(
    user: ModelUser | EndpointUser, messages: Sequence[Message], row: Mapping[str, Any] | None
) -> list[Message]:
    """The conversation as a model that plays the user is given it; the row's columns fill in its system prompt."""
    return as_user_sees(
        messages,
        system_prompt=None if user.system_prompt is None else filled(user.system_prompt, row or {}),
        opening=user.opening,
        user_role=user.user_role,
        policy_role=user.policy_role,
    )
