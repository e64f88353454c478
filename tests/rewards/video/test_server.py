"""The server under many clients, and under hostile ones. Requests go through a real socket."""

from __future__ import annotations

import json
import math
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import pytest
import uvicorn

from ramet.agents.tree import Segment
from ramet.errors import ConfigError, RewardError, TaskError
from ramet.media.frames import read_frames
from ramet.rewards.video.discriminative import VideoAnswer, VideoDRM
from ramet.rewards.video.functions import as_reward_fn
from ramet.rewards.video.server import BODY, ITEMS, RemoteReward, RewardService, serve

TOKEN = "a token of the tests"


@contextmanager
def served(model: object, videos: Path, linked: Sequence[Path] = ()) -> Iterator[tuple[str, RewardService]]:
    service = RewardService(model, videos, TOKEN, ("<|im_end|>", "<|endoftext|>"), linked)  # type: ignore[arg-type]
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

    def score(self, items: Sequence[VideoAnswer]) -> list[float]:
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
        for start in (-1, "1", [0]):
            assert post(url, {"items": [item | {"start": start}]}).status_code == 422
        for path in ("../secret.mp4", "/etc/passwd", "link.mp4", "a/../../secret.mp4", "x\0.mp4"):
            refused = post(url, {"items": [item | {"video": path}]})
            assert refused.status_code == 422
            assert str(tmp_path) not in refused.text
        assert post(url, {"items": [item | {"answer": "nan"}]}).status_code == 422
        assert post(url, {"items": [item | {"answer": "no number"}]}).status_code == 500
        assert httpx.get(url + "/health").json() == {"model": "lengths"}
        assert post(url, {"items": [item]}).json()["scores"] == [1.0]
        assert post(url, {"items": [item | {"start": None, "end": None, "video": None}]}).json()["scores"] == [1.0]


def test_half_a_character_is_refused_as_such(tmp_path: Path) -> None:
    """Wherever it stands: in an answer, a path, a name, a query or within the JSON of a label."""
    item = {"question": "q", "answer": "1"}
    label = json.dumps({"question": "q"})
    with served(Lengths(), tmp_path) as (url, _):
        for more in ({"answer": "1\ud83d"}, {"video": "\udc80.mp4"}, {"question": "\ud83d"}, {"\ud83d": 1}):
            refused = post(url, {"items": [item | more]})
            assert (refused.status_code, "half of a pair of surrogates" in refused.text) == (422, True)
        for query, said in (("ask: 1\ud83d", label), ("ask: 1", json.dumps({"question": "\ud83d"}))):
            refused = post(url, {"query": [query], "prompts": ["ask: "], "labels": [said]}, path="/get_reward")
            assert (refused.status_code, "half of a pair of surrogates" in refused.text) == (422, True)
        assert post(url, {"items": [item | {"question": "\U0001f600"}]}).status_code == 200


def test_links_are_followed_to_where_the_owner_allows_it(tmp_path: Path) -> None:
    """The hub's cache keeps names in one folder and bytes in another; pictures of a folder are links there too."""
    videos, blobs = tmp_path / "snapshots", tmp_path / "blobs"
    videos.mkdir()
    blobs.mkdir()
    (blobs / "0f3a").write_bytes(b"bytes")
    (tmp_path / "secret").write_bytes(b"secret")
    (videos / "clip.mp4").symlink_to("../blobs/0f3a")
    (videos / "pictures").mkdir()
    (videos / "pictures" / "1.png").symlink_to(blobs / "0f3a")
    (videos / "secret.mp4").symlink_to("../secret")
    (videos / "secrets").mkdir()
    (videos / "secrets" / "1.png").symlink_to(tmp_path / "secret")
    item = {"question": "q", "answer": "1"}
    for linked, allowed in (((), 422), ((blobs,), 200)):
        with served(Lengths(), videos, linked=linked) as (url, _):
            for name in ("clip.mp4", "pictures"):
                assert post(url, {"items": [item | {"video": name}]}).status_code == allowed
                with suppress(TaskError):
                    assert RemoteReward(url, TOKEN, videos).score([VideoAnswer(Segment(str(videos / name)), "q", "1")]) == [1.0]
            for name in ("secret.mp4", "secrets"):
                refused = post(url, {"items": [item | {"video": name}]})
                assert (refused.status_code, "leads outside" in refused.text) == (422, True)


