"""Methods for questions in words, each under the same budget object and with the same information.

A task holds the question; a method adds one instruction at the end of its prompt and decides how many contexts work on it. Those that
decide more than that are programs (`ramet.agents.programs`).

- `direct`, `cot`: one context that answers at once, or after thinking (chain of thought: Wei et al., arXiv:2201.11903).
- `self_consistency`, `best_of_n`: several `cot` contexts side by side, which share the budget; the most frequent answer, or the one
  that a score prefers.
- `delegate`: the model is offered the tool, and the prompt explains what it is for.
- `map_reduce`: a program gives a few documents to each clone and their answers to one more context.
- `retrieve`: BM25 (Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond", 2009) chooses documents; one
  context reads those.
"""

from __future__ import annotations

from ramet.agents import programs
from ramet.agents.budget import Budget
from ramet.agents.program import Program, ProgramBranch
from ramet.agents.programs import LEAST, Score, likelihood
from ramet.agents.runtime import Runtime
from ramet.agents.tree import Branch, Message, Task
from ramet.benchmarks.evaluation.baselines import BudgetedMethod, Outcome, program_limits, support_recall, tree
from ramet.env.environment import Environment
from ramet.env.instructions import COT, DIRECT, instructed
from ramet.env.multihop import MultihopEnvironment
from ramet.errors import require

NOTE = "What in these documents helps to answer this question: {question} If nothing does, say so. End with one line: `Answer: ...`."


def instructed_tree(instruction: str) -> BudgetedMethod:
    """Let the model decide within the budget, with `instruction` at the end of its prompt."""

    async def method(runtime: Runtime, task: Task, budget: Budget, seed: int) -> Outcome:
        return await tree(runtime, instructed(task, instruction), budget, seed)

    return method


def thoughtful(program: Program) -> BudgetedMethod:
    """A program whose attempts think."""

    async def method(runtime: Runtime, task: Task, budget: Budget, seed: int) -> Outcome:
        return Outcome.of(await runtime.run(instructed(task, COT), program_limits(budget), seed, program=program))

    return method


def self_consistency(env: Environment, count: int) -> BudgetedMethod:
    """Vote of `count` samples; answers that the environment holds equal count as one; the earliest on ties."""
    return thoughtful(programs.self_consistency(count, env.canonical))


def best_of_n(count: int, score: Score = likelihood) -> BudgetedMethod:
    """The sample of `count` that `score` likes best; the earliest on ties."""
    return thoughtful(programs.best_of_n(count, score))


def map_reduce(documents: int) -> BudgetedMethod:
    """`documents` documents to each clone, in order, or more where tokens are few.

    A third of the tokens is for the context that reads the notes.
    """

    async def program(branch: ProgramBranch) -> Branch:
        keys, question = list(branch.task.documents), str(branch.task.meta["question"])
        generated = branch.budget.generated
        keep = 0 if generated is None else generated // 3
        count = -(-len(keys) // documents)
        count = count if generated is None else max(1, min(count, (generated - keep) // LEAST))
        count = max(1, min(count, int(branch.left.get("clones", count + 1)) - 1))  # one is for the notes
        parts = [keys[len(keys) * i // count : len(keys) * (i + 1) // count] for i in range(count)]
        objectives = [{"objective": NOTE.format(question=question), "context_keys": part} for part in parts]
        read = await branch.attempts(objectives, keep=keep, answer_reserve=programs.reserve(branch, count, keep))
        if broken := programs.broken(read):
            return broken
        reducing = Message("user", f"Notes on documents:\n{branch.listed(read)}\n\nQuestion: {question}\n\n{DIRECT}")
        (last,) = await branch.attempts([[reducing]], keep=0, answer_reserve=programs.reserve(branch, 1))
        return last

    async def method(runtime: Runtime, task: Task, budget: Budget, seed: int) -> Outcome:
        grown = await runtime.run(task, program_limits(budget), seed, program=program)
        return Outcome.of(grown, support_recall(task, list(task.documents)))

    return method


def retrieve(env: MultihopEnvironment, count: int) -> BudgetedMethod:
    """The `count` documents that BM25 ranks first for the question, in their own order, then one context.

    Raises `ConfigError` without bm25s.
    """
    require("bm25s", "retrieve")

    async def method(runtime: Runtime, task: Task, budget: Budget, seed: int) -> Outcome:
        keys = ranked(task, count)
        limits = budget.model_copy(update={"depth": 0})
        return Outcome.of(await runtime.run(instructed(env.with_documents(task, keys), COT), limits, seed), support_recall(task, keys))

    return method


def ranked(task: Task, count: int) -> list[str]:
    """Keys of the `count` documents that match the question best by BM25, in the order of the task."""
    import bm25s

    keys = list(task.documents)
    texts = [f"{key} {task.documents[key]}" for key in keys]
    index = bm25s.BM25()
    index.index(bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)
    query = bm25s.tokenize([str(task.meta["question"])], stopwords="en", show_progress=False)
    places, _ = index.retrieve(query, k=min(count, len(keys)), show_progress=False)
    return [keys[place] for place in sorted(int(place) for place in places[0])]
