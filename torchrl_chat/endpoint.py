"""A model behind an OpenAI-compatible endpoint: the one client with which a policy, a judge and a simulated user ask.

Law of this file: what lets somebody in (a key, a password in a URL, a header) leaves a process in requests only. Whatever is
shown or written of an endpoint goes through :func:`shown_url`, and what it says through :class:`Secrets`, before it is cut
to a length: half a key is a key's half.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import os
import re
import threading
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal
from urllib.parse import parse_qsl, quote, unquote, urlsplit, urlunsplit

from torchrl_chat import replies, telemetry
from torchrl_chat.posting import Poster, goes_through_proxy

RESERVED = ("model", "messages", "temperature", "max_tokens", "n", "stream", "timeout")
"""Arguments of a request that options of their own set, or that are not supported."""

HIDDEN = "[hidden]"
"""What is shown in the place of a secret."""

PLACE = re.compile(r"\{([A-Za-z_]\w*)\}", re.ASCII)
"""A name in a prompt that is to be filled in."""

_SHORTEST = 4  # characters; anything shorter stands in ordinary words
_TELLING = re.compile(r"key|token|secret|sig|pass|auth|cred", re.IGNORECASE)
_NOBODYS = {"none", "empty", "bearer", "basic", "dummy", "token"}
_log = logging.getLogger(__name__)


class Secrets:
    """What must not be shown of an endpoint: its key, the password of its URL, the values of its headers.

    Args:
        values: the secrets; those of fewer than four characters, which stand in ordinary words, are not looked for.

    Example:
        >>> secrets = Secrets(["sk-123456"])
        >>> secrets.hide("Incorrect API key: sk-123456."), "sk-123456" in secrets
        ('Incorrect API key: [hidden].', True)
    """

    def __init__(self, values: Iterable[str] = ()):
        spelled: set[str] = set()
        for value in values:
            if len(value) >= _SHORTEST and value.lower() not in _NOBODYS:
                spelled |= {value, quote(value, safe=""), json.dumps(value)[1:-1], repr(value)[1:-1]}
        self._spelled = sorted(spelled, key=len, reverse=True)

    def __contains__(self, text: str) -> bool:
        return any(secret in text for secret in self._spelled)

    def hide(self, text: str) -> str:
        """The text without them."""
        for secret in self._spelled:
            text = text.replace(secret, HIDDEN)
        return text


def of_url(url: str) -> list[str]:
    """What lets somebody in, of a URL: its password, and the values in its query whose names tell."""
    parts = urlsplit(url)
    found = [unquote(value) for name, value in parse_qsl(parts.query) if _TELLING.search(name)]
    if parts.password:
        name, password = unquote(parts.username or ""), unquote(parts.password)
        found += [password, parts.password, basic(name, password).partition(" ")[2]]
    elif parts.username:  # a token alone stands there, too
        found += [unquote(parts.username), basic(unquote(parts.username), "").partition(" ")[2]]
    return found


def _of_extra(extra: Mapping[str, Any]) -> list[str]:
    found = []
    for name, value in extra.items():
        if name in ("extra_headers", "extra_query", "extra_body") and isinstance(value, Mapping):
            for inner, text in value.items():
                if isinstance(text, str) and (name == "extra_headers" or _TELLING.search(str(inner))):
                    found += [text, *text.split()]
        elif isinstance(value, str) and _TELLING.search(name):
            found.append(value)
    return found


def basic(name: str, password: str) -> str:
    """The header ``Authorization`` of a name and a password."""
    return "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()


def shown_url(url: str | None) -> str | None:
    """A URL without what lets somebody in.

    Example:
        >>> shown_url("https://me:secret@example.org/v1?api-key=abc&v=2")
        'https://[hidden]@example.org/v1?api-key=[hidden]&v=2'
    """
    if url is None:
        return None
    parts = urlsplit(url)
    _, at, host = parts.netloc.rpartition("@")
    query = re.sub(
        r"([^&=]+)=([^&]*)", lambda m: f"{m[1]}={HIDDEN}" if _TELLING.search(m[1]) else m[0], parts.query
    )
    return urlunsplit(parts._replace(netloc=f"{HIDDEN}@{host}" if at else host, query=query))


def without_login(url: str) -> tuple[str, str | None]:
    """A URL without name and password, and the header ``Authorization`` that says the same.

    An HTTP client writes the URL of each request into its log; headers, it does not.
    """
    parts = urlsplit(url)
    if parts.username is None and parts.password is None:
        return url, None
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=host)), basic(
        unquote(parts.username or ""), unquote(parts.password or "")
    )


def filled(prompt: str, values: Mapping[str, Any]) -> str:
    """A prompt with the values in the places ``{name}``; other braces stay, and nothing is replaced in what was filled in.

    Example:
        >>> filled("You want to {goal}. {x}", {"goal": "book {x}"})
        'You want to book {x}. {x}'
    """
    return PLACE.sub(lambda place: str(values.get(place[1], place[0])), prompt)


def broken(text: str) -> str:
    """A text whose control tokens, such as ``<|im_end|>``, are broken by a space: the endpoint's server may obey them."""
    return re.sub(r"<(?=[|｜])", "< ", text)