def test_reading_a_video_holds_up_nobody_else(tmp_path: Path) -> None:
    """While one is read, for as long as it takes, others are scored; what cannot be read never reaches the model."""
    release = threading.Event()

    class Reading(Lengths):
        seen: list[str] = []  # noqa: RUF012

        def reader(self, segment: Segment) -> None:
            name = Path(segment.file).name
            if name == "long.mp4":
                release.wait(60)
            if name == "broken.mp4":
                raise TaskError(f"cannot read video {segment.file}: no frames")

        def score(self, items: Sequence[VideoAnswer]) -> list[float]:
            self.seen += [Path(item.video.file).name for item in items if item.video]
            return super().score(items)

    item = {"question": "q", "answer": "1"}
    model = Reading()
    with served(model, tmp_path) as (url, _), ThreadPoolExecutor(1) as pool:
        waits = pool.submit(post, url, {"items": [item | {"video": "long.mp4"}]})
        assert post(url, {"items": [item | {"video": "short.mp4"}]}).json()["scores"] == [1.0]
        broken = post(url, {"items": [item | {"video": "broken.mp4"}]})
        assert (broken.status_code, broken.json()["error"]) == (422, "cannot read video broken.mp4: no frames")
        assert not waits.done()
        release.set()
        assert waits.result().json()["scores"] == [1.0]
    assert model.seen == ["short.mp4", "long.mp4"]


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
        changed = {
            "query": ["<|endoftext|>What is the  answer? Say: 4<|im_end|><|endoftext|>", "the answer? Say: 5"],
            "prompts": ["What is the answer? Say: "] * 2, "labels": [label] * 2,
        }  # fmt: skip
        assert post(url, changed, path="/get_reward").json()["rewards"] == [4.0, 5.0]
        nothing = json.dumps({"question": "q", "video": None, "start": None, "end": None})
        assert post(url, {"query": ["6"], "prompts": [""], "labels": [nothing]}, path="/get_reward").json()["rewards"] == [6.0]
        refused = post(url, {"query": ["x"], "prompts": ["y"], "labels": [label]}, path="/get_reward")
        assert (refused.status_code, "`prompts` must hold the texts that were encoded" in refused.text) == (422, True)
        assert post(url, {"query": ["x"], "prompts": ["x"], "labels": ["no json"]}, path="/get_reward").status_code == 400
        assert post(url, {"query": ["x"], "prompts": [], "labels": []}, path="/get_reward").status_code == 422


def test_the_client_gets_the_models_own_scores(drm: VideoDRM, clips: Path, questions: list) -> None:
    items = [VideoAnswer(q.video, q.question, f"Answer: {c}") for q in questions[:12] for c in q.choices] + [
        VideoAnswer(None, "What?", "Nothing")
    ]
    expected = drm.score(items)
    with served(VideoDRM(drm.scorer, drm.tokenizer, drm.settings), clips) as (url, _):
        assert RemoteReward(f"{url}/score", TOKEN, clips).score(items) == pytest.approx(expected, abs=1e-5)
        assert RemoteReward(url, TOKEN, clips).probabilities(items) == pytest.approx(drm.probabilities(items), abs=1e-5)
        long = [VideoAnswer(None, "q", f"{n} " + "What colour is the square? " * 90) for n in range(300)]  # more than a request may hold
        assert len(RemoteReward(url, TOKEN, clips).score(long)) == 300
        with pytest.raises(RewardError, match="is not below"):
            RemoteReward(url, TOKEN, clips / "elsewhere").score(items)
        with pytest.raises(RewardError, match="is this the address of a reward server"):
            RemoteReward(f"{url}/nowhere", TOKEN, clips).score(items)
        for token in ("not the right token", ""):
            with pytest.raises(RewardError, match="wrong or missing bearer token"):
                RemoteReward(url, token, clips).score(items)
        with pytest.raises(TaskError, match=r"cannot read video none\.mp4"):
            RemoteReward(url, TOKEN, clips).score([VideoAnswer(Segment(str(clips / "none.mp4")), "q", "a")])
    with pytest.raises(RewardError, match="cannot be reached"):
        RemoteReward("http://127.0.0.1:9", TOKEN, clips, patience=0).score(items)


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
    with pytest.raises(TaskError, match=r"cannot read image|at most"):
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
    assert scores == drm.score([VideoAnswer(q.video, q.question, "Answer: red"), VideoAnswer(None, q.question, "Answer: red")])
    with pytest.raises(RewardError, match="needs the column 'video'; the data set has prompts, question"):
        reward(["x"], question=["q"], prompts=[""])

    class Broken:
        name = "broken"

        def score(self, items: Sequence[VideoAnswer]) -> list[float]:
            return [float("nan")] * len(items)

    with pytest.raises(RewardError, match="not finite numbers"):
        as_reward_fn(Broken(), clips)(["x"], question=["q"], video=[None])
    assert as_reward_fn(Broken(), clips, default=-1.0)(["x"], question=["q"], video=[None]) == [-1.0]
    long = {"question": ["q", "q"], "video": [None, None]}
    with pytest.raises(RewardError, match="nothing is scored in part"):
        as_reward_fn(drm, clips)(["short", "word " * 3000], **long)
    assert as_reward_fn(drm, clips, default=-1.0)(["short", "word " * 3000], **long) == [
        drm.score([VideoAnswer(None, "q", "short")])[0],
        -1.0,
    ]


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


