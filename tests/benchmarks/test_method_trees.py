"""Every method, baseline and named program grows one tree that keeps the books, whatever the model says and the backend does."""

from __future__ import annotations

import contextlib
import json
import random
import zlib
from pathlib import Path
from typing import Any

import anyio
import pytest
from typer.testing import CliRunner

from ramet.agents.budget import Budget
from ramet.agents.context import ContextStore
from ramet.agents.growth import Growth
from ramet.agents.programs import PROGRAMS
from ramet.agents.runtime import Runtime
from ramet.agents.scripted import Faults, PlainFormat, ScriptedPolicy
from ramet.agents.simulation import simulate
from ramet.agents.tree import Task
from ramet.benchmarks.evaluation import baselines, methods
from ramet.benchmarks.evaluation.baselines import BudgetedMethod, Cut, Outcome, program_limits
from ramet.benchmarks.faults.invariants import Means, Setup, check_growth, check_quiet, check_tree
from ramet.cli.main import app
from ramet.env import instructions
from ramet.env.multihop import MultihopEnvironment
from ramet.errors import PolicyError
from ramet.policy.engines.hf import HFPolicy
from ramet.policy.models.catalogue import BASE


def documents(folder: Path, questions: int = 4) -> Path:
    """A file of questions in the form of HotpotQA."""
    rows = []
    for n in range(questions):
        context = [[f"Hall {n}", [f"Ann {n} built it."]], ["Hill", ["Sheep graze."]], [f"Ann {n}", [f"She lived in Ghent{n}."]]]
        row = {"id": n, "question": f"Where did the builder of Hall {n} live?", "answer": f"Ghent{n}", "context": context}
        rows.append({**row, "supporting_facts": [[f"Hall {n}", 0], [f"Ann {n}", 0]]})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def model(context: str) -> str:
    """Says something that depends on all of the context: an answer, too much, nothing, a call, or one that is malformed."""
    rng = random.Random(zlib.crc32(context.encode()))
    call = '{"name":"spawn_clone","arguments":{"objectives":["a","b"]}}</tool_call>\0'
    if context.endswith("<tool_call>"):
        return rng.choice((call, call, "{</tool_call>\0", "[" * 300))
    answers = (f"Answer: {rng.randint(0, 3)}\0",) * 4
    return "so " * rng.choice((0, 1, 8)) + rng.choice((*answers, f"<tool_call>{call}", "\0", "y" * 300, "<tool_call>{</tool_call>\0"))


def named(name: str) -> BudgetedMethod:
    async def method(runtime: Runtime, task: Task, budget: Budget, seed: int) -> Outcome:
        return Outcome.of(await runtime.run(task, program_limits(budget), seed, program=PROGRAMS[name]))

    return method


METHODS: dict[str, Any] = {
    "tree": lambda env: baselines.tree,
    "always delegates": lambda env: baselines.always,
    "until the budget is spent": lambda env: baselines.best_of_n(str.strip),
    "rows one by one": lambda env: baselines.map_reduce(Cut(1, 12)),
    "all rows together": lambda env: baselines.map_reduce(Cut(9, 4)),
    "delegate": lambda env: methods.instructed_tree(instructions.DELEGATE),
    "self-consistency": lambda env: methods.self_consistency(env, 4),
    "best of n": lambda env: methods.best_of_n(4),
    "map-reduce": lambda env: methods.map_reduce(2),
    "retrieve": lambda env: methods.retrieve(env, 2),
    **{f"program {name}": lambda env, name=name: named(name) for name in PROGRAMS},
}
LIMITS = [
    Budget(generated=400, answer_reserve=12), Budget(generated=90), Budget(generated=1, answer_reserve=8),
    Budget(generated=600, critical_path=120, prefilled=6000, clones=3), Budget(generated=500, branch_generated=40, turns=2, context=900),
]  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_the_tree_of_a_method_keeps_its_books(tmp_path, name):
    env = MultihopEnvironment({"iid": str(documents(tmp_path))}, name="hotpotqa")
    method: BudgetedMethod = METHODS[name](env)
    kept: list[tuple[Outcome, Budget]] = []

    def grown(task: Task, budget: Budget, seed: int) -> None:
        roots: list[Growth] = []
        policy = ScriptedPolicy(model, delay=0.01, faults=Faults(seed, 6.0))

        def observe() -> None:
            for root in roots:
                check_growth(root, {})

        async def main() -> None:
            outcome = await method(Runtime(policy, PlainFormat(), watch=roots.append), task, budget, seed)
            limits = budget.model_copy(update={"width": None, "depth": 1})
            check_tree(outcome.tree, Setup(limits, Means(policy), store=ContextStore(task.documents)))
            check_quiet([policy])
            kept.append((outcome, budget))

        with contextlib.suppress(PolicyError):  # a fault that lasts
            simulate(main, seed, observe)
        observe()
        assert len(roots) == 1, "one tree for all that a method does"

    for seed, task in enumerate(env.tasks("iid", 3, 0)):
        for budget in LIMITS:
            grown(task, budget, seed)
    assert len(kept) >= 7
    for outcome, budget in kept:
        usage = outcome.tree.usage
        assert (outcome.generated, outcome.critical_path, outcome.prefilled) == (usage.generated, usage.critical_path, usage.prefilled)
        assert usage.generated <= budget.generated and outcome.clones <= usage.clones


