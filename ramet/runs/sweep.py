"""`ramet frontier`: does delegation pay for this model on this data, at what cost, and how sure are we?

Every method answers the same held-out tasks over a sweep of budgets. The results say, for every metric of the environment:
accuracy with its interval against every cost, paired differences at equal budgets and at what each baseline really spent, cost
at equal accuracy, and the area under each frontier. Everything resumes; the folder gets `results.json`, `frontier.png`,
`report.html`, `results.csv` and `results.tex`.
"""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ramet.agents import programs
from ramet.agents.journal import Journal, fingerprint
from ramet.agents.sampling import Sampling
from ramet.agents.transcripts import TREES
from ramet.benchmarks.evaluation import frontier, methods
from ramet.benchmarks.evaluation.baselines import BudgetedMethod
from ramet.benchmarks.evaluation.harness import Measured, MethodEntry, failures, grouped, point
from ramet.display import plots
from ramet.display.page import write_page
from ramet.env import instructions
from ramet.env.environment import Environment
from ramet.env.multihop import MultihopEnvironment
from ramet.env.splits import TUNING
from ramet.errors import ConfigError
from ramet.policy.models.catalogue import resolve, weights_id
from ramet.runs import tuning
from ramet.runs.build import engine_id, score_name
from ramet.runs.commands import claim_folder, data_records, print_points, run_measuring, tree_entry, workload_of
from ramet.runs.equipment import named_equipment
from ramet.runs.settings import RunConfig
from ramet.storage import meta, write_json, write_text
from ramet.terminal import show

logger = logging.getLogger(__name__)

METHODS = ("direct", "cot", "self_consistency", "best_of_n", "map_reduce", "retrieve", "delegate")
CONTROLS = ("self_consistency", "best_of_n", "map_reduce")
"""Methods that are measured with trained weights too, where there are any."""


@dataclass(frozen=True, slots=True)
class MethodSetting:
    """The settings of a method.

    count        of samples, of documents per clone, or of documents read
    temperature  where the run itself is greedy
    """

    count: int
    temperature: float = 0.0


SETTINGS = {
    "self_consistency": MethodSetting(4, 0.7),
    "best_of_n": MethodSetting(4, 0.7),
    "map_reduce": MethodSetting(3),
    "retrieve": MethodSetting(3),
}
GRIDS = {
    "self_consistency": [MethodSetting(n, t) for n in (2, 4, 8) for t in (0.5, 0.9)],
    "best_of_n": [MethodSetting(n, t) for n in (2, 4, 8) for t in (0.5, 0.9)],
    "map_reduce": [MethodSetting(n) for n in (1, 3, 5)],
    "retrieve": [MethodSetting(n) for n in (1, 2, 3, 5)],
}
"""From what settings are chosen where there are tasks for it, over all budgets."""
PROTOCOL: list[Any] = [{name: asdict(setting) for name, setting in SETTINGS.items()}, programs.LEAST]
PROTOCOL += [instructions.DIRECT, instructions.COT, instructions.DELEGATE, instructions.DELEGATE_PARTS, instructions.WATCH, methods.NOTE]
"""What outcomes depend on besides the configuration."""


