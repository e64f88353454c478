"""Reads preference rows of other collections: which columns mean what, and which of several answers is preferred.

A row says what is asked, about which video, and which answer is better, in one of the forms of `FORMATS`; a column is found under
any of its names in `NAMES`, or where a field map says. Answers and questions are text, messages (`role` and `content`, or `from` and
`value`) or lists of them, whose last answer counts; contents may be lists of parts. A row may also hold one answer with its rating, beside
other rows of the same question (`rated`). What fits no form is refused with the columns that it has.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ramet.data import Row, text
from ramet.data import field as field_of
from ramet.errors import TaskError
from ramet.media.images import SUFFIXES, images_in_folder

WITHOUT = "none"
"""What a field map calls `video` where rows may come without one."""
NAMES: Mapping[str, tuple[str, ...]] = {
    "id": ("id", "qid", "question_id", "sample_id", "pair_id", "uid", "idx"),
    "video": ("video", "videos", "video_path", "video_paths", "video_file", "frames", "image", "images", "image_path"),
    "question": ("question", "prompt", "query", "instruction", "conversations", "messages"),
    "chosen": ("chosen", "chosen_response", "chosen_answer", "chosen_conversations"),
    "rejected": ("rejected", "rejected_response", "rejected_responses", "rejected_answer", "rejected_conversations"),
    "responses": ("responses", "response", "answers", "candidates", "completions"),
    "rankings": ("rankings", "ranking", "human_ranking", "ranks"),
    "ratings": ("ratings", "scores", "human_ratings", "human_scores"),
    "response": ("response", "answer", "completion", "candidate", "output", "model_response"),
    "rating": ("rating", "score", "human_rating", "human_score", "overall", "overall_rating", "overall_score"),
    "a": ("a", "answer_a", "response_a", "output_a", "answer1", "answer_1", "response1", "response_1", "output_1"),
    "b": ("b", "answer_b", "response_b", "output_b", "answer2", "answer_2", "response2", "response_2", "output_2"),
    "rating_a": ("rating_a", "score_a", "rating1", "rating_1", "score1", "score_1"),
    "rating_b": ("rating_b", "score_b", "rating2", "rating_2", "score2", "score_2"),
    "winner": ("winner", "preference", "preferred", "better", "label", "choice", "vote", "vote_type"),
    "left": ("left_video", "left_image", "video_a", "video_1"),
    "right": ("right_video", "right_image", "video_b", "video_2"),
    "category": ("category", "task", "dimension", "subset", "query_source"),
    "source": ("source", "dataset"),
}
KNOWN = {*NAMES, "start", "end", "margin", "meta"}
_FIRST = {"a", "1", "first", "left", "leftvote", "a>b", "a>>b"}
_SECOND = {"b", "2", "second", "right", "rightvote", "b>a", "b>>a"}
_TIE = {"tie", "tievote", "bothbad", "bothbad_vote", "tie (bothbad)", "both", "neither", "equal", "same", "draw", "a=b"}
_SPEAKERS = {"human": "user", "gpt": "assistant", "model": "assistant"}


class Columns:
    """A row's values by our names: where the field map says, else under the first of its known names that holds something."""

    def __init__(self, row: Row, fields: Mapping[str, str], where: str):
        self.row, self.where = row, where
        self._fields = {name: column for name, column in fields.items() if (name, column) != ("video", WITHOUT)}

    def get(self, name: str, default: Any = ...) -> Any:
        """The value of a column. Raises `TaskError` if the row lacks what the field map names, or has no value and there is no default."""
        if name in self._fields:
            return field_of(self.row, name, self._fields, self.where)
        column = self.column(name)
        return field_of(self.row, name, {}, self.where, default) if column is None else self.row[column]

    def column(self, name: str) -> str | None:
        """The name of the column that holds a value; None if none does."""
        named = (self._fields[name],) if name in self._fields else NAMES.get(name, (name,))
        return next((c for c in named if name in self._fields or self.row.get(c) is not None), None)


