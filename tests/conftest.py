"""Tokenizers and models that the tests make themselves, and the shared corpus where it is."""

from __future__ import annotations

import collections
import copy
import datetime
import functools
import gc
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
import types
import zlib
from pathlib import Path
from typing import NoReturn

import hypothesis
import pytest

SHARED = Path(os.environ.get("TORCHRL_CHAT_SHARED", "../shared")).resolve()

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# ChatML whose calls are those of Hermes: small, and with everything that tools need.
CALLS_TEMPLATE = (
    "{%- if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    '<tool_call>{"name": <name>, "arguments": <arguments>}</tool_call><|im_end|>\n{% endif %}'
    "{%- for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{%- for c in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
    "<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# A shell that runs the tests in the background has them ignore Ctrl-C, and with them the programs that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Processes of the tests are forked by a server that has one thread and the libraries loaded: one forked by a process with
# many threads, as a worker of pytest is, may wait for ever for a lock that another of them held at that moment.
multiprocessing.set_forkserver_preload(
    [
        *("torchrl_chat.envs", "transformers", "datasets", "pytest", "hypothesis"),
        # The tiny model's and a run's: seconds for each of some thirty processes otherwise.
        *("transformers.models.llama.modeling_llama", "torchrl_chat.recipes.grpo", "matplotlib.figure", "peft"),
    ]
)

# Real families, each with its own tokenizer and template (see corpus/index.json).
CORPUS = (
    "lc_Qwen-Qwen2.5-7B-Instruct",
    "lc_meta-llama-Llama-3.1-8B-Instruct",
    "ax_mistral_v2v3",
    "lc_mistralai-Mistral-Nemo-Instruct-2407",
    "cz_phi-3",
    "lc_microsoft-Phi-3.5-mini-instruct",
    "lc_google-gemma-2-2b-it",
    "ax_deepseek_v2",
)


# An example takes as long as the machine is busy; pytest-timeout ends what hangs. (vLLM's environment has hypothesis, too.)
for profile, examples in (("change", 40), ("all", 100)):
    hypothesis.settings.register_profile(
        profile,
        deadline=None,
        max_examples=examples,
        # What a change is told does not depend on luck; releases try other examples.
        derandomize=profile == "change",
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
hypothesis.settings.load_profile(os.environ.get("TORCHRL_CHAT_EXAMPLES", "change"))  # make test-all says "all"

# What the tests of today's day draw: named in every run, and given again to repeat one.
DAY = os.environ.setdefault("TORCHRL_CHAT_DAY", datetime.datetime.now(datetime.UTC).date().isoformat())


def of_the_day(*values, share: int | None = None) -> list:
    """Parameters of a test, of several names as tuples: by the date, one (or each ``share``-th) for every run, the others for ``make test-all``."""
    day, share = datetime.date.fromisoformat(DAY).toordinal(), min(share or len(values), len(values))
    return [
        v
        if (i - day) % share == 0
        else pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=pytest.mark.full)
        for i, v in enumerate(values)
    ]


def leave_to_other_days(items: list[pytest.Item]) -> None:
    """Of the cases of a test that is marked ``by_day(share, place=0)``, leave each ``share``-th: the others are for other days, and ``make test-all``."""
    day, seen = datetime.date.fromisoformat(DAY).toordinal(), collections.Counter()
    for item in items:
        marks = list(item.iter_markers("by_day"))
        if not marks:
            continue
        test = item.nodeid.partition("[")[0]
        if len(marks) > 1 or len(marks[0].args) != 1 or marks[0].kwargs.keys() - {"place"}:
            raise pytest.UsageError(f"{test}: expected one mark by_day(share, place=...).")
        [share], place = marks[0].args, marks[0].kwargs.get("place", 0)
        if (seen[test] + place - day) % share:
            item.add_marker(pytest.mark.full)
        seen[test] += 1


PARTS = ("corpus", "services", "learn", "openenv", "vllm")


def pytest_terminal_summary(terminalreporter) -> None:
    """How long each part took, one test after the other, and which day the seeds are of."""
    took = dict.fromkeys(("suite", *PARTS), 0.0)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                part = next((part for part in PARTS if part in report.keywords), "suite")
                took[part] += report.duration
    told = ", ".join(f"{part} {seconds:.0f}" for part, seconds in took.items() if seconds)
    terminalreporter.write_line(f"seconds of tests by part: {told}; seeds of the day TORCHRL_CHAT_DAY={DAY}")


def need_shared(relative: str) -> Path:
    """A file of the shared folder, or a skip that says which."""
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"the shared folder has no {relative} (TORCHRL_CHAT_SHARED={SHARED})")
    return path


