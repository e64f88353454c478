"""A reward model behind HTTP, for trainers on other machines.

    POST /score       {"items": [{"video", "question", "answer", "start"?, "end"?}]}  ->  {"scores": [...], "probabilities": [...]}
    POST /get_reward  OpenRLHF's protocol: {"query", "prompts", "labels"}  ->  {"rewards", "scores", "extra_logs"}; a label is the JSON text
                      of an item without its answer, which is what a query has after its prompt (see `queries`). OpenRLHF sends no
                      headers: give it the token in the address, /get_reward?token=...
    GET  /health      {"model": ...}

Videos are found, hashed and decoded in separate threads before their request queues for the model, so that neither a long nor a broken
one delays others. Requests that queue while the model is busy are scored together. All input is untrusted: a bearer token is required,
the size of bodies and the number of items are limited, compressed bodies are refused, and videos are read only from one folder and from
those to which its links are allowed to lead.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from ramet.agents.tree import Segment
from ramet.errors import ConfigError, HTTPRefusal, RewardError, TaskError, TransientRewardError, first_line, from_record, to_record
from ramet.rewards.video.discriminative import VideoAnswer
from ramet.rewards.video.judge import ServedRewardModel
from ramet.rewards.video.pairs import below, name_of, segments_of
from ramet.rewards.video.queries import answer_of
from ramet.web import authorise, check_token, first_problem, json_body, parse_json, run_app

logger = logging.getLogger(__name__)
BODY = 2**20
"""Bytes of a request."""
ITEMS = 256
"""Of a request."""
TOGETHER = 512
"""Items that are scored in one call of the model."""
TRANSIENT = (408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529)
"""Status codes of a server that is busy, away or restarting, or of a proxy before it."""
FAILURES = 6
"""Of the model itself (status 500), before it is given up."""
READERS = 4
"""Requests whose videos are read at the same time."""


class _VideoQuestion(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    video: str | None = None
    question: str = Field(min_length=1)
    start: float | None = Field(None, ge=0, allow_inf_nan=False)
    end: float | None = Field(None, gt=0, allow_inf_nan=False)

    def item(self, answer: str, root: Path, linked: Sequence[Path]) -> VideoAnswer:
        video = None if self.video is None else Segment(str(below(root, self.video, linked)), self.start or 0.0, self.end)
        return VideoAnswer(video, self.question, answer)


class _Item(_VideoQuestion):
    answer: str


class _Score(BaseModel):
    model_config = ConfigDict(extra="forbid")

    items: list[_Item] = Field(min_length=1, max_length=ITEMS)


class _OpenRLHF(BaseModel):
    query: list[str] = Field(min_length=1, max_length=ITEMS)
    prompts: list[str]
    labels: list[str]


@dataclass(eq=False)
class _Waiting:
    items: Sequence[VideoAnswer]
    done: anyio.Event = field(default_factory=anyio.Event)
    scores: list[float] = field(default_factory=list)
    error: Exception | None = None


class RewardService:
    """One model, the thread that runs it, and the requests that wait for it.

    stops   special tokens as text, which may end an answer or stand before a prompt
    linked  folders outside of `videos` to which links in it may lead
    """

    def __init__(self, model: ServedRewardModel, videos: Path, token: str, stops: Sequence[str] = (), linked: Sequence[Path] = ()):
        check_token(token)
        for folder in (videos, *linked):
            if not folder.is_dir():
                raise ConfigError(f"there is no folder of videos {folder}")
        self.model, self.videos, self.token, self.stops, self.linked = model, videos, token, stops, linked
        self._reader: Callable[[Segment], object] | None = getattr(model, "reader", None)
        """The video reader of a vision-language model, which caches what it reads."""
        self._readers = anyio.CapacityLimiter(READERS)
        self._waiting: list[_Waiting] = []
        self._wake = anyio.Event()
        self.calls = 0
        """Of the model so far."""

    def app(self) -> Starlette:
        """The ASGI application, which scores requests for as long as it runs."""
        routes = [
            Route("/score", self._answered(self._score), methods=["POST"]),
            Route("/get_reward", self._answered(self._openrlhf), methods=["POST"]),
            Route("/health", self._health, methods=["GET"]),
        ]
        return Starlette(routes=routes, lifespan=self._running)

    @asynccontextmanager
    async def _running(self, app: Starlette) -> AsyncIterator[None]:
        async with anyio.create_task_group() as group:
            group.start_soon(self._serve)
            yield
            group.cancel_scope.cancel()

    async def _health(self, request: Request) -> JSONResponse:
        return JSONResponse({"model": self.model.name})

    def _answered(self, handler: Any) -> Any:
        """A route that authorises, reads the body within its limit, and turns refusals into responses."""

        async def endpoint(request: Request) -> JSONResponse:
            try:
                authorise(request, self.token, request.query_params.get("token", ""))
                return JSONResponse(await handler(await json_body(request, BODY)))
            except HTTPRefusal as refused:
                return JSONResponse(to_record(refused), refused.status)
            except ValidationError as error:
                return JSONResponse({"error": first_problem(error)}, 422)
            except (TaskError, RewardError) as error:
                return JSONResponse({**to_record(error), "error": _without(self.videos, str(error))}, 422)
            except Exception as error:  # a bug, or a device that failed: the client is to try again or to stop
                return JSONResponse({"error": f"the reward model failed: {type(error).__name__}"}, 500)

        return endpoint

    async def _score(self, body: Any) -> dict[str, Any]:
        query = _Score.model_validate(body)
        items = await self._in_thread(self._read, [(item, item.answer) for item in query.items])
        scores = await self.score(items)
        return {"scores": scores, "probabilities": self.model.rewards(scores)}

    async def _openrlhf(self, body: Any) -> dict[str, Any]:
        batch = _OpenRLHF.model_validate(body)
        if not len(batch.query) == len(batch.prompts) == len(batch.labels):
            raise HTTPRefusal(422, "query, prompts and labels differ in number")
        scores = await self.score(await self._in_thread(self._answers, batch))
        mean = sum(scores) / len(scores)
        return {"rewards": scores, "scores": self.model.rewards(scores), "extra_logs": {"reward_model_score": mean}}

    async def _in_thread(self, work: Callable[[Any], list[VideoAnswer]], argument: Any) -> list[VideoAnswer]:
        """Run work on files and long texts outside of the event loop and the model's thread, as many at a time as there are readers."""
        return await anyio.to_thread.run_sync(work, argument, limiter=self._readers)

    def _answers(self, batch: _OpenRLHF) -> list[VideoAnswer]:
        answered = []
        for n, (query, prompt, label) in enumerate(zip(batch.query, batch.prompts, batch.labels, strict=True), 1):
            answer = answer_of(query, prompt, self.stops)
            if answer is None:
                raise HTTPRefusal(
                    422,
                    f"query {n} ({query[:40]!r}) begins neither with its prompt ({prompt[:40]!r}) nor with the end of one cut at the left: "
                    "`prompts` must hold the texts that were encoded, after the chat template",
                )
            answered.append((_VideoQuestion.model_validate(parse_json(label.encode(), f"label {n}")), answer))
        return self._read(answered)

    def _read(self, answered: Sequence[tuple[_VideoQuestion, str]]) -> list[VideoAnswer]:
        """Read the videos of items."""
        items = [question.item(answer, self.videos, self.linked) for question, answer in answered]
        if self._reader is not None:
            for segment in dict.fromkeys(segment for item in items for segment in segments_of(item.video)):
                self._reader(segment)
        return items

    async def score(self, items: Sequence[VideoAnswer]) -> list[float]:
        """The scores of items, computed together with those of other requests that wait."""
        waiting = _Waiting(items)
        self._waiting.append(waiting)
        self._wake.set()
        await waiting.done.wait()
        if waiting.error is not None:
            raise waiting.error
        return waiting.scores

    async def _serve(self) -> None:
        while True:
            await self._wake.wait()
            self._wake = anyio.Event()
            while self._waiting:
                batch: list[_Waiting] = []
                while self._waiting and (not batch or sum(len(w.items) for w in batch) + len(self._waiting[0].items) <= TOGETHER):
                    batch.append(self._waiting.pop(0))
                await self._run(batch)

    async def _run(self, batch: list[_Waiting]) -> None:
        """Score a batch; where it fails, each request by itself, so that one that cannot be scored does not fail the others."""
        self.calls += 1
        try:
            scores = await anyio.to_thread.run_sync(self.model.score, [item for w in batch for item in w.items])
            if len(scores) != sum(len(w.items) for w in batch) or not all(map(math.isfinite, scores)):
                raise RewardError("the reward model gives scores that are no numbers, or too few")
        except Exception as error:
            if len(batch) > 1:
                for waiting in batch:
                    await self._run([waiting])
                return
            batch[0].error = error
            batch[0].done.set()
            return
        start = 0
        for waiting in batch:
            waiting.scores = list(scores[start : start + len(waiting.items)])
            start += len(waiting.items)
            waiting.done.set()


