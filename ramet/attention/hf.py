"""Sequence-parallel attention in Hugging Face decoders, through their attention registry: no model code is copied.

    attach(model)
    shards, logits = prefill(model, group, Method("spava"), [ids], query=[12])   # every rank calls it with the same arguments
    logits = extend(model, group, shards, [[next_id]])                           # [sequences, vocabulary], the same on all ranks

Sequences of different lengths are packed one after another, without padding. Positions are those of the whole sequence. Keys are rotated
before they are passed on, by the angles of the whole sequence where angles depend on its length (LongRoPE, Ding et al. 2024, arXiv
2402.13753). A model with sliding windows, attention sinks, soft caps, linear or latent attention, ALiBi or dynamic NTK positions is
refused by name. So is one that does not reproduce its own logits on two ranks when it is attached: a decoder that bypasses the registry
would attend to the rows of its own rank only. Exact methods can be trained through `local_logits`; approximate ones have no backward pass.
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
"""The name of this attention in transformers' registry."""


@dataclass
class ForwardPass:
    """One forward pass over packed sequences on one rank.

    plans       the layout of each sequence
    slices      this rank's rows of each sequence in the pass
    last        position of the last row of each sequence, whichever rank holds it
    cache       None where nothing is cached
    selections  receive the rows that are passed on, by sequence and layer
    heads       APB's retaining heads, which need `rotary`, the rotation's cos and sin [T, D], to undo it
    record      receives q, k and v of each layer
    layers      indices of the layers that have computed attention so far
    """

    group: RankGroup
    method: Method
    plans: list[BlockPlan | ShardedPlan]
    slices: list[slice]
    last: list[int]
    cache: ShardedCache | None
    selections: list[list[Selections]] | None = None
    heads: RetainingHeads | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    record: list[tuple[Tensor, Tensor, Tensor]] | None = None
    layers: list[int] = field(default_factory=list)


_PASS: ContextVar[ForwardPass | None] = ContextVar("attention_pass", default=None)


@contextmanager
def running(forward_pass: ForwardPass) -> Iterator[None]:
    """Let the model's attention use `forward_pass` inside the block, in this thread or task."""
    token = _PASS.set(forward_pass)
    try:
        yield
    finally:
        _PASS.reset(token)


