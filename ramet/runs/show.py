"""A tree on the terminal: live while it grows, and with its bill when it is done."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
from rich.console import Group
from rich.text import Text
from rich.tree import Tree as View

from ramet.agents import drain
from ramet.agents.budget import Budget
from ramet.agents.chat import ChatFormat, ControlTokenFormat
from ramet.agents.growth import Growth
from ramet.agents.journal import Journal, fingerprint
from ramet.agents.resume import JournaledPolicy
from ramet.agents.runtime import Runtime
from ramet.agents.sampling import Policy, Sampling
from ramet.agents.tasks import task_group
from ramet.agents.tree import Branch, Message, Status, Task, Tree
from ramet.display import progress
from ramet.env.arithmetic import parse_sum, rows_task
from ramet.env.instructions import COT, DELEGATE_PARTS, instructed
from ramet.errors import ConfigError, PolicyError, TaskError
from ramet.policy.models.catalogue import resolve, weights_id
from ramet.rewards.exact_match import integer_match
from ramet.runs.build import engine_id, open_engine
from ramet.runs.settings import RunConfig, validate
from ramet.storage import meta, write_json
from ramet.terminal import Table, show

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from ramet.policy.engines.sequence_parallel import Sharing

_COLOURS = {Status.ANSWERED: "green", Status.EMPTY: "yellow", Status.OUT_OF_BUDGET: "yellow", Status.CANCELLED: "red"}


def branch_view(root: Branch, chat: ChatFormat) -> View:
    """The text of each branch, turn by turn, its clones under the turn that started them. A chain may be deeper than Python's stack."""
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
    with progress.drawing() as draw:
        async with task_group() as group:

            async def grow() -> None:
                result.append(await runtime.run(task, budget, seed))
                group.cancel_scope.cancel()

            group.start_soon(grow)
            while True:
                if roots:
                    draw(growth_view(roots[0], chat, task, budget.generated))
                await anyio.sleep(0.05)
    return result[0]


@dataclass(frozen=True)
class GrowthPlan:
    """How `ramet run` grows its tree, and what it writes.

    generated, depth  limits of its budget
    kept  a journal of its samples, which are taken from there where they are known
    out   a file of records
    """

    generated: int
    depth: int
    temperature: float
    seed: int
    kept: Path | None = None
    out: Path | None = None

    def __post_init__(self) -> None:
        if self.generated < 1:
            raise ConfigError("a budget of zero tokens answers nothing; give --budget at least 1")


def run_one(expression: str, policy: str, plan: GrowthPlan, sharing: Sharing | None = None) -> None:
    """`ramet run`: one expression, its tree, its answer, its bill.

    With `sharing`, several workers read what is long; under torchrun the
    ranks but the first serve, and print nothing.
    """
    from ramet.policy.engines.hf import HFPolicy
    from ramet.policy.models.load import load_model

    task = rows_task(parse_sum(expression), "run")
    path = resolve(policy)
    model, _, chat = load_model(path)
    context = min(768, model.config.max_position_embeddings)
    budget = Budget(generated=plan.generated, depth=plan.depth, answer_reserve=min(8, plan.generated), context=context)
    engine = HFPolicy(model) if sharing is None else sharing.policy(path, model)
    if engine is None:
        return
    run = fingerprint("run", expression, budget.model_dump(mode="json"), plan.temperature, plan.seed, weights_id(path), repr(sharing))
    _grow_and_show(engine, chat, task, budget, plan, run)


def run_served(question: str, policy: str | None, url: str, backend: str, plan: GrowthPlan) -> None:
    """`ramet run --url`: the same for any question, with a server as the model.

    To a model of the nano format a sum is put in rows, as in its training. Others are told in words how to answer, and may be asked
    anything; an answer that is not a sum's is not graded.
    """
    if backend == "completions" and policy is None:
        raise ConfigError("a completions server takes token ids: give the directory of its model, which has the tokenizer, as --policy")
    model = resolve(policy) if policy and backend == "completions" else policy or ""
    config = validate(RunConfig, {"model": str(model), "backend": backend, "url": url, "env": {"kind": "rows"}})
    engine, chat, _ = open_engine(config, model)
    try:
        values: list[int] | None = parse_sum(question)
    except TaskError:
        values = None
    if isinstance(chat, ControlTokenFormat):
        task = rows_task(parse_sum(question), "run")
    else:
        plain = Task("run", (Message("user", question),), {}, None if values is None else sum(values))
        task = instructed(plain, DELEGATE_PARTS if plan.depth else COT)
    budget = Budget(generated=plan.generated, depth=plan.depth, answer_reserve=min(24, plan.generated))
    run = fingerprint("run", question, budget.model_dump(mode="json"), plan.temperature, plan.seed, backend, engine_id(config, model))
    _grow_and_show(engine, chat, task, budget, plan, run)


def _grow_and_show(engine: Any, chat: ChatFormat, task: Task, budget: Budget, plan: GrowthPlan, run: str) -> None:
    """Grow one tree and print it; its journal is that of the fingerprint `run`."""
    keeping: AbstractContextManager[Journal | None] = nullcontext() if plan.kept is None else Journal(plan.kept, run)
    with keeping as journal:
        source = JournaledPolicy(engine, journal) if journal is not None else engine

        async def main() -> Tree:
            async with engine:
                return await grow_live(source, chat, task, budget, plan.seed, Sampling(temperature=plan.temperature))

        tree = drain.run(main)
        if tree.error and isinstance(source, JournaledPolicy):
            source.give_up()
    if isinstance(source, JournaledPolicy) and source.replayed:
        logger.info(f"{source.replayed} samples taken from {plan.kept}, {source.sampled} made")
    if tree.error:
        raise PolicyError(tree.error)
    right = None if task.reference is None else integer_match(task, tree.answer) == 1.0
    if plan.out is not None:
        record = {
            "record": "tree", "answer": tree.answer, "reference": task.reference, "correct": right,
            "status": tree.root.status.value, **asdict(tree.usage),
        }  # fmt: skip
        write_json(plan.out, [meta("run", plan.seed), record])
    show(Text(task.messages[-1].content, style="bold"))
    show(branch_view(tree.root, chat))
    answer = Text.assemble("answer ", (tree.answer or "none", "bold"))
    if right is not None:
        verdict = ("right", "green") if right else ("wrong", "red")
        answer = Text.assemble(answer, " (", verdict, ")" if right else f": it is {task.reference})")
    show(answer)
    show(bill(tree, budget))
