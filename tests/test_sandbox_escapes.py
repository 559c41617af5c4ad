"""Attacks on the sandbox. Each must change and learn nothing outside, and the next call must work.

An attack prints ``BREACH`` where something worked that must not. The world outside is looked at after each attack as well:
files, listeners, a victim process, mounts, the host's name. Run by root, the suite runs once more as an ordinary user.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
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
from conftest import of_the_day, skip_without

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
    # what a filter cannot see
    "locks files of the machine": "import fcntl, json, struct\nlock = struct.pack('hhqqi', fcntl.F_RDLCK, 0, 0, 0, 0)\n"
    "for path in (json.__file__, os.path.realpath(sys.executable), sys.prefix + '/lib', '/etc/passwd', '/dev/null', '/'):\n"
    "    fd = os.open(path, os.O_RDONLY)\n"
    "    for kind in (fcntl.LOCK_SH, fcntl.LOCK_EX): attempt(path, fcntl.flock, fd, kind | fcntl.LOCK_NB)\n"
    "    for command in (6, 7, 37, 38): attempt((path, command), fcntl.fcntl, fd, command, lock)",
    "locks a file of the machine behind another": "import fcntl, json\nhost, own, at = os.open(json.__file__, os.O_RDONLY), os.open('own', os.O_RDWR | os.O_CREAT), 200\n"
    "def swap():\n    while True: os.dup2(own, at); os.dup2(host, at)\nfor _ in range(2): threading.Thread(target=swap, daemon=True).start()\n"
    "os.dup2(own, at)\nend = time.monotonic() + 1.5\nwhile time.monotonic() < end:\n"
    "    for take in (lambda: fcntl.flock(at, fcntl.LOCK_EX | fcntl.LOCK_NB), lambda: fcntl.lockf(at, fcntl.LOCK_SH | fcntl.LOCK_NB)):\n"
    "        try: take()\n        except OSError: pass\n"
    "print('BREACH') if 'lock:' in lines(f'/proc/self/fdinfo/{host}') else None",
    "two processes with one table of descriptors": f"attempt('clone', call, {220 if ARM else 56}, 0x400 | 17, 0, 0, 0, 0)",
    "leases, news and signals of descriptors": "import fcntl, json\nfd = os.open(json.__file__, os.O_RDONLY)\nr, w = os.pipe()\n"
    "attempt('lease', fcntl.fcntl, fd, 1024, fcntl.F_RDLCK)\nattempt('news', fcntl.fcntl, os.open('/usr', os.O_RDONLY), 1026, 0x80000002)\n"
    "for fd in (r, w, 1):\n    attempt('owner', fcntl.fcntl, fd, 8, os.getpid())\n    attempt('signal', fcntl.fcntl, fd, 10, int(signal.SIGCONT))",
    "timers that send any signal": "box = ctypes.create_string_buffer(8)\n"
    + raw("timer_create", 222, 107, 1, "None", "box")
    + "\n"
    + raw("timer_create", 222, 107, 0, "bytes([0] * 8 + [18, 0, 0, 0]) + bytes(52)", "box"),
    "sockets without end": "made = []\nr, w = os.pipe()\nfor _ in range(6):\n    if os.fork() == 0:\n        try:\n            while True: made.append(socket.socketpair())\n"
    "        except OSError: pass\n        os.write(w, b'%d\\n' % len(made)); time.sleep(30)\n"
    "text = b''\nwhile text.count(b'\\n') < 6: text += os.read(r, 100)\ntotal = sum(map(int, text.split()))\n"
    "print('BREACH' if total > 160 else 'pairs', total)",
    "sockets that hide in each other": "a, b = socket.socketpair()\nn = 0\ntry:\n    while n < 1000:\n        c, d = socket.socketpair()\n"
    "        socket.send_fds(a, [b'x'], [c.fileno(), d.fileno()]); c.close(); d.close(); n += 1\nexcept OSError as e: print(e)\n"
    "print('BREACH') if n > 160 else print(n)",
}

_EXIT = 93 if ARM else 60  # the system call that ends one thread
HIDES = f"""
def hide(size):
    # A process whose first thread ends; another one takes the memory.
    def work():
        time.sleep(0.1)
        x = b'x' * size
        time.sleep(30)
    threading.Thread(target=work).start()
    libc.syscall({_EXIT}, 0)
