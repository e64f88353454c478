"""What servers say when they fail: on one line, without the key, and asked again only if it may pass."""

from __future__ import annotations

import json
import re
import socket
import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ramet.agents.sampling import Partial, SampleRequest
from ramet.agents.tree import Message
from ramet.errors import Drained, PolicyError, RefusedRequest, TransientPolicyError
from ramet.policy.engines.openai import ChatPolicy, CompletionsPolicy, WireFormat, retry_after
from ramet.policy.engines.openai.faults import Masker, one_line
from tests.policy.raw_server import HEAD, MODELS, bound, reply, says, serve, stream, usage

pytestmark = pytest.mark.anyio
WIRE = WireFormat()
PROMPT = tuple(WIRE.render([Message("system", "be brief"), Message("user", "hi")], tools=()))
KEY = "sk-local-0123456789abcdefghijklmnopqrstuvwxyz0123456789"
GOOD = stream(says("Answer: "), says("42"), says("", "stop"), usage(4))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def ask(url: str, kind: Any = ChatPolicy, **options: Any) -> str:
    """What a server at this address answers."""
    policy = kind(url, WIRE, **options) if kind is ChatPolicy else kind(url, **options)
    async with policy:
        sample = await policy.sample(SampleRequest(PROMPT, 100, WIRE.stop_ids, 7), Partial())
    return WIRE.text(sample.ids)


async def error_of(answer: Any, models: Any = MODELS, kind: Any = ChatPolicy, path: str = "/v1", **options: Any) -> PolicyError:
    with serve(answer, models) as (url, _), pytest.raises(PolicyError) as caught:
        await ask(url.removesuffix("/v1") + path, kind, **options)
    line = str(caught.value)
    assert "\n" not in line and line.isprintable() and len(line) < 1200, line
    return caught.value


def failed(status: str, message: Any = "oh", **more: Any) -> bytes:
    return reply(json.dumps({"error": {"message": message, **more}}).encode(), status)


PAGE = b"<!DOCTYPE html>\n<html><head><title>Sign in</title>\n<style>a {}</style></head>\n<body>\n<h1>Please</h1>\n</body></html>\n"


