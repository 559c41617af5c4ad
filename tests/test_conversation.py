"""The conversation core: functions on values, the same for a batch and for each of its rows."""

from __future__ import annotations

import bisect
import copy
import pickle
import subprocess
import sys

import pytest
import torch
from chat_rows import ledgers, make, queries, respond
from conftest import bpe_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from torchrl_chat import Budget, ChatTemplate, read_rollouts, training_view, write_rollouts
from torchrl_chat.conversation import (
    Limits,
    ResponseError,
    StopReason,
    Transcript,
    Turn,
    answer,
    append,
    begin,
    edit,
)
from torchrl_chat.conversation.turn import check_turns
from torchrl_chat.openenv import ChatAction, ChatEnvironment
from torchrl_chat.templates.codec import codec_of

USER = {"role": "user", "content": "hello"}


@pytest.fixture(scope="module")
def template():
    return ChatTemplate(bpe_tokenizer())


def started(template: ChatTemplate, text: str = "hello", keep_text: bool = False) -> Transcript:
    messages = [{"role": "user", "content": text}]
    prompt = template.render_batch([messages])[0]
    return Transcript.start(prompt.ids, messages, prompt.text if keep_text else None)


def turn_of(template: ChatTemplate, text: str, ended: bool = True, **fields) -> Turn:
    ids = template.codec.encode([text])[0] + [template.tokenizer.eos_token_id] * ended
    return Turn(torch.tensor(ids), torch.linspace(-1, 0, len(ids)), **fields)


class Plays:
    """What happens in one row, drawn: texts that are answered, cut or not, with and without ids, and asked on."""

    row = st.lists(
        st.tuples(st.text("abc <>|\n", min_size=1, max_size=12), st.booleans(), st.booleans(), st.integers(0, 9)),
        min_size=1,
        max_size=4,
    )


class TestPure:
    @given(st.lists(Plays.row, min_size=1, max_size=5), st.booleans())
    def test_a_batch_is_its_rows(self, template, rows, keep_text):
        """And what was there before stays what it was."""

        def played(some: list) -> list[Transcript]:
            ledgers = [started(template, f"row {i}", keep_text) for i, _ in some]
            for k in range(max(len(row) for _, row in some)):
                live = [k < len(row) for _, row in some]
                turns: list[Turn | None] = []
                for (_, row), lives in zip(some, live, strict=True):
                    text, ended, with_ids, limit = row[k] if lives else ("", True, True, 0)
                    turn = turn_of(template, text, ended, limit=limit or None) if with_ids else Turn(text=text)
                    turns.append(turn if lives else None)
                before = [pickle.dumps(ledger) for ledger in ledgers]
                answered = answer(ledgers, turns, template)
                asked = append(answered, [[USER] if lives else None for lives in live], template)
                assert [pickle.dumps(ledger) for ledger in ledgers] == before
                ledgers = asked
            return ledgers

        every = list(enumerate(rows))
        assert played(every) == [played([row])[0] for row in every]

    def test_what_is_wrong_with_a_row_is_told_and_the_others_go_on(self, template):
        bad = [
            Turn(torch.empty(0, dtype=torch.int64)),
            Turn(torch.tensor([10**6])),
            Turn(torch.tensor([5]), torch.tensor([float("nan")])),
            Turn(torch.tensor([5, 6]), torch.tensor([-0.5])),
        ]
        good = turn_of(template, "fine")
        rows = [started(template, str(i)) for i in range(len(bad) + 1)]
        errors: dict[int, Exception] = {}
        after = answer(rows, [*bad, good], template, errors)
        assert sorted(errors) == [0, 1, 2, 3]
        assert all(isinstance(error, ResponseError) for error in errors.values())
        assert after[:4] == rows[:4]
        assert after[4].messages[-1]["content"] == "fine"
        for i, turn in enumerate(bad):
            with pytest.raises(ResponseError, match="row 0: "):
                answer([rows[i]], [turn], template)

    def test_rows_without_a_turn_or_a_token_left_stay(self, template):
        rows = [started(template), started(template)]
        assert answer(rows, [None, turn_of(template, "no", limit=0)], template) == rows

    def test_without_a_template_answers_are_texts(self):
        [after] = answer([Transcript.start([], [USER])], [Turn(text="hi")], None)
        assert after.messages == (USER, {"role": "assistant", "content": "hi"})
        assert len(after) == 0
        assert append([after], [[USER]], None)[0].messages[-1] == USER

    @pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
    @pytest.mark.parametrize("count", [2, 3])
    def test_ids_of_any_integers_are_checked(self, dtype, count):
        good, below, beyond = (torch.tensor([3] * (count - 1) + [last], dtype=dtype) for last in (4, -1, 9))
        errors = {}
        ids, _ = check_turns({0: Turn(good), 1: Turn(below), 2: Turn(beyond)}, 9, errors)
        assert {row: str(error).partition(" at ")[0] for row, error in errors.items()} == {
            1: "row 1: the response has id -1",
            2: "row 2: the response has id 9",
        }
        assert ids[0].tolist() == good.tolist()
        errors = {}
        check_turns({0: Turn(good)}, 9, errors)
        assert not errors

    def test_a_turn_is_begun_and_edited(self, template):
        [after] = answer([started(template)], [turn_of(template, "one two three")], template)
        again = edit(after, template, 4, "2")
        assert again.messages[-1]["content"] == "one 2"
        assert again.ended is None
        [done] = answer([again], [turn_of(template, " 3")], template)
        assert done.messages[-1]["content"] == "one 2 3"
        assert len(done.branches) == 1
        opened = begin(after, template, "So")
        assert opened.tokens[: len(after)].tolist() == after.tokens.tolist()
        assert opened.messages[-1] == {"role": "assistant", "content": "So"}


