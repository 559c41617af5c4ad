"""The server: an environment behind OpenEnv's HTTP and WebSocket protocol."""

try:
    from torchrl_chat.openenv.server.app import create_app, make_server, run
except ModuleNotFoundError as error:
    raise ImportError(f"the server needs {error.name}: pip install 'torchrl_chat[serve]'") from error

__all__ = ["create_app", "make_server", "run"]
