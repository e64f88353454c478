"""The agent executor: one call grows one tree, with ramet's runtime, on the engine of the actor that it stands in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openrlhf.utils.agent import AgentExecutorBase

from ramet.agents.prefixes import FreshCache
from ramet.agents.runtime import Job, Runtime
from ramet.agents.sampling import Sampling
from ramet.agents.tree import Tree
from ramet.errors import EngineLost
from ramet.policy.engines.vllm import EnginePolicy
from ramet.policy.models.tokenizer import load_tokenizer
from ramet.policy.training.update import MAX_REGROWTHS, require_complete


@dataclass(frozen=True)
class Rollout:
    """A tree to grow: stands in the place of OpenRLHF's prompt."""

    job: Job
    model: Path
    chat: Any
    temperature: float
    always_show_budget: bool


class TreeExecutor(AgentExecutorBase):
    """Grows trees; all of them share one policy, so that they share prefixes and weight versions."""

    def __init__(self) -> None:
        self._policy: EnginePolicy | None = None
        self._runtimes: dict[tuple[Any, ...], Runtime] = {}

    def policy(self, actor: Any) -> EnginePolicy:
        """The policy on the engine of `actor`, a `TreeRollout`."""
        if self._policy is None:
            self._policy = EnginePolicy(actor.llm, int(actor.llm.model_config.max_model_len))
        return self._policy

    async def execute(
        self, prompt: Rollout, label: Any, sampling_params: Any, max_length: int, hf_tokenizer: Any, llm_engine: Any, images: Any = None
    ) -> Tree:
        """The finished tree. Raises `EngineLost`, or `PolicyError` for a tree that the backend fails again and again."""
        runtime = self._runtime(prompt, self.policy(llm_engine))
        tree = await runtime.grow(prompt.job, MAX_REGROWTHS)
        if tree.failed and llm_engine.llm.errored:
            raise EngineLost(tree.failed)
        return require_complete(tree)

    def _runtime(self, asked: Rollout, policy: EnginePolicy) -> Runtime:
        key = (asked.model, asked.chat, asked.temperature, asked.always_show_budget)
        if key not in self._runtimes:
            _, chat = load_tokenizer(asked.model, asked.chat)
            sampling = Sampling(asked.temperature)
            self._runtimes[key] = Runtime(FreshCache(policy), chat, sampling, always_show_budget=asked.always_show_budget)
        return self._runtimes[key]
