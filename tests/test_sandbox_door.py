"""A sandbox with a door: its one port leads to the caller, and nothing else can be reached, by whatever attack the sandbox is tried with."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from attacks import ATTACKS, ENDS
from conftest import of_the_day
from escapes import ARM, PRELUDE, SECRET, World, isolated

from torchrl_chat.sandbox import Sandbox, SandboxError
from torchrl_chat.sandbox.door import HOST, PORT
from torchrl_chat.sandbox.gate import SOCKETS

KINDS = ["namespaces", "bubblewrap"]
TCP = "s = socket.socket()\n"
DOOR_ATTACKS = {
    "other ports": "for port in (TCP, UDP, 22, 80, DOOR_PORT + 1): attempt(port, socket.create_connection, ('127.0.0.1', port), 1)",
    "other addresses": "for host in ('127.0.0.2', '0.0.0.0', '127.255.255.254', '10.0.0.1', '169.254.169.254'):\n"
    "    attempt(host, socket.create_connection, (host, TCP), 1)",
    "names": "for name in ('example.com', 'metadata', 'host.docker.internal'): attempt(name, socket.getaddrinfo, name, 80)",
    "other families": "for f in range(1, 46):\n    if f == 2: continue\n    for kind in (1, 2, 3, 5): attempt((f, kind), socket.socket, f, kind)",
    "other kinds and protocols": "for kind in (2, 3, 4, 5, 10): attempt(kind, socket.socket, 2, kind)\n"
    "for number in (1, 17, 33, 132, 136, 255, 262): attempt(number, socket.socket, 2, 1, number)",
    "the world's UNIX sockets": "attempt('unix', lambda: socket.socket(socket.AF_UNIX).connect(UNIX))\n"
    "attempt('abstract', lambda: socket.socket(socket.AF_UNIX).connect(ABSTRACT))",
    "pairs that are connected to somebody else": "attempt('datagrams', socket.socketpair, socket.AF_UNIX, socket.SOCK_DGRAM)\n"
    "for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET):\n    a, b = socket.socketpair(type=kind)\n    b.close()\n"
    "    for where in (ABSTRACT, UNIX): attempt(where, a.connect, where); attempt(where, a.sendto, b'x', where)",
    "listens": TCP
    + "s.settimeout(0.2)\n"
    + "attempt('bind', s.bind, ('127.0.0.1', 0)); attempt('listen', s.listen); attempt('accept', s.accept)",
    "interfaces and routes": "import fcntl\n"
    + TCP
    + "for request in (0x8914, 0x8916, 0x890B, 0x8922, 0x8946, 0x89A0, 0x8933): attempt(hex(request), fcntl.ioctl, s, request, b'lo'.ljust(40, b'\\0'))\n"
    "for device in ('net/tun', 'vhost-net', 'vsock'): attempt(device, open, '/dev/' + device)",
    "devices, marks, buffers, filters": TCP
    + "for level, option in ((1, 25), (1, 36), (1, 7), (1, 8), (1, 32), (1, 33), (1, 26), (1, 50), (1, 60), (6, 14), (6, 19), (6, 30), (6, 31), (0, 1), (0, 35), (41, 26)):\n"
    "    attempt((level, option), s.setsockopt, level, option, b'\\1\\0\\0\\0' * 4)",
    "fast open": TCP + "attempt('fast open', s.sendto, b'x', 0x20000000, ('127.0.0.1', TCP))",
    "a path in the place of an address": TCP
    + f"path = b'\\1\\0' + UNIX.encode() + b'\\0'\nattempt('path', call, {203 if ARM else 42}, s.fileno(), path, len(path))",
    "buffers of another size": TCP
    + "for option in (7, 8):\n    if s.getsockopt(1, option) != 1 << 17: print('BREACH', s.getsockopt(1, option))",
    "other network namespaces": "for n in ('net', 'user'): attempt(n, os.setns, os.open(f'/proc/self/ns/{n}', os.O_RDONLY)) if hasattr(os, 'setns') else None\n"
    "print('BREACH', lines('/proc/self/net/dev')) if len(lines('/proc/self/net/dev').splitlines()) > 3 else None\n"
    "print('BREACH', lines('/proc/self/net/unix')) if 'canary' in lines('/proc/self/net/unix') else None",
    "sockets without end": "made, r_w = [], os.pipe()\nfor _ in range(3):\n    if os.fork() == 0:\n        try:\n            while True: made.append(socket.socket())\n"
    "        except OSError: pass\n        os.write(r_w[1], b'%d\\n' % len(made)); time.sleep(0.5); os._exit(0)\n"
    "text = b''\nwhile text.count(b'\\n') < 3: text += os.read(r_w[0], 100)\ntotal = sum(map(int, text.split()))\nfor _ in range(3): os.wait()\n"
    f"print('BREACH' if total > {SOCKETS} else 'sockets', total)",
}


@pytest.fixture(scope="module")
def world():
    with tempfile.TemporaryDirectory() as folder:
        there = World(Path(folder))
        yield there
        there.close()


@pytest.fixture(scope="module", params=of_the_day(*KINDS))
def box(request):
    options = {"deadline": 30, "memory": 256 << 20, "scratch": 16 << 20, "allow_shell": True, "door": True}
    with isolated(request.param, **options) as box:
        yield box


@pytest.fixture(scope="module")
def bare(box):
    """The same, in which the attacks are run that ask for one without programs."""
    with isolated(box.settings.isolation, deadline=20, memory=256 << 20, scratch=16 << 20, door=True) as bare:
        yield bare


class Host:
    """Listens at a door, repeats the first line that each client says, and keeps them."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []
        self.closed: list[socket.socket] = []

    def __call__(self, listener: socket.socket) -> None:
        threading.Thread(target=self._serve, args=(listener,), daemon=True).start()

    def _serve(self, listener: socket.socket) -> None:
        with listener:
            listener.settimeout(20)
            while b"end" not in self.heard:
                try:
                    client, _ = listener.accept()
                except OSError:
                    return
                with client, contextlib.suppress(OSError):
                    client.settimeout(5)
                    self.heard.append(client.recv(1000))
                    client.sendall(self.heard[-1])


