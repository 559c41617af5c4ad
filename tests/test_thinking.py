"""AddThinkingPrompt: exact in every mode, rows that are not asked untouched, each sampled token trained once."""

from __future__ import annotations

import pytest
import torch
from conftest import CORPUS, bpe_tokenizer, corpus_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torchrl.modules.llm.policies import LogProbs, Tokens

from torchrl_chat import BridgeError, ChatEnv, GSM8KEnv, columns, training_view
from torchrl_chat.transforms import AddThinkingPrompt


def ledgers(td):
    return columns.read_objects(td["transcript"], td.batch_size)


def respond(env, td, texts, stop="<|im_end|>"):
    """Write the responses in the form of the environment's mode, with their ids."""
    td, batch = td.copy(), env.batch_size
    base = getattr(env, "base_env", env)
    ids = [base.template.codec.encode([text + stop])[0] for text in texts]
    if base.input_mode == "text":
        td["text"] = columns.texts("response", [text + stop for text in texts], batch, None)
    if base.input_mode == "history":
        rows = [columns.history_messages([{"role": "assistant", "content": text}]) for text in texts]
        td["history"] = columns.histories("response", rows, batch, None)
    td["tokens"] = columns.ragged(Tokens, "response", list(map(torch.tensor, ids)), batch, None)
    scores = [-torch.arange(1.0, len(row) + 1) for row in ids]
    td["log_probs"] = columns.ragged(LogProbs, "response", scores, batch, None)
    return env.step(td)


def env_of(mode, rows, transform, **kwargs):
    env = ChatEnv(tokenizer=bpe_tokenizer(), input_mode=mode, batch_size=(rows,), **kwargs)
    return env.append_transform(transform)


def start(env, *queries):
    return env.reset(TensorDict(query=list(queries), batch_size=(len(queries),)))


def wrong(row) -> bool:
    return "wrong" in ledgers(row.unsqueeze(0))[0].messages[-1]["content"]


def decoded(env, ids) -> str:
    return env.base_env.template.codec.decode([list(ids)])[0]


def test_a_users_message(mode):
    env = env_of(mode, 2, AddThinkingPrompt(wrong, prompt="Again, please.", role="user"))
    td = start(env, "2 + 2?", "3 + 3?")
    stepped = respond(env, td, ["wrong 5", "6"])["next"]
    asked, left = ledgers(stepped)
    assert [m["content"] for m in asked.messages] == ["2 + 2?", "wrong 5", "Again, please."]
    plain = respond(env_of(mode, 2, AddThinkingPrompt(lambda row: False)), td, ["wrong 5", "6"])["next"]
    assert left == ledgers(plain)[1]
    assert asked.tokens.tolist()[: len(ledgers(plain)[0])] == ledgers(plain)[0].tokens.tolist()
    assert asked.num_sampled == ledgers(plain)[0].num_sampled
    assert not asked.branches


def test_an_edited_answer_is_a_branch(mode):
    transform = AddThinkingPrompt(wrong, prompt="But wait.")
    env = env_of(mode, 2, transform)
    td = start(env, "2 + 2?", "3 + 3?")
    first = respond(env, td, ["so wrong <answer>5</answer> indeed", "fine <answer>6</answer>"])
    asked, left = ledgers(first["next"])
    assert decoded(env, asked.tokens.tolist()).endswith("<|im_start|>assistant\nso wrong But wait.")
    assert not asked.mask.any()
    assert asked.messages[-1] == {"role": "assistant", "content": "so wrong But wait."}
    assert left.ended
    assert not left.branches
    [branch] = asked.branches
    kept = branch.tokens[: branch.mask.nonzero()[0]].tolist()
    assert asked.tokens[: len(kept)].tolist() == kept
    if mode == "text":
        assert asked.text == decoded(env, asked.tokens.tolist())
    # The policy goes on in the same turn.
    transform.cond = lambda row: False
    root = env.base_env.append_messages(env.step_mdp(first), [None, "and 4 + 4?"])
    second = respond(env, root, [" It is <answer>4</answer>", "8"])["next"]
    again, _ = ledgers(second)
    assert again.messages[-1]["content"] == "so wrong But wait. It is <answer>4</answer>"
    assert [m["role"] for m in again.messages] == ["user", "assistant"]
    text = decoded(env, again.tokens.tolist())
    assert text.endswith("<|im_start|>assistant\nso wrong But wait. It is <answer>4</answer><|im_end|>\n")
    assert decoded(env, again.tokens[again.mask].tolist()) == " It is <answer>4</answer><|im_end|>"
    if mode == "text":
        assert again.text == text
    view = training_view(second)
    assert view["episode"].tolist() == [0, 0, 1]
    trained = [int(mask.sum()) for mask in view["masks"].get("all_assistant_mask", as_list=True)]
    assert sum(trained[:2]) == again.total_sampled == int(branch.mask.sum()) + again.num_sampled
    scores = view["log_probs"].get("full", as_list=True)
    masks = view["masks"].get("all_assistant_mask", as_list=True)
    assert all(
        (score[mask] < 0).all() and (score[~mask] == 0).all() for score, mask in zip(scores, masks, strict=True)
    )
    # And the conversation goes on as any other.
    [more, _] = ledgers(env.base_env.append_messages(second, ["thanks", None]))
    assert decoded(env, more.tokens.tolist()) == text + (
        "<|im_start|>user\nthanks<|im_end|>\n<|im_start|>assistant\n"
    )


