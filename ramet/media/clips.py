"""Clips whose truth is known, drawn here: squares of a colour, several squares, one colour after another.

The clips of the category `order` show the same kind of frames in either order, so that nothing but their order answers.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ramet.errors import ConfigError, StorageError

COLOURS = {
    "red": (210, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 70, 210),
    "yellow": (225, 210, 50),
    "purple": (150, 60, 180),
    "white": (240, 240, 240),
}
CATEGORIES = ("colour", "count", "order")
SIDE, FRAMES, RATE = 56, 8, 8
SCENE = 4
"""Frames of a scene, which lasts a second."""


@dataclass(frozen=True)
class SyntheticClip:
    """One clip: its frames, a question about it and what is right."""

    frames: np.ndarray
    question: str
    answer: str
    choices: tuple[str, ...]
    category: str


def draw_clip(category: str, rng: random.Random) -> SyntheticClip:
    """A clip of a category, at random."""
    background = np.random.default_rng(rng.getrandbits(32)).integers(90, 130, (FRAMES, SIDE, SIDE, 3)).astype(np.uint8)
    names = rng.sample(list(COLOURS), len(COLOURS))
    if category == "colour":
        _square(background, COLOURS[names[0]], rng)
        return SyntheticClip(background, "What colour is the square?", names[0], tuple(COLOURS), category)
    if category == "count":
        number = rng.randint(1, 4)
        for y, x in rng.sample([(2, 2), (2, 30), (30, 2), (30, 30)], number):
            _square(background, COLOURS["white"], rng, (y + rng.randrange(6), x + rng.randrange(6)))
        return SyntheticClip(background, "How many squares are there?", str(number), ("1", "2", "3", "4"), category)
    if category == "order":
        corner = (rng.randrange(2, 28), rng.randrange(2, 28))
        for half, name in zip((background[: FRAMES // 2], background[FRAMES // 2 :]), names, strict=False):
            _square(half, COLOURS[name], rng, corner)
        return SyntheticClip(background, "Which colour comes first?", names[0], tuple(sorted(names[:2])), category)
    raise ConfigError(f"no clips of category {category!r}; there are {', '.join(CATEGORIES)}")


def draw_scenes(scenes: int, rng: random.Random) -> tuple[SyntheticClip, list[str], int]:
    """A clip of several scenes of a second each, a square of another colour in each; the colours; the scene that is asked about."""
    names = rng.sample(list(COLOURS), scenes)
    frames = np.random.default_rng(rng.getrandbits(32)).integers(90, 130, (scenes * SCENE, SIDE, SIDE, 3)).astype(np.uint8)
    for n, name in enumerate(names):
        _square(frames[n * SCENE : (n + 1) * SCENE], COLOURS[name], rng)
    place = rng.randrange(scenes)
    return SyntheticClip(frames, f"What colour is the square in s{place + 1}?", names[place], tuple(COLOURS), "at"), names, place


def _square(frames: np.ndarray, colour: tuple[int, int, int], rng: random.Random, corner: tuple[int, int] | None = None) -> None:
    y, x = corner or (rng.randrange(2, 30), rng.randrange(2, 30))
    size = 20 if corner else rng.randrange(18, 25)
    frames[:, y : y + size, x : x + size] = colour


def write_clip(path: Path, frames: np.ndarray, rate: int = RATE) -> None:
    """Frames (n, height, width, 3) as a file that PyAV reads."""
    import av

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg4", rate=rate, options={"qscale": "2"})
            stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error


def make_questions(folder: Path, count: int, seed: int, categories: Sequence[str] = CATEGORIES) -> list[dict[str, Any]]:
    """`count` clips in `folder`, a category after another, and their questions as rows; also in `questions.jsonl`."""
    return _made(folder, count, seed, RATE, lambda index, rng: (draw_clip(categories[index % len(categories)], rng), {}))


def make_long_questions(folder: Path, count: int, seed: int, scenes: int) -> list[dict[str, Any]]:
    """The same of clips of several scenes: a row's `scenes` are their colours, its `evidence` the seconds that are asked about."""

    def draw(index: int, rng: random.Random) -> tuple[SyntheticClip, dict[str, Any]]:
        drawn, colours, place = draw_scenes(scenes, rng)
        return drawn, {"scenes": colours, "evidence": [float(place), place + 1.0]}

    return _made(folder, count, seed, SCENE, draw)


def _made(
    folder: Path, count: int, seed: int, rate: int, draw: Callable[[int, random.Random], tuple[SyntheticClip, dict[str, Any]]]
) -> list[dict[str, Any]]:
    rows = []
    for index in range(count):
        drawn, more = draw(index, random.Random(f"clip/{seed}/{index}"))
        path = folder / f"{seed}-{index:05d}.mp4"
        if not path.exists():
            draft = path.with_name(f"draft-{path.name}")
            write_clip(draft, drawn.frames, rate)
            draft.replace(path)
        row = {
            "id": f"{drawn.category}-{seed}-{index}", "video": path.name, "question": drawn.question, "answer": drawn.answer,
            "choices": list(drawn.choices), "category": drawn.category,
        }  # fmt: skip
        rows.append(row | more)
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows
