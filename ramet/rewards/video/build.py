"""Builds preference pairs from videos and questions with checkable answers, in seven stages; each counts what it keeps and drops, and why.

    1 prompts      videos that can be read and are not too long; no question that is answered without the video, or by a weak model
    2 rollouts     several answers to each question from each answerer
    3 verify       right or wrong by rule; questions that all or none answer are put aside
    4 pair         one right and one wrong answer, alike in length and from the same answerer where there is one
    5 judge        kept if a judge prefers the right one in both orders, and its score is higher; what cannot be read drops the pair
    6 negatives    questions that all answer rightly get a wrong answer by changing what it states, if it can be told with the video only
    7 clean        no duplicates, nothing of the benchmarks; a datasheet

Stages 5 and 6 apply the judges that they are given, and the datasheet says which. An interrupted run resumes: answers and
verdicts are kept in a journal. The stages of the pipeline in arXiv 2605.07872 are not public; these are our own design.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ramet.agents.journal import Journal
from ramet.agents.tree import Segment
from ramet.errors import TaskError
from ramet.media.frames import content_id, read_frames
from ramet.rewards.video.discriminative import VideoAnswer
from ramet.rewards.video.judge import AnswerPair, PairwiseJudge, VideoRewardModel, compare
from ramet.rewards.video.pairs import PreferencePair, readable
from ramet.rewards.video.questions import VideoQuestion

LONGEST = 600.0
"""Seconds of a video."""
TRIES = 6
"""Changed answers that are tried for a question."""


class Answerer(Protocol):
    """Something that answers questions about videos: a model, a server, a file of answers."""

    @property
    def name(self) -> str:
        """The source of its answers, as recorded in the pairs."""
        ...

    def answer(self, questions: Sequence[VideoQuestion], n: int, seed: int, blind: bool = False) -> list[list[str]]:
        """`n` answers to each question; `blind`: without its video."""


@dataclass(frozen=True)
class BuildConfig:
    """Settings of the pipeline.

    n           answers of each answerer to each question
    blind       answers without the video that are asked for, to drop questions that do not need it; 0: none
    easy        share of right answers from which on a question counts as answered
    per_question  pairs of one question at most
    """

    n: int = 8
    blind: int = 4
    easy: float = 1.0
    per_question: int = 2
    at_once: int = 16
    seed: int = 0


@dataclass
class StageCounts:
    """How many items entered and left each stage, and why the others were dropped, for the datasheet."""

    stages: dict[str, dict[str, int]] = field(default_factory=dict)

    def stage(self, name: str, before: int, after: int, dropped: Counter[str]) -> None:
        """Record a stage: how many items came in and are left, and how many were dropped for each reason."""
        self.stages[name] = {"in": before, "out": after, **dict(sorted(dropped.items()))}


@dataclass(frozen=True)
class SampledAnswer:
    """One sampled answer."""

    text: str
    source: str
    right: bool


class PairBuilder:
    """One run of the pipeline. `judge` also judges without the video; see stage 6."""

    def __init__(
        self, questions: Sequence[VideoQuestion], answerers: Sequence[Answerer], config: BuildConfig, journal: Journal,
        judge: PairwiseJudge | None = None, scores: VideoRewardModel | None = None, weak: Answerer | None = None,
        benchmarks: Sequence[PreferencePair] = (), report: Callable[[str, int, int], None] | None = None,
    ):  # fmt: skip
        if not answerers:
            raise TaskError("pairs need answers: name an answerer")
        self.questions, self.answerers, self.config, self.journal = questions, answerers, config, journal
        self.judge, self.scores, self.weak, self.benchmarks = judge, scores, weak, benchmarks
        self.unseen = 0
        """Benchmark pairs that name no video, or one that cannot be read: only copies of their questions are found."""
        self.counts = StageCounts()
        self._report = report or (lambda stage, done, total: None)
        self._known = {(r["stage"], r["key"]): r["value"] for r in journal}

    def run(self) -> list[PreferencePair]:
        """Run all stages; `counts` and `sheet` then hold their statistics."""
        questions = self._prompts()
        answers = self._rollouts(questions)
        mixed, easy = self._verify(questions, answers)
        pairs = self._judged(self._paired(mixed, answers), "5 judge")
        pairs += self._negatives(easy, answers)
        return self._clean(pairs)

    def _kept(self, stage: str, keys: Sequence[str], make: Callable[[list[int]], Iterable[Any]]) -> list[Any]:
        """A value for each key: those in the journal, and those that `make` gives for the places that are missing, kept as they come."""
        missing = [n for n, key in enumerate(keys) if (stage, key) not in self._known]
        self._report(stage, len(keys) - len(missing), len(keys))
        for start in range(0, len(missing), self.config.at_once):
            part = missing[start : start + self.config.at_once]
            for n, value in zip(part, make(part), strict=True):
                self.journal.append({"stage": stage, "key": keys[n], "value": value}, keep=False)
                self._known[stage, keys[n]] = value
            self._report(stage, len(keys) - len(missing) + start + len(part), len(keys))
        return [self._known[stage, key] for key in keys]

    def _answers(
        self, stage: str, number: int, answerer: Answerer, questions: Sequence[VideoQuestion], n: int, blind: bool = False
    ) -> list[list[str]]:
        keys = [f"{number}/{answerer.name}/{q.id}" for q in questions]  # two may have one name
        return self._kept(stage, keys, lambda part: answerer.answer([questions[i] for i in part], n, self.config.seed, blind))

    def _prompts(self) -> list[VideoQuestion]:
        dropped: Counter[str] = Counter()
        readable = []
        for question, fault in zip(self.questions, self._faults(), strict=True):
            if fault:
                dropped[fault] += 1
            else:
                readable.append(question)
        left = readable
        if self.config.blind:
            for number, answerer in enumerate(self.answerers):
                answers = self._answers("blind", number, answerer, left, self.config.blind, blind=True)
                left = self._not_easy(left, answers, "answered without the video", dropped)
        if self.weak is not None:
            answers = self._answers("weak", 0, self.weak, left, self.config.blind or 4)
            left = self._not_easy(left, answers, "answered by the weak model", dropped)
        self.counts.stage("1 prompts", len(self.questions), len(left), dropped)
        return left

    def _faults(self) -> list[str]:
        """What is wrong with each question's video. Checked anew in every run, since a missing video may have been added."""
        faults = []
        for number, question in enumerate(self.questions, 1):
            video = question.shown
            try:
                seconds = read_frames(Path(video.file), 4, video.start, video.end).seconds * 4
                faults.append(f"longer than {LONGEST:g} s" if seconds > LONGEST else "")
            except TaskError:
                faults.append("video cannot be read")
            self._report("readable", number, len(self.questions))
        return faults

    def _not_easy(
        self, questions: Sequence[VideoQuestion], sampled: Sequence[list[str]], reason: str, dropped: Counter[str]
    ) -> list[VideoQuestion]:
        left = [q for q, answers in zip(questions, sampled, strict=True) if sum(map(q.right, answers)) < self.config.easy * len(answers)]
        dropped[reason] += len(questions) - len(left)
        return left

    def _rollouts(self, questions: Sequence[VideoQuestion]) -> dict[str, list[SampledAnswer]]:
        answers: dict[str, list[SampledAnswer]] = {q.id: [] for q in questions}
        for number, answerer in enumerate(self.answerers):
            for question, texts in zip(questions, self._answers("rollout", number, answerer, questions, self.config.n), strict=True):
                answers[question.id] += [SampledAnswer(text, answerer.name, question.right(text)) for text in texts if text.strip()]
        total = len(questions) * len(self.answerers) * self.config.n
        made = sum(map(len, answers.values()))
        self.counts.stage("2 rollouts", total, made, Counter({"empty": total - made}))
        return answers

    def _verify(
        self, questions: Sequence[VideoQuestion], answers: dict[str, list[SampledAnswer]]
    ) -> tuple[list[VideoQuestion], list[VideoQuestion]]:
        shares = {q.id: {a.right for a in answers[q.id]} for q in questions}
        mixed = [q for q in questions if shares[q.id] == {True, False}]
        easy = [q for q in questions if shares[q.id] == {True}]
        dropped = Counter({"all right (see 6)": len(easy), "none right": len(questions) - len(mixed) - len(easy)})
        self.counts.stage("3 verify", len(questions), len(mixed), dropped)
        return mixed, easy

    def _paired(self, questions: Sequence[VideoQuestion], answers: dict[str, list[SampledAnswer]]) -> list[PreferencePair]:
        pairs, lonely = [], 0
        for question in questions:
            right = _distinct(a for a in answers[question.id] if a.right)
            wrong = _distinct(a for a in answers[question.id] if not a.right)
            ranked = sorted(
                ((_unlike(r, w), i, j) for i, r in enumerate(right) for j, w in enumerate(wrong)), key=lambda item: (item[0], item[1:])
            )
            used: set[tuple[str, int]] = set()
            made = 0
            for _, i, j in ranked:
                if made == self.config.per_question or {("r", i), ("w", j)} & used:
                    continue
                used |= {("r", i), ("w", j)}
                pairs.append(_pair(question, f"{question.id}-{made}", right[i].text, wrong[j]))
                made += 1
            lonely += made == 0
        self.counts.stage("4 pair", len(questions), len(pairs), Counter({"questions without a pair": lonely}))
        return pairs

    def _judged(self, pairs: list[PreferencePair], stage: str) -> list[PreferencePair]:
        dropped: Counter[str] = Counter()
        left = list(pairs)
        if self.judge is not None:
            verdicts = self._verdicts("judge", self.judge, left, blind=False)
            dropped.update(v for v in verdicts if v != "a")
            left = [pair for pair, v in zip(left, verdicts, strict=True) if v == "a"]
        if self.scores is not None:
            higher = self._higher(left)
            dropped["score not higher"] += higher.count(False)
            left = [pair for pair, good in zip(left, higher, strict=True) if good]
        self.counts.stage(stage, len(pairs), len(left), dropped)
        return left

    def _higher(self, pairs: list[PreferencePair]) -> list[bool]:
        assert self.scores is not None
        scores = self.scores

        def make(part: list[int]) -> list[bool]:
            items = [VideoAnswer(pairs[i].video, pairs[i].question, a) for i in part for a in (pairs[i].chosen, pairs[i].rejected[0])]
            values = scores.score(items)
            return [a > b for a, b in zip(values[::2], values[1::2], strict=True)]

        return self._kept("score", [pair.id for pair in pairs], make)

    def _verdicts(self, stage: str, judge: PairwiseJudge, pairs: list[PreferencePair], blind: bool) -> list[str]:
        """For each pair, "a" if the right answer wins in both orders, else why it does not."""

        def make(part: list[int]) -> list[str]:
            duels = [AnswerPair(p.id, None if blind else p.video, p.question, p.chosen, p.rejected[0]) for p in (pairs[i] for i in part)]
            outcomes = []
            for verdict in compare(judge, duels, 1, "both", self.config.seed):
                if verdict.invalid:
                    outcomes.append("judge's output cannot be read")
                elif not verdict.consistent:
                    outcomes.append("judge differs by order")
                else:
                    outcomes.append("a" if verdict.winner == "a" else "judge prefers the wrong answer")
            return outcomes

        return self._kept(stage, [pair.id for pair in pairs], make)

    def _negatives(self, questions: Sequence[VideoQuestion], answers: dict[str, list[SampledAnswer]]) -> list[PreferencePair]:
        """Each question's right answer beside one with another statement, the first of a few tries that passes the gates."""
        waiting = {q.id: self._changed(q, answers[q.id]) for q in questions}
        accepted: dict[str, PreferencePair] = {}
        dropped: Counter[str] = Counter()
        for attempt in range(TRIES):
            tried = [(i, tries[attempt]) for i, tries in waiting.items() if i not in accepted and attempt < len(tries)]
            if not tried:
                break
            pairs = [pair for _, pair in tried]
            passed = [True] * len(pairs)
            if self.judge is not None:
                with_video = self._verdicts("negative, seen", self.judge, pairs, blind=False)
                without_video = self._verdicts("negative, blind", self.judge, pairs, blind=True)
                passed = [seen == "a" and guessed != "a" for seen, guessed in zip(with_video, without_video, strict=True)]
                dropped["tries told without the video"] += without_video.count("a")
                dropped["tries not told with the video"] += sum(verdict != "a" for verdict in with_video)
            accepted |= {i: pair for (i, pair), good in zip(tried, passed, strict=True) if good}
        dropped["questions without one"] = len(questions) - len(accepted)
        self.counts.stage("6 negatives", len(questions), len(accepted), dropped)
        return list(accepted.values())

    def _changed(self, question: VideoQuestion, answers: Sequence[SampledAnswer]) -> list[PreferencePair]:
        """Right answers in which every mention of what they state is another choice's."""
        stated = question.stated(f"Answer: {question.answer}")
        others = [c for c in question.choices if c != stated]
        rng = random.Random(f"negatives/{self.config.seed}/{question.id}")
        rng.shuffle(others)
        made = []
        for attempt, other in enumerate(others[:TRIES]):
            answer = answers[attempt % len(answers)]
            text = re.sub(rf"(?<!\w){re.escape(str(stated))}(?!\w)", partial(_just, other), answer.text, flags=re.IGNORECASE)
            if text != answer.text and not question.right(text):
                made.append(
                    _pair(
                        question, f"{question.id}-changed-{attempt}", answer.text, SampledAnswer(text, f"{answer.source}, changed", False)
                    )
                )
        return made

    def _clean(self, pairs: list[PreferencePair]) -> list[PreferencePair]:
        dropped: Counter[str] = Counter()
        thumbnails: dict[Segment, np.ndarray] = {}

        def read(segment: Segment) -> None:
            thumbnails[segment] = _thumbnail(segment)

        self.unseen = len(readable(self.benchmarks, read)[1]) + sum(b.video is None for b in self.benchmarks)
        contents = {content_id(Path(segment.file)) for segment in thumbnails}
        benchmark_thumbnails = np.stack(list(thumbnails.values())) if thumbnails else np.empty((0, 768), dtype=np.float32)
        spans = {span for b in self.benchmarks for span in _spans(b.question)}
        known: set[tuple[Any, ...]] = set()
        left = []
        for pair in pairs:
            assert isinstance(pair.video, Segment)
            content = content_id(Path(pair.video.file))
            same = (
                content,
                pair.video.start,
                pair.video.end,
                *(" ".join(t.lower().split()) for t in (pair.question, pair.chosen, pair.rejected[0])),
            )
            if same in known:
                dropped["duplicates"] += 1
            elif content in contents:
                dropped["video of a benchmark"] += 1
            elif len(benchmark_thumbnails) and float(np.abs(benchmark_thumbnails - _thumbnail(pair.video)).mean(axis=1).min()) < 1.5:
                dropped["video like one of a benchmark"] += 1
            elif spans & set(_spans(pair.question)):
                dropped["question of a benchmark"] += 1
            else:
                left.append(pair)
            known.add(same)
        self.counts.stage("7 clean", len(pairs), len(left), dropped)
        return left

    def sheet(self, pairs: Sequence[PreferencePair]) -> dict[str, Any]:
        """The datasheet, as numbers."""
        words = [(len(p.chosen.split()), len(p.rejected[0].split())) for p in pairs]
        mean = [sum(w[side] for w in words) / max(len(words), 1) for side in (0, 1)]
        return {
            "pairs": len(pairs),
            "videos": len({p.cluster for p in pairs}),
            "categories": dict(Counter(p.category or "none" for p in pairs)),
            "sources": dict(Counter(p.source for p in pairs)),
            "words_chosen": mean[0],
            "words_rejected": mean[1],
            "chosen_longer": sum(a > b for a, b in words) / max(len(words), 1),
            "answerers": [a.name for a in self.answerers],
            "judge": None if self.judge is None else self.judge.name,
            "score_model": None if self.scores is None else self.scores.name,
            "weak_model": None if self.weak is None else self.weak.name,
            "benchmarks": len(self.benchmarks),
            "benchmarks_unseen": self.unseen,
            "stages": self.counts.stages,
        }


