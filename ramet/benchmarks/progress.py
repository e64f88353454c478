"""Progress bars for training and measuring. On a terminal they move; elsewhere a line is printed now and then."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console()


@contextmanager
def training(label: str, updates: int, done: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Reports updates: reward, accuracy, spawn rate, tokens, critical path, smoothed over about ten updates."""
    smooth: dict[str, float] = {}
    with Progress(
        TextColumn(f"[bold]{label}[/]"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(label, total=updates, completed=done, state="")

        def report(metrics: dict[str, Any]) -> None:
            for name in ("reward", "accuracy", "spawn_rate", "generated", "critical_path"):
                smooth[name] = 0.8 * smooth.get(name, metrics[name]) + 0.2 * metrics[name]
            state = (
                f"reward {smooth['reward']:.2f}  accuracy {smooth['accuracy']:.0%}  spawns {smooth['spawn_rate']:.0%}  "
                f"tokens {smooth['generated']:.0f}  path {smooth['critical_path']:.0f}"
            )
            bar.update(task, advance=1, state=state)
            update = metrics["update"] + 1
            if not console.is_terminal and (update % max(updates // 10, 1) == 0 or update == updates):
                console.print(f"{label}: update {update} of {updates}: {state}")

        yield report


@contextmanager
def measuring(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Reports outcomes done."""
    with Progress(
        TextColumn(f"[bold]{label}[/]"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.update(task, advance=count)
    if not console.is_terminal:
        console.print(f"{label}: {total} outcomes")


@contextmanager
def stepping(label: str, total: int) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """Reports a supervised training: logs with `step` and `loss`."""
    done = 0
    with measuring(label, total) as report:

        def tell(entry: Mapping[str, float]) -> None:
            nonlocal done
            report(int(entry["step"]) - done)
            done = int(entry["step"])
            if not console.is_terminal and done % max(total // 10, 10) == 0:
                console.print(f"{label}: step {done} of {total}, loss {float(entry['loss']):.3f}")

        yield tell
