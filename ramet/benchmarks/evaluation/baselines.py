"""The methods that delegation is compared with, each under the same kind of budget.

Every method turns a task and a budget into an `Outcome`: one answer and what was spent on it. All see the
same information: the task's rows are in every root prompt.

- `tree`: the model decides (base, trained; with depth 0, solo, or weights that learned to spawn and may not).
- `always`: the same, but that it delegates is decided; how is not.
- `best_of_n`: whole solutions in one context each, until the budget is used up; majority vote (self-consistency: Wang et al.,
  "Self-Consistency Improves Chain of Thought Reasoning in Language Models", arXiv:2203.11171).
- `map_reduce`: a program hands a fixed number of rows to each clone and the results to the model. The
  text of its call is free, because no model wrote it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from ramet.agents.budget import Budget, fair_shares
from ramet.agents.chat import ControlTokenFormat
from ramet.agents.context import ContextStore, clone_prompt
from ramet.agents.growth import seed_of
from ramet.agents.protocol import CloneResult, SpawnClone, left_line, parse_call, render_call, render_results, tool_schema
from ramet.agents.runtime import Runtime
from ramet.agents.sampling import Partial, Policy, PolicyWrapper, Sample, SampleRequest
from ramet.agents.tasks import task_group
from ramet.agents.tree import Message, Status, StopReason, Task, Tree
from ramet.env.arithmetic import OBJECTIVE, statement
from ramet.errors import CallError, ConfigError, PolicyError, RefusedRequest


def only_generated(budget: Budget) -> int:
    """The limit on generated tokens, the only currency that methods which are programs divide.

    Raises `ConfigError` where there is none, or where another currency is limited too.
    """
    others = ("prefilled", "critical_path", "clones", "branch_generated", "seconds")
    limited = [name for name in others if getattr(budget, name) is not None]
    if limited:
        raise ConfigError(f"best of n and map-reduce divide generated tokens only; leave out budget.{', budget.'.join(limited)}")
    if budget.generated is None:
        raise ConfigError("best of n and map-reduce need a limit on generated tokens: they divide it")
    return budget.generated


@dataclass(frozen=True, slots=True)
class Outcome:
    """One answer and its cost: tokens as in `Usage`, and seconds on the clock.

    recall  of the documents that support the answer, the share that was read apart from the others: named for a clone,
            or retrieved. None where the task names none
    starved  see `Tree.starved`; "" if anything was sampled
    tree     what was grown, until it is graded; None where that is several trees
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


def outcome(answer: str | None, status: str, trees: Sequence[Tree], path: int, clones: int, recall: float | None = None) -> Outcome:
    """The outcome of several trees together, whose longest chain is `path` tokens."""
    total = {name: sum(getattr(t.usage, name) for t in trees) for name in ("generated", "prefilled", "cached", "attention")}
    starved = trees[0].starved if trees and not total["generated"] else ""
    only = trees[0] if len(trees) == 1 else None
    return Outcome(
        answer, critical_path=path, spawned=clones > 0, clones=clones, status=status, recall=recall, starved=starved, tree=only, **total
    )


BudgetedMethod = Callable[[Runtime, Task, Budget, int], Awaitable[Outcome]]
"""Answers a task under a budget, with a seed."""


def checked(tree: Tree) -> Tree:
    """The tree, unless the backend failed in one of its branches, which says nothing about the method.

    Raises `PolicyError`; `RefusedRequest` where the backend does not take what the root asks for.
    """
    if tree.root.status is Status.REFUSED:
        raise RefusedRequest(f"task {tree.task_id}: {tree.root.reason}")
    if tree.failed:
        raise PolicyError(f"task {tree.task_id} failed: {tree.failed}")
    return tree


async def side_by_side(runtime: Runtime, tasks: Sequence[Task], budgets: Sequence[Budget], seeds: Sequence[int]) -> list[Tree]:
    """The trees of several tasks grown at the same time."""
    trees: list[Tree | None] = [None] * len(tasks)

    async def one(i: int) -> None:
        trees[i] = checked(await runtime.run(tasks[i], budgets[i], seeds[i]))

    async with task_group() as group:
        for i in range(len(tasks)):
            group.start_soon(one, i)
    return [grown for grown in trees if grown is not None]


