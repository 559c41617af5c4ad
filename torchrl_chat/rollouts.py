"""The rollout file: JSONL, a finished episode a line, written by training and evaluation, read by whoever looks at them.

The format is documented in ``docs/reference/rollouts.md``. A line is written as a whole, so a process that is killed leaves at most
one broken line, the last; readers drop it, and the next writer cuts it off. Nothing in an episode can make a line
that is not JSON: numbers that JSON lacks (NaN, infinities) become ``null``, half a surrogate pair is escaped, and
an object that JSON does not know is spelled as text.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from tensordict import TensorDictBase

from torchrl_chat import columns
from torchrl_chat.conversation import Branch, StopReason, Transcript
from torchrl_chat.pieces import TokenPieces
from torchrl_chat.playing import finished_rows
from torchrl_chat.seeds import EPISODE_KEYS

VERSION = 1
"""The version of the format; it changes when a field changes its meaning, not when one is added."""

Streams = Callable[[int, int], Mapping[str, Sequence[float]] | None]
"""What is known of the sampled tokens of a sequence: ``streams(episode, sequence)``."""

_ANSWER = 1000  # characters of an extracted answer that is written
_DEPTH = 64  # levels of nesting that are written; deeper values are spelled as text


def episodes(
    td_next: TensorDictBase,
    tokenizer: Any = None,
    *,
    tokens: bool = True,
    ids: Sequence[str] | None = None,
    metadata: Mapping[str, Any] | None = None,
    streams: Streams | None = None,
) -> Iterator[dict[str, Any]]:
    """The finished rows of a batch, as what a line of the rollout file holds.

    Args:
        td_next: rows with a ``"transcript"`` each: what :func:`~torchrl_chat.playing.play` returned, what a step wrote
            under ``"next"``, or the result of a step (then the root's query and reference are taken along). Of any
            batch size; rewards and reasons are read where they are there.
        tokenizer: for the text of each token; ``None`` leaves the pieces out.

    Keyword Args:
        tokens: whether the token sequences are written: ids, pieces, mask and log-probs. Without them a line is about a
            third as long.
        ids: a name for each episode; random ones if ``None``.
        metadata: what holds for all of them: ``"policy"``, ``"step"`` ...; ``"time"`` is added.
        streams: what a trainer says of the sampled tokens (:meth:`torchrl_chat.learner.Streams.of`): given the number of an
            episode and that of a sequence among those of it in which something was sampled, a number for each of its sampled
            tokens by a stream's name, or ``None``.

    Yields:
        dicts that JSON can spell, in row-major order of the batch.

    Raises:
        KeyError: there is no ``"transcript"``.
        ValueError: there are not as many ``ids`` as episodes, or a stream has not as many numbers as a sequence sampled tokens.

    Example:
        >>> from torchrl_chat import DatasetChatEnv, TransformersPolicy, play
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_model, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> policy = TransformersPolicy(tiny_model(len(tokenizer)), tokenizer, max_new_tokens=4)
        >>> env = DatasetChatEnv(dataset=[{"query": "2 + 2?"}], tokenizer=tokenizer, input_mode="tokens", num_envs=1)
        >>> [episode] = episodes(play(env, policy, max_turns=1), tokenizer)
        >>> episode["version"], episode["stop"]
        (1, 'running')
    """
    td = finished_rows(td_next)
    batch = td.batch_size
    column = td.get("transcript", None)
    if column is None:
        raise KeyError(f"episodes needs 'transcript', the ledger; got the keys {sorted(map(str, td.keys()))}.")
    transcripts: list[Transcript] = columns.read_objects(column, batch)
    if ids is not None and len(ids) != len(transcripts):
        raise ValueError(f"ids has {len(ids)} entries for {len(transcripts)} episodes.")
    spell = TokenPieces(tokenizer) if tokens and tokenizer is not None else None
    shared = {"time": time.time(), **(metadata or {})}

    def read(key: str) -> list[Any]:
        value = td.get(key, None)
        return [None] * len(transcripts) if value is None else columns.read_objects(value, batch)

    def number(key: Any) -> list[Any]:
        value = td.get(key, None)
        return [None] * len(transcripts) if value is None else value.reshape(len(transcripts)).tolist()

    held = td.get("reward_parts", None)
    parts = {} if held is None else {str(key): number(("reward_parts", key)) for key in held.keys()}
    told = (
        "query",
        "answer",
        "grade_failure",
        "extracted",
        "finish_reason",
        "policy_error",
        "env_failure",
        "session_calls",
    )
    read_columns = {key: read(key) for key in told}
    numbered = ("reward", "success", "stop_reason", "done", "terminated", "prompt_differs", *EPISODE_KEYS)
    numbers = {key: number(key) for key in numbered}
    for i, transcript in enumerate(transcripts):
        of = {key: values[i] for key, values in (read_columns | numbers).items()}
        seed, row, epoch, place = (of[key] for key in EPISODE_KEYS)
        stop = StopReason.of(of["stop_reason"], terminated=bool(of["terminated"]), done=bool(of["done"]))
        episode = {
            "version": VERSION,
            "id": uuid.uuid4().hex if ids is None else ids[i],
            "row": row,
            "epoch": epoch,
            "group": None if row is None or epoch is None else f"{epoch}.{row}",
            "place": place,
            "seed": None if seed is None else str(seed),  # of 63 bits; the numbers of JavaScript have 53
            "query": of["query"],
            "reference": of["answer"],
            "messages": transcript.messages,
            "reward": of["reward"],
            "success": of["success"],
            "reward_parts": {name: values[i] for name, values in parts.items()},
            "grade_failure": of["grade_failure"] or None,
            "extracted": extracted(of["extracted"]),
            "stop": (StopReason.ERROR if of["policy_error"] else stop).word,
            "finish_reason": of["finish_reason"],
            "cut": transcript.ended is False,
            "error": of["policy_error"] or None,
            "env_failure": of["env_failure"] or None,
            "prompt_differs": of["prompt_differs"],
            "turns": transcript.turns,
            "sampled_tokens": transcript.total_sampled,
            "total_tokens": len(transcript),
        }
        if tokens:
            scored = transcript.scored
            episode["sequences"] = [sequence(branch, spell, scored) for branch in transcript.sequences]
            trained = [each for each in episode["sequences"] if each["sampled"]]
            for which, each in enumerate(trained):
                each |= _streams_of(each, None if streams is None else streams(i, which))
        if of["session_calls"]:
            episode["calls"] = of["session_calls"]
        yield plain({**episode, "metadata": shared})


def write_rollouts(
    path: str | os.PathLike[str],
    td_next: TensorDictBase,
    tokenizer: Any = None,
    *,
    append: bool = True,
    **options: Any,
) -> int:
    """Write the finished rows of a batch to a rollout file, all of them with one write.

    Args:
        path: the file; it is made if it is not there.
        td_next: the rows, as for :func:`episodes`.
        tokenizer: for the text of each token.

    Keyword Args:
        append: go on behind what the file holds (its last line is cut off where it is broken); else write it anew.
        options: as for :func:`episodes`.

    Returns:
        how many were written.

    Raises:
        OSError: the file cannot be written.

    Example:
        >>> from torchrl_chat import DatasetChatEnv, TransformersPolicy, play
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_model, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> policy = TransformersPolicy(tiny_model(len(tokenizer)), tokenizer, max_new_tokens=4)
        >>> env = DatasetChatEnv(dataset=[{"query": "2 + 2?"}], tokenizer=tokenizer, input_mode="tokens", num_envs=1)
        >>> write_rollouts("rollouts.jsonl", play(env, policy, max_turns=1), tokenizer, metadata={"step": 3})
        1
    """
    lines = [as_line(episode) for episode in episodes(td_next, tokenizer, **options)]
    write_lines(path, lines, append=append)
    return len(lines)


def as_line(episode: Mapping[str, Any]) -> bytes:
    """An episode as a line of the file, UTF-8, its newline included."""
    text = json.dumps(episode, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # Half a surrogate pair is no UTF-8; JSON and Python spell it alike, \\ud83d, and so do JSON's readers.
    return text.encode("utf-8", "backslashreplace") + b"\n"


def write_lines(path: str | os.PathLike[str], lines: Sequence[bytes], *, append: bool = True) -> None:
    """Write lines, each with its newline, all at once; a broken last line of the file is cut off first."""
    if append:
        mend(path)
    with open(path, "ab" if append else "wb", buffering=0) as file:
        whole = memoryview(b"".join(lines))
        while whole:  # the system may take less than all of it
            whole = whole[file.write(whole) or 0 :]


def mend(path: str | os.PathLike[str]) -> None:
    """Cut off a last line that was not written to its end; complete one that lacks its newline only."""
    if not os.path.exists(path) or not os.path.getsize(path):
        return
    with open(path, "r+b") as file:
        end = file.seek(0, os.SEEK_END)
        start, tail = end, b""
        while start and b"\n" not in tail:
            step = min(start, 1 << 16)
            start = file.seek(start - step)
            tail = file.read(step) + tail
        last = tail[tail.rfind(b"\n") + 1 :]
        if not last:
            return
        try:
            json.loads(last)
        except ValueError:
            file.truncate(end - len(last))
        else:
            file.seek(0, os.SEEK_END)
            file.write(b"\n")


def read_rollouts(
    path: str | os.PathLike[str], *, on_error: Literal["warn", "raise"] = "warn"
) -> Iterator[dict[str, Any]]:
    """The episodes of a rollout file, one by one: the file may be larger than the memory.

    Args:
        path: the file.

    Keyword Args:
        on_error: a line that is no episode (no JSON, no object, of a later version of the format) is left out with a
            ``RuntimeWarning`` that has its number, or raised. A last line that was not written to its end, as a process
            leaves it that is killed, is always left out, with such a warning.

    Raises:
        ValueError: ``on_error`` is neither; or, with ``"raise"``, for the first such line.
        OSError: there is no such file.

    Example:
        >>> from torchrl_chat import DatasetChatEnv, TransformersPolicy, play, write_rollouts
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_model, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> policy = TransformersPolicy(tiny_model(len(tokenizer)), tokenizer, max_new_tokens=4)
        >>> env = DatasetChatEnv(dataset=[{"query": "2 + 2?"}], tokenizer=tokenizer, input_mode="tokens", num_envs=1)
        >>> _ = write_rollouts("read.jsonl", play(env, policy, max_turns=1), tokenizer)
        >>> [episode["success"] for episode in read_rollouts("read.jsonl")]
        [None]
    """
    if on_error not in ("warn", "raise"):
        raise ValueError(f"on_error={on_error!r}: expected 'warn' or 'raise'.")
    with open(path, "rb") as file:
        for place, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield _read(line)
            except ValueError as error:
                if not line.endswith(b"\n"):
                    warnings.warn(
                        f"{path}: the last line, {place}, was not written to its end; it is left out.",
                        RuntimeWarning,
                        stacklevel=2,
                    )
                    return
                message = f"{path}, line {place}: {error}"
                if on_error == "raise":
                    raise ValueError(message) from error
                warnings.warn(f"{message}; it is left out.", RuntimeWarning, stacklevel=2)


def _read(line: bytes) -> dict[str, Any]:
    try:
        episode = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(episode, dict):
        raise ValueError(f"a {type(episode).__name__}, not an episode (an object)")
    version = episode.get("version")
    if not isinstance(version, int) or not 1 <= version <= VERSION:
        raise ValueError(f"its version is {version!r}, this library reads up to {VERSION}")
    return episode


def extracted(answer: Any) -> str | None:
    """An extracted answer as rollouts have it: ``None`` where there is none; a long one (code, or the whole response of a verifier that
    extracts nothing, which is in the messages) is told from others by its beginning and a digest.

    Example:
        >>> extracted("x" * 5000)[-39:]
        '... (5000 characters, 77831c42f099d1a1)'
    """
    if not isinstance(answer, str) or not answer:
        return None
    if len(answer) <= _ANSWER:
        return answer
    digest = hashlib.blake2b(answer.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
    return f"{answer[:60]}... ({len(answer)} characters, {digest})"


# ---------------------------------------------------------------------- one episode
def sequence(branch: Branch, spell: TokenPieces | None, scored: bool) -> dict[str, Any]:
    """One token sequence, compact: the mask as runs, log-probs of sampled tokens only."""
    ids = branch.tokens.tolist()
    written: dict[str, Any] = {"ids": ids, "sampled": runs(branch.mask)}
    sampled = branch.log_probs[branch.mask].tolist()
    written["log_probs"] = _six_digits(sampled) if scored and sampled else None
    if branch.versions:
        written["weight_versions"] = [list(span) for span in branch.versions]
    if spell is not None:
        pieces = spell(ids)
        written["pieces"] = pieces.texts
        if pieces.partial:
            written["bytes"] = {str(place): raw.hex() for place, raw in pieces.partial.items()}
        if pieces.text is not None:
            written["text"] = pieces.text
    return written


def _streams_of(sequence: Mapping[str, Any], told: Mapping[str, Sequence[float]] | None) -> dict[str, Any]:
    """The streams of a sequence as they are written."""
    count = sum(end - start for start, end in sequence["sampled"])
    for name, values in (told or {}).items():
        if len(values) != count:
            raise ValueError(f"the stream {name!r} has {len(values)} numbers for {count} sampled tokens.")
    return {name: _six_digits(values) for name, values in (told or {}).items()}


def _six_digits(values: Sequence[float]) -> list[float]:
    """Float32 has seven, and the last is beyond what two kernels agree on."""
    return [float(f"{value:.6g}") for value in values]


def runs(mask: torch.Tensor) -> list[list[int]]:
    """The stretches where a mask is true, as ``[start, end)``.

    Example:
        >>> import torch
        >>> runs(torch.tensor([False, True, True, False, True]))
        [[1, 3], [4, 5]]
    """
    edges = torch.diff(mask.to(torch.int8), prepend=torch.zeros(1).char(), append=torch.zeros(1).char())
    starts, ends = (edges == 1).nonzero().flatten().tolist(), (edges == -1).nonzero().flatten().tolist()
    return [list(run) for run in zip(starts, ends, strict=True)]


def plain(value: Any, depth: int = 0) -> Any:
    """The value as what JSON knows: NaN and infinities become ``None``, other objects are spelled as text."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if depth < _DEPTH:
        if isinstance(value, Mapping):
            return {
                key if isinstance(key, str) else str(key): plain(inner, depth + 1) for key, inner in value.items()
            }
        if isinstance(value, (list, tuple, set, frozenset)):
            return [plain(inner, depth + 1) for inner in value]
        if isinstance(value, Path):
            return str(value)
        if hasattr(value, "tolist"):  # tensors, arrays, their scalars
            return plain(value.tolist(), depth + 1)
    try:
        return repr(value)[:10_000]
    except Exception:  # an object, or a nesting, that cannot even be spelled
        return f"<{type(value).__name__}>"
