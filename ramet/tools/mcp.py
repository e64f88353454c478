"""Tools of a server that speaks the Model Context Protocol, as a child process or over HTTP.

    async with mcp_tools("uvx some-server") as tools:
        runtime = Runtime(policy, chat, tools=[read, *tools])

The server is somebody else's. Whatever it does (dies, hangs, floods, lies) becomes the typed result of the calls that it concerns:
its connection lives in tasks of its own, and no failure of it, nor the time that ending it takes, reaches whoever calls. The calls
that are in flight when it is lost fail; the next call connects again. What tools there are is asked once, at the start.
"""

from __future__ import annotations

import json
import logging
import math
import re
import shlex
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any

import anyio
import mcp_types as types
from anyio.abc import TaskGroup
from mcp import Client, MCPError

from ramet.agents.protocol import elide
from ramet.agents.tasks import first_error, task_group
from ramet.agents.tools import Tool
from ramet.agents.tree import ToolResult, ToolStatus
from ramet.errors import ConfigError, ToolServerError, first_line
from ramet.tools.transports import Streams, over_http, over_pipes

# What it finds wrong is in the result of the call.
logging.getLogger("mcp").addHandler(logging.NullHandler())

START_SECONDS = 60.0
"""How long a server has to start and to list its tools."""
END_SECONDS = 10.0
MAX_TOOLS, MAX_DESCRIPTION, MAX_SCHEMA = 256, 4000, 20_000
"""Tools of one server, and characters of what each puts into every prompt: a longer description is cut, a longer schema refused."""


@asynccontextmanager
async def mcp_tools(
    server: str,
    *,
    prefix: str = "",
    environment: Mapping[str, str] | None = None,
    headers: Mapping[str, str] | None = None,
    cost: int = 1,
    timeout: float = 60.0,
    max_characters: int = 100_000,
    parallel: bool = True,
) -> AsyncIterator[list[Tool]]:
    """The tools of an MCP server, for as long as the block lasts.

    server       a URL (http://, https://), or a command with its arguments, which is started and ended with the block
    prefix       goes before each tool's name, for servers whose tools have the same names
    environment  variables for a command, which otherwise sees PATH, HOME and the like and none of your keys
    headers      for a URL, such as an authorization

    `cost`, `timeout`, `max_characters` and `parallel` are those of each `Tool`. Raises `ConfigError`, in one line, where the server
    does not start, does not speak MCP, or has a tool that cannot be one.
    """
    options = {"cost": cost, "timeout": timeout, "max_characters": max_characters, "parallel": parallel}
    transport = _transport(server, environment or {}, headers or {})
    async with task_group() as group:
        host = _Host(group, transport)
        try:
            connection = await host.connect()
            if connection.lost:
                raise ConfigError(f"MCP server {_shown(server)!r} {connection.lost}")
            yield _tools(host, connection.listed, prefix, options)
        finally:
            host.close()
            group.cancel_scope.deadline = anyio.current_time() + END_SECONDS


def _transport(
    server: str, environment: Mapping[str, str], headers: Mapping[str, str]
) -> Callable[[], AbstractAsyncContextManager[Streams]]:
    if re.match(r"https?://", server):
        if environment:
            raise ConfigError(f"MCP server {_shown(server)!r} is a URL, which takes headers and no environment")
        return partial(over_http, server, headers)
    if headers:
        raise ConfigError(f"MCP server {_shown(server)!r} is a command, which takes an environment and no headers")
    try:
        command = shlex.split(server)
    except ValueError as error:
        raise ConfigError(f"MCP server {_shown(server)!r} is no command: {error}") from None
    if not command:
        raise ConfigError("an MCP server is a command or a URL; this one is empty")
    return partial(over_pipes, command, environment)


def _shown(server: str) -> str:
    """A server in a message: without what may be secret in a URL."""
    return re.sub(r"//[^/@]*@", "//", server.partition("?")[0] if "://" in server else server)[:100]


class _Connection:
    """One connection to a server.

    ready    it is open, with a `client` and the tools `listed`, or `lost`
    closing  set to end it
    ended    nothing of it is left
    lost     why it could not be made or has ended; empty while it is open
    """

    def __init__(self) -> None:
        self.ready, self.closing, self.ended = anyio.Event(), anyio.Event(), anyio.Event()
        self.client: Client | None = None
        self.listed: list[types.Tool] = []
        self.lost = ""


