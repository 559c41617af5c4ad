"""The environments of scripts/environment.py: named by what they are made from, built once, thin in each checkout."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import subprocess
import sys
import threading
import time
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def made(monkeypatch, tmp_path):
    """The script as a module, with a cache and a checkout of its own."""
    spec = importlib.util.spec_from_file_location("environment_script", ROOT / "scripts" / "environment.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    checkout = tmp_path / "a checkout"
    checkout.mkdir()
    (checkout / "constraints.txt").write_text((ROOT / "constraints.txt").read_text())
    monkeypatch.setattr(module, "ROOT", checkout)
    monkeypatch.setenv("TORCHRL_CHAT_CACHE", str(tmp_path / "cache"))
    return module


def test_extras_that_name_others_are_followed(made):
    found = made.dependencies("dev")
    assert {"torch>=2.11", "matplotlib>=3.8", "ray>=2.50"} <= set(found)
    assert len(found) == len(set(found))
    assert not any(requirement.startswith("torchrl_chat") for requirement in found)
    assert not any(requirement.startswith("vllm") for requirement in found)


def test_the_name_follows_from_what_it_is_made_from(made):
    main = made.ENVIRONMENTS["main"]
    key, path = main.key, made.ROOT / "constraints.txt"
    assert re.fullmatch("[0-9a-f]{16}", key)
    assert dataclasses.replace(main, folder="elsewhere").key == key
    assert dataclasses.replace(main, requirements=(*main.requirements, "more")).key != key
    path.write_text(f"# a comment\n\n{path.read_text()}")
    assert main.key == key
    path.write_text(path.read_text().replace("numpy==", "numpy!="))
    assert main.key != key


def test_it_is_built_once_and_is_there_as_a_whole_or_not_at_all(made, monkeypatch):
    built = []

    def install(environment, folder):
        built.append(folder)
        folder.mkdir()
        time.sleep(0.3)
        (folder / "complete").touch()
        if len(built) == 1:
            raise KeyboardInterrupt
        return "hand"

    monkeypatch.setattr(made, "install", install)
    monkeypatch.setattr(made, "attach", lambda environment, shared, folder: folder.mkdir())
    with pytest.raises(KeyboardInterrupt):
        made.provide("main")
    assert not [path for path in made.cache().iterdir() if path.is_dir()]
    checkouts = [threading.Thread(target=made.provide, args=("main",)) for _ in range(4)]
    for checkout in checkouts:
        checkout.start()
    for checkout in checkouts:
        checkout.join()
    assert len(built) == 2
    [shared] = [path for path in made.cache().iterdir() if path.is_dir()]
    assert shared.name == f"main-{made.ENVIRONMENTS['main'].key}"
    assert (shared / "complete").exists()
    assert (made.ROOT / ".venv" / "made-from").exists()


def test_a_thin_environment_has_the_packages_the_checkout_and_the_commands(made, tmp_path):
    """In a folder with a blank in its name."""
    shared, folder = tmp_path / "shared", made.ROOT / ".venv"
    venv.create(shared)
    site = made.site_packages(shared)
    (site / "thing.py").write_text(
        "import of_the_checkout, sys\n\n\ndef main():\n    print(sys.argv[1], sys.prefix)\n"
    )
    (site / "thing-1.0.dist-info").mkdir()
    (site / "thing-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n")
    (site / "thing-1.0.dist-info" / "entry_points.txt").write_text("[console_scripts]\nthing = thing:main\n")
    (shared / "bin" / "program").symlink_to(sys.executable)
    (made.ROOT / "of_the_checkout.py").write_text("")

    made.attach(made.ENVIRONMENTS["main"], shared, folder)
    python = folder / "bin" / "python"
    assert python.samefile(sys.executable)
    assert (folder / "bin" / "program").samefile(sys.executable)

    def said(*command: str | Path) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout

    assert said(folder / "bin" / "thing", "hello") == f"hello {folder}\n"
    # A process that starts others has them import its main file again, under another name.
    again = f"import runpy; runpy.run_path({str(folder / 'bin' / 'thing')!r}, run_name='__mp_main__')"
    assert said(python, "-c", again) == ""
    versions = "import importlib.metadata as m; print(m.version('thing'), m.version('torchrl_chat'))"
    assert said(python, "-c", versions) == f"1.0 {made.PROJECT['version']}\n"
    assert str(python) in (folder / "bin" / "torchrl-chat").read_text()
