"""The base of the backends that run a model themselves: a queue, a task that serves it, and an orderly shutdown."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from types import TracebackType
from typing import Self

import anyio
from anyio.abc import TaskGroup

from ramet.agents.sampling import Partial, Sample, SampleRequest
from ramet.agents.tasks import first_error
from ramet.errors import PolicyError
from ramet.policy.engines.sampler import RequestState


class Serving(ABC):
    """Enter it to serve. Requests wait in `_waiting`; `_round` is called repeatedly while there is work.

    context  the longest prompt and sample together, in tokens
    """

    vision = False
    """Whether requests may have media."""

    def __init__(self, context: int) -> None:
        self.version = 0
        self._context = context
        self._waiting: deque[RequestState] = deque()
        self._wake: anyio.Event | None = None
        self._group: TaskGroup | None = None

    @property
    def context(self) -> int:
        """The longest prompt and sample together, in tokens."""
        return self._context

    @property
    @abstractmethod
    def _busy(self) -> bool:
        """Whether there is work besides waiting requests."""

    @abstractmethod
    async def _round(self) -> None:
        """Do one step of the work."""

    @abstractmethod
    async def _failed(self, error: Exception) -> None:
        """Handle the error of a round: fail the requests concerned, and be ready for others."""

    @abstractmethod
    def _fail(self, error: PolicyError) -> None:
        """Fail every request, waiting or being sampled, with this error."""

    async def __aenter__(self) -> Self:
        self._wake = anyio.Event()
        self._group = anyio.create_task_group()
        await self._group.__aenter__()
        self._group.start_soon(self._serve)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool | None:
        assert self._group is not None
        self._group.cancel_scope.cancel()
        group, self._group = self._group, None
        try:
            return await group.__aexit__(kind, error, trace)
        except BaseExceptionGroup as errors:
            raise first_error(errors) from errors
        finally:
            self._fail(PolicyError("the policy was closed"))

    async def sample(self, request: SampleRequest, partial: Partial) -> Sample:
        """Sample one turn; see `ramet.agents.sampling.Policy`."""
        if self._group is None or self._wake is None:
            raise PolicyError("the policy is not serving: use `async with policy`")
        if request.media and not self.vision:
            raise PolicyError("this policy has no vision; it does not accept media")
        if not request.prompt or request.max_tokens < 1:
            raise PolicyError(f"nothing to sample: {len(request.prompt)} prompt tokens, at most {request.max_tokens} new")
        if len(request.prompt) + request.max_tokens > self._context:
            raise PolicyError(f"{len(request.prompt)} prompt and {request.max_tokens} new tokens exceed the context of {self._context}")
        row = self._row(request, partial)
        self._waiting.append(row)
        self._wake.set()
        return await row.sampled()

    def _row(self, request: SampleRequest, partial: Partial) -> RequestState:
        """The state of a new request."""
        return RequestState(request, partial)

    async def _serve(self) -> None:
        while True:
            while not self._waiting and not self._busy:
                self._wake = anyio.Event()
                await self._wake.wait()
            # Two turns of the event loop, so that branches that have just got a result can request their next sample.
            await anyio.lowlevel.checkpoint()
            await anyio.lowlevel.checkpoint()
            try:
                await self._round()
            except Exception as error:  # whatever it is, waiting requests must fail with it
                await self._failed(error)
