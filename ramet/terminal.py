"""What commands print: results by `show` on standard output; beside them, on standard error, what the package logs, errors and bars.

The package says nothing by itself: every module logs to a logger of its own, and the command line calls `log_to`.

- Text is plain. Names, paths, errors and the output of models are never interpreted as markup, and their control characters are removed;
  styles are given with `rich.text.Text`.
- A terminal gets colours, moving bars and tables as wide as itself. A file or pipe gets every record on one line, however long.
- A character that a stream cannot encode is replaced by a stand-in, never an error; see `tolerate`.
"""

from __future__ import annotations

import codecs
import io
import logging
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich import box, table
from rich.cells import cell_len
from rich.console import Console, ConsoleDimensions, ConsoleOptions, RenderableType, RenderResult
from rich.rule import Rule
from rich.segment import Segment
from rich.text import Text

_CONTROLS = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
_UNLIMITED = 10**9
_MIN_WIDTH = 20
_PROSE = 24
"""Cells wider than this may be wrapped between words."""
_STAND_INS = {
    "→": "->", "…": "...", "±": "+-", "µ": "u", "█": "#", "▓": "=", "▒": "-", "░": ".", "│": "|", "─": "-", "━": "-", "•": "*",
}  # fmt: skip


class Screen(Console):
    """A console that prints all strings as plain text. Unless a `width` is given, it is as wide as its terminal."""

    def __init__(self, **options: Any):
        self._fixed_width = "width" in options
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    @property
    def size(self) -> ConsoleDimensions:
        """Columns and lines of the terminal; where there is none and no width was given, the width is unlimited."""
        detected = super().size
        if not self.is_terminal and not self._fixed_width:
            return ConsoleDimensions(_UNLIMITED, detected.height)
        # On a dumb terminal, rich ignores the variable COLUMNS.
        return ConsoleDimensions(max(self._width or detected.width, _MIN_WIDTH), detected.height)

    @size.setter
    def size(self, new: tuple[int, int]) -> None:
        self.width, self.height = new

    @property
    def moves(self) -> bool:
        """Whether the terminal can redraw what was printed."""
        return self.is_terminal and not self.is_dumb_terminal

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The segments of a renderable, without control characters in its text."""
        for segment in super().render(renderable, options):
            if segment.control or not _CONTROLS.search(segment.text):
                yield segment
            else:
                yield Segment(_CONTROLS.sub("", segment.text), segment.style)


class Table(table.Table):
    """A table that never breaks numbers and names: if it does not fit the width, each row becomes a block of lines."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        widths = self._widths(console, options.max_width - (self._extra_width + sum(self.padding[1::2]) * len(self.columns)))
        if widths is None:
            yield from self._blocks(options.max_width)
            return
        for column, width in zip(self.columns, widths, strict=True):
            column.width = width
        yield from super().__rich_console__(console, options)

    def _widths(self, console: Console, room: int) -> list[int] | None:
        """The widths of the columns, in all at most `room`; None if that would cut a cell."""
        whole, least = [], []
        for column in self.columns:
            lines = [str(cell).splitlines() or [""] for cell in column.cells]
            longest = max((cell_len(line) for cell in lines for line in cell), default=0)
            word = max((cell_len(word) for cell in lines for line in cell for word in line.split()), default=0)
            header = str(column.header)
            least.append(max([longest if longest <= _PROSE else max(_PROSE, word), *map(cell_len, header.split())]))
            whole.append(max(longest, cell_len(header)))
        if sum(whole) <= room:
            return whole
        if sum(least) > room:
            return None
        widths = least
        while sum(widths) < room:
            # Spare columns go where the most is missing.
            n = max(range(len(widths)), key=lambda n: whole[n] - widths[n])
            widths[n] += 1
        return widths

    def _blocks(self, room: int) -> RenderResult:
        """The rows as blocks of one line per column."""
        if self.title:
            yield Text(str(self.title), "italic")
        rows = zip(*(column.cells for column in self.columns), strict=True)
        filled = [[(str(c.header), cell) for c, cell in zip(self.columns, row, strict=True) if str(cell)] for row in rows]
        named = max((cell_len(header) for row in filled for header, _ in row), default=0)
        word = max((cell_len(word) for row in filled for _, cell in row for word in str(cell).split()), default=0)
        if named + word + len("│  │  │") <= room:
            blocks = table.Table(show_header=False, box=self.box or box.HEAVY_HEAD)
            blocks.add_column(width=named)
            blocks.add_column(overflow="fold")
            for row in filled:
                for n, (header, cell) in enumerate(row, 1):
                    blocks.add_row(header, cell, end_section=n == len(row))
            yield blocks
        else:
            for row in filled:
                yield from (Text(f"{header}: {cell}") for header, cell in row)
                yield Text("")
        if self.caption:
            yield Text(str(self.caption))


class Heading:
    """The heading of a section of a command's output: a rule on a terminal, a marked line elsewhere."""

    def __init__(self, title: str):
        self.title = title

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Rule(self.title) if options.is_terminal else Text(f"-- {self.title} --")


def tagged(tag: str, style: str, text: str) -> Text:
    """`text` after a styled word such as "note:"."""
    return Text.assemble((tag, style), " ", text)


def one_line(text: str) -> str:
    """`text` with its line breaks replaced by spaces."""
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def _stand_in(error: UnicodeError) -> tuple[str, int]:
    """The codec error handler that replaces characters which cannot be encoded."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(_STAND_INS.get(c) or c.encode("ascii", "backslashreplace").decode("ascii") for c in missing), error.end


codecs.register_error("ramet.stand-in", _stand_in)


def tolerate() -> None:
    """Make standard output and standard error accept every character; those that they cannot encode become stand-ins or escape codes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="ramet.stand-in")


_results = Screen()
messages = Screen(stderr=True)


def show(shown: RenderableType, **layout: Any) -> None:
    """Print a result on standard output, or, once `give_way` was called, on standard error."""
    _results.print(shown, **layout)


def give_way(way: bool = True) -> None:
    """Leave standard output to a machine-readable result: what is shown for people goes to standard error."""
    _results.stderr = way


HEADING = {"heading": True}
"""The `extra` of a log record that is the title of a part of a command's output."""


class LineHandler(logging.Handler):
    """Shows log records on a screen, each whole on a line of its own: warnings behind a word, headings as such, others as they are."""

    def __init__(self, screen: Screen):
        super().__init__()
        self.screen = screen

    def emit(self, record: logging.LogRecord) -> None:
        """Show one record; whatever goes wrong with that is for `logging` to handle."""
        try:
            text = self.format(record)
            if record.levelno >= logging.WARNING:
                self.screen.print(tagged(f"{record.levelname.lower()}:", "yellow", text), soft_wrap=True)
            else:
                self.screen.print(Heading(text) if getattr(record, "heading", False) else text, soft_wrap=True)
        except Exception:
            self.handleError(record)


def log_to(screen: Screen, level: int = logging.INFO) -> None:
    """Show what the package logs, from `level` on, on `screen` and on no other."""
    logger = logging.getLogger("ramet")
    for handler in [handler for handler in logger.handlers if isinstance(handler, LineHandler)]:
        logger.removeHandler(handler)
    logger.addHandler(LineHandler(screen))
    logger.setLevel(level)


@contextmanager
def quiet() -> Iterator[None]:
    """A block in which transformers shows no progress bars and no warnings."""
    from transformers.utils import logging as theirs

    before = theirs.get_verbosity()
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(before)
