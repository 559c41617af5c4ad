"""``torchrl-chat gateway``: a model served to agents, their episodes written as rollouts."""

from __future__ import annotations

import argparse
import gc
import logging
import os
import signal
import sys
import threading
from typing import Any

from torchrl_chat.cli.serve import set_up_logging
from torchrl_chat.options import number, port, whole

DESCRIPTION = """\
Serve a model to agents, of whatever framework: an agent is given a base URL and a key, and everything that it asks becomes an episode
that is exact to the token.

  torchrl-chat gateway                                            # a tiny model with random weights, to try it out
  torchrl-chat gateway --model Qwen/Qwen3-0.6B --rollouts runs/agents.jsonl
  torchrl-chat gateway --model Qwen/Qwen3-8B --server http://localhost:8000/v1    # sampled by vLLM, by ids

Then, with the token that it says (or your own, --token or TORCHRL_CHAT_TOKEN):

  curl -s localhost:8100/sessions -H "Authorization: Bearer $TOKEN" --json '{"row": {"answer": "7"}, "seed": 1}'
                                                                  # -> its name, base_url and api_key
  OPENAI_BASE_URL=... OPENAI_API_KEY=... python my_agent.py       # any agent, as it is
  curl -s localhost:8100/s/NAME/finish -H "Authorization: Bearer $TOKEN" --json '{"reward": 1.0}'

or with --implicit, where every address /s/NAME/v1 is a session from its first request on, and whoever comes first chooses its key.
Settings of sampling are this command's, not the agents': their temperature is not looked at unless --allow says so. What is not
supported is refused in a sentence; docs/refused.md lists it all.

It listens on this machine only unless --host says otherwise. Ctrl-C and SIGTERM finish the open sessions and write them."""


