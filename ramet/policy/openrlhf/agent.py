"""The agent that OpenRLHF's engines load by the path of this file."""

from ramet.policy.openrlhf.executor import TreeExecutor as AgentExecutor

__all__ = ["AgentExecutor"]
