"""The program that examines an answer: a judge, which has the tests, and a process of its own with the answer.

:class:`~torchrl_chat.rewards.CodeVerifier` hands this file to its runner as text, so it needs the standard library only.
The judge starts a second interpreter with the answer, runs the tests itself, and calls what the answer defines over a pipe.
What comes back is plain data (numbers, texts, lists, sets ...), made anew from JSON on the judge's side, so that the judge
compares with its own ``==``. Anything else stays where it is and is held by a :class:`Remote`. The answer can neither
rewrite the tests nor the judge's ``len``, ``abs`` or ``AssertionError``, nor end it: it can only give values.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib
import json
import marshal
import operator
import os
import signal
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

_BOOT = """\
import marshal, os, sys
read, write = map(int, sys.argv[1:])
size, data = int.from_bytes(os.read(read, 4), "big"), b""
while len(data) < size: data += os.read(read, size - len(data)) or sys.exit()
exec(marshal.loads(data))
serve(read, write)
"""
_LONGEST = 1 << 28  # bytes of a message that are read
_BASES: tuple[Any, ...] = (int, float, complex, str, bytes, bytearray, list, tuple, set, frozenset, dict, deque)
_MUTABLE = {"l": list, "d": dict, "s": set, "q": deque, "B": bytearray}
_TAGS: dict[type, str] = {list: "l", tuple: "t", set: "s", frozenset: "S", deque: "q"}
_VALUES: dict[str, tuple[str, Callable[[Any], tuple[Any, ...]]]] = {
    "Decimal": ("decimal", lambda x: (str(x),)),
    "Fraction": ("fractions", lambda x: (x.numerator, x.denominator)),
    "timedelta": ("datetime", lambda x: (x.days, x.seconds, x.microseconds)),
    "datetime": ("datetime", lambda x: (x.isoformat(),)),
    "date": ("datetime", lambda x: (x.isoformat(),)),
    "time": ("datetime", lambda x: (x.isoformat(),)),
}


class AnswerError(Exception):
    """The answer raised something of its own, said what makes no sense, or has ended."""


class Remote:
    """An object of the other process. Its attributes, items, length, truth and calls are what the other process says.

    It equals nothing but objects of the other process, and cannot be compared or calculated with anything else: a test
    that looks for 4 is not satisfied by an object that calls itself equal to everything.
    """

    __slots__ = ("_index", "_peer")
    __hash__: Any

    def __init__(self, peer: Peer, index: int):
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_index", index)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        return self._peer.ask("call", self, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._peer.ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._peer.ask("setattr", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._peer.ask("getitem", self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._peer.ask("setitem", self, key, value)

    def __delitem__(self, key: Any) -> None:
        self._peer.ask("delitem", self, key)

    def __len__(self) -> int:
        return int(self._peer.ask("len", self))

    def __bool__(self) -> bool:
        return self._peer.ask("bool", self) is True

    def __str__(self) -> str:
        return str(self._peer.ask("str", self))

    def __repr__(self) -> str:
        return str(self._peer.ask("repr", self))

    def __iter__(self) -> Iterator[Any]:
        inside = self._peer.ask("iter", self)
        while True:
            try:
                value = self._peer.ask("next", inside)
            except StopIteration:
                return
            yield value

    def __next__(self) -> Any:
        return self._peer.ask("next", self)

    def __contains__(self, wanted: object) -> bool:
        return any(item is wanted or item == wanted for item in self)

    def __instancecheck__(self, thing: object) -> bool:
        return self._peer.ask("isinstance", thing, self) is True

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Remote) and self._peer.ask("eq", self, other) is True)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:  # type: ignore[no-redef]
        return hash(self._peer.ask("hash", self))


class _Awaited(Remote):
    """A coroutine of the other process: run there when it is awaited here."""

    __slots__ = ()

    def __await__(self) -> Iterator[Any]:
        return self

    def send(self, _: Any) -> NoReturn:
        raise StopIteration(self._peer.ask("run", self))

    __next__ = lambda self: self.send(None)  # noqa: E731

    def throw(self, *error: Any) -> NoReturn:
        raise error[-1] if isinstance(error[-1], BaseException) else error[0]

    def close(self) -> None:
        pass


def _between(name: str) -> Any:
    """An operation on two objects of the other process."""

    def method(self: Remote, other: Any) -> Any:
        return self._peer.ask(name, self, other) if isinstance(other, Remote) else NotImplemented

    return method


_BETWEEN = ("lt", "le", "gt", "ge", "add", "sub", "mul", "truediv", "and", "or", "xor", "matmul")
for _name in _BETWEEN:
    setattr(Remote, f"__{_name}__", _between(_name))


class Peer:
    """One of the two processes, as it speaks with the other.

    A value travels as a table of nodes, so that what stands in it twice, or contains itself, does so on the other side too.

    Args:
        read: the descriptor to read from.
        write: the descriptor to write to.
        judge: whether this is the judge, who trusts nothing that it reads.
        classes: classes that both sides have from the reference; their objects travel as their attributes.
    """

    def __init__(self, read: int, write: int, judge: bool, classes: dict[str, type]):
        self.classes = classes
        self._read, self._write, self._judge = read, write, judge
        self._mine: list[Any] = []  # what the other side holds
        self._theirs: dict[int, Remote] = {}

    # ------------------------------------------------------------------ messages
    def send(self, message: dict[str, Any]) -> None:
        """Send a message."""
        self.send_bytes(json.dumps(message).encode("ascii"))

    def send_bytes(self, data: bytes) -> None:
        """Send what is no message."""
        rest = memoryview(len(data).to_bytes(4, "big") + data)
        while rest:
            rest = rest[os.write(self._write, rest) :]

    def receive(self) -> dict[str, Any]:
        """The next message.

        Raises:
            AnswerError: the other side has gone, or says what makes no sense.
        """
        size = int.from_bytes(self._exactly(4), "big")
        if size > _LONGEST:
            raise AnswerError(f"the answer gave {size:,} bytes")
        try:
            message = json.loads(self._exactly(size))
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            raise AnswerError("the answer broke its channel")
        return message

    def _exactly(self, size: int) -> bytes:
        parts = []
        while size:
            part = os.read(self._read, min(size, 1 << 20))
            if not part:
                raise AnswerError("the answer ended its process")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    # ------------------------------------------------------------------ asking and answering
    def ask(self, op: str, *values: Any) -> Any:
        """Have an operation carried out over there, and return its result."""
        nodes, roots, objects = self._dump(values)
        self.send({"op": op, "nodes": nodes, "roots": roots})
        while True:
            message = self.receive()
            if "op" in message:
                self.answer(message)
                continue
            if "error" in message:
                raise _error(message["error"])
            return self._load(message, objects)[0]

    def answer(self, message: dict[str, Any]) -> None:
        """Carry an operation out, and send its result with what it made of the arguments."""
        try:
            op = message["op"]
            if self._judge and op not in ("call", "iter", "next"):
                raise TypeError(f"{op}: not to be had")
            target, *rest = self._load(message, [])
            objects = self._loaded  # before it asks in its turn
            result = _OPS[op](target, *rest)
            changed = [x for x in objects if type(x) in _MUTABLE.values() or type(x) in self.classes.values()]
            nodes, roots, _ = self._dump((result, *changed), {id(x): i for i, x in enumerate(objects)})
        except BaseException as error:
            names = [kind.__name__ for kind in type(error).__mro__]
            try:
                text = str(error)
            except BaseException:
                text = ""
            self.send({"error": [names, text[:10000]]})
        else:
            self.send({"nodes": nodes, "roots": roots})

    # ------------------------------------------------------------------ values
    def _dump(
        self, values: tuple[Any, ...], given: dict[int, int] | None = None
    ) -> tuple[list[Any], list[int], list[Any]]:
        """Nodes, which of them the values are, and their objects.

        Args:
            values: any.
            given: the objects that the other side gave, by ``id``, with their numbers there.
        """
        nodes: list[Any] = []
        objects: list[Any] = []
        places: dict[int, int] = {}
        todo: list[int] = []

        def place(x: Any) -> int:
            if id(x) not in places:
                places[id(x)] = len(nodes)
                todo.append(len(nodes))
                nodes.append(None)
                objects.append(x)
            return places[id(x)]

        roots = [place(value) for value in values]
        while todo:
            at = todo.pop()
            x = objects[at]
            node = self._node(x, place)
            if given and id(x) in given and (node[0] in _MUTABLE or node[0] == "o"):
                node = ["=", given[id(x)], node]
            nodes[at] = node
        return nodes, roots, objects

    def _node(self, x: Any, place: Callable[[Any], int]) -> list[Any]:
        kind = type(x)
        if x is None or kind is bool or kind is str:
            return ["c", x]
        if kind is int:
            return ["i", hex(x)]
        if kind is float:
            return ["f", x.hex()]
        if kind is complex:
            return ["z", x.real.hex(), x.imag.hex()]
        if kind is bytes or kind is bytearray:
            return ["b" if kind is bytes else "B", x.hex()]
        if kind in _TAGS:
            return [_TAGS[kind], [place(item) for item in x]]
        if kind is dict:
            return ["d", [[place(key), place(value)] for key, value in x.items()]]
        if kind is range:
            return ["r", [hex(x.start), hex(x.stop), hex(x.step)]]
        if issubclass(kind, Remote):
            return ["m", object.__getattribute__(x, "_index")]
        name = kind.__name__
        if self.classes.get(name) is kind:
            return ["o", name, [[attribute, place(value)] for attribute, value in vars(x).items()]]
        if name in _VALUES and kind.__module__ in (_VALUES[name][0], "_" + _VALUES[name][0], "_pydatetime"):
            return ["v", name, [place(value) for value in _VALUES[name][1](x)]]
        if isinstance(x, (type, types.BuiltinFunctionType)):
            name = getattr(x, "__name__", "")
            if getattr(builtins, name, None) is x:
                return ["n", name]
        for base in _BASES:
            if isinstance(x, base):
                plain = x.__pos__() if base in (int, float, complex) else "".join([x]) if base is str else base(x)
                return self._node(plain, place) if type(plain) is base else ["c", None]
        if kind.__module__.partition(".")[0] == "numpy" and hasattr(x, "tolist"):
            return self._node(x.tolist(), place)
        if self._judge and not (callable(x) or hasattr(x, "__next__")):
            raise TypeError(f"a {name} cannot be given to the answer")
        numbers = [i for i, held in enumerate(self._mine) if held is x]
        if not numbers:
            self._mine.append(x)
        return ["h", numbers[0] if numbers else len(self._mine) - 1, isinstance(x, types.CoroutineType)]

    def _load(self, message: dict[str, Any], given: list[Any]) -> list[Any]:
        """The values of a message.

        Args:
            message: what was received.
            given: the objects that this side gave; those that came back changed are changed.

        Raises:
            AnswerError: it makes no sense.
        """
        try:
            return self._loads(message["nodes"], message["roots"], given)
        except (
            ValueError,
            TypeError,
            KeyError,
            IndexError,
            AttributeError,
            RecursionError,
            ArithmeticError,
        ) as error:
            raise AnswerError(f"the answer gave what makes no sense: {type(error).__name__}") from None

    def _loads(self, nodes: list[Any], roots: list[int], given: list[Any]) -> list[Any]:
        objects: list[Any] = [_LATER] * len(nodes)
        contents: list[tuple[Any, list[Any]]] = []
        for at, node in enumerate(nodes):
            old = None
            if node[0] == "=":
                old, node = given[_index(node[1])], node[2]
                if type(old) is not (_MUTABLE.get(node[0]) or self.classes.get(node[1])):
                    raise ValueError("not what was given")
            objects[at] = self._begun(node, old)
            if node[0] in _MUTABLE or node[0] == "o":
                contents.append((objects[at], node))

        def get(at: Any) -> Any:
            at = _index(at)
            if objects[at] is _LATER:
                tag, *rest = nodes[at]
                if tag == "v":
                    module, _ = _VALUES[rest[0]]
                    kind = getattr(importlib.import_module(module), rest[0])
                    made = getattr(kind, "fromisoformat", kind)(*map(get, rest[1]))
                else:
                    made = {"t": tuple, "S": frozenset}[tag](map(get, rest[0]))
                objects[at] = made
            return objects[at]

        # Sets and dictionaries at last: they ask what is put into them for its hash.
        for x, node in sorted(contents, key=lambda pair: pair[1][0] in "sd"):
            _fill(x, node, get)
        self._loaded = objects
        for at in range(len(objects)):
            get(at)
        return [get(at) for at in roots]

    def _begun(self, node: list[Any], old: Any) -> Any:
        """A value without its contents; ``_LATER`` for those that cannot be had without."""
        tag = node[0]
        if tag in "lsdq":
            return _MUTABLE[tag]() if old is None else old
        if tag == "o":
            kind: Any = self.classes[node[1]]
            return kind.__new__(kind) if old is None else old
        if tag == "c" and (node[1] is None or type(node[1]) in (bool, str)):
            return node[1]
        if tag == "i":
            return int(node[1], 16)
        if tag == "f":
            return float.fromhex(node[1])
        if tag == "z":
            return complex(float.fromhex(node[1]), float.fromhex(node[2]))
        if tag == "b":
            return bytes.fromhex(node[1])
        if tag == "B":
            return bytearray() if old is None else old
        if tag == "r":
            return range(*(int(number, 16) for number in node[1]))
        if tag == "m":
            return self._mine[_index(node[1])]
        if tag == "n":
            found = getattr(builtins, node[1])
            if self._judge and not isinstance(found, type):
                raise ValueError("a function of the judge's")
            return found
        if tag == "h":
            index, kind = _index(node[1]), _Awaited if node[2] is True else Remote
            if index not in self._theirs:
                self._theirs[index] = kind(self, index)
            return self._theirs[index]
        if tag in "tSv":
            return _LATER
        raise ValueError("no kind of value")


_LATER: Any = object()


def _index(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise ValueError("not a number of a node")
    return number


def _fill(x: Any, node: list[Any], get: Callable[[Any], Any]) -> None:
    """Give a value its contents."""
    tag = node[0]
    if tag == "B":
        x[:] = bytes.fromhex(node[1])
    elif tag == "o":
        attributes = {str(name): get(at) for name, at in node[2]}
        vars(x).clear()
        vars(x).update(attributes)
    elif tag == "d":
        pairs = [(get(key), get(value)) for key, value in node[1]]
        x.clear()
        x.update(pairs)
    else:
        items = [get(at) for at in node[1]]
        x.clear()
        (x.update if tag == "s" else x.extend)(items)


def _error(said: Any) -> Exception:
    """An exception of the other process, as the nearest one that Python itself has."""
    names, text = said if isinstance(said, list) and len(said) == 2 and isinstance(said[0], list) else ([], "")
    kinds = [getattr(builtins, name, None) for name in names if isinstance(name, str)]
    for name, kind in zip(names, kinds, strict=False):
        if isinstance(kind, type) and issubclass(kind, Exception) and kind is not Exception:
            with contextlib.suppress(TypeError):
                return kind(str(text))
        if name == "Exception":
            break
    return AnswerError(f"{names[0] if names else 'error'}: {text}")


def _run(coroutine: Any) -> Any:
    import asyncio

    return asyncio.run(coroutine)


_OPS: dict[str, Callable[..., Any]] = {
    "call": lambda f, args, kwargs: f(*args, **kwargs),
    "getattr": getattr, "setattr": setattr, "getitem": operator.getitem, "setitem": operator.setitem,
    "delitem": operator.delitem, "len": len, "bool": bool, "str": str, "repr": repr, "iter": iter, "next": next,
    "isinstance": isinstance, "eq": lambda a, b: bool(a == b), "hash": hash, "run": _run,
    **{name: getattr(operator, f"__{name}__") for name in _BETWEEN},
}  # fmt: skip


# ---------------------------------------------------------------------- the answer's process
def _defined(space: dict[str, Any], trusted: list[str]) -> dict[str, type]:
    """The classes that sources of the reference define."""
    import ast  # here, and not where the answer waits for it

    found = {}
    for source in filter(str.strip, trusted):
        with contextlib.suppress(SyntaxError):
            for part in ast.parse(source).body:
                if isinstance(part, ast.ClassDef) and isinstance(space.get(part.name), type):
                    found[part.name] = space[part.name]
    return found


def _enter_domain() -> None:
    """Become a process that may not look into others (Landlock), where the kernel has that."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    rights = (ctypes.c_uint64 * 1)(1 << 6)  # to make devices, which it may not anyway
    libc.prctl(38, *map(ctypes.c_ulong, (1, 0, 0, 0)))
    ruleset = libc.syscall(444, rights, ctypes.c_size_t(8), 0)
    if ruleset >= 0:
        libc.syscall(446, ruleset, 0)
        os.close(ruleset)


