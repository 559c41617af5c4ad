"""Attacks on the sandbox, as code that prints ``BREACH`` where something worked that must not; see ``escapes.PRELUDE`` for what it uses."""

from __future__ import annotations

from escapes import ARM, raw

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
    "netlink, vsock and others": "for f in range(1, 46):\n    if DOOR and f == 2: continue  # there a TCP socket may be made\n    attempt(f, socket.socket, f, socket.SOCK_DGRAM if f == 16 else socket.SOCK_STREAM)\n"
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
