"""Numbers of system calls, of x86-64 and of the table that 64-bit ARM shares with newer architectures.

From the kernel's own headers (``asm/unistd_64.h``, ``asm-generic/unistd.h``): facts of its interface, which never change.
"""

from __future__ import annotations

import platform

# name:x86-64:ARM64, with -1 where there is none.
_FILES = """
read:0:63 write:1:64 readv:19:65 writev:20:66 pread64:17:67 pwrite64:18:68 preadv:295:69 pwritev:296:70
preadv2:327:286 pwritev2:328:287 close:3:57 close_range:436:436 open:2:-1 openat:257:56 openat2:437:437
creat:85:-1 lseek:8:62 dup:32:23 dup2:33:-1 dup3:292:24 pipe:22:-1 pipe2:293:59 fstat:5:80
stat:4:-1 lstat:6:-1 newfstatat:262:79 statx:332:291 readlink:89:-1 readlinkat:267:78 access:21:-1
faccessat:269:48 faccessat2:439:439 getcwd:79:17 chdir:80:49 fchdir:81:50 getdents:78:-1 getdents64:217:61
mkdir:83:-1 mkdirat:258:34 rmdir:84:-1 unlink:87:-1 unlinkat:263:35 rename:82:-1 renameat:264:38
renameat2:316:276 link:86:-1 linkat:265:37 symlink:88:-1 symlinkat:266:36 chmod:90:-1 fchmod:91:52
fchmodat:268:53 truncate:76:45 ftruncate:77:46 fallocate:285:47 fsync:74:82 fdatasync:75:83 utime:132:-1
utimes:235:-1 utimensat:280:88 futimesat:261:-1 umask:95:166 statfs:137:43 fstatfs:138:44
copy_file_range:326:285 sendfile:40:71 splice:275:76 fadvise64:221:223 readahead:187:213 getxattr:191:8
lgetxattr:192:9 fgetxattr:193:10 listxattr:194:11 llistxattr:195:12 flistxattr:196:13
"""
_WAITING = """
poll:7:-1 ppoll:271:73 select:23:-1 pselect6:270:72 epoll_create:213:-1 epoll_create1:291:20
epoll_ctl:233:21 epoll_wait:232:-1 epoll_pwait:281:22 epoll_pwait2:441:441 eventfd:284:-1 eventfd2:290:19
timerfd_create:283:85 timerfd_settime:286:86 timerfd_gettime:287:87 signalfd:282:-1 signalfd4:289:74
"""
_MEMORY = """
munmap:11:215 mremap:25:216 mprotect:10:226 madvise:28:233 brk:12:214 mincore:27:232 msync:26:227
membarrier:324:283
"""
_PROCESSES = """
futex:202:98 futex_waitv:449:449 set_robust_list:273:99 get_robust_list:274:100 set_tid_address:218:96
gettid:186:178 arch_prctl:158:-1 rseq:334:293 sched_yield:24:124 sched_getaffinity:204:123
sched_getparam:143:121 sched_getscheduler:145:120 sched_get_priority_max:146:125
sched_get_priority_min:147:126 getcpu:309:168 fork:57:-1 vfork:58:-1 execve:59:221 exit:60:93
exit_group:231:94 wait4:61:260 waitid:247:95 getpid:39:172 getppid:110:173 getuid:102:174 geteuid:107:175
getgid:104:176 getegid:108:177 getresuid:118:148 getresgid:120:150 getgroups:115:158 getpgid:121:155
getpgrp:111:-1 getsid:124:156 setsid:112:157 setpgid:109:154 getpriority:140:141
getrlimit:97:163 setrlimit:160:164 getrusage:98:165 pidfd_open:434:434
"""
_SIGNALS = """
rt_sigaction:13:134 rt_sigprocmask:14:135 rt_sigreturn:15:139 rt_sigpending:127:136 rt_sigsuspend:130:133
rt_sigtimedwait:128:137 sigaltstack:131:132 kill:62:129 tkill:200:130 tgkill:234:131
pidfd_send_signal:424:424 pause:34:-1 alarm:37:-1 getitimer:36:102 setitimer:38:103 restart_syscall:219:128
clock_gettime:228:113 clock_getres:229:114 clock_nanosleep:230:115
gettimeofday:96:169 time:201:-1 nanosleep:35:101 times:100:153 sysinfo:99:179 uname:63:160 getrandom:318:278
"""
_SOCKET_PAIRS = """
sendto:44:206 recvfrom:45:207 sendmsg:46:211 recvmsg:47:212 shutdown:48:210 getsockopt:55:209
getsockname:51:204 getpeername:52:205
"""
# To give up more.
_LANDLOCK = """
landlock_create_ruleset:444:444 landlock_restrict_self:446:446
"""
_CHECKED = """
setxattr:188:5 lsetxattr:189:6 fsetxattr:190:7 clone:56:220 clone3:435:435 ioctl:16:29 prctl:157:167
socketpair:53:199 memfd_create:319:279 mmap:9:222 prlimit64:302:261 sched_setaffinity:203:122 setpriority:141:140
fcntl:72:25 flock:73:32
"""
# To reach who listens at a door; see door.py.
_DOOR = """
socket:41:198 connect:42:203 setsockopt:54:208
"""
_OWN = """
capset:126:91 landlock_add_rule:445:445
mount_setattr:442:442 pivot_root:155:41 unshare:272:97 mount:165:40 umount2:166:39 seccomp:317:277
"""

_COLUMN = {"x86_64": 0, "amd64": 0, "aarch64": 1, "arm64": 1}.get(platform.machine().lower())

LAST = 450
"""Calls with higher numbers are newer than this table."""


def _numbers(table: str) -> dict[str, int]:
    if _COLUMN is None:
        return {}
    found = {}
    for entry in table.split():
        name, *numbers = entry.split(":")
        if int(numbers[_COLUMN]) >= 0:
            found[name] = int(numbers[_COLUMN])
    return found


ALLOWED = _numbers(_FILES + _WAITING + _MEMORY + _PROCESSES + _SIGNALS + _SOCKET_PAIRS + _LANDLOCK)
"""What code in a sandbox may call, whatever the arguments."""

NUMBERS = {**ALLOWED, **_numbers(_CHECKED + _DOOR + _OWN)}
"""All numbers that this package knows on this machine; empty on other architectures."""

AUDIT_ARCH = {0: 0xC000003E, 1: 0xC00000B7, None: 0}[_COLUMN]
"""How a filter is told the architecture that a call was made for."""
