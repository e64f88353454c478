"""The jobs behind `ramet reward`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from rich.text import Text

from ramet.agents.journal import Journal, fingerprint, read_records
from ramet.agents.tree import Segment
from ramet.benchmarks.evaluation.best_of_n import best_of_n
from ramet.benchmarks.evaluation.video_reward import Protocol, against, misjudged, protocol_record, results, run_bench, warnings
from ramet.data import load_rows
from ramet.display import progress
from ramet.display.video_report import accuracy_bars, best_of_n_curves, print_results, training_curve, write_page, wrong_pairs
from ramet.errors import CheckpointError, ConfigError, TaskError
from ramet.policy.engines.vision import Look
from ramet.policy.models.catalogue import find, weights_id
from ramet.policy.models.load import auto_device
from ramet.policy.training.sft import SFTTraining
from ramet.policy.training.trainer import run_trainer
from ramet.policy.training.update import TrainConfig
from ramet.rewards.video.answerers import Guesser, ModelAnswerer, RecordedAnswers
from ramet.rewards.video.best_of_n import CandidateAnswers, PairwiseSelector, ScoreSelector
from ramet.rewards.video.build import Answerer, BuildConfig, PairBuilder, datasheet
from ramet.rewards.video.calibration import calibrate
from ramet.rewards.video.discriminative import SETTINGS, DRMSettings, VideoAnswer, VideoDRM
from ramet.rewards.video.fakes import fake_judge
from ramet.rewards.video.formats import WITHOUT
from ramet.rewards.video.generative import GRMSettings, VideoGRM
from ramet.rewards.video.judge import AnswerPair, Order, by_scores, compare
from ramet.rewards.video.pairs import PreferencePair, PreferencePairs, faults, load_pairs, row_of
from ramet.rewards.video.questions import load_questions
from ramet.rewards.video.train_drm import DRMTraining, fits, train_drm
from ramet.rewards.video.train_grm import grm_trainer, sft_grm, sifted, traces_of
from ramet.runs.jobs import claim_folder
from ramet.storage import meta, read_text, write_json, write_text
from ramet.terminal import console, tagged


class RewardRun(BaseModel):
    """What tells run folders of these jobs apart."""

    command: str
    settings: dict[str, Any]
    seed: int


Seen = Mapping[str, Any]
"""What is said of how a model looks at videos: `frames`, `fps`, `most` pixels. What is not said is left as it is."""


def open_reward(name: str, seen: Seen, settings: Mapping[str, Any], needs: str = "", pairs: Sequence[PreferencePair] = ()) -> Any:
    """A VideoDRM or a model that judges, from a directory; or `fake:oracle` and its like.

    `needs` is "judge" where pairs are to be judged, "score" where answers are to be scored.
    """
    if name.startswith("fake:"):
        if name == "fake:oracle" and not pairs:
            raise ConfigError("fake:oracle knows the better answer of a benchmark's pairs only; use it with `ramet reward bench`")
        better = {f"{pair.id}/{n}": pair.chosen for pair in pairs for n in range(len(pair.rejected))}
        found: Any = fake_judge(name.removeprefix("fake:"), better)
    elif ((path := find(name)) / SETTINGS).exists():
        found = VideoDRM.load(path, auto_device())
        found = found.look(**seen) if seen else found
    elif (path / "config.json").exists():
        found = load_grm(path, GRMSettings(look=replace(Look(), **seen), **settings))
    else:
        raise CheckpointError(f"{name!r} is no reward model: give the directory of a VideoDRM or a vision-language model, or fake:random")
    if needs and not hasattr(found, needs):
        raise ConfigError(f"{name} " + ("scores answers and judges no pairs" if needs == "judge" else "judges pairs and gives no scores"))
    return found


def load_grm(path: Path, settings: GRMSettings) -> VideoGRM:
    """On a GPU where there is one, then in bfloat16."""
    device = auto_device()
    return VideoGRM.load(path, settings, device, torch.bfloat16 if device == "cuda" else torch.float32)


def model_id(name: str | None) -> str:
    """What tells models apart in a journal."""
    if not name or name.startswith("fake:"):
        return name or ""
    path = find(name)
    settings = read_text(path / SETTINGS) if (path / SETTINGS).exists() else ""
    return fingerprint(weights_id(path), settings)


def answerer_id(name: str) -> str:
    return name if name == "guesser" else file_id(name) if Path(name).is_file() else model_id(name)


def _where(fields: dict[str, str], videos: Path | None) -> dict[str, Any]:
    """Where a file's rows have what, and their videos, as part of what tells run folders apart."""
    return {"fields": fields, "videos": str(videos or "")}


