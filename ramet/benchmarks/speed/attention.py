"""`ramet attention plan | check`: who attends to what, and whether a model on this machine comes out as with dense attention."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ramet.attention.comm import RankGroup, SingleRank, simulated
from ramet.attention.cost import pairs
from ramet.attention.hf import attach, extend, prefill
from ramet.attention.methods import Method
from ramet.attention.plan import BlockPlan, ShardedPlan
from ramet.display.plots import save
from ramet.errors import ConfigError, RametError
from ramet.policy.models.catalogue import resolve
from ramet.policy.models.load import load_model
from ramet.storage import meta, write_json
from ramet.terminal import Table, show

logger = logging.getLogger(__name__)

TOLERANCE = 1e-5
"""Of the largest logit: what float32 may differ when everything is passed on. In float64 most models' norms still round to float32."""
DTYPES = ("float32", "float64")
CELLS = 48
KINDS = ("·", "anchor", "passed on", "own rows", "all rows (query)")


def kinds(plan: BlockPlan | ShardedPlan, cells: int) -> list[list[int]]:
    """A coarse picture [cells][cells] of rows by keys: 0 nothing, else an index of `KINDS`; each cell by its middle row and key.

    What is passed on depends on the query, so a block from which anything is passed on is shown as such.
    """
    places = [plan.length * (2 * i + 1) // (2 * cells) for i in range(cells)]
    return [[_kind(plan, row, key) for key in places] for row in places]


def _kind(plan: BlockPlan | ShardedPlan, row: int, key: int) -> int:
    if key > row:
        return 0
    if isinstance(plan, ShardedPlan):
        return 3
    if row >= plan.context:
        return 4
    start, _ = next((block for block in plan.blocks if block[0] <= row < block[1]), (0, 0))
    if key < plan.anchor and not (plan.fresh_anchor and start == 0):
        return 1
    if key >= start:
        return 3
    return 2 if plan.passing else 0


def show_plan(method: Method, context: int, query: int, hosts: int, picture: Path | None, out: Path | None) -> None:
    """Print the plan of a method and draw it."""
    plan = method.plan(context, query, hosts)
    anchored = isinstance(plan, BlockPlan)
    lengths = f", anchor {plan.anchor:,}, passing {plan.passing:,} a block and KV head" if isinstance(plan, BlockPlan) else ""
    table = Table("rank", "blocks", "rows computed", "keys kept", *(["keys passed to it"] if anchored else []), "attention, share of dense")
    records: list[dict[str, Any]] = []
    for rank in range(hosts):
        blocks = [plan.blocks[v] for v in plan.owned(rank)] if isinstance(plan, BlockPlan) else plan.blocks(rank)
        kept = [*plan.cached_rows(rank), plan.query_rows(rank)]
        passed = sum(plan.kept(u) for v in plan.owned(rank) for u in plan.before(v)) if isinstance(plan, BlockPlan) else 0
        share = pairs(plan, rank) / (plan.length * (plan.length + 1) / 2)
        record = {
            "record": "plan", "method": method.name, "rank": rank, "hosts": hosts, "rows": len(plan.rows(rank)),
            "kept": sum(s.stop - s.start for s in kept), "passed": passed, "share_of_dense": share,
        }  # fmt: skip
        records.append(record)
        spans = "  ".join(f"{start:,}-{stop - 1:,}" if stop > start else "none" for start, stop in blocks)
        cells = [str(rank), spans, f"{record['rows']:,}", f"{record['kept']:,}", *([f"{passed:,}"] if anchored else []), f"{share:.4f}"]
        table.add_row(*cells)
    if out is not None:
        write_json(out, [meta("attention plan", 0), *records])
    show(f"{method.name}: {context:,} context and {query:,} query rows on {hosts} hosts{lengths}")
    show(table)
    for line in kinds(plan, CELLS):
        show("".join(" ░▒█▓"[kind] for kind in line))
    show("rows down, keys across: " + ("░ anchor  ▒ passed on  █ own rows  ▓ query on all rows" if anchored else "█ attended"))
    if picture is not None:
        draw(method, plan, picture)
        logger.info(f"picture in {picture}")


def draw(method: Method, plan: BlockPlan | ShardedPlan, path: Path) -> None:
    """Draw which rows attend to which."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    colours = ["#ffffff", "#f2b134", "#9ecae1", "#08519c", "#74c476"]
    figure = Figure(figsize=(6.5, 6.5), layout="constrained")
    axes = figure.add_subplot()
    cells = min(plan.length, 512)
    extent = (0.0, float(plan.length), float(plan.length), 0.0)
    axes.imshow(kinds(plan, cells), cmap=ListedColormap(colours), vmin=0, vmax=4, extent=extent, interpolation="nearest")
    if isinstance(plan, BlockPlan):
        for (start, stop), owner in zip(plan.blocks, plan.owners, strict=True):
            axes.axhline(start, color="#999999", linewidth=0.4)
            axes.text(plan.length * 1.01, (start + stop) / 2, f"rank {owner}", va="center", fontsize=8)
    names = [f"{name}" for name in KINDS[1:]] if isinstance(plan, BlockPlan) else []
    shown = list(zip(names, colours[1:], strict=False)) or [("attended", colours[3])]
    axes.legend(handles=[Patch(color=colour, label=name) for name, colour in shown], loc="upper right", fontsize=8)
    axes.set(xlabel="key row", ylabel="query row", title=f"{method.name}: who attends to what on {plan.hosts} hosts")
    save(figure, path)


@torch.no_grad()
def check(
    policy: str, methods: list[Method], hosts: int, context: int, query: int, seed: int, out: Path | None, dtype: str = "float32"
) -> None:
    """Compare a model's logits with dense attention: everything passed on, and as configured. Ranks are simulated in one process.

    Raises `RametError` if passing everything on differs by more than `TOLERANCE` of the largest logit.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"no dtype {dtype!r} to check in; there are {' and '.join(DTYPES)}")
    model, _, _ = load_model(resolve(policy), dtype=getattr(torch, dtype))
    config = model.config.get_text_config()
    steps = 4
    if context + query + steps > config.max_position_embeddings:
        raise ConfigError(f"{context} context and {query} query rows exceed the model's {config.max_position_embeddings} positions")
    ids = torch.randint(0, config.vocab_size, (context + query + steps,), generator=torch.Generator().manual_seed(seed)).tolist()
    attach(model)
    dense = _logits(model, SingleRank(), Method("dense"), ids, query, steps)
    full = Method("spava", anchor=0, passing=context)
    exact = simulated(hosts, lambda group: _logits(model, group, full, ids, query, steps))
    scale = float(dense.abs().max())
    difference = max(float((logits - dense).abs().max()) for logits in exact)
    equal = all(torch.equal(logits, exact[0]) for logits in exact)
    show(f"{policy} on {hosts} hosts, {context:,} context and {query:,} query rows, {steps} decoded; {config.model_type}, {dtype}")
    ranks = "equal" if equal else "DIFFER"
    show(f"everything passed on: largest difference from dense {difference:.2e} (largest logit {scale:.1f}); ranks {ranks}")
    records: list[dict[str, Any]] = [
        {"record": "divergence", "method": "spava", "hosts": hosts, "context": context, "query": query, "anchor": 0, "passing": context,
         "difference": difference, "largest_logit": scale, "divergence": divergence(dense, exact[0]), "ranks_equal": equal}
    ]  # fmt: skip
    for method in methods:
        logits = simulated(hosts, lambda group, method=method: _logits(model, group, method, ids, query, steps))[0]  # type: ignore[misc]
        plan = method.plan(context, query, hosts)
        anchor, passing = (plan.anchor, plan.passing) if isinstance(plan, BlockPlan) else (0, 0)
        kl, largest = divergence(dense, logits), float((logits - dense).abs().max())
        lengths = f", anchor {anchor}, passing {passing}" if isinstance(plan, BlockPlan) else ""
        show(f"{method.name}{lengths}: KL divergence of the next token from dense {kl:.3g} nats, largest difference {largest:.2e}")
        records.append(
            {"record": "divergence", "method": method.name, "hosts": hosts, "context": context, "query": query, "anchor": anchor,
             "passing": passing, "difference": largest, "largest_logit": scale, "divergence": kl, "ranks_equal": True}
        )  # fmt: skip
    if out is not None:
        write_json(out, [meta("attention check", seed), *records])
    if not equal or difference > TOLERANCE * max(scale, 1.0):
        raise RametError("sequence-parallel attention does not agree with dense attention on this machine; please report this output")


def _logits(model: Any, group: RankGroup, method: Method, ids: list[int], query: int, steps: int) -> Tensor:
    """[1 + steps, vocabulary]: after the query, and after each of `steps` further tokens."""
    sequences, first = prefill(model, group, method, [ids[: len(ids) - steps]], [query])
    return torch.cat([first, *(extend(model, group, sequences, [[token]], method) for token in ids[len(ids) - steps :])])


def divergence(expected: Tensor, got: Tensor) -> float:
    """Mean Kullback-Leibler divergence of `got` from `expected` logits [rows, vocabulary], in nats."""
    p, q = expected.double().log_softmax(-1), got.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())
