"""Reading in the viewer, in a real browser: tokens, Markdown, trees, two runs side by side, curves; for everybody (axe-core)."""

from __future__ import annotations

import asyncio
import json
import math
import random
import re
import string
from concurrent.futures import ThreadPoolExecutor

import pytest
from agents import ask, calling, result, session_of, system, templates_of, user
from axe_playwright_python.sync_playwright import Axe
from web_pages import HOSTILE, browsing, episode, viewer, write_episodes

from torchrl_chat.gateway import episodes
from torchrl_chat.rollouts import as_line, read_rollouts, write_rollouts

pytestmark = pytest.mark.services


BOUNDS = {  # between the shades, of how far a number is from the light end
    "log_probs": (lambda value: -value, [0.05, 0.3, 0.8, 1.8, 3.5]),
    "entropy": (lambda value: value, [0.05, 0.3, 0.8, 1.5, 2.5]),
    "ratio": (lambda value: abs(math.log(value)), [0.01, 0.05, 0.1, 0.25, math.log(2)]),
    "advantage": (abs, [0.01, 0.1, 0.4, 1, 2]),
}


def shades(sequence, stream):
    """The classes of a sequence's tokens that are coloured by a stream."""
    depth, bounds = BOUNDS[stream]
    numbers, names = iter(sequence.get(stream) or []), []
    sampled = {place for start, end in sequence["sampled"] for place in range(start, end)}
    for place in range(len(sequence["ids"])):
        value = next(numbers, None) if place in sampled else None
        letter = "n" if stream == "advantage" and value is not None and value < 0 else "l"
        level = "" if value is None else f" {letter}{sum(depth(value) > bound for bound in bounds)}"
        names.append("tok" + " s" * (place in sampled) + level)
    return names


def test_tokens_are_coloured_by_what_the_trainer_says(chat, tab, tmp_path):
    """Of every sequence of an episode; of one that was not trained the sampler's numbers alone; a file without has no choice."""
    rng = random.Random(5)

    def told(count, trained):
        one = episode(0, tokens=12)["sequences"][0] | {"sampled": [[2, 3], [6, 6 + count - 1]]}
        one["log_probs"] = [-rng.expovariate(1) for _ in range(count)]
        if trained:
            one |= {"ratio": [math.exp(rng.gauss(0, 0.3)) for _ in range(count)]}
            one |= {"entropy": [None, *(rng.expovariate(1) for _ in range(count - 1))]}
            one |= {
                "advantage": [rng.gauss(0, 1) for _ in range(count)],
                "weight_versions": [[2, 7], [7, None], [9, 9]],
            }
        return one

    both = episode(0, sequences=[told(3, True), told(5, False), told(6, True)])
    path = tmp_path / "streams.jsonl"
    path.write_bytes(as_line(both) + as_line(episode(1, sequences=[told(4, True)])) + as_line(episode(9)))
    page = browsing(tab, chat, path)
    page.keyboard.press("j")
    page.keyboard.press("t")
    page.expect(page.locator(".flow .tok.s").first).to_be_visible()
    read, choice = list(read_rollouts(path)), page.get_by_label("Colour tokens by")
    assert choice.locator("option").all_text_contents() == [
        "log-prob", "entropy", "ratio of trainer to sampler", "advantage", "weights that sampled it"
    ]  # fmt: skip

    def drawn():
        return [
            flow.locator(".tok").evaluate_all("all => all.map((one) => one.className)")
            for flow in page.locator(".flow").all()
        ]

    for stream in ("log_probs", "entropy", "advantage", "ratio"):
        choice.select_option(stream)
        assert drawn() == [shades(sequence, stream) for sequence in read[0]["sequences"]]
    choice.select_option("weight_versions")
    last = [
        name.removeprefix("tok").strip() for name in drawn()[-1]
    ]  # six tokens, three of weights 7, one not known, two of 9
    assert [last[place] for place in (2, 6, 7, 8, 9, 10)] == ["s l0", "s l0", "s", "s", "s l5", "s l5"]
    page.wait_for_url("**colour=weight_versions*")
    choice.select_option("ratio")
    page.locator(".flow").last.locator("[data-at='2']").click()
    value = read[0]["sequences"][2]["ratio"][0]
    page.expect(page.locator(".inspect").last).to_contain_text(f"ratio {float(f'{value:.5g}')}"[:11])
    page.locator("#list").focus()
    page.keyboard.press("j")  # what was chosen stays
    page.expect(page.locator("h1")).to_have_text("Episode 2 of 3")
    assert drawn() == [shades(read[1]["sequences"][0], "ratio")]
    page.keyboard.press("j")
    page.expect(page.locator("h1")).to_have_text("Episode 3 of 3")
    page.expect(choice).to_have_count(0)
    assert drawn() == [shades(read[2]["sequences"][0], "log_probs")]