"""
_UNREADABLE = f"""
import shutil
shutil.copy(os.path.realpath(sys.executable), 'p'); os.chmod('p', 0o111)
code = '''
import ctypes, threading, time
def work():
    time.sleep(0.1); x = b'x' * (45 << 20); time.sleep(30)
threading.Thread(target=work).start(); ctypes.CDLL(None).syscall({_EXIT}, 0)
'''
for _ in range(6): subprocess.Popen(['./p', '-I', '-S', '-c', code], env={{'PYTHONHOME': sys.base_prefix}})
"""

# Each takes more than a sandbox of 64 MiB may (with what interpreters bring along, 112), and at most 0.4 GB.
HOARDS = {
    "first threads that have ended": "for _ in range(6):\n    if os.fork() == 0: hide(50 << 20)\n",
    "first threads that have ended, in daemons": "for _ in range(6):\n    if os.fork() == 0:\n        os.setsid()\n"
    "        if os.fork(): os._exit(0)\n        hide(50 << 20)\n",
    "first threads that ended when the memory was there": "for _ in range(6):\n    if os.fork() == 0:\n        x = b'x' * (50 << 20)\n"
    f"        threading.Thread(target=time.sleep, args=(30,)).start(); libc.syscall({_EXIT}, 0)\n",
    "all but the last of many threads have ended": "threading.stack_size(1 << 18)\nfor _ in range(6):\n    if os.fork() == 0:\n"
    f"        for _ in range(3): threading.Thread(target=lambda: (time.sleep(0.1), libc.syscall({_EXIT}, 0))).start()\n        hide(45 << 20)\n",
    "first threads that have ended, in programs that nobody may read": _UNREADABLE,
    "the first thread of the interpreter itself": "threading.Thread(target=lambda: (time.sleep(0.1), [os.fork() or hide(45 << 20) for _ in range(6)],"
    f" time.sleep(30))).start()\nlibc.syscall({_EXIT}, 0)\n",
    "names like the kernel's own words": "for i in range(6):\n    if os.fork() == 0:\n"
    "        for name in (b'\\nVmRSS:\\t0 kB', b'x) Z 1 1 1 1'): libc.prctl(15, name)\n        hide(50 << 20)\n",
    "processes that take turns": "for i in range(6):\n    if os.fork() == 0:\n        time.sleep(0.1 * i)\n        while True:\n"
    "            x = b'x' * (50 << 20); time.sleep(0.5); del x; time.sleep(0.01)\n",
    "page tables of pages that are all the same": "libc.mmap.restype = ctypes.c_void_p\n"
    "libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]\n"
    "for i in range(14000):\n    ctypes.c_char.from_address(libc.mmap((1 << 40) + (i << 30), 4096, 1, 0x100022, -1, 0)).value\n",
    "mappings": "import mmap\nfor _ in range(9):\n    if os.fork() == 0:\n"
    "        m = [mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=1 + i % 2) for i in range(14000)]; time.sleep(30)\n",
}

WAKES = f"""
CREATE, SET, CLONE = {(107, 110, 220) if ARM else (222, 223, 56)}
def count():
    # Counts for as long as it runs, in a file, so that a later call can read it.
    if threading.current_thread() is threading.main_thread(): signal.signal(signal.SIGHUP, signal.SIG_IGN)
    fd, n = os.open('/tmp/count', os.O_RDWR | os.O_CREAT), 0
    while True:
        n += 1; os.pwrite(fd, b'%020d' % n, 0); time.sleep(0.001)
def counted():
    try: return int(lines('/tmp/count') or 0)
    except OSError: return 0
def dying(prepare, size=120 << 20):
    # A parent with so much memory that it is still on its way out when everything else is stopped, and its child.
    r, w = os.pipe()
    if os.fork() == 0:
        prepare()
        x = b'x' * size
        os.read(r, 1); os._exit(0)
    while not counted(): time.sleep(0.01)
    time.sleep(0.3)
    os.write(w, b'x')
