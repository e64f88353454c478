"""Video in a prompt: the placeholder ids of a segment, the patches for the vision tower, and the policy that samples with them.

    reader = VideoReader(model.config, tokenizer, VideoSettings(max_frames=8))
    encoded = reader(Segment("clip.mp4"))     # encoded.ids go into the prompt, encoded.video to the model

For Qwen2-VL, Qwen2.5-VL and Qwen3-VL, whose layouts of a video in a prompt differ.
"""

from __future__ import annotations

import random
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ramet.agents.encoding import TextEncoder
from ramet.agents.sampling import Partial, SampleRequest
from ramet.agents.tree import Segment
from ramet.attention.positions import Layout, VideoPatches, layout
from ramet.errors import CheckpointError, ConfigError, PolicyError, TaskError
from ramet.media.frames import DEVIATION, MEAN, Fit, Frames, content_id, fitted, patches, read_frames
from ramet.policy.engines.hf import HFPolicy
from ramet.policy.engines.sampler import RequestState
from ramet.policy.models.load import Inputs

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""The `model_type` of the supported models."""


@dataclass(frozen=True)
class VideoSettings:
    """How the frames of a segment are sampled for a model.

    max_frames  the most frames of a segment
    fps         frames a second; None: `max_frames` whatever the length
    min_pixels  of a frame; smaller ones are enlarged
    max_pixels  of a frame; larger ones are reduced
    order       of the frames; orders other than "filmed" test whether a model uses it
    """

    max_frames: int = 16
    fps: float | None = None
    min_pixels: int = 56 * 56
    max_pixels: int = 128 * 28 * 28
    order: Literal["filmed", "reversed", "shuffled"] = "filmed"

    def read(self, segment: Segment, fit: Fit | None = None) -> Frames:
        """The segment's frames, each resized by `fit` as it is read. Raises `TaskError` for what cannot be read."""
        frames = read_frames(Path(segment.file), self.max_frames, segment.start, segment.end, fps=self.fps, fit=fit)
        order = list(range(len(frames.times)))
        if self.order == "reversed":
            order.reverse()
        elif self.order == "shuffled":
            random.Random(f"{Path(segment.file).name}/{segment.start}").shuffle(order)
        return replace(frames, pixels=frames.pixels[order])


@dataclass(frozen=True)
class EncodedSegment:
    """A segment as input of a model: its ids in a prompt, and the patches and grid for the vision tower."""

    ids: tuple[int, ...]
    video: VideoPatches


SegmentId = tuple[str, float, float | None]
"""(hash of the file, start, end), the times in seconds."""


def segment_id(segment: Segment) -> SegmentId:
    """An id that is equal for equal segments: of the file's bytes, and the part of it."""
    return content_id(Path(segment.file)), segment.start, segment.end


