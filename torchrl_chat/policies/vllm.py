"""``VLLMPolicy``: a vLLM engine as a torchrl policy, in the process or behind its asynchronous interface.

The engine is handed the ledger's ids and hands back the ids that it sampled: neither side renders or tokenizes. A
prompt extends the one before it id for id, so vLLM's prefix cache holds all of it but the last turn.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import tempfile
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from torchrl_chat._loop import LoopThread
from torchrl_chat.models.sampling import default_stop_ids, stream_seed
from torchrl_chat.policies.policy import Policy
from torchrl_chat.policies.writing import IN_KEYS, OUT_KEYS
from torchrl_chat.templates.backends import tokenizer_of
from torchrl_chat.templates.codec import codec_of

_WORKER = "torchrl_chat.policies.vllm_worker.WeightLoader"
_LEAST_TEMPERATURE = 0.01  # vLLM raises what is below


class VLLMPolicy(Policy):
    """Samples answers with vLLM, for a :class:`~torchrl_chat.envs.ChatEnv` in any of its input modes.

    Reads and writes what :class:`~torchrl_chat.TransformersPolicy` does: ``("tokens", "prompt")``, and ``"tokens_left"``
    where a budget is kept; the exact ids, and log-probs of exactly these ids under the sampling distribution. It has no
    gradients: train with a ``TransformersPolicy`` of the same temperature as the loss's actor, and :meth:`sync`.

    Args:
        engine: a ``vllm.LLM``, or an asynchronous engine (``vllm.v1.engine.async_llm.AsyncLLM``), whose conversations
            are submitted one by one and run side by side. :meth:`from_pretrained` makes either with what it needs here.
        tokenizer: the model's tokenizer; the engine's own if ``None``.

    Keyword Args:
        max_new_tokens: where an answer is cut.
        temperature: of the sampling distribution, and of all log-probs; 0 takes the likeliest token.
        stop_ids: ids that end an answer and belong to it. Defaults to the end-of-turn token of the tokenizer's own
            template, and the tokenizer's and the model's eos.
        seeded: sample each row from its ``"episode_seed"``, int64 (\\*B,), and the length of its prompt, so that it does
            not depend on the rows beside it, up to rounding: see
            :class:`~torchrl_chat.models.sampling.GumbelNoise`, whose limit holds here too (not its numbers).

    Attributes:
        prompt_tokens: tokens of all prompts since :meth:`reset_counts`.
        cached_tokens: those of them that the engine took from its prefix cache (in whole blocks) instead of computing them.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: an option has no such value, or the engine reports log-probs of another distribution
            (``logprobs_mode``) than the one that it samples from.

    Example:
        >>> policy = VLLMPolicy.from_pretrained("Qwen/Qwen2.5-0.5B-Instruct", max_new_tokens=64)  # doctest: +SKIP
        >>> finished = play(env, policy)  # doctest: +SKIP
        >>> policy.sync(model)  # doctest: +SKIP
    """

    def __init__(
        self,
        engine: Any,
        tokenizer: Any = None,
        *,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        stop_ids: Iterable[int] | None = None,
        seeded: bool = False,
    ):
        super().__init__()
        _vllm()
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}: expected at least 1.")
        if temperature != 0 and not temperature >= _LEAST_TEMPERATURE:
            raise ValueError(f"temperature is {temperature}: expected 0 (greedy) or at least {_LEAST_TEMPERATURE}.")
        self.in_keys = [*IN_KEYS, "episode_seed"] if seeded else list(IN_KEYS)
        self.out_keys = list(OUT_KEYS)
        self.engine = engine
        config = engine.model_config
        self.tokenizer = tokenizer_of(engine.get_tokenizer() if tokenizer is None else tokenizer)
        self.codec = codec_of(self.tokenizer)
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.seeded = seeded
        self.max_model_len: int = config.max_model_len
        eos = config.try_get_generation_config().get("eos_token_id")
        self.stop_ids = default_stop_ids(self.tokenizer, eos) if stop_ids is None else frozenset(stop_ids)
        self._bias = vocabulary_bias(config, self.codec.vocab_size)
        check_log_probs_mode(config, temperature, self._bias)
        self._loop = LoopThread("torchrl_chat.vllm") if inspect.isasyncgenfunction(engine.generate) else None
        self.reset_counts()

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        tokenizer: Any = None,
        *,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        stop_ids: Iterable[int] | None = None,
        seeded: bool = False,
        asynchronous: bool = False,
        dtype: str | torch.dtype | None = None,
        **engine: Any,
    ) -> VLLMPolicy:
        """A policy on an engine of its own, whose log-probs are right and whose weights can be replaced.

        The engine lives in this process, unless ``asynchronous``: then vLLM starts a process for it, and a script needs
        ``if __name__ == "__main__":`` around what it does. On the CPU it runs without compilation unless told
        otherwise, and ``VLLM_CPU_KVCACHE_SPACE`` is set to 1 (GiB) where it is unset: vLLM takes most of the memory
        otherwise. vLLM seeds torch's global generator when it is made (``seed=0``).

        Args:
            model: a local folder or a hub name.
            tokenizer: its tokenizer; the engine's own if ``None``.

        Keyword Args:
            max_new_tokens, temperature, stop_ids, seeded: see the class.
            asynchronous: an ``AsyncLLM``.
            dtype: what the engine computes in: ``"float32"``, ``"bfloat16"`` ... ``None``: float32 on the CPU, and elsewhere
                vLLM's ``"auto"``, which is that of the checkpoint, but half precision where the checkpoint has float32. An
                engine in half precision and a trainer in float32 differ in every log-prob: the effective sample size of
                a loss is below 1 before any update (0.999998 in bfloat16 for a model of two layers, whose log-probs
                differ by up to 0.005; not measured for larger ones), and further below where ratios are of
                whole sequences. Give the trainer's.
            engine: arguments of ``vllm.LLM`` (or ``AsyncEngineArgs``): ``max_model_len``, ``seed`` ...
        """
        _vllm()
        from vllm.platforms import current_platform

        if not asynchronous:
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        if current_platform.is_cpu():
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
            # vLLM (0.32.0) rewinds the generator of a seeded prompt that it reads in parts, which generators here cannot.
            plain = {"enforce_eager": True, "enable_chunked_prefill": False, "distributed_executor_backend": "uni"}
            dtype, engine = dtype or "float32", {**plain, **engine}
        settings = {
            "model": str(model),
            "dtype": dtype or "auto",
            "logprobs_mode": "processed_logprobs",
            "worker_extension_cls": _WORKER,
            "enable_prefix_caching": True,
            **engine,
        }
        made: Any
        if asynchronous:
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM

            made = AsyncLLM.from_engine_args(AsyncEngineArgs(**settings))
        else:
            from vllm import LLM

            made = LLM(**settings)
        return cls(
            made,
            tokenizer,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            stop_ids=stop_ids,
            seeded=seeded,
        )

    # ------------------------------------------------------------------ acting
    def generate(
        self,
        prompts: Sequence[torch.Tensor | list[int]],
        limits: Sequence[int] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Sample an answer to each prompt.

        Args:
            prompts: the ids of each.
            limits: how many tokens each row may sample at most, at least 1, below ``max_new_tokens``.
            seeds: a seed a row.

        Returns:
            the sampled ids of each row, the stop id included, and their log-probs.

        Raises:
            ValueError: a prompt fills the model's context.
        """
        for i, prompt in enumerate(prompts):
            if len(prompt) >= self.max_model_len:
                raise ValueError(
                    f"row {i}: its prompt of {len(prompt)} tokens fills the engine's max_model_len of "
                    f"{self.max_model_len}. Let the environment end such conversations: Budget(max_context=...), with at "
                    f"most as many."
                )
        most = [min(limit, self.max_new_tokens) for limit in limits or [self.max_new_tokens] * len(prompts)]
        params = [
            sampling_params(
                self.stop_ids,
                max_tokens=count,
                temperature=self.temperature,
                seed=None if seeds is None else stream_seed(seeds[i], len(prompts[i])),
                logit_bias=self._bias,
            )
            for i, count in enumerate(most)
        ]
        outputs = self._run(prompts, params)
        self.prompt_tokens += sum(map(len, prompts))
        self.cached_tokens += sum(output.num_cached_tokens or 0 for output in outputs)
        return sampled(outputs)

    def _run(self, prompts: Sequence[torch.Tensor | list[int]], params: Sequence[Any]) -> list[Any]:
        requests = [
            {"prompt_token_ids": prompt.tolist() if isinstance(prompt, torch.Tensor) else prompt}
            for prompt in prompts
        ]
        if self._loop is None:
            return self.engine.generate(requests, list(params), use_tqdm=False)

        async def answered(request: Any, settings: Any) -> Any:
            async for output in self.engine.generate(request, settings, uuid.uuid4().hex):
                if output.finished:
                    return output
            raise RuntimeError("vLLM ended a request without an answer.")

        async def all_answered() -> list[Any]:
            return await asyncio.gather(*map(answered, requests, params))

        return self._loop.run(all_answered())

    # ------------------------------------------------------------------ weights
    def sync(self, weights: Any) -> None:
        """Take over the weights of a transformers model; the prefix cache, computed with the old ones, is emptied.

        Nothing may be under way in the engine. Weights go through memory where the engine is in this process, and
        through a file in shared memory (``/dev/shm``) elsewhere. For models that are not quantized.

        Args:
            weights: the model, of the same architecture, or its state dict; or pairs of a name and a tensor, each matrix once, of which
                none is kept where the engine is in this process.

        Raises:
            RuntimeError: the engine was not built by :meth:`from_pretrained`, or is still busy.
        """
        pairs: Iterable[tuple[str, torch.Tensor]] = weights
        if isinstance(weights, Mapping) or hasattr(weights, "state_dict"):
            pairs = _once(weights if isinstance(weights, Mapping) else weights.state_dict())
        if self._loop is None and hasattr(self.engine.llm_engine, "model_executor"):
            self._call("collective_rpc", "load_trained_weights", args=(pairs,))
        else:
            from safetensors.torch import save_file

            shared = Path("/dev/shm")
            with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
                path = str(Path(folder) / "weights.safetensors")
                save_file({name: tensor.cpu().contiguous() for name, tensor in pairs}, path)
                self._call("collective_rpc", "load_trained_weights", args=(path,))
        if self._call("reset_prefix_cache") is False:
            raise RuntimeError("vLLM could not empty its prefix cache: a request is still under way.")

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        called = getattr(self.engine, method)(*args, **kwargs)
        return called if self._loop is None else self._loop.run(called)

    # ------------------------------------------------------------------ the prefix cache
    @property
    def cached_share(self) -> float:
        """The share of prompt tokens that came from the prefix cache since :meth:`reset_counts`; 0 before any."""
        return self.cached_tokens / max(1, self.prompt_tokens)

    def reset_counts(self) -> None:
        """Begin to count anew."""
        self.prompt_tokens = 0
        self.cached_tokens = 0

    def close(self) -> None:
        """End an asynchronous engine and its process; an engine in this process ends with its last reference."""
        if self._loop is not None:
            self.engine.shutdown()
            self._loop.close()
            self.engine = None


