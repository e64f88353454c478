"""Tools through chat servers: declared, called and answered in fields of their own, or as text where a server has none."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ramet.agents.budget import Budget
from ramet.agents.journal import Journal
from ramet.agents.protocol import SPAWN_SCHEMA
from ramet.agents.resume import JournaledPolicy, JournaledTools
from ramet.agents.runtime import Runtime
from ramet.agents.tools import tool
from ramet.agents.tree import Message, Status, Task, Tree
from ramet.policy.engines.openai import ChatPolicy, WireFormat
from ramet.policy.engines.openai.wire import NativeCall
from tests.policy.raw_server import reply, says, serve, stream, usage

pytestmark = pytest.mark.anyio
WIRE = WireFormat()
TASK = Task("t", (Message("system", "be brief"), Message("user", "What is it?")), {"A": "seven"})
BUDGET = Budget(generated=400, depth=1)
SPAWN = ("spawn_clone", '{"objectives": ["part"], "context_keys": ["A"]}')


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@tool
def double(number: int) -> int:
    """Twice a number."""
    return 2 * number


def calling(*calls: tuple[str, str], text: str | None = None, finish: str = "tool_calls") -> bytes:
    """A turn that makes calls, whose arguments come in two parts."""
    events = [says(text)]
    for index, (name, arguments) in enumerate(calls):
        first = {"index": index, "id": f"call_{index}", "type": "function", "function": {"name": name, "arguments": arguments[:5]}}
        events += [says(None, tool_calls=[first]), says(None, tool_calls=[{"index": index, "function": {"arguments": arguments[5:]}}])]
    return stream(*events, says("", finish), usage(20))


def conversing(body: dict[str, Any], connection: socket.socket, asked: Any) -> None:
    """The root calls both tools at once, and answers when both have replied; a clone answers at once."""
    messages, last = body["messages"], body["messages"][-1]
    if "You are a clone" in messages[0]["content"]:
        connection.sendall(stream(says("Answer: 7", "stop"), usage(4)))
    elif last["role"] == "user":
        connection.sendall(calling(SPAWN, ("double", '{"number": 21}'), text="I ask."))
    else:
        connection.sendall(stream(says("Answer: 42", "stop"), usage(4)))


async def grow(url: str, **options: Any) -> Tree:
    async with ChatPolicy(url, WIRE, **options) as policy:
        return await Runtime(policy, WIRE, tools=[double], tools_at="root").run(TASK, BUDGET)


async def test_calls_and_results_are_messages_of_their_own():
    with serve(conversing) as (url, asked):
        tree = await grow(url)
    assert (tree.answer, tree.root.status, tree.usage.clones) == ("42", Status.ANSWERED, 1)
    assert [schema["function"]["name"] for schema in asked[0]["tools"]] == ["spawn_clone", "double"]
    assert asked[0]["tools"][0] == SPAWN_SCHEMA and "tools" not in asked[1], "the clone holds none"
    system, user, turn, spawned, doubled = asked[-1]["messages"]
    assert system == {"role": "system", "content": "be brief\n\nWhen you know the result, end with a line `Answer: ...`."}
    assert (user["role"], turn["role"], turn["content"]) == ("user", "assistant", "I ask.")
    functions = [{"name": name, "arguments": arguments} for name, arguments in (SPAWN, ("double", '{"number": 21}'))]
    assert turn["tool_calls"] == [{"id": f"call_{i}", "type": "function", "function": f} for i, f in enumerate(functions)]
    assert (spawned["role"], spawned["tool_call_id"], doubled["role"], doubled["tool_call_id"]) == ("tool", "call_0", "tool", "call_1")
    assert "1: 7" in spawned["content"] and "42" in doubled["content"] and "[left" in doubled["content"]
    assert "<tool_" not in json.dumps(asked)


REFUSALS = [
    ("400 Bad Request", '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'),
    ("500 Internal Server Error", "tools param requires --jinja flag"),
    ("400 Bad Request", "registry.ollama.ai/library/x:latest does not support tools"),
    ("404 Not Found", "No endpoints found that support tool use"),
    ("422 Unprocessable Entity", "Unsupported parameter: 'tools'"),
    ("400 Bad Request", "Function calling is not enabled for this model"),
    ("400 Bad Request", "Invalid schema for function 'spawn_clone': anyOf is not permitted"),
]


@pytest.mark.parametrize("status, said", REFUSALS)
async def test_a_server_that_refuses_tools_gets_them_as_text(status, said, caplog):
    def answer(body: dict[str, Any], connection: socket.socket, asked: Any) -> None:
        messages = body["messages"]
        if "tools" in body:
            connection.sendall(reply(json.dumps({"error": {"message": said}}).encode(), status))
        elif messages[-1]["content"].startswith("<tool_response>"):
            connection.sendall(stream(says("Answer: 42", "stop"), usage(4)))
        elif "You are a clone" in messages[0]["content"]:
            connection.sendall(stream(says("Answer: 7", "stop"), usage(4)))
        else:
            call = "".join(f'<tool_call>{{"name": "{name}", "arguments": {arguments}}}</tool_call>' for name, arguments in (SPAWN,))
            connection.sendall(stream(says(call, "stop"), usage(20)))

    with serve(answer) as (url, asked):
        tree = await grow(url)
    assert (tree.answer, tree.usage.clones) == ("42", 1)
    assert len(asked) == 4 and "double" in asked[1]["messages"][0]["content"]
    assert len([line for line in caplog.messages if "does not accept tools: they are described in the prompt" in line]) == 1


@pytest.mark.parametrize("said", ["Conversation roles must alternate user/assistant", "Only user and assistant roles are supported!"])
async def test_a_server_that_takes_tools_but_not_their_results_gets_both_as_text(said):
    def answer(body: dict[str, Any], connection: socket.socket, asked: Any) -> None:
        messages = body["messages"]
        if any(message["role"] not in ("user", "assistant") for message in messages):
            connection.sendall(reply(json.dumps({"message": said}).encode(), "400 Bad Request"))
        elif "<tool_response>" in messages[-1]["content"]:
            connection.sendall(stream(says("Answer: 42", "stop"), usage(4)))
        else:
            conversing(body, connection, asked)

    task = Task("t", (Message("user", "What is it?"),))
    with serve(answer) as (url, asked):
        async with ChatPolicy(url, WIRE) as policy:
            tree = await Runtime(policy, WIRE, tools=[double], tools_at="root", clone_system="").run(task, BUDGET)
    assert tree.answer == "42" and asked[-1]["messages"][-1]["role"] == "user" and "tools" not in asked[-1]


@pytest.mark.parametrize("kept", [1, 2, 3])
async def test_a_tree_is_resumed_from_its_journal_exactly(kept: int, tmp_path: Path):
    async def grown(url: str, journal: Journal) -> Tree:
        async with ChatPolicy(url, WIRE) as policy:
            runtime = Runtime(JournaledPolicy(policy, journal), WIRE, tools=[double], tools_at="root", caller=JournaledTools(journal))
            return await runtime.run(TASK, BUDGET)

    with serve(conversing) as (url, asked):
        with Journal(tmp_path / "j", "same") as journal:
            whole = await grown(url, journal)
        lines = (tmp_path / "j").read_bytes().splitlines(keepends=True)
        (tmp_path / "j").write_bytes(b"".join(lines[: 1 + kept]))
        asked.clear()
        with Journal(tmp_path / "j", "same") as journal:
            again = await grown(url, journal)
    assert [branch.ids for branch in again.branches] == [branch.ids for branch in whole.branches]
    assert again.answer == "42" and len(asked) + kept in (3, 4), "what the journal has is not asked for again"


ODD = ["", "call_0", "spawn_clone", "</tool_call>", "\ud800", '"', "{}", "[1]", '{"a": 1}', '{"a": NaN}', '{"a": "\\ud800"}', "x" * 900]
odd = st.text(max_size=8) | st.sampled_from(ODD)
calls = st.lists(st.builds(NativeCall, odd, odd, odd), max_size=4)


@settings(max_examples=150)
@given(odd, calls, st.lists(st.text(max_size=6), min_size=1, max_size=5), st.integers(0, 40), st.booleans())
def test_whatever_a_server_calls_the_conversation_stays_one_that_servers_take(text, made, replies, count, native):
    """Every call is answered once, right after its turn, under an id of its own; nothing that was said is lost."""
    prompt = WIRE.render([Message("user", "hi")], [SPAWN_SCHEMA])
    sampled = WIRE.pieces(text, count, made)
    assert len(sampled) >= count
    parsed = WIRE.parse(sampled)
    assert len(parsed.calls) >= len(made) and WIRE.tools(prompt) == [SPAWN_SCHEMA]
    messages = WIRE.messages([*prompt, *sampled, *WIRE.after_calls(replies, closed=True)], native=native)
    json.dumps(messages).encode()
    waiting: list[str] = []
    seen: set[str] = set()
    for message in messages:
        if message["role"] == "tool":
            assert message["tool_call_id"] == waiting.pop(0)
            continue
        assert not waiting, "a call without an answer"
        waiting = [call["id"] for call in message.get("tool_calls", ())]
        for call in message.get("tool_calls", ()):
            arguments = json.loads(call["function"]["arguments"], parse_constant=pytest.fail)
            assert isinstance(arguments, dict) and json.dumps(arguments, ensure_ascii=False).encode()
        assert len(seen | {*waiting}) == len(seen) + len(waiting) and native >= bool(waiting)
        seen |= {*waiting}
    assert not waiting
    shown = json.dumps(messages)
    assert all(json.dumps(said.encode("utf-8", "replace").decode())[1:-1] in shown for said in replies[: max(len(made), 1)])


def test_a_turn_that_a_program_writes_is_called_as_a_model_calls():
    ids = [*WIRE.render([Message("user", "hi")], [SPAWN_SCHEMA]), *WIRE.turn("Now.", '{"name":"double","arguments":{"number":1}}')]
    ids += WIRE.after_turn("2", closed=True)
    *_, turn, result = WIRE.messages(ids, native=True)
    assert turn["tool_calls"][0]["function"] == {"name": "double", "arguments": '{"number": 1}'} and turn["content"] == "Now."
    assert result == {"role": "tool", "tool_call_id": turn["tool_calls"][0]["id"], "content": "2"}
    assert WIRE.parse(WIRE.turn("", "no call")).calls == ("no call",)


def test_a_context_reads_in_order():
    ids = [*WIRE.render([Message("user", "hi")], [SPAWN_SCHEMA]), *WIRE.turn("Now.", '{"name":"double","arguments":{"number":1}}')]
    text = WIRE.text([*ids, *WIRE.after_turn("two", closed=True), WIRE.piece("Answer: 2")])
    places = [text.index(part) for part in ("You have one tool", "hi", "Now.", '{"name": "double"', "two", "Answer: 2")]
    assert places == sorted(places)


def test_a_call_that_nothing_answers_is_text():
    """Such as one in the last turn of a branch that is asked on."""
    ids = [*WIRE.render([Message("user", "hi")], [SPAWN_SCHEMA]), *WIRE.pieces("", 3, [NativeCall("a", "double", "{}")]), WIRE.END]
    *_, turn, user = WIRE.messages([*ids, 1, WIRE.piece("and?"), WIRE.END, 2], native=True)
    assert "<tool_call>" in turn["content"] and "tool_calls" not in turn and user == {"role": "user", "content": "and?"}
