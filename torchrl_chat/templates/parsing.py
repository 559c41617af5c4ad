"""What a policy sampled, read back as a message (content, reasoning, tool calls), and how the turn ended.

Which delimiters are looked for is decided once, by the chat template's source (``dialects.py``); nothing is
known of any model by its name. Parsing only describes the turn: the ledger keeps the sampled ids whatever
is found here.

Law of this file: no text raises, none is lost. What is not reasoning and not a well-formed call stays in the
content, character for character; only the newlines that templates write around delimiters are dropped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torchrl_chat.messages import Message, content_text
from torchrl_chat.templates.bridge import BY_TEXT, BridgeError, Close, Suffix
from torchrl_chat.templates.codec import TokenCodec
from torchrl_chat.templates.dialects import (
    BARE_JSON,
    Channels,
    channels_of,
    formats_of,
    opening_of,
    pairs_of,
    speaks_bare_json,
    spoken,
)
from torchrl_chat.templates.kinds import AnswerKind, Course, Roles
from torchrl_chat.templates.rendering import Renderer
from torchrl_chat.templates.toolcalls import (
    CallStatus,
    HeadedReader,
    JsonReader,
    ParsedCall,
    Scan,
    TaggedReader,
    as_texts,
    balanced,
    json_at,
    made_call,
    read_json,
)
from torchrl_chat.templates.values import USUAL, Values, manner_of

__all__ = ["AnswerParser", "CallStatus", "ParsedAnswer", "ParsedCall"]


@dataclass(frozen=True, slots=True)
class ParsedAnswer:
    """An assistant turn, taken apart."""

    content: str  # the text without reasoning and without well-formed calls
    # the reasoning; ``None`` if the turn has none, "" if it opened and closed an empty one
    reasoning: str | None = None
    calls: tuple[ParsedCall, ...] = ()  # every call that was found, malformed ones too, in the order of the text
    start: int = 0  # where in the text what is not reasoning begins

    def message(self, role: str = "assistant", calls_before: int = 0) -> Message:
        """The turn as a message: ``reasoning_content`` and ``tool_calls`` are there only if the turn has them.

        A malformed call stays in the content as it was written, and is described under
        ``invalid_tool_calls``: its name, its raw arguments, what is wrong, and where in the text it stands.

        Args:
            role: the policy's role.
            calls_before: the number of calls made earlier in the conversation: ids that are made up go on from it.

        Example:
            >>> ParsedAnswer("Hello", reasoning="A greeting.").message()
            {'role': 'assistant', 'content': 'Hello', 'reasoning_content': 'A greeting.'}
        """
        message: Message = {"role": role, "content": self.content}
        if self.reasoning is not None:
            message["reasoning_content"] = self.reasoning
        good = [call for call in self.calls if call.status is CallStatus.OK]
        if good:
            message["tool_calls"] = [call.message(calls_before + i) for i, call in enumerate(good)]
        if len(good) < len(self.calls):
            message["invalid_tool_calls"] = [
                {"name": c.name, "arguments": c.arguments, "status": c.status.value, "span": list(c.span)}
                for c in self.calls
                if c.status is not CallStatus.OK
            ]
        return message


Piece = tuple[int, int, ParsedCall | None]
"""A stretch of content, and the call that it is, where that is known from its header."""


class AnswerParser:
    """Reads the answers of one chat template.

    Args:
        source: the template's Jinja source.
        controls: the tokenizer's added tokens.
        schema: a response template of transformers (``tokenizer.response_template``); its own parser is then
            asked first, and this one only where that fails. It reports no spans: they cover the whole text.
        parse_calls: false leaves every call in the content, as text.
        parse_reasoning: false leaves the reasoning in the content.
        tools: JSON schemas of the tools: they tell the types of arguments that a format writes without any. An argument
            of which nothing is known stays a string.
        write: writes a call (see :func:`~torchrl_chat.templates.values.manner_of`), which shows how the template spells
            arguments; without it a line break on either side is taken for the template's.

    Example:
        >>> parser = AnswerParser("{{ '<think>\\\\n' }}{{ '<tool_call>\\\\n' }}")
        >>> answer = parser.parse('<think>\\nHm.\\n</think>\\n\\n<tool_call>\\n{"name": "now"}\\n</tool_call>')
        >>> answer.reasoning, answer.content, answer.calls[0].name, answer.calls[0].status.value
        ('Hm.', '', 'now', 'ok')
    """

    def __init__(
        self,
        source: str,
        controls: Iterable[str] = (),
        schema: dict[str, Any] | None = None,
        parse_calls: bool = True,
        parse_reasoning: bool = True,
        tools: Sequence[Any] | None = None,
        write: Callable[[dict[str, Any]], str] | None = None,
    ):
        text = _spoken(source, tuple(controls))
        self.pairs = pairs_of(text) if parse_reasoning else ()
        # Segments carry calls too: a template that speaks in segments is read as segments or not at all.
        self.channels: Channels | None = channels_of(text) if parse_reasoning or parse_calls else None
        self.formats = formats_of(text)
        self.bare_json = speaks_bare_json(text, self.formats)
        self.schema = schema
        self.parse_calls = parse_calls
        self.openings = opening_of(self.pairs, self.channels)
        self.values = Values(
            tools or (), USUAL if write is None else functools.partial(manner_of, write, self._calls)
        )

    def opened_by(self, prompt: str) -> bool:
        """Whether a generation prompt ends by opening the reasoning, so that the answer begins inside it.

        Example:
            >>> AnswerParser("{{ '<think>' }}").opened_by("<|assistant|><think>\\n")
            True
        """
        end = prompt.rstrip()
        return any(end.endswith(opening.rstrip()) for opening in self.openings)

    @property
    def reads_calls(self) -> bool:
        """Whether the template has a format of calls; without one each is text to it.

        Example:
            >>> AnswerParser("{{ '<tool_call>' }}").reads_calls, AnswerParser("{{ content }}").reads_calls
            (True, False)
        """
        return bool(self.formats or self.channels or self.bare_json or self.schema is not None)

    def parse(self, text: str, opened: bool = False, values: Values | None = None) -> ParsedAnswer:
        """Take one answer apart.

        Args:
            text: the turn as sampled, special tokens spelled out, without the tokens that close the turn.
            opened: the generation prompt has opened the reasoning, so the text begins inside it.
            values: reads the arguments of calls, instead of :attr:`values`.

        Returns:
            What was found; no text raises.
        """
        if self.schema is not None and (answer := self._by_schema(text, opened)) is not None:
            return answer
        values = values or self.values
        thoughts, pieces = (
            self._by_channels(text, opened, values) if self.channels else self._by_pairs(text, opened)
        )
        calls: list[ParsedCall] = []
        content: list[str] = []
        for start, end, known in pieces:
            found = []
            if self.parse_calls:
                found = [known] if known is not None else self._calls(text, values, start, end)
            calls += found
            content.append(_remainder(text, start, end, [c.span for c in found if c.status is CallStatus.OK]))
        reasoning, begin = None, 0
        if thoughts is not None:
            edge = 0 if self.channels else 1  # headers of segments stand without line breaks
            reasoning = "\n".join(_trimmed(text[start:end], edge, edge) for start, end in thoughts)
            content = [_trimmed(part, 2 * edge, 0) for part in content]
            begin = pieces[0][0] if pieces else len(text)
            begin += next((k for k in (2, 1) if text.startswith("\n" * k, begin)), 0) if edge else 0
        return ParsedAnswer("\n".join(filter(None, content)), reasoning, tuple(calls), begin)

    def completed(self, text: str, opened: bool, answer: ParsedAnswer, by_itself: bool) -> tuple[ParsedAnswer, str]:
        """An answer with the end of its last call, where that is all that it lacks.

        Engines leave out the token, or the stop string, at which they stopped. Where that was what ends a call
        (``stop=["</tool_call>"]``, or a token that ends block and turn), the call is complete all the same.

        Args:
            text: the turn, as :meth:`parse` got it.
            opened: as in :meth:`parse`.
            answer: what :meth:`parse` found.
            by_itself: whether the policy ended the turn. If not, a call that is not closed may have been going on.

        Returns:
            the answer with the call, and what was missing; ``answer`` and "" where nothing, or more than that, is.
        """
        last = answer.calls[-1] if answer.calls else None
        statuses = (CallStatus.OK, CallStatus.UNCLOSED) if by_itself else (CallStatus.OK,)
        if last is None or last.status not in statuses or last.span[1] < len(text.rstrip()):
            return answer, ""
        for row in self.formats:
            first = next((c.span[0] for c in answer.calls[::-1] if text.startswith(row.open, c.span[0])), -1)
            if not row.close or first < 0 or text.rstrip().endswith(row.close):
                continue
            # Of nested elements nothing tells whether more than the end is missing.
            inner = [reader.close for reader in row.readers if isinstance(reader, (HeadedReader, TaggedReader))]
            for missing in dict.fromkeys([row.close, *(close + row.close for close in inner)]):
                whole = self.parse(text + missing, opened)
                if len(whole.calls) == len(answer.calls) and whole.calls[-1].status is CallStatus.OK:
                    return whole, missing
            break
        return answer, ""

    # ------------------------------------------------------------------ reasoning
    def _by_pairs(self, text: str, opened: bool) -> tuple[list[tuple[int, int]] | None, list[Piece]]:
        """Reasoning and content of a turn that begins with reasoning between a pair of delimiters."""
        start, closes = 0, [pair.close for pair in self.pairs]
        if closes and not opened:
            first = Scan(text).blank(0)
            begun = [pair for pair in self.pairs if text.startswith(pair.open, first)]
            start = first + len(begun[0].open) if begun else 0
            closes = [pair.close for pair in begun[:1]]
            if not begun and (lone := [c for p in self.pairs if text.startswith(c := p.close, first)]):
                start, closes = first, lone  # a close alone is how some templates write "no reasoning"
        if not closes:
            return None, [(0, len(text), None)]
        ends = [(at, at + len(close)) for close in closes if (at := text.find(close, start)) >= 0]
        end, stop = min(ends, default=(len(text), len(text)))
        return [(start, end)], [(stop, len(text), None)]

    def _by_channels(
        self, text: str, opened: bool, values: Values
    ) -> tuple[list[tuple[int, int]] | None, list[Piece]]:
        """Reasoning, content and calls of a turn in segments."""
        row = self.channels
        assert row is not None
        scan, pos = Scan(text, values=values), 0
        thoughts: list[tuple[int, int]] = []
        pieces: list[Piece] = []
        if opened:
            end, pos = self._segment_end(scan, row, 0, row.reasoning[0])
            thoughts.append((0, end))
        while pos < len(text):
            header = row.header.match(text, scan.blank(pos))
            if header is None:
                if row.broken and (begun := row.broken.match(text, scan.blank(pos))):
                    end, stop = self._segment_end(scan, row, begun.end(), None)
                    status = CallStatus.INVALID_JSON if end < len(text) else CallStatus.UNCLOSED
                    call = ParsedCall(begun["name"], text[begun.end() : end], status, (pos, stop))
                    pieces.append((pos, stop, call))
                    pos = stop
                    continue
                if row.tail and scan.holds(row.tail, scan.blank(pos)):
                    pos = scan.blank(pos) + len(row.tail)
                pieces.append((pos, len(text), None))
                break
            groups, body = header.groupdict(), header.end()
            recipient = groups.get("to") or groups.get("to2") or groups.get("to3")
            if groups.get("block"):
                end = len(text.rstrip())
                whole = not row.tail or not scan.holds(row.tail, end - len(row.tail))
                pieces.append((header.start("block"), len(text) if whole else end - len(row.tail), None))
                break
            end, stop = self._segment_end(scan, row, body, groups.get("channel"))
            if row.calls and recipient is not None and recipient not in row.reasoning:
                arguments, closed = text[body:end].strip(), end < len(text) or read_json(text[body:end]) is not None
                call = made_call(recipient, arguments or "{}" if closed else arguments, (header.start(), stop))
                call = as_texts(call, scan, functools.partial(scan.blank, body))
                if not closed:
                    call = replace(call, arguments=arguments, status=CallStatus.UNCLOSED)
                pieces.append((header.start(), stop, call))
            elif groups.get("channel") in row.reasoning or recipient in row.reasoning:
                thoughts.append((body, end))
            else:
                pieces.append((body, end, None))
            pos = stop
        return thoughts or None, pieces

    @staticmethod
    def _segment_end(scan: Scan, row: Channels, body: int, channel: str | None) -> tuple[int, int]:
        """Where a segment's body ends, and where what follows it begins."""
        ends = [end.replace("{channel}", channel or "") for end in row.ends]
        found = [(at, at + len(end)) for end in ends if (at := scan.find(end, body)) >= 0]
        if (at := scan.find(row.fence, body)) >= 0:
            found.append((at, at))
        return min(found, default=(scan.end, scan.end))

    # ------------------------------------------------------------------ calls
    def _calls(self, text: str, values: Values, start: int = 0, end: int | None = None) -> list[ParsedCall]:
        """The calls in a stretch of a text, whatever else it is."""
        scan, pos, calls = Scan(text, end, values), start, list[ParsedCall]()
        while True:
            opens = [(at, i) for i, row in enumerate(self.formats) if (at := scan.find(row.open, pos)) >= 0]
            if not opens:
                break
            at, i = min(opens)
            calls += self.formats[i].read(scan, at)
            pos = calls[-1].span[1]
        if not calls and self.bare_json and (call := _bare_call(scan, start)) is not None:
            return [call]
        return calls

    # ------------------------------------------------------------------ transformers' own parser
    def _by_schema(self, text: str, opened: bool) -> ParsedAnswer | None:
        """The answer as the tokenizer's response template reads it; ``None`` if it cannot."""
        from transformers.utils.chat_parsing import parse_response

        assert self.schema is not None
        anchor = self.schema.get("start_anchor")
        opening = self.openings[0] if opened and self.openings else ""
        prefix = (anchor if isinstance(anchor, str) else "") + opening if opening else ""
        try:
            message = parse_response(text, self.schema, prefix=prefix)
            calls = [_JSON.call(call, (0, len(text))) for call in message.get("tool_calls") or ()]
            content = message.get("content")
            reasoning = next((message[key] for key in REASONING if message.get(key)), None)
            return ParsedAnswer(content_text({"content": content}), reasoning, tuple(calls))
        except Exception:  # whatever a declared pattern raises on sampled text, the text is still an answer
            return None


