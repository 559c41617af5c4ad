"""``app``: the server as its environment variables describe it, for ``uvicorn server.app:app``.

``TORCHRL_CHAT_SERVE`` has arguments of ``torchrl-chat serve`` (``--env countdown --max-turns 4``); ``TOKENIZER_NAME``,
``SYSTEM_PROMPT``, ``MAX_CONCURRENT_ENVS`` and ``TORCHRL_CHAT_TOKEN`` are read as that command reads them. The command itself
is the better way to start a server: it finishes steps at SIGTERM, and compresses no replies.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from typing import Any

from torchrl_chat.cli import serve


def arguments_of(host: str) -> argparse.Namespace:
    """What the environment variables say."""
    parser = argparse.ArgumentParser(prog="TORCHRL_CHAT_SERVE")
    serve.add_parser(parser.add_subparsers())
    return parser.parse_args(["serve", "--host", host, *shlex.split(os.environ.get("TORCHRL_CHAT_SERVE", ""))])


def make() -> Any:
    """The application that the environment variables describe; for this machine only, unless they give a ``--host``."""
    arguments = arguments_of("127.0.0.1")
    serve.set_up_logging(arguments.log_level)
    return serve.make_app(arguments)


def main() -> int:
    """Serve to everybody: a token is required, or ``--no-auth``. All settings come from the environment; ``--help`` tells them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_known_args()
    return serve.run(arguments_of("0.0.0.0"))


def __getattr__(name: str) -> Any:
    if name == "app":
        return globals().setdefault("app", make())
    raise AttributeError(name)


if __name__ == "__main__":
    sys.exit(main())
