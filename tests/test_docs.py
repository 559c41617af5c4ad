"""The documentation: its Python and every docstring example run, its commands are ones that the parsers know, its site builds.

Everything is found, nothing is listed: a page, a block of code or a docstring that is added is tested.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import doctest
import functools
import html.parser
import importlib.util
import io
import json
import pkgutil
import re
import runpy
import shlex
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config

import torchrl_chat
from torchrl_chat import ChatTemplate
from torchrl_chat.openenv import ChatEnvironment, create_app
from torchrl_chat.openenv.server import make_server
from torchrl_chat.tiny import TEXT_ALPHABET, tiny_tokenizer

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").rglob("*.md"))
FILES = "https://github.com/torchrl-chat/torchrl_chat/blob/main/"
IMAGES = "https://raw.githubusercontent.com/torchrl-chat/torchrl_chat/main/"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

sys.path.insert(0, str(ROOT / "scripts"))
import site_hooks  # noqa: E402


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


# ---------------------------------------------------------------------- blocks of code
class Block(NamedTuple):
    language: str
    marks: set[str]  # "full": a block that takes a cluster or minutes
    text: str
    line: int  # of the fence, in the page


FENCE = re.compile(r"^( *)```+ ?(?:\{ ?\.)?([\w+-]*)([^\n]*)\n(.*?)^\1```+ *$", re.DOTALL | re.MULTILINE)


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for found in FENCE.finditer(text):
        inside = re.sub(rf"^{found[1]}", "", found[4], flags=re.MULTILINE)
        yield Block(
            found[2], set(re.findall(r"\.([\w-]+)", found[3])), inside, text[: found.start()].count("\n") + 1
        )


def python_pages() -> Iterator:
    for page in PAGES:
        code = [block for block in blocks(page) if block.language == "python"]
        light = [block for block in code if "full" not in block.marks]
        if light:
            yield pytest.param(page, light, id=name_of(page))
        if light != code:
            yield pytest.param(page, code, id=f"{name_of(page)}, all of it", marks=pytest.mark.full)


@pytest.mark.parametrize(("page", "code"), python_pages())
def test_the_python_of_a_page_runs(page, code, tmp_path, monkeypatch):
    """From top to bottom, each block with the names of those before it."""
    monkeypatch.chdir(tmp_path)
    scope = {"__name__": "page"}
    for block in code:
        exec(compile("\n" * block.line + block.text, name_of(page), "exec"), scope)


@pytest.mark.parametrize(
    "block", [b for b in blocks(README) if b.language == "python"], ids=lambda b: f"line{b.line}"
)
def test_the_python_of_the_readme_runs(block, tmp_path, monkeypatch):
    """Each block by itself: it is what people copy first."""
    monkeypatch.chdir(tmp_path)
    exec(compile("\n" * block.line + block.text, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("page", [*PAGES, README], ids=name_of)
def test_the_json_of_a_page_is_json(page):
    for block in blocks(page):
        if block.language == "json":
            json.loads(block.text)


# ---------------------------------------------------------------------- commands
class Parsed(Exception):
    """A script has read its arguments."""


def commands_of(text: str) -> Iterator[list[str]]:
    """The command lines of a shell block as words, without comments; what a command prints is in blocks of its own."""
    for line in text.replace("\\\n", " ").splitlines():
        for part in re.split(r"\s&&\s|\s\|\s", line):
            words = shlex.split(part, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]
            if words:
                yield words


def shell_blocks() -> Iterator:
    for page in [*PAGES, *sorted(ROOT.glob("*.md"))]:
        for block in blocks(page):
            if block.language in ("bash", "sh", "console", "shell"):
                yield pytest.param(block.text, id=f"{name_of(page)}, line {block.line}")


@functools.cache
def parsers() -> dict[str, argparse.ArgumentParser]:
    return dict(site_hooks.commands())


def refuse(parser: argparse.ArgumentParser, words: list[str]) -> None:
    """Fail if the parser does."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            _, left = parser.parse_known_args(words)
    except SystemExit as ended:
        if ended.code:  # --help ends without one
            pytest.fail(f"{' '.join(words)}: {said.getvalue()}")
        return
    assert not left, f"{' '.join(words)}: {left}"


