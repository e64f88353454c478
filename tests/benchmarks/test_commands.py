"""Jobs that measure several models into one journal."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file

from ramet.agents.journal import Journal
from ramet.agents.resume import JournaledPolicy
from ramet.agents.transcripts import TREES, read_transcripts
from ramet.errors import ConfigError, StorageError
from ramet.policy.models.catalogue import BASE
from ramet.runs.cluster import _claim
from ramet.runs.commands import claim_folder, run_measuring, tree_entry
from ramet.runs.renamed import KEYS, VALUES
from ramet.runs.settings import RunConfig, load

SMALL = ["threads=1", "eval.tasks=4", "eval.budgets=[60, 120]", "eval.ood_budgets=[200]"]


def test_a_folder_belongs_to_one_process_at_a_time(tmp_path):
    """From another process: refused while it is held, free when its holder is gone, however it went."""
    hold = "import pathlib, sys, time; from ramet import storage; storage.lock(pathlib.Path(sys.argv[1]));"
    hold += "print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(StorageError, match="another process is working in"):
            claim_folder(tmp_path, load(RunConfig, "nano"))
        holder.kill()
    for _ in range(2):
        claim_folder(tmp_path, load(RunConfig, "nano"))


@pytest.mark.parametrize(
    ("setting", "says"),
    [(f"{old} = 1", f"{old} is now called {new}") for old, new in KEYS.items()]
    + [(f"{key} = '{old}'", f'{key} = "{old}" is now called "{new}"') for (key, old), new in VALUES.items()],
)
def test_a_run_that_was_begun_under_other_names_is_not_gone_on_with(tmp_path, setting, says):
    (tmp_path / "config.toml").write_text(f"{setting}\n")
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    for claim in (claim_folder, _claim):
        with pytest.raises(ConfigError) as error:
            claim(tmp_path, load(RunConfig, "nano"))
        expected = f"{tmp_path}/config.toml: {says}; such a run cannot go on: choose another --name or remove {tmp_path}"
        assert str(error.value) == expected


def test_a_job_killed_at_its_second_model_goes_on_where_it_was(tmp_path, monkeypatch):
    config = load(RunConfig, "nano", SMALL)
    other = tmp_path / "other"
    shutil.copytree(BASE, other)
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})

    def run(folder: str):
        with Journal(tmp_path / folder / "journal.jsonl", "job") as journal:
            measured = run_measuring(config, BASE, [tree_entry("base", config, True)], ("iid", "ood"), journal, "measuring")
            measured += run_measuring(config, other, [tree_entry("trained", config, True)], ("iid", "ood"), journal, "measuring")
        # What was cut is charged beside what the outcomes would have cost without.
        spent = [(m.outcome.generated, m.outcome.critical_path) for m in measured]
        costs = dict.fromkeys(("prefilled", "cached", "attention", "generated", "critical_path"), 0)
        return spent, [replace(m, outcome=replace(m.outcome, **costs)) for m in measured]

    whole = run("whole")

    class Killed(Exception):
        pass

    sample, made = JournaledPolicy.sample, 0

    async def dying(self, request, partial):
        nonlocal made
        taken = await sample(self, request, partial)
        made += request.group.startswith("ood")
        if made == 3:
            raise Killed
        return taken

    with Journal(tmp_path / "cut" / "journal.jsonl", "job") as journal:
        run_measuring(config, BASE, [tree_entry("base", config, True)], ("iid", "ood"), journal, "measuring")
        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(JournaledPolicy, "sample", dying)
            run_measuring(config, other, [tree_entry("trained", config, True)], ("iid", "ood"), journal, "measuring")
    (spent, cut), (calm, uncut) = run("cut"), whole
    assert cut == uncut and all(more >= less for ms in zip(spent, calm, strict=True) for more, less in zip(*ms, strict=True))
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == ["journal.jsonl", TREES]
    trees = [sorted((str(k.place), k.tree.answer or "") for k in read_transcripts(tmp_path / name / TREES)) for name in ("cut", "whole")]
    assert trees[0] == trees[1] and len(trees[0]) == len(cut), "every tree once"


def test_a_measurement_that_can_sample_nothing_is_an_error_and_a_partial_one_says_how_much(tmp_path, caplog):
    """Accuracy 0 of prompts that nobody read is no result."""

    def run(folder: str, **budget: int):
        config = load(RunConfig, "nano", [*SMALL, *(f"budget.{name}={value}" for name, value in budget.items())])
        with Journal(tmp_path / folder / "journal.jsonl", "job") as journal:
            return run_measuring(config, BASE, [tree_entry("base", config, True)], ("iid",), journal, "measuring")

    for _ in range(2):
        with pytest.raises(ConfigError, match=r"nothing was sampled for any of 8 outcomes: a prompt of \d+ tokens .* context of 16 tokens"):
            run("none", context=16)
    with pytest.raises(ConfigError, match=r"leaves nothing of budget.prefilled;"):
        run("dear", prefilled=2)
    measured = run("all")
    assert not any(m.outcome.starved for m in measured) and not [r for r in caplog.records if r.levelname == "WARNING"]
    some = [m for m in run("some", prefilled=20) if m.outcome.starved]
    assert 0 < len(some) < 8 and all(m.score == 0 and m.outcome.generated == 0 for m in some)
    assert f"{len(some)} of 8 outcomes (base, iid), which count as wrong" in caplog.text
