"""Code graded by its unit tests: which program is run, and what its output says. Not how it is run.

What a model writes must not run in this process, nor on this machine without a sandbox: the runner is given, there is
none by default.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import math
import os
import re
import secrets
import threading
import time
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torchrl_chat.rewards import exam
from torchrl_chat.rewards.verdict import Verdict


class RunResult(NamedTuple):
    """What became of a program that was run."""

    ok: bool
    """Whether it ended by itself, with exit status 0."""
    output: str
    """What it wrote to its standard output, also where it was stopped."""
    error: str = ""
    """What it wrote to its standard error, or why it was stopped."""
    ran: bool = True
    """Whether it was begun at all: what never ran (no room, too long) is no wrong answer, but a failed grade."""


Runner = Callable[[str, float], RunResult]
"""``runner(program, deadline)`` runs a Python program in isolation, for at most ``deadline`` seconds, without input. It
is called in several threads at once."""


@dataclass(frozen=True)
class CodeVerifier:
    """Right if the response's code passes all unit tests of the reference.

    The code is the last fenced Python block of the response, or its last fenced block, or all of it. The reference is a
    mapping with tests of one of these kinds:

    ==========================================  ============================================================
    ``{"test", "entry_point"}``                 HumanEval: ``test`` defines ``check(candidate)``. With ``"prompt"``,
                                                the code may go on from the prompt, or use what it defines
    ``{"test_list"}``                           MBPP: assert statements; ``"test_setup_code"`` or ``"test_imports"``
                                                goes before them
    ``{"inputs", "outputs"}``                   standard input and the standard output that it must give; white space
                                                at the ends of lines and of the text does not count
    ==========================================  ============================================================

    Called, it grades in a thread and returns an awaitable, so that a :class:`~torchrl_chat.rewards.Grader` has several
    programs running at once: twice as many as there are cores, in all of the process. :meth:`grade` waits.

    The tests run in a process that the answer is not in (see :mod:`torchrl_chat.rewards.exam`): its functions are called
    over a pipe, and give plain data, which the tests' own process compares. So an answer that leaves the process early,
    replaces builtins, modules or exceptions, prints what passing programs print, or returns objects that equal everything
    passes none. What is compared as text, ``{"inputs", "outputs"}``, is compared here.

    What a test asks of an *object* of the answer's own class (attributes, items, length, truth, equality with another one) is
    what the answer says, as is what it gives for a name that the tests use and nobody else defines. An answer that knows
    the expected values passes; its process cannot look into the one with the tests where the kernel has Landlock (Linux 5.13)
    and the runner allows it, as :class:`~torchrl_chat.sandbox.Sandbox` does. Elsewhere it may find the tests in there, and
    make up a share (``partial``), but not a whole. A list that a function changes in place is changed; arguments and results
    are copies otherwise.

    Args:
        runner: runs a program: ``runner(program, deadline) -> RunResult``. It has to isolate it, to kill it at the
            deadline, and to bound its memory and its output. What it raises is raised here.
        partial: score the share of the tests that pass; otherwise all or nothing.
        deadline: the seconds for all tests of one response together. Called, the verifier leaves a part of them (a fifth, at
            most 1 s) to the runner, to end what it runs and report it.

    Raises:
        TypeError: there is no runner.
        ValueError: the deadline is not positive.

    Example:
        >>> def runner(program, deadline):  # a real one starts a sandbox
        ...     return RunResult(False, "", "no sandbox")
        >>> CodeVerifier(runner).grade("def f(): return 1", {"test_list": ["assert f() == 1"]}).score
        0.0
    """

    components: ClassVar[tuple[str, ...]] = ("tests_passed",)

    runner: Runner | None = None
    partial: bool = False
    deadline: float = 10.0

    def __post_init__(self) -> None:
        if not callable(self.runner):
            raise TypeError(
                f"CodeVerifier(runner={self.runner!r}): expected a callable (program: str, deadline: float) -> RunResult "
                "that runs a program in a sandbox. There is no default: code of a model is not run unprotected."
            )
        if not self.deadline > 0:
            raise ValueError(f"deadline={self.deadline}: expected a positive number of seconds.")

    def __call__(self, response: str, reference: Mapping[str, Any]) -> Awaitable[Verdict]:
        """Grade one response in a thread of its own.

        It is begun right here, after waiting for a free thread, and not when it is awaited: so the time that a row waits
        for others does not count as its own.

        Raises:
            ValueError: (as do the others, when it is awaited) the reference holds no tests of a known kind.
            TypeError: the runner returned something else than a ``RunResult``.
            TimeoutError: the runner does not keep its deadlines, and blocks all threads.
        """
        slots, seconds = _slots, self.deadline - min(self.deadline / 5, 1.0)
        if not slots.acquire(timeout=10 * self.deadline + 60):
            raise TimeoutError(f"no thread became free: the runner {self.runner!r:.80} does not keep its deadline.")
        future: Future[Verdict] = Future()

        def work() -> None:
            try:
                future.set_running_or_notify_cancel()
                future.set_result(self._graded(response, reference, seconds))
            except BaseException as error:  # for whoever waits
                future.set_exception(error)
            finally:
                slots.release()

        threading.Thread(target=work, name="torchrl_chat.code", daemon=True).start()
        return _Running(future)

    def grade(self, response: str, reference: Mapping[str, Any]) -> Verdict:
        """Grade one response here and now; raises what the call raises."""
        return self._graded(response, reference, self.deadline)

    def _graded(self, response: str, reference: Mapping[str, Any], seconds: float) -> Verdict:
        code = extract_code(response)
        pairs = isinstance(reference, Mapping) and {"inputs", "outputs"} <= reference.keys()
        count = self._pairs if pairs else self._tests
        try:
            passed, total = count(code, reference, seconds)
        except _NotRun as error:
            return Verdict(0.0, code if code.strip() else None, False, {}, f"error: {error}")
        correct = passed == total
        score = passed / total if self.partial else float(correct)
        return Verdict(score, code if code.strip() else None, correct, {"tests_passed": passed / total})

    def _tests(self, code: str, reference: Mapping[str, Any], seconds: float) -> tuple[int, int]:
        sources, tests = assemble(code, reference)
        key = secrets.token_bytes(16)
        named = "test" in reference and "entry_point" in reference
        entry = str(reference["entry_point"]) if named else None
        trusted = [str(reference.get("prompt") or "") if named else _set_up(reference)]
        arguments = (sources, trusted, tests, entry, math.ceil(seconds) + 1)
        program = _TESTS.format(source=inspect.getsource(exam), arguments=arguments, key=key)
        result = self._run(program, seconds)
        lines = set(result.output.split("\n"))
        if _code(key, b"none") in lines:
            raise _NotRun(f"there was no process for the answer: {result.error.strip()[-300:]}")
        passed = sum(_code(key, b"%d" % i) in lines for i in range(len(tests)))
        # The judge ends with 0 if all have passed, and only then: what else says so is made up.
        return passed if bool(result.ok) == (passed == len(tests)) else 0, len(tests)

    def _pairs(self, code: str, reference: Mapping[str, Any], seconds: float) -> tuple[int, int]:
        inputs, outputs = _texts(reference, "inputs"), _texts(reference, "outputs")
        if len(inputs) != len(outputs):
            raise ValueError(f"the reference has {len(inputs)} 'inputs' and {len(outputs)} 'outputs'.")
        passed, end = 0, time.monotonic() + seconds
        for given, expected in zip(inputs, outputs, strict=True):
            left = end - time.monotonic()
            if left <= 0:
                break
            result = self._run(_MAIN.format(source=code, given=given), left)
            if result.ok and _lines(result.output) == _lines(expected):
                passed += 1
            elif not self.partial:
                break
        return passed, len(inputs)

    def _run(self, program: str, deadline: float) -> RunResult:
        assert self.runner is not None
        result = self.runner(program, deadline)
        if not (isinstance(getattr(result, "output", None), str) and hasattr(result, "ok")):
            raise TypeError(f"the runner returned {result!r:.80}: expected a RunResult(ok, output, error).")
        if not getattr(result, "ran", True):
            raise _NotRun(f"the program was not run: {getattr(result, 'error', '')}")
        return result


class _NotRun(Exception):
    """The runner could not run a program, whatever is in it."""


# The code and the tests are texts in the program, each compiled by itself: a syntax error in one is not one of the
# program, and ``from __future__`` may open any of them.
_TESTS = """\
import hashlib
program = compile({source!r}, "exam.py", "exec", optimize=2)
exec(program)
examine(program, *{arguments!r}, hashlib.blake2b(key={key!r}, digest_size=16))
"""


def _code(key: bytes, what: bytes) -> str:
    return hashlib.blake2b(what, key=key, digest_size=16).hexdigest()


# The input is put in both places where programs look for it: sys.stdin and file descriptor 0.
_MAIN = """\
import io, os, sys, tempfile, types
given = {given!r}.encode()
try:
    file = tempfile.TemporaryFile()
    file.write(given)
    file.seek(0)
    os.dup2(file.fileno(), 0)
