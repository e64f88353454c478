"""Programs that come with the package, and the names that `--program` takes (`PROGRAMS`).

- `always(text)`: the model has to delegate; how is its own decision.
- `map_reduce(per_clone)`: documents are dealt out to clones, and the model goes on with their answers.
- `self_consistency(count)`, `best_of_n(count)`: independent contexts share the budget; the most frequent answer counts (Wang et al.,
  "Self-Consistency Improves Chain of Thought Reasoning in Language Models", arXiv:2203.11171), or the one that a score prefers.
- `until_spent()`: the same vote, over as many contexts as the budget pays for.

Votes and choices are free: nothing is written for them. What they choose is the branch of a clone, and the root ends as it did.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ramet.agents.program import Program, ProgramBranch
from ramet.agents.tree import Branch, Status, Task
from ramet.errors import ConfigError, ProgramError

LEAST = 24
"""Tokens that a context needs to say anything; fewer samples, or larger parts, are made rather than smaller shares."""
Score = Callable[[Task, Branch, str], float]
"""What an attempt is worth, from the task, the attempt's branch and the text of its last turn."""


def always(text: str = "") -> Program:
    """The model decides, but its first turn begins with `text` and the opening of a call."""

    async def program(branch: ProgramBranch) -> None:
        branch.begin(text, call=True)
        await branch.finish()

    return program


def map_reduce(per_clone: int = 1) -> Program:
    """`per_clone` documents to each clone, in order, with the task as what they are to help with; then the model goes on."""

    async def program(branch: ProgramBranch) -> None:
        if not branch.task.documents:
            raise ProgramError("map-reduce divides documents, and this task has none")
        question = branch.task.messages[-1].content
        objective = f"What in these documents helps with this task? If nothing does, say so. End with a line `Answer: ...`.\n{question}"
        await branch.spawn([{"objective": objective, "each": ["*"], "per_clone": per_clone}], free=True)
        await branch.finish()

    return program


def self_consistency(count: int = 4, canonical: Callable[[str], str] = str.strip) -> Program:
    """Vote of `count` attempts; answers of one `canonical` form are one; the earliest on ties."""

    async def program(branch: ProgramBranch) -> Branch:
        tried = await _shared(branch, count)
        return broken(tried) or vote(tried, canonical) or tried[0]

    return program


def likelihood(task: Task, attempt: Branch, text: str) -> float:
    """The mean log-probability of an attempt's tokens."""
    logprobs = [value for turn in attempt.turns for value in turn.logprobs]
    return sum(logprobs) / len(logprobs) if logprobs else float("-inf")


def best_of_n(count: int = 4, score: Score = likelihood) -> Program:
    """The attempt of `count` that `score` likes best; the earliest on ties."""

    async def program(branch: ProgramBranch) -> Branch:
        tried = await _shared(branch, count)
        answered = [attempt for attempt in tried if attempt.answer is not None]
        return broken(tried) or max(answered or tried, key=lambda attempt: score(branch.task, attempt, branch.text_of(attempt)))

    return program


def until_spent(canonical: Callable[[str], str] = str.strip) -> Program:
    """Attempts one after another, each with all that is left, until it is used up; then a vote as in `self_consistency`.

    Attempts that were cut vote only if none finished. None waits for another, so the critical path is the longest one's. Raises
    `ConfigError` without a limit on generated tokens.
    """

    async def program(branch: ProgramBranch) -> Branch:
        if "generated" not in branch.left:
            raise ConfigError("attempts until the budget is spent need a limit on generated tokens")
        tried: list[Branch] = []
        with branch.side_by_side():
            while not tried or (_more(branch) and tried[-1].generated > 0 and not broken(tried)):
                tried += await branch.attempts(keep=0)
        finished = [attempt for attempt in tried if attempt.status is Status.ANSWERED]
        return broken(tried) or vote(finished or tried, canonical) or tried[0]

    return program


def _more(branch: ProgramBranch) -> bool:
    left = branch.left
    return left["generated"] > 0 and left.get("clones", 1) > 0


async def _shared(branch: ProgramBranch, count: int) -> list[Branch]:
    """`count` attempts that share what is left, each with at most a third of its share for its answer; fewer where shares are too small."""
    left = branch.left
    if "generated" in left:
        count = max(1, min(count, int(left["generated"]) // LEAST))
    if "clones" in left:
        count = max(1, min(count, int(left["clones"])))
    return await branch.attempts(count, keep=0, answer_reserve=reserve(branch, count))


def reserve(branch: ProgramBranch, count: int, keep: int = 0) -> int:
    """What each of `count` clones keeps for its answer: as the budget has it, but at most a third of its share."""
    left = branch.left.get("generated")
    most = branch.budget.answer_reserve
    return most if left is None else min(most, (int(left) - keep) // count // 3)


def broken(clones: Sequence[Branch]) -> Branch | None:
    """The first clone that the backend failed or refused, which says nothing about the program."""
    return next((clone for clone in clones if clone.status in (Status.FAILED, Status.REFUSED)), None)


def vote(clones: Sequence[Branch], canonical: Callable[[str], str]) -> Branch | None:
    """The first of the clones whose answer is most often given, compared in `canonical` form; None without any answer."""
    by_form: dict[str, list[Branch]] = {}
    for clone in clones:
        if clone.answer is not None:
            by_form.setdefault(canonical(clone.answer), []).append(clone)
    return max(by_form.values(), key=len)[0] if by_form else None


PROGRAMS: Mapping[str, Program] = {
    "always": always(),
    "best-of-n": best_of_n(),
    "map-reduce": map_reduce(),
    "self-consistency": self_consistency(),
    "until-spent": until_spent(),
}
"""Programs by name, for what takes a name instead of an import path."""
