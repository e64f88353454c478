"""What a training run writes to its folder: metrics as JSON lines and TensorBoard events, its trees, and samples that no checkpoint
covers yet.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from ramet.agents.transcripts import LIMIT, TREES, Transcript, Transcripts
from ramet.agents.tree import BranchText, Tree
from ramet.errors import StorageError
from ramet.policy.training.reward import Reward
from ramet.policy.training.update import Group, Metrics


class RunLog:
    """The log of a run in `directory`. Enter it to write.

    rewards      the folder of the rewards of the same updates, where they are kept (`LearningProblem.compared`)
    rollouts     the folder of the samples of every update since the last checkpoint: a resumed run reads them instead of sampling again
    transcripts  bytes of trees to keep
    texts        what the branches of a tree read and wrote; whoever grows trees says how
    """

    def __init__(self, directory: Path, transcripts: int = LIMIT) -> None:
        self.directory, self.rollouts, self.rewards = directory, directory / "rollouts", directory / "rewards"
        self.texts: Callable[[Tree], Sequence[BranchText]] = lambda tree: ()
        self._trees = Transcripts(directory / TREES, transcripts)
        self._metrics = directory / "metrics.jsonl"
        self._start = 0
        self._events: Any = None

    def resume(self, start: int) -> None:
        """Continue at update `start`: drop the metrics and the trees of that update and later ones."""
        self._start = start
        self._trees.forget(lambda place: place.get("update", -1) < start)
        if self._metrics.exists():
            draft = self._metrics.with_name("metrics.draft")
            _write(draft, "".join(json.dumps(entry) + "\n" for entry in self.read() if entry["update"] < start), "w")
            draft.replace(self._metrics)

    def read(self) -> list[Metrics]:
        """The metrics so far, one entry per update. An incomplete last line is left out."""
        entries: list[Metrics] = []
        if self._metrics.exists():
            for line in self._metrics.read_text(encoding="utf-8").splitlines():
                try:
                    entries.append(json.loads(line))
                except ValueError:
                    break
        return entries

    def forget_rollouts(self, step: int) -> None:
        """Delete the samples and rewards of the updates before `step`, which a checkpoint now covers."""
        for journal in [*self.rollouts.glob("*.jsonl"), *self.rewards.glob("*.jsonl")]:
            if int(journal.stem) < step:
                journal.unlink()

    def __enter__(self) -> Self:
        from torch.utils.tensorboard import SummaryWriter

        self.directory.mkdir(parents=True, exist_ok=True)
        self._events = SummaryWriter(str(self.directory / "tensorboard"), purge_step=self._start)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._events.close()

    def write(self, metrics: Metrics) -> None:
        """Append the metrics of one update, its number under `update`. Raises `StorageError` if the disk refuses."""
        _write(self._metrics, json.dumps(metrics) + "\n", "a")
        for name, value in metrics.items():
            self._events.add_scalar(name, value, metrics["update"])


    def keep(self, update: int, groups: Sequence[Group], rewards: Sequence[Sequence[Reward]] | None, error: str = "") -> None:
        """Add the trees of an update to the run's transcripts.

        Their rewards are indexed by group and tree; they are None where they could not be had, because of an `error`.
        """
        if not self._trees.keeps:
            return
        self._trees.append(
            [
                Transcript(
                    {"update": update, "group": group, "number": number}, task.id, tree, tuple(self.texts(tree)), task.reference,
                    {} if rewards is None else asdict(rewards[group][number]), error,
                )
                for group, (task, trees) in enumerate(groups)
                for number, tree in enumerate(trees)
            ]
        )  # fmt: skip


def _write(path: Path, text: str, mode: Literal["a", "w"]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open(mode, encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}; free space and run again to resume") from error
