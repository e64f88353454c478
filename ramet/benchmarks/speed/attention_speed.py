"""`ramet bench attention`: how long the methods take, in two ways that are never mixed.

critical_path   one host's work in a layer, timed alone on one core, for the host that has most of it; what other hosts
                would send has the right shape and any content. Any number of hosts. The bytes that it would receive cross
                a link of the given bandwidth after the work: no overlap is assumed.
wall            real processes over gloo on this machine, one thread each, beside dense attention on as many threads.

Long attention calls are timed on some of their query rows and counted in full (`timed_share` says how much was timed).
Shapes are those of Qwen2.5-3B. `predicted_seconds` are the operations of `ramet.attention.cost` at the rate that dense
attention, or the layer's matrix products, reach on this core in the same run.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from ramet.attention import kernels
from ramet.attention.comm import CompletedWork, DistributedGroup, RankGroup, SingleRank, Traffic, Work
from ramet.attention.cost import QWEN_3B, LayerShape, attention_flops, received
from ramet.attention.kernels import attend
from ramet.attention.merge import PartialAttention, merge
from ramet.attention.methods import NAMES, Method
from ramet.attention.plan import BlockPlan, ShardedPlan
from ramet.display import progress
from ramet.display.plots import save
from ramet.storage import meta, write_json
from ramet.terminal import Table, show

logger = logging.getLogger(__name__)

LONG_CALL = 4e10
"""Operations beyond which an attention call is timed on some of its query rows."""
ROWS = 256
"""Query rows of one timed piece."""


@dataclass
class LoneRank:
    """A rank without its peers, whose messages are replaced by random numbers."""

    rank: int
    size: int
    traffic: Traffic = field(default_factory=Traffic)

    def gather(self, x: Tensor) -> Work:
        """The rank's own tensor in place of everybody's."""
        return CompletedWork(x[None].expand(self.size, *x.shape))

    def shift(self, x: Tensor, like: Tensor) -> Work:
        """Random numbers in place of the neighbour's tensor; they are written to `like`."""
        return CompletedWork(like.normal_())

    def exchange(self, parts: Sequence[Tensor], like: Sequence[tuple[int, ...]]) -> Work:
        """Random numbers of the shapes in `like`."""
        return CompletedWork([torch.randn(shape) for shape in like])


