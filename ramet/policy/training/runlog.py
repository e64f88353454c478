"""What a training run leaves in its folder as it goes: metrics as lines and as TensorBoard events, samples not yet in a checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from pydantic import TypeAdapter

from ramet.agents.tree import Branch, Tree
from ramet.errors import StorageError
from ramet.policy.training.update import Metrics

_TREE, _CLONES = TypeAdapter(Tree), TypeAdapter(list[tuple[int, Branch]])


class STORED:
    """Trees as JSON, exactly, and however deep: a tree with its root alone, and its branches as `Branch.flat` has them."""

    @staticmethod
    def dump_json(tree: Tree) -> bytes:
        flat = tree.root.flat()
        alone = _TREE.dump_json(replace(tree, root=flat[0][1]))
        return b'{"tree":%b,"clones":%b}' % (alone, _CLONES.dump_json(flat[1:]))

    @staticmethod
    def validate_json(text: str | bytes) -> Tree:
        """The tree; also one that was written with its clones inside their parents."""
        data = json.loads(text)
        if "tree" not in data:
            return _TREE.validate_python(data)
        tree = _TREE.validate_python(data["tree"])
        return replace(tree, root=Branch.assembled([(0, tree.root), *_CLONES.validate_python(data["clones"])]))


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
            draft = self._metrics.with_name("metrics.draft")
            _write(draft, "".join(json.dumps(entry) + "\n" for entry in self.read() if entry["update"] < start), "w")
            draft.replace(self._metrics)

    def read(self) -> list[Metrics]:
        """The metrics that are there. A line that a crash has cut, or that is being written, is left out."""
        entries: list[Metrics] = []
        if self._metrics.exists():
            for line in self._metrics.read_text(encoding="utf-8").splitlines():
                try:
                    entries.append(json.loads(line))
                except ValueError:
                    break
        return entries

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

    def write(self, metrics: Metrics) -> None:
        """The metrics of one update, which has the key `update`."""
        _write(self._metrics, json.dumps(metrics) + "\n", "a")
        for name, value in metrics.items():
            self._events.add_scalar(name, value, metrics["update"])


def _write(path: Path, text: str, mode: Literal["a", "w"]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open(mode, encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}; free space and run again to resume") from error
