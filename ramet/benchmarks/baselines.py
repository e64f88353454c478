"""What delegation is compared with, each under the same budget object.

Every method turns a task and a budget into an `Outcome`: one answer and what was spent on it. All see the
same information: the task's rows are in every root prompt.

- `tree`: the model decides (base, trained; with depth 0, solo).
- `best_of_n`: whole solutions in one context each, until the budget is used up; majority vote.
- `map_reduce`: a program hands a fixed number of rows to each clone and the results to the model. The
  text of its call is free, because no model wrote it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from ramet.agents.actor import seed_of
from ramet.agents.budget import Budget, fair_shares
from ramet.agents.chat import ControlTokenFormat
from ramet.agents.context import ContextStore, clone_prompt
from ramet.agents.protocol import CloneResult, left_line, render_call, render_results
from ramet.agents.runtime import Runtime
from ramet.agents.tasks import task_group
from ramet.agents.tree import Message, Status, Task, Tree
from ramet.env.arithmetic import OBJECTIVE
from ramet.errors import ConfigError, PolicyError
from ramet.nano.demonstrations import statement


def _only_generated(budget: Budget) -> int:
    """The limit on generated tokens. Methods that are programs divide that and no other currency."""
    others = ("prefilled", "critical_path", "clones", "branch_generated", "seconds")
    limited = [name for name in others if getattr(budget, name) is not None]
    if limited:
        raise ConfigError(f"best of n and map-reduce divide generated tokens only; leave out budget.{', budget.'.join(limited)}")
    if budget.generated is None:
        raise ConfigError("best of n and map-reduce need a limit on generated tokens: they divide it")
    return budget.generated


@dataclass(frozen=True, slots=True)
class Outcome:
    """One answer and its cost in tokens."""

    answer: str | None
    generated: int
    critical_path: int
    prefilled: int
    spawned: bool
    clones: int
    status: str


Method = Callable[[Runtime, Task, Budget, int], Awaitable[Outcome]]


def _checked(tree: Tree) -> Tree:
    if tree.root.status is Status.FAILED:
        raise PolicyError(f"task {tree.task_id} failed: {tree.error}")
    return tree


async def tree(runtime: Runtime, task: Task, budget: Budget, seed: int) -> Outcome:
    """Let the model decide within the budget."""
    grown = _checked(await runtime.run(task, budget, seed))
    usage = grown.usage
    return Outcome(
        grown.answer, usage.generated, usage.critical_path, usage.prefilled, grown.spawned, usage.clones, grown.root.status.value
    )


async def best_of_n(runtime: Runtime, task: Task, budget: Budget, seed: int) -> Outcome:
    """Independent single-context solutions until one no longer fits; the most frequent answer, the earliest on ties.

    Attempts that were cut vote only if none finished. They are independent, so the critical path is
    the longest one's.
    """
    total = _only_generated(budget)
    left, votes, cut = total, Counter[str](), Counter[str]()
    longest = prefilled = n = 0
    while left > 0:
        attempt = budget.model_copy(update={"generated": left, "depth": 0})
        grown = _checked(await runtime.run(task, attempt, seed_of(seed, "best_of_n", n)))
        n += 1
        left -= grown.usage.generated
        longest = max(longest, grown.usage.generated)
        prefilled += grown.usage.prefilled
        if grown.answer is not None:
            (votes if grown.root.status is Status.ANSWERED else cut)[grown.answer] += 1
        if grown.usage.generated == 0:
            break
    ranked = (votes or cut).most_common(1)
    return Outcome(ranked[0][0] if ranked else None, total - left, longest, prefilled, False, 0, f"{n} samples")


def map_reduce(rows_per_clone: int | Mapping[int, int]) -> Method:
    """The method with a fixed split, for all budgets or by budget. Needs the nano chat format, in which the call is spelled.

    The reducer reads what a branch of the nano model that had called for itself would read.
    """

    async def method(runtime: Runtime, task: Task, budget: Budget, seed: int) -> Outcome:
        if not isinstance(runtime.chat, ControlTokenFormat):
            raise ConfigError("map_reduce is written for the nano chat format")
        generated = _only_generated(budget)
        size = rows_per_clone if isinstance(rows_per_clone, int) else rows_per_clone[generated]
        keys = list(task.documents)
        groups = [keys[i : i + size] for i in range(0, len(keys), size)]
        store = ContextStore(task.documents)
        # The reducer keeps twelve tokens for each result that it has to add, and the answer.
        kept = 0 if len(groups) == 1 else min(12 * len(groups), generated // 2)
        shares = fair_shares(generated - kept, [None] * len(groups))
        trees: list[Tree | None] = [None] * len(groups)

        async def clone(i: int) -> None:
            part = Task(f"{task.id}/{i}", (Message("user", clone_prompt(store, OBJECTIVE, groups[i])),))
            limits = budget.model_copy(update={"generated": shares[i], "depth": 0})
            trees[i] = _checked(await runtime.run(part, limits, seed_of(seed, "map", i)))

        async with task_group() as group:
            for i in range(len(groups)):
                group.start_soon(clone, i)
        done = [grown for grown in trees if grown is not None]
        spent = sum(grown.usage.generated for grown in done)
        path = max(grown.usage.critical_path for grown in done)
        prefilled = sum(grown.usage.prefilled for grown in done)
        if len(groups) == 1:
            return Outcome(done[0].answer, spent, path, prefilled, True, 1, done[0].root.status.value)
        left, offered = (max(tokens - budget.answer_reserve, 0) for tokens in (generated - spent, generated))
        call = render_call([{"objective": OBJECTIVE, "context_keys": keys} for keys in groups])
        results = [CloneResult(grown.root.status, grown.answer, grown.root.reason) for grown in done]
        chat = runtime.chat
        content = "\n".join(filter(None, [task.messages[-1].content, left_line(offered, None)]))
        prompt = [
            *chat.render([*task.messages[:-1], Message("user", content)], tools=True),
            *chat.turn(statement(len(keys)), call),
            *chat.after_turn(render_results(results, left_line(left, None), runtime.result_characters), closed=True),
        ]
        limits = budget.model_copy(update={"generated": generated - spent, "depth": 0})
        reduced = _checked(await runtime.run(task, limits, seed_of(seed, "reduce", 0), prompt=prompt))
        return Outcome(
            reduced.answer,
            spent + reduced.usage.generated,
            path + reduced.usage.critical_path,
            prefilled + reduced.usage.prefilled,
            True,
            len(groups),
            reduced.root.status.value,
        )

    return method
