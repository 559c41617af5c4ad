"""The unchecked constructors make what the checked ones of tensordict make."""

from __future__ import annotations

import pickle

import pytest
import torch
from tensordict import LazyStackedTensorDict, NonTensorData, NonTensorStack, TensorDict
from torchrl.data.llm import History
from torchrl.modules.llm.policies import ChatHistory, Text, Tokens

from torchrl_chat import columns

BATCH = torch.Size([3])
ROWS = [torch.arange(n) for n in (2, 3, 5)]


def test_ragged_is_a_tokens_over_a_lazy_stack():
    ours = columns.ragged(Tokens, "prompt", ROWS, BATCH, None)
    theirs = Tokens._from_tensordict(
        LazyStackedTensorDict(*(TensorDict({"prompt": row}) for row in ROWS), stack_dim=0)
    )
    assert type(ours) is Tokens
    assert ours.batch_size == theirs.batch_size == BATCH
    assert ours._non_tensordict == theirs._non_tensordict
    assert ours.response is None
    for got, expected in zip(ours.get("prompt", as_list=True), theirs.get("prompt", as_list=True), strict=True):
        assert torch.equal(got, expected)
    padded = ours.get("prompt", as_padded_tensor=True, padding_side="left", padding_value=-1)
    assert padded.tolist() == [[-1, -1, -1, 0, 1], [-1, -1, 0, 1, 2], [0, 1, 2, 3, 4]]


def test_objects_are_non_tensor_data():
    ours, theirs = columns.as_object({"a": 1}, None), NonTensorData({"a": 1})
    assert ours.__dict__.keys() - {"_is_initialized"} == theirs.__dict__.keys() - {"_is_initialized"}
    assert ours._non_tensordict == theirs._non_tensordict
    stack = columns.objects([1, "b", None], BATCH, None)
    assert isinstance(stack, NonTensorStack)
    assert stack.tolist() == NonTensorStack(1, "b", None).tolist()
    assert pickle.loads(pickle.dumps(stack)).tolist() == [1, "b", None]


def test_text_and_history_are_torchrls():
    text = columns.texts("prompt", ["a", "b", "c"], BATCH, None)
    assert type(text) is Text
    assert list(text.prompt) == ["a", "b", "c"]
    assert text[1].prompt == "b"
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    history = columns.histories("prompt", [columns.history_messages(messages)] * 3, BATCH, None)
    assert type(history) is ChatHistory
    expected = History.from_chats([messages])
    assert history[0].prompt.role == expected[0].role
    assert history[0].prompt.content == expected[0].content
    longer = history.prompt.extend(History(role="user", content="z").view(1, 1).expand(3, 1), dim=-1, inplace=False)
    assert longer[2].role == ["user", "assistant", "user"]
    assert history[2].prompt.role == ["user", "assistant"]


def test_shallow_shares_tensors_and_nothing_else():
    td = TensorDict({"tokens": columns.ragged(Tokens, "prompt", ROWS, BATCH, None)}, batch_size=BATCH)
    copy = columns.shallow(td)
    copy["tokens"][0].response = torch.tensor([1])
    copy.set("more", torch.zeros(3))
    assert columns.read_field(td["tokens"], "response", BATCH) is None
    assert "more" not in td.keys()
    assert (
        columns.read_field(copy["tokens"], "prompt", BATCH)[0]
        is columns.read_field(td["tokens"], "prompt", BATCH)[0]
    )


def every_column() -> TensorDict:
    messages = columns.history_messages([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}])
    return TensorDict(
        {
            "tokens": columns.ragged(Tokens, "prompt", ROWS, BATCH, None),
            "text": columns.texts("prompt", ["a", "b", "c"], BATCH, None),
            "history": columns.histories("prompt", [messages, messages[:1], messages], BATCH, None),
            "who": columns.objects([[1], {"b": 2}, None], BATCH, None),
        },
        batch_size=BATCH,
    )


