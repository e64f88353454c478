"""The trees of an update: none that the backend has failed is learned from."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import anyio
import pytest
from pydantic import TypeAdapter

from ramet.agents.budget import Budget
from ramet.agents.journal import Journal
from ramet.agents.protocol import render_call
from ramet.agents.resume import JournaledPolicy
from ramet.agents.runtime import Runtime
from ramet.agents.sampling import Partial, Sample, SampleRequest
from ramet.agents.scripted import PlainFormat, ScriptedPolicy
from ramet.agents.simulation import simulate
from ramet.agents.tree import Message, Status, Task, Tree
from ramet.errors import PolicyError
from ramet.policy.training.reward import Reward
from ramet.policy.training.update import MAX_REGROWTHS, Group, group_trees, grow_trees, rollout_metrics, tree_jobs

DRAWN = [(Task(f"t{i}", (Message("user", f"go {i}"),)), Budget()) for i in range(2)]


def program(context: str) -> str:
    if context.startswith("T") and "1: " not in context:
        return f"<tool_call>{render_call(['a', 'b'])}</tool_call>\0"
    return "Answer: 1\0"


class Failing(ScriptedPolicy):
    """The first `broken` clones that are asked for fail, as behind a server that is down."""

    broken = 0

    async def sample(self, request: SampleRequest, partial: Partial) -> Sample:
        if request.prompt[0] != ord("T") and self.broken:
            self.broken -= 1
            raise PolicyError("503 service unavailable")
        return await ScriptedPolicy.sample(self, request, partial)


def trees(broken: int, path: Path) -> tuple[list[Group], Failing]:
    policy = Failing(program)
    policy.broken = broken

    async def main() -> list[Group]:
        with Journal(path, "job") as journal:
            runtime = Runtime(JournaledPolicy(policy, journal), PlainFormat())
            return group_trees(DRAWN, await grow_trees(runtime, tree_jobs(DRAWN, 0, 4, 0), 2), 4)

    return anyio.run(main), policy


def test_a_tree_whose_clone_the_backend_failed_is_grown_anew_and_counted(tmp_path):
    calm, _ = trees(0, tmp_path / "calm")
    groups, _ = trees(3, tmp_path / "broken")
    grown = [tree for _, of in groups for tree in of]
    assert all(branch.status is Status.ANSWERED for tree in grown for branch in tree.branches)
    verdicts = [[Reward(1.0, {}, 1.0)] * 4] * 2
    none = [[[0.0] * 3] * 4] * 2
    assert 2 <= rollout_metrics(0, groups, verdicts, none)["regrown"] <= 3
    assert rollout_metrics(0, calm, verdicts, none)["regrown"] == 0
    ids = [[[branch.ids for branch in tree.branches] for tree in of] for _, of in calm]
    assert all([b.ids for b in t.branches] == ids[g][n] for g, (_, of) in enumerate(groups) for n, t in enumerate(of) if not t.regrown)
    # Read again, stored or from the samples, they are the same.
    assert [Tree.of(json.loads(json.dumps(tree.record()))) for tree in grown] == grown
    again, policy = trees(0, tmp_path / "broken")
    assert not policy.requests and [[(t.seed, t.regrown, t.root.ids) for t in of] for _, of in again] == [
        [(t.seed, t.regrown, t.root.ids) for t in of] for _, of in groups
    ]


def test_a_chain_of_clones_may_be_as_deep_as_its_budget(tmp_path):
    """Grown, priced, stored, read again and sent to another process; no step of it goes down the chain call by call."""
    call = f"<tool_call>{render_call(['go'])}</tool_call>\0"

    async def main() -> Tree:
        policy = ScriptedPolicy(lambda c: "Answer: up\0" if "1: " in c or not c.startswith("T") else call, stride=99)
        return await Runtime(policy, PlainFormat()).run(Task("t", (Message("user", "go"),)), Budget(depth=400))

    tree = simulate(main, 0)
    assert max(branch.depth for branch in tree.branches) == 400 and tree.usage.critical_path == tree.usage.generated
    for again in (Tree.of(json.loads(json.dumps(tree.record()))), pickle.loads(pickle.dumps(tree))):
        assert [b.ids for b in again.branches] == [b.ids for b in tree.branches] and again.usage == tree.usage
        assert [len(b.clones) for b in again.branches] == [len(b.clones) for b in tree.branches]


def test_trees_that_were_stored_with_clones_inside_their_parents_can_be_read(tmp_path):
    grown = [tree for _, of in trees(0, tmp_path / "j")[0] for tree in of]
    nested = TypeAdapter(Tree)
    assert [Tree.of(json.loads(nested.dump_json(tree))) for tree in grown] == grown
    assert [pickle.loads(pickle.dumps(tree)) for tree in grown] == grown


def test_a_backend_that_stays_away_ends_the_update_with_what_it_said(tmp_path):
    with pytest.raises(PolicyError, match=rf"task t\d failed {MAX_REGROWTHS + 1} times, the last with: 503 service unavailable; .* resume"):
        trees(1000, tmp_path / "j")
