"""`openai-agents`: ``openai_agents_sdk.py chat|responses|named``; ``named`` goes on by ``previous_response_id``. See ``openai_sdk.py``."""

import asyncio
import json
import os
import sys

from agents import (
    Agent,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI

set_tracing_disabled(True)


@function_tool
def add(a: int, b: int) -> str:
    """Add two numbers."""
    return str(a + b)


async def main():
    kind = OpenAIChatCompletionsModel if sys.argv[1] == "chat" else OpenAIResponsesModel
    model = kind(model="policy", openai_client=AsyncOpenAI())
    agent = Agent(name="adder", instructions="Be exact.", model=model, tools=[add])
    answers, error, history, last = [], None, [], None
    for number, task in enumerate(json.loads(os.environ["AGENT_TASKS"])):
        history.append({"role": "user", "content": task})
        more = {"previous_response_id": last, "auto_previous_response_id": True} if sys.argv[1] == "named" else {}
        try:
            if number % 2:
                run = Runner.run_streamed(agent, history, **more)
                async for _ in run.stream_events():
                    pass
            else:
                run = await Runner.run(agent, history, **more)
        except Exception as failure:
            error = type(failure).__name__
            break
        answers.append(run.final_output)
        last = run.last_response_id
        history = [] if sys.argv[1] == "named" else run.to_input_list()
    print(json.dumps({"answers": answers, "error": error}))


asyncio.run(main())
