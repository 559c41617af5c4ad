"""The web page in a real browser: played by keyboard, hostile texts, large rollout files; and its routes."""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from torchrl_chat import ChatTemplate
from torchrl_chat.cli import play, tiny, view
from torchrl_chat.openenv.environment import ChatEnvironment
from torchrl_chat.openenv.gallery import factory_of
from torchrl_chat.openenv.models import Action, Observation, State
from torchrl_chat.openenv.server import create_app, make_server
from torchrl_chat.openenv.web import viewer_app, web_routes
from torchrl_chat.rollouts import as_line, read_rollouts

HOSTILE = "<img src=x onerror=\"document.title='hit'\"><script>document.title='hit'</script><b>bold</b>"
TEXT = tiny.tiny_tokenizer(tiny.TEXT_ALPHABET)
TEMPLATE = ChatTemplate(TEXT)


# ---------------------------------------------------------------------- servers and browsers
@contextlib.contextmanager
def live(app, make=lambda app: make_server(app, port=0, grace_seconds=2)):
    """An application in a thread of this process; its address."""
    server = make(app)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + 20
    while not server.started and time.monotonic() < end:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def chat_app(token=None, **page):
    factory = lambda: ChatEnvironment(TEMPLATE)  # noqa: E731
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


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
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


@pytest.fixture
def tab(browser):
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


@pytest.fixture(scope="module")
def chat():
    with live(chat_app()) as url:
        yield url


@pytest.fixture(scope="module")
def digits():
    tokenizer = tiny.tiny_tokenizer()
    factory, name = factory_of("digits", tokenizer)
    with live(create_app(factory, env_name=name, extra_routes=web_routes(tokenizer))) as url:
        yield url


def opened(tab, url, **options):
    page = tab(f"{url}/web/", **options)
    page.expect(page.locator("#status")).to_have_text("connected")
    return page


def typed(page, text):
    """Type and send; wait until the message field is empty again."""
    page.keyboard.type(text)
    page.keyboard.press("Enter")
    page.expect(page.locator("#text")).to_have_value("")


def fact(page, name):
    return page.locator(f"#facts dt:text-is('{name}') + dd")


def sampled_text(page):
    return "".join(page.locator(".flow .tok.s").all_text_contents())


# ---------------------------------------------------------------------- playing
def test_a_chat_by_keyboard_only(chat, tab):
    page = opened(tab, chat)
    page.keyboard.press("n")
    page.expect(page.locator("#text")).to_be_focused()
    page.keyboard.type("12 + 30")
    page.keyboard.press("Shift+Enter")
    typed(page, "please")
    page.expect(page.locator(".message")).to_have_count(1)
    assert page.locator(".message .body").inner_text() == "12 + 30\nplease"
    page.expect(page.locator("#role")).to_have_value("assistant")  # whose turn it is now
    typed(page, "It is 42.")
    page.expect(page.locator(".message.policy .body")).to_have_text("It is 42.")
    page.expect(page.locator("#role")).to_have_value("user")
    typed(page, "and 2?")
    typed(page, "2.")
    page.expect(page.get_by_role("log")).to_have_text("assistant: 2.")  # what is new, for screen readers
    page.keyboard.press("Escape")
    page.keyboard.press("t")
    page.expect(page.locator(".flow .tok").first).to_be_visible()
    assert sampled_text(page) == "It is 42.2."
    drawn = "".join(page.locator(".flow .tok").all_text_contents()).replace("⏎", "")
    assert drawn == (
        "<|user|>12 + 30\nplease<|end|><|assistant|>It is 42.<|end|><|user|>and 2?<|end|><|assistant|>2.<|end|>"
    )
    page.expect(fact(page, "steps")).to_have_text("4")
    page.expect(fact(page, "tokens")).to_have_text(re.compile(r"11 sampled"))
    page.locator(".flow").focus()
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    page.expect(page.locator(".inspect")).to_have_text(re.compile(r'"\." · sampled'))
    page.keyboard.press("o")
    assert json.loads(page.locator("#observation pre").inner_text())["observation"]["messages"][-1] == {
        "role": "assistant",
        "content": "2.",
    }
    page.keyboard.press("e")
    page.expect(page.locator("#state pre")).to_contain_text('"step_count": 4')


