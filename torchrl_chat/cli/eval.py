"""``torchrl-chat eval``: models on datasets with verified answers, to figures that can be trusted."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torchrl_chat.cli import eval_compare, eval_curve, eval_rescore
from torchrl_chat.cli.eval_plan import single_runs
from torchrl_chat.cli.eval_tasks import make_env, make_policy
from torchrl_chat.endpoint import HIDDEN, shown_url
from torchrl_chat.evaluation.summary import as_table, summed_up
from torchrl_chat.files import plain_name, replacing
from torchrl_chat.gallery import check_name, guide
from torchrl_chat.options import TEMPLATE_HELP, both_spellings, device, named_values, number, whole

DESCRIPTION = """\
Play every row of a dataset, grade the answers as in training, and sum up: accuracy, pass@k, and how sure they are.

  torchrl-chat eval --dataset digits                                     # a tiny random model, nothing is downloaded
  torchrl-chat eval --dataset gsm8k --model Qwen/Qwen2.5-0.5B-Instruct --limit 200
  torchrl-chat eval --dataset math-500 --data math500.jsonl --model FOLDER --samples 8     # pass@ and maj@1, 2, 4, 8
  torchrl-chat eval --dataset rows.jsonl --reward file.py:function --model FOLDER
  torchrl-chat eval --dataset gsm8k --backend endpoint --endpoint http://localhost:8000/v1 --model NAME
  torchrl-chat eval --dataset gsm8k aime --data aime=aime.jsonl --model FOLDER OTHER     # every model on every task, one table
  torchrl-chat eval --resume runs/eval-gsm8k-20260101-120000

  torchrl-chat eval compare RUN RUN       # whether two differ, question by question
  torchrl-chat eval rescore RUN --reward math     # the same answers, another grader
  torchrl-chat eval curve TRAINING_RUN    # all checkpoints of a training run

Written to the output folder: config.json, dataset.json (what tells the rows from others; generated ones themselves),
rollouts.jsonl (an episode a line, see docs/reference/rollouts.md) and summary.json; of several models or tasks, a folder MODEL/TASK each.
Every episode is in the file as soon as its batch is graded. A run that was ended, by Ctrl-C or by kill -9, goes on
where it was: give the same --out again, or --resume FOLDER without anything else. Requests to an endpoint that failed
are made again then. --limit and --samples may be raised, and --batch changed; anything else is another evaluation.

Each episode samples from a seed of its own, so that answers depend neither on the batch nor on an interruption (but an
endpoint samples as it likes). Rows without an answer count as wrong; how many of them were cut at a limit, and how many
ended without marking an answer, is said apart. The interval of the accuracy is Wilson's, with
several answers a question at their effective number (clustered by question, arXiv:2411.00640); pass@k is unbiased
(arXiv:2107.03374), and so is maj@k, the majority of k answers (arXiv:2203.11171); their intervals are from resampled questions.

