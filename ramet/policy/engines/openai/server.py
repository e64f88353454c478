"""A connection to one OpenAI-compatible server: waiting for it, sending requests, reading answers, interpreting errors."""

from __future__ import annotations

import json
import logging
import os
import re
import ssl
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Protocol, Self

import anyio
import httpx

from ramet.agents import drain
from ramet.agents.sampling import Partial, Sample, SampleRequest
from ramet.agents.tasks import Slots
from ramet.agents.tree import StopReason
from ramet.errors import EventTooLong, PolicyError, RefusedRequest, TransientPolicyError, first_line
from ramet.policy.engines.openai.chunk import Chunk, ServerUsage, parse_chunk, stop_of
from ramet.policy.engines.openai.client import Address, connected, resolved
from ramet.policy.engines.openai.faults import Masker, error_in, error_text, failure, is_page, is_transient, one_line, wait_of
from ramet.policy.engines.openai.fields import Fields, names_field
from ramet.policy.engines.openai.stream import MAX_CHARACTERS, EventReader, ServerSentEvent

log = logging.getLogger(__name__)

AFTER_FINISH = 2.0
"""Seconds to wait for usage after the finish reason."""
AFTER_DONE = 0.1
"""Seconds to wait for the end of the body after `[DONE]`, so that the connection can be reused."""
MAX_IDLE = 10_000
"""Events in a row without anything sampled that are read."""
QUIET = 10.0
"""The least number of seconds between two log lines about failures that are retried."""
_PAGE = 2**16
"""Bytes of an error's body that are read; it may be a page of any length."""
_SHAPE = (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)
WIRE = (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL, OSError, ValueError, OverflowError)
REJECTED = (400, 404, 415, 422, 500, 501)
"""Statuses with which servers refuse unknown fields."""
NEUTRAL = {
    "vllm": {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
    "sglang": {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
    "llamacpp": {"top_k": -1, "min_p": 0.0, "repeat_penalty": 1.0},
    "me": {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0},
    "openai": {}, "openai-internal": {}, "system": {}, "library": {},
}  # fmt: skip
"""Fields that keep a server's own defaults, or the model's `generation_config`, out of sampling; by the model's `owned_by`.

"me" is llama-cpp-python, "library" Ollama.
"""


class Accumulator(Protocol):
    """Adds the chunks of an answer to a partial sample. Raises `PolicyError`, without the server's name, for an invalid answer."""

    def take(self, chunk: Chunk) -> None:
        """Add a chunk."""

    def settle(self) -> None:
        """Note that no chunk follows."""


class Server(ABC):
    """A connection to one server. Enter it to serve.

    url          up to and including the version, such as http://127.0.0.1:8000/v1
    model        the server's name for it; by default the first that it lists
    concurrency  requests in flight at this server
    seconds      longest time without an event before a request counts as failed; keep-alive comments are not events
    context      longest prompt and sample together, in tokens; by default the server's `max_model_len`, if it lists one
    key          name of the environment variable of the API key; it may be unset
    wait         seconds to wait for a server that is not up yet
    names        the server's own names of fields; an empty name leaves a field out
    extra        additional fields to send
    headers      additional headers to send; a value that begins with "$" names the environment variable that holds it
    fold_system  put the system message into the first user message

    Raises `PolicyError` for invalid settings.
    """

    trainable = False
    attempts = 24
    """So that one that is restarted has three minutes or more."""
    path: str
    optional: tuple[str, ...] = ()
    """Fields that may be renamed, or left out if the server refuses them."""
    guessed: Mapping[str, Any] = {}
    """Additional fields for a server of unknown kind, to keep its own defaults out of sampling."""
    neutral: Mapping[str, Mapping[str, Any]] = NEUTRAL
    """The same for servers of a known kind, by `owned_by`."""

    def __init__(
        self, url: str, model: str | None = None, *, concurrency: int = 64, seconds: float = 300.0, context: int | None = None,
        key: str = "OPENAI_API_KEY", wait: float = 180.0, names: Mapping[str, str] | None = None, extra: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None, fold_system: bool = False,
    ) -> None:  # fmt: skip
        if concurrency < 1 or not seconds > 0 or not wait >= 0:
            raise PolicyError(
                f"concurrency {concurrency}, seconds {seconds:g}, wait {wait:g}: concurrency and seconds must be above 0, wait not below"
            )
        self._address = Address(url, key)
        self._url = self._address.shown
        self.version = 0
        self.model = model or ""
        self._seconds, self._context, self._wait = seconds, context, wait
        self._key, self._headers = key, dict(headers or {})
        self._fields = Fields(names or {}, extra or {}, self.optional)
        self._fields.fold_system = fold_system
        self._neutral: Mapping[str, Any] = self.guessed
        self._mask = Masker(())
        self._slots, self._concurrency = Slots(concurrency), concurrency
        self._client: httpx.AsyncClient | None = None
        self._listed: list[str] = []
        self._failures, self._shown = 0, float("-inf")
        self._served = False

    @property
    def context(self) -> int | None:
        """The longest prompt and sample together, in tokens; None if the server does not say."""
        return self._context

    async def __aenter__(self) -> Self:
        secret = os.environ.get(self._key, "").strip()
        if not (secret.isascii() and secret.isprintable()):
            raise PolicyError(f"the environment variable {self._key} does not hold a valid API key")
        headers = httpx.Headers({"Accept-Encoding": "identity", **({"Authorization": f"Bearer {secret}"} if secret else {})})
        own = resolved(self._headers)
        headers.update(own)
        self._mask = Masker([*self._address.secrets(secret), *(value for value in own.values() if len(value) >= 8)])
        self._url = self._mask(self._address.shown)
        self._client = connected(headers, self._concurrency)
        try:
            await self._wait_until_up()
        except BaseException:
            await self._client.aclose()
            self._client = None
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    async def _wait_until_up(self) -> None:
        """Request the list of models until the server answers. Raises `PolicyError`, or `Drained` if the run is asked to stop."""
        until, pause = anyio.current_time() + self._wait, 0.25
        warned = False
        while True:
            try:
                await self._discover()
                return
            except TransientPolicyError as error:
                if anyio.current_time() + pause > until:
                    raise PolicyError(f"no OpenAI-compatible server answers at {error}") from error
                if not warned:
                    log.warning("no server answers yet: %s; waiting at most %.0f seconds for it", error, self._wait)
                    warned = True
                await drain.pause(pause)
                pause = min(2 * pause, 4.0)

    async def _discover(self) -> None:
        """Learn the model's name and context from the server's list. Raises `PolicyError` if it lists none and none is named."""
        assert self._client is not None
        patience = min(self._seconds, 30.0)
        try:
            reply = await self._whole("GET", "models", patience)
        except httpx.DecodingError:
            reply = httpx.Response(200)  # a list that cannot be read
        except WIRE as error:
            raise self._broken(error) from error
        if reply is None:
            raise TransientPolicyError(f"{self._url}: no list of models within {patience:g} seconds")
        if reply.status_code in (502, 503, 504, 429) or (reply.status_code == 500 and not self.model):
            raise self.refusal(reply, reply.text)
        listed = _models(reply.text if reply.status_code == 200 else "")
        if not listed and self.model:
            return  # without a list; the first request shows whether it has the model
        self._listed = list(listed)
        if not listed and not reply.is_success:
            raise PolicyError(f"{self.refusal(reply, reply.text)}; no model is named, and it lists none")
        if not listed:
            note = self._note(reply.status_code, reply.text)
            raise PolicyError(f"{self._url} does not list a model; name the one to use{note}")
        self.model = self.model or self._chosen()
        entry = listed.get(self.model, {})
        owner = str(entry.get("owned_by") or next(iter(listed.values())).get("owned_by"))
        self._neutral = self.neutral.get(owner, self.guessed)
        length = entry.get("max_model_len")
        self._context = self._context or (length if type(length) is int and length > 0 else None)

    async def _whole(self, method: str, path: str, seconds: float, body: Any = None) -> httpx.Response | None:
        """A reply that is not streamed, of at most `MAX_CHARACTERS` bytes; None if it is not whole within these seconds."""
        assert self._client is not None
        content, whole = bytearray(), False
        with anyio.move_on_after(seconds) as scope:
            async with self._client.stream(method, self._address.at(path), json=body) as reply:
                async for block in reply.aiter_bytes():
                    content += block[: MAX_CHARACTERS - len(content)]
                    if len(content) >= MAX_CHARACTERS:
                        scope.cancel()
                whole = True
        if not whole and len(content) < MAX_CHARACTERS:
            return None
        plain = {name: value for name, value in reply.headers.items() if name not in ("content-encoding", "content-length")}
        return httpx.Response(reply.status_code, headers=plain, content=bytes(content))

    def _chosen(self) -> str:
        """The model to use if none is named."""
        return self._listed[0]

    async def sample(self, request: SampleRequest, partial: Partial) -> Sample:
        """Sample one turn; see `ramet.agents.sampling.Policy`."""
        if self._client is None:
            raise PolicyError("the policy is not serving: use `async with policy`")
        if request.media:
            raise PolicyError("this policy has no vision; it does not accept media")
        await self._slots.acquire()
        try:
            stop = await self._sampled(request, partial)
        except TransientPolicyError as error:
            self._warn(error)
            raise
        finally:
            self._slots.release()
        self._served = True
        return Sample(tuple(partial.ids), tuple(partial.logprobs), stop, partial.prefilled, partial.cached, self.version)

    async def _sampled(self, request: SampleRequest, partial: Partial) -> StopReason:
        """Send the request, and send it again without a field that the server refuses and that can be left out."""
        while True:
            body = self._complete_body(request)
            exchange = Exchange(self, request, partial)
            try:
                return await exchange.run(body)
            except PolicyError as error:
                too_long = isinstance(error, RefusedRequest)
                if partial.ids or too_long or not exchange.refused or not self._adapted(exchange, body, request):
                    raise await self._explained(error, exchange) from error.__cause__

    def _complete_body(self, request: SampleRequest) -> dict[str, Any]:
        """The body of a request, under the server's own names of fields."""
        return self._fields.body({"model": self.model, "stream": True, **self._neutral, **self._body(request)})

    def _adapted(self, exchange: Exchange, sent: Mapping[str, Any], request: SampleRequest) -> bool:
        """Whether the request would now be sent otherwise than the refused body `sent`; changes the fields if that helps."""
        if self._complete_body(request) != sent:
            return True  # the fields have changed since, for another request
        change = self._fields.adapt(exchange.refused, exchange.param, sent, (*self.optional, *self._neutral))
        guesses = self.guessed.keys() & sent.keys() if self._neutral is self.guessed else set()
        if not change and guesses and not self._served and not names_field(exchange.refused, exchange.param, sent):
            self._neutral = {}
            change = f"refuses a request: {', '.join(sorted(guesses))} are left out, and its own defaults apply"
        if change:
            log.warning("%s %s", self._url, change)
        return bool(change)

    async def _explained(self, error: PolicyError, exchange: Exchange) -> PolicyError:
        """The error to raise instead of `error`, with what else is known."""
        if exchange.status == 404 and self._listed and self.model not in self._listed:
            return PolicyError(f"{error}; it lists {self._names()}")
        return error

    def _names(self, limit: int = 10) -> str:
        """The names of the first models that the server lists, on one line."""
        names = ", ".join(one_line(self._mask(name), 100) for name in self._listed[:limit])
        return names + (f" and {len(self._listed) - limit} more" if len(self._listed) > limit else "")

    def _warn(self, error: TransientPolicyError) -> None:
        """Log a failure that may be retried, at most one line every `QUIET` seconds."""
        self._failures += 1
        now = anyio.current_time()
        if now - self._shown >= QUIET:
            self._shown = now
            log.warning("%s (retried, since it may pass; %d such failures so far)", error, self._failures)

    def _broken(self, error: Exception) -> PolicyError:
        """The error to raise for a failure of the connection."""
        kind, causes = type(error).__name__, [error, *_causes(error)]
        message = next((line for cause in causes if (line := one_line(self._mask(str(cause))))), "")
        line = f"{self._url}: {kind}{f' {message}' if message else ''}{self._through()}"
        passing = isinstance(error, (httpx.HTTPError, httpx.StreamError)) and not isinstance(
            error, (httpx.LocalProtocolError, httpx.UnsupportedProtocol)
        )
        words = ("illegal status line", "Name or service not known", "nodename nor servname", "No address associated", "407 Proxy")
        lasting = any(isinstance(cause, ssl.SSLError) for cause in causes) or any(word in message for word in words)
        return TransientPolicyError(line) if passing and (self._served or not lasting) else PolicyError(line)

    def _through(self) -> str:
        return f" (through the proxy in {proxy})" if (proxy := self._address.proxy) else ""

    def _note(self, status: int, text: str) -> str:
        """A hint, to append to a message, if the reply is not one of a server of this kind."""
        notes = []
        if not self._address.versioned and (status in (404, 405) or is_page(text)):
            notes.append("is /v1 missing at the end of the address?")
        elif is_page(text):
            notes.append("this is not an API: is the address right, or did a proxy answer?")
        if self._address.proxy and (status in (403, 407) or status >= 500 or is_page(text)):
            notes.append(f"it came through the proxy in {self._address.proxy}")
        return "; " + "; ".join(notes) if notes else ""

    def kind_of(self, reply: httpx.Response) -> str:
        """The content type of a reply, for messages."""
        return one_line(self._mask(reply.headers.get("content-type", "")), 60) or "no content type"

    def refusal(self, reply: httpx.Response, text: str) -> PolicyError:
        """The error to raise for the status and body of a failed reply."""
        status, note = reply.status_code, f" ({self.kind_of(reply)}){self._note(reply.status_code, text)}"
        if 300 <= status < 400:
            target = one_line(self._mask(str(reply.headers.get("location") or "nowhere")), 200)
            return PolicyError(f"{self._url} answers {status}: it redirects to {target}; give that address{note}")
        return failure(self._url, text, parsed(text), status, wait_of(reply.headers), self._mask, note)

    def reported(self, event: ServerSentEvent, value: Any, note: str) -> PolicyError:
        """The error to raise for an error inside a stream."""
        return failure(self._url, event.text, value, None, None, self._mask, note)

    def no_stream(self, event: ServerSentEvent, status: int, note: str) -> PolicyError:
        """The error to raise for a body that is neither a stream nor an answer."""
        message = one_line(self._mask(error_text(event.text)))
        quoted = message if is_page(event.text) else repr(message)
        line = f"{self._url} answers with {quoted} instead of a stream{note}{self._note(status, event.text)}"
        transient = not is_page(event.text) and is_transient(None, event.text, message)
        return TransientPolicyError(line) if transient else PolicyError(line)

    @abstractmethod
    def _body(self, request: SampleRequest) -> dict[str, Any]:
        """The fields of a request, under their usual names."""

    def reader(self) -> Callable[[Mapping[str, Any]], Chunk]:
        """What turns the events of one answer into chunks."""
        return parse_chunk

    @abstractmethod
    def accumulator(self, request: SampleRequest, partial: Partial) -> Accumulator:
        """A new accumulator for the answer to a request."""


def note_prompt(usage: ServerUsage | None, prompt: int, partial: Partial) -> None:
    """Note how many of `prompt` prompt tokens were cached and how many computed; all were computed if the server does not say."""
    if usage is not None and usage.cached is not None:
        partial.cached = min(max(usage.cached, partial.cached), prompt)
    partial.prefilled = prompt - partial.cached


class Exchange:
    """One request and its answer.

    The body is always read to its end or cancelled from within: abandoning httpx's generator would leave it open.
    """

    def __init__(self, server: Server, request: SampleRequest, partial: Partial):
        self._server, self._partial, self._max_tokens = server, partial, request.max_tokens
        self._accumulator, self._chunk_of = server.accumulator(request, partial), server.reader()
        self._scope = anyio.CancelScope()
        self._finish: str | None = None
        self._over = self._sampled = False
        self._events = self._idle = self._reported = 0
        self._kind = ""
        self._unread: dict[str, None] = {}
        self._error: PolicyError | None = None
        self._sent: Mapping[str, Any] = {}
        self.status: int | None = None
        self.refused, self.param = "", None
        """The message of a refusal before anything was sampled, and the field that it names."""

    async def run(self, body: Mapping[str, Any]) -> StopReason:
        """Send the body and read the answer. However this ends, the partial sample contains what has arrived. Raises `PolicyError`."""
        server, self._sent = self._server, body
        failed: Exception | None = None
        self._set_deadline(server._seconds)
        with self._scope:
            try:
                await self._read(body)
            except WIRE as error:
                failed = error
        if self._error is None and self._finish is None:
            if failed is not None:
                self._error = server._broken(failed)
            elif self._scope.cancelled_caught:
                self._error = TransientPolicyError(f"{server._url}: nothing arrived for {server._seconds:g} seconds{server._through()}")
            else:
                self._error = TransientPolicyError(f"{server._url} ended a stream without a finish reason and without [DONE]{self._kind}")
        try:
            self._accumulator.settle()
        except PolicyError as error:
            raise PolicyError(f"{server._url} {error}") from None
        if self._error is not None:
            raise self._error from failed
        assert self._finish is not None
        stop = stop_of(self._finish)
        if stop is None:
            raise TransientPolicyError(f"{server._url} aborted a sample: {one_line(server._mask(self._finish), 60)}")
        if not self._sampled and self._unread:
            names = one_line(server._mask(", ".join(self._unread)), 100)
            raise PolicyError(f"{server._url} answers in an unknown form, with the fields {names}{self._kind}")
        if not self._sampled and not self._events:
            raise TransientPolicyError(f"{server._url} ended an empty stream{self._kind}")
        return stop

    def _set_deadline(self, seconds: float) -> None:
        """Cancel the exchange unless it is extended or ends within this time."""
        self._scope.deadline = anyio.current_time() + seconds

    def _end(self, error: PolicyError | None = None) -> None:
        self._error = self._error or error
        self._over = True
        self._scope.cancel()

    async def _read(self, body: Mapping[str, Any]) -> None:
        client = self._server._client
        assert client is not None
        async with client.stream("POST", self._server._address.at(self._server.path), json=body) as reply:
            self.status = reply.status_code
            self._kind = f" ({reply.status_code}, {self._server.kind_of(reply)})"
            if not reply.is_success:
                await self._read_refusal(reply)
                return
            reader = EventReader()
            async for block in reply.aiter_bytes():
                if not self._over:
                    self._take_all(reader, block)
            if not self._over:
                self._take_all(reader, None)

    async def _read_refusal(self, reply: httpx.Response) -> None:
        self._set_deadline(min(self._server._seconds, 10.0))
        page = b""
        try:
            async for block in reply.aiter_bytes():
                page += block[: _PAGE - len(page)]
                if len(page) >= _PAGE:
                    self._scope.cancel()
        except anyio.get_cancelled_exc_class():
            if not self._scope.cancel_called:
                raise
            self._refuse(reply, page)
            raise
        except (httpx.HTTPError, httpx.StreamError):
            pass  # the status says enough
        self._refuse(reply, page)

    def _refuse(self, reply: httpx.Response, page: bytes) -> None:
        text = page.decode("utf-8", "replace")
        self._error = self._server.refusal(reply, text)
        if reply.status_code in REJECTED or (reply.status_code == 403 and names_field(error_text(text), None, self._sent)):
            self._note_refusal(text, parsed(text))

    def _note_refusal(self, text: str, value: Any) -> None:
        self.refused = error_text(text) if value is None else text
        inner = value.get("error") if isinstance(value, dict) else None
        self.param = inner.get("param") if isinstance(inner, dict) else None

    def _take_all(self, reader: EventReader, block: bytes | None) -> None:
        try:
            for event in reader.close() if block is None else reader.feed(block):
                if not self._over:
                    self._take(event)
        except EventTooLong as error:
            self._end(PolicyError(f"{self._server._url} sends {error}{self._kind}"))

    def _take(self, event: ServerSentEvent) -> None:
        server = self._server
        if event.done:
            # Without a finish reason, a sample of max_tokens tokens was cut.
            self._finish = self._finish or ("length" if len(self._partial.ids) >= self._max_tokens else "stop")
            self._over = True
            self._set_deadline(AFTER_DONE)
            return
        reported = None if self._finish else error_in(event)
        if reported is not None:
            if not self._partial.ids:
                self._note_refusal(event.text, reported)
            self._end(server.reported(event, reported, self._kind))
            return
        if event.value is None:
            if self._finish is None and event.kind == "body":
                self._end(server.no_stream(event, self.status or 200, self._kind))
            elif self._finish is None and event.kind != "ping" and event.text.strip() not in ("null", "[]"):
                line = one_line(server._mask(event.text), 200)
                kind = TransientPolicyError if is_transient(None, event.text, line) else PolicyError
                self._end(kind(f"{server._url} sends an event that is not JSON: {line!r}{self._kind}"))
            return
        try:
            chunk = self._chunk_of(event.value)
            if self._finish is not None:
                chunk = Chunk(usage=chunk.usage)  # the answer is complete; its usage may follow
            self._accumulator.take(chunk)
        except _SHAPE as error:
            if self._finish is None:
                line = one_line(server._mask(first_line(error)))
                self._end(PolicyError(f"{server._url} sends an event that does not follow the protocol: {line}{self._kind}"))
            return
        except PolicyError as error:
            self._end(PolicyError(f"{server._url} {error}"))
            return
        self._sampled, self._events = self._sampled or chunk.sampled, self._events + 1
        self._unread.update(dict.fromkeys(chunk.unread[:8]))
        if self._finish is None:
            self._note_progress(chunk)
        if chunk.finish is not None and self._finish is None:
            self._finish = chunk.finish
            self._set_deadline(AFTER_FINISH)


    def _note_progress(self, chunk: Chunk) -> None:
        """Extend the deadline if the chunk adds to the answer. Events that add nothing are borne with up to `MAX_IDLE` in a row."""
        generated = (chunk.usage.generated or 0) if chunk.usage is not None else 0
        if chunk.sampled or chunk.finish or generated > self._reported:
            self._reported, self._idle = max(generated, self._reported), 0
            self._set_deadline(self._server._seconds)
            return
        self._idle += 1
        if self._idle > MAX_IDLE:
            self._end(PolicyError(f"{self._server._url} sends {self._idle} events in a row that add nothing to the answer{self._kind}"))


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The causes of an error, nearest first: the outer errors of a connection often have no message."""
    while (cause := error.__cause__ or error.__context__) is not None:
        yield cause
        error = cause


def parsed(text: str) -> Any:
    """The text as JSON; None if it is not JSON."""
    try:
        return json.loads(text) if re.match(r"\s*[\[{\"]", text) else None
    except (ValueError, RecursionError):
        return None


def _models(text: str) -> dict[str, dict[str, Any]]:
    """The entries of a list of models, by name."""
    value = parsed(text)
    listed = value.get("data") or value.get("models") if isinstance(value, dict) else value
    entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    names = [(entry.get("id") or entry.get("name"), entry) for entry in entries]
    return {name: entry for name, entry in names if isinstance(name, str)}
