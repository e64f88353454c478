"""Long videos as tasks: segments by key, the root's view, rewards; and trees in which clones watch."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from ramet.agents.chat import ControlTokenFormat
from ramet.agents.tree import Segment
from ramet.env.instructions import instructed
from ramet.env.longvideo import LongVideoEnvironment
from ramet.env.registry import env_settings
from ramet.env.settings import EnvSettings
from ramet.errors import ConfigError, TaskError
from ramet.media.clips import make_long_questions
from ramet.policy.engines.vision import VideoReader, VideoSettings
from ramet.recipes import reproduce_longvideo as longvideo
from ramet.recipes.nano.vision import random_vision_model
from ramet.recipes.nano.watching import Teacher, demonstrate_watching, examples, needed, scenes_of
from ramet.rewards.video.discriminative import VideoAnswer
from ramet.runs.settings import RunConfig, load, validate


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long")
    make_long_questions(folder, 12, 0, 3)
    return folder


def config(folder: Path, **more: Any) -> EnvSettings:
    source = str(folder / "questions.jsonl")
    return env_settings(kind="longvideo", data=source, train=source, allow_overlap=True, seconds=1.0, **more)


def test_the_root_reads_an_index_and_keys_are_segments(folder: Path) -> None:
    env = config(folder).build()
    tasks = env.tasks("iid", 12, 0)
    assert len(tasks) == 12
    for task in tasks:
        text = task.messages[0].content
        assert text.startswith("Segments of a video:\ns1: 0-1 s\ns2: 1-2 s\ns3: 2-3 s\n\nQuestion: What colour is the square in s")
        assert "Choices: red, green, blue" in text
        assert task.messages[0].media == ()
        file = task.reference.video.file
        assert dict(task.documents) == {f"s{n}": Segment(file, n - 1.0, float(n)) for n in (1, 2, 3)}
        assert task.reference.evidence == task.documents[needed(task)[0]]
        assert env.size(task) == 3
    seen = config(folder, root_sees="video").build().tasks("iid", 1, 0)[0]
    assert seen.messages[0].media == tuple(seen.documents.values())


def test_segments_cover_the_video_once(folder: Path) -> None:
    """Whatever their length; the last may be shorter, and there are not too many."""
    env = config(folder).build()
    assert isinstance(env, LongVideoEnvironment)
    video = Segment(str(next(folder.glob("*.mp4"))), 0.5, 2.9)
    for seconds in (0.3, 0.7, 1.0, 2.4, 50.0):
        parts = list(LongVideoEnvironment({"iid": "x"}, seconds=seconds).segments(video).values())
        assert (parts[0].start, parts[-1].end) == (0.5, 2.9)
        assert all(a.end == b.start for a, b in pairwise(parts))
        assert all(p.end > p.start for p in parts)
        assert all(p.end - p.start == pytest.approx(seconds) for p in parts[:-1])
    with pytest.raises(TaskError, match=r"makes 2400 segments of 0\.001 s"):
        LongVideoEnvironment({"iid": "x"}, seconds=0.001).segments(video)


def test_rewards(folder: Path) -> None:
    items: list[VideoAnswer] = []

    def reward(item: VideoAnswer) -> float:
        items.append(item)
        return 0.25

    source = {"iid": str(folder / "questions.jsonl")}
    env = LongVideoEnvironment(source, seconds=1.0, metric="reward", judge=reward)
    task = env.tasks("iid", 1, 0)[0]
    right = task.reference.answer
    assert env.metrics == ("reward", "em")
    assert [env.grade(task, a) for a in (right, "mauve", None)] == [0.25, 0.25, 0.0]
    assert items[0] == VideoAnswer(task.reference.evidence, task.reference.question, f"Answer: {right}")
    assert [env.grade(task, a, "em") for a in (right, right.upper(), "mauve", None)] == [1.0, 1.0, 0.0, 0.0]
    assert LongVideoEnvironment(source).metrics == ("em",)
    with pytest.raises(ConfigError, match=r"env\.reward_model is not set"):
        LongVideoEnvironment(source, metric="reward")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"env": {"kind": "longvideo", "metric": "f1"}}, "env.metric takes one of em, reward"),
        ({"env": {"kind": "hotpotqa", "metric": "reward"}}, "env.metric takes one of em, f1"),
        ({"env": {"kind": "gsm8k", "seconds": 2.0}}, "seconds does not belong to the environment gsm8k"),
        ({"env": {"kind": "longvideo", "seconds": 0}}, "takes a number above 0"),
        ({"attention": {"method": "spava"}, "backend": "vllm"}, "goes with the backend transformers"),
        ({"attention": {"method": "spava"}, "device": "cuda"}, "on the CPU: leave device out"),
        ({"attention": {"method": "ring"}}, "attention.method"),
    ],
)
def test_what_does_not_belong_together_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(RunConfig, {"model": "nano", "env": {"kind": "rows"}} | change)


def test_demonstrations_are_whole_trees(folder: Path) -> None:
    """Of four, two guess, one asks for the right segment, one for all; clones see what they were given."""
    env = config(folder)
    tasks = [instructed(task, env.instruction(True)) for task in env.build().tasks("train", 12, 0)]
    tokenizer, model = random_vision_model([task.messages[0].content for task in tasks], 0)
    chat = ControlTokenFormat(tokenizer)
    chat.placeholder_ids = VideoReader(model.config, tokenizer, VideoSettings(max_frames=2, max_pixels=56 * 56)).ids
    rows = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    by_id = {task.reference.id: task.reference for task in tasks}
    truth = {key: colour for row in rows for key, colour in scenes_of(by_id[row["id"]], row["scenes"], 1.0).items()}
    trees = demonstrate_watching(tasks, truth, chat, 0)
    assert [len(tree.root.clones) for tree in trees] == [0, 1, 0, 3] * 3
    for tree, task in zip(trees, tasks, strict=True):
        assert [clone.media for clone in tree.root.clones] in ([], [(task.reference.evidence,)], [(s,) for s in task.documents.values()])
        assert tree.answer in task.reference.choices
        if tree.root.clones:
            assert tree.answer == task.reference.answer
            assert [truth[c.media[0].file, c.media[0].start] for c in tree.root.clones] == [c.answer for c in tree.root.clones]
    shown = examples(trees)
    assert len(shown) == 12 + 12
    assert all(any(e.mask) and len(e.ids) == len(e.mask) for e in shown)
    assert Teacher(chat, truth).context is None


def test_a_run_end_to_end_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs, VideoDRM, demonstrations, reinforcement learning from the VideoDRM alone, evaluation by both measures; then again, at once."""
    for name, value in (("SCENES", 2), ("TRAIN", 200), ("HELD_OUT", 6), ("DRM_STEPS", 4), ("SFT_STEPS", 4)):
        monkeypatch.setattr(longvideo, name, value)
    train = {"updates": 2, "tasks": 2, "group_size": 2, "checkpoint_every": 1}
    small = [*(f"train.{name}={value}" for name, value in train.items()), "eval.tasks=3", "eval.budgets=[64]", "budgets=[64]"]
    longvideo.reproduce_longvideo(tmp_path / "run", "longvideo", small, 0)
    records = json.loads((tmp_path / "run" / "longvideo.json").read_text())
    points = {(r["policy"], r["metric"]) for r in records if r["record"] == "point"}
    assert points == {(p, m) for p in ("base", "trained") for m in ("reward", "em")}
    updates = [r for r in records if r["record"] == "update"]
    assert [u["update"] for u in updates] == [0, 1]
    assert all(0 <= u["accuracy"] <= 1 for u in updates)
    assert (tmp_path / "run" / "learning.png").stat().st_size > 1000
    written = (tmp_path / "run" / "trained" / "checkpoints" / "step-000002" / "model.safetensors").stat().st_mtime_ns
    longvideo.reproduce_longvideo(tmp_path / "run", "longvideo", small, 0)
    assert (tmp_path / "run" / "trained" / "checkpoints" / "step-000002" / "model.safetensors").stat().st_mtime_ns == written
    assert load(RunConfig, tmp_path / "run" / "config.toml").env.metric == "reward"
