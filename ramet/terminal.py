"""What commands print: `console` for results on standard output, `messages` for what is said beside them on standard error.

- Text is text. Names, paths, errors and what models write are never read as markup, and control characters in them are left out;
  a style is given with `rich.text.Text`.
- A terminal gets colours, moving bars and tables as wide as it is. A file or pipe gets every record on one line, however long.
- A stream that does not take a character gets a stand-in for it, never an error; see `tolerate`.
"""

from __future__ import annotations

import codecs
import io
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
_WHOLE = 10**9
_LEAST = 20
_PROSE = 24
"""Cells wider than this may be broken between words."""
_STAND_INS = {
    "→": "->", "…": "...", "±": "+-", "µ": "u", "█": "#", "▓": "=", "▒": "-", "░": ".", "│": "|", "─": "-", "━": "-", "•": "*",
}  # fmt: skip


class Screen(Console):
    """A console to which all strings are plain text. Without a given `width` it is as wide as its terminal."""

    def __init__(self, **options: Any):
        self._as_asked = "width" in options
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    @property
    def size(self) -> ConsoleDimensions:
        found = super().size
        if not self.is_terminal and not self._as_asked:
            return ConsoleDimensions(_WHOLE, found.height)
        # Of a dumb terminal rich takes no notice of the variable COLUMNS.
        return ConsoleDimensions(max(self._width or found.width, _LEAST), found.height)

    @size.setter
    def size(self, new: tuple[int, int]) -> None:
        self.width, self.height = new

    @property
    def moves(self) -> bool:
        """Can what was printed be drawn over?"""
        return self.is_terminal and not self.is_dumb_terminal

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control or not _CONTROLS.search(segment.text):
                yield segment
            else:
                yield Segment(_CONTROLS.sub("", segment.text), segment.style)


class Table(table.Table):
    """A table whose numbers and names stay whole: where it does not fit, a block of lines for each row."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        widths = self._widths(console, options.max_width - (self._extra_width + sum(self.padding[1::2]) * len(self.columns)))
        if widths is None:
            yield from self._blocks(options.max_width)
            return
        for column, width in zip(self.columns, widths, strict=True):
            column.width = width
        yield from super().__rich_console__(console, options)

    def _widths(self, console: Console, room: int) -> list[int] | None:
        """Of the columns, within `room`; None if some cell would be cut."""
        whole, least = [], []
        for column in self.columns:
            lines = [str(cell).splitlines() or [""] for cell in column.cells]
            longest = max((cell_len(line) for found in lines for line in found), default=0)
            word = max((cell_len(word) for found in lines for line in found for word in line.split()), default=0)
            header = str(column.header)
            least.append(max([longest if longest <= _PROSE else max(_PROSE, word), *map(cell_len, header.split())]))
            whole.append(max(longest, cell_len(header)))
        if sum(whole) <= room:
            return whole
        if sum(least) > room:
            return None
        widths = least
        while sum(widths) < room:
            # What is left over goes where the most is missing.
            n = max(range(len(widths)), key=lambda n: whole[n] - widths[n])
            widths[n] += 1
        return widths

    def _blocks(self, room: int) -> RenderResult:
        if self.title:
            yield Text(str(self.title), "italic")
        rows = zip(*(column.cells for column in self.columns), strict=True)
        filled = [[(str(c.header), cell) for c, cell in zip(self.columns, row, strict=True) if str(cell)] for row in rows]
        named = max((cell_len(header) for row in filled for header, _ in row), default=0)
        word = max((cell_len(word) for row in filled for _, cell in row for word in str(cell).split()), default=0)
        if named + word + len("│  │  │") <= room:
            shown = table.Table(show_header=False, box=self.box or box.HEAVY_HEAD)
            shown.add_column(width=named)
            shown.add_column(overflow="fold")
            for row in filled:
                for n, (header, cell) in enumerate(row, 1):
                    shown.add_row(header, cell, end_section=n == len(row))
            yield shown
        else:
            for row in filled:
                yield from (Text(f"{header}: {cell}") for header, cell in row)
                yield Text("")
        if self.caption:
            yield Text(str(self.caption))


class Heading:
    """The title of a part of a command's output."""

    def __init__(self, title: str):
        self.title = title

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Rule(self.title) if options.is_terminal else Text(f"-- {self.title} --")


def tagged(tag: str, style: str, text: str) -> Text:
    """`text` behind a styled word, such as "note:"."""
    return Text.assemble((tag, style), " ", text)


def one_line(text: str) -> str:
    """`text` without its line breaks."""
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def _stand_in(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(_STAND_INS.get(c) or c.encode("ascii", "backslashreplace").decode("ascii") for c in missing), error.end


codecs.register_error("ramet.stand-in", _stand_in)


def tolerate() -> None:
    """Make standard output and standard error take every character: one that they cannot encode is written as its stand-in or its code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="ramet.stand-in")


def give_way() -> None:
    """Leave standard output to a machine-readable result: what is shown for people goes to standard error."""
    console.stderr = True


console = Screen()
messages = Screen(stderr=True)


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and warnings of transformers."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
