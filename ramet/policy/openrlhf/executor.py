"""The agent executor: one call grows one tree, with ramet's runtime, on the engine of the actor that it runs in."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openrlhf.utils.agent import AgentExecutorBase

from ramet.agents.equipment import Equipment
from ramet.agents.runtime import Job, Runtime
from ramet.agents.sampling import Sampling
from ramet.agents.tree import Tree
from ramet.errors import EngineLost
from ramet.policy.engines.vllm import EnginePolicy
from ramet.policy.models.tokenizer import load_tokenizer
from ramet.policy.training.update import MAX_REGROWTHS, require_complete


@dataclass(frozen=True)
class Rollout:
    """A tree to grow; passed in the place of OpenRLHF's prompt. For the last two see `RunSpec`."""

    job: Job
    model: Path
    chat: Any
    temperature: float
    always_show_budget: bool
    build_equipment: Callable[[], Equipment] = Equipment
    fingerprint: str = ""


class TreeExecutor(AgentExecutorBase):
    """Grows trees. All share one policy, and with it cached prefixes and weight versions."""

    def __init__(self) -> None:
        self._policy: EnginePolicy | None = None
        self._runtimes: dict[tuple[Any, ...], asyncio.Task[Runtime]] = {}
        self._held: set[asyncio.Task[None]] = set()

    def policy(self, actor: Any) -> EnginePolicy:
        """The policy that samples with the engine of `actor`, a `TreeRollout`."""
        if self._policy is None:
            self._policy = EnginePolicy(actor.llm, int(actor.llm.model_config.max_model_len))
        return self._policy

    async def execute(
        self, prompt: Rollout, label: Any, sampling_params: Any, max_length: int, hf_tokenizer: Any, llm_engine: Any, images: Any = None
    ) -> Tree:
        """The finished tree. Raises `EngineLost` if the engine has died, `PolicyError` if the backend fails the tree too often."""
        runtime = await self._runtime(prompt, self.policy(llm_engine))
        tree = await runtime.grow(prompt.job, MAX_REGROWTHS)
        if tree.failed and llm_engine.llm.errored:
            raise EngineLost(tree.failed)
        return require_complete(tree)

    async def _runtime(self, rollout: Rollout, policy: EnginePolicy) -> Runtime:
        """The runtime of a run's trees, made for the first of them."""
        key = (rollout.model, rollout.chat, rollout.temperature, rollout.always_show_budget, rollout.fingerprint)
        if key not in self._runtimes:
            self._runtimes[key] = asyncio.create_task(self._opened(rollout, policy))
        return await asyncio.shield(self._runtimes[key])

    async def _opened(self, rollout: Rollout, policy: EnginePolicy) -> Runtime:
        _, chat = load_tokenizer(rollout.model, rollout.chat)
        serving: asyncio.Future[Equipment] = asyncio.get_running_loop().create_future()
        holder = asyncio.create_task(_hold(rollout.build_equipment(), serving))
        self._held.add(holder)
        equipment = await serving
        return equipment.runtime(policy, chat, Sampling(rollout.temperature), always_show_budget=rollout.always_show_budget)


async def _hold(equipment: Equipment, serving: asyncio.Future[Equipment]) -> None:
    """Have the equipment serve for as long as the engine's process lives; `serving` is told once it does, or what it raises."""
    try:
        async with equipment.serving() as ready:
            serving.set_result(ready)
            await asyncio.Event().wait()
    except Exception as error:
        if serving.done():
            raise
        serving.set_exception(error)
