"""`smolagents`, its `ToolCallingAgent`: ``smolagents_tools.py chat``. See ``openai_sdk.py``."""

import json
import os

from smolagents import OpenAIServerModel, ToolCallingAgent, tool


@tool
def add(a: int, b: int) -> str:
    """Add two numbers.

    Args:
        a: one.
        b: the other.
    """
    return str(a + b)


model = OpenAIServerModel("policy", api_base=os.environ["OPENAI_BASE_URL"], api_key=os.environ["OPENAI_API_KEY"])
agents = [
    ToolCallingAgent([add], model, stream_outputs=streamed, verbosity_level=-1, max_steps=4)
    for streamed in (False, True)
]
answers, error = [], None
for number, task in enumerate(json.loads(os.environ["AGENT_TASKS"])):
    agent = agents[number % 2]
    agent.memory = agents[0].memory
    try:
        answers.append(str(agent.run(task, reset=False)))
    except Exception as failure:
        error = type(failure).__name__
        break
print(json.dumps({"answers": answers, "error": error}))
