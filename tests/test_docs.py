"""The pages of the documentation: their Python runs as it stands, and their links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
RUN = [
    "your-environment.md",
    "reference.md",
    "models.md",
    "gateway.md",
]  # from top to bottom, each block with the names of those before it
FILES = "https://github.com/torchrl-chat/torchrl_chat/blob/main/"
IMAGES = "https://raw.githubusercontent.com/torchrl-chat/torchrl_chat/main/"


@pytest.mark.parametrize("page", RUN)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / page).read_text()
    scope = {"__name__": "page"}
    blocks = list(re.finditer(r"```python\n(.*?)```", text, re.DOTALL))
    assert blocks
    for block in blocks:
        line = text[: block.start(1)].count("\n")
        exec(compile("\n" * line + block[1], page, "exec"), scope)


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


def test_the_readme_stands_alone_on_a_package_index():
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") < 160
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    assert targets
    for target in targets:
        assert target.startswith("https://"), target  # a relative link leads nowhere there
        for prefix in (FILES, IMAGES):
            if target.startswith(prefix):
                assert (ROOT / target.removeprefix(prefix)).exists(), target


def test_every_page_is_listed_in_the_readme():
    text = (ROOT / "README.md").read_text()
    assert all(f"docs/{page.name}" in text for page in PAGES)