REASONING = ("reasoning_content", "reasoning", "thinking")
"""The fields in which messages carry reasoning."""
_spoken = functools.lru_cache(maxsize=64)(spoken)
_JSON = JsonReader()


def _bare_call(scan: Scan, start: int) -> ParsedCall | None:
    """The call that a whole content is, if it is one JSON object with a name and arguments."""
    begun = BARE_JSON.match(scan.text, start, scan.end)
    if begun is None:
        return None
    first = scan.blank(start)
    raw = scan.text[first : scan.end].rstrip()
    span = (first, first + len(raw))
    found = json_at(scan, first)
    if found is None:
        return ParsedCall(begun[1], raw, CallStatus.INVALID_JSON if balanced(raw) else CallStatus.UNCLOSED, span)
    if found[1] < span[1]:  # text follows: it only looks like a call
        return None
    return as_texts(_JSON.call(found[0], span), scan, functools.partial(_JSON.place, scan, first))


def _remainder(text: str, start: int, end: int, spans: Sequence[tuple[int, int]]) -> str:
    """A stretch of text without the spans, and without the line breaks that set them off."""
    kept, pos = "", start
    for first, stop in spans:
        part = _trimmed(text[pos:first], 0, 2)
        kept += part if part.strip() else ""
        pos = stop
    rest = text[pos:end]
    if not spans:
        return rest
    if not rest.strip():
        return kept
    return kept + (rest if kept else _trimmed(rest, 1, 0))


