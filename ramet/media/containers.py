"""Random access to the frames of a video file, by time.

    with VideoFile(Path("clip.mkv")) as clip:
        for time, pixels in clip.frames_at([2.5, 7.5]):        # uint8 [height, width, 3], shown from `time` on

File headers are not trusted. The time at which each frame is shown, the points where decoding can start and the end of the video are
read from the packets of the file, without decoding them (`PacketIndex`). Each packet is then passed to the decoder under its number as
its timestamp, so that a decoded frame is identified by its packet, whatever clock the file uses. To show a time, decoding starts at the
last keyframe before it and continues only as far as needed. Where a seek does not land on packets of the index, the file is read again
from its beginning.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ramet.errors import TaskError
from ramet.media.packets import (
    NO_TIMESTAMP,
    READ_ERRORS,
    demux,
    index_of,
    mark_of,
    open_container,
    reading_errors,
    video_stream,
)

MAX_SUBSTITUTE_AGE = 1.0
"""Seconds by which an earlier frame may stand in for one that cannot be decoded without counting as lost."""
MAX_UNKNOWN_PACKETS = 256
"""Packets that are skipped after a seek in search of one that the index knows."""


@dataclass
class _DecodingRun:
    """A sequence of frames decoded from a keyframe on, each as (time, number, frame).

    shown  the last frame reached by `advance`
    ahead  the frame after it, if it has been decoded already
    """

    frames: Iterator[tuple[float, int, Any]]
    shown: tuple[float, int, Any] | None = None
    ahead: tuple[float, int, Any] | None = None

    def advance(self, second: float, number: int) -> None:
        """Go on to frame `number` or, if it is missing, to the last frame that is shown by `second`."""
        while self.shown is None or self.shown[1] != number:
            if self.ahead is None:
                self.ahead = next(self.frames, None)
            if self.ahead is None or self.ahead[0] > second:
                return
            self.shown, self.ahead = self.ahead, None


class VideoFile:
    """An open video file, to be used as a context manager.

    index          see `PacketIndex`; `length` and `end` are its own, in seconds
    height, width  of its frames, in pixels, as declared
    damaged        packets that could not be decoded so far

    Raises `TaskError` for a file that cannot be read.
    """

    def __init__(self, path: Path):
        self.index = index_of(path)
        self.length, self.end, self.damaged = self.index.length, self.index.end, 0
        self._path, self._seeks, self._whole, self._next = path, True, True, 0
        with reading_errors(path):
            self._container = open_container(path)
            stream = video_stream(path, self._container)
        self._context = stream.codec_context
        self.height, self.width = stream.height, stream.width
        self._reset_source()

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._container.close()

    def frames_at(self, seconds: Sequence[float]) -> Iterator[tuple[float, np.ndarray]]:
        """The frame shown at each of the given times, as (time from which it is shown, uint8 [height, width, 3]).

        The times are in seconds and ascending. A frame that is shown at several of them is the same array object.

        In place of a frame that cannot be decoded, the last one before it is given; if that is older by more than `MAX_SUBSTITUTE_AGE`,
        the frame counts as lost. (One or two packets without a frame do not count: some codecs have them.) Raises `TaskError` if more
        than a quarter of the frames are lost, or nothing can be decoded.
        """
        index, run, lost = self.index, _DecodingRun(self._frames_from(0)), 0
        number, pixels = -1, np.empty(0)
        with reading_errors(self._path):
            for second in seconds:
                wanted = index.shown(second)
                key, back = index.key(wanted), 1
                if index.keys[key] > self._next:
                    run = _DecodingRun(self._frames_from(key))
                run.advance(second, wanted)
                while run.shown is None and key > 0:  # the keyframe itself cannot be decoded: start at an earlier one
                    key, back = max(key - back, 0), 2 * back
                    run = _DecodingRun(self._frames_from(key))
                    run.advance(second, wanted)
                nearest = run.shown or run.ahead
                if nearest is None:
                    raise TaskError(f"{self._path} has no frame that can be decoded")
                time, frame_number, frame = nearest
                if frame_number != number:
                    number, pixels = frame_number, self._pixels(frame)
                old = abs(time - index.times[wanted]) > MAX_SUBSTITUTE_AGE
                lost += old and (index.between(time, wanted) > 2 or time > second)
                yield time, pixels
        if 4 * lost > len(seconds):
            raise TaskError(f"{self._path} is damaged: {lost} of the {len(seconds)} frames to be read cannot be decoded")

    def all_frames(self) -> Iterator[tuple[float, np.ndarray]]:
        """Every frame in turn, as (time from which it is shown, uint8 [height, width, 3])."""
        with reading_errors(self._path):
            for time, _, frame in self._frames_from(0):
                yield time, self._pixels(frame)

    def _frames_from(self, key: int) -> Iterator[tuple[float, int, Any]]:
        """(time, number, frame) of every frame shown from keyframe `key` on."""
        index, rank = self.index, -1
        first = index.keys[key]
        since = index.times[first] if key else -np.inf
        self._context.flush_buffers()
        for frame in self._frames(int(first)):
            rank += 1
            number = frame.pts if index.stamped and frame.pts is not None else min(rank, len(index.times) - 1)
            if index.times[number] >= since:
                yield float(index.times[number]), number, frame

    def _frames(self, first: int) -> Iterator[Any]:
        """The decoded frames from packet `first` on; their timestamps are the numbers of their packets."""
        for number, packet in self._packets(first):
            packet.pts = number
            yield from self._decode(packet)
        yield from self._decode(None)

    def _decode(self, packet: Any) -> list[Any]:
        """The frames that the decoder gives for a packet, or at the end for None; none for a packet that cannot be decoded."""
        try:
            return list(self._context.decode(packet))
        except READ_ERRORS:
            self.damaged += 1
            return []

    def _packets(self, first: int) -> Iterator[tuple[int, Any]]:
        """(number, packet) for every packet from number `first` on."""
        self._move_before(first)
        while self._next < len(self.index.stamps):
            packet = next(self._source, None)
            if packet is None or mark_of(packet) != self.index.mark(self._next):
                if self._whole:
                    return
                self._rewind()  # a seek lost packets
                continue
            number = self._next
            self._next += 1
            if number >= first:
                first = number + 1
                yield number, packet

    def _move_before(self, first: int) -> None:
        """Position the file so that the next packet is number `first` or an earlier one, by seeking if seeks work in this file."""
        if not (self._whole and first == 0 == self._next) and self._seeks and first:
            for back in (0, 1, 3):  # a seek may land after its target
                place = max(int(np.searchsorted(self.index.keys, first)) - back, 0)
                if self._seek(int(self.index.keys[place]), first):
                    return
            self._seeks = False
            self._rewind()
        elif not (self._whole and self._next <= first):
            self._rewind()

    def _seek(self, aim: int, first: int) -> bool:
        """Seek to packet `aim`. Returns whether that led to a packet that the index knows, numbered `first` or less."""
        stream = video_stream(self._path, self._container)
        clock = next((int(c) for c in self.index.stamps[aim, [1, 0]] if c != NO_TIMESTAMP), None)
        try:
            self._container.seek(clock, stream=stream)
        except (TypeError, *READ_ERRORS):
            return False
        self._source, self._whole = demux(self._container, stream), False
        for packet in islice(self._source, MAX_UNKNOWN_PACKETS):
            known = self.index.find(mark_of(packet))
            if known is not None:
                self._source, self._next = chain([packet], self._source), known
                return known <= first
        return False

    def _rewind(self) -> None:
        """Open the file again, at its beginning."""
        self._container.close()
        self._container = open_container(self._path)
        self._reset_source()

    def _reset_source(self) -> None:
        self._source, self._next, self._whole = demux(self._container, video_stream(self._path, self._container)), 0, True

    def _pixels(self, frame: Any) -> np.ndarray:
        """A decoded frame as uint8 [height, width, 3], turned as its display matrix says. Raises `TaskError` if it is far too large."""
        if frame.width * frame.height > max(self.height * self.width, 1) * 4:
            raise TaskError(f"{self._path} has a frame of {frame.width}x{frame.height} pixels, much larger than it declares")
        pixels: np.ndarray = frame.to_ndarray(format="rgb24")
        matrix = next((bytes(data) for data in frame.side_data if "DISPLAYMATRIX" in str(data.type)), b"")
        if len(matrix) != 36:
            return pixels
        a, b, _, c, d, *_ = np.frombuffer(matrix, dtype=np.int32).tolist()
        return oriented(pixels, (a, b, c, d))


def oriented(pixels: np.ndarray, matrix: tuple[float, float, float, float]) -> np.ndarray:
    """Turn or mirror an image: (a, b, c, d) takes column x and row y to column a x + c y and row b x + d y.

    The matrix is rounded to the nearest combination of quarter turns and mirrorings.
    """
    a, b, c, d = matrix
    if abs(b) + abs(c) > abs(a) + abs(d):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
