"""Sequence-parallel attention in Hugging Face decoders, through their attention registry: no model code is copied.

    attach(model)
    state = prefill(model, group, Method("spava"), [ids], query=[12])      # every rank calls it with the same arguments
    logits = extend(model, group, state, [[next_id]])                      # [sequences, vocabulary], the same on all ranks

Several sequences of different lengths are packed one after another, so nothing is padded. Positions are those of the
whole sequence; keys are rotated before they are passed on, by angles that belong to the whole sequence's length where they
depend on one (longrope). A model with sliding windows, attention sinks, soft caps, linear or latent attention or dynamic NTK
positions is refused by name, and so is one that does not come to its own logits on two ranks when it is attached: a decoder that does not
ask the registry would attend to its rank's rows alone. Exact methods can be trained through `local_logits`; approximate ones
refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from ramet.attention.anchored import Selections, gather_partial
from ramet.attention.cache import SequenceShard, ShardedCache
from ramet.attention.comm import RankGroup, SingleRank, simulated
from ramet.attention.kernels import attend
from ramet.attention.merge import merge
from ramet.attention.methods import Method
from ramet.attention.plan import BlockPlan, ShardedPlan
from ramet.attention.retaining import RetainingHeads, unrotated
from ramet.errors import ConfigError, first_line
from ramet.terminal import quiet

NAME = "ramet"


@dataclass
class ForwardPass:
    """One forward pass on one rank: whose rows are where, and what attends to what.

    last    position of each whole sequence's last row, on whichever rank it is
    layers  those that have attended
    """

    group: RankGroup
    method: Method
    plans: list[BlockPlan | ShardedPlan]
    slices: list[slice]
    last: list[int]
    cache: ShardedCache | None
    seen: list[list[Selections]] | None = None
    heads: RetainingHeads | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    record: list[tuple[Tensor, Tensor, Tensor]] | None = None
    layers: list[int] = field(default_factory=list)


_PASS: ContextVar[ForwardPass | None] = ContextVar("attention_pass", default=None)


@contextmanager
def running(this: ForwardPass) -> Iterator[None]:
    token = _PASS.set(this)
    try:
        yield
    finally:
        _PASS.reset(token)


def attach(model: Any) -> None:
    """Give the model's decoder this attention; a vision tower keeps its own. Raises `ConfigError` for what is not supported.

    A few tokens are read and decoded on two simulated ranks and must give what the model gave before.
    """
    config = model.config.get_text_config()
    _refuse(config)
    before = config._attn_implementation
    if before == NAME:
        return
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        ids = _plain_ids(config, model.config)
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0].float()
        _implement(model, NAME)
        for module in model.get_decoder().modules():
            if getattr(module, "rope_type", None) == "longrope" and not isinstance(module.forward, _Rotary):
                module.forward = _Rotary(module.forward)
        _probe(model, ids, expected)
    except Exception as error:  # models fail in their own ways where they do not fit
        _implement(model, before)
        raise ConfigError(f"sequence-parallel attention does not support {config.model_type}: {first_line(error)}") from error
    finally:
        for module in training:
            module.training = True


def _implement(model: Any, name: str) -> None:
    nested = model.config.get_text_config() is not model.config
    with quiet():
        model.set_attn_implementation({"text_config": name} if nested else name)


def _plain_ids(*configs: Any) -> list[int]:
    """Eight ids that stand for text: none has a meaning of its own, as that of a picture has."""
    said = [value for config in configs for name, value in config.to_dict().items() if name.endswith("token_id")]
    special = {i for value in said for i in (value if isinstance(value, list) else [value])}
    plain = [i for i in range(min(configs[0].vocab_size, 256)) if i not in special]
    return [plain[-1 - i % len(plain)] for i in range(8)]


def _probe(model: Any, ids: list[int], expected: Tensor) -> None:
    """Raise `ConfigError` unless two ranks, by a ring, come to the expected logits after the fifth and the last of eight rows."""

    def rank(group: RankGroup) -> Tensor:
        sequences, read = prefill(model, group, Method("ring"), [ids[:5]], [1])
        return torch.cat([read, extend(model, group, sequences, [ids[5:]])]).float()

    expected = expected[[4, 7]]
    finite = bool(torch.isfinite(expected).all())  # broken weights come to nothing in any way of attending; whoever samples says so
    rounding = 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.25
    for logits in simulated(2, rank):
        off = float((logits - expected).norm() / (expected - expected.mean(-1, keepdim=True)).norm().clamp_min(1e-30))
        if finite and not off < rounding and not torch.equal(logits, expected):
            raise ConfigError(f"on two ranks its logits differ from its own by {off:.1g} of their size")


class _Rotary:
    """The forward method of a rotary embedding whose angles depend on the longest position that it is shown: it is shown that of
    each whole sequence, of which a rank may hold another part."""

    def __init__(self, forward: Callable[..., tuple[Tensor, Tensor]]) -> None:
        self.forward = forward

    def __call__(self, x: Tensor, position_ids: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        this = _PASS.get()
        if this is None or not this.slices[-1].stop:
            return self.forward(x, position_ids, **kwargs)
        parts = [self._one(x, position_ids[..., rows], last, kwargs) for rows, last in zip(this.slices, this.last, strict=True)]
        cos, sin = (torch.cat(part, -2) for part in zip(*parts, strict=True))
        return cos, sin

    def _one(self, x: Tensor, positions: Tensor, last: int, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        cos, sin = self.forward(x, torch.cat([positions, positions.new_full((*positions.shape[:-1], 1), last)], -1), **kwargs)
        return cos[..., :-1, :], sin[..., :-1, :]


def _refuse(config: Any) -> None:
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    found = [f"layers of kind {', '.join(sorted(kinds))}"] if kinds else []
    found += ["a sliding window"] if windowed and not kinds else []
    found += ["attention soft caps"] if getattr(config, "attn_logit_softcapping", None) else []
    rope = getattr(config, "rope_parameters", None) or {}
    turned = {each.get("rope_type") for each in (rope, *rope.values()) if isinstance(each, dict)}
    # Every token would change the angles of all before it, whose keys are held as they were turned.
    found += ["dynamic NTK positions"] if "dynamic" in turned else []
    found += ["latent attention"] if getattr(config, "kv_lora_rank", None) else []
    found += ["ALiBi"] if getattr(config, "alibi", False) else []
    if found:
        raise ConfigError(f"sequence-parallel attention does not support {' and '.join(found)} (model type {config.model_type})")


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """What the registry calls: query (1, Hq, T, D), key and value (1, Hk, T, D) of a rank's packed rows."""
    this = _PASS.get()
    if this is None:
        raise ConfigError('this model has the attention "ramet": call it through ramet.attention.hf, or set another implementation')
    for name, what in (("s_aux", "attention sinks"), ("softcap", "attention soft caps"), ("sliding_window", "a sliding window")):
        if kwargs.get(name) is not None:
            raise ConfigError(f"sequence-parallel attention does not support {what}")
    if module.training and not this.method.exact:
        raise ConfigError(f"{this.method.name} has no backward pass; train with ring, zigzag or ulysses, or call model.eval()")
    if this.cache is not None and not this.cache.layers[module.layer_idx].gave(key, value):
        raise ConfigError(f"layer {module.layer_idx} attends to other keys and values than it caches")
    this.layers.append(module.layer_idx)
    scale = module.head_dim**-0.5 if scaling is None else scaling
    q, k, v = query[0], key[0], value[0]
    if this.cache is None or this.cache.filling:
        out = torch.cat([_prefill_one(this, i, module.layer_idx, q, k, v, scale) for i in range(len(this.plans))], 1)
    else:
        out = _extend_all(this, module.layer_idx, q, scale)
    idle = out.new_zeros(out.shape[0], q.shape[1] - out.shape[1], out.shape[2])  # see `_inputs`
    return torch.cat([out, idle], 1).transpose(0, 1)[None], None


