"""What the README and docs show is what the committed results say."""

from __future__ import annotations

import itertools
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


def test_the_results_page_shows_the_committed_tables(records):
    page = (ROOT / "docs" / "results.md").read_text()
    for split in ("iid", "ood"):
        assert "\n".join(accuracy(records, split)) in page
    assert (RESULTS / "results.md").read_text() == markdown(records)


def test_the_readme_shows_a_part_of_the_committed_tables(records):
    points = {(LABELS[r["policy"]], r["split"], r["budget"]): r for r in records if r["record"] == "point"}
    lines = (ROOT / "README.md").read_text().splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("| token budget |"))
    budgets = [cell.strip() for cell in lines[header].strip("|").split("|")[1:]]
    columns = [("ood" if cell.endswith("twice as long") else "iid", int(cell.split(",")[0])) for cell in budgets]
    rows = list(itertools.takewhile(lambda line: line.startswith("|"), lines[header + 2 :]))
    assert len(rows) >= 5
    for row in rows:
        label, *cells = (cell.strip() for cell in row.strip("|").split("|"))
        shown = [points[label, split, budget] for split, budget in columns]
        assert cells == [f"{p['accuracy']:.2f} ±{(p['ci_high'] - p['ci_low']) / 2:.2f}" for p in shown]


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
