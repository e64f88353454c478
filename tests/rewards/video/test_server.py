"""The server under many clients, and under hostile ones. Requests go through a real socket."""

from __future__ import annotations

import json
import math
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import av
import httpx
import numpy as np
import pytest
import uvicorn

from ramet.agents.tree import Segment
from ramet.errors import ConfigError, RewardError, TaskError
from ramet.rewards.video.discriminative import Item, VideoDRM
from ramet.rewards.video.frames import read_frames
from ramet.rewards.video.functions import as_reward_fn
from ramet.rewards.video.server import BODY, ITEMS, RemoteReward, RewardService, serve

TOKEN = "a token of the tests"


@contextmanager
def served(model: object, videos: Path) -> Iterator[tuple[str, RewardService]]:
    service = RewardService(model, videos, TOKEN, ("<|im_end|>",))  # type: ignore[arg-type]
    bound = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(service.app(), log_level="warning"))
    thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}", service
    finally:
        server.should_exit = True
        thread.join(20)


def post(url: str, body: object, token: str = TOKEN, path: str = "/score", **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(url + path, content=content, headers={"Authorization": f"Bearer {token}", **headers}, timeout=60)


class Lengths:
    """Scores an answer by what stands in it, slowly, and some not at all."""

    name = "lengths"

    def rewards(self, scores: Sequence[float]) -> list[float]:
        return [1 / (1 + math.exp(-score)) for score in scores]

    def score(self, items: Sequence[Item]) -> list[float]:
        time.sleep(0.01)
        if any("broken" in item.answer for item in items):
            raise RewardError("cannot score 'broken'")
        return [float("nan") if "nan" in item.answer else float(int(item.answer)) for item in items]


@pytest.mark.parametrize("broken", [False, True])
def test_64_clients_get_their_own_answers(tmp_path: Path, broken: bool) -> None:
    with served(Lengths(), tmp_path) as (url, service):

        def client(number: int) -> None:
            with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60) as http:
                for turn in range(8):
                    values = [number * 1000 + turn * 10 + i for i in range(1 + number % 5)]
                    if broken and number % 16 == 7:
                        refused = http.post("/score", json={"items": [{"question": "q", "answer": "broken"}]})
                        assert refused.status_code == 422
                    said = http.post("/score", json={"items": [{"question": "q", "answer": str(v)} for v in values]})
                    assert said.json()["scores"] == [float(v) for v in values]

        with ThreadPoolExecutor(64) as pool:
            list(pool.map(client, range(64)))
        if not broken:
            assert service.calls < 64 * 8 / 4  # requests that waited were scored together