def _trimmed(text: str, before: int, after: int) -> str:
    """The text without up to ``before`` newlines at its start and up to ``after`` at its end."""
    for _ in range(before):
        text = text.removeprefix("\n")
    for _ in range(after):
        text = text.removesuffix("\n")
    return text


# ---------------------------------------------------------------------- another parser
class RenderersParser:
    """Parses answers with one of the hand-written renderers of the optional package ``renderers``.

    It is asked only where a user names a family of models (``ChatTemplate(..., renderer="qwen3")``); the bridge itself
    never depends on it.

    Args:
        tokenizer: the tokenizer.
        codec: its codec.
        name: the renderer's name, e.g. ``"qwen3"`` (``renderers.config_from_name``).
        tools: JSON schemas of the tools.

    Raises:
        ImportError: the package is not installed.
        ValueError: it has no renderer of that name.
    """

    def __init__(self, tokenizer: Any, codec: TokenCodec, name: str, tools: Sequence[Any] | None = None):
        try:
            from renderers import config_from_name, create_renderer
        except ImportError as error:
            raise ImportError(
                f"renderer={name!r} needs the package renderers: pip install 'torchrl_chat[renderers]'"
            ) from error
        try:
            self.renderer = create_renderer(tokenizer, config_from_name(name))
        except (KeyError, ValueError) as error:
            raise ValueError(f"the package renderers has no renderer {name!r}: {error}") from error
        self.codec = codec
        self.tools = list(tools) if tools else None

    def parse(self, prompt: Sequence[int] | None, sampled: Sequence[int]) -> ParsedAnswer | None:
        """The answer that ``sampled`` ids are; ``None`` where the package cannot read them.

        Args:
            prompt: the ids before them, where they are known.
            sampled: the ids, the tokens that end the turn included.
        """
        try:
            response = self.renderer.parse_response(
                list(sampled), tools=self.tools, prompt_ids=None if prompt is None else list(prompt)
            )
        except Exception:  # whatever a parser raises on sampled text, the text is still an answer
            return None
        calls = tuple(self._call(call, sampled) for call in response.tool_calls)
        return ParsedAnswer(response.content, response.reasoning_content, calls)

    def _call(self, call: Any, sampled: Sequence[int]) -> ParsedCall:
        status = next((known for known in CallStatus if known == call.status.value), CallStatus.INVALID_JSON)
        span = (0, 0)
        if call.token_span is not None:
            span = tuple(len(text) for text in self.codec.decode([sampled[:end] for end in call.token_span]))  # type: ignore[assignment]
        return ParsedCall(call.name, call.arguments, status, span, call.id)


