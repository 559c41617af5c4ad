"""OpenEnv's chat environment in this process: roles, tokens, rewards, limits, and that a step happens whole or not at all."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch
from conftest import CHATML, CORPUS, bpe_tokenizer, corpus_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_chat import ChatTemplate, ChatTemplateError
from torchrl_chat.messages import MessageError
from torchrl_chat.openenv.chat.environment import ChatEnvironment
from torchrl_chat.openenv.chat.episode import EpisodeEnded
from torchrl_chat.openenv.chat.ledger import TemplateWriter
from torchrl_chat.openenv.chat.pool import EnvPool, TorchRLEnvironment
from torchrl_chat.openenv.models import ChatAction, ChatObservation, ChatState

pytestmark = pytest.mark.services

BOS_TEMPLATE = "{{ '<|pad|>' }}" + CHATML  # the pad token plays the BOS
STRICT = (
    "{% for m in messages %}{% if m['role'] not in ['user', 'assistant'] or (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


class CharTokenizer:
    """As little as OpenEnv's own tests have: one id a character."""

    def apply_chat_template(self, conversation, tokenize=True, return_tensors=None, **kwargs):
        ids = [ord(c) for m in conversation for c in m["content"]]
        return [ids] if return_tensors == "pt" else ids

    def decode(self, token_ids, skip_special_tokens=False, **kwargs):
        return "".join(map(chr, token_ids))


@pytest.fixture(scope="module")
def template():
    return ChatTemplate(bpe_tokenizer())


@pytest.fixture
def env(template):
    return ChatEnvironment(template, system_prompt="Be brief.")


# ---------------------------------------------------------------------- roles and tokens
@pytest.mark.parametrize("source", [CHATML, BOS_TEMPLATE], ids=["chatml", "bos"])
def test_messages_and_tokens_are_the_templates_own(source):
    tokenizer = bpe_tokenizer(source)
    env = ChatEnvironment(tokenizer, system_prompt="Be brief.")
    env.reset()
    said = [{"role": "system", "content": "Be brief."}]
    for question, answer in (("2 + 2?", "4"), ("12 + 30?", "42"), ("sure?", "yes")):
        observation = env.step(env.message_to_action(user(question)))
        said.append(user(question))
        assert observation.messages == said
        assert observation.tokens == tokenizer.apply_chat_template(
            said, add_generation_prompt=True, return_dict=False
        )
        observation = env.step(ChatAction(tokens=ids_of(tokenizer, f"{answer}<|im_end|>")))
        said.append({"role": "assistant", "content": answer})
        assert observation.messages == said
        assert observation.tokens == tokenizer.apply_chat_template(said, return_dict=False)
    state = env.state
    assert [len(state.history_messages), state.step_count] == [len(said), 6]
    assert list(chain(*state.history_tokens)) == observation.tokens
    assert observation.tokens.count(0) == (source is BOS_TEMPLATE)  # one BOS, not one a message


@pytest.mark.corpus
@pytest.mark.parametrize("name", CORPUS)
def test_real_templates_keep_sampled_ids_and_one_bos(name):
    tokenizer = corpus_tokenizer(name)
    env = ChatEnvironment(tokenizer)
    env.reset()
    observation = env.step(env.message_to_action(user("What is 2 + 2?")))
    assert observation.messages == [user("What is 2 + 2?")]
    for number in range(2):
        prompt = observation.tokens
        sampled = [*ids_of(tokenizer, f"It is {number} 4."), tokenizer.eos_token_id]
        observation = env.step(ChatAction(tokens=sampled))
        assert observation.tokens[: len(prompt) + len(sampled)] == prompt + sampled
        assert observation.metadata["sampled"] == [len(prompt), len(prompt) + len(sampled)]
        observation = env.step(env.message_to_action(user("And 3 + 3?")))
    roles = [message["role"] for message in observation.messages]
    assert roles == ["user", "assistant", "user", "assistant", "user"]
    if tokenizer.bos_token_id is not None and tokenizer.bos_token_id != tokenizer.eos_token_id:
        assert observation.tokens.count(tokenizer.bos_token_id) <= 1


