"""``torchrl-chat play``: an environment played by hand in the browser, on this machine only."""

from __future__ import annotations

import argparse
import contextlib
import socket
import sys
import threading
import webbrowser
from collections.abc import Callable
from typing import Any

from torchrl_chat.cli.environments import add_arguments, load_tokenizer, make_factory
from torchrl_chat.options import number, port, whole

DESCRIPTION = """\
Play an environment by hand: its page opens in the browser, served on this machine only, and Ctrl-C ends it. The page
shows messages, token ids with the mask of what was sampled, rewards and their components, and raw observations.

  torchrl-chat play                                                # a chat with a tiny tokenizer, to look around
  torchrl-chat play --env digits                                   # a task with a right answer
  torchrl-chat play --env gsm8k --tokenizer Qwen/Qwen2.5-0.5B-Instruct
  torchrl-chat play --env gsm8k --model Qwen/Qwen2.5-0.5B-Instruct # the model answers, where it is asked to
  torchrl-chat play --rollouts runs/                               # its rollout files beside it

A model's answers come with their log-probs. To let others play, too: torchrl-chat serve, whose /web is the same page."""


def add_parser(commands: Any) -> None:
    """Add ``play`` to the commands."""
    parser = commands.add_parser(
        "play",
        help="play an environment by hand in the browser",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser, tokenizer="the model's, else tiny")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        metavar="NAME",
        help="a model that answers, where it is asked to: tiny (random), a name or a folder",
    )
    model.add_argument(
        "--max-new-tokens", type=whole(1), default=256, metavar="N", help="of one answer (default 256)"
    )
    model.add_argument(
        "--temperature", type=number(least=0), default=1.0, help="0 takes the likeliest token (default 1)"
    )
    page = parser.add_argument_group("page")
    page.add_argument("--rollouts", metavar="PATH", help="a folder of rollout files for the viewer, or one file")
    add_page_arguments(page)
    parser.set_defaults(run=run)


def add_page_arguments(page: Any) -> None:
    """Add ``--port`` and ``--no-browser``."""
    page.add_argument("--port", type=port, default=0, help="default: a free one")
    page.add_argument("--no-browser", action="store_true", help="only say the address")


def run(arguments: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C; the result is the exit code."""
    from torchrl_chat.openenv.server import make_server

    show(lambda app: make_server(app, grace_seconds=2), make_app(arguments), arguments)
    return 0


def make_app(arguments: argparse.Namespace) -> Any:
    """The application that the arguments describe.

    Raises:
        ValueError: an unknown environment; or no such folder of rollouts.
    """
    from torchrl_chat.openenv.server import create_app
    from torchrl_chat.openenv.web import web_routes

    tokenizer, policy = _tokenizer_and_policy(arguments)
    factory, name = make_factory(arguments, tokenizer)
    routes = web_routes(tokenizer, rollouts=arguments.rollouts, policy=policy)
    return create_app(factory, env_name=name, loopback=True, extra_routes=routes)


def show(server_of: Callable[[Any], Any], app: Any, arguments: argparse.Namespace) -> None:
    """Serve an application's page on this machine, open it in the browser, and wait for Ctrl-C.

    Args:
        server_of: makes the uvicorn server of the application.
        app: the application.
        arguments: with ``port`` and ``no_browser``.

    Raises:
        OSError: the port is in use.
    """
    listening = socket.create_server(("127.0.0.1", arguments.port))
    address = f"http://127.0.0.1:{listening.getsockname()[1]}/web/"
    print(f"{address}  (Ctrl-C ends it)", flush=True)
    if not arguments.no_browser:
        # Beside the server: some browsers return only when they are closed.
        threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt):
        server_of(app).run(sockets=[listening])


def _tokenizer_and_policy(arguments: argparse.Namespace) -> tuple[Any, Any]:
    if (arguments.model or "tiny") != "tiny":
        print(f"loading {arguments.model} ...", file=sys.stderr, flush=True)
    tokenizer = load_tokenizer(arguments.tokenizer or arguments.model or "tiny", arguments.env)
    if arguments.model is None:
        return tokenizer, None
    if arguments.model == "tiny":
        from torchrl_chat import tiny

        model: Any = tiny.tiny_model(len(tokenizer), context=4096)
    else:
        from torchrl_chat.pretrained import load_model

        model = load_model(arguments.model).eval()
    return tokenizer, _answerer(model, tokenizer, arguments)


def _answerer(
    model: Any, tokenizer: Any, arguments: argparse.Namespace
) -> Callable[[list[int]], tuple[list[int], list[float]]]:
    """A model as what the page lets answer: prompt ids -> sampled ids and their log-probs."""
    import torch

    from torchrl_chat.policies import TransformersPolicy

    policy = TransformersPolicy(
        model, tokenizer, max_new_tokens=arguments.max_new_tokens, temperature=arguments.temperature
    )

    def answer(prompt: list[int]) -> tuple[list[int], list[float]]:
        with torch.no_grad():
            ids, log_probs = policy.generate([torch.tensor(prompt, device=policy.device)])
        return ids[0].tolist(), log_probs[0].tolist()

    return answer
