"""Grading while other tasks are at work."""

from __future__ import annotations

import anyio
import anyio.from_thread
import anyio.lowlevel
import pytest

from ramet.agents.budget import Budget
from ramet.agents.journal import Journal
from ramet.agents.sampling import Sampling
from ramet.benchmarks.evaluation.baselines import Outcome
from ramet.benchmarks.evaluation.harness import Backend, MethodEntry, Workload, measure
from ramet.env.arithmetic import RowsEnvironment
from ramet.env.grading import reward_function
from ramet.policy.engines.openai import WireFormat
from ramet.policy.training.reward import Judge, RewardConfig


class Slow(RowsEnvironment):
    """Its grade ends only if the event loop answers in the meantime, and notes how many grade at a time."""

    grading = most = 0
    loop = None

    def grade(self, task, answer, metric=None):
        kind = type(self)
        kind.grading += 1
        kind.most = max(kind.most, kind.grading)
        for _ in range(3):
            anyio.from_thread.run(anyio.sleep, 0, token=kind.loop)
        kind.grading -= 1
        return float(answer == "7")


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_grade_that_takes_long_stalls_no_other_task(tmp_path, backend):
    env = Slow((2, 4))

    async def seven(runtime, task, budget, seed):
        return Outcome("7", 1, 1, 1, False, 0, "answered")

    async def main():
        Slow.loop = anyio.lowlevel.current_token()
        with Journal(tmp_path / backend, "f") as journal:
            entry = MethodEntry("said", seven, Sampling(), 0)
            judge = Judge(reward_function(env), RewardConfig(concurrency=1))
            workload = Workload("iid", env.tasks("iid", 6, 0), [9, 10], Budget(), 0, judge=judge)
            return await measure(entry, env, workload, Backend(None, WireFormat()), journal)

    assert [m.score for m in anyio.run(main, backend=backend)] == [1.0] * 12
    assert Slow.most == 1, "one at a time, as it is set: a reward may be a model, which does not take threads"
