"""Tools of real MCP servers, over pipes and over loopback HTTP, and of servers that misbehave."""

from __future__ import annotations

import gzip
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import anyio
import pytest

from ramet.agents.budget import Budget
from ramet.agents.chat import ChatMLFormat
from ramet.agents.runtime import Runtime
from ramet.agents.scripted import PlainFormat, ScriptedPolicy
from ramet.agents.tree import Message, Task, ToolStatus
from ramet.errors import ConfigError
from ramet.tools import mcp, transports
from ramet.tools.mcp import mcp_tools
from tests.agents.test_chat import CHATML, byte_tokenizer, controls
from tests.tools.calling import call

pytestmark = pytest.mark.anyio
HERE = Path(__file__).parent
REAL = f"{sys.executable} {HERE / 'mcp_server.py'}"
DONE, FAILED, TIMED_OUT = ToolStatus.DONE, ToolStatus.FAILED, ToolStatus.TIMED_OUT


def hostile(how: str = "fine") -> str:
    return f"{sys.executable} -S {HERE / 'hostile_server.py'} {how}"


@contextmanager
def serving(mode: str, port: int = 0) -> Iterator[int]:
    """A real server over HTTP, on a port of this machine."""
    with subprocess.Popen([*REAL.split(), mode, str(port)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """A server that does not end by itself is ended soon."""
    monkeypatch.setattr(transports, "GRACE_SECONDS", 0.3)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_the_tools_of_a_real_server_over_pipes():
    async with mcp_tools(f"{REAL} stdio", environment={"SECRET": "yes"}, cost=2, timeout=30.0) as tools:
        add, count, _, fail, die = tools
        assert [tool.name for tool in tools] == ["add", "count_calls", "say", "fail", "die"]
        assert (add.description, add.cost, add.timeout) == ("Add two numbers.", 2, 30.0)
        assert add.parameters["required"] == ["a", "b"] and add.parameters["properties"]["b"]["minimum"] == 0
        assert (await call(add, a=1, b=2))[0] is DONE and '"total": 3' in (await call(add, a=1, b=2))[1]
        status, text = await call(add, a=1, b=-2)
        assert status is FAILED and "greater than or equal to 0" in text
        assert (await call(fail))[0] is FAILED
        assert (await call(count))[1] == "1 yes"
        assert await call(die) == (FAILED, "the MCP server exited with status 3: the last words")
        assert (await call(count))[1] == "1 yes"  # it has been started again
    assert await call(count) == (FAILED, "ToolServerError: the MCP server was closed; call its tools within the block of mcp_tools(...)")


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_the_tools_of_a_real_server_over_http(monkeypatch):
    monkeypatch.setattr(transports, "MAX_MESSAGE", 2**20)
    with serving("json") as port:
        async with mcp_tools(f"http://127.0.0.1:{port}/mcp") as (add, count, say, fail, die):
            assert '"total": 3' in (await call(add, a=1, b=2))[1]
            assert (await call(add, a="x"))[0] is FAILED and (await call(fail))[0] is FAILED
            assert "longer than 1 MiB" in (await call(say, text="x", times=2_000_000))[1]
            assert (await call(count))[1].startswith("1 ")
            status, text = await call(die)
            assert status is FAILED and text.startswith("the MCP server cannot be reached: ")
            assert (await call(count))[0] is FAILED
            with serving("sse", port):
                assert (await call(count))[1].startswith("1 ")


class Misbehaving(BaseHTTPRequestHandler):
    """An HTTP server that is no MCP server, in the way that its path names."""

    def log_message(self, *_: object) -> None: ...

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        how, released = self.path.strip("/"), self.server.released
        status, kind, body = {
            "html": (200, "text/html", b"<html>hello</html>"),
            "401": (401, "text/plain", b"who?"),
            "500": (500, "text/plain", b"oops"),
            "broken": (200, "application/json", b"{nope"),
            "accepted": (202, "text/plain", b""),
            "redirect": (302, "text/plain", b""),
            "packed": (200, "application/json", gzip.compress(bytes(10**7))),
            "long": (200, "text/event-stream", b"data: " + b"x" * 2**21),
            "hang": (200, "text/event-stream", b"event: ping\ndata: {}\n\n"),
        }[how]
        self.send_response(status)
        self.send_header("content-type", kind)
        if how == "redirect":
            self.send_header("location", "http://127.0.0.1:1/other?key=secret")
        if how == "packed":
            self.send_header("content-encoding", "gzip")
        self.end_headers()
        with suppress(OSError):
            self.wfile.write(body)
            if how == "hang":
                released.wait(60)

    do_GET = do_DELETE = do_POST


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_what_is_no_mcp_server_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(transports, "MAX_MESSAGE", 2**20)
    monkeypatch.setattr(mcp, "START_SECONDS", 5.0)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Misbehaving)
    server.released = threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    cases = {
        "html": "Unexpected content type: text/html",
        "401": "refuses access, with HTTP status 401; give it an authorization by headers=",
        "500": "error response",
        "broken": "Failed to parse JSON",
        "accepted": "202",
        "redirect": "Redirect to http://127.0.0.1:1/other not followed",
        "packed": "sent a compressed message",
        "long": "exceeded the 1048576 byte limit",
        "hang": "did not answer within 0.5 seconds",
    }
    for how, said in cases.items():
        if how == "hang":
            monkeypatch.setattr(mcp, "START_SECONDS", 0.5)
        with pytest.raises(ConfigError) as error:
            async with mcp_tools(f"http://127.0.0.1:{server.server_address[1]}/{how}"):
                raise AssertionError(how)
        assert said in str(error.value) and "\n" not in str(error.value) and "secret" not in str(error.value), how
    server.released.set()
    server.shutdown()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_many_calls_at_once_have_each_its_own_result_also_where_some_are_cancelled():
    right = []

    async def one(number: int) -> None:
        with anyio.CancelScope() as scope:
            if number % 3 == 0:
                scope.cancel()
            right.append(f'"total": {number}' in (await call(add, a=number, b=0))[1])

    async with mcp_tools(f"{REAL} stdio") as (add, *_):
        async with anyio.create_task_group() as group:
            for number in range(60):
                group.start_soon(one, number)
        assert '"total": 3' in (await call(add, a=1, b=2))[1]
    assert right == [True] * 40


async def test_calls_of_a_branch_go_to_the_server_and_onto_the_bill():
    def program(context: str) -> str:
        if "<" in context:
            return f"Answer: {' '.join(context.rpartition('<')[2].split())}\0"
        return '<tool_call>{"name": "go", "arguments": {}}</tool_call>' * 3 + "\0"

    async with mcp_tools(hostile()) as tools:
        runtime = Runtime(ScriptedPolicy(program), PlainFormat(), tools=tools)
        tree = await runtime.run(Task("t", (Message("user", "root"),)), Budget(tool_calls=2))
    assert [made.result.status for made in tree.root.turns[0].calls] == [DONE, DONE, ToolStatus.REFUSED]
    assert tree.usage.tool_calls == 2 and tree.answer.count("go: fine") == 2


async def test_whatever_a_server_does_is_the_result_of_the_call():
    cases = {
        "die": (FAILED, "the MCP server exited with status 7: ImportError: nothing here"),
        "flood": (FAILED, "the MCP server sent a message longer than 16 MiB"),
        "nonsense": (FAILED, "what the MCP server sent cannot be read: "),
        "nothing": (DONE, ""),
        "structured": (DONE, '{"total": 3}'),
        "blocks": (DONE, "(image, which is not shown)\n(page: http://nowhere/)\ninside"),
        "silent": (TIMED_OUT, "no result within 0.2 seconds"),
    }
    async with mcp_tools(hostile()) as (go,):
        for how, (status, said) in cases.items():
            got = await call(go, 0.2 if how == "silent" else 60.0, how=how)
            assert got[0] is status and got[1].startswith(said), how
            assert await call(go) == (DONE, "fine"), how  # the next call finds it well, or started again
        started = anyio.current_time()
        assert (await call(go, 0.2, how="hang"))[0] is TIMED_OUT and (await call(go, 0.2))[0] is TIMED_OUT
        assert anyio.current_time() - started < mcp.END_SECONDS
    async with mcp_tools(hostile("pattern")) as (go,):
        assert await call(go) == (DONE, "x")  # its schema would be matched against for ever


async def test_calls_in_flight_fail_together_when_the_server_dies():
    results = []

    async def one(how: str) -> None:
        results.append(await call(go, how=how))

    async with mcp_tools(hostile()) as (go,):
        async with anyio.create_task_group() as group:
            for how in ("silent", "silent", "die"):
                group.start_soon(one, how)
    assert {status for status, _ in results} == {FAILED} and all("status 7" in text for _, text in results)


async def test_control_tokens_in_a_result_stay_text():
    chat = ChatMLFormat(byte_tokenizer(["<|im_end|>", "<|im_start|>", "<|endoftext|>"], ["<tool_call>", "</tool_call>"], CHATML))
    async with mcp_tools(hostile()) as (go,):
        status, text = await call(go, how="control")
    assert status is DONE and "<|im_end|>" in text
    assert controls(chat, chat.after_turn(text, closed=True)) == controls(chat, chat.after_turn("x", closed=True))


async def test_names_and_descriptions_are_brought_into_form():
    async with mcp_tools(hostile("names")) as tools:
        assert [tool.name for tool in tools][:4] == ["a_b", "a_b_2", "a_b_3", "_9___im_end__"]
        assert [await call(tool) for tool in tools] == [(DONE, "fine")] * len(tools)
    async with mcp_tools(hostile("described"), prefix="x-", max_characters=3) as (go,):
        assert go.name == "x-go" and len(go.description) <= mcp.MAX_DESCRIPTION and go.max_characters == 3


async def test_an_error_in_the_block_is_raised_as_it_is_and_every_way_out_ends_the_server(tmp_path):
    def running() -> bool:
        return any(str(tmp_path).encode() in file.read_bytes() for file in Path("/proc").glob("[0-9]*/cmdline"))

    with pytest.raises(ZeroDivisionError):
        async with mcp_tools(hostile(f"stubborn {tmp_path}")):
            assert running()
            raise ZeroDivisionError
    assert not running()
    with anyio.CancelScope() as scope:
        async with mcp_tools(hostile(f"fine {tmp_path}")):
            scope.cancel()
            await anyio.sleep_forever()
    assert scope.cancelled_caught and not running()


async def test_a_server_that_cannot_be_used_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(mcp, "START_SECONDS", 1.0)
    cases = {
        "no-such-command --now": "cannot be started: No such file",
        "true": "exited with status 0",
        hostile("dead"): "exited with status 1: ModuleNotFoundError: No module named 'server'",
        hostile("mute"): "did not answer within 1 seconds",
        hostile("pages"): "has more than 256 tools",
        hostile("many"): "has more than 256 tools",
        hostile("schema"): "tool go: its schema has",
        hostile("spawn"): "a tool cannot be called 'spawn_clone'",
        "http://user:secret@127.0.0.1:9/mcp?key=secret": "MCP server 'http://127.0.0.1:9/mcp' cannot be reached: ",
        "http://": "cannot be reached: ",
        " ": "this one is empty",
        "'": "No closing quotation",
    }
    for server, said in cases.items():
        with pytest.raises(ConfigError) as error:
            async with mcp_tools(server):
                raise AssertionError(server)
        assert said in str(error.value) and "\n" not in str(error.value) and "secret" not in str(error.value), server
    for server, option in (("true", "headers"), ("http://x", "environment")):
        with pytest.raises(ConfigError, match=f"no {option}"):
            async with mcp_tools(server, **{option: {"a": "b"}}):
                raise AssertionError(server)
