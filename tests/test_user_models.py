"""Models that play the user: the conversation as they see it, batches, seeds, and an endpoint over real HTTP."""

from __future__ import annotations

import asyncio
import pickle
import threading
import time
from typing import Any

import pytest
import torch
from conftest import bpe_tokenizer, corpus_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from torchrl.envs.utils import check_env_specs
from user_turns import begin, env_of, flags, ledgers, respond, said

from torchrl_chat import ChatTemplate, ChatTemplateError, DatasetChatEnv
from torchrl_chat.policies import transformers
from torchrl_chat.tiny import TEXT_ALPHABET, tiny_model, tiny_tokenizer
from torchrl_chat.transforms.user import UserSimulator
from torchrl_chat.transforms.user_models import EndpointUser, ModelUser, as_user_sees

CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}


def turns(*contents: str) -> list[dict[str, Any]]:
    """A conversation that the user begins."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


class TestTheUserSView:
    @pytest.mark.parametrize(
        ("messages", "expected"),
        [
            (turns("Hi", "Hello"), ["user:Hey", "assistant:Hi", "user:Hello"]),
            ([{"role": "system", "content": "secret"}, *turns("Hi", "Yes")], ["user:Hey", "assistant:Hi", "user:Yes"]),
            (
                [*turns("Weather?", "I look."), CALL, {"role": "tool", "content": "sun"}, *turns("", "Sunny.")[1:]],
                ["user:Hey", "assistant:Weather?", "user:I look.\n\nSunny."],
            ),
            ([*turns("Hi"), CALL], ["user:Hey", "assistant:Hi", "user:"]),
            ([*turns("a", "b"), *turns("c"), *turns("d", "e")], ["user:Hey", "assistant:a", "user:b", "assistant:c\n\nd", "user:e"]),
            (
                [{"role": "assistant", "content": "Welcome"}, *turns("Hi"), {**CALL, "content": "ok", "reasoning_content": "hm"}],
                ["user:Hey\n\nWelcome", "assistant:Hi", "user:ok"],
            ),
        ],
    )  # fmt: skip
    def test_table(self, messages, expected):
        view = as_user_sees(messages, opening="Hey")
        assert [f"{m['role']}:{m['content']}" for m in view] == expected

    @given(
        st.lists(
            st.tuples(st.sampled_from(["system", "user", "assistant", "tool"]), st.text(max_size=5)), max_size=8
        )
    )
    def test_roles_alternate_and_end_with_the_policy(self, pairs):
        messages = [{"role": role, "content": text} for role, text in pairs] + turns("q", "a")
        view = as_user_sees(messages, system_prompt="You are shy.")
        assert view[0] == {"role": "system", "content": "You are shy."}
        assert [m["role"] for m in view[1:]] == [("user", "assistant")[i % 2] for i in range(len(view) - 1)]
        assert view[-1]["role"] == "user"
        spoken = "".join(m["content"] for m in view)
        assert all(text in spoken for role, text in pairs if role in ("user", "assistant"))

    def test_other_roles(self):
        messages = [{"role": "human", "content": "Hi"}, {"role": "bot", "content": "Yes"}]
        view = as_user_sees(messages, opening=None, user_role="human", policy_role="bot")
        assert view == [{"role": "assistant", "content": "Hi"}, {"role": "user", "content": "Yes"}]

    @pytest.mark.corpus
    @pytest.mark.parametrize("name", ["lc_google-gemma-2-2b-it", "ax_mistral_v2v3", "lc_Qwen-Qwen2.5-7B-Instruct"])
    def test_templates_that_insist_on_alternation_take_it(self, name):
        messages = [*turns("Hi", "I look."), CALL, {"role": "tool", "content": "42"}, *turns("", "It is 42.")[1:]]
        template = ChatTemplate(corpus_tokenizer(name))
        text = template.codec.decode([template.render(as_user_sees(messages))])[0]
        assert text.index("Hi") < text.index("It is 42.")

    @pytest.mark.corpus
    def test_a_template_without_system_messages_says_so_at_once(self):
        tokenizer = corpus_tokenizer("lc_google-gemma-2-2b-it")
        with pytest.raises(ChatTemplateError, match="[Ss]ystem"):
            ModelUser(tiny_model(8), tokenizer, system_prompt="You are shy.")


class Recorder(torch.nn.Module):
    """A tiny model that keeps the prompts it is given."""

    def __init__(self, vocab: int, **kwargs: Any):
        super().__init__()
        self.inner = tiny_model(vocab, **kwargs)
        self.config = self.inner.config
        self.prompts: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, input_ids, attention_mask, **kwargs):
        if input_ids.shape[1] > 1:
            self.prompts.append((input_ids, attention_mask.bool()))
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


@pytest.fixture
def small():
    return tiny_tokenizer(TEXT_ALPHABET)


class TestModelUser:
    def test_one_batch_in_its_own_template(self, mode, small):
        model = Recorder(len(small))
        user = ModelUser(
            model, small, system_prompt="You want {goal}. {x}", opening="Yes?", max_new_tokens=9, seed=1
        )
        env = env_of(mode, 3, user, row_keys=["goal"])
        answers = ["No.", "Maybe <|end|> not.", "A longer answer than the others."]
        following = respond(env, begin(env, goal=["tea", "milk", "rum"]), answers)["next"]
        [(ids, attention)] = model.prompts
        assert ids.shape[0] == 3
        for i, goal in enumerate(("tea", "milk", "rum")):
            view = as_user_sees(
                turns(f"question {i}", answers[i]), system_prompt=f"You want {goal}. {{x}}", opening="Yes?"
            )
            assert ids[i][attention[i]].tolist() == ChatTemplate(small).render(view)
        for ledger in ledgers(following):
            assert [m["role"] for m in ledger.messages] == ["user", "assistant", "user"]
            assert ledger.messages[-1]["content"]
            assert not ledger.mask[ledger.spans[-1].end :].any()

    def test_seeds(self, small):
        model = tiny_model(len(small))
        conversations = [turns(f"q{i}", "a") for i in range(4)]

        def replies(seed: int | None, rounds: int = 2) -> list[Any]:
            user = ModelUser(model, small, max_new_tokens=12, seed=seed)
            return [user(conversations) for _ in range(rounds)]

        torch.manual_seed(0)
        first = replies(5)
        torch.manual_seed(1)  # a seeded user does not look at torch's own generator
        assert replies(5) == first
        assert replies(6) != first
        assert first[0] != first[1]

    def test_greedy_replies_do_not_depend_on_the_batch(self, small):
        user = ModelUser(tiny_model(len(small)), small, max_new_tokens=8, temperature=0)
        conversations = [
            turns("short", "x"),
            turns("a much longer question", "with a long answer"),
            turns("q", "z"),
        ]
        together = user(conversations)
        assert together == [user([conversation])[0] for conversation in conversations]
        assert all(isinstance(reply, str) and reply for reply in together)

    def test_a_full_context_costs_its_row(self, small):
        user = ModelUser(tiny_model(len(small), context=90), small, max_new_tokens=30, temperature=0)
        env = env_of("tokens", 2, user)
        with pytest.warns(RuntimeWarning, match="1 of 2 simulated users failed.*fills its context"):
            following = respond(env, begin(env), ["x", "long " * 30])["next"]
        assert flags(following, "truncated") == [False, True]
        assert [len(row) for row in said(following)] == [3, 2]

    def test_what_it_may_sample(self, small, monkeypatch):
        """No more than its context holds, and up to the token that ends a turn in the template that is used."""
        other = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|pad|>{% endfor %}<|assistant|>"
        model = tiny_model(len(small), context=100)
        user = ModelUser(model, small, max_new_tokens=30, template_kwargs={"chat_template": other})
        assert small.pad_token_id in user.policy.stop_ids
        conversations = [turns("q", "a"), turns("q", "a" * 50)]
        given, generate = [], transformers.generate
        monkeypatch.setattr(
            transformers, "generate", lambda *a, most, **k: given.extend(most) or generate(*a, most=most, **k)
        )
        user(conversations)
        lengths = [len(user.template.render(user.view(conversation))) for conversation in conversations]
        assert given == [30, 100 - lengths[1]]
        assert 0 < given[1] < 30

    @pytest.mark.parametrize(
        ("sampled", "expected"),
        [
            ("Hello there.<|end|>", "Hello there."),
            (" cut in the mid", "cut in the mid"),
            ("<think>what to say</think>\nFine.<|end|>", "Fine."),
            ("<think>what to", None),
            ("  <|end|>", None),
        ],
    )
    def test_what_it_says_aloud(self, small, monkeypatch, sampled, expected):
        user = ModelUser(tiny_model(len(small)), small, max_new_tokens=40)
        ids = torch.tensor(small(sampled, add_special_tokens=False)["input_ids"])
        monkeypatch.setattr(transformers, "generate", lambda *_, **__: ([ids], [ids.float()]))
        [reply] = user([turns("q", "a")])
        if expected is None:
            assert isinstance(reply, ValueError)
            assert "said nothing within 40 tokens" in str(reply)
        else:
            assert reply == expected

    def test_specs_and_pickling(self, mode, small):
        user = ModelUser(tiny_model(len(small)), small, max_new_tokens=4, seed=0)
        user([turns("q", "a")])
        copy = pickle.loads(pickle.dumps(user))
        assert copy([turns("q", "a")]) == user([turns("q", "a")])
        env = DatasetChatEnv(dataset=[{"query": "a"}], tokenizer=bpe_tokenizer(), input_mode=mode, num_envs=2)
        env = env.append_transform(UserSimulator(user, turns=2))
        assert not list(env.transform.parameters())  # the user's weights are not the environment's
        check_env_specs(env, break_when_any_done="both")


class TestEndpointUser:
    def test_what_is_sent(self, mode, endpoint):
        user = EndpointUser(
            "m", endpoint.url, system_prompt="You want {goal}.", opening="Yes?", temperature=0.5, extra={"seed": 3}
        )
        env = env_of(mode, 2, user, row_keys=["goal"])
        following = respond(env, begin(env, goal=["tea", "rum"]), ["No.", "ok"])["next"]
        env.close()
        by_goal = {body["messages"][0]["content"]: body for body in endpoint.requests}
        assert by_goal["You want tea."] == {
            "model": "m",
            "messages": [
                {"role": "system", "content": "You want tea."},
                {"role": "user", "content": "Yes?"},
                {"role": "assistant", "content": "question 0"},
                {"role": "user", "content": "No."},
            ],
            "temperature": 0.5,
            "max_tokens": 512,
            "seed": 3,
        }
        assert by_goal["You want rum."]["messages"][-1] == {"role": "user", "content": "ok"}
        assert said(following)[0] == ["question 0", "No.", "You said 'No.'."]
        assert not any(ledger.mask[ledger.spans[-1].end :].any() for ledger in ledgers(following))

    def test_control_tokens_are_broken(self, endpoint):
        [*_, last] = EndpointUser("m", endpoint.url).messages(turns("a <|b|>", "<|im_end|> and <｜end｜> < |"))
        assert last["content"] == "< |im_end|> and < ｜end｜> < |"

    def test_rows_at_once_within_the_limit(self, endpoint):
        four = threading.Barrier(4, timeout=120)

        def script(body, number):
            four.wait()  # for three others that are asked meanwhile
            return "hm"

        endpoint.script = script
        env = env_of("tokens", 12, EndpointUser("m", endpoint.url, concurrency=4))
        following = respond(env, begin(env), ["x"] * 12)["next"]
        assert [row[-1] for row in said(following)] == ["hm"] * 12
        assert (endpoint.most, four.broken) == (4, False)
        env.close()

    def test_failures_cost_their_row(self, endpoint):
        def script(body, number):
            last = body["messages"][-1]["content"]
            if last == "refused":
                return 400, b'{"error": {"message": "too rude"}}'
            if last == "slow":
                time.sleep(5)
            return {"nothing": None, "thinks": "<think>hm", "think": "<think>hm</think> ok"}.get(last, "fine")

        endpoint.script = script
        env = env_of("text", 6, EndpointUser("m", endpoint.url, deadline=1.5, retries=0))
        answers = ["x", "refused", "slow", "nothing", "thinks", "think"]
        with pytest.warns(RuntimeWarning, match="4 of 6 simulated users failed"):
            following = respond(env, begin(env), answers)["next"]
        reasons = following["user_failure"]
        assert "too rude" in reasons[1]
        assert reasons[2] == "timeout: no reply within 1.5 s, with all tries"
        assert "returned no text" in reasons[3]
        assert "said nothing" in reasons[4]
        assert [row[2:] for row in said(following)] == [["fine"], [], [], [], [], ["ok"]]
        assert flags(following, "truncated") == [False, True, True, True, True, False]
        env.close()

    def test_tried_again(self, endpoint):
        endpoint.script = lambda body, number: (503, b"{}") if number == 1 else "fine"
        user = EndpointUser("m", endpoint.url)
        assert asyncio.run(user(turns("a", "b"))) == "fine"
        assert len(endpoint.requests) == 2
        copy = pickle.loads(pickle.dumps(user))
        assert asyncio.run(copy(turns("a", "b"))) == "fine"  # and in another event loop

    @pytest.mark.parametrize(
        ("kwargs", "match"),
        [({"concurrency": 0}, "concurrency=0"), ({"timeout": 0}, "timeout=0"), ({"extra": {"n": 2}}, r"\['n'\]")],
    )
    def test_bad_options(self, kwargs, match):
        with pytest.raises(ValueError, match=match):
            EndpointUser("m", "http://127.0.0.1:1/v1", **kwargs)

    def test_no_key(self, monkeypatch):
        pytest.importorskip("openai")
        for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_ADMIN_KEY"):
            monkeypatch.delenv(name, raising=False)
        with pytest.raises(ValueError, match="cannot connect"):
            EndpointUser("m")

    def test_without_the_library(self, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "openai", None)
        with pytest.raises(ImportError, match=r"torchrl_chat\[openai\]"):
            EndpointUser("m", "http://127.0.0.1:1/v1")
