"""`ramet bench sampling`: the transformers backend compared with `model.generate` on the same requests.

The workload is recorded from real trees of the model (root turns, clones, later turns): ragged prompts
and ragged lengths. Each request is replayed at its recorded length, so every backend makes the
same number of tokens. `generate` gets batches of 64 in the order of arrival, as a trainer would call it.
Rounds alternate between backends; the median is reported. `forward_share` is the time inside the
model's forward pass as a share of wall time, with every slot busy: 64 requests of 64 tokens, for which
transformers' own continuous batching (`generate_batch`) is measured too (`tokens_per_second_full`).
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import torch

from ramet.agents import drain
from ramet.agents.budget import Budget
from ramet.agents.runtime import Job, Runtime
from ramet.agents.sampling import Partial, Policy, PolicyWrapper, Sample, SampleRequest
from ramet.env.arithmetic import RowsEnvironment
from ramet.errors import PolicyError
from ramet.policy.engines.hf import HFPolicy
from ramet.policy.models.catalogue import resolve
from ramet.policy.models.load import load_model
from ramet.storage import meta, write_json
from ramet.terminal import Table, show

logger = logging.getLogger(__name__)

BATCH = 64


class Recorder(PolicyWrapper):
    """A policy that records the requests that pass through it."""

    def __init__(self, policy: Policy):
        super().__init__(policy)
        self.requests: list[SampleRequest] = []

    async def sample(self, request: SampleRequest, partial: Partial) -> Sample:
        """The policy's sample, once its request is noted with the length that it came to."""
        sample = await super().sample(request, partial)
        self.requests.append(replace(request, max_tokens=len(sample.ids), stop_ids=frozenset()))
        return sample


async def _record(model: Any, chat: Any, count: int, seed: int) -> list[SampleRequest]:
    tasks = RowsEnvironment(operands=(2, 48)).tasks("iid", count, seed)
    budget = Budget(generated=512, answer_reserve=8, context=min(768, model.config.max_position_embeddings))
    async with HFPolicy(model, max_batch=BATCH) as policy:
        recorder = Recorder(policy)
        async with Runtime(recorder, chat).run_many((Job(task, budget, i) for i, task in enumerate(tasks)), in_flight=BATCH) as trees:
            async for _ in trees:
                if len(recorder.requests) >= count:
                    break
    return recorder.requests[:count]


def _ours(model: Any, requests: list[SampleRequest]) -> tuple[float, float]:
    """(seconds, share of them inside forward passes)."""

    async def run() -> tuple[float, float]:
        async with HFPolicy(model, max_batch=BATCH) as policy:
            started = time.perf_counter()
            async with anyio.create_task_group() as group:
                for request in requests:
                    group.start_soon(policy.sample, request, Partial())
            seconds = time.perf_counter() - started
            return seconds, policy.stats.forward_seconds / seconds

    return drain.run(run)


def _generate(model: Any, requests: list[SampleRequest], pad: int) -> tuple[float, float]:
    inside = 0.0
    started = 0.0

    def before(*_: Any) -> None:
        nonlocal started
        started = time.perf_counter()

    def after(*_: Any) -> None:
        nonlocal inside
        inside += time.perf_counter() - started

    hooks = [model.register_forward_pre_hook(before), model.register_forward_hook(after)]
    begun = time.perf_counter()
    with torch.inference_mode():
        for at in range(0, len(requests), BATCH):
            batch = requests[at : at + BATCH]
            longest = max(len(r.prompt) for r in batch)
            ids = torch.tensor([[pad] * (longest - len(r.prompt)) + list(r.prompt) for r in batch])
            mask = torch.tensor([[0] * (longest - len(r.prompt)) + [1] * len(r.prompt) for r in batch])
            limit = max(r.max_tokens for r in batch)
            model.generate(
                input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, min_new_tokens=limit, max_new_tokens=limit, pad_token_id=pad
            )
    seconds = time.perf_counter() - begun
    for hook in hooks:
        hook.remove()
    return seconds, inside / seconds