The exit code is 0 if every episode was graded, 1 if some failed, 2 if the evaluation could not be made, 130 after Ctrl-C."""

_FREE = {"limit", "samples", "batch", "device", "no_tokens"}
"""Settings that may differ when a run goes on."""

_NOT_KEPT = {"out", "resume", "run", "command", "further", "json", "html", "examples", "training", "every"}
"""What is no setting of the evaluation."""


def add_parser(commands: Any) -> None:
    """Add ``eval`` to the commands."""
    parser = commands.add_parser(
        "eval",
        help="measure models on datasets; compare, rescore",
        description=DESCRIPTION,
        epilog=guide(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run_arguments(parser, "runs/eval-DATASET-TIME")
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="go on with the run in this folder")
    parser.set_defaults(run=run, training=None)
    further = parser.add_subparsers(dest="further", title="with what there is", metavar="COMMAND")
    for module in (eval_compare, eval_rescore):
        module.add_parser(further)
    curve = eval_curve.add_parser(further)
    add_run_arguments(curve, "eval-DATASET in the training run's folder")
    curve.set_defaults(run=run, dataset=None, model=None)
    for command in further.choices.values():
        both_spellings(command)


def add_run_arguments(parser: Any, folder: str) -> None:
    """What says which evaluation is meant."""
    task = parser.add_argument_group("dataset")
    task.add_argument(
        "--dataset",
        "--task",
        nargs="+",
        default=["digits"],
        metavar="NAME",
        help="one or several of the tasks below (default: digits)",
    )
    task.add_argument(
        "--data",
        nargs="+",
        metavar="PATH",
        help="a local copy: a folder, or a JSONL, Parquet or CSV file; of several datasets NAME=PATH each",
    )
    task.add_argument("--split", metavar="NAME", help="default: test, where there is one; else train")
    task.add_argument("--reward", metavar="NAME", help="what grades, instead of the task's own verifier; see below")
    task.add_argument(
        "--option",
        action="extend",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="settings of the task; see below",
    )
    task.add_argument(
        "--limit", type=whole(1), metavar="N", help="the first N rows (default: all; 1000 generated ones)"
    )
    task.add_argument(
        "--samples", type=whole(1), default=1, metavar="K", help="answers to each question (default: 1)"
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        nargs="+",
        default=["tiny"],
        metavar="NAME",
        help="tiny (default), a name or a folder of a transformers model, or the model's name at the endpoint; or several",
    )
    model.add_argument("--backend", choices=("transformers", "vllm", "endpoint"), default="transformers")
    model.add_argument(
        "--endpoint",
        nargs="+",
        metavar="URL",
        help="of an OpenAI-compatible server, or one for each model; the key: OPENAI_API_KEY",
    )
    model.add_argument(
        "--api",
        choices=("chat", "completions"),
        default="chat",
        help="what is sent to the endpoint: messages (default), or the token ids of the prompt, with --tokenizer",
    )
    model.add_argument("--tokenizer", metavar="NAME", help="default: the model's; for an endpoint: none")
    model.add_argument("--chat-template", metavar="FILE_OR_NAME", help=TEMPLATE_HELP)
    model.add_argument("--device", type=device, help="default: cuda where there is one, else cpu")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--temperature", type=number(least=0), metavar="T", help="default: 0 (greedy) for one sample, 1 for several"
    )
    sampling.add_argument(
        "--max-new-tokens", type=whole(1), metavar="N", help="where an answer is cut (default: 1024; tiny: 8)"
    )
    sampling.add_argument(
        "--batch", type=whole(1), default=32, metavar="N", help="conversations at once (default: 32)"
    )
    sampling.add_argument(
        "--input-mode",
        choices=("tokens", "text", "history"),
        help="default: tokens; history for an endpoint without a tokenizer",
    )
    sampling.add_argument(
        "--seed", type=int, default=0, help="of sampling, generated rows and shuffled choices (default: 0)"
    )
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, metavar="FOLDER", help=f"default: {folder}")
    output.add_argument(
        "--no-tokens", action="store_true", help="leave token ids and log-probs out of rollouts.jsonl"
    )
    eval_compare.add_report_arguments(output)


def run(arguments: argparse.Namespace) -> int:
    """Play, sum up, and say where the files are; the result is the exit code."""
    if arguments.training is not None:
        eval_curve.of_training(arguments)
    folder = _folder(arguments)
    runs = single_runs(arguments, folder)
    for one in runs:  # what is refused anyway is refused before a model is loaded
        _settle(one)
        check_name(one.dataset, one.data, one.reward, named_values(one.option))
        _compare(one.out, one)
    if len(runs) > 1 and (folder / "rollouts.jsonl").exists():
        raise ValueError(f"{folder} holds one run, and these are {len(runs)}: give another --out.")
    with _policies() as policy_of:
        if len(runs) == 1:
            code, summary = _played(runs[0], policy_of)
            if summary is not None:
                _shown(summary, arguments, folder)
            return code
        _remember(folder, {**_kept(arguments), "runs": list(dict.fromkeys(one.out.parent.name for one in runs))})
        codes = []
        for number_, one in enumerate(runs, 1):
            print(f"{number_} of {len(runs)}: {one.dataset}, {one.label}", file=sys.stderr)
            try:
                codes.append(_played(one, policy_of)[0])
            except (ValueError, KeyError, ImportError, OSError) as error:  # the others are played all the same
                print(f"{one.dataset}, {one.label}: {error.args[0] if error.args else error}", file=sys.stderr)
                codes.append(2)
            if codes[-1] == 130:
                break
    if not any((one.out / "rollouts.jsonl").exists() for one in runs):
        return max(codes)
    eval_compare.show_runs([folder], arguments, details=False)
    if not arguments.json:
        print(f"files in {folder}/; torchrl-chat eval compare {folder} tells more")
    return 130 if 130 in codes else min(1, max(codes))


def _shown(summary: dict[str, Any], arguments: argparse.Namespace, folder: Path) -> None:
    if arguments.html is not None:
        eval_compare.show_runs([folder], arguments, printed=False)
    print(json.dumps(summary, indent=2) if arguments.json else f"{as_table(summary)}\nfiles in {folder}/")


@contextlib.contextmanager
def _policies() -> Iterator[Any]:
    """Makes the policy of a run; the one before is used again where it is the same, else closed."""
    held: list[Any] = [None, None]

    def close() -> None:
        policy, held[:] = held[1], [None, None]
        getattr(policy, "close", lambda: None)()

    def policy_of(arguments: argparse.Namespace) -> Any:
        alphabet = arguments.dataset if arguments.model == "tiny" else None
        key = (arguments.model, arguments.endpoint, alphabet)
        if held[0] != key:
            close()
            held[:] = [key, make_policy(arguments)]
        return held[1]

    try:
        yield policy_of
    finally:
        close()


def _played(arguments: argparse.Namespace, policy_of: Any) -> tuple[int, dict[str, Any] | None]:
    """Play one dataset with one model; the exit code, and the summary if there is an answer."""
    from torchrl_chat.evaluation.playing import DatasetRun
    from torchrl_chat.recipes.progress import Progress

    folder = arguments.out
    policy = policy_of(arguments)
    path = folder / "rollouts.jsonl"
    interrupted = False
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", RuntimeWarning)  # failures are in the summary
        plan = DatasetRun(
            functools.partial(make_env, arguments, policy),
            policy,
            path,
            batch=arguments.batch,
            limit=arguments.limit,
            tokens=not arguments.no_tokens,
            metadata={"policy": arguments.model, "dataset": arguments.dataset},
        )
        stack.callback(plan.close)
        _remember(folder, _kept(arguments))  # written only when the dataset and the model have been opened
        done = plan.total - len(plan.todo)
        if done:
            print(f"going on: {done} of {plan.total} answers are in {path}", file=sys.stderr)
        progress = stack.enter_context(Progress("eval", plan.total, done=done, unit="answer"))
        right = count = 0
        try:
            for played in plan:
                count += len(played)
                right += sum(bool(episode["success"]) and not episode["error"] for episode in played)
                progress.add({"right": right / count}, len(played))
        except KeyboardInterrupt:
            interrupted = True
    if interrupted and not path.exists():
        print("interrupted before there was an answer", file=sys.stderr)
        return 130, None
    summary = {"dataset": arguments.dataset, "model": arguments.model, "samples": arguments.samples}
    summary |= summed_up(path, arguments.limit, arguments.samples) | {"missing": len(plan.todo)}
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    if interrupted:
        return 130, summary
    return (1 if summary["errors"] or summary["grade_failures"] else 0), summary


# ---------------------------------------------------------------------- settings
def _folder(arguments: argparse.Namespace) -> Path:
    """The output folder; for ``--resume``, the settings are those of its run."""
    resume = getattr(arguments, "resume", None)
    if resume is None:
        name = plain_name(arguments.dataset[0]) + "-" if len(arguments.dataset) == 1 else ""
        return arguments.out or Path("runs") / f"eval-{name}{time.strftime('%Y%m%d-%H%M%S')}"
    folder: Path = resume
    if arguments.out not in (None, folder):
        raise ValueError(f"--resume {folder} and --out {arguments.out} are two folders: give one.")
    settings = _settings_of(folder)
    if "rescored" in settings:
        raise ValueError(
            f"--resume {folder}: these answers were rescored; go on with {settings['rescored']['run']}."
        )
    for key, value in settings.items():
        value = [value] if key in _SEVERAL and isinstance(value, str) else value
        if key == "endpoint" and value is not None and any(HIDDEN in url for url in value):
            if _shown_urls(arguments.endpoint) != value:
                raise ValueError(
                    f"--resume {folder}: the password of {', '.join(value)} is not kept: give --endpoint again."
                )
            continue
        setattr(arguments, key, value)
    return folder


_SEVERAL = ("dataset", "data", "model", "endpoint")


def _shown_urls(given: Any) -> Any:
    return [shown_url(url) for url in given] if isinstance(given, list) else shown_url(given)


def _settings_of(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        settings = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"--resume {folder}: there is no run in this folder ({path} is missing).") from None
    except ValueError as error:
        raise ValueError(_DAMAGED.format(path=path, error=error)) from None
    if not isinstance(settings, dict):
        raise ValueError(
            _DAMAGED.format(path=path, error=f"it holds a {type(settings).__name__}, not settings by name")
        )
    return settings


_DAMAGED = (
    "{path} is damaged ({error}): what the evaluation was begun with is not known. Put the file back; or, if you are sure that "
    "the settings are the same, delete it, and give them with --out."
)


def _settle(arguments: argparse.Namespace) -> None:
    """Fill in the defaults that depend on other settings, and refuse what does not fit together."""
    if arguments.temperature is None:
        arguments.temperature = 0.0 if arguments.samples == 1 else 1.0
    if arguments.max_new_tokens is None:
        arguments.max_new_tokens = 8 if arguments.model == "tiny" else 1024
    if arguments.input_mode is None:
        bare = arguments.backend == "endpoint" and arguments.tokenizer is None
        arguments.input_mode = "history" if bare else "tokens"
    if arguments.samples > 1 and arguments.temperature == 0:
        raise ValueError(
            f"--samples {arguments.samples} at --temperature 0 asks for the same answer again: raise it."
        )
    if arguments.endpoint is not None and arguments.backend != "endpoint":
        raise ValueError(f"--endpoint {shown_url(arguments.endpoint)} needs --backend endpoint.")
    if arguments.model == "tiny" and arguments.backend != "transformers":
        raise ValueError(f"--backend {arguments.backend} needs --model: tiny is made on the spot for transformers.")


def _kept(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings that are written; of an address, not what it holds of a password."""
    settings = {key: value for key, value in vars(arguments).items() if key not in _NOT_KEPT and key != "label"}
    return {**settings, "endpoint": _shown_urls(arguments.endpoint)}


def _compare(folder: Path, arguments: argparse.Namespace) -> None:
    """Refuse a folder that holds another evaluation."""
    if not (folder / "config.json").exists():
        return
    before, settings = _settings_of(folder), _kept(arguments)
    differs = [key for key in settings if key not in _FREE and before.get(key, settings[key]) != settings[key]]
    if differs:
        key = differs[0]
        raise ValueError(
            f"{folder} holds an evaluation with --{key.replace('_', '-')} {before[key]}, not {settings[key]}: give another --out, or "
            "the same settings."
        )


def _remember(folder: Path, settings: dict[str, Any]) -> None:
    """Write the settings."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    with replacing(path) as file:
        file.write((json.dumps(settings, indent=2) + "\n").encode())
