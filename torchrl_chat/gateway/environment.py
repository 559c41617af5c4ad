"""``AgentEnv``: an agent as a torchrl environment, whose observation is what it asks, and whose action is what it is told.

An agent holds its own loop: it asks, and waits. So the request that waits is the observation, its prompt in the ledger's ids; the policy's
answer is the action; and a step lets all agents of the batch go on until each asks again, or has ended. What is collected in this way is a
turn a row, with any collector. :func:`~torchrl_chat.playing.play` does not wait for the slowest: it plays whole episodes, as
:func:`~torchrl_chat.gateway.play_agents` does.

Law of this file: where an agent stands is not in the TensorDict, so what is stepped must be what was shown last.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Bounded, Composite, NonTensor, Unbounded
from torchrl.envs import EnvBase

from torchrl_chat import columns
from torchrl_chat.conversation import Transcript, Turn
from torchrl_chat.conversation.limits import NO_LIMIT
from torchrl_chat.conversation.turn import Errors
from torchrl_chat.envs import reading
from torchrl_chat.envs.resetting import FreshRows
from torchrl_chat.envs.stepping import FlatStepping
from torchrl_chat.envs.transforming import Appending, TransformedChatEnv, as_transform
from torchrl_chat.gateway.agents import Agent
from torchrl_chat.gateway.agents import play_agents as _play_agents
from torchrl_chat.gateway.commands import SandboxedCommand
from torchrl_chat.gateway.desk import Desk, Nobody
from torchrl_chat.gateway.policies import PolicyEngine
from torchrl_chat.gateway.rewarding import Rewarder
from torchrl_chat.gateway.serve import Gateway
from torchrl_chat.gateway.settings import Settings
from torchrl_chat.openenv.protocol import ServerLimits
from torchrl_chat.policies.policy import Policy
from torchrl_chat.seeds import PLACE, SEED
from torchrl_chat.transforms.budgets import Budget
from torchrl_chat.transforms.reward import RewardTransform

_ENDS = ("done", "terminated", "truncated")
_GRADES = ("reward", "success", "graded")  # (*B, 1, 1) each
_WORDS = ("grade_failure", "extracted")  # str (*B,) each


class AgentEnv(Appending, FreshRows, FlatStepping, EnvBase):
    """The episodes of a dataset environment, played by an agent: the same rows, seeds, limits, grades and columns.

    Of the environment come the rows and their order, the limits of its :class:`~torchrl_chat.Budget`, the verifier of its
    :class:`~torchrl_chat.RewardTransform`, the tokenizer, the chat template and the input mode; the agent brings its own prompts and tools.

    **Whole episodes.** :func:`~torchrl_chat.playing.play` (and so every recipe) plays them by :meth:`play_episodes`: the policy samples
    whatever agents ask at the time, and nobody waits for the slowest.

    **Turn by turn**, for torchrl's collectors, ``rollout`` and ``TransformedEnv``: a reset starts an agent for each row, and shows
    what it asks first, in the columns of a :class:`~torchrl_chat.ChatEnv` of the same input mode; a step hands each agent the policy's answer,
    and shows what it asks next. All agents of the batch run at once, in lockstep. Beside the columns of a ``ChatEnv`` and the dataset's, over
    the batch size B:

    - ``"tokens_left"``: int64 (B, 1), how many tokens the policy may sample (2147483647 without a limit);
    - ``"episode_seed"``: of this answer; the episode's own, unless the agent has the same prompt answered more than once;
    - ``("next", "reward")`` float32 (B, 1, 1), ``("next", "success")`` and ``("next", "graded")`` bool (B, 1, 1), ``("next",
      "reward_parts", name)`` of a verifier that names its components, ``"grade_failure"``, ``"extracted"`` str (B,): of the step in which the
      episode ends.

    In a running episode ``"transcript"`` and ``("tokens", "prompt")`` are the prompt of the request; an agent that forks, or edits its history,
    asks something that does not begin with what was there before. With the end comes the whole episode: ``("next", "transcript")`` has all its
    sequences, and :func:`~torchrl_chat.training_view` makes of rows that are done what it makes of any.

    An agent's place is not in the TensorDict: a saved one cannot be stepped again, and a reset ends the agents of its rows. An environment
    that was pickled begins anew. Verifiers of groups need whole groups, and so :func:`~torchrl_chat.playing.play`.

    Args:
        env: a :class:`~torchrl_chat.DatasetChatEnv` with a tokenizer.
        agent: see :func:`~torchrl_chat.gateway.play_agents`.

    Keyword Args:
        reward: another verifier than the environment's.
        settings: of the sessions; the limits are the environment's, unless it has none.
        concurrency: of whole episodes, how many agents run at once; ``None``: all of a batch, or 32 commands. The fewer there are, the smaller
            the batches that the policy samples.
        seconds, on_error: as for :func:`~torchrl_chat.gateway.play_agents`.
        gateway: options of :class:`~torchrl_chat.gateway.Gateway`.

    Raises:
        ValueError: the environment has no tokenizer.
        RuntimeError: at a step: it is not what was shown last.

    Example:
        >>> from openai import OpenAI
        >>> from torchrl_chat import GSM8KEnv, TransformersPolicy, play
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_model, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> policy = TransformersPolicy(tiny_model(len(tokenizer)), tokenizer, max_new_tokens=4)
        >>> rows = [{"question": "How much is 6 * 7?", "answer": "#### 42"}]
        >>> def agent(row, session):
        ...     client = OpenAI(base_url=session.base_url, api_key=session.api_key)
        ...     client.chat.completions.create(model="policy", messages=[{"role": "user", "content": row["query"]}])
        >>> env = GSM8KEnv(
        ...     dataset=rows, tokenizer=tokenizer, input_mode="tokens", num_envs=2, repeats=2, group_repeats=True
        ... )
        >>> env = AgentEnv(env, agent)
        >>> finished = play(env, policy)
        >>> turns = env.rollout(1, policy)
        >>> env.close()
    """

    def __init__(
        self,
        env: Any,
        agent: Agent,
        *,
        reward: Any = None,
        settings: Settings | None = None,
        concurrency: int | None = None,
        seconds: float | None = None,
        on_error: Literal["score", "fail"] = "score",
        gateway: Mapping[str, Any] | None = None,
    ):
        base = env.base_env
        if getattr(base, "template", None) is None:
            raise ValueError("the environment has no tokenizer: its episodes have no tokens.")
        super().__init__(batch_size=env.batch_size, device=env.device)
        self.__dict__["env"] = env  # no part of this module: its state is this one's
        self.agent = agent
        settings = settings or Settings()
        for transform in _transforms(env):
            if isinstance(transform, Budget):
                settings = dataclasses.replace(settings, limits=transform.limits)
            if isinstance(transform, RewardTransform) and reward is None:
                reward = Rewarder(
                    transform.grader, reference_key=transform.reference_key, on_failure=transform.on_failure
                )
        if reward is not None and not isinstance(reward, Rewarder):
            reward = Rewarder(reward)
        server = ServerLimits(max_sessions=max(1024, env.batch_size.numel()), max_sessions_per_address=None)
        options = {"template": base.template.renderer.variables, "server": server, **dict(gateway or {})}
        self._options: dict[str, Any] = {**options, "settings": settings, "reward": reward}
        count = env.batch_size.numel()
        concurrency = concurrency or (count if callable(agent) else min(count, 32))
        self._playing: dict[str, Any] = {"concurrency": concurrency, "seconds": seconds, "on_error": on_error}
        self._grader = None if reward is None else reward.grader
        self._gateway: Gateway | None = None
        self._policy: Policy | None = None
        self._desk: Desk | None = None
        self._make_specs()

    def _make_specs(self) -> None:
        base, batch, device = self.env.base_env, self.batch_size, self.device
        one, pair = (*batch, 1), (*batch, 1, 1)
        observation = base.full_observation_spec.clone()
        for key, spec in self.env.primer.primers.items():
            observation[key] = spec.clone()
        observation["tokens_left"] = Bounded(0, NO_LIMIT, shape=one, dtype=torch.int64, device=device)
        reward = Composite(shape=batch, device=device)
        for key in _GRADES:
            dtype = torch.float32 if key == "reward" else torch.bool
            reward[key] = Unbounded(pair, dtype=dtype, device=device)
        for key in _WORDS:
            reward[key] = NonTensor(batch, device=device, example_data="")
        if parts := self._parts:
            numbers = {name: Unbounded(pair, dtype=torch.float32, device=device) for name in parts}
            reward["reward_parts"] = Composite(numbers, shape=batch, device=device)
        self.full_observation_spec = observation
        self.full_action_spec = base.full_action_spec.clone()
        self.full_state_spec = Composite(shape=batch, device=device)
        self.full_done_spec = base.full_done_spec.clone()
        self.full_reward_spec = reward

    @property
    def _parts(self) -> tuple[str, ...]:
        return () if self._grader is None else self._grader.components

    # ------------------------------------------------------------------ whole episodes
    def play_episodes(self, policy: Policy, tensordict: Any = None) -> TensorDict:
        """The next episodes of the environment, finished: see :func:`~torchrl_chat.playing.play`.

        Args:
            policy: what samples; a policy of this package.
            tensordict: what the environment that this one was made of returned from ``reset``; ``None`` draws the next rows here.
        """
        td = self._drawn([True] * self.batch_size.numel()) if tensordict is None else tensordict
        rows = _rows(td, self.env)
        data_key = self.env.base_env.data_key
        return _play_agents(self.agent, rows, self._serving(policy), data_key=data_key, **self._playing)

    def _serving(self, policy: Policy) -> Gateway:
        if self._gateway is None or self._policy is not policy:
            self.close_gateway()
            # No part of this module: a policy's weights are its owner's.
            self.__dict__["_policy"] = policy
            engine = PolicyEngine(policy, max_batch=max(64, self.batch_size.numel()))
            self._gateway = Gateway(engine, self.env.base_env.tokenizer, **self._options)
            self._gateway.start()
        return self._gateway

    # ------------------------------------------------------------------ turn by turn
    def _reset(self, tensordict: TensorDictBase | None = None, **_: Any) -> TensorDictBase:
        self._warn_of_lost()
        reset = None if tensordict is None else tensordict.get("_reset", None)
        count = self.batch_size.numel()
        wanted = [True] * count if reset is None else reset.reshape(count, -1).any(-1).tolist()
        if isinstance(self.agent, SandboxedCommand):
            self.agent.prepare()  # where there can be no sandbox no session begins
        desk = self._at_desk()
        chosen = [i for i in range(count) if wanted[i]]
        td = self._drawn(wanted)
        rows = _rows(td, self.env)
        desk.begin({i: rows[i] for i in chosen})
        desk.wait(chosen)
        nothing = self.env.base_env._nothing()
        following = self._observed([nothing if ledger is None else ledger for ledger in desk.ledgers], td)
        following.set("env_failure", columns.objects([""] * count, self.batch_size, self.device))
        following.set("stop_reason", torch.zeros(*self.batch_size, 1, dtype=torch.int64, device=self.device))
        for key in _ENDS:
            following.set(key, torch.zeros(*self.batch_size, 1, dtype=torch.bool, device=self.device))
        return following

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        desk, count = self._at_desk(), self.batch_size.numel()
        goes = columns.stepped(tensordict)
        held: list[Transcript] = self.env.base_env._written(tensordict)
        desk.check(held, goes)
        live = [going and desk.asks(i) for i, going in enumerate(goes)]
        faults: Errors = {}
        turns = self._turns(tensordict, held, live, faults)
        stepped = [i for i in range(count) if goes[i]]
        for i in stepped:
            if live[i]:
                desk.answer(i, faults[i] if i in faults else turns[i])
        desk.wait(stepped)
        over = [i for i in stepped if desk.ended(i)]
        finished = desk.finish(over, self._groups(tensordict), self._playing["on_error"])
        shown = [held[i] if ledger is None else ledger for i, ledger in enumerate(desk.ledgers)]
        if finished is not None:
            whole = columns.read_objects(finished.get("transcript"), finished.batch_size)
            for i, ledger in zip(over, whole, strict=True):
                shown[i] = ledger
        following = self._observed(shown, tensordict)
        self._write_ends(tensordict, following, over, finished)
        return following

    def _turns(
        self, td: TensorDictBase, held: Sequence[Transcript], live: Sequence[bool], faults: Errors
    ) -> list[Turn | None]:
        """What the policy did in each row."""
        base = self.env.base_env
        reader = reading.Reader(td, held, live, base.template, faults)
        if base.input_mode == "text":
            reading.check_texts(td, held, self.batch_size)
        reader.check_prompts(held)
        return reader.turns(base.input_mode)

    def _observed(self, ledgers: Sequence[Transcript], rows: TensorDictBase) -> TensorDict:
        """The columns that show these ledgers, with the rows that they are about."""
        following = self.env.base_env._observe(list(ledgers))
        for key in self.env.primer.primers.keys():
            following.set(key, columns.shallow(rows.get(key)))
        desk = self._at_desk()
        seeds = following.get(SEED).flatten().tolist()
        seeds = [desk.seed(i, seed) for i, seed in enumerate(seeds)]
        following.set(SEED, torch.tensor(seeds, device=self.device).reshape(self.batch_size))
        left = [desk.room(i) for i in range(len(ledgers))]
        following.set("tokens_left", torch.tensor(left, device=self.device).reshape(*self.batch_size, 1))
        return following

    def _write_ends(
        self, td: TensorDictBase, following: TensorDict, over: Sequence[int], finished: TensorDict | None
    ) -> None:
        """Write what ended, how, and what it is worth; rows that ended before, or were not stepped, stay as they were."""
        batch, device = self.batch_size, self.device
        place = torch.tensor(over, dtype=torch.int64, device=device)

        def numbers(key: Any, like: torch.Tensor, keep: bool) -> None:
            before = td.get(key, None) if keep else None
            column = like if before is None else before.clone()
            if finished is not None and (new := finished.get(key, None)) is not None:
                column.view(-1)[place] = new.flatten().to(column)
            following.set(key, column)

        def texts(key: str, keep: bool) -> None:
            before = td.get(key, None) if keep else None
            values = [""] * batch.numel() if before is None else columns.read_objects(before, batch)
            if finished is not None:
                new = columns.read_objects(finished.get(key), finished.batch_size)
                for i, value in zip(over, new, strict=True):
                    values[i] = value
            following.set(key, columns.objects(values, batch, device))

        for key in _ENDS:
            numbers(key, torch.zeros(*batch, 1, dtype=torch.bool, device=device), True)
        numbers("stop_reason", torch.zeros(*batch, 1, dtype=torch.int64, device=device), True)
        texts("env_failure", True)
        for key in _GRADES:
            numbers(key, torch.zeros(*batch, 1, 1, dtype=torch.float32 if key == "reward" else torch.bool), False)
        for key in _WORDS:
            texts(key, False)
        if self._parts:
            following.set("reward_parts", TensorDict(batch_size=batch, device=device))
            for name in self._parts:
                numbers(("reward_parts", name), torch.zeros(*batch, 1, 1, device=device), False)

    def _drawn(self, wanted: Sequence[bool]) -> TensorDict:
        """The next rows of the dataset; in the others, whatever."""
        return self.env.primer.draw(wanted, self.device)

    def _groups(self, td: TensorDictBase) -> list[int]:
        """Which group a row belongs to: rows in a row, of which each is the next place of the same dataset row."""
        places = td.get(PLACE).flatten().tolist()
        groups, group = [], -1
        for place, before in zip(places, [None, *places], strict=False):
            group += before is None or place <= before
            groups.append(group)
        return groups

    def _at_desk(self) -> Desk:
        if self._desk is None:
            if self._grader is not None and getattr(self._grader.verifier, "grades", None) == "group":
                raise ValueError(
                    "a verifier of groups grades whole groups: play whole episodes, play(env, policy)."
                )
            base = self.env.base_env
            gateway = Gateway(Nobody(), base.tokenizer, **self._options)
            self._desk = Desk(self.agent, gateway, self.batch_size.numel(), self._playing["seconds"], base.data_key)
        return self._desk

    # ------------------------------------------------------------------ as an environment
    def append_transform(self, transform: Any) -> TransformedChatEnv:
        """A new environment: this one with a transform. This one stays as it was.

        What writes into the conversation (tools, users, system prompts) is the agent's affair; such transforms refuse to work here.
        """
        added = as_transform(transform)
        return self._handed(TransformedChatEnv(self, added), added)

    def rand_action(self, tensordict: TensorDictBase | None = None) -> TensorDictBase:
        """A short random answer a row."""
        action = self.full_action_spec.rand()
        return action if tensordict is None else tensordict.update(action)

    @property
    def primer(self) -> Any:
        """The transform that loads the rows."""
        return self.env.primer

    def reset_dataloader(self) -> AgentEnv:
        """Start from the first row of the dataset again, in the order of the seed."""
        self.env.reset_dataloader()
        return self

    def set_seed(self, seed: int | None = None, static_seed: bool = False) -> int | None:
        """Seed the episodes, and the order of the rows; the dataset starts anew."""
        return self.env.set_seed(seed, static_seed)

    def _set_seed(self, seed: int | None) -> None:
        """The rows are seeded where they are."""

    def state_dict(self, *arguments: Any, **options: Any) -> Any:
        """Where the dataset is: the state of the environment that this one was made of. Where agents are is in no state."""
        return self.env.state_dict(*arguments, **options)

    def load_state_dict(self, state_dict: Any, *arguments: Any, **options: Any) -> Any:
        """Go on from there."""
        return self.env.load_state_dict(state_dict, *arguments, **options)

    def close_gateway(self) -> None:
        """Stop serving, and end the agents that are still at it; it begins anew with the next episodes."""
        if self._desk is not None:
            self._desk.close()
            self._desk = None
        if self._gateway is not None:
            self._gateway.close()
            self._gateway = None

    def close(self, **options: Any) -> None:
        """Stop serving, and close the environment."""
        self.close_gateway()
        self.env.close()
        super().close(**options)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_gateway": None, "_desk": None, "_policy": None}


def _transforms(env: Any) -> Iterator[Any]:
    """All transforms of an environment, its inner ones first."""
    held = getattr(env, "transform", None)
    yield from () if held is None else getattr(held, "transforms", [held])


def _rows(td: Any, env: Any) -> list[dict[str, Any]]:
    """The dataset's columns of a reset, a dict a row."""
    names = [str(name) for name in env.primer.primers.keys()]
    count = td.batch_size.numel()
    rows: list[dict[str, Any]] = [{} for _ in range(count)]
    for name in names:
        column = td.get(name)
        values = (
            column.reshape(count, *column.shape[td.ndim :]).tolist()
            if isinstance(column, torch.Tensor)
            else columns.read_objects(column, td.batch_size)
        )
        for row, value in zip(rows, values, strict=True):
            row[name] = value
    return rows
