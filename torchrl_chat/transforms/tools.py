"""``ToolExecutor`` and ``PythonInterpreter``: what the policy calls is run, and the results follow in the conversation."""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from tensordict import TensorDictBase
from torchrl.data import Composite, NonTensor, Unbounded
from torchrl.envs import Transform

from torchrl_chat import columns
from torchrl_chat.conversation import Transcript
from torchrl_chat.messages import Message, content_text
from torchrl_chat.sandbox import Sandbox
from torchrl_chat.tools.function import header_name
from torchrl_chat.tools.python import PythonTool, fenced_code
from torchrl_chat.tools.results import ToolResult, ToolStatus
from torchrl_chat.tools.toolbox import Toolbox
from torchrl_chat.transforms.home import alike, chat_env, check_inside, flags, tell_failures

_NO_CALLS_LEFT = "Error: this call was not run: no tool calls are left in this conversation. Answer without one."
_NOT_CLOSED = (
    "Error: the block of code is not closed, so nothing was run. A block ends with a line of ``` and nothing else."
)


class ToolExecutor(Transform):
    """Runs the tool calls of the policy's answers, all rows at once, and appends their results through the ledger.

    A row is answered where its last message has ``tool_calls`` or ``invalid_tool_calls`` (the environment parses them if
    it was given the tools: ``ChatEnv(template_kwargs={"tools": toolbox.schemas})``) and it is not done. Rows
    without a call are untouched. The results stand in messages of role ``tool``; where the chat template takes none
    without a call (a malformed one), in a message of the user. Their tokens are never under the mask, and control tokens
    that they spell stay text. Works in all input modes. Written, over the environment's batch size B:

    - ``"tool_calls"``: int64 (\\*B, 1), the calls of this turn; ``"tool_errors"``: those that did not go well;
    - ``"tool_failure"``: str (\\*B,), why a row's results could not be appended, which truncates it, and stays there while
      the others go on; empty elsewhere;
    - ``"conversation"``: str (\\*B,), a key drawn at the reset, under which tools that keep state keep it. A conversation
      that is branched in two shares that state; it ends when the environment resets the row.

    Several executors in one environment, a :class:`PythonInterpreter` among them, may stand in any order: each call is run
    by the first of them that has its tool. The keys count for all executors together.

    A call is no answer: a :class:`~torchrl_chat.RewardTransform` in the same environment neither ends the dialogue with it
    nor grades it, and a :class:`~torchrl_chat.UserSimulator` leaves it alone, wherever they stand. Put it in front of
    :class:`~torchrl_chat.transforms.Budget`, whose ``max_tool_calls`` it keeps to: what is called beyond is not run.

    **Turns that a limit cut.** A call that stands there whole is run, though the turn behind it was cut by its length: all
    of it was sampled, and what would have followed changes nothing about it. A call that the cut has broken is answered
    with what is wrong with it, as any call that cannot be read; nothing of it is run.

    Args:
        toolbox: a :class:`~torchrl_chat.tools.Toolbox`, or the tools for one. What its tools cannot do without is started
            at the reset, which raises where it cannot be had (the isolation of a sandbox, say).
        fallback_role: the role of results that the template takes from no tool; ``None`` to end the row instead.

    Example:
        >>> from torchrl_chat import ChatEnv, Toolbox
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> def add(a: int, b: int) -> int:
        ...     return a + b
        >>> tools = Toolbox([add])
        >>> env = ChatEnv(tokenizer=tokenizer, template_kwargs={"tools": tools.schemas}, batch_size=(1,))
        >>> env = env.append_transform(ToolExecutor(tools))
    """

    def __init__(self, toolbox: Toolbox | Sequence[Any], *, fallback_role: str | None = "user"):
        super().__init__(
            in_keys=["transcript"], out_keys=["tool_calls", "tool_errors", "tool_failure", "conversation"]
        )
        self.toolbox = toolbox if isinstance(toolbox, Toolbox) else Toolbox(toolbox)
        self.fallback_role = fallback_role
        self._keys: dict[int, str] = {}  # to know what is over: no turn depends on it
        self._written: dict[str, str | None] = {}  # a call of each tool, as the template writes it
        self._warned = False

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_keys": {}, "_written": {}}

    def clone(self) -> Self:
        """A copy that knows of no conversation."""
        copied = super().clone()
        copied._keys, copied._written = {}, {}
        return copied

    def replies_to(self, message: Message) -> bool:
        """Whether this message of the policy calls something, well-formed or not."""
        return bool(message.get("tool_calls") or message.get("invalid_tool_calls"))

    def close(self) -> None:
        """End what the tools hold: sessions, processes, connections. They start anew at the next step."""
        self.toolbox.close()

    # ------------------------------------------------------------------ torchrl's hooks
    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        batch, device = tensordict_reset.batch_size, tensordict_reset.device
        count = batch.numel()
        self.toolbox.start()
        self._check_place()
        reset = tensordict.get("_reset", None)
        chosen = [True] * count if reset is None else reset.reshape(count, -1).any(-1).tolist()
        if self._is_first:
            keys = [uuid.uuid4().hex for _ in range(count)]
        else:
            keys = columns.read_objects(tensordict_reset.get("conversation"), batch)
        self._begin({row: key for row, (key, fresh) in enumerate(zip(keys, chosen, strict=True)) if fresh})
        tensordict_reset.set("conversation", columns.objects(keys, batch, device))
        self._write(tensordict_reset, [0] * count, [0] * count, [""] * count)
        if tensordict_reset.get("truncated", None) is None:
            tensordict_reset.set("truncated", torch.zeros((*batch, 1), dtype=torch.bool, device=device))
        return tensordict_reset

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        batch = next_tensordict.batch_size
        transcripts = columns.read_objects(next_tensordict.get("transcript"), batch)
        keys = columns.read_objects(tensordict.get("conversation"), batch)
        left = tensordict.get("calls_left", None)
        limits = [None] * len(keys) if left is None else left.reshape(len(keys)).tolist()
        over = flags(next_tensordict, "done")
        goes = columns.stepped(tensordict)
        calls = [
            None if finished or not going or transcript.ended is None else self._calls(transcript, limit)
            for transcript, finished, going, limit in zip(transcripts, over, goes, limits, strict=True)
        ]
        results = self._run(calls, keys)
        answers: list[list[Message] | None] = [None] * len(keys)
        counts, errors = [0] * len(keys), [0] * len(keys)
        for i, (row, found) in enumerate(zip(calls, results, strict=True)):
            if row is None:
                continue
            counts[i] = row.count
            errors[i] = row.count - sum(result.status is ToolStatus.OK for result in found)
            answers[i] = row.answer([result.message for result in found])
        following, failures = self._append(next_tensordict, transcripts, answers)
        failures = tell_failures(following, tensordict, failures)
        if not all(goes) and tensordict.get("tool_failure", None) is not None:  # the others stay as they are
            before = columns.read_objects(tensordict.get("tool_failure"), batch)
            failures = [new if going else old for new, going, old in zip(failures, goes, before, strict=True)]
        following.set("conversation", columns.objects(keys, batch, following.device))
        if not self._is_first:
            counts, errors, failures = self._with_earlier(following, counts, errors, failures)
        self._write(following, counts, errors, failures)
        if any(failures):
            ended = torch.tensor([bool(failure) for failure in failures], device=following.device).reshape(
                *batch, 1
            )
            for key in ("truncated", "done"):
                before = following.get(key, None)
                following.set(key, ended if before is None else before | ended)
        return following

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        """The specs of what is written."""
        shape, device = observation_spec.shape, observation_spec.device
        for key in ("tool_calls", "tool_errors"):
            observation_spec[key] = Unbounded((*shape, 1), dtype=torch.int64, device=device)
        for key in ("tool_failure", "conversation"):
            observation_spec[key] = NonTensor(shape, device=device, example_data="")
        return observation_spec

    def transform_done_spec(self, done_spec: Composite) -> Composite:
        """The spec of ``truncated``, if no other transform has added it."""
        if "truncated" not in done_spec.keys():
            done_spec["truncated"] = done_spec["done"].clone()
        return done_spec

    def _check_place(self) -> None:
        """Warn where the policy is not told of the tools; refuse to stand around an environment that ends without them.

        Raises:
            ValueError: the transform wraps an environment whose own transforms end its dialogues.
        """
        check_inside(self)
        if self._warned or not (missing := self._unknown()):
            return
        self._warned = True
        warnings.warn(
            f"{type(self).__name__}: the environment's template is not told of {', '.join(missing)}, so that no answer is "
            f"read as a call of it: ChatEnv(template_kwargs={{'tools': toolbox.schemas}}), with a tokenizer.",
            RuntimeWarning,
            stacklevel=2,
        )

    def _unknown(self) -> list[str]:
        """The tools that the environment's template does not have, where it was not asked to read calls regardless."""
        env = chat_env(self)
        if env.template is not None and env.template_kwargs.get("parse_tool_calls"):
            return []
        given = env.template_kwargs.get("tools") or () if env.template is not None else ()
        known = {_name(schema) for schema in given}
        return [name for name in map(_name, self.toolbox.schemas) if name not in known]

    @property
    def _is_first(self) -> bool:
        """Whether no other executor stands in front: conversations have one key, whoever keeps something for them."""
        return alike(self, ToolExecutor)[0] is self

    @staticmethod
    def _with_earlier(
        td: TensorDictBase, counts: list[int], errors: list[int], failures: list[str]
    ) -> tuple[list[int], list[int], list[str]]:
        """What this step wrote already, and what this executor adds."""
        sums = [
            (td.get(key).flatten() + torch.tensor(values, device=td.device)).tolist()
            for key, values in (("tool_calls", counts), ("tool_errors", errors))
        ]
        before = columns.read_objects(td.get("tool_failure"), td.batch_size)
        return sums[0], sums[1], [old or new for old, new in zip(before, failures, strict=True)]

    # ------------------------------------------------------------------ one turn
    def _calls(self, transcript: Transcript, limit: int | None) -> _Turn | None:
        """What a row's last answer calls."""
        message = transcript.messages[-1]
        called, malformed = message.get("tool_calls") or [], message.get("invalid_tool_calls") or []
        if not called and not malformed:
            return None
        allowed = called if limit is None else called[:limit]
        return _Turn({**message, "tool_calls": allowed}, called[len(allowed) :], len(called) + len(malformed))

    def _run(self, calls: Sequence[_Turn | None], keys: Sequence[str]) -> list[list[ToolResult]]:
        """The answers to all calls of the turns, each from the executor that has the tool; from this one, where none has."""
        executors = [self, *(other for other in alike(self, ToolExecutor) if other is not self)]
        found: list[dict[int, ToolResult]] = [{} for _ in calls]
        for executor in executors:
            own = [
                {k: call for k, call in enumerate(row.calls()) if _owner(call[0], executors, row) is executor}
                if row
                else {}
                for row in calls
            ]
            parts: list[Message | None] = [
                {
                    "role": "assistant",
                    "tool_calls": [call for call, malformed in mine.values() if not malformed],
                    "invalid_tool_calls": [call for call, malformed in mine.values() if malformed],
                }
                for mine in own
            ]
            answered = executor.toolbox.run_batch(parts, keys, self._write_call)
            for at, mine, results in zip(found, own, answered, strict=True):
                at.update(zip(mine, results, strict=True))
        return [[at[k] for k in sorted(at)] for at in found]

    def _write_call(self, name: str, arguments: dict[str, Any]) -> str | None:
        """A call as the environment's template writes it."""
        template = chat_env(self).template
        if name not in self._written:
            self._written[name] = None if template is None else template.call_text(name, arguments)
        return self._written[name]

    def _append(
        self, td: TensorDictBase, transcripts: list[Transcript], answers: list[list[Message] | None]
    ) -> tuple[TensorDictBase, list[str]]:
        env = chat_env(self)
        failures = [""] * len(answers)
        if not any(answers):
            return td, failures
        errors: dict[int, Any] = {}
        following = env.append_messages(td, answers, errors=errors)
        if errors and self.fallback_role is not None:
            again: list[list[Message] | None] = [None] * len(answers)
            for i in errors:
                said = "\n".join(content_text(message) for message in answers[i] or ())
                if not transcripts[i].messages[-1].get("tool_calls"):
                    again[i] = [{"role": self.fallback_role, "content": said}]
            tried, errors = errors, {}
            following = env.append_messages(following, again, errors=errors)
            errors.update({i: error for i, error in tried.items() if again[i] is None})
        for i, error in errors.items():
            failures[i] = f"{type(error).__name__}: {error}"
        return following, failures

    def _begin(self, keys: dict[int, str]) -> None:
        """Let go of what tools keep for the conversations that stood in these rows before."""
        over = [self._keys[row] for row in keys if row in self._keys]
        if over:
            self.toolbox.end(*over)
        self._keys = {**self._keys, **keys}

    def _write(self, td: TensorDictBase, counts: list[int], errors: list[int], failures: list[str]) -> None:
        batch, device = td.batch_size, td.device
        for key, values in (("tool_calls", counts), ("tool_errors", errors)):
            td.set(key, torch.tensor(values, dtype=torch.int64, device=device).reshape(*batch, 1))
        td.set("tool_failure", columns.objects(failures, batch, device))