def file_id(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16] if Path(path).is_file() else path


def videos_of(source: str, videos: Path | None) -> Path:
    return videos or Path(source).parent


def build_job(
    source: str, videos: Path | None, fields: dict[str, str], answerers: Sequence[str], judge: str | None, scores: str | None,
    weak: str | None, benchmarks: Sequence[str], config: BuildConfig, seen: Seen, folder: Path, out: Path | None,
) -> None:  # fmt: skip
    """`ramet reward build-pairs`."""
    given = {
        "questions": file_id(source), **_where(fields, videos), "answerers": [answerer_id(a) for a in answerers],
        "judge": model_id(judge), "scores": model_id(scores), "weak": answerer_id(weak) if weak else "",
        "benchmarks": [file_id(b) for b in benchmarks], "config": asdict(config), "seen": dict(seen),
    }  # fmt: skip
    claim_folder(folder, RewardRun(command="build-pairs", settings=_plain(given), seed=config.seed))
    root = videos_of(source, videos)
    questions = load_questions(source, fields, root)
    models = [_answerer(name, seen) for name in answerers]
    known = [pair for name in benchmarks for pair in load_pairs(name, {"video": WITHOUT})]

    def tell(stage: str, done: int, total: int) -> None:
        if done == total or done % 50 == 0:
            console.print(f"{stage}: {done} of {total}")

    with Journal(folder / "journal.jsonl", fingerprint(given)) as journal:
        build = PairBuilder(
            questions, models, config, journal, None if judge is None else open_reward(judge, seen, {}, "judge"),
            None if scores is None else open_reward(scores, {}, {}, "score"), None if weak is None else _answerer(weak, seen), known, tell,
        )  # fmt: skip
        pairs = build.run()
    sheet = build.sheet(pairs)
    write_text(folder / "pairs.jsonl", "".join(json.dumps(row_of(pair, root)) + "\n" for pair in pairs))
    write_text(folder / "datasheet.md", datasheet(sheet))
    if out is not None:
        stages = [{"record": "stage", "stage": name, **counts} for name, counts in sheet["stages"].items()]
        write_json(out, [meta("reward build-pairs", config.seed), *stages, {"record": "datasheet", **sheet}])
    console.print(datasheet(sheet))
    _say_faults(pairs)
    console.print(f"{len(pairs)} pairs in {folder / 'pairs.jsonl'}, videos below {root}; datasheet.md beside it")


def _answerer(name: str, seen: Seen) -> Answerer:
    if name == "guesser":
        return Guesser()
    if name.endswith((".jsonl", ".json", ".parquet")):
        return RecordedAnswers(name)
    return ModelAnswerer(load_grm(find(name), GRMSettings(look=replace(Look(), **seen), temperature=0.8)), Path(name).name)


