"""A tree on the terminal: live while it grows, and with its bill when it is done."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
from rich.console import Group
from rich.live import Live
from rich.text import Text
from rich.tree import Tree as View

from ramet.agents import drain
from ramet.agents.actor import Growth
from ramet.agents.budget import Budget
from ramet.agents.chat import ChatFormat
from ramet.agents.journal import Journal, fingerprint
from ramet.agents.resume import JournaledPolicy
from ramet.agents.runtime import Runtime
from ramet.agents.sampling import Policy, Sampling
from ramet.agents.tasks import task_group
from ramet.agents.tree import Branch, Status, Task, Tree
from ramet.env.arithmetic import parse_sum, rows_task
from ramet.errors import ConfigError, PolicyError
from ramet.policy.models.catalogue import resolve, weights_id
from ramet.rewards.exact_match import integer_match
from ramet.storage import meta, write_json
from ramet.terminal import Table, console

if TYPE_CHECKING:
    from ramet.policy.engines.sequence_parallel import Sharing

_COLOURS = {Status.ANSWERED: "green", Status.EMPTY: "yellow", Status.OUT_OF_BUDGET: "yellow", Status.CANCELLED: "red"}


def branch_view(root: Branch, chat: ChatFormat) -> View:
    """What each branch said, turn by turn, its clones under the turn that started them. A chain may be deeper than Python's stack."""
    top = View(_label(root))
    waiting = [(root, top)]
    while waiting:
        branch, view = waiting.pop()
        for turn in branch.turns:
            if turn.sampled:
                view.add(Text(_clean(chat.text(turn.sampled))))
            waiting += [(clone, view.add(_label(clone))) for clone in turn.clones]
    return top


def _label(branch: Branch) -> Text:
    colour = _COLOURS.get(branch.status, "red")
    title = "root" if "." not in branch.id else f"clone {branch.id.partition('.')[2]}"
    label = Text.assemble((title, "bold cyan"), (f" {branch.generated} tokens", "dim"), " → ", (branch.status.value, colour))
    if branch.answer is not None:
        label.append(f" {branch.answer}", "bold")
    return label


def _clean(text: str) -> str:
    return text.replace("<|end|>", "").strip()


def growth_view(root: Growth, chat: ChatFormat, task: Task, limit: int | None) -> Group:
    """The same while it grows: branches with their tokens, and the budget draining."""
    view = View(Text(task.messages[-1].content, "bold"))
    _add_growth(view, root, chat)
    spent = root.ledger.total("generated")
    if limit is None:
        return Group(view, Text(f"{spent} tokens generated"))
    left = max(limit - spent, 0)
    bar = "█" * round(40 * left / limit)
    return Group(view, Text.assemble("budget ", (f"{bar:<40}", "green"), f" {left} of {limit} tokens left"))


def _add_growth(view: View, root: Growth, chat: ChatFormat) -> None:
    waiting = [(root, view.add(_state(root)))]
    while waiting:
        growth, node = waiting.pop()
        for turn in growth.turns:
            node.add(Text(_clean(chat.text(turn.sampled)), style="dim"))
            for branch in turn.clones:
                node.add(Text(f"{branch.id} → {branch.answer or branch.status.value}", style="green"))
        waiting += [(clone, node.add(_state(clone))) for clone in growth.clones]


def _state(growth: Growth) -> Text:
    state = growth.status.value if growth.status else "…"
    spent = growth.ledger.total("generated")
    return Text.assemble((growth.id, "cyan"), (f" {spent} tokens", "dim"), f" {state} ", (growth.answer or "", "bold"))


def bill(tree: Tree, budget: Budget) -> Table:
    """What the tree cost, beside its limits."""
    table = Table("", "used", "limit", title="bill")
    for column in table.columns[1:]:
        column.justify = "right"
    usage = tree.usage
    for name, limit in (
        ("generated tokens", budget.generated),
        ("critical path", budget.critical_path),
        ("prefilled tokens", budget.prefilled),
        ("clones", budget.clones),
    ):
        used = getattr(
            usage, {"generated tokens": "generated", "prefilled tokens": "prefilled", "critical path": "critical_path"}.get(name, name)
        )
        table.add_row(name, str(used), "" if limit is None else str(limit))
    table.add_row("prompt tokens reused", str(usage.cached), "")
    table.add_row("seconds", f"{usage.seconds:.2f}", "" if budget.seconds is None else f"{budget.seconds:g}")
    return table


async def grow_live(policy: Policy, chat: ChatFormat, task: Task, budget: Budget, seed: int, sampling: Sampling) -> Tree:
    """Grow one tree and draw it as it grows."""
    roots: list[Growth] = []
    runtime = Runtime(policy, chat, sampling, watch=roots.append)
    result: list[Tree] = []
    with Live(console=console, auto_refresh=False, transient=True) as live:
        async with task_group() as group:

            async def grow() -> None:
                result.append(await runtime.run(task, budget, seed))
                group.cancel_scope.cancel()

            group.start_soon(grow)
            while True:
                if roots:
                    live.update(growth_view(roots[0], chat, task, budget.generated), refresh=True)
                await anyio.sleep(0.05)
    return result[0]


def run_one(
    expression: str,
    policy: str,
    generated: int,
    depth: int,
    temperature: float,
    seed: int,
    kept: Path | None,
    out: Path | None,
    sharing: Sharing | None = None,
) -> None:
    """`ramet run`: one expression, its tree, its answer, its bill.

    Samples are kept in `kept` and taken from there. With `sharing`, several workers read what is long; under torchrun the
    ranks but the first serve, and print nothing.
    """
    from ramet.policy.engines.hf import HFPolicy
    from ramet.policy.models.load import load_model

    if generated < 1:
        raise ConfigError("a budget of zero tokens answers nothing; give --budget at least 1")
    values = parse_sum(expression)
    task = rows_task(values, "run")
    path = resolve(policy)
    model, _, chat = load_model(path)
    budget = Budget(
        generated=generated, depth=depth, answer_reserve=min(8, generated), context=min(768, model.config.max_position_embeddings)
    )
    keeping: AbstractContextManager[Journal | None] = nullcontext()
    if kept is not None:
        keeping = Journal(
            kept, fingerprint("run", expression, budget.model_dump(mode="json"), temperature, seed, weights_id(path), repr(sharing))
        )
    engine = HFPolicy(model) if sharing is None else sharing.policy(path, model)
    if engine is None:
        return
    with keeping as journal:
        source = JournaledPolicy(engine, journal) if journal is not None else engine

        async def main() -> Tree:
            async with engine:
                return await grow_live(source, chat, task, budget, seed, Sampling(temperature=temperature))

        tree = drain.run(main)
        if tree.error and isinstance(source, JournaledPolicy):
            source.give_up()
    if isinstance(source, JournaledPolicy) and source.replayed:
        console.print(f"{source.replayed} samples taken from {kept}, {source.sampled} made")
    if tree.error:
        raise PolicyError(tree.error)
    right = integer_match(task, tree.answer) == 1.0
    if out is not None:
        record = {
            "record": "tree", "answer": tree.answer, "reference": task.reference, "correct": right,
            "status": tree.root.status.value, **asdict(tree.usage),
        }  # fmt: skip
        write_json(out, [meta("run", seed), record])
    console.print(Text(task.messages[-1].content, style="bold"))
    console.print(branch_view(tree.root, chat))
    verdict = [("right", "green")] if right else [("wrong", "red"), f": it is {task.reference}"]
    console.print(Text.assemble("answer ", (tree.answer or "none", "bold"), " (", *verdict, ")"))
    console.print(bill(tree, budget))
