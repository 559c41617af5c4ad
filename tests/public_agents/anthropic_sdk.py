"""The plain `anthropic` SDK: ``anthropic_sdk.py messages|runner``; ``runner`` is its `tool_runner`. See ``openai_sdk.py``."""

import json
import os
import sys

from anthropic import Anthropic, beta_tool

client = Anthropic()
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
    "required": ["a", "b"],
}
TOOL = {"name": "add", "description": "Add two numbers.", "input_schema": SCHEMA}
ASKED = {"model": "policy", "max_tokens": 512, "system": "Be exact."}


def messages(history, task, stream):
    history.append({"role": "user", "content": task})
    while True:
        if stream:
            with client.messages.stream(messages=history, tools=[TOOL], **ASKED) as events:
                for _ in events:
                    pass
                message = events.get_final_message()
        else:
            message = client.messages.create(messages=history, tools=[TOOL], **ASKED)
        history.append({"role": "assistant", "content": message.content})
        calls = [block for block in message.content if block.type == "tool_use"]
        if not calls:
            return "".join(block.text for block in message.content if block.type == "text")
        results = [
            {"type": "tool_result", "tool_use_id": call.id, "content": str(call.input["a"] + call.input["b"])}
            for call in calls
        ]
        history.append({"role": "user", "content": results})


@beta_tool
def add(a: int, b: int) -> str:
    """Add two numbers."""
    return str(a + b)


def runner(history, task, stream):
    history.append({"role": "user", "content": task})
    running = client.beta.messages.tool_runner(messages=list(history), tools=[add], stream=stream, **ASKED)
    last = None
    for step in running:
        last = step.get_final_message() if stream else step
        history.append({"role": "assistant", "content": last.content})
        if (results := running.generate_tool_call_response()) is not None:
            history.append(results)
    return "".join(block.text for block in last.content if block.type == "text")


answers, error, history = [], None, []
for number, task in enumerate(json.loads(os.environ["AGENT_TASKS"])):
    try:
        play = {"messages": messages, "runner": runner}[sys.argv[1]]
        answers.append(play(history, task, number % 2 == 1))
    except Exception as failure:
        error = type(failure).__name__
        break
print(json.dumps({"answers": answers, "error": error}))