def train_drm_job(
    model: str, source: str, videos: Path | None, fields: dict[str, str], settings: DRMSettings, config: DRMTraining, held_out: float,
    folder: Path, out: Path | None,
) -> None:  # fmt: skip
    """`ramet reward train-drm`: train, calibrate on pairs about videos that were held out, save."""
    base = find(model)
    given = {
        "model": weights_id(base), "pairs": file_id(source), **_where(fields, videos), "settings": asdict(settings),
        "config": asdict(config), "held": held_out,
    }  # fmt: skip
    claim_folder(folder, RewardRun(command="train-drm", settings=_plain(given), seed=config.seed))
    pairs = load_pairs(source, fields, videos_of(source, videos))
    _say_faults(pairs)
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
    with progress.stepping("training", steps) as tell:
        trained = train_drm(drm, train, config, folder, tell)
    drm.save(folder / "drm")
    scores = drm.score([VideoAnswer(p.video, p.question, a) for p in held for a in (p.chosen, p.rejected[0])])
    found = calibrate(scores[::2], scores[1::2], [(len(p.chosen), len(p.rejected[0])) for p in held])
    drm.settings = replace(drm.settings, temperature=found.temperature, centre=found.centre)
    drm.save(folder / "drm")
    right = sum(a > b for a, b in zip(scores[::2], scores[1::2], strict=True)) / len(held)
    training_curve(trained["log"], folder / "training.png")
    records = [
        meta("reward train-drm", config.seed),
        {"record": "training", "pairs": trained["pairs"], "too_long": trained["too_long"], "unreadable": trained["unreadable"],
         "ties": pairs.ties, "steps": trained["steps"], "held_out": len(held), "held_out_accuracy": right},
        {"record": "calibration", **asdict(found)},
        *({"record": "step", **entry} for entry in trained["log"]),
    ]  # fmt: skip
    write_json(folder / "training.json", records)
    if out is not None:
        write_json(out, records)
    console.print(
        f"{trained['steps']} steps on {trained['pairs']} pairs (left out: {trained['too_long']} too long, "
        f"{trained['unreadable']} of videos that cannot be read). Held out: {right:.3f} of {len(held)} pairs of {known}; "
        f"temperature {found.temperature:.2f}, calibration error {found.ece_before:.3f} before and {found.ece:.3f} after, correlation of "
        f"length and score {found.length_correlation:.2f}"
    )
    console.print(f"the VideoDRM is in {folder / 'drm'}; training.json and training.png beside it")


def _split(pairs: Sequence[PreferencePair], share: float) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """(held out, the others), by video, so that no video is in both; the same whatever the order of the rows."""
    # By names, not paths: the folder may be moved.
    named = {p.cluster: Path(p.cluster).name for p in pairs}
    held = {c for c, name in named.items() if int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) < share * 2**32}
    return [p for p in pairs if p.cluster in held], [p for p in pairs if p.cluster not in held]


def sft_grm_job(
    model: str, source: str, videos: Path | None, fields: dict[str, str], traces: str | None, judge: str | None, k: int,
    settings: GRMSettings, config: SFTTraining, folder: Path,
) -> None:  # fmt: skip
    """`ramet reward sft-grm`: on verdicts from a file, or of a judge (by default the model itself), that are right in both orders."""
    base = find(model)
    given = {
        "model": weights_id(base), "pairs": file_id(source), **_where(fields, videos), "traces": file_id(traces or ""),
        "judge": model_id(judge), "k": k, "settings": asdict(settings),
    }  # fmt: skip
    claim_folder(folder, RewardRun(command="sft-grm", settings=_plain(given | {"config": asdict(config)}), seed=config.seed))
    pairs = load_pairs(source, fields, videos_of(source, videos))
    grm = load_grm(base, settings)
    if traces is not None:
        chosen = traces_of(load_rows(traces), pairs)
    else:
        chosen = _sifted(grm if judge is None else load_grm(find(judge), settings), pairs, k, config.seed, folder, fingerprint(given))
    console.print(f"{len(chosen)} verdicts that are right in both orders, of {len(pairs)} pairs")
    steps = config.steps or max(round(len(chosen) * config.epochs / config.batch), 1)
    with progress.stepping("training", steps) as tell:
        sft_grm(grm, chosen, config, folder, tell)
    _save(grm, folder / "grm")