class VideoReader:
    """Encodes segments for one model. Thread-safe; a segment is read once, and the last ones are kept, up to `memory` bytes.

    Raises `CheckpointError` for an unsupported model.
    """

    def __init__(self, config: Any, tokenizer: Any, settings: VideoSettings, memory: int = 2**28):
        if getattr(config, "model_type", "") not in FAMILIES:
            kind = getattr(config, "model_type", "?")
            raise CheckpointError(f"video is not supported for models of type {kind!r}; it is for {', '.join(FAMILIES)}")
        self.settings = settings
        self._config, self._vision = config, config.vision_config
        self._encode = TextEncoder(tokenizer)
        self._memory, self._held = memory, 0
        self._cache: OrderedDict[SegmentId, EncodedSegment] = OrderedDict()
        self._lock = threading.Lock()
        self._turns: dict[SegmentId, threading.Lock] = {}

    def ids(self, segment: Segment) -> tuple[int, ...]:
        """The ids of a segment in a prompt. Raises `TaskError` for one that cannot be read."""
        return self(segment).ids

    def __call__(self, segment: Segment) -> EncodedSegment:
        """The encoded segment. Raises `TaskError` if it cannot be read."""
        key = segment_id(segment)
        with self._lock:
            turn = self._turns.setdefault(key, threading.Lock())
        with turn:  # a second thread finds what the first has read
            with self._lock:
                encoded = self._cache.get(key)
            try:
                encoded = encoded or self._read(segment)
            finally:
                with self._lock:
                    self._turns.pop(key, None)
                    if encoded is not None:
                        self._keep(key, encoded)
        return encoded

    def _keep(self, key: SegmentId, encoded: EncodedSegment) -> None:
        if key not in self._cache:
            self._cache[key] = encoded
            self._held += encoded.video.rows.nbytes
        self._cache.move_to_end(key)
        while self._held > self._memory and len(self._cache) > 1:
            self._held -= self._cache.popitem(last=False)[1].video.rows.nbytes

    def _read(self, segment: Segment) -> EncodedSegment:
        vision, config, settings = self._vision, self._config, self.settings
        factor = vision.patch_size * vision.spatial_merge_size
        frames = settings.read(segment, lambda height, width: fitted(height, width, factor, settings.min_pixels, settings.max_pixels))
        timestamps = config.model_type == "qwen3_vl"
        half = (0.5, 0.5, 0.5)
        rows, grid = patches(
            frames.pixels,
            patch=vision.patch_size,
            merge=vision.spatial_merge_size,
            temporal=vision.temporal_patch_size,
            min_pixels=1,  # frames have the right size already
            max_pixels=frames.pixels.shape[1] * frames.pixels.shape[2],
            mean=half if timestamps else MEAN,
            deviation=half if timestamps else DEVIATION,
        )
        steps, step = grid[0], grid[1] * grid[2] // vision.spatial_merge_size**2
        start, end, pad = config.vision_start_token_id, config.vision_end_token_id, config.video_token_id
        ids: list[int] = []
        if timestamps:  # each temporal patch by itself, after a text with its time
            for index in range(steps):
                times = frames.times[index * vision.temporal_patch_size :][: vision.temporal_patch_size]
                ids += [*self._encode(f"<{sum(times) / len(times):.1f} seconds>"), start, *[pad] * step, end]
        else:
            ids = [start, *[pad] * (steps * step), end]
        return EncodedSegment(tuple(ids), VideoPatches(rows, grid, frames.seconds * vision.temporal_patch_size))


@dataclass(frozen=True)
class VideoSequence:
    """A sequence of ids with the videos that its placeholders stand for, in order."""

    ids: Sequence[int]
    videos: tuple[VideoPatches, ...] = ()


