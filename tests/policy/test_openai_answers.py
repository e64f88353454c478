"""What servers say when all is well, in every shape: it is the answer, at once, and charged as the server counts it."""

from __future__ import annotations

import contextlib
import gc
import json
import time
import warnings
from typing import Any

import anyio
import anyio.abc
import pytest

from ramet.agents.sampling import Partial, Sample, SampleRequest, Sampling
from ramet.agents.tree import Message, StopReason
from ramet.errors import PolicyError, TransientPolicyError
from ramet.policy.engines.openai import ChatPolicy, CompletionsPolicy, WireFormat
from ramet.policy.engines.openai.client import connected
from ramet.policy.engines.openai.text import estimate_tokens
from tests.policy.raw_server import HEAD, reply, says, serve, stream, usage

pytestmark = pytest.mark.anyio
WIRE = WireFormat()
PROMPT = tuple(WIRE.render([Message("user", "hi")], tools=()))


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request) -> str:
    return request.param


async def chat(answer: Any, most: int = 100, partial: Partial | None = None, **options: Any) -> Sample:
    with serve(answer) as (url, asked):
        async with ChatPolicy(url, WIRE, **options) as policy:
            sample = await policy.sample(SampleRequest(PROMPT, most, WIRE.stop_ids, 7), Partial() if partial is None else partial)
    assert len(asked) == 1
    assert len(sample.ids) == len(sample.logprobs)
    json.dumps([sample.ids, sample.logprobs], allow_nan=False)  # as a journal keeps it
    return sample


def event(**choice: Any) -> dict[str, Any]:
    return {"choices": [choice]}


ANSWER = "Answer: 42"
GOOD = [says("Answer: "), says("42"), says("", "stop"), usage(4)]


@pytest.mark.parametrize(
    "body",
    [
        stream(*GOOD),
        stream(*GOOD, done=False),
        stream(says("Answer: "), says("42"), usage(4)),
        stream(*({**e, "error": None} for e in GOOD)),
        stream(*({**e, "error": {"code": None, "message": ""}} for e in GOOD)),
        stream(b"\xef\xbb\xbf", *GOOD),
        stream(b"".join(b"data: " + json.dumps(e).encode() + b"\r\r" for e in GOOD)),
        stream(*GOOD, done=False).rstrip(b"\n"),
        stream(b'data: {"choices": [{"delta":\ndata: {"content": "Answer: 42"}}]}\n\n', says("", "stop"), usage(4)),
        stream(b"data:\n\n", b": keep-alive\n\n", b"event: ping\ndata: {}\n\n", *GOOD),
        stream({**says(ANSWER, "stop"), "usage": {"completion_tokens": 4}}, b"data: {bro\n\n"),
        stream({**says(ANSWER, "stop"), "usage": {"completion_tokens": 4}}, {"error": {"message": "too late"}}, done=False),
        stream(*GOOD[:2], says("", "stop"), says(" and more"), usage(4)),
        stream(event(delta={"role": "assistant", "content": None}), {"choices": None}, event(delta=None), {"choices": []}, *GOOD),
        stream(event(delta={"content": [{"type": "text", "text": t} for t in ("Answer: ", "42")]}), says("", "stop"), usage(4)),
        stream(event(message={"role": "assistant", "content": ANSWER}, finish_reason="stop"), usage(4)),
        stream(*GOOD[:2], event(delta={}, message={"content": ANSWER}, finish_reason="stop"), usage(4)),
        stream(event(text=ANSWER, finish_reason="stop"), usage(4)),
        stream(event(delta={"content": ANSWER}, finish_reason="stop", usage={"completion_tokens": 4})),
        stream({**says(ANSWER, "stop"), "usage": None, "x_groq": {"usage": {"completion_tokens": 4}}}),
        stream({**says(ANSWER, "stop"), "timings": {"predicted_n": 4}}),
        stream(event(index="0", delta={"content": ANSWER, "thinking": True, "reasoning": [{"x": 1}]}), says("", "stop"), usage(4)),
        stream(event(index=1, delta={"content": "other"}), *GOOD),
        reply(json.dumps({"object": "chat.completion", **event(message={"content": ANSWER}, finish_reason="stop"), **usage(4), "choices": [
            {"message": {"content": ANSWER}, "finish_reason": "stop"}]}, indent=1).encode()),
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"%x\r\n%s\r\n" % (len(body := stream(*GOOD).partition(b"\r\n\r\n")[2]), body),
    ],
)  # fmt: skip
async def test_an_answer_is_an_answer_in_every_shape(body):
    sample = await chat(body)
    assert (WIRE.text(sample.ids), sample.stop, len(sample.ids)) == (ANSWER, StopReason.END, 4)


