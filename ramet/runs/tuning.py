"""The settings of baselines, chosen on tasks that are there for that: neither trained on nor measured.

Whatever constant a baseline has is chosen here, for each set of weights that it runs with and each split, from the values listed below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ramet.agents import drain
from ramet.agents.actor import seed_of
from ramet.agents.chat import ChatFormat
from ramet.agents.journal import Journal
from ramet.agents.sampling import Sampling
from ramet.benchmarks.evaluation import baselines
from ramet.benchmarks.evaluation.baselines import Cut
from ramet.benchmarks.evaluation.harness import Entry, measure
from ramet.env.splits import TUNING
from ramet.policy.engines.hf import HFPolicy
from ramet.runs.settings import RunConfig

ROWS = (1, 2, 3)
KEPT = (6, 4, 8, 12)
"""The first is what rows are chosen with; then it is chosen itself."""
TEMPERATURES = (0.3, 0.5, 0.7, 1.0)


@dataclass(frozen=True, slots=True)
class Choices:
    """What does best on one split with one set of weights.

    cuts         of map-reduce, by budget; empty for weights that it does not run with
    temperature  of best of n, over all budgets
    """

    cuts: dict[int, Cut]
    temperature: float

    def records(self, weights: str, split: str) -> list[dict[str, Any]]:
        common = {"record": "choice", "weights": weights, "split": split}
        cuts = [{**common, "budget": b, "map_reduce_rows": cut.rows, "map_reduce_kept": cut.kept} for b, cut in self.cuts.items()]
        return [{**common, "best_of_n_temperature": self.temperature}, *cuts]


def tune(
    config: RunConfig, model: Any, chat: ChatFormat, weights: str, split: str, cut: bool, journal: Journal, report: Callable[[int], None]
) -> Choices:
    """Choose on the tuning split that is alike to `split`; cuts only if `cut`. `weights` names the model in the journal."""
    env = config.env.build()
    budgets = budgets_of(config, split)
    seed = seed_of(config.seed, "choose", config.eval.seed)

    async def scores(policy: HFPolicy, entry: Entry, tasks: int, at: Sequence[int]) -> dict[int, float]:
        drawn = env.tasks(TUNING[split], tasks, seed % 2**32)
        measured = await measure(policy, chat, entry, env, drawn, TUNING[split], at, config.budget, journal, seed, report)
        return {budget: sum(m.score for m in measured if m.budget == budget) for budget in at}

    async def cuts(policy: HFPolicy) -> dict[int, Cut]:
        found: dict[int, dict[Cut, float]] = {budget: {} for budget in budgets}

        async def best(tried: Callable[[int], Sequence[Cut]]) -> dict[int, Cut]:
            """Of the cuts that are tried at each budget, the one that does best there; the first on ties."""
            for one in dict.fromkeys(one for budget in budgets for one in tried(budget)):
                at = [budget for budget in budgets if one in tried(budget) and one not in found[budget]]
                greedy = Sampling(temperature=config.eval.temperature)
                entry = Entry(f"{weights}_map_reduce_{one.rows}_{one.kept}", baselines.map_reduce(one), greedy, 0)
                for budget, score in (await scores(policy, entry, cut_tasks(config), at)).items():
                    found[budget][one] = score
            return {budget: max(tried(budget), key=found[budget].__getitem__) for budget in budgets}

        rows = await best(lambda budget: [Cut(rows, KEPT[0]) for rows in ROWS])
        return await best(lambda budget: [Cut(rows[budget].rows, kept) for kept in KEPT])

    async def temperature(policy: HFPolicy) -> float:
        found = {}
        for value in TEMPERATURES:
            entry = Entry(f"{weights}_best_of_n_{value}", baselines.best_of_n(env.canonical), Sampling(temperature=value), 0)
            found[value] = sum((await scores(policy, entry, temperature_tasks(config), budgets)).values())
        return max(TEMPERATURES, key=found.__getitem__)

    async def main() -> Choices:
        async with HFPolicy(model, max_batch=config.train.max_batch) as policy:
            return Choices(await cuts(policy) if cut else {}, await temperature(policy))

    return drain.run(main)


def budgets_of(config: RunConfig, split: str) -> tuple[int, ...]:
    return config.eval.ood_budgets if split == "ood" else config.eval.budgets


def cut_tasks(config: RunConfig) -> int:
    """How many tasks a cut is tried on at a budget."""
    return config.eval.tasks // 5 or 1


def temperature_tasks(config: RunConfig) -> int:
    """How many tasks a temperature is tried on at each of the budgets."""
    return config.eval.tasks // 10 or 1


def outcomes(config: RunConfig, split: str, cut: bool) -> int:
    """How many outcomes `tune` looks at."""
    cuts = (len(ROWS) + len(KEPT) - 1) * cut_tasks(config) if cut else 0
    return len(budgets_of(config, split)) * (cuts + len(TEMPERATURES) * temperature_tasks(config))