def attach(model: Any) -> None:
    """Make a model's decoder use this attention; a vision encoder keeps its own. Does nothing if it already does.

    A few tokens are prefilled and decoded on two simulated ranks, and must give the logits that the model gave before. Raises
    `ConfigError`, and leaves the model as it was, if they do not or the model is not supported.
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
    except Exception as error:  # unsupported models fail in many ways
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
    """Eight ids of ordinary text, none of them special, such as the placeholder of an image."""
    declared = [value for config in configs for name, value in config.to_dict().items() if name.endswith("token_id")]
    special = {i for value in declared for i in (value if isinstance(value, list) else [value])}
    plain = [i for i in range(min(configs[0].vocab_size, 256)) if i not in special]
    return [plain[-1 - i % len(plain)] for i in range(8)]


def _probe(model: Any, ids: list[int], expected: Tensor) -> None:
    """Raise `ConfigError` unless ring attention on two ranks gives the `expected` logits [8, vocabulary] after the fifth and last row."""

    def rank(group: RankGroup) -> Tensor:
        sequences, read = prefill(model, group, Method("ring"), [ids[:5]], [1])
        return torch.cat([read, extend(model, group, sequences, [ids[5:]])]).float()

    expected = expected[[4, 7]]
    finite = bool(torch.isfinite(expected).all())  # with broken weights there is nothing to compare; the sampler reports them
    tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.25
    for logits in simulated(2, rank):
        difference = float((logits - expected).norm() / (expected - expected.mean(-1, keepdim=True)).norm().clamp_min(1e-30))
        if finite and not difference < tolerance and not torch.equal(logits, expected):
            raise ConfigError(f"on two ranks its logits deviate from its own by {difference:.1g} of their norm")


class _Rotary:
    """Replaces the forward method of a rotary embedding whose angles depend on the largest position in its input.

    Each sequence is embedded with the position of its last row appended, since this rank may hold only an earlier part of it.
    """

    def __init__(self, forward: Callable[..., tuple[Tensor, Tensor]]) -> None:
        self.forward = forward

    def __call__(self, x: Tensor, position_ids: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        state = _PASS.get()
        if state is None or not state.slices[-1].stop:
            return self.forward(x, position_ids, **kwargs)
        parts = [self._one(x, position_ids[..., rows], last, kwargs) for rows, last in zip(state.slices, state.last, strict=True)]
        cos, sin = (torch.cat(part, -2) for part in zip(*parts, strict=True))
        return cos, sin

    def _one(self, x: Tensor, positions: Tensor, last: int, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        cos, sin = self.forward(x, torch.cat([positions, positions.new_full((*positions.shape[:-1], 1), last)], -1), **kwargs)
        return cos[..., :-1, :], sin[..., :-1, :]


def _refuse(config: Any) -> None:
    """Raise `ConfigError` if the configuration names a kind of attention that is not supported."""
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    unsupported = [f"layers of type {', '.join(sorted(kinds))}"] if kinds else []
    unsupported += ["a sliding window"] if windowed and not kinds else []
    unsupported += ["attention soft caps"] if getattr(config, "attn_logit_softcapping", None) else []
    rope = getattr(config, "rope_parameters", None) or {}
    rope_types = {each.get("rope_type") for each in (rope, *rope.values()) if isinstance(each, dict)}
    # Each new token would change the angles of all earlier ones, whose keys are cached after rotation.
    unsupported += ["dynamic NTK positions"] if "dynamic" in rope_types else []
    unsupported += ["latent attention"] if getattr(config, "kv_lora_rank", None) else []
    unsupported += ["ALiBi"] if getattr(config, "alibi", False) else []
    if unsupported:
        raise ConfigError(f"sequence-parallel attention does not support {' and '.join(unsupported)} (model type {config.model_type})")


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The registered attention function: query [1, Hq, T, D], key and value [1, Hk, T, D] of a rank's packed rows, to [1, T, Hq, D].

    Raises `ConfigError` outside of a forward pass of this module, for options that are not supported, for approximate methods in training
    mode, and for a layer that attends to other keys and values than it caches.
    """
    state = _PASS.get()
    if state is None:
        raise ConfigError('this model uses the attention "ramet": call it through ramet.attention.hf, or set another implementation')
    for name, feature in (("s_aux", "attention sinks"), ("softcap", "attention soft caps"), ("sliding_window", "a sliding window")):
        if kwargs.get(name) is not None:
            raise ConfigError(f"sequence-parallel attention does not support {feature}")
    if module.training and not state.method.exact:
        raise ConfigError(f"{state.method.name} has no backward pass; train with ring, zigzag or ulysses, or call model.eval()")
    if state.cache is not None and not state.cache.layers[module.layer_idx].returned(key, value):
        raise ConfigError(f"layer {module.layer_idx} attends to other keys and values than it caches")
    state.layers.append(module.layer_idx)
    scale = module.head_dim**-0.5 if scaling is None else scaling
    q, k, v = query[0], key[0], value[0]
    if state.cache is None or state.cache.filling:
        out = torch.cat([_prefill_one(state, i, module.layer_idx, q, k, v, scale) for i in range(len(state.plans))], 1)
    else:
        out = _extend_all(state, module.layer_idx, q, scale)
    idle = out.new_zeros(out.shape[0], q.shape[1] - out.shape[1], out.shape[2])  # see `_inputs`
    return torch.cat([out, idle], 1).transpose(0, 1)[None], None


