"""``torchrl-chat serve``: environments over OpenEnv's protocol."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from typing import Any

from torchrl_chat.cli.environments import add_arguments, load_tokenizer, make_factory
from torchrl_chat.options import number, port, whole

DESCRIPTION = """\
Serve an environment by OpenEnv's HTTP and WebSocket protocol: to OpenEnv's own clients, to trainers that use them, and
to the clients of this package. Each client that connects has a conversation of its own.

  torchrl-chat serve                                             # a chat with a tiny tokenizer, to try it out
  torchrl-chat serve --tokenizer Qwen/Qwen2.5-0.5B-Instruct      # a chat, the ledger in Qwen's tokens
  torchrl-chat serve --env gsm8k --tokenizer FOLDER --data gsm8k.jsonl
  torchrl-chat serve --env countdown --tokenizer FOLDER --max-turns 4 --python-tool
  torchrl-chat serve --env my_package.my_env:make --tokenizer FOLDER

/web is a page to play it by hand. Then, from anywhere:

  curl -s localhost:8000/health
  curl -s localhost:8000/reset --json '{"keep": true}'           # a session over HTTP; its id is in the metadata
  curl -s localhost:8000/step --json '{"session_id": "...", "action": {"text": "Hello"}}'
  from openenv import GenericEnvClient                           # or torchrl_chat.openenv.ChatEnv

An action is {"tokens": [...]}, the ids that a policy sampled; {"text": "..."}, its answer as a text; or
{"messages": [{"role": "user", "content": "..."}]}, what others say. /docs describes every route, /metrics has counters
for Prometheus, the log is one JSON object a line. SIGTERM and Ctrl-C finish the steps that are under way.

Everybody who can reach the port can use the server. It listens on this machine only unless --host says otherwise; then
a token is required (--token, or TORCHRL_CHAT_TOKEN), or --no-auth, which says by name that nobody is asked for one."""


def add_parser(commands: Any) -> None:
    """Add ``serve`` to the commands."""
    parser = commands.add_parser(
        "serve",
        help="serve an environment by OpenEnv's protocol",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser, tokenizer="$TOKENIZER_NAME, else tiny")
    parser.set_defaults(
        tokenizer=os.environ.get("TOKENIZER_NAME", "tiny"), system_prompt=os.environ.get("SYSTEM_PROMPT")
    )
    server = parser.add_argument_group("server")
    server.add_argument(
        "--host", default="127.0.0.1", help="where it listens (default 127.0.0.1: this machine only)"
    )
    server.add_argument("--port", type=port, default=8000, help="0 for a free one (default 8000)")
    server.add_argument(
        "--token", default=os.environ.get("TORCHRL_CHAT_TOKEN"), help="the bearer token of all requests"
    )
    server.add_argument("--no-auth", action="store_true", help="no token, though others can reach the port")
    server.add_argument(
        "--allow-origin",
        action="append",
        metavar="ORIGIN",
        help="a web page that may talk to the server besides its own, e.g. https://example.org; again for more, * for all",
    )
    server.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    server.add_argument(
        "--rollouts", metavar="PATH", help="a folder of rollout files that /web may open, or one file"
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--max-sessions",
        type=whole(1),
        default=int(os.environ.get("MAX_CONCURRENT_ENVS", "1024")),
        metavar="N",
        help="sessions at a time (default: $MAX_CONCURRENT_ENVS, else 1024)",
    )
    limits.add_argument(
        "--max-sessions-per-address",
        type=whole(1),
        metavar="N",
        help="of one client's address (default: three quarters of all)",
    )
    limits.add_argument(
        "--idle-seconds",
        type=number(above=0),
        default=3600,
        metavar="S",
        help="an unused session is closed (default 3600)",
    )
    limits.add_argument(
        "--resume-seconds",
        type=number(above=0),
        default=120,
        metavar="S",
        help="a session with ?resume=1 waits for its client (default 120)",
    )
    limits.add_argument(
        "--step-seconds", type=number(above=0), default=600, metavar="S", help="one step (default 600)"
    )
    limits.add_argument(
        "--ping-seconds",
        type=number(least=0),
        default=20,
        metavar="S",
        help="a client that answers no ping for so long is gone (default 20; 0 for no pings)",
    )
    limits.add_argument(
        "--max-message-mb", type=number(above=0), default=16, metavar="MB", help="one message (default 16)"
    )
    limits.add_argument("--rate", type=number(above=0), metavar="N", help="requests a second of one connection")
    limits.add_argument(
        "--grace", type=number(least=0), default=30, metavar="S", help="for steps at shutdown (default 30)"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C; the result is the exit code."""
    from torchrl_chat.openenv.server import run as run_server

    set_up_logging(arguments.log_level)
    app = make_app(arguments)
    log = logging.getLogger("torchrl_chat.openenv")

    def started(host: str, port: int) -> None:
        log.warning("listening", extra={"host": host, "port": port, "env": app.state.env_name, "pid": os.getpid()})

    run_server(
        app,
        host=arguments.host,
        port=arguments.port,
        grace_seconds=arguments.grace,
        ping_seconds=arguments.ping_seconds or None,
        started=started,
    )
    return 0


def make_app(arguments: argparse.Namespace) -> Any:
    """The application that the arguments describe.

    Raises:
        ValueError: an unknown environment; or a port that others can reach without a token.
    """
    from torchrl_chat.access import is_loopback
    from torchrl_chat.openenv.protocol import ServerLimits
    from torchrl_chat.openenv.server import create_app
    from torchrl_chat.openenv.web import web_routes

    local = is_loopback(arguments.host)
    if not (local or arguments.token or arguments.no_auth):
        raise ValueError(
            f"--host {arguments.host} can be reached by others: give --token SECRET (or TORCHRL_CHAT_TOKEN), or say "
            f"--no-auth."
        )
    tokenizer = load_tokenizer(arguments.tokenizer, arguments.env)
    factory, name = make_factory(arguments, tokenizer)
    return create_app(
        factory,
        env_name=name,
        limits=ServerLimits(
            max_message_bytes=int(arguments.max_message_mb * 2**20),
            max_sessions=arguments.max_sessions,
            max_sessions_per_address=arguments.max_sessions_per_address,
            idle_seconds=arguments.idle_seconds,
            resume_seconds=arguments.resume_seconds,
            requests_per_second=arguments.rate,
            step_seconds=arguments.step_seconds,
        ),
        token=arguments.token,
        allowed_origins=arguments.allow_origin or (),
        loopback=local and not arguments.token,
        extra_routes=web_routes(tokenizer, rollouts=arguments.rollouts),
    )


class JSONLines(logging.Formatter):
    """One JSON object a record: time, level, event, and what the record brings along."""

    _OWN = frozenset(vars(logging.makeLogRecord({})))

    def format(self, record: logging.LogRecord) -> str:
        """The record as a line."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        line |= {
            key: value
            for key, value in vars(record).items()
            if key not in self._OWN and key != "color_message" and not key.startswith("_")  # as Ray adds some
        }
        if record.exc_info:
            line["error"] = repr(record.exc_info[1])
        return json.dumps(line, default=str, ensure_ascii=False)


def set_up_logging(level: str) -> None:
    """Write the server's records to standard error, one JSON object a line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JSONLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("torchrl_chat.openenv").setLevel(level.upper())
