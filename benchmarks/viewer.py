"""How long the viewer takes to open large rollout files in Chromium, and how much it asks of its server when they grow.

Made-up episodes of 400 tokens each (ids, pieces, log-probs) are served, opened, and appended to. The time is the page's own: from
asking for the file to the list, as it stands in its status; and beside it what the page's thread computed, which other work on the machine
does not change.

    python benchmarks/viewer.py [--episodes 10000] [--tokens 400] [--rounds 3]

Needs the extras serve and dev, and a Chromium (`apt-get install chromium`, or named in TORCHRL_CHAT_CHROMIUM).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import tempfile
import threading
import time
from pathlib import Path

import uvicorn
from playwright.sync_api import Page, expect, sync_playwright

from torchrl_chat.viewer import viewer_app


def episode(number: int, tokens: int) -> bytes:
    """A line of a rollout file."""
    draw = random.Random(number)
    half = tokens // 2
    words = [draw.choice(["the", "sum", "of", "twelve", "and", "thirty", "is", "42"]) + " " for _ in range(tokens)]
    row, place = divmod(number, 8)
    line = {
        "version": 1, "id": f"{row}.{place}", "row": row, "epoch": 0, "group": f"0.{row}", "place": place, "seed": str(number),
        "query": f"question {row}?", "reference": "42",
        "messages": [{"role": "user", "content": f"question {row}?"}, {"role": "assistant", "content": "".join(words[half:])}],
        "reward": draw.random(), "success": draw.random() < 0.5, "reward_parts": {}, "grade_failure": None, "extracted": None,
        "stop": "answered", "finish_reason": "stop", "cut": False, "error": None, "env_failure": None, "prompt_differs": None,
        "turns": 1, "sampled_tokens": half, "total_tokens": tokens,
        "sequences": [{
            "ids": [draw.randrange(150_000) for _ in range(tokens)], "sampled": [[half, tokens]],
            "log_probs": [round(-draw.expovariate(1), 5) for _ in range(tokens - half)], "pieces": words,
        }],
        "metadata": {"time": 0.0, "step": number // 64},
    }  # fmt: skip
    return json.dumps(line, separators=(",", ":")).encode() + b"\n"


def opened(page: Page, url: str, path: Path, episodes: int) -> tuple[float, float, float]:
    """Seconds to open the file, those that the page's thread computed for it, and those from writing five more episodes to seeing them."""
    devtools = page.context.new_cdp_session(page)
    devtools.send("Performance.enable", {"timeDomain": "threadTicks"})
    page.goto(f"{url}/web/")
    page.wait_for_selector("#status[data-seconds]", timeout=600_000)
    seconds = float(page.locator("#status").get_attribute("data-seconds") or "nan")
    metrics = {each["name"]: each["value"] for each in devtools.send("Performance.getMetrics")["metrics"]}
    with path.open("ab") as file:
        begun = time.perf_counter()
        file.writelines(episode(number, 400) for number in range(episodes, episodes + 5))
    expect(page.locator("#count")).to_contain_text(f"of {episodes + 5:,} episodes", timeout=60_000)
    return seconds, metrics["TaskDuration"], time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        path = Path(folder) / "rollouts.jsonl"
        server = uvicorn.Server(uvicorn.Config(viewer_app(folder), port=0, log_config=None))
        threading.Thread(target=server.run, daemon=True).start()
        while not server.started:
            time.sleep(0.01)
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        own = playwright.chromium.executable_path
        found = os.environ.get("TORCHRL_CHAT_CHROMIUM") or (own if Path(own).exists() else shutil.which("chromium"))
        arguments_of_root = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=found, args=arguments_of_root)
        for number in range(arguments.rounds):
            with path.open("wb") as file:
                file.writelines(episode(one, arguments.tokens) for one in range(arguments.episodes))
            size = path.stat().st_size
            page, sent = browser.new_page(), []
            page.on(
                "response", lambda reply, sent=sent: sent.append(reply) if reply.url.endswith(".jsonl") else None
            )
            seconds, computed, seen = opened(page, url, path, arguments.episodes)
            got = [int(reply.headers["content-length"]) for reply in sent if reply.request.method == "GET"]
            print(
                f"round {number + 1}: {arguments.episodes:,} episodes, {size / 1e6:.0f} MB: open in {seconds:.2f} s ({computed:.2f} s of its thread); five more of "
                f"{path.stat().st_size - size:,} bytes seen after {seen:.2f} s, {sum(got[1:]):,} bytes of the file asked for",
                flush=True,
            )
            page.close()
        browser.close()
        server.should_exit = True


if __name__ == "__main__":
    main()
