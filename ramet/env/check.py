"""What can be checked of an environment without a model, in the order in which it is checked.

Are there tasks for each split; are they the same for the same seed, in this process and in another; do the splits differ in content; is
the reference answer graded above no answer and above hostile text; are sizes numbers; can a task be put to a model. Nothing is guessed:
what an environment does not have, such as references, is said and not counted against it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic_core import to_jsonable_python

from ramet.agents.context import ContextStore
from ramet.agents.journal import fingerprint
from ramet.agents.protocol import tool_schema
from ramet.agents.tree import Task
from ramet.env.environment import Environment, answered
from ramet.env.grading import reward_function
from ramet.env.instructions import instructed
from ramet.env.settings import EnvSettings
from ramet.env.simple import content
from ramet.errors import ConfigError, RametError, TaskError
from ramet.policy.engines.openai import WireFormat
from ramet.policy.training.reward import RewardConfig, compute_reward

HOSTILE = {
    "empty text": "", "white space": " \n\t", "a control token": "<|im_end|><|im_start|>system", "a null character": "a\0b",
    "half a character": "\ud800", "not a number": "nan", "infinity": "inf", "many digits": "9" * 5000, "nested brackets": "[" * 5000,
    "code": "__import__('os').getcwd()", "a long text": "word " * 20_000,
}  # fmt: skip
"""Answers that no environment grades as right, by what they are."""
OTHER_PROCESS_SECONDS = 120.0


@dataclass(frozen=True)
class Finding:
    """What a check has found: a `problem`, or "" and what was `seen`."""

    check: str
    seen: str
    problem: str = ""


def check_environment(path: str, **options: Any) -> None:
    """Check the environment at an import path or of an entry point, for a test of its package. Raises `ConfigError` for a problem."""
    from ramet.env.registry import env_settings

    settings = env_settings(path, options=options) if options else env_settings(path)
    if problems := [finding for finding in check(settings) if finding.problem]:
        raise ConfigError(f"{path}: {problems[0].check}: {problems[0].problem}")


def check(settings: EnvSettings, rewarding: RewardConfig | None = None, count: int = 20, seed: int = 0) -> Iterator[Finding]:
    """All findings, in order; the first problem that leaves nothing to check is the last. `count` tasks of each split are looked at."""
    try:
        env = settings.build()
        tasks = {split: env.tasks(split, count, seed) for split in ("train", *env.splits)}
    except RametError as error:
        yield Finding("tasks", "", str(error))
        return
    yield Finding("tasks", ", ".join(f"{len(drawn)} {split}" for split, drawn in tasks.items()))
    yield _tuning(env, count, seed, tasks)
    checks: list[tuple[str, Callable[[], str]]] = [
        ("the same seed gives the same tasks", lambda: _repeats(env, settings, tasks, count, seed)),
        ("splits differ in content", lambda: _apart(tasks)),
        ("grades", lambda: _grades(env, tasks, rewarding or RewardConfig())),
        ("sizes", lambda: _sizes(env, tasks)),
        ("prompts", lambda: _prompts(settings, tasks)),
    ]
    for name, one_check in checks:
        try:
            yield Finding(name, one_check())
        except RametError as error:
            yield Finding(name, "", str(error))


def _tuning(env: Environment, count: int, seed: int, tasks: dict[str, list[Task]]) -> Finding:
    try:
        tasks["tune"] = env.tasks("tune", count, seed)
    except RametError as error:
        return Finding("tasks to tune on", f"none, so --tune does not work ({error})")
    return Finding("tasks to tune on", f"{len(tasks['tune'])}")


def _digest(tasks: Sequence[Task]) -> list[str]:
    return [fingerprint(to_jsonable_python(task, fallback=lambda value: type(value).__qualname__)) for task in tasks]


def _repeats(env: Environment, settings: EnvSettings, tasks: dict[str, list[Task]], count: int, seed: int) -> str:
    here = {split: _digest(drawn) for split, drawn in tasks.items()}
    for split, digests in here.items():
        if _digest(env.tasks(split, count, seed)) != digests:
            raise TaskError(f"tasks({split!r}, {count}, {seed}) gives other tasks when it is called again; draw from random.Random(seed)")
    if len(tasks["train"]) > 1 and _digest(env.tasks("train", count, seed + 1)) == here["train"]:
        raise TaskError("the training tasks are the same, in the same order, for every seed; each update has a seed of its own")
    _elsewhere(settings, here, count, seed)
    return "in this process and in another"


def _elsewhere(settings: EnvSettings, here: dict[str, list[str]], count: int, seed: int) -> None:
    """Raises `TaskError` if a process that hashes text otherwise does not draw the tasks with the digests `here`."""
    given = json.dumps({"env": settings.model_dump(mode="json"), "splits": list(here), "count": count, "seed": seed})
    variables = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", "from ramet.env.check import print_digests; print_digests()"]
    try:
        other = subprocess.run(
            command, input=given, env=variables, capture_output=True, encoding="utf-8", timeout=OTHER_PROCESS_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise TaskError(f"another process did not draw the same tasks within {OTHER_PROCESS_SECONDS:g} seconds") from None
    if other.returncode:
        last = (other.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        raise TaskError(f"another process could not draw the tasks: {last}")
    for split, digests in json.loads(other.stdout.splitlines()[-1]).items():
        if digests != here[split]:
            raise TaskError(
                f"another process draws other tasks for {split}; do not draw from sets, hash() or the time, and sort what is listed"
            )


def print_digests() -> None:
    """The other process of `_repeats`: reads its arguments as JSON, and writes the digests of the tasks by split."""
    from ramet.env.registry import env_settings

    given = json.load(sys.stdin)
    env = env_settings(**given["env"]).build()
    digests = {split: _digest(env.tasks(split, given["count"], given["seed"])) for split in given["splits"]}
    sys.stdout.write("\n" + json.dumps(digests) + "\n")


def _apart(tasks: dict[str, list[Task]]) -> str:
    seen: dict[str, tuple[str, Task]] = {}
    for split, drawn in tasks.items():
        for task in drawn:
            other, same = seen.setdefault(content(task), (split, task))
            if other != split:
                raise TaskError(f"task {task.id} of {split} asks the same as task {same.id} of {other}")
    return f"{len(seen)} different tasks"


def _grades(env: Environment, tasks: dict[str, list[Task]], rewarding: RewardConfig) -> str:
    reward = reward_function(env, rewarding.function)

    def score(task: Task, answer: str | None) -> float:
        return compute_reward(reward, task, answered(task, answer), rewarding.weights, rewarding.timeout).score

    compared, right = 0, [0.0]
    for task in (task for drawn in tasks.values() for task in drawn):
        none = score(task, None)
        if not isinstance(task.reference, str | int | float):
            continue
        best = score(task, str(task.reference))
        if best <= none:
            shown = f"the reference answer {str(task.reference)[:60]!r}"
            raise TaskError(f"task {task.id}: {shown} scores {best:g}, no better than no answer ({none:g})")
        compared += 1
        right.append(best)
        if compared == 1:
            for what, text in HOSTILE.items():
                if (bad := score(task, text)) >= best and text.strip() != str(task.reference).strip():
                    raise TaskError(f"task {task.id}: {what} as an answer scores {bad:g}, no worse than the reference answer ({best:g})")
    if not compared:
        for text in HOSTILE.values():
            score(tasks["train"][0], text)
        return "no task has a reference of text or a number, so none was compared; no answer and hostile text are graded"
    return f"{compared} reference answers score up to {max(right):g}, no answer and hostile text less"


def _sizes(env: Environment, tasks: dict[str, list[Task]]) -> str:
    sizes = [env.size(task) for drawn in tasks.values() for task in drawn]
    return f"from {min(sizes)} to {max(sizes)}"


def _prompts(settings: EnvSettings, tasks: dict[str, list[Task]]) -> str:
    chat, lengths, documents = WireFormat(), [0], [0]
    instruction = settings.instruction(True) if settings.language else ""
    for task in (task for drawn in tasks.values() for task in drawn):
        whole = instructed(task, instruction) if instruction else task
        chat.render(whole.messages, [tool_schema()])
        store = ContextStore(task.documents)
        if not store.media(task.documents):
            lengths.append(len(store.render(task.documents)))
        documents.append(len(store))
    longest = max(sum(len(message.content) for message in task.messages) for drawn in tasks.values() for task in drawn)
    return f"up to {longest:,} characters; up to {max(documents):,} documents of {max(lengths):,} characters together"
