"""The ledger is a value: extending one never changes another."""

from __future__ import annotations

import copy
import pickle
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import LazyStackedTensorDict, TensorDict, lazy_stack

from torchrl_chat import Transcript, columns
from torchrl_chat.templates.rewriting import Span

QUESTION = ({"role": "user", "content": "?"},)
ANSWER = {"role": "assistant", "content": "!"}


def answered(transcript: Transcript, ids: list[int], score: float = -0.5) -> Transcript:
    row = torch.tensor(ids)
    return transcript.sampled(row, torch.full((len(ids),), score), ANSWER, ended=True, close=[9])


class TestValue:
    def test_sampled_and_appended(self):
        t = answered(Transcript.start([1, 2, 3], QUESTION), [7, 8])
        assert t.tokens.tolist() == [1, 2, 3, 7, 8, 9]
        assert t.mask.tolist() == [False] * 3 + [True] * 2 + [False]
        assert t.log_probs.tolist() == [0, 0, 0, -0.5, -0.5, 0]
        assert t.num_sampled == 2
        assert t.ended
        assert t.closed
        t = t.appended([4, 5], [{"role": "user", "content": "more"}])
        assert t.tokens.tolist() == [1, 2, 3, 7, 8, 9, 4, 5]
        assert t.ended is None
        assert [m["role"] for m in t.messages] == ["user", "assistant", "user"]

    def test_ids_are_had_without_a_tensor_too(self):
        t = answered(Transcript.start([1, 2, 3], QUESTION), [7, 8]).appended([4], QUESTION)
        ids = t.token_array
        assert ids.tolist() == t.tokens.tolist() == [1, 2, 3, 7, 8, 9, 4]
        assert ids.dtype == np.int64
        with pytest.raises(ValueError, match="read-only"):
            ids[0] = 5
        answered(t, [5])  # the ledger itself is written to as before
        assert ids.tolist() == t.token_array.tolist()

    def test_earlier_values_stay(self):
        start = Transcript.start([1, 2, 3], QUESTION)
        view = start.tokens
        for turn in range(20):
            answered(start, [turn, turn])
        assert view.tolist() == start.tokens.tolist() == [1, 2, 3]

    def test_branches_do_not_see_each_other(self):
        start = Transcript.start([1], QUESTION)
        left = answered(start, [10, 11])
        right = answered(start, [20])
        left2, right2 = answered(left, [12]), answered(right, [21, 22, 23])
        assert left2.tokens.tolist() == [1, 10, 11, 9, 12, 9]
        assert right2.tokens.tolist() == [1, 20, 9, 21, 22, 23, 9]
        assert left.tokens.tolist() == [1, 10, 11, 9]
        assert right.mask.tolist() == [False, True, False]

    def test_missing_log_probs_are_marked(self):
        t = Transcript.start([1], QUESTION).sampled(torch.tensor([2]), None, ANSWER, ended=False)
        assert not t.scored
        assert t.log_probs.tolist() == [0, 0]

    def test_adopting_keeps_the_common_prefix(self):
        t = answered(Transcript.start([1, 2], QUESTION), [7, 8])
        adopted = t.adopted(torch.tensor([1, 2, 7, 5, 6]))
        assert adopted.tokens.tolist() == [1, 2, 7, 5, 6]
        assert adopted.mask.tolist() == [False, False, True, False, False]
        assert t.tokens.tolist() == [1, 2, 7, 8, 9]

    def test_a_failed_write_leaves_no_trace(self):
        start = Transcript.start([1], QUESTION)
        try:
            start.sampled(torch.tensor([5, 6]), torch.zeros(3), ANSWER, ended=True)
        except ValueError:
            pass
        t = start.appended([3], ())
        assert t.tokens.tolist() == [1, 3]
        assert not t.mask.any()

    def test_storage_that_moves_to_shared_memory(self):
        """As when an observation is sent to another process: reads and writes go on in the new memory."""
        t = Transcript.start([1, 2], QUESTION)
        t.tokens.share_memory_()
        t.mask.share_memory_()
        t = answered(t, [7, 8])
        assert t.tokens.tolist() == [1, 2, 7, 8, 9]
        assert t.mask.tolist() == [False, False, True, True, False]
        assert t == answered(Transcript.start([1, 2], QUESTION), [7, 8])

    @settings(deadline=None)
    @given(st.lists(st.tuples(st.integers(0, 30), st.booleans(), st.integers(1, 200)), max_size=25))
    def test_any_tree_of_extensions(self, operations):
        """Extensions of any earlier value, in any order, against plain lists."""
        values = [(Transcript.start([0], QUESTION), [0], [False])]
        for at, sampled, count in operations:
            t, ids, mask = values[at % len(values)]
            new = list(range(count))
            if sampled:
                grown = t.sampled(torch.tensor(new), None, ANSWER, ended=True, close=[7])
                values.append((grown, ids + new + [7], mask + [True] * count + [False]))
            else:
                values.append((t.appended(new, ()), ids + new, mask + [False] * count))
        for t, ids, mask in values:
            assert t.tokens.tolist() == ids
            assert t.mask.tolist() == mask

    def test_two_threads_extend_the_same_value(self):
        for _ in range(50):
            start = Transcript.start([1], QUESTION)
            results: dict[int, Transcript] = {}

            def work(n, start=start, results=results):
                results[n] = answered(start, [n] * 50)

            threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            for n, t in results.items():
                assert t.tokens.tolist() == [1, *[n] * 50, 9]


