"""Attacks on the sandbox. Each must change and learn nothing outside, and the next call must work.

An attack prints ``BREACH`` where something worked that must not. The world outside is looked at after each attack as well:
files, listeners, a victim process, mounts, the host's name. Run by root, the suite runs once more as an ordinary user.
"""

from __future__ import annotations

import ctypes
import os
import platform
import select
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
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


HANDLER = "signal.signal(s, signal.SIG_IGN)"
ATTACKS = {
    # files
    "reads /etc/shadow": "attempt('shadow', lines, '/etc/shadow')",
    "reads the real /etc/passwd": "print('BREACH') if 'root:' in lines('/etc/passwd') else None",
    "reads the home directory": "for top, folders, names in os.walk(HOME):\n"
    "    if top.startswith(sys.prefix): folders.clear()  # the interpreter may live there\n"
    "    elif names: print('BREACH', top, names)",
    "reads a file that everybody may read": "attempt('secret', lines, SECRET_FILE)",
    "reads what environment there is": "[print('BREACH', k, v) for k, v in os.environ.items() if 'canary' in k + v]\n"
    "data = b''.join(open(f'/proc/{p}/environ', 'rb').read() for p in ('self',))\nprint(data)",
    "reads the first process's environment": "attempt('environ', lines, '/proc/1/environ')",
    "climbs by dots": "attempt('dots', lines, '/tmp/' + '../' * 20 + SECRET_FILE)",
    "climbs by a symbolic link": "os.symlink(SECRET_FILE, '/tmp/l'); attempt('link', lines, '/tmp/l')\n"
    "os.symlink('/' , '/tmp/r'); attempt('root link', lines, '/tmp/r' + SECRET_FILE)",
    "climbs by /proc/1/root": "attempt('root', os.listdir, '/proc/1/root'); attempt('cwd', os.listdir, '/proc/1/cwd')",
    "climbs by /proc/self/root": "attempt('root', lines, '/proc/self/root' + SECRET_FILE)",
    "climbs out of a chroot": "attempt('chroot', os.chroot, '/tmp')",
    "writes outside the scratch folder": "for p in (OUTSIDE, '/etc/x', '/usr/x', '/x', '/dev/x', '/proc/sys/kernel/x', sys.prefix + '/x'):\n"
    "    attempt(p, dump, p)",
    "changes the interpreter": "import json\nattempt('stdlib', dump, json.__file__); attempt('exe', dump, os.path.realpath(sys.executable))\n"
    "attempt('remove', os.unlink, json.__file__)",
    "writes to memory devices": "for d in ('mem', 'kmem', 'port', 'sda', 'vda', 'kmsg', 'fuse', 'tty', 'console', 'ptmx'):\n"
    "    attempt(d, open, '/dev/' + d, 'r+b', 0)",
    "makes a device": "import stat\nattempt('mknod', os.mknod, '/tmp/mem', 0o666 | stat.S_IFCHR, os.makedev(1, 1))",
    "makes a program set-user-id": "import shutil\nshutil.copyfile(os.path.realpath(sys.executable), '/tmp/p')\n"
    "try: os.chmod('/tmp/p', 0o6755)\nexcept OSError: pass\n"
    "r = subprocess.run(['/tmp/p', '-I', '-S', '-c', 'import os; print(os.geteuid())'], capture_output=True, text=True)\n"
    "print('BREACH', r) if r.stdout.strip() == '0' else None",
    "fills the disk": "try:\n    f = open('/tmp/big', 'wb', 0)\n    for _ in range(4096): f.write(bytes(1 << 20))\n"
    "except OSError as e: print(e)\nelse: print('BREACH')",
    "fills the disk with files": "try:\n    for i in range(10 ** 6): open(f'/tmp/{i}', 'w').close()\nexcept OSError as e: print(e)\n"
    "else: print('BREACH')",
    "opens by a file handle": raw("open_by_handle_at", 304, 265, -100, "bytes(64)", 0),
    "leaves a file for the next": "dump('/tmp/left'); dump('/dev/shm/left')",
    "reads the machine through /proc": "for n in ('kcore', 'kallsyms', 'sys', 'mounts', 'cmdline', 'sysrq-trigger', 'config.gz', 'keys', 'meminfo'):\n"
    "    attempt(n, open, '/proc/' + n) if n != 'mounts' else None\n"
    "pids = [p for p in os.listdir('/proc') if p.isdigit()]\nprint('BREACH', pids) if len(pids) > 1 else None",
    "has /sys": "attempt('sys', os.listdir, '/sys')",
    # network
    "IPv4": "for a in (('127.0.0.1', TCP), ('1.1.1.1', 53), ('169.254.169.254', 80)):\n"
    "    attempt(a, socket.create_connection, a, 1)",
    "IPv6": "attempt('v6', lambda: socket.socket(socket.AF_INET6).connect(('::1', TCP)))",
    "UDP": "attempt('udp', lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', UDP)))",
    "raw sockets": "attempt('raw', socket.socket, socket.AF_INET, socket.SOCK_RAW, 1); attempt('packet', socket.socket, 17, 3, 0)",
    "UNIX socket": "attempt('unix', lambda: socket.socket(socket.AF_UNIX).connect(UNIX))",
    "abstract UNIX socket": "attempt('abstract', lambda: socket.socket(socket.AF_UNIX).connect(ABSTRACT))",
    "connects one end of a pair": "a, b = socket.socketpair()\nattempt('pair', a.connect, ABSTRACT)\n"
    "c, d = socket.socketpair(type=socket.SOCK_DGRAM)\nattempt('sendto', c.sendto, b'x', ABSTRACT_UDP)",
    "DNS": "attempt('dns', socket.getaddrinfo, 'example.com', 80); attempt('name', socket.gethostbyname, 'example.com')",
    "netlink, vsock and others": "for f in range(1, 46):\n    attempt(f, socket.socket, f, socket.SOCK_DGRAM if f == 16 else socket.SOCK_STREAM)\n"
    "    attempt(f, socket.socket, f, socket.SOCK_RAW)",
    # processes
    "a fork bomb": "n = 0\ntry:\n    while n < 5000:\n        if os.fork() == 0: time.sleep(30); os._exit(0)\n        n += 1\nexcept OSError: pass\n"
    "print('BREACH' if n > 100 else n)",
    "a fork bomb without end": "while True:\n    try: os.fork()\n    except OSError: pass",
    "a thread bomb": "n = 0\ntry:\n    for n in range(5000): threading.Thread(target=time.sleep, args=(30,), daemon=True).start()\nexcept RuntimeError: pass\n"
    "print('BREACH' if n > 100 else n)",
    "3 GB of memory": "attempt('memory', lambda: len(bytearray(3 << 30)))",
    "3 GB of memory, in pieces": "x = []\ntry:\n    while len(x) < 3000: x.append(b'x' * (1 << 20))\nexcept MemoryError: n = len(x); x = None; print(n)\n"
    "else: print('BREACH')",
    "3 GB of memory, in many processes": "for _ in range(20):\n    if os.fork() == 0:\n        x = b'x' * (150 << 20); time.sleep(20); os._exit(0)\ntime.sleep(20)\nprint('BREACH')",
    "3 GB of memory, in processes that hide": "attempt('dumpable', lambda: call("
    + str(167 if ARM else 157)
    + ", 4, 0, 0, 0, 0))\n"
    "for _ in range(20):\n    if os.fork() == 0:\n        x = b'x' * (150 << 20); time.sleep(20); os._exit(0)\ntime.sleep(20)\nprint('BREACH')",
    "3 GB of memory, in programs that nobody may read": "import shutil\nshutil.copy(os.path.realpath(sys.executable), 'p'); os.chmod('p', 0o111)\n"
    "for _ in range(20): subprocess.Popen(['./p', '-I', '-S', '-c', \"x = b'x' * (150 << 20); import time; time.sleep(20)\"], "
    "env={'PYTHONHOME': sys.base_prefix})\ntime.sleep(20)\nprint('BREACH')",
    "memory files": "attempt('memfd', os.memfd_create, 'x')\n" + raw("memfd_secret", 447, 447, 0),
    "1 GB of output": "x = b'x' * (1 << 20)\nfor _ in range(1024): os.write(1, x)\nprint('BREACH')",
    "a busy loop that ignores signals": "for s in range(1, 65):\n    try: "
    + HANDLER
    + "\n    except (OSError, ValueError): pass\nwhile True: pass",
    "a busy loop in C": "re = __import__('re')\nre.match(r'(a|aa)+$', 'a' * 60 + 'b')",
    "stops itself": "os.kill(os.getpid(), signal.SIGSTOP); time.sleep(60)",
    "a daemon that outlives the call": "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        os.closerange(0, 100)\n        while True:\n"
    "            try: dump(OUTSIDE)\n            except OSError: pass\n            time.sleep(0.01)\n    os._exit(0)\nos.wait()",
    "kills everything": "attempt('parent', os.kill, VICTIM, 9); attempt('caller', os.kill, CALLER, 9)\n"
    "for target, number in ((1, 9), (1, 15), (-1, 9), (0, 9)):\n    try: os.kill(target, number)\n    except OSError as e: print(e)",
    "traces another process": "PTRACE_ATTACH = 16\n"
    + raw("ptrace", 101, 117, "PTRACE_ATTACH", "VICTIM", 0, 0)
    + "\n"
    + raw("ptrace 1", 101, 117, 16, 1, 0, 0),
    "reads another process's memory": "b = ctypes.create_string_buffer(64)\niov = (ctypes.c_size_t * 2)(ctypes.addressof(b), 64)\nrem = (ctypes.c_size_t * 2)(ADDRESS, 64)\n"
    + "\n".join(raw(f"readv {p}", 310, 270, p, "iov", 1, "rem", 1, 0) for p in ("CALLER", "1", "os.getppid()"))
    + "\nattempt('mem', open, f'/proc/{CALLER}/mem', 'rb'); attempt('mem 1', open, '/proc/1/mem', 'rb')",
    "writes another process's memory": "b = ctypes.create_string_buffer(64)\niov = (ctypes.c_size_t * 2)(ctypes.addressof(b), 64)\nrem = (ctypes.c_size_t * 2)(ADDRESS, 64)\n"
    + raw("writev", 311, 271, "CALLER", "iov", 1, "rem", 1, 0),
    "takes another process's descriptors": "attempt('fd', os.listdir, '/proc/1/fd')\nfd = os.pidfd_open(1)\n"
    + raw("pidfd_getfd", 438, 438, "fd", 0, 0),
    "uses inherited descriptors": "import stat\nfor fd in range(3, 1024):\n    try: s = os.fstat(fd); where = os.readlink(f'/proc/self/fd/{fd}')\n    except OSError: continue\n"
    "    print('BREACH' if not (stat.S_ISSOCK(s.st_mode) or stat.S_ISFIFO(s.st_mode)) else 'fd', fd, where)\n"
    "    if stat.S_ISSOCK(s.st_mode):\n        sock = socket.socket(fileno=os.dup(fd))\n        if sock.type == socket.SOCK_SEQPACKET: print('BREACH: the keeper\\'s socket')",
    # rights
    "becomes root": "attempt('setuid', os.setuid, 0); attempt('setgid', os.setgid, 0); attempt('groups', os.setgroups, [0])\n"
    "attempt('res', os.setresuid, 0, 0, 0)\nprint('BREACH') if 0 in os.getresuid() else None",
    "mounts": raw("mount", 165, 40, "b'tmpfs'", "b'/tmp'", "b'tmpfs'", 0, "None")
    + "\n"
    + raw("bind", 165, 40, "b'/'", "b'/tmp'", "None", 4096, "None"),
    "unmounts": raw("umount", 166, 39, "b'/tmp'", 2) + "\n" + raw("proc", 166, 39, "b'/proc'", 2),
    "mounts by the new calls": raw("fsopen", 430, 430, "b'tmpfs'", 0)
    + "\n"
    + raw("open_tree", 428, 428, -100, "b'/'", 1)
    + "\n"
    + raw("move", 429, 429, -1, "b''", -1, "b''", 0),
    "remounts writable": raw("remount", 165, 40, "None", "b'/'", "None", 32 | 4096, "None")
    + "\n"
    + raw("setattr", 442, 442, -100, "b'/'", 0, "bytes(32)", 32),
    "turns the root around": raw("pivot_root", 155, 41, "b'/tmp'", "b'/tmp'"),
    "new namespaces by unshare": "\n".join(
        raw(f"unshare {f:#x}", 272, 97, f) for f in (0x10000000, 0x20000, 0x40000000, 0x20000000, 0x80)
    ),
    "new namespaces by clone": "\n".join(
        raw(f"clone {f:#x}", 56, 220, f | 17, 0, 0, 0, 0) for f in (0x10000000, 0x10020000)
    )
    + "\n"
    + raw("clone3", 435, 435, "bytes(88)", 88),
    "joins other namespaces": "for n in ('user', 'mnt', 'net', 'pid'):\n    try: fd = os.open(f'/proc/1/ns/{n}', os.O_RDONLY)\n    except OSError: fd = os.open(f'/proc/self/ns/{n}', os.O_RDONLY)\n    "
    + raw("setns", 308, 268, "fd", 0),
    "maps more users": "attempt('uid_map', dump, '/proc/self/uid_map'); attempt('setgroups', dump, '/proc/self/setgroups')",
    "capabilities": "print([l for l in lines('/proc/self/status').splitlines() if l[:3] == 'Cap'])\n"
    "print('BREACH') if any(int(l.split()[1], 16) for l in lines('/proc/self/status').splitlines() if l[:3] == 'Cap') else None\n"
    + raw("capset", 126, 91, "bytes([0x22, 5, 8, 0x20, 0, 0, 0, 0])", "b'\\xff' * 24"),
    "the kernel's programs": raw("bpf", 321, 280, 0, "bytes(128)", 128)
    + "\n"
    + raw("perf", 298, 241, "bytes(128)", 0, -1, -1, 0)
    + "\n"
    + raw("userfaultfd", 323, 282, 1)
    + "\n"
    + raw("io_uring", 425, 425, 8, "bytes(128)")
    + "\n"
    + raw("seccomp", 317, 277, 1, 0, "bytes(16)"),
    "keys": raw("add_key", 248, 217, "b'user'", "b'x'", "b'y'", 1, -3)
    + "\n"
    + raw("keyctl", 250, 219, 0, -3, 1)
    + "\n"
    + raw("request_key", 249, 218, "b'user'", "b'x'", "None", 0),
    "the machine itself": raw("reboot", 169, 142, 0xFEE1DEAD, 672274793, 0, 0)
    + "\n"
    + raw("kexec", 246, 104, 0, 0, 0, 0)
    + "\n"
    + raw("module", 175, 105, "bytes(8)", 8, "b''")
    + "\n"
    + raw("swapon", 167, 224, "b'/tmp/x'", 0)
    + "\n"
    + raw("hostname", 170, 161, "b'pwned'", 5)
    + "\n"
    + raw("syslog", 103, 116, 3, "bytearray(9) and bytes(9)", 9)
    + "\nattempt('clock', time.clock_settime, time.CLOCK_REALTIME, 0)\n"
    + raw("acct", 163, 89, "b'/tmp/x'"),
    "shared memory with others": raw("shmget", 29, 194, 1234, 4096, 0o1666)
    + "\n"
    + raw("msgget", 68, 186, 1234, 0o1666)
    + "\n"
    + raw("semget", 64, 190, 1234, 1, 0o1666)
    + "\n"
    + raw("mq_open", 240, 180, "b'x'", 0o102, 0o666, 0)
    + "\nprint('BREACH') if 'canary-shm' in os.listdir('/dev/shm') else None",
    "the other sets of system calls": "code = bytes.fromhex('b814000000cd80c3')\nimport mmap\nm = mmap.mmap(-1, 4096, flags=34, prot=7)\nm.write(code)\n"
    "f = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))\nprint('BREACH', f())"
    if not ARM
    else "print('x86 only')",
    "the x32 system calls": raw("x32", 0x40000000 + 39, 0x40000000 + 172),
    "raises its limits": "import resource as r\nfor n in (r.RLIMIT_AS, r.RLIMIT_NPROC, r.RLIMIT_NOFILE, r.RLIMIT_FSIZE, r.RLIMIT_CORE):\n    attempt(n, r.setrlimit, n, (r.RLIM_INFINITY, r.RLIM_INFINITY))",
    "sets the limits of others": "import resource as r\nfor pid in (1, os.getppid()):\n"
    "    attempt('prlimit', r.prlimit, pid, r.RLIMIT_NOFILE, (3, 3))\n    attempt('look', r.prlimit, pid, r.RLIMIT_CPU)\n"
    "    attempt('affinity', os.sched_setaffinity, pid, {0})\n    attempt('nice', os.setpriority, os.PRIO_PROCESS, pid, 19)\n"
    "attempt('nice for all', os.setpriority, os.PRIO_USER, 0, 19)\n"
    "r.prlimit(0, r.RLIMIT_CORE)\nos.sched_setaffinity(0, os.sched_getaffinity(0))\nos.nice(1)",
    "memory that nobody maps": "import mmap\nattempt('shared', mmap.mmap, -1, 1 << 20)\n"
    "attempt('shared and checked', mmap.mmap, -1, 1 << 20, flags=3)\n"
    "for name in ('zero', 'full'):\n    fd = os.open('/dev/' + name, os.O_RDWR)\n"
    "    attempt(name, mmap.mmap, fd, 1 << 20)\n    attempt(name, mmap.mmap, fd, 1 << 20, flags=mmap.MAP_PRIVATE)\n"
    "    assert os.read(fd, 3) == bytes(3)\nmmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)[:1] = b'x'",
    "types on the terminal": "import fcntl\nattempt('TIOCSTI', fcntl.ioctl, 0, 0x5412, b'x')\nattempt('tty', open, '/dev/tty')",
    # the channel to the caller
    "forges its reply": "import json, struct\ndata = json.dumps({'status': 'ok', 'exit': 0, 'error': '', 'value': 'x', 'ready': True}).encode()\n"
    "for fd in range(3, 10):\n    try: os.write(fd, struct.pack('!I', len(data)) + data)\n    except OSError: pass\nos._exit(7)",
    "sends garbage for its reply": "for fd in range(3, 10):\n    try: os.write(fd, b'\\x00\\x00\\x00\\x05[[[[[' + b'\\xff' * 100000)\n    except OSError: pass",
    "sends a bomb for its reply": "import struct\nfor data in (b'[' * 90000, b'1' * 90000, b'{}', b'null', b'\"\\\\ud800\"', b'{\"status\": [], \"exit\": {}}'):\n    for fd in range(3, 10):\n"
    "        try: os.write(fd, struct.pack('!I', len(data)) + data)\n        except OSError: pass",
    "closes all descriptors": "os.closerange(0, 1000)",
    "breaks the interpreter": "import builtins, json\njson.dumps = builtins.repr = builtins.isinstance = sys.stdout = None\nos._exit = lambda *a: None\n1",
    "crashes the interpreter": "ctypes.string_at(0)",
}

