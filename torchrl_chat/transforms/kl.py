"""Reference log-probs and KL penalties, in an environment, behind a collector and in a replay buffer.

They read the ledger, not what a policy or a wrapper left in the TensorDict: so they know which tokens were sampled in
this turn, and score exactly these.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torchrl.data import Composite, Unbounded
from torchrl.envs import Transform
from torchrl.modules.llm.policies import LogProbs

from torchrl_chat import columns
from torchrl_chat.conversation import Transcript
from torchrl_chat.templates.backends import tokenizer_of
from torchrl_chat.templates.codec import codec_of
from torchrl_chat.training import kl_estimate
from torchrl_chat.training.losses import KLKind
from torchrl_chat.training.totals import episode_totals
from torchrl_chat.transforms.home import chat_env, flags
from torchrl_chat.transforms.references import ModelReference, Reference, as_reference


class Scored(NamedTuple):
    """A token sequence that a reference scores, with what is looked at in it."""

    row: int
    tokens: torch.Tensor  # int64 (T,)
    mask: torch.Tensor  # bool (T,), every sampled token
    turn: torch.Tensor  # bool (T,), those whose KL counts now
    log_probs: torch.Tensor  # float32 (T,), of the policy


class RetrieveLogProb(Transform):
    """Writes the log-probs of the sampled tokens under a reference.

    As torchrl's transform of this name, but that one (0.14.1) wants a model that reads histories, which it tokenizes
    anew, and fails in an environment (``KeyError: ('log_probs', 'full') is unaccounted for``). Works

    - in an environment (``append_transform``): the steps get it under ``"next"``; rows that are not stepped get zeros;
    - behind a collector (``LLMCollector(postproc=...)``): as above, for a whole batch of steps in one call, where a
      conversation's turns share one pass through the reference;
    - in a replay buffer of steps or of training views (:func:`~torchrl_chat.training_view`, ragged or padded), when
      it is sampled, or with ``on="extend"`` when it is extended. The buffer's own data stay as they are.

    Written: ``("ref_log_probs", "full")``, float32 (T,) a row, ragged (or (N, T) where a view is padded), aligned with
    ``("tokens", "full")``: 0 where nothing was sampled. That is where torchrl's ``GRPOLoss(kl_to_ref_coeff=...)`` reads.

    The reference is no submodule of the environment: ``env.to(device)`` leaves it where it is.

    Args:
        reference: see :func:`~torchrl_chat.transforms.references.as_reference`.

    Keyword Args:
        ref_log_probs_key: where they are written, a pair that ends with ``"full"``.
        when: ``"turn"`` scores every turn, ``"done"`` only the rows that are done when the transform sees them, all
            turns at once: a reference reads a conversation of K turns once instead of K times.
        on: when a replay buffer applies it; with ``"extend"`` a call of the transform itself does nothing. Transforms
            of a buffer go backwards then: ``Compose(MCAdvantage(...), RetrieveKL(..., on="extend"))`` has the penalty in
            the advantage.
        tokenizer: that of the reference: in an environment it is compared with the environment's; elsewhere it says how
            large the vocabulary is.
        temperature: of the policy that samples, by which the reference's logits are divided, too. It is not known here, so
            give it wherever it is not 1 (what ``None`` means, unless the reference is a policy): else the KL of a model
            with itself is not 0.
        vocab_size: which of the reference's logits are cut off, see
            :class:`~torchrl_chat.transforms.references.ModelReference`. By default the vocabulary of the environment's
            tokenizer, which this package's policies sample from. Behind a collector and in a replay buffer there is no
            environment: give ``tokenizer`` or this where the model's embeddings are longer than the vocabulary.

    Raises:
        TypeError: the reference is none, or a PEFT model with its adapter on.
        ValueError: the reference has another temperature or vocabulary of its own, or is a server or a function, which have
            no other than they have.
        KeyError: at the call: there is neither a step with transcripts nor a training view.
        ValueError: at the call: the reference has another vocabulary.

    Example:
        >>> from torchrl_chat import DatasetChatEnv, TransformersPolicy
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_model, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> model = tiny_model(len(tokenizer))
        >>> env = DatasetChatEnv(dataset=[{"query": "2 + 2?"}], tokenizer=tokenizer, input_mode="tokens", num_envs=1)
        >>> policy = TransformersPolicy(model, tokenizer, max_new_tokens=4)
        >>> env = env.append_transform(RetrieveLogProb(model))
        >>> ("next", "ref_log_probs", "full") in env.rollout(1, policy).keys(True)
        True
    """

    def __init__(
        self,
        reference: Reference | Any,
        *,
        ref_log_probs_key: NestedKey = ("ref_log_probs", "full"),
        when: Literal["turn", "done"] = "turn",
        on: Literal["sample", "extend"] = "sample",
        tokenizer: Any = None,
        temperature: float | None = None,
        vocab_size: int | None = None,
    ):
        if when not in ("turn", "done"):
            raise ValueError(f"when={when!r}: expected 'turn' or 'done'.")
        if on not in ("sample", "extend"):
            raise ValueError(f"on={on!r}: expected 'sample' or 'extend'.")
        super().__init__(in_keys=["transcript"], out_keys=[])
        self.reference = as_reference(reference, temperature=temperature, vocab_size=vocab_size)
        self.ref_log_probs_key = _container_key(ref_log_probs_key, "ref_log_probs_key")
        self.when = when
        self.on = on
        self.tokenizer = tokenizer

    # ------------------------------------------------------------------ where it is called from
    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        if self.tokenizer is not None:
            _check_tokenizers(self.tokenizer, chat_env(self).tokenizer)
        return self._on_steps(tensordict, next_tensordict)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """A batch of steps, or a training view, with what this transform writes."""
        return tensordict if self.on == "extend" else self._on_batch(tensordict)

    def _inv_call(self, tensordict: TensorDictBase) -> TensorDictBase:
        # On a replay buffer's way in; an environment's, which is the policy's answer, is left alone.
        return self._on_batch(tensordict) if self.on == "extend" and self.parent is None else tensordict

    def _on_batch(self, tensordict: TensorDictBase) -> TensorDictBase:
        tensordict = tensordict.copy()  # a sample of a lazy storage is the storage's own data
        following = tensordict.get("next", None)
        if following is not None and "transcript" in following.keys():
            return tensordict.set("next", self._on_steps(tensordict, following))
        if "tokens" in tensordict.keys() and "masks" in tensordict.keys():
            return self._on_view(tensordict)
        raise KeyError(
            f"{type(self).__name__} reads steps, ('next', 'transcript'), or training views, ('tokens', 'full'): got "
            f"the keys {sorted(map(str, tensordict.keys()))}."
        )

    def _on_steps(self, root: TensorDictBase, following: TensorDictBase) -> TensorDictBase:
        batch, device = following.batch_size, following.device
        for td, name in ((root, "'transcript'"), (following, "('next', 'transcript')")):
            if "transcript" not in td.keys():
                raise KeyError(
                    f"{type(self).__name__} reads {name}, which is not there: it works on a ChatEnv's steps."
                )
        before: list[Transcript | None] = columns.read_objects(root.get("transcript"), batch)
        after: list[Transcript] = columns.read_objects(following.get("transcript"), batch)
        # torchrl leaves finished rows in a rollout.
        goes = [went and not over for went, over in zip(columns.stepped(root), flags(root, "done"), strict=True)]
        if self.when == "done":
            goes = [went and over for went, over in zip(goes, flags(following, "done"), strict=True)]
            before = [None] * len(after)
        sequences = [s for row, went in enumerate(goes) if went for s in _sampled(row, before[row], after[row])]
        sequences = self._check(sequences, torch.tensor([t.scored for t in after]))
        scores = self._score(sequences)
        shown = {sequence.row: i for i, sequence in enumerate(sequences)}
        lengths = [len(t) for t in after]

        def ragged(values: Sequence[torch.Tensor]) -> Any:
            rows = [
                values[shown[row]] if row in shown else torch.zeros(length) for row, length in enumerate(lengths)
            ]
            rows = rows if device is None else [row.to(device) for row in rows]
            return columns.ragged(LogProbs, "full", rows, batch, device)

        self._write(following, sequences, scores, ragged, len(after))
        return following

    def _on_view(self, view: TensorDictBase) -> TensorDictBase:
        if len(view.batch_size) != 1:
            raise ValueError(
                "a packed training view is not scored here: see torchrl_chat.training.sequence_log_probs."
            )
        batch, device = view.batch_size, view.device
        fields = [
            ("tokens", "full"),
            ("masks", "all_assistant_mask"),
            ("log_probs", "full"),
            ("masks", "all_attention_mask"),
        ]
        read = []
        for container, key in fields:
            rows = columns.read_field(view.get(container, None), key, batch)
            if rows is None:
                raise KeyError(f"{type(self).__name__} reads {(container, key)}, which the training view lacks.")
            read.append(rows)
        attended = [attention.bool() for attention in read.pop()]
        # Without its padding a row is a sequence, whatever the side.
        sequences = [
            Scored(row, ids[real], mask[real].bool(), mask[real].bool(), log_probs[real])
            for row, (ids, mask, log_probs, real) in enumerate(zip(*read, attended, strict=True))
        ]
        sequences = self._check(sequences, view.get("scored", None))
        scores = self._score(sequences)

        def laid(values: Sequence[torch.Tensor]) -> Any:
            rows = [
                torch.zeros(real.shape, device=value.device).masked_scatter(real, value)
                for value, real in zip(values, attended, strict=True)
            ]
            if isinstance(columns.bare(view.get("tokens")), TensorDict):
                return columns.wrap(LogProbs, TensorDict(full=torch.stack(rows), batch_size=batch), "full")
            return columns.ragged(LogProbs, "full", rows, batch, device)

        self._write(view, sequences, scores, laid, len(sequences))
        return view

    # ------------------------------------------------------------------ what is done
    def _check(self, sequences: list[Scored], scored: torch.Tensor | None) -> list[Scored]:
        """The sequences that have all that is needed."""
        return sequences

    def _score(self, sequences: list[Scored]) -> list[torch.Tensor]:
        """The reference's log-probs of each sequence."""
        # Turns of one conversation lie on one tape, the earlier ones a prefix of the later: the longest serves all.
        longest: dict[int, Scored] = {}
        for sequence in sequences:
            key = sequence.tokens.data_ptr()
            if key not in longest or len(sequence.tokens) > len(longest[key].tokens):
                longest[key] = sequence
        chosen = [sequence for sequence in longest.values() if bool(sequence.mask.any())]
        scores: dict[int, torch.Tensor] = {}
        if chosen:
            found = self._at_hand().score([s.tokens for s in chosen], [s.mask for s in chosen])
            scores = {s.tokens.data_ptr(): values for s, values in zip(chosen, found, strict=True)}
        return [
            scores[s.tokens.data_ptr()][: len(s.tokens)].masked_fill(~s.mask, 0.0)
            if s.tokens.data_ptr() in scores
            else torch.zeros(s.tokens.shape, device=s.tokens.device)
            for s in sequences
        ]

    def _at_hand(self) -> Reference:
        """The reference, with the vocabulary that is known where it is asked."""
        reference = self.reference
        if not isinstance(reference, ModelReference) or reference.vocab_size is not None:
            return reference
        if self.parent is not None and chat_env(self).tokenizer is not None:
            return reference.told(vocab_size=chat_env(self).template.codec.vocab_size)
        if self.tokenizer is not None:
            return reference.told(vocab_size=codec_of(tokenizer_of(self.tokenizer)).vocab_size)
        return reference

    def _write(
        self, td: TensorDictBase, sequences: list[Scored], scores: list[torch.Tensor], laid: Any, rows: int
    ) -> None:
        td.set(self.ref_log_probs_key, laid(scores))

    def transform_reward_spec(self, reward_spec: Composite) -> Composite:
        """The specs of what is written."""
        reward_spec[self.ref_log_probs_key] = self._ragged_spec(reward_spec)
        return reward_spec

    def _ragged_spec(self, reward_spec: Composite) -> Composite:
        observed = chat_env(self).observation_spec
        if "log_probs" not in observed.keys():
            raise ValueError(f"{type(self).__name__} scores tokens: give the environment a tokenizer.")
        kind = type(observed["log_probs"])  # the environment's own kind of spec for ragged columns
        shape, device = reward_spec.shape, reward_spec.device
        leaf = Unbounded((*shape, -1), dtype=torch.float32, device=device)
        return kind({"full": leaf}, shape=shape, device=device, data_cls=LogProbs)


