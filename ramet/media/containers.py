"""A video file as an index of its pictures, and the picture that it shows at a second.

    with VideoFile(Path("clip.mkv")) as clip:
        for time, pixels in clip.frames_at([2.5, 7.5]):        # uint8 (height, width, 3), shown from `time` on

Headers are not believed. When each picture is shown, where decoding can begin and where the pictures end is read from the packets of
the file, which costs no decoding (`PacketIndex`). Every packet is then numbered for the decoder, so that a picture is known by the packet
that it came in, whatever clock the file keeps. To show a second, decoding begins at the last key picture before it and goes on only
as far as needed; where a seek does not land on packets of the index, the file is read again from its beginning.

A file is untrusted. It is opened by its content, without its name and without any protocol, and only in formats that hold their
pictures themselves: a list of other files or addresses is refused before anything that it names is opened.
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
"""Of one picture, 8K: more is taken for an attack on memory."""
FORMATS = (
    "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,flv,live_flv,kux,asf,ogg,gif,apng,swf,ivf,nut,mxf,rm,dv,gxf,wtv,nsv,nuv,dhav,lmlm4,"
    "h261,h263,h264,hevc,vvc,evc,obu,av1,avs2,avs3,cavsvideo,dirac,dnxhd,vc1,vc1test,mjpeg,mjpeg_2000,mpjpeg,smjpeg,yuv4mpegpipe,"
    "flic,roq,smk,bink,4xm,amv,jpegxl_anim,bmp_pipe,dpx_pipe,exr_pipe,hdr_pipe,j2k_pipe,jpeg_pipe,jpegls_pipe,jpegxl_pipe,pam_pipe,"
    "pbm_pipe,pcx_pipe,pgm_pipe,png_pipe,ppm_pipe,psd_pipe,qoi_pipe,sgi_pipe,sunrast_pipe,tiff_pipe,webp_pipe,xbm_pipe,xwd_pipe"
)
"""FFmpeg's names of the formats whose files hold their pictures themselves."""
PROMISED = {"mov", "matroska", "avi", "asf", "flv", "nut", "mxf", "ivf"}
"""Formats that write how long they last, so that a file that ends sooner is known to be cut short."""
DECODE_ORDER = {"avi"}
"""Formats that know only in which order pictures are decoded ..."""
REORDERED = {"h264", "hevc", "vvc"}
"""... and codecs of which that does not tell in which they are shown."""
FAULTS = (OSError, ValueError, MemoryError, EOFError, *(() if av is None else (av.FFmpegError,)))
"""What libraries raise of a file that cannot be read."""
LEFT = 1.0
"""Seconds by which an earlier picture may stand in for one that cannot be decoded."""
COVER = 0x400
"""FFmpeg's flag of a stream that is a picture attached to the file."""
INDEXES = 32
"""Files whose index is remembered: some megabytes for one of an hour."""
STRAY = 256
"""Packets that are passed over after a seek until one is known."""
_NONE = np.iinfo(np.int64).min


