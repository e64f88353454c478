"""Sharing a vision encoder among ranks: each encodes a contiguous range of frames, and all receive all features.

This is the frame parallelism of Spava (Huang et al. 2026, arXiv 2601.21444). It is exact for Qwen2.5-VL, whose encoder attends only within
one temporal step (two frames). Ranges may differ in length, and there may be more ranks than steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ramet.attention.cache import SequenceShard
from ramet.attention.comm import RankGroup
from ramet.attention.hf import prefill
from ramet.attention.methods import Method
from ramet.attention.plan import balanced
from ramet.attention.positions import VideoPatches, layout


@torch.no_grad()
def encode(tower: Any, group: RankGroup, videos: list[VideoPatches]) -> list[Tensor]:
    """Features [t h w / merge^2, d] of each video, the same on every rank. Each rank runs the encoder on its own temporal steps.

    tower   the model's vision encoder, with the interface of Qwen2.5-VL's
    videos  the same on every rank, in the order of the prompt
    """
    steps = [(index, step) for index, video in enumerate(videos) for step in range(video.grid[0])]
    shares = balanced(0, len(steps), group.size)
    start, stop = shares[group.rank]
    rows, grids = [], []
    for index, video in enumerate(videos):
        own = [step for i, step in steps[start:stop] if i == index]
        if own:
            per_step = video.grid[1] * video.grid[2]
            rows.append(video.rows[own[0] * per_step : (own[-1] + 1) * per_step])
            grids.append([len(own), *video.grid[1:]])
    merged = [video.grid[1] * video.grid[2] // tower.spatial_merge_size**2 for video in videos]
    sizes = [sum(merged[i] for i, _ in steps[a:b]) for a, b in shares]
    features = torch.zeros(max(sizes), tower.config.out_hidden_size, dtype=tower.dtype, device=tower.device)
    if rows:
        grid = torch.tensor(grids, device=tower.device)
        out = tower(torch.cat(rows).to(tower.device, tower.dtype), grid_thw=grid).pooler_output
        features[: len(out)] = out
    gathered = group.gather(features).wait()
    whole = torch.cat([gathered[rank, :size] for rank, size in enumerate(sizes)])
    return list(whole.split([size * video.grid[0] for size, video in zip(merged, videos, strict=True)]))


@torch.no_grad()
def prefill_video(
    model: Any, group: RankGroup, method: Method, ids: list[int], query: int, videos: list[VideoPatches]
) -> tuple[SequenceShard, Tensor]:
    """Prefill a prompt with videos on all ranks. Returns this rank's share of the sequence, and logits [1, vocabulary] after the last row.

    ids    token ids, with one video token for each feature; further video tokens count as text (see `positions`)
    query  number of last rows that are the question

    Continue with `hf.extend`: what follows the prompt is text. Raises `ConfigError` where the ids do not fit the videos.
    """
    if not videos:
        (sequence,), logits = prefill(model, group, method, [ids], [query])
        return sequence, logits
    laid = layout(model.config, ids, videos)
    features = torch.cat(encode(model.model.visual, group, videos))
    embeds = model.get_input_embeddings()(torch.tensor(ids, device=model.device))
    embeds[laid.places.to(model.device)] = features.to(embeds.dtype)
    (sequence,), logits = prefill(model, group, method, [ids], [query], [embeds], [laid.positions])
    return sequence, logits
