"""A server with OpenEnv's WebSocket protocol that does to its clients whatever an action asks for."""

from __future__ import annotations

import asyncio
import http
import json
from typing import Any

from websockets.asyncio.server import serve

from torchrl_chat._loop import LoopThread


class ParrotEnv:
    """Says the seed at the reset, and every answer backwards; ``stop`` ends the episode, with a reward of 1."""

    def __init__(self) -> None:
        self.steps = 0

    def reset(self, seed: int = 0, refuse: bool = False, **kwargs: Any) -> dict[str, Any]:
        if refuse:
            raise ValueError("no such task")
        self.steps = 0
        return {"observation": {"message": f"begin {seed}"}, "reward": None, "done": False}

    def step(self, action: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(action.get("message"), str):
            raise ValueError("'message' is missing")
        self.steps += 1
        said = action["message"]
        reward = 1.0 if said == "stop" else self.steps / 8
        return {"observation": {"message": said[::-1]}, "reward": reward, "done": said == "stop"}

    def state(self) -> dict[str, Any]:
        return {"episode_id": "e", "step_count": self.steps}


class StubServer:
    """A server in a thread of its own.

    ``"sleep:S"`` anywhere in an action's message replies after S seconds, ``together:N`` when N of them wait; the other messages that matter are ``die``, ``bye``,
    ``fatal``, ``garbage``, ``wrong``, ``twice``, ``big:N``, ``pieces:N`` (a reply in N frames),
    ``error:JSON`` and ``reward:JSON``.
    """

    def __init__(self, env: Any = ParrotEnv, capacity: int = 10_000, port: int = 0, **options: Any) -> None:
        self.env = env
        self.capacity = capacity
        self.resets: list[dict[str, Any]] = []
        self.requests: list[Any] = []  # the handshakes
        self.active = 0
        self.together = 0
        self.connections: set[Any] = set()
        self._options = options
        self._loop = LoopThread("stub")
        self._port = port
        self._server = self._loop.run(self._start())
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _start(self) -> Any:
        options = {"max_size": None, "process_request": self._handshake, **self._options}
        return await serve(self._serve, "127.0.0.1", self._port, **options)

    def _handshake(self, connection: Any, request: Any) -> Any:
        if request.path.endswith("/health"):
            return connection.respond(http.HTTPStatus.OK, '{"status":"healthy"}')
        self.requests.append(request)
        return None

    def __enter__(self) -> StubServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        async def stop() -> None:
            self._server.close(close_connections=True)
            await self._server.wait_closed()

        self._loop.run(stop())
        self._loop.close()

    def drop(self) -> None:
        """Cut every connection, without a word."""

        async def drop() -> None:
            for socket in list(self.connections):
                socket.transport.abort()

        self._loop.run(drop())

    # ------------------------------------------------------------------ one session
    async def _serve(self, socket: Any) -> None:
        if self.active >= self.capacity:
            error = {"message": f"full: {self.active}", "code": "CAPACITY_REACHED", "max_sessions": self.capacity}
            await socket.send(json.dumps({"type": "error", "data": error}))
            return
        self.active += 1
        self.connections.add(socket)
        env = self.env()
        try:
            async for frame in socket:
                if not await self._answer(socket, env, json.loads(frame)):
                    return
        finally:
            self.active -= 1
            self.connections.discard(socket)

    async def _answer(self, socket: Any, env: Any, request: dict[str, Any]) -> bool:
        kind, data = request["type"], request.get("data") or {}
        if kind == "close":
            return False
        if kind == "state":
            await socket.send(json.dumps({"type": "state", "data": env.state()}))
            return True
        message = str(data.get("message", ""))
        if "sleep:" in message:
            await asyncio.sleep(float(message.split("sleep:")[1].split()[0]))
        if message.startswith("together:"):
            self.together += 1
            while self.together < int(message[9:]):
                await asyncio.sleep(0.01)
        if message == "die":
            socket.transport.abort()
            return False
        if message == "bye":
            return False
        if message == "fatal":
            error = {"message": "out of order", "code": "SESSION_ERROR"}
            await socket.send(json.dumps({"type": "error", "data": error}))
            return False
        if message.startswith("error:"):
            await socket.send(json.dumps({"type": "error", "data": json.loads(message[6:])}))
            return True
        if message in ("garbage", "wrong"):
            await socket.send("no JSON" if message == "garbage" else '{"type": "state", "data": {}}')
            return True
        if kind == "reset":
            self.resets.append(data)
        try:
            reply = env.reset(**data) if kind == "reset" else env.step(data)
        except Exception as error:
            code = {"message": str(error), "code": "EXECUTION_ERROR"}
            await socket.send(json.dumps({"type": "error", "data": code}))
            return True
        if message.startswith("big:"):
            reply["observation"]["message"] = "x" * int(message[4:])
        if message.startswith("reward:"):
            reply["reward"] = json.loads(message[7:])
        frame = json.dumps({"type": "observation", "data": reply})
        if message.startswith("pieces:"):
            size = -(-len(frame) // int(message[7:]))
            await socket.send([frame[i : i + size] for i in range(0, len(frame), size)])
            return True
        for _ in range(2 if message == "twice" else 1):
            await socket.send(frame)
        return True
