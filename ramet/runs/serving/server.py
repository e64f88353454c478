"""Delegation behind an ordinary endpoint: a request is a task, its answer that of a tree of clones.

    POST /v1/chat/completions, /v1/responses   streaming or not; `documents`, `budget` and `progress` beside the usual fields
    GET  /v1/models                            the one model that is served
    GET  /v1/trees/ID                          the tree of a reply, by the reply's id, while it is among the latest

Requests share the engine: so many trees grow at once, each with an equal share of the samples in flight; others wait their turn, and
once too many wait, more are sent away. A client that goes away cancels its tree. Everything that arrives is untrusted.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any

import anyio
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ramet.agents.answers import answer_so_far
from ramet.agents.budget import Budget
from ramet.agents.chat import ChatFormat
from ramet.agents.events import BranchEnded, BranchStarted, CallEnded, CallMade, Event, TokensSampled, TreeEnded, TurnSampled
from ramet.agents.growth import chats_of
from ramet.agents.runtime import Runtime
from ramet.agents.tree import Status, Task, Tree
from ramet.errors import ConfigError, HTTPRefusal, PolicyError, RametError, TaskError, first_line
from ramet.runs.agent import question_task, with_read
from ramet.runs.serving.replies import ChatReply, ResponsesReply, ServedReply
from ramet.runs.serving.requests import ChatRequest, Question, ResponsesRequest
from ramet.web import authorise, check_token, first_problem, json_body

logger = logging.getLogger(__name__)
BODY = 64 * 2**20
"""Bytes of a request, documents included."""
PING = 15.0
"""Seconds of silence in a stream, after which a comment keeps it open."""
_HERE = ("localhost", "127.0.0.1", "::1")
READ_EVERY = 0.05
"""Seconds between two readings of a turn that is being written."""


class DelegationService:
    """One runtime, and those who ask it.

    opened   gives the runtime, its policy serving, for as long as the application runs
    model    the name that it has for clients
    budget   of a request that asks for none, and the most that one can have
    token    what clients have to bring; "" for none
    at_once  trees that grow at the same time; `waiting` more requests wait
    kept     trees that can still be looked at, or gone on with
    """

    def __init__(
        self,
        opened: Callable[[], AbstractAsyncContextManager[Runtime]],
        model: str,
        budget: Budget,
        token: str = "",
        at_once: int = 16,
        waiting: int = 256,
        kept: int = 256,
    ):
        if token:
            check_token(token)
        if at_once < 1 or waiting < 0 or kept < 0:
            raise ConfigError("at least one tree grows at once, and a number that is not negative waits or is kept")
        self.model, self.budget, self.token = model, budget, token
        self._opened, self._limit, self._at_once, self._kept = opened, at_once + waiting, at_once, kept
        self.inside = 0
        """Requests that are answered or wait."""
        self._trees: OrderedDict[str, Tree] = OrderedDict()

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/responses", self._responses, methods=["POST"]),
            Route("/v1/models", self._guarded(self._models), methods=["GET"]),
            Route("/v1/trees/{tree}", self._guarded(self._tree), methods=["GET"]),
        ]
        return Starlette(routes=routes, lifespan=self._running)

    @asynccontextmanager
    async def _running(self, app: Starlette) -> AsyncIterator[None]:
        async with self._opened() as runtime:
            share = max(runtime.concurrency // self._at_once, 1)
            self._runtime, self._turns, self._share = runtime, anyio.Semaphore(self._at_once), share
            yield

    def _guarded(self, handler: Callable[[Request], dict[str, Any]]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            try:
                self._authorised(request)
                return JSONResponse(handler(request))
            except HTTPRefusal as refusal:
                return _error(refusal)

        return endpoint

    def _authorised(self, request: Request) -> None:
        if self.token:
            authorise(request, self.token)
        elif request.url.hostname not in _HERE:
            # A page whose name was made to lead here would otherwise be taken for a client.
            raise HTTPRefusal(403, "without a token, this server is for this machine alone: address it as localhost or 127.0.0.1")

    def _models(self, request: Request) -> dict[str, Any]:
        return {"object": "list", "data": [{"id": self.model, "object": "model", "created": 0, "owned_by": "ramet"}]}

    def _tree(self, request: Request) -> dict[str, Any]:
        tree = self._kept_tree(request.path_params["tree"])
        text = tree.text(self._runtime.chat, chats_of(self._runtime.roles))
        return {"id": request.path_params["tree"], "text": text, **tree.record()}

    def _kept_tree(self, name: str) -> Tree:
        if name not in self._trees:
            raise HTTPRefusal(404, f"there is no tree {name[:80]!r} among the latest {self._kept}")
        return self._trees[name]

    async def _chat(self, request: Request) -> Response:
        return await self._replied(request, ChatRequest, f"chatcmpl-{secrets.token_hex(12)}")

    async def _responses(self, request: Request) -> Response:
        return await self._replied(request, ResponsesRequest, f"resp_{secrets.token_hex(12)}")

    async def _replied(self, request: Request, kind: type[ChatRequest | ResponsesRequest], name: str) -> Response:
        try:
            self._authorised(request)
            if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
                raise HTTPRefusal(415, "the body is JSON: send content-type application/json")
            question = kind.model_validate(await json_body(request, BODY)).question(self.budget, self._runtime.sampling)
            task, runtime, after = self._task(question, name)
            if self.inside >= self._limit:
                raise HTTPRefusal(429, "too many requests are waiting; try again later")
            reply: ServedReply = ChatReply(name, self.model, question.usage) if kind is ChatRequest else ResponsesReply(name, self.model)
            job = _Job(self, name, question, task, runtime, after, reply)
            if question.stream:
                return _EventStream(job.stream)
            tree = await _unless_gone(request.receive, job.grow)
            return Response(status_code=499) if tree is None else JSONResponse(reply.whole(tree))
        except ValidationError as error:
            return _error(HTTPRefusal(400, first_problem(error, "the body")))
        except Exception as error:  # one request's failure is not the server's
            return _error(error)

    def _task(self, question: Question, name: str) -> tuple[Task, Runtime, Tree | None]:
        """What to grow, and on what."""
        share = replace(self._runtime, sampling=question.sampling, concurrency=self._share, _slots=None)
        if question.after:
            after = self._kept_tree(question.after)
            task = Task(name, question.messages[-1:], question.documents)
            if len(question.messages) > 1:
                raise HTTPRefusal(400, "after previous_response_id comes one message of the user, without instructions")
        else:
            after, task = None, question_task(question.messages, share.chat, question.documents, question.budget)
        return replace(task, id=name), with_read(share, task), after

    @asynccontextmanager
    async def admitted(self) -> AsyncIterator[None]:
        """A block in which a tree may grow, once it is its turn."""
        self.inside += 1
        try:
            async with self._turns:
                yield
        finally:
            self.inside -= 1

    def keep(self, name: str, tree: Tree) -> None:
        """Let a tree be looked at, until so many others have come after it."""
        self._trees[name] = tree
        while len(self._trees) > self._kept:
            self._trees.popitem(last=False)


class _Job:
    """One request while it is answered."""

    def __init__(
        self,
        service: DelegationService,
        name: str,
        question: Question,
        task: Task,
        runtime: Runtime,
        after: Tree | None,
        reply: ServedReply,
    ):
        self._service, self._name, self._question = service, name, question
        self._task, self._runtime, self._after, self._reply = task, runtime, after, reply

    async def grow(self) -> Tree:
        """The tree, finished and kept. Raises what failed it."""
        async with self._service.admitted():
            tree = await self._runtime.run(self._task, self._question.budget, self._question.seed, after=self._after)
        return self._done(tree)

    def _done(self, tree: Tree) -> Tree:
        self._service.keep(self._name, tree)
        if tree.root.status is Status.REFUSED:
            raise HTTPRefusal(400, f"the model does not take this: {tree.error}")
        if tree.error:
            raise PolicyError(tree.error)
        return tree

    async def stream(self, send: Callable[[str], Awaitable[None]]) -> None:
        """The same as events: the answer while it is written, and what clones do if that was asked for."""
        try:
            for event in self._reply.opening():
                await send(event)
            async with self._service.admitted():
                await self._streamed(send)
        except Exception as error:
            for event in self._reply.failing(_error_body(error)[1]):
                await send(event)

    async def _streamed(self, send: Callable[[str], Awaitable[None]]) -> None:
        answer = _AnswerText(self._runtime.chat)
        growing = self._runtime.stream(self._task, self._question.budget, self._question.seed, after=self._after)
        async with aclosing(growing) as events:
            async for event in events:
                line = _progress(event) if self._question.progress else ""
                pieces = [*(self._reply.progress(line) if line else ())]
                if isinstance(event, TreeEnded):
                    tree = self._done(event.tree)
                    rest = answer.rest(tree.answer or "")
                    pieces += [*(self._reply.text(rest) if rest else ()), *self._reply.closing(tree)]
                elif piece := answer.read(event):
                    pieces += self._reply.text(piece)
                for item in pieces:
                    await send(item)


class _AnswerText:
    """The answer of the root, piece by piece while it is written.

    A model may state another answer after the one that was streamed. The one that counts then follows on a line of its own.
    """

    def __init__(self, chat: ChatFormat):
        self._chat = chat
        self._ids: list[int] = []
        self._sent = ""
        self._read_at = 0.0

    def read(self, event: Event) -> str:
        """What an event adds to the answer."""
        if event.branch != "0" or not isinstance(event, TokensSampled | TurnSampled):
            return ""
        if isinstance(event, TurnSampled):
            self._ids.clear()
            return ""
        self._ids += event.ids
        if time.monotonic() - self._read_at < READ_EVERY:
            return ""
        text = answer_so_far(self._chat.parse(self._ids).text).rstrip("\N{REPLACEMENT CHARACTER}")
        self._read_at = time.monotonic()
        if len(text) <= len(self._sent) or not text.startswith(self._sent):
            return ""
        piece, self._sent = text[len(self._sent) :], text
        return piece

    def rest(self, answer: str) -> str:
        """What is left to send once the whole answer is known."""
        if answer.startswith(self._sent):
            return answer[len(self._sent) :]
        return f"\n{answer}"


def _progress(event: Event) -> str:
    """One line about what a clone, or a tool, does; "" of what is no news."""
    if isinstance(event, BranchStarted) and event.branch != "0":
        return f"clone {event.branch[2:]} begins: {' '.join(event.objective.split())[:200]}"
    if isinstance(event, BranchEnded) and event.branch != "0":
        return f"clone {event.branch[2:]} {event.status.value}: {' '.join((event.answer or event.reason).split())[:200]}"
    if isinstance(event, CallMade) and event.name != "spawn_clone":
        return f"{event.name} {event.arguments[:200]}"
    if isinstance(event, CallEnded):
        return f"{event.name} {event.result.status.value}: {' '.join(event.result.text.split())[:200]}"
    return ""


async def _unless_gone(receive: Receive, work: Callable[[], Awaitable[Tree]]) -> Tree | None:
    """The result of `work`; None, and `work` cancelled, if the client goes away first."""
    done: list[Tree] = []
    failed: list[Exception] = []
    async with anyio.create_task_group() as group:
        group.start_soon(_until_gone, receive, group.cancel_scope)
        try:
            done.append(await work())
        except Exception as error:
            failed.append(error)
        group.cancel_scope.cancel()
    if failed:
        raise failed[0]
    return done[0] if done else None


async def _until_gone(receive: Receive, scope: anyio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


class _EventStream(Response):
    """Server-sent events from a function that sends them; it is cancelled when the client goes away."""

    def __init__(self, produce: Callable[[Callable[[str], Awaitable[None]]], Awaitable[None]]):
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-store"})
        del self.headers["content-length"]
        self._produce = produce

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        sent_at = anyio.current_time()

        async def put(text: str) -> None:
            nonlocal sent_at
            sent_at = anyio.current_time()
            await send({"type": "http.response.body", "body": text.encode("utf-8", "replace"), "more_body": True})

        async def ping() -> None:
            while True:
                await anyio.sleep(PING)
                if anyio.current_time() - sent_at >= PING:
                    await put(": still working\n\n")

        async with anyio.create_task_group() as group:
            group.start_soon(_until_gone, receive, group.cancel_scope)
            group.start_soon(ping)
            await self._produce(put)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            group.cancel_scope.cancel()


def _error(error: Exception) -> Response:
    status, body = _error_body(error)
    headers = {"retry-after": "5"} if status == 429 else {}
    return JSONResponse({"error": body}, status, headers)


def _error_body(error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and body of an error in OpenAI's form."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    if isinstance(error, HTTPRefusal):
        status, message = error.status, str(error)
    elif isinstance(error, TaskError):
        status, message = 400, str(error)
    elif isinstance(error, PolicyError):
        status, message = 502, f"the model failed: {error}"
    else:
        logger.error("a request failed", exc_info=None if isinstance(error, RametError) else error)
        status, message = 500, f"the request failed: {first_line(error) if isinstance(error, RametError) else type(error).__name__}"
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return status, {"message": message, "type": kind, "param": None, "code": status}
