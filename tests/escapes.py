"""What attacks on the sandbox need: the world outside with traps everywhere, a prelude for their code, and a run as an ordinary user."""

from __future__ import annotations

import ctypes
import os
import platform
import select
import socket
import subprocess
import sys
import time
from pathlib import Path

from conftest import skip_without

from torchrl_chat.sandbox import Sandbox, SandboxError

SECRET = "canary-7f3a91"
ARM = platform.machine().lower() in ("aarch64", "arm64")

PRELUDE = """
import ctypes, errno, os, signal, socket, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def attempt(what, function, *arguments, **options):
    try:
        result = function(*arguments, **options)
    except BaseException as error:
        print("refused:", what, type(error).__name__, str(error)[:80])
    else:
        print("BREACH:", what, repr(result)[:200])
def call(number, *arguments):
    result = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(a) if isinstance(a, int) else a for a in arguments])
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
def lines(path):
    with open(path, errors="replace") as file:
        return file.read()
def dump(path):
    with open(path, "w") as file:
        file.write("changed")
"""


def raw(what: str, x86: int, arm: int, *arguments: object) -> str:
    """An attack by one system call."""
    return f"attempt({what!r}, call, {arm if ARM else x86}, {', '.join(map(str, arguments))})"


class World:
    """What is outside, with traps everywhere."""

    def __init__(self, folder: Path):
        self.folder = folder
        os.chmod(folder, 0o777)
        self.outside = folder / "outside"
        self.outside.write_text("untouched")
        self.outside.chmod(0o666)
        self.secret = folder / "secret"
        self.secret.write_text(SECRET)
        self.secret.chmod(0o644)
        os.environ["A_SECRET"] = SECRET
        self.memory = ctypes.create_string_buffer(SECRET.encode(), 64)
        self.victim = subprocess.Popen(["/bin/sleep", "600"])
        self.listeners = {}
        for name, family, kind, address in (
            ("tcp", socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
            ("udp", socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
            ("unix", socket.AF_UNIX, socket.SOCK_STREAM, str(folder / "socket")),
            ("abstract", socket.AF_UNIX, socket.SOCK_STREAM, f"\0canary-{os.getpid()}"),
            ("datagrams", socket.AF_UNIX, socket.SOCK_DGRAM, f"\0canary-{os.getpid()}-udp"),
        ):
            listener = socket.socket(family, kind)
            listener.bind(address)
            if kind == socket.SOCK_STREAM:
                listener.listen()
            self.listeners[name] = listener
        os.chmod(folder / "socket", 0o777)
        self.before = self.look()

    def look(self) -> dict:
        """All that an attack might change."""
        ready = select.select(list(self.listeners.values()), [], [], 0)[0]
        return {
            "files": sorted(os.listdir(self.folder)),
            "outside": self.outside.read_text(),
            "victim": self.victim.poll(),
            "memory": self.memory.value,
            "mounts": Path("/proc/self/mountinfo").read_text(),
            "host": socket.gethostname(),
            "user": (os.getresuid(), os.getresgid()),
            "heard": [name for name, listener in self.listeners.items() if listener in ready],
            "clock": time.time() > 1.6e9,
        }

    def hear_out(self) -> None:
        """Take what has been said to the listeners, as if nobody had."""
        for listener in self.listeners.values():
            while select.select([listener], [], [], 0)[0]:
                if listener.type == socket.SOCK_STREAM:
                    listener.accept()[0].close()
                else:
                    listener.recv(100)

    def names(self) -> str:
        """What an attacker would have found out, as assignments."""
        values = {
            "DOOR": False,
            "HOME": os.path.expanduser("~"),
            "SECRET_FILE": str(self.secret),
            "OUTSIDE": str(self.outside),
            "TCP": self.listeners["tcp"].getsockname()[1],
            "UDP": self.listeners["udp"].getsockname()[1],
            "UNIX": str(self.folder / "socket"),
            "ABSTRACT": f"\0canary-{os.getpid()}",
            "ABSTRACT_UDP": f"\0canary-{os.getpid()}-udp",
            "VICTIM": self.victim.pid,
            "CALLER": os.getpid(),
            "ADDRESS": ctypes.addressof(self.memory),
        }
        return "".join(f"{name} = {value!r}\n" for name, value in values.items())

    def close(self) -> None:
        self.victim.kill()
        self.victim.wait()
        for listener in self.listeners.values():
            listener.close()
        del os.environ["A_SECRET"]


def isolated(kind: str, **options) -> Sandbox:
    """A sandbox that has been started; the test is skipped where there can be none."""
    box = Sandbox(kind, **options)
    try:
        return box.start()
    except SandboxError as error:
        skip_without("bwrap", f"no isolation here: {error}")


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def descendants(pid: int, word: str = "") -> list[int]:
    found = []
    for task in os.listdir(f"/proc/{pid}/task") if os.path.exists(f"/proc/{pid}/task") else ():
        try:
            children = Path(f"/proc/{pid}/task/{task}/children").read_text().split()
        except OSError:
            continue
        for child in map(int, children):
            try:
                line = Path(f"/proc/{child}/cmdline").read_text()
            except OSError:
                continue
            if word in line:
                found.append(child)
            found += descendants(child, word)
    return found


AS_NOBODY = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def check(result):
    if result: sys.exit("cannot become nobody: " + os.strerror(ctypes.get_errno()))
check(libc.unshare(0x20000))
check(libc.mount(None, b"/", None, (1 << 14) | (1 << 18), None))
shown = {folder: os.open(folder, os.O_PATH) for folder in [sys.base_prefix, *sys.argv[1].split(os.pathsep)]}
hidden = {"/" + folder.split("/")[1] for folder in shown}
hidden = {top for top in hidden if not os.stat(top).st_mode & 1}  # root's home: show what is needed of it, and nothing else
for top in hidden:
    check(libc.mount(b"tmpfs", top.encode(), b"tmpfs", 0, b"mode=755"))
for folder, fd in shown.items():
    if "/" + folder.split("/")[1] in hidden:
        os.makedirs(folder, exist_ok=True)
        check(libc.mount(b"/proc/self/fd/%d" % fd, folder.encode(), None, (1 << 12) | (1 << 14), None))
    os.close(fd)
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
os.environ["HOME"] = "/nonexistent"
os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


def run_as_nobody(files: list[str], *options: str) -> str:
    """What pytest prints that an ordinary user runs over some test files; the test is skipped where that user gets no sandbox."""
    command = [
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-o",
        "addopts=",
        "-q",
        "-rs",
        *files,
        *options,
    ]
    needed = [str(Path(__file__).parents[1]), *(path for path in sys.path if path.endswith("site-packages"))]
    ran = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, os.pathsep.join(needed), *command],
        capture_output=True,
        text=True,
        timeout=900,
        cwd=Path(__file__).parents[1],
    )
    if "cannot become nobody" in ran.stderr:
        skip_without("bwrap", ran.stderr.strip())
    if "no isolation here" in ran.stdout:
        skip_without("bwrap", f"ordinary users get no namespaces here: {ran.stdout[-1500:]}")
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    return ran.stdout
