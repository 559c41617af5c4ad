"""What ``serve`` and ``play`` share: which environment is meant, with which tokenizer, and when its episodes end."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from torchrl_chat import pretrained
from torchrl_chat.gallery import NAMES, ROWS, tiny_tokenizer_for
from torchrl_chat.options import TEMPLATE_HELP, whole


def add_arguments(parser: argparse.ArgumentParser, tokenizer: str) -> None:
    """Add the arguments that say which environment is meant.

    Args:
        parser: the command's parser.
        tokenizer: what is said of the tokenizer's default; the command sets it.
    """
    what = parser.add_argument_group("environment")
    what.add_argument(
        "--env",
        default="chat",
        metavar="NAME",
        help=f"chat (default), {', '.join(name for name in NAMES if name != ROWS)}; or module:function, called with the tokenizer",
    )
    what.add_argument(
        "--tokenizer",
        metavar="NAME",
        help=f"tiny (one token a character), or a tokenizer's name or folder (default: {tokenizer})",
    )
    what.add_argument("--chat-template", metavar="FILE_OR_NAME", help=TEMPLATE_HELP)
    what.add_argument("--data", metavar="PATH", help="a local copy of the dataset: a folder or a JSONL file")
    what.add_argument("--system-prompt", metavar="TEXT", help="default: the environment's own")
    what.add_argument("--seed", type=int, default=0, help="of generated problems (default 0)")
    what.add_argument("--python-tool", action="store_true", help="run fenced Python code of answers in a sandbox")
    ends = parser.add_argument_group("when an episode ends")
    ends.add_argument("--max-turns", type=whole(1), metavar="N", help="answers")
    ends.add_argument(
        "--max-turn-tokens", type=whole(1), metavar="N", help="sampled tokens of one answer; it is cut there"
    )
    ends.add_argument("--max-tokens", type=whole(1), metavar="N", help="sampled tokens of the episode")
    ends.add_argument("--max-context", type=whole(1), metavar="N", help="tokens of the whole conversation")


def load_tokenizer(name: str, env: str) -> Any:
    """The tokenizer of a name or folder; ``"tiny"`` has the characters that the environment needs."""
    if name == "tiny":
        return tiny_tokenizer_for(env)
    return pretrained.load_tokenizer(name)


def make_factory(arguments: argparse.Namespace, tokenizer: Any) -> tuple[Callable[[], Any], str]:
    """What makes the environment of a session, and the environment's name.

    One is made at once: what is wrong with the dataset or the template is said now, not to the first client.

    Raises:
        ValueError: an unknown environment, or one that cannot be made of these arguments.
    """
    from torchrl_chat.openenv.gallery import factory_of

    template = {}
    if arguments.chat_template is not None:
        template["chat_template"] = pretrained.template_of(arguments.chat_template)
    factory, name = factory_of(
        arguments.env,
        tokenizer,
        data=arguments.data,
        system_prompt=arguments.system_prompt,
        seed=arguments.seed,
        python_tool=arguments.python_tool,
        template=template,
        max_turns=arguments.max_turns,
        max_turn_tokens=arguments.max_turn_tokens,
        max_tokens=arguments.max_tokens,
        max_context=arguments.max_context,
    )
    env = factory()
    if hasattr(env, "prepare"):
        env.prepare()
    env.close()
    return factory, name
