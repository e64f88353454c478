"""What a training run leaves in its folder as it goes: metrics as lines and as TensorBoard events, samples not yet in a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from ramet.errors import StorageError


class RunLog:
    """The log of `directory`. Enter it to write.

    rollouts  holds the samples of every update since the last checkpoint, so that these are not sampled again
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.rollouts = directory, directory / "rollouts"
        self._metrics = directory / "metrics.jsonl"
        self._start = 0
        self._events: Any = None

    def resume(self, start: int) -> None:
        """Go on at update `start`: metrics of it and of later ones are dropped."""
        self._start = start
        if self._metrics.exists():
            kept = [line for line in self._lines() if json.loads(line)["update"] < start]
            draft = self._metrics.with_name("metrics.draft")
            _write(draft, "".join(line + "\n" for line in kept), "w")
            draft.replace(self._metrics)

    def _lines(self) -> list[str]:
        """Complete lines; one cut by a crash is left out."""
        lines = []
        for line in self._metrics.read_text().splitlines():
            try:
                json.loads(line)
            except ValueError:
                break
            lines.append(line)
        return lines

    def forget_rollouts(self, step: int) -> None:
        """Drop the samples of the updates before `step`, which a checkpoint now holds."""
        for journal in self.rollouts.glob("*.jsonl"):
            if int(journal.stem) < step:
                journal.unlink()

    def __enter__(self) -> Self:
        from torch.utils.tensorboard import SummaryWriter

        self.directory.mkdir(parents=True, exist_ok=True)
        self._events = SummaryWriter(str(self.directory / "tensorboard"), purge_step=self._start)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._events.close()

    def write(self, metrics: Mapping[str, float | int]) -> None:
        """The metrics of one update, which has the key `update`."""
        _write(self._metrics, json.dumps(dict(metrics)) + "\n", "a")
        for name, value in metrics.items():
            self._events.add_scalar(name, value, metrics["update"])


def _write(path: Path, text: str, mode: Literal["a", "w"]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open(mode) as file:
            file.write(text)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}; free space and run again to resume") from error
