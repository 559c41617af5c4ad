"""The examples of the documents that the project was created from run as they stand, but for the import path."""

from __future__ import annotations

import functools
import re
import sys
import textwrap
import types

import pytest
import torch
from conftest import bpe_tokenizer, need_shared
from openenv_live import live
from tensordict import TensorDict
from torchrl.data.llm import History

import torchrl_chat
import torchrl_chat.openenv as openenv
from torchrl_chat.envs import ResponseError
from torchrl_chat.openenv import ChatAction, ChatEnv, ChatEnvironment, ChatObservation, ChatState
from torchrl_chat.tiny import tiny_model

pytestmark = pytest.mark.services

README = "seeds/openenv-chat_env-README.md"
CLIENT = "seeds/openenv-chat_env-client.txt"
TORCHRL = "seeds/torchrl-envs-llm-chat.txt"


@pytest.fixture(scope="module")
def url():
    with live(lambda: ChatEnvironment(bpe_tokenizer())) as server:
        yield server.url


@pytest.fixture
def openenvs_names(monkeypatch, url):
    """OpenEnv's import paths lead here; its image and the address in its examples are a server of ours; no hub is asked."""
    server = types.ModuleType("envs.chat_env.server")
    server.ChatEnvironment = ChatEnvironment
    core = types.ModuleType("core.env_server")
    core.Message, core.Observation, core.Transform = dict, openenv.Observation, object
    modules = {
        "envs": types.ModuleType("envs"),
        "envs.chat_env": openenv,
        "envs.chat_env.server": server,
        "core": types.ModuleType("core"),
        "core.env_server": core,
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda name: bpe_tokenizer())
    made = ChatEnv.__init__
    monkeypatch.setattr(ChatEnv, "__init__", lambda self, base_url, **options: made(self, url, **options))
    monkeypatch.setattr(ChatEnv, "from_docker_image", classmethod(lambda cls, image, **options: cls(url)))


