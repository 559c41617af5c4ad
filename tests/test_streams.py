"""What a trainer says of each token, in the rollout file: that of a plain pass over the written ids, whatever the way there."""

from __future__ import annotations

import functools

import pytest
import torch
from conftest import of_the_day
from hypothesis import given, settings
from hypothesis import strategies as st
from run_books import documented_metrics, example, jsonl, words
from training_rows import batch_of

from torchrl_chat import Transcript, training_view
from torchrl_chat.learner import Counts, Streams, learn
from torchrl_chat.rollouts import episodes, read_rollouts
from torchrl_chat.tiny import tiny_model
from torchrl_chat.training import masked_mean, sequence_log_probs


@functools.cache
def model():
    return tiny_model(24, hidden=32, layers=1)


def ledger(turns: list[tuple[int, bool, bool]], draw: torch.Generator) -> Transcript:
    """A conversation of turns (tokens sampled, whether a branch begins in front, whether one was left without a token)."""

    def ids(count: int) -> list[int]:
        return torch.randint(3, 20, (count,), generator=draw).tolist()

    found = Transcript.start(ids(3), ({"role": "user", "content": "?"},))
    for count, branch, left in turns:
        for _ in range((branch + (branch and left)) if found.spans else 0):
            found = found.branched(ids(4), found.spans)
        said = {"role": "assistant", "content": "!"}
        log_probs = -3 * torch.rand(count, generator=draw)
        found = found.sampled(torch.tensor(ids(count)), log_probs, said, ended=True, close=[2])
    return found