async def tree(runtime: Runtime, task: Task, budget: Budget, seed: int) -> Outcome:
    """Let the model decide within the budget."""
    grown = checked(await runtime.run(task, budget, seed))
    recall = support_recall(task, named_keys(grown, runtime, ContextStore(task.documents)))
    return outcome(grown.answer, grown.root.status.value, [grown], grown.usage.critical_path, grown.usage.clones, recall)


def named_keys(tree: Tree, runtime: Runtime, store: ContextStore) -> set[str]:
    """The context keys that the calls of a tree name, whoever wrote them."""
    keys: set[str] = set()
    for branch in tree.branches:
        role = runtime.roles.get(branch.role)
        chat = (role and role.chat) or runtime.chat
        for turn in branch.turns:
            if turn.clones:
                call = _spawn_of(chat.parse(turn.sampled or turn.appended[: turn.free]).calls)
                keys.update(key for request in call.requests(store)[0] for key in request.context_keys)
    return keys


def _spawn_of(calls: Sequence[str]) -> SpawnClone:
    """The one of a turn's calls that has started clones; others may stand beside it."""
    for text in calls:
        with suppress(CallError):
            return parse_call(text)
    raise ValueError("no call of this turn starts clones")


def support_recall(task: Task, keys: Collection[str]) -> float | None:
    """The share of the task's supporting documents that `keys` name; None where it has none."""
    supporting = task.meta.get("supporting")
    if not supporting:
        return None
    resolved = set(ContextStore(task.documents).resolve(keys)[0])
    return sum(key in resolved for key in supporting) / len(supporting)


class OpenedPolicy(PolicyWrapper):
    """`policy`, but its first sample begins with `ids`, which it did not choose and which are charged as if it had."""

    def __init__(self, policy: Policy, ids: Sequence[int]):
        super().__init__(policy)
        self._ids = tuple(ids)

    async def sample(self, request: SampleRequest, partial: Partial) -> Sample:
        """The first time, the ids and what the policy goes on with; then, the policy's own sample."""
        ids, self._ids = self._ids[: request.max_tokens], ()
        if not ids:
            return await self._policy.sample(request, partial)
        left = request.max_tokens - len(ids)
        if left == 0:
            return Sample(ids, (0.0,) * len(ids), StopReason.LENGTH, prefilled=len(request.prompt))
        inner = Partial()
        try:
            sample = await self._policy.sample(replace(request, prompt=request.prompt + ids, max_tokens=left), inner)
        finally:  # the ids are charged as generated, not as read
            partial.ids += [*ids, *inner.ids]
            partial.logprobs += [*([0.0] * len(ids)), *inner.logprobs]
            partial.prefilled, partial.cached = min(inner.prefilled, len(request.prompt)), inner.cached
        prefilled = min(sample.prefilled, len(request.prompt))
        return replace(sample, ids=ids + sample.ids, logprobs=(0.0,) * len(ids) + sample.logprobs, prefilled=prefilled)


async def always(runtime: Runtime, task: Task, budget: Budget, seed: int) -> Outcome:
    """`tree`, but the root's first turn opens a call, in the words of a branch of the nano model that delegates."""
    if not isinstance(runtime.chat, ControlTokenFormat):
        raise ConfigError("always delegating is written for the nano chat format")
    opened = runtime.chat.turn(statement(len(task.documents)), "")[:-2]  # without the end of the call, and of the turn
    return await tree(replace(runtime, policy=OpenedPolicy(runtime.policy, opened)), task, budget, seed)


