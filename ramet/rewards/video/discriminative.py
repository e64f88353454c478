"""VideoDRM, a discriminative reward model: a vision-language model with a scalar head in place of its language head.

    drm = VideoDRM.load(Path("drm"))
    drm.score([VideoAnswer(Segment("clip.mp4"), "What colour is the square?", "Answer: red")])    # higher is better

It is trained on preference pairs with the loss of Bradley and Terry (1952). The model kind is that of Video Understanding Reward Modeling
(Wei et al. 2026, arXiv 2605.07872), whose backbone, head and loss are not public; those here are our own (see docs/video-rewards.md). Any
Hugging Face vision-language model with the interface of Qwen2.5-VL or Qwen3-VL can be the base.
"""

from __future__ import annotations

import json
import math
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, Cache, DynamicCache, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from ramet.agents.chat import ChatFormat, chat_format, turn_end
from ramet.agents.encoding import TextEncoder
from ramet.agents.tree import Message
from ramet.attention.positions import RULE
from ramet.errors import CheckpointError, RewardError, StorageError, first_line
from ramet.policy.engines.vision import VideoReader, VideoSequence, VideoSettings, model_inputs, segment_id
from ramet.policy.models.lora import merged
from ramet.rewards.video.pairs import VideoInput, segments_of
from ramet.terminal import quiet
from ramet.version import __version__

SETTINGS = "video_drm.json"
TOGETHER = 4096
"""Most answer tokens that share a forward pass: the attention computed between unrelated answers grows with its square."""
VISIBLE = 2**22
"""Most entries of an attention mask in a pass over answers; more rows are processed in parts."""
SCORES = 2**16
"""Number of scores that are cached."""


@dataclass(frozen=True)
class VideoAnswer:
    """An answer to a question about a video, or several; without a video, the answer is judged from the text alone."""

    video: VideoInput
    question: str
    answer: str


@dataclass(frozen=True)
class DRMSettings:
    """The settings that a checkpoint holds beside its weights.

    pooling      the hidden state from which the score is computed: that of the last token, or the mean over the answer
    temperature  divisor of a difference of scores that turns it into log-odds; see `calibrate`
    centre       the score that counts as neither good nor bad
    """

    pooling: Literal["last", "mean"] = "last"
    video: VideoSettings = field(default_factory=VideoSettings)
    temperature: float = 1.0
    centre: float = 0.0


class ScalarHeadModel(PreTrainedModel):  # type: ignore[misc]
    """The backbone without its vocabulary and a linear score in float32. Its call is the backbone's; `logits` are (B, 1).

    `answer_mask` (B, T) marks the answer, for pooling by mean. Padding may be on either side.
    """

    base_model_prefix = "model"
    _supports_sdpa = True
    _supports_attention_backend = True
    supports_gradient_checkpointing = True

    def __init__(self, config: Any, backbone: Any = None, pooling: str = "last"):
        config.num_labels = 1
        super().__init__(config)
        self.model = AutoModel.from_config(config) if backbone is None else backbone
        self.score = nn.Linear(config.get_text_config().hidden_size, 1, bias=False, dtype=torch.float32)
        nn.init.normal_(self.score.weight, std=0.01)
        self.pooling = pooling

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, answer_mask: Tensor | None = None, margin: Any = None, **inputs: Any
    ) -> SequenceClassifierOutput:
        """Scores (B, 1) as `logits`. `margin` is for the loss, which the trainer computes."""
        inputs["use_cache"] = False
        # No token sees what is right of it, so only padding on the left needs a mask, which grows with the square of the length.
        mask = None if attention_mask[:, 0].all() else attention_mask
        hidden = self.model(input_ids=input_ids, attention_mask=mask, **inputs).last_hidden_state
        return SequenceClassifierOutput(logits=self.head(self.pool(hidden, attention_mask, answer_mask)))

    def head(self, pooled: Tensor) -> Tensor:
        """Scores (B, 1) of pooled hidden states (B, d), in float32 even if the backbone is in bfloat16."""
        return nn.functional.linear(pooled.float(), self.score.weight.float())

    def pool(self, hidden: Tensor, attention_mask: Tensor, answer_mask: Tensor | None) -> Tensor:
        """Pooled hidden states (B, d) of hidden states (B, T, d)."""
        if self.pooling == "mean":
            assert answer_mask is not None
            weights = answer_mask.to(hidden.dtype)
            return (hidden * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)
        places = torch.arange(hidden.shape[1], device=hidden.device)
        last = (places * attention_mask).argmax(1)
        return hidden[torch.arange(len(hidden), device=hidden.device), last]