def entries(
    names: Sequence[str],
    config: RunConfig,
    env: Environment,
    depths: Sequence[int] = (),
    widths: Sequence[int] = (),
    score: programs.Score = programs.likelihood,
    settings: Mapping[str, MethodSetting] = SETTINGS,
) -> list[MethodEntry]:
    """The methods to measure, by name; `delegate` once for each depth and width. Raises `ConfigError` for those that cannot be measured."""
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise ConfigError(f"no method {', '.join(unknown)}; there are {', '.join(METHODS)}")
    documents = isinstance(env, MultihopEnvironment)
    if not documents and not {"map_reduce", "retrieve"}.isdisjoint(names):
        raise ConfigError(f"map_reduce and retrieve need documents, which {config.env.kind} has none of; leave them out of --methods")
    if not config.env.language:
        raise ConfigError("frontier measures questions in words; for rows there is `ramet reproduce nano`")
    plain = Sampling(temperature=config.eval.temperature)
    made: dict[str, BudgetedMethod] = {
        "direct": methods.instructed_tree(instructions.DIRECT),
        "cot": methods.instructed_tree(instructions.COT),
        "self_consistency": methods.self_consistency(env, settings["self_consistency"].count),
        "best_of_n": methods.best_of_n(settings["best_of_n"].count, score),
        "map_reduce": methods.map_reduce(settings["map_reduce"].count),
        **({"retrieve": methods.retrieve(env, settings["retrieve"].count)} if isinstance(env, MultihopEnvironment) else {}),
    }
    sampling = {name: Sampling(temperature=config.eval.temperature or settings[name].temperature) for name in SETTINGS}
    chosen = [MethodEntry(name, made[name], sampling.get(name, plain), 0) for name in names if name in made]
    if "delegate" in names:
        delegate = methods.instructed_tree(config.env.instruction(True))
        for depth in depths or (config.budget.depth,):
            for width in widths or (config.budget.width,):
                name = "delegate" + (f" depth {depth}" if depths else "") + (f" width {width}" if widths else "")
                chosen.append(MethodEntry(name, delegate, plain, depth, width))
    return chosen


@dataclass(frozen=True)
class FrontierPlan:
    """What `ramet frontier` compares.

    methods        by name, of `METHODS`
    depths, widths  of `delegate`, to sweep over; empty: as the budget has them
    trained, solo  weights that were trained with the tool, and without it
    reward_model   chooses among the samples of `best_of_n`; None: their likelihood does
    prices         see `price_table`
    tune           tasks on which the settings of methods are chosen first; 0: as in `SETTINGS`
    accept_code    as in `claim_folder`
    """

    methods: Sequence[str]
    depths: Sequence[int] = ()
    widths: Sequence[int] = ()
    trained: str | None = None
    solo: str | None = None
    reward_model: Path | None = None
    prices: Mapping[str, float] = field(default_factory=dict)
    tune: int = 0
    accept_code: bool = False


def frontier_command(policy: str, config: RunConfig, plan: FrontierPlan, directory: Path, out: Path | None) -> None:
    """Measure, compare, draw, write."""
    if (plan.trained or plan.solo) and config.url:
        raise ConfigError("a server samples with the weights that it has loaded; measure trained ones with another --set backend")
    config.env.check_measurable()
    model: str | Path = policy if config.named_by_server else resolve(policy)
    env = config.env.build()
    score = programs.likelihood if plan.reward_model is None else preference(plan.reward_model)
    entries(plan.methods, config, env, plan.depths, plan.widths, score)  # says what cannot be, before anything is made
    named_equipment(config)
    data = data_records(config)
    claim_folder(directory, config, plan.accept_code)
    measured: list[Measured] = []
    choices: list[dict[str, Any]] = []
    models: dict[str, str] = {}
    tried = {name: [asdict(setting) for setting in grid] for name, grid in GRIDS.items()} if plan.tune else {}
    identity = [config.identity(), config.env.files(), engine_id(config, model), PROTOCOL, plan.tune, tried]
    identity += [None if plan.reward_model is None else weights_id(plan.reward_model)]
    with Journal(directory / "journal.jsonl", fingerprint(*identity)) as journal:
        settings = tuned([name for name in plan.methods if name in SETTINGS], config, env, model, plan.tune, score, journal, policy)
        chosen = entries(plan.methods, config, env, plan.depths, plan.widths, score, settings)
        choices += choice_records("base", settings)
        chosen += [tree_entry("program", config, True)] if config.program else []
        measured += run_measuring(config, model, chosen, env.splits, journal, policy)
    for name, weights in (("trained", plan.trained), ("solo", plan.solo)):
        if weights is not None:
            path = resolve(weights)
            with Journal(directory / f"{name}.jsonl", fingerprint(*identity, engine_id(config, path))) as journal:
                own = [tree_entry(name, config, name == "trained")]
                if name == "trained":
                    own.append(replace(tree_entry("trained, never delegates", config, False), programmed=False))
                controls = [n for n in plan.methods if n in CONTROLS]
                settings = tuned(controls, config, env, path, plan.tune, score, journal, weights)
                own += [replace(e, name=f"{e.name} ({name})") for e in entries(controls, config, env, score=score, settings=settings)]
                measured += run_measuring(config, path, own, env.splits, journal, weights)
                choices += choice_records(name, settings)
                models |= {entry.name: weights for entry in own}
    delegates = next((e.name for e in chosen if e.name.startswith("delegate")), None)
    winner = "trained" if plan.trained else "solo" if plan.solo else delegates
    records = [meta("frontier", config.seed), *data, *choices, *results(measured, config, env, winner, plan.prices, models, policy)]
    records += failures(measured)
    write_json(directory / "results.json", records)
    if out is not None:
        write_json(out, records)
    plots.costs(records, directory / "frontier.png")
    write_page(directory / "report.html", f"{policy} on {config.env.kind}", records)
    write_text(directory / "results.csv", table(records))
    write_text(directory / "results.tex", latex(records))
    first = metrics_of(config, env)[0]
    print_points([r for r in records if r["record"] == "point" and r["metric"] == first], score_name(config))
    _say(records, first)
    files = ("results.json", "frontier.png", "report.html", "results.csv", "results.tex", TREES)
    logger.info(f"run folder {directory}: {', '.join(name for name in files if (directory / name).exists())}")


