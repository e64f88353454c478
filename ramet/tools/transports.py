"""How the messages of an MCP server travel: over the pipes of a child process, or over HTTP; of bounded length either way."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from subprocess import PIPE
from typing import NoReturn

import anyio
import anyio.abc
import httpx2
from anyio.streams.buffered import BufferedByteReceiveStream
from mcp.client.stdio import get_default_environment
from mcp.client.streamable_http import streamable_http_client
from mcp.shared._stream_protocols import ReadStream, WriteStream
from mcp.shared.message import SessionMessage
from mcp_types import jsonrpc_message_adapter

from ramet.agents.tasks import task_group
from ramet.errors import ToolServerError

MAX_MESSAGE = 16 * 2**20
"""Bytes of the longest message that is read from a server."""
GRACE_SECONDS = 2.0
"""How long a server has to end after its input is closed, and again after SIGTERM."""
_STDERR_BYTES = 4096

Streams = tuple[ReadStream[SessionMessage | Exception], WriteStream[SessionMessage]]


@asynccontextmanager
async def over_pipes(command: Sequence[str], environment: Mapping[str, str]) -> AsyncIterator[Streams]:
    """Start a server and talk to it, a message a line. Leaving ends the server and whatever it has started, in bounded time.

    A line that is no message is passed over: many a server prints to its output. Raises `ToolServerError` where the server cannot be
    started, ends by itself, or sends a line that is too long.
    """
    try:
        whole = get_default_environment() | dict(environment)
        process = await anyio.open_process(command, stdin=PIPE, stdout=PIPE, stderr=PIPE, env=whole, start_new_session=True)
    except (OSError, ValueError) as error:
        raise ToolServerError(f"cannot be started: {getattr(error, 'strerror', None) or error}") from error
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    output, errors = BufferedByteReceiveStream(process.stdout), process.stderr
    incoming, read = anyio.create_memory_object_stream[SessionMessage | Exception](0)
    # Not bounded, so that a server that reads nothing delays nobody: what waits here is bounded by the calls that are made.
    write, outgoing = anyio.create_memory_object_stream[SessionMessage](math.inf)
    said = bytearray()

    async def ended() -> NoReturn:
        with anyio.move_on_after(GRACE_SECONDS):
            await process.wait()
        status = "closed its output" if process.returncode is None else f"exited with status {process.returncode}"
        lines = said.decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        raise ToolServerError(status + (f": {last[:200]}" if last else ""))

    async def listen() -> None:
        while True:
            try:
                line = await output.receive_until(b"\n", MAX_MESSAGE)
            except anyio.DelimiterNotFound:
                raise ToolServerError(f"sent a message longer than {MAX_MESSAGE >> 20} MiB") from None
            except (anyio.IncompleteRead, anyio.BrokenResourceError, ConnectionError):
                await ended()
            with suppress(ValueError):
                await incoming.send(SessionMessage(jsonrpc_message_adapter.validate_json(line, by_name=False)))

    async def speak() -> None:
        assert process.stdin is not None
        async for message in outgoing:
            text = message.message.model_dump_json(by_alias=True, exclude_unset=True)
            try:
                await process.stdin.send(text.encode() + b"\n")
            except (anyio.BrokenResourceError, ConnectionError):
                await ended()

    async def complain() -> None:
        with suppress(anyio.BrokenResourceError, ConnectionError):
            async for chunk in errors:
                said.extend(chunk)
                del said[:-_STDERR_BYTES]

    try:
        async with task_group() as group:
            for task in (listen, speak, complain):
                group.start_soon(task)
            yield read, write
            group.cancel_scope.cancel()
    finally:
        with anyio.CancelScope(shield=True):
            await _stop(process)
        for stream in (incoming, read, write, outgoing):
            stream.close()


async def _stop(process: anyio.abc.Process) -> None:
    """End a process and its group, as the protocol asks: close its input, then SIGTERM, then SIGKILL."""
    assert process.stdin is not None
    with suppress(anyio.BrokenResourceError, OSError), anyio.move_on_after(GRACE_SECONDS):
        await process.stdin.aclose()
    for send in (None, signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, PermissionError):
            if send is not None:
                os.killpg(process.pid, send)
        with anyio.move_on_after(GRACE_SECONDS):
            await process.wait()
            break
    # What the server has started, and left behind.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with anyio.move_on_after(GRACE_SECONDS):
        await process.aclose()


class _Bounded(httpx2.AsyncByteStream):
    """The body of a response, up to `MAX_MESSAGE` bytes."""

    def __init__(self, stream: httpx2.AsyncByteStream):
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for chunk in self._stream:
            size += len(chunk)
            if size > MAX_MESSAGE:
                raise httpx2.StreamError(f"the server sent a message longer than {MAX_MESSAGE >> 20} MiB")
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()


async def _bound(response: httpx2.Response) -> None:
    if response.status_code in (401, 403):
        raise ToolServerError(f"refuses access, with HTTP status {response.status_code}; give it an authorization by headers=")
    # What is packed may be of any length when it is unpacked.
    if response.headers.get("content-encoding", "identity") != "identity":
        raise ToolServerError("sent a compressed message, which was not asked for")
    # The length of one event is bounded where events are read; their number is not.
    if not response.headers.get("content-type", "").startswith("text/event-stream"):
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        response.stream = _Bounded(response.stream)


@asynccontextmanager
async def over_http(url: str, headers: Mapping[str, str]) -> AsyncIterator[Streams]:
    """Talk to a server over streamable HTTP."""
    client = httpx2.AsyncClient(
        headers={**headers, "accept-encoding": "identity"},
        timeout=httpx2.Timeout(30.0, read=None),  # a call has its own
        event_hooks={"response": [_bound]},
    )
    async with client, streamable_http_client(url, http_client=client, max_sse_event_size=MAX_MESSAGE) as streams:
        yield streams
