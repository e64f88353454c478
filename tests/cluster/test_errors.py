"""Errors cross Ray as what they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from ramet.errors import BudgetExhausted, Drained, EngineLost, PartLost, PolicyError, RewardError, StorageError
from ramet.runs.cluster_process import ours

ray = pytest.importorskip("ray", reason="Ray is not installed: make test-openrlhf")


def test_what_an_actor_raises_ends_the_run_as_what_it_was(tmp_path: Path):
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)

    @ray.remote(max_retries=0)
    def fail(error: Exception) -> None:
        raise error

    try:
        for error in (BudgetExhausted("turns", 3, 1), EngineLost("an engine"), Drained(), RewardError("not a number")):
            with pytest.raises(type(error)) as raised:
                ray.get(fail.remote(error))
            again = ours(raised.value, tmp_path)
            assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))
        for error, kind in ((OSError(28, "full"), StorageError), (ValueError("odd"), PolicyError)):
            with pytest.raises(type(error)) as raised:
                ray.get(fail.remote(error))
            assert type(ours(raised.value, tmp_path)) is kind
        assert type(ours(ray.exceptions.NodeDiedError("a node"), tmp_path)) is PartLost
    finally:
        ray.shutdown()