"""
# What shall go on between two calls of a session.
SLEEPERS = {
    "a thread": "threading.Thread(target=count, daemon=True).start()",
    "an alarm": "signal.signal(signal.SIGALRM, lambda *_: None)\n"
    "if os.fork() == 0: signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05); count()",
    "a POSIX timer": "if os.fork() == 0:\n    box = ctypes.create_string_buffer(8)\n"
    "    event = (ctypes.c_int * 16)(0, 0, signal.SIGCONT, 0)\n    libc.syscall(CREATE, 1, event, box)\n"
    "    spec = (ctypes.c_long * 4)(0, 20000000, 0, 20000000)\n    libc.syscall(SET, ctypes.c_int.from_buffer(box), 0, spec, None)\n    count()",
    "a signal when the caller reads": "import fcntl\nif os.fork() == 0:\n"
    "    try: fcntl.fcntl(1, 8, os.getpid()); fcntl.fcntl(1, 10, int(signal.SIGCONT)); fcntl.fcntl(1, 4, 0x2000)\n"
    "    except OSError: pass\n    count()\ntime.sleep(0.2)\nprint('x' * 60000)",
    "an orphaned process group": "def prepare():\n    if os.fork() == 0: os.setpgid(0, 0); count()\ndying(prepare)",
    "a parent's death": "def prepare():\n    if os.fork() == 0: libc.prctl(1, int(signal.SIGCONT)); count()\ndying(prepare)",
    "a child's death": "r, w = os.pipe()\nif os.fork() == 0:\n"
    "    if libc.syscall(CLONE, int(signal.SIGCONT), 0, 0, 0, 0) == 0:\n        x = b'x' * (120 << 20); os.read(r, 1); os._exit(0)\n    count()\n"
    "while not counted(): time.sleep(0.01)\ntime.sleep(0.3)\nos.write(w, b'x')",
    "processes that continue each other": "for _ in range(4):\n    if os.fork() == 0:\n        while True:\n"
    "            try: os.kill(-1, signal.SIGCONT)\n            except OSError: pass\nif os.fork() == 0: count()\ntime.sleep(0.3)",
    "processes that continue each other by name": "for _ in range(4):\n    if os.fork() == 0:\n        time.sleep(0.1)\n"
    "        others = [int(p) for p in os.listdir('/proc') if p.isdigit() and int(p) not in (1, os.getpid())]\n        while True:\n"
    "            for p in others:\n                try: os.kill(p, signal.SIGCONT)\n                except OSError: pass\n"
    "if os.fork() == 0: count()\ntime.sleep(0.3)",
    "a parent that waits for a program to start": "if os.fork() == 0: count()\nif os.fork() == 0:\n"
    "    while True: subprocess.run([sys.executable, '-c', ''])\ntime.sleep(0.2)",
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


@pytest.fixture(scope="module", params=["namespaces", "bubblewrap"])
def small(request):
    """One with little memory, so that an attack needs little to take more."""
    box = Sandbox(request.param, deadline=20, memory=64 << 20, scratch=32 << 20)
    try:
        box.start()
    except SandboxError as error:
        pytest.skip(f"no isolation here: {error}")
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


@pytest.mark.parametrize("name", HOARDS)
def test_memory_that_hides_is_counted(small, name):
    result = small.run(PRELUDE + HIDES + HOARDS[name] + "time.sleep(8)\nprint('BREACH')")
    assert result.status == "memory", (name, result)
    assert small.run("6 * 7").value == "42"


@pytest.fixture(scope="module")
def slept(box):
    """Of each sleeper: the first call, and one after a pause in which all of them should have stood still."""
    code = "\nwhile not counted(): time.sleep(0.01)\ncounted()"
    sessions = {name: box.session() for name in SLEEPERS}
    first = {name: sessions[name].run(PRELUDE + WAKES + SLEEPERS[name] + code) for name in SLEEPERS}
    time.sleep(1.0)
    then = {}
    for name, session in sessions.items():
        then[name] = session.run("before = counted(); time.sleep(0.5); before, counted() - before")
        session.reset()
    return {name: (first[name], then[name]) for name in SLEEPERS}


@pytest.mark.parametrize("name", SLEEPERS)
def test_a_session_stands_still(slept, name):
    """Whatever tries to go on between two calls gets a fraction of what it gets in a call, or ends the session."""
    first, then = slept[name]
    assert first.status == "ok", first
    if then.notice:
        assert "started anew" in then.notice
        return
    assert then.status == "ok", then
    before, running = map(int, then.value.strip("()").split(","))
    assert running > 0, "what should go on is not there"
    assert before - int(first.value) < running, (first, then)  # at least twice the time, less than once the work


def test_memory_is_counted_between_the_calls(small):
    """Processes that will not stand still, and take memory meanwhile, are ended, or have come to rest below the limit."""
    code = """
