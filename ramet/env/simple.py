"""An environment of two things: where its tasks come from, and a reward.

    def task(rng):
        a, b = rng.randint(1, 99), rng.randint(1, 99)
        return ramet.Task.ask(f"{a}+{b}", f"What is {a} + {b}?", reference=str(a + b))

    def reward(task, tree):
        return tree.answer == task.reference

    sums = ramet.SimpleEnvironment(tasks=task, reward=reward)
"""

from __future__ import annotations

import inspect
import itertools
import random
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ramet.agents.journal import fingerprint
from ramet.agents.tree import Task
from ramet.data import load_rows
from ramet.env.environment import Environment
from ramet.env.grading import check_signature
from ramet.env.splits import PARTS, part, select_split
from ramet.errors import ConfigError
from ramet.policy.training.reward import RewardFunction

Rows = str | Path | Sequence[Task | Mapping[str, Any]]
"""Tasks, or rows with the fields of `Task.ask`; or a .jsonl, .json or .parquet file of such rows."""
OneTask = Callable[[random.Random], Task]
AllTasks = Callable[[str, int, int], Sequence[Task]]
FIELDS = ("id", "question", "documents", "reference")
MEASURED, TUNING = 5, 10
"""Of rows without splits, one in this many is measured; of training rows, one in this many is kept for tuning."""


class SimpleEnvironment(Environment):
    """Tasks from rows or a function, graded by a reward function.

    tasks        rows, of which a fifth by content is measured; or rows by split: {"train": ..., "iid": ..., "ood": ...}; or a function of
                 a random generator that returns one task, whose content decides on its split; or a function of (split, count, seed) that
                 returns a list, as `Environment.tasks` does
    reward       a function of a task and a tree, see `ramet.policy.training.reward`
    splits       for a function of (split, count, seed): those of "iid" and "ood" that it knows
    instruction  what stands at the end of each question; by default how to delegate and how to answer, "" for nothing

    Raises `ConfigError` for tasks that are none of these, and for rows that cannot be divided.
    """

    def __init__(
        self,
        tasks: OneTask | AllTasks | Rows | Mapping[str, Rows],
        reward: RewardFunction,
        *,
        name: str = "simple",
        splits: Sequence[str] = ("iid",),
        instruction: str | None = None,
    ) -> None:
        check_signature(reward, "the reward")
        self.reward, self.instruction, self._name, self._splits = reward, instruction, name, tuple(splits)
        self._rows: dict[str, list[Task]] = {}
        self._one: OneTask | None = None
        self._all: AllTasks | None = None
        if isinstance(tasks, Mapping):
            self._rows = _by_split({split: _tasks(rows, split) for split, rows in tasks.items()})
            self._splits = tuple(split for split in ("iid", "ood") if split in self._rows)
        elif callable(tasks):
            if _arguments(tasks) == 1:
                self._one, self._splits = tasks, ("iid",)  # type: ignore[assignment]
            else:
                self._all = tasks  # type: ignore[assignment]
        else:
            self._rows, self._splits = _divided(_tasks(tasks, "tasks")), ("iid",)

    @property
    def name(self) -> str:
        """The name in results."""
        return self._name

    @property
    def splits(self) -> tuple[str, ...]:
        """Those of the splits "iid" and "ood" that there are tasks for."""
        return self._splits

    def tasks(self, split: str, count: int, seed: int) -> list[Task]:
        """`count` tasks of a split; of measured rows all, if there are fewer; training rows repeat when all have been used."""
        part(split, ("train", *(other for other in PARTS if other in self._splits or other.startswith("tune"))))
        if self._all is not None:
            return list(self._all(split, count, seed))
        rng = random.Random(f"{self._name}/{split}/{seed}")
        if self._one is not None:
            drawn = map(self._one, itertools.repeat(rng))
            return list(itertools.islice(select_split(split, ((content(task), task) for task in drawn)), count))
        rows = self._rows["tune" if split.startswith("tune") else split]
        if split != "train":
            return rng.sample(rows, min(count, len(rows)))
        return list(itertools.islice(_epochs(rows, rng), count))

    def fingerprint(self) -> str:
        """A hash of the rows; that of a function's tasks is the same for all."""
        return fingerprint({split: [(task.id, content(task), repr(task.reference)) for task in rows] for split, rows in self._rows.items()})