class TestTravelling:
    def tensordict(self) -> tuple[TensorDict, list[Transcript]]:
        rows = [answered(Transcript.start([1] * (i + 1), QUESTION), [7] * i + [8]) for i in range(4)]
        td = TensorDict({"transcript": columns.objects(rows, torch.Size([4]), None)}, batch_size=(4,))
        return td, rows

    def read(self, td) -> list[Transcript]:
        return columns.read_objects(td.get("transcript"), td.batch_size)

    def test_clone_index_stack(self):
        td, rows = self.tensordict()
        assert self.read(td.clone()) == rows
        assert self.read(td[1:3]) == rows[1:3]
        assert self.read(td[torch.tensor([True, False, False, True])]) == [rows[0], rows[3]]
        assert self.read(lazy_stack(list(td.unbind(0)))) == rows
        assert self.read(LazyStackedTensorDict(*td.unbind(0), stack_dim=0)) == rows
        assert self.read(td.to("cpu")) == rows

    def test_pickle_is_small_and_equal(self):
        td, rows = self.tensordict()
        assert self.read(pickle.loads(pickle.dumps(td))) == rows
        grown = answered(rows[0], [3] * 10_000)
        first = answered(Transcript.start([1], QUESTION), [8])
        assert len(pickle.dumps(first)) < 2_000
        assert pickle.loads(pickle.dumps(grown)) == grown

    def test_unpickled_value_grows_on_its_own(self):
        t = answered(Transcript.start([1], QUESTION), [8])
        again = pickle.loads(pickle.dumps(t))
        assert answered(again, [5]) == answered(t, [5])

    def test_copies_are_the_value_itself(self):
        t = answered(Transcript.start([1], QUESTION), [8])
        assert copy.copy(t) is copy.deepcopy(t) is t

    def test_equality_sees_every_part(self):
        t = answered(Transcript.start([1], QUESTION), [8])
        assert t == answered(Transcript.start([1], QUESTION), [8])
        assert t != answered(Transcript.start([1], QUESTION), [8], score=-0.6)
        assert t != answered(Transcript.start([2], QUESTION), [8])
        assert t != answered(Transcript.start([1], ({"role": "user", "content": "x"},)), [8])
        anew, other = t.branched([1, 2, 8], (Span(1, 2, 3, None),)), t.branched([1, 2, 8], (Span(1, 1, 3, None),))
        assert anew == t.branched([1, 2, 8], (Span(1, 2, 3, None),))
        assert anew != other  # the answer begins elsewhere
        assert anew != answered(Transcript.start([1], QUESTION), [9]).branched([1, 2, 8], anew.spans)  # it was 9