def prelude(world) -> str:
    return PRELUDE + world.names() + f"DOOR, DOOR_PORT = True, {PORT}\n"


ASKS = f"""
import asyncio, socket
with socket.create_connection(("localhost", {PORT}), 5) as s:
    s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    s.sendall(b"one"); print(s.recv(10), s.get_inheritable(), s.getpeername())
async def ask():
    read, write = await asyncio.open_connection("{HOST}", {PORT})
    write.write(b"two"); print(await read.read(10)); write.close()
asyncio.run(ask())
"""


def test_a_program_reaches_the_caller_and_nobody_else(world, box):
    """All attacks of this file in one call, so that they cost a sandbox and not twenty."""
    host = Host()
    tried = "".join(
        f"print('trying', {name!r})\ntry:\n    exec({code!r})\nexcept Exception as e: print('ended', repr(e))\n"
        for name, code in DOOR_ATTACKS.items()
    )
    last = f"with socket.create_connection(('{HOST}', {PORT})) as s: s.sendall(b'end'); print(s.recv(10))"
    result = box.command(["python3", "-c", ASKS + prelude(world) + tried + last], opened=host).run()
    assert result.status == "ok", result
    assert result.stdout.startswith(f"b'one' False ('{HOST}', {PORT})\nb'two'\n"), result
    assert result.stdout.endswith("b'end'\n"), result
    assert host.heard == [b"one", b"two", b"end"], "an attack got through to the door, or a client did not"
    assert result.stdout.count("trying") == len(DOOR_ATTACKS)
    assert "BREACH" not in result.text, result.text
    assert result.stdout.count("refused:") > 150, result.text
    assert SECRET not in result.text
    assert world.look() == world.before


def test_the_traps_spring(world):
    for name in (
        "other ports",
        "the world's UNIX sockets",
        "listens",
        "other kinds and protocols",
        "buffers of another size",
    ):
        ran = subprocess.run(
            [sys.executable, "-c", prelude(world) + DOOR_ATTACKS[name]], capture_output=True, text=True, timeout=60
        )
        assert "BREACH" in ran.stdout, (name, ran)
    world.hear_out()
    assert world.look() == world.before


