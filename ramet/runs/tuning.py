"""The settings of baselines, chosen on a split of their own, which is neither trained on nor measured.

Every constant of a baseline is chosen here, for each set of weights that it runs with and each split, from the values listed below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ramet.agents.growth import seed_of
from ramet.agents.journal import Journal
from ramet.agents.sampling import Sampling
from ramet.benchmarks.evaluation import baselines
from ramet.benchmarks.evaluation.baselines import Cut
from ramet.benchmarks.evaluation.harness import MethodEntry, Workload
from ramet.env.environment import Environment
from ramet.env.splits import TUNING
from ramet.runs.commands import budgets_of, judge_of, run_workloads
from ramet.runs.settings import RunConfig

ROWS = (1, 2, 3)
KEPT = (6, 4, 8, 12)
"""The first is what rows are chosen with; then it is chosen itself."""
TEMPERATURES = (0.3, 0.5, 0.7, 1.0)
SettingT = TypeVar("SettingT")
Candidates = Mapping[SettingT, tuple[MethodEntry, Workload]]
"""For each setting that is tried, its method and what that is measured on."""


@dataclass(frozen=True, slots=True)
class Choices:
    """The best settings on one split with one set of weights.

    cuts         of map-reduce, by budget; empty for weights that it does not run with
    temperature  of best of n, over all budgets
    """

    cuts: dict[int, Cut]
    temperature: float

    def records(self, weights: str, split: str) -> list[dict[str, Any]]:
        """A `choice` record for the temperature, and one for the cut at each budget."""
        common = {"record": "choice", "weights": weights, "split": split}
        cuts = [{**common, "budget": b, "map_reduce_rows": cut.rows, "map_reduce_kept": cut.kept} for b, cut in self.cuts.items()]
        return [{**common, "best_of_n_temperature": self.temperature}, *cuts]


def scores(
    config: RunConfig, model: str | Path, candidates: Callable[[Environment], Candidates[SettingT]], journal: Journal, label: str
) -> dict[SettingT, dict[int, float]]:
    """The sum of the scores of each candidate, by budget. No two candidates may have a name in common."""
    sums: dict[SettingT, dict[int, float]] = {}
    names: dict[str, SettingT] = {}

    def plan(env: Environment) -> Iterator[tuple[MethodEntry, Workload]]:
        for setting, (entry, workload) in candidates(env).items():
            names[entry.name] = setting
            sums[setting] = dict.fromkeys(workload.budgets, 0.0)
            yield entry, workload

    for m in run_workloads(config, model, plan, journal, label):
        sums[names[m.method]][m.budget] += m.score
    return sums


def best(tried: Iterable[SettingT], score: Mapping[SettingT, float]) -> SettingT:
    """The setting with the largest score; the first on ties."""
    return max(tried, key=score.__getitem__)


def best_of_all(tried: Iterable[SettingT], sums: Mapping[SettingT, Mapping[int, float]]) -> SettingT:
    """The setting that does best over all budgets."""
    return best(tried, {setting: sum(by_budget.values()) for setting, by_budget in sums.items()})


def tune(config: RunConfig, model: Path, weights: str, split: str, cut: bool, journal: Journal) -> Choices:
    """Choose on the tuning split that corresponds to `split`; cuts only if `cut`. `weights` names the model in the journal."""
    budgets = budgets_of(config, split)
    seed = seed_of(config.seed, "choose", config.eval.seed)
    label = f"tuning baselines of {weights}"

    def workload(env: Environment, tasks: int, at: Sequence[int]) -> Workload:
        chosen = env.tasks(TUNING[split], tasks, seed % 2**32)
        return Workload(TUNING[split], chosen, at, config.budget, seed, judge=judge_of(config, env))

    def temperature() -> float:
        def candidates(env: Environment) -> Candidates[float]:
            method, on = baselines.best_of_n(env.canonical), workload(env, temperature_tasks(config), budgets)
            return {t: (MethodEntry(f"{weights}_best_of_n_{t}", method, Sampling(temperature=t), 0), on) for t in TEMPERATURES}

        sums = scores(config, model, candidates, journal, label)
        return best_of_all(TEMPERATURES, sums)

    def cuts() -> dict[int, Cut]:
        greedy = Sampling(temperature=config.eval.temperature)
        sums: dict[int, dict[Cut, float]] = {budget: {} for budget in budgets}

        def best_cuts(tried: Mapping[int, Sequence[Cut]]) -> dict[int, Cut]:
            """Of the cuts that are tried at each budget, the one that does best there."""
            missing = {
                one: [budget for budget in budgets if one in tried[budget] and one not in sums[budget]]
                for one in dict.fromkeys(one for budget in budgets for one in tried[budget])
            }

            def candidates(env: Environment) -> Candidates[Cut]:
                return {
                    one: (
                        MethodEntry(f"{weights}_map_reduce_{one.rows}_{one.kept}", baselines.map_reduce(one), greedy, 0),
                        workload(env, cut_tasks(config), at),
                    )
                    for one, at in missing.items()
                    if at
                }

            for one, by_budget in scores(config, model, candidates, journal, label).items():
                for budget, score in by_budget.items():
                    sums[budget][one] = score
            return {budget: best(tried[budget], sums[budget]) for budget in budgets}

        rows = best_cuts({budget: [Cut(rows, KEPT[0]) for rows in ROWS] for budget in budgets})
        return best_cuts({budget: [Cut(rows[budget].rows, kept) for kept in KEPT] for budget in budgets})

    return Choices(cuts() if cut else {}, temperature())


def cut_tasks(config: RunConfig) -> int:
    """How many tasks a cut is tried on at a budget."""
    return config.eval.tasks // 5 or 1


def temperature_tasks(config: RunConfig) -> int:
    """How many tasks a temperature is tried on at each of the budgets."""
    return config.eval.tasks // 10 or 1