class TestVersions:
    """Which weights sampled what travels with the ids."""

    def test_over_turns(self, template):
        first, prompt = turn_of(template, "one", versions=((0, 3), (2, 4))), started(template)
        [one] = answer([prompt], [first], template)
        start = len(prompt)
        assert one.versions == ((start, 3), (start + 2, 4))
        [asked] = append([one], [[USER]], template)
        [two] = answer([asked], [turn_of(template, "two")], template)  # nobody says which
        assert two.versions == (*one.versions, (len(asked), None))
        assert pickle.loads(pickle.dumps(two)) == two
        assert two.sequences[-1].versions == two.versions
        assert two != answer([asked._replace(versions=())], [turn_of(template, "two")], template)[0]

    def test_absent_where_nobody_knows(self, template):
        assert answer([started(template)], [turn_of(template, "one")], template)[0].versions == ()

    def test_cut(self, template):
        turn = turn_of(template, "one two three", versions=((0, 1), (2, 2)), limit=2)
        assert answer([started(template)], [turn], template)[0].versions[1:] == ()

    def test_a_branch_keeps_its_own(self, template):
        [one] = answer([started(template)], [turn_of(template, "one two", versions=((0, 7),))], template)
        again = edit(one, template, 3, "!")
        assert again.versions == ()
        assert again.branches[0].versions == one.versions

    @pytest.mark.parametrize("spans", [False, True])
    def test_from_the_column_of_a_policy(self, mode, spans):
        env = make(mode, 2)
        td = respond(env, env.reset(queries(env)))
        td["weight_versions"] = torch.tensor([[5], [6]])
        if spans:
            td.set("weight_versions", env_objects(env, [[(0, 5)], ((0, 6), (1, 7))]))
        first, second = ledgers(env.step(td)["next"])
        assert [version for _, version in first.versions] == [5]
        assert [version for _, version in second.versions] == ([6, 7] if spans else [6])

    @pytest.mark.parametrize("layout", ["ragged", "padded", "packed"])
    def test_in_views_and_rollout_files(self, mode, layout, tmp_path):
        env = make(mode, 2)
        td = respond(env, env.reset(queries(env)))
        td["weight_versions"] = torch.tensor([[5], [6]])
        first = env.step(td)
        td = respond(env, env.append_messages(env.step_mdp(first), ["more", "more"]))
        td.set("weight_versions", env_objects(env, [[(0, 7), (1, 8)], None]))
        rows = env.step(td)["next"]
        view = training_view(rows, layout=layout)
        versions, mask = (
            view["weight_versions"].get("full", as_list=True),
            view["masks"].get("all_assistant_mask", as_list=True),
        )
        if layout == "packed":
            versions, mask = [versions[0]], [mask[0]]
        found = [v[m].tolist() for v, m in zip(versions, mask, strict=True)]
        sizes = [[span.end - span.start for span in t.spans] for t in ledgers(rows)]
        expected = [
            [5] * sizes[0][0] + [7] + [8] * (sizes[0][1] - 1),
            [6] * sizes[1][0] + [-1] * sizes[1][1],
        ]
        assert found == (expected if layout != "packed" else [expected[0] + expected[1]])
        assert all((v[~m] == -1).all() for v, m in zip(versions, mask, strict=True))
        write_rollouts(tmp_path / "r.jsonl", rows)
        written = [row["sequences"][0]["weight_versions"] for row in read_rollouts(tmp_path / "r.jsonl")]
        assert written == [[list(span) for span in t.versions] for t in ledgers(rows)]

    def test_absent_in_views_where_nobody_knows(self):
        env = make("tokens", 2)
        rows = env.step(respond(env, env.reset(queries(env))))["next"]
        assert "weight_versions" not in training_view(rows).keys()

    @pytest.mark.parametrize("bad", ["new", [(1, 5)], [(0, 1), (0, 2)], [3]])
    def test_what_is_no_version(self, bad):
        env = make("tokens", 1)
        td = respond(env, env.reset(queries(env)))
        td.set("weight_versions", env_objects(env, [bad]))
        with pytest.raises(ResponseError, match="row 0: .*'weight_versions'"):
            env.step(td)


