"""The page of ``torchrl-chat eval compare`` in a real browser: light and dark, on a phone, by keyboard, without a network."""

from __future__ import annotations

import itertools

import pytest
from eval_runs import episode, write_run

from torchrl_chat.cli.main import main

pytestmark = pytest.mark.services
LONG = "an_answer_without_a_space_" * 40

# The least contrast of texts with what is behind them (WCAG 2, 1.4.3); backgrounds are those of the nearest element that has one.
CONTRAST = """() => {
  const channel = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number); return 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b); };
  const behind = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor; if (!/, 0\\)|transparent/.test(c)) return c; } return "rgb(255, 255, 255)"; };
  const texts = [...document.querySelectorAll("body *")].filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()));
  const ratio = e => { const s = getComputedStyle(e), a = light(e instanceof SVGElement ? s.fill : s.color), b = light(behind(e)); return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); };
  return Math.min(...texts.map(ratio));
}"""


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    """The report of four checkpoints on two tasks: curves, slices, examples, questions left out."""
    folder = tmp_path_factory.mktemp("runs")
    for step in (10, 20, 30, 40):
        for task, count in (("algebra", 24), ("code", 9)):
            rows = [
                episode(
                    i,
                    0,
                    i % 8 < step // 6,
                    query=f"{LONG} {i}",
                    answer=f"{LONG} <b>{step}</b>",
                    columns={"level": i % 2},
                )
                for i in range(count - step // 20)
            ]
            write_run(folder / f"step-{step:06d}" / task, rows, dataset=task, model=f"runs/a/step-{step:06d}")
    path = folder / "report.html"
    assert main(["eval", "compare", str(folder), "--by", "level", "--html", str(path)]) == 0
    return path


@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 375)])
def test_a_page_for_every_screen(tab, page_file, scheme, width):
    page = tab(color_scheme=scheme, viewport={"width": width, "height": 800})
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(page_file.as_uri())
    page.eval_on_selector_all("details", "all => all.forEach(one => one.open = true)")
    assert asked == [page_file.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # tables scroll by themselves
    assert page.evaluate(CONTRAST) >= 4.5
    bright = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert bright == (scheme == "light")
    assert page.locator("svg.curve polyline").count() == 2
    assert page.locator("article").count() > 4
    assert page.locator("b").count() == 0


def test_by_keyboard_and_by_ear(tab, page_file):
    page = tab(page_file.as_uri())
    names = page.eval_on_selector_all(
        "[role=region], section",
        "all => all.map(one => one.getAttribute('aria-label') ?? one.getAttribute('aria-labelledby'))",
    )
    assert all(names)
    assert len(set(names)) == len(names)
    levels = page.eval_on_selector_all("h1, h2, h3, h4", "all => all.map(one => +one.tagName[1])")
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    page.keyboard.press("Tab")
    page.expect(page.locator("nav a").first).to_be_focused()
    page.keyboard.press("Enter")
    assert page.url.endswith("#c0")
    page.locator("summary").first.focus()
    page.keyboard.press("Enter")
    page.expect(page.locator("details[open]")).to_have_count(1)
    page.expect(page.get_by_role("img")).to_have_accessible_name(
        "Accuracy of algebra, code over training steps 10 to 40; the numbers are in the table of runs."
    )