@pytest.mark.parametrize("name", METHODS)
def test_nothing_that_a_method_wrote_is_trained_and_all_that_the_model_said_is(tmp_path, name):
    env = MultihopEnvironment({"iid": str(documents(tmp_path))}, name="hotpotqa")
    for seed, task in enumerate(env.tasks("iid", 3, 0)):
        policy = ScriptedPolicy(model)
        outcome = anyio.run(METHODS[name](env), Runtime(policy, PlainFormat()), task, Budget(generated=600, answer_reserve=8), seed)
        trained = sum(sum(branch.mask) for branch in outcome.tree.branches)
        assert trained == sum(sum(emitted) for emitted in policy.emitted.values())


class Stop(Exception):
    pass


def test_a_frontier_of_programs_that_is_killed_and_resumed_gives_the_same_table(tmp_path, monkeypatch):
    data, count = documents(tmp_path, 2), 0
    sample = HFPolicy.sample

    def frontier(name: str, stop_at: int | None) -> list[dict[str, Any]] | None:
        async def counted(self, request, partial):
            nonlocal count
            count += 1
            if count == stop_at:
                raise Stop
            return await sample(self, request, partial)

        monkeypatch.setattr(HFPolicy, "sample", counted)
        arguments = [
            "frontier", "--policy", str(BASE), "--env", "hotpotqa", "--data", str(data), "--limit", "2", "--budgets", "60",
            "--methods", "self_consistency,best_of_n,map_reduce", "--runs", str(tmp_path), "--name", name,
            "--set", "budget.answer_reserve=2", "--set", "threads=1", "--set", "program=until-spent",
            "--json", str(tmp_path / f"{name}.json"),
        ]  # fmt: skip
        error = CliRunner().invoke(app, arguments).exception
        if isinstance(error, Stop):
            return None
        assert error is None or error.code == 0, repr(error)
        return [
            {key: value for key, value in record.items() if key != "seconds"}
            for record in json.loads((tmp_path / f"{name}.json").read_text())
            if record["record"] != "meta"
        ]

    whole = frontier("whole", None)
    made = count
    assert {r["method"] for r in whole if r["record"] == "point"} == {"self_consistency", "best_of_n", "map_reduce", "program"}
    rng, count, kills = random.Random(0), 0, 0
    for part in (0.3, 0.8):  # in the middle of one method after another
        assert frontier("cut", round(part * made)) is None
        kills += 1
        for path in (tmp_path / "cut").glob("journal-*.jsonl"):  # as a kill leaves it: the last record is torn
            written = path.read_bytes()
            path.write_bytes(written[: max(written.find(b"\n") + 1, len(written) - rng.randint(0, 40))])
    assert frontier("cut", None) == whole
    assert made <= count <= made + 8 * kills, "what was sampled before a kill is not sampled again"
