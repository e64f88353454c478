"""Settings that were called otherwise before: an old name is refused in one line that says the new one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ramet.errors import ConfigError

KEYS: dict[str, str] = {
    "reward.preset": "penalty.preset",
    "reward.generated": "penalty.generated",
    "reward.critical_path": "penalty.critical_path",
    "reward.prefilled": "penalty.prefilled",
    "reward.clones": "penalty.clones",
    "reward.failure": "penalty.failure",
    "train.kl": "train.kl_coef",
    "train.decay": "train.lr_decay",
    "train.gradient_clip": "train.max_grad_norm",
    "server.in_flight": "server.concurrency",
    "server.seconds": "server.timeout",
    "server.wait": "server.startup_timeout",
    "server.extra": "server.extra_body",
    "env.frames": "env.max_frames",
    "env.pixels": "env.max_pixels",
    "env.gold": "env.gold_position",
    "openrlhf.engine_gpus": "openrlhf.tensor_parallel_size",
    "openrlhf.memory_share": "openrlhf.gpu_memory_utilization",
    "openrlhf.recompute": "openrlhf.gradient_checkpointing",
    "openrlhf.attention": "openrlhf.attn_implementation",
    "openrlhf.judges": "reward.concurrency",
    "openrlhf.reward_concurrency": "reward.concurrency",
}
"""Old name of a key or a section -> its name now."""
VALUES: dict[tuple[str, str], str] = {
    ("train.estimator", "team"): "rloo",
    ("train.estimator", "standardised"): "grpo",
    ("train.estimator", "reference"): "selfcest",
    ("penalty.preset", "reference"): "selfcest",
    ("penalty.preset", "reference_maths"): "selfcest_maths",
    ("env.kind", "reference"): "selfcest",
}
"""(key, old name of one of its values) -> the value's name now."""


def check_renamed(settings: Mapping[str, Any]) -> None:
    """Raises `ConfigError` for the first key, or else value, of `settings` (sections as tables) that has another name now."""
    given = _flat(settings)
    for old, new in KEYS.items():
        if old in given:
            raise ConfigError(f"{old} is now called {new}")
    for (key, old), new in VALUES.items():
        if given.get(key) == old:
            raise ConfigError(f'{key} = "{old}" is now called "{new}"')


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every key and every section by its dotted name."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat[prefix + key] = value
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
    return flat
