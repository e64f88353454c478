"""Calling one tool as a runtime does."""

from __future__ import annotations

import json
from typing import Any

from ramet.agents.budget import Budget, Ledger
from ramet.agents.context import ContextStore
from ramet.agents.tools import BranchView, Tool, ToolRequest, call_tool
from ramet.agents.tree import ToolStatus

VIEW = BranchView("0", ContextStore({}), Ledger.for_root(Budget()))


async def call(tool: Tool, timeout: float = 60.0, **arguments: Any) -> tuple[ToolStatus, str]:
    """How a call ends, and what the branch is told."""
    request = ToolRequest("g", "0", 0, 0, tool.name, json.dumps(arguments))
    result, _ = await call_tool(tool, request, VIEW, timeout)
    return result.status, result.text
