"""`ramet reward` as a user runs it, from videos to a trained model, a benchmark and a served score, on small settings."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from ramet.cli.main import main
from ramet.media.clips import make_questions
from ramet.recipes import reward_demo
from ramet.recipes.nano.vision import write_vision_model


def run(*arguments: object, expect: int = 0) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["ramet", *map(str, arguments)])
        main()
    assert ended.value.code == expect


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    rows = make_questions(folder / "clips", 60, 3)
    write_vision_model(folder / "base", [row["question"] for row in rows], 0)
    return folder


VIDEO_LIMITS = (2, 3136)
"""Frames of a video, and pixels of a frame."""
SMALL = ("--max-frames", VIDEO_LIMITS[0], "--max-pixels", VIDEO_LIMITS[1])


def build_pairs(folder: Path) -> None:
    questions = ("--questions", folder / "clips" / "questions.jsonl", "--answers", "guesser")
    run("reward", "build-pairs", *questions, "--out", folder / "pairs", "--json", folder / "b.json")


@pytest.fixture(scope="module")
def pairs(folder: Path) -> Path:
    """Pairs of right and wrong answers to the questions in `folder`."""
    build_pairs(folder)
    return folder / "pairs" / "pairs.jsonl"


@pytest.fixture(scope="module")
def drm(folder: Path, pairs: Path) -> Path:
    """A discriminative reward model that was trained on `pairs` for a few steps."""
    train = ("--model", folder / "base", "--pairs", pairs, "--videos", folder / "clips", "--out", folder / "drm", *SMALL)
    steps = ("--steps", 12, "--batch", 8, "--lora-rank", 0, "--learning-rate", 0.001, "--held-out", 0.3)
    run("reward", "train-drm", *train, *steps, "--json", folder / "t.json")
    return folder / "drm" / "drm"


def test_from_videos_to_a_benchmark(folder: Path, pairs: Path, drm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clips, questions = folder / "clips", folder / "clips" / "questions.jsonl"
    sheet = (folder / "pairs" / "datasheet.md").read_text()
    assert re.search(r"\| 7 clean \| \d+ \| \d+ \|", sheet)
    build_pairs(folder)  # again: from what is kept
    stages = [r for r in json.loads((folder / "b.json").read_text()) if r["record"] == "stage"]
    assert len(stages) == 7
    records = json.loads((folder / "t.json").read_text())
    assert [r["record"] for r in records[:3]] == ["meta", "training", "calibration"]
    assert records[1]["steps"] == 12
    video = sorted(clips.glob("*.mp4"))[0]
    question = ("--question", "What colour is the square?")
    capsys.readouterr()
    run("reward", "score", "--model", drm, "--video", video, *question, "--answer", "Answer: red", "--answer", "Answer: blue")
    assert len(re.findall(r"-?\d\.\d{3}  Answer: (?:red|blue)", capsys.readouterr().out)) == 2
    run("reward", "judge", "--model", drm, "--video", video, *question, "--first", "Answer: red", "--second", "Answer: blue")
    assert "probability that the first is better" in capsys.readouterr().out
    bench = ("reward", "bench", "--pairs", pairs, "--videos", clips, "--limit", 12)
    sweep = ("--max-frames", "1,2", "--conditions", "right,reversed", "--json", folder / "r.json")
    run(*bench, "--model", drm, "--out", folder / "bench-drm", *sweep)
    results = [r for r in json.loads((folder / "r.json").read_text()) if r["record"] == "result" and r["subset"] == "all"]
    assert [(r["condition"], r["frames"], r["n"]) for r in results] == [(c, f, 12) for f in (1, 2) for c in ("right", "reversed")]
    run(*bench, "--model", "fake:always-first", "--out", folder / "bench-fake", "--conditions", "right")
    assert "the same place wins in both orders for 100% of the pairs" in capsys.readouterr().err
    run(*bench, "--model", "fake:oracle", "--out", folder / "bench-oracle", "--conditions", "right")
    run("reward", "report", folder / "bench-oracle", folder / "bench-fake", "--json", folder / "d.json")
    difference = next(r for r in json.loads((folder / "d.json").read_text()) if r["record"] == "difference")
    assert (difference["difference"], difference["n"]) == (1.0, 12)
    page = (folder / "bench-drm" / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "http" not in re.sub(r"data:[^\"]*", "", page)
    best = ("reward", "best-of-n", "--questions", questions, "--answers", "guesser", "-n", "1,4")
    run(*best, "--model", drm, "--out", folder / "best", "--json", folder / "n.json")
    curves = {(r["method"], r["n"]): r for r in json.loads((folder / "n.json").read_text()) if r["record"] == "best_of_n"}
    assert curves["VideoDRM", 4]["accuracy"] <= curves["pass", 4]["accuracy"]
    assert (folder / "best" / "best-of-n.png").exists()


def test_what_cannot_be_read_or_prefers_nothing_ends_no_job(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Broken videos among those that are trained on, held out or asked about, and a tie: left out, counted, and said."""
    questions = [json.loads(line) for line in (folder / "clips" / "questions.jsonl").read_text().splitlines()[:24]]
    for name in ("questions", "pairs"):
        rows = []
        for n, row in enumerate(questions):
            (worse, *_) = (c for c in row["choices"] if c != row["answer"])
            rows.append(row | {"chosen": f"Answer: {row['answer']}", "rejected": f"Answer: {worse}"})
            if n % 2:
                shutil.copy(folder / "clips" / row["video"], tmp_path)
            else:
                (tmp_path / row["video"]).write_bytes(b"no video")
        rows.append(rows[1] | {"id": "tie", "rejected": rows[1]["chosen"]} if name == "pairs" else rows[1] | {"id": "other"})
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = ("reward", "train-drm", "--model", folder / "base", "--pairs", tmp_path / "pairs.jsonl", "--out", tmp_path / "drm", *SMALL)
    run(*train, "--steps", 2, "--batch", 4, "--lora-rank", 0, "--held-out", 0.4, "--json", tmp_path / "t.json")
    (record,) = (r for r in json.loads((tmp_path / "t.json").read_text()) if r["record"] == "training")
    assert record["pairs"] + record["held_out"] == 12
    assert 0 < record["unreadable"] < 12
    assert record["ties"] == 1
    printed = capsys.readouterr()
    assert "1 rows prefer no answer and are left out" in printed.err
    assert f"{record['unreadable']} of videos that cannot be read" in printed.out
    best = ("reward", "best-of-n", "--questions", tmp_path / "questions.jsonl", "--answers", "guesser", "-n", "1,2")
    run(*best, "--out", tmp_path / "best", "--model", tmp_path / "drm" / "drm", "--json", tmp_path / "n.json")
    curves = [r for r in json.loads((tmp_path / "n.json").read_text()) if r["record"] == "best_of_n"]
    assert {(r["questions"], r["unreadable"]) for r in curves} == {(13, 12)}