@pytest.mark.parametrize("finish", ["stop", "eos", "repetition", "content_filter", "end_turn", "a new one"])
async def test_reasons_that_nobody_knows_are_final(finish):
    sample = await chat(stream(says(ANSWER, finish), usage(4)))
    assert sample.stop is StopReason.END and WIRE.text(sample.ids) == ANSWER


@pytest.mark.parametrize("finish, stop", [("length", StopReason.LENGTH), ("MAX_TOKENS", StopReason.LENGTH)])
async def test_a_limit_by_any_name_cuts(finish, stop):
    assert (await chat(stream(says("half", finish)))).stop is stop
    for reason in ("", "null", None):
        assert (await chat(stream(says("Answer", reason), says(": 42", "length")))).stop is stop, "a reason that is none"


@pytest.mark.parametrize("finish", ["error", "abort"])
async def test_what_the_server_broke_off_may_be_asked_again_and_is_charged(finish):
    partial = Partial()
    with pytest.raises(TransientPolicyError, match=f"aborted a sample: {finish}"):
        await chat(stream(says("half a"), says("", finish), usage(2)), partial=partial)
    assert len(partial.ids) == 2


async def test_an_answer_does_not_wait_for_the_connection_to_close(monkeypatch):
    monkeypatch.setattr("ramet.policy.engines.openai.server.AFTER_FINISH", 0.05)
    for tail in (b"data: [DONE]\n\n", b""):
        body = stream(*GOOD[:3], done=False) + tail

        def hold(_: Any, connection: Any, __: Any, body: bytes = body) -> None:
            connection.sendall(body.replace(b"Connection: close\r\n", b""))
            connection.settimeout(20)
            connection.recv(1)  # until the client hangs up

        started = time.monotonic()
        assert WIRE.text((await chat(hold)).ids) == ANSWER
        assert time.monotonic() - started < 15


async def test_halves_of_a_character_over_two_events_are_one():
    sample = await chat(stream(says("a \ud83d"), says("\ude00")))
    assert WIRE.text(sample.ids) == "a \U0001f600"
    assert WIRE.text((await chat(stream(says("x \ud83d", "stop")))).ids) == "x \ufffd"


@pytest.mark.parametrize(
    "calls",
    [
        [event(delta={"tool_calls": [{"index": 0, "function": {"name": "spawn_clone", "arguments": '{"objec'}}]}),
         event(delta={"tool_calls": [{"index": 0, "function": {"arguments": 'tives": ["</tool_call>"]}'}}]})],
        [event(delta={"tool_calls": [{"function": {"name": "spawn_clone", "arguments": {"objectives": ["</tool_call>"]}}}]})],
        [event(message={"function_call": {"name": "spawn_clone", "arguments": '{"objectives": ["</tool_call>"]}'}})],
    ],
)  # fmt: skip
async def test_native_tool_calls_are_calls(calls):
    sample = await chat(stream(says("I ask."), *calls, says(None, "tool_calls"), usage(9)))
    [call] = WIRE.parse(sample.ids).calls
    assert json.loads(call) == {"name": "spawn_clone", "arguments": {"objectives": ["</tool_call>"]}}
    assert WIRE.parse(sample.ids).text.strip() == "I ask." and len(sample.ids) == 9


async def test_two_native_calls_are_two_wherever_the_server_places_them():
    one, two = ({"id": i, "function": {"name": "spawn_clone", "arguments": '{"objectives": ["' + i + '"]}'}} for i in "ab")
    for events in ([event(delta={"tool_calls": [one]}), event(delta={"tool_calls": [two]})], [event(delta={"tool_calls": [one, two]})]):
        sample = await chat(stream(*events, says(None, "tool_calls")))
        assert [json.loads(call)["arguments"]["objectives"] for call in WIRE.parse(sample.ids).calls] == [["a"], ["b"]]


async def test_a_sample_as_long_as_it_may_be_without_a_reason_was_cut():
    assert (await chat(stream(says("a b c"), usage(3)), most=3)).stop is StopReason.LENGTH
    assert (await chat(stream(says("a b c"), usage(3)), most=4)).stop is StopReason.END


async def test_a_call_is_one_whatever_reason_the_turn_ends_for():
    call = event(delta={"tool_calls": [{"index": 0, "function": {"name": "spawn_clone", "arguments": "{}"}}]}, finish_reason="stop")
    assert WIRE.parse((await chat(stream(call))).ids).calls == ('{"name": "spawn_clone", "arguments": {}}',)


