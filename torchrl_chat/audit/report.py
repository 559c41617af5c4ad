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

    PROVED = "proved"  # the next prompt is exact: this kind of turn is extended
    REFUSED = (
        "refused"  # the template renders such a turn, but an exact extension is not proved: the environment raises
    )
    UNSUPPORTED = "unsupported"  # the template itself raises at such a turn, or leaves a message of it out


class Origin(StrEnum):
    """Where a token of a tail comes from."""

    STOP = "sampled stop"  # the policy sampled it: it ends the turn
    CLOSE = "close"  # the template's, whatever follows the turn
    NEW = "new"  # the new messages, with their headers
    GENERATION_PROMPT = "generation prompt"  # what opens the policy's next turn


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
    """What was found of one capability."""

    name: str  # its key, the same in every report
    title: str  # the same for people
    status: Status  # see :class:`Status`
    # ``"compiled"`` if a turn costs no rendering once it is proved, ``"rendered"`` if the template runs at
    # each turn; ``None`` where nothing is proved
    mode: str | None = None
    reason: str | None = None  # why it is refused or unsupported
    note: str | None = None  # what else is worth knowing of it
    # milliseconds that the first turn of this kind took. What this process has proved before (an earlier
    # capability's close, say) is not proved again
    proof_ms: float = 0.0
    tail: tuple[TailToken, ...] = ()  # the end of the turn and what follows it, token by token


@dataclass(frozen=True, slots=True)
class Rewrite:
    """What the template makes of an earlier turn, once a message follows: history policy ``"template"`` branches there."""

    turn: str  # the kind of turn
    rewrites: bool | None  # whether its text changes; ``None`` if that cannot be told
    before: str | None = None  # the end of the turn as the model saw and wrote it, around the first change
    after: str | None = None  # the same as the template writes it later
    reason: str | None = None  # why it cannot be told, or cannot be followed


@dataclass(frozen=True, slots=True)
class Drift:
    """Whether another way to the next prompt gives the exact one."""

    turn: str  # the kind of turn: ``"user"``, ``"tool"`` or ``"reasoning"``
    method: str  # a key of :data:`torchrl_chat.audit.drift.METHODS`
    exact: bool | None  # whether the ids are the same; ``None`` where there is no exact prompt to compare with
    difference: str | None = None  # the first difference, or why the method gives no prompt


@dataclass(frozen=True, slots=True)
class Parsing:
    """What is looked for in a sampled answer."""

    reasoning: tuple[Pair, ...]  # delimiters of reasoning
    segments: bool  # whether an answer is a row of segments with headers (gpt-oss channels)
    # delimiters of tool calls; an empty ``close`` means that the opening alone marks them
    tool_calls: tuple[Pair, ...]
    bare_json: bool  # whether a call is a bare JSON object
    response_template: bool  # whether the tokenizer declares a parser of its own, which is asked first


@dataclass(frozen=True, slots=True)
class Template:
    """The template that was audited."""

    sha256: str  # hash of its source
    length: int  # of its source, in characters
    wants_parts: bool  # whether it reads content as a list of parts only
    variables: dict[str, Any]  # the further variables that it was given
    clock: bool  # whether it asks for today's date
    date: str | None  # today's date in a prompt, if one stands there
    generation_prompt: str | None  # the text that opens an assistant turn
    opens_reasoning: bool  # whether that text opens the reasoning too


@dataclass(frozen=True, slots=True)
class Report:
    """All that an audit found; :meth:`as_dict` is its JSON form.

    Example:
        >>> import json
        >>> from torchrl_chat.audit import audit
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> report = audit(tokenizer)
        >>> report.proved, report["user_turns"].mode
        (True, 'compiled')
        >>> text = json.dumps(report.as_dict())
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
