"""`ramet bench sampling --backend vllm`: whole trees through the vLLM policy, compared with `LLM.generate` on the same requests.

Trees of the model are grown by the runtime, and what they sampled is noted. Then vLLM's own offline loop gets every one of
those requests at once, with the prompts as token ids and the recorded lengths, so that it never waits for a tree's next turn.
`share` is our tokens a second over its. Both engines have the same settings and start anew; the first pass of each warms it up.
"""

from __future__ import annotations

import logging
import statistics
import time
from pathlib import Path
from typing import Any

from ramet.agents import drain
from ramet.agents.budget import Budget
from ramet.agents.runtime import Job, Runtime
from ramet.agents.sampling import SampleRequest
from ramet.agents.tree import Status, Tree
from ramet.benchmarks.speed.sampling import Recorder
from ramet.env.arithmetic import RowsEnvironment
from ramet.errors import PolicyError
from ramet.policy.engines.vllm import VLLMPolicy
from ramet.policy.models.catalogue import resolve
from ramet.policy.models.tokenizer import load_tokenizer
from ramet.storage import meta, write_json
from ramet.terminal import Table, show

logger = logging.getLogger(__name__)

IN_FLIGHT = 256


def bench_vllm(name: str, count: int, repeats: int, seed: int, out: Path | None) -> None:
    """Print and write trees a second, tokens a second, the share, and how much of the prompts the cache held."""
    path = resolve(name)
    _, chat = load_tokenizer(path)
    tasks = RowsEnvironment(operands=(2, 48)).tasks("iid", count, seed)
    context = 768

    async def grow() -> tuple[list[float], list[SampleRequest], list[Tree]]:
        """Tokens a second in each pass; the requests and trees of the last."""
        rates: list[float] = []
        requests: list[SampleRequest] = []
        trees: list[Tree] = []
        async with VLLMPolicy(path) as policy:
            budget = Budget(generated=512, answer_reserve=8, context=min(context, policy.context or context))
            for number in range(repeats + 1):
                logger.info(f"trees through the policy: pass {number} of {repeats}")
                recorder = Recorder(policy)
                begun = time.perf_counter()
                # Other seeds in each pass: the cache must not know the answers' prompts.
                jobs = (Job(task, budget, repeats * i + number) for i, task in enumerate(tasks))
                async with Runtime(recorder, chat).run_many(jobs, in_flight=IN_FLIGHT) as results:
                    trees = [tree async for _, tree in results]
                for tree in trees:
                    if tree.root.status is Status.FAILED:
                        raise PolicyError(tree.error)
                rates.append(sum(tree.usage.generated for tree in trees) / (time.perf_counter() - begun))
                requests = recorder.requests
                await policy.forget()
        return rates[1:], requests, trees

    ours, requests, trees = drain.run(grow)
    raw = _raw(path, requests, repeats)
    tokens, prefilled, cached = (sum(getattr(t.usage, n) for t in trees) for n in ("generated", "prefilled", "cached"))
    share = statistics.median(ours) / statistics.median(raw)
    record: dict[str, Any] = {
        "record": "vllm", "model": name, "trees": len(trees), "requests": len(requests), "tokens": tokens,
        "trees_per_second": statistics.median(ours) * len(trees) / tokens, "tokens_per_second": statistics.median(ours),
        "tokens_per_second_raw": statistics.median(raw), "share": share,
        "share_min": min(ours) / max(raw), "share_max": max(ours) / min(raw),
        "prefilled": prefilled, "cached": cached, "repeats": repeats,
    }  # fmt: skip
    about = f"{len(trees)} trees, {len(requests)} requests, {tokens} tokens"
    table = Table("tokens a second", "median", "least", "most", title=about)
    for label, rates in (("trees through the policy", ours), ("LLM.generate, all at once", raw)):
        table.add_row(label, *(f"{n:,.0f}" for n in (statistics.median(rates), min(rates), max(rates))))
    if out is not None:
        write_json(out, [meta("bench sampling", seed), record])
    show(table)
    show(
        f"share of raw throughput {share:.0%} ({record['share_min']:.0%} to {record['share_max']:.0%}); "
        f"prompt tokens from the prefix cache: {cached} of {cached + prefilled}"
    )


def _raw(path: Path, requests: list[SampleRequest], repeats: int) -> list[float]:
    """Tokens a second of vLLM's own loop on all requests at once."""
    from vllm import LLM, SamplingParams

    engine = LLM(**VLLMPolicy.settings(path))
    prompts = [{"prompt_token_ids": list(request.prompt)} for request in requests]
    params = [SamplingParams(max_tokens=r.max_tokens, ignore_eos=True, logprobs=0, detokenize=False, seed=r.seed % 2**63) for r in requests]
    rates = []
    for number in range(repeats + 1):
        logger.info(f"LLM.generate: pass {number} of {repeats}")
        begun = time.perf_counter()
        made = engine.generate(prompts, params, use_tqdm=False)
        tokens = sum(len(m.outputs[0].token_ids) for m in made)
        rates.append(tokens / (time.perf_counter() - begun))
        assert tokens == sum(r.max_tokens for r in requests)
        engine.reset_prefix_cache()
    return rates[1:]
