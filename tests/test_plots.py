"""Pictures and tables call a score what it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ramet.display import plots
from ramet.runs.build import score_name
from ramet.runs.settings import RunConfig, validate


@pytest.mark.parametrize(
    ("env", "name"),
    [
        ({"kind": "rows"}, "accuracy"),
        ({"kind": "longvideo"}, "accuracy"),
        ({"kind": "longvideo", "metric": "reward"}, "reward model's score"),
        ({"kind": "hotpotqa", "metric": "f1"}, "f1"),
    ],
)
def test_learning_curves_are_titled_by_what_the_score_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, env: dict, name: str) -> None:
    titles: list[str] = []
    monkeypatch.setattr(plots, "save", lambda figure, path: titles.extend(axes.get_title() for axes in figure.axes))
    config: Any = validate(RunConfig, {"model": "nano", "env": env})
    metrics = [{"update": n, "accuracy": 0.5, "spawn_rate": 0.5, "generated": 9.0} for n in range(3)]
    plots.learning({"trained": metrics}, tmp_path / "learning.png", score_name(config))
    assert titles[0] == f"{name} of sampled trees"