def _prefill_one(this: ForwardPass, index: int, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    where = this.slices[index]
    if this.record is not None:
        this.record.append((q[:, where], k[:, where], v[:, where]))
    scores = None
    if this.heads is not None and this.rotary is not None:
        cos, sin = (x[where] for x in this.rotary)
        plain_q, plain_k = (unrotated(x[:, where], cos, sin) for x in (q, k))
        scores = this.heads.scores(layer, plain_q, plain_k, v[:, where])
    seen = this.seen[index][layer] if this.seen is not None else None
    return this.method.attend(this.plans[index], this.group, q[:, where], k[:, where], v[:, where], scale, scores, seen)


def _extend_all(this: ForwardPass, layer: int, q: Tensor, scale: float) -> Tensor:
    """New rows on all that came before, wherever it lies, and on themselves causally: exact over what is cached."""
    assert this.cache is not None
    parts = []
    for sequence, where in zip(this.cache.sequences, this.slices, strict=True):
        kept, backend = sequence.layers[layer], this.method.backend
        part = [attend(q[:, where], kept.keys, kept.values, scale, backend=backend)]
        if this.group.rank == sequence.plan.query_owner:
            part.append(attend(q[:, where], *kept.tail, scale, True, backend))
        parts.append(merge(part))
    return gather_partial(this.group, type(parts[0])(torch.cat([p.out for p in parts], 1), torch.cat([p.lse for p in parts], 1)))()


def _inputs(model: Any, name: str, rows: Tensor, positions: Tensor) -> dict[str, Any]:
    """A rank's packed rows as the model takes them. A rank without any runs one row that is no sequence's: models take none less."""
    if not len(rows):
        rows, positions = rows.new_zeros(1, *rows.shape[1:]), positions.new_zeros(*positions.shape[:-1], 1)
    return {name: rows[None].to(model.device), "position_ids": positions.to(model.device)}


def _forward(model: Any, this: ForwardPass, **inputs: Any) -> Tensor:
    """Logits [rows, vocabulary]. Raises `ConfigError` where a layer has not attended through `_attention`, once."""
    with running(this):
        logits: Tensor = model(**inputs).logits[0]
    if this.layers != list(range(model.config.get_text_config().num_hidden_layers)):
        raise ConfigError("its layers do not use transformers' attention registry as they should, once each")
    return logits


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)