def datasheet(sheet: dict[str, Any]) -> str:
    """The datasheet as Markdown."""
    lines = ["# Preference pairs", "", f"{sheet['pairs']} pairs about {sheet['videos']} videos, made by `ramet reward build-pairs`.", ""]
    lines += ["| stage | in | out | not kept, and why |", "|---|---|---|---|"]
    for name, counts in sheet["stages"].items():
        why = "; ".join(f"{reason} {n}" for reason, n in counts.items() if reason not in ("in", "out") and n)
        lines.append(f"| {name} | {counts['in']} | {counts['out']} | {why} |")
    lines += ["", f"Mean words: chosen {sheet['words_chosen']:.1f}, rejected {sheet['words_rejected']:.1f}; "]
    lines[-1] += f"the chosen answer has more words in {sheet['chosen_longer']:.0%} of the pairs."
    for name in ("answerers", "categories", "sources"):
        listed = sheet[name] if isinstance(sheet[name], list) else [f"{key} {n}" for key, n in sheet[name].items()]
        lines += ["", f"{name.capitalize()}: {', '.join(listed)}."]
    judges = {"judge": sheet["judge"], "score model": sheet["score_model"], "weak model": sheet["weak_model"]}
    lines += ["", *(f"No {what}: what it would have filtered is in." for what, name in judges.items() if name is None)]
    lines += [f"{what.capitalize()}: {name}." for what, name in judges.items() if name is not None]
    lines += [
        f"Cleaned of {sheet['benchmarks']} benchmark pairs." if sheet["benchmarks"] else "Not cleaned of any benchmark: none was named."
    ]
    if sheet["benchmarks_unseen"]:
        lines += [f"{sheet['benchmarks_unseen']} of them name no video, or one that cannot be read: copies of it are not found."]
    return "\n".join(lines) + "\n"