def best_of_n(canonical: Callable[[str], str]) -> BudgetedMethod:
    """Independent single-context solutions until one no longer fits; the most frequent answer, the earliest on ties.

    Answers of one `canonical` form count as one. Attempts that were cut vote only if none finished. They are independent, so the
    critical path is the longest one's.
    """

    async def method(runtime: Runtime, task: Task, budget: Budget, seed: int) -> Outcome:
        left = only_generated(budget)
        finished: list[str] = []
        cut: list[str] = []
        trees: list[Tree] = []
        while left > 0:
            attempt = budget.model_copy(update={"generated": left, "depth": 0})
            grown = checked(await runtime.run(task, attempt, seed_of(seed, "best_of_n", len(trees))))
            trees.append(grown)
            left -= grown.usage.generated
            if grown.answer is not None:
                (finished if grown.root.status is Status.ANSWERED else cut).append(grown.answer)
            if grown.usage.generated == 0:
                break
        longest = max((grown.usage.generated for grown in trees), default=0)
        return outcome(vote(finished or cut, canonical), f"{len(trees)} samples", trees, longest, 0)

    return method


def vote(answers: Sequence[str], canonical: Callable[[str], str]) -> str | None:
    """The first of the answers that are most often given, compared in their `canonical` form; None without any."""
    by_form: dict[str, list[str]] = {}
    for answer in answers:
        by_form.setdefault(canonical(answer), []).append(answer)
    return max(by_form.values(), key=len)[0] if by_form else None


@dataclass(frozen=True, slots=True)
class Cut:
    """How map-reduce cuts a task: rows for each clone, and tokens that the reducer keeps for each result that it has to add."""

    rows: int
    kept: int


def map_reduce(cut: Cut | Mapping[int, Cut]) -> BudgetedMethod:
    """The method with a fixed cut, for all budgets or by budget. Needs the nano chat format, in which the call is spelled.

    The reducer reads what a branch of the nano model that had called for itself would read.
    """

    async def method(runtime: Runtime, task: Task, budget: Budget, seed: int) -> Outcome:
        if not isinstance(runtime.chat, ControlTokenFormat):
            raise ConfigError("map_reduce is written for the nano chat format")
        generated = only_generated(budget)
        chosen = cut if isinstance(cut, Cut) else cut[generated]
        keys = list(task.documents)
        groups = [keys[i : i + chosen.rows] for i in range(0, len(keys), chosen.rows)]
        store = ContextStore(task.documents)
        kept = 0 if len(groups) == 1 else min(chosen.kept * len(groups), generated // 2)
        shares = fair_shares(generated - kept, [None] * len(groups))
        parts = [Task(f"{task.id}/{i}", (Message("user", clone_prompt(store, OBJECTIVE, keys)),)) for i, keys in enumerate(groups)]
        budgets = [budget.model_copy(update={"generated": share, "depth": 0}) for share in shares]
        done = await side_by_side(runtime, parts, budgets, [seed_of(seed, "map", i) for i in range(len(groups))])
        spent = sum(grown.usage.generated for grown in done)
        path = max(grown.usage.critical_path for grown in done)
        if len(groups) == 1:
            return outcome(done[0].answer, done[0].root.status.value, done, path, 1)
        left, offered = (max(tokens - budget.answer_reserve, 0) for tokens in (generated - spent, generated))
        call = render_call([{"objective": OBJECTIVE, "context_keys": keys} for keys in groups])
        results = [CloneResult(grown.root.status, grown.answer, grown.root.reason) for grown in done]
        chat = runtime.chat
        content = "\n".join(filter(None, [task.messages[-1].content, left_line(offered, None)]))
        prompt = [
            *chat.render([*task.messages[:-1], Message("user", content)], [tool_schema()]),
            *chat.turn(statement(len(keys)), call),
            *chat.after_turn(render_results(results, left_line(left, None), runtime.result_characters), closed=True),
        ]
        limits = budget.model_copy(update={"generated": generated - spent, "depth": 0})
        reduced = checked(await runtime.run(task, limits, seed_of(seed, "reduce", 0), prompt=prompt))
        path += reduced.usage.critical_path
        return outcome(reduced.answer, reduced.root.status.value, [*done, reduced], path, len(groups))

    return method
