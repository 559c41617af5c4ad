"""The door: one TCP port in a sandbox's network, at which the caller listens, outside.

A socket belongs to the network namespace that it was made in, whoever holds it. So the keeper makes one that listens on the loopback
interface of the sandbox, and hands it to the caller: what connects to it can only be in there, and there is nothing else to connect to, since
that interface is the only one and the socket the only one that listens. No process carries bytes, no file is shared, and nothing of the host's
own network, its loopback included, is in reach.

Code inside may make TCP sockets and connect them, and nothing else: it can neither listen nor send datagrams. The keeper makes each
of these sockets for it, with buffers of a fixed size, since the kernel's memory for them belongs to no process.
"""

from __future__ import annotations

import fcntl
import socket
import struct

from torchrl_chat.sandbox.settings import Missing, step

HOST, PORT = "127.0.0.1", 4000
"""Where the door is, seen from inside: the same in every sandbox, as each has a network of its own."""

_BUFFER = 64 << 10  # bytes of a socket's buffer, each way; the kernel keeps twice as much
_GET_FLAGS, _SET_FLAGS = 0x8913, 0x8914
_REQUEST = struct.Struct("=16sH14x")  # the name of an interface, and its flags
_UP = 0x1
_HINT = (
    "A root without CAP_NET_ADMIN cannot bring the loopback interface up: give it the capability (Docker: --cap-add NET_ADMIN), or start "
    "as an ordinary user."
)


def listen() -> socket.socket:
    """In a network namespace of one's own: a socket that listens at the door, the loopback interface having been brought up.

    Raises:
        Missing: the kernel refused, or there is another interface, so that this is no namespace of one's own.
    """
    with step("a loopback interface of its own", _HINT):
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        for _, name in socket.if_nameindex():
            flags = _flags(listener, name)
            if name == "lo" and not flags & _UP:
                fcntl.ioctl(listener, _SET_FLAGS, _REQUEST.pack(b"lo", flags | _UP))
            elif name != "lo" and flags & _UP:
                raise Missing("a network of its own", f"it has the interface {name!r}", "Report this, please.")
        _bounded(listener)  # and so is what it accepts
        listener.bind((HOST, PORT))
        listener.listen()
    return listener


def connection(kind: int) -> socket.socket:
    """A TCP socket for code in the sandbox, not connected yet.

    Args:
        kind: ``SOCK_STREAM``, with flags.
    """
    made = socket.socket(socket.AF_INET, socket.SOCK_STREAM | (kind & socket.SOCK_NONBLOCK))
    _bounded(made)
    return made


def _bounded(made: socket.socket) -> None:
    made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)


def _flags(any_socket: socket.socket, name: str) -> int:
    answer = fcntl.ioctl(any_socket, _GET_FLAGS, _REQUEST.pack(name.encode(), 0))
    return _REQUEST.unpack(answer)[1]
