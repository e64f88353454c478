"""A sample that is cancelled while it runs."""

from __future__ import annotations

from typing import Any

import anyio

from ramet.agents.sampling import Partial, SampleRequest


async def cancelled(policy: Any, request: SampleRequest) -> Partial:
    """What had come when the sample was cancelled, as soon as anything had."""
    partial = Partial()
    async with anyio.create_task_group() as group:
        group.start_soon(policy.sample, request, partial)
        while not partial.ids:
            await anyio.sleep(0.01)
        group.cancel_scope.cancel()
    return partial
