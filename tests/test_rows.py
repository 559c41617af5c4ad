"""The values that an environment gets are those of its dataset: JSONL files, lists of rows, Parquet and other Arrow data."""

from __future__ import annotations

import bz2
import gzip
import itertools
import json
import lzma
import os
import pickle
import random
import threading
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pytest
import torch
from conftest import bpe_tokenizer, forked, respond
from datasets import Dataset, load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrl.envs import StepCounter
from torchrl.envs.utils import check_env_specs

from torchrl_chat import (
    CountdownEnv,
    DatasetChatEnv,
    DatasetError,
    GSM8KEnv,
    MATHEnv,
    ReasoningGymEnv,
    RewardTransform,
    columns,
)
from torchrl_chat.cli.main import main
from torchrl_chat.envs import loading, rows
from torchrl_chat.envs.jsonl import JSONRows
from torchrl_chat.envs.loading import load_rows
from torchrl_chat.envs.state import load_state, save_state
from torchrl_chat.rewards.matching import ExactMatch
from torchrl_chat.seeds import EPISODE_KEYS

# Values that a way through Arrow changes, or stops at: most are legal neighbours of one another in one column.
HARD = [
    "007", "42", "1e3", "3.10", "true", "null", "NaN", "", " 5 ", "2024-01-15", "2024-01-15T10:00:00Z", '{"a": 1}', "[1, 2]",
    7, -1, 2**63, 2**70, 0.5, 1e300, True, False, None, [1, "1"], ["2024-01-15"], {"a": "007"}, {"b": None}, [], {}, [[1], "x"],
    "\u2028\u2029\x85", "é\u0000\t\"\\", "\U0001f917",
]  # fmt: skip

USER = {"role": "user", "content": "How much?"}
CALLS = [
    {"name": "add", "arguments": {"a": 2, "b": "007"}},
    {"name": "weather", "arguments": {"city": "Oslo", "day": "2024-01-15", "why": None}},
    {"name": "now", "arguments": {}},
]
# Each row's arguments have keys of their own; a message has keys that others lack.
CONVERSATIONS = [
    [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": "42", "tool_call_id": call["name"]},
        {"role": "user", "content": [{"type": "text", "text": "so?"}]} if i == 1 else USER,
    ]
    for i, call in enumerate(CALLS)
]
# Writes all that a message has, as the templates of many models do.
DUMPING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m.content is string %}{{ m.content }}{% elif m.content %}{{ m.content[0].text }}{% endif %}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"
    "{% if 'tool_call_id' in m %}<of>{{ m.tool_call_id }}</of>{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def jsonl(path: Path, data: list[dict], end: str = "\n") -> Path:
    path.write_text("".join(json.dumps(row) + end for row in data), encoding="utf-8", newline="")
    return path


def filled(data: list[dict]) -> list[dict]:
    """Rows with all columns: what a row lacks is None."""
    keys = dict.fromkeys(key for row in data for key in row)
    return [{key: row.get(key) for key in keys} for row in data]


def same(left: Any, right: Any) -> bool:
    """Equal in type too, all the way down."""
    return json.dumps(left) == json.dumps(right)


def seen(env: DatasetChatEnv, count: int) -> list[dict]:
    """What an environment's first rows are."""
    found: list[dict] = []
    while len(found) < count:
        td = env.reset()
        names = [key for key in td.keys() if key in env.primer.primers.keys() and key not in EPISODE_KEYS]
        values = {name: columns.read_objects(td.get(name), td.batch_size) for name in names}
        found += [{name: values[name][i] for name in names} for i in range(td.batch_size[0])]
    return found[:count]