def _prefill_one(state: ForwardPass, index: int, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention output [Hq, T, D] of one sequence's local rows in a prefill."""
    where = state.slices[index]
    if state.record is not None:
        state.record.append((q[:, where], k[:, where], v[:, where]))
    scores = None
    if state.heads is not None and state.rotary is not None:
        cos, sin = (x[where] for x in state.rotary)
        plain_q, plain_k = (unrotated(x[:, where], cos, sin) for x in (q, k))
        scores = state.heads.scores(layer, plain_q, plain_k, v[:, where])
    selections = state.selections[index][layer] if state.selections is not None else None
    return state.method.attend(state.plans[index], state.group, q[:, where], k[:, where], v[:, where], scale, scores, selections)


def _extend_all(state: ForwardPass, layer: int, q: Tensor, scale: float) -> Tensor:
    """Attention output [Hq, T, D] of new rows: exactly, over all rows cached on any rank, and over themselves causally."""
    assert state.cache is not None
    parts = []
    for sequence, where in zip(state.cache.sequences, state.slices, strict=True):
        cached, backend = sequence.layers[layer], state.method.backend
        part = [attend(q[:, where], cached.keys, cached.values, scale, backend=backend)]
        if state.group.rank == sequence.plan.query_owner:
            part.append(attend(q[:, where], *cached.tail, scale, True, backend))
        parts.append(merge(part))
    return gather_partial(state.group, type(parts[0])(torch.cat([p.out for p in parts], 1), torch.cat([p.lse for p in parts], 1)))()


def _inputs(model: Any, name: str, rows: Tensor, positions: Tensor) -> dict[str, Any]:
    """A rank's packed rows as inputs of the model, under `name`. A rank without rows runs a dummy row: models do not take empty inputs."""
    if not len(rows):
        rows, positions = rows.new_zeros(1, *rows.shape[1:]), positions.new_zeros(*positions.shape[:-1], 1)
    return {name: rows[None].to(model.device), "position_ids": positions.to(model.device)}


def _forward(model: Any, state: ForwardPass, **inputs: Any) -> Tensor:
    """Logits [rows, vocabulary]. Raises `ConfigError` unless every layer computed its attention through `_attention`, once and in order."""
    with running(state):
        logits: Tensor = model(**inputs).logits[0]
    if state.layers != list(range(model.config.get_text_config().num_hidden_layers)):
        raise ConfigError("its layers do not each call the attention function of transformers' registry exactly once")
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
    selections: list[list[Selections]] | None = None,
    heads: RetainingHeads | None = None,
) -> tuple[list[SequenceShard], Tensor]:
    """Prefill sequences on all ranks. Returns this rank's share of each, and logits [sequences, vocabulary] after each one's last row.

    ids         token ids of each sequence
    query       number of last rows of each sequence that are the question, at least 1
    embeds      embeddings [T, d] of each sequence, in place of those of the ids (video)
    positions   positions [N] of each sequence or, for M-RoPE, [axes, N]; 0, 1, ... by default
    selections  receive the rows that were passed on, by sequence and layer
    heads       retaining heads that select the rows passed on, in place of the query (APB)

    Every rank calls it with the same arguments. The logits are the same on all ranks. Raises `ConfigError` where model and method do not
    fit together.
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
    name, whole = ("input_ids", [torch.tensor(i) for i in ids]) if embeds is None else ("inputs_embeds", embeds)
    local = torch.cat([x[r] for x, r in zip(whole, rows, strict=True)])
    inputs = _inputs(model, name, local, _positions(plans, group.rank, rows, positions))
    ends = [max(s.stop - 1, 0) for s in slices]
    last = [s.next_position - 1 for s in sequences]
    state = ForwardPass(group, method, plans, slices, last, cache, selections, heads)
    if heads is not None:
        with running(state):
            state.rotary = _rotary(model, inputs["position_ids"])
    inputs |= {"past_key_values": cache, "use_cache": True, "logits_to_keep": torch.tensor(ends, device=model.device)}
    logits = _forward(model, state, **inputs)
    gathered = group.gather(logits).wait()
    owners = torch.tensor([plan.query_owner for plan in plans])
    return sequences, gathered[owners, torch.arange(len(plans))]


@torch.no_grad()
def extend(model: Any, group: RankGroup, sequences: list[SequenceShard], ids: list[list[int]], method: Method | None = None) -> Tensor:
    """Append tokens to sequences, at least one each. Returns logits [sequences, vocabulary] after the last, the same on all ranks.

    sequences  shards that `prefill` returned, which are changed
    ids        new token ids of each
    method     only its backend matters here: attention over the cached rows is exact whatever the method
    """
    method = method or Method()
    slices = _slices([len(i) for i in ids])
    cache = ShardedCache(sequences, slices, group.rank, len(sequences[0].layers), filling=False)
    positions = torch.cat([torch.arange(s.next_position, s.next_position + len(i)) for s, i in zip(sequences, ids, strict=True)])
    inputs = _inputs(model, "input_ids", torch.tensor([token for i in ids for token in i]), positions[None])
    last = torch.tensor([s.stop - 1 for s in slices], device=model.device)
    ends = [s.next_position + len(i) - 1 for s, i in zip(sequences, ids, strict=True)]
    state = ForwardPass(group, method, [s.plan for s in sequences], slices, ends, cache)
    logits = _forward(model, state, **inputs, past_key_values=cache, use_cache=True, logits_to_keep=last)
    for sequence, new in zip(sequences, ids, strict=True):
        sequence.length += len(new)
        sequence.next_position += len(new)
    return logits


@torch.no_grad()
def recorded(model: Any, ids: list[int]) -> tuple[list[tuple[Tensor, Tensor, Tensor]], tuple[Tensor, Tensor]]:
    """The q [Hq, T, D], k and v [Hk, T, D] of each layer for one text, and the rotation's cos and sin [T, D].

    q and k are rotated. The text is read on this rank alone, with dense attention.
    """
    record: list[tuple[Tensor, Tensor, Tensor]] = []
    plan = Method("dense").plan(len(ids), 0, 1)
    positions = torch.arange(len(ids), device=model.device)[None]
    state = ForwardPass(SingleRank(), Method("dense"), [plan], [slice(0, len(ids))], [len(ids) - 1], None, record=record)
    _forward(model, state, input_ids=torch.tensor([ids], device=model.device), position_ids=positions, use_cache=False, logits_to_keep=1)
    with running(state):
        return record, _rotary(model, positions)


def _rotary(model: Any, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The rotation's cos and sin [T, D] at positions [1, T]. Raises `ConfigError` for M-RoPE."""
    if positions.dim() == 3:
        raise ConfigError("retaining heads support one-dimensional positions only; use spava for video")
    cos, sin = model.get_decoder().rotary_emb(torch.zeros(1, dtype=torch.float32, device=model.device), positions)
    return cos[0], sin[0]