@dataclass(frozen=True)
class PacketIndex:
    """What the packets of a video say.

    stamps   (packets, 3) int64, in the order of the file: presentation time, decoding time, bytes
    times    seconds from the first picture: of each packet, NaN for one that shows nothing; without `stamped`, of each picture in turn
    keys     numbers of the packets at which decoding can begin, ascending from 0
    stamped  do packets say when their pictures are shown?
    end      where the last picture ends
    length   how long the video lasts: `end`, or more where the file is cut short
    """

    stamps: np.ndarray
    times: np.ndarray
    keys: np.ndarray
    stamped: bool
    end: float
    length: float

    @cached_property
    def _order(self) -> np.ndarray:
        return np.argsort(self.times, kind="stable")[: int(np.isfinite(self.times).sum())]

    @cached_property
    def _marks(self) -> np.ndarray:
        shown, decoded, size = self.stamps.T
        return np.stack([np.where(shown != _NONE, shown, decoded), size], axis=1)

    def mark(self, number: int) -> tuple[int, int]:
        """By which a packet is known again: its time and its size."""
        time, size = self._marks[number].tolist()
        return time, size

    def find(self, mark: tuple[int, int]) -> int | None:
        """The number of the packet of a mark, if there is just one."""
        found = np.flatnonzero((self._marks == mark).all(axis=1))
        return int(found[0]) if len(found) == 1 else None

    def shown(self, second: float) -> int:
        """The number of the picture that is shown at a second; before the first one, that one."""
        return int(self._order[max(int(np.searchsorted(self.times[self._order], second, side="right")) - 1, 0)])

    def key(self, number: int) -> int:
        """The place in `keys` of the last from which a picture can be decoded: one shown before a key picture needs the one before."""
        good = (self.keys <= number) & (self.times[self.keys] <= self.times[number])
        return int(np.flatnonzero(good)[-1]) if good.any() else 0

    def between(self, second: float, number: int) -> int:
        """Pictures that are shown after a second and up to the one of this number."""
        return int(np.count_nonzero((self.times > second) & (self.times <= self.times[number])))


def require_regular_file(path: Path) -> Path:
    """A path to a file, perhaps through links. Raises `TaskError` for a pipe or a device, which would be waited for."""
    with reading_errors(path):
        if not stat.S_ISREG(path.stat().st_mode):
            raise TaskError(f"cannot read video {path}: it is no regular file")
    return path


class _NamelessFile:
    """A file without its name, so that nothing but its content tells what it is. `name` stands in where the content does not."""

    def __init__(self, path: Path, name: str = ""):
        self._file = require_regular_file(path).open("rb", buffering=0)
        self.read, self.seek, self.tell, self.close = self._file.read, self._file.seek, self._file.tell, self._file.close
        self.name = name


@contextmanager
def reading_errors(path: Path, what: str = "cannot read video") -> Iterator[None]:
    """What the libraries raise of a file comes out as a `TaskError` that names it."""
    try:
        yield
    except FAULTS as error:
        said = getattr(error, "strerror", None) or first_line(error)
        raise TaskError(f"{what} {path}: {said}") from error


def _opened(path: Path) -> Any:
    """PyAV's container of a file that may be read. Raises `TaskError`."""
    require("av", "reading videos")
    guard = {"format_whitelist": FORMATS, "protocol_whitelist": "none"}
    for name in ("", f"video{path.suffix.lower()}"):
        try:
            return av.open(_NamelessFile(path, name), container_options=guard, metadata_errors="replace", buffer_size=2**16)
        except av.InvalidDataError:
            if name:
                raise
        except ValueError:  # as PyAV has an invalid argument, here the format
            raise TaskError(
                f"cannot read video {path}: only formats that hold their pictures themselves are read, not lists of other files (playlists)"
            ) from None
    raise AssertionError


def format_of(path: Path) -> str:
    """FFmpeg's name for a file's format."""
    with reading_errors(path), _opened(path) as container:
        return str(container.format.name)


def _flags(stream: Any) -> int:
    """What a stream is for; some releases of PyAV have no number for it, the oldest nothing."""
    found = getattr(stream, "disposition", 0)
    return int(getattr(found, "value", found))


def _stream(path: Path, container: Any) -> Any:
    """The video of a container, which may have a cover beside it."""
    streams = [s for s in container.streams.video if not _flags(s) & COVER]
    if not streams:
        raise TaskError(f"{path} has no video")
    stream = streams[0]
    if stream.codec_context is None:
        raise TaskError(f"{path} has a video in a format that cannot be decoded here")
    if stream.width * stream.height > MAX_PIXELS:
        raise TaskError(f"{path} has frames of {stream.width}x{stream.height}; at most {MAX_PIXELS} pixels are decoded")
    return stream


