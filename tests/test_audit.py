"""The audit: what it finds on templates that behave and on those that do not, and the command around it."""

from __future__ import annotations

import functools
import json
import subprocess
import sys

import pytest
from conftest import CHATML, SHARED, all_corpus, bpe_tokenizer, corpus_tokenizer, need_shared, of_the_day

from torchrl_chat import ChatTemplateError
from torchrl_chat.audit import audit
from torchrl_chat.audit.report import Origin, Status
from torchrl_chat.cli.audit import template_kwargs
from torchrl_chat.cli.audit_text import Style, lines
from torchrl_chat.cli.main import main

pytestmark = pytest.mark.corpus

NAMES = [
    "user_turns",
    "user_turns_after_system",
    "system_mid_conversation",
    "tool_turn",
    "tool_turn_two_results",
    "tool_turn_raw",
    "tools_in_prompt",
    "reasoning_in_content",
    "reasoning_content",
    "several_new_messages",
    "result_and_user",
    "truncated_turns",
    "empty_answers",
    "depth",
]
KEYS = {
    "schema",
    "tokenizer",
    "template",
    "parsing",
    "stop_tokens",
    "capabilities",
    "history",
    "drift",
    "warnings",
    "proved",
}
WITH_TOOLS = "{% if tools %}tools: {{ tools | tojson }}\n{% endif %}" + CHATML
THINKING = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n" + (
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1].lstrip('\n') }}"
    "{% else %}{{ '<think>\n' + m['reasoning_content'] + '\n</think>\n\n' if m['reasoning_content'] else '' }}"
    "{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_TOOLS = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'tool' %}")
ONE_TURN = "{% if messages | length > 2 %}{{ raise_exception('only one turn') }}{% endif %}" + CHATML
BY_ANSWER = CHATML.replace(
    "<|im_end|>\n{% endfor %}", "{{ '<|pad|>' if 'metres' in m['content'] else '<|im_end|>' }}\n{% endfor %}"
)


@functools.cache
def audited(source: str):
    return audit(bpe_tokenizer(source))


class TestFindings:
    def test_chatml(self):
        report = audited(CHATML)
        assert [finding.name for finding in report.capabilities] == NAMES
        unproved = {f.name: f.status for f in report.capabilities if f.status is not Status.PROVED}
        assert unproved == {"tools_in_prompt": Status.UNSUPPORTED}
        assert report.proved
        assert report["user_turns"].mode == "compiled"
        assert "leaves out tool_calls" in report["tool_turn"].note
        assert [(t.id, t.text) for t in report.stop_tokens] == [(2, "<|im_end|>")]
        assert report.template.length == len(CHATML)
        assert report.template.generation_prompt == "<|im_start|>assistant\n"
        assert not report.template.clock
        assert report.template.date is None

    def test_the_tail_token_by_token(self):
        tail = audited(CHATML)["user_turns"].tail
        origins = list(dict.fromkeys(token.origin for token in tail))
        assert origins == [Origin.STOP, Origin.CLOSE, Origin.NEW, Origin.GENERATION_PROMPT]
        texts = {origin: "".join(token.text for token in tail if token.origin is origin) for origin in origins}
        assert texts == {
            Origin.STOP: "<|im_end|>",
            Origin.CLOSE: "\n",
            Origin.NEW: "<|im_start|>user\nAnd in feet?<|im_end|>\n",
            Origin.GENERATION_PROMPT: "<|im_start|>assistant\n",
        }

    def test_a_cut_turn_is_closed_unsampled(self):
        whole, cut = audited(CHATML)["user_turns"].tail, audited(CHATML)["truncated_turns"].tail
        assert [token.id for token in cut] == [token.id for token in whole]
        assert [token.origin for token in cut[:2]] == [Origin.CLOSE, Origin.CLOSE]

    def test_tools_in_the_prompt(self):
        report = audited(WITH_TOOLS)
        assert report["tools_in_prompt"].status is Status.PROVED
        tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
        assert audit(bpe_tokenizer(WITH_TOOLS), tools=[tool])["tools_in_prompt"].status is Status.PROVED

    def test_dropped_tool_results_are_said(self):
        report = audited(NO_TOOLS)
        finding = report["tool_turn"]
        assert finding.status is Status.UNSUPPORTED
        assert "role 'tool'" in finding.reason
        assert report.proved

    def test_a_template_that_raises_is_unsupported(self):
        finding = audited(ONE_TURN)["user_turns"]
        assert (finding.status, finding.mode, finding.tail) == (Status.UNSUPPORTED, None, ())
        assert "only one turn" in finding.reason
        assert {entry.rewrites for entry in audited(ONE_TURN).history} == {None}
        assert {entry.exact for entry in audited(ONE_TURN).drift} == {None}

    def test_what_cannot_be_proved_is_refused(self):
        finding = audited(BY_ANSWER)["user_turns"]
        assert finding.status is Status.REFUSED
        assert finding.reason

    def test_a_counting_template_is_rendered(self):
        source = CHATML.replace("{{ m['content'] }}", "[{{ loop.index }}] {{ m['content'] }}")
        assert audited(source)["user_turns"].mode == "rendered"
        assert audited(source)["depth"].mode == "rendered"

    def test_history(self):
        report = audited(THINKING)
        rewrites = {entry.turn: entry.rewrites for entry in report.history}
        assert rewrites == {
            "user": False,
            "user after system": False,
            "tool": False,
            "reasoning and tool": None,
            "reasoning": True,
        }
        reasoning = report.history[-1]
        assert "The user asks" in reasoning.before
        assert "The user asks" not in reasoning.after
        assert [(pair.open, pair.close) for pair in report.parsing.reasoning] == [("<think>", "</think>")]

    def test_a_prompt_that_opens_the_reasoning(self):
        source = THINKING.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
        report = audited(source)
        assert report.template.opens_reasoning
        assert report.proved

    def test_date(self):
        source = "{{ 'Today: ' + strftime_now('%Y-%m-%d') }}\n" + CHATML
        template = audit(bpe_tokenizer(source)).template
        assert template.clock
        assert template.date.startswith("Today: 20")

    def test_variables(self):
        report = audit(bpe_tokenizer("{{ greeting }}" + CHATML), greeting="hello")
        assert report.template.variables == {"greeting": "hello"}
        assert report.proved

    def test_no_template(self):
        tokenizer = bpe_tokenizer.__wrapped__()
        tokenizer.chat_template = None
        with pytest.raises(ChatTemplateError, match="no chat template"):
            audit(tokenizer)

    def test_the_tokenizers_template_renders_as_before(self):
        tokenizer = bpe_tokenizer.__wrapped__()
        audit(tokenizer)
        assert tokenizer.chat_template == CHATML