async def test_a_call_that_is_sent_in_parts_and_then_whole_is_one_call():
    call = {"index": 0, "id": "a", "function": {"name": "spawn_clone", "arguments": '{"objectives": ["x"]}'}}
    first, second = {"name": "spawn_clone", "arguments": '{"obj'}, {"arguments": 'ectives": ["x"]}'}
    deltas = [event(delta={"tool_calls": [part]}) for part in ({**call, "function": first}, {"index": 0, "function": second})]
    for last in (event(message={"tool_calls": [call]}, finish_reason="tool_calls"), says("", "tool_calls")):
        assert WIRE.parse((await chat(stream(*deltas, last))).ids).calls == ('{"name": "spawn_clone", "arguments": {"objectives": ["x"]}}',)


async def test_a_refusal_is_what_the_model_says():
    assert WIRE.text((await chat(stream(event(delta={"content": None, "refusal": "I cannot."}, finish_reason="stop")))).ids) == "I cannot."


def listed(tokens: list[str], logprob: Any = -0.1, text: str | None = None, finish: str | None = None) -> dict[str, Any]:
    said = "".join(tokens) if text is None else text
    return event(delta={"content": said}, logprobs={"content": [{"token": t, "logprob": logprob} for t in tokens]}, finish_reason=finish)


@pytest.mark.parametrize(
    "logprobs",
    [
        None, [], {}, {"content": None}, {"content": []},
        *({"content": [{"token": ANSWER, "logprob": odd}]} for odd in (None, "-inf", float("nan"), float("-inf"), 10**400, -9999.0)),
        {"content": [{"token": None, "logprob": -1}]}, {"tokens": [ANSWER], "token_logprobs": [-0.1]}, [{"token": ANSWER, "logprob": -0.1}],
    ],
)  # fmt: skip
async def test_log_probabilities_that_nothing_is_trained_on_end_no_branch(logprobs):
    sample = await chat(stream(event(delta={"content": ANSWER}, logprobs=logprobs), says("", "stop"), usage(4)))
    assert WIRE.text(sample.ids) == ANSWER and len(sample.ids) == 4


async def test_log_probabilities_count_tokens_once_wherever_they_come():
    at_once = [listed(["Answer"]), listed([": "]), listed(["42"])]
    late = listed(["Answer", ": ", "42"], text="", finish="stop")
    for events in ([*at_once, says("", "stop")], [says("Answer"), says(": 42"), late], [*at_once, late]):
        sample = await chat(stream(*events))
        assert (WIRE.text(sample.ids), len(sample.ids)) == (ANSWER, 3)


LONG = "word " * 600


@pytest.mark.parametrize(
    "events, count",
    [
        ([says(LONG), says("", "stop")], estimate_tokens(LONG)),
        ([says("", "stop", reasoning_content=LONG)], estimate_tokens(LONG)),
        ([says("", None, reasoning=LONG), says("ok", "stop"), usage(700)], 700),
        ([says("ok", "stop"), usage(2, total_tokens=10 + 2 + 500)], 502),
        ([says("ok", "stop"), usage(2, completion_tokens_details={"reasoning_tokens": 300})], 302),
        ([says("ok", "stop"), usage(302, completion_tokens_details={"reasoning_tokens": 300})], 302),
        ([says("ok", "stop"), usage(2, total_tokens=12 + 8, prompt_tokens_details={"cached_tokens": 8})], 2),
        ([says("ok", "stop"), {"choices": [], "usage": {"input_tokens": 3, "output_tokens": 5}}], 5),
        ([says(LONG, "stop"), usage(0)], estimate_tokens(LONG)),
        ([says(LONG, "stop"), usage(1)], estimate_tokens(LONG)),
        ([{**says("ok"), **usage(3), "choices": says("ok")["choices"]}, says("", "stop")], 3),
        ([says("ok", "stop"), usage(-5)], estimate_tokens("ok")),
        ([says("ok", "stop"), {"choices": [], "usage": {"completion_tokens": "many"}}], estimate_tokens("ok")),
        ([listed(["one"], text=LONG, finish="stop")], 94),
    ],
)  # fmt: skip
async def test_no_budget_is_escaped(events, count):
    sample = await chat(stream(*events), most=1000)
    assert len(sample.ids) == count


async def test_an_estimate_is_within_the_grant_and_keeps_the_text():
    sample = await chat(stream(says(LONG + ANSWER, "stop")), most=100)
    assert len(sample.ids) == 100 and WIRE.text(sample.ids) == LONG + ANSWER


