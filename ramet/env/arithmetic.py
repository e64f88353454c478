"""Arithmetic: expressions whose value is known.

Two generators:

- `rows`: sums and differences of small integers, written in rows of a few operands, like the items on a bill. Each row is a document
  with its own key. The root's prompt contains every row too, so delegation adds no information. These are the tasks of the nano model.
- `selfcest`: expressions with the distribution of the SELFCEST release (Li et al. 2026, General learned delegation by clones,
  arXiv 2602.13262): 3-10 operators out of + - *, operands of 3-7 digits, up to two pairs of parentheses.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ramet.agents.context import ContextStore
from ramet.agents.tree import Message, Task
from ramet.env.settings import EnvSettings, words
from ramet.env.splits import part, select_split
from ramet.errors import ConfigError, TaskError
from ramet.rewards.exact_match import canonical_integer, graded_integer, integer_match

OBJECTIVE = "sum"
"""What the nano model reads after the rows."""
KEYS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""Keys of rows."""
ROW = 6
"""Operands in a row at most, unless a task says otherwise."""


@dataclass(frozen=True, slots=True)
class RowsEnvironment:
    """Sums in rows.

    The number of operands of an iid or training task is log-uniform over the inclusive range `operands` (of 2..24, half are at most 6),
    in rows of at most `row` operands, which is uniform over its inclusive range. Out-of-distribution tasks have `ood_operands` in rows of
    the longest kind. The absolute value of an operand is 1..`largest`. Whether a sum is for training, tuning or measuring depends only on
    its operands (`ramet.env.splits`). Raises `ConfigError` for an empty range.
    """

    operands: tuple[int, int] = (2, 24)
    ood_operands: tuple[int, int] = (48, 54)
    row: tuple[int, int] = (5, 6)
    largest: int = 9
    name: str = "rows"
    splits = ("iid", "ood")
    metrics = ("accuracy",)

    def __post_init__(self) -> None:
        for name in ("operands", "ood_operands", "row"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise ConfigError(f"env.{name} is a range from a smaller to a larger count, both at least 1, not {low} to {high}")
        if self.largest < 1:
            raise ConfigError(f"env.largest is the largest operand, at least 1, not {self.largest}")

    def tasks(self, split: str, count: int, seed: int) -> list[Task]:
        """`count` sums of a split. Raises `ConfigError` if there are not so many."""
        part(split)
        ood = split in ("ood", "tune_ood")
        rng = random.Random(f"rows/{split}/{seed}")
        sums = select_split(split, self._sums(self.ood_operands if ood else self.operands, rng))
        return [
            rows_task(list(values), f"{split}-{seed}-{i}", row=self.row[1] if ood else rng.randint(*self.row))
            for i, values in enumerate(itertools.islice(sums, count))
        ]

    def _sums(self, lengths: tuple[int, int], rng: random.Random) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Endlessly: (the sum as text, its operands), the first operand positive."""
        low, high = lengths
        while True:
            length = int(math.exp(rng.uniform(math.log(low), math.log(high + 1))))
            values = [rng.randint(1, self.largest) * rng.choice((1, -1)) for _ in range(min(max(length, low), high))]
            values[0] = abs(values[0])
            yield spell(values, signed=True), tuple(values)

    def grade(self, task: Task, answer: str | None, metric: str | None = None) -> float:
        """1.0 for the exact value, 0.0 for anything else."""
        return integer_match(task, answer)

    def canonical(self, answer: str) -> str:
        """One form for all spellings of the same integer."""
        return canonical_integer(answer)

    def size(self, task: Task) -> int:
        """The number of operands."""
        return int(task.meta["operands"])


class RowsSettings(EnvSettings):
    """Sums in rows. Ranges are inclusive."""

    kind: Literal["rows"] = "rows"
    """Which environment."""
    operands: tuple[int, int] = (2, 24)
    """Operands of a training or iid task, log-uniform."""
    ood_operands: tuple[int, int] = (48, 54)
    """Operands of an out-of-distribution task."""
    row: tuple[int, int] = (5, 6)
    """Largest number of operands in a row; each task draws its own from this range."""
    largest: Annotated[int, Field(ge=1, le=99)] = 9
    """The largest operand."""

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        for name in ("operands", "ood_operands", "row"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise ValueError(f"{name} must be two counts of at least 1, the smaller first")
        if max(self.operands[1] / self.row[0], self.ood_operands[1] / self.row[1]) > len(KEYS):
            raise ValueError(f"a sum has at most {len(KEYS)} rows; make operands shorter or row longer")
        return self

    @property
    def language(self) -> bool:
        """Sums are not in words."""
        return False

    def build(self, count: Callable[[str], int] = words) -> RowsEnvironment:
        """The environment; `count` is not used."""
        return RowsEnvironment(self.operands, self.ood_operands, self.row, self.largest)


def rows_task(values: list[int], task_id: str, first_key: int = 0, row: int = ROW, signed: bool = False) -> Task:
    """The task of adding up `values`, in balanced rows of at most `row` operands, with keys from letter number `first_key` on.

    `signed` writes the leading plus of the first row too, as in the rows after it. Raises `TaskError` for more rows than letters.
    """
    count = -(-len(values) // row)
    if count > len(KEYS):
        raise TaskError(f"{len(values)} operands need {count} rows; at most {len(KEYS)} rows of {row} are supported")
    bounds = [len(values) * i // count for i in range(count + 1)]
    rows = [values[a:b] for a, b in itertools.pairwise(bounds)]
    documents = {KEYS[(first_key + i) % 26]: spell(r, signed or i > 0) for i, r in enumerate(rows)}
    text = ContextStore(documents).render(documents) + "\n" + OBJECTIVE
    return Task(task_id, (Message("user", text),), documents, sum(values), {"operands": len(values)})


def spell(values: Sequence[int], signed: bool) -> str:
    """The sum as text, such as `3+4-2`; `signed` writes a leading plus too."""
    text = "".join(f"{value:+d}" for value in values)
    return text if signed else text.removeprefix("+")


def parse_sum(text: str) -> list[int]:
    """The operands of a flat sum such as `12+34-5`. Raises `TaskError` for anything else."""
    compact = re.sub(r"\s+", "", text)
    if not re.fullmatch(r"[+-]?\d{1,6}([+-]\d{1,6})*", compact, re.ASCII):
        raise TaskError(f"{text[:60]!r} is not a sum: write integers of at most six digits joined by + and -, such as 12+34-5")
    return [int(term) for term in re.findall(r"[+-]?\d+", compact)]


@dataclass(frozen=True, slots=True)
class SelfcestEnvironment:
    """The arithmetic tasks of SELFCEST (Li et al. 2026, arXiv 2602.13262); `graded` gives partial credit as its release does."""

    graded: bool = True
    name: str = "selfcest"
    splits = ("iid",)
    metrics = ("accuracy",)

    def tasks(self, split: str, count: int, seed: int) -> list[Task]:
        """`count` expressions of a split."""
        part(split, ("train", "tune", "iid"))
        # The former name of the environment, so that the same seeds keep giving the same tasks.
        rng = random.Random(f"reference/{split}/{seed}")
        expressions = ((expression, (expression, value)) for expression, value in iter(lambda: selfcest_expression(rng), None))
        tasks = []
        for index, (expression, value) in enumerate(itertools.islice(select_split(split, expressions), count)):
            prompt = f"Calculate {expression}\nEnd with a line `Answer: <value>`."
            tasks.append(
                Task(f"{split}-{seed}-{index}", (Message("user", prompt),), {}, value, {"operands": len(re.findall(r"\d+", expression))})
            )
        return tasks

    def grade(self, task: Task, answer: str | None, metric: str | None = None) -> float:
        """Partial credit if `graded`, otherwise 1.0 for the exact value and 0.0 for anything else."""
        return graded_integer(task, answer) if self.graded else integer_match(task, answer)

    def canonical(self, answer: str) -> str:
        """One form for all spellings of the same integer."""
        return canonical_integer(answer)

    def size(self, task: Task) -> int:
        """The number of operands."""
        return int(task.meta["operands"])


class SelfcestSettings(EnvSettings):
    """The arithmetic tasks of SELFCEST."""

    kind: Literal["selfcest"] = "selfcest"
    """Which environment."""
    graded: bool = True
    """Partial credit, as in the SELFCEST release."""

    def build(self, count: Callable[[str], int] = words) -> SelfcestEnvironment:
        """The environment; `count` is not used."""
        return SelfcestEnvironment(self.graded)


def selfcest_expression(rng: random.Random) -> tuple[str, int]:
    """One expression whose value has at most 16 digits, and that value. Raises `TaskError` if 2000 attempts give none."""
    for _ in range(2000):
        expression, value = _draft(rng)
        if len(str(abs(value))) <= 16:
            return expression, value
    raise TaskError("no expression was accepted in 2000 attempts")


def _draft(rng: random.Random) -> tuple[str, int]:
    """A random expression and its value, of any number of digits."""
    operators = rng.choices("+-*", weights=(4, 3, 6), k=rng.randint(3, 10))
    numbers = []
    for _ in range(len(operators) + 1):
        digits = rng.randint(3, 7)
        numbers.append(rng.randint(10 ** (digits - 1), 10**digits - 1))
    spans = _parentheses(operators, rng)
    opens, closes = {a for a, _ in spans}, {b for _, b in spans}
    pieces: list[str] = []
    for i, number in enumerate(numbers):
        pieces += ["("] * (i in opens) + [str(number)] + [")"] * (i in closes) + operators[i : i + 1]
    return " ".join(pieces), _value(numbers, operators, spans)


def _parentheses(operators: list[str], rng: random.Random) -> list[tuple[int, int]]:
    """Up to two disjoint spans of operands, as (first, last), that get parentheses."""
    spans: list[tuple[int, int]] = []

    def free(first: int, last: int) -> bool:
        return all(last < a or b < first for a, b in spans)

    candidates = [
        i
        for i, operator in enumerate(operators)
        if operator in "+-" and ("*" in operators[max(i - 1, 0) : i] or "*" in operators[i + 1 : i + 2])
    ]
    rng.shuffle(candidates)
    for i in candidates:
        if len(spans) < 2 and free(i, i + 1) and rng.random() < 0.55:
            spans.append((i, i + 1))
    if len(spans) < 2 and rng.random() < 0.22:
        count = min(rng.randint(3, 5), len(operators) + 1)
        first = rng.randint(0, len(operators) + 1 - count)
        inside = set(operators[first : first + count - 1])
        if "*" in inside and inside & {"+", "-"} and free(first, first + count - 1):
            spans.append((first, first + count - 1))
    return spans


def _value(numbers: list[int], operators: list[str], spans: list[tuple[int, int]]) -> int:
    """The exact value: parentheses first, then products, then sums."""
    for a, b in sorted(spans, reverse=True):
        inner = _value(numbers[a : b + 1], operators[a:b], [])
        numbers = [*numbers[:a], inner, *numbers[b + 1 :]]
        operators = [*operators[:a], *operators[b:]]
    total, product = 0, numbers[0]
    for operator, number in zip(operators, numbers[1:], strict=True):
        if operator == "*":
            product *= number
        else:
            total, product = total + product, number if operator == "+" else -number
    return total + product


def statement(rows: int) -> str:
    """What a branch with the tool writes before it decides whether to delegate: the number of its rows."""
    return f"rows: {rows}"
