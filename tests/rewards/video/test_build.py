"""The pipeline on drawn clips: each stage drops what it is to drop, a killed run goes on, and nothing of a benchmark gets through."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ramet.agents.journal import Journal
from ramet.agents.tree import Segment
from ramet.errors import TaskError
from ramet.media.clips import draw_clip, write_clip
from ramet.rewards.video.answerers import Guesser, RecordedAnswers
from ramet.rewards.video.build import BuildConfig, PairBuilder, datasheet
from ramet.rewards.video.fakes import FakeJudge, fake_judge, valid_output
from ramet.rewards.video.pairs import PreferencePair, below, faults, load_pairs, row_of
from ramet.rewards.video.questions import VideoQuestion, load_questions

CONFIG = BuildConfig(n=4, blind=2, per_question=1)


def build(
    questions: Sequence[VideoQuestion], path: Path, answerer: Any = None, config: BuildConfig = CONFIG, **more: Any
) -> tuple[PairBuilder, list[PreferencePair]]:
    with Journal(path, "build") as journal:
        made = PairBuilder(questions, [answerer or Guesser()], config, journal, **more)
        return made, made.run()


class Says:
    """Answers by a function of question and number; `blind` gives its answer without the video."""

    def __init__(self, rule: Any, blind: Any = lambda q, n: "Answer: nothing", name: str = "says"):
        self.rule, self.blind, self.name, self.asked = rule, blind, name, 0

    def answer(self, questions: Sequence[VideoQuestion], n: int, seed: int, blind: bool = False) -> list[list[str]]:
        self.asked += len(questions)
        return [[(self.blind if blind else self.rule)(q, i) for i in range(n)] for q in questions]


def wrong(q: VideoQuestion) -> str:
    return next(c for c in q.choices if c != q.answer)


def test_pairs_have_one_right_and_one_wrong_answer(questions: list, tmp_path: Path) -> None:
    made, pairs = build(questions, tmp_path / "j.jsonl")
    by_id = {q.id: q for q in questions}
    assert len(pairs) > 60
    for pair in pairs:
        question = next(q for i, q in by_id.items() if pair.id.startswith(f"{i}-"))
        assert question.right(pair.chosen)
        assert not question.right(pair.rejected[0])
    stages = made.counts.stages
    assert list(stages) == ["1 prompts", "2 rollouts", "3 verify", "4 pair", "5 judge", "6 negatives", "7 clean"]
    for name, counts in stages.items():
        if name not in ("2 rollouts", "4 pair", "6 negatives"):
            assert counts["in"] - counts["out"] == sum(n for why, n in counts.items() if why not in ("in", "out")), name
    sheet = made.sheet(pairs)
    assert f"{len(pairs)} pairs" in datasheet(sheet)
    assert "No judge" in datasheet(sheet)
    root = Path(questions[0].video.file).parent
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row_of(pair, root)) + "\n" for pair in pairs))
    assert load_pairs(str(tmp_path / "pairs.jsonl"), videos=root) == pairs


def test_what_is_answered_without_the_video_and_what_cannot_be_read_is_dropped(questions: list, tmp_path: Path) -> None:
    known = {q.id for q in questions[:10]}
    answerer = Says(
        lambda q, n: f"Answer: {q.answer if n % 2 else wrong(q)}", lambda q, n: f"Answer: {q.answer}" if q.id in known else "I cannot see."
    )
    broken = tmp_path / "broken.mp4"
    broken.write_text("no video")
    asked = [
        *questions[:30],
        replace(questions[30], video=Segment(str(broken))),
        replace(questions[31], video=Segment(str(tmp_path / "no.mp4"))),
    ]
    made, pairs = build(asked, tmp_path / "j.jsonl", answerer)
    assert made.counts.stages["1 prompts"] == {"in": 32, "out": 20, "answered without the video": 10, "video cannot be read": 2}
    assert len(pairs) == 20
    weak = Says(lambda q, n: f"Answer: {q.answer}")
    assert build(questions[:5], tmp_path / "w.jsonl", answerer, BuildConfig(blind=0), weak=weak)[0].counts.stages["1 prompts"]["out"] == 0


def test_answers_that_are_paired_are_alike(questions: list, tmp_path: Path) -> None:
    """Of two wrong answers the one as long as the right one."""
    question = questions[0]
    said = [
        f"Answer: {question.answer}",
        f"Let me think about this for a while.\nAnswer: {wrong(question)}",
        f"Answer: {wrong(question)}",
        "",
    ]
    _, pairs = build([question], tmp_path / "j.jsonl", Says(lambda q, n: said[n]), replace(CONFIG, blind=0))
    assert [p.rejected for p in pairs] == [(said[2],)]
    made, pairs = build([question], tmp_path / "k.jsonl", Says(lambda q, n: said[n]), replace(CONFIG, blind=0, per_question=3))
    assert len(pairs) == 1  # no answer twice
    assert made.counts.stages["2 rollouts"]["empty"] == 1


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("always-first", "judge differs by order"),
        ("malformed", "judge's output cannot be read"),
        ("raising", "judge's output cannot be read"),
        ("oracle", ""),
    ],
)
def test_a_judge_must_agree_in_both_orders(questions: list, tmp_path: Path, name: str, reason: str) -> None:
    _, pairs = build(questions, tmp_path / "all.jsonl", config=replace(CONFIG, easy=2.0))
    judge = fake_judge(name, {p.id: p.chosen for p in pairs})
    made, kept = build(questions, tmp_path / "judged.jsonl", config=replace(CONFIG, easy=2.0), judge=judge)
    stage = made.counts.stages["5 judge"]
    if name == "oracle":
        assert stage["out"] == stage["in"]
    else:
        assert not [p for p in kept if "changed" not in p.id]
        assert stage[reason] == stage["in"]


def test_scores_must_agree(questions: list, tmp_path: Path) -> None:
    class Longer:
        name = "longer"

        def score(self, items: Any) -> list[float]:
            return [float(len(i.answer)) for i in items]

    made, pairs = build(questions, tmp_path / "j.jsonl", scores=Longer())
    assert all(len(p.chosen) > len(p.rejected[0]) for p in pairs if "changed" not in p.id)
    assert made.counts.stages["5 judge"]["score not higher"] > 0


def test_changed_answers_must_need_the_video(questions: list, tmp_path: Path) -> None:
    """A judge that sees prefers the right one, and one that does not see must not: here it can tell "red" from the words alone."""
    colours = [q for q in questions if q.category == "colour"]
    answerer = Says(lambda q, n: f"It is {q.answer.upper()}, I think.\nAnswer: {q.answer}")

    def rule(shown: Any, rng: Any) -> str:
        truth = next(q.answer for q in colours if shown.id.startswith(f"{q.id}-"))
        told = shown.video is not None or "red" in (truth, shown.first.split()[-1], shown.second.split()[-1])
        return valid_output((1 if shown.first.endswith(truth) else 2) if told else 1)

    made, pairs = build(colours, tmp_path / "j.jsonl", answerer, replace(CONFIG, blind=0), judge=FakeJudge("sees", rule))
    assert pairs
    for pair in pairs:
        stated = pair.rejected[0].split()[-1]
        assert stated != "red"
        assert "red" not in pair.chosen
        assert f"It is {stated}, I think." in pair.rejected[0]  # every mention is changed
    stage = made.counts.stages["6 negatives"]
    assert stage["tries told without the video"] > 0
    assert stage["in"] - stage["out"] == stage["questions without one"] == sum(q.answer == "red" for q in colours)


def test_nothing_of_a_benchmark_gets_through(questions: list, tmp_path: Path) -> None:
    """The same file under another name, the same clip encoded anew, and a question that was taken over."""
    config = replace(CONFIG, easy=2.0)
    _, pairs = build(questions, tmp_path / "j.jsonl", config=config)
    copy = tmp_path / "copy.mp4"
    shutil.copy(pairs[0].video.file, copy)  # type: ignore[union-attr]
    made, clean = build(questions, tmp_path / "k.jsonl", config=config, benchmarks=[replace(pairs[0], video=Segment(str(copy)))])
    same = [p for p in pairs if p.video == pairs[0].video]
    assert made.counts.stages["7 clean"]["video of a benchmark"] == len(same)
    assert pairs[0].video not in [p.video for p in clean]
    from ramet.media.frames import read_frames

    again = tmp_path / "again.mp4"
    write_clip(again, read_frames(Path(pairs[1].video.file), 8).pixels, rate=4)  # type: ignore[union-attr]
    made, clean = build(questions, tmp_path / "l.jsonl", config=config, benchmarks=[replace(pairs[1], video=Segment(str(again)))])
    assert made.counts.stages["7 clean"]["video like one of a benchmark"] >= 1
    assert pairs[1].video not in [p.video for p in clean]
    gone = replace(pairs[2], video=Segment(str(tmp_path / "gone.mp4")))
    both = replace(pairs[0], video=(gone.video, pairs[0].video))
    made, clean = build(questions, tmp_path / "o.jsonl", config=config, benchmarks=[gone, both])
    assert made.counts.stages["7 clean"]["video of a benchmark"] == len(same)
    assert "2 of them name no video, or one that cannot be read" in datasheet(made.sheet(clean))
    long = "Which of the people who walk by the shop window in the morning carries an umbrella of two colours today?"
    asked = [replace(questions[0], question=long), *questions[1:]]
    without = build(asked, tmp_path / "n.jsonl", config=config)[1]
    made, _ = build(asked, tmp_path / "m.jsonl", config=config, benchmarks=[PreferencePair("b", None, f"Well: {long}", "x", ("y",))])
    assert made.counts.stages["7 clean"].get("question of a benchmark", 0) == sum(p.question == long for p in without)


def test_a_run_that_was_cut_off_asks_nothing_twice(questions: list, tmp_path: Path) -> None:
    def rule(q: VideoQuestion, n: int) -> str:
        return f"Answer: {q.answer if n % 2 else wrong(q)}"

    whole = Says(rule)
    _, expected = build(questions, tmp_path / "whole.jsonl", whole)
    first = Says(rule)

    def stop(stage: str, n: int, total: int) -> None:
        if stage == "rollout" and n >= 32:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(questions, tmp_path / "cut.jsonl", first, report=stop)
    second = Says(rule)
    made, pairs = build(questions, tmp_path / "cut.jsonl", second)
    assert pairs == expected
    assert first.asked + second.asked == whole.asked
    assert second.asked < whole.asked
    assert made.counts.stages["2 rollouts"]["out"] == 4 * len(questions)


def test_recorded_answers(questions: list, tmp_path: Path) -> None:
    path = tmp_path / "said.jsonl"
    rows = [{"id": q.id, "response": f"Answer: {a}"} for q in questions[:6] for a in (q.answer, wrong(q))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, pairs = build(questions[:6], tmp_path / "j.jsonl", RecordedAnswers(str(path)), replace(CONFIG, blind=0))
    assert len(pairs) == 6
    with pytest.raises(TaskError, match="has no answers to 1 questions"):
        RecordedAnswers(str(path)).answer(questions[6:7], 1, 0)
    path.write_text(json.dumps({"id": questions[0].id, "response": "x", "blind": "False"}) + "\n")
    assert RecordedAnswers(str(path)).answer(questions[:1], 1, 0) == [["x"]], "what says that it is not blind is not"
    for broken in ({"id": None}, {"response": None}, {"blind": "perhaps"}):
        path.write_text(json.dumps({"id": "q", "response": "x", **broken}) + "\n")
        with pytest.raises(TaskError, match=f"row 1, column '{next(iter(broken))}': should be"):
            RecordedAnswers(str(path))


@pytest.mark.parametrize(
    ("said", "stated"),
    [
        ("Answer: red", "red"),
        ("It could be blue.\nAnswer: **Red.**", "red"),
        ("Answer: A", "red"),
        ("Answer: (B)", "blue"),
        ("Answer: B. blue", "blue"),
        ("Answer: B. red", "b red"),
        ("Answer: C", "c"),
        ("Answer: a red", "red"),
        ("<think>Answer: blue</think>Answer: red", "red"),
        ("", None),
    ],
)
def test_what_an_answer_states(said: str, stated: str | None) -> None:
    question = VideoQuestion("q", Segment("v.mp4"), "What?", "red", ("red", "blue"))
    assert question.stated(said) == stated
    assert question.right(said) == (stated == "red")


def test_numbers_and_words() -> None:
    question = VideoQuestion("q", Segment("v.mp4"), "How many?", "3")
    assert [question.right(f"Answer: {a}") for a in ("3", "3.0", "6/2", "three", "4")] == [True, True, False, False, False]
    question = VideoQuestion("q", Segment("v.mp4"), "Who?", "The cat")
    assert [question.right(f"Answer: {a}") for a in ("cat", "a cat!", "the dog", "")] == [True, True, False, False]


def test_rows_that_are_broken_are_named(clips: Path, tmp_path: Path) -> None:
    row = json.loads((clips / "questions.jsonl").read_text().splitlines()[0])
    for change, said in (
        ({"answer": "mauve"}, "not among its choices"),
        ({"video": None}, "names no video"),
        ({"video": "../../etc/passwd"}, "outside of the folder"),
        ({"question": " "}, "not text"),
        ({"choices": "red"}, "not a list"),
    ):
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps(row | change) + "\n")
        with pytest.raises(TaskError, match=said):
            load_questions(str(path), videos=clips)
    path.write_text(2 * (json.dumps(row) + "\n"))
    with pytest.raises(TaskError, match="more than once"):
        load_questions(str(path), videos=clips)
    pair = {"id": "1", "video": "v.mp4", "question": "q", "chosen": "a", "rejected": "b"}
    for change, said in (
        ({"rejected": "a"}, "has no pair: all of its 1 rows are ties"),
        ({"rejected": []}, "one answer; a preference takes two"),
        ({"chosen": ""}, "not text"),
        ({"video": "/etc/passwd"}, "outside"),
        ({"responses": ["a", "b"], "rankings": [1, 1]}, "all of its 1 rows are ties"),
        ({"responses": ["a", "b"], "rankings": [1, 2, 3]}, "2 responses and 3 ratings or ranks"),
    ):
        path.write_text(json.dumps(pair | change) + "\n")
        with pytest.raises(TaskError, match=said):
            load_pairs(str(path))
    path.write_text(json.dumps({"id": "1", "question": "q", "responses": ["x", "y", "z"], "rankings": [3, 1, 2]}) + "\n")
    blind = load_pairs(str(path), {"video": "none"})
    assert (blind[0].chosen, blind[0].rejected) == ("y", ("x", "z"))
    path.write_text(json.dumps({"prompt": "q", "good": {"text": "x"}, "bad": "y"}) + "\n")
    assert load_pairs(str(path), {"question": "prompt", "chosen": "good.text", "rejected": "bad", "video": "none"})[0].chosen == "x"
    with pytest.raises(TaskError, match="outside"):
        below(tmp_path, "a\0b")


def test_a_length_that_gives_the_answer_away_is_noted() -> None:
    biased = [PreferencePair(str(n), None, "q", "a long answer", ("short",)) for n in range(40)]
    assert "longer one in 100%" in faults(biased)[0]
    fair = [PreferencePair(str(n), None, "q", *(("aa", ("b",)) if n % 2 else ("a", ("bb",)))) for n in range(40)]
    assert not faults(fair)
    missing = [replace(fair[0], video=Segment("none.mp4"))]
    assert faults(missing) == ["pair 0: there is no video none.mp4"]


def test_clips_show_what_they_say(tmp_path: Path) -> None:
    """Read back from their files: the order's halves, and the number of white squares."""
    from ramet.media.clips import COLOURS
    from ramet.media.frames import read_frames

    for n in range(12):
        drawn = draw_clip("order", random.Random(n))
        path = tmp_path / f"{n}.mp4"
        write_clip(path, drawn.frames)
        frames = read_frames(path, 2).pixels.astype(int)
        place = np.abs(drawn.frames[0].astype(int) - COLOURS[drawn.answer]).sum(-1) == 0
        assert place.sum() == 400
        assert np.abs(frames[0][place].mean(0) - COLOURS[drawn.answer]).max() < 25
        other = next(c for c in drawn.choices if c != drawn.answer)
        assert np.abs(frames[1][place].mean(0) - COLOURS[other]).max() < 25
        drawn = draw_clip("count", random.Random(n))
        white = (drawn.frames[0] == 240).all(-1)
        assert white.sum() == 400 * int(drawn.answer)