def test_a_task_of_a_dataset_by_keyboard_only(digits, tab):
    page = opened(tab, digits)
    page.expect(page.locator("#task-count")).to_have_text("of 2,048")
    page.keyboard.press("/")
    page.keyboard.type("last(3,7)")
    page.expect(page.locator("#tasks [role=option]").first).to_be_visible()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    chosen = page.locator("#task").input_value()
    page.keyboard.press("Enter")
    page.expect(page.locator(".message .body")).to_have_text("last(3,7)=")
    page.expect(fact(page, "task")).to_have_text(f"train {chosen.split()[0]}")
    page.expect(page.locator("#stop-reason")).to_have_text("running")
    typed(page, "7")
    page.expect(page.locator("#reward")).to_have_text("1")
    page.expect(page.locator("#stop-reason")).not_to_have_text("running")
    page.keyboard.press("Escape")
    page.keyboard.press("t")
    page.expect(page.locator(".flow .tok.s")).to_have_text(["7"])
    page.keyboard.press("n")  # the same row again
    page.expect(page.locator("#stop-reason")).to_have_text("running")
    typed(page, "4")
    page.expect(page.locator("#reward")).to_have_text("0")


def test_a_seed_keeps_its_63_bits(digits, tab):
    seed = str(2**62 + 1)  # as a number of JavaScript it would be 2**62
    page = opened(tab, digits)
    sent = []
    page.on("websocket", lambda socket: socket.on("framesent", lambda frame: sent.append(frame)))
    page.keyboard.press("r")
    page.expect(page.locator("#status")).to_have_text("connected")
    page.keyboard.press("s")
    page.keyboard.type(seed)
    page.keyboard.press("Enter")
    page.expect(page.locator(".message")).to_have_count(1)
    assert json.loads(sent[-1])["data"]["seed"] == int(seed)


def test_errors_are_said_as_the_server_says_them(chat, tab):
    page = opened(tab, chat)
    page.keyboard.press("n")
    page.expect(page.locator("#text")).to_be_focused()
    page.keyboard.press("Alt+5")
    page.keyboard.type('{"tokens": [99999]}')
    page.keyboard.press("Enter")
    page.expect(page.locator("#error")).to_have_text(re.compile(r"EXECUTION_ERROR .*99999"))
    page.expect(page.locator("#text")).to_have_value('{"tokens": [99999]}')  # nothing is lost
    page.locator("#text").fill('{"tokens": [1.5]}')
    page.keyboard.press("Enter")
    page.expect(page.locator("#error")).to_contain_text("VALIDATION_ERROR Invalid action: tokens.0")
    page.locator("#text").fill("{")
    page.keyboard.press("Enter")
    page.expect(page.locator("#error")).to_contain_text("JSON")
    page.keyboard.press("Alt+1")
    page.locator("#text").fill("now the user")
    page.keyboard.press("Enter")
    page.expect(page.locator(".message")).to_have_count(1)
    page.expect(page.locator("#error")).to_be_hidden()


def test_hostile_texts_stay_texts(chat, tab):
    page = opened(tab, chat)
    page.keyboard.press("n")
    page.expect(page.locator("#text")).to_be_focused()
    for _ in range(2):  # of the user, of the policy
        page.locator("#text").fill(HOSTILE)
        page.keyboard.press("Enter")
        page.expect(page.locator("#text")).to_have_value("")
    assert page.locator(".message .body").all_inner_texts() == [HOSTILE] * 2
    page.keyboard.press("Escape")
    page.keyboard.press("o")
    page.keyboard.press("t")
    page.expect(page.locator(".flow .tok").first).to_be_visible()
    assert sampled_text(page) == HOSTILE
    page.locator("#text").fill('{"messages": [{"role": "<script>", "content": [{"type": "x"}, "y"]}]}')
    page.locator("#role").select_option("json")
    page.locator("#text").press("Enter")
    page.expect(page.locator("#error, .message").first).to_be_visible()
    assert page.locator("#conversation img, #conversation script, #conversation b, #error img").count() == 0
    assert page.title() == "Play · torchrl_chat"


