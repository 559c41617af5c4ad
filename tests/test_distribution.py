"""What is handed out: the wheel and the source distribution, the extras that are named where one is missing, completion in shells."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from torchrl_chat.cli import completion
from torchrl_chat.cli.main import _EXTRAS, make_parser

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def tracked() -> list[str]:
    """The files of the checkout, also those that are not committed yet."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is no checkout of git")
    return [name for name in said.split("\0") if name and (ROOT / name).exists()]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The files of the checkout, and what is built of a copy of them: the wheel, and the source distribution."""
    files, folder = tracked(), tmp_path_factory.mktemp("build")
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    code = "import setuptools.build_meta as b; b.build_sdist('dist'); b.build_wheel('dist')"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    [wheel], [source] = (folder / "dist").glob("*.whl"), (folder / "dist").glob("*.tar.gz")
    return files, zipfile.ZipFile(wheel), tarfile.open(source)


def test_the_wheel_is_the_package_and_the_source_distribution_is_everything(built):
    files, wheel, source = built
    inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert inside == {name for name in files if name.startswith("torchrl_chat/")}
    held = {name.partition("/")[2] for name in source.getnames()}
    assert set(files) - held == {".gitignore"}


def test_the_metadata_says_who_what_and_where(built):
    _, wheel, _ = built
    [name] = [name for name in wheel.namelist() if name.endswith("METADATA")]
    said = wheel.read(name).decode()
    assert "\nAuthor: The torchrl_chat developers\n" in said
    assert "@" not in said.partition("\n\n")[0].replace(" @ ", "")  # no invented address
    links = dict(re.findall(r"^Project-URL: (\w+), (\S+)$", said, re.M))
    assert set(links) == {"Documentation", "Source", "Changelog", "Issues"}
    assert all(link.startswith("https://github.com/torchrl-chat/torchrl_chat") for link in links.values())


def test_every_extra_that_a_message_names_is_one():
    extras = set(PROJECT["optional-dependencies"])
    assert {extra for extra in _EXTRAS.values() if extra} <= extras
    named = {
        (extra, path.name)
        for path in (ROOT / "torchrl_chat").rglob("*.py")
        for extra in re.findall(r"torchrl_chat\[([a-z][a-z,-]*)\]", path.read_text())
    }
    assert len(named) > 10
    assert not [each for each in named if not set(each[0].split(",")) <= extras]


# Each command as if the packages of all extras were missing; importing torch, which some do first, is paid once.
WITHOUT = """
import io, json, sys
from contextlib import redirect_stderr
commands, missing = json.loads(sys.stdin.read())
sys.modules.update(dict.fromkeys(missing))
from torchrl_chat.cli.main import main
said = []
for words in commands:
    with redirect_stderr(io.StringIO()) as err:
        code = main(words)
    said.append([code, err.getvalue()])
print("\\f" + json.dumps(said))
"""


@pytest.mark.by_day(2)
def test_a_missing_extra_is_named_in_one_sentence(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"response": "7", "answer": "7"}\n')
    wanted = {
        ("view", "."): "serve",
        ("play", "--no-browser"): "serve",
        ("serve", "--port", "0"): "serve",
        ("gateway", "--port", "0"): "serve",
        ("grade", "rows.jsonl", "--task", "math"): "math",
        ("grade", "rows.jsonl", "--task", "ifeval"): "ifeval",
        ("eval", "--dataset", "reasoning-gym:leg_counting", "--out", "run"): "reasoning-gym",
        ("eval", "--backend", "vllm", "--model", "smollm2", "--limit", "1", "--out", "run"): "vllm",
    }
    commands = [*map(list, wanted)]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], input=json.dumps([commands, [*_EXTRAS.keys() - {"datasets", "torchrl", "tqdm", "sympy",
         "pydantic", "pydantic_core", "h11"}]]), cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for (words, extra), (code, err) in zip(wanted.items(), json.loads(done.stdout.split("\f")[1]), strict=True):
        assert code == 2, (words, err)
        assert err.count("\n") == 1, (words, err)
        assert f"pip install 'torchrl_chat[{extra}]'" in err, (words, err)


# ---------------------------------------------------------------------- completion
@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    if importlib.util.find_spec("shtab") is None:
        pytest.skip("shtab is not installed")
    folder = tmp_path_factory.mktemp("scripts")
    for shell in completion.SHELLS:
        (folder / shell).write_text(completion.script(make_parser(), shell))
    return folder


WORDS = {
    "torchrl-chat comp": {"completion"},
    "torchrl-chat eval comp": {"compare"},
    "torchrl-chat eval --backend v": {"vllm"},
    "torchrl-chat train --variant d": {"dapo", "dr-grpo", "distillation"},
    "torchrl-chat gateway --rollouts runs/ro": {"runs/rollouts.jsonl"},
}


@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_a_shell_completes_commands_choices_and_files(scripts, tmp_path, shell):
    if (program := shutil.which(shell)) is None:
        pytest.skip(f"{shell} is not here")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "rollouts.jsonl").touch()
    if shell == "bash":
        calls = "\n".join(
            f"COMP_WORDS=({line}); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 )); COMPREPLY=(); $function; "
            "printf '%s ' \"${COMPREPLY[@]}\"; echo"
            for line in WORDS
        )
        code = f"source {scripts / shell}; function=$(complete -p torchrl-chat | grep -o '_shtab[a-z_]*'); {calls}"
    else:
        calls = "\n".join(f"complete -C '{line}' | cut -f1 | tr '\\n' ' '; echo" for line in WORDS)
        code = f"source {scripts / shell}; {calls}"
    done = subprocess.run([program, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert [set(line.split()) for line in done.stdout.splitlines()] == [*WORDS.values()]


def test_zsh_reads_its_script(scripts):
    text = (scripts / "zsh").read_text()
    assert text.startswith("#compdef torchrl-chat\n")
    assert "--variant" in text
    if (program := shutil.which("zsh")) is not None:
        subprocess.run([program, "-n", scripts / "zsh"], check=True)
