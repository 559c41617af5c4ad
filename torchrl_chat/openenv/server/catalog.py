"""What a server tells of its environment: metadata, schemas, tasks. One environment is made for that, and kept."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel

from torchrl_chat.openenv.models import State
from torchrl_chat.openenv.server.documents import openapi_of


class Catalog:
    """The description of a server's environment.

    Args:
        factory: makes an environment.
        action_cls, observation_cls, state_cls: the models of what crosses the wire.
        name: the environment's name in the Task API.
    """

    def __init__(
        self,
        factory: Callable[[], Any],
        action_cls: type[BaseModel],
        observation_cls: type[BaseModel],
        state_cls: type[BaseModel] = State,
        name: str = "chat_env",
    ):
        self.name = name
        self._factory = factory
        self._models = {"action": action_cls, "observation": observation_cls, "state": state_cls}
        self._env: Any = None
        self._lock = threading.Lock()
        self._schema: dict[str, Any] = {}

    def metadata(self) -> dict[str, Any]:
        """The reply of ``/metadata``."""
        found: Any = self._probe().get_metadata() if hasattr(self._probe(), "get_metadata") else {}
        fields = found.model_dump() if hasattr(found, "model_dump") else dict(found)
        return {"name": self.name, "description": f"{self.name} environment", **fields}

    def schema(self) -> dict[str, Any]:
        """The reply of ``/schema``."""
        if not self._schema:
            self._schema = {name: model.model_json_schema() for name, model in self._models.items()}
        return self._schema

    def openapi(self) -> dict[str, Any]:
        """The reply of ``/openapi.json``."""
        return openapi_of(self.name, self.schema())

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call a method of the Task API.

        Raises:
            NotImplementedError: the environment provides no tasks.
        """
        function = getattr(self._probe(), method, None)
        if not callable(function):
            raise NotImplementedError
        found = function(*arguments)
        if inspect.isawaitable(found):
            import asyncio

            return asyncio.run(_awaited(found))
        return found

    def close(self) -> None:
        """Close the environment that was made for the descriptions."""
        with self._lock:
            env, self._env = self._env, None
        if env is not None and hasattr(env, "close"):
            env.close()

    def _probe(self) -> Any:
        with self._lock:
            if self._env is None:
                self._env = self._factory()
            return self._env


async def _awaited(value: Any) -> Any:
    return await value
