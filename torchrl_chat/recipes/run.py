"""The life of a training run: its folder, progress, metrics, samples and checkpoints, and how it goes on after a kill.

Ctrl-C ends it behind the step that it is in, with a checkpoint.

A step counts when a checkpoint behind it is on the disk. What was written of later steps (:mod:`~torchrl_chat.recipes.books`) is
cut off when the run is resumed (:mod:`~torchrl_chat.recipes.resuming`), and these steps are done again, on the same data.

With several processes (:mod:`torchrl_chat.ranks`) each has a Run, and all call its methods together; the first has the folder,
writes and talks. What they measured is told of all of them.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from tensordict import TensorDictBase

from torchrl_chat import columns, ranks
from torchrl_chat.files import plain_name
from torchrl_chat.learner.adapters import Reference, is_adapted, whole
from torchrl_chat.learner.precision import compute_in
from torchrl_chat.learner.sharding import (
    gathered,
    is_sharded,
    shard,
)
from torchrl_chat.learner.streams import Streams
from torchrl_chat.models.passes import float_type
from torchrl_chat.models.small import plain_class
from torchrl_chat.recipes.books import Books
from torchrl_chat.recipes.checkpoints import (
    export_model,
    load_weights,
    save_model,
)
from torchrl_chat.recipes.interrupts import EXIT, Interrupted, Interrupts
from torchrl_chat.recipes.progress import Progress
from torchrl_chat.recipes.resuming import Kept
from torchrl_chat.recipes.settings import RunConfig
from torchrl_chat.recipes.watching import TOLD, Watch, figures, graders, of_all, peak_memory
from torchrl_chat.seeds import EPOCH, PLACE, ROW


class Run:
    """Counts the steps of a run and keeps its books.

    In ``config.out``:

    - ``config.json``: the settings;
    - ``metrics.jsonl``: a line a step; ``evaluations.jsonl``: a line an evaluation;
    - ``trained.jsonl``: a line a step, ``{"step", "episodes": [[row, epoch, place], ...]}``, every trained episode;
    - ``rollouts.jsonl``: conversations, see ``docs/reference/rollouts.md``;
    - ``checkpoints/step-...``: model and tokenizer as transformers reads them, and the state;
    - ``merged``: with ``config.merge``, the model with its adapter merged, at the end;
    - ``curve.png``: the pass rates, where matplotlib is installed;
    - ``result.json``: the pass rates before and after.

    With ``config.resume`` the last checkpoint (or that of ``config.checkpoint``) is loaded here, into the objects that are given:
    whatever is random stands behind the making of the run. Nothing is cut off before all of it was read.

    Args:
        config: the settings.
        name: the script's, for the folder and the progress bar.

    Keyword Args:
        model: the trained transformers model.
        tokenizer: its tokenizer.
        state: what else the run needs to go on: objects with ``state_dict`` and ``load_state_dict``, by name.
        modules: what is trained beside the model, by name.

    Attributes:
        folder: where everything is.
        step: how many steps are done.
        resumed: whether a checkpoint was loaded.
        skipped: how many optimizer steps were left out because they were not finite.

    Raises:
        ImportError: tqdm is not installed.
        FileExistsError: the folder holds a run, and the settings do not say to resume it.
        BlockingIOError: another process is at this run.
        ValueError: the run was begun with other settings; or its books (config.json, metrics.jsonl ...) are not as they were
            written, or there is no such checkpoint.
        DamagedCheckpoint: the checkpoint cannot be read; the text names one that can.

    Example:
        >>> from torchrl_chat.learner import make_adamw
        >>> from torchrl_chat.recipes.settings import RunConfig
        >>> from torchrl_chat.recipes.tasks import ask, make_env, make_model, make_policy
        >>> config = RunConfig(steps=2, out="run")
        >>> model, tokenizer = make_model(config)
        >>> policy, _ = make_policy(config, model, tokenizer)
        >>> env = make_env(config, tokenizer, 4, 1, seed=0)  # of the evaluation
        >>> state = {"optimizer": make_adamw(model.parameters(), lr=1e-3)}
        >>> run = Run(config, "mine", model=model, tokenizer=tokenizer, state=state)
        >>> for step in run.steps(lambda: ask(env, policy, config)):  # doctest: +ELLIPSIS
        ...     run.log({"loss": 1.0})
        pass rate after 0 steps: ...
    """

    def __init__(
        self,
        config: RunConfig,
        name: str,
        *,
        model: Any,
        tokenizer: Any,
        state: Mapping[str, Any],
        modules: Mapping[str, torch.nn.Module] | None = None,
    ):
        try:
            import tqdm  # noqa: F401
        except ImportError as error:
            raise ImportError("a run needs tqdm: pip install 'torchrl_chat[train]'.") from error
        stamp = time.strftime("%Y%m%d-%H%M%S")
        self.config, self.name, self.model, self.tokenizer, self.state = config, name, model, tokenizer, dict(state)
        named = config.out or f"runs/{name}-{plain_name(config.dataset)}-{stamp}"
        self.folder = Path(ranks.of_the_first(named))
        self._books = Books(self.folder)
        self._kept = Kept(self.folder / "checkpoints", model, tokenizer, self.state, dict(modules or {}))
        ranks.agreed(self._books.take)
        self._logger: Any = None
        self._figures: dict[str, float] = {}
        self._seconds: dict[str, float] = {}
        self._watch = Watch()
        self._graders = graders(self.state.get("env"))
        self._graded = sum(grader.seconds for grader in self._graders)
        self._saved: int | None = None
        self.step = self.skipped = 0
        try:
            self.resumed = self._resume()
        except BaseException:
            self.close()
            raise
        if config.logger and ranks.leads():
            from torchrl.record.loggers import get_logger

            self._logger = get_logger(config.logger, str(self.folder / "logs"), name)

    # ------------------------------------------------------------------ going on
    def _resume(self) -> bool:
        """Load the last checkpoint and cut off what was written behind it; or begin."""
        wanted = self.config.checkpoint
        ranks.agreed(lambda: self._books.check_settings(self.config))
        if wanted is not None and not self.config.resume:
            raise ValueError(f"--checkpoint {wanted} says from where a run goes on: it needs --resume and --out.")
        state = self._kept.restore(wanted, lambda path, state: self._books.check(path, state["sizes"]))
        if state is not None:
            self.step = self._saved = state["step"]
            self.skipped = state.get("skipped", 0)
        if ranks.leads():
            self._books.begin(self.config, None if state is None else state["sizes"])
        return state is not None

    def save(self) -> Path:
        """Write a checkpoint now.

        Raises:
            NotFiniteError: a weight, or a number of the optimizer, is NaN or infinite; the checkpoints that are there stay.
        """
        told = {"skipped": self.skipped} | ({"sizes": self._books.sizes()} if ranks.leads() else {})
        path = self._kept.save(self.step, told, self.config.keep)
        self._saved = self.step
        return path

    # ------------------------------------------------------------------ the steps
    def steps(self, evaluate: Callable[[], TensorDictBase]) -> Iterator[int]:
        """The numbers of the steps that are left.

        A checkpoint is written behind each step that is due, behind the last one, and before the first one, so that what
        came before it (a warm start) need not be done again. At the end the result is written and shown.

        The first Ctrl-C ends the run behind the step that is going on, with a checkpoint; the second at once, without one. An
        evaluation is broken off, and made up for when the run is resumed.

        Args:
            evaluate: asks the questions of the evaluation, and returns the finished conversations.

        Raises:
            SystemExit: with the code 130, behind Ctrl-C and the checkpoint.
        """
        config = self.config
        notice = "Ctrl-C: a checkpoint is written behind this step; once more ends the run at once, without it."
        with Interrupts(notice, ranks.leads()) as interrupts, self._progress() as progress:
            try:
                if self._due() and self.step not in self._evaluated():
                    with self._broken_off(interrupts):
                        self._evaluate(evaluate, aloud=self.step == config.steps)
                if not self.resumed:
                    self.save()
                while self.step < config.steps:
                    interrupts.stop_if_asked(ranks.most)
                    self._start = time.perf_counter()
                    yield self.step
                    self.step += 1
                    if progress is not None:
                        progress.add(self._figures)
                    if self._due():
                        with self._broken_off(interrupts):
                            self._evaluate(evaluate, aloud=self.step == config.steps)
                    if self.step == config.steps or self.step % config.save_every == 0:
                        self.save()
            except Interrupted:
                self._interrupted()
        if ranks.leads():
            self._conclude()
        if config.merge:
            merged, path = whole(self.model), self.folder / "merged"
            ranks.agreed(lambda: export_model(path, merged, self.tokenizer))
        self.close()

    def _progress(self) -> contextlib.AbstractContextManager[Progress | None]:
        if not ranks.leads():
            return contextlib.nullcontext()
        return Progress(self.name, self.config.steps, done=self.step)

    def _broken_off(self, interrupts: Interrupts) -> contextlib.AbstractContextManager[None]:
        """Where Ctrl-C breaks off what goes on; of several processes each would stop at another place, and wait for the others."""
        return interrupts.at_once() if ranks.count() == 1 else contextlib.nullcontext()

    def _conclude(self) -> None:
        """Write the result, and say it."""
        self._books.draw(self.name)
        result = self._books.conclude(self.step, self.skipped)
        print(
            f"pass rate after training: {result['after']:.3f} (before: {result['before']:.3f}); files in {self.folder}/"
        )
        if self.skipped:
            print(f"{self.skipped} optimizer steps were left out: their loss or gradients were not finite")

    def _due(self) -> bool:
        """Whether there is an evaluation where the run stands."""
        every = self.config.eval_every
        return self.step in (0, self.config.steps) or bool(every and self.step % every == 0)

    def _evaluated(self) -> set[int]:
        return ranks.of_the_first(
            {entry["step"] for entry in self._books.evaluations()} if ranks.leads() else set()
        )

    def _interrupted(self) -> NoReturn:
        """End the run between two steps."""
        if self._saved != self.step:
            self.save()
        if not ranks.leads():
            raise SystemExit(EXIT)
        self._books.draw(self.name)
        print(
            f"interrupted behind {self.step} of {self.config.steps} steps, with a checkpoint; --out {self.folder} --resume goes on",
            file=sys.stderr,
        )
        self.close()
        raise SystemExit(EXIT)

    def close(self) -> None:
        """Let others at the folder."""
        self._books.close()

    def _evaluate(self, evaluate: Callable[[], TensorDictBase], aloud: bool = False) -> None:
        with self._whole_model():
            finished = evaluate()
        solved = torch.tensor([float(finished["success"].float().sum()), len(finished)])
        solved, asked = ranks.total(solved).tolist()
        rate = solved / asked
        self._write("evaluations", {"step": self.step, "pass_rate": rate, "conversations": int(asked)})
        self._scalar("evaluation", rate)
        self.say(f"pass rate after {self.step} steps: {rate:.3f}")
        if aloud:
            self.say(conversations(finished[:6], "sample"))

    def log(
        self,
        metrics: Mapping[str, float],
        *,
        finished: TensorDictBase | Sequence[TensorDictBase] = (),
        trained: TensorDictBase | None = None,
        streams: Streams | None = None,
    ) -> None:
        """Write what a step measured.

        Args:
            metrics: numbers by name.

        Keyword Args:
            finished: the step's conversations, in a batch or several, of which some of the first are written and shown; what
                all of them tell of themselves (:func:`~torchrl_chat.recipes.watching.figures`) is logged, too.
            trained: what was trained on, rows with the columns that tell episodes apart; ``None`` if nothing was.
            streams: what the trainer said of the tokens of the training view of all of ``finished``, written beside them.
        """
        step, config = self.step, self.config
        batches = [finished] if isinstance(finished, TensorDictBase) else list(finished)
        metrics = of_all(ranks.everywhere({**(figures(batches) if batches else {}), **metrics}))
        metrics |= self._rate() | self._spent(metrics)
        played = [] if trained is None else episodes(trained)
        self.skipped += int(metrics.get("skipped", 0))
        if not ranks.leads():
            return
        for sentence in self._watch.look(metrics):
            self.say(f"step {step}: {sentence}")
        self._write("metrics", {"step": step, **metrics})
        self._write("trained", {"step": step, "episodes": played})
        if batches:
            self._show(
                batches[0][: config.rollouts], streams, bool(config.show_every) and step % config.show_every == 0
            )
        self._figures = {key: metrics[key] for key in TOLD if key in metrics}
        for key, value in metrics.items():
            self._scalar(key, value)

    @contextlib.contextmanager
    def sampling(self) -> Iterator[None]:
        """Inside, each process can sample as long as it needs, and time is counted as the step's ``"seconds_sampling"``."""
        with self.timed("sampling"), self._whole_model():
            yield

    def _whole_model(self) -> contextlib.AbstractContextManager[None]:
        return gathered(self.model) if self.config.backend == "transformers" else contextlib.nullcontext()

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Inside, time is counted as the step's ``"seconds_NAME"``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def _rate(self) -> dict[str, float]:
        optimizer = self.state.get("optimizer")
        return {} if optimizer is None else {"lr": optimizer.param_groups[0]["lr"]}

    def _spent(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Seconds of the step and of its parts, tokens a second, and what memory was the most so far."""
        parts, self._seconds = self._seconds, {}
        graded, self._graded = self._graded, sum(grader.seconds for grader in self._graders)
        if self._graders:  # while conversations are played
            parts["grading"] = self._graded - graded
            if "sampling" in parts:
                parts["sampling"] -= parts["grading"]
        told = {"seconds": time.perf_counter() - self._start, "memory": ranks.most(peak_memory())}
        told |= {f"seconds_{name}": seconds for name, seconds in parts.items()}
        if parts.get("sampling") and "sampled_tokens" in metrics:
            told["tokens_per_second"] = metrics["sampled_tokens"] / parts["sampling"]
        if parts.get("learning") and "trained_tokens" in metrics:
            told["tokens_per_second_trained"] = metrics["trained_tokens"] / parts["learning"]
        return {name: round(value, 4) for name, value in told.items()}

    def _show(self, finished: TensorDictBase, streams: Streams | None, aloud: bool) -> None:
        from torchrl_chat.rollouts import write_rollouts

        if not len(finished):
            return
        metadata = {"step": self.step, "policy": self.name, "dataset": self.config.dataset}
        told = None if streams is None else streams.of
        write_rollouts(self._books.files["rollouts"], finished, self.tokenizer, metadata=metadata, streams=told)
        if aloud:
            self.say(conversations(finished[:1], f"step {self.step}"))

    def _scalar(self, key: str, value: float) -> None:
        if self._logger is not None:
            self._logger.log_scalar(key, value, step=self.step)

    def say(self, text: str) -> None:
        """Print beside the progress bar."""
        from tqdm import tqdm

        if ranks.leads():
            tqdm.write(text)

    def _write(self, key: str, line: Mapping[str, Any]) -> None:
        if ranks.leads():
            self._books.write(key, line)

    def reference(self) -> Reference:
        """The model as it was before the first step, to be compared with: a frozen copy, or what is under its adapter."""
        if is_adapted(self.model):
            return Reference(self.model)
        if not is_sharded(self.model):
            model = copy.deepcopy(self.model)
            load_weights(self.first_weights(), model)
        else:  # FSDP copies no module
            first = plain_class(self.model).from_pretrained(self.first_weights(), dtype=torch.float32).eval()
            model = compute_in(first.to(self.model.device), float_type(self.model))
        return Reference(shard(model.requires_grad_(False)))

    def first_weights(self) -> Path:
        """The folder with the weights, or those of the adapter, before the first step; a resumed run finds it where it was."""
        path = self.folder / "reference"
        if not self.resumed:
            if ranks.leads():
                shutil.rmtree(path, ignore_errors=True)  # of a run that was killed before its first step
            save_model(path, self.model, self.tokenizer)
        return path


def episodes(td: TensorDictBase) -> list[list[int]]:
    """What tells each episode from others, once: row of the dataset, epoch, place in its group.

    Of several processes all of theirs, in the order of the questions, which they have in turn.
    """
    keys = zip(*(td[name].flatten().tolist() for name in (ROW, EPOCH, PLACE)), strict=True)
    groups = [0] * len(td) if td.get("group", None) is None else td["group"].flatten().tolist()
    played = [(group, key) for key, group in dict(zip(keys, groups, strict=True)).items()]
    parts = ranks.everywhere(played)
    if len(parts) > 1:
        played = sorted(itertools.chain.from_iterable(parts), key=lambda each: each[0])
    return [list(key) for _, key in played]


def conversations(finished: TensorDictBase, title: str) -> str:
    """Finished conversations as text for the terminal."""
    rows = finished.batch_size
    lines = []
    rewards = finished["reward"].flatten().tolist()
    for transcript, reward in zip(columns.read_objects(finished.get("transcript"), rows), rewards, strict=True):
        turns = " | ".join(f"{m['role']}: {str(m['content'])[:300]!r}" for m in transcript.messages)
        lines.append(f"{title}, reward {reward:g}: {turns}")
    return "\n".join(lines)
