"""The settings of baselines are those that did best on the tuning split, by what the journal holds."""

from __future__ import annotations

from collections import Counter

from ramet.agents.journal import Journal
from ramet.policy.models.catalogue import BASE
from ramet.runs.commands import budgets_of
from ramet.runs.settings import RunConfig, load
from ramet.runs.tuning import KEPT, ROWS, TEMPERATURES, best, best_of_all, tune


def test_a_setting_does_best_by_its_sum_of_scores_and_the_first_wins_ties():
    assert best("abc", {"a": 1.0, "b": 2.0, "c": 2.0}) == "b"
    assert best_of_all("ab", {"a": {10: 0.0, 20: 3.0}, "b": {10: 2.0, 20: 0.5}}) == "a"


def test_a_split_and_its_tuning_split_have_the_same_budgets():
    config = load(RunConfig, "nano", ["eval.budgets=[8]", "eval.ood_budgets=[16]"])
    assert [budgets_of(config, split) for split in ("iid", "tune", "ood", "tune_ood")] == [(8,), (8,), (16,), (16,)]


def test_what_baselines_are_set_to_did_best_on_tasks_of_its_own(tmp_path):
    config = load(RunConfig, "nano", ["threads=1", "eval.tasks=20", "eval.budgets=[64, 128]"])
    with Journal(tmp_path / "journal.jsonl", "job") as journal:
        choices = tune(config, BASE, "base", "iid", True, journal)
        records = list(journal)
        again = tune(config, BASE, "base", "iid", True, journal)
        assert len(list(journal)) == len(records), "all of it is in the journal"
    assert again == choices
    assert {record["split"] for record in records} == {"tune"}
    sums: Counter[tuple[str, int]] = Counter()
    for record in records:
        sums[record["policy"], record["budget"]] += record["score"]

    def cut_score(rows: int, kept: int, budget: int) -> float:
        return sums[f"base_map_reduce_{rows}_{kept}", budget]

    for budget, cut in choices.cuts.items():
        assert cut.rows == max(ROWS, key=lambda rows: cut_score(rows, KEPT[0], budget))
        assert cut.kept == max(KEPT, key=lambda kept: cut_score(cut.rows, kept, budget))
    assert choices.temperature == max(TEMPERATURES, key=lambda t: sum(sums[f"base_best_of_n_{t}", budget] for budget in (64, 128)))
