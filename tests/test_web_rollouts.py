"""The viewer of rollout files in a real browser: large files, filters, groups side by side, odd lines."""

from __future__ import annotations

import base64
import math
import random
import re
import shutil

import httpx
import pytest
from web_pages import HOSTILE, episode, sampled_text, viewer

from torchrl_chat.rollouts import as_line, read_rollouts
from torchrl_chat.viewer import viewer_app

pytestmark = pytest.mark.services


def browsing(tab, url, path):
    page = tab(f"{url}/web/rollouts")
    page.locator("#file").set_input_files(path)
    page.expect(page.locator("#status")).to_contain_text("read in")
    return page


def rewards(page):
    return [float(text) for text in page.locator(".item .num").all_text_contents()]


def test_ten_thousand_episodes_open_and_cost_no_more_each(chat, tab, tmp_path):
    """Measured on two idle cores: under two seconds."""
    kinds = [as_line(episode(number, tokens=400)) for number in range(500)]
    page, seconds = tab(f"{chat}/web/rollouts"), []
    for count in ("1,000", "10,000"):
        path = tmp_path / f"{count}.jsonl"
        with path.open("wb") as file:
            for start in range(int(count.replace(",", "")) // len(kinds)):
                file.writelines(line.replace(b'"id":"', b'"id":"%d-' % start, 1) for line in kinds)
        page.locator("#file").set_input_files(path)
        page.expect(page.locator("#count")).to_contain_text(f"{count} of {count} episodes", timeout=120_000)
        page.expect(page.locator(".item").first).to_be_visible()
        seconds.append(float(page.locator("#status").get_attribute("data-seconds")))
    assert seconds[1] < 3 * 10 * max(seconds[0], 0.05)
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


BOUNDS = {  # between the shades, of how far a number is from the light end
    "log_probs": (lambda value: -value, [0.05, 0.3, 0.8, 1.8, 3.5]),
    "entropy": (lambda value: value, [0.05, 0.3, 0.8, 1.5, 2.5]),
    "ratio": (lambda value: abs(math.log(value)), [0.01, 0.05, 0.1, 0.25, math.log(2)]),
}


def shades(sequence, stream):
    """The classes of a sequence's tokens that are coloured by a stream."""
    depth, bounds = BOUNDS[stream]
    numbers, names = iter(sequence.get(stream) or []), []
    sampled = {place for start, end in sequence["sampled"] for place in range(start, end)}
    for place in range(len(sequence["ids"])):
        value = next(numbers, None) if place in sampled else None
        level = "" if value is None else f" l{sum(depth(value) > bound for bound in bounds)}"
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
        return one

    both = episode(0, sequences=[told(3, True), told(5, False), told(6, True)])
    path = tmp_path / "streams.jsonl"
    path.write_bytes(as_line(both) + as_line(episode(1, sequences=[told(4, True)])) + as_line(episode(9)))
    page = browsing(tab, chat, path)
    page.keyboard.press("j")
    page.keyboard.press("t")
    page.expect(page.locator(".flow .tok.s").first).to_be_visible()
    read, choice = list(read_rollouts(path)), page.get_by_label("Colour tokens by")
    assert choice.locator("option").all_text_contents() == ["log-prob", "entropy", "ratio of trainer to sampler"]

    def drawn():
        return [
            flow.locator(".tok").evaluate_all("all => all.map((one) => one.className)")
            for flow in page.locator(".flow").all()
        ]

    for stream in ("log_probs", "entropy", "ratio"):
        choice.select_option(stream)
        assert drawn() == [shades(sequence, stream) for sequence in read[0]["sequences"]]
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
