"""``torchrl-chat audit``: which turns are token-exact with a tokenizer's chat template."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DESCRIPTION = """\
Find out which kinds of turn are token-exact with a tokenizer's chat template, and see every token that stands
behind an answer: what the policy samples, what the template adds, where the next turn opens.

  torchrl-chat audit Qwen/Qwen3-0.6B
  torchrl-chat audit ./checkpoint --template my_template.jinja
  torchrl-chat audit ./checkpoint --json | jq '.capabilities[] | select(.status != "proved")'

Each capability is proved (the next prompt is exact), refused (it cannot be proved: the environment raises, with
the reason shown) or unsupported (the template itself raises, or leaves a message out). "compiled" costs no
rendering at each turn, "rendered" runs the template. Below stand what the template does to earlier turns
(where history_policy="template" branches), and whether other ways to the next prompt would give the same ids.

The exit code is 0 if user turns are proved, 1 if not, 2 if there is nothing to audit."""


def add_parser(commands: Any) -> None:
    """Add ``audit`` to the commands."""
    parser = commands.add_parser(
        "audit",
        help="prove a chat template token-exact, or say why not",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("tokenizer", metavar="TOKENIZER_OR_FOLDER", help="a local folder, or a name on the hub")
    parser.add_argument(
        "--template",
        type=Path,
        metavar="FILE_OR_NAME",
        help="a Jinja file instead of its own template, or one for base models: plain, r1-zero",
    )
    parser.add_argument(
        "--tools", type=Path, metavar="FILE", help="tool schemas, a JSON list (default: a small tool)"
    )
    parser.add_argument(
        "--template-kwargs",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="variables of the template; a value is JSON or else a string: enable_thinking=false",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument(
        "--tails", action="store_true", help="show the tokens of every tail, also of those seen above"
    )


def run(arguments: argparse.Namespace) -> int:
    """Audit, print the report, and say by the exit code whether user turns are proved."""
    from torchrl_chat.templates.named import NAMED

    named = str(arguments.template) in NAMED and not arguments.template.is_file()
    source = str(arguments.template) if named else _read(arguments.template) if arguments.template else None
    if source is not None and not named and "{" not in source:
        raise ValueError(
            f"--template {arguments.template} is no Jinja template: it has no {{{{ ... }}}} and no {{% ... %}}."
        )
    tools = _tools(arguments.tools) if arguments.tools else None
    variables = template_kwargs(arguments.template_kwargs)
    with _quiet():
        tokenizer = load_tokenizer(arguments.tokenizer)
        from torchrl_chat.templates.audit import BrokenTemplateError, audit

        try:
            report = audit(tokenizer, chat_template=source, tools=tools, **variables)
        except BrokenTemplateError as error:
            print(f"torchrl-chat audit: {error}", file=sys.stderr)
            return 1
    if arguments.json:
        text = json.dumps(report.as_dict(), indent=2)
    else:
        from torchrl_chat.cli.audit_text import Style, lines

        style = Style.of(sys.stdout, shutil.get_terminal_size((100, 24)).columns)
        text = "\n".join(lines(report, style, all_tails=arguments.tails))
    try:
        print(text, flush=True)
    except BrokenPipeError:  # whoever reads has seen enough (| head); nothing is left to flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0 if report.proved else 1


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a local folder, or of a name on the hub.

    Raises:
        ValueError: there is none; one line says what was looked for.
    """
    from transformers import AutoTokenizer

    folder = Path(name).expanduser()
    local = folder.exists()
    if not local and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ValueError(f"there is no folder {name!r}.")
    if not local and not _cached(name) and not _hub_is_there():
        raise ValueError(
            f"{name!r} is no folder here, not in the local cache, and the Hugging Face hub cannot be reached."
        )
    try:
        return AutoTokenizer.from_pretrained(folder if local else name)
    except Exception as error:  # whatever transformers and its backends raise at files, it is the files
        what = f"folder {name!r} holds no tokenizer" if local else f"no tokenizer {name!r} was found"
        raise ValueError(f"{what} that transformers can load: {_first_line(error)}") from error


def _cached(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    try:
        found = (try_to_load_from_cache(name, file) for file in ("tokenizer_config.json", "tokenizer.json"))
        return any(isinstance(path, str) for path in found)
    except ValueError:  # not the form of a name; transformers says what is wrong
        return True


def _hub_is_there() -> bool:
    """Whether the hub's name resolves; without it, transformers retries for most of a minute."""
    import socket
    import urllib.request
    from urllib.parse import urlsplit

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or urllib.request.getproxies():
        return True  # transformers knows better: it looks into its cache, or asks the proxy
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def template_kwargs(pairs: list[str]) -> dict[str, Any]:
    """Variables of the template from ``KEY=VALUE``.

    Raises:
        ValueError: one is not of this form.

    Example:
        >>> template_kwargs(["enable_thinking=false", "date_string=26 Jul 2024"])
        {'enable_thinking': False, 'date_string': '26 Jul 2024'}
    """
    variables: dict[str, Any] = {}
    words = {"True": True, "False": False, "None": None}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"--template-kwargs {pair!r}: expected KEY=VALUE.")
        try:
            variables[key] = words[value] if value in words else json.loads(value)
        except ValueError:
            variables[key] = value
    return variables


def _tools(path: Path) -> list[Any]:
    try:
        tools = json.loads(_read(path))
    except ValueError as error:
        raise ValueError(f"--tools {path} is no JSON: {error}") from error
    tools = [tools] if isinstance(tools, dict) else tools
    if not isinstance(tools, list) or not tools or not all(_is_tool(tool) for tool in tools):
        raise ValueError(
            f'--tools {path}: expected a list of {{"type": "function", "function": {{"name": ..., "parameters": ...}}}}.'
        )
    return tools


def _is_tool(tool: Any) -> bool:
    function = tool.get("function") if isinstance(tool, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text.") from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what libraries say on the way out of the report."""
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers_logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        transformers_logging.set_verbosity(before)