for _ in range(5):
    if os.fork() == 0:
        x = []
        while True:
            try: os.kill(-1, signal.SIGCONT)
            except OSError: pass
            if len(x) < 40 and os.path.exists('/tmp/go'): x.append(b'x' * (1 << 20))
time.sleep(0.5)
open('/tmp/go', 'w').close()
"""
    held = """
import os
total = 0
for pid in filter(str.isdigit, os.listdir('/proc')):
    try: total += int(open(f'/proc/{pid}/statm').read().split()[1]) - int(open(f'/proc/{pid}/statm').read().split()[2])
    except OSError: pass
total * 4096
"""
    with small.session() as session:
        assert session.run(PRELUDE + code).status == "ok"
        time.sleep(2)
        after = session.run(held)
        assert after.status == "memory" or int(after.value) < (64 + 48 + 16) << 20, after


def test_a_lock_is_refused_on_the_host_and_had_in_the_scratch_folder(box):
    """Told by the host's own lock, while the session is there."""
    ours = os.path.realpath(json.__file__)
    with box.session() as session:
        tried = session.run(
            "import fcntl, json\nf, own = open(json.__file__), open('own', 'w')\nfcntl.flock(own, fcntl.LOCK_EX)\n"
            "fcntl.lockf(own, fcntl.LOCK_EX)\ntry: fcntl.flock(f, fcntl.LOCK_SH)\nexcept OSError as e: print(e.errno)\njson.__file__"
        )
        assert (tried.stdout, tried.value) == (f"{errno.ENOLCK}\n", repr(ours)), tried
        with open(ours) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        child = (
            "import os\nif os.fork() == 0:\n    try: fcntl.lockf(open('own', 'w'), fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
            "    except OSError as e: print(e.errno, flush=True)\n    os._exit(0)\nos.wait() and None"
        )
        refused = session.run(child)
        assert refused.stdout == f"{errno.EAGAIN}\n", refused


@pytest.mark.parametrize("threads", [0, 2])
def test_databases_and_event_loops_work(box, threads):
    """What needs locks on files of the scratch folder, and a pair of sockets."""
    code = (
        f"import asyncio, sqlite3, threading, time\nfor _ in range({threads}): threading.Thread(target=time.sleep, args=(0.5,)).start()\n"
        "a, b = sqlite3.connect('x.db'), sqlite3.connect('x.db')\na.execute('create table t (x)'); a.execute('insert into t values (1)'); a.commit()\n"
        "async def f(): return b.execute('select x from t').fetchall()\nasyncio.run(f())"
    )
    assert box.run(code).value == "[(1,)]"


def test_a_machine_with_a_listener_of_its_own():
    """There can be no second one: what would have been asked is refused, and all else runs."""
    code = (
        "import os\nfrom torchrl_chat.sandbox import Sandbox, SandboxError, filters, kernel\n"
        "kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)\nkernel.set_filter(filters.refusing([]), listen=True)\n"
        "try:\n    with Sandbox() as box:\n"
        "        print(box.run(\"import fcntl; fcntl.flock(open('own', 'w'), fcntl.LOCK_EX)\").error.splitlines()[-1])\n"
        "        print(box.run('import socket; socket.socketpair()').error.splitlines()[-1], box.run('6 * 7').value)\n"
        "except SandboxError as error: print('no isolation here:', error)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    if "no isolation here" in ran.stdout:
        pytest.skip(ran.stdout)
    assert ran.stdout.splitlines() == [
        "OSError: [Errno 37] No locks available",
        "OSError: [Errno 24] Too many open files 42",
    ], ran


def test_there_are_enough_of_them():
    assert len(ATTACKS) >= 40
    assert len(HOARDS) + len(SLEEPERS) >= 20


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
@pytest.mark.parametrize("kind", of_the_day("namespaces", "bubblewrap"))
def test_all_of_it_as_an_ordinary_user(kind):
    command = ["-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts=", "-q", "-rs", __file__]
    command += ["-k", kind]
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
    assert f"{len(ATTACKS)} passed" in ran.stdout or int(ran.stdout.split(" passed")[0].split()[-1]) >= len(
        ATTACKS
    ), ran.stdout
