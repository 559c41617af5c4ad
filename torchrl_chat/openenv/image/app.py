"""``app``: the server as its environment variables describe it, for ``uvicorn torchrl_chat.openenv.image.app:app``.

``TORCHRL_CHAT_SERVE`` has arguments of ``torchrl-chat serve`` (``--env countdown --max-turns 4``); ``TOKENIZER_NAME``,
``SYSTEM_PROMPT``, ``MAX_CONCURRENT_ENVS`` and ``TORCHRL_CHAT_TOKEN`` are read as that command reads them. The command itself
is the better way to start a server: it finishes steps at SIGTERM, and compresses no replies.
"""

from __future__ import annotations

import argparse
import os
import shlex
from typing import Any

from torchrl_chat.cli import serve


def make() -> Any:
    """The application that the environment variables describe."""
    parser = argparse.ArgumentParser(prog="TORCHRL_CHAT_SERVE")
    serve.add_parser(parser.add_subparsers())
    arguments = parser.parse_args(["serve", *shlex.split(os.environ.get("TORCHRL_CHAT_SERVE", ""))])
    serve.set_up_logging(arguments.log_level)
    return serve.make_app(arguments)


def __getattr__(name: str) -> Any:
    if name == "app":
        return globals().setdefault("app", make())
    raise AttributeError(name)
