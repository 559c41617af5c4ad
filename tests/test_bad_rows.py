"""One bad row ends alone, with a reason that names the row of the dataset; the batch goes on as if it had not been there."""

from __future__ import annotations

import warnings

import pytest
import torch
from conftest import CALLS_TEMPLATE, CHATML, bpe_tokenizer
from tensordict import TensorDict
from torchrl.envs.utils import check_env_specs
from torchrl.modules.llm.policies import LogProbs, Tokens

from torchrl_chat import (
    Budget,
    ChatEnv,
    DatasetChatEnv,
    GSM8KEnv,
    RewardTransform,
    Toolbox,
    ToolExecutor,
    TransformersPolicy,
    UserSimulator,
    columns,
    play,
    training_view,
)
from torchrl_chat.envs import ResponseError
from torchrl_chat.messages import MessageError, as_messages, half_character
from torchrl_chat.rollouts import episodes
from torchrl_chat.templates import ChatTemplateError
from torchrl_chat.tiny import TEXT_ALPHABET, tiny_model, tiny_tokenizer
from torchrl_chat.transforms import StopReason

HALF = "\ud83d"
# A template that refuses a word, as real ones refuse roles.
PICKY = (
    "{% for m in messages %}{% if 'forbidden' in m['content'] %}{{ raise_exception('no such word here') }}{% endif %}"
    "{% endfor %}" + CHATML
)
pytestmark = pytest.mark.filterwarnings("ignore:.*rows failed and are truncated:RuntimeWarning")


def dataset_env(mode, count=3, template=CHATML, rows=None, **options):
    rows = rows or [{"query": f"question {i}", "answer": str(i)} for i in range(9)]
    env = DatasetChatEnv(
        dataset=rows, tokenizer=bpe_tokenizer(template), input_mode=mode, num_envs=count, shuffle=False, **options
    )
    return env


def later(env):
    """The second batch of a dataset: the row of the dataset is not that of the batch."""
    env.reset()
    return env.reset()


def ledgers(td):
    return columns.read_objects(td["transcript"], td.batch_size)


def failures(td):
    return columns.read_objects(td["env_failure"], td.batch_size)


def reasons(td):
    return [StopReason(value) for value in td["stop_reason"].flatten().tolist()]


def answered(env, td, ids, log_probs=None, texts=None):
    """Responses as ids; as texts, in the form of the mode, if they are given."""
    td, batch = td.copy(), env.batch_size
    mode = getattr(env, "base_env", env).input_mode
    if texts is not None and mode == "text":
        td["text"] = columns.texts("response", texts, batch, None)
    elif texts is not None:
        rows = [columns.history_messages([{"role": "assistant", "content": text}]) for text in texts]
        td["history"] = columns.histories("response", rows, batch, None)
    else:
        td["tokens"] = columns.ragged(Tokens, "response", [torch.tensor(row) for row in ids], batch, None)
    if log_probs is not None:
        rows = [torch.tensor(row) for row in log_probs]
        td["log_probs"] = columns.ragged(LogProbs, "response", rows, batch, None)
    return td


def words(env, *texts):
    base = getattr(env, "base_env", env)
    return base.template.codec.encode([text + "<|im_end|>" for text in texts])


def faulty(env, kind):
    """What a policy writes whose second answer is bad, and what the message says of it."""
    ids = words(env, "one", "two", "three")
    scores = [[-0.5] * len(row) for row in ids]
    if kind == "empty":
        ids[1], scores[1] = [], []
        return {
            "ids": [ids[0], torch.empty(0, dtype=torch.int64), ids[2]],
            "log_probs": None,
        }, "the response is empty"
    if kind == "beyond":
        ids[1][0] = 10**6
        return {"ids": ids, "log_probs": scores}, "has id 1000000 at position 0, outside the vocabulary"
    if kind == "negative":
        ids[1][-1] = -1
        return {"ids": ids, "log_probs": scores}, "has id -1 at position"
    assert kind == "log-probs"
    scores[1].append(-0.1)
    return {"ids": ids, "log_probs": scores}, f"has {len(ids[1]) + 1} values for {len(ids[1])} sampled ids"


