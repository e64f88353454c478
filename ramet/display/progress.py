"""The progress of long work.

On a terminal that the command line has named by `draw_on`, a bar moves. Elsewhere lines are logged: for a training one line an update;
for other work one at each tenth of it, and whenever 30 seconds have passed without one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from ramet.terminal import Screen

logger = logging.getLogger(__name__)
_Item = TypeVar("_Item")
_SECONDS = 30
_BESIDE = 60
"""Columns of a terminal below which there is no room for a bar."""
_screen: Screen | None = None


def draw_on(screen: Screen | None) -> None:
    """Move bars and draw trees on `screen`, if it can be drawn over; None: nowhere. The command line decides; a library draws nothing."""
    global _screen
    _screen = screen if screen is not None and screen.moves else None


@contextmanager
def drawing() -> Iterator[Callable[[RenderableType], None]]:
    """Draws a thing over the one before, and takes the last one away."""
    if _screen is None:
        yield lambda shown: None
        return
    with Live(console=_screen, auto_refresh=False, transient=True) as live:
        yield lambda shown: live.update(shown, refresh=True)


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


_Report = Callable[[int, Sequence[str]], None]
"""Is told what is done now, and facts about it."""


def _progress(
    label: str, total: int, done: int, unit: str, clock: type[ProgressColumn], each: bool = False
) -> AbstractContextManager[_Report]:
    """A bar or lines; `each`: a line for each report."""
    return _lines(label, total, done, unit, each) if _screen is None else _bar(_screen, label, total, done, clock)


@contextmanager
def _lines(label: str, total: int, done: int, unit: str, each: bool) -> Iterator[_Report]:
    logged, since = done, time.monotonic()

    def report(now: int, facts: Sequence[str]) -> None:
        nonlocal logged, since
        due = each or now - logged >= total / 10 or now == total or time.monotonic() - since >= _SECONDS
        if now > logged and due:
            logger.info(": ".join([label, f"{now} of {total} {unit}", *(["  ".join(facts)] if facts else [])]))
            logged, since = now, time.monotonic()

    yield report


@contextmanager
def _bar(screen: Screen, label: str, total: int, done: int, clock: type[ProgressColumn]) -> Iterator[_Report]:
    whole = Column(no_wrap=True)
    wide = min(screen.width // 8, 24)
    bars = [BarColumn(bar_width=wide)] if screen.width >= _BESIDE else []
    fixed = len(bars) * (wide + 1) + len(f" {total}/{total} ") + len("-:--:-- ")
    columns = [
        TextColumn(
            "{task.description}",
            style="bold",
            markup=False,
            table_column=Column(no_wrap=True, overflow="ellipsis", max_width=max(screen.width - fixed, 8)),
        ),
        *bars,
        MofNCompleteColumn(table_column=whole),
        clock(table_column=whole),
        _Facts(table_column=Column(ratio=1, no_wrap=True)),
    ]
    with Progress(*columns, console=screen, expand=True) as bar:
        task = bar.add_task(label, total=total, completed=done, facts=[])
        yield lambda now, facts: bar.update(task, completed=now, facts=facts)


@contextmanager
def training(label: str, updates: int, done: int, score: str = "accuracy") -> Iterator[Callable[[dict[str, Any]], None]]:
    """A block that shows the progress of training. It yields a function that takes the metrics of an update.

    Reward, score, spawn rate, tokens and critical path are exponential averages with weight 0.2. `score` is the name to show for the score.
    """
    smooth: dict[str, float] = {}
    with _progress(label, updates, done, "updates", TimeRemainingColumn, each=True) as show:

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
    """A block that shows the progress of supervised training.

    It yields a function that takes log entries with `step`, `loss` and perhaps `tokens_per_second`.
    """
    with _progress(label, total, 0, "steps", TimeElapsedColumn) as report:

        def report_entry(entry: Mapping[str, float]) -> None:
            rate = entry.get("tokens_per_second")
            report(int(entry["step"]), [f"loss {float(entry['loss']):.3f}", *([] if rate is None else [f"{rate:,.0f} tokens/s"])])

        yield report_entry