def blocks(relative: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", need_shared(relative).read_text(), re.S)


def block_with(text: str) -> str:
    (found,) = (block for block in blocks(README) if text in block)
    return found


class YourLanguageModel:
    """A model of transformers, as the pseudo-code of the README wants one."""

    def __init__(self):
        self.tokenizer = bpe_tokenizer()
        self.model = tiny_model(len(self.tokenizer))
        self.rewards = []

    def generate(self, tokens):
        return self.model.generate(tokens, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)

    def update(self, reward):
        self.rewards.append(reward)


def test_every_block_of_the_readme_is_tried():
    tried = [
        "Tokens shape",
        "from_docker_image",
        "Full conversation",
        "LengthReward",
        "[[1, 2, 3, 4, 5]]",
        "Pseudo-code",
    ]
    rest = [block for block in blocks(README) if not any(word in block for word in tried)]
    assert len(rest) == 3
    assert all(block.startswith("@dataclass") for block in rest)


def test_direct_use(openenvs_names, capsys):
    exec(block_with("Tokens shape"), scope := {})
    observation = scope["obs"]
    said = capsys.readouterr().out
    assert f"Updated tokens shape: torch.Size([1, {len(observation.tokens)}])" in said
    assert observation.messages[-1] == {"role": "user", "content": "Hello!"}


def test_client(openenvs_names, capsys):
    exec(block_with("from_docker_image"), {})
    assert "Hello!" in capsys.readouterr().out


@pytest.mark.parametrize("number", [0, 1])
def test_examples_of_the_client(openenvs_names, number):
    text = need_shared(CLIENT).read_text()
    example = re.findall(r"Example(?: with Docker)?:\n((?:(?:>>>|\.\.\.).*\n)+)", text)[number]
    code = "\n".join(line[4:] for line in example.splitlines())
    scope = {"ChatEnv": ChatEnv, "ChatAction": ChatAction}
    exec(_indented(code), scope)
    tokens = scope["result"].observation.tokens
    assert tokens[:3] == [1, 2, 3]
    assert tokens.shape == (1, len(tokens))


def _indented(code: str) -> str:
    """The page lost its indentation: a line behind one that ends in a colon stands in its block."""
    lines, depth = [], 0
    for line in code.splitlines():
        if line.startswith(("finally:", "except", "else:")):
            depth = 0
        lines.append("    " * depth + line.strip())
        if line.rstrip().endswith(":"):
            depth += 1
    return "\n".join(lines)


def test_a_conversation(openenvs_names, capsys):
    exec(block_with("Full conversation"), scope := {})
    assert [m["role"] for m in scope["obs"].messages] == ["user", "assistant"]
    assert scope["obs"].messages[-1]["content"] == "2+2 equals 4."


def test_a_transform_that_rewards(openenvs_names):
    scope = {"tokenizer": bpe_tokenizer(), "ChatEnvironment": ChatEnvironment}
    exec(block_with("LengthReward"), scope)
    env = scope["env"]
    env.reset()
    observation = env.step(env.message_to_action({"role": "user", "content": "Hello!"}))
    assert observation.reward == pytest.approx(0.6)


def test_tokens_as_a_tensor_of_one_row(openenvs_names):
    env = ChatEnvironment(bpe_tokenizer())
    env.reset()
    scope = {"env": env}
    exec(block_with("[[1, 2, 3, 4, 5]]"), scope)
    assert scope["action"].tokens == [1, 2, 3, 4, 5]
    assert scope["obs"].tokens[:5] == [1, 2, 3, 4, 5]


def test_the_training_loop(openenvs_names):
    """The loop ends where an episode does, and a model needs something to read: the README's environment has neither."""
    limited = functools.partial(ChatEnvironment, system_prompt="Be brief.", max_turns=1)
    scope = {
        "YourLanguageModel": YourLanguageModel,
        "ChatEnvironment": limited,
        "ChatAction": ChatAction,
        "num_episodes": 2,
    }
    exec(block_with("Pseudo-code"), scope)
    assert scope["model"].rewards == [0.0, 0.0]
    prompt = limited(scope["model"].tokenizer).reset().tokens
    sampled = scope["model"].generate(prompt)[0, len(prompt) :].tolist()
    # What the policy sampled is the answer, not the prompt that transformers returns with it.
    start, end = scope["obs"].metadata["sampled"]
    assert scope["obs"].tokens[:start] == prompt
    assert scope["obs"].tokens[start:end] == sampled


def test_the_data_models_have_the_fields():
    for block in blocks(README):
        if block.startswith("@dataclass"):
            name = re.search(r"class (\w+)", block).group(1)
            model = {"ChatAction": ChatAction, "ChatObservation": ChatObservation, "ChatState": ChatState}[name]
            fields = re.findall(r"^    (\w+):", textwrap.dedent(block), re.M)
            assert fields
            assert set(fields) <= set(model.model_fields)


# ---------------------------------------------------------------------- torchrl's environment
def test_torchrls_example(capsys):
    text = need_shared(TORCHRL).read_text()
    example = re.search(r"Examples:\n((?:(?:>>>|\.\.\.).*\n)+)", text)[1]
    assert "from torchrl.envs.llm import ChatEnv" in example
    code = "\n".join(line[4:] for line in example.splitlines())
    exec(code.replace("from torchrl.envs.llm import ChatEnv", "from torchrl_chat import ChatEnv"), scope := {})
    assert scope["obs"]["history"].prompt[0].content == ["You are a helpful assistant.", "Hello, how are you?"]
    (ledger,) = scope["next_obs"]["next", "transcript"]
    assert [message["role"] for message in ledger.messages] == ["system", "user", "assistant"]
    assert capsys.readouterr().out.count("History(") == 2


def test_whole_conversations_are_stepped_like_answers():
    """A bare ``History`` that ends with an answer is what reset and that answer make, with and without tokens."""
    chats = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in (("one?", "1"), ("a longer one, two?", "2"))
    ]
    for tokenizer in (None, bpe_tokenizer()):
        env = torchrl_chat.ChatEnv(input_mode="history", tokenizer=tokenizer, batch_size=(2,))
        whole = env.step(TensorDict(history=History.from_chats(chats), batch_size=(2,)))
        td = env.reset(TensorDict(query=[chat[0]["content"] for chat in chats], batch_size=(2,)))
        td["history"].full = History.from_chats(chats)
        by_hand = env.step(td)
        for mine, theirs in zip(whole["next", "transcript"], by_hand["next", "transcript"], strict=True):
            assert mine.messages == theirs.messages
            assert torch.equal(mine.tokens, theirs.tokens)
            assert torch.equal(mine.mask, theirs.mask)
        again = env.append_messages(env.step_mdp(whole), ["sure?", None])
        assert again["transcript"][0].messages[-1]["content"] == "sure?"