@given(st.lists(st.lists(st.integers(3, 599), min_size=1, max_size=20), min_size=1, max_size=5), st.data())
@settings(max_examples=40, deadline=None)
def test_whatever_is_sampled_stands_in_the_prompt_id_for_id(rows, data):
    env = ChatEnvironment(_shared(), recognise_messages=False)
    observation = env.reset(messages="hello")
    expected = observation.tokens
    size = _shared().codec.vocab_size
    for row in rows:
        row = [i % size for i in row]
        observation = env.step(ChatAction(tokens=row))
        assert observation.tokens[: len(expected) + len(row)] == expected + row
        expected = observation.tokens
        if data.draw(st.booleans()):
            observation = env.step(ChatAction(messages=[user("go on")]))
            assert observation.tokens[: len(expected)] == expected
            expected = observation.tokens
    state = env.state
    assert len(state.history_tokens) == len(state.history_messages) == len(observation.messages)
    assert list(chain(*state.history_tokens)) == observation.tokens


def _shared(_kept=[]):  # noqa: B006
    if not _kept:
        _kept.append(ChatTemplate(bpe_tokenizer()))
    return _kept[0]


def test_a_stock_clients_rendered_message_is_recognised_where_it_is_not_the_policys_turn(env, template):
    tokenizer = template.tokenizer
    rendered = tokenizer.apply_chat_template([user("from afar")], return_dict=False)
    env.reset()
    observation = env.step(ChatAction(tokens=rendered))
    assert observation.messages[-1] == user("from afar")
    # Now it is the policy's turn: whatever it samples is its own, even if it looks like a user's message.
    observation = env.step(ChatAction(tokens=rendered))
    assert observation.messages[-1]["role"] == "assistant"


@pytest.mark.parametrize("name", CORPUS)
def test_the_first_token_tells_what_is_no_message_and_nothing_more(name, monkeypatch):
    """A glance at the first token saves decoding, and never hides a message that decoding would find."""
    writer = TemplateWriter(ChatTemplate(corpus_tokenizer(name)))
    contents = ["Hi", "\nSo", " 2", "Ünïcode 語", "<|im_end|>"]
    rendered = []
    for role, content in itertools.product(("user", "assistant", "system", "tool"), contents):
        with contextlib.suppress(ChatTemplateError, MessageError):
            rendered.append(writer.template.render([{"role": role, "content": content}], False))
    rendered = [ids for ids in rendered if ids]
    found = [writer.recognise(ids) for ids in rendered]
    monkeypatch.setattr(TemplateWriter, "_may_open", lambda self, token_id: True)
    assert found == [writer.recognise(ids) for ids in rendered]


def test_recognition_can_be_switched_off(template):
    env = ChatEnvironment(template, recognise_messages=False)
    env.reset()
    rendered = template.tokenizer.apply_chat_template([user("hi")], return_dict=False)
    assert env.step(ChatAction(tokens=rendered)).messages[-1]["role"] == "assistant"


def test_raw_tokens_become_the_assistants_even_before_any_message(template):
    env = ChatEnvironment(template)
    env.reset()
    raw = ids_of(template.tokenizer, "hello")
    observation = env.step(ChatAction(tokens=[raw]))
    assert observation.messages == [{"role": "assistant", "content": "hello"}]
    assert observation.tokens[: len(raw)] == raw


def test_a_multi_byte_character_split_over_two_answers_loses_no_id(env, template):
    env.reset()
    env.step(ChatAction(messages=[user("a snowman?")]))
    ids = ids_of(template.tokenizer, "☃")
    assert len(ids) > 1
    first = env.step(ChatAction(tokens=ids[:1], finish_reason="length"))
    second = env.step(ChatAction(tokens=ids[1:]))
    assert second.tokens[: len(first.tokens)] == first.tokens