@pytest.mark.full
@pytest.mark.parametrize("name", ATTACKS)
def test_what_is_contained_without_a_door_is_with_one(world, bare, name):
    deadline = 1.5 if "timeout" in ENDS.get(name, ()) else None
    result = bare.run(prelude(world) + ATTACKS[name], deadline)
    assert "BREACH" not in result.text, (name, result)
    assert SECRET not in result.text, (name, result)
    assert world.look() == world.before, (name, result)
    if name in ENDS:
        assert result.status in ENDS[name], (name, result)
    assert bare.run("6 * 7").value == "42"


def test_each_has_a_door_of_its_own(box):
    """Two at once at the same address: each is heard at its own end."""
    hosts, results = [Host(), Host()], {}
    code = f"import socket, sys, time\ntime.sleep(0.3)\ns = socket.create_connection(('{HOST}', {PORT}))\ns.sendall(sys.argv[1].encode())\ntime.sleep(0.3)"

    def run(number: int) -> None:
        results[number] = box.command(["python3", "-c", code, f"from {number}"], opened=hosts[number]).run()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [host.heard[0] for host in hosts] == [b"from 0", b"from 1"]
    assert all(result.ok for result in results.values())


def test_what_is_killed_leaves_nobody_connected(box):
    """A program with children that are connected is killed from outside: all connections end."""
    code = (
        f"import os, socket, time\nfor _ in range(3): os.fork()\ns = socket.create_connection(('{HOST}', {PORT}))\n"
        "s.sendall(b'here')\ntime.sleep(100)"
    )
    clients: list[socket.socket] = []
    said: list[bytes] = []
    there = threading.Event()

    def opened(listener: socket.socket) -> None:
        def serve() -> None:
            with listener:
                for _ in range(8):
                    clients.append(listener.accept()[0])
            for client in clients:  # all have said it, and none is killed before it could
                client.settimeout(30)
                said.append(client.recv(10))
            there.set()

        threading.Thread(target=serve, daemon=True).start()

    command = box.command(["python3", "-c", code], opened=opened)
    running = threading.Thread(target=command.run)
    running.start()
    assert there.wait(30)
    command.kill()
    running.join(30)
    assert not running.is_alive()
    assert said == [b"here"] * 8
    for client in clients:
        with client, contextlib.suppress(ConnectionResetError):
            assert client.recv(10) == b""


def test_a_door_is_off_unless_it_is_asked_for():
    assert not Sandbox().settings.door
    with pytest.raises(SandboxError, match="no door: make it with"):
        Sandbox(allow_shell=True).command(["true"], opened=lambda listener: None)
    with pytest.raises(SandboxError, match="is for commands"):
        Sandbox(door=True).session()
    with pytest.raises(ValueError, match="no network to put a door into"):
        Sandbox("none", door=True)
    with pytest.raises(TypeError, match="as texts"):
        Sandbox(allow_shell=True).command(["true", 3])


def test_what_is_shown_must_be_there(tmp_path):
    with pytest.raises(ValueError, match=r"'/nowhere/venv' does not exist"):
        Sandbox(show=["/nowhere/venv"])
    for path in ("/", "/etc", "/proc/self", "/tmp"):
        with pytest.raises(ValueError, match="cannot be shown"):
            Sandbox(show=[path])
    with pytest.raises(ValueError, match="not a text"):
        Sandbox(show="/usr/share")


def test_a_folder_is_shown_read_only(box):
    """At its own path; what is beside it is not to be seen."""
    folder = Path(__file__).parent
    with isolated(
        box.settings.isolation, allow_shell=True, show=[folder / "public_agents", Path(__file__)]
    ) as shown:
        code = (
            f"import os; print(len(os.listdir({str(folder)!r})), os.listdir({str(folder / 'public_agents')!r}) != [])\n"
            f"try: open({__file__!r}, 'a')\nexcept OSError as e: print(e.errno)\n"
            f"try: open({str(folder / 'public_agents' / 'x')!r}, 'w')\nexcept OSError as e: print(e.errno)"
        )
        result = shown.command(["python3", "-c", code], environment={"A": "b"}).run()
        lines = result.stdout.split("\n")
        assert lines[0] == "2 True", result
        assert set(lines[1:3]) <= {"13", "30"}, result  # whichever of Landlock and the mount speaks first
        missing = shown.command(["/no/such/program"]).run()
        assert (missing.status, missing.ran) == ("not_run", False)
        assert "/no/such/program" in missing.error