def _name(schema: Any) -> str:
    """The name of a tool, from its schema as chat templates take it, or from the function itself."""
    if not isinstance(schema, Mapping):
        return getattr(schema, "__name__", "")
    return str(schema.get("function", schema).get("name", ""))


@dataclass
class _Turn:
    """The calls of one answer: those to be run, and those for which no budget is left."""

    message: Message
    refused: Sequence[Any] = ()
    count: int = 1

    def calls(self) -> list[tuple[Any, bool]]:
        """The calls that are answered, each with whether it is malformed: well-formed ones first."""
        well = [(call, False) for call in self.message.get("tool_calls") or ()]
        return well + [(call, True) for call in self.message.get("invalid_tool_calls") or ()]

    def answer(self, messages: list[Message]) -> list[Message]:
        """The messages that follow: the results in the order of the calls, well-formed ones first."""
        well = len(self.message.get("tool_calls") or ())
        late = [
            {
                "role": "tool",
                "tool_call_id": call["id"],
                "name": header_name(call["function"]["name"]),
                "content": _NO_CALLS_LEFT,
            }
            for call in self.refused
        ]
        return [*messages[:well], *late, *messages[well:]]


def _owner(call: Any, executors: Sequence[ToolExecutor], turn: _Turn) -> ToolExecutor:
    """The executor that answers a call: the first that has its tool, else the one that has read the turn."""
    function = call.get("function", call) if isinstance(call, Mapping) else {}
    name = function.get("name") if isinstance(function, Mapping) else None
    if isinstance(turn, _Fenced) or not isinstance(name, str):
        return executors[0]
    return next((executor for executor in executors if name in executor.toolbox.tools), executors[0])