# ---------------------------------------------------------------------- Markdown
TEXT = """### Title
Some **bold**, *slanted*, `a < b` and ~~gone~~ words.
1. first
2. second
   - inner

| a | b |
|---|---|
| 1 | **2** |

> quoted [link](https://example.org/x) and [no](javascript:alert(1)) ![pic](https://example.org/p.png)

```python
def f(x):  # a comment
    return "<b>" + str(x)
```
\\(x^2\\) and 2 * 3 * 4 and snake_case_name
"""


def test_markdown_and_code_on_request(tab, tmp_path):
    spoken = [
        {"role": "user", "content": TEXT},
        {
            "role": "assistant",
            "content": HOSTILE,
            "tool_calls": [{"function": {"name": "python", "arguments": {"code": "x = 1\nprint(x)"}}}],
        },
    ]
    path = tmp_path / "one.jsonl"
    path.write_bytes(as_line(episode(0, messages=spoken)))
    with viewer(path) as url:
        page = tab(f"{url}/web/rollouts?file=one.jsonl&episode=0.0")
        raw = page.locator(".message .body").first
        page.expect(raw.locator("p")).to_have_text(TEXT.strip())
        page.keyboard.press("m")
        body = page.locator(".rendered").first
        page.expect(body.get_by_role("heading", level=2)).to_have_text("Title")
        assert body.locator("strong").all_inner_texts() == ["bold", "2"]
        assert (body.locator("em").inner_text(), body.locator("del").inner_text()) == ("slanted", "gone")
        assert body.locator("code:not(pre code)").all_inner_texts() == ["a < b", "\\(x^2\\)"]
        assert body.locator("ol > li").count() == 2
        assert body.locator("ol > li > ul > li").inner_text() == "inner"
        assert body.locator("td").all_inner_texts() == ["1", "2"]
        links = body.locator("blockquote a")
        assert links.evaluate_all("all => all.map((one) => one.href)") == [
            "https://example.org/x",
            "https://example.org/p.png",
        ]
        page.expect(body.locator("blockquote")).to_contain_text("[no](javascript:alert(1))")
        code = body.locator("figure.code")
        assert code.locator("figcaption").inner_text() == "python"
        assert code.locator(".code-c").inner_text() == "# a comment"
        assert code.locator(".code-s").inner_text() == '"<b>"'
        page.expect(body).to_contain_text("2 * 3 * 4 and snake_case_name")
        assert page.locator(".rendered").nth(1).inner_text() == HOSTILE
        assert page.locator(".call figure code").inner_text() == "x = 1\nprint(x)"
        assert page.locator("#detail img, #detail script, .rendered b, #detail iframe").count() == 0
        page.wait_for_url("**text=rendered")
        page.keyboard.press("m")
        page.expect(page.locator(".rendered")).to_have_count(0)
        page.expect(raw.locator("p")).to_have_text(TEXT.strip())


