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
from ramet.benchmarks.jobs import claim_folder, run_measuring, tree_entry
from ramet.config import RunConfig, validate
from ramet.errors import StorageError
from ramet.nano import BASE

SMALL = {"threads": 1, "eval": {"tasks": 4, "budgets": [60, 120], "ood_budgets": [200]}}


def test_a_folder_belongs_to_one_process_at_a_time(tmp_path):
    """From another process: refused while it is held, free when its holder is gone, however it went."""
    hold = "import pathlib, sys, time; from ramet.benchmarks import jobs; jobs.lock(pathlib.Path(sys.argv[1]));"
    hold += "print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(StorageError, match="another process is working in"):
            claim_folder(tmp_path, RunConfig())
        holder.kill()
    for _ in range(2):
        claim_folder(tmp_path, RunConfig())


def test_a_job_killed_at_its_second_model_goes_on_where_it_was(tmp_path, monkeypatch):
    config = validate(RunConfig, SMALL)
    other = tmp_path / "other"
    shutil.copytree(BASE, other)
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})

    def run(folder: str):
        with Journal(tmp_path / folder / "journal.jsonl", "job") as journal:
            measured = run_measuring(config, BASE, [tree_entry("base", config, True)], ("iid", "ood"), journal, "measuring")
            measured += run_measuring(config, other, [tree_entry("trained", config, True)], ("iid", "ood"), journal, "measuring")
        return [replace(m, outcome=replace(m.outcome, prefilled=0)) for m in measured]

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
    assert run("cut") == whole
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["journal.jsonl"]
