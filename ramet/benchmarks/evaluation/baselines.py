"""The methods that delegation is compared with, each under the same kind of budget.

Every method turns a task and a budget into an `Outcome`: what one tree answered, and what its ledger says was spent. All see the
same information: the task's rows are in every root prompt. All but the first are programs (`ramet.agents.programs`).

- `tree`: the model decides (base, trained; with depth 0, solo, or weights that learned to spawn and may not).
- `always`: the same, but that it delegates is decided; how is not.
- `best_of_n`: whole solutions in one context each, until the budget is used up; majority vote.
- `map_reduce`: a program hands a fixed number of rows to each clone and the results to the model. The
  text of its call is free, because no model wrote it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from ramet.agents import programs
from ramet.agents.budget import Budget
from ramet.agents.context import ContextStore
from ramet.agents.program import Program, ProgramBranch
from ramet.agents.protocol import parse_call
from ramet.agents.runtime import Runtime
from ramet.agents.tree import Branch, Status, Task, Tree
from ramet.env.arithmetic import OBJECTIVE, statement
from ramet.errors import CallError, ConfigError, PolicyError, RefusedRequest


@dataclass(frozen=True, slots=True)
class Outcome:
    """One answer and its cost: tokens as in `Usage`, and seconds on the clock.

    clones   contexts to which a part of the work was handed; attempts at the whole task are none
    recall   of the documents that support the answer, the share that was read apart from the others: named for a clone,
             or retrieved. None where the task names none
    starved  see `Tree.starved`; "" if anything was sampled
    tree     what was grown, until it is graded
    """

    answer: str | None
    generated: int
    critical_path: int
    prefilled: int
    spawned: bool
    clones: int
    status: str
    cached: int = 0
    attention: int = 0
    recall: float | None = None
    seconds: float = field(default=0.0, compare=False)
    starved: str = ""
    tree: Tree | None = field(default=None, compare=False)

    @classmethod
    def of(cls, tree: Tree, recall: float | None = None) -> Outcome:
        """The outcome of a tree. Raises what `checked` raises."""
        usage, clones = checked(tree).usage, sum(bool(branch.objective) for branch in tree.branches)
        return cls(
            tree.answer, usage.generated, usage.critical_path, usage.prefilled, clones > 0, clones, tree.root.status.value, usage.cached,
            usage.attention, recall, starved=tree.starved, tree=tree,
        )  # fmt: skip


BudgetedMethod = Callable[[Runtime, Task, Budget, int], Awaitable[Outcome]]
"""Answers a task under a budget, with a seed."""


def checked(tree: Tree) -> Tree:
    """The tree, unless the backend failed in one of its branches, which says nothing about the method.

    Raises `PolicyError`; `RefusedRequest` where the backend does not take what the root asks for, or only went past a grant: it may well
    serve other trees.
    """
    if tree.root.status is Status.REFUSED:
        raise RefusedRequest(f"task {tree.task_id}: {tree.root.reason}")
    if tree.failed:
        kind = RefusedRequest if tree.overran else PolicyError
        raise kind(f"task {tree.task_id} failed: {tree.failed}")
    return tree


async def tree(runtime: Runtime, task: Task, budget: Budget, seed: int) -> Outcome:
    """Let the model decide within the budget."""
    return await _decided(runtime, task, budget, seed)


async def always(runtime: Runtime, task: Task, budget: Budget, seed: int) -> Outcome:
    """`tree`, but the root's first turn opens a call, in the words of a branch of the nano model that delegates."""
    return await _decided(runtime, task, budget, seed, programs.always(statement(len(task.documents))))


async def _decided(runtime: Runtime, task: Task, budget: Budget, seed: int, program: Program | None = None) -> Outcome:
    grown = await runtime.run(task, budget, seed, program=program)
    return Outcome.of(grown, support_recall(task, named_keys(grown, runtime, ContextStore(task.documents))))


def named_keys(tree: Tree, runtime: Runtime, store: ContextStore) -> set[str]:
    """The context keys that the calls of a tree name, whoever wrote them."""
    keys: set[str] = set()
    for branch in tree.branches:
        role = runtime.roles.get(branch.role)
        chat = (role and role.chat) or runtime.chat
        for turn in branch.turns:
            for text in chat.parse(turn.sampled or turn.appended[: turn.free]).calls if turn.clones else ():
                with suppress(CallError):  # other tools' calls may stand beside the one that has started clones
                    keys.update(key for request in parse_call(text).requests(store)[0] for key in request.context_keys)
    return keys


def support_recall(task: Task, keys: Collection[str]) -> float | None:
    """The share of the task's supporting documents that `keys` name; None where it has none."""
    supporting = task.meta.get("supporting")
    if not supporting:
        return None
    resolved = set(ContextStore(task.documents).resolve(keys)[0])
    return sum(key in resolved for key in supporting) / len(supporting)


def program_limits(budget: Budget) -> Budget:
    """The limits of a program that starts clones itself, and decides how many: one level, which may not spawn."""
    return budget.model_copy(update={"depth": 1, "width": None})


def best_of_n(canonical: Callable[[str], str]) -> BudgetedMethod:
    """Independent single-context solutions until the budget is spent (`ramet.agents.programs.until_spent`)."""

    async def method(runtime: Runtime, task: Task, budget: Budget, seed: int) -> Outcome:
        return Outcome.of(await runtime.run(task, program_limits(budget), seed, program=programs.until_spent(canonical)))

    return method


@dataclass(frozen=True, slots=True)
class Cut:
    """How map-reduce cuts a task: rows for each clone, and tokens that the reducer keeps for each result that it has to add."""

    rows: int
    kept: int


def map_reduce(cut: Cut | Mapping[int, Cut]) -> BudgetedMethod:
    """The method with a fixed cut, for all budgets or by budget.

    The reducer reads what a branch of the nano model that had called for itself would read.
    """

    async def method(runtime: Runtime, task: Task, budget: Budget, seed: int) -> Outcome:
        if budget.generated is None:
            raise ConfigError("map-reduce over rows needs a limit on generated tokens, by which it is cut")
        program = _dealt(cut if isinstance(cut, Cut) else cut[budget.generated], budget.generated)
        return Outcome.of(await runtime.run(task, program_limits(budget), seed, program=program))

    return method


def _dealt(cut: Cut, generated: int) -> Program:
    async def program(branch: ProgramBranch) -> Branch | None:
        keys = list(branch.task.documents)
        groups = [keys[i : i + cut.rows] for i in range(0, len(keys), cut.rows)]
        objectives = [{"objective": OBJECTIVE, "context_keys": group} for group in groups]
        if len(groups) == 1:
            (alone,) = await branch.attempts(objectives, keep=0)
            return alone
        keep = min(cut.kept * len(groups), generated // 2)
        await branch.spawn(objectives, text=statement(len(keys)), keep=keep, free=True)
        if broken := programs.broken(branch.clones):
            return broken
        await branch.finish(spawn=False)
        return None

    return program