KINDS = ("empty", "beyond", "negative", "log-probs")


class TestAnswers:
    @pytest.mark.parametrize("kind", KINDS)
    def test_one_bad_answer_ends_its_row_alone(self, mode, kind):
        env = dataset_env(mode)
        td = later(env)
        before = ledgers(td)
        written, said = faulty(env, kind)
        with pytest.warns(
            RuntimeWarning, match=r"1 of 3 rows failed.*The first: row 1 of the batch, dataset row 4: Resp"
        ):
            stepped = env.step(answered(env, td, **written))["next"]
        assert stepped["done"].flatten().tolist() == stepped["truncated"].flatten().tolist() == [False, True, False]
        assert not stepped["terminated"].any()
        assert reasons(stepped) == [StopReason.RUNNING, StopReason.ERROR, StopReason.RUNNING]
        [first, failed, last] = failures(stepped)
        assert (first, last) == ("", "")
        assert failed.startswith("dataset row 4: ResponseError: ")
        assert said in failed
        found = ledgers(stepped)
        assert found[1] == before[1]
        clean = env.step(answered(env, td, words(env, "one", "two", "three"), written["log_probs"] and [
            [-0.5] * len(row) for row in words(env, "one", "two", "three")
        ]))["next"]  # fmt: skip
        for i in (0, 2):
            assert found[i] == ledgers(clean)[i]

    @pytest.mark.parametrize("mode", ["history", "text"])
    @pytest.mark.parametrize("text", ["", "4" + HALF, HALF])
    def test_texts(self, mode, text):
        env = dataset_env(mode)
        td = later(env)
        stepped = env.step(answered(env, td, None, texts=["one<|im_end|>", text, "three<|im_end|>"]))["next"]
        assert stepped["done"].flatten().tolist() == [False, True, False]
        said = "half a surrogate pair" if text else "is empty"
        assert said in failures(stepped)[1]
        assert failures(stepped)[1].startswith("dataset row 4: ")
        assert [t.messages[-1]["content"] for t in ledgers(stepped)][::2] == ["one", "three"]

    def test_without_a_tokenizer(self):
        env = ChatEnv(batch_size=(2,))
        td = env.reset(TensorDict(query=["a", "b"], batch_size=(2,)))
        stepped = env.step(answered(env, td, None, texts=["", "fine"]))["next"]
        assert stepped["done"].flatten().tolist() == [True, False]
        assert failures(stepped)[0].startswith("row 0: ResponseError: ")

    def test_one_row_without_a_response(self):
        env = dataset_env("tokens", 2)
        td = later(env)
        rows = [columns.row_td({"response": torch.tensor(words(env, "one")[0])}), columns.row_td({})]
        td["tokens"] = Tokens._from_tensordict(columns.stack_rows(rows, env.batch_size))
        stepped = env.step(td)["next"]
        assert stepped["done"].flatten().tolist() == [False, True]
        assert "is missing, though other rows have it" in failures(stepped)[1]

    @pytest.mark.parametrize("kind", KINDS)
    def test_all_rows_of_the_batch(self, kind):
        env = dataset_env("tokens", 3)
        written, _ = faulty(env, kind)
        bad = {key: value and [value[1]] * 3 for key, value in written.items()}
        stepped = env.step(answered(env, env.reset(), **bad))["next"]
        assert stepped["done"].all()
        assert all(failures(stepped))

    @pytest.mark.parametrize("kind", KINDS)
    def test_raised_where_that_is_asked_for(self, mode, kind):
        env = ChatEnv(tokenizer=bpe_tokenizer(), input_mode=mode, batch_size=(3,), errors="raise")
        td = env.reset(TensorDict(query=["a", "b", "c"], batch_size=(3,)))
        written, said = faulty(env, kind)
        with pytest.raises(ResponseError) as raised:
            env.step(answered(env, td, **written))
        assert said in str(raised.value)
        assert "row 1" in str(raised.value)

    def test_datasets_and_tasks_pass_it_on(self):
        assert dataset_env("text", errors="raise").base_env.errors == "raise"
        rows = [{"question": "a", "answer": "#### 1"}]
        assert GSM8KEnv(dataset=rows, tokenizer=bpe_tokenizer(), errors="raise").base_env.errors == "raise"
        loader = [{"query": ["a"], "answer": ["1"]}]
        made = DatasetChatEnv.from_dataloader(loader, tokenizer=bpe_tokenizer(), errors="raise")
        assert made.base_env.errors == "raise"
        with pytest.raises(ValueError, match="errors is 'warn'"):
            ChatEnv(errors="warn")

    def test_what_a_row_that_is_not_stepped_holds_is_nobodys_affair(self, mode):
        env = dataset_env(mode)
        td = later(env)
        written, _ = faulty(env, "beyond")
        td = answered(env, td, **written)
        td["_step"] = torch.tensor([True, False, True])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            stepped = env.step(td)["next"]
        assert failures(stepped) == ["", "", ""]
        assert not stepped["done"].any()

    def test_a_failed_row_stays_failed_until_its_reset(self, mode):
        env = dataset_env(mode)
        td = env.step(answered(env, later(env), **faulty(env, "beyond")[0]))
        again = env.step_mdp(td)
        stepped = env.step(answered(env, again, words(env, "x", "y", "z")))["next"]
        assert failures(stepped)[1].startswith("dataset row 4")
        assert stepped["done"].flatten().tolist() == [False, True, False]
        again["_reset"] = torch.tensor([[False], [True], [False]])
        fresh = env.reset(again)
        assert failures(fresh) == ["", "", ""]
        assert fresh["episode_row"].tolist() == [3, 6, 5]
        assert reasons(fresh) == [StopReason.RUNNING] * 3

    def test_whole_batches_that_are_wrong_are_still_raised(self, mode):
        env = dataset_env(mode, 2)
        td = env.reset()
        with pytest.raises(KeyError, match="step needs"):
            env.step(td)
        wrong = answered(env, td, words(env, "a", "b"))
        wrong["tokens"].prompt = [torch.tensor([1, 2]), torch.tensor([1, 2])]
        with pytest.raises(ResponseError, match="not the ledger's"):
            env.step(wrong)


