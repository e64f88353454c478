"""Random access to the frames of a video file, by time.

    with VideoFile(Path("clip.mkv")) as clip:
        for time, pixels in clip.frames_at([2.5, 7.5]):        # uint8 [height, width, 3], shown from `time` on

File headers are not trusted. The time at which each frame is shown, the points where decoding can start and the end of the video are
read from the packets of the file, without decoding them (`PacketIndex`). Each packet is then passed to the decoder under its number as
its timestamp, so that a decoded frame is identified by its packet, whatever clock the file uses. To show a time, decoding starts at the
last keyframe before it and continues only as far as needed. Where a seek does not land on packets of the index, the file is read again
from its beginning.

A file is untrusted input. It is identified by its content, opened without its name and without access to any protocol, and accepted
only in formats that contain their frames themselves: a list of other files or addresses is refused before anything it names is opened.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import chain, islice
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ramet.errors import TaskError, first_line, require

try:
    import av
except ImportError:
    av = None  # type: ignore[assignment]

MAX_PIXELS = 2**25
"""Most pixels of one frame, enough for 8K. A larger frame is refused as an attack on memory."""
FORMATS = (
    "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,flv,live_flv,kux,asf,ogg,gif,apng,swf,ivf,nut,mxf,rm,dv,gxf,wtv,nsv,nuv,dhav,lmlm4,"
    "h261,h263,h264,hevc,vvc,evc,obu,av1,avs2,avs3,cavsvideo,dirac,dnxhd,vc1,vc1test,mjpeg,mjpeg_2000,mpjpeg,smjpeg,yuv4mpegpipe,"
    "flic,roq,smk,bink,4xm,amv,jpegxl_anim,bmp_pipe,dpx_pipe,exr_pipe,hdr_pipe,j2k_pipe,jpeg_pipe,jpegls_pipe,jpegxl_pipe,pam_pipe,"
    "pbm_pipe,pcx_pipe,pgm_pipe,png_pipe,ppm_pipe,psd_pipe,qoi_pipe,sgi_pipe,sunrast_pipe,tiff_pipe,webp_pipe,xbm_pipe,xwd_pipe"
)
"""FFmpeg's names of the formats whose files contain their frames themselves, separated by commas."""
DURATION_FORMATS = {"mov", "matroska", "avi", "asf", "flv", "nut", "mxf", "ivf"}
"""Formats that declare a file's duration, by which a truncated file can be recognised."""
DECODE_ORDER_FORMATS = {"avi"}
"""Formats that store the order in which frames are decoded, but not the times at which they are shown."""
REORDERING_CODECS = {"h264", "hevc", "vvc"}
"""Codecs in which frames may be shown in another order than they are decoded."""
READ_ERRORS = (OSError, ValueError, MemoryError, EOFError, *(() if av is None else (av.FFmpegError,)))
"""Exceptions that the libraries raise for a file that cannot be read."""
MAX_SUBSTITUTE_AGE = 1.0
"""Seconds by which an earlier frame may stand in for one that cannot be decoded without counting as lost."""
ATTACHED_PICTURE = 0x400
"""FFmpeg's disposition flag of a stream that is a cover image attached to the file."""
CACHED_INDEXES = 32
"""Number of files whose index is cached. The index of an hour of video takes a few megabytes."""
MAX_UNKNOWN_PACKETS = 256
"""Packets that are skipped after a seek in search of one that the index knows."""
_NONE = np.iinfo(np.int64).min
"""Stands for a missing timestamp."""


