"""A small MCP server for the tests: stateless tools, a memory for each session, tools that fail, hang and kill it.

Run as ``mcp_server.py stdio`` or ``mcp_server.py http PORT``.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import sys
import time

from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import ImageContent, TextContent

server = MCPServer("tests")
by_header: dict[str, list[str]] = {}


def memory(context: Context) -> list[str]:
    request = context.request_context.request
    key = request.headers.get("mcp-session-id", "") if request is not None else "stdio"
    return by_header.setdefault(key, [])


@server.tool()
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@server.tool()
def fail(reason: str) -> str:
    """Always fails."""
    raise ToolError(reason)


@server.tool()
async def hang(seconds: float = 60.0) -> str:
    """Takes its time."""
    await asyncio.sleep(seconds)
    return "awake"


@server.tool()
async def remember(note: str, context: Context) -> str:
    """Note something down, and say what was noted so far."""
    kept = memory(context)
    kept.append(note)
    await asyncio.sleep(0.01)
    return ",".join(kept)


@server.tool()
def die() -> str:
    """End the server's process."""
    os._exit(3)


@server.tool(structured_output=False)
def picture() -> list:
    """A text and a picture."""
    return [TextContent(text="a dot:"), ImageContent(data="AAAA", mime_type="image/png"), TextContent(text="done")]


@server.tool()
def whoami() -> str:
    """The process id, and what was given in the environment."""
    return f"{os.getpid()} {os.environ.get('GREETING', '')}"


if __name__ == "__main__":
    if sys.argv[1] == "stdio":
        if "broken" in sys.argv:
            sys.exit("no such database")
        if "slow" in sys.argv:
            atexit.register(time.sleep, 2.0)
        server.run("stdio")
    else:
        server.run(
            "streamable-http", host="127.0.0.1", port=int(sys.argv[2]), stateless_http="stateless" in sys.argv
        )