class RetrieveKL(RetrieveLogProb):
    """The KL divergence of the policy from a reference, token by token, and as a penalty on the reward.

    As torchrl's ``RetrieveKL`` (``RetrieveLogProb`` and ``KLComputation``), and works where that one (0.14.1) does not:
    in an environment, in a collector, batched; and the policy's log-probs are the ledger's, those of sampling, so no
    second pass of the policy is needed. It says of the reward ``(B, 1, 1)``: minus ``coeff`` times the sum over the
    tokens of the turn, where torchrl makes it a tensor of every token.

    Written beside ``("ref_log_probs", "full")``: ``("kl_penalty", "full")``, float32, of the same form, on the tokens that
    were sampled in this turn (all of the episode with ``when="done"``, and in a training view); and ``"reward"``.

    In a training view the penalty of an episode is the sum over all its sequences, each of them once, and every row of it
    pays the whole. A sample of a replay buffer that lacks some sequences of an episode is refused: with ``on="extend"`` the
    penalty is summed when the whole view goes in. (An episode has one sequence, unless its template rewrote the past.)

    Args:
        reference: see :func:`~torchrl_chat.transforms.references.as_reference`.

    Keyword Args:
        coeff: what the penalty is multiplied by; may be set anew between steps.
        kind: the estimator, see :func:`~torchrl_chat.training.kl_estimate`.
        add_to_reward: whether the penalty goes into the reward.
        kl_key: where the estimates are written, a pair that ends with ``"full"``.
        missing: what is done about rows whose sampled tokens came without log-probs: an error, or no penalty (for an
            API's answers among others, and for ``check_env_specs``, whose random ids have none).
        **options: as for :class:`RetrieveLogProb`.

    Raises:
        ValueError: at the call: the policy reported no log-probs; there is not one reward a row; or the rows of a view are
            not all of an episode.

    Example:
        >>> from torchrl_chat import DatasetChatEnv
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_model, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> model = tiny_model(len(tokenizer))
        >>> env = DatasetChatEnv(dataset=[{"query": "2 + 2?"}], tokenizer=tokenizer, input_mode="tokens", num_envs=1)
        >>> env = env.append_transform(RetrieveKL(model, coeff=0.05))
    """

    def __init__(
        self,
        reference: Reference | Any,
        *,
        coeff: float = 1.0,
        kind: KLKind = "k1",
        add_to_reward: bool = True,
        kl_key: NestedKey = ("kl_penalty", "full"),
        missing: Literal["raise", "zero"] = "raise",
        **options: Any,
    ):
        super().__init__(reference, **options)
        kl_estimate(torch.zeros(1), torch.zeros(1), kind)  # refuses an unknown kind
        if missing not in ("raise", "zero"):
            raise ValueError(f"missing={missing!r}: expected 'raise' or 'zero'.")
        self.missing = missing
        self.coeff = coeff
        self.kind: KLKind = kind
        self.add_to_reward = add_to_reward
        self.kl_key = _container_key(kl_key, "kl_key")

    def _check(self, sequences: list[Scored], scored: torch.Tensor | None) -> list[Scored]:
        if scored is None:
            return sequences
        known = scored.flatten().tolist()
        lacking = [sequence.row for sequence in sequences if not known[sequence.row]]
        if lacking and self.missing == "raise":
            raise ValueError(
                f"row {lacking[0]} has sampled tokens without log-probs, so their KL is not known: have the policy write "
                "('log_probs', 'response') beside ('tokens', 'response'), or pass missing='zero'."
            )
        return [s if known[s.row] else s._replace(turn=torch.zeros_like(s.turn)) for s in sequences]

    def _write(
        self, td: TensorDictBase, sequences: list[Scored], scores: list[torch.Tensor], laid: Any, rows: int
    ) -> None:
        super()._write(td, sequences, scores, laid, rows)
        estimates = [
            kl_estimate(s.log_probs.float(), values, self.kind).masked_fill(~s.turn, 0.0)
            for s, values in zip(sequences, scores, strict=True)
        ]
        td.set(self.kl_key, laid(estimates))
        if not self.add_to_reward:
            return
        totals = torch.zeros(rows)
        for sequence, estimate in zip(sequences, estimates, strict=True):
            totals[sequence.row] += estimate.sum().cpu()
        if "transcript" not in td.keys():  # a view, whose episodes may have several rows
            totals = episode_totals(td, totals)
        batch = td.batch_size
        reward = td.get("reward", None)
        if reward is None:
            reward = torch.zeros(*batch, 1, 1, device=td.device)
        if reward.numel() != rows:
            raise ValueError(
                f"the reward has the shape {tuple(reward.shape)}: expected one a row, {(*batch, 1, 1)}, to take the KL "
                "of the turn off."
            )
        td.set("reward", reward - self.coeff * totals.reshape(reward.shape).to(reward.device))

    def transform_reward_spec(self, reward_spec: Composite) -> Composite:
        """The specs of what is written."""
        reward_spec = super().transform_reward_spec(reward_spec)
        reward_spec[self.kl_key] = self._ragged_spec(reward_spec)
        if self.add_to_reward:
            shape = (*reward_spec.shape, 1, 1)
            reward_spec["reward"] = Unbounded(shape, dtype=torch.float32, device=reward_spec.device)
        return reward_spec