# ---------------------------------------------------------------------- ids, and how the turn ended
_QUESTION = Course.of([{"role": "user", "content": "?"}])
_A_CALL = AnswerKind(1, False)
OPENING_IDS = 12
"""How many of a prompt's last ids tell whether it has opened the reasoning: more than any delimiter takes."""


class Parsed(NamedTuple):
    """What a policy sampled, read as a message."""

    message: Message  # the same as a message of the conversation
    answer: ParsedAnswer  # content, reasoning and tool calls, without the tokens that end the turn
    text: str  # all of the sampled text, special tokens spelled out
    ended: bool  # whether the turn ended by itself, rather than by a length limit
    stop: int | None  # the token that ended it, if the template knows it as one
    close: Close | BridgeError  # how the template closes such a turn, or why that is not known
    missing: Suffix = Suffix()  # the end of a call that is complete but for it: the engine took it away

    @property
    def ending(self) -> Suffix | None:
        """What closes the turn behind what was sampled, itself not sampled; ``None`` where that is not known."""
        if isinstance(self.close, BridgeError):
            return None
        suffix = self.close.suffix(self.stop)
        if not self.missing.text:
            return suffix
        return Suffix(self.missing.text + suffix.text, (*self.missing.ids, *suffix.ids))


@dataclass(eq=False)
class Reader:
    """Reads the answers of one chat template."""

    renderer: Renderer
    parser: AnswerParser
    peer: RenderersParser | None  # another parser that is asked first
    close: Callable[[Roles, AnswerKind], Close | BridgeError]  # of turns in such conversations, with such answers

    def __post_init__(self) -> None:
        self.codec = self.renderer.codec
        self.eos = self.renderer.tokenizer.eos_token_id
        self._known: dict[Roles, list[Close]] = {}

    def read(
        self,
        sampled: Sequence[Sequence[int]],
        courses: Sequence[Course] | None,
        finish_reasons: Sequence[str | None] | None,
        prompts: Sequence[Sequence[int]] | None,
    ) -> list[Parsed]:
        """See :meth:`ChatTemplate.parse_batch <torchrl_chat.ChatTemplate.parse_batch>`."""
        courses = [_QUESTION] * len(sampled) if courses is None else courses
        reasons = finish_reasons or [None] * len(sampled)
        texts, opened = self.codec.decode(sampled), self._opened(prompts, len(sampled))
        before: Sequence[Sequence[int] | None] = [None] * len(sampled) if prompts is None else prompts
        return list(map(self._parse, sampled, texts, courses, reasons, opened, before))

    def _parse(
        self,
        ids: Sequence[int],
        text: str,
        course: Course,
        reason: str | None,
        thinking: bool,
        prompt: Sequence[int] | None,
    ) -> Parsed:
        last, content = ids[-1], text
        shape = course.shape
        if shape not in self._known:  # the closes that an answer may have, before it is known what it is
            kinds = (AnswerKind(), _A_CALL) if self.parser.parse_calls else (AnswerKind(),)
            closes = [close for kind in kinds if isinstance(close := self.close(shape, kind), Close)]
            self._known[shape] = [close for k, close in enumerate(closes) if close not in closes[:k]]
        known = self._known[shape]
        lead = known[0].lead if known else ""
        stopped = [(close, stop) for close in known if (stop := close.stop(last, text)) is not None]
        ends = last == self.eos or any(close.ends(stop) for close, stop in stopped)
        # Which of the closes applies is known once the answer is parsed; that it ended, and with what, before.
        if stopped and (ends or reason not in (None, "length")):
            rests = [
                close.without_end(text, stop, "" if stop == BY_TEXT else self.codec.token_text(stop))
                for close, stop in stopped
            ]
            content, ends = min(rests, key=len), True
        elif ends:
            content = text.removesuffix(self.codec.token_text(last))
        ended = ends if reason is None else reason != "length"
        answer = self.peer.parse(prompt, ids) if self.peer is not None else None
        missing, ends_call = "", False
        if answer is None:
            answer = self.parser.parse((content if ended else text).removeprefix(lead), thinking)
            if last != self.eos and not any(_ends_turn(close, stop, text) for close, stop in stopped):
                answer, missing, ends_call = self._with_last_call(
                    answer, text.removeprefix(lead), thinking, reason not in (None, "length"), content is not text
                )
        message = answer.message(course.policy, len(course.call_ids))
        own = self.close(shape, AnswerKind.of(message))
        stop = own.stop(last, text) if ended and isinstance(own, Close) and not ends_call else None
        taken = self._taken(missing, own) if missing and isinstance(own, Close) else Suffix()
        return Parsed(message, answer, text, ended, stop, own, taken)

    def _with_last_call(
        self, answer: ParsedAnswer, text: str, thinking: bool, by_itself: bool, stripped: bool
    ) -> tuple[ParsedAnswer, str, bool]:
        """An answer whose end may belong to its last call, or may have been taken away by the engine.

        Returns:
            the answer, the end of the call that was taken away, and whether the turn ends with the call.
        """
        # A token that ends a call is no end of the turn, though a policy may well stop there.
        whole = self.parser.parse(text, thinking) if stripped else answer
        whole, missing = self.parser.completed(text, thinking, whole, by_itself)
        made, before = _made(whole), _made(answer)
        if missing or made > before or (made == before > 0 and len(whole.content) <= len(answer.content)):
            return whole, missing, True
        return answer, "", False

    def _taken(self, missing: str, close: Close) -> Suffix:
        """What the engine took of the end of a call, but for what the template's end of the turn begins with."""
        for stop, heads in close.heads.items():  # a token that ends the turn as well
            if any(heads) and stop != BY_TEXT:
                missing = missing.removesuffix(self.codec.token_text(stop))
        if not missing:
            return Suffix()
        encode = self.codec.encode if self.codec.opens(missing) else self.codec.encode_continuation
        return Suffix(missing, tuple(encode([missing])[0]))

    def _opened(self, prompts: Sequence[Sequence[int]] | None, rows: int) -> list[bool]:
        """For each row, whether the generation prompt has opened the reasoning."""
        if not self.parser.openings:
            return [False] * rows
        if prompts is None:
            return [self._opens_reasoning] * rows
        ends = self.codec.decode([prompt[-OPENING_IDS:] for prompt in prompts])
        return [self.parser.opened_by(end) for end in ends]

    @functools.cached_property
    def _opens_reasoning(self) -> bool:
        """Whether the usual generation prompt opens the reasoning."""
        return self.parser.opened_by(self.renderer.tried([{"role": "user", "content": "hi"}], True))


def _made(answer: ParsedAnswer) -> int:
    """How many calls were made."""
    return sum(call.status is CallStatus.OK for call in answer.calls)


def _ends_turn(close: Close, stop: int, text: str) -> bool:
    """Whether a token that the template writes at the end of a turn ends this one, and not a call in it."""
    heads = tuple(filter(None, close.heads.get(stop, ())))  # empty for a token that closes a call
    return bool(heads) and (stop in close.main or text.endswith(heads))
