"""``ChatEnv``: specs, layouts, statelessness, partial resets, and what bad input gets."""

from __future__ import annotations

import pickle

import pytest
import torch
from chat_rows import ledgers, make, queries, respond
from conftest import bpe_tokenizer
from tensordict import LazyStackedTensorDict, TensorDict
from torchrl.data.llm import History
from torchrl.envs import EnvBase, StepCounter, TransformedEnv
from torchrl.envs.utils import _StepMDP, check_env_specs
from torchrl.modules.llm.policies import ChatHistory, LogProbs, Masks, Text, Tokens

from torchrl_chat import BridgeError, ChatEnv, ChatTemplateError, MessageError, ResponseError, columns
from torchrl_chat.envs.stepping import FlatStepMDP


class TestSpecs:
    @pytest.mark.parametrize("batch", [(1,), (3,), (2, 2)])
    def test_check_env_specs(self, mode, batch):
        env = make(mode, batch)
        check_env_specs(env, tensordict=env.reset(queries(env)))

    def test_check_env_specs_without_a_tokenizer(self):
        env = ChatEnv(batch_size=(2,))
        check_env_specs(env, tensordict=env.reset(queries(env)))

    def test_check_env_specs_on_a_device(self, mode):
        env = make(mode, device="cpu")
        td = env.reset(queries(env).to("cpu"))
        assert td.device == td["tokens"].device == torch.device("cpu")
        check_env_specs(env, tensordict=td)

    def test_random_rows_differ_in_length(self, mode):
        env = make(mode, 8)
        td = env.rollout(2, auto_reset=False, tensordict=env.reset(queries(env)))
        lengths = {len(t) for t in ledgers(td[..., -1]["next"])}
        assert len(lengths) > 1

    def test_is_an_env(self, mode):
        env = make(mode)
        assert isinstance(env, EnvBase)
        assert env.data_key == "query"
        assert env.text_key == ("text", "prompt")
        assert env.response_key == ("text", "response")


