"""Episodes that several environments, in several processes, draw from one Ray actor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torchrl_chat.envs.episodes import Episodes


class RayEpisodes:
    """The episodes of an actor: each is given to one of the environments that share it, and to no other.

    torchrl's ``RayDataLoadingPrimer`` (0.14.1) cannot be used: its ``primers`` raise ``AttributeError``. The state is
    the actor's: load it into one of the environments.

    Args:
        factory: makes the episodes, in the actor.
        name: environments that give the same name share an actor, which outlives them; ``None`` for one of one's own.

    Raises:
        ImportError: ray is not installed.
    """

    def __init__(self, factory: Callable[[], Episodes], name: str | None = None):
        try:
            import ray
        except ImportError as error:
            raise ImportError("ray_backend=True needs ray: pip install 'torchrl_chat[ray]'.") from error
        options: dict[str, Any] = {"name": name, "get_if_exists": True, "lifetime": "detached"} if name else {}
        self._actor: Any = ray.remote(num_cpus=0)(_Held).options(**options).remote(factory)
        self.repeats: int = self._call("__getattribute__", "repeats")

    def _call(self, method: str, *arguments: Any) -> Any:
        import ray

        return ray.get(self._actor.call.remote(method, *arguments))

    def next(self) -> dict[str, Any]:
        """The columns of the next episode."""
        return self._call("next")

    def example(self) -> dict[str, Any]:
        """The columns of some episode, to be looked at only."""
        return self._call("example")

    def restart(self) -> None:
        """Begin with the first episode again, for all environments that share the actor."""
        self._call("restart")

    def reseed(self, seed: int) -> None:
        """Take another seed, for all environments that share the actor."""
        self._call("reseed", seed)

    def state_dict(self) -> dict[str, Any]:
        """Where the actor is."""
        return self._call("state_dict")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the actor go on from there."""
        self._call("load_state_dict", dict(state))


class _Held:
    def __init__(self, factory: Callable[[], Episodes]):
        self.episodes = factory()

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self.episodes, method)(*arguments)
