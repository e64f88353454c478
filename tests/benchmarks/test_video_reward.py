"""Fake judges through the whole benchmark: each gives what the definitions say, and none that does not look can pass for one that does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ramet.agents.journal import Journal
from ramet.agents.tree import Segment
from ramet.benchmarks.evaluation.video_reward import BenchmarkProtocol, against, measures, results, run_bench, shown_videos, warnings
from ramet.errors import ConfigError, TaskError
from ramet.rewards.video.fakes import FakeJudge, fake_judge, valid_output
from ramet.rewards.video.judge import AnswerPair, PairwisePrompt, Vote, compare, majority, parse_choice, parse_rating, verdict_of
from ramet.rewards.video.pairs import PreferencePair

PAIRS = [
    PreferencePair(f"p{n}", Segment(f"v{n % 100}.mp4"), f"question {n}", f"good {n}", (f"bad {n}",), ("colour", "order", "count")[n % 3])
    for n in range(300)
]
BETTER = {f"{pair.id}/0": pair.chosen for pair in PAIRS}


def bench(
    judge: Any, tmp_path: Path, conditions: tuple[str, ...] = ("right",), pairs: list[PreferencePair] = PAIRS, **protocol: Any
) -> list[Any]:
    settings = BenchmarkProtocol(**({"mode": "pairwise"} | protocol))
    with Journal(tmp_path / f"{judge.name}-{len(list(tmp_path.iterdir()))}.jsonl", "test") as journal:
        return run_bench(judge, pairs, settings, list(conditions), journal)


def everything(found: list[Any]) -> dict[str, Any]:
    return next(r for r in results(found) if r["subset"] == "all")


@pytest.mark.parametrize("place", ["first", "second"])
def test_one_that_picks_a_place_is_worth_nothing(tmp_path: Path, place: str) -> None:
    found = everything(bench(fake_judge(f"always-{place}", BETTER), tmp_path, k=3))
    expected = {"accuracy": 0.0, "consistent": 0.0, "lenient": 0.5, "letter_agreement": 1.0, "invalid_rate": 0.0, "tie_rate": 1.0}
    assert {name: found[name] for name in expected} == expected
    assert (found["forward"], found["reversed"]) == ((1.0, 0.0) if place == "first" else (0.0, 1.0))
    assert found["first_share"] == (1.0 if place == "first" else 0.0)
    assert any("same place wins in both orders for 100%" in said for said in warnings([found]))
    # In one order a pair it is right as often as chance; the share of places gives it away.
    found = everything(bench(fake_judge(f"always-{place}", BETTER), tmp_path, order="random"))
    assert abs(found["accuracy"] - 0.5) < 0.1
    assert any(f"100% of the votes pick the {place} place" in said for said in warnings([found]))


def test_the_oracle_is_right_in_both_orders(tmp_path: Path) -> None:
    found = everything(bench(fake_judge("oracle", BETTER), tmp_path))
    for name in ("accuracy", "consistent", "lenient", "forward", "reversed"):
        assert found[name] == 1.0
    assert (found["letter_agreement"], found["first_share"], found["tie_rate"]) == (0.0, 0.5, 0.0)
    assert found["ci_low"] < 1.0  # 100 videos are not certainty
    assert (found["n"], found["clusters"]) == (300, 100)
    assert not warnings([found])


def test_chance_is_half_and_a_quarter(tmp_path: Path) -> None:
    found = everything(bench(fake_judge("random", BETTER), tmp_path, k=1))
    assert abs(found["forward"] - 0.5) < 0.1
    assert abs(found["consistent"] - 0.25) < 0.1
    assert abs(found["letter_agreement"] - 0.5) < 0.1
    assert abs(found["lenient"] - 0.5) < 0.1


@pytest.mark.parametrize(("name", "errors"), [("malformed", 0.0), ("empty", 0.0), ("raising", 1.0)])
def test_what_cannot_be_read_never_wins(tmp_path: Path, name: str, errors: float) -> None:
    found = everything(bench(fake_judge(name, BETTER), tmp_path, k=2))
    expected = {"accuracy": 0.0, "lenient": 0.5, "consistent": 0.0, "invalid_rate": 1.0, "error_rate": errors}
    assert {n: found[n] for n in expected} == expected
    assert "first_share" not in found
    assert "letter_agreement" not in found


def test_a_judge_that_raises_now_and_then_spoils_no_other_pair(tmp_path: Path) -> None:
    def rule(shown: PairwisePrompt, rng: Any) -> str:
        if shown.id == "p7/0":
            raise RuntimeError("no")
        return valid_output(1 if shown.first.startswith("good") else 2)

    records = bench(FakeJudge("sometimes", rule), tmp_path)
    wrong = [r for r in records if measures(r)["accuracy"] == 0]
    assert [r["id"] for r in wrong] == ["p7"]
    assert {vote[3] for vote in wrong[0]["votes"][0]} == {"RuntimeError: no"}

    def broken(shown: PairwisePrompt, rng: Any) -> str:
        raise TaskError("cannot read video v0.mp4")

    records = bench(FakeJudge("broken", broken), tmp_path, pairs=PAIRS[:20])
    assert {r["failed"] for r in records} == {"cannot read video v0.mp4"}
    found = everything(records)
    assert (found["accuracy"], found["error_rate"]) == (0.0, 1.0)
    assert "100% of the pairs could not be judged" in warnings([found])[0]


def test_a_pair_that_failed_is_asked_again(tmp_path: Path) -> None:
    """A video that was missing: the other pairs are judged, and the next run asks for that one only."""
    asked: list[str] = []

    class Missing(Scored):
        missing = True

        def score(self, items: Any) -> list[float]:
            asked.extend(item.question for item in items)
            if self.missing and any(item.question == "question 3" for item in items):
                raise TaskError("cannot read video v3.mp4")
            return super().score(items)

    model = Missing()
    for missing, accuracy in ((True, 0.95), (False, 1.0)):
        model.missing = missing
        asked.clear()
        with Journal(tmp_path / "journal.jsonl", "job") as journal:
            records = run_bench(model, PAIRS[:20], BenchmarkProtocol("pointwise"), ["right"], journal)
        assert results(records)[0]["accuracy"] == accuracy
        assert len(records) == 20
    assert set(asked) == {"question 3"}


class Halved:
    """Returns fewer outputs than asked."""

    name = "halved"

    def judge(self, shown: Any, k: int, seed: int) -> list[list[str]]:
        return [[valid_output(1)] * k for _ in shown][:-1]


def test_a_judge_that_returns_too_few_outputs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did not give 1 outputs for each of 32 prompts"):
        bench(Halved(), tmp_path)


class Scored:
    name = "scored"

    def __init__(self, tie: bool = False):
        self.tie, self.asked = tie, 0

    def score(self, items: Any) -> list[float]:
        self.asked += len(items)
        return [0.0 if self.tie else float(item.answer.startswith("good") and item.video is not None) for item in items]


def test_pointwise_ties_count_as_the_protocol_says(tmp_path: Path) -> None:
    records = bench(Scored(tie=True), tmp_path, mode="pointwise")
    assert [results(records, ties)[0]["accuracy"] for ties in (0.0, 0.5)] == [0.0, 0.5]
    assert results(records)[0]["tie_rate"] == 1.0
    records = bench(Scored(), tmp_path, ("right", "none", "wrong"), mode="pointwise")
    found = {r["condition"]: r["accuracy"] for r in results(records) if r["subset"] == "all"}
    assert found == {"right": 1.0, "none": 0.0, "wrong": 1.0}
    assert any("as good with the condition wrong" in said for said in warnings(results(records)))
    difference = against([r for r in records if r["condition"] == "right"], bench(Scored(tie=True), tmp_path, mode="pointwise"))[0]
    assert difference["difference"] == 1.0
    assert difference["p"] < 1e-6


def test_a_run_that_was_cut_off_goes_on_with_the_pairs_that_are_left(tmp_path: Path) -> None:
    model, path = Scored(), tmp_path / "journal.jsonl"
    with Journal(path, "job") as journal, pytest.raises(KeyboardInterrupt):
        calls = []

        def stop(done: int) -> None:
            calls.append(done)
            if sum(calls) >= 48:
                raise KeyboardInterrupt

        run_bench(model, PAIRS, BenchmarkProtocol("pointwise"), ["right"], journal, stop)
    assert model.asked == 96
    with Journal(path, "job") as journal:
        records = run_bench(model, PAIRS, BenchmarkProtocol("pointwise"), ["right"], journal)
    assert model.asked == 600
    assert [r["id"] for r in records] == [pair.id for pair in PAIRS]
    with Journal(path, "job") as journal:
        assert results(journal.records)[0]["n"] == 300


def test_one_against_three_is_a_quarter_by_chance(tmp_path: Path) -> None:
    pairs = [PreferencePair(f"q{n}", None, "q", "good", ("x", "y", "z")) for n in range(400)]

    class Random:
        name = "random"

        def score(self, items: Any) -> list[float]:
            import random

            return [random.Random(f"{n}/{item.answer}").random() for n, item in enumerate(items)]

    assert abs(everything(bench(Random(), tmp_path, pairs=pairs, mode="pointwise"))["accuracy"] - 0.25) < 0.08
    assert (
        everything(bench(fake_judge("oracle", {f"{p.id}/{n}": "good" for p in pairs for n in range(3)}), tmp_path, pairs=pairs))["accuracy"]
        == 1.0
    )


def test_a_wrong_video_is_another_ones() -> None:
    wrong = shown_videos(PAIRS, "wrong", 0)
    assert all(wrong[pair.id] not in (None, pair.video) for pair in PAIRS)
    assert wrong == shown_videos(PAIRS, "wrong", 0) != shown_videos(PAIRS, "wrong", 1)
    by_id = {pair.id: pair.category for pair in PAIRS}
    of = {pair.video: {p.category for p in PAIRS if p.video == pair.video} for pair in PAIRS}
    assert all(by_id[i] in of[video] for i, video in wrong.items())
    with pytest.raises(ConfigError, match="no condition 'upside'"):
        shown_videos(PAIRS, "upside", 0)
    with pytest.raises(ConfigError, match="different videos"):
        shown_videos(PAIRS[:1], "wrong", 0)


@pytest.mark.parametrize(
    ("said", "choice"),
    [
        ("<think>a</think><answer>1</answer>", 1),
        (" <think>two\nlines</think>\n<answer> 2 </answer>\n", 2),
        ("<think></think><answer>2</answer>", 2),
        ("<answer>1</answer>", None),
        ("<think>a</think><answer>3</answer>", None),
        ("<think>a</think><answer>1</answer><answer>2</answer>", None),
        ("<think>a</think><answer>1</answer> or 2", None),
        ("<think>the <answer>1</answer> is</think><answer>2</answer>", None),
        ("<think>a</think><think>b</think><answer>2</answer>", None),
        ("<think>a<answer>1</answer>", None),
        ("<think>a</think><answer>12</answer>", None),
        ("<think>a</think><answer>\uff11</answer>", None),
        ("Answer 1 is better", None),
        ("", None),
        ("\0", None),
    ],
)
def test_only_a_whole_verdict_is_one(said: str, choice: int | None) -> None:
    assert parse_choice(said)[0] == choice


def test_ratings_are_one_to_ten() -> None:
    read = [parse_rating(f"<think>x</think><answer>{n}</answer>")[0] for n in ("0", "1", "10", "11", "5.5", "-3", "007")]
    assert read == [None, 1, 10, None, None, None, None]


def votes(text: str) -> list[Vote]:
    """F1: forward, first; R-: reversed, abstains."""
    return [Vote(t[0] == "F", None if t[1] == "-" else int(t[1]), "") for t in text.split()]


@pytest.mark.parametrize(
    ("text", "winner", "consistent"),
    [
        ("F1 R2", "a", True),
        ("F2 R1", "b", True),
        ("F1 R1", None, False),
        ("F1 F1 F2 R2 R2 R1", "a", True),
        ("F1 F2 R2 R2", "a", False),
        ("F- R2", "a", False),
        ("F- R-", None, False),
        ("F1 F-", "a", None),
        ("F1 F2", None, None),
    ],
)
def test_votes_ties_and_abstentions(text: str, winner: str | None, consistent: bool | None) -> None:
    verdict = verdict_of(votes(text))
    assert (verdict.winner, verdict.consistent) == (winner, consistent)
    flipped = [Vote(not v.forward, v.choice, "") for v in votes(text)]
    swapped = {"a": "b", "b": "a", None: None}
    assert majority(flipped) == swapped[majority(votes(text))]


def test_naming_the_answers_the_other_way_round_turns_the_verdict() -> None:
    """A judge of quality has no place to prefer: swapping a and b swaps the winner."""
    judge = FakeJudge("longer", lambda shown, rng: valid_output(1 if len(shown.first) > len(shown.second) else 2))
    duels = [AnswerPair(str(n), None, "q", "x" * n, "y" * (7 - n)) for n in range(8)]
    there = [v.winner for v in compare(judge, duels)]
    back = [v.winner for v in compare(judge, [AnswerPair(d.id, None, "q", d.b, d.a) for d in duels])]
    assert there == [{"a": "b", "b": "a"}[str(w)] for w in back]


def test_records_survive_json() -> None:
    record = {"votes": [[[True, 1, "x", ""], [False, 2, "y", ""]]], "condition": "right"}
    assert measures(json.loads(json.dumps(record))) == measures(record)
