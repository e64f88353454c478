"""Files: whole or not at all, to whatever a path names, in UTF-8; folders that one process works in."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ramet import storage
from ramet.agents.journal import Journal
from ramet.errors import StorageError

RECORDS = [{"record": "x", "name": "modèle [b] \udcff", "value": 1.5}]


def written(path: Path) -> None:
    storage.writable(path)
    storage.write_json(path, RECORDS)


def test_a_file_is_replaced_whole_and_its_folder_made(tmp_path):
    path = tmp_path / "new" / "results.json"
    for _ in range(2):
        written(path)
        assert json.loads(path.read_text(encoding="utf-8")) == RECORDS
    assert [child.name for child in path.parent.iterdir()] == ["results.json"]


def test_what_a_link_points_to_is_written_and_the_link_stays(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far" / "results.json")
    for _ in range(2):
        written(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and json.loads((tmp_path / "far" / "results.json").read_text("utf-8")) == RECORDS


def test_a_device_is_written_to_and_stays_one():
    before = os.stat(os.devnull)
    written(Path(os.devnull))
    assert os.path.samestat(before, os.stat(os.devnull)) and Path(os.devnull).is_char_device()


def test_a_fifo_is_written_to_and_stays_one(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text("utf-8")))
    reader.start()
    written(tmp_path / "pipe")
    reader.join()
    assert json.loads(read[0]) == RECORDS and (tmp_path / "pipe").is_fifo()


def test_an_open_descriptor_is_written_on_from_where_it_stands(tmp_path):
    with (tmp_path / "log").open("w", encoding="utf-8") as file:
        file.write("before\n")
        file.flush()
        written(Path(f"/dev/fd/{file.fileno()}"))
    assert (tmp_path / "log").read_text("utf-8") == "before\n" + json.dumps(RECORDS, indent=1) + "\n"


@pytest.mark.parametrize("name", ["-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_standard_output_has_several_names(name, capsys):
    assert storage.to_stdout(Path(name))
    written(Path(name))
    assert json.loads(capsys.readouterr().out) == RECORDS


def test_what_cannot_be_written_is_known_before_and_nothing_is_left(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "below.json", Path("/proc/none/results.json"), tmp_path / ("x" * 300)):
        with pytest.raises(StorageError, match="cannot write"):
            storage.writable(path)
    assert [child.name for child in tmp_path.iterdir()] == ["file"]


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path):
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfx = 1")
    assert storage.read_text(tmp_path / "a") == "x = 1"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_worked_on_with_a_note(number, tmp_path, monkeypatch, caplog):
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    storage.lock(tmp_path / "run")
    assert "has no locks" in caplog.text and (tmp_path / "run").is_dir()


def test_a_folder_that_was_claimed_in_vain_is_removed_and_one_with_work_in_it_is_not(tmp_path):
    for name, lines in (("vain", 0), ("worked", 1)):
        storage.lock(tmp_path / "runs" / name)
        (tmp_path / "runs" / name / storage.CONFIG).touch()
        (tmp_path / "runs" / name / "checkpoints").mkdir()
        with Journal(tmp_path / "runs" / name / "journal.jsonl", "job") as journal:
            for _ in range(lines):
                journal.append({"n": 1})
    (tmp_path / "old").mkdir()
    storage.lock(tmp_path / "old")
    storage.give_up()
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["worked"] and (tmp_path / "old").is_dir()


def test_the_locale_decides_nothing(tmp_path):
    """Under an ASCII locale the same bytes are written and read."""
    program = (
        "from pathlib import Path; from ramet.storage import read_text, write_text; import sys\n"
        "write_text(Path('text'), 'é → 你'); assert read_text(Path('text')) == 'é → 你'\n"
    )
    environment = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    (tmp_path / "program.py").write_text(program, encoding="utf-8")
    subprocess.run([sys.executable, "program.py"], cwd=tmp_path, env=environment, check=True, timeout=60)
    assert "é → 你".encode() == (tmp_path / "text").read_bytes()
