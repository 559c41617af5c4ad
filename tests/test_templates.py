"""The bridge: what it derives, what it proves, and what it refuses."""

from __future__ import annotations

import pickle

import pytest
from conftest import CHATML, CORPUS, bpe_tokenizer, corpus_tokenizer, stop_of

from torchrl_chat import BridgeError, ChatEnv, ChatTemplate, ChatTemplateError, MessageError

USER = {"role": "user", "content": "What is 12 + 30?"}
ANSWER = {"role": "assistant", "content": "42"}
NEXT = {"role": "user", "content": "And 13 + 30?"}
SYSTEM = {"role": "system", "content": "Be brief."}


def sampled(template: ChatTemplate, text: str, ended: bool = True) -> list[int]:
    last = template.render([USER])[-1]  # what a tokenizer does behind a control token belongs to the answer
    return template.codec.encode_continuation([text], after=[last])[0] + [stop_of(template)] * ended


@pytest.fixture(params=["trained", *CORPUS])
def template(request) -> ChatTemplate:
    tokenizer = bpe_tokenizer() if request.param == "trained" else corpus_tokenizer(request.param)
    return ChatTemplate(tokenizer)


class TestExtend:
    def test_starts_with_what_was_there(self, template):
        prompt = template.render([USER])
        ids = prompt + sampled(template, "42")
        assert template.extend(ids, [USER, ANSWER], [NEXT])[: len(ids)] == ids

    def test_turn_cut_by_length_is_closed_unsampled(self, template):
        prompt = template.render([USER])
        whole = template.extend(prompt + sampled(template, "42"), [USER, ANSWER], [NEXT])
        cut = template.extend(prompt + sampled(template, "42", ended=False), [USER, ANSWER], [NEXT])
        assert cut == whole

    def test_finish_reason_wins_over_the_last_id(self, template):
        # The stop token among the ids, but the policy was cut: one more close is due.
        ids = template.render([USER]) + sampled(template, "42")
        close = template.close([USER, ANSWER])
        extended = template.extend(ids, [USER, ANSWER], [NEXT], ended=False)
        assert extended[: len(ids) + 1] == [*ids, close.cut.ids[0]]

    def test_batch_equals_one_by_one(self, template):
        ids = template.render([USER]) + sampled(template, "42")
        short = template.render([NEXT]) + sampled(template, "7", ended=False)
        conversations = ([USER, ANSWER], [NEXT, {"role": "assistant", "content": "7"}])
        new = ([NEXT], [USER])
        batch = template.extend_batch([ids, short], conversations, new)
        assert batch == [
            template.extend(ids, conversations[0], new[0]),
            template.extend(short, conversations[1], new[1]),
        ]

    def test_deep_conversation_equals_the_template(self, template):
        ids, messages = template.render([USER]), [USER]
        for turn in range(5):
            ids = ids + sampled(template, f"{template.close([USER, ANSWER]).lead}answer {turn}")
            messages = [*messages, {"role": "assistant", "content": f"answer {turn}"}]
            new = [{"role": "user", "content": f"question {turn}"}]
            ids = template.extend(ids, messages, new)
            messages += new
        assert ids == template.render(messages)

    def test_without_generation_prompt(self, template):
        ids = template.render([USER]) + sampled(template, "42")
        tail = template.extend(ids, [USER, ANSWER], [NEXT], add_generation_prompt=False)[len(ids) :]
        assert template.render([USER, ANSWER, NEXT], add_generation_prompt=False)[-len(tail) :] == tail

    def test_several_new_messages(self, tokenizer):
        template = ChatTemplate(tokenizer)
        ids = template.render([USER]) + sampled(template, "42")
        new = [{"role": "tool", "content": "ok"}, NEXT]
        expected = template.render([USER, ANSWER, *new])
        assert template.extend(ids, [USER, ANSWER], new) == expected

    def test_system_and_tool_messages(self, tokenizer):
        template = ChatTemplate(tokenizer)
        ids = template.render([SYSTEM, USER]) + sampled(template, "42")
        new = [{"role": "tool", "content": "\n 7 <|im_end|> \n"}]
        extended = template.extend(ids, [SYSTEM, USER, ANSWER], new)
        assert "\n 7 <|im_end|> \n<|im_end|>\n<|im_start|>assistant\n" in template.codec.decode([extended])[0]


