"""What the README and docs show is what the committed results say."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from ramet.display.plots import LABELS
from ramet.display.tables import accuracy, markdown
from ramet.runs.settings import RunConfig, validate

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results" / "nano"


@pytest.fixture(scope="module")
def records() -> list[dict]:
    return json.loads((RESULTS / "results.json").read_text())


def test_the_readme_shows_the_committed_tables(records):
    readme = (ROOT / "README.md").read_text()
    for split in ("iid", "ood"):
        assert "\n".join(accuracy(records, split)) in readme
    assert (RESULTS / "results.md").read_text() == markdown(records)


def test_the_committed_configuration_is_read_and_made_the_results(records):
    config = validate(RunConfig, tomllib.loads((RESULTS / "config.toml").read_text()))
    points = {(r["policy"], r["split"], r["budget"]): r for r in records if r["record"] == "point"}
    policies = set(LABELS) - {"base_serial"}
    assert set(points) == {
        (policy, split, budget)
        for policy in policies
        for split, budgets in (("iid", config.eval.budgets), ("ood", config.eval.ood_budgets))
        for budget in budgets
    }
    assert records[0]["seed"] == config.seed and all(point["n"] == config.eval.tasks for point in points.values())
    assert len(config.eval.budgets) >= 6 and config.eval.tasks >= 300
