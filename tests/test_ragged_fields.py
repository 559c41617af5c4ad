"""A field whose rows differ in length, read as if it were one tensor: the error says how it is read."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tensordict import TensorDict

from torchrl_chat import Transcript, columns, training_view

WAYS = {
    "attribute": lambda view: view["tokens"].full,
    "key": lambda view: view["tokens", "full"],
    "get": lambda view: view.get(("tokens", "full")),
    "mask": lambda view: view["masks"].all_assistant_mask,
    "log-probs": lambda view: view["log_probs"].full,
    "slice": lambda view: view[:2]["tokens"].full,
    "rows": lambda view: view[torch.tensor([0, 2])]["tokens"].full,
    "mask of rows": lambda view: view[torch.tensor([True, False, True])]["tokens"].full,
    "moved": lambda view: view.to("cpu")["tokens"].full,
    "cloned": lambda view: view.clone()["tokens"].full,
    "copied": lambda view: copy.copy(view)["tokens"].full,
    "pickled": lambda view: pickle.loads(pickle.dumps(view))["tokens"].full,
}


def batch(*lengths: int) -> TensorDict:
    """Conversations with answers of these lengths."""
    question = {"role": "user", "content": "?"}
    ledgers = [
        Transcript.start([5, 6], (question,)).sampled(
            torch.arange(length) + 7, -torch.ones(length), {"role": "assistant", "content": "!"}, ended=True
        )
        for length in lengths
    ]
    size = torch.Size([len(lengths)])
    return TensorDict(transcript=columns.objects(ledgers, size, None), batch_size=size)


@pytest.mark.parametrize("way", WAYS)
def test_the_error_names_the_field_the_lengths_and_the_ways(way):
    with pytest.raises(RuntimeError) as error:
        WAYS[way](training_view(batch(1, 4, 9)))
    text = str(error.value)
    assert text.startswith("Failed to stack tensors within a tensordict")  # by which torchrl and tensordict know it
    assert f"lengths, 3 to {6 if way == 'slice' else 11}" in text
    assert 'training_view(..., layout="padded")' in text
    assert "as_list=True" in text


def test_what_it_says_works():
    view = training_view(batch(1, 4, 9))
    assert [len(row) for row in view["tokens"].get("full", as_list=True)] == [3, 6, 11]
    assert view["tokens"].get("full", as_padded_tensor=True).shape == (3, 11)
    assert training_view(batch(1, 4, 9), layout="padded")["tokens"].full.shape == (3, 11)


def test_rows_of_one_length_are_a_tensor():
    view = training_view(batch(4, 4))
    assert view["tokens"].full.shape == (2, 6)
    assert view[0]["tokens"].full.shape == (6,)
    assert training_view(batch(1, 4, 4))[1:]["tokens"].full.shape == (2, 6)


def test_what_is_not_there_is_another_error():
    view = training_view(batch(1, 4))
    with pytest.raises(KeyError):
        view["nothing", "full"]
    assert view["tokens"].get("prompt", None) is None