def skip_without(program: str, reason: str) -> NoReturn:
    """A skip; but a failure where the program must work if it is installed, and it is (.ci/run names such programs)."""
    if program in os.environ.get("TORCHRL_CHAT_REQUIRED", "").split(",") and shutil.which(program):
        pytest.fail(f"{program} is installed here, and yet: {reason}")
    pytest.skip(reason)


_kept: list = []


def while_of_one_template(function):
    """A cache that is emptied when the tests of a template are done: those of all of them take gigabytes."""
    cached = functools.cache(function)
    _kept.append(cached)
    return cached


@functools.cache
def corpus_names() -> frozenset[str]:
    index = SHARED / "corpus" / "index.json"
    return (
        frozenset(entry["template"] for entry in json.loads(index.read_text())) if index.exists() else frozenset()
    )


def template_of(item: pytest.Item | None) -> str:
    """The template of the corpus that a test is about; "" for one that is about none."""
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return next((value for value in values if isinstance(value, str) and value in corpus_names()), "")


def started_once(item: pytest.Item) -> str:
    """The file of a test that uses something of the scope of a file; "" if it uses nothing of the kind."""
    if item.get_closest_marker("xdist_group"):
        return ""
    found = item._fixtureinfo.name2fixturedefs if isinstance(item, pytest.Function) else {}
    ours = [defined[-1] for defined in found.values() if defined[-1].baseid]  # pytest's own have none
    return item.path.stem if any(f.scope in ("module", "session") for f in ours) else ""


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(items: list[pytest.Item]):
    """Tests that share what is dear run one after the other, and on one worker.

    Those of a template, in whichever file: its tokenizer is loaded once. And those of a file that share what it starts
    once: a server, a sandbox, a browser.
    """
    leave_to_other_days(items)
    for item in items:
        if name := template_of(item) or started_once(item):
            item.add_marker(pytest.mark.xdist_group(name))
    yield
    items.sort(key=lambda item: (item.get_closest_marker("learn") is None, template_of(item)))


def pytest_collection_finish() -> None:
    """What the libraries and the tests themselves consist of is not looked at by every collection of garbage."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """What a test draws without a seed of its own is the same in every run of a change; ``make test-all`` tries the day's."""
    drawn = os.environ.get("TORCHRL_CHAT_EXAMPLES", "change")
    seed = zlib.crc32(f"{item.nodeid} {DAY if drawn == 'all' else ''}".encode())
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed)
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(seed)


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if template_of(item) not in ("", template_of(nextitem)):
        for cached in _kept:
            cached.cache_clear()


@functools.lru_cache(maxsize=4)
def _vocabulary(folder: Path):
    """One of the nine tokenizers that the templates share; a copy takes half the time of loading it."""
    from transformers.models.auto import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@while_of_one_template
def corpus_tokenizer(name: str):
    """A real tokenizer with its real chat template."""
    folder = need_shared("corpus/corpus.py").parent
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    import transformers
    from corpus import load

    with pytest.MonkeyPatch.context() as patch:
        copied = types.SimpleNamespace(from_pretrained=lambda folder: copy.deepcopy(_vocabulary(folder)))
        patch.setattr(transformers, "AutoTokenizer", copied)
        return load(name)


def all_corpus() -> list:
    """Every development template, or one skipped parameter where the shared folder is absent."""
    reason = f"no corpus in the shared folder (TORCHRL_CHAT_SHARED={SHARED})"
    return sorted(corpus_names()) or [pytest.param("", marks=pytest.mark.skip(reason=reason))]


