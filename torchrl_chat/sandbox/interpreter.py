"""What runs inside a sandbox: one program after another, in one set of variables.

It talks to the caller over one socket. The code that it runs can reach that socket, and spoil its own result; the
caller treats everything that comes from here as hostile.
"""

from __future__ import annotations

import ast
import atexit
import builtins
import io
import json
import linecache
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from typing import Any, NoReturn

from torchrl_chat.sandbox import wire
from torchrl_chat.sandbox.settings import Settings

_NO_INPUT = "there is no input here: nobody can answer. Put the values into the code."
_Reply = dict[str, Any]


def serve(channel: socket.socket, settings: Settings) -> NoReturn:
    """Run programs until the caller has gone; never returns."""
    me = os.getpid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(_environment(settings))
    tempfile.tempdir = None
    sys.argv = [""]
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = builtins
    outputs = [os.dup(1), os.dup(2)]
    channel.sendall(wire.frame({"ready": True}))
    calls = 0
    while (request := wire.receive(channel)) is not None:
        calls += 1
        token = {"token": request["token"]}
        try:
            _prepare(outputs, request, settings)
            begun = wire.frame({"begun": True, **token})
        except BaseException as error:  # a full disk, no memory, or earlier code that broke what is needed
            text = wire.cut(f"{type(error).__name__}: {error}", settings.output)
            reply = {"status": "not_run", "exit": 1, "error": text, "value": None}
        else:
            if request["kind"] == "shell":
                told: dict[str, Any] = {
                    "words": ["/bin/sh", "-c", request["code"]],
                    "environment": {},
                    "folder": None,
                }
                reply = _program(told, settings.output, channel, begun)
            elif request["kind"] == "command":
                reply = _program(json.loads(request["code"]), settings.output, channel, begun)
            else:
                channel.sendall(begun)
                name = "main.py" if request["last"] else f"cell_{calls}.py"
                reply = _python(request["code"], name, main.__dict__, settings.output, request["last"])
        _flush()
        if os.getpid() != me:
            os._exit(0)  # the code forked, and this is the copy: it must not answer too
        channel.sendall(wire.frame({**reply, **token}))
        if request["last"]:
            os._exit(0)
    os._exit(0)


def _environment(settings: Settings) -> dict[str, str]:
    path = [os.path.dirname(sys.executable), "/usr/bin", "/bin"]
    more = {"PYTHONPATH": os.pathsep.join(settings.packages)} if settings.packages else {}
    return {"HOME": "/tmp", "TMPDIR": "/tmp", "LANG": "C.UTF-8", "PATH": os.pathsep.join(path), **more}


def _prepare(outputs: list[int], request: dict[str, Any], settings: Settings) -> None:
    """Fresh standard streams, and processor time for one more call."""
    for number, fd in enumerate(outputs, 1):
        os.dup2(fd, number)
    text = request["stdin"]
    if text is None:
        fd = os.open("/dev/null", os.O_RDONLY)
    else:
        with tempfile.TemporaryFile() as file:
            file.write(text.encode("utf-8", "replace"))
            file.seek(0)
            fd = os.dup(file.fileno())
    os.dup2(fd, 0)
    os.close(fd)
    # Line by line: what was printed before a deadline is to be seen.
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        raw = os.fdopen(number, "wb" if number else "rb", closefd=False)
        errors = "backslashreplace" if number else "replace"
        stream = io.TextIOWrapper(raw, encoding="utf-8", errors=errors, line_buffering=bool(number))
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    if text is None:
        nobody = sys.stdin

        def no_input(prompt: object = "", /) -> str:
            if sys.stdin is not nobody:  # the code has found itself an input
                return _input(prompt)
            print(prompt, end="", flush=True)
            raise EOFError(_NO_INPUT)

        builtins.input = no_input
    else:
        builtins.input = _input
    try:
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(used.ru_utime + used.ru_stime + (settings.cpu or settings.deadline)) + 2
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    except (ImportError, ValueError, OSError):
        pass  # the code has lowered it for good: then that is what it gets


_input = builtins.input


def _python(code: str, name: str, scope: dict[str, Any], limit: int, last: bool) -> _Reply:
    """Run a program; the value of a last expression is kept as its text."""
    value = None
    try:
        linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
        tree = ast.parse(code, name)
        tail = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, name, "exec", dont_inherit=True), scope)
        if isinstance(tail, ast.Expr):
            result = _value(compile(ast.Expression(tail.value), name, "eval", dont_inherit=True), scope)
            value = None if result is None else repr(result)
        reply = {"status": "ok", "exit": 0, "error": "", "value": value and wire.cut(value, limit)}
    except SystemExit as leaving:
        reply = _leave(leaving.code)
    except BaseException as error:
        reply = {"status": "error", "exit": 1, "error": wire.cut(_describe(error, name), limit), "value": None}
    if last:
        _wind_up()
    return reply


def _value(code: types.CodeType, scope: dict[str, Any]) -> Any:
    return types.FunctionType(code, scope)()


def _wind_up() -> None:
    """What a program does at its end: wait for its threads, and run what it registered."""
    for end in (threading._shutdown, atexit._run_exitfuncs):  # type: ignore[attr-defined]
        try:
            end()
        except BaseException:
            traceback.print_exc()


def _leave(code: Any) -> _Reply:
    if code is None:
        code = 0
    if not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    code &= 0xFF
    error = f"SystemExit: the program ended itself with exit status {code}." if code else ""
    return {"status": "exit" if code else "ok", "exit": code, "error": error, "value": None}


def _describe(error: BaseException, name: str) -> str:
    """A traceback that begins where the user's code does."""
    trace = error.__traceback__
    while trace is not None and not trace.tb_frame.f_code.co_filename.endswith(name):
        trace = trace.tb_next
    if isinstance(error, SyntaxError):
        trace = None
    try:
        shown = traceback.TracebackException(type(error), error, trace, compact=True)
        for part in (shown, shown.__cause__, shown.__context__):
            if part is not None:
                part.stack[:] = [frame for frame in part.stack if frame.filename != __file__]
        return "".join(shown.format()).rstrip("\n")
    except BaseException as second:  # an exception whose own text fails, or takes all memory
        return f"{type(error).__name__} (its traceback cannot be shown: {type(second).__name__})"


def _program(told: dict[str, Any], limit: int, channel: socket.socket, begun: bytes) -> _Reply:
    """Run a program, with the same standard streams."""
    try:
        program = subprocess.Popen(told["words"], env={**os.environ, **told["environment"]}, cwd=told["folder"])
    except (OSError, ValueError) as error:
        text = wire.cut(f"{type(error).__name__}: {error}", limit)
        return {"status": "not_run", "exit": 127, "error": text, "value": None}
    channel.sendall(begun)
    with program:
        code = program.wait()
    text = (
        f"The command ended with exit status {code}." if code > 0 else f"The command was ended by signal {-code}."
    )
    exit_status = code if code >= 0 else 128 - code
    return {"status": "exit" if code else "ok", "exit": exit_status, "error": text if code else "", "value": None}


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BaseException:
            continue  # closed, replaced, or broken by the code