@dataclass(frozen=True)
class Preference:
    """Several answers, and the place of the best; None: a tie."""

    answers: tuple[str, ...]
    best: int | None


@dataclass(frozen=True)
class PreferenceFormat:
    """A form of preference rows: the columns that identify it, by our names."""

    name: str
    needs: tuple[str, ...]
    read: Callable[[Columns], Preference]


def preference(columns: Columns) -> Preference:
    """The preference of a row, by the first form whose columns it has. Raises `TaskError` with its columns and those of the forms."""
    form = _form(columns)
    if form is not None:
        result = form.read(columns)
        if len(result.answers) < 2:
            raise TaskError(f"{columns.where} has one answer; a preference takes two")
        twice = result.best is not None and result.answers.count(result.answers[result.best]) > 1
        return Preference(result.answers, None if twice else result.best)
    accepted = "; ".join(f"{form.name} ({', '.join(NAMES[name][0] for name in form.needs)})" for form in (*FORMATS, RATED))
    raise TaskError(
        f"{columns.where} is in no form that is known: it has {', '.join(map(str, columns.row))}. Accepted are {accepted}, also under "
        "other usual names; name a column of yours with --field, such as --field chosen=COLUMN"
    )


def rated(columns: Columns) -> tuple[str, float] | None:
    """The one answer of a row, or at the end of its conversation, and its rating, most is best. None: the row is in another form.

    What it is better or worse than stands in other rows. Raises `TaskError` for several answers with one rating, and for what is no number.
    """
    form = _form(columns)
    rating = next((name for name in ("rating", "ratings") if columns.column(name) is not None), None)
    if rating is None or form not in (None, RATED_TOGETHER):
        return None
    if columns.column("response") is not None or columns.column("responses") is not None:
        responses = answers(columns.get("responses" if columns.column("response") is None else "response"), "response", columns.where)
    else:
        turns = _turns(columns.get("question", None))
        responses = tuple(text(what, "response", columns.where) for who, what in turns[-1:] if who == "assistant")
    if not responses or (form is not None and len(responses) > 1):
        return None
    ratings = _numbers(columns.get(rating), "ratings", columns.where)
    if len(responses) != 1 or len(ratings) != 1:
        raise TaskError(f"{columns.where} has {len(responses)} responses and {len(ratings)} ratings or ranks")
    return responses[0], ratings[0]


def best_of(rated: Sequence[tuple[str, float]]) -> Preference:
    """The preference among different answers by their ratings; several answers with the highest rating are a tie."""
    return Preference(tuple(answer for answer, _ in rated), _highest([rating for _, rating in rated]))


def _form(columns: Columns) -> PreferenceFormat | None:
    return next((form for form in FORMATS if all(columns.column(name) is not None for name in form.needs)), None)


def _chosen(columns: Columns) -> Preference:
    rejected = answers(columns.get("rejected"), "rejected answer", columns.where)
    if columns.column("chosen") is None:  # it ends the conversation
        turns = _turns(columns.get("question"))
        if not turns or turns[-1][0] != "assistant":
            had = ", ".join(map(str, columns.row))
            raise TaskError(f"{columns.where} has no chosen answer, by itself or at the end of a conversation; it has {had}")
        return Preference((text(turns[-1][1], "chosen answer", columns.where), *rejected), 0)
    chosen = answers(columns.get("chosen"), "chosen answer", columns.where)
    if len(chosen) != 1:
        raise TaskError(f"{columns.where} has {len(chosen)} chosen answers, not one")
    return Preference((*chosen, *rejected), 0)


def _ranked(columns: Columns) -> Preference:
    return _best(columns, [-rank for rank in _numbers(columns.get("rankings"), "rankings", columns.where)])


def _rated(columns: Columns) -> Preference:
    return _best(columns, _numbers(columns.get("ratings"), "ratings", columns.where))