HOSTILE_KERNEL = """
import sys
sys.path.insert(0, {tests!r})
from torchrl_chat.sandbox import Sandbox, SandboxError, filters, kernel
kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
kernel.set_filter(filters.refusing({refused!r}), listen={listen})
try:
    with Sandbox(door=True, allow_shell=True, deadline=30) as box:
        print(box.isolation["Landlock"])
        print(box.command(["python3", "-c", sys.stdin.read()], opened=lambda listener: listener.close()).run().text)
except SandboxError as error: print("no isolation here:", error)
"""


def _in_a_kernel(code: str, refused: list[str], listen: bool) -> str:
    program = HOSTILE_KERNEL.format(tests=str(Path(__file__).parent), refused=refused, listen=listen)
    ran = subprocess.run([sys.executable, "-c", program], input=code, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran
    return ran.stdout


@pytest.mark.full
def test_the_network_holds_without_landlock(world):
    code = prelude(world) + DOOR_ATTACKS["other ports"] + "\n" + DOOR_ATTACKS["other addresses"]
    said = _in_a_kernel(code, ["landlock_create_ruleset"], False)
    assert "absent: this kernel has none" in said
    assert said.count("refused:") >= 9, said
    assert "BREACH" not in said
    assert world.look() == world.before


@pytest.mark.full
def test_where_nobody_can_answer_for_sockets_there_is_no_door():
    """A machine that listens to its filters itself: the error says so, and nothing is run."""
    said = _in_a_kernel("print('ran')", [], True)
    assert "seccomp" in said
    assert "nobody else may listen to its filters" in said
    assert "ran" not in said.split()


WRITES = """
import os, sys
print(os.getcwd(), os.listdir('.'), os.listdir('/workspaces'))
with open('made', 'w') as file: file.write(sys.argv[1])
os.symlink('/etc/shadow', 'link'); os.mkdir('inner'); os.rename('made', 'inner/made')
for path in ('/workspace/../other/x', '/workspaces/other/x', '/x', '/usr/x'): attempt(path, dump, path)
attempt('device', os.mknod, 'device', 0o666 | 0o20000, os.makedev(1, 1))
"""


@pytest.fixture
def workspaces():
    """A folder in which whoever the code becomes has two; below neither ``/tmp`` nor the home of root."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        os.chmod(folder, 0o755)
        for name in ("own", "other"):
            (Path(folder) / name).mkdir()
            if os.geteuid() == 0:
                os.chown(Path(folder) / name, 65534, 65534)
        yield Path(folder)


def test_a_workspace_is_kept_and_those_of_others_are_not_seen(box, workspaces):
    (workspaces / "other" / "theirs").write_text(SECRET)
    (workspaces / "own" / "given").write_text("given")
    (workspaces / "link").symlink_to("/var")
    with isolated(box.settings.isolation, allow_shell=True, workspaces=workspaces, deadline=20) as with_them:
        result = with_them.command(["python3", "-c", PRELUDE + WRITES, "one"], workspace="own").run()
        assert result.ok, result
        assert "BREACH" not in result.text, result
        assert result.stdout.count("refused:") == 5, result
        assert result.stdout.startswith("/workspace ['given'] []\n"), result
        assert (workspaces / "own" / "inner" / "made").read_text() == "one"
        assert sorted(os.listdir(workspaces / "other")) == ["theirs"]
        look = "import os; print(os.getcwd(), os.listdir('/workspace'))\ntry: open('/workspace/x', 'w')\nexcept OSError as e: print('no')"
        assert with_them.command(["python3", "-c", look]).run().stdout == "/tmp []\nno\n"
        for name in ("link", "nowhere", "../x", "..", "own/inner"):
            with pytest.raises(SandboxError, match="is no folder in"):
                with_them.command(["true"], workspace=name)
        if os.geteuid() == 0:
            (workspaces / "roots").mkdir()
            with pytest.raises(SandboxError, match="belongs to another user"):
                with_them.command(["true"], workspace="roots")
    with pytest.raises(SandboxError, match="has no workspaces"):
        box.command(["true"], workspace="own")
    with pytest.raises(ValueError, match="is not a folder"):
        Sandbox(workspaces="/nowhere")