def add_parser(commands: Any) -> None:
    """Add ``gateway`` to the commands."""
    parser = commands.add_parser(
        "gateway",
        help="serve a model to agents, and keep their episodes",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", default="tiny", metavar="NAME", help="tiny, smollm2, a name or a folder (default tiny)"
    )
    model.add_argument("--chat-template", metavar="FILE", help="a chat template instead of the model's own")
    model.add_argument("--server", metavar="URL", help="a server that samples it by ids (vLLM), .../v1")
    model.add_argument(
        "--server-key", default=os.environ.get("OPENAI_API_KEY"), help="its key (default $OPENAI_API_KEY)"
    )
    model.add_argument(
        "--server-api",
        default="generate",
        choices=("generate", "completions"),
        help="its API (default vLLM's generate)",
    )
    model.add_argument("--device", help="cuda, cpu ... (default: cuda where there is one)")
    model.add_argument(
        "--max-new-tokens", type=whole(1), default=1024, metavar="N", help="of one answer (default 1024)"
    )
    model.add_argument("--temperature", type=number(least=0), default=1.0, help="of all answers (default 1)")
    limits = parser.add_argument_group("limits of a session")
    for name, what in (
        ("max-turns", "answers"),
        ("max-tokens", "sampled tokens"),
        ("max-context", "tokens of a sequence"),
        ("max-tool-calls", "tool calls"),
    ):
        limits.add_argument(f"--{name}", type=whole(1), metavar="N", help=f"{what} of one session")
    limits.add_argument("--max-seconds", type=number(above=0), metavar="S", help="how long one session may last")
    limits.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="NAME",
        help="a setting that agents may choose: temperature ...; again for more",
    )
    server = parser.add_argument_group("server")
    server.add_argument(
        "--host", default="127.0.0.1", help="where it listens (default 127.0.0.1: this machine only)"
    )
    server.add_argument("--port", type=port, default=8100, help="0 for a free one (default 8100)")
    server.add_argument(
        "--token",
        default=os.environ.get("TORCHRL_CHAT_TOKEN"),
        help="of drivers (default $TORCHRL_CHAT_TOKEN, else a random one)",
    )
    server.add_argument("--implicit", action="store_true", help="a request to a session that is not there makes it")
    server.add_argument(
        "--public",
        action="store_true",
        help="with --implicit beyond this machine: whoever reaches it makes sessions",
    )
    server.add_argument("--max-sessions", type=whole(1), default=1024, metavar="N", help="at a time (default 1024)")
    server.add_argument(
        "--idle-seconds",
        type=number(above=0),
        default=3600,
        metavar="S",
        help="an unused session is finished (default 3600)",
    )
    server.add_argument("--rollouts", metavar="FILE", help="finished episodes are appended to this file")
    server.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C; the result is the exit code."""
    set_up_logging(arguments.log_level)
    logging.getLogger("torchrl_chat.gateway").setLevel(arguments.log_level.upper())
    gateway = make_gateway(arguments)
    ended = threading.Event()
    for number_ in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number_, lambda *_: ended.set())
    with gateway:
        # What the libraries consist of is not looked at by every collection of garbage, nor the ledgers all the time.
        gc.collect()
        gc.freeze()
        gc.set_threshold(20_000, 20, 20)
        print(f"agents: {gateway.url}/s/NAME/v1 (OpenAI), drivers: {gateway.url}/sessions", flush=True)
        if arguments.token is None:
            print(f"token: {gateway.token}", flush=True)
        ended.wait()
    return 0


def make_gateway(arguments: argparse.Namespace) -> Any:
    """The gateway that the arguments describe, not yet listening.

    Raises:
        ValueError: there is no such model, or an option has no such value.
    """
    from torchrl_chat.conversation import Limits
    from torchrl_chat.gateway import Gateway, Settings
    from torchrl_chat.gateway.settings import AGENTS
    from torchrl_chat.openenv.protocol import ServerLimits

    engine, tokenizer = _engine(arguments)
    names = ("max_turns", "max_tokens", "max_context", "max_tool_calls", "max_seconds")
    limits = Limits(**{name: getattr(arguments, name) for name in names})
    sampling = {"temperature": arguments.temperature} if arguments.server else {}
    settings = Settings(limits=limits, sampling=sampling, allow=AGENTS | set(arguments.allow))
    if arguments.rollouts is not None and (folder := os.path.dirname(arguments.rollouts)):
        os.makedirs(folder, exist_ok=True)
    return Gateway(
        engine,
        tokenizer,
        settings=settings,
        model=arguments.model,
        host=arguments.host,
        port=arguments.port,
        token=arguments.token,
        implicit=arguments.implicit,
        public=arguments.public,
        server=ServerLimits(max_sessions=arguments.max_sessions, idle_seconds=arguments.idle_seconds),
        ended=None if arguments.rollouts is None else _writer(arguments.rollouts, tokenizer),
    )


def _writer(path: str, tokenizer: Any) -> Any:
    """What appends a finished session to a rollout file; one that cannot be written is told, and ends nothing else."""
    from torchrl_chat.gateway import episodes
    from torchrl_chat.rollouts import write_rollouts

    def write(session: Any) -> None:
        try:
            if session.turns:
                write_rollouts(path, episodes([session]), tokenizer, ids=[session.name])
        except Exception as error:  # of the disk: the sessions go on
            print(f"torchrl-chat gateway: {session.name} is not written: {error}", file=sys.stderr)

    return write


def _engine(arguments: argparse.Namespace) -> tuple[Any, Any]:
    from torchrl_chat import pretrained, tiny

    if arguments.model == "tiny":
        made = tiny.tiny_tokenizer(tiny.TEXT_ALPHABET, tools=True)  # agents bring tools
        tokenizer: Any = pretrained.with_template(made, arguments.chat_template)
    else:
        tokenizer = pretrained.load_tokenizer(arguments.model, arguments.chat_template)
    if arguments.server:
        from torchrl_chat.gateway import RemoteEngine
        from torchrl_chat.models.sampling import default_stop_ids

        return (
            RemoteEngine(
                arguments.model,
                arguments.server,
                arguments.server_key or "none",
                api=arguments.server_api,
                stop_ids=default_stop_ids(tokenizer),
                max_new_tokens=arguments.max_new_tokens,
            ),
            tokenizer,
        )
    import torch

    from torchrl_chat.policies import TransformersPolicy

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.model == "tiny":
        model = tiny.tiny_model(len(tokenizer), context=8192)
    else:
        model = pretrained.load_model(arguments.model)
    policy = TransformersPolicy(
        model.to(device).eval(),
        tokenizer,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
    )
    return policy, tokenizer