def make(dataset: Any, mode: str = "tokens", template: str | None = None, **kwargs: Any) -> DatasetChatEnv:
    tokenizer = bpe_tokenizer(template) if template else bpe_tokenizer()
    return DatasetChatEnv(
        dataset=dataset, tokenizer=tokenizer, input_mode=mode, **{"seed": 0, "shuffle": False, **kwargs}
    )


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
    | st.sampled_from([value for value in HARD if isinstance(value, str)]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
json_rows = st.lists(
    st.dictionaries(st.sampled_from(["query", "answer", "hint", "kwargs", "text"]), json_values, min_size=1),
    min_size=1,
    max_size=6,
)


class TestValues:
    @settings(max_examples=60, deadline=None)
    @given(data=json_rows)
    def test_any_rows(self, data, tmp_path_factory):
        path = jsonl(tmp_path_factory.mktemp("rows") / "r.jsonl", data)
        for source in (str(path), data):
            assert same(list(load_rows(source)), filled(data))
        assert load_rows(path).fingerprint == JSONRows([path]).fingerprint

    @pytest.mark.parametrize("kind", ["list", "jsonl", "gz"])
    @pytest.mark.parametrize("size", [1, 5])
    def test_hard_values_in_an_environment(self, tmp_path, mode, kind, size):
        data = [{"query": f"q{i}", "answer": value} for i, value in enumerate(HARD)]
        data += [{"query": "late", "answer": "x", "hint": "2024-01-15"}]
        source = data if kind == "list" else jsonl(tmp_path / "r.jsonl", data)
        if kind == "gz":
            packed = tmp_path / "r.jsonl.gz"
            packed.write_bytes(gzip.compress(source.read_bytes()))
            source = packed
        env = make(source, mode, num_envs=size, batch_size_dl=4)
        assert same(seen(env, len(data)), filled(data))

    def test_far_behind_in_a_long_file(self, tmp_path):
        """What comes after the first ten megabytes is read like what comes before."""
        data = [{"query": "x" * 50_000, "answer": i} for i in range(230)]
        data += [
            {"query": "q", "answer": "007", "when": "2024-01-15"},
            {"query": [USER], "answer": None, "when": 3},
        ]
        loaded = load_rows(jsonl(tmp_path / "long.jsonl", data))
        assert same(loaded[-2:], filled(data)[-2:])
        assert loaded[0]["when"] is None

    def test_graded_as_the_file_says(self, tmp_path):
        """A text that looks like a number is still compared as text."""
        data = [
            {"query": "code?", "answer": "007"},
            {"query": "n?", "answer": 7},
            {"query": "d?", "answer": "2024-01-15"},
        ]
        env = make(str(jsonl(tmp_path / "r.jsonl", data)), "text", num_envs=3)
        env = env.append_transform(RewardTransform(ExactMatch()))
        td = env.step(respond(env, env.reset(), ["007", "7", "2024-01-15"]))
        assert td["next", "success"].flatten().tolist() == [True, True, True]
        td = env.step(respond(env, env.reset_dataloader().reset(), ["7", "007", "2024-01-15 00:00:00"]))
        assert td["next", "success"].flatten().tolist() == [False, False, False]

    def test_forms_of_json_files(self, tmp_path):
        data = [{"query": "a", "answer": "007"}, {"query": "b", "hint": [1]}]
        texts = {
            "crlf.jsonl": "".join(json.dumps(row) + "\r\n" for row in data),
            "blank.jsonl": "\n\n" + json.dumps(data[0]) + "\n  \n\n" + json.dumps(data[1]),
            "bom.jsonl": "\ufeff" + "\n".join(map(json.dumps, data)),
            "lines.json": "\n".join(map(json.dumps, data)),
            "array.json": json.dumps(data),
            "pretty.json": json.dumps(data, indent=2),
        }
        for name, text in texts.items():
            (tmp_path / name).write_text(text, encoding="utf-8", newline="")
            assert same(list(load_rows(tmp_path / name)), filled(data)), name
        columns_of = {"query": ["a", "b"], "answer": ["007", None]}
        (tmp_path / "columns.json").write_text(json.dumps(columns_of, indent=1))
        assert load_rows(tmp_path / "columns.json")[0] == {"query": "a", "answer": "007"}
        for name, pack in (("r.jsonl.gz", gzip), ("r.jsonl.bz2", bz2), ("r.ndjson.xz", lzma), ("r.json.gz", gzip)):
            (tmp_path / name).write_bytes(pack.compress(texts["bom.jsonl"].encode()))
        names = ["r.jsonl.gz", "crlf.jsonl", "r.ndjson.xz", "r.jsonl.bz2", "r.json.gz", "array.json"]
        assert same(list(load_rows([str(tmp_path / name) for name in names])), filled(data) * 6)
        packed = load_rows([tmp_path / name for name in names[:4]])
        assert same(list(pickle.loads(pickle.dumps(packed))), filled(data) * 4)

    def test_csv_is_text(self, tmp_path):
        (tmp_path / "files").mkdir()
        (tmp_path / "files" / "train.csv").write_text('query,answer\n007,NA\n"a\nb",2024-01-15\n1e3,\n')
        for source in (tmp_path / "files" / "train.csv", tmp_path / "files"):
            assert list(load_rows(source)) == [
                {"query": "007", "answer": "NA"},
                {"query": "a\nb", "answer": "2024-01-15"},
                {"query": "1e3", "answer": ""},
            ]

    def test_folders_of_json(self, tmp_path):
        """Splits and configurations are found as ``datasets`` finds them; the rows are read here."""
        for split in ("train", "test"):
            folder = tmp_path / "plain"
            folder.mkdir(exist_ok=True)
            jsonl(
                folder / f"{split}.jsonl",
                [{"query": split, "answer": "007"}, {"query": split, "answer": 5, "late": 1}],
            )
        assert same(
            load_rows(tmp_path / "plain", split="test")[0], {"query": "test", "answer": "007", "late": None}
        )
        assert load_rows(tmp_path / "plain", "main")[1]["query"] == "train"
        with pytest.raises(DatasetError, match="no split 'dev': it has train, test"):
            load_rows(tmp_path / "plain", split="dev")
        named = tmp_path / "named"
        named.mkdir()
        for part in ("one", "two"):
            jsonl(named / f"{part}.jsonl", [{"query": part, "answer": "2024-01-15"}])
        configs = "".join(f"\n- config_name: {p}\n  data_files: {p}.jsonl" for p in ("one", "two"))
        (named / "README.md").write_text(f"---\nconfigs:{configs}\n---\n")
        assert list(load_rows(named, "two")) == [{"query": "two", "answer": "2024-01-15"}]

    def test_hub_datasets_of_json(self, tmp_path, monkeypatch):
        """Files that are elsewhere are downloaded by ``datasets``, and read here."""
        data = [{"query": "a", "answer": "007"}, {"query": "b", "answer": [1]}]
        text = "\n".join(map(json.dumps, data)).encode()
        elsewhere = fsspec.filesystem("memory")
        elsewhere.pipe({"/rows/train.jsonl": text, "/rows/test.jsonl.gz": gzip.compress(text)})
        monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", str(tmp_path / "downloads"))
        monkeypatch.setattr(datasets.config, "EXTRACTED_DATASETS_PATH", str(tmp_path / "extracted"))
        files = {"train": "memory://rows/train.jsonl", "test": "memory://rows/test.jsonl.gz"}
        builder = datasets.load_dataset_builder("json", data_files=files, cache_dir=str(tmp_path / "cache"))
        monkeypatch.setattr(datasets, "load_dataset_builder", lambda name, config: builder)
        monkeypatch.setattr(datasets, "load_dataset", None)
        for split in ("train", "test"):
            assert same(list(load_rows("somebody/something", split=split)), data)


class TestConversations:
    """Messages with tool calls of several tools: what one row lacks does not come from another."""

    def shown(self, source: Any, mode: str, size: int) -> list[str]:
        env = make(source, mode, DUMPING, num_envs=size)
        prompts: list[str] = []
        while len(prompts) < len(CONVERSATIONS):
            transcripts = columns.read_objects((td := env.reset()).get("transcript"), td.batch_size)
            prompts += [env.base_env.tokenizer.decode(t.tokens) for t in transcripts]
        return prompts[: len(CONVERSATIONS)]

    @pytest.mark.parametrize("size", [1, 3])
    def test_files_and_lists_as_they_are(self, tmp_path, mode, size):
        data = [{"query": messages, "answer": "1"} for messages in CONVERSATIONS]
        expected = [
            bpe_tokenizer(DUMPING).apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            for messages in CONVERSATIONS
        ]
        assert '"why": null' in expected[1]
        for source in (data, jsonl(tmp_path / "r.jsonl", data)):
            assert self.shown(source, mode, size) == expected

    @pytest.mark.parametrize("size", [1, 3])
    def test_arrow_without_its_padding(self, tmp_path, mode, size):
        """The one null that the data had cannot be told from Arrow's, and goes with them; that is said."""
        plain = [[*messages[:3], USER] for messages in CONVERSATIONS]
        data = [{"query": messages, "answer": "1"} for messages in plain]
        expected = [
            bpe_tokenizer(DUMPING)
            .apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            .replace(', "why": null', "")
            for messages in plain
        ]
        full = Dataset.from_list(data)
        full.to_parquet(str(tmp_path / "r.parquet"))
        full.save_to_disk(str(tmp_path / "saved"))
        for source in (full, tmp_path / "r.parquet", tmp_path / "saved"):
            with pytest.warns(UserWarning, match=r"'query\[\].tool_calls'.*left out.*JSONL"):
                found = self.shown(source, mode, size)
            assert [sorted(text) for text in found] == [
                sorted(text) for text in expected
            ]  # Arrow sorts keys otherwise
            assert not any("null" in text or "None" in text for text in found)

    def test_what_is_no_message_keeps_its_nulls(self):
        """And what has none gives no warning."""
        data = [{"query": "a", "meta": {"x": 1, "y": None}}, {"query": "b", "meta": {"x": None, "y": 2}}]
        with pytest.warns(UserWarning, match=r"'meta.x', 'meta.y'"):
            assert load_rows(Dataset.from_list(data))[0]["meta"] == {"x": 1, "y": None}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load_rows(Dataset.from_list([{"query": [USER], "answer": None}, {"query": [USER], "answer": "x"}]))
            load_rows(Dataset.from_list([{"query": [], "meta": None}, {"query": [USER], "meta": {"x": 1}}]))

    def test_schemas_and_contents(self):
        data = [
            {
                "query": [USER, {"role": "assistant", "content": None, "tool_calls": []}],
                "tools": [],
                "n": {"role": "x"},
            },
            {
                "query": [USER],
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"a": 1}}}],
                "n": None,
            },
            {
                "query": [USER],
                "tools": [{"type": "function", "function": {"name": "g", "parameters": {"b": 1}}}],
                "n": None,
            },
        ]
        with pytest.warns(UserWarning, match="nulls inside dicts"):
            loaded = load_rows(Dataset.from_list(data))
        assert loaded[0]["query"][1] == {"role": "assistant", "content": None, "tool_calls": []}
        assert loaded[2]["tools"][0]["function"]["parameters"] == {"b": 1}

    def test_datasets_that_were_made_from_json(self, tmp_path):
        """What is lost by then is said, with the column."""
        path = jsonl(tmp_path / "r.jsonl", [{"query": "a", "answer": "007"}, {"query": "b", "answer": 5}])
        with pytest.warns(UserWarning, match=r"'answer' were read from JSON by the package datasets"):
            load_rows(load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "c")))
        path = jsonl(tmp_path / "d.jsonl", [{"query": "a", "day": "2024-01-15"}])
        with pytest.warns(UserWarning, match=r"'day' were read from JSON"):
            load_rows(load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "c")))