def plainly(sequence: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Ratio and entropy of the sampled tokens of a written sequence, by one pass over its ids."""
    with torch.no_grad():
        told = model()(input_ids=torch.tensor([sequence["ids"]])).logits[0].log_softmax(-1)
    places = torch.tensor([place for start, end in sequence["sampled"] for place in range(start, end)])
    before = told[places - 1]
    own = before.gather(1, torch.tensor(sequence["ids"])[places][:, None]).squeeze(1)
    return (own - torch.tensor(sequence["log_probs"])).exp(), -(before.exp() * before).sum(-1)


def loss_of(part, counts, streams, learner):
    scores = sequence_log_probs(learner, part, entropy=True, share_prefixes=True)
    streams.add(part, scores, counts)
    return -masked_mean(scores.log_probs, scores.mask, denominator=counts.tokens), {}


@given(
    st.lists(
        st.lists(st.tuples(st.integers(1, 5), st.booleans(), st.booleans()), min_size=1, max_size=3),
        min_size=2,
        max_size=5,
    ),
    st.sampled_from(["padded", "ragged"]),
    st.randoms(use_true_random=False),
)
@settings(max_examples=12)
def test_every_trained_token_has_its_own_numbers(turns, layout, rng):
    """Branches, microbatches, minibatches in any order, two passes, rows that are not needed, a part of the view."""
    draw = torch.Generator().manual_seed(rng.randrange(1000))
    td = batch_of([ledger(each, draw) for each in turns])
    view = training_view(td, layout=layout)
    kept = torch.tensor([rng.random() < 0.8 for _ in range(len(view))])
    view["advantage"] = torch.randn(len(view), 1, generator=draw)
    view, streams = view[kept], Streams()
    needed = torch.tensor([rng.random() < 0.8 for _ in range(len(view))]).bool()
    torch.manual_seed(0)
    learn(
        torch.optim.SGD(model().parameters(), lr=0.0),
        view,
        functools.partial(loss_of, streams=streams, learner=model()),
        minibatch=2,
        max_tokens=rng.choice([1, 20, 1000]),
        epochs=2,
        needed=needed,
    )
    trained = {
        (episode, number)
        for episode, number, use in zip(
            view["episode"].tolist(), view["episode_sequence"][:, 0].tolist(), needed.tolist(), strict=True
        )
        if use
    }
    keys = zip(view["episode"].tolist(), view["episode_sequence"][:, 0].tolist(), strict=True)
    advantages = dict(zip(keys, view["advantage"].flatten().tolist(), strict=True))
    apart = []
    for number, episode in enumerate(episodes(td, streams=streams.of)):
        sampled = [sequence for sequence in episode["sequences"] if sequence["sampled"]]
        assert not any("ratio" in each for each in episode["sequences"] if not each["sampled"])
        for place, sequence in enumerate(sampled):
            assert ("ratio" in sequence) == ("entropy" in sequence) == ((number, place) in trained)
            if (number, place) in trained:
                ratio, entropy = plainly(sequence)
                assert sequence["ratio"] == pytest.approx(ratio.tolist(), rel=1e-3)
                assert sequence["entropy"] == pytest.approx(entropy.tolist(), rel=1e-3)
                expected = [advantages[number, place]] * len(entropy)
                assert sequence["advantage"] == pytest.approx(expected, rel=1e-5)
                apart.append(ratio.log().abs())
    assert bool(streams.mismatch()) == bool(apart)
    if apart:
        assert 0 < streams.mismatch()["mismatch_max"] <= 1.001 * float(torch.cat(apart).max())


def test_they_are_those_of_the_first_pass_and_mismatch_is_that_before_the_first_update():
    draw = torch.Generator().manual_seed(0)
    view = training_view(batch_of([ledger([(4, False, False)], draw) for _ in range(4)]), layout="padded")
    before = sequence_log_probs(model(), view)
    learner, streams, first = tiny_model(24, hidden=32, layers=1), Streams(), Streams()
    learner.load_state_dict(model().state_dict())
    torch.manual_seed(1)
    [order] = [torch.randperm(4)]
    torch.manual_seed(1)
    learn(
        torch.optim.SGD(learner.parameters(), lr=5.0),
        view,
        functools.partial(loss_of, streams=streams, learner=learner),
        minibatch=2,
        max_tokens=1000,
        epochs=2,
    )
    expected = (before.log_probs - view["log_probs"].full).detach()
    for rank, row in enumerate(order.tolist()):
        same = streams.of(row, 0)["ratio"] == pytest.approx(
            expected[row][before.mask[row]].exp().tolist(), rel=1e-4
        )
        assert same == (rank < 2)
    rows = view[order[:2]]
    first.add(rows, sequence_log_probs(model(), rows), Counts(torch.tensor(8.0), torch.tensor(2.0)))
    assert streams.mismatch() == pytest.approx(first.mismatch(), rel=1e-4)
    assert "entropy" not in first.of(int(order[0]), 0)


def test_a_stream_of_another_length_is_refused():
    td = batch_of([ledger([(3, False, False)], torch.Generator())])
    with pytest.raises(ValueError, match="'ratio' has 2 numbers for 3 sampled tokens"):
        list(episodes(td, streams=lambda *_: {"ratio": [1.0, 1.0]}))


@pytest.mark.services
@pytest.mark.parametrize("name", of_the_day("grpo", "ppo", "expert_iteration"))
def test_recipes_write_them(tmp_path, monkeypatch, name):
    """In a step of one update ratios are those of one policy. What else a run measures stands in the docs."""
    module = example(name)
    kept = module.right_answers if name == "expert_iteration" else None
    if kept:  # random weights are seldom right: imitate whatever was said
        monkeypatch.setattr(module, "right_answers", lambda td, _: module.training_view(td, layout="padded"))
    monkeypatch.setattr("sys.argv", words(name, "--out", str(tmp_path), "--epochs", "1", "--minibatch", "16"))
    module.main()
    for row in jsonl(tmp_path / "metrics.jsonl"):
        assert row.keys() <= documented_metrics()[0]
        assert row["entropy"] > 0
        assert row["trained_tokens"] > 0
        assert row["mismatch"] < 1e-5 if name != "expert_iteration" else "mismatch" not in row
    written = list(read_rollouts(tmp_path / "rollouts.jsonl"))
    assert len(written) == 4 * 16
    for episode in written:
        for sequence in episode["sequences"]:
            assert len(sequence["ratio"]) == len(sequence["entropy"]) == len(sequence["log_probs"])
            assert sequence["ratio"] == pytest.approx([1.0] * len(sequence["ratio"]), rel=1e-3)
            assert all(0 <= value < 5 for value in sequence["entropy"])
            assert ("advantage" in sequence) == (name != "expert_iteration")