class TestObservation:
    def test_every_mode_carries_what_training_needs(self, mode):
        env = make(mode)
        td = env.reset(queries(env))
        assert type(td["tokens"]) is Tokens
        assert type(td["masks"]) is Masks
        assert type(td["log_probs"]) is LogProbs
        for container, key, dtype in (
            ("tokens", "prompt", torch.int64),
            ("masks", "all_assistant_mask", torch.bool),
            ("log_probs", "prompt", torch.float32),
        ):
            rows = td.get((container, key), as_list=True)
            assert len(rows) == 3
            assert all(row.dtype == dtype and row.ndim == 1 for row in rows)
        if mode == "history":
            assert type(td["history"]) is ChatHistory
            assert td["history"][0].prompt.role == ["user"]
            assert td["history"][0].prompt[0].content == "question "
        if mode == "text":
            assert type(td["text"]) is Text
            assert td["text"][1].prompt == "<|im_start|>user\nquestion x<|im_end|>\n<|im_start|>assistant\n"

    def test_step_closes_the_turn(self, mode):
        env = make(mode, 1)
        for ended in (True, False):
            td = env.reset(queries(env))
            td = env.step(respond(env, td, ["forty two"], ended=ended))
            [ledger] = ledgers(td["next"])
            text = env.template.codec.decode([ledger.tokens.tolist()])[0]
            assert text.endswith("<|im_start|>assistant\nforty two<|im_end|>\n")
            assert ledger.messages[-1] == {"role": "assistant", "content": "forty two"}
            assert ledger.ended is ended
            if mode == "text":
                assert td["next", "text"][0].prompt == text
            if mode == "history":
                assert td["next", "history"][0].prompt.role == ["user", "assistant"]

    def test_system_prompt_and_roles(self, mode):
        env = make(mode, 1, system_prompt="Be brief.", user_role="human", policy_role="model", system_role="rules")
        td = env.reset(TensorDict(query=["hi"], batch_size=(1,)))
        assert [m["role"] for m in ledgers(td)[0].messages] == ["rules", "human"]
        td = env.step(respond(env, td))
        assert ledgers(td["next"])[0].messages[-1]["role"] == "model"

    def test_few_shot_prompts(self, mode):
        shots = [
            {"role": "user", "content": "1+1"},
            {"role": "assistant", "content": "2"},
            {"role": "user", "content": "2+2"},
        ]
        env = make(mode, 2)
        td = env.reset(TensorDict(query=columns.objects([shots, shots[:1]], env.batch_size, None), batch_size=(2,)))
        assert [len(t.messages) for t in ledgers(td)] == [3, 1]
        assert not any(t.mask.any() for t in ledgers(td))
        as_lists = env.reset(TensorDict(query=[shots, shots], batch_size=(2,)))
        assert ledgers(as_lists)[1].messages == tuple(shots)

    def test_query_as_history(self, mode):
        env = make(mode, 1)
        history = History.from_chats([[{"role": "user", "content": "1+1"}]])
        td = env.reset(TensorDict({"query": history}, batch_size=(1,)))
        assert ledgers(td)[0].messages == ({"role": "user", "content": "1+1"},)

    def test_another_data_key(self, mode):
        env = make(mode, 2, data_key="question")
        td = env.reset(TensorDict(question=["a", "b"], extra=[1, 2], batch_size=(2,)))
        assert ledgers(td)[1].messages[0]["content"] == "b"
        assert td["question"] == ["a", "b"]
        assert "extra" in td.keys()

    def test_query_and_policy_entries_survive_a_step(self, mode):
        env = make(mode)
        td = env.step(respond(env, env.reset(queries(env))))
        assert td["query"] == queries(env)["query"]
        assert columns.read_field(td["tokens"], "response", td.batch_size) is not None
        following = env.step_mdp(td)
        assert following["query"] == queries(env)["query"]
        # Nothing of the last turn is left where the next policy call could be thought to have written it.
        assert columns.read_field(following["tokens"], "response", td.batch_size) is None
        assert columns.read_field(following["log_probs"], "response", td.batch_size) is None


