"""The samples of updates: trees, read from a journal or grown on the engines, in any order and none of them twice."""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator

from ramet.agents.budget import Budget
from ramet.agents.journal import Journal, fingerprint
from ramet.agents.tree import Task, Tree
from ramet.policy.openrlhf.executor import Rollout
from ramet.policy.openrlhf.settings import RunSpec
from ramet.policy.training.identity import identity
from ramet.policy.training.reward import Judge, KeptRewards, Reward
from ramet.policy.training.update import Group, LearningProblem, group_trees, tree_jobs


class TreeSamples(SamplesGenerator):
    """Grows the trees of updates, of several at a time, and computes the reward of each tree as soon as it is finished.

    Every finished tree is first written to the journal of its update, so that an interrupted update grows only the missing trees.
    The trees of a task grow on one engine, which prefills what they share once.

    rollouts  the folder of the journals
    wait      waits until at least one of Ray's references is done; returns the values of all that are, and raises if none ever will be
    """

    def __init__(
        self,
        strategy: Any,
        engines: list[Any],
        spec: RunSpec,
        rollouts: Path,
        problem: LearningProblem,
        wait: Callable[[list[Any]], dict[Any, Any]],
    ) -> None:
        super().__init__(strategy, None, None, None, engines)
        self.spec, self._rollouts, self._problem, self._wait = spec, rollouts, problem, wait
        self._begun: dict[int, _Update] = {}
        self._pending: dict[Any, tuple[int, tuple[int, int], int]] = {}
        self._loads = [0] * len(engines)
        self._judge = Judge(problem.reward_function, problem.rewarding)

    def begin(self, update: int) -> None:
        """Start to grow the trees of an update that are not in its journal. Returns at once."""
        if update in self._begun:
            return
        path = self._rollouts / f"{update:06d}.jsonl"
        tasks = list(self._problem.sample_tasks(update))
        begun = _Update(tasks, Journal(path, fingerprint(self.spec.fingerprint, update)))
        if not self._problem.compared:
            code = identity(self._problem.reward_function)
            begun.kept = KeptRewards(self._rollouts.parent / "rewards" / path.name, fingerprint(self.spec.fingerprint, code, update))
        self._begun[update] = begun
        for record in begun.journal.records:
            tree = Tree.of(json.loads(record["tree"]))
            if tree.task_id == tasks[record["group"]][0].id:  # else the code that draws tasks has changed since
                self._keep(begun, (record["group"], record["number"]), tree)
        begun.journal.records.clear()
        loads = [(load, engine) for engine, load in enumerate(self._loads)]
        heapq.heapify(loads)
        places: dict[int, int] = {}
        train = self.spec.train
        for job in tree_jobs(tasks, update, train.group_size, self.spec.seed):
            group, number = job.key
            assert isinstance(group, int) and isinstance(number, int)
            if (group, number) in begun.trees:
                continue
            if group not in places:
                load, places[group] = heapq.heappop(loads)
                heapq.heappush(loads, (load + train.group_size, places[group]))
            engine = places[group]
            rollout = Rollout(
                job, self.spec.model, self.spec.chat, train.temperature, self.spec.always_show_budget, self.spec.build_equipment,
                self.spec.fingerprint,
            )  # fmt: skip
            ref = self.vllm_engines[engine].generate_responses.remote(
                prompt=rollout, label=None, sampling_params=None, max_length=0, hf_tokenizer=None, num_samples=1
            )
            self._pending[ref] = (update, (group, number), engine)
            self._loads[engine] += 1

    def collect(self, update: int) -> tuple[list[Group], list[list[Future[Reward]]]]:
        """Wait for the trees of an update that was begun. Returns its groups, and the rewards by group and tree, which may yet raise.

        Raises what the engines raise.
        """
        begun = self._begun[update]
        size = self.spec.train.group_size
        while len(begun.trees) < len(begun.tasks) * size:
            self.keep(self._wait(self.growing))
        del self._begun[update]
        begun.journal.close()
        groups = group_trees(begun.tasks, begun.trees, size)
        return groups, [[begun.rewards[g, n] for n in range(size)] for g in range(len(groups))]

    @property
    def growing(self) -> list[Any]:
        """Ray's references to the unfinished trees."""
        return list(self._pending)

    def keep(self, finished: Mapping[Any, Any]) -> None:
        """Write trees, given by their references, to the journal, and start to compute their rewards."""
        for ref, (tree,) in finished.items():
            update, key, engine = self._pending.pop(ref)
            self._loads[engine] -= 1
            begun = self._begun[update]
            begun.journal.append({"group": key[0], "number": key[1], "tree": json.dumps(tree.record())}, keep=False)
            self._keep(begun, key, tree)

    def _keep(self, begun: _Update, key: tuple[int, int], tree: Tree) -> None:
        begun.trees[key] = tree
        task, _ = begun.tasks[key[0]]
        begun.rewards[key] = self._judge.submit(task, tree, begun.kept, key)


class _Update:
    """An update whose trees are growing: its tasks, its journal, and the trees and rewards so far by (group, number)."""

    def __init__(self, tasks: list[tuple[Task, Budget]], journal: Journal) -> None:
        self.tasks, self.journal = tasks, journal
        self.trees: dict[tuple[object, ...], Tree] = {}
        self.rewards: dict[tuple[int, int], Future[Reward]] = {}
        self.kept: KeptRewards | None = None
