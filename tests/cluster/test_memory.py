"""The largest part of a batch is logits: how many bytes a token and word the loss takes, which `--plan` counts with."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("openrlhf", reason="OpenRLHF is not installed: make test-openrlhf")

PROGRAM = """
import sys, threading, time
import ramet.policy.openrlhf
import torch
from openrlhf.models import Actor
from transformers import AutoConfig, AutoModelForCausalLM
from ramet.policy.openrlhf.actors import tree_loss
from ramet.policy.openrlhf.experience import deal
from ramet.policy.training.rows import TrainingRow
from ramet.policy.training.update import TrainConfig

torch.set_num_threads(1)
WORDS, TOKENS, KL = 60_000, 2048, float(sys.argv[1])
CONFIG = AutoConfig.for_model(
    "qwen3", hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=32,
    vocab_size=WORDS, tie_word_embeddings=True,
)

def actor():
    made = Actor(AutoModelForCausalLM.from_config(CONFIG).bfloat16())
    made.packing_samples, made.temperature = False, 1.0
    return made

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

policy, reference = actor(), actor() if KL else None
row = TrainingRow([5] * TOKENS, [False] + [True] * (TOKENS - 1), [-1.0] * TOKENS, 0.5, 1.0, [0] * TOKENS)
(experience,) = deal([[row]], 1, TOKENS, 0).experiences
before, peak, done = resident(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, resident())
        time.sleep(0.002)

watching = threading.Thread(target=watch)
watching.start()
tree_loss(policy, reference, experience, TrainConfig(kl_coef=KL)).loss.backward()
done = True
watching.join()
print((peak - before) / (WORDS * TOKENS))
"""


@pytest.mark.parametrize(("kl", "planned"), [(0.0, 14), (0.1, 24)])
def test_the_bytes_of_logits(kl, planned):
    # Freed memory goes back at once, so that what is resident is what is used.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(kl)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) == pytest.approx(planned, abs=2.5)
