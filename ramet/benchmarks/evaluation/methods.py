"""Methods for questions in words, each under the same budget object and with the same information.

A task holds the question; a method adds one instruction at the end of its prompt and decides how many contexts work on it.

- `direct`, `cot`: one context that answers at once, or after thinking (chain of thought: Wei et al., arXiv:2201.11903).
- `self_consistency`, `best_of_n`: several `cot` contexts side by side, which share the budget; the most frequent answer, or the one
  that a score prefers.
- `delegate`: the model is offered the tool, and the prompt explains what it is for.
- `map_reduce`: a program gives a few documents to each clone and their answers to one more context.
- `retrieve`: BM25 (Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond", 2009) chooses documents; one
  context reads those.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ramet.agents.budget import Budget, fair_shares
from ramet.agents.context import ContextStore, clone_prompt
from ramet.agents.growth import seed_of
from ramet.agents.protocol import CloneResult, render_results
from ramet.agents.runtime import Runtime
from ramet.agents.tree import Message, Task, Tree
from ramet.benchmarks.evaluation.baselines import (
    BudgetedMethod,
    Outcome,
    checked,
    only_generated,
    outcome,
    side_by_side,
    support_recall,
    tree,
    vote,
)
from ramet.env.environment import Environment
from ramet.env.instructions import COT, DIRECT, instructed
from ramet.env.multihop import MultihopEnvironment
from ramet.errors import require

LEAST = 24
"""Tokens that a context needs to say anything; fewer samples, or larger parts, are made rather than smaller shares."""
NOTE = "What in these documents helps to answer this question: {question} If nothing does, say so. End with one line: `Answer: ...`."
SampleScore = Callable[[Task, Tree, str], float]
"""What a sample is worth, from the task, the tree and the text of its root's last turn."""


def instructed_tree(instruction: str) -> BudgetedMethod:
    """Let the model decide within the budget, with `instruction` at the end of its prompt."""

    async def method(runtime: Runtime, task: Task, budget: Budget, seed: int) -> Outcome:
        return await tree(runtime, instructed(task, instruction), budget, seed)

    return method


def _limited(budget: Budget, share: int) -> Budget:
    """The limits of one context with `share` tokens, of which it keeps at most a third for its answer."""
    return budget.model_copy(update={"generated": share, "depth": 0, "answer_reserve": min(budget.answer_reserve or 0, share // 3)})


def _shared(budget: Budget, generated: int, count: int) -> list[Budget]:
    """`generated` tokens for `count` contexts that run side by side."""
    return [_limited(budget, share or 0) for share in fair_shares(generated, [None] * count)]


async def _samples(runtime: Runtime, task: Task, budget: Budget, seed: int, count: int) -> list[Tree]:
    """`count` contexts that think, each with its share of the tokens; fewer where the shares would be too small."""
    generated = only_generated(budget)
    budgets = _shared(budget, generated, max(1, min(count, generated // LEAST)))
    return await side_by_side(
        runtime, [instructed(task, COT)] * len(budgets), budgets, [seed_of(seed, "sample", i) for i in range(len(budgets))]
    )


def _chosen(trees: Sequence[Tree], best: Tree | None) -> Outcome:
    longest = max(grown.usage.critical_path for grown in trees)
    return outcome(None if best is None else best.answer, f"{len(trees)} samples", trees, longest, 0)


def self_consistency(env: Environment, count: int) -> BudgetedMethod:
    """Vote of `count` samples; answers that the environment holds equal count as one; the earliest on ties."""

    async def method(runtime: Runtime, task: Task, budget: Budget, seed: int) -> Outcome:
        trees = await _samples(runtime, task, budget, seed, count)
        winner = vote([grown.answer for grown in trees if grown.answer is not None], env.canonical)
        return _chosen(trees, next((grown for grown in trees if grown.answer == winner is not None), None))

    return method


def likelihood(task: Task, grown: Tree, text: str) -> float:
    """The mean log-probability of the root's tokens."""
    logprobs = [value for turn in grown.root.turns for value in turn.logprobs]
    return sum(logprobs) / len(logprobs) if logprobs else float("-inf")


def best_of_n(count: int, score: SampleScore = likelihood) -> BudgetedMethod:
    """The sample of `count` that `score` likes best; the earliest on ties."""

    async def method(runtime: Runtime, task: Task, budget: Budget, seed: int) -> Outcome:
        trees = await _samples(runtime, task, budget, seed, count)

        def worth(grown: Tree) -> float:
            return score(task, grown, runtime.chat.parse(grown.root.turns[-1].sampled).text)

        return _chosen(trees, max((grown for grown in trees if grown.answer is not None), key=worth, default=None))

    return method


def map_reduce(documents: int) -> BudgetedMethod:
    """`documents` documents to each clone, in order, or more where tokens are few.

    A third of the tokens is for the context that reads the notes.
    """

    async def method(runtime: Runtime, task: Task, budget: Budget, seed: int) -> Outcome:
        keys, question, generated = list(task.documents), str(task.meta["question"]), only_generated(budget)
        mapped = generated - generated // 3
        count = max(1, min(-(-len(keys) // documents), mapped // LEAST))
        parts = [keys[len(keys) * i // count : len(keys) * (i + 1) // count] for i in range(count)]
        store = ContextStore(task.documents)
        objective = NOTE.format(question=question)
        tasks = [Task(f"{task.id}/{i}", (Message("user", clone_prompt(store, objective, part)),)) for i, part in enumerate(parts)]
        budgets = _shared(budget, mapped, count)
        done = await side_by_side(runtime, tasks, budgets, [seed_of(seed, "map", i) for i in range(len(tasks))])
        results = [CloneResult(grown.root.status, grown.answer, grown.root.reason) for grown in done]
        notes = render_results(results, "", runtime.result_characters)
        left = generated - sum(grown.usage.generated for grown in done)
        reducing = Task(task.id, (Message("user", f"Notes on documents:\n{notes}\n\nQuestion: {question}\n\n{DIRECT}"),))
        last = checked(await runtime.run(reducing, _limited(budget, left), seed_of(seed, "reduce", 0)))
        path = max((grown.usage.critical_path for grown in done), default=0) + last.usage.critical_path
        return outcome(last.answer, last.root.status.value, [*done, last], path, len(done), support_recall(task, keys))

    return method


def retrieve(env: MultihopEnvironment, count: int) -> BudgetedMethod:
    """The `count` documents that BM25 ranks first for the question, in their own order, then one context.

    Raises `ConfigError` without bm25s.
    """
    require("bm25s", "retrieve")

    async def method(runtime: Runtime, task: Task, budget: Budget, seed: int) -> Outcome:
        keys = ranked(task, count)
        limits = budget.model_copy(update={"depth": 0})
        grown = checked(await runtime.run(instructed(env.with_documents(task, keys), COT), limits, seed))
        return outcome(grown.answer, grown.root.status.value, [grown], grown.usage.critical_path, 0, support_recall(task, keys))

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