class TestResponses:
    """The forms in which a policy may answer; all enter the same ledger."""

    def ids(self, env: ChatEnv, text: str) -> list[int]:
        return env.template.codec.encode([text])[0]

    @pytest.mark.parametrize("form", ["response", "full"])
    def test_text(self, form):
        env = make("text", 2)
        td = env.reset(queries(env))
        answers = ["four<|im_end|>", "five"]
        prompts = [td["text"][i].prompt for i in range(2)]
        setattr(
            td["text"],
            form,
            answers if form == "response" else [p + a for p, a in zip(prompts, answers, strict=False)],
        )
        after = ledgers(env.step(td)["next"])
        assert [t.messages[-1]["content"] for t in after] == ["four", "five"]
        assert [t.ended for t in after] == [True, False]
        assert [t.num_sampled for t in after] == [len(self.ids(env, a)) for a in answers]

    def test_text_as_one_string_each_row(self):
        env = make("text", 1)
        td = env.reset(queries(env))
        td["text"][0].response = "four<|im_end|>"
        assert ledgers(env.step(td)["next"])[0].messages[-1]["content"] == "four"

    def test_tokens_full_and_lists(self):
        env = make("tokens", 1)
        td = env.reset(queries(env))
        ids = self.ids(env, "four<|im_end|>")
        prompt = td["tokens"][0].prompt
        for row in ({"full": torch.cat((prompt, torch.tensor(ids)))}, {"response": torch.tensor([ids]).squeeze(0)}):
            fresh = env.reset(queries(env))
            fresh["tokens"] = Tokens._from_tensordict(columns.stack_rows([columns.row_td(row)], env.batch_size))
            assert ledgers(env.step(fresh)["next"])[0].tokens[-len(ids) - 1 : -1].tolist() == ids
        td["tokens"][0].response = ids
        assert ledgers(env.step(td)["next"])[0].messages[-1]["content"] == "four"

    def test_dense_tokens(self):
        env = make("tokens", 2)
        td = env.reset(queries(env))
        td["tokens"] = Tokens(response=torch.tensor([[5, 6], [7, 8]]), batch_size=(2,))
        assert [t.num_sampled for t in ledgers(env.step(td)["next"])] == [2, 2]

    @pytest.mark.parametrize("form", ["response", "full"])
    def test_history(self, form):
        env = make("history", 1)
        td = env.reset(queries(env))
        answer = History(role="assistant", content="four").view(1, 1)
        prompt = td["history"].prompt
        td["history"] = ChatHistory(
            **{form: answer if form == "response" else prompt.extend(answer, dim=-1, inplace=False)}
        )
        [after] = ledgers(env.step(td)["next"])
        assert after.messages[-1] == {"role": "assistant", "content": "four"}

    def test_history_without_a_tokenizer(self):
        env = ChatEnv(system_prompt="Be brief.")
        td = env.reset(TensorDict(query="Hello", batch_size=(1,)))
        assert "tokens" not in td.keys()
        td["history"].full = td["history"].prompt.extend(
            History(role="assistant", content="Hi").view(1, 1), dim=-1, inplace=False
        )
        td = env.append_messages(env.step_mdp(env.step(td)), ["And now?"])
        assert td["history"][0].prompt.role == ["system", "user", "assistant", "user"]

    def test_sampled_ids_win_over_text(self):
        env = make("text", 1)
        td = respond(env, env.reset(queries(env)), ["four"])
        td["text"].response = ["something else"]
        assert ledgers(env.step(td)["next"])[0].messages[-1]["content"] == "four"

    def test_missing_log_probs(self, mode):
        env = make(mode)
        td = respond(env, env.reset(queries(env)))
        del td["log_probs"]
        assert not any(t.scored for t in ledgers(env.step(td)["next"]))


class TestAppend:
    def test_tokens_and_generation_prompt_follow(self, mode):
        env = make(mode, 3)
        td = env.step_mdp(env.step(respond(env, env.reset(queries(env)))))
        before = ledgers(td)
        tool = {"role": "tool", "content": "7"}
        td2 = env.append_messages(td, ["more?", None, [tool, {"role": "user", "content": "and?"}]])
        after = ledgers(td2)
        assert ledgers(td) == before  # the input is not changed
        assert after[1] == before[1]
        for i, end in (
            (0, "<|im_start|>user\nmore?<|im_end|>\n"),
            (2, "<|im_start|>tool\n7<|im_end|>\n<|im_start|>user\nand?<|im_end|>\n"),
        ):
            text = env.template.codec.decode([after[i].tokens.tolist()])[0]
            assert text.endswith(end + "<|im_start|>assistant\n")
            assert after[i].tokens[: len(before[i])].tolist() == before[i].tokens.tolist()
            assert torch.equal(after[i].mask[: len(before[i])], before[i].mask)
            assert not after[i].mask[len(before[i]) :].any()
        if mode == "text":
            assert td2["text"][0].prompt == env.template.codec.decode([after[0].tokens.tolist()])[0]
        if mode == "history":
            assert td2["history"][2].prompt.role == ["user", "assistant", "tool", "user"]

    def test_on_next(self, mode):
        """A transform appends to what step wrote under "next"."""
        env = make(mode)
        td = env.step(respond(env, env.reset(queries(env))))
        td["next"] = env.append_messages(td["next"], ["more"] * 3)
        assert all(t.ended is None for t in ledgers(env.step_mdp(td)))

    def test_two_dimensions(self, mode):
        env = make(mode, (2, 2))
        td = env.step_mdp(env.step(respond(env, env.reset(queries(env)))))
        td = env.append_messages(td, ["a", "b", None, "d"])
        assert [t.messages[-1]["content"] for t in ledgers(td)][:2] == ["a", "b"]
        assert td["tokens"].batch_size[:2] == (2, 2)

    def test_foreign_history_edit_enters_the_ledger(self):
        """A torchrl transform that writes messages into the history alone is followed at the next step."""
        env = make("history", 1)
        td = env.step_mdp(env.step(respond(env, env.reset(queries(env)))))
        expected = ledgers(env.append_messages(td, [[{"role": "tool", "content": "7"}]]))
        td["history"].prompt = td["history"].prompt.extend(
            History(role="tool", content="7").view(1, 1), dim=-1, inplace=False
        )
        td["history"].response = History(role="assistant", content="ok").view(1, 1)
        [after] = ledgers(env.step(td)["next"])
        assert after.tokens[: len(expected[0])].tolist() == expected[0].tokens.tolist()
        assert [m["role"] for m in after.messages] == ["user", "assistant", "tool", "assistant"]