class TestByNumber:
    """Order, shards and states of JSONL files are those of a list; memory is not."""

    DATA = [
        {"query": f"q{i}", "answer": i if i % 3 else str(i), **({"late": i} if i > 7 else {})} for i in range(11)
    ]

    @settings(max_examples=25, deadline=None)
    @given(
        cuts=st.lists(st.integers(0, 11), max_size=3),
        shuffle=st.booleans(),
        count=st.integers(1, 3),
        repeats=st.integers(1, 2),
        block=st.integers(1, 4),
        taken=st.integers(0, 30),
    )
    def test_as_a_list(self, tmp_path_factory, cuts, shuffle, count, repeats, block, taken):
        folder = tmp_path_factory.mktemp("files")
        bounds = [0, *sorted(cuts), len(self.DATA)]
        files = [
            str(jsonl(folder / f"{i}.jsonl", self.DATA[a:b])) for i, (a, b) in enumerate(itertools.pairwise(bounds))
        ]
        for index in range(count):
            options = {
                "seed": 5, "shuffle": shuffle, "shard": (index, count), "repeats": repeats, "batch_size_dl": block,
                "tokenizer": None,
            }  # fmt: skip
            one, other = (DatasetChatEnv(dataset=source, **options) for source in (files, self.DATA))
            drawn = [env.primer.episodes for env in (one, other)]
            for _ in range(taken):
                assert drawn[0].next() == drawn[1].next()
            again = DatasetChatEnv(dataset=files, **options).primer.episodes
            again.load_state_dict(pickle.loads(pickle.dumps(drawn[0].state_dict())))
            for _ in range(5):
                assert again.next() == drawn[1].next()

    def test_bounded_memory(self, tmp_path):
        """Twenty megabytes are opened, shuffled through and read in less than two."""
        path = tmp_path / "big.jsonl"
        with path.open("w") as file:
            for i in range(2000):
                file.write(json.dumps({"query": f"{i} " + "word " * 2000, "answer": str(i)}) + "\n")
        assert path.stat().st_size > 20e6
        tracemalloc.start()
        try:
            episodes = loading.dataset_episodes(str(path), seed=0, batch_size=8)
            rows_seen = {int(episodes.next()["answer"]) for _ in range(500)}
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert len(rows_seen) == 500
        assert peak < path.stat().st_size / 6

    def test_many_files_and_no_open_ones(self, tmp_path):
        files = [jsonl(tmp_path / f"{i}.jsonl", [{"query": str(i)}]) for i in range(300)]
        before = len(os.listdir("/proc/self/fd"))
        loaded = load_rows(files)
        assert [row["query"] for row in loaded] == [str(i) for i in range(300)]
        assert len(os.listdir("/proc/self/fd")) <= before + 1

    def test_in_forked_and_pickled_copies(self, tmp_path):
        path = jsonl(tmp_path / "r.jsonl", [{"query": str(i) * 50} for i in range(400)])
        packed = tmp_path / "p.jsonl.gz"
        packed.write_bytes(gzip.compress(path.read_bytes()))
        loaded = load_rows([path, packed])
        assert list(pickle.loads(pickle.dumps(loaded))) == list(loaded)

        def read() -> bool:
            order = random.Random(os.getpid()).sample(range(800), 800)
            return all(loaded[i]["query"] == str(i % 400) * 50 for i in order)

        threads_ok: list[bool] = []
        threads = [threading.Thread(target=lambda: threads_ok.append(read())) for _ in range(2)]
        for thread in threads:
            thread.start()
        assert forked(read) == 0
        for thread in threads:
            thread.join()
        assert threads_ok == [True, True]

    def test_files_that_change(self, tmp_path):
        path = jsonl(tmp_path / "r.jsonl", [{"query": f"q{i}"} for i in range(3)])
        loaded, text = load_rows(path), path.read_text()
        path.write_text(text + json.dumps({"query": "more"}) + "\n")
        assert [row["query"] for row in loaded] == ["q0", "q1", "q2"]
        path.write_text(text.replace("q1", "xx"))
        with pytest.raises(DatasetError, match=r"r.jsonl was changed since it was opened"):
            loaded[0]
        path.unlink()
        with pytest.raises(DatasetError, match=r"r.jsonl cannot be read any more"):
            loaded[0]

    def test_numbers(self):
        loaded = load_rows(self.DATA)
        assert loaded[-1] == loaded[10]
        assert loaded[2:4] == [loaded[2], loaded[3]]
        with pytest.raises(IndexError, match="no row 11"):
            loaded[11]