def test_text_answers_are_tokenized_once_and_closed(env, template):
    env.reset()
    prompt = env.step(ChatAction(messages=[user("hi")])).tokens
    observation = env.step(ChatAction(text="hello"))
    assert observation.messages[-1] == {"role": "assistant", "content": "hello"}
    assert template.tokenizer.decode(observation.tokens[len(prompt) :]) == "hello<|im_end|>\n"


def test_two_messages_in_a_row_are_rendered_as_the_template_does(env, template):
    env.reset()
    env.step(ChatAction(messages=[user("one")]))
    observation = env.step(ChatAction(messages=[user("two")]))
    wanted = template.tokenizer.apply_chat_template(
        observation.messages, add_generation_prompt=True, return_dict=False
    )
    assert observation.tokens == wanted


def test_tool_messages_keep_their_fields(env):
    env.reset()
    env.step(ChatAction(messages=[user("hi")]))
    env.step(ChatAction(text="calling"))
    tool = {"role": "tool", "content": "42", "tool_call_id": "abc", "name": "add"}
    assert env.step(ChatAction(messages=[tool])).messages[-1] == tool


def test_a_system_prompt_that_the_template_refuses_alone_waits_for_the_question():
    merged = (
        "{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] + ' ' %}{% set rest = messages[1:] %}"
        "{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}"
        "{% if not rest %}{{ raise_exception('a conversation begins with the user') }}{% endif %}"
        "{% for m in rest %}<|im_start|>{{ m['role'] }}\n{{ (s if loop.first else '') + m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = bpe_tokenizer(merged)
    env = ChatEnvironment(tokenizer, system_prompt="Be brief.")
    assert env.reset().tokens == []
    with pytest.raises(ValueError, match="user message first"):
        env.step(ChatAction(tokens=[5]))
    observation = env.step(ChatAction(messages=[user("hi")]))
    wanted = tokenizer.apply_chat_template(observation.messages, add_generation_prompt=True, return_dict=False)
    assert observation.tokens == wanted


# ---------------------------------------------------------------------- a step happens whole or not at all
def snapshot(env):
    return env.state.model_dump()


@pytest.mark.parametrize(
    "tokens",
    [
        [-1],
        [2**32],
        [10**9],
        [2**63],
        [10**30],
        [1.9],
        [True],
        ["7"],
        [[1, 2], [3, 4]],
        [None],
        "12",
        {"a": 1},
        7,
        [],
    ],
    ids=repr,
)
def test_bad_ids_are_refused_before_anything_changes(env, tokens):
    env.reset()
    env.step(ChatAction(messages=[user("hi")]))
    before = snapshot(env)
    with pytest.raises(ValueError):  # noqa: PT011  # pydantic's error or ours; both name the value
        env.step(ChatAction(tokens=tokens))
    assert snapshot(env) == before
    env.step(ChatAction(text="still here"))


def test_a_template_error_is_told_and_changes_nothing():
    env = ChatEnvironment(bpe_tokenizer(STRICT))
    env.reset()
    env.step(ChatAction(messages=[user("hi")]))
    before = snapshot(env)
    with pytest.raises(ValueError, match="alternate"):
        env.step(ChatAction(messages=[user("again")]))
    assert snapshot(env) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "a lot", None], ids=repr)
def test_a_rubric_that_fails_leaves_the_episode_as_it_was(template, value):
    env = ChatEnvironment(template, rubric=lambda action, observation: value)
    env.reset()
    before = snapshot(env)
    with pytest.raises(ValueError, match="rubric returned"):
        env.step(ChatAction(messages=[user("hi")]))
    assert snapshot(env) == before


def test_a_rubric_or_transform_that_raises_leaves_the_episode_as_it_was(template):
    def broken(*_):
        raise RuntimeError("no grader")

    for settings_ in ({"rubric": broken}, {"transform": broken}):
        env = ChatEnvironment(template, **settings_)
        if "transform" in settings_:
            env.transform = None
            env.reset()
            env.transform = broken
        else:
            env.reset()
        before = snapshot(env)
        with pytest.raises(RuntimeError, match="no grader"):
            env.step(ChatAction(messages=[user("hi")]))
        assert snapshot(env) == before


