"""What runs in a worker: an environment, a policy, and no memory of what it played."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.envs import EnvBase

Collect = Callable[[EnvBase, Callable[[TensorDictBase], TensorDictBase]], TensorDictBase]


class Worker:
    """Plays batches of episodes that somebody else chooses.

    The environment (with its graders and sandboxes, which start processes of their own where the environment is) and the
    policy are made here. Which episodes come next is told with every batch, so that it makes no difference which worker
    plays it.

    Args:
        env_factory: makes a dataset environment (:class:`~torchrl_chat.DatasetChatEnv`).
        policy_factory: makes the policy.
        collect: plays one batch, from ``env.reset()`` on; :func:`~torchrl_chat.playing.play`, say.

    Raises:
        TypeError: the environment's episodes have no number by which they can be chosen.
    """

    def __init__(self, env_factory: Callable[[], EnvBase], policy_factory: Callable[[], Any], collect: Collect):
        self.env = env_factory()
        self._episodes: Any = getattr(getattr(self.env, "primer", None), "episodes", None)
        if self._episodes is None or "episode" not in self._episodes.state_dict():
            raise TypeError(
                f"env_factory made a {type(self.env).__name__} whose episodes cannot be chosen by number: expected a "
                f"DatasetChatEnv over dataset=... (not over a dataloader)."
            )
        self.policy = policy_factory()
        self._collect = collect
        self._version = 0

    def describe(self) -> dict[str, Any]:
        """The state of the episodes before anything was played, and how many of them make a batch."""
        return {"episodes": self._episodes.state_dict(), "rows": self.env.batch_size.numel()}

    def play(
        self, episodes: Mapping[str, Any], first: int, version: int, weights: Sequence[Any] = ()
    ) -> TensorDictBase:
        """Play one batch.

        Args:
            episodes: the state of the run's episodes, as :meth:`describe` gave it in one of the workers.
            first: the number of the batch's first episode.
            version: the number of the policy's weights.
            weights: a Ray reference to them; they are fetched if the policy here is of another version.

        Returns:
            what ``collect`` returned, with ``"policy_version"``, int64 of its batch size.

        Raises:
            ValueError: this worker's dataset is another one than the others'.
        """
        if version != self._version:
            import ray

            load_weights(self.policy, ray.get(weights[0]))
            self._version = version
        self._episodes.load_state_dict({**episodes, "episode": first})
        batch = self._collect(self.env, self.policy)
        batch.set("policy_version", torch.full(batch.batch_size, version))
        return batch


def load_weights(policy: Any, weights: Mapping[str, torch.Tensor]) -> None:
    """Give a policy new weights.

    Args:
        policy: it has a method ``sync(weights)`` (:class:`~torchrl_chat.policies.VLLMPolicy`), or a ``model``, or is a
            module itself.
        weights: the state dict of the model.

    Raises:
        TypeError: it is none of these.
    """
    model = _model_of(policy)
    if hasattr(policy, "sync"):
        policy.sync(weights)
    elif hasattr(model, "load_state_dict"):
        model.load_state_dict(weights)
    else:
        raise TypeError(f"a {type(policy).__name__} has no sync(weights), no model, and no load_state_dict.")


def weights_of(source: Any) -> dict[str, torch.Tensor]:
    """The state dict of a policy's model, of a model, or a state dict itself; on the CPU."""
    state = source if isinstance(source, Mapping) else _model_of(source).state_dict()
    return {key: value.detach().cpu() for key, value in state.items()}


def _model_of(source: Any) -> Any:
    """A policy's model, or the model itself: those of transformers have a ``model`` too, which lacks their head."""
    whole = isinstance(source, torch.nn.Module) and hasattr(source, "get_output_embeddings")
    return source if whole else getattr(source, "model", source)
