"""``torchrl-chat play``: an environment played by hand in the browser, on this machine only."""

from __future__ import annotations

import argparse
import contextlib
import socket
import threading
import webbrowser
from collections.abc import Callable
from typing import Any

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
    what = parser.add_argument_group("environment")
    what.add_argument(
        "--env",
        default="chat",
        metavar="NAME",
        help="chat (default), countdown, digits, gsm8k, ifeval, math, reasoning-gym:TASK, or module:function, called "
        "with the tokenizer",
    )
    what.add_argument(
        "--tokenizer",
        metavar="NAME",
        help="tiny (one token a character), or a tokenizer's name or folder (default: the model's, else tiny)",
    )
    what.add_argument("--data", metavar="PATH", help="a local copy of the dataset: a folder or a JSONL file")
    what.add_argument("--system-prompt", metavar="TEXT", help="default: the environment's own")
    what.add_argument("--seed", type=int, default=0, help="of generated problems (default 0)")
    what.add_argument("--max-turns", type=int, metavar="N", help="answers of an episode")
    what.add_argument("--max-tokens", type=int, metavar="N", help="sampled tokens of an episode")
    what.add_argument("--max-context", type=int, metavar="N", help="tokens of the whole conversation")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        metavar="NAME",
        help="a model that answers, where it is asked to: tiny (random), a name or a folder",
    )
    model.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="of one answer (default 256)")
    model.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token (default 1)")
    page = parser.add_argument_group("page")
    page.add_argument("--rollouts", metavar="PATH", help="a folder of rollout files for the viewer, or one file")
    add_page_arguments(page)
    parser.set_defaults(run=run)


def add_page_arguments(page: Any) -> None:
    """Add ``--port`` and ``--no-browser``."""
    page.add_argument("--port", type=int, default=0, help="default: a free one")
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
    from torchrl_chat.openenv.gallery import factory_of
    from torchrl_chat.openenv.server import create_app
    from torchrl_chat.openenv.web import web_routes

    tokenizer, policy = _tokenizer_and_policy(arguments)
    factory, name = factory_of(
        arguments.env,
        tokenizer,
        data=arguments.data,
        system_prompt=arguments.system_prompt,
        seed=arguments.seed,
        max_turns=arguments.max_turns,
        max_tokens=arguments.max_tokens,
        max_context=arguments.max_context,
    )
    factory().close()  # what is wrong with the dataset or the template is said now, not in the browser
    routes = web_routes(tokenizer, rollouts=arguments.rollouts, policy=policy)
    return create_app(factory, env_name=name, allowed_origins=[], extra_routes=routes)


def show(server_of: Callable[[Any], Any], app: Any, arguments: argparse.Namespace) -> None:
    """Serve an application's page on this machine, open it in the browser, and wait for Ctrl-C.

    Args:
        server_of: makes the uvicorn server of the application.
        app: the application.
        arguments: with ``port`` and ``no_browser``.

    Raises:
        OSError: the port is in use.
    """
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    # A page elsewhere whose name is made to lead to this machine (DNS rebinding) is of the same origin; its name is not.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"], www_redirect=False)
    listening = socket.create_server(("127.0.0.1", arguments.port))
    address = f"http://127.0.0.1:{listening.getsockname()[1]}/web/"
    print(f"{address}  (Ctrl-C ends it)", flush=True)
    if not arguments.no_browser:
        # Beside the server: some browsers return only when they are closed.
        threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt):
        server_of(app).run(sockets=[listening])


def _tokenizer_and_policy(arguments: argparse.Namespace) -> tuple[Any, Any]:
    from torchrl_chat.cli import tiny

    name = arguments.tokenizer or arguments.model or "tiny"
    if name == "tiny":
        tokenizer: Any = tiny.tiny_tokenizer(
            tiny.DIGIT_ALPHABET if arguments.env == "digits" else tiny.TEXT_ALPHABET
        )
    else:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(name)
    if arguments.model is None:
        return tokenizer, None
    if arguments.model == "tiny":
        model: Any = tiny.tiny_model(len(tokenizer), context=4096)
    else:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
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