class TestStateless:
    def test_stepping_twice_gives_equal_results(self, mode):
        env = make(mode)
        td = respond(env, env.reset(queries(env)))
        saved = td.clone()
        first = env.step(td.clone())
        second = env.step(td.clone())
        assert ledgers(first["next"]) == ledgers(second["next"])
        assert self.same(first["next"], second["next"])
        assert self.same(td, saved)

    def test_a_pickled_tensordict_steps_alike_in_another_environment(self, mode):
        env, other = make(mode), make(mode)
        td = respond(env, env.reset(queries(env)))
        moved = pickle.loads(pickle.dumps(td))
        assert self.same(env.step(td)["next"], other.step(moved)["next"])

    def test_branching(self, mode):
        env = make(mode)
        td = env.step_mdp(env.step(respond(env, env.reset(queries(env)))))
        left = ledgers(env.append_messages(td, ["left"] * 3))
        right = ledgers(env.append_messages(td, ["right, and longer"] * 3))
        assert left == ledgers(env.append_messages(td, ["left"] * 3))
        assert left != right

    def test_rows_do_not_depend_on_the_others(self, mode):
        env, single, grid = make(mode, 4), make(mode, 1), make(mode, (2, 2))
        td = env.append_messages(
            env.step_mdp(env.step(respond(env, env.reset(queries(env))))), [f"more {i}" for i in range(4)]
        )
        gd = grid.append_messages(
            grid.step_mdp(grid.step(respond(grid, grid.reset(queries(grid))))), [f"more {i}" for i in range(4)]
        )
        assert ledgers(gd) == ledgers(td)
        for i in range(4):
            alone = single.reset(TensorDict(query=[queries(env)["query"][i]], batch_size=(1,)))
            alone = single.step_mdp(single.step(respond(single, alone, [f"answer {'y' * i}"])))
            alone = single.append_messages(alone, [f"more {i}"])
            assert ledgers(alone) == [ledgers(td)[i]]

    def test_rows_move_between_batches(self, mode):
        """Rows of two batches, in another order, are stepped as they would have been where they were."""
        env = make(mode, 4)
        a = respond(env, env.reset(queries(env)))
        expected = ledgers(env.step(a.clone())["next"])
        shuffled = a[torch.tensor([2, 0, 3, 1])]
        got = ledgers(env.step(shuffled)["next"])
        assert got == [expected[i] for i in (2, 0, 3, 1)]

    def test_lazy_root(self, mode):
        env = make(mode)
        td = respond(env, env.reset(queries(env)))
        lazy = LazyStackedTensorDict(*td.unbind(0), stack_dim=0)
        assert ledgers(env.step(lazy)["next"]) == ledgers(env.step(td)["next"])

    @staticmethod
    def same(a: TensorDict, b: TensorDict) -> bool:
        for name, key in (("tokens", "prompt"), ("masks", "all_assistant_mask"), ("log_probs", "prompt")):
            rows = [columns.read_field(td[name], key, td.batch_size) or [] for td in (a, b)]
            if not all(torch.equal(x, y) for x, y in zip(*rows, strict=True)):
                return False
        return ledgers(a) == ledgers(b)


