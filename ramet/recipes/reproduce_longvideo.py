"""`ramet reproduce longvideo`: delegation learned from the reward of a video reward model.

Clips of several scenes are drawn. From pairs of answers, a VideoDRM learns which answers about them are right. A small vision-language
model learns from demonstrations how clones watch the right segment or all, and how to guess without looking. Then the local trainer
samples trees whose only reward is the VideoDRM's score of the root's answer. Exact match, which training never sees, shows whether
that was worth it. An interrupted run resumes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ramet.agents.chat import ControlTokenFormat
from ramet.agents.journal import Journal, fingerprint
from ramet.agents.protocol import left_line, render_call
from ramet.display import plots, progress
from ramet.env.instructions import instructed
from ramet.env.longvideo import LongVideoSettings
from ramet.env.questions import TUNING
from ramet.errors import ConfigError
from ramet.media.clips import COLOURS, make_long_questions
from ramet.policy.engines.vision import VideoSettings, VisionPolicy
from ramet.policy.models.catalogue import weights_id
from ramet.policy.models.checkpoint import checkpoint_path
from ramet.policy.training.sft import SFTTraining, fine_tune
from ramet.recipes.nano.vision import VisionSize, write_vision_model
from ramet.recipes.nano.watching import WATCH, demonstrate_watching, examples, scenes_of
from ramet.recipes.reward_demo import built_pairs, trained_drm
from ramet.runs.build import engine_of, open_model, read_metrics, score_name
from ramet.runs.commands import claim_folder, run_measuring, run_training, tree_entry
from ramet.runs.settings import RunConfig, load
from ramet.runs.sweep import results
from ramet.storage import meta, read_text, write_json
from ramet.terminal import HEADING, Table, show

logger = logging.getLogger(__name__)

SCENES, TRAIN, HELD_OUT = 6, 2400, 200
FRAMES, PIXELS = 2, 56 * 56
"""Of a segment. The reward model is shown the segment that is asked about, which the policy has to find."""
DRM_STEPS, SFT_STEPS = 600, 1000


def reproduce_longvideo(folder: Path, source: str, overrides: Sequence[str], seed: int) -> None:
    """The whole experiment in `folder`. `source` is a preset or a file, and `overrides` take precedence over it."""
    paths = {"data": "held-out/questions.jsonl", "train": "train/questions.jsonl", "reward_model": "drm"}
    own = [f"model={folder / 'base'}", f"seed={seed}", *(f"env.{name}={folder / where}" for name, where in paths.items())]
    config = load(RunConfig, source, [*own, *overrides])
    if not isinstance(config.env, LongVideoSettings):
        raise ConfigError(f"reproduce longvideo needs the environment longvideo, not {config.env.kind}: leave env.kind out")
    claim_folder(folder, config)
    logger.info("1. clips of several scenes, and pairs of answers about them", extra=HEADING)
    for name, count, s in (("train", TRAIN, 2 * seed), ("held-out", HELD_OUT, 2 * seed + 1)):
        make_long_questions(folder / name, count, s, SCENES)
    pairs, _ = built_pairs(folder / "train", 2 * seed, [])
    logger.info("2. a VideoDRM", extra=HEADING)
    trained_drm(folder, pairs, seed, VideoSettings(max_frames=FRAMES, max_pixels=PIXELS), DRM_STEPS)
    logger.info("3. a small model that can have clones watch, and can guess", extra=HEADING)
    _base(folder, config, config.env.seconds)
    logger.info("4. reinforcement learning from the VideoDRM", extra=HEADING)
    trainer = run_training(config, folder / "trained", True, "training")
    final = checkpoint_path(trainer.checkpoints, config.train.updates)
    measured = []
    for name, path in (("base", folder / "base"), ("trained", final)):
        with Journal(folder / f"{name}.jsonl", fingerprint(config.model_dump(mode="json"), weights_id(path))) as journal:
            measured += run_measuring(config, path, [tree_entry(name, config, True)], ("iid",), journal, "measuring")
    env = config.env.build()
    records = [meta("reproduce longvideo", seed), *results(measured, config, env, "trained", {}, {}, "small")]
    metrics = read_metrics(folder / "trained")
    records += [{"record": "update", **m} for m in metrics]
    write_json(folder / "longvideo.json", records)
    plots.learning({"trained": metrics}, folder / "learning.png", score_name(config))
    _print(records)
    logger.info(f"run folder {folder}: longvideo.json, learning.png, drm/, base/, trained/")


def _base(folder: Path, config: RunConfig, seconds: float) -> None:
    """Write the base model, trained on demonstrations of the training clips."""
    path, draft = folder / "base", folder / "base.draft"
    if (path / "config.json").exists():
        return
    blind = config.env.without_reward_model()
    tasks = [instructed(task, blind.instruction(True)) for task in blind.build().tasks("train", TRAIN - TRAIN // TUNING, config.seed)]
    if not (draft / "config.json").exists():
        texts = [task.messages[0].content for task in tasks[:400]]
        texts += 100 * [f"Answer: {word}" for word in COLOURS]
        texts += 200 * [render_call([{"objective": WATCH, "context_keys": ["s1"]}] * 2), left_line(100, None)]
        write_vision_model(draft, texts, config.seed, VisionSize(96))
    model, tokenizer, chat = open_model(config, draft)
    engine = engine_of(config, model, tokenizer, chat)
    if not isinstance(engine, VisionPolicy) or not isinstance(chat, ControlTokenFormat):
        raise ConfigError("the demonstrations are written for a vision-language model in the nano chat format: leave chat out")
    rows = [json.loads(line) for line in read_text(folder / "train" / "questions.jsonl").splitlines()]
    by_id = {task.reference.id: task.reference for task in tasks}
    scenes_by_question = [(by_id[row["id"]], row["scenes"]) for row in rows if row["id"] in by_id]
    truth = {key: colour for question, scenes in scenes_by_question for key, colour in scenes_of(question, scenes, seconds).items()}
    shown = examples(demonstrate_watching(tasks, truth, chat, config.seed))
    with progress.stepping("demonstrations", SFT_STEPS) as tell:
        settings = SFTTraining(steps=SFT_STEPS, batch=32, at_once=32, learning_rate=1e-3, lora_rank=0, seed=config.seed)
        fine_tune(model, shown, tokenizer.pad_token_id, settings, draft / "checkpoints", engine.sight.reader, tell)
    model.save_pretrained(draft)
    draft.rename(path)


def _print(records: list[dict[str, Any]]) -> None:
    shown = Table("policy", "budget", "right answers", "95%", "reward model", "generated", "spawns", title="held-out questions")
    points = [r for r in records if r["record"] == "point"]
    for p in (p for p in points if p["metric"] == "em"):
        by_model = next(q for q in points if q["metric"] == "reward" and (q["policy"], q["budget"]) == (p["policy"], p["budget"]))
        shown.add_row(
            p["policy"], str(p["budget"]), f"{p['accuracy']:.3f}", f"{p['ci_low']:.2f}-{p['ci_high']:.2f}", f"{by_model['accuracy']:.3f}",
            f"{p['generated']:.0f}", f"{p['spawn_rate']:.0%}",
        )  # fmt: skip
    show(shown)
