"""`ramet bench sampling --backend vllm`: whole trees through our vLLM policy beside `LLM.generate` on the same token requests.

Trees of the model are grown by the runtime, and what they sampled is noted. Then vLLM's own offline loop gets every one of
those requests at once, with the prompts as token ids and the recorded lengths, so that it never waits for a tree's next turn.
`share` is its time over ours. Both engines have the same settings and start anew; the first pass of each warms it up.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import anyio
from rich.console import Console
from rich.table import Table

from ramet.agents.budget import Budget
from ramet.agents.runtime import Job, Runtime
from ramet.agents.sampling import SampleRequest
from ramet.agents.tree import Tree
from ramet.benchmarks.sampling import Recorder
from ramet.benchmarks.session import meta
from ramet.benchmarks.show import resolve, write_json
from ramet.env.arithmetic import RowsEnvironment
from ramet.policy.models import load_tokenizer
from ramet.policy.vllm import VLLMPolicy

IN_FLIGHT = 64
console = Console()


def bench_vllm(name: str, count: int, repeats: int, seed: int, out: Path | None) -> None:
    """Print and write trees a second, tokens a second, the share, and how much of the prompts the cache held."""
    path = resolve(name)
    _, chat = load_tokenizer(path)
    tasks = RowsEnvironment(operands=(2, 48)).tasks("iid", count, seed)
    context = 768

    async def grow() -> tuple[list[float], list[SampleRequest], list[Tree]]:
        """Seconds of each pass; the requests and trees of the last."""
        seconds: list[float] = []
        requests: list[SampleRequest] = []
        trees: list[Tree] = []
        async with VLLMPolicy(path) as policy:
            budget = Budget(generated=512, answer_reserve=8, context=min(context, policy.context or context))
            for number in range(repeats + 1):
                console.print(f"trees through the policy: pass {number} of {repeats}", end="\r")
                recorder = Recorder(policy)
                begun = time.perf_counter()
                # Other seeds in each pass: the cache must not know the answers' prompts.
                jobs = (Job(task, budget, repeats * i + number) for i, task in enumerate(tasks))
                async with Runtime(recorder, chat).run_many(jobs, in_flight=IN_FLIGHT) as results:
                    trees = [tree async for _, tree in results]
                seconds.append(time.perf_counter() - begun)
                requests = recorder.requests
                await policy.forget()
        return seconds[1:], requests, trees

    ours, requests, trees = anyio.run(grow)
    raw = _raw(path, requests, repeats)
    tokens, prefilled, cached = (sum(getattr(t.usage, n) for t in trees) for n in ("generated", "prefilled", "cached"))
    share = statistics.median(raw) / statistics.median(ours)
    record: dict[str, Any] = {
        "record": "vllm", "model": name, "trees": len(trees), "requests": len(requests), "tokens": tokens,
        "trees_per_second": len(trees) / statistics.median(ours), "tokens_per_second": tokens / statistics.median(ours),
        "tokens_per_second_raw": tokens / statistics.median(raw), "share": share,
        "share_min": min(raw) / max(ours), "share_max": max(raw) / min(ours),
        "prefilled": prefilled, "cached": cached, "repeats": repeats,
    }  # fmt: skip
    about = f"{len(trees)} trees, {len(requests)} requests, {tokens} tokens"
    table = Table("", "seconds, median", "least", "most", "tokens/s", title=about)
    for label, times in (("trees through the policy", ours), ("LLM.generate, all at once", raw)):
        numbers = (statistics.median(times), min(times), max(times))
        table.add_row(label, *(f"{n:.2f}" for n in numbers), f"{tokens / numbers[0]:,.0f}")
    console.print(table)
    console.print(
        f"share of raw throughput {share:.0%} ({record['share_min']:.0%} to {record['share_max']:.0%}); "
        f"prompt tokens from the prefix cache: {cached} of {cached + prefilled}"
    )
    if out is not None:
        write_json(out, [meta("bench sampling", seed), record])


def _raw(path: Path, requests: list[SampleRequest], repeats: int) -> list[float]:
    """Seconds of vLLM's own loop on all requests at once."""
    from vllm import LLM, SamplingParams

    engine = LLM(**VLLMPolicy.settings(path))
    prompts = [{"prompt_token_ids": list(request.prompt)} for request in requests]
    params = [SamplingParams(max_tokens=r.max_tokens, ignore_eos=True, logprobs=0, detokenize=False, seed=r.seed % 2**63) for r in requests]
    seconds = []
    for number in range(repeats + 1):
        console.print(f"LLM.generate: pass {number} of {repeats}", end="\r")
        begun = time.perf_counter()
        made = engine.generate(prompts, params, use_tqdm=False)
        seconds.append(time.perf_counter() - begun)
        assert sum(len(m.outputs[0].token_ids) for m in made) == sum(r.max_tokens for r in requests)
        engine.reset_prefix_cache()
    return seconds[1:]