@functools.cache
def bpe_tokenizer(template: str = CHATML):
    """A small byte-level BPE, trained on the spot, that can spell any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "the user asks the assistant what is 12 + 30 and the assistant says that the answer is 42 "
    backend.train_from_iterator([text * 5], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|pad|>")
    tokenizer.chat_template = template
    return tokenizer


def stop_of(template) -> int:
    """The token with which a policy ends a plain answer."""
    close = template.close([{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}])
    return close.main[0]


def respond(env, td, texts: list[str]):
    """Write the responses in the form of the environment's input mode."""
    import torch
    from torchrl.modules.llm.policies import Tokens

    from torchrl_chat import columns

    td, batch = td.copy(), env.batch_size
    mode, stop = env.base_env.input_mode, env.base_env.tokenizer.eos_token
    if mode == "text":
        td["text"] = columns.texts("response", [t + stop for t in texts], batch, None)
    elif mode == "history":
        rows = [columns.history_messages([{"role": "assistant", "content": t}]) for t in texts]
        td["history"] = columns.histories("response", rows, batch, None)
    else:
        ids = [torch.tensor(i) for i in env.base_env.template.codec.encode([t + stop for t in texts])]
        td["tokens"] = columns.ragged(Tokens, "response", ids, batch, None)
    return td


def forked(work) -> int:
    """The exit status of a forked copy that does the work; -1 if it hangs."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = 0 if work() else 2
        finally:
            os._exit(status)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -1


@pytest.fixture
def endpoint():
    """An OpenAI-compatible endpoint that answers as ``endpoint.script(body, number of the request)`` says."""
    pytest.importorskip("openai", reason="needs the extra: torchrl_chat[openai]")
    from endpoint_server import serving

    with serving() as server:
        yield server


# Ray asks for a third of the memory otherwise, for every node of the cluster.
OBJECT_STORE = 80 * 2**20


@pytest.fixture(scope="session")
def ray_cluster():
    """A head without room for workers, and two nodes with room for one each; Ray is connected to it."""
    ray = pytest.importorskip("ray", reason="ray is not installed")
    from ray.cluster_utils import Cluster

    alone = pytest.MonkeyPatch()
    # Its monitor kills workers where others have taken the memory of the machine.
    alone.setenv("RAY_memory_monitor_refresh_ms", "0")
    # Its workers step back behind every other process (nice 15): beside two busy ones they would hardly run.
    alone.setenv("RAY_worker_niceness", "0")
    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": OBJECT_STORE}
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    environment = {"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}}
    cluster = None
    try:
        # Ray gives a node 30 seconds to start, which nothing changes: on a busy machine it may need another try.
        for _ in range(3):
            try:
                cluster = Cluster(initialize_head=True, head_node_args=head)
                for _ in range(2):
                    cluster.add_node(num_cpus=1, object_store_memory=OBJECT_STORE)
                break
            except Exception as failure:
                if "timed out during startup" not in str(failure):
                    raise
                if cluster is not None:
                    cluster.shutdown()
                error = failure
        else:
            raise error
        ray.init(address=cluster.address, runtime_env=environment, log_to_driver=False, logging_level="ERROR")
        yield cluster
    finally:
        ray.shutdown()
        if cluster is not None:
            cluster.shutdown()
        alone.undo()


@pytest.fixture
def tokenizer():
    """The small byte-level BPE with ChatML."""
    return bpe_tokenizer()


@pytest.fixture(params=["history", "text", "tokens"])
def mode(request) -> str:
    """Every input mode in turn."""
    return request.param


# ---------------------------------------------------------------------- the web page
@pytest.fixture(scope="module")
def browser():
    from web_pages import chromium_browser

    with chromium_browser() as started:
        yield started


@pytest.fixture
def tab(browser):
    from web_pages import tabs

    with tabs(browser) as opened:
        yield opened


@pytest.fixture(scope="module")
def chat():
    """The address of a server with chats and their page."""
    from web_pages import chat_app, live

    with live(chat_app()) as url:
        yield url


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory):
    """A rollout file of 60 episodes."""
    from web_pages import write_episodes

    return write_episodes(tmp_path_factory.mktemp("rollouts") / "small.jsonl", 60)