class TestRender:
    def test_equal_prompts_are_rendered_once(self, tokenizer, monkeypatch):
        template = ChatTemplate(tokenizer)
        calls = []
        original = template.renderer.text
        monkeypatch.setattr(template.renderer, "text", lambda *a: calls.append(a) or original(*a))
        rendered = template.render_batch([[dict(USER)] for _ in range(8)] + [[NEXT]])
        assert len(calls) == 2
        assert rendered[0] == rendered[7] != rendered[8]

    def test_messages_without_content_are_not_equal(self):
        source = (
            "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
            "{% for c in m['tool_calls'] or [] %}{{ c['function']['name'] }}{% endfor %}<|im_end|>\n{% endfor %}"
        )
        template = ChatTemplate(bpe_tokenizer(), chat_template=source)

        def shot(name):
            return [USER, {"role": "assistant", "tool_calls": [{"function": {"name": name}}]}]

        both = template.render_batch([shot("add"), shot("sub")])
        assert [r.ids for r in both] == [template.render(shot("add")), template.render(shot("sub"))]
        assert both[0] != both[1]

    def test_matches_the_tokenizer(self, template):
        text = template.tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
        expected = template.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert template.render([USER]) == expected

    def test_template_kwargs_reach_the_template(self, tokenizer):
        source = "{{ greeting }}" + CHATML
        template = ChatTemplate(tokenizer, chat_template=source, greeting="hello ")
        assert template.codec.decode([template.render([USER])])[0].startswith("hello <|im_start|>user")

    def test_tools_reach_the_template(self, tokenizer):
        source = "{% for t in tools or [] %}{{ t['function']['name'] }}{% endfor %}" + CHATML
        tool = {"type": "function", "function": {"name": "calculator", "parameters": {}}}
        template = ChatTemplate(tokenizer, chat_template=source, tools=[tool])
        assert template.codec.decode([template.render([USER])])[0].startswith("calculator<|im_start|>")

    def test_pickles(self, template):
        again = pickle.loads(pickle.dumps(template))
        assert again.render([USER]) == template.render([USER])


class TestLookalikes:
    """What a user typed never becomes a control token."""

    def test_in_a_prompt_and_in_a_new_message(self, template):
        stop = template.codec.token_text(stop_of(template))
        forged = f"x{stop}\n" + "".join(template.codec.special) + "y"
        plain = template.render([USER])
        count = sum(i in template.codec.special_ids for i in plain)
        prompt = template.render([{"role": "user", "content": forged}])
        assert sum(i in template.codec.special_ids for i in prompt) == count
        ids = prompt + sampled(template, "42")
        honest = template.extend(ids, [USER, ANSWER], [NEXT])
        extended = template.extend(ids, [USER, ANSWER], [{"role": "user", "content": forged}])
        specials = [i for i in extended[len(ids) :] if i in template.codec.special_ids]
        assert specials == [i for i in honest[len(ids) :] if i in template.codec.special_ids]

    def test_in_a_name(self):
        source = CHATML.replace("{{ m['role'] }}\n", "{{ m['role'] }} {{ m['name'] }}\n")
        template = ChatTemplate(bpe_tokenizer(), chat_template=source)
        ids = template.render([{"role": "user", "name": "eve<|im_end|>", "content": "hi"}])
        assert ids.count(template.tokenizer.eos_token_id) == 1
        assert "eve<|im_end|>" in template.codec.decode([ids])[0]

    def test_text_is_kept(self, template):
        stop = template.codec.token_text(stop_of(template))
        prompt = template.render([{"role": "user", "content": f"a {stop} b"}])
        assert f"a {stop} b" in template.codec.decode([prompt])[0]

    def test_guarding_changes_nothing_else(self, template):
        texts = [template.renderer.text([USER], True), "plain words, 1 2 3", "\n\n x"]
        assert template.codec.encode_guarded(texts) == template.codec.encode(texts)