def _best(columns: Columns, ratings: Sequence[float]) -> Preference:
    responses = answers(columns.get("responses"), "responses", columns.where)
    if len(responses) != len(ratings):
        raise TaskError(f"{columns.where} has {len(responses)} responses and {len(ratings)} ratings or ranks")
    return Preference(responses, _highest(ratings))


def _voted(columns: Columns) -> Preference:
    return Preference(_both(columns), _winner(columns))


def _both_rated(columns: Columns) -> Preference:
    ratings = _numbers([columns.get("rating_a"), columns.get("rating_b")], "ratings", columns.where)
    return Preference(_both(columns), _highest(ratings))


def _videos(columns: Columns) -> Preference:
    return Preference(("The first one.", "The second one."), _winner(columns))


def _both(columns: Columns) -> tuple[str, ...]:
    both = [answers(columns.get(name), f"answer {name}", columns.where) for name in ("a", "b")]
    return tuple(last[-1] for last in both if last)


def _highest(ratings: Sequence[float]) -> int | None:
    top = max(ratings, default=0.0)
    return ratings.index(top) if ratings.count(top) == 1 else None


def _winner(columns: Columns) -> int | None:
    """0, 1, or None for a tie: by a letter, a number from 1 on, a side, or the name of the answer's own column."""
    value = columns.get("winner")
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # as a table with gaps keeps it
    label = str(value).strip().strip("[]").casefold() if isinstance(value, str) or type(value) is int else ""
    bare = re.sub(r"^(?:model|response|answer|assistant|output|video)[ _]?", "", label)
    if label in _TIE:
        return None
    for place, (words, sides) in enumerate(((_FIRST, ("a", "left")), (_SECOND, ("b", "right")))):
        if bare in words or label in [str(columns.column(s)).casefold() for s in sides if columns.column(s)]:
            return place
    raise TaskError(f"{columns.where}: its winner is {str(value)[:40]!r}, which is neither A, B, 1, 2, left, right nor a tie")


RATED_TOGETHER = PreferenceFormat("rated answers", ("responses", "ratings"), _rated)
RATED = PreferenceFormat("a row for each rated answer", ("response", "rating"), _rated)
"""Several rows make a preference: see `rated`."""
FORMATS = (
    PreferenceFormat("ranked answers", ("responses", "rankings"), _ranked),
    RATED_TOGETHER,
    PreferenceFormat("two answers and a winner", ("a", "b", "winner"), _voted),
    PreferenceFormat("two answers with a rating each", ("a", "b", "rating_a", "rating_b"), _both_rated),
    PreferenceFormat("two videos and a winner", ("left", "right", "winner"), _videos),
    PreferenceFormat("chosen and rejected", ("chosen", "rejected"), _chosen),
    PreferenceFormat("a conversation that ends with the chosen answer", ("question", "rejected"), _chosen),
)


def question(columns: Columns) -> str:
    """The question of a row: a text, or the turns of a conversation before its last answer, without the marks of videos and images."""
    if columns.column("question") is None and columns.column("chosen") is not None:
        turns = _turns(columns.get("chosen"))  # with the answer, in one conversation
        if not [turn for turn in turns if turn[0] == "user"]:
            columns.get("question")
    else:
        turns = _turns(columns.get("question"))
    if turns and turns[-1][0] == "assistant":
        turns = turns[:-1]
    turns_left = [(who, re.sub(r"<(?:video|image)>\s*", "", what).strip()) for who, what in turns]
    turns_left = [(who, what) for who, what in turns_left if what]
    asked_text = turns_left[0][1] if len(turns_left) == 1 else "\n".join(f"{who.capitalize()}: {what}" for who, what in turns_left)
    asked_text = text(asked_text, "question", columns.where)
    if columns.column("left") is not None:
        return f"Two videos were made for this: {asked_text}\nWhich one is better?"
    return asked_text


def media(columns: Columns) -> list[str]:
    """The names of a row's videos, or of the frames of its one video, in order: from its column, or from the parts of its messages."""
    if columns.column("left") is not None:
        return [_name(columns.get(side), columns.where) for side in ("left", "right")]
    value = columns.get("video", None)
    if value is None:
        value = _parts(columns.get("question" if columns.column("question") else "chosen", None))
    values = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    while len(values) == 1 and isinstance(values[0], (list, tuple)):
        values = values[0]  # the frames of a row's one video
    return [_name(item, columns.where) for item in values]