class TestStates:
    def env(self, dataset: Any, **options: Any) -> DatasetChatEnv:
        return DatasetChatEnv(dataset=dataset, seed=1, **options)

    def test_other_rows_are_refused(self, tmp_path):
        data = [{"query": f"q{i}", "answer": str(i)} for i in range(4)]
        changed = [*data[:2], {**data[2], "answer": "two"}, data[3]]
        for name, (before, same_rows, others) in {
            "list": (data, [dict(row) for row in data], changed),
            "file": tuple(str(jsonl(tmp_path / f"{i}.jsonl", d)) for i, d in enumerate((data, data, changed))),
        }.items():
            env = self.env(before)
            env.reset()
            save_state(tmp_path / "s.pt", {"env": env.state_dict()})
            state = load_state(tmp_path / "s.pt")["env"]
            again = self.env(same_rows)
            again.load_state_dict(state)
            assert again.reset()["query"] == env.reset()["query"], name
            with pytest.raises(ValueError, match="as many rows as when the state was saved, and others"):
                self.env(others).load_state_dict(state)

    def test_rows_that_have_no_hash(self):
        env = self.env([{"query": "a", "weight": torch.ones(2)}])
        env.load_state_dict(env.state_dict())

    def test_generated_rows_come_with_the_state(self):
        def made(word: str, task: str = "t") -> DatasetChatEnv:
            data = [{"query": f"{word} {i}", "entry": {"pair": (i, i)}} for i in range(5)]
            return self.env(rows.GeneratedRows(data, {"task": task}), num_envs=2)

        env = made("one")
        env.reset()
        state = pickle.loads(pickle.dumps(env.state_dict()))
        again = made("two")
        again.load_state_dict(state)
        for _ in range(4):
            td, expected = again.reset(), env.reset()
            assert td["query"] == expected["query"]
            assert columns.read_objects(td.get("entry"), td.batch_size)[0]["pair"].__class__ is tuple
        assert pickle.loads(pickle.dumps(again)).reset()["query"] == again.reset()["query"]
        with pytest.raises(ValueError, match=r"another sequence of episodes.*'task': 't'"):
            made("one", "other").load_state_dict(state)
        episodes = env.primer.episodes
        bare = {key: value for key, value in episodes.state_dict().items() if key != "kept"}
        with pytest.raises(ValueError, match="the state has no rows"):
            episodes.load_state_dict(bare)
        with pytest.raises(ValueError, match="reads its rows elsewhere"):
            load_rows([{"query": "a"}]).restore(b"")

    def test_only_plain_values_are_unpickled(self):
        generated = rows.GeneratedRows([{"query": "a"}], {})
        odd = rows.GeneratedRows([{"query": Path("a")}], {})
        with pytest.raises(ValueError, match="no plain value"):
            generated.restore(odd.kept)
        with pytest.raises(ValueError, match="no rows that can be read"):
            generated.restore(b"nothing")
        assert generated[0] == {"query": "a"}