def _without(root: Path, message: str) -> str:
    """A message without the path of the folder, which clients are not to learn."""
    return message.replace(f"{os.path.abspath(root)}/", "").replace(f"{root.resolve()}/", "")


def serve(model: ServedRewardModel, videos: Path, token: str, host: str, port: int, linked: Sequence[Path] = ()) -> None:
    """Serve until interrupted. Raises `ConfigError` if the address is not available."""
    tokenizer = getattr(model, "tokenizer", None)
    stops = () if tokenizer is None else tuple(map(str, tokenizer.all_special_tokens))
    service = RewardService(model, videos, token, stops, linked)
    run_app(service.app(), host, port)


class RemoteReward:
    """The client: scores from a server, with retries of transient failures. `videos` is the client's folder of the same videos.

    token     the server's bearer token; "" if it requires none
    patience  total seconds to wait for a server that cannot be reached or is busy; a restart that loads a model takes minutes
    sleep     the function that waits
    """

    def __init__(self, url: str, token: str, videos: Path, patience: float = 300.0, sleep: Callable[[float], None] = time.sleep):
        import httpx

        self.name, self.patience, self.videos, self._sleep = f"reward model at {url}", patience, videos, sleep
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            self._client = httpx.Client(base_url=url.removesuffix("/").removesuffix("/score"), headers=headers, timeout=600)
        except (httpx.InvalidURL, ValueError) as error:
            raise ConfigError(f"{url!r} is no address of a reward server, or the token no header: {first_line(error)}") from None

    def score(self, items: Sequence[VideoAnswer]) -> list[float]:
        """Raises what the server says: `TaskError` where a model here would, such as for a video that cannot be read, else `RewardError`;
        `RewardError` also where it cannot be reached for longer than `patience`.
        """
        return self._all(items, "scores")

    def probabilities(self, items: Sequence[VideoAnswer]) -> list[float]:
        """The server's rewards, between 0 and 1. Raises what `score` raises."""
        return self._all(items, "probabilities")

    def _all(self, items: Sequence[VideoAnswer], name: str) -> list[float]:
        records = [self._record(item) for item in items]
        parts: list[list[dict[str, Any]]] = [[]]
        size = 0
        for record in records:
            length = len(json.dumps(record))
            if parts[-1] and (len(parts[-1]) == ITEMS or size + length > BODY // 2):
                parts.append([])
                size = 0
            parts[-1].append(record)
            size += length
        return [value for part in parts if part for value in self._request(part, name)]

    def _record(self, item: VideoAnswer) -> dict[str, Any]:
        record: dict[str, Any] = {"question": item.question, "answer": item.answer}
        if item.video is None:
            return record
        if isinstance(item.video, tuple):
            raise RewardError("a reward server scores answers about one video at a time")
        name = name_of(self.videos, item.video.file)
        if name is None:
            raise RewardError(f"{item.video.file} is not below {self.videos}, the folder that the server's videos are said to be")
        return record | {"video": name, "start": item.video.start, "end": item.video.end}

    def _request(self, records: list[dict[str, Any]], name: str) -> list[float]:
        """The numbers that the server returns for items. Raises the error that it reports; `RewardError` unless there is one per item."""
        response = self._posted(records)
        try:
            reply = response.json()
        except ValueError:
            reply = None
        if not isinstance(reply, dict) or (response.status_code == 200 and name not in reply):
            reply = {"error": f"status {response.status_code}; is this the address of a reward server?"}
        if response.status_code != 200 or "error" in reply:
            kind = reply.get("kind") if reply.get("kind") in (TaskError.kind, RewardError.kind) else RewardError.kind
            raise from_record({"kind": kind, "error": f"{self.name} refuses: {reply.get('error', response.status_code)}"})
        values = reply[name]
        numbers = isinstance(values, list) and all(isinstance(value, int | float) and math.isfinite(value) for value in values)
        if not numbers or len(values) != len(records):
            raise RewardError(f"{self.name} gives no number for each of {len(records)} items: {str(values)[:80]}")
        return [float(value) for value in values]

    def _posted(self, records: list[dict[str, Any]]) -> Any:
        """The first response that is not a transient failure."""
        from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_random_exponential

        backoff = wait_random_exponential(0.5, max=20, min=0.2)

        def failure(state: RetryCallState) -> TransientRewardError:
            error = state.outcome.exception() if state.outcome else None
            return error if isinstance(error, TransientRewardError) else TransientRewardError("")

        def wait(state: RetryCallState) -> float:
            return min(max(backoff(state), failure(state).retry_after), max(self.patience - state.idle_for, 0.0))

        def stop(state: RetryCallState) -> bool:
            waited, tries = max(state.idle_for, state.seconds_since_start or 0.0), failure(state).tries
            return waited >= self.patience or (tries is not None and state.attempt_number >= tries)

        def log_retry(state: RetryCallState) -> None:
            logger.warning("%s: %s; trying again in %.1f s", self.name, failure(state), state.upcoming_sleep)

        retrying = Retrying(
            retry=retry_if_exception_type(TransientRewardError),
            wait=wait,
            stop=stop,
            sleep=self._sleep,
            before_sleep=log_retry,
            reraise=True,
        )
        try:
            return retrying(self._post, records)
        except TransientRewardError as error:
            raise RewardError(f"{self.name} cannot be reached: {first_line(error)}") from error

    def _post(self, records: list[dict[str, Any]]) -> Any:
        import httpx

        try:
            response = self._client.post("/score", json={"items": records})
        except (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.LocalProtocolError) as error:
            raise RewardError(f"{self.name} cannot be asked: {first_line(error)}") from error
        except httpx.TransportError as error:
            raise TransientRewardError(first_line(error)) from error
        if response.status_code in TRANSIENT:
            reason, after = " ".join(response.text.split())[:200], response.headers.get("retry-after", "")
            raise TransientRewardError(
                f"status {response.status_code}: {reason}",
                retry_after=float(after) if after.isdecimal() else 0.0,
                tries=FAILURES if response.status_code == 500 else None,
            )
        return response