@pytest.mark.parametrize(
    "answer, kind, said",
    [
        (failed("501 Not Implemented"), PolicyError, "501: oh"),
        (failed("500 Internal Server Error"), TransientPolicyError, "500: oh"),
        (failed("529 Overloaded"), TransientPolicyError, "529: oh"),
        (failed("408 Request Timeout"), TransientPolicyError, "408: oh"),
        (failed("429 Too Many Requests", code="insufficient_quota"), PolicyError, "429: oh"),
        (failed("404 Not Found"), PolicyError, "404: oh"),
        (failed("413 Payload Too Large", "This model's maximum context length is 10 tokens"), RefusedRequest, "maximum context length"),
        (failed("500 Error", "Requested tokens (600) exceed context window of 512"), RefusedRequest, "exceed context window"),
        (failed("429 Too Many Requests", "too many tokens a minute"), TransientPolicyError, "too many tokens"),
        (stream({"error": {"message": "the request exceeds the available context size"}}), RefusedRequest, "exceeds the available"),
        (reply(b"", "307 Temporary Redirect", more="Location: http://there/v1/\r\n"), PolicyError, "307: it redirects to http://there/v1/"),
        (reply(b'{"detail": [{"loc": ["body", "n"], "msg": "odd"}]}', "422 No"), PolicyError, "422: body.n: odd"),
        (reply(PAGE, "502 Bad Gateway", "text/html"), TransientPolicyError, r"502: a web page \(Sign in; Please\)"),
        (reply(PAGE, kind="text/html"), PolicyError, r"a web page \(Sign in; Please\).*did a proxy answer"),
        (reply(b"Unauthorized", kind="text/plain"), PolicyError, "'Unauthorized' instead of a stream"),
        (reply(b'{\n "error": {\n  "message": "bad",\n  "code": 400\n }\n}'), PolicyError, "stream: bad"),
        (reply(b'{"object": "error", "message": "no such model", "type": "NotFoundError", "code": 404}'), PolicyError, "no such model"),
        (reply(b"upstream timed out\nsee\nthe\nlog", kind="text/plain"), TransientPolicyError, "upstream timed out see the log"),
        (stream({"error": {"message": "bad field", "code": 400}}), PolicyError, "bad field"),
        (stream({"error": {"message": "bad field", "type": "BadRequestError"}}), PolicyError, "bad field"),
        (stream({"error": {"message": "maximum context length is 10", "code": 400}}), RefusedRequest, "maximum context"),
        (stream({"error": "invalid api key"}), PolicyError, "invalid api key"),
        (stream({"object": "error", "message": "bad", "code": 400}), PolicyError, "bad"),
        (stream(b'error: {"message": "bad", "code": "400"}\n\n'), PolicyError, "bad"),
        (stream(b"event: error\ndata: {\"message\": \"bad\", \"status\": 401}\n\n"), PolicyError, "bad"),
        (stream(says("ab"), b'{"error": {"message": "bad", "code": 400}}\n'), PolicyError, "bad"),
        (stream(says("ab"), {"choices": [{"error": {"code": 502, "message": "gone"}}]}), TransientPolicyError, "gone"),
        (stream({"error": {"message": "busy", "code": 503}}), TransientPolicyError, "busy"),
        (stream({"error": {"message": "the engine died", "type": "InternalServerError"}}), TransientPolicyError, "the engine died"),
        (stream({"error": {"message": "slow down", "type": "rate_limit_exceeded"}}), TransientPolicyError, "slow down"),
        (stream(b"data: Unauthorized\n\n"), PolicyError, "not JSON: 'Unauthorized'"),
        (stream(says("x"), b'data: {"cho', done=False), TransientPolicyError, "not JSON"),
        (stream(done=False), TransientPolicyError, "without a finish reason"),
        (HEAD + b"Content-Encoding: gzip\r\nConnection: close\r\n\r\nnot gzip", TransientPolicyError, "DecodingError"),
        (HEAD.replace(b"200 OK", b"999 Odd") + b"\r\n", PolicyError, ""),
        (b"nothing that is HTTP\r\n\r\n", PolicyError, "illegal status line"),
        (b"", TransientPolicyError, "Server disconnected"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", TransientPolicyError, "RemoteProtocolError"),
    ],
)  # fmt: skip
async def test_what_may_pass_is_told_from_what_will_not(answer, kind, said):
    error = await error_of(answer)
    if said:
        assert type(error) is kind and re.search(said, str(error)), repr(error)


async def test_a_server_that_nobody_named_is_said_in_words():
    page = reply(PAGE, "404 Not Found", "text/html")
    assert "is /v1 missing" in str(await error_of(page, page, path=""))
    assert "is /v1 missing" in str(await error_of(page, page, path="", model="m"))
    assert "is /v1 missing" not in str(await error_of(page, page))


def leaked(line: str, secret: str = KEY) -> int:
    """The longest part of a secret in a line."""
    return max(n for n in range(len(secret) + 1) if any(secret[i : i + n] in line for i in range(len(secret) - n + 1)))


@pytest.mark.parametrize(
    "answer",
    [
        failed("401 Unauthorized", f"Incorrect API key provided: {KEY}"),
        failed("401 Unauthorized", "x" * 260 + KEY),
        reply(b"<h1>" + b"x" * 160 + KEY.encode() + b"</h1>", "401 Unauthorized", "text/html"),
        reply(b"", "307 Temporary Redirect", more=f"Location: http://there/?key={KEY}\r\n"),
        stream({"error": {"message": f"bad key {KEY}", "code": 401}}),
        stream(b"data: bad key " + KEY.encode()[:50] + b"\n\n"),
        stream(b"data: bad key " + KEY.encode()[20:] + b"\n\n"),
        stream(says("", f"error {KEY}")),
        stream(says("", "abort", role=KEY)),
        stream({"choices": [{"delta": {"content": {KEY: 1}}}]}),
        stream({"choices": [{"token_ids": [KEY]}]}),
        reply(KEY.encode(), kind="text/plain"),
    ],
)
async def test_the_key_is_never_said(answer, monkeypatch, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serve(answer) as (url, _):
        try:
            await ask(url)
        except PolicyError as error:
            assert leaked(str(error)) < 8
    assert leaked(caplog.text) < 8


async def test_a_key_in_the_address_is_never_said(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serve(failed("401 Unauthorized", f"no user {KEY}")) as (url, asked):
        with pytest.raises(PolicyError) as caught:
            await ask(f"{url}?key={KEY}&api-version=7")
        assert asked[0]["path"] == f"/v1/chat/completions?key={KEY}&api-version=7"
    assert leaked(str(caught.value)) < 8 and leaked(repr(caught.value)) < 8
    for address in (f"ftp://h/?key={KEY}", f"http://u:{KEY}@h:port/v1", f"http://u:{KEY}@h/v1"):
        with pytest.raises(PolicyError) as caught:
            ChatPolicy(address, WIRE)
        assert leaked(str(caught.value)) < 8


@settings(max_examples=200)
@given(st.text(min_size=4, max_size=60), st.text(max_size=40), st.text(max_size=40), st.data())
def test_no_long_part_of_a_secret_passes_the_mask(secret, before, after, data):
    start = data.draw(st.integers(0, len(secret) - 1))
    end = data.draw(st.integers(start + 1, len(secret)))
    said = Masker([secret])(before + secret[start:end] + after)
    run = len(secret) if len(secret) < 8 else min(8, max(len(secret) // 2, 4))
    assert not any(secret[i : i + run] in part for part in said.split("...") for i in range(len(secret) - run + 1))
    assert Masker([secret])(secret) == "..."


def test_lines_are_lines():
    assert one_line("a\n b\x1b[31m\tc\u2028d\x00") == "a b [31m c d"
    assert len(one_line("x" * 10**6)) < 310


@pytest.mark.parametrize("said", ["Wed, 21 Oct 2015 07:28:00", "Wed, 99 Foo 2015", "1e400", "inf", "", "Wed, 21 Oct 9999 07:28:00 GMT",
                                  "Wed, 01 Jan 0001 00:00:00 +2359", "0", "-5", "1s", "86400", "٣"])  # fmt: skip
def test_no_retry_after_is_an_error_or_absurd(said):
    assert 0 <= (retry_after(said) or 0) <= 600


REFUSALS = [
    lambda name: failed("400 Bad Request", f"Unsupported parameter: '{name}'", param=name, code="unsupported_parameter"),
    lambda name: failed("400 Bad Request", f"Unknown field {name}"),
    lambda name: reply(json.dumps({"detail": [{"loc": ["body", name], "msg": "Extra inputs are not permitted"}]}).encode(), "422 No"),
    lambda name: failed("403 Forbidden", f"You are not allowed to request {name} from this model"),
    lambda name: stream({"error": {"message": f"{name}: not supported by this model", "code": 400}}),
]  # fmt: skip


@pytest.mark.parametrize("name", ["max_tokens", "logprobs", "seed", "stream_options", "top_p", "temperature"])
@pytest.mark.parametrize("refusal", REFUSALS)
async def test_a_field_that_the_server_refuses_is_left_out_and_said(name, refusal, caplog):
    def answer(body: dict[str, Any], connection: socket.socket, asked: Any) -> None:
        connection.sendall(refusal(name) if name in body else GOOD)

    with serve(answer) as (url, asked):
        assert await ask(url) == "Answer: 42"
    assert len(asked) == 2 and [line for line in caplog.messages if f"does not accept {name}" in line]
    assert ("max_completion_tokens" in asked[1]) is (name == "max_tokens")


async def test_fields_can_be_named_left_out_and_added():
    with serve(GOOD) as (url, asked):
        await ask(url, names={"max_tokens": "max_new_tokens", "seed": "", "logprobs": ""}, extra={"reasoning_effort": "low"})
    assert "max_tokens" not in asked[0] and "seed" not in asked[0] and "logprobs" not in asked[0]
    assert asked[0]["max_new_tokens"] == 100 and asked[0]["reasoning_effort"] == "low"
    with pytest.raises(PolicyError, match="nothing else enforces the budget"):
        ChatPolicy("http://h/v1", WIRE, names={"max_tokens": ""})
    with pytest.raises(PolicyError, match="no field 'maxtokens' to rename"):
        ChatPolicy("http://h/v1", WIRE, names={"maxtokens": "max_new_tokens"})


async def test_headers_are_sent_and_what_the_environment_holds_is_never_said(monkeypatch):
    monkeypatch.setenv("GATEWAY", f"{KEY}\n")
    seen: list[str] = []

    def answer(body: dict[str, Any], connection: socket.socket, asked: Any) -> None:
        seen.append(asked[-1]["headers"]["x-key"])
        connection.sendall(failed("403 Forbidden", f"{KEY} may not") if len(seen) > 1 else GOOD)

    headers = {"X-Key": "$GATEWAY", "x-team": "red", "authorization": "Basic eA=="}
    with serve(answer) as (url, asked):
        assert await ask(url, headers=headers) == "Answer: 42"
        with pytest.raises(PolicyError, match="403") as caught:
            await ask(url, headers=headers)
    assert seen == [KEY, KEY] and leaked(str(caught.value)) < 8
    assert (asked[0]["headers"]["x-team"], asked[0]["headers"]["authorization"]) == ("red", "Basic eA==")
    bad = {"no such": "x", "Content-Length": "7", "x": "a\r\nb", "y": "$NOT_THERE", "": "x", "z": "\u00e9"}
    for name, value in bad.items():
        with pytest.raises(PolicyError, match="header"):
            await ask(url, headers={name: value})


async def test_no_additional_field_replaces_what_each_request_sets():
    for name in ("max_tokens", "max_completion_tokens", "messages", "model", "n", "tools", "limit"):
        with pytest.raises(PolicyError, match=f"{name} cannot be an additional field"):
            ChatPolicy("http://h/v1", WIRE, names={"max_tokens": "limit"}, extra={name: 1})
    whole = reply(json.dumps({"choices": [{"message": {"content": "Answer: 42"}, "finish_reason": "stop"}]}).encode())
    for options in ({"extra": {"stream": False}}, {"names": {"stream": ""}}):
        with serve(whole) as (url, asked):
            assert await ask(url, **options) == "Answer: 42"
        assert not asked[0].get("stream") and "stream_options" not in asked[0]


async def test_a_server_that_does_not_stream_is_asked_not_to():
    def answer(body: dict[str, Any], connection: socket.socket, asked: Any) -> None:
        whole = json.dumps({"choices": [{"message": {"content": "Answer: 42"}, "finish_reason": "stop"}]}, indent=1).encode()
        refused = "stream" in body or "stream_options" in body
        connection.sendall(failed("400 Bad Request", "stream is not supported") if refused else reply(whole))

    with serve(answer) as (url, asked):
        assert await ask(url) == "Answer: 42"
    assert len(asked) == 2


async def test_an_address_may_name_the_endpoint():
    with serve(GOOD) as (url, asked):
        assert await ask(f"{url}/chat/completions/") == await ask(f"{url}/") == "Answer: 42"
    assert {body["path"] for body in asked} == {"/v1/chat/completions"}


async def test_a_value_that_is_refused_is_no_reason_to_leave_a_field_out():
    def answer(body: dict[str, Any], connection: socket.socket, asked: Any) -> None:
        connection.sendall(failed("400 Bad Request", "max_tokens is too large: 100; temperature is fine"))

    with serve(answer) as (url, asked), pytest.raises(PolicyError, match="max_tokens is too large"):
        await ask(url)
    assert len(asked) == 1


async def test_a_value_that_changes_nothing_is_left_out_where_it_is_refused():
    def answer(body: dict[str, Any], connection: socket.socket, asked: Any) -> None:
        refused = failed("422 No", "Input validation error: `top_p` must be > 0.0 and < 1.0")
        connection.sendall(refused if "top_p" in body else GOOD)

    with serve(answer) as (url, asked):
        assert await ask(url) == "Answer: 42"
    assert len(asked) == 2


async def test_a_server_that_refuses_both_names_of_the_limit_is_given_up():
    def answer(body: dict[str, Any], connection: socket.socket, asked: Any) -> None:
        name = "max_tokens" if "max_tokens" in body else "max_completion_tokens"
        connection.sendall(failed("400 Bad Request", f"Unsupported parameter: {name}"))

    with serve(answer) as (url, asked), pytest.raises(PolicyError, match="Unsupported parameter: max_completion_tokens"):
        await ask(url)
    assert len(asked) == 2


async def test_a_system_message_is_folded_where_it_is_refused_or_asked_for():
    def answer(body: dict[str, Any], connection: socket.socket, asked: Any) -> None:
        refused = body["messages"][0]["role"] == "system"
        connection.sendall(failed("400 Bad Request", "System role not supported") if refused else GOOD)

    for options in ({}, {"fold_system": True}):
        with serve(answer) as (url, asked):
            assert await ask(url, **options) == "Answer: 42"
        assert asked[-1]["messages"] == [{"role": "user", "content": "be brief\n\nhi"}] and len(asked) == 2 - len(options)


def test_a_turn_without_text_is_no_message():
    ids = [*PROMPT, WIRE.piece(""), *WIRE.after_turn("Answer now.", closed=False)]
    assert WIRE.messages(ids) == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi\n\n<tool_response>\nAnswer now.\n</tool_response>"},
    ]


NEUTRAL_FIELDS = ("top_k", "min_p", "repetition_penalty", "repeat_penalty")


@pytest.mark.parametrize(
    "owner, off, penalties",
    [("vllm", -1, {"repetition_penalty"}), ("llamacpp", -1, {"repeat_penalty"}), ("me", 0, {"repeat_penalty"}), ("openai", None, set()),
     ("library", None, set()), (None, -1, {"repetition_penalty", "repeat_penalty"}),
     ("acme", -1, {"repetition_penalty", "repeat_penalty"})],
)  # fmt: skip
async def test_defaults_of_the_server_do_not_change_the_sampling(owner, off, penalties):
    with serve(GOOD, {"data": [{"id": "m", "owned_by": owner}]}) as (url, asked):
        await ask(url)
    neutral = {name: asked[0][name] for name in NEUTRAL_FIELDS if name in asked[0]}
    assert neutral == ({"top_k": off, "min_p": 0.0, **dict.fromkeys(penalties, 1.0)} if penalties else {})


@pytest.mark.parametrize(
    "status, said",
    [
        ("400 Bad Request", "Unrecognized request argument supplied: {}"), ("422 Unprocessable Entity", "body.{}: out of range"),
        ("400 Bad Request", "invalid body"), ("500 Internal Server Error", "unmarshal"),
    ],
)  # fmt: skip
async def test_what_is_guessed_of_a_server_keeps_no_request_from_it_and_is_said_once(status, said, caplog):
    def answer(body: dict[str, Any], connection: socket.socket, asked: Any) -> None:
        found = next((name for name in NEUTRAL_FIELDS if name in body), None)
        connection.sendall(failed(status, said.format(found)) if found else GOOD)

    with serve(answer) as (url, asked):
        async with ChatPolicy(url, WIRE) as policy:
            for _ in range(3):
                await policy.sample(SampleRequest(PROMPT, 100, WIRE.stop_ids, 7), Partial())
    assert len(asked) == (3 + 4 if "{}" in said else 3 + 1)
    lines = [record.message for record in caplog.records]
    assert len(lines) == len(asked) - 3 and all("left out" in line for line in lines) and all(f in "".join(lines) for f in NEUTRAL_FIELDS)


async def test_a_prompt_that_is_too_long_is_no_reason_to_leave_a_guess_out():
    with serve(failed("400 Bad Request", "maximum context length is 10 tokens")) as (url, asked), pytest.raises(RefusedRequest):
        await ask(url)
    assert len(asked) == 1 and asked[0]["min_p"] == 0.0


@pytest.mark.parametrize("listed", [["llama3.2:latest"], ["/models/q.gguf"], ["a/b", "c"], ["openai/*"], []])
async def test_a_model_that_is_served_need_not_be_listed(listed):
    with serve(GOOD, {"data": [{"id": name} for name in listed]}) as (url, asked):
        assert await ask(url, model="llama3.2") == "Answer: 42"
    assert asked[0]["model"] == "llama3.2"


@pytest.mark.parametrize("models", [HEAD + b"Content-Encoding: gzip\r\nConnection: close\r\n\r\nno", reply(b"[1, {}]"), reply(b"{" * 10**5),
                                    reply(b"{}", "403 Forbidden"), reply(b"\xff\xfe", kind="text/plain; charset=odd")])  # fmt: skip
async def test_a_list_of_models_that_cannot_be_read_is_none(models):
    with serve(GOOD, models) as (url, _):
        assert await ask(url, model="m") == "Answer: 42"
    assert re.search("does not list a model|it lists none", str(await error_of(GOOD, models)))


async def test_why_there_is_no_list_of_models_is_said():
    error = await error_of(GOOD, failed("401 Unauthorized", "no such key"))
    assert "401: no such key (application/json); no model is named, and it lists none" in str(error)


async def test_a_port_that_speaks_otherwise_is_no_server_that_is_not_up_yet():
    assert "no OpenAI" not in str(await error_of(GOOD, b"SSH-2.0-OpenSSH\r\n\r\n", wait=0))
    listener = bound()
    listener.listen()

    def plain() -> None:
        connection, _ = listener.accept()
        connection.recv(1)  # of what a client says that wants to speak TLS
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    threading.Thread(target=plain, daemon=True).start()
    with listener, pytest.raises(PolicyError, match="SSL") as caught:
        await ask(f"https://127.0.0.1:{listener.getsockname()[1]}/v1", wait=0)
    assert "no OpenAI" not in str(caught.value)


async def test_a_long_list_of_models_is_cut():
    many = {"data": [{"id": f"vendor/model-number-{i}"} for i in range(400)]}
    error = await error_of(failed("404 Not Found", "no model nope"), many, model="nope")
    assert "model-number-9 and 390 more" in str(error)
    assert "lists 400 models; name the one" in str(await error_of(GOOD, many, kind=CompletionsPolicy))


@pytest.mark.parametrize(
    "event",
    [
        {"type": "response.output_text.delta", "delta": "Answer: 42"},
        {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "Answer: 42"}},
        {"candidates": [{"content": {"parts": [{"text": "Answer: 42"}]}}]},
        {"response": "Answer: 42", "done": True},
        {"choices": [{"delta": {"role": "assistant", "audio": {"transcript": "Answer: 42"}}, "finish_reason": "stop"}]},
    ],
)
async def test_an_answer_in_an_unknown_form_is_no_empty_answer(event):
    assert "in an unknown form" in str(await error_of(stream(event)))


async def test_an_empty_answer_is_one():
    assert type(await error_of(stream())) is TransientPolicyError
    with serve(stream(says("", "stop"), usage(1))) as (url, _):
        assert await ask(url) == ""
    empty = stream({"choices": [{"text": "", "finish_reason": "stop"}]})
    assert "without a token id; use the chat backend" in str(await error_of(empty, kind=CompletionsPolicy))


async def test_a_server_that_takes_no_token_ids_is_found_out_at_once():
    """Some refuse them with an error that would otherwise be tried again."""

    def answer(body: dict[str, Any], connection: socket.socket, asked: Any) -> None:
        words = isinstance(body["prompt"], str)
        connection.sendall(reply(b'{"choices": [{"text": "x"}]}') if words else failed("500 Internal Server Error", "unmarshal"))

    with serve(answer) as (url, asked), pytest.raises(PolicyError, match="refuses token ids, use the chat backend") as caught:
        await ask(url, CompletionsPolicy)
    assert type(caught.value) is PolicyError and len(asked) == 2
    assert type(await error_of(failed("500 Internal Server Error"), kind=CompletionsPolicy)) is TransientPolicyError

    def short(body: dict[str, Any], connection: socket.socket, asked: Any) -> None:
        words = isinstance(body["prompt"], str)
        connection.sendall(reply(b'{"choices": [{"text": "x"}]}') if words else failed("400 Bad Request", "the prompt is too long"))

    assert type(await error_of(short, kind=CompletionsPolicy)) is RefusedRequest


async def test_comments_are_silence():
    def answer(body: dict[str, Any], connection: socket.socket, asked: Any) -> None:
        connection.sendall(stream(done=False))
        connection.settimeout(0.02)
        while True:
            connection.sendall(b": keep-alive\n\ndata:\n\n")
            try:
                assert not connection.recv(1)
                return
            except TimeoutError:
                pass

    assert "nothing arrived for 0.2 seconds" in str(await error_of(answer, seconds=0.2))


async def test_a_server_that_is_not_up_yet_is_waited_for(monkeypatch, caplog):
    listener = bound()
    waited: list[float] = []
    with serve_later(listener, waited, monkeypatch) as url:
        assert await ask(url()) == "Answer: 42"
    assert len(waited) == 2 and [line for line in caplog.messages if "no server answers yet" in line]
    with pytest.raises(PolicyError, match="no OpenAI-compatible server answers at"):
        await ask("http://127.0.0.1:9/v1", wait=0)


class serve_later:
    """A server that is up once it has been waited for twice."""

    def __init__(self, listener: socket.socket, waited: list[float], monkeypatch: Any):
        self._listener, self._waited = listener, waited
        self._serving = serve(GOOD, listener=listener)
        monkeypatch.setattr("ramet.agents.drain.pause", self._pause)

    async def _pause(self, seconds: float) -> None:
        self._waited.append(seconds)
        if len(self._waited) == 2:
            self._serving.__enter__()

    def __enter__(self) -> Any:
        return lambda: f"http://127.0.0.1:{self._listener.getsockname()[1]}/v1"

    def __exit__(self, *error: Any) -> None:
        self._serving.__exit__(None, None, None)


async def test_nothing_is_waited_for_once_the_process_is_to_stop(monkeypatch):
    from ramet.agents import drain

    monkeypatch.setattr(drain, "_requested", True)
    with pytest.raises(Drained):
        await ask("http://127.0.0.1:9/v1")


@pytest.mark.parametrize(
    "variable, value",
    [("ALL_PROXY", "socks5://me:hunter22@h:1"), ("HTTP_PROXY", "foo://h"), ("NO_PROXY", "[::1]"), ("HTTPS_PROXY", "http://h:port"),
     ("SSL_CERT_FILE", "/no/such/file"), ("NO_PROXY", "2001:db8::/32")],
)  # fmt: skip
async def test_the_variable_that_keeps_a_client_from_being_made_is_named(variable, value, monkeypatch):
    for name in ("ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv(variable, value)
    with pytest.raises(PolicyError, match=f"environment variable {variable} ") as caught:
        await ask("http://127.0.0.1:9/v1", wait=0)
    assert "hunter22" not in str(caught.value)


async def test_a_proxy_that_answers_is_named(monkeypatch):
    for name in ("no_proxy", "NO_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    page = reply(PAGE, "503 Service Unavailable", "text/html")
    with serve(page, page) as (url, _):
        monkeypatch.setenv("HTTP_PROXY", url.removesuffix("/v1"))
        with pytest.raises(PolicyError, match="through the proxy in HTTP_PROXY"):
            await ask("http://model.example/v1", wait=0)


@pytest.mark.parametrize("address", ["http://h:99999/v1", "http://[::1/v1", "http://h:abc/v1", "http://exa mple/v1", "http:///v1", "http://h:0/v1",
                                     "http://" + "a" * 300 + "/v1", "http://a..b/v1", "localhost:8000", "", "http://\x00/v1"])  # fmt: skip
def test_what_is_no_address_is_refused(address):
    with pytest.raises(PolicyError, match="is not the address of a server"):
        ChatPolicy(address, WIRE)


def test_long_prompts_are_read_in_one_go():
    """Work grows with the text, not with its square: pieces are joined once."""
    text = "word " * 60_000
    ids = WIRE.render([Message("user", text)], ())
    assert WIRE.messages(ids) == [{"role": "user", "content": text}]
    copied: list[int] = []

    class Counted(WireFormat):
        def text(self, ids: Any) -> str:
            copied.append(len(ids))
            return super().text(ids)

    Counted().messages(ids)
    assert sum(copied) <= len(ids)