def test_an_appended_turn_is_an_extension(mode):
    transform = AddThinkingPrompt(lambda row: True, prompt="But wait.", edit_last_turn=False)
    env = env_of(mode, 1, transform)
    first = respond(env, start(env, "2 + 2?"), ["5"])
    [asked] = ledgers(first["next"])
    text = decoded(env, asked.tokens.tolist())
    assert text.endswith("assistant\n5<|im_end|>\n<|im_start|>assistant\nBut wait.")
    assert not asked.branches
    assert asked.num_sampled == 2
    transform.cond = lambda row: False
    [again] = ledgers(respond(env, env.step_mdp(first), [" 4"])["next"])
    assert [m["content"] for m in again.messages] == ["2 + 2?", "5", "But wait. 4"]
    assert again.tokens[: len(asked)].tolist() == asked.tokens.tolist()
    assert decoded(env, again.tokens.tolist()) == text + " 4<|im_end|>\n"
    assert again.num_sampled == 4 if len(again.tokens[again.mask]) == 4 else again.num_sampled > 2


@settings(max_examples=60, deadline=None)
@given(
    said=st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=40),
    words=st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=20),
    share=st.floats(0, 1),
)
def test_an_edit_anywhere_keeps_whole_tokens(said, words, share):
    env = ChatEnv(tokenizer=bpe_tokenizer(), input_mode="text", batch_size=(1,))
    said = "a" + said.replace("<|", "")
    following = respond(env, start(env, "hi"), [said])["next"]
    [text] = env.answer_texts(following)
    assert text == said
    at = int(share * len(text))
    [before], [after] = ledgers(following), ledgers(env.edit_answers(following, [(at, words)]))
    codec, begin = env.template.codec, before.spans[0].start
    assert codec.decode([after.tokens[begin:].tolist()])[0] == said[:at] + words
    assert after.text == codec.decode([after.tokens.tolist()])[0]
    shared = 0
    while shared < min(len(before), len(after)) and before.tokens[shared] == after.tokens[shared]:
        shared += 1
    kept = codec.decode([before.tokens[begin:shared].tolist()])[0] if shared > begin else ""
    rest = before.tokens[shared : shared + 1].tolist()
    # No whole token in front of the edit was made anew.
    assert (
        len(kept + codec.decode([rest])[0]) > at
        or not rest
        or shared >= before.spans[0].end - 1
        or kept == said[:at]
    )


class TestRowsThatCannotGoOn:
    def env(self, mode, rows, **kwargs):
        return env_of(mode, rows, AddThinkingPrompt(lambda row: True, prompt="Again.", **kwargs))

    def test_user(self, mode, monkeypatch):
        """One row that the template refuses stays as it is; the other is asked."""
        env = self.env(mode, 2, role="user")
        append = env.base_env.append_messages

        def refuse(td, messages, errors=None):
            errors[0] = BridgeError("no no")
            return append(td, [None, *messages[1:]], errors)

        monkeypatch.setattr(env.base_env, "append_messages", refuse)
        td = start(env, "a", "b")
        with pytest.warns(RuntimeWarning, match="1 of 2 rows .*row 0: no no"):
            stepped = respond(env, td, ["no", "yes"])["next"]
        left, asked = ledgers(stepped)
        assert [m["content"] for m in left.messages] == ["a", "no"]
        assert [m["content"] for m in asked.messages] == ["b", "yes", "Again."]

    @pytest.mark.parametrize("edit", [True, False])
    def test_assistant(self, mode, monkeypatch, edit):
        env = self.env(mode, 2, edit_last_turn=edit)
        changed = env.base_env._changed

        def refuse(td, changes, change, errors):
            def refusing(transcript, *rest):
                if transcript.messages[-1]["content"] == "no":
                    raise BridgeError("no no")
                return change(transcript, *rest)

            return changed(td, changes, refusing, errors)

        monkeypatch.setattr(env.base_env, "_changed", refuse)
        td = start(env, "a", "b")
        with pytest.warns(RuntimeWarning, match="1 of 2 rows .*row 0: no no"):
            stepped = respond(env, td, ["no", "yes"])["next"]
        left, asked = ledgers(stepped)
        assert left.messages[-1]["content"] == "no"
        assert left.ended is not None
        assert "Again." in asked.messages[-1]["content"]
        with pytest.raises(BridgeError, match="no no"):
            respond(env, td, ["no", "no"])


