"""A package with an environment and a reward of its own: found by its entry point, measured, trained on, killed, mended, resumed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = '''
"""Sums of the shop."""
import asyncio
import os
import ramet
from ramet.env.arithmetic import rows_task

def task(rng, largest=9):
    values = [rng.randint(1, largest) for _ in range(rng.randint(2, 8))]
    return rows_task(values, "+".join(map(str, values)))

async def reward(task, tree):
    with open("rewarded.txt", "a") as log:
        print(task.id, file=log)
    await asyncio.sleep(0)
    if os.environ.get("KILLED_AT") == str(len(open("rewarded.txt").readlines())):
        os._exit(9)
    right = float(tree.answer == str(task.reference))
    return {"right": right, "brief": right / (1 + tree.usage.generated)}

def sums(largest: int = 9):
    return ramet.SimpleEnvironment(lambda rng: task(rng, largest), reward, name="shop sums", instruction="")
'''
SETTINGS = (
    "train.updates=2", "train.tasks=2", "train.group_size=4", "train.minibatches=1", "train.checkpoint_every=1", "budgets=[40]",
    "eval.tasks=4", "eval.budgets=[40]", "threads=1", "env.options.largest=5",
)  # fmt: skip
SMALL = ["--quiet", *(word for setting in SETTINGS for word in ("--set", setting))]


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    info = tmp_path / "site" / "shop-2.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shop\nVersion: 2.0\n")
    (info / "top_level.txt").write_text("shop\n")
    (info / "entry_points.txt").write_text("[ramet.environments]\nshop-sums = shop:sums\n")
    (tmp_path / "site" / "shop.py").write_text(PACKAGE)
    return tmp_path


def ramet(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(folder / "site"), *filter(None, sys.path)])
    given = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "HF_HUB_OFFLINE": "1", **variables}
    command = [sys.executable, "-m", "ramet", *words]
    return subprocess.run(command, cwd=folder, env=given, capture_output=True, text=True, timeout=300, check=False)


def metrics(folder: Path, name: str) -> list[dict[str, float]]:
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if not key.startswith("seconds")} for line in lines]


def test_a_package_is_trained_on_killed_mended_and_resumed(shop: Path) -> None:
    whole = ramet(shop, "train", "--env", "shop-sums", "--name", "whole", *SMALL)
    assert whole.returncode == 0, whole.stderr
    assert {"part_right", "part_brief"} <= metrics(shop, "whole")[0].keys()
    (shop / "rewarded.txt").unlink()
    assert ramet(shop, "train", "--env", "shop-sums", "--name", "killed", *SMALL, KILLED_AT="12").returncode == 9
    assert len(metrics(shop, "killed")) == 1
    (shop / "site" / "shop.py").write_text(PACKAGE + "# mended\n")
    changed = ramet(shop, "train", "--env", "shop-sums", "--name", "killed", *SMALL)
    assert changed.returncode == 2 and changed.stderr.count("\n") == 1, changed.stderr
    assert "holds a run that was begun with other code of shop:sums; add --accept-changed-code to go on" in changed.stderr
    mended = ramet(shop, "train", "--env", "shop-sums", "--name", "killed", "--accept-changed-code", *SMALL)
    assert mended.returncode == 0, mended.stderr
    assert "the code of shop:sums has changed since the run was begun; going on with it as it is now" in mended.stderr
    assert metrics(shop, "killed") == metrics(shop, "whole")


def test_a_package_is_measured_by_the_path_of_its_environment(shop: Path) -> None:
    words = ("--env", "shop:sums", "--name", "measured", "--config", "nano-sweep", "--set", "reward.weights={brief=0}")
    run = ramet(shop, "eval", *words, *SMALL)
    assert run.returncode == 0, run.stderr
    [point] = [row for row in json.loads((shop / "runs" / "measured" / "results.json").read_text()) if row["record"] == "point"]
    assert point["n"] == 4 and point["split"] == "iid"