def test_choices_that_punctuation_tells_apart() -> None:
    """As written first, then as numbers; what punctuation alone tells apart is never guessed."""
    for choices, said, stated in (
        (("1.5", "15"), "15", "15"),
        (("1.5", "15"), "1.50", "1.5"),
        (("-3", "3"), "3", "3"),
        (("-3", "3"), "-3.", "-3"),
        (("C++", "C"), "c", "C"),
        (("0.5", "0.7"), "1/2", "0.5"),
        (("U.S.", "US"), "u s", "u s"),
    ):
        assert VideoQuestion("q", Segment("v.mp4"), "?", choices[0], choices).stated(f"Answer: {said}") == stated, said


def test_two_answerers_of_one_name_are_two(questions: list, tmp_path: Path) -> None:
    right, other = Says(lambda q, n: f"Answer: {q.answer}", name="grm"), Says(lambda q, n: f"Answer: {wrong(q)}", name="grm")
    with Journal(tmp_path / "j.jsonl", "build") as journal:
        made = PairBuilder(questions[:12], [right, other], replace(CONFIG, blind=0), journal)
        pairs = made.run()
    assert made.counts.stages["3 verify"]["out"] == len(pairs) == 12


def test_windows_of_one_video_are_not_duplicates_and_missing_videos_are_looked_for_again(questions: list, tmp_path: Path) -> None:
    question = questions[0]
    windows = [replace(question, id=f"w{n}", video=replace(question.video, start=n / 8, end=(n + 3) / 8)) for n in range(4)]
    say = Says(lambda q, n: f"Answer: {q.answer if n % 2 else wrong(q)}")
    made, pairs = build(windows, tmp_path / "j.jsonl", say, replace(CONFIG, blind=0))
    assert len(pairs) == 4
    path = tmp_path / "late.mp4"
    late = [replace(question, video=Segment(str(path)))]
    assert build(late, tmp_path / "k.jsonl", say, replace(CONFIG, blind=0))[1] == []
    shutil.copy(question.video.file, path)
    assert len(build(late, tmp_path / "k.jsonl", say, replace(CONFIG, blind=0))[1]) == 1
    assert made.counts.stages["7 clean"]["out"] == 4
