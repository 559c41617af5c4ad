"""Which versions the package works with: ``python3 scripts/matrix.py``, an environment and a part of the tests for each.

For each Python that can be had, the wheel of this checkout is installed with

    lowest       exactly the lower bounds of pyproject.toml
    constraints  the versions of constraints.txt
    newest       whatever the index has, without constraints

and the tests of TESTS, some of every room, are run against it. A table tells what ran with which versions, and what could not be
had, and why. First it is told what resolves without constraints, vLLM included, which is looked up and not installed.

torch is taken as a build for the CPU: from PyTorch's own index, or from where pip's configuration says, of the version of
constraints.txt if there is no newer one. --cuda takes what the package index has, several gigabytes an environment, and --torch says
which version. Environments stay in --folder; they are made anew when they are asked for again. Needs uv (pip gets it) and
Python's standard library.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from xml.etree import ElementTree

from environment import dependencies

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = tuple(re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"])))
KINDS = ("lowest", "constraints", "newest")
EXTRAS = (
    "train",
    "reasoning-gym",
    "math",
    "ifeval",
    "openai",
    "mcp",
    "peft",
    "dataloader",
    "openenv",
    "serve",
    "otel",
)
"""All but ray, torchao, renderers and vllm, which are large, or need a compiler, a GPU or an environment of their own."""
TOOLS = ("pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "scipy", "opentelemetry-sdk")
TESTS = (
    "columns", "conversation", "templates", "chat_env", "wrappers", "policy", "token_scores", "training_math", "surrogates",
)  # fmt: skip
SHOWN = ("torch", "torchrl", "tensordict", "transformers", "datasets")


@dataclasses.dataclass
class Cell:
    """One environment, and what became of it."""

    python: str
    kind: str
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    told: str = ""
    failed: bool = False


class NotHad(Exception):
    """Something that an environment needs cannot be had here."""


def run(*command: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]


def reason(done: subprocess.CompletedProcess[str]) -> str:
    """What a command said last, in a line."""
    lines = [line.strip(" ×╰─▶") for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    return " ".join(lines[-3:])[:300]


def find_uv(folder: Path) -> Path:
    if found := shutil.which("uv"):
        return Path(found)
    venv = folder / "uv"
    if not (venv / "bin" / "uv").exists():
        run(sys.executable, "-m", "venv", venv)
        if (done := run(venv / "bin" / "python", "-m", "pip", "install", "-q", "uv")).returncode:
            sys.exit(f"uv is not here, and pip cannot get it: {reason(done)}")
    return venv / "bin" / "uv"


def find_python(uv: Path, version: str) -> Path:
    """A Python of this machine, also one of pyenv that is not switched on; or the one that uv fetches."""
    found = run(uv, "python", "find", "--no-python-downloads", "--no-project", version, cwd="/")
    if not found.returncode:
        return Path(found.stdout.strip())
    homes = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob(f"versions/{version}.*/bin/python")
    for path in sorted(homes, reverse=True):
        return path
    fetched = run(uv, "python", "install", version, timeout=600)
    if fetched.returncode:
        raise NotHad(f"no Python {version} on this machine, and uv cannot fetch one")
    return Path(run(uv, "python", "find", version, cwd="/").stdout.strip())


def pin(name: str) -> str:
    """A requirement at the version of constraints.txt."""
    found = re.search(rf"^{re.escape(name)}==\S+", (ROOT / "constraints.txt").read_text(), re.M | re.I)
    assert found is not None, name
    return found[0]


def install_torch(uv: Path, python: Path, kind: str, wanted: str | None, cuda: bool) -> None:
    """Torch as a build for the CPU, or with ``cuda`` as the index has it."""
    lowest = next(each for each in PROJECT["dependencies"] if each.startswith("torch>")).replace(">=", "==")
    asked = wanted or {"lowest": lowest, "constraints": pin("torch"), "newest": "torch"}[kind]
    cpu = run(uv, "pip", "install", "-q", "--python", python, "--torch-backend", "cpu", asked)
    if not cpu.returncode:
        return
    # pip's own configuration may know of builds for the CPU: taken is none that is not named as one.
    for each in dict.fromkeys((asked, pin("torch")) if kind == "newest" and not cuda else (asked,)):
        with tempfile.TemporaryDirectory() as scratch:
            version = run(python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])").stdout.strip()
            pip = (
                sys.executable,
                "-m",
                "pip",
                "download",
                "-q",
                "--no-deps",
                "--only-binary",
                ":all:",
                "-d",
                scratch,
            )
            local = each if "==" not in each else f"{each}+cpu"
            if "==" in each and not run(*pip, "--python-version", version, local).returncode:
                wheel = next(Path(scratch).iterdir())
                if not (done := run(uv, "pip", "install", "-q", "--python", python, wheel)).returncode:
                    return
                raise NotHad(reason(done))
    if not cuda:
        raise NotHad(f"no build of {asked} for the CPU (--cuda takes the one of the index)")
    if (done := run(uv, "pip", "install", "-q", "--python", python, asked)).returncode:
        raise NotHad(reason(done))


def versions(uv: Path, python: Path) -> dict[str, str]:
    # Not "freeze", which tells of what was installed from a file where that was, and no version.
    found = run(uv, "pip", "list", "--format", "json", "--python", python).stdout
    return {package["name"]: package["version"] for package in json.loads(found)}


def try_cell(uv: Path, cell: Cell, wheel: Path, folder: Path, given: argparse.Namespace) -> None:
    """Make an environment and run the tests in it."""
    place = folder / f"{cell.python}-{cell.kind}"
    python = place / "bin" / "python"
    run(uv, "venv", "-q", "--clear", "--python", find_python(uv, cell.python), place)
    install_torch(uv, python, cell.kind, given.torch, given.cuda)
    held = folder / "held.txt"
    held.write_text(f"torch=={versions(uv, python)['torch']}\n")
    ways = {
        "lowest": ("--resolution", "lowest-direct"),
        "constraints": ("-c", ROOT / "constraints.txt"),
        "newest": (),
    }
    # What tests the package is of the versions that it is tested with, in each environment.
    # By name, not as the wheel's: lowest-direct is about what is asked for, and not about what that needs.
    sdk = next(each for each in PROJECT["optional-dependencies"]["dev"] if each.startswith("opentelemetry-sdk"))
    wanted = (*dependencies(*EXTRAS), sdk, *map(pin, TOOLS))
    override = ("--override", held) if given.torch or cell.kind != "newest" else ("-c", held)
    done = run(uv, "pip", "install", "-q", "--python", python, *ways[cell.kind], *override, *wanted)
    if not done.returncode:
        done = run(uv, "pip", "install", "-q", "--no-deps", "--python", python, wheel)
    if done.returncode:
        raise NotHad(reason(done))
    cell.versions = versions(uv, python)
    report, begun = folder / f"{place.name}.xml", time.monotonic()
    report.unlink(missing_ok=True)
    files = [f"tests/test_{name}.py" for name in given.tests or TESTS if (ROOT / f"tests/test_{name}.py").exists()]
    log = folder / f"{place.name}.log"
    with log.open("w") as out:
        subprocess.run(
            [place / "bin" / "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", "-n", str(given.workers),
             "-m", "not (full or corpus or services or learn or openenv or vllm)", *files],
            cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    if not report.exists():
        cell.failed, cell.told = True, f"the tests did not run: {log}"
        return
    suite = next(ElementTree.parse(report).iter("testsuite"))
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    wrong = counts["failures"] + counts["errors"]
    passed = counts["tests"] - wrong - counts["skipped"]
    cell.failed = bool(wrong) or not passed
    cell.told = f"{passed} passed, {wrong} failed, {counts['skipped']} skipped in {time.monotonic() - begun:.0f} s"
    if wrong:
        names = [f"{case.get('classname')}::{case.get('name')}" for case in suite.iter("testcase")
                 if case.find("failure") is not None or case.find("error") is not None]  # fmt: skip
        cell.told += "".join(f"\n    {name}" for name in names[:20])


def resolve(uv: Path, python: str, *extras: str) -> str:
    """What resolves without constraints; nothing is installed."""
    options = [word for extra in extras for word in ("--extra", extra)]
    done = run(uv, "pip", "compile", "-q", "--no-header", "--no-annotate", "--python-version", python, *options,
               ROOT / "pyproject.toml", cwd="/")  # fmt: skip
    if done.returncode:
        return f"nothing: {reason(done)}"
    found = dict(line.split("==", 1) for line in done.stdout.splitlines() if "==" in line)
    return ", ".join(f"{name} {found[name]}" for name in (*SHOWN, *extras) if name in found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], epilog=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--python", nargs="+", default=PYTHONS, metavar="3.N", help=f"default: {' '.join(PYTHONS)}")
    parser.add_argument("--versions", nargs="+", default=KINDS, choices=KINDS, help="default: all of them")
    parser.add_argument("--torch", metavar="torch==X", help="this torch in every environment")
    parser.add_argument(
        "--cuda", action="store_true", help="where there is no build of torch for the CPU, take the other"
    )
    parser.add_argument("--tests", nargs="+", metavar="NAME", help="names of test files, without test_ and .py")
    parser.add_argument("--workers", default=2, type=int, metavar="N", help="processes of pytest (default 2)")
    parser.add_argument("--folder", type=Path, help="where the environments are (default: in the cache)")
    given = parser.parse_args()
    cache = os.environ.get("TORCHRL_CHAT_CACHE")
    folder = (
        given.folder or (Path(cache) if cache else Path.home() / ".cache" / "torchrl_chat") / "matrix"
    ).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    uv = find_uv(folder)
    print("resolves without constraints:")
    for python in given.python:
        print(f"  {python}  {resolve(uv, python)}\n  {python}  {resolve(uv, python, 'vllm')}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        if (built := run(uv, "build", "-q", "--wheel", "--out-dir", scratch, ROOT)).returncode:
            sys.exit(f"the wheel cannot be built: {reason(built)}")
        wheel = next(Path(scratch).glob("*.whl"))
        cells = [Cell(python, kind) for python in given.python for kind in given.versions]
        for cell in cells:
            try:
                try_cell(uv, cell, wheel, folder, given)
            except NotHad as why:
                cell.told = f"not had: {why}"
            shown = " ".join(f"{name} {cell.versions[name]}" for name in SHOWN if name in cell.versions)
            print(f"{cell.python} {cell.kind:11} {cell.told}\n    {shown}".rstrip(), flush=True)
    print("\n| Python | versions | torch | transformers | tensordict | tests |\n|---|---|---|---|---|---|")
    for cell in cells:
        had = [cell.versions.get(name, "") for name in ("torch", "transformers", "tensordict")]
        print("| " + " | ".join([cell.python, cell.kind, *had, cell.told.partition("\n")[0]]) + " |")
    if any(cell.failed for cell in cells) or not any(cell.versions for cell in cells):
        sys.exit(1)


if __name__ == "__main__":
    main()