@pytest.mark.parametrize(
    ("mode", "roles", "said"),
    [("history", ["user", "user"], "ends with an answer"), ("text", ["user", "assistant"], "whole conversations")],
)
def test_what_is_no_whole_conversation_is_refused(mode, roles, said):
    env = torchrl_chat.ChatEnv(input_mode=mode, tokenizer=bpe_tokenizer(), batch_size=(1,))
    history = History.from_chats([[{"role": role, "content": "x"} for role in roles]])
    with pytest.raises(ResponseError, match=said):
        env.step(TensorDict(history=history, batch_size=(1,)))


# ---------------------------------------------------------------------- rows of tokens
@pytest.fixture(scope="module")
def model():
    return tiny_model(300).eval()


def observations(url):
    """The same conversation in this process and over the client, whole and by deltas."""
    question = {"role": "user", "content": "hello"}
    direct = ChatEnvironment(bpe_tokenizer())
    direct.reset()
    yield direct.step(ChatAction(messages=[question]))
    for delta in (True, False):
        with ChatEnv(url, delta=delta) as client:
            client.reset()
            yield client.step(ChatAction(messages=[question])).observation


def test_a_model_reads_the_tokens_of_an_observation(url, model):
    for observation in observations(url):
        row = observation.tokens
        options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        assert torch.equal(model.generate(row, **options), model.generate(torch.tensor([list(row)]), **options))
        assert torch.equal(model(row).logits, model(torch.tensor([list(row)])).logits)
        assert row.shape == (1, len(row))
        assert (row.device.type, row.dtype) == ("cpu", torch.int64)


def test_they_are_lists_all_the_same(url):
    import copy
    import json
    import pickle

    for observation in observations(url):
        row = observation.tokens
        plain = [int(i) for i in row]
        assert isinstance(row, list)
        assert row == plain
        assert plain == row
        assert row != [*plain, 1]
        assert list.__add__(row, [1]) == [*plain, 1]
        assert (row[0], row[-2:], row[0] in row, row < [*plain, 0]) == (plain[0], plain[-2:], True, True)
        assert json.loads(json.dumps(row)) == plain
        assert json.loads(observation.model_dump_json())["tokens"] == plain
        assert observation.model_dump()["tokens"] == plain
        for copied in (copy.copy(row), copy.deepcopy(row), pickle.loads(pickle.dumps(row))):
            assert copied == plain
            assert copied.shape == row.shape
        assert (row == plain[0]).sum() == plain.count(plain[0])  # a number is compared with each id
        assert row[:, -1].tolist() == plain[-1:]
        assert torch.cat([row, torch.tensor([[1]])], -1).tolist() == [[*plain, 1]]
        assert torch.tensor(row).tolist() == plain
        assert ChatAction(tokens=row).tokens == plain
        assert ChatAction(tokens=row.tensor).tokens == plain


def test_the_state_has_rows_too(url):
    with ChatEnv(url) as client:
        client.reset()
        client.step(ChatAction(messages=[{"role": "user", "content": "hello"}]))
        (row,) = client.state().history_tokens
        assert row.shape == (1, len(row))


def test_an_answer_that_begins_with_the_prompt_is_kept_on_request():
    for strip in (True, False):
        env = ChatEnvironment(bpe_tokenizer(), strip_prompt=strip)
        env.reset()
        prompt = env.step(ChatAction(messages=[{"role": "user", "content": "hello"}])).tokens
        observation = env.step(ChatAction(tokens=[*prompt, 5, 6]))
        start, end = observation.metadata["sampled"]
        assert observation.tokens[start:end] == ([5, 6] if strip else [*prompt, 5, 6])
