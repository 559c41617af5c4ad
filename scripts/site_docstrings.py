"""Docstrings as the site's API pages read them: roles of Sphinx become links, and every example is code."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|attr|exc|data):`(?:([^`<]+?) <([^`>]+)>|(~?)([^`]+))`")
LITERAL = re.compile(r"``([^`\n]+(?:\n[^`\n]+)?)``")


class Docstrings(griffe.Extension):
    """Rewrites each docstring once, when its object is read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = rewritten(obj.docstring.value)


def rewritten(text: str) -> str:
    """A docstring in the words of Google's style and of Markdown.

    Example:
        >>> rewritten("See :class:`~torchrl_chat.Verdict`, ``x``.")
        'See <autoref identifier="torchrl_chat.Verdict" optional>`Verdict`</autoref>, `x`.'
    """
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    text = re.sub(r"^Keyword Args:$", "Keyword Arguments:", text, flags=re.MULTILINE)
    return LITERAL.sub(r"`\1`", ROLE.sub(link, text))


def link(found: re.Match[str]) -> str:
    """A role as a link, where the site has its target, and as code otherwise."""
    title, named, short, target = found.groups()
    shown = title or (target.rpartition(".")[2] if short else target)
    return f'<autoref identifier="{named or target}" optional>`{shown}`</autoref>'
