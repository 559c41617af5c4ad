"""`litellm`: ``litellm_loop.py chat|messages``. See ``openai_sdk.py``."""

import json
import os
import sys

import litellm

litellm.telemetry = False
MODEL = {"chat": "openai/policy", "messages": "anthropic/policy"}[sys.argv[1]]
PARAMETERS = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
    "required": ["a", "b"],
}
TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Add two numbers.", "parameters": PARAMETERS},
}


def play(history, task, stream):
    history.append({"role": "user", "content": task})
    while True:
        found = litellm.completion(model=MODEL, messages=history, tools=[TOOL], stream=stream)
        if stream:
            found = litellm.stream_chunk_builder(list(found), messages=history)
        message = found.choices[0].message
        history.append(message)
        if not message.tool_calls:
            return message.content
        for call in message.tool_calls:
            values = json.loads(call.function.arguments)
            told = str(values["a"] + values["b"])
            history.append({"role": "tool", "tool_call_id": call.id, "content": told})


answers, error, history = [], None, [{"role": "system", "content": "Be exact."}]
for number, task in enumerate(json.loads(os.environ["AGENT_TASKS"])):
    try:
        answers.append(play(history, task, number % 2 == 1))
    except Exception as failure:
        error = type(failure).__name__
        break
print(json.dumps({"answers": answers, "error": error}))