def test_no_text_loses_words_or_takes_long(tab, chat):
    """Random texts of Markdown's own signs: nothing raises, no letter is lost. And a sign that is never closed costs no more a sign."""
    rng = random.Random(11)
    signs = [
        "*",
        "**",
        "_",
        "`",
        "```",
        "~~~",
        "[",
        "](",
        ")",
        "![",
        "<b>",
        "\n",
        "\n\n",
        "  ",
        "- ",
        "1. ",
        "> ",
        "#",
        "|",
        "|-|",
        "\\",
        "$$",
        "\\(",
        "---",
    ]
    texts = []
    for _ in range(400):
        parts = [
            rng.choice(signs) if rng.random() < 0.6 else "".join(rng.choices(string.ascii_letters, k=3))
            for _ in range(rng.randrange(60))
        ]
        texts.append("".join(parts))
    deep = [
        "> " * 3000,
        "- " * 3000,
        "[" * 20_000,
        "*a " * 20_000,
        "**a" * 9000,
        "`" * 9000,
        "![a](" * 9000,
        "|\n|-|\n" * 9000,
        "\\(" * 9000,
        "<" * 20_000,
    ]
    page = tab(f"{chat}/web/rollouts")
    found = page.evaluate(
        """async (texts) => {
          const { markdown } = await import("/web/static/markdown.js");
          return texts.map((text) => {
            const box = document.createElement("div");
            box.append(...markdown(text));
            return { text: box.textContent, tags: [...new Set([...box.querySelectorAll("*")].map((one) => one.tagName))] };
          });
        }""",
        texts + deep,
    )

    def letters(text):
        return "".join(sign for sign in text if sign.isalpha())

    for text, got in zip(texts, found, strict=False):
        assert sorted(letters(got["text"])) == sorted(letters(text)), text
    tags = {tag for got in found for tag in got["tags"]}
    assert tags <= {
        "A", "BLOCKQUOTE", "CODE", "DEL", "DIV", "EM", "FIGCAPTION", "FIGURE", "HR", "LI", "OL", "P", "PRE", "SPAN", "STRONG",
        "TABLE", "TBODY", "TD", "TH", "THEAD", "TR", "UL",
    }  # fmt: skip


# ---------------------------------------------------------------------- trees
async def worked():
    """A session of an agent with two calls at once, a sub-agent with tools of its own, an edited past, and an answer that nobody got."""
    session = session_of(["plan", calling("a", "b"), "sub answer", "both done", "again", "short", "lost"])
    history = [system("Lead."), user("Do it.")]
    plan = (await ask(session, history)).choices[0].message
    history += [plan, user("Go on.")]
    called = (await ask(session, history)).choices[0].message
    await ask(session, [system("You are a helper."), user("Look for a.")], tools=())
    history += [called, *result(called, "1", "2")]
    done = (await ask(session, history)).choices[0].message
    await ask(session, [*history[:3], user("Go another way.")])
    await ask(session, [user("A summary of it all."), done, user("Now briefly.")])
    session.finish(1.0)
    return session


@pytest.fixture(scope="module")
def agents_file(tmp_path_factory):
    with ThreadPoolExecutor(1) as thread:  # the browser's loop runs in this one
        session = thread.submit(asyncio.run, worked()).result()
    path = tmp_path_factory.mktemp("agents") / "agents.jsonl"
    write_rollouts(path, episodes([session]), templates_of().plain.tokenizer, ids=["tree"])
    return path


