"""The gateway: any agent, in the dialect that it speaks, becomes token-exact episodes.

An agent is given a base URL and a key, and asks a model as it always does. Behind the address is a session: a tree of what the agent
really saw and what the policy really sampled, in token ids. See ``docs/agent/index.md``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchrl_chat._lazy import lazy

if TYPE_CHECKING:
    from torchrl_chat.gateway.agents import play_agents
    from torchrl_chat.gateway.calls import Call, Dialect, Refusal, Reply
    from torchrl_chat.gateway.commands import SandboxedCommand
    from torchrl_chat.gateway.engines import Ask, Engine, RemoteEngine, ScriptedEngine
    from torchrl_chat.gateway.environment import AgentEnv
    from torchrl_chat.gateway.finished import episodes
    from torchrl_chat.gateway.policies import PolicyEngine
    from torchrl_chat.gateway.rewarding import Rewarder
    from torchrl_chat.gateway.serve import Gateway, Served
    from torchrl_chat.gateway.sessions import Session
    from torchrl_chat.gateway.settings import Settings
    from torchrl_chat.gateway.traces import Finding, Recorded, read_trace, training_trace

_HOMES = {
    "agents": "play_agents",
    "calls": "Call Dialect Refusal Reply",
    "commands": "SandboxedCommand",
    "engines": "Ask Engine RemoteEngine ScriptedEngine",
    "environment": "AgentEnv",
    "finished": "episodes",
    "policies": "PolicyEngine",
    "rewarding": "Rewarder",
    "serve": "Gateway Served",
    "sessions": "Session",
    "settings": "Settings",
    "traces": "Finding Recorded read_trace training_trace",
}

__all__ = [
    "AgentEnv",
    "Ask",
    "Call",
    "Dialect",
    "Engine",
    "Finding",
    "Gateway",
    "PolicyEngine",
    "Recorded",
    "Refusal",
    "RemoteEngine",
    "Reply",
    "Rewarder",
    "SandboxedCommand",
    "ScriptedEngine",
    "Served",
    "Session",
    "Settings",
    "episodes",
    "play_agents",
    "read_trace",
    "training_trace",
]

__getattr__, __dir__ = lazy(__name__, {name: home for home, names in _HOMES.items() for name in names.split()})
