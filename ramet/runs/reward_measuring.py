"""The commands of `ramet reward` that ask a model: score, judge, bench, report, best-of-n."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.text import Text

from ramet.agents.journal import Journal, fingerprint, read_records
from ramet.agents.tree import Segment
from ramet.benchmarks.evaluation.best_of_n import best_of_n
from ramet.benchmarks.evaluation.video_reward import (
    BenchmarkProtocol,
    against,
    misjudged,
    protocol_record,
    results,
    run_bench,
    warnings,
)
from ramet.display import progress
from ramet.display.video_report import accuracy_bars, best_of_n_curves, print_results, write_page, wrong_pairs
from ramet.errors import ConfigError, TaskError
from ramet.policy.engines.vision import VideoSettings
from ramet.rewards.video.best_of_n import CandidateAnswers, PairwiseSelector, ScoreSelector
from ramet.rewards.video.discriminative import VideoAnswer, VideoDRM
from ramet.rewards.video.generative import GRMSettings, VideoGRM
from ramet.rewards.video.judge import AnswerPair, Order, compare, compare_by_score
from ramet.rewards.video.pairs import PreferencePairs, row_of
from ramet.runs.reward_models import Overrides, Source, answerer_id, claim, model_id, open_answerer, open_reward, print_faults
from ramet.storage import meta, write_json, write_text
from ramet.terminal import show

logger = logging.getLogger(__name__)


def score_command(model: str, overrides: Overrides, video: str | None, question: str, answers: Sequence[str], out: Path | None) -> None:
    """`ramet reward score`."""
    reward = open_reward(model, overrides, "score")
    items = [VideoAnswer(None if video is None else Segment(video), question, answer) for answer in answers]
    scores = reward.score(items)
    if out is not None:
        write_json(
            out, [meta("reward score", 0), *({"record": "score", "answer": a, "score": s} for a, s in zip(answers, scores, strict=True))]
        )
    for score, answer in sorted(zip(scores, answers, strict=True), reverse=True):
        show(f"{score:9.3f}  {answer}")


def judge_command(model: str, overrides: Overrides, pair: AnswerPair, k: int, order: Order, seed: int) -> None:
    """`ramet reward judge`."""
    reward = open_reward(model, overrides)
    verdict = (
        compare_by_score(reward, [pair], reward.settings.temperature)[0]
        if isinstance(reward, VideoDRM)
        else compare(reward, [pair], k, order, seed)[0]
    )
    for vote in verdict.votes:
        choice = {True: "first", False: "second", None: "cannot be read"}[vote.prefers_a]
        shown = Text.assemble(("as given" if vote.forward else "swapped", "dim"), " → ", (choice, "bold"), f": {vote.error or vote.output}")
        show(shown)
    if verdict.probability is not None:
        show(f"probability that the first is better: {verdict.probability:.3f}")
    winner = {"a": "the first answer", "b": "the second answer", None: "neither"}[verdict.winner]
    agreed = "" if verdict.consistent is None else " in both orders" if verdict.consistent else "; the orders differ"
    show(Text.assemble("better: ", (winner, "bold"), agreed))


@dataclass(frozen=True)
class BenchmarkPlan:
    """What is measured: every number of frames with every number of votes of an order, under every condition.

    frames  none: as the model was trained to watch, or as by default
    limit   the first pairs only
    """

    conditions: Sequence[str]
    ks: Sequence[int] = (1,)
    frames: Sequence[int] = ()
    limit: int | None = None


def bench_command(
    model: str, source: Source, protocol: BenchmarkProtocol, plan: BenchmarkPlan, overrides: Overrides, folder: Path, out: Path | None
) -> None:
    """`ramet reward bench`: each number of frames and of votes is a protocol of its own, with a journal of its own.

    `protocol` says what the model does not: the protocols that are measured have the frames, pixels, tokens and temperature
    of the model, which are those that it was trained with where `overrides` does not say otherwise.
    """
    every = source.pairs()
    pairs = PreferencePairs(every[: plan.limit], every.ties)
    identity = {"model": model_id(model), **source.identity("pairs"), "limit": plan.limit or 0}
    claim(folder, "bench", identity, protocol.seed)
    print_faults(pairs)
    write_text(folder / "pairs.jsonl", "".join(json.dumps(row_of(pair, source.root)) + "\n" for pair in pairs))
    records: list[dict[str, Any]] = [meta("reward bench", protocol.seed)]
    judged: list[dict[str, Any]] = []
    of_protocol: list[dict[str, Any]] = []
    conditions = list(plan.conditions)
    videos = [{**overrides.video, "max_frames": frames} for frames in plan.frames] or [dict(overrides.video)]
    for changed in videos:
        reward = open_reward(model, replace(overrides, video=changed), "score" if protocol.mode == "pointwise" else "", pairs)
        scored = isinstance(reward, VideoDRM) or protocol.mode == "pointwise"
        video = reward.settings.video if hasattr(reward, "settings") else VideoSettings()
        sampled = reward.settings if isinstance(reward, VideoGRM) else Overrides(sampling=overrides.sampling).over(GRMSettings())
        for k in plan.ks[:1] if scored else plan.ks:
            last = replace(
                protocol, mode="pointwise" if scored else "pairwise", k=k, frames=video.max_frames, pixels=video.max_pixels,
                temperature=sampled.temperature, max_tokens=None if scored else sampled.max_tokens,
            )  # fmt: skip
            path = folder / f"frames-{last.frames}-k-{k}-{last.order if not scored else 'scores'}.jsonl"
            with Journal(path, fingerprint(identity, asdict(last))) as journal:
                if not journal.records:
                    journal.append({"protocol": protocol_record(last)})
                with progress.measuring(f"{reward.name}, {last.frames} frames, k={k}", len(pairs) * len(conditions)) as report:
                    judged = run_bench(reward, pairs, last, conditions, journal, report)
            measured = results(judged, last.ties, last.seed)
            of_protocol = [protocol_record(last), *({**r, "frames": last.frames, "k": k} for r in measured)]
            print_results(of_protocol)
            for warning in warnings(measured):
                logger.warning(warning)
            records += of_protocol
    write_json(folder / "results.json", records)
    if out is not None:
        write_json(out, records)
    accuracy_bars(of_protocol, folder / "accuracy.png")
    lines = "; ".join(dict.fromkeys(r["line"] for r in records if r["record"] == "protocol"))
    intro = f"{len(pairs)} pairs. The picture is of the last protocol."
    pictures, wrong = [folder / "accuracy.png"], wrong_pairs(pairs, judged, misjudged(judged))
    write_page(folder / "report.html", f"{model} on {Path(source.path).name}", intro, lines, records, pictures, wrong)
    logger.info(f"run folder {folder}: results.json, report.html, and the model's outputs for each pair in *.jsonl")


def report_command(one: Path, other: Path | None, ties: float, out: Path | None) -> None:
    """`ramet reward report`: the numbers of a benchmark run from its journals, without the model; of two runs, their difference too."""
    runs = {path: results(_judged(path), ties) for folder in filter(None, (one, other)) for path in _journals(folder)}
    records = [{**r, "run": str(path)} for path, measured in runs.items() for r in measured]
    differences: list[tuple[str, dict[str, Any]]] = []
    if other is not None:
        here, there = ({path.name: path for path in _journals(folder)} for folder in (one, other))
        alike = [(here[name], there[name]) for name in sorted(set(here) & set(there))]
        for first, second in alike or [(next(iter(here.values())), next(iter(there.values())))]:
            runs_compared = f"{first.parent.name} less {second.parent.name}"
            differences += [(runs_compared, d) for d in against(_judged(first), _judged(second), ties)]
    if out is not None:
        write_json(out, [meta("reward report", 0), *records, *(d for _, d in differences)])
    for path, measured in runs.items():
        show(Text(str(path), "bold"))
        print_results([*(r["protocol"] for r in read_records(path) if "protocol" in r), *measured])
        for note in warnings(measured):
            logger.warning(note)
    for runs_compared, d in differences:
        show(
            f"{d['condition']}: {runs_compared}: {d['difference']:+.3f} ({d['ci_low']:+.3f} to {d['ci_high']:+.3f}) on {d['n']} pairs, "
            f"sign test p = {d['p']:.4f}"
        )


def _journals(folder: Path) -> list[Path]:
    journals = sorted(folder.glob("frames-*.jsonl"))
    if not journals:
        raise ConfigError(f"{folder} holds no benchmark run (frames-*.jsonl); make one with `ramet reward bench`")
    return journals


def _judged(path: Path) -> list[dict[str, Any]]:
    return [record for record in read_records(path) if "condition" in record]


@dataclass(frozen=True)
class SelectionPlan:
    """How the best of N answers is chosen: each N of `ns`; for a judge, the method and `k`, its votes in each order."""

    ns: Sequence[int]
    method: Literal["knockout", "round-robin"]
    k: int
    seed: int


def best_of_n_command(
    model: str, source: Source, responses: str, plan: SelectionPlan, overrides: Overrides, folder: Path, out: Path | None
) -> None:
    """`ramet reward best-of-n`: curves on answers from a file, or from a model that samples as many as the largest N."""
    questions = source.questions()
    identity = {
        "model": model_id(model), **source.identity("questions"), "method": plan.method, "k": plan.k,
        "responses": answerer_id(responses), "ns": list(plan.ns), **overrides.identity(),
    }  # fmt: skip
    claim(folder, "best-of-n", identity, plan.seed)
    answerer = open_answerer(responses, overrides)
    with Journal(folder / "answers.jsonl", fingerprint(identity)) as journal:
        answered = {r["id"]: r["answers"] for r in journal}
        for question in questions:
            if question.id not in answered:
                try:
                    answered[question.id] = answerer.answer([question], max(plan.ns), plan.seed)[0]
                except TaskError as error:  # a video that cannot be read now; the next run tries again
                    logger.warning(f"question {question.id} is left out: {error}")
                    continue
                journal.append({"id": question.id, "answers": answered[question.id]}, keep=False)
    candidates = []
    for question in questions:
        if question.id in answered:
            answers = tuple(answered[question.id])
            stated, right = tuple(map(question.stated, answers)), tuple(map(question.right, answers))
            candidates.append(CandidateAnswers(question.id, question.shown, question.question, answers, stated, right))
    reward = open_reward(model, overrides)
    selector: Any = ScoreSelector(reward) if isinstance(reward, VideoDRM) else PairwiseSelector(reward, plan.method, plan.k, plan.seed)
    with progress.measuring(reward.name, len(candidates)) as report:
        curves = best_of_n(candidates, {reward.name: selector}, plan.ns, seed=plan.seed, report=report)
    records = [meta("reward best-of-n", plan.seed), *curves]
    if out is not None:
        write_json(out, records)
    write_json(folder / "results.json", records)
    best_of_n_curves(records, folder / "best-of-n.png")
    print_results(records)
    logger.info(f"run folder {folder}: results.json, best-of-n.png, answers.jsonl")