class TestRowsThatDiffer:
    DATA = [
        {"query": "a"},
        {"query": "b", "answer": 2, "meta": {"x": 1}},
        {"query": "c", "answer": "three", "tags": ["x"]},
        {"query": "d", "answer": None, "meta": "none"},
    ]

    @pytest.mark.parametrize("size", [1, 3])
    def test_specs_and_rollouts(self, tmp_path, mode, size):
        for source in (self.DATA, str(jsonl(tmp_path / "r.jsonl", self.DATA))):
            env = make(source, mode, num_envs=size).append_transform(StepCounter(max_steps=2))
            check_env_specs(env, break_when_any_done="both")
            rollout = env.rollout(5, break_when_any_done=False)
            expected = {row["query"]: row for row in filled(self.DATA)}
            for row in rollout.unbind(0):
                for step in row.unbind(0):
                    for key in ("answer", "meta", "tags"):
                        value = step.get(key)
                        value = getattr(value, "data", value)
                        assert same(value, expected[step["query"]][key])

    def test_partial_resets(self):
        env = make(self.DATA, num_envs=2, repeats=1)
        td = env.reset()
        td["_reset"] = torch.tensor([[False], [True]])
        td = env.reset(td)
        assert td["query"] == ["a", "c"]
        assert columns.read_objects(td.get("answer"), td.batch_size) == [None, "three"]

    def test_dataloaders(self):
        """Rows of one batch are filled; a column that comes later has to be told."""
        batches = [self.DATA[:2], self.DATA[2:]]
        env = DatasetChatEnv.from_dataloader(batches, tokenizer=bpe_tokenizer(), batch_size=(2,))
        assert columns.read_objects(env.reset().get("answer"), env.batch_size) == [None, 2]
        with pytest.raises(
            DatasetError, match=r"row 2 of the dataloader has the column\(s\) \['tags'\].*first row lacks"
        ):
            env.reset()
        batches = [[{"query": "a"}], [{"query": "b", "answer": 1}]]
        from torchrl.data import Composite, NonTensor

        primers = Composite(
            {key: NonTensor(shape=(2,), example_data="x") for key in ("query", "answer")}, shape=(2,)
        )
        env = DatasetChatEnv.from_dataloader(batches, tokenizer=bpe_tokenizer(), batch_size=(2,), primers=primers)
        assert columns.read_objects(env.reset().get("answer"), env.batch_size) == [None, 1]

    @pytest.mark.parametrize("value", ["xy", 3, None, torch.tensor(1.0)])
    def test_batches_with_a_column_that_is_none(self, value):
        """A text is no column of characters."""
        with pytest.raises(DatasetError, match="in column 'source': expected a list"):
            DatasetChatEnv.from_dataloader([{"query": ["a", "b"], "source": value}], tokenizer=bpe_tokenizer())