def env_objects(env, values):
    from torchrl_chat import columns

    return columns.objects(values, env.batch_size, None)


class TestLimits:
    @given(
        st.fixed_dictionaries(
            {},
            optional={
                "max_turns": st.integers(1, 3),
                "max_turn_tokens": st.integers(1, 6),
                "max_tokens": st.integers(1, 12),
                "max_context": st.integers(20, 70),
            },
        ).filter(len),
        st.lists(st.text("abc ", min_size=1, max_size=9), min_size=5, max_size=5),
    )
    def test_one_meaning_in_a_batch_and_in_a_served_episode(self, template, limits, texts):
        env = make("tokens", 1).append_transform(Budget(**limits))
        served = ChatEnvironment(template, **limits)
        td = env.reset(queries(env))
        observation = served.reset(query=queries(env)["query"][0])
        assert observation.tokens == ledgers(td)[0].tokens.tolist()
        for text in texts:
            left = int(td["tokens_left"])
            assert observation.metadata.get("tokens_left", left) == left
            if not left:
                break
            ids = template.codec.encode([text])[0]
            td = respond(env, td, [text], ended=False)
            stepped = env.step(td)["next"]
            observation = served.step(ChatAction(tokens=ids))
            assert observation.tokens == ledgers(stepped)[0].tokens.tolist()
            reason = StopReason(int(stepped["stop_reason"]))
            assert observation.metadata.get("stop_reason", "running") == reason.word
            assert observation.done is bool(stepped["done"])
            if observation.done:
                break
            td = env.base_env.append_messages(env.step_mdp(td.set("next", stepped)), ["go on"])
            observation = served.step(ChatAction(messages=[{"role": "user", "content": "go on"}]))
            if observation.done:  # a served episode ends as soon as nothing can be answered any more
                assert observation.metadata["stop_reason"] == "context_full"
                assert Limits(**limits).tokens_left(ledgers(td)[0], template) == 0
                break
            td["tokens_left"] = torch.tensor([[Limits(**limits).tokens_left(ledgers(td)[0], template)]])

    @pytest.mark.parametrize("bad", [{"max_turns": 0}, {"max_tokens": -1}, {"max_tool_calls": -1}])
    def test_positive(self, bad):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Limits(**bad)