class TestStepMDP:
    def test_agrees_with_torchrl(self, mode):
        env = TransformedEnv(make(mode), StepCounter(max_steps=3))
        td = env.step(respond(env.base_env, env.reset(queries(env.base_env))))
        ours = FlatStepMDP(env, exclude_action=False)(td)
        theirs = _StepMDP(env, exclude_action=False)(td)
        assert ledgers(ours) == ledgers(theirs)
        leaves = {"include_nested": True, "leaves_only": True}
        assert set(ours.keys(**leaves)) == set(theirs.keys(**leaves))
        assert (ours["step_count"] == theirs["step_count"]).all()

    def test_policy_writes_do_not_reach_the_last_step(self, mode):
        env = make(mode)
        td = env.step(respond(env, env.reset(queries(env))))
        following = env.step_mdp(td)
        following["tokens"][0].response = torch.tensor([1])
        assert columns.read_field(td["next", "tokens"], "response", td.batch_size) is None


class TestPartialSteps:
    def test_rows_that_are_not_stepped_stay(self, mode):
        env = make(mode)
        td = respond(env, env.reset(queries(env)))
        before = ledgers(td)
        td["_step"] = torch.tensor([[True], [False], [True]])
        after = ledgers(env.step(td)["next"])
        assert [len(t.messages) for t in after] == [2, 1, 2]
        assert after[1] == before[1]

    def test_nor_have_they_to_be_answered(self, mode):
        env = make(mode)
        td = env.reset(queries(env))
        whole = respond(env, td)
        rows = columns.read_field(whole["tokens"], "response", env.batch_size)
        tds = [columns.row_td({} if i == 1 else {"response": row}) for i, row in enumerate(rows)]
        td["tokens"] = Tokens._from_tensordict(columns.stack_rows(tds, env.batch_size))
        td["_step"] = torch.tensor([[True], [False], [True]])
        after = env.step(td)["next"]
        assert [len(t.messages) for t in ledgers(after)] == [2, 1, 2]
        assert columns.read_objects(after["env_failure"], env.batch_size) == [""] * 3


class TestReset:
    @pytest.mark.parametrize("wrapped", [False, True])
    def test_partial(self, mode, wrapped):
        env = TransformedEnv(make(mode), StepCounter(max_steps=9)) if wrapped else make(mode)
        td = env.step_mdp(env.step(respond(env, env.reset(queries(env)))))
        td = env.append_messages(td, ["more", "more", None])
        before = ledgers(td)
        td["query"] = ["new 0", "new 1", "new 2"]
        td["_reset"] = torch.tensor([[False], [True], [False]])
        after = ledgers(env.reset(td))
        assert after[0] == before[0]
        assert after[2] == before[2]
        assert after[1].messages == ({"role": "user", "content": "new 1"},)
        rows = columns.read_field(td["tokens"], "prompt", td.batch_size)
        assert [row.tolist() for row in rows] == [t.tokens.tolist() for t in after]
        if mode == "history":
            assert [len(td["history"][i].prompt.role) for i in range(3)] == [3, 1, 2]
        if mode == "text":
            assert td["text"][1].prompt.startswith("<|im_start|>user\nnew 1")

    def test_nobody(self, mode):
        env = make(mode)
        td = env.step_mdp(env.step(respond(env, env.reset(queries(env)))))
        before = ledgers(td)
        td["_reset"] = torch.zeros(3, 1, dtype=torch.bool)
        assert ledgers(env.reset(td)) == before

    def test_partial_through_a_transformed_env(self, mode):
        env = TransformedEnv(make(mode), StepCounter(max_steps=2))
        td = env.reset(queries(env.base_env))
        _, td = env.step_and_maybe_reset(respond(env.base_env, td))
        assert [len(t.messages) for t in ledgers(td)] == [2, 2, 2]


