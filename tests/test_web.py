"""The page of a server in a real browser: played by keyboard, hostile texts, lost connections, phones."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
import pytest
from web_pages import HOSTILE, arguments_of, chat_app, live, sampled_text

from torchrl_chat.cli import play, tiny
from torchrl_chat.openenv.gallery import factory_of
from torchrl_chat.openenv.models import Action, Observation, State
from torchrl_chat.openenv.server import create_app
from torchrl_chat.openenv.web import web_routes

pytestmark = pytest.mark.services


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
    """Type and send; wait until the server has answered."""
    page.keyboard.type(text)
    page.keyboard.press("Enter")
    page.expect(page.locator("#text")).to_have_value("")
    page.expect(page.locator("body")).not_to_have_attribute("aria-busy", "true")


def fact(page, name):
    return page.locator(f"#facts dt:text-is('{name}') + dd")


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


def test_nothing_that_is_typed_is_lost(chat, tab):
    page = opened(tab, chat)
    page.keyboard.press("n")
    for text in ("what?", "this.", "and?"):  # at once, while the server still answers
        page.keyboard.type(text)
        page.keyboard.press("Enter")
    page.expect(page.locator(".message .body")).to_have_text(["what?", "this.", "and?"])
    page.expect(page.locator(".message.policy .body")).to_have_text(["this."])
    page.keyboard.type("tnot")
    page.expect(page.locator("#text")).to_have_value("tnot")  # in the field these keys are letters


def test_send_follows_whose_turn_it_is(chat, tab):
    page = opened(tab, chat)
    send = page.locator("#send")
    page.expect(send).to_be_disabled()
    page.keyboard.press("n")
    page.expect(send).to_be_enabled()
    page.expect(send).to_have_text("Send")
    typed(page, "what?")
    page.expect(send).to_have_text("Answer")
    page.keyboard.press("Alt+5")
    typed(page, '{"text": "this."}')
    page.expect(page.locator("#role")).to_have_value("user")  # one JSON action, then the turns again
    page.expect(send).to_have_text("Send")


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
        page.expect(page.locator("body")).not_to_have_attribute("aria-busy", "true")
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
        page.expect(page.locator("body")).not_to_have_attribute("aria-busy", "true")
    page.expect(page.locator("#compose")).to_be_in_viewport()
    page.locator("#as-tokens").tap()
    page.locator("#observation summary").tap()
    assert overflow(page) <= 0
    page.goto(f"{chat}/web/rollouts")
    page.locator("#local").set_input_files(rollouts)
    page.expect(page.locator("#count")).to_contain_text("60 of 60")
    page.locator(".item").first.tap()
    page.expect(page.locator(".message").first).to_be_visible()
    assert overflow(page) <= 0
    page.locator("#compare").tap()
    page.expect(page.locator(".member")).to_have_count(4)
    assert overflow(page) <= 0  # the columns scroll by themselves
    page.locator("#back").tap()
    page.expect(page.locator("#list")).to_be_visible()