@torch.no_grad()
def prefill(
    model: Any,
    group: RankGroup,
    method: Method,
    ids: list[list[int]],
    query: list[int],
    embeds: list[Tensor] | None = None,
    positions: list[Tensor] | None = None,
    seen: list[list[Selections]] | None = None,
    heads: RetainingHeads | None = None,
) -> tuple[list[SequenceShard], Tensor]:
    """Read sequences in parallel. Returns this rank's share of each, and logits [sequences, vocabulary] after the last row.

    ids        each sequence's token ids
    query      how many of its last rows are the question; at least 1 and at most all
    embeds     rows [T, d] instead of the ids' embeddings (video)
    positions  [N] or, for M-RoPE, [axes, N] instead of 0, 1, ...
    seen       filled with what was passed on, per sequence and layer
    heads      say what is passed on instead of the query (APB)
    """
    plans = [method.plan(len(i) - q, q, group.size) for i, q in zip(ids, query, strict=True)]
    rows = [torch.tensor(plan.rows(group.rank), dtype=torch.long) for plan in plans]
    slices = _slices([len(r) for r in rows])
    if positions is None:
        sequences = [SequenceShard(plan, len(i), len(i)) for plan, i in zip(plans, ids, strict=True)]
    else:
        after = [p.reshape(-1, p.shape[-1]).amax(0).cummax(0).values + 1 for p in positions]
        sequences = [SequenceShard(plan, len(a), int(a[-1]), after=a) for plan, a in zip(plans, after, strict=True)]
    cache = ShardedCache(sequences, slices, group.rank, model.config.get_text_config().num_hidden_layers, filling=True)
    name, given = ("input_ids", [torch.tensor(i) for i in ids]) if embeds is None else ("inputs_embeds", embeds)
    own = torch.cat([x[r] for x, r in zip(given, rows, strict=True)])
    inputs = _inputs(model, name, own, _positions(plans, group.rank, rows, positions))
    ends = [max(s.stop - 1, 0) for s in slices]
    last = [s.next_position - 1 for s in sequences]
    this = ForwardPass(group, method, plans, slices, last, cache, seen, heads)
    if heads is not None:
        with running(this):
            this.rotary = _rotary(model, inputs["position_ids"])
    inputs |= {"past_key_values": cache, "use_cache": True, "logits_to_keep": torch.tensor(ends, device=model.device)}
    logits = _forward(model, this, **inputs)
    gathered = group.gather(logits).wait()
    owners = torch.tensor([plan.query_owner for plan in plans])
    return sequences, gathered[owners, torch.arange(len(plans))]