def test_signs_that_hide_are_shown(chat, tab):
    page = opened(tab, chat)
    found = page.evaluate(
        """async () => {
          const { tokenView } = await import("/web/static/tokens.js");
          const pieces = ["a\\n", "\\t", "\\r", "\\u0000", "\\u202e", ""];
          const view = tokenView({ ids: [1, 2, 3, 4, 5, 6], sampled: [[1, 3]], log_probs: [-0.01, -9], pieces });
          document.body.append(view);
          return [...view.querySelectorAll(".tok")].map((one) => [one.textContent, one.className, getComputedStyle(one).unicodeBidi]);
        }"""
    )
    assert [text for text, _, _ in found] == ["a⏎\n", "⇥\t", "␍", "␀", "\u202e", "◌"]
    assert [names for _, names, _ in found] == ["tok", "tok s l0", "tok s l5", "tok", "tok", "tok"]
    assert {bidi for _, _, bidi in found} == {"isolate"}  # a right-to-left override ends with its token


def test_the_browser_itself_refuses_markup_and_foreign_scripts(chat, tab):
    page = opened(tab, chat)
    with pytest.raises(Exception, match="TrustedHTML"):
        page.evaluate("() => { document.body.innerHTML = '<b>x</b>' }")
    headers = httpx.get(f"{chat}/web/").headers
    assert headers["content-security-policy"].startswith("default-src 'self';")
    assert "unsafe" not in headers["content-security-policy"]
    static = Path(play.__file__).parents[1] / "openenv" / "web" / "static"
    for file in static.iterdir():  # it works without a network: nothing is loaded from elsewhere
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(
            r"https?://|innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(|style=", text
        ), file


def test_a_lost_connection_is_taken_up_again(chat, tab):
    page = opened(tab, chat)
    page.keyboard.press("n")
    page.expect(page.locator("#text")).to_be_focused()
    typed(page, "hello")
    typed(page, "hi")
    page.keyboard.press("Escape")
    with page.expect_websocket() as again:
        page.keyboard.press("r")
    assert "session_id=" in again.value.url
    page.expect(page.locator("#status")).to_have_text("connected")
    page.keyboard.press("i")
    typed(page, "still there?")
    page.expect(page.locator(".message")).to_have_count(3)
    page.reload()  # the page itself is new
    page.expect(page.locator(".message")).to_have_count(3)
    page.expect(page.locator(".message.policy")).to_have_count(1)
    page.keyboard.press("t")
    page.expect(page.locator(".flow .tok.s")).to_have_count(2)
    page.keyboard.press("i")
    typed(page, "yes")
    assert sampled_text(page) == "hiyes"


def test_a_session_that_is_gone_is_said_and_a_new_one_begun(chat, tab):
    page = opened(tab, chat)
    page.evaluate("() => sessionStorage.setItem('torchrl_chat.session', 'f'.repeat(32))")
    page.reload()
    page.expect(page.locator("#error")).to_contain_text("Unknown session_id")
    page.expect(page.locator("#status")).to_have_text("connected")
    page.keyboard.press("n")
    page.expect(page.locator("#text")).to_be_focused()
    typed(page, "hello")
    page.expect(page.locator(".message")).to_have_count(1)


def test_a_server_with_a_token(tab):
    with live(chat_app(token="s3cret! ü")) as url:
        assert httpx.get(f"{url}/web/config").status_code == 401
        assert httpx.get(f"{url}/web/ledger?session_id=x").status_code == 401
        page = tab(f"{url}/web/")
        for given in ("wrong", "s3cret! ü"):
            page.expect(page.locator("dialog")).to_contain_text("Authorization")
            page.locator("dialog input").fill(given)
            page.keyboard.press("Enter")
        page.expect(page.locator("#status")).to_have_text("connected")
        page.keyboard.press("n")
        page.expect(page.locator("#text")).to_be_focused()
        typed(page, "hello")
        page.expect(page.locator(".message")).to_have_count(1)
        assert "s3cret" not in page.url