class TestLedger:
    @pytest.mark.parametrize("inference", [False, True])
    @pytest.mark.parametrize(
        ("key", "value"), [(("tokens", "prompt"), 5), (("masks", "all_assistant_mask"), True), (("log_probs", "prompt"), 1)]
    )  # fmt: skip
    def test_a_write_into_an_observation_is_noticed(self, mode, key, value, inference):
        env = make(mode, 2)
        with torch.inference_mode(inference):
            td = env.reset(queries(env))
            td[key[0]][1].get(key[1])[0] = value
            with pytest.raises(ResponseError, match=rf"row 1: \('{key[0]}', '{key[1]}'\) .* written to in place"):
                env.step(respond(env, td))
            with pytest.raises(ResponseError, match="row 1: .* written to in place"):
                env.append_messages(td, ["more", "more"])

    def test_our_own_writes_are_none(self, mode):
        env = make(mode, 2)
        td = env.reset(queries(env))
        for turn in range(12):
            td = env.append_messages(env.step_mdp(env.step(respond(env, td))), [f"more {turn}"] * 2)
        assert [len(t.messages) for t in ledgers(td)] == [25, 25]

    def test_adoption_keeps_an_open_turn(self, template):
        [after] = answer([started(template)], [turn_of(template, "one two three")], template)
        opened = edit(after, template, 4, "2")
        words = opened.tokens[opened.open :].tolist()
        adopted = opened.adopted(torch.tensor([9, 9, *words]))
        assert adopted.tokens[adopted.open :].tolist() == words
        [done] = answer([adopted], [turn_of(template, " 3")], template)
        assert [m["role"] for m in done.messages] == ["user", "assistant"]
        assert done.messages[-1]["content"] == "one 2 3"
        with pytest.raises(ValueError, match="is to go on with a turn that begins with"):
            opened.adopted(torch.tensor([9, 9]))

    def test_a_branch_that_is_left_shares_its_tokens(self, template):
        [after] = answer([started(template)], [turn_of(template, "one two three")], template)
        [left] = edit(after, template, 3, "!").branches
        assert left.tokens.data_ptr() == after.tokens.data_ptr()
        assert len(pickle.dumps(left.tokens)) > 0
        assert copy.deepcopy(after) is after

    def test_values_do_not_need_torchrl(self):
        code = "import sys, torchrl_chat.conversation; sys.exit('torchrl' in sys.modules or 'tensordict' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


class TestPlaces:
    """Where in the ids a position of their text is, without decoding every prefix."""

    @given(
        st.lists(
            st.sampled_from(["word ", "é", "日本", "a", "\n", " ", "<|im_end|>", "12", "xxxxx", "ß€"]), max_size=60
        )
    )
    def test_as_by_all_prefixes(self, parts):
        codec = codec_of(bpe_tokenizer())
        ids = codec.encode(["".join(parts)])[0]
        ends = [len(text) for text in codec.decode([ids[:k] for k in range(len(ids) + 1)])]
        if ends == sorted(ends):  # a character that is cut in two may read as more
            for position in range(ends[-1] + 2):
                assert codec.place_of(ids, position) == bisect.bisect_left(ends, position)

    def test_decodes_a_few_prefixes_however_many_there_are(self, monkeypatch):
        codec, decoded = codec_of(bpe_tokenizer()), [0]
        decode = codec.decode

        def counted(batch):
            decoded[0] += sum(map(len, batch))
            return decode(batch)

        monkeypatch.setattr(codec, "decode", counted)
        costs = []
        for count in (500, 1000, 2000, 4000):
            ids = codec.encode([" word" * count + "the answer is 4"])[0]
            decoded[0] = 0
            codec.place_of(ids, len(decode([ids])[0]) - 15)
            costs.append(decoded[0] / len(ids))
        assert max(costs) <= 12
        assert costs[-1] <= 1.1 * costs[0] + 2