def failure(error: Exception) -> str:
    """Why a request failed, in a line of at most 400 characters."""
    return f"{type(error).__name__}: {error}"[:400]


@dataclass
class Usage:
    """What was asked of an endpoint so far, in this process."""

    calls: int = 0
    """Requests to the endpoint; one that is tried again counts once."""
    cached: int = 0
    """Replies of a judge that needed no request: from its cache, or shared with the same request on its way."""
    failed: int = 0
    """Requests that came to nothing, for whatever reason; a judge's that had no score among them."""
    prompt_tokens: int = 0
    """Tokens read by the model, as the endpoint reports them."""
    completion_tokens: int = 0
    """Tokens written by the model."""


@dataclass(slots=True)
class Reply:
    """What an endpoint replied to one request; not to be written to."""

    text: str = ""
    """What the model said; empty where it only called tools."""
    finish_reason: str | None = None
    """Why it stopped."""
    ids: list[int] | None = None
    """The sampled ids, where the server tells them."""
    log_probs: list[float] | None = None
    """Log-probs, where it tells one for each of its tokens."""
    prompt_ids: list[int] | None = None
    """The prompt that it read, where it tells that."""
    calls: tuple[Mapping[str, Any], ...] = ()
    """Tool calls that the server took out of the text, as a message of the ledger has them."""
    versions: tuple[tuple[int, int | None], ...] = ()
    """Which weights sampled the ids, ``(start, version)`` each, where the server tells that by numbers."""
    tokens: tuple[int | None, int | None] = (None, None)
    """How many tokens the model read and wrote, where the server tells that."""


