"""`ramet serve` over real sockets: the official client, hostile requests, clients that go away, draining."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from ramet.agents.budget import Budget
from ramet.agents.runtime import Runtime
from ramet.agents.scripted import Fault, PlainFormat, ScriptedPolicy
from ramet.agents.tools import tool
from ramet.errors import ConfigError, PolicyError, RefusedRequest
from ramet.runs.serving.server import DelegationService

MOST = Budget(generated=2000, depth=1, answer_reserve=24)
SPAWN = '<tool_call>{"name":"spawn_clone","arguments":{"objectives":["left","right"]}}</tool_call>\0'


def model(context: str) -> str:
    """A root that asks two clones and answers with what they told it; it says how many characters of documents it read, if asked to."""
    if not context.startswith("T"):
        return "Answer: seven\0"
    if "<1: " in context:
        return "Answer: twice seven, said slowly\0"
    if "read it" in context:
        call = '<tool_call>{"name":"read","arguments":{"keys":["*"]}}</tool_call>\0'
        return f"Answer: {context.partition('<a.txt: ')[2].partition(chr(10))[0]}\0" if "<a.txt: " in context else call
    if "alone" in context:
        return "I think.\nAnswer: forty-two\0"
    return SPAWN


@dataclass
class Running:
    """A server, and what it does."""

    url: str
    policy: ScriptedPolicy
    service: DelegationService
    server: uvicorn.Server

    def client(self, **options: Any) -> openai.OpenAI:
        """The official client."""
        return openai.OpenAI(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, **options})

    def post(self, path: str = "/v1/chat/completions", **body: Any) -> httpx.Response:
        """A request of its own making."""
        return httpx.post(f"{self.url}{path}", timeout=30, **body)


@contextmanager
def running(program: Callable[[str], str] = model, token: str = "", tools: Any = (), **options: Any) -> Iterator[Running]:
    """A server on a port of its own."""
    given = {name: options.pop(name) for name in ("at_once", "waiting", "kept", "budget") if name in options}
    policy = ScriptedPolicy(program, **options)

    @asynccontextmanager
    async def opened() -> AsyncIterator[Runtime]:
        yield Runtime(policy, PlainFormat(), tools=tools)

    service = DelegationService(opened, "team", given.pop("budget", MOST), token, **given)
    bound = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(service.app(), log_level="critical"))
    thread = threading.Thread(target=server.run, args=([bound],))
    thread.start()
    try:
        until(lambda: server.started)
        yield Running(f"http://127.0.0.1:{bound.getsockname()[1]}", policy, service, server)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for a condition."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)


def ask(text: str = "What is it?") -> dict[str, Any]:
    return {"model": "team", "messages": [{"role": "user", "content": text}]}


def test_the_official_client_delegates_without_a_change():
    with running() as served:
        client = served.client()
        assert [model.id for model in client.models.list()] == ["team"]
        reply = client.chat.completions.create(**ask(), max_completion_tokens=500)
        assert reply.choices[0].message.content == "twice seven, said slowly" and reply.choices[0].finish_reason == "stop"
        clones = 2 * len("Answer: seven$")
        assert reply.usage.completion_tokens == len(SPAWN) + clones + len("Answer: twice seven, said slowly$")
        tree = httpx.get(f"{served.url}/v1/trees/{reply.id}").json()
        assert "seven" in tree["text"] and tree["id"] == reply.id and tree["tree"]["usage"]["clones"] == 2
        whole = client.responses.create(model="team", input="What is it?", instructions="Be brief.")
        assert whole.output_text == "twice seven, said slowly" and whole.status == "completed"
        assert whole.usage.output_tokens == reply.usage.completion_tokens


def test_the_answer_streams_and_clones_tell_what_they_do_where_asked_for():
    with running(delay=0.004) as served:
        client = served.client()
        stream = client.chat.completions.create(
            **ask(), stream=True, stream_options={"include_usage": True}, extra_body={"progress": True}
        )
        chunks = [*stream]
        texts = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
        told = "".join(getattr(c.choices[0].delta, "reasoning_content", None) or "" for c in chunks if c.choices)
        assert "".join(texts) == "twice seven, said slowly" and len(texts) > 1, "more than one piece"
        assert "clone 0 begins: left" in told and "clone 1 answered: seven" in told
        assert chunks[-1].usage.completion_tokens > 0 and chunks[-2].choices[0].finish_reason == "stop"
        quiet = [*client.chat.completions.create(**ask("alone?"), stream=True)]
        assert "".join(c.choices[0].delta.content or "" for c in quiet) == "forty-two"
        with client.responses.stream(model="team", input="What is it?", extra_body={"progress": True}) as events:
            kinds = [event.type for event in events]
            final = events.get_final_response()
        assert final.output_text == "twice seven, said slowly" and "response.reasoning_summary_text.delta" in kinds
        assert kinds.count("response.output_text.delta") > 1 and kinds[-1] == "response.completed"


def test_another_answer_in_the_same_turn_follows_the_one_that_was_streamed():
    with running(lambda context: "Answer: wrong, I see\nNo.\nAnswer: right\0", delay=0.004) as served:
        chunks = [*served.client().chat.completions.create(**ask(), stream=True)]
        text = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert text.splitlines()[-1] == "right" and text.startswith("wrong")


def test_documents_come_in_a_field_or_as_files_and_the_tree_reads_them():
    with running() as served:
        client = served.client()
        reply = client.chat.completions.create(**ask("read it"), extra_body={"documents": {"a.txt": "blue"}})
        assert reply.choices[0].message.content == "blue"
        data = "data:text/plain;base64," + base64.b64encode("grün".encode()).decode()
        content = [{"type": "text", "text": "read it"}, {"type": "file", "file": {"filename": "a.txt", "file_data": data}}]
        reply = client.chat.completions.create(model="team", messages=[{"role": "user", "content": content}])
        assert reply.choices[0].message.content == "grün"
        parts = [{"type": "input_text", "text": "read it"}, {"type": "input_file", "filename": "a.txt", "file_data": data}]
        assert client.responses.create(model="team", input=[{"role": "user", "content": parts}]).output_text == "grün"


def test_a_response_is_gone_on_with():
    with running() as served:
        client = served.client()
        first = client.responses.create(model="team", input="What is it?")
        second = client.responses.create(model="team", input="and alone?", previous_response_id=first.id)
        tree = httpx.get(f"{served.url}/v1/trees/{second.id}").json()
        assert second.output_text == "twice seven, said slowly" and "and alone?" in tree["text"] and "left" in tree["text"]


def test_a_request_has_no_more_than_the_server_s_budget():
    with running(lambda context: "x" * 5000, budget=Budget(generated=300, depth=0)) as served:
        client = served.client()
        for extra, most in [({}, 300), ({"max_tokens": 50}, 50), ({"max_completion_tokens": 10_000}, 300)]:
            reply = client.chat.completions.create(**ask(), **extra)
            assert reply.usage.completion_tokens <= most and reply.choices[0].finish_reason == "length"
        reply = client.chat.completions.create(**ask(), extra_body={"budget": {"generated": 40, "depth": 5, "turns": 1}})
        assert reply.usage.completion_tokens <= 40
        assert client.responses.create(model="team", input="x", max_output_tokens=30).incomplete_details.reason == "max_output_tokens"


def test_64_clients_at_once_a_third_of_which_hang_up():
    with running(delay=0.001, stride=4, at_once=8, waiting=64) as served:

        def one(number: int) -> str | None:
            if number % 3:
                reply = served.client(timeout=60).chat.completions.create(**ask())
                return reply.choices[0].message.content
            if number % 2:
                with httpx.stream("POST", f"{served.url}/v1/chat/completions", json=ask() | {"stream": True}, timeout=60) as response:
                    next(response.iter_lines())
                return None
            with suppress(httpx.TimeoutException):
                httpx.post(f"{served.url}/v1/chat/completions", json=ask(), timeout=0.05)
            return None

        with ThreadPoolExecutor(64) as pool:
            replies = [*pool.map(one, range(64))]
        assert [reply for number, reply in enumerate(replies) if number % 3] == ["twice seven, said slowly"] * 42
        until(lambda: served.service.inside == 0 and served.policy.running == 0)
        assert served.client().chat.completions.create(**ask("alone?")).choices[0].message.content == "forty-two"


@contextmanager
def sent(url: str, body: dict[str, Any]) -> Iterator[None]:
    """A request that was sent and is not answered yet; then its client goes away."""
    host, _, port = url.removeprefix("http://").partition(":")
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    with socket.create_connection((host, int(port)), 10) as connection:
        connection.sendall(head.encode() + data)
        yield


def stuck(request: Any, attempt: int) -> Fault:
    """A model that does not end."""
    return Fault(0, 3600.0)


def test_a_client_that_goes_away_cancels_its_tree():
    with running(faults=stuck) as served:
        for stream in (True, False):
            with sent(served.url, ask() | {"stream": stream}):
                until(lambda: served.policy.running == 1)
            until(lambda: served.policy.running == 0 and served.service.inside == 0)


def test_too_many_are_sent_away():
    with running(faults=stuck, at_once=1, waiting=1) as served:
        with sent(served.url, ask()), sent(served.url, ask()):
            until(lambda: served.service.inside == 2)
            reply = served.post(json=ask())
            assert reply.status_code == 429 and reply.headers["retry-after"] and reply.json()["error"]["type"] == "rate_limit_error"
            assert served.policy.most_running == 1
        until(lambda: served.service.inside == 0)


def test_those_who_wait_have_their_turn():
    with running(at_once=1, waiting=8) as served, ThreadPoolExecutor(6) as pool:
        replies = [*pool.map(lambda _: served.post(json=ask("alone?")).json(), range(6))]
        assert {reply["choices"][0]["message"]["content"] for reply in replies} == {"forty-two"} and served.policy.most_running == 1


def test_a_server_that_is_stopped_finishes_what_is_running():
    with running(delay=0.01) as served, ThreadPoolExecutor(1) as pool:
        reply = pool.submit(served.post, json=ask("alone?"))
        until(lambda: served.policy.running == 1)
        served.server.should_exit = True  # what SIGTERM sets
        assert reply.result().json()["choices"][0]["message"]["content"] == "forty-two"


def test_only_who_has_the_token_is_served():
    secret = "s" * 16
    with running(token=secret) as served:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Bearer \u00e9".encode("latin-1")}):
            for request in (("GET", "/v1/models"), ("GET", "/v1/trees/x"), ("POST", "/v1/chat/completions"), ("POST", "/v1/responses")):
                reply = httpx.request(*request[:1], f"{served.url}{request[1]}", headers=headers)
                assert reply.status_code == 401 and reply.json()["error"]["type"] == "authentication_error"
        with pytest.raises(openai.AuthenticationError):
            served.client().models.list()
        assert served.client(api_key=secret).chat.completions.create(**ask("alone?")).choices[0].message.content == "forty-two"
    with running() as served:
        elsewhere = httpx.get(f"{served.url}/v1/models", headers={"host": "evil.example"})
        assert elsewhere.status_code == 403 and elsewhere.json()["error"]["type"] == "permission_error"
        assert served.post(json=ask(), headers={"host": "evil.example"}).status_code == 403
    with pytest.raises(ConfigError, match="16 characters"):
        DelegationService(lambda: None, "team", MOST, "short")


HOSTILE: list[tuple[dict[str, Any], int, str]] = [
    ({"content": b"{", "headers": {"content-type": "application/json"}}, 400, "no JSON"),
    ({"content": b"[" * 100_000, "headers": {"content-type": "application/json"}}, 400, "no JSON"),
    ({"content": json.dumps(ask()).encode(), "headers": {"content-type": "text/plain"}}, 415, "content-type"),
    ({"content": b"x", "headers": {"content-type": "application/json", "content-encoding": "gzip"}}, 415, "compressed"),
    ({"content": b"x", "headers": {"content-type": "application/json", "content-length": "9999999999"}}, 413, "at most"),
    ({"json": []}, 400, "body"),
    ({"json": {"messages": []}}, 400, "messages"),
    ({"json": ask() | {"messages": [{"role": "king", "content": "x"}]}}, 400, "messages.0.role"),
    ({"json": ask() | {"messages": [{"role": "assistant", "content": "x"}]}}, 400, "last message"),
    ({"json": ask("  ")}, 400, "empty"),
    ({"json": ask() | {"n": 3}}, 400, "one answer"),
    ({"json": ask() | {"tools": [{"type": "function"}]}}, 400, "tools"),
    ({"json": ask() | {"stop": ["a"]}}, 400, "stop"),
    ({"json": ask() | {"response_format": {"type": "json_object"}}}, 400, "response_format"),
    ({"json": ask() | {"temperature": -1}}, 400, "temperature"),
    ({"json": ask() | {"max_completion_tokens": 0}}, 400, "max_completion_tokens"),
    ({"json": ask() | {"budget": {"tokens": 4}}}, 400, "budget.tokens"),
    ({"json": ask() | {"budget": {"generated": -4}}}, 400, "budget.generated"),
    ({"json": ask() | {"budget": {"seconds": "soon"}}}, 400, "budget.seconds"),
    ({"json": ask() | {"documents": {"a": 4}}}, 400, "documents.a"),
    ({"json": ask() | {"documents": {"a": "x", "A ": "y"}}}, 400, "differ only in case"),
    ({"json": ask() | {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}}, 400, "image_url"),
    ({"json": ask() | {"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_id": "f"}}]}]}}, 400, "filename"),
    ({"content": json.dumps(ask("\ud800")).encode(), "headers": {"content-type": "application/json"}}, 422, "surrogates"),
]


def test_what_is_hostile_is_refused_in_openai_s_form_and_the_server_goes_on():
    with running() as served:
        for body, status, says_so in HOSTILE:
            if "content-length" in body.get("headers", {}):
                reply = raw(served.url, b"content-length: 9999999999\r\ncontent-type: application/json\r\n\r\n")
                assert b" 413 " in reply
                continue
            reply = served.post(**body)
            error = reply.json()["error"]
            assert (reply.status_code, says_so in error["message"]) == (status, True), (body, reply.text)
            assert error["type"] == "invalid_request_error" and error["code"] == status
        assert served.post("/v1/responses", json={"input": "x", "previous_response_id": "resp_0"}).status_code == 404
        assert served.post("/v1/elsewhere", json={}).status_code == 404
        assert httpx.get(f"{served.url}/v1/trees/%2e%2e").status_code == 404
        assert served.client().chat.completions.create(**ask("alone?")).choices[0].message.content == "forty-two"


def raw(url: str, rest: bytes) -> bytes:
    """The beginning of the reply to a request that no client writes."""
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), 10) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n" + rest)
        return connection.recv(200)


@pytest.mark.parametrize(("error", "status"), [(PolicyError("the GPU fell off"), 502), (RefusedRequest("too long"), 400)])
def test_a_model_that_fails_is_an_error_and_never_an_empty_answer(error: PolicyError, status: int):
    with running(faults=lambda request, attempt: Fault(0, 0.0, error)) as served:
        client = served.client()
        with pytest.raises(openai.APIStatusError) as caught:
            client.chat.completions.create(**ask())
        assert caught.value.status_code == status and str(error) in str(caught.value)
        with pytest.raises(openai.APIError, match=str(error)):
            [*client.chat.completions.create(**ask(), stream=True)]


def test_a_tool_runs_here_and_what_a_bug_raises_is_not_told():
    @tool
    def twice(n: int) -> int:
        """Twice a number."""
        return 2 * n

    def calling(context: str) -> str:
        if "bug" in context:
            raise KeyError("/home/somebody/secret")
        return "Answer: 42\0" if "<42" in context else '<tool_call>{"name":"twice","arguments":{"n":21}}</tool_call>\0'

    with running(calling, tools=[twice]) as served:
        told = served.client().chat.completions.create(**ask(), stream=True, extra_body={"progress": True})
        assert "twice" in "".join(getattr(c.choices[0].delta, "reasoning_content", None) or "" for c in told if c.choices)
        reply = served.post(json=ask("bug"))
        assert reply.status_code == 500 and "secret" not in reply.text
        assert served.client().chat.completions.create(**ask()).choices[0].message.content == "42"


def test_the_latest_trees_are_kept_and_no_more():
    with running(kept=2) as served:
        ids = [served.client().chat.completions.create(**ask("alone?")).id for _ in range(3)]
        assert [httpx.get(f"{served.url}/v1/trees/{name}").status_code for name in ids] == [404, 200, 200]
