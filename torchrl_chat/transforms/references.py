"""What a policy's log-probs are compared with: a reference model in this process, under an adapter, or elsewhere."""

from __future__ import annotations

import copy
import json
import math
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from tensordict import TensorDict

from torchrl_chat.endpoint import Secrets, of_url, shown_url, without_login
from torchrl_chat.learner.adapters import is_adapted
from torchrl_chat.models.mode import evaluating
from torchrl_chat.training import layouts, sequence_log_probs

RemoteLogProbs = Callable[[list[list[int]]], Sequence[Sequence[float | None]]]


class Reference(ABC):
    """Something that knows the log-probs of given tokens."""

    @abstractmethod
    def score(self, tokens: list[torch.Tensor], masks: list[torch.Tensor]) -> list[torch.Tensor]:
        """The log-prob of every masked token, given those before it.

        Args:
            tokens: int64 (T,) a sequence, at least one sequence.
            masks: bool (T,) a sequence.

        Returns:
            float32 (T,) a sequence, on the device of its tokens, 0 where the mask is false.
        """


class ModelReference(Reference):
    """A transformers causal language model in this process. It is scored without gradients, in eval mode.

    Args:
        model: the model. It is scored as it is: of a PEFT model, with its adapter (see :class:`AdapterReference`).
        temperature: that of the policy, so that KL is between what is sampled from. ``None`` is what the transform is told,
            else 1.
        vocab_size: logits from this id on are cut off, as the policy cuts them: embeddings are often longer than the
            vocabulary. ``None`` is what the transform is told, else the vocabulary of the environment's tokenizer, and all
            logits where there is no environment.
        max_tokens: how many tokens go through the model at a time, padding included.

    Raises:
        ValueError: a setting is out of range.

    Example:
        >>> import torch
        >>> from torchrl_chat.tiny import tiny_model
        >>> model = tiny_model(64)
        >>> ModelReference(model).score([torch.tensor([5, 6, 7])], [torch.tensor([False, True, True])])[0].shape
        torch.Size([3])
    """

    def __init__(
        self,
        model: Any,
        *,
        temperature: float | None = None,
        vocab_size: int | None = None,
        max_tokens: int | None = 16384,
    ):
        _check_settings(temperature, vocab_size)
        self.model = model
        self.temperature = temperature
        self.vocab_size = vocab_size
        self.max_tokens = max_tokens

    def told(self, **settings: Any) -> ModelReference:
        """The same with settings (``temperature``, ``vocab_size``) that it has not been given itself.

        Raises:
            ValueError: it has been given others.
        """
        other = copy.copy(self)
        for key, value in settings.items():
            own = getattr(self, key)
            if value is not None and own not in (None, value):
                raise ValueError(f"{key}={value}, and the reference has {key}={own}: give one of them.")
            setattr(other, key, value if own is None else own)
        return other

    @torch.no_grad()
    def score(self, tokens: list[torch.Tensor], masks: list[torch.Tensor]) -> list[torch.Tensor]:
        """See :meth:`Reference.score`."""
        unknown = [torch.zeros(ids.shape, device=ids.device) for ids in tokens]
        flat = layouts.Flat.of(tokens, mask=masks, log_probs=unknown)
        view = TensorDict(layouts.padded(flat, None, "right", 0, 1), batch_size=(len(tokens),))
        with evaluating(self.model):
            scores = sequence_log_probs(
                self.model,
                view,
                temperature=1.0 if self.temperature is None else self.temperature,
                vocab_size=self.vocab_size,
                max_tokens=self.max_tokens,
            ).log_probs
        home = tokens[0].device
        return [row[: len(ids)].to(home) for row, ids in zip(scores, tokens, strict=True)]


class AdapterReference(ModelReference):
    """The policy's own model with its adapter switched off: the weights that a LoRA (arXiv:2106.09685) started from.

    Args:
        model: a PEFT model (extra ``peft``).
        temperature, vocab_size, max_tokens: as for :class:`ModelReference`.

    Raises:
        TypeError: the model has no adapter to switch off.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from torchrl_chat.tiny import tiny_model
        >>> reference = AdapterReference(get_peft_model(tiny_model(64), LoraConfig(target_modules="all-linear")))
    """

    def __init__(self, model: Any, **options: Any):
        if not is_adapted(model):
            raise TypeError(
                f"{type(model).__name__} has no disable_adapter(): expected a PEFT model, peft.get_peft_model(model, "
                "config) say (pip install 'torchrl_chat[peft]')."
            )
        super().__init__(model, **options)

    def score(self, tokens: list[torch.Tensor], masks: list[torch.Tensor]) -> list[torch.Tensor]:
        """See :meth:`Reference.score`."""
        with self.model.disable_adapter():
            return super().score(tokens, masks)


