"""Which picture a file shows at a second, whatever its format knows of time. All clips are written here; see `films`."""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from ramet.errors import TaskError
from ramet.media.containers import VideoFile, oriented
from ramet.media.frames import read_frames, video_seconds
from tests.rewards.video.films import bars, film, number

X264 = {"crf": "10"}
STEADY = [n / 10 for n in range(100)]
MIDDLES = [12, 37, 62, 87]
"""What `STEADY` shows in the middle of each quarter."""


def shown(path: Path, count: int = 4, *span: float, **options: Any) -> list[int]:
    return [number(frame) for frame in read_frames(path, count, *span, **options).pixels]


FILMS: dict[str, tuple[str, dict[str, Any]]] = {
    "closed.mp4": ("libx264", {"options": X264 | {"g": "15", "bf": "3"}}),
    "open.mkv": ("libx264", {"options": X264 | {"x264-params": "open-gop=1:keyint=15:min-keyint=15:bframes=3:scenecut=0"}}),
    "open.ts": ("libx264", {"options": X264 | {"x264-params": "open-gop=1:keyint=15:min-keyint=15:bframes=3:scenecut=0"}}),
    "refresh.ts": ("libx264", {"options": X264 | {"x264-params": "intra-refresh=1:keyint=15:bframes=0"}}),
    "hevc.ts": ("libx265", {"options": {"x265-params": "log-level=none:pools=none:keyint=15:open-gop=1"}}),
    "fragments.mp4": ("libx264", {"options": X264 | {"g": "15"}, "piped": True, "form": "mp4", "movflags": "frag_keyframe+empty_moov"}),
    "mpeg2.mpg": ("mpeg2video", {"bf": 2, "gop": 15, "rate": 25}),
    "mpeg2.ts": ("mpeg2video", {"bf": 2, "gop": 15, "rate": 25}),
    "packed.avi": ("mpeg4", {"bf": 2, "gop": 15}),
    "plain.avi": ("mjpeg", {}),
    "vp8.webm": ("libvpx", {"options": {"g": "15", "b": "1M", "auto-alt-ref": "1", "lag-in-frames": "8", "deadline": "realtime"}}),
    "vp9.webm": ("libvpx-vp9", {"options": {"g": "15", "b": "1M", "auto-alt-ref": "1", "lag-in-frames": "8", "cpu-used": "8"}}),
    "flash.flv": ("flv", {"gop": 15}),
    "windows.wmv": ("wmv2", {"gop": 15}),
}


@pytest.mark.parametrize("name", FILMS)
def test_a_second_shows_what_decoding_everything_shows(tmp_path: Path, name: str) -> None:
    """At random seconds, one or several at a time: the bytes of the last picture whose time has come, found by seeking."""
    codec, options = FILMS[name]
    rate = options.get("rate", 10)
    path = film(tmp_path / name, codec, [n / rate for n in range(70)], **options)
    with av.open(str(path)) as container:
        whole = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    first = min(time for time, _ in whole)
    rng = random.Random(name)
    for _ in range(12):
        seconds = sorted(rng.uniform(0, 70 / rate) for _ in range(rng.choice((1, 1, 3))))
        with VideoFile(path) as clip:
            assert clip.end == pytest.approx(70 / rate, abs=0.002)
            assert clip.length == clip.end
            for second, (time, pixels) in zip(seconds, clip.frames_at(seconds), strict=True):
                begun, expected = max((t - first, n) for n, (t, _) in enumerate(whole) if t - first <= second)
                assert time == pytest.approx(begun, abs=1e-3)
                assert np.array_equal(pixels, whole[expected][1])


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("browser.webm", "libvpx", {"form": "webm", "piped": True, "options": {"b": "2M", "g": "30", "deadline": "realtime"}}),
        ("piped.mkv", "libx264", {"form": "matroska", "piped": True, "options": X264 | {"g": "30"}}),
        ("animated.apng", "apng", {}),
        ("flash.swf", "flv", {"form": "swf"}),
        ("camera.mjpeg", "mjpeg", {"form": "mjpeg"}),
        ("camera.multipart", "mjpeg", {"form": "mpjpeg"}),
        ("raw.h264", "libx264", {"options": X264 | {"g": "30"}}),
        ("raw.hevc", "libx265", {"options": {"x265-params": "log-level=none:pools=none"}}),
        ("raw.m2v", "mpeg2video", {"form": "mpeg2video", "rate": 25, "bf": 2}),
        ("decoded.avi", "libx264", {"options": X264 | {"g": "30", "bf": "2"}}),
    ],
)
def test_no_header_is_needed_to_see_the_whole(tmp_path: Path, name: str, codec: str, options: dict[str, Any]) -> None:
    """Without a duration, and without times at all: pictures are shown evenly, in the order in which they are to be seen."""
    rate = options.get("rate", 10)
    path = film(tmp_path / name, codec, [n / rate for n in range(100)], **options)
    seconds = video_seconds(path)
    assert shown(path) == MIDDLES
    assert shown(path, 3, seconds / 2, seconds - 0.01) == [58, 74, 91]
    if "camera" not in name:  # which keep no time: 25 a second
        assert seconds == pytest.approx(100 / rate, abs=0.11)


