"""Reading the packets of a video file: opening it safely, and the timing of its frames without decoding them.

A file is untrusted input. It is identified by its content, opened without its name and without access to any protocol, and accepted
only in formats that contain their frames themselves: a list of other files or addresses is refused before anything it names is opened.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from pathlib import Path
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
ATTACHED_PICTURE = 0x400
"""FFmpeg's disposition flag of a stream that is a cover image attached to the file."""
CACHED_INDEXES = 32
"""Number of files whose index is cached. The index of an hour of video takes a few megabytes."""
NO_TIMESTAMP = np.iinfo(np.int64).min
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
        return np.stack([np.where(shown != NO_TIMESTAMP, shown, decoded), size], axis=1)

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


def open_container(path: Path) -> Any:
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
    with reading_errors(path), open_container(path) as container:
        return str(container.format.name)


def _flags(stream: Any) -> int:
    """A stream's disposition flags; releases of PyAV give an enum, a number or, in the oldest, nothing."""
    disposition = getattr(stream, "disposition", 0)
    return int(getattr(disposition, "value", disposition))


def video_stream(path: Path, container: Any) -> Any:
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


def demux(container: Any, *streams: Any) -> Iterator[Any]:
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
    return NO_TIMESTAMP if packet.pts is None else packet.pts, NO_TIMESTAMP if packet.dts is None else packet.dts, packet.size


def mark_of(packet: Any) -> tuple[int, int]:
    """See `PacketIndex.mark`."""
    shown, decoded, size = _stamp(packet)
    return shown if shown != NO_TIMESTAMP else decoded, size


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
    with open_container(path) as container:
        stream = video_stream(path, container)
        rows: list[tuple[int, int, int, int, bool, bool]] = []
        until = 0.0
        for packet in demux(container):
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
    stamped = not read.in_order and read.clock is not None and bool((shown != NO_TIMESTAMP).all())
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
        if read.clock is not None and bool((decoded != NO_TIMESTAMP).all()) and bool((np.diff(decoded) > 0).all()):
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
    with open_container(path) as container:
        stream = video_stream(path, container)
        for number, packet in enumerate(demux(container, stream)):
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
    known = np.flatnonzero(decoded != NO_TIMESTAMP)
    steps = np.diff(decoded[known])
    for place in np.flatnonzero(steps < 0):
        added[known[place + 1] :] += max(int(durations[known[place]]), 1) - steps[place]
    return added