class RemoteReference(Reference):
    """Any function from lists of token ids to lists of log-probs: another process, another machine.

    Args:
        function: gets one list of ids a sequence, and returns as many lists of as many numbers; what it says of a
            sequence's first token, and of tokens that are not under the mask, is not looked at.

    Raises:
        ValueError: at the call: a sequence is missing, has another length, or a sampled token without a log-prob.

    Example:
        >>> uniform = RemoteReference(lambda rows: [[-math.log(100)] * len(row) for row in rows])
    """

    def __init__(self, function: RemoteLogProbs):
        self.function = function

    def score(self, tokens: list[torch.Tensor], masks: list[torch.Tensor]) -> list[torch.Tensor]:
        """See :meth:`Reference.score`."""
        answers = self.function([ids.tolist() for ids in tokens])
        if len(answers) != len(tokens):
            raise ValueError(f"the reference was asked for {len(tokens)} sequences and returned {len(answers)}.")
        results = []
        for row, (ids, mask, answer) in enumerate(zip(tokens, masks, answers, strict=True)):
            if len(answer) != len(ids):
                raise ValueError(
                    f"the reference returned {len(answer)} log-probs for the {len(ids)} tokens of sequence {row}: it "
                    "splits text otherwise, or counts generated tokens too."
                )
            values = torch.tensor([math.nan if value is None else float(value) for value in answer])
            wanted = mask.cpu().clone()
            wanted[:1] = False  # nothing stands before it
            missing = (wanted & ~values.isfinite()).nonzero().flatten().tolist()
            if missing:
                raise ValueError(
                    f"the reference has no finite log-prob for token {missing[0]} of sequence {row}, id "
                    f"{int(ids[missing[0]])}: {answer[missing[0]]}."
                )
            results.append(torch.where(wanted, values, 0.0).to(ids.device))
        return results