async def test_a_server_that_runs_past_its_grant_is_hung_up_on_and_charged():
    def endless(_: Any, connection: Any, __: Any) -> None:
        connection.sendall(stream(done=False))
        while True:
            connection.sendall(stream(says(LONG), done=False).partition(b"\r\n\r\n")[2])

    partial = Partial()
    with pytest.raises(PolicyError, match="for a grant of 10: the server does not keep to max_tokens"):
        await chat(endless, most=10, partial=partial)
    assert len(partial.ids) > 10
    with pytest.raises(PolicyError, match=f"generated {10**15} tokens"):
        await chat(stream(says("x", "stop"), usage(10**15)), partial=partial)
    assert len(partial.ids) <= 2**20


async def test_what_the_prompt_s_cache_held_is_not_forgotten():
    cached = usage(4, prompt_tokens_details={"cached_tokens": 2})
    sample = await chat(stream({**says("Answer: "), **cached, "choices": says("Answer: ")["choices"]}, says("42"), says("", "stop")))
    assert (sample.cached, sample.prefilled) == (2, len(PROMPT) - 2)


async def test_reasoning_is_charged_when_the_stream_breaks():
    for name in ("reasoning_content", "reasoning", "thinking"):
        partial = Partial()
        with pytest.raises(TransientPolicyError):
            await chat(stream(*[says(None, None, **{name: "step "})] * 50, done=False), partial=partial)
        assert len(partial.ids) == 50


def ids(*tokens: int, logprob: Any = -0.5, finish: str | None = None, **more: Any) -> dict[str, Any]:
    return event(token_ids=list(tokens), logprobs={"token_logprobs": [logprob] * len(tokens)}, finish_reason=finish, **more)


async def completion(body: bytes, temperature: float = 1.0, partial: Partial | None = None) -> Sample:
    with serve(body) as (url, _):
        async with CompletionsPolicy(url) as policy:
            request = SampleRequest((1, 2, 3, 4), 8, frozenset({9}), 7, Sampling(temperature))
            return await policy.sample(request, Partial() if partial is None else partial)


async def test_the_last_chunk_of_a_completion_needs_no_ids():
    sample = await completion(stream(ids(5, 6), event(text="", token_ids=None, logprobs=None, finish_reason="stop")))
    assert (sample.ids, sample.stop) == ((5, 6), StopReason.END)
    assert (await completion(stream(ids(5, text="a"), event(text="b", finish_reason="stop")))).ids == (5,)
    last = event(text="", token_ids=None, logprobs={"token_logprobs": [-0.5]}, finish_reason="stop")
    assert (await completion(stream(ids(5), last))).ids == (5,)
    assert (await completion(stream(ids(5, logprob="odd", finish="stop")), temperature=0)).logprobs == (0.0,)


async def test_more_ids_than_the_grant_are_charged():
    partial = Partial()
    with pytest.raises(PolicyError, match="generated 9 tokens for a grant of 8"):
        await completion(stream(ids(*range(9))), partial=partial)
    assert partial.ids == list(range(9))


async def test_no_generator_is_left_open():
    """Whatever ends a request: an answer, an error in it, a long page, silence, being cancelled."""

    def silent(_: Any, connection: Any, __: Any) -> None:
        connection.sendall(stream(says("x"), done=False).replace(b"Connection: close\r\n", b""))
        connection.settimeout(20)
        connection.recv(1)

    page = reply(b"<html>" + b"x" * 2**18, "500 Internal Server Error", "text/html")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for answer in (stream(*GOOD), stream(*GOOD, *GOOD * 50), stream({"error": "x"}, *GOOD * 50), page, silent):
            with contextlib.suppress(PolicyError):
                await chat(answer, seconds=0.05)
            gc.collect()
    assert not [w for w in caught if "generator" in str(w.message)]


async def test_no_generator_is_left_open_where_sending_is_cancelled():
    """By a deadline or from outside, when the server has read a part of the request."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with anyio.CancelScope() as scope:

            async def read_a_part(connection: anyio.abc.SocketStream) -> None:
                await connection.receive()
                scope.cancel()

            listener = await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=0)
            async with listener, anyio.create_task_group() as group:
                group.start_soon(listener.serve, read_a_part)
                port = listener.extra(anyio.abc.SocketAttribute.local_port)
                async with connected({}, 1) as client:
                    await client.post(f"http://127.0.0.1:{port}/v1/completions", json={"prompt": "x" * 2**25})
        assert scope.cancelled_caught
        gc.collect()
    assert not [w for w in caught if "generator" in str(w.message)]
