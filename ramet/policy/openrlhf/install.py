"""Replace classes of OpenRLHF by ramet's, and run OpenRLHF's own entry point."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from typing import Any

import ray

from ramet.policy.openrlhf import supported
from ramet.policy.openrlhf.settings import RunSpec

ENTRY = "openrlhf.cli.train_ppo_ray"
"""The module of that entry point."""
CALLS = 10**6
"""Concurrent calls of an engine's actor. With Ray's default of a thousand, a pause could wait in the queue behind trees."""


def install(spec: RunSpec) -> None:
    """Replace the classes, in the process that starts the run: Ray pickles them with the actors.

    Raises `ConfigError` if OpenRLHF is missing or of an unsupported release.
    """
    supported.check()
    import openrlhf.trainer.ppo_trainer as controller
    import openrlhf.trainer.ray.ppo_actor as policy
    import openrlhf.trainer.ray.ppo_critic as critic
    import openrlhf.trainer.ray.vllm_engine as engine

    from ramet.policy.openrlhf.actors import TreeCritic, TreePolicy, TreeRollout
    from ramet.policy.openrlhf.trainer import TreeTrainer

    def with_spec(kind: Any) -> Any:
        return type(kind.__name__, (kind,), {"spec": spec})

    engine.RolloutRayActor = ray.remote(max_concurrency=CALLS)(with_spec(TreeRollout))
    policy.PolicyModelActor = ray.remote(num_gpus=1)(with_spec(TreePolicy))
    critic.CriticModelActor = ray.remote(num_gpus=1)(with_spec(TreeCritic))
    controller.PPOTrainer = ray.remote(with_spec(TreeTrainer))


def run(spec: RunSpec, flags: Sequence[str]) -> None:
    """Run to the end, in a process that is connected to Ray."""
    install(spec)
    before, sys.argv = sys.argv, [ENTRY, *flags]
    try:
        runpy.run_module(ENTRY, run_name="__main__")
    finally:
        sys.argv = before