@pytest.mark.parametrize("frames_between", ["0", "2"])
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_slides_last_as_long_as_they_are_shown(tmp_path: Path, suffix: str, frames_between: str) -> None:
    """A variable rate, also where pictures are decoded in another order, of which headers and durations know nothing."""
    times = [0, 0.1, 0.2, 3, 3.1, 8, 8.1, 12, 20]
    path = film(tmp_path / f"slides.{suffix}", "libx264", times, options=X264 | {"bf": frames_between})
    assert video_seconds(path) == pytest.approx(20, abs=0.2)
    assert shown(path) == [2, 4, 7, 7]
    assert shown(path, 2, 8.0, 8.2) == [5, 6]


@pytest.mark.parametrize("sound", [3.0, 11.0, 60.0])
def test_sound_neither_stretches_nor_cuts_the_pictures(tmp_path: Path, sound: float) -> None:
    path = film(tmp_path / "talk.mkv", "libx264", STEADY, options=X264, sound=sound)
    assert video_seconds(path) == pytest.approx(10.0, abs=0.01)
    assert shown(path) == MIDDLES


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_a_clock_that_begins_late(tmp_path: Path, suffix: str) -> None:
    path = film(tmp_path / f"late.{suffix}", "libx264", [5000 + t for t in STEADY], options=X264 | {"g": "20"})
    assert shown(path) == MIDDLES
    assert shown(path, 4, 3.0, 6.0) == [33, 41, 48, 56]
    assert read_frames(path, 2).times == pytest.approx((2.5, 7.5), abs=0.002)