@dataclass(eq=False)
class Endpoint:
    """A model behind an OpenAI-compatible endpoint; whoever asks one (a policy, a judge, a user) is one.

    A dataclass that is made of it is declared with ``repr=False``, or it would show its headers.

    Rate limits (429), errors of the server (5xx), timeouts and lost connections are tried again by the ``openai`` library:
    after the time that ``Retry-After`` asks for (version 3: up to two minutes, and beyond that it gives up), or with
    exponential backoff and jitter; other refusals are not.

    Connections and slots belong to the event loop in which they are used first. A copy in another process makes its own
    connections and counts its own usage. The key is pickled only if it was given as ``api_key``; one from the environment is
    read where the copy runs. What is said and shown has no secrets: key, password and headers are hidden.

    Args:
        model: the model's name at the endpoint.
        base_url: the endpoint, ``"http://localhost:8000/v1"``; ``None``: the environment's ``OPENAI_BASE_URL``, or OpenAI.
        api_key: ``None``: the environment's ``OPENAI_API_KEY``; with a ``base_url`` there may be none.

    Keyword Args:
        extra: further arguments of a request: ``{"top_p": 0.9, "extra_body": {...}}``.
        concurrency: how many requests are on their way at once, per event loop.
        retries: how often a request is tried again.
        timeout: seconds without a sign of life after which one try is given up.
        deadline: seconds after which a request is given up with all its tries; waiting for a free slot does not count.

    Attributes:
        usage: what was asked so far; only read it.

    Raises:
        ValueError: an option has no such value.

    Example:
        >>> Endpoint("m", "https://me:secret@example.org/v1", extra={"extra_headers": {"X": "open sesame"}})
        Endpoint(model='m', base_url='https://[hidden]@example.org/v1', extra={'extra_headers': {'X': '[hidden]'}}, \
concurrency=32, retries=4, timeout=60.0, deadline=300.0)
    """

    reserved: ClassVar[Sequence[str]] = RESERVED
    """What ``extra`` must not hold."""
    least: ClassVar[Mapping[str, int]] = {"concurrency": 1, "retries": 0}
    """What options must be at least."""
    hides: ClassVar[bool] = False
    """Whether a reply that repeats a secret is taken, without it, instead of refused."""
    _own: ClassVar[Sequence[str]] = (
        "usage",
        "_lock",
        "_loops",
        "_posters",
        "_hidden",
    )  # what _begin makes, for this process

    model: str
    base_url: str | None = None
    api_key: str | None = field(default=None, repr=False)
    extra: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    concurrency: int = field(default=32, kw_only=True)
    retries: int = field(default=4, kw_only=True)
    timeout: float = field(default=60.0, kw_only=True)
    deadline: float = field(default=300.0, kw_only=True)

    def __post_init__(self) -> None:
        for name, bound in self.least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected {bound} or more.")
        for name in ("timeout", "deadline"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected seconds, more than 0.")
        if taken := sorted(set(self.extra) & set(self.reserved)):
            raise ValueError(
                f"extra has {taken}: these are set by options of {type(self).__name__}, or not supported."
            )
        self._begin()

    def _begin(self) -> None:
        """Make what a process has for itself, and copies make anew."""
        self.usage = Usage()
        self._lock = threading.Lock()
        self._hidden: tuple[tuple[str, ...], Secrets] = ((), Secrets())  # of what, and how it may be spelled
        self._loops: dict[asyncio.AbstractEventLoop, tuple[Any, asyncio.Semaphore]] = {}
        self._posters: dict[asyncio.AbstractEventLoop, tuple[Any, asyncio.Semaphore]] = {}

    def __repr__(self) -> str:
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.repr}
        values["base_url"] = shown_url(self.base_url)
        shown = ", ".join(f"{name}={value!r}" for name, value in values.items())
        return self.secrets.hide(f"{type(self).__name__}({shown})")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in self._own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    @property
    def secrets(self) -> Secrets:
        """What must not be shown of it; a key and a URL of the environment count too."""
        url = self.base_url if self.base_url is not None else os.environ.get("OPENAI_BASE_URL", "")
        key = self.api_key if self.api_key is not None else os.environ.get("OPENAI_API_KEY", "")
        asked = (url, key, *_of_extra(self.extra))
        if asked != self._hidden[0]:
            self._hidden = asked, Secrets([key, *of_url(url), *asked[2:]])
        return self._hidden[1]

    def count(self, **more: int) -> None:
        """Add to :attr:`usage`."""
        with self._lock:
            for name, value in more.items():
                setattr(self.usage, name, getattr(self.usage, name) + value)

    def connect(self) -> Any:
        """An ``AsyncOpenAI``, for the event loop in which it is used first.

        Raises:
            ImportError: the library ``openai`` is not installed.
            ValueError: there is no key, and no endpoint that may do without one.
        """
        name = type(self).__name__
        try:
            from openai import AsyncOpenAI, OpenAIError
        except ImportError as error:
            raise ImportError(f"{name} needs the openai library: pip install 'torchrl_chat[openai]'.") from error
        given = self.base_url if self.base_url is not None else os.environ.get("OPENAI_BASE_URL") or None
        url, login = (None, None) if given is None else without_login(given)
        options: dict[str, Any] = {"base_url": url, "max_retries": self.retries, "timeout": self.timeout}
        # Headers of single requests stand in the library's own debug log; those of the client do not.
        headers = {**({} if login is None else {"Authorization": login}), **self.extra.get("extra_headers", {})}
        if headers:
            options["default_headers"] = headers
        try:
            return AsyncOpenAI(api_key=self.api_key, **options)
        except OpenAIError as error:
            if self.base_url is None or self.api_key is not None:
                said = self.secrets.hide(str(error))
                raise ValueError(f"{name}(model={self.model!r}) cannot connect: {said}") from None
            return AsyncOpenAI(api_key="none", **options)  # servers of one's own often want no key

    def here(self) -> tuple[Any, asyncio.Semaphore]:
        """The client and the slots of the running event loop."""
        loop = asyncio.get_running_loop()
        with self._lock:
            if loop not in self._loops:
                for old in [old for old in self._loops if old.is_closed()]:
                    del self._loops[old]
                self._loops[loop] = self.connect(), asyncio.Semaphore(self.concurrency)
            return self._loops[loop]

    def _beside(self) -> tuple[Any, asyncio.Semaphore]:
        """What posts to vLLM's route for ids, which stands beside ``/v1`` and not below it, and the slots of the running event loop.

        The library is left out: its requests cost more than all that a gateway does. Where a proxy stands between, it is not.
        """
        loop = asyncio.get_running_loop()
        if (found := self._posters.get(loop)) is not None:
            return found
        given = self.base_url if self.base_url is not None else os.environ.get("OPENAI_BASE_URL")
        if not given:
            raise ValueError(
                f"{type(self).__name__}(model={self.model!r}) has no base_url: the route for ids is no API of OpenAI's."
            )
        url, login = without_login(given)
        url = url.rstrip("/").removesuffix("/v1") + "/inference/v1/generate"
        if goes_through_proxy(url):
            client, slots = self.here()
            poster: Any = _ByLibrary(client, url)
        else:
            key = self.api_key if self.api_key is not None else os.environ.get("OPENAI_API_KEY") or "none"
            headers = {"Authorization": login or f"Bearer {key}", **self.extra.get("extra_headers", {})}
            poster = Poster(
                url,
                headers,
                retries=self.retries,
                timeout=self.timeout,
                deadline=self.deadline,
                decode=replies.decoded,
            )
            slots = asyncio.Semaphore(self.concurrency)
        with self._lock:
            for old in [old for old in self._posters if old.is_closed()]:
                del self._posters[old]
            return self._posters.setdefault(loop, (poster, slots))

    async def aclose(self) -> None:
        """Close the connections of the running event loop; they are made anew if it is asked again."""
        with self._lock:
            here = self._loops.pop(asyncio.get_running_loop(), None)
            posted = self._posters.pop(asyncio.get_running_loop(), None)
        if here is not None:
            await here[0].close()
        if posted is not None:
            await posted[0].aclose()

    def request(self, **given: Any) -> dict[str, Any]:
        """The arguments of a request: ``extra`` (but for its headers, which are the client's), and what is given, if not ``None``."""
        extra = {name: value for name, value in self.extra.items() if name != "extra_headers"}
        return {"model": self.model, **extra, **{k: value for k, value in given.items() if value is not None}}

    async def ask(
        self,
        request: Mapping[str, Any],
        api: Literal["chat", "completions", "generate"] = "chat",
        text: bool = True,
        told: Callable[[list[int]], None] | None = None,
    ) -> Reply:
        """What the endpoint replies, when there is a free slot.

        Args:
            request: the arguments, see :meth:`request`.
            api: which API: one of OpenAI's, or vLLM's for ids, ``/inference/v1/generate``, beside them.
            text: whether a reply without a text is none.
            told: takes the ids sampled so far, whenever there are more: the reply is streamed, of the APIs that give ids.

        Raises:
            TimeoutError: no reply came in time.
            ValueError: there is no choice, or no text, or it repeats a key or a password.
            openai.OpenAIError: the endpoint refuses, or cannot be reached; of the route for ids,
                :class:`~torchrl_chat.posting.PostError` or ``OSError``.
            RuntimeError: the same, where the error repeats the key: it is hidden.
        """
        if not telemetry.on():
            return await self._asked(request, api, text, told)
        operation = "chat" if api == "chat" else "text_completion"
        with telemetry.inference(
            operation, self.model, "vllm" if api == "generate" else "openai", "CLIENT"
        ) as span:
            reply = await self._asked(request, api, text, told)
            if span:
                self._tell(span, request, reply)
        return reply

    def _tell(self, span: telemetry.Span, request: Mapping[str, Any], reply: Reply) -> None:
        """Say in a span what was asked and replied."""
        place = urlsplit(self.base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1")
        settings = {**request, **request.get("sampling_params", {})}
        port = place.port or {"http": 80, "https": 443}.get(place.scheme)
        span.set({"server.address": place.hostname, "server.port": port})
        span.set(telemetry.asked(settings, seed=settings.get("seed")))
        span.set(telemetry.used(*reply.tokens, [reply.finish_reason]))
        if telemetry.content() and "messages" in request:
            hide, said = (
                self.secrets.hide,
                [{"role": "assistant", "content": reply.text, "tool_calls": reply.calls}],
            )
            span.set({"gen_ai.input.messages": hide(telemetry.words(request["messages"]))})
            span.set({"gen_ai.output.messages": hide(telemetry.words(said, [reply.finish_reason]))})

    async def _asked(
        self,
        request: Mapping[str, Any],
        api: Literal["chat", "completions", "generate"],
        text: bool,
        told: Callable[[list[int]], None] | None,
    ) -> Reply:
        client, slots = self._beside() if api == "generate" else self.here()
        async with slots:
            self.count(calls=1)
            try:
                if isinstance(client, Poster):  # it keeps the deadline itself
                    reply = await self._posted(client, request, told)
                else:
                    reply = await self._by_library(client, request, api, text, told)
            except Exception as error:  # the library's errors, and whatever it stumbles over in a malformed reply
                self.count(failed=1)
                if isinstance(error, replies.MalformedReply):
                    self._used(error.usage)
                _log.debug("%s did not reply (%s)", self.model, type(error).__name__)
                if str(error) in (secrets := self.secrets):  # what a server says of a key that it refuses
                    raise RuntimeError(f"{type(error).__name__}: {secrets.hide(str(error))}") from None
                raise
        _log.debug("%s replied %r (%s)", self.model, reply.text, reply.finish_reason)
        return reply

    async def _posted(
        self, poster: Poster, request: Mapping[str, Any], told: Callable[[list[int]], None] | None
    ) -> Reply:
        if told is None:
            return self._generated(await poster.post(dict(request)))
        return await self._heard(poster.stream({**request, **_STREAMED}), told)

    async def _by_library(
        self,
        client: Any,
        request: Mapping[str, Any],
        api: Literal["chat", "completions", "generate"],
        text: bool,
        told: Callable[[list[int]], None] | None,
    ) -> Reply:
        try:
            async with asyncio.timeout(self.deadline) as limit:
                if api == "generate":
                    return self._generated(replies.converted(await client.post(request)))
                if told is not None and api == "completions":
                    chunks = await client.completions.create(**request, **_STREAMED)
                    async with chunks:
                        return await self._heard(
                            (replies.converted(chunk.model_dump()) async for chunk in chunks), told
                        )
                endpoint = client.chat.completions if api == "chat" else client.completions
                return self._received(await endpoint.create(**request), text)
        except TimeoutError:
            if limit.expired():
                raise TimeoutError(f"no reply within {self.deadline:g} s, with all tries") from None
            raise

    def _generated(self, reply: replies.Sampled) -> Reply:
        """The reply of vLLM's route for ids."""
        tokens = self._used(reply.usage)  # they were read and written, whatever else is missing
        if len(choices := reply.choices or []) != 1:
            raise replies.MalformedReply(f"it has {len(choices)} choices, and one was asked for.")
        [choice] = choices
        ids, scores = choice.token_ids or [], choice.log_probs
        return Reply(
            choice.text or "",
            choice.finish_reason,
            ids,
            scores if len(scores) == len(ids) else None,
            versions=choice.versions,
            tokens=tokens,
        )

    async def _heard(
        self, events: AsyncGenerator[replies.Sampled, None], told: Callable[[list[int]], None]
    ) -> Reply:
        """The reply of a stream of ids, which is told of as it grows."""
        ids: list[int] = []
        scores: list[float] = []
        scored, last, usage = True, None, None
        versions: tuple[tuple[int, int | None], ...] = ()
        async with contextlib.aclosing(events):
            async for event in events:
                if event.error:
                    raise RuntimeError(f"the server broke off: {str(event.error)[:200]}")
                usage = event.usage or usage
                for choice in event.choices or ():
                    if choice.token_ids:
                        ids += choice.token_ids
                        told(list(ids))
                        await asyncio.sleep(0)  # whoever passes it on does so before more is made of it
                    found = choice.log_probs
                    scored = scored and len(found) == len(choice.token_ids or ())
                    scores += found
                    last, versions = choice.finish_reason or last, choice.versions or versions
        if last is None:
            raise ConnectionError("the stream ended before the answer did")
        return Reply("", last, ids, scores if scored else None, versions=versions, tokens=self._used(usage))

    def _used(self, usage: replies.Tokens | None) -> tuple[int | None, int | None]:
        """How many tokens the model read and wrote, as far as a reply tells it; they are counted."""
        if usage is None:
            return None, None
        read, written = usage.prompt_tokens, usage.completion_tokens
        self.count(prompt_tokens=read or 0, completion_tokens=written or 0)
        return read, written

    def _received(self, completion: Any, needed: bool) -> Reply:
        secrets, usage = self.secrets, getattr(completion, "usage", None)
        read, written = (getattr(usage, f"{what}_tokens", None) or 0 for what in ("prompt", "completion"))
        self.count(prompt_tokens=read, completion_tokens=written)
        choices = getattr(completion, "choices", None)
        choice = choices[0] if choices else None
        message = getattr(choice, "message", None)
        text = getattr(choice, "text", None) if message is None else getattr(message, "content", None)
        if choice is None or (needed and not isinstance(text, str)):
            what = "text" if choices else "choice, and so no text"
            raise ValueError(f"the endpoint returned no {what}: {secrets.hide(repr(completion))[:200]}")
        ids, prompt = getattr(choice, "token_ids", None), getattr(choice, "prompt_token_ids", None)
        if prompt is None:  # vLLM has it beside the choices of a chat
            prompt = getattr(completion, "prompt_token_ids", None)
        reply = Reply(
            text if isinstance(text, str) else "",
            getattr(choice, "finish_reason", None),
            list(ids) if ids else None,
            _log_probs(getattr(choice, "logprobs", None)),
            list(prompt) if prompt else None,
            tuple(_parsed(call) for call in getattr(message, "tool_calls", None) or ()),
            tokens=(None, None) if usage is None else (read, written),
        )
        if f"{reply.text} {reply.calls}" not in secrets:
            return reply
        if self.hides:
            return replace(reply, text=secrets.hide(reply.text))
        raise ValueError("the endpoint's answer repeats a key or a password; it is left out")


class _ByLibrary:
    """Posts as :class:`~torchrl_chat.posting.Poster` does, by the library, which knows proxies."""

    def __init__(self, client: Any, url: str):
        self._client, self._url = client, url

    async def post(self, body: Mapping[str, Any]) -> Any:
        plain = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in body.items()}
        return await self._client.post(self._url, cast_to=object, body=plain)

    async def aclose(self) -> None:
        """The client is closed by whoever made it."""


_STREAMED: Mapping[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}


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