def tuned(
    names: Sequence[str],
    config: RunConfig,
    env: Environment,
    model: str | Path,
    tasks: int,
    score: programs.Score,
    journal: Journal,
    label: str,
) -> dict[str, MethodSetting]:
    """Of each method's settings the one that does best over all budgets on `tasks` tasks of the tuning split; the first on ties."""
    chosen = {name: _sampled(setting, config) for name, setting in SETTINGS.items()}
    if not tasks:
        return chosen
    grids = {name: list(dict.fromkeys(_sampled(setting, config) for setting in GRIDS[name])) for name in names}
    few = config.model_copy(update={"eval": config.eval.model_copy(update={"tasks": tasks})})

    def candidates(env: Environment) -> tuning.Candidates[tuple[str, MethodSetting]]:
        on = workload_of(few, env, TUNING["iid"])
        return {
            (name, setting): (replace(entry, name=f"{name} {setting.count} {setting.temperature:g}"), on)
            for name, grid in grids.items()
            for setting in grid
            for entry in entries([name], config, env, score=score, settings={**SETTINGS, name: setting})
        }

    sums = tuning.scores(few, model, candidates, journal, f"{label}: choosing settings")
    return chosen | {name: tuning.best_of_all([(name, setting) for setting in grid], sums)[1] for name, grid in grids.items()}


def _sampled(setting: MethodSetting, config: RunConfig) -> MethodSetting:
    """The setting with the temperature that is used: the run's own, where it has one, applies to every method."""
    return replace(setting, temperature=config.eval.temperature or setting.temperature)


def choice_records(weights: str, settings: Mapping[str, MethodSetting]) -> list[dict[str, Any]]:
    """A `choice` record for each method."""
    return [{"record": "choice", "weights": weights, "method": name, **asdict(setting)} for name, setting in settings.items()]


def preference(path: Path) -> programs.Score:
    """The score that a reward model gives the last turn of an attempt as an answer to the task's last message."""
    from ramet.rewards.preference import PreferenceModel

    model = PreferenceModel(path)
    return lambda task, attempt, text: model.score(task.messages[-1].content, text)


def metrics_of(config: RunConfig, env: Environment) -> tuple[str, ...]:
    """By what outcomes are graded, first what gave them their scores."""
    return ("score", *env.metrics) if config.reward.function else env.metrics


