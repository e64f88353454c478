"""Run methods on tasks under a sweep of budgets, and keep every outcome.

Every graded outcome is journalled as soon as it is known, so an interrupted sweep resumes where it
stopped. Seeds are functions of the task, the method and the sweep's seed, never of the order of work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import anyio

from ramet.agents import drain
from ramet.agents.budget import Budget
from ramet.agents.chat import ChatFormat
from ramet.agents.equipment import Equipment
from ramet.agents.growth import seed_of
from ramet.agents.journal import Journal
from ramet.agents.prefixes import fresh_cache
from ramet.agents.sampling import Policy, Sampling
from ramet.agents.tasks import task_group
from ramet.agents.transcripts import Transcript, Transcripts, TreePlace
from ramet.agents.tree import Task, Tree
from ramet.benchmarks.evaluation.baselines import BudgetedMethod, Outcome
from ramet.benchmarks.evaluation.statistics import accuracy_interval
from ramet.env.environment import Environment, answered
from ramet.env.grading import reward_function
from ramet.errors import Drained, PolicyError, RefusedRequest, RewardError, TaskError
from ramet.policy.training.reward import Judge, Reward, RewardConfig


@dataclass(frozen=True, slots=True)
class MethodEntry:
    """One method to measure: its name in the results, how it works, and how it samples.

    depth, width  limits of its trees; a width of None: the workload's
    programmed    the program of the backend's equipment, if there is one, decides for the roots of its trees
    """

    name: str
    method: BudgetedMethod
    sampling: Sampling
    depth: int | None
    width: int | None = None
    programmed: bool = False


@dataclass(frozen=True, slots=True)
class Workload:
    """What a method is measured on: every task of a split under every budget, `repeats` times.

    budgets  limits on generated tokens
    limits   all other limits
    seed     of what is sampled
    judge    gives the scores; None: the environment does, by a tree's answer
    """

    split: str
    tasks: Sequence[Task]
    budgets: Sequence[int]
    limits: Budget
    seed: int
    repeats: int = 1
    judge: Judge | None = None


@dataclass(frozen=True, slots=True)
class Backend:
    """What samples, with the equipment of its trees. `in_flight` tasks run at a time; for the other options see `Runtime`."""

    policy: Policy
    chat: ChatFormat
    in_flight: int = 64
    always_show_budget: bool = True
    equipment: Equipment = field(default_factory=Equipment)


@dataclass(frozen=True, slots=True)
class Measured:
    """One graded outcome of a method; or, with a reason in `failed`, one that could not be graded, which counts in no mean."""

    method: str
    split: str
    budget: int
    task: str
    size: int
    score: float
    outcome: Outcome
    repeat: int = 0
    failed: str = ""

    def record(self) -> dict[str, object]:
        """A line of the journal, in which the method is called `policy`."""
        values = asdict(self)
        del values["outcome"]["tree"]
        return {"policy": values.pop("method"), **{name: value for name, value in values.items() if name != "failed" or value}}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Measured:
        """From its `record`."""
        values = dict(record)
        return cls(method=values.pop("policy"), outcome=Outcome(**values.pop("outcome")), **values)


_OUTCOME = ("policy", "split", "budget", "task", "repeat")
"""What tells outcomes apart, in the places of transcripts."""
_GROWN: ContextVar[list[Tree]] = ContextVar("grown")
"""The trees of the outcome that is being produced."""
FAILED = Outcome(None, 0, 0, 0, False, 0, "failed")


async def measure(
    entry: MethodEntry,
    env: Environment,
    workload: Workload,
    backend: Backend,
    journal: Journal,
    report: Callable[[int], None] | None = None,
    transcripts: Transcripts | None = None,
) -> list[Measured]:
    """All outcomes of one method on a workload. Those that are in the journal already are not computed again.

    The trees of an outcome are added to `transcripts` just before it is journalled; see `forget_unfinished`.

    A task that the backend refuses (`RefusedRequest`: a prompt that is too long) is recorded as failed, with the reason, and the
    others are measured; if it refuses all of them, that is raised and nothing is recorded.
    `report` is called with the number of outcomes that have become known, first with that of those in the journal. Raises `Drained`,
    once the outcomes in progress are known, if the process is asked to stop.
    """
    split, seed = workload.split, workload.seed
    done = {(m.budget, m.task, m.repeat): m for m in map(Measured.of, journal) if m.method == entry.name and m.split == split}
    # Task by task: what one run of a task has read, its other budgets find in the backend's cache.
    wanted = [(budget, task, repeat) for task in workload.tasks for budget in workload.budgets for repeat in range(workload.repeats)]
    todo = [(b, t, r) for b, t, r in wanted if (b, t.id, r) not in done]
    missing = iter(todo)
    if report is not None:
        report(len(wanted) - len(todo))
    equipment = backend.equipment if entry.programmed else replace(backend.equipment, program=None)
    runtime = equipment.runtime(
        backend.policy, backend.chat, entry.sampling, always_show_budget=backend.always_show_budget,
        on_end=lambda tree: _GROWN.get().append(tree),
    )  # fmt: skip
    judge = workload.judge or Judge(reward_function(env), RewardConfig())

    def keep(budget: int, task: Task, repeat: int, trees: Sequence[Tree], reward: Reward | None, error: str = "") -> None:
        if transcripts is not None and transcripts.keeps:
            place = {"policy": entry.name, "split": split, "budget": budget, "task": task.id, "repeat": repeat}
            parts, chats = {} if reward is None else asdict(reward), equipment.chats()
            transcripts.append(
                [
                    Transcript({**place, "number": n}, task.id, tree, tuple(tree.texts(backend.chat, chats)), task.reference, parts, error)
                    for n, tree in enumerate(trees)
                ]
            )

    async def worker() -> None:
        for budget, task, repeat in missing:
            if drain.requested():
                return
            width = {} if entry.width is None else {"width": entry.width}
            limits = workload.limits.model_copy(update={"generated": budget, "depth": entry.depth, **width})
            place = f"{entry.name}/{task.id}" if repeat == 0 else f"{entry.name}/{task.id}/{repeat}"
            started = anyio.current_time()
            trees: list[Tree] = []
            _GROWN.set(trees)
            try:
                with fresh_cache():
                    outcome = await entry.method(runtime, task, limits, seed_of(seed, place, budget))
            except RefusedRequest as error:
                refused[budget, task.id, repeat] = (error, task, trees)
                continue
            except PolicyError as error:
                keep(budget, task, repeat, trees, None, str(error))
                raise
            except Drained:
                return  # what it waits for may take long; it is grown again
            graded = outcome.tree or answered(task, outcome.answer)
            outcome = replace(outcome, seconds=anyio.current_time() - started, tree=None)
            try:
                with anyio.CancelScope(shield=True):  # what was paid for is kept
                    reward = await judge(task, graded)
            except RewardError as error:
                keep(budget, task, repeat, trees, None, str(error))
                raise
            measured = Measured(entry.name, split, budget, task.id, env.size(task), reward.score, outcome, repeat)
            keep(budget, task, repeat, trees, reward)
            journal.append(measured.record())
            done[budget, task.id, repeat] = measured
            if report is not None:
                report(1)

    refused: dict[tuple[int, str, int], tuple[RefusedRequest, Task, list[Tree]]] = {}
    async with task_group() as group:
        for _ in range(backend.in_flight):
            group.start_soon(worker)
    if refused and not any(not m.failed for m in done.values()):
        raise next(iter(refused.values()))[0]
    sizes = {task.id: env.size(task) for task in workload.tasks}
    for (budget, name, repeat), (error, task, trees) in refused.items():
        failed = Measured(entry.name, split, budget, name, sizes[name], 0.0, FAILED, repeat, str(error))
        keep(budget, task, repeat, trees, None, str(error))
        journal.append(failed.record())
        done[budget, name, repeat] = failed
        if report is not None:
            report(1)
    if any((b, t.id, r) not in done for b, t, r in todo):
        raise Drained
    return [done[budget, task.id, repeat] for budget, task, repeat in wanted]


def forget_unfinished(transcripts: Transcripts, journal: Iterable[Mapping[str, Any]]) -> None:
    """Drop the trees of outcomes that the journal does not have: a resumed run grows them again."""
    done = {tuple(getattr(m, name) for name in ("method", *_OUTCOME[1:])) for m in map(Measured.of, journal)}

    def wanted(place: TreePlace) -> bool:
        return "split" not in place or tuple(place[name] for name in _OUTCOME) in done

    transcripts.forget(wanted)


def point(measured: Sequence[Measured]) -> dict[str, object]:
    """The flat record of one method at one budget on one split."""
    first = measured[0]
    scores: dict[str, list[float]] = {}
    for m in measured:
        scores.setdefault(m.task, []).append(m.score)
    interval = accuracy_interval(scores)

    def mean(name: str) -> float:
        return sum(float(getattr(m.outcome, name)) for m in measured) / len(measured)

    return {
        "record": "point",
        "policy": first.method,
        "split": first.split,
        "budget": first.budget,
        "n": interval.n,
        "accuracy": interval.mean,
        "ci_low": interval.low,
        "ci_high": interval.high,
        "generated": mean("generated"),
        "critical_path": mean("critical_path"),
        "prefilled": mean("prefilled"),
        "spawn_rate": mean("spawned"),
        "clones": mean("clones"),
        "cached": mean("cached"),
        "attention": mean("attention"),
        "seconds": mean("seconds"),
    }


SIZE_RANGES = 6


def by_size(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """Accuracy and spawn rate in up to `SIZE_RANGES` ranges of task size, for one method at one budget on one split."""
    sizes = sorted({m.size for m in measured})
    width = -(-(sizes[-1] - sizes[0] + 1) // SIZE_RANGES)
    records = []
    for low in range(sizes[0], sizes[-1] + 1, width):
        if chosen := [m for m in measured if low <= m.size < low + width]:
            records.append({**point(chosen), "record": "size", "size_low": low, "size_high": min(low + width - 1, sizes[-1])})
    return records


def grouped(measured: Iterable[Measured]) -> dict[tuple[str, str, int], list[Measured]]:
    """By (method, split, budget), in the order in which these first appear.

    A task that failed for one method, at one budget, is left out for all on its split: what is compared is measured on the same tasks.
    Raises `TaskError` where that leaves none.
    """
    measured = list(measured)
    without = {(m.split, m.task): m.failed for m in measured if m.failed}
    groups: dict[tuple[str, str, int], list[Measured]] = {}
    for m in measured:
        if (m.split, m.task) not in without:
            groups.setdefault((m.method, m.split, m.budget), []).append(m)
    for split in dict.fromkeys(m.split for m in measured):
        if all(key[1] != split for key in groups):
            raise TaskError(f"every task of {split} failed: {next(f for (s, _), f in without.items() if s == split)}")
    return groups


def failures(measured: Iterable[Measured]) -> list[dict[str, object]]:
    """A record of each task that could not be measured, with the reason."""
    return [
        {
            "record": "failed", "policy": m.method, "split": m.split, "budget": m.budget, "task": m.task, "repeat": m.repeat,
            "reason": m.failed,
        }
        for m in measured
        if m.failed
    ]  # fmt: skip
