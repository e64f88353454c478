"""OpenAI-compatible servers as policies.

`CompletionsPolicy` speaks token ids with servers that take and return them (vLLM, SGLang-type): what is sampled is what is
recorded. `ChatPolicy` speaks messages with any chat server; its ids are made here (`WireFormat`), so its trees can be priced,
compared and resumed, but not trained (`trainable`).

Both stream, so that a request that is cancelled or cut off is charged what had come. Refused connections, 429 and 5xx raise
`TransientPolicyError` with the server's Retry-After, which the runtime honours; everything else that fails is final. The API
key is read from an environment variable and stands in no message, log or journal.
"""

from __future__ import annotations

import email.utils
import json
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Self

import httpx

from ramet.agents.chat import ParsedTurn, See, blind, parse_spelled, tool_preamble
from ramet.agents.sampling import Partial, Sample, SampleRequest
from ramet.agents.tasks import Slots
from ramet.agents.tree import Message, StopReason
from ramet.errors import PolicyError, TransientPolicyError, first_line

STOPS = {"stop": StopReason.END, "content_filter": StopReason.END, "length": StopReason.LENGTH}
"""How servers say that a sample has ended. What a filter cut short is an answer: asking again would be cut again."""
MAX_LINE = 2**22
"""Bytes of one event of a stream; a server that sends more is not read on."""