class TestBadFiles:
    def refused(self, tmp_path: Path, content: str | bytes, match: str, name: str = "rows.jsonl") -> None:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(DatasetError, match=match):
            make(str(path))

    def test_a_broken_line_is_named(self, tmp_path):
        good = [json.dumps({"query": f"q{i}"}) for i in range(2000)]
        good[1500] = good[1500][:-3]
        self.refused(
            tmp_path, "\n".join(good), r"(?s)1 line\(s\).*rows.jsonl, line 1501: no JSON.*Correct or delete"
        )
        good[7], good[9], good[11] = "[1]", "", "nonsense"
        good[12] = '"text"'
        self.refused(
            tmp_path,
            "\n".join(good),
            r"(?s)4 line\(s\).*line 8 is a list.*line 12: no JSON.*line 13 is a str.*and 1 more",
        )

    def test_of_several_files(self, tmp_path):
        first = jsonl(tmp_path / "a.jsonl", [{"query": "a"}] * 3)
        (tmp_path / "b.jsonl").write_text('{"query": "b"}\n{"query": }\n')
        with pytest.raises(DatasetError, match=r"b.jsonl, line 2: no JSON"):
            make([first, tmp_path / "b.jsonl"])
        with pytest.raises(DatasetError, match="no such dataset file or folder.*gone"):
            make([str(first), str(tmp_path / "gone.jsonl")])
        (tmp_path / "c.csv").write_text("query\nx\n")
        with pytest.raises(DatasetError, match="several kinds, csv, json"):
            make([str(first), str(tmp_path / "c.csv")])

    def test_other_contents(self, tmp_path):
        self.refused(tmp_path, '{"query": "a"}\n{"query": "b', r"line 2: no JSON")
        self.refused(tmp_path, '{"query": "é"}'.encode("latin-1"), r"line 1: not UTF-8 .*at byte 11")
        self.refused(tmp_path, '{"query": "é"}'.encode("utf-16"), r"line 1: not UTF-8")
        self.refused(tmp_path, '{"query": ' + "[" * 3000 + "]" * 3000 + "}", r"line 1: nested too deeply")
        self.refused(tmp_path, "\n \n", "has no rows")
        self.refused(tmp_path, "", "has no rows")
        self.refused(tmp_path, "[]", "has no rows")
        self.refused(tmp_path, '[{"query": "a"}, 3]', "row 1 of .*rows.jsonl is a int", "rows.jsonl")
        self.refused(tmp_path, '[{"query": "a"},', "rows.json: no JSON.*one array of objects", "rows.json")
        self.refused(tmp_path, '{\n"query": "a"\n}', "one JSON object over several lines", "rows.json")
        self.refused(
            tmp_path, '{\n"query": ["a"], "answer": []\n}', r"columns whose lengths differ, \[0, 1\]", "rows.json"
        )
        self.refused(
            tmp_path, gzip.compress(b'{"query": "a"}' * 99)[:-12], "cannot be read: EOFError", "rows.jsonl.gz"
        )
        self.refused(tmp_path, b'{"query": "a"}', "cannot be read: BadGzipFile", "rows.jsonl.gz")
        self.refused(tmp_path, "query", "suffix '.gz'", "rows.parquet.gz")

    def test_lists(self):
        with pytest.raises(DatasetError, match="row 1 of the list is a str"):
            make([{"query": "a"}, "b"])
        with pytest.raises(DatasetError, match="the key 3: expected strings"):
            make([{"query": "a", 3: "b"}])
        with pytest.raises(DatasetError, match="is a int: expected a name, a path"):
            make(7)
        with pytest.raises(DatasetError, match="IterableDataset.*no numbers.*from_dataloader"):
            make(Dataset.from_list([{"query": "a"}]).to_iterable_dataset())

    def test_tasks_name_what_a_row_has(self):
        with pytest.raises(KeyError, match=r"'math' has no reference.*it has problem\."):
            MATHEnv(dataset=[{"problem": "?"}, {"problem": "!", "answer": "1"}], shuffle=False)


