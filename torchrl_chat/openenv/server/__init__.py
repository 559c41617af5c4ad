"""The server: an environment behind OpenEnv's HTTP and WebSocket protocol."""

from torchrl_chat.openenv.server.app import create_app, make_server, run

__all__ = ["create_app", "make_server", "run"]