@pytest.mark.parametrize("how", [lambda td: td.copy(), lambda td: td.clone(recurse=False)])
def test_copies_share_leaves_and_nothing_else(how):
    """What tensordict promises of ``copy``: whatever is written into the copy, the original is as it was."""
    td, untouched = every_column(), every_column()
    copy = how(td)
    assert {key: type(copy.get(key)) for key in copy.keys()} == {key: type(td.get(key)) for key in td.keys()}
    for key in ("tokens", "who"):
        for mine, theirs in zip(copy.get(key).unbind(0), td.get(key).unbind(0), strict=True):
            assert mine is not theirs
    assert copy["tokens"][0].prompt is td["tokens"][0].prompt
    assert columns.read_objects(copy["who"], BATCH)[1] is columns.read_objects(td["who"], BATCH)[1]
    copy["tokens"][0].response = torch.tensor([1])
    copy["text"][1].prompt = "other"
    copy["history"][0].prompt[0].content = "other"
    copy.get("who").tensordicts[0].update(NonTensorData("other"), inplace=True)
    copy.get("who").update(columns.objects([7, 8, 9], BATCH, None), inplace=True)
    copy["new"] = torch.zeros(3)
    assert set(td.keys(True, True)) == set(untouched.keys(True, True))
    assert td["text"].prompt == untouched["text"].prompt
    assert td["history"][0].prompt.content == ["x", "y"]
    assert columns.read_objects(td["who"], BATCH) == [[1], {"b": 2}, None]
    assert columns.read_field(td["tokens"], "response", BATCH) is None


def test_copies_keep_shape_device_and_names():
    size = torch.Size([2, 3])
    td = TensorDict(
        {
            "tokens": columns.ragged(Tokens, "prompt", ROWS * 2, size, torch.device("cpu")),
            "who": columns.objects(list(range(6)), size, torch.device("cpu")),
        },
        batch_size=size, device="cpu", names=["env", "time"],
    )  # fmt: skip
    copy = td.copy()
    for key in ("tokens", "who"):
        for mine, theirs in zip(
            (copy.get(key), *copy.get(key).unbind(0)), (td.get(key), *td.get(key).unbind(0)), strict=True
        ):
            assert (mine.batch_size, mine.device, mine.names) == (theirs.batch_size, theirs.device, theirs.names)
    assert columns.read_objects(copy["who"], size) == list(range(6))
    assert [row.tolist() for row in columns.read_field(copy["tokens"], "prompt", size)] == [
        r.tolist() for r in ROWS * 2
    ]
    assert not td.lock_().copy().is_locked


def test_consolidated_columns_can_be_read_again():
    """What ``ParallelEnv`` does with every result before it sends it."""
    td = TensorDict(
        {
            "tokens": columns.ragged(Tokens, "prompt", ROWS, BATCH, None),
            "text": columns.texts("prompt", ["a", "b", "c"], BATCH, None),
            "who": columns.objects([1, 2, 3], BATCH, None),
        },
        batch_size=BATCH,
    )
    again = pickle.loads(pickle.dumps(td.consolidate(share_memory=False, inplace=True, num_threads=1)))
    assert [row.tolist() for row in columns.read_field(again["tokens"], "prompt", BATCH)] == [
        r.tolist() for r in ROWS
    ]
    assert again["text"][2].prompt == "c"
    assert columns.read_objects(again["who"], BATCH) == [1, 2, 3]


def test_memory_mapped_columns_can_be_read_again(tmp_path):
    td = every_column()
    td.clone().memmap(tmp_path)
    again = TensorDict.load_memmap(tmp_path)
    kinds = {key: type(td.get(key)) for key in td.keys()}
    assert {key: type(again.get(key)) for key in again.keys()} == {**kinds, "who": NonTensorStack}
    found = columns.read_field(again["tokens"], "prompt", BATCH)
    assert [row.tolist() for row in found] == [row.tolist() for row in ROWS]
    assert again["text"][2].prompt == "c"
    assert again["history"][0].prompt.content == ["x", "y"]
    assert columns.read_objects(again["who"], BATCH) == [[1], {"b": 2}, None]


def test_two_batch_dimensions():
    size = torch.Size([2, 3])
    rows = [torch.arange(n) for n in range(1, 7)]
    tokens = columns.ragged(Tokens, "prompt", rows, size, None)
    assert tokens.batch_size == size
    assert [row.tolist() for row in columns.read_field(tokens, "prompt", size)] == [r.tolist() for r in rows]
    assert columns.read_objects(columns.objects(list(range(6)), size, None), size) == list(range(6))
    assert tokens[1][2].prompt.tolist() == rows[5].tolist()