class Counting:
    """No chat at all: an environment of OpenEnv's interface with an action of its own."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    class Add(Action):
        amount: int

    class Sum(Observation):
        total: int

    def __init__(self):
        self.state = State()

    def reset(self, seed=None, episode_id=None):
        self.state = State(episode_id="e", step_count=0)
        self.total = 0
        return self.Sum(total=0)

    def step(self, action):
        self.total += action.amount
        self.state.step_count += 1
        return self.Sum(total=self.total, reward=float(action.amount), done=self.total > 5)


def test_an_environment_that_is_no_chat(tab):
    app = create_app(Counting, Counting.Add, Counting.Sum, "counting", state_cls=State, extra_routes=web_routes())
    with live(app) as url:
        page = opened(tab, url)
        page.expect(page.locator("#role")).to_have_value("json")
        assert json.loads(page.locator("#text").input_value()) == {"amount": None}
        page.keyboard.press("n")
        page.expect(page.locator("#text")).to_be_focused()
        page.locator("#text").fill('{"amount": 7}')
        page.keyboard.press("Enter")
        page.expect(page.locator("#reward")).to_have_text("7")
        page.expect(page.locator("#stop-reason")).to_have_text("done")
        page.expect(page.locator(".message").last).to_contain_text('"total": 7')


def test_the_model_answers_with_its_log_probs(tab):
    arguments = arguments_of(play, ["--env", "digits", "--model", "tiny", "--max-new-tokens", "4"])
    with live(play.make_app(arguments)) as url:
        page = opened(tab, url)
        page.keyboard.press("n")
        page.expect(page.locator("#answer")).to_be_visible()
        page.keyboard.press("Escape")
        page.keyboard.press("m")
        page.expect(page.locator("#stop-reason")).not_to_have_text("running")
        page.expect(page.locator("#answer")).to_be_hidden()
        page.keyboard.press("t")
        assert 1 <= page.locator(".flow .tok.s[class*=' l']").count() <= 4
        page.locator(".flow .tok.s").first.hover()
        page.expect(page.locator(".inspect")).to_have_text(re.compile(r"sampled · log-prob -\d"))


# ---------------------------------------------------------------------- how it looks
LUMINANCE = """(selector) => {
  const light = (text) => {
    const context = document.createElement("canvas").getContext("2d");
    context.fillStyle = text;
    context.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].map((v) => v / 255)
      .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const element = document.querySelector(selector);
  const front = light(getComputedStyle(element).color);
  let behind = element;
  const clear = (one) => getComputedStyle(one).backgroundColor === "rgba(0, 0, 0, 0)";
  while (behind !== document.documentElement && clear(behind)) behind = behind.parentElement;
  const back = light(getComputedStyle(behind).backgroundColor);
  return (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
}"""


def test_light_and_dark(chat, tab):
    grounds = {}
    for scheme in ("light", "dark"):
        page = opened(tab, chat, color_scheme=scheme)
        ground = "() => getComputedStyle(document.documentElement).backgroundColor"
        grounds[scheme] = page.evaluate(ground)
        page.keyboard.press("n")
        page.expect(page.locator("#text")).to_be_focused()
        typed(page, "hello")
        typed(page, "hi")
        for selector in (
            ".message header",
            ".message.policy header",
            ".body p",
            "#about",
            ".main",
            ".status",
            "dt",
        ):
            assert page.evaluate(LUMINANCE, selector) >= 4.5, (scheme, selector)  # WCAG 2.2, 1.4.3
        page.keyboard.press("Escape")
        page.keyboard.press("d")
        turned = page.evaluate(ground)
        page.reload()
        assert page.evaluate(ground) == turned != grounds[scheme]  # it is remembered
    assert grounds["light"] != grounds["dark"]


def test_help_and_labels(chat, tab):
    page = opened(tab, chat)
    page.keyboard.press("?")
    page.expect(page.get_by_role("dialog", name="Keyboard shortcuts")).to_contain_text("start an episode")
    page.keyboard.press("Escape")
    page.expect(page.locator("dialog")).to_have_count(0)
    for path in ("", "rollouts"):
        page.goto(f"{chat}/web/{path}")
        nameless = page.evaluate(
            """() => [...document.querySelectorAll("input, select, textarea, button")]
              .filter((one) => !one.labels?.length && !one.ariaLabel && !one.textContent.trim()).map((one) => one.id)"""
        )
        assert nameless == []


def overflow(page):
    """By how many pixels the page is wider than the screen."""
    return page.evaluate("() => document.documentElement.scrollWidth - window.innerWidth")


def test_on_a_phone(chat, tab, rollouts):
    phone = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
    page = opened(tab, chat, **phone)
    page.locator("#begin button").tap()
    for text in ("long" * 60, "and an answer"):
        page.locator("#text").fill(text)
        page.locator("#compose .main").tap()
        page.expect(page.locator("#text")).to_have_value("")
    page.expect(page.locator("#compose")).to_be_in_viewport()
    page.locator("#as-tokens").tap()
    page.locator("#observation summary").tap()
    assert overflow(page) <= 0
    page.goto(f"{chat}/web/rollouts")
    page.locator("#file").set_input_files(rollouts)
    page.expect(page.locator("#count")).to_contain_text("60 of 60")
    page.locator(".item").first.tap()
    page.expect(page.locator(".message").first).to_be_visible()
    assert overflow(page) <= 0
    page.locator("#compare").tap()
    page.expect(page.locator(".member")).to_have_count(4)
    assert overflow(page) <= 0  # the columns scroll by themselves
    page.locator("#back").tap()
    page.expect(page.locator("#list")).to_be_visible()


# ---------------------------------------------------------------------- rollout files
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


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory):
    path = tmp_path_factory.mktemp("rollouts") / "small.jsonl"
    path.write_bytes(b"".join(as_line(episode(number)) for number in range(60)))
    return path


def browsing(tab, url, path):
    page = tab(f"{url}/web/rollouts")
    page.locator("#file").set_input_files(path)
    page.expect(page.locator("#status")).to_contain_text("read in")
    return page


def rewards(page):
    return [float(text) for text in page.locator(".item .num").all_text_contents()]


def test_ten_thousand_episodes_open_in_two_seconds(chat, tab, tmp_path):
    path = tmp_path / "large.jsonl"
    kinds = [as_line(episode(number, tokens=400)) for number in range(500)]
    with path.open("wb") as file:
        for start in range(20):
            file.writelines(line.replace(b'"id":"', b'"id":"%d-' % start, 1) for line in kinds)
    page = tab(f"{chat}/web/rollouts")
    begun = time.perf_counter()
    page.locator("#file").set_input_files(path)
    page.expect(page.locator("#count")).to_contain_text("10,000 of 10,000 episodes")
    page.expect(page.locator(".item").first).to_be_visible()
    whole = time.perf_counter() - begun
    seconds = float(page.locator("#status").get_attribute("data-seconds"))
    print(f"\n10,000 episodes, {path.stat().st_size / 2**20:.0f} MiB: {seconds:.2f} s (from here {whole:.2f} s)")
    assert seconds < 2
    assert page.locator(".item").count() < 60  # only what is in sight
    page.locator("#list").focus()
    page.keyboard.press("End")
    page.expect(page.locator(".item[aria-selected=true]")).to_have_attribute("aria-posinset", "10000")
    page.expect(page.locator("h1")).to_have_text("Episode 10,000 of 10,000")
    page.locator("#search").fill("19-124.3")
    page.expect(page.locator("#count")).to_contain_text("1 of 10,000")
    page.locator("#search").press("Enter")
    page.keyboard.press("ArrowDown")
    page.expect(page.locator(".facts-list dd").last).to_have_text("19-124.3")


def test_filter_sort_and_search(chat, tab, rollouts):
    page = browsing(tab, chat, rollouts)
    wanted = list(read_rollouts(rollouts))
    expect, count = page.expect, page.locator("#count")
    page.locator("#sort").select_option("-reward")
    assert rewards(page)[:5] == pytest.approx(sorted((one["reward"] for one in wanted), reverse=True)[:5], rel=1e-3)
    page.locator("#sort").select_option("sampled")
    expect(page.locator(".item .more").first).to_contain_text(
        f"{min(one['sampled_tokens'] for one in wanted)} tokens"
    )
    page.locator("#sort").select_option("-step")
    expect(page.locator(".item .more").first).to_contain_text(
        f"step {max(one['metadata']['step'] for one in wanted)}"
    )
    page.locator("#success").select_option("true")
    right = [one for one in wanted if one["success"]]
    expect(count).to_have_text(re.compile(rf"^{len(right)} of 60 episodes · 100.0 % right"))
    page.locator("#stop").select_option("max_tokens")
    both = [one for one in right if one["stop"] == "max_tokens"]
    expect(count).to_have_text(re.compile(rf"^{len(both)} of 60"))
    page.locator("#success").select_option("")
    page.locator("#stop").select_option("")
    page.keyboard.press("Escape")
    page.keyboard.press("/")
    page.keyboard.type("QUESTION 3:")
    expect(count).to_have_text(re.compile("^4 of 60"))
    page.keyboard.press("Enter")
    expect(page.locator("#list")).to_be_focused()


def test_a_group_side_by_side_by_keyboard(chat, tab, rollouts):
    page = browsing(tab, chat, rollouts)
    wanted = list(read_rollouts(rollouts))
    page.keyboard.press("j")
    page.expect(page.locator("h1")).to_have_text("Episode 1 of 60")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("j")
    page.keyboard.press("k")
    page.expect(page.locator("h1")).to_have_text("Episode 2 of 60")
    page.expect(page.locator(".message.policy .body")).to_have_text(wanted[1]["messages"][1]["content"].strip())
    page.keyboard.press("t")
    page.expect(page.locator(".flow .tok.s").first).to_be_visible()
    sequence = wanted[1]["sequences"][0]
    start, end = sequence["sampled"][0]
    assert sampled_text(page) == "".join(sequence["pieces"][start:end])
    page.locator(f".flow [data-at='{start + 2}']").click()
    value = sequence["log_probs"][2]
    page.expect(page.locator(".inspect")).to_have_text(
        re.compile(rf"id {sequence['ids'][start + 2]} .*{value:.3f}")
    )
    page.keyboard.press("g")
    page.expect(page.locator(".member")).to_have_count(4)
    for place, member in enumerate(wanted[:4]):
        text = page.locator(".member header").nth(place).inner_text()
        assert member["stop"] in text
        assert f"{member['sampled_tokens']} sampled" in text
        [[start, end]] = member["sequences"][0]["sampled"]
        drawn = page.locator(".member .flow").nth(place).locator(".tok")
        assert "".join(drawn.all_text_contents()) == "".join(member["sequences"][0]["pieces"][start:end])
    page.expect(page.locator(".note")).to_have_text("60 tokens that all of them begin with are left out.")
    page.keyboard.press("t")
    page.keyboard.press("t")
    page.expect(page.locator(".shared")).to_contain_text("question 0")
    page.expect(page.locator(".member .message")).to_have_count(4)  # the question is shown once
    page.locator(".member header button").nth(3).click()
    page.expect(page.locator("h1")).to_have_text("Episode 4 of 60")


ODD = [
    {"a": {"sequences": [1], "metadata": {"b": 1}}},
    HOSTILE,
    ',"sequences":[',
    '","metadata":{',
    "\ud83d half a pair, \u2028, é, 漢字, \x00",
    [{"type": "text", "text": "part"}, {"type": "image", "url": "x"}],
    None,
    {},
    3.5,
]


def odd_lines(seed, count=150):
    """Lines as they come: odd contents, odd shapes, other writers' orders of keys, broken ones."""
    rng = random.Random(seed)
    for number in range(count):
        fields = {key: rng.choice(ODD) for key in ("query", "reference", "error") if rng.random() < 0.5}
        fields["messages"] = [
            {"role": "user", "content": rng.choice(ODD), "extra": rng.choice(ODD)} for _ in range(rng.randrange(4))
        ]
        fields["metadata"] = rng.choice([{"step": number}, {"metadata": {"sequences": [1]}}, {}])
        whole = episode(number, tokens=rng.choice([2, 10]), rng=rng, **fields)
        if rng.random() < 0.2:
            del whole[rng.choice(["sequences", "metadata", "messages", "version"])]
        keys = list(whole)
        if rng.random() < 0.3:
            rng.shuffle(keys)
        line = as_line({key: whole[key] for key in keys})
        if rng.random() < 0.15:
            line = rng.choice(
                [line[: rng.randrange(1, len(line) - 1)] + b"\n", b"[1]\n", b"\n", b"nonsense\n", b"7\n"]
            )
        yield line
    yield line[: len(line) // 2]  # the writer was killed


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("seed", range(2))
def test_the_page_reads_what_python_reads(chat, tab, tmp_path, seed):
    path = tmp_path / "odd.jsonl"
    path.write_bytes(b"".join(odd_lines(seed)))
    page = browsing(tab, chat, path)
    found = page.evaluate(
        """async (text) => {
          const { readIndex, readEpisode } = await import("/web/static/episodes.js");
          const bytes = Uint8Array.from(atob(text), (one) => one.charCodeAt(0));
          const blob = new Blob([bytes]);
          const { entries, problems } = await readIndex(blob);
          const whole = await Promise.all(entries.map((entry) => readEpisode(blob, entry)));
          return { entries, problems, whole: whole.map((one) => one.id) };
        }""",
        base64.b64encode(path.read_bytes()).decode(),
    )
    wanted = list(read_rollouts(path))
    lines = sum(bool(line.strip()) for line in path.read_bytes().split(b"\n"))
    assert len(found["problems"]) == lines - len(wanted)
    assert found["whole"] == [one["id"] for one in wanted]
    for key in ("id", "reward", "success", "stop", "row", "place"):
        assert [entry[key] for entry in found["entries"]] == [one[key] for one in wanted], key
    assert [entry["step"] for entry in found["entries"]] == [one.get("metadata", {}).get("step") for one in wanted]
    for _ in range(12):  # each of them can be shown
        page.keyboard.press("j")
        page.expect(page.locator(".tools h1")).to_be_visible()
    assert page.locator("#detail img, #detail script, #detail p b").count() == 0
    assert page.title().startswith("odd.jsonl")


def test_files_of_the_server(tab, rollouts, tmp_path):
    folder = tmp_path / "runs"
    (folder / "one").mkdir(parents=True)
    shutil.copy(rollouts, folder / "one" / "a #1.jsonl")
    (folder / "notes.txt").write_text("private")
    (tmp_path / "secret.jsonl").write_text("{}")
    (folder / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    with viewer(folder) as url, httpx.Client(base_url=url) as http:
        assert [file["name"] for file in http.get("/web/files").json()["files"]] == ["one/a #1.jsonl"]
        for name in (
            "notes.txt",
            "../secret.jsonl",
            "%2e%2e/secret.jsonl",
            "link.jsonl",
            "none.jsonl",
            "one",
            "%00.jsonl",
        ):
            assert http.get(f"/web/files/{name}").status_code == 404, name
        assert http.get("/web/files", headers={"origin": "https://example.org"}).status_code == 403
        assert http.get("/web/ledger").status_code == 404  # no environment here
        assert http.get("/web/static/nothing.js").status_code == 404
        page = tab(url)  # the only file is opened at once
        page.expect(page.locator("#count")).to_contain_text("60 of 60")
        page.expect(page.locator("#to-play")).to_be_hidden()


def test_one_file_only(rollouts, tmp_path):
    shutil.copy(rollouts, tmp_path / "mine.jsonl")
    shutil.copy(rollouts, tmp_path / "other.jsonl")
    with viewer(tmp_path / "mine.jsonl") as url:
        assert [file["name"] for file in httpx.get(f"{url}/web/files").json()["files"]] == ["mine.jsonl"]
        assert httpx.get(f"{url}/web/files/mine.jsonl").status_code == 200
        assert httpx.get(f"{url}/web/files/other.jsonl").status_code == 404
    with pytest.raises(ValueError, match=r"no rollout file or folder .*nowhere"):
        viewer_app(tmp_path / "nowhere")


# ---------------------------------------------------------------------- routes and commands
def arguments_of(command, arguments):
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    command.add_parser(commands)
    return parser.parse_args([command.__name__.rpartition(".")[2], *arguments])


def test_the_ledger_route_tells_what_the_rollout_file_tells(chat):
    with httpx.Client(base_url=chat) as http:
        session = http.post("/reset", json={"keep": True}).json()["metadata"]["session_id"]
        assert http.get(f"/web/ledger?session_id={session}").json()["sequences"][0]["ids"] == []
        for action in ({"messages": [{"role": "user", "content": "Hi"}]}, {"text": "Yo"}):
            reply = http.post("/step", json={"session_id": session, "action": action}).json()
        [sequence] = http.get(f"/web/ledger?session_id={session}").json()["sequences"]
        assert sequence["ids"] == reply["observation"]["tokens"]
        [[start, end]] = sequence["sampled"]
        assert "".join(sequence["pieces"][start:end]) == "Yo"
        assert http.get("/web/ledger?session_id=x").status_code == 404
        assert http.get("/web/ledger").status_code == 404
        assert http.post(f"/web/answer?session_id={session}").json() == {
            "detail": "this server has no model that answers."
        }
        assert http.post("/close", json={"session_id": session}).status_code == 200


def test_a_model_that_fails_is_said():
    def failing(prompt):
        raise RuntimeError("out of memory")

    with live(chat_app(policy=failing)) as url, httpx.Client(base_url=url) as http:
        session = http.post("/reset", json={"keep": True}).json()["metadata"]["session_id"]
        assert http.post(f"/web/answer?session_id={session}").status_code == 409  # nobody has asked anything
        action = {"messages": [{"role": "user", "content": "Hi"}]}
        http.post("/step", json={"session_id": session, "action": action})
        answer = http.post(f"/web/answer?session_id={session}")
        assert (answer.status_code, answer.json()["detail"]) == (
            500,
            "the model has no answer: RuntimeError: out of memory",
        )


def test_files_are_sent_once(chat):
    first = httpx.get(f"{chat}/web/static/app.css")
    assert first.headers["content-type"] == "text/css; charset=utf-8"
    again = httpx.get(f"{chat}/web/static/app.css", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert httpx.get(f"{chat}/web", follow_redirects=True).url.path == "/web/"


def test_view_serves_this_machine_until_it_is_interrupted(rollouts):
    code = (
        "import argparse\nfrom torchrl_chat.cli import view\nparser = argparse.ArgumentParser()\n"
        "view.add_parser(parser.add_subparsers())\narguments = parser.parse_args()\n"
        "raise SystemExit(arguments.run(arguments))"
    )
    command = [sys.executable, "-c", code, "view", str(rollouts), "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        address = process.stdout.readline().split()[0]
        assert httpx.get(address).status_code == 200
        elsewhere = httpx.get(address, headers={"host": "evil.example"})  # a name that leads here (DNS rebinding)
        assert elsewhere.status_code == 400
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--env", "gsm8k", "--data", "NOWHERE"], "NOWHERE"),
        (["--env", "math", "--data", "NOWHERE"], "NOWHERE"),
        (["--env", "reasoning-gym:no_such_task"], "no_such_task"),
        (["--env", "countdown", "--chat-template", "RAISES"], "never"),
        (["--chat-template", "RAISES", "--system-prompt", "x"], "never"),
    ],
)
def test_a_dataset_or_a_template_that_is_wrong_is_said_at_the_start(tmp_path, arguments, said):
    template = tmp_path / "never.jinja"
    template.write_text("{{ raise_exception('never') }}")
    places = {"NOWHERE": str(tmp_path / "nowhere"), "RAISES": str(template)}
    with pytest.raises(Exception, match=places.get(said, said)):
        play.make_app(arguments_of(play, [places.get(a, a) for a in arguments]))


def test_play_says_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="there is no environment 'chess'"):
        play.make_app(arguments_of(play, ["--env", "chess"]))
    with pytest.raises(ValueError, match="no rollout file or folder"):
        play.make_app(arguments_of(play, ["--rollouts", str(tmp_path / "none")]))
    with pytest.raises(ValueError, match="no rollout file or folder"):
        view.run(arguments_of(view, [str(tmp_path / "none")]))
