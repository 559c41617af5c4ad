"""What the code of a template may look for: a string is found wherever saying it makes a difference."""

from __future__ import annotations

import pytest

from torchrl_chat.templates.bridge import forms
from torchrl_chat.templates.literals import literals_of
from torchrl_chat.templates.rendering import _compiled

NEEDLE = "NEEDLE"
SAID = "{{ 'a' if %s else 'b' }}"
# Ways in which a template finds NEEDLE in what a message ``m`` says.
FINDS = [
    SAID % "'NEEDLE' in m.content",
    SAID % "m['content'] == 'NEEDLE'",
    SAID % "m.content in ['NEEDLE', 'x']",
    SAID % "m.content not in ('x', 'NEEDLE')",
    SAID % "m.get('content') is eq 'NEEDLE'",
    SAID % "m.content is in ['NEEDLE']",
    SAID % "m.content.startswith('NEEDLE')",
    SAID % "'NEEDLE'.startswith(m.content)",
    SAID % "m.content | replace('NEEDLE', '') != m.content",
    SAID % "'NEEDLE' | replace(m.content, '') == ''",
    SAID % "m.content.split('NEEDLE') | length > 1",
    SAID % "m.content.strip('NEEDLE') | length == 0",
    SAID % "m.content | trim('NEEDLE') == ''",
    SAID % "{'NEEDLE': 1}[m.content] is defined",
    SAID % "{'NEEDLE': 1}.get(m.content)",
    SAID % "([m] | selectattr('content', 'equalto', 'NEEDLE') | list)",
    SAID % "([m.content] | select('equalto', 'NEEDLE') | list)",
    SAID % "([m.content] | reject('in', ['NEEDLE']) | list | length == 0)",
    SAID % "('x' if m.role == 'tool' else 'NEEDLE') in m.content",
    SAID % "(m.content | lower) == ('NEEDLE' | lower)",
    SAID % "('NEE' ~ 'DLE') in m.content or 'NEEDLE' in m.content",
    "{% set n = 'NEEDLE' %}" + SAID % "n in m.content",
    "{% set n = namespace(x='NEEDLE') %}" + SAID % "n.x in m.content",
    "{% set n = namespace(x='') %}{% set n.x = 'NEEDLE' %}" + SAID % "m.content == n.x",
    "{% set n = {'x': 'NEEDLE'} %}" + SAID % "n['x'] in m.content",
    "{% set n = ['NEEDLE'] %}" + SAID % "m.content in n",
    "{% set n %}{{ 'NEEDLE' }}{% endset %}" + SAID % "n in m.content",
    "{% for n in ['x', 'NEEDLE'] %}" + SAID % "n in m.content" + "{% endfor %}",
    "{% for k, n in {'x': 'NEEDLE'}.items() %}" + SAID % "n in m.content" + "{% endfor %}",
    "{% set role = m.content %}" + SAID % "role == 'NEEDLE'",
    "{% set n = {'role': m.content} %}" + SAID % "n.role == 'NEEDLE'",
    "{% set n = namespace(role='') %}{% set n.role = m.content %}" + SAID % "n.role == 'NEEDLE'",
    "{% macro f(text) %}" + SAID % "'NEEDLE' in text" + "{% endmacro %}{{ f(m.content) }}",
    "{% macro f(text, n) %}" + SAID % "n in text" + "{% endmacro %}{{ f(m.content, n='NEEDLE') }}",
    "{% macro f(text, n='NEEDLE') %}" + SAID % "n in text" + "{% endmacro %}{{ f(m.content) }}",
    "{% macro f() %}{{ 'NEEDLE' }}{% endmacro %}" + SAID % "f() in m.content",
    "{% macro f() %}{{ messages[0].content }}{% endmacro %}" + SAID % "'NEEDLE' in f()",
    "{% for x in messages %}" + SAID % "(loop.previtem or m).content == 'NEEDLE'" + "{% endfor %}",
    "{% with n = 'NEEDLE' %}" + SAID % "n in m.content" + "{% endwith %}",
    "{% filter replace('NEEDLE', '') %}{{ m.content }}{% endfilter %}",
]
# Ways in which it stands in a template that does not.
WRITES = [
    "NEEDLE",
    "{{ 'NEEDLE' }}",
    "{{ 'NEEDLE' + m.content }}",
    "{{ m.content ~ 'NEEDLE' }}",
    "{{ m.content or 'NEEDLE' }}",
    "{{ m.content | default('NEEDLE') }}",
    "{{ '%sNEEDLE' | format(m.content) }}",
    "{{ [m.content, m.role] | join('NEEDLE') }}",
    "{{ (m.content + 'NEEDLE').strip() }}",
    "{{ 'a' if m.role == 'NEEDLE' else 'b' }}",
    "{{ 'a' if 'NEEDLE' == m['role'] else 'b' }}",
    "{{ 'a' if m.get('role') in ['x', 'NEEDLE'] else 'b' }}",
    "{{ [m] | selectattr('role', 'equalto', 'NEEDLE') | list | length }}",
    "{{ 'a' if strange is defined and strange == 'NEEDLE' else 'b' }}",
    "{% if m.role == 'x' %}{{ raise_exception('NEEDLE') }}{% endif %}{{ m.content }}",
    "{% set n = 'NEEDLE' %}{{ n + m.content }}",
    "{% macro f(tag, text) %}{{ tag + text }}{% endmacro %}{{ f('NEEDLE', m.content) }}",
    "{% set n = [{'role': 'NEEDLE', 'content': 'x'}] + messages %}{{ 'a' if n[0].role == 'user' else m.content }}",
    "{{ m.content if m.NEEDLE is not defined else m['NEEDLE'] }}",
]


def rendered(source: str, content: str) -> str:
    said = {"role": "user", "content": content}
    return _compiled(source).render(messages=[said, {"role": "user", "content": "more"}])


def changes(source: str) -> bool:
    """Whether some text with NEEDLE in it is written otherwise than a text without."""
    usual = rendered(source, "Qz7zQ")
    return any(rendered(source, form) != usual.replace("Qz7zQ", form) for form in forms(NEEDLE))


def templates(body: str) -> list[str]:
    """The body for every message, and for the first one alone."""
    return ["{% for m in messages %}" + body + "{% endfor %}", "{% set m = messages[0] %}" + body]


@pytest.mark.parametrize(("body", "looks"), [*((b, True) for b in FINDS), *((b, False) for b in WRITES)])
def test_a_string_is_found_where_saying_it_makes_a_difference(body, looks):
    for source in templates(body):
        assert changes(source) == looks
        assert (NEEDLE in literals_of(_compiled(source).environment.parse(source))) == looks