@torch.no_grad()
def extend(model: Any, group: RankGroup, sequences: list[SequenceShard], ids: list[list[int]], method: Method | None = None) -> Tensor:
    """Add rows to sequences, at least one each. Returns logits [sequences, vocabulary] after the last; equal on all ranks."""
    method = method or Method()
    slices = _slices([len(i) for i in ids])
    cache = ShardedCache(sequences, slices, group.rank, len(sequences[0].layers), filling=False)
    positions = torch.cat([torch.arange(s.next_position, s.next_position + len(i)) for s, i in zip(sequences, ids, strict=True)])
    inputs = _inputs(model, "input_ids", torch.tensor([token for i in ids for token in i]), positions[None])
    last = torch.tensor([s.stop - 1 for s in slices], device=model.device)
    ends = [s.next_position + len(i) - 1 for s, i in zip(sequences, ids, strict=True)]
    this = ForwardPass(group, method, [s.plan for s in sequences], slices, ends, cache)
    logits = _forward(model, this, **inputs, past_key_values=cache, use_cache=True, logits_to_keep=last)
    for sequence, new in zip(sequences, ids, strict=True):
        sequence.length += len(new)
        sequence.next_position += len(new)
    return logits


@torch.no_grad()
def recorded(model: Any, ids: list[int]) -> tuple[list[tuple[Tensor, Tensor, Tensor]], tuple[Tensor, Tensor]]:
    """Each layer's rotated q, k and v of a text, read densely on this rank, and the rotation's cos and sin [T, D]."""
    record: list[tuple[Tensor, Tensor, Tensor]] = []
    plan = Method("dense").plan(len(ids), 0, 1)
    positions = torch.arange(len(ids), device=model.device)[None]
    this = ForwardPass(SingleRank(), Method("dense"), [plan], [slice(0, len(ids))], [len(ids) - 1], None, record=record)
    _forward(model, this, input_ids=torch.tensor([ids], device=model.device), position_ids=positions, use_cache=False, logits_to_keep=1)
    with running(this):
        return record, _rotary(model, positions)


def _rotary(model: Any, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [T, D] of positions (1, T)."""
    if positions.dim() == 3:
        raise ConfigError("retaining heads undo a rotation in one dimension; use spava for video")
    cos, sin = model.get_decoder().rotary_emb(torch.zeros(1, dtype=torch.float32, device=model.device), positions)
    return cos[0], sin[0]


def local_logits(model: Any, group: RankGroup, method: Method, ids: list[int]) -> Tensor:
    """Logits [T, vocabulary] of the rows `method.plan(len(ids) - 1, 1, ranks).rows(rank)`, with gradients for exact methods."""
    plan = method.plan(len(ids) - 1, 1, group.size)
    rows = torch.tensor(plan.rows(group.rank), dtype=torch.long)
    inputs = _inputs(model, "input_ids", torch.tensor(ids)[rows], _positions([plan], group.rank, [rows], None))
    this = ForwardPass(group, method, [plan], [slice(0, len(rows))], [len(ids) - 1], None)
    return _forward(model, this, **inputs, use_cache=False)[: len(rows)]


def _slices(sizes: list[int]) -> list[slice]:
    ends = list(accumulate(sizes, initial=0))
    return [slice(a, b) for a, b in pairwise(ends)]


def _positions(plans: list[BlockPlan | ShardedPlan], rank: int, rows: list[Tensor], positions: list[Tensor] | None) -> Tensor:
    """(1, T), or (axes, 1, T) for M-RoPE."""
    if positions is None:
        return torch.cat([torch.tensor(plan.positions(rank), dtype=torch.long) for plan in plans])[None]
    if any(isinstance(plan, BlockPlan) and plan.fresh_anchor for plan in plans):
        raise ConfigError("apb numbers its anchors from 0 and takes no positions of its own; use spava for video")
    local = torch.cat([p[..., r] for p, r in zip(positions, rows, strict=True)], -1)
    return local[None] if local.dim() == 1 else local[:, None]