def frames_of(names: Sequence[str]) -> tuple[str, int, int] | None:
    """Of several pictures that are frames: their folder, and numbers of the first and after the last in it. None: they are no frames.

    Pictures of a folder stand in the order of the numbers in their names, a second each. Raises `TaskError` for pictures that are no run.
    """
    if len(names) < 2 or any(Path(name).suffix.lower() not in SUFFIXES for name in names):
        return None
    folder = Path(names[0]).parent
    images = images_in_folder(folder) if folder.is_dir() else []
    places = {str(file): n for n, file in enumerate(images)}
    order = [places.get(str(Path(name)), -1) for name in names]
    if order != list(range(order[0], order[0] + len(order))) or order[0] < 0:
        raise TaskError(f"its {len(names)} frames from {Path(names[0]).name} on are no run of the pictures of one folder; make one of them")
    return str(folder), order[0], order[-1] + 1


def _name(value: Any, where: str) -> str:
    """The path that a value is or holds."""
    while isinstance(value, Mapping):
        value = next((value[key] for key in ("path", "video", "image", "url", "file") if value.get(key) is not None), None)
        if value is None:
            raise TaskError(f"{where}: its video has no path; where it is kept in the row itself, write it to a file and name that")
    name = text(value, "video", where).removeprefix("file://")
    if "://" in name:
        raise TaskError(f"{where}: its video is the address {name[:60]!r}; fetch it and name the file")
    return name


def answers(value: Any, what: str, where: str) -> tuple[str, ...]:
    """The answers that a value holds: one for text, a message or a conversation, else one for each item."""
    talk = {who for who, _ in _turns(value)} > {"assistant"}  # with a question
    if isinstance(value, (list, tuple)) and not (talk and all(map(_is_turn, value))):
        return tuple(text(_last_answer(item), what, where) for item in value)
    return (text(_last_answer(value), what, where),)


def _is_turn(value: Any) -> bool:
    return isinstance(value, Mapping) and ("role" in value or "from" in value)


def _last_answer(value: Any) -> Any:
    """The last answer of a conversation or message; any other value is returned unchanged."""
    turns = _turns(value)
    return turns[-1][1] if turns and not isinstance(value, str) else value


def _turns(value: Any) -> list[tuple[str, str]]:
    """(who, what) of a conversation; text is what a user says."""
    turns = []
    for item in value if isinstance(value, (list, tuple)) else [value]:
        if _is_turn(item):
            who = str(item.get("role", item.get("from"))).casefold()
            content = item.get("content", item.get("value", item.get("text")))
            if isinstance(content, (list, tuple)):
                content = "\n".join(part if isinstance(part, str) else str(part.get("text") or "") for part in content)
            turns.append((_SPEAKERS.get(who, who), str(content or "")))
        elif isinstance(item, str):
            turns.append(("user", item))
    return turns


def _parts(value: Any) -> list[Any] | None:
    """The videos and pictures among the parts of messages."""
    parts = []
    for item in value if isinstance(value, (list, tuple)) else []:
        content = item.get("content") if isinstance(item, Mapping) else None
        for part in content if isinstance(content, (list, tuple)) else []:
            kind = str(part.get("type", "")) if isinstance(part, Mapping) else ""
            if kind.startswith(("video", "image")):
                parts.append(part.get(kind) or part)
    return parts or None


def _numbers(value: Any, what: str, where: str) -> list[float]:
    numbers = value if isinstance(value, (list, tuple)) else [value]
    if not numbers or not all(isinstance(n, (int, float)) and not isinstance(n, bool) and math.isfinite(n) for n in numbers):
        raise TaskError(f"{where}: its {what} are {str(value)[:40]}, not numbers")
    return [float(n) for n in numbers]