def test_the_state_is_a_copy(env):
    env.reset()
    state = env.state
    state.history_messages.append(user("forged"))
    state.history_messages[0]["content"] = "forged"
    assert env.state.history_messages == [{"role": "system", "content": "Be brief."}]
    observation = env.step(ChatAction(messages=[user("hi")]))
    observation.messages[0]["content"] = "forged"
    observation.tokens.clear()
    assert env.step(ChatAction(text="yes")).messages[0]["content"] == "Be brief."


# ---------------------------------------------------------------------- rewards
def test_rubrics_sync_async_and_modules(template):
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.resets = 0

        def forward(self, action, observation):
            return float(len(observation.messages))

        def reset(self):
            self.resets += 1

    async def asynchronous(action, observation):
        await asyncio.sleep(0)
        return len(observation.messages)

    module = Module()
    for rubric in (module, asynchronous, lambda action, observation: len(observation.messages)):
        env = ChatEnvironment(template, rubric=rubric)
        assert env.reset().reward is None
        assert env.step(ChatAction(messages=[user("hi")])).reward == 1.0
        assert env.step(ChatAction(text="hello")).reward == 2.0

        async def again(env=env):
            await env.reset_async(seed=3)
            return await env.step_async(ChatAction(messages=[user("hi")]))

        assert asyncio.run(again()).reward == 1.0
        env.close()
    assert module.resets == 2


def test_an_async_rubric_that_takes_too_long_is_given_up(template):
    async def slow(action, observation):
        await asyncio.sleep(30)

    env = ChatEnvironment(template, rubric=slow)
    env.reset()
    before = snapshot(env)
    with pytest.raises(TimeoutError):
        env.step(ChatAction(messages=[user("hi")]), timeout_s=0.05)
    assert snapshot(env) == before
    env.close()


def test_a_transform_may_reward_and_end_the_episode(template):
    def transform(observation):
        observation.reward = 0.5
        observation.done = len(observation.messages) >= 2
        return observation

    env = ChatEnvironment(template, transform=transform)
    assert env.reset().reward == 0.5
    env.step(ChatAction(messages=[user("hi")]))
    assert env.step(ChatAction(text="hello")).done
    with pytest.raises(EpisodeEnded):
        env.step(ChatAction(text="more"))


# ---------------------------------------------------------------------- episodes
def test_reset_arguments(env):
    observation = env.reset(seed=7, episode_id="mine", query="first?", colour="blue")
    assert observation.messages[-1] == user("first?")
    assert observation.metadata["ignored"] == ["colour"]
    assert env.state.episode_id == "mine"
    env.reset()
    assert env.state.episode_id not in (None, "mine")
    before = snapshot(env)
    for bad in (
        {"seed": -1},
        {"seed": "1"},
        {"seed": True},
        {"episode_id": "x" * 256},
        {"messages": [{"role": 1}]},
    ):
        with pytest.raises(ValueError):  # noqa: PT011
            env.reset(**bad)
    assert snapshot(env) == before


@pytest.mark.parametrize(
    ("limits", "reason", "sampled"),
    [
        ({"max_turns": 2}, "max_turns", 6),
        ({"max_tokens": 7}, "max_tokens", 7),
        ({"max_context": 40}, "context_full", None),
    ],
)
def test_limits_end_an_episode_with_their_reason(template, limits, reason, sampled):
    env = ChatEnvironment(template, **limits)
    observation, total = env.reset(messages="hi"), 0
    for _ in range(20):
        observation = env.step(ChatAction(tokens=[5, 6, 7]))
        start, end = observation.metadata["sampled"]
        total += end - start
        if not observation.done:
            observation = env.step(ChatAction(messages=[user("go on")]))
        if observation.done:
            break
    assert sampled in (None, total)
    assert observation.metadata["stop_reason"] == reason
    with pytest.raises(EpisodeEnded, match=reason):
        env.step(ChatAction(tokens=[5]))
    assert not env.reset().done