class PythonInterpreter(ToolExecutor):
    """Runs the Python code that the policy writes, in a sandbox: in fenced blocks, or as calls of the tool ``python``.

    An answer with one or more blocks fenced as ```` ```python ```` is answered with what they print; so is a call of the
    tool, if the environment was given its schema (``template_kwargs={"tools": interpreter.toolbox.schemas}``). Where an
    answer has both, the call is run and the blocks are not. A block that is not closed is not run, but answered with what is
    wrong. Rows run at once, each with a deadline of its own; a row that hangs gets a message that says so.

    Args:
        sandbox: where the code runs. Defaults to a :class:`~torchrl_chat.sandbox.Sandbox` with the strongest isolation.
            Where its isolation cannot be had, the environment's reset raises ``SandboxError``.
        persistent: whether variables live on from turn to turn of one conversation.
        fenced: whether fenced blocks are run.
        role: the role of the messages that answer fenced code.
        deadline: seconds for one call. Defaults to the sandbox's.
        max_result_chars: longer results are cut in the middle, with a note.
        workers: how many rows run at once; more wait for them.

    The keys that it writes are those of :class:`ToolExecutor`.

    Example:
        >>> from torchrl_chat import ChatEnv
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> env = ChatEnv(tokenizer=tokenizer, batch_size=(4,), input_mode="text")
        >>> env = env.append_transform(PythonInterpreter())
    """

    def __init__(
        self,
        sandbox: Sandbox | None = None,
        *,
        persistent: bool = False,
        fenced: bool = True,
        role: str = "tool",
        deadline: float | None = None,
        max_result_chars: int = 20_000,
        workers: int = 64,
        fallback_role: str | None = "user",
    ):
        tool = PythonTool(sandbox, persistent=persistent, deadline=deadline)
        toolbox = Toolbox([tool], max_result_chars=max_result_chars, workers=workers)
        super().__init__(toolbox, fallback_role=fallback_role)
        self.fenced = fenced
        self.role = role

    def replies_to(self, message: Message) -> bool:
        """Whether this message of the policy calls something, or has a block of code that is run."""
        return super().replies_to(message) or (self.fenced and bool(fenced_code(content_text(message))))

    def _unknown(self) -> list[str]:
        return [] if self.fenced else super()._unknown()

    def _calls(self, transcript: Transcript, limit: int | None) -> _Turn | None:
        turn = super()._calls(transcript, limit)
        if turn is not None or not self.fenced:
            return turn
        blocks = fenced_code(content_text(transcript.messages[-1]))
        if not blocks:
            return None
        if limit is not None and limit <= 0:
            return _Fenced({"role": "assistant"}, role=self.role)
        if not blocks[-1].closed:
            return _Fenced({"role": "assistant"}, role=self.role, instead=_NOT_CLOSED)
        code = "\n\n".join(block.code for block in blocks)
        call = {"id": "call00000", "type": "function", "function": {"name": "python", "arguments": {"code": code}}}
        return _Fenced({"role": "assistant", "tool_calls": [call]}, role=self.role)


@dataclass
class _Fenced(_Turn):
    """A turn with code that is no call: its answer answers none."""

    role: str = "tool"
    instead: str = _NO_CALLS_LEFT

    def answer(self, messages: list[Message]) -> list[Message]:
        """One message with the output; or with why there is none."""
        contents = [message["content"] for message in messages] or [self.instead]
        return [{"role": self.role, "content": content} for content in contents]
