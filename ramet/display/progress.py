"""The progress of long work.

On a terminal a bar moves. Elsewhere, and on a dumb terminal, a line is printed at each tenth of the work, and whenever 30 seconds have
passed without one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from ramet.terminal import console

_Item = TypeVar("_Item")
_SECONDS = 30
_BESIDE = 60
"""Columns of a terminal below which there is no room for a bar."""


class _Fitting:
    """The first of `facts`, as many as fit the width."""

    def __init__(self, facts: Sequence[str]):
        self.facts = facts

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        line = ""
        for fact in self.facts:
            longer = f"{line}  {fact}" if line else fact
            if len(longer) > options.max_width:
                break
            line = longer
        yield Text(line, no_wrap=True)


class _Facts(ProgressColumn):
    def render(self, task: Task) -> Any:
        return _Fitting(task.fields["facts"])


@contextmanager
def _progress(label: str, total: int, done: int, unit: str, clock: type[ProgressColumn]) -> Iterator[Callable[[int, Sequence[str]], None]]:
    """A block with a progress display. It yields a function that takes the number done so far and facts to show beside it."""
    whole = Column(no_wrap=True)
    wide = min(console.width // 8, 24)
    bars = [BarColumn(bar_width=wide)] if console.width >= _BESIDE else []
    fixed = len(bars) * (wide + 1) + len(f" {total}/{total} ") + len("-:--:-- ")
    columns = [
        TextColumn(
            "{task.description}",
            style="bold",
            markup=False,
            table_column=Column(no_wrap=True, overflow="ellipsis", max_width=max(console.width - fixed, 8)),
        ),
        *bars,
        MofNCompleteColumn(table_column=whole),
        clock(table_column=whole),
        _Facts(table_column=Column(ratio=1, no_wrap=True)),
    ]
    last_done, last_time = done, time.monotonic()
    with Progress(*columns, console=console, disable=not console.moves, expand=True) as bar:
        task = bar.add_task(label, total=total, completed=done, facts=[])

        def report(now: int, facts: Sequence[str]) -> None:
            nonlocal last_done, last_time
            bar.update(task, completed=now, facts=facts)
            due = now - last_done >= total / 10 or now == total or time.monotonic() - last_time >= _SECONDS
            if not console.moves and now > last_done and due:
                console.print(": ".join([label, f"{now} of {total} {unit}", *(["  ".join(facts)] if facts else [])]))
                last_done, last_time = now, time.monotonic()

        yield report


@contextmanager
def training(label: str, updates: int, done: int, score: str = "accuracy") -> Iterator[Callable[[dict[str, Any]], None]]:
    """A block that shows the progress of training. It yields a function that takes the metrics of an update.

    Reward, score, spawn rate, tokens and critical path are exponential averages with weight 0.2. `score` is the name to show for the score.
    """
    smooth: dict[str, float] = {}
    with _progress(label, updates, done, "updates", TimeRemainingColumn) as show:

        def report(metrics: dict[str, Any]) -> None:
            for name in ("reward", "accuracy", "spawn_rate", "generated", "critical_path"):
                smooth[name] = 0.8 * smooth.get(name, metrics[name]) + 0.2 * metrics[name]
            facts = [
                f"reward {smooth['reward']:.2f}",
                f"{score} {smooth['accuracy']:.0%}",
                f"spawns {smooth['spawn_rate']:.0%}",
                f"tokens {smooth['generated']:.0f}",
                f"path {smooth['critical_path']:.0f}",
            ]
            show(metrics["update"] + 1, facts)

        yield report


@contextmanager
def measuring(label: str, total: int, unit: str = "outcomes") -> Iterator[Callable[[int], None]]:
    """A block that shows the progress of a measurement. It yields a function that takes how many more are done."""
    done = 0
    with _progress(label, total, 0, unit, TimeElapsedColumn) as show:

        def report(count: int) -> None:
            nonlocal done
            done += count
            show(done, ())

        yield report


def each(items: Sequence[_Item], label: str) -> Iterator[_Item]:
    """The items, with a progress display that counts each one once it is done."""
    with measuring(label, len(items), "done") as report:
        for item in items:
            yield item
            report(1)


@contextmanager
def stepping(label: str, total: int) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """A block that shows the progress of supervised training. It yields a function that takes log entries with `step` and `loss`."""
    with _progress(label, total, 0, "steps", TimeElapsedColumn) as report:
        yield lambda entry: report(int(entry["step"]), [f"loss {float(entry['loss']):.3f}"])