def check(words: list[str]) -> None:
    """Fail if a command line is none: an unknown program, option, choice, script, target or extra."""
    program, *rest = words
    if program == "torchrun":
        assert "torchrl_chat.cli.main" in rest, words
        check(["torchrl-chat", *rest[rest.index("torchrl_chat.cli.main") + 1 :]])
    elif program == "torchrl-chat":
        for length in (2, 1):  # eval compare, then eval
            if (parser := parsers().get(" ".join(["torchrl-chat", *rest[:length]]))) is not None:
                return refuse(parser, rest[length:])
        assert rest == ["--version"], words
    elif program in ("python", "python3") and rest[0] != "-m":
        script, *arguments = rest
        if (parser := parsers().get(f"python {script}")) is not None:
            return refuse(parser, arguments)
        run_until_parsed(ROOT / script, arguments)
    elif program in ("python", "python3"):
        assert importlib.util.find_spec(rest[1]), words
    elif program == "make":
        targets = set(re.findall(r"^([\w-]+)(?: [\w-]+)*:", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert {word for word in rest if "=" not in word} <= targets, words
    elif program == "pip":
        extras = {extra for found in re.findall(r"\[([\w,-]+)\]", " ".join(rest)) for extra in found.split(",")}
        assert extras <= set(PROJECT["optional-dependencies"]), words
    else:
        assert program in ("cd", "git", "curl", "ray", "sh"), f"{program}: is it a command? {words}"


def run_until_parsed(script: Path, arguments: list[str]) -> None:
    """A script up to where it has read its arguments."""
    read = argparse.ArgumentParser.parse_args

    def parse_args(self, *args, **kwargs):
        read(self, *args, **kwargs)
        raise Parsed

    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        patch.setattr(sys, "argv", [str(script), *arguments])
        patch.syspath_prepend(script.parent)
        try:
            runpy.run_path(str(script), run_name="__main__")
        except Parsed:
            return
        except SystemExit:
            pass
    pytest.fail(f"{script.name} {' '.join(arguments)}: {said.getvalue() or 'it reads no arguments'}")


@pytest.mark.parametrize("text", shell_blocks())
def test_the_commands_of_a_page_are_commands(text):
    for words in commands_of(text):
        check(words)


@pytest.mark.parametrize(
    "words",
    [
        ["torchrl-chat", "train", "--no-such-option", "3"],
        ["torchrl-chat", "eval", "--backend", "nothing"],
        ["torchrl-chat", "nothing"],
        ["python", "benchmarks/bridge.py", "--no-such-option"],
        ["python", "examples/ppo.py", "--trunk", "nothing"],
        ["make", "nothing"],
        ["pip", "install", "torchrl_chat[nothing]"],
        ["nothing"],
    ],
    ids=" ".join,
)
def test_what_is_no_command_is_found(words):
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check(words)


# ---------------------------------------------------------------------- docstrings
NOT_HERE = {
    "torchrl_chat.distributed.collector": "starts a cluster; docs/train/scaling.md runs it in make test-all",
    "torchrl_chat.policies.vllm": "vLLM has an environment of its own, and tests/test_vllm.py",
    "torchrl_chat.policies.vllm_worker": "imports vLLM",
    "torchrl_chat.policies.wrappers": "one of its classes is vLLM's",
    "torchrl_chat.smollm2": "downloads a model",
}
"""Modules with an example that is not run here, and why."""


def modules() -> Iterator[str]:
    for found in pkgutil.walk_packages(torchrl_chat.__path__, "torchrl_chat."):
        if not found.name.endswith(("__main__", "vllm_worker")):
            yield found.name


def own_names(module) -> dict:
    """What a module defines itself; what it imports, an example imports, too."""
    found = set()
    for node in ast.parse(Path(module.__file__).read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            found |= {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
    return {name: value for name, value in vars(module).items() if name in found}


ROOMS = sorted({name.split(".")[1] for name in modules()})


@pytest.fixture(scope="module")
def url():
    """A chat server, for the examples of clients."""
    app = create_app(functools.partial(ChatEnvironment, ChatTemplate(tiny_tokenizer(TEXT_ALPHABET))), loopback=True)
    server = make_server(app, port=0, grace_seconds=2)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(30)


@pytest.mark.parametrize("room", ROOMS)
def test_docstring_examples_run(room, tmp_path, monkeypatch, request):
    """Each by itself: it has what its module defines, and what it imports."""
    monkeypatch.chdir(tmp_path)
    finder, wrong = doctest.DocTestFinder(exclude_empty=True), []
    for name in modules():
        if name.split(".")[1] != room:
            continue
        module = importlib.import_module(name)
        for example in finder.find(module):
            if not example.examples:
                continue
            example.globs = {**own_names(module), "__name__": name}
            if room == "openenv":
                example.globs["url"] = request.getfixturevalue("url")
            if any(doctest.SKIP in part.options for part in example.examples):
                assert name in NOT_HERE, f"{example.name} is not run: why?"
            runner, said = doctest.DocTestRunner(verbose=False), io.StringIO()
            if runner.run(example, out=said.write).failed:
                wrong.append(said.getvalue())
    assert not wrong, "\n".join(wrong)


# ---------------------------------------------------------------------- the site
@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built as ``make docs`` builds it: every warning (a link to nowhere, a page in no menu) is an error."""
    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        config = load_config("mkdocs.yml", site_dir=str(folder), strict=True)
        build(config)
    return folder


class Page(html.parser.HTMLParser):
    """The ids of a page, its links, and what it loads."""

    def __init__(self, text: str):
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids.add(given.get("id") or "")
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        elif tag in ("script", "img", "source", "iframe"):
            self.loaded.append(given.get("src") or "")
        elif tag == "link" and given.get("rel") in ("stylesheet", "icon", "preload"):
            self.loaded.append(given.get("href") or "")


def test_the_site_is_whole(site):
    pages = {path: Page(path.read_text()) for path in site.rglob("index.html")}
    assert len(pages) == len(PAGES)
    for path, page in pages.items():
        for target in page.loaded:
            assert "://" not in target, f"{path}: {target} is loaded from elsewhere"
            assert not target or target.startswith("data:") or (path.parent / target).resolve().exists(), target
        for link in page.links:
            if "://" in link:
                continue
            file, _, anchor = link.partition("#")
            there = (path.parent / file).resolve() if file else path
            found = pages[there / "index.html" if there.is_dir() else there]
            assert not anchor or anchor.startswith("__") or anchor in found.ids, f"{path}: {link}"
    text = "".join(path.read_text() for path in pages)
    assert "api.github.com" not in text

    api = set().union(*(page.ids for path, page in pages.items() if "api" in path.parts))
    for page in (ROOT / "docs" / "reference" / "api").glob("*.md"):
        for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE):
            for public in getattr(importlib.import_module(name), "__all__", ()):
                there = {f"{name}.{public}", f"{name}.{public.lower()}"}
                home = getattr(getattr(importlib.import_module(name), public), "__module__", None)
                assert api & {*there, f"{home}.{public}"}, f"the API pages lack {name}.{public}"

    commands = (site / "reference" / "cli" / "index.html").read_text()
    assert all(f">{name}<" in commands for name in parsers())


# ---------------------------------------------------------------------- what points out of a page
@pytest.mark.parametrize("page", [*PAGES, *sorted(ROOT.glob("*.md"))], ids=name_of)
def test_links_into_the_repository_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        for prefix in (FILES, IMAGES):
            if target.startswith(prefix):
                assert (ROOT / target.removeprefix(prefix).partition("#")[0]).exists(), target
        if "://" not in target and page.parent == ROOT:
            assert (ROOT / target.partition("#")[0]).exists(), target


def test_the_readme_stands_alone_on_a_package_index():
    text = README.read_text()
    assert text.count("\n") < 130
    assert "`make train`" in text
    assert "`make test`" in text
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        assert target.startswith("https://"), target  # a relative link leads nowhere there


def test_every_environment_variable_is_told():
    told = (ROOT / "docs" / "reference" / "environment-variables.md").read_text()
    read = set()
    for path in (
        *(ROOT / "torchrl_chat").rglob("*.py"),
        *(ROOT / "tests").glob("*.py"),
        ROOT / "scripts" / "environment.py",
    ):
        found = re.findall(
            r"environ(?:\.get\(|\.setdefault\(|\[)\s*f?[\"'](\w+)|getenv\([\"'](\w+)", path.read_text()
        )
        names = {a or b for a, b in found}
        read |= (
            names
            if "torchrl_chat" in path.parts[-3:] or path.is_relative_to(ROOT / "torchrl_chat")
            else {name for name in names if name.startswith("TORCHRL_CHAT_")}
        )
    read -= {"PATH"}  # everybody's
    assert not {name for name in read if name not in told}
