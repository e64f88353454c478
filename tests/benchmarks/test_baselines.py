"""Every method stays within its budget and counts what it spent; votes and splits are what they say."""

from __future__ import annotations

import itertools

import anyio
import pytest
import torch

from ramet.agents import programs
from ramet.agents.budget import Budget
from ramet.agents.journal import Journal
from ramet.agents.runtime import Runtime
from ramet.agents.sampling import Partial, Sample, SampleRequest, Sampling
from ramet.agents.tree import Branch, Status, StopReason
from ramet.benchmarks.evaluation import baselines, harness
from ramet.benchmarks.evaluation.baselines import Cut, always, best_of_n, map_reduce, tree
from ramet.benchmarks.evaluation.harness import Backend, Measured, MethodEntry, Workload, by_size, grouped, measure, point
from ramet.env.arithmetic import RowsEnvironment
from ramet.errors import ConfigError
from ramet.policy.engines.hf import HFPolicy
from ramet.policy.models.catalogue import BASE
from ramet.policy.models.load import load_model

ENV = RowsEnvironment((2, 12))


@pytest.fixture(scope="module")
def base():
    torch.set_num_threads(1)
    return load_model(BASE)


@pytest.mark.parametrize("method", [tree, always, best_of_n(ENV.canonical), map_reduce(Cut(1, 12)), map_reduce(Cut(3, 4))])
@pytest.mark.parametrize("generated", [1, 9, 30, 120])
def test_every_method_keeps_its_budget(base, method, generated):
    model, _, chat = base
    spent: list[int] = []

    class Counting(HFPolicy):
        async def sample(self, request: SampleRequest, partial: Partial) -> Sample:
            sample = await super().sample(request, partial)
            spent.append(len(sample.ids))
            return sample

    async def main() -> None:
        async with Counting(model) as policy:
            for task in ENV.tasks("iid", 4, 1):
                spent.clear()
                outcome = await method(Runtime(policy, chat), task, Budget(generated=generated, answer_reserve=8, context=768), 3)
                given = len(chat.turn(f"rows: {len(task.documents)}", "")[:-2]) if method is always else 0
                assert sum(spent) + min(given, 1) <= outcome.generated <= min(sum(spent) + given, generated)
                assert outcome.critical_path <= outcome.generated
                again = await method(Runtime(policy, chat), task, Budget(generated=generated, answer_reserve=8, context=768), 3)
                assert (again.answer, again.generated) == (outcome.answer, outcome.generated)

    anyio.run(main)


class Says:
    """A policy that says prepared things in turn."""

    version, context = 0, None

    def __init__(self, chat, texts):
        self.turns = [tuple(chat.turn(text)) for text in texts]

    async def sample(self, request, partial):
        ids = self.turns.pop(0)[: request.max_tokens]
        return Sample(ids, (0.0,) * len(ids), StopReason.END if ids[-1] in request.stop_ids else StopReason.LENGTH)


def voted(base, texts, generated):
    _, _, chat = base
    task = ENV.tasks("iid", 1, 0)[0]
    return anyio.run(best_of_n(ENV.canonical), Runtime(Says(chat, texts), chat), task, Budget(generated=generated), 0)


def test_best_of_n_takes_the_most_frequent_and_on_ties_the_earliest(base):
    _, _, chat = base
    each = len(chat.turn("Answer: 7"))
    assert voted(base, ["Answer: 7", "Answer: 8", "Answer: 8"], 3 * each).answer == "8"
    tied = voted(base, ["Answer: 7", "Answer: 8"], 2 * each)
    assert (tied.answer, tied.generated, tied.critical_path) == ("7", 2 * each, each)
    cut = voted(base, ["Answer: 7", "Answer: 9"], each + 2)
    assert (cut.answer, cut.generated) == ("7", each + 2)


def test_votes_are_of_what_answers_say():
    """`7`, `+7` and `07` are one answer, and outvote `8`, which comes more often than any one spelling."""


    def voted(*answers: str | None) -> str | None:
        chosen = programs.vote([Branch(f"0.{i}", (), (), Status.ANSWERED, answer) for i, answer in enumerate(answers)], ENV.canonical)
        return chosen and chosen.answer

    assert voted("8", "7", "8", "+7", "07") == "7"
    assert voted() is None and voted(None) is None and voted(None, "7", "8") == "7"


