"""CPU mode, before OpenRLHF is imported. `make test-openrlhf` makes the environment; elsewhere these tests are skipped."""

from __future__ import annotations

import os
from importlib.util import find_spec

if find_spec("openrlhf"):
    from ramet.policy.openrlhf import cpu

    os.environ.update(cpu.ENVIRONMENT)
    cpu.without_flash_attention()