def test_a_generative_model_is_trained_twice_and_asked(folder: Path, pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clips = folder / "clips"
    traces = []
    for line in pairs.read_text().splitlines():
        row = json.loads(line)
        for first, answer in ((True, 1), (False, 2)):
            traces.append({"id": row["id"], "forward": first, "output": f"<think>Look.</think><answer>{answer}</answer>"})
    (folder / "traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in traces))
    common = ("--pairs", pairs, "--videos", clips, *SMALL, "--max-tokens", 30)
    sft = ("--traces", folder / "traces.jsonl", "--steps", 6, "--batch", 8, "--lora-rank", 0, "--learning-rate", 0.003)
    run("reward", "sft-grm", "--model", folder / "base", *common, *sft, "--out", folder / "sft")
    rl = ("--updates", 2, "--duels", 2, "--group-size", 2)
    run("reward", "train-grm", "--model", folder / "sft" / "grm", *common[:4], *rl, "--out", folder / "rl")
    bench = ("reward", "bench", "--model", folder / "rl" / "grm", *common[:4], "--limit", 1, "--conditions", "right")
    for flags, expected in (((), (*VIDEO_LIMITS, 30)), (("--max-frames", 1, "--max-tokens", 8), (1, VIDEO_LIMITS[1], 8))):
        run(*bench, *flags, "--out", folder / f"bench-grm-{len(flags)}", "--json", folder / "grm.json")
        (protocol,) = (r for r in json.loads((folder / "grm.json").read_text()) if r["record"] == "protocol")
        assert (protocol["frames"], protocol["pixels"], protocol["max_tokens"]) == expected, "as it was trained, unless flags say otherwise"
    video = sorted(clips.glob("*.mp4"))[0]
    capsys.readouterr()
    question = ("--video", video, "--question", "What?", "--first", "a", "--second", "b", "-k", 2)
    run("reward", "judge", "--model", folder / "rl" / "grm", *question, *SMALL, "--max-tokens", 8)
    out = capsys.readouterr().out
    assert out.count("as given") == out.count("swapped") == 2
    assert "better:" in out
    run("reward", "sft-grm", "--model", folder / "base", *common, "--out", folder / "none", expect=1)  # its own verdicts: none is readable


def test_what_cannot_be_meant_is_said_in_one_line(folder: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ("--pairs", pairs, "--videos", folder / "clips")
    kept = ("bench", "--model", "fake:random", *data, "--out", tmp_path / "g", "--limit", 2, "--conditions", "right")
    run("reward", *kept)
    for code, arguments, message in (
        (2, ("bench", "--model", "fake:nobody", *data, "--out", tmp_path / "a"), "unknown fake judge 'nobody'"),
        (1, ("bench", "--model", tmp_path, *data, "--out", tmp_path / "b"), "is no reward model"),
        (2, ("bench", "--model", "fake:random", *data, "--out", tmp_path / "c", "--conditions", "left"), "no condition 'left'"),
        (2, ("bench", "--model", "fake:random", *data, "--out", tmp_path / "d", "-k", "0"), "positive whole numbers separated by commas"),
        (2, ("bench", "--model", "fake:random", *data, "--out", tmp_path / "e", "--field", "x"), "not of the form question=prompt"),
        (2, ("bench", "--model", "fake:random", "--pairs", tmp_path / "none.jsonl", "--out", tmp_path / "f"), "cannot read"),
        (2, (*kept, "--field", "chosen=rejected", "--field", "rejected=chosen"), "another configuration"),
        (2, ("report", tmp_path), "holds no benchmark run"),
        (2, ("serve", "--model", "fake:random", "--videos", tmp_path), "gives no scores"),
    ):
        capsys.readouterr()
        run("reward", *arguments, expect=code)
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error


def test_a_served_model(folder: Path, drm: Path) -> None:
    """The process that a user starts, with its token."""
    command = [sys.executable, "-m", "ramet.cli.main", "reward", "serve", "--model", str(drm), "--videos", str(folder / "clips"), "--port"]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [*command, str(port)], env=os.environ | {"RAMET_REWARD_TOKEN": "a token for the test"}, stderr=subprocess.PIPE
    )
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            try:
                httpx.get(url + "/health")
                break
            except httpx.TransportError:
                assert process.poll() is None
                time.sleep(0.1)
        video = sorted((folder / "clips").glob("*.mp4"))[0].name
        body = {"items": [{"video": video, "question": "What colour is the square?", "answer": "Answer: red"}]}
        reply = httpx.post(url + "/score", json=body, headers={"Authorization": "Bearer a token for the test"}, timeout=60)
        assert isinstance(reply.json()["scores"][0], float)
        assert httpx.post(url + "/score", json=body).status_code == 401
    finally:
        process.terminate()
        process.wait(20)


def test_the_demonstration_in_small_goes_on_after_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("TRAIN", 90), ("HELD_OUT", 30), ("HELD_BACK", 10), ("STEPS", 20)):
        monkeypatch.setattr(reward_demo, name, value)
    original = reward_demo.run_bench

    def interrupted(*arguments: Any, **more: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(reward_demo, "run_bench", interrupted)
    command = ("reward", "demo", "--runs", tmp_path, "--json", tmp_path / "demo.json")
    run(*command, expect=130)
    trained = (tmp_path / "reward-demo" / "drm" / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(reward_demo, "run_bench", original)
    run(*command)
    assert (tmp_path / "reward-demo" / "drm" / "model.safetensors").stat().st_mtime_ns == trained
    records = json.loads((tmp_path / "demo.json").read_text())
    results = {(r["subset"], r["condition"]) for r in records if r["record"] == "result"}
    assert results >= {(s, c) for s in ("all", "colour", "count", "order") for c in ("right", "wrong", "none", "reversed")}
    assert all({"n", "accuracy", "ci_low", "ci_high"} <= r.keys() for r in records if r["record"] == "result" and r["subset"] != "macro")
    assert {r["n"] for r in records if r["record"] == "best_of_n"} == {1, 2, 4, 8}
    for name in ("accuracy.png", "best-of-n.png", "training.png", "report.html"):
        assert (tmp_path / "reward-demo" / name).stat().st_size > 1000
