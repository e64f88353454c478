"""Progress of long work. On a terminal a bar moves; elsewhere, and on a dumb terminal, a line is printed at each tenth
of the work, and after thirty seconds without one."""

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
    """As many of `facts`, from the first on, as there is room for."""

    def __init__(self, facts: Sequence[str]):
        self.facts = facts

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown = ""
        for fact in self.facts:
            longer = f"{shown}  {fact}" if shown else fact
            if len(longer) > options.max_width:
                break
            shown = longer
        yield Text(shown, no_wrap=True)


class _Facts(ProgressColumn):
    def render(self, task: Task) -> Any:
        return _Fitting(task.fields["facts"])


@contextmanager
def _progress(label: str, total: int, done: int, unit: str, clock: type[ProgressColumn]) -> Iterator[Callable[[int, Sequence[str]], None]]:
    """Reports what is done now, and facts about it."""
    whole = Column(no_wrap=True)
    wide = min(console.width // 8, 24)
    bars = [BarColumn(bar_width=wide)] if console.width >= _BESIDE else []
    taken = len(bars) * (wide + 1) + len(f" {total}/{total} ") + len("-:--:-- ")
    columns = [
        TextColumn(
            "{task.description}",
            style="bold",
            markup=False,
            table_column=Column(no_wrap=True, overflow="ellipsis", max_width=max(console.width - taken, 8)),
        ),
        *bars,
        MofNCompleteColumn(table_column=whole),
        clock(table_column=whole),
        _Facts(table_column=Column(ratio=1, no_wrap=True)),
    ]
    shown, said = done, time.monotonic()
    with Progress(*columns, console=console, disable=not console.moves, expand=True) as bar:
        task = bar.add_task(label, total=total, completed=done, facts=[])

        def report(now: int, facts: Sequence[str]) -> None:
            nonlocal shown, said
            bar.update(task, completed=now, facts=facts)
            due = now - shown >= total / 10 or now == total or time.monotonic() - said >= _SECONDS
            if not console.moves and now > shown and due:
                console.print(": ".join([label, f"{now} of {total} {unit}", *(["  ".join(facts)] if facts else [])]))
                shown, said = now, time.monotonic()

        yield report


@contextmanager
def training(label: str, updates: int, done: int, score: str = "accuracy") -> Iterator[Callable[[dict[str, Any]], None]]:
    """Reports updates: reward, score, spawn rate, tokens, critical path, smoothed over about ten updates.

    `score` is what the score of a tree is called.
    """
    smooth: dict[str, float] = {}
    with _progress(label, updates, done, "updates", TimeRemainingColumn) as tell:

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
            tell(metrics["update"] + 1, facts)

        yield report


@contextmanager
def measuring(label: str, total: int, unit: str = "outcomes") -> Iterator[Callable[[int], None]]:
    """Reports how many more are done."""
    done = 0
    with _progress(label, total, 0, unit, TimeElapsedColumn) as tell:

        def report(count: int) -> None:
            nonlocal done
            done += count
            tell(done, ())

        yield report


def each(items: Sequence[_Item], label: str) -> Iterator[_Item]:
    """The items, reporting each that is done."""
    with measuring(label, len(items), "done") as report:
        for item in items:
            yield item
            report(1)


@contextmanager
def stepping(label: str, total: int) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """Reports a supervised training: logs with `step` and `loss`."""
    with _progress(label, total, 0, "steps", TimeElapsedColumn) as report:
        yield lambda entry: report(int(entry["step"]), [f"loss {float(entry['loss']):.3f}"])