def _sifted(
    teacher: VideoGRM, pairs: Sequence[PreferencePair], k: int, seed: int, folder: Path, job: str
) -> list[tuple[PreferencePair, bool, str]]:
    """Verdicts to learn from, each pair judged once however often the run is interrupted."""
    by_id = {pair.id: pair for pair in pairs}
    with Journal(folder / "verdicts.jsonl", job) as journal, progress.measuring("verdicts", len(pairs)) as report:
        known = {r["id"] for r in journal}
        report(len(known))
        left = [pair for pair in pairs if pair.id not in known]
        for start in range(0, len(left), 16):
            part = left[start : start + 16]
            found: dict[str, list[Any]] = {pair.id: [] for pair in part}
            for pair, forward, said in sifted(teacher, part, k, seed):
                found[pair.id].append([forward, said])
            for name, traces in found.items():
                journal.append({"id": name, "traces": traces})
            report(len(part))
        return [(by_id[r["id"]], forward, said) for r in journal for forward, said in r["traces"] if r["id"] in by_id]


def train_grm_job(
    model: str,
    source: str,
    videos: Path | None,
    fields: dict[str, str],
    settings: GRMSettings,
    config: TrainConfig,
    seed: int,
    folder: Path,
) -> None:
    """`ramet reward train-grm`: reinforcement learning on verdicts, by the trainer of the delegation policy."""
    base = find(model)
    given = {
        "model": weights_id(base), "pairs": file_id(source), **_where(fields, videos), "settings": asdict(settings),
        "config": config.model_dump(),
    }  # fmt: skip
    claim_folder(folder, RewardRun(command="train-grm", settings=_plain(given), seed=seed))
    pairs = load_pairs(source, fields, videos_of(source, videos))
    grm = load_grm(base, settings)
    trainer = grm_trainer(grm, pairs, config, folder, seed, fingerprint(given))
    with progress.training("verdicts", config.updates, trainer.resume()) as report:
        run_trainer(trainer, report)
    _save(grm, folder / "grm")


def _save(grm: VideoGRM, path: Path) -> None:
    from ramet.policy.models.lora import merged
    from ramet.terminal import quiet

    state = merged(grm.model)
    with quiet():
        grm.model.save_pretrained(path, **({} if state is None else {"state_dict": state}))
    grm.tokenizer.save_pretrained(path)
    console.print(f"the VideoGRM is in {path}")


def score_job(model: str, seen: Seen, video: str | None, question: str, answers: Sequence[str], out: Path | None) -> None:
    """`ramet reward score`."""
    reward = open_reward(model, seen, {}, "score")
    items = [VideoAnswer(None if video is None else Segment(video), question, answer) for answer in answers]
    scores = reward.score(items)
    if out is not None:
        write_json(
            out, [meta("reward score", 0), *({"record": "score", "answer": a, "score": s} for a, s in zip(answers, scores, strict=True))]
        )
    for score, answer in sorted(zip(scores, answers, strict=True), reverse=True):
        console.print(f"{score:9.3f}  {answer}")


def judge_job(
    model: str,
    seen: Seen,
    settings: Mapping[str, Any],
    video: str | None,
    question: str,
    first: str,
    second: str,
    k: int,
    order: Order,
    seed: int,
) -> None:
    """`ramet reward judge`."""
    reward = open_reward(model, seen, settings)
    duel = AnswerPair("duel", None if video is None else Segment(video), question, first, second)
    verdict = (
        by_scores(reward, [duel], reward.settings.temperature)[0]
        if isinstance(reward, VideoDRM)
        else compare(reward, [duel], k, order, seed)[0]
    )
    for vote in verdict.votes:
        said = {True: "first", False: "second", None: "cannot be read"}[vote.a]
        shown = Text.assemble(("as given" if vote.forward else "swapped", "dim"), " → ", (said, "bold"), f": {vote.error or vote.said}")
        console.print(shown)
    if verdict.probability is not None:
        console.print(f"probability that the first is better: {verdict.probability:.3f}")
    winner = {"a": "the first answer", "b": "the second answer", None: "neither"}[verdict.winner]
    agreed = "" if verdict.consistent is None else " in both orders" if verdict.consistent else "; the orders differ"
    console.print(Text.assemble("better: ", (winner, "bold"), agreed))


