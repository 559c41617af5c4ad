"""What an audit of a chat template found, as plain data with one stable JSON form.

The keys are a contract (:data:`SCHEMA`): new ones may be added, none changes its meaning under the same number.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from torchrl_chat.templates.dialects import Pair

SCHEMA = 1
"""Version of the JSON form."""


class Status(StrEnum):
    """What became of one capability."""

    PROVED = "proved"
    """The next prompt is exact: this kind of turn is extended."""
    REFUSED = "refused"
    """The template renders such a turn, but an exact extension is not proved; the environment raises."""
    UNSUPPORTED = "unsupported"
    """The template itself raises at such a turn, or leaves a message of it out."""


class Origin(StrEnum):
    """Where a token of a tail comes from."""

    STOP = "sampled stop"
    """The policy sampled it: it ends the turn."""
    CLOSE = "close"
    """The template's, whatever follows the turn."""
    NEW = "new"
    """The new messages, with their headers."""
    GENERATION_PROMPT = "generation prompt"
    """What opens the policy's next turn."""


@dataclass(frozen=True, slots=True)
class Token:
    """A token."""

    id: int
    text: str


@dataclass(frozen=True, slots=True)
class TailToken(Token):
    """One token behind an answer."""

    origin: Origin


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found of one capability.

    Attributes:
        name: its key, the same in every report.
        title: the same for people.
        status: see :class:`Status`.
        mode: ``"compiled"`` if a turn costs no rendering once it is proved, ``"rendered"`` if the template runs
            at each turn; ``None`` where nothing is proved.
        reason: why it is refused or unsupported.
        note: what else is worth knowing of it.
        proof_ms: milliseconds that the first turn of this kind took. What this process has proved before (an
            earlier capability's close, say) is not proved again.
        tail: the end of the turn and what follows it, token by token.
    """

    name: str
    title: str
    status: Status
    mode: str | None = None
    reason: str | None = None
    note: str | None = None
    proof_ms: float = 0.0
    tail: tuple[TailToken, ...] = ()


@dataclass(frozen=True, slots=True)
class Rewrite:
    """What the template makes of an earlier turn, once a message follows: history policy ``"template"`` branches there.

    Attributes:
        turn: the kind of turn.
        rewrites: whether its text changes; ``None`` if that cannot be told.
        before: the end of the turn as the model saw and wrote it, around the first change.
        after: the same as the template writes it later.
        reason: why it cannot be told, or cannot be followed.
    """

    turn: str
    rewrites: bool | None
    before: str | None = None
    after: str | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Drift:
    """Whether another way to the next prompt gives the exact one.

    Attributes:
        turn: the kind of turn: ``"user"``, ``"tool"`` or ``"reasoning"``.
        method: a key of :data:`torchrl_chat.audit.drift.METHODS`.
        exact: whether the ids are the same; ``None`` where there is no exact prompt to compare with.
        difference: the first difference, or why the method gives no prompt.
    """

    turn: str
    method: str
    exact: bool | None
    difference: str | None = None


@dataclass(frozen=True, slots=True)
class Parsing:
    """What is looked for in a sampled answer.

    Attributes:
        reasoning: delimiters of reasoning.
        segments: whether an answer is a row of segments with headers (gpt-oss channels).
        tool_calls: delimiters of tool calls; an empty ``close`` means that the opening alone marks them.
        bare_json: whether a call is a bare JSON object.
        response_template: whether the tokenizer declares a parser of its own, which is asked first.
    """

    reasoning: tuple[Pair, ...]
    segments: bool
    tool_calls: tuple[Pair, ...]
    bare_json: bool
    response_template: bool


@dataclass(frozen=True, slots=True)
class Template:
    """The template that was audited.

    Attributes:
        sha256: hash of its source.
        length: of its source, in characters.
        wants_parts: whether it reads content as a list of parts only.
        variables: the further variables that it was given.
        clock: whether it asks for today's date.
        date: today's date in a prompt, if one stands there.
        generation_prompt: the text that opens an assistant turn.
        opens_reasoning: whether that text opens the reasoning too.
    """

    sha256: str
    length: int
    wants_parts: bool
    variables: dict[str, Any]
    clock: bool
    date: str | None
    generation_prompt: str | None
    opens_reasoning: bool


@dataclass(frozen=True, slots=True)
class Report:
    """All that an audit found; :meth:`as_dict` is its JSON form.

    Example:
        >>> report = audit(tokenizer)
        >>> report.proved, report["user_turns"].mode
        (True, 'compiled')
        >>> json.dumps(report.as_dict())
    """

    schema: int
    tokenizer: str
    template: Template
    parsing: Parsing
    stop_tokens: tuple[Token, ...]
    capabilities: tuple[Finding, ...]
    history: tuple[Rewrite, ...]
    drift: tuple[Drift, ...]
    warnings: tuple[str, ...] = ()
    """What is proved all the same, and is hardly meant: special tokens that the tokenizer does not have."""

    @property
    def proved(self) -> bool:
        """Whether user turns are proved: what every environment needs."""
        return self["user_turns"].status is Status.PROVED

    def __getitem__(self, name: str) -> Finding:
        """The finding of one capability."""
        for finding in self.capabilities:
            if finding.name == name:
                return finding
        raise KeyError(f"no capability {name!r}: there are {[finding.name for finding in self.capabilities]}.")

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON knows it: dicts, lists, strings, numbers, booleans and ``None``."""
        return {**json.loads(json.dumps(asdict(self), default=repr)), "proved": self.proved}