def _pair(question: VideoQuestion, name: str, chosen: str, rejected: SampledAnswer) -> PreferencePair:
    return PreferencePair(name, question.shown, question.question, chosen, (rejected.text,), question.category, rejected.source)


def _just(text: str, match: re.Match[str]) -> str:
    """A replacement for `re.sub` in which backslashes have no meaning."""
    return text


def _distinct(answers: Iterable[SampledAnswer]) -> list[SampledAnswer]:
    """The answers without repetitions of a text."""
    return list({a.text: a for a in answers}.values())


def _unlike(a: SampledAnswer, b: SampledAnswer) -> float:
    """How much two answers differ in what should not count: their length in words, and the answerer."""
    return abs(len(a.text.split()) - len(b.text.split())) + (8.0 if a.source != b.source else 0.0)


def _spans(question: str, words: int = 13) -> list[tuple[str, ...]]:
    """All runs of 13 words; two questions share one only if one was taken from the other."""
    tokens = re.findall(r"\w+", question.lower())
    return [tuple(tokens[i : i + words]) for i in range(len(tokens) - words + 1)]


def _thumbnail(segment: Segment) -> np.ndarray:
    """(768,) grey levels of three frames, shrunk: close for copies that were encoded anew."""
    from PIL import Image

    frames = read_frames(Path(segment.file), 3, segment.start, segment.end).pixels
    small = [np.asarray(Image.fromarray(frame).convert("L").resize((16, 16), Image.Resampling.BOX), dtype=np.float32) for frame in frames]
    return np.stack(small).reshape(-1)