BAD_QUESTIONS = {
    "none": (None, "MessageError"),
    "refused": ("a forbidden word", "ChatTemplateError: "),
    "half": ("what" + HALF, "half a surrogate pair"),
    "malformed": ([{"role": "user"}], "has no 'content'"),
    "nothing": ([], "is empty"),
}


class TestQuestions:
    def bad(self, mode, kind, **options):
        question, said = BAD_QUESTIONS[kind]
        rows = [{"query": f"question {i}", "answer": str(i)} for i in range(6)]
        rows[4]["query"] = question
        loader = [{"query": [row["query"] for row in rows], "answer": [row["answer"] for row in rows]}]
        env = DatasetChatEnv.from_dataloader(
            loader, tokenizer=bpe_tokenizer(PICKY), input_mode=mode, batch_size=(3,), **options
        )
        return env, said

    @pytest.mark.parametrize("kind", BAD_QUESTIONS)
    def test_one_bad_question_ends_its_row_alone(self, mode, kind):
        env, said = self.bad(mode, kind)
        env.reset()
        with pytest.warns(RuntimeWarning, match="1 of 3 rows failed.*dataset row 4"):
            td = env.reset()
        assert not td["done"].any()  # torchrl's resets begin something in every row
        assert reasons(td) == [StopReason.RUNNING, StopReason.ERROR, StopReason.RUNNING]
        assert failures(td)[1].startswith("dataset row 4: ")
        assert said in failures(td)[1]
        stepped = env.step(answered(env, td, words(env, "one", "two", "three")))["next"]
        assert stepped["done"].flatten().tolist() == stepped["truncated"].flatten().tolist() == [False, True, False]
        assert [len(t.spans) for t in ledgers(stepped)] == [1, 0, 1]
        assert failures(stepped)[1] == failures(td)[1]
        assert [t.messages[0]["content"] for t in ledgers(stepped)][::2] == ["question 3", "question 5"]

    @pytest.mark.parametrize("kind", BAD_QUESTIONS)
    def test_raised_where_that_is_asked_for(self, kind):
        env, said = self.bad("text", kind, errors="raise")
        env.reset()
        with pytest.raises((MessageError, ChatTemplateError)) as raised:
            env.reset()
        assert said.removesuffix(": ") in f"{type(raised.value).__name__}: {raised.value}"

    def test_a_budget_leaves_it_nothing_to_sample(self):
        env, _ = self.bad("tokens", "refused")
        env = env.append_transform(Budget(max_turns=3))
        td = later(env)
        assert (td["tokens_left"].flatten() > 0).tolist() == [True, False, True]
        finished = play(env, lambda td: answered(env, td, words(env, "one", "two", "three")), td)
        assert reasons(finished) == [StopReason.MAX_TURNS, StopReason.ERROR, StopReason.MAX_TURNS]

    @pytest.mark.parametrize("kind", ["none", "refused"])
    def test_a_batch_of_nothing_but_bad_questions(self, mode, kind):
        question, said = BAD_QUESTIONS[kind]
        loader = [{"query": [question, question], "answer": ["1", "2"]}]
        env = DatasetChatEnv.from_dataloader(
            loader, tokenizer=bpe_tokenizer(PICKY), input_mode=mode, batch_size=(2,)
        )
        td = env.reset()
        assert all(said in failure for failure in failures(td))
        assert env.step(answered(env, td, words(env, "one", "two")))["next", "done"].all()

    def test_a_system_prompt_that_the_template_refuses_is_no_rows_affair(self, mode):
        env = dataset_env(mode, template=PICKY, system_prompt="a forbidden word")
        with pytest.raises(ChatTemplateError, match="no such word"):
            env.reset()

    def test_specs(self, mode):
        check_env_specs(dataset_env(mode))
        check_env_specs(dataset_env(mode).append_transform(Budget(max_turns=2)))

    def test_two_dimensions(self):
        env = ChatEnv(tokenizer=bpe_tokenizer(), input_mode="text", batch_size=(2, 2))
        rows = columns.objects(["a", None, "c", "d" + HALF], env.batch_size, None)
        td = env.reset(TensorDict(query=rows, batch_size=(2, 2)))
        assert [bool(failure) for failure in failures(td)] == [False, True, False, True]
        td["text"] = columns.texts("response", ["x<|im_end|>"] * 4, env.batch_size, None)
        assert env.step(td)["next", "done"].flatten().tolist() == [False, True, False, True]