class TestDrift:
    def exact(self, source):
        return {(entry.turn, entry.method): entry.exact for entry in audited(source).drift}

    def test_chatml(self):
        exact = self.exact(CHATML)
        assert exact["user", "rerender"]
        assert exact["user", "dummy_suffix"]
        assert not exact["user", "rerender_other_tokens"]
        assert not exact["user", "fixed_base"]  # the line break behind <|im_end|> is lost

    def test_differences_are_shown(self):
        found = {(e.turn, e.method): e.difference for e in audited(CHATML).drift}
        assert "(tail)" in found["user", "fixed_base"]
        assert "'\\n'" in found["user", "fixed_base"]
        assert "(answer)" in found["user", "rerender_other_tokens"]

    def test_stripped_reasoning(self):
        assert self.exact(THINKING)["user", "rerender"]
        assert not self.exact(THINKING)["reasoning", "rerender"]


class TestReport:
    def test_json(self):
        data = audited(CHATML).as_dict()
        assert json.loads(json.dumps(data)) == data
        assert data.keys() == KEYS
        assert data["schema"] == 1
        finding = {"name", "title", "status", "mode", "reason", "note", "proof_ms", "tail"}
        assert all(entry.keys() == finding for entry in data["capabilities"])
        assert all(entry.keys() == {"turn", "rewrites", "before", "after", "reason"} for entry in data["history"])
        assert all(entry.keys() == {"turn", "method", "exact", "difference"} for entry in data["drift"])
        assert data["capabilities"][0]["tail"][0] == {"id": 2, "text": "<|im_end|>", "origin": "sampled stop"}

    def test_unknown_capability(self):
        with pytest.raises(KeyError, match="no capability 'nothing'"):
            audited(CHATML)["nothing"]

    @pytest.mark.parametrize("width", [40, 80, 140])
    @pytest.mark.parametrize("source", [CHATML, THINKING, ONE_TURN])
    def test_text_is_as_wide_as_the_terminal(self, source, width):
        for symbols in (True, False):
            text = list(lines(audited(source), Style(width, symbols=symbols)))
            assert max(map(len, text)) <= max(width, 70)
            assert symbols or all(line.isascii() for line in text)

    def test_all_tails(self):
        few, many = (list(lines(audited(CHATML), Style(), all_tails=a)) for a in (False, True))
        assert len(many) > len(few)
        assert any("the same as of user turns" in line for line in few)


@pytest.mark.parametrize("name", all_corpus())
@pytest.mark.by_day(6)
def test_every_development_template(name):
    """Whatever a template does, the audit tells it and raises nothing; user turns are proved on all of them."""
    report = audit(corpus_tokenizer(name))
    data = report.as_dict()
    assert json.loads(json.dumps(data)) == data
    assert report.proved, report["user_turns"].reason
    for finding in report.capabilities:
        assert finding.status is Status.PROVED or finding.reason
        assert (finding.mode is None) == (not finding.tail)
    assert list(lines(report, Style(80)))


@pytest.fixture
def folder(tmp_path):
    """A tokenizer as a folder."""
    bpe_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


