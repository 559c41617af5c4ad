"""What the training scripts train on: models, environments and policies by the names of the command line."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from tensordict import TensorDictBase

from torchrl_chat import gallery, ranks, tiny
from torchrl_chat.learner.adapters import is_quantized, merged_weights, whole, with_lora
from torchrl_chat.learner.memory import room_for
from torchrl_chat.learner.optimizers import make_adamw, set_rate
from torchrl_chat.learner.precision import compute_in
from torchrl_chat.learner.recomputing import recompute_activations
from torchrl_chat.learner.sharding import gathered, is_sharded, shard
from torchrl_chat.models.passes import unwrapped
from torchrl_chat.models.small import plain_class
from torchrl_chat.named import named
from torchrl_chat.pretrained import load_model, load_tokenizer, with_template
from torchrl_chat.recipes.settings import PURE, RunConfig, rate_for
from torchrl_chat.training.losses import masked_mean
from torchrl_chat.training.scoring import sequence_log_probs
from torchrl_chat.training.updates import take_step
from torchrl_chat.training.values import PolicyAndValue
from torchrl_chat.training.view import training_view

if TYPE_CHECKING:
    from torchrl_chat.envs import DatasetChatEnv
    from torchrl_chat.gateway import AgentEnv

_HINT = 0.06  # the share of demonstrations with the operation that was asked for, beyond chance


def make_model(config: RunConfig) -> tuple[Any, Any]:
    """The model of ``--model``, its weights on ``--device``, with what is asked for around it, and its tokenizer.

    Where torchrun has started several processes they find each other here, and each has its part of the model.
    """
    model, tokenizer = _prepared(config)
    return shard(model), tokenizer


def make_actor_critic(config: RunConfig, trunk: Literal["shared", "separate"]) -> tuple[PolicyAndValue, Any]:
    """The model of :func:`make_model` with a value head, and its tokenizer."""
    model, tokenizer = _prepared(config)
    return shard(PolicyAndValue(model, trunk)), tokenizer


def _prepared(config: RunConfig) -> tuple[Any, Any]:
    """The model, before it is parted."""
    ranks.begin(config.device)
    model, tokenizer = _make_model(config)
    if is_quantized(model) and (wrong := _asks_too_much(config)):
        raise ValueError(f"the weights of {config.model} are quantized: {wrong}")
    if config.checkpointing:
        recompute_activations(model)
    if config.lora:
        random_state = torch.get_rng_state()
        torch.manual_seed(config.seed)
        model = with_lora(model, config.lora, config.lora_alpha, config.lora_targets)
        torch.set_rng_state(random_state)
    return _computing(config, model), tokenizer


def _asks_too_much(config: RunConfig) -> str | None:
    """What a run asks of a quantized model that it cannot do; ``None`` where it asks for nothing such."""
    if not config.lora:
        return "they cannot be trained. Give --lora 16 for an adapter on them, or a --model that is not quantized."
    if config.merge:
        return (
            "--merge would quantize the sum with the adapter again, another model. Train without it, and merge the adapter of the last "
            "checkpoint into the model that they were made of: peft's PeftModel.from_pretrained, then merge_and_unload."
        )
    if config.backend == "vllm":
        return (
            "--backend vllm is sent whole weights after each step, and they are none. Give --backend transformers."
        )
    if ranks.count() > 1:
        return "they cannot lie in parts on several processes. Train in one process."
    return None


def _computing(config: RunConfig, model: Any) -> Any:
    """A model in ``--dtype``."""
    return model if config.dtype == PURE else compute_in(model, getattr(torch, config.dtype))


def _weights_in(config: RunConfig) -> torch.dtype:
    """What weights are kept in: an update at the learning rates of fine-tuning is smaller than their rounding in bfloat16."""
    return torch.bfloat16 if config.dtype == PURE else torch.float32


def _make_model(config: RunConfig) -> tuple[Any, Any]:
    import transformers

    transformers.utils.logging.disable_progress_bar()  # of weights that are read and written
    device = _device(config)
    if config.model == "tiny":
        made = gallery.tiny_tokenizer_for(config.dataset)
        tokenizer: Any = with_template(made, config.chat_template)
        # vLLM on the CPU has attention for heads of 32 and more; hidden size 128 has such.
        model = tiny.tiny_model(len(tokenizer), hidden=128, seed=config.seed, context=4096)
        return model.to(device, _weights_in(config)), tokenizer
    tokenizer = load_tokenizer(config.model, config.chat_template)
    return load_model(config.model, dtype=_weights_in(config)).to(device).eval(), tokenizer


def make_teacher(config: Any, tokenizer: Any) -> Any:
    """The model of ``--teacher``, frozen, in the precision of the one that is trained.

    Raises:
        ValueError: its tokenizer is another one.
    """
    own = load_tokenizer(config.teacher, config.chat_template)
    if own.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"--teacher {config.teacher} has another tokenizer than --model {config.model}: of the model's tokens it can say nothing."
        )
    model = load_model(config.teacher, dtype=_weights_in(config)).to(_device(config)).eval().requires_grad_(False)
    return shard(_computing(config, model))


def _device(config: RunConfig) -> torch.device:
    return ranks.device(config.device)


def make_env(
    config: RunConfig, tokenizer: Any, prompts: int, group_size: int, seed: int
) -> DatasetChatEnv | AgentEnv:
    """The environment of ``--dataset``, its batch made of whole groups, each conversation graded at its end; played by ``--agent``,
    if there is one.

    Of n processes each has every n-th question, so that together they play what one would.

    Raises:
        ValueError, ImportError, DatasetError: see :func:`~torchrl_chat.gallery.make_env`; or there is no such agent.
    """
    env = _dataset_env(config, tokenizer, prompts, group_size, seed)
    if config.agent is None:
        return env
    from torchrl_chat.gateway import AgentEnv

    return AgentEnv(env, named(config.agent))


def _dataset_env(config: RunConfig, tokenizer: Any, prompts: int, group_size: int, seed: int) -> DatasetChatEnv:
    own, count = ranks.own(), ranks.count()
    parted: dict[str, Any] = {} if count == 1 else {"shard": (own, count)}
    return gallery.make_env(
        config.dataset,
        data=config.data,
        split=config.split,
        reward=config.reward,
        settings=config.task_settings,
        limits={"max_turns": config.max_turns, "max_turn_tokens": config.max_new_tokens},
        seed=seed,
        tokenizer=tokenizer,
        input_mode=config.input_mode,
        num_envs=len(range(own, prompts, count)),
        repeats=group_size,
        group_repeats=True,
        **parted,
    )


def make_policy(config: RunConfig, model: Any, tokenizer: Any) -> tuple[Any, Callable[[], None]]:
    """What samples, and a function that gives it the model's weights of that moment.

    Both backends sample each conversation from its episode's seed: neither the batch nor the past has a part in it.
    """
    from torchrl_chat.policies import TransformersPolicy, VLLMPolicy

    settings: dict[str, Any] = {
        "max_new_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "seeded": True,
    }
    if config.backend == "transformers":
        return TransformersPolicy(model, tokenizer, **settings), lambda: None
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # it tells of every weight that it takes over
    random_state = torch.get_rng_state()  # vLLM seeds torch's generator
    if torch.cuda.is_available():
        settings["gpu_memory_utilization"] = config.vllm_memory
    if config.vllm_dtype != "auto" or torch.cuda.is_available():  # on a CPU VLLMPolicy has its own default
        settings["dtype"] = config.vllm_dtype
    with tempfile.TemporaryDirectory() as folder:
        if is_sharded(model):  # an engine on each process, which gets its weights before it samples
            settings |= {"distributed_executor_backend": "external_launcher", "load_format": "dummy"}
            engine = copy.deepcopy(unwrapped(model).config)
            engine.architectures = [plain_class(model).__name__]
            engine.save_pretrained(folder)
        else:
            whole(model).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        policy = VLLMPolicy.from_pretrained(folder, tokenizer, **settings)
    torch.set_rng_state(random_state)

    def sync() -> None:
        with gathered(model):
            policy.sync(merged_weights(model))

    return policy, sync


def make_optimizer(config: RunConfig, module: torch.nn.Module) -> torch.optim.Optimizer:
    """The ``--optimizer`` of what is trained of a model; a learning rate that was left to its size, and how much goes through it, are
    set and said.
    """
    settle_tokens(config, module)
    if config.lr is None:
        size = sum(weight.numel() for name, weight in module.named_parameters() if ".lora_" not in name)
        config.lr, source = rate_for(size, bool(config.lora))
        if ranks.leads():
            print(f"learning rate {config.lr:g}: {source} (--lr)")
    trained = [weight for weight in module.parameters() if weight.requires_grad]
    return make_adamw(trained, config.lr, config.optimizer)


def settle_tokens(config: RunConfig, module: torch.nn.Module) -> None:
    """Set ``--max_tokens`` where it was left to the device's memory; a run that goes on keeps what it began with."""
    if config.max_tokens is not None:
        return
    begun = Path(config.out or "", "config.json")
    if config.resume and begun.exists():
        with contextlib.suppress(ValueError, AttributeError):  # Run says what is wrong with the file
            config.max_tokens = json.loads(begun.read_bytes()).get("max_tokens")
            return
    model: Any = getattr(module, "model", module) if not hasattr(module, "get_output_embeddings") else module
    # What comes to the device later: a reference that is no adapter's base, a teacher (of this size, say), an engine.
    copies = bool(getattr(config, "kl", 0.0) and not config.lora) + (getattr(config, "teacher", None) is not None)
    reserved = copies * sum(weight.numel() * weight.element_size() for weight in model.parameters())
    device = next(model.parameters()).device
    if config.backend == "vllm" and device.type == "cuda":
        reserved += int(config.vllm_memory * torch.cuda.get_device_properties(device).total_memory)
    room = room_for(module, model, least=config.max_new_tokens, reserved=reserved)
    config.max_tokens = -int(ranks.most(-room.tokens))
    if ranks.leads():
        print(f"{room._replace(tokens=config.max_tokens)} (--max-tokens)")


