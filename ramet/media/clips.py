"""Synthetic clips with known answers: a coloured square, several squares, or one colour after another, on a noisy background.

Clips of the category `order` show the same kinds of frames in either order, so that a question about them can only be answered from the
order of the frames.
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
"""Colours of the squares, as (red, green, blue) from 0 to 255."""
CATEGORIES = ("colour", "count", "order")
"""What a question may be about: the colour of a square, the number of squares, the colour that comes first."""
SIDE, FRAMES, RATE = 56, 8, 8
"""Height and width of a clip in pixels, its number of frames, and its frames per second."""
SCENE = 4
"""Frames per scene of a clip of several scenes. A scene lasts one second."""


@dataclass(frozen=True)
class SyntheticClip:
    """A clip and a question about it.

    frames    uint8 [frames, height, width, 3]
    answer    the right one of `choices`
    category  one of `CATEGORIES`, or "at" for a clip of several scenes
    """

    frames: np.ndarray
    question: str
    answer: str
    choices: tuple[str, ...]
    category: str


def draw_clip(category: str, rng: random.Random) -> SyntheticClip:
    """A random clip of a category. Raises `ConfigError` for a category that is not in `CATEGORIES`."""
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
    raise ConfigError(f"there is no category of clips {category!r}; choose one of {', '.join(CATEGORIES)}")


def draw_scenes(scenes: int, rng: random.Random) -> tuple[SyntheticClip, list[str], int]:
    """A clip of several scenes of one second each, with a square of a different colour in each.

    Returns the clip with a question about one scene, the colours of all scenes, and the index of the scene asked about.
    """
    names = rng.sample(list(COLOURS), scenes)
    frames = np.random.default_rng(rng.getrandbits(32)).integers(90, 130, (scenes * SCENE, SIDE, SIDE, 3)).astype(np.uint8)
    for n, name in enumerate(names):
        _square(frames[n * SCENE : (n + 1) * SCENE], COLOURS[name], rng)
    place = rng.randrange(scenes)
    return SyntheticClip(frames, f"What colour is the square in s{place + 1}?", names[place], tuple(COLOURS), "at"), names, place


def _square(frames: np.ndarray, colour: tuple[int, int, int], rng: random.Random, corner: tuple[int, int] | None = None) -> None:
    """Draw a square into all frames, with its upper left corner at (y, x), or at a random place and of random size without `corner`."""
    y, x = corner or (rng.randrange(2, 30), rng.randrange(2, 30))
    size = 20 if corner else rng.randrange(18, 25)
    frames[:, y : y + size, x : x + size] = colour


def write_clip(path: Path, frames: np.ndarray, rate: int = RATE) -> None:
    """Write frames uint8 [n, height, width, 3] as an MPEG-4 file with `rate` frames per second. Raises `StorageError`."""
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
    """Write `count` clips to `folder`, cycling through the categories. Returns their questions as rows, also written to `questions.jsonl`.

    Clips that exist already are kept. The same seed gives the same clips.
    """
    return _made(folder, count, seed, RATE, lambda index, rng: (draw_clip(categories[index % len(categories)], rng), {}))


def make_long_questions(folder: Path, count: int, seed: int, scenes: int) -> list[dict[str, Any]]:
    """Like `make_questions`, with clips of several scenes.

    A row also has `scenes`, the colours of its scenes, and `evidence`, the start and end in seconds of the scene asked about.
    """

    def draw(index: int, rng: random.Random) -> tuple[SyntheticClip, dict[str, Any]]:
        clip, colours, place = draw_scenes(scenes, rng)
        return clip, {"scenes": colours, "evidence": [float(place), place + 1.0]}

    return _made(folder, count, seed, SCENE, draw)


def _made(
    folder: Path, count: int, seed: int, rate: int, draw: Callable[[int, random.Random], tuple[SyntheticClip, dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Write clips and rows; `draw` gives clip number `index` and further values of its row."""
    rows = []
    for index in range(count):
        clip, more = draw(index, random.Random(f"clip/{seed}/{index}"))
        path = folder / f"{seed}-{index:05d}.mp4"
        if not path.exists():
            draft = path.with_name(f"draft-{path.name}")
            write_clip(draft, clip.frames, rate)
            draft.replace(path)
        row = {
            "id": f"{clip.category}-{seed}-{index}", "video": path.name, "question": clip.question, "answer": clip.answer,
            "choices": list(clip.choices), "category": clip.category,
        }  # fmt: skip
        rows.append(row | more)
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows
