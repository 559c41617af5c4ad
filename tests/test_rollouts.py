"""The rollout file, the pieces of its tokens, and the playing of a batch to its end."""

from __future__ import annotations

import itertools
import json
import math
import re
import warnings
from pathlib import Path

import pytest
import torch
from conftest import CORPUS, bpe_tokenizer, corpus_tokenizer, respond
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torchrl.envs import Transform

from torchrl_chat import (
    Budget,
    ChatEnv,
    DatasetChatEnv,
    NumberVerifier,
    RewardTransform,
    Transcript,
    UserSimulator,
    WeightedSum,
    columns,
    training_view,
)
from torchrl_chat.pieces import TokenPieces
from torchrl_chat.playing import play
from torchrl_chat.rollouts import as_line, episodes, mend, plain, read_rollouts, runs, write_rollouts
from torchrl_chat.templates.codec import codec_of
from torchrl_chat.transforms import EndOfDialogue

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=30)  # lone surrogates among them


def strict(line: bytes):
    """The value of a line of JSON proper: no NaN, no Infinity, no bytes that are not UTF-8."""

    def refuse(constant: str):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(line.decode("utf-8"), parse_constant=refuse)


def rows_of(texts: list[str], **entries) -> TensorDict:
    """Finished rows, made by hand: a question, and the text as the answer."""
    tokenizer = bpe_tokenizer()
    codec, ledgers = codec_of(tokenizer), []
    for text in texts:
        [ids] = codec.encode([text.encode("utf-8", "replace").decode() + "<|im_end|>"])
        start = Transcript.start([1, 5, 2], [{"role": "user", "content": text}])
        message = {"role": "assistant", "content": text}
        scores = -torch.rand(len(ids))
        ledgers.append(start.sampled(torch.tensor(ids), scores, message, ended=True))
    batch = torch.Size([len(texts)])
    return TensorDict({"transcript": columns.objects(ledgers, batch, None), **entries}, batch_size=batch)


class Script:
    """A policy that says what a function of (turn, row) says."""

    def __init__(self, env, said, fails=lambda turn, row: False):
        self.env, self.said, self.fails, self.turn = env, said, fails, 0
        self.asked: list[list[bool]] = []

    def __call__(self, td):
        count = self.env.batch_size.numel()
        self.asked.append(columns.stepped(td))
        failed = [asked and self.fails(self.turn, i) for i, asked in enumerate(self.asked[-1])]
        step = [asked and not bad for asked, bad in zip(self.asked[-1], failed, strict=True)]
        td = respond(self.env, td, [self.said(self.turn, i) for i in range(count)])
        if any(failed):
            td["_step"] = torch.tensor(step)
        td["policy_error"] = columns.objects(["gone" if bad else "" for bad in failed], self.env.batch_size, None)
        self.turn += 1
        return td


def chat(mode: str, count: int, turns: int = 4, **kwargs) -> DatasetChatEnv:
    """Conversations that go on until the answer is the row's number, or ``turns`` answers."""
    dataset = [{"query": f"question {i}", "answer": str(i)} for i in range(count)]
    env = DatasetChatEnv(
        dataset=dataset, tokenizer=bpe_tokenizer(), input_mode=mode, num_envs=count, shuffle=False, seed=1, **kwargs
    )
    env = env.append_transform(RewardTransform(NumberVerifier()))
    env = env.append_transform(UserSimulator(lambda messages: "again", turns=99))
    return env.append_transform(Budget(max_turns=turns))


class TestPlay:
    def test_each_row_ends_by_itself(self, mode):
        # Row i answers with a number in turn i + 1; before that it says nothing that can be graded.
        env = chat(mode, 3)
        policy = Script(env, lambda turn, row: f"#### {row}" if turn >= row else "hm")
        finished = play(env, policy)
        ledgers = columns.read_objects(finished["transcript"], finished.batch_size)
        answers = [[m["content"] for m in t.messages if m["role"] == "assistant"] for t in ledgers]
        assert answers == [["#### 0"], ["hm", "#### 1"], ["hm", "hm", "#### 2"]]
        assert finished["reward"].flatten().tolist() == [1, 1, 1]
        assert policy.asked == [[True, True, True], [False, True, True], [False, False, True]]
        assert columns.read_objects(finished["answer"], finished.batch_size) == ["0", "1", "2"]

    def test_a_failed_request_ends_its_row_only(self, mode):
        env = chat(mode, 3)
        policy = Script(
            env, lambda turn, row: f"#### {row}" if turn else "hm", lambda turn, row: turn == 0 and row == 1
        )
        rows = list(episodes(play(env, policy), env.tokenizer))
        assert [row["stop"] for row in rows] == ["answered", "error", "answered"]
        assert [row["error"] for row in rows] == [None, "gone", None]
        assert [row["turns"] for row in rows] == [2, 0, 2]
        assert rows[1]["cut"] is False
        assert rows[1]["sampled_tokens"] == 0
        assert rows[1]["sequences"][0]["sampled"] == []
        assert [row["success"] for row in rows] == [True, False, True]

    def test_rewards_stay_where_only_failures_are_left(self, mode):
        env = chat(mode, 2)
        policy = Script(
            env, lambda turn, row: "#### 0" if row == 0 else "hm", lambda turn, row: turn == 1 and row == 1
        )
        first, second = episodes(play(env, policy))
        assert (first["reward"], first["success"], first["stop"], first["error"]) == (1.0, True, "answered", None)
        assert (second["stop"], second["turns"]) == ("error", 1)

    def test_rewards_are_the_sum_over_the_turns_of_each_row(self, mode):
        words = [["a", "bb", "cccc"], ["dd", "e", "f"], ["g", "hh", "i"]]
        env = DatasetChatEnv(
            dataset=[{"query": "?", "answer": ""}], tokenizer=bpe_tokenizer(), input_mode=mode, num_envs=3, seed=1
        )
        paid = WeightedSum({"long": lambda response, _: len(response) / 8, "there": lambda *_: 0.5})
        env = env.append_transform(
            RewardTransform(paid, end_on_answer=False, when="turn", isolate=False, workers=1)
        )
        env = env.append_transform(UserSimulator(lambda messages: "again", turns=99))
        env = env.append_transform(Budget(max_turns=3))

        def script(fails=lambda turn, row: False):
            return Script(env, lambda turn, row: words[row][turn], fails)

        # The second row's request fails in its second turn, the third row's in its first.
        finished = play(env, script(lambda turn, row: (turn, row) in ((1, 1), (0, 2))))
        assert finished["reward_parts", "long"].flatten().tolist() == [7 / 8, 2 / 8, 0]
        assert finished["reward_parts", "there"].flatten().tolist() == [1.5, 0.5, 0]
        assert finished["reward"].shape == (3, 1, 1)
        assert finished["reward"].flatten().tolist() == [7 / 8 + 1.5, 2 / 8 + 0.5, 0]
        # The same as torchrl's return of a rollout.
        steps = env.rollout(3, script(), break_when_any_done=False)
        whole = play(env, script())["reward"]
        assert torch.equal(whole, steps["next", "reward"].sum(1))
        assert torch.equal(whole, training_view(steps, turns=True)["reward"])

    def test_rewards_that_have_no_sum(self):
        class PerToken(Transform):
            def _step(self, tensordict, next_tensordict):
                turns = len(next_tensordict["transcript"][0].spans)
                return next_tensordict.set("reward", torch.zeros(2, turns, 1))

        env = ChatEnv(tokenizer=bpe_tokenizer(), input_mode="tokens", batch_size=(2,))
        env = env.append_transform(UserSimulator(lambda messages: "again", turns=99)).append_transform(PerToken())
        td = env.reset(TensorDict(query=["a", "b"], batch_size=(2,)))
        with pytest.raises(ValueError, match=r"'reward' has the shape \(2, 1, 1\) in one turn and \(2, 2, 1\)"):
            play(env, Script(env, lambda *_: "hm"), td)

    def test_nothing_but_failures(self, mode):
        env = chat(mode, 2)
        rows = list(episodes(play(env, Script(env, lambda *_: "hm", lambda *_: True)), env.tokenizer))
        assert [(row["stop"], row["reward"], row["turns"]) for row in rows] == [("error", None, 0)] * 2

    def test_two_dimensions(self):
        env = ChatEnv(tokenizer=bpe_tokenizer(), input_mode="tokens", batch_size=(2, 2))
        env = env.append_transform(UserSimulator(lambda messages: "again", turns=99))
        env = env.append_transform(Budget(max_turns=3, max_tokens=12))
        td = env.reset(TensorDict(query=[["a", "b"], ["c", "d"]], batch_size=(2, 2)))
        finished = play(env, Script(env, lambda turn, row: "x" * (1 if row % 2 else 20)), td)
        rows = list(episodes(finished))
        assert [(row["query"], row["stop"], row["turns"]) for row in rows] == [
            ("a", "max_tokens", 1),
            ("b", "max_turns", 3),
            ("c", "max_tokens", 1),
            ("d", "max_turns", 3),
        ]

    def test_most_turns(self):
        env = chat("tokens", 2)
        policy = Script(env, lambda turn, row: "hm")
        rows = list(episodes(play(env, policy, max_turns=2)))
        assert [(row["stop"], row["turns"]) for row in rows] == [("running", 2)] * 2
        assert [row["stop"] for row in episodes(play(chat("tokens", 2), policy))] == ["max_turns"] * 2
        with pytest.raises(ValueError, match="max_turns is 0"):
            play(env, policy, max_turns=0)

    def test_nobody_ends_it(self):
        """An answer that nobody replies to is followed by another: said, unless that is what was asked for."""
        rows = [{"query": "a"}, {"query": "b"}]
        env = DatasetChatEnv(dataset=rows, tokenizer=bpe_tokenizer(), input_mode="tokens", num_envs=2)
        policy = Script(env, lambda *_: "hm")
        with pytest.warns(RuntimeWarning, match="2 of 2 conversations have not ended after 64 turns"):
            finished = play(env, policy)
        assert [len(transcript.spans) for transcript in finished["transcript"]] == [64] * 2
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            play(env, policy, max_turns=2)
            play(env.append_transform(EndOfDialogue()), policy)

    def test_origin(self):
        env = chat("tokens", 2, repeats=2)
        first, second = episodes(play(env, Script(env, lambda *_: "#### 0")))
        assert [(e["row"], e["epoch"], e["place"], e["group"]) for e in (first, second)] == [
            (0, 0, 0, "0.0"),
            (0, 0, 1, "0.0"),
        ]
        assert first["seed"] != second["seed"]
        assert int(first["seed"]) < 2**63
        assert (first["query"], first["reference"]) == ("question 0", "0")


class TestPieces:
    @given(st.lists(st.integers(0, 599), max_size=40))
    @settings(max_examples=200, deadline=None)
    def test_byte_level_pieces_are_the_text(self, ids):
        tokenizer = bpe_tokenizer()
        ids = [i for i in ids if i < len(tokenizer)]
        pieces = TokenPieces(tokenizer)(ids)
        assert len(pieces.texts) == len(ids)
        assert pieces.text is None
        assert "".join(pieces.texts) == codec_of(tokenizer).decode([ids])[0]

    @given(st.text(st.characters(exclude_categories=["Cs"])))
    @settings(deadline=None)
    def test_bytes_of_split_characters(self, text):
        tokenizer = bpe_tokenizer()
        [ids] = codec_of(tokenizer).encode([text])
        pieces = TokenPieces(tokenizer)(ids)
        raw = b"".join(pieces.partial.get(i, piece.encode()) for i, piece in enumerate(pieces.texts))
        assert raw == text.encode()
        assert all(0 <= i < len(ids) for i in pieces.partial)

    def test_a_character_stands_at_its_last_token(self):
        tokenizer = bpe_tokenizer()
        pieces = TokenPieces(tokenizer)(codec_of(tokenizer).encode(["é!"])[0])
        assert pieces == (["", "é", "!"], {0: b"\xc3", 1: b"\xa9"}, None)

    def test_a_cut_character_is_shown(self):
        tokenizer = bpe_tokenizer()
        ids = codec_of(tokenizer).encode(["a🎉"])[0][:-1]
        pieces = TokenPieces(tokenizer)(ids)
        assert pieces.texts == ["a", "", "", "\ufffd"]
        assert b"".join(pieces.partial.values()) == "🎉".encode()[:3]

    def test_a_character_that_never_ends(self):
        tokenizer = bpe_tokenizer()
        codec = codec_of(tokenizer)
        ids = [codec.encode(["é"])[0][0], codec.encode(["q"])[0][0]]
        assert TokenPieces(tokenizer)(ids) == (["", "\ufffdq"], {0: b"\xc3", 1: b"q"}, None)

    @pytest.mark.corpus
    @pytest.mark.parametrize("name", CORPUS)
    def test_real_tokenizers(self, name):
        tokenizer = corpus_tokenizer(name)
        codec, spell = codec_of(tokenizer), TokenPieces(tokenizer)
        known = [i for i in range(0, codec.vocab_size, 37) if tokenizer.convert_ids_to_tokens(i) is not None]
        texts = ["Hello world, 中文字 🎉👨‍👩‍👧 done\n\n  spaced   x", "é ñ 한국어 \t end", ""]
        for ids in (*codec.encode(texts), *(known[i : i + 9] for i in range(0, len(known) - 9, 97))):
            pieces = spell(ids)
            whole = codec.decode([ids])[0] if ids else ""
            assert len(pieces.texts) == len(ids)
            assert ("".join(pieces.texts) if pieces.text is None else pieces.text) == whole
        assert spell(codec.encode([texts[0]])[0]).text is None  # of ordinary text the pieces are exact


class TestFile:
    @given(st.lists(ANY_TEXT, min_size=1, max_size=3), st.floats(width=32), st.booleans())
    @settings(max_examples=60, deadline=None)
    def test_round_trip(self, tmp_path_factory, texts, reward, tokens):
        path = tmp_path_factory.mktemp("r") / "rollouts.jsonl"
        count = len(texts)
        batch = torch.Size([count])
        td = rows_of(
            texts,
            query=columns.objects(texts, batch, None),
            reward=torch.full((count, 1, 1), reward),
            success=torch.ones(count, 1, 1, dtype=torch.bool),
            reward_parts=TensorDict({"a": torch.full((count, 1, 1), math.nan)}, batch_size=batch),
        )
        assert write_rollouts(path, td, bpe_tokenizer(), tokens=tokens) == count
        for line in path.read_bytes().splitlines():
            strict(line)
        rows = list(read_rollouts(path, on_error="raise"))
        assert [row["query"] for row in rows] == texts
        assert [row["messages"][1]["content"] for row in rows] == texts
        for row, transcript in zip(rows, columns.read_objects(td["transcript"], batch), strict=True):
            expected = torch.tensor(reward).item()
            assert row["reward"] == (expected if math.isfinite(expected) else None)
            assert row["reward_parts"] == {"a": None}
            assert ("sequences" in row) == tokens
            for sequence in row.get("sequences", ()):
                assert sequence["ids"] == transcript.tokens.tolist()
                assert sequence["log_probs"] == pytest.approx(
                    transcript.log_probs[transcript.mask].tolist(), rel=1e-5
                )

    @given(st.lists(st.booleans(), max_size=30))
    def test_runs(self, mask):
        again = [False] * len(mask)
        found = runs(torch.tensor(mask, dtype=torch.bool))
        for start, end in found:
            again[start:end] = [True] * (end - start)
        assert again == mask
        assert all(a[1] < b[0] for a, b in itertools.pairwise(found))

    def test_unscored_rows_have_no_log_probs(self):
        start = Transcript.start([1], [{"role": "user", "content": "?"}])
        answered = start.sampled(torch.tensor([7]), None, {"role": "assistant", "content": "!"}, ended=False)
        td = TensorDict({"transcript": columns.objects([answered], torch.Size([1]), None)}, batch_size=[1])
        [row] = episodes(td)
        assert row["sequences"] == [{"ids": [1, 7], "sampled": [[1, 2]], "log_probs": None}]
        assert (row["cut"], row["reward"], row["row"]) == (True, None, None)

    def test_branches(self):
        start = Transcript.start([1, 2], [{"role": "user", "content": "?"}])
        said = {"role": "assistant", "content": "!"}
        first = start.sampled(torch.tensor([7, 8]), torch.tensor([-0.5, -0.25]), said, ended=True)
        second = first.branched([1, 2, 8], (first.spans[0]._replace(end=3),))
        second = second.sampled(torch.tensor([9]), torch.tensor([-1.0]), said, ended=True)
        td = TensorDict({"transcript": columns.objects([second], torch.Size([1]), None)}, batch_size=[1])
        [row] = episodes(td)
        assert [s["ids"] for s in row["sequences"]] == [[1, 2, 7, 8], [1, 2, 8, 9]]
        assert [s["sampled"] for s in row["sequences"]] == [[[2, 4]], [[3, 4]]]
        assert [s["log_probs"] for s in row["sequences"]] == [[-0.5, -0.25], [-1.0]]
        assert row["sampled_tokens"] == 3

    def test_half_a_surrogate_pair(self, tmp_path):
        path = tmp_path / "rollouts.jsonl"
        write_rollouts(path, rows_of(["a\ud83d"]))
        assert b"a\\ud83d" in path.read_bytes()
        [row] = read_rollouts(path)
        assert row["messages"][0]["content"] == "a\ud83d"

    def test_killed_while_writing(self, tmp_path):
        path = tmp_path / "rollouts.jsonl"
        write_rollouts(path, rows_of(["one", "two é"]), ids=["a", "b"])
        whole = path.read_bytes()
        last = whole.index(b"\n") + 1
        for end in range(last, len(whole) + 1):
            path.write_bytes(whole[:end])
            complete = end >= len(whole) - 1  # without its newline only, a line is whole
            with warnings.catch_warnings(record=True) as notes:
                warnings.simplefilter("always")
                found = [row["id"] for row in read_rollouts(path)]
            assert found == (["a", "b"] if complete else ["a"])
            assert len(notes) == (0 if complete or end == last else 1)
            write_rollouts(path, rows_of(["three"]), ids=["c"])
            assert [row["id"] for row in read_rollouts(path, on_error="raise")] == [*found, "c"]

    def test_mend_a_first_line(self, tmp_path):
        path = tmp_path / "r.jsonl"
        path.write_bytes(b'{"version": 1, "x": "' + b"y" * 200_000)
        mend(path)
        assert path.read_bytes() == b""
        mend(tmp_path / "none")

    @pytest.mark.parametrize(
        ("line", "why"),
        [
            (b"{oops", "not JSON"),
            (b"[1]", "a list, not an episode"),
            (b'{"id": 1}', "version is None"),
            (b'{"version": 99}', "version is 99"),
            (b'{"version": 1, "x": "\xff"}', "not JSON"),
            (b"[" * 200_000, "not JSON"),
        ],
    )
    def test_a_malformed_line_is_named(self, tmp_path, line, why):
        path = tmp_path / "rollouts.jsonl"
        good = [as_line(row) for row in episodes(rows_of(["one", "two"]), ids=["a", "b"])]
        path.write_bytes(good[0] + b"\n" + line + b"\n" + good[1])
        with pytest.warns(RuntimeWarning, match=f"line 3: .*{why}"):
            assert [row["id"] for row in read_rollouts(path)] == ["a", "b"]
        with pytest.raises(ValueError, match=f"line 3: .*{why}"):
            list(read_rollouts(path, on_error="raise"))

    def test_streaming(self, tmp_path):
        path = tmp_path / "rollouts.jsonl"
        write_rollouts(path, rows_of(["one"]), ids=["a"])
        with path.open("ab") as file:
            file.write(b"{oops\n")
        assert next(read_rollouts(path, on_error="raise"))["id"] == "a"  # what follows is not looked at yet

    def test_write_anew(self, tmp_path):
        path = tmp_path / "rollouts.jsonl"
        write_rollouts(path, rows_of(["one"]))
        write_rollouts(path, rows_of(["two"]), append=False, metadata={"step": 3})
        [row] = read_rollouts(path)
        assert row["messages"][0]["content"] == "two"
        assert row["metadata"]["step"] == 3

    def test_bad_calls(self, tmp_path):
        with pytest.raises(KeyError, match="needs 'transcript'"):
            list(episodes(TensorDict({"x": torch.zeros(1)}, batch_size=[1])))
        with pytest.raises(ValueError, match="ids has 1 entries for 2 episodes"):
            list(episodes(rows_of(["a", "b"]), ids=["x"]))
        with pytest.raises(ValueError, match="on_error='skip'"):
            next(read_rollouts(tmp_path / "x", on_error="skip"))

    @given(
        st.recursive(
            st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), ANY_TEXT, st.binary(max_size=3)),
            lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.one_of(ANY_TEXT, st.integers()), inner)),
        )
    )
    def test_anything_is_json(self, value):
        strict(as_line({"x": plain(value)}))

    def test_odd_objects(self):
        deep: list = []
        for _ in range(5000):
            deep = [deep]

        class Rude:
            def __repr__(self):
                raise RuntimeError

        values = [torch.tensor([1.0, math.inf]), {1, 2}, Path("a"), Rude(), deep]
        shown = strict(as_line({"x": plain(values)}))["x"]
        assert shown[0] == [1.0, None]
        assert shown[1:4] == [[1, 2], "a", "<Rude>"]


def test_every_field_is_documented():
    text = (Path(__file__).parent.parent / "docs" / "reference" / "rollouts.md").read_text()
    env = chat("tokens", 1)
    [row] = episodes(
        play(env, Script(env, lambda *_: "#### 0 é")), env.tokenizer, metadata={"step": 1, "policy": "p"}
    )
    named = set(re.findall(r"`([a-z_]+)`", text))
    assert {*row, *row["sequences"][0], *row["metadata"]} <= named
