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

With --model the model itself is loaded and tried: in which ways rows may go through it together (padded, packed, as trees
of what they begin with alike, with a cache), so that it computes what it computes of each alone, and by how many nats
the others are off.

The exit code is 0 if user turns are proved (and, with --model, the model can be sampled from), 1 if not, 2 if there is
nothing to audit."""


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
    parser.add_argument("--model", action="store_true", help="try the model of the folder or name, too")
    parser.add_argument("--dtype", default="float32", help="of its weights (default float32)")
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
        from torchrl_chat.pretrained import load_tokenizer

        tokenizer = load_tokenizer(arguments.tokenizer)
        from torchrl_chat.audit import BrokenTemplateError, audit

        try:
            report = audit(tokenizer, chat_template=source, tools=tools, **variables)
        except BrokenTemplateError as error:
            print(f"torchrl-chat audit: {error}", file=sys.stderr)
            return 1
        model = _model(arguments.tokenizer, arguments.dtype) if arguments.model else None
    if arguments.json:
        text = json.dumps(report.as_dict() | ({} if model is None else {"model": model}), indent=2)
    else:
        from torchrl_chat.cli.audit_text import Style, lines, model_lines

        style = Style.of(sys.stdout, shutil.get_terminal_size((100, 24)).columns)
        shown = [*lines(report, style, all_tails=arguments.tails)]
        text = "\n".join(shown if model is None else [*shown, "", *model_lines(model, style)])
    exit_code = 0 if report.proved and (model is None or model["sampling"]) else 1
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the verdict is known all the same; main ends other commands
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return exit_code


def _model(name: str, dtype: str) -> dict[str, Any]:
    """What a model was found to be right for.

    Raises:
        ValueError: there is no such model, or no such type.
    """
    import torch

    from torchrl_chat.models.passes import ModelError
    from torchrl_chat.models.proof import prover_of
    from torchrl_chat.pretrained import load_model

    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise ValueError(f"--dtype {dtype}: expected float32, bfloat16 or float16.")
    # What is scored with gradients is in train(); what is sampled never is, whatever the model's mode.
    model = load_model(name, dtype=kind).train()
    try:
        return prover_of(model).record()
    except ModelError as error:
        return {"class": type(model).__name__, "sampling": None, "refused": str(error)}


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