def _demuxed(container: Any, *streams: Any) -> Iterator[Any]:
    """The packets that hold something, up to where the file cannot be read on."""
    packets = container.demux(*streams)
    while True:
        try:
            packet = next(packets)
        except (StopIteration, *FAULTS):
            return
        if packet.size:
            yield packet


def _stamp(packet: Any) -> tuple[int, int, int]:
    return _NONE if packet.pts is None else packet.pts, _NONE if packet.dts is None else packet.dts, packet.size


def _mark(packet: Any) -> tuple[int, int]:
    shown, decoded, size = _stamp(packet)
    return shown if shown != _NONE else decoded, size


def index_of(path: Path) -> PacketIndex:
    """The index of a file, remembered for as long as the file stays as it is. Raises `TaskError`."""
    with reading_errors(path):
        state = path.stat()
        return _indexed(path, state.st_mtime_ns, state.st_size)


@dataclass(frozen=True)
class _Packets:
    """The packets of a video, in the order of the file; `durations` in ticks of its clock, 0 where unknown.

    until     the second at which the last packet of any stream ends, for a video may be shorter than its sound
    headed    does the format write how long a file lasts? `promised` is what it says then
    in_order  does the format know only in which order they are decoded, and the codec another in which they are shown?
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
    with _opened(path) as container:
        stream = _stream(path, container)
        rows: list[tuple[int, int, int, int, bool, bool]] = []
        until = 0.0
        for packet in _demuxed(container):
            begun = packet.pts if packet.pts is not None else packet.dts
            if begun is not None and packet.time_base:
                until = max(until, float((begun + (packet.duration or 0)) * packet.time_base))
            if packet.stream.index == stream.index:
                rows.append((*_stamp(packet), packet.duration or 0, packet.is_keyframe, packet.is_discard))
        if all(row[-1] for row in rows):
            raise TaskError(f"{path} has no frame that can be decoded")
        table, formats = np.array(rows, dtype=np.int64), set(container.format.name.split(","))
        headed = bool(formats & PROMISED)
        return _Packets(
            table[:, :3], table[:, 3], np.flatnonzero(table[:, 4]), table[:, 5] > 0, stream.time_base,
            float(stream.average_rate or stream.guessed_rate or 25), until - min(container.start_time or 0, 0) / 1_000_000, headed,
            (container.duration or 0) / 1_000_000 if headed else 0.0,
            bool(formats & DECODE_ORDER) and stream.codec_context.name in REORDERED and bool(stream.codec_context.has_b_frames),
        )  # fmt: skip


@lru_cache(maxsize=INDEXES)
def _indexed(path: Path, changed: int, size: int) -> PacketIndex:
    read = _read(path)
    shown, decoded = read.stamps[:, 0], read.stamps[:, 1]
    stamped = not read.in_order and read.clock is not None and bool((shown != _NONE).all())
    if stamped:
        ticks = shown + _restarts(decoded, read.durations)
        times = np.where(read.hidden, np.nan, _seconds(ticks - ticks[~read.hidden].min(), read.clock))
        keys = np.union1d([0], read.keys)
        if not read.headed:  # such a file may have been cut out of another: its first pictures may lack what they are decoded from
            times[times < times[_first(path)]] = np.nan
            times = np.where(np.isnan(times), np.nan, _seconds(ticks - ticks[np.isfinite(times)].min(), read.clock))
        in_turn = np.sort(times[np.isfinite(times)])
        # Where pictures change places, a packet's duration is that of decoding, and that of the last packet is right at least.
        final = -1 if (np.diff(times[np.isfinite(times)]) < 0).any() else int(np.nanargmax(times))
        last = float(_seconds(read.durations[final], read.clock))
    else:
        if read.clock is not None and bool((decoded != _NONE).all()) and bool((np.diff(decoded) > 0).all()):
            times = _seconds(decoded - decoded[0], read.clock)
        else:
            times = np.arange(len(shown)) * (float(_seconds(np.median(read.durations), read.clock)) or 1 / read.rate)
        keys, in_turn, last = np.array([0]), times, 0.0
    gaps = np.diff(in_turn)
    if not last > 0:  # unknown: a short one of those before
        last = float(np.quantile(gaps[gaps > 0], 0.25)) if (gaps > 0).any() else 1 / read.rate
    end = float(in_turn[-1]) + last
    cut = read.promised > read.until + 0.5 + 0.01 * read.promised
    return PacketIndex(read.stamps, times, keys, stamped, end, max(end, read.promised) if cut else end)


def _first(path: Path) -> int:
    """The number of the packet of the first picture that can be decoded; 0 where there is none."""
    with _opened(path) as container:
        stream = _stream(path, container)
        for number, packet in enumerate(_demuxed(container, stream)):
            packet.pts = number
            try:
                frames = stream.codec_context.decode(packet)
            except FAULTS:
                continue
            if frames:
                return int(frames[0].pts)
        return 0


def _seconds(ticks: Any, clock: Fraction | None) -> Any:
    """As exact as a float can be, so that pictures meet the seconds at which they begin."""
    return ticks * clock.numerator / clock.denominator if clock else ticks * 0.0


def _restarts(decoded: np.ndarray, durations: np.ndarray) -> np.ndarray:
    """What is added to the clock from each packet on: recordings that were put one after another begin it anew."""
    added = np.zeros(len(decoded), dtype=np.int64)
    known = np.flatnonzero(decoded != _NONE)
    steps = np.diff(decoded[known])
    for place in np.flatnonzero(steps < 0):
        added[known[place + 1] :] += max(int(durations[known[place]]), 1) - steps[place]
    return added


@dataclass
class _DecodingRun:
    """Decoding from a key picture on: what is shown, and what was decoded beyond it. Each is (time, number, frame)."""

    frames: Iterator[tuple[float, int, Any]]
    shown: tuple[float, int, Any] | None = None
    ahead: tuple[float, int, Any] | None = None

    def advance(self, second: float, number: int) -> None:
        """Go on to the picture of this number, or else the last before the second."""
        while self.shown is None or self.shown[1] != number:
            if self.ahead is None:
                self.ahead = next(self.frames, None)
            if self.ahead is None or self.ahead[0] > second:
                return
            self.shown, self.ahead = self.ahead, None


class VideoFile:
    """An open video file. `damaged` counts its packets that could not be decoded so far."""

    def __init__(self, path: Path):
        self.index = index_of(path)
        self.length, self.end, self.damaged = self.index.length, self.index.end, 0
        self._path, self._seeks, self._whole, self._next = path, True, True, 0
        with reading_errors(path):
            self._container = _opened(path)
            stream = _stream(path, self._container)
        self._context = stream.codec_context
        self.height, self.width = stream.height, stream.width
        self._rewound()

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._container.close()

    def frames_at(self, seconds: Sequence[float]) -> Iterator[tuple[float, np.ndarray]]:
        """What is shown at each of the seconds, which ascend, and since when. A picture that is shown again is the same object.

        Where a picture cannot be decoded the last one before it stands in; a second is lost where that is more than `LEFT` older. Raises
        `TaskError` where more than a quarter of the seconds are lost, or nothing can be decoded. (A packet or two without a picture are
        no loss: some codecs have such.)
        """
        index, run, lost = self.index, _DecodingRun(self._decoded(0)), 0
        number, pixels = -1, np.empty(0)
        with reading_errors(self._path):
            for second in seconds:
                wanted = index.shown(second)
                key, back = index.key(wanted), 1
                if index.keys[key] > self._next:
                    run = _DecodingRun(self._decoded(key))
                run.advance(second, wanted)
                while run.shown is None and key > 0:  # this key picture itself cannot be decoded
                    key, back = max(key - back, 0), 2 * back
                    run = _DecodingRun(self._decoded(key))
                    run.advance(second, wanted)
                found = run.shown or run.ahead
                if found is None:
                    raise TaskError(f"{self._path} has no frame that can be decoded")
                if found[1] != number:
                    number, pixels = found[1], self._pixels(found[2])
                lost += abs(found[0] - index.times[wanted]) > LEFT and (index.between(found[0], wanted) > 2 or found[0] > second)
                yield found[0], pixels
        if 4 * lost > len(seconds):
            raise TaskError(f"{self._path} is damaged: {lost} of the {len(seconds)} frames to be read cannot be decoded")

    def all_frames(self) -> Iterator[tuple[float, np.ndarray]]:
        """Every picture in turn, and since when it is shown."""
        with reading_errors(self._path):
            for time, _, frame in self._decoded(0):
                yield time, self._pixels(frame)

    def _decoded(self, key: int) -> Iterator[tuple[float, int, Any]]:
        """(time, number, frame) of what is shown from a key picture on."""
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
        for number, packet in self._packets(first):
            packet.pts = number
            yield from self._some(packet)
        yield from self._some(None)

    def _some(self, packet: Any) -> list[Any]:
        try:
            return list(self._context.decode(packet))
        except FAULTS:
            self.damaged += 1
            return []

    def _packets(self, first: int) -> Iterator[tuple[int, Any]]:
        """(number, packet) from a number on."""
        self._go(first)
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

    def _go(self, first: int) -> None:
        """Let the next packet be this one, or one before it."""
        if not (self._whole and first == 0 == self._next) and self._seeks and first:
            for back in (0, 1, 3):  # a seek may land behind what was asked for
                place = max(int(np.searchsorted(self.index.keys, first)) - back, 0)
                if self._sought(int(self.index.keys[place]), first):
                    return
            self._seeks = False
            self._rewind()
        elif not (self._whole and self._next <= first):
            self._rewind()

    def _sought(self, aim: int, first: int) -> bool:
        """Seek to a packet. Has one been found that the index knows, and not behind `first`?"""
        stream = _stream(self._path, self._container)
        clock = next((int(c) for c in self.index.stamps[aim, [1, 0]] if c != _NONE), None)
        try:
            self._container.seek(clock, stream=stream)
        except (TypeError, *FAULTS):
            return False
        self._source, self._whole = _demuxed(self._container, stream), False
        for packet in islice(self._source, STRAY):
            known = self.index.find(_mark(packet))
            if known is not None:
                self._source, self._next = chain([packet], self._source), known
                return known <= first
        return False

    def _rewind(self) -> None:
        self._container.close()
        self._container = _opened(self._path)
        self._rewound()

    def _rewound(self) -> None:
        self._source, self._next, self._whole = _demuxed(self._container, _stream(self._path, self._container)), 0, True

    def _pixels(self, frame: Any) -> np.ndarray:
        if frame.width * frame.height > max(self.height * self.width, 1) * 4:
            raise TaskError(f"{self._path} has a frame of {frame.width}x{frame.height}, much larger than it says")
        pixels: np.ndarray = frame.to_ndarray(format="rgb24")
        matrix = next((bytes(data) for data in frame.side_data if "DISPLAYMATRIX" in str(data.type)), b"")
        if len(matrix) != 36:
            return pixels
        a, b, _, c, d, *_ = np.frombuffer(matrix, dtype=np.int32).tolist()
        return oriented(pixels, (a, b, c, d))


def oriented(pixels: np.ndarray, matrix: tuple[float, float, float, float]) -> np.ndarray:
    """A picture as it is to be looked at: (a, b, c, d) takes column x and row y to column a x + c y and row b x + d y.

    Of other angles than quarter turns, the nearest of these.
    """
    a, b, c, d = matrix
    if abs(b) + abs(c) > abs(a) + abs(d):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