except OSError:
    pass
sys.stdin = io.TextIOWrapper(io.BytesIO(given), encoding="utf-8")
module = sys.modules["__main__"] = types.ModuleType("__main__")
exec(compile({source!r}, "solution.py", "exec"), module.__dict__)
"""


class _Running:
    """A grade that a thread works on."""

    def __init__(self, future: Future[Verdict]):
        self.future = future

    def __await__(self) -> Generator[Any, None, Verdict]:
        return asyncio.wrap_future(self.future).__await__()


_slots: threading.BoundedSemaphore


def _new_slots() -> None:
    global _slots
    _slots = threading.BoundedSemaphore(2 * (os.cpu_count() or 2))


_new_slots()
os.register_at_fork(after_in_child=_new_slots)  # those that the parent's threads hold stay held in a copy


def assemble(code: str, reference: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What is run before the tests, and the tests.

    Args:
        code: the code that was extracted.
        reference: a mapping of HumanEval's or MBPP's form.

    Raises:
        ValueError: it is of neither form.

    Example:
        >>> assemble("def f(): return 1", {"test_list": ["assert f() == 1"]})
        (['def f(): return 1'], ['assert f() == 1'])
    """
    if isinstance(reference, Mapping) and "test" in reference and "entry_point" in reference:
        name, prompt = str(reference["entry_point"]), str(reference.get("prompt") or "")
        if not name.isidentifier():
            raise ValueError(f"'entry_point' of the reference is {name!r:.80}: expected the name of a function.")
        defined = re.search(rf"^(?:async[ \t]+)?(?:def|class)[ \t]+{name}\b|^{name}[ \t]*[=:]", code, re.MULTILINE)
        # A prompt is a signature with a docstring, after imports and helpers: a module that runs as it stands.
        sources = [prompt, code] if defined else [prompt + code]
        return [source for source in sources if source], [f"{reference['test']}\n\ncheck({name})\n"]
    if isinstance(reference, Mapping) and "test_list" in reference:
        tests = _texts(reference, "test_list")
        setup = _set_up(reference)
        return [source for source in (setup, code) if source], tests
    keys = sorted(map(str, reference)) if isinstance(reference, Mapping) else type(reference).__name__
    raise ValueError(
        f"the reference has no tests of a known kind: expected 'test' and 'entry_point', 'test_list', or 'inputs' and "
        f"'outputs'; got {keys}."
    )