class CompletionsReference(RemoteReference):
    """A server with OpenAI's ``/completions``, which takes token ids as prompts (vLLM, SGLang, llama.cpp ...).

    Its log-probs are those of temperature 1, over all that its model has logits for: servers report a prompt's before
    any scaling. So it is no reference for a policy of another temperature, and where embeddings are padded beyond the
    vocabulary, the KL of a model with itself is a little more than 0.

    Args:
        base_url: up to the version, ``"http://localhost:8000/v1"``.
        model: the model's name there.
        style: ``"echo"`` asks for the prompt's log-probs by ``echo`` and ``logprobs``, ``"prompt_logprobs"`` by vLLM's
            parameter of that name.
        batch_size: how many sequences a request has.
        timeout: seconds a request may take.
        api_key: the bearer token, if the server wants one.

    Raises:
        RuntimeError: at the call: the server cannot be reached, refuses, or sends no log-probs of the prompt.

    Example:
        >>> reference = CompletionsReference("http://localhost:8000/v1", "Qwen/Qwen2.5-0.5B-Instruct")
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        style: Literal["echo", "prompt_logprobs"] = "echo",
        batch_size: int = 32,
        timeout: float = 600.0,
        api_key: str | None = None,
    ):
        if style not in ("echo", "prompt_logprobs"):
            raise ValueError(f"style={style!r}: expected 'echo' or 'prompt_logprobs'.")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: expected at least 1.")
        super().__init__(self.ask)
        url, self._login = without_login(base_url)
        self._secrets = Secrets([api_key or "", *of_url(base_url)])
        self.url = url.rstrip("/") + "/completions"
        self.model = model
        self.style = style
        self.batch_size = batch_size
        self.timeout = timeout
        self.api_key = api_key

    def ask(self, rows: list[list[int]]) -> list[list[float | None]]:
        """The server's log-probs of each sequence's tokens."""
        found: list[list[float | None]] = []
        for start in range(0, len(rows), self.batch_size):
            found += self._request(rows[start : start + self.batch_size])
        return found

    def _request(self, rows: list[list[int]]) -> list[list[float | None]]:
        # One token is generated and cut off: not every server takes max_tokens=0.
        body: dict[str, Any] = {"model": self.model, "prompt": rows, "max_tokens": 1, "temperature": 1.0}
        body |= {"echo": True, "logprobs": 1} if self.style == "echo" else {"prompt_logprobs": 0}
        headers = {"Content-Type": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        elif self._login is not None:
            headers["Authorization"] = self._login
        secrets, shown = self._secrets, shown_url(self.url)
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                choices = sorted(json.load(response)["choices"], key=lambda choice: choice["index"])
        except urllib.error.HTTPError as error:
            said = secrets.hide(error.read().decode(errors="replace"))[:500]
            raise RuntimeError(f"{shown} answered {error.code}: {said}") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RuntimeError(f"{shown} gave no completions: {type(error).__name__}: {error}") from error
        if len(choices) != len(rows):
            raise RuntimeError(f"{shown} was asked for {len(rows)} sequences and returned {len(choices)}.")
        return [self._read(choice, row) for choice, row in zip(choices, rows, strict=True)]

    def _read(self, choice: dict[str, Any], row: list[int]) -> list[float | None]:
        try:
            if self.style == "echo":
                return choice["logprobs"]["token_logprobs"][: len(row)]
            entries = zip(choice["prompt_logprobs"], row, strict=True)
            return [None if entry is None else entry[str(token)]["logprob"] for entry, token in entries]
        except (KeyError, TypeError, ValueError) as error:
            raise RuntimeError(
                f"{shown_url(self.url)} sent no log-probs of the prompt (style={self.style!r}): {type(error).__name__}: {error}"
            ) from error


def as_reference(reference: Any, *, temperature: float | None = None, vocab_size: int | None = None) -> Reference:
    """A reference of whatever serves as one.

    Args:
        reference: a :class:`Reference`; a :class:`~torchrl_chat.TransformersPolicy`, whose temperature and vocabulary then
            hold; a transformers model; or a function as for :class:`RemoteReference`.

    Keyword Args:
        temperature, vocab_size: as for :class:`ModelReference`, where it has none of its own.

    Raises:
        TypeError: it is none of these; or a PEFT model, which with its adapter on would be compared with itself.
        ValueError: it has another temperature or vocabulary of its own, or cannot have any other: what is not a model in
            this process answers as it does.
    """
    _check_settings(temperature, vocab_size)
    found = _reference_of(reference)
    if temperature is None and vocab_size is None:
        return found
    if isinstance(found, ModelReference):
        return found.told(temperature=temperature, vocab_size=vocab_size)
    # Temperature 1 is what servers answer at, and what a function is asked for.
    if vocab_size is not None or temperature != 1.0:
        raise ValueError(
            f"temperature={temperature}, vocab_size={vocab_size}: a {type(found).__name__} has log-probs of its own making, a "
            "server's of temperature 1 over all logits. Use a model in this process, or a function that takes care of it."
        )
    return found


def _reference_of(reference: Any) -> Reference:
    if isinstance(reference, Reference):
        return reference
    if hasattr(reference, "get_dist") and hasattr(reference, "model"):
        _refuse_adapter(reference.model)
        temperature = getattr(reference, "temperature", None) or None  # a greedy policy has none to compare at
        return ModelReference(
            reference.model, temperature=temperature, vocab_size=getattr(reference, "vocab_size", None)
        )
    if hasattr(reference, "get_output_embeddings"):
        _refuse_adapter(reference)
        return ModelReference(reference)
    if callable(reference) and not isinstance(reference, torch.nn.Module):
        return RemoteReference(reference)
    raise TypeError(
        f"a {type(reference).__name__} is no reference: expected a Reference, a policy, a transformers model or a "
        "function from lists of ids to lists of log-probs."
    )


def _refuse_adapter(model: Any) -> None:
    if is_adapted(model):
        raise TypeError(
            f"a {type(model).__name__} as it is has its adapter on: the policy would be compared with itself. Pass "
            "AdapterReference(model) for the weights under the adapter, or ModelReference(model) if it is another model than "
            "the one that is trained."
        )


def _check_settings(temperature: float | None, vocab_size: int | None) -> None:
    if temperature is not None and temperature <= 0:
        raise ValueError(f"temperature is {temperature}: expected more than 0.")
    if vocab_size is not None and vocab_size < 1:
        raise ValueError(f"vocab_size is {vocab_size}: expected at least 1.")