def ask(env: DatasetChatEnv | AgentEnv, policy: Any, config: RunConfig) -> TensorDictBase:
    """The same questions each time, and the conversations about them, finished."""
    from torchrl_chat.playing import play

    env.reset_dataloader()
    finished = play(env, policy, max_turns=config.max_turns)
    env.reset_dataloader()  # a state of it can be parted over any number of processes
    return finished


# ---------------------------------------------------------------------- the two-turn tool task
def demonstrations(env: DatasetChatEnv, seed: int) -> TensorDictBase:
    """A batch of conversations that show the form of the tool task: a program, and its output as the answer.

    The program computes with any of the three operations, nearly whatever was asked: which one is meant is left to find out.
    """
    from torchrl.modules.llm.policies import Tokens

    from torchrl_chat import columns
    from torchrl_chat.playing import play

    draw = random.Random(seed)
    base: Any = env.base_env
    codec, stop = base.template.codec, base.tokenizer.eos_token

    def expert(td: TensorDictBase) -> TensorDictBase:
        texts = []
        for transcript in columns.read_objects(td.get("transcript"), td.batch_size):
            last = transcript.messages[-1]
            if last["role"] == "tool":
                texts.append(last["content"].strip())
            else:
                name, a, b = last["content"].split()
                sign = tiny.SIGNS[name] if draw.random() < _HINT else draw.choice(list(tiny.SIGNS.values()))
                texts.append(f"```python\nprint({a}{sign}{b})\n```")
        ids = [torch.tensor(row) for row in codec.encode([text + stop for text in texts])]
        td["tokens"] = columns.ragged(Tokens, "response", ids, td.batch_size, None)
        return td

    return training_view(play(env, expert), layout="padded")


def warm_start(
    config: RunConfig,
    model: Any,
    optimizer: torch.optim.Optimizer,
    tokenizer: Any,
    count: int = 1024,
    batch: int = 64,
) -> None:
    """Train a model from random weights on demonstrations for ``--warm_steps`` steps, so that rewards are found at all.

    The optimizer is the run's own: the first steps of one that knows no gradients yet would undo what was learned.

    Raises:
        ValueError: the dataset has no demonstrations.
    """
    if not config.warm_steps:
        return
    if config.dataset != "python-tool":
        raise ValueError(
            f"--warm_steps is {config.warm_steps}, and {config.dataset} has no demonstrations: only python-tool."
        )
    env = _dataset_env(config, tokenizer, count, 1, config.seed)
    try:
        view = demonstrations(env, config.seed)
    finally:
        env.close()
    set_rate(optimizer, 2e-3)
    for _ in range(config.warm_steps):
        scores = sequence_log_probs(model, view[torch.randint(len(view), (batch,))])
        loss = (
            -masked_mean(scores.log_probs, scores.mask) / ranks.count()
        )  # gradients are summed over the processes, which have rows of their own
        optimizer.zero_grad()
        loss.backward()
        take_step(optimizer, loss)