class _Host:
    """Keeps a connection to a server in the tasks of `group`, and makes calls over it."""

    def __init__(self, group: TaskGroup, transport: Callable[[], AbstractAsyncContextManager[Streams]]):
        self._group, self._transport = group, transport
        self._connection: _Connection | None = None
        self._closed = False

    def close(self) -> None:
        """Take no more calls, and end the connection."""
        self._closed = True
        if self._connection is not None:
            self._connection.closing.set()

    async def connect(self) -> _Connection:
        """The connection that there is, or a new one; open or lost."""
        if self._connection is None:
            self._connection = _Connection()
            self._group.start_soon(self._keep, self._connection)
        connection = self._connection
        await connection.ready.wait()
        return connection

    async def _keep(self, connection: _Connection) -> None:
        lost = "was closed"
        try:
            with anyio.CancelScope(deadline=anyio.current_time() + START_SECONDS) as scope:
                async with Client(self._transport()) as client:
                    # Its schemas are anybody's, and checking what it returns against them may take for ever.
                    client.session.validate_tool_result = _unchecked  # type: ignore[method-assign]
                    connection.listed = await _listed(client)
                    connection.client = client
                    scope.deadline = math.inf
                    connection.ready.set()
                    await connection.closing.wait()
            if scope.cancelled_caught:
                lost = f"did not answer within {START_SECONDS:g} seconds"
        except Exception as error:
            lost = _why(first_error(error))
        finally:
            connection.lost = lost
            if self._connection is connection:
                self._connection = None
            connection.ready.set()
            connection.ended.set()

    async def call(self, name: str, arguments: Mapping[str, Any], /) -> ToolResult:
        """Call a tool of the server."""
        if self._closed:
            raise ToolServerError("the MCP server was closed; call its tools within the block of mcp_tools(...)")
        connection = await self.connect()
        results: list[ToolResult] = []
        scope, done = anyio.CancelScope(), anyio.Event()

        async def make() -> None:
            with scope:
                try:
                    results.append(await self._answer(connection, name, arguments))
                finally:
                    done.set()

        self._group.start_soon(make)
        try:
            await done.wait()
        finally:
            scope.cancel()
        return results[0] if results else ToolResult(ToolStatus.FAILED, "the MCP server was closed")

    async def _answer(self, connection: _Connection, name: str, arguments: Mapping[str, Any]) -> ToolResult:
        if connection.client is None or connection.lost:
            return ToolResult(ToolStatus.FAILED, f"the MCP server {connection.lost}")
        try:
            return _result(await connection.client.call_tool(name, dict(arguments)))
        except MCPError as error:
            why = f"the MCP server refused the call: {error.message}"
            if (error.code, error.message) == (types.CONNECTION_CLOSED, "Connection closed"):
                with anyio.move_on_after(END_SECONDS):
                    await connection.ended.wait()
                why = f"the MCP server {connection.lost or 'closed the connection'}"
            elif error.message == "Session terminated":  # such as by a server that was started again
                connection.closing.set()
            return ToolResult(ToolStatus.FAILED, why)
        except Exception as error:
            return ToolResult(ToolStatus.FAILED, f"what the MCP server sent cannot be read: {first_line(error)}")


async def _unchecked(name: str, result: types.CallToolResult) -> None:
    """Takes what a tool returns as it is."""


async def _listed(client: Client) -> list[types.Tool]:
    listed: list[types.Tool] = []
    cursor: str | None = None
    while True:
        page = await client.list_tools(cursor=cursor)
        listed += page.tools
        if len(listed) > MAX_TOOLS:
            raise ToolServerError(f"has more than {MAX_TOOLS} tools")
        if (cursor := page.next_cursor) is None:
            return listed


def _why(error: BaseException) -> str:
    """What has ended a connection, to follow "the MCP server"."""
    if isinstance(error, ToolServerError):
        return str(error)
    if isinstance(error, MCPError):
        return f"does not answer as one: {first_line(error)}"
    return f"cannot be reached: {type(error).__name__}: {first_line(error)}"


def _tools(host: _Host, listed: list[types.Tool], prefix: str, options: Mapping[str, Any]) -> list[Tool]:
    made: dict[str, Tool] = {}
    for each in listed:
        name = _name(prefix + each.name, made)
        size = len(json.dumps(each.input_schema))
        if size > MAX_SCHEMA:
            raise ConfigError(f"tool {name}: its schema has {size} characters; at most {MAX_SCHEMA} are shown to a model")
        description = elide(each.description or each.title or each.name, MAX_DESCRIPTION)
        made[name] = Tool(name, description, each.input_schema, partial(_call, host, each.name), **options)
    return list(made.values())


async def _call(host: _Host, name: str, /, **arguments: Any) -> ToolResult:
    return await host.call(name, arguments)


def _name(name: str, taken: Mapping[str, Tool]) -> str:
    """A name that a tool may have, and none has."""
    name = re.sub(r"[^A-Za-z0-9_-]", "_", name if re.match(r"[A-Za-z_]", name) else f"_{name}")[:60]
    numbered = (f"{name}_{number}" for number in range(2, MAX_TOOLS + 2))
    return name if name not in taken else next(each for each in numbered if each not in taken)


def _result(answer: types.CallToolResult) -> ToolResult:
    text = "\n".join(_text(block) for block in answer.content)
    if not text and answer.structured_content is not None:
        text = json.dumps(answer.structured_content, ensure_ascii=False)
    return ToolResult(ToolStatus.FAILED if answer.is_error else ToolStatus.DONE, text)


def _text(block: types.ContentBlock) -> str:
    if isinstance(block, types.TextContent):
        return block.text
    if isinstance(block, types.EmbeddedResource) and isinstance(block.resource, types.TextResourceContents):
        return block.resource.text
    if isinstance(block, types.ResourceLink):
        return f"({block.name}: {block.uri})"
    return f"({block.type}, which is not shown)"
