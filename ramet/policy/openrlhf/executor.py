"""The agent executor: one call grows one tree, with ramet's runtime, on the engine of the actor that it runs in."""

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
    """A tree to grow; passed in the place of OpenRLHF's prompt."""

    job: Job
    model: Path
    chat: Any
    temperature: float
    always_show_budget: bool


class TreeExecutor(AgentExecutorBase):
    """Grows trees. All share one policy, and with it cached prefixes and weight versions."""

    def __init__(self) -> None:
        self._policy: EnginePolicy | None = None
        self._runtimes: dict[tuple[Any, ...], Runtime] = {}

    def policy(self, actor: Any) -> EnginePolicy:
        """The policy that samples with the engine of `actor`, a `TreeRollout`."""
        if self._policy is None:
            self._policy = EnginePolicy(actor.llm, int(actor.llm.model_config.max_model_len))
        return self._policy

    async def execute(
        self, prompt: Rollout, label: Any, sampling_params: Any, max_length: int, hf_tokenizer: Any, llm_engine: Any, images: Any = None
    ) -> Tree:
        """The finished tree. Raises `EngineLost` if the engine has died, `PolicyError` if the backend fails the tree too often."""
        runtime = self._runtime(prompt, self.policy(llm_engine))
        tree = await runtime.grow(prompt.job, MAX_REGROWTHS)
        if tree.failed and llm_engine.llm.errored:
            raise EngineLost(tree.failed)
        return require_complete(tree)

    def _runtime(self, rollout: Rollout, policy: EnginePolicy) -> Runtime:
        key = (rollout.model, rollout.chat, rollout.temperature, rollout.always_show_budget)
        if key not in self._runtimes:
            _, chat = load_tokenizer(rollout.model, rollout.chat)
            sampling = Sampling(rollout.temperature)
            self._runtimes[key] = Runtime(FreshCache(policy), chat, sampling, always_show_budget=rollout.always_show_budget)
        return self._runtimes[key]