def serve(read: int, write: int) -> None:
    """Run the answer, and then what the judge asks for, until it has gone."""
    peer = Peer(read, write, False, {})
    peer.send({"ready": True})
    start = peer.receive()
    sys.path[:] = start["path"]
    with contextlib.suppress(Exception):
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (start["seconds"], start["seconds"]))
    with contextlib.suppress(Exception):
        _enter_domain()
    module = sys.modules["solution"] = types.ModuleType("solution")  # dataclasses look theirs up
    failed: BaseException | None = None
    late = []
    try:
        for i, source in enumerate(start["sources"]):
            try:
                exec(compile(source, "solution.py", "exec"), module.__dict__)
            except NameError:
                if i >= start["trusted"]:
                    raise
                late.append(source)  # a set-up that needs what the answer defines
        for source in late:
            exec(compile(source, "solution.py", "exec"), module.__dict__)
    except BaseException as error:
        failed = error
    peer.classes.update(_defined(module.__dict__, start["sources"][: start["trusted"]]))

    def names(wanted: list[str]) -> dict[str, Any]:
        if failed is not None:
            raise AnswerError(f"{type(failed).__name__}: {failed}")
        return {name: module.__dict__[name] for name in wanted if name in module.__dict__}

    _OPS["names"] = names
    with contextlib.suppress(AnswerError):  # the judge has gone
        while True:
            peer.answer(peer.receive())


