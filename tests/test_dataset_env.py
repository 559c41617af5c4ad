"""``DatasetChatEnv``: where rows come from, in which order, how often, and what goes wrong."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from conftest import bpe_tokenizer, respond
from datasets import Dataset, DatasetDict
from tensordict import TensorDict
from torch.utils.data import DataLoader
from torchrl.envs import StepCounter, Transform
from torchrl.envs.utils import check_env_specs
from torchrl.modules.llm.policies import Tokens

from torchrl_chat import (
    ChatEnv,
    DatasetChatEnv,
    DatasetError,
    NumberVerifier,
    RewardTransform,
    UserSimulator,
    columns,
)
from torchrl_chat.envs.loading import load_rows
from torchrl_chat.tiny import last_digit_rows

ROWS = [{"query": f"question {i}", "answer": str(i), "level": i} for i in range(10)]


def make(mode: str = "tokens", dataset=ROWS, **kwargs) -> DatasetChatEnv:
    return DatasetChatEnv(dataset=dataset, tokenizer=bpe_tokenizer(), input_mode=mode, **{"seed": 0, **kwargs})


def drawn(env: DatasetChatEnv, resets: int) -> list[str]:
    return [query for _ in range(resets) for query in env.reset()["query"]]


class TestSources:
    """Every form in which a dataset may be given."""

    def test_list_dataset_and_dataset_dict(self):
        for dataset in (ROWS, Dataset.from_list(ROWS), DatasetDict(train=Dataset.from_list(ROWS))):
            assert sorted(drawn(make(dataset=dataset, num_envs=5), 2)) == [row["query"] for row in ROWS]

    @pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet", "csv"])
    def test_files(self, tmp_path, suffix):
        path = tmp_path / f"rows.{suffix}"
        if suffix == "parquet":
            Dataset.from_list(ROWS).to_parquet(str(path))
        elif suffix == "csv":
            Dataset.from_list(ROWS).to_csv(str(path))
        else:
            path.write_text("\n".join(map(json.dumps, ROWS)))
        assert sorted(drawn(make(dataset=str(path), num_envs=5), 2)) == [row["query"] for row in ROWS]

    def test_folders(self, tmp_path):
        Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
        (tmp_path / "files").mkdir()
        for split in ("train", "test"):
            (tmp_path / "files" / f"{split}.jsonl").write_text(json.dumps({"query": split, "answer": "1"}))
        assert len(drawn(make(dataset=tmp_path / "saved"), 10)) == 10
        assert drawn(make(dataset=tmp_path / "files"), 1) == ["train"]
        assert drawn(make(dataset=tmp_path / "files", split="test"), 1) == ["test"]

    @pytest.mark.parametrize(
        "collate", [lambda rows: rows, lambda rows: {k: [r[k] for r in rows] for k in rows[0]}]
    )
    def test_dataloaders(self, mode, collate):
        loader = DataLoader(Dataset.from_list(ROWS), batch_size=3, collate_fn=collate)
        for env in (
            DatasetChatEnv.from_dataloader(loader, tokenizer=bpe_tokenizer(), input_mode=mode, batch_size=(2,)),
            ChatEnv.from_dataloader(loader, tokenizer=bpe_tokenizer(), input_mode=mode, batch_size=2),
        ):
            assert drawn(env, 6) == [f"question {i % 10}" for i in range(12)]

    def test_dataloader_of_tensordicts(self):
        batches = [TensorDict({"query": ["a", "b"], "weight": torch.arange(2.0)}, batch_size=(2,))]
        env = DatasetChatEnv.from_dataloader(batches, tokenizer=bpe_tokenizer(), batch_size=(2,))
        td = env.reset()
        assert td["query"] == ["a", "b"]
        assert td["weight"].tolist() == [0.0, 1.0]

    def test_columns_of_tensors(self):
        """Of one shape they are one tensor; of several, an object a row, each whole."""
        rows = [{"query": str(i), "pair": [i, i + 1], "many": list(range(i + 1))} for i in range(4)]

        def tensors(batch):
            return {
                "query": [row["query"] for row in batch],
                "pair": [torch.tensor(row["pair"]) for row in batch],
                "many": [torch.tensor(row["many"]) for row in batch],
            }

        env = make(dataset=rows, collate_fn=tensors, num_envs=4, shuffle=False)
        td = env.reset()
        assert td["pair"].tolist() == [[0, 1], [1, 2], [2, 3], [3, 4]]
        found = columns.read_objects(td.get("many"), td.batch_size)
        assert [row.tolist() for row in found] == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]

    def test_text_column_is_the_query(self):
        assert drawn(make(dataset=[{"text": "hello"}]), 1) == ["hello"]

    def test_collate_fn_and_data_key(self):
        rows = [{"problem": "x", "gold": 1}]
        assert drawn(make(dataset=rows, collate_fn=lambda b: {"query": [r["problem"] for r in b]}), 1) == ["x"]
        assert make(dataset=rows, data_key="problem").reset()["problem"] == ["x"]

    def test_messages_as_query(self):
        shots = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ]
        td = make(dataset=[{"query": shots}], num_envs=2).reset()
        assert [len(t.messages) for t in columns.read_objects(td["transcript"], td.batch_size)] == [3, 3]


class TestOrder:
    def test_same_seed_same_order(self, mode):
        orders = [drawn(make(mode, num_envs=3, seed=seed), 6) for seed in (1, 1, 2)]
        assert orders[0] == orders[1] != orders[2]

    def test_every_epoch_has_every_row(self):
        order = drawn(make(num_envs=1), 20)
        assert sorted(order[:10]) == sorted(order[10:]) == sorted(row["query"] for row in ROWS)
        assert order[:10] != order[10:]

    def test_no_shuffle(self):
        assert drawn(make(shuffle=False), 10) == [row["query"] for row in ROWS]

    def test_reset_dataloader_and_set_seed(self):
        env = make(seed=3)
        order = drawn(env, 4)
        assert env.reset_dataloader() is env
        assert drawn(env, 4) == order
        env.set_seed(5)
        assert drawn(env, 4) == drawn(make(seed=5), 4)

    def test_order_does_not_depend_on_global_state(self):
        torch.manual_seed(0)
        first = drawn(make(seed=7), 5)
        torch.manual_seed(1)
        torch.rand(3)
        assert drawn(make(seed=7), 5) == first


class TestRepeats:
    def test_repeats(self):
        order = drawn(make(num_envs=3, repeats=4, shuffle=False), 4)
        assert order == [f"question {i}" for i in range(3) for _ in range(4)]

    def test_group_repeats(self, mode):
        env = make(mode, num_envs=2, repeats=8, group_repeats=True, shuffle=False)
        assert env.batch_size == (16,)
        assert drawn(env, 1) == ["question 0"] * 8 + ["question 1"] * 8
        check_env_specs(env)

    def test_repeats_through_partial_resets(self):
        """Each row is used exactly as often as asked for, whichever conversations end first."""
        env = make(num_envs=4, repeats=3, shuffle=False)
        td = env.reset()
        seen = list(td["query"])
        for turn in range(6):
            reset = torch.tensor([[turn % 2 == 0], [True], [False], [turn % 3 == 0]])
            td["_reset"] = reset.clone()
            td = env.reset(td)
            seen += [query for query, fresh in zip(td["query"], reset.flatten().tolist(), strict=False) if fresh]
        assert seen == [f"question {i // 3}" for i in range(len(seen))]

    def test_a_partial_reset_leaves_the_step_before_it(self, mode):
        """The ledgers that a step ended with, and the columns beside them, are not those of the episodes that follow."""
        env = make(mode, num_envs=4).append_transform(
            UserSimulator(lambda m: None if m[0]["content"][-1] in "27" else "so?")
        )
        td, steps = env.reset(), []
        for _ in range(6):
            stepped, td = env.step_and_maybe_reset(respond(env, td, list("abcd")))
            steps.append(stepped)
        assert any(step["next", "done"].any() and not step["next", "done"].all() for step in steps)
        for step in steps:
            starts, ends = (
                columns.read_objects(part["transcript"], part.batch_size) for part in (step, step["next"])
            )
            for query, before, after in zip(step["query"], starts, ends, strict=True):
                assert query == before.messages[0]["content"]
                assert after.messages[: len(before.messages)] == before.messages
                assert len(after.messages) > len(before.messages)

    def test_bad_repeats(self):
        with pytest.raises(ValueError, match="repeats is 0"):
            make(repeats=0)


class TestEnv:
    @pytest.mark.parametrize("rows", [1, 4])
    def test_check_env_specs(self, mode, rows):
        env = make(mode, num_envs=rows)
        check_env_specs(env)
        env = env.append_transform(StepCounter(max_steps=2))
        check_env_specs(env, break_when_any_done="both")

    def test_columns_stay_beside_the_conversation(self, mode):
        env = make(mode, num_envs=4).append_transform(StepCounter(max_steps=2))
        td = env.rollout(6, break_when_any_done=False)
        for row in td.unbind(0):
            for step in row.unbind(0):
                [transcript] = [step.get("transcript").data]
                assert step["query"] == transcript.messages[0]["content"]
                assert step["answer"] == step["query"].split()[-1]

    def test_system_prompt(self):
        td = make(system_prompt="Be brief.").reset()
        assert columns.read_objects(td["transcript"], td.batch_size)[0].messages[0]["role"] == "system"

    def test_pickles(self, mode):
        env = make(mode, num_envs=2).append_transform(StepCounter(max_steps=2))
        env.reset()
        again = pickle.loads(pickle.dumps(env))
        assert again.batch_size == env.batch_size
        check_env_specs(again)

    def test_a_pickled_fresh_environment_has_the_same_order(self):
        env = make(seed=4)
        again = pickle.loads(pickle.dumps(env))
        assert drawn(again, 5) == drawn(env, 5) == drawn(make(seed=4), 5)

    def test_device(self):
        td = make(device="cpu", num_envs=2).reset()
        assert td.device == torch.device("cpu")


class TestReward:
    def answered(self, env, text="4"):
        td = env.reset()
        ids = [torch.tensor(i) for i in env.base_env.template.codec.encode([text] * env.batch_size[0])]
        td["tokens"] = columns.ragged(Tokens, "response", ids, env.batch_size, None)
        return env.step(td)["next", "reward"].flatten().tolist()

    def test_tensor_references(self):
        batches = [TensorDict({"query": ["2 + 2", "3 + 3"], "answer": torch.tensor([4, 6])}, batch_size=(2,))]
        env = DatasetChatEnv.from_dataloader(
            batches, tokenizer=bpe_tokenizer(), batch_size=(2,), input_mode="tokens"
        )
        assert self.answered(env.append_transform(RewardTransform(NumberVerifier()))) == [1.0, 0.0]

    def test_the_policys_answer_is_graded_whatever_follows(self):
        class Observe(Transform):
            def _step(self, tensordict, next_tensordict):
                chat = self.parent.base_env
                return chat.append_messages(next_tensordict, [[{"role": "ipython", "content": "99"}]] * 3)

        env = make(num_envs=3, dataset=[{"query": "2 + 2", "answer": "4"}])
        env = env.append_transform(Observe()).append_transform(RewardTransform(NumberVerifier()))
        assert self.answered(env) == [1.0] * 3

    def test_bare_scores_and_failures(self):
        def score(response, reference):
            if reference == "1":
                raise RuntimeError("no")
            return 0.25

        env = make(num_envs=2, shuffle=False, dataset=ROWS[:2])
        env = env.append_transform(RewardTransform(score, failure_score=-1.0))
        with pytest.warns(RuntimeWarning, match="row 1: error: RuntimeError: no"):
            assert self.answered(env) == [0.25, -1.0]


class TestBadInput:
    def test_path_that_does_not_exist(self, tmp_path):
        for path in (tmp_path / "gone.jsonl", "./gone/train.parquet", str(tmp_path / "gone")):
            with pytest.raises(DatasetError, match="no such dataset file or folder.*gone"):
                make(dataset=path)

    def test_no_network(self, monkeypatch):
        """The hub's address is asked for once, and nothing is tried again."""
        from huggingface_hub import constants

        asked = []

        def nobody(*arguments, **options):
            asked.append(arguments[0])
            raise OSError("Name or service not known")

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr("urllib.request.getproxies", dict)
        monkeypatch.setattr("socket.getaddrinfo", nobody)
        with pytest.raises(
            DatasetError, match="'nobody/nothing-here' cannot be opened.*Without a network, pass the path"
        ):
            make(dataset="nobody/nothing-here")
        assert asked == ["huggingface.co"]
        assert constants.HF_HUB_OFFLINE is False

    def test_split(self):
        with pytest.raises(DatasetError, match="no split 'val': it has train"):
            make(dataset=DatasetDict(train=Dataset.from_list(ROWS)), split="val")

    def test_the_first_split_that_there_is(self):
        splits = DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:1]))
        assert len(load_rows(splits, split=("test",))) == 1
        assert len(load_rows(splits, split=("val",))) == len(ROWS)

    def test_suffix(self, tmp_path):
        (tmp_path / "rows.xyz").write_text("")
        with pytest.raises(DatasetError, match=r"suffix '.xyz'"):
            make(dataset=tmp_path / "rows.xyz")

    def test_empty(self):
        with pytest.raises(DatasetError, match="no rows"):
            make(dataset=Dataset.from_dict({"query": []}))
        with pytest.raises(DatasetError, match="empty"):
            DatasetChatEnv.from_dataloader([], tokenizer=bpe_tokenizer())

    def test_no_query_column(self):
        with pytest.raises(KeyError, match=r"no column 'query'.*\['problem'\].*data_key"):
            make(dataset=[{"problem": "x"}])

    def test_columns_that_the_environment_owns(self):
        with pytest.raises(ValueError, match=r"column\(s\) \['tokens'\]"):
            make(dataset=[{"query": "x", "tokens": [1]}])

    def test_batches_of_another_type(self):
        with pytest.raises(DatasetError, match="gave a int"):
            DatasetChatEnv.from_dataloader([3], tokenizer=bpe_tokenizer())

    def test_uneven_columns(self):
        with pytest.raises(DatasetError, match=r"lengths \[1, 2\]"):
            DatasetChatEnv.from_dataloader([{"query": ["a", "b"], "answer": ["1"]}], tokenizer=bpe_tokenizer())

    def test_actor_name_without_ray(self):
        with pytest.raises(ValueError, match="ray_backend"):
            make(dataloader_actor_name="x")


def test_the_built_in_task():
    rows = last_digit_rows(50, seed=1)
    assert rows["query"][:] == last_digit_rows(50, seed=1)["query"][:] != last_digit_rows(50, seed=2)["query"][:]
    for query, answer in zip(rows["query"], rows["answer"], strict=True):
        assert query == f"last({query[5]},{answer})="
