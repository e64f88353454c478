"""What a training run writes to its folder: metrics as JSON lines and TensorBoard events, and samples that no checkpoint covers yet."""

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


class StoredTree:
    """The exact JSON form of a tree of any depth: the tree with its root alone, and its clones as a flat list (`Branch.flat`)."""

    @staticmethod
    def dump_json(tree: Tree) -> bytes:
        """The tree as one JSON object."""
        flat = tree.root.flat()
        without_clones = _TREE.dump_json(replace(tree, root=flat[0][1]))
        return b'{"tree":%b,"clones":%b}' % (without_clones, _CLONES.dump_json(flat[1:]))

    @staticmethod
    def validate_json(text: str | bytes) -> Tree:
        """The tree of such an object, also of an older one with clones nested inside their parents."""
        data = json.loads(text)
        if "tree" not in data:
            return _TREE.validate_python(data)
        tree = _TREE.validate_python(data["tree"])
        return replace(tree, root=Branch.assembled([(0, tree.root), *_CLONES.validate_python(data["clones"])]))


class RunLog:
    """The log of a run in `directory`. Enter it to write.

    rollouts  the folder of the samples of every update since the last checkpoint: a resumed run reads them instead of sampling again
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.rollouts = directory, directory / "rollouts"
        self._metrics = directory / "metrics.jsonl"
        self._start = 0
        self._events: Any = None

    def resume(self, start: int) -> None:
        """Continue at update `start`: drop the metrics of that update and later ones."""
        self._start = start
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
        """Delete the samples of the updates before `step`, which a checkpoint now covers."""
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
        """Append the metrics of one update, its number under `update`. Raises `StorageError` if the disk refuses."""
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