def test_a_recording_that_begins_in_the_middle_and_one_put_after_another(tmp_path: Path) -> None:
    """What cannot be decoded yet is not shown; a clock that begins anew goes on."""
    data = film(tmp_path / "whole.ts", "libx264", STEADY, options=X264 | {"g": "20", "bf": "2", "sc_threshold": "0"}).read_bytes()
    packets = len(data) // 188
    cut = tmp_path / "cut.ts"
    cut.write_bytes(data[188 * (packets // 3) :])
    begun = shown(cut, 1, 0.0, 0.05)[0]
    assert begun in (40, 60)
    assert video_seconds(cut) == pytest.approx((100 - begun) / 10, abs=0.01)
    assert shown(cut, 2) == [begun + (100 - begun) // 4, begun + 3 * (100 - begun) // 4]
    twice = tmp_path / "twice.ts"
    twice.write_bytes(data + data)
    assert video_seconds(twice) == pytest.approx(20.0, abs=0.01)
    assert shown(twice, 8) == MIDDLES * 2
    assert shown(twice, 4, 10.0, 20.0) == MIDDLES


def test_only_what_is_needed_is_decoded(tmp_path: Path) -> None:
    """All but the last second may be rubble."""
    path = film(tmp_path / "rubble.mp4", "libx264", STEADY, options=X264 | {"g": "10", "bf": "2", "sc_threshold": "0"})
    with av.open(str(path)) as container:
        places = [(p.pos, p.size) for p in container.demux(video=0) if p.size][:90]
    data = bytearray(path.read_bytes())
    for place, size in places:
        data[place : place + size] = bytes(size)
    path.write_bytes(data)
    frames = read_frames(path, 2, 9.0, 10.0)
    assert ([number(f) for f in frames.pixels], frames.damaged) == ([92, 97], 0)
    with pytest.raises(TaskError, match=r"rubble\.mp4 is damaged: [34] of the 4 frames to be read cannot be decoded"):
        read_frames(path, 4)


def test_a_damaged_packet_is_counted_and_stood_in_for(tmp_path: Path) -> None:
    """A picture that cannot be decoded is the last one before it; a clip is refused where a quarter has none within a second."""
    path = film(tmp_path / "clip.avi", "mpeg4", STEADY, gop=10)
    with av.open(str(path)) as container:
        places = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    whole = path.read_bytes()

    def damaged(*broken: int) -> Path:
        data = bytearray(whole)
        for n in broken:
            place, size = places[n]
            data[place : place + size] = bytes(size)
        path.write_bytes(data)
        os.utime(path, (len(broken), len(broken)))
        return path

    frames = read_frames(damaged(37), 4)
    assert frames.damaged == 1
    assert [number(f) for f in frames.pixels] == [12, 36, 62, 87]
    assert frames.times == pytest.approx((1.2, 3.6, 6.2, 8.7))
    assert shown(damaged(0), 4) == MIDDLES
    assert read_frames(damaged(*range(25, 40)), 4).damaged > 1  # one of four is lost
    with pytest.raises(TaskError, match="is damaged: 2 of the 4 frames"):
        read_frames(damaged(*range(20, 40), *range(70, 95)), 4)
    with pytest.raises(TaskError, match="no frame that can be decoded"):
        read_frames(damaged(*range(100)), 4)


TURNS = {
    "as it is": ((1, 0, 0, 1), "rg/bw"),
    "left to right": ((-1, 0, 0, 1), "gr/wb"),
    "upside down": ((1, 0, 0, -1), "bw/rg"),
    "half a turn": ((-1, 0, 0, -1), "wb/gr"),
    "transposed": ((0, 1, 1, 0), "rb/gw"),
    "a quarter turn": ((0, 1, -1, 0), "br/wg"),
    "a quarter turn back": ((0, -1, 1, 0), "gw/rb"),
    "transposed the other way": ((0, -1, -1, 0), "wg/br"),
}
QUARTERS = np.zeros((64, 96, 3), dtype=np.uint8)
QUARTERS[:32, :48, 0] = QUARTERS[:32, 48:, 1] = QUARTERS[32:, :48, 2] = 255
QUARTERS[32:, 48:] = 255


def quarters(picture: np.ndarray) -> str:
    """The colours of the four quarters."""
    height, width = picture.shape[:2]
    names = {(1, 0, 0): "r", (0, 1, 0): "g", (0, 0, 1): "b", (1, 1, 1): "w"}
    seen = [names[tuple(int(v > 127) for v in picture[y * height // 4, x * width // 4])] for y in (1, 3) for x in (1, 3)]
    return "".join(seen[:2]) + "/" + "".join(seen[2:])


@pytest.mark.parametrize("turn", TURNS)
def test_a_display_matrix_turns_and_mirrors(tmp_path: Path, turn: str) -> None:
    matrix, expected = TURNS[turn]
    assert quarters(oriented(QUARTERS, matrix)) == expected
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=10, options={"crf": "5", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv444p"
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(QUARTERS, format="rgb24")))
        container.mux(stream.encode())
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44
    a, b, c, d = (65536 * n for n in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    assert quarters(read_frames(path, 1).pixels[0]) == expected


def test_frames_are_resized_as_they_are_read(tmp_path: Path) -> None:
    """What is limited is what is handed out: 64 frames of 4K are few pixels once they fit."""
    path = tmp_path / "large.avi"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("mjpeg", rate=2)
        stream.width, stream.height, stream.pix_fmt = 3840, 2160, "yuvj420p"
        for n in (3, 5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(bars(n, (3840, 2160)), format="rgb24")))
        container.mux(stream.encode())
    frames = read_frames(path, 64, fit=lambda height, width: (height // 40, width // 40))
    assert frames.pixels.shape == (64, 54, 96, 3)
    assert [number(f) for f in frames.pixels] == [3] * 32 + [5] * 32
    with pytest.raises(TaskError, match=r"64 frames of .* have more than .* pixels; read fewer"):
        read_frames(path, 64)


@pytest.mark.parametrize("name", ["12:30.mp4", "http:clip.mp4", "concat:a|b.mp4", "%03d.mp4", "clip", "clip.png", "clip.m3u8", "*.avi"])
def test_a_name_is_only_a_name(tmp_path: Path, name: str) -> None:
    """Neither protocols nor patterns nor suffixes count, only what the file holds."""
    film(tmp_path / "plain.mp4", "mpeg4", STEADY[:20]).rename(tmp_path / name)
    assert shown(tmp_path / name, 2) == [5, 15]


@pytest.mark.parametrize("name", ["list.m3u8", "list.mp4", "list.png", "list.ts", "list", "list.sdp", "list.mpd", "list.txt"])
@pytest.mark.parametrize("kind", ["hls", "concat", "sdp", "dash"])
def test_a_list_of_other_files_is_refused_before_they_are_opened(tmp_path: Path, name: str, kind: str) -> None:
    """What it names is a pipe, which would be waited for."""
    other = tmp_path / "other.ts"
    os.mkfifo(other)
    said = {
        "hls": f"#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:1\n#EXTINF:1.0,\n{other}\n#EXT-X-ENDLIST\n",
        "concat": f"ffconcat version 1.0\nfile '{other}'\n",
        "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5000 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
        "dash": f'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><BaseURL>{other}</BaseURL></MPD>',
    }
    (tmp_path / name).write_text(said[kind])
    with pytest.raises(TaskError, match="cannot read video"):
        read_frames(tmp_path / name, 1)
    with pytest.raises(TaskError, match="not a regular file"):
        read_frames(other, 1)


def test_links_are_followed(tmp_path: Path) -> None:
    """As caches of data sets lay them out: a name, and the bytes elsewhere under another."""
    blob = film(tmp_path / "0f3a", "mpeg4", STEADY[:20], form="mp4")
    (tmp_path / "clip.mp4").symlink_to(blob)
    assert shown(tmp_path / "clip.mp4", 2) == [5, 15]
