"""`ramet reward demo`: pairs are built, a VideoDRM is trained on them, and tests show whether it looks at the video.

Everything is small and made here: clips are drawn, answers come from a script that guesses, and the model is the code of Qwen2.5-VL
with 190,000 random weights. Interrupt it whenever you like: the same command goes on where it stopped.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ramet.agents.journal import Journal, fingerprint
from ramet.benchmarks.evaluation.best_of_n import best_of_n
from ramet.benchmarks.evaluation.video_reward import BenchmarkProtocol, misjudged, protocol_record, results, run_bench, warnings
from ramet.display import progress
from ramet.display.video_report import accuracy_bars, best_of_n_curves, print_results, training_curve, write_page, wrong_pairs
from ramet.media.clips import make_questions
from ramet.policy.engines.vision import VideoSettings
from ramet.recipes.nano.vision import write_vision_model
from ramet.rewards.video.answerers import PHRASES, Guesser
from ramet.rewards.video.best_of_n import CandidateAnswers, ScoreSelector
from ramet.rewards.video.build import BuildConfig, PairBuilder, datasheet
from ramet.rewards.video.calibration import calibrate
from ramet.rewards.video.discriminative import SETTINGS, DRMSettings, VideoAnswer, VideoDRM
from ramet.rewards.video.pairs import PreferencePair, faults, load_pairs, row_of
from ramet.rewards.video.questions import VideoQuestion, load_questions
from ramet.rewards.video.train_drm import DRMTraining, train_drm
from ramet.runs.commands import claim_folder
from ramet.storage import meta, read_text, write_json, write_text
from ramet.terminal import HEADING

logger = logging.getLogger(__name__)

VIDEO = VideoSettings(max_frames=4, max_pixels=56 * 56)
TRAIN, HELD_OUT, HELD_BACK = 3000, 600, 150
"""Questions for training pairs, for held-out ones, and of the first those that are held back for calibration."""
STEPS = 1600


class DemoConfig(BaseModel):
    """What tells run folders of the demonstration apart."""

    seed: int


def run_reward_demo(folder: Path, seed: int, out: Path | None) -> None:
    """The whole demonstration in `folder`."""
    started = time.perf_counter()
    claim_folder(folder, DemoConfig(seed=seed))
    logger.info("1. preference pairs from clips whose truth is known", extra=HEADING)
    make_questions(folder / "held-out", HELD_OUT, 2 * seed + 1)
    make_questions(folder / "train", TRAIN, 2 * seed)
    held, questions = built_pairs(folder / "held-out", 2 * seed + 1, [])
    pairs, _ = built_pairs(folder / "train", 2 * seed, held)
    logger.info("2. a VideoDRM, trained by TRL", extra=HEADING)
    drm, log = trained_drm(folder, pairs, seed, VIDEO, STEPS)
    logger.info("3. does it look? held-out pairs, with four videos each", extra=HEADING)
    protocol = BenchmarkProtocol("pointwise", frames=VIDEO.max_frames, pixels=VIDEO.max_pixels, seed=seed)
    with Journal(folder / "bench.jsonl", fingerprint("reward demo", seed)) as journal:
        conditions = ("right", "wrong", "none", "reversed")
        with progress.measuring("judging", len(held) * len(conditions)) as report:
            judged = run_bench(drm, held, protocol, conditions, journal, report, at_once=64)
    measured = results(judged, seed=seed)
    logger.info("4. picking the best of eight answers", extra=HEADING)
    picker = ScoreSelector(drm)
    picked = best_of_n(_candidates(questions, seed), {"VideoDRM": picker}, (1, 2, 4, 8), seed=seed)
    records = [meta("reward demo", seed, time.perf_counter() - started), protocol_record(protocol), *measured, *picked]
    records += json.loads(read_text(folder / "calibration.json"))
    write_json(folder / "demo.json", records)
    if out is not None:
        write_json(out, records)
    pictures = [folder / name for name in ("accuracy.png", "best-of-n.png", "training.png")]
    accuracy_bars(records, pictures[0])
    best_of_n_curves(records, pictures[1])
    training_curve(log, pictures[2])
    write_page(
        folder / "report.html",
        "ramet reward demo",
        "A small VideoDRM that was trained here on clips that were drawn here. With another clip or none it should not know better than "
        "chance, and with the frames backwards it should be wrong about what came first.",
        protocol.line(),
        records,
        pictures,
        wrong_pairs(held, judged, misjudged(judged)),
    )
    print_results(records)
    for warning in warnings(measured):
        logger.warning(warning)
    logger.info(f"done in {time.perf_counter() - started:.0f} seconds. Open {folder / 'report.html'}; demo.json lies beside it")


def built_pairs(folder: Path, seed: int, benchmarks: list[PreferencePair]) -> tuple[list[PreferencePair], list[VideoQuestion]]:
    """Pairs that the pipeline builds from the questions in a folder, with their datasheet; and the questions."""
    questions = load_questions(str(folder / "questions.jsonl"))
    path = folder / "pairs.jsonl"
    if not path.exists():
        with Journal(folder / "build.jsonl", fingerprint("pairs", len(questions), seed)) as journal:
            build = PairBuilder(questions, [Guesser()], BuildConfig(n=4, per_question=1, seed=seed), journal, benchmarks=benchmarks)
            made = build.run()
        write_text(folder / "datasheet.md", datasheet(build.sheet(made)))
        write_text(path, "".join(json.dumps(row_of(pair, folder)) + "\n" for pair in made))
    pairs = load_pairs(str(path))
    for fault in faults(pairs):
        logger.warning(fault)
    logger.info(f"{folder.name}: {len(pairs)} pairs from {len(questions)} questions; see {folder / 'datasheet.md'}")
    return pairs, questions


def trained_drm(
    folder: Path, pairs: list[PreferencePair], seed: int, video: VideoSettings, steps: int
) -> tuple[VideoDRM, list[dict[str, Any]]]:
    """A VideoDRM trained from random weights, calibrated on pairs that were held back, and saved in `folder/drm`; and the training log."""
    path, log = folder / "drm", folder / "training.json"
    if not (path / SETTINGS).exists():
        base = folder / "drm-base"
        texts = [p.question for p in pairs] + [phrase.format("") for phrase in PHRASES] + [p.chosen for p in pairs]
        if not (base / "config.json").exists():
            write_vision_model(base, texts, seed)
        drm = VideoDRM.from_base(base, DRMSettings(video=video), seed)
        config = DRMTraining(steps=steps, batch=16, learning_rate=2e-3, lora_rank=0, seed=seed, save_every=100)
        with progress.stepping("training", steps) as tell:
            trained = train_drm(drm, pairs[HELD_BACK:], config, folder, tell)
        back = pairs[:HELD_BACK]
        scores = drm.score([VideoAnswer(p.video, p.question, a) for p in back for a in (p.chosen, p.rejected[0])])
        calibration = calibrate(scores[::2], scores[1::2], [(len(p.chosen), len(p.rejected[0])) for p in back])
        write_json(folder / "calibration.json", [{"record": "calibration", **asdict(calibration)}])
        write_json(log, trained["log"])
        drm.settings = replace(drm.settings, temperature=calibration.temperature, centre=calibration.centre)
        drm.save(path)
    return VideoDRM.load(path), json.loads(read_text(log))


def _candidates(questions: list[VideoQuestion], seed: int) -> list[CandidateAnswers]:
    """Eight guesses at each question, right as often as chance."""
    candidates = []
    for question in questions:
        (answers,) = Guesser(1 / len(question.choices), "candidates").answer([question], 8, seed)
        stated = tuple(map(question.stated, answers))
        right = tuple(map(question.right, answers))
        candidates.append(CandidateAnswers(question.id, question.shown, question.question, tuple(answers), stated, right))
    return candidates