def _continuous(model: Any, requests: list[SampleRequest], pad: int) -> float:
    """Seconds that transformers' own continuous batching takes; all requests must have the same length."""
    from transformers import GenerationConfig

    config = GenerationConfig(max_new_tokens=requests[0].max_tokens, do_sample=True, top_k=0, eos_token_id=-1, pad_token_id=pad)
    begun = time.perf_counter()
    made = model.generate_batch(inputs=[list(r.prompt) for r in requests], generation_config=config, progress_bar=False)
    if sum(len(output.generated_tokens) for output in made.values()) != sum(r.max_tokens for r in requests):
        raise PolicyError("transformers' continuous batching did not return the number of tokens that was requested")
    return time.perf_counter() - begun


def bench_sampling(name: str, count: int, repeats: int, seed: int, out: Path | None) -> None:
    """Print and write one record per backend, and the ratio."""
    model, tokenizer, chat = load_model(resolve(name))
    requests = drain.run(_record, model, chat, count, seed)
    tokens = sum(request.max_tokens for request in requests)
    full = [replace(r, max_tokens=64, prompt=r.prompt[:64]) for r in requests[:BATCH]]
    backends: dict[str, Callable[[], tuple[float, float]]] = {
        "ramet": lambda: _ours(model, requests),
        "generate": lambda: _generate(model, requests, tokenizer.pad_token_id),
    }
    rounds: dict[str, list[float]] = {backend: [] for backend in backends}
    shares: dict[str, list[float]] = {backend: [] for backend in backends}
    even: dict[str, list[float]] = {backend: [] for backend in (*backends, "generate_batch")}
    for number in range(repeats):
        for backend, run in backends.items():
            logger.info(f"round {number + 1} of {repeats}: {backend}")
            rounds[backend].append(run()[0])
        for backend, (seconds, share) in {"ramet": _ours(model, full), "generate": _generate(model, full, tokenizer.pad_token_id)}.items():
            even[backend].append(seconds)
            shares[backend].append(share)
        even["generate_batch"].append(_continuous(model, full, tokenizer.pad_token_id))
    records: list[dict[str, Any]] = [meta("bench sampling", seed)]
    even_rate = {backend: len(full) * 64 / statistics.median(times) for backend, times in even.items()}
    table = Table(
        "backend",
        "tokens/s",
        "least",
        "most",
        "full batch tokens/s",
        "forward share",
        title=f"{len(requests)} requests, {tokens} tokens, {name}",
    )
    for backend, times in rounds.items():
        rate = tokens / statistics.median(times)
        share = statistics.median(shares[backend])
        table.add_row(
            backend,
            f"{rate:,.0f}",
            f"{tokens / max(times):,.0f}",
            f"{tokens / min(times):,.0f}",
            f"{even_rate[backend]:,.0f}",
            f"{share:.0%}",
        )
        records.append(
            {
                "record": "backend",
                "backend": backend,
                "model": name,
                "requests": len(requests),
                "tokens": tokens,
                "tokens_per_second": rate,
                "tokens_per_second_min": tokens / max(times),
                "tokens_per_second_max": tokens / min(times),
                "tokens_per_second_full": even_rate[backend],
                "forward_share": share,
            }
        )
    table.add_row("generate_batch", "", "", "", f"{even_rate['generate_batch']:,.0f}", "")
    records.append(
        {
            "record": "backend",
            "backend": "generate_batch",
            "model": name,
            "requests": len(full),
            "tokens": 64 * len(full),
            "tokens_per_second": even_rate["generate_batch"],
            "forward_share": None,
            "tokens_per_second_full": even_rate["generate_batch"],
        }
    )
    ratios = [theirs / ours for ours, theirs in zip(rounds["ramet"], rounds["generate"], strict=True)]
    records.append({"record": "ratio", "ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)})
    if out is not None:
        write_json(out, records)
    show(table)
    show(f"ramet / generate: {statistics.median(ratios):.2f} (least {min(ratios):.2f}, most {max(ratios):.2f})")
