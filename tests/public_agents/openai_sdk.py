"""The plain `openai` SDK: ``openai_sdk.py chat|responses|named``; ``named`` goes on by ``previous_response_id``.

As every program of this folder: it runs one public agent, unmodified, at the address that the environment variables name, gives it the
tasks of ``AGENT_TASKS`` (a JSON list) one after the other in one conversation, every second one streamed, and prints its answers as
JSON: ``{"answers": [...], "error": NAME or null}``. The tool adds numbers.
"""

import json
import os
import sys

from openai import OpenAI

client = OpenAI()
PARAMETERS = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
    "required": ["a", "b"],
}
FUNCTION = {"name": "add", "description": "Add two numbers.", "parameters": PARAMETERS}


def add(arguments):
    values = json.loads(arguments)
    return str(values["a"] + values["b"])


def chat(history, task, stream):
    if not history:
        history.append({"role": "system", "content": "Be exact."})
    history.append({"role": "user", "content": task})
    asked = {"model": "policy", "tools": [{"type": "function", "function": FUNCTION}]}
    while True:
        if stream:
            with client.chat.completions.stream(messages=history, **asked) as events:
                for _ in events:
                    pass
                message = events.get_final_completion().choices[0].message
        else:
            message = client.chat.completions.create(messages=history, **asked).choices[0].message
        history.append(message)
        if not message.tool_calls:
            return message.content
        for call in message.tool_calls:
            told = add(call.function.arguments)
            history.append({"role": "tool", "tool_call_id": call.id, "content": told})


def responses(history, task, stream, named=False):
    history.append({"role": "user", "content": task})
    asked = {
        "model": "policy",
        "instructions": "Be exact.",
        "tools": [{"type": "function", **FUNCTION, "strict": False}],
    }
    while True:
        if named:
            asked["previous_response_id"] = LAST[0]
        if stream:
            with client.responses.stream(input=history, **asked) as events:
                for _ in events:
                    pass
                response = events.get_final_response()
        else:
            response = client.responses.create(input=history, **asked)
        LAST[0] = response.id
        if named:
            history.clear()
        else:
            history += response.output
        calls = [item for item in response.output if item.type == "function_call"]
        if not calls:
            return response.output_text
        for call in calls:
            history.append({"type": "function_call_output", "call_id": call.call_id, "output": add(call.arguments)})


LAST = [None]
answers, error, history = [], None, []
for number, task in enumerate(json.loads(os.environ["AGENT_TASKS"])):
    try:
        if sys.argv[1] == "chat":
            answers.append(chat(history, task, number % 2 == 1))
        else:
            answers.append(responses(history, task, number % 2 == 1, sys.argv[1] == "named"))
    except Exception as failure:
        error = type(failure).__name__
        break
print(json.dumps({"answers": answers, "error": error}))
