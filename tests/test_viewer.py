"""The viewer of rollout files in a real browser: large files and growing ones, filters, addresses, files of the server, odd lines."""

from __future__ import annotations

import base64
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from web_pages import HOSTILE, browsing, episode, sampled_text, viewer

from torchrl_chat.rollouts import as_line, read_rollouts
from torchrl_chat.viewer import viewer_app

pytestmark = pytest.mark.services


def rewards(page):
    return [float(text) for text in page.locator(".item .num").all_text_contents()]


def test_ten_thousand_episodes_are_read_once_and_of_more_only_those(tab, tmp_path):
    """Under two seconds on two idle cores, with 400 tokens each: ``python benchmarks/viewer.py``. What is asked for is counted here."""
    kinds = [as_line(episode(number, tokens=20)) for number in range(500)]
    path, asked = tmp_path / "rollouts.jsonl", []
    with path.open("wb") as file:
        for start in range(20):
            file.writelines(line.replace(b'"id":"', b'"id":"%d-' % start, 1) for line in kinds)
    whole = path.stat().st_size
    with viewer(path) as url:
        page = tab()
        page.on("response", lambda reply: asked.append(reply) if "/web/files/" in reply.url else None)
        page.goto(f"{url}/web/")
        page.expect(page.locator("#count")).to_contain_text("10,000 of 10,000 episodes", timeout=60_000)
        page.locator("#list").focus()
        page.keyboard.press("End")
        page.expect(page.locator(".item[aria-selected=true]")).to_have_attribute("aria-posinset", "10000")
        page.expect(page.locator("h1")).to_have_text("Episode 10,000 of 10,000")
        assert page.locator(".item").count() < 60  # only what is in sight
        more = [as_line(episode(20_000 + number, tokens=20)) for number in range(3)]
        with path.open("ab") as file:
            file.writelines(more)
        page.expect(page.locator("#count")).to_contain_text("10,003 of 10,003 episodes")
        page.expect(page.locator("h1")).to_have_text("Episode 10,000 of 10,003")
        page.locator("#q").fill("19-124.3")
        page.expect(page.locator("#count")).to_contain_text("1 of 10,003")
        page.locator("#q").press("Enter")
        page.keyboard.press("ArrowDown")
        page.expect(page.locator(".facts-list dd").last).to_have_text("19-124.3")
    sent = [reply for reply in asked if reply.request.method == "GET"]
    sizes = [int(reply.headers["content-length"]) for reply in sent]
    assert sizes[0] == whole
    assert sum(sizes[1:]) <= sum(map(len, more)) + 64 * len(sizes[1:])
    assert all(reply.status == 206 for reply in sent[1:])


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
    page.locator("#q").fill("")
    page.locator("#reward").fill("0.5 .. 1")
    between = [one for one in wanted if 0.5 <= one["reward"] <= 1]
    assert 0 < len(between) < 60
    expect(count).to_have_text(re.compile(f"^{len(between)} of 60"))
    page.locator("#step").select_option("2")
    few = [one for one in between if one["metadata"]["step"] == 2]
    expect(count).to_have_text(re.compile(f"^{len(few)} of 60"))
    page.locator("#list").focus()
    with page.expect_download() as download:
        page.keyboard.press("e")
    lines = rollouts.read_bytes().splitlines(keepends=True)
    order = sorted(few, key=lambda one: -one["metadata"]["step"])  # as they are listed
    assert Path(download.value.path()).read_bytes() == b"".join(lines[wanted.index(one)] for one in order)
    page.locator("#reward").fill("many")
    expect(page.locator("#reward")).to_have_attribute("aria-invalid", "true")


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
    for _ in range(3):  # tree, JSON, messages
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
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.full)])
def test_the_page_reads_what_python_reads(chat, tab, tmp_path, seed):
    path = tmp_path / "odd.jsonl"
    path.write_bytes(b"".join(odd_lines(seed)))
    page = browsing(tab, chat, path)
    rng, size = random.Random(seed), path.stat().st_size
    ends = [place + at for place, byte in enumerate(path.read_bytes()) if byte == 10 for at in (0, 1)]
    cuts = sorted(
        [*rng.sample(range(size), 40), *rng.sample(ends, 20)]
    )  # in lines, before newlines and behind them
    found = page.evaluate(
        """async ([text, cuts]) => {
          const { Index, readEpisode } = await import("/web/static/episodes.js");
          const bytes = Uint8Array.from(atob(text), (one) => one.charCodeAt(0));
          const blob = new Blob([bytes]);
          const [whole, grown] = [new Index(), new Index()];
          whole.add(bytes);
          whole.end();
          let seen = 0; // as the page follows a file: whatever is behind the last whole line is asked for again
          for (const cut of [...cuts, bytes.length]) {
            grown.cut();
            grown.add(bytes.subarray(grown.at, cut));
            grown.end();
            if (grown.entries.length < seen) throw new Error("entries are lost");
            seen = grown.entries.length;
          }
          const read = await Promise.all(whole.entries.map((entry) => readEpisode(blob, entry)));
          const { entries, problems } = whole;
          const alike = JSON.stringify([entries, problems]) === JSON.stringify([grown.entries, grown.problems]);
          return { entries, problems, whole: read.map((one) => one.id), alike };
        }""",
        [base64.b64encode(path.read_bytes()).decode(), cuts],
    )
    assert found["alike"]
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
    beside = {
        "metrics": '{"step": 0, "reward": 0.5}',
        "trained": '{"step": 0, "episodes": []}',
        "notes": "private words",
    }
    for name, line in beside.items():
        (folder / "one" / f"{name}.jsonl").write_text(f"{line}\n")
    (folder / "long.jsonl").write_bytes(as_line(episode(0, query="x" * (1 << 21))))
    (folder / "empty.jsonl").touch()
    (folder / "notes.txt").write_text("private")
    (tmp_path / "secret.jsonl").write_text("{}")
    (folder / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    with viewer(folder) as url, httpx.Client(base_url=url) as http:
        listed = http.get("/web/files").json()
        names = {file["name"]: file["beside"] for file in listed["files"]}
        assert names == {"one/a #1.jsonl": ["one/metrics.jsonl"], "long.jsonl": []}
        assert (listed["others"], listed["left_out"]) == (4, 0)
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
        assert http.get("/web/static/play.js").status_code == 404


def test_one_file_only(rollouts, tmp_path):
    """And the numbers of its run, of which curves are drawn."""
    for name in ("mine", "other"):
        shutil.copy(rollouts, tmp_path / f"{name}.jsonl")
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    with viewer(tmp_path / "mine.jsonl") as url:
        [file] = httpx.get(f"{url}/web/files").json()["files"]
        assert (file["name"], file["beside"]) == ("mine.jsonl", ["metrics.jsonl"])
        codes = {
            name: httpx.get(f"{url}/web/files/{name}.jsonl").status_code for name in ("mine", "metrics", "other")
        }
    assert codes == {"mine": 200, "metrics": 200, "other": 404}
    with pytest.raises(ValueError, match=r"no rollout file or folder .*nowhere"):
        viewer_app(tmp_path / "nowhere")


def test_a_run_that_begins_and_writes_and_begins_anew(tab, tmp_path):
    """An empty folder says what it is; what is written appears; nothing that is looked at moves."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "pass_rate": 0.25}\n')
    path = tmp_path / "rollouts.jsonl"
    line = [as_line(episode(number)) for number in range(80)]
    with viewer(tmp_path) as url:
        page = tab(url)
        page.expect(page.locator("#detail")).to_contain_text(
            f"There is no rollout file in {tmp_path.name}; 1 other file ends"
        )
        path.write_bytes(b"".join(line[:60]) + line[60][:100])  # a line is being written
        page.expect(page.locator("#count")).to_contain_text(
            "60 of 60", timeout=20_000
        )  # the only file is opened by itself
        page.expect(page.locator("#detail")).to_contain_text("line 61: it was not written to its end")
        page.expect(page.locator("#to-play")).to_be_hidden()
        page.locator("#sort").select_option("-step")  # new ones come in front of those that are looked at
        page.locator(".item").nth(2).click()
        chosen = page.locator(".item[aria-selected=true] .what").inner_text()
        page.locator("#list").evaluate("list => { list.scrollTop = 46 * 20 + 7; }")
        page.expect(page.locator("[data-at='30']")).to_be_visible()
        seen = page.locator("[data-at='20']").inner_text()
        with path.open("ab") as file:
            file.write(line[60][100:] + b"".join(line[61:]))
        page.expect(page.locator("#count")).to_contain_text("80 of 80")
        assert page.locator("#list").evaluate("list => list.scrollTop") == 46 * 40 + 7
        assert page.locator("[data-at='40']").inner_text() == seen
        page.expect(page.locator("h1")).to_have_text("Episode 23 of 80")
        page.keyboard.press("c")
        page.expect(page.locator(".chart .told")).to_have_text("step 0: 0.25")
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 1, "pass_rate": 0.5}\n{"step": 2, "pa')
        page.expect(page.locator(".chart .told")).to_have_text("step 1: 0.5")
        page.locator(".plot").focus()
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("Enter")  # the episodes of step 0
        page.expect(page.locator("#count")).to_contain_text("20 of 80")
        page.locator("#step").select_option("")
        path.write_bytes(
            b"".join(line[40:])
        )  # a run that went on from an earlier checkpoint: longer than what was known, and another
        path.write_bytes(b"".join(reversed(line)) + line[0])
        page.expect(page.locator("#count")).to_contain_text("81 of 81")
        page.locator("#sort").select_option("")
        page.keyboard.press("Escape")
        page.locator("#list").evaluate("list => { list.scrollTop = 0; }")
        page.expect(page.locator("[data-at='0'] .what")).to_contain_text("question 19")
        assert chosen


def test_addresses_lead_to_what_was_looked_at(tab, rollouts, tmp_path):
    shutil.copy(rollouts, tmp_path / "one.jsonl")
    shutil.copy(rollouts, tmp_path / "two.jsonl")
    wanted = list(read_rollouts(rollouts))
    with viewer(tmp_path) as url:
        page = tab(url)
        page.locator("#file").select_option("one.jsonl")
        page.wait_for_url("**file=one.jsonl")
        page.expect(page.locator("#count")).to_contain_text("60 of 60")
        page.expect(page.locator("#list")).to_be_focused()
        page.keyboard.press("j")
        page.expect(page.locator("h1")).to_have_text("Episode 1 of 60")
        page.wait_for_url("**episode=0.0")
        page.keyboard.press("j")
        page.wait_for_url("**episode=0.1")
        page.keyboard.press("t")
        page.wait_for_url("**view=tokens")
        page.locator(".flow [data-at='70']").click()
        page.wait_for_url("**token=70")
        address = page.url
        told = page.locator(".inspect").inner_text()
        page.go_back()
        page.expect(page.locator(".message").first).to_be_visible()
        page.expect(page.locator("h1")).to_have_text("Episode 2 of 60")
        page.go_back()
        page.expect(page.locator("h1")).to_have_text("Episode 1 of 60")
        page.go_back()
        page.go_back()  # before there was a file
        page.expect(page.locator("#detail h1")).to_have_text("Rollout files")
        for _ in range(4):
            page.go_forward()
        page.expect(page.locator(".flow .at")).to_have_attribute("data-at", "70")
        page.locator("#stop").select_option("max_tokens")
        page.wait_for_url("**stop=max_tokens*")
        few = page.locator("#count").inner_text()
        linked = tab(page.url)  # somebody else is sent the address
        linked.expect(linked.locator("#count")).to_have_text(few)
        linked.expect(linked.locator("#stop")).to_have_value("max_tokens")
        linked.goto(address)
        linked.expect(linked.locator(".inspect")).to_have_text(told)
        assert str(wanted[1]["sequences"][0]["ids"][70]) in told
        linked.goto(f"{url}/web/rollouts?file=none.jsonl")
        linked.expect(linked.locator("#status")).to_contain_text("there is no rollout file 'none.jsonl'")
        linked.goto(f"{url}/web/rollouts?file=../config")  # whoever wrote the address
        linked.expect(linked.locator("#status")).to_contain_text("there is no rollout file '../config'")
        linked.goto(f"{url}/web/rollouts?file=two.jsonl&episode=gone&view=odd&token=x&reward=y&sort=z")
        linked.expect(linked.locator("#detail")).to_contain_text("There is no episode gone in this file.")


@pytest.mark.full
def test_a_training_is_watched_while_it_runs(tab, tmp_path):
    """Its episodes and its curves appear as it writes them, and in the end all of them are there, each once."""
    command = [
        sys.executable,
        "-m",
        "torchrl_chat.cli.main",
        "train",
        "--steps",
        "6",
        "--prompts",
        "2",
        "--group_size",
        "4",
    ]
    command += ["--minibatch", "4", "--eval", "4", "--out", str(tmp_path / "run")]
    with (
        viewer(tmp_path) as url,
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as training,
    ):
        page = tab(url)
        page.expect(page.locator("#count")).to_contain_text("episodes", timeout=300_000)  # opened by itself
        page.locator("#list").focus()
        page.keyboard.press("j")
        page.expect(page.locator("h1")).to_contain_text("Episode 1 of")
        told = page.locator(".facts-list").inner_text()
        page.expect(page.locator("#count")).to_contain_text("48 of 48", timeout=300_000)
        assert page.locator(".facts-list").inner_text() == told  # who reads is not disturbed
        page.keyboard.press("c")
        page.expect(page.locator("[data-name=loss] .told")).to_contain_text("step 5", timeout=60_000)
        assert training.wait(300) == 0, training.stderr.read()
    read = [one["id"] for one in read_rollouts(tmp_path / "run" / "rollouts.jsonl")]
    assert len(read) == len(set(read)) == 48