@dataclass(frozen=True)
class PacketIndex:
    """The timing of a video, read from its packets. All times are in seconds from the first frame.

    stamps   int64 [packets, 3], in file order: presentation timestamp, decoding timestamp, size in bytes
    times    time at which the frame of each packet is shown, NaN for a packet without one; unless `stamped`, of each decoded frame in turn
    keys     numbers of the packets at which decoding can start, ascending from 0
    stamped  whether packets carry the times at which their frames are shown
    end      end of the last frame
    length   duration of the video: `end`, or more where the file is truncated
    """

    stamps: np.ndarray
    times: np.ndarray
    keys: np.ndarray
    stamped: bool
    end: float
    length: float

    @cached_property
    def _order(self) -> np.ndarray:
        """Numbers of the packets that show a frame, in the order of their times."""
        return np.argsort(self.times, kind="stable")[: int(np.isfinite(self.times).sum())]

    @cached_property
    def _marks(self) -> np.ndarray:
        """int64 [packets, 2]: the mark of each packet."""
        shown, decoded, size = self.stamps.T
        return np.stack([np.where(shown != _NONE, shown, decoded), size], axis=1)

    def mark(self, number: int) -> tuple[int, int]:
        """The timestamp and size by which packet `number` is recognised."""
        time, size = self._marks[number].tolist()
        return time, size

    def find(self, mark: tuple[int, int]) -> int | None:
        """The number of the packet with this mark, or None unless there is exactly one."""
        matches = np.flatnonzero((self._marks == mark).all(axis=1))
        return int(matches[0]) if len(matches) == 1 else None

    def shown(self, second: float) -> int:
        """The number of the packet whose frame is shown at this time; the first frame for any earlier time."""
        return int(self._order[max(int(np.searchsorted(self.times[self._order], second, side="right")) - 1, 0)])

    def key(self, number: int) -> int:
        """The index in `keys` of the last keyframe from which frame `number` can be decoded.

        A frame that is shown before a keyframe but stored after it needs the keyframe before.
        """
        good = (self.keys <= number) & (self.times[self.keys] <= self.times[number])
        return int(np.flatnonzero(good)[-1]) if good.any() else 0

    def between(self, second: float, number: int) -> int:
        """Number of frames that are shown after `second`, up to and including frame `number`."""
        return int(np.count_nonzero((self.times > second) & (self.times <= self.times[number])))


def require_regular_file(path: Path) -> Path:
    """The path itself, if it is or links to a regular file. Raises `TaskError` for others: reading a pipe or device could block."""
    with reading_errors(path):
        if not stat.S_ISREG(path.stat().st_mode):
            raise TaskError(f"cannot read video {path}: it is not a regular file")
    return path


class _NamelessFile:
    """An open file presented without its name, so that its format is detected from its content, or else from `name`."""

    def __init__(self, path: Path, name: str = ""):
        self._file = require_regular_file(path).open("rb", buffering=0)
        self.read, self.seek, self.tell, self.close = self._file.read, self._file.seek, self._file.tell, self._file.close
        self.name = name


@contextmanager
def reading_errors(path: Path, what: str = "cannot read video") -> Iterator[None]:
    """Turn the libraries' exceptions for an unreadable file into a `TaskError` that names it: "`what` `path`: reason"."""
    try:
        yield
    except READ_ERRORS as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise TaskError(f"{what} {path}: {reason}") from error


def _open_container(path: Path) -> Any:
    """The PyAV container of a file. Raises `TaskError` for a format that may refer to other files."""
    require("av", "reading videos")
    guard = {"format_whitelist": FORMATS, "protocol_whitelist": "none"}
    for name in ("", f"video{path.suffix.lower()}"):
        try:
            return av.open(_NamelessFile(path, name), container_options=guard, metadata_errors="replace", buffer_size=2**16)
        except av.InvalidDataError:
            if name:
                raise
        except ValueError:  # PyAV's exception for an invalid argument: the format is not on the list
            raise TaskError(
                f"cannot read video {path}: only formats that contain their frames are read, not lists of other files (playlists)"
            ) from None
    raise AssertionError


def format_of(path: Path) -> str:
    """FFmpeg's name of a file's format. Raises `TaskError` if it cannot be read."""
    with reading_errors(path), _open_container(path) as container:
        return str(container.format.name)


def _flags(stream: Any) -> int:
    """A stream's disposition flags; releases of PyAV give an enum, a number or, in the oldest, nothing."""
    disposition = getattr(stream, "disposition", 0)
    return int(getattr(disposition, "value", disposition))


