"""`ramet run`: one question, its tree while it grows, its answer and its bill."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.text import Text

from ramet.agents import drain
from ramet.agents.chat import ChatFormat
from ramet.agents.equipment import Equipment
from ramet.agents.journal import Journal, fingerprint
from ramet.agents.resume import JournaledPolicy, JournaledTools
from ramet.agents.sampling import Sampling
from ramet.agents.tree import Message, Task, Tree
from ramet.env.arithmetic import parse_sum
from ramet.errors import ConfigError, PolicyError, TaskError
from ramet.policy.models.catalogue import resolve
from ramet.rewards.exact_match import integer_match
from ramet.runs.agent import question_task, token_budget, with_read
from ramet.runs.build import engine_id, open_engine, open_model
from ramet.runs.documents import read_documents
from ramet.runs.equipment import equipment_of
from ramet.runs.settings import NAMING, RunConfig, load
from ramet.runs.show import bill, branch_view, grow_live
from ramet.storage import meta, write_json
from ramet.terminal import show
from ramet.tools.search import search

logger = logging.getLogger(__name__)

TOKENS = 256
"""What a tree may generate where nothing says how much."""


@dataclass(frozen=True)
class RunPlan:
    """What `ramet run` is asked, beside its settings.

    documents  paths, folders and globs of text files
    journal    keeps what is sampled and what tools return, from where it is taken where it is known
    out        a file of records
    """

    question: str
    documents: Sequence[str] = ()
    journal: Path | None = None
    out: Path | None = None


def question_settings(
    source: str | None,
    overrides: Sequence[str],
    budget: str | None,
    given: Mapping[str, Any],
    tools: Sequence[str] | None = None,
    mcp: Sequence[str] | None = None,
) -> RunConfig:
    """The settings of `ramet run` and `ramet serve`: those of `source`, if there is one, then the overrides, then what the options say.

    Without a source, the nano model (or a server's first) and a budget of `TOKENS`; with one that has several budgets, the largest of
    them. `given` are values of settings; None is not given. `tools` and `mcp` are added to those of the settings. Raises `ConfigError`.
    """
    limits = _limits(budget)
    values = [f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in given.items() if value is not None]
    if source is None:
        served = given.get("url") or any(override.startswith("url=") for override in overrides)
        generated = limits.get("generated", str(TOKENS))
        reserve = token_budget(int(generated)).answer_reserve if generated.isdigit() else 0
        begin = ["env.kind=rows", "budget.depth=1", f"budget.generated={TOKENS}", f"budget.answer_reserve={reserve}"]
        begin.append(f"model={'' if served else 'nano'}")
    else:
        several = load(RunConfig, source, [*overrides, "budget.generated=unlimited"]).budgets
        begin = [f"budget.generated={max(several)}"] if several else []
    config = load(RunConfig, source, [*begin, *overrides, *values, *(f"budget.{n}={v}" for n, v in limits.items()), "budgets=[]"])
    return config.model_copy(update={"tools": (*config.tools, *(tools or ())), "mcp": (*config.mcp, *(mcp or ()))})


def _limits(text: str | None) -> dict[str, str]:
    """`--budget`: limits by name. A number is one of generated tokens."""
    if text is None:
        return {}
    text = text.strip()
    parts = [part.partition("=") for part in (f"generated={text}" if re.fullmatch(r"[+-]?\d+", text) else text).split(",")]
    limits = {name.strip(): value.strip() for name, _, value in parts}
    if not all(name.strip() and equals and value.strip() for name, equals, value in parts):
        raise ConfigError(f"--budget {text!r} is neither a number of tokens nor of the form generated=2000,seconds=60")
    if limits.get("generated") == "0":
        raise ConfigError("a budget of zero tokens answers nothing; give --budget at least 1")
    return limits


def run_question(config: RunConfig, plan: RunPlan) -> None:
    """Grow the tree of one question, draw it meanwhile, and print it.

    Under torchrun, all ranks but the first serve, and print nothing. Raises `PolicyError` for a tree that has failed.
    """
    if not plan.question.strip():
        raise TaskError("the question is empty")
    documents = read_documents(plan.documents)
    if search.name in config.tools and not documents:
        raise ConfigError("tools: search searches the documents of the question; give --documents")
    model = model_of(config)
    equipment = equipment_of(config, open_engine)
    engine, chat = _engine(config, model)
    if engine is None:
        return
    task = _task(plan.question, chat, documents, config, equipment)
    run = fingerprint("run", plan.question, documents, config.identity(), config.code(), engine_id(config, model))
    tree = _grown(config, equipment, engine, chat, task, plan.journal, run)
    if tree.error:
        raise PolicyError(tree.error)
    right = None if task.reference is None else integer_match(task, tree.answer) == 1.0
    if plan.out is not None:
        write_json(plan.out, [meta("run", config.seed), *_records(tree, task, right)])
    show(Text(task.messages[-1].content, style="bold"))
    show(branch_view(tree.root, chat, equipment.roles))
    answer = Text.assemble("answer ", (tree.answer or "none", "bold"))
    if right is not None:
        verdict = ("right", "green") if right else ("wrong", "red")
        answer = Text.assemble(answer, " (", verdict, ")" if right else f": it is {task.reference})")
    show(answer)
    show(bill(tree, config.budget))


def model_of(config: RunConfig) -> str | Path:
    """The directory of the model; of a server that knows it by name, the name. Raises `ConfigError` or `CheckpointError`."""
    if config.backend in NAMING:
        return config.model
    if config.backend == "completions" and not config.model:
        raise ConfigError("a completions server takes token ids: give the directory of its model, which has the tokenizer, as --policy")
    return resolve(config.model)


def _engine(config: RunConfig, model: str | Path) -> tuple[Any, ChatFormat]:
    """The policy and its chat format. Under torchrun the ranks share long contexts, and all but the first serve until it is done: None."""
    if config.attention.method == "dense" or "TORCHELASTIC_RUN_ID" not in os.environ:
        engine, chat, _ = open_engine(config, model)
        return engine, chat
    from ramet.policy.engines.sequence_parallel import open_ranks

    weights, _, chat = open_model(config, Path(model))
    return open_ranks(Path(model), weights, config.attention), chat


def _task(question: str, chat: ChatFormat, documents: Mapping[str, str], config: RunConfig, equipment: Equipment) -> Task:
    """The task of the question; a sum has its value as the reference."""
    try:
        task = question_task(question, chat, documents, config.budget)
    except TaskError:
        if not (equipment.tools or equipment.sources or equipment.program):
            raise
        task = Task("question", (Message("user", question),))  # the model knows no such question; tools or the program may
    if task.reference is None and not documents:
        try:
            return replace(task, reference=sum(parse_sum(question)))
        except TaskError:
            pass
    return task


def _grown(config: RunConfig, equipment: Equipment, engine: Any, chat: ChatFormat, task: Task, kept: Path | None, run: str) -> Tree:
    """The tree; its journal, if it keeps one, is that of the fingerprint `run`."""
    keeping: AbstractContextManager[Journal | None] = nullcontext() if kept is None else Journal(kept, run)
    with keeping as journal:
        source = engine if journal is None else JournaledPolicy(engine, journal)

        async def main() -> tuple[Tree, Equipment]:
            async with engine, equipment.serving() as serving:
                held = serving if journal is None else serving.journaled(journal)
                runtime = held.runtime(
                    source, chat, Sampling(temperature=config.eval.temperature), always_show_budget=config.tell_budget == "all"
                )
                return await grow_live(with_read(runtime, task), task, config.budget, config.seed), held

        tree, held = drain.run(main)
        if isinstance(source, JournaledPolicy):
            if tree.error:
                source.give_up()
            if source.replayed:
                logger.info(f"{source.replayed} samples taken from {kept}, {source.sampled} made")
            if isinstance(held.caller, JournaledTools) and held.caller.replayed:
                logger.info(f"{held.caller.replayed} results of tools taken from {kept}, {held.caller.called} calls made")
    return tree


def _records(tree: Tree, task: Task, right: bool | None) -> list[dict[str, Any]]:
    """The tree, and each tool that was called."""
    tree_ = {"record": "tree", "answer": tree.answer, "reference": task.reference, "correct": right, "status": tree.root.status.value}
    tools = [{"record": "tool", "tool": name, **asdict(used)} for name, used in tree.tools().items()]
    return [tree_ | asdict(tree.usage), *tools]
