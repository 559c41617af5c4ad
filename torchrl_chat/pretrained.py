"""Tokenizers and models of a folder or a name on the hub, and one sentence where there is none.

transformers asks the hub for whatever is no folder, and tries again for most of a minute where there is no network: a
mistyped folder is said to be one here, before anything is asked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torchrl_chat import smollm2


def place(name: str, what: str, file: str = "config.json") -> str | Path:
    """Where transformers finds it: the folder of that name, or the name itself.

    Args:
        name: a local folder, a name on the Hugging Face hub, or :data:`~torchrl_chat.smollm2.NAME`.
        what: what is looked for, for the error: ``"model"``, ``"tokenizer"``.
        file: one of its files, which is in the local cache if it was ever loaded.

    Raises:
        ValueError: it looks like a folder and is none; or it is neither here nor in the cache, and the hub cannot be
            reached.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name == smollm2.NAME:
        return smollm2.smollm2()
    if folder.exists():
        raise ValueError(f"{name!r} is a file: expected the folder of a {what}, or its name on the hub.")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/") or "\\" in name:
        raise ValueError(f"there is no folder {name!r} with a {what}.")
    if not _cached(name, file) and not _hub_is_there():
        raise ValueError(
            f"{name!r} is no folder here, not in the local cache, and the Hugging Face hub cannot be reached."
        )
    return name


def load_tokenizer(name: str, chat_template: str | None = None) -> Any:
    """The tokenizer of a local folder, or of a name on the hub.

    Args:
        name: the folder or name.
        chat_template: instead of its own: a file with Jinja source, or a name of
            :data:`~torchrl_chat.templates.named.NAMED`.

    Raises:
        ValueError: there is none; one line says what was looked for. Or there is no such chat template.
    """
    from transformers import AutoTokenizer

    tokenizer = _loaded(AutoTokenizer.from_pretrained, name, "tokenizer", "tokenizer_config.json")
    return with_template(tokenizer, chat_template)


def with_template(tokenizer: Any, chat_template: str | None) -> Any:
    """The tokenizer, with the chat template of a command line where one is given.

    Raises:
        ValueError: there is no such chat template.
    """
    from torchrl_chat.templates.named import NAMED, named_template

    if chat_template is not None:
        given = template_of(chat_template)
        tokenizer.chat_template = named_template(given, tokenizer) if given in NAMED else given
    return tokenizer


def template_of(given: str) -> str:
    """The chat template of a command line: the source in a file, or the name of a template for base models.

    Raises:
        ValueError: neither a file nor a name.
    """
    from torchrl_chat.templates.named import NAMED

    if given in NAMED and not Path(given).is_file():
        return given
    try:
        return Path(given).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        names = ", ".join(NAMED)
        raise ValueError(
            f"the chat template {given!r} is no file that can be read ({error.strerror}), and none of {names}."
        ) from error


def load_model(name: str, **options: Any) -> Any:
    """The causal language model of a local folder, or of a name on the hub.

    Args:
        name: the folder or name.
        **options: arguments of ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        ValueError: there is none; one line says what was looked for.
    """
    import transformers
    from transformers import AutoModelForCausalLM

    transformers.utils.logging.disable_progress_bar()  # of shards, which it draws on terminals and elsewhere
    return _loaded(AutoModelForCausalLM.from_pretrained, name, "model", "config.json", **options)


def _loaded(load: Any, name: str, what: str, file: str, **options: Any) -> Any:
    found = place(name, what, file)
    try:
        return load(found, **options)
    except Exception as error:  # whatever transformers and its backends raise at files, it is the files
        held = f"folder {name!r} holds no {what}" if isinstance(found, Path) else f"no {what} {name!r} was found"
        raise ValueError(f"{held} that transformers can load: {_first_line(error)}") from error


def _cached(name: str, file: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    try:
        return any(isinstance(try_to_load_from_cache(name, part), str) for part in (file, "tokenizer.json"))
    except ValueError:  # not the form of a name; transformers says what is wrong
        return True


@contextlib.contextmanager
def no_retries_without_hub() -> Iterator[None]:
    """Within it, huggingface_hub does not ask a hub that cannot be reached: it does so five times, for 23 seconds."""
    from huggingface_hub import constants

    was = constants.HF_HUB_OFFLINE
    if not _hub_is_there():
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = was


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


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