def versions() -> dict[str, Any]:
    """What a score depends on beside weights and settings; `positions` is the rule by which tokens are numbered."""
    return {"ramet": __version__, "torch": str(torch.__version__), "transformers": transformers.__version__, "positions": RULE}


def sigmoid(x: float) -> float:
    """The logistic function of x, without overflow."""
    return 1 / (1 + math.exp(min(max(-x, -700.0), 700.0)))


def _parts(spans: Sequence[list[int]]) -> list[list[list[int]]]:
    """The answers split into parts of at most `TOGETHER` tokens, or of a single answer."""
    parts: list[list[list[int]]] = [[]]
    held = 0
    for span in spans:
        if parts[-1] and held + len(span) > TOGETHER:
            parts.append([])
            held = 0
        parts[-1].append(span)
        held += len(span)
    return parts


class VideoDRM:
    """Scores answers. `scorer` is the network; build one with `from_base`, or `load` a trained one."""

    def __init__(self, scorer: ScalarHeadModel, tokenizer: Any, settings: DRMSettings, max_batch: int = 16):
        self.scorer, self.tokenizer, self.settings, self.max_batch = scorer, tokenizer, settings, max_batch
        self.chat: ChatFormat = chat_format("auto", tokenizer)
        self.name = "VideoDRM"
        self._encode = TextEncoder(tokenizer)
        self.reader = VideoReader(scorer.config, tokenizer, settings.video)
        self.chat.placeholder_ids = self.reader.ids
        self._known: OrderedDict[tuple[Any, ...], float] = OrderedDict()
        self.passes = 0
        """Batches of single answers, and groups of answers to one question, that were scored so far."""

    @classmethod
    def from_base(cls, path: Path, settings: DRMSettings, seed: int = 0, dtype: torch.dtype = torch.float32) -> VideoDRM:
        """An untrained reward model on the vision-language model in a directory."""
        from transformers import AutoTokenizer

        if not (path / "config.json").exists():
            raise CheckpointError(f"{path} is not a model directory: it has no config.json")
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
            with quiet():  # what it says of the head that is left out is meant to be so
                backbone = AutoModel.from_pretrained(path, dtype=dtype, attn_implementation="sdpa", local_files_only=True)
        except Exception as error:  # transformers raises many classes for a broken directory
            raise CheckpointError(f"model directory {path} cannot be loaded: {first_line(error)}") from error
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return cls(ScalarHeadModel(backbone.config, backbone, settings.pooling), tokenizer, settings)

    def save(self, path: Path) -> None:
        """Write the weights (adapters merged), configuration, tokenizer, settings and versions to a directory."""
        try:
            path.mkdir(parents=True, exist_ok=True)
            state = merged(self.scorer) or self.scorer.state_dict()
            save_file({name: value.detach().contiguous().clone() for name, value in state.items()}, path / "model.safetensors")
            self.scorer.config.save_pretrained(path)
            self.tokenizer.save_pretrained(path)
            (path / SETTINGS).write_text(json.dumps(asdict(self.settings) | {"versions": versions()}, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror or error}") from error

    @classmethod
    def load(cls, path: Path, device: str = "cpu", **options: Any) -> VideoDRM:
        """Load a trained model. Raises `CheckpointError` for missing or mismatched files; warns if it was trained with other positions."""
        from transformers import AutoTokenizer

        if not (path / SETTINGS).exists():
            raise CheckpointError(f"{path} holds no VideoDRM ({SETTINGS} is missing); train one with `ramet reward train-drm`")
        try:
            data = json.loads((path / SETTINGS).read_text(encoding="utf-8"))
            made_with = data.pop("versions", {})
            if "look" in data:
                new = "look to video, frames to max_frames, least to min_pixels, most to max_pixels"
                raise CheckpointError(f"{SETTINGS} is of an earlier version; rename in it {new}")
            settings = DRMSettings(**{**data, "video": VideoSettings(**data["video"])})
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
            config = AutoConfig.from_pretrained(path, local_files_only=True)
            weights = load_file(path / "model.safetensors")
            config.dtype = next(
                weight.dtype for name, weight in weights.items() if name.startswith(f"{ScalarHeadModel.base_model_prefix}.")
            )
            with torch.random.fork_rng():
                scorer = ScalarHeadModel(config, None, settings.pooling)
            scorer.load_state_dict(weights, assign=True)  # each in the precision in which it was kept
        except Exception as error:  # of json, transformers, safetensors and torch
            raise CheckpointError(f"the VideoDRM in {path} cannot be loaded: {first_line(error)}") from error
        if made_with.get("positions", 0) != RULE:
            rule = f"rule {made_with['positions']}" if "positions" in made_with else "those of a release that it does not name"
            warnings.warn(
                f"the VideoDRM in {path} was trained with positions of another kind ({rule}; here: rule {RULE}), so its scores differ from "
                "those that it was trained to give. Train it again",
                stacklevel=2,
            )
        return cls(scorer.to(device).eval(), tokenizer, settings, **options)

    def with_video(self, **changes: Any) -> VideoDRM:
        """The same model with other video settings (`max_frames`, `order`)."""
        settings = replace(self.settings, video=replace(self.settings.video, **changes))
        return VideoDRM(self.scorer, self.tokenizer, settings, self.max_batch)

    def prompt(self, video: VideoInput, question: str) -> VideoSequence:
        """The encoded prompt, with its videos, that precedes an answer."""
        media = segments_of(video)
        ids = self.chat.render([Message("user", question, media)], tools=())
        return VideoSequence(ids, tuple(self.reader(segment).video for segment in media))

    def answer_ids(self, answer: str) -> list[int]:
        """The token ids of an answer and of the end of its turn. Answers are untrusted: no part of one becomes a control token."""
        return [*self._encode(answer), turn_end(self.chat)]

    def _whole(self, prompt: VideoSequence, answer: list[int]) -> list[int]:
        ids, limit = [*prompt.ids, *answer], self.scorer.config.get_text_config().max_position_embeddings
        if len(ids) > limit:
            raise RewardError(f"{len(ids)} tokens are more than the reward model's {limit}; nothing is scored in part. Show fewer frames")
        return ids

    def batch(
        self, prompts: Sequence[VideoSequence], answers: Sequence[list[int]], side: Literal["left", "right"] = "right"
    ) -> dict[str, Tensor]:
        """Inputs of `ScalarHeadModel` for one answer to each prompt."""
        wholes = [VideoSequence(self._whole(p, a), p.videos) for p, a in zip(prompts, answers, strict=True)]
        inputs = model_inputs(self.scorer.config, wholes, self.tokenizer.pad_token_id or 0, side)
        mask = torch.zeros_like(inputs["attention_mask"])
        for place, (whole, answer) in enumerate(zip(wholes, answers, strict=True)):
            end = mask.shape[1] if side == "left" else len(whole.ids)
            mask[place, end - len(answer) : end] = 1
        return inputs | {"answer_mask": mask}

    def score(self, items: Sequence[VideoAnswer]) -> list[float]:
        """One score per item, higher is better; a question is processed once for all its answers, and known scores come from a cache.

        Raises `TaskError` for a video that cannot be read, `RewardError` for what is too long and for a score that is no number.
        """
        keys = [self._key(item) for item in items]
        missing: dict[tuple[Any, ...], VideoAnswer] = {key: item for key, item in zip(keys, items, strict=True) if key not in self._known}
        scores_by_key: dict[tuple[Any, ...], float] = {key: self._known[key] for key in keys if key in self._known}
        groups: dict[tuple[Any, ...], list[tuple[tuple[Any, ...], VideoAnswer]]] = {}
        for key, item in missing.items():
            groups.setdefault(key[:-1], []).append((key, item))
        singles = [group[0] for group in groups.values() if len(group) == 1]
        for start in range(0, len(singles), self.max_batch):
            part = singles[start : start + self.max_batch]
            scores_by_key |= zip([key for key, _ in part], self._singly([item for _, item in part]), strict=True)
        for group in groups.values():
            if len(group) > 1:
                first = group[0][1]
                scores = self.score_together(first.video, first.question, [item.answer for _, item in group])
                scores_by_key |= zip([key for key, _ in group], scores, strict=True)
        self._known.update(scores_by_key)
        while len(self._known) > SCORES:
            self._known.popitem(last=False)
        return [scores_by_key[key] for key in keys]

    def forget(self) -> None:
        """Clear the cache of scores."""
        self._known.clear()

    def _key(self, item: VideoAnswer) -> tuple[Any, ...]:
        return (tuple(map(segment_id, segments_of(item.video))), item.question, item.answer)

    @torch.inference_mode()
    def _singly(self, items: Sequence[VideoAnswer]) -> list[float]:
        inputs = self.batch([self.prompt(i.video, i.question) for i in items], [self.answer_ids(i.answer) for i in items])
        return self._numbers(self.scorer(**self._placed(inputs)).logits)

    @torch.inference_mode()
    def score_together(self, video: VideoInput, question: str, answers: Sequence[str]) -> list[float]:
        """Scores of several answers to one question, which is processed once; no answer attends to another."""
        prompt, spans = self.prompt(video, question), [self.answer_ids(answer) for answer in answers]
        for span in spans:
            self._whole(prompt, span)
        head = self._placed(model_inputs(self.scorer.config, [prompt], 0))
        del head["attention_mask"]
        cache = DynamicCache(config=self.scorer.config.get_text_config())
        self.scorer.model(**head, past_key_values=cache, use_cache=True)
        begun, first = len(prompt.ids), int(head["position_ids"].max()) + 1
        pooled = []
        for part in _parts(spans):
            rows = self._extended(cache, begun, first, part)
            cache.crop(-len(rows))
            for hidden in rows.split([len(span) for span in part]):
                pooled.append(hidden.mean(0) if self.settings.pooling == "mean" else hidden[-1])
        return self._numbers(self.scorer.head(torch.stack(pooled)))

    def _extended(self, cache: Cache, begun: int, first: int, spans: Sequence[list[int]]) -> Tensor:
        """Hidden states (rows, d) of answers, one after another, each at positions from `first` on and after the `begun` rows of `cache`.

        The mask is made in pieces of rows, so that memory grows linearly with the length.
        """
        ids = torch.tensor([i for span in spans for i in span])
        positions = torch.cat([first + torch.arange(len(span)) for span in spans])
        whose, places = torch.repeat_interleave(torch.tensor([len(span) for span in spans])), torch.arange(len(ids))
        at_once = max(VISIBLE // (begun + len(ids)), 1)
        hidden = []
        for start in range(0, len(ids), at_once):
            rows, before = slice(start, start + at_once), slice(0, start + at_once)
            own = (whose[rows, None] == whose[None, before]) & (places[rows, None] >= places[None, before])
            mask = torch.cat([torch.ones(len(own), begun, dtype=torch.bool), own], dim=1)
            inputs = {"input_ids": ids[None, rows], "attention_mask": mask[None, None], "position_ids": positions[rows].expand(3, 1, -1)}
            hidden.append(self.scorer.model(**self._placed(inputs), past_key_values=cache, use_cache=True).last_hidden_state[0])
        return torch.cat(hidden)

    def _placed(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        device, dtype = self.scorer.device, next(self.scorer.model.parameters()).dtype
        return {n: v.to(device, dtype) if n == "pixel_values_videos" else v.to(device) for n, v in inputs.items()}

    def _numbers(self, logits: Tensor) -> list[float]:
        self.passes += 1
        values: list[float] = logits[:, 0].tolist()
        if not all(map(math.isfinite, values)):
            raise RewardError(f"the reward model gives {values}; its weights are broken")
        return values

    def rewards(self, scores: Sequence[float]) -> list[float]:
        """Rewards between 0 and 1: the probability that an answer with the score beats one that is neither good nor bad."""
        return [sigmoid((score - self.settings.centre) / self.settings.temperature) for score in scores]

    def probabilities(self, items: Sequence[VideoAnswer]) -> list[float]:
        """The reward in [0, 1] of each item. Raises what `score` raises."""
        return self.rewards(self.score(items))