def test_what_is_hostile_is_refused(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "secret.mp4").write_text("secret")
    (tmp_path / "videos" / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    item = {"question": "q", "answer": "1"}
    with served(Lengths(), tmp_path / "videos") as (url, _):
        assert post(url, {"items": [item]}, token="another token here").status_code == 401
        assert httpx.post(url + "/score", json={"items": [item]}).status_code == 401
        assert post(url, b" " * (BODY + 1)).status_code == 413
        assert (
            httpx.post(url + "/score", content=(b" " * 2**16 for _ in range(64)), headers={"Authorization": f"Bearer {TOKEN}"}).status_code
            == 413
        )
        assert post(url, b"\x1f\x8b", **{"Content-Encoding": "gzip"}).status_code == 415
        assert post(url, b"{").status_code == 400
        assert post(url, b"[" * 100_000).status_code == 400
        for body in ([], {}, {"items": []}, {"items": [item] * (ITEMS + 1)}, {"items": [item | {"x": 1}]}, {"items": [{"answer": "1"}]}):
            assert post(url, body).status_code == 422
        for start in (-1, "1", None):
            assert post(url, {"items": [item | {"start": start}]}).status_code == 422
        for path in ("../secret.mp4", "/etc/passwd", "link.mp4", "a/../../secret.mp4", "x\0.mp4"):
            refused = post(url, {"items": [item | {"video": path}]})
            assert refused.status_code == 422
            assert str(tmp_path) not in refused.text
        assert post(url, {"items": [item | {"answer": "nan"}]}).status_code == 422
        assert post(url, {"items": [item | {"answer": "no number"}]}).status_code == 500
        assert httpx.get(url + "/health").json() == {"model": "lengths"}
        assert post(url, {"items": [item]}).json()["scores"] == [1.0]


def test_openrlhf_gets_its_rewards(tmp_path: Path) -> None:
    """Its client sends no headers, and texts with the special tokens that ended them."""
    label = json.dumps({"question": "q"})
    with served(Lengths(), tmp_path) as (url, _):
        asked = {"query": ["ask: 3<|im_end|>", "ask: -2"], "prompts": ["ask: "] * 2, "labels": [label] * 2}
        said = httpx.post(f"{url}/get_reward?token={TOKEN}", json=asked, timeout=60).json()
        assert httpx.post(f"{url}/get_reward?token=wrong", json=asked).status_code == 401
        assert said["rewards"] == [3.0, -2.0]
        assert said["scores"] == pytest.approx([0.9526, 0.1192], abs=1e-4)
        assert said["extra_logs"] == {"reward_model_score": 0.5}
        assert post(url, {"query": ["x"], "prompts": ["y"], "labels": [label]}, path="/get_reward").status_code == 422
        assert post(url, {"query": ["x"], "prompts": ["x"], "labels": ["no json"]}, path="/get_reward").status_code == 400
        assert post(url, {"query": ["x"], "prompts": [], "labels": []}, path="/get_reward").status_code == 422


def test_the_client_gets_the_models_own_scores(drm: VideoDRM, clips: Path, questions: list) -> None:
    items = [Item(q.video, q.question, f"Answer: {c}") for q in questions[:12] for c in q.choices] + [Item(None, "What?", "Nothing")]
    expected = drm.score(items)
    with served(VideoDRM(drm.scorer, drm.tokenizer, drm.settings), clips) as (url, _):
        assert RemoteReward(f"{url}/score", TOKEN, clips).score(items) == pytest.approx(expected, abs=1e-5)
        assert RemoteReward(url, TOKEN, clips).probabilities(items) == pytest.approx(drm.probabilities(items), abs=1e-5)
        long = [Item(None, "q", f"{n} " + "What colour is the square? " * 90) for n in range(300)]  # more than a request may hold
        assert len(RemoteReward(url, TOKEN, clips).score(long)) == 300
        with pytest.raises(RewardError, match="is not below"):
            RemoteReward(url, TOKEN, clips / "elsewhere").score(items)
        with pytest.raises(RewardError, match="is this the address of a reward server"):
            RemoteReward(f"{url}/nowhere", TOKEN, clips).score(items)
        for token in ("not the right token", ""):
            with pytest.raises(RewardError, match="wrong or missing bearer token"):
                RemoteReward(url, token, clips).score(items)
        with pytest.raises(RewardError, match=r"cannot read video none\.mp4"):
            RemoteReward(url, TOKEN, clips).score([Item(Segment(str(clips / "none.mp4")), "q", "a")])
    with pytest.raises(RewardError, match="cannot be reached"):
        RemoteReward("http://127.0.0.1:9", TOKEN, clips, attempts=2).score(items)


def test_a_bomb_is_not_decoded(drm: VideoDRM, tmp_path: Path) -> None:
    """A few kilobytes that would be gigabytes of pixels."""
    path = tmp_path / "bomb.png"
    from PIL import Image

    Image.new("1", (40_000, 40_000)).save(path)
    assert path.stat().st_size < 2**20
    with served(drm, tmp_path) as (url, _):
        refused = post(url, {"items": [{"video": "bomb.png", "question": "q", "answer": "a"}]})
    assert refused.status_code == 422


def test_lists_of_other_files_and_bombs_among_pictures_are_refused(tmp_path: Path) -> None:
    """A playlist may name any file; a picture of a folder may be gigabytes of pixels."""
    from PIL import Image

    secret = tmp_path / "secret.ts"
    with av.open(str(secret), "w") as container:
        stream = container.add_stream("mpeg2video", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), dtype=np.uint8), format="rgb24")))
        container.mux(stream.encode())
    folder = tmp_path / "videos"
    folder.mkdir()
    (folder / "list.m3u8").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:0.2,\n{secret}\n#EXT-X-ENDLIST\n")
    with pytest.raises(TaskError):
        read_frames(folder / "list.m3u8", 1)
    pictures = folder / "pictures"
    pictures.mkdir()
    Image.new("1", (20_000, 20_000)).save(pictures / "1.png")
    with pytest.raises(TaskError, match=r"cannot read picture|at most"):
        read_frames(pictures, 1)
    for n in range(12):
        Image.new("1", (5_700, 5_700)).save(pictures / f"{n}.png")
    with pytest.raises(TaskError, match="read fewer"):
        read_frames(pictures, 12)


def test_trl_gets_a_reward_function(drm: VideoDRM, clips: Path, questions: list) -> None:
    reward = as_reward_fn(drm, clips)
    q = questions[0]
    name = Path(q.video.file).name
    scores = reward(
        ["Answer: red", [{"role": "assistant", "content": "Answer: red"}]], question=[q.question] * 2, video=[name, None], prompts=["", ""]
    )
    assert scores == drm.score([Item(q.video, q.question, "Answer: red"), Item(None, q.question, "Answer: red")])
    with pytest.raises(RewardError, match="needs the column 'video'; the data set has prompts, question"):
        reward(["x"], question=["q"], prompts=[""])

    class Broken:
        name = "broken"

        def score(self, items: Sequence[Item]) -> list[float]:
            return [float("nan")] * len(items)

    with pytest.raises(RewardError, match="no numbers"):
        as_reward_fn(Broken(), clips)(["x"], question=["q"], video=[None])
    assert as_reward_fn(Broken(), clips, default=-1.0)(["x"], question=["q"], video=[None]) == [-1.0]
    long = {"question": ["q", "q"], "video": [None, None]}
    with pytest.raises(RewardError, match="nothing is scored in part"):
        as_reward_fn(drm, clips)(["short", "word " * 3000], **long)
    assert as_reward_fn(drm, clips, default=-1.0)(["short", "word " * 3000], **long) == [drm.score([Item(None, "q", "short")])[0], -1.0]


def test_a_port_that_is_taken_and_a_short_token(tmp_path: Path) -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    with pytest.raises(ConfigError, match="cannot listen on"):
        serve(Lengths(), tmp_path, TOKEN, "127.0.0.1", taken.getsockname()[1])
    with pytest.raises(ConfigError, match="16 characters"):
        RewardService(Lengths(), tmp_path, "short")
    with pytest.raises(ConfigError, match="no folder of videos"):
        RewardService(Lengths(), tmp_path / "none", TOKEN)


def test_a_clip_of_huge_frames_is_refused_by_its_header(tmp_path: Path) -> None:
    path = tmp_path / "huge.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=1)
        stream.width, stream.height, stream.pix_fmt = 8000, 6000, "yuvj420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((6000, 8000, 3), dtype=np.uint8), format="rgb24")))
        container.mux(stream.encode())
    with pytest.raises(TaskError, match="8000x6000"):
        read_frames(path, 1)