# ---------------------------------------------------------------------- the judge's process
def examine(
    program: types.CodeType,
    sources: list[str],
    trusted: list[str],
    tests: list[str],
    entry: str | None,
    seconds: int,
    seal: Any,
) -> NoReturn:
    """Run the tests; write a code for each that passes, and exit with 0 if all of them do.

    Args:
        program: this file.
        sources: what the answer's process runs, those of the reference first.
        trusted: sources of the reference alone, which the tests may use.
        tests: the tests, each a text.
        entry: what the tests are about, if the reference says it.
        seconds: of processor time for the answer.
        seal: a hash object with a key, which makes the codes; that of "none" says that there is no process for the answer.
    """
    import subprocess

    def code(what: bytes) -> None:
        sealed = seal.copy()
        sealed.update(what)
        sys.stdout.write(f"\n{sealed.hexdigest()}\n")
        sys.stdout.flush()

    (inside, write), (read, outside) = os.pipe(), os.pipe()
    try:
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _BOOT, str(inside), str(outside)],
            pass_fds=[inside, outside],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as error:
        code(b"none")
        sys.exit(f"no process for the answer: {error}")
    os.close(inside)
    os.close(outside)
    module = sys.modules["solution"] = types.ModuleType("solution")
    space, passed = module.__dict__, 0
    for text in trusted:
        with contextlib.suppress(Exception):
            exec(compile(text, "solution.py", "exec"), space)
    peer = Peer(read, write, True, _defined(space, trusted))
    count = sum(text in trusted for text in sources)
    start = {"path": sys.path, "seconds": seconds, "sources": sources, "trusted": count}
    try:
        peer.send_bytes(marshal.dumps(program))
        peer.receive()  # it is there; nothing of the answer has run yet
        peer.send(start)
        wanted, modules = _wanted(tests, set(space) - {entry}, entry)
        for name in modules:
            with contextlib.suppress(ImportError):
                space[name] = importlib.import_module(name)
        for i, test in enumerate(tests):
            try:
                space.update(peer.ask("names", wanted))
                exec(compile(test, "test.py", "exec"), space)
            except BaseException as error:
                sys.stderr.write(f"test {i}: {type(error).__name__}: {str(error)[:1000]}\n")
            else:
                passed += 1
                code(b"%d" % i)
    except Exception:  # ours, not the answer's: no test has been run
        code(b"none")
        raise
    finally:
        with contextlib.suppress(OSError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    sys.exit(0 if passed == len(tests) else 1)


def _wanted(tests: list[str], given: set[str], entry: str | None) -> tuple[list[str], list[str]]:
    """Which names the answer has to define, and which modules the tests use without importing them.

    Builtins are the judge's own, whatever the answer calls by their names, unless the tests need nothing else: then the
    answer's function has such a name.
    """
    import ast

    loads: set[str] = set()
    stores: set[str] = set()
    bare: set[str] = set()
    for test in tests:
        with contextlib.suppress(SyntaxError):
            tree = ast.parse(test)
            owners = {id(x.value) for x in ast.walk(tree) if isinstance(x, ast.Attribute)}
            for x in ast.walk(tree):
                if isinstance(x, ast.Name):
                    (loads if isinstance(x.ctx, ast.Load) else stores).add(x.id)
                    if id(x) not in owners:
                        bare.add(x.id)
                elif isinstance(x, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                    stores.add(x.name)
                elif isinstance(x, ast.alias):
                    stores.add(x.asname or x.name.partition(".")[0])
                elif isinstance(x, ast.arg):
                    stores.add(x.arg)
    free = loads - stores - given
    modules = {name for name in free - bare if name in sys.stdlib_module_names}
    own = free - modules - set(dir(builtins))
    if not own and entry is None:
        own = free - modules
    return sorted(own | ({entry} if entry else set())), sorted(modules)
