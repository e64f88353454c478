"""The simulated engines against a clock that ticks, and what the placements must have in common."""

from __future__ import annotations

import random
from dataclasses import replace

import anyio
import pytest

from ramet.agents.simulation import simulate
from ramet.benchmarks.speed.cluster_sim import PLACEMENTS, EngineHardware, SimulatedEngine, UpdateLoad, simulate_update
from ramet.benchmarks.speed.scaling import Assumptions, TransferCost, TreeCosts, estimate, sending
from ramet.policy.openrlhf.settings import ClusterConfig


def ticking(arrivals: list[tuple[float, int, int]], hardware: EngineHardware, factor: float, tick: float) -> list[float]:
    """When each (time, prefill, tokens) ends, by small steps: prompts are read one after another, meanwhile nobody decodes."""
    ends = [0.0] * len(arrivals)
    left = [float(tokens) for _, _, tokens in arrivals]
    waiting, active, now, stalled, entered = list(range(len(arrivals))), [], 0.0, 0.0, []
    while waiting or active or entered:
        while waiting and arrivals[waiting[0]][0] <= now:
            entered.append(waiting.pop(0))
        while entered and len(active) < hardware.batch:
            active.append(entered.pop(0))
            stalled += factor * arrivals[active[-1]][1] / hardware.prefill
        now += tick
        if stalled > 0:
            stalled -= tick
            continue
        pace = factor * (hardware.step + len(active) * hardware.row_step)
        for i in list(active):
            left[i] -= tick / pace
            if left[i] <= 0:
                active.remove(i)
                ends[i] = now
    return ends


@pytest.mark.parametrize("seed", range(6))
def test_an_engine_is_what_a_ticking_clock_says(seed):
    rng = random.Random(seed)
    hardware = EngineHardware(step=0.01, row_step=0.004, prefill=2000.0, batch=3)
    arrivals = sorted((rng.uniform(0, 1), rng.randint(0, 200), rng.randint(1, 40)) for _ in range(8))
    factor = rng.choice([1.0, 3.0])

    async def main() -> list[float]:
        engine, ends = SimulatedEngine(hardware, factor), [0.0] * len(arrivals)

        async def one(i: int) -> None:
            await anyio.sleep(arrivals[i][0])
            await engine.serve(*arrivals[i][1:])
            ends[i] = anyio.current_time()

        async with anyio.create_task_group() as group:
            for i in range(len(arrivals)):
                group.start_soon(one, i)
        assert engine.rows == 0
        return ends

    assert simulate(main, seed) == pytest.approx(ticking(arrivals, hardware, factor, 1e-4), abs=0.01)


def test_placements_do_the_same_work_and_affinity_reads_less():
    load = replace(UpdateLoad(), trees=8)
    found = {placement: simulate_update(12, EngineHardware(), load, placement, 1) for placement in PLACEMENTS}
    assert len({o.generated for o in found.values()}) == len({o.requests for o in found.values()}) == 1
    assert len({o.prefilled + o.cached for o in found.values()}) == 1, "the same prompts, read or remembered"
    assert found["task"].prefilled < found["tree"].prefilled < found["request"].prefilled
    assert all(len(o.latencies) == 96 and 0 < o.busy <= 1 and max(o.latencies) <= o.seconds + 1e-9 for o in found.values())
    again = simulate_update(12, EngineHardware(), load, "spill", 1)
    assert (again.seconds, again.latencies) == (found["spill"].seconds, found["spill"].latencies), "a seed is a run"


def test_the_model_of_scaling_is_proportional_until_something_else_limits():
    measured = TreeCosts(50_000, 80_000, 0.0002, 0.0005, 0.0004)
    free = replace(measured, sending=TransferCost(0.0, 0.0))
    eight, large = (estimate(gpus, 64 * gpus, Assumptions(), EngineHardware(), free, 1) for gpus in (8, 256))
    assert large.seconds == pytest.approx(eight.seconds, rel=0.05) and large.limit != "control"
    assert estimate(1024, 64 * 1024, Assumptions(), EngineHardware(), replace(free, journal_seconds=0.01), 1).limit == "control"
    assert estimate(1024, 512, Assumptions(), EngineHardware(), free, 1).limit == "sample", "the longest chain does not get shorter"


def test_weights_cost_a_call_for_each_piece_and_engine_besides_their_bytes():
    """By hand: 400 tensors of 4 billion parameters, 64 engines on several nodes."""
    assumed = Assumptions(parameters=4e9, tensors=400, nodes=50e9)
    cost = TransferCost(piece=0.001, engine=0.0005)
    assert sending(400, 64, 256, assumed, cost) == pytest.approx(400 * 0.001 + 400 * 64 * 0.0005 + 8e9 / 50e9)
    assert sending(400, 128, 256, assumed, cost) - sending(400, 64, 256, assumed, cost) == pytest.approx(400 * 64 * 0.0005)
    found = estimate(1024, 512, assumed, EngineHardware(), TreeCosts(50_000, 80_000, 0.0002, 0.0005, 0.0004, cost), 1)
    assert found.syncing < found.unbucketed / 8, "what is gained by sending many tensors at once"


def test_without_staleness_an_update_is_sampled_and_then_trained():
    measured = TreeCosts(50_000, 80_000, 0.0002, 0.0005, 0.0004)
    before, ahead = (estimate(64, 4096, Assumptions(), EngineHardware(), measured, staleness) for staleness in (0, 1))
    assert before.seconds == pytest.approx(before.sampling + before.training + before.syncing)
    assert before.seconds > 1.5 * ahead.seconds
    assert estimate(64, 4096, Assumptions(), EngineHardware(), measured) == before, "the default of a run"
    assert ClusterConfig().staleness == 0