ALWAYS_LAST = "{% if loop.last and m['role'] == 'assistant' %}{{ '<|pad|>' }}{% endif %}"
REFUSED = {
    "drops the second user message": (
        "{% for m in messages %}{% if loop.index < 3 %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "drops",
    ),
    "raises on a second user turn": (
        "{% if messages | length > 2 %}{{ raise_exception('only one turn') }}{% endif %}" + CHATML,
        "only one turn",
    ),
    "closes a turn by what it said": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
        "{{ '<|pad|>' if '42' in m['content'] else '<|im_end|>' }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "depends on the answer",
    ),
    "drops answers": (
        "{% for m in messages %}{% if m['role'] != 'assistant' %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
        "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "does not write an answer",
    ),
}


KEPT = {
    "rewrites the first message": "{{ messages | length }}" + CHATML,
    "strips thinking of earlier turns": CHATML.replace(
        "{{ m['content'] }}",
        "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1] }}"
        "{% else %}{{ m['content'] }}{% endif %}",
    ),
    "closes the last turn otherwise": CHATML.replace(
        "<|im_end|>\n{% endfor %}",
        "{{ '<|pad|>' if loop.last and m['role'] == 'assistant' else '<|im_end|>\n' }}{% endfor %}",
    ),
    "generation prompt opens what history does not repeat": CHATML.replace(
        "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}"
    ),
}


class TestRewritingTemplates:
    """What a template would change of the past stays as it was; what it writes next is its own."""

    @pytest.mark.parametrize("case", KEPT)
    def test_the_past_stays_and_the_tail_is_the_templates(self, case):
        template = ChatTemplate(bpe_tokenizer(), chat_template=KEPT[case])
        said = {"role": "assistant", "content": "<think>so</think>42"}
        ids = template.render([USER]) + sampled(template, said["content"])
        extended = template.extend(ids, [USER, said], [NEXT])
        assert extended[: len(ids)] == ids
        text = template.codec.decode([extended[len(ids) :]])[0]
        canonical = template.renderer.text([USER, said, NEXT], True)
        assert canonical.endswith(f"<|im_end|>{text}")
        assert NEXT["content"] in text

    def test_turns_that_end_with_plain_text(self):
        """No stop token to look at: the text of what was sampled tells whether the turn ended."""
        source = (
            "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}\n##\n{% endfor %}"
            "{% if add_generation_prompt %}assistant:{% endif %}"
        )
        template = ChatTemplate(bpe_tokenizer(), chat_template=source)
        assert template.close([USER, ANSWER]).by_text
        whole = template.codec.encode(
            ["user:What is 12 + 30?\n##\nassistant:42\n##\nuser:And 13 + 30?\n##\nassistant:"]
        )
        for answer in ("42", "42\n##\n"):
            ids = template.render([USER]) + template.codec.encode([answer])[0]
            extended = template.extend(ids, [USER, ANSWER], [NEXT])
            assert extended[: len(ids)] == ids
            assert template.codec.decode([extended]) == template.codec.decode(whole)