class KLRewardTransform(RetrieveKL):
    """The KL penalty under the parameter names of torchrl's ``KLRewardTransform``: a drop-in for it.

    That one (0.14.1) wants ``("log_probs", "full")`` of a padded policy, fails with a batch of several rows, and in a replay
    buffer (``'NoneType' object has no attribute 'base_env'``). Written are the reward, (B, 1, 1), and
    ``("kl_penalty", "full")`` and ``("ref_log_probs", "full")`` a token; the estimator is ``"k1"``, as there.

    Args:
        ref_model: see :func:`~torchrl_chat.transforms.references.as_reference`.

    Keyword Args:
        coef: what the penalty is multiplied by.
        add_to_reward: whether the penalty goes into the reward.
        **options: as for :class:`RetrieveKL`.

    Example:
        >>> from torchrl_chat import DatasetChatEnv
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_model, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> model = tiny_model(len(tokenizer))
        >>> env = DatasetChatEnv(dataset=[{"query": "2 + 2?"}], tokenizer=tokenizer, input_mode="tokens", num_envs=1)
        >>> env = env.append_transform(KLRewardTransform(model, coef=0.1))
    """

    def __init__(self, ref_model: Any, *, coef: float = 1.0, add_to_reward: bool = True, **options: Any):
        super().__init__(ref_model, coeff=coef, add_to_reward=add_to_reward, **options)


