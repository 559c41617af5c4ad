"""`langgraph` by `langchain.agents.create_agent`: ``langgraph_agent.py chat|responses|messages``. See ``openai_sdk.py``."""

import json
import os
import sys

from langchain.agents import create_agent
from langchain_anthropic import ChatAnthropic
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI


def add(a: int, b: int) -> str:
    """Add two numbers."""
    return str(a + b)


if sys.argv[1] == "messages":
    model = ChatAnthropic(model="policy", max_tokens=512)
else:
    model = ChatOpenAI(model="policy", use_responses_api=sys.argv[1] == "responses")
agent = create_agent(model, tools=[add], system_prompt="Be exact.")
answers, error, history = [], None, []
for number, task in enumerate(json.loads(os.environ["AGENT_TASKS"])):
    history = [*history, HumanMessage(task)]
    try:
        if number % 2:
            for mode, chunk in agent.stream({"messages": history}, stream_mode=["messages", "values"]):
                if mode == "values":
                    found = chunk
        else:
            found = agent.invoke({"messages": history})
    except Exception as failure:
        error = type(failure).__name__
        break
    history = found["messages"]
    answers.append(history[-1].text)
print(json.dumps({"answers": answers, "error": error}))