class TestWhatOthersSay:
    @pytest.mark.parametrize("reply", ["and" + HALF, {"role": "user", "content": HALF}, "a forbidden word"])
    def test_a_simulated_user(self, mode, reply):
        env = dataset_env(mode, template=PICKY)
        env = env.append_transform(UserSimulator(lambda m: reply if "4" in m[0]["content"] else "And?"))
        td = later(env)
        with pytest.warns(RuntimeWarning, match=r"1 of 3 simulated users failed.*dataset row 4"):
            stepped = env.step(answered(env, td, words(env, "one", "two", "three")))["next"]
        assert stepped["done"].flatten().tolist() == [False, True, False]
        assert reasons(stepped) == [StopReason.RUNNING, StopReason.ERROR, StopReason.RUNNING]
        said = columns.read_objects(stepped["user_failure"], stepped.batch_size)
        assert said[1].endswith("(dataset row 4)")
        assert [t.messages[-1]["role"] for t in ledgers(stepped)] == ["user", "assistant", "user"]

    def test_a_tools_result_that_the_template_refuses(self):
        def word(which: str) -> str:
            """Says a word.

            Args:
                which: the word.
            """
            return which

        tools = Toolbox([word])
        env = dataset_env(
            "text", template=PICKY.replace(CHATML, CALLS_TEMPLATE), template_kwargs={"tools": tools.schemas}
        ).append_transform(ToolExecutor(tools))
        calls = [
            f'<tool_call>\n{{"name": "word", "arguments": {{"which": "{which}"}}}}\n</tool_call>'
            for which in ("fine", "for" + "bidden", "good")
        ]
        stepped = env.step(answered(env, later(env), words(env, *calls)))["next"]
        assert stepped["done"].flatten().tolist() == [False, True, False]
        assert reasons(stepped)[1] == StopReason.ERROR
        assert columns.read_objects(stepped["tool_failure"], stepped.batch_size)[1].endswith("(dataset row 4)")

    def test_appended_by_hand(self, mode):
        env = dataset_env(mode, template=PICKY)
        td = env.step_mdp(env.step(answered(env, env.reset(), words(env, "one", "two", "three"))))
        errors: dict[int, Exception] = {}
        after = env.base_env.append_messages(td, ["fine", "a" + HALF, "forbidden"], errors=errors)
        assert sorted(errors) == [1, 2]
        assert isinstance(errors[1], MessageError)
        assert [t.messages[-1]["role"] for t in ledgers(after)] == ["user", "assistant", "assistant"]
        with pytest.raises(MessageError, match=r"messages\[1\] has half a surrogate pair"):
            env.base_env.append_messages(td, ["fine", "a" + HALF, None])