def _sampled(row: int, before: Transcript | None, after: Transcript) -> Iterator[Scored]:
    """What was sampled since ``before``, in the sequence that stood then and in those begun since; all of it if ``None``.

    Each sequence goes up to its last sampled token, as ``("tokens", "full")`` of a policy.
    """
    known = 0 if before is None else len(before.branches)
    for number, branch in enumerate(after.sequences[known:]):
        sampled = branch.mask.nonzero()
        if not len(sampled):
            continue
        end = int(sampled[-1]) + 1
        turn = branch.mask[:end].clone()
        if before is not None and number == 0:
            turn[: _shared(before.tokens, branch.tokens)] = False
        yield Scored(row, branch.tokens[:end], branch.mask[:end], turn, branch.log_probs[:end])


def _shared(first: torch.Tensor, second: torch.Tensor) -> int:
    """The length of the longest common prefix."""
    count = min(len(first), len(second))
    if first.data_ptr() == second.data_ptr():
        return count
    differs = (first[:count] != second[:count]).nonzero()
    return int(differs[0]) if len(differs) else count


def _container_key(key: NestedKey, name: str) -> str:
    if not isinstance(key, tuple) or len(key) != 2 or key[1] != "full":
        raise ValueError(f"{name}={key!r}: expected a pair that ends with 'full'.")
    return str(key[0])


def _check_tokenizers(mine: Any, theirs: Any) -> None:
    first, second = (tokenizer.get_vocab() for tokenizer in (mine, theirs))
    if first == second:
        return
    token = min(set(first.items()) ^ set(second.items()), key=lambda item: item[1])[0]
    raise ValueError(
        f"the reference has another vocabulary: {token!r} has the id {first.get(token)} there and {second.get(token)} "
        "in the environment, so its log-probs would be those of other text."
    )
