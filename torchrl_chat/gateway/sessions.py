"""A session: one agent's episode, whatever requests it is made of.

A session takes :class:`~torchrl_chat.gateway.calls.Call` values and gives :class:`Exchange` values, each of which will hold a
:class:`~torchrl_chat.gateway.calls.Reply`. It belongs to one event loop. What is sampled, for how long, with which settings and seed is the
session's affair, not the agent's.

Law of this file: what an agent sends decides what the model sees, and nothing that the model sampled is changed by it. A request
that fails leaves the session as it was.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import itertools
import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from torchrl_chat import telemetry
from torchrl_chat.conversation import StopReason, Transcript, Turn, answer, append
from torchrl_chat.conversation.limits import NO_LIMIT
from torchrl_chat.gateway.bodies import Bodies, Body
from torchrl_chat.gateway.calls import Call, Kind, Refusal, Reply, Usage
from torchrl_chat.gateway.ends import checked_end
from torchrl_chat.gateway.engines import Ask, Engine
from torchrl_chat.gateway.exchanges import Exchange, Exchanges
from torchrl_chat.gateway.matching import said
from torchrl_chat.gateway.settings import Settings
from torchrl_chat.gateway.streaming import Teller
from torchrl_chat.gateway.templates import Templates
from torchrl_chat.gateway.tree import Answer, Match, Tree
from torchrl_chat.gateway.watching import sampled, watched
from torchrl_chat.gateway.wording import for_ledger, stopped, told, turn_kind
from torchrl_chat.messages import Message, MessageError
from torchrl_chat.seeds import mixed
from torchrl_chat.templates import ChatTemplate, ChatTemplateError

_log = logging.getLogger("torchrl_chat.gateway")

_USED_UP = (StopReason.MAX_TURNS, StopReason.MAX_TOKENS, StopReason.MAX_TOOL_CALLS)


class Names:
    """Names that no other answer or call of the server has, of letters and digits."""

    def __init__(self) -> None:
        self._begin, self._count = secrets.token_hex(6), itertools.count()

    def __call__(self) -> str:
        """A new one."""
        return f"{self._begin}{next(self._count):08x}"


class Session:
    """One episode.

    Args:
        name: its name, part of its address.
        engine: what samples.
        templates: the model's chat template.
        settings: what the session decides.
        names: makes names that are unique over the server.
        row: the dataset row, for rewards and columns.
        group: what the episodes of one group share.
        seed: of what is sampled; ``None``: the engine's own randomness.
        key: what a client shows to be let in.
    """

    def __init__(
        self,
        name: str,
        engine: Engine,
        templates: Templates,
        settings: Settings | None = None,
        *,
        names: Names | None = None,
        row: Mapping[str, Any] | None = None,
        group: Any = None,
        seed: int | None = None,
        key: str = "",
    ):
        self.name, self.key = name, key
        self.engine, self.templates, self.settings = engine, templates, settings or Settings()
        if unknown := sorted(set(self.settings.sampling) - engine.settings):
            raise ValueError(
                f"sampling has {unknown}: this engine takes {sorted(engine.settings) or 'no settings'} with a request; "
                "what else there is belongs to the engine itself."
            )
        self.row, self.group, self.seed = dict(row or {}), group, seed
        self.tree = Tree()
        self.bodies = Bodies()
        self.stop = StopReason.RUNNING
        self.finished = False
        self.sealed = False
        """Whether it takes no further requests: its agent is done, and what there is will be graded."""
        self.held = False
        """Whether somebody else sees to its end, however long nothing is asked in it."""
        self.reward: float | None = None
        self.success: bool | None = None
        self.reward_parts: dict[str, float] = {}
        self.failure, self.grade_failure, self.extracted = "", "", ""
        self.report: Counter[str] = Counter()
        self.findings: list[str] = []
        """Where a sequence began or forked, and why; and what was asked for and left out."""
        self.begun = time.monotonic()
        self.used = self.begun
        self.sampled, self.turns, self.calls, self.prompted = 0, 0, 0, 0
        self._names = names or Names()
        self._exchanges = Exchanges()
        self._broken: dict[bytes, str] = {}
        self._untold: set[bytes] = set()

    def __repr__(self) -> str:
        state = self.stop.word if self.finished or self.stop else "running"
        return f"Session({self.name!r}, {self.turns} answers, {self.sampled} tokens, {state})"

    # ------------------------------------------------------------------ requests
    @property
    def flying(self) -> int:
        """How many requests are on their way."""
        return self._exchanges.flying

    def open(self, call: Call, body: bytes = b"", digest: bytes | None = None) -> Exchange:
        """The exchange of a request: a new one, or that of the request that it tries again (``B2``).

        Args:
            call: the request.
            body: its bytes, or whatever is the same for a request that is tried again.
            digest: the SHA-256 of that, where it is known.

        Raises:
            Refusal: it is not to be answered.
        """
        self.used = time.monotonic()
        if self.finished or self.sealed:
            self._check(call)
        if digest is None:
            digest = hashlib.sha256(body).digest()
        known = self._exchanges.tried(call, digest)
        if known is not None:
            self.report["retries"] += 1
            return known
        self._check(call)
        exchange = Exchange(self._names(), int(time.time()), digest)
        self._exchanges.add(exchange, call.key)
        answering = self._answered(exchange, call)
        task = watched(answering, self, call) if telemetry.on() else answering
        exchange.task = asyncio.get_running_loop().create_task(task)
        exchange.task.add_done_callback(lambda _: self._exchanges.settled(exchange))
        return exchange

    def _check(self, call: Call) -> None:
        limits = self.settings.limits
        if self.finished or self.sealed:
            raise Refusal(
                "this session is finished: its episode takes no further requests.", Kind.BUDGET, code="finished"
            )
        if not self.stop and limits.max_seconds is not None and time.monotonic() - self.begun >= limits.max_seconds:
            self.stop = StopReason.MAX_TIME
        if self.stop:
            raise Refusal(
                f"the session has used up its budget ({self.stop.word}, {self._budget(self.stop)}): the episode is over.",
                Kind.BUDGET,
                code=self.stop.word,
            )
        if call.n > self.settings.max_choices:
            raise Refusal(f"'n' is {call.n}: a request may ask for {self.settings.max_choices} answers.", param="n")
        if not call.messages and call.previous is None:
            raise Refusal("there are no messages: give at least one.", param="messages")
        for name, value in call.asked.values.items():
            if name == "response_format" and name not in self.engine.settings:
                raise Refusal(
                    f"'response_format' of the type {value.get('type') if isinstance(value, dict) else value!r} is not to be had: "
                    "this engine does not constrain what it samples. Ask for it in words.",
                    param=name,
                )

    def _budget(self, stop: StopReason) -> str:
        value = getattr(self.settings.limits, {"max_time": "max_seconds"}.get(stop.word, stop.word), None)
        return "of the session" if value is None else f"{value:g}"

    def left(self, exchange: Exchange) -> None:
        """Say that a client has stopped waiting: without any, sampling goes on for :attr:`Settings.patience` seconds."""
        exchange.waiting -= 1
        task = exchange.task
        if exchange.waiting > 0 or task is None or task.done():
            return

        def give_up() -> None:
            if not exchange.waiting and not task.done():
                self.report["given up"] += 1
                task.cancel()

        asyncio.get_running_loop().call_later(self.settings.patience, give_up)

    def close(self) -> None:
        """Cancel what is on its way."""
        for exchange in self._exchanges.values():
            if exchange.task is not None and not exchange.task.done():
                exchange.task.cancel()

    def seal(self) -> None:
        """Take no further requests, and cancel what is on its way: what is graded does not change meanwhile."""
        self.sealed = True
        self.close()

    @property
    def engine_failure(self) -> str:
        """What the engine said of a request that it failed at and that was not answered since; ``""`` where there is none."""
        return next(iter(self._broken.values()), "")

    def counts(self) -> Counter[str]:
        """What adds up over the sessions of a gateway."""
        found = Counter({f"report: {name}": number for name, number in self.report.items()})
        found.update({"sessions": 1, "answers": self.turns})
        found.update({"sampled tokens": self.sampled, "prompt tokens": self.prompted})
        return found

    def answers_to(self, name: str) -> Answer | None:
        """The answer of a name."""
        return self.tree.names.get(name)

    def keep(self, body: Body, messages: Sequence[Message]) -> None:
        """Remember how a body begins, for the next one; ``messages`` are what its history was read as."""
        if not self.finished:
            self.bodies.keep(body, messages)

    async def count(self, call: Call) -> int:
        """How many tokens the prompt of a request has; nothing is sampled."""
        prompt, _, _, _ = await self._prompt(call)
        return len(prompt)

    # ------------------------------------------------------------------ one answer
    async def _answered(self, exchange: Exchange, call: Call) -> Reply:
        try:
            prompt, match, template, key = await self._prompt(call)
            place = match.place
            before = place.asked
            asks, limits = self._asks(exchange, call, prompt, before, template)
            place.asked += len(asks)
        except BaseException as error:
            if not exchange.prompt.done():
                if isinstance(error, Exception):
                    exchange.prompt.set_exception(error)
                    exchange.prompt.exception()  # whoever waits for the task alone has been told
                else:
                    exchange.prompt.cancel()
            raise
        if template.tools_warning and key not in self._untold:
            self._untold.add(key)
            self._note(template.tools_warning)
        if match.kind != "continues":
            self.report[match.kind] += 1
            self._note(f"answer {self.turns}: {match.kind}: {match.reason}.")
        exchange.prompt.set_result(Usage(len(prompt), 0, _kept(match)))
        exchange.progress.ring()
        begun = time.perf_counter()
        try:
            turns = await self._sampled(asks)
        except BaseException as error:
            if isinstance(error, Refusal) and error.kind is Kind.ENGINE and len(self._broken) < 1000:
                self._broken[exchange.digest] = error.message
            if place.asked == before + len(asks):  # the next try samples from the same seed
                place.asked = before
            raise
        exchange.seconds = time.perf_counter() - begun
        self._broken.pop(exchange.digest, None)
        kind = (key, "answer", prompt.course.shape)
        # Entered is what comes of a second call, which costs its own tokens only.
        if not self.templates.proved(kind):
            await self._proving(kind, answer, [prompt], [dataclasses.replace(turns[0])], template, {})
        return self._entered(exchange, call, prompt, match, template, key, turns, limits)

    async def _prompt(self, call: Call) -> tuple[Transcript, Match, ChatTemplate, bytes]:
        """The prompt of a request, and where it stands."""
        previous = None
        if call.previous is not None:
            previous = self.tree.names.get(call.previous)
            if previous is None:
                raise Refusal(
                    f"this session has no answer of the name {call.previous[:80]!r} to go on from.",
                    Kind.MISSING,
                    param="previous_response_id",
                )
        tools = call.tools
        had: Any = b"" if previous is None else previous.tools
        key = had if tools is None else self.templates.key(tools)
        template = self.templates.get(key)
        if template is None:
            if tools is None:
                raise Refusal(
                    "the tools of the answer that the request goes on from are not known any more.", param="tools"
                )
            template = await asyncio.to_thread(self._template, key, tools)
        match = self.tree.match(key, call.messages, previous, call.instructions)
        prompt = await self._proving((key, "prompt", *turn_kind(match)), self._written, match, template)
        return prompt, match, template, key

    async def _proving(self, kind: Hashable, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function returns; in a thread, where it may have to prove something about the template first.

        That is done once for each kind of turn, and takes a second or more with a large vocabulary: other sessions go on meanwhile.
        """
        if self.templates.proved(kind):
            return function(*arguments)
        result = await asyncio.to_thread(function, *arguments)
        self.templates.prove(kind)
        return result

    def _template(self, key: Any, tools: Sequence[Mapping[str, Any]]) -> ChatTemplate:
        try:
            return self.templates.of(key, tools)
        except Exception as error:  # schemas that cannot be written out, or that the template refuses
            raise Refusal(f"the tools cannot be shown to this model: {error}", param="tools") from None

    def _written(self, match: Match, template: ChatTemplate) -> Transcript:
        """The ledger up to the prompt: what is continued, id for id, and what stands behind it; or a sequence that begins."""
        try:
            if match.answer is not None:
                before = match.answer.transcript
                rest = for_ledger(match.messages[match.start :], match.calls)
                try:
                    [prompt] = append([before], [rest], template, self.settings.history)
                except ChatTemplateError as error:
                    # The template does not go on like this; a sequence of its own may still say it.
                    match.reason = f"the template cannot go on from the history ({type(error).__name__})"
                    match.answer, match.start, match.kind = None, 0, "restarts"
                else:
                    if prompt.branches:
                        match.answer, match.kind = None, "restarts"
                        match.reason = "the template writes the past anew"
                        prompt = dataclasses.replace(prompt, branches=())
                    return prompt
            messages = for_ledger(match.messages, match.calls)
            [rendered] = template.render_batch([messages])
        except (ChatTemplateError, MessageError) as error:
            raise Refusal(f"the model's chat template refuses these messages: {error}", param="messages") from None
        return Transcript.start(rendered.ids, messages)

    def _asks(
        self, exchange: Exchange, call: Call, prompt: Transcript, before: int, template: ChatTemplate
    ) -> tuple[list[Ask], list[int]]:
        """What the engine is asked, once for each choice, and how many tokens each may have."""
        settings, values = self.settings, call.asked.values
        self._check(call)  # once more: others may have used up the budget while the prompt was written
        left = settings.limits.tokens_left(prompt, template, self.sampled)
        if left <= 0:
            self.report["context full"] += 1
            raise Refusal(
                f"the prompt has {len(prompt)} tokens, and the context {settings.limits.max_context}: no answer fits.",
                Kind.CONTEXT,
                param="messages",
            )
        stop = call.asked.stop if "stop" in settings.allow else ()
        sampling = settings.sampling
        if values or call.asked.stop:
            allowed = {
                name: value for name, value in values.items() if name in settings.allow or name == "response_format"
            }
            if "max_tokens" in allowed:
                left = min(left, int(allowed.pop("max_tokens")))
            ignored = sorted({*values} - {*allowed} - {"max_tokens"}) + (
                ["stop"] if call.asked.stop and not stop else []
            )
            if ignored:
                self._note(f"settings of the agent that are not looked at: {', '.join(ignored)}.")
            taken = {name: value for name, value in allowed.items() if name in self.engine.settings}
            sampling = {**sampling, **taken}
        for note in call.told.get("notes", ()):
            self._note(note)
        asks = []
        for choice in range(call.n):
            number = before + choice
            seed = None if self.seed is None else self.seed if number == 0 else mixed(self.seed, "sample", number)
            limit = None if left >= NO_LIMIT else left
            told = Teller(exchange.progress, choice, template, prompt, stop) if call.stream else None
            asks.append(Ask(prompt, limit, seed, sampling, stop, told))
        return asks, [left] * call.n

    async def _sampled(self, asks: Sequence[Ask]) -> list[Turn]:
        if len(asks) == 1:
            results: list[Any] = [await self._sample(asks[0])]
        else:
            results = list(await asyncio.gather(*map(self._sample, asks)))
        return results

    async def _sample(self, ask: Ask) -> Turn:
        try:
            return await (sampled(self.engine, ask) if telemetry.on() else self.engine.sample(ask))
        except Refusal:
            raise
        except Exception as error:  # an engine is anybody's: what it raises is this request's affair
            self.report["engine errors"] += 1
            _log.warning("the engine failed", extra={"session": self.name, "failure": type(error).__name__})
            raise Refusal(f"the engine failed: {type(error).__name__}: {error}"[:400], Kind.ENGINE) from error

    def _entered(
        self,
        exchange: Exchange,
        call: Call,
        prompt: Transcript,
        match: Match,
        template: ChatTemplate,
        key: bytes,
        turns: Sequence[Turn],
        limits: Sequence[int],
    ) -> Reply:
        """Enter what was sampled, and tell it."""
        if self.finished or self.sealed:
            raise Refusal("this session was finished meanwhile.", Kind.BUDGET, code="finished")
        choices, completion = [], 0
        for turn, limit in zip(turns, limits, strict=True):
            if self.stop in _USED_UP:  # others may have sampled meanwhile, or the choice before
                break
            if self.settings.limits.max_tokens is not None:
                limit = min(limit, self.settings.limits.max_tokens - self.sampled)
            if limit <= 0:
                continue
            stop, turn = stopped(turn, call.asked.stop if "stop" in self.settings.allow else (), template)
            if limit < NO_LIMIT:
                turn = dataclasses.replace(turn, limit=limit)
            try:
                [after] = answer([prompt], [turn], template)
            except ValueError as error:
                raise Refusal(f"what the engine sampled cannot be entered: {error}", Kind.ENGINE) from error
            choice, names = told(after, stop, call, template, self._names)
            given = Answer(
                exchange.name,
                key,
                said(choice.message),
                after,
                names,
                match.answer,
                system=match.system,
                kind=match.kind,
                reason=match.reason,
            )
            self.tree.enter(match.place, given)
            exchange.answers.append(given)
            last = after.spans[-1]
            count = last.end - last.start
            completion += count
            self.turns += 1
            self.sampled += count
            called = after.messages[-1]
            self.calls += len(called.get("tool_calls") or ()) + len(called.get("invalid_tool_calls") or ())
            choices.append(choice)
            self._limit(after, template, limit)
        if not choices:
            self.stop = self.stop or StopReason.MAX_TOKENS
            self._check(call)
        self.used = time.monotonic()
        self.prompted += len(prompt)
        shown = tuple(prompt.token_array.tolist()) if call.told.get("ids") else ()
        return Reply(
            exchange.name,
            tuple(choices),
            Usage(len(prompt), completion, _kept(match)),
            exchange.created,
            call.model,
            shown,
        )

    def _limit(self, after: Transcript, template: ChatTemplate, had: int) -> None:
        """Note which limit an answer has reached. A full context ends its sequence only: the agent may make room."""
        stop = self.settings.limits.reason(
            after,
            template,
            had=had,
            seconds=time.monotonic() - self.begun,
            calls=self.calls,
            sampled=self.sampled,
            turns=self.turns,
        )
        most = self.settings.limits.max_turns
        if stop is StopReason.CONTEXT_FULL and most is not None and self.turns >= most:
            stop = StopReason.MAX_TURNS  # there is no further sequence to make room in
        if stop not in (StopReason.RUNNING, StopReason.CONTEXT_FULL) and not self.stop:
            self.stop = stop

    def _note(self, finding: str) -> None:
        if len(self.findings) < 1000 and (not self.findings or finding not in self.findings[-8:]):
            self.findings.append(finding)

    # ------------------------------------------------------------------ the end
    def finish(
        self,
        reward: float | None = None,
        *,
        success: bool | None = None,
        parts: Mapping[str, float] | None = None,
        failure: str = "",
        grade_failure: str = "",
        extracted: str = "",
        stop: StopReason = StopReason.ANSWERED,
    ) -> None:
        """End the episode; a second time changes nothing.

        Args:
            reward: what it is worth, a finite number.

        Keyword Args:
            success: whether the task was solved; where the reward is above 0, if ``None``.
            parts: the components of the reward.
            failure: why the episode is not to be learned from, if it is not.
            grade_failure: why there is no grade, if none came.
            extracted: the final answer that a verifier found.
            stop: why it ended, unless a limit has ended it.

        Raises:
            ValueError: a value that it cannot be; the session stays as it was.
        """
        end = checked_end(
            reward,
            success=success,
            parts=parts,
            failure=failure,
            grade_failure=grade_failure,
            extracted=extracted,
            stop=stop,
        )
        if self.finished:
            return
        self.finished = True
        self.seal()
        vars(self).update(end, stop=self.stop or end["stop"])
        # Of the requests nothing is needed any more: what they said and got stands in the tree.
        self._exchanges = Exchanges()
        self.tree.forget()
        self.bodies.forget()

    def transcript(self) -> Transcript | None:
        """The episode as one ledger: its sequences are its branches; ``None`` where nothing was sampled and delivered."""
        return self.tree.ledger()


def _kept(match: Match) -> int:
    """How many tokens of a prompt an earlier answer had in its sequence."""
    return 0 if match.answer is None else len(match.answer.transcript)
