"""Checkpoints that are there as a whole or not at all, whenever the process is killed.

A checkpoint is a folder ``step-000120`` with the model and its tokenizer, as transformers reads them, and
``state.pt``: optimizer, environment, random states, and whatever else the run needs to go on as if nothing had
happened. It is written under another name, brought to the disk, and then renamed. ``files.json`` has the size and the
CRC-32 of each of its files, so that one that a disk has damaged is found out when it is read. Weights that are no numbers
are never written.

Of a run of several processes the first writes the model, whole, and ``state.pt``, and each its part of the optimizer's state, into
the folder ``optimizer`` (torch.distributed.checkpoint): so one that was written by some processes is read by as many, by
others, or by one. They all see one file system.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchrl_chat import envs, ranks
from torchrl_chat.files import to_disk
from torchrl_chat.learner.adapters import is_adapted, named_adapter, read_adapter, set_adapter
from torchrl_chat.learner.sharding import is_sharded, save_optimizer, set_weights, weights_of
from torchrl_chat.models.small import plain_class
from torchrl_chat.training.updates import NotFiniteError, not_finite

_STATE = "state.pt"
_FILES = "files.json"
OPTIMIZER = "optimizer"
"""The folder of a checkpoint that has the state of an optimizer in parts."""


class DamagedCheckpoint(ValueError):
    """A checkpoint whose files are not what was written; the text names the file."""


def random_states() -> dict[str, Any]:
    """The states of all global generators: Python's, NumPy's, torch's on the CPU and on each CUDA device."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Put the generators back to where :func:`random_states` found them; those of CUDA where their number is the same."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


def save_model(
    path: str | os.PathLike[str],
    model: Any,
    tokenizer: Any,
    state: Mapping[str, Any] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    trained: Any = None,
) -> None:
    """Write a folder with a model, its tokenizer and a state: as a whole or not at all.

    Args:
        path: the folder; it must not exist.
        model: a transformers model; of a PEFT model the adapter is written, and not its base. Where it lies in parts on several
            processes, all of them call this.
        tokenizer: its tokenizer.
        state: what :func:`~torchrl_chat.save_state` takes; none is written if ``None``. Of the first process.
        optimizer: that of a model in parts, whose state is written beside it.
        trained: the module whose weights the optimizer has, if that is more than the model.

    Raises:
        NotFiniteError: a weight, or a number of the state, is NaN or infinite: nothing is written.
        OSError: the folder exists and is not empty, or cannot be written.
    """
    sharded = is_sharded(model)
    given: dict[str, Any] = {"state_dict": weights_of(model, trained=is_adapted(model))} if sharded else {}
    weights = dict(model.named_parameters())
    if sharded:
        weights = {name: whole for name, whole in given["state_dict"].items() if name in weights}
    ranks.agreed(lambda: check_finite(weights, state))
    if is_adapted(model):
        # Of embeddings peft would ask the hub whether they are the base's; they are, unless they are adapted themselves.
        given["save_embedding_layers"] = False
    target = Path(path)
    partial = target.with_name(f".{target.name}.partial")
    if ranks.leads():
        if partial.exists():
            shutil.rmtree(partial)  # a process was killed while it wrote
        partial.mkdir(parents=True)
        model.save_pretrained(partial, **given)
        tokenizer.save_pretrained(partial)
        if state is not None:
            envs.save_state(partial / _STATE, state)
    if sharded and optimizer is not None:
        ranks.together()
        save_optimizer(partial / OPTIMIZER, model if trained is None else trained, optimizer)
    if ranks.leads():
        files = {
            file.relative_to(partial).as_posix(): _summed(file) for file in partial.rglob("*") if file.is_file()
        }
        (partial / _FILES).write_text(json.dumps(files, indent=2) + "\n")
        for file in partial.rglob("*"):
            to_disk(file)
        to_disk(partial)
        os.rename(partial, target)
        to_disk(target.parent)
    ranks.together()