class TestCommandLine:
    def test_eval_reads_the_files_own_values(self, tmp_path):
        """And goes on with the same rows only."""
        data = [
            {"query": "a", "answer": "007"},
            {"query": "b", "answer": 5},
            {"query": "c", "answer": "42", "x": [1, "1"]},
        ]
        path, out = jsonl(tmp_path / "r.jsonl", data), tmp_path / "run"
        command = ["eval", "--dataset", "digits", "--data", str(path), "--max-new-tokens", "2", "--out", str(out)]
        assert main([*command, "--limit", "2"]) == 0
        assert main(command) == 0
        episodes = [json.loads(line) for line in (out / "rollouts.jsonl").read_text().splitlines()]
        assert same([episode["reference"] for episode in episodes], [row["answer"] for row in data])
        jsonl(path, [*data[:2], {**data[2], "answer": "other"}])
        assert main(command) == 2

    def test_eval_goes_on_with_generated_rows(self, tmp_path):
        from torchrl_chat.evaluation.playing import DatasetRun

        made = iter(range(100))

        def env(count: int) -> DatasetChatEnv:
            word = f"w{next(made)}"  # others each time, as a generator's rows may be
            data = [{"query": f"{word} {i}", "answer": str(i)} for i in range(5)]
            env = DatasetChatEnv(
                dataset=rows.GeneratedRows(data, {"task": "t"}), tokenizer=bpe_tokenizer(), input_mode="text",
                num_envs=count, shuffle=False, seed=0,
            )  # fmt: skip
            return env.append_transform(StepCounter(max_steps=1))

        class Policy:
            tokenizer = bpe_tokenizer()

            def __call__(self, td: Any) -> Any:
                td["text"] = columns.texts("response", ["yes"] * len(td), td.batch_size, None)
                return td

        path = tmp_path / "r.jsonl"
        first = DatasetRun(env, Policy(), path, batch=2)
        next(iter(first))
        first.close()
        second = DatasetRun(env, Policy(), path, batch=2)
        assert len(list(second)) == 2
        second.close()
        asked = [json.loads(line)["messages"][0]["content"] for line in path.read_text().splitlines()]
        assert asked == [f"w0 {i}" for i in range(5)]
        (tmp_path / "dataset.json").write_text("{")
        with pytest.raises(ValueError, match=r"dataset.json.*give another --out"):
            DatasetRun(env, Policy(), path, batch=2)