def test_the_tree_of_an_agents_calls(tab, agents_file):
    [written] = read_rollouts(agents_file)
    assert [(call["parent"], call["kind"]) for call in written["calls"]] == [
        (None, "begins"), (0, "continues"), (None, "restarts"), (1, "continues"), (0, "forks"), (None, "restarts")
    ]  # fmt: skip
    assert [call.get("tools") for call in written["calls"]] == [["look"], None, [], None, None, ["look"]]
    with viewer(agents_file) as url:
        page = tab(f"{url}/web/rollouts?file=agents.jsonl&episode=tree")
        page.expect(page.locator(".note.above")).to_contain_text(
            f"the last of {len(written['sequences'])} token sequences"
        )
        page.keyboard.press("t")
        page.keyboard.press("t")
        page.wait_for_url("**view=tree*")  # a view that is left at once is no step that "back" would take
        tree = page.get_by_role("tree").first
        rows = tree.get_by_role("treeitem")
        levels = rows.evaluate_all(
            "all => all.map((one) => [one.querySelector('.label').textContent, one.ariaLevel])"
        )
        assert [text.split()[0] for text, _ in levels] == ["#1", "#5", "#2", "#4", "#3", "#6"]
        assert [level for _, level in levels] == ["1", "2", "1", "1", "1", "1"]
        assert "look(…), look(…)" in levels[2][0] or "look(…)" in levels[2][0]
        rows.first.focus()
        page.keyboard.press("ArrowDown")
        page.expect(page.locator(".call-said").first).to_contain_text("Go another way.")
        page.expect(page.locator(".call-said").first).to_contain_text("forks: ")
        page.keyboard.press("ArrowLeft")
        page.expect(rows.first).to_be_focused()
        page.keyboard.press("End")
        page.expect(page.locator(".call-said").first).to_contain_text("A summary of it all.")
        page.keyboard.press("ArrowUp")
        page.expect(page.locator(".call-said").first).to_contain_text("You are a helper.")
        page.keyboard.press("Enter")  # to its tokens
        call = written["calls"][2]
        page.wait_for_url(f"**view=tokens&sequence={call['sequence']}&token={call['span'][0]}")
        page.expect(page.locator(".flow").nth(call["sequence"]).locator(".at")).to_have_attribute(
            "data-at", str(call["span"][0])
        )
        page.go_back()
        page.expect(page.get_by_role("tree")).to_have_count(2)  # and where token sequences part


def test_where_sequences_part_is_found_from_their_ids(tab, chat):
    """Against a plain count of prefixes; of any file, the tree of calls or not."""
    rng = random.Random(3)
    cases = []
    for _ in range(60):
        sequences: list[list[int]] = [[rng.randrange(3) for _ in range(rng.randrange(1, 6))]]
        for _ in range(rng.randrange(5)):
            old = rng.choice(sequences)
            sequences.append(
                old[: rng.randrange(len(old) + 1)] + [rng.randrange(3) for _ in range(rng.randrange(1, 5))]
            )
        cases.append(
            [
                {"ids": ids, "sampled": [[at, at + 1] for at in range(len(ids)) if rng.random() < 0.4]}
                for ids in sequences
            ]
        )
    page = tab(f"{chat}/web/rollouts")
    found = page.evaluate(
        """async (cases) => {
          const { branches } = await import("/web/static/trees.js");
          const flat = (node) => [node, ...node.children.flatMap(flat)];
          return cases.map((sequences) => branches(sequences).flatMap(flat).map(({ start, end, numbers, sampled }) => ({ start, end, numbers, sampled })));
        }""",
        cases,
    )
    for sequences, nodes in zip(cases, found, strict=True):
        prefixes = {tuple(one["ids"][: length + 1]) for one in sequences for length in range(len(one["ids"]))}
        assert sum(node["end"] - node["start"] for node in nodes) == len(
            prefixes
        )  # each token of the trie in one node
        for number, one in enumerate(sequences):
            way = sorted((node for node in nodes if number in node["numbers"]), key=lambda node: node["start"])
            assert [node["start"] for node in way] == [0, *(node["end"] for node in way[:-1])]
            assert way[-1]["end"] == len(one["ids"])
        marked = {tuple(one["ids"][: at + 1]) for one in sequences for at, _ in one["sampled"]}
        assert sum(node["sampled"] for node in nodes) == len(marked)


