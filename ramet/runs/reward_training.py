"""The commands of `ramet reward` that make data and models: build-pairs, train-drm, sft-grm, train-grm."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ramet.agents.journal import Journal, fingerprint
from ramet.data import load_rows
from ramet.display import progress
from ramet.display.video_report import training_curve
from ramet.errors import ConfigError
from ramet.policy.models.catalogue import find, weights_id
from ramet.policy.models.load import auto_device
from ramet.policy.training.sft import SFTTraining
from ramet.policy.training.trainer import run_trainer
from ramet.policy.training.update import TrainConfig
from ramet.rewards.video.build import BuildConfig, PairBuilder, datasheet
from ramet.rewards.video.calibration import calibrate
from ramet.rewards.video.discriminative import DRMSettings, VideoAnswer, VideoDRM
from ramet.rewards.video.formats import WITHOUT
from ramet.rewards.video.generative import VideoGRM
from ramet.rewards.video.pairs import PreferencePair, load_pairs, row_of
from ramet.rewards.video.train_drm import DRMTraining, fits, train_drm
from ramet.rewards.video.train_grm import grm_trainer, sft_grm, sifted, traces_of
from ramet.runs.reward_models import (
    Overrides,
    Source,
    answerer_id,
    claim,
    file_id,
    load_grm,
    model_id,
    open_answerer,
    open_reward,
    print_faults,
)
from ramet.storage import meta, write_json, write_text
from ramet.terminal import show

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PairModels:
    """The models that take part in building pairs, by name.

    answerers   who answers the questions
    judge       judges pairs in both orders, with and without the video
    scores      a VideoDRM whose scores must agree
    weak        an answerer; what it gets right is too easy
    benchmarks  files of pairs to keep out
    """

    answerers: Sequence[str]
    judge: str | None = None
    scores: str | None = None
    weak: str | None = None
    benchmarks: Sequence[str] = ()

    def identity(self) -> dict[str, Any]:
        """The identity of the models."""
        return {
            "answerers": [answerer_id(name) for name in self.answerers], "judge": model_id(self.judge), "scores": model_id(self.scores),
            "weak": answerer_id(self.weak) if self.weak else "", "benchmarks": [file_id(name) for name in self.benchmarks],
        }  # fmt: skip


def build_command(source: Source, models: PairModels, config: BuildConfig, overrides: Overrides, folder: Path, out: Path | None) -> None:
    """`ramet reward build-pairs`."""
    identity = {
        **source.identity("questions"), **models.identity(), "config": asdict(config), "seen": dict(overrides.video),
    }  # fmt: skip
    claim(folder, "build-pairs", identity, config.seed)
    questions = source.questions()
    answerers = [open_answerer(name, overrides) for name in models.answerers]
    kept_out = [pair for name in models.benchmarks for pair in load_pairs(name, {"video": WITHOUT})]

    def print_stage(stage: str, done: int, total: int) -> None:
        if done == total or done % 50 == 0:
            logger.info(f"{stage}: {done} of {total}")

    with Journal(folder / "journal.jsonl", fingerprint(identity)) as journal:
        builder = PairBuilder(
            questions, answerers, config, journal, None if models.judge is None else open_reward(models.judge, overrides, "judge"),
            None if models.scores is None else open_reward(models.scores, Overrides(), "score"),
            None if models.weak is None else open_answerer(models.weak, overrides), kept_out, print_stage,
        )  # fmt: skip
        pairs = builder.run()
    sheet = builder.sheet(pairs)
    write_text(folder / "pairs.jsonl", "".join(json.dumps(row_of(pair, source.root)) + "\n" for pair in pairs))
    write_text(folder / "datasheet.md", datasheet(sheet))
    if out is not None:
        stages = [{"record": "stage", "stage": name, **counts} for name, counts in sheet["stages"].items()]
        write_json(out, [meta("reward build-pairs", config.seed), *stages, {"record": "datasheet", **sheet}])
    show(datasheet(sheet))
    print_faults(pairs)
    logger.info(f"{len(pairs)} pairs in {folder / 'pairs.jsonl'}, videos below {source.root}; datasheet.md beside it")


def train_drm_command(
    model: str, source: Source, settings: DRMSettings, config: DRMTraining, held_out: float, folder: Path, out: Path | None
) -> None:
    """`ramet reward train-drm`: train, calibrate on pairs about videos that were held out, save."""
    base = find(model)
    identity = {
        "model": weights_id(base), **source.identity("pairs"), "settings": asdict(settings), "config": asdict(config), "held": held_out,
    }  # fmt: skip
    claim(folder, "train-drm", identity, config.seed)
    pairs = source.pairs()
    print_faults(pairs)
    held, train = _split(pairs, held_out)
    if len(held) < 2 or not train:
        raise ConfigError(
            f"{len(pairs)} pairs with {held_out:.0%} of the videos held out leave {len(train)} to train on and {len(held)} held out"
        )
    drm = VideoDRM.from_base(base, settings, config.seed, torch.bfloat16 if config.bf16 else torch.float32)
    drm.scorer.to(auto_device())
    drm.scorer.score.float()
    known = len(held)
    held = [p for p in held if fits(drm, p, config.max_tokens)]
    if len(held) < 2:
        raise ConfigError(f"{len(held)} of {known} held-out pairs can be used: the others are too long, or their videos cannot be read")
    steps = config.steps or max(round(len(train) * config.epochs / config.batch), 1)
    with progress.stepping("training", steps) as report:
        trained = train_drm(drm, train, config, folder, report)
    drm.save(folder / "drm")
    scores = drm.score([VideoAnswer(p.video, p.question, a) for p in held for a in (p.chosen, p.rejected[0])])
    calibration = calibrate(scores[::2], scores[1::2], [(len(p.chosen), len(p.rejected[0])) for p in held])
    drm.settings = replace(drm.settings, temperature=calibration.temperature, centre=calibration.centre)
    drm.save(folder / "drm")
    right = sum(a > b for a, b in zip(scores[::2], scores[1::2], strict=True)) / len(held)
    training_curve(trained["log"], folder / "training.png")
    records = [
        meta("reward train-drm", config.seed),
        {"record": "training", "pairs": trained["pairs"], "too_long": trained["too_long"], "unreadable": trained["unreadable"],
         "ties": pairs.ties, "steps": trained["steps"], "held_out": len(held), "held_out_accuracy": right},
        {"record": "calibration", **asdict(calibration)},
        *({"record": "step", **entry} for entry in trained["log"]),
    ]  # fmt: skip
    write_json(folder / "training.json", records)
    if out is not None:
        write_json(out, records)
    show(
        f"{trained['steps']} steps on {trained['pairs']} pairs (left out: {trained['too_long']} too long, "
        f"{trained['unreadable']} of videos that cannot be read). Held out: {right:.3f} of {len(held)} pairs of {known}; "
        f"temperature {calibration.temperature:.2f}, calibration error {calibration.ece_before:.3f} before and "
        f"{calibration.ece:.3f} after, correlation of length and score {calibration.length_correlation:.2f}"
    )
    logger.info(f"the VideoDRM is in {folder / 'drm'}; training.json and training.png beside it")


def _split(pairs: Sequence[PreferencePair], share: float) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """(held out, the others), by video, so that no video is in both; the same whatever the order of the rows."""
    # By names, not paths: the folder may be moved.
    named = {p.cluster: Path(p.cluster).name for p in pairs}
    held = {c for c, name in named.items() if int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) < share * 2**32}
    return [p for p in pairs if p.cluster in held], [p for p in pairs if p.cluster not in held]


def sft_grm_command(
    model: str, source: Source, traces: str | None, judge: str | None, k: int, overrides: Overrides, config: SFTTraining, folder: Path
) -> None:
    """`ramet reward sft-grm`: on verdicts from a file, or of a judge (by default the model itself), that are right in both orders."""
    base = find(model)
    settings = overrides.of(base)
    identity = {
        "model": weights_id(base), **source.identity("pairs"), "traces": file_id(traces or ""), "judge": model_id(judge), "k": k,
        "settings": asdict(settings),
    }  # fmt: skip
    claim(folder, "sft-grm", identity | {"config": asdict(config)}, config.seed)
    pairs = source.pairs()
    grm = load_grm(base, settings)
    if traces is not None:
        chosen = traces_of(load_rows(traces), pairs)
    else:
        teacher = grm if judge is None else load_grm(find(judge), overrides.of(find(judge)))
        chosen = _sifted(teacher, pairs, k, config.seed, folder, fingerprint(identity))
    logger.info(f"{len(chosen)} verdicts that are right in both orders, of {len(pairs)} pairs")
    steps = config.steps or max(round(len(chosen) * config.epochs / config.batch), 1)
    with progress.stepping("training", steps) as report:
        sft_grm(grm, chosen, config, folder, report)
    _save(grm, folder / "grm")


def _sifted(
    teacher: VideoGRM, pairs: Sequence[PreferencePair], k: int, seed: int, folder: Path, run: str
) -> list[tuple[PreferencePair, bool, str]]:
    """Verdicts to learn from, each pair judged once however often the run is interrupted."""
    by_id = {pair.id: pair for pair in pairs}
    with Journal(folder / "verdicts.jsonl", run) as journal, progress.measuring("verdicts", len(pairs)) as report:
        known = {r["id"] for r in journal}
        report(len(known))
        left = [pair for pair in pairs if pair.id not in known]
        for start in range(0, len(left), 16):
            part = left[start : start + 16]
            of_pair: dict[str, list[Any]] = {pair.id: [] for pair in part}
            for pair, forward, output in sifted(teacher, part, k, seed):
                of_pair[pair.id].append([forward, output])
            for name, traces in of_pair.items():
                journal.append({"id": name, "traces": traces})
            report(len(part))
        return [(by_id[r["id"]], forward, output) for r in journal for forward, output in r["traces"] if r["id"] in by_id]


def train_grm_command(model: str, source: Source, overrides: Overrides, config: TrainConfig, seed: int, folder: Path) -> None:
    """`ramet reward train-grm`: reinforcement learning on verdicts, by the trainer of the delegation policy."""
    base = find(model)
    settings = replace(overrides.of(base), temperature=config.temperature)
    identity = {
        "model": weights_id(base), **source.identity("pairs"), "settings": asdict(settings), "config": config.model_dump(),
    }  # fmt: skip
    claim(folder, "train-grm", identity, seed)
    pairs = source.pairs()
    grm = load_grm(base, settings)
    trainer = grm_trainer(grm, pairs, config, folder, seed, fingerprint(identity))
    with progress.training("verdicts", config.updates, trainer.resume()) as report:
        run_trainer(trainer, report)
    _save(grm, folder / "grm")


def _save(grm: VideoGRM, path: Path) -> None:
    grm.save(path)
    logger.info(f"the VideoGRM is in {path}")
