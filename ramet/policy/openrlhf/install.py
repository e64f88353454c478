"""Put ramet's classes in the places of OpenRLHF's, and run OpenRLHF's own entry point."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from typing import Any

import ray

from ramet.policy.openrlhf import supported
from ramet.policy.openrlhf.settings import RunSpec

ENTRY = "openrlhf.cli.train_ppo_ray"
CALLS = 10**6
"""Calls that an engine works on at a time. With Ray's thousand, a pause would wait behind trees."""


def install(spec: RunSpec) -> None:
    """In this process, which is to start the run: the classes reach the actors with the actors. Raises `ConfigError`."""
    supported.check()
    import openrlhf.trainer.ppo_trainer as controller
    import openrlhf.trainer.ray.ppo_actor as policy
    import openrlhf.trainer.ray.ppo_critic as critic
    import openrlhf.trainer.ray.vllm_engine as engine

    from ramet.policy.openrlhf.actors import TreeCritic, TreePolicy, TreeRollout
    from ramet.policy.openrlhf.trainer import TreeTrainer

    def told(kind: Any) -> Any:
        return type(kind.__name__, (kind,), {"spec": spec})

    engine.RolloutRayActor = ray.remote(max_concurrency=CALLS)(told(TreeRollout))
    policy.PolicyModelActor = ray.remote(num_gpus=1)(told(TreePolicy))
    critic.CriticModelActor = ray.remote(num_gpus=1)(told(TreeCritic))
    controller.PPOTrainer = ray.remote(told(TreeTrainer))


def run(spec: RunSpec, flags: Sequence[str]) -> None:
    """The whole run, in a process that is connected to Ray."""
    install(spec)
    before, sys.argv = sys.argv, [ENTRY, *flags]
    try:
        runpy.run_module(ENTRY, run_name="__main__")
    finally:
        sys.argv = before
