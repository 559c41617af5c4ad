"""Templates for base models by name: proved for tokenizers that bring none, in all modes; and what the audit warns of."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import CHATML, all_corpus, bpe_tokenizer, corpus_tokenizer, need_shared
from tensordict import TensorDict
from torchrl.modules.llm.policies import Tokens

from torchrl_chat import BridgeError, ChatEnv, ChatTemplate, columns
from torchrl_chat.audit import audit
from torchrl_chat.templates.named import NAMED
from torchrl_chat.templates.rendering import ChatTemplateError

BASES = ("gpt2", "llama3.1", "mistral-v3", "falcon", "qwen2.5", "deepseek-llm")


def base_tokenizer(name: str):
    """A real tokenizer without a chat template; "tiny" is one of ours."""
    if name == "tiny":
        return bpe_tokenizer.__wrapped__(None)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(need_shared(f"corpus/tokenizers/{name}/tokenizer.json").parent)
    tokenizer.chat_template = None
    return tokenizer


@pytest.mark.parametrize("base", ["tiny", *BASES])
@pytest.mark.parametrize("name", NAMED)
@pytest.mark.by_day(2)
def test_every_kind_of_turn_is_proved(base, name):
    tokenizer = base_tokenizer(base)
    template = ChatTemplate(tokenizer, chat_template=name)
    assert set(template.capabilities.values()) == {None}
    assert template.stop_ids == {tokenizer.eos_token_id}
    ids = template.render([{"role": "user", "content": "2 + 2?"}])
    assert ids.count(tokenizer.eos_token_id) == 0
    assert (ids[0] == tokenizer.bos_token_id) == (tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id)


@pytest.mark.parametrize("name", NAMED)
def test_an_episode(name, mode):
    """Two answers with reasoning and a question between: the law, and the text of the template itself."""
    tokenizer = bpe_tokenizer.__wrapped__(None)
    env = ChatEnv(input_mode=mode, tokenizer=tokenizer, batch_size=(1,), template_kwargs={"chat_template": name})
    codec = env.template.codec
    td = env.reset(TensorDict(query=["what is 12 + 30?"], batch_size=(1,)))
    text = codec.decode([td.get(("tokens", "prompt"), as_list=True)[0].tolist()])[0]
    said = " <think> 12 + 30 = 42 </think> <answer> 42 </answer>"
    for question in ("and 1 + 1?", "and then?"):
        ids = torch.tensor([*codec.encode_continuation([said])[0], tokenizer.eos_token_id])
        td["tokens"] = columns.ragged(Tokens, "response", [ids], td.batch_size, None)
        td = env.append_messages(env.step_mdp(env.step(td)), [question])
        line = "\n" if name == "r1-zero" else "\n\n"
        text += f"{said}{tokenizer.eos_token}{line}User: {question}{line}Assistant:"
        [ledger] = columns.read_objects(td["transcript"], td.batch_size)
        assert codec.decode([ledger.tokens.tolist()])[0] == text
        # Rendered anew, the conversation is the same: nothing of an answer is lost in its message.
        assert env.template.renderer.text(ledger.messages, True) == text
    if name == "r1-zero":
        assert "<think> reasoning process here </think> <answer> answer here </answer>.\nUser: what is 12" in text
        answers = [m for m in ledger.messages if m["role"] == "assistant"]
        assert {m["reasoning_content"] for m in answers} == {" 12 + 30 = 42 "}
        assert {m["content"] for m in answers} == {" <answer> 42 </answer>"}


def test_the_error_names_them():
    tokenizer = bpe_tokenizer.__wrapped__(None)
    with pytest.raises(
        ChatTemplateError, match="has no chat template.*chat_template='plain' and chat_template='r1-zero'"
    ):
        ChatTemplate(tokenizer)
    with pytest.raises(ChatTemplateError, match="has no chat template.*'plain'"):
        ChatEnv(tokenizer=tokenizer)
    with pytest.raises(ChatTemplateError, match="chat_template is 'plainly'.*'plain', 'r1-zero'"):
        ChatTemplate(tokenizer, chat_template="plainly")


def test_a_tokenizers_own_name_comes_first():
    tokenizer = bpe_tokenizer.__wrapped__({"default": CHATML, "plain": "own{{ messages[0].content }}"})
    asked = [{"role": "user", "content": "x"}]
    assert ChatTemplate(tokenizer, chat_template="plain").renderer.text(asked, False) == "ownx"
    assert "User: x" in ChatTemplate(tokenizer, chat_template="r1-zero").renderer.text(asked, False)


def test_without_an_end_of_sequence_token_turns_end_in_text():
    tokenizer = bpe_tokenizer.__wrapped__(None)
    tokenizer.eos_token = None
    template = ChatTemplate(tokenizer, chat_template="plain")
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    ids = [*template.render(messages[:1]), *template.codec.encode([" y\n\n"])[0]]
    try:
        extended = template.extend(ids, messages, [{"role": "user", "content": "z"}])
    except BridgeError:
        return
    assert template.codec.decode([extended])[0] == "User: x\n\nAssistant: y\n\nUser: z\n\nAssistant:"


@pytest.mark.parametrize("command", ["audit", "serve"])
def test_names_on_the_command_line(command, tmp_path, capsys, monkeypatch):
    from torchrl_chat.cli.main import main

    if command == "serve":
        from torchrl_chat.pretrained import template_of

        monkeypatch.chdir(tmp_path)
        assert template_of("plain") == "plain"
        (tmp_path / "plain").write_text("{{ 'a file comes first' }}")
        assert "a file" in template_of("plain")
        with pytest.raises(ValueError, match="'plainly' is no file.*none of plain, r1-zero"):
            template_of("plainly")
        return
    base_tokenizer("tiny").save_pretrained(tmp_path)
    assert main(["audit", str(tmp_path), "--template", "r1-zero"]) == 0
    assert "warning" not in capsys.readouterr().out


# ---------------------------------------------------------------------- tokens that the tokenizer lacks
def test_the_audit_warns_of_chatml_on_a_tokenizer_without_its_tokens():
    tokenizer = base_tokenizer("gpt2")
    report = audit(tokenizer, chat_template=CHATML)
    assert [warning.split("'")[1] for warning in report.warnings] == ["<|im_start|>", "<|im_end|>"]
    assert all("does not have" in warning for warning in report.as_dict()["warnings"])
    from torchrl_chat.cli.audit_text import Style, lines

    shown = "\n".join(lines(report, Style()))
    assert shown.count("\nwarning ") == 2
    assert audit(bpe_tokenizer(), chat_template=CHATML).warnings == ()


@pytest.mark.parametrize(
    "token", ["<start_of_turn>", "</s>", "<｜User｜>", "[gMASK]", "<|a_token_of_calls|>", "<end_turn>"]
)
@pytest.mark.by_day(2)
def test_the_forms_that_special_tokens_have(token):
    source = CHATML.replace("<|im_end|>\n{% endfor %}", token + "{% endfor %}")
    if token == "<|a_token_of_calls|>":
        source = CHATML.replace(
            "{{ m['content'] }}", "{{ m['content'] }}{{ '<|a_token_of_calls|>' if m.tool_calls else '' }}"
        )
    [warning] = audit(bpe_tokenizer.__wrapped__(source)).warnings
    assert f"the template writes {token!r}" in warning
    tokenizer = bpe_tokenizer.__wrapped__(source)
    tokenizer.add_special_tokens({"additional_special_tokens": [token]}, replace_extra_special_tokens=False)
    assert audit(tokenizer).warnings == ()


@pytest.mark.corpus
@pytest.mark.parametrize("name", all_corpus()[::12])
def test_no_warning_where_a_template_has_its_own_tokenizer(name):
    assert audit(corpus_tokenizer(name)).warnings == ()


def test_in_the_scripts(tmp_path):
    from torchrl_chat.recipes.settings import RunConfig
    from torchrl_chat.recipes.tasks import make_model
    from torchrl_chat.tiny import tiny_model

    tokenizer = base_tokenizer("tiny")
    tokenizer.save_pretrained(tmp_path)
    tiny_model(len(tokenizer)).save_pretrained(tmp_path)
    for model in (str(tmp_path), "tiny"):
        _, made = make_model(RunConfig(model=model, chat_template="plain", device="cpu"))
        assert "Assistant:" in made.chat_template


@pytest.mark.parametrize("command", ["eval", "train"])
def test_a_base_model_on_the_command_line(command, tmp_path, capsys):
    """Without a template the error names those there are; with a name, it is the template of all that is played."""
    from torchrl_chat.cli.main import main
    from torchrl_chat.tiny import tiny_model

    tokenizer = base_tokenizer("tiny")
    tokenizer.save_pretrained(tmp_path / "base")
    tiny_model(len(tokenizer)).save_pretrained(tmp_path / "base")
    words = [command, "--model", str(tmp_path / "base"), "--out", str(tmp_path / "run"), "--max-new-tokens", "2"]
    words += ["--limit", "2"] if command == "eval" else ["--steps", "1", "--prompts", "1", "--group-size", "2"]
    words += [] if command == "eval" else ["--eval", "2", "--minibatch", "2"]
    assert main(words) != 0
    assert "'plain'" in capsys.readouterr().err
    assert main([*words, "--chat-template", "plainly"]) != 0
    assert "'plainly' is no file" in capsys.readouterr().err
    assert main([*words, "--chat-template", "plain"]) == 0
    if command == "train":
        from transformers import AutoTokenizer

        assert (
            "Assistant:"
            in AutoTokenizer.from_pretrained(tmp_path / "run" / "checkpoints" / "step-000001").chat_template
        )
        return
    [first, _] = (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()
    prompt = json.loads(first)["sequences"][0]["ids"]
    assert "User: " in tokenizer.decode(prompt)
    assert "Assistant:" in tokenizer.decode(prompt)