class TestCommand:
    def test_text(self, folder, capsys):
        assert main(["audit", str(folder)]) == 0
        printed = capsys.readouterr().out
        assert str(folder) in printed
        assert "✓ user turns" in printed
        assert "<|im_end|>(2)" in printed
        assert "⏎" in printed
        assert "\033" not in printed

    def test_json_and_nothing_else(self, folder):
        command = [sys.executable, "-m", "torchrl_chat.cli.main", "audit", str(folder), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        data = json.loads(done.stdout)
        assert data.keys() == KEYS
        assert data["tokenizer"] == str(folder)
        assert done.stderr == ""

    def test_colour_on_a_terminal_alone(self, monkeypatch):
        class Terminal:
            encoding = "utf-8"

            def isatty(self):
                return True

        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.delenv("NO_COLOR", raising=False)
        assert Style.of(Terminal(), 80).colour
        monkeypatch.setenv("NO_COLOR", "1")
        assert not Style.of(Terminal(), 80).colour

    @pytest.mark.parametrize("source", [ONE_TURN, "{% for m in messages %}{{ nothing.at.all }}{% endfor %}"])
    def test_a_bad_template_exits_1_with_the_reason(self, folder, tmp_path, capsys, source):
        (tmp_path / "bad.jinja").write_text(source)
        assert main(["audit", str(folder), "--template", str(tmp_path / "bad.jinja")]) == 1
        printed = capsys.readouterr().out
        assert "– user turns" in printed
        assert "because" in printed

    def test_a_template_that_does_not_parse(self, folder, tmp_path, capsys):
        (tmp_path / "bad.jinja").write_text("{{ 'x' }}\n{{ messages")
        assert main(["audit", str(folder), "--template", str(tmp_path / "bad.jinja")]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert "no valid Jinja" in err
        assert "line 2" in err
        assert err.count("\n") == 1

    def test_template_variables_and_tools(self, folder, tmp_path, capsys):
        (tmp_path / "tools.json").write_text('{"type": "function", "function": {"name": "add"}}')
        (tmp_path / "mine.jinja").write_text("{{ greeting }}" + WITH_TOOLS)
        files = ["--template", str(tmp_path / "mine.jinja"), "--tools", str(tmp_path / "tools.json")]
        assert main(["audit", str(folder), *files, "--json", "--template-kwargs", "greeting=hi", "n=3"]) == 0
        data = json.loads(capsys.readouterr().out)
        assert data["template"]["variables"] == {"greeting": "hi", "n": 3}
        assert {f["name"]: f["status"] for f in data["capabilities"]}["tools_in_prompt"] == "proved"

    def test_values_of_variables(self):
        pairs = ["a=false", "b=False", "c=1.5", "d=26 Jul 2024", "e=", 'f=["x"]', "g=k=v"]
        expected = {"a": False, "b": False, "c": 1.5, "d": "26 Jul 2024", "e": "", "f": ["x"], "g": "k=v"}
        assert template_kwargs(pairs) == expected

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["/no/such/folder"], "there is no folder '/no/such/folder'"),
            (["."], "holds no tokenizer"),
            (["FOLDER", "--template", "/no/such/file"], "/no/such/file cannot be read"),
            (["FOLDER", "--template", __file__.replace(".py", ".none")], "cannot be read"),
            (["FOLDER", "--tools", __file__], "is no JSON"),
            (["FOLDER", "--template-kwargs", "nonsense"], "expected KEY=VALUE"),
            (["FOLDER", "--template-kwargs", "tokenize=true"], "template_kwargs has ['tokenize']"),
        ],
    )
    def test_bad_input_is_one_line(self, folder, tmp_path, monkeypatch, capsys, arguments, message):
        monkeypatch.chdir(tmp_path)
        assert main(["audit", *(str(folder) if a == "FOLDER" else a for a in arguments)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1

    def test_no_hub(self, monkeypatch, capsys):
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
        monkeypatch.setattr("urllib.request.getproxies", dict)
        assert main(["audit", "nobody/no-such-tokenizer"]) == 2
        assert "the Hugging Face hub cannot be reached" in capsys.readouterr().err

    def test_no_chat_template(self, tmp_path, capsys):
        tokenizer = bpe_tokenizer.__wrapped__()
        tokenizer.chat_template = None
        tokenizer.save_pretrained(tmp_path)
        assert main(["audit", str(tmp_path)]) == 2
        assert "has no chat template" in capsys.readouterr().err

    def test_help_teaches(self, capsys):
        with pytest.raises(SystemExit):
            main(["audit", "--help"])
        text = capsys.readouterr().out
        for word in ("Qwen/Qwen3-0.6B", "exit code", "refused", "--json", "history_policy"):
            assert word in text

    def test_knows_no_torchrl(self):
        code = (
            "import sys, torchrl_chat.cli.main, torchrl_chat.cli.audit_text, torchrl_chat.audit;"
            "assert not {'torch', 'torchrl', 'transformers'} & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code], check=True)

    @pytest.mark.parametrize(
        "name", of_the_day(*sorted(p.name for p in SHARED.glob("corpus/tokenizers/*")) or ["qwen2.5"], share=3)
    )
    def test_real_folders(self, name, capsys):
        path = need_shared(f"corpus/tokenizers/{name}")
        own = (path / "chat_template.jinja").exists()
        assert main(["audit", str(path), "--json"]) == (0 if own else 2)
        out, err = capsys.readouterr()
        if own:
            assert json.loads(out)["proved"]
        else:
            assert "has no chat template" in err
