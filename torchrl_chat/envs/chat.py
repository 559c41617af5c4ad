"""``ChatEnv``: the batched chat environment, a function from TensorDicts to TensorDicts.

Its one job is to keep the ledger (:class:`~torchrl_chat.conversation.Transcript`) of every row and to show it in
the form that the policy reads. The environment object holds configuration only; whatever a turn
needs travels in the TensorDict, so a saved TensorDict can be stepped again, branched, or stepped by
another environment of the same configuration.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, TypedDict

import torch
from tensordict import NonTensorStack, TensorDict, TensorDictBase
from torchrl.data import Bounded, Categorical, Composite, NonTensor
from torchrl.data.llm import History
from torchrl.envs import EnvBase
from torchrl.modules.llm.policies import LogProbs, Masks, Tokens

from torchrl_chat import columns, telemetry
from torchrl_chat.conversation import ResponseError, StopReason, Transcript, answer, append
from torchrl_chat.conversation.turn import Errors, by_row
from torchrl_chat.envs import reading, specs
from torchrl_chat.envs.editing import Editing
from torchrl_chat.envs.resetting import FreshRows
from torchrl_chat.envs.stepping import FlatStepping
from torchrl_chat.envs.transforming import Appending, TransformedChatEnv, as_transform
from torchrl_chat.messages import Message, MessageError, as_messages
from torchrl_chat.seeds import row_names
from torchrl_chat.templates import ChatTemplate

InputMode = Literal["history", "text", "tokens"]
_NOT_CARRIED = {"_reset", "next", "done", "terminated", "truncated"}
_MODES = ("history", "text", "tokens")
_NO_CONVERSATION = "(no conversation)"


class ChatOptions(TypedDict, total=False):
    """The keyword arguments that :class:`ChatEnv` and all environments that are made of one take; it documents them."""

    input_mode: InputMode
    system_prompt: str | None
    tokenizer: Any
    template_kwargs: dict[str, Any] | None
    system_role: str
    user_role: str
    policy_role: str
    data_key: str | None
    device: torch.device | str | None
    history_policy: Literal["keep", "template"]
    on_prompt_mismatch: Literal["raise", "adopt"]
    errors: Literal["row", "raise"]


class ChatEnv(Appending, Editing, FreshRows, FlatStepping, EnvBase):
    """A batch of conversations, token-exact over turns.

    Reset takes the first user message of each row (or a whole list of messages) from ``data_key`` and
    returns a prompt. A step reads the policy's response, appends the very ids that it sampled to the
    row's ledger, and closes the turn. What follows (a tool's result, the next user message) is appended
    with :meth:`append_messages`, by a transform or by hand; the next prompt then starts with this turn's
    prompt and response, id for id, whatever the chat template.

    ============= =============================== ============================================
    input_mode    the policy reads                the policy writes one of
    ============= =============================== ============================================
    ``"history"`` ``("history", "prompt")``       ``("history", "response")``, ``("history", "full")``
    ``"text"``    ``("text", "prompt")``          ``("text", "response")``, ``("text", "full")``
    ``"tokens"``  ``("tokens", "prompt")``        ``("tokens", "response")``, ``("tokens", "full")``
    ============= =============================== ============================================

    In every mode a policy may hand the ids that it sampled in ``("tokens", "response")`` and their
    log-probs in ``("log_probs", "response")``: then these are the ledger, and text and history are views of
    them. A policy whose weights change may say in ``"weight_versions"`` which ones sampled a row: an int, or spans
    ``[(start, version), ...]`` of the sampled ids. And in every mode (given a tokenizer) the observation carries what training needs, ragged over
    rows, all of the prompt's length T:

    - ``("tokens", "prompt")``: int64 (T,);
    - ``("masks", "all_assistant_mask")``: bool (T,), true exactly on sampled tokens;
    - ``("log_probs", "prompt")``: float32 (T,), 0 where not sampled (or not reported by the policy);
    - ``"transcript"``: the ledger itself, with the messages;
    - ``"env_failure"``: str (\\*B,), why a row failed; empty elsewhere;
    - ``"stop_reason"``: int64 (\\*B, 1), a :class:`~torchrl_chat.StopReason`: ``ERROR`` in a row that failed.

    **A row that fails** ends alone, truncated: its question is none or the chat template refuses it (then its first step ends
    it, whatever the policy said), or the policy's answer is empty, no text that can be encoded, out of the vocabulary, or
    has another number of log-probs. Its ledger stays as it was before, ``"env_failure"`` names the row of the dataset and
    what is wrong, a warning is issued once a batch, and :func:`~torchrl_chat.training_view` trains nothing of it. What
    is wrong with all rows alike is raised: a missing column, a prompt that the policy made itself, a system prompt that
    the template refuses.

    Keyword Args:
        input_mode: what the policy reads and writes.
        batch_size: the number of conversations, ``(B,)`` or ``(B1, B2)``. Defaults to ``(1,)``.
        system_prompt: a system message put in front of every conversation.
        tokenizer: a Hugging Face tokenizer (or processor) with a chat template. Needed in text and tokens mode;
            without it, history mode keeps messages only.
        template_kwargs: variables for the chat template, e.g. ``{"enable_thinking": False}``;
            ``chat_template`` and ``tools`` are taken too.
        system_role, user_role, policy_role: the roles of the messages that the environment makes.
        data_key: the entry that reset reads. Defaults to ``"query"``.
        device: where observations live. The ledger itself stays on the CPU.
        history_policy: what the policy sees of its own earlier turns where the chat template rewrites them
            (drops their reasoning, for one). ``"keep"``: what it saw and sampled, append-only. ``"template"``:
            what the template writes; a turn whose past is rewritten starts a *branch* (see
            :attr:`Transcript.sequences <torchrl_chat.conversation.Transcript.sequences>`).
        on_prompt_mismatch: what to do when a policy reports a prompt other than the ledger's:
            ``"raise"``, or ``"adopt"`` what the policy saw.
        errors: what becomes of a row that fails: ``"row"`` ends it, ``"raise"`` raises its error.

    Raises:
        ValueError: an unknown ``input_mode``, an empty batch size, or no tokenizer where one is needed.
        ChatTemplateError: the tokenizer has no chat template.

    Example:
        >>> from tensordict import TensorDict
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> env = ChatEnv(input_mode="text", tokenizer=tokenizer, batch_size=(2,))
        >>> td = env.reset(TensorDict(query=["2 + 2?", "3 + 3?"], batch_size=(2,)))
        >>> td["text"].response = ["4<|end|>", "6<|end|>"]
        >>> td = env.step_mdp(env.step(td))
        >>> td = env.append_messages(td, ["Are you sure?", None])  # the second row is left alone
        >>> print(td["text"][0].prompt)
        <|user|>2 + 2?<|end|><|assistant|>4<|end|><|user|>Are you sure?<|end|><|assistant|>
    """

    text_key = ("text", "prompt")
    response_key = ("text", "response")
    data_key = "query"
    dataset_env: ClassVar[Any] = None  # the class that draws conversations from data, which stands on this one

    def __init__(
        self,
        *,
        input_mode: InputMode = "history",
        batch_size: int | Sequence[int] | torch.Size | None = None,
        system_prompt: str | None = None,
        tokenizer: Any = None,
        template_kwargs: dict[str, Any] | None = None,
        system_role: str = "system",
        user_role: str = "user",
        policy_role: str = "assistant",
        data_key: str | None = None,
        device: torch.device | str | None = None,
        history_policy: Literal["keep", "template"] = "keep",
        on_prompt_mismatch: Literal["raise", "adopt"] = "raise",
        errors: Literal["row", "raise"] = "row",
    ):
        if input_mode not in _MODES:
            raise ValueError(f"input_mode is {input_mode!r}: expected one of {', '.join(map(repr, _MODES))}.")
        if on_prompt_mismatch not in ("raise", "adopt"):
            raise ValueError(f"on_prompt_mismatch is {on_prompt_mismatch!r}: expected 'raise' or 'adopt'.")
        if errors not in ("row", "raise"):
            raise ValueError(f"errors is {errors!r}: expected 'row' or 'raise'.")
        if history_policy not in ("keep", "template"):
            raise ValueError(f"history_policy is {history_policy!r}: expected 'keep' or 'template'.")
        size = torch.Size(
            [1] if batch_size is None else [batch_size] if isinstance(batch_size, int) else batch_size
        )
        if len(size) not in (1, 2) or size.numel() == 0:
            raise ValueError(
                f"batch_size is {tuple(size)}: {type(self).__name__} is batched, give (B,) or (B1, B2), e.g. (1,)."
            )
        if tokenizer is None and input_mode != "history":
            raise ValueError(f"input_mode={input_mode!r} needs a tokenizer: pass tokenizer=...")
        super().__init__(batch_size=size, device=device)
        self.input_mode = input_mode
        self.system_prompt = system_prompt
        self.tokenizer = tokenizer
        self.template_kwargs = dict(template_kwargs or {})
        self.system_role = system_role
        self.user_role = user_role
        self.policy_role = policy_role
        self.history_policy = history_policy
        self.on_prompt_mismatch = on_prompt_mismatch
        self.errors = errors
        if data_key is not None:
            self.data_key = data_key
        self.template = ChatTemplate(tokenizer, **self.template_kwargs) if tokenizer is not None else None
        if self.template is not None:
            self.tokenizer = self.template.tokenizer  # of a processor, its tokenizer
            if said := self.template.tools_warning:
                warnings.warn(said, RuntimeWarning, stacklevel=2)
        self._make_specs()

    def _make_specs(self) -> None:
        batch, device = self.batch_size, self.device
        observation: dict[str, Any] = {}
        if self.template is not None:
            vocab = self.template.codec.vocab_size
            observation["tokens"] = specs.tokens_spec("prompt", batch, vocab)
            observation["masks"] = specs.masks_spec(batch)
            observation["log_probs"] = specs.log_probs_spec(batch)
        if self.input_mode == "tokens":
            action = specs.tokens_spec("response", batch, vocab)
        elif self.input_mode == "text":
            observation["text"] = specs.text_spec("prompt", batch)
            action = specs.text_spec("response", batch)
        else:
            observation["history"] = specs.history_spec("prompt", batch)
            action = specs.history_spec("response", batch)
        observation["transcript"] = NonTensor(shape=batch, example_data=Transcript.start([], ()))
        one = (*batch, 1)
        observation["env_failure"] = NonTensor(shape=batch, example_data="")
        observation["stop_reason"] = Bounded(0, len(StopReason) - 1, shape=one, dtype=torch.int64)
        ends = {key: Categorical(2, shape=one, dtype=torch.bool) for key in ("done", "terminated", "truncated")}
        query = NonTensor(shape=batch, example_data="a question")
        self.full_observation_spec = _composite(observation, batch, device)
        self.full_action_spec = _composite({self.input_mode: action}, batch, device)
        self.full_state_spec = _composite({self.data_key: query}, batch, device)
        self.full_done_spec = _composite(ends, batch, device)
        # Rewards come from transforms: a blank environment has none.
        self.full_reward_spec = Composite(shape=batch, device=device)

    @classmethod
    def from_dataloader(cls, dataloader: Any, **kwargs: Any) -> Any:
        """A :class:`~torchrl_chat.envs.DatasetChatEnv` over a dataloader; see its ``from_dataloader``."""
        assert ChatEnv.dataset_env is not None, "torchrl_chat.envs has it"
        return ChatEnv.dataset_env.from_dataloader(dataloader, **kwargs)

    def append_transform(self, transform: Any) -> TransformedChatEnv:
        """A new environment: this one with a transform. This one stays as it was.

        Args:
            transform: a transform, or a function from TensorDicts to TensorDicts.

        Example:
            >>> from torchrl_chat import Budget
            >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_tokenizer
            >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
            >>> env = ChatEnv(tokenizer=tokenizer, batch_size=(1,))
            >>> env = env.append_transform(Budget(max_turns=2))
        """
        added = as_transform(transform)
        return self._handed(TransformedChatEnv(self, added), added)

    def rand_action(self, tensordict: TensorDictBase | None = None) -> TensorDictBase:
        """A short random response a row."""
        action = self.full_action_spec.rand()
        if tensordict is None:
            return action
        return tensordict.update(action)

    # ------------------------------------------------------------------ reset
    def _reset(self, tensordict: TensorDictBase | None, **_: Any) -> TensorDictBase:
        self._warn_of_lost()
        queries = self._queries(tensordict)
        wanted = self._reset_rows(tensordict)
        chosen = [i for i in range(len(queries)) if wanted is None or wanted[i]]
        conversations: dict[int, list[Message]] = {}
        faults: Errors = {}
        for i in chosen:
            try:
                conversations[i] = self._conversation(queries[i], i)
            except MessageError as error:
                faults[i] = error
        td = self._begun(tensordict, conversations, faults)
        if faults and self.errors == "raise":
            raise faults[min(faults)]
        if faults and len(faults) == len(chosen):
            self._check_template(faults[min(faults)])
        told = self._told(td, faults, len(chosen))
        td.set("env_failure", columns.objects(told, self.batch_size, self.device))
        reasons = [StopReason.ERROR if why else StopReason.RUNNING for why in told]
        td.set("stop_reason", self._integers(reasons))
        return td

    def _begun(
        self,
        tensordict: TensorDictBase | None,
        conversations: dict[int, list[Message]],
        faults: Errors,
    ) -> TensorDict:
        """The observation of conversations that begin, beside the other columns of the rows.

        Args:
            tensordict: what the reset was given.
            conversations: the messages of the rows that begin.
            faults: takes the errors of rows that cannot be rendered. Those, and all without messages, hold something of
                the right form: torchrl keeps the rows that are not reset as they were.
        """
        places = list(conversations)
        rendered: list[Any] = [None] * len(places)
        if self.template is not None:
            template = self.template
            rendered = by_row(
                lambda some: template.render_batch([conversations[places[k]] for k in some]),
                len(places),
                lambda k, error: faults.setdefault(places[k], error),
            )
        started = {
            i: self._started(conversations[i], prompt)
            for i, prompt in zip(places, rendered, strict=True)
            if i not in faults
        }
        rows = self.batch_size.numel()
        if len(started) < rows:
            filler = next(iter(started.values()), None) or self._nothing()
            started = {i: started.get(i) or (self._nothing() if i in faults else filler) for i in range(rows)}
        td = self._observe([started[i] for i in range(rows)])
        # The other columns of the row (an answer to grade against, ...) stay beside the conversation.
        for key, column in () if tensordict is None else tensordict.items():
            if key not in _NOT_CARRIED and key not in td.keys():
                if type(column) is NonTensorStack:  # of the user; ours are copied without their rows
                    column = columns.objects(
                        columns.read_objects(column, self.batch_size), self.batch_size, self.device
                    )
                td.set(key, column)
        return td

    def _started(self, messages: list[Message], prompt: Any) -> Transcript:
        """The ledger of a conversation that begins with a rendered prompt (``None`` without a tokenizer)."""
        if prompt is None:
            return Transcript.start([], messages, policy=self.policy_role)
        text = prompt.text if self.input_mode == "text" else None
        return Transcript.start(prompt.ids, messages, text, self.policy_role)

    def _nothing(self) -> Transcript:
        """What stands in a row that has no conversation."""
        messages = as_messages(_NO_CONVERSATION, role=self.user_role)
        prompt = None if self.template is None else self.template.render_batch([messages])[0]
        return self._started(messages, prompt)

    def _check_template(self, error: Exception) -> None:
        """Raise the error if it is no single row's: no conversation can be begun here, with this system prompt."""
        if self.template is not None:
            try:
                self.template.render_batch([self._conversation(_NO_CONVERSATION, 0)])
            except Exception:
                raise error from None

    def _told(self, td: TensorDictBase, faults: Mapping[int, Exception], asked: int) -> list[str]:
        """Why each row failed, by its name in the dataset; with a warning for the batch."""
        told = [""] * self.batch_size.numel()
        if not faults:
            return told
        names = row_names(td, len(told))
        for i, error in faults.items():
            said = str(error).removeprefix(f"row {i}: ")
            told[i] = f"{names[i]}: {type(error).__name__}: {said}"
        first = min(faults)
        place = "" if told[first].startswith("row ") else f"row {first} of the batch, "
        warnings.warn(
            f"{len(faults)} of {asked} rows failed and are truncated. The first: {place}{told[first]}",
            RuntimeWarning,
            stacklevel=3,
        )
        return told

    def _integers(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device).reshape(*self.batch_size, 1)

    def _queries(self, tensordict: TensorDictBase | None) -> list[Any]:
        column = None if tensordict is None else tensordict.get(self.data_key, None)
        if column is None:
            found = "no TensorDict" if tensordict is None else f"the keys {sorted(map(str, tensordict.keys()))}"
            raise KeyError(
                f"reset needs {self.data_key!r}: a string or a list of messages for each of the "
                f"{self.batch_size.numel()} row(s), in a TensorDict of batch size {tuple(self.batch_size)}; "
                f"got {found}."
            )
        if isinstance(column, History):
            rows = columns.read_rows(column, self.batch_size)
            return [reading.history_messages(row, 0) for row in rows]
        return columns.read_objects(column, self.batch_size)

    def _reset_rows(self, tensordict: TensorDictBase | None) -> list[bool] | None:
        reset = None if tensordict is None else tensordict.get("_reset", None)
        if reset is None or reset.all():
            return None
        return reset.reshape(self.batch_size.numel(), -1).any(-1).tolist()

    def _conversation(self, query: Any, row: int) -> list[Message]:
        if isinstance(query, Exception):  # of whoever was to say what the conversation begins with
            raise MessageError(f"{type(query).__name__}: {query}") from query
        messages = as_messages(query, role=self.user_role, where=f"{self.data_key!r} of row {row}")
        if self.system_prompt is not None:
            messages.insert(0, {"role": self.system_role, "content": self.system_prompt})
        return messages

    # ------------------------------------------------------------------ step
    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        with telemetry.span("turn", type(self).__name__) as span:
            following = self._turn(tensordict)
            if span:
                failed = sum(map(bool, columns.read_objects(following.get("env_failure"), self.batch_size)))
                span.set({"torchrl_chat.batch.size": sum(columns.stepped(tensordict))})
                span.set({"torchrl_chat.batch.failed": failed})
        return following

    def _turn(self, tensordict: TensorDictBase) -> TensorDictBase:
        if isinstance(tensordict.get("history", None), History) and tensordict.get("transcript", None) is None:
            self._take_up(tensordict)
        goes = columns.stepped(tensordict)  # torchrl's way to leave some rows (finished ones) as they are
        known = self._failed(tensordict)
        faults: Errors = {}
        live = [going and not why for going, why in zip(goes, known, strict=True)]
        following = self._observe(self._answers(tensordict, live, faults))
        new = {i: error for i, error in faults.items() if live[i]}
        told = [old or why for old, why in zip(known, self._told(tensordict, new, sum(goes)), strict=True)]
        following.set("env_failure", columns.objects(told, self.batch_size, self.device))
        reasons = [StopReason.ERROR if why else StopReason.RUNNING for why in told]
        if not all(goes) and (said := tensordict.get("stop_reason", None)) is not None:
            kept = said.flatten().tolist()
            reasons = [reason if going else old for reason, going, old in zip(reasons, goes, kept, strict=True)]
        following.set("stop_reason", self._integers(reasons))
        if any(told):
            ended = self._integers(list(map(bool, told))).bool()
            following.set("truncated", ended)
            following.set("done", ended.clone())
            following.set("terminated", torch.zeros_like(ended))
        return following

    def _take_up(self, tensordict: TensorDictBase) -> None:
        """Write the root for whole conversations that come as a bare ``History``, with no reset before them.

        All but the last message begin the conversation, as if a reset had been given them; the last is the policy's answer.

        Raises:
            ResponseError: the last message of a row is not the policy's, or nothing stands before it.
        """
        if self.input_mode != "history":
            raise ResponseError(
                f"'history' holds whole conversations, which input_mode='history' reads; this is {self.input_mode!r}."
            )
        rows = [
            reading.history_messages(row, 0)
            for row in columns.read_rows(tensordict.get("history"), self.batch_size)
        ]
        for i, messages in enumerate(rows):
            if len(messages) < 2 or messages[-1]["role"] != self.policy_role:
                raise ResponseError(
                    f"row {i}: 'history' has the roles {[m['role'] for m in messages]}: expected a conversation that ends "
                    f"with an answer of role {self.policy_role!r}."
                )
        faults: Errors = {}
        begun = self._begun(None, {i: messages[:-1] for i, messages in enumerate(rows)}, faults)
        if faults:
            raise faults[min(faults)]
        begun.get("history").full = tensordict.get("history")
        for key, column in begun.items():
            tensordict.set(key, column)

    def _answers(self, tensordict: TensorDictBase, goes: Sequence[bool], faults: Errors) -> list[Transcript]:
        """The ledgers with what the policy answered; those of rows that are not stepped, or have a fault, as they were.

        Args:
            tensordict: what the policy wrote.
            goes: which rows are stepped.
            faults: takes what is wrong with single rows.

        Raises:
            ResponseError: the whole is wrong; or, with ``errors="raise"``, the first row that has a fault.
        """
        written = self._written(tensordict)
        held = self._with_foreign_messages(tensordict, written, faults)
        adopt = self.on_prompt_mismatch == "adopt"
        reader = reading.Reader(tensordict, held, goes, self.template, faults, adopt)
        if self.input_mode == "text":
            reading.check_texts(tensordict, held, self.batch_size)
        if self.template is not None:
            reader.check_prompts(written)
        answered = answer(reader.held, reader.turns(self.input_mode), self.template, faults)
        if self.errors == "raise" and (wrong := [i for i in sorted(faults) if goes[i]]):
            raise faults[wrong[0]]
        return answered

    def _failed(self, tensordict: TensorDictBase) -> list[str]:
        """Which rows have failed before, by the reason that stands in the root; empty elsewhere."""
        column = tensordict.get("env_failure", None)
        return [""] * self.batch_size.numel() if column is None else columns.read_objects(column, self.batch_size)

    # ------------------------------------------------------------------ new messages
    def append_messages(
        self,
        tensordict: TensorDictBase,
        messages: Sequence[Any],
        errors: dict[int, Exception] | None = None,
    ) -> TensorDictBase:
        """Append messages to conversations: their tokens and the generation prompt follow.

        Args:
            tensordict: an observation whose rows end with a closed assistant turn: what ``step`` wrote
                under ``"next"``, or that after ``step_mdp``. It is not changed.
            messages: for each row (in row-major order) a string (a user message), a message, a list of
                messages, or ``None`` to leave the row as it is.
            errors: takes the errors of the rows whose messages are malformed or whose continuation cannot be proved exact,
                by row; those rows are left as they are, and the others go on.

        Returns:
            A shallow copy of the TensorDict with the new prompts.

        Raises:
            ValueError: the number of rows is wrong.
            MessageError: without ``errors``: a message is malformed.
            BridgeError: without ``errors``: a template's continuation cannot be proved exact.
        """
        rows = self.batch_size.numel()
        if isinstance(messages, str) or len(messages) != rows:
            raise ValueError(f"append_messages needs an entry for each of the {rows} rows, got {messages!r:.60}.")
        new: list[list[Message] | None] = [None] * rows
        for i, value in enumerate(messages):
            try:
                new[i] = None if value is None else as_messages(value, role=self.user_role, where=f"messages[{i}]")
            except MessageError as error:
                if errors is None:
                    raise
                errors[i] = error
        transcripts = self._appended(self._transcripts(tensordict), new, errors)
        return columns.replaced(tensordict, self._observe(transcripts))

    def _appended(
        self,
        transcripts: list[Transcript],
        new: Sequence[list[Message] | None],
        errors: dict[int, Exception] | None = None,
    ) -> list[Transcript]:
        return append(transcripts, new, self.template, self.history_policy, errors)

    # ------------------------------------------------------------------ transcripts <-> TensorDict
    def _transcripts(self, tensordict: TensorDictBase) -> list[Transcript]:
        """The ledger of each row, with what a torchrl transform appended to the history alone."""
        return self._with_foreign_messages(tensordict, self._written(tensordict))

    def _written(self, tensordict: TensorDictBase) -> list[Transcript]:
        """The ledger of each row, as reset, step or append_messages wrote it."""
        column = tensordict.get("transcript", None)
        if column is None:
            raise KeyError(
                f"step needs 'transcript', the ledger that reset wrote; got the keys "
                f"{sorted(map(str, tensordict.keys()))}. Start from env.reset(...)."
            )
        transcripts = columns.read_objects(column, self.batch_size)
        reading.check_ledgers(transcripts)
        for i, transcript in enumerate(transcripts):
            if self.template is not None and not len(transcript):
                raise ResponseError(
                    f"row {i} has messages but no tokens: it comes from an environment without a tokenizer. Reset it here."
                )
        return transcripts

    def _with_foreign_messages(
        self, td: TensorDictBase, transcripts: list[Transcript], faults: Errors | None = None
    ) -> list[Transcript]:
        """Take up messages that a transform wrote into ``("history", "prompt")``, behind the ledger's back."""
        if self.input_mode != "history":
            return transcripts
        history = td.get("history", None)
        if all(columns.untouched(history, "prompt", [transcript.messages for transcript in transcripts])):
            return transcripts
        rows = columns.read_field(history, "prompt", self.batch_size)
        if rows is None:
            return transcripts
        new: list[list[Message] | None] = [None] * len(transcripts)
        for i, (row, transcript) in enumerate(zip(rows, transcripts, strict=True)):
            reading.check_history(row, transcript, i)
            count, known = row.batch_size[0], len(transcript.messages)
            if count > known:
                new[i] = reading.history_messages(row, known)
            elif count < known:
                raise ResponseError(
                    f"row {i}: ('history', 'prompt') has {count} messages, the ledger {known}: a conversation "
                    f"is append-only."
                )
        return self._appended(list(transcripts), new, faults) if any(new) else transcripts

    def _observe(self, transcripts: list[Transcript]) -> TensorDict:
        """The columns that show these transcripts to a policy."""
        batch, device = self.batch_size, self.device
        leaves: dict[str, Any] = {"transcript": columns.objects(transcripts, batch, device)}
        if self.template is not None:
            for name, container, key, shown in _LEDGER:
                rows = columns.Deferred(len(transcripts), partial(_shown, shown, transcripts, device))
                leaves[name] = columns.ragged(container, key, rows, batch, device)
        if self.input_mode == "text":
            shown_texts = [reading.shown_text(t, self.template) for t in transcripts]
            leaves["text"] = columns.texts("prompt", shown_texts, batch, device)
        elif self.input_mode == "history":
            leaves["history"] = columns.conversations("prompt", [t.messages for t in transcripts], batch, device)
        return TensorDict._new_unsafe(leaves, batch_size=batch, device=device, names=None, lock=False)

    def _set_seed(self, seed: int | None) -> None:
        """Nothing here is random: data order is seeded where the data are, sampling in the policy."""


def _composite(entries: dict[str, Any], batch: torch.Size, device: torch.device | None) -> Composite:
    composite = Composite(entries, shape=batch)
    return composite if device is None else composite.to(device)


_LEDGER: tuple[tuple[str, type, str, Callable[[Transcript], torch.Tensor]], ...] = (
    ("tokens", Tokens, "prompt", operator.attrgetter("tokens")),
    ("masks", Masks, "all_assistant_mask", operator.attrgetter("mask")),
    ("log_probs", LogProbs, "prompt", operator.attrgetter("log_probs")),
)


def _shown(
    part: Callable[[Transcript], torch.Tensor], transcripts: list[Transcript], device: torch.device | None
) -> list[torch.Tensor]:
    """One part of the ledgers on the environment's device, with one transfer for all of them."""
    rows = list(map(part, transcripts))
    if device is None or device.type == "cpu" or not rows:
        return rows
    return list(torch.cat(rows).to(device, non_blocking=True).split([len(row) for row in rows]))
