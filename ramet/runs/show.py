"""A tree on the terminal: live while it grows, and with its bill when it is done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import anyio
from rich.console import Group
from rich.text import Text
from rich.tree import Tree as View

from ramet.agents.budget import Budget
from ramet.agents.chat import ChatFormat
from ramet.agents.growth import Growth, Role
from ramet.agents.protocol import elide
from ramet.agents.runtime import Runtime
from ramet.agents.tasks import task_group
from ramet.agents.tree import Branch, Status, Task, ToolCall, ToolStatus, Tree
from ramet.display import progress
from ramet.terminal import Table, one_line

_COLOURS = {Status.ANSWERED: "green", Status.EMPTY: "yellow", Status.OUT_OF_BUDGET: "yellow", Status.CANCELLED: "red"}


SHOWN = 300
"""Characters that are shown of a call, and of its result."""


def branch_view(root: Branch, chat: ChatFormat, roles: Mapping[str, Role] | None = None) -> View:
    """The text of each branch, turn by turn, its calls and its clones under the turn that made them.

    A chain may be deeper than Python's stack.
    """
    top = View(_label(root))
    waiting = [(root, top)]
    while waiting:
        branch, view = waiting.pop()
        spoken = _spoken(chat, roles or {}, branch.role)
        for turn in branch.turns:
            if written := turn.sampled or turn.appended[: turn.free]:
                view.add(Text(_clean(spoken.text(written))))
            for call in turn.calls:
                view.add(_call(call))
            waiting += [(clone, view.add(_label(clone))) for clone in turn.clones]
    return top


def _spoken(chat: ChatFormat, roles: Mapping[str, Role], role: str) -> ChatFormat:
    return (roles[role].chat if role in roles else None) or chat


def _call(call: ToolCall) -> Text:
    """A tool's call and what came of it, on one line."""
    request, result = (elide(one_line(text), SHOWN) for text in (f"{call.name} {call.arguments}", call.result.text))
    ended = "" if call.result.status is ToolStatus.DONE else f"{call.result.status.value} "
    return Text.assemble((request, "magenta"), " → ", (ended, "red"), result)


def _label(branch: Branch) -> Text:
    colour = _COLOURS.get(branch.status, "red")
    title = "root" if "." not in branch.id else f"clone {branch.id.partition('.')[2]}"
    tokens = (f" {branch.generated} tokens", "dim")
    label = Text.assemble((title, "bold cyan"), _as(branch.role), tokens, " → ", (branch.status.value, colour))
    if branch.answer is not None:
        label.append(f" {branch.answer}", "bold")
    return label


def _as(role: str) -> str:
    return f" as {role}" if role else ""


def _clean(text: str) -> str:
    return text.replace("<|end|>", "").strip()


def growth_view(root: Growth, runtime: Runtime, task: Task, limit: int | None) -> Group:
    """The same while it grows: branches with their tokens, and the budget draining."""
    view = View(Text(task.messages[-1].content, "bold"))
    _add_growth(view, root, runtime)
    spent = root.ledger.total("generated")
    if limit is None:
        return Group(view, Text(f"{spent} tokens generated"))
    left = max(limit - spent, 0)
    bar = "█" * round(40 * left / limit)
    return Group(view, Text.assemble("budget ", (f"{bar:<40}", "green"), f" {left} of {limit} tokens left"))


def _add_growth(view: View, root: Growth, runtime: Runtime) -> None:
    waiting = [(root, view.add(_state(root)))]
    while waiting:
        growth, node = waiting.pop()
        spoken = _spoken(runtime.chat, runtime.roles, growth.role)
        for turn in growth.turns:
            node.add(Text(_clean(spoken.text(turn.sampled or turn.appended[: turn.free])), style="dim"))
            for call in turn.calls:
                node.add(_call(call))
            for branch in turn.clones:
                node.add(Text(f"{branch.id} → {branch.answer or branch.status.value}", style="green"))
        waiting += [(clone, node.add(_state(clone))) for clone in growth.clones]


def _state(growth: Growth) -> Text:
    state = growth.status.value if growth.status else "…"
    spent = growth.ledger.total("generated")
    return Text.assemble((growth.id, "cyan"), _as(growth.role), (f" {spent} tokens", "dim"), f" {state} ", (growth.answer or "", "bold"))


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
    if usage.tool_calls or budget.tool_calls is not None:
        table.add_row("tool calls", str(usage.tool_calls), "" if budget.tool_calls is None else str(budget.tool_calls))
    for tool, used in tree.tools().items():
        table.add_row(f"  {tool}, at its cost", str(used.cost), "")
    if usage.tool_seconds or budget.tool_seconds is not None:
        table.add_row("tool seconds", f"{usage.tool_seconds:.2f}", "" if budget.tool_seconds is None else f"{budget.tool_seconds:g}")
    for role, own in tree.roles().items():
        if role:
            table.add_row(f"tokens generated as {role}", str(own.generated), "")
    table.add_row("seconds", f"{usage.seconds:.2f}", "" if budget.seconds is None else f"{budget.seconds:g}")
    return table


async def grow_live(runtime: Runtime, task: Task, budget: Budget, seed: int) -> Tree:
    """Grow one tree and draw it as it grows."""
    roots: list[Growth] = []
    runtime = replace(runtime, watch=roots.append)
    result: list[Tree] = []
    with progress.drawing() as draw:
        async with task_group() as group:

            async def grow() -> None:
                result.append(await runtime.run(task, budget, seed))
                group.cancel_scope.cancel()

            group.start_soon(grow)
            while True:
                if roots:
                    draw(growth_view(roots[0], runtime, task, budget.generated))
                await anyio.sleep(0.05)
    return result[0]