# ---------------------------------------------------------------------- two runs
def test_two_runs_and_two_checkpoints_side_by_side(tab, tmp_path):
    rng = random.Random(4)
    written = {}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        rows = [episode(number, rng=rng, tokens=8) for number in range(40 if name == "one" else 32)]
        for row in rows:
            row["query"] = row["messages"][0]["content"] = (
                f"question {row['row'] % 5}?" if name == "one" else f"question {row['row'] + 2}?"
            )
        (tmp_path / name / "rollouts.jsonl").write_bytes(b"".join(map(as_line, rows)))
        (tmp_path / name / "metrics.jsonl").write_text(
            "".join(f'{{"step": {step}, "reward": {step}}}\n' for step in range(3))
        )
        written[name] = rows

    def mean(rows, question):
        values = [row["reward"] for row in rows if row["query"] == question]
        return sum(values) / len(values)

    with viewer(tmp_path) as url:
        page = tab(f"{url}/web/rollouts?file=one/rollouts.jsonl")
        page.expect(page.locator("#count")).to_contain_text("40 of 40")
        page.keyboard.press("w")
        page.expect(page.locator("#with")).to_be_focused()
        page.locator("#with").select_option("two/rollouts.jsonl")
        page.expect(page.locator("#count")).to_contain_text(
            re.compile("^3 questions in both .* not in both: 2 and 5")
        )
        shared = [f"question {number}?" for number in (2, 3, 4)]
        page.locator("#sort").select_option("-gain")
        gain = {q: mean(written["two"], q) - mean(written["one"], q) for q in shared}
        order = sorted(shared, key=lambda q: -gain[q])
        page.expect(page.locator(".item .what").first).to_have_text(order[0])
        assert page.locator(".item .what").all_inner_texts() == order
        page.locator("#list").focus()
        page.keyboard.press("j")
        sides = page.locator(".side")
        page.expect(sides).to_have_count(2)
        assert sides.locator(".side-name").all_inner_texts() == ["one/rollouts.jsonl", "two/rollouts.jsonl"]
        for side, name in zip(sides.all(), ("one", "two"), strict=True):
            wanted = [row["messages"][1]["content"] for row in written[name] if row["query"] == order[0]]
            assert sorted(side.locator(".message .body").all_inner_texts()) == sorted(wanted)
        page.expect(page.locator(".shared")).to_have_text(f"user: {order[0]}")
        page.wait_for_url("**with=two/rollouts.jsonl*episode=*")
        address = page.url
        page.keyboard.press("c")
        page.expect(page.locator(".chart polyline")).to_have_count(2)
        page.goto(address)
        page.expect(sides).to_have_count(2)
        page.locator("#with").select_option("one/rollouts.jsonl")  # the same run, another checkpoint
        page.locator("#step").select_option("0")
        page.locator("#with-step").select_option("1")
        page.expect(page.locator("#count")).to_contain_text("5 questions in both")
        page.locator("#list").focus()
        page.keyboard.press("Home")
        assert sides.locator(".side-name").all_inner_texts() == ["step 0", "step 1"]
        sides.nth(1).locator("header button").first.click()  # by itself
        page.expect(page.locator(".facts-list")).to_contain_text("step")
        page.expect(page.locator("#with")).to_have_value("")


# ---------------------------------------------------------------------- for everybody
def violations(page):
    found = Axe().run(page).response["violations"]
    return [(one["id"], [node["html"][:200] for node in one["nodes"][:3]]) for one in found]


