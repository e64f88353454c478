"""Servers as policies: what they send, what they refuse, what they break off. A small real HTTP server plays them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import anyio
import pytest

from ramet.agents.budget import Budget
from ramet.agents.runtime import Runtime
from ramet.agents.sampling import Partial, PolicyWrapper, SampleRequest, Sampling
from ramet.agents.tree import Message, Status, StopReason, Task
from ramet.errors import PolicyError, RefusedRequest, TransientPolicyError
from ramet.policy.engines.openai import ChatPolicy, CompletionsPolicy, WireFormat, retry_after
from tests.cancelling import cancelled

Answer = Callable[[dict[str, Any], BaseHTTPRequestHandler], None]
pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request) -> str:
    return request.param


@contextmanager
def server(answer: Answer, models: Any = None) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(address, bodies that came) of a server that answers posts with `answer`."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            send(self, 200, json.dumps(models or {"data": [{"id": "small", "max_model_len": 512}]}).encode())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append({**body, "authorization": self.headers.get("Authorization")})
            answer(body, self)

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_address[1]}/v1", asked
    finally:
        httpd.shutdown()
        httpd.server_close()


def send(handler: BaseHTTPRequestHandler, status: int, body: bytes, **headers: str) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def stream(handler: BaseHTTPRequestHandler, *events: Any, pause: float = 0.0, done: bool = True) -> None:
    """Server-sent events; the connection is closed at their end."""
    handler.send_response(200)
    handler.send_header("Content-Type", "text/event-stream")
    handler.send_header("Connection", "close")
    handler.end_headers()
    handler.close_connection = True
    try:
        for event in events:
            text = event if isinstance(event, bytes) else json.dumps(event).encode()
            handler.wfile.write(b": ping\n\ndata: " + text + b"\n\n")
            handler.wfile.flush()
            time.sleep(pause)
        if done:
            handler.wfile.write(b"data: [DONE]\n\n")
    except OSError:
        pass


def chunk(ids: list[int], finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"token_ids": ids, "logprobs": {"token_logprobs": [-0.5] * len(ids)}, "finish_reason": finish}]}


USAGE = {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 3}}}


def request(tokens: int = 8, temperature: float = 1.0) -> SampleRequest:
    return SampleRequest((1, 2, 3, 4), tokens, frozenset({9}), 7, Sampling(temperature))


async def one(policy: Any, given: SampleRequest | None = None, partial: Partial | None = None) -> Any:
    async with policy:
        return await policy.sample(given or request(), partial or Partial())


async def test_token_ids_go_out_and_come_back(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with server(lambda body, h: stream(h, chunk([5]), chunk([6, 9], "stop"), USAGE)) as (url, asked):
        policy = CompletionsPolicy(url)
        sample = await one(policy)
    assert (sample.ids, sample.logprobs, sample.stop) == ((5, 6, 9), (-0.5, -0.5, -0.5), StopReason.END)
    assert (sample.prefilled, sample.cached) == (1, 3)
    assert (policy.model, policy.context) == ("small", 512)
    [body] = asked
    assert body["prompt"] == [1, 2, 3, 4] and body["stop_token_ids"] == [9] and body["max_tokens"] == 8
    assert body["authorization"] == "Bearer sk-secret"


@pytest.mark.parametrize(
    "answer, error, message",
    [
        (lambda b, h: send(h, 429, b'{"error": {"message": "slow down"}}', Retry_After="3"), TransientPolicyError, "429: slow down"),
        (lambda b, h: send(h, 503, b"<html>"), TransientPolicyError, "503: a web page"),
        (lambda b, h: send(h, 400, b'{"error": {"message": "the prompt is too long"}}'), RefusedRequest, "400: the prompt is too long"),
        (lambda b, h: send(h, 400, b'{"error": {"message": "no such voice"}}'), PolicyError, "400: no such voice"),
        (lambda b, h: send(h, 401, b'{"error": "bad key"}'), PolicyError, "401: bad key"),
        (lambda b, h: stream(h, chunk([5]), done=False), TransientPolicyError, "ended a stream without a finish reason"),
        (lambda b, h: stream(h, chunk([5]), b"{broken"), TransientPolicyError, "not JSON"),
        (lambda b, h: stream(h, {"error": {"message": "engine died"}}), TransientPolicyError, "engine died"),
        (lambda b, h: stream(h, {"choices": [{"text": "hi", "finish_reason": "stop"}]}), PolicyError, "use the chat backend"),
        (lambda b, h: stream(h, {"choices": [{"token_ids": [1, 2], "logprobs": None}]}), PolicyError, "0 log-probabilities for 2"),
        (lambda b, h: stream(h, chunk([5], "abort")), TransientPolicyError, "aborted a sample: abort"),
        (
            lambda b, h: stream(h, {"choices": [{"token_ids": [1], "logprobs": {"token_logprobs": [None]}}]}),
            PolicyError,
            "does not follow the protocol",
        ),
        (lambda b, h: stream(h, b'{"choices": [{"token_ids": [1], "logprobs": {"token_logprobs": [NaN]}}]}'), PolicyError, "follow the"),
        (lambda b, h: stream(h, {"choices": "x"}), PolicyError, "does not follow the protocol"),
        (lambda b, h: send(h, 401, b"bad key: Bearer sk-secret"), PolicyError, r"401: bad key: Bearer \.\.\."),
        (lambda b, h: send(h, 500, b"y" * 2**20), TransientPolicyError, "500: y"),
        (lambda b, h: h.connection.shutdown(2), TransientPolicyError, "Error"),
        (lambda b, h: stream(h, b"x" * 2**23), PolicyError, "more than 4194304 characters"),
    ],
)
async def test_what_servers_do_wrong(answer, error, message, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with server(answer) as (url, _):
        with pytest.raises(error, match=message) as caught:
            await one(CompletionsPolicy(url))
    assert type(caught.value) is error
    assert "sk-secret" not in str(caught.value)
    if "429" in message:
        assert caught.value.retry_after == 3.0


async def test_what_had_come_is_charged_when_a_stream_breaks():
    partial = Partial()
    with server(lambda b, h: stream(h, chunk([5, 6]), done=False)) as (url, _):
        with pytest.raises(TransientPolicyError):
            await one(CompletionsPolicy(url), partial=partial)
    assert partial.ids == [5, 6] and partial.prefilled == 4


async def test_cancelling_keeps_what_had_come_and_hangs_up():
    with server(lambda b, h: stream(h, *[chunk([5])] * 500, pause=0.01)) as (url, _):
        async with CompletionsPolicy(url) as policy:
            partial = await cancelled(policy, request(500))
    assert 500 > len(partial.ids) == len(partial.logprobs) > 0


async def test_no_server_and_no_model_are_named():
    with pytest.raises(PolicyError, match="no OpenAI-compatible server answers"):
        await one(CompletionsPolicy("http://127.0.0.1:9/v1", wait=0))
    with pytest.raises(PolicyError, match="is not the address"):
        CompletionsPolicy("localhost:8000")
    with server(lambda b, h: send(h, 404, b'{"error": {"message": "no such model"}}')) as (url, _):
        with pytest.raises(PolicyError, match=r"404: no such model \(no content type\); it lists small"):
            await one(CompletionsPolicy(url, "large"))


async def test_keys_that_are_none_and_users_in_addresses_are_refused_without_being_shown(monkeypatch):
    with server(lambda b, h: stream(h, chunk([9], "stop"), USAGE)) as (url, asked):
        monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\n")
        await one(CompletionsPolicy(url))
        assert asked[0]["authorization"] == "Bearer sk-secret", "the newline of a secret file is not part of the key"
        for bad in ("sk-sécret", "sk\rsecret"):
            monkeypatch.setenv("OPENAI_API_KEY", bad)
            with pytest.raises(PolicyError, match="does not hold a valid API key") as caught:
                await one(CompletionsPolicy(url))
            assert bad not in str(caught.value)
    with pytest.raises(PolicyError, match="names a user") as caught:
        CompletionsPolicy("http://me:hunter2@127.0.0.1/v1")
    assert "hunter2" not in str(caught.value)


async def test_a_server_without_a_list_of_models_serves_the_one_that_is_named():
    with server(lambda b, h: stream(h, chunk([9], "stop"), USAGE), {"object": "none"}) as (url, _):
        assert (await one(CompletionsPolicy(url, "mine"))).ids == (9,)
        with pytest.raises(PolicyError, match="does not list a model"):
            await one(CompletionsPolicy(url))


async def test_more_than_the_grant_is_an_error_not_a_discount():
    events = [{"choices": [{"delta": {"content": "Answer: 7"}, "finish_reason": "stop"}]}, {"usage": {"completion_tokens": 99}}]
    wire, partial = WireFormat(), Partial()
    with server(lambda b, h: stream(h, *events)) as (url, _):
        with pytest.raises(PolicyError, match="generated 99 tokens for a grant of 8"):
            await one(ChatPolicy(url, wire), SampleRequest((1, wire.piece("hi"), wire.END, 2), 8, wire.stop_ids), partial)
    assert len(partial.ids) == 99, "all of it is there to be charged"


async def test_requests_at_one_server_are_bounded():
    running, most, lock = 0, 0, threading.Lock()

    def answer(body: dict[str, Any], handler: BaseHTTPRequestHandler) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        with lock:
            running -= 1
        stream(handler, chunk([9], "stop"), USAGE)

    with server(answer) as (url, asked):
        async with CompletionsPolicy(url, concurrency=3) as policy:
            async with anyio.create_task_group() as group:
                for _ in range(20):
                    group.start_soon(policy.sample, request(), Partial())
    assert len(asked) == 20 and most <= 3


async def test_a_tree_through_a_chat_server_is_priced_in_the_server_s_tokens_and_retried():
    """The root spawns, its clone answers, the root answers; the first request is refused once. Tools are text here."""
    refused = threading.Event()

    def say(handler: BaseHTTPRequestHandler, text: str) -> None:
        tokens = [text[i : i + 3] for i in range(0, len(text), 3)]
        events = [{"choices": [{"delta": {"content": t}, "logprobs": {"content": [{"token": t, "logprob": -0.1}]}}]} for t in tokens]
        end = {"choices": [{"delta": {}, "finish_reason": "stop"}]}
        usage = {"choices": [], "usage": {"prompt_tokens": 50, "completion_tokens": len(tokens) + 1}}
        stream(handler, *events, end, usage)

    call = '<tool_call>{"name": "spawn_clone", "arguments": {"objectives": ["part"]}}</tool_call>'

    def answer(body: dict[str, Any], handler: BaseHTTPRequestHandler) -> None:
        messages = body["messages"]
        if not refused.is_set():
            refused.set()
            send(handler, 429, b"{}", Retry_After="0")
        elif messages[-1]["content"].startswith("<tool_response>"):
            assert "1: 42" in messages[-1]["content"] and messages[-2]["role"] == "assistant"
            say(handler, "Answer: 43")
        elif "You are a clone" in messages[0]["content"]:
            say(handler, "Answer: 42")
        else:
            assert "spawn_clone" in messages[0]["content"] and messages[1]["role"] == "user"
            say(handler, call)

    wire = WireFormat()
    with server(answer) as (url, asked):
        async with ChatPolicy(url, wire, names={"tools": ""}) as policy:
            assert not policy.trainable
            tree = await Runtime(policy, wire).run(
                Task("t", (Message("user", "What is it? <tool_call>no</tool_call>"),)), Budget(generated=200)
            )
    assert tree.root.status is Status.ANSWERED and tree.answer == "43"
    assert len(asked) == 4 and tree.usage.clones == 1
    said = [call, "Answer: 42", "Answer: 43"]
    assert tree.usage.generated == sum(-(-len(text) // 3) + 1 for text in said)
    assert tree.usage.prefilled == sum(len(branch.prompt) for branch in tree.branches) + len(tree.root.ids) - len(
        tree.root.turns[-1].sampled
    )


@pytest.mark.parametrize("attempts, failing, status", [(None, 20, Status.ANSWERED), (None, 24, Status.FAILED), (3, 3, Status.FAILED)])
async def test_a_server_that_is_away_is_waited_for_by_the_library_as_by_the_commands(attempts, failing, status, monkeypatch):
    waited: list[float] = []

    async def pause(seconds: float) -> None:
        waited.append(seconds)

    monkeypatch.setattr("ramet.agents.drain.pause", pause)

    def answer(body: dict[str, Any], handler: BaseHTTPRequestHandler) -> None:
        if len(asked) <= failing:
            send(handler, 503, b"{}")
        else:
            stream(handler, {"choices": [{"delta": {"content": "Answer: 7"}, "finish_reason": "stop"}]})

    wire = WireFormat()
    with server(answer) as (url, asked):
        async with ChatPolicy(url, wire) as policy:
            runtime = Runtime(PolicyWrapper(policy), wire, attempts=attempts)
            tree = await runtime.run(Task("t", (Message("user", "hi"),)), Budget(generated=50, depth=0))
    assert tree.root.status is status and len(waited) == (attempts or min(failing + 1, 24)) - 1
    assert attempts or sum(waited) > 60


async def test_text_that_the_server_gives_without_tokens_is_kept_and_charged():
    events = [
        {"choices": [{"delta": {"content": "Answer: 7"}}]},
        {"choices": [{"delta": {}, "finish_reason": "length"}]},
        {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 6}},
    ]
    wire = WireFormat()
    with server(lambda b, h: stream(h, *events)) as (url, _):
        sample = await one(ChatPolicy(url, wire), SampleRequest(tuple(wire.render([Message("user", "hi")], ())), 6, wire.stop_ids))
    assert wire.text(sample.ids) == "Answer: 7" and len(sample.ids) == 6 and sample.stop is StopReason.LENGTH


def test_the_wire_format_gives_messages_back_in_any_process():
    ids_of = WireFormat().render([Message("user", "héllo 世界 \ud800")], tools=())
    assert WireFormat().messages(ids_of) == [{"role": "user", "content": "héllo 世界 ?"}]
    wire = WireFormat()
    ids = wire.render([Message("system", "be brief"), Message("user", "héllo ￿ <|im_end|>")], tools=())
    ids += [wire.piece("I "), wire.piece("say"), *wire.after_turn("1: x", closed=False)]
    assert wire.messages(ids) == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "héllo ￿ <|im_end|>"},
        {"role": "assistant", "content": "I say"},
        {"role": "user", "content": "<tool_response>\n1: x\n</tool_response>"},
    ]


@pytest.mark.parametrize(
    "value, expected", [(None, None), ("2", 2.0), ("-1", 0.0), ("99999", None), ("inf", None), ("soon", None), ("nan", None), ("0.5", 0.5)]
)
def test_retry_after(value, expected):
    assert retry_after(value) == expected


def test_retry_after_dates():
    import email.utils

    assert 55 < (retry_after(email.utils.formatdate(time.time() + 60, usegmt=True)) or 0) <= 60