def results(
    measured: Sequence[Measured],
    config: RunConfig,
    env: Environment,
    winner: str | None,
    prices: Mapping[str, float],
    models: Mapping[str, str],
    model: str,
) -> list[dict[str, Any]]:
    """All records, for every metric: that of the scores, and the environment's others, since answers are kept."""
    seed = config.eval.seed + config.seed
    tasks = {task.id: task for split in env.splits for task in env.tasks(split, config.eval.tasks, seed)}
    records: list[dict[str, Any]] = []
    for number, metric in enumerate(metrics_of(config, env)):
        graded = [replace(m, score=env.grade(tasks[m.task], m.outcome.answer, metric)) for m in measured] if number else measured
        groups = grouped(graded)
        of_metric: list[dict[str, Any]] = []
        for group in groups.values():
            spent = sum(frontier.money(m.outcome, prices) for m in group) / len(group) if prices else None
            recalls = [m.outcome.recall for m in group if m.outcome.recall is not None]
            statuses = [m.outcome.status for m in group]
            of_metric.append(
                point(group)
                | {
                    "method": group[0].method, "model": models.get(group[0].method, model), "money": spent,
                    "recall": sum(recalls) / len(recalls) if recalls else None,
                    "out_of_budget_rate": statuses.count("out of budget") / len(statuses),
                }
            )  # fmt: skip
        if winner is not None:
            compared = frontier.comparisons(groups, winner)
            of_metric += [*compared, *frontier.claims(compared), *frontier.matched(groups, winner)]
            of_metric += frontier.equal_accuracy([r for r in of_metric if r["record"] == "point"], winner)
        of_metric += [area for cost in ("generated", "prefilled", "critical_path") for area in frontier.areas(groups, cost)]
        records += [{**record, "env": config.env.kind, "metric": metric} for record in of_metric]
    return records


def price_table(texts: Sequence[str]) -> dict[str, float]:
    """Prices per million tokens from `name=number` texts. Raises `ConfigError`.

    Cached tokens cost what prefilled ones do, unless they have a price of their own.
    """
    prices: dict[str, float] = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            prices[name.strip()] = float(value)
        except ValueError:
            raise ConfigError(f"--price {text!r} is not of the form generated=0.6") from None
        if name.strip() not in ("generated", "prefilled", "cached") or not 0 <= prices[name.strip()] < float("inf"):
            raise ConfigError(f"--price {text!r}: there are generated, prefilled and cached, at zero or more a million tokens")
    return {"cached": prices["prefilled"], **prices} if "prefilled" in prices else prices


_COLUMNS = (
    "env", "metric", "split", "method", "budget", "n", "accuracy", "ci_low", "ci_high", "generated", "prefilled", "cached",
    "critical_path", "attention", "seconds", "money", "spawn_rate", "recall",
)  # fmt: skip


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """The `point` records as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(r for r in records if r["record"] == "point")
    return text.getvalue()


def latex(records: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy by method and budget of each metric and split, as LaTeX tabulars."""
    points = [r for r in records if r["record"] == "point"]
    parts = []
    for metric, split in dict.fromkeys((p["metric"], p["split"]) for p in points):
        chosen = {(p["method"], p["budget"]): p for p in points if (p["metric"], p["split"]) == (metric, split)}
        budgets = sorted({budget for _, budget in chosen})
        lines = [f"% {metric}, {split}, n = {next(iter(chosen.values()))['n']}", rf"\begin{{tabular}}{{l{'r' * len(budgets)}}}"]
        lines.append(" & ".join(["method", *map(str, budgets)]) + r" \\ \hline")
        for method in dict.fromkeys(name for name, _ in chosen):
            cells = [chosen.get((method, budget)) for budget in budgets]
            shown = [f"${p['accuracy']:.3f}\\,[{p['ci_low']:.2f}, {p['ci_high']:.2f}]$" if p else "" for p in cells]
            lines.append(" & ".join([method.replace("_", r"\_"), *shown]) + r" \\")
        parts.append("\n".join([*lines, r"\end{tabular}", ""]))
    return "\n".join(parts)


def _say(records: Sequence[Mapping[str, Any]], metric: str) -> None:
    """Print the comparison at matched cost, one line for each baseline and split."""
    chosen = [r for r in records if r["record"] == "matched" and r["metric"] == metric]
    for baseline, split in dict.fromkeys((r["baseline"], r["split"]) for r in chosen):
        rows = [r for r in chosen if (r["baseline"], r["split"]) == (baseline, split)]
        known = [r for r in rows if r["difference"] is not None]
        better, worse = (sum(frontier.clear(r) == sign for r in known) for sign in (1, -1))
        none = len(rows) - len(known)
        show(
            f"{rows[0]['policy']} for at most what {baseline} spent ({split}, {metric}): clearly better at {better}, "
            f"clearly worse at {worse} of {len(known)} budgets" + (f"; at {none} it costs more at any budget" if none else "")
        )