def test_an_answer_beyond_its_limit_is_cut_and_closed(template):
    env = ChatEnvironment(template, max_turn_tokens=2)
    prompt = env.reset(messages="hi")
    assert prompt.metadata["tokens_left"] == 2
    observation = env.step(ChatAction(tokens=[5, 6, 7, 8]))
    start, end = observation.metadata["sampled"]
    assert observation.tokens[start:end] == [5, 6]
    assert template.tokenizer.decode(observation.tokens[end:]) == "<|im_end|>\n"
    assert not observation.done


@pytest.mark.parametrize("limits", [{"max_turns": 0}, {"max_tokens": -1}, {"max_seconds": 0.0}])
def test_limits_are_positive(template, limits):
    with pytest.raises(ValueError, match="positive"):
        ChatEnvironment(template, **limits)


def test_metadata_and_interface(env):
    assert env.get_metadata().name == "chat_env"
    assert ChatEnvironment.SUPPORTS_CONCURRENT_SESSIONS
    with pytest.raises(TypeError, match="apply_chat_template"):
        ChatEnvironment(object())


# ---------------------------------------------------------------------- OpenEnv's own tests
def test_small_tokenizers_work_message_by_message():
    env = ChatEnvironment(CharTokenizer(), system_prompt="S")
    assert env.reset().tokens == [83]
    first = env.message_to_action(user("Hi"))
    second = env.message_to_action({"role": "assistant", "content": "Hello"})
    env.step(first)
    observation = env.step(second)
    assert observation.tokens == [83, *first.tokens, *second.tokens]
    assert [m["role"] for m in observation.messages] == ["system", "user", "assistant"]
    before = snapshot(env)
    with pytest.raises(ValueError, match="decode"):
        env.step(ChatAction(tokens=[0x110000]))
    assert snapshot(env) == before


def test_models_take_what_openenvs_take():
    conversation = [{"role": "system", "content": "a"}, user("b")]
    assert ChatState(history_messages=conversation).history_messages == conversation
    assert ChatObservation(messages=conversation).messages == conversation
    assert ChatAction(tokens=torch.tensor([[1, 2]])).tokens == [1, 2]
    with pytest.raises(ValueError, match="at least 1 item"):
        ChatAction(tokens=[])
    with pytest.raises(ValueError, match="empty"):
        ChatAction()


@pytest.mark.skipif(
    "TORCHRL_CHAT_OPENENV_REPO" not in os.environ, reason="TORCHRL_CHAT_OPENENV_REPO names no checkout of OpenEnv"
)
def test_openenvs_own_tests_pass_but_for_the_import_path(tmp_path):
    repo = Path(os.environ["TORCHRL_CHAT_OPENENV_REPO"])
    here = "from torchrl_chat.openenv."
    paths = {
        "from openenv.core.env_server.interfaces import Message": f"{here}models import Message",
        "from ..models import": f"{here}models import",
        "from .chat_environment import": f"{here}chat.environment import",
        "from envs.chat_env.server.chat_environment import": f"{here}chat.environment import",
    }
    for name in ("envs/chat_env/server/test_chat_env.py", "tests/envs/test_chat_environment.py"):
        text = (repo / name).read_text()
        for old, new in paths.items():
            text = text.replace(old, new)
        (tmp_path / Path(name).name).write_text(text)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 passed" in done.stdout


# ---------------------------------------------------------------------- our TorchRL environments by the same interface
ROWS = [{"query": f"{i} + {i}?", "answer": str(2 * i), "script": ["Sure?"]} for i in range(4)]