@dataclass
class SampledClock:
    """A clock that adds what sampled attention calls left out."""

    timed: float = 0.0
    whole: float = 0.0
    added: float = 0.0

    def kernel(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> PartialAttention:
        """Attention on all rows if the call is short, else on evenly spaced pieces of rows."""
        rows, keys = q.shape[1], k.shape[1]
        pairs = rows * (rows + 1) / 2 if causal else rows * keys
        self.whole += pairs
        pieces = rows // ROWS
        wanted = int(pieces * LONG_CALL / (4 * q.shape[0] * q.shape[2] * pairs))
        if pieces < 8 or wanted >= pieces:
            self.timed += pairs
            return kernels.KERNELS["flash"](q, k, v, scale, causal)
        out, lse = torch.zeros_like(q), q.new_zeros(q.shape[:2])
        chosen = [(2 * i + 1) * pieces // (2 * max(wanted, 4)) for i in range(max(wanted, 4))]
        started, done = time.perf_counter(), 0.0
        for piece in chosen:
            at = slice(piece * ROWS, (piece + 1) * ROWS)
            seen = at.stop if causal else keys
            part = attend(q[:, at], k[:, :seen], v[:, :seen], scale, causal, "flash")
            out[:, at], lse[:, at] = part
            done += ROWS * (seen - (ROWS - 1) / 2 if causal else seen)
        self.timed += done
        self.added += (time.perf_counter() - started) * (pairs / done - 1)
        return PartialAttention(out, lse)


@contextmanager
def sampling() -> Iterator[SampledClock]:
    """Attention calls with backend "sampled" go through a `SampledClock`."""
    clock = SampledClock()
    kernels.KERNELS["sampled"] = clock.kernel
    try:
        yield clock
    finally:
        del kernels.KERNELS["sampled"]


def local(shape: LayerShape, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of some rows."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(heads, rows, shape.head, generator=generator) for heads in (shape.heads, shape.kv_heads, shape.kv_heads))
    return q, k, v


def busiest(method: Method, plan: BlockPlan | ShardedPlan, shape: LayerShape) -> int:
    """The rank with the most work in a layer."""
    return max(range(plan.hosts), key=lambda rank: attention_flops(method, plan, rank, shape) + shape.linear * len(plan.rows(rank)))


def prefill_seconds(method: Method, plan: BlockPlan | ShardedPlan, rank: int, shape: LayerShape, repeats: int) -> tuple[float, float]:
    """Seconds of one rank's attention in a layer, the median of `repeats`, and the share of its pairs that was timed."""
    q, k, v = local(shape, len(plan.rows(rank)))
    group = LoneRank(rank, plan.hosts) if plan.hosts > 1 else SingleRank()
    times, share = [], 1.0
    sampled = Method(method.name, method.anchor, method.passing, method.scorer, "sampled")
    for _ in range(repeats):
        with sampling() as clock, torch.no_grad():
            started = time.perf_counter()
            sampled.attend(plan, group, q, k, v, shape.head**-0.5)
            times.append(time.perf_counter() - started + clock.added)
            share = clock.timed / clock.whole
    return statistics.median(times), share


def decode_seconds(plan: BlockPlan | ShardedPlan, rank: int, shape: LayerShape, repeats: int) -> float:
    """Seconds of one rank's attention in a layer for one new token: its share of the keys, and the merge of all ranks'."""
    kept = sum(s.stop - s.start for s in (*plan.cached_rows(rank), plan.query_rows(rank)))
    q, (_, k, v) = local(shape, 1)[0], local(shape, max(kept, 1))
    times = []
    for _ in range(5 * repeats + 1):
        started = time.perf_counter()
        part = attend(q, k, v, shape.head**-0.5)
        if plan.hosts > 1:
            merge([part] * plan.hosts)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def linear_seconds(shape: LayerShape, rows: int, repeats: int) -> float:
    """Seconds per row of a Qwen2 decoder layer without its attention, at `rows` rows at a time."""
    from transformers import Qwen2Config
    from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RotaryEmbedding

    config = Qwen2Config(
        hidden_size=shape.hidden, intermediate_size=shape.feed_forward, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, num_hidden_layers=1, vocab_size=8,
    )  # fmt: skip
    config._attn_implementation = "ramet-nothing"
    from transformers import AttentionInterface

    AttentionInterface.register("ramet-nothing", lambda module, q, k, v, mask, **kwargs: (q.transpose(1, 2), None))
    layer, rotary = Qwen2DecoderLayer(config, 0).eval(), Qwen2RotaryEmbedding(config)
    x = torch.randn(1, rows, shape.hidden)
    cos_sin = rotary(x, torch.arange(rows)[None])
    times = []
    with torch.no_grad():
        for _ in range(repeats + 1):
            started = time.perf_counter()
            layer(x, position_embeddings=cos_sin)
            times.append((time.perf_counter() - started) / rows)
    return statistics.median(times[1:])


def plan_of(name: str, length: int, hosts: int, query: int) -> tuple[Method, BlockPlan | ShardedPlan]:
    """A method at its published lengths."""
    method = Method(name)  # type: ignore[arg-type]
    return method, method.plan(length - query, query, hosts)


def _possible(name: str, hosts: int, shape: LayerShape) -> bool:
    return name != "ulysses" or shape.heads % hosts == 0


def critical_path(
    names: Sequence[str],
    hosts: Sequence[int],
    lengths: Sequence[int],
    query: int,
    bandwidth: float,
    repeats: int,
    shape: LayerShape,
) -> list[dict[str, Any]]:
    """Records of the busiest host's time on one core, attention alone and the whole layer, prefill and decode."""
    torch.set_num_threads(1)
    records: list[dict[str, Any]] = []
    for phase, per_row in (("prefill", linear_seconds(shape, 1024, repeats)), ("decode", linear_seconds(shape, 1, 20 * repeats))):
        for length in lengths:
            cases = [("dense", 1), *((name, h) for h in hosts for name in names if name != "dense" and h > 1 and _possible(name, h, shape))]
            dense: dict[str, float] = {}
            rate = 0.0
            for name, count in progress.each(cases, f"{phase}, {length:,} tokens"):
                method, plan = plan_of(name, length, count, query)
                rank = busiest(method, plan, shape)
                if phase == "prefill":
                    seconds, share = prefill_seconds(method, plan, rank, shape, repeats)
                    flops, rows, link = (
                        attention_flops(method, plan, rank, shape),
                        len(plan.rows(rank)),
                        received(method, plan, rank, shape),
                    )
                else:
                    seconds, share, rows = decode_seconds(plan, rank, shape, repeats), 1.0, 1
                    kept = sum(s.stop - s.start for s in (*plan.cached_rows(rank), plan.query_rows(rank)))
                    flops, link = 4.0 * shape.heads * shape.head * kept, 4.0 * (count - 1) * shape.heads * (shape.head + 1)
                rate = rate or flops / seconds
                for scope, extra in (("attention", 0.0), ("layer", rows * per_row)):
                    total = seconds + extra + link / bandwidth
                    dense.setdefault(scope, total)
                    predicted = flops / rate + extra + link / bandwidth
                    records.append(
                        {
                            "record": "attention", "measure": "critical_path", "phase": phase, "scope": scope, "method": name,
                            "hosts": count, "length": length, "seconds": total, "predicted_seconds": predicted,
                            "achieved": predicted / total, "speedup_vs_dense": dense[scope] / total,
                            "received_bytes": link, "timed_share": share,
                        }
                    )  # fmt: skip
    return records


def _wall_process(rank: int, folder: str, hosts: int, names: list[str], lengths: list[int], query: int, repeats: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=hosts, timeout=timedelta(hours=1))
    group: RankGroup = DistributedGroup()
    results: dict[tuple[str, int], list[float]] = {}
    for length in lengths:
        for _ in range(repeats):
            for name in ["dense", *names]:
                dist.barrier()
                if name == "dense":
                    if rank == 0:
                        torch.set_num_threads(hosts)
                        results.setdefault((name, length), []).append(_wall_once(SingleRank(), *plan_of("dense", length, 1, query)))
                        torch.set_num_threads(1)
                    dist.barrier()
                    continue
                method, plan = plan_of(name, length, hosts, query)
                results.setdefault((name, length), []).append(_wall_once(group, method, plan, dist.barrier))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@torch.no_grad()
def _wall_once(group: RankGroup, method: Method, plan: BlockPlan | ShardedPlan, barrier: Callable[[], Any] = lambda: None) -> float:
    q, k, v = local(QWEN_3B, len(plan.rows(group.rank)))
    barrier()
    started = time.perf_counter()
    method.attend(plan, group, q, k, v, QWEN_3B.head**-0.5)
    return time.perf_counter() - started


def wall(names: Sequence[str], hosts: int, lengths: Sequence[int], query: int, repeats: int) -> list[dict[str, Any]]:
    """Records of real processes: the slowest rank's time of one layer's attention, methods in turns, the median of `repeats`."""
    names = [name for name in names if name != "dense" and _possible(name, hosts, QWEN_3B)]
    with tempfile.TemporaryDirectory(prefix="ramet-wall-") as folder:
        spawn(_wall_process, (folder, hosts, names, list(lengths), query, repeats), hosts)
        ranks = [torch.load(f"{folder}/{rank}.pt") for rank in range(hosts)]
    records: list[dict[str, Any]] = []
    for length in lengths:
        dense = ranks[0]["dense", length]
        for name in ["dense", *names]:
            times = [max(turn) for turn in zip(*(r[name, length] for r in ranks if (name, length) in r), strict=True)]
            ratios = sorted(d / t for d, t in zip(dense, times, strict=True))
            records.append(
                {
                    "record": "attention", "measure": "wall", "phase": "prefill", "scope": "attention", "method": name,
                    "hosts": 1 if name == "dense" else hosts, "length": length, "seconds": statistics.median(times),
                    "speedup_vs_dense": statistics.median(ratios), "speedup_min": ratios[0], "speedup_max": ratios[-1],
                    "repeats": repeats,
                }
            )  # fmt: skip
    return records


@dataclass(frozen=True)
class TimingPlan:
    """What is measured.

    method         "all", or names with commas between them
    hosts, lengths  numbers of hosts and of tokens, for the critical path
    wall_lengths   numbers of tokens, for two real processes; empty: not measured
    query          rows of the question, of the tokens
    bandwidth      of the link between hosts, in GB/s
    """

    method: str
    hosts: Sequence[int]
    lengths: Sequence[int]
    wall_lengths: Sequence[int]
    query: int
    bandwidth: float
    repeats: int


def bench_attention(plan: TimingPlan, picture: Path | None, out: Path | None) -> None:
    """Measure the methods, print and write the records, and draw them."""
    names = list(NAMES) if plan.method == "all" else [name.strip() for name in plan.method.split(",")]
    for name in names:
        Method(name)  # type: ignore[arg-type]
    started = time.perf_counter()
    records = critical_path(names, plan.hosts, plan.lengths, plan.query, plan.bandwidth * 1e9, plan.repeats, QWEN_3B)
    threads = torch.get_num_threads()
    if plan.wall_lengths:
        records += wall(names, 2, plan.wall_lengths, plan.query, plan.repeats)
    torch.set_num_threads(threads)
    if out is not None:
        write_json(out, [meta("bench attention", 0, time.perf_counter() - started), *records])
    show_records(records)
    if picture is not None:
        plot(records, picture)
        logger.info(f"picture in {picture}")


def show_records(records: Sequence[dict[str, Any]]) -> None:
    """One table for each way of measuring and phase."""
    kinds = dict.fromkeys((r["measure"], r["phase"], r["scope"]) for r in records)
    for kind in kinds:
        rows = [r for r in records if (r["measure"], r["phase"], r["scope"]) == kind]
        table = Table(
            "tokens", "hosts", "method", "seconds", "times dense", "achieved / predicted", title=", ".join(kind).replace("_", " ")
        )
        for r in rows:
            spread = f" ({r['speedup_min']:.2f}-{r['speedup_max']:.2f})" if "speedup_min" in r else ""
            achieved = f"{r['achieved']:.2f}" if "achieved" in r else ""
            table.add_row(
                f"{r['length']:,}", str(r["hosts"]), r["method"], f"{r['seconds']:.4g}", f"{r['speedup_vs_dense']:.2f}{spread}", achieved
            )
        show(table)


def plot(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Times faster than dense on the critical path by hosts, measured and predicted, at the longest length."""
    from matplotlib.figure import Figure

    longest = max(r["length"] for r in records if r["measure"] == "critical_path")
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for index, scope in enumerate(("attention", "layer")):
        axes = figure.add_subplot(1, 2, index + 1)
        chosen = [r for r in records if (r["measure"], r["phase"], r["scope"], r["length"]) == ("critical_path", "prefill", scope, longest)]
        dense = next(r for r in chosen if r["method"] == "dense")
        for colour, name in enumerate(dict.fromkeys(r["method"] for r in chosen if r["method"] != "dense")):
            line = sorted(
                (r["hosts"], r["speedup_vs_dense"], dense["predicted_seconds"] / r["predicted_seconds"])
                for r in chosen
                if r["method"] == name
            )
            axes.plot([x for x, _, _ in line], [y for _, y, _ in line], "o-", color=f"C{colour}", label=name)
            axes.plot([x for x, _, _ in line], [y for _, _, y in line], ":", color=f"C{colour}")
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="hosts",
            ylabel="times faster than dense on one",
            title=f"{scope}, {longest:,} tokens, prefill",
        )
        ticks = sorted({r["hosts"] for r in chosen if r["hosts"] > 1})
        axes.set_xticks(ticks, [str(t) for t in ticks])
        axes.minorticks_off()
        axes.legend(title="dotted: predicted", fontsize=8)
        axes.grid(alpha=0.3)
    save(figure, path)
