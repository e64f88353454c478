"""`ramet show`: the trees that a run has kept, on the terminal.

What models and documents say is shown as it is, but acts on nothing: see `ramet.agents.tree.written`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.text import Text

from ramet.agents.layout import inert
from ramet.agents.transcripts import TREES, Transcript, full, read_transcripts
from ramet.errors import ConfigError
from ramet.storage import meta, write_json
from ramet.terminal import Heading, Table, show

_CELL = 48


@dataclass(frozen=True)
class Choice:
    """Which trees are shown: those that failed, those of one task, the one with the highest or lowest reward; the last `limit` of them.

    Trees of a task, the best and the worst are shown whole, others on a line each.
    """

    failed: bool = False
    task: str | None = None
    best: bool = False
    worst: bool = False
    limit: int = 20

    @property
    def whole(self) -> bool:
        """Are all texts shown?"""
        return self.task is not None or self.best or self.worst

    def of(self, kept: Iterable[Transcript]) -> tuple[list[Transcript], int, int]:
        """(the trees to show, the number of trees that there are, the number of those that fit before `best`, `worst` and `limit`)."""
        last: deque[Transcript] = deque(maxlen=self.limit)
        best = worst = None
        total = fitting = 0
        for transcript in kept:
            total += 1
            if (self.failed and not transcript.failed) or self.task not in (None, transcript.task):
                continue
            fitting += 1
            last.append(transcript)
            if (worth := transcript.worth) is not None:
                best = (worth, transcript) if best is None or worth > best[0] else best
                worst = (worth, transcript) if worst is None or worth < worst[0] else worst
        if not (self.best or self.worst):
            return list(last), total, fitting
        ends = [end for wanted, end in ((self.best, best), (self.worst, worst)) if wanted]
        return [end[1] for end in ends if end is not None], total, fitting


def trees_of(run: Path) -> Path:
    """The transcripts of a run folder. Raises `ConfigError` where there are none."""
    if run.is_file():
        return run
    if not run.is_dir():
        raise ConfigError(f"there is no run folder {run}")
    if (run / TREES).is_file():
        return run / TREES
    inside = [str(path.parent) for path in sorted(run.glob(f"*/{TREES}"))]
    where = f"; there are some in {', '.join(inside)}" if inside else ", which train, eval and frontier write unless transcript_mib is 0"
    raise ConfigError(f"{run} has no {TREES}{where}")


def show_run(run: Path, choice: Choice, out: Path | None) -> None:
    """Print the trees of a run that `choice` chooses, and write them to `out`."""
    path = trees_of(run)
    chosen, total, fitting = choice.of(read_transcripts(path))
    if choice.task is not None and not fitting:
        raise ConfigError(f"no {'failed ' if choice.failed else ''}tree of task {choice.task!r} among the {total} of {path}")
    if (choice.best or choice.worst) and fitting and not chosen:
        raise ConfigError(f"none of {fitting} trees of {path} has a reward")
    if out is not None:
        write_json(out, [meta("show", 0), *(_record(transcript, choice.whole) for transcript in chosen)])
    if choice.whole:
        for transcript in chosen:
            show(Heading(_title(transcript)))
            show(Text(transcript.text()), soft_wrap=True)
    elif chosen:
        show(_table(chosen))
    which = "" if len(chosen) == fitting else f"{len(chosen)} of " if choice.best or choice.worst else f"the last {len(chosen)} of "
    show(f"{which}{fitting} {'failed ' if choice.failed else ''}trees; {path} has {total}")
    if full(path):
        show("the file has reached its limit, transcript_mib: later trees are missing")


def _where(transcript: Transcript) -> str:
    """The place of a tree in its run, in a few words."""
    place = dict(transcript.place)
    if "update" in place:
        return f"update {place['update']}, group {place.get('group')}, tree {place.get('number')}"
    repeat = f", repeat {place['repeat']}" if place.get("repeat") else ""
    number = f", tree {place['number']}" if place.get("number") else ""
    return f"{place.get('policy')}, {place.get('split')}, {place.get('budget')} tokens{repeat}{number}"


def _worth(transcript: Transcript) -> str:
    return "" if transcript.worth is None else f"{transcript.worth:.3f}"


def _title(transcript: Transcript) -> str:
    parts = [f"{name} {value:g}" for name, value in _numbers(transcript.reward)]
    reference = "" if transcript.reference is None else f"; it is {_cell(transcript.reference)}"
    error = f"; {inert(transcript.error)}" if transcript.error else ""
    return f"task {_cell(transcript.task)}, {_where(transcript)}: {', '.join(parts) or 'not graded'}{reference}{error}"


def _numbers(reward: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a reward by name, those of its parts and penalties too."""
    for name, value in reward.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{inert(name)} ")
        elif isinstance(value, (int, float)):
            yield f"{prefix}{inert(name)}", value


def _table(chosen: Sequence[Transcript]) -> Table:
    table = Table("task", "where", "answer", "reference", "reward", "branches", "tokens", "ended")
    for column in table.columns[4:7]:
        column.justify = "right"
    for kept in chosen:
        tree = kept.tree
        answer = "" if tree.answer is None else _cell(tree.answer)
        reference = "" if kept.reference is None else _cell(kept.reference)
        ended = _cell(kept.failed or tree.root.status.value)
        table.add_row(
            _cell(kept.task), _where(kept), answer, reference, _worth(kept), str(len(tree.branches)), str(tree.usage.generated), ended
        )
    return table


def _cell(value: Any) -> str:
    """A value on one line, cut where it is long."""
    text = inert(" ".join(str(value).split()))
    return text if len(text) <= _CELL else text[: _CELL - 1] + "…"


def _record(transcript: Transcript, whole: bool) -> dict[str, Any]:
    tree = transcript.tree
    return {
        "record": "transcript", "task": transcript.task, "place": transcript.place, "answer": tree.answer,
        "reference": transcript.reference, "reward": transcript.reward, "error": transcript.error, "failed": transcript.failed,
        "status": tree.root.status.value, "branches": len(tree.branches), "generated": tree.usage.generated,
        **({"text": transcript.text()} if whole else {}),
    }  # fmt: skip