@contextmanager
def answering(
    *statuses: int, after: str = "", body: bytes = b'{"scores": [1.0], "probabilities": [0.5]}'
) -> Iterator[tuple[str, list[int]]]:
    """A server that answers with these statuses in turn, and then as it should."""
    given: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            status = statuses[len(given)] if len(given) < len(statuses) else 200
            given.append(status)
            said = body if status == 200 else b"busy"
            self.send_response(status)
            self.send_header("content-length", str(len(said)))
            if after:
                self.send_header("retry-after", after)
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, *said: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", given
    finally:
        server.shutdown()
        server.server_close()
        thread.join(20)


BLIND = [VideoAnswer(None, "q", "a")]


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 529])
def test_the_client_waits_out_what_may_pass(tmp_path: Path, status: int, caplog: pytest.LogCaptureFixture) -> None:
    """As long as the server asks for, and says so; waiting is recorded here instead of done."""
    waited: list[float] = []
    with answering(status, status, after="7") as (url, given):
        assert RemoteReward(url, "", tmp_path, sleep=waited.append).score(BLIND) == [1.0]
    assert given == [status, status, 200]
    assert [7 <= seconds <= 20 for seconds in waited] == [True, True]
    assert f"status {status}: busy; trying again in 7.0 s" in caplog.text


def test_the_client_waits_out_a_restart_and_no_longer_than_it_is_told(tmp_path: Path) -> None:
    """Minutes, for a server that loads its model."""
    reserved = socket.create_server(("127.0.0.1", 0))
    port = reserved.getsockname()[1]
    reserved.close()
    waited: list[float] = []
    with ExitStack() as stack:

        def sleep(seconds: float) -> None:
            waited.append(seconds)
            if sum(waited) > 120 and len(waited) < 1000:
                with suppress(OSError):
                    url, _ = stack.enter_context(answering())
                    client._client.base_url = httpx.URL(url)
                    waited.extend([0.0] * 1000)

        client = RemoteReward(f"http://127.0.0.1:{port}", "", tmp_path, sleep=sleep)
        assert client.score(BLIND) == [1.0]
    with pytest.raises(RewardError, match="cannot be reached"):
        RemoteReward(f"http://127.0.0.1:{port}", "", tmp_path, patience=60, sleep=(waited := []).append).score(BLIND)
    assert sum(waited) == pytest.approx(60)
    assert max(waited) <= 20
    with answering(*[500] * 99) as (url, given), pytest.raises(RewardError, match="status 500"):
        RemoteReward(url, "", tmp_path, sleep=lambda seconds: None).score(BLIND)
    assert len(given) == 6


@pytest.mark.parametrize(
    "body", [b"<html>", b"[]", b"{}", b'{"scores": [1.0, 2.0]}', b'{"scores": [NaN]}', b'{"scores": ["1"]}', b'{"scores": 1}']
)
def test_the_client_takes_nothing_for_a_score_that_is_none(tmp_path: Path, body: bytes) -> None:
    with answering(body=body) as (url, _), pytest.raises(RewardError, match=r"is this the address of a reward server|no number for each"):
        RemoteReward(url, "", tmp_path).score(BLIND)