@pytest.mark.parametrize("name", CORPUS)
def test_real_templates(name):
    """An edited turn needs nothing of the template; an appended one is exact or refused."""
    tokenizer = corpus_tokenizer(name)
    env = ChatEnv(tokenizer=tokenizer, input_mode="tokens", batch_size=(1,))
    stop = env.template.codec.token_text(
        env.template.close([{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]).main[0]
    )
    td = env.reset(TensorDict(query=["What is 2 + 2?"], batch_size=(1,)))
    following = respond(env, td, ["I say <answer>5</answer>"], stop)["next"]
    [old] = ledgers(following)
    [text] = env.answer_texts(following)
    [new] = ledgers(env.edit_answers(following, [(text.index("<answer>"), "no, wait:")]))
    assert new.tokens[: old.spans[0].start].tolist() == old.tokens[: old.spans[0].start].tolist()
    assert env.template.codec.decode([new.tokens[old.spans[0].start :].tolist()])[0].strip() == "I say no, wait:"
    try:
        [opened] = ledgers(env.begin_answers(following, ["no, wait:"]))
    except BridgeError:
        return
    assert opened.tokens[: len(old)].tolist() == old.tokens.tolist()
    whole = tokenizer.apply_chat_template(
        [
            {"role": "user", "content": "What is 2 + 2?"},
            {"role": "assistant", "content": "I say <answer>5</answer>"},
        ],
        tokenize=False,
        add_generation_prompt=True,
    )
    shown = env.template.codec.decode([opened.tokens.tolist()])[0]
    assert "".join(shown.split()) == "".join(f"{whole}no, wait:".split())  # some tokenizers drop spaces at tokens


class TestWithRewards:
    rows = [{"question": "2 + 2?", "answer": "#### 4"}, {"question": "3 + 3?", "answer": "#### 6"}]

    def env(self, mode, **kwargs):
        env = GSM8KEnv(
            dataset=self.rows, tokenizer=bpe_tokenizer(), input_mode=mode, num_envs=2, shuffle=False, max_steps=3,
            system_prompt="",
        )  # fmt: skip
        return env.append_transform(AddThinkingPrompt(lambda row: not row["success"].any(), **kwargs))

    def test_reward_and_done(self, mode):
        env = self.env(mode)
        following = respond(env, env.reset(), ["<answer>5</answer>", "<answer>6</answer>"])["next"]
        assert following["done"].flatten().tolist() == [False, True]
        assert following["terminated"].flatten().tolist() == [False, True]
        assert following["reward"].flatten().tolist() == [0.0, 1.0]
        kept = respond(env2 := self.env(mode, undo_done=False), env2.reset(), ["<answer>5</answer>"] * 2)["next"]
        assert kept["done"].all()

    def test_the_second_answer_is_graded_as_a_whole(self, mode):
        env = self.env(mode, prompt="Wait.")
        first = respond(env, env.reset(), ["I think <answer>5</answer>", "<answer>6</answer>"])
        root = env.step_mdp(first)
        second = respond(env, root, [" No: <answer>4</answer>", "x"])["next"]
        assert ledgers(second)[0].messages[-1]["content"] == "I think Wait. No: <answer>4</answer>"
        assert second["success"].flatten().tolist()[0]


def test_random_prompts_are_seeded():
    def said(seed):
        env = env_of("tokens", 8, AddThinkingPrompt(lambda row: True, role="user", random_prompt=True, seed=seed))
        following = respond(env, start(env, *map(str, range(8))), [str(i) for i in range(8)])["next"]
        return [ledger.messages[-1]["content"] for ledger in ledgers(following)]

    assert said(1) == said(1)
    assert len(set(said(1))) > 1
    assert said(1) != said(2)
    assert set(said(1)) <= set(AddThinkingPrompt.SECOND_PERSON)


def test_stepping_twice_gives_the_same(mode):
    env = env_of(mode, 1, AddThinkingPrompt(wrong, random_prompt=True))
    td = start(env, "2 + 2?")
    assert ledgers(respond(env, td, ["wrong"])["next"]) == ledgers(respond(env, td, ["wrong"])["next"])


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [({"role": "tool"}, "role='tool'"), ({"role": "user", "edit_last_turn": True}, "edit_last_turn")],
)
def test_bad_arguments(kwargs, match):
    with pytest.raises(ValueError, match=match):
        AddThinkingPrompt(lambda row: True, **kwargs)


def test_only_answers_are_edited():
    env = ChatEnv(tokenizer=bpe_tokenizer(), input_mode="tokens", batch_size=(1,))
    with pytest.raises(ValueError, match="waits for the policy"):
        env.edit_answers(start(env, "hi"), [(0, "x")])
