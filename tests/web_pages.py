"""What the tests of the web page share: servers in threads, a real browser, and rollout files."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import random
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import skip_without

from torchrl_chat import ChatTemplate, tiny
from torchrl_chat.openenv.chat.environment import ChatEnvironment
from torchrl_chat.openenv.server import create_app, make_server
from torchrl_chat.openenv.web import web_routes
from torchrl_chat.rollouts import as_line
from torchrl_chat.viewer import viewer_app

HOSTILE = "<img src=x onerror=\"document.title='hit'\"><script>document.title='hit'</script><b>bold</b>"
TEXT = tiny.tiny_tokenizer(tiny.TEXT_ALPHABET)
TEMPLATE = ChatTemplate(TEXT)


@contextlib.contextmanager
def live(app, make=lambda app: make_server(app, port=0, grace_seconds=2)):
    """An application in a thread of this process; its address."""
    server = make(app)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + 120
    while not server.started and time.monotonic() < end:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(120)
        assert not thread.is_alive()


def chat_app(token=None, **page):
    factory = functools.partial(ChatEnvironment, TEMPLATE)
    return create_app(factory, token=token, allowed_origins=[], extra_routes=web_routes(TEXT, **page))


def viewer(path):
    import uvicorn

    return live(viewer_app(path), lambda app: uvicorn.Server(uvicorn.Config(app, port=0, log_config=None)))


def chromium(playwright):
    """The Chromium to test with: a named one, playwright's own, or the system's."""
    own = playwright.chromium.executable_path
    named = os.environ.get("TORCHRL_CHAT_CHROMIUM")
    found = named or (own if Path(own).exists() else None)
    return found or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextlib.contextmanager
def chromium_browser():
    """A browser, or a skip that says how to get one."""
    try:
        from playwright import sync_api
    except ImportError:
        skip_without("chromium", "needs playwright: pip install playwright")
    sync_api.expect.set_options(timeout=20_000)  # of a machine that does much else at the same time
    with sync_api.sync_playwright() as playwright:
        path = chromium(playwright)
        if path is None:
            pytest.skip(
                "no Chromium: 'python -m playwright install chromium' or 'apt-get install chromium', or name one in "
                "TORCHRL_CHAT_CHROMIUM"
            )
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox refuses root
        started = playwright.chromium.launch(executable_path=path, args=arguments)
        yield SimpleNamespace(open=started, expect=sync_api.expect)
        started.close()


@contextlib.contextmanager
def tabs(browser):
    """Makes pages; an error that a page does not catch fails the test."""
    contexts, errors = [], []

    def opened(url=None, **options):
        context = browser.open.new_context(**{"viewport": {"width": 1200, "height": 760}, **options})
        context.set_default_timeout(10_000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.expect = browser.expect
        if url is not None:
            page.goto(url)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert errors == []


def episode(number, group_size=4, tokens=120, rng=None, **fields):
    """An episode as training writes it."""
    rng = rng or random.Random(number)
    row, place = divmod(number, group_size)
    half = tokens // 2
    right = rng.random() < 0.4
    words = [rng.choice(["the", "sum", "of", "twelve", "and", "thirty", "is", "42"]) + " " for _ in range(tokens)]
    same = random.Random(row)  # what the members of a group have in common
    words[:half] = [f"{same.randrange(90)} " for _ in range(half)]
    question, answer = f"question {row}: what is {row} + 30?", "".join(words[half:])
    return {
        "version": 1,
        "id": f"{row}.{place}",
        "row": row,
        "epoch": 0,
        "group": f"0.{row}",
        "place": place,
        "seed": str(rng.getrandbits(63)),
        "query": question,
        "reference": "42",
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ],
        "reward": round(rng.random(), 3) + right,
        "success": right,
        "reward_parts": {"right": float(right), "format": 0.1},
        "grade_failure": None,
        "stop": rng.choice(["answered", "answered", "max_tokens"]),
        "finish_reason": "stop",
        "cut": False,
        "error": None,
        "prompt_differs": None,
        "turns": 1,
        "sampled_tokens": rng.randint(1, half),
        "total_tokens": tokens,
        "sequences": [
            {
                "ids": [(same if at < half else rng).randrange(150_000) for at in range(tokens)],
                "sampled": [[half, tokens]],
                "log_probs": [round(-rng.expovariate(1), 5) for _ in range(tokens - half)],
                "pieces": words,
            }
        ],
        "metadata": {"time": 1.7e9 + number, "step": row // 5, "policy": "made up"},
        **fields,
    }


def write_episodes(path: Path, count: int) -> Path:
    """A rollout file."""
    path.write_bytes(b"".join(as_line(episode(number)) for number in range(count)))
    return path


def sampled_text(page):
    """What of the shown tokens the policy sampled."""
    return "".join(page.locator(".flow .tok.s").all_text_contents())


def arguments_of(command, arguments):
    """What the command line parses into."""
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    command.add_parser(commands)
    return parser.parse_args([command.__name__.rpartition(".")[2], *arguments])


def browsing(tab, url, path):
    """A page in which a file of this machine is open."""
    page = tab(f"{url}/web/rollouts")
    page.locator("#local").set_input_files(path)
    page.expect(page.locator("#status")).to_contain_text("read in")
    return page