class TestTraining:
    @pytest.mark.parametrize("graded", [False, True])
    def test_nothing_of_a_failed_row_is_trained(self, mode, graded):
        env = dataset_env(mode)
        if graded:
            env = env.append_transform(RewardTransform(lambda response, reference: 1.0, end_on_answer=False))
        env = env.append_transform(UserSimulator(["And?"])).append_transform(Budget(max_turns=2))
        td = env.step_mdp(env.step(answered(env, later(env), words(env, "one", "two", "three"))))
        stepped = env.step(answered(env, td, **faulty(env, "beyond")[0]))["next"]
        assert reasons(stepped) == [StopReason.ANSWERED, StopReason.ERROR, StopReason.ANSWERED] or reasons(
            stepped
        ) == [StopReason.MAX_TURNS, StopReason.ERROR, StopReason.MAX_TURNS]
        view = training_view(stepped, layout="padded")
        assert view["masks", "all_assistant_mask"].any(-1).tolist() == [True, False, True]
        if graded:
            assert stepped["graded"].flatten().tolist() == [True, False, True]
            assert columns.read_objects(stepped["grade_failure"], stepped.batch_size)[1].startswith("dataset row 4")
            assert view["reward"].flatten().tolist() == [1.0, 0.0, 1.0]

    def test_rollout_files(self):
        env = dataset_env("text")
        stepped = env.step(answered(env, later(env), **faulty(env, "beyond")[0]))
        [_, failed, fine] = episodes(stepped)
        assert failed["stop"] == "error"
        assert failed["env_failure"].startswith("dataset row 4")
        assert fine["env_failure"] is None

    def test_a_collector_goes_on(self):
        from torchrl.collectors.llm import LLMCollector

        tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        loader = [{"query": ["Hi", None, "Yes", "No"], "answer": ["#### 1"] * 4}]
        env = GSM8KEnv.from_dataloader(loader, tokenizer=tokenizer, input_mode="tokens", batch_size=(2,))
        policy = TransformersPolicy(tiny_model(len(tokenizer)), tokenizer, max_new_tokens=4)
        collector = LLMCollector(
            env, policy=policy, dialog_turns_per_batch=4, total_dialog_turns=12, yield_completed_trajectories=False
        )
        seen = []
        for batch in collector:
            following = batch["next"]
            for step in following.unbind(-1) if following.ndim > 1 else [following]:
                seen += list(zip(batch_rows(step), step["done"].flatten().tolist(), strict=True))
        collector.shutdown()
        assert len(seen) == 12
        assert all(done for _, done in seen)
        assert sum(bool(failure) for failure, _ in seen) == 3


def batch_rows(td):
    return columns.read_objects(td["env_failure"], td.batch_size)


def test_half_characters():
    assert [half_character(text) for text in ("", "abc", "é😀", "é" + HALF, "\udc00x")] == [None, None, None, 1, 0]
    for value in (
        HALF,
        {"role": "user", "content": HALF},
        [{"role": "user", "content": [{"type": "text", "text": HALF}]}],
    ):
        with pytest.raises(MessageError, match="half a surrogate pair"):
            as_messages(value)