STATES = [
    "&view=tokens&token=3&colour=advantage",
    "",
    "&view=tree",
    "&view=json",
    "&text=rendered",
    "&group=1&view=tokens",
    "&curves=1",
    "&with=b.jsonl",
]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize(
    "states", [STATES[:1], pytest.param(STATES[1:], marks=pytest.mark.full)], ids=["tokens", "others"]
)
@pytest.mark.by_day(2)
def test_axe_finds_nothing(tab, tmp_path, agents_file, theme, states):
    """axe-core's rules, contrast (WCAG 2.2, 1.4.3: 4.5 to 1) among them, on each way to look at an episode."""
    rng = random.Random(1)
    rows = [json.loads(agents_file.read_bytes()) | {"id": "0.0", "group": "0.0"}]
    rows += [episode(number, rng=rng, tokens=30) for number in range(1, 8)]
    spread = [sign * size for sign in (-1, 1) for size in (0.001, 0.05, 0.2, 0.7, 1.5, 3)]
    for row in rows:
        for one in row["sequences"]:
            count = sum(end - start for start, end in one["sampled"])
            one["advantage"] = [spread[at % len(spread)] for at in range(count)]
            one["log_probs"] = [-abs(value) for value in one["advantage"]]
    rows[0]["messages"][0]["content"] = TEXT
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_bytes(b"".join(map(as_line, rows)))
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "reward": 0.5}\n{"step": 1, "reward": 0.6}\n')
    with viewer(tmp_path) as url:
        page = tab(color_scheme=theme, bypass_csp=True)  # the policy of the page would refuse axe's own script
        for state in states:
            page.goto(f"{url}/web/rollouts?file=a.jsonl&episode={'0.1' if 'group' in state else '0.0'}{state}")
            page.expect(page.locator(".tools h1")).to_be_visible()
            page.expect(page.locator(".item").first).to_be_visible()
            if "tree" in state:
                page.get_by_role("treeitem").nth(1).click()
            assert violations(page) == [], state
            if "tokens" in state:
                assert least_contrast(page, ".flow .tok") >= 4.5
        if len(states) > 1:
            page.keyboard.press("?")
            page.expect(page.get_by_role("dialog")).to_be_visible()
            assert violations(page) == []


def least_contrast(page, selector):
    """The least contrast of texts with what is behind them, mixed colours included (WCAG 2.2, 1.4.3)."""
    return page.evaluate(
        """(selector) => {
          const paint = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d", { willReadFrequently: true });
          const light = ([r, g, b]) => [r, g, b].map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)).reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
          let least = 21;
          for (const one of document.querySelectorAll(selector)) {
            paint.clearRect(0, 0, 1, 1);
            const behind = [];
            for (let at = one; at; at = at.parentElement) behind.unshift(getComputedStyle(at).backgroundColor);
            const drawn = (colours) => (colours.forEach((colour) => ((paint.fillStyle = colour), paint.fillRect(0, 0, 1, 1))), light(paint.getImageData(0, 0, 1, 1).data));
            const back = drawn(behind);
            const text = drawn([getComputedStyle(one).color]);
            least = Math.min(least, (Math.max(back, text) + 0.05) / (Math.min(back, text) + 0.05));
          }
          return least;
        }""",
        selector,
    )


def test_everything_by_keyboard(tab, tmp_path):
    """From the address to a token and back, no pointer, and the focus is always somewhere that is seen."""
    write_episodes(tmp_path / "a.jsonl", 24)
    with viewer(tmp_path) as url:
        page = tab(url)
        page.expect(page.locator("#count")).to_contain_text("24 of 24")
        seen = []
        for _ in range(40):
            page.keyboard.press("Tab")
            place = page.evaluate(
                """() => {
                  const one = document.activeElement;
                  if (one === document.body) return null;
                  const box = one.getBoundingClientRect();
                  const style = getComputedStyle(one);
                  return [one.id || one.className || one.tagName, box.width > 0 && box.right > 0, style.outlineStyle !== "none" || one.id === "list"];
                }"""
            )
            if place is None:
                continue
            seen.append(place[0])
            assert place[1], place
            assert place[2], place
        assert {
            "file",
            "pick",
            "with",
            "q",
            "success",
            "stop",
            "step",
            "reward",
            "sort",
            "export",
            "list",
            "theme",
            "help",
        } <= set(seen)
