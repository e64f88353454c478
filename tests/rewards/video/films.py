"""Clips whose n-th frame shows n, as eight bars that are black or white, written by PyAV in many formats."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

MS = Fraction(1, 1000)


def bars(number: int, size: tuple[int, int] = (128, 64)) -> np.ndarray:
    """(height, width, 3): the bits of a number, the highest at the left."""
    picture = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    for bit in range(8):
        if number >> (7 - bit) & 1:
            picture[:, bit * size[0] // 8 : (bit + 1) * size[0] // 8] = 255
    return picture


def number(picture: np.ndarray) -> int:
    """What a picture of bars shows."""
    row, width = picture[picture.shape[0] // 2], picture.shape[1]
    return sum(int(row[bit * width // 8 + width // 16].mean() > 127) << (7 - bit) for bit in range(8))


class Pipe:
    """A file that can be written to its end and no more, so that no header is completed."""

    def __init__(self, path: Path):
        self._file = path.open("wb")
        self.write, self.close = self._file.write, self._file.close


def film(
    path: Path,
    codec: str,
    times: Sequence[float],
    *,
    options: dict[str, str] | None = None,
    form: str | None = None,
    rate: int = 10,
    piped: bool = False,
    sound: float = 0.0,
    bf: int | None = None,
    gop: int | None = None,
    movflags: str = "",
) -> Path:
    """A clip whose n-th frame is shown from times[n] on, with `sound` seconds of silence."""
    target: Any = Pipe(path) if piped else str(path)
    with av.open(target, "w", format=form, options={"movflags": movflags} if movflags else {}) as container:
        stream: Any = container.add_stream(codec, rate=rate, options={"threads": "1", **(options or {})})
        stream.width, stream.height, stream.pix_fmt = 128, 64, {"mjpeg": "yuvj420p", "apng": "rgb24", "gif": "rgb8"}.get(codec, "yuv420p")
        steady = all(abs(t * rate - round(t * rate)) < 1e-9 for t in times)
        clock = Fraction(1, rate) if steady else MS
        stream.codec_context.time_base = clock
        if bf is not None:
            stream.codec_context.max_b_frames = bf
        if gop is not None:
            stream.codec_context.gop_size = gop
        voice: Any = container.add_stream("pcm_s16le", rate=8000, layout="mono") if sound else None
        for n, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(bars(n), format="rgb24").reformat(format=stream.pix_fmt)
            frame.pts, frame.time_base = round(time / clock), clock
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if voice is not None:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, round(sound * 8000)), dtype=np.int16), format="s16", layout="mono")
            silence.sample_rate, silence.pts, silence.time_base = 8000, 0, Fraction(1, 8000)
            container.mux(voice.encode(silence))
            container.mux(voice.encode())
    if piped:
        target.close()
    return path