def content(task: Task) -> str:
    """The text of a task by which it is told apart from others: its messages and documents."""
    documents = [f"{key}: {text}" for key, text in task.documents.items()]
    return "\n".join([*(message.content for message in task.messages), *documents])


def _arguments(function: Callable[..., Any]) -> int:
    """1 for a function of a random generator, 3 for one of (split, count, seed). Raises `ConfigError` for others."""
    signature = inspect.signature(function)
    for count in (3, 1):
        try:
            signature.bind(*[None] * count)
        except TypeError:
            continue
        return count
    raise ConfigError(f"the tasks are a function of {signature}; give one of (rng), or of (split, count, seed)")


def _tasks(rows: Rows, what: str) -> list[Task]:
    """Each row as a task."""
    given: Sequence[Task | Mapping[str, Any]] = load_rows(str(rows)) if isinstance(rows, str | Path) else rows
    if not isinstance(given, Sequence):
        raise ConfigError(f"{what} is of type {type(given).__name__}; give rows, a file of rows, or a function")
    tasks = [row if isinstance(row, Task) else _task(row, f"{what}, row {number}", str(number)) for number, row in enumerate(given, 1)]
    if twice := [name for name, times in Counter(task.id for task in tasks).items() if times > 1]:
        raise ConfigError(f"{what}: two tasks have the id {twice[0]}; results are kept by it")
    return tasks


def _task(row: Mapping[str, Any], where: str, number: str) -> Task:
    if not isinstance(row, Mapping):
        raise ConfigError(f"{where} is of type {type(row).__name__}, neither a Task nor a table with {', '.join(FIELDS)}")
    strange = [str(key) for key in row if key not in FIELDS]
    if strange or "question" not in row:
        raise ConfigError(f"{where} has {f'the field {strange[0]}' if strange else 'no question'}; a row takes {', '.join(FIELDS)}")
    if not isinstance(row["question"], str) or not isinstance(row.get("documents") or {}, Mapping):
        raise ConfigError(f"{where}: a question is text, and documents are a table of texts by key")
    return Task.ask(str(row.get("id", number)), row["question"], row.get("documents") or {}, row.get("reference"))


def _order(task: Task) -> tuple[int, str]:
    """A sort key that looks random and depends only on the content."""
    text = content(task)
    return zlib.crc32(text.encode("utf-8", "surrogatepass")), text


def _once(tasks: Sequence[Task]) -> list[Task]:
    """The first task of each content, in an order that depends only on the contents."""
    return sorted({content(task): task for task in reversed(tasks)}.values(), key=_order)


def _divided(tasks: Sequence[Task]) -> dict[str, list[Task]]:
    """Rows without splits: a fifth is measured, and of the others a tenth is kept for tuning."""
    once = _once(tasks)
    if len(once) < 3:
        raise ConfigError(f"{len(once)} different rows cannot be divided into rows to train on, to tune on and to measure; give at least 3")
    measured = max(1, len(once) // MEASURED)
    return _by_split({"iid": once[:measured], "train": once[measured:]})


def _by_split(rows: dict[str, list[Task]]) -> dict[str, list[Task]]:
    """Rows by split, with those to tune on. Raises `ConfigError` for rows that are in two splits, and for splits that there are not."""
    strange = [split for split in rows if split not in ("train", "tune", "iid", "ood")]
    if strange or "train" not in rows:
        raise ConfigError(f"tasks has {f'the split {strange[0]}' if strange else 'no split train'}; it takes train, and tune, iid, ood")
    rows = {split: _once(tasks) for split, tasks in rows.items()}
    if "tune" not in rows:
        kept = max(1, len(rows["train"]) // TUNING)
        rows = {**rows, "tune": rows["train"][:kept], "train": rows["train"][kept:]}
    seen: dict[str, tuple[str, Task]] = {}
    for split, tasks in rows.items():
        if not tasks:
            raise ConfigError(f"there are too few rows for the split {split}; give more")
        for task in tasks:
            other, same = seen.setdefault(content(task), (split, task))
            if other != split:
                raise ConfigError(f"task {task.id} of the split {split} asks the same as task {same.id} of {other}")
    return rows


def _epochs(rows: Sequence[Task], rng: random.Random) -> Iterator[Task]:
    """Endlessly: all rows, in a new order each time."""
    while True:
        yield from rng.sample(rows, len(rows))
