"""What is printed: names as they are, whole records, at any width and in any encoding."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.text import Text
from rich.tree import Tree

from ramet.display import progress
from ramet.terminal import Heading, LineHandler, Screen, Table, one_line, tagged, tolerate

NAMES = ("x[/b]", "lr[a]1", "t:100:", "[bold red]", "[link=http://x]y[/link]", r"a\[b]", "{0}", "%s")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_terminal(width: int, **environ: str) -> Screen:
    return Screen(file=Terminal(), width=width, height=25, _environ={"TERM": "xterm", **environ}, color_system=None)


def output(screen: Screen) -> str:
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_printed_as_it_is_wherever_it_stands(name):
    for screen in (Screen(file=io.StringIO()), on_terminal(100)):
        table = Table("what", name, title=name, caption=name)
        table.add_row(name, name)
        for shown in (name, Text(name), tagged("note:", "yellow", name), table, Tree(name), Heading(name)):
            screen.print(shown)
        assert output(screen).count(name) == 10


def test_control_characters_of_what_is_shown_do_not_reach_the_terminal():
    for shown in ("a\x1b[31mb\x07\x9bc", Text("a\x1b[31mb\x07\x9bc")):
        screen = on_terminal(80)
        screen.print(shown)
        assert output(screen) == "a[31mbc\n"


def filled(rows: int = 2) -> Table:
    table = Table("policy", "budget", "accuracy", "95%", "critical path", title="iid")
    for n in range(rows):
        table.add_row(f"a policy of a long name {n}", "48", f"0.{n}00", "0.05-0.85", "36")
    return table


def test_a_file_or_pipe_gets_every_record_on_one_line():
    screen = Screen(file=io.StringIO(), _environ={"COLUMNS": "40"})
    screen.print(filled())
    screen.print("a line of many words, " * 20)
    lines = output(screen).splitlines()
    assert sum("a policy of a long name" in line and "0.05-0.85" in line and "36" in line for line in lines) == 2
    assert max(map(len, lines)) == 440 and "…" not in output(screen)


@pytest.mark.parametrize("width", [1, 20, 30, 40, 60, 80, 100, 200])
def test_on_a_terminal_of_any_width_no_number_is_cut(width):
    screen = on_terminal(width)
    screen.print(filled())
    shown = output(screen)
    assert "…" not in shown and max(cell_len(line) for line in shown.splitlines()) <= max(width, 20)
    assert shown.count("0.05-0.85") == 2 and shown.count("0.100") == 1


@given(
    st.lists(st.lists(st.text("ab 0.9─", max_size=40), min_size=3, max_size=3), min_size=1, max_size=4),
    st.integers(20, 130),
)
@settings(max_examples=60)
def test_whatever_stands_in_a_table_is_all_there_and_within_the_width(rows, width):
    screen = on_terminal(width)
    table = Table("one", "another", "the third")
    for row in rows:
        table.add_row(*row)
    screen.print(table)
    shown = output(screen)
    assert max(cell_len(line) for line in shown.splitlines()) <= width
    for letter in "ab09":
        assert shown.count(letter) >= sum(cell.count(letter) for row in rows for cell in row)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_stream_that_cannot_take_a_character_gets_a_stand_in(encoding, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    tolerate()
    screen = Screen()
    screen.print(filled())
    screen.print("root → answered … ░▒▓█ ± 5 µs \udcff 你")
    sys.stdout.flush()
    shown = raw.getvalue().decode(encoding)
    assert ("root → answered …" if encoding == "utf-8" else "root -> answered ...") in shown
    assert r"\udcff" in shown and ("你" if encoding == "utf-8" else r"\u4f60") in shown


@pytest.fixture
def draw_on() -> Iterator[Callable[[Screen], None]]:
    yield progress.draw_on
    progress.draw_on(None)


def update(number: int) -> dict[str, float]:
    return {"update": number, "reward": 0.5, "accuracy": 0.5, "spawn_rate": 0.5, "generated": 60.0, "critical_path": 50.0}


@pytest.mark.parametrize("width", [30, 40, 60, 80, 120])
def test_a_bar_keeps_count_and_time_at_any_width(width, draw_on, caplog):
    screen = on_terminal(width)
    draw_on(screen)
    with caplog.at_level("INFO", "ramet"), progress.training("training of x[/b] {0}", 200, 0) as report:
        for number in range(100):
            report(update(number))
        (bar,) = [live for live in screen._live_stack if hasattr(live, "get_renderable")]
        bar_screen = on_terminal(width)
        bar_screen.print(bar.get_renderable())
    (line,) = output(bar_screen).splitlines()
    assert "100/200" in line and ":" in line and cell_len(line) <= width
    assert ("accuracy 50%" in line) == (width >= 80) and ("path 50" in line) == (width >= 120)
    assert not caplog.messages


@pytest.mark.parametrize("screen", [None, Screen(file=io.StringIO()), on_terminal(80, TERM="dumb")])
def test_where_no_bar_can_move_a_line_is_logged_at_each_tenth_and_for_each_update(screen, draw_on, caplog):
    draw_on(screen)
    with caplog.at_level("INFO", "ramet"), progress.measuring("x[/b]", 50) as report:
        for _ in range(50):
            report(1)
    assert caplog.messages == [f"x[/b]: {n} of 50 outcomes" for n in range(5, 55, 5)]
    caplog.clear()
    with caplog.at_level("INFO", "ramet"), progress.training("x[/b]", 50, 0) as report:
        for number in range(3):
            report(update(number))
    facts = "reward 0.50  accuracy 50%  spawns 50%  tokens 60  path 50"
    assert caplog.messages == [f"x[/b]: {n} of 50 updates: {facts}" for n in (1, 2, 3)]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_logged_stands_whole_on_one_line_behind_its_level(name):
    for screen in (Screen(file=io.StringIO()), on_terminal(30)):
        records = [
            logging.LogRecord("ramet.x", level, "", 0, f"{name} and many words more than fit", None, None)
            for level in (logging.INFO, logging.WARNING, logging.ERROR)
        ]
        records[0].heading = True
        for record in records:
            LineHandler(screen).emit(record)
        _, *lines = output(screen).splitlines()[-3:]
        assert lines == [f"{tag}: {name} and many words more than fit" for tag in ("warning", "error")]


def test_the_package_says_nothing_until_it_is_told_where_to():
    program = """
import logging, io, ramet
from ramet.display import progress
from ramet.terminal import Screen, log_to
def work():
    logging.getLogger("ramet.agents").error("lost")
    with progress.measuring("work", 1) as report:
        report(1)
work()
for level in (logging.INFO, logging.WARNING):
    screen = Screen(file=io.StringIO())
    log_to(screen, level)
    work()
    print(screen.file.getvalue().splitlines())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8", timeout=60)
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["['error: lost', 'work: 1 of 1 outcomes']", "['error: lost']"]


def test_the_lines_of_an_error_are_one():
    assert one_line("a\n  b\r\n\nc") == "a b c"