def export_model(path: str | os.PathLike[str], model: Any, tokenizer: Any) -> None:
    """Write a folder with a model and its tokenizer, from one process, in place of one that is there; as a whole or not at all.

    Raises:
        NotFiniteError: a weight is NaN or infinite.
        OSError: it cannot be written.
    """
    check_finite(dict(model.named_parameters()))
    target = Path(path)
    partial = target.with_name(f".{target.name}.partial")
    for old in (partial, target):
        shutil.rmtree(old, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    for file in (*partial.rglob("*"), partial):
        to_disk(file)
    os.rename(partial, target)


def check_finite(weights: Mapping[str, torch.Tensor], state: Mapping[str, Any] | None = None) -> None:
    """Refuse weights, and tensors of a state, that are NaN or infinite.

    Args:
        weights: by name, without buffers, which are no weights: some models keep a mask of infinities there.
        state: what is written beside them.

    Raises:
        NotFiniteError: naming the first such tensor.
    """
    found = not_finite(weights) or not_finite(state or {})
    if found is not None:
        raise NotFiniteError(
            f"{found} holds a NaN or an infinity: no checkpoint is written, and those that are there stay. Go on from the last of "
            "them with a lower learning rate, and look at the rewards and log-probs of the last batches."
        )


def check_files(path: str | os.PathLike[str]) -> None:
    """Compare the files of a checkpoint with what was written.

    A checkpoint without ``files.json``, from before there was one, has its files read as far as that is possible.

    Raises:
        DamagedCheckpoint: a file is missing, has another length or another content.
    """
    folder = Path(path)
    try:
        written = json.loads((folder / _FILES).read_text())
    except FileNotFoundError:
        written = {}
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{folder} is damaged: {_FILES} cannot be read ({error}).") from error
    for name, (size, checksum) in written.items():
        try:
            found = _summed(folder / name)
        except OSError as error:
            raise DamagedCheckpoint(f"{folder} is damaged: {name} cannot be read ({error}).") from error
        if found[0] != size:
            raise DamagedCheckpoint(
                f"{folder} is damaged: {name} has {found[0]:,} bytes, of {size:,} that were written."
            )
        if found[1] != checksum:
            raise DamagedCheckpoint(f"{folder} is damaged: the content of {name} is not what was written.")


def _summed(path: Path) -> list[int]:
    """Length and CRC-32 of a file."""
    checksum, size = 0, 0
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            checksum, size = zlib.crc32(piece, checksum), size + len(piece)
    return [size, checksum]


def load_weights(path: str | os.PathLike[str], model: Any) -> None:
    """Give a model the weights of a folder that :func:`save_model` wrote, in place, in the model's own dtype.

    Raises:
        DamagedCheckpoint: they cannot be read, or are not finite; the model is as it was.
    """
    adapted = is_adapted(model)
    try:
        if adapted:
            weights = trained = read_adapter(path, model)
        else:
            kind = plain_class(model) if is_sharded(model) else type(model)
            stored = kind.from_pretrained(path, dtype=next(model.parameters()).dtype)
            weights, trained = stored.state_dict(), dict(stored.named_parameters())
    except Exception as error:  # of whatever format the weights are
        raise DamagedCheckpoint(f"{path} is damaged: its weights cannot be read ({error}).") from error
    found = not_finite(trained)
    if found is not None:
        raise DamagedCheckpoint(f"{path} is damaged: its weight {found} holds a NaN or an infinity.")
    if is_sharded(model):
        set_weights(model, named_adapter(model, weights) if adapted else weights)
    elif adapted:
        set_adapter(model, weights)
    else:
        model.load_state_dict(weights)


def save_checkpoint(
    folder: str | os.PathLike[str],
    step: int,
    model: Any,
    tokenizer: Any,
    state: Mapping[str, Any],
    optimizer: torch.optim.Optimizer | None = None,
    trained: Any = None,
    *,
    keep: int = 2,
) -> Path:
    """Write the checkpoint of a step, and remove old ones.

    Args:
        folder: where the checkpoints are.
        step: how many steps are done.
        model, tokenizer, state, optimizer, trained: see :func:`save_model`.

    Keyword Args:
        keep: how many are left, the new one included.

    Returns:
        the checkpoint's folder.

    Raises:
        ValueError: ``keep`` is not positive.
    """
    if keep < 1:
        raise ValueError(f"keep={keep}: expected at least 1 checkpoint.")
    path = Path(folder) / f"step-{step:06d}"
    save_model(path, model, tokenizer, state, optimizer, trained)
    if ranks.leads():
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    return path


def load_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The state of a checkpoint. It is a pickle: load only what you trust.

    Raises:
        DamagedCheckpoint: it cannot be read.
    """
    try:
        return envs.load_state(Path(path) / _STATE, "cpu")
    except Exception as error:  # a pickle that was cut may raise anything
        raise DamagedCheckpoint(f"{path} is damaged: {_STATE} cannot be read ({error}).") from error


def checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints in a folder, oldest first.

    Example:
        >>> checkpoints("runs/none")
        []
    """
    found = Path(folder).glob("step-*")
    return sorted((path for path in found if path.name[5:].isdigit()), key=lambda path: int(path.name[5:]))