def _set_up(reference: Mapping[str, Any]) -> str:
    setup = reference.get("test_setup_code") or reference.get("test_imports") or ""
    return setup if isinstance(setup, str) else "\n".join(setup)


# Possessive, so that no line is gone over twice.
_FENCE = re.compile(r"^(?P<indent>[ \t]*+)(?P<fence>`{3,}+|~{3,}+)[ \t]*+(?P<info>[^\s`]*+)[^`\n]*+$", re.MULTILINE)
_PYTHON = re.compile(r"\{?\.?(?:python|py)[\d.]*\}?", re.IGNORECASE)


def extract_code(response: str) -> str:
    """The last fenced block that says it is Python, or else the last fenced block, or else the whole text.

    A fence that is never closed counts up to the end of the text.

    Example:
        >>> extract_code("Like this:\\n```python\\nx = 1\\n```\\nIt prints:\\n```\\n1\\n```")
        'x = 1\\n'
    """
    blocks, opening = list[tuple[re.Match[str], int]](), None
    for fence in _FENCE.finditer(response):
        if opening is None:
            opening = fence
        elif not fence["info"] and fence["fence"].startswith(opening["fence"]):
            blocks.append((opening, fence.start()))
            opening = None
    if opening is not None:
        blocks.append((opening, len(response)))
    if not blocks:
        return response
    opening, end = ([block for block in blocks if _PYTHON.fullmatch(block[0]["info"])] or blocks)[-1]
    lines = response[opening.end() + 1 : end].splitlines(keepends=True)
    return "".join(line.removeprefix(opening["indent"]) for line in lines)


def _texts(reference: Mapping[str, Any], key: str) -> list[str]:
    texts = reference[key]
    if (
        isinstance(texts, str)
        or not isinstance(texts, Sequence)
        or not texts
        or not all(isinstance(t, str) for t in texts)
    ):
        raise ValueError(f"{key!r} of the reference is {texts!r:.80}: expected a list of texts with an entry.")
    return list(texts)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