ENDS = {
    "a fork bomb without end": {"timeout", "memory"},
    "3 GB of memory, in many processes": {"memory"},
    "3 GB of memory, in processes that hide": {"memory"},
    "3 GB of memory, in programs that nobody may read": {"memory"},
    "1 GB of output": {"output"},
    "a busy loop that ignores signals": {"timeout"},
    "a busy loop in C": {"timeout"},
    "stops itself": {"timeout"},
    "kills everything": {"crash"},
    "the other sets of system calls": {"crash"} if not ARM else {"ok"},
    "crashes the interpreter": {"crash"},
}


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

    def names(self) -> str:
        """What an attacker would have found out, as assignments."""
        values = {
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


@pytest.fixture(scope="module")
def world():
    with tempfile.TemporaryDirectory() as folder:
        there = World(Path(folder))
        yield there
        there.close()


@pytest.fixture(scope="module", params=["namespaces", "bubblewrap"])
def box(world, request):
    box = Sandbox(request.param, deadline=20, memory=256 << 20, scratch=16 << 20)
    try:
        box.start()
    except SandboxError as error:
        skip_without("bwrap", f"no isolation here: {error}")
    yield box
    box.close()


@pytest.mark.parametrize("name", ATTACKS)
def test_contained(world, box, name):
    deadline = 1.5 if "timeout" in ENDS.get(name, ()) else None
    result = box.run(PRELUDE + world.names() + ATTACKS[name], deadline)
    shown = (name, result.status, result.text)
    assert "BREACH" not in result.text, shown
    assert SECRET not in result.text, shown
    assert world.look() == world.before, shown
    if name in ENDS:
        assert result.status in ENDS[name], shown
    after = box.run("import os; print(6 * 7, os.listdir('/tmp'), [p for p in os.listdir('/proc') if p.isdigit()])")
    assert (after.status, after.stdout) == ("ok", "42 [] ['2']\n"), shown
    assert world.look() == world.before, shown


def test_there_are_enough_of_them():
    assert len(ATTACKS) >= 40


def test_the_traps_spring(world):
    """What the attacks reach for is there for a process without a sandbox; else they would prove nothing."""
    code = PRELUDE + world.names()
    for name in (
        "reads a file that everybody may read",
        "IPv4",
        "UNIX socket",
        "abstract UNIX socket",
        "UDP",
        "has /sys",
    ):
        ran = subprocess.run(
            [sys.executable, "-c", code + ATTACKS[name]], capture_output=True, text=True, timeout=60
        )
        assert "BREACH" in ran.stdout, (name, ran)
    for listener in world.listeners.values():
        while select.select([listener], [], [], 0)[0]:
            if listener.type == socket.SOCK_STREAM:
                listener.accept()[0].close()
            else:
                listener.recv(100)


def test_nobody_outlives_the_call(box):
    """A daemon is gone when the call returns: not one process is left below the warden but the idle sandboxes'."""
    code = ATTACKS["a daemon that outlives the call"]
    box.run(PRELUDE + "OUTSIDE = '/nowhere/x'\n" + code)
    box.close()
    end = time.monotonic() + 60
    while (left := _descendants(os.getpid(), "warden")) and time.monotonic() < end:
        time.sleep(0.05)
    assert not left
    box.start()


def test_a_caller_that_is_killed_leaves_nothing():
    code = (
        "import os, time\nfrom torchrl_chat.sandbox import Sandbox\nbox = Sandbox().start()\n"
        "print(box.warden().process.pid, flush=True)\nbox.run('import time; time.sleep(100)', 100)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as caller:
        line = caller.stdout.readline()
        if not line:
            skip_without("bwrap", f"no isolation here: {caller.stderr.read()[-500:]}")
        warden = int(line)
        below = []
        end = time.monotonic() + 60
        while len(below) < 3 and time.monotonic() < end:
            below = _descendants(warden)
            time.sleep(0.05)
        assert len(below) >= 3
        caller.kill()
        caller.wait()
        alive = [warden, *below]
        while alive and time.monotonic() < end + 20:
            time.sleep(0.05)
            alive = [pid for pid in alive if _state(pid) not in ("", "Z", "X")]
        assert not alive


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def _descendants(pid: int, word: str = "") -> list[int]:
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
            found += _descendants(child, word)
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


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="run by an ordinary user as it is")
def test_all_of_it_as_an_ordinary_user():
    command = ["-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts=", "-q", "-rs", __file__]
    needed = [str(Path(__file__).parents[1]), *(path for path in sys.path if path.endswith("site-packages"))]
    ran = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, os.pathsep.join(needed), *command],
        capture_output=True,
        text=True,
        timeout=580,
        cwd=Path(__file__).parents[1],
    )
    if "cannot become nobody" in ran.stderr:
        skip_without("bwrap", ran.stderr.strip())
    if "no isolation here" in ran.stdout:
        skip_without("bwrap", f"ordinary users get no namespaces here: {ran.stdout[-1500:]}")
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    assert f"{len(ATTACKS)} passed" in ran.stdout or int(ran.stdout.split(" passed")[0].split()[-1]) >= len(
        ATTACKS
    ), ran.stdout
