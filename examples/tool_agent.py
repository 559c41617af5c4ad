"""An agent of nothing but the openai SDK, trained as it is: the model writes a program, the agent runs it, the model says what comes out.

    torchrl-chat train --dataset python-tool --agent examples/tool_agent.py:agent

Of the training it knows an address and a key. Who samples, with which settings, and what the answer is worth is not its affair; its own
tools and words are its own: a sandbox, in which programs of a model that is being trained can break nothing.
"""

from __future__ import annotations

import sys

from openai import OpenAI

from torchrl_chat.sandbox import Sandbox
from torchrl_chat.tools.python import fenced_code

BOX = Sandbox(deadline=2.0)
CLIENT = OpenAI(
    base_url="http://127.0.0.1", api_key="that of the session", max_retries=0
)  # one pool of connections
NOT_CLOSED = (
    "Error: the block of code is not closed, so nothing was run. A block ends with a line of ``` and nothing else."
)


def agent(row, session):
    """Ask, run the program of the answer, and ask once more with what it printed."""
    client = CLIENT.with_options(base_url=session.base_url, api_key=session.api_key)
    messages = [{"role": "user", "content": row["query"]}]
    for _ in range(2):
        answer = client.chat.completions.create(model="policy", messages=messages).choices[0].message
        blocks = fenced_code(answer.content or "")
        if not blocks:
            return  # it has answered
        if blocks[-1].closed:
            shown = BOX.run("\n\n".join(block.code for block in blocks)).text or "(no output)"
        else:
            shown = NOT_CLOSED
        messages += [answer, {"role": "tool", "tool_call_id": "program", "content": shown}]


if __name__ == "__main__":
    from torchrl_chat.cli.main import main

    sys.exit(main(["train", "--dataset", "python-tool", "--agent", f"{__file__}:agent", *sys.argv[1:]]))