def dataset_env(split="train", graded=True, **kwargs):
    from torchrl_chat import DatasetChatEnv, RewardTransform
    from torchrl_chat.rewards import NumberVerifier
    from torchrl_chat.transforms import Budget, UserSimulator

    kwargs = {"shuffle": False, "input_mode": "tokens", **kwargs}
    env = DatasetChatEnv(dataset=ROWS, tokenizer=bpe_tokenizer(), seed=0, **kwargs)
    if graded:
        env = env.append_transform(RewardTransform(NumberVerifier()))
    else:
        env = env.append_transform(UserSimulator(script_key="script"))
    return env.append_transform(Budget(max_turns=2, max_turn_tokens=30))


def test_a_dataset_environment_as_an_openenv_environment():
    env = TorchRLEnvironment(EnvPool(dataset_env, name="sums"))
    assert env.num_tasks("train") == 4
    assert env.get_task("train", 2) == {"id": "train-2", "index": 2, "query": "2 + 2?"}
    assert [task["index"] for task in env.get_task_range("train", 1, 3)] == [1, 2]
    assert env.list_tasks("train")[3]["query"] == "3 + 3?"
    observation = env.reset(split="train", index=2, episode_id="e")
    assert observation.messages == [user("2 + 2?")]
    assert observation.metadata["task"] == {"split": "train", "index": 2}
    prompt, sampled = observation.tokens, ids_of(bpe_tokenizer(), "4<|im_end|>")
    observation = env.step(ChatAction(tokens=sampled))
    assert observation.tokens[: len(prompt) + len(sampled)] == prompt + sampled
    assert (observation.reward, observation.done, observation.metadata["stop_reason"]) == (1.0, True, "answered")
    state = env.state
    assert (state.episode_id, state.step_count) == ("e", 1)
    assert list(chain(*state.history_tokens)) == observation.tokens
    with pytest.raises(EpisodeEnded):
        env.step(ChatAction(text="4"))


def test_what_a_simulated_user_says_comes_with_the_next_observation():
    env = TorchRLEnvironment(EnvPool(lambda split: dataset_env(graded=False)))
    prompt = env.reset(index=1).tokens
    observation = env.step(ChatAction(text="2"))
    assert [m["content"] for m in observation.messages] == ["1 + 1?", "2", "Sure?"]
    assert observation.tokens[: len(prompt)] == prompt
    assert (observation.reward, observation.done) == (0.0, False)
    assert env.step(ChatAction(text="yes")).done


def test_the_seed_chooses_the_row_and_sessions_share_nothing():
    pool = EnvPool(dataset_env)
    first, second = TorchRLEnvironment(pool), TorchRLEnvironment(pool)
    rows = {first.reset(seed=seed).messages[0]["content"] for seed in range(12)}
    assert len(rows) > 1
    assert first.reset(seed=5).messages == second.reset(seed=5).messages
    first.reset(index=0)
    second.reset(index=1)
    first.step(ChatAction(text="0"))
    assert len(second.state.history_messages) == 1


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"split": "nope"}, ValueError),
        ({"index": 99}, IndexError),
        ({"index": -1}, IndexError),
        ({"index": "0"}, ValueError),
        ({"index": True}, ValueError),
    ],
)
def test_bad_tasks_are_refused_and_the_episode_goes_on(arguments, error):
    env = TorchRLEnvironment(EnvPool(dataset_env))
    with pytest.raises(EpisodeEnded):
        env.step(ChatAction(text="too early"))
    env.reset(index=1)
    with pytest.raises(error):
        env.reset(**arguments)
    with pytest.raises(ValueError, match="vocabulary"):
        env.step(ChatAction(tokens=[10**6]))
    assert env.step(ChatAction(text="2")).messages[0] == user("1 + 1?")


@pytest.mark.parametrize("kwargs", [{"input_mode": "text"}, {"num_envs": 2}, {"shuffle": True}])
def test_environments_that_cannot_be_served_are_refused(kwargs):
    env = TorchRLEnvironment(EnvPool(lambda split: dataset_env(**kwargs)))
    with pytest.raises(ValueError, match="served|shuffle=False"):
        env.reset()