def test_always_delegating_opens_the_call_and_leaves_the_rest_to_the_model(base):
    """The base, which delegates half of the time, does so each time; what it was made to say is charged and stands in the branch."""
    model, _, chat = base
    tasks = RowsEnvironment((10, 12)).tasks("iid", 12, 2)
    budget = Budget(generated=300, answer_reserve=8, context=768, depth=1, width=16)

    async def main() -> None:
        async with HFPolicy(model) as policy:
            free = [await tree(Runtime(policy, chat), task, budget, seed) for seed, task in enumerate(tasks)]
            made = [await always(Runtime(policy, chat), task, budget, seed) for seed, task in enumerate(tasks)]
            assert 0 < sum(o.spawned for o in free) < 12 and all(o.spawned for o in made)
            grown = await Runtime(policy, chat).run(tasks[0], budget, 1, program=programs.always("rows: 2"))
            first = grown.root.turns[0]
            assert list(first.sampled[: first.written]) == chat.turn("rows: 2", "")[:-2]
            assert chat.text(first.sampled).startswith("rows: 2<tool_call>{") and grown.usage.generated == sum(
                len(turn.sampled) for branch in grown.branches for turn in branch.turns
            )

    anyio.run(main)


@pytest.mark.parametrize("kept", [4, 12])
def test_the_reducer_keeps_what_it_is_told_to(base, kept):
    """Clones may spend what is not kept, shared out fairly; the reducer has at least what was kept."""
    _, _, chat = base
    task = RowsEnvironment((12, 12)).tasks("iid", 1, 0)[0]
    limits: list[int] = []

    class Noting(Says):
        async def sample(self, request, partial):
            limits.append(request.max_tokens)
            return await super().sample(request, partial)

    said = Noting(chat, ["Answer: 1"] * 9)
    anyio.run(map_reduce(Cut(1, kept)), Runtime(said, chat), task, Budget(generated=100), 0)
    rows = len(task.documents)
    assert len(limits) == rows + 1 and sum(limits[:rows]) == 100 - kept * rows and limits[-1] >= kept * rows


def test_best_of_n_needs_a_limit(base):
    _, _, chat = base
    with pytest.raises(ConfigError, match="need a limit on generated tokens"):
        anyio.run(best_of_n(ENV.canonical), Runtime(Says(chat, []), chat), ENV.tasks("iid", 1, 0)[0], Budget(), 0)


def test_measuring_resumes_where_it_was_interrupted(base, tmp_path, monkeypatch):
    model, _, chat = base
    entry = MethodEntry("base", baselines.tree, Sampling(temperature=1.0), 1)
    workload = Workload("iid", ENV.tasks("iid", 5, 0), [30, 90], Budget(answer_reserve=8, context=768), 0)

    class Stop(Exception):
        pass

    async def run(path, stop_after: int | None = None) -> list[Measured]:
        count = 0

        def report(new: int) -> None:
            nonlocal count
            count += new
            if count == stop_after:
                raise Stop

        with Journal(path, "job") as journal:
            async with HFPolicy(model) as policy:
                return await measure(entry, ENV, workload, Backend(policy, chat), journal, report)

    whole = anyio.run(run, tmp_path / "whole")
    with pytest.raises(Stop):
        anyio.run(run, tmp_path / "cut", 4)
    resumed = anyio.run(run, tmp_path / "cut")
    assert resumed == whole, "costs as well: they do not depend on what the engine still holds"
    with Journal(tmp_path / "cut", "job") as journal:
        assert sorted((r["budget"], r["task"]) for r in journal) == sorted((m.budget, m.task) for m in whole)
    groups = grouped(whole)
    record = point(groups["base", "iid", 90])
    assert record["n"] == 5 and 0 <= record["ci_low"] <= record["accuracy"] <= record["ci_high"] <= 1
    for bins in (1, 3, 100):
        monkeypatch.setattr(harness, "SIZE_RANGES", bins)
        ranges = by_size(groups["base", "iid", 30])
        assert len(ranges) <= bins and sum(r["n"] for r in ranges) == 5
        assert all(a["size_high"] < b["size_low"] for a, b in itertools.pairwise(ranges))
