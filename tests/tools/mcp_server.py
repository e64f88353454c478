"""A real MCP server, on the SDK's own server: over stdio, or over HTTP on a free port, which is printed."""

from __future__ import annotations

import os
import socket
import sys
from typing import Annotated

import uvicorn
from mcp.server.mcpserver import MCPServer
from pydantic import BaseModel, Field

server = MCPServer("numbers", log_level="CRITICAL")
calls = 0


class Sum(BaseModel):
    """A typed result."""

    total: int


@server.tool()
def add(a: int, b: Annotated[int, Field(ge=0)]) -> Sum:
    """Add two numbers."""
    return Sum(total=a + b)


@server.tool(name="count.calls")
def count() -> str:
    """How often this process was asked."""
    global calls
    calls += 1
    return f"{calls} {os.environ.get('SECRET')}"


@server.tool()
def say(text: str, times: int = 1) -> str:
    """Say a text so many times."""
    return text * times


@server.tool()
def fail() -> str:
    """Raises."""
    raise ValueError("broken\nin two lines")


@server.tool()
def die() -> str:
    """Ends the process."""
    print("the last words", file=sys.stderr, flush=True)
    os._exit(3)


if __name__ == "__main__":
    if sys.argv[1] == "stdio":
        server.run("stdio")
    else:
        listener = socket.create_server(("127.0.0.1", int(sys.argv[2])))
        print(listener.getsockname()[1], flush=True)
        app = server.streamable_http_app(json_response=sys.argv[1] == "json")
        uvicorn.Server(uvicorn.Config(app, log_level="critical")).run(sockets=[listener])