def local_logits(model: Any, group: RankGroup, method: Method, ids: list[int]) -> Tensor:
    """Logits [T, vocabulary] of this rank's rows of one sequence, with gradients for exact methods; nothing is cached.

    The rows are those of `method.plan(len(ids) - 1, 1, group.size).rows(group.rank)`.
    """
    plan = method.plan(len(ids) - 1, 1, group.size)
    rows = torch.tensor(plan.rows(group.rank), dtype=torch.long)
    inputs = _inputs(model, "input_ids", torch.tensor(ids)[rows], _positions([plan], group.rank, [rows], None))
    state = ForwardPass(group, method, [plan], [slice(0, len(rows))], [len(ids) - 1], None)
    return _forward(model, state, **inputs, use_cache=False)[: len(rows)]


def _slices(sizes: list[int]) -> list[slice]:
    """Consecutive slices of the given sizes, from 0."""
    ends = list(accumulate(sizes, initial=0))
    return [slice(a, b) for a, b in pairwise(ends)]


def _positions(plans: list[BlockPlan | ShardedPlan], rank: int, rows: list[Tensor], positions: list[Tensor] | None) -> Tensor:
    """Positions of a rank's packed rows: [1, T], or [axes, 1, T] for M-RoPE. Raises `ConfigError` for positions of one's own with APB."""
    if positions is None:
        return torch.cat([torch.tensor(plan.positions(rank), dtype=torch.long) for plan in plans])[None]
    if any(isinstance(plan, BlockPlan) and plan.fresh_anchor for plan in plans):
        raise ConfigError("apb numbers its anchors from 0 and does not support given positions; use spava for video")
    local = torch.cat([p[..., r] for p, r in zip(positions, rows, strict=True)], -1)
    return local[None] if local.dim() == 1 else local[:, None]
