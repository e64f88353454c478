"""The samples of updates: trees, from a journal or from the engines, in any order and none of them twice."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator

from ramet.agents.journal import Journal, fingerprint
from ramet.agents.tree import Tree
from ramet.policy.openrlhf.executor import Rollout
from ramet.policy.openrlhf.settings import RunSpec
from ramet.policy.training.runlog import STORED
from ramet.policy.training.update import Group, Reward, RewardFunction, TaskSampler, grouped, jobs_of, judged


class TreeSamples(SamplesGenerator):
    """Grows the trees of updates, several updates at a time, and judges each as soon as it is there.

    Every finished tree goes to the journal of its update first: one that was interrupted goes on with the trees that are missing.
    The trees of a task grow on one engine, which reads what they share once. `wait(refs)` gives the values of those of Ray's references
    that are done, of one at least, and raises if none ever will be. `rollouts` is the folder of the journals.
    """

    def __init__(
        self,
        strategy: Any,
        engines: list[Any],
        spec: RunSpec,
        rollouts: Path,
        draw: TaskSampler,
        judge: RewardFunction,
        wait: Callable[[list[Any]], dict[Any, Any]],
    ) -> None:
        super().__init__(strategy, None, None, None, engines)
        self.spec, self._rollouts, self.draw, self._judge, self._wait = spec, rollouts, draw, judge, wait
        self._begun: dict[int, _Update] = {}
        self._pending: dict[Any, tuple[int, tuple[int, int], int]] = {}
        self._loads = [0] * len(engines)
        self._judges = ThreadPoolExecutor(spec.cluster.reward_concurrency)

    def begin(self, update: int) -> None:
        """Start the trees of an update that are not in its journal. Does not wait."""
        if update in self._begun:
            return
        path = self._rollouts / f"{update:06d}.jsonl"
        drawn = list(self.draw(update))
        begun = _Update(drawn, Journal(path, fingerprint(self.spec.fingerprint, update)))
        self._begun[update] = begun
        for record in begun.journal.records:
            self._keep(begun, (record["group"], record["number"]), STORED.validate_json(record["tree"]))
        begun.journal.records.clear()
        loads = [(load, engine) for engine, load in enumerate(self._loads)]
        heapq.heapify(loads)
        places: dict[int, int] = {}
        train = self.spec.train
        for job in jobs_of(drawn, update, train.group_size, self.spec.seed):
            group, number = job.key
            assert isinstance(group, int) and isinstance(number, int)
            if (group, number) in begun.trees:
                continue
            if group not in places:
                load, places[group] = heapq.heappop(loads)
                heapq.heappush(loads, (load + train.group_size, places[group]))
            engine = places[group]
            rollout = Rollout(job, self.spec.model, self.spec.chat, train.temperature, self.spec.always_show_budget)
            ref = self.vllm_engines[engine].generate_responses.remote(
                prompt=rollout, label=None, sampling_params=None, max_length=0, hf_tokenizer=None, num_samples=1
            )
            self._pending[ref] = (update, (group, number), engine)
            self._loads[engine] += 1

    def collect(self, update: int) -> tuple[list[Group], list[list[Reward]]]:
        """The groups of an update that was begun, and what each tree earned. Raises what the engines or the rewards raise."""
        begun = self._begun[update]
        size = self.spec.train.group_size
        while len(begun.trees) < len(begun.drawn) * size:
            self.keep(self._wait(self.growing))
        del self._begun[update]
        begun.journal.close()
        groups = grouped(begun.drawn, begun.trees, size)
        return groups, [[begun.verdicts[g, n].result() for n in range(size)] for g in range(len(groups))]

    @property
    def growing(self) -> list[Any]:
        """Ray's references to the trees that are not here yet."""
        return list(self._pending)

    def keep(self, found: Mapping[Any, Any]) -> None:
        """Take trees by their references: into the journal, then to the judge."""
        for ref, (tree,) in found.items():
            where, key, engine = self._pending.pop(ref)
            self._loads[engine] -= 1
            begun = self._begun[where]
            begun.journal.append({"group": key[0], "number": key[1], "tree": STORED.dump_json(tree).decode()}, keep=False)
            self._keep(begun, key, tree)

    def _keep(self, begun: _Update, key: tuple[int, int], tree: Tree) -> None:
        begun.trees[key] = tree
        begun.verdicts[key] = self._judges.submit(judged, self._judge, begun.drawn[key[0]][0], tree)


class _Update:
    """Trees of one update as they come."""

    def __init__(self, drawn: list[Any], journal: Journal) -> None:
        self.drawn, self.journal = drawn, journal
        self.trees: dict[tuple[object, ...], Tree] = {}
        self.verdicts: dict[tuple[int, int], Future[Reward]] = {}