class _Server(ABC):
    """A connection to one server. Enter it to serve.

    url          up to and including the version, such as http://127.0.0.1:8000/v1
    model        the server's name for it; by default the first that it lists
    concurrency  requests in flight at this server
    seconds      longest silence before a request counts as failed
    context      longest prompt and sample together; by default what the server says, if it does
    key          environment variable that holds the API key, if there is one
    """

    trainable = False
    path: str

    def __init__(
        self, url: str, model: str | None = None, *, concurrency: int = 64, seconds: float = 300.0, context: int | None = None,
        key: str = "OPENAI_API_KEY",
    ) -> None:  # fmt: skip
        if not url.startswith(("http://", "https://")):
            raise PolicyError(f"{url!r} is not the address of a server, such as http://127.0.0.1:8000/v1")
        if httpx.URL(url).userinfo:
            raise PolicyError(f"the address of the server names a user; put the key into the environment variable {key} instead")
        self.version = 0
        self.model = model or ""
        self._url, self._seconds, self._context = url.rstrip("/"), seconds, context
        self._key, self._secret = key, ""
        self._slots = Slots(concurrency)
        self._client: httpx.AsyncClient | None = None

    @property
    def context(self) -> int | None:
        return self._context

    async def __aenter__(self) -> Self:
        secret = os.environ.get(self._key, "").strip()
        if not (secret.isascii() and secret.isprintable()):
            raise PolicyError(f"the environment variable {self._key} holds what cannot be a key")
        self._secret = secret
        headers = {"Authorization": f"Bearer {secret}"} if secret else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        self._client = httpx.AsyncClient(headers=headers, timeout=self._seconds, limits=limits)
        if not self.model or self._context is None:
            try:
                await self._discover()
            except BaseException:
                await self._client.aclose()
                raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    async def _discover(self) -> None:
        """The model's name and context, from the server's list. A server without one has to be told about."""
        assert self._client is not None
        try:
            reply = await self._client.get(f"{self._url}/models")
        except httpx.HTTPError as error:
            raise PolicyError(f"no OpenAI-compatible server answers at {self._url}: {first_line(error)}") from error
        try:
            listed = {str(m["id"]): m for m in reply.json()["data"]} if reply.status_code == 200 else {}
        except (ValueError, KeyError, TypeError):
            listed = {}
        if not listed and self.model:
            return  # it has no list; the first request will tell whether it has the model
        if (self.model or next(iter(listed), "")) not in listed:
            names = ", ".join(listed)
            raise PolicyError(f"{self._url} (status {reply.status_code}) does not list {self.model or 'a model'}; it has {names or 'none'}")
        self.model = self.model or next(iter(listed))
        length = listed[self.model].get("max_model_len")
        self._context = self._context or (length if isinstance(length, int) and length > 0 else None)

    async def sample(self, request: SampleRequest, partial: Partial) -> Sample:
        """Sample one turn; see `ramet.agents.sampling.Policy`."""
        if self._client is None:
            raise PolicyError("the policy is not serving: use `async with policy`")
        if request.media:
            raise PolicyError("this policy has no vision; it cannot take media")
        await self._slots.acquire()
        try:
            finished = None
            async with self._events({"model": self.model, "stream": True, **self._body(request)}) as events:
                async for event in events:
                    try:
                        finished = self._take(event, request, partial) or finished
                    except (KeyError, TypeError, ValueError, AttributeError) as error:
                        raise PolicyError(f"{self._url} sends an event that is not as the protocol has it: {first_line(error)}") from error
        finally:
            self._slots.release()
        if finished not in STOPS:
            raise TransientPolicyError(f"{self._url} ended a stream with {finished!r}")
        return Sample(tuple(partial.ids), tuple(partial.logprobs), STOPS[finished], partial.prefilled, partial.cached, self.version)

    @abstractmethod
    def _body(self, request: SampleRequest) -> dict[str, Any]:
        """What the request asks of the server."""

    @abstractmethod
    def _take(self, event: Mapping[str, Any], request: SampleRequest, partial: Partial) -> str | None:
        """Note what an event brings; why the sample has ended, once it has."""

    @asynccontextmanager
    async def _events(self, body: dict[str, Any]) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
        assert self._client is not None
        try:
            async with self._client.stream("POST", f"{self._url}/{self.path}", json=body) as reply:
                if reply.status_code != 200:
                    raise self._refusal(reply, await _beginning(reply))
                yield self._decoded(reply)
        except (httpx.TransportError, httpx.StreamError) as error:
            raise TransientPolicyError(f"{self._url}: {type(error).__name__} {first_line(error)}") from error

    async def _decoded(self, reply: httpx.Response) -> AsyncIterator[dict[str, Any]]:
        """The JSON objects of a stream of server-sent events."""
        held = b""
        async for block in reply.aiter_bytes():
            held += block
            *lines, held = held.split(b"\n")
            if len(held) > MAX_LINE:
                raise PolicyError(f"{self._url} sends an event of more than {MAX_LINE} bytes")
            for line in lines:
                text = line.removeprefix(b"data:").strip()
                if not line.startswith(b"data:") or text == b"[DONE]":
                    continue
                try:
                    event = json.loads(text)
                except ValueError:
                    raise TransientPolicyError(f"{self._url} sends what is not JSON: {text[:60]!r}") from None
                if not isinstance(event, dict) or "error" in event:
                    raise TransientPolicyError(f"{self._url} reports an error in a stream: {text[:200]!r}")
                yield event

    def _usage(self, event: Mapping[str, Any], partial: Partial, prompt: int) -> None:
        """Prompt tokens computed and reused, of the `prompt` ids that were sent; all computed, where the server says nothing of reuse."""
        usage = event.get("usage")
        cached = int(((usage or {}).get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
        partial.cached = min(max(cached, 0), prompt)
        partial.prefilled = prompt - partial.cached

    def _refusal(self, reply: httpx.Response, body: bytes) -> PolicyError:
        try:
            said = json.loads(body)
            said = said.get("error", said)
            said = said.get("message", said) if isinstance(said, dict) else said
        except (ValueError, AttributeError, RecursionError):
            said = body[:200].decode("utf-8", "replace")
        text = f"{self._url} answers {reply.status_code}: {str(said).strip()[:300]}"
        if self._secret:
            text = text.replace(self._secret, "...")
        if reply.status_code in (408, 409, 429) or reply.status_code >= 500:
            return TransientPolicyError(text, retry_after(reply.headers.get("retry-after")))
        return PolicyError(text)


async def _beginning(reply: httpx.Response, most: int = 2**16) -> bytes:
    """The first bytes of a reply; an error may come with a page of any length."""
    body = b""
    async for block in reply.aiter_bytes():
        body += block
        if len(body) >= most:
            break
    return body[:most]


def _logprob(value: Any) -> float:
    """A log-probability. Raises `ValueError` for what is no finite number."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"a log-probability of {value!r}")
    return float(value)


def retry_after(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for: a number, or a date. At most an hour."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return min(max(seconds, 0.0), 3600.0) if seconds == seconds else None


class CompletionsPolicy(_Server):
    """Token ids to `/completions`, and back. For servers that return the ids that they sampled (`return_token_ids`).

    Log-probabilities are the server's: start vLLM with `--logprobs-mode processed_logprobs` for those of the sampling
    distribution at temperatures other than 0 and 1.
    """

    trainable = True
    path = "completions"

    def _body(self, request: SampleRequest) -> dict[str, Any]:
        asked = request.sampling
        return {
            "prompt": list(request.prompt), "max_tokens": request.max_tokens, "temperature": asked.temperature, "top_p": asked.top_p,
            "top_k": asked.top_k, "seed": request.seed % 2**63, "stop_token_ids": sorted(request.stop_ids), "ignore_eos": True,
            "logprobs": 0, "return_token_ids": True, "stream_options": {"include_usage": True},
        }  # fmt: skip

    def _take(self, event: Mapping[str, Any], request: SampleRequest, partial: Partial) -> str | None:
        finished = None
        for choice in event.get("choices") or ():
            ids = choice.get("token_ids")
            if ids is None:
                raise PolicyError(f"{self._url} does not return the token ids that it sampled; use the chat backend with it")
            logprobs = (choice.get("logprobs") or {}).get("token_logprobs") or []
            if len(logprobs) != len(ids):
                raise PolicyError(f"{self._url} returns {len(logprobs)} log-probabilities for {len(ids)} tokens")
            partial.ids += ids
            partial.logprobs += [0.0] * len(ids) if request.sampling.temperature == 0 else map(_logprob, logprobs)
            finished = choice.get("finish_reason")
        self._usage(event, partial, len(request.prompt))
        return finished


class WireFormat:
    """Messages as ids of our own: a few that mark roles, the others pieces of text. Tool calls are spelled Hermes tags.

    An id is the bytes of its piece, read as a number, so that a journal of ids can be read by any process. A prompt is cut into
    pieces of four characters, about a token each: limits on context and counts of prompt tokens are estimates.
    """

    ROLES = ("system", "user", "assistant", "tool")
    END = len(ROLES)
    see: See = staticmethod(blind)

    def __init__(self) -> None:
        self.stop_ids = frozenset({self.END})

    def piece(self, text: str) -> int:
        """The id of a piece of text."""
        return self.END + int.from_bytes(b"\1" + text.encode("utf-8", "replace"), "big")

    def _text(self, piece: int) -> str:
        number = piece - self.END
        return number.to_bytes((number.bit_length() + 7) // 8, "big")[1:].decode("utf-8", "replace") if number > 0 else ""

    def _content(self, role: str, text: str) -> list[int]:
        return [self.ROLES.index(role), *(self.piece(text[i : i + 4]) for i in range(0, len(text), 4)), self.END]

    def render(self, messages: Sequence[Message], tools: bool) -> list[int]:
        system = "\n\n".join(m.content for m in messages if m.role == "system")
        if tools:
            system = "\n\n".join(filter(None, [system, tool_preamble()]))
        ids = self._content("system", system) if system else []
        for message in messages:
            if message.role != "system":
                for segment in message.media:
                    self.see(segment)
                ids += self._content(message.role, message.content)
        return [*ids, self.ROLES.index("assistant")]

    def after_turn(self, text: str, closed: bool) -> list[int]:
        return [*([] if closed else [self.END]), *self._content("tool", text), self.ROLES.index("assistant")]

    def parse(self, sampled: Sequence[int]) -> ParsedTurn:
        return parse_spelled(self.text(sampled))

    def text(self, ids: Sequence[int]) -> str:
        return "".join(map(self._text, ids))

    def messages(self, ids: Sequence[int]) -> list[dict[str, str]]:
        """The messages that ids stand for. Tool results go as the user's, marked: servers differ in what else they take."""
        found: list[dict[str, str]] = []
        for i in ids:
            if i < self.END:
                found.append({"role": self.ROLES[i], "content": ""})
            elif i > self.END and found:
                found[-1]["content"] += self._text(i)
        if found and found[-1] == {"role": "assistant", "content": ""}:
            found.pop()
        for message in found:
            if message["role"] == "tool":
                message.update(role="user", content=f"<tool_response>\n{message['content']}\n</tool_response>")
        return found


class ChatPolicy(_Server):
    """Messages to `/chat/completions`. Every token that the server counts is one id; a sample's ids carry its text."""

    path = "chat/completions"

    def __init__(self, url: str, chat: WireFormat, model: str | None = None, **options: Any) -> None:
        super().__init__(url, model, **options)
        self._chat = chat

    def _body(self, request: SampleRequest) -> dict[str, Any]:
        asked = request.sampling
        extra = {"top_k": asked.top_k} if asked.top_k else {}
        return {
            "messages": self._chat.messages(request.prompt), "max_tokens": request.max_tokens, "temperature": asked.temperature,
            "top_p": asked.top_p, "seed": request.seed % 2**31, "logprobs": True, "stream_options": {"include_usage": True}, **extra,
        }  # fmt: skip

    def _take(self, event: Mapping[str, Any], request: SampleRequest, partial: Partial) -> str | None:
        finished = None
        for choice in event.get("choices") or ():
            said = (choice.get("delta") or {}).get("content") or ""
            tokens = (choice.get("logprobs") or {}).get("content") or ([{"token": said}] if said else [])
            pieces = [str(token.get("token", "")) for token in tokens]
            if pieces and "".join(pieces) != said:  # tokens that are part of a character, or a stop token that is not shown
                pieces = [said, *[""] * (len(pieces) - 1)]
            partial.ids += map(self._chat.piece, pieces)
            partial.logprobs += [_logprob(token.get("logprob") or 0.0) for token in tokens]
            finished = choice.get("finish_reason")
        usage = event.get("usage")
        if usage:  # tokens that came without text of their own are charged too, within the grant
            count = int(usage.get("completion_tokens") or 0)
            if count > request.max_tokens:
                raise PolicyError(f"{self._url} generated {count} tokens for a grant of {request.max_tokens}")
            missing = count - len(partial.ids)
            partial.ids += [self._chat.piece("")] * missing
            partial.logprobs += [0.0] * missing
        self._usage(event, partial, len(request.prompt))
        return finished