def _stream(path: Path, container: Any) -> Any:
    """The video stream of a container, cover images aside. Raises `TaskError` if there is none that can be decoded."""
    streams = [s for s in container.streams.video if not _flags(s) & ATTACHED_PICTURE]
    if not streams:
        raise TaskError(f"{path} has no video")
    stream = streams[0]
    if stream.codec_context is None:
        raise TaskError(f"{path} has a video stream for which there is no decoder")
    if stream.width * stream.height > MAX_PIXELS:
        raise TaskError(f"{path} has frames of {stream.width}x{stream.height} pixels; at most {MAX_PIXELS} are allowed")
    return stream


def _demux(container: Any, *streams: Any) -> Iterator[Any]:
    """The non-empty packets of the streams, until the end of the file or the first read error."""
    packets = container.demux(*streams)
    while True:
        try:
            packet = next(packets)
        except (StopIteration, *READ_ERRORS):
            return
        if packet.size:
            yield packet


def _stamp(packet: Any) -> tuple[int, int, int]:
    """Presentation timestamp, decoding timestamp and size in bytes."""
    return _NONE if packet.pts is None else packet.pts, _NONE if packet.dts is None else packet.dts, packet.size


def _mark(packet: Any) -> tuple[int, int]:
    """See `PacketIndex.mark`."""
    shown, decoded, size = _stamp(packet)
    return shown if shown != _NONE else decoded, size


def index_of(path: Path) -> PacketIndex:
    """The index of a file, cached until the file changes. Raises `TaskError` if it cannot be read or has no frames."""
    with reading_errors(path):
        state = path.stat()
        return _indexed(path, state.st_mtime_ns, state.st_size)


@dataclass(frozen=True)
class _Packets:
    """The packets of a video stream, in file order.

    stamps     see `PacketIndex`
    durations  duration of each packet in ticks of `clock`, 0 where unknown
    keys       numbers of the keyframe packets
    hidden     whether each packet is marked as not to be shown
    clock      seconds per tick, None where unknown
    rate       frames per second, as declared or guessed
    until      end of the last packet of any stream, in seconds: a video may be shorter than its sound
    headed     whether the format declares the duration of a file
    promised   the declared duration in seconds, 0 where there is none
    in_order   whether the file stores only the decoding order and the codec may show frames in another
    """

    stamps: np.ndarray
    durations: np.ndarray
    keys: np.ndarray
    hidden: np.ndarray
    clock: Fraction | None
    rate: float
    until: float
    headed: bool
    promised: float
    in_order: bool


def _read(path: Path) -> _Packets:
    """Read all packets of a file. Raises `TaskError` if none shows a frame."""
    with _open_container(path) as container:
        stream = _stream(path, container)
        rows: list[tuple[int, int, int, int, bool, bool]] = []
        until = 0.0
        for packet in _demux(container):
            begun = packet.pts if packet.pts is not None else packet.dts
            if begun is not None and packet.time_base:
                until = max(until, float((begun + (packet.duration or 0)) * packet.time_base))
            if packet.stream.index == stream.index:
                rows.append((*_stamp(packet), packet.duration or 0, packet.is_keyframe, packet.is_discard))
        if all(row[-1] for row in rows):
            raise TaskError(f"{path} has no frame that can be decoded")
        table, formats = np.array(rows, dtype=np.int64), set(container.format.name.split(","))
        headed = bool(formats & DURATION_FORMATS)
        return _Packets(
            table[:, :3], table[:, 3], np.flatnonzero(table[:, 4]), table[:, 5] > 0, stream.time_base,
            float(stream.average_rate or stream.guessed_rate or 25), until - min(container.start_time or 0, 0) / 1_000_000, headed,
            (container.duration or 0) / 1_000_000 if headed else 0.0,
            bool(formats & DECODE_ORDER_FORMATS) and stream.codec_context.name in REORDERING_CODECS
            and bool(stream.codec_context.has_b_frames),
        )  # fmt: skip