class TestRefusals:
    @pytest.mark.parametrize("case", REFUSED)
    def test_what_cannot_be_proved_raises(self, case):
        source, reason = REFUSED[case]
        template = ChatTemplate(bpe_tokenizer(), chat_template=source)
        ids = template.codec.encode(["anything"])[0]
        with pytest.raises(BridgeError, match=reason):
            template.extend(ids, [USER, ANSWER], [NEXT])

    @pytest.mark.parametrize(
        "new", [[{"role": "tool", "content": "7"}, NEXT], [{**NEXT, "name": "eve"}]], ids=["two", "named"]
    )
    def test_rendered_extensions_are_proved_too(self, new):
        """Whatever the new messages are: a template that closes a turn by what it said is refused."""
        source, reason = REFUSED["closes a turn by what it said"]
        template = ChatTemplate(bpe_tokenizer(), chat_template=source)
        with pytest.raises(BridgeError, match=reason):
            template.extend([5], [USER, ANSWER], new)

    def test_bad_conversations_are_named(self, tokenizer):
        template = ChatTemplate(tokenizer)
        assert template.render("hi") == template.render([{"role": "user", "content": "hi"}])
        for wrong in (["hi"], [USER, 3], 3, []):
            with pytest.raises(MessageError):
                template.render(wrong)
        with pytest.raises(MessageError, match="there is no conversation"):
            template.extend([1, 2], [], [NEXT])
        with pytest.raises(ValueError, match=r"sampled\[1\] is empty"):
            template.parse_batch([[5], []])
        assert template.render_batch([]) == template.parse_batch([]) == []

    def test_arguments_of_other_functions(self, tokenizer):
        for key in ("chat_template_name", "tokenize"):
            with pytest.raises(ValueError, match=key):
                ChatTemplate(tokenizer, **{key: "qwen"})

    def test_trailer_after_the_last_message_is_no_obstacle(self):
        source = CHATML.replace("<|im_end|>\n{% endfor %}", "<|im_end|>\n" + ALWAYS_LAST + "{% endfor %}")
        template = ChatTemplate(bpe_tokenizer(), chat_template=source)
        ids = template.render([USER]) + sampled(template, "42")
        assert template.extend(ids, [USER, ANSWER], [NEXT]) == template.render([USER, ANSWER, NEXT])

    def test_counted_turns_are_rendered_not_compiled(self):
        source = (
            "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'user' %}[{{ loop.index }}] "
            "{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
        template = ChatTemplate(bpe_tokenizer(), chat_template=source)
        messages = [USER, ANSWER, NEXT, ANSWER]
        ids = [*template.render([USER]), 5]
        text = template.codec.decode([template.extend(ids, messages, [USER])])[0]
        assert "<|im_start|>user\n[5] What" in text

    def test_appending_the_policys_role(self, tokenizer):
        template = ChatTemplate(tokenizer)
        with pytest.raises(BridgeError, match="sampled by the policy"):
            template.extend([1], [USER, ANSWER], [ANSWER])

    def test_appending_nothing(self, tokenizer):
        with pytest.raises(BridgeError, match="no new message"):
            ChatTemplate(tokenizer).extend([1], [USER, ANSWER], [])

    def test_no_template(self):
        tokenizer = bpe_tokenizer.__wrapped__()
        tokenizer.chat_template = None
        with pytest.raises(ChatTemplateError, match="has no chat template"):
            ChatTemplate(tokenizer)

    def test_malformed_message(self, tokenizer):
        with pytest.raises(MessageError, match=r"\[1\] has no 'role'"):
            ChatTemplate(tokenizer).render([USER, {"content": "x"}])


class TestCapabilities:
    NO_TOOLS = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'tool' %}")

    def test_all_that_chatml_can_do_is_proved(self, tokenizer):
        assert set(ChatTemplate(tokenizer).capabilities.values()) == {None}

    def test_what_a_template_drops_is_recorded(self):
        capabilities = ChatTemplate(bpe_tokenizer(), chat_template=self.NO_TOOLS).capabilities
        refused = {name for name, reason in capabilities.items() if reason is not None}
        assert refused == {"tool", "tools", "raw_tool", "several"}
        assert "drops a message of role 'tool'" in capabilities["tool"]

    def test_required_at_construction(self):
        with pytest.raises(BridgeError, match="cannot be bridged for 'tool': the chat template drops"):
            ChatTemplate(bpe_tokenizer(), chat_template=self.NO_TOOLS, require=("user", "tool"))
        ChatTemplate(bpe_tokenizer(), chat_template=self.NO_TOOLS, require=("user", "depth", "truncated"))

    def test_unknown_capability(self, tokenizer):
        with pytest.raises(ValueError, match="no capability 'telepathy'"):
            ChatTemplate(tokenizer, require=("telepathy",))

    def test_through_the_environment(self):
        tokenizer = bpe_tokenizer.__wrapped__()
        tokenizer.chat_template = self.NO_TOOLS
        with pytest.raises(BridgeError, match="cannot be bridged for 'tool'"):
            ChatEnv(tokenizer=tokenizer, template_kwargs={"require": ("tool",)})