def test_an_address_that_is_none_is_refused_at_once(tmp_path: Path) -> None:
    for url in ("ftp://host", "host"):
        with pytest.raises(RewardError, match="cannot be asked"):
            RemoteReward(url, "", tmp_path).score(BLIND)
    for url, token in (("http://host:port", ""), ("http://host", "t\u00e4ken \u20ac")):
        with pytest.raises(ConfigError, match="no address of a reward server"):
            RemoteReward(url, token, tmp_path)


COMPLETIONS: list[tuple[Any, str]] = [
    ("red", "red"),
    ([{"role": "assistant", "content": "red"}], "red"),
    ([{"role": "assistant", "content": [{"type": "text", "text": "re"}, {"type": "text", "text": "d"}]}], "red"),
    ([{"role": "assistant", "content": [{"type": "thinking", "thinking": "blue?"}, {"type": "text", "text": "red"}, "!"]}], "red!"),
    ([{"role": "assistant", "content": "red"}, {"role": "tool", "content": "42"}], "red"),
    ([{"role": "assistant", "content": "blue"}, {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "red"}], "red"),
    ([{"role": "assistant", "content": None, "tool_calls": []}], ""),
    ([{"role": "assistant"}], ""),
    ([{"role": "assistant", "content": [{"type": "image", "image": "x"}]}], ""),
]


@pytest.mark.parametrize("place", range(len(COMPLETIONS)))
def test_what_is_scored_is_what_the_assistant_says_last(place: int, tmp_path: Path) -> None:
    """Never Python's text of a list, nor what a tool or a user says."""
    completion, answer = COMPLETIONS[place]
    model = Recorded()
    as_reward_fn(model, tmp_path)([completion], question=["q"], video=[None])
    assert model.items == [VideoAnswer(None, "q", answer)]


class Recorded:
    """Keeps what it is asked; opens the videos."""

    name = "recorded"

    def __init__(self) -> None:
        self.items: list[VideoAnswer] = []

    def score(self, items: Sequence[VideoAnswer]) -> list[float]:
        for item in items:
            if item.video is not None:
                read_frames(Path(item.video.file), 1, item.video.start, item.video.end)
        self.items = list(items)
        return [float(len(item.answer)) for item in items]


def test_a_completion_without_an_answer_has_no_score(tmp_path: Path) -> None:
    for completion in (None, 7, [], [{"role": "tool", "content": "42"}], [{"role": "assistant", "content": 7}], ["red"]):
        with pytest.raises(RewardError, match="completion 2"):
            as_reward_fn(Recorded(), tmp_path)(["red", completion], question=["q"] * 2, video=[None] * 2)
        found = as_reward_fn(Recorded(), tmp_path, default=-1.0)(["red", completion], question=["q"] * 2, video=[None] * 2)
        assert found == [3.0, -1.0]
    with pytest.raises(RewardError, match="the column 'video' has 1 rows for 2 completions"):
        as_reward_fn(Recorded(), tmp_path)(["red", "red"], question=["q"] * 2, video=[None])


def test_the_default_stands_for_a_video_that_cannot_be_read(clips: Path, questions: list) -> None:
    name = Path(questions[0].video.file).name
    (clips / "broken.mp4").write_bytes((clips / name).read_bytes()[:700])
    videos = [name, "broken.mp4", "nowhere.mp4", "../outside.mp4", 7, name]
    columns = {"question": ["q"] * 6, "video": videos, "start": [0.5, 0, 0, 0, 0, None], "end": [1.0, None, None, None, None, None]}
    model = Recorded()
    assert as_reward_fn(model, clips, default=-1.0)(["red"] * 6, **columns) == [3.0, -1.0, -1.0, -1.0, -1.0, 3.0]
    as_reward_fn(model, clips)(["red"], question=["q"], video=[name], start=[0.5], end=[1.0])
    assert model.items[0].video == Segment(str(clips / name), 0.5, 1.0)
    with pytest.raises(TaskError, match=r"broken\.mp4"):
        as_reward_fn(model, clips)(["red"] * 2, question=["q"] * 2, video=videos[:2])
