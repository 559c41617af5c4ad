"""`pydantic-ai`: ``pydantic_ai_agent.py chat|responses|messages``. See ``openai_sdk.py``."""

import asyncio
import json
import os
import sys

from pydantic_ai import Agent
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel

KINDS = {"chat": OpenAIChatModel, "responses": OpenAIResponsesModel, "messages": AnthropicModel}


async def main():
    agent = Agent(KINDS[sys.argv[1]]("policy"), system_prompt="Be exact.")

    @agent.tool_plain
    def add(a: int, b: int) -> str:
        """Add two numbers."""
        return str(a + b)

    async def streamed(context, events):
        async for _ in events:
            pass

    answers, error, history = [], None, []
    for number, task in enumerate(json.loads(os.environ["AGENT_TASKS"])):
        handler = streamed if number % 2 else None
        try:
            run = await agent.run(task, message_history=history, event_stream_handler=handler)
        except Exception as failure:
            error = type(failure).__name__
            break
        answers.append(run.output)
        history = run.all_messages()
    print(json.dumps({"answers": answers, "error": error}))


asyncio.run(main())