@lru_cache(maxsize=CACHED_INDEXES)
def _indexed(path: Path, changed: int, size: int) -> PacketIndex:
    """Build the index of a file; its time of change and size are part of the cache's key."""
    read = _read(path)
    shown, decoded = read.stamps[:, 0], read.stamps[:, 1]
    stamped = not read.in_order and read.clock is not None and bool((shown != _NONE).all())
    if stamped:
        ticks = shown + _restarts(decoded, read.durations)
        times = np.where(read.hidden, np.nan, _seconds(ticks - ticks[~read.hidden].min(), read.clock))
        keys = np.union1d([0], read.keys)
        if not read.headed:  # such a file may be an excerpt of another, whose first frames refer to frames that it lacks
            times[times < times[_first(path)]] = np.nan
            times = np.where(np.isnan(times), np.nan, _seconds(ticks - ticks[np.isfinite(times)].min(), read.clock))
        in_turn = np.sort(times[np.isfinite(times)])
        # With reordered frames, a packet's duration refers to decoding order; only that of the last packet is reliable.
        final = -1 if (np.diff(times[np.isfinite(times)]) < 0).any() else int(np.nanargmax(times))
        last = float(_seconds(read.durations[final], read.clock))
    else:
        if read.clock is not None and bool((decoded != _NONE).all()) and bool((np.diff(decoded) > 0).all()):
            times = _seconds(decoded - decoded[0], read.clock)
        else:
            times = np.arange(len(shown)) * (float(_seconds(np.median(read.durations), read.clock)) or 1 / read.rate)
        keys, in_turn, last = np.array([0]), times, 0.0
    gaps = np.diff(in_turn)
    if not last > 0:  # the duration of the last frame is unknown: assume a short one among the others
        last = float(np.quantile(gaps[gaps > 0], 0.25)) if (gaps > 0).any() else 1 / read.rate
    end = float(in_turn[-1]) + last
    cut = read.promised > read.until + 0.5 + 0.01 * read.promised
    return PacketIndex(read.stamps, times, keys, stamped, end, max(end, read.promised) if cut else end)


def _first(path: Path) -> int:
    """The number of the packet of the first frame that can be decoded; 0 if there is none."""
    with _open_container(path) as container:
        stream = _stream(path, container)
        for number, packet in enumerate(_demux(container, stream)):
            packet.pts = number
            try:
                frames = stream.codec_context.decode(packet)
            except READ_ERRORS:
                continue
            if frames:
                return int(frames[0].pts)
        return 0


def _seconds(ticks: Any, clock: Fraction | None) -> Any:
    """Ticks as seconds, correctly rounded, so that a frame is found at exactly the time at which it starts."""
    return ticks * clock.numerator / clock.denominator if clock else ticks * 0.0


def _restarts(decoded: np.ndarray, durations: np.ndarray) -> np.ndarray:
    """int64 [packets]: ticks to add to each packet's timestamps, where concatenated recordings restart the clock."""
    added = np.zeros(len(decoded), dtype=np.int64)
    known = np.flatnonzero(decoded != _NONE)
    steps = np.diff(decoded[known])
    for place in np.flatnonzero(steps < 0):
        added[known[place + 1] :] += max(int(durations[known[place]]), 1) - steps[place]
    return added


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
            self._container = _open_container(path)
            stream = _stream(path, self._container)
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
            if packet is None or _mark(packet) != self.index.mark(self._next):
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
        stream = _stream(self._path, self._container)
        clock = next((int(c) for c in self.index.stamps[aim, [1, 0]] if c != _NONE), None)
        try:
            self._container.seek(clock, stream=stream)
        except (TypeError, *READ_ERRORS):
            return False
        self._source, self._whole = _demux(self._container, stream), False
        for packet in islice(self._source, MAX_UNKNOWN_PACKETS):
            known = self.index.find(_mark(packet))
            if known is not None:
                self._source, self._next = chain([packet], self._source), known
                return known <= first
        return False

    def _rewind(self) -> None:
        """Open the file again, at its beginning."""
        self._container.close()
        self._container = _open_container(self._path)
        self._reset_source()

    def _reset_source(self) -> None:
        self._source, self._next, self._whole = _demux(self._container, _stream(self._path, self._container)), 0, True

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