def _once(state: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    """A tied matrix is in a state dict under both of its names, but vLLM has it once."""
    seen: set[int] = set()
    own = []
    for name, tensor in state.items():
        if tensor.data_ptr() not in seen or not tensor.numel():
            seen.add(tensor.data_ptr())
            own.append((name, tensor.detach()))
    return own


def sampling_params(stop_ids: Iterable[int], **settings: Any) -> Any:
    """``SamplingParams`` of one answer: it ends at these ids and nowhere else, and only the sampled ids are scored."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        **settings,
        stop_token_ids=sorted(stop_ids),
        ignore_eos=True,
        logprobs=0,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def sampled(outputs: Sequence[Any]) -> tuple[list[list[int]], list[list[float]]]:
    """The sampled ids of each ``RequestOutput``, and their log-probs."""
    answers = [output.outputs[0] for output in outputs]
    ids = [list(answer.token_ids) for answer in answers]
    return ids, [
        [step[token].logprob for step, token in zip(answer.logprobs, row, strict=True)]
        for answer, row in zip(answers, ids, strict=True)
    ]


def vocabulary_bias(config: Any, vocab_size: int) -> dict[int, float] | None:
    """A ``logit_bias`` against ids that the model has and the tokenizer has not; ``None`` where there are none.

    Embeddings are often padded beyond the vocabulary. Such an id means nothing; -100 is as far as vLLM goes.
    """
    return dict.fromkeys(range(vocab_size, config.get_vocab_size()), -100.0) or None


def check_log_probs_mode(config: Any, temperature: float, bias: dict[int, float] | None) -> None:
    """See that an engine reports log-probs of the distribution that it samples from.

    Raises:
        ValueError: its ``logprobs_mode`` is another.
    """
    mode = config.logprobs_mode
    if mode == "processed_logprobs" or (mode == "raw_logprobs" and temperature in (0, 1) and bias is None):
        return
    raise ValueError(
        f"the engine has logprobs_mode={mode!r}: its log-probs are not those of the distribution that it samples from. "
        f"Build it with logprobs_mode='processed_logprobs', as VLLMPolicy.from_pretrained does."
    )


def _vllm() -> None:
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "VLLMPolicy needs vLLM: pip install 'torchrl_chat[vllm]', on the CPU as constraints-vllm.txt says."
        ) from error