def model_inputs(config: Any, sequences: Sequence[VideoSequence], pad: int, side: Literal["left", "right"] = "right") -> dict[str, Tensor]:
    """The model's arguments for a batch (B, T), padded on one side, with positions (3, B, T)."""
    longest = max(len(s.ids) for s in sequences)
    ids = torch.full((len(sequences), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    positions = torch.zeros(3, *ids.shape, dtype=torch.long)
    for place, sequence in enumerate(sequences):
        at = slice(longest - len(sequence.ids), longest) if side == "left" else slice(0, len(sequence.ids))
        ids[place, at] = torch.tensor(sequence.ids)
        mask[place, at] = 1
        positions[:, place, at] = layout(config, sequence.ids, sequence.videos).positions
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    videos = [video for sequence in sequences for video in sequence.videos]
    if videos:
        inputs["pixel_values_videos"] = torch.cat([video.rows for video in videos])
        inputs["video_grid_thw"] = torch.tensor([video.grid for video in videos])
    return inputs


def media_key(ids: Sequence[int], media: Sequence[Segment], placeholder: int) -> tuple[int, ...]:
    """Ids with numbers of their own in place of the media's placeholders: alike only where the same segments are shown.

    Each run of placeholders stands for the next segment; runs beyond those were sampled, and stay as they are.
    """
    if not media:
        return tuple(ids)
    key, run, before = [], -1, -1
    for place, i in enumerate(ids):
        if i != placeholder:
            key.append(i)
            continue
        run += before != place - 1 or run < 0
        before = place
        key.append(-1 - abs(hash((media[run], place))) if run < len(media) else i)
    return tuple(key)


class Sight:
    """One model's videos as embeddings: each segment goes through the tower once. The tower is frozen from here on."""

    def __init__(self, model: Any, reader: VideoReader, kept: int = 256):
        if model.config.model_type not in FAMILIES[:2]:
            raise CheckpointError(f"the transformers backend samples from Qwen2-VL and Qwen2.5-VL; this is {model.config.model_type}")
        model.model.visual.requires_grad_(False)
        self.model, self.reader, self._kept = model, reader, kept
        self._features: OrderedDict[SegmentId, Tensor] = OrderedDict()

    @torch.no_grad()
    def features(self, segment: Segment) -> Tensor:
        """The features of a segment, (n, d): one row for each of its n placeholders."""
        key = segment_id(segment)
        if key not in self._features:
            video, tower = self.reader(segment).video, self.model.model.visual
            out = tower(video.rows.to(tower.device, tower.dtype), grid_thw=torch.tensor([video.grid], device=tower.device))
            self._features[key] = out.pooler_output
            while len(self._features) > self._kept:
                self._features.popitem(last=False)
        self._features.move_to_end(key)
        return self._features[key]

    def layout(self, ids: Sequence[int], media: Sequence[Segment]) -> Layout:
        """The layout of a sequence. Its first placeholders stand for the media; the model sampled any others, and they are plain tokens.

        Raises `ConfigError` if there are too few placeholders.
        """
        return layout(self.model.config, ids, [self.reader(segment).video for segment in media])

    def inputs(
        self, model: Any, ids: Tensor, places: Tensor, layouts: Sequence[Layout], media: Sequence[Sequence[Segment]]
    ) -> dict[str, Tensor]:
        """The arguments of `model` for `ids` (B, m) at indices `places` (B, m) of sequences with these layouts and media."""
        embeds = model.get_input_embeddings()(ids)
        positions = places.expand(3, -1, -1).clone()
        rows: list[Tensor] = []
        columns: list[Tensor] = []
        values: list[Tensor] = []
        for row, (laid, segments) in enumerate(zip(layouts, media, strict=True)):
            known = laid.positions.shape[1]
            at = places[row].cpu()
            inside = at < known
            row_positions = torch.where(inside, laid.positions[:, at.clamp(max=known - 1)], at + laid.after)
            positions[:, row] = row_positions.to(positions.device)
            if segments:
                features = torch.cat([self.features(segment) for segment in segments]).to(embeds.dtype)
                index = torch.searchsorted(laid.places, at)
                shown = (index < len(laid.places)) & (laid.places[index.clamp(max=len(laid.places) - 1)] == at)
                rows.append(torch.full((int(shown.sum()),), row))
                columns.append(shown.nonzero()[:, 0])
                values.append(features[index[shown].to(features.device)])
        if values:
            where = (torch.cat(rows).to(embeds.device), torch.cat(columns).to(embeds.device))
            embeds = embeds.index_put(where, torch.cat(values))
        return {"inputs_embeds": embeds, "position_ids": positions}


class VisionPolicy(HFPolicy):
    """`HFPolicy` for a vision-language model: the placeholders in a prompt stand for the media of the request, in order."""

    vision = True

    def __init__(self, model: Any, reader: VideoReader, **options: Any):
        super().__init__(model, **options)
        self.sight = Sight(model, reader)

    def _row(self, request: SampleRequest, partial: Partial) -> RequestState:
        sight = self.sight
        try:
            return RequestState(
                request,
                partial,
                sight=(
                    sight.layout(request.prompt, request.media),
                    media_key(request.prompt, request.media, sight.model.config.video_token_id),
                ),
            )
        except (ConfigError, TaskError) as error:
            raise PolicyError(str(error)) from error

    def _key(self, row: RequestState) -> tuple[int, ...]:
        key: tuple[int, ...] = row.sight[1]
        return key

    def _inputs(self, rows: list[RequestState], ids: Tensor, positions: Tensor) -> dict[str, Tensor]:
        return self.sight.inputs(self.model, ids, positions, [row.sight[0] for row in rows], [row.request.media for row in rows])

    def training_inputs(self, ids: Tensor, rows: Sequence[Sequence[int]], media: Sequence[Sequence[Segment]]) -> Inputs:
        """The `inputs` of `token_logprobs` for a batch `ids` (B, T) of `rows` with their `media`, padded on the right."""
        layouts = [self.sight.layout(row, segments) for row, segments in zip(rows, media, strict=True)]
        places = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
        return lambda model: self.sight.inputs(model, ids, places, layouts, media)