def bench_job(
    model: str, source: str, videos: Path | None, fields: dict[str, str], protocol: Protocol, ks: Sequence[int], frames: Sequence[int],
    conditions: Sequence[str], limit: int | None, folder: Path, out: Path | None,
) -> None:  # fmt: skip
    """`ramet reward bench`: each number of frames and of votes is a protocol of its own, with a journal of its own."""
    found_pairs = load_pairs(source, fields, videos_of(source, videos))
    pairs = PreferencePairs(found_pairs[:limit], found_pairs.ties)
    given = {"model": model_id(model), "pairs": file_id(source), **_where(fields, videos), "limit": limit or 0}
    claim_folder(folder, RewardRun(command="bench", settings=_plain(given), seed=protocol.seed))
    _say_faults(pairs)
    write_text(folder / "pairs.jsonl", "".join(json.dumps(row_of(pair, videos_of(source, videos))) + "\n" for pair in pairs))
    records: list[dict[str, Any]] = [meta("reward bench", protocol.seed)]
    judged: list[dict[str, Any]] = []
    part: list[dict[str, Any]] = []
    for number in frames or [0]:
        seen = {name: value for name, value in (("frames", number), ("most", protocol.pixels)) if value}
        settings: dict[str, Any] = {"temperature": protocol.temperature, "max_tokens": protocol.max_tokens or 512}
        reward = open_reward(model, seen, settings, "score" if protocol.mode == "pointwise" else "", pairs)
        scored = isinstance(reward, VideoDRM) or protocol.mode == "pointwise"
        shown = reward.settings.look if hasattr(reward, "settings") else Look()
        for k in ks if not scored else ks[:1]:
            mode: Any = "pointwise" if scored else "pairwise"
            last = replace(
                protocol, mode=mode, k=k, frames=shown.frames, pixels=shown.most, max_tokens=None if scored else settings["max_tokens"]
            )
            path = folder / f"frames-{last.frames}-k-{k}-{last.order if not scored else 'scores'}.jsonl"
            with Journal(path, fingerprint(given, asdict(last))) as journal:
                if not journal.records:
                    journal.append({"protocol": protocol_record(last)})
                with progress.measuring(f"{reward.name}, {last.frames} frames, k={k}", len(pairs) * len(conditions)) as report:
                    judged = run_bench(reward, pairs, last, list(conditions), journal, report)
            found = results(judged, last.ties, last.seed)
            part = [protocol_record(last), *({**r, "frames": last.frames, "k": k} for r in found)]
            print_results(part)
            for said in warnings(found):
                console.print(tagged("note:", "yellow", said))
            records += part
    write_json(folder / "results.json", records)
    if out is not None:
        write_json(out, records)
    accuracy_bars(part, folder / "accuracy.png")
    lines = "; ".join(dict.fromkeys(r["line"] for r in records if r["record"] == "protocol"))
    intro = f"{len(pairs)} pairs. The picture is of the last protocol."
    pictures, wrong = [folder / "accuracy.png"], wrong_pairs(pairs, judged, misjudged(judged))
    write_page(folder / "report.html", f"{model} on {Path(source).name}", intro, lines, records, pictures, wrong)
    console.print(f"run folder {folder}: results.json, report.html, and what was said of each pair in *.jsonl")