OPTIONS = {
    "history_policy": "template",
    "on_prompt_mismatch": "adopt",
    "system_role": "developer",
    "user_role": "human",
    "policy_role": "bot",
}


@pytest.mark.parametrize(
    "of",
    [
        lambda **options: DatasetChatEnv(dataset=[{"query": "a"}], **options),
        lambda **options: DatasetChatEnv.from_dataloader([{"query": ["a"]}], **options),
        lambda **options: GSM8KEnv(dataset=[{"question": "a", "answer": "#### 1"}], **options),
        lambda **options: GSM8KEnv.from_dataloader([{"query": ["a"], "answer": ["#### 1"]}], **options),
        lambda **options: CountdownEnv(size=2, **options),
        lambda **options: ReasoningGymEnv("gcd", size=2, **options),
    ],
    ids=["dataset", "dataloader", "task", "task-dataloader", "countdown", "reasoning-gym"],
)
def test_options_of_the_chat_environment(of):
    env = of(tokenizer=bpe_tokenizer(), input_mode="text", system_prompt="Be brief.", **OPTIONS)
    assert {key: getattr(env.base_env, key) for key in OPTIONS} == OPTIONS
    following = env.step(respond(env, env.reset(), ["b"]))["next"]
    [transcript] = columns.read_objects(following.get("transcript"), following.batch_size)
    assert [message["role"] for message in transcript.messages] == ["developer", "human", "bot"]
