"""The Responses endpoint: the same trees as through the chat endpoint, in its own items and events."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest

from ramet.agents.budget import Budget
from ramet.agents.runtime import Runtime
from ramet.agents.sampling import Partial, Sample, SampleRequest
from ramet.agents.tools import tool
from ramet.agents.tree import Message, Status, StopReason, Task
from ramet.errors import PolicyError, RefusedRequest, TransientPolicyError
from ramet.policy.engines.openai import ResponsesPolicy, WireFormat
from tests.policy.raw_server import reply, serve, stream

pytestmark = pytest.mark.anyio
WIRE = WireFormat()
PROMPT = tuple(WIRE.render([Message("system", "be brief"), Message("user", "hi")], tools=()))
COUNTS = {"input_tokens": 10, "input_tokens_details": {"cached_tokens": 2}, "output_tokens": 9, "total_tokens": 19}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def delta(text: str, kind: str = "output_text", place: int = 0) -> dict[str, Any]:
    return {"type": f"response.{kind}.delta", "output_index": place, "delta": text}


def message(text: str) -> dict[str, Any]:
    return {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]}


def call(arguments: str, name: str = "double", call_id: str = "c1") -> dict[str, Any]:
    return {"type": "function_call", "id": f"fc_{call_id}", "call_id": call_id, "name": name, "arguments": arguments}


def item(state: str, value: dict[str, Any], place: int = 0) -> dict[str, Any]:
    return {"type": f"response.output_item.{state}", "output_index": place, "item": value}


def ended(*output: dict[str, Any], status: str = "completed", **more: Any) -> dict[str, Any]:
    response = {"object": "response", "status": status, "error": None, "output": output, "usage": COUNTS, **more}
    return {"type": f"response.{status}", "response": response}


async def ask(answer: Any, most: int = 100, partial: Partial | None = None, **options: Any) -> Sample:
    with serve(answer) as (url, _):
        async with ResponsesPolicy(url, WIRE, **options) as policy:
            return await policy.sample(SampleRequest(PROMPT, most, WIRE.stop_ids, 7), partial or Partial())


STARTED = {"type": "response.created", "response": {"status": "in_progress", "error": None, "output": [], "usage": None}}
WHOLE = message("Answer: 42")
SHAPES = {
    "in parts": stream(STARTED, item("added", message("")), delta("Answer: "), delta("42"), item("done", WHOLE), ended(WHOLE), done=False),
    "at its end": stream(STARTED, ended(WHOLE), done=False),
    "by items": stream(item("done", WHOLE), ended()),
    "not streamed": reply(json.dumps(ended(WHOLE)["response"]).encode()),
    "spread over lines": reply(json.dumps(ended(WHOLE)["response"], indent=1).encode()),
    "with reasoning": stream(
        item("added", {"type": "reasoning", "summary": []}), delta("So", "reasoning_text"), delta(" it", "reasoning_summary_text"),
        delta("Answer: 42", place=1), ended({"type": "reasoning", "summary": [{"text": "So it"}]}, WHOLE),
    ),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
async def test_an_answer_is_an_answer_in_every_shape(shape):
    sample = await ask(SHAPES[shape])
    assert (WIRE.text(sample.ids), sample.stop, len(sample.ids)) == ("Answer: 42", StopReason.END, 9)
    assert sample.cached == 2


CALL = call('{"number": 21}')
CALLS = {
    "in parts": stream(
        item("added", call("")), delta('{"numb', "function_call_arguments"), delta('er": 21}', "function_call_arguments"),
        {"type": "response.function_call_arguments.done", "output_index": 0, "arguments": '{"number": 21}'},
        item("done", CALL), ended(CALL),
    ),
    "by items": stream(item("done", CALL), ended(CALL)),
    "at its end": stream(ended(CALL)),
}  # fmt: skip


@pytest.mark.parametrize("shape", CALLS)
async def test_a_call_is_one_call_in_every_shape(shape):
    assert WIRE.parse((await ask(CALLS[shape])).ids).calls == ('{"name": "double", "arguments": {"number": 21}}',)


@pytest.mark.parametrize(
    "last, stop",
    [
        (ended(status="incomplete", incomplete_details={"reason": "max_output_tokens"}), StopReason.LENGTH),
        (ended(status="incomplete"), StopReason.LENGTH),
        (ended(status="incomplete", incomplete_details={"reason": "content_filter"}), StopReason.END),
    ],
)
async def test_what_is_incomplete_was_cut_unless_it_was_filtered(last, stop):
    assert (await ask(stream(delta("half"), last))).stop is stop


@pytest.mark.parametrize(
    "answer, kind, said",
    [
        (stream(ended(status="failed", error={"code": "server_error", "message": "oh"})), TransientPolicyError, "oh"),
        (stream(ended(status="failed", error={"code": "invalid_prompt", "message": "no"})), PolicyError, "no"),
        (stream({"type": "error", "code": "rate_limit_exceeded", "message": "slow down", "param": None}), TransientPolicyError, "slow"),
        (stream(ended(status="failed", error={"code": "x", "message": "maximum context length"})), RefusedRequest, "maximum context"),
        (stream(delta("half"), ended(status="cancelled")), TransientPolicyError, "aborted"),
        (stream(delta("half"), done=False), TransientPolicyError, "without a finish reason"),
        (stream({"type": "response.output_text.delta", "delta": 7}), PolicyError, "does not follow the protocol"),
        (stream({"choices": [{"delta": {"content": "hi"}}]}), PolicyError, "in an unknown form, with the fields choices"),
        (stream(delta("x" * 9000)), PolicyError, "does not keep to max_tokens"),
        (reply(b'{"detail": "Not Found"}', "404 Not Found"), PolicyError, r"404: Not Found \(application/json\).*use the chat backend"),
    ],
)  # fmt: skip
async def test_failures_are_typed(answer, kind, said):
    with pytest.raises(kind, match=said) as caught:
        await ask(answer)
    assert type(caught.value) is kind


async def test_fields_that_the_endpoint_refuses_are_left_out():
    def answer(body: dict[str, Any], connection: socket.socket, asked: Any) -> None:
        name = next((name for name in ("seed", "store") if name in body), None)
        refused = json.dumps({"error": {"message": f"Unknown parameter: '{name}'.", "param": name}}).encode()
        connection.sendall(reply(refused, "400 Bad Request") if name else SHAPES["in parts"])

    with serve(answer) as (url, asked):
        async with ResponsesPolicy(f"{url}/responses", WIRE) as policy:
            await policy.sample(SampleRequest(PROMPT, 100, WIRE.stop_ids, 7), Partial())
    assert [body["path"] for body in asked] == ["/v1/responses"] * 3
    last = {name: value for name, value in asked[-1].items() if name not in ("path", "headers")}
    assert last == {
        "model": "m", "stream": True, "max_output_tokens": 100, "temperature": 1.0, "top_p": 1.0,
        "input": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}],
    }  # fmt: skip


@tool
def double(number: int) -> int:
    """Twice a number."""
    return 2 * number


@pytest.mark.parametrize("refused", [False, True])
async def test_a_tree_calls_tools_and_clones(refused):
    """With calls and results as items or, where the server has no tools, as text."""
    arguments = '{"objectives": ["part"]}'

    def answer(body: dict[str, Any], connection: socket.socket, asked: Any) -> None:
        items, clone = body["input"], "You are a clone" in body["input"][0]["content"]
        replied = "output" in items[-1] or items[-1].get("content", "").startswith("<tool_response>")
        if refused and "tools" in body:
            connection.sendall(reply(b'{"error": {"message": "tools are not supported"}}', "400 Bad Request"))
        elif clone or replied:
            connection.sendall(stream(delta("Answer: 7" if clone else "Answer: 42"), ended()))
        elif refused:
            text = f'<tool_call>{{"name": "spawn_clone", "arguments": {arguments}}}</tool_call>'
            connection.sendall(stream(delta(text + '<tool_call>{"name": "double", "arguments": {"number": 21}}</tool_call>'), ended()))
        else:
            connection.sendall(stream(delta("I ask."), ended(message("I ask."), call(arguments, "spawn_clone", "c0"), CALL)))

    with serve(answer) as (url, asked):
        async with ResponsesPolicy(url, WIRE) as policy:
            tree = await Runtime(policy, WIRE, tools=[double], tools_at="root").run(
                Task("t", (Message("user", "What is it?"),)), Budget(generated=400, depth=1)
            )
    assert (tree.answer, tree.root.status, tree.usage.clones, tree.usage.tool_calls) == ("42", Status.ANSWERED, 1, 1)
    if refused:
        assert all("tools" not in body for body in asked[1:])
        return
    declared = asked[0]["tools"][1]
    assert (declared["type"], declared["name"], declared["strict"]) == ("function", "double", False) and "parameters" in declared
    turn, first, second, *results = asked[-1]["input"][2:]
    assert turn == {"role": "assistant", "content": "I ask."}
    assert first == {"type": "function_call", "call_id": "c0", "name": "spawn_clone", "arguments": arguments}
    assert second == {"type": "function_call", "call_id": "c1", "name": "double", "arguments": '{"number": 21}'}
    assert [(result["type"], result["call_id"]) for result in results] == [("function_call_output", "c0"), ("function_call_output", "c1")]