def report_job(one: Path, other: Path | None, ties: float, out: Path | None) -> None:
    """`ramet reward report`: the numbers of a benchmark run from what was kept, without the model; of two runs, their difference."""
    runs = {path: results(_judged(path), ties) for folder in filter(None, (one, other)) for path in _journals(folder)}
    records = [{**r, "run": str(path)} for path, found in runs.items() for r in found]
    differences: list[tuple[str, dict[str, Any]]] = []
    if other is not None:
        here, there = ({path.name: path for path in _journals(folder)} for folder in (one, other))
        alike = [(here[name], there[name]) for name in sorted(set(here) & set(there))]
        for first, second in alike or [(next(iter(here.values())), next(iter(there.values())))]:
            said = f"{first.parent.name} less {second.parent.name}"
            differences += [(said, d) for d in against(_judged(first), _judged(second), ties)]
    if out is not None:
        write_json(out, [meta("reward report", 0), *records, *(d for _, d in differences)])
    for path, found in runs.items():
        console.print(Text(str(path), "bold"))
        print_results([*(r["protocol"] for r in read_records(path) if "protocol" in r), *found])
        for note in warnings(found):
            console.print(tagged("note:", "yellow", note))
    for said, d in differences:
        console.print(
            f"{d['condition']}: {said}: {d['difference']:+.3f} ({d['ci_low']:+.3f} to {d['ci_high']:+.3f}) on {d['n']} pairs, "
            f"sign test p = {d['p']:.4f}"
        )


def _journals(folder: Path) -> list[Path]:
    found = sorted(folder.glob("frames-*.jsonl"))
    if not found:
        raise ConfigError(f"{folder} holds no benchmark run (frames-*.jsonl); make one with `ramet reward bench`")
    return found


def _judged(path: Path) -> list[dict[str, Any]]:
    return [record for record in read_records(path) if "condition" in record]


def best_of_n_job(
    model: str, source: str, responses: str, videos: Path | None, fields: dict[str, str], seen: Seen, settings: Mapping[str, Any],
    ns: Sequence[int], method: str, k: int, seed: int, folder: Path, out: Path | None,
) -> None:  # fmt: skip
    """`ramet reward best-of-n`: curves on answers from a file, or from a model that is asked for the largest N."""
    questions = load_questions(source, fields, videos_of(source, videos))
    given = {
        "model": model_id(model), "questions": file_id(source), **_where(fields, videos), "method": method, "k": k,
        "responses": answerer_id(responses), "ns": list(ns), "seen": dict(seen), "settings": dict(settings),
    }  # fmt: skip
    claim_folder(folder, RewardRun(command="best-of-n", settings=_plain(given), seed=seed))
    answerer = _answerer(responses, seen)
    with Journal(folder / "answers.jsonl", fingerprint(given)) as journal:
        known = {r["id"]: r["answers"] for r in journal}
        for question in questions:
            if question.id not in known:
                try:
                    known[question.id] = answerer.answer([question], max(ns), seed)[0]
                except TaskError as error:  # a video that cannot be read now; asked again by the next run
                    console.print(tagged("note:", "yellow", f"question {question.id} is left out: {error}"))
                    continue
                journal.append({"id": question.id, "answers": known[question.id]}, keep=False)
    questions = [question for question in questions if question.id in known]
    candidates = []
    for question in questions:
        answers = tuple(known[question.id])
        stated, right = tuple(map(question.stated, answers)), tuple(map(question.right, answers))
        candidates.append(CandidateAnswers(question.id, question.shown, question.question, answers, stated, right))
    reward = open_reward(model, seen, settings)
    kind: Any = method
    picker = ScoreSelector(reward) if isinstance(reward, VideoDRM) else PairwiseSelector(reward, kind, k, seed)
    with progress.measuring(reward.name, len(candidates)) as report:
        found = best_of_n(candidates, {reward.name: picker}, ns, seed=seed, report=report)
    records = [meta("reward best-of-n", seed), *found]
    if out is not None:
        write_json(out, records)
    write_json(folder / "results.json", records)
    best_of_n_curves(records, folder / "best-of-n.png")
    print_results(records)
    console.print(f"run folder {folder}: results.json, best-of-n.png, answers.jsonl")


def _say_faults(pairs: Sequence[PreferencePair], most: int = 5) -> None:
    found = faults(pairs)
    for fault in found[:most]:
        console.print(tagged("note:", "yellow", fault))
    if len(found) > most:
        console.print(tagged("note:", "yellow", f"and {len(found) - most} more"))


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is None, for TOML."""
    found = {}
    for name, value in settings.items():
        if value is not None:
            found[name] = _plain(value) if isinstance(value, Mapping) else list(value) if isinstance(value, tuple) else value
    return found
