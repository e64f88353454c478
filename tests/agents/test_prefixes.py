"""Prompt tokens are counted by what a tree needs, whatever ran before it or beside it."""

from __future__ import annotations

import anyio
import pytest
import torch

from ramet.agents.budget import Budget
from ramet.agents.chat import ControlTokenFormat
from ramet.agents.prefixes import FreshCache, fresh_cache
from ramet.agents.runtime import Job, Runtime
from ramet.agents.sampling import Partial, Sample, SampleRequest
from ramet.agents.tree import StopReason
from ramet.env.arithmetic import RowsEnvironment
from ramet.errors import TransientPolicyError
from ramet.policy.engines.hf import HFPolicy


class Says:
    """Ten ids for every request, and a count of its own that a shared cache would give."""

    version, context = 0, None
    failing = 0

    async def sample(self, request: SampleRequest, partial: Partial) -> Sample:
        if self.failing:
            self.failing -= 1
            raise TransientPolicyError("503")
        partial.prefilled = 1
        return Sample(tuple(range(10)), (0.0,) * 10, StopReason.END, prefilled=1, cached=len(request.prompt) - 1)


def counted(policy: FreshCache, *prompts: tuple[int, ...]) -> list[tuple[int, int]]:
    async def main() -> list[tuple[int, int]]:
        costs = []
        with fresh_cache():
            for prompt in prompts:
                sample = await policy.sample(SampleRequest(prompt, 10, frozenset()), Partial())
                costs.append((sample.prefilled, sample.cached))
        return costs

    return anyio.run(main)


def test_a_later_turn_pays_for_what_was_appended_and_not_for_what_was_sampled():
    first = tuple(range(100, 150))
    second = first + tuple(range(10)) + (7, 7, 7)
    clone = (*first[:20], 1, 2)
    assert counted(FreshCache(Says()), first, second, clone, clone) == [(50, 0), (3, 60), (2, 20), (1, 21)]


def test_an_attempt_that_was_refused_has_read_nothing():
    says = Says()
    says.failing = 1
    policy = FreshCache(says)

    async def main() -> None:
        with fresh_cache():
            request = SampleRequest(tuple(range(30)), 10, frozenset())
            with pytest.raises(TransientPolicyError):
                await policy.sample(request, Partial())
            assert (await policy.sample(request, Partial())).prefilled == 30

    anyio.run(main)


def test_one_outcome_shares_what_its_trees_begin_with_and_two_share_nothing():
    async def main() -> None:
        policy, request = FreshCache(Says()), SampleRequest(tuple(range(30)), 10, frozenset())
        for _ in range(2):
            with fresh_cache():
                for expected in (30, 1):
                    with fresh_cache():  # as a runtime does for each tree
                        assert (await policy.sample(request, Partial())).prefilled == expected

    anyio.run(main)


def test_equal_trees_of_a_group_need_equally_much_whichever_came_first(random_model, nano_tokenizer):
    """The engine computes their prompt once; what they are priced by does not depend on for whom."""
    torch.set_num_threads(1)
    chat = ControlTokenFormat(nano_tokenizer)
    task = RowsEnvironment((9, 9)).tasks("train", 1, 0)[0]
    jobs = [Job(task, Budget(generated=8, context=200), 0, (n,)) for n in range(4)]

    async def main(fresh: bool) -> list[int]:
        async with HFPolicy(random_model) as policy:
            runtime = Runtime(FreshCache(policy) if fresh else policy, chat)
            async with runtime.run_many(jobs, 2) as finished:
                return [tree.usage.prefilled async for _, tree in finished]

    assert len(set(anyio.run(main, False))) > 1, "the engine shares the prompt"
    assert len(set(anyio.run(main, True))) == 1
