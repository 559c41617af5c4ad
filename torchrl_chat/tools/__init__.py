"""Tools that a model may call: from plain Python functions and from MCP servers. Knows neither torch nor torchrl."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchrl_chat._lazy import lazy

if TYPE_CHECKING:
    from torchrl_chat.tools.arguments import ArgumentsError
    from torchrl_chat.tools.function import Tool, ToolBase, tool
    from torchrl_chat.tools.mcp import MCPTools
    from torchrl_chat.tools.python import PythonTool
    from torchrl_chat.tools.results import ToolError, ToolResult, ToolStatus, ToolTimeout
    from torchrl_chat.tools.toolbox import Toolbox

_HOMES = {
    "ArgumentsError": "arguments",
    "MCPTools": "mcp",
    "PythonTool": "python",
    "Tool": "function",
    "ToolBase": "function",
    "ToolError": "results",
    "ToolResult": "results",
    "ToolStatus": "results",
    "ToolTimeout": "results",
    "Toolbox": "toolbox",
    "tool": "function",
}

__all__ = [
    "ArgumentsError",
    "MCPTools",
    "PythonTool",
    "Tool",
    "ToolBase",
    "ToolError",
    "ToolResult",
    "ToolStatus",
    "ToolTimeout",
    "Toolbox",
    "tool",
]

__getattr__, __dir__ = lazy(__name__, _HOMES)