class TestBadInput:
    def test_no_tokenizer_where_one_is_needed(self):
        for mode in ("text", "tokens"):
            with pytest.raises(ValueError, match=f"input_mode='{mode}' needs a tokenizer"):
                ChatEnv(input_mode=mode)

    def test_no_chat_template(self):
        tokenizer = bpe_tokenizer.__wrapped__()
        tokenizer.chat_template = None
        with pytest.raises(ChatTemplateError, match="no chat template"):
            ChatEnv(input_mode="tokens", tokenizer=tokenizer)

    def test_input_mode(self):
        with pytest.raises(ValueError, match="'chat'.*'history', 'text', 'tokens'"):
            ChatEnv(input_mode="chat")

    @pytest.mark.parametrize("batch", [(), (0,), (2, 2, 2)])
    def test_batch_size(self, batch):
        with pytest.raises(ValueError, match="batch_size"):
            ChatEnv(batch_size=batch)

    def test_missing_query(self, mode):
        env = make(mode, errors="raise")
        with pytest.raises(KeyError, match="'query'.*got no TensorDict"):
            env.reset()
        with pytest.raises(KeyError, match=r"'query'.*'question'"):
            env.reset(TensorDict(question=["a"] * 3, batch_size=(3,)))

    def test_wrong_batch_size(self, mode):
        env = make(mode, errors="raise")
        with pytest.raises(RuntimeError, match=r"\[2\].*\[3\]"):
            env.reset(TensorDict(query=["a", "b"], batch_size=(2,)))

    def test_malformed_messages(self, mode):
        env = make(mode, 2, errors="raise")

        def reset(*rows):
            return env.reset(TensorDict({"query": columns.objects(rows, env.batch_size, None)}, batch_size=(2,)))

        with pytest.raises(MessageError, match=r"'query' of row 1\[0\] has no 'role'"):
            reset("fine", [{"content": "x"}])
        with pytest.raises(MessageError, match=r"'query' of row 0\[1\] \(role 'assistant'\) has no 'content'"):
            reset([{"role": "user", "content": "x"}, {"role": "assistant"}], "fine")
        with pytest.raises(MessageError, match="'query' of row 1 is empty"):
            reset("fine", [])
        with pytest.raises(MessageError, match="row 0 is a int"):
            reset(3, "fine")

    def test_empty_response(self, mode):
        env = make(mode, errors="raise")
        td = env.reset(queries(env))
        ids = [torch.tensor([5]), torch.tensor([], dtype=torch.int64), torch.tensor([6])]
        td["tokens"] = columns.ragged(Tokens, "response", ids, env.batch_size, None)
        with pytest.raises(ResponseError, match="row 1: the response is empty"):
            env.step(td)

    def test_empty_text(self):
        env = make("text", 2, errors="raise")
        td = env.reset(queries(env))
        td["text"].response = ["fine", ""]
        with pytest.raises(ResponseError, match=r"row 1: \('text', 'response'\) is empty"):
            env.step(td)

    @pytest.mark.parametrize("bad", [-1, 10**6])
    def test_ids_outside_the_vocabulary(self, mode, bad):
        env = make(mode, errors="raise")
        td = env.reset(queries(env))
        ids = [torch.tensor([5, 6]), torch.tensor([5, bad]), torch.tensor([6, 6])]
        td["tokens"] = columns.ragged(Tokens, "response", ids, env.batch_size, None)
        with pytest.raises(ResponseError, match=rf"row 1: the response has id {bad} at position 1, outside"):
            env.step(td)

    def test_no_response(self, mode):
        env = make(mode, errors="raise")
        with pytest.raises(KeyError, match=rf"\('{mode}', 'response'\)"):
            env.step(env.reset(queries(env)))

    def test_log_probs_of_another_length(self, mode):
        env = make(mode, errors="raise")
        td = respond(env, env.reset(queries(env)))
        td["log_probs"] = columns.ragged(LogProbs, "response", [torch.zeros(1)] * 3, env.batch_size, None)
        with pytest.raises(ResponseError, match=r"\('log_probs', 'response'\) has 1 values for \d+ sampled ids"):
            env.step(td)

    def test_full_that_does_not_start_with_the_prompt(self):
        env = make("tokens", 1)
        td = env.reset(queries(env))
        td["tokens"] = columns.ragged(Tokens, "full", [torch.arange(5, 60)], env.batch_size, None)
        with pytest.raises(
            ResponseError, match="does not start with the prompt.*first difference is at position 0"
        ):
            env.step(td)

    def test_policy_that_saw_another_prompt(self, mode):
        env = make(mode, 1)
        td = respond(env, env.reset(queries(env)))
        rows = [columns.row_td({"prompt": torch.tensor([5, 6, 7]), "response": torch.tensor([8])})]
        td["tokens"] = Tokens._from_tensordict(columns.stack_rows(rows, env.batch_size))
        del td["log_probs"]
        with pytest.raises(ResponseError, match="not the ledger's; .*position 0"):
            env.step(td.clone())
        adopting = make(mode, 1, on_prompt_mismatch="adopt")
        [after] = ledgers(adopting.step(td)["next"])
        assert after.tokens[:4].tolist() == [5, 6, 7, 8]
        assert after.mask[:4].tolist() == [False, False, False, True]

    def test_edited_prompts(self):
        env = make("text", 1)
        td = env.reset(queries(env))
        td["text"][0].prompt = td["text"][0].prompt + "<think>"
        td["text"][0].response = "four"
        with pytest.raises(ResponseError, match=r"row 0: \('text', 'prompt'\) was edited"):
            env.step(td)
        env = make("history", 1)
        td = env.reset(queries(env))
        td["history"] = ChatHistory(
            prompt=History(role="user", content="EDITED").view(1, 1),
            response=History(role="assistant", content="four").view(1, 1),
        )
        with pytest.raises(ResponseError, match="row 0: the content of message 0 .*'EDITED' is 'question '"):
            env.step(td)
        env = make("history", 1, system_prompt="Be brief.")
        td = env.reset(queries(env))
        td["history"] = ChatHistory(
            prompt=History(role=["user", "user"], content=["Be brief.", "question "], batch_size=(2,)).unsqueeze(0),
            response=History(role="assistant", content="four").view(1, 1),
        )
        with pytest.raises(ResponseError, match="row 0: the role of message 0 .*'user' is 'system'"):
            env.step(td)

    def test_a_message_edited_in_place(self):
        """Every turn's History holds the messages of the turns before, the very objects."""
        env = make("history", 1)
        td = env.step_mdp(env.step(respond(env, env.reset(queries(env)))))
        td["history"][0].prompt[0].content = "EDITED"
        with pytest.raises(ResponseError, match="row 0: the content of message 0 .*'EDITED' is 'question '"):
            env.step(respond(env, td))

    def test_full_that_is_not_prompt_and_response(self, mode):
        env = make(mode, 1)
        td = env.reset(queries(env))
        rows = [columns.row_td({"full": torch.tensor([9, 9, 70, 2]), "response": torch.tensor([70, 2])})]
        td["tokens"] = Tokens._from_tensordict(columns.stack_rows(rows, env.batch_size))
        with pytest.raises(ResponseError, match=r"row 0: \('tokens', 'full'\) has 4 ids"):
            env.step(td)

    @pytest.mark.parametrize("at", [0, -1])
    def test_full_with_another_prompt(self, mode, at):
        """What losses read must be what the ledger holds, or the ledger takes up what the policy saw."""
        for adopt in (False, True):
            env = make(mode, 1, on_prompt_mismatch="adopt" if adopt else "raise")
            td = env.reset(queries(env))
            [held] = ledgers(td)
            prompt = held.tokens.clone()
            prompt[at] = 9
            said = torch.tensor([70, env.tokenizer.eos_token_id])
            rows = [columns.row_td({"full": torch.cat((prompt, said)), "response": said})]
            td["tokens"] = Tokens._from_tensordict(columns.stack_rows(rows, env.batch_size))
            if adopt:
                [after] = ledgers(env.step(td)["next"])
                assert after.tokens[: len(prompt) + 2].tolist() == [*prompt.tolist(), *said.tolist()]
            else:
                where = at % len(prompt)
                with pytest.raises(ResponseError, match=rf"row 0: .*\('tokens', 'full'\).* at position {where}"):
                    env.step(td)

    def test_rows_of_another_modes_environment(self):
        """A row that began in tokens mode goes on in text mode; one without tokens is refused."""
        text, tokens = make("text", 1), make("tokens", 1)
        td = tokens.reset(queries(tokens))
        [before] = ledgers(td)
        shown = text.template.codec.decode([before.tokens.tolist()])[0]
        td["text"] = Text._from_tensordict(
            columns.texts("full", [shown + "four<|im_end|>"], td.batch_size, None)._tensordict
        )
        [after] = ledgers(text.step(td)["next"])
        assert after.messages[-1]["content"] == "four"
        assert after.num_sampled == len(text.template.codec.encode(["four<|im_end|>"])[0])
        bare = ChatEnv(batch_size=(1,))
        with pytest.raises(ResponseError, match="row 0 has messages but no tokens"):
            text.step(bare.reset(queries(bare)))

    def test_padded_tokens(self):
        env = make("tokens", 1)
        td = env.reset(queries(env))
        td["tokens"] = Tokens(response=torch.tensor([[5, 6]]), padded=True, batch_size=(1,))
        with pytest.raises(ResponseError, match="pad_output=False"):
            env.step(td)

    def test_append_needs_an_entry_a_row_and_an_answer(self, mode):
        env = make(mode, errors="raise")
        td = env.reset(queries(env))
        with pytest.raises(ValueError, match="each of the 3 rows"):
            env.append_messages(td, ["only one"])
        with pytest.raises(BridgeError, match="row 0 ends with a message of role 'user'"):
            env.append_messages(td, ["too early"] * 3)

    def test_step_without_reset(self, mode):
        env = make(mode, errors="raise")
        with pytest.raises(KeyError, match="'transcript', the ledger that reset wrote"):
            env.step(queries(env))

    def test_template_that_cannot_be_bridged(self, mode):
        """One turn works; a second is refused, with the reason."""
        tokenizer = bpe_tokenizer.__wrapped__()
        tokenizer.chat_template = (
            "{% if messages | length > 2 %}{{ raise_exception('only one turn') }}{% endif %}"
            + tokenizer.chat_template
        )
        env = ChatEnv(input_mode=mode, tokenizer=tokenizer)
        td = env.step_mdp(env.step(respond(env, env.reset(queries(env)))))
        assert ledgers(td)[0].num_sampled > 1
        with pytest.raises(BridgeError, match="only one turn"):
            env.append_messages(td, ["more"])


def test_a_row_that_cannot_be_continued_loses_no_other(mode):
    """With ``errors``, the row stays as it is and its reason is handed over."""
    source = (
        "{% for m in messages %}{% if 'forbidden' in m.content %}{{ raise_exception('not that word') }}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    env = ChatEnv(tokenizer=bpe_tokenizer(source), input_mode=mode, batch_size=(3,))
    td = env.reset(TensorDict(query=["a", "b", "c"], batch_size=(3,)))
    following = env.step(respond(env, td, ["x", "y", "z"]))["next"]
    before = columns.read_objects(following["transcript"], (3,))
    with pytest.raises(ChatTemplateError, match="not that word"):
        env.append_messages(following, ["more", "forbidden", None])
    errors = {}
    after = columns.read_objects(
        env.append_messages(following, ["more", "forbidden", None], errors=errors)["transcript"], (3,)
    )
    assert list(errors) == [1]
    assert "not that word" in str(errors[1])
    assert after[1:] == before[1:]
    assert after[0].messages[-1]["content"] == "more"
