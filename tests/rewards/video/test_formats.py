"""Rows of other collections: every form reads as the pair that it means; what fits none, and a video that is not named, is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ramet.agents.tree import Segment
from ramet.errors import TaskError
from ramet.rewards.video.answerers import RecordedAnswers
from ramet.rewards.video.pairs import PreferencePairs, faults, load_pairs, row_of
from ramet.rewards.video.questions import load_questions

PNG = bytes.fromhex("89504e470d0a1a0a")


def written(folder: Path, *rows: Mapping[str, Any]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def loaded(folder: Path, *rows: Mapping[str, Any], **fields: str) -> PreferencePairs:
    return load_pairs(written(folder, *rows), fields)


def say(who: str, what: Any) -> dict[str, Any]:
    return {"role": who, "content": what}


ASKED = "What colour is the square?"
FORMS: dict[str, dict[str, Any]] = {
    "ours": {"video": "v.mp4", "question": ASKED, "chosen": "red", "rejected": "blue"},
    "VideoRewardBench": {"qid": "7", "video_path": "v.mp4", "question": ASKED, "chosen": "red", "rejected": "blue"},
    "MM-RLHF-RewardBench": {
        "id": "7", "video": "v.mp4", "prompt": f"<image>\n{ASKED}", "chosen": "red", "rejected": "blue", "chosen_reason": "c",
        "rejected_reason": "r",
    },
    "VL-RewardBench": {
        "id": "7", "query": ASKED, "response": ["blue", "red"], "image": {"bytes": "", "path": "v.mp4"}, "human_ranking": [1, 0],
        "models": ["x", "y"], "judge": "", "query_source": "s", "ground_truth": "red",
    },
    "LLaVA": {
        "id": "7", "video": "v.mp4", "conversations": [{"from": "human", "value": f"<video>\n{ASKED}"}],
        "chosen": {"from": "gpt", "value": "red"}, "rejected": {"from": "gpt", "value": "blue"},
    },
    "LLaVA, the chosen answer in it": {
        "videos": ["v.mp4"], "conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": "red"}],
        "rejected_conversations": [{"from": "gpt", "value": "blue"}],
    },
    "messages": {
        "videos": ["v.mp4"], "prompt": [say("user", [{"type": "video"}, {"type": "text", "text": ASKED}])],
        "chosen": [say("assistant", [{"type": "text", "text": "red"}])], "rejected": [say("assistant", "blue")],
    },
    "messages that hold the video": {
        "prompt": [say("user", [{"type": "video", "video": "v.mp4"}, {"type": "text", "text": ASKED}])],
        "chosen": [say("assistant", "red")], "rejected": [say("assistant", "blue")],
    },
    "messages without a prompt": {
        "video": "v.mp4", "chosen": [say("user", ASKED), say("assistant", "red")],
        "rejected": [say("user", ASKED), say("assistant", "blue")],
    },
    "messages and a rejected response": {
        "messages": [say("user", f"<video>{ASKED}"), say("assistant", "red")], "rejected_response": "blue", "videos": ["v.mp4"],
    },
    "A/B": {"video": "v.mp4", "question": ASKED, "answer_a": "blue", "answer_b": "red", "winner": "B"},
    "A/B by number": {"video": "v.mp4", "prompt": ASKED, "response_1": "red", "response_2": "blue", "preference": 1},
    "A/B by column": {"video": "v.mp4", "prompt": ASKED, "response_a": "red", "response_b": "blue", "preferred": "response_a"},
    "A/B in words": {"video": "v.mp4", "prompt": ASKED, "response_1": "blue", "response_2": "red", "label": "Answer 2"},
    "A/B as a float": {"video": "v.mp4", "prompt": ASKED, "response_1": "blue", "response_2": "red", "label": 2.0},
    "A/B by model": {"video": "v.mp4", "prompt": ASKED, "response_a": "blue", "response_b": "red", "winner": "model_b"},
    "A/B by rating": {"video": "v.mp4", "question": ASKED, "answer_a": "blue", "answer_b": "red", "score_a": 0.25, "score_b": 0.75},
    "ratings": {"video": "v.mp4", "question": ASKED, "responses": ["blue", "red"], "ratings": [2.5, 4.125]},
    "message answers with ratings": {
        "video": {"path": "v.mp4"}, "question": ASKED, "responses": [say("assistant", "blue"), say("assistant", "red")], "scores": [1, 3.5],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_every_form_reads_as_the_pair_that_it_means(tmp_path: Path, name: str) -> None:
    (pair,) = loaded(tmp_path, FORMS[name])
    assert (pair.video, pair.question, pair.chosen, pair.rejected) == (Segment(str(tmp_path / "v.mp4")), ASKED, "red", ("blue",))
    again = load_pairs(written(tmp_path, row_of(pair, tmp_path)))
    assert again == [pair]


def test_genai_bench_asks_which_of_two_videos_is_better(tmp_path: Path) -> None:
    row = {"prompt": "a cat", "left_video": "l.mp4", "right_video": {"path": "r.mp4"}, "left_model": "x", "right_model": "y"}
    left, right, tied, bad = (row | {"vote_type": vote} for vote in ("leftvote", "rightvote", "tievote", "bothbad_vote"))
    pairs = loaded(tmp_path, left, right, tied, bad)
    assert pairs.ties == 2
    assert [pair.chosen for pair in pairs] == ["The first one.", "The second one."]
    assert [pair.rejected for pair in pairs] == [("The second one.",), ("The first one.",)]
    assert pairs[0].video == tuple(Segment(str(tmp_path / name)) for name in ("l.mp4", "r.mp4"))
    assert pairs[0].question == "Two videos were made for this: a cat\nWhich one is better?"
    assert load_pairs(written(tmp_path, row_of(pairs[0], tmp_path)))[0].video == pairs[0].video


def test_a_conversation_of_several_turns_is_asked_whole(tmp_path: Path) -> None:
    turns = [("system", "Be short."), ("user", "<video>Who?"), ("assistant", "A man."), ("user", "Where?"), ("assistant", "Here.")]
    row = {"messages": [say(*turn) for turn in turns], "rejected": "There.", "videos": ["a.mp4", "b.mp4"]}
    (pair,) = loaded(tmp_path, row)
    assert pair.question == "System: Be short.\nUser: Who?\nAssistant: A man.\nUser: Where?"
    assert (pair.chosen, pair.rejected) == ("Here.", ("There.",))
    assert pair.video == (Segment(str(tmp_path / "a.mp4")), Segment(str(tmp_path / "b.mp4")))


def test_frames_are_a_run_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    for n in range(12):
        (tmp_path / "f" / f"{n}.png").write_bytes(PNG)
    row = {"question": ASKED, "chosen": "red", "rejected": "blue"}
    (pair,) = loaded(tmp_path, row | {"frames": [f"f/{n}.png" for n in range(8, 12)]})
    assert pair.video == Segment(str(tmp_path / "f"), 8.0, 12.0)
    asked = [say("user", [{"type": "video", "video": [f"f/{n}.png" for n in range(3)]}, {"type": "text", "text": ASKED}])]
    (pair,) = loaded(tmp_path, {"prompt": asked, "chosen": "red", "rejected": "blue"})
    assert pair.video == Segment(str(tmp_path / "f"), 0.0, 3.0)
    for frames in (["f/1.png", "f/3.png"], ["f/2.png", "f/1.png"], ["f/1.png", "f/99.png"]):
        with pytest.raises(TaskError, match=r"row 1: its 2 frames .* are no run of the pictures of one folder"):
            loaded(tmp_path, row | {"frames": frames})


def test_ties_are_left_out_and_counted(tmp_path: Path) -> None:
    """Whichever form they come in: none refuses the file, none is trained on, and a note says how many there were."""
    base = {"video": "v.mp4", "question": ASKED}
    tied = [
        base | {"answer_a": "x", "answer_b": "y", "winner": "tie"},
        base | {"responses": ["x", "y"], "ratings": [3.5, 3.5]},
        base | {"responses": ["x", "y", "z"], "rankings": [1, 1, 2]},
        base | {"chosen": "x", "rejected": "x"},
        base | {"responses": ["x", "x", "y"], "rankings": [1, 2, 3]},
        base | {"answer_a": "x", "answer_b": "y", "rating_a": 1, "rating_b": 1.0},
    ]
    pairs = loaded(tmp_path, *tied, FORMS["ours"])
    assert len(pairs) == 1
    assert pairs.ties == len(tied)
    assert faults(pairs)[0] == "6 rows prefer no answer and are left out"
    with pytest.raises(TaskError, match="has no pair: all of its 6 rows are ties"):
        loaded(tmp_path, *tied)
    others = loaded(tmp_path, base | {"responses": ["x", "y", "y"], "rankings": [1, 2, 2]})
    assert others[0].rejected == ("y", "y")


def test_a_row_is_never_blind_unless_that_is_asked_for(tmp_path: Path) -> None:
    """A video under another name, a name that the row has not, an empty one: each is said, with what the row has."""
    row = {"question": ASKED, "chosen": "red", "rejected": "blue"}
    for more in ({"clip_location": "v.mp4"}, {"video": None}, {"video": []}, {"videos": [], "image": None}):
        with pytest.raises(TaskError, match=r"row 1 names no video; it has question, chosen, rejected, .*--field video=none"):
            loaded(tmp_path, row | more)
    with pytest.raises(TaskError, match="row 1 has no field 'clip'"):
        loaded(tmp_path, row | {"video": "v.mp4"}, video="clip")
    with pytest.raises(TaskError, match="row 1 names no video"):
        loaded(tmp_path, row | {"clip": None, "video": "v.mp4"}, video="clip")
    (found,) = loaded(tmp_path, row | {"clip_location": "v.mp4"}, video="clip_location")
    assert found.video == Segment(str(tmp_path / "v.mp4"))
    blind, seen = loaded(tmp_path, row, row | {"chosen": "green", "video": "v.mp4"}, video="none")
    assert (blind.video, seen.video) == (None, Segment(str(tmp_path / "v.mp4")))


@pytest.mark.parametrize("name", ["id", "category", "source", "start", "end", "margin", "meta", "question", "chosen", "rejected"])
def test_a_field_that_is_named_and_missing_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(TaskError, match="row 1 has no field 'elsewhere'"):
        loaded(tmp_path, FORMS["ours"], **{name: "elsewhere"})
    with pytest.raises(TaskError, match="pairs have no field 'vidoe'; their fields are"):
        loaded(tmp_path, FORMS["ours"], vidoe="v")


@pytest.mark.parametrize("name", ["id", "category", "choices", "evidence", "start", "end", "video"])
def test_so_it_is_for_questions_and_answers(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, {"id": "1", "video": "v.mp4", "question": "q", "answer": "a", "response": "r"})
    assert load_questions(path)[0].video == Segment(str(tmp_path / "v.mp4"))
    with pytest.raises(TaskError, match="row 1 has no field 'elsewhere'"):
        load_questions(path, {name: "elsewhere"})
    with pytest.raises(TaskError, match="row 1 has no field 'elsewhere'"):
        RecordedAnswers(path, {"blind": "elsewhere"})


def test_what_fits_no_form_is_told_what_would(tmp_path: Path) -> None:
    for row, said in (
        ({"video": "v.mp4", "question": "q", "good": "x", "bad": "y"},
         r"row 1 is in no form that is known: it has video, question, good, bad. Accepted are ranked answers \(responses, rankings\); "),
        ({"video": "v.mp4", "question": "q", "rejected": "y"}, "no chosen answer, by itself or at the end of a conversation; it has video"),
        (FORMS["A/B"] | {"winner": "C"}, "its winner is 'C', which is neither A, B, 1, 2, left, right nor a tie"),
        (FORMS["A/B"] | {"winner": 0}, "its winner is '0'"),
        (FORMS["A/B"] | {"winner": True}, "its winner is 'True'"),
        (FORMS["ratings"] | {"ratings": [1, "high"]}, "its ratings are .* not numbers"),
        (FORMS["ratings"] | {"ratings": [1, float("nan")]}, "its ratings are .* not numbers"),
        (FORMS["ours"] | {"chosen": ["red", "green"]}, "2 chosen answers, not one"),
        (FORMS["ours"] | {"chosen": {"text": "red"}}, "its chosen answer is .* not text"),
        (FORMS["ours"] | {"video": "https://x.org/v.mp4"}, "is the address 'https://x.org/v.mp4'; fetch it and name the file"),
        (FORMS["ours"] | {"video": {"bytes": "abc", "path": None}}, "its video has no path"),
        (FORMS["ours"] | {"video": "../v.mp4"}, "row 1: the video '../v.mp4' lies outside of the folder"),
        (FORMS["ours"] | {"video": ["a.mp4", "b.mp4"], "start": 1.0}, "a start or an end, and 2 videos"),
    ):  # fmt: skip
        with pytest.raises(TaskError, match=said):
            loaded(tmp_path, row)


def test_rows_that_share_an_id_are_told_apart(tmp_path: Path) -> None:
    """As in collections that have several pairs of a question; a row that stands there twice is no two pairs."""
    one, other = FORMS["ours"] | {"id": "7"}, FORMS["ours"] | {"id": "7", "rejected": "green"}
    assert [pair.id for pair in loaded(tmp_path, one, other)] == ["7", "7#2"]
    with pytest.raises(TaskError, match="the pair '7' more than once"):
        loaded(tmp_path, one, one)


RATED: dict[str, list[dict[str, Any]]] = {
    "of one id": [{"id": "7", "response": said, "rating": rating} for said, rating in (("blue", 2), ("red", 4.5))],
    "each with an id": [{"id": said, "answer": said, "score": rating} for said, rating in (("blue", -1), ("red", 0))],
    "without ids": [{"completion": said, "overall_score": rating} for said, rating in (("red", 3), ("blue", 2))],
    "as messages": [{"response": say("assistant", said), "scores": rating} for said, rating in (("red", 0.75), ("blue", 0.25))],
    "in lists of one": [{"responses": [said], "ratings": [rating]} for said, rating in (("red", 5), ("blue", 1))],
    "of several models": [
        {"response": said, "rating": rated, "source": model} for said, rated, model in (("red", 5, "x"), ("blue", 1, "y"), ("red", 5, "z"))
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", RATED)
def test_rows_with_one_rated_answer_each_are_one_pair(tmp_path: Path, name: str) -> None:
    base = {"video": "v.mp4", "question": ASKED}
    (pair,) = loaded(tmp_path, *(base | row for row in RATED[name]))
    assert (pair.video, pair.question, pair.chosen, pair.rejected) == (Segment(str(tmp_path / "v.mp4")), ASKED, "red", ("blue",))
    assert pair.id == str(RATED[name][0].get("id", 1)) and pair.source == ""
    assert load_pairs(written(tmp_path, row_of(pair, tmp_path))) == [pair]


def test_conversations_that_end_with_a_rated_answer_are_one_pair(tmp_path: Path) -> None:
    def row(said: str, rating: float) -> dict[str, Any]:
        return {"videos": ["v.mp4"], "messages": [say("user", f"<video>{ASKED}"), say("assistant", said)], "rating": rating}

    (pair,) = loaded(tmp_path, row("blue", 1), row("red", 2))
    assert (pair.question, pair.chosen, pair.rejected) == (ASKED, "red", ("blue",))


def test_rated_rows_mean_what_one_row_with_all_their_answers_means(tmp_path: Path) -> None:
    """Several questions whose rows are mixed, with ties of the best and of others: the same pairs, in the order of their first rows."""
    asked = {"a": {"x": 1, "y": 3, "z": 2}, "b": {"x": 2, "y": 2}, "c": {"x": 5, "y": 1, "z": 1, "w": 0}, "d": {"x": 4, "y": 4, "z": 1}}
    whole = [{"id": q, "video": "v.mp4", "question": q, "responses": list(r), "ratings": list(r.values())} for q, r in asked.items()]
    rows = [
        {"id": q, "video": "v.mp4", "question": q, "response": said, "rating": asked[q][said]}
        for said in "xyzw" for q in asked if said in asked[q]
    ]  # fmt: skip
    apart = loaded(tmp_path, *rows)
    assert apart == loaded(tmp_path, *whole)
    assert [pair.id for pair in apart] == ["a", "c"]
    assert apart.ties == 5 and "5 rows prefer no answer" in faults(apart)[0]


def test_answers_are_compared_only_where_question_video_and_category_are_the_same(tmp_path: Path) -> None:
    row = {"video": "v.mp4", "question": ASKED, "response": "red", "rating": 1}
    kinds = [row, row | {"video": "w.mp4"}, row | {"question": "Where?"}, row | {"category": "style"}, row | {"start": 1.0, "end": 2.0}]
    pairs = loaded(tmp_path, *kinds, *(kind | {"response": "blue", "rating": 2} for kind in kinds))
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [("blue", ("red",))] * 5
    assert len({(pair.video, pair.question, pair.category) for pair in pairs}) == 5
    with_pair = loaded(tmp_path, row, FORMS["ours"] | {"score": 3}, row | {"response": "blue", "rating": 0})
    assert [pair.rejected for pair in with_pair] == [("blue",), ("blue",)]


def test_rated_rows_that_make_no_pair_are_refused_by_number(tmp_path: Path) -> None:
    row = {"id": "7", "video": "v.mp4", "question": ASKED, "response": "red", "rating": 1}
    other = row | {"response": "blue", "rating": 2}
    for bad, said in (
        (row | {"id": "8", "question": "Where?"}, "row 3 has one answer, and no other row has another one to its question"),
        (row | {"question": "Where?"}, "row 3: its id '7' is that of row 1, which asks something else or about another video"),
        (row | {"video": "w.mp4"}, "row 3: its id '7' is that of row 1, which asks something else or about another video"),
        (row | {"rating": 3}, "row 3: it rates an answer 3 that row 1 rates 1; give each answer one rating"),
        (row | {"rating": "high"}, "row 3: its ratings are high, not numbers"),
        (row | {"rating": True}, "row 3: its ratings are True, not numbers"),
        (row | {"rating": float("inf")}, "row 3: its ratings are inf, not numbers"),
        (row | {"rating": [1, 2]}, "row 3 has 1 responses and 2 ratings"),
        (row | {"response": ["red", "green"]}, "row 3 has 2 responses and 1 ratings"),
        (row | {"response": {"a": 1}}, "row 3: its response is .* not text"),
        (row | {"response": ""}, "row 3"),
        (row | {"rating": None}, r"row 3 is in no form that is known.* a row for each rated answer \(response, rating\)"),
        (row | {"response": None}, "row 3 is in no form that is known"),
        (row | {"video": None}, "row 3 names no video"),
    ):  # fmt: skip
        with pytest.raises(TaskError, match=said):
            loaded(tmp_path, row, other, bad)
    with pytest.raises(TaskError, match="all of its 2 rows are ties"):
        loaded(tmp_path, row, other | {"rating": 1})
    with pytest.raises(TaskError, match=r"row 1 .*'mark'"):
        loaded(tmp_path, row, other, rating="mark")
